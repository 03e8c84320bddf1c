// The console: frame, router of views, theme, keys. A view is a module of its own that is loaded when it is opened;
// it exports one component, which gets `{query, id, me}`: the query of the address, the part after the view's name,
// and the answer of GET /me. `ui.mjs` has what views are made of.
import { del, get, Problem, tellWatchers, watchRequests } from "./api.mjs";
import { searched } from "./filters.mjs";
import { useKeys } from "./keys.mjs";
import { togglePause, useLiveStatus } from "./live.mjs";
import { LoginView } from "./login.mjs";
import { BASE, link, navigate, useRoute } from "./router.mjs";
import { Empty, Fault, html, Icon, Loading, Menu, Notices, render, setSetting, setTitle, shortTime, useEffect, useErrorBoundary, useRef, useSettings, useState } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.frame;

// [the first part of the path, the module, its component]. `id` is the second part of the path.
const VIEWS = {
  "": { list: ["overview.mjs", "OverviewView"] },
  jobs: { list: ["jobs.mjs", "JobsView"], one: ["job.mjs", "JobView"] },
  queues: { list: ["queues.mjs", "QueuesView"], one: ["queues.mjs", "QueueView"] },
  hosts: { list: ["hosts.mjs", "HostsView"], one: ["hosts.mjs", "HostView"] },
  audit: { list: ["audit.mjs", "AuditView"] },
  sessions: { list: ["sessions.mjs", "SessionsView"] },
};

// What the bar shows: [key after g, path, name, the action of GET /me without which it is left out]
const BAR = [
  ["o", "/", words.views.overview, "list"],
  ["j", "/jobs", words.views.jobs, "list"],
  ["q", "/queues", words.views.queues, "list"],
  ["h", "/hosts", words.views.hosts, "list"],
  ["a", "/audit", words.views.audit, "admin"],
];

const loaded = new Map();

/** Load the component of a view; a view that was loaded is there at once. */
function useView(name, component) {
  const [, redraw] = useState(0);
  const key = name + component;
  if (!loaded.has(key)) {
    const entry = {};
    loaded.set(key, entry);
    import("./" + name).then(
      (module) => (entry.View = module[component]),
      (error) => ((entry.error = error), loaded.delete(key)),
    ).then(() => entry.redraw?.());
  }
  const entry = loaded.get(key);
  useEffect(() => {
    entry.redraw = () => redraw((number) => number + 1);
    if (entry.View || entry.error) entry.redraw();
    return () => (entry.redraw = undefined);
  }, [entry]);
  return entry;
}

/** Load the other views when there is time: they open at once then, also while the dispatcher is away. */
const loadViews = () => Object.values(VIEWS).forEach((view) => Object.values(view).forEach(([name]) => import("./" + name).catch(() => null)));

function View({ place, me }) {
  const [, first, second] = place.path.split("/");
  const view = VIEWS[first]?.[second ? "one" : "list"];
  if (place.path === "/keys") return html`<${LoadedView} key="keys" view=${VIEWS[""].list} query=${place.query} me=${me} />`;
  if (!view || place.path.split("/").length > 3) return html`<${NotFound} />`;
  return html`<${LoadedView} key=${view[0] + (second || "")} view=${view} query=${place.query} returned=${place.returned} hash=${place.hash} id=${second && decodeURIComponent(second)} me=${me} />`;
}

function LoadedView({ view, ...rest }) {
  const { View, error } = useView(...view);
  const [fault, reset] = useErrorBoundary();
  if (error || fault)
    return html`<div class="page"><${Empty} title=${text.broken}>
      <p>${error ? text.notLoaded : text.brokenDetail}</p>
      ${fault && html`<pre class="wrap"><code>${String(fault.stack || fault)}</code></pre>`}
      <p><button class="button primary" onClick=${() => location.reload()}>${text.reload}</button></p>
    </${Empty}></div>`;
  return View ? html`<${View} ...${rest} />` : html`<div class="page"><${Loading} /></div>`;
}

function NotFound() {
  useEffect(() => setTitle(text.notFound), []);
  return html`<div class="page"><${Empty} title=${text.notFound}><p>${text.notFoundDetail}</p><p><a href=${link("/jobs")}>${words.views.jobs}</a></p></${Empty}></div>`;
}

function Choice({ name, label, values }) {
  const chosen = useSettings();
  return html`<fieldset class="choice"><legend>${label}</legend>${Object.entries(values).map(
    ([value, word]) => html`<label key=${value}><input type="radio" name=${name} checked=${chosen[name] === value} onChange=${() => setSetting(name, value)} /><span>${word}</span></label>`,
  )}</fieldset>`;
}

function Account({ me, logOut, help }) {
  return html`<${Menu} label=${me.principal + ": " + text.account} icon="menu" kind="quiet account" text=${html`<span class="who">${me.principal}</span>`}>
    ${(close) => html`
      <div class="menu-head"><strong>${me.principal}</strong><span class="dim">${text.roles(me.roles || [])}</span></div>
      <${Choice} name="theme" label=${text.theme} values=${text.themes} />
      <${Choice} name="times" label=${text.times} values=${text.timeStyles} />
      <${Choice} name="density" label=${text.density} values=${text.densities} />
      <${Choice} name="keys" label=${text.keys} values=${text.keyStates} />
      <hr />
      <button type="button" onClick=${() => { close(); help(); }}>${text.help}</button>
      <a href=${link("/sessions")} onClick=${close}>${words.views.sessions}</a>
      <button type="button" onClick=${logOut}>${text.logout}</button>`}
  </${Menu}>`;
}

