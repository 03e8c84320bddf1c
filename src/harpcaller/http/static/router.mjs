// The address bar is the state of every view: its path, and, for lists, the filter. `BASE` is found from this module's
// own address: BASE/static/<hash>/router.mjs.
import { useEffect, useReducer, useState } from "./vendor/hooks.mjs";

export const BASE = new URL("../../", import.meta.url).pathname.replace(/\/$/, "");

/** Return something that `tell`s a value to all functions that `follow` it; `follow` returns a function that ends that. */
export function makeSignal() {
  const followers = new Set();
  return {
    tell: (value) => [...followers].forEach((follower) => follower(value)),
    follow(follower) {
      followers.add(follower);
      return () => followers.delete(follower);
    },
  };
}

/** Return a function that draws the component again. */
export const useRedraw = () => useReducer((number) => number + 1, 0)[1];

/** Draw the component again when the signal tells something. */
export function useSignal(signal) {
  const redraw = useRedraw();
  useEffect(() => signal.follow(redraw), []);
}

/** Return pairs or an object as query parameters; empty values are left out. */
export function parameters(params) {
  const pairs = params?.[Symbol.iterator] ? params : Object.entries(params || {});
  return new URLSearchParams([...pairs].filter(([, value]) => ![undefined, null, ""].includes(value)));
}

/** Return the address of a view, with the base path. */
export function link(path, params) {
  // Commas and stars of filters are easier to read, and allowed, as they are.
  const query = parameters(params).toString().replaceAll("%2C", ",").replaceAll("%3A", ":").replaceAll("%2F", "/");
  return BASE + path + (query ? "?" + query : "");
}
export const jobLink = (id) => link("/jobs/" + id);
export const hostLink = (name) => link("/hosts/" + encodeURIComponent(name));

let returned = false;          // whether the reader came back: by the browser's buttons, or from a job to its list
let before = location.pathname.slice(BASE.length);
let list = before === "/jobs" ? location.search : "";  // the query of the latest list of jobs

/** Return the address of the list of jobs as the reader left it. */
export const listAddress = () => BASE + "/jobs" + list;

function current() {
  const { pathname, search, hash, href } = location;
  const path = pathname.startsWith(BASE) ? pathname.slice(BASE.length) || "/" : pathname;
  return { path, query: new URLSearchParams(search), hash, href, returned };
}

const moves = makeSignal();
function announce() {
  const place = current();
  if (place.path === "/jobs") list = location.search;
  before = place.path;
  moves.tell(place);
}

/** Go to an address; `replace` leaves no entry in the history. */
export function navigate(href, { replace = false } = {}) {
  const target = new URL(href, location.href);
  const same = target.href === location.href;
  returned = before.startsWith("/jobs/") && target.href.endsWith(listAddress());
  history[replace || same ? "replaceState" : "pushState"](null, "", target);
  announce();
}

/** Return `{path, query, hash, href, returned}` of the present address (`returned`: the reader was there before). */
export function useRoute() {
  const [place, setPlace] = useState(current);
  useEffect(() => {
    setPlace((drawn) => drawn.href === location.href ? drawn : current());   // a navigation before this effect
    return moves.follow(setPlace);
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

// --- filters: the query of the address is the API's own filter; nothing is kept beside it ----------------------------

/** Where a search text without keys is looked for. */
export const SEARCHED = "Words are searched for in procedure, host, info and the message of the end.";

/** The parameters that say which jobs, in the order in which they are shown. */
const FILTERS = ["q", "id", "state", "procedure", "host", "queue", "owner", "end_type", "stop", "holds_slot", "from", "to", "started_from", "started_to", "ended_from", "ended_to", "info", "arguments", "rerun_of"];

/** Filters that are often used, by their names. */
export const COMMON_VIEWS = [
  ["Failed or raised, last 24 hours", "state=bad&ended_from=-24h"],
  ["Queued and running", "state=open"],
  ["Stop not confirmed", "stop=pending,failed,unknown"],
  ["Ended, but holding a slot", "state=ended&holds_slot=1"],
];

export const ENDED = ["returned", "raised", "failed", "cancelled"];

/** Values that stand for several states. */
const STATE_GROUPS = { open: ["queued", "running"], bad: ["raised", "failed"], ended: ENDED };

/** Return the query with only what chooses jobs, in one order: equal filters have equal texts. */
export function normal(query) {
  const known = FILTERS.flatMap((name) => query.getAll(name).map((value) => [name, value]));
  const unknown = [...query].filter(([name]) => !FILTERS.includes(name) && name !== "order");   // the API names these
  return parameters([...known, ...unknown]);
}

/**
 * Return the filter of a search text. A word `KEY:VALUE` becomes the parameter, so that counts and chips show it; beside
 * the text, both would count. What has quotation marks, is there twice, or is no filter stays text for the dispatcher.
 */
export function searched(text) {
  const query = new URLSearchParams();
  const parts = text.match(/(?:"[^"]*"?|[^\s"])+/g) || [];
  const rest = parts.filter((part) => {
    const [, key, value] = /^([a-z_]+):([^\s":\\]+)$/.exec(part) || [];
    const isText = !FILTERS.includes(key) || ["q", "info", "arguments"].includes(key) || parts.filter((other) => other.startsWith(key + ":")).length > 1;
    if (!isText) query.set(key, value);
    return isText;
  });
  return parameters([["q", rest.join(" ")], ...query]);
}

/** Return the values of one parameter, states of a group one by one. */
export function valuesOf(query, name) {
  const values = (query.get(name) || "").split(",").filter(Boolean);
  return name === "state" ? values.flatMap((value) => STATE_GROUPS[value] || [value]) : values;
}

/** Return the query with one parameter set, or without it when there is no value. */
export function withValue(query, name, value) {
  const result = new URLSearchParams(query);
  result.set(name, value ?? "");   // of a list: its values, by commas
  return parameters(result);
}

/**
 * Return the query after a click on a value: it alone; taken out if it was alone; with `add`, added or taken out.
 * A filter has one queue.
 */
export function toggled(query, name, value, add) {
  const values = valuesOf(query, name);
  const rest = values.filter((other) => other !== value);
  if (add && name !== "queue") return withValue(query, name, values.includes(value) ? rest : [...values, value]);
  return withValue(query, name, values.length === 1 && !rest.length ? null : value);
}

/** Return the parts of a filter as [name, value, text], for chips and for the question which part excludes all. */
export function partsOf(query, queueNames = new Map()) {
  return [...normal(query)].map(([name, value]) => {
    if (name === "queue") return [name, value, value === "-" ? "no queue" : queueNames.get(value) || value.slice(0, 8)];
    return [name, value, ["q", "info", "arguments"].includes(name) ? value : value.replaceAll(",", ", ")];
  });
}
