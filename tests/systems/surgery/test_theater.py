from __future__ import annotations

import copy
import gc
import io
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from preceptor.errors import ModelError
from preceptor.lm.edit_targets import Target, attention_targets, named_targets
from preceptor.runs.signals import StopSignals
from preceptor.systems.surgery import theater as theater_module
from preceptor.systems.surgery.theater import SurgicalTheater

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def small_model(*, dtype: torch.dtype = torch.float32, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)).to(dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer as bytes: unlike numbers, NaN and −0 compare equal only to themselves."""
    return {
        name: tensor.detach().clone().reshape(-1).view(torch.uint8)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def bytes_held(theater: SurgicalTheater) -> int:
    return sum(saved.nbytes for _, saved in theater._copies)


@torch.no_grad()
def scramble(targets: list[Target] | tuple[Target, ...], generator: torch.Generator | None = None) -> None:
    for target in targets:
        target.view.add_(torch.randn(target.view.shape, generator=generator).to(target.view.dtype))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before have left there
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    torch.set_grad_enabled(True)  # an interrupt may land in a test's own `no_grad`, and leave gradients off
    assert theater_module._open == []
    assert [signal.getsignal(number) for number in SIGNALS] == before
    signal.signal(signal.SIGINT, found)


# ---- in and out -----------------------------------------------------------------------------------------------------


def test_edits_are_there_inside_and_gone_outside() -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])
    before, parameters = bits(model), list(model.parameters())
    with SurgicalTheater(model, targets) as theater:
        targets[0].view.fill_(7)
        assert (model[0].weight == 7).all()
        assert bytes_held(theater) == 8 * 8 * 4
    assert same(bits(model), before)
    assert bytes_held(theater) == 0
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_any_exception_puts_back_and_passes_on(error: BaseException) -> None:
    model = small_model()
    targets = named_targets(model, ["*.weight"])
    before = bits(model)

    def work() -> None:
        with SurgicalTheater(model, targets):
            scramble(targets, torch.Generator().manual_seed(0))
            raise error

    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert same(bits(model), before)


def test_a_closed_or_forgotten_generator_puts_back() -> None:
    model = small_model()
    targets = named_targets(model, ["*.weight"])
    before = bits(model)

    def inside() -> Iterator[None]:
        with SurgicalTheater(model, targets):
            scramble(targets)
            yield

    suspended = inside()
    next(suspended)
    assert not same(bits(model), before)
    suspended.close()
    assert same(bits(model), before)
    suspended = inside()
    next(suspended)
    del suspended
    gc.collect()
    assert same(bits(model), before)


def test_values_that_arithmetic_does_not_give_back() -> None:
    """NaN payloads, infinities, −0 and denormals: subtraction would lose every one of them."""
    model = nn.Linear(4, 1, bias=False)
    patterns = torch.tensor([[0x7FC12345, -0x00800000, -0x80000000, 1]], dtype=torch.int32)
    with torch.no_grad():
        model.weight.copy_(patterns.view(torch.float32))
    with SurgicalTheater(model, named_targets(model, ["weight"])) as theater:
        scramble(theater.targets, torch.Generator().manual_seed(0))
    assert torch.equal(model.weight.detach().view(torch.int32), patterns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_edits", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_edits_are_all_undone(num_edits: int, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype, width=4)
    targets = named_targets(model, ["*.weight"])
    generator = torch.Generator().manual_seed(0)
    before = torch.cat([target.view.reshape(-1).view(torch.uint8) for target in targets])

    def is_as_before() -> bool:
        return torch.equal(torch.cat([target.view.reshape(-1).view(torch.uint8) for target in targets]), before)

    num_restored = num_different = 0
    for _ in range(num_edits):
        with SurgicalTheater(model, targets):
            scramble(targets, generator)
            num_different += not is_as_before()
        num_restored += is_as_before()
    assert (num_different, num_restored) == (num_edits, num_edits)


def test_tied_and_shared_weights() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    targets = named_targets(model, ["transformer.wte.weight", "lm_head.weight"])
    assert len(targets) == 1
    before = bits(model)
    with SurgicalTheater(model, targets):
        targets[0].view.add_(1)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert not same(bits(model), before)
    assert same(bits(model), before)


def test_every_part_of_a_fused_matrix_is_put_back() -> None:
    """Query, key and value are parts of one parameter; each is edited alone, and all of them together."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    fused = attention_targets(model, roles=["query", "key", "value"])
    assert len({id(target.parameter) for target in fused}) == 1
    before = bits(model)
    for edited in (fused, *([target] for target in fused)):
        with SurgicalTheater(model, fused) as theater:
            assert bytes_held(theater) == fused[0].parameter.nbytes
            scramble(edited, torch.Generator().manual_seed(0))
        assert same(bits(model), before)


def test_targets_that_overlap_are_put_back() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    targets = attention_targets(model) + named_targets(model, ["*c_attn.weight"])
    before = bits(model)
    with SurgicalTheater(model, targets):
        scramble(targets, torch.Generator().manual_seed(0))
    assert same(bits(model), before)


def test_buffers_modes_and_random_state_are_left_alone() -> None:
    model = small_model()
    model[1].eval()
    targets = named_targets(model, ["*.weight"])
    random_state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    with SurgicalTheater(model, targets):
        model[1].running_mean.add_(1)
    assert (model[1].running_mean == 1).all()  # not the theater's to put back
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes


def test_a_target_of_another_model_is_refused() -> None:
    model = small_model()
    with pytest.raises(ModelError, match=r"0\.weight is no parameter of this Sequential"):
        SurgicalTheater(model, named_targets(copy.deepcopy(model), ["0.weight"]))


# ---- commit ---------------------------------------------------------------------------------------------------------


def test_a_commit_keeps_the_edit_and_frees_the_copies() -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])
    before, weight = bits(model), model[0].weight
    with SurgicalTheater(model, targets) as theater:
        targets[0].view.fill_(7)
        theater.commit()
        assert bytes_held(theater) == 0
        with pytest.raises(ModelError, match="leave the theater before you save"):
            model.state_dict()
    assert theater.committed
    assert model[0].weight is weight
    assert (weight == 7).all()
    assert {name for name, value in bits(model).items() if not torch.equal(value, before[name])} == {"0.weight"}
    with pytest.raises(ModelError, match="only an open theater can commit"):
        theater.commit()


