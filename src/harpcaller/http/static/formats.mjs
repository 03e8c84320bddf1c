// How values are shown, as the settings of this browser choose: times, durations, numbers, and text of jobs and hosts.
import { makeSignal } from "./router.mjs";

// --- what this browser remembers: the person's taste, never data -----------------------------------------------------

const USUAL = { theme: "system", density: "compact", times: "local", keys: "on", columns: "", views: "[]" };

/** Use the browser's storage. Private windows may have none: a choice then holds until the page is closed. */
function stored(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

/** The settings: theme, density, times (local, utc, relative), keys (on, off), columns and views of the job list. */
export const settings = Object.fromEntries(Object.entries(USUAL).map(([name, value]) => [name, stored((store) => store.getItem("harp." + name)) ?? value]));
export const settingChanges = makeSignal();

/** Change a setting; all that is drawn with `useSettings` is drawn again. */
export function setSetting(name, value) {
  const isUsual = value === USUAL[name];
  const { dataset } = document.documentElement;
  settings[name] = value;
  stored((store) => (isUsual ? store.removeItem("harp." + name) : store.setItem("harp." + name, value)));
  if (name === "theme" || name === "density") isUsual ? delete dataset[name] : (dataset[name] = value);
  settingChanges.tell();
}

// --- times and durations -----------------------------------------------------------------------------------------

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** Return a time as ["2026-11-30", "12:04:11.101", "UTC+01"], in the time zone of the settings. */
export function readClock(seconds, isUTC = settings.times === "utc") {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return ["", "", ""];
  const minutes = isUTC ? 0 : -date.getTimezoneOffset();
  const iso = (time) => new Date(time).toISOString().slice(0, 23).split("T");
  const [, offset] = iso(Math.abs(minutes) * 60_000);
  return [...iso(date.getTime() + minutes * 60_000), "UTC" + (minutes ? (minutes < 0 ? "-" : "+") + offset.slice(0, 5).replace(":00", "") : "")];
}

/** Return "2026-11-30 12:04:11.101 UTC+01": a time in full, with its zone. */
export const fullTime = (seconds) => readClock(seconds).join(" ");

/** Return a short time: "12:04:11" for today, "Nov 29 12:04" for this year, else "2025-11-29". */
export function shortTime(seconds) {
  const now = Date.now() / 1000;
  if (settings.times === "relative") return age(now - seconds);
  const [day, time] = readClock(seconds);
  const [today] = readClock(now);
  if (day === today) return time.slice(0, 8);
  return day.slice(0, 4) === today.slice(0, 4) ? `${MONTHS[day.slice(5, 7) - 1]} ${Number(day.slice(8))} ${time.slice(0, 5)}` : day;
}

/** Return a duration: "0.12 ms", "340 ms", "4.0 s", "31 s", "12 min 5 s", "3 h 20 min", "2 d 4 h". */
export function duration(seconds) {
  if (!(seconds > 0)) return typeof seconds === "number" && seconds <= 0 ? "0 s" : "";
  if (seconds < 0.01) return (seconds * 1000).toFixed(seconds < 0.001 ? 2 : 1) + " ms";
  if (seconds < 1) return Math.round(seconds * 1000) + " ms";
  if (seconds < 10) return seconds.toFixed(1) + " s";
  if (seconds < 60) return Math.floor(seconds) + " s";
  const [size, unit, smaller, less] = seconds < 3600 ? [60, "min", 1, "s"] : seconds < 86400 ? [3600, "h", 60, "min"] : [86400, "d", 3600, "h"];
  const rest = Math.floor((seconds % size) / smaller);
  return Math.floor(seconds / size) + " " + unit + (rest ? ` ${rest} ${less}` : "");
}

/** Return a duration for a column: "340 ms", "31 s", "12m 5s", "3h 20m", "2d 4h". */
export const shortDuration = (seconds) => duration(seconds).replace(/(\d) (min|h|d)/g, (_, digit, unit) => digit + unit[0]).replace(/([mhd]) (\d+) s/, "$1 $2s");

/** Return how long ago: "now", "12 s ago", "5 min ago", "3 h ago", "4 d ago". */
export function age(seconds) {
  return seconds < 1 ? "now" : (seconds < 60 ? Math.floor(seconds) + " s" : duration(seconds).split(" ", 2).join(" ")) + " ago";
}

// --- numbers and text ------------------------------------------------------------------------------------------------

/** Return a whole number with separators: "1,523". */
export const count = (number) => Number(number).toLocaleString("en");

/** Return a number with its noun: "1 job", "1,523 jobs". */
export const plural = (number, noun) => count(number) + " " + noun + (number === 1 ? "" : "s");

/** Return a size: 65,536 bytes are "65.5 kB". */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 999500) return `${(bytes / 1000).toPrecision(3).replace(/\.0+$/, "")} kB`;
  return `${(bytes / 1e6).toPrecision(bytes < 1e7 ? 2 : 3)} MB`;
}

/** Characters that one does not see, or that turn text around. */
export const HIDDEN = new RegExp(
  "[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u115f\\u1160\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]" +
  "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]", "g");

/** Return how such a character is written: \x1b, \u202e. */
export function codeOf(character) {
  const code = character.charCodeAt(0);
  return code < 256 ? "\\x" + code.toString(16).padStart(2, "0") : "\\u" + code.toString(16).padStart(4, "0");
}

/** Return a text of a job or host with those characters as codes: they could change what is read. */
export const visible = (text) => String(text ?? "").replace(HIDDEN, codeOf);

/** A string of JSON with letters that are written from right to left. */
const RIGHT_TO_LEFT = /"[^"]*[\u0590-\u08ff\ufb1d-\ufefc][^"]*"/g;

/**
 * Return JSON text for a line of a list, with letters in place of their \uXXXX. Texts from right to left are isolated:
 * else two of them would change places.
 */
const readable = (json) =>
  visible(json.replace(/\\(u[\da-f]{4}|.)/gi, (written, code) => {
    const unit = parseInt(code.slice(1), 16);
    return unit > 0xa0 ? String.fromCharCode(unit) : written;
  })).replace(RIGHT_TO_LEFT, "\u2068$&\u2069");

/** Return the JSON text of a queue's name, for a line of a list. */
export const queueName = ({ name, id }) => readable(typeof name === "string" ? name : JSON.stringify(name ?? id));

/** Return ["backup", "("orders")"]: the procedure and the start of its arguments, as they were sent. */
export function callOf(procedure, args, most = 200) {
  const isCut = args.length >= most;
  const shown = args.startsWith("[") ? args.slice(1, args.endsWith("]") && !isCut ? -1 : most) : args === "null" ? "" : args.slice(0, most);
  return [visible(procedure), "(" + readable(shown) + (isCut ? "…" : "") + ")"];
}

/** Return the sources of the hosts registry: [{name, source, hosts, age, error, rejected_lines}]. */
export const sourcesOf = (registry) => Object.entries(registry || {}).filter(([, source]) => source && typeof source === "object").map(([name, source]) => ({ name, ...source }));
