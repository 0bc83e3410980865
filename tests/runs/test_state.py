"""Optimizers and parameters in and out: train, save, load into a new one, train on, compare with no stop at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preceptor.errors import CheckpointError
from preceptor.runs.checkpoint import CheckpointStore, Stateful, copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.tensors import join_state, split_state

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.1, "weight_decay": 0.0}, {"params": p[1:]}], lr=0.01, betas=(0.8, 0.95)
    ),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)) for _ in range(2)]


def train(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        target = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

        def closure(target: torch.Tensor = target) -> float:
            for index, parameter in enumerate(params):
                parameter.grad = (parameter.detach() - target.to(parameter.dtype) * (index + 1)).clone()
            return sum(float((parameter.grad**2).sum()) / 2 for parameter in params)

        optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_is_bit_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    train(straight, optimizer := OPTIMIZERS[name](straight), range(10))

    first = parameters(dtype)
    train(first, optimizer := OPTIMIZERS[name](first), range(5))
    weights = {str(index): parameter for index, parameter in enumerate(first)}
    CheckpointStore(tmp_path).save(5, {"optimizer": optimizer_state(optimizer), "weights": weights})

    checkpoint = CheckpointStore(tmp_path).latest()
    second = [torch.nn.Parameter(checkpoint.state["weights"][str(index)].clone()) for index in range(2)]
    optimizer = OPTIMIZERS[name](second)
    load_optimizer(optimizer, checkpoint.state["optimizer"])
    train(second, optimizer, range(5, 10))
    for expected, got in zip(straight, second, strict=True):
        assert torch.equal(expected, got)
    assert not torch.equal(straight[0], first[0])


def test_settings_come_back_with_their_types_and_the_saved_learning_rate() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.95))
    optimizer.param_groups[0]["lr"] = 0.003  # a schedule was here
    tensors, rest = split_state(optimizer_state(optimizer))
    other = torch.optim.AdamW(params, lr=0.01)
    load_optimizer(other, join_state(tensors, json.loads(json.dumps(rest))))
    assert other.param_groups[0]["lr"] == 0.003
    assert other.param_groups[0]["betas"] == (0.8, 0.95)


def test_state_kept_in_another_dtype_than_the_parameter_stays_in_it() -> None:
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    master = torch.tensor([1.0 + 2**-20, 2.0, 3.0])
    optimizer.state[params[0]]["momentum_buffer"] = master.clone()
    other = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    load_optimizer(other, optimizer_state(optimizer))
    assert torch.equal(other.state[params[0]]["momentum_buffer"], master)


def test_loaded_state_shares_no_memory_with_the_checkpoint(tmp_path: Path) -> None:
    params = parameters()
    train(params, optimizer := torch.optim.Adam(params), range(1))
    store = CheckpointStore(tmp_path)
    store.save(1, {"optimizer": optimizer_state(optimizer)})
    checkpoint = store.latest()
    assert checkpoint is not None
    other_params = parameters()
    other = torch.optim.Adam(other_params)
    load_optimizer(other, checkpoint.state["optimizer"])
    train(other_params, other, range(3))
    assert not store.faults()[1]
    for name, saved in optimizer_state(optimizer)["state"]["state"][0].items():
        assert torch.equal(store.latest().state["optimizer"]["state"]["state"][0][name], saved)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    params = parameters()
    train(params, optimizer := torch.optim.AdamW(params, lr=0.01), range(2))
    state = optimizer_state(optimizer)

    def refused(other: torch.optim.Optimizer, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_optimizer(other, state)
        assert not other.state

    fresh = torch.optim.AdamW(params)
    refused(torch.optim.Adam(params), "optimizer is AdamW, this run's is Adam")
    refused(torch.optim.AdamW(params[:1]), "has other parameters: 2 in 1 groups, here 1 in 1")
    refused(torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]), "2 in 1 groups, here 2 in 2")
    other = [params[0], torch.nn.Parameter(torch.zeros(3, 4))]
    refused(torch.optim.AdamW(other), r"parameter 1 is \[4, 3\], here \[3, 4\]")
    fresh.param_groups[0]["new_setting"] = 1
    refused(fresh, "settings of AdamW group 0 differ: new_setting")


def test_tensors_are_copied_in_place_or_not_at_all() -> None:
    live = {"a": torch.zeros(2, requires_grad=True), "b": torch.zeros(3)}
    held = live["a"]
    copy_tensors({"a": torch.ones(2), "b": torch.full((3,), 2.0)}, live)
    assert held.tolist() == [1.0, 1.0]
    assert live["b"].tolist() == [2.0] * 3
    for other in ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"parameters are not this model's \('[bc]'\); resume with the same"):
            copy_tensors(other, live)
    assert held.tolist() == [1.0, 1.0]


def test_modules_and_optimizers_are_stateful() -> None:
    layer = torch.nn.Linear(2, 1)
    assert isinstance(layer, Stateful)
    assert isinstance(torch.optim.SGD(layer.parameters()), Stateful)
    assert not isinstance(object(), Stateful)
