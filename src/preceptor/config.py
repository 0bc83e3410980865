"""Configurations: frozen dataclasses on one side, YAML files and ``a.b=value`` overrides on the other.

A configuration is a frozen dataclass whose fields are values or, one level down, sections (dataclasses again). It is
layered: the defaults in the code, then a preset, then a file, then overrides; the later layer wins field by field.
Reading is strict, and every fault of all layers is reported in one :class:`~preceptor.errors.ConfigError`. A class may
say what types and ranges cannot, such as how its fields relate, by a method ``faults(self) -> list[str]`` with messages
that put the fields in backquotes: "`prompt_tokens` must be at most `context_length` 128, got 200".
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.interval import Interval
from preceptor.plain_yaml import number, read_yaml, write_flow

Config = TypeVar("Config")
Value = TypeVar("Value")

MAX_BYTES = 64 * 1024

_BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL ends a path early; half a surrogate pair has no UTF-8
_REFUSED: Any = object()  # stands for a value that was reported as a fault


class Setting(NamedTuple):
    """What is known of one key of a configuration class: its type and its line of help."""

    type: Any
    help: str


def option(default: Value, text: str, *, within: str = "", hint: str = "") -> Value:
    r"""A dataclass field with its ``default`` and one line of help, ``text``, that says meaning and unit.

    ``within`` is the :class:`Interval` of its number, or of each of its numbers; ``hint`` says why, or what is special
    about a bound, to whoever leaves it.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Optimiser:
    ...     learning_rate: float = option(1e-4, "Adam step size (dimensionless)", within="[0, inf)")
    ...     beta2: float = option(0.99, "decay of the second moment", within="[0, 1)")
    >>> print(dump_yaml(Optimiser()), end="")
    learning_rate: 0.0001  # Adam step size (dimensionless)
    beta2: 0.99  # decay of the second moment, in [0, 1)
    >>> print(*config_faults(Optimiser(learning_rate=-1, beta2=1)), sep="\n")
    `learning_rate` must be at least 0, got -1
    `beta2` must lie in [0, 1), got 1
    """
    metadata: dict[str, Any] = {"help": text}
    if within:
        interval = Interval(within)
        if outside := [number for number in _numbers(default) if number not in interval]:
            raise ValueError(f"the default {outside[0]} of the option {text!r} does not lie in {within}")
        metadata = {"help": text if "inf" in within else f"{text}, in {within}", "within": interval, "hint": hint}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def schema(cls: type) -> dict[str, Setting]:
    """Every key of ``cls`` by its dotted name, in the order of the fields; a section appears as its keys only."""
    settings: dict[str, Setting] = {}
    for field, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            settings |= {f"{field.name}.{key}": setting for key, setting in schema(cast(type, kind)).items()}
        else:
            settings[field.name] = Setting(kind, field.metadata.get("help", ""))
    return settings


def load_config(
    cls: type[Config], *, preset: Path | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of class ``cls``: its defaults, then ``preset``, ``file`` and ``overrides`` (``"a.b=value"``).

    Raises ConfigError with every fault of every layer and of the whole, as :func:`config_faults` finds them.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    for path in (preset, file):
        if path is not None:
            values |= _read_file(cls, path, faults)
    for text in overrides:
        values |= _read_override(cls, text, faults)
    return _finished(cls, values, faults)


def from_dict(cls: type[Config], given: Mapping[str, Any]) -> Config:
    """The configuration whose :func:`to_dict` is ``given``, checked as strictly as a file."""
    faults: list[str] = []
    return _finished(cls, _Reader(cls, faults).section(cls, dict(given), ""), faults)


def to_dict(config: Any) -> dict[str, Any]:
    """``config`` as nested plain values fit for YAML and JSON: paths become text, tuples lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def dump_yaml(config: Any) -> str:
    """``config`` as YAML, each key with its help as a comment; :func:`load_config` reads the same values back."""
    return "".join(f"{line}\n" for line in _lines(config, indent=""))


