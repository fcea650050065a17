// Figure 3 of the paper for one response: D_t of every token and the threshold of the rule; for rules of the ratio
// alone the ratio and its limits. And the strips: what each rule does to the whole response, in one row.

const CODES = DATA.reasons.map((r) => r.name);
const WORDS = DATA.reasons.map((r) => r.words);
const HELD = new Set(DATA.reasons.filter((r) => r.held).map((r) => r.name));
const reasonAt = (verdict, i) => CODES[Number(verdict.r[i])];
const at = (values, i) => (Array.isArray(values) ? values[i] : values);

function stripOf(response, verdict) {
  const T = response.tokens.length,
    svg = draw(null, "svg", {
      viewBox: `0 0 ${T} 10`,
      preserveAspectRatio: "none",
      class: "strip",
      "aria-hidden": "true",
    });
  for (let from = 0; from < T;) {
    let to = from;
    while (to < T && verdict.r[to] === verdict.r[from]) to++;
    const name = reasonAt(verdict, from);
    if (name !== "kept" && name !== "outside") {
      // towards: half the height, so that it differs in more than colour
      draw(svg, "rect", {
        x: from,
        width: to - from,
        y: name === "towards" ? 6.5 : 0,
        height: name === "towards" ? 3.5 : 10,
        class: `b-${name}`,
      });
    }
    from = to;
  }
  return svg;
}

function shownScale(D, th) {
  const largest = Math.max(...D.filter(known), 1e-9);
  const limits = th.filter(known);
  const most = limits.length ? Math.max(...limits) : 0,
    least = limits.length ? Math.min(...limits) : 0;
  // a threshold far above every D_t would flatten them; one far below zero too
  const top = Math.max(largest, Math.min(most, 4 * largest));
  const low = Math.min(0, Math.max(least, -0.5 * top));
  const cut = [most > top * 1.08 ? "above" : null, least < low ? "below" : null].filter(Boolean).join(" and ");
  return [low, top * 1.08, cut];
}

// {mark: token index or null -> moves the cursor}; calls chosen(i) and pointed(i).
function tokenPlot(plot, response, judge, verdict, events) {
  plot.replaceChildren();
  const width = Math.max(260, plot.clientWidth),
    height = 220,
    box = { left: 54, right: width - 8, top: 26, bottom: height - 38 };
  const T = response.tokens.length;
  const ofRatio = verdict.d === undefined;
  const D = ofRatio ? response.log.map((v) => (known(v) ? Math.exp(v) : null)) : response.D[verdict.d].values;
  const th = ofRatio ? [] : D.map((d, i) => (known(d) ? at(verdict.th, i) : null));
  const limits = judge.ratio || [];
  const [low, high, cut] = ofRatio
    ? [
        Math.min(...D.filter(known), ...limits.filter((v) => v > 0), 0.9),
        Math.max(...D.filter(known), ...limits, 1.1),
        "",
      ]
    : shownScale(D, th);
  const svg = draw(plot, "svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    "aria-label": `${ofRatio ? "Ratio" : "Divergence and threshold"} by position, rule ${judge.label}. The figures of each token are in the table below the response.`,
  });
  const x = (i) => box.left + 3 + ((i + 0.5) / T) * (box.right - box.left - 6);
  const y = scale("linear", low, high, box.bottom, box.top, 4);
  for (const v of y.ticks) {
    draw(svg, "line", { x1: box.left, x2: box.right, y1: y.to(v), y2: y.to(v), class: "gridline" });
    draw(svg, "text", { x: box.left - 7, y: y.to(v) + 4, "text-anchor": "end" }, number(v));
  }
  draw(
    svg,
    "text",
    { x: box.left - 46, y: box.top - 10 },
    ofRatio ? "ratio \u03c1_t" : `D_t: ${response.D[verdict.d].name}`,
  );
  for (const v of ticks(1, Math.max(T, 2), Math.min(10, width / 60), true))
    if (v >= 1 && v <= T) draw(svg, "text", { x: x(v - 1), y: box.bottom + 16, "text-anchor": "middle" }, number(v));
  draw(svg, "text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, "position in the response (tokens)");
  const zero = Math.max(box.top, Math.min(box.bottom, y.to(ofRatio ? 1 : 0)));
  draw(svg, "line", { x1: box.left, x2: box.right, y1: zero, y2: zero, class: "axis" });
  const wide = Math.max(1, Math.min(5, ((box.right - box.left) / T) * 0.5));
  // one path a reason: a thousand tokens are a handful of elements
  for (const [code, name] of CODES.entries()) {
    let d = "";
    D.forEach((v, i) => {
      if (known(v) && Number(verdict.r[i]) === code)
        d += `M${x(i).toFixed(1)},${zero.toFixed(1)}V${Math.max(box.top, Math.min(y.to(v), box.bottom)).toFixed(1)}`;
    });
    if (d) draw(svg, "path", { d, class: `stem k-${name}` }).style.strokeWidth = `${wide}px`;
  }
  const clamp = (v) => Math.max(box.top - 4, Math.min(box.bottom, y.to(v)));
  if (!ofRatio) {
    let d = "";
    const half = (box.right - box.left - 6) / T / 2;
    th.forEach((v, i) => {
      if (known(v))
        d += `${i && known(th[i - 1]) ? "L" : "M"}${(x(i) - half).toFixed(1)},${clamp(v).toFixed(1)}L${(x(i) + half).toFixed(1)},${clamp(v).toFixed(1)}`;
    });
    draw(svg, "path", { d, class: "threshold" });
    const first = th.find(known);
    if (first !== undefined)
      draw(
        svg,
        "text",
        { x: box.right, y: box.top - 10, "text-anchor": "end" },
        `\u2014 threshold${cut ? ` (cut off ${cut})` : ""}`,
      );
  } else
    for (const v of limits)
      if (v > 0) draw(svg, "line", { x1: box.left, x2: box.right, y1: clamp(v), y2: clamp(v), class: "threshold" });
  const cursor = draw(svg, "line", { y1: box.top - 4, y2: box.bottom, class: "at", visibility: "hidden" });
  const index = (event) => {
    const b = svg.getBoundingClientRect(),
      px = ((event.clientX - b.left) / b.width) * width;
    return Math.max(0, Math.min(T - 1, Math.floor(((px - box.left - 3) / (box.right - box.left - 6)) * T)));
  };
  svg.addEventListener("pointermove", (event) => events.pointed(index(event)));
  svg.addEventListener("pointerleave", () => events.pointed(null));
  svg.addEventListener("click", (event) => events.chosen(index(event)));
  return (i) => {
    cursor.setAttribute("visibility", i === null ? "hidden" : "visible");
    if (i !== null) {
      cursor.setAttribute("x1", x(i));
      cursor.setAttribute("x2", x(i));
    }
  };
}
