// The records of one job, in a worker: a cache of pages by number, the live stream, and the search.
//
// From the page: {open}, {view}, {find}, {whole}, {seek}, {pause}. To the page: {count, ..., view, found}, {whole},
// {sought}, {ended}, {refused}, {unread}. Records are cut out of the lines as text; no number in them is ever read.

import { sleep, takeSlot } from "./slots.mjs";

const PAGE = 1000; // records of a page
const MOST_CACHED = 32 * 2 ** 20; // characters of all pages: 64 MB at most
const MOST_KEPT = 65536; // characters of one record; the rest is counted only
const MOST_SENT = 4200; // characters of one record that a row of the view has
const MOST_MATCHES = 1000000;
const TICK = 80; // milliseconds between two messages to the page
const LATE = 20000; // milliseconds after which a page is asked for again, and a silent stream is taken for one that a proxy holds back
const PART = "limit=10000&bytes=8388608"; // of what is asked for at once
const PREFIX = /^\{"packet":(\d+),"time":([^,]+),"data":/;

let base = ""; // the address of the job's records
let count = 0; // records that are known to exist
let bytes = 0; // of the records that came live
let averageLength = 100;
let hasEnded = false;
let isPaused = false;
let follower = null; // the AbortController of the live stream
let view = null; // {id, first, last, list: "all" | "matches" | "tail"}
let isDirty = false;
let timer = null;
const pages = new Map(); // number of the page -> {texts, times, lengths, size}; the last one is the latest used
let cached = 0;
let hasCaughtUp = false; // with what was stored before
const arrivals = []; // [time, count] of the last seconds

// The cache.

function pageOf(number) {
  const key = Math.floor(number / PAGE);
  let page = pages.get(key);
  if (page) pages.delete(key);
  else page = { texts: new Array(PAGE), times: new Float64Array(PAGE), lengths: new Array(PAGE), size: 0 };
  pages.set(key, page);
  return page;
}

function keep(number, time, text, length) {
  const page = pageOf(number);
  const index = number % PAGE;
  if (page.texts[index] === undefined) {
    page.size += text.length + 100;
    cached += text.length + 100;
  }
  page.texts[index] = text;
  page.times[index] = time;
  page.lengths[index] = length;
  while (cached > MOST_CACHED && pages.size > 2) {
    const [oldest, { size }] = pages.entries().next().value;
    pages.delete(oldest);
    cached -= size;
  }
}

function get(number) {
  const page = pages.get(Math.floor(number / PAGE));
  const index = number % PAGE;
  if (!page || page.texts[index] === undefined) return [number];
  return [number, page.times[index], page.texts[index].slice(0, MOST_SENT), page.lengths[index]];
}

// Reading lines. A line longer than `most` is cut, so that a record of any size needs little memory.

async function readLines(response, most, onLine, onData) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let head = "";
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onData();
    let start = 0;
    for (let end; (end = value.indexOf("\n", start)) >= 0; start = end + 1) {
      if (length) {
        if (head.length < most) head += value.slice(start, Math.min(end, start + most));
        onLine(head, length + end - start);
        head = "";
        length = 0;
      } else if (end > start) onLine(value.slice(start, Math.min(end, start + most)), end - start);
    }
    if (start < value.length) {
      if (head.length < most) head += value.slice(start, start + most);
      length += value.length - start;
    }
  }
}

/** An answer that is no success, which would be the same again; `status` is that of the answer. */
class Refused extends Error {}

/** Ask for records; call `onRecord([number, time, text, length])` for each, and return the line after the last one. */
async function read(query, signal, onRecord, most = MOST_KEPT, onData = () => null) {
  const response = await fetch(`${base}${query}&timed=1`, { signal, headers: { Accept: "application/jsonl, application/problem+json" } });
  if (!response.ok) {
    const { status } = response;
    const { detail } = await response.json().catch(() => ({}));
    // A status line that was cut is one, too: "HTTP/1.1 20".
    const mayPass = status < 400 || status === 429 || status >= 500;
    throw Object.assign(new (mayPass ? Error : Refused)(detail ?? response.statusText), { status });
  }
  let last = "";
  await readLines(response, most + 100, (line, length) => {
    const [head, number, time] = PREFIX.exec(line) ?? [];
    if (!head) return void (last = line);
    const whole = length - head.length - 1;
    onRecord([Number(number), Number(time), line.slice(head.length, head.length + whole), whole]);
  }, onData);
  return last;
}

