from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from preceptor.errors import DataError
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.ngram import NGram
from preceptor.systems.surgery.referee import ModelReferee, NGramReferee, load_referee, training_tokens
from preceptor.systems.surgery.student import build_student
from preceptor.systems.surgery.train import train
from tests.systems.surgery.small import CPU, small_config, write_text
from tests.systems.surgery.test_train import start


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `preceptor pretrain` leaves behind, with a model that learned nothing."""
    folder = tmp_path_factory.mktemp("pretrain")
    tokenizer = train_bpe_tokenizer(["the bee flies to the flower"], vocab_size=262, context_length=24)
    model = build_student(
        architecture="llama", vocab_size=262, num_layers=1, num_heads=2, width=16, block_size=24, seed=3, device=CPU
    )
    model.config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "result.json").write_text(json.dumps({"tokens": 1234}), encoding="utf-8")
    return folder / "model"


def test_the_ngram_costs_its_counting() -> None:
    tokens = torch.randint(5, (100,), generator=torch.Generator().manual_seed(0))
    referee = NGramReferee(tokens, order=3, vocab_size=5)
    assert torch.equal(
        referee.probabilities(tokens[None]), NGram(tokens, order=3, vocab_size=5).probabilities(tokens[None])
    )
    assert referee.training_flops == 300
    assert referee.flops_per_token == 2 * 3 * 5


def test_a_model_judges_each_row_after_its_begin_token(pretrained: Path) -> None:
    # To catch: the begin token's own prediction kept, so that all are one position late.
    lm = load_referee(str(pretrained), device=CPU)
    referee = ModelReferee(lm, training_tokens=1000, block_size=16)
    tokens = torch.randint(3, 262, (2, 16), generator=torch.Generator().manual_seed(0))
    found = referee.probabilities(tokens)
    assert found.shape == (2, 16, 262)
    row = torch.tensor([[lm.begin_token, *tokens[1, :5].tolist()]])
    with torch.no_grad():
        expected = lm.model(input_ids=row).logits[0, -1].softmax(-1)
    assert torch.allclose(found[1, 4], expected, atol=1e-6)
    assert referee.training_flops > 1000 * 6 * 262 * 16  # the head alone
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_a_referee_that_reads_too_little_is_refused(pretrained: Path) -> None:
    with pytest.raises(DataError, match="reads 24 tokens, a block of 24"):
        ModelReferee(load_referee(str(pretrained), device=CPU), training_tokens=1, block_size=24)


def test_what_it_cost_is_read_beside_it(pretrained: Path, tmp_path: Path) -> None:
    assert training_tokens(str(pretrained)) == 1234
    with pytest.raises(DataError, match=r"set `referee.training_tokens`"):
        training_tokens(str(tmp_path / "model"))


def test_a_run_with_a_pretrained_referee_counts_its_training(pretrained: Path, tmp_path: Path) -> None:
    config: SurgeryConfig = small_config(
        write_text(tmp_path),
        "referee.kind=model",
        f"referee.model={pretrained}",
        "data.tokens=referee",
        "learning.partial_reward=0.5",
        "controls.arms=[]",
        "evaluation.ladder_order=2",
    )
    with start(config, tmp_path / "run") as run:
        result = train(config, run)
    arms = result["arms"]
    lm = load_referee(str(pretrained), device=CPU)
    trained = ModelReferee(lm, training_tokens=1234, block_size=16).training_flops
    assert arms["no_edit"]["gflops"]["mean"] > arms["cross_entropy"]["gflops"]["mean"] + trained / 1e9
    # At equal FLOPs cross-entropy may take more updates, and does.
    equal = arms["cross_entropy_equal_flops"]
    assert equal["tokens"]["mean"] > arms["cross_entropy"]["tokens"]["mean"]
    step = arms["cross_entropy"]["gflops"]["mean"] / 8
    assert 0 <= arms["no_edit"]["gflops"]["mean"] - equal["gflops"]["mean"] < step
