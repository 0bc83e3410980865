"""The environment of verifiers is paid what the system pays, turn by turn, and its example trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.environments import load_task
from preceptor.environments.episodes import play
from preceptor.errors import ConfigError
from preceptor.lm.generators.base import Generations, OwnGenerator
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from tests.environments.recorded import QUICK, READING, STUDY, read_pairs, recorded

verifiers = pytest.importorskip("verifiers", reason="needs verifiers, of the extra verifiers")
# Its own dependencies announce changes while they are imported and run.
pytestmark = pytest.mark.filterwarnings("default")

EXAMPLE = Path(__file__).parents[2] / "examples" / "verifiers_reading.py"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model("starter", device=torch.device("cpu"))


class Script:
    """An engine that writes given texts, one an answer."""

    name = "a script"

    def __init__(self, lm: LanguageModel, texts: list[str]) -> None:
        self._lm, self._texts = lm, texts

    def generate(self, prompts: Any, **unused: Any) -> Generations:
        tokens = torch.tensor([self._lm.encode(self._texts.pop(0))])
        return Generations(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape))

    def refresh(self) -> None:
        pass


def rolled_out(env: Any, lm: LanguageModel, engine: Any, *, num_tokens: int = 6) -> dict[str, Any]:
    from preceptor.environments.verifiers_env import generator_client

    client = generator_client(
        lm,
        engine,
        sampling=Sampling(suppressed=lm.never_drawn),
        num_tokens=num_tokens,
        generator=torch.Generator().manual_seed(0),
    )
    rows = [env.get_dataset()[0]]
    output: dict[str, Any] = env.generate_sync(rows, client, model="m", state_columns=["trajectory"])["outputs"][0]
    assert output["error"] is None
    return output


def load(task: str, overrides: Any) -> Any:
    return verifiers.load_environment("preceptor.environments.verifiers_env", task=task, overrides=overrides)


def test_a_rollout_pays_what_a_run_recorded(tmp_path: Path, lm: LanguageModel) -> None:
    # Batches of one: a rollout is scored alone.
    settings = {**QUICK, "episode.batch_size": 1, "update.advantage": "running_mean"}
    decisions = [row for row in recorded(tmp_path / "run", "reading", settings=settings) if row["episode"] < 3]
    assert len(decisions) == 3
    env, task = load("reading", READING), load_task("reading", overrides=READING)
    pairs = task.articles[0].pairs
    for row in decisions:
        output = rolled_out(env, lm, Script(lm, [pairs.keys[pair] for pair in read_pairs(row)]))
        assert output["reward"] == row["reward"]
        assert [each["content"] for each in output["completion"] if each["role"] == "user"] == [
            f" {pairs.values[pair]}\n" for pair in read_pairs(row)
        ]


def test_turns_that_say_nothing_run_out_and_the_rest_is_read_in_order(lm: LanguageModel) -> None:
    env, task = load("reading", READING), load_task("reading", overrides=READING)
    key = task.articles[0].pairs.keys[2]
    output = rolled_out(env, lm, Script(lm, [" ", key, *[" "] * 6]))
    assert len(output["trajectory"]) == 8
    assert output["reward"] == task.rewards([play(task, 0, key)])[0]


@pytest.mark.parametrize(
    ("task", "overrides"),
    [("study", STUDY), ("bandit", {"in_context.rounds": 3, "in_context.first_rounds": 3})],
)
def test_a_model_plays_every_task_and_its_tokens_come_along(task: str, overrides: Any, lm: LanguageModel) -> None:
    env = load(task, overrides)
    output = rolled_out(env, lm, OwnGenerator(lm))
    assert isinstance(output["reward"], float)
    for turn in output["trajectory"]:
        tokens = turn["tokens"]
        assert len(tokens["completion_ids"]) == len(tokens["completion_logprobs"]) > 0
        text = torch.tensor([[*tokens["prompt_ids"], *tokens["completion_ids"]]])
        keep = torch.zeros_like(text, dtype=torch.bool)
        keep[:, len(tokens["prompt_ids"]) - 1 : -1] = True
        chosen, sampling = torch.tensor(tokens["completion_ids"]), Sampling(suppressed=lm.never_drawn)
        with torch.no_grad():
            log_probs = lm.chosen_log_probs(text, keep=keep, chosen=chosen, sampling=sampling)
        # Float32, token by token on the KV cache against one pass over the text.
        assert tokens["completion_logprobs"] == pytest.approx(log_probs.tolist(), abs=1e-5)


def test_no_rows_are_refused() -> None:
    from preceptor.environments.verifiers_env import load_environment

    with pytest.raises(ConfigError, match="`num_rows` must be at least 1, got 0"):
        load_environment(num_rows=0)


def test_the_example_trains() -> None:
    spec = importlib.util.spec_from_file_location("verifiers_reading", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.main(num_steps=2)) == 2
