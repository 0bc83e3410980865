"""TRL's GRPOTrainer is paid what the system pays, by its reward functions and by its environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import get_json_schema

from preceptor.environments.episodes import play
from preceptor.environments.trl_rewards import ToolEnvironment, load_task, prompt_rows, reward_function
from preceptor.lm.load import load_language_model
from tests.environments.recorded import QUICK, READING, read_pairs, recorded

# transformers 5 announces the end of an argument that TRL still sets.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental feature.*:UserWarning"),
]


def test_the_reward_function_pays_what_a_run_recorded(tmp_path: Path) -> None:
    decisions = recorded(tmp_path / "run", "reading", settings={**QUICK, "episode.batch_size": 6, "update.steps": 1})
    decisions = [row for row in decisions if row["episode"] < 6]
    assert len(decisions) == 6
    task = load_task("reading", overrides=READING)
    keys = task.articles[0].pairs.keys  # type: ignore[attr-defined]
    completions = ["\n".join(keys[pair] for pair in read_pairs(row)) for row in decisions]
    rewards = reward_function(task)(completions=completions, problem=[0] * 6, prompts=None, trainer_state=None)
    assert rewards == [row["reward"] for row in decisions]
    assert len(set(rewards)) > 1
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert reward_function(task)(completions=chats, problem=[0] * 6) == rewards


def test_rows_draw_every_problem_before_one_comes_again() -> None:
    task = load_task("study", overrides={"study.num_train_pools": 1, "study.num_eval_pools": 1}, mode="asked")
    rows = prompt_rows(task, len(task) + 1, seed=3)
    assert {row["problem"] for row in rows[:-1]} == set(range(len(task)))
    assert rows != prompt_rows(task, len(task) + 1, seed=4)
    assert rows[0]["prompt"] == task.episode(rows[0]["problem"]).prompt
    assert prompt_rows(task, 1, seed=3, chat=True)[0]["prompt"] == [{"role": "user", "content": rows[0]["prompt"]}]


def test_a_tool_environment_takes_turns() -> None:
    task = load_task("reading", overrides=READING)
    article = task.articles[0]  # type: ignore[attr-defined]
    environment = ToolEnvironment(task)
    environment.reset(problem=0, prompt="unused")
    assert environment.choose(article.pairs.keys[2]) == article.pairs.values[2]
    assert environment.choose(" ") == "That stands for no choice."
    assert environment.get_reward() == task.rewards([play(task, 0, article.pairs.keys[2])])[0]
    assert environment.choose("more") == "Everything is chosen."
    schema = get_json_schema(environment.choose)["function"]
    assert schema["parameters"]["required"] == ["text"]


def test_grpo_trains_with_the_tool_environment(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL, of the extra test")
    from datasets import Dataset

    task = load_task("reading", overrides=READING)
    lm = load_language_model("starter", device=torch.device("cpu"))
    # Any template that knows tools: the starter has none, and calls none, so every episode is finished for it.
    templates = Path(trl.__file__).parent / "chat_templates"
    lm.tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2,
        max_completion_length=4, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer: Any = trl.GRPOTrainer(
        lm.model,
        args=arguments,
        train_dataset=Dataset.from_list(prompt_rows(task, 2, chat=True)),
        processing_class=lm.tokenizer,
        environment_factory=lambda: ToolEnvironment(task),
    )
    trainer.train()
    in_order = task.rewards([play(task, 0, "")])[0]
    assert trainer.state.log_history[0]["rewards/ToolEnvironment/mean"] == pytest.approx(
        in_order, rel=1e-6
    )  # its log is a float32 mean
