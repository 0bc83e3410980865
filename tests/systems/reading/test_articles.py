"""From files to readings: which pairs are read, which are held out, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.data.articles.article import Article, read_file
from preceptor.data.articles.pairs import sentence_pairs
from preceptor.errors import DataError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.articles import bundled_article, load_readings, spread, to_reading
from preceptor.systems.reading.config import DataOptions
from preceptor.systems.reading.episode import check_budget
from preceptor.systems.reading.material import encode_reading


def text_of(num_pairs: int, *, name: str = "bird") -> str:
    """An article of ``num_pairs`` pairs whose sentences say their number in words."""
    return "\n\n".join(
        f"Key of {name} {letter} is here. Value of {name} {letter} is there." for letter in words(num_pairs)
    )


def words(count: int) -> list[str]:
    return ["".join(chr(97 + int(digit)) for digit in str(number)) for number in range(count)]


def article(num_pairs: int) -> Article:
    return Article("Birds", text_of(num_pairs), "birds.txt", "0")


def number(sentence: str) -> int:
    return int("".join(str(ord(letter) - 97) for letter in sentence.split()[3]))


def options(**arguments: Any) -> DataOptions:
    return DataOptions(**{"num_pairs": 4, "num_probes": 2, **arguments})


def test_spread_takes_the_middle_of_equal_parts() -> None:
    assert spread(12, 3) == [2, 6, 10]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(7, 0) == []
    for total in range(1, 40):
        for count in range(1, total + 1):
            places = spread(total, count)
            assert len(set(places)) == count
            assert 0 <= places[0] <= places[-1] < total


def test_pairs_and_probes_are_spread_evenly_and_share_nothing(tiny: LanguageModel) -> None:
    reading = to_reading(article(30), options(), tiny, name="birds")
    # six places of thirty: 2, 7, 12, 17, 22, 27; of these the second and fifth are probes
    assert [number(key) for key in reading.keys] == [2, 12, 17, 27]
    assert [number(value) for value in reading.values] == [2, 12, 17, 27]
    assert reading.probe == "Value of bird h is there. Value of bird cc is there."
    assert (reading.name, reading.title, reading.num_pairs) == ("birds", "Birds", 4)


def test_zero_pairs_takes_all_that_the_probes_leave(tiny: LanguageModel) -> None:
    reading = to_reading(article(9), options(num_pairs=0), tiny, name="birds")
    assert reading.num_pairs == 7
    assert len({*map(number, reading.keys)}) == 7
    everything = to_reading(article(9), options(num_pairs=0, num_probes=0), tiny, name="birds")
    assert [number(key) for key in everything.keys] == list(range(9))
    assert everything.probe == ""


def test_long_values_are_left_out_by_the_models_own_count(tiny: LanguageModel) -> None:
    lengths = {len(tiny.encode(" " + pair.value)) for pair in sentence_pairs(article(30).text)}
    assert len(lengths) > 1
    limit = sorted(lengths)[0]
    reading = to_reading(article(30), options(num_pairs=2, num_probes=0, max_value_tokens=limit), tiny, name="birds")
    assert all(len(tiny.encode(" " + value)) == limit for value in reading.values)


@pytest.mark.parametrize(
    ("num_pairs", "arguments", "reads", "probes"),
    [
        (5, {}, 4, 1),  # 4 + 2 are wanted: a third of five is one probe
        (5, {"num_pairs": 2}, 2, 2),  # enough
        (3, {"num_pairs": 0}, 2, 1),
        (30, {"max_value_tokens": 1}, 2, 1),  # the three shortest
        (2, {}, 2, 0),
    ],
)
def test_a_short_article_gives_what_it_has(
    tiny: LanguageModel, num_pairs: int, arguments: dict[str, Any], reads: int, probes: int
) -> None:
    reading = to_reading(article(num_pairs), options(**arguments), tiny, name="birds")
    assert (reading.num_pairs, reading.probe.count("Value of")) == (reads, probes)


def test_one_pair_is_refused(tiny: LanguageModel) -> None:
    with pytest.raises(DataError, match="'birds' has 1 usable pairs, and at least 2 are to be read; take a longer"):
        to_reading(article(1), options(), tiny, name="birds")


def test_exactly_enough_is_enough(tiny: LanguageModel) -> None:
    assert to_reading(article(6), options(), tiny, name="birds").num_pairs == 4


def test_chunks_are_of_the_asked_length_and_hold_the_text_in_order(tiny: LanguageModel) -> None:
    source = bundled_article()
    settings = options(pairing="chunks", key_tokens=6, value_tokens=10, num_pairs=0, num_probes=0, max_value_tokens=99)
    reading = to_reading(source, settings, tiny, name="chunks")
    tokens = tiny.encode(source.text)
    assert reading.num_pairs == len(tokens) // 16
    assert reading.keys[0] == tiny.decode(tokens[:6])
    assert reading.values[1] == tiny.decode(tokens[22:32]).strip()


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder(path: Path, **files: str) -> str:
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(path)


def test_the_bundled_article_is_read_where_none_is_named(tiny: LanguageModel, tmp_path: Path) -> None:
    readings = load_readings(DataOptions(), tiny, cache_dir=tmp_path)
    assert [reading.name for reading in readings.train] == [bundled_article().title]
    assert readings.held_out == ()
    assert readings.train[0].num_pairs == 8


def test_folders_teach_and_judge(tiny: LanguageModel, tmp_path: Path) -> None:
    train = folder(tmp_path / "train", ants=text_of(8, name="ant"), bees=text_of(8, name="bee"))
    held_out = folder(tmp_path / "held", cats=text_of(8, name="cat"))
    readings = load_readings(options(train_articles=train, eval_articles=held_out), tiny, cache_dir=tmp_path)
    assert [reading.name for reading in readings.train] == ["ants", "bees"]
    assert [reading.name for reading in readings.held_out] == ["cats"]
    assert "ant" in readings.train[0].keys[0]


def test_names_are_unique_over_both_folders(tiny: LanguageModel, tmp_path: Path) -> None:
    """Two articles of one name must not be taken for one another: pairs are looked up by it."""
    train = folder(tmp_path / "train", ants=text_of(8, name="ant"))
    held_out = folder(tmp_path / "held", ants=text_of(8, name="wasp"))
    readings = load_readings(options(train_articles=train, eval_articles=held_out), tiny, cache_dir=tmp_path)
    assert [reading.name for reading in (*readings.train, *readings.held_out)] == ["ants", "ants (2)"]
    assert "ant" in readings.train[0].keys[0]
    assert "wasp" in readings.held_out[0].keys[0]


def test_a_held_out_article_must_not_be_trained_on(tiny: LanguageModel, tmp_path: Path) -> None:
    train = folder(tmp_path / "train", ants=text_of(8))
    held_out = folder(tmp_path / "held", other_name=text_of(8))
    with pytest.raises(DataError, match="'other name' is among the training articles as 'ants'"):
        load_readings(options(train_articles=train, eval_articles=held_out), tiny, cache_dir=tmp_path)


def test_the_file_that_is_at_fault_is_named(tiny: LanguageModel, tmp_path: Path) -> None:
    train = folder(tmp_path / "train", ants=text_of(8), short=text_of(1))
    with pytest.raises(DataError, match="'short' has 1 usable pairs"):
        load_readings(options(train_articles=train), tiny, cache_dir=tmp_path)


# ---- real articles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_every_real_article_is_prepared(test_data: Path, name: str) -> None:
    lm = load_language_model(str(test_data / "lm" / name), device=torch.device("cpu"))
    files = sorted((test_data / "wiki" / "articles").glob("*.txt"))
    assert len(files) == 60
    num_short = 0
    for path in files:
        reading = to_reading(read_file(path), DataOptions(), lm, name=path.stem)
        material = encode_reading(reading, lm, prompt="{title}\n", use_chat_template=True)
        check_budget(lm.context_length, material, budget=reading.num_pairs, query_tokens=4)
        assert 2 <= reading.num_pairs <= 8
        assert reading.probe
        assert all(value not in reading.probe for value in reading.values)
        usable = [pair for pair in sentence_pairs(read_file(path).text) if len(lm.encode(" " + pair.value)) <= 48]
        count = max(len(usable), 3)
        assert reading.num_pairs == min(8, count - min(4, count // 3))
        num_short += reading.num_pairs < 8
    # Both branches are seen. A vocabulary of 512 spells most sentences with more than 48 tokens.
    assert 0 < num_short < {"stories260k": 30, "stories3m": 5}[name]
