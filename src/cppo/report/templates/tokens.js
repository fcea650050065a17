// The token view: choice of response and rule, the text, the keyboard, and what is known of a token.

const TOKENS = DATA.tokens;
const byId = (id) => document.getElementById(id);
const view = { response: null, judge: 0, token: 0, spans: [], mark: () => {} };
const verdictNow = () => view.response.verdicts[view.judge];
const counts = (verdict) => {
  const n = {};
  for (const c of verdict.r) n[CODES[Number(c)]] = (n[CODES[Number(c)]] || 0) + 1;
  return n;
};
const heldIn = (n) => Object.entries(n).reduce((sum, [name, k]) => sum + (HELD.has(name) ? k : 0), 0);
// A run of a study with more variants than strips brings its own rule along.
const judgesOf = (response) => (response.extra ? [...TOKENS.judges, response.extra] : TOKENS.judges);
const judgeName = (response, k) => judgesOf(response)[k].label + (k === response.own ? " (as run)" : "");

function options(select, values, names, chosen) {
  select.replaceChildren(...values.map((v, i) => el("option", { value: String(v) }, names[i])));
  select.value = String(chosen);
  select.parentElement.hidden = values.length < 2 && select.id !== "pick-response";
}

const responsesOf = (run, step) =>
  TOKENS.responses.map((r, i) => [r, i]).filter(([r]) => r.run === run && (step === undefined || r.step === step));

function pick(index) {
  const r = TOKENS.responses[index];
  const runs = TOKENS.runs,
    steps = [...new Set(responsesOf(r.run).map(([o]) => o.step))];
  const same = responsesOf(r.run, r.step);
  options(byId("pick-run"), runs, runs, r.run);
  options(
    byId("pick-step"),
    steps,
    steps.map((s) => (s === null ? "-" : `step ${s}`)),
    r.step,
  );
  options(
    byId("pick-response"),
    same.map(([, i]) => i),
    same.map(
      ([o], n) =>
        `${n + 1}: ${o.held ? `${o.held} of ${o.length} tokens held back` : `${o.length} tokens, none held back`}`,
    ),
    index,
  );
  const before = view.response;
  view.response = r;
  if (!before || before.run !== r.run)
    view.judge = r.own === null ? Math.min(view.judge, judgesOf(r).length - 1) : r.own;
  showRules();
  showText();
  showRule();
  const first = [...verdictNow().r].findIndex((c) => HELD.has(CODES[Number(c)]));
  select(Math.max(0, first), false);
}

function showRules() {
  const r = view.response,
    loss = r.mask ? [...r.mask].filter((c) => c === "1").length : r.tokens.length;
  byId("rules").replaceChildren(
    ...judgesOf(r).map((judge, k) => {
      const n = counts(r.verdicts[k]),
        held = heldIn(n),
        input = el("input", { type: "radio", name: "rule", value: String(k) });
      input.checked = k === view.judge;
      const clamps = judge.rule === "cispo" || judge.rule === "minpro";
      const label = el(
        "label",
        { title: `${judge.rule}: ${judge.parameters || "no parameters"}` },
        input,
        el("span", { class: "who" }, judge.label, k === r.own ? el("small", {}, " as run") : ""),
        stripOf(r, r.verdicts[k]),
        el("span", { class: "sum" }, `${held} of ${loss} ${clamps ? "clamped" : "held back"}`),
      );
      return label;
    }),
  );
}

function showText() {
  const r = view.response;
  byId("prompt").textContent = r.prompt;
  byId("prompt").parentElement.hidden = !r.prompt;
  view.spans = r.tokens.map((piece, i) => {
    const span = el("span", { class: "t", role: "option", id: `t${i}`, tabindex: "-1" });
    // a line break inside a mark would be invisible: show its sign, then break
    for (const [n, part] of piece.split("\n").entries()) {
      if (n) span.append(el("span", { class: "nl", "aria-hidden": "true" }, "\u21b5"), "\n");
      span.append(part);
    }
    if (!piece) span.append(el("span", { class: "nl" }, "\u2205"));
    return span;
  });
  byId("response").replaceChildren(...view.spans);
  const cut =
    r.length > r.tokens.length ? `, the first ${r.tokens.length} of ${r.length} tokens` : `, ${r.length} tokens`;
  const more = [
    r.step !== null ? `step ${r.step}` : null,
    Array.isArray(r.A) ? null : `advantage ${number(r.A)}`,
    r.reward !== undefined ? `reward ${number(r.reward)}` : null,
  ];
  byId("response-title").textContent = `Response${cut}${more
    .filter(Boolean)
    .map((t) => `, ${t}`)
    .join("")}`;
  byId("token-table").open = false;
}

