"""Configurations: layering, strictness, exact round trips, and messages that say what to do."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from preceptor.config import (
    MAX_BYTES,
    Options,
    dump_yaml,
    from_dict,
    load_config,
    schema,
    to_dict,
)
from preceptor.errors import ConfigError


class Source(Options):
    path: str
    share: float = Field(1.0, gt=0, description="Share.")


class Data(Options):
    """What is read."""

    article: str = Field("", description="Title, URL or file.")
    layers: tuple[int, ...] = Field((1, 2), description="Layers.")
    span: tuple[int, float] = Field((0, 1.0), description="From, to.")
    weights: dict[str, float] = Field({}, description="Weight of each source.")
    sources: tuple[Source, ...] = Field((), description="The mixture.")

    def conflicts(self) -> Iterator[str]:
        if self.span[0] > self.span[1]:
            yield f"`span` must not end before it begins, got {self.span[0]} to {self.span[1]}"


class Update(Options):
    learning_rate: float = Field(1e-4, description="Adam's step size: 1 # of these\nper update.")
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=True, description="Gradient norm; .inf clips nothing.")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="Clip range.")
    credit: Literal["trajectory", "step"] = Field("trajectory", description="What a step is credited with.")
    temperature: float | Literal["calibrated"] = Field("calibrated", description="Softmax temperature.")


class Whole(Options):
    renamed: ClassVar = {"update.clip": "update.clip_epsilon", "loud": "verbose"}

    seed: int = Field(0, description="Seed of every random stream.")
    verbose: bool = Field(False, description="Say more.")
    note: str | None = Field(None, description="Anything.")
    data: Data = Data()
    update: Update = Update(learning_rate=0.5)

    def conflicts(self) -> Iterator[str]:
        if self.seed < 0:
            yield f"`seed` must not be below 0 with `update.credit` {self.update.credit}, got {self.seed}"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def faults_of(cls: type, **layers: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, **layers)
    for fault in caught.value.faults:
        assert fault.isprintable(), "a fault is one printable line"
        assert len(fault) < 400
    return caught.value.faults


# ---- layers and types ----


def test_no_layer_gives_the_defaults() -> None:
    assert load_config(Whole) == Whole()
    assert load_config(Whole).update.learning_rate == 0.5  # the section's default in Whole, not the one in Update


def test_later_layers_win_field_by_field(tmp_path: Path) -> None:
    preset = written(tmp_path / "preset.yaml", "seed: 1\nupdate:\n  learning_rate: 1e-5\n  clip_epsilon: 0.1\n")
    file = written(tmp_path / "mine.yaml", "seed: 2\nupdate: {clip_epsilon: 0.3}\ndata:\n")
    config = load_config(Whole, preset=preset, file=file, overrides=["update.credit=step", "seed=3", "seed=4"])
    assert config == Whole(seed=4, update=Update(learning_rate=1e-5, clip_epsilon=0.3, credit="step"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("3", 3.0),
        (".5", 0.5),
        ("-2.", -2.0),
    ],
)
def test_what_is_a_number_in_a_file_and_typed(tmp_path: Path, text: str, value: float) -> None:
    file = written(tmp_path / "a.yaml", f"update:\n  learning_rate: {text}\n")
    for config in (load_config(Whole, file=file), load_config(Whole, overrides=[f"update.learning_rate={text}"])):
        assert config.update.learning_rate == value
        assert type(config.update.learning_rate) is float


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "1:30", "null and void", "'1984'", "~user", "a: b"])
def test_yaml_1_1_surprises_stay_text(tmp_path: Path, text: str) -> None:
    shown = f'"{text}"' if ": " in text else text
    file = written(tmp_path / "a.yaml", f"data:\n  article: {shown}\n")
    assert load_config(Whole, file=file).data.article == text.strip("'")


def test_the_type_of_the_field_decides_what_typed_text_means() -> None:
    config = load_config(
        Whole,
        overrides=[
            "data.article=1984",
            "note=~/a=b",
            "data.layers=[3, 4, 5]",
            "data.span=[2, 3]",
            "data.weights={books: 2, web: 1e-1}",
            "data.sources=[{path: books, share: 2}, {path: web}]",
            "verbose=true",
            "update.temperature=1e-1",
        ],
    )
    assert config.data == Data(
        article="1984",
        layers=(3, 4, 5),
        span=(2, 3.0),
        weights={"books": 2.0, "web": 0.1},
        sources=(Source(path="books", share=2.0), Source(path="web")),
    )
    assert config.note == "~/a=b"
    assert config.verbose is True
    assert config.update.temperature == 0.1
    assert load_config(Whole, overrides=["note=null"]).note is None
    assert load_config(Whole, overrides=["update.temperature=calibrated"]).update.temperature == "calibrated"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=true", "`seed` must be a whole number, got True"),
        ("seed=1.5", "`seed` must be a whole number, got 1.5"),
        ("verbose=1", "`verbose` must be true or false, got 1"),
        ("verbose=yes", "`verbose` must be true or false, got 'yes'"),
        ("update.learning_rate=.nan", "`update.learning_rate` must be a number, got '.nan'"),
        ("update.learning_rate=nan", "`update.learning_rate` must be a number, got 'nan'"),
        ("update.learning_rate=true", "`update.learning_rate` must be a number, got True"),
        ("update.learning_rate=[[", "`update.learning_rate` must be a number, got '[['"),
        (
            "update.credit=steps",
            "`update.credit` must be one of trajectory, step, got 'steps' (did you mean 'step'?)",
        ),
        ("update.temperature=hot", "`update.temperature` must be a number or one of calibrated, got 'hot'"),
        ("data.layers=3", "`data.layers` must be a list such as [a, b], got 3"),
        ("data.layers=[1, x]", "`data.layers[1]` must be a whole number, got 'x'"),
        ("data.span=[1]", "`data.span[1]` is required; give it a value"),
        ("data.span=[1, 2, 3]", "`data.span` must be a list such as [a, b], got (1, 2, 3)"),
        ("data.weights={a: b}", "`data.weights['a']` must be a number, got 'b'"),
        ("data.sources=[{share: 1}]", "`data.sources[0].path` is required; give it a value"),
        (
            "data.sources=[{path: a, shar: 1}]",
            "unknown key 'data.sources[0].shar' (did you mean 'data.sources[0].share'?)",
        ),
        ("data.sources=[{path: a, share: -1}]", "`data.sources[0].share` must be above 0, got -1"),
        (
            "data.article=a\0b",
            "`data.article` must be text, got 'a\\x00b'; it has a NUL character or half a surrogate pair",
        ),
        ("seed", "override 'seed' has no '='; write it as key=value"),
        ("data=1", "`data` is a section; set one of its keys, such as `data.article`"),
        ("sed=1", "unknown key 'sed' (did you mean 'seed'?)"),
        ("updat.seed=1", "unknown key 'updat.seed' (did you mean 'seed'?)"),
        ("dat=1", "unknown key 'dat' (did you mean 'data'?)"),
        ("article=1", "unknown key 'article' (did you mean 'data.article'?)"),
        (
            "update.zzz=1",
            "unknown key 'update.zzz'; known in update are learning_rate, clip_norm, clip_epsilon, credit, temperature",
        ),
        ("qqqqqq=1", "unknown key 'qqqqqq'; known are seed, verbose, note, data, update"),
        ("update.clip_epsilon=1.2", "`update.clip_epsilon` must lie in (0, 1), got 1.2"),
        ("seed=-1", "`seed` must not be below 0 with `update.credit` trajectory, got -1"),
        ("data.span=[3, 2]", "`data.span` must not end before it begins, got 3 to 2.0"),
        ("update.clip_norm=0", "`update.clip_norm` must be above 0, got 0"),
        ("update.learning_rate=.inf", "`update.learning_rate` must be finite, got inf"),
        ("data.sources=[{path: a, share: .inf}]", "`data.sources[0].share` must be above 0 and finite, got inf"),
    ],
)
def test_one_fault_one_line(override: str, message: str) -> None:
    assert faults_of(Whole, overrides=[override]) == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: true", ":1: `seed` must be a whole number, got True"),
        ("verbose: 1", ":1: `verbose` must be true or false, got 1"),
        ("\nseed: 1e4", ":2: `seed` must be a whole number, got 10000.0; write 10000"),
        ("data:\n  article: 1984", ":2: `data.article` must be text, got 1984; put it in quotes"),
        ("data:\n  layers:\n  - 1\n  - x", ":2: `data.layers[1]` must be a whole number, got 'x'"),
        ('data: {article: "a\\0b"}', ":1: `data.article` must be text, got 'a\\x00b'; it has a NUL character"),
        ("data: 3", ":1: `data` must be a section with keys such as `article`, got 3"),
        ("- 1", ":1: a configuration must be a section with keys, got [1]"),
        ("data.article: x", ":1: unknown key 'data.article'; in a file, nest it: 'data:' and the rest below"),
        ("seed: 1\nseed: 2", ":2: the key 'seed' is given twice, first in line 1; keep one"),
        ("data:\n  article: a\n  article: b", ":3: the key 'data.article' is given twice, first in line 2; keep one"),
        ("? [a]\n: 1", ":1: a key must be a word, not a list or a mapping"),
        ("seed: &a 1", ":1: not valid YAML: anchors and aliases are not allowed; write the value out"),
        ("seed: *a", ":1: not valid YAML: anchors and aliases are not allowed; write the value out"),
        (
            "seed: !!python/name:os.system 1",
            ":1: not valid YAML: the tag 'tag:yaml.org,2002:python/name:os.system' is not",
        ),
        ("seed: " + "[" * 50, ":1: not valid YAML: nested deeper than 8 levels"),
        ("seed: [1", ":1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 1", ":2: not valid YAML: but found another document"),
    ],
)
def test_faults_of_a_file_name_it_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path / "my.yaml", text)
    (fault,) = faults_of(Whole, file=file)
    assert fault.startswith(f"{file}{message}")


def test_all_faults_of_all_layers_come_together(tmp_path: Path) -> None:
    preset = written(tmp_path / "p.yaml", "sed: 1\nverbose: 7\nverbose: true\n")
    file = written(tmp_path / "f.yaml", "seed: -3\nupdate:\n  learning_rate: fast\n  clip_epsilon: 2\n")
    assert faults_of(Whole, preset=preset, file=file, overrides=["data.spam=1", "update.credit=x"]) == (
        f"{preset}:3: the key 'verbose' is given twice, first in line 2; keep one",
        f"{preset}:1: unknown key 'sed' (did you mean 'seed'?)",
        f"{preset}:2: `verbose` must be true or false, got 7",
        f"{file}:3: `update.learning_rate` must be a number, got 'fast'",
        f"{file}:4: `update.clip_epsilon` must lie in (0, 1), got 2",
        "unknown key 'data.spam' (did you mean 'data.span'?)",
        "`update.credit` must be one of trajectory, step, got 'x'",
        # What Whole says of `seed` names `update.credit`, whose value is unknown, and so waits for it.
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: \xff", "is not UTF-8 text (byte 6); save it as UTF-8"),
        (b"#" * (MAX_BYTES + 1), "it is larger than 64 KiB, and a configuration is a short file"),
        (b"seed: \x00", "not valid YAML: "),
    ],
)
def test_unreadable_content(tmp_path: Path, content: bytes, message: str) -> None:
    (fault,) = faults_of(Whole, file=written(tmp_path / "f.yaml", content))
    assert message in fault
    assert str(tmp_path / "f.yaml") in fault


def test_unreadable_places(tmp_path: Path) -> None:
    assert faults_of(Whole, file=tmp_path) == (f"configuration {str(tmp_path)!r} cannot be read: Is a directory",)
    (fault,) = faults_of(Whole, file=Path("absent.yaml"))
    assert fault == "configuration 'absent.yaml' cannot be read: No such file or directory"
    assert len(faults_of(Whole, file=Path("nul\0"), preset=Path("a" * 300))) == 2


def test_from_dict_is_the_inverse_of_to_dict_and_as_strict() -> None:
    config = Whole(
        seed=3, data=Data(article="1e5", sources=(Source(path="x", share=2.0),)), update=Update(temperature=0.5)
    )
    assert from_dict(Whole, to_dict(config)) == config
    with pytest.raises(ConfigError) as caught:
        from_dict(Whole, {"seed": "3", "update": {"clip_epsilon": 7}, "x": 1})
    assert caught.value.faults == (
        "`seed` must be a whole number, got '3'",
        "`update.clip_epsilon` must lie in (0, 1), got 7",
        "unknown key 'x'; known are seed, verbose, note, data, update",
    )


def test_what_was_refused_is_not_held_against_the_rest() -> None:
    # With `data.span` unknown nothing can be said of its order; that of the default is right anyway.
    assert faults_of(Whole, overrides=["data.span=[5, x]", "seed=-1", "update.credit=x"]) == (
        "`data.span[1]` must be a number, got 'x'",
        "`update.credit` must be one of trajectory, step, got 'x'",
    )


@pytest.mark.parametrize("override", ["update.clip_norm=.inf", "update.clip_norm=1e-300", "update.clip_epsilon=0.999"])
def test_the_edge_of_a_range_is_in_it(override: str) -> None:
    load_config(Whole, overrides=[override])


def test_a_renamed_key_is_read_everywhere_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path / "old.yaml", "seed: 1\nloud: true\nupdate: {clip: 0.3}\n")
    wanted = Whole(seed=1, verbose=True, update=Update(learning_rate=0.5, clip_epsilon=0.3))
    assert load_config(Whole, file=file) == wanted
    assert [record.getMessage() for record in caplog.records] == [
        "`update.clip` is now called `update.clip_epsilon`; the old name still works",
        "`loud` is now called `verbose`; the old name still works",
    ]
    assert load_config(Whole, overrides=["update.clip=0.3", "seed=1", "loud=true"]) == wanted
    caplog.clear()
    assert from_dict(Whole, {"seed": 1, "loud": True, "update": {"clip": 0.3}}) == wanted
    assert not caplog.records, "a finished run needs no advice"
    assert caplog.handler.level <= logging.WARNING


def test_a_fault_of_a_renamed_key_has_its_line_and_two_names_are_one_too_many(tmp_path: Path) -> None:
    file = written(tmp_path / "old.yaml", "update:\n  clip_epsilon: 0.1\n  clip: 7\n")
    assert faults_of(Whole, file=file) == (
        f"{file}:3: `update.clip` is now called `update.clip_epsilon`, and both are given; keep `update.clip_epsilon`",
        f"{file}:3: `update.clip_epsilon` must lie in (0, 1), got 7",
    )


def test_a_model_made_in_python_is_frozen_and_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Whole().seed = 1  # type: ignore[misc]
    for wrong in (
        {"seed": True},
        {"seed": 1.0},
        {"verbose": "yes"},
        {"clip": 1},
        {"update": {"clip_norm": float("nan")}},
    ):
        with pytest.raises(ValidationError):
            Whole(**wrong)


# ---- writing ----


def test_dump_carries_the_help_and_reads_like_this() -> None:
    config = Whole(data=Data(article='a "b": c\n', sources=(Source(path="x"),), weights={"a b": 1e-7}))
    assert dump_yaml(config) == (
        "seed: 0  # Seed of every random stream.\n"
        "verbose: false  # Say more.\n"
        "note: null  # Anything.\n"
        "data:  # What is read.\n"
        '  article: "a \\"b\\": c\\n"  # Title, URL or file.\n'
        "  layers: [1, 2]  # Layers.\n"
        "  span: [0, 1.0]  # From, to.\n"
        "  weights: {a b: 1.0e-07}  # Weight of each source.\n"
        "  sources:  # The mixture.\n"
        "    - {path: x, share: 1.0}\n"
        "update:\n"
        "  learning_rate: 0.5  # Adam's step size: 1 # of these per update.\n"
        "  clip_norm: 1.0  # Gradient norm; .inf clips nothing. Above 0.\n"
        "  clip_epsilon: 0.2  # Clip range. In (0, 1).\n"
        "  credit: trajectory  # What a step is credited with. One of trajectory, step.\n"
        "  temperature: calibrated  # Softmax temperature.\n"
    )


_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30) | st.sampled_from(
    ["", "null", "true", "1e-5", "no", "# x", "- a", "a: b", "\u2028", "\x85", "\ufeff", "😀", "\x7f", "'", '"', "\\"]
)
_float = st.floats(allow_nan=False, allow_infinity=False)
_configs = st.builds(
    Whole,
    seed=st.integers(min_value=0),
    verbose=st.booleans(),
    note=st.none() | _text.filter(bool),
    data=st.builds(
        Data,
        article=_text,
        layers=st.lists(st.integers()).map(tuple),
        span=st.tuples(st.just(-10), st.floats(0, allow_infinity=False)),
        weights=st.dictionaries(_text, _float, max_size=3),
        sources=st.lists(
            st.builds(Source, path=_text, share=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False)),
            max_size=3,
        ).map(tuple),
    ),
    update=st.builds(
        Update,
        learning_rate=_float,
        clip_norm=st.sampled_from([0.5, float("inf")]),
        credit=st.sampled_from(["trajectory", "step"]),
    ),
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(config=_configs)
def test_what_is_written_reads_back_exactly(tmp_path_factory: pytest.TempPathFactory, config: Whole) -> None:
    file = written(tmp_path_factory.getbasetemp() / "round.yaml", dump_yaml(config))
    back = load_config(Whole, file=file)
    assert back == config
    assert repr(back) == repr(config)  # 0.0 and -0.0, 1 and 1.0 are told apart here


def test_to_dict_is_plain() -> None:
    plain = to_dict(Whole(data=Data(sources=(Source(path="x"),))))
    assert plain["data"]["layers"] == [1, 2]
    assert plain["data"]["sources"] == [{"path": "x", "share": 1.0}]
    assert list(plain) == ["seed", "verbose", "note", "data", "update"]


def test_schema_lists_every_key_with_its_help() -> None:
    assert list(schema(Whole)) == [
        *("seed", "verbose", "note"),
        *(f"data.{key}" for key in ("article", "layers", "span", "weights", "sources")),
        *(f"update.{key}" for key in ("learning_rate", "clip_norm", "clip_epsilon", "credit", "temperature")),
    ]
    assert schema(Whole)["data.article"].annotation is str
    assert schema(Whole)["data.article"].description == "Title, URL or file."


# ---- hostile input ----


def test_a_thousand_mangled_configurations_end_in_a_config_error_or_a_config(tmp_path: Path) -> None:
    chance = random.Random(7)
    good = dump_yaml(Whole(data=Data(article="x", sources=(Source(path="x"), Source(path="y")), weights={"a": 1.0})))
    pieces = [
        "\0",
        "\t",
        "&a ",
        "*a",
        "!!int ",
        "? ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ":",
        "\n",
        "'",
        '"',
        "#",
        "|",
        ">",
        "%",
        "@",
    ]
    pieces += ["\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "1" * 5000, "1e999", "<<: ", "---", "..."]
    refused = 0
    for _ in range(1000):
        text = list(good)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(text))
            text[place : place + chance.randrange(0, 8)] = chance.choice(pieces)
        content = "".join(text).encode()
        if chance.random() < 0.1:
            content = content[: chance.randrange(len(content))] + bytes(chance.randrange(256) for _ in range(5))
        file = written(tmp_path / "f.yaml", content)
        began = time.process_time()
        try:
            load_config(Whole, file=file)
            error = None
        except ConfigError as caught:
            error = caught
        if error is not None:
            refused += 1
            assert error.faults
            assert all(fault.isprintable() for fault in error.faults)
        assert time.process_time() - began < 5
    assert refused > 500  # the mangling does reach the reader


def test_the_largest_file_is_read_in_seconds(tmp_path: Path) -> None:
    file = written(tmp_path / "f.yaml", "data: {layers: [" + "1," * (MAX_BYTES // 2 - 20) + "]}")
    began = time.process_time()
    assert len(load_config(Whole, file=file).data.layers) == MAX_BYTES // 2 - 20
    assert time.process_time() - began < 5
