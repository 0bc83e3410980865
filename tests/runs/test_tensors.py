from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from preceptor.errors import CheckpointError
from preceptor.runs.files import file_digest
from preceptor.runs.tensors import join_state, num_bytes, read_tensors, split_state, write_tensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
def test_every_dtype_round_trips_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    # Random bytes make NaNs with payloads, infinities, subnormals and negative zeros: none may be normalised.
    data = torch.randint(0, 256, (6 * 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = (data % 2).bool() if dtype == torch.bool else data.view(dtype)
    tensor = tensor.reshape(2, -1)
    digest = write_tensors(tmp_path / "x.safetensors", {"x": tensor, "scalar": tensor[0, 0], "empty": tensor[:0]})
    assert digest == file_digest(tmp_path / "x.safetensors")
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert set(loaded) == {"x", "scalar", "empty"}
    for name, expected in (("x", tensor), ("scalar", tensor[0, 0]), ("empty", tensor[:0])):
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == expected.shape
        assert raw(loaded[name]) == raw(expected)


def test_the_file_is_what_the_library_would_read_and_write(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(2, 3),
        "h": torch.ones(5, dtype=torch.bfloat16),
    }
    write_tensors(tmp_path / "own", tensors)
    for name, tensor in safetensors.torch.load((tmp_path / "own").read_bytes()).items():
        assert torch.equal(tensor, tensors[name])
    safetensors.torch.save_file(tensors, tmp_path / "library")
    own, library = (path.read_bytes() for path in (tmp_path / "own", tmp_path / "library"))
    sizes = [struct.unpack("<Q", data[:8])[0] for data in (own, library)]
    assert own[8 + sizes[0] :] == library[8 + sizes[1] :]  # same order, same bytes; the header's JSON may differ
    assert sizes[0] % 8 == 0
    headers = [json.loads(data[8 : 8 + size]) for data, size in zip((own, library), sizes, strict=True)]
    headers[0].pop("__metadata__")
    assert headers[0] == headers[1]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    embedding = torch.randn(100, 16)
    digest = write_tensors(tmp_path / "x", {"embed": embedding, "lm_head": embedding, "other": torch.zeros(1)})
    assert digest.size < 1.2 * embedding.numel() * 4
    loaded = read_tensors(tmp_path / "x")
    assert torch.equal(loaded["lm_head"], embedding)
    assert loaded["lm_head"].data_ptr() == loaded["embed"].data_ptr()


def test_views_are_stored_as_the_values_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    square = torch.arange(9.0).reshape(3, 3)  # its transpose has the same address and shape, not the same strides
    views = {
        "base": base, "square": square, "square_transposed": square.T,
        "transposed": base.T, "row": base[1], "strided": base[:, ::2], "flat": base.view(12),
        "expanded": torch.tensor([5.0]).expand(4), "bits": base.view(torch.int32),
        "parameter": torch.nn.Parameter(base),
    }  # fmt: skip
    write_tensors(tmp_path / "x", views)
    loaded = read_tensors(tmp_path / "x")
    assert loaded.keys() == views.keys()
    for name, view in views.items():
        assert torch.equal(loaded[name], view), name
        assert loaded[name].dtype == view.dtype
    loaded["row"] += 1
    assert torch.equal(loaded["base"], base), "a row must not come back as a view of the whole"


def test_empty_groups_and_sizes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {})
    assert read_tensors(tmp_path / "x") == {}
    assert num_bytes({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.int64)}) == 6 + 16


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")]
)
def test_what_the_format_lacks_is_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'policy\.w' \(torch\.\w+, torch\.\w+, \w+\) cannot be saved"):
        write_tensors(tmp_path / "x", {"policy.w": tensor})


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_tensors(tmp_path / "x")


def test_any_state_is_split_and_joined_through_json() -> None:
    state = {
        "betas": (0.9, 0.999), "lr": torch.tensor(0.5), 3: [1, None, (True, "x", ())], "deep": {"a.b": torch.ones(2)},
        "deep.a": {"b": torch.zeros(2)}, "none": {}, "fraction": 0.1 + 0.2,
    }  # fmt: skip
    tensors, rest = split_state(state)
    assert len(tensors) == 3, "names that collide when joined with dots must not"
    joined = join_state(tensors, json.loads(json.dumps(rest)))
    assert joined.keys() == state.keys()
    for key in ("betas", 3, "none", "fraction"):
        assert joined[key] == state[key]
    assert isinstance(joined[3][2], tuple)
    assert torch.equal(joined["deep"]["a.b"], torch.ones(2))
    assert torch.equal(joined["deep.a"]["b"], torch.zeros(2))
    assert joined["lr"] == 0.5
    assert joined["lr"].data_ptr() != state["lr"].data_ptr()


def test_numbers_that_are_not_finite_come_back_through_strict_json() -> None:
    state = {"best": -math.inf, "limits": (math.inf, 1.0), "mean": [math.nan, 0.5], "zero": -0.0}
    tensors, rest = split_state(state)
    assert not tensors
    joined = join_state({}, json.loads(json.dumps(rest, allow_nan=False)))
    assert (joined["best"], joined["limits"]) == (-math.inf, (math.inf, 1.0))
    assert math.isnan(joined["mean"][0])
    assert joined["mean"][1] == 0.5
    assert math.copysign(1, joined["zero"]) == -1
    assert all(type(joined[key]) is type(state[key]) for key in state)


@pytest.mark.parametrize("name", ["$tensor", "$float", "$tuple", "$dict"])
def test_a_key_that_looks_like_a_marker_stays_a_key(name: str) -> None:
    state = {name: "inf", "inner": {name: [["a", 1]]}}
    tensors, rest = split_state(state)
    assert not tensors
    assert join_state({}, json.loads(json.dumps(rest))) == state


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"state 'a\.f' is a function; it cannot be saved without pickle"):
        split_state({"a": {"f": raw}})
    with pytest.raises(CheckpointError, match=r"has the key \(1, 2\); allowed are text and integers"):
        split_state({"a": {(1, 2): 3}})
    tensors, rest = split_state({"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="tensors that nothing refers to: b"):
        join_state(tensors | {"b": torch.zeros(1)}, rest)
    with pytest.raises(CheckpointError, match="saved state is not readable at"):
        join_state({}, rest)
