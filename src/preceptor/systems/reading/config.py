"""Configuration of the reading system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from preceptor.config import Options

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


class ModelOptions(Options):
    """The policy."""

    name: str = Field("starter", description="Language model: 'starter', a local folder or a hub name.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the weights.")
    adapter_rank: int = Field(0, ge=0, description="Rank of a LoRA adapter; 0 trains every weight.")
    adapter_alpha: float = Field(16.0, description="Scale of the LoRA adapter: alpha / rank multiplies its update.")
    sharding: Literal["none", "full"] = Field(
        "none",
        description="Divide the layers' weights, gradients and optimizer state among the processes of a run, so that "
        "together they hold a model larger than a GPU (full), or give each process all of them.",
    )
    quantization: Literal["none", "4bit"] = Field(
        "none",
        description="Load the frozen weights under an adapter in 4 bits (NF4), which needs an NVIDIA GPU and the extra "
        "'quantized'; none keeps them in `dtype`.",
    )
    prompt: str = Field("{title}\n", description="What the policy reads first; {title} is the article's title.")
    use_chat_template: bool = Field(
        True, description="Mark queries and values as chat turns where the tokenizer has a chat template."
    )


class DataOptions(Options):
    """What is read."""

    article: str = Field("", description="File, URL or Wikipedia title; empty is the bundled article.")
    train_articles: str = Field("", description="Folder of articles to train on instead; each update reads one.")
    eval_articles: str = Field("", description="Folder of held-out articles, which are only evaluated.")
    language: str = Field("en", description="Language that sentences are split by, and Wikipedia's for titles.")
    pairing: Literal["sentences", "chunks"] = Field(
        "sentences", description="Whether pairs are sentences or token chunks of fixed length."
    )
    key_tokens: int = Field(24, ge=1, description="Length of a chunk's key in tokens (pairing: chunks).")
    value_tokens: int = Field(40, ge=1, description="Length of a chunk's value in tokens (pairing: chunks).")
    num_pairs: int = Field(
        8, ge=0, description="Maximum number of pairs per article, spread evenly over it; 0 takes all."
    )
    max_value_tokens: int = Field(
        48, ge=1, description="Maximum length of a value in tokens; longer pairs are skipped."
    )
    num_probes: int = Field(
        4, ge=0, description="Maximum number of values from further pairs that are held out as probe sentences."
    )


class EpisodeOptions(Options):
    """One reading of an article."""

    pool: Literal["one", "mixed"] = Field(
        "one", description="Read the pairs of one article, or choose among those of several (see study)."
    )
    budget: int = Field(0, ge=0, description="Number of pairs read per episode; 0 reads all.")
    query_tokens: int = Field(4, ge=1, description="Length of a query in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature of the query tokens; a greedy policy could not learn."
    )
    top_k: int = Field(0, ge=0, description="Sample query tokens from the k most likely; 0 samples from all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample query tokens from the smallest set that has this probability."
    )
    batch_size: int = Field(24, ge=1, description="Number of episodes of one article that run together.")


class SelectionOptions(Options):
    """How a query chooses a key."""

    embedder: Literal["hidden_states", "attention", "openai", "sentence_transformers"] = Field(
        "hidden_states", description="Embeds queries and keys; the first two pass gradient to the policy."
    )
    layer: int = Field(-2, description="Layer for hidden_states or attention; negative numbers count from the end.")
    text_model: str = Field(
        "", description="Model of the openai or sentence_transformers embedder; empty is its default."
    )
    text_dimension: int = Field(
        0, ge=0, description="Components of its vectors; 0 is OpenAI's own choice, other models must say it."
    )
    base_url: str = Field(
        "", description="Address of the openai embedder's service; empty is OPENAI_BASE_URL or OpenAI's own."
    )
    max_usd: float = Field(1.0, ge=0, description="Spending cap of the openai embedder in US dollars.")
    centre: bool = Field(True, description="Subtract the mean key from queries and keys.")
    projection: bool = Field(
        True, description="Apply a learned linear map to the query's vector, initialised to the identity."
    )
    temperature: float = Field(
        0.0, ge=0, description="Temperature of the softmax over inner products with keys; 0 calibrates it at the start."
    )
    entropy_fraction: float = Field(
        0.9, gt=0, lt=1, description="Calibration target: mean selection entropy over ln(number of remaining pairs)."
    )


class RewardOptions(Options):
    """What a reading is worth."""

    kind: Literal["values", "probe"] = Field(
        "values", description="Reward the log-probability of the values read, or of the probe sentences."
    )
    reader: str = Field(
        "", description="Model that scores; empty is the untrained policy, 'policy' the policy as it learns."
    )
    context: Literal["values", "queries"] = Field(
        "values", description="What the reader sees: the values alone, or the queries too."
    )
    normalisation: Literal["none", "untrained_query", "untrained_reader"] = Field(
        "none", description="Subtract the reward of the untrained model's query, or under the untrained reader."
    )
    credit: Literal["following", "trajectory"] = Field(
        "following", description="Credit a step with the rewards that follow it, or with those of the whole episode."
    )
    pair_baseline: bool = Field(
        True, description="Subtract each value's running mean log-probability from its reward before crediting."
    )


class UpdateOptions(Options):
    """How the policy learns."""

    steps: int = Field(45, ge=0, description="Number of updates; each uses one batch of episodes.")
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="Adam with or without decoupled weight decay.")
    learning_rate: float = Field(1e-4, ge=0, description="Learning rate of the language model.")
    projection_learning_rate: float = Field(1e-3, ge=0, description="Learning rate of the query projection.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of adamw.")
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Maximum global gradient norm; .inf clips nothing."
    )
    micro_batch_size: int = Field(
        0,
        ge=0,
        description="Number of episodes per backward pass; 0 is the whole batch, halved while memory runs out.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep each layer's input alone for the backward pass and compute the rest again: less memory, "
        "about a third more time.",
    )
    reward_filter: Literal["none", "standard_deviations", "best_fraction"] = Field(
        "none", description="Which trajectories are learned from."
    )
    filter_standard_deviations: float = Field(
        1.0, description="Standard deviations above the running mean (reward_filter: standard_deviations)."
    )
    filter_warm_up: int = Field(
        15, ge=0, description="Number of trajectories before any is kept (reward_filter: standard_deviations)."
    )
    filter_fraction: float = Field(
        0.25, gt=0, le=1, description="Fraction of a batch that is kept (reward_filter: best_fraction)."
    )
    advantage: Literal["leave_one_out", "group_normalised", "running_mean"] = Field(
        "group_normalised",
        description="Reward minus the others' mean, the same over the standard deviation, or minus the running mean.",
    )
    query_coefficient: float = Field(1.0, description="Weight of the policy gradient on query tokens.")
    selection_coefficient: float = Field(
        1.0, description="Weight of the policy gradient on selections (embedders with gradient)."
    )
    kl_reference: Literal["untrained", "snapshot"] = Field(
        "untrained", description="Reference model of both KL terms: the untrained one, or a recent snapshot."
    )
    snapshot_every: int = Field(
        10, ge=1, description="Number of updates between refreshes of the snapshot (kl_reference: snapshot)."
    )
    value_kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the exact KL on value tokens in nats; 0 skips it."
    )
    query_kl_coefficient: float = Field(
        0.02, ge=0, description="Weight of the exact KL on query tokens in nats; 0 lets queries collapse."
    )
    query_entropy_coefficient: float = Field(0.0, description="Weight of the entropy bonus on query tokens.")
    selection_entropy_coefficient: float = Field(
        0.0, description="Weight of the entropy bonus on selections (embedders with gradient)."
    )


class EvaluationOptions(Options):
    """What is measured at the end (and on the way)."""

    every: int = Field(
        5,
        ge=0,
        description="Number of updates between measurements on the training article; 0 measures at the end only.",
    )
    num_episodes: int = Field(32, ge=1, description="Number of episodes of each sampled baseline per article.")
    num_orders: int = Field(200, ge=2, description="Number of random orders per article; percentiles need 200.")
    selection_budget: int = Field(
        0, ge=0, description="Number of pairs read for the selection gain; 0 is half of them."
    )
    beam_width: int = Field(8, ge=1, description="Width of the beam search.")
    best_of: int = Field(
        0,
        ge=0,
        description="Number of orders that best_of_n tries; 0 matches the training's model calls, at most 2,000.",
    )
    max_train_articles: int = Field(12, ge=1, description="Maximum number of training articles evaluated at the end.")


class StudyOptions(Options):
    """Choosing passages from mixed pools (`episode.pool` mixed); pools are the same under every seed of a run."""

    mode: Literal["both", "asked", "seed"] = Field(
        "both", description="What the context holds: questions about the target article, one of its sentences, or both."
    )
    num_questions: int = Field(1, ge=1, le=3, description="Number of questions in the context (mode: asked).")
    num_distractors: int = Field(2, ge=1, description="Number of other articles in a pool.")
    distractors: str = Field(
        "",
        description="Folder of further texts from which half of the distractors are drawn; they are never asked for.",
    )
    num_train_pools: int = Field(64, ge=1, description="Number of pools to learn from; each article leads in turn.")
    num_eval_pools: int = Field(24, ge=1, description="Number of pools of held-out articles.")
    pool_seed: int = Field(0, ge=0, description="Seed of the pools and of the random baselines.")
    channels: tuple[Literal["late_interaction", "bm25", "tfidf", "query_likelihood", "written_query"], ...] = Field(
        ("late_interaction", "bm25", "tfidf"),
        description="Similarities that the policy weighs beside the cosine. written_query compares keys with "
        "`episode.query_tokens` tokens that the model writes after the context.",
    )
    num_rounds: int = Field(3, ge=0, description="Rounds of message passing between candidates; 0 is none.")
    num_readings: int = Field(8, ge=2, description="Number of readings of each case in an update.")
    cases_per_update: int = Field(24, ge=1, description="Number of cases in an update.")
    learning_rate: float = Field(
        0.03, ge=0, description="Learning rate of the temperature and of the channels' weights."
    )
    real_steps: int = Field(
        0,
        ge=0,
        description="Number of last updates whose readings are really read; before, a reading is worth the "
        "mean of its candidates read alone.",
    )
    model_steps: int = Field(
        0,
        ge=0,
        description="Number of last updates in which the weights of the policy's model learn too, by "
        "`update.learning_rate`; the reader stays as it is.",
    )
    judged_by: Literal["reading", "table"] = Field(
        "reading",
        description="Really read what a method chose, or take the mean of its candidates read alone, which is fast.",
    )
    num_random: int = Field(8, ge=2, description="Random readings of each held-out case.")
    num_samples: int = Field(2, ge=1, description="Readings of each held-out case by a policy that samples.")


class ReadingConfig(Options):
    """Configuration of ``preceptor run reading``."""

    renamed: ClassVar = {"update.optimiser": "update.optimizer"}

    seed: int = Field(0, description="Seed of every random stream.")
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    episode: EpisodeOptions = EpisodeOptions()
    selection: SelectionOptions = SelectionOptions()
    reward: RewardOptions = RewardOptions()
    update: UpdateOptions = UpdateOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    study: StudyOptions = StudyOptions()
    save_every: int = Field(10, ge=1, description="Number of updates between checkpoints.")
    record_every: int = Field(
        1, ge=1, description="Number of updates between training episodes recorded in decisions.jsonl."
    )
    shuffle_rewards: bool = Field(
        False, description="Control: shuffle the rewards within each batch, so that nothing can be learned."
    )

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.episode.pool == "mixed":
            yield from self._study_conflicts()
            return
        if self.data.num_pairs == 1 or self.episode.budget > self.data.num_pairs > 0:
            yield (
                f"`episode.budget` must be at most `data.num_pairs`, which must be at least 2 (or 0 for all), got "
                f"{self.episode.budget} of {self.data.num_pairs}"
            )
        if self.data.article and self.data.train_articles:
            yield "`data.article` and `data.train_articles` exclude each other; give one of them"
        if self.reward.kind == "probe" and self.data.num_probes == 0:
            yield "`reward.kind` probe needs `data.num_probes` of at least 1, got 0"
        if self.reward.normalisation == "untrained_reader" and self.reward.reader != "policy":
            yield (
                "`reward.normalisation` untrained_reader is identically zero under a frozen reader, which is its own "
                "untrained self; set `reward.reader` to 'policy', or choose untrained_query or none"
            )
        if self.reward.normalisation == "untrained_query" and (self.reward.context, self.reward.kind) != (
            "queries",
            "values",
        ):
            yield (
                "`reward.normalisation` untrained_query compares queries in the reader's context, so it needs "
                "`reward.context` queries and `reward.kind` values"
            )
        if self.model.quantization == "4bit" and not self.model.adapter_rank:
            yield (
                "`model.quantization` 4bit freezes the weights, so an adapter must learn; set `model.adapter_rank` or "
                "`model.quantization` to none"
            )
        if self.model.quantization == "4bit" and self.model.sharding == "full":
            yield "`model.quantization` 4bit and `model.sharding` full exclude each other; give one of them"
        if self.model.sharding == "full" and self.update.kl_reference == "snapshot":
            yield (
                "`update.kl_reference` snapshot copies whole weights, which no process has where `model.sharding` is "
                "full; use untrained"
            )
        if "{title}" in self.model.prompt and self.model.prompt.replace("{title}", "").count("{"):
            yield "`model.prompt` may hold {title} and no other braces"
        if self.update.advantage != "running_mean" and self.episode.batch_size == 1:
            yield (
                f"`update.advantage` {self.update.advantage} compares episodes of a batch, so `episode.batch_size` "
                f"must be at least 2, got {self.episode.batch_size}; or use running_mean"
            )

    def _study_conflicts(self) -> Iterator[str]:
        study, candidates = self.study, self.data.num_pairs * (1 + self.study.num_distractors)
        if self.data.num_pairs < 2:
            yield (
                f"`data.num_pairs` is the number of pairs of each article in a pool, at least 2, got "
                f"{self.data.num_pairs}"
            )
        elif not 1 <= self.episode.budget <= candidates:
            yield (
                f"`episode.budget` must lie in 1..{candidates} (the pool) where `episode.pool` is mixed, got "
                f"{self.episode.budget}"
            )
        if self.model.sharding == "full":
            yield "`model.sharding` full is not available in a study, whose reader is frozen; leave it none"
        if bool(self.data.train_articles) != bool(self.data.eval_articles):
            yield (
                "a study needs articles to learn from and articles to be judged on; give both `data.train_articles` "
                "and `data.eval_articles`, or neither for the bundled texts"
            )
        if study.real_steps > self.update.steps:
            yield f"`study.real_steps` must be at most `update.steps`, got {study.real_steps} of {self.update.steps}"
        if study.model_steps > self.update.steps:
            yield f"`study.model_steps` must be at most `update.steps`, got {study.model_steps} of {self.update.steps}"
        if self.model.adapter_rank and not study.model_steps:
            yield (
                "`model.adapter_rank` gives a study's model an adapter, which learns in the last `study.model_steps` "
                "updates alone; set that to 1 or more, or `model.adapter_rank` to 0"
            )
        if self.data.article:
            yield (
                f"a study reads pools of several articles, `data.article` is one ({self.data.article}); give folders "
                "as `data.train_articles` and `data.eval_articles`, or take a preset for one article"
            )
        if len(set(study.channels)) < len(study.channels):
            yield f"`study.channels` must be different from each other, got {', '.join(study.channels)}"
        if self.model.quantization == "4bit":
            yield "`model.quantization` 4bit is not available in a study, whose model reads and embeds; leave it none"


Config = ReadingConfig
