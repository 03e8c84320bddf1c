// The list of jobs: filters that are counts, live rows, and only as many rows in the page as can be seen.
import { Away, facts, get, useLive } from "./api.mjs";
import { callOf, count, duration, fullTime, plural, queueName, readClock, setSetting, settings, shortDuration, visible } from "./formats.mjs";
import { COMMON_VIEWS, hostLink, jobLink, link, navigate, normal, partsOf, SEARCHED, toggled, useRedraw, valuesOf, withValue } from "./router.mjs";
import { Button, Clear, copyItems, copyJobLink, Dialog, Empty, Example, Fault, html, Icon, Loading, Menu, menuIsOpen, setTitle, State, STATES, STOPS, Strip, Time, useEffect, useKeys, useLayoutEffect, useMemo, useNow, useRef, useSettings, useSoon, useState } from "./ui.mjs";

const FILTER_NAMES = {
  q: "search", state: "State", procedure: "Procedure", host: "Host", queue: "Queue", owner: "Owner", end_type: "Error", stop: "Stop", holds_slot: "Holds a slot",
  from: "Submitted from", to: "Submitted to", started_from: "Started from", started_to: "Started to", ended_from: "Ended from", ended_to: "Ended to", info: "Info has", arguments: "Arguments have", rerun_of: "Re-run of", id: "Job id",
};
const FACETS = ["state", "procedure", "host", "queue", "owner", "end_type"];
const SHOWN = 8;           // values of a facet before "more"
const COUNT_EVERY = 5_000;
const PAGE = 100;
const FAST_PAGE = 500;
const HELD = 100_000;      // rows of a list

// --- the rows of a list: what was fetched, what came live, and what waits until the reader asks for it -----------------

const cache = new Map();   // by query: lists that "back" shows again at once

/** Return the list of a query: the one of before when the reader came back to it, else a new one. */
function listOf(key, query, back) {
  let list = cache.get(key);
  if (!list || !back) list = new JobList(query);
  cache.delete(key);
  cache.set(key, list);
  if (cache.size > 5) cache.delete(cache.keys().next().value);
  return list;
}

// Another person may log in.
facts.follow(({ loggedOut }) => loggedOut && cache.clear());

class JobList {
  rows = [];
  byId = new Map();
  pending = new Map();       // rows that came while the reader was in the list
  stale = false;             // so much came that the list must be asked for again
  next = undefined;          // cursor; undefined: nothing was asked for yet; null: the end
  searchedTo = null;
  short = false;             // the last page was not full: going on is the reader's choice
  loading = null;
  error = null;
  scrollTop = 0;
  cursor = null;             // id of the row that the keys are at
  changed = () => {};
  steady = () => false;      // whether rows must not move now

  constructor(query) {
    this.query = query;
    this.oldestFirst = query.get("order") === "oldest";
  }

  /** Ask for the next page, or for the first. */
  async more(limit = this.rows.length > 1_000 ? FAST_PAGE : PAGE) {
    if (this.loading || this.next === null || this.rows.length >= HELD) return;
    this.loading = new AbortController();
    this.changed();
    try {
      const page = await this.#ask({ limit, cursor: this.next }, this.loading.signal);
      this.error = null;
      const early = this.next === undefined ? this.rows : [];   // events that were faster than the first page
      if (early.length) {
        this.rows = [];
        this.byId.clear();
      }
      for (const row of page.jobs) if (!this.byId.has(row.job)) this.#put(row, this.rows.length);
      for (const row of early) {
        if (this.byId.has(row.job)) Object.assign(this.byId.get(row.job), row);
        else this.#insert(row);
      }
      this.#setEnd(page, limit);
    } catch (error) {
      this.#fail(error);
    }
    this.loading = null;
    this.changed();
  }

  /** Ask for all again from the start. */
  async reload() {
    this.loading?.abort();
    const first = await this.#first();
    if (first) this.#replace(first);
    this.changed();
  }

