"""The library of kernels: built once for its sources and processor, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.lm.cpu import kernels
from preceptor.lm.cpu.kernels import kernel_library

COMPILER = kernels.shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@needs_compiler
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an upgrade would go on with what an earlier version has built. Headers count too."""
    assert COMPILER is not None
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path)
    unit = '#include "number.h"\nint number(void) { return NUMBER; }'
    for number in (1, 2, 1):
        sources = {"number.h": f"#define NUMBER {number}", "number.c": unit}
        assert kernels.build_library(COMPILER, kernels._OPTIONS, sources).number() == number
    assert len(list((tmp_path / ".cache" / "preceptor").glob("*.so"))) == 2


@needs_compiler
def test_there_is_a_library_where_there_is_a_compiler() -> None:
    """Else every test of a kernel would be one of PyTorch."""
    library = kernel_library()
    assert library is not None
    assert all(hasattr(library, f"preceptor_{name}") for name in ("step", "attention", "attention_backward"))


def test_without_a_place_or_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = kernel_library.__wrapped__
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(kernels, "_OPTIONS", ("--no-such-option",))
    monkeypatch.setattr(kernels, "_ARM_OPTIONS", ("--no-such-option",))
    assert build() is None
    monkeypatch.setattr(kernels.shutil, "which", lambda _: None)
    assert build() is None


@needs_compiler
@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_an_arm_compiler_need_not_know_its_own_processor(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere a build for any processor would be slower than PyTorch, so there is none."""
    monkeypatch.setattr(kernels.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.setattr(kernels, "_OPTIONS", ("-march=unheard-of", *kernels._ARM_OPTIONS))
    assert (kernel_library.__wrapped__() is not None) == (machine == "arm64")
