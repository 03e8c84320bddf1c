// The login page. It shows nothing else to a visitor: no version, no name, and not which part of a login was wrong.
import { post } from "./api.mjs";
import { Button, html, Icon, setTitle, useEffect, useRef, useState } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.login;

/** Log in with the link's secret (in the fragment, which browsers do not send), a token, or name and password. `done` follows. */
export function LoginView({ done }) {
  const [busy, setBusy] = useState(false);
  const [fault, setFault] = useState(null);
  const field = useRef(null), name = useRef(null);
  const [secret] = useState(() => new URLSearchParams(location.hash.slice(1)).get("k"));

  async function logIn(credentials) {
    setBusy(true);
    setFault(null);
    try {
      await post("/session", credentials, { quiet: true });
      done();
    } catch (error) {
      setFault(error.status === 429 ? text.tooMany(error.retryAfter || 60) : error.status ? text.refused : words.fault.awayDetail);
      setBusy(false);
      field.current?.focus();
    }
  }
  useEffect(() => {
    setTitle(text.title);
    if (!secret) return;
    history.replaceState(null, "", location.pathname + location.search);   // the secret leaves the address bar
    logIn({ link: secret });
  }, []);
  function submit(event) {
    event.preventDefault();
    const user = name.current.value.trim(), password = field.current.value;
    if (password) logIn(user ? { user, password } : { token: password.trim() });
  }
  return html`<main class="login">
    <form onSubmit=${submit}>
      <h1><svg class="logo" viewBox="0 0 32 32" width="36" height="36" aria-hidden="true"><rect width="32" height="32" rx="7" /><path d="M9 6v20M23 6v20M9 16h14M16 9v3M16 20v3" /></svg>HARP</h1>
      <p>${busy && secret ? text.link : text.lead}</p>
      ${fault && html`<p class="form-fault" role="alert"><${Icon} name="warning" /><span>${fault}</span></p>`}
      <label for="name">${text.name}</label>
      <input ref=${name} id="name" autocomplete="username" autocapitalize="none" spellcheck="false" disabled=${busy} />
      <label for="token">${text.token}</label>
      <input ref=${field} id="token" type="password" autocomplete="current-password" spellcheck="false" required disabled=${busy} />
      <button class="button primary" disabled=${busy}>${text.submit}</button>
      <p class="dim">${text.how}</p>
      <pre><code>harpcallerd web-login</code></pre>
    </form>
  </main>`;
}
