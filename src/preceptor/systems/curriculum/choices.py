"""The names that a configuration may use, each with the line that ``preceptor list`` shows."""

from __future__ import annotations

RULES = {
    "second_order": "weights move along the change over time of mean + variance of the losses, with a velocity",
    "learning_progress": "fast minus slow average of the loss: what is being learned now",
    "difficulty": "the loss itself",
    "exp3": "Exp3 with the loss as reward (ODM)",
    "ado": "the slope of a power law fitted to each loss (ADO)",
    "proportional": "the sizes of the datasets, fixed",
    "uniform": "all alike, fixed",
    "static": "given weights, fixed",
}
FIXED_RULES = ("proportional", "uniform", "static")
"""Rules that no measurement moves."""

REWARDS = {
    "repetition": "minus the share of tokens that repeat the token before them (the method's text)",
    "repeated_bigrams": "minus the share of tokens that complete a pair of tokens seen before",
    "log_likelihood": "log-probability under the rolling frozen model, nats per token",
    "overlap": "F1 of the tokens with those of the true continuation",
    "distinct": "distinct pairs of tokens over all pairs",
    "length": "share of the allowed tokens written before an end",
}
ADVANTAGES = {
    "gae": "generalised advantage estimation with a value network (PPO)",
    "rloo": "against the other continuations of the prompt",
    "grpo": "against the group's mean, over its standard deviation",
    "dr_grpo": "against the group's mean",
    "reinforce_plus_plus": "the reward to go, whitened over the batch",
}
LOSSES = {
    "clip": "PPO's clipped ratio, asymmetric if asked",
    "cispo": "REINFORCE with a truncated importance weight",
    "gspo": "PPO's clip on one ratio a sequence",
    "reinforce": "no ratio at all",
}
KL_PLACES = {
    "none": "no KL to the reference",
    "reward_k1": "k1 of each token subtracted from its reward",
    "loss_k2": "k2 in the loss",
    "loss_k3": "k3 in the loss (GRPO's)",
    "loss_exact": "over the whole vocabulary, in the loss",
}
BUILTIN = {
    "code": "source files of Python's standard library, as installed",
    "manual": "Python's own reference manual, as installed (pydoc topics)",
    "dialogue": "short dialogues and sums from a small grammar",
    "noise": "random letters, which nothing can be learned from",
}