function Search({ query }) {
  const field = useRef(null);
  useEffect(() => void (field.current.value = query.get("q") || ""), [query.toString()]);
  useKeys(text.everywhere, { "/": [() => field.current.select(), text.search] }, 0);
  function submit(event) {
    event.preventDefault();
    const sought = field.current.value.trim();
    if (/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(sought)) navigate(link("/jobs/" + sought));
    else {
      navigate(link("/jobs", searched(sought)));
      document.getElementById("content").focus();   // the keys of the list work at once
    }
  }
  return html`<form class="search" role="search" onSubmit=${submit}>
    <${Icon} name="search" />
    <input ref=${field} type="search" aria-label=${text.search} placeholder=${text.searchHint} autocomplete="off" spellcheck="false" maxlength="1000" />
    <kbd aria-hidden="true">/</kbd>
  </form>`;
}

/** The button that says whether the page is live, and pauses it. */
function Live({ status }) {
  const { state } = status;
  if (state === "off") return null;
  const shown = state === "hidden" ? "connecting" : state;
  return html`<button type="button" class=${"button quiet live live-" + shown} title=${words.live.title[shown]} aria-pressed=${state === "paused" ? "true" : "false"} onClick=${togglePause}>
    <${Icon} name=${state === "paused" ? "pause" : "live"} size=${12} /><span>${words.live[shown]}</span></button>`;
}

function Banner({ status, restarted }) {
  if (status.state === "away") return html`<div class="banner" role="alert"><${Icon} name="warning" />${words.live.banner(shortTime(status.since))}</div>`;
  if (restarted) return html`<div class="banner" role="status">${text.newVersion} <button class="button small" onClick=${() => location.reload()}>${text.reload}</button></div>`;
  return null;
}

function Frame({ me, logOut, restarted }) {
  const place = useRoute();
  const status = useLiveStatus();
  const [over, setOver] = useState(null);   // the dialog over the view: "palette" or "keys"
  const bar = BAR.filter(([, , , action]) => !me.can || me.can.includes(action));
  const open = (name) => setOver((now) => (now === name ? null : name));
  useKeys(text.everywhere, {
    ...Object.fromEntries(bar.map(([key, path, name]) => ["g " + key, [() => navigate(link(path)), words.palette.goTo(name)]])),
    ".": [togglePause, words.palette.pause],
    "ctrl+k": [() => open("palette"), words.palette.open],
    "?": [() => open("keys"), words.palette.help],
  }, 0);
  useEffect(() => void setTimeout(loadViews, 1_000), []);
  useEffect(() => {
    if (place.path === "/keys") setOver("keys");
  }, [place.path]);
  const actions = [
    ...Object.entries(text.themes).map(([value, word]) => [words.palette.theme(word), () => setSetting("theme", value)]),
    ...Object.entries(text.timeStyles).map(([value, word]) => [words.palette.times(word), () => setSetting("times", value)]),
    [words.palette.help, () => setOver("keys")],
    [words.palette.pause, togglePause],
    [words.palette.goTo(words.views.sessions), () => navigate(link("/sessions"))],
    [text.logout, logOut],
  ];
  return html`
    <a class="skip" href="#content" data-in-page>${text.skip}</a>
    <header class="bar">
      <a class="brand" href=${link("/")}>HARP</a>
      <nav aria-label=${text.nav}>${bar.map(
        ([, path, name]) => html`<a key=${path} href=${link(path)} aria-current=${(path === "/" ? place.path === "/" : place.path.startsWith(path)) ? "page" : undefined}>${name}</a>`,
      )}</nav>
      <${Search} query=${place.query} />
      <${Live} status=${status} />
      <${Account} me=${me} logOut=${logOut} help=${() => setOver("keys")} />
    </header>
    <${Banner} status=${status} restarted=${restarted} />
    <main id="content" tabindex="-1" data-scroll><${View} place=${place} me=${me} /></main>
    ${over === "palette" && html`<${LoadedView} view=${["palette.mjs", "Palette"]} close=${() => setOver(null)} actions=${actions} views=${bar.map(([, path, name]) => [words.palette.goTo(name), () => navigate(link(path))])} />`}
    ${over === "keys" && html`<${LoadedView} view=${["palette.mjs", "KeyHelp"]} close=${() => setOver(null)} />`}
    <${Notices} />`;
}

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
      setMe(await get("/me"));
      setError(null);
    } catch (problem) {
      if (problem instanceof Problem && problem.status === 401) setMe(null);
      else setError(problem);
    }
  }
  useEffect(() => {
    ask();
    tabs.onmessage = ({ data }) => (data === "logout" ? tellWatchers({ loggedOut: true }) : ask());
    return watchRequests((fact) => {
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
    tellWatchers({ loggedOut: true });
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

render(html`<${App} />`, document.getElementById("app"));
