"""The systems that Preceptor can run, by name. Each is a package with ``config.py`` (no torch) and ``train.py``.

``config.py`` holds the frozen dataclass named here, with ``seed`` and ``save_every`` (steps) among its keys, and may
hold ``FLAGS``, which gives keys an option of their own on the command line: ``{"article": "data.article"}`` makes
``--article``. ``train.py`` holds ``train(config, run, **needs) -> dict``, which gives what ``result.json`` says, and
``STREAMS``, the names of the random streams that it draws from. Presets lie in ``preceptor/presets/<name>/``.
"""

from __future__ import annotations

from typing import NamedTuple


class SystemInfo(NamedTuple):
    """Where a system is found and what it is about."""

    module: str  # package with the modules `config` and `train`
    config: str  # class in `config`
    description: str  # one line
    needs: tuple[str, ...] = ()  # what `train` takes from the environment: `cache_dir`, `openai_api_key`


SYSTEMS: dict[str, SystemInfo] = {
    "reading": SystemInfo(
        "preceptor.systems.reading",
        "ReadingConfig",
        "a language model learns in which order to read an article",
        needs=("cache_dir", "openai_api_key"),
    ),
    "bandit": SystemInfo(
        "preceptor.systems.bandit",
        "BanditConfig",
        "a language model decides by words, and what it learned crosses contexts or does not",
    ),
    "curriculum": SystemInfo(
        "preceptor.systems.curriculum",
        "CurriculumConfig",
        "a language model learns by PPO on datasets mixed by what it can learn next",
    ),
    "surgery": SystemInfo(
        "preceptor.systems.surgery",
        "SurgeryConfig",
        "a language model learns to speak by reinforcement, a surgeon edits its attention",
    ),
}
