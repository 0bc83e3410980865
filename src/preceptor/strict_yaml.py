"""Plain values (mappings, lists, text, numbers, truth values, null) as YAML, read strictly and written exactly.

Bare words mean what YAML 1.2 says, not what PyYAML makes of them: ``1e-5`` is a number; ``no``, ``1:30`` and
``2024-01-01`` are text. Anchors, aliases and tags are refused, so a text is never larger than it looks and never names
a Python object. There is no word for NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError

from preceptor.errors import short_repr

MAX_DEPTH = 8

_TAG = "tag:yaml.org,2002:"
_WORDS = {
    "null": (re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    # Python refuses to read more than 4,300 digits; a hundred are enough for any count.
    "int": (re.compile(r"[-+]?[0-9]{1,100}\Z"), list("-+0123456789")),
    "float": (
        re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF))\Z"),
        list("-+.0123456789"),
    ),
}
"""What an unquoted word can be besides text: its pattern, and the characters with which it can begin."""
_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    # "inf" is accepted for limits that may be switched off; there is no NaN.
    "float": lambda text: float(text.lower().replace(".inf", "inf")),
}


class Document(NamedTuple):
    """What a YAML text holds: its value, the line of each key (``a.b[0].c``) and what is wrong with it."""

    value: Any
    lines: dict[str, int]
    problems: list[str]


def read_yaml(text: str) -> Document:
    r"""The one document in ``text``; ``problems`` are one line each, ``"LINE: what"``.

    Where the text is no YAML at all the value is None and the problem says so.

    >>> read_yaml("rate: 1e-5").value
    {'rate': 1e-05}
    >>> read_yaml("a: 1\na: 2").problems
    ["2: the key 'a' is given twice, first in line 1; keep one"]
    """
    document = Document(None, {}, [])
    try:
        # Composed only, to nodes and not to Python objects: YAML's tags never run.
        return document._replace(value=_value(_Loader(text).get_single_node(), "", document))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # PyYAML's messages have several lines.
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        return Document(None, {}, [f"{mark.line + 1 if mark else 1}: not valid YAML: {problem}"])


def write_yaml(value: Any) -> str:
    """``value`` in one line of YAML; :func:`read_yaml` gives the same value and types back.

    >>> write_yaml({"rate": 1e-05, "title": "no: 1", "layers": [1, None], "text": "1e5"})
    "{rate: 1.0e-05, title: 'no: 1', layers: [1, null], text: '1e5'}"
    """
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    # PyYAML ends a lone scalar with "..." on a line of its own.
    return text.removesuffix("...\n").rstrip("\n")


class _Loader(yaml.SafeLoader):
    """PyYAML's composer without anchors, aliases and tags, and with a limit on nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML adds to it; none of YAML 1.1's are wanted
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not allowed; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {short_repr(event.tag)} is not allowed; leave it out"
        # Nesting is bounded, or a short text of brackets would exhaust the stack.
        elif self.depth == MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes what YAML 1.1 or 1.2 would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # Only in double quotes has every character an escape, line breaks of all kinds among them.
        return self.represent_scalar(f"{_TAG}str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, (_pattern, _first) in _WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _value(node: Any, path: str, document: Document) -> Any:
    """The plain value of a composed ``node``; notes lines and problems of its keys in ``document``."""
    if node is None:
        return None
    if isinstance(node, yaml.SequenceNode):
        # Line and path go along, so that a fault can say where it is.
        return [_value(item, f"{path}[{index}]", document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _VALUES.get(node.tag.removeprefix(_TAG), str)(node.value)
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        inner = f"{path}.{key}" if path else key
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{line}: a key must be a word, not a list or a mapping")
        elif key in found:
            first = document.lines[inner]
            problem = f"{line}: the key {short_repr(inner)} is given twice, first in line {first}; keep one"
            document.problems.append(problem)
        else:
            document.lines[inner] = line
            found[key] = _value(value_node, inner, document)
    return found
