"""Every command and every Python block of the documentation, page by page, as a new user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "yaml", "json"}
"""Languages of blocks that show something and run nothing."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]


def pages() -> list[str]:
    return [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


def test_there_is_a_tutorial_for_every_system() -> None:
    from preceptor.systems import OWN

    for name in OWN.keys() - {"pretrain"}:
        assert f"tutorials/{name}.md" in pages()
        assert (DOCS / "systems" / f"{name}.md").is_file()


@pytest.mark.parametrize("page", pages())
def test_every_block_of_the_page_runs(page: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "PRECEPTOR_CACHE_DIR": str(tmp_path / "cache"),
        "COLUMNS": "100",
    }
    for language, code in blocks(DOCS / page):
        if language in SHOWN:
            continue
        assert language in ("bash", "python"), f"{page}: a block of unknown language {language}"
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_navigation_names_every_page_and_no_other() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, list) else list(entry.values())  # type: ignore[attr-defined]
        return [file for value in values for file in files(value)]

    named = files(yaml.safe_load(text)["nav"])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.name} links to {target}"
