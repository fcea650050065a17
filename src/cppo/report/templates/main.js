// Theme, legend, charts at the width that there is, and the token view.

function startTheme() {
  const root = document.documentElement;
  const apply = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
  };
  let stored = "auto";
  try {
    stored = localStorage.getItem("cppo-theme") || "auto";
  } catch {
    /* a file may have no storage */
  }
  const chosen = document.querySelector(
    `#theme input[value="${["light", "dark"].includes(stored) ? stored : "auto"}"]`,
  );
  chosen.checked = true;
  apply(chosen.value);
  document.getElementById("theme").addEventListener("change", (event) => {
    apply(event.target.value);
    try {
      localStorage.setItem("cppo-theme", event.target.value);
    } catch {
      /* as above */
    }
  });
}

const figures = [...document.querySelectorAll("figure[data-chart]")];

function startLegend() {
  const legend = document.getElementById("legend");
  if (!legend) return;
  DATA.variants.forEach((label, slot) => {
    const button = el("button", { type: "button", "aria-pressed": "true" }, sign(slot), label);
    button.addEventListener("click", () => {
      hidden.has(label) ? hidden.delete(label) : hidden.add(label);
      button.setAttribute("aria-pressed", String(!hidden.has(label)));
      figures.forEach(redraw);
    });
    legend.append(button);
  });
}

function startCharts() {
  const widths = new WeakMap();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const width = Math.floor(target.clientWidth);
      if (widths.get(target) === width) continue;
      widths.set(target, width);
      if (target.id === "tokenplot") {
        if (view.response) plotTokens();
      } else redraw(target.closest("figure"));
    }
  });
  for (const figure of figures) {
    observer.observe(figure.querySelector(".plot"));
    const details = figure.querySelector("details");
    details.addEventListener("toggle", () => {
      if (details.open)
        details.querySelector(".scroll").replaceChildren(tableOf(DATA.charts[Number(figure.dataset.chart)]));
    });
  }
  const tokens = document.getElementById("tokenplot");
  if (tokens) observer.observe(tokens);
}

startTheme();
startLegend();
startCharts();
startTokens();
