// Pages of a table, and of one thing of it: queues, hosts, the audit file, sessions.
import { del, facts, get, useLive } from "./api.mjs";
import { age, count, duration, fullTime, plural, queueName, sourcesOf, visible } from "./formats.mjs";
import { hostLink, jobLink, link, navigate } from "./router.mjs";
import { Button, Choose, Clear, Empty, Example, Facts, Fault, html, Icon, Loading, notify, setTitle, Strip, Time, useEffect, useNow, useRef, useSoon, useState } from "./ui.mjs";

const HOSTS_EVERY = 10_000;   // hosts change without a change of any job
const SOON = 14 * 86400;      // seconds before the end of a certificate, as the alert has it

/**
 * Ask `path` with `params`; return {data, error, ask, soon, more}. `field` names the list in the answer; `more` appends
 * the next page. `soon` asks again, at most every two seconds.
 */
function useAnswer(path, params, field) {
  const [state, setState] = useState({ data: null, error: null });
  const key = link(path, params);
  const now = useRef({ pages: 1 }).current;
  const joined = (first, second) => ({ ...second, [field]: [...first[field], ...second[field]] });
  const soon = useSoon(async () => {
    try {
      let data = await get(path, params);
      for (let page = 1; page < now.pages && data.next; page++) data = joined(data, await get(path, { ...params, cursor: data.next }));
      if (now.key === key) setState({ data, error: null });
    } catch (error) {
      if (now.key === key) setState((before) => ({ data: before.data, error }));
    }
  }, 2_000, key);
  useEffect(() => {
    Object.assign(now, { key, pages: 1 });
    setState({ data: null, error: null });
    soon.now();
    return () => (now.key = null);
  }, [key]);
  // An answer that the dispatcher did not give is asked for again when it is back.
  now.hasError = state.error;
  useEffect(() => facts.follow(({ back }) => back && now.hasError && soon.now()), []);
  async function more() {
    try {
      const second = await get(path, { ...params, cursor: state.data.next });
      now.pages++;
      setState({ data: joined(state.data, second), error: null });
    } catch (error) {
      setState({ data: state.data, error });
    }
  }
  return { ...state, ask: soon.now, soon, more };
}

/** Ask again when jobs change, and, for hosts, from time to time. */
function useChanges(soon, every) {
  useLive("counts", "", { counts: soon, refresh: soon });
  useEffect(() => {
    const timer = every && setInterval(() => document.hidden || soon(), every);
    return () => clearInterval(timer);
  }, []);
}

/** A page: its title, `head` beside it, `tools` below, and `children(data)` when the answer is there. `back`: [path, name]. */
function Page({ title, kind, back, head, tools, answer: { data, error, ask }, fault, children }) {
  useEffect(() => void setTitle(title), [title]);
  return html`<div class="page">
    ${back && html`<p class="back"><a href=${link(back[0])}><${Icon} name="left" size=${12} />${back[1]}</a></p>`}
    <div class="page-head"><h1 class=${kind}>${title}</h1>${head}</div>
    ${tools}
    ${error && (fault || html`<${Fault} error=${error} retry=${error.status === 404 ? undefined : ask} />`)}
    ${data ? children(data) : !error && html`<${Loading} />`}
  </div>`;
}

/** States to choose from, and a field that searches names. */
function Narrow({ path, query, states, find }) {
  const [q, chosen] = [query.get("q") || "", query.get("state") || ""];
  return html`<${Choose} label="Filter by state" links=${["", ...states].map((state) => [link(path, { q, state }), state || "all", state === chosen])} />
    <form onSubmit=${(event) => { event.preventDefault(); navigate(link(path, { state: chosen, q: event.target.elements[0].value.trim() })); }}>
      <input type="search" aria-label=${find} placeholder=${find} defaultValue=${q} maxlength="200" /></form>`;
}

/**
 * A table. `columns`: [heading, draws the cell, class of the cells]; in narrow windows the class "named" puts the heading
 * before a cell. Without rows, `none` stands in its place: [title, what to do, example], or `nothing` if something was
 * `chosen` at `path`.
 */
