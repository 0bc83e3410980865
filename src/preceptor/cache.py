"""Where downloads, bought embeddings and compiled kernels are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str]) -> Path:
    """The cache folder: PRECEPTOR_CACHE_DIR, else ``preceptor`` in the XDG cache folder."""
    if own := environ.get("PRECEPTOR_CACHE_DIR"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "preceptor"
