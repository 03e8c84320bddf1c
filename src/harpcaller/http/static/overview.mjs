// What is going on, what is wrong, and where it goes wrong: each number is a link to the jobs that it counts.
import { get } from "./api.mjs";
import { callOf, sourcesOf } from "./rows.mjs";
import { useLive } from "./live.mjs";
import { link, navigate } from "./router.mjs";
import { count, Fault, fullTime, html, Icon, Loading, queueName, setTitle, State, STATES, Time, useEffect, useRef, useState, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.overview;
const SPANS = { "1h": ["-1h", 60], "24h": ["-24h", 3600], "7d": ["-7d", 3600] };
const ASK_EVERY = 5_000;
const SERIES = ["returned", "cancelled", "raised", "failed"];   // from the ground up: what is wrong stands on top

/** Bars of the ends in each step of time. Each bar is a link to its jobs; the table below says the same in words. */
function Bars({ stats, step }) {
  const most = Math.max(4, ...stats.buckets.map((bucket) => SERIES.reduce((sum, name) => sum + bucket[name], 0)));
  const [width, height] = [720, 112];
  const each = width / stats.buckets.length;
  const jobs = (bucket) => link("/jobs", { ended_from: String(bucket.at), ended_to: String(bucket.at + step) });
  const said = (bucket) => `${fullTime(bucket.at).slice(0, 16)}: ` + SERIES.filter((name) => bucket[name]).map((name) => `${count(bucket[name])} ${words.states[name]}`).join(", ");
  return html`<div class="bars">
    <span class="most" aria-hidden="true">${count(most)}</span>
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${text.barsLabel}>
      <line x1="0" x2=${width} y1=".5" y2=".5" /><line x1="0" x2=${width} y1=${height / 2} y2=${height / 2} /><line class="ground" x1="0" x2=${width} y1=${height - 0.5} y2=${height - 0.5} />
      ${stats.buckets.map((bucket, place) => {
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
    <div class="scale dim" aria-hidden="true"><${Time} at=${stats.buckets[0]?.at} /><span>${words.now}</span></div>
    <div class="hidden"><table><caption>${text.barsLabel}</caption><tbody>${stats.buckets.filter((bucket) => SERIES.some((name) => bucket[name])).map((bucket) => html`<tr key=${bucket.at}><td><a href=${jobs(bucket)} tabindex="-1">${said(bucket)}</a></td></tr>`)}</tbody></table></div>
  </div>`;
}

function Wrong({ icon = "warning", kind, href, children }) {
  return html`<li class=${kind}><a href=${href}><${Icon} name=${icon} /><span>${children}</span><${Icon} name="right" size=${12} /></a></li>`;
}

function Breakdown({ title, values, href, name }) {
  const most = Math.max(1, ...values.map((entry) => entry.count));
  return html`<section class="card"><h2>${title}</h2>
    ${values.length === 0 ? html`<p class="dim calm"><${Icon} name="ok" /> ${text.none}</p>` : html`<ul class="breakdown">${values.slice(0, 8).map((entry) => html`<li key=${entry.value}><a href=${href(entry.value)}>
      <span class="value" title=${visible(entry.value)}>${visible(entry.value)}</span>
      <span class="meter" aria-hidden="true"><i style=${{ width: (entry.count / most) * 100 + "%" }} /></span>
      <span class="num">${entry.more ? ">" : ""}${count(entry.count)}</span></a></li>`)}</ul>`}
  </section>`;
}

export function OverviewView({ query, me }) {
  const span = SPANS[query.get("span")] ? query.get("span") : "1h";
  const [from, step] = SPANS[span];
  const [data, setData] = useState(null);
  const [error, setError] = useState(null);
  const asking = useRef({ timer: 0, at: 0 }).current;
  async function ask() {
    asking.timer = 0;
    asking.at = Date.now();
    const mine = span;
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
      if (asking.span !== mine) return;
      setData({ now: now.by.state, bad: bad.by, slots: slots.by.state, stats, hosts, queues, recent: recent.jobs });
      setError(null);
    } catch (fault) {
      setError(fault);
    }
  }
  const soon = () => asking.timer || (asking.timer = setTimeout(ask, Math.max(0, asking.at + ASK_EVERY - Date.now())));
  useEffect(() => {
    asking.span = span;
    setTitle(words.views.overview);
    ask();
    const timer = setInterval(() => document.hidden || soon(), 10_000);   // hosts and bars change without any job
    return () => {
      clearInterval(timer);
      clearTimeout(asking.timer);
      asking.timer = 0;
    };
  }, [span]);
  useLive("counts", "", {
    counts({ by }) {
      setData((before) => before && { ...before, now: by.state });
      soon();
    },
    refresh: soon,
  });
  if (!data) return html`<div class="page">${error ? html`<${Fault} error=${error} retry=${ask} />` : html`<${Loading} lines=${10} />`}</div>`;

  const here = new Map(data.now.map((entry) => [entry.value, entry]));
  const hosts = data.hosts?.hosts || [];
  const faults = sourcesOf(data.hosts?.registry).map((source) => source.error).filter(Boolean);
  const queues = data.queues?.queues || [];
  const down = hosts.filter((host) => host.state === "down");
  const full = queues.filter((queue) => queue.queued > 0 && !queue.paused && queue.running >= (queue.set?.concurrency ?? queue.concurrency));
  const paused = queues.filter((queue) => queue.paused);
  const stuck = data.slots.filter((entry) => entry.value !== "queued" && entry.value !== "running").reduce((sum, entry) => sum + entry.count, 0);
  const badNow = data.bad.state.filter((entry) => entry.value === "failed" || entry.value === "raised").reduce((sum, entry) => sum + entry.count, 0);
  const badFilter = (name, value) => link("/jobs", { state: "bad", ended_from: from, [name]: value });
  return html`<div class="page overview">
    <h1 class="hidden">${words.views.overview}</h1>
    ${error && html`<div class="strip bad" role="alert"><${Icon} name="warning" /> ${error.detail || words.fault.awayDetail}</div>`}
    <ul class="tiles" aria-label=${text.now}>${STATES.map((state) => {
      const entry = here.get(state);
      return html`<li key=${state} class=${entry?.count ? "" : "zero"}><a href=${link("/jobs", { state })}><${State} state=${state} /><strong>${entry?.more ? ">" : ""}${count(entry?.count ?? 0)}</strong></a></li>`;
    })}</ul>
    <section class="card attention"><h2>${text.wrongTitle}</h2>
      <ul class="wrong">
        ${faults.map((fault) => html`<${Wrong} key=${fault} kind="bad" href=${link("/hosts")}>${text.registry(visible(fault))}</${Wrong}>`)}
        ${down.slice(0, 5).map((host) => html`<${Wrong} key=${host.name} kind="bad" href=${link("/hosts/" + encodeURIComponent(host.name))}><b>${visible(host.name)}</b> ${text.hostDown} ${host.since && html`<${Time} at=${host.since} />`}${host.queued ? " · " + text.waiting(count(host.queued)) : ""}${host.error && html` <span class="dim">${visible(host.error)}</span>`}</${Wrong}>`)}
        ${down.length > 5 && html`<${Wrong} kind="bad" href=${link("/hosts", { state: "down" })}>${text.moreHosts(down.length - 5)}</${Wrong}>`}
        ${stuck > 0 && html`<${Wrong} kind="bad" href=${link("/jobs", { state: "ended", holds_slot: 1 })}>${text.stuck(count(stuck), stuck)}</${Wrong}>`}
        ${full.slice(0, 5).map((queue) => html`<${Wrong} key=${queue.id} kind="warn" href=${link("/jobs", { queue: queue.id, state: "open" })}><code>${queueName(queue)}</code> ${text.full(count(queue.queued))}</${Wrong}>`)}
        ${paused.slice(0, 5).map((queue) => html`<${Wrong} key=${queue.id} kind="warn" icon="pause" href=${link("/queues/" + queue.id)}><code>${queueName(queue)}</code> ${text.paused(visible(queue.paused.by))}</${Wrong}>`)}
        ${badNow > 0 && html`<${Wrong} kind="warn" href=${link("/jobs", { state: "bad", ended_from: from })}>${text.badJobs(count(badNow), badNow)} ${text.spans[span]}</${Wrong}>`}
        ${!down.length && !stuck && !full.length && !paused.length && !badNow && !faults.length && html`<li class="calm good"><${Icon} name="ok" /> ${text.allWell(text.spans[span])}</li>`}
      </ul>
    </section>
    <section class="card ends">
      <div class="card-head"><h2>${text.bars}</h2>
        <span class="legend" aria-hidden="true">${[...SERIES].reverse().map((name) => html`<span key=${name}><i class=${"fill-" + name} />${words.states[name]}</span>`)}</span>
        <nav class="choose" aria-label=${text.span}>${Object.keys(SPANS).map((name) => html`<a key=${name} href=${link("/", name === "1h" ? {} : { span: name })} aria-current=${name === span ? "true" : undefined}>${text.tabs[name]}</a>`)}</nav>
      </div>
      ${data.stats.buckets.length > 0 && html`<${Bars} stats=${data.stats} step=${data.stats.step} />`}
    </section>
    <div class="thirds">
      <${Breakdown} title=${text.byType(text.spans[span])} values=${data.bad.end_type || []} href=${(value) => badFilter("end_type", value)} />
      <${Breakdown} title=${text.byProcedure(text.spans[span])} values=${data.bad.procedure || []} href=${(value) => badFilter("procedure", value)} />
      <${Breakdown} title=${text.byHost(text.spans[span])} values=${data.bad.host || []} href=${(value) => badFilter("host", value)} />
    </div>
    <section class="card"><div class="card-head"><h2>${text.recent}</h2><a href=${link("/jobs", { state: "bad" })}>${text.all}</a></div>
      ${data.recent.length === 0 ? html`<p class="dim calm"><${Icon} name="ok" /> ${text.none}</p>` : html`<div class="table-scroll"><table class="plain">
        <thead class="hidden"><tr><th>${words.jobs.columns.state}</th><th>${words.jobs.columns.job}</th><th>${words.jobs.columns.host}</th><th>${words.jobs.columns.end}</th><th>${words.jobs.columns.ended}</th></tr></thead>
        <tbody>${data.recent.map((row) => {
          const [name, args] = callOf(row);
          return html`<tr key=${row.job}><td class="fit"><${State} state=${row.state} /></td><td class="cut third"><a href=${link("/jobs/" + row.job)}><b>${name}</b></a><span class="mono dim">${args}</span></td><td class="fit">${visible(row.host)}</td>
            <td class="cut"><b class=${row.state === "failed" ? "bad" : "warn"}>${visible(row.end_type)}</b>${row.end_message ? ": " + visible(row.end_message) : ""}</td><td class="fit num"><${Time} at=${row.time.end} /></td></tr>`;
        })}</tbody></table></div>`}
    </section>
  </div>`;
}
