"""A language model whose layers are divided among the processes of a run (FSDP2, ``fully_shard``).

Each process keeps its part of every layer's weights, of their gradients and of the optimizer's moments. A layer is put
together for its own forward and backward pass and taken apart after it. Embeddings, final norm and head stay whole.
The rest of the program sees parameters of layers that are ``DTensor`` of their full shape, whose gradients are summed
over the processes in the backward pass, and every process must make equally many passes (:class:`Lockstep`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.lm.model import LanguageModel
from preceptor.runs.checkpoint import check_optimizer, copy_tensors, load_optimizer, optimizer_state
from preceptor.runs.world import World, is_sharded


def share_weights(models: Sequence[LanguageModel], world: World, device: torch.device) -> None:
    """Divides the layers of ``models`` among the processes of ``world``, in place, and puts the rest on ``device``.

    Args:
        models: the same in every process, with the same weights, best on the CPU: layers move to ``device`` one at a
            time. Models that share their weights (an adapter on and off) are divided once.
        world: all of its processes take part; what each of them computes of its rows is kept in step from now on.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (world.size,))
    different = {id(lm.model): lm for lm in models}
    for lm in different.values():
        _divide(lm, mesh, device)
    for lm in models:
        lm.has_engine = False  # it reads whole weights
    world.around = Lockstep(list(different.values()), world)


def _divide(lm: LanguageModel, mesh: Any, device: torch.device) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in lm.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # One root over all layers, so that they share streams and buffers; it has no weights of its own.
    whole = {parameter for parameter in lm.model.parameters() if not is_sharded(parameter)}
    fully_shard(lm.decoder, mesh=mesh, ignored_params=whole)
    for module in lm.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        if isinstance(module, FSDPModule):
            # A loss is a sum over a count of the whole batch: what the processes give is added up, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for parameter in whole:
        parameter.data = parameter.data.to(device)


class Lockstep:
    """Around what each process computes of its own rows: as many forward passes in every process.

    A pass puts layers together, which takes all processes, while the number of passes depends on how rows of different
    lengths fall into batches. So before each pass all say which model is passed, and whoever is done passes one token
    through it, until all are done.

    Args:
        models: those whose weights are shared.
        world: the processes.
    """

    def __init__(self, models: Sequence[LanguageModel], world: World) -> None:
        self._models = models
        self._world = world

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, lm in enumerate(self._models, start=1):

                def tell(*_: object, number: int = number) -> None:
                    said = int(self._world.maximum(number))
                    assert said == number, f"processes pass models {number} and {said} at once"

                stack.callback(lm.decoder.register_forward_pre_hook(tell).remove)
            yield
        while number := int(self._world.maximum(0)):
            lm = self._models[number - 1]
            token = torch.tensor([[lm.begin_token]], device=lm.device)
            with torch.no_grad():
                lm.forward(token, keep=torch.zeros_like(token, dtype=torch.bool))


# ---- whole again, for what is written --------------------------------------------------------------------------------


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """What learns in ``model``, put together on the CPU, by name; empty in all processes but the first.

    Every process must call it.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    whole: Any = get_model_state_dict(model, options=_whole(ignore_frozen_params=True))
    return dict(whole)


class SharedState:
    """Parameters and optimizer of a run that are written whole, whatever part of them this process has.

    So a checkpoint is that of one process, and goes on in any number of them. Without shared weights these are
    :func:`~preceptor.runs.checkpoint.optimizer_state` and its like.

    Args:
        modules: what learns, by the first part of its parameters' names.
        parameters: those that learn, by their names: part, dot, and name in the module.
        optimizer: over ``parameters``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._modules = nn.ModuleDict(dict(modules))
        self._parameters = parameters
        self._optimizer = optimizer
        self.is_shared = any(map(is_sharded, parameters.values()))

    def weights(self) -> dict[str, Tensor]:
        """The parameters, by name; where weights are shared every process must ask, and the first gets them."""
        if not self.is_shared:
            return {name: parameter.detach() for name, parameter in self._parameters.items()}
        whole = whole_weights(self._modules)
        # Both names of tied weights are in it, parameters have one.
        return {name: whole[name] for name in self._parameters if name in whole}

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Puts :meth:`weights` back, in place.

        Raises:
            CheckpointError: they are those of another model.
        """
        whole = {name: parameter for name, parameter in self._parameters.items() if not is_sharded(parameter)}
        if not self.is_shared:
            copy_tensors(saved, whole)
            return
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        copy_tensors(saved, dict(self._parameters), only=whole.keys())
        divided: Any = {name: tensor for name, tensor in saved.items() if name not in whole}
        set_model_state_dict(self._modules, divided, options=_whole(strict=False))

    def optimizer_state(self) -> dict[str, Any]:
        """As :func:`~preceptor.runs.checkpoint.optimizer_state`; of shared weights, the first process's is whole."""
        if not self.is_shared or not self._optimizer.state:
            return optimizer_state(self._optimizer)
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        named: Any = get_optimizer_state_dict(self._modules, self._optimizer, options=_whole(ignore_frozen_params=True))
        # torch's own form: parameters by their place in the groups.
        plain = {key: value for key, value in optimizer_state(self._optimizer).items() if key != "state"}
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": places}
            for group, places in zip(self._optimizer.param_groups, self._places(), strict=True)
        ]
        states = named.get("state", {})
        found = {place: states[name] for place, name in self._names().items() if name in states}
        return {**plain, "state": {"state": found, "param_groups": groups}}

    def load_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Puts :meth:`optimizer_state` back.

        Raises:
            CheckpointError: it is that of another optimizer.
        """
        if not self.is_shared or not saved["state"]["state"]:
            load_optimizer(self._optimizer, saved)
            return
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        check_optimizer(self._optimizer, saved)
        names = self._names()
        named: Any = {
            "state": {names[place]: entries for place, entries in saved["state"]["state"].items()},
            "param_groups": [
                {**group, "params": [names[place] for place in group["params"]]}
                for group in saved["state"]["param_groups"]
            ],
        }
        set_optimizer_state_dict(self._modules, self._optimizer, named, options=_whole())

    def _places(self) -> list[list[int]]:
        """The places of each group's parameters, counted over all groups, as torch counts them."""
        places, start = [], 0
        for group in self._optimizer.param_groups:
            places.append(list(range(start, start + len(group["params"]))))
            start = places[-1][-1] + 1 if places[-1] else start
        return places

    def _names(self) -> dict[int, str]:
        """Place of a parameter in the optimizer → its name."""
        by_id = {id(parameter): name for name, parameter in self._parameters.items()}
        every = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return {place: by_id[id(parameter)] for place, parameter in enumerate(every)}


def _whole(**options: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, **options)