def test_an_error_after_the_commit_does_not_undo_it() -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])

    def work() -> None:
        with SurgicalTheater(model, targets) as theater:
            targets[0].view.fill_(7)
            theater.commit()
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        work()
    assert (model[0].weight == 7).all()


# ---- nested ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner_commits", "outer_commits"), [(a, b) for a in (False, True) for b in (False, True)])
def test_nested_theaters(inner_commits: bool, outer_commits: bool) -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])
    before = model[0].weight.detach().clone()
    with SurgicalTheater(model, targets) as outer:
        targets[0].view.fill_(1)
        with SurgicalTheater(model, targets) as inner:
            targets[0].view.fill_(2)
            if inner_commits:
                inner.commit()
        assert (model[0].weight == (2 if inner_commits else 1)).all()
        if outer_commits:
            outer.commit()
    expected = (2 if inner_commits else 1) if outer_commits else before
    assert torch.equal(model[0].weight, torch.as_tensor(expected).expand_as(before).to(before))


def test_leaving_out_of_order_is_an_error_and_puts_everything_back() -> None:
    model = small_model()
    before = bits(model)
    first, second, third = (SurgicalTheater(model, named_targets(model, [name])) for name in ("*.weight", "0.*", "2.*"))
    for theater in (first, second, third):
        theater.__enter__()
        scramble(theater.targets)
    with pytest.raises(ModelError, match="left a theater before 2 opened later on the same weights"):
        first.__exit__(None, None, None)
    assert same(bits(model), before)
    for theater in (third, second):
        theater.__exit__(None, None, None)  # nothing is left to do, and nothing is done
    assert same(bits(model), before)


