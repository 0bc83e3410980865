from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest

from preceptor.errors import DataError, StorageError
from preceptor.report.page import MAXIMUM_BYTES
from preceptor.result import write_page
from tests.report.systems import write_system_run

BuildRun = Callable[..., Path]


def parsed(page: str) -> Element:
    tree: Element = html5lib.parse(page, namespaceHTMLElements=False)
    return tree


def tags(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every element of a page as a browser's parser sees it, with the names of its attributes."""
    return [(str(e.tag).rsplit("}", 1)[-1], tuple(sorted(map(str, e.attrib)))) for e in parsed(page).iter()]


def embedded(page: str) -> Any:
    scripts = [e for e in parsed(page).iter("script") if e.get("type") == "application/json"]
    assert len(scripts) == 1
    return json.loads(scripts[0].text or "")


def test_the_page_shows_the_run(build_run: BuildRun, tmp_path: Path) -> None:
    out = write_page(build_run(tmp_path / "run"))
    page = out.read_text(encoding="utf-8")
    text = " ".join("".join(parsed(page).itertext()).split())
    assert out == tmp_path / "run" / "report.html"
    assert "learned is 0.198 nats per value token above random" in text
    assert "86 %" in text
    assert "71 to 97 %, to the exhaustive optimum" in text
    assert "19 of 20 recorded episodes" in text
    assert "reward: no finite value at 1 of the steps" in text
    # The first episode is readable without the script: every step's query, key and value.
    static = parsed(page).find(".//div[@id='viewer']")
    assert static is not None
    assert len(static.findall("article")) == 8
    assert "how did the light reach ships before the lamps of" in "".join(static.itertext())
    assert "seen from beyond the horizon." in "".join(static.itertext())


def test_hostile_text_makes_no_element(build_run: BuildRun, tmp_path: Path, hostile: tuple[str, ...]) -> None:
    """The page with hostile text has exactly the elements and attributes of the page with harmless text."""
    page = write_page(build_run(tmp_path / "hostile")).read_text(encoding="utf-8")
    plain = write_page(build_run(tmp_path / "plain", payloads=("harmless",) * 7)).read_text(encoding="utf-8")
    assert tags(page) == tags(plain)
    assert embedded(page)["articles"]["hostile"]["pairs"][0][0] == hostile[0]
    assert "<script>document.title" not in page


@pytest.mark.parametrize("system", ["bandit", "curriculum", "surgery"])
def test_hostile_text_of_other_systems_makes_no_element(system: str, tmp_path: Path, hostile: tuple[str, ...]) -> None:
    """Words, prompts, texts, arms, datasets and titles, each replaced by a payload."""
    names = ("bean", "Pick", "def f", "return x", "learned", "dialogue", "evolution", "Surgery", "Crossed")

    def page(name: str, payloads: tuple[str, ...]) -> str:
        run = write_system_run(tmp_path / name, system, num_steps=90)
        for file in ("metrics.jsonl", "decisions.jsonl", "result.json"):
            text = (run / file).read_text(encoding="utf-8")
            for k, old in enumerate(names):
                text = text.replace(old, f"{json.dumps(payloads[k % len(payloads)])[1:-1]} {k}")
            (run / file).write_text(text, encoding="utf-8")
        return write_page(run).read_text(encoding="utf-8")

    dangerous = tuple(text for text in hostile if "\0" not in text)
    harmless = tuple(re.sub(r"\S", "x", text) for text in dangerous)
    assert tags(page("hostile", dangerous)) == tags(page("plain", harmless))


FRAGMENTS = (
    "<script>",
    "</script>",
    "<!--",
    "-->",
    "<img src=x onerror=a()>",
    "]]>",
    '"',
    "'",
    "</p>",
    "<svg/onload=a()>",
)


def test_five_hundred_payloads_leave_no_foreign_element(tmp_path: Path) -> None:
    """Every three-fragment payload, in titles, keys, values and queries, read by two independent HTML parsers."""
    payloads = ["".join(parts) for parts in itertools.islice(itertools.permutations(FRAGMENTS, 3), 500)]
    assert len(payloads) == 500

    def page(texts: list[str], name: str) -> str:
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
        order = {"x": list(range(len(texts)))}
        (run / "result.json").write_text(json.dumps({"system": "reading", "arms": {}, "order": order}))
        pairs = [{"index": k, "key": text, "value": text} for k, text in enumerate(texts)]
        (run / "articles.json").write_text(json.dumps({"x": {"title": texts[0], "pairs": pairs}}))
        query = {"kind": "query", "start": 0, "end": 1, "sampled_log_probs": [-1.0]}
        spans = [{"kind": "value", "start": 0, "end": 1, "pair": k, "log_probs": [-1.0]} for k in range(len(texts))]
        decision = {
            "episode": 1, "step": 1, "arm": "learned", "article": "x", "reader_spans": spans, "texts": texts,
            "policy_spans": [query] * len(texts),
        }  # fmt: skip
        (run / "decisions.jsonl").write_text(json.dumps(decision) + "\n")
        return write_page(run).read_text(encoding="utf-8")

    hostile, plain = page(payloads, "run"), page(["harmless"] * 500, "plain")
    assert tags(hostile) == tags(plain)
    assert [key for key, _ in embedded(hostile)["articles"]["x"]["pairs"]] == payloads

    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.count += tag in ("script", "img") or any(name.startswith("on") for name, _ in attrs)

    parser = Scripts()
    parser.feed(hostile)
    assert parser.count == 2  # the data and the one script


def test_the_policy_admits_only_the_packages_own_style_and_script(build_run: BuildRun, tmp_path: Path) -> None:
    page = write_page(build_run(tmp_path / "run", num_steps=10)).read_text(encoding="utf-8")
    tree = parsed(page)
    metas = {meta.get("http-equiv"): meta.get("content") for meta in tree.iter("meta")}
    policy = metas["Content-Security-Policy"] or ""
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy

    def source(element: Element) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256((element.text or '').encode()).digest()).decode()}'"

    (style,) = tree.iter("style")
    (script,) = [e for e in tree.iter("script") if e.get("type") is None]
    assert re.findall(r"(style|script)-src ('[^']*')", policy) == [("style", source(style)), ("script", source(script))]
    assert not [e for e in tree.iter() if "style" in e.attrib]  # the policy would not apply them
    assert not [e for e in tree.iter() if {"src", "href", "action", "data", "srcset"} & e.attrib.keys()]
    own = f"{style.text}{script.text}".replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|import\(|innerHTML|eval", own)


def test_a_run_with_only_metrics_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    text = "".join(parsed(write_page(tmp_path).read_text(encoding="utf-8")).itertext())
    assert "No verdict yet" in text
    assert "Gradient norm" in text.split("no such column:")[1]


def test_only_the_curves_of_a_comparison_are_said_to_be_of_several_runs(tmp_path: Path) -> None:
    said = "Lines are means over the runs"
    chart = {
        "kind": "series",
        "title": "Reward",
        "unit": "points",
        "x_label": "step",
        "x": [1, 2],
        "lines": {"reward": [0.0, 1.0]},
    }
    result = {"system": "toy", "arms": {}, "charts": [chart]}
    for name, several in (("one", False), ("many", True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
        (folder / "result.json").write_text(json.dumps(result))
        if several:
            (folder / "comparison.json").write_text(json.dumps({"comparisons": [], "runs": [], "groups": []}))
        page = write_page(folder).read_text(encoding="utf-8")
        assert (said in page) == several
        assert ("Over the seeds" in page) == several


def test_a_long_run_stays_small(build_run: BuildRun, tmp_path: Path) -> None:
    """3,000 steps, 600 episodes, and an article with a line of a megabyte."""
    run = build_run(tmp_path / "run", num_steps=3_000, num_episodes=600)
    articles = json.loads((run / "articles.json").read_text(encoding="utf-8"))
    articles["hostile"]["pairs"][0]["value"] = "x" * 1_000_000
    (run / "articles.json").write_text(json.dumps(articles), encoding="utf-8")
    assert write_page(run).stat().st_size < MAXIMUM_BYTES / 5


def test_lone_surrogates_and_nul_do_not_stop_the_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "result.json").write_text('{"verdict": "half \\ud800 a pair, and \\u0000"}')
    page = write_page(tmp_path).read_bytes().decode("utf-8")
    assert "half ? a pair, and \N{REPLACEMENT CHARACTER}" in page


def test_malformed_files_stop_the_page_and_keep_the_old_one(build_run: BuildRun, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_steps=10)
    before = write_page(run).read_bytes()
    (run / "decisions.jsonl").write_text("{}\n{")
    with pytest.raises(DataError, match=r"decisions\.jsonl:2"):
        write_page(run)
    assert (run / "report.html").read_bytes() == before


def test_a_page_that_cannot_be_written_is_a_storage_error(build_run: BuildRun, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_steps=10)
    (run / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report.html could not be written"):
        write_page(run)
    assert not list(run.glob("*.tmp"))


def test_the_same_run_gives_the_same_page(build_run: BuildRun, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_steps=10)
    assert write_page(run).read_bytes() == write_page(run).read_bytes()