def differences(old: Any, new: Any) -> list[str]:
    """The dotted keys whose values differ between two configurations, in the order of the fields."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [key for key in before | after if key not in before or key not in after or before[key] != after[key]]


# ---- reading layers ----


def _read_file(cls: type, path: Path, faults: list[str]) -> dict[str, Any]:
    """The values that the YAML file at ``path`` gives, by dotted key."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB, and a configuration is a short file")
        document = read_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        faults.append(f"configuration {path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except (OSError, ValueError) as error:  # ValueError: too large, or a NUL character in the path
        faults.append(f"configuration {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}")
    else:
        faults += [f"{path}:{problem}" for problem in document.problems]
        given = {} if document.value is None else document.value
        return _Reader(cls, faults, file=path, lines=document.lines).section(cls, given, "")
    return {}


def _read_override(cls: type, text: str, faults: list[str]) -> dict[str, Any]:
    """The value that one ``a.b=value`` gives, by dotted key."""
    key, equals, value = text.partition("=")
    settings = schema(cls)
    if not equals:
        faults.append(f"override {short_repr(text)} has no '='; write it as key=value")
    elif key in settings:
        return {key: _Reader(cls, faults).value(settings[key].type, _Typed(value), key)}
    elif inside := [name for name in settings if name.startswith(f"{key}.")]:
        faults.append(f"`{key}` is a section; set one of its keys, such as `{inside[0]}`")
    else:
        faults.append(_unknown_key(key, list(settings)))
    return {}


class _Typed(str):
    """Text typed on the command line: it has no quotes of its own, so the field's type decides what it means."""


class _Reader:
    """Turns plain values into the types of the configuration class ``root``; what does not fit goes to ``faults``."""

    def __init__(
        self, root: type, faults: list[str], *, file: Path | None = None, lines: Mapping[str, int] | None = None
    ) -> None:
        self.root = root
        self.faults = faults
        self.file = file
        self.lines = lines or {}

    def section(self, cls: type, given: Any, prefix: str) -> dict[str, Any]:
        """The values in the mapping ``given``, checked against ``cls``, by dotted key relative to ``cls``."""
        if not isinstance(given, dict):
            name = f"`{prefix[:-1]}`" if prefix else "a configuration"
            self._refuse(prefix[:-1], f"{name} must be a section with keys, got {short_repr(given)}")
            return {}
        known = {field.name: kind for field, kind in _fields(cls)}
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key not in known:
                keys = [*(prefix + name for name in schema(cls)), *schema(self.root)]
                self._refuse(prefix + key, _unknown_key(prefix + key, keys))
            elif dataclasses.is_dataclass(known[key]):
                inner = self.section(known[key], {} if value is None else value, f"{prefix}{key}.")
                values |= {f"{key}.{name}": item for name, item in inner.items()}
            else:
                values[key] = self.value(known[key], value, prefix + key)
        return values

    def value(self, wanted: Any, given: Any, path: str) -> Any:
        """``given`` as the type ``wanted``, or the mark of a refused value."""
        origin, arguments = get_origin(wanted), get_args(wanted)
        nested = dataclasses.is_dataclass(wanted) or origin in (tuple, list, dict)
        if nested and isinstance(given, _Typed):
            given, _, problems = read_yaml(given)
            if problems:
                return self._refuse(path, f"`{path}` is {problems[0].partition(': ')[2]}")
        if origin in (Union, types.UnionType):
            return self._any_of(wanted, given, path)
        if dataclasses.is_dataclass(wanted) and isinstance(given, dict):
            return self._instance(cast(type, wanted), given, path)
        if origin is dict and isinstance(given, dict):
            pairs = {key: self.value(arguments[1], item, f"{path}[{short_repr(key)}]") for key, item in given.items()}
            return _REFUSED if _REFUSED in pairs.values() else pairs
        if origin in (tuple, list) and isinstance(given, list):
            members = arguments[:1] * len(given) if origin is list or arguments[-1] is Ellipsis else arguments
            if len(members) != len(given):
                return self._refuse(path, f"`{path}` must have {len(members)} elements, got {len(given)}")
            pairs = {index: self.value(members[index], item, f"{path}[{index}]") for index, item in enumerate(given)}
            return _REFUSED if _REFUSED in pairs.values() else origin(pairs.values())
        value = _REFUSED if nested else _scalar(wanted, given)
        if value is _REFUSED:
            self._refuse(path, f"`{path}` must be {_kind(wanted)}, got {short_repr(given)}{_remedy(wanted, given)}")
        return value

    def _any_of(self, wanted: Any, given: Any, path: str) -> Any:
        """``given`` as the first member of the union ``wanted`` that it fits."""
        members = get_args(wanted)
        if type(None) in members and _scalar(type(None), given) is None:
            return None
        members = tuple(member for member in members if member is not type(None))
        attempt = _Reader(self.root, [], file=self.file, lines=self.lines)
        for member in members:
            if (value := attempt.value(member, given, path)) is not _REFUSED:
                return value
        if len(members) == 1:
            self.faults += attempt.faults
            return _REFUSED
        return self._refuse(path, f"`{path}` must be {_kind(wanted)}, got {short_repr(given)}")

    def _instance(self, cls: type, given: dict[str, Any], path: str) -> Any:
        before = len(self.faults)
        values = self.section(cls, given, f"{path}.")
        missing: list[str] = []
        built = _build(cls, {key: value for key, value in values.items() if value is not _REFUSED}, missing)
        for key in missing:
            if key not in values:
                self._refuse(path, f"`{path}.{key}` is required; give it a value")
        return built if len(self.faults) == before else _REFUSED

    def _refuse(self, path: str, message: str) -> Any:
        """Record a fault of the key at ``path``, with its file and line where it has one."""
        key = path
        while key and key not in self.lines:  # an element of a list is found under the key that holds the list
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        place = f"{self.file}:{self.lines.get(key, 1)}: " if self.file is not None else ""
        self.faults.append(place + message)
        return _REFUSED


def _scalar(wanted: Any, given: Any) -> Any:
    """``given`` as the scalar type ``wanted`` (or one of the choices of a Literal), or the mark of a refused value."""
    if get_origin(wanted) is Literal:
        for choice in get_args(wanted):
            if str(choice) == given if isinstance(given, _Typed) else (type(choice), choice) == (type(given), given):
                return choice
        return _REFUSED
    if wanted in (str, Path):
        return wanted(given) if isinstance(given, str) and not _BROKEN_TEXT.search(given) else _REFUSED
    if wanted is type(None):
        empty = given.lower() in ("", "null", "none") if isinstance(given, _Typed) else given is None
        return None if empty else _REFUSED
    if isinstance(given, _Typed):
        given = read_yaml(given).value
    if wanted is float:
        given = number(given) if isinstance(given, str) else given
        acceptable = isinstance(given, (int, float)) and not isinstance(given, bool) and given == given
        return float(given) if acceptable else _REFUSED
    if wanted in (bool, int):
        return given if type(given) is wanted else _REFUSED
    raise TypeError(f"a configuration cannot have a field of type {wanted}")


def _kind(wanted: Any) -> str:
    """The values that the type ``wanted`` allows, in words."""
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_kind(member) for member in get_args(wanted))
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, get_args(wanted)))}"
    nested = "a list such as [a, b]" if get_origin(wanted) in (tuple, list) else "a mapping such as {a: 1}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return {**words, type(None): "null"}.get(wanted, nested)