  /** Ask for the first page and take its changes over. */
  async refresh() {
    if (this.next === undefined) return this.more();
    const first = await this.#first();
    if (!first) return this.changed();
    const known = first.jobs.some((row) => this.byId.has(row.job));
    if (!known && this.rows.length && first.jobs.length) {
      if (this.steady()) this.stale = true;
      else this.#replace(first);
    } else if (this.rows.length <= first.jobs.length && !this.steady()) this.#replace(first);
    else {
      const seen = new Set(first.jobs.map((row) => row.job));
      const last = first.jobs.at(-1);
      this.take({ rows: first.jobs, left: [] });
      for (const row of this.rows) {
        if (last && first.next !== null && this.#before(last, row)) break;
        if (!seen.has(row.job)) row.gone = true;
      }
    }
    return this.changed();
  }

  /** Take the data of a `jobs` event. */
  take({ rows, left, more }) {
    for (const row of rows) {
      const held = this.byId.get(row.job);
      if (held) Object.assign(held, row, { gone: false });
      else if (this.steady()) {
        if (this.#belongs(row)) this.pending.set(row.job, row);
      } else if (this.#belongs(row)) this.#insert(row);
    }
    for (const id of left || []) {
      this.pending.delete(id);
      const held = this.byId.get(id);
      if (held) held.gone = true;
    }
    this.changed();
    if (more) this.refresh();
  }

  /** Show the rows that waited; rows that no longer fit go. */
  showPending() {
    if (this.stale) {
      this.stale = false;
      this.pending.clear();
      return this.reload();
    }
    this.rows = this.rows.filter((row) => !row.gone || !this.byId.delete(row.job));
    for (const row of this.pending.values()) this.#insert(row);
    this.pending.clear();
    return this.changed();
  }

  async #first() {
    try {
      const page = await this.#ask({ limit: PAGE });
      this.error = null;
      return page;
    } catch (error) {
      this.#fail(error);
      return null;
    }
  }

  #fail(error) {
    if (error.name === "AbortError") return;
    this.error = error;
    if (error instanceof Away) setTimeout(() => this.error === error && this.refresh(), 2_000);
  }

  #ask(options, signal) {
    return get("/jobs", [...this.query, ["payloads", "text"], ...Object.entries(options)], { signal });
  }

  #replace(page) {
    this.rows = [];
    this.byId.clear();
    this.pending.clear();
    this.stale = false;
    for (const row of page.jobs) this.#put(row, this.rows.length);
    this.#setEnd(page, PAGE);
  }

  #setEnd(page, limit) {
    this.next = page.next;
    this.searchedTo = page.searched_to;
    this.short = page.jobs.length < limit;
  }

  #put(row, place) {
    this.rows.splice(place, 0, row);
    this.byId.set(row.job, row);
  }

  /** Whether `one` stands before `other` in this list. */
  #before(one, other) {
    const order = one.time.submit - other.time.submit || (one.job < other.job ? -1 : 1);
    return this.oldestFirst ? order < 0 : order > 0;
  }

  #belongs(row) {
    return this.next === null || !this.rows.length || this.#before(row, this.rows.at(-1));
  }

  #insert(row) {
    let low = 0;
    for (let high = this.rows.length; low < high; ) {
      const middle = (low + high) >> 1;
      if (this.#before(this.rows[middle], row)) low = middle + 1;
      else high = middle;
    }
    this.#put(row, low);
  }
}

// --- columns --------------------------------------------------------------------------------------------------------

function End({ row, now }) {
  const message = visible(row.end_message);
  if (row.unreachable_since && row.state === "running") return html`<span class="warn" title=${fullTime(row.unreachable_since)}>${visible(row.host)} unreachable for ${duration(now - row.unreachable_since)}</span>`;
  const slot = row.holds_slot && row.time.end ? html`<span class="warn">Still holds its slot</span>` : "";
  if (row.stop && row.stop !== "confirmed") return html`<span class=${row.stop === "pending" ? "warn" : "bad"}>${STOPS[row.stop]}</span> ${slot}`;
  if (slot) return slot;
  if (!row.end_type) return row.records ? html`<span class="dim">${plural(row.records, "record")}</span>` : "";
  return html`<span title=${message}><b class=${{ failed: "bad", raised: "warn" }[row.state] || "dim"}>${visible(row.end_type)}</b>${message && ": " + message}</span>`;
}

