// One job: what it is, why it is so, how its time was spent, its output as it comes, and how it ended.
import { address, get, newKey, post, Problem, send, tellWatchers } from "./api.mjs";
import { appendText, decodeString, indent, makeTree, members, visible } from "./json.mjs";
import { jobWords as text } from "./job-words.mjs";
import { useKeys } from "./keys.mjs";
import { useLive } from "./live.mjs";
import { appendOutput, size } from "./log.mjs";
import { Output } from "./output.mjs";
import { link, listAddress, navigate } from "./router.mjs";
import { Button, copy, CopyMenu, Dialog, duration, Fault, html, Icon, Loading, notify, setTitle, State, Time, useEffect, useLayoutEffect, useMemo, useNow, useRef, useState, workerAddress } from "./ui.mjs";
import { words } from "./words.mjs";

const ENDED = ["returned", "raised", "failed", "cancelled"];
const TABS = Object.keys(text.tabs);
const MOST_TEXT = 262144; // characters that are shown at once

// --- the job and its stream ----------------------------------------------------------------------------------------

/** Keep a job up to date, by the events about it; its records come by a stream of their own. */
function useJob(id) {
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  const [turn, setTurn] = useState(0);
  const client = useRef(null);
  const known = useRef({ job: null, at: 0, skew: 0, again: null, reading: 0 });
  client.current ??= makeClient();

  /** Read the job. Without its payloads, which never change, unless it has none yet or it has ended. */
  async function load() {
    const now = known.current;
    const number = ++now.reading;
    clearTimeout(now.again);
    now.at = performance.now();
    try {
      const isNew = !now.job || ENDED.includes(now.job.state);
      const read = async (payloads) => {
        const response = await send("GET", "/jobs/" + id, { params: { payloads } });
        const late = new Date(response.headers.get("Date") ?? Date.now()) / 1000 - Date.now() / 1000;
        now.skew = Math.abs(late) > 2 ? late : 0;
        return response.json();
      };
      let found = await read(isNew ? "text" : "none");
      if (!isNew && ENDED.includes(found.state)) found = await read("text");
      if (number !== now.reading) return;
      now.job = { ...now.job, ...found };
      setJob(now.job);
      setError(null);
    } catch (problem) {
      if (number !== now.reading) return;
      setError(problem);
      if (!(problem instanceof Problem) || problem.status >= 500 || problem.status === 429) now.again = setTimeout(load, 2000);
    }
  }

  useEffect(() => {
    const mine = client.current;
    const { current: now } = known;
    load().then(() => {
      if (!now.job || client.current !== mine) return;
      const { state, records } = now.job;
      mine.post({ open: { base: location.origin + address(`/jobs/${id}/records?`), count: records.count, bytes: records.bytes, hasEnded: ENDED.includes(state) } });
    });
    const stop = mine.listen((message) => {
      if (message.ended) load();
      else if (message.refused) message.refused.status === 401 ? tellWatchers({ loggedOut: true }) : load();
    });
    let hiding = null;
    const onHidden = () => {
      clearTimeout(hiding);
      if (document.hidden) hiding = setTimeout(() => mine.post({ pause: true }), 10000);
      else mine.post({ pause: false });
    };
    document.addEventListener("visibilitychange", onHidden);
    return () => {
      now.reading++;
      clearTimeout(now.again);
      clearTimeout(hiding);
      stop();
      document.removeEventListener("visibilitychange", onHidden);
    };
  }, [id, turn]);
  useEffect(() => () => client.current.close(), []);
  const isOver = job && ENDED.includes(job.state) && job.stop !== "pending" && !job.holds_slot;
  useLive(!job || isOver ? "" : "jobs", "q=" + id, {
    jobs({ rows }) {
      const { current: now } = known;
      const row = rows.find((row) => row.job === id);
      if (!row || !now.job) return;
      const isChanged = ["state", "stop", "holds_slot"].some((name) => row[name] !== now.job[name]);
      // The row is at once what the page shows of the state; the rest follows. Why it waits or runs changes slowly.
      if (isChanged) setJob({ ...now.job, state: row.state, stop: row.stop, holds_slot: row.holds_slot, time: row.time });
      if (isChanged || performance.now() - now.at > 5000) load();
    },
    refresh: (reason) => reason !== "hello" || performance.now() - known.current.at > 200 ? load() : null,
  });
  const retry = () => {
    setError(null);
    client.current.close();
    client.current = makeClient();
    setTurn((turn) => turn + 1);
  };
  return { job, error, retry, reload: load, client: client.current, skew: known.current.skew };
}

