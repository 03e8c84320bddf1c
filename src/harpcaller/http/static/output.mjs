// The output of a job: tools, the window of rows, and what is happening.
import { address } from "./api.mjs";
import { count, plural, readClock, size } from "./formats.mjs";
import { appendText } from "./json.mjs";
import { LogWindow } from "./log.mjs";
import { ENDED } from "./router.mjs";
import { Button, copy, copyJobLink, Dialog, html, Icon, Menu, useEffect, useKeys, useLayoutEffect, useRef, useSettings, useState } from "./ui.mjs";

const TIME_STYLES = { abs: "time of day", rel: "since the start", off: "no times" };

/** Return the records that a hash names, "#r5" or "#r5-9", as [first, last]; else null. */
export function readHash(hash) {
  const found = /^#r(\d{1,15})(?:-(\d{1,15}))?$/.exec(hash ?? "");
  return found && [Number(found[1]), Math.max(Number(found[1]), Number(found[2] ?? found[1]))];
}

function makeFormat(times, start) {
  if (times === "off") return () => null;
  if (times === "rel") return (seconds) => (seconds - start >= 0 ? "+" : "") + (seconds - start).toFixed(3);
  return (seconds) => readClock(seconds)[1];
}

export function Output({ job, client, query, hash, change, openResult }) {
  const hasEnded = ENDED.includes(job.state);
  const [live, setLive] = useState({ count: job.records.count, bytes: job.records.bytes, rate: 0 });
  const [view, setView] = useState({ isFollowing: false, number: 0 });
  const [found, setFound] = useState(null);
  const [place, setPlace] = useState(null); // the index of the match that n and N went to
  const [whole, setWhole] = useState(null);
  const [unread, setUnread] = useState(null);
  const place_ = useRef(null);
  const shell = useRef(null);
  const field = useRef(null);
  const log = useRef(null);
  const { times: zone } = useSettings();
  const needle = query.get("find") ?? "";
  const isWrapped = query.get("wrap") === "1";
  const times = ["rel", "off"].includes(query.get("times")) ? query.get("times") : "abs";
  const isOnly = query.get("only") === "1" && needle !== "";
  const range = readHash(hash);

  // The window lives as long as the tab is open.
  useLayoutEffect(() => {
    const element = shell.current;
    const window_ = (log.current = new LogWindow(element, client.post, {
      state: (state) => setView((before) => (before.isFollowing === state.isFollowing && before.number === state.number ? before : state)),
      select: (first, last) => change({}, first === last ? `#r${first}` : `#r${first}-${last}`),
      whole: (number) => client.post({ whole: number }),
      end: () => toEnd(),
    }));
    const stop = client.listen((message) => {
      if (message.count !== undefined) {
        setLive({ count: message.count, bytes: message.bytes, rate: message.rate });
        if (message.found !== undefined) setFound(message.found);
        if (message.view) window_.receive(message.view);
        else if (window_.list === "all") window_.setTotal(message.count);
        if (message.view) setUnread(null);
      }
      if (message.whole) setWhole(message.whole);
      if (message.unread) setUnread(message.unread);
      if (message.sought !== undefined) onSought(message.sought);
    });
    window_.total = live.count;
    return () => {
      stop();
      window_.close();
      client.post({ view: null });
      client.post({ find: "" });
    };
  }, [client]);

  useLayoutEffect(() => {
    log.current.formatTime = makeFormat(times, job.time.start ?? job.time.submit);
    shell.current.classList.toggle("is-wrapped", isWrapped);
    log.current.redraw();
  }, [times, zone, isWrapped, job.time.start]);

  const opened = useRef(false);
  const isNew = useRef(false);   // whether the first match of the search is to be shown when it is known
  useEffect(() => {
    setFound(null);
    setPlace((place_.current = null));
    log.current.needle = needle.toLowerCase();
    client.post({ find: needle });
    isNew.current = needle !== "" && (opened.current || !range);
    if (field.current) field.current.value = needle;
    log.current.redraw();
  }, [needle]);

  useEffect(() => {
    if (!isNew.current || found?.text !== needle || !found.count) return;
    isNew.current = false;
    client.post({ seek: { number: 0, isForward: true } });
  }, [found]);

  useEffect(() => {
    log.current.setList(isOnly ? "matches" : "all");
  }, [isOnly]);

  // Where it opens: at the linked record, else at the first match, else at the end.
  useEffect(() => {
    log.current.select(...(range ?? [-1, -1]));
    if (range && (!opened.current || !isSeen(range[0]))) {
      if (isOnly) change({ only: "" });
      log.current.total = Math.max(log.current.total, live.count);
      log.current.show(Math.min(range[0], Math.max(live.count - 1, 0)));
    } else if (!opened.current) {
      if (hasEnded) log.current.showEnd();
      else log.current.setFollowing(true);
    }
    opened.current = true;
  }, [hash]);

  const isSeen = (number) => [...log.current.drawn.values()].some((row) => Number(row.dataset.number) === number && row.offsetTop + row.offsetHeight - log.current.skip > 0 && row.offsetTop - log.current.skip < log.current.height);

  const total = isOnly ? (found?.count ?? 0) : live.count;

  function toEnd() {
    if (hasEnded) log.current.showEnd();
    else log.current.setFollowing(true);
  }
  function toTop() {
    log.current.show(0);
  }
  function pause() {
    log.current.isFollowing ? log.current.setFollowing(false) : log.current.setFollowing(true);
  }
  const direction = useRef(true);
  function seek(isForward) {
    if (!needle) return field.current.select();
    direction.current = isForward;
    const last = place_.current;
    const from = last ? last.number + (isForward ? 1 : 0) : log.current.isFollowing ? (isForward ? 0 : live.count) : view.number;
    client.post({ seek: { number: from, isForward } });
  }
  function onSought(sought) {
    if (!sought) return;
    setPlace((place_.current = sought));
    if (log.current.list === "matches") log.current.show(sought.index);
    else log.current.show(sought.number);
    log.current.select(sought.number, sought.number);
  }
  function find(event) {
    event.preventDefault();
    const value = field.current.value;
    if (value === needle) seek(!event.shiftKey);
    else change({ find: value, only: value ? query.get("only") : "" });
  }
  function copyLink() {
    const [first, last] = range ?? [log.current.selected[0] >= 0 ? log.current.selected[0] : view.number, null];
    const part = last !== null && last !== first ? `#r${first}-${last}` : `#r${first}`;
    copyJobLink(job.job, part);
  }
  const flip = (name, isOn) => change({ [name]: isOn ? "1" : "" });
  const nextTimes = { abs: "rel", rel: "off", off: "abs" };

  useKeys("Output", {
    "ctrl+f": [() => field.current.select(), "find in the output"],
    G: [toEnd, "end, and follow"],
    "g g": [toTop, "top"],
    n: [() => seek(true), "next match"],
    N: [() => seek(false), "previous match"],
    w: [() => flip("wrap", !isWrapped), "wrap lines"],
    t: [() => change({ times: nextTimes[times] === "abs" ? "" : nextTimes[times] }), "times"],
    y: [copyLink, "copy link to record"],
    p: [pause, "pause or follow"],
  }, 2);

  const records = `/jobs/${job.job}/records`;
  const newer = Math.max(0, live.count - 1 - (view.last ?? view.number));
  const isPaused = !view.isFollowing && !hasEnded;
  return html`<div class="output">
    <div class="output-bar" role="toolbar" aria-label="Output">
      <form role="search" aria-label="find in the output" onSubmit=${find} class="find">
        <input ref=${field} type="search" aria-label="Find in all records" placeholder="Find in all records" defaultValue=${needle} maxlength="500" spellcheck="false" autocomplete="off"
          onInput=${(event) => event.target.value === "" && needle && change({ find: "", only: "" })} />
        <span class="find-count" role="status">${needle && found && found.text === needle ? matches(found, place) : ""}</span>
        <${Button} kind="quiet small" icon="up" aria-label="Previous match" title="Previous match" onClick=${() => seek(false)} />
        <${Button} kind="quiet small" icon="down" aria-label="Next match" title="Next match" onClick=${() => seek(true)} />
        <label class="check"><input type="checkbox" checked=${isOnly} disabled=${!needle} onChange=${(event) => flip("only", event.target.checked)} /> Matches only</label>
      </form>
      <span class="output-tools">
        ${!hasEnded && html`<${Button} kind=${"small" + (view.isFollowing ? " is-on" : "")} icon=${view.isFollowing ? "pause" : "running"} onClick=${pause} aria-pressed=${view.isFollowing}>${view.isFollowing ? "Pause" : "Follow"}<//>`}
        <${Button} kind=${"small" + (isWrapped ? " is-on" : "")} aria-pressed=${isWrapped} onClick=${() => flip("wrap", !isWrapped)}>Wrap<//>
        <select aria-label="Times" title="Times" value=${times} onChange=${(event) => change({ times: event.target.value === "abs" ? "" : event.target.value })}>
          ${Object.entries(TIME_STYLES).map(([value, word]) => html`<option key=${value} value=${value}>${word}</option>`)}
        </select>
        <${Button} kind="small" onClick=${toTop}>Top<//>
        <${Button} kind="small" onClick=${toEnd}>End<//>
        <${Menu} label="Download" text="Download" kind="small">${() => html`
          <a href=${address(records, { download: 1 })} download>All records, as JSON Lines</a>
          <a href=${address(records, { download: 1, form: "text" })} download>All records, as text</a>
          ${needle && html`<a href=${address(records, { download: 1, grep: needle, fold: 1 })} download>Matches, as JSON Lines</a>`}`}<//>
      </span>
    </div>
    <div class="log-shell">
      <div class="log" ref=${shell}></div>
      ${total === 0 && html`<div class="log-empty">${isOnly ? html`<p>${found?.isDone ? "no match" : ""}</p>` : !hasEnded ? html`<p>No records yet. They appear here as soon as they are stored.</p>` : html`<p>${job.time.start ? "This job has no records. Its result is what it returned." : "This job has no records: it never ran."}</p><${Button} onClick=${openResult}>Show the result<//>`}</div>`}
    </div>
    <div class="log-status">
      ${unread ? html`<span class="bad">Records could not be read: ${unread}. The page tries again.</span>` : hasEnded ? html`<span>${plural(live.count, "record")}</span>` : view.isFollowing ? html`<span class="following"><${Icon} name="live" /> Following</span>` : html`<span class="warn"><${Icon} name="pause" /> Paused at record ${count(view.number)}</span>`}
      ${isPaused && html`<span>${count(Math.max(0, live.count - view.number))} newer <${Button} kind="small" onClick=${toEnd}>Follow<//></span>`}
      ${!hasEnded && html`<span>${plural(live.count, "record")}${live.rate >= 1 ? ", " + count(Math.round(live.rate)) + "/s" : ""}</span>`}
      <span class="dim">${size(live.bytes)}</span>
    </div>
    ${whole && html`<${Whole} whole=${whole} close=${() => setWhole(null)} />`}
  </div>`;
}

function matches(found, place) {
  const all = count(found.count) + (found.isMost ? "+" : "");
  const rest = found.isDone ? "" : ` (searched ${count(found.scanned)} records)`;
  if (!found.count) return found.isDone ? "no match" : rest;
  return place ? `${count(place.index + 1)} of ${all}${rest}` : all + rest;
}

/** A record of any size, as its text. Blocks that are not seen cost nothing to lay out. */
function Whole({ whole: { number, text: value }, close }) {
  const element = useRef(null);
  useLayoutEffect(() => {
    element.current.replaceChildren();
    for (let at = 0; at < value.length; at += 16384) {
      const block = element.current.appendChild(document.createElement("span"));
      block.className = "block";
      appendText(block, value.slice(at, at + 16384));
    }
  }, [value]);
  return html`<${Dialog} title=${"Record " + count(number)} close=${close} kind="wide">
    <p><span class="dim">${size(value.length)}</span> <${Button} kind="small" icon="copy" onClick=${() => copy(value)}>Copy<//></p>
    <pre class="wrap whole" ref=${element} tabindex="0" aria-label=${"Record " + count(number)}></pre>
  <//>`;
}
