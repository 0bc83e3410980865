"""A policy that a study trained as the retriever of a `transformers` text-generation pipeline.

    python examples/study_retriever.py RUN FOLDER "How does a glacier move?"

RUN is the folder of a finished `preceptor run reading --preset study`, FOLDER holds texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import pipeline

from preceptor.lm.load import load_language_model
from preceptor.systems.reading.study.choose import Reader, folder_pairs


def answer(run: Path, folder: Path, question: str, *, budget: int = 4) -> str:
    pairs, titles = folder_pairs(folder)
    chosen = Reader(run).choose(question, pairs, budget=budget)
    for each in chosen:
        print(f"{each.probability:.2f}  {titles[each.index]}: {each.text}")
    prompt = " ".join(each.text for each in chosen) + " " + question

    # Any causal model will do; the bundled one continues text and was not trained to answer.
    import torch

    lm = load_language_model("starter", device=torch.device("cpu"))
    generate = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer)
    return str(generate(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"])


if __name__ == "__main__":
    print(answer(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
