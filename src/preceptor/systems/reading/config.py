"""Configuration of the reading system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from preceptor.config import option

FLAGS = {
    "model": "model.name",
    "seed": "seed",
    "article": "data.article",
    "train_articles": "data.train_articles",
    "eval_articles": "data.eval_articles",
}
"""Command-line flags that stand for configuration keys."""

CHOICES = {
    "arms": {
        "learned": "the policy after training, sampling its choices",
        "untrained": "the policy before training",
        "random": "the mean over random orders",
        "document": "the article's own order",
        "reverse": "the article backwards",
        "nearest_chain": "always the pair most similar to the last one",
        "farthest_first": "always the pair least similar to all that were read",
        "mmr": "maximal marginal relevance: like the article, unlike what was read",
        "easy_to_hard": "by the reader's own loss on each value alone, easiest first",
        "hard_to_easy": "the same, hardest first",
        "best_of_n": "the best of as many random orders as the learned arm's training cost",
        "greedy": "oracle: always the value that is likeliest now",
        "beam": "oracle: beam search over orders",
        "local_search": "oracle: best swap or move from the beam's order, until none helps",
        "exhaustive": "oracle: every order (at most 7 pairs)",
        "probe_greedy": "oracle of the probe: always the value that helps the probe most",
    },
    "rewards": {
        "values": "log-probability of the values in the order in which they were read",
        "probe": "log-probability of held-out sentences after everything was read",
    },
    "normalisations": {
        "none": "the reward as it is",
        "untrained_query": "less what a value gets after the untrained model's query in the same place",
        "untrained_reader": "less what the untrained policy gives the same text (the reader learns)",
    },
    "filters": {
        "none": "every trajectory teaches",
        "standard_deviations": "those above the running mean by so many standard deviations",
        "best_fraction": "the best share of each batch",
    },
    "embedders": {
        "hidden_states": "the model's own hidden states at a layer; carries gradient",
        "attention": "the model's own query and key projections at a layer; carries gradient",
        "openai": "OpenAI's embeddings; needs a key, no gradient",
        "sentence_transformers": "a local text embedder; needs the extra, no gradient",
    },
}
"""What ``preceptor list`` shows."""

INPUTS = {"articles": "data.article"}
"""Options of ``preceptor compare`` whose every value makes a run, and the key that it sets."""


@dataclass(frozen=True)
class ModelOptions:
    """The policy."""

    name: str = option("starter", "'starter', a local folder or a hub name")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights")
    adapter_rank: int = option(0, "rank of a LoRA adapter; 0 trains every weight", within="[0, inf)")
    adapter_alpha: float = option(16.0, "scale of the LoRA adapter (alpha / rank multiplies its update)")
    prompt: str = option("{title}\n", "what the policy reads first; {title} is the article's")
    use_chat_template: bool = option(True, "wrap queries and values in turns where the tokenizer has a chat template")


@dataclass(frozen=True)
class DataOptions:
    """What is read."""

    article: str = option("", "file, URL or Wikipedia title; empty is the bundled article")
    train_articles: str = option("", "folder of articles to train on instead; each update reads one")
    eval_articles: str = option("", "folder of held-out articles, evaluated only")
    language: str = option("en", "Wikipedia language of titles")
    pairing: Literal["sentences", "chunks"] = option("sentences", "pairs of sentences, or of fixed-length token chunks")
    key_tokens: int = option(24, "tokens of a chunk's key (pairing: chunks)", within="[1, inf)")
    value_tokens: int = option(40, "tokens of a chunk's value (pairing: chunks)", within="[1, inf)")
    num_pairs: int = option(
        8, "pairs of an article that can be read, at most, spread evenly over it; 0 takes all", within="[0, inf)"
    )
    max_value_tokens: int = option(48, "pairs with a longer value are passed over (tokens)", within="[1, inf)")
    num_probes: int = option(4, "values of further pairs held out as probe sentences, at most", within="[0, inf)")


@dataclass(frozen=True)
class EpisodeOptions:
    """One reading of an article."""

    budget: int = option(0, "pairs read in an episode; 0 reads all", within="[0, inf)")
    query_tokens: int = option(4, "tokens of a query", within="[1, inf)")
    temperature: float = option(1.0, "of query sampling", within="(0, inf)", hint="a greedy policy cannot learn")
    top_k: int = option(0, "query tokens are drawn from the k likeliest; 0 is all", within="[0, inf)")
    top_p: float = option(1.0, "query tokens are drawn from the smallest set with this probability", within="(0, 1]")
    batch_size: int = option(24, "episodes of one article that run together", within="[1, inf)")


@dataclass(frozen=True)
class SelectionOptions:
    """How a query chooses a key."""

    embedder: Literal["hidden_states", "attention", "openai", "sentence_transformers"] = option(
        "hidden_states", "what makes vectors of queries and keys; the first two carry gradient into the policy"
    )
    layer: int = option(-2, "layer of hidden_states or attention (negative counts from the end)")
    text_model: str = option("", "model of the openai or sentence_transformers embedder; empty is its default")
    max_usd: float = option(1.0, "spend cap of the openai embedder (US dollars)", within="[0, inf)")
    centre: bool = option(True, "subtract the mean key from queries and keys")
    projection: bool = option(True, "a learned linear map on the query's vector, started at the identity")
    temperature: float = option(
        0.0, "of the softmax over keys (units of the inner product); 0 calibrates at the start", within="[0, inf)"
    )
    entropy_fraction: float = option(0.9, "calibration target: mean selection entropy / ln(remaining)", within="(0, 1)")


@dataclass(frozen=True)
class RewardOptions:
    """What a reading is worth."""

    kind: Literal["values", "probe"] = option("values", "log-probability of the values read, or of the probe sentences")
    reader: str = option("", "model that scores; empty is the untrained policy, 'policy' the policy as it learns")
    context: Literal["values", "queries"] = option("values", "what the reader sees: values alone, or the queries too")
    normalisation: Literal["none", "untrained_query", "untrained_reader"] = option(
        "none", "subtract what a value gets after the untrained model's query, or from the untrained reader"
    )
    credit: Literal["following", "trajectory"] = option(
        "following", "a step is credited with what follows it, or with all"
    )
    pair_baseline: bool = option(True, "subtract each value's running mean log-prob from its reward before crediting")


@dataclass(frozen=True)
class UpdateOptions:
    """How the policy learns."""

    steps: int = option(30, "updates; each is one batch of episodes", within="[0, inf)")
    optimiser: Literal["adamw", "adam"] = option("adamw", "Adam with or without decoupled weight decay")
    learning_rate: float = option(1e-4, "of the language model", within="[0, inf)")
    projection_learning_rate: float = option(1e-3, "of the query projection", within="[0, inf)")
    weight_decay: float = option(0.0, "of adamw", within="[0, inf)")
    clip_norm: float = option(1.0, "global gradient norm", within="(0, inf]", hint=".inf clips nothing")
    micro_batch_size: int = option(
        0, "episodes per backward pass, for less memory; 0 is the whole batch", within="[0, inf)"
    )
    reward_filter: Literal["none", "standard_deviations", "best_fraction"] = option("none", "which trajectories teach")
    filter_standard_deviations: float = option(1.0, "above the running mean (reward_filter: standard_deviations)")
    filter_warm_up: int = option(
        15, "trajectories before any passes (reward_filter: standard_deviations)", within="[0, inf)"
    )
    filter_fraction: float = option(0.25, "of a batch that passes (reward_filter: best_fraction)", within="(0, 1]")
    advantage: Literal["leave_one_out", "group_normalised", "running_mean"] = option(
        "group_normalised", "against the rest of the batch, the same over its standard deviation, or the running mean"
    )
    query_coefficient: float = option(1.0, "weight of the query tokens' policy gradient")
    selection_coefficient: float = option(1.0, "weight of the selection's policy gradient (embedders with gradient)")
    kl_reference: Literal["untrained", "snapshot"] = option("untrained", "the old model of both KL terms")
    snapshot_every: int = option(
        10, "updates between refreshes of the snapshot (kl_reference: snapshot)", within="[1, inf)"
    )
    value_kl_coefficient: float = option(
        0.0, "KL on value tokens, exact over the vocabulary (the text's); 0 skips it", within="[0, inf)"
    )
    query_kl_coefficient: float = option(
        0.02, "KL on query tokens, exact over the vocabulary; 0 lets queries collapse", within="[0, inf)"
    )
    query_entropy_coefficient: float = option(0.0, "entropy bonus on query tokens")
    selection_entropy_coefficient: float = option(0.0, "entropy bonus on the selection (embedders with gradient)")


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured at the end (and on the way)."""

    every: int = option(
        5, "updates between measurements of the learned arm on the training article; 0 never", within="[0, inf)"
    )
    num_episodes: int = option(32, "episodes of each sampled arm an article", within="[1, inf)")
    num_orders: int = option(200, "random orders an article, at least 200 for a percentile", within="[2, inf)")
    selection_budget: int = option(0, "pairs read for the selection gain; 0 is half of them", within="[0, inf)")
    beam_width: int = option(8, "of the beam oracle", within="[1, inf)")
    best_of: int = option(
        0,
        "random orders of the best-of-N arm; 0 matches the learned arm's model calls, capped at 2,000",
        within="[0, inf)",
    )
    max_train_articles: int = option(12, "training articles evaluated at the end", within="[1, inf)")


