"""The arrows of the design and the habits that a reader relies on, kept by walking the syntax trees of the sources.

Every rule is a function from the modules of a tree to its violations, one line each. The rules are run twice: on the
sources, where they must find nothing, and on a small tree with one planted violation, where they must find exactly it.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "preceptor"

MAX_LINES = 450
# The floor says that the walk really saw the project; raise it when the project grows, never lower it for convenience.
MIN_MODULES = 30

# Imports point to a lower number only. Each package below `systems` is a room of its own.
LEVELS = {
    "errors": 0,
    "strict_yaml": 1,
    "version": 0,
    "config": 2,
    "objectives": 3,
    "lm": 3,
    "data": 3,
    "evaluation": 4,
    "report": 4,
    "runs": 4,
    "systems.base": 5,
    "systems": 6,
    "pretraining": 6,
    "comparison": 7,
    "doctor": 7,
    "environments": 7,
    "mixtures": 7,
    "tuning": 8,
    "result": 8,
    "api": 9,
    "cli": 10,
}
# The mathematics can be taken out and used without the rest.
OBJECTIVES_MAY_IMPORT = {"torch", "jaxtyping", "preceptor.errors", "preceptor.objectives"}
# A distribution whose import name is not its own name with underscores.
IMPORT_NAMES = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
# Modules that derive from an extra's classes, and are themselves imported only by whoever wants them.
EXTENSIONS = {
    "preceptor.environments.gymnasium_envs": "gymnasium",
    "preceptor.systems.bandit.vector_env": "gymnasium",
}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Import:
    """``target`` is the module or package, ``names`` what is taken from it."""

    target: str
    line: int
    at_import_time: bool
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Module:
    """One source file: ``name`` is dotted (``preceptor.lm.decode``), ``where`` is the path shown in a violation."""

    name: str
    where: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        return room_of(self.name)

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of the file; one in a function or under TYPE_CHECKING does not happen at import time."""
        return list(_imports(self.tree.body, at_import_time=True))


def _imports(body: Sequence[ast.AST], *, at_import_time: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names = tuple(alias.name for alias in node.names)
            # `from preceptor import lm` names a room, `from preceptor.lm import load` an object in it.
            targets = [f"{prefix}.{name}" for name in names] if prefix == "preceptor" else [prefix]
            yield from (Import(target, node.lineno, at_import_time, names) for target in targets)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.body, at_import_time=False)
            yield from _imports(node.orelse, at_import_time=at_import_time)
        else:
            deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            children = list(ast.iter_child_nodes(node))
            yield from _imports(children, at_import_time=at_import_time and not deferred)


def room_of(name: str) -> str:
    """``preceptor.systems.reading.train`` lives in ``systems.reading``, ``preceptor.lm.decode`` in ``lm``."""
    parts = name.split(".")[1:]
    if parts[:1] == ["__main__"]:
        return "cli"
    return ".".join(parts[:2]) if parts[:1] == ["systems"] else "".join(parts[:1])


def read_modules(package: Path) -> list[Module]:
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = ("preceptor", *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, str(path.relative_to(package.parent)), path.read_text(encoding="utf-8")))
    return modules


