"""Configurations: frozen pydantic models on one side, YAML files and ``a.b=value`` overrides on the other.

A configuration derives from :class:`Options`; its fields are values or, one level down, sections (Options again), and
every field has a default. It is layered: the defaults in the code, then a preset, then a file, then overrides; the
later layer wins key by key. Reading is strict, and every fault of all layers is reported in one
:class:`~preceptor.errors.ConfigError`.

>>> from pydantic import Field
>>> class Optimizer(Options):
...     learning_rate: float = Field(1e-4, ge=0, description="Step size of Adam.")
...     beta2: float = Field(0.99, ge=0, lt=1, description="Decay of Adam's second moment.")
>>> print(dump_yaml(Optimizer()), end="")
learning_rate: 0.0001  # Step size of Adam. At least 0.
beta2: 0.99  # Decay of Adam's second moment. In [0, 1).
>>> load_config(Optimizer, overrides=["learning_rate=-1", "beta3=0.9"])
Traceback (most recent call last):
preceptor.errors.ConfigError: `learning_rate` must be at least 0, got -1; unknown key 'beta3' (did you mean 'beta2'?)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo

from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.strict_yaml import read_yaml, write_yaml

# No configuration comes near it; a data file given by mistake does.
MAX_BYTES = 64 * 1024

_BROKEN_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL ends a path early; half a surrogate pair has no UTF-8
_logger = logging.getLogger(__name__)


class Options(BaseModel):
    """Base of every configuration and section: frozen, without unknown keys, NaN, or conversions such as "yes" to True.

    ``renamed`` maps dotted keys of the past, which are still read, to those of today.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}

    def conflicts(self) -> Iterator[str]:
        """Why these values do not go together, a line each, with the fields in backquotes.

        They are reported together with all other faults: pydantic's own model validators would wait until every field
        is right. Nothing is said of a field that was itself refused.
        """
        return iter(())

    # Before pydantic's own checks, and on the elements of lists as well.
    @field_validator("*", mode="before")
    @classmethod
    def _refuse_broken_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and _BROKEN_TEXT.search(text):
                raise ValueError("text has a NUL character or half a surrogate pair")
        return value


Config = TypeVar("Config", bound=Options)


@cache
def schema(cls: type[Options]) -> dict[str, FieldInfo]:
    """Every key of ``cls`` by its dotted name, in the order of the fields; a section appears as its keys only."""
    keys: dict[str, FieldInfo] = {}
    for name, field in cls.model_fields.items():
        # Sections are flattened into dotted names, which is how overrides and messages speak of keys.
        if (section := _options_class(field.annotation)) is not None:
            keys |= {f"{name}.{key}": inner for key, inner in schema(section).items()}
        else:
            keys[name] = field
    return keys


