from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.errors import CheckpointError, ConfigError, StorageError
from preceptor.runs.checkpoint import CheckpointStore

KILLED = 77


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, generator=generator)
    return {
        "policy": {"w": weight, "tied": weight, "half": weight.bfloat16()},
        "optimizer": {"step": torch.tensor(float(step)), "betas": (0.9, 0.95)},
        "episode": 8 * step,
        "mean": step / 7,
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, state_at(step))


def assert_is(checkpoint, step: int) -> None:
    assert checkpoint.step == step
    assert_equal(checkpoint.state, state_at(step))


def assert_equal(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got == expected


@pytest.mark.usefixtures("real_fsync")
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None
    save(store, 123)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*/*")) == [
        "manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints/step-000123").is_dir()
    assert_is(CheckpointStore(tmp_path / "checkpoints").latest(), 123)


def test_order_is_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 999_998, 1_000_001, 999_999)
    assert store.steps() == [999_999, 1_000_001]
    assert_is(store.latest(), 1_000_001)


def test_order_of_operations_on_the_disk(tmp_path: Path, disk) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    operations = disk.operations_of(lambda: save(store, 2))
    names = [name for name, _ in operations]
    written = [Path(args[0]).name for name, args in operations if name == "open" and args[1] & os.O_CREAT]
    assert written == ["policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    publish = operations.index(("rename", (tmp_path / ".tmp-step-000002", tmp_path / "step-000002")))
    # Four files and then their folder are on the disk before the rename, and nothing is opened for writing after it.
    assert names[:publish].count("fsync") == 5
    opens = [args[0] for name, args in operations[:publish] if name == "open"]
    assert opens[-1] == tmp_path / ".tmp-step-000002"
    assert names[publish - 1] == "fsync"
    # The rename itself is on the disk before the first removal.
    assert names[publish + 1 : publish + 3] == ["open", "fsync"]
    assert operations[publish + 1][1][0] == tmp_path
    assert not {"unlink", "rmdir"} & set(names[: publish + 3])
    assert "unlink" in names[publish + 3 :]


SCENARIOS = {  # name: (steps saved before, the step whose save dies, the steps that may be found afterwards)
    "first": ([], 1, {None, 1}),
    "with pruning": ([1, 2], 3, {2, 3}),
    "same step again": ([1, 2], 2, {2}),
    "after a damaged one": ([1, 2, -4], 3, {2, 3}),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_dying_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, disk, fork, scenario: str) -> None:
    before, step, allowed = SCENARIOS[scenario]
    base = tmp_path / "base"
    base.mkdir()
    store = CheckpointStore(base, keep_last=2)
    for old in before:
        save(store, abs(old))
        if old < 0:
            (base / f"step-{-old:06d}/state.json").write_text("{}")

    def resume_and_save(root: Path) -> None:
        store = CheckpointStore(root, keep_last=2)
        store.latest()
        save(store, step)

    shutil.copytree(base, tmp_path / "whole")
    operations = disk.operations_of(lambda: resume_and_save(tmp_path / "whole"))
    assert len(operations) > 20
    points = [(index, False) for index in range(len(operations) + 1)]
    points += [(index, True) for index, (name, _) in enumerate(operations) if name == "write"]
    found = set()
    for index, torn in points:
        root = tmp_path / f"{index}-{torn}"
        shutil.copytree(base, root)

        def die(index: int = index, torn: bool = torn, root: Path = root) -> None:
            with disk.watched(disk.dies_at(index, torn=torn)):
                resume_and_save(root)

        assert fork(die).wait() == (KILLED if index < len(operations) else 0)
        store = CheckpointStore(root, keep_last=2)
        checkpoint = store.latest()
        found.add(checkpoint.step if checkpoint else None)
        assert all(len(os.listdir(path)) == 4 for path in root.glob("step-*")), "no half-removed checkpoint"
        assert found <= allowed, f"after operation {index}, {operations[index]}"
        if checkpoint:
            assert_is(checkpoint, checkpoint.step)
        # A new process goes on from there, and what the dead one left is gone.
        save(store, 5)
        assert_is(store.latest(), 5)
        assert not [name for name in os.listdir(root) if not name.startswith("step-")]
    assert found == allowed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["disk full", "input/output error"])
def test_a_failing_disk_is_told_and_costs_nothing(tmp_path: Path, disk, number: int) -> None:
    expected = (
        "disk full: cannot save" if number == errno.ENOSPC else "cannot save checkpoint step-000003.*Input/output"
    )
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1, 2)
    operations = disk.operations_of(lambda: save(CheckpointStore(tmp_path, keep_last=5), 3))
    publish = [name for name, _ in operations].index("rename")
    shutil.rmtree(tmp_path / "step-000003")
    assert operations[0][0] == "mkdir", "of the folder that is there already, whose failure pathlib overlooks"
    for index in range(1, publish + 1):
        with disk.watched(disk.fails_at(index, number)), pytest.raises(StorageError, match=expected) as caught:
            save(store, 3)
        assert "checkpoint step-000002 is intact" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert store.steps() == [1, 2]
        assert_is(store.latest(), 2)
        assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"], "the space must be given back"
    save(store, 3)
    assert store.steps() == [2, 3]


def test_a_failing_removal_is_told_and_the_new_checkpoint_stays(tmp_path: Path, disk) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)

    def hook(index: int, name: str, args: tuple[object, ...]) -> None:
        if name == "unlink":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with disk.watched(hook), pytest.raises(StorageError, match=r"cannot remove old.*checkpoint step-000002 is saved"):
        save(store, 2)
    assert_is(store.latest(), 2)
    save(store, 3)
    assert os.listdir(tmp_path) == ["step-000003"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 << 20))
    with pytest.raises(StorageError, match=r"disk full: .* needs 5\.0 MiB, 2\.0 MiB are free; .*step-000001 is intact"):
        store.save(2, {"policy": {"w": torch.zeros(1 << 20)}})
    assert os.listdir(tmp_path) == ["step-000001"]
    save(store, 2)


def test_killed_at_random_moments(tmp_path: Path, fork) -> None:
    chance = random.Random(1)
    store = CheckpointStore(tmp_path, keep_last=2)
    reached = 0
    for _ in range(20):
        reader, writer = os.pipe()

        def work(writer: int = writer) -> None:
            latest = store.latest()
            for step in itertools.count(latest.step + 1 if latest else 1):
                save(store, step)
                os.write(writer, step.to_bytes(4, "big"))

        child = fork(work)
        os.close(writer)
        told = os.read(reader, 4)  # one save for certain, however busy the machine is
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        with open(reader, "rb") as file:
            told = (told + file.read())[-4:]
        latest = store.latest()
        reached = max(reached, int.from_bytes(told, "big"))
        assert (latest.step if latest else 0) in (reached, reached + 1), "a save that was told done must be found"
        reached = latest.step if latest else 0
        if latest:
            assert_is(latest, latest.step)
        assert not store.notices
    assert reached >= 20


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    chance = random.Random(2)
    files = sorted((tmp_path / "step-000002").iterdir())
    assert len(files) == 4
    cases = [(chance.choice(files), None) for _ in range(200)]
    cases += [(tmp_path / "step-000002/manifest.json", place) for place in range(0, files[0].stat().st_size, 2)]
    for path, place in cases:
        data = path.read_bytes()
        place = chance.randrange(len(data)) if place is None else place
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        checkpoint = store.latest()
        assert checkpoint.step == 1, f"{path.name} byte {place}"
        assert len(store.notices) == 1
        assert store.notices[0].startswith(f"checkpoint step-000002 is damaged ({path.name}: ")
        assert store.notices[0].endswith("); using step-000001")
        path.write_bytes(data)
    assert_is(store.latest(), 2)
    assert not store.notices


def test_no_cut_added_or_missing_file_goes_unnoticed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    chance = random.Random(3)
    for path in sorted((tmp_path / "step-000002").iterdir()):
        data = path.read_bytes()
        for changed in [data[: chance.randrange(len(data))] for _ in range(12)] + [data + b" ", b"", None]:
            path.write_bytes(changed) if changed is not None else path.unlink()
            assert store.latest().step == 1
            assert store.notices[0].startswith(f"checkpoint step-000002 is damaged ({path.name}: ")
        path.write_bytes(data)
    assert_is(store.latest(), 2)


def test_messages_of_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 100, 200, 300)
    path = tmp_path / "step-000300/state.json"
    path.write_text(path.read_text().replace("2400", "2401"))
    assert store.latest().step == 200
    assert store.notices == ["checkpoint step-000300 is damaged (state.json: sha256 differs); using step-000200"]
    shutil.rmtree(tmp_path / "step-000200")
    shutil.copytree(tmp_path / "step-000100", tmp_path / "step-000200")
    assert store.latest().step == 100
    assert store.notices[1] == (
        "checkpoint step-000200 is damaged (manifest.json: it is of step 100); using step-000100"
    )


def test_when_none_is_sound_nothing_changes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 1, 2, 3)
    for path in tmp_path.glob("*/state.json"):
        path.unlink()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"no usable checkpoint in .* \(3 found, 3 damaged: step-000003: state"
    ) as e:
        store.latest()
    assert str(e.value).endswith("nothing was changed")
    assert e.value.exit_code == 5
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@settings(max_examples=60, deadline=None)
@given(
    keep_last=st.integers(1, 4),
    events=st.lists(st.tuples(st.sampled_from(["save", "save", "damage", "reopen"]), st.integers(1, 12)), max_size=9),
)
def test_pruning_keeps_the_newest_sound_ones(tmp_path_factory, keep_last: int, events: list[tuple[str, int]]) -> None:
    root = tmp_path_factory.mktemp("schedule")
    store = CheckpointStore(root, keep_last=keep_last)
    present: set[int] = set()
    damaged: set[int] = set()
    for event, number in events:
        if event == "save":
            # Known to be damaged is what `latest` passed over; what rots unseen below the newest sound one counts.
            passed_over = {step for step in damaged if step > max(present - damaged, default=0)} - {number}
            save(store, number)
            candidates = sorted((present | {number}) - passed_over, reverse=True)
            present = {number, *candidates[:keep_last]}
            damaged = (damaged - {number}) & present
            assert set(store.steps()) == present
            assert not [name for name in os.listdir(root) if not name.startswith("step-")]
        elif event == "damage" and present:
            step = sorted(present)[number % len(present)]
            (root / f"step-{step:06d}/policy.safetensors").write_bytes(b"")
            damaged.add(step)
        else:
            store = CheckpointStore(root, keep_last=keep_last)
        if present - damaged:
            assert_is(store.latest(), max(present - damaged))
        elif present:
            with pytest.raises(CheckpointError, match="no usable checkpoint"):
                store.latest()
            assert set(store.steps()) == present
            return
        else:
            assert store.latest() is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": {"filter": len}},
            r"state 'a\.filter' is a builtin_function_or_method; it cannot be saved without pickle",
        ),
        ({"a": {(1, 2): 3}}, r"state 'a' has the key \(1, 2\); allowed are text and integers"),
        ({"../a": {}}, "cannot have a part named '../a'; allowed are letters, digits"),
        ({"": 1}, "cannot have a part named ''"),
        ({"a": {"w": torch.eye(2).to_sparse()}}, r"tensor 'a\.w'"),
    ],
)
def test_what_cannot_be_saved_exactly_is_refused(tmp_path: Path, state, message: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match=message):
        store.save(2, state)
    assert os.listdir(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_saved_exactly(tmp_path: Path, value: float) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"best": value, "part": {"means": [value, 1.0]}})
    json.loads((tmp_path / "step-000001/state.json").read_text(), parse_constant=pytest.fail)
    state = store.latest().state
    assert repr(state) == repr({"best": value, "part": {"means": [value, 1.0]}})


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_last must be at least 1, got 0"):
        CheckpointStore(tmp_path, keep_last=0)
    with pytest.raises(CheckpointError, match="a step cannot be negative, got -1"):
        CheckpointStore(tmp_path).save(-1, {})


def test_a_checkpoint_of_an_earlier_version_is_whole_but_cannot_be_resumed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 7)
    manifest = tmp_path / "step-000007" / "manifest.json"
    body = {key: value for key, value in json.loads(manifest.read_bytes()).items() if key != "sha256"} | {"schema": 1}
    sha256 = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    manifest.write_bytes(json.dumps(body | {"sha256": sha256}).encode())
    assert store.faults() == {7: None}
    with pytest.raises(CheckpointError, match="earlier version of Preceptor"):
        store.latest()
