"""Mode ``history``: the model acts on past rewards in its context, with fixed weights, and learns to do it better.

An episode is one text: a prompt, then after each choice the word and what it paid. Which word pays best is drawn anew
for each episode, so only the context can tell. The episodes of a batch share one KV cache; one packed pass over the
finished texts then scores every choice again, with gradient, and REINFORCE credits it with the rewards that followed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import draw
from preceptor.runs.random import derived_seed
from preceptor.runs.world import ALONE, World
from preceptor.systems.bandit import baselines
from preceptor.systems.bandit.environment import EpisodeTables, sample_tables
from preceptor.systems.bandit.policy import Context, Options
from preceptor.systems.bandit.prompts import Prompt
from preceptor.systems.bandit.setup import Setup
from preceptor.systems.bandit.state import State

NUM_CORPUS_LINES = 400
"""Lines of the pretraining corpus, each an episode of random choices."""


@dataclass(frozen=True)
class Episodes:
    """A batch of finished episodes of one bandit.

    Attributes:
        contexts: the texts, with every choice in them.
        actions: indices of the chosen words.
        rewards: what they paid.
        log_probs: of the chosen words when they were chosen, in nats.
        expected: expected reward of each word in each episode.
    """

    contexts: list[Context]
    actions: Int[Tensor, "episodes rounds"]
    rewards: Float[Tensor, "episodes rounds"]
    log_probs: Float[Tensor, "episodes rounds"]
    expected: Float[Tensor, "episodes arms"]

    @property
    def regret(self) -> Float[Tensor, "episodes rounds"]:
        """Expected reward that each choice forgoes."""
        return _regret(self.actions, self.expected)

    @property
    def is_optimal(self) -> Bool[Tensor, "episodes rounds"]:
        """Whether each choice was a best one."""
        return self.regret == 0


def _regret(
    actions: Int[Tensor, "episodes rounds"], expected: Float[Tensor, "episodes arms"]
) -> Float[Tensor, "episodes rounds"]:
    return expected.amax(1, keepdim=True) - expected.gather(1, actions)


def round_text(word: str, reward: float) -> str:
    """How a choice and its reward stand in the text; a word brings its own leading space.

    >>> round_text("rice", 10.0)
    ' rice 10.'
    """
    return f" {word}{reward_text(reward)}"


def reward_text(reward: float) -> str:
    """How a reward stands behind its word: one decimal, none where it is whole."""
    return f" {round(reward, 1):g}."


def corpus_lines(setup: Setup) -> list[str]:
    """The pretraining corpus: episodes of random choices, so that no word is preferred."""
    num_rounds = setup.config.history.rounds
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, "histories"))
    lines = []
    for number in range(NUM_CORPUS_LINES):
        bandit = setup.bandits[number % len(setup.bandits)]
        prompts = setup.training_prompts(bandit.name)
        prompt = prompts[int(torch.randint(len(prompts), (), generator=generator))]
        table = sample_tables(bandit, num_episodes=1, num_rounds=num_rounds, generator=generator).rewards[0]
        actions = torch.randint(len(bandit.words), (num_rounds,), generator=generator).tolist()
        rounds = (round_text(bandit.words[arm], float(table[at, arm])) for at, arm in enumerate(actions))
        lines.append(prompt.text + "".join(rounds))
    return lines


@torch.no_grad()
def play(
    lm: LanguageModel,
    prompts: list[Prompt],
    options: Options,
    tables: EpisodeTables,
    generator: torch.Generator,
    *,
    world: World = ALONE,
) -> Episodes:
    """One episode for each prompt, all of one bandit, on one KV cache; the processes of ``world`` share them."""
    num_episodes, num_rounds, _ = tables.rewards.shape
    starts = [[lm.begin_token, *lm.encode(prompt.text)] for prompt in prompts]

    def rounds(rows: slice) -> tuple[Tensor, Tensor]:
        stream = world.stream(generator, rows, num_episodes)
        paid_by = tables.rewards[rows]  # [episodes, rounds, arms]
        decoder = Decoder(lm, batch_size=len(paid_by))
        decoder.append(starts[rows])
        actions, log_probs = [], []
        for round_ in range(num_rounds):
            policy = _option_log_probs(decoder, options)  # [episodes, arms]
            arms = draw(policy, stream)  # [episodes]
            if round_ + 1 < num_rounds:  # nothing is chosen after the last round
                paid = paid_by[:, round_].gather(1, arms.cpu()[:, None])[:, 0]  # [episodes]
                decoder.append(
                    [
                        [*options[arm], *lm.encode(reward_text(reward))]
                        for arm, reward in zip(arms.tolist(), paid.tolist(), strict=True)
                    ]
                )
            actions.append(arms.cpu())
            log_probs.append(policy.gather(1, arms[:, None])[:, 0].cpu())
        return torch.stack(actions, 1), torch.stack(log_probs, 1)

    actions, log_probs = world.gathered(num_episodes, rounds)
    rewards = tables.rewards.gather(2, actions[..., None])[..., 0]  # [episodes, rounds]
    contexts = []
    for start, arms, paid in zip(starts, actions.tolist(), rewards.tolist(), strict=True):
        text, places = list(start), []
        for arm, reward in zip(arms, paid, strict=True):
            places.append((len(text), options))
            text += [*options[arm], *lm.encode(reward_text(reward))]
        contexts.append(Context(tuple(text), tuple(places)))
    return Episodes(contexts, actions, rewards, log_probs, expected=tables.expected)


def _option_log_probs(decoder: Decoder, options: Options) -> Float[Tensor, "batch options"]:
    """The policy over the words at the end of each row; the decoder is left as it was."""
    mark = decoder.mark()
    first_log_probs = decoder.next_log_probs  # [batch, vocab]
    scores = []
    for option in options:
        # log P(word) = sum over its tokens, each given those before it
        score = first_log_probs[:, option[0]]
        for token, following in itertools.pairwise(option):
            decoder.append([[token]] * decoder.batch_size)
            score = score + decoder.next_log_probs[:, following]
        decoder.rewind(mark)
        scores.append(score)
    return torch.stack(scores, 1).log_softmax(-1)


def evaluate(setup: Setup, state: State) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every method on the same sampled bandits, none of which was trained on: records and charts."""
    assert state.initial_model is not None
    options, seed = setup.config.history, setup.config.seed
    num_episodes = options.evaluation_episodes
    records: list[dict[str, Any]] = []
    charts: list[dict[str, Any]] = []
    for bandit in setup.bandits:
        generator = torch.Generator().manual_seed(derived_seed(seed, f"evaluation {bandit.name}"))
        tables = sample_tables(bandit, num_episodes=num_episodes, num_rounds=options.rounds, generator=generator)
        words = setup.vocabulary.options(bandit.words)
        plays: list[tuple[str, str, Tensor, int]] = []  # method, split, actions [episodes, rounds], model calls
        for split, held_out in (("train", False), ("held_out", True)):
            prompts = [prompt for prompt in setup.prompts[bandit.name] if prompt.held_out == held_out]
            if not prompts:
                continue
            prompts = [prompts[number % len(prompts)] for number in range(num_episodes)]
            for method, lm in (("learned", setup.lm), ("pretrained", state.initial_model)):
                setup.run.stop_if_requested()
                # Both models draw from the same random numbers.
                draws = torch.Generator().manual_seed(derived_seed(seed, f"evaluation {bandit.name} {split}"))
                episodes = play(lm, prompts, words, tables, draws, world=setup.run.world)
                plays.append((method, split, episodes.actions, options.rounds))
        pulls = baselines.play_all(
            tables.rewards / bandit.base_reward,
            tables.expected,
            kind=bandit.kind,
            deviation=bandit.deviation,
            generator=setup.run.streams["references"],
        )
        plays += [(method, "train", actions, 0) for method, actions in pulls.items()]

        optimal_by_round: dict[str, list[float]] = {}
        for method, split, actions, model_calls in plays:
            regret = _regret(actions, tables.expected)
            is_optimal = (regret == 0).double()  # [episodes, rounds]
            records.append(
                {
                    "arm": method,
                    "item": bandit.name,
                    "split": split,
                    "seed": seed,
                    "reward": float(tables.rewards.gather(2, actions[..., None]).mean()),
                    "regret": float(regret.sum(1).mean()),
                    "optimal_share": float(is_optimal.mean()),
                    "model_calls": model_calls,
                }
            )
            if split == "train":
                optimal_by_round[method] = is_optimal.mean(0).tolist()
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
