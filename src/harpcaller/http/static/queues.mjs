// Queues: how many run, how many wait and for how long, and what holds them.
import { useLive } from "./live.mjs";
import { link, navigate } from "./router.mjs";
import { useAnswer } from "./tables.mjs";
import { Button, count, duration, Empty, Fault, html, Icon, Loading, queueName, setTitle, Time, useEffect, useNow, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.queues;
const limitOf = (queue) => queue.set?.concurrency ?? queue.concurrency;

/** A bar and the numbers: how much of a limit is in use. */
export function Use({ running, limit }) {
  const share = limit ? Math.min(1, running / limit) : 0;
  return html`<span class="use"><span class="meter" aria-hidden="true"><i class=${share >= 1 ? "full" : ""} style=${{ width: share * 100 + "%" }} /></span><span class="num">${count(running)}${limit ? " / " + count(limit) : ""}</span></span>`;
}

function QueueState({ queue }) {
  if (queue.paused) return html`<span class="tag warn"><${Icon} name="pause" size=${12} />${text.pausedBy(visible(queue.paused.by))}</span>${queue.paused.note && html` <span class="dim">${visible(queue.paused.note)}</span>`}`;
  if (queue.queued && queue.running >= limitOf(queue)) return html`<span class="tag warn">${text.states.full}</span>`;
  if (queue.running || queue.queued) return html`<span class="tag run">${text.states.busy}</span>`;
  return html`<span class="dim">${text.states.idle}</span>`;
}

export function QueuesView({ query }) {
  const filter = { q: query.get("q"), state: query.get("state"), limit: 200, payloads: "text" };
  const { data, error, ask, soon, more } = useAnswer("/queues", filter, "queues");
  const now = useNow();
  useEffect(() => setTitle(words.views.queues), []);
  useLive("counts", "", { counts: soon, refresh: soon });
  const chosen = Boolean(filter.q || filter.state);
  return html`<div class="page">
    <div class="page-head"><h1>${words.views.queues}</h1>
      <nav class="choose" aria-label=${text.filter}>${["", "busy", "full", "idle"].map((state) => html`<a key=${state} href=${link("/queues", { q: filter.q, state })} aria-current=${(filter.state || "") === state ? "true" : undefined}>${state ? text.states[state] : text.all}</a>`)}</nav>
      <form onSubmit=${(event) => { event.preventDefault(); navigate(link("/queues", { state: filter.state, q: event.target.elements[0].value.trim() })); }}>
        <input type="search" aria-label=${text.find} placeholder=${text.find} defaultValue=${filter.q || ""} maxlength="200" /></form>
    </div>
    ${error && html`<${Fault} error=${error} retry=${ask} />`}
    ${!data ? !error && html`<${Loading} />` : data.queues.length === 0
      ? html`<${Empty} title=${chosen ? text.nothing : text.none}>${chosen ? html`<p><a href=${link("/queues")}>${words.jobs.clear}</a></p>` : html`<p>${text.noneDetail}</p><pre><code>${text.example}</code></pre>`}</${Empty}>`
      : html`<div class="card table-scroll"><table class="plain">
        <thead><tr><th>${text.columns.name}</th><th>${text.columns.running}</th><th class="num">${text.columns.waiting}</th><th class="num">${text.columns.oldest}</th><th>${text.columns.state}</th><th><span class="hidden">${text.columns.jobs}</span></th></tr></thead>
        <tbody>${data.queues.map((queue) => html`<tr key=${queue.id}>
          <td class="name"><a class="mono" href=${link("/queues/" + queue.id)}>${queueName(queue)}</a></td>
          <td data-name=${text.columns.running}><${Use} running=${queue.running} limit=${limitOf(queue)} />${queue.set && html` <span class="dim">${text.set}</span>`}</td>
          <td class="num" data-name=${text.columns.waiting}>${queue.queued ? html`<a href=${link("/jobs", { queue: queue.id, state: "queued" })}>${count(queue.queued)}</a>` : html`<span class="dim">0</span>`}</td>
          <td class="num" data-name=${text.columns.oldest}>${queue.oldest_submit ? duration(now - queue.oldest_submit) : html`<span class="dim">-</span>`}</td>
          <td><${QueueState} queue=${queue} /></td>
          <td class="fit"><a href=${link("/jobs", { queue: queue.id })}>${text.jobs}</a></td>
        </tr>`)}</tbody></table></div>
        ${data.next && html`<p><${Button} onClick=${more}>${words.more}</${Button}></p>`}`}
  </div>`;
}

export function QueueView({ id }) {
  const { data: queue, error, ask, soon } = useAnswer("/queues/" + encodeURIComponent(id), { payloads: "text" });
  const now = useNow();
  useEffect(() => setTitle(queue ? queueName(queue) : words.views.queues), [queue?.name]);
  useLive("counts", "", { counts: soon, refresh: soon });
  return html`<div class="page">
    <p class="back"><a href=${link("/queues")}><${Icon} name="left" size=${12} />${words.views.queues}</a></p>
    ${error && html`<${Fault} error=${error} retry=${error.status === 404 ? undefined : ask} />`}
    ${!queue ? !error && html`<${Loading} />` : html`
      <div class="page-head"><h1 class="mono">${queueName(queue)}</h1><${QueueState} queue=${queue} /></div>
      <dl class="fact-list card">
        <dt>${text.columns.running}</dt><dd><${Use} running=${queue.running} limit=${limitOf(queue)} /> ${queue.running > 0 && html`<a href=${link("/jobs", { queue: id, state: "running" })}>${text.show}</a>`}</dd>
        <dt>${text.columns.waiting}</dt><dd>${count(queue.queued)} ${queue.queued > 0 && html`<a href=${link("/jobs", { queue: id, state: "queued" })}>${text.show}</a>`}</dd>
        <dt>${text.columns.oldest}</dt><dd>${queue.oldest_submit ? html`${duration(now - queue.oldest_submit)} <span class="dim">(<${Time} at=${queue.oldest_submit} />)</span>` : "-"}</dd>
        <dt>${text.limit}</dt><dd>${queue.set?.concurrency !== undefined && queue.set?.concurrency !== null ? text.limitSet(count(queue.set.concurrency), visible(queue.set.by)) : text.limitAsked(count(queue.concurrency))}</dd>
        <dt>${text.id}</dt><dd><code>${queue.id}</code></dd>
      </dl>
      <p><a class="button" href=${link("/jobs", { queue: id })}>${text.allJobs}</a></p>`}
  </div>`;
}
