"""Tasks: their answers by hand, files, and what reasoning-gym is asked for."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from preceptor.errors import DataError, MissingExtraError
from preceptor.systems.curriculum.tasks.config import BUILTIN_TASKS, TaskOptions
from preceptor.systems.curriculum.tasks.sources import build_sources

SOLVE = {
    "reverse": lambda prompt: prompt[::-1],
    "copy": lambda prompt: prompt,
    "sort": lambda prompt: "".join(sorted(prompt)),
    "rotate": lambda prompt: prompt[::-1][1:] + prompt[-1],
    "complement": lambda prompt: "".join(str(9 - int(digit)) for digit in prompt[::-1]),
    "successor": lambda prompt: "".join("1234567890"[int(digit)] for digit in prompt[::-1]),
    "largest": lambda prompt: max(prompt) + str(prompt.count(max(prompt))),
    "count": lambda prompt: str(prompt.count("a")),
    "add": lambda prompt: str(sum(int(part) for part in prompt.split("+"))).zfill(len(prompt.split("+")[0]) + 1)[::-1],
}


@pytest.mark.parametrize("name", SOLVE)
def test_builtin_answers_and_levels(name: str) -> None:
    sources = build_sources([TaskOptions(name="t", source=name, levels=4)])
    chooser = random.Random(0)
    assert [source.level for source in sources] == [1, 2, 3, 4]
    for source in sources:
        for _ in range(20):
            item = source.draw(chooser)
            content = item.prompt[:-1].replace(" ", "")
            assert len(content.split("+")[0]) == source.level
            assert item.answer == SOLVE[name](content)
            assert item.check(item.answer)
            assert not item.check(item.answer + "0")
    assert len({len(source.draw(chooser).prompt) for source in sources}) == 1  # one width at every level


def test_every_builtin_task_is_listed() -> None:
    assert set(SOLVE) | {"coin"} == set(BUILTIN_TASKS)
    assert build_sources([TaskOptions(name="c", source="coin", levels=1)])[0].random_reward


def test_a_file_of_items_with_a_check(tmp_path: Path) -> None:
    path, check = tmp_path / "items.jsonl", tmp_path / "mine.py"
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "9+9=", "answer": "18", "level": 2}]
    path.write_text("\n".join(map(json.dumps, rows)))
    check.write_text("def close(text, answer):\n    return text.strip() == answer\n")
    easy, hard = build_sources([TaskOptions(name="t", source=str(path), levels=2, check=f"{check}:close")])
    item = hard.draw(random.Random(0))
    assert (item.prompt, item.answer) == ("9+9=", "18")
    assert item.check(" 18 ")
    assert not item.check("19")
    assert easy.max_tokens == 16


def test_faults_of_files_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task file"):
        build_sources([TaskOptions(name="t", source=str(tmp_path / "none.jsonl"))])
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"items.jsonl:2 is no object"):
        build_sources([TaskOptions(name="t", source=str(path))])
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="no rows of level 2, 3"):
        build_sources([TaskOptions(name="t", source=str(path), levels=3)])


def test_reasoning_gym_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match="gym"):
        build_sources([TaskOptions(name="t", source="reasoning_gym:chain_sum")])


def test_only_a_score_of_one_is_right_in_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Dataset:
        def __init__(self, name: str, **configuration: Any) -> None:
            asked.append((name, configuration["level"], configuration["context"]))

        def __getitem__(self, index: int) -> dict[str, str]:
            return {"question": f"item {index}", "answer": "-4"}

        def score_answer(self, *, answer: str, entry: dict[str, str]) -> float:
            return 1.0 if answer == entry["answer"] else 0.67

    class Curriculum:
        def set_global_level(self, level: int) -> None:
            self.level = level

        def generate_configuration(self, defaults: dict[str, int], *, context: Any) -> SimpleNamespace:
            return SimpleNamespace(**defaults, level=self.level, context=context.mode)

    package, coaching, base, factory = (
        ModuleType(name)
        for name in (
            "reasoning_gym",
            "reasoning_gym.coaching",
            "reasoning_gym.coaching.base_curriculum",
            "reasoning_gym.factory",
        )
    )
    package.create_dataset = lambda name, **configuration: Dataset(name, **configuration)  # type: ignore[attr-defined]
    base.DefaultCurriculumContext = lambda mode: SimpleNamespace(mode=mode)  # type: ignore[attr-defined]
    base.RangeAttributeMode = SimpleNamespace(UPPER_BOUND="upper")  # type: ignore[attr-defined]
    factory.create_curriculum = lambda name: Curriculum()  # type: ignore[attr-defined]
    for module in (package, coaching, base, factory):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sources = build_sources([TaskOptions(name="t", source="reasoning_gym:chain_sum", levels=2)])
    assert asked == [("chain_sum", 0, "upper"), ("chain_sum", 1, "upper")]
    item = sources[1].draw(random.Random(0))
    assert item.check("-4")
    assert not item.check("-40")  # graded 0.67
