"""A tiny model learns a tiny text; a stopped training goes on bit for bit; held-out articles are never trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor import cli
from preceptor.config import load_config
from preceptor.data.articles.pairs import split_sentences
from preceptor.errors import ConfigError, DataError
from preceptor.pretraining import evaluate
from preceptor.pretraining.config import Data, Optimisation, PretrainConfig, Source
from preceptor.pretraining.evaluate import bits_per_byte, previous_sentence_preference
from preceptor.pretraining.train import _training_documents, build_optimizers, draw_windows, learning_rate_scale

TEXT = "The keeper lights the lamp. The lamp burns all night. The ship sees the lamp. The keeper sleeps at dawn.\n\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT * 40)
    (folder / "held.txt").write_text(TEXT * 2)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {n} is here."}) + "\n" for n in range(60)))
    return folder


def pretrain(corpus: Path, out: Path, *words: str) -> int:
    sources = "data.sources=[{path: ., share: 3}, {path: rows.jsonl, share: 1, join: 4}]"
    settings = [f"data.root={corpus}", sources, "data.held_out=.", "data.held_out_names=[held.txt, rows.jsonl]"]
    command = ["pretrain", "--preset", "smoke", "--out", str(out), "--threads", "1", "--no-report"]
    return cli.main([*command, *(word for setting in [*settings, *words] for word in ("--set", setting))])


def test_a_tiny_model_learns_and_loads(corpus: Path, tmp_path: Path) -> None:
    assert (
        pretrain(
            corpus, tmp_path / "run", "data.held_out_names=[held.txt]", "optimisation.steps=30", "evaluate_every=20"
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(512), abs=0.4)  # random weights know nothing of 512 entries
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [20, 30]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measured = bits_per_byte(model, tokenizer, [(corpus / "held.txt").read_text().strip()], context_length=128)
    assert measured == pytest.approx(result["held_out_bits_per_byte"], rel=1e-6)


def test_resume_is_bit_identical(corpus: Path, tmp_path: Path) -> None:
    assert pretrain(corpus, tmp_path / "whole", "data.held_out_names=[held.txt]") == 0
    assert pretrain(corpus, tmp_path / "cut", "data.held_out_names=[held.txt]") == 0
    for step in (10,):
        checkpoint = tmp_path / "cut" / "checkpoints" / f"step-{step:06d}"
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert cli.main(["resume", str(tmp_path / "cut"), "--no-report"]) == 0
    model = "model/model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "cut" / model).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_held_out_files_are_left_out_of_a_folder(corpus: Path) -> None:
    data = Data(root=str(corpus), sources=(Source(path="."),), held_out=".", held_out_names=("held.txt", "rows.jsonl"))
    assert _training_documents(corpus, data, ".", "text", 1) == [(TEXT * 40).strip()]
    (corpus / "empty").mkdir()
    with pytest.raises(DataError, match="has no document"):
        _training_documents(corpus, data, "empty", "text", 1)


def test_learning_rate_by_hand() -> None:
    optimisation = Optimisation(steps=10, warm_up_steps=2, decay_fraction=0.5)  # falls over the last 5 steps
    scales = [learning_rate_scale(step, optimisation) for step in range(1, 11)]
    assert scales == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_windows_begin_with_the_begin_token_and_follow_the_shares() -> None:
    streams = [torch.arange(100, 200, dtype=torch.int32), torch.arange(1000, 1300, dtype=torch.int32)]
    windows = draw_windows(
        streams,
        torch.tensor([3.0, 1.0]),
        batch_size=4000,
        length=5,
        begin=7,
        generator=torch.Generator().manual_seed(0),
    )
    assert windows.shape == (4000, 5)
    assert (windows[:, 0] == 7).all()
    assert (windows[:, 2:] - windows[:, 1:-1] == 1).all()  # a stretch of one stream
    first = windows[:, 1] < 1000
    assert float(first.double().mean()) == pytest.approx(0.75, abs=0.03)  # 4 standard errors of 0.0068
    assert int(windows[first][:, 1:].min()) == 100
    assert int(windows[first][:, 1:].max()) == 199  # both ends are reached


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(5, 4), "proj": torch.nn.Linear(4, 4)})
    optimizers = build_optimizers(model, Optimisation())
    sizes = {name: [tuple(p.shape) for p in o.param_groups[0]["params"]] for name, o in optimizers.items()}
    assert sizes == {"muon": [(4, 4)], "adamw": [(5, 4), (4,)]}


def test_faults_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, overrides=["model.num_heads=0", "model.num_key_value_heads=0", "save_every=0"])
    assert caught.value.faults == (
        "`model.num_heads` must be at least 1, got 0",
        "`model.num_key_value_heads` must be at least 1, got 0",
        "`save_every` must be at least 1, got 0",
        "`data.sources` is empty; name at least one text file",
    )


def test_the_starter_prefers_the_true_previous_sentence(test_data: Path) -> None:
    """The starter's promise: at most 2.2 bits per byte, at least 0.10 nats, on articles it never saw."""
    from importlib import resources

    folder = str(resources.files("preceptor") / "starter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(test_data / "wiki" / "articles" / f"{name}.txt").read_text() for name in ("Aikido", "Bodmin", "Albedo")]
    assert bits_per_byte(model, tokenizer, [text[:6000] for text in texts], context_length=1024) < 2.2
    sentences = [[s for s in split_sentences(text) if 15 <= len(s) <= 400][:20] for text in texts]
    mean, standard_error = previous_sentence_preference(model, tokenizer, sentences)
    assert mean - 2 * standard_error > 0.10


def test_the_preference_is_a_mean_with_the_standard_error_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains of 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 2 = 7."""
    told = {("a", "b"): 1.0, ("b", "c"): 2.0, ("x", "y"): 6.0}
    monkeypatch.setattr(
        evaluate, "_sentence_log_prob", lambda m, t, before, sentence: told.get((before, sentence), 0.0)
    )
    mean, error = evaluate.previous_sentence_preference(None, None, [["a", "b", "c"], ["x", "y"]])  # type: ignore[arg-type]
    assert mean == 3
    assert error == pytest.approx(math.sqrt(7 / 3))
