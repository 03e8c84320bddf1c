// What all views are made of: Preact's functions, and the small parts of a page. Text of jobs and hosts is always
// a text node: nothing here or in a view makes markup of it.
import { h, render, Fragment, createContext } from "./vendor/preact.mjs";
import { useCallback, useContext, useEffect, useErrorBoundary, useId, useLayoutEffect, useMemo, useReducer, useRef, useState } from "./vendor/hooks.mjs";
import htm from "./vendor/htm.mjs";
import { link } from "./router.mjs";
import { words } from "./words.mjs";

export { h, render, Fragment, createContext };
export { useCallback, useContext, useEffect, useErrorBoundary, useId, useLayoutEffect, useMemo, useReducer, useRef, useState };
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

// --- what this browser remembers: the person's taste, never data -------------------------------------------------

const store = {
  get(name, otherwise) {
    try {
      return localStorage.getItem("harp." + name) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      if (value === null) localStorage.removeItem("harp." + name);
      else localStorage.setItem("harp." + name, value);
    } catch {
      // Private windows may keep nothing: the choice holds until the page is closed.
    }
  },
};

const DEFAULTS = { theme: "system", density: "compact", times: "local", keys: "on", columns: "", views: "[]" };
const chosen = Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, store.get(name, value)]));
const taste = new Set();

/** Return a setting of this browser: theme, density, times (local, utc, relative), keys (on, off), columns, views. */
export const setting = (name) => chosen[name];

/** Change a setting of this browser; all that is drawn with `useSettings` is drawn again. */
export function setSetting(name, value) {
  chosen[name] = value;
  store.set(name, value === DEFAULTS[name] ? null : value);
  const root = document.documentElement;
  if (name === "theme") value === "system" ? delete root.dataset.theme : (root.dataset.theme = value);
  if (name === "density") value === "compact" ? delete root.dataset.density : (root.dataset.density = value);
  taste.forEach((redraw) => redraw());
}

/** Draw the component again when a setting of this browser changes. */
export function useSettings() {
  const [, redraw] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    taste.add(redraw);
    return () => taste.delete(redraw);
  }, []);
  return chosen;
}

// --- times, durations, numbers -----------------------------------------------------------------------------------

const two = (number) => String(number).padStart(2, "0");
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

function parts(seconds, utc) {
  const date = new Date(seconds * 1000);
  const take = (name) => (utc ? date["getUTC" + name]() : date["get" + name]());
  return { year: take("FullYear"), month: take("Month"), day: take("Date"), hour: take("Hours"), minute: take("Minutes"), second: take("Seconds"), milli: take("Milliseconds"), date };
}

function zoneOf(date) {
  const minutes = -date.getTimezoneOffset();
  if (!minutes) return "UTC";
  const size = Math.abs(minutes);
  return "UTC" + (minutes < 0 ? "-" : "+") + two(Math.floor(size / 60)) + (size % 60 ? ":" + two(size % 60) : "");
}

/** Return "2026-11-30 12:04:11.101 UTC+01": a time in full, with its zone. */
export function fullTime(seconds, utc = setting("times") === "utc") {
  const p = parts(seconds, utc);
  return `${p.year}-${two(p.month + 1)}-${two(p.day)} ${two(p.hour)}:${two(p.minute)}:${two(p.second)}.${String(p.milli).padStart(3, "0")} ${utc ? "UTC" : zoneOf(p.date)}`;
}

/** Return a short time: "12:04:11" for today, "Nov 29 12:04" for this year, else "2025-11-29". */
export function shortTime(seconds, now = Date.now() / 1000) {
  const how = setting("times");
  if (how === "relative") return age(now - seconds);
  const p = parts(seconds, how === "utc");
  const today = parts(now, how === "utc");
  if (p.year !== today.year) return `${p.year}-${two(p.month + 1)}-${two(p.day)}`;
  if (p.month !== today.month || p.day !== today.day) return `${MONTHS[p.month]} ${p.day} ${two(p.hour)}:${two(p.minute)}`;
  return `${two(p.hour)}:${two(p.minute)}:${two(p.second)}`;
}

