// The address bar is the state of every view. `BASE` is found from this module's own address:
// BASE/static/<hash>/router.mjs.
import { useEffect, useState } from "./vendor/hooks.mjs";

export const BASE = new URL("../../", import.meta.url).pathname.replace(/\/$/, "");

/** Return the address of a view, with the base path. `params` are query parameters; empty ones are left out. */
export function link(path, params) {
  const query = params instanceof URLSearchParams ? params : new URLSearchParams();
  if (params && query !== params)
    for (const [name, value] of Object.entries(params)) if (value !== undefined && value !== null && value !== "") query.set(name, value);
  // Commas and stars of filters are easier to read, and allowed, as they are.
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%3A", ":").replaceAll("%2F", "/");
  return BASE + path + (text ? "?" + text : "");
}

let returned = false;          // whether the reader came back: by the browser's buttons, or from a job to its list
let before = location.pathname.slice(BASE.length);
let list = before === "/jobs" ? location.search : "";  // the query of the latest list of jobs

/** Return the address of the list of jobs as the reader left it. */
export const listAddress = () => BASE + "/jobs" + list;

function current() {
  const { pathname, search, hash } = location;
  const path = pathname.startsWith(BASE) ? pathname.slice(BASE.length) || "/" : pathname;
  return { path, query: new URLSearchParams(search), hash, key: pathname + search, returned };
}

const listeners = new Set();
const announce = () => {
  const place = current();
  if (place.path === "/jobs") list = location.search;
  before = place.path;
  for (const listener of [...listeners]) listener(place);
};

/** Go to an address; `replace` leaves no entry in the history. */
export function navigate(href, { replace = false } = {}) {
  const target = new URL(href, location.href);
  const same = target.href === location.href;
  returned = before.startsWith("/jobs/") && target.href.endsWith(listAddress());
  history[replace || same ? "replaceState" : "pushState"](null, "", target);
  announce();
}

/**
 * Return `{path, query, hash, key, returned}` of the present address (`returned`: the reader was there before); the
 * component is drawn again when it changes.
 */
export function useRoute() {
  const [place, setPlace] = useState(current);
  useEffect(() => {
    listeners.add(setPlace);
    setPlace(current());   // a navigation between the first drawing and this effect
    return () => listeners.delete(setPlace);
  }, []);
  return place;
}

const OUTSIDE = /^\/(api|static|docs|metrics|healthz|readyz)(\/|$)/;

addEventListener("popstate", () => {
  returned = true;
  announce();
});
// Links are plain anchors, so that the middle button, "copy link" and new tabs work; only a plain click stays here.
addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const anchor = event.composedPath().find((node) => node.nodeName === "A" && node.href);
  if (!anchor || anchor.target || anchor.hasAttribute("download") || anchor.origin !== location.origin) return;
  if (!anchor.pathname.startsWith(BASE) || OUTSIDE.test(anchor.pathname.slice(BASE.length))) return;
  if (anchor.hash && anchor.pathname + anchor.search === location.pathname + location.search && anchor.dataset.inPage !== undefined) return;
  event.preventDefault();
  navigate(anchor.href);
});
