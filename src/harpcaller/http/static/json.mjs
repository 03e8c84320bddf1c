// JSON as its exact text. Nothing here makes a number of JavaScript, which would change it: 2^80, 1.50, 1e400.
import { codeOf, HIDDEN } from "./formats.mjs";

const SPACE = /[ \t\n\r]*/y;
const MOST_CHILDREN = 500; // of one object or array that the tree shows at once


/** Append text to an element. Characters that one does not see, or that turn text around, are shown by their codes. */
export function appendText(parent, text) {
  let done = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > done) parent.append(text.slice(done, found.index));
    const code = parent.appendChild(document.createElement("span"));
    code.className = "hidden-character";
    code.textContent = codeOf(found[0]);
    done = found.index + found[0].length;
  }
  if (done < text.length) parent.append(done ? text.slice(done) : text);
  return parent;
}

/** Return the text of a JSON string; also of one that is cut. Of other JSON: null. */
export function decodeString(json) {
  if (json[0] !== '"') return null;
  try {
    return JSON.parse(json);
  } catch {
    const whole = json.replace(/(?<!\\)((?:\\\\)*)\\(?:u[\da-fA-F]{0,3})?$/, "$1");
    try {
      return JSON.parse(whole + '"');
    } catch {
      return null;
    }
  }
}

function skipSpace(text, at) {
  SPACE.lastIndex = at;
  SPACE.test(text);
  return SPACE.lastIndex;
}

function endOfString(text, at) {
  for (let end = at + 1; ; end++) {
    end = text.indexOf('"', end);
    if (end < 0) return text.length;
    let slashes = 0;
    while (text[end - 1 - slashes] === "\\") slashes++;
    if (slashes % 2 === 0) return end + 1;
  }
}

/** Return where the value ends that begins at `at`, without recursion. */
function endOfValue(text, at) {
  let depth = 0;
  for (let i = at; i < text.length; ) {
    const character = text[i];
    if (character === '"') {
      i = endOfString(text, i);
      if (!depth) return i;
    } else if (character === "{" || character === "[") {
      depth++;
      i++;
    } else if (character === "}" || character === "]") {
      if (!depth) return i;
      i++;
      if (!--depth) return i;
    } else if (!depth && (character === "," || " \t\n\r".includes(character))) return i;
    else i++;
  }
  return text.length;
}

/** Yield [key text or null, start, end] of each child of the object or array at `at`. */
export function* children(text, at = 0) {
  const isObject = text[at] === "{";
  let i = skipSpace(text, at + 1);
  while (i < text.length && text[i] !== "}" && text[i] !== "]") {
    let key = null;
    if (isObject) {
      const end = endOfString(text, i);
      key = text.slice(i, end);
      i = skipSpace(text, skipSpace(text, end) + 1);
    }
    const end = endOfValue(text, i);
    yield [key, i, end];
    i = skipSpace(text, end);
    if (text[i] === ",") i = skipSpace(text, i + 1);
    else if (end === i && text[i] !== "}" && text[i] !== "]") return; // it is cut
  }
}

/** Return {key: text of its value} of an object; the texts are as they were sent. */
export function members(text) {
  const found = {};
  for (const [key, start, end] of children(text, skipSpace(text, 0))) found[decodeString(key)] = text.slice(start, end);
  return found;
}

/** Return the text indented, each number and string as it is. */
export function indent(text) {
  const parts = [];
  let depth = 0;
  const line = () => parts.push("\n", "  ".repeat(depth));
  for (let i = skipSpace(text, 0); i < text.length; i = skipSpace(text, i)) {
    const character = text[i];
    if (character === "{" || character === "[") {
      const next = skipSpace(text, i + 1);
      if (text[next] === "}" || text[next] === "]") {
        parts.push(character, text[next]);
        i = next + 1;
        continue;
      }
      parts.push(character);
      depth++;
      line();
      i++;
    } else if (character === "}" || character === "]") {
      depth--;
      line();
      parts.push(character);
      i++;
    } else if (character === ",") {
      parts.push(",");
      line();
      i++;
    } else if (character === ":") {
      parts.push(": ");
      i++;
    } else {
      let end = endOfString(text, i);
      if (character !== '"') for (end = i + 1; end < text.length && !" \t\n\r,:]}".includes(text[end]); end++);
      parts.push(text.slice(i, end));
      i = end;
    }
  }
  return parts.join("");
}

function kindOf(text, at) {
  return { '"': "string", "{": "object", "[": "array", t: "word", f: "word", n: "word" }[text[at]] ?? "number";
}

function span(parent, className, text) {
  const element = parent.appendChild(document.createElement("span"));
  element.className = className;
  return appendText(element, text);
}

function node(text, key, start, end, isOpen) {
  const kind = kindOf(text, start);
  const isContainer = kind === "object" || kind === "array";
  const element = document.createElement(isContainer ? "details" : "div");
  element.className = "json-node";
  const head = isContainer ? element.appendChild(document.createElement("summary")) : element;
  if (key !== null) span(head, "json-key", key).append(": ");
  if (!isContainer) {
    span(head, "json-" + kind, text.slice(start, Math.min(end, start + 65536)));
    if (end > start + 65536) span(head, "quiet", ` ... ${end - start} characters`);
    return element;
  }
  const preview = text.slice(start, Math.min(end, start + 100));
  span(head, "quiet", preview + (end > start + 100 ? " ..." : ""));
  let body = null;
  const fill = () => {
    if (body || !element.open) return;
    body = element.appendChild(document.createElement("div"));
    body.className = "json-children";
    more(children(text, start), body, text, kind === "array", 0);
  };
  element.addEventListener("toggle", fill);
  if (isOpen) {
    element.open = true;
    fill();
  }
  return element;
}

function more(rest, body, text, isArray, index) {
  for (let shown = 0; shown < MOST_CHILDREN; shown++, index++) {
    const { done, value } = rest.next();
    if (done) return;
    const [key, start, end] = value;
    body.append(node(text, isArray ? String(index) : key, start, end, false));
  }
  const button = body.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = `Show ${MOST_CHILDREN} more`;
  button.addEventListener("click", () => {
    button.remove();
    more(rest, body, text, isArray, index);
  });
}

/** Return an element that shows JSON text as a tree; the children of a node are made when it is opened. */
export function makeTree(text) {
  const start = skipSpace(text, 0);
  const tree = node(text, null, start, endOfValue(text, start), true);
  tree.classList.add("json-tree");
  return tree;
}
