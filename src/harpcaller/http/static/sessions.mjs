// Who is logged in to the console, where and until when; each session can be ended.
import { del } from "./api.mjs";
import { useAnswer } from "./tables.mjs";
import { age, Button, Fault, html, Loading, notify, setTitle, Time, useEffect, useNow, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.sessions;

export function SessionsView() {
  const { data, error, ask } = useAnswer("/sessions", {}, "sessions");
  const now = useNow();
  useEffect(() => setTitle(words.views.sessions), []);
  async function end(session) {
    try {
      await del("/sessions/" + encodeURIComponent(session.id));
      notify(text.ended);
    } catch (fault) {
      notify(fault.detail || words.fault.away, "bad");
    }
    ask();
  }
  return html`<div class="page">
    <div class="page-head"><h1>${words.views.sessions}</h1></div>
    ${error && html`<${Fault} error=${error} retry=${ask} />`}
    ${!data ? !error && html`<${Loading} />` : html`<div class="card table-scroll"><table class="plain">
      <thead><tr><th>${text.who}</th><th>${text.where}</th><th>${text.made}</th><th>${text.seen}</th><th>${text.until}</th><th><span class="hidden">${text.end}</span></th></tr></thead>
      <tbody>${data.sessions.map((session) => html`<tr key=${session.id}>
        <td><b>${visible(session.principal)}</b> <span class="dim">${visible((session.roles || []).join(", "))}</span> ${session.current && html`<span class="tag run">${text.current}</span>`}</td>
        <td>${visible(session.address)} <span class="dim">${visible(session.agent)}</span></td>
        <td class="fit" data-name=${text.made}><${Time} at=${session.created} /></td><td class="fit" data-name=${text.seen}>${session.seen && age(now - session.seen)}</td><td class="fit" data-name=${text.until}><${Time} at=${session.expires} /></td>
        <td class="fit"><${Button} kind="small" onClick=${() => end(session)}>${text.end}</${Button}></td>
      </tr>`)}</tbody></table></div>`}
  </div>`;
}
