"""The whole loop through the command line: what a run leaves behind, that it learns, that its controls do not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from preceptor.cli import main
from preceptor.config import from_dict, load_config
from preceptor.errors import ConfigError
from preceptor.lm.cpu import engine as cpu_engine
from preceptor.lm.model import LanguageModel
from preceptor.runs.export import load_model
from preceptor.systems.curriculum.baselines import Method
from preceptor.systems.curriculum.config import CurriculumConfig, DataOptions, DatasetOptions, DifficultyOptions
from preceptor.systems.curriculum.environment import Corpus, read_corpora
from preceptor.systems.curriculum.evaluate import validation_losses
from preceptor.systems.curriculum.kinds import verify
from preceptor.systems.curriculum.loop import draw_documents, measure_difficulty
from preceptor.systems.curriculum.setup import check_lengths
from tests.systems.curriculum.made import CONFIG, setup_and_state
from tests.systems.curriculum.small import METHODS, SERVICES, STEPS, arguments, result_of, rows


def test_every_method_has_its_steps_and_the_same_tokens(finished: Path) -> None:
    logged = rows(finished / "metrics.jsonl")
    assert [row["arm"] for row in logged] == [method for method in METHODS for _ in range(STEPS)]
    assert [row["arm_step"] for row in logged] == list(range(1, STEPS + 1)) * len(METHODS)
    for row in logged:  # to within a row of 24 tokens
        assert 0 <= row["tokens"] - 96 * row["arm_step"] < 24
        assert sum(row["weights"].values()) == pytest.approx(1)
    assert list(result_of(finished)["arms"]) == list(METHODS)


def test_every_method_starts_from_the_same_weights_and_streams(finished: Path) -> None:
    first = [row for row in rows(finished / "metrics.jsonl") if row["arm_step"] == 1]
    # The first step's measurement and documents are the same; so is the loss of those that learn nothing else, until
    # the first step of the optimizer has been taken.
    assert len({json.dumps(row["difficulty"]) for row in first[:3]}) == 1
    assert first[0]["reward"] == first[1]["reward"]
    assert first[0]["tokens"] == first[1]["tokens"] == first[2]["tokens"]
    curves = [record for record in result_of(finished)["records"] if record["item"] == "macro mean"]
    assert len({round(r["macro_loss"] + r["loss_fall"], 9) for r in curves}) == 1


def test_learning_rate_zero_changes_nothing(finished: Path) -> None:
    frozen = result_of(finished)["arms"]["frozen_policy"]
    assert frozen["loss_fall"]["mean"] == 0.0
    assert frozen["reward_gain"]["mean"] == 0.0
    assert frozen["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    learned = result_of(finished)["arms"][METHODS[0]]
    assert learned["loss_fall"]["mean"] != 0.0
    assert learned["kl"]["mean"] > 1e-4


def test_samples_are_written_at_every_validation(finished: Path) -> None:
    samples = [row for row in rows(finished / "decisions.jsonl") if row["kind"] == "sample"]
    assert len(samples) == len(METHODS) * 2 * 9  # validations at steps 2 and 4, nine test prompts
    assert {row["step"] for row in samples} == {
        number * STEPS + step for number in range(len(METHODS)) for step in (2, 4)
    }


def test_the_models_load(finished: Path) -> None:
    for name in ("model", "best_model"):
        model = AutoModelForCausalLM.from_pretrained(finished / name)
        assert model(torch.tensor([[0, 5, 6]])).logits.isfinite().all()
    assert not list(finished.glob(".tmp-*"))


@pytest.mark.parametrize("adapter_rank", [0, 2])
def test_the_saved_model_reproduces_the_recorded_losses(tiny_folder: Path, tmp_path: Path, adapter_rank: int) -> None:
    changes = [f"model.adapter_rank={adapter_rank}", "controls.rules=[]", "controls.frozen_policy=false"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
    recorded = rows(tmp_path / "run" / "metrics.jsonl")[STEPS - 1]["validation_losses"]  # the first method's last
    model, tokenizer = load_model(tmp_path / "run" / "model")
    lm = LanguageModel(model, tokenizer, name="saved")
    config = from_dict(CurriculumConfig, result_of(tmp_path / "run")["config"])
    losses = validation_losses(lm, read_corpora(config.data, lm), num_rows=config.validation.rows)
    assert losses == pytest.approx(recorded, abs=1e-5)  # float32, other order of sums


def test_the_page_can_be_drawn(finished: Path) -> None:
    assert main(["report", str(finished)]) == 0
    assert "learning progress" in (finished / "report.html").read_text()


def test_without_rollouts_nothing_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    assert main(arguments(tiny_folder, tmp_path / "run", ["ppo.weight=0", "controls.rules=[]"])) == 0
    kinds = {row["kind"] for row in rows(tmp_path / "run" / "decisions.jsonl")}
    assert kinds == {"mixture", "sample"}
    (records,) = [r for r in result_of(tmp_path / "run")["records"] if r["item"] == "macro mean"]
    assert records["rollout_tokens"] == 0
    assert "reward" not in records


def test_rows_longer_than_the_context_are_refused_before_training(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["data.block_tokens=300", "ppo.continuation_tokens=300"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 2
    said = capsys.readouterr().err
    assert "`data.block_tokens` must be at most the 256 tokens" in said
    assert "`ppo.prompt_tokens` and `ppo.continuation_tokens` together" in said
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_rows_as_long_as_the_context_are_allowed(tiny: LanguageModel) -> None:
    assert tiny.context_length == 256
    fits = ["data.block_tokens=256", "ppo.prompt_tokens=56", "ppo.continuation_tokens=200"]
    check_lengths(load_config(CurriculumConfig, overrides=fits), tiny)
    with pytest.raises(ConfigError, match=r"at most the 256 tokens .*, got 257"):
        check_lengths(load_config(CurriculumConfig, overrides=[*fits, "data.block_tokens=257"]), tiny)


# --- the parts of a step ----------------------------------------------------------------------------------------------


def test_difficulty_is_the_frozen_models_loss_on_one_sample(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    setup, state = setup_and_state(tiny, corpora, Method("x", "learning_progress"))

    def measure(options: DifficultyOptions = CONFIG.difficulty) -> dict[str, list[float]]:
        changed = replace(setup, config=CONFIG.model_copy(update={"difficulty": options}))
        row = measure_difficulty(changed, state, 1)
        found: dict[str, list[float]] = row["difficulty"]
        return found

    first = measure()
    sample = [list(indices) for indices in state.sample]
    assert [len(indices) for indices in sample] == [5, 5]
    for dataset, corpus in enumerate(corpora):  # by hand
        losses = []
        for index in sample[dataset]:
            row = corpus.difficulty[index]
            logits = state.frozen_model.model(row[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).detach())
        assert first["mean"][dataset] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
        assert first["variance"][dataset] == pytest.approx(float(torch.stack(losses).var()), abs=1e-4)
    with torch.no_grad():
        next(tiny.model.parameters()).mul_(1.5)
    assert measure()["mean"] == first["mean"]  # the policy has moved, the frozen model has not
    state.refresh_frozen_model()
    assert measure()["mean"] != first["mean"]
    assert state.sample == sample
    measure(CONFIG.difficulty.model_copy(update={"resample": True}))
    assert state.sample != sample


def test_the_weights_are_shares_of_tokens_however_long_the_rows(tiny: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "pears"}\n' * 100)
    datasets = (
        DatasetOptions(name="short", location="short.jsonl"),
        DatasetOptions(name="noise", location="builtin:noise"),
    )
    corpora = read_corpora(DataOptions(root=str(tmp_path), datasets=datasets, block_tokens=24), tiny)
    assert len(corpora[0].train[0]) < 6  # rows four times as short as the noise's
    setup, state = setup_and_state(tiny, corpora, Method("x", "static", weights=(3.0, 1.0)))
    for step in range(1, 41):
        documents = draw_documents(setup, state, num_tokens=step * 200)
        assert 0 <= state.outcome.counts["tokens"] - step * 200 < 24
        assert (documents.token_mask.sum(1) >= 2).all()
    share = float(state.tokens_since[0] / state.tokens_since.sum())
    assert share == pytest.approx(0.75, abs=0.05)  # 8,000 tokens: about 85 draws of long rows
    assert int(state.tokens_since.sum()) == state.outcome.counts["tokens"]


def test_a_weight_of_zero_is_never_drawn(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    setup, state = setup_and_state(tiny, corpora, Method("x", "static", weights=(1.0, 0.0)))
    documents = draw_documents(setup, state, num_tokens=2_000)
    assert set(documents.datasets.tolist()) == {0}


# --- every way of learning --------------------------------------------------------------------------------------------

OWN = """
def letters(prompts, continuations, references):
    return [text.count("e") / 4 for text in continuations]
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "choice",
    [
        ["ppo.advantage=gae"],
        ["ppo.advantage=rloo", "ppo.group_size=4", "ppo.kl_place=loss_k2"],
        pytest.param(["ppo.advantage=gae", "value.kind=copy", "update.micro_batch_size=5"], marks=SLOW),
        pytest.param(["ppo.advantage=grpo", "ppo.group_size=4", "ppo.loss=gspo", "ppo.kl_place=loss_k3"], marks=SLOW),
        pytest.param(
            ["ppo.advantage=dr_grpo", "ppo.group_size=4", "ppo.aggregation=constant", "ppo.kl_place=loss_exact"],
            marks=SLOW,
        ),
        pytest.param(["ppo.advantage=reinforce_plus_plus", "ppo.loss=cispo"], marks=SLOW),
        pytest.param(["ppo.advantage=rloo", "ppo.group_size=4", "ppo.loss=cispo", "update.bf16=true"], marks=SLOW),
    ],
    ids=lambda choice: " ".join(choice),
)
def test_policy_gradient_alone_raises_a_reward_of_the_users(
    tiny_folder: Path, tmp_path: Path, choice: list[str]
) -> None:
    """Continuations full of the letter e, against the frozen policy on the same prompts."""
    (tmp_path / "mine.py").write_text(OWN)
    changes = [
        f"ppo.rewards=[{{name: '{tmp_path / 'mine.py'}:letters', weight: 1.0}}]",
        "ppo.temperature=1.0", "ppo.prompts=8", "ppo.continuation_tokens=6", "ppo.kl_coefficient=0.01",
        "ppo.kl_target=0", "update.steps=25", "update.cross_entropy_weight=0", "update.learning_rate=0.005",
        "controls.rules=[]", "validation.every=25", "validation.rows=64", "validation.prompt_tokens=0",
        "save_every=100", "difficulty.every=100", "record_every=100", "ppo.clip_epsilon_low=0.2", *choice,
    ]  # fmt: skip
    if "ppo.loss=gspo" in choice:
        changes += ["ppo.clip_epsilon_low=0.05", "ppo.clip_epsilon_high=0.05"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
    arms = result_of(tmp_path / "run")["arms"]
    assert arms["frozen_policy"]["reward_gain"]["mean"] == 0
    assert arms["learning_progress"]["reward_gain"]["mean"] > 0.15
    first = rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert "cross_entropy" not in first  # a weight of 0 costs no pass over the documents
    assert first["kl"] == pytest.approx(0, abs=1e-6) or "update.bf16=true" in choice


def test_an_adaptive_coefficient_holds_the_kl_near_its_target(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    changes = [
        f"ppo.rewards=[{{name: '{tmp_path / 'mine.py'}:letters', weight: 1.0}}]",
        "ppo.temperature=1.0", "ppo.prompts=8", "update.steps=40", "update.cross_entropy_weight=0",
        "update.learning_rate=0.001", "update.decay=none", "ppo.kl_coefficient=0.2", "ppo.kl_target=0.05",
        "ppo.kl_horizon=10", "ppo.kl_reference=untrained", "controls.rules=[]",
        "controls.frozen_policy=false", "validation.every=40",
        "save_every=100", "record_every=100", "validation.prompt_tokens=0",
    ]  # fmt: skip
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
    late = [row["kl"] for row in rows(tmp_path / "run" / "metrics.jsonl")[20:]]
    assert 0.02 < sum(late) / len(late) < 0.1


def test_an_early_stop_ends_the_ppo_of_a_step(tiny_folder: Path, tmp_path: Path) -> None:
    changes = ["ppo.kl_early_stop=1e-9", "controls.rules=[]", "controls.frozen_policy=false"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
    used = [row["minibatches_used"] for row in rows(tmp_path / "run" / "metrics.jsonl")[:STEPS]]
    assert all(1 <= number < 4 for number in used)


def test_a_reward_that_is_not_finite_is_left_out_and_told(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(prompts, continuations, references):\n    return [float('nan')] + [1.0] * (len(prompts) - 1)\n"
    )
    changes = [f"ppo.rewards=[{{name: '{tmp_path / 'mine.py'}:f', weight: 1.0}}]", "controls.rules=[]"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
    assert "1 rewards are NaN or infinite" in (tmp_path / "run" / "notices.log").read_text()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert math.isfinite(logged[0]["gradient_norm"])
    config = from_dict(CurriculumConfig, result_of(tmp_path / "run")["config"])
    assert all(math.isnan(e.recorded) == math.isnan(e.recomputed) for e in verify(config, tmp_path / "run", SERVICES))


# ---- sampler and scorer ---------------------------------------------------------------------------------------------


ONE_MINIBATCH = ("ppo.epochs=1", "ppo.minibatches=1", "controls.rules=[]", "update.steps=3")


def ratio_run(folder: Path, out: Path, *changes: str) -> list[float]:
    """KL from the policy that sampled, before each step's first update: 0 but for rounding."""
    assert main(arguments(folder, out, (*ONE_MINIBATCH, *changes))) == 0
    return [row["old_policy_kl"] for row in rows(out / "metrics.jsonl") if row["arm"] == METHODS[0]]


def test_a_ratio_that_does_not_begin_at_one_switches_the_fast_path_off(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu_engine, "_gated_silu", lambda x: 1.3 * functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    )
    monkeypatch.setattr(cpu_engine, "kernel_library", lambda: None)
    monkeypatch.setattr(LanguageModel, "_engine_difference", lambda _: 0.0)  # nothing has been noticed so far
    first, *later = ratio_run(tiny_folder, tmp_path / "run")
    assert first > 1e-6
    assert max(later) < 1e-8
    assert "fast path of" in (tmp_path / "run" / "notices.log").read_text()


def test_an_unusual_activation_gives_a_ratio_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    """GPT-2 with ReLU whose feed-forward networks give nothing at first; the shared position makes it exact."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 400}
    model = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="relu", initializer_range=0.2, bos_token_id=0))
    for layer in model.transformer.h:
        layer.mlp.c_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    assert max(ratio_run(tmp_path / "model", tmp_path / "run", "update.learning_rate=0.05")) < 1e-8


@pytest.mark.parametrize("change", ["model.dtype=bfloat16", "update.bf16=true"])
def test_in_bfloat16_the_ratio_begins_at_one(tiny_folder: Path, tmp_path: Path, change: str) -> None:
    assert max(ratio_run(tiny_folder, tmp_path / "run", change)) < 1e-6
