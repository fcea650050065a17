"use strict";
// Small tools: elements, scales, numbers as text. Everything that is not ours gets in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const DATA = JSON.parse(document.getElementById("data").textContent);

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

// A number for people: four significant digits, no more than are there.
function number(v) {
  if (!known(v)) return "-";
  const size = Math.abs(v);
  if (size !== 0 && (size < 1e-3 || size >= 1e6))
    return v
      .toExponential(2)
      .replace(/\.?0+e/, "e")
      .replace("-", "\u2212");
  const text = size >= 100 ? v.toFixed(Number.isInteger(v) ? 0 : 1) : String(Number(v.toPrecision(4)));
  return text.replace("-", "\u2212");
}

function percent(v) {
  if (!known(v)) return "-";
  const p = 100 * v,
    size = Math.abs(p);
  return (
    (size >= 10 || size === 0
      ? p.toFixed(1)
      : size >= 0.1
        ? p.toFixed(2)
        : Number(p.toPrecision(2)).toString()
    ).replace("-", "\u2212") + "%"
  );
}

// On an axis: no more digits than the round number has.
const marked = (v, form) =>
  form === "percent" ? `${String(Number((100 * v).toPrecision(6))).replace("-", "\u2212")}%` : number(v);
const written = (v, form) => (form === "percent" ? percent(v) : number(v));
const interval = (v, low, high, form) =>
  written(v, form) + (known(low) && known(high) ? ` [${written(low, form)}, ${written(high, form)}]` : "");

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count, whole) {
  const span = high - low || 1;
  let step = 10 ** Math.floor(Math.log10(span / count));
  for (const factor of [2, 2.5, 2]) if (span / step > count * 1.2) step *= factor;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++)
    found.push(Number((at * step).toPrecision(12)));
  return found;
}

const LINEAR_WITHIN = 0.01;
const TRANSFORMS = {
  linear: (v) => v,
  log: (v) => (v > 0 ? Math.log10(v) : NaN),
  symlog: (v) => Math.sign(v) * Math.log10(1 + Math.abs(v) / LINEAR_WITHIN),
};

// {to: value -> pixel, ticks} of an axis.
function scale(kind, low, high, from, to, count, whole) {
  const f = TRANSFORMS[kind];
  let a = f(low),
    b = f(high);
  if (!(b > a)) {
    const half = Math.abs(a) * 0.1 || 0.5;
    a -= half;
    b += half;
    if (kind === "linear") {
      low = a;
      high = b;
    }
  }
  let marks;
  if (kind === "linear") marks = ticks(low, high, count, whole);
  else {
    marks = kind === "symlog" ? [0] : [];
    for (let e = -12; e <= 6; e++)
      for (const s of kind === "symlog" ? [1, -1] : [1]) {
        const v = s * 10 ** e;
        if (f(v) >= a - 1e-9 && f(v) <= b + 1e-9 && (kind === "log" || e >= -2)) marks.push(v);
      }
    if (marks.length < 2 && kind === "log") marks = [10 ** a, 10 ** b];
    const most = Math.max(2, count);
    if (marks.length > most + 2) marks = marks.filter((v, i) => i % Math.ceil(marks.length / most) === 0 || v === 0);
  }
  return { to: (v) => from + ((f(v) - a) / (b - a)) * (to - from), ticks: marks };
}

const SHAPES = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x},${y - 1.25 * r}L${x + 1.15 * r},${y + r}H${x - 1.15 * r}z`,
  (x, y, r) => `M${x},${y - 1.4 * r}L${x + 1.4 * r},${y}L${x},${y + 1.4 * r}L${x - 1.4 * r},${y}z`,
  (x, y, r) => `M${x},${y + 1.25 * r}L${x + 1.15 * r},${y - r}H${x - 1.15 * r}z`,
  (x, y, r) => `M${x - 1.5 * r},${y - 0.6 * r}h${3 * r}v${1.2 * r}h${-3 * r}z`,
  (x, y, r) =>
    `M${x - r},${y - r / 2.2}h${r / 1.8}v${-r / 1.8}h${r * 0.9}v${r / 1.8}h${r / 1.8}v${r * 0.9}h${-r / 1.8}v${r / 1.8}h${-r * 0.9}v${-r / 1.8}h${-r / 1.8}z`,
];
const marker = (parent, slot, x, y, r, extra) =>
  draw(parent, "path", { d: SHAPES[slot % SHAPES.length](x, y, r), class: `f${slot % 10} ${extra || ""}` });

// A line's sign in a legend.
function sign(slot, dashed) {
  const svg = draw(null, "svg", { width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true" });
  draw(svg, "path", { d: "M1,6H25", class: `line s${slot % 10} ${dashed ? "dashed" : ""}` });
  marker(svg, slot, 13, 6, 3.4);
  return svg;
}

// Hatches, so that stacked reasons differ in more than colour. Ids are the page's, so each chart has its own.
let hatches = 0;
function hatch(svg, name) {
  const paths = { prefix_budget: "M0,6L6,0", sequence_limit: "M0,0L6,6", ratio_clip: "M3,0V6", clamped: "M0,3H6" };
  if (!paths[name]) return null;
  const id = `hatch${hatches++}`;
  const pattern = draw(draw(svg, "defs"), "pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" });
  draw(pattern, "path", { d: paths[name], class: "hatch" });
  return `url(#${id})`;
}

const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
