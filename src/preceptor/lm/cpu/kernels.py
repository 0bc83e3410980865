"""The compiled kernels, ``decode_step.c`` and ``attention.c``, built once by the C compiler of the machine.

Without a compiler, or if it cannot build them, there are no kernels and PyTorch does their work. The library is cached
in the user's home under a hash of its sources, the compiler's options and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

SOURCES = ("lanes.h", "attention.c", "decode_step.c")

_OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
_ARM_OPTIONS = tuple(option for option in _OPTIONS if option != "-march=native")
"""Apple's compilers may not know the option, and every 64-bit Arm processor has the vector instructions needed."""

_BUILD_SECONDS = 60


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
    """``sources`` (file name to text) as a library, compiled unless the user's cache has it."""
    # What the machine code depends on is in the name: new sources, other options or another processor build anew, and
    # an old library is never loaded by mistake.
    identity = "\n".join((*sources.values(), compiler, *options, platform.machine(), _processor()))
    name = f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = Path.home() / ".cache" / "preceptor"
    if not (folder / name).is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In the same folder, hence on the same file system, or the rename below could not be atomic.
        with tempfile.TemporaryDirectory(dir=folder) as build:
            for source, text in sources.items():
                (Path(build) / source).write_text(text, encoding="utf-8")
            units = [f"{build}/{source}" for source in sources if source.endswith(".c")]
            subprocess.run(
                [compiler, *options, "-o", f"{build}/kernels.so", *units, "-lm"],
                check=True,
                capture_output=True,
                timeout=_BUILD_SECONDS,  # a hung compiler must not hang a run
            )
            os.replace(f"{build}/kernels.so", folder / name)  # atomic, should two processes build at once
    return ctypes.CDLL(str(folder / name))


def _processor() -> str:
    """Model and features of the processor; a home directory may be shared by machines with different ones."""
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return platform.processor()
    lines = described.read_text(encoding="utf-8").splitlines()
    # /proc/cpuinfo repeats the lines once per core.
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