function Table({ columns, rows, chosen, path, nothing, none, foot, next, more }) {
  if (!rows.length && !next)
    return html`<${Empty} title=${chosen ? nothing : none[0]}>${chosen ? html`<p><${Clear} path=${path} /></p>` : html`<p>${none[1]}</p>${none[2] && html`<${Example}>${none[2]}<//>`}`}<//>`;
  const isNumber = (kind) => (/num/.test(kind) ? "num" : "");
  return html`<div class="card table-scroll"><table class="plain">
    <thead><tr>${columns.map(([heading, , kind = ""]) => html`<th key=${heading} class=${isNumber(kind)}>${/act/.test(kind) ? html`<span class="hidden">${heading}</span>` : heading}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr key=${row.id ?? row.seq ?? row.name}>${columns.map(([heading, draw, kind = ""]) => html`<td key=${heading} class=${kind} data-name=${/named/.test(kind) ? heading : undefined}>${draw(row)}</td>`)}</tr>`)}</tbody>
  </table></div>
  <p class="row-of">${foot}${next && html`<${Button} onClick=${more}>Show more<//>`}</p>`;
}

/** A bar and the numbers: how much of a limit is in use. */
function Use({ running, limit }) {
  const share = limit ? Math.min(1, running / limit) : 0;
  return html`<span class="use"><span class="meter" aria-hidden="true"><i class=${share >= 1 ? "full" : ""} style=${{ width: share * 100 + "%" }} /></span><span class="num">${count(running)}${limit ? " / " + count(limit) : ""}</span></span>`;
}

/** How many jobs, and a link to them; `word` stands for a number that is shown already. */
const jobsLink = (params, word) => html`<a href=${link("/jobs", params)}>${word}</a>`;
const waiting = (number, params) => (number ? jobsLink({ ...params, state: "queued" }, count(number)) : html`<span class="dim">0</span>`);
const shown = (number, params) => number > 0 && html` ${jobsLink(params, "Show")}`;

// --- queues ----------------------------------------------------------------------------------------------------------

function QueueState({ queue }) {
  if (queue.queued && queue.running >= queue.concurrency) return html`<span class="tag warn">full</span>`;
  return queue.running || queue.queued ? html`<span class="tag run">busy</span>` : html`<span class="dim">idle</span>`;
}

const NO_QUEUE = ["No queues yet", "A queue begins with the first job that names it, for example:", `harp call web01 restart nginx --queue '{"service": "nginx"}' --concurrency 2`];

export function QueuesView({ query }) {
  const filter = { q: query.get("q"), state: query.get("state") };
  const answer = useAnswer("/queues", { ...filter, limit: 200, payloads: "text" }, "queues");
  const now = useNow();
  useChanges(answer.soon);
  return html`<${Page} title="Queues" answer=${answer} head=${html`<${Narrow} path="/queues" query=${query} states=${["busy", "full", "idle"]} find="Find a queue" />`}>
    ${({ queues, next }) => html`<${Table} rows=${queues} chosen=${filter.q || filter.state} path="/queues" nothing="No queue fits" none=${NO_QUEUE} next=${next} more=${answer.more} columns=${[
      ["Name", (queue) => html`<a class="mono" href=${link("/queues/" + queue.id)} title=${queueName(queue)}>${queueName(queue)}</a>`, "name"],
      ["Running / limit", (queue) => html`<${Use} running=${queue.running} limit=${queue.concurrency} />`, "named"],
      ["Waiting", (queue) => waiting(queue.queued, { queue: queue.id }), "num named"],
      ["Oldest waits", (queue) => (queue.oldest_submit ? duration(now - queue.oldest_submit) : html`<span class="dim">-</span>`), "num named"],
      ["State", (queue) => html`<${QueueState} queue=${queue} />`],
      ["Jobs", (queue) => jobsLink({ queue: queue.id }, "Jobs"), "fit act"],
    ]} />`}
  <//>`;
}

