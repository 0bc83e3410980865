from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError, StorageError
from preceptor.runs.tensors import join_state, read_tensors, split_state, write_tensors
from preceptor.systems.surgery.policy import ReplayBuffer


def fill(buffer: ReplayBuffer, numbers: range) -> None:
    """Transition n is the state (n, n), the action n / 100, the reward −n and the next state (n + 1, n + 1)."""
    for n in numbers:
        state = torch.tensor([n, n]).float()
        buffer.add(state, torch.tensor([n / 100]), -n, state + 1, terminated=n % 3 == 0)


def make(where: str, folder: Path, capacity: int = 5) -> ReplayBuffer:
    limit = 1 << 20 if where == "memory" else 0
    return ReplayBuffer(capacity, state_dim=2, action_dim=1, memory_limit_bytes=limit, spill_folder=folder)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_is_sampled_is_what_was_added_last(where: str, tmp_path: Path) -> None:
    buffer = make(where, tmp_path)
    assert buffer.spilled == (where == "file")
    fill(buffer, range(3))
    assert (len(buffer), buffer.num_added) == (3, 3)
    fill(buffer, range(3, 12))
    assert (len(buffer), buffer.num_added) == (5, 12)
    batch = buffer.sample(500, generator=torch.Generator().manual_seed(0))
    numbers = batch.states[:, 0]
    assert set(numbers.tolist()) == {7, 8, 9, 10, 11}
    assert torch.equal(batch.states, numbers[:, None].expand(-1, 2))
    assert torch.equal(batch.actions, numbers[:, None] / 100)
    assert torch.equal(batch.rewards, -numbers)
    assert torch.equal(batch.next_states, batch.states + 1)
    assert torch.equal(batch.terminated, numbers % 3 == 0)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_slot_that_is_not_filled_is_never_sampled(where: str, tmp_path: Path) -> None:
    buffer = make(where, tmp_path)
    fill(buffer, range(7, 10))
    numbers = buffer.sample(200, generator=torch.Generator().manual_seed(0)).states[:, 0]
    assert set(numbers.tolist()) == {7, 8, 9}


def test_a_buffer_spills_from_the_first_byte_above_the_limit(tmp_path: Path) -> None:
    num_bytes = 5 * (2 + 1 + 1 + 2 + 1) * 4
    for limit, spilled in ((num_bytes, False), (num_bytes - 1, True)):
        buffer = ReplayBuffer(5, state_dim=2, action_dim=1, memory_limit_bytes=limit, spill_folder=tmp_path)
        assert buffer.spilled == spilled


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of mappings")
def test_what_is_spilled_is_written_to_the_file(tmp_path: Path) -> None:
    """Mapped as shared ("s"): a private mapping would keep every row that is written in memory after all."""
    buffer = make("file", tmp_path)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert [line.split()[1] for line in mapped] == ["rw-s"]
    assert buffer.spilled


def test_sampling_is_uniform_and_from_the_generator_alone() -> None:
    buffer = ReplayBuffer(4, state_dim=2, action_dim=1)
    fill(buffer, range(4))
    before = torch.get_rng_state()
    counts = buffer.sample(40_000, generator=torch.Generator().manual_seed(1)).states[:, 0].long().bincount()
    assert (counts - 10_000).abs().max() < 5 * (40_000 * 0.25 * 0.75) ** 0.5  # five standard deviations
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_added", [0, 3, 5, 12])
@pytest.mark.parametrize(("saved", "loaded"), [("memory", "memory"), ("file", "memory"), ("memory", "file")])
def test_a_checkpoint_brings_it_back_exactly(num_added: int, saved: str, loaded: str, tmp_path: Path) -> None:
    buffer = make(saved, tmp_path)
    fill(buffer, range(num_added))
    tensors, rest = split_state(buffer.state_dict())
    write_tensors(tmp_path / "buffer.safetensors", tensors)
    resumed = make(loaded, tmp_path)
    resumed.load_state_dict(join_state(read_tensors(tmp_path / "buffer.safetensors"), rest))
    for each in (buffer, resumed):
        fill(each, range(50, 53))  # the ring goes on at the same place
    left, right = (each.sample(64, generator=torch.Generator().manual_seed(2)) for each in (buffer, resumed))
    assert all(torch.equal(*pair) for pair in zip(left, right, strict=True))
    assert buffer.num_added == resumed.num_added


def test_only_what_was_added_is_saved(tmp_path: Path) -> None:
    buffer = make("file", tmp_path, capacity=10_000)
    fill(buffer, range(3))
    assert buffer.state_dict()["transitions"].shape == (3, 7)


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    buffer = make("file", tmp_path, capacity=1000)
    assert list(tmp_path.iterdir()) == []
    fill(buffer, range(1000))
    assert (buffer.sample(10, generator=torch.Generator().manual_seed(0)).rewards <= 0).all()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.NamedTemporaryFile

    def on_a_full_disk(**options: object) -> object:
        file = real(**options)  # type: ignore[call-overload]

        def write(data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file.write = write
        return file

    monkeypatch.setattr("preceptor.systems.surgery.policy.tempfile.NamedTemporaryFile", on_a_full_disk)
    with pytest.raises(StorageError, match="disk full: cannot make room for a replay buffer of 140 bytes"):
        make("file", tmp_path)
    with pytest.raises(StorageError, match="No such file or directory"):
        monkeypatch.undo() or make("file", tmp_path / "absent")  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    "state",
    [
        {"num_added": 3, "transitions": torch.zeros(3, 9)},
        {"num_added": 9, "transitions": torch.zeros(9, 7)},  # of a larger ring
        {"num_added": 4, "transitions": torch.zeros(3, 7)},
    ],
)
def test_a_state_of_another_buffer_is_refused(state: dict[str, object], tmp_path: Path) -> None:
    buffer = make("memory", tmp_path)
    fill(buffer, range(2))
    with pytest.raises(CheckpointError, match="the saved replay buffer has shape"):
        buffer.load_state_dict(state)
    assert buffer.num_added == 2


def test_what_cannot_teach_is_refused() -> None:
    buffer = ReplayBuffer(4, state_dim=2, action_dim=1)
    state, action = torch.zeros(2), torch.zeros(1)
    adds: list[tuple[Callable[[], None], type[Exception]]] = [
        (lambda: buffer.add(state, action, float("nan"), state, terminated=False), NumericError),
        (lambda: buffer.add(state, action / 0, 0.0, state, terminated=False), NumericError),
        (lambda: buffer.add(action, action, 0.0, state, terminated=False), ShapeError),
    ]
    for add, error in adds:
        with pytest.raises(error):
            add()
    assert len(buffer) == 0
    with pytest.raises(ShapeError, match="nothing to sample"):
        buffer.sample(1, generator=torch.Generator())


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ReplayBuffer(0, state_dim=0, action_dim=1)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="give spill_folder, raise the limit or lower the capacity"):
        ReplayBuffer(1000, state_dim=2, action_dim=1, memory_limit_bytes=100)