def test_a_theater_of_a_part_lies_within_one_of_the_whole() -> None:
    """The same memory, reached through two modules: the later one is closed first, or its copy would be put back."""
    model = small_model()
    before = bits(model)
    whole = SurgicalTheater(model, named_targets(model, ["0.weight"]))
    part = SurgicalTheater(model[0], named_targets(model[0], ["weight"]))
    for theater in (whole, part):
        theater.__enter__()
        scramble(theater.targets)
    with pytest.raises(ModelError, match="left a theater before 1 opened later on the same weights"):
        whole.__exit__(None, None, None)
    part.__exit__(None, None, None)  # nothing is left to do
    assert same(bits(model), before)


def test_theaters_of_two_models_do_not_mind_each_other() -> None:
    models = small_model(), small_model()
    before = bits(models[0])
    theaters = [SurgicalTheater(model, named_targets(model, ["0.weight"])) for model in models]
    for theater in theaters:
        theater.__enter__()
        scramble(theater.targets)
    for theater in theaters:
        theater.__exit__(None, None, None)
    assert all(same(bits(model), before) for model in models)


def test_a_theater_is_entered_once_at_a_time_and_again_later() -> None:
    model = small_model()
    theater = SurgicalTheater(model, named_targets(model, ["0.weight"]))
    before = bits(model)
    for _ in range(2):
        with theater:
            scramble(theater.targets)
            with pytest.raises(ModelError, match="open already"):
                theater.__enter__()
        assert same(bits(model), before)


# ---- what an open theater refuses -----------------------------------------------------------------------------------


def test_saving_copying_and_stepping_are_refused_while_it_is_open(tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=11, head_dim=4
    )
    model = LlamaForCausalLM(config)
    around = nn.ModuleDict({"policy": model, "other": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    other = torch.optim.Adam(around["other"].parameters())
    state = copy.deepcopy(model.state_dict())
    for parameter in around.parameters():
        parameter.grad = torch.ones_like(parameter)
    actions: list[Callable[[], Any]] = [
        model.state_dict,
        around.state_dict,
        lambda: model.save_pretrained(tmp_path),
        lambda: model.load_state_dict(state),
        lambda: copy.deepcopy(around),
        lambda: torch.save(model, io.BytesIO()),
        optimizer.step,
    ]
    targets = attention_targets(model, roles=["output"])
    before = bits(model)
    with SurgicalTheater(model, targets):
        for action in actions:
            with pytest.raises(ModelError, match="leave the theater before you save, load, copy or step its weights"):
                action()
        other.step()  # nobody's edit
        copy.deepcopy(around["other"])
    assert same(bits(model), before)
    for action in actions:
        action()
    assert not model.model.layers[0].self_attn.o_proj._state_dict_pre_hooks


# ---- interrupts -----------------------------------------------------------------------------------------------------


def operate(model: nn.Module, targets: list[Target], generator: torch.Generator) -> None:
    with SurgicalTheater(model, targets):
        scramble(targets, generator)
        with SurgicalTheater(model, targets):
            scramble(targets, generator)
        scramble(targets, generator)


@pytest.mark.parametrize("num_interrupts", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_interrupts_at_random_moments(num_interrupts: int) -> None:
    """Real signals from the kernel's timer; every second interrupt is followed by another on its heels."""
    model = small_model(width=32)
    targets = named_targets(model, ["*.weight"])
    before = bits(model)
    generator, dice = torch.Generator().manual_seed(0), random.Random(0)
    began = time.perf_counter()
    for _ in range(20):
        operate(model, targets, generator)
    duration = (time.perf_counter() - began) / 20
    num_interrupted = num_wrong = 0
    again: list[float] = []

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if again:
            signal.setitimer(signal.ITIMER_REAL, again.pop())
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, on_alarm)
    try:
        while num_interrupted < num_interrupts:
            again[:] = [dice.uniform(1e-6, duration / 4)] if num_interrupted % 2 else []
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, duration * 1.1))
                    operate(model, targets, generator)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    num_interrupted += 1
                    time.sleep(duration)
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            num_wrong += not same(bits(model), before)
            assert theater_module._open == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert num_wrong == 0
    # An interrupt may land where the handlers are put back and leave one standing, which passes its signal on; the next
    # theater that ends in peace puts it back.
    operate(model, targets, generator)


