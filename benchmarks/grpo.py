"""One GRPO step, from prompts to new weights: the curriculum's parts against TRL's ``GRPOTrainer``.

Both have the same model, prompts, group size, lengths, KL to the untrained model, learning rate and a plain Python
reward. TRL's step is timed from its own callbacks, so building its trainer costs it nothing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import arithmetic_seconds, forward_operations
from benchmarks.measurement import OURS, Bar, Comparison, matmul_precision
from benchmarks.models import H192, random_llama, starter
from preceptor.lm.load import save_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.device import exact_matmul_precision
from preceptor.systems.curriculum.config import PPOOptions
from preceptor.systems.curriculum.loss import Experience, accumulate_ppo, autocast
from preceptor.systems.curriculum.policy import Prompt, generate_rollouts, rollout_log_probs, rollout_sampling
from preceptor.systems.curriculum.rewards import token_advantages
from preceptor.systems.curriculum.sums import Sums
from preceptor.systems.curriculum.value_network import CopiedTrunk, ValueNetwork

GROUP, KL, LEARNING_RATE = 8, 0.04, 1e-5
GRPO = PPOOptions(group_size=GROUP, advantage="grpo", kl_place="loss_k3", kl_coefficient=KL, epochs=1, minibatches=1)
TRL = "TRL GRPOTrainer"


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """4 prompts x 8 continuations of 64 tokens, on both small models."""
    if quick:
        yield compare("starter", starter(), num_prompts=1, prompt_tokens=4, new_tokens=4)
        return
    yield compare("starter", starter(), num_prompts=4, prompt_tokens=32, new_tokens=64)
    yield compare("width 192, 8 layers", random_llama(H192), num_prompts=4, prompt_tokens=32, new_tokens=64)


def compare(name: str, lm: LanguageModel, *, num_prompts: int, prompt_tokens: int, new_tokens: int) -> Comparison:
    """One batch of prompts; a policy's own tokens cannot be equal, so there is nothing to compare but the work."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.vocab_size, (num_prompts, prompt_tokens), generator=generator).tolist()
    tokens = num_prompts * GROUP * new_tokens
    ways: dict[str, Callable[[], object]] = {OURS: OurStep(copied(lm), prompts, new_tokens, options=GRPO, bf16=False)}
    if lm.dtype == torch.float32:  # weights in bfloat16 have one way alone
        ways[f"{OURS}, bfloat16"] = OurStep(copied(lm), prompts, new_tokens, options=GRPO, bf16=True)
    ways[TRL] = TrlStep(copied(lm), prompts, new_tokens)
    for step in ways.values():  # what each does once only
        step()
    return Comparison(
        benchmark="grpo",
        case=f"{name}: {num_prompts} prompts x {GROUP}, {prompt_tokens} + {new_tokens} tokens",
        ways=ways,
        bars=tuple(Bar(TRL, at_least=2.5, way=way) for way in ways if way != TRL),
        details={"parameters": lm.model.num_parameters(), "kl_coefficient": KL},
        units=dict.fromkeys(ways, tokens),
        # Writing, the untrained model's pass, and the update.
        ideal_seconds=arithmetic_seconds(
            5 * forward_operations(lm, num_prompts * GROUP, prompt_tokens + new_tokens), ways, lm.device
        ),
        device=lm.device,
    )


def reward(tokens: list[int]) -> float:
    """Share of distinct tokens."""
    return len(set(tokens)) / max(len(tokens), 1)


