"""Malformed configurations, arguments, articles, corpora, model folders and pages: one line each, never a traceback."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from campaigns.settings import SECONDS, run_small
from campaigns.tally import Class
from preceptor.cli import main
from preceptor.data.articles.article import read_file
from preceptor.data.articles.pairs import sentence_pairs
from preceptor.data.corpora.corpus import read_documents
from preceptor.errors import PreceptorError
from preceptor.lm.load import load_language_model
from preceptor.report.page import build_report

NASTY = (
    *("", " ", "\0", "\n", "\r", "\t", "\ufeff", "\u2028", "\u202e", "\ud83d", "é", "漢", "🙂", "'", '"', "`", "$(x)"),
    *("-1", "0", "1e309", "-0.0", "nan", ".inf", "9" * 400, "1e-5", "0x10", "1_000", "true", "null", "~", "yes"),
    *("[]", "{}", "[[[[", "{{{{", "]]", "}}", ": :", "- -", "&a", "*a", "!!python/object:os.system", "<<: *x", "%YAML"),
    *(
        "<script>",
        "</script>",
        "<!--<script>",
        "<img src=x onerror=x>",
        "{{7*7}}",
        "{% raw %}",
        "[[",
        "'''",
        "|-",
        "<br",
    ),
    *("../" * 20, "/dev/null", "~", "C:\\", "x" * 5_000, "a.b.c.d", "--", "-", "--set", "=", "==", "a="),
)


def mangled(text: str, rng: random.Random) -> str:
    """``text`` with one to four places cut, doubled, swapped or replaced."""
    for _ in range(rng.randint(1, 4)):
        at, width = rng.randrange(len(text) + 1), rng.choice((0, 1, 1, 3, 20, 200))
        piece = rng.choice((rng.choice(NASTY), text[at : at + width] * rng.choice((2, 40)), chr(rng.randrange(0xD7FF))))
        text = text[:at] + piece + text[at + width :]
    return text


def said(argv: list[str]) -> tuple[int, str]:
    """Exit code and what stderr got."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, err.getvalue()


def is_told(argv: list[str]) -> str | None:
    code, err = said(argv)
    if "Traceback" in err or code not in (0, 2, 7):
        return f"{argv!r:.300}: exit {code}: {err[-500:]}"
    return None


SYSTEMS = ("reading", "bandit", "curriculum", "surgery")


def configuration(rng: random.Random, folder: Path) -> str | None:
    system = rng.choice(SYSTEMS)
    text = (resources.files("preceptor") / "presets" / system / "smoke.yaml").read_text(encoding="utf-8")
    path = folder / "config.yaml"
    path.write_bytes(mangled(text, rng).encode("utf-8", "surrogatepass"))
    return is_told(["run", system, "--config", str(path), "--print-config"])


WORDS = (
    *("run", "resume", "compare", "watch", "replay", "report", "export", "list", "doctor", "--help", "--version"),
    *(*SYSTEMS, "--preset", "smoke", "--seed", "--set", "update.steps=1", "--config", "--out", "--threads", "--device"),
    *("--article", "--model", "nowhere", "--methods", "--seeds", "0-3", "--no-report", "--figures", "--tolerance"),
)


def arguments(rng: random.Random, folder: Path) -> str | None:
    """Ends in a word that keeps a command from doing anything, should the others be well formed."""
    words = [rng.choice((rng.choice(WORDS), rng.choice(WORDS), rng.choice(NASTY))) for _ in range(rng.randint(1, 6))]
    return is_told([*words, rng.choice(("--no-such-option", "--help"))])


ARTICLES = {
    ".txt": "The harbour lies at the mouth of the river. Ships call there every week.\n\nIt is old. Nobody knows why.",
    ".md": "# Title\n\nThe harbour lies at the mouth. Ships call.\n\n- one thing\n- another\n\n| a | b |\n|--|--|\n",
    ".html": "<html><head><title>T</title></head><body><p>The harbour lies here.<br>Ships call there.</p><ul><li>A"
    "<ul><li>B</li></ul></li></ul><table><tr><td>x</td></tr></table><math><mi>v</mi></math></body></html>",
    ".wiki": "'''Harbour''' is a [[town]]. It has {{frac|1|2}} a {{abbr|RN|x}}.<ref>x</ref>\n== H ==\n{|\n|-\n| a\n|}",
}