export function QueueView({ id }) {
  const answer = useAnswer("/queues/" + encodeURIComponent(id), { payloads: "text" });
  const queue = answer.data;
  const now = useNow();
  useChanges(answer.soon);
  return html`<${Page} title=${queue ? queueName(queue) : visible(id)} kind="mono" back=${["/queues", "Queues"]} answer=${answer} head=${queue && html`<${QueueState} queue=${queue} />`}>
    ${() => html`<${Facts} kind="card" facts=${[
      ["Running / limit", html`<${Use} running=${queue.running} limit=${queue.concurrency} />${shown(queue.running, { queue: id, state: "running" })}`],
      ["Waiting", html`${count(queue.queued)}${shown(queue.queued, { queue: id, state: "queued" })}`],
      ["Oldest waits", queue.oldest_submit && html`${duration(now - queue.oldest_submit)} <span class="dim">(<${Time} at=${queue.oldest_submit} />)</span>`],
      ["Limit", `${count(queue.concurrency)}, as its jobs ask`],
      ["Id", html`<code>${queue.id}</code>`],
    ]} />
    <p><a class="button" href=${link("/jobs", { queue: id })}>All jobs of this queue</a></p>`}
  <//>`;
}

// --- hosts -----------------------------------------------------------------------------------------------------------

const HOST_KINDS = { up: ["returned", "good"], down: ["failed", "bad"], unknown: ["help", "dim"] };

function HostState({ host }) {
  const [icon, kind] = HOST_KINDS[host.state] || HOST_KINDS.unknown;
  return html`<span class=${"host-state " + kind}><${Icon} name=${icon} />${visible(host.state === "unknown" ? "not known yet" : host.state)}</span>${host.since && host.state !== "unknown" ? html` <span class="dim">since <${Time} at=${host.since} /></span>` : ""}`;
}

const endsSoon = ({ certificate }, now) => certificate && certificate.not_after - now < SOON;
const addressOf = (host) => visible(host.address) + (host.port ? ":" + host.port : "");

const NO_HOST = ["No hosts yet", "Add hosts to the hosts registry, one for each name:", '{"hosts": {"web01": {"host": "10.0.0.7", "port": 4306, "user": "harp", "password": "..."}}}'];

export function HostsView({ query }) {
  const filter = { q: query.get("q"), state: query.get("state") };
  const answer = useAnswer("/hosts", { ...filter, limit: 500 }, "hosts");
  const now = useNow();
  useChanges(answer.soon, HOSTS_EVERY);
  const sources = sourcesOf(answer.data?.registry);
  const head = html`<${Narrow} path="/hosts" query=${query} states=${["up", "down", "unknown"]} find="Find a host" /><span class="grow" />
    ${sources.map((source) => html`<span key=${source.name} class="dim">Registry <code title=${visible(source.name)}>${visible(source.source)}</code>${typeof source.age === "number" && ", " + `read ${age(source.age)}`}${source.rejected_lines > 0 && html`, <span class="warn">${plural(source.rejected_lines, "line")} rejected</span>`}</span>`)}`;
  return html`<${Page} title="Hosts" answer=${answer} head=${head}>
    ${({ hosts, next }) => html`${sources.filter((source) => source.error).map((source) => html`<${Strip} key=${source.name}>The hosts registry cannot be read; the dispatcher uses the one of before. ${visible(source.error)}<//>`)}
    <${Table} rows=${hosts} chosen=${filter.q || filter.state} path="/hosts" nothing="No host fits" none=${NO_HOST} next=${next} more=${answer.more} columns=${[
      ["Host", (host) => html`<a href=${hostLink(host.name)} title=${visible(host.name)}><b>${visible(host.name)}</b></a>`, "name"],
      ["State", (host) => html`<${HostState} host=${host} />${endsSoon(host, now) && html` <span class="tag warn" title=${fullTime(host.certificate.not_after)}>certificate ends soon</span>`}${host.error && html`<div class="bad two-lines" title=${visible(host.error)}>${visible(host.error)}</div>`}`],
      ["Running / limit", (host) => html`<${Use} running=${host.running} limit=${host.limit} />`, "named"],
      ["Waiting", (host) => waiting(host.queued, { host: host.name }), "num named"],
      ["Last contact", (host) => (host.contact ? html`<span title=${fullTime(host.contact)}>${age(now - host.contact)}</span>` : "-"), "dim named"],
      ["Address", addressOf, "mono dim fit named"],
      ["Jobs", (host) => jobsLink({ host: host.name }, "Jobs"), "fit act"],
    ]} />`}
  <//>`;
}

