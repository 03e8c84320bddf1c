// What all views are made of: Preact's functions, keys, and the small parts of a page. Text of jobs and hosts is always
// a text node: nothing here or in a view makes markup of it.
import { fullTime, settingChanges, settings, shortTime, visible } from "./formats.mjs";
import { jobLink, link, makeSignal, useSignal } from "./router.mjs";
import { useEffect, useErrorBoundary, useId, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.mjs";
import htm from "./vendor/htm.mjs";
import { h, render } from "./vendor/preact.mjs";

export { render, useEffect, useErrorBoundary, useLayoutEffect, useMemo, useRef, useState };
export const html = htm.bind(h);

// The one Trusted Types policy of the page: it makes the addresses of our own workers, and of nothing else.
const policy = globalThis.trustedTypes?.createPolicy("harp", {
  createScriptURL(name) {
    if (!/^[a-z-]+\.mjs$/.test(name)) throw new TypeError("not a module of the console: " + name);
    return new URL(name, import.meta.url).href;
  },
});

/** Return the address of a module of the console, for `new Worker(address, {type: "module"})`. */
export const workerAddress = (name) => (policy ? policy.createScriptURL(name) : new URL(name, import.meta.url).href);

/** Draw the component again when a setting of this browser changes. */
export function useSettings() {
  useSignal(settingChanges);
  return settings;
}

const ticks = makeSignal();
setInterval(() => document.hidden || ticks.tell(Date.now() / 1000), 1_000);

/** Return the time now in seconds; the component is drawn again each second while `running` (and the tab is seen). */
export function useNow(running = true) {
  const [now, setNow] = useState(() => Date.now() / 1000);
  useEffect(() => (running ? ticks.follow(setNow) : undefined), [running]);
  return now;
}

/** Return a function that calls `action`, at most once in `pause` milliseconds. What waits ends with the component, or when `key` changes. */
export function useSoon(action, pause, key) {
  const now = useRef({ timer: 0, at: 0 }).current;
  now.action = action;
  now.run = () => {
    now.timer = 0;
    now.at = Date.now();
    return now.action();
  };
  useEffect(() => () => (now.timer = clearTimeout(now.timer) || 0), [key]);
  return Object.assign(() => void (now.timer ||= setTimeout(now.run, Math.max(0, now.at + pause - Date.now()))), { now: now.run });
}

/** A time: short on the page, in full as its title. */
export function Time({ at, none = "-" }) {
  useSettings();
  if (at === null || at === undefined) return html`<span class="dim">${none}</span>`;
  return html`<time datetime=${new Date(at * 1000).toISOString()} title=${fullTime(at)}>${shortTime(at)}</time>`;
}

// --- keys of the whole page: a view adds its own, and the help lists what is there at that moment --------------------

const layers = [];
let prefix = "";
let prefixTimer = 0;

/**
 * Add keys while the component is there.
 * `keys`: {"j": [action, "next row"], "g j": [...], "ctrl+k": [...]}. The frame's keys have level 0; a view's win.
 */
export function useKeys(title, keys, level = 1) {
  const layer = useRef({ level }).current;
  Object.assign(layer, { title, keys });
  useLayoutEffect(() => {   // keys work as soon as what they are for is seen
    layers.push(layer);
    layers.sort((a, b) => b.level - a.level);
    return () => layers.splice(layers.indexOf(layer), 1);
  }, []);
}

/** Return [[title, [[key, meaning], ...]], ...] of all keys that work now: the view's first. */
export function listKeys() {
  const titles = new Map();
  for (const { title, keys } of layers) titles.set(title, [...(titles.get(title) || []), ...Object.entries(keys).map(([key, [, meaning]]) => [key, meaning]).filter(([, meaning]) => meaning)]);
  return [...titles].filter(([, keys]) => keys.length);
}

// A control that has the focus takes Enter itself, and an open menu takes all keys.
const isTaken = ({ target, key }) => target.closest(".menu-list") || (key === "Enter" && target.closest("a, button")) || target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.nodeName);

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.altKey || event.isComposing) return;
  const command = event.ctrlKey || event.metaKey;
  const single = !command && event.key !== "Escape";
  if (single && (settings.keys === "off" || isTaken(event) || document.querySelector("dialog[open]"))) return;
  const key = (command ? "ctrl+" : "") + (event.key.length === 1 && command ? event.key.toLowerCase() : event.key);
  const spelled = prefix ? prefix + " " + key : key;
  clearTimeout(prefixTimer);
  prefix = "";
  const layer = layers.find(({ keys }) => keys[spelled]);
  if (layer) {
    event.preventDefault();
    layer.keys[spelled][0](event);
  } else if (single && layers.some(({ keys }) => Object.keys(keys).some((name) => name.startsWith(spelled + " ")))) {
    prefix = spelled;
    prefixTimer = setTimeout(() => (prefix = ""), 1500);
  }
});

