"""The checks on the bundled model: all well as it is, and each one fails on the fault that it is there for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from preceptor.doctor import model as doctor_model
from preceptor.doctor.model import check_model
from preceptor.lm import decode
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling


@pytest.fixture
def lm() -> LanguageModel:
    return load_language_model("starter", device=torch.device("cpu"))


def statuses(lm: LanguageModel, sampling: Sampling | None = None) -> dict[str, str]:
    return {check.name: check.status for check in check_model(lm, sampling or Sampling())}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.9, suppressed=(0, 1))])
def test_a_sound_model_passes_and_is_left_as_it_was(lm: LanguageModel, sampling: Sampling) -> None:
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    checks = list(check_model(lm, sampling))
    assert [check.status for check in checks] == ["ok"] * 9, "\n".join(check.line() for check in checks)
    after = dict(lm.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in after.values())


def test_an_adapter_is_what_learns() -> None:
    pytest.importorskip("peft", reason="needs the extra 'lora'")
    lm = load_language_model("starter", device=torch.device("cpu"), adapter=Adapter(rank=2))
    assert set(statuses(lm).values()) == {"ok"}


def test_a_parameter_that_no_gradient_reaches_is_named(lm: LanguageModel) -> None:
    lm.model.register_parameter("stranded", torch.nn.Parameter(torch.ones(2)))
    (check,) = [check for check in check_model(lm, Sampling()) if check.name.startswith("gradient")]
    assert check.status == "fail"
    assert "misses stranded" in check.figure


def test_a_reference_that_shares_weights_is_found(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "initial_model", lambda self: self)
    assert statuses(lm)["reference is frozen"] == "fail"


def test_a_reference_of_other_weights_is_found(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: LanguageModel) -> LanguageModel:
        frozen = self.frozen_copy()
        with torch.no_grad():
            next(frozen.model.parameters()).mul_(1.5)
        return frozen

    monkeypatch.setattr(LanguageModel, "initial_model", other)
    assert statuses(lm)["KL to the reference at step 0"] == "fail"


def test_a_sampler_that_records_another_temperature_is_found(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = decode.draw
    monkeypatch.setattr("preceptor.doctor.model.draw", lambda log_probs, generator: draw(1.2 * log_probs, generator))
    assert statuses(lm)["sampled distribution equals scored"] == "fail"


@pytest.mark.parametrize(("errors", "status"), [(4.0, "ok"), (6.0, "fail")])
def test_draws_may_be_five_standard_errors_from_their_probability(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, errors: float, status: str
) -> None:
    """A token of some 2 % is drawn too often, at the cost of the most probable one, which has a larger error."""
    prepared: list[torch.Tensor] = []

    def drawn(log_probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if not prepared:
            p, n = log_probs[0].double().exp(), max(1_000, min(doctor_model.NUM_DRAWS, doctor_model.MAX_DRAWN // 4096))
            counts = (p * n).round().long()
            rare = int((p - 0.02).abs().argmin())
            counts[rare] += round(errors * float((n * p[rare] * (1 - p[rare])).sqrt()))
            counts[p.argmax()] -= counts.sum() - n
            prepared.append(torch.arange(len(p)).repeat_interleave(counts))
        taken, prepared[0] = prepared[0][: len(log_probs)], prepared[0][len(log_probs) :]
        return taken

    monkeypatch.setattr(doctor_model, "draw", drawn)
    assert lm.vocab_size == 4096
    assert statuses(lm)["sampled distribution equals scored"] == status


def test_a_cache_that_forgets_is_found(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    update = decode.KVCacheLayer.update

    def forgetful(self: decode.KVCacheLayer, *states: torch.Tensor, **rest: object) -> object:
        keys, values = update(self, *states, **rest)
        keys[..., :2, :] = 0.0
        return keys, values

    monkeypatch.setattr(decode.KVCacheLayer, "update", forgetful)
    found = statuses(lm)
    assert found["cache equals re-encoding"] == "fail"
    assert found["probability ratio at step 0"] == "fail"


def test_text_that_becomes_control_tokens_is_found(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = LanguageModel.encode
    special = lm.special_tokens[0]

    def trusting(self: LanguageModel, text: str) -> list[int]:
        word = str(self.tokenizer.convert_ids_to_tokens(special))
        return [special, *encode(self, text)] if word in text else encode(self, text)

    monkeypatch.setattr(LanguageModel, "encode", trusting)
    assert statuses(lm)["control tokens from data"] == "fail"


LARGE_VOCABULARY = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from preceptor.doctor.model import check_model
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=128_256, max_position_embeddings=256))
lm = LanguageModel(model, load_language_model("starter", device=torch.device("cpu")).tokenizer, name="wide")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
statuses = [check.status for check in check_model(lm, Sampling(suppressed=lm.never_drawn))]
print(statuses.count("fail"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_less_than_a_gibibyte() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE_VOCABULARY], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    failures, kibibytes = map(int, done.stdout.split())
    assert failures == 0
    assert kibibytes < 2**20