export function HostView({ id }) {
  const answer = useAnswer("/hosts/" + encodeURIComponent(id));
  const host = answer.data;
  const now = useNow();
  useChanges(answer.soon, HOSTS_EVERY);
  return html`<${Page} title=${visible(id)} back=${["/hosts", "Hosts"]} answer=${answer} head=${host && html`<${HostState} host=${host} />`}>
    ${() => html`${host.error && html`<${Strip}>${visible(host.error)}<//>`}
    <${Facts} kind="card" facts=${[
      ["Address", html`<code>${addressOf(host)}</code>`],
      ["Running / limit", html`<${Use} running=${host.running} limit=${host.limit} />${shown(host.running, { host: id, state: "running" })}`],
      ["Waiting", html`${count(host.queued)}${shown(host.queued, { host: id, state: "queued" })}`],
      ["Last contact", host.contact && html`<${Time} at=${host.contact} /> <span class="dim">(${age(now - host.contact)})</span>`],
      ["Round trip", host.rtt && html`${duration(host.rtt)} <span class="dim">to the latest heartbeat</span>`],
      ["Clock", (Math.abs(host.clock_skew) >= 1 || null) && html`<span class="warn">${duration(Math.abs(host.clock_skew))} ${host.clock_skew > 0 ? "ahead" : "behind"}</span>`],
      ["Certificate valid until", host.certificate && html`<span class=${endsSoon(host, now) ? "warn" : ""}><${Time} at=${host.certificate.not_after} /></span>`],
      ["Version of harpd", host.daemon?.version],
      ["Calls without contact", host.outages > 0 && html`<span class="warn">${count(host.outages)}</span>`],
      ["Next attempt", host.next_attempt && html`<${Time} at=${host.next_attempt} />`],
      ["Calls survive a lost connection", host.daemon && (host.daemon.keeps_calls ? "yes" : "no: this harpd is of the legacy kind")],
      ["Instance id", host.daemon?.instance && html`<code>${visible(host.daemon.instance)}</code>`],
      ["Features", host.daemon?.features?.join(", ")],
      ["Setting", host.source && html`<code>${visible(host.source)}</code>`],
      ["Last error", host.last_error && html`<${Time} at=${host.last_error.at} /> ${visible(host.last_error.text)}`],
    ]} />
    <p class="row-of"><a class="button" href=${link("/jobs", { host: id })}>All jobs on this host</a><a class="button" href=${link("/jobs", { host: id, state: "bad" })}>Failed or raised</a></p>`}
  <//>`;
}

// --- the audit file: who has done what, newest first, and whether its chain of hashes is whole --------------------------

const FIELDS = { principal: "Principal", action: "Action", decision: "Decision", host: "Host", job: "Job", from: "When" };
const DECISIONS = { allowed: "allowed", denied: "denied", failed: "failed" };

// Members that have a column; all others are shown as they are.
const SHOWN = ["seq", "at", "principal", "action", "decision", "rule", "procedure", "host", "job", "peer", "listener"];
const detailsOf = (entry) => Object.entries(entry).filter(([name, value]) => !SHOWN.includes(name) && value !== null && value !== "").map(([name, value]) => visible(`${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`)).join(" · ");

