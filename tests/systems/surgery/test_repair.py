"""A surgeon whose policy is known repairs models on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import preceptor
from preceptor.cli import main
from preceptor.errors import ConfigError, DataError
from preceptor.lm.edit_targets import attention_targets
from preceptor.runs.export import save_model
from preceptor.systems.surgery.patient import load_editable
from preceptor.systems.surgery.setup import character_tokenizer
from preceptor.systems.surgery.site_policy import SURGEON, SiteNetwork, TrainedSurgeon
from preceptor.systems.surgery.sites import FEATURES
from tests.systems.surgery.small import CPU, small_model, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def damaged(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the text a little, whose first head is then six times too loud."""
    tokenizer = character_tokenizer(text.read_text(encoding="utf-8"), context_length=16)
    model = small_model(vocab_size=len(tokenizer))
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = tokens[torch.randint(len(tokens) - 17, (16, 1)) + torch.arange(17)]
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.transpose(1, 2), rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target = attention_targets(model, roles=["output"])[0]
    target.write((target.matrix().reshape(2, -1) * torch.tensor([[6.0], [1.0]])).reshape(16, 16))
    folder = tmp_path_factory.mktemp("damaged") / "model"
    save_model(model, tokenizer, folder)
    return folder


def write_surgeon(run: Path, slope: float, *, feature: str = "norm_in_layer") -> Path:
    """A run whose surgeon answers tanh(``slope`` · one feature), passed through both of its networks."""
    actor = SiteNetwork(extra=0, outputs=2, summed=False, hidden_dim=2, num_networks=1, generator=torch.Generator())
    with torch.no_grad():
        for network in (actor.encoder, actor.decoder):
            for parameter in network.parameters():
                parameter.zero_()
        column = FEATURES.index(feature)
        actor.encoder.weights[0][0, column] = torch.tensor([1.0, -1.0])  # relu keeps either sign apart
        actor.encoder.weights[1][0] = torch.eye(2)
        actor.decoder.weights[0][0, :2] = torch.eye(2)
        actor.decoder.weights[1][0, :, 0] = torch.tensor([slope, -slope])
    surgeon = TrainedSurgeon(
        actor, kind="head_scale", rank=1, roles=("output",), max_factor=6.0, gradients=True, num_windows=4
    )
    surgeon.save(run / SURGEON)
    return run


def test_a_good_surgeon_is_believed_and_the_model_is_written(damaged: Path, text: Path, tmp_path: Path) -> None:
    run = write_surgeon(tmp_path / "run", -1.0)  # a head that is louder than its layer's mean is made quieter
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    done = preceptor.repair(str(damaged), surgeon=run, text=text, out=tmp_path / "out", threads=1)
    assert done.gain > 0.1
    assert done.low is not None
    assert done.low > 0
    assert done.edits[0].committed
    assert done.loss_after == pytest.approx(done.loss_before - done.gain)
    assert done.sites[:2] == [("layer 0 output", "head 1"), ("layer 0 output", "head 2")]
    # One 16 × 16 matrix in float32 for each of two layers.
    assert done.bytes_held == 2 * 16 * 16 * 4
    assert before == {file.name: file.read_bytes() for file in damaged.iterdir()}, "the given model was changed"
    written = json.loads((tmp_path / "out" / "repair.json").read_text(encoding="utf-8"))
    assert written["gain"] == done.gain
    models = [load_editable(str(folder), device=CPU)[0] for folder in (tmp_path / "out", damaged)]
    ours, theirs = (attention_targets(model, roles=["output"])[0] for model in models)
    assert float(ours.matrix()[:8].norm()) < float(theirs.matrix()[:8].norm())


def test_a_harmful_surgeon_changes_nothing(damaged: Path, text: Path, tmp_path: Path) -> None:
    run = write_surgeon(tmp_path / "run", 1.0)  # what is too loud is made louder
    done = preceptor.repair(str(damaged), surgeon=run, text=text, out=tmp_path / "out", evaluations=2, threads=1)
    assert [edit.committed for edit in done.edits] == [False, False]
    assert done.gain == 0.0
    ours, theirs = (load_editable(str(folder), device=CPU)[0] for folder in (tmp_path / "out", damaged))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_command_says_what_was_gained(
    damaged: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_surgeon(tmp_path / "run", -1.0)
    words = ["repair", str(damaged), "--surgeon", str(run), "--text", str(text), "--threads", "1"]
    assert main([*words, "--to", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "of 3 kept" in said
    assert "gain:    +" in said
    assert "% of a copy of the model" in said
    assert main([*words, "--to", str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_bad_arguments_are_named(damaged: Path, text: Path, tmp_path: Path) -> None:
    run = write_surgeon(tmp_path / "run", 1.0)
    short = tmp_path / "short.txt"
    short.write_text("the bee flies. " * 4, encoding="utf-8")
    with pytest.raises(DataError, match="longer text"):
        preceptor.repair(str(damaged), surgeon=run, text=short, out=tmp_path / "out", threads=1)
    with pytest.raises(ConfigError, match="no trained surgeon"):
        preceptor.repair(str(damaged), surgeon=tmp_path, text=text, out=tmp_path / "out", threads=1)
    with pytest.raises(ConfigError, match="at least 1"):
        preceptor.repair(str(damaged), surgeon=run, text=text, out=tmp_path / "out", evaluations=0)
