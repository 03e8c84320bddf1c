// The console: frame, router of views, login, palette. A view is a component, which gets `{query, id, me}`: the query of the address, the part after the view's name,
// and the answer of GET /me. `ui.mjs` has what views are made of.
import { askEarly, del, facts, get, post, togglePause, useLiveStatus } from "./api.mjs";
import { readClock, setSetting, shortTime, visible } from "./formats.mjs";
import { BASE, COMMON_VIEWS, hostLink, jobLink, link, navigate, SEARCHED, searched, useRedraw, useRoute } from "./router.mjs";
import { Button, Dialog, Empty, Example, Fault, html, Icon, listKeys, Loading, Menu, Notices, render, setCalls, setTitle, useEffect, useErrorBoundary, useKeys, useLayoutEffect, useRef, useSettings, useState } from "./ui.mjs";

// By the first part of the path: the module, the component of its list, and that of one thing, whose id is the second part.
const VIEWS = {
  "": ["overview", "OverviewView"],
  jobs: ["jobs", "JobsView"],
  "jobs/": ["job", "JobView"],
  queues: ["lists", "QueuesView"],
  "queues/": ["lists", "QueueView"],
  hosts: ["lists", "HostsView"],
  "hosts/": ["lists", "HostView"],
  audit: ["lists", "AuditView"],
  sessions: ["lists", "SessionsView"],
  keys: ["overview", "OverviewView"],   // under the dialog of all keys
};

// What the bar shows: [key after g, path, name, the action of GET /me without which it is left out]
const BAR = [
  ["o", "/", "Overview", "list"],
  ["j", "/jobs", "Jobs", "list"],
  ["q", "/queues", "Queues", "list"],
  ["h", "/hosts", "Hosts", "list"],
  ["a", "/audit", "Audit", "admin"],
];

// --- views -----------------------------------------------------------------------------------------------------------

let views = null;   // of all modules of views: {module}, {error}, and when that is known