/** Return a duration: "0.12 ms", "340 ms", "4.0 s", "31 s", "12 min 5 s", "3 h 20 min", "2 d 4 h". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "";
  if (seconds < 0) return "0 s";
  if (seconds < 0.01) return (seconds * 1000).toFixed(seconds < 0.001 ? 2 : 1) + " ms";
  if (seconds < 1) return Math.round(seconds * 1000) + " ms";
  if (seconds < 10) return seconds.toFixed(1) + " s";
  if (seconds < 60) return Math.floor(seconds) + " s";
  const whole = Math.floor(seconds);
  if (whole < 3600) return pair(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 86400) return pair(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
  return pair(Math.floor(whole / 86400), "d", Math.floor((whole % 86400) / 3600), "h");
}

/** Return a duration for a column: "340 ms", "31 s", "12m 5s", "3h 20m", "2d 4h". */
export const shortDuration = (seconds) => duration(seconds).replace(/(\d) (min|h|d)/g, (_, digit, unit) => digit + unit[0]).replace(/([mhd]) (\d+) s/, "$1 $2s");
const pair = (big, unit, small, less) => `${big} ${unit}` + (small ? ` ${small} ${less}` : "");

/** Return how long ago: "now", "12 s ago", "5 min ago", "3 h ago", "4 d ago". */
export function age(seconds) {
  if (seconds < 1) return words.now;
  const [size, unit] = seconds < 60 ? [1, "s"] : seconds < 3600 ? [60, "min"] : seconds < 86400 ? [3600, "h"] : [86400, "d"];
  return words.ago(Math.floor(seconds / size) + " " + unit);
}

const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** Return a text of a job or host with control and direction characters made visible: they could change what is read. */
export const visible = (text) => String(text ?? "").replace(UNSEEN, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));

/** Return the JSON text of a queue's name: as it was sent, where the API gave its text. */
export const queueName = (queue) => visible(typeof queue.name === "string" ? queue.name : JSON.stringify(queue.name));

/** Return a whole number with separators: "1,523". */
export const count = (number) => Number(number).toLocaleString("en");

/** Return a size: "380 kB". */
export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (size >= 1000 && place < units.length - 1) [size, place] = [size / 1000, place + 1];
  return (place && size < 10 ? size.toFixed(1) : Math.round(size)) + " " + units[place];
}

const tickers = new Set();
let ticking = 0;

/** Return the time now in seconds; the component is drawn again each second while `running` (and the tab is seen). */
export function useNow(running = true) {
  const [now, setNow] = useState(() => Date.now() / 1000);
  useEffect(() => {
    if (!running) return undefined;
    tickers.add(setNow);
    if (!ticking) ticking = setInterval(() => document.hidden || tickers.forEach((tick) => tick(Date.now() / 1000)), 1000);
    return () => {
      tickers.delete(setNow);
      if (!tickers.size) ticking = clearInterval(ticking) || 0;
    };
  }, [running]);
  return now;
}

/** A time: short on the page, in full as its title. */
export function Time({ at, none = "-" }) {
  useSettings();
  if (at === null || at === undefined) return html`<span class="dim">${none}</span>`;
  return html`<time datetime=${new Date(at * 1000).toISOString()} title=${fullTime(at)}>${shortTime(at)}</time>`;
}

// --- small parts ---------------------------------------------------------------------------------------------------