function makeClient() {
  const worker = new Worker(workerAddress("log-worker.mjs"), { type: "module" });
  const listeners = new Set();
  worker.onmessage = ({ data }) => listeners.forEach((listener) => listener(data));
  worker.onerror = (event) => console.error("log-worker.mjs: " + event.message);
  return {
    post: (message) => worker.postMessage(message),
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    close: () => worker.terminate(),
  };
}

// --- the page ------------------------------------------------------------------------------------------------------

export function JobView({ id, query, hash }) {
  const { job, error, retry, reload, client, skew } = useJob(id);
  const [dialog, setDialog] = useState(null);
  const chosen = query.get("tab");
  const tab = TABS.includes(chosen) ? chosen : job && ENDED.includes(job.state) && !job.records.count && !hash ? "result" : "output";
  const path = "/jobs/" + id;
  // The tab that opens by itself stays when the job ends under the reader's eyes.
  const first = useRef(null);
  if (job) first.current ??= tab;
  const shown = TABS.includes(chosen) ? chosen : (first.current ?? tab);

  function change(values, newHash = location.hash) {
    const changed = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(values)) value === null || value === "" ? changed.delete(name) : changed.set(name, value);
    navigate(link(path, changed) + newHash, { replace: true });
  }
  const open = (name) => change({ tab: name }, name === "output" ? location.hash : "");

  useEffect(() => setTitle(job ? job.procedure : "", job?.state), [job?.procedure, job?.state]);
  useEffect(() => setFavicon(job?.state), [job?.state]);
  useEffect(() => () => setFavicon(null), []);
  const allowed = job ? rights(job) : {};
  useKeys(words.views.jobs, {
    ...Object.fromEntries(TABS.map((name, i) => [String(i + 1), [() => open(name), text.output.keys.tab(text.tabs[name])]])),
    u: [() => (history.length > 1 && document.referrer ? history.back() : navigate(listAddress())), text.output.keys.back],
    c: [() => job && !allowed.cancel && setDialog("cancel"), text.cancel],
    r: [() => job && !allowed.rerun && setDialog("rerun"), text.rerun],
  });

  // The right to read it may also end while it is shown.
  if (error && (!job || error.status === 404)) {
    if (error.status === 404)
      return html`<div class="page"><div class="empty"><h1>${text.unknown}</h1><p>${text.unknownDetail}</p><p><code>${id}</code></p><p><a class="button" href=${listAddress()}>${text.toJobs}</a></p></div></div>`;
    return html`<div class="page"><${Fault} error=${error} retry=${retry} /></div>`;
  }
  if (!job) return html`<div class="page"><${Loading} /></div>`;
  const count = job.records.count;
  return html`<article class="job">
    ${error instanceof Problem && html`<${Fault} error=${error} retry=${retry} />`}
    <${Header} job=${job} allowed=${allowed} skew=${skew} ask=${setDialog} />
    <${Timeline} job=${job} skew=${skew} />
    <${Tabs} shown=${shown} open=${open} count=${count} client=${client} state=${job.state} />
    <section class=${"job-panel panel-" + shown} role="tabpanel" id="panel" aria-labelledby=${"tab-" + shown} tabindex=${shown === "output" ? undefined : "0"}>
      ${shown === "output" && html`<${Output} job=${job} client=${client} query=${query} hash=${hash} change=${change} openResult=${() => open("result")} />`}
      ${shown === "result" && html`<${Result} job=${job} ask=${setDialog} allowed=${allowed} />`}
      ${shown === "arguments" && html`<${Arguments} job=${job} />`}
      ${shown === "process" && html`<${Process} job=${job} />`}
      ${shown === "details" && html`<${Details} job=${job} />`}
    </section>
    ${dialog === "cancel" && html`<${CancelDialog} job=${job} close=${() => setDialog(null)} reload=${reload} />`}
    ${dialog === "release" && html`<${ReleaseDialog} job=${job} close=${() => setDialog(null)} reload=${reload} />`}
    ${dialog === "rerun" && html`<${RerunDialog} job=${job} close=${() => setDialog(null)} />`}
  </article>`;
}

function setFavicon(state) {
  const icon = document.querySelector('link[rel="icon"]');
  if (icon) icon.href = new URL(state ? `icon-${state}.svg` : "icon.svg", import.meta.url).pathname;
}

