"""The public interface: what it lists, that nothing shadows it, and that it is light."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import preceptor
from preceptor.errors import ConfigError


def test_everything_public_is_there_and_documented() -> None:
    assert len(set(preceptor.__all__)) == len(preceptor.__all__) >= 8
    for name in preceptor.__all__:
        public = getattr(preceptor, name)
        if name != "__version__":
            assert inspect.getdoc(public), name
    text = pydoc.plain(pydoc.render_doc(preceptor))
    for name in ("run(", "resume(", "compare(", "load(", "class Result", "class SurgicalTheater"):
        assert name in text, name


def test_no_subpackage_takes_the_place_of_a_public_name() -> None:
    """Importing ``preceptor.x`` sets the attribute ``x``: a function of that name would be gone after the first use."""
    root = Path(preceptor.__file__).parent
    modules = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(modules) >= 10
    assert modules & set(preceptor.__all__) == {"mixtures"}, "only what is meant as a module"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        preceptor.walk  # noqa: B018 - the access is what is tested


def test_faults_come_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'reading'"):
        preceptor.run("reeding")
    with pytest.raises(ConfigError, match=r"'artcle' is no option of reading \(did you mean 'article'\?\)"):
        preceptor.run("reading", artcle="x.txt")
    with pytest.raises(ConfigError, match=r"did you mean 'update.steps'"):
        preceptor.run("reading", overrides={"update.step": 3})
    with pytest.raises(ConfigError, match="is no run folder"):
        preceptor.load(tmp_path)
    with pytest.raises(ConfigError, match="nothing to compare"):
        preceptor.compare()
    assert not list(tmp_path.iterdir())


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "pydantic", "typer", "numpy", "rich"]
    program = f"import sys, preceptor; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("It wins by 0.5 nats; one seed. On this", "It wins by 0.5 nats; one seed."),
        ("Only this.", "Only this."),
        ("No point", "No point"),
        ("", ""),
    ],
)
def test_the_headline_is_the_first_sentence(verdict: str, headline: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"verdict": verdict}))
    assert preceptor.load(tmp_path).headline == headline