const titled = (shown, kind) => html`<span class=${kind} title=${shown}>${shown}</span>`;

// name: [heading, draws the cell, class]
const COLUMNS = {
  state: ["State", ({ row }) => html`<${State} state=${row.state} />`],
  job: ["Procedure (arguments)", ({ row }) => {
    const [name, args] = callOf(row.procedure, row.arguments_preview);
    return html`<a class="row-link" href=${jobLink(row.job)} title=${name + args}><b>${name}</b><span class="mono dim">${args}</span></a>`;
  }],
  end: ["Result or reason", End],
  host: ["Host", ({ row }) => titled(visible(row.host))],
  queue: ["Queue", ({ row }) => (row.queue ? titled(queueName(row.queue), "mono") : html`<span class="dim">-</span>`)],
  owner: ["Owner", ({ row }) => titled(visible(row.owner ?? "-"))],
  info: ["Info", ({ row }) => titled(row.info_preview === "null" ? "" : visible(row.info_preview), "mono dim")],
  records: ["Records", ({ row }) => (row.records ? count(row.records) : ""), "num"],
  submitted: ["Submitted", ({ row }) => html`<${Time} at=${row.time.submit} />`, "num"],
  ended: ["Ended", ({ row }) => html`<${Time} at=${row.time.end} none="" />`, "num"],
  wait: ["Wait", ({ row, now }) => shortDuration((row.time.start ?? row.time.end ?? now) - row.time.submit), "num"],
  took: ["Took", ({ row, now }) => (row.time.start ? shortDuration((row.time.end ?? now) - row.time.start) : ""), "num"],
};
const DEFAULT_COLUMNS = ["state", "job", "end", "host", "queue", "submitted", "wait", "took"];
const shownColumns = () => {
  const chosen = settings.columns.split(",").filter((name) => COLUMNS[name]);
  return chosen.length ? chosen : DEFAULT_COLUMNS;
};

function RowMenu({ row, query }) {
  const only = (name, value, shown, close) => html`<a href=${link("/jobs", withValue(query, name, value))} onClick=${close}>Only ${visible(shown)}</a>`;
  return html`<${Menu} label="Actions" icon="more" kind="quiet small row-menu">
    ${(close) => html`
      ${only("procedure", row.procedure, row.procedure, close)}${only("host", row.host, row.host, close)}${row.queue && only("queue", row.queue.id, queueName(row.queue), close)}
      <a href=${hostLink(row.host)}>Host ${visible(row.host)}</a>
      <hr />
      ${copyItems(row.job, close)}`}
  <//>`;
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
  const scrolled = useRedraw();
  const columns = shownColumns();
  const total = list.rows.length;
  const [first, last] = windowOf(body.current, total);
  const place = body.current && scrollerOf(body.current).scrollTop;
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
    // Chromium measures the page while a row with the focus is taken out, and moves what is seen then.
    if (place !== null) scrollerOf(body.current).scrollTop = place;
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
    navigate(jobLink(row.job));
  }
  const sorted = list.oldestFirst ? "ascending" : "descending";
  return html`<table class="rows" role="table" aria-rowcount=${list.next === null ? total + 1 : -1} aria-label="Jobs">
    <thead role="rowgroup"><tr role="row" aria-rowindex="1">
      ${columns.map((name) => html`<th key=${name} role="columnheader" scope="col" class=${"c-" + name + " " + (COLUMNS[name][2] || "")} aria-sort=${name === "submitted" ? sorted : undefined}>
        ${name === "submitted"
          ? html`<button class="sort" type="button" title="Turn the order round" onClick=${() => navigate(link("/jobs", withValue(query, "order", list.oldestFirst ? null : "oldest")))}>${COLUMNS[name][0]}<span class=${list.oldestFirst ? "turned" : ""}><${Icon} name="down" size=${10} /></span></button>`
          : COLUMNS[name][0]}</th>`)}
      <th role="columnheader" class="c-menu"><span class="hidden">Actions</span></th>
    </tr></thead>
    <tbody role="rowgroup" ref=${body}>
      ${space(first)}
      ${shown.map((row, place) => html`<tr key=${row.job} role="row" data-job=${row.job} aria-rowindex=${first + place + 2} class=${"row " + (row.gone ? "gone " : "") + (row.job === list.cursor ? "at" : "")} title=${row.gone ? "This job no longer fits the filter." : undefined}
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