def declared() -> tuple[set[str], set[str]]:
    """Import names of the core dependencies and of the extras that a user installs, from ``pyproject.toml``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: Sequence[str]) -> set[str]:
        distributions = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}

    extras = {
        name
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in ("test", "dev")
        for name in names(requirements)
    }
    return names(project["dependencies"]), extras


Violations = Iterator[str]


def level_of(room: str) -> int | None:
    """A package of its own below `systems` has the level of all of them; `systems.base` is below them."""
    return LEVELS.get(room, LEVELS.get(room.split(".")[0]))


def arrows_point_down(modules: Sequence[Module]) -> Violations:
    for module in modules:
        own = level_of(module.room)
        if module.room and own is None:
            yield f"{module.where}: room '{module.room}' has no level; add it to LEVELS and to the architecture"
            continue
        for found in module.imports:
            room = room_of(found.target)
            theirs = level_of(room)
            if not found.target.startswith("preceptor.") or room in (module.room, "") or theirs is None:
                continue  # another package, the same room, or a name of the package itself such as `__version__`
            # The front door reaches everything, once it is opened: importing the package imports nothing of it.
            if found.at_import_time and theirs > 0 if own is None else theirs >= own:
                importer = module.room or "preceptor"
                yield f"{module.where}:{found.line}: '{importer}' imports '{room}', which is not below it"


def imports_form_no_circle(modules: Sequence[Module]) -> Violations:
    """An import inside a function or under TYPE_CHECKING still ties two files together, so it counts."""
    where = {module.name: module.where for module in modules}
    imported: dict[str, set[str]] = {}
    for module in modules:
        targets = {
            name if (name := f"{found.target}.{taken}") in where else found.target
            for found in module.imports
            for taken in found.names or ("",)
        }
        imported[module.name] = (targets & where.keys()) - {module.name}
    while True:
        try:
            TopologicalSorter(imported).prepare()
            return
        except CycleError as error:
            circle: list[str] = error.args[1]  # each is imported by the next, and the last is the first
            yield f"{' → '.join(where[name] for name in reversed(circle))}: imports form a circle"
            imported[circle[1]].discard(circle[0])


def imports_are_absolute(modules: Sequence[Module]) -> Violations:
    for module in modules:
        for found in module.imports:
            if found.target.startswith("."):
                yield f"{module.where}:{found.line}: relative import '{found.target}'"


def objectives_stand_alone(modules: Sequence[Module]) -> Violations:
    for module in modules:
        if module.room != "objectives":
            continue
        for found in module.imports:
            top = found.target.split(".")[0]
            name = ".".join(found.target.split(".")[:2]) if top == "preceptor" else top
            if name not in OBJECTIVES_MAY_IMPORT and top not in sys.stdlib_module_names:
                yield f"{module.where}:{found.line}: objectives may import torch, jaxtyping and errors, not '{name}'"


def dependencies_are_declared(modules: Sequence[Module]) -> Violations:
    core, extras = declared()
    for module in modules:
        for found in module.imports:
            top = found.target.split(".")[0]
            if top and top != "preceptor" and top not in sys.stdlib_module_names | core | extras:
                yield f"{module.where}:{found.line}: '{top}' is no dependency in pyproject.toml"


def extras_wait_until_used(modules: Sequence[Module]) -> Violations:
    core, extras = declared()
    for module in modules:
        for found in module.imports:
            top = found.target.split(".")[0]
            if EXTENSIONS.get(module.name) == top:
                continue
            if found.at_import_time and top in extras - core:
                yield f"{module.where}:{found.line}: extra '{top}' is imported at module level, not where it is used"


def files_are_short(modules: Sequence[Module]) -> Violations:
    for module in modules:
        lines = len(module.source.splitlines())
        if lines > MAX_LINES:
            yield f"{module.where}: {lines} lines, at most {MAX_LINES}"


def annotations_are_deferred(modules: Sequence[Module]) -> Violations:
    for module in modules:
        annotatable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.AnnAssign
        if not any(isinstance(node, annotatable) for node in ast.walk(module.tree)):
            continue  # an `__init__` that only names what its package offers
        if not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in module.tree.body):
            yield f"{module.where}: no `from __future__ import annotations`"


def nothing_runs_what_it_loads(modules: Sequence[Module]) -> Violations:
    for module in modules:
        for found in module.imports:
            if found.target.split(".")[0] in UNPICKLERS:
                yield f"{module.where}:{found.line}: imports '{found.target}'; state is safetensors and JSON"
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if function in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
                yield f"{module.where}:{node.lineno}: calls `{function}`"
            if function == "torch.load" and keywords.get("weights_only") != "True":
                yield f"{module.where}:{node.lineno}: calls `torch.load` without weights_only=True"
            for name, value in (("trust_remote_code", "True"), ("weights_only", "False"), ("allow_pickle", "True")):
                if keywords.get(name) == value:
                    yield f"{module.where}:{node.lineno}: passes {name}={value}"


def broad_excepts_give_a_reason(modules: Sequence[Module]) -> Violations:
    """One that ends in a bare ``raise`` tidies up and hides nothing, so it needs no reason."""
    for module in modules:
        tokens = tokenize.generate_tokens(io.StringIO(module.source).readline)
        comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if not any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught):
                continue
            beside = (comments.get(line, "") for line in range(node.lineno - 1, node.body[0].lineno + 1))
            if not any(re.search(r"[a-z]{3}", re.sub(r"noqa(:[ A-Z0-9,]+)?", "", comment)) for comment in beside):
                yield f"{module.where}:{node.lineno}: a broad except without a comment that says why"


def environment_is_read_at_the_doors(modules: Sequence[Module]) -> Violations:
    for module in modules:
        if module.room in ("", "cli"):
            continue
        for node in ast.walk(module.tree):
            reads = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv")
            imports = isinstance(node, ast.ImportFrom) and node.module == "os"
            if reads or (imports and {"environ", "getenv"} & {alias.name for alias in node.names}):
                yield f"{module.where}:{node.lineno}: reads the environment; take the value as an argument"


RULES: tuple[Callable[[Sequence[Module]], Violations], ...] = (
    arrows_point_down,
    imports_form_no_circle,
    imports_are_absolute,
    objectives_stand_alone,
    dependencies_are_declared,
    extras_wait_until_used,
    files_are_short,
    annotations_are_deferred,
    nothing_runs_what_it_loads,
    broad_excepts_give_a_reason,
    environment_is_read_at_the_doors,
)
HEAVY = ("torch", "transformers", "numpy", "jaxtyping")


def heavy_imports(module: str, *, path: Path) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after ``import module`` with ``path`` first."""
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


