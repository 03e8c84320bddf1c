// What is going on, what is wrong, and where it goes wrong: each number is a link to the jobs that it counts.
import { get, useLive } from "./api.mjs";
import { callOf, count, fullTime, plural, queueName, sourcesOf, visible } from "./formats.mjs";
import { hostLink, jobLink, link, navigate } from "./router.mjs";
import { Choose, Fault, html, Icon, Loading, setTitle, State, STATES, Strip, Time, useEffect, useRef, useSoon, useState } from "./ui.mjs";

// name: [from, seconds of a bar, in a tab, in a sentence]
const SPANS = { "1h": ["-1h", 60, "1 hour", "in the last hour"], "24h": ["-24h", 3600, "24 hours", "in the last 24 hours"], "7d": ["-7d", 3600, "7 days", "in the last 7 days"] };
const BARS = "Ended jobs over time, by state";
const SERIES = ["returned", "cancelled", "raised", "failed"];   // from the ground up: what is wrong stands on top

/** Return the number of jobs in some states. */
const sumOf = (entries, states) => (entries || []).filter(({ value }) => states.includes(value)).reduce((sum, entry) => sum + entry.count, 0);
/** Return a number in words: ">10,000" where counting stopped. */
const shownCount = (entry) => (entry?.more ? ">" : "") + count(entry?.count ?? 0);
const None = () => html`<p class="dim calm"><${Icon} name="returned" /> None</p>`;

/** Bars of the ends in each step of time. Each bar is a link to its jobs; the table below says the same in words. */
function Bars({ stats: { buckets, step } }) {
  const most = Math.max(4, ...buckets.map((bucket) => SERIES.reduce((sum, name) => sum + bucket[name], 0)));
  const [width, height] = [720, 112];
  const each = width / buckets.length;
  const jobs = (bucket) => link("/jobs", { ended_from: bucket.at, ended_to: bucket.at + step });
  const said = (bucket) => `${fullTime(bucket.at).slice(0, 16)}: ` + SERIES.filter((name) => bucket[name]).map((name) => `${count(bucket[name])} ${name}`).join(", ");
  const line = (y, kind) => html`<line class=${kind} x1="0" x2=${width} y1=${y} y2=${y} />`;
  return html`<div class="bars">
    <span class="most" aria-hidden="true">${count(most)}</span>
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${BARS}>
      ${line(0.5)}${line(height / 2)}${line(height - 0.5, "ground")}
      ${buckets.map((bucket, place) => {
        let top = height;
        return html`<g key=${bucket.at} class="bar-of" onClick=${() => navigate(jobs(bucket))}>
          <title>${said(bucket)}</title>
          <rect class="back" x=${place * each} y="0" width=${each} height=${height} />
          ${SERIES.map((name) => {
            const size = (bucket[name] / most) * (height - 2);
            top -= size;
            return size > 0 && html`<rect key=${name} class=${"fill-" + name} x=${place * each + each * 0.1} y=${top} width=${each * 0.8} height=${size} />`;
          })}
        </g>`;
      })}
    </svg>
    <div class="scale dim" aria-hidden="true"><${Time} at=${buckets[0].at} /><span>now</span></div>
    <div class="hidden"><table><caption>${BARS}</caption><tbody>${buckets.filter((bucket) => SERIES.some((name) => bucket[name])).map((bucket) => html`<tr key=${bucket.at}><td><a href=${jobs(bucket)} tabindex="-1">${said(bucket)}</a></td></tr>`)}</tbody></table></div>
  </div>`;
}

const Wrong = ({ kind = "bad", href, children }) => html`<li class=${kind}><a href=${href}><${Icon} name="warning" /><span>${children}</span><${Icon} name="right" size=${12} /></a></li>`;

function Breakdown({ title, values, href }) {
  const most = Math.max(1, ...values.map((entry) => entry.count));
  return html`<section class="card"><h2>${title}</h2>
    ${values.length === 0 ? html`<${None} />` : html`<ul class="breakdown">${values.slice(0, 8).map((entry) => html`<li key=${entry.value}><a href=${href(entry.value)}>
      <span class="value" title=${visible(entry.value)}>${visible(entry.value)}</span>
      <span class="meter" aria-hidden="true"><i style=${{ width: (entry.count / most) * 100 + "%" }} /></span>
      <span class="num">${shownCount(entry)}</span></a></li>`)}</ul>`}
  </section>`;
}

