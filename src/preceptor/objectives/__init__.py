"""The mathematics of learning from rewards: tensors in, tensors out; needs torch alone.

A loss ends in ``_loss`` and is minimised. A mask is always "True = counts". Randomness is an explicit generator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preceptor.objectives.advantages import *  # noqa: F403
    from preceptor.objectives.aggregation import *  # noqa: F403
    from preceptor.objectives.filters import *  # noqa: F403
    from preceptor.objectives.kl import *  # noqa: F403
    from preceptor.objectives.mixture import *  # noqa: F403
    from preceptor.objectives.mixture_controls import *  # noqa: F403
    from preceptor.objectives.mixture_rules import *  # noqa: F403
    from preceptor.objectives.mixture_targets import *  # noqa: F403
    from preceptor.objectives.next_token import *  # noqa: F403
    from preceptor.objectives.policy_gradient import *  # noqa: F403
    from preceptor.objectives.sac import *  # noqa: F403
    from preceptor.objectives.selection import *  # noqa: F403
    from preceptor.objectives.statistics import *  # noqa: F403
    from preceptor.objectives.value import *  # noqa: F403

# Imported on demand, so that a program which wants one loss does not pay for the mixtures.
_NAMES = {
    "advantages": (
        "against_baseline gae group_normalised leave_one_out mean_reward_to_go reinforce_plus_plus reward_to_go"
    ),
    "aggregation": "Aggregation aggregate",
    "filters": "above_standard_deviations best_fraction everything",
    "kl": "entropy AdaptiveKLController kl_exact kl_k1 kl_k2 kl_k3",
    "mixture": "MIXTURE_RULES Mixture document_difficulty make_mixture",
    "mixture_controls": "Ado ByDifficulty Exp3 Fixed",
    "mixture_rules": "Difficulty LearningProgress MixtureRule SecondOrder counted_loss",
    "mixture_targets": "Alignment ProgressOnTargets",
    "next_token": "avatarl_loss expected_reward_loss next_token_rewards sampled_reward_loss",
    "policy_gradient": "cispo_loss clip_fraction gspo_loss ppo_clip_loss reinforce_loss",
    "sac": (
        "gaussian_log_prob sac_actor_loss sac_critic_loss sac_temperature_loss "
        "sample_squashed_gaussian soft_q_targets squashed_gaussian_log_prob"
    ),
    "selection": (
        "calibrated_temperature relative_selection_entropy sample_selection selection_entropy selection_log_probs"
    ),
    "statistics": "RunningMoments masked_mean masked_variance whiten",
    "value": "explained_variance value_loss",
}
"""Module → the names that it offers here. It is imported when one of them is asked for."""

_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME]  # noqa: PLE0604 - these are text, from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'preceptor.objectives' has no attribute {name!r}")
    return getattr(importlib.import_module(f"preceptor.objectives.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
