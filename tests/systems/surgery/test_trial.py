from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from preceptor.errors import ModelError
from preceptor.lm.edit_targets import attention_targets
from preceptor.systems.surgery.environment import Student
from preceptor.systems.surgery.reference_lm import NGramReference
from preceptor.systems.surgery.rewards import Draws, Examiner, window_losses
from preceptor.systems.surgery.trial import Edit, Surgery, examination_flops, gradient_steps, rescale_moments
from tests.systems.surgery.small import small_student

WEIGHTS = {"loss": 1.0, "referee": 0.1, "repetition": 0.1, "distinct": 0.1}


def surgery(student: Student, *, required_z: float = 0.0, moments: str = "keep") -> Surgery:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (200,), generator=generator)
    examiner = Examiner(
        NGramReference(tokens, order=2, vocab_size=7),
        tokens=tokens,
        num_prompts=3,
        prompt_tokens=4,
        continuation_tokens=5,
        windows=tokens[:90].view(10, 9),
        weights=WEIGHTS,
    )
    edit = Edit("singular_values", attention_targets(student.model), rank=2, max_relative_norm=0.2)
    return Surgery(student, edit, examiner, required_z=required_z, moments=moments)


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in student.model.parameters()]


def learn(student: Student, windows: torch.Tensor, *, learning_rate: float) -> None:
    student.learn(
        windows,
        objective="expected",
        learning_rate=learning_rate,
        step=1,
        generator=torch.Generator(),
        notice=[].append,
    )


