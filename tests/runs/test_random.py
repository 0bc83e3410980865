from __future__ import annotations

import base64
import json

import pytest
import torch

from preceptor.errors import CheckpointError, ConfigError
from preceptor.runs.random import RandomStreams, derived_seed, global_random_state, load_global_random_state


def draws(streams: RandomStreams, name: str, num: int = 8) -> list[float]:
    return torch.rand(num, generator=streams[name]).tolist()


def test_seed_is_the_first_eight_bytes_of_the_hash() -> None:
    # printf '7:sampling' | sha256sum | cut -c1-16
    assert derived_seed(7, "sampling") == 0xC3315ECF28FD3961


def test_a_stream_depends_on_seed_and_name_alone() -> None:
    alone = draws(RandomStreams(3, ["sampling"]), "sampling")
    among = RandomStreams(3, ["evaluation", "sampling", "dropout"])
    draws(among, "evaluation", 1000)
    assert draws(among, "sampling") == alone
    assert draws(RandomStreams(4, ["sampling"]), "sampling") != alone
    assert draws(RandomStreams(3, ["evaluation"]), "evaluation") != alone


def test_streams_are_not_correlated() -> None:
    streams = RandomStreams(0, [f"stream {index}" for index in range(20)])
    samples = torch.stack([torch.randn(10_000, generator=streams[name]) for name in streams])
    off_diagonal = torch.corrcoef(samples) - torch.eye(20)
    # The standard deviation of a sample correlation is 1/sqrt(10,000) = 0.01; 190 pairs stay within 5 of them.
    assert off_diagonal.abs().max() < 0.05


def test_state_survives_json_and_continues_the_streams() -> None:
    streams = RandomStreams(5, ["a", "b"])
    draws(streams, "a", 700)  # past one refill of the Mersenne twister's 624 words
    torch.randn(3, generator=streams["b"])  # an odd number: a cached normal value is part of the state
    state = json.loads(json.dumps(streams.state_dict()))
    expected = draws(streams, "a"), torch.randn(5, generator=streams["b"]).tolist()
    other = RandomStreams(6, ["a", "b"])
    other.load_state_dict(state)
    assert (draws(other, "a"), torch.randn(5, generator=other["b"]).tolist()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("b"), r"lacks \['b'\], adds none"),
        (lambda state: state.update(c=state["a"]), r"lacks none, adds \['c'\]"),
        (lambda state: state.update(b="!"), "'b' is not base64"),
        (lambda state: state.update(b=base64.b64encode(b"12").decode()), "'b' has 2 bytes, this torch uses"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message) -> None:
    streams = RandomStreams(5, ["a", "b"])
    state = RandomStreams(6, ["a", "b"]).state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        streams.load_state_dict(state)
    assert draws(streams, "a") == draws(RandomStreams(5, ["a"]), "a")


def test_bad_seeds_and_names() -> None:
    with pytest.raises(ConfigError, match=r"seed must lie in \[0, 2\^63\), got -1"):
        RandomStreams(-1, ["a"])
    with pytest.raises(ConfigError, match=r"seed must lie in \[0, 2\^63\), got 9223372036854775808"):
        RandomStreams(2**63, ["a"])
    assert len(draws(RandomStreams(2**63 - 1, ["a"]), "a")) == 8
    with pytest.raises(ConfigError, match="must differ, got a, a"):
        RandomStreams(1, ["a", "a"])
    with pytest.raises(KeyError, match="did you mean 'sampling'"):
        RandomStreams(1, ["sampling"])["samplin"]


def test_global_state_continues_dropout() -> None:
    torch.manual_seed(1)
    torch.rand(3)
    state = json.loads(json.dumps(global_random_state()))
    expected = torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(2)
    load_global_random_state(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(50)), expected)


def test_global_state_of_a_missing_gpu_is_refused() -> None:
    state = {"cpu": global_random_state()["cpu"], "cuda:99": "AAAA"}
    with pytest.raises(CheckpointError, match="a random state for cuda:99"):
        load_global_random_state(state)
