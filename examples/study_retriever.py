"""A policy that a study trained as the retriever of a `transformers` text-generation pipeline.

    python examples/study_retriever.py RUN FOLDER "How does a glacier move?"

RUN is the folder of a finished `preceptor run reading --preset study`, FOLDER holds texts. Without arguments a
short study is trained first, and asked about two texts that it never saw.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import pipeline

import preceptor
from preceptor.lm.load import load_language_model
from preceptor.systems.reading.study.choose import Reader, folder_pairs

UNSEEN = {
    "kites": "A kite flies because moving air is turned downward by its sail. The string holds it at an angle to the "
    "wind. Early kites were made of silk and bamboo. Their tails keep them from turning over.",
    "bread": "Bread rises because yeast eats sugar and gives off gas. Gluten holds the bubbles in the dough. A hot "
    "oven sets the crumb within minutes. Salt slows the yeast and strengthens the dough.",
}


def answer(run: Path, folder: Path, question: str, *, budget: int = 4) -> str:
    pairs, titles = folder_pairs(folder)
    chosen = Reader(run).choose(question, pairs, budget=min(budget, len(pairs)))
    for each in chosen:
        print(f"{each.probability:.2f}  {titles[each.index]}: {each.text}")
    prompt = " ".join(each.text for each in chosen) + " " + question

    # Any causal model will do; the bundled one continues text and was not trained to answer.
    lm = load_language_model("starter", device=torch.device("cpu"))
    generate = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)
    return str(generate(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(answer(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as parent:
            run, folder = Path(parent) / "run", Path(parent) / "texts"
            preceptor.run("reading", preset="study-smoke", out=run, quiet=True)
            folder.mkdir()
            for name, text in UNSEEN.items():
                (folder / f"{name}.txt").write_text(text, encoding="utf-8")
            print(answer(run, folder, "Why does dough rise?", budget=2))
