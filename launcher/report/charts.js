"use strict";
/* The live form of figures. Each .chart-data script holds a chart as charts.py writes it, which is drawn as SVG. One
   script holds this file and, after it, page.js: `make`, `add`, `colour`, `looks`, `hidden`, `legend` are there. */

// ------------------------------------------------------------ numbers and axes

/** A value for the hover text: six significant digits, thousands apart. */
function exact(value) {
  if (Math.abs(value) >= 1e12) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: 6 });
}

/** A value of an axis whose ticks are `step` apart: 15k, 2.5M, 3e15. */
function short(value, step) {
  const size = Math.abs(value);
  if (size < step / 1e6) return "0";
  if (size >= 1e15) {
    const [mantissa, power] = value.toExponential(Math.max(0, Math.ceil(Math.log10(size / step)))).split("e+");
    return `${Number(mantissa)}e${power}`;
  }
  const [scale, unit] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [0, ""]].find(([s]) => size >= s);
  const places = Math.ceil(-Math.log10(step / (scale || 1)) - 1e-9);
  return Number((value / (scale || 1)).toFixed(Math.min(12, Math.max(0, places)))) + unit;
}

const bounded = (low, high, i) => low?.[i] != null && high?.[i] != null;
const forward = (axis, value) => (axis.log ? Math.log10(value) : value);
const back = (axis, position) => (axis.log ? 10 ** position : position);

/** [value, text] of the ticks of an axis in a range of positions. */
function ticks(axis, [a, b], count) {
  const [from, to] = [back(axis, Math.min(a, b)), back(axis, Math.max(a, b))];
  if (axis.ticks.length) return axis.ticks.filter(([value]) => value >= from && value <= to);
  if (axis.log && to / from > 8) {
    const decades = Math.ceil(Math.log10(to / from));
    const found = [];
    for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++)
      for (const m of decades > 3 ? [1] : [1, 2, 5]) found.push(m * 10 ** power);
    return found.filter((v) => v >= from && v <= to).map((v) => [v, short(v, v)]);
  }
  const rough = (to - from) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * unit >= rough) * unit;
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i++)
    found.push([i * step, short(i * step, step)]);
  return found;
}

// ------------------------------------------------------------ charts

const panels = [];
let clips = 0;

/** Outline of the mark of a variant: its dashes and its mark go together (MARKERS in plots/style.py). */
function outline(mark, x, y, r) {
  if (mark === "s") return `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`;
  const wide = 1.35 * r;
  if (mark === "D") return `M${x} ${y - wide}l${wide} ${wide}l${-wide} ${wide}l${-wide} ${-wide}z`;
  if (mark === "v") return `M${x} ${y + 1.2 * r}l${1.3 * r} ${-2.2 * r}h${-2.6 * r}z`;
  if (mark === "^") return `M${x} ${y - 1.2 * r}l${1.3 * r} ${2.2 * r}h${-2.6 * r}z`;
  return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
}

/** One coordinate system, drawn anew for each size and range. A range is two positions: logarithms on a log axis. */
class Panel {
  constructor(data, title, changed) {
    Object.assign(this, { data, changed, points: [] });
    this.tip = make("div", { class: "tip" });
    this.tip.hidden = true;
    this.box = make("div", { class: "panel" });
    if (data.title) this.box.append(make("h4", {}, data.title));
    const what = `${title}: ${data.title} ${data.y.label} against ${data.x.label}.`.replace(/\s+/g, " ");
    const label = `${what} Plus and minus zoom, arrows move, 0 resets.`;
    this.svg = add(this.box, "svg", { role: "group", tabindex: 0, "aria-label": label });
    this.box.append(this.tip);
    this.home = { x: this.range("x"), y: this.range("y") };
    this.view = { ...this.home };
    // Rows of variants: those that are hidden leave no gap.
    const { low, high, ticks } = data.y;
    this.rows = ticks.length > 0 && low > high && ticks.every(([, text]) => looks.has(text));
    // Bands of many variants hide each other: they are pale but for the one at the pointer.
    this.box.classList.toggle("crowded", new Set(data.series.map((s) => s.variant)).size > 9);
    panels.push(this);
    this.listen();
    const fit = () => this.box.clientWidth !== this.width && this.draw();
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(this.box);
  }

