"""``preceptor study``: which passages of a folder to read for a question, by a policy that a study has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def study(
    *,
    ask: Annotated[str, typer.Option("--ask", metavar="TEXT", help="The question.", show_default=False)],
    pool: Annotated[
        Path, typer.Option("--pool", metavar="FOLDER", help="Folder of texts to choose from.", show_default=False)
    ],
    policy: Annotated[
        Path, typer.Option("--policy", metavar="RUN", help="Folder of a finished study.", show_default=False)
    ],
    budget: Annotated[int, typer.Option("--budget", metavar="N", help="Number of passages to read.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the context for a prompt here.", show_default=False),
    ] = None,
) -> int:
    """Choose passages to read for a question.

    The policy of a run of `preceptor run reading --preset study` chooses among the sentence pairs of a folder of texts.
    It prints them in order, each with the probability with which it was chosen at its step.
    """
    from preceptor.runs.files import replace_file
    from preceptor.systems.reading.study.choose import Reader, folder_pairs

    pairs, titles = folder_pairs(pool)
    chosen = Reader(policy).choose(ask, pairs, budget=budget)
    for number, each in enumerate(chosen, start=1):
        print(f"{number:3}. {each.probability:.2f}  {titles[each.index]}: {each.text}")
    if out is not None:
        replace_file(out, "\n".join(each.text for each in chosen) + f"\n\n{ask}\n")
        print(f"context: {out}")
    return 0