const ICONS = {
  queued: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 0 0 0-11M8 5v3.2l2.2 1.6",
  running: "M5 3.2v9.6L12.6 8z",
  returned: "M3 8.6l3.2 3.2L13 4.6",
  raised: "M8 2.2v7.2M8 12.4v1.2",
  failed: "M3.6 3.6l8.8 8.8M12.4 3.6l-8.8 8.8",
  cancelled: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 0 0 0-11M4.2 11.8l7.6-7.6",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9a4.5 4.5 0 0 0 0-9M10.3 10.3L14 14",
  close: "M4 4l8 8M12 4l-8 8",
  down: "M4 6l4 4l4-4",
  right: "M6 4l4 4l-4 4",
  left: "M10 4l-4 4l4 4",
  up: "M8 13V3M4 7l4-4l4 4",
  menu: "M2.5 4.5h11M2.5 8h11M2.5 11.5h11",
  filter: "M2.5 4h11M4.5 8h7M6.5 12h3",
  copy: "M5.5 5.5h7v8h-7zM3.5 10.5v-8h7",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  play: "M5 3.2v9.6L12.6 8z",
  warning: "M8 2.2L14.4 13.4H1.6zM8 6.4v3.4M8 11.4v.6",
  ok: "M3 8.6l3.2 3.2L13 4.6",
  live: "M8 4a4 4 0 1 0 0 8a4 4 0 0 0 0-8",
  more: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  help: "M5.8 6a2.2 2.2 0 1 1 3.4 1.9c-.8.5-1.2.9-1.2 1.8M8 12.6v.1",
};

/** A small drawing in the colour of the text. It says nothing to a screen reader: a word stands beside it. */
export function Icon({ name, size = 14 }) {
  return html`<svg class=${"icon icon-" + name} width=${size} height=${size} viewBox="0 0 16 16" aria-hidden="true" focusable="false"><path d=${ICONS[name] || ICONS.more} /></svg>`;
}

export const STATES = ["queued", "running", "returned", "raised", "failed", "cancelled"];

/** The state of a job: drawing, word and colour. */
export function State({ state }) {
  return html`<span class=${"state state-" + state}><${Icon} name=${state} />${words.states[state] || state}</span>`;
}

/** A button. `icon` names a drawing; `why` gives the reason when it is disabled. */
export function Button({ icon, children, kind = "", why, disabled, ...rest }) {
  return html`<button type="button" class=${"button " + kind} aria-disabled=${disabled ? "true" : undefined} title=${disabled ? why : rest.title}
    ...${rest} onClick=${disabled ? (event) => event.preventDefault() : rest.onClick}>${icon && html`<${Icon} name=${icon} />`}${children}</button>`;
}

/** A fault that the API reported, with the words that help: what, why, the request's number for the log. */
export function Fault({ error, retry }) {
  const away = error.constructor.name === "Away";
  return html`<div class="fault" role="alert">
    <${Icon} name="warning" size=${18} />
    <div>
      <strong>${away ? words.fault.away : error.title || words.fault.title}</strong>
      <p>${away ? words.fault.awayDetail : error.detail || error.message}</p>
      ${error.request && html`<p class="dim">${words.fault.request} <code>${error.request}</code></p>`}
      ${retry && html`<${Button} onClick=${retry}>${words.again}</${Button}>`}
    </div>
  </div>`;
}

/** What stands where nothing is: a title, and what to do about it. */
export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2>${children}</div>`;
}

/** Grey lines in the place of what is loading. They come after 300 ms, so that quick answers do not flicker. */
export function Loading({ lines = 8 }) {
  return html`<div class="loading" role="status" aria-label=${words.loading}>${Array.from({ length: lines }, (_, place) => html`<div key=${place} />`)}</div>`;
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
      <header><h2 id=${name}>${title}</h2><button type="button" class="button quiet" aria-label=${words.close} onClick=${() => element.current.close()}><${Icon} name="close" /></button></header>
      ${children}
    </div>
  </dialog>`;
}

const openMenus = new Set();

/** Return whether a menu is open: lists hold still then. */
export const menuIsOpen = () => openMenus.size > 0;