/** Return why each action is not possible; an action without a reason is. */
function rights(job) {
  const hasEnded = ENDED.includes(job.state);
  const can = (action) => job.can?.includes(action) ?? true; // else the dispatcher decides
  return {
    cancel: hasEnded ? text.whyNot.ended : can("cancel") ? null : text.whyNot.cancel,
    rerun: can("rerun") ? null : text.whyNot.rerun,
    release: !job.holds_slot ? text.whyNot.noSlot : !hasEnded ? text.whyNot.running : can("release") ? null : text.whyNot.release,
  };
}

/** The arguments as in a call: ("blog", 3) or {"db": "orders"}. */
function signature(job) {
  const sent = (job.arguments ?? "").trim();
  const short = sent.length > 90 ? sent.slice(0, 90) + "..." : sent;
  return sent.startsWith("[") ? "(" + (sent.length > 90 ? short.slice(1) : sent.slice(1, -1)) + ")" : "(" + short + ")";
}

function Header({ job, allowed, skew, ask }) {
  const hasEnded = ENDED.includes(job.state);
  const now = useNow(!hasEnded) + skew;
  const { submit, start, end } = job.time;
  const spent = hasEnded ? (start ? text.took(duration(end - start)) : "") : start ? text.runs(duration(Math.max(0, now - start))) : text.waits(duration(Math.max(0, now - submit)));
  const action = (name, kind) => {
    const why = allowed[name];
    return html`<${Button} kind=${kind} disabled=${!!why} why=${why} onClick=${() => ask(name)} aria-describedby=${why ? "why-not-" + name : undefined}>${text[name]}</${Button}>
      ${why && html`<span class="hidden" id=${"why-not-" + name}>${why}</span>`}`;
  };
  return html`<header class="job-head">
    <div class="job-title">
      <a class="job-back" href=${listAddress()}><${Icon} name="left" size=${12} />${words.views.jobs}</a>
      <h1><span class="job-call"><${Text} value=${job.procedure + signature(job)} /></span> <span class="dim">${text.on}</span> <a href=${link("/hosts/" + encodeURIComponent(job.host))}><${Text} value=${job.host} /></a></h1>
      <span class="job-state" data-state=${job.state}><${State} state=${job.state} /> <span class="dim">${spent}</span></span>
      <span class="job-actions" role="group" aria-label=${text.actions}>
        ${action("cancel", hasEnded ? "" : "danger")}
        ${action("rerun", "")}
        ${(job.holds_slot && hasEnded) && action("release", "danger")}
        <${CopyMenu} id=${job.job} />
      </span>
    </div>
    <p class=${"job-why" + (job.state === "failed" || job.state === "raised" ? " is-bad" : "")}><${Text} value=${job.why ?? ""} /></p>
    ${job.stop && html`<p class=${"job-stop stop-" + job.stop}>${text.stop[job.stop]}</p>`}
    <p class="job-facts dim">
      <span>${text.submitted} <${Time} at=${submit} />${job.owner && html` ${text.by(visible(job.owner))}`}</span>
      ${end && html`<span>${text.ended} <${Time} at=${end} /></span>`}
      ${job.queue && html`<span>${text.queue} <a href=${link("/jobs", { queue: job.queue.id })}><code><${Text} value=${job.queue.name ?? job.queue.id} /></code></a>${job.position ? ", " + text.position(job.position) : ""}</span>`}
      ${job.holds_slot && hasEnded && html`<span class="warn">${text.slot}</span>`}
      ${job.rerun_of && html`<span>${text.rerunOf} <a href=${link("/jobs/" + job.rerun_of)}><code>${job.rerun_of.slice(0, 8)}</code></a></span>`}
      <code class="job-id">${job.job}</code>
    </p>
  </header>`;
}

/** Text of jobs and hosts, with what one does not see shown. */
function Text({ value }) {
  const element = useRef(null);
  useLayoutEffect(() => {
    element.current.replaceChildren();
    appendText(element.current, String(value));
  }, [value]);
  return html`<span ref=${element}></span>`;
}

