"""The compiled kernels, ``decode_step.c`` and ``attention.c``, built once by the C compiler of the machine.

Without a compiler, or if it cannot build them, there are no kernels and PyTorch does their work. The library is kept in
the user's cache folder under a hash of its sources, the compiler with its options, and the processor; it is loaded from
there only if nobody else could have written it and its content is what was built.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

SOURCES = ("lanes.h", "attention.c", "decode_step.c")

_OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
_ARM_OPTIONS = tuple(option for option in _OPTIONS if option != "-march=native")
"""Apple's compilers may not know the option, and every 64-bit Arm processor has the vector instructions needed."""

_BUILD_SECONDS = 60

_REMEMBERED_SECONDS = 24 * 3600
"""For how long a compiler that failed is not tried again; it may have failed for want of space."""


_cache_folder: Path | None = None


def keep_kernels_in(folder: Path) -> None:
    """Keep what is compiled from now on in ``folder``, and not in the user's home."""
    global _cache_folder
    _cache_folder = folder


@cache
def kernel_library() -> ctypes.CDLL | None:
    """The kernels as a library, built on first use; None where they cannot be built.

    The library runs on torch's OpenMP threads. Threads of its own would compete for cores with torch's, which spin
    while they wait for work. A compiler without OpenMP builds a single-threaded library.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder = resources.files("preceptor.lm.cpu")
    sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in SOURCES}
    # Most specific first: with threads, without, and on Arm then both again without -march=native.
    variants = [_OPTIONS, *([_ARM_OPTIONS] if platform.machine() in ("arm64", "aarch64") else [])]
    for options in [(*variant, *threads) for variant in variants for threads in (["-fopenmp"], [])]:
        try:
            return build_library(compiler, options, sources)
        except (OSError, subprocess.SubprocessError):  # nowhere to write, or options that this compiler does not know
            continue
    return None


def build_library(compiler: str, options: Sequence[str], sources: Mapping[str, str]) -> ctypes.CDLL:
    """``sources`` (file name to text) as a library, compiled unless the user's cache has it whole.

    Raises:
        OSError: there is nowhere to write.
        subprocess.SubprocessError: the compiler fails, now or within the last day.
    """
    built = Path(compiler).stat()  # an upgrade of the compiler may mend what failed
    # What the machine code depends on is in the name, so an old library is never loaded by mistake.
    parts = (*sources.values(), compiler, str(built.st_mtime_ns), *options, platform.machine(), _processor())
    stem = "kernels-" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = _cache_folder or Path.home() / ".cache" / "preceptor" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(folder.lstat(), stat.S_ISDIR):  # somebody else could put a library there
        with tempfile.TemporaryDirectory(prefix="preceptor-kernels-") as own:
            return ctypes.CDLL(str(_compiled(compiler, options, sources, Path(own), stem)))
    for path in folder.glob(f"{stem}-*.so"):
        if _is_whole(path):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)  # damaged: a truncated library ends the process when it is loaded
    failed = folder / f"{stem}.failed"
    if failed.is_file() and time.time() - failed.stat().st_mtime < _REMEMBERED_SECONDS:
        raise subprocess.SubprocessError(f"{compiler} failed before ({failed})")
    try:
        return ctypes.CDLL(str(_compiled(compiler, options, sources, folder, stem)))
    except subprocess.SubprocessError:
        failed.touch(mode=0o600)
        raise


def _compiled(compiler: str, options: Sequence[str], sources: Mapping[str, str], folder: Path, stem: str) -> Path:
    """The library in ``folder``, whole on the disk before it has its name, which ends in its SHA-256."""
    # In the same folder, hence on the same file system, or the rename below could not be atomic.
    with tempfile.TemporaryDirectory(dir=folder) as build:
        for source, text in sources.items():
            (Path(build) / source).write_text(text, encoding="utf-8")
        units = [f"{build}/{source}" for source in sources if source.endswith(".c")]
        library = Path(build) / "kernels.so"
        subprocess.run(
            [compiler, *options, "-o", str(library), *units, "-lm"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_BUILD_SECONDS,  # a hung compiler must not hang a run
        )
        library.chmod(0o700)  # whatever the umask says
        with library.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())  # before the rename, so that the name never outlives the content
        path = folder / f"{stem}-{digest}.so"
        os.replace(library, path)  # atomic, should two processes build at once
    return path


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is a file that only we can have written, with the content that its name promises."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # a symlink, or gone
        return False
    with open(descriptor, "rb") as file:
        if not _is_private(os.fstat(descriptor), stat.S_ISREG):
            return False
        return path.stem.endswith("-" + hashlib.file_digest(file, "sha256").hexdigest())


def _is_private(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether a file or folder is of the kind, ours, and writable by nobody else."""
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_kind(status.st_mode) and status.st_uid == os.getuid() and not others_write


def _processor() -> str:
    """Model and features of the processor; a home directory may be shared by machines with different ones."""
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return platform.processor()
    lines = described.read_text(encoding="utf-8").splitlines()
    # /proc/cpuinfo repeats the lines once per core.
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
