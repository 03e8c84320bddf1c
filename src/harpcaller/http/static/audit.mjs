// The audit file: who has done what, newest first, and whether its chain of hashes is whole.
import { link, navigate } from "./router.mjs";
import { useAnswer } from "./tables.mjs";
import { Button, count, Empty, Fault, html, Icon, Loading, setTitle, Time, useEffect, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.audit;
const FIELDS = ["principal", "action", "decision", "host", "job", "from"];

// Members that have a column; all others are shown as they are.
const SHOWN = new Set(["seq", "at", "principal", "action", "decision", "rule", "procedure", "host", "job", "peer", "listener"]);
const detailsOf = (entry) => Object.entries(entry).filter(([name, value]) => !SHOWN.has(name) && value !== null && value !== "").map(([name, value]) => visible(`${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`)).join(" · ");

export function AuditView({ query }) {
  const filter = Object.fromEntries([...FIELDS, "to"].map((name) => [name, query.get(name)]));
  const { data, error, ask, more } = useAnswer("/audit", filter, "entries");
  useEffect(() => setTitle(words.views.audit), []);
  const chosen = FIELDS.some((name) => filter[name]);
  const only = (name, value) => link("/audit", { ...filter, [name]: value });
  function submit(event) {
    event.preventDefault();
    const values = Object.fromEntries([...event.target.elements].filter((field) => field.name).map((field) => [field.name, field.value.trim()]));
    navigate(link("/audit", values));
  }
  const chain = data?.chain;
  return html`<div class="page">
    <div class="page-head"><h1>${words.views.audit}</h1>
      ${chain && html`<span class=${"tag " + (chain.ok ? "good" : "bad")}><${Icon} name=${chain.ok ? "ok" : "warning"} size=${12} />${chain.ok ? text.whole : text.broken}</span>${chain.problem && html`<span class="bad">${visible(chain.problem)}</span>`}${chain.head && html`<code class="dim" title=${visible(chain.head)}>${visible(chain.head).slice(0, 12)}</code>`}`}
      <span class="grow" /><${Button} onClick=${ask}>${text.renew}</${Button}>
    </div>
    ${error?.status !== 404 && html`<form class="filter-row" onSubmit=${submit} key=${JSON.stringify(filter)}>
      <label>${text.fields.principal}<input type="text" name="principal" defaultValue=${filter.principal || ""} maxlength="200" /></label>
      <label>${text.fields.action}<input type="text" name="action" defaultValue=${filter.action || ""} maxlength="50" /></label>
      <label>${text.fields.decision}<select name="decision"><option value="">${text.any}</option>${["allowed", "denied", "failed"].map((value) => html`<option key=${value} value=${value} selected=${filter.decision === value}>${text.decisions[value]}</option>`)}</select></label>
      <label>${text.fields.host}<input type="text" name="host" defaultValue=${filter.host || ""} maxlength="255" /></label>
      <label>${text.fields.job}<input type="text" name="job" defaultValue=${filter.job || ""} maxlength="36" /></label>
      <label>${text.fields.from}<select name="from"><option value="">${words.jobs.anyTime}</option>${["-1h", "-1d", "-7d"].map((value) => html`<option key=${value} value=${value} selected=${filter.from === value}>${words.jobs.spans[value]}</option>`)}</select></label>
      <button class="button primary">${text.filter}</button>${chosen && html`<a href=${link("/audit")}>${words.jobs.clear}</a>`}
    </form>`}
    ${error && (error.status === 404 ? html`<${Empty} title=${text.noFile}><p>${text.noFileDetail}</p><pre><code>${text.example}</code></pre></${Empty}>` : html`<${Fault} error=${error} retry=${ask} />`)}
    ${!data ? !error && html`<${Loading} />` : data.entries.length === 0 && !data.next
      ? html`<${Empty} title=${chosen ? text.nothing : text.none}><p>${chosen ? html`<a href=${link("/audit")}>${words.jobs.clear}</a>` : text.noneDetail}</p></${Empty}>`
      : html`<div class="card table-scroll"><table class="plain">
        <thead><tr><th>${text.columns.at}</th><th>${text.fields.principal}</th><th>${text.fields.action}</th><th>${text.columns.what}</th><th>${text.fields.decision}</th><th>${text.columns.origin}</th></tr></thead>
        <tbody>${data.entries.map((entry) => html`<tr key=${entry.seq}>
          <td class="fit"><${Time} at=${entry.at} /></td>
          <td>${entry.principal && html`<a href=${only("principal", entry.principal)}>${visible(entry.principal)}</a>`}</td>
          <td class="fit"><a href=${only("action", entry.action)}>${visible(entry.action)}</a></td>
          <td>${entry.procedure && html`<b>${visible(entry.procedure)}</b> `}${entry.host && html`<span>${text.on} ${visible(entry.host)}</span> `}${entry.job && html`<a class="mono" href=${link("/jobs/" + entry.job)}>${entry.job.slice(0, 8)}</a> `}<span class="dim">${detailsOf(entry)}</span></td>
          <td class="fit"><span class=${entry.decision === "denied" || entry.decision === "failed" ? "tag bad" : "dim"}>${text.decisions[entry.decision] || visible(entry.decision ?? "")}</span>${entry.rule !== null && entry.rule !== undefined && html` <span class="dim">${text.rule(visible(entry.rule))}</span>`}</td>
          <td class="dim">${[entry.peer, entry.listener].filter(Boolean).map(visible).join(" · ")}</td>
        </tr>`)}</tbody></table></div>
        <p class="row-of"><span class="dim">${text.shown(count(data.entries.length), data.entries.length)}</span>${data.next && data.searched_to && html`<span class="dim">${text.searchedTo(html`<${Time} at=${data.searched_to} />`)}</span>`}${!data.next && data.omitted_files > 0 && html`<span class="dim">${text.omitted(data.omitted_files)}</span>`}${data.next && html`<${Button} onClick=${more}>${words.more}</${Button}>`}</p>`}
  </div>`;
}
