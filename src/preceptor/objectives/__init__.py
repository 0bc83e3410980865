"""The mathematics of learning from rewards: tensors in, tensors out; needs torch alone.

A loss ends in ``_loss`` and is minimised. A mask is always "True = counts". Randomness is an explicit generator.
"""

from preceptor.objectives.advantages import (
    against_baseline,
    gae,
    group_normalised,
    leave_one_out,
    mean_reward_to_go,
    reinforce_plus_plus,
    reward_to_go,
)
from preceptor.objectives.aggregation import Aggregation, aggregate
from preceptor.objectives.entropy import entropy
from preceptor.objectives.filters import above_standard_deviations, best_fraction, everything
from preceptor.objectives.kl import AdaptiveKLController, kl_exact, kl_k1, kl_k2, kl_k3
from preceptor.objectives.mixture import MIXTURE_RULES, Mixture, document_difficulty, make_mixture
from preceptor.objectives.mixture_controls import Ado, ByDifficulty, Exp3, Fixed
from preceptor.objectives.mixture_rules import (
    Difficulty,
    LearningProgress,
    MixtureRule,
    SecondOrder,
    counted_loss,
)
from preceptor.objectives.mixture_targets import Alignment, ProgressOnTargets
from preceptor.objectives.next_token import (
    avatarl_loss,
    expected_reward_loss,
    next_token_rewards,
    sampled_reward_loss,
)
from preceptor.objectives.policy_gradient import (
    cispo_loss,
    clip_fraction,
    gspo_loss,
    ppo_clip_loss,
    reinforce_loss,
)
from preceptor.objectives.sac import (
    gaussian_log_prob,
    sac_actor_loss,
    sac_critic_loss,
    sac_temperature_loss,
    sample_squashed_gaussian,
    soft_q_targets,
    squashed_gaussian_log_prob,
)
from preceptor.objectives.selection import (
    calibrated_temperature,
    relative_selection_entropy,
    sample_selection,
    selection_entropy,
    selection_log_probs,
)
from preceptor.objectives.statistics import RunningMoments, masked_mean, masked_variance, whiten
from preceptor.objectives.value import explained_variance, value_loss

__all__ = [
    "AdaptiveKLController",
    "Ado",
    "Aggregation",
    "Alignment",
    "ByDifficulty",
    "Difficulty",
    "Exp3",
    "Fixed",
    "LearningProgress",
    "MIXTURE_RULES",
    "Mixture",
    "MixtureRule",
    "ProgressOnTargets",
    "RunningMoments",
    "SecondOrder",
    "above_standard_deviations",
    "against_baseline",
    "aggregate",
    "avatarl_loss",
    "best_fraction",
    "calibrated_temperature",
    "cispo_loss",
    "clip_fraction",
    "counted_loss",
    "document_difficulty",
    "entropy",
    "everything",
    "expected_reward_loss",
    "explained_variance",
    "gae",
    "gaussian_log_prob",
    "group_normalised",
    "gspo_loss",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out",
    "make_mixture",
    "masked_mean",
    "masked_variance",
    "mean_reward_to_go",
    "next_token_rewards",
    "ppo_clip_loss",
    "reinforce_loss",
    "reinforce_plus_plus",
    "relative_selection_entropy",
    "reward_to_go",
    "sac_actor_loss",
    "sac_critic_loss",
    "sac_temperature_loss",
    "sample_selection",
    "sample_squashed_gaussian",
    "sampled_reward_loss",
    "selection_entropy",
    "selection_log_probs",
    "soft_q_targets",
    "squashed_gaussian_log_prob",
    "value_loss",
    "whiten",
]
