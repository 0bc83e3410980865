"""Configuration of PPO on rollouts, and of the engine that writes them; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from preceptor.config import Options, is_service_url


class RewardOptions(Options):
    """One term of the reward."""

    name: str = Field("", description="A built-in term or module:function.")
    weight: float = Field(1.0, description="Factor of the term.")
    timeout: float = Field(
        300.0, ge=0, description="Seconds that one call of a function of your own may take; 0 sets no limit."
    )


class PPOOptions(Options):
    """Policy gradient on continuations of the documents' first tokens."""

    weight: float = Field(1.0, ge=0, description="Weight of the policy-gradient loss; 0 writes no rollouts.")
    prompts: int = Field(16, ge=1, description="Number of prompts per step.")
    group_size: int = Field(
        1, ge=1, description="Number of continuations per prompt; at least 2 for rloo, grpo and dr_grpo."
    )
    prompt_tokens: int = Field(
        16, ge=1, description="Number of a document's first tokens that make a prompt, at most half of it."
    )
    prompt_rule: Literal["mixture", "uniform", "mean_advantage", "upper_confidence"] = Field(
        "mixture",
        description="What prompts' datasets are drawn by: the mixture's weights, even ones, or a rule of their own "
        "that follows the mean absolute advantage of each dataset's continuations.",
    )
    continuation_tokens: int = Field(24, ge=1, description="Maximum length of a continuation in tokens.")
    temperature: float = Field(0.7, gt=0, description="Sampling temperature of the rollouts.")
    rewards: tuple[RewardOptions, ...] = Field(
        (
            RewardOptions(name="repetition", weight=5.0),
            RewardOptions(name="repeated_bigrams", weight=5.0),
            RewardOptions(name="overlap", weight=1.0),
        ),
        description="Weighted terms of the reward.",
    )
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus"] = Field(
        "gae", description="Advantage estimator; gae uses a value network."
    )
    discount: float = Field(1.0, ge=0, le=1, description="Discount (gamma) per token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of gae.")
    whiten_advantages: bool = Field(True, description="Whiten the advantages of gae over the tokens of the batch.")
    loss: Literal["clip", "cispo", "gspo", "reinforce"] = Field("clip", description="Policy loss.")
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean", description="How the policy loss is averaged."
    )
    clip_epsilon_low: float = Field(0.2, gt=0, lt=1, description="How far the ratio may fall below 1.")
    clip_epsilon_high: float = Field(
        0.2, gt=0, allow_inf_nan=True, description="How far the ratio may rise above 1; 0.28 is clip-higher."
    )
    dual_clip: float = Field(
        0.0, description="Bound of the loss where the advantage is negative, above 1; 0 for none (loss: clip)."
    )
    value_clip_epsilon: float = Field(
        0.2, ge=0, description="How far a value may move before its loss is clipped, in reward units; 0 never clips."
    )
    max_ratio: float = Field(5.0, gt=0, allow_inf_nan=True, description="Largest importance weight (loss: cispo).")
    epochs: int = Field(2, ge=1, description="Number of passes over a batch of rollouts.")
    minibatches: int = Field(2, ge=1, description="Number of optimizer steps per pass.")
    kl_place: Literal["none", "reward_k1", "loss_k2", "loss_k3", "loss_exact"] = Field(
        "reward_k1", description="Where the KL to the reference enters, and how it is estimated."
    )
    kl_reference: Literal["frozen", "untrained"] = Field(
        "frozen", description="The rolling frozen model, or the untrained one, which cross-entropy leads away from."
    )
    kl_coefficient: float = Field(
        0.1, ge=0, description="Weight of the KL (beta) in reward per nat; initial value of an adaptive one."
    )
    kl_target: float = Field(
        0.1, ge=0, description="KL in nats per token that an adaptive beta aims at; 0 keeps beta fixed."
    )
    kl_horizon: float = Field(
        200.0,
        gt=0,
        allow_inf_nan=True,
        description="Number of continuations over which beta moves by 20 % (Ziegler et al. 2019).",
    )
    kl_early_stop: float = Field(
        0.0, ge=0, description="KL to the sampling policy in nats per token at which a step's PPO ends; 0 never stops."
    )
    generator: Literal["own", "transformers", "vllm"] = Field(
        "own", description="Engine that writes the rollouts: Preceptor's, Transformers' generate, or a vLLM server."
    )
    generator_url: str = Field(
        "", description="Address of the vLLM server (generator: vllm), such as http://host:8000."
    )
    generator_max_gap: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=True,
        description="Mean difference between the engine's and the policy's log-probabilities of the sampled tokens, in "
        "nats per token, above which a run stops (another generator than own).",
    )
    generator_max_weight: float = Field(
        2.0,
        ge=1,
        allow_inf_nan=True,
        description="Largest importance weight, policy over engine, of a sampled token (another generator than own).",
    )

    def generator_conflicts(self, *, adapter: bool) -> Iterator[str]:
        """Values of the generator that do not go together; ``adapter`` is whether the policy is a LoRA adapter."""
        if self.generator != "vllm":
            if self.generator_url:
                yield f"`ppo.generator_url` goes with `ppo.generator` vllm alone, got it with {self.generator}"
            return
        # Not repeated: one that holds user:password@ or ?key= is a secret.
        if not is_service_url(self.generator_url) or "?" in self.generator_url:
            yield (
                "`ppo.generator_url` must be http(s)://host:port, without a user name or a query, where "
                "`ppo.generator` is vllm; give the address of a running server"
            )
        if adapter:
            yield "`ppo.generator` vllm is sent whole weights, so `model.adapter_rank` must be 0; use transformers"
