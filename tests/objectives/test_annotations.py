"""The shapes in the signatures are enforced during these tests, and every docstring example runs."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from preceptor import objectives

PUBLIC = [name for name in objectives.__all__ if callable(getattr(objectives, name)) and name != "Aggregation"]


def test_shapes_in_signatures_are_enforced():
    with pytest.raises(TypeCheckError):
        objectives.masked_mean(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        objectives.everything(torch.zeros(3, 2))


def test_every_public_name_is_found_where_the_package_says():
    for name in objectives.__all__:
        value = getattr(objectives, name)
        assert getattr(value, "__module__", None) in (
            None,
            "typing",
            f"preceptor.objectives.{objectives._HOME[name]}",
        ), name
    assert len(PUBLIC) == len(set(PUBLIC)) >= 25


def test_no_module_has_the_name_of_something_public():
    """Imported, it would take that name's place in the package."""
    modules = {path.stem for path in Path(objectives.__file__).parent.glob("*.py")}
    assert len(modules) >= 10
    assert not modules & set(objectives.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_example(name):
    value = getattr(objectives, name)
    globs = {**vars(inspect.getmodule(inspect.unwrap(value))), "torch": torch}
    # module=False: the shape-checking wrapper has other globals, by which doctest would judge it to be imported.
    found = doctest.DocTestFinder(recurse=False).find(value, name, module=False, globs=globs)
    assert sum(len(test.examples) for test in found) > 0, f"{name} has no example"
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
