// The output of a job: a window of rows over any number of records, which the worker holds.
//
// The view is anchored at a record and the pixels of it that are above the window, so that rows may have any height and
// nothing moves when records are added. The native scroll bar shows the place; a long way moves it by fraction.

import { count, fullTime, size } from "./formats.mjs";
import { appendText, decodeString, makeTree } from "./json.mjs";

const MOST_SPACE = 8000000; // pixels; browsers end at 16 million
const MOST_SHOWN = 4000; // characters of a row until one asks for more
const MOST_LINES = 40;
const AHEAD = 60; // rows that are fetched before and after the window
const SGR = /\x1b\[([\d;]*)m/g;

/** Split text at its colours: [plain text, [[start, end, class names], ...]]. */
export function readColours(text) {
  if (!text.includes("\x1b[")) return [text, []];
  const runs = [];
  let plain = "";
  let done = 0;
  let style = {};
  const push = (piece) => {
    const names = Object.values(style).join(" ");
    if (names && piece) runs.push([plain.length, plain.length + piece.length, names]);
    plain += piece;
  };
  for (const found of text.matchAll(SGR)) {
    push(text.slice(done, found.index));
    done = found.index + found[0].length;
    const codes = found[1].split(";").map(Number);
    for (let i = 0; i < codes.length; i++) {
      const code = codes[i];
      if (code === 0) style = {};
      else if (code === 1) style.weight = "sgr-bold";
      else if (code === 2) style.weight = "sgr-faint";
      else if (code === 3) style.slant = "sgr-italic";
      else if (code === 4) style.line = "sgr-underlined";
      else if (code === 7) style.turned = "sgr-turned";
      else if (code === 22) delete style.weight;
      else if (code === 23) delete style.slant;
      else if (code === 24) delete style.line;
      else if (code === 27) delete style.turned;
      else if (code >= 30 && code <= 37) style.colour = `sgr-${code - 30}`;
      else if (code >= 90 && code <= 97) style.colour = `sgr-${code - 90}`;
      else if (code === 39) delete style.colour;
      else if (code === 38 || code === 48) {
        const [colour, used] = nearest(codes.slice(i + 1));
        if (code === 38 && colour !== null) style.colour = `sgr-${colour}`;
        i += used;
      }
    }
  }
  push(text.slice(done));
  return [plain, runs];
}

/** Return the nearest of the eight colours of "5;N" or "2;R;G;B", and how many codes that took. */
function nearest([form, ...rest]) {
  const mix = (rgb) => rgb.reduce((sum, part, i) => sum + (part > 110 ? 1 << i : 0), 0);
  if (form === 2) return [mix(rest.slice(0, 3)), 4];
  if (form !== 5) return [null, 1];
  const [code] = rest;
  if (code < 16) return [code % 8, 2];
  if (code > 231) return [code > 243 ? 7 : 0, 2];
  const cube = code - 16;
  return [mix([Math.floor(cube / 36), Math.floor(cube / 6) % 6, cube % 6].map((part) => part * 51)), 2];
}

/** Append text with its colours, and with what was searched for marked. */
export function appendOutput(parent, text, needle) {
  const [plain, runs] = readColours(text);
  const cuts = new Set([0, plain.length]);
  for (const [start, end] of runs) cuts.add(start).add(end);
  const marks = [];
  if (needle) {
    const folded = plain.toLowerCase();
    if (folded.length === plain.length) {
      for (let at = 0; (at = folded.indexOf(needle, at)) >= 0 && marks.length < 200; at += needle.length) {
        marks.push([at, at + needle.length]);
        cuts.add(at).add(at + needle.length);
      }
    }
  }
  if (cuts.size <= 2 && !marks.length && !runs.length) return appendText(parent, plain);
  const places = [...cuts].sort((a, b) => a - b);
  for (let i = 0; i + 1 < places.length; i++) {
    const [start, end] = [places[i], places[i + 1]];
    const has = ([from, to]) => from <= start && end <= to;
    const style = runs.find(has)?.[2];
    let element = parent;
    if (marks.some(has)) element = element.appendChild(document.createElement("mark"));
    if (style) {
      element = element.appendChild(document.createElement("span"));
      element.className = style;
    }
    appendText(element, plain.slice(start, end));
  }
  return parent;
}

function cut(text) {
  let end = Math.min(text.length, MOST_SHOWN);
  let at = -1;
  for (let lines = 0; lines < MOST_LINES; lines++) {
    at = text.indexOf("\n", at + 1);
    if (at < 0 || at >= end) return text.slice(0, end);
  }
  return text.slice(0, at);
}

/**
 * The window. `element` is empty and has a size; `send` posts to the worker; `on` has the callbacks `state(values)`,
 * `select(first, last)` and `whole(number)`. `formatTime(seconds)` returns the text of a record's time, or null.
 */
export class LogWindow {
  constructor(element, send, on) {
    this.element = element;
    this.send = send;
    this.on = on;
    this.layer = element.appendChild(document.createElement("div"));
    this.layer.className = "log-layer";
    this.layer.tabIndex = 0;
    this.layer.setAttribute("role", "log");
    this.layer.setAttribute("aria-live", "off");
    this.layer.setAttribute("aria-label", "Records");
    this.body = this.layer.appendChild(document.createElement("div"));
    this.body.className = "log-rows";
    this.space = element.appendChild(document.createElement("div"));
    this.total = 0; // rows of the list
    this.list = "all";
    this.first = 0; // the first row in the window,
    this.skip = 0; // and how many of its pixels are above
    this.isFollowing = false;
    this.isPlaced = false; // it asks for rows when it is known where it opens
    this.rowHeight = 20; // of a row with one line
    this.average = 20; // height of the rows that were drawn lately
    this.firstHeight = 20;
    this.rows = new Map(); // index -> [number, time, text, length] or [number]
    this.drawn = new Map(); // index -> element
    this.opened = new Map(); // number -> "tree" or "more"
    this.selected = [-1, -1];
    this.needle = "";
    this.formatTime = () => null;
    this.lastTop = 0;
    this.isAtEnd = false; // it stays at the end while rows load, until the user moves it
    element.addEventListener("scroll", () => this.onScroll());
    element.addEventListener("scrollend", () => this.place());
    this.layer.addEventListener("scroll", () => {
      const { scrollTop } = this.layer;
      if (!scrollTop) return;
      this.layer.scrollTop = 0; // the focus went to a row outside
      this.move(scrollTop);
    });
    this.body.addEventListener("click", (event) => this.onClick(event));
    this.layer.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(element);
  }

  close() {
    this.observer.disconnect();
  }

  get height() {
    return this.layer.clientHeight; // without the bar for long lines
  }

  get capacity() {
    return Math.ceil(this.height / this.rowHeight) + 1;
  }

  // What the worker says.

  setTotal(total) {
    if (total === this.total) return;
    this.total = total;
    if (this.isFollowing) this.first = Math.max(0, total - this.capacity);
    this.place();
  }

  receive({ id, first, total, rows }) {
    if (id !== this.viewId) return;
    this.rows.clear();
    rows.forEach((row, i) => this.rows.set(first + i, row));
    this.total = total;
    if (this.isFollowing) this.first = Math.max(0, total - this.capacity);
    this.draw();
  }

  ask() {
    if (!this.isPlaced) return;
    const rows = this.capacity;
    this.viewId = (this.viewId ?? 0) + 1;
    const view = this.isFollowing
      ? { list: this.list === "matches" ? "matches" : "tail", first: 0, last: rows + 4 }
      : { list: this.list, first: Math.max(0, this.first - AHEAD), last: this.first + rows + AHEAD };
    if (this.isFollowing && this.list === "matches") view.first = Math.max(0, (view.last = this.total) - rows - 4);
    this.send({ view: { id: this.viewId, ...view } });
  }

  // What the user does.

  setFollowing(isFollowing) {
    this.isPlaced = true;
    if (this.isFollowing === isFollowing) return;
    this.isFollowing = isFollowing;
    this.isAtEnd = false;
    this.drawn.clear();
    if (isFollowing) this.first = Math.max(0, this.total - this.capacity);
    this.ask();
    this.draw();
    this.report();
  }

  setList(list) {
    this.list = list;
    this.first = this.skip = 0;
    this.isFollowing = this.isAtEnd = false;
    this.redraw();
    this.ask();
    this.report();
  }

  /** Draw each row anew, because what rows show has changed. */
  redraw() {
    this.drawn.clear();
    this.body.replaceChildren();
    this.rows.clear();
    this.ask();
  }

  /** Show a row in the window, a little below its top. */
  show(index) {
    this.isPlaced = true;
    this.isFollowing = this.isAtEnd = false;
    this.first = Math.max(0, Math.min(index - Math.floor(this.capacity / 4), this.total - 1));
    this.skip = 0;
    this.ask();
    this.draw();
    this.place();
    this.report();
  }

  showEnd() {
    this.isPlaced = true;
    this.isFollowing = false;
    this.isAtEnd = true;
    this.ask();
    this.draw();
    this.place();
    this.report();
  }

  select(first, last) {
    this.selected = [first, last];
    for (const element of this.drawn.values()) this.markSelected(element);
  }

  report() {
    this.on.state({ isFollowing: this.isFollowing, first: this.first, number: this.rows.get(this.first)?.[0] ?? this.first });
  }

  onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const step = { ArrowDown: 2 * this.rowHeight, ArrowUp: -2 * this.rowHeight, PageDown: this.height - 40, PageUp: 40 - this.height, " ": this.height - 40 }[event.key];
    if (event.key === "Home") this.show(0);
    else if (event.key === "End") this.on.end();
    else if (step && event.target === this.layer) this.pauseAndMove(event.key === " " && event.shiftKey ? -step : step);
    else return;
    event.preventDefault();
  }

  pauseAndMove(pixels) {
    if (this.isFollowing) this.freeze();
    this.move(pixels);
    this.place();
  }

  /** Stop to follow, without a move. */
  freeze() {
    this.isFollowing = false;
    this.ask();
    this.report();
  }

  onScroll() {
    const top = this.element.scrollTop;
    const moved = top - this.lastTop;
    if (Math.abs(moved) < 1) return;
    this.lastTop = top;
    this.isFollowing = this.isAtEnd = false;
    const most = this.element.scrollHeight - this.height;
    const isNear = Math.abs(moved) < 2 * this.height;
    if (top <= 0 && (!isNear || this.first < this.capacity)) this.first = this.skip = 0;
    else if (top >= most - 1 && (!isNear || this.first + 2 * this.capacity > this.total)) {
      this.first = Math.max(0, this.total - this.capacity);
      this.skip = Infinity;
    } else if (isNear) this.skip += moved;
    else {
      const place = (top / most) * Math.max(0, this.total - this.height / this.average);
      this.first = Math.floor(place);
      this.skip = (place - this.first) * this.average;
    }
    this.draw();
    this.report();
  }

  move(pixels) {
    this.isAtEnd = false;
    this.skip += pixels;
    this.draw();
    this.report();
  }

  onClick(event) {
    const row = event.target.closest(".log-row");
    const link = event.target.closest("a.log-number");
    const button = event.target.closest("button[data-do]");
    if (!row) return;
    const number = Number(row.dataset.number);
    if (link) {
      event.preventDefault();
      const [first] = this.selected;
      if (event.shiftKey && first >= 0) this.on.select(Math.min(first, number), Math.max(first, number));
      else this.on.select(number, number);
    } else if (button?.dataset.do === "whole") this.on.whole(number);
    else if (button) {
      if (this.opened.get(number) === button.dataset.do) this.opened.delete(number);
      else this.opened.set(number, button.dataset.do);
      if (this.isFollowing) this.freeze();
      this.isAtEnd = false;
      row.dataset.stale = "1";
      this.draw();
      this.drawn.get(Number(row.dataset.index))?.querySelector(`[data-do="${button.dataset.do}"]`)?.focus({ preventScroll: true });
    }
  }

  // Drawing.

  draw() {
    const { height } = this;
    if (!height) return;
    const rows = this.capacity;
    let first = Math.max(0, Math.min(this.first, this.total - 1));
    if (this.isFollowing || this.isAtEnd) {
      first = Math.max(0, this.total - rows);
      this.skip = Infinity;
    }
    let start = first;
    let end = Math.min(this.total, first + rows);
    this.fill(start, end);
    // The anchor moves until the window begins in it.
    for (let turn = 0; turn < 20; turn++) {
      const heights = this.heights(start, end);
      let above = 0;
      for (let i = start; i < first; i++) above += heights.get(i);
      let sum = 0;
      for (let i = start; i < end; i++) sum += heights.get(i);
      if (end >= this.total && sum - above - this.skip < height) this.skip = sum - above - height; // the end is at the bottom
      if (this.skip < 0) {
        if (above + this.skip >= 0 || start === 0) {
          while (this.skip < 0 && first > start) this.skip += heights.get(--first);
          if (this.skip < 0) this.skip = 0;
          break;
        }
        start = Math.max(0, start - Math.ceil((-this.skip - above) / this.rowHeight) - 2);
        if (first - start > 4 * rows) {
          first = start;
          this.skip = 0;
          end = Math.min(this.total, first + rows);
        }
        this.fill(start, end);
        continue;
      }
      let passed = false;
      while (first < end - 1 && this.skip >= heights.get(first)) {
        this.skip -= heights.get(first++);
        passed = true;
      }
      if (!passed) break;
      start = first;
      end = Math.min(this.total, first + rows);
      this.fill(start, end);
    }
    this.first = first;
    const last = Math.min(this.total, first + rows);
    this.fill(first, last);
    this.measure(first, last);
    this.body.style.transform = `translateY(${-Math.round(this.skip)}px)`;
    if (this.isFollowing) this.place();
    else if (!this.has(first, last) && !this.isAsked(first)) {
      this.askedFor = first;
      this.ask();
    }
  }

  isAsked(first) {
    return this.askedFor === first && this.rows.size > 0 && this.rows.has(first);
  }

  has(first, last) {
    return this.rows.has(first) && this.rows.has(Math.max(first, last - 1));
  }

  heights(start, end) {
    const found = new Map();
    for (let i = start; i < end; i++) found.set(i, this.drawn.get(i).offsetHeight);
    return found;
  }

  /** Have elements for the rows start..end, and no others. */
  fill(start, end) {
    for (const [index, element] of this.drawn) {
      if (index < start || index >= end || !element.isConnected) {
        element.remove();
        this.drawn.delete(index);
      }
    }
    let before = this.body.firstChild;
    for (let index = start; index < end; index++) {
      const row = this.rows.get(index) ?? [index];
      let element = this.drawn.get(index);
      if (element && (element.dataset.stale || element.dataset.number !== String(row[0]) || (row.length > 1 && element.dataset.loading))) {
        if (before === element) before = element.nextSibling;
        element.remove();
        element = undefined;
      }
      if (!element) {
        element = this.makeRow(index, row);
        this.drawn.set(index, element);
      }
      if (element === before) before = element.nextSibling;
      else this.body.insertBefore(element, before);
    }
  }

  makeRow(index, [number, time, text, length]) {
    const element = document.createElement("div");
    element.className = "log-row";
    element.dataset.index = index;
    element.dataset.number = number;
    const link = element.appendChild(document.createElement("a"));
    link.className = "log-number";
    link.href = `#r${number}`;
    link.tabIndex = -1;
    link.textContent = number;
    this.markSelected(element);
    if (text === undefined) {
      element.dataset.loading = "1";
      element.append("loading ...");
      return element;
    }
    const label = this.formatTime(time);
    if (label !== null) {
      const shown = element.appendChild(document.createElement("time"));
      shown.textContent = label;
      shown.title = fullTime(time);
    }
    const opened = this.opened.get(number);
    const isContainer = text[0] === "{" || text[0] === "[";
    const content = element.appendChild(document.createElement("span"));
    content.className = "log-text";
    const decoded = decodeString(text);
    const whole = decoded ?? text;
    const shown = opened === "more" ? whole : cut(whole);
    if (decoded === null) content.classList.add("log-json");
    appendOutput(content, shown, this.needle);
    const button = (action, label, name) => {
      const made = element.appendChild(document.createElement("button"));
      made.type = "button";
      made.className = "log-do";
      made.dataset.do = action;
      made.textContent = label;
      made.tabIndex = -1;
      if (name) made.setAttribute("aria-label", name);
      if (action !== "whole") made.setAttribute("aria-expanded", String(opened === action));
    };
    if (length > text.length) button("whole", `Show all ${size(length)}`, `Show all ${size(length)} of record ${number}`);
    else if (shown.length < whole.length || opened === "more") button("more", opened === "more" ? "Less" : `${count(whole.length - shown.length)} more characters`);
    else if (isContainer && text.length > 2) button("tree", opened === "tree" ? "Hide tree" : "Tree", `Tree of record ${number}`);
    if (opened === "tree") element.append(makeTree(text));
    return element;
  }

  markSelected(element) {
    const number = Number(element.dataset.number);
    element.classList.toggle("selected", number >= this.selected[0] && number <= this.selected[1]);
  }

  /** Let the scroll bar show where the window is. */
  place() {
    const fits = this.first === 0 && !this.skip && this.drawn.size >= this.total && this.lowerEdge() <= this.height;
    const space = fits ? 0 : Math.min(Math.max(this.total * this.average, 1.5 * this.height), MOST_SPACE);
    this.space.style.height = `${Math.max(0, space - this.height)}px`;
    const most = this.element.scrollHeight - this.height;
    const whole = Math.max(1, this.total - this.height / this.average);
    const isLow = this.isFollowing || this.isAtEnd || (this.first + this.capacity >= this.total && this.lowerEdge() <= this.height + 1);
    const top = isLow ? most : Math.min(most - (most > 1 ? 1 : 0), ((this.first + Math.min(this.skip / this.firstHeight, 1)) / whole) * most);
    if (Math.abs(this.element.scrollTop - top) >= 1) this.element.scrollTop = Math.max(0, top);
    this.lastTop = this.element.scrollTop;
  }

  /** Estimate the height of rows, for the scroll bar; a small change would only make it tremble. */
  measure(first, last) {
    if (last <= first) return;
    this.firstHeight = this.drawn.get(first).offsetHeight;
    const average = this.body.offsetHeight / (last - first);
    if (Math.abs(average - this.average) < this.average / 4) return;
    this.average = average;
    this.place();
  }

  lowerEdge() {
    return this.body.offsetHeight - this.skip;
  }
}
