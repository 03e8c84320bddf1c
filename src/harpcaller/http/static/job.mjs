// One job: what it is, why it is so, how its time was spent, its output as it comes, and how it ended.
import { address, bodyOf, facts, get, newKey, post, Problem, send, useLive } from "./api.mjs";
import { callOf, count, duration, queueName, size, visible } from "./formats.mjs";
import { appendText, decodeString, indent, makeTree, members } from "./json.mjs";
import { appendOutput } from "./log.mjs";
import { Output } from "./output.mjs";
import { ENDED, hostLink, jobLink, link, listAddress, navigate } from "./router.mjs";
import { Button, copy, copyItems, Dialog, Facts, Fault, html, Icon, Loading, Menu, notify, setTitle, State, STOPS, Time, useEffect, useKeys, useLayoutEffect, useMemo, useNow, useRef, useState, workerAddress } from "./ui.mjs";

const TAB_NAMES = { output: "Output", result: "Result", arguments: "Arguments", process: "Process", details: "Details" };
const TABS = Object.keys(TAB_NAMES);
const MOST_TEXT = 262144; // characters that are shown at once

// --- the job and its stream ----------------------------------------------------------------------------------------

/** Keep a job up to date, by the events about it; its records come by a stream of their own. */
function useJob(id) {
  const [job, setJob] = useState(null);
  const [error, setError] = useState(null);
  const [turn, setTurn] = useState(0);
  const client = useRef(null);
  const known = useRef({ job: null, at: 0, skew: 0, again: null, reading: 0 });
  client.current ??= takeClient();

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
        return bodyOf(response);
      };
      let found = await read(isNew ? "text" : "none");
      if (!isNew && ENDED.includes(found.state)) found = await read("text");
      if (number !== now.reading) return;
      const { state, records } = (now.job = { ...now.job, ...found });
      if (!now.isOpen) {
        now.isOpen = true;
        client.current.post({ open: { base: location.origin + address(`/jobs/${id}/records?`), count: records.count, bytes: records.bytes, hasEnded: ENDED.includes(state) } });
      }
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
    now.isOpen = false;
    load();
    const stop = mine.listen((message) => {
      if (message.ended) load();
      else if (message.refused) message.refused === 401 ? facts.tell({ loggedOut: true }) : load();
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

// A worker takes long to start. Where the address names a job, it starts while the dispatcher is asked who is logged in.
let early = /\/jobs\/[0-9a-f-]{36}$/.test(location.pathname) ? makeClient() : null;

function takeClient() {
  const client = early ?? makeClient();
  early = null;
  return client;
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
  useKeys("Jobs", {
    ...Object.fromEntries(TABS.map((name, i) => [String(i + 1), [() => open(name), `tab ${TAB_NAMES[name]}`]])),
    u: [() => (history.length > 1 && document.referrer ? history.back() : navigate(listAddress())), "back to the list"],
    c: [() => job && !allowed.cancel && setDialog("cancel"), "Cancel"],
    r: [() => job && !allowed.rerun && setDialog("rerun"), "Re-run"],
  });

  // The right to read it may also end while it is shown.
  if (error && (!job || error.status === 404)) {
    if (error.status === 404)
      return html`<div class="page"><div class="empty"><h1>No such job</h1><p>The id is mistyped, the job was deleted after its time, or it is not yours to read.</p><p><code>${id}</code></p><p><a class="button" href=${listAddress()}>All jobs</a></p></div></div>`;
    return html`<div class="page"><${Fault} error=${error} retry=${retry} /></div>`;
  }
  if (!job) return html`<div class="page"><${Loading} /></div>`;
  return html`<article class="job">
    ${error instanceof Problem && html`<${Fault} error=${error} retry=${retry} />`}
    <${Header} job=${job} allowed=${allowed} skew=${skew} ask=${setDialog} />
    <${Timeline} job=${job} skew=${skew} />
    <${Tabs} shown=${shown} open=${open} stored=${job.records.count} client=${client} state=${job.state} />
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
    cancel: hasEnded ? "The job has ended." : can("cancel") ? null : "You have no right to cancel this job.",
    rerun: can("rerun") ? null : "You have no right to read this job and to call its procedure again.",
    release: !job.holds_slot ? "The job holds no slot." : !hasEnded ? "A slot can be released when the job has ended." : can("release") ? null : "You have no right to release the slot of this job.",
  };
}

/** The call: backup("orders"), or list({"db": "orders"}). */
const callText = (job) => callOf(job.procedure, (job.arguments ?? "").trim(), 90).join("");

/** Return a sentence of the dispatcher, its times as all others on the page. */
const withTimes = (text) => visible(text).split(/(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00)/).map((part, place) => (place % 2 ? html`<${Time} at=${Date.parse(part) / 1000} />` : part));

function Header({ job, allowed, skew, ask }) {
  const hasEnded = ENDED.includes(job.state);
  const now = useNow(!hasEnded) + skew;
  const { submit, start, end } = job.time;
  const spent = hasEnded ? (start ? `took ${duration(end - start)}` : "") : start ? `runs for ${duration(Math.max(0, now - start))}` : `waits for ${duration(Math.max(0, now - submit))}`;
  const action = (name, label, kind) => {
    const why = allowed[name];
    return html`<${Button} kind=${kind} disabled=${!!why} why=${why} onClick=${() => ask(name)} aria-describedby=${why ? "why-not-" + name : undefined}>${label}<//>
      ${why && html`<span class="hidden" id=${"why-not-" + name}>${why}</span>`}`;
  };
  return html`<header class="job-head">
    <div class="job-title">
      <a class="job-back" href=${listAddress()}><${Icon} name="left" size=${12} />Jobs</a>
      <h1><span class="job-call">${callText(job)}</span> <span class="dim">on</span> <a href=${hostLink(job.host)}>${visible(job.host)}</a></h1>
      <span class="job-state" data-state=${job.state}><${State} state=${job.state} /> <span class="dim">${spent}</span></span>
      <span class="job-actions" role="group" aria-label="Actions">
        ${action("cancel", "Cancel", hasEnded ? "" : "danger")}
        ${action("rerun", "Re-run", "")}
        ${(job.holds_slot && hasEnded) && action("release", "Release slot", "danger")}
        <${Menu} label="Copy as" icon="copy" text="Copy">${(close) => copyItems(job.job, close)}<//>
      </span>
    </div>
    <p class=${"job-why" + (job.state === "failed" || job.state === "raised" ? " is-bad" : "")}>${withTimes(job.why)}</p>
    ${job.stop && html`<p class=${"job-stop stop-" + job.stop}>${STOPS[job.stop]}</p>`}
    <p class="job-facts dim">
      <span>Submitted <${Time} at=${submit} />${job.owner && html` by ${visible(job.owner)}`}</span>
      ${end && html`<span>ended <${Time} at=${end} /></span>`}
      ${job.queue && html`<span>Queue <a href=${link("/jobs", { queue: job.queue.id })}><code>${queueName(job.queue)}</code></a>${job.position ? ", " + `position ${job.position}` : ""}</span>`}
      ${job.holds_slot && hasEnded && html`<span class="warn">holds a slot</span>`}
      ${job.rerun_of && html`<span>Re-run of <a href=${jobLink(job.rerun_of)}><code>${job.rerun_of.slice(0, 8)}</code></a></span>`}
      <code class="job-id">${job.job}</code>
    </p>
  </header>`;
}

function Tabs({ shown, open, stored, client, state }) {
  const [live, setLive] = useState(stored);
  useEffect(() => client.listen((message) => message.count !== undefined && setLive(message.count)), [client]);
  useLayoutEffect(() => document.getElementById("tab-" + shown).scrollIntoView({ block: "nearest", inline: "nearest" }), [shown]);
  function keys(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const name = TABS[(TABS.indexOf(shown) + step + TABS.length) % TABS.length];
    open(name);
    document.getElementById("tab-" + name).focus();
  }
  return html`<div class="tabs" role="tablist" onKeyDown=${keys}>${TABS.map((name) => html`
    <button key=${name} type="button" role="tab" id=${"tab-" + name} aria-selected=${shown === name} aria-controls="panel" tabindex=${shown === name ? "0" : "-1"} onClick=${() => open(name)}>
      ${TAB_NAMES[name]}${name === "output" && html` <span class="tab-count">${count(Math.max(live, stored))}</span>`}${name === "result" && (state === "raised" || state === "failed") && html` <span class=${"state-" + state}><${Icon} name=${state} size=${11} /></span>`}
    </button>`)}</div>`;
}

// --- timeline ------------------------------------------------------------------------------------------------------

const PHASES = {
  wait: "wait for a slot",
  connect: "connect to the host",
  authenticate: "authenticate",
  fork: "start the process",
  run: "run",
  unmeasured: "not measured",
  other: "transfer and store records",
};

/** Return [{name, start, length, isLive}], with times from the submission on, and the length of the whole. */
export function readPhases(job, now) {
  const { submit, start, end } = job.time;
  const phases = job.phases ?? {};
  const hasEnded = end !== null;
  const rows = [];
  let at = 0;
  for (const [name, seconds] of Object.entries(phases)) {
    if (typeof seconds !== "number") continue;
    rows.push({ name, start: at, length: seconds });
    at += seconds;
  }
  const total = (hasEnded ? end : Math.max(now, submit)) - submit;
  const rest = total - at;
  if (hasEnded && rest > 0.001) {
    // An end without exit info: nobody has measured what was between.
    rows.push({ name: start === null ? "wait" : "unmeasured", start: at, length: rest });
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
  const most = Math.max(total, 1e-6);
  const percent = (value) => `${Math.min(100, Math.max(0, value * 100)).toFixed(3)}%`;
  const logOf = (seconds) => Math.max(0, Math.log10(Math.max(seconds, 1e-5) / 1e-5)) / Math.max(1e-9, Math.log10(Math.max(most, 1e-4) / 1e-5));
  if (!rows.length) return null;
  const spoken = rows.map((row) => `${PHASES[row.name]} ${duration(row.length)}`).join(", ");
  return html`<details class="timeline">
    <summary>
      <span class="hidden">Timeline: ${spoken}</span>
      <span class="band" aria-hidden="true">${rows.map((row) => html`<span key=${row.name} class=${"phase phase-" + row.name + (row.isLive ? " is-live" : "")} style=${{ flexGrow: Math.max(row.length / most, 0.002) }} title=${`${PHASES[row.name]}: ${duration(row.length)}`}>
        <span>${row.name} ${duration(row.length).replaceAll(" ", "\u00a0")}</span></span>`)}</span>
    </summary>
    <div class="timeline-body">
      <table>
        <caption class="hidden">Timeline</caption>
        <thead><tr><th scope="col">Phase</th><th scope="col" class="phase-bar"><label><input type="checkbox" checked=${isLog} onChange=${(event) => setLog(event.target.checked)} /> Logarithmic bars</label></th><th scope="col" class="num">Starts at</th><th scope="col" class="num">Length</th><th scope="col" class="num">Share</th></tr></thead>
        <tbody>${rows.map((row) => html`<tr key=${row.name} data-phase=${row.name} data-seconds=${row.length}>
          <th scope="row">${PHASES[row.name]}</th>
          <td class="phase-bar"><span class=${"bar-fill phase-" + row.name + (row.isLive ? " is-live" : "")} style=${isLog ? { width: percent(logOf(row.length)) } : { marginLeft: percent(row.start / most * 0.99), width: percent(row.length / most) }}></span></td>
          <td class="num">${row.start ? "+" + duration(row.start) : "0"}</td>
          <td class="num">${duration(row.length)}</td>
          <td class="num">${share(row.length / most)}</td>
        </tr>`)}</tbody>
        <tfoot><tr data-seconds=${total}><th scope="row">${hasEnded ? "From submission to end" : "From submission until now"}</th><td></td><td></td><td class="num">${duration(total)}</td><td></td></tr></tfoot>
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
  const modes = { formatted: "Formatted", exact: "As sent", ...(isContainer && { tree: "Tree" }) };
  return html`<div class="payload">
    <div class="payload-bar">
      <div class="segmented" role="group" aria-label="Show as">${Object.entries(modes).map(([key, label]) => html`<button key=${key} type="button" class="button small" aria-pressed=${mode === key} onClick=${() => setMode(key)}>${label}</button>`)}</div>
      <span class="dim">${size(value.length)}</span>
      <${Button} kind="small" icon="copy" onClick=${() => copy(value)}>Copy<//>
      ${href && html`<a class="button small" href=${href} download>Download</a>`}
    </div>
    <pre class=${"wrap payload-text" + (mode === "tree" ? " is-tree" : "")} ref=${element} tabindex="0" aria-label=${name}></pre>
    ${isCut && html`<p>The first part of ${size(full.length)}. <${Button} kind="small" onClick=${() => setWhole(true)}>Show all ${size(full.length)}<//></p>`}
  </div>`;
}

/** The text of a payload: a member of an answer with payloads=text, or a value that is not text yet. */
const textOf = (value) => (typeof value === "string" ? value : JSON.stringify(value ?? null));

// --- result --------------------------------------------------------------------------------------------------------

function Result({ job, ask, allowed }) {
  const end = useEnd(job);
  if (!ENDED.includes(job.state)) return html`<p class="dim">The job has not ended. Its result will be here.</p>`;
  if (end.error) return html`<${Fault} error=${end.error} />`;
  if (end.large) return html`<p>The value has ${size(end.large.bytes)}. <${Button} onClick=${end.read}>Show it<//>
    ${job.state === "returned" && html` <a class="button" href=${address(`/jobs/${job.job}/result`, { download: 1 })} download>Download</a>`}</p>`;
  if (!end.value) return html`<${Loading} lines=${3} />`;
  const { result, exception, error } = members(end.value);
  if (result !== undefined) return html`<h2><${State} state="returned" /></h2><${Payload} value=${result} name="Result" href=${address(`/jobs/${job.job}/result`, { download: 1 })} />`;
  if (exception) return html`<${Raised} job=${job} exception=${readError(exception)} />`;
  if (error) return html`<${Failed} job=${job} error=${readError(error)} ask=${ask} allowed=${allowed} />`;
  const { stop_request: stop } = job;
  return html`<h2><${State} state="cancelled" /></h2>
    <${Facts} facts=${[["Requested by", stop?.principal ?? stop?.by], ["Reason", stop?.why], ["At", stop?.at && html`<${Time} at=${stop.at} />`]]} />`;
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
  return html`<h2 class="end-title"><${State} state="raised" /> <code>${visible(exception.type)}</code></h2>
    <p class="end-message">${visible(exception.message)}</p>
    <${Facts} facts=${[["Module", exception.module]]} />
    <h3>Traceback</h3>
    ${traceback ? html`<${Lines} value=${traceback} name="Traceback" />` : html`<p class="dim">The host sent no traceback. It does with exit_info.traceback in harpd's configuration; harpd's log always has it.</p>`}`;
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
  return html`<h2 class="end-title"><${State} state="failed" /> <code>${visible(error.type)}</code></h2>
    <p class="end-message">${visible(error.message)}</p>
    ${entries.length ? entries.map(([cause, cure], i) => html`<dl class="pairs causes" key=${i}><div><dt>Cause</dt><dd>${cause}</dd></div><div><dt>What to do</dt><dd>${cure}</dd></div></dl>`) : known && html`<p>This type is not in the documentation; treat it as a failure of the network or of the host.</p>`}
    <p class="next-steps">
      <${Button} disabled=${!!allowed.rerun} why=${allowed.rerun} onClick=${() => ask("rerun")}>Re-run<//>
      ${concernsHost && html` <a class="button" href=${hostLink(job.host)}>Look at host ${visible(job.host)}</a>`}
    </p>
    ${error.data && html`<h3>Data</h3><${Payload} value=${error.data} name="Data" />`}`;
}

// --- arguments, process, details -----------------------------------------------------------------------------------

function Arguments({ job }) {
  const { limits } = job;
  return html`<h2>Arguments</h2><${Payload} value=${textOf(job.arguments)} name="Arguments" />
    <h2>Info</h2><${Payload} value=${textOf(job.info)} name="Info" />
    ${limits && html`<h2>Limits</h2><${Facts} facts=${Object.entries(limits).map(([name, value]) => [name, value === null ? null : name === "running" ? value : duration(value)])} />`}`;
}

const ENDED_BY = { itself: "itself", limit: "a limit", cancel: "a cancel", shutdown: "the end of harpd", lost_contact: "lost contact", out_of_memory: "too little memory", unknown: "unknown" };

function Process({ job }) {
  const { exit_info: exit, call, stop_report: report, stop_request: stop } = job;
  if (!exit && !call && !report && !stop) return html`<p class="dim">${ENDED.includes(job.state) ? "The job had no process." : "Nothing is known of a process yet."}</p>`;
  const stderr = exit?.stderr && [exit.stderr].flat().join("\n");
  const time = (at) => at && html`<${Time} at=${at} />`;
  return html`
    ${exit && html`<${Facts} facts=${[
      ["Exit code", exit.exit === undefined || exit.exit === null ? null : html`<span class=${exit.exit ? "bad" : ""}>${exit.exit}</span>`],
      ["Signal", exit.signal && html`<span class="bad">${visible(exit.signal)}</span>`],
      ["Ended by", exit.by && (ENDED_BY[exit.by] ?? exit.by) + (exit.by_whom ? ` (${exit.by_whom})` : "")],
      ["CPU time", exit.cpu === null || exit.cpu === undefined ? null : duration(exit.cpu)],
      ["Most memory", exit.memory && size(exit.memory)],
      ["Started", time(exit.started)],
      ["Ended", time(exit.ended)],
    ]} />`}
    ${call && html`<${Facts} facts=${[
      ["Address", call.address && `${call.address}:${call.port}`],
      ["Attempts to connect", call.attempts],
      ["Last contact", time(call.last_contact)],
      ["Unreachable since", call.outage && html`<span class="bad">${time(call.outage.since)} ${visible(outage(call.outage))}</span>`],
      ["Survives a lost connection", call.resumable === undefined ? null : call.resumable ? "yes" : "no"],
      ["Supervisor", call.instance && html`<code>${visible(call.instance)}</code>`],
    ]} />`}
    ${(report || stop) && html`<${Stop} job=${job} report=${report} stop=${stop} />`}
    ${exit && html`<h2>Last lines of stderr</h2>${stderr === "" ? html`<p class="dim">It wrote nothing to stderr.</p>` : stderr ? html`<${Lines} value=${stderr} name="Last lines of stderr" />` : html`<p class="dim">The host sent no stderr. It does with exit_info.stderr in harpd's configuration.</p>`}`}`;
}

const outage = ({ attempts, error }) => `(${attempts}) ${typeof error === "string" ? error : (error?.message ?? "")}`;

function Stop({ job, report, stop }) {
  const survivors = new Set((report?.survivors ?? []).map((process) => process.pid));
  const listed = report?.processes ?? [];
  const missing = (report?.survivors ?? []).filter(({ pid }) => !listed.some((process) => process.pid === pid));
  const row = (process, isMain) => html`<li key=${process.pid} class=${survivors.has(process.pid) ? "survivor" : ""} data-pid=${process.pid}>
    <code class="pid">${process.pid}</code> <code>${visible(process.command || (isMain ? "The call's process" : "?"))}</code>
    <span class="dim">${process.signals?.length ? `sent ${process.signals.join(", ")}` : ""}</span>
    ${survivors.has(process.pid) ? html`<strong class="bad"><${Icon} name="warning" /> survives</strong>` : html`<span>${process.ended ? `ended: ${process.ended}` : ""}</span>`}
  </li>`;
  return html`<h2>Stop report</h2>
    <${Facts} facts=${[["Requested by", stop?.principal ?? stop?.by], ["Reason", stop?.why], ["At", stop?.at && html`<${Time} at=${stop.at} />`]]} />
    ${report?.known === false && html`<p>The host did not know the call.</p>`}
    ${report?.host_lost && html`<p class="bad">The host was declared lost. ${visible(outage(report.host_lost))}</p>`}
    ${report?.released !== undefined && html`<p>An administrator released the slot.</p>`}
    ${listed.length > 0 && html`
      <p>${report.found ?? listed.length} ${report.found === 1 ? "process" : "processes"} found, ${report.surviving ?? survivors.size} surviving. <span class=${report.complete ? "dim" : "warn"}>${report.complete ? "No process can have escaped." : "A process may have escaped: the host has no cgroup for its calls."}</span></p>
      <ul class="processes">${row(listed[0], true)}${(listed.length > 1 || missing.length > 0) && html`<li class="branch"><ul>${[...listed.slice(1), ...missing].map((process) => row(process, false))}</ul></li>`}</ul>
      ${report.found > listed.length && html`<p class="dim">${report.found - listed.length} more are not listed.</p>`}`}`;
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
  return body === null ? html`<${Loading} />` : html`<${Payload} value=${body} name="Details" href=${address("/jobs/" + job.job, { payloads: "raw" })} />`;
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
    <footer><${Button} onClick=${close}>Back<//><${Button} kind=${kind} disabled=${isBusy} onClick=${run}>${label}<//></footer>
  <//>`;
}

const named = (job) => html`<p class="mono">${callText(job)} on ${visible(job.host)}</p>`;

function CancelDialog({ job, close, reload }) {
  return html`<${Confirm} title="Cancel this job?" label="Cancel the job" kind="danger" close=${close} action=${async () => {
    const { cancelled } = await post(`/jobs/${job.job}/cancel`, {});
    notify(cancelled ? "The job is cancelled." : "The job had ended before.");
    close();
    reload();
  }}>${named(job)}<p>${job.state === "queued" ? "It has not started. It will not run." : `It runs: its process on ${visible(job.host)} and all processes that it started are stopped.`}</p><//>`;
}

function ReleaseDialog({ job, close, reload }) {
  return html`<${Confirm} title="Release the slot of this job?" label="Release the slot" kind="danger" close=${close} action=${async () => {
    const { released } = await post(`/jobs/${job.job}/release`, {});
    notify(released ? "The slot is released." : "The job held no slot.");
    close();
    reload();
  }}>${named(job)}<p>Its queue and ${visible(job.host)} then count the job as over, even if processes of it still run there. Look at the host first.</p><//>`;
}

function RerunDialog({ job, close }) {
  const [host, setHost] = useState(job.host);
  const [hosts, setHosts] = useState([]);
  const key = useMemo(newKey, []);
  useEffect(() => {
    get("/hosts", { limit: 500 }).then(({ hosts }) => setHosts(hosts.map(({ name }) => name)), () => null); // a help that not all may see
  }, []);
  return html`<${Confirm} title="Re-run this job" label="Re-run" kind="primary" close=${close} action=${async () => {
    const changes = host === job.host ? {} : { host };
    const made = await post(`/jobs/${job.job}/rerun`, changes, { headers: { "Idempotency-Key": `${key}-${encodeURIComponent(host).slice(0, 200)}` } });
    notify("This is the new job.");
    close();
    navigate(jobLink(made.job));
  }}>
    <p>A new job with the same procedure, arguments, info, queue and limits. The arguments stay as they are, to the byte.</p>
    <div class="fields">
      <label for="rerun-host">Host</label>
      <input id="rerun-host" list="rerun-hosts" autocomplete="off" spellcheck="false" value=${host} onInput=${(event) => setHost(event.target.value.trim())} />
      <datalist id="rerun-hosts">${hosts.map((name) => html`<option key=${name} value=${name} />`)}</datalist>
      <span>Procedure</span><code>${visible(job.procedure)}</code>
      <span>Arguments</span><pre class="wrap rerun-arguments" tabindex="0">${visible(textOf(job.arguments).slice(0, 20000))}</pre>
    </div>
  <//>`;
}