def _remedy(wanted: Any, given: Any) -> str:
    if get_origin(wanted) is Literal:
        return did_you_mean(str(given)[:100], map(str, get_args(wanted)))
    if wanted in (str, Path) and isinstance(given, (bool, int, float)):
        return "; put it in quotes"
    if wanted in (str, Path) and isinstance(given, str):
        return "; it has a NUL character or half a surrogate pair"
    if wanted is int and isinstance(given, float) and given.is_integer():
        return f"; write {short_repr(int(given))}"
    return ""


def _unknown_key(key: str, known: list[str]) -> str:
    """The fault for a ``key`` that is not among the ``known`` dotted keys, with the nearest that is."""
    if key in known:
        return (
            f"unknown key {short_repr(key)}; in a file, nest it: '{key.partition('.')[0]}:' and the rest indented below"
        )
    section, dot, leaf = key.rpartition(".")
    inside = [name for name in known if name.startswith(section + dot)] or known
    prefix = section + dot if inside is not known else ""
    nearby = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in inside)
    # Only single words are compared: a shared section would make any two dotted keys look alike.
    for names in (
        {word: prefix + word for word in nearby},
        {name.rpartition(".")[2]: name for name in reversed(known)},
    ):
        if matches := get_close_matches(leaf[:100], names, n=1):
            return f"unknown key {short_repr(key)} (did you mean '{names[matches[0]]}'?)"
    return f"unknown key {short_repr(key)}; known{f' in {section}' if prefix else ''} are {', '.join(nearby)}"