# --- on the sources ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> list[Module]:
    return read_modules(SOURCE)


def test_walk_sees_the_project(sources: list[Module]) -> None:
    with_code = [module for module in sources if module.tree.body]
    assert len(with_code) >= MIN_MODULES
    assert {module.room.split(".")[0] for module in with_code} >= {room.split(".")[0] for room in LEVELS} - {"mixtures"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule: Callable[[Sequence[Module]], Violations], sources: list[Module]) -> None:
    assert list(rule(sources)) == []


def test_extensions_of_extras_are_imported_by_nobody_at_import_time(sources: list[Module]) -> None:
    assert EXTENSIONS.keys() <= {module.name for module in sources}
    for module in sources:
        for found in module.imports:
            assert not (found.at_import_time and found.target in EXTENSIONS), f"{module.where}:{found.line}"


@pytest.mark.parametrize("module", ["preceptor", "preceptor.cli"])
def test_start_up_loads_nothing_heavy(module: str) -> None:
    assert heavy_imports(module, path=SOURCE.parent) == []


# --- on a planted tree ------------------------------------------------------------------------------------------------

FUTURE = "from __future__ import annotations\n"
KEPT = {
    "__init__.py": '"""A tree that keeps every rule."""\n\n__version__ = "0"\n',
    "errors.py": FUTURE + "class PreceptorError(Exception): ...\n",
    "config.py": FUTURE + "import yaml\nfrom preceptor.errors import PreceptorError\nyaml.safe_load('a: 1')\n",
    "objectives/__init__.py": "",
    "objectives/kl.py": FUTURE + "import math\nimport torch\nfrom jaxtyping import Float\n"
    "from preceptor.errors import PreceptorError\nfrom preceptor.objectives import entropy\n",
    "objectives/entropy.py": FUTURE + "import torch\n",
    "lm/load.py": FUTURE + "import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"
    "def load():\n    import peft\n    return torch.load('x', weights_only=True)\n",
    "runs/state.py": FUTURE + "from preceptor import __version__, lm, objectives\n"
    "try:\n    pass\nexcept BaseException:\n    print()\n    raise\n"
    "try:\n    pass\nexcept Exception:  # noqa: BLE001 - the lock is released whatever happened\n    pass\n",
    "systems/__init__.py": "",
    "systems/reading/train.py": FUTURE + "import preceptor.runs.state\nfrom preceptor.systems.reading import arms\n",
    "systems/reading/arms.py": FUTURE + "import preceptor.objectives.kl\n",
    "systems/bandit/train.py": FUTURE + "from preceptor.runs import state\n",
    "cli.py": FUTURE
    + "import os\nos.environ.get('HOME')\ndef main():\n    from preceptor.systems.reading import train\n",
    "__main__.py": FUTURE + "from preceptor.cli import main\n",
}

