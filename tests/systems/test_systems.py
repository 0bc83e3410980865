"""Which systems there are: Preceptor's own, and those that installed packages name as entry points."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preceptor.errors import ConfigError
from preceptor.systems import OWN, find_system, known_systems
from preceptor.systems.base import System, lazy

MODULE = """
from preceptor.systems.base import System
SYSTEM = System(name="{name}", summary="one line", Config=object, streams=(), train=print)
NOT_ONE = "a text"
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a package with a system called ``name`` and entry points as given, as if it were installed."""

    def make(name: str, **points: str) -> None:
        (tmp_path / f"made_{name}.py").write_text(MODULE.format(name=name))
        metadata = tmp_path / f"made_{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-{name}\nVersion: 1.0\n")
        lines = [f"{point} = {target}" for point, target in points.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[preceptor.systems]", *lines]) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, f"made_{name}", raising=False)
        known_systems.cache_clear()

    yield make
    known_systems.cache_clear()


def test_an_entry_point_makes_a_system_known_after_the_own_ones(install: Install) -> None:
    install("chess", chess="made_chess:SYSTEM")
    assert list(known_systems()) == [*OWN, "chess"]
    assert "made_chess" not in sys.modules, "a name alone imports nothing"
    assert find_system("chess").summary == "one line"
    assert find_system("chess") is sys.modules["made_chess"].SYSTEM


def test_a_name_of_preceptors_own_cannot_be_taken_over(install: Install) -> None:
    install("reading", reading="made_reading:SYSTEM")
    assert known_systems() == OWN
    assert find_system("reading").Config.__module__ == "preceptor.systems.reading.config"


def test_a_misspelled_name_gets_the_nearest_of_all(install: Install) -> None:
    install("chess", chess="made_chess:SYSTEM")
    with pytest.raises(ConfigError, match=r"unknown system 'ches' \(did you mean 'chess'\?\)"):
        find_system("ches")
    with pytest.raises(ConfigError, match=f"unknown system 'zzzzzz'; there are {', '.join(OWN)}, chess"):
        find_system("zzzzzz")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("made_nowhere:SYSTEM", "system 'chess' cannot be imported from made_nowhere:SYSTEM: No module named"),
        ("made_chess:MISSING", "system 'chess' cannot be imported from made_chess:MISSING: .* no attribute 'MISSING'"),
        ("made_chess:NOT_ONE", "made_chess:NOT_ONE must be a System called 'chess', got 'a text'"),
        ("made_other:SYSTEM", "made_other:SYSTEM must be a System called 'chess', got System"),
    ],
)
def test_an_entry_point_that_names_no_such_system_is_one_line(install: Install, target: str, message: str) -> None:
    install("other")
    install("chess", chess=target)
    with pytest.raises(ConfigError, match=message) as caught:
        find_system("chess")
    assert "\n" not in str(caught.value)


def test_own_systems_are_all_there_and_import_no_torch() -> None:
    program = "import sys; from preceptor.systems import *; from preceptor.systems import OWN, find_system\n"
    program += "print(*[find_system(name).name for name in OWN]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(OWN)


def test_a_lazy_function_is_imported_when_it_is_asked_for(install: Install) -> None:
    install("chess")
    system = System(
        name="x",
        summary="",
        Config=object,
        streams=(),
        train=lazy("made_chess:System"),
        result=lazy("made_chess:missing"),
        verify=print,
    )
    assert "made_chess" not in sys.modules
    assert system.train is System
    assert "made_chess" in sys.modules
    assert system.verify is print, "a function that is given stays as it is"
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = system.result


@pytest.mark.parametrize("name", OWN)
def test_every_function_of_an_own_system_is_there(name: str) -> None:
    system = find_system(name)
    for part in ("train", "result", "sections", "verify"):
        function = getattr(system, part)
        assert callable(function) or (name == "pretrain" and function is None), part
