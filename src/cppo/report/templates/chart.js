// Charts: lines with bands and single runs behind them, stacked bars by reason, rows with intervals.

const hidden = new Set(); // variants that the legend has switched off
const visible = (label) => !hidden.has(label);

function axes(svg, chart, box, x, y, names) {
  for (const v of y.ticks) {
    const at = y.to(v);
    draw(svg, "line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "gridline" });
    draw(svg, "text", { x: box.left - 7, y: at + 4, "text-anchor": "end" }, marked(v, chart.form));
  }
  if (known(chart.reference)) {
    const at = y.to(chart.reference);
    if (at >= box.top && at <= box.bottom)
      draw(svg, "line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "reference" });
  }
  draw(svg, "line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" });
  x.ticks.forEach((v, i) => {
    draw(svg, "text", { x: x.to(v), y: box.bottom + 16, "text-anchor": "middle" }, names ? names[i] : number(v));
  });
  if (chart.xLabel) draw(svg, "text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, chart.xLabel);
  draw(svg, "text", { x: box.left - 40, y: box.top - 9 }, chart.yLabel);
}

function base(plot, width, height, chart) {
  plot.replaceChildren();
  const svg = draw(plot, "svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    tabindex: "0",
    "aria-label": `${chart.title}. Arrow keys read the figures; they are also below, as a table.`,
  });
  return svg;
}

function drawLines(plot, chart, width) {
  const height = 236,
    box = { left: 50, right: width - 8, top: 26, bottom: height - 38 };
  const svg = base(plot, width, height, chart);
  const lines = chart.lines.filter((line) => visible(line.label));
  const all = lines.length ? lines : chart.lines;
  const xs = all.flatMap((l) => [...l.x, ...(l.thin || []).flatMap((t) => t.x)]);
  const thin = all.flatMap((l) => (l.thin || []).flatMap((t) => t.y));
  const ys = [...all.flatMap((l) => [...l.y, ...(l.low || []), ...(l.high || [])]), ...thin].filter(known);
  const positive = ys.filter((v) => v > 0);
  const low = chart.scale === "log" ? Math.min(...positive) : Math.min(...ys, ...(chart.zero ? [0] : []));
  const high = Math.max(...ys);
  const pad = chart.scale === "linear" ? (high - low) * 0.06 : 0;
  const x = scale(
    "linear",
    Math.min(...xs),
    Math.max(...xs),
    box.left + 4,
    box.right - 6,
    Math.min(8, width / 70),
    true,
  );
  const y = scale(chart.scale, chart.zero && low === 0 ? 0 : low - pad, high + pad, box.bottom, box.top, 4);
  axes(svg, chart, box, x, y);
  const path = (px, py) =>
    px
      .map((v, i) => (known(py[i]) && known(y.to(py[i])) ? [x.to(v), y.to(py[i])] : null))
      .map((p, i, ps) => (p ? `${i && ps[i - 1] ? "L" : "M"}${p[0].toFixed(1)},${p[1].toFixed(1)}` : ""))
      .join("");
  for (const line of lines) {
    if (!line.low) continue;
    const ends = line.x.map((v, i) => [x.to(v), y.to(line.low[i]), y.to(line.high[i])]).filter((p) => p.every(known));
    const there = ends.map((p) => `${p[0].toFixed(1)},${p[2].toFixed(1)}`),
      back = ends.map((p) => `${p[0].toFixed(1)},${p[1].toFixed(1)}`).reverse();
    draw(svg, "polygon", { points: [...there, ...back].join(" "), class: `band f${line.slot % 10}` });
  }
  for (const line of lines)
    for (const t of line.thin || [])
      draw(svg, "path", { d: path(t.x, t.y), class: `thin s${line.slot % 10} ${t.open ? "open" : ""}` });
  for (const line of lines) {
    draw(svg, "path", { d: path(line.x, line.y), class: `line s${line.slot % 10} ${line.dashed ? "dashed" : ""}` });
    const every = Math.max(1, Math.round(line.x.length / 7)),
      first = Math.floor(((line.slot % 6) * every) / 6);
    line.x.forEach((v, i) => {
      if (i % every === first % every && known(line.y[i]) && known(y.to(line.y[i])))
        marker(svg, line.slot, x.to(v), y.to(line.y[i]), 3);
    });
  }
  const cross = draw(svg, "line", { y1: box.top, y2: box.bottom, class: "cross", visibility: "hidden" });
  const places = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b);
  return {
    places,
    left: (v) => x.to(v),
    show: (v) => {
      cross.setAttribute("visibility", v === null ? "hidden" : "visible");
      if (v !== null) {
        cross.setAttribute("x1", x.to(v));
        cross.setAttribute("x2", x.to(v));
      }
    },
    read: (v) => [
      `${chart.xLabel.replace(/ \(.*/, "")} ${number(v)}`,
      lines
        .map((l) => {
          const at = l.x.indexOf(v);
          return at < 0
            ? null
            : {
                slot: l.slot,
                dashed: l.dashed,
                text: `${l.label} ${interval(l.y[at], l.low && l.low[at], l.high && l.high[at], chart.form)}`,
              };
        })
        .filter(Boolean),
    ],
  };
}

