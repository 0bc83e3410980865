"""One PPO step with a value network: the curriculum's parts against ``PPOTrainer`` of TRL 1.12, the last that has one.

Both have the same model, a value model of its size, prompts, lengths, four epochs over the whole batch, the k1 estimate
of the KL to the untrained model in the reward, and a reward that costs nothing. Where the installed TRL has no
``PPOTrainer`` there is nothing to compare with: ``pip install trl==1.12.0`` into an environment of its own.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.grpo import KL, LEARNING_RATE, OurStep, clocked_generation, copied
from benchmarks.limits import arithmetic_seconds, forward_operations
from benchmarks.measurement import OURS, Bar, Comparison
from benchmarks.models import H192, random_llama
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import PPOOptions

TRL = "TRL 1.12 PPOTrainer"
EPOCHS = 4
PPO = PPOOptions(group_size=1, advantage="gae", kl_place="reward_k1", kl_coefficient=KL, epochs=EPOCHS, minibatches=1)


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """32 continuations of 64 tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that what is experimental may change
        has_ppo = find_spec("trl") is not None and find_spec("trl.experimental.ppo") is not None
    if not has_ppo:
        print("ppo: the installed TRL has no PPOTrainer (trl==1.12.0 has); not measured")
        return
    lm = random_llama(H192)
    if quick:
        yield compare(lm, num_prompts=2, prompt_tokens=4, new_tokens=4)
        return
    yield compare(lm, num_prompts=32, prompt_tokens=32, new_tokens=64)


def compare(lm: LanguageModel, *, num_prompts: int, prompt_tokens: int, new_tokens: int) -> Comparison:
    """One batch of prompts; a policy's own tokens cannot be equal, so there is nothing to compare but the work."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.vocab_size, (num_prompts, prompt_tokens), generator=generator).tolist()
    ways: dict[str, Callable[[], object]] = {
        OURS: OurStep(copied(lm), prompts, new_tokens, options=PPO, bf16=False),
        f"{OURS}, bfloat16": OurStep(copied(lm), prompts, new_tokens, options=PPO, bf16=True),
        TRL: TrlPpoStep(copied(lm), prompts, new_tokens),
    }
    for step in ways.values():  # what each does once only
        step()
    return Comparison(
        benchmark="ppo",
        case=f"width 192, 8 layers: {num_prompts} prompts, {prompt_tokens} + {new_tokens} tokens, {EPOCHS} epochs",
        ways=ways,
        bars=(Bar(TRL, at_least=1.0), Bar(TRL, at_least=1.0, way=f"{OURS}, bfloat16")),
        details={"parameters": lm.model.num_parameters(), "kl_coefficient": KL},
        units=dict.fromkeys(ways, num_prompts * new_tokens),
        # Writing, the untrained model's pass, values, and the updates of policy and value network.
        ideal_seconds=arithmetic_seconds(
            (3 + 2 * EPOCHS * 3) * forward_operations(lm, num_prompts, prompt_tokens + new_tokens), ways, lm.device
        ),
    )


class TrlPpoStep:
    """One batch of TRL's trainer: rollouts, values, and four epochs."""

    def __init__(self, lm: LanguageModel, prompts: list[list[int]], new_tokens: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from datasets import Dataset
            from transformers import LlamaConfig, LlamaForSequenceClassification
            from trl.experimental.ppo import PPOConfig, PPOTrainer

        lm.tokenizer.padding_side = "left"
        self.generation = clocked_generation(lm)
        value_model = LlamaForSequenceClassification(LlamaConfig(**{**lm.model.config.to_dict(), "num_labels": 1}))
        value_model.model.load_state_dict(lm.model.base_model.state_dict())
        batch = len(prompts)

        def make() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                return PPOTrainer(
                    args=PPOConfig(
                        output_dir=folder,
                        per_device_train_batch_size=batch,
                        num_mini_batches=1,
                        gradient_accumulation_steps=1,
                        num_ppo_epochs=EPOCHS,
                        total_episodes=batch,
                        response_length=new_tokens,
                        temperature=1.0,
                        kl_coef=KL,
                        learning_rate=LEARNING_RATE,
                        num_sample_generations=0,
                        use_cpu=True,
                        bf16=False,
                        gradient_checkpointing=False,
                        report_to="none",
                        save_strategy="no",
                        disable_tqdm=True,
                    ),
                    processing_class=lm.tokenizer,
                    model=lm.model,
                    ref_model=lm.frozen_copy().model,
                    reward_model=Free(),
                    value_model=value_model,
                    train_dataset=Dataset.from_dict({"input_ids": prompts}),
                )

        self.make = make

    def __call__(self) -> dict[str, float]:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            trainer = self.make()
            self.generation.clear()
            begin = time.perf_counter(), time.process_time()
            trainer.train()
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        return {"wall": wall, "cpu": cpu, "generation": sum(self.generation)}


class Free(nn.Module):
    """A reward model that costs nothing: 0 for every row."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.score = self.zeros

    def zeros(self, hidden: Tensor | None = None, *, input_ids: Tensor | None = None, **_: Any) -> Any:
        """Both as the backbone, and as the head on what that gave."""
        if hidden is not None:
            return hidden
        assert input_ids is not None
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])
