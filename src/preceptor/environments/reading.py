"""Reading as a task: in which order are the pairs of an article read, so that a frozen reader is least surprised?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.environments.episodes import Episode, Reading, require_over
from preceptor.errors import ConfigError
from preceptor.lm.embedding import MODEL_EMBEDDINGS, ModelEmbedding, key_vectors
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.runs.device import parse_dtype
from preceptor.systems.reading.articles import load_articles
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.environment import check_budget
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.rewards import LanguageModelReader, probe_rewards, value_rewards
from preceptor.systems.reading.setup import tokenize_articles


class ReadingTask:
    """The articles of a configuration of ``reading``; problem i is the i-th article.

    An episode chooses ``episode.budget`` pairs (all of them where that is 0). Its reward, in nats per token, is what
    ``preceptor run reading`` records for the same order, before normalisation: the mean log-probability of the values
    under the frozen reader, or of the probe after them (``reward.kind``).

    Args:
        config: of reading; of its ``model`` the untrained weights, which also embed keys and texts.
        split: ``train`` or ``held_out``, the articles of ``data.eval_articles``.
        cache_dir: of downloaded articles.
        device: of the models.

    Raises:
        ConfigError: what an environment cannot do: a reader that learns, a reward that needs the policy's queries.
        DataError: an article is missing, or its pairs do not fit the context.
    """

    name = "reading"

    def __init__(
        self, config: ReadingConfig, *, split: str = "train", cache_dir: Path, device: torch.device | None = None
    ) -> None:
        _refuse(config, split)
        device = device or torch.device("cpu")
        self.config = config
        self.lm = load_language_model(config.model.name, device=device, dtype=parse_dtype(config.model.dtype))
        self.lm.model.requires_grad_(False)
        self._embedding = MODEL_EMBEDDINGS[config.selection.embedder](self.lm, layer=config.selection.layer)
        loaded = load_articles(config.data, self.lm, cache_dir=cache_dir)
        pairs = loaded.train if split == "train" else loaded.held_out
        articles = tokenize_articles(pairs, self.lm, config.model, kept={})
        self.reader = LanguageModelReader(self.lm)
        if config.reward.reader:
            reader_lm = load_language_model(config.reward.reader, device=device)
            reader_lm.model.requires_grad_(False)
            own = tokenize_articles(pairs, reader_lm, config.model, kept={})
            self.reader = LanguageModelReader(reader_lm, policy_lm=self.lm, articles=own)
        self.articles = tuple(articles.values())
        if not self.articles:
            raise ConfigError("there is no article to read: split held_out needs `data.eval_articles`")
        for article in map(self.reader.article, self.articles):
            check_budget(self.reader.lm.context_length, article, budget=self.budget(article.num_pairs), query_tokens=0)
        # A policy embeds the keys, so that they are the system's own; it never samples.
        policy = Policy(self.lm, sampling=Sampling(), embedding=self._embedding, centre=config.selection.centre)
        self._keys = [policy.embed_keys(article) for article in self.articles]

    def __len__(self) -> int:
        return len(self.articles)

    def budget(self, num_pairs: int) -> int:
        """Pairs that an episode reads of an article of ``num_pairs``."""
        return min(self.config.episode.budget or num_pairs, num_pairs)

    def keys(self, index: int) -> Float[Tensor, "pairs dimension"]:
        """Key vectors of article ``index``, less their mean."""
        return self._keys[index].vectors.cpu()

    def episode(self, index: int) -> Reading:
        """A new reading of article ``index``; its prompt is the policy's, ``model.prompt``."""
        article, keys = self.articles[index], self._keys[index]

        def nearest(text: str, available: list[bool]) -> int:
            vector = text_vector(self.lm, self._embedding, text) - keys.centre
            return nearest_key(keys.vectors, vector, available)

        return Reading(
            index=index,
            prompt=self.config.model.prompt.replace("{title}", article.pairs.title),
            num_turns=self.budget(article.num_pairs),
            values=article.pairs.values,
            nearest=nearest,
        )

    def rewards(self, episodes: Sequence[Episode]) -> list[float]:
        """Nats per value token (or probe token) of each reading."""
        require_over(episodes)
        probe = self.config.reward.kind == "probe"
        sequences = [
            self.reader.article(self.articles[each.index]).reader_sequence(each.choices, with_probe=probe)
            for each in episodes
        ]
        # One measurement for each number of steps: articles may differ in it, and a batch of rewards is a rectangle.
        scores = self.reader.score(sequences)
        measure = probe_rewards if probe else value_rewards
        found = [0.0] * len(episodes)
        for steps in {len(each.choices) for each in episodes}:
            rows = [row for row, each in enumerate(episodes) if len(each.choices) == steps]
            totals = measure([scores[row] for row in rows]).total.tolist()
            for row, total in zip(rows, totals, strict=True):
                found[row] = total
        return found


def text_vector(lm: LanguageModel, embedding: ModelEmbedding, text: str) -> Float[Tensor, " dimension"]:
    """The vector of ``text``, embedded as a key is; a text without tokens is a full stop."""
    tokens = lm.encode(text)[: lm.context_length - 1] or lm.encode(".")
    return key_vectors(lm, embedding, [tokens])[0]


def nearest_key(
    keys: Float[Tensor, "choices dimension"], vector: Float[Tensor, " dimension"], available: Sequence[bool]
) -> int:
    """The available key with the largest inner product; of equals the first."""
    scores = (keys @ vector).masked_fill(~torch.tensor(available, device=keys.device), -torch.inf)
    return int(scores.argmax())


def _refuse(config: ReadingConfig, split: str) -> None:
    """What an environment cannot do, all of it in one error."""
    faults = []
    if split not in ("train", "held_out"):
        faults.append(f"`split` of reading must be train or held_out, got {split!r}")
    if config.episode.pool != "one":
        faults.append("the task reading needs `episode.pool` one, got mixed; the task study reads mixed pools")
    if config.reward.reader == "policy":
        faults.append("`reward.reader` policy learns, and an environment's reader is frozen; leave it empty")
    if config.reward.context == "queries":
        faults.append(
            "`reward.context` queries needs the queries of Preceptor's own policy, which another trainer does not "
            "write; set it to values"
        )
    if config.selection.embedder not in MODEL_EMBEDDINGS:
        faults.append(
            f"`selection.embedder` must be one of {', '.join(MODEL_EMBEDDINGS)} in an environment, got "
            f"{config.selection.embedder}"
        )
    if faults:
        raise ConfigError(*faults)