def article(rng: random.Random, folder: Path) -> str | None:
    suffix = rng.choice(tuple(ARTICLES))
    path = folder / f"page{suffix}"
    path.write_bytes(mangled(ARTICLES[suffix], rng).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(PreceptorError):
        sentence_pairs(read_file(path).text, language=rng.choice(("en", "de", "ja", "xx")))
    return None


CORPORA = {
    ".jsonl": "".join(
        json.dumps({"text": f"Document {n}.", "dialog": ["a", "b"], "field": {"x": n}}) + "\n" for n in range(6)
    ),
    ".json": json.dumps([{"text": f"Document {n}.", "dialog": ["a", "b"]} for n in range(6)]),
    ".csv": "text,dialog\n" + "".join(f'"Document {n}, or so",x\n' for n in range(6)),
    ".txt": "One document.\n\nAnother one.\n",
}


def corpus(rng: random.Random, folder: Path) -> str | None:
    suffix = rng.choice(tuple(CORPORA))
    path = folder / f"corpus{suffix}"
    path.write_bytes(mangled(CORPORA[suffix], rng).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(PreceptorError):
        list(read_documents(path, adapter=rng.choice(("text", "dialog", "field:field", "field:x", rng.choice(NASTY)))))
    return None


def model(rng: random.Random, folder: Path) -> str | None:
    """The bundled model with a mangled configuration, tokenizer or header of its weights."""
    place = folder / "model"
    if not place.is_dir():
        with resources.as_file(resources.files("preceptor") / "starter") as starter:
            shutil.copytree(starter, place)
    path = place / rng.choice(
        ("config.json", "config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
    )
    before = path.read_bytes()
    if path.name == "config.json" and rng.random() < 0.7:
        config = json.loads(before)
        config[rng.choice(tuple(config))] = rng.choice((0, -1, 10**9, None, [], {}, "x", 1.5, True, rng.choice(NASTY)))
        path.write_text(json.dumps(config))
    elif path.name == "model.safetensors":
        damaged = bytearray(before)
        damaged[rng.randrange(200)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
    else:
        path.write_bytes(mangled(before.decode(), rng).encode("utf-8", "surrogatepass"))
    try:
        with contextlib.suppress(PreceptorError):
            load_language_model(str(place), device=torch.device("cpu"))
        return None
    finally:
        path.write_bytes(before)


class Elements(HTMLParser):
    """Counts elements, and attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.seen.update(f"@{name}" for name, _ in attrs if name.startswith("on"))


@functools.cache
def plain_page(folder: Path) -> Counter[str]:
    return page_elements(folder, "plain")


def page_elements(folder: Path, text: str) -> Counter[str]:
    """Elements of the page of a small run whose every text is ``text``."""
    run = folder / "page"
    run.mkdir(exist_ok=True)
    estimate: dict[str, Any] = {"mean": 1.0, "low": 0.5, "high": 1.5, "unit": text, "n": 3}
    result = {
        "system": text,
        "verdict": text,
        "arms": {text or "arm": {"reward": estimate}, "random": {"reward": estimate}},
    }
    (run / "result.json").write_text(json.dumps(result))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "reward": n, "note": text}) + "\n" for n in (1, 2))
    )
    (run / "manifest.json").write_text(json.dumps({"system": text, "name": text, "tags": [text]}))
    articles = {text or "a": {"title": text, "pairs": [{"key": text, "value": text}]}}
    (run / "articles.json").write_text(json.dumps(articles))
    parser = Elements()
    parser.feed(build_report(run).read_text(encoding="utf-8"))
    return parser.seen


def page(rng: random.Random, folder: Path) -> str | None:
    text = mangled(rng.choice(NASTY), rng).encode("utf-8", "replace").decode()
    try:
        seen = page_elements(folder, text)
    except PreceptorError:
        return None
    foreign = {tag: count for tag, count in seen.items() if tag not in plain_page(folder)}
    scripts = seen["script"] != plain_page(folder)["script"]
    return f"{text!r:.200} gives {foreign or 'another script'}" if foreign or scripts else None


CLASSES = {
    "configurations": Class(10_000, "one line, no traceback", configuration, seconds=10),
    "arguments": Class(10_000, "one line, no traceback", arguments, seconds=10),
    "articles": Class(10_000, "text, or one line", article, seconds=10),
    "corpora": Class(10_000, "documents, or one line", corpus, seconds=10),
    "models": Class(10_000, "a model, or one line", model, seconds=30),
    "pages": Class(10_000, "no foreign element", page, seconds=20),
    "settings": Class(1_000, "a finished run, or one line", run_small, seconds=2 * SECONDS),
}
