"""A mixture of datasets in a Trainer of Transformers, whose weights a callback moves.

Run: python examples/mixture_trainer.py [number of steps]
Or:  accelerate launch --num_processes 2 examples/mixture_trainer.py [number of steps]
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
from functools import partial
from pydoc_data import topics

import torch
from transformers import Trainer, TrainingArguments

from preceptor import mixtures

TEXTS = {"code": [inspect.getsource(argparse)], "manual": list(topics.topics.values())[:30]}


def main(folder: str, num_steps: int = 40, every: int = 10, resume: bool = False) -> mixtures.MixtureCallback:
    lm = mixtures.load_language_model("starter", device=torch.device("cpu"))
    datasets, samples = [], []
    for name, texts in TEXTS.items():
        documents = mixtures.tokenise(texts, encode=lm.encode, begin=lm.begin_token)
        train, rest = mixtures.split_held_out(documents, fraction=0.1)
        datasets.append(mixtures.pack_blocks(name, train, block_length=64))
        samples.append([block.tolist() for block in mixtures.pack_blocks(name, rest, block_length=64)][:20])
    sampler = mixtures.MixtureSampler({blocks.name: len(blocks) for blocks in datasets}, seed=0)
    mixed = mixtures.MixtureDataset(datasets, sampler=sampler)
    mixture = mixtures.make_mixture("second_order", num_datasets=len(datasets))
    callback = mixtures.MixtureCallback(mixture, mixed, samples=samples, tokenizer=lm.tokenizer, every=every)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        save_steps=every,
        ignore_data_skip=True,  # on resuming, the mixture knows how far it was
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        lm.model, arguments, partial(mixtures.collate, filler=lm.begin_token), train_dataset=mixed, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return callback


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        history = main(folder, *map(int, sys.argv[1:])).history
        for row in history if os.environ.get("RANK", "0") == "0" else ():  # every process has the same
            print(row["step"], {name: round(share, 2) for name, share in row["weight"].items()})
