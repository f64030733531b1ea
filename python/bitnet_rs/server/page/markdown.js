// Markdown into elements, piece by piece, for the chat page. Apart from the page because it is a
// language's parser, and because nothing in it knows of servers or conversations. The page is
// served with this file in it (see __init__.py).
//
// What it reads is hostile until proven otherwise: it becomes text nodes in elements made here,
// never markup. Pictures are not fetched, and links lead to the web or to a mail program only.

/** Makes an element. Strings among the children become text, whatever they hold. */
function el(tag, properties = {}, ...children) {
  const { data, aria, ...plain } = properties;
  const made = Object.assign(document.createElement(tag), plain);
  for (const [key, value] of Object.entries(aria ?? {})) made.setAttribute(`aria-${key}`, value);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

// ---- Markdown, within a line ------------------------------------------------------------------

// Deeper nesting is text: layout recurses, and a model can write a million asterisks.
const MOST_NESTED = 16;
const PLAIN = /[^\\`*_~[\]!<h\n]+/y;
const TARGET =
  /\(\s*<?((?:[^\s()<>]|\([^\s()<>]{0,500}\)){1,2000})>?(?:\s+(?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))?\s*\)/y;
const TARGET_BEGUN = /\([^\s()]*$/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
// Without the invisible characters that turn the direction of text: an address shows as it is.
const BARE = /https?:\/\/[^\s<>"`\u200e\u200f\u202a-\u202e\u2066-\u2069]{1,2000}/y;
const WRAPPERS = { "*1": "em", "_1": "em", "*2": "strong", "_2": "strong", "~2": "del" };

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Makes a link, or returns null where the address is none that a click may follow. */
function link(address, label) {
  let url;
  try { url = new URL(address); } catch { return null; }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  const { href } = url;
  const rel = "noopener noreferrer nofollow";
  const made = el("a", { href, title: href, target: "_blank", rel }, ...label);
  if (made.textContent === address && !url.username) return made;
  // A label may say anything, so the host that a click goes to stands beside it.
  const host = el("span", { className: "host" }, ` (${url.host || url.pathname})`);
  const both = document.createDocumentFragment();
  both.append(made, host);
  return both;
}

/**
 * Turns a paragraph's text into nodes, in time linear in its length.
 *
 * Marks that open push a frame, marks that close wrap the nodes of the nearest open frame like
 * them, and frames between them become text again. `open` says that more text may follow: what
 * is not closed yet then looks as if it were, so that nothing jumps when the mark arrives.
 */
function inline(text, open) {
  const frames = [{ kind: "", mark: "", nodes: [] }];
  const counts = {};  // open frames of each kind: tells at once that there is none to close
  let at = 0;
  let runs = null;    // backtick runs of each length, in order

  const top = () => frames[frames.length - 1];
  const put = (...added) => {
    const { nodes } = top();
    for (const node of added) {
      const joins = typeof node === "string" && typeof nodes.at(-1) === "string";
      nodes.push(joins ? nodes.pop() + node : node);
    }
  };
  const dissolve = () => {
    const { kind, mark, nodes } = frames.pop();
    counts[kind] -= 1;
    put(mark);
    for (const node of nodes) put(node);
  };
  const push = (kind, mark) => {
    if (frames.length > MOST_NESTED) return put(mark);
    frames.push({ kind, mark, nodes: [] });
    counts[kind] = (counts[kind] ?? 0) + 1;
  };
  const pop = (kind) => {
    while (top().kind !== kind) dissolve();
    counts[kind] -= 1;
    return frames.pop().nodes;
  };
  const wrap = (kind) => {
    const [outer, inner] = frames.slice(-2);
    // Of `***`, which is two frames, either may be closed first.
    if (inner.kind !== kind && outer.kind === kind && !outer.nodes.length) {
      [outer.kind, inner.kind] = [inner.kind, outer.kind];
      [outer.mark, inner.mark] = [inner.mark, outer.mark];
    }
    const made = el(WRAPPERS[kind]);
    for (const node of pop(kind)) made.append(node);
    put(made);
  };

  function emphasis(character) {
    let end = at;
    while (text[end] === character) end += 1;
    const length = end - at;
    const marks = (length === 3 ? [1, 2] : [length]).map((n) => character.repeat(n));
    const kinds = marks.map((mark) => character + mark.length);
    const before = text[at - 1] ?? " ", after = text[end] ?? " ";
    const word = /[\p{L}\p{N}]/u;
    const within = character === "_" && word.test(before) && word.test(after);
    const means = !within && kinds.every((kind) => WRAPPERS[kind]);
    at = end;
    if (open && end === text.length) {
      // Half of a mark, perhaps: the next characters say what it is.
    } else if (means && kinds.every((kind) => counts[kind]) && /\S/.test(before)) {
      const depth = (kind) => frames.findLastIndex((frame) => frame.kind === kind);
      for (const kind of kinds.sort((a, b) => depth(b) - depth(a))) wrap(kind);
    } else if (means && /\S/.test(after)) {
      kinds.forEach((kind, i) => push(kind, marks[i]));
    } else {
      put(character.repeat(length));
    }
  }

  function code() {
    let end = at;
    while (text[end] === "`") end += 1;
    const length = end - at;
    if (!runs) {
      runs = {};
      for (const run of text.matchAll(/`+/g)) (runs[run[0].length] ??= []).push(run.index);
      for (const list of Object.values(runs)) list.reverse();
    }
    const list = runs[length] ?? [];
    while (list.length && list[list.length - 1] < end) list.pop();
    if (list.length || (open && end < text.length)) {
      const close = list.pop() ?? text.length;
      const inside = text.slice(end, close).replaceAll("\n", " ");
      const padded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ");
      put(el("code", {}, padded ? inside.slice(1, -1) : inside));
      at = close + length;
    } else {
      if (!open) put(text.slice(at, end));
      at = end;
    }
  }

  function bracket() {
    at += 1;
    if (!counts["["]) return put("]");
    const target = text[at] === "(" ? matchAt(TARGET, text, at) : null;
    const begun = !target && open && matchAt(TARGET_BEGUN, text, at);
    if (!target && !begun) {
      while (top().kind !== "[") dissolve();
      dissolve();
      return put("]");
    }
    const { mark } = frames.findLast((frame) => frame.kind === "[");
    const label = pop("[");
    at += (target ?? begun)[0].length;
    if (begun) return label.forEach((node) => put(node));
    // A picture would be fetched from wherever the model says. It is a link instead.
    const made = link(target[1], label.length ? label : [target[1]]);
    if (made) {
      put(made);
      // No link stands within a link: brackets around this one stay brackets.
      counts["["] = 0;
      for (const frame of frames) if (frame.kind === "[") frame.kind = "dead";
      counts.dead = frames.length;
    } else {
      put(mark);
      label.forEach((node) => put(node));
      put("]", target[0]);
    }
  }

  function address() {
    const angled = text[at] === "<";
    const none = counts["["] || (!angled && /\w/.test(text[at - 1] ?? ""));
    const found = none ? null : matchAt(angled ? ANGLED : BARE, text, at);
    let shown = found?.[angled ? 1 : 0] ?? "";
    // A sentence's own full stop or closing bracket is no part of the address.
    const tail = () => /[.,:;!?'*_~\]]$/.test(shown) || (shown.endsWith(")") && !shown.includes("("));
    while (!angled && tail()) shown = shown.slice(0, -1);
    const made = shown && link(shown, [shown]);
    put(made || text[at]);
    at += made ? shown.length + (angled ? 2 : 0) : 1;
  }

  while (at < text.length) {
    const plain = matchAt(PLAIN, text, at);
    if (plain) {
      put(plain[0]);
      at += plain[0].length;
      continue;
    }
    const character = text[at];
    if (character === "\n") { put(el("br")); at += 1; }
    else if (character === "\\") {
      const escapes = /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "");
      put(escapes ? text[at + 1] : "\\");
      at += escapes ? 2 : 1;
    }
    else if (character === "`") code();
    else if ("*_~".includes(character)) emphasis(character);
    else if (character === "[") { push("[", "["); at += 1; }
    else if (character === "]") bracket();
    else if (character === "!" && text[at + 1] === "[") { push("[", "!["); at += 2; }
    else if (character === "h" || character === "<") address();
    else { put(character); at += 1; }
  }
  while (frames.length > 1) {
    const { kind, nodes } = top();
    if (!open || !WRAPPERS[kind]) dissolve();
    else if (nodes.length) wrap(kind);
    else pop(kind);
  }
  const made = document.createDocumentFragment();
  for (const node of frames[0].nodes) made.append(node);
  return made;
}

// ---- Markdown, line by line -------------------------------------------------------------------
//
// Blocks are fed lines, the last of them perhaps incomplete, and never look back: an answer of any
// length costs the same for each token. Only a paragraph, heading or table row that is still
// growing is rendered anew. A line whose beginning does not tell yet what it is (`-` may become a
// list, a rule or a word) waits until it does, so that nothing changes its kind on the screen.

const UNDECIDED = /^[\s>#*+\-_=~`|:.)\d]*$|^\s*(?:```|~~~)/;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^[ \t]*(?:[-*+]|(\d{1,9})[.)])(?:[ \t]+|$)/;

/** Columns of white space a line begins with; a tab counts as four. */
function indent(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += 4;
    else break;
  }
  return columns;
}

/** Characters of a line that make up its first `columns` columns of white space. */
function charactersOf(line, columns) {
  let at = 0;
  for (let seen = 0; seen < columns && /[ \t]/.test(line[at] ?? ""); at += 1) {
    seen += line[at] === "\t" ? 4 : 1;
  }
  return at;
}

function beginsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

// A block has `accepts(line)`: how many characters to take off a line that belongs to it, or -1;
// `take(line, whole)`; `close()`. Those that draw late are put into `dirty`, with `render(open)`.

/** A paragraph, or a heading: one that takes no second line. */
class Paragraph {
  constructor(element, dirty) {
    Object.assign(this, { element, dirty, lines: [], part: "", closed: false });
    this.heading = element.tagName !== "P";
  }

  accepts() { return -1; }

  take(line, whole) {
    const text = line.trimStart();
    if (whole) this.lines.push(text);
    this.part = whole ? "" : text;
    this.dirty.add(this);
  }

  close() {
    this.closed = true;
    this.dirty.add(this);
  }

  render(open) {
    const lines = this.part ? [...this.lines, this.part] : [...this.lines];
    // The next line may make it the head of a table.
    if (open && lines.at(-1)?.startsWith("|")) lines.pop();
    let text = lines.join("\n").trimEnd();
    if (this.heading) text = text.replace(/(?<! ) +#+$/, "");
    this.element.hidden = !text;
    this.element.replaceChildren(inline(text, open));
  }
}

class Code {
  // So many lines lie in an element of their own: laying out one more line stays cheap.
  static LINES = 200;

  constructor(into, [, indentation, fence, language], dirty) {
    this.dirty = dirty;
    this.indentation = indentation.length;
    this.closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
    this.text = this.fresh = this.part = "";
    this.done = false;
    this.last = new Text("");
    this.code = el("code", {}, el("span", {}, this.last));
    const label = language.trim().split(/\s/)[0] || "text";
    const onclick = () => copy(this.text, button);
    const button = el("button", { type: "button", aria: { label: "Copy the code" }, onclick }, "Copy");
    // In the tab order, so that the keyboard can scroll long lines.
    const pre = el("pre", { tabIndex: 0, aria: { label: `Code, ${label}` } }, this.code);
    into.append(el("div", { className: "code" }, el("div", {}, label, button), pre));
    this.room = Code.LINES;
  }

  accepts() { return this.done ? -1 : 0; }

  take(line, whole) {
    if (whole && this.closing.test(line)) {
      this.done = true;
      return;
    }
    const text = line.slice(charactersOf(line, Math.min(this.indentation, indent(line))));
    if (whole) {
      this.fresh += text + "\n";
      this.part = "";
    } else if (!/^\s*[`~]*$/.test(line)) {
      this.part = text;
    }
    this.dirty.add(this);
  }

  close() { this.done = true; }

  render() {
    const lines = this.fresh.split(/(?<=\n)/);
    for (let at = 0; at < lines.length;) {
      const some = lines.slice(at, at + this.room);
      this.last.before(some.join(""));
      at += some.length;
      this.room -= some.length;
      if (this.room === 0) {
        this.last.remove();
        this.code.append(el("span", {}, this.last));
        this.room = Code.LINES;
      }
    }
    this.text += this.fresh;
    this.fresh = "";
    this.last.data = this.part;
  }
}

class Table {
  constructor(into, head, delimiters, dirty) {
    this.dirty = dirty;
    const alignment = (cell) => (/^:-*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : "");
    this.align = Table.cells(delimiters).map(alignment);
    this.body = el("tbody");
    const table = el("table", {}, el("thead", {}, this.row("th", head, false)), this.body);
    into.append(el("div", { className: "table" }, table));
    this.waiting = [];
    this.growing = null;
  }

  static cells(line) {
    const cells = line.trim().split(/(?<!\\)\|/);
    if (cells[0].trim() === "") cells.shift();
    if (cells.length && cells.at(-1).trim() === "") cells.pop();
    return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
  }

  row(tag, line, open) {
    const cells = Table.cells(line);
    const made = this.align.map((className, i) =>
      el(tag, { className }, inline(cells[i] ?? "", open && i >= cells.length - 1)));
    return el("tr", {}, ...made);
  }

  accepts(line) { return line.includes("|") && !FENCE.test(line) ? 0 : -1; }

  take(line, whole) {
    if (whole) this.waiting.push(line);
    this.part = whole ? "" : line;
    this.dirty.add(this);
  }

  close() {}

  render(open) {
    this.growing?.remove();
    this.growing = this.part ? this.row("td", this.part, open) : null;
    for (const line of this.waiting) this.body.append(this.row("td", line, false));
    if (this.growing) this.body.append(this.growing);
    this.waiting = [];
  }
}

class Quote {
  constructor(into, depth, dirty) {
    this.inner = new Blocks(el("blockquote"), depth + 1, dirty);
    into.append(this.inner.into);
  }

  accepts(line) { return QUOTE.exec(line)?.[0].length ?? -1; }

  take(line, whole) { this.inner.take(line, whole); }

  close() { this.inner.close(); }
}

class List {
  constructor(into, line, depth, dirty) {
    Object.assign(this, { depth, dirty, inner: null, blank: false, base: indent(line) });
    const number = ITEM.exec(line)[1];
    this.ordered = number !== undefined;
    this.element = el(this.ordered ? "ol" : "ul");
    if (this.ordered) this.element.start = Number(number);
    into.append(this.element);
  }

  accepts(line) {
    // Many a model does not indent the code within a list.
    if (this.inner?.endsIn(Code)) return charactersOf(line, this.offset);
    if (!/\S/.test(line)) {
      this.blank = true;
      return 0;
    }
    const columns = indent(line);
    const item = ITEM.exec(line);
    if (this.inner && columns >= this.base + 2) {
      this.blank = false;
      return charactersOf(line, this.offset);
    }
    if (item && (item[1] !== undefined) === this.ordered && !RULE.test(line)) {
      this.inner?.close();
      this.inner = new Blocks(el("li"), this.depth + 1, this.dirty);
      this.element.append(this.inner.into);
      this.offset = indent(line) + item[0].trim().length + 1;
      this.blank = false;
      return item[0].length;
    }
    // A line that goes on with the item's paragraph need not be indented.
    return this.blank || beginsBlock(line) || !this.inner.endsIn(Paragraph) ? -1 : 0;
  }

  take(line, whole) { this.inner.take(line, whole); }

  close() { this.inner?.close(); }
}

class Blocks {
  constructor(into, depth, dirty) {
    Object.assign(this, { into, depth, dirty, current: null, line: null });
  }

  /** Takes a line, or what there is of it: an incomplete one comes again, and longer. */
  take(line, whole) {
    if (!this.line) {
      if (!whole && this.undecided(line)) return;
      this.line = this.find(line);
    }
    const { block, from } = this.line;
    block?.take(line.slice(from), whole);
    if (whole) this.line = null;
  }

  close() {
    this.current?.close();
    this.current = null;
  }

  undecided(line) {
    if (this.current instanceof Code && !this.current.done) return false;
    return UNDECIDED.test(line) || (this.current instanceof Table && !line.includes("|"));
  }

  /** Whether the innermost block is of this class and may go on. */
  endsIn(kind) {
    const { current } = this;
    return current instanceof kind ? !current.done : Boolean(current?.inner?.endsIn(kind));
  }

  /** The block that a line belongs to, and from which character on. */
  find(line) {
    const now = this.current;
    const paragraph = now instanceof Paragraph && !now.heading ? now : null;
    if (now && !paragraph) {
      const from = now.accepts(line);
      if (from >= 0) return { block: now, from };
    }
    if (!/\S/.test(line)) {
      this.close();
      return { block: null, from: 0 };
    }
    return this.begin(line, paragraph) ?? { block: paragraph ?? this.enter(this.text("p")), from: 0 };
  }

  enter(block) {
    this.current?.close();
    this.current = block;
    return block;
  }

  text(tag) {
    const element = el(tag);
    this.into.append(element);
    return new Paragraph(element, this.dirty);
  }

  begin(line, paragraph) {
    const { into, depth, dirty } = this;
    const fence = FENCE.exec(line);
    if (fence) {
      this.enter(new Code(into, fence, dirty));
      return { block: null, from: 0 };
    }
    const heading = HEADING.exec(line);
    if (heading) {
      return { block: this.enter(this.text(`h${heading[1].length}`)), from: heading[0].length };
    }
    if (paragraph && this.tabulate(line, paragraph)) return { block: null, from: 0 };
    if (RULE.test(line)) {
      this.close();
      into.append(el("hr"));
      return { block: null, from: 0 };
    }
    if (depth >= MOST_NESTED) return null;
    if (QUOTE.test(line)) {
      const block = this.enter(new Quote(into, depth, dirty));
      return { block, from: block.accepts(line) };
    }
    const item = ITEM.exec(line);
    // Within a paragraph, "1984." is more likely a year than the beginning of a list.
    if (item && !(paragraph && ((item[1] ?? "1") !== "1" || item[0].length === line.length))) {
      const block = this.enter(new List(into, line, depth, dirty));
      return { block, from: block.accepts(line) };
    }
    return null;
  }

  /** Turns a paragraph's last line into the head of a table, if it has as many cells. */
  tabulate(line, paragraph) {
    const head = paragraph.lines.at(-1);
    if (!head?.includes("|") || !/^[\s|:-]+$/.test(line)) return false;
    const delimiters = Table.cells(line);
    if (!delimiters.every((cell) => /^:?-+:?$/.test(cell))) return false;
    if (Table.cells(head).length !== delimiters.length) return false;
    paragraph.lines.pop();
    if (!paragraph.lines.length) paragraph.element.remove();
    this.enter(new Table(this.into, head, line, this.dirty));
    return true;
  }
}

/** A document that arrives piece by piece. */
class Markdown {
  constructor(into) {
    this.dirty = new Set();
    this.blocks = new Blocks(into, 0, this.dirty);
    this.rest = "";
  }

  push(text) {
    const lines = text.split("\n");
    lines[0] = this.rest + lines[0];
    this.rest = lines.pop();
    for (const line of lines) this.blocks.take(line.replace(/\r$/, ""), true);
  }

  /** Brings the screen up to date. */
  paint(open = true) {
    if (this.rest) this.blocks.take(this.rest, false);
    for (const block of this.dirty) block.render(open && !block.closed);
    this.dirty.clear();
  }

  end() {
    if (this.rest) this.blocks.take(this.rest, true);
    this.rest = "";
    this.blocks.close();
    this.paint(false);
  }
}