const short = (number) => (number >= 1000 && number % 1000 === 0 ? number / 1000 + "k" : count(number));

function Facet({ name, values, query, names }) {
  const [all, setAll] = useState(false);
  const chosen = valuesOf(query, name);
  const here = new Map((values || []).map((entry) => [entry.value, entry]));
  const unseen = (value) => here.get(value) || { value, count: values ? 0 : null };
  const list = name === "state" ? Object.keys(STATES).map(unseen) : [...chosen.filter((value) => !here.has(value)).map(unseen), ...here.values()];
  if (!list.length) return null;
  const shown = all || name === "state" ? list : list.filter((entry, place) => place < SHOWN || chosen.includes(entry.value));
  const nameOf = (value) => visible(name !== "queue" ? value : value === "-" ? "no queue" : names.get(value) || value.slice(0, 8));
  return html`<section class=${"facet facet-" + name} aria-label=${FILTER_NAMES[name]}>
    <h2>${FILTER_NAMES[name]}</h2>
    <ul>${shown.map(({ value, count: number, more }) => {
      const set = chosen.includes(value);
      const added = link("/jobs", toggled(query, name, value, true));
      const label = (set ? "Take out " : "Add ") + nameOf(value);
      return html`<li key=${value} class=${set ? "set" : number ? "" : "none"}>
        <a href=${link("/jobs", toggled(query, name, value, false))} aria-current=${set || undefined} title=${name === "state" ? STATES[value] : nameOf(value)}
          onClick=${(event) => {
            if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return;
            event.preventDefault();
            navigate(added);
          }}>${name === "state" ? html`<${State} state=${value} />` : html`<span class="value">${nameOf(value)}</span>`}<span class="count">${number === null ? "" : more ? ">" + short(number) : count(number)}</span></a>
        <a class="add" href=${added} aria-label=${label} title=${label}><${Icon} name=${set ? "minus" : "plus"} size=${12} /></a>
      </li>`;
    })}</ul>
    ${name === "state" ? html`<p class="hint">Raised: the procedure's own exception. Failed: HARP could not run it.</p>` : list.length > SHOWN && html`<button class="link" type="button" onClick=${() => setAll(!all)}>${all ? "Show fewer" : `${list.length - SHOWN} more`}</button>`}
  </section>`;
}

function Facets({ counts, query, names }) {
  return html`${FACETS.map((name) => html`<${Facet} key=${name} name=${name} values=${counts?.[name]} query=${query} names=${names} />`)}
    <p class="hint">Click: only this. Ctrl-click or +: this as well.</p>`;
}

const TIMES = { "-15m": "last 15 min", "-1h": "last hour", "-6h": "last 6 hours", "-1d": "last 24 hours", "-7d": "last 7 days" };
const inWords = (from, to) => (from && to ? `${from} to ${to}` : from ? `since ${from}` : `before ${to}`);

/** Return a time as a field of the kind datetime-local has it: in the browser's own time zone. */
const localInput = (seconds) => (seconds > 0 ? new Date(seconds * 1000 - new Date(seconds * 1000).getTimezoneOffset() * 60_000).toISOString().slice(0, 16) : "");
const shownTime = (value) => (/^\d+(\.\d+)?$/.test(value) ? fullTime(Number(value)).slice(0, 16) : value);

function TimeMenu({ query }) {
  const [from, to] = [query.get("from"), query.get("to")];
  const isSet = Boolean(from || to);
  const label = isSet ? (!to && TIMES[from]) || inWords(shownTime(from), shownTime(to)) : "any time";
  const set = (start, end) => link("/jobs", withValue(withValue(query, "from", start), "to", end));
  const [, , zone] = readClock(Date.now() / 1000, false);
  const field = (name, value) => html`<label>${name} (${zone})<input type="datetime-local" defaultValue=${localInput(Number(value))} /></label>`;
  return html`<${Menu} label="Time of submission" text=${"Submitted: " + label} kind=${isSet ? "set" : ""}>
    ${(close) => html`
      <a href=${set()} onClick=${close}>any time</a>
      ${Object.entries(TIMES).map(([span, word]) => html`<a key=${span} href=${set(span)} onClick=${close} aria-current=${(from === span && !to) || undefined}>${word}</a>`)}
      <hr />
      <form class="stack" onSubmit=${(event) => {
        event.preventDefault();
        const { elements } = event.target;
        close();
        navigate(set(...[elements[0], elements[1]].map(({ value }) => value && new Date(value).getTime() / 1000)));
      }}>
        ${field("From", from)}${field("To", to)}
        <button class="button primary">Set this range</button>
      </form>`}
  <//>`;
}

