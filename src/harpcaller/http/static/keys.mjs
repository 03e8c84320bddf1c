// Keys of the whole page. A view adds its own with `useKeys`; the help lists what is there at that moment.
import { setting, useEffect, useRef } from "./ui.mjs";

const layers = [];
let prefix = "";
let prefixTimer = 0;

/**
 * Add keys while the component is there.
 * `keys`: {"j": [action, "next row"], "g j": [...], "ctrl+k": [...]}. The frame's keys have level 0; a view's win.
 */
export function useKeys(title, keys, level = 1) {
  const layer = useRef({ level }).current;
  Object.assign(layer, { title, keys });
  useEffect(() => {
    layers.push(layer);
    layers.sort((a, b) => a.level - b.level);
    return () => layers.splice(layers.indexOf(layer), 1);
  }, []);
}

/** Return [[title, [[key, meaning], ...]], ...] of all keys that work now: the view's first. */
export function listKeys() {
  const titles = new Map();
  for (const { title, keys } of [...layers].reverse())
    titles.set(title, [...(titles.get(title) || []), ...Object.entries(keys).filter(([, [, meaning]]) => meaning).map(([key, [, meaning]]) => [key, meaning])]);
  return [...titles].filter(([, keys]) => keys.length);
}

// A control that has the focus takes Enter itself, and an open menu takes all keys.
const ownKey = (event) => event.target.closest(".menu-list") || (event.key === "Enter" && event.target.closest("a, button"));
const inField = (target) => target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.nodeName);

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.altKey || event.isComposing) return;
  const command = event.ctrlKey || event.metaKey;
  const single = !command && event.key !== "Escape";
  if (single && (setting("keys") === "off" || inField(event.target) || ownKey(event) || document.querySelector("dialog[open]"))) return;
  const key = (command ? "ctrl+" : "") + (event.key.length === 1 && command ? event.key.toLowerCase() : event.key);
  const spelled = prefix ? prefix + " " + key : key;
  clearTimeout(prefixTimer);
  prefix = "";
  for (const { keys } of [...layers].reverse()) {
    const entry = keys[spelled];
    if (entry) {
      event.preventDefault();
      entry[0](event);
      return;
    }
  }
  if (single && layers.some(({ keys }) => Object.keys(keys).some((name) => name.startsWith(spelled + " ")))) {
    prefix = spelled;
    prefixTimer = setTimeout(() => (prefix = ""), 1500);
  }
});
