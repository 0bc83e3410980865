"""A mixture of datasets in TRL's SFTTrainer: the same dataset, handed over as a stream, and the same callback.

Run: python examples/mixture_trl.py [number of steps]
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from pydoc_data import topics

import torch
from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer

from preceptor.data.corpora.blocks import pack_blocks, split_held_out, tokenise
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler
from preceptor.lm.load import load_language_model
from preceptor.objectives import make_mixture
from preceptor.systems.curriculum.callback import MixtureCallback

TEXTS = {"code": [inspect.getsource(argparse)], "manual": list(topics.topics.values())[:30]}


def main(folder: str, num_steps: int = 40, every: int = 10) -> MixtureCallback:
    lm = load_language_model("starter", device=torch.device("cpu"))
    datasets, samples = [], []
    for name, texts in TEXTS.items():
        train, rest = split_held_out(tokenise(texts, encode=lm.encode, begin=lm.begin_token), fraction=0.1)
        datasets.append(pack_blocks(name, train, block_length=64))
        samples.append([block.tolist() for block in pack_blocks(name, rest, block_length=64)][:20])
    sampler = MixtureSampler({blocks.name: len(blocks) for blocks in datasets}, seed=0)
    mixed = MixtureDataset(datasets, sampler=sampler)
    mixture = make_mixture("learning_progress", num_datasets=len(datasets))
    callback = MixtureCallback(mixture, mixed, samples=samples, tokenizer=lm.tokenizer, every=every)
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    stream = IterableDataset.from_generator(lambda: ({"input_ids": row["input_ids"].tolist()} for row in mixed))
    trainer = SFTTrainer(lm.model, arguments, train_dataset=stream, processing_class=lm.tokenizer, callbacks=[callback])
    trainer.train()
    return callback


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row in main(folder, *map(int, sys.argv[1:])).history:
            print(row["step"], {name: round(share, 2) for name, share in row["weight"].items()})
