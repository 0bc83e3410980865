"""One unseen student under one kind of damage, repaired by the trained surgeon and by every baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from preceptor.systems.surgery import calibration, search
from preceptor.systems.surgery.damage import Undo
from preceptor.systems.surgery.patient import Patient
from preceptor.systems.surgery.setup import Setup
from preceptor.systems.surgery.site_policy import TrainedSurgeon


def judge(
    setup: Setup, patient: Patient, kind: str, surgeons: Mapping[str, TrainedSurgeon]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics, the course of each of the surgeon's repairs site by site, and the records of every method.

    The share repaired is Σ(damaged − repaired) / Σ(damaged − clean) over damages, in nats on held-out text. Where the
    damages did no harm in sum there is no share, and so no record.

    Args:
        setup: of the run.
        patient: a student that no surgeon has seen.
        kind: of damage.
        surgeons: by the name of their method.
    """
    options = setup.config.amortised
    where = f"{patient.name}/{kind}"
    test = patient.windows(options.test_windows, setup.generator(f"test of {where}"), held_out=True)
    patient.restore(kind)
    clean, healthy = patient.loss(test), patient.log_norms()

    def wounds() -> list[float]:
        """ln of every site's norm over its undamaged one: 0 for a site that is as it was."""
        return (patient.log_norms() - healthy).tolist()

    courses = []  # of the surgeon's patients, site by site
    damages: dict[str, list[float]] = {}  # method → nats of each damage that it was given
    repaired: dict[str, dict[int, list[float]]] = {}  # method → evaluations → nats taken back of each
    for index in range(options.patients):
        for method in options.repairs:
            if method == "sac" and index >= options.sac_patients:
                continue
            draws = setup.generator(f"damage of {where}", index)  # the same damage for every method
            undo = patient.damage(kind, strength=options.strength, generator=draws)
            damaged = patient.loss(test)
            damages.setdefault(method, []).append(damaged - clean)
            course = {"after_damage": wounds()}
            for evaluation in _repair(setup, surgeons, method, patient, kind, undo, index):
                if method == "amortised":
                    course[f"after_edit_{evaluation}"] = wounds()
                # A search that goes on in leaps is judged at a mark by what it had there.
                for mark in search.EVALUATIONS:
                    if evaluation <= mark < evaluation + search.LEAPS.get(method, 1):
                        marks = repaired.setdefault(method, {})
                        marks.setdefault(mark, []).append(damaged - patient.loss(test))
            if method == "amortised":
                courses.append({"arm": method, "item": where, "number": index, "sites": patient.sites.names, **course})
    patient.restore()
    shares = {
        method: {mark: sum(nats) / sum(damages[method]) for mark, nats in marks.items()}
        for method, marks in repaired.items()
        if sum(damages[method]) > 0
    }
    records = [
        {"arm": method, "item": where, "split": "held_out", "seed": setup.config.seed}
        | {f"repaired_{mark}": share for mark, share in of_method.items()}
        | {"damage": sum(damages[method]) / len(damages[method])}
        for method, of_method in shares.items()
    ]
    metrics = {
        "kind": "judging",
        "item": where,
        "clean_loss": clean,
        "repairs": {method: {str(mark): share for mark, share in marks.items()} for method, marks in shares.items()},
    }
    if "amortised" in shares:
        metrics["repaired"] = shares["amortised"].get(search.EDITS)
    return metrics, courses, records


def _repair(
    setup: Setup,
    surgeons: Mapping[str, TrainedSurgeon],
    method: str,
    patient: Patient,
    kind: str,
    undo: Undo,
    index: int,
) -> Iterator[int]:
    """``method`` at work on damage ``index`` of a student under one kind of damage."""
    options, where = setup.config.amortised, f"{patient.name}/{kind}"
    generator = setup.generator(f"{method} of {where}", index)
    evaluations = options.search_evaluations
    windows = patient.windows(options.search_windows, setup.generator(f"search of {where}", index))

    def seen(edit: int) -> Tensor:
        return patient.windows(options.probe_windows, setup.generator(f"seen of {where} {edit}", index))

    def fresh(step: int) -> Tensor:
        return patient.windows(options.search_windows, setup.generator(f"{method} of {where} {step}", index))

    if method in surgeons:
        return search.trained(patient, surgeons[method].act, windows=seen, gradients=options.gradients)
    if method.startswith("calibration"):
        return calibration.calibrate(patient, method, kind, windows)
    if method == "tuning":
        return search.tuning(patient, fresh, steps=min(search.GRADIENT_STEPS, evaluations))
    if method == "inverse":
        return search.inverse(undo)
    if method == "norms":
        return search.norms(patient)
    if method == "gradient":
        return search.gradient(patient, windows, steps=min(search.GRADIENT_STEPS, evaluations))
    if method == "evolution":
        return search.evolution(patient, windows, generator, evaluations=evaluations)
    if method == "cma_es":
        return search.cma_es(patient, windows, generator, evaluations=evaluations)
    if method == "sac":
        draws = partial(setup.generator, f"sac of {where} {index}")
        return search.sac(patient, windows, generator, evaluations=evaluations, folder=setup.folder, draws=draws)
    return iter([1])  # no_edit
