"""The learned skill in use: which passages of a folder to read for a question, with no reader asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from preceptor.config import from_dict
from preceptor.data.articles.article import article_folder, read_file
from preceptor.data.articles.pairs import Pair, sentence_pairs
from preceptor.errors import ConfigError, DataError, ModelError, PreceptorError
from preceptor.lm.embedding import ModelEmbedding
from preceptor.runs.device import parse_dtype
from preceptor.runs.export import MODEL, load_model
from preceptor.runs.record import read_config
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.encoder import Encoder, trained_encoder
from preceptor.systems.reading.study.features import Corpus, case_batch, channel_names, pool_features
from preceptor.systems.reading.study.policy import PoolPolicy, read
from preceptor.systems.reading.study.pool import MIN_CHARACTERS, NUM_HELD_OUT, Case, Mode, Pool
from preceptor.systems.reading.study.retrieval import Lexicon
from preceptor.systems.reading.study.scores import Scorer
from preceptor.systems.reading.study.setup import frozen_reader, new_policy

MAX_CANDIDATES = 64
"""Passages that the policy sees; of more, those with the highest BM25 against the question, then the first."""


@dataclass(frozen=True)
class Chosen:
    """A passage to read: where it stands, its text, and the probability with which the policy chose it at its step."""

    index: int
    key: str
    value: str
    probability: float

    @property
    def text(self) -> str:
        """Key and value, as they stand in the source."""
        return f"{self.key} {self.value}"


class Reader:
    """The policy of a finished study.

    Args:
        run: its folder.
        mode: ``asked`` (the context is a question) or ``seed`` (it is a sentence that was read).

    Raises:
        ConfigError: the folder is no finished study, or has no policy of this mode.
        ModelError: a file is damaged.
    """

    def __init__(self, run: str | Path, *, mode: Mode = "asked") -> None:
        folder = Path(run)
        if not (folder / "study.json").is_file():
            if (folder / "pools.json").is_file():
                raise ConfigError(f"the study in {folder} has not ended; go on with it: preceptor resume {folder}")
            raise ConfigError(
                f"{folder} holds no policy of a study; make one with: preceptor run reading --preset study"
            )
        config = from_dict(ReadingConfig, read_config(folder))
        try:
            description = json.loads((folder / "study.json").read_bytes())
            tensors = load_file(folder / "study.safetensors")
            if mode not in description["modes"]:
                raise ConfigError(f"{folder} has no policy for mode {mode}; it has {', '.join(description['modes'])}")
            lexicon = Lexicon(())
            lexicon.num_texts, lexicon.mean_length = description["num_texts"], description["mean_length"]
            lexicon.frequency = Counter(description["frequency"])
            named = {name: tensors[name] for name in ("idf", "mean", "deviation", "token_mean")}
            self._corpus = Corpus(lexicon=lexicon, **named, written_mean=tensors.get("written_mean"))
            self._scales = tensors["scales"]
            self._policy: PoolPolicy = new_policy(config, self._scales, dimension=len(self._corpus.mean))
            prefix = f"{mode}."
            own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            self._policy.load_state_dict(own)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, PreceptorError):
                raise
            raise ModelError(
                f"the policy in {folder} cannot be loaded ({error}); restore the run from a copy"
            ) from error
        lm, embedding = frozen_reader(config, "cpu")
        self._scorer, self._embedding = Scorer(lm), embedding
        self._channels, self._query_tokens = channel_names(config.study.channels), config.episode.query_tokens
        self._encoder: Encoder | None = None
        if config.study.model_steps:
            self._encoder = trained_encoder(
                *load_model(folder / MODEL, dtype=parse_dtype(config.model.dtype)), config, self._corpus
            )

    @property
    def embedding(self) -> ModelEmbedding:
        """How texts become vectors."""
        return self._embedding

    @torch.no_grad()
    def choose(self, context: str, pairs: Sequence[Pair], *, budget: int) -> list[Chosen]:
        """The ``budget`` passages to read given ``context``, in order, the likeliest each time.

        Args:
            context: a question, or what was read.
            pairs: the pool; the policy looks at keys, and at the values of what it has chosen so far.
            budget: how many, at most as many as there are.

        Raises:
            ConfigError: an empty context, or a budget that the pool cannot give.
        """
        if not context.strip():
            raise ConfigError("the question is empty; say what the passages should be chosen for")
        if not 1 <= budget <= len(pairs):
            raise ConfigError(f"the budget must lie in 1..{len(pairs)} (the pool), got {budget}")
        places = list(range(len(pairs)))
        if len(places) > max(MAX_CANDIDATES, budget):
            found = self._corpus.lexicon.bm25([context], [pair.key for pair in pairs])[0]
            places = sorted(found.argsort(descending=True, stable=True)[: max(MAX_CANDIDATES, budget)].tolist())
        # The context stands where a pool has its held-out pairs; nothing is scored, so their values do not matter.
        asked = (Pair(0, context, context),) * NUM_HELD_OUT
        pool = Pool("asked", ("context",), (0,) * len(places), tuple(pairs[place] for place in places), (asked,))
        features = pool_features(
            pool,
            self._corpus,
            self._scorer,
            self._embedding,
            channels=self._channels,
            query_tokens=self._query_tokens,
        )
        cases = [Case(pool, "asked", 0, (0,))]
        batch = case_batch(cases, {pool.name: features}, self._scales, [torch.zeros(len(places), 1)])
        if self._encoder is not None:
            batch, _ = self._encoder.encode(cases, batch)
        readings = read(self._policy, batch, budget=budget, num_readings=1, generator=None)
        steps = zip(readings.picks[0, 0].tolist(), readings.log_probs[0, 0].exp().tolist(), strict=True)
        return [
            Chosen(places[pick], pairs[places[pick]].key, pairs[places[pick]].value, probability)
            for pick, probability in steps
        ]


def folder_pairs(folder: str | Path, *, language: str = "en") -> tuple[list[Pair], list[str]]:
    """Every sentence pair of the articles in ``folder``, and the title of the article of each."""
    pairs: list[Pair] = []
    titles: list[str] = []
    for path in article_folder(Path(folder)):
        article = read_file(path)
        try:
            found = sentence_pairs(article.text, language=language, min_characters=MIN_CHARACTERS)
        except DataError:
            continue  # a text without two sentences holds nothing to choose
        pairs += [replace(pair, index=len(pairs) + offset) for offset, pair in enumerate(found)]
        titles += [article.title] * len(found)
    if not pairs:
        raise DataError(f"no text in {folder} has two sentences to choose from")
    return pairs, titles
