"""Tasks with a verifier: built in, from a JSONL file, or of reasoning-gym, each with levels of difficulty."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import DataError, MissingExtraError
from preceptor.systems.curriculum.rewards import load_function
from preceptor.systems.curriculum.tasks.config import BUILTIN_TASKS, COIN, GYM, TaskOptions


@dataclass(frozen=True)
class Item:
    """A prompt and its right answer; ``check`` says whether a text is right."""

    prompt: str
    answer: str
    check: Callable[[str], bool]


@dataclass(frozen=True)
class Source:
    """One level of one task.

    Attributes:
        task: name of the task.
        level: from 1, the easiest.
        draw: an item, given random numbers.
        max_tokens: the most that an answer may take; None where it is the right answer's own length, in bytes.
        random_reward: the answer is not looked at, a coin is flipped (the trap).
    """

    task: str
    level: int
    draw: Callable[[random.Random], Item]
    max_tokens: int | None = None
    random_reward: bool = False

    @property
    def name(self) -> str:
        """As in tables and logs."""
        return f"{self.task} {self.level}"


def build_sources(tasks: Sequence[TaskOptions]) -> list[Source]:
    """The levels of all tasks, task by task, from the easiest up.

    Raises:
        DataError: a file is missing, malformed, or has fewer levels than asked for.
        MissingExtraError: a task of reasoning-gym, which is not installed.
    """
    sources: list[Source] = []
    for task in tasks:
        if task.source in BUILTIN_TASKS:
            sources += [_builtin(task, level) for level in range(1, task.levels + 1)]
        elif task.source.startswith(GYM):
            sources += _gym(task)
        else:
            sources += _from_file(task)
    return sources


# ---- built in -------------------------------------------------------------------------------------------------------


def _builtin(task: TaskOptions, level: int) -> Source:
    make, sign = _BUILTIN[task.source]

    def draw(chooser: random.Random) -> Item:
        prompt, answer = make(chooser, level, task.levels)
        return Item(prompt + sign, answer, answer.__eq__)

    return Source(task.name, level, draw, random_reward=task.source == COIN)


def _digits(chooser: random.Random, num: int) -> str:
    return "".join(chooser.choices("0123456789", k=num))


# Each makes a prompt and its answer. Prompts are filled with spaces on the left to the width of the highest level, so
# that a place counted from the end is the same place at every level.


def _reverse(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), digits[::-1]


def _copy(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), digits


def _sort(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), "".join(sorted(digits))


def _count(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    """How many a's; the longer the word, the harder."""
    word = "".join(chooser.choices("ab", k=level))
    return word.rjust(levels), str(word.count("a"))


def _add(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    """The sum with its last digit first, as carries come, and one digit longer than the numbers."""
    first, second = (chooser.randrange(10**level) for _ in range(2))
    numbers = [str(number).zfill(level).rjust(levels) for number in (first, second)]
    return "+".join(numbers), str(first + second).zfill(level + 1)[::-1]


def _rotate(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), digits[-2::-1] * (level > 1) + digits[-1]


def _complement(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), "".join(str(9 - int(digit)) for digit in reversed(digits))


def _successor(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), "".join(str((int(digit) + 1) % 10) for digit in reversed(digits))


def _largest(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    digits = _digits(chooser, level)
    return digits.rjust(levels), max(digits) + str(digits.count(max(digits)))


def _coin(chooser: random.Random, level: int, levels: int) -> tuple[str, str]:
    return _digits(chooser, 4).rjust(levels), "0000"


_BUILTIN: dict[str, tuple[Callable[[random.Random, int, int], tuple[str, str]], str]] = {
    "reverse": (_reverse, "="),
    "copy": (_copy, ">"),
    "sort": (_sort, "<"),
    "count": (_count, "#"),
    "add": (_add, "="),
    "rotate": (_rotate, "@"),
    "complement": (_complement, "~"),
    "successor": (_successor, "^"),
    "largest": (_largest, "%"),
    COIN: (_coin, "?"),
}
"""How to make an item, and the sign that ends its prompt."""


# ---- files ----------------------------------------------------------------------------------------------------------


def _from_file(task: TaskOptions) -> list[Source]:
    path = Path(task.source)
    if not path.is_file():
        raise DataError(f"there is no task file {path}; give a JSONL file with prompt, answer and level")
    check = load_function(task.check) if task.check else None
    by_level: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            by_level[int(row.get("level", 1))].append((str(row["prompt"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number} is no object with prompt, answer and level ({error})") from error
    if missing := [level for level in range(1, task.levels + 1) if not by_level[level]]:
        raise DataError(f"{path} has no rows of level {', '.join(map(str, missing))}; set `levels` to what it has")

    def source(level: int) -> Source:
        rows = by_level[level]

        def draw(chooser: random.Random) -> Item:
            prompt, answer = chooser.choice(rows)
            return Item(prompt, answer, answer.__eq__ if check is None else lambda text: bool(check(text, answer)))

        return Source(task.name, level, draw, max_tokens=task.max_tokens)

    return [source(level) for level in range(1, task.levels + 1)]


# ---- reasoning-gym --------------------------------------------------------------------------------------------------

GYM_ITEMS = 500
"""Of each level, made once."""


def _gym(task: TaskOptions) -> list[Source]:
    """Levels of a curriculum of reasoning-gym.

    Only a score of exactly 1 is right: scores in between are graded by rules that a wrong answer can please.
    """
    name = task.source.removeprefix(GYM)
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
        from reasoning_gym.factory import create_curriculum
    except ImportError as error:
        raise MissingExtraError(f"the task {task.source}", package="reasoning-gym", extra="gym") from error
    # The default context takes in all levels up to the one that is set; this one takes that one alone.
    context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    sources = []
    for level in range(1, task.levels + 1):
        curriculum = create_curriculum(name)
        curriculum.set_global_level(level - 1)
        made = curriculum.generate_configuration({"seed": level, "size": GYM_ITEMS}, context=context)
        dataset = create_dataset(name, **made.__dict__)

        def draw(chooser: random.Random, dataset=dataset) -> Item:  # type: ignore[no-untyped-def]
            entry = dataset[chooser.randrange(GYM_ITEMS)]
            return Item(
                entry["question"],
                str(entry["answer"]),
                lambda text: dataset.score_answer(answer=text, entry=entry) == 1.0,
            )

        sources.append(Source(task.name, level, draw, max_tokens=task.max_tokens))
    return sources