// --- small parts ---------------------------------------------------------------------------------------------------

/** A small drawing of `index.html`, in the colour of the text. It says nothing to a screen reader: a word stands beside it. */
export const Icon = ({ name, size = 14 }) => html`<svg class=${"icon icon-" + name} width=${size} height=${size} aria-hidden="true"><use href=${"#icon-" + name} /></svg>`;

export const STATES = {
  queued: "It waits for its host, or for a slot of its queue.",
  running: "It runs on its host.",
  returned: "The procedure returned a value.",
  raised: "The procedure ran, and raised an exception: see the traceback.",
  failed: "HARP could not start the procedure, or not let it end: see cause and cure.",
  cancelled: "A person or a program has cancelled it.",
};

/** What is known of the stop of a job. */
export const STOPS = {
  pending: "Stop sent: the host has not confirmed yet that no process is left.",
  confirmed: "Stop confirmed: no process of the call is left.",
  failed: "Stop failed: processes survive, or the host was lost.",
  unknown: "Stop unknown: the host cannot report it.",
};

/** The state of a job: drawing, word and colour; its title explains the word. */
export const State = ({ state }) => html`<span class=${"state state-" + state} title=${STATES[state]}><${Icon} name=${state} />${state}</span>`;

/** A button. `icon` names a drawing; `why` gives the reason when it is disabled. */
export function Button({ icon, children, kind = "", why, disabled, ...rest }) {
  return html`<button type="button" class=${"button " + kind} aria-disabled=${disabled || undefined} title=${disabled ? why : rest.title}
    ...${rest} onClick=${disabled ? (event) => event.preventDefault() : rest.onClick}>${icon && html`<${Icon} name=${icon} />`}${children}</button>`;
}

/** A fault that the API reported, with the words that help: what, why, the request's number for the log. */
export function Fault({ error, retry }) {
  return html`<div class="fault" role="alert">
    <${Icon} name="warning" size=${18} />
    <div>
      <strong>${error.title || "The dispatcher refused this"}</strong>
      <p>${error.detail || error.message}</p>
      ${error.request && html`<p class="dim">Request in the log: <code>${error.request}</code></p>`}
      ${retry && html`<${Button} onClick=${retry}>Try again<//>`}
    </div>
  </div>`;
}

/** A fault beside what is shown already. */
export const Strip = ({ children }) => html`<div class="strip bad" role="alert"><${Icon} name="warning" /> ${children}</div>`;

/** What stands where nothing is: a title, and what to do about it. */
export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2>${children}</div>`;

/** A link to a list without a filter. */
export const Clear = ({ path = "/jobs" }) => html`<a class="clear" href=${link(path)}>Clear all filters</a>`;

/** An example, to copy. */
export const Example = ({ children }) => html`<pre><code>${children}</code></pre>`;

/** Grey lines in the place of what is loading. They come after 300 ms, so that quick answers do not flicker. */
export const Loading = ({ lines = 8 }) => html`<div class="loading" role="status" aria-label="Loading">${Array.from({ length: lines }, (_, place) => html`<div key=${place} />`)}</div>`;

/** Links of which one is chosen: [[address, word, isChosen], ...]. */
export const Choose = ({ label, links }) => html`<nav class="choose" aria-label=${label}>${links.map(([href, word, isChosen]) => html`<a key=${href} href=${href} aria-current=${isChosen || undefined}>${word}</a>`)}</nav>`;

/** Names and values; what has no value is left out. */
export function Facts({ facts, kind = "" }) {
  const known = facts.filter(([, value]) => value || value === 0);
  return known.length > 0 && html`<dl class=${"pairs " + kind}>${known.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${typeof value === "string" ? visible(value) : value}</dd></div>`)}</dl>`;
}

/** A dialog of the browser's own kind: focus stays in it and returns, Escape closes it. */
export function Dialog({ title, close, children, kind = "" }) {
  const element = useRef(null);
  const name = useId();
  useLayoutEffect(() => {
    const before = document.activeElement;
    element.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog ref=${element} class=${kind} aria-labelledby=${name} onClose=${close}
      onMouseDown=${(event) => event.target === element.current && element.current.close()}>
    <div class="dialog">
      <header><h2 id=${name}>${title}</h2><button type="button" class="button quiet" aria-label="Close" onClick=${() => element.current.close()}><${Icon} name="close" /></button></header>
      ${children}
    </div>
  </dialog>`;
}

const openMenus = new Set();

/** Return whether a menu is open: lists hold still then. */
export const menuIsOpen = () => openMenus.size > 0;