export function OverviewView({ query }) {
  const span = SPANS[query.get("span")] ? query.get("span") : "24h";
  const [from, step, , spoken] = SPANS[span];
  const [data, setData] = useState(null);
  const [error, setError] = useState(null);
  const latest = useRef(span);
  latest.current = span;
  const soon = useSoon(async () => {
    // What a principal may not see is left out; the rest stays.
    const optional = (request) => request.catch((fault) => (fault.status === 403 || fault.status === 404 ? null : Promise.reject(fault)));
    try {
      const [now, bad, slots, stats, hosts, queues, recent] = await Promise.all([
        get("/jobs/counts", { by: "state" }),
        get("/jobs/counts", { by: "end_type,procedure,host,state", state: "bad", ended_from: from }),
        get("/jobs/counts", { by: "state", state: "ended", holds_slot: 1 }),
        get("/jobs/stats", { from, step }),
        optional(get("/hosts", { limit: 500 })),
        optional(get("/queues", { limit: 500, payloads: "text" })),
        get("/jobs", { state: "bad", limit: 8, payloads: "text" }),
      ]);
      if (latest.current !== span) return;
      setData({ now: now.by.state, bad: bad.by, slots: slots.by.state, stats, hosts, queues: queues?.queues || [], recent: recent.jobs });
      setError(null);
    } catch (fault) {
      setError(fault);
    }
  }, 5_000, span);
  useEffect(() => {
    setTitle("Overview");
    soon.now();
    const timer = setInterval(() => document.hidden || soon(), 10_000);   // hosts and bars change without any job
    return () => clearInterval(timer);
  }, [span]);
  useLive("counts", "", {
    counts({ by }) {
      setData((before) => before && { ...before, now: by.state });
      soon();
    },
    refresh: soon,
  });
  if (!data) return html`<div class="page"><h1 class="hidden">Overview</h1>${error ? html`<${Fault} error=${error} retry=${soon.now} />` : html`<${Loading} lines=${10} />`}</div>`;

  const faults = sourcesOf(data.hosts?.registry).map((source) => source.error).filter(Boolean);
  const down = (data.hosts?.hosts || []).filter((host) => host.state === "down");
  const full = data.queues.filter((queue) => queue.queued > 0 && queue.running >= queue.concurrency);
  const stuck = sumOf(data.slots, SERIES);
  const bad = sumOf(data.bad.state, ["failed", "raised"]);
  const badLink = (filter) => link("/jobs", { state: "bad", ended_from: from, ...filter });
  const breakdown = (title, name) => html`<${Breakdown} title=${title} values=${data.bad[name] || []} href=${(value) => badLink({ [name]: value })} />`;
  return html`<div class="page overview">
    <h1 class="hidden">Overview</h1>
    ${error && html`<${Strip}>${error.detail || error.message}<//>`}
    <ul class="tiles" aria-label="Jobs by state now">${Object.keys(STATES).map((state) => {
      const entry = data.now.find(({ value }) => value === state);
      return html`<li key=${state} class=${entry?.count ? "" : "zero"}><a href=${link("/jobs", { state })}><${State} state=${state} /><strong>${shownCount(entry)}</strong></a></li>`;
    })}</ul>
    <section class="card attention"><h2>What needs attention</h2>
      <ul class="wrong">
        ${faults.map((fault) => html`<${Wrong} key=${fault} href=${link("/hosts")}>The hosts registry cannot be read: ${visible(fault)}<//>`)}
        ${down.slice(0, 5).map((host) => html`<${Wrong} key=${host.name} href=${hostLink(host.name)}><b>${visible(host.name)}</b> is down since ${host.since && html`<${Time} at=${host.since} />`}${host.queued ? " · " + `${count(host.queued)} waiting` : ""}${host.error && html` <span class="dim">${visible(host.error)}</span>`}<//>`)}
        ${down.length > 5 && html`<${Wrong} href=${link("/hosts", { state: "down" })}>${down.length - 5} more hosts are down<//>`}
        ${stuck > 0 && html`<${Wrong} href=${link("/jobs", { state: "ended", holds_slot: 1 })}>${plural(stuck, "ended job")} still ${stuck === 1 ? "holds its slot" : "hold their slots"}<//>`}
        ${full.slice(0, 5).map((queue) => html`<${Wrong} key=${queue.id} kind="warn" href=${link("/jobs", { queue: queue.id, state: "open" })}>${count(queue.queued)} waiting for the full queue <code>${queueName(queue)}</code><//>`)}
        ${bad > 0 && html`<${Wrong} kind="warn" href=${badLink()}>${(data.bad.state || []).some((entry) => entry.more) ? "More than " : ""}${plural(bad, "job")} failed or raised ${spoken}<//>`}
        ${!faults.length && !down.length && !stuck && !full.length && !bad && html`<li class="calm good"><${Icon} name="returned" /> Nothing: all known hosts are up, no queue is full, and no job failed ${spoken}.</li>`}
      </ul>
    </section>
    <section class="card ends">
      <div class="card-head"><h2>Ended jobs</h2>
        <span class="legend">${[...SERIES].reverse().map((name) => html`<span key=${name} title=${STATES[name]}><i class=${"fill-" + name} />${name}</span>`)}</span>
        <${Choose} label="Time span" links=${Object.keys(SPANS).map((name) => [link("/", { span: name === "24h" ? "" : name }), SPANS[name][2], name === span])} />
      </div>
      ${data.stats.buckets.length > 0 && html`<${Bars} stats=${data.stats} />`}
    </section>
    <div class="thirds">${breakdown(`Errors ${spoken}`, "end_type")}${breakdown(`Failed or raised ${spoken}, by procedure`, "procedure")}${breakdown(`Failed or raised ${spoken}, by host`, "host")}</div>
    <section class="card"><div class="card-head"><h2>Latest failed or raised jobs</h2><a href=${link("/jobs", { state: "bad" })}>Show all</a></div>
      ${data.recent.length === 0 ? html`<${None} />` : html`<div class="table-scroll"><table class="plain">
        <thead class="hidden"><tr><th>State</th><th>Job</th><th>Host</th><th>Reason</th><th>Ended</th></tr></thead>
        <tbody>${data.recent.map((row) => {
          const [name, args] = callOf(row.procedure, row.arguments_preview);
          return html`<tr key=${row.job}><td class="fit"><${State} state=${row.state} /></td><td class="cut third"><a href=${jobLink(row.job)}><b>${name}</b></a><span class="mono dim">${args}</span></td><td class="fit">${visible(row.host)}</td>
            <td class="cut"><b class=${row.state === "failed" ? "bad" : "warn"}>${visible(row.end_type)}</b>${row.end_message ? ": " + visible(row.end_message) : ""}</td><td class="fit num"><${Time} at=${row.time.end} /></td></tr>`;
        })}</tbody></table></div>`}
    </section>
  </div>`;
}
