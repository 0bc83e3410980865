"""The tests of one fault, in a fork of a process that has imported the libraries: a trial costs its tests alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = (
    *("pytest", "numpy", "scipy.stats", "html5lib", "yaml", "torch"),
    *("transformers", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.models.gpt2.modeling_gpt2", "tokenizers", "safetensors.torch", "rich.console"),
)
"""What the forking process imports: nothing of the project, which each trial imports from its own copy."""

OF_THE_COPY = ("preceptor", "benchmarks", "campaigns", "tools")


def run_tests(copy: Path, tests: Sequence[str], failed: Path) -> None:
    """Ends this process with pytest's exit code; the name of the first test that fails is written to ``failed``."""
    os.setsid()
    with Path(os.devnull).open("r+b") as nowhere:
        for stream in range(3):
            os.dup2(nowhere.fileno(), stream)
    for name in [name for name in sys.modules if name.split(".")[0] in OF_THE_COPY]:
        del sys.modules[name]
    paths = [str(copy / "src"), str(copy)]
    sys.path[:0] = paths
    sys.argv = ["pytest"]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the processes that tests start
    os.chdir(copy)

    import pytest

    class Plugin:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.write_text(report.nodeid, encoding="utf-8")

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                failed.write_text(f"{report.nodeid} (collected)", encoding="utf-8")

    # Plugins that a library has imported before pytest could rewrite their assertions.
    words = [
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    sys.exit(int(pytest.main(words, plugins=[Plugin()])))