  /** The range that an axis asks for, or that of the data (of those points that `kept` accepts). */
  range(key, kept = null) {
    const axis = this.data[key];
    const values = kept ? [] : this.data.rules.filter((r) => r.axis === key).map((r) => r.at);
    for (const s of this.data.series) {
      if (kept && hidden.has(s.variant)) continue;
      const bounds = key === "y" ? [s.low, s.high] : [s.x_low, s.x_high];
      for (const list of [s[key], ...bounds])
        (list ?? []).forEach((v, i) => v !== null && (!kept || kept(s, i)) && values.push(v));
    }
    const found = values.map((v) => forward(axis, v)).filter(Number.isFinite);
    let low = found.reduce((a, b) => Math.min(a, b), Infinity);
    let high = found.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low > high) return this.home?.[key] ?? [0, 1];
    const pad = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.5;
    [low, high] = [low - pad, high + pad];
    if (!kept && axis.low !== null) low = forward(axis, axis.low);
    if (!kept && axis.high !== null) high = forward(axis, axis.high);
    return [low, high];
  }

  get zoomed() {
    return ["x", "y"].some((key) => this.view[key].some((v, i) => v !== this.home[key][i]));
  }

  look(view) {
    this.view = { ...this.view, ...view };
    this.draw();
    this.changed();
  }

  reset() {
    this.look(this.home);
  }

  /** Pixel of a value. */
  at(key, value) {
    const [a, b] = this.view[key];
    const [start, size] = key === "x" ? [this.left, this.w] : [this.top + this.h, -this.h];
    const gone = ([row, text]) => hidden.has(text) && row < Math.round(value);
    if (this.rows && key === "y") value -= this.data.y.ticks.filter(gone).length;
    return start + ((forward(this.data[key], value) - a) / (b - a)) * size;
  }

  /** Position on an axis of a pixel. */
  position(key, pixel) {
    const [a, b] = this.view[key];
    return a + (b - a) * (key === "x" ? (pixel - this.left) / this.w : (this.top + this.h - pixel) / this.h);
  }

  draw() {
    const { x, y, series, rules } = this.data;
    this.width = this.box.clientWidth;
    if (!this.width) return;
    const xLabel = x.label.split("\n");
    const rows = y.ticks.filter(([, text]) => !hidden.has(text)).length;
    if (this.rows) this.home.y = this.view.y = [rows - 0.5, -0.5];
    const height = y.ticks.length ? 50 + 18 * xLabel.length + 26 * Math.max(2, rows) : 320;
    this.top = 8;
    this.h = height - this.top - 26 - 16 * xLabel.length;
    const yTicks = this.rows ? y.ticks.filter(([, text]) => !hidden.has(text)) : ticks(y, this.view.y, 5);
    const yLabel = y.label ? 18 : 0;
    this.left = yLabel + 12 + 6.8 * Math.max(2, ...yTicks.map(([, text]) => text.length));
    this.w = this.width - this.left - 14;
    const xTicks = ticks(x, this.view.x, Math.max(3, this.w / 75));
    const [right, bottom] = [this.left + this.w, this.top + this.h];
    this.svg.replaceChildren();
    this.svg.dataset.x = this.view.x.map((v) => back(x, v));
    this.svg.dataset.y = this.view.y.map((v) => back(y, v));
    for (const [key, value] of [["width", this.width], ["height", height]]) this.svg.setAttribute(key, value);
    for (const [value, text] of xTicks) {
      const px = this.at("x", value);
      add(this.svg, "line", { class: "grid", x1: px, x2: px, y1: this.top, y2: bottom });
      add(this.svg, "text", { x: px, y: bottom + 16, "text-anchor": "middle" }, text);
    }
    for (const [value, text] of yTicks) {
      const py = this.at("y", value);
      if (!y.ticks.length) add(this.svg, "line", { class: "grid", x1: this.left, x2: right, y1: py, y2: py });
      const label = add(this.svg, "text", { x: this.left - 6, y: py + 4, "text-anchor": "end" }, text);
      if (looks.has(text)) label.dataset.variant = text;
    }
    add(this.svg, "path", { class: "axis", fill: "none", d: `M${this.left} ${this.top}V${bottom}H${right}` });
    // Long titles move to the left rather than beyond the edge.
    const half = 3.3 * Math.max(...xLabel.map((line) => line.length));
    const middle = Math.max(half, Math.min((this.left + right) / 2, this.width - half));
    xLabel.forEach((line, i) => {
      add(this.svg, "text", { x: middle, y: bottom + 34 + 16 * i, "text-anchor": "middle" }, line);
    });
    const turned = `translate(12 ${(this.top + bottom) / 2}) rotate(-90)`;
    if (y.label) add(this.svg, "text", { transform: turned, "text-anchor": "middle" }, y.label);
    const clip = `clip-${++clips}`;
    const area = { x: this.left, y: this.top, width: this.w, height: this.h };
    add(add(this.svg, "clipPath", { id: clip }), "rect", area);
    this.inside = add(this.svg, "g", { "clip-path": `url(#${clip})` });
    for (const rule of rules) {
      const p = this.at(rule.axis, rule.at);
      const d = rule.axis === "x" ? `M${p} ${this.top}V${bottom}` : `M${this.left} ${p}H${right}`;
      add(this.inside, "path", { class: rule.label ? "rule named" : "rule", d });
      const end = { class: "rule-name", x: right - 4, y: p - 5, "text-anchor": "end" };
      if (rule.label && rule.axis === "y") add(this.inside, "text", end, rule.label);
    }
    this.points = [];
    series.forEach((s) => this.drawSeries(s));
    this.spot = add(this.inside, "circle", { class: "spot", r: 6, visibility: "hidden" });
    this.box.classList.remove("pointed");
    this.tip.hidden = true;
  }

  drawSeries(s) {
    const grey = s.mark === "triangle" ? "var(--c777777)" : colour(s.variant);
    const group = add(this.inside, "g", { class: "series", style: `stroke:${grey};fill:${grey}` });
    if (s.variant !== null) group.dataset.variant = s.variant;
    group.classList.toggle("off", hidden.has(s.variant));
    const line = s.mark === "line" || s.mark === "thin";
    const px = s.x.map((v, i) => (v === null || s.y[i] === null ? null : this.at("x", v)));
    const py = s.y.map((v, i) => (px[i] === null ? null : this.at("y", v)));
    const path = (list) => {
      const go = (p, i) => (p === null ? "" : `${i && px[i - 1] !== null ? "L" : "M"}${p} ${list[i]}`);
      return px.map(go).join("");
    };
    if (s.low && s.high && line) {
      const edge = (list, i) => `${px[i]} ${this.at("y", list[i])}`;
      const known = px.map((_, i) => i).filter((i) => px[i] !== null && s.low[i] !== null && s.high[i] !== null);
      const round = [...known.map((i) => edge(s.low, i)), ...known.reverse().map((i) => edge(s.high, i))];
      if (round.length) add(group, "path", { class: "band", d: `M${round.join("L")}Z` });
    }
    const dash = looks.get(s.variant)?.dash ?? "";
    if (line) add(group, "path", { class: s.mark, d: path(py), "stroke-dasharray": dash });
    px.forEach((p, i) => {
      if (p === null) return;
      const bar = (x1, x2, y1, y2) => add(group, "line", { class: "bar", x1, x2, y1, y2 });
      if (bounded(s.low, s.high, i) && !line) bar(p, p, this.at("y", s.low[i]), this.at("y", s.high[i]));
      if (bounded(s.x_low, s.x_high, i)) bar(this.at("x", s.x_low[i]), this.at("x", s.x_high[i]), py[i], py[i]);
      const [cx, cy, r] = [p, py[i], s.mark === "ring" ? 3.2 : 4.5];
      if (s.mark === "triangle") add(group, "path", { class: s.mark, d: `M${cx - 5} ${cy - 4}h10l-5 8z` });
      else if (!line || s.x.length === 1)
        add(group, "path", { class: s.mark, d: outline(looks.get(s.variant)?.marker, cx, cy, r) });
      this.points.push({ s, i, group, px: p, py: py[i] });
    });
  }

  // -------------------------------------------------------- pointer and keys

  listen() {
    const place = (event) => {
      const box = this.svg.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let start = null;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button === 0) start = place(event);
      if (event.button === 0 && event.isTrusted) this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (start) this.stretch(start, place(event));
      else this.point(...place(event));
    });
    this.svg.addEventListener("pointerup", (event) => {
      const from = start;
      start = null;
      if (from && !this.zoom(from, place(event))) this.point(...place(event));
    });
    this.svg.addEventListener("pointercancel", () => ((start = null), this.stretch()));
    this.svg.addEventListener("pointerleave", () => start || this.point());
    this.svg.addEventListener("dblclick", () => this.reset());
    this.svg.addEventListener("keydown", (event) => {
      const [a, b] = this.view.x;
      const keys = { "+": [0.2, -0.2], "-": [-1 / 3, 1 / 3], ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2] };
      const by = keys[event.key === "=" ? "+" : event.key];
      if (by) this.look({ x: [a + by[0] * (b - a), b + by[1] * (b - a)] });
      else if (event.key === "0" || event.key === "Escape") this.reset();
      else return;
      event.preventDefault();
    });
  }

  /** The rectangle of a drag, in pixels. A drag along one axis selects all of the other. */
  area([x0, y0], [x1, y1]) {
    const fit = (p, low, size) => Math.min(low + size, Math.max(low, p));
    const xs = [fit(Math.min(x0, x1), this.left, this.w), fit(Math.max(x0, x1), this.left, this.w)];
    const ys = [fit(Math.min(y0, y1), this.top, this.h), fit(Math.max(y0, y1), this.top, this.h)];
    return { x: xs[1] - xs[0] < 12 ? null : xs, y: ys[1] - ys[0] < 24 || this.rows ? null : ys };
  }

  stretch(from, to) {
    this.svg.querySelector(".range")?.remove();
    this.point();
    const { x, y } = from ? this.area(from, to) : {};
    if (!x && !y) return;
    const [x0, x1] = x ?? [this.left, this.left + this.w];
    const [y0, y1] = y ?? [this.top, this.top + this.h];
    add(this.svg, "rect", { class: "range", x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
  }

  /** Show the range of a drag. If it is one of x alone, y shows the points in it. Returns whether there is a range. */
  zoom(from, to) {
    this.stretch();
    const { x, y } = this.area(from, to);
    if (!x && !y) return false;
    const next = {};
    if (x) next.x = x.map((p) => this.position("x", p));
    if (y) next.y = y.reverse().map((p) => this.position("y", p));
    else if (!this.data.y.ticks.length) {
      const [low, high] = next.x.map((p) => back(this.data.x, p)).sort((a, b) => a - b);
      next.y = this.range("y", (s, i) => s.x[i] !== null && s.x[i] >= low && s.x[i] <= high);
    }
    this.look(next);
    return true;
  }

  /** Say what the nearest point is, within 40 pixels. Without arguments: nothing. */
  point(x = NaN, y = NaN) {
    let best = null;
    let least = 40;
    for (const p of this.points) {
      if (hidden.has(p.s.variant) || p.px < this.left - 1 || p.px > this.left + this.w + 1) continue;
      if (p.py < this.top - 1 || p.py > this.top + this.h + 1) continue;
      const far = Math.hypot(p.px - x, p.py - y) - (p.s.mark === "line" || p.s.mark === "dot" ? 0.5 : 0);
      if (far < least) [best, least] = [p, far];
    }
    const name = best?.s.variant ?? null;
    this.box.classList.toggle("pointed", name !== null);
    for (const p of this.points) p.group.classList.toggle("hot", name !== null && p.s.variant === name);
    this.spot?.setAttribute("visibility", best ? "visible" : "hidden");
    this.tip.hidden = !best;
    if (!best) return;
    this.spot.setAttribute("cx", best.px);
    this.spot.setAttribute("cy", best.py);
    this.describe(best);
  }

  describe({ s, i, px, py }) {
    const line = (key, low, high) => {
      const axis = this.data[key];
      const fixed = axis.ticks.find(([value]) => value === s[key][i]);
      const bounds = bounded(low, high, i) ? ` [${exact(low[i])}, ${exact(high[i])}]` : "";
      const label = axis.label.split("\n")[0] || this.data.title;
      return label ? [make("div", {}, `${label}: ${fixed?.[1] ?? exact(s[key][i])}${bounds}`)] : [];
    };
    const head = make("b", {}, [s.variant, s.name].filter(Boolean).join(", "));
    const extra = s.texts?.[i] ? [make("div", {}, s.texts[i])] : [];
    this.tip.replaceChildren(head, ...line("x", s.x_low, s.x_high), ...line("y", s.low, s.high), ...extra);
    const width = this.tip.offsetWidth;
    const left = px + 14 + width > this.width ? Math.max(0, Math.min(px - 14 - width, this.width - width)) : px + 14;
    const covers = left < px && left + width > px;
    const y = this.svg.getBoundingClientRect().top - this.box.getBoundingClientRect().top + py;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${Math.max(0, covers ? y + 14 : y - this.tip.offsetHeight / 2)}px`;
  }
}

function chart(figure, source) {
  const data = JSON.parse(source.textContent);
  const reset = make("button", { type: "button", class: "reset" }, "Reset zoom");
  const changed = () => (reset.disabled = !own.some((p) => p.zoomed));
  const own = data.panels.map((p) => new Panel(p, figure.dataset.title, changed));
  reset.disabled = true;
  reset.addEventListener("click", () => own.forEach((p) => p.reset()));
  const hint = make("span", {}, "Drag to zoom; double-click resets. Click a name to hide a variant.");
  const tools = make("div", { class: "tools" }, hint, reset);
  const grid = make("div", { class: "panels" }, ...own.map((p) => p.box));
  figure.prepend(make("div", { class: "chart" }, grid, legend(data.variants), tools));
  figure.classList.add("live");
}
