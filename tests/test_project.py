"""What the project says about itself outside its code: links, versions, workflows and forms agree with the files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/preceptor-rl/preceptor"
IN_REPOSITORY = (
    f"{REPOSITORY}/blob/main/",
    f"{REPOSITORY}/tree/main/",
    "https://raw.githubusercontent.com/preceptor-rl/preceptor/main/",
)


def targets(markdown: str) -> list[str]:
    """Where the links and images of a Markdown text lead."""
    return re.findall(r"\]\(([^)\s]+)", markdown) + re.findall(r"""(?:src|href)=["']([^"']+)""", markdown)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]  # type: ignore[no-any-return]


def test_a_package_index_can_follow_every_link_of_the_readme() -> None:
    """An index shows README.md alone, without the repository around it."""
    found = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 10
    assert [target for target in found if not target.startswith("https://")] == []


def test_links_into_the_repository_lead_to_files() -> None:
    pages = [ROOT / name for name in ("README.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff")]
    links = [target for page in pages if page.exists() for target in targets(page.read_text(encoding="utf-8"))]
    paths = [target.removeprefix(prefix) for target in links for prefix in IN_REPOSITORY if target.startswith(prefix)]
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path.partition("#")[0]).exists()] == []


def test_python_versions_agree_everywhere() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    classified = [line.removeprefix(prefix) for line in project()["classifiers"] if line.startswith(prefix)]
    assert [f"3.{minor}" for minor in classified] == tested
    assert project()["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").glob("*/**/*.yml")), ids=lambda path: path.name)
def test_a_workflow_calls_what_there_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in re.findall(r"\bmake ([a-z-]+)", text) if target not in rules] == []
    for action in re.findall(r"uses: (\S+)", text):
        if action.startswith("./"):
            assert (ROOT / action / "action.yml").is_file()
        else:
            assert re.search(r"@(v\d+|release/v\d+)$", action), f"{action} is not pinned to a major version"


def test_only_publishing_jobs_may_ask_for_a_token() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        may = {name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})}
        assert may <= {"publish", "publish-docs"}


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_a_form_needs(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) > 1


def test_the_citation_names_this_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"].lower(), citation["license"]) == (project()["name"], project()["license"])
    assert citation["repository-code"] == REPOSITORY


def test_the_lowest_torch_is_found_by_the_makefile() -> None:
    """`make lowest` reads it with sed from the first dependency."""
    assert re.fullmatch(r"torch>=\d+\.\d+", project()["dependencies"][0])
