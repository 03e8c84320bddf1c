// One stream of events for the tab. The view that is open says which topics it needs and takes what comes; the frame
// shows whether the page is live. A hidden tab lets go of its stream after 10 s and goes on from the last event when
// it is seen again.
//
// A browser opens six connections to one address over HTTP/1.1, for all tabs together: a seventh stream would hang
// without an error. So tabs hold a lock for each stream, at most four, and a tab that gets none asks every 5 s.
import { address, get, Problem, tellWatchers, watchRequests } from "./api.mjs";
import { useEffect, useReducer, useRef } from "./ui.mjs";

const HIDDEN_AFTER = 10_000;
const POLL_EVERY = 5_000;
const SILENT_AFTER = 40_000;   // the dispatcher sends a line every 15 s
const SLOTS = 4;

let status = { state: "off", since: null };   // state: off, connecting, live, polling, paused, hidden, away
let view = null;                               // {key, topics, filter, handlers, lastId, started}
let running = null;                            // AbortController of the present stream, or of the wait for the next
let paused = false;
let boot = null;
const watchers = new Set();

function setStatus(state) {
  if (status.state === state) return;
  // Trying again does not end an absence: only an answer does.
  if (status.state === "away" && state === "connecting") return;
  status = { state, since: Date.now() / 1000 };
  watchers.forEach((redraw) => redraw());
}

/** Return `{state, since}` of the tab's stream; the component is drawn again when it changes. */
export function useLiveStatus() {
  const [, redraw] = useReducer((number) => number + 1, 0);
  useEffect(() => {
    watchers.add(redraw);
    return () => watchers.delete(redraw);
  }, []);
  return status;
}

/**
 * Follow the events of `topics` ("jobs,counts") under `filter` (a query string) while the component is there.
 * `handlers`: functions by event (`jobs`, `counts`, `queue`, `host`), called with its data; and `refresh(reason)`,
 * called when the view must ask for everything again: after a gap, and every 5 s where there is no stream.
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
      if (!paused) setStatus("off");
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

const wait = (time, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, time);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/** Hold one of the locks that count the streams of all tabs, until `signal` is aborted. False: none is free. */
export async function takeSlot(signal) {
  const shared = performance.getEntriesByType("navigation")[0]?.nextHopProtocol === "h2";
  if (shared || !navigator.locks) return true;   // one connection carries all streams; or nothing can count them
  for (let number = 1; number <= SLOTS; number++) {
    const taken = await new Promise((resolve) => {
      navigator.locks.request("harp-stream-" + number, { ifAvailable: true }, (lock) => {
        resolve(Boolean(lock));
        return lock && new Promise((release) => (signal.aborted ? release() : signal.addEventListener("abort", release, { once: true })));
      }).catch(() => resolve(false));
    });
    if (taken) return true;
    if (signal.aborted) return false;
  }
  return false;
}

function stop() {
  running?.abort();
  running = null;
}

function start() {
  stop();
  if (!view || paused) return;
  const control = new AbortController();
  running = control;
  follow(view, control.signal);
}

async function follow(mine, signal) {
  setStatus("connecting");
  for (let failures = 0; !signal.aborted; ) {
    const attempt = new AbortController();
    const end = () => attempt.abort();
    signal.addEventListener("abort", end, { once: true });
    try {
      if (await takeSlot(attempt.signal)) {
        await readStream(mine, attempt, () => (failures = 0));
        failures = Math.max(failures, 1);
        if (!signal.aborted) setStatus("away");
      } else {
        await poll(mine, signal);
        continue;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem) {
        if (error.status === 401) return tellWatchers({ loggedOut: true });
        // Too many streams of this principal, or none for it: ask, as a tab without a lock does.
        if (error.status < 500) {
          await poll(mine, signal);
          continue;
        }
      }
      failures++;
      setStatus("away");
    } finally {
      attempt.abort();   // this gives the lock back
      signal.removeEventListener("abort", end);
    }
    await wait(Math.min(5_000, 250 * 2 ** failures) * (0.75 + Math.random() / 2), signal);
  }
}

async function poll(mine, signal) {
  setStatus("polling");
  await wait(POLL_EVERY, signal);
  if (signal.aborted || document.hidden) return;
  await mine.handlers.current.refresh?.("poll");
}

async function readStream(mine, attempt, connected) {
  const headers = { Accept: "text/event-stream" };
  const resumed = mine.lastId !== null;
  if (resumed) headers["Last-Event-ID"] = mine.lastId;
  const params = new URLSearchParams(mine.filter);
  params.set("topics", mine.topics);
  params.set("payloads", "text");
  const response = await fetch(address("/events", params), { headers, signal: attempt.signal, cache: "no-store" });
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  connected();
  let watchdog = 0;
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => attempt.abort(), SILENT_AFTER);
  };
  alive();
  try {
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
  let name = "message";
  const data = [];
  for (const line of text.split("\n")) {
    const [, field, value] = line.match(/^(\w+): ?(.*)$/) || [];
    if (field === "event") name = value;
    else if (field === "data") data.push(value);
    else if (field === "id") mine.lastId = value;
  }
  if (!data.length || view !== mine) return;
  const handlers = mine.handlers.current;
  const content = JSON.parse(data.join("\n"));
  if (name === "hello") {
    setStatus("live");
    if (boot && boot !== content.boot) tellWatchers({ restarted: true });
    boot = content.boot;
    // What changed between the view's first question and the start of the stream is in no event.
    if (!resumed) handlers.refresh?.("hello");
  } else if (name === "reset") handlers.refresh?.(content.reason);
  else handlers[name]?.(content);
}

let hidden = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) {
    hidden = setTimeout(() => {
      if (!running) return;
      stop();
      setStatus("hidden");
    }, HIDDEN_AFTER);
  } else if (view && !paused && !running) start();
});
addEventListener("online", () => view && !paused && start());

// Views without a stream meet an absence by their own requests: ask until the dispatcher answers again.
let asking = 0;
watchRequests(({ away }) => {
  if (away === true && !running && !asking && !paused) {
    setStatus("away");
    asking = setInterval(() => get("/me").catch(() => null), 2_000);
  }
  if (away !== false) return;
  if (asking) {
    asking = clearInterval(asking) || 0;
    setStatus("off");
    tellWatchers({ back: true });
  }
});