function Tabs({ shown, open, count, client, state }) {
  const [live, setLive] = useState(count);
  useEffect(() => client.listen((message) => message.count !== undefined && setLive(message.count)), [client]);
  function keys(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const name = TABS[(TABS.indexOf(shown) + step + TABS.length) % TABS.length];
    open(name);
    document.getElementById("tab-" + name).focus();
  }
  return html`<div class="tabs" role="tablist" onKeyDown=${keys}>${TABS.map((name) => html`
    <button key=${name} type="button" role="tab" id=${"tab-" + name} aria-selected=${shown === name ? "true" : "false"} aria-controls="panel" tabindex=${shown === name ? "0" : "-1"} onClick=${() => open(name)}>
      ${text.tabs[name]}${name === "output" && html` <span class="tab-count">${Math.max(live, count).toLocaleString("en")}</span>`}${name === "result" && (state === "raised" || state === "failed") && html` <span class=${"state-" + state}><${Icon} name=${state} size=${11} /></span>`}
    </button>`)}</div>`;
}

// --- timeline ------------------------------------------------------------------------------------------------------

const BEFORE = ["accept", "store"];
const AFTER = ["store_end", "deliver"];

/** Return [{name, start, length, isLive}], with times from the submission on, and the length of the whole. */
export function readPhases(job, now) {
  const { submit, start, end } = job.time;
  const phases = job.phases ?? {};
  const hasEnded = end !== null;
  const rows = [];
  let at = 0;
  for (const [name, seconds] of Object.entries(phases)) {
    if (typeof seconds !== "number") continue;
    if (BEFORE.includes(name)) {
      rows.push({ name, start: null, length: seconds });
    } else if (AFTER.includes(name)) rows.push({ name, start: end === null ? null : end - submit, length: seconds });
    else {
      rows.push({ name, start: at, length: seconds });
      at += seconds;
    }
  }
  const total = (hasEnded ? end : Math.max(now, submit)) - submit;
  const rest = total - at;
  if (hasEnded && rest > 0.001) {
    // An end without exit info: nobody has measured what was between.
    const place = rows.findIndex((row) => AFTER.includes(row.name));
    rows.splice(place < 0 ? rows.length : place, 0, { name: start === null ? "wait" : "unmeasured", start: at, length: rest });
  } else if (!hasEnded) {
    const name = start === null ? "wait" : "run";
    const row = rows.find((row) => row.name === name);
    if (row) row.length += Math.max(0, rest);
    else rows.push({ name, start: at, length: Math.max(0, rest) });
    rows.find((row) => row.name === name).isLive = true;
  }
  return { rows, total };
}

const share = (part) => (part < 0.001 ? "< 0.1 %" : (part * 100).toFixed(1) + " %");

function Timeline({ job, skew }) {
  const hasEnded = ENDED.includes(job.state);
  const now = useNow(!hasEnded) + skew;
  const [isLog, setLog] = useState(false);
  const { rows, total } = readPhases(job, now);
  const inside = rows.filter((row) => row.start !== null && !AFTER.includes(row.name));
  const most = Math.max(total, 1e-6);
  const percent = (value) => `${Math.min(100, Math.max(0, value * 100)).toFixed(3)}%`;
  const logOf = (seconds) => Math.max(0, Math.log10(Math.max(seconds, 1e-5) / 1e-5)) / Math.max(1e-9, Math.log10(Math.max(most, 1e-4) / 1e-5));
  if (!rows.length) return null;
  const spoken = inside.map((row) => `${text.timeline.phases[row.name] ?? row.name} ${duration(row.length)}`).join(", ");
  return html`<details class="timeline">
    <summary>
      <span class="hidden">${text.timeline.summary(spoken)}</span>
      <span class="band" aria-hidden="true">${inside.map((row) => html`<span key=${row.name} class=${"phase phase-" + row.name + (row.isLive ? " is-live" : "")} style=${{ flexGrow: Math.max(row.length / most, 0.002) }} title=${`${text.timeline.phases[row.name]}: ${duration(row.length)}`}>
        <span>${row.name.replace("_", " ")} ${duration(row.length).replaceAll(" ", "\u00a0")}</span></span>`)}</span>
    </summary>
    <div class="timeline-body">
      <table>
        <caption class="hidden">${text.timeline.title}</caption>
        <thead><tr><th scope="col">${text.timeline.phase}</th><th scope="col" class="phase-bar"><label><input type="checkbox" checked=${isLog} onChange=${(event) => setLog(event.target.checked)} /> ${text.timeline.log}</label></th><th scope="col" class="num">${text.timeline.starts}</th><th scope="col" class="num">${text.timeline.length}</th><th scope="col" class="num">${text.timeline.share}</th></tr></thead>
        <tbody>${rows.map((row) => html`<tr key=${row.name} data-phase=${row.name} data-seconds=${row.length}>
          <th scope="row">${text.timeline.phases[row.name] ?? row.name}</th>
          <td class="phase-bar"><span class=${"bar-fill phase-" + row.name + (row.isLive ? " is-live" : "")} style=${isLog ? { width: percent(logOf(row.length)) } : { marginLeft: percent((row.start ?? 0) / most * 0.99), width: percent(row.length / most) }}></span></td>
          <td class="num">${row.start === null ? "" : row.start ? "+" + duration(row.start) : "0"}</td>
          <td class="num">${duration(row.length)}</td>
          <td class="num">${row.start === null || AFTER.includes(row.name) ? "" : share(row.length / most)}</td>
        </tr>`)}</tbody>
        <tfoot><tr data-seconds=${total}><th scope="row">${hasEnded ? text.timeline.total : text.timeline.soFar}</th><td></td><td></td><td class="num">${duration(total)}</td><td></td></tr></tfoot>
      </table>
    </div>
  </details>`;
}

