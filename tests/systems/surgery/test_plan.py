from __future__ import annotations

from preceptor.systems.surgery.config import ARMS, ControlOptions, PhaseOptions
from preceptor.systems.surgery.plan import Stretch, make_plan
from preceptor.systems.surgery.plateau import PlateauWatch

PHASES = PhaseOptions(bootstrap_steps=100, surgery_edits=20, joint_edits=10)


def plan(*, equal_flops: int = 100, **controls: tuple[str, ...]) -> list[Stretch]:
    return list(
        make_plan(
            phases=PHASES,
            controls=ControlOptions(**controls),  # type: ignore[arg-type]
            objective="expected",
            gradient_steps=7,
            equal_flops_steps=lambda _: equal_flops,
        )
    )


def test_three_phases_come_first_and_then_the_controls() -> None:
    found = plan()
    assert [(stretch.arm, stretch.phase, stretch.start) for stretch in found] == [
        ("no_edit", "bootstrap", "initial"),
        ("learned", "surgery", "bootstrapped"),
        ("joint", "joint", "as_it_is"),
        ("shuffled", "surgery", "bootstrapped"),
        ("evolution", "surgery", "bootstrapped"),
        ("random", "surgery", "bootstrapped"),
        ("best_of_n", "surgery", "bootstrapped"),
        ("gradient", "bootstrap", "bootstrapped"),
        ("training", "joint", "bootstrapped"),
        ("cross_entropy", "bootstrap", "initial"),
    ]
    assert {stretch.arm for stretch in found} == {*ARMS, "cross_entropy"}
    assert {stretch.num_steps for stretch in found if stretch.phase == "surgery"} == {20}
    assert [stretch.continues for stretch in found].count(True) == 1
    training = next(stretch for stretch in found if stretch.arm == "training")
    assert training.surgeon is None
    assert training.num_steps == 10


def test_another_run_at_equal_flops_where_it_differs() -> None:
    found = plan(arms=(), objectives=("distil",), equal_flops=123)
    assert [(stretch.arm, stretch.num_steps) for stretch in found] == [
        ("no_edit", 100), ("distil", 100), ("distil_equal_flops", 123)
    ]  # fmt: skip
    assert len(plan(arms=(), objectives=("distil",), equal_flops=99)) == 2  # a hundredth is no difference


def test_a_falling_loss_is_no_plateau() -> None:
    watch = PlateauWatch(window=3, slope=0.01)
    found = [watch.measure(step, 3.0 - 0.001 * step) for step in range(100, 1100, 100)]
    assert not any(found)
    assert watch.step is None


def test_a_plateau_is_found_once_by_the_line_through_the_last_points() -> None:
    # To catch: the slope per step instead of per hundred.
    watch = PlateauWatch(window=3, slope=0.1)
    losses = [3.0, 2.0, 1.9, 1.9, 1.9]  # per 100 steps: -0.55, then -0.05
    assert [watch.measure(100 * n, loss) for n, loss in enumerate(losses, start=1)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    again = PlateauWatch(window=3, slope=0.1)
    again.load_state_dict(watch.state_dict())
    assert again.state_dict() == watch.state_dict()
