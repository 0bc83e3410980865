"""Layers divided among processes: steps, checkpoints and norms of the whole model, and passes that keep in step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preceptor.lm import score
from preceptor.lm.load import Adapter, with_adapter
from preceptor.lm.model import LanguageModel
from preceptor.runs.guard import clip_gradient_norm, first_nonfinite
from preceptor.runs.sharding import SharedState, share_weights, whole_weights
from preceptor.runs.world import World, is_sharded, local
from tests.systems.reading.small import language_model
from tests.worlds import in_world

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
CPU = torch.device("cpu")
ROWS = torch.arange(5 * 9).reshape(5, 9) * 7 % 300
"""Five rows of nine tokens, which two processes cannot share equally."""


def model(kind: str) -> LanguageModel:
    lm = language_model(tied=kind == "tied")
    if kind != "adapter":
        return lm
    adapted = with_adapter(lm.model, Adapter(2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, where the other half has no gradient
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return LanguageModel(adapted, lm.tokenizer, name="adapted")


def backward(lm: LanguageModel, rows: Tensor) -> None:
    """The gradient of the mean over all rows' tokens that ``rows`` add."""
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep[:, -1] = False
    (-lm.chosen_log_probs(rows, keep=keep, chosen=rows[:, 1:].flatten()).sum() / ROWS[:, 1:].numel()).backward()