// --- payloads ------------------------------------------------------------------------------------------------------

/** JSON text: formatted, as sent, or as a tree. `href` is where it can be downloaded. */
function Payload({ value, href, name }) {
  const decoded = useMemo(() => decodeString(value), [value]);
  const isContainer = value[0] === "{" || value[0] === "[";
  const [mode, setMode] = useState("formatted");
  const [isWhole, setWhole] = useState(false);
  const formatted = useMemo(() => (mode !== "formatted" ? "" : (decoded ?? (value.length > 4 * 2 ** 20 ? value : indent(value)))), [value, mode]);
  const element = useRef(null);
  const full = mode === "exact" ? value : formatted;
  const isCut = mode !== "tree" && !isWhole && full.length > MOST_TEXT;
  useLayoutEffect(() => {
    element.current.replaceChildren();
    if (mode === "tree") return void element.current.append(makeTree(value));
    const shown = isCut ? full.slice(0, MOST_TEXT) : full;
    for (let at = 0; at < shown.length || !at; at += 16384) {
      const block = element.current.appendChild(document.createElement("span"));
      block.className = "block";
      if (mode === "formatted" && decoded !== null) appendOutput(block, shown.slice(at, at + 16384), "");
      else appendText(block, shown.slice(at, at + 16384));
    }
  }, [value, mode, isWhole]);
  const modes = { formatted: text.payload.formatted, exact: text.payload.exact, ...(isContainer && { tree: text.payload.tree }) };
  return html`<div class="payload">
    <div class="payload-bar">
      <div class="segmented" role="group" aria-label=${text.payload.view}>${Object.entries(modes).map(([key, label]) => html`<button key=${key} type="button" class="button small" aria-pressed=${mode === key ? "true" : "false"} onClick=${() => setMode(key)}>${label}</button>`)}</div>
      <span class="dim">${size(value.length)}</span>
      <${Button} kind="small" icon="copy" onClick=${() => copy(value)}>${words.copy}</${Button}>
      ${href && html`<a class="button small" href=${href} download>${text.payload.download}</a>`}
    </div>
    <pre class=${"wrap payload-text" + (mode === "tree" ? " is-tree" : "")} ref=${element} tabindex="0" aria-label=${name}></pre>
    ${isCut && html`<p>${text.payload.cut(size(full.length))} <${Button} kind="small" onClick=${() => setWhole(true)}>${text.payload.showAll(size(full.length))}</${Button}></p>`}
  </div>`;
}

/** The text of a payload: a member of an answer with payloads=text, or a value that is not text yet. */
const textOf = (value) => (typeof value === "string" ? value : JSON.stringify(value ?? null));