def unchanged(student: Student, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


def better_and_worse(student: Student, table: Surgery, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two edits, one that lowers the loss of ``windows`` and one that raises it."""
    generator, found = torch.Generator().manual_seed(1), {}
    while len(found) < 2:
        action = 2 * torch.rand(table.edit.action_dim, generator=generator) - 1
        snapshot = student.snapshot()
        before = window_losses(student.model, windows).mean()
        table.edit.apply_(action)
        found[bool(window_losses(student.model, windows).mean() < before)] = action
        student.load_state_dict(snapshot)
    return found[True], found[False]


def draws(table: Surgery, seed: int = 3) -> Draws:
    return table._examiner.draw(torch.Generator().manual_seed(seed))


def test_a_trial_leaves_no_trace_and_is_paid_the_difference() -> None:
    # To catch: before and after exchanged, and other prompts after the edit.
    student = small_student()
    table, weights_before = surgery(student), weights(student)
    action, common = torch.linspace(-1, 1, table.edit.action_dim), draws(table)
    before = table.examine(common)
    trial = table.try_edit(action, before=before, draws=common)
    assert unchanged(student, weights_before)
    assert trial.before == before == table.examine(common)
    table.edit.apply_(action)
    assert trial.after == table.examine(common)
    assert trial.reward == trial.after.total - before.total != 0
    assert trial.bytes_held == sum(target.view.nbytes for target in table.edit.targets)


def test_no_edit_earns_exactly_nothing() -> None:
    table = surgery(small_student())
    common = draws(table)
    nothing = torch.zeros(table.edit.action_dim)
    assert table.try_edit(nothing, before=table.examine(common), draws=common).reward == 0.0


def test_the_test_commits_what_is_better_and_nothing_else() -> None:
    student = small_student()
    table = surgery(student)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    better, worse = better_and_worse(student, table, windows)
    before = weights(student)
    assert not table.test(worse, windows).passed
    assert unchanged(student, before)
    losses = window_losses(student.model, windows)
    found = table.test(better, windows)
    assert found.passed
    assert not unchanged(student, before)
    assert found.gain == pytest.approx((losses - window_losses(student.model, windows)).mean().item(), rel=1e-9)


def test_too_small_a_gain_is_not_committed() -> None:
    student = small_student()
    table = surgery(student, required_z=1e6)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    better, _ = better_and_worse(student, table, windows)
    before = weights(student)
    assert not table.test(better, windows).passed
    assert unchanged(student, before)


def test_examinations_are_counted() -> None:
    student = small_student()
    table = surgery(student)
    common = draws(table)
    before = table.examine(common)
    examined = student.costs.flops
    assert examined == examination_flops(student, table._examiner)
    table.try_edit(torch.full((table.edit.action_dim,), 0.5), before=before, draws=common)
    assert student.costs.flops == 2 * examined
    assert student.costs.evaluations == 1


def test_moments_are_treated_as_configured() -> None:
    for moments in ("keep", "zero"):
        student = small_student()
        table = surgery(student, moments=moments)
        windows = torch.zeros(2, 17, dtype=torch.long)
        learn(student, windows, learning_rate=1e-3)
        edited = table.edit.targets[0].parameter
        assert student.optimizer.state[edited]["exp_avg"].abs().sum() > 0
        table.commit(torch.full((table.edit.action_dim,), 0.5))
        assert (student.optimizer.state[edited]["exp_avg"].abs().sum() == 0) == (moments == "zero")


@pytest.mark.parametrize("moments", ["keep", "zero"])
def test_an_edit_that_passes_the_test_treats_the_moments_as_configured(moments: str) -> None:
    student = small_student()
    table = surgery(student, moments=moments)
    windows = torch.randint(7, (40, 17), generator=torch.Generator().manual_seed(2))
    learn(student, windows[:2], learning_rate=1e-4)
    better, _ = better_and_worse(student, table, windows)
    assert table.test(better, windows).passed
    moment = student.optimizer.state[table.edit.targets[0].parameter]["exp_avg"]
    assert bool(moment.any()) == (moments == "keep")


def test_an_examination_costs_what_student_and_referee_compute() -> None:
    """Three prompts of 4 + 5 tokens for both, ten windows of 8 positions for the student; a bigram over 7 tokens."""
    student = small_student()
    table = surgery(student)
    expected = (3 * 9 + 10 * 8) * student.flops_per_token + 3 * 9 * (2 * 2 * 7)
    assert examination_flops(student, table._examiner) == expected


def test_a_test_costs_two_readings_of_its_windows() -> None:
    student = small_student()
    table = surgery(student)
    table.test(torch.full((table.edit.action_dim,), 0.5), torch.zeros(5, 17, dtype=torch.long))
    assert student.costs.flops == 2 * 5 * 16 * student.flops_per_token


def test_gradient_steps_cost_what_the_edits_cost() -> None:
    student = small_student()
    table = surgery(student)
    step = student.step_flops("expected", num_tokens=64)
    edit = 2 * examination_flops(student, table._examiner) + 2 * 128 * student.flops_per_token
    found = gradient_steps(student, table._examiner, num_edits=10, acceptance_tokens=128, step_flops=step)
    assert (found - 1) * step < 10 * edit <= found * step
    assert gradient_steps(student, table._examiner, num_edits=0, acceptance_tokens=1, step_flops=step) == 1


# ---- moments --------------------------------------------------------------------------------------------------------


def small_sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


def stepped(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = small_sequential()
    optimizer = make(model.parameters())
    for seed in range(3):
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_moments_are_kept_zeroed_or_scaled() -> None:
    for scale, first, second, num_steps in [
        (1.0, 1.0, 1.0, 3),
        (0.5, 0.5, 0.25, 3),  # the gradient halved: its mean halves, its mean square is a quarter
        (0.0, 0.0, 0.0, 0),
    ]:
        model, optimizer = stepped(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
        before = copy.deepcopy(optimizer.state)
        old = {id(key): value for key, value in zip(optimizer.state, before.values(), strict=True)}
        rescale_moments(optimizer, [model[0].weight], scale)
        for parameter, state in optimizer.state.items():
            edited = parameter is model[0].weight
            then = old[id(parameter)]
            assert torch.equal(state["exp_avg"], then["exp_avg"] * (first if edited else 1.0))
            assert torch.equal(state["exp_avg_sq"], then["exp_avg_sq"] * (second if edited else 1.0))
            assert state["step"] == (num_steps if edited else 3)


def test_the_moments_of_every_target_are_treated() -> None:
    model, optimizer = stepped(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    rescale_moments(optimizer, [model[0].weight, model[2].weight], 0.0)
    zeroed = {name for name, parameter in model.named_parameters() if not optimizer.state[parameter]["exp_avg"].any()}
    assert zeroed >= {"0.weight", "2.weight"}
    assert not zeroed & {"2.bias", "1.weight"}


def test_moments_of_a_fused_matrix_are_scaled_once() -> None:
    """Its three targets share the parameter, whose moments are meant as one."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    fused = attention_targets(model, roles=["query", "key", "value"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
    optimizer.step()
    state = optimizer.state[fused[0].parameter]
    before = state["exp_avg"].clone()
    rescale_moments(optimizer, (target.parameter for target in fused), 0.5)
    assert torch.equal(state["exp_avg"], before * 0.5)


def test_a_zeroed_parameter_steps_like_a_new_one() -> None:
    model, optimizer = stepped(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    rescale_moments(optimizer, [model[0].weight], 0.0)
    fresh = copy.deepcopy(model)
    fresh_optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    for some, step in ((model, optimizer.step), (fresh, fresh_optimizer.step)):
        some(torch.randn(5, 8, generator=torch.Generator().manual_seed(9))).square().sum().backward()
        step()
    assert torch.equal(model[0].weight, fresh[0].weight)
    assert not torch.equal(model[2].weight, fresh[2].weight)


def test_momentum_of_sgd_is_a_first_moment() -> None:
    model, optimizer = stepped(lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    before = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    rescale_moments(optimizer, [model[0].weight], 0.25)
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], before * 0.25)


def test_an_optimizer_that_remembers_something_else_is_refused() -> None:
    model, optimizer = stepped(torch.optim.Adadelta)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ModelError, match="Adadelta remembers 'acc_delta', which is no moment"):
        rescale_moments(optimizer, [model[0].weight], 0.0)
    assert str(optimizer.state_dict()) == str(before)