function showRule() {
  const r = view.response,
    verdict = verdictNow(),
    judge = judgesOf(r)[view.judge];
  view.spans.forEach((span, i) => {
    const name = reasonAt(verdict, i);
    span.className = `t r-${name}${i === view.token ? " on" : ""}`;
    span.setAttribute("aria-label", `${r.tokens[i].trim() || "white space"}: ${WORDS[CODES.indexOf(name)]}`);
  });
  const of = verdict.d === undefined ? "the rule measures no divergence" : `D_t is ${r.D[verdict.d].name}`;
  byId("rule-note").textContent =
    `${judgeName(r, view.judge)}: ${judge.rule}(${judge.parameters}); ${of}` +
    (verdict.used !== undefined
      ? `; prefix budget delta_b ${number(verdict.db)} a token, ${percent(verdict.used)} used at the end`
      : "") +
    ".";
  byId("tokenplot-title").textContent =
    verdict.d === undefined ? "Ratio by position" : "Divergence and threshold by position";
  byId("tokenplot-note").textContent =
    verdict.d === undefined
      ? `Bars: ratio of each token, from 1.${judge.ratio ? " Lines: the limits of the ratio." : ""} Colours as in the text.`
      : "Bars: D_t of each token, coloured as in the text. Line: the largest D_t that would be within the limits; below 0 only moves back to the rollout policy are kept.";
  const n = counts(verdict);
  byId("key").replaceChildren(
    ...CODES.filter((name) => n[name]).map((name) =>
      el("li", {}, el("span", { class: `t r-${name}` }, "token"), `${WORDS[CODES.indexOf(name)]}: ${n[name]}`),
    ),
  );
  byId("previous").disabled = byId("next").disabled = heldIn(n) === 0;
  plotTokens();
  if (byId("token-table").open) showTable();
}

function plotTokens() {
  view.mark = tokenPlot(byId("tokenplot"), view.response, judgesOf(view.response)[view.judge], verdictNow(), {
    pointed: (i) => point(i === null ? view.token : i),
    chosen: (i) => select(i, true),
  });
  view.mark(view.token);
}

// Everything about a token, as (words, value).
function facts(i) {
  const r = view.response,
    v = verdictNow(),
    name = reasonAt(v, i);
  if (name === "outside") return [];
  const ratio = Math.exp(r.log[i]),
    D = v.d === undefined ? null : r.D[v.d].values[i];
  const c = v.c && v.c[i] !== undefined ? v.c[i] : HELD.has(name) ? 0 : ratio;
  const rows = [
    ["advantage A_t", number(at(r.A, i))],
    ["ratio \u03c1_t", number(ratio)],
    ["coefficient c_t", number(c)],
  ];
  if (D !== null) rows.push([`divergence D_t`, number(D)]);
  if (v.w) rows.push(["weight w_t", number(v.w[i])], ["w_t D_t", number(v.w[i] * D)]);
  if (v.th !== undefined) rows.push(["threshold for D_t", number(at(v.th, i))]);
  if (v.left) rows.push(["budget left for w_t D_t", number(v.left[i])]);
  rows.push(["log \u03c0", number(r.mu[i] + r.log[i])], ["log \u03bc", number(r.mu[i])]);
  return rows;
}

const position = (r, i) => (r.mask ? [...r.mask.slice(0, i + 1)].filter((c) => c === "1").length : i + 1);

function point(i) {
  const r = view.response,
    v = verdictNow(),
    name = reasonAt(v, i);
  view.mark(i);
  const rules = judgesOf(r).map((judge, k) => {
    const reason = reasonAt(r.verdicts[k], i);
    return el(
      "li",
      {},
      el("span", {}, el("span", { class: `swatch w-${reason}` }), judge.label),
      el("span", { class: `r ${HELD.has(reason) ? "held" : ""}` }, reason.replace("_", " ")),
    );
  });
  byId("details").replaceChildren(
    el("div", { class: "tok" }, r.tokens[i].replaceAll("\n", "\u21b5") || "\u2205"),
    el(
      "div",
      { class: "where" },
      name === "outside"
        ? `token ${i + 1} of ${r.length}, not in the loss`
        : `t = ${position(r, i)}, token ${i + 1} of ${r.length}`,
    ),
    el("div", { class: "verdict" }, el("span", { class: `swatch w-${name}` }), WORDS[CODES.indexOf(name)]),
    el("dl", {}, ...facts(i).flatMap(([word, value]) => [el("dt", {}, word), el("dd", {}, value)])),
    el("h4", {}, "This token under every rule"),
    el("ol", {}, ...rules),
  );
}

