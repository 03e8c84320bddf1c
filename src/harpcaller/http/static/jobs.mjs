// The list of jobs: filters that are counts, live rows, and only as many rows in the page as can be seen.
import { get } from "./api.mjs";
import { normal, partsOf, STATE_GROUPS, toggled, valuesOf, withValue } from "./filters.mjs";
import { useKeys } from "./keys.mjs";
import { HELD, listOf } from "./list.mjs";
import { useLive } from "./live.mjs";
import { link, navigate } from "./router.mjs";
import { callOf } from "./rows.mjs";
import { Button, count, copy, Dialog, duration, Empty, Fault, fullTime, html, Icon, jobSpellings, Loading, Menu, menuIsOpen, queueName, setSetting, setting, setTitle, shortDuration, State, STATES, Time, useEffect, useLayoutEffect, useMemo, useNow, useReducer, useRef, useSettings, useState, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.jobs;
const FACETS = ["state", "procedure", "host", "queue", "owner", "end_type"];
const SHOWN = 8;           // values of a facet before "more"
const COUNT_EVERY = 5_000;

// --- columns --------------------------------------------------------------------------------------------------------

function End({ row, now }) {
  if (row.unreachable_since && row.state === "running") return html`<span class="warn" title=${fullTime(row.unreachable_since)}>${text.unreachable(visible(row.host), duration(now - row.unreachable_since))}</span>`;
  if (row.stop && row.stop !== "confirmed") return html`<span class=${row.stop === "pending" ? "warn" : "bad"}>${text.stops[row.stop] || row.stop}</span>${row.holds_slot ? html`<span class="warn"> ${text.holdsSlot}</span>` : ""}`;
  if (row.holds_slot && row.time.end) return html`<span class="warn">${text.holdsSlot}</span>`;
  if (!row.end_type) return row.records ? html`<span class="dim">${text.records(count(row.records), row.records)}</span>` : "";
  const message = visible(row.end_message);
  return html`<span title=${message}><b class=${row.state === "failed" ? "bad" : row.state === "raised" ? "warn" : "dim"}>${visible(row.end_type)}</b>${message && ": " + message}</span>`;
}

// name: [heading, draws the cell, class]
const COLUMNS = {
  state: [text.columns.state, ({ row }) => html`<${State} state=${row.state} />`],
  job: [text.columns.job, ({ row }) => {
    const [name, args] = callOf(row);
    return html`<a class="row-link" href=${link("/jobs/" + row.job)} title=${name + args}><b>${name}</b><span class="mono dim">${args}</span></a>`;
  }],
  end: [text.columns.end, End],
  host: [text.columns.host, ({ row }) => html`<span title=${visible(row.host)}>${visible(row.host)}</span>`],
  queue: [text.columns.queue, ({ row }) => (row.queue ? html`<span class="mono" title=${queueName(row.queue)}>${queueName(row.queue)}</span>` : html`<span class="dim">-</span>`)],
  owner: [text.columns.owner, ({ row }) => html`<span title=${visible(row.owner)}>${visible(row.owner ?? "-")}</span>`],
  info: [text.columns.info, ({ row }) => html`<span class="mono dim" title=${visible(row.info_preview)}>${row.info_preview === "null" ? "" : visible(row.info_preview)}</span>`],
  records: [text.columns.records, ({ row }) => (row.records ? count(row.records) : ""), "num"],
  submitted: [text.columns.submitted, ({ row }) => html`<${Time} at=${row.time.submit} />`, "num"],
  ended: [text.columns.ended, ({ row }) => html`<${Time} at=${row.time.end} none="" />`, "num"],
  wait: [text.columns.wait, ({ row, now }) => shortDuration((row.time.start ?? row.time.end ?? now) - row.time.submit), "num"],
  took: [text.columns.took, ({ row, now }) => (row.time.start ? shortDuration((row.time.end ?? now) - row.time.start) : ""), "num"],
};
const DEFAULT_COLUMNS = ["state", "job", "end", "host", "queue", "submitted", "wait", "took"];
const shownColumns = () => {
  const chosen = setting("columns").split(",").filter((name) => COLUMNS[name]);
  return chosen.length ? chosen : DEFAULT_COLUMNS;
};

function RowMenu({ row, query }) {
  const only = (name, value) => link("/jobs", withValue(query, name, value));
  return html`<${Menu} label=${text.rowMenu} icon="more" kind="quiet small row-menu">
    ${(close) => html`
      <a href=${only("procedure", row.procedure)} onClick=${close}>${text.only(visible(row.procedure))}</a>
      <a href=${only("host", row.host)} onClick=${close}>${text.only(visible(row.host))}</a>
      ${row.queue && html`<a href=${only("queue", row.queue.id)} onClick=${close}>${text.only(queueName(row.queue))}</a>`}
      <a href=${link("/hosts/" + encodeURIComponent(row.host))}>${text.hostPage(visible(row.host))}</a>
      <hr />
      ${jobSpellings(row.job).map(([name, spelling]) => html`<button key=${name} type="button" onClick=${() => { close(); copy(spelling, words.copiedAs(name)); }}><span>${text.copyAs(name)}</span></button>`)}`}
  </${Menu}>`;
}

// --- the rows that can be seen ----------------------------------------------------------------------------------------

let knownHeight = 32;   // of a row, in pixels; measured, since zoom, density and width change it
const AROUND = 12;      // rows drawn beyond what is seen
const MOST_ROWS = 100;  // in the page at once

/** The row above which the window begins, and how many are drawn. */
function windowOf(body, total) {
  if (!body) return [0, Math.min(total, 60)];
  const scroller = scrollerOf(body);
  const above = Math.max(0, scroller.getBoundingClientRect().top - body.getBoundingClientRect().top);
  const seen = Math.ceil(Math.min(scroller.clientHeight, innerHeight) / knownHeight);
  const first = Math.max(0, Math.min(total, Math.floor(above / knownHeight)) - AROUND);
  return [first, Math.min(total, first + Math.min(MOST_ROWS, seen + 2 * AROUND))];
}

/** The element that scrolls the rows: the list itself, or, in a narrow window, the page. */
function scrollerOf(element) {
  const list = element.closest(".list");
  return list && getComputedStyle(list).overflowY !== "visible" ? list : element.closest("[data-scroll]");
}

function Rows({ list, query, redraw, body }) {
  const [, scrolled] = useReducer((number) => number + 1, 0);
  const columns = shownColumns();
  const total = list.rows.length;
  const [first, last] = windowOf(body.current, total);
  const shown = list.rows.slice(first, last);
  const now = useNow(shown.some((row) => !row.time.end));
  useLayoutEffect(() => {
    const scroller = scrollerOf(body.current);
    scroller.scrollTop = list.scrollTop;
    scrolled();
    let frame = 0;
    function onScroll(event) {
      if (event.target !== scroller) return;
      list.scrollTop = scroller.scrollTop;
      if (!frame) frame = requestAnimationFrame(() => ((frame = 0), scrolled()));
    }
    addEventListener("scroll", onScroll, true);
    const observer = new ResizeObserver(() => scrolled());
    observer.observe(scroller);
    return () => {
      removeEventListener("scroll", onScroll, true);
      observer.disconnect();
      cancelAnimationFrame(frame);
    };
  }, [list]);
  useLayoutEffect(() => {
    const height = body.current.querySelector("tr[data-job]")?.getBoundingClientRect().height;
    if (height && Math.abs(height - knownHeight) > 0.01) {
      knownHeight = height;
      scrolled();
    }
    // The next page is fetched before its place is reached.
    if (last + 4 * AROUND > total && !list.short && list.next !== undefined && !list.error) list.more();
  });
  const space = (rows) => rows > 0 && html`<tr class="space" aria-hidden="true"><td style=${{ height: rows * knownHeight + "px" }} /></tr>`;
  function open(event, row) {
    if (event.target.closest("a, button, .menu-list") || String(getSelection())) return;
    list.cursor = row.job;
    navigate(link("/jobs/" + row.job));
  }
  const sorted = list.oldestFirst ? "ascending" : "descending";
  return html`<table class="rows" role="table" aria-rowcount=${list.next === null ? total + 1 : -1} aria-label=${text.title}>
    <thead role="rowgroup"><tr role="row" aria-rowindex="1">
      ${columns.map((name) => html`<th key=${name} role="columnheader" scope="col" class=${"c-" + name + " " + (COLUMNS[name][2] || "")} aria-sort=${name === "submitted" ? sorted : undefined}>
        ${name === "submitted"
          ? html`<button class="sort" type="button" title=${text.sort} onClick=${() => navigate(link("/jobs", withValue(query, "order", list.oldestFirst ? null : "oldest")))}>${COLUMNS[name][0]}<span class=${list.oldestFirst ? "turned" : ""}><${Icon} name="down" size=${10} /></span></button>`
          : COLUMNS[name][0]}</th>`)}
      <th role="columnheader" class="c-menu"><span class="hidden">${text.rowMenu}</span></th>
    </tr></thead>
    <tbody role="rowgroup" ref=${body}>
      ${space(first)}
      ${shown.map((row, place) => html`<tr key=${row.job} role="row" data-job=${row.job} aria-rowindex=${first + place + 2} class=${"row " + (row.gone ? "gone " : "") + (row.job === list.cursor ? "at" : "")} title=${row.gone ? text.gone : undefined}
          onClick=${(event) => open(event, row)} onFocusIn=${() => list.cursor !== row.job && ((list.cursor = row.job), redraw())}>
        ${columns.map((name) => {
          const [, Cell, kind] = COLUMNS[name];
          return html`<td key=${name} role="cell" class=${"c-" + name + " " + (kind || "")}><${Cell} row=${row} now=${now} /></td>`;
        })}
        <td role="cell" class="c-menu"><${RowMenu} row=${row} query=${query} /></td>
      </tr>`)}
      ${space(total - last)}
    </tbody>
  </table>`;
}

// --- filters ------------------------------------------------------------------------------------------------------------

function Facet({ name, values, query, names }) {
  const [all, setAll] = useState(false);
  const chosen = valuesOf(query, name);
  const here = new Map((values || []).map((entry) => [entry.value, entry]));
  const list = name === "state" ? STATES.map((state) => here.get(state) || { value: state, count: values ? 0 : null }) : [...(values || [])];
  for (const value of chosen) if (name !== "state" && !here.has(value)) list.unshift({ value, count: values ? 0 : null });
  if (!list.length) return null;
  const shown = all || name === "state" ? list : list.filter((entry, place) => place < SHOWN || chosen.includes(entry.value));
  const shape = (value) => (name === "state" ? html`<${State} state=${value} />` : html`<span class="value">${name === "queue" ? (value === "-" ? text.noQueue : visible(names.get(value) || value.slice(0, 8))) : visible(value)}</span>`);
  return html`<section class=${"facet facet-" + name} aria-label=${text.filters[name]}>
    <h2>${text.filters[name]}</h2>
    <ul>${shown.map(({ value, count: number, more }) => {
      const set = chosen.includes(value);
      return html`<li key=${value} class=${set ? "set" : number ? "" : "none"}>
        <a href=${link("/jobs", toggled(query, name, value, false))} aria-current=${set ? "true" : undefined} title=${visible(names.get(value) || value)}
          onClick=${(event) => {
            if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return;
            event.preventDefault();
            navigate(link("/jobs", toggled(query, name, value, true)));
          }}>${shape(value)}<span class="count">${number === null ? "" : more ? ">" + short(number) : count(number)}</span></a>
        <a class="add" href=${link("/jobs", toggled(query, name, value, true))} aria-label=${set ? text.takeOut(visible(value)) : text.addValue(visible(value))} title=${set ? text.takeOut(visible(value)) : text.addValue(visible(value))}><${Icon} name=${set ? "minus" : "plus"} size=${12} /></a>
      </li>`;
    })}</ul>
    ${list.length > SHOWN && name !== "state" && html`<button class="link" type="button" onClick=${() => setAll(!all)}>${all ? text.fewer : text.moreValues(list.length - SHOWN)}</button>`}
  </section>`;
}
const short = (number) => (number >= 1000 && number % 1000 === 0 ? number / 1000 + "k" : count(number));

function Facets({ counts, query, names }) {
  return html`${FACETS.map((name) => html`<${Facet} key=${name} name=${name} values=${counts?.[name]} query=${query} names=${names} />`)}
    <p class="hint">${text.facetHint}</p>`;
}

const TIMES = ["-15m", "-1h", "-6h", "-1d", "-7d"];

function localInput(seconds) {
  const date = new Date(seconds * 1000 - new Date(seconds * 1000).getTimezoneOffset() * 60000);
  return date.toISOString().slice(0, 16);
}

function TimeMenu({ query }) {
  const from = query.get("from");
  const to = query.get("to");
  const label = from || to ? (!to && text.spans[from]) || text.range(shownTime(from), shownTime(to)) : text.anyTime;
  const set = (start, end) => link("/jobs", withValue(withValue(query, "from", start), "to", end));
  return html`<${Menu} label=${text.timeMenu} text=${text.submittedIn + " " + label} kind=${from || to ? "set" : ""}>
    ${(close) => html`
      <a href=${set(null, null)} onClick=${close}>${text.anyTime}</a>
      ${TIMES.map((span) => html`<a key=${span} href=${set(span, null)} onClick=${close} aria-current=${from === span && !to ? "true" : undefined}>${text.spans[span]}</a>`)}
      <hr />
      <form class="stack" onSubmit=${(event) => {
        event.preventDefault();
        const [start, end] = [...event.target.elements].filter((field) => field.type === "datetime-local").map((field) => field.value && String(new Date(field.value).getTime() / 1000));
        close();
        navigate(set(start, end));
      }}>
        <label>${text.from}<input type="datetime-local" defaultValue=${from > 0 ? localInput(Number(from)) : ""} /></label>
        <label>${text.to}<input type="datetime-local" defaultValue=${to > 0 ? localInput(Number(to)) : ""} /></label>
        <button class="button primary">${text.setRange}</button>
      </form>`}
  </${Menu}>`;
}
const shownTime = (value) => (!value ? "" : /^\d+(\.\d+)?$/.test(value) ? fullTime(Number(value)).slice(0, 16) : value);

const ADDED = ["host", "procedure", "owner", "end_type", "stop", "info", "arguments", "holds_slot"];

function AddFilter({ query }) {
  return html`<${Menu} label=${text.addFilter} icon="plus" text=${text.filterWord}>
    ${(close) => html`<form class="stack" onSubmit=${(event) => {
      event.preventDefault();
      const [name, value] = [event.target.elements[0].value, event.target.elements[1].value.trim()];
      close();
      if (value) navigate(link("/jobs", withValue(query, name, value)));
    }}>
      <label>${text.filterKey}<select>${ADDED.map((name) => html`<option key=${name} value=${name}>${text.filters[name]}</option>`)}</select></label>
      <label>${text.filterValue}<input type="text" maxlength="500" placeholder=${text.filterValueHint} /></label>
      <button class="button primary">${text.setFilter}</button>
    </form>`}
  </${Menu}>`;
}

function savedViews() {
  try {
    return JSON.parse(setting("views")).filter((view) => Array.isArray(view) && view.length === 2).slice(0, 50);
  } catch {
    return [];
  }
}

function Views({ query }) {
  const own = savedViews();
  const here = normal(query).toString();
  return html`<${Menu} label=${text.views} text=${text.views}>
    ${(close) => html`
      ${text.builtInViews.map(([name, search]) => html`<a key=${name} href=${link("/jobs", new URLSearchParams(search))} onClick=${close}>${name}</a>`)}
      ${own.length > 0 && html`<hr />`}
      ${own.map(([name, search]) => html`<span key=${name} class="pair"><a href=${link("/jobs", new URLSearchParams(search))} onClick=${close}>${name}</a>
        <button type="button" class="button quiet small" aria-label=${text.forgetView(name)} title=${text.forgetView(name)} onClick=${() => setSetting("views", JSON.stringify(own.filter((view) => view[0] !== name)))}><${Icon} name="close" size=${12} /></button></span>`)}
      <hr />
      <form class="stack" onSubmit=${(event) => {
        event.preventDefault();
        const name = event.target.elements[0].value.trim();
        if (name) setSetting("views", JSON.stringify([...own.filter((view) => view[0] !== name), [name, here]]));
        close();
      }}>
        <label>${text.viewName}<input type="text" maxlength="60" required /></label>
        <button class="button">${text.saveView}</button>
      </form>`}
  </${Menu}>`;
}

function Columns() {
  useSettings();
  const shown = shownColumns();
  function turn(name) {
    const now = Object.keys(COLUMNS).filter((other) => (other === name ? !shown.includes(name) : shown.includes(other)));
    setSetting("columns", now.length && now.join() !== DEFAULT_COLUMNS.join() ? now.join(",") : "");
  }
  return html`<${Menu} label=${text.columnsMenu} text=${text.columnsWord} kind="wide-only">
    ${() => Object.entries(COLUMNS).map(([name, [heading]]) => html`<label key=${name}><input type="checkbox" checked=${shown.includes(name)} disabled=${name === "job"} onChange=${() => turn(name)} />${heading}</label>`)}
  </${Menu}>`;
}

function Chips({ query, names }) {
  const parts = partsOf(query, names).filter(([name]) => name !== "from" && name !== "to");
  return html`${parts.map(([name, , shown]) => html`<span key=${name} class="chip"><span class="dim">${text.filters[name] || name}</span> <span class="value">${visible(shown)}</span>
      <a href=${link("/jobs", withValue(query, name, null))} aria-label=${text.without(text.filters[name] || name)} title=${text.without(text.filters[name] || name)}><${Icon} name="close" size=${12} /></a></span>`)}
    ${parts.length > 1 && html`<a class="clear" href=${link("/jobs")}>${text.clear}</a>`}`;
}

/** Say which part of the filter excludes all, and what to do where no job is at all. */
function Nothing({ query, list, names }) {
  const parts = partsOf(query, names);
  const [without, setWithout] = useState(null);
  const [host, setHost] = useState(null);
  useEffect(() => {
    const control = new AbortController();
    const sum = (filter) => get("/jobs/counts", [...filter, ["by", "state"]], { signal: control.signal }).then(({ by }) => total(by.state, filter));
    if (parts.length) {
      Promise.all(parts.map(async ([name, , shown]) => [name, shown, await sum(normal(withValue(query, name, null)))])).then(setWithout, () => null);
    } else get("/hosts", { limit: 1 }, { signal: control.signal }).then(({ hosts }) => setHost(hosts[0]?.name ?? ""), () => null);
    return () => control.abort();
  }, [normal(query).toString()]);
  if (!parts.length)
    return html`<${Empty} title=${text.noJobs}><p>${host === "" ? text.noHosts : text.noJobsDetail}</p>${host !== "" && html`<pre><code>harp call --wait ${host || "HOST"} PROCEDURE</code></pre>`}</${Empty}>`;
  if (list.next) return html`<${Empty} title=${text.nothingYet}><p>${(list.oldestFirst ? text.searchedUpTo : text.searchedTo)(html`<${Time} at=${list.searchedTo} />`)}</p><${Button} kind="primary" onClick=${() => list.more()}>${text.goOn}</${Button}></${Empty}>`;
  const helpful = (without || []).filter(([, , number]) => number.count);
  return html`<${Empty} title=${text.nothing}>
    ${helpful.map(([name, shown, number]) => html`<p key=${name}>${text.withoutPart(html`<b>${text.filters[name] || name} ${visible(shown)}</b>`)} <a href=${link("/jobs", withValue(query, name, null))}>${text.thereAre(number.more ? text.moreThan(count(number.count)) : count(number.count), number.count)}</a></p>`)}
    ${without && !helpful.length && html`<p>${parts.length > 1 ? text.noSinglePart : text.noPart}</p>`}
    <p><a href=${link("/jobs")}>${text.clear}</a></p>
  </${Empty}>`;
}

/** Return {count, more}: the jobs of the states that the filter lets through. */
function total(byState, filter) {
  const wanted = valuesOf(filter, "state");
  const fitting = (byState || []).filter(({ value }) => !wanted.length || wanted.includes(value));
  return { count: fitting.reduce((sum, entry) => sum + entry.count, 0), more: fitting.some((entry) => entry.more) };
}

// --- the view -------------------------------------------------------------------------------------------------------------

export function JobsView({ query, returned }) {
  useSettings();
  const [, redraw] = useReducer((number) => number + 1, 0);
  const [counts, setCounts] = useState(null);
  const [sheet, setSheet] = useState(false);
  const body = useRef(null);
  const filter = normal(query);
  const key = filter.toString() + (query.get("order") === "oldest" ? "&order=oldest" : "");
  const list = useMemo(() => listOf(key, new URLSearchParams(key), returned), [key]);
  const names = useMemo(() => new Map(), []);
  for (const row of list.rows.slice(0, 200)) if (row.queue) names.set(row.queue.id, queueName(row.queue));

  list.changed = redraw;
  list.steady = () => list.scrollTop > knownHeight / 2 || menuIsOpen() || Boolean(body.current?.contains(document.activeElement));

  // Counts are asked for again when something changed, at most every 5 s.
  const counting = useRef({ timer: 0, at: 0 }).current;
  async function askCounts() {
    counting.timer = 0;
    counting.at = Date.now();
    const answer = await get("/jobs/counts", [...filter, ["by", FACETS.join(",")]]).catch(() => null);
    if (answer && counting.key === key) setCounts(answer.by);
  }
  function countSoon() {
    if (!counting.timer) counting.timer = setTimeout(askCounts, Math.max(0, counting.at + COUNT_EVERY - Date.now()));
  }
  useEffect(() => {
    counting.key = key;
    counting.at = 0;
    setTitle(text.title);
    if (list.next === undefined) list.more();
    else list.refresh();
    askCounts();
    return () => {
      clearTimeout(counting.timer);
      counting.timer = 0;
      list.changed = () => {};
      list.steady = () => true;
    };
  }, [key]);
  useLive("jobs,counts", filter.toString(), {
    jobs(data) {
      list.take(data);
      countSoon();
    },
    counts: ({ by }) => setCounts((before) => ({ ...before, ...by })),
    refresh() {
      list.refresh();
      countSoon();
    },
  });

  /** Move the keys' row and the focus; the page is drawn first, so that the row is there. */
  function move(step) {
    if (!list.rows.length) return;
    const place = list.rows.findIndex((row) => row.job === list.cursor);
    const target = Math.max(0, Math.min(list.rows.length - 1, place < 0 ? windowOf(body.current, list.rows.length)[0] && 0 : place + step));
    list.cursor = list.rows[target].job;
    const scroller = scrollerOf(body.current);
    const head = scroller.querySelector("thead")?.offsetHeight || 0;
    const top = body.current.getBoundingClientRect().top - scroller.getBoundingClientRect().top + scroller.scrollTop + target * knownHeight;
    if (top - head < scroller.scrollTop) scroller.scrollTop = top - head;
    else if (top + knownHeight > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + knownHeight - scroller.clientHeight;
    list.scrollTop = scroller.scrollTop;
    redraw();
    requestAnimationFrame(() => requestAnimationFrame(() => body.current?.querySelector("tr.at a")?.focus({ preventScroll: true })));
  }
  const atCursor = () => body.current?.querySelector("tr.at");
  useKeys(text.title, {
    j: [() => move(1), text.keys.next],
    k: [() => move(-1), text.keys.previous],
    ArrowDown: [() => move(1)],
    ArrowUp: [() => move(-1)],
    PageDown: [() => move(20)],
    PageUp: [() => move(-20)],
    Home: [() => move(-HELD), text.keys.first],
    End: [() => move(HELD), text.keys.last],
    Enter: [() => list.cursor && navigate(link("/jobs/" + list.cursor)), text.keys.open],
    y: [() => list.cursor && copy(jobSpellings(list.cursor)[1][1], words.copiedAs(words.copyAs.link)), text.keys.copy],
    m: [() => atCursor()?.querySelector(".row-menu")?.click(), text.keys.menu],
    n: [() => showNewer(), text.keys.newer],
    f: [() => (matchMedia("(max-width: 48rem)").matches ? setSheet(true) : document.querySelector(".facets a")?.focus()), text.keys.filters],
  });

  async function showNewer() {
    const scroller = body.current && scrollerOf(body.current);
    list.cursor = null;
    if (body.current?.contains(document.activeElement)) document.activeElement.blur();
    if (scroller) scroller.scrollTop = 0;
    list.scrollTop = 0;
    await list.showPending();
  }

  // Counts have ids of queues only; names are in rows, and else in the list of queues.
  const unnamed = (counts?.queue || []).some(({ value }) => value && value !== "-" && !names.has(value));
  useEffect(() => {
    if (unnamed) get("/queues", { limit: 500, payloads: "text" }).then(({ queues }) => (queues.forEach((queue) => names.set(queue.id, queueName(queue))), redraw()), () => null);
  }, [unnamed]);
  const sums = total(counts?.state, filter);
  const filtered = partsOf(query).length;
  const newer = list.stale ? text.listChanged : list.pending.size ? text.newer(count(list.pending.size), list.pending.size) : null;
  return html`<div class="jobs">
    <h1 class="hidden">${text.title}</h1>
    <aside class="facets" aria-label=${text.filtersTitle}><${Facets} counts=${counts} query=${query} names=${names} /></aside>
    <div class="jobs-main">
      <div class="tools" role="group" aria-label=${text.tools}>
        <${Button} icon="filter" kind=${"narrow-only " + (filtered ? "set" : "")} onClick=${() => setSheet(true)}>${text.filtersTitle}${filtered ? " " + filtered : ""}</${Button}>
        <${TimeMenu} query=${query} />
        <${AddFilter} query=${query} />
        <${Chips} query=${query} names=${names} />
        <span class="grow" />
        <span class="sum" aria-live="off">${counts && text.sum(sums.more ? text.moreThan(count(sums.count)) : count(sums.count), sums.count)}</span>
        <${Views} query=${query} /><${Columns} />
      </div>
      ${list.error && list.rows.length > 0 && html`<div class="strip bad" role="alert"><${Icon} name="warning" /> ${list.error.detail || words.fault.away} <${Button} kind="small" onClick=${() => list.reload()}>${words.again}</${Button}></div>`}
      <div class="list">
        ${list.rows.length > 0 ? html`<${Rows} key=${key} list=${list} query=${query} redraw=${redraw} body=${body} />`
          : list.error ? html`<${Fault} error=${list.error} retry=${() => list.reload()} />${list.error.status === 400 && html`<p class="page"><a href=${link("/jobs")}>${text.clear}</a></p>`}`
          : list.next === undefined || list.loading ? html`<${Loading} lines=${14} />`
          : html`<${Nothing} query=${query} list=${list} names=${names} />`}
        ${newer && html`<div class="pill-place"><button type="button" class="pill" onClick=${showNewer}><${Icon} name="up" size=${12} />${newer}</button></div>`}
      </div>
      ${list.rows.length > 0 && html`<footer class="foot">
        <span>${text.shown(count(list.rows.length), list.rows.length)}</span>
        ${list.rows.length >= HELD ? html`<span class="warn">${text.held(count(HELD))}</span>`
          : list.next === null ? html`<span class="dim">${text.all}</span>`
          : list.loading ? html`<span class="dim">${words.loading}…</span>`
          : html`<span class="dim">${(list.oldestFirst ? text.searchedUpTo : text.searchedTo)(html`<${Time} at=${list.searchedTo} />`)}</span>${list.short && html`<${Button} kind="small" onClick=${() => list.more()}>${text.goOn}</${Button}>`}`}
        <span class="grow" />
        <span class="dim wide-only">${text.keyHint}</span>
      </footer>`}
      <div class="hidden" role="status">${useSlowly(newer)}</div>
    </div>
    ${sheet && html`<${Dialog} title=${text.filtersTitle} close=${() => setSheet(false)} kind="sheet"><${Facets} counts=${counts} query=${query} names=${names} /></${Dialog}>`}
  </div>`;
}

/** Return the text, changed at most every 5 s: a screen reader reads it aloud. */
function useSlowly(value) {
  const [said, setSaid] = useState(value);
  const at = useRef(0);
  useEffect(() => {
    const timer = setTimeout(() => ((at.current = Date.now()), setSaid(value)), Math.max(0, at.current + 5_000 - Date.now()));
    return () => clearTimeout(timer);
  }, [value]);
  return said;
}