def load_config(
    cls: type[Config], *, preset: Path | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of class ``cls``: its defaults, then ``preset``, ``file`` and ``overrides`` (``"a.b=value"``).

    Raises ConfigError with every fault of every layer and every conflict between values. A renamed key is accepted and
    logged.
    """
    reader = _Reader(cls)
    for path in (preset, file):
        if path is not None:
            reader.add_file(path)
    for text in overrides:
        reader.add_override(text)
    # Validated once more as a whole: single layers were checked without what lies below them.
    return cls.model_validate(reader.checked())


def from_dict(cls: type[Config], given: Mapping[str, Any]) -> Config:
    """The configuration whose :func:`to_dict` is ``given``, checked as strictly as a file; old keys are renamed."""
    reader = _Reader(cls)
    reader.add(dict(given), announce=False)
    return cls.model_validate(reader.checked())


def to_dict(config: Options) -> dict[str, Any]:
    """``config`` as nested plain values fit for YAML and JSON: tuples become lists."""
    return {name: _plain(value) for name, value in config}


def dump_yaml(config: Options) -> str:
    """``config`` as YAML, each key with its help and bounds as a comment; :func:`load_config` reads the values back."""
    return "".join(f"{line}\n" for line in _lines(config, indent=""))


# ---- reading ----


class _Reader:
    """Puts layers on top of the defaults of ``cls``; what does not fit is left out and goes to ``faults``."""

    def __init__(self, cls: type[Options]) -> None:
        self.cls = cls
        # The defaults are the lowest layer, as plain values like those of a file.
        self.values: dict[str, Any] = _with_tuples(to_dict(cls()))
        self.faults: list[str] = []
        self.refused: set[str] = set()

    def add_file(self, path: Path) -> None:
        """Puts the YAML file at ``path`` on top."""
        try:
            with path.open("rb") as stream:
                # One byte more than allowed is enough to know that a file is too long.
                content = stream.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB, and a configuration is a short file")
            document = read_yaml(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.faults.append(f"configuration {path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
        except (OSError, ValueError) as error:  # ValueError: too large, or a NUL character in the path
            reason = getattr(error, "strerror", None) or error
            self.faults.append(f"configuration {str(path)!r} cannot be read: {reason}")
        else:
            self.faults += [f"{path}:{problem}" for problem in document.problems]
            self.add({} if document.value is None else document.value, file=path, lines=document.lines)

    def add_override(self, text: str) -> None:
        """Puts one ``a.b=value`` on top."""
        key, equals, value = text.partition("=")
        keys = schema(self.cls)
        # A key of the past is typed like the one it became, and renamed by `add`.
        today = self.cls.renamed.get(key, key)
        if not equals:
            self.faults.append(f"override {short_repr(text)} has no '='; write it as key=value")
        elif today in keys:
            # a.b.c=x becomes {a: {b: {c: x}}}, a layer like that of a file.
            layer = _typed(keys[today].annotation, value)
            for name in reversed(key.split(".")):
                layer = {name: layer}
            self.add(layer)
        elif inside := [name for name in keys if name.startswith(f"{key}.")]:
            self.faults.append(f"`{key}` is a section; set one of its keys, such as `{inside[0]}`")
        else:
            self.faults.append(_unknown_key(key, list(keys)))

    def add(
        self, given: Any, *, file: Path | None = None, lines: Mapping[str, int] | None = None, announce: bool = True
    ) -> None:
        """Puts the values in ``given`` on top, but for what does not fit; ``announce`` tells of renamed keys."""
        lines = dict(lines or {})
        found: dict[str, str] = {}  # the first fault of each key

        # pydantic names places, the file has lines; this leads from one to the other.
        def line(key: str) -> int:
            while key and key not in lines:  # an element of a list is found under the key that holds the list
                key = key[: max(key.rfind("."), key.rfind("["), 0)]
            return lines.get(key, 1)

        if isinstance(given, dict):
            # An empty section, `data:`, is null in YAML.
            empty = {key for key, value in given.items() if value is None and _is_section(self.cls, key)}
            layer = {key: {} if key in empty else _with_tuples(value) for key, value in given.items()}
        else:
            layer, found[""] = {}, f"a configuration must be a section with keys, got {short_repr(given)}"
        # Renamed keys first, so that nothing below meets an old name.
        for old, new in self.cls.renamed.items():
            if (value := _taken(layer, old.split("."))) is not _ABSENT:
                lines[new] = lines.get(old, 1)
                if _taken(layer, new.split(".")) is not _ABSENT:
                    # Both names given: the old one's value is put in place and the fault says which to keep.
                    found[old] = f"`{old}` is now called `{new}`, and both are given; keep `{new}`"
                _put(layer, new.split("."), value)
                if announce:
                    _logger.warning("`%s` is now called `%s`; the old name still works", old, new)
        # Validated alone, for its faults; what is faulty is taken out, so that the layers still combine and their
        # conflicts are found in the same run of the program.
        try:
            self.cls.model_validate(layer)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                key, path, message = _described(self.cls, problem)
                found.setdefault(key, message)  # each member of a union has a problem of its own
                _taken(layer, path)
        self.refused |= found.keys()
        # In the order of the file, which is how a reader will mend them.
        for key in sorted(found, key=line):
            self.faults.append(found[key] if file is None else f"{file}:{line(key)}: {found[key]}")
        self.values = _merged(self.cls, self.values, layer)

    def checked(self) -> dict[str, Any]:
        """The values of all layers; raises ConfigError with all faults, conflicts between the values among them."""
        # Conflicts between values that were accepted; a field that was refused has its own fault already.
        for conflict in _conflicts(self.cls.model_validate(self.values)):
            named = re.findall(r"`([^`]+)`", conflict)
            if not any(f"{key}[".startswith((f"{name}[", f"{name}.")) for name in named for key in self.refused):
                self.faults.append(conflict)
        if self.faults:
            raise ConfigError(*self.faults)
        return self.values


def _conflicts(config: Options, prefix: str = "") -> Iterator[str]:
    """Every conflict in ``config`` and its sections; ``prefix`` goes before the names of their fields."""

    def qualified(match: re.Match[str]) -> str:
        is_field = re.split(r"[.\[]", match[1])[0] in type(config).model_fields
        return f"`{prefix}{match[1]}`" if is_field else match[0]

    for name, value in config:
        members = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for key, item in members.items():
            if isinstance(item, Options):
                yield from _conflicts(item, f"{prefix}{key}.")
    for message in config.conflicts():
        yield re.sub(r"`([^`]+)`", qualified, message)


def _typed(wanted: Any, text: str) -> Any:
    """What ``text`` typed on the command line means: it has no quotes of its own, so the field's type decides."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    # "none" on a command line means no value, unless the field takes text only.
    if NoneType in kinds and text in ("", "null", "none"):
        return None
    # Text stays as typed: "1e5" and "true" are titles where the field is text.
    if str in kinds or any(text in get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        return text
    document = read_yaml(text)
    return text if document.problems or document.value is None else document.value


# ---- faults in words ----


def _described(cls: type[Options], problem: Mapping[str, Any]) -> tuple[str, Sequence[Any], str]:
    """Pydantic's ``problem`` with a value: its key, the path in a layer to what must go, and one line about it."""
    field, key, path = FieldInfo(annotation=cls), "", []
    for part in problem["loc"]:
        arguments = get_args(field.annotation)
        if (options := _options_class(field.annotation)) is not None:
            prefix = f"{key}." if key else ""
            key = f"{prefix}{part}"
            # A list is replaced whole, so the path into a layer ends at the key that holds it.
            if "[" not in prefix:
                path.append(part)
            if part not in options.model_fields:
                return key, path, _unknown_key(key, [*(prefix + name for name in schema(options)), *schema(cls)])
            field = options.model_fields[part]
        elif get_origin(field.annotation) is tuple:
            element = arguments[0] if arguments[-1] is Ellipsis else arguments[part]
            field, key = FieldInfo.from_annotation(element), f"{key}[{part}]"
        elif get_origin(field.annotation) is dict:
            field, key = FieldInfo.from_annotation(arguments[1]), f"{key}[{part!r}]"
    return key, path, _refusal(key, field, problem["type"], problem["input"])


def _refusal(key: str, field: FieldInfo, kind: str, given: Any) -> str:
    """Why the value ``given`` of ``key`` is refused; ``kind`` is pydantic's type of error."""
    if kind == "missing":
        return f"`{key}` is required; give it a value"
    demand = allowed = _allowed(field.annotation)
    # The message says what would be right and not only what is wrong.
    if kind == "finite_number":
        demand = " and ".join(filter(None, (_bounds(field), "finite")))
    elif kind.startswith(("greater_than", "less_than")):
        demand = _bounds(field)
    remedy = ""
    if kind == "value_error":  # of `_refuse_broken_text`
        remedy = "; it has a NUL character or half a surrogate pair"
    elif get_origin(field.annotation) is Literal:
        remedy = did_you_mean(str(given)[:100], map(str, get_args(field.annotation)))
    elif allowed == "text" and isinstance(given, (bool, int, float)):
        remedy = "; put it in quotes"
    elif allowed == "a whole number" and isinstance(given, float) and given.is_integer():
        remedy = f"; write {short_repr(int(given))}"
    verb = "lie" if demand.startswith("in ") else "be"
    return f"`{key}` must {verb} {demand}, got {short_repr(given)}{remedy}"


def _allowed(wanted: Any) -> str:
    """The values that the type ``wanted`` allows, in words."""
    if get_origin(wanted) in (Union, UnionType):
        return " or ".join(map(_allowed, get_args(wanted)))
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, get_args(wanted)))}"
    if (options := _options_class(wanted)) is not None:
        return f"a section with keys such as `{next(iter(schema(options)))}`"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    lists = {tuple: "a list such as [a, b]", dict: "a mapping such as {a: 1}"}
    return words.get(wanted) or lists.get(get_origin(wanted), "of another type")