const ADDED = ["host", "procedure", "owner", "end_type", "stop", "info", "arguments", "holds_slot"];

function AddFilter({ query }) {
  return html`<${Menu} label="Add a filter" icon="plus" text="Filter">
    ${(close) => html`<form class="stack" onSubmit=${(event) => {
      event.preventDefault();
      const [{ value: name }, { value }] = event.target.elements;
      close();
      if (value.trim()) navigate(link("/jobs", withValue(query, name, value.trim())));
    }}>
      <label>What<select>${ADDED.map((name) => html`<option key=${name} value=${name}>${FILTER_NAMES[name]}</option>`)}</select></label>
      <label>Value<input type="text" maxlength="500" placeholder="web*, 1 for yes, …" /></label>
      <button class="button primary">Set</button>
    </form>`}
  <//>`;
}

function savedViews() {
  try {
    return JSON.parse(settings.views).filter((view) => Array.isArray(view) && view.length === 2).slice(0, 50);
  } catch {
    return [];
  }
}

function Views({ query }) {
  const own = savedViews();
  const save = (name, ...added) => setSetting("views", JSON.stringify([...own.filter((view) => view[0] !== name), ...added]));
  return html`<${Menu} label="Views" text="Views">
    ${(close) => {
      const view = ([name, search]) => html`<a key=${name} href=${link("/jobs", new URLSearchParams(search))} onClick=${close}>${name}</a>`;
      return html`${COMMON_VIEWS.map(view)}
      ${own.length > 0 && html`<hr />`}
      ${own.map((one) => html`<span key=${one[0]} class="pair">${view(one)}
        <${Button} kind="quiet small" icon="close" aria-label=${"Forget " + one[0]} title=${"Forget " + one[0]} onClick=${() => save(one[0])} /></span>`)}
      <hr />
      <form class="stack" onSubmit=${(event) => {
        event.preventDefault();
        const name = event.target.elements[0].value.trim();
        if (name) save(name, [name, normal(query).toString()]);
        close();
      }}>
        <label>Name for this view<input type="text" maxlength="60" required /></label>
        <button class="button">Save in this browser</button>
      </form>`;
    }}
  <//>`;
}

function Columns() {
  useSettings();
  const shown = shownColumns();
  function turn(name) {
    const now = Object.keys(COLUMNS).filter((other) => (other === name ? !shown.includes(name) : shown.includes(other))).join();
    setSetting("columns", now === DEFAULT_COLUMNS.join() ? "" : now);
  }
  return html`<${Menu} label="Choose columns" text="Columns" kind="wide-only">
    ${() => Object.keys(COLUMNS).map((name) => html`<label key=${name}><input type="checkbox" checked=${shown.includes(name)} disabled=${name === "job"} onChange=${() => turn(name)} />${COLUMNS[name][0]}</label>`)}
  <//>`;
}

function Chips({ query, names }) {
  const parts = partsOf(query, names).filter(([name]) => name !== "from" && name !== "to");
  return html`${parts.map(([name, , shown]) => {
    const label = FILTER_NAMES[name] || name;
    return html`<span key=${name} class="chip"><span class="dim">${label}</span> <span class="value">${visible(shown)}</span>
      <a href=${link("/jobs", withValue(query, name, null))} aria-label=${"Remove " + label} title=${"Remove " + label}><${Icon} name="close" size=${12} /></a></span>`;
  })}
    ${parts.length > 1 && html`<${Clear} />`}`;
}