# ---- building and checking ----


def _finished(cls: type[Config], values: Mapping[str, Any], faults: list[str]) -> Config:
    """``cls`` with ``values`` over its defaults, or ConfigError with ``faults`` and all that is found besides."""
    refused = {key for key, value in values.items() if value is _REFUSED}
    missing: list[str] = []
    config = _build(cls, {key: value for key, value in values.items() if key not in refused}, missing)
    faults += [f"`{key}` is required; give it a value" for key in missing if key not in refused]
    if config is not None:
        faults += config_faults(config, refused)
    if config is None or faults:
        raise ConfigError(*faults)
    return config


def _fields(cls: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field, hints[field.name]


def _build(cls: type[Config], values: Mapping[str, Any], missing: list[str], base: Any = None) -> Config | None:
    """``cls`` with ``values`` over ``base`` over the defaults; None where required keys are ``missing``."""
    arguments: dict[str, Any] = {}
    before = len(missing)
    for field, kind in _fields(cls):
        default = field.default
        if base is not None:
            default = getattr(base, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(kind):
            inside = f"{field.name}."
            inner = {key.removeprefix(inside): value for key, value in values.items() if key.startswith(inside)}
            lacking: list[str] = []
            default = _build(kind, inner, lacking, None if default is dataclasses.MISSING else default)  # type: ignore[arg-type]
            missing += [inside + key for key in lacking]
        arguments[field.name] = values.get(field.name, default)
        if arguments[field.name] is dataclasses.MISSING:
            missing.append(field.name)
    return cls(**arguments) if len(missing) == before else None


def config_faults(config: Any, refused: Collection[str] = (), prefix: str = "") -> Iterator[str]:
    """Why ``config`` cannot be used: numbers out of range, and what ``faults()`` of its sections and its own finds.

    Nothing is said of ``refused`` keys, which were reported before. ``prefix`` goes before the names of its fields.
    """
    members = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}

    def qualified(match: re.Match[str]) -> str:
        return f"`{prefix}{match[1]}`" if re.split(r"[.\[]", match[1])[0] in members else match[0]

    for name, value in members.items():
        several = isinstance(value, (tuple, list))
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)] if several else [(name, value)]
        for key, item in parts:
            if dataclasses.is_dataclass(item):
                yield from config_faults(item, refused, f"{prefix}{key}.")
    for message in [*_out_of_range(config), *(config.faults() if hasattr(config, "faults") else ())]:
        fault = re.sub(r"`([^`]+)`", qualified, message)
        if not any(key in refused for key in re.findall(r"`([^`]+)`", fault)):
            yield fault


def _out_of_range(config: Any) -> Iterator[str]:
    """Each number of the fields of ``config`` itself that does not lie in its interval."""
    for field in dataclasses.fields(config):
        if interval := field.metadata.get("within"):
            hint = f" ({field.metadata['hint']})" if field.metadata["hint"] else ""
            for number in _numbers(getattr(config, field.name)):
                if number not in interval:
                    yield f"`{field.name}` {interval.demand(number)}{hint}, got {number}"


def _numbers(value: Any) -> Sequence[float]:
    return value if isinstance(value, (tuple, list)) else (value,)


# ---- writing ----


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _lines(config: Any, *, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = " ".join(field.metadata.get("help", "").split())
        comment = f"  # {text}" if text else ""
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:{comment}"
            yield from _lines(value, indent=f"{indent}  ")
        elif isinstance(value, (tuple, list)) and any(dataclasses.is_dataclass(item) for item in value):
            yield f"{indent}{field.name}:{comment}"
            yield from (f"{indent}  - {write_flow(_plain(item))}" for item in value)
        else:
            yield f"{indent}{field.name}: {write_flow(_plain(value))}{comment}"