function Facts({ facts }) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return known.length > 0 && html`<dl class="pairs">${known.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${typeof value === "string" || typeof value === "number" ? html`<${Text} value=${value} />` : value}</dd></div>`)}</dl>`;
}

// --- result --------------------------------------------------------------------------------------------------------

function Result({ job, ask, allowed }) {
  const end = useEnd(job);
  if (!ENDED.includes(job.state)) return html`<p class="dim">${text.result.notYet}</p>`;
  if (end.error) return html`<${Fault} error=${end.error} />`;
  if (end.large) return html`<p>${text.result.large(size(end.large.bytes))} <${Button} onClick=${end.read}>${text.result.show}</${Button}>
    ${job.state === "returned" && html` <a class="button" href=${address(`/jobs/${job.job}/result`, { download: 1 })} download>${text.payload.download}</a>`}</p>`;
  if (!end.value) return html`<${Loading} lines=${3} />`;
  const { result, exception, error } = members(end.value);
  if (result !== undefined) return html`<h2><${State} state="returned" /></h2><${Payload} value=${result} name=${text.tabs.result} href=${address(`/jobs/${job.job}/result`, { download: 1 })} />`;
  if (exception) return html`<${Raised} job=${job} exception=${readError(exception)} />`;
  if (error) return html`<${Failed} job=${job} error=${readError(error)} ask=${ask} allowed=${allowed} />`;
  const { stop_request: stop } = job;
  return html`<h2><${State} state="cancelled" /></h2>
    <${Facts} facts=${[[text.result.requester, stop?.by], [text.result.reason, stop?.why], [text.result.at, stop?.at && html`<${Time} at=${stop.at} />`]]} />
    ${job.stop && html`<p>${text.stop[job.stop]}</p>`}`;
}

/** The text of the closing line of a job; a long one is read when it is asked for. */
function useEnd(job) {
  const [read, setRead] = useState(null);
  const [error, setError] = useState(null);
  const value = read ?? job.end;
  if (value || !job.end_omitted) return { value, error };
  return {
    large: job.end_omitted,
    error,
    async read() {
      try {
        setRead((await (await send("GET", `/jobs/${job.job}/end`)).text()).trim());
      } catch (problem) {
        setError(problem);
      }
    },
  };
}

/** Return type, message and module of an exception or error, and the text of its data. */
function readError(value) {
  const { type, message, data } = members(value);
  const { module } = data?.startsWith("{") ? members(data) : {};
  return { type: decodeString(type ?? '""'), message: decodeString(message ?? '""'), data: data === "null" ? undefined : data, module: module && decodeString(module) };
}

function Raised({ job, exception }) {
  const traceback = job.exit_info?.traceback;
  return html`<h2 class="end-title"><${State} state="raised" /> <code><${Text} value=${exception.type} /></code></h2>
    <p class="end-message"><${Text} value=${exception.message} /></p>
    <${Facts} facts=${[[text.result.module, exception.module]]} />
    <h3>${text.result.traceback}</h3>
    ${traceback ? html`<${Lines} value=${traceback} name=${text.result.traceback} />` : html`<p class="dim">${text.result.noTraceback}</p>`}`;
}

/** Text of several lines from a host. */
function Lines({ value, name }) {
  const element = useRef(null);
  const lines = [value].flat().join("\n");
  useLayoutEffect(() => {
    element.current.replaceChildren();
    appendOutput(element.current, lines, "");
  }, [lines]);
  return html`<pre class="wrap lines" ref=${element} tabindex="0" aria-label=${name}></pre>`;
}

let errors = null; // the error types with cause and cure; read when a failed job is shown

function Failed({ job, error, ask, allowed }) {
  const [known, setKnown] = useState(null);
  useEffect(() => {
    errors ??= fetch(new URL("errors.json", import.meta.url)).then((response) => response.json());
    errors.then(setKnown, () => (errors = null));
  }, []);
  const entries = known && Object.hasOwn(known, error.type) ? known[error.type] : [];
  const concernsHost = /host|network|certificate|protocol|calls|connections|auth|shutdown|procedure_loading|system_error|call_died/.test(error.type);
  return html`<h2 class="end-title"><${State} state="failed" /> <code><${Text} value=${error.type} /></code></h2>
    <p class="end-message"><${Text} value=${error.message} /></p>
    ${entries.length ? entries.map(([cause, cure], i) => html`<dl class="pairs causes" key=${i}><div><dt>${text.result.cause}</dt><dd>${cause}</dd></div><div><dt>${text.result.cure}</dt><dd>${cure}</dd></div></dl>`) : known && html`<p>${text.result.unknownType}</p>`}
    <p class="next-steps">
      <${Button} disabled=${!!allowed.rerun} why=${allowed.rerun} onClick=${() => ask("rerun")}>${text.rerun}</${Button}>
      ${concernsHost && html` <a class="button" href=${link("/hosts/" + encodeURIComponent(job.host))}>${text.result.hostPage(visible(job.host))}</a>`}
    </p>
    ${error.data && html`<h3>${text.result.data}</h3><${Payload} value=${error.data} name=${text.result.data} />`}`;
}

// --- arguments, process, details -----------------------------------------------------------------------------------

function Arguments({ job }) {
  const { limits } = job;
  return html`<h2>${text.tabs.arguments}</h2><${Payload} value=${textOf(job.arguments)} name=${text.tabs.arguments} />
    <h2>Info</h2><${Payload} value=${textOf(job.info)} name="Info" />
    ${limits && html`<h2>${text.limits}</h2><${Facts} facts=${Object.entries(limits).map(([name, value]) => [name, value === null ? null : name === "running" ? value : duration(value)])} />`}`;
}

function Process({ job }) {
  const { exit_info: exit, call, stop_report: report, stop_request: stop } = job;
  if (!exit && !call && !report && !stop) return html`<p class="dim">${ENDED.includes(job.state) ? text.process.neverRan : text.process.none}</p>`;
  const words = text.process;
  const stderr = exit?.stderr && [exit.stderr].flat().join("\n");
  const time = (at) => at && html`<${Time} at=${at} />`;
  return html`
    ${exit && html`<${Facts} facts=${[
      [words.exit, exit.exit === undefined || exit.exit === null ? null : html`<span class=${exit.exit ? "bad" : ""}>${exit.exit}</span>`],
      [words.signal, exit.signal && html`<span class="bad"><${Text} value=${exit.signal} /></span>`],
      [words.by, exit.by && (words.byWhom[exit.by] ?? exit.by) + (exit.by_whom ? ` (${exit.by_whom})` : "")],
      [words.cpu, exit.cpu === null || exit.cpu === undefined ? null : duration(exit.cpu)],
      [words.memory, exit.memory && size(exit.memory)],
      [words.started, time(exit.started)],
      [words.ended, time(exit.ended)],
    ]} />`}
    ${call && html`<${Facts} facts=${[
      [words.address, call.address && `${call.address}:${call.port}`],
      [words.attempts, call.attempts],
      [words.contact, time(call.last_contact)],
      [words.outage, call.outage && html`<span class="bad">${time(call.outage.since)} <${Text} value=${outage(call.outage)} /></span>`],
      [words.resumable, call.resumable === undefined ? null : call.resumable ? words.yes : words.no],
      [words.instance, call.instance && html`<code><${Text} value=${call.instance} /></code>`],
    ]} />`}
    ${(report || stop) && html`<${Stop} job=${job} report=${report} stop=${stop} />`}
    ${exit && html`<h2>${words.stderr}</h2>${stderr === "" ? html`<p class="dim">${words.emptyStderr}</p>` : stderr ? html`<${Lines} value=${stderr} name=${words.stderr} />` : html`<p class="dim">${words.noStderr}</p>`}`}`;
}

const outage = ({ attempts, error }) => `(${attempts}) ${typeof error === "string" ? error : (error?.message ?? "")}`;

function Stop({ job, report, stop }) {
  const words = text.process;
  const survivors = new Set((report?.survivors ?? []).map((process) => process.pid));
  const listed = report?.processes ?? [];
  const missing = (report?.survivors ?? []).filter(({ pid }) => !listed.some((process) => process.pid === pid));
  const row = (process, isMain) => html`<li key=${process.pid} class=${survivors.has(process.pid) ? "survivor" : ""} data-pid=${process.pid}>
    <code class="pid">${process.pid}</code> <code><${Text} value=${process.command || (isMain ? words.call : "?")} /></code>
    <span class="dim">${process.signals?.length ? words.sent(process.signals.join(", ")) : ""}</span>
    ${survivors.has(process.pid) ? html`<strong class="bad"><${Icon} name="warning" /> ${words.survives}</strong>` : html`<span>${process.ended ? words.endedAs(process.ended) : ""}</span>`}
  </li>`;
  return html`<h2>${words.report}</h2>
    <${Facts} facts=${[[text.result.requester, stop?.by], [text.result.reason, stop?.why], [text.result.at, stop?.at && html`<${Time} at=${stop.at} />`]]} />
    ${report?.known === false && html`<p>${words.unknownCall}</p>`}
    ${report?.host_lost && html`<p class="bad">${words.lost} <${Text} value=${outage(report.host_lost)} /></p>`}
    ${report?.released !== undefined && html`<p>${words.releasedBy}</p>`}
    ${listed.length > 0 && html`
      <p>${words.found(report.found ?? listed.length, report.surviving ?? survivors.size)}. <span class=${report.complete ? "dim" : "warn"}>${report.complete ? words.complete : words.incomplete}</span></p>
      <ul class="processes">${row(listed[0], true)}${(listed.length > 1 || missing.length > 0) && html`<li class="branch"><ul>${[...listed.slice(1), ...missing].map((process) => row(process, false))}</ul></li>`}</ul>
      ${report.found > listed.length && html`<p class="dim">${words.more(report.found - listed.length)}</p>`}`}`;
}

function Details({ job }) {
  const [body, setBody] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    const closing = new AbortController();
    (async () => {
      try {
        const read = async (payloads) => (await send("GET", "/jobs/" + job.job, { params: { payloads }, signal: closing.signal })).text();
        const whole = await read("raw");
        setBody((whole.length > 2 ** 20 ? await read("none") : whole).trim());
      } catch (problem) {
        if (!closing.signal.aborted) setError(problem);
      }
    })();
    return () => closing.abort();
  }, [job]);
  if (error) return html`<${Fault} error=${error} />`;
  return body === null ? html`<${Loading} />` : html`<${Payload} value=${body} name=${text.tabs.details} href=${address("/jobs/" + job.job, { payloads: "raw" })} />`;
}

// --- actions -------------------------------------------------------------------------------------------------------

/** Do something once at a time; keep its error for the dialog. */
function useAction(action) {
  const [error, setError] = useState(null);
  const [isBusy, setBusy] = useState(false);
  async function run(event) {
    event?.preventDefault();
    if (isBusy) return;
    setBusy(true);
    setError(null);
    try {
      await action();
    } catch (problem) {
      setError(problem);
      setBusy(false);
    }
  }
  return { error, isBusy, run };
}

function Confirm({ title, children, label, kind, action, close }) {
  const { error, isBusy, run } = useAction(action);
  return html`<${Dialog} title=${title} close=${close}>
    ${children}
    ${error && html`<${Fault} error=${error} />`}
    <footer><${Button} onClick=${close}>${text.back}</${Button}><${Button} kind=${kind} disabled=${isBusy} onClick=${run}>${label}</${Button}></footer>
  </${Dialog}>`;
}

const named = (job) => html`<p class="mono"><${Text} value=${job.procedure + signature(job)} /> ${text.on} <${Text} value=${job.host} /></p>`;

function CancelDialog({ job, close, reload }) {
  return html`<${Confirm} title=${text.cancelTitle} label=${text.doCancel} kind="danger" close=${close} action=${async () => {
    const { cancelled } = await post(`/jobs/${job.job}/cancel`, {});
    notify(cancelled ? text.cancelled : text.notCancelled);
    close();
    reload();
  }}>${named(job)}<p>${job.state === "queued" ? text.cancelQueued : text.cancelRunning(visible(job.host))}</p></${Confirm}>`;
}

function ReleaseDialog({ job, close, reload }) {
  return html`<${Confirm} title=${text.releaseTitle} label=${text.doRelease} kind="danger" close=${close} action=${async () => {
    const { released } = await post(`/jobs/${job.job}/release`, {});
    notify(released ? text.released : text.notReleased);
    close();
    reload();
  }}>${named(job)}<p>${text.releaseDetail(visible(job.host))}</p></${Confirm}>`;
}

function RerunDialog({ job, close }) {
  const [host, setHost] = useState(job.host);
  const [hosts, setHosts] = useState([]);
  const key = useMemo(newKey, []);
  useEffect(() => {
    get("/hosts").then(({ hosts }) => setHosts(hosts.map(({ name }) => name)), () => null); // a help that not all may see
  }, []);
  return html`<${Confirm} title=${text.rerunTitle} label=${text.doRerun} kind="primary" close=${close} action=${async () => {
    const changes = host === job.host ? {} : { host };
    const made = await post(`/jobs/${job.job}/rerun`, changes, { headers: { "Idempotency-Key": `${key}-${encodeURIComponent(host).slice(0, 200)}` } });
    notify(text.rerunDone);
    close();
    navigate(link("/jobs/" + made.job));
  }}>
    <p>${text.rerunDetail}</p>
    <div class="fields">
      <label for="rerun-host">${text.host}</label>
      <input id="rerun-host" list="rerun-hosts" autocomplete="off" spellcheck="false" value=${host} onInput=${(event) => setHost(event.target.value.trim())} />
      <datalist id="rerun-hosts">${hosts.map((name) => html`<option key=${name} value=${name} />`)}</datalist>
      <span>${text.procedure}</span><code><${Text} value=${job.procedure} /></code>
      <span>${text.argumentsNamed}</span><pre class="wrap rerun-arguments" tabindex="0"><${Text} value=${textOf(job.arguments).slice(0, 20000)} /></pre>
    </div>
  </${Confirm}>`;
}
