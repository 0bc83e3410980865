"""Reading as a task of TRL's GRPOTrainer: each line of a completion is a query, and the reader pays for the order.

Run: python examples/grpo_reading.py [number of steps]

Another task: load_task("study"), load_task("bandit"); another engine: GRPOConfig(use_vllm=True).
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from preceptor.environments.trl_rewards import load_task, prompt_rows, reward_function
from preceptor.lm.load import load_language_model


def main(folder: str, num_steps: int = 4) -> list[dict[str, Any]]:
    task = load_task("reading", preset="smoke")  # the configuration of: preceptor run reading --preset smoke
    lm = load_language_model("starter", device=torch.device("cpu"))
    arguments = GRPOConfig(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=24,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = GRPOTrainer(
        lm.model,
        reward_funcs=reward_function(task),
        args=arguments,
        train_dataset=Dataset.from_list(prompt_rows(task, 8)),
        processing_class=lm.tokenizer,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row in main(folder, *map(int, sys.argv[1:])):
            print(f"reward {row['reward']:.4f} nats a token, spread {row['reward_std']:.4f}")