export function AuditView({ query }) {
  const filter = Object.fromEntries([...Object.keys(FIELDS), "to"].map((name) => [name, query.get(name)]));
  const answer = useAnswer("/audit", filter, "entries");
  const { data, error, ask, more } = answer;
  const only = (name, value) => html`<a href=${link("/audit", { ...filter, [name]: value })}>${visible(value)}</a>`;
  function submit(event) {
    event.preventDefault();
    navigate(link("/audit", [...new FormData(event.target)].map(([name, value]) => [name, value.trim()])));
  }
  const choices = { decision: ["any", DECISIONS], from: ["any time", { "-1h": "last hour", "-1d": "last 24 hours", "-7d": "last 7 days" }] };
  const field = ([name, label]) => html`<label key=${name}>${label}${choices[name]
    ? html`<select name=${name}><option value="">${choices[name][0]}</option>${Object.entries(choices[name][1]).map(([value, word]) => html`<option key=${value} value=${value} selected=${filter[name] === value}>${word}</option>`)}</select>`
    : html`<input type="text" name=${name} defaultValue=${filter[name] || ""} maxlength="255" />`}</label>`;
  const chosen = Object.values(filter).some(Boolean);
  const chain = data?.chain;
  const head = html`${chain && html`<span class=${"tag " + (chain.ok ? "good" : "bad")}><${Icon} name=${chain.ok ? "returned" : "warning"} size=${12} />${chain.ok ? "chain whole" : "chain broken"}</span>${chain.problem && html`<span class="bad">${visible(chain.problem)}</span>`}${chain.head && html`<code class="dim" title=${visible(chain.head)}>${visible(chain.head).slice(0, 12)}</code>`}`}
    <span class="grow" /><${Button} onClick=${ask}>Read again<//>`;
  const noFile = error?.status === 404 && html`<${Empty} title="The dispatcher keeps no audit file"><p>Set audit_file in the dispatcher's configuration, for example:</p><${Example}>audit_file = "/var/log/harpcaller/audit.jsonl"<//><//>`;
  const form = html`<form class="filter-row" onSubmit=${submit} key=${JSON.stringify(filter)}>
    ${Object.entries(FIELDS).map(field)}<button class="button primary">Filter</button>${chosen && html`<${Clear} path="/audit" />`}
  </form>`;
  return html`<${Page} title="Audit" answer=${answer} head=${head} tools=${!noFile && form} fault=${noFile}>
    ${({ entries, next }) => html`<${Table} rows=${entries} chosen=${chosen} path="/audit" nothing="No entry fits" none=${["No entries yet", "The audit file records each action that the access rules decide."]} next=${next} more=${more}
      foot=${html`<span class="dim">${count(entries.length)} ${entries.length === 1 ? "entry" : "entries"}</span>${next ? data.searched_to && html`<span class="dim">Searched back to <${Time} at=${data.searched_to} />.</span>` : data.omitted_files > 0 && html`<span class="dim">Older entries are in ${data.omitted_files} compressed files; harpcallerd audit search reads them.</span>`}`} columns=${[
      ["Time", (entry) => html`<${Time} at=${entry.at} />`, "fit"],
      ["Principal", (entry) => entry.principal && only("principal", entry.principal)],
      ["Action", (entry) => only("action", entry.action), "fit"],
      ["What", (entry) => html`${entry.procedure && html`<b>${visible(entry.procedure)}</b> `}${entry.host && html`<span>on ${visible(entry.host)}</span> `}${entry.job && html`<a class="mono" href=${jobLink(entry.job)}>${entry.job.slice(0, 8)}</a> `}<span class="dim">${detailsOf(entry)}</span>`, "any"],
      ["Decision", (entry) => html`<span class=${["denied", "failed"].includes(entry.decision) ? "tag bad" : "dim"}>${DECISIONS[entry.decision] || visible(entry.decision)}</span>${(entry.rule ?? null) !== null && html` <span class="dim">rule ${visible(entry.rule)}</span>`}`, "fit"],
      ["From", (entry) => [entry.peer, entry.listener].filter(Boolean).map(visible).join(" · "), "dim"],
    ]} />`}
  <//>`;
}

// --- sessions: who is logged in to the console, where and until when; each can be ended ---------------------------------

export function SessionsView() {
  const answer = useAnswer("/sessions", {}, "sessions");
  const now = useNow();
  async function end(session) {
    try {
      await del("/sessions/" + encodeURIComponent(session.id));
      notify("The session has ended.");
    } catch (fault) {
      notify(fault.detail || fault.message, "bad");
    }
    answer.ask();
  }
  return html`<${Page} title="Sessions" answer=${answer}>
    ${({ sessions }) => html`<${Table} rows=${sessions} columns=${[
      ["Who", (session) => html`<b>${visible(session.principal)}</b> <span class="dim">${visible((session.roles || []).join(", "))}</span> ${session.current && html`<span class="tag run">this one</span>`}`],
      ["From", (session) => html`${visible(session.address)} <span class="dim">${visible(session.agent)}</span>`],
      ["Logged in", (session) => html`<${Time} at=${session.created} />`, "fit named"],
      ["Last seen", (session) => session.seen && age(now - session.seen), "fit named"],
      ["Until", (session) => html`<${Time} at=${session.expires} />`, "fit named"],
      ["End", (session) => html`<${Button} kind="small" onClick=${() => end(session)}>End<//>`, "fit act"],
    ]} />`}
  <//>`;
}