function drawStack(plot, chart, width) {
  const rows = chart.xLabel === ""; // words: a row each
  const chosen = chart.x.map((label, i) => i).filter((i) => !rows || visible(String(chart.x[i])));
  const totals = chosen.map((i) => chart.layers.reduce((sum, layer) => sum + (layer.y[i] || 0), 0));
  const top = Math.max(...totals, 1e-9);
  const height = rows ? 46 + 26 * chosen.length : 236;
  const svg = base(plot, width, height, chart);
  const longest = Math.min(width * 0.35, 12 + 7 * Math.max(...chosen.map((i) => String(chart.x[i]).length), 0));
  const box = { left: rows ? longest : 50, right: width - 8, top: rows ? 6 : 26, bottom: height - 38 };
  const bars = [];
  const rect = (layer, i, a) => {
    const shape = draw(svg, "rect", { ...a, class: `b-${layer.slot}` });
    const pattern = hatch(svg, layer.slot);
    if (pattern) draw(svg, "rect", { ...a, fill: pattern });
    return shape;
  };
  if (rows) {
    const x = scale("linear", 0, top, box.left, box.right, Math.min(6, width / 90));
    for (const v of x.ticks) {
      draw(svg, "line", { x1: x.to(v), x2: x.to(v), y1: box.top, y2: box.bottom, class: "gridline" });
      draw(svg, "text", { x: x.to(v), y: box.bottom + 16, "text-anchor": "middle" }, marked(v, "percent"));
    }
    draw(svg, "text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, chart.yLabel);
    chosen.forEach((i, place) => {
      let from = 0;
      const yAt = box.top + 26 * place + 5;
      draw(
        svg,
        "text",
        { x: box.left - 8, y: yAt + 13, "text-anchor": "end", class: "name" },
        clipped(String(chart.x[i]), longest),
      );
      for (const layer of chart.layers) {
        const wide = x.to(from + (layer.y[i] || 0)) - x.to(from);
        if (wide > 0) rect(layer, i, { x: x.to(from), y: yAt, width: wide, height: 16 });
        from += layer.y[i] || 0;
      }
      bars.push({ v: i, x: x.to(from), y: yAt });
    });
  } else {
    const y = scale("linear", 0, top * 1.05, box.bottom, box.top, 4);
    const step = (box.right - box.left) / chosen.length,
      every = Math.ceil((7.5 * Math.max(...chart.x.map((s) => String(s).length)) + 8) / step);
    const named = chosen.filter((i) => i % every === 0);
    axes(
      svg,
      chart,
      box,
      { to: (i) => box.left + step * (i + 0.5), ticks: named },
      y,
      named.map((i) => chart.x[i]),
    );
    for (const i of chosen) {
      let from = 0;
      for (const layer of chart.layers) {
        const tall = y.to(from) - y.to(from + (layer.y[i] || 0));
        if (tall > 0)
          rect(layer, i, { x: box.left + step * (i + 0.09), width: step * 0.82, y: y.to(from) - tall, height: tall });
        from += layer.y[i] || 0;
      }
      bars.push({ v: i, x: box.left + step * (i + 0.5), y: y.to(from) });
    }
  }
  const list = el("ul", { class: "local" });
  for (const layer of chart.layers) {
    const mark = draw(null, "svg", { width: 16, height: 12, "aria-hidden": "true" });
    draw(mark, "rect", { width: 16, height: 12, class: `b-${layer.slot}` });
    const pattern = hatch(mark, layer.slot);
    if (pattern) draw(mark, "rect", { width: 16, height: 12, fill: pattern });
    list.append(el("li", {}, mark, layer.label));
  }
  plot.append(list);
  return {
    places: bars.map((b) => b.v),
    rows,
    left: (v) => bars.find((b) => b.v === v).x,
    top: (v) => bars.find((b) => b.v === v).y,
    show: () => {},
    read: (v) => [
      `${chart.xLabel.replace(/ \(.*/, "")} ${chart.x[v]}`.trim(),
      chart.layers.map((l) => ({ reason: l.slot, text: `${l.label} ${percent(l.y[v])}` })),
    ],
  };
}

const clipped = (text, room) =>
  text.length * 7 + 10 > room ? text.slice(0, Math.max(3, Math.floor((room - 18) / 7))) + "\u2026" : text;

function drawIntervals(plot, chart, width) {
  const labels = [...new Set(chart.bars.map((b) => b.label))].filter(visible);
  const bars = chart.bars.filter((b) => visible(b.label));
  const height = 44 + 32 * labels.length,
    svg = base(plot, width, height, chart);
  const longest = Math.min(width * 0.32, 14 + 7 * Math.max(...labels.map((l) => l.length), 0));
  const box = { left: longest, right: width - 10, top: 4, bottom: height - 38 };
  const values = bars.flatMap((b) => [b.value, b.low, b.high]).filter(known);
  const low = Math.min(...values),
    high = Math.max(...values),
    pad = (high - low) * 0.06;
  const x = scale("linear", low - pad, high + pad, box.left + 6, box.right - 6, Math.min(7, width / 85));
  for (const v of x.ticks) {
    draw(svg, "line", { x1: x.to(v), x2: x.to(v), y1: box.top, y2: box.bottom, class: "gridline" });
    draw(svg, "text", { x: x.to(v), y: box.bottom + 16, "text-anchor": "middle" }, marked(v, chart.form));
  }
  draw(svg, "text", { x: box.right, y: box.bottom + 32, "text-anchor": "end" }, chart.yLabel);
  labels.forEach((label, row) => {
    const middle = box.top + 32 * row + 16;
    draw(
      svg,
      "text",
      { x: box.left - 10, y: middle + 4, "text-anchor": "end", class: "name" },
      clipped(label, longest),
    );
    for (const bar of bars.filter((b) => b.label === label)) {
      const y = middle + (bar.note === "final" ? 6 : -6),
        slot = bar.slot;
      if (known(bar.low))
        draw(svg, "line", { x1: x.to(bar.low), x2: x.to(bar.high), y1: y, y2: y, class: `line s${slot % 10}` });
      marker(svg, slot, x.to(bar.value), y, 4.2, bar.note === "final" ? `hollow s${slot % 10}` : "");
    }
  });
  const of = (v) => bars.filter((b) => b.label === labels[v]);
  return {
    places: labels.map((_, i) => i),
    rows: true,
    left: (v) => x.to(of(v)[0].value),
    top: (v) => box.top + 32 * v,
    show: () => {},
    read: (v) => [
      labels[v],
      of(v).map((b) => ({ slot: b.slot, text: `${b.note} ${interval(b.value, b.low, b.high, chart.form)}` })),
    ],
  };
}

const DRAWN = { lines: drawLines, stack: drawStack, intervals: drawIntervals };

// Pointer and arrow keys read the figures of a chart.
function readable(plot, made) {
  const svg = plot.querySelector("svg");
  const tip = el("div", { class: "tip", hidden: "", role: "status" });
  plot.append(tip);
  let at = null;
  const show = (v) => {
    at = v;
    made.show(v);
    tip.hidden = v === null;
    if (v === null) return;
    const [head, rows] = made.read(v);
    tip.replaceChildren(
      el("b", {}, head),
      ...rows.map((r) =>
        el(
          "div",
          {},
          r.slot !== undefined ? sign(r.slot, r.dashed) : el("span", { class: `swatch w-${r.reason}` }),
          r.text,
        ),
      ),
    );
    const width = plot.clientWidth,
      x = made.left(v);
    const left = x + 14 + tip.offsetWidth > width ? Math.max(0, x - 14 - tip.offsetWidth) : x + 14;
    tip.style.transform = `translate(${left}px, ${made.rows ? made.top(v) + 24 : 20}px)`;
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(),
      px = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width,
      py = event.clientY - box.top;
    const away = (v) => (made.rows ? Math.abs(made.top(v) + 12 - py) : Math.abs(made.left(v) - px));
    return made.places.reduce((best, v) => (best === null || away(v) < away(best) ? v : best), null);
  };
  svg.addEventListener("pointermove", (event) => show(nearest(event)));
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const now = made.places.indexOf(at),
      last = made.places.length - 1;
    const to = {
      ArrowRight: now + 1,
      ArrowDown: now + 1,
      ArrowLeft: now < 0 ? last : now - 1,
      ArrowUp: now < 0 ? last : now - 1,
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") show(null);
    if (to === undefined) return;
    event.preventDefault();
    show(made.places[Math.max(0, Math.min(last, to))]);
  });
}