/** Return the number of jobs of the states that the filter lets through, in words: "more than 10,000 jobs". */
function total(byState, filter) {
  const wanted = valuesOf(filter, "state");
  const fitting = (byState || []).filter(({ value }) => !wanted.length || wanted.includes(value));
  const sum = fitting.reduce((sum, entry) => sum + entry.count, 0);
  const shown = plural(sum, "job");
  return [sum, fitting.some((entry) => entry.more) ? `more than ${shown}` : shown];
}

const searchedTo = (list) => html`Searched ${list.oldestFirst ? "up" : "back"} to <${Time} at=${list.searchedTo} />. `;

/** Say which part of the filter excludes all, and what to do where no job is at all. */
function Nothing({ query, list, names }) {
  const parts = partsOf(query, names);
  const [without, setWithout] = useState(null);
  const [host, setHost] = useState(null);
  useEffect(() => {
    const control = new AbortController();
    const { signal } = control;
    const sum = (filter) => get("/jobs/counts", [...filter, ["by", "state"]], { signal }).then(({ by }) => total(by.state, filter));
    if (parts.length) {
      Promise.all(parts.map(async ([name, , shown]) => [name, shown, ...(await sum(normal(withValue(query, name, null))))])).then(setWithout, () => null);
    } else get("/hosts", { limit: 1 }, { signal }).then(({ hosts }) => setHost(hosts[0]?.name ?? ""), () => null);
    return () => control.abort();
  }, [normal(query).toString()]);
  if (!parts.length)
    return html`<${Empty} title="No jobs yet"><p>${host === "" ? "The dispatcher knows no hosts yet. Add one to the hosts registry." : "Submit a first job, for example:"}</p>${host !== "" && html`<${Example}>harp call --wait ${host || "HOST"} PROCEDURE<//>`}<//>`;
  if (list.next) return html`<${Empty} title="Nothing found so far"><p>${searchedTo(list)}</p><${Button} kind="primary" onClick=${() => list.more()}>Go on searching<//><//>`;
  const helpful = (without || []).filter(([, , sum]) => sum);
  return html`<${Empty} title="No job fits this filter">
    ${helpful.map(([name, shown, , number]) => html`<p key=${name}>Without <b>${FILTER_NAMES[name] || name} ${visible(shown)}</b>: <a href=${link("/jobs", withValue(query, name, null))}>${number}</a></p>`)}
    ${without && !helpful.length && html`<p>${parts.length > 1 ? "No single part excludes all: remove several." : "Without it there are no jobs either."}</p>`}
    ${query.get("q") && !query.has("arguments") && html`<p>${SEARCHED} <a href=${link("/jobs", withValue(withValue(query, "q", null), "arguments", query.get("q")))}>Search the arguments</a></p>`}
    <p><${Clear} /></p>
  <//>`;
}

// --- the view -------------------------------------------------------------------------------------------------------------

