// Filters of the job list. The query of the address is the API's own filter; nothing is kept beside it.
import { words } from "./words.mjs";

/** The parameters that say which jobs, in the order in which they are shown. */
export const FILTERS = ["q", "id", "state", "procedure", "host", "queue", "owner", "end_type", "stop", "holds_slot", "from", "to", "started_from", "started_to", "ended_from", "ended_to", "info", "arguments", "rerun_of"];

/** Values that stand for several states. */
export const STATE_GROUPS = { open: ["queued", "running"], bad: ["raised", "failed"], ended: ["returned", "raised", "failed", "cancelled"] };

/** Return the query with only what chooses jobs, in one order: equal filters have equal texts. */
export function normal(query) {
  const result = new URLSearchParams();
  for (const name of FILTERS) for (const value of query.getAll(name)) if (value) result.append(name, value);
  for (const [name, value] of query) if (!FILTERS.includes(name) && name !== "order") result.append(name, value);   // the API names what it does not know
  return result;
}

/**
 * Return the filter of a search text. A word `KEY:VALUE` becomes the parameter, so that counts and chips show it; beside
 * the text, both would count. What has quotation marks, is there twice, or is no filter stays text for the dispatcher.
 */
export function searched(text) {
  const words = text.match(/(?:"[^"]*"?|[^\s"])+/g) || [];
  const keys = words.map((word) => /^([a-z_]+):[^\s":\\]+$/.exec(word)?.[1]);
  const moves = (key) => FILTERS.includes(key) && !["q", "info", "arguments"].includes(key) && words.filter((word) => word.startsWith(key + ":")).length === 1;
  const query = new URLSearchParams();
  const rest = words.filter((word, place) => !moves(keys[place]));
  if (rest.length) query.set("q", rest.join(" "));
  words.forEach((word, place) => moves(keys[place]) && query.set(keys[place], word.slice(keys[place].length + 1)));
  return query;
}

/** Return the values of one parameter, states of a group one by one. */
export function valuesOf(query, name) {
  const values = (query.get(name) || "").split(",").filter(Boolean);
  return name === "state" ? values.flatMap((value) => STATE_GROUPS[value] || [value]) : values;
}

/** Return the query with one parameter set, or without it when there is no value. */
export function withValue(query, name, value) {
  const result = new URLSearchParams(query);
  if (value === null || value === "" || (Array.isArray(value) && !value.length)) result.delete(name);
  else result.set(name, Array.isArray(value) ? value.join(",") : value);
  return result;
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
  const lists = ["state", "procedure", "host", "owner", "end_type", "stop"];
  return [...normal(query)].map(([name, value]) => {
    const shown = name === "queue" ? value === "-" ? words.jobs.noQueue : queueNames.get(value) || value.slice(0, 8) : lists.includes(name) ? value.replaceAll(",", ", ") : value;
    return [name, value, shown];
  });
}
