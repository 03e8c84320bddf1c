// The command palette and the list of keys: both are dialogs over any view.
import { get } from "./api.mjs";
import { listKeys } from "./keys.mjs";
import { link, navigate } from "./router.mjs";
import { Dialog, html, useEffect, useRef, useState, visible } from "./ui.mjs";
import { words } from "./words.mjs";

const text = words.palette;

/** A field and a list: views, actions, saved searches, hosts and procedures by name. `actions`: [[name, function], ...]. */
export function Palette({ close, actions, views }) {
  const [sought, setSought] = useState("");
  const [names, setNames] = useState([]);
  const [at, setAt] = useState(0);
  const list = useRef(null);
  useEffect(() => {
    get("/jobs/counts", { by: "procedure,host" }).then(({ by }) =>
      setNames([
        ...(by.host || []).map(({ value }) => [text.host(visible(value)), () => navigate(link("/hosts/" + encodeURIComponent(value)))]),
        ...(by.procedure || []).map(({ value }) => [text.procedure(visible(value)), () => navigate(link("/jobs", { procedure: value }))]),
      ]), () => null);
  }, []);
  const wanted = sought.toLowerCase().split(/\s+/).filter(Boolean);
  const all = [...views, ...words.jobs.builtInViews.map(([name, search]) => [text.view(name), () => navigate(link("/jobs", new URLSearchParams(search)))]), ...actions, ...names];
  const found = all.filter(([name]) => wanted.every((word) => name.toLowerCase().includes(word))).slice(0, 12);
  if (sought.trim()) found.push([text.search(sought.trim()), () => navigate(link("/jobs", { q: sought.trim() }))]);
  const place = Math.min(at, found.length - 1);
  function run(entry) {
    close();
    entry?.[1]();
  }
  function keys(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      setAt((place + step + found.length) % found.length);
    } else if (event.key === "Enter") {
      event.preventDefault();
      run(found[place]);
    }
  }
  useEffect(() => list.current?.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" }), [place, sought]);
  return html`<${Dialog} title=${text.title} close=${close} kind="palette">
    <input type="text" role="combobox" aria-expanded="true" aria-controls="palette" aria-activedescendant=${found.length ? "palette-" + place : undefined} aria-label=${text.title} autofocus autocomplete="off" spellcheck="false" placeholder=${text.hint}
      value=${sought} onInput=${(event) => (setSought(event.target.value), setAt(0))} onKeyDown=${keys} />
    <ul id="palette" role="listbox" aria-label=${text.title} ref=${list}>${found.map((entry, number) => html`<li key=${entry[0]} id=${"palette-" + number} role="option" aria-selected=${number === place ? "true" : "false"} onClick=${() => run(entry)} onPointerMove=${() => number !== place && setAt(number)}>${entry[0]}</li>`)}</ul>
  </${Dialog}>`;
}

/** All keys that work in the view that is open. */
export function KeyHelp({ close }) {
  return html`<${Dialog} title=${text.keys} close=${close} kind="wide">
    <div class="key-help">${listKeys().map(([title, keys]) => html`<section key=${title}><h3>${title}</h3><dl>${keys.map(([key, meaning]) => html`<div key=${key}><dt>${key.split(" ").map((part) => html`<kbd key=${part}>${text.keyNames[part] || part}</kbd> `)}</dt><dd>${meaning}</dd></div>`)}</dl></section>`)}</div>
    <p class="dim">${text.keysOff}</p>
  </${Dialog}>`;
}
