"""Tensors to and from safetensors files, bit for bit, and any nested state split into tensors and JSON.

The writer streams: one tensor at a time leaves its device and passes the hash on its way to the disk, so that saving a
large model needs no second copy of it and a full disk is met in one place. The reader is the safetensors library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from preceptor.errors import CheckpointError
from preceptor.runs.files import Digest, write_file
from preceptor.runs.metrics import JSON

# https://github.com/huggingface/safetensors#format; no complex and no quantised types.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What the data of ``tensors`` takes on the disk at most, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Writes ``tensors`` as one safetensors file and returns its digest.

    Tensors that are the same memory seen in the same way (tied weights) are written once. Views, expanded and
    non-contiguous tensors are written as the values they show.

    Raises ``CheckpointError`` for a dtype or layout that the format does not have, ``OSError`` when the disk refuses.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_with: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPE_NAMES or tensor.device.type == "meta":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise CheckpointError(f"tensor {name!r} ({kind}) cannot be saved; allowed are dense real tensors with data")
        # The same memory seen in the same way: a tied weight, written once.
        memory = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        # Tensors without elements all have the address 0 and share nothing.
        original = first_with.setdefault(memory, name) if tensor.numel() else name
        if original == name:
            stored[name] = tensor.detach()
        else:
            aliases[name] = original

    # Widest dtype first keeps every tensor aligned to its own width, as the reference writer does.
    order = sorted(stored, key=lambda name: (-stored[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"aliases": json.dumps(aliases)}}
    end = 0
    for name in order:
        begin, end = end, end + stored[name].numel() * stored[name].element_size()
        dtype = _DTYPE_NAMES[stored[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(stored[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    # The data begins at a multiple of eight bytes, as the format recommends; spaces are valid JSON.
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        # Layout: length of the header (8 bytes, little-endian), header, data.
        yield len(text).to_bytes(8, "little")
        yield text
        for name in order:
            # One tensor at a time leaves its device; flattened, its bytes can be read without a copy.
            yield stored[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return write_file(path, chunks())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file written by ``write_tensors``, on the CPU; tied ones come back as one tensor.

    The data stays in the file until it is used (memory-mapped, private): copy what is to outlive the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    return tensors | {name: tensors[original] for name, original in aliases.items()}


def split_state(state: Any, name: str = "") -> tuple[dict[str, Tensor], JSON]:
    """``state``, any nesting of mappings, lists, tuples, tensors and plain values, as named tensors and JSON.

    The JSON keeps what JSON lacks under one-key mappings: ``{"$tensor": name}``, ``{"$tuple": [...]}`` and, for
    mappings, ``{"$dict": [[key, value], ...]}``, so integer keys survive, and ``{"$float": "inf"}``. ``join_state`` is
    the inverse.

    Raises ``CheckpointError`` for anything else, by its place below ``name``.

    >>> tensors, rest = split_state({"betas": (0.9, 0.95), 0: torch.zeros(2)})
    >>> list(tensors), rest
    (['0'], {'$dict': [['betas', {'$tuple': [0.9, 0.95]}], [0, {'$tensor': '0'}]]})
    """
    tensors: dict[str, Tensor] = {}

    def split(value: Any, name: str) -> JSON:
        if isinstance(value, Tensor):
            # Two places may give the same name ("a.b" as a key, "b" below "a"); a number keeps them apart.
            unique = name if name not in tensors else f"{name}#{len(tensors)}"
            tensors[unique] = value
            return {"$tensor": unique}
        if isinstance(value, Mapping):
            # JSON would turn other keys into text, and they would not come back.
            if faulty := [key for key in value if not isinstance(key, str | int)]:
                raise CheckpointError(f"state {name!r} has the key {faulty[0]!r}; allowed are text and integers")
            return {"$dict": [[key, split(item, f"{name}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [split(item, f"{name}.{index}".lstrip(".")) for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        # JSON has no word for NaN and the infinities.
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(f"state {name!r} is a {type(value).__name__}; it cannot be saved without pickle")

    return tensors, split(state, name)


def join_state(tensors: Mapping[str, Tensor], rest: JSON) -> Any:
    """What ``split_state`` took apart; every tensor of ``tensors`` must be used and every one named must be there.

    Tensors are copied, so the result shares no memory with ``tensors``. Raises ``CheckpointError``.
    """
    used: set[str] = set()

    def join(value: Any) -> Any:
        if isinstance(value, list):
            return [join(item) for item in value]
        if not isinstance(value, dict):
            return value
        match list(value.items()):
            case [("$tensor", str(name))] if name in tensors:
                used.add(name)
                return tensors[name].clone()
            case [("$float", str(text))]:
                return float(text)
            case [("$tuple", list(items))]:
                return tuple(join(item) for item in items)
            case [("$dict", list(items))]:
                return {key: join(item) for key, item in items}
        # A name that no tensor has ends here too.
        raise CheckpointError(f"saved state is not readable at {str(value)[:80]}")

    state = join(rest)
    # A tensor too many means that state.json and the tensors are not of one save.
    if unused := sorted(set(tensors) - used):
        raise CheckpointError(f"saved state has tensors that nothing refers to: {', '.join(unused[:5])}")
    return state