class OurStep:
    """Rollouts, advantages and update of the curriculum system; every continuation has its full length.

    With the advantage ``gae`` a value network of the policy's size learns beside it.
    """

    def __init__(
        self, lm: LanguageModel, prompts: list[list[int]], new_tokens: int, *, options: PPOOptions, bf16: bool
    ) -> None:
        self.lm, self.reference, self.new_tokens, self.bf16 = lm, lm.frozen_copy(), new_tokens, bf16
        self.prompts = [Prompt("benchmark", tuple(tokens), ()) for tokens in prompts]
        self.options = options
        self.value_network = None
        if options.advantage == "gae":
            self.value_network = ValueNetwork(CopiedTrunk(lm), filler=lm.begin_token)
        self.parameters = list(lm.model.parameters())
        if self.value_network is not None:
            self.parameters += [each for each in self.value_network.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        self.generator = torch.Generator().manual_seed(0)
        self.setting = exact_matmul_precision(lm.device)

    def __call__(self) -> dict[str, float]:
        begin = time.perf_counter(), time.process_time()
        lm, sampling = self.lm, rollout_sampling(self.lm, 1.0)
        with matmul_precision(self.setting):
            with torch.no_grad(), autocast(lm, self.bf16):
                rollouts = generate_rollouts(
                    lm,
                    self.prompts,
                    group_size=self.options.group_size,
                    num_tokens=self.new_tokens,
                    sampling=sampling,
                    generator=self.generator,
                )
                generated = time.perf_counter()
                reference_log_probs = rollout_log_probs(self.reference, rollouts, sampling)
                values = None if self.value_network is None else self.value_network(rollouts)
            rewards = torch.zeros_like(rollouts.log_probs)
            rewards[:, -1] = torch.tensor([reward(row) for row in rollouts.tokens.tolist()])
            if self.options.kl_place == "reward_k1":
                rewards -= self.options.kl_coefficient * (rollouts.log_probs - reference_log_probs)
            mask = torch.ones_like(rollouts.mask)
            rollouts = type(rollouts)(rollouts.prompts, rollouts.tokens, mask, rollouts.log_probs, rollouts.entropy)
            advantages, returns = token_advantages(
                rewards, mask, kind=self.options.advantage, values=values, group_size=self.options.group_size
            )
            for _ in range(self.options.epochs):
                accumulate_ppo(
                    lm,
                    Experience(rollouts, advantages, returns, values, reference_log_probs),
                    sampling=sampling,
                    options=self.options,
                    kl_coefficient=self.options.kl_coefficient,
                    value_network=self.value_network,
                    reference_model=self.reference,
                    micro_batch_size=len(rollouts),
                    bf16=self.bf16,
                    sums=Sums(),
                )
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        end = time.perf_counter()
        return {"wall": end - begin[0], "cpu": time.process_time() - begin[1], "generation": generated - begin[0]}


class TrlStep:
    """One optimizer step of TRL's trainer."""

    def __init__(self, lm: LanguageModel, prompts: list[list[int]], new_tokens: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from datasets import Dataset
            from transformers import TrainerCallback
            from trl import GRPOConfig, GRPOTrainer

        times: list[tuple[float, float]] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times.append((time.perf_counter(), time.process_time()))

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append((time.perf_counter(), time.process_time()))

        self.times, folder = times, tempfile.mkdtemp()
        self.generation = clocked_generation(lm)
        weakref.finalize(self, shutil.rmtree, folder)  # the trainer reads the untrained model from it at every step
        lm.model.generation_config.eos_token_id = None  # continuations of full length, as ours
        save_language_model(lm, Path(folder) / "model")
        lm.model.config._name_or_path = f"{folder}/model"  # where TRL finds the untrained model
        self.arguments: dict[str, Any] = {
            "model": lm.model,
            "reward_funcs": lambda completion_ids, **_: [reward(tokens) for tokens in completion_ids],
            "processing_class": lm.tokenizer,
            "train_dataset": Dataset.from_dict({"prompt": [lm.decode(tokens) for tokens in prompts]}),
            "callbacks": [Clock()],
        }
        self.make: Callable[[], Any] = lambda: GRPOTrainer(
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(prompts) * GROUP,
                num_generations=GROUP,
                max_completion_length=new_tokens,
                generation_kwargs={"min_new_tokens": new_tokens},
                beta=KL,
                learning_rate=LEARNING_RATE,
                max_steps=1,
                use_cpu=lm.device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            **self.arguments,
        )

    def __call__(self) -> dict[str, float]:
        self.times.clear()
        self.generation.clear()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.make().train()
        (wall, cpu), (wall_end, cpu_end) = self.times[0], self.times[-1]
        return {"wall": wall_end - wall, "cpu": cpu_end - cpu, "generation": sum(self.generation)}


def clocked_generation(lm: LanguageModel) -> list[float]:
    """A list to which every call of the model's ``generate`` adds its seconds from now on."""
    seconds: list[float] = []
    model: Any = lm.model
    generate = model.generate

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        found = generate(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return found

    model.generate = clocked
    return seconds


def copied(lm: LanguageModel) -> LanguageModel:
    """A copy that can be trained."""
    return LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, name=lm.name)