def test_a_handler_left_standing_passes_its_signal_on_and_is_put_back_by_the_next_theater() -> None:
    """As an interrupt leaves it that lands while the handlers are being put back."""
    model = small_model()
    theater_module._switch_handlers(deferring=True)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with SurgicalTheater(model, named_targets(model, ["0.weight"])):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt_at(boundary: int, work: Callable[[], None]) -> tuple[bool, bool]:
    """Runs ``work`` with one SIGINT at the given bytecode of the theater's code: (it was sent, it was raised)."""
    folder = str(Path(theater_module.__file__).parent)
    count, sent = 0, False
    seen: dict[tuple[CodeType, int], int] = {}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count, sent
        if not frame.f_code.co_filename.startswith(folder) and not sent:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            place = frame.f_code, frame.f_lasti
            seen[place] = seen.get(place, 0) + 1
            count += seen[place] <= 2  # of a loop, the first two rounds
            if count == boundary and not sent:
                sent = True
                signal.raise_signal(signal.SIGINT)
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return sent, True
    finally:
        sys.settrace(outer)
    return sent, False


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_every_bytecode_of_the_theater(stride: int) -> None:
    """Entering, committing within, and leaving, one signal before each bytecode: none is lost, no weight is wrong."""
    model = small_model(width=2)
    targets = named_targets(model, ["0.weight"])
    before = bits(model)

    def work() -> None:
        with SurgicalTheater(model, targets):
            targets[0].view.fill_(1)
            with SurgicalTheater(model, targets) as inner:
                targets[0].view.fill_(2)
                inner.commit()

    boundary, sent = 0, True
    while sent:
        boundary += stride
        sent, raised = interrupt_at(boundary, work)
        assert raised == sent, f"the signal at bytecode {boundary} was lost, {signal.getsignal(signal.SIGINT)}"
        assert same(bits(model), before), f"wrong weights after a signal at bytecode {boundary}"
        assert theater_module._open == [], f"left open after a signal at bytecode {boundary}"
        assert torch.is_grad_enabled(), f"gradients left off after a signal at bytecode {boundary}"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert boundary > 500
    with SurgicalTheater(model, targets):
        pass  # what a signal may have left of the handlers is tidied up


def test_a_handler_that_only_notes_the_signal_lets_the_theater_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])
    before = bits(model)
    with StopSignals() as stop:
        with SurgicalTheater(model, targets):
            os.kill(os.getpid(), signal.SIGTERM)
            scramble(targets)
        assert stop.requested
    assert same(bits(model), before)
    assert "SIGTERM" in capfd.readouterr().err


def test_other_threads_work_without_signals() -> None:
    model = small_model()
    targets = named_targets(model, ["0.weight"])
    before = bits(model)
    seen: list[bool] = []

    def work() -> None:
        with SurgicalTheater(model, targets):
            scramble(targets, torch.Generator().manual_seed(0))
            seen.append(same(bits(model), before))
        seen.append(same(bits(model), before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]


# ---- memory ---------------------------------------------------------------------------------------------------------


def allocated_bytes(work: Callable[[], object]) -> int:
    """What torch's CPU allocator hands out during ``work`` and does not get back before it ends."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_memory_is_that_of_the_targets_and_measured() -> None:
    """The text's own model and choice of layers, at which it claims 98 % less than a copy of the model."""
    config = GPT2Config(n_layer=6, n_embd=384, n_head=6, vocab_size=65, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    targets = named_targets(model, ["transformer.h.[01].attn.c_attn.weight"])
    copy_bytes = allocated_bytes(lambda: copy.deepcopy(model))
    theater = SurgicalTheater(model, targets)
    held_bytes = allocated_bytes(theater.__enter__)
    held = bytes_held(theater)
    theater.__exit__(None, None, None)
    assert held_bytes == held == 2 * 384 * 3 * 384 * 4
    assert copy_bytes == sum(parameter.nbytes for parameter in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )
    assert 1 - held / copy_bytes == pytest.approx(0.917, abs=0.001)  # 91.7 % less, not 98 %


# ---- the example ----------------------------------------------------------------------------------------------------


def test_the_example_runs_and_is_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[3] / "examples" / "theater.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before, after = float(lines[0].split()[-4]), float(lines[-1].split()[-1])
    assert after < before
    assert any(line.endswith(", committed") for line in lines)
