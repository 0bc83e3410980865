"""The library of kernels: built once for its sources and processor, or not there."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
from collections.abc import Callable
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
    monkeypatch.setattr(kernels, "_cache_folder", tmp_path / "kernels")
    unit = '#include "number.h"\nint number(void) { return NUMBER; }'
    for number in (1, 2, 1):
        sources = {"number.h": f"#define NUMBER {number}", "number.c": unit}
        assert kernels.build_library(COMPILER, kernels._OPTIONS, sources).number() == number
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no Linux")
def test_what_the_processor_can_do_is_part_of_a_librarys_name() -> None:
    """A home directory may be shared by machines with different ones, and the library is built for one of them."""
    told = kernels._processor().splitlines()
    assert told
    assert all(line.startswith(("model name", "flags", "Features")) for line in told)


SOURCES = {"number.c": "int number(void) { return 7; }"}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ctypes.CDLL]:
    """Builds a small library in a cache of its own, and counts how often the compiler is called."""
    monkeypatch.setattr(kernels, "_cache_folder", tmp_path / "kernels")
    return lambda: kernels.build_library(str(COMPILER), kernels._OPTIONS, SOURCES)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of the compiler from now on."""
    calls, run = [], subprocess.run
    monkeypatch.setattr(kernels.subprocess, "run", lambda *given, **named: (calls.append("x"), run(*given, **named))[1])
    return calls


def the_library(cache: Path) -> Path:
    (library,) = (cache / "kernels").glob("*.so")
    return library


def rewrite(library: Path, content: bytes) -> None:
    """Under the same name as a new file: the old one is mapped into this process."""
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o700)


def truncate(library: Path) -> None:
    rewrite(library, library.read_bytes()[:-4096])


def flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(library, bytes(content))


def link(library: Path) -> None:
    elsewhere = library.rename(library.with_name("elsewhere"))
    library.symlink_to(elsewhere)


@needs_compiler
@pytest.mark.parametrize(
    "damage", [truncate, flip, link, lambda path: path.chmod(0o722), lambda path: path.chmod(0o770)]
)
def test_a_library_that_is_not_as_it_was_built_is_built_again(
    build: Callable[[], ctypes.CDLL], compiled: list[str], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """A truncated library would end the process; others could write whatever they like into an open one."""
    build()
    damage(the_library(tmp_path))
    assert build().number() == 7
    assert len(compiled) == 2
    assert build().number() == 7
    assert len(compiled) == 2
    status = the_library(tmp_path).lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_left_alone(
    build: Callable[[], ctypes.CDLL], compiled: list[str], tmp_path: Path, mode: int
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(mode)
    assert build().number() == 7
    assert build().number() == 7
    assert len(compiled) == 2
    assert list((tmp_path / "kernels").iterdir()) == []


@needs_compiler
def test_a_folder_that_is_a_symlink_is_left_alone(build: Callable[[], ctypes.CDLL], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "kernels").symlink_to(tmp_path / "elsewhere")
    assert build().number() == 7
    assert list((tmp_path / "elsewhere").iterdir()) == []


@needs_compiler
def test_a_compiler_that_fails_is_not_tried_again_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    monkeypatch.setattr(kernels, "_cache_folder", tmp_path / "kernels")
    for _ in range(2):
        with pytest.raises(subprocess.SubprocessError):
            kernels.build_library(str(COMPILER), ["--no-such-option"], SOURCES)
    assert len(compiled) == 1
    (remembered,) = (tmp_path / "kernels").glob("*.failed")
    os.utime(remembered, (0, 0))
    with pytest.raises(subprocess.SubprocessError):
        kernels.build_library(str(COMPILER), ["--no-such-option"], SOURCES)
    assert len(compiled) == 2


@needs_compiler
def test_the_library_is_on_the_disk_before_it_has_its_name(
    build: Callable[[], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(kernels.os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(kernels.os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    build()
    assert order == ["fsync", "replace"]


@needs_compiler
def test_there_is_a_library_where_there_is_a_compiler() -> None:
    """Else every test of a kernel would be one of PyTorch."""
    library = kernel_library()
    assert library is not None
    assert all(hasattr(library, f"preceptor_{name}") for name in ("step", "attention", "attention_backward"))


def test_without_a_place_or_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = kernel_library.__wrapped__
    monkeypatch.setattr(kernels, "_cache_folder", tmp_path / "kernels")
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
    monkeypatch.setattr(kernels, "_cache_folder", tmp_path / "kernels")
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.setattr(kernels, "_OPTIONS", ("-march=unheard-of", *kernels._ARM_OPTIONS))
    assert (kernel_library.__wrapped__() is not None) == (machine == "arm64")
