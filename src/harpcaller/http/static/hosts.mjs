// Hosts: which are up, what runs there, and what the dispatcher knows about their harpd.
import { useLive } from "./live.mjs";
import { Use } from "./queues.mjs";
import { link, navigate } from "./router.mjs";
import { useAnswer } from "./tables.mjs";
import { age, Button, count, duration, Empty, Fault, fullTime, html, Icon, Loading, setTitle, Time, useEffect, useNow, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.hosts;
const SOON = 14 * 86400;   // a certificate that ends within this time is marked
const KINDS = { up: ["ok", "good"], down: ["failed", "bad"], refused: ["failed", "bad"], unknown: ["help", "dim"] };

function HostState({ host }) {
  const [icon, kind] = KINDS[host.state] || KINDS.unknown;
  return html`<span class=${"host-state " + kind}><${Icon} name=${icon} />${text.states[host.state] || visible(host.state)}</span>${host.since && host.state !== "unknown" ? html` <span class="dim">${text.since} <${Time} at=${host.since} /></span>` : ""}${host.paused && html` <span class="tag warn"><${Icon} name="pause" size=${12} />${text.paused}</span>`}`;
}

function Certificate({ certificate, now }) {
  if (!certificate) return html`<span class="dim">-</span>`;
  const left = certificate.not_after - now;
  const kind = left < 0 ? "bad" : left < SOON ? "warn" : "";
  return html`<span class=${kind} title=${fullTime(certificate.not_after)}>${kind && html`<${Icon} name="warning" size=${12} /> `}${left < 0 ? text.expired : text.expires(Math.floor(left / 86400))}</span>`;
}

/** Return the value that most hosts have: another one is marked. */
function usual(hosts, take) {
  const counts = new Map();
  for (const host of hosts) if (take(host)) counts.set(take(host), (counts.get(take(host)) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
}
const versionOf = (host) => host.daemon?.version;
const roundTrip = (host) => (host.rtt === null || host.rtt === undefined ? html`<span class="dim">-</span>` : duration(host.rtt));

export function HostsView({ query }) {
  const filter = { q: query.get("q"), state: query.get("state") === "differs" ? null : query.get("state"), limit: 500 };
  const differs = query.get("state") === "differs";
  const { data, error, ask, soon, more } = useAnswer("/hosts", filter, "hosts");
  const now = useNow();
  useEffect(() => setTitle(words.views.hosts), []);
  useLive("hosts", "", { host: soon, refresh: soon });
  const chosen = query.get("state") || "";
  const common = data && usual(data.hosts, versionOf);
  const other = (host) => common && versionOf(host) && versionOf(host) !== common;
  const shown = data?.hosts.filter((host) => !differs || other(host)) || [];
  const registry = data?.registry;
  // Columns of facts that the dispatcher has for no host are left out.
  const has = (take) => data?.hosts.some((host) => take(host) !== null && take(host) !== undefined);
  const [withTrip, withDaemon, withCertificate] = [has((host) => host.rtt), has(versionOf), has((host) => host.certificate)];
  return html`<div class="page">
    <div class="page-head"><h1>${words.views.hosts}</h1>
      <nav class="tabs" aria-label=${text.filter}>${["", "up", "down", "unknown", ...(withDaemon ? ["differs"] : [])].map((state) => html`<a key=${state} href=${link("/hosts", { q: filter.q, state })} aria-current=${chosen === state ? "true" : undefined}>${state ? text.states[state] : words.queues.all}</a>`)}</nav>
      <form role="search" onSubmit=${(event) => { event.preventDefault(); navigate(link("/hosts", { state: chosen, q: event.target.elements[0].value.trim() })); }}>
        <input type="search" aria-label=${text.find} placeholder=${text.find} defaultValue=${filter.q || ""} maxlength="200" /></form>
      <span class="grow" />
      ${registry && html`<span class="dim">${text.registry} <code>${visible(registry.source)}</code>${registry.refreshed ? html`, ${text.read} <span title=${fullTime(registry.refreshed)}>${age(now - registry.refreshed)}</span>` : ""}${registry.skipped ? ", " + text.skipped(count(registry.skipped)) : ""}</span>`}
    </div>
    ${registry?.error && html`<div class="strip bad" role="alert"><${Icon} name="warning" />${text.registryError} ${visible(registry.error)}</div>`}
    ${error && html`<${Fault} error=${error} retry=${ask} />`}
    ${!data ? !error && html`<${Loading} />` : shown.length === 0
      ? html`<${Empty} title=${filter.q || chosen ? text.nothing : text.none}>${filter.q || chosen ? html`<p><a href=${link("/hosts")}>${words.jobs.clear}</a></p>` : html`<p>${text.noneDetail}</p><pre><code>${text.example}</code></pre>`}</${Empty}>`
      : html`<div class="card table-scroll"><table class="plain">
        <thead><tr><th>${text.columns.name}</th><th>${text.columns.state}</th><th>${text.columns.running}</th><th class="num">${text.columns.waiting}</th>${withTrip && html`<th class="num">${text.columns.trip}</th>`}${withDaemon && html`<th>${text.columns.daemon}</th>`}${withCertificate && html`<th>${text.columns.certificate}</th>`}<th>${text.columns.address}</th><th><span class="hidden">${words.queues.columns.jobs}</span></th></tr></thead>
        <tbody>${shown.map((host) => html`<tr key=${host.name}>
          <td class="name"><a href=${link("/hosts/" + encodeURIComponent(host.name))}><b>${visible(host.name)}</b></a></td>
          <td><${HostState} host=${host} />${host.error && html`<div class="bad small cut" title=${visible(host.error)}>${visible(host.error)}</div>`}</td>
          <td data-name=${text.columns.running}><${Use} running=${host.running} limit=${host.limit} /></td>
          <td class="num" data-name=${text.columns.waiting}>${host.queued ? html`<a href=${link("/jobs", { host: host.name, state: "queued" })}>${count(host.queued)}</a>` : html`<span class="dim">0</span>`}</td>
          ${withTrip && html`<td class="num" data-name=${text.columns.trip}>${roundTrip(host)}</td>`}
          ${withDaemon && html`<td data-name=${text.columns.daemon}>${versionOf(host) ? html`<span class=${other(host) ? "warn" : ""} title=${other(host) ? text.differs(common) : undefined}>${visible(versionOf(host))}${other(host) ? " !" : ""}</span>` : html`<span class="dim">-</span>`}</td>`}
          ${withCertificate && html`<td data-name=${text.columns.certificate}><${Certificate} certificate=${host.certificate} now=${now} /></td>`}
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
  useLive("hosts", "", { host: (changed) => changed.name === id && soon(), refresh: soon });
  const jobs = (state) => link("/jobs", { host: id, state });
  const fact = (name, value) => value !== null && value !== undefined && value !== "" && html`<dt>${name}</dt><dd>${value}</dd>`;
  return html`<div class="page">
    <p class="back"><a href=${link("/hosts")}><${Icon} name="left" size=${12} />${words.views.hosts}</a></p>
    ${error && html`<${Fault} error=${error} retry=${error.status === 404 ? undefined : ask} />`}
    ${!host ? !error && html`<${Loading} />` : html`
      <div class="page-head"><h1>${visible(host.name)}</h1><${HostState} host=${host} /></div>
      ${host.error && html`<p class="strip bad"><${Icon} name="warning" />${visible(host.error)}</p>`}
      <dl class="facts card">
        ${fact(text.columns.address, html`<code>${visible(host.address)}${host.port ? ":" + host.port : ""}</code>`)}
        ${fact(text.columns.running, html`<${Use} running=${host.running} limit=${host.limit} /> ${host.running > 0 && html`<a href=${jobs("running")}>${words.queues.show}</a>`}`)}
        ${fact(text.columns.waiting, html`${count(host.queued)} ${host.queued > 0 && html`<a href=${jobs("queued")}>${words.queues.show}</a>`}`)}
        ${fact(text.columns.checked, host.checked && html`<${Time} at=${host.checked} /> <span class="dim">(${age(now - host.checked)})</span>`)}
        ${fact(text.columns.trip, host.rtt && duration(host.rtt))}
        ${fact(text.columns.daemon, host.daemon && text.daemon(visible(host.daemon.version), visible(host.daemon.python)))}
        ${fact(text.started, host.daemon?.started && html`<${Time} at=${host.daemon.started} />`)}
        ${fact(text.skew, host.daemon?.clock_skew && duration(Math.abs(host.daemon.clock_skew)))}
        ${fact(text.columns.certificate, host.certificate && html`<${Certificate} certificate=${host.certificate} now=${now} /> <span class="dim">${visible(host.certificate.subject)} · ${visible(host.certificate.issuer)}</span>`)}
        ${fact(text.lastError, host.last_error && html`<${Time} at=${host.last_error.at} /> ${visible(host.last_error.text)}`)}
      </dl>
      ${Array.isArray(host.procedures) && host.procedures.length > 0 && html`<section class="card"><h2>${text.procedures}</h2><ul class="names">${host.procedures.map((name) => html`<li key=${name}><a class="mono" href=${link("/jobs", { host: id, procedure: name })}>${visible(name)}</a></li>`)}</ul></section>`}
      <p class="row-of"><a class="button" href=${jobs()}>${text.allJobs}</a><a class="button" href=${jobs("bad")}>${text.badJobs}</a></p>`}
  </div>`;
}
