"""Plain values (mappings, lists, text, numbers, truth values, null) as YAML text, read strictly and written exactly.

Bare words mean what YAML 1.2 says, not what PyYAML makes of them: ``1e-5`` is a number; ``no``, ``1:30`` and
``2024-01-01`` are text. Anchors, aliases and tags are refused, so a text is never larger than it looks and never names
a Python object.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError

from preceptor.errors import short_repr

MAX_DEPTH = 8

_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NOT_A_NUMBER = re.compile(r"\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")


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
        node = _Loader(text).get_single_node()
        return document._replace(value=_value(node, "", document))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        return Document(None, {}, [f"{mark.line + 1 if mark else 1}: not valid YAML: {problem}"])


def number(text: str) -> float | None:
    """The number that ``text`` spells in YAML, or None; never NaN."""
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _NUMBER.fullmatch(text) else None


def write_flow(value: Any) -> str:
    """``value`` in one line of YAML; :func:`read_yaml` gives the same value and types back.

    >>> write_flow({"rate": 1e-05, "title": "no: 1", "layers": [1, None]})
    '{rate: 1e-05, title: "no: 1", layers: [1, null]}'
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{write_flow(key)}: {write_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(write_flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    if not isinstance(value, str):
        return repr(value)
    if _NEEDS_NO_QUOTES.fullmatch(value) and value not in _WORDS:
        return value
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character in "\n\t":
        return "\\n" if character == "\n" else "\\t"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


class _Loader(yaml.SafeLoader):
    """PyYAML's composer without anchors, aliases and tags, and with a limit on nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not allowed; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {short_repr(event.tag)} is not allowed; leave it out"
        elif self.depth == MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value(node: Any, path: str, document: Document) -> Any:
    """The plain value of a composed ``node``; notes lines and problems of its keys in ``document``."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}[{index}]", document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        return node.value if quoted else _bare_word(node.value)
    if node is None:
        return None
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        inner = f"{path}.{key}" if path else key
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{line}: a key must be a word, not a list or a mapping")
        elif key in found:
            first = document.lines[inner]
            document.problems.append(
                f"{line}: the key {short_repr(inner)} is given twice, first in line {first}; keep one"
            )
        else:
            document.lines[inner] = line
            found[key] = _value(value_node, inner, document)
    return found


def _bare_word(text: str) -> Any:
    """What an unquoted word means: null, a truth value, a number, or text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NOT_A_NUMBER.fullmatch(text):
        return float("nan")
    numeric = number(text)
    return text if numeric is None else numeric
