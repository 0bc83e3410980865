from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.errors import DataError
from preceptor.runs.export import save_model
from preceptor.systems.surgery.config import ARMS, ControlOptions, PhaseOptions
from preceptor.systems.surgery.rewards import next_token_logits
from preceptor.systems.surgery.setup import (
    Phase,
    character_tokenizer,
    make_corpus,
    plan_phases,
    read_text,
)
from tests.systems.surgery.small import CPU, small_model

TEXT = "Ein Mops kam in die Küche\nund stahl dem Koch ein Ei. " * 20
PHASES = PhaseOptions(bootstrap_steps=100, surgery_edits=20, joint_edits=10)


def plan(*, equal_flops: int = 100, **controls: tuple[str, ...]) -> list[Phase]:
    return list(
        plan_phases(
            phases=PHASES,
            controls=ControlOptions(**controls),  # type: ignore[arg-type]
            objective="expected",
            gradient_steps=7,
            equal_flops_steps=lambda _: equal_flops,
        )
    )


def test_three_phases_come_first_and_then_the_controls() -> None:
    phases = plan()
    assert [(phase.method, phase.kind, phase.start) for phase in phases] == [
        ("no_edit", "bootstrap", "initial"),
        ("learned", "surgery", "bootstrapped"),
        ("joint", "joint", "as_it_is"),
        ("shuffled", "surgery", "bootstrapped"),
        ("evolution", "surgery", "bootstrapped"),
        ("random", "surgery", "bootstrapped"),
        ("best_of_n", "surgery", "bootstrapped"),
        ("gradient", "bootstrap", "bootstrapped"),
        ("training", "joint", "bootstrapped"),
        ("cross_entropy", "bootstrap", "initial"),
    ]
    pretrained = {"pretrained", "joint_pretrained"}  # these need a surgeon that was trained before
    assert {phase.method for phase in phases} == {*ARMS, "cross_entropy"} - pretrained
    assert {phase.num_steps for phase in phases if phase.kind == "surgery"} == {20}
    assert [phase.continues for phase in phases].count(True) == 1
    training = next(phase for phase in phases if phase.method == "training")
    assert training.surgeon is None
    assert training.num_steps == 10


def test_another_run_at_equal_flops_where_it_differs() -> None:
    phases = plan(arms=(), objectives=("distil",), equal_flops=123)
    assert [(phase.method, phase.num_steps) for phase in phases] == [
        ("no_edit", 100), ("distil", 100), ("distil_equal_flops", 123)
    ]  # fmt: skip
    assert len(plan(arms=(), objectives=("distil",), equal_flops=99)) == 2  # a hundredth is no difference


def test_characters_are_the_vocabulary_and_come_back(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(TEXT, context_length=8)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == [sorted(set(TEXT)).index(character) for character in TEXT]
    assert tokenizer.decode(ids) == TEXT


def test_the_split_is_by_characters(tmp_path: Path) -> None:
    path = tmp_path / "mops.txt"
    path.write_text(TEXT.strip(), encoding="utf-8")
    text = TEXT.strip()
    cut = int(0.9 * len(text))
    corpus = make_corpus(str(path), tokens="characters", vocab_size=0, train_share=0.9, block_size=8)
    assert corpus.name == "mops"
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.vocab_size == len(set(text))
    assert corpus.tokenizer.decode(corpus.train.tolist()) == text[:cut]
    assert corpus.tokenizer.decode(corpus.held_out.tolist()) == text[cut:]


def test_byte_pairs_are_fitted_on_the_training_part(tmp_path: Path) -> None:
    path = tmp_path / "mops.txt"
    path.write_text("aaaa " * 400 + "zqzq " * 100, encoding="utf-8")
    corpus = make_corpus(str(path), tokens="bpe", vocab_size=300, train_share=0.8, block_size=8)
    assert "zq" not in corpus.tokenizer.get_vocab()
    assert corpus.tokenizer.decode(corpus.train.tolist()).startswith("aaaa aaaa")


def test_without_a_file_python_explains_itself() -> None:
    name, text = read_text("")
    assert name == "python_documentation"
    assert len(text) > 300_000
    assert "expression" in text


def test_a_text_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short to learn from", encoding="utf-8")
    with pytest.raises(DataError, match="a block of 16 needs more than 32; give a longer text"):
        make_corpus(str(path), tokens="characters", vocab_size=0, train_share=0.9, block_size=16)
    with pytest.raises(DataError, match="does not exist"):
        read_text(str(tmp_path / "absent.txt"))


def test_a_saved_character_tokenizer_is_one_of_transformers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("abcdefg", context_length=16)
    model = small_model()
    save_model(model, tokenizer, tmp_path / "model")
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([loaded_tokenizer("gabe", add_special_tokens=False)["input_ids"]])
    assert tokens.tolist() == [[6, 0, 1, 4]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(CPU)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, next_token_logits(model, tokens), atol=1e-6)