/** A button with a list under it. `children(close)` draws the list. It closes on Escape, a click elsewhere, or `close`. */
export function Menu({ label, icon, text, children, kind = "" }) {
  const [open, setOpen] = useState(false);
  const button = useRef(null);
  const panel = useRef(null);
  const close = () => {
    setOpen(false);
    button.current?.focus();
  };
  useLayoutEffect(() => {
    if (!open) return undefined;
    const element = panel.current;
    openMenus.add(element);
    element.showPopover();
    const place = button.current.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = element;
    const under = place.bottom + 4 + height <= innerHeight || place.top < height;
    element.style.left = Math.max(4, Math.min(place.left, innerWidth - width - 4)) + "px";
    element.style.top = Math.max(4, under ? Math.min(place.bottom + 4, innerHeight - height - 4) : place.top - height - 4) + "px";
    element.querySelector("a, button, input, select")?.focus({ preventScroll: true });
    const listening = new AbortController();
    const closeOn = (kind, isInside) => addEventListener(kind, (event) => isInside(event.target) || setOpen(false), { capture: true, signal: listening.signal });
    closeOn("pointerdown", (target) => element.contains(target) || button.current?.contains(target));
    closeOn("scroll", (target) => element.contains(target));
    closeOn("resize", () => false);
    return () => {
      openMenus.delete(element);
      listening.abort();
    };
  }, [open]);
  function keys(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (!step || /^(radio|text|datetime-local)$/.test(event.target.type)) return;
    event.preventDefault();
    if (!step) return;
    const items = [...panel.current.querySelectorAll("a, button, input")];
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length]?.focus();
  }
  const left = (event) => event.relatedTarget && !panel.current?.contains(event.relatedTarget) && event.relatedTarget !== button.current && setOpen(false);
  return html`<button ref=${button} type="button" class=${"button " + kind} aria-expanded=${open} aria-label=${typeof text === "string" ? undefined : label} title=${label} onClick=${() => setOpen(!open)}>
      ${icon && html`<${Icon} name=${icon} />`}${text}${text && html`<${Icon} name="down" size=${10} />`}
    </button>
    ${open && html`<div ref=${panel} popover="manual" class="menu-list" onKeyDown=${keys} onFocusOut=${left}>${children(close)}</div>`}`;
}

const notices = makeSignal();

/** Show a line at the foot of the page for some seconds, and say it to a screen reader. */
export const notify = (text, kind = "") => notices.tell({ text, kind });

/** The place where `notify` shows its lines. */
export function Notices() {
  const [notice, setNotice] = useState(null);
  useEffect(() => notices.follow(setNotice), []);
  useEffect(() => {
    const timer = setTimeout(() => setNotice(null), 4000);
    return () => clearTimeout(timer);
  }, [notice]);
  return html`<div class="notices" role="status" aria-live="polite">${notice && html`<div class=${"notice " + notice.kind}>${notice.text}</div>`}</div>`;
}

/** Put a text into the clipboard, also where the browser has no Clipboard API (plain HTTP to a name). */
export async function copy(text, what = "") {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "hidden";
    (document.querySelector("dialog[open]") || document.body).append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  notify(what ? `Copied: ${what}.` : "Copied.");
}

/** Copy the address of a job. */
export const copyJobLink = (id, hash = "") => copy(location.origin + jobLink(id) + hash, "link");

/** Where the dispatcher takes calls: the members `port` and `tls` of `server` in the answer of GET /me. */
let calls = {};
export const setCalls = (server) => (calls = server);

/** How `harp` and Python name the dispatcher; the default port is left out. Nothing without a TCP address. */
function callers(id) {
  const { port, tls } = calls, isUsual = port === 3502;
  return port && {
    harp: `harp --dispatcher=${location.hostname}${isUsual ? "" : ":" + port}${tls ? " --tls" : ""} show ${id}`,
    Python: `harp.HarpCaller("${location.hostname.replace(/[[\]]/g, "")}"${isUsual ? "" : ", " + port}${tls ? ", tls=True" : ""}).job("${id}").result()`,
  };
}

/** Lines of a menu that copy a job's id, link, or a line of curl, harp or Python. */
export const copyItems = (id, close) =>
  Object.entries({
    id,
    link: location.origin + jobLink(id),
    curl: `curl -H "Authorization: Bearer $HARP_TOKEN" ${location.origin}${link("/api/v1/jobs/" + id)}`,
    ...callers(id),
  }).map(([name, spelling]) => html`<button key=${name} type="button" onClick=${() => { close(); copy(spelling, name); }}>
      <span>Copy ${name}</span><code class="dim">${spelling}</code></button>`);

const MARKS = { queued: "◌ ", running: "▶ ", returned: "✓ ", raised: "! ", failed: "✕ ", cancelled: "⊘ " };

/** Set the title of the tab: a state's mark first, so that it is seen in a narrow tab. */
export const setTitle = (text, state) => (document.title = (MARKS[state] || "") + (text ? text + " - HARP" : "HARP"));
