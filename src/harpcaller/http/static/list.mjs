// The rows of the job list: what was fetched, what came live, and what waits until the reader asks for it.
import { get, watchRequests } from "./api.mjs";

const PAGE = 100;
const FAST_PAGE = 500;
export const HELD = 100_000;

const cache = new Map();   // by query: lists that "back" shows again at once

/** Return the list of a query: the one of before when the reader came back to it, else a new one. */
export function listOf(key, query, back) {
  let list = cache.get(key);
  if (!list || !back) list = new JobList(query);
  cache.delete(key);
  cache.set(key, list);
  if (cache.size > 5) cache.delete(cache.keys().next().value);
  return list;
}

// Another person may log in.
watchRequests(({ loggedOut }) => loggedOut && cache.clear());

class JobList {
  rows = [];
  byId = new Map();
  pending = new Map();       // rows that came while the reader was in the list
  stale = false;             // so much came that the list must be asked for again
  next = undefined;          // cursor; undefined: nothing was asked for yet; null: the end
  searchedTo = null;
  complete = false;
  short = false;             // the last page was not full: going on is the reader's choice
  loading = null;
  error = null;
  scrollTop = 0;
  cursor = null;             // id of the row that the keys are at
  changed = () => {};
  steady = () => false;      // whether rows must not move now

  constructor(query) {
    this.query = query;
    this.oldestFirst = query.get("order") === "oldest";
  }

  /** Ask for the next page, or for the first. */
  async more(limit = this.rows.length > 1_000 ? FAST_PAGE : PAGE) {
    if (this.loading || this.next === null || this.rows.length >= HELD) return;
    this.loading = new AbortController();
    this.changed();
    try {
      const page = await this.#ask({ limit, cursor: this.next }, this.loading.signal);
      this.error = null;
      for (const row of page.jobs) if (!this.byId.has(row.job)) this.#put(row, this.rows.length);
      this.#setEnd(page, limit);
    } catch (error) {
      if (error.name !== "AbortError") this.error = error;
    }
    this.loading = null;
    this.changed();
  }

  /** Ask for all again from the start. */
  async reload() {
    this.loading?.abort();
    const first = await this.#first();
    if (first) this.#replace(first);
    this.changed();
  }

  /** Ask for the first page and take its changes over. */
  async refresh() {
    if (this.next === undefined) return this.more();
    const first = await this.#first();
    if (!first) return this.changed();
    const known = first.jobs.some((row) => this.byId.has(row.job));
    if (!known && this.rows.length && first.jobs.length) {
      if (this.steady()) this.stale = true;
      else this.#replace(first);
    } else if (this.rows.length <= first.jobs.length && !this.steady()) this.#replace(first);
    else {
      const seen = new Set(first.jobs.map((row) => row.job));
      const last = first.jobs.at(-1);
      this.take({ rows: first.jobs, left: [] });
      for (const row of this.rows) {
        if (last && first.next !== null && this.#before(last, row)) break;
        if (!seen.has(row.job)) row.gone = true;
      }
    }
    return this.changed();
  }

  /** Take the data of a `jobs` event. */
  take({ rows, left, more }) {
    for (const row of rows) {
      const held = this.byId.get(row.job);
      if (held) Object.assign(held, row, { gone: false });
      else if (this.steady()) {
        if (this.#belongs(row)) this.pending.set(row.job, row);
      } else if (this.#belongs(row)) this.#insert(row);
    }
    for (const id of left || []) {
      this.pending.delete(id);
      const held = this.byId.get(id);
      if (held) held.gone = true;
    }
    this.changed();
    if (more) this.refresh();
  }

  /** Show the rows that waited; rows that no longer fit go. */
  showPending() {
    if (this.stale) {
      this.stale = false;
      this.pending.clear();
      return this.reload();
    }
    this.rows = this.rows.filter((row) => !row.gone || !this.byId.delete(row.job));
    for (const row of this.pending.values()) this.#insert(row);
    this.pending.clear();
    return this.changed();
  }

  async #first() {
    try {
      const page = await this.#ask({ limit: PAGE });
      this.error = null;
      return page;
    } catch (error) {
      if (error.name !== "AbortError") this.error = error;
      return null;
    }
  }

  #ask(options, signal) {
    const params = new URLSearchParams(this.query);
    params.set("payloads", "text");
    for (const [name, value] of Object.entries(options)) if (value) params.set(name, value);
    return get("/jobs", params, { signal });
  }

  #replace(page) {
    this.rows = [];
    this.byId.clear();
    this.pending.clear();
    this.stale = false;
    for (const row of page.jobs) this.#put(row, this.rows.length);
    this.#setEnd(page, PAGE);
  }

  #setEnd(page, limit) {
    this.next = page.next;
    this.complete = page.complete;
    this.searchedTo = page.searched_to;
    this.short = page.jobs.length < limit;
  }

  #put(row, place) {
    this.rows.splice(place, 0, row);
    this.byId.set(row.job, row);
  }

  /** Whether `one` stands before `other` in this list. */
  #before(one, other) {
    const order = one.time.submit - other.time.submit || (one.job < other.job ? -1 : 1);
    return this.oldestFirst ? order < 0 : order > 0;
  }

  #belongs(row) {
    return this.next === null || !this.rows.length || this.#before(row, this.rows.at(-1));
  }

  #insert(row) {
    let low = 0;
    for (let high = this.rows.length; low < high; ) {
      const middle = (low + high) >> 1;
      if (this.#before(this.rows[middle], row)) low = middle + 1;
      else high = middle;
    }
    this.#put(row, low);
  }
}
