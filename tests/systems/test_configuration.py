"""From presets, files, flags and overrides to a configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from preceptor.errors import ConfigError
from preceptor.systems import find_system
from preceptor.systems.base import configuration

READING = find_system("reading")


def test_overrides_are_typed_text_or_values() -> None:
    values = {"update.learning_rate": 1e-5, "model.name": Path("a/b"), "update.clip_norm": math.inf}
    typed = ["update.learning_rate=1e-5", "model.name=a/b", "update.clip_norm=.inf"]
    assert configuration(READING, overrides=values) == configuration(READING, overrides=typed)
    bandit = configuration(find_system("bandit"), overrides={"prompts.held_out": ("Name {options}:", "{options}! 1e5")})
    assert bandit.prompts.held_out == ("Name {options}:", "{options}! 1e5")


def test_a_preset_or_a_flag_of_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'smok' of reading \(did you mean 'smoke'\?\)"):
        configuration(READING, preset="smok")
    with pytest.raises(ConfigError, match="'artcle' is no option of reading"):
        configuration(READING, flags={"artcle": "x"})
