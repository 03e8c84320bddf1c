// Requests to the HTTP API, and its stream of events. Payloads (arguments, results) are asked for as texts
// (`payloads=text`): JavaScript's own numbers and key order would change them.
import { BASE, makeSignal, parameters, useSignal } from "./router.mjs";
import { sleep, takeSlot } from "./slots.mjs";
import { useEffect, useRef } from "./vendor/hooks.mjs";

/** An answer that is not a success: `status` and the members of its body, such as `code`, `title`, `detail`. */
export class Problem extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || "HTTP " + status);
    Object.assign(this, problem, { status, retryAfter });
  }
}

/** The dispatcher did not answer. */
export class Away extends Error {
  title = "The dispatcher does not answer";
  detail = "The page tries again by itself.";
}

/** What requests show: {away: bool}, {loggedOut: true}, {restarted: true}, or {back: true}. */
export const facts = makeSignal();

/** Return an address of the API. `params`: an object, pairs, or URLSearchParams; empty values are left out. */
export function address(path, params) {
  const query = parameters(params).toString();
  return BASE + "/api/v1" + path + (query ? "?" + query : "");
}

const asked = new Map();   // by addresses: answers that were asked for before a view needs them

/** Ask for what a view will need; it asks again for what was not answered, or refused. */
export function askEarly(path, params) {
  const url = address(path, params);
  const answer = fetch(url, { cache: "no-store", redirect: "error" });
  asked.set(url, answer);
  answer.then((response) => response.ok || asked.delete(url), () => asked.delete(url));
}

/**
 * Send a request and return its `Response`, whose status is a success.
 * Throws `Problem`, `Away`, or the AbortError of `signal`.
 */
export async function send(method, path, { params, body, headers, signal, quiet } = {}) {
  const url = address(path, params);
  const early = method === "GET" && asked.get(url);
  asked.delete(url);
  let response;
  try {
    response = await (early || fetch(url, {
      method,
      signal,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: JSON.stringify(body),
      cache: "no-store",
      redirect: "error",
    }));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    facts.tell({ away: true });
    throw new Away();
  }
  if (response.ok) {
    facts.tell({ away: false });
    return response;
  }
  const problem = await response.json().catch(() => ({}));   // a proxy sends a page
  if (response.status === 401 && !quiet) facts.tell({ loggedOut: true });
  if (response.status < 400 || ([502, 503, 504].includes(response.status) && !problem.code)) {
    facts.tell({ away: true });   // the status line was cut, or a proxy answers for a dispatcher that is away
    throw new Away();
  }
  throw new Problem(response.status, problem, Number(response.headers.get("Retry-After")) || undefined);
}

/** Return the value of a response's body. Throws `Away` if it was cut. */
export async function bodyOf(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    facts.tell({ away: true });
    throw new Away();
  }
}

const ask = async (...request) => {
  const response = await send(...request);
  return response.status === 204 ? null : bodyOf(response);
};
export const get = (path, params, options) => ask("GET", path, { params, ...options });
export const post = (path, body, options) => ask("POST", path, { body, ...options });
export const del = (path, options) => ask("DELETE", path, options);

/** Return a new key for `Idempotency-Key`: 128 random bits, so that a repeated request makes no second job. */
export const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// --- one stream of events for the tab ----------------------------------------------------------------------------
//
// The view that is open says which topics it needs and takes what comes; the frame shows whether the page is live. A
// hidden tab lets go of its stream after 10 s and goes on from the last event when it is seen again.

const HIDDEN_AFTER = 10_000;
const POLL_EVERY = 5_000;
const SILENT_AFTER = 40_000;   // the dispatcher sends a line every 15 s
const HELLO_WITHIN = 10_000;   // it sends the first one at once; else a proxy holds the stream back

let status = { state: "off", since: null };   // state: off, connecting, live, polling, paused, hidden, away
let view = null;                               // {topics, filter, handlers, lastId}
let running = null;                            // AbortController of the present stream, or of the wait for the next
let paused = false;
let boot = null;
let isHeldBack = false;                        // streams do not come through: ask, as a tab without a lock does
const statusChanges = makeSignal();

function setStatus(state) {
  // Trying again does not end an absence: only an answer does.
  if (status.state === state || (status.state === "away" && state === "connecting")) return;
  status = { state, since: Date.now() / 1000 };
  statusChanges.tell();
}

/** Return `{state, since}` of the tab's stream; the component is drawn again when it changes. */
export function useLiveStatus() {
  useSignal(statusChanges);
  return status;
}