@dataclass(frozen=True)
class ReadingConfig:
    """Configuration of ``preceptor run reading``."""

    seed: int = option(0, "of every random stream")
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    episode: EpisodeOptions = field(default_factory=EpisodeOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    save_every: int = option(10, "updates between checkpoints", within="[1, inf)")
    record_every: int = option(1, "updates between recorded training episodes in decisions.jsonl", within="[1, inf)")
    shuffle_rewards: bool = option(False, "control: shuffle the rewards within each batch, which must teach nothing")

    def faults(self) -> list[str]:
        """What is at odds in this configuration, besides numbers out of their range."""
        found = []
        if self.data.num_pairs == 1 or self.episode.budget > self.data.num_pairs > 0:
            found.append(
                f"`episode.budget` must be at most `data.num_pairs`, which must be at least 2 (or 0 for all), got "
                f"{self.episode.budget} of {self.data.num_pairs}"
            )
        if self.data.article and self.data.train_articles:
            found.append("`data.article` and `data.train_articles` exclude each other; give one of them")
        if self.reward.kind == "probe" and self.data.num_probes == 0:
            found.append("`reward.kind` probe needs `data.num_probes` of at least 1, got 0")
        if self.reward.normalisation == "untrained_reader" and self.reward.reader != "policy":
            found.append(
                "`reward.normalisation` untrained_reader is identically zero under a frozen reader, which is its own "
                "untrained self; set `reward.reader` to 'policy', or choose untrained_query or none"
            )
        if self.reward.normalisation == "untrained_query" and (self.reward.context, self.reward.kind) != (
            "queries",
            "values",
        ):
            found.append(
                "`reward.normalisation` untrained_query compares queries in the reader's context, so it needs "
                "`reward.context` queries and `reward.kind` values"
            )
        if "{title}" in self.model.prompt and self.model.prompt.replace("{title}", "").count("{"):
            found.append("`model.prompt` may hold {title} and no other braces")
        if self.update.advantage != "running_mean" and self.episode.batch_size == 1:
            found.append(
                f"`update.advantage` {self.update.advantage} compares episodes of a batch, so `episode.batch_size` "
                f"must be at least 2, got {self.episode.batch_size}; or use running_mean"
            )
        return found


Config = ReadingConfig