function tableOf(chart) {
  const rows = [];
  if (chart.kind === "lines") {
    rows.push([chart.xLabel, ...chart.lines.map((l) => l.label)]);
    const xs = [...new Set(chart.lines.flatMap((l) => l.x))].sort((a, b) => a - b);
    for (const v of xs)
      rows.push([
        number(v),
        ...chart.lines.map((l) => {
          const i = l.x.indexOf(v);
          return i < 0 ? "" : interval(l.y[i], l.low && l.low[i], l.high && l.high[i], chart.form);
        }),
      ]);
  } else if (chart.kind === "stack") {
    rows.push([chart.xLabel, ...chart.layers.map((l) => l.label)]);
    chart.x.forEach((v, i) => rows.push([v, ...chart.layers.map((l) => percent(l.y[i]))]));
  } else {
    rows.push(["", "which", chart.yLabel]);
    for (const b of chart.bars) rows.push([b.label, b.note, interval(b.value, b.low, b.high, chart.form)]);
  }
  return table(chart.title, rows);
}

function table(title, rows) {
  const [head, ...body] = rows;
  const line = (row) =>
    el("tr", {}, ...row.map((cell, i) => (i ? el("td", {}, String(cell)) : el("th", { scope: "row" }, String(cell)))));
  return el(
    "table",
    {},
    el("caption", { class: "sr" }, title),
    el("thead", {}, el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, String(cell))))),
    el("tbody", {}, ...body.map(line)),
  );
}

function localLegend(plot, chart) {
  if (
    chart.kind !== "lines" ||
    (document.getElementById("legend") && chart.lines.every((l) => DATA.variants.includes(l.label)))
  )
    return;
  if (chart.lines.length < 2) return;
  plot.append(el("ul", { class: "local" }, ...chart.lines.map((l) => el("li", {}, sign(l.slot, l.dashed), l.label))));
}

function redraw(figure) {
  const chart = DATA.charts[Number(figure.dataset.chart)],
    plot = figure.querySelector(".plot");
  const width = Math.max(240, Math.floor(plot.clientWidth));
  const made = DRAWN[chart.kind](plot, chart, width);
  localLegend(plot, chart);
  readable(plot, made);
}
