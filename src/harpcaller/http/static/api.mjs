// Requests to the HTTP API. Payloads (arguments, results) are asked for as texts (`payloads=text`):
// JavaScript's own numbers and key order would change them.
import { BASE } from "./router.mjs";

export const API = BASE + "/api/v1";

/** An answer that is not a success: `status`, `code`, `title`, `detail`, `request` and `problem`, the whole body. */
export class Problem extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail || problem.title || "HTTP " + status);
    Object.assign(this, { status, problem, retryAfter, code: problem.code, title: problem.title, detail: problem.detail, request: problem.request, errors: problem.errors });
  }
}

/** The dispatcher did not answer. */
export class Away extends Error {}

const watchers = new Set();

/** Call `watcher({away: bool})` or `watcher({loggedOut: true})` when requests show it. Return a function that stops it. */
export function watchRequests(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}
export const tellWatchers = (fact) => watchers.forEach((watcher) => watcher(fact));

/** Build an address of the API. `params`: an object, pairs, or URLSearchParams; empty values are left out. */
export function address(path, params) {
  const query = new URLSearchParams();
  const pairs = params?.[Symbol.iterator] ? params : Object.entries(params || {});
  for (const [name, value] of pairs) if (value !== undefined && value !== null && value !== "") query.append(name, value);
  const text = query.toString();
  return API + path + (text ? "?" + text : "");
}

/**
 * Send a request and return its `Response`, whose status is a success (or 304).
 * Throws `Problem`, `Away`, or the AbortError of `signal`.
 */
export async function send(method, path, { params, body, headers, signal, quiet } = {}) {
  let response;
  try {
    response = await fetch(address(path, params), {
      method,
      signal,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    tellWatchers({ away: true });
    throw new Away();
  }
  if (response.ok || response.status === 304) {
    tellWatchers({ away: false });
    return response;
  }
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // A proxy's page: the status says enough.
  }
  if (response.status === 401 && !quiet) tellWatchers({ loggedOut: true });
  if ([502, 503, 504].includes(response.status) && !problem.code) {
    tellWatchers({ away: true });   // a proxy answers for a dispatcher that is away
    throw new Away();
  }
  throw new Problem(response.status, problem, Number(response.headers.get("Retry-After")) || undefined);
}

const json = async (response) => (response.status === 204 || response.status === 304 ? null : response.json());

export const get = async (path, params, options) => json(await send("GET", path, { params, ...options }));
export const post = async (path, body, options) => json(await send("POST", path, { body, ...options }));
export const del = async (path, options) => json(await send("DELETE", path, { ...options }));

/** Return a new key for `Idempotency-Key`: 128 random bits, so that a repeated request makes no second job. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