export function JobsView({ query, returned }) {
  useSettings();
  const redraw = useRedraw();
  const [known, setCounts] = useState(null);
  const [sheet, setSheet] = useState(false);
  const body = useRef(null);
  const filter = normal(query);
  const key = filter.toString() + (query.get("order") === "oldest" ? "&order=oldest" : "");
  const list = useMemo(() => listOf(key, new URLSearchParams(key), returned), [key]);
  const names = useMemo(() => new Map(), []);
  for (const row of list.rows.slice(0, 200)) if (row.queue) names.set(row.queue.id, queueName(row.queue));

  list.changed = redraw;
  list.steady = () => list.scrollTop > knownHeight / 2 || menuIsOpen() || Boolean(body.current?.contains(document.activeElement));

  // Counts are asked for again when something changed.
  const latest = useRef(key);
  latest.current = key;
  const countSoon = useSoon(async () => {
    const answer = await get("/jobs/counts", [...filter, ["by", FACETS.join()]]).catch(() => null);
    if (answer && latest.current === key) setCounts(answer.by);
  }, COUNT_EVERY, key);
  useEffect(() => {
    setTitle("Jobs");
    if (list.next === undefined) list.more();
    else list.refresh();
    countSoon.now();
    return () => {
      list.changed = () => {};
      list.steady = () => true;
    };
  }, [key]);
  const isRefused = !list.rows.length && list.error?.status === 400;
  const counts = isRefused ? null : known;
  useLive(isRefused ? "" : "jobs,counts", filter.toString(), {
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
    const target = Math.max(0, Math.min(list.rows.length - 1, place < 0 && step < HELD ? 0 : place + step));
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
  useKeys("Jobs", {
    j: [() => move(1), "next row"],
    k: [() => move(-1), "previous row"],
    ArrowDown: [() => move(1)],
    ArrowUp: [() => move(-1)],
    PageDown: [() => move(20)],
    PageUp: [() => move(-20)],
    Home: [() => move(-HELD), "first row"],
    End: [() => move(HELD), "last row"],
    Enter: [() => list.cursor && navigate(jobLink(list.cursor)), "open the job"],
    y: [() => list.cursor && copyJobLink(list.cursor), "copy the job's link"],
    m: [() => body.current?.querySelector("tr.at .row-menu")?.click(), "actions of the row"],
    n: [() => showNewer(), "show newer jobs"],
    f: [() => (matchMedia("(max-width: 48rem)").matches ? setSheet(true) : document.querySelector(".facets a")?.focus()), "filters"],
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
  const filtered = partsOf(query).length;
  const newer = list.stale ? "The list has changed: show it anew" : list.pending.size ? plural(list.pending.size, "newer job") : null;
  const facets = html`<${Facets} counts=${counts} query=${query} names=${names} />`;
  const reload = () => list.reload();
  return html`<div class="jobs">
    <h1 class="hidden">Jobs</h1>
    <aside class="facets" aria-label="Filters">${facets}</aside>
    <div class="jobs-main">
      <div class="tools" role="group" aria-label="Filter and view">
        <${Button} icon="filter" kind=${"narrow-only " + (filtered ? "set" : "")} onClick=${() => setSheet(true)}>Filters${filtered ? " " + filtered : ""}<//>
        <${TimeMenu} query=${query} />
        <${AddFilter} query=${query} />
        <${Chips} query=${query} names=${names} />
        <span class="grow" />
        <span class="sum" aria-live="off">${counts && total(counts.state, filter)[1]}</span>
        <${Views} query=${query} /><${Columns} />
      </div>
      ${list.error && list.rows.length > 0 && html`<${Strip}>${list.error.detail || list.error.message} <${Button} kind="small" onClick=${reload}>Try again<//><//>`}
      <div class="list">
        ${list.rows.length > 0 ? html`<${Rows} key=${key} list=${list} query=${query} redraw=${redraw} body=${body} />`
          : list.error ? html`<${Fault} error=${list.error} retry=${isRefused ? undefined : reload} />${isRefused && html`<p class="page"><${Clear} /></p>`}`
          : list.next === undefined || list.loading ? html`<${Loading} lines=${14} />`
          : html`<${Nothing} query=${query} list=${list} names=${names} />`}
        ${newer && html`<div class="pill-place"><button type="button" class="pill" onClick=${showNewer}><${Icon} name="up" size=${12} />${newer}</button></div>`}
      </div>
      ${list.rows.length > 0 && html`<footer class="foot">
        <span>${plural(list.rows.length, "row")}</span>
        ${list.rows.length >= HELD ? html`<span class="warn">The page holds ${count(HELD)} rows. Narrow the filter to see others.</span>`
          : html`<span class="dim">${list.next === null ? "That is all." : list.loading ? "Loading" + "…" : searchedTo(list)}</span>${list.next !== null && !list.loading && list.short && html`<${Button} kind="small" onClick=${() => list.more()}>Go on searching<//>`}`}
        <span class="grow" />
        <span class="dim wide-only">j k move · Enter open · / search · ? all keys</span>
      </footer>`}
      <div class="hidden" role="status">${useSlowly(newer)}</div>
    </div>
    ${sheet && html`<${Dialog} title="Filters" close=${() => setSheet(false)} kind="sheet">${facets}<//>`}
  </div>`;
}

/** Return the text, changed at most every 5 s: a screen reader reads it aloud. */
function useSlowly(value) {
  const [said, setSaid] = useState(value);
  const soon = useSoon(() => setSaid(value), 5_000);
  useEffect(soon, [value]);
  return said;
}
