"""Finished runs as they are read back."""

from __future__ import annotations

from preceptor.comparison.runs import current_config
from preceptor.config import to_dict
from preceptor.systems import find_system
from preceptor.systems.base import configuration


def test_a_recorded_configuration_gets_the_keys_of_today() -> None:
    today = to_dict(configuration(find_system("reading"), preset="smoke"))
    recorded = {key: dict(value) if isinstance(value, dict) else value for key, value in today.items()}
    recorded["update"]["optimiser"] = recorded["update"].pop("optimizer")
    del recorded["selection"]["base_url"]
    assert current_config("reading", recorded) == today
    assert current_config("nowhere", recorded) == recorded
    recorded["update"]["gone"] = 1
    assert current_config("reading", recorded) == recorded  # it is shown as it was