def packed(value: Any) -> bytes:
    """``value`` for another process, which cannot take tensors of one that ends."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class Learner:
    """A model, a projection beside it that is never divided, and Adam over both."""

    def __init__(self, kind: str, world: World | None = None) -> None:
        self.lm, self.world = model(kind), world or World()
        if world is not None:
            share_weights((self.lm,), world, CPU)
        self.projection = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.projection.weight)
        self.parameters = {f"model.{name}": p for name, p in self.lm.trainable_parameters().items()}
        self.parameters["projection.weight"] = self.projection.weight
        *learned, last = self.parameters.values()
        self.optimizer = torch.optim.AdamW([{"params": learned, "lr": 0.01}, {"params": [last], "lr": 0.1}])
        modules = {"model": self.lm.model, "projection": self.projection}
        self.state = SharedState(modules, self.parameters, self.optimizer)

    def gradient(self) -> float:
        """Of the whole batch, clipped; gives the norm before."""
        self.optimizer.zero_grad(set_to_none=True)
        rows = ROWS[self.world.shard(len(ROWS))]
        backward(self.lm, rows)
        (self.projection.weight.square().sum() * len(rows) / len(ROWS)).backward()
        self.world.sum_gradients(self.parameters.values())
        return clip_gradient_norm(self.parameters.values(), 0.5)

    def step(self) -> float:
        norm = self.gradient()
        self.optimizer.step()
        return norm

    def saved(self) -> dict[str, Any]:
        return {"weights": self.state.weights(), "optimizer": self.state.optimizer_state()}


def flat(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {key: value for part in state for key, value in flat(state[part], f"{name}.{part}").items()}
    if isinstance(state, list | tuple):
        return {key: value for i, part in enumerate(state) for key, value in flat(part, f"{name}.{i}").items()}
    return {name: state}


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    left, right = flat(one), flat(other)
    assert left.keys() == right.keys()
    assert len(left) > 20
    for name, value in left.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, right[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert value == right[name], name


@pytest.mark.parametrize("kind", ["plain", "tied", "adapter"])
def test_steps_and_what_is_saved_are_those_of_one_process_and_go_on_anywhere(kind: str) -> None:
    alone = Learner(kind)
    norms = [alone.step() for _ in range(2)]
    two_saved = copy.deepcopy(alone.saved())
    alone.step()

    def together(world: World) -> bytes:
        learner = Learner(kind, world)
        first = learner.saved()  # no step yet: Adam has no moments, and gets none by asking
        assert first["optimizer"]["state"]["state"] == {}
        shares = [local(p).numel() / p.numel() for p in learner.parameters.values() if is_sharded(p)]
        found = [learner.step() for _ in range(2)]
        saved = learner.saved()
        restored = Learner(kind, world)
        restored.state.load_weights(two_saved["weights"])
        restored.state.load_optimizer(two_saved["optimizer"])
        restored.step()
        return packed(
            {
                "shares": shares,
                "norms": found,
                "saved": saved,
                "restored": restored.saved(),
                "exported": whole_weights(learner.lm.model),
            }
        )

    first, second = map(unpacked, in_world(2, together))
    assert len(first["shares"]) == (3 * 9 if kind != "adapter" else 3 * 7 * 2)
    assert all(0.4 < share < 0.6 for share in first["shares"])
    assert first["norms"] == second["norms"] == pytest.approx(norms, rel=1e-5)
    assert_same(first["saved"], two_saved, rtol=1e-4, atol=1e-5)
    assert_same(first["restored"], alone.saved(), rtol=1e-4, atol=1e-5)
    assert second["saved"]["weights"] == {}  # the others need no second copy of the whole
    learned = {name.removeprefix("model."): tensor for name, tensor in two_saved["weights"].items()}
    for name in learned.keys() - {"projection.weight"}:
        torch.testing.assert_close(first["exported"][name], learned[name], rtol=1e-4, atol=1e-5)
    again = Learner(kind)  # what two processes saved goes on in one
    again.state.load_weights(first["saved"]["weights"])
    again.state.load_optimizer(first["saved"]["optimizer"])
    again.step()
    assert_same(again.saved(), alone.saved(), rtol=1e-4, atol=1e-5)


def test_a_number_that_is_not_finite_in_one_part_is_told_by_all() -> None:
    def planted(world: World) -> list[str | None]:
        learner, told = Learner("plain", world), []
        for number, where in ((float("nan"), 1), (float("inf"), 0), (-float("inf"), 1)):
            learner.gradient()
            name = "model.model.layers.1.mlp.up_proj.weight"
            if world.rank == where:
                local(learner.parameters[name].grad)[0, 0] = number
            told.append(first_nonfinite((name, p.grad) for name, p in learner.parameters.items()))
        learner.gradient()
        told.append(first_nonfinite((name, p.grad) for name, p in learner.parameters.items()))
        return told

    first, second = in_world(2, planted)
    name = "model.model.layers.1.mlp.up_proj.weight"
    assert first == second == [f"{name} is NaN", f"{name} is +Inf", f"{name} is -Inf", None]


# ---- equally many passes ---------------------------------------------------------------------------------------------


def scores(lm: LanguageModel, world: World) -> list[Tensor]:
    """Log-probabilities of rows of very different lengths, in batches of few tokens: 5 passes here, 1 there."""
    rows = [ROWS.flatten().tolist()[: 2 + length] for length in (40, 39, 38, 37, 36, 1, 1, 1, 1)]
    spans = [[(1, len(row))] for row in rows]

    def part(part: slice) -> list[Tensor]:
        return score.token_log_probs(lm, rows[part], spans=spans[part], max_tokens=50)

    return world.gathered_lists([len(row) - 1 for row in rows], part)


def test_processes_with_fewer_passes_keep_in_step() -> None:
    expected = scores(language_model(), World())

    def together(world: World) -> bytes:
        lm = language_model()
        share_weights((lm, lm.initial_model()), world, CPU)
        passes: list[int] = []
        lm.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
        found = scores(lm, world)
        world.barrier()
        assert all(torch.equal(a, b) for a, b in zip(found, scores(lm, world), strict=True))  # and again
        return packed((found, len(passes)))

    results = [unpacked(each) for each in in_world(2, together)]
    assert [count for _, count in results] == [10, 10]
    for found, _ in results:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_processes_that_pass_different_models_at_once_are_a_mistake_of_ours() -> None:
    def mixed(world: World) -> str:
        models = (language_model(), language_model(seed=1))
        share_weights(models, world, CPU)
        if world.rank == 1:
            world.maximum(2)  # all that the second process does: it says that it passes the second model
            return ""
        with pytest.raises(AssertionError) as fault, world.around():
            models[0].forward(ROWS[:1], keep=torch.zeros(1, 9, dtype=torch.bool))
        return str(fault.value)

    assert in_world(2, mixed)[0] == "processes pass models 1 and 2 at once"
