// Hosts: which are up, what runs there, and what the dispatcher knows about their harpd.
import { useLive } from "./live.mjs";
import { Use } from "./queues.mjs";
import { link, navigate } from "./router.mjs";
import { sourcesOf } from "./rows.mjs";
import { useAnswer, useRepeat } from "./tables.mjs";
import { age, Button, count, duration, Empty, Fault, fullTime, html, Icon, Loading, setTitle, Time, useEffect, useNow, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.hosts;
const SOON = 14 * 86400; // seconds before the end of a certificate, as the alert has it
const KINDS = { up: ["ok", "good"], down: ["failed", "bad"], unknown: ["help", "dim"] };

function HostState({ host }) {
  const [icon, kind] = KINDS[host.state] || KINDS.unknown;
  return html`<span class=${"host-state " + kind}><${Icon} name=${icon} />${text.states[host.state] || visible(host.state)}</span>${host.since && host.state !== "unknown" ? html` <span class="dim">${text.since} <${Time} at=${host.since} /></span>` : ""}${host.paused && html` <span class="tag warn"><${Icon} name="pause" size=${12} />${text.paused}</span>`}`;
}

export function HostsView({ query }) {
  const filter = { q: query.get("q"), state: query.get("state"), limit: 500 };
  const { data, error, ask, soon, more } = useAnswer("/hosts", filter, "hosts");
  const now = useNow();
  useEffect(() => setTitle(words.views.hosts), []);
  useLive("counts", "", { counts: soon, refresh: soon });
  useRepeat(soon);
  const chosen = query.get("state") || "";
  const sources = sourcesOf(data?.registry);
  return html`<div class="page">
    <div class="page-head"><h1>${words.views.hosts}</h1>
      <nav class="choose" aria-label=${text.filter}>${["", "up", "down", "unknown"].map((state) => html`<a key=${state} href=${link("/hosts", { q: filter.q, state })} aria-current=${chosen === state ? "true" : undefined}>${state ? text.states[state] : words.queues.all}</a>`)}</nav>
      <form onSubmit=${(event) => { event.preventDefault(); navigate(link("/hosts", { state: chosen, q: event.target.elements[0].value.trim() })); }}>
        <input type="search" aria-label=${text.find} placeholder=${text.find} defaultValue=${filter.q || ""} maxlength="200" /></form>
      <span class="grow" />
      ${sources.map((source) => html`<span key=${source.name} class="dim">${text.registry} <code title=${visible(source.name)}>${visible(source.source)}</code>${source.age !== null && source.age !== undefined ? html`, ${text.read(age(source.age))}` : ""}${source.rejected_lines ? html`, <span class="warn">${text.skipped(source.rejected_lines)}</span>` : ""}</span>`)}
    </div>
    ${sources.filter((source) => source.error).map((source) => html`<div key=${source.name} class="strip bad" role="alert"><${Icon} name="warning" />${text.registryError} ${visible(source.error)}</div>`)}
    ${error && html`<${Fault} error=${error} retry=${ask} />`}
    ${!data ? !error && html`<${Loading} />` : data.hosts.length === 0 && !data.next
      ? html`<${Empty} title=${filter.q || chosen ? text.nothing : text.none}>${filter.q || chosen ? html`<p><a href=${link("/hosts")}>${words.jobs.clear}</a></p>` : html`<p>${text.noneDetail}</p><pre><code>${text.example}</code></pre>`}</${Empty}>`
      : html`<div class="card table-scroll"><table class="plain">
        <thead><tr><th>${text.columns.name}</th><th>${text.columns.state}</th><th>${text.columns.running}</th><th class="num">${text.columns.waiting}</th><th>${text.columns.contact}</th><th>${text.columns.address}</th><th><span class="hidden">${words.queues.columns.jobs}</span></th></tr></thead>
        <tbody>${data.hosts.map((host) => html`<tr key=${host.name}>
          <td class="name"><a href=${link("/hosts/" + encodeURIComponent(host.name))}><b>${visible(host.name)}</b></a></td>
          <td><${HostState} host=${host} />${host.certificate && host.certificate.not_after - now < SOON ? html` <span class="tag warn" title=${fullTime(host.certificate.not_after)}>${text.certificateEnds}</span>` : ""}${host.error && html`<div class="bad small cut" title=${visible(host.error)}>${visible(host.error)}</div>`}</td>
          <td data-name=${text.columns.running}><${Use} running=${host.running} limit=${host.limit} /></td>
          <td class="num" data-name=${text.columns.waiting}>${host.queued ? html`<a href=${link("/jobs", { host: host.name, state: "queued" })}>${count(host.queued)}</a>` : html`<span class="dim">0</span>`}</td>
          <td class="dim" data-name=${text.columns.contact}>${host.contact ? html`<span title=${fullTime(host.contact)}>${age(now - host.contact)}</span>` : "-"}</td>
          <td class="mono dim" data-name=${text.columns.address}>${visible(host.address)}${host.port ? ":" + host.port : ""}</td>
          <td class="fit"><a href=${link("/jobs", { host: host.name })}>${words.queues.jobs}</a></td>
        </tr>`)}</tbody></table></div>
        ${data.next && html`<p><${Button} onClick=${more}>${words.more}</${Button}></p>`}`}
  </div>`;
}

export function HostView({ id }) {
  const { data: host, error, ask, soon } = useAnswer("/hosts/" + encodeURIComponent(id));
  const now = useNow();
  useEffect(() => setTitle(visible(id)), [id]);
  useLive("counts", "", { counts: soon, refresh: soon });
  useRepeat(soon);
  const jobs = (state) => link("/jobs", { host: id, state });
  const fact = (name, value) => value !== null && value !== undefined && value !== "" && value !== false && html`<dt>${name}</dt><dd>${value}</dd>`;
  return html`<div class="page">
    <p class="back"><a href=${link("/hosts")}><${Icon} name="left" size=${12} />${words.views.hosts}</a></p>
    ${error && html`<${Fault} error=${error} retry=${error.status === 404 ? undefined : ask} />`}
    ${!host ? !error && html`<${Loading} />` : html`
      <div class="page-head"><h1>${visible(host.name)}</h1><${HostState} host=${host} /></div>
      ${host.error && html`<p class="strip bad"><${Icon} name="warning" />${visible(host.error)}</p>`}
      <dl class="fact-list card">
        ${fact(text.columns.address, html`<code>${visible(host.address)}${host.port ? ":" + host.port : ""}</code>`)}
        ${fact(text.columns.running, html`<${Use} running=${host.running} limit=${host.limit} /> ${host.running > 0 && html`<a href=${jobs("running")}>${words.queues.show}</a>`}`)}
        ${fact(text.columns.waiting, html`${count(host.queued)} ${host.queued > 0 && html`<a href=${jobs("queued")}>${words.queues.show}</a>`}`)}
        ${fact(text.columns.contact, host.contact && html`<${Time} at=${host.contact} /> <span class="dim">(${age(now - host.contact)})</span>`)}
        ${fact(text.roundTrip, host.rtt !== null && html`${duration(host.rtt)} <span class="dim">${text.roundTripDetail}</span>`)}
        ${fact(text.certificate, host.certificate && html`<span class=${host.certificate.not_after - now < SOON ? "warn" : ""}><${Time} at=${host.certificate.not_after} /></span>`)}
        ${fact(text.version, host.daemon?.version && visible(host.daemon.version))}
        ${fact(text.outages, host.outages > 0 && html`<span class="warn">${count(host.outages)}</span>`)}
        ${fact(text.nextAttempt, host.next_attempt && html`<${Time} at=${host.next_attempt} />`)}
        ${fact(text.keepsCalls, host.daemon && (host.daemon.keeps_calls ? text.yes : text.no))}
        ${fact(text.instance, host.daemon?.instance && html`<code>${visible(host.daemon.instance)}</code>`)}
        ${fact(text.features, host.daemon?.features?.length > 0 && visible(host.daemon.features.join(", ")))}
        ${fact(text.source, host.source && html`<code>${visible(host.source)}</code>`)}
        ${fact(text.lastError, host.last_error && html`<${Time} at=${host.last_error.at} /> ${visible(host.last_error.text)}`)}
      </dl>
      <p class="row-of"><a class="button" href=${jobs()}>${text.allJobs}</a><a class="button" href=${jobs("bad")}>${text.badJobs}</a></p>`}
  </div>`;
}
