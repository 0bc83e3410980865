"""An article from files of every form, URLs and titles; what cannot be one is refused in one clear line."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from preceptor.data.articles.article import Article, article_folder, read_article, read_file
from preceptor.data.articles.fetch import Fetcher
from preceptor.errors import DataError, PreceptorError, ServiceError, StorageError

TEXT = "The heron is a bird. It wades in rivers."
HTML = f"<!DOCTYPE html><html><head><title>Heron</title></head><body><article><p>{TEXT * 5}</p></article></body></html>"


@pytest.fixture
def local() -> Fetcher:
    return Fetcher(allow_private_hosts=True, sleep=lambda seconds: None, timeout_seconds=5.0, num_attempts=2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "title", "text"),
    [
        ("Grey_heron.txt", f"{TEXT}\n\n== Habits ==\n\nIt nests.", "Grey heron", f"{TEXT}\n\n\nIt nests."),
        ("a.md", f"# The Heron\n\n{TEXT}\n\n## Habits\n\nIt *nests*.", "The Heron", f"{TEXT}\n\n\nIt nests."),
        ("b.html", HTML, "Heron", TEXT * 5),
        ("c.wiki", f"'''{TEXT}'''\n\n== Habits ==\nIt [[nest]]s.", "c", f"{TEXT}\n\n\nIt nests."),
        # no suffix, or one that says nothing: by content
        ("d", f"# The Heron\n\n{TEXT}", "The Heron", TEXT),
        ("e.dat", HTML, "Heron", TEXT * 5),
        ("f.page", f"{TEXT} [[A|b]].\n\n== Habits ==\nIt nests.", "f", f"{TEXT} b.\n\n\nIt nests."),
        ("g", TEXT, "g", TEXT),
        # a suffix goes before the content
        ("h.TXT", f"# Heron\n\n{TEXT}", "h", f"# Heron\n\n{TEXT}"),
    ],
)
def test_forms_of_a_file(tmp_path: Path, cache: Path, name: str, content: str, title: str, text: str) -> None:
    source = write(tmp_path / name, content)
    article = read_article(source, cache_dir=cache)
    assert article == Article(title, text, source, hashlib.sha256(text.encode()).hexdigest())
    assert not cache.exists()  # files are not cached
    with pytest.raises(dataclasses.FrozenInstanceError):
        article.title = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9 au lait", r"not UTF-8 \(byte 3 is 0xe9\)"),
        (b"\xef\xbb\xbfcaf\xe9", r"not UTF-8 \(byte 6 is 0xe9\)"),
        (b"abc\0def", "binary .NUL at byte 3"),
        ("text".encode("utf-16"), "is UTF-16"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not UTF-8"),
        (b"It is. " + b"x" * 10_000, "10,000 characters without a space"),
        (b"== Heading ==\n\n== Another ==", "no running text"),
        (b"word " * 2_000_001, "over 10,000,000 bytes"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_unusable_files(tmp_path: Path, cache: Path, content: bytes, message: str) -> None:
    source = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=message) as caught:
        read_article(source, cache_dir=cache)
    assert "\n" not in str(caught.value)
    assert "a.txt" in str(caught.value)


def test_limits_are_inclusive(tmp_path: Path) -> None:
    assert len(read_file(Path(write(tmp_path / "a.txt", b"\xef\xbb\xbfIt is " + b"x" * 9_999))).text) == 6 + 9_999
    assert read_file(Path(write(tmp_path / "b.txt", b"word " * 2_000_000))).text.startswith("word word")


def test_html_in_another_encoding(tmp_path: Path, cache: Path) -> None:
    page = HTML.replace("<head>", '<head><meta charset="ISO-8859-1">').replace("heron is", "héron is")
    assert "héron" in read_article(write(tmp_path / "a.html", page.encode("latin-1")), cache_dir=cache).text
    page = page.replace("ISO-8859-1", "klingon")
    with pytest.raises(DataError, match="unknown encoding 'klingon'"):
        read_article(write(tmp_path / "b.html", page), cache_dir=cache)


def test_a_file_of_no_known_form_that_is_html_may_declare_its_encoding(tmp_path: Path, cache: Path) -> None:
    page = HTML.replace("<head>", '<head><meta charset="ISO-8859-1">').replace("heron is", "héron is")
    assert "héron" in read_article(write(tmp_path / "heron", page.encode("latin-1")), cache_dir=cache).text
    with pytest.raises(DataError, match="UTF-8"):  # text that says what HTML says is text
        read_article(write(tmp_path / "heron.txt", page.encode("latin-1")), cache_dir=cache)


def test_a_missing_file_is_not_looked_up(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "heron.txt", TEXT)
    with pytest.raises(DataError, match=r"no file '.*herron\.txt' \(did you mean 'heron\.txt'\?\)"):
        read_article(str(tmp_path / "herron.txt"), cache_dir=cache)
    with pytest.raises(DataError, match="nor its folder"):
        read_article(str(tmp_path / "no" / "heron.txt"), cache_dir=cache)
    for source in ("herron.txt", "./herron", "../herron", "~/herron", "no/such.md"):
        with pytest.raises(DataError, match="there is no file"):
            read_article(source, cache_dir=cache)
    with pytest.raises(DataError, match="is a folder"):
        read_article(str(tmp_path), cache_dir=cache)


@pytest.mark.parametrize("source", ["ftp://a.example/x", "file:///etc/passwd", "x" * 5_000, "a\0b", ""])
def test_other_sources_are_refused(cache: Path, source: str) -> None:
    with pytest.raises(DataError):
        read_article(source, cache_dir=cache)


def test_title_is_read_once(site: Any, local: Fetcher, cache: Path) -> None:
    site.extracts["AC/DC"] = TEXT
    article = read_article("AC/DC", cache_dir=cache, endpoint=site.endpoint, fetcher=local)
    assert (article.title, article.text, article.source) == ("AC/DC", TEXT, f"{site.url}/wiki/AC/DC")
    assert len(site.requests) == 1
    again = read_article("AC/DC", cache_dir=cache, endpoint=site.endpoint, fetcher=local)
    assert again == article
    assert len(site.requests) == 1
    # another wiki is another article
    site.pages["/empty"] = site.page(b"{}")
    with pytest.raises(ServiceError):
        read_article("AC/DC", cache_dir=cache, endpoint=f"{site.url}/empty", fetcher=local)


def test_an_error_is_not_cached(site: Any, local: Fetcher, cache: Path) -> None:
    with pytest.raises(DataError, match="no Wikipedia article"):
        read_article("Heron", cache_dir=cache, endpoint=site.endpoint, fetcher=local)
    site.extracts["Heron"] = TEXT
    assert read_article("Heron", cache_dir=cache, endpoint=site.endpoint, fetcher=local).text == TEXT
    assert [path.suffix for path in cache.iterdir()] == [".json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"title": 1}', b"\xff\xfe", b"flip"], ids=repr)
def test_a_damaged_cache_entry_is_read_anew(site: Any, local: Fetcher, cache: Path, damage: bytes) -> None:
    site.extracts["Heron"] = TEXT
    read_article("Heron", cache_dir=cache, endpoint=site.endpoint, fetcher=local)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes().replace(b"bird", b"byrd") if damage == b"flip" else damage)
    assert read_article("Heron", cache_dir=cache, endpoint=site.endpoint, fetcher=local).text == TEXT
    assert len(site.requests) == 2
    assert json.loads(entry.read_bytes())["text"] == TEXT


def test_a_full_disk_leaves_no_half_entry(
    site: Any, local: Fetcher, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    site.extracts["Heron"] = TEXT
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        read_article("Heron", cache_dir=cache, endpoint=site.endpoint, fetcher=local)
    assert caught.value.exit_code == 5
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "content_type", "body", "title", "text"),
    [
        ("/heron.html", "text/html; charset=utf-8", HTML, "Heron", TEXT * 5),
        ("/x", "text/markdown", f"# Heron\n\n{TEXT}", "Heron", TEXT),
        ("/The_heron.md", "text/plain; charset=utf-8", f"{TEXT}\n\n## Habits\n\nNo.", "The heron", f"{TEXT}\n\n\nNo."),
        ("/The_heron", "text/plain", TEXT, "The heron", TEXT),
    ],
)
def test_url(
    site: Any, local: Fetcher, cache: Path, path: str, content_type: str, body: str, title: str, text: str
) -> None:
    site.pages[path] = site.page(body.encode(), content_type=content_type)
    article = read_article(site.url + path, cache_dir=cache, fetcher=local)
    assert (article.title, article.text, article.source) == (title, text, site.url + path)
    assert read_article(site.url + path, cache_dir=cache, fetcher=local) == article
    assert len(site.requests) == 1


def test_url_of_something_else(site: Any, local: Fetcher, cache: Path) -> None:
    site.pages["/a.pdf"] = site.page(b"%PDF", content_type="application/pdf")
    with pytest.raises(DataError, match="is 'application/pdf'"):
        read_article(f"{site.url}/a.pdf", cache_dir=cache, fetcher=local)
    with pytest.raises(DataError, match="not a public address"):
        read_article(f"{site.url}/a.pdf", cache_dir=cache)


@pytest.mark.parametrize(
    ("url", "host", "title"),
    [
        ("https://en.wikipedia.org/wiki/Grey_heron", "en.wikipedia.org", "Grey heron"),
        ("https://de.m.wikipedia.org/wiki/K%C3%B6ln#Lage", "de.wikipedia.org", "Köln"),
    ],
)
def test_url_of_a_wikipedia_article_goes_to_the_api(cache: Path, url: str, host: str, title: str) -> None:
    asked: list[str] = []

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        return []

    with pytest.raises(ServiceError, match=f"https://{host}/w/api.php"):
        read_article(url, cache_dir=cache, fetcher=Fetcher(resolve=resolve, num_attempts=1))
    assert asked == [host]


def test_no_network_is_a_service_error(cache: Path) -> None:
    fetcher = Fetcher(num_attempts=2, sleep=lambda seconds: None)
    with pytest.raises(ServiceError, match=r"en\.wikipedia\.org.*check the network") as caught:
        read_article("Grey heron", cache_dir=cache, fetcher=fetcher)
    assert caught.value.exit_code == 6


def test_article_folder(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", ".hidden.txt", "c.HTML", "notes.pdf", "d.wiki", "noext"):
        write(tmp_path / name, TEXT)
    (tmp_path / "folder.txt").mkdir()
    assert [path.name for path in article_folder(tmp_path)] == ["a.txt", "b.md", "c.HTML", "d.wiki"]
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", "no article in the folder"),
        ("missing", "not a folder"),
        ("b.md", "not a folder"),
    ):
        with pytest.raises(DataError, match=message):
            article_folder(tmp_path / folder)


def test_real_articles(test_data: Path, cache: Path) -> None:
    paths = article_folder(test_data / "wiki" / "full")
    assert len(paths) == 60
    for path in paths:
        article = read_article(str(path), cache_dir=cache)
        assert article.title == path.stem.replace("_", " ")
        assert len(article.text) > 4_000
        assert "==" not in article.text


def test_malformed_input_is_one_line(tmp_path: Path, cache: Path) -> None:
    """Noise in every form either is an article or is refused in one line, never a traceback of another kind."""
    noise = random.Random(0)
    pieces = [b"<", b">", b"{{", b"}}", b"[[", b"]]", b"{|", b"|}", b"==", b"\n", b"\n\n", b"'''", b"<ref>", b"</ref>"]
    pieces += [
        b"#",
        b"* ",
        b"```",
        b"[",
        b"](",
        b")",
        b"&",
        b";",
        b"<p>",
        b"<table>",
        b"word ",
        b"It is. ",
        b"\xc3\xa9",
        b"\xff",
    ]
    refusals: list[str] = []
    for case in range(300):
        content = b"".join(noise.choices(pieces, k=noise.randrange(1, 60)))
        source = write(tmp_path / f"x{noise.choice(['.txt', '.md', '.html', '.wiki', ''])}", content)
        try:
            article = read_article(source, cache_dir=cache)
            assert article.text.strip(), case
        except PreceptorError as error:
            refusals.append(str(error))
    assert 50 < len(refusals) < 280
    assert not [message for message in refusals if "\n" in message]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("page.ipynb", '{"cells": [], "nbformat": 4}', "is a notebook .*jupyter nbconvert --to markdown"),
        ("page.txt", '{"cells": [], "nbformat": 4}', "is a notebook"),
        ("page.tex", "Some text. More of it.", "is LaTeX .*pandoc"),
        ("page.csv", "a,b\n1,2\n", "is a table, not running text"),
        ("page.json", "{}", "is data, not running text"),
        ("page.py", "x = 1\n", "is a program, not running text"),
    ],
)
def test_text_that_is_no_article_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name} {message}"):
        read_file(tmp_path / name)


def test_a_folder_names_the_option_for_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; .*--train-articles"):
        read_article(str(tmp_path), cache_dir=tmp_path)
