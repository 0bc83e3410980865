"""Datasets that are there without a download: what Python brings along, and what a few lines can generate.

They differ as a curriculum needs it: code and reference prose to learn from, dialogues that are soon learned, and noise
that nobody can learn. The first two are read from the Python that runs, so they differ from version to version.
"""

from __future__ import annotations

import importlib
import random
import string
import sysconfig
from collections.abc import Callable
from pathlib import Path

from preceptor.errors import DataError

MAX_CHARACTERS = 100_000
"""Of one dataset: enough for a run of minutes."""

TEST_PROMPTS = (
    "Once upon a time, in a house by the sea,",
    "The poem begins with the sound of rain:",
    "To measure the resistance of a wire,",
    "The algorithm sorts the list by",
    "def fibonacci(n):",
    "for name, value in settings.items():",
    "Il était une fois",
    "Der kürzeste Weg führt",
    "En la plaza del pueblo",
)
"""Creative, technical, code, and French, German and Spanish."""


def builtin_documents(name: str) -> list[str]:
    """The documents of the built-in dataset ``name`` (code, manual, dialogue or noise), the same at every call.

    Raises:
        DataError: this Python came without the files.
    """
    return _MAKERS[name]()


def _code() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    documents: list[str] = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        # The longest modules would fill the dataset alone.
        if 1_000 <= len(text) <= 12_000:
            documents.append(text)
    return _limited(documents, f"no source files in {folder}")


def _manual() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f"this Python has no reference manual ({error}); use another dataset than builtin:manual"
        ) from error
    return _limited([text.strip() for _, text in sorted(topics.items())], "pydoc_data.topics is empty")


def _limited(documents: list[str], reason: str) -> list[str]:
    kept: list[str] = []
    room = MAX_CHARACTERS
    for document in documents:
        if room <= 0:
            break
        kept.append(document[:room])
        room -= len(document)
    if not kept:
        raise DataError(f"a built-in dataset has no document: {reason}")
    return kept


def _dialogue() -> list[str]:
    chooser = random.Random(1)
    documents = []
    for _ in range(300):
        lines = []
        for _ in range(3):
            name, other = chooser.sample(("Ada", "Ben", "Chloe", "Dev", "Elif", "Farid"), 2)
            count, price = chooser.randint(2, 9), chooser.randint(2, 9)
            thing = chooser.choice(("apples", "lamps", "maps", "pears", "stamps", "tickets"))
            day = chooser.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"))
            hour = chooser.randint(1, 11)
            lines += chooser.choice(
                (
                    [
                        f"{name}: How much are {count} {thing}?",
                        f"{other}: One is {price} coins, so {count} are {count * price}.",
                    ],
                    [
                        f"{name}: Shall we meet on {day} at {hour}?",
                        f"{other}: On {day} I am late. Let us say {hour + 1}.",
                    ],
                    [
                        f"{name}: I lost my {thing}. Has {other} seen them?",
                        f"{other}: Yes, {name}, {count} {thing} are on the table.",
                    ],
                )
            )
        documents.append("\n".join(lines))
    return documents


def _noise() -> list[str]:
    chooser = random.Random(2)
    return ["".join(chooser.choices(string.ascii_letters + string.digits, k=400)) for _ in range(200)]


_MAKERS: dict[str, Callable[[], list[str]]] = {
    "code": _code,
    "manual": _manual,
    "dialogue": _dialogue,
    "noise": _noise,
}