PLANTED = [
    (arrows_point_down, "lm/load.py", "from preceptor.runs import state", "'lm' imports 'runs'"),
    (arrows_point_down, "lm/load.py", "def f():\n    import preceptor.data.articles", "'lm' imports 'data'"),
    (arrows_point_down, "errors.py", "from preceptor import config", "'errors' imports 'config'"),
    (arrows_point_down, "runs/state.py", "import preceptor.cli", "'runs' imports 'cli'"),
    (imports_form_no_circle, "objectives/entropy.py", "from preceptor.objectives.kl import kl", "a circle"),
    (
        imports_form_no_circle,
        "systems/reading/arms.py",
        "def f():\n    from preceptor.systems.reading import train",
        "reading/train.py",
    ),
    (
        imports_form_no_circle,
        "objectives/entropy.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from preceptor.objectives.kl import kl",
        "a circle",
    ),
    (arrows_point_down, "runs/state.py", "import preceptor.report.page", "'runs' imports 'report'"),
    (arrows_point_down, "__init__.py", FUTURE + "from preceptor.lm import load", "'preceptor' imports 'lm'"),
    (
        arrows_point_down,
        "systems/bandit/train.py",
        "from preceptor.systems.reading import arms",
        "'systems.bandit' imports 'systems.reading'",
    ),
    (arrows_point_down, "pretraining/train.py", FUTURE + "import preceptor.systems.bandit", "'systems.bandit'"),
    (arrows_point_down, "helpers/text.py", FUTURE, "room 'helpers' has no level"),
    (imports_are_absolute, "lm/load.py", "from .decode import generate", "relative import '.decode'"),
    (objectives_stand_alone, "objectives/kl.py", "def f():\n    import numpy", "not 'numpy'"),
    (objectives_stand_alone, "objectives/kl.py", "from preceptor.config import load", "not 'preceptor.config'"),
    (dependencies_are_declared, "lm/load.py", "def f():\n    import requests.adapters", "'requests' is no dependency"),
    (extras_wait_until_used, "lm/load.py", "try:\n    import peft\nexcept ImportError:\n    pass", "extra 'peft'"),
    (extras_wait_until_used, "lm/load.py", "class A:\n    from trafilatura import extract", "extra 'trafilatura'"),
    (files_are_short, "lm/load.py", "x = 1\n" * MAX_LINES, f"lines, at most {MAX_LINES}"),
    (annotations_are_deferred, "lm/decode.py", '"""Decode."""\ndef f(): ...', "no `from __future__"),
    (nothing_runs_what_it_loads, "runs/state.py", "import pickle", "imports 'pickle'"),
    (nothing_runs_what_it_loads, "runs/state.py", "def f():\n    from dill import loads", "imports 'dill'"),
    (nothing_runs_what_it_loads, "config.py", "yaml.load('a', Loader=yaml.Loader)", "`yaml.load`"),
    (nothing_runs_what_it_loads, "config.py", "eval('1')", "calls `eval`"),
    (nothing_runs_what_it_loads, "lm/load.py", "load('m', trust_remote_code=True)", "trust_remote_code=True"),
    (nothing_runs_what_it_loads, "lm/load.py", "load('m', weights_only=False)", "weights_only=False"),
    (nothing_runs_what_it_loads, "lm/load.py", "torch.load('m')", "without weights_only=True"),
    (broad_excepts_give_a_reason, "lm/load.py", "try:\n    pass\nexcept Exception:\n    pass", "broad except"),
    (broad_excepts_give_a_reason, "lm/load.py", "try:\n    pass\nexcept:\n    pass", "broad except"),
    (broad_excepts_give_a_reason, "lm/load.py", "try:\n    raise\nexcept BaseException:\n    print()", "broad except"),
    (
        broad_excepts_give_a_reason,
        "lm/load.py",
        "try:\n    pass\nexcept (OSError, Exception):  # noqa: BLE001\n    pass",
        "broad except",
    ),
    (environment_is_read_at_the_doors, "lm/load.py", "import os\nx = os.environ['HOME']", "reads the environment"),
    (environment_is_read_at_the_doors, "lm/load.py", "from os import getenv", "reads the environment"),
]


def plant(folder: Path, files: dict[str, str]) -> list[Module]:
    package = folder / "preceptor"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return read_modules(package)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_tree_that_keeps_the_rule_passes(rule: Callable[[Sequence[Module]], Violations], tmp_path: Path) -> None:
    modules = plant(tmp_path, KEPT)
    assert len(modules) == len(KEPT)
    assert list(rule(modules)) == []


@pytest.mark.parametrize(("rule", "file", "code", "expected"), PLANTED)
def test_a_planted_violation_is_found(
    rule: Callable[[Sequence[Module]], Violations], file: str, code: str, expected: str, tmp_path: Path
) -> None:
    found = list(rule(plant(tmp_path, {**KEPT, file: KEPT.get(file, "") + code + "\n"})))
    assert len(found) == 1
    assert file in found[0]
    assert expected in found[0]


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in PLANTED} == set(RULES)


def test_a_planted_heavy_import_is_found(tmp_path: Path) -> None:
    plant(tmp_path, {**KEPT, "cli.py": FUTURE + "import torch\n"})
    (tmp_path / "torch.py").write_text("")  # stands in for the real one: only its name is looked for
    assert heavy_imports("preceptor", path=tmp_path) == []
    assert heavy_imports("preceptor.cli", path=tmp_path) == ["torch"]
