"""The page in a real Chromium: what a reader does with it, by pointer, keyboard and phone."""

from __future__ import annotations

import itertools

import pytest

from .made import page_of

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
#: Contrast (WCAG 2) between the colour of every text and what is behind it, where it is below 4.5.
CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const texts = "p, h1, h2, h3, td, th, li, dt, dd, label, summary, caption, .t, a, button, svg text";
  const bad = [];
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || !e.getClientRects().length || e.closest(".sr, .skip, :disabled")) continue;
    const style = getComputedStyle(e);
    const ink = luminance(rgb(e.tagName === "text" ? style.fill : style.color)), paper = luminance(behind(e));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.textContent.trim().slice(0, 30), ratio.toFixed(2)]);
  }
  return bad;
}
"""
#: What can be used and has no name.
NAMELESS = """
() => [...document.querySelectorAll("button, select, input, summary, [role], [tabindex]")].filter((e) => {
  const ids = (e.getAttribute("aria-labelledby") || "").split(" ");
  const labelled = ids.map((id) => document.getElementById(id)?.textContent || "").join("");
  const text = e.getAttribute("aria-label") || labelled || e.labels?.[0]?.textContent || e.textContent;
  return e.tagName !== "PRE" && e.getAttribute("role") !== "status" && !text.trim();
}).map((e) => e.outerHTML.slice(0, 80))
"""
#: The underline of a token with some reason.
UNDERLINE = """
(name) => {
  const token = document.createElement("span");
  token.className = "t r-" + name;
  document.getElementById("response").append(token);
  const style = getComputedStyle(token), found = style.borderBottomStyle + style.borderBottomWidth;
  token.remove();
  return found;
}
"""


@pytest.fixture
def opened(browser):
    """open(path, viewport=..., scheme=..., motion=...) -> page; no console message, error or request is tolerated."""
    contexts, troubles = [], []

    def open_page(path, viewport=DESKTOP, scheme="light", motion="reduce"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion=motion)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        tab.goto(path.resolve().as_uri())
        tab.wait_for_selector("figure[data-chart] .plot svg", state="attached")  # no expression: the page forbids eval
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def test_opens_and_draws_everything(opened, page, report):
    tab = opened(page)
    figures = tab.locator("figure[data-chart]")
    assert figures.count() == len(report.charts)
    assert tab.locator("figure[data-chart] .plot > svg").count() == len(report.charts)
    assert tab.title() == "study - CPPO report", "no markup of a response has been run"
    assert tab.locator("img").count() == 0
    line = tab.locator("#figure-reward path.line")
    assert line.count() == 2 and all("NaN" not in line.nth(at).get_attribute("d") for at in range(2))
    assert tab.locator("#figure-reward path.thin").count() == 4 and tab.locator("#figure-reward .band").count() == 2


def test_a_run_and_half_a_study_open_too(opened, study, half, tmp_path):
    tab = opened(page_of(study / "runs" / "cppo-seed0", tmp_path / "run.html"))
    assert tab.locator("#response .t").count() > 0 and tab.locator("#figure-certificate path.line").count() >= 2
    tab = opened(page_of(half, tmp_path / "half.html"))
    assert "1 of 6 runs are finished" in tab.locator(".marks").inner_text()
    assert tab.locator("#figure-reward path.thin.open").count() == 2


def test_pointing_at_a_chart_reads_its_figures(opened, page):
    tab = opened(page)
    svg = tab.locator("#figure-reward .plot > svg")
    svg.scroll_into_view_if_needed()
    svg.hover()
    tip = tab.locator("#figure-reward .tip")
    tip.wait_for()
    assert "dppo" in tip.inner_text() and "[" in tip.inner_text()
    tab.mouse.move(0, 0)
    tip.wait_for(state="hidden")
    svg.focus()
    tab.keyboard.press("Home")
    assert tip.inner_text().startswith("step 1")
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("step 2")


def test_the_legend_hides_a_variant_everywhere(opened, page):
    tab = opened(page)
    button = tab.locator("#legend button", has_text="dppo")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert tab.locator("#figure-reward path.line").count() == 1
    button.click()
    assert tab.locator("#figure-reward path.line").count() == 2


def test_charts_have_tables(opened, page, report):
    tab = opened(page)
    tab.locator("#figure-reward summary").click()
    table = tab.locator("#figure-reward table")
    table.wait_for()  # it is made when it is opened
    assert table.locator("thead th").all_inner_texts() == ["step", "dppo", "cppo"]
    assert table.locator("tbody tr").count() == 8


def test_hovering_a_token_shows_what_is_known(opened, page):
    tab = opened(page)
    token, details = tab.locator("#response .t").nth(3), tab.locator("#details")
    token.hover()
    text = details.inner_text()
    for word in ("t = 4", "advantage A_t", "ratio", "divergence D_t", "weight w_t", "threshold for D_t", "budget left"):
        assert word in text
    assert "This token under every rule" in text and "trm_max" in text


def test_switching_the_rule_changes_the_colours(opened, page):
    tab = opened(page)
    rules = tab.locator("#rules label")
    assert "cppo as run" in " ".join(rules.nth(1).inner_text().split()) and rules.nth(1).locator("input").is_checked()

    def classes():
        return tab.locator("#response .t").evaluate_all("spans => spans.map(s => s.className.replace(' on', ''))")

    before, title = classes(), tab.locator("#tokenplot-title").inner_text()
    rules.filter(has_text="trm_max_avg").click()
    after = classes()
    assert before != after and set(after) <= {"t r-sequence_limit", "t r-outside"}
    assert "trm_max_avg(delta=0.1, delta_avg=0.002" in tab.locator("#rule-note").inner_text()
    rules.filter(has_text="ppo_clip").click()
    assert tab.locator("#tokenplot-title").inner_text() == "Ratio by position" != title
    assert tab.locator("#tokenplot .threshold").count() == 2, "the two limits of the ratio"
    tab.keyboard.press("ArrowDown")
    assert not rules.filter(has_text="ppo_clip").locator("input").is_checked(), "radio buttons by keyboard"


def test_another_response(opened, page):
    tab = opened(page)
    before = tab.locator("#response").inner_text()
    tab.locator("#pick-run").select_option("dppo-seed1")
    assert "dppo as run" in " ".join(tab.locator("#rules label:has(input:checked)").inner_text().split())
    tab.locator("#pick-step").select_option("4")
    assert "step 4" in tab.locator("#response-title").inner_text()
    assert tab.locator("#response").inner_text() != before
    options = tab.locator("#pick-response option").count()
    assert options == 3


def test_tokens_by_keyboard(opened, page):
    tab = opened(page)
    tokens = tab.locator("#response .t")
    reachable = tokens.evaluate_all("spans => spans.filter(s => s.tabIndex === 0).length")
    assert reachable == 1, "a roving tabindex"
    tab.locator("#token-view .prompt summary").focus()
    for _ in range(12):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.classList.contains('t')"):
            break
    assert tab.evaluate("document.activeElement.classList.contains('t')")

    def where():
        return tab.evaluate("Number(document.activeElement.id.slice(1))")

    tab.keyboard.press("Home")
    assert where() == 0
    tab.keyboard.press("ArrowRight")
    assert where() == 1 and "token 2 of" in tab.locator("#details").inner_text()
    assert tab.locator("#t1").get_attribute("aria-selected") == "true"
    said = tab.locator("#say").inner_text()
    assert said.startswith("token 2, ratio") and "threshold for D_t" in said and "budget left" in said
    tab.keyboard.press("ArrowDown")
    below = where()
    tops = tab.evaluate("i => [1, i].map(k => document.getElementById('t' + k).getBoundingClientRect().top)", below)
    assert tops[1] > tops[0] + 4 or tokens.count() < 60
    tab.keyboard.press("End")
    assert where() == tokens.count() - 1
    tab.keyboard.press("n")
    assert tab.evaluate("document.activeElement.className.match(/token_limit|prefix_budget/) !== null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(opened, page, scheme):
    tab = opened(page, scheme=scheme)

    def dark():
        return tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"

    assert dark() == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    tab.locator(f"#theme input[value={other}]").check(force=True)
    assert dark() == (other == "dark")
    tab.locator("#theme input[value=auto]").check(force=True)
    assert dark() == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, page, scheme):
    assert opened(page, scheme=scheme).evaluate(CONTRAST) == []


@pytest.mark.parametrize("which", ["study", "half"])
def test_a_phone_never_scrolls_sideways(opened, page, half, tmp_path, which):
    tab = opened(page if which == "study" else page_of(half, tmp_path / "half.html"), viewport=PHONE)
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.evaluate("window.scrollTo(500, 0)")
    assert tab.evaluate("window.scrollX") == 0


def test_names_roles_and_order(opened, page):
    """What a screen reader needs: a language, one h1, no skipped level, a name for everything that can be used."""
    tab = opened(page)
    assert tab.locator("html").get_attribute("lang") == "en" and tab.locator("main").count() == 1
    levels = [int(tag[1]) for tag in tab.locator("h1, h2, h3, h4").evaluate_all("hs => hs.map(h => h.tagName)")]
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert tab.evaluate(NAMELESS) == []
    ids = tab.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert tab.locator("svg[role=img]").evaluate_all("all => all.every(s => s.getAttribute('aria-label'))")
    assert tab.locator("th:not([scope])").count() == 0
    held = tab.locator("#response .t.r-prefix_budget, #response .t.r-token_limit").first
    assert "over the token limit" in held.get_attribute("aria-label") or "prefix budget" in held.get_attribute(
        "aria-label"
    )
    reasons = ("towards", "token_limit", "prefix_budget", "sequence_limit", "ratio_clip", "clamped")
    styles = {tab.evaluate(UNDERLINE, name) for name in reasons}
    assert len(styles) == 5, "reasons differ by their underline, not by colour alone"


def test_motion_only_where_it_is_wanted(opened, page):
    for motion, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        tab = opened(page, motion=motion)
        assert tab.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


def test_tables_are_there_without_javascript(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    assert tab.locator("#result table").count() >= 2 and "need JavaScript" in tab.locator("main").inner_text()
    context.close()