// Live.

async function follow() {
  const controller = (follower = new AbortController());
  const { signal } = controller;
  let isLive = await takeSlot(signal);
  let pause = 250;
  let next = Math.max(0, count - 500);
  while (!signal.aborted && !hasEnded) {
    let last = "";
    const silence = new AbortController(); // the dispatcher sends an empty line every 15 s
    const watchdog = setTimeout(() => {
      isLive = false;
      silence.abort();
    }, LATE);
    try {
      last = await read(`since=${next}&${isLive ? "follow=1" : PART}`, AbortSignal.any([signal, silence.signal]), (record) => {
        pause = 250;
        keep(...record);
        next = record[0] + 1;
        if (next > count) {
          bytes += record[3];
          count = next;
        }
        isDirty = true;
        schedule();
      }, MOST_KEPT, () => clearTimeout(watchdog));
    } catch (error) {
      if (error instanceof Refused && !signal.aborted) return postMessage({ refused: error.status });
    } finally {
      clearTimeout(watchdog);
    }
    if (signal.aborted) return;
    const isCut = last === "" || last.startsWith('{"interrupted"');
    if (!isCut && !last.startsWith('{"continue"')) {
      controller.abort(); // this gives the lock back
      hasEnded = true;
      report();
      return postMessage({ ended: true });
    }
    if (!isCut && JSON.parse(last).next < count) continue;
    await sleep(isLive ? pause : 5000, signal);
    pause = Math.min(pause * 2, 5000);
  }
}

function schedule() {
  timer ??= setTimeout(report, TICK);
}

function report() {
  clearTimeout(timer);
  timer = null;
  const now = performance.now();
  if (hasCaughtUp) arrivals.push([now, count]);
  else if (follower && count > 0) hasCaughtUp = true;
  while (arrivals.length > 2 && arrivals[0][0] < now - 2000) arrivals.shift();
  const [before, had] = arrivals[0] ?? [now, count];
  const rate = now - before > 500 ? ((count - had) * 1000) / (now - before) : 0;
  const message = { count, bytes, rate };
  if (view && isDirty) {
    isDirty = false;
    message.view = answer();
  }
  if (search) message.found = { text: search.text, count: search.matches.length, scanned: Math.max(search.scanned, search.matches[search.matches.length - 1] ?? 0), isDone: search.isDone, isMost: search.isMost };
  postMessage(message);
  if (search) search.wake();
}

// The view: rows first..last of a list.

function answer() {
  let { first, last } = view;
  const total = view.list === "matches" ? (search?.matches.length ?? 0) : count;
  if (view.list === "tail") {
    first = Math.max(0, total - (last - first));
    last = total;
  }
  last = Math.min(last, total);
  const rows = [];
  for (let index = first; index < last; index++) rows.push(get(view.list === "matches" ? search.matches[index] : index));
  const missing = rows.filter((row) => row.length === 1).map((row) => row[0]);
  if (missing.length) load(missing[0], missing[missing.length - 1]);
  return { id: view.id, first, total, rows };
}

let loading = null; // {first, last, controller}

