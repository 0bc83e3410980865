"""The MediaWiki client against a server that answers as the API does, and against one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.data.articles.fetch import Fetcher
from preceptor.data.articles.markup import HOLE, article_text
from preceptor.data.articles.wikipedia import WikipediaPage, api_endpoint, extract_blocks, read_wikipedia
from preceptor.errors import DataError, ServiceError

EXTRACT = (
    "The heron is a bird. It wades.\nIt eats fish.\n\n\n== Habits ==\nIt stands still.\n\n\n=== Nests ===\nIn trees."
    "\n\n\n== References ==\nA book.\n\n\n== Range ==\nIt lives in Europe."
)


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher(allow_private_hosts=True, sleep=waits.append, num_attempts=3)


@pytest.fixture
def wiki(site: Any) -> Any:
    site.extracts["Grey heron"] = EXTRACT
    return site


def read(wiki: Any, title: str, fetcher: Fetcher) -> WikipediaPage:
    return read_wikipedia(title, endpoint=wiki.endpoint, fetcher=fetcher)


def test_page(wiki: Any, fetcher: Fetcher) -> None:
    page = read(wiki, "Grey heron", fetcher)
    assert page.title == "Grey heron"
    assert page.url == f"{wiki.url}/wiki/Grey_heron"
    assert article_text(page.blocks) == (
        "The heron is a bird. It wades.\n\nIt eats fish.\n\n\nIt stands still.\n\n\nIn trees.\n\n\nIt lives in Europe."
    )
    ((path, params, headers),) = wiki.requests
    assert path == "/w/api.php"
    assert params["action"] == "query"
    assert params["redirects"] == "1"
    assert params["maxlag"] == "5"
    assert headers["User-Agent"].startswith("Preceptor/")


def test_redirect(wiki: Any, fetcher: Fetcher) -> None:
    wiki.redirects["Ardea cinerea"] = "Grey heron"
    assert read(wiki, "Ardea cinerea", fetcher).title == "Grey heron"


def test_missing_page_names_near_ones(wiki: Any, fetcher: Fetcher) -> None:
    wiki.search_results = ["Grey heron", "Heron"]
    with pytest.raises(DataError, match="no Wikipedia article called 'Gray heron'") as caught:
        read(wiki, "Gray heron", fetcher)
    assert "(did you mean 'Grey heron'?); pass one of 'Grey heron', 'Heron'" in str(caught.value)


def test_missing_page_without_near_ones(wiki: Any, fetcher: Fetcher) -> None:
    with pytest.raises(DataError, match="check the spelling"):
        read(wiki, "Gobbilygook", fetcher)


def test_recorded_search_and_disambiguation(test_data: Path, wiki: Any, fetcher: Fetcher) -> None:
    recorded = json.loads((test_data / "mediawiki" / "barrust_mock_responses.json").read_text(encoding="utf-8"))
    english = recorded["https://en.wikipedia.org/w/api.php"]
    wiki.extracts["Chess"] = english["chess_preview"]["extract"]
    page = read(wiki, "Chess", fetcher)
    assert article_text(page.blocks).split("\n\n")[1].startswith("Chess is an abstract strategy game")

    wiki.search_results = english["search_with_suggestion_not_found"][0][:5]
    with pytest.raises(
        DataError, match=r"\(did you mean 'Chess set'\?\); pass one of 'Chess set', 'Staunton chess set'"
    ):
        read(wiki, "chest set", fetcher)

    wiki.ambiguous["Leaching"] = [entry["title"] for entry in english["missing_title_disamb_dets"]]
    with pytest.raises(
        DataError, match=r"'Leaching' may mean several articles; pass one of 'Leaching \(agriculture\)'"
    ):
        read(wiki, "Leaching", fetcher)


@pytest.mark.parametrize("title", ["", "  ", "A|B", "A#B", "{{x}}", "[[x]]", "<b>", "a\nb", "x" * 256])
def test_impossible_titles_are_not_sent(wiki: Any, fetcher: Fetcher, title: str) -> None:
    with pytest.raises(DataError, match="cannot be a Wikipedia title") as caught:
        read(wiki, title, fetcher)
    assert "\n" not in str(caught.value)
    assert wiki.requests == []


def test_page_without_text(wiki: Any, fetcher: Fetcher) -> None:
    wiki.extracts["Empty"] = "\n\n== External links ==\n"
    with pytest.raises(DataError, match="has no text"):
        read(wiki, "Empty", fetcher)


@pytest.mark.parametrize("fault", [429, 500, "cut", "disconnect"])
def test_transient_faults_are_retried(wiki: Any, fetcher: Fetcher, waits: list[float], fault: Any) -> None:
    wiki.script.extend([fault, fault])
    assert read(wiki, "Grey heron", fetcher).title == "Grey heron"
    assert len(waits) == 2


def test_lag_is_waited_for(wiki: Any, fetcher: Fetcher, waits: list[float]) -> None:
    wiki.script.append("maxlag")
    assert read(wiki, "Grey heron", fetcher).title == "Grey heron"
    assert waits == [5.0]


@pytest.mark.parametrize(("fault", "message"), [("cut", "complete JSON"), ("maxlag", "maxlag"), (503, "503")])
def test_lasting_faults_are_service_errors(wiki: Any, fetcher: Fetcher, fault: Any, message: str) -> None:
    wiki.script.extend([fault] * 3)
    with pytest.raises(ServiceError, match=rf"{message}.*tried 3 times"):
        read(wiki, "Grey heron", fetcher)


def test_hanging_service(wiki: Any) -> None:
    wiki.script.append("hang")
    with pytest.raises(ServiceError, match=r"no answer within 0\.2 s"):
        read(wiki, "Grey heron", Fetcher(allow_private_hosts=True, timeout_seconds=0.2, num_attempts=1))


@pytest.mark.parametrize("body", [b"{}", b'{"query": {"pages": []}}', b'{"query": {"pages": [{}]}}', b'{"query": {}}'])
def test_another_service(wiki: Any, fetcher: Fetcher, body: bytes) -> None:
    wiki.pages["/other"] = wiki.page(body, content_type="application/json")
    with pytest.raises(ServiceError, match="did not answer as the MediaWiki API does"):
        read_wikipedia("Grey heron", endpoint=f"{wiki.url}/other", fetcher=fetcher)


def test_refusal_by_the_api(wiki: Any, fetcher: Fetcher, waits: list[float]) -> None:
    wiki.pages["/other"] = wiki.page(b'{"error": {"code": "badvalue", "info": "Unrecognized value"}}')
    with pytest.raises(ServiceError, match="badvalue: Unrecognized value"):
        read_wikipedia("Grey heron", endpoint=f"{wiki.url}/other", fetcher=fetcher)
    assert waits == []


def test_endpoint() -> None:
    assert api_endpoint("de") == "https://de.wikipedia.org/w/api.php"
    assert api_endpoint("simple") == "https://simple.wikipedia.org/w/api.php"
    for bad in ("", "evil.example/", "EN", "en.wikipedia.org"):
        with pytest.raises(DataError, match="not a Wikipedia language code"):
            api_endpoint(bad)


def test_formulas_return_to_their_sentence() -> None:
    ladder = "\n  \n    \n      \n        {0}\n      \n    \n    {{\\displaystyle {0}}}\n  \n"
    extract = (
        "Let"
        + ladder.format("n")
        + " be a number, and"
        + ladder.format("\\frac {1}{2}")
        + ", its half. Then it ends.\n"
        "A new paragraph:\n" + ladder.format("x^2") + "\nAnother one.\n   An indented line without a formula.\nLast."
    )
    assert [block.text for block in extract_blocks(extract)] == [
        f"Let n be a number, and {HOLE}, its half. Then it ends.",
        "A new paragraph: x^2",
        "Another one.",
        "An indented line without a formula.",
        "Last.",
    ]
