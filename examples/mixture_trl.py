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

from preceptor import mixtures

TEXTS = {"code": [inspect.getsource(argparse)], "manual": list(topics.topics.values())[:30]}


def main(folder: str, num_steps: int = 40, every: int = 10) -> mixtures.MixtureCallback:
    lm = mixtures.load_language_model("starter", device=torch.device("cpu"))
    datasets, samples = [], []
    for name, texts in TEXTS.items():
        documents = mixtures.tokenise(texts, encode=lm.encode, begin=lm.begin_token)
        train, rest = mixtures.split_held_out(documents, fraction=0.1)
        datasets.append(mixtures.pack_blocks(name, train, block_length=64))
        samples.append([block.tolist() for block in mixtures.pack_blocks(name, rest, block_length=64)][:20])
    sampler = mixtures.MixtureSampler({blocks.name: len(blocks) for blocks in datasets}, seed=0)
    mixed = mixtures.MixtureDataset(datasets, sampler=sampler)
    mixture = mixtures.make_mixture("learning_progress", num_datasets=len(datasets))
    callback = mixtures.MixtureCallback(mixture, mixed, samples=samples, tokenizer=lm.tokenizer, every=every)
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
