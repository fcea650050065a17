"""The page as a file: self-contained, small, safe, and with the words and tables that belong on it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil

import pytest

from cppo.dumps.dump import write_dump
from cppo.errors import UserError
from cppo.report import page as page_module
from cppo.report.page import LIMIT, build, embedded, render
from cppo.report.source import open_source
from cppo.study.results import read_results
from cppo.study.store import load_plan
from cppo.study.tables import cells, notes

from .made import EVIL, page_of, plan_of, write_run


def data_of(text):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(block)


def words_of(text):
    body = re.sub(r"<(style|script).*?</\1>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_self_contained_and_small(page):
    text = page.read_text()
    assert len(text.encode()) <= LIMIT
    outside = re.findall(
        r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]+)""", re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )
    assert all(link.startswith(("#", "data:")) for link in outside), outside
    script = text[text.rindex("<script>") :]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a namespace, which nobody fetches"


def test_the_policy_allows_the_page_s_own_script_and_style_alone(page):
    text = page.read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(
        r"<[^>]+\s(?:style|on\w+)=", text[: text.rindex("<script>")].split("</style>")[1].split('id="data"')[0]
    )


def test_what_a_model_says_is_inert(page):
    text = page.read_text()
    assert EVIL not in text and "<img" not in text
    assert any(EVIL in token for response in data_of(text)["tokens"]["responses"] for token in response["tokens"])


@pytest.mark.parametrize("text", [EVIL, "<!--", "]]>", "&lt;", "\u2028\u2029", "\ud800", "a\\u003cb", "\x00\x1b"])
def test_embedded_json_survives(text):
    block = embedded({"text": text})
    assert not set("<>&\u2028\u2029") & set(block)
    block.encode()
    if text != "\ud800":
        assert json.loads(block) == {"text": text}


def test_names_and_errors_are_escaped(half, tmp_path):
    path = page_of(half, tmp_path / "half.html")
    text = path.read_text()
    assert "<b>study</b>" not in text and "<i>the disk is full</i>" not in text
    assert "half <b>study</b>" in words_of(text) and "<i>the disk is full</i>" in words_of(text)
    assert "This study is not complete: 1 of 6 runs are finished" in words_of(text)
    assert "dppo alone has finished runs" in words_of(text)


def test_the_tables_are_those_of_the_study(study, page):
    words = words_of(page.read_text())
    results = read_results(load_plan(study))
    for table in cells(results):
        assert " ".join(table.title.split()) in words
        for row in table.rows:
            assert " ".join(" ".join(cell for cell in row).split()) in words
    assert all(" ".join(note.split()) in words for note in notes(results))
    for name in ("dppo-seed0", "cppo-seed1", "delta=0.15", "binary_tv", "3.12.3", "threads"):
        assert name in words


def test_the_sentence_on_top(page):
    words = words_of(page.read_text())
    assert "cppo has the highest best Avg@4: 77.0 [76.0, 78.0] %" in words
    assert "percentage points over dppo" in words and "which leaves 0 out" in words


def test_one_run(study, tmp_path):
    text = page_of(study / "runs" / "cppo-seed0", tmp_path / "run.html").read_text()
    words = words_of(text)
    assert "Avg@4 on held-out problems went from 40.0% (step 0) to 76.0% (step 8)." in words
    assert "before (step 0) after (step 8) change best (step 8) pass@4 after" in words
    assert {chart["name"] for chart in data_of(text)["charts"]} >= {"reward", "certificate", "position", "relative"}
    assert 'id="legend"' not in text


@pytest.mark.parametrize("last", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path, last):
    config = plan_of(tmp_path / "plan", ("cppo",), 1).trained[0].config
    text = page_of(write_run(tmp_path / "run", config, last=last)).read_text()
    assert "Before you read on" in text and "There are no sampled responses" in text


def test_a_dump(study, tmp_path):
    rows = [
        {
            "rollout_logp": [-1.0, -0.5, -2.0],
            "policy_logp": [-1.2, -0.4, -1.0],
            "advantage": (-1.0) ** at,
            "tokens": [EVIL, "b", "\n"],
        }
        for at in range(4)
    ]
    path = write_dump(tmp_path / "rollouts.jsonl", rows)
    out = page_of(path)
    assert out == tmp_path / "rollouts-report.html"
    text = out.read_text()
    assert EVIL not in text and len(data_of(text)["tokens"]["responses"]) == 4
    assert data_of(text)["tokens"]["judges"][0]["label"] == "cppo"
    assert "What each rule would do" in text and "Where in a response the policy has left" in text
    without = [{key: value for key, value in row.items() if key != "advantage"} for row in rows]
    text = page_of(write_dump(tmp_path / "without.jsonl", without)).read_text()
    assert "there are no advantages" in words_of(text)


def test_different_versions_are_said(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    file = folder / "runs" / "cppo-seed0" / "versions.json"
    file.write_text(json.dumps({"python": "3.13.0", "cppo": "0.1.0"}))
    assert "not made with the same versions of python" in words_of(page_of(folder).read_text())


def test_too_large_is_refused(study, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "LIMIT", 50_000)
    with pytest.raises(UserError, match="more than 0 MB"):
        page_of(study, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_tokens_take_what_the_rest_leaves(study, monkeypatch):
    monkeypatch.setattr(page_module, "LEAST_FOR_TOKENS", 1000)
    report = build(open_source(study), limit=370_000)
    assert len(report.tokens.responses) < 24
    assert len(render(report).encode()) <= 370_000


def test_the_same_files_give_the_same_page(study, page, tmp_path):
    assert page_of(study, tmp_path / "again.html").read_bytes() == page.read_bytes()
