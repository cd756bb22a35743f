/* What readers do with a report beside its charts: find sections, hide variants, sort tables. Without scripts the page
   has all text, tables and static figures. One script holds charts.js and, after it, this file. */

const SVG = "http://www.w3.org/2000/svg";
const variants = JSON.parse(document.getElementById("variants").textContent); // [{name, color, dash, marker}]
const looks = new Map(variants.map((v) => [v.name, v]));
const hidden = new Set();

/** A new HTML element. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A new SVG element at the end of another. */
function add(parent, tag, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** The colour of a variant; page.css has another tone of it for the dark style. */
const colour = (name) => {
  const hex = looks.get(name)?.color ?? "#777777";
  return `var(--c${hex.slice(1)}, ${hex})`;
};

// ------------------------------------------------------------ variants

function setHidden(names) {
  hidden.clear();
  names.forEach((name) => hidden.add(name));
  document.querySelectorAll("[data-variant]").forEach((e) => e.classList.toggle("off", hidden.has(e.dataset.variant)));
  document.querySelectorAll("button.variant").forEach((b) => b.setAttribute("aria-pressed", !hidden.has(b.value)));
  const note = document.querySelector(".hidden-note");
  const shown = variants.map((v) => v.name).filter((name) => !hidden.has(name));
  const few = shown.length < hidden.size ? `all but ${shown.join(", ") || "none"}` : [...hidden].join(", ");
  panels.filter((p) => p.rows).forEach((p) => p.draw());
  note.hidden = !hidden.size;
  note.firstChild.textContent = `Hidden in figures and tables: ${few}. Text and numbers stay those of all variants. `;
}

function toggle(name) {
  setHidden(hidden.has(name) ? [...hidden].filter((n) => n !== name) : [...hidden, name]);
}

/** Buttons that hide a variant each; `only` adds one beside each that hides all others. */
function legend(names, only = false) {
  const box = make("div", { class: "legend", role: "group", "aria-label": "Variants shown" });
  for (const name of names) {
    const attributes = { type: "button", class: "variant", "aria-pressed": "true", value: name };
    const button = make("button", { ...attributes, title: `Hide or show ${name} everywhere` });
    const swatch = add(button, "svg", { width: 26, height: 9, "aria-hidden": "true" });
    const dash = looks.get(name)?.dash ?? "";
    const line = { x1: 0, x2: 26, y1: 4.5, y2: 4.5, "stroke-width": 3, "stroke-dasharray": dash };
    add(swatch, "line", { ...line, style: `stroke:${colour(name)}` });
    add(swatch, "path", { d: outline(looks.get(name)?.marker, 13, 4.5, 3.4), style: `fill:${colour(name)}` });
    button.append(name);
    button.addEventListener("click", () => toggle(name));
    const entry = make("span", {}, button);
    if (only) {
      const alone = make("button", { type: "button", class: "only", "aria-label": `Show only ${name}` }, "only");
      alone.addEventListener("click", () => setHidden(variants.map((v) => v.name).filter((n) => n !== name)));
      entry.append(alone);
    }
    box.append(entry);
  }
  return box;
}

function variantControls(side) {
  const all = () => {
    const button = make("button", { type: "button", class: "all" }, "Show all");
    button.addEventListener("click", () => setHidden([]));
    return button;
  };
  const note = make("p", { class: "hidden-note", role: "status" }, "", all());
  note.prepend(document.createTextNode(""));
  note.hidden = true;
  document.querySelector("main").prepend(note);
  if (variants.length < 2) return;
  const names = variants.map((v) => v.name);
  side.append(make("details", { open: "" }, make("summary", {}, "Variants"), all(), legend(names, true)));
}

// ------------------------------------------------------------ contents and style

function contents(side) {
  const links = [...side.querySelectorAll("nav a")];
  const headings = links.map((a) => document.getElementById(a.hash.slice(1)));
  const wide = matchMedia("(min-width: 1200px)");
  const fold = () => side.querySelectorAll("details").forEach((d) => (d.open = wide.matches));
  wide.addEventListener("change", fold);
  fold();
  links.forEach((a) => a.addEventListener("click", () => wide.matches || fold()));
  const mark = () => {
    const above = headings.filter((h) => h.getBoundingClientRect().top < Math.min(160, innerHeight / 4)).length;
    const end = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
    const current = end && scrollY > 0 ? links.length - 1 : Math.max(0, above - 1);
    links.forEach((a) => a.removeAttribute("aria-current"));
    links[current]?.setAttribute("aria-current", "location");
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

function themeButton(side) {
  const button = make("button", { type: "button", class: "theme" });
  const order = ["auto", "light", "dark"];
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Style: ${theme}`;
  };
  button.addEventListener("click", () => set(order[(order.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  set("auto");
  side.prepend(make("div", { class: "tools" }, button));
}

// ------------------------------------------------------------ tables

/** The number that a cell starts with, such as the mean before its interval; null without one. */
function number(cell) {
  const found = /^([-+\u2212]?)([\d,]*\.?\d+(?:e[-+]?\d+)?)([kMBT](?![a-z]))?/.exec(cell.textContent.trim());
  if (!found) return null;
  const size = { k: 1e3, M: 1e6, B: 1e9, T: 1e12 }[found[3]] ?? 1;
  return (found[1] === "-" || found[1] === "\u2212" ? -1 : 1) * Number(found[2].replaceAll(",", "")) * size;
}

/** Rows in the order of a column. Cells without a number come last in a column of numbers, whatever the direction. */
function sorted(rows, column, sign) {
  const numbers = rows.map((row) => number(row.cells[column]));
  const numeric = numbers.filter((n) => n !== null).length * 2 >= rows.length;
  const keys = new Map(rows.map((row, i) => [row, numeric ? numbers[i] : row.cells[column].textContent]));
  return [...rows].sort((a, b) => {
    const [p, q] = [keys.get(a), keys.get(b)];
    if (p === null || q === null) return (p === null) - (q === null);
    return sign * (numeric ? p - q : p.localeCompare(q, "en", { numeric: true }));
  });
}

function table(element) {
  const body = element.tBodies[0];
  const rows = [...body.rows];
  const heads = [...element.tHead.rows[0].cells];
  const box = element.parentElement;
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; // the arrow keys scroll it
  if (rows.length < 2) return;
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] ?? "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? rows : sorted(rows, column, next === "ascending" ? 1 : -1)));
    });
  });
  if (rows.length < 15) return;
  const text = { placeholder: "Filter rows", "aria-label": "Filter the rows of this table" };
  const input = make("input", { type: "search", ...text });
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    const fits = (row) => words.every((word) => row.textContent.toLowerCase().includes(word));
    rows.forEach((row) => row.classList.toggle("filtered", !fits(row)));
  });
  box.before(make("div", { class: "filter" }, input));
}

const side = document.querySelector(".side");
themeButton(side);
variantControls(side);
contents(side);
document.querySelectorAll(".chart-data").forEach((source) => chart(source.parentElement, source));
document.querySelectorAll("table").forEach(table);
