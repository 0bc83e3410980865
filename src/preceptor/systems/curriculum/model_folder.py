"""A model folder that Transformers loads, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from preceptor.lm.model import LanguageModel
from preceptor.run.files import TEMPORARY, storage_errors


def save_model(lm: LanguageModel, folder: Path) -> None:
    """Write the weights (an adapter's alone, where there is one) and the tokenizer of ``lm`` to ``folder``.

    Raises:
        StorageError: the disk is full or refuses; a folder that was there is then untouched.
    """
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    with storage_errors(f"save the model in {folder}"), _without_progress_bar():
        if temporary.exists():
            shutil.rmtree(temporary)
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Transformers' own bar would break into the run's."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
