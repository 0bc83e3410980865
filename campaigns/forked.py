"""``preceptor`` in a child of this process, which has imported everything: a trial costs its run and no imports.

The campaign's own process computes nothing with torch before it forks, and that on one thread, so that a child has no
lock or thread pool of a parent's to wait for.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

MODULES = (
    *(f"preceptor.systems.{system}.loop" for system in ("reading", "bandit", "curriculum", "surgery")),
    *("preceptor.cli", "preceptor.api", "preceptor.runs.export", "transformers.models.llama.modeling_llama"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto"),
)


@functools.cache
def warm_up() -> None:
    """Imports what runs need, and leaves torch and Transformers' loading on one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(module)


def begin(words: Sequence[str], errors: Path) -> BaseProcess:
    """``preceptor WORDS`` at work in a child; what it prints to stderr goes to ``errors``."""
    warm_up()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(list(words), errors))
    child.start()
    return child


def _run(words: list[str], errors: Path) -> None:
    from preceptor.cli import main

    os.setsid()
    with errors.open("wb") as log, Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["preceptor", *words]
    try:
        code = main(words)
    except BaseException:
        # As the interpreter does at the end of a process, which this child's is not.
        traceback.print_exc()
        raise
    sys.exit(code)
