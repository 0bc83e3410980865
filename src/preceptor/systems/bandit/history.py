"""Acting on past rewards in the context: the weights rest within an episode, and learn across sampled bandits.

An episode is one text: a prompt, then after each choice the word and what it paid. Which word pays best is drawn anew
for every episode, so nothing but the context can tell. A batch acts on one KV cache; one packed pass over the
finished texts then scores every choice again, with gradient, and REINFORCE credits it with the rewards that followed.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import draw
from preceptor.objectives.advantages import reward_to_go
from preceptor.run.device import peak_memory_mib
from preceptor.run.random import derived_seed
from preceptor.systems.bandit import references
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.laboratory import Laboratory
from preceptor.systems.bandit.learner import Learner, policy_gradient
from preceptor.systems.bandit.policy import Context, Options, decide
from preceptor.systems.bandit.prompts import Prompt

if TYPE_CHECKING:
    from preceptor.run.folder import Run

CORPUS_LINES = 400
"""Texts of the pretraining corpus, of random choices."""


@dataclass(frozen=True)
class Episodes:
    """A batch of finished episodes of one bandit.

    Attributes:
        contexts: the texts, with every choice in them.
        actions: the chosen words, as indices.
        rewards: what they paid.
        log_probs: of the chosen words when they were chosen, in nats.
        expected: expected reward of every word in every episode.
    """

    contexts: list[Context]
    actions: Int[Tensor, "episodes rounds"]
    rewards: Float[Tensor, "episodes rounds"]
    log_probs: Float[Tensor, "episodes rounds"]
    expected: Float[Tensor, "episodes arms"]

    @property
    def regret(self) -> Float[Tensor, "episodes rounds"]:
        """Expected reward that each choice forgoes."""
        return self.expected.amax(1, keepdim=True) - self.expected.gather(1, self.actions)

    @property
    def optimal(self) -> Tensor:
        """Whether each choice was a best one, [episodes, rounds]."""
        return self.regret == 0


@dataclass(frozen=True)
class Tables:
    """Sampled bandits: which word pays what in each episode.

    Attributes:
        rewards: what each word would pay in each round.
        expected: its expectation.
    """

    rewards: Float[Tensor, "episodes rounds arms"]
    expected: Float[Tensor, "episodes arms"]


def sample_tables(bandit: Bandit, *, episodes: int, rounds: int, generator: torch.Generator) -> Tables:
    """``bandit`` with its payments dealt to its words anew for every episode."""
    dealt = [bandit.permuted(torch.randperm(len(bandit.words), generator=generator)) for _ in range(episodes)]
    return Tables(
        rewards=torch.stack([one.rewards(rounds, generator) for one in dealt]),
        expected=torch.stack([one.expected for one in dealt]),
    )


def paid(word: str, reward: float) -> str:
    """How a choice and its reward stand in the text, after the word's own leading space.

    >>> paid("rice", 10.0)
    ' rice 10.'
    """
    return f" {word}{receipt(reward)}"


def receipt(reward: float) -> str:
    """How a reward stands behind its word: one decimal, none where it is whole."""
    return f" {round(reward, 1):g}."


def lines(config: BanditConfig, laboratory: Laboratory) -> list[str]:
    """The pretraining corpus of this mode: episodes of random choices, so that nothing is preferred."""
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "histories"))
    texts = []
    for number in range(CORPUS_LINES):
        bandit = laboratory.bandits[number % len(laboratory.bandits)]
        prompts = laboratory.training_prompts(bandit.name)
        prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
        table = sample_tables(bandit, episodes=1, rounds=config.history.rounds, generator=generator).rewards[0]
        actions = torch.randint(len(bandit.words), (config.history.rounds,), generator=generator).tolist()
        rounds = (paid(bandit.words[arm], float(table[at, arm])) for at, arm in enumerate(actions))
        texts.append(prompt.text + "".join(rounds))
    return texts


@torch.no_grad()
def play(
    lm: LanguageModel, prompts: list[Prompt], options: Options, tables: Tables, generator: torch.Generator
) -> Episodes:
    """One episode for every prompt, all of one bandit, on one KV cache."""
    num_rounds = tables.rewards.shape[1]
    texts = [[lm.begin_token, *lm.encode(prompt.text)] for prompt in prompts]
    choices: list[list[tuple[int, Options]]] = [[] for _ in prompts]
    decoder = Decoder(lm, batch_size=len(prompts))
    decoder.append(texts)
    actions, rewards, log_probs = [], [], []
    for round_ in range(num_rounds):
        policy = _option_log_probs(decoder, options)
        arms = draw(policy, generator)
        reward = tables.rewards[:, round_].gather(1, arms.cpu()[:, None])[:, 0]
        added = []
        for text, places, arm, amount in zip(texts, choices, arms.tolist(), reward.tolist(), strict=True):
            places.append((len(text), options))
            new = [*options[arm], *lm.encode(receipt(amount))]
            text += new
            added.append(new)
        if round_ + 1 < num_rounds:  # nothing is chosen after the last
            decoder.append(added)
        actions.append(arms.cpu())
        rewards.append(reward)
        log_probs.append(policy.gather(1, arms[:, None])[:, 0].cpu())
    return Episodes(
        contexts=[Context(tuple(text), tuple(places)) for text, places in zip(texts, choices, strict=True)],
        actions=torch.stack(actions, 1),
        rewards=torch.stack(rewards, 1),
        log_probs=torch.stack(log_probs, 1),
        expected=tables.expected,
    )


def _option_log_probs(decoder: Decoder, options: Options) -> Float[Tensor, "batch options"]:
    """The policy over the words at the end of every row; the decoder is left as it was."""
    mark = decoder.mark()
    at_end = decoder.next_log_probs
    scores = []
    for option in options:
        score = at_end[:, option[0]]
        for token, following in itertools.pairwise(option):
            decoder.append([[token]] * decoder.batch_size)
            score = score + decoder.next_log_probs[:, following]
        decoder.rewind(mark)
        scores.append(score)
    return torch.stack(scores, 1).log_softmax(-1)


def learn(config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner, start: int) -> None:
    """REINFORCE over sampled bandits, one bandit a step in turn, from step ``start``."""
    last = config.pretraining.steps + config.history.steps
    for step in range(start + 1, last + 1):
        bandit = laboratory.bandits[(step - 1) % len(laboratory.bandits)]
        run.log(step, _one_update(config, run, laboratory, learner, step, bandit))
        if run.due(step) or run.stop_requested or step == last:
            learner.save(run, step)
        if run.stop_requested:
            run.stop(step)


def _one_update(
    config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner, step: int, bandit: Bandit
) -> dict[str, Any]:
    began = time.perf_counter()
    options, update, lm = config.history, config.update, laboratory.lm
    tables = sample_tables(
        bandit, episodes=options.batch_size, rounds=options.rounds, generator=run.streams["environment"]
    )
    own = laboratory.training_prompts(bandit.name)
    prompts = [own[index] for index in torch.randint(len(own), (options.batch_size,), generator=run.streams["prompts"])]
    words = laboratory.vocabulary.options(bandit.words)
    # One mask of dropout would have to hold for a whole episode and its scoring, so this mode acts without.
    episodes = play(lm, prompts, words, tables, run.streams["actions"])
    returns = reward_to_go(
        episodes.rewards, torch.ones_like(episodes.rewards, dtype=torch.bool), discount=options.discount
    )
    # Each round is compared with the same round of the other episodes: what is still to come depends on the round.
    advantages = torch.stack([learner.baseline.advantages(column, bandit.name) for column in returns.T], dim=1)
    reference = None
    if update.kl_coefficient and learner.pretrained is not None:
        with torch.no_grad():
            reference = decide(learner.pretrained, episodes.contexts).log_probs
    decision = decide(lm, episodes.contexts)
    loss, measured = policy_gradient(
        decision.log_probs,
        episodes.actions.flatten().to(lm.device),
        advantages.flatten().to(lm.device),
        entropy_coefficient=update.entropy_coefficient,
        kl_coefficient=update.kl_coefficient,
        reference=reference,
    )
    chosen = decision.log_probs.detach().cpu().gather(1, episodes.actions.flatten()[:, None])[:, 0]
    gradient_norm = learner.apply(loss, run, step, clip_norm=update.clip_norm)
    first = learner.num_pulls[bandit.name]
    learner.num_pulls[bandit.name] += episodes.actions.numel()
    run.record(
        {
            "step": step,
            "arm": "learned",
            "bandit": bandit.name,
            "pull": first + number * options.rounds,
            "prompt": prompts[number].text,
            "words": [bandit.words[arm] for arm in episodes.actions[number].tolist()],
            "rewards": episodes.rewards[number].tolist(),
            "log_probs": episodes.log_probs[number].tolist(),
        }
        for number in range(options.batch_size)
    )
    return {
        "phase": "rewards",
        "bandit": bandit.name,
        "loss": measured.loss,
        "reward": float(episodes.rewards.mean()),
        "mean_reward": {bandit.name: float(episodes.rewards.mean())},
        "best_word": float(episodes.optimal.double().mean()),
        "best_word_of": {bandit.name: float(episodes.optimal.double().mean())},
        "regret": {bandit.name: float(episodes.regret.sum(1).mean())},
        "entropy": measured.entropy / math.log(len(bandit.words)),
        "kl": measured.kl,
        "log_ratio_maximum": float((chosen - episodes.log_probs.flatten()).abs().max()),
        "gradient_norm": gradient_norm,
        "skipped_steps": learner.guard.num_skipped,
        "pulls": sum(learner.num_pulls.values()),
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(lm.device),
    }


def measure(
    config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every arm on the same sampled bandits, none of them trained on: records and charts."""
    assert learner.pretrained is not None
    options = config.history
    records: list[dict[str, Any]] = []
    charts: list[dict[str, Any]] = []
    for bandit in laboratory.bandits:
        generator = torch.Generator().manual_seed(derived_seed(config.seed, f"evaluation {bandit.name}"))
        tables = sample_tables(bandit, episodes=options.evaluation_episodes, rounds=options.rounds, generator=generator)
        words = laboratory.vocabulary.options(bandit.words)
        optimal_by_round: dict[str, list[float]] = {}
        for split, held_out in (("train", False), ("held_out", True)):
            own = [prompt for prompt in laboratory.prompts[bandit.name] if prompt.held_out == held_out]
            if not own:
                continue
            prompts = [own[number % len(own)] for number in range(options.evaluation_episodes)]
            for arm, lm in (("learned", laboratory.lm), ("pretrained", learner.pretrained)):
                draws = torch.Generator().manual_seed(derived_seed(config.seed, f"evaluation {bandit.name} {split}"))
                episodes = play(lm, prompts, words, tables, draws)
                records.append(_record(arm, bandit, split, config.seed, episodes.actions, tables, options.rounds))
                if not held_out:
                    optimal_by_round[arm] = episodes.optimal.double().mean(0).tolist()
        for arm, actions in references.play_all(
            tables.rewards / bandit.base_reward,
            tables.expected,
            kind=bandit.kind,
            deviation=bandit.deviation,
            generator=run.streams["references"],
        ).items():
            records.append(_record(arm, bandit, "train", config.seed, actions, tables, 0))
            best = tables.expected.gather(1, actions) == tables.expected.amax(1, keepdim=True)
            optimal_by_round[arm] = best.double().mean(0).tolist()
        charts.append(
            {
                "kind": "series",
                "title": f"Choices of the best word: {bandit.name}",
                "unit": "share of episodes",
                "x_label": "round",
                "x": list(range(1, options.rounds + 1)),
                "lines": optimal_by_round,
            }
        )
    return records, charts


def _record(
    arm: str, bandit: Bandit, split: str, seed: int, actions: Tensor, tables: Tables, model_calls: int
) -> dict[str, Any]:
    expected = tables.expected.gather(1, actions)
    best = tables.expected.amax(1, keepdim=True)
    return {
        "arm": arm,
        "item": bandit.name,
        "split": split,
        "seed": seed,
        "reward": float(tables.rewards.gather(2, actions[..., None]).mean()),
        "regret": float((best - expected).sum(1).mean()),
        "optimal_share": float((expected == best).double().mean()),
        "model_calls": model_calls,
    }
