"""``preceptor repair``: a trained surgeon edits a model that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from preceptor.api import repair as repair_model
from preceptor.cli import options


def repair(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="starter, or a model folder.", show_default=False)],
    *,
    surgeon: Annotated[
        Path,
        typer.Option("--surgeon", metavar="RUN", help="Run with a surgeon trained on many models.", show_default=False),
    ],
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text that the model should predict.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Folder to write.  [default: MODEL-repaired]", show_default=False),
    ] = None,
    evaluations: Annotated[int, typer.Option("--evaluations", metavar="N", help="Edits that may be tried.")] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the windows of text.")] = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> int:
    """Repair a model in a few edits of its attention.

    The surgeon is that of a finished `preceptor run surgery --preset planted`. It sees the first half of the text; an
    edit stays if it lowers the loss on the next quarter by more than chance; the gain is measured on the last quarter.
    The model folder that was given is left as it is.
    """
    from preceptor.systems.surgery.repair import summary

    to = to or Path(f"{Path(model).name}-repaired")
    done = repair_model(
        model, surgeon=surgeon, text=text, out=to, evaluations=evaluations, seed=seed, device=device, threads=threads
    )
    for label, line in summary(done).items():
        print(f"{label + ':':<9}{line}")
    print(f"model:   {to}")
    return 0