def _bounds(field: FieldInfo) -> str:
    """The bounds of a number in words: "at least 0", "above 0", "in [0, 1)", or "" where there are none."""
    limits = {name: getattr(m, name) for m in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    if not limits.keys() & {"le", "lt"}:
        return f"at least {limits['ge']}" if "ge" in limits else f"above {limits['gt']}" if "gt" in limits else ""
    low = f"[{limits['ge']}" if "ge" in limits else f"({limits.get('gt', '-inf')}"
    return f"in {low}, {limits['le']}]" if "le" in limits else f"in {low}, {limits['lt']})"


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """The fault for a ``key`` that is not among the ``known`` dotted keys, with the nearest that is."""
    # Dotted in a file: YAML takes it for one word.
    if key in known:
        return f"unknown key {short_repr(key)}; in a file, nest it: '{key.partition('.')[0]}:' and the rest below"
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


# ---- nested values ----

_ABSENT: Any = object()


def _options_class(kind: Any) -> type[Options] | None:
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def _is_section(cls: type[Options], key: Any) -> bool:
    return key in cls.model_fields and _options_class(cls.model_fields[key].annotation) is not None


def _with_tuples(value: Any) -> Any:
    """A copy of plain values in which every list is a tuple, as in the fields of a frozen model."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, (list, tuple)) else value


def _taken(values: Any, path: Sequence[Any]) -> Any:
    """What stands at ``path`` in nested ``values``, taken out of them."""
    for name in path[:-1]:
        # A path that leaves the mapping is absent and no error.
        values = values.get(name) if isinstance(values, dict) else None
    return values.pop(path[-1], _ABSENT) if isinstance(values, dict) else _ABSENT


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _merged(cls: type[Options], below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` on top of ``below``, key by key; a list or a mapping that is a value is replaced whole."""
    # `|` would replace a whole section by its few given keys, so sections are merged below.
    values = below | above
    for key in above:
        if (section := _options_class(cls.model_fields[key].annotation)) is not None:
            values[key] = _merged(section, below[key], above[key])
    return values


# ---- writing ----


def _plain(value: Any) -> Any:
    if isinstance(value, Options):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _lines(config: Options, *, indent: str) -> Iterator[str]:
    for name, value in config:
        field = type(config).model_fields[name]
        if isinstance(value, Options):
            yield f"{indent}{name}:{_comment(value.__doc__)}"
            yield from _lines(value, indent=f"{indent}  ")
        elif isinstance(value, tuple) and any(isinstance(item, Options) for item in value):
            yield f"{indent}{name}:{_comment(field.description)}"
            yield from (f"{indent}  - {write_yaml(_plain(item))}" for item in value)
        else:
            choices = _allowed(field.annotation) if get_origin(field.annotation) is Literal else ""
            allowed = _bounds(field) or choices
            bounds = f"{allowed[0].upper()}{allowed[1:]}." if allowed else ""
            yield f"{indent}{name}: {write_yaml(_plain(value))}{_comment(field.description, bounds)}"


def _comment(*sentences: str | None) -> str:
    text = " ".join(" ".join(filter(None, sentences)).replace("``", "`").split())
    return f"  # {text}" if text else ""


def is_service_url(url: str) -> bool:
    """Whether ``url`` is the http(s) address of a service, without a user's name, which would be a secret in a file."""
    try:
        parts = urlsplit(url)
        return bool(
            parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
        )
    except ValueError:  # a port that is no number, a broken IPv6 address
        return False