/**
 * Follow the events of `topics` ("jobs,counts") under `filter` (a query string) while the component is there.
 * `handlers`: functions by event (`jobs`, `counts`), called with its data; and `refresh(reason)`, called when the view
 * must ask for everything again: after a gap, and every 5 s where there is no stream.
 */
export function useLive(topics, filter, handlers) {
  const latest = useRef(null);
  latest.current = handlers;
  useEffect(() => {
    if (!topics) return undefined;
    const mine = { topics, filter, handlers: latest, lastId: null };
    view = mine;
    start();
    return () => {
      if (view !== mine) return;
      view = null;
      stop();
      if (paused) return;
      if (status.state === "away") askUntilBack();
      else setStatus("off");
    };
  }, [topics, filter]);
}

/** Pause the stream, or go on with it from the last event. */
export function togglePause() {
  paused = !paused;
  if (paused) {
    stop();
    setStatus("paused");
  } else if (view) start();
  else setStatus("off");
}

function stop() {
  running?.abort();
  running = null;
}

function start() {
  stop();
  if (!view || paused) return;
  running = new AbortController();
  follow(view, running.signal);
}

async function follow(mine, signal) {
  setStatus("connecting");
  for (let failures = 0; !signal.aborted; ) {
    const attempt = new AbortController();
    const end = () => attempt.abort();
    signal.addEventListener("abort", end, { once: true });
    try {
      if (!isHeldBack && (await takeSlot(attempt.signal))) {
        await readStream(mine, attempt, () => (failures = 0));
        failures = Math.max(failures, 1);
        if (!signal.aborted) setStatus("away");
      } else {
        await poll(mine, signal);
        continue;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) return facts.tell({ loggedOut: true });
      // Too many streams of this principal, or none for it: ask, as a tab without a lock does.
      if (error.status < 500) {
        await poll(mine, signal);
        continue;
      }
      if (isHeldBack) continue;
      failures++;
      setStatus("away");
    } finally {
      attempt.abort();   // this gives the lock back
      signal.removeEventListener("abort", end);
    }
    await sleep(Math.min(5_000, 250 * 2 ** failures) * (0.75 + Math.random() / 2), signal);
  }
}

async function poll(mine, signal) {
  setStatus("polling");
  await sleep(POLL_EVERY, signal);
  if (!signal.aborted && !document.hidden) await mine.handlers.current.refresh?.("poll");
}

async function readStream(mine, attempt, connected) {
  const resumed = mine.lastId !== null;
  const headers = { Accept: "text/event-stream", ...(resumed && { "Last-Event-ID": mine.lastId }) };
  const params = [...new URLSearchParams(mine.filter), ["topics", mine.topics], ["payloads", "text"]];
  let watchdog = setTimeout(() => {
    isHeldBack = boot === null;
    attempt.abort();
  }, HELLO_WITHIN);
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => attempt.abort(), SILENT_AFTER);
  };
  try {
    const response = await fetch(address("/events", params), { headers, signal: attempt.signal, cache: "no-store" });
    if (!response.ok) throw new Problem(response.status, {});
    connected();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      alive();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const text of events) takeEvent(mine, text, resumed);
    }
  } finally {
    clearTimeout(watchdog);
  }
}

function takeEvent(mine, text, resumed) {
  const { event: name, data, id } = Object.fromEntries(text.split("\n").map((line) => (line.match(/^(\w*): ?(.*)$/) || []).slice(1)));
  mine.lastId = id ?? mine.lastId;
  if (!data || view !== mine) return;
  const handlers = mine.handlers.current;
  const content = JSON.parse(data);
  if (name === "hello") {
    setStatus("live");
    if (boot && boot !== content.boot) facts.tell({ restarted: true });
    boot = content.boot;
    // What changed between the view's first question and the start of the stream is in no event.
    if (!resumed) handlers.refresh?.("hello");
  } else if (name === "reset") handlers.refresh?.(content.reason);
  else handlers[name]?.(content);
}

let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) {
    hiding = setTimeout(() => {
      if (!running) return;
      stop();
      setStatus("hidden");
    }, HIDDEN_AFTER);
  } else if (view && !paused && !running) start();
});
addEventListener("online", () => view && !paused && start());

// Without a stream, such as that of a job that has ended, only requests find out that the dispatcher answers again.
let asking = 0;

function askUntilBack() {
  asking ||= setInterval(() => get("/me").catch(() => null), 2_000);
}

facts.follow(({ away }) => {
  if (away === true && !running && !paused) {
    setStatus("away");
    askUntilBack();
  }
  if (away === false) asking = clearInterval(asking) || 0;
  if (away === false && !running && status.state === "away") {
    setStatus("off");
    facts.tell({ back: true });
  }
});