/** A button with a list under it. `children(close)` draws the list. It closes on Escape, a click elsewhere, or `close`. */
export function Menu({ label, icon, text, children, kind = "", list = "" }) {
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
    const outside = (event) => element.contains(event.target) || button.current?.contains(event.target) || setOpen(false);
    const scrolled = (event) => element.contains(event.target) || setOpen(false);
    addEventListener("pointerdown", outside, true);
    addEventListener("scroll", scrolled, true);
    addEventListener("resize", scrolled);
    return () => {
      openMenus.delete(element);
      removeEventListener("pointerdown", outside, true);
      removeEventListener("scroll", scrolled, true);
      removeEventListener("resize", scrolled);
    };
  }, [open]);
  function keys(event) {
    if (event.key === "Escape") {
      event.stopPropagation();
      event.preventDefault();
      close();
    }
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    if (/^(radio|text|datetime-local)$/.test(event.target.type)) return;
    event.preventDefault();
    const items = [...panel.current.querySelectorAll("a, button, input")];
    const step = event.key === "ArrowDown" ? 1 : -1;
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length]?.focus();
  }
  const left = (event) => event.relatedTarget && !panel.current?.contains(event.relatedTarget) && event.relatedTarget !== button.current && setOpen(false);
  return html`<button ref=${button} type="button" class=${"button " + kind} aria-expanded=${open ? "true" : "false"} aria-label=${typeof text === "string" && text ? undefined : label} title=${label} onClick=${() => setOpen(!open)}>
      ${icon && html`<${Icon} name=${icon} />`}${text}${text && html`<${Icon} name="down" size=${10} />`}
    </button>
    ${open && html`<div ref=${panel} popover="manual" class=${"menu-list " + list} onKeyDown=${keys} onFocusOut=${left}>${children(close)}</div>`}`;
}

const speakers = new Set();

/** Show a line at the foot of the page for some seconds, and say it to a screen reader. */
export const notify = (text, kind = "") => speakers.forEach((speaker) => speaker({ text, kind, at: Date.now() }));

/** The place where `notify` shows its lines. */
export function Notices() {
  const [notice, setNotice] = useState(null);
  useEffect(() => {
    speakers.add(setNotice);
    return () => speakers.delete(setNotice);
  }, []);
  useEffect(() => {
    if (!notice) return undefined;
    const timer = setTimeout(() => setNotice(null), 4000);
    return () => clearTimeout(timer);
  }, [notice]);
  return html`<div class="notices" role="status" aria-live="polite">${notice && html`<div class=${"notice " + notice.kind}>${notice.text}</div>`}</div>`;
}

/** Put a text into the clipboard, also where the browser has no Clipboard API (plain HTTP to a name). */
export async function copy(text, what = words.copied) {
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
  notify(what);
}

/** The ways to name a job elsewhere: id, link, curl, harp, Python. */
export function jobSpellings(id) {
  const page = location.origin + link("/jobs/" + id);
  return [
    [words.copyAs.id, id],
    [words.copyAs.link, page],
    [words.copyAs.curl, `curl -H "Authorization: Bearer $HARP_TOKEN" ${location.origin}${link("/api/v1/jobs/" + id)}`],
    [words.copyAs.harp, `harp show ${id}`],
    [words.copyAs.python, `harp.HarpCaller("${location.hostname}").job("${id}").result()`],
  ];
}

/** A menu that copies a job's id, link, or a line of curl, harp or Python. */
export function CopyMenu({ id, text = words.copy, kind = "" }) {
  return html`<${Menu} label=${words.copyAs.label} icon="copy" text=${text} kind=${kind}>
    ${(close) => jobSpellings(id).map(([name, spelling]) => html`<button key=${name} type="button" onClick=${() => { close(); copy(spelling, words.copiedAs(name)); }}>
      <span>${name}</span><code class="dim">${spelling}</code></button>`)}
  </${Menu}>`;
}

/** Set the title of the tab: a state's mark first, so that it is seen in a narrow tab. */
export function setTitle(text, state) {
  const mark = { queued: "◌ ", running: "▶ ", returned: "✓ ", raised: "! ", failed: "✕ ", cancelled: "⊘ " }[state] || "";
  document.title = mark + (text ? text + " - HARP" : "HARP");
}