async function load(first, last) {
  if (loading) {
    if (first >= loading.first && first <= loading.last) return;
    loading.controller.abort();
  }
  const page = first - (first % PAGE);
  const isMatches = view.list === "matches";
  // The whole page, unless its records are so long that the wanted ones would come late.
  const since = isMatches || (first - page) * averageLength > 2 ** 19 || get(page).length > 1 ? first : page;
  const filter = isMatches ? search.query : "";
  const end = last - (last % PAGE) + PAGE; // of the page of the last one: a window over two pages needs one answer
  const limit = isMatches ? 200 : end - since;
  const mine = (loading = { first: since, last: isMatches ? last : end - 1, controller: new AbortController() });
  let problem = null;
  try {
    const signal = AbortSignal.any([mine.controller.signal, AbortSignal.timeout(LATE)]);
    let number = 0;
    let size = 0;
    await read(`since=${since}&limit=${limit}&bytes=1048576${filter}`, signal, (record) => {
      keep(...record);
      count = Math.max(count, record[0] + 1);
      number++;
      size += record[3];
    });
    if (number) averageLength = size / number;
    else problem = "no records came";
  } catch (error) {
    if (mine.controller.signal.aborted) return;
    problem = error.message;
  }
  if (loading === mine) loading = null;
  if (problem) {
    postMessage({ unread: problem });
    await sleep(2000);
  }
  isDirty = true;
  if (!loading) report();
}

// The search, on the server, over the whole stream: matches are counted to the end, also while the job runs.

let search = null;

class Search {
  constructor(text) {
    this.text = text;
    this.query = `&grep=${encodeURIComponent(text)}&fold=1`;
    this.matches = [];
    this.scanned = 0; // records before this number were looked at
    this.isDone = false; // up to the newest record that is known
    this.isMost = false;
    this.controller = new AbortController();
    this.wake = () => null;
    this.run();
  }

  async run() {
    const { signal } = this.controller;
    while (!signal.aborted) {
      let last = "";
      try {
        last = await read(`since=${this.scanned}&${PART}${this.query}`, signal, (record) => {
          if (this.matches.length < 2000) keep(...record);
          if (this.matches.length < MOST_MATCHES) this.matches.push(record[0]);
          else this.isMost = true;
        });
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Refused) return postMessage({ unread: error.message });
        await sleep(1000, signal);
        continue;
      }
      const next = last.startsWith('{"continue"') ? JSON.parse(last).next : last ? Infinity : this.scanned;
      if (signal.aborted) return;
      this.scanned = Math.min(next, Math.max(count, this.scanned));
      this.isDone = next === Infinity || this.scanned >= count || this.isMost;
      isDirty = true;
      schedule();
      if (next === Infinity && hasEnded) return;
      while (this.isDone && !signal.aborted && !(count > this.scanned)) {
        await new Promise((resolve) => {
          this.wake = resolve;
          signal.addEventListener("abort", resolve, { once: true });
        });
      }
      if (this.isDone) await sleep(500, signal);
      this.isDone = false;
      if (this.isMost) return;
    }
  }

  /** Return the index of the first match from `number` on, or of the last one before it; it goes round. */
  seek(number, isForward) {
    const { matches } = this;
    if (!matches.length) return null;
    let low = 0;
    let high = matches.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (matches[middle] < number) low = middle + 1;
      else high = middle;
    }
    return isForward ? low % matches.length : (low - 1 + matches.length) % matches.length;
  }
}

async function readWhole(number) {
  try {
    await read(`since=${number}&limit=1&bytes=8388608`, null, ([found, , text]) => found === number && postMessage({ whole: { number, text } }), Infinity);
  } catch (error) {
    postMessage({ unread: error.message });
  }
}

onmessage = ({ data }) => {
  if (data.open) {
    ({ base, count, hasEnded } = data.open);
    if (count) averageLength = data.open.bytes / count;
    bytes = data.open.bytes;
    if (!hasEnded) follow();
    else report();
  } else if (data.view !== undefined) {
    view = data.view; // null: the rows are not shown
    if (!view) return;
    isDirty = true;
    if (view.list === "tail") schedule();
    else report();
  } else if (data.find !== undefined) {
    search?.controller.abort();
    search = data.find ? new Search(data.find) : null;
    isDirty = true;
    report();
  } else if (data.seek) {
    const index = search?.seek(data.seek.number, data.seek.isForward) ?? null;
    postMessage({ sought: index === null ? null : { index, number: search.matches[index] } });
  } else if (data.whole !== undefined) readWhole(data.whole);
  else if (data.pause !== undefined && data.pause !== isPaused) {
    isPaused = data.pause;
    if (isPaused) follower?.abort();
    else if (!hasEnded) follow();
  }
};