/** Load the views, once; if that failed, it is tried again when one is opened. */
function loadViews() {
  if (!views || views.error) {
    const entry = (views = {});
    entry.end = import("./views.mjs").then((module) => (entry.module = module), (error) => (entry.error = error));
  }
  return views;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Return the view of a path as [module, component], and its id; null: there is none. */
function findView(path) {
  const [, first, id, ...rest] = path.split("/");
  const view = VIEWS[first + (id ? "/" : "")];
  return view && !rest.length ? [view, id && decoded(id)] : null;
}

function View({ place, me }) {
  const [view, id] = findView(place.path) || [];
  if (!view) return html`<${NotFound} />`;
  return html`<${LoadedView} key=${view[1] + (id || "")} view=${view} ...${place} id=${id} me=${me} />`;
}

function LoadedView({ view: [name, component], ...rest }) {
  const entry = useRef(null);
  entry.current ??= loadViews();
  const { module, error, end } = entry.current;
  const redraw = useRedraw();
  const [fault] = useErrorBoundary();
  useEffect(() => void (module || end.then(redraw)), []);
  if (error || fault)
    return html`<div class="page"><${Empty} title="This view stopped by an error">
      <p>${error ? "The view cannot be loaded: the dispatcher does not answer, or it has another version of this page." : "Reload the page. If it happens again, report the text below."}</p>
      ${fault && html`<pre class="wrap"><code>${String(fault.stack || fault)}</code></pre>`}
      <p><${Button} kind="primary" onClick=${() => location.reload()}>Reload<//></p>
    <//></div>`;
  return module ? html`<${module[name][component]} ...${rest} />` : html`<div class="page"><${Loading} /></div>`;
}

function NotFound() {
  useEffect(() => setTitle("There is no such page"), []);
  return html`<div class="page"><${Empty} title=${"There is no such page"}><p>The address may have been cut, or it belongs to another version.</p><p><a href=${link("/jobs")}>Jobs</a></p><//></div>`;
}

// --- the bar ---------------------------------------------------------------------------------------------------------

// Settings of this browser: name, label, and words of the values
const CHOICES = [
  ["theme", "Theme", { system: "system", light: "light", dark: "dark" }],
  ["times", "Times", { local: "local", utc: "UTC", relative: "relative" }],
  ["density", "Rows", { compact: "compact", comfortable: "tall" }],
  ["keys", "Single keys", { on: "on", off: "off" }],
];

function Choice({ name, label, values }) {
  const chosen = useSettings();
  return html`<fieldset class="choice"><legend>${label}</legend>${Object.entries(values).map(
    ([value, word]) => html`<label key=${value}><input type="radio" name=${name} checked=${chosen[name] === value} onChange=${() => setSetting(name, value)} /><span>${word}${value === "local" && ` (${readClock(Date.now() / 1000, false)[2]})`}</span></label>`,
  )}</fieldset>`;
}

function Account({ me, logOut, help }) {
  return html`<${Menu} label=${me.principal + ": Account and settings"} icon="menu" kind="quiet account" text=${html`<span class="who">${me.principal}</span>`}>
    ${(close) => html`
      <div class="menu-head"><strong>${me.principal}</strong><span class="dim">${(me.roles || []).join(", ")}</span></div>
      ${CHOICES.map(([name, label, values]) => html`<${Choice} key=${name} name=${name} label=${label} values=${values} />`)}
      <hr />
      <button type="button" onClick=${() => { close(); help(); }}>Keyboard help</button>
      <a href=${link("/sessions")} onClick=${close}>Sessions</a>
      <a href=${link("/docs")} target="_blank">HTTP API</a>
      <a href=${link("/api/v1/openapi.json")} target="_blank">OpenAPI document</a>
      <button type="button" onClick=${logOut}>Log out</button>`}
  <//>`;
}

function Search({ place }) {
  const field = useRef(null);
  // At once, because the field can be typed into as soon as it is drawn.
  useLayoutEffect(() => void (field.current.value = (place.path === "/jobs" && place.query.get("q")) || ""), [place]);
  useKeys("Everywhere", { "/": [() => field.current.select(), "Search jobs"] }, 0);
  function submit(event) {
    event.preventDefault();
    const sought = field.current.value.trim();
    if (/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(sought)) navigate(jobLink(sought));
    else {
      navigate(link("/jobs", searched(sought)));
      document.getElementById("content").focus();   // the keys of the list work at once
    }
  }
  return html`<form class="search" role="search" onSubmit=${submit}>
    <${Icon} name="search" />
    <input ref=${field} type="search" aria-label="Search jobs" title=${SEARCHED + " Keys such as state:bad, from:today and arguments:TEXT say more."} placeholder="Search: id, word, host:web01" autocomplete="off" spellcheck="false" maxlength="1000" />
    <kbd aria-hidden="true">/</kbd>
  </form>`;
}

const PAUSE = "Pause live updates, or go on";
const LIVE = {
  live: ["live", "This page follows all changes. Click to pause."],
  paused: ["paused", "Paused: the page shows what was. Click to follow again."],
  away: ["away", "The dispatcher does not answer. The page tries again by itself."],
  polling: ["every 5 s", "Four tabs follow live already, or a proxy holds streams back: this one asks every 5 s."],
  connecting: ["connecting", "Connecting to the dispatcher."],
};

/** The time zone of all short times; each has its own zone in its title. */
function Zone() {
  const { times } = useSettings();
  const [, , zone] = readClock(Date.now() / 1000);
  return times !== "relative" && html`<span class="zone dim wide-only" title=${`Times are in ${zone}. The menu changes this; each time has its date and zone as its title.`}>${zone}</span>`;
}

/** The button that says whether the page is live, and pauses it. */
function Live({ state }) {
  if (state === "off") return null;
  const shown = state === "hidden" ? "connecting" : state;
  return html`<button type="button" class=${"button quiet live live-" + shown} title=${LIVE[shown][1]} aria-pressed=${state === "paused"} onClick=${togglePause}>
    <${Icon} name=${state === "paused" ? "pause" : "live"} size=${12} /><span>${LIVE[shown][0]}</span></button>`;
}

function Banner({ status, restarted }) {
  if (status.state === "away") return html`<div class="banner" role="alert"><${Icon} name="warning" />The dispatcher does not answer since ${shortTime(status.since)}. What you see is from then. Trying again.</div>`;
  return restarted && html`<div class="banner" role="status">The dispatcher has another version of this page now. <${Button} kind="small" onClick=${() => location.reload()}>Reload<//></div>`;
}

function Frame({ me, logOut, restarted }) {
  const place = useRoute();
  const status = useLiveStatus();
  const [over, setOver] = useState(null);   // the dialog over the view: Palette or KeyHelp
  const bar = BAR.filter(([, , , action]) => !me.can || me.can.includes(action));
  const toggle = (dialog) => setOver((now) => (now === dialog ? null : dialog));
  const help = () => toggle("keys");
  const goTo = bar.map(([key, path, name]) => ["Go to " + name, () => navigate(link(path)), key]);
  useKeys("Everywhere", {
    ...Object.fromEntries(goTo.map(([name, go, key]) => ["g " + key, [go, name]])),
    ".": [togglePause, PAUSE],
    "ctrl+k": [() => toggle("palette"), "Open the command palette"],
    "?": [help, "Show all keys"],
  }, 0);
  useEffect(() => {
    if (place.path === "/keys") setOver("keys");
  }, [place.path]);
  const actions = [
    ...goTo,
    ...COMMON_VIEWS.map(([name, search]) => [`Jobs: ${name}`, () => navigate(link("/jobs", new URLSearchParams(search)))]),
    ...CHOICES.slice(0, 2).flatMap(([name, label, values]) => Object.entries(values).map(([value, word]) => [label + ": " + word, () => setSetting(name, value)])),
    ["Show all keys", help],
    [PAUSE, togglePause],
    ["Go to Sessions", () => navigate(link("/sessions"))],
    ["Log out", logOut],
  ];
  return html`
    <a class="skip" href="#content" data-in-page>Skip to the content</a>
    <header class="bar">
      <a class="brand" href=${link("/")}>HARP</a>
      <nav aria-label="Views">${bar.map(
        ([, path, name]) => html`<a key=${path} href=${link(path)} aria-current=${(path === "/" ? place.path === "/" : place.path.startsWith(path)) ? "page" : undefined}>${name}</a>`,
      )}</nav>
      <${Search} place=${place} />
      <${Zone} />
      <${Live} state=${status.state} />
      <${Account} me=${me} logOut=${logOut} help=${help} />
    </header>
    <${Banner} status=${status} restarted=${restarted} />
    <main id="content" tabindex="-1" data-scroll><${View} place=${place} me=${me} /></main>
    ${over === "palette" && html`<${Palette} close=${() => setOver(null)} actions=${actions} />`}
    ${over === "keys" && html`<${KeyHelp} close=${() => setOver(null)} />`}
    <${Notices} />`;
}

// --- dialogs over any view ---------------------------------------------------------------------------------------------

/** A field and a list: views, actions, saved searches, hosts and procedures by name. `actions`: [[name, function], ...]. */
function Palette({ close, actions }) {
  const [sought, setSought] = useState("");
  const [names, setNames] = useState([]);
  const [at, setAt] = useState(0);
  const list = useRef(null);
  useEffect(() => {
    const add = (request, entriesOf) => request.then((answer) => setNames((before) => [...before, ...entriesOf(answer)]), () => null);
    add(get("/hosts", { limit: 500 }), ({ hosts }) => hosts.map(({ name }) => [`Host ${visible(name)}`, () => navigate(hostLink(name))]));
    add(get("/jobs/counts", { by: "procedure" }), ({ by }) => by.procedure.map(({ value }) => [`Jobs of ${visible(value)}`, () => navigate(link("/jobs", { procedure: value }))]));
  }, []);
  const wanted = sought.toLowerCase().split(/\s+/);
  const found = [...actions, ...names].filter(([name]) => wanted.every((word) => name.toLowerCase().includes(word))).slice(0, 12);
  if (sought.trim()) found.push([`Search jobs for “${sought.trim()}”`, () => navigate(link("/jobs", { q: sought.trim() }))]);
  const place = Math.min(at, found.length - 1);
  function run(entry) {
    close();
    entry?.[1]();
  }
  function keys(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step && event.key !== "Enter") return;
    event.preventDefault();
    if (step) setAt((place + step + found.length) % found.length);
    else run(found[place]);
  }
  useEffect(() => list.current?.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" }), [place, sought]);
  return html`<${Dialog} title="Go to or do" close=${close} kind="palette">
    <input type="text" role="combobox" aria-expanded="true" aria-controls="palette" aria-activedescendant=${found.length ? "palette-" + place : undefined} aria-label="Go to or do" autofocus autocomplete="off" spellcheck="false" placeholder="View, action, host, procedure…"
      value=${sought} onInput=${(event) => (setSought(event.target.value), setAt(0))} onKeyDown=${keys} />
    <ul id="palette" role="listbox" aria-label="Go to or do" ref=${list}>${found.map((entry, number) => html`<li key=${entry[0]} id=${"palette-" + number} role="option" aria-selected=${number === place} onClick=${() => run(entry)} onPointerMove=${() => number !== place && setAt(number)}>${entry[0]}</li>`)}</ul>
  <//>`;
}

const KEY_NAMES = { "ctrl+k": "Ctrl K", ArrowDown: "↓", ArrowUp: "↑", Escape: "Esc" };

/** All keys that work in the view that is open. */
function KeyHelp({ close }) {
  return html`<${Dialog} title="Keys" close=${close} kind="wide">
    <div class="key-help">${listKeys().map(([title, keys]) => html`<section key=${title}><h3>${title}</h3><dl>${keys.map(([key, meaning]) => html`<div key=${key}><dt>${key.split(" ").map((part) => html`<kbd key=${part}>${KEY_NAMES[part] || part}</kbd> `)}</dt><dd>${meaning}</dd></div>`)}</dl></section>`)}</div>
    <p class="dim">Single keys can be switched off in the menu at the top right.</p>
  <//>`;
}

// --- the login page: it shows nothing else to a visitor, not even which part of a login was wrong ------------------------

/** Log in with the link's secret (in the fragment, which browsers do not send), a token, or name and password. `done` follows. */
function LoginView({ done }) {
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
      setFault(error.status === 429 ? `Too many attempts. Try again in ${error.retryAfter || 60} s.` : error.status ? "That did not work. A link works once and for five minutes; a token or a password must be right, and a token must not be expired or revoked." : error.detail);
      setBusy(false);
      field.current?.focus();
    }
  }
  useEffect(() => {
    setTitle("Log in");
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
      <p>${busy && secret ? "Logging in with the link" : "Open a login link, paste a token, or enter name and password."}</p>
      ${fault && html`<p class="form-fault" role="alert"><${Icon} name="warning" /><span>${fault}</span></p>`}
      <label for="name">Name (only with a password)</label>
      <input ref=${name} id="name" autocomplete="username" autocapitalize="none" spellcheck="false" disabled=${busy} />
      <label for="token">Token or password</label>
      <input ref=${field} id="token" type="password" autocomplete="current-password" spellcheck="false" required disabled=${busy} />
      <button class="button primary" disabled=${busy}>Log in</button>
      <p class="dim">On the dispatcher's machine, this command prints a link for one login:</p><${Example}>harpcallerd web-login<//>
      <p class="dim">This one prints a token that can be used again:</p><${Example}>harpcallerd token add NAME --role=viewer<//>
    </form>
  </main>`;
}

// --- the page ----------------------------------------------------------------------------------------------------------

/** Return whether the dispatcher now has another version of this page. */
async function hasOtherVersion() {
  const page = await fetch(link("/"), { cache: "no-cache" }).then((answer) => answer.text());
  return !page.includes(new URL(import.meta.url).pathname);
}

// Tabs of one browser share the cookie: when one logs out, the others show the way in at once.
const tabs = new BroadcastChannel("harp");

function App() {
  const place = useRoute();
  const [me, setMe] = useState(undefined);   // undefined: not known yet; null: not logged in
  const [error, setError] = useState(null);
  const [restarted, setRestarted] = useState(false);
  async function ask() {
    try {
      const answer = await get("/me");
      setCalls(answer.server);
      setMe(answer);
      setError(null);
    } catch (problem) {
      if (problem.status === 401) setMe(null);
      else setError(problem);
    }
  }
  useEffect(() => {
    ask();
    tabs.onmessage = ({ data }) => (data === "logout" ? facts.tell({ loggedOut: true }) : ask());
    return facts.follow((fact) => {
      if (fact.loggedOut) setMe(null);
      if (fact.restarted) hasOtherVersion().then(setRestarted, () => null);
    });
  }, []);
  useEffect(() => {
    if (!error) return undefined;
    const timer = setTimeout(ask, 2000);
    return () => clearTimeout(timer);
  }, [error]);
  async function logOut() {
    await del("/session", { quiet: true }).catch(() => null);
    tabs.postMessage("logout");
    facts.tell({ loggedOut: true });
  }
  function loggedIn() {
    tabs.postMessage("login");
    if (location.pathname === BASE + "/login") history.replaceState(null, "", link("/"));
    ask();
  }
  if (me === undefined) return html`<main class="page">${error ? html`<${Fault} error=${error} retry=${ask} />` : html`<${Loading} />`}</main>`;
  if (me === null || (place.path === "/login" && location.hash.startsWith("#k="))) return html`<${LoginView} done=${loggedIn} /><${Notices} />`;
  return html`<${Frame} me=${me} logOut=${logOut} restarted=${restarted} />`;
}

// The views, and a job, are asked for while the dispatcher is asked who is logged in.
loadViews();
const [, opened] = /^\/jobs\/([0-9a-f-]{36})$/.exec(location.pathname.slice(BASE.length)) || [];
if (opened) askEarly("/jobs/" + opened, { payloads: "text" });
render(html`<${App} />`, document.getElementById("app"));
