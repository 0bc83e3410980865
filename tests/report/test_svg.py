"""The page's drawings as files: each stands alone, in the light colours, and no article text becomes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from preceptor.errors import DataError, StorageError
from preceptor.report.svg import HEAD, NAMESPACE, drawings, write_figures
from preceptor.result import write_page
from tests.report.systems import write_system_run

SVG = {"svg": NAMESPACE}


def texts(root: Element) -> list[str]:
    return ["".join(text.itertext()).strip() for text in root.iterfind(".//svg:text", SVG)]


@pytest.fixture
def figures(build_run: Callable[..., Path], tmp_path: Path) -> dict[str, Element]:
    run = build_run(tmp_path / "run", num_steps=30)
    write_page(run)
    written = write_figures(run, tmp_path / "new" / "figures")
    assert [path.parent for path in written] == [tmp_path / "new" / "figures"] * len(written)
    return {path.stem: ElementTree.parse(path).getroot() for path in written}


def test_every_chart_of_the_page_is_a_file(figures: dict[str, Element], tmp_path: Path) -> None:
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(figures) == page.count('<figure class="panel"') >= 10
    assert {"order-gain", "reward", "query-entropy", "reward-by-position"} <= figures.keys()
    for root in figures.values():
        assert root.tag == f"{{{NAMESPACE}}}svg"
        assert [root.get("width"), root.get("height")] == root.get("viewBox", "").split()[2:]
        placed = [float(text.get("y", "0")) for text in root.iterfind("svg:g//svg:text", SVG)]
        assert float(root.get("height", "")) > max(placed, default=0) + HEAD


def test_a_curve_has_its_title_unit_axis_and_legend(figures: dict[str, Element]) -> None:
    shown = texts(figures["query-entropy"])
    assert shown[0] == "Query entropynats per token"
    assert shown[-2:] == ["query entropy", "maximum"]
    assert "step \N{RIGHTWARDS ARROW}" in shown
    lines = figures["query-entropy"].findall(".//svg:path[@data-line]", SVG)
    assert [line.get("class", "").split()[:2] for line in lines][-1] == ["line", "series-0"]


def test_arms_are_drawn_best_on_top(figures: dict[str, Element]) -> None:
    shown = texts(figures["order-gain"])
    assert shown.index("exhaustive oracle") < shown.index("learned") < shown.index("reverse")
    assert figures["order-gain"].find(".//svg:g[@class='arm learned']/svg:circle", SVG) is not None


def test_the_style_is_inside_and_light(figures: dict[str, Element]) -> None:
    for name, root in figures.items():
        style = root.findtext("svg:style", "", SVG)
        assert "var(" not in style, name
        assert "prefers-color-scheme" not in style
        used = {part for element in root.iter() for part in element.get("class", "").split()}
        assert set(re.findall(r"\.([a-z][\w-]*)", style)) <= used
    assert ".line.series-0 { stroke: #0060a8; }" in figures["query-entropy"].findtext("svg:style", "", SVG)


def test_the_same_page_gives_the_same_bytes(build_run: Callable[..., Path], tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", num_steps=30)
    write_page(run)
    first, again = write_figures(run, tmp_path / "a"), write_figures(run, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_edits_of_surgery_are_drawn_too(tmp_path: Path) -> None:
    run = write_system_run(tmp_path / "run", "surgery", num_steps=12)
    write_page(run)
    drawn = {path.stem: path for path in write_figures(run, tmp_path / "figures")}
    edits = [name for name in drawn if name.endswith("-committed")]
    assert edits
    root = ElementTree.parse(drawn[edits[0]]).getroot()
    assert root.find("svg:g[@class='edits']", SVG) is not None
    assert ".edits .above" in root.findtext("svg:style", "", SVG)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<script>x</script></figure></svg>\x07"
    estimate = {"mean": 1.0, "low": None, "high": None, "unit": "nats", "n": 1}
    (tmp_path / "result.json").write_text(json.dumps({"arms": {name: {"m": estimate}, "b": {"m": estimate}}}))
    write_page(tmp_path)
    (svg,) = write_figures(tmp_path, tmp_path / "figures")
    root = ElementTree.parse(svg).getroot()
    assert not [element for element in root.iter() if str(element.tag).endswith("script")]
    assert any(text.startswith("<script>x") for text in texts(root))


def test_two_charts_of_one_title_are_two_files() -> None:
    figure = '<figure class="panel"><h3>Loss/Gain <small>nats</small></h3><svg viewBox="0 0 3 4"/></figure>'
    assert list(drawings(figure * 3)) == ["loss-gain", "loss-gain-2", "loss-gain-3"]


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no report\.html; write it with: preceptor report"):
        write_figures(tmp_path, tmp_path)
    (tmp_path / "report.html").write_text('<figure class="panel"><h3>a</h3><svg viewBox="0 0 3 4"/></figure>')
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"a\.svg could not be written"):
        write_figures(tmp_path, tmp_path / "file")
