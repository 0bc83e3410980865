"""What a study begins with: the reader, pools, what a policy knows of them, and what each candidate is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.errors import ConfigError, DataError
from preceptor.lm.embedding import MODEL_EMBEDDINGS, ModelEmbedding
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.device import parse_dtype
from preceptor.runs.files import replace_file
from preceptor.runs.metrics import row_json
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.encoder import Encoder, copy_of_reader
from preceptor.systems.reading.study.features import (
    CaseBatch,
    Corpus,
    PoolFeatures,
    case_batch,
    channel_names,
    channel_scales,
    pool_features,
)
from preceptor.systems.reading.study.policy import PoolPolicy, calibrate
from preceptor.systems.reading.study.pool import (
    Case,
    Mode,
    Pool,
    StudyArticle,
    draw_cases,
    draw_pools,
    load_study_articles,
)
from preceptor.systems.reading.study.scores import Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services


STORE_NAME = "study.sqlite"
"""In the cache folder: what readers said."""


@dataclass(frozen=True)
class Split:
    """The cases of one mode and one split, as objects and as tensors."""

    cases: tuple[Case, ...]
    batch: CaseBatch


@dataclass(frozen=True)
class Setup:
    """What does not change during a run.

    Attributes:
        config, run: of the run.
        scorer: the frozen reader.
        train, judge: cases by mode; the articles of ``judge`` are never trained on.
        corpus, scales: statistics of the training articles, which a policy needs on new texts too.
    """

    config: ReadingConfig
    run: Run
    scorer: Scorer
    train: Mapping[Mode, Split]
    judge: Mapping[Mode, Split]
    corpus: Corpus
    scales: Tensor

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(self.train)

    def policy(self, mode: Mode) -> PoolPolicy:
        """A policy as it is before training, at the calibrated temperature."""
        policy = new_policy(self.config, self.scales, dimension=self.train[mode].batch.queries.shape[-1])
        calibrate(policy, self.train[mode].batch, entropy_fraction=self.config.selection.entropy_fraction)
        return policy

    def encoder(self) -> Encoder | None:
        """A model for the vectors, as it is before training; None where no update trains one."""
        if not self.config.study.model_steps:
            return None
        return copy_of_reader(self.scorer.lm, self.config, self.corpus, world=self.run.world)


def new_policy(config: ReadingConfig, scales: Tensor, *, dimension: int) -> PoolPolicy:
    """A policy with the identity as projections."""
    return PoolPolicy(dimension, num_channels=len(scales), num_rounds=config.study.num_rounds, cosine_scale=scales[0])


def frozen_reader(config: ReadingConfig, run_device: str) -> tuple[LanguageModel, ModelEmbedding]:
    """The language model that reads and embeds, and its embedding."""
    if config.reward.reader == "policy":
        raise ConfigError("`reward.reader` policy is not available in a study, whose reader is frozen; leave it empty")
    if config.selection.embedder not in MODEL_EMBEDDINGS:
        raise ConfigError(
            f"`selection.embedder` must be one of {', '.join(MODEL_EMBEDDINGS)} in a study, got "
            f"{config.selection.embedder}"
        )
    import torch

    lm = load_language_model(config.model.name, device=torch.device(run_device), dtype=parse_dtype(config.model.dtype))
    lm.model.requires_grad_(False)
    return lm, MODEL_EMBEDDINGS[config.selection.embedder](lm, layer=config.selection.layer)


@dataclass(frozen=True)
class StudyData:
    """Pools and cases of a configuration, which no run changes.

    Attributes:
        scorer: the frozen reader.
        embedding: of its texts.
        splits: cases by split (``train``, ``judge``) and mode.
        corpus, scales: statistics of the training articles.
        pools: of every split, by name.
    """

    scorer: Scorer
    embedding: ModelEmbedding
    splits: Mapping[str, Mapping[Mode, Split]]
    corpus: Corpus
    scales: Tensor
    pools: Mapping[str, Sequence[Pool]]


def load_study(
    config: ReadingConfig,
    *,
    device: str,
    store: Path | None,
    splits: Sequence[str] = ("train", "judge"),
    notice: Callable[[str], None] = lambda message: None,
    pause: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> StudyData:
    """The pools and cases that ``config`` describes, with every candidate scored.

    Args:
        config: of reading, with `episode.pool` mixed.
        device: of the reader.
        store: database in which scores are remembered; None remembers nothing.
        splits: whose cases are drawn and scored; the statistics are of the training articles in any case.
        notice: told what is being scored.
        pause: called after each case; may raise to stop.
        world: processes that share the passes of the reader.
    """
    with world.first_then_others():
        lm, embedding = frozen_reader(config, device)
    scorer = Scorer(lm, store, world=world)
    data, study = config.data, config.study

    def load(folder: str, split: str) -> list[StudyArticle]:
        return load_study_articles(folder, lm, split=split, max_tokens=data.max_value_tokens, language=data.language)

    learn, judge = load(data.train_articles, "learn"), load(data.eval_articles, "judge")
    others = load(study.distractors, "") if study.distractors else []
    # One text on both sides would make memory look like skill.
    if shared := {article.name for article in (*learn, *others)} & {article.name for article in judge}:
        raise DataError(f"'{min(shared)}' is both learned from and judged on; remove it from one of the two folders")
    pools: dict[str, list[Pool]] = {}
    for split, articles, count in (("train", learn, study.num_train_pools), ("judge", judge, study.num_eval_pools)):
        pools[split] = draw_pools(
            articles,
            count,
            others=others,
            num_distractors=study.num_distractors,
            pairs_per_article=data.num_pairs,
            seed=study.pool_seed,
            name=split,
        )
    # Of the training articles alone: what is standardised by held-out texts has seen them.
    channels, query_tokens = channel_names(study.channels), config.episode.query_tokens
    corpus = Corpus.of(
        [pair for article in learn for pair in article.pairs],
        scorer,
        embedding,
        query_tokens=query_tokens if "written_query" in channels else 0,
    )
    features: dict[str, dict[str, PoolFeatures]] = {
        split: {
            pool.name: pool_features(pool, corpus, scorer, embedding, channels=channels, query_tokens=query_tokens)
            for pool in each
        }
        for split, each in pools.items()
        if split == "train" or split in splits
    }
    scales = channel_scales(features["train"], pools["train"])
    modes: Sequence[Mode] = ("asked", "seed") if study.mode == "both" else (study.mode,)
    found: dict[str, dict[Mode, Split]] = {split: {} for split in splits}
    for split, articles in (("train", learn), ("judge", judge)):
        for mode in modes if split in splits else ():
            cases = draw_cases(
                pools[split], mode, num_questions=study.num_questions, target_names=[each.name for each in articles]
            )
            gains = []
            # The reader is frozen, so a candidate is scored once here and looked up in every later episode.
            for number, case in enumerate(cases, start=1):
                if number % 100 == 1:
                    notice(f"{split}, {mode}: scoring the candidates of case {number} of {len(cases)}")
                gains.append(scorer.candidate_gains(case))
                pause()
            found[split][mode] = Split(tuple(cases), case_batch(cases, features[split], scales, gains))
    return StudyData(scorer=scorer, embedding=embedding, splits=found, corpus=corpus, scales=scales, pools=pools)


def prepare(config: ReadingConfig, run: Run, services: Services) -> Setup:
    """The setup that ``config`` describes; writes ``pools.json`` into the run folder.

    What a reader says is remembered in the cache folder, so that runs with other seeds do not ask again.
    """
    data = load_study(
        config,
        device=str(run.device),
        store=services.cache_dir / STORE_NAME,
        notice=run.notice,
        pause=run.stop_if_requested,
        world=run.world,
    )
    if run.writes:
        replace_file(run.path / "pools.json", row_json(pools_json(data.pools)) + "\n")
    return Setup(
        config=config,
        run=run,
        scorer=data.scorer,
        train=data.splits["train"],
        judge=data.splits["judge"],
        corpus=data.corpus,
        scales=data.scales,
    )


def pools_json(pools: Mapping[str, Sequence[Pool]]) -> dict[str, object]:
    """The text that decisions refer to by split, pool and candidate."""
    return {
        split: {
            pool.name: {
                "articles": list(pool.articles),
                "sources": list(pool.sources),
                "candidates": [[pair.key, pair.value] for pair in pool.candidates],
                "held_out": [[[pair.key, pair.value] for pair in pairs] for pairs in pool.held_out],
            }
            for pool in each
        }
        for split, each in pools.items()
    }