function select(i, focus) {
  const before = view.spans[view.token];
  if (before) {
    before.classList.remove("on");
    before.tabIndex = -1;
    before.setAttribute("aria-selected", "false");
  }
  view.token = i;
  const span = view.spans[i];
  span.classList.add("on");
  span.tabIndex = 0;
  span.setAttribute("aria-selected", "true");
  if (focus) {
    span.focus({ preventScroll: true });
    const box = byId("response"),
      top = span.offsetTop;
    if (top < box.scrollTop + 20 || top > box.scrollTop + box.clientHeight - 50)
      box.scrollTo({ top: top - box.clientHeight / 2, behavior: reduced() ? "auto" : "smooth" });
  }
  point(i);
  // for a screen reader: what the label of the token does not say, in one breath
  if (focus)
    byId("say").textContent = [
      `token ${i + 1}`,
      ...facts(i)
        .filter(([word]) => /^(diverg|thresh|budget|ratio)/.test(word))
        .map((fact) => fact.join(" ")),
    ].join(", ");
}

// The token in the line above or below that is nearest in x.
function across(i, down) {
  const from = view.spans[i].getBoundingClientRect(),
    x = from.left + from.width / 2,
    step = down ? 1 : -1;
  let best = i,
    line = null;
  for (let k = i + step; k >= 0 && k < view.spans.length; k += step) {
    const box = view.spans[k].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > 4) break;
    const now = view.spans[best].getBoundingClientRect();
    if (best === i || Math.abs(box.left + box.width / 2 - x) < Math.abs(now.left + now.width / 2 - x)) best = k;
  }
  return best;
}

function nextHeld(step) {
  const v = verdictNow(),
    T = view.spans.length;
  for (let n = 1; n <= T; n++) {
    const i = (view.token + step * n + T * 2) % T;
    if (HELD.has(reasonAt(v, i))) return i;
  }
  return view.token;
}

function showTable() {
  const r = view.response,
    names = [
      "advantage A_t",
      "ratio \u03c1_t",
      "coefficient c_t",
      "divergence D_t",
      "weight w_t",
      "threshold for D_t",
      "budget left for w_t D_t",
    ];
  const there = names.filter((name) => r.tokens.some((_, i) => facts(i).some(([word]) => word === name)));
  const rows = r.tokens.map((piece, i) => {
    const known = new Map(facts(i));
    return [
      i + 1,
      JSON.stringify(piece),
      reasonAt(verdictNow(), i).replace("_", " "),
      ...there.map((name) => known.get(name) || ""),
    ];
  });
  byId("token-table")
    .querySelector(".scroll")
    .replaceChildren(table("The response as a table", [["", "token", "reason", ...there], ...rows]));
}

function startTokens() {
  if (!TOKENS.responses.length) return;
  byId("pick-run").addEventListener("change", (e) => {
    const all = responsesOf(e.target.value);
    pick(all.reduce((a, b) => (b[0].step >= a[0].step && (b[0].step > a[0].step || b[0].held > a[0].held) ? b : a))[1]);
  });
  byId("pick-step").addEventListener("change", (e) => {
    const step = e.target.value === "null" ? null : Number(e.target.value);
    pick(responsesOf(view.response.run, step)[0][1]);
  });
  byId("pick-response").addEventListener("change", (e) => pick(Number(e.target.value)));
  byId("rules").addEventListener("change", (e) => {
    view.judge = Number(e.target.value);
    showRule();
    point(view.token);
  });
  const box = byId("response");
  const indexOf = (target) => {
    const span = target.closest && target.closest(".t");
    return span ? view.spans.indexOf(span) : -1;
  };
  box.addEventListener("pointerover", (e) => {
    const i = indexOf(e.target);
    if (i >= 0) point(i);
  });
  box.addEventListener("pointerleave", () => point(view.token));
  box.addEventListener("click", (e) => {
    const i = indexOf(e.target);
    if (i >= 0) select(i, true);
  });
  box.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const i = view.token,
      last = view.spans.length - 1;
    const to =
      { ArrowRight: Math.min(last, i + 1), ArrowLeft: Math.max(0, i - 1), Home: 0, End: last }[e.key] ??
      {
        ArrowDown: () => across(i, true),
        ArrowUp: () => across(i, false),
        n: () => nextHeld(1),
        p: () => nextHeld(-1),
      }[e.key]?.();
    if (to === undefined) return;
    e.preventDefault();
    select(to, true);
  });
  byId("next").addEventListener("click", () => select(nextHeld(1), true));
  byId("previous").addEventListener("click", () => select(nextHeld(-1), true));
  byId("token-table").addEventListener("toggle", (e) => {
    if (e.target.open) showTable();
  });
  // begin with the response that shows most, of a prefix rule where there is one
  const rank = (r) => [
    r.own !== null && judgesOf(r)[r.own].rule === "cppo" ? 1 : 0,
    r.held > 0 && 2 * r.held <= r.length ? 1 : 0,
    r.step ?? 0,
    r.held,
  ];
  const better = (a, b) => {
    const x = rank(a),
      y = rank(b),
      k = x.findIndex((v, n) => v !== y[n]);
    return k >= 0 && x[k] > y[k];
  };
  pick(TOKENS.responses.reduce((best, r, i, all) => (better(r, all[best]) ? i : best), 0));
}
