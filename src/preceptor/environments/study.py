"""Study as a task: which passages of a mixed pool are worth reading for what is asked afterwards?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from preceptor.environments.episodes import Episode, Reading, require_over
from preceptor.environments.reading import nearest_key, text_vector
from preceptor.errors import ConfigError
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.loop import table_rewards
from preceptor.systems.reading.study.policy import Readings
from preceptor.systems.reading.study.pool import Mode
from preceptor.systems.reading.study.setup import STORE_NAME, load_study

OBSERVED = ("queries", "keys", "query_channels", "key_channels", "read_channels")
"""Of :class:`~preceptor.systems.reading.study.features.CaseBatch`, what a policy sees of a case."""


class StudyTask:
    """The cases of a configuration of ``reading`` with ``episode.pool: mixed``; problem i is the i-th case.

    An episode chooses ``episode.budget`` candidates. Its reward is the gain in nats per value token over reading
    nothing, as ``study.judged_by`` says: really read by the frozen reader, or the mean of its candidates read alone.

    Args:
        config: of reading, with a mixed pool.
        split: ``train``, or ``judge``: articles that no run trains on.
        mode: ``asked`` (a question is given) or ``seed`` (a sentence that was read); None is that of ``study.mode``.
        cache_dir: where scores are remembered, for runs and environments alike; None remembers nothing.
        device: of the reader.

    Raises:
        ConfigError: no study, an unknown split, or a mode that the configuration leaves out.
    """

    name = "study"

    def __init__(
        self,
        config: ReadingConfig,
        *,
        split: str = "train",
        mode: Mode | None = None,
        cache_dir: Path | None,
        device: torch.device | None = None,
    ) -> None:
        modes: tuple[Mode, ...] = ("asked", "seed") if config.study.mode == "both" else (config.study.mode,)
        chosen: Mode = mode or modes[0]
        faults = []
        if config.episode.pool != "mixed":
            faults.append("the task study needs `episode.pool` mixed; take a preset that has it, such as study-smoke")
        if split not in ("train", "judge"):
            faults.append(f"`split` of study must be train or judge, got {split!r}")
        if chosen not in modes:
            faults.append(f"`mode` must be one of {', '.join(modes)} (`study.mode`), got {chosen}")
        if faults:
            raise ConfigError(*faults)
        self.config = config
        # Only the cases of one mode are scored.
        config = config.model_copy(update={"study": config.study.model_copy(update={"mode": chosen})})
        store = None if cache_dir is None else cache_dir / STORE_NAME
        self._data = load_study(config, device=str(device or "cpu"), store=store, splits=(split,))
        self._split = self._data.splits[split][chosen]
        self.cases = self._split.cases

    def __len__(self) -> int:
        return len(self.cases)

    def observation(self, index: int) -> dict[str, Tensor]:
        """What a policy sees of case ``index``: the fields of ``OBSERVED``, without their first axis."""
        return {name: getattr(self._split.batch, name)[index] for name in OBSERVED}

    def episode(self, index: int) -> Reading:
        """A new reading for case ``index``; its prompt is the question, or the sentence that was read."""
        case, world = self.cases[index], self._data
        texts = case.context

        def nearest(text: str, available: list[bool]) -> int:
            vector = world.corpus.standardised(text_vector(world.scorer.lm, world.embedding, text).cpu())
            keys = torch.nn.functional.normalize(self._split.batch.keys[index], dim=-1)
            return nearest_key(keys, vector, available)  # the cosine, but for the text's own length

        return Reading(
            index=index,
            prompt=" ".join(texts) + "\n",
            num_turns=self.config.episode.budget,
            values=tuple(f"{pair.key} {pair.value}" for pair in case.pool.candidates),
            nearest=nearest,
        )

    def rewards(self, episodes: Sequence[Episode]) -> list[float]:
        """Gain of each reading, nats per value token; the readings of a case are scored together."""
        require_over(episodes)
        found = [0.0] * len(episodes)
        for index in dict.fromkeys(each.index for each in episodes):
            rows = [row for row, each in enumerate(episodes) if each.index == index]
            picks = torch.tensor([episodes[row].choices for row in rows])  # reading step
            if self.config.study.judged_by == "reading":
                gains = self._data.scorer.reading_gains(self.cases[index], picks.tolist())
            else:
                unused = torch.zeros_like(picks[None], dtype=torch.float32)
                gains = table_rewards(self._split.batch.gains[index][None], Readings(picks[None], unused, unused))[0]
            for row, gain in zip(rows, gains.tolist(), strict=True):
                found[row] = gain
        return found
