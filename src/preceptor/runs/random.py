"""Named streams of random numbers, each a function of the seed and its own name alone."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from preceptor.errors import CheckpointError, ConfigError, did_you_mean


def derived_seed(seed: int, name: str) -> int:
    """A seed for the stream ``name``, from SHA-256 of the run's ``seed`` and the name.

    >>> derived_seed(1, "sampling") == derived_seed(1, "sampling") != derived_seed(1, "evaluation")
    True
    """
    # A hash and not an addition: seeds 1 and 2 must not share streams, whatever their names.
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


class RandomStreams(Mapping[str, torch.Generator]):
    """Independent named generators on the CPU: ``streams["sampling"]``.

    A stream added, removed or used more leaves the others as they were, so turning the evaluation on does not change
    what training samples. They live on the CPU so that a run draws the same numbers whatever device it computes on.

    Raises ``ConfigError`` when ``seed`` is not in [0, 2^63) or a name is given twice.
    """

    def __init__(self, seed: int, names: Iterable[str]) -> None:
        names = list(names)
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), got {seed}")
        if len(set(names)) < len(names):
            raise ConfigError(f"names of random streams must differ, got {', '.join(names)}")
        # On the CPU, whose generator gives the same numbers on every machine.
        self._generators = {name: torch.Generator().manual_seed(derived_seed(seed, name)) for name in names}

    def __getitem__(self, name: str) -> torch.Generator:
        try:
            return self._generators[name]
        except KeyError:
            hint = did_you_mean(name, self._generators)
            raise KeyError(f"no random stream {name!r}{hint}; this run has {', '.join(self._generators)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._generators)

    def __len__(self) -> int:
        return len(self._generators)

    def state_dict(self) -> dict[str, str]:
        """The state of each stream, as text (base64) that fits into JSON."""
        return {name: _to_text(generator.get_state()) for name, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Puts every stream where ``state_dict`` found it.

        Raises ``CheckpointError`` when a stream is missing, unknown or not readable; then no stream has changed.
        """
        missing, unknown = sorted(set(self) - set(state)), sorted(set(state) - set(self))
        if missing or unknown:
            raise CheckpointError(
                f"random streams differ: the state lacks {missing or 'none'}, adds {unknown or 'none'}"
            )
        # All of them are read before any is set.
        states = {
            name: _from_text(state[name], f"random stream {name!r}", like=generator.get_state())
            for name, generator in self._generators.items()
        }
        for name, generator in self._generators.items():
            generator.set_state(states[name])


def global_random_state() -> dict[str, str]:
    """The state of torch's own generators, the CPU's and every GPU's, which dropout and initialisation draw from."""
    state = {"cpu": _to_text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state |= {f"cuda:{index}": _to_text(gpu) for index, gpu in enumerate(torch.cuda.get_rng_state_all())}
    return state


def load_global_random_state(state: Mapping[str, str]) -> None:
    """Puts torch's own generators where ``global_random_state`` found them.

    A GPU that is no longer there is a ``CheckpointError``; one that the state does not name is left alone.
    """
    num_gpus = torch.cuda.device_count()
    for device, text in state.items():
        name = f"torch's generator of {device}"
        if device == "cpu":
            torch.set_rng_state(_from_text(text, name, like=torch.get_rng_state()))
        elif int(device.removeprefix("cuda:")) < num_gpus:
            torch.cuda.set_rng_state(_from_text(text, name, like=torch.cuda.get_rng_state(device)), device)
        else:
            raise CheckpointError(f"the checkpoint has a random state for {device}; this machine has {num_gpus} GPUs")


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str, name: str, *, like: Tensor) -> Tensor:
    """The generator state written in ``text``; its size must be that of ``like``, a state of the same generator."""
    try:
        data = bytearray(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise CheckpointError(f"the state of {name} is not base64: {error}") from error
    # Another version of torch may keep a state of another size.
    if len(data) != like.numel():
        raise CheckpointError(f"the state of {name} has {len(data)} bytes, this torch uses {like.numel()}")
    return torch.frombuffer(data, dtype=torch.uint8)
