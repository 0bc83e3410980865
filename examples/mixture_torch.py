"""A mixture of datasets in a training loop of your own: the model says which dataset it can learn from next.

Run: python examples/mixture_torch.py [number of steps]
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
from functools import partial
from pydoc_data import topics

import torch
from torch.utils.data import DataLoader

from preceptor.data.corpora.blocks import pack_blocks, split_held_out, tokenise
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler, collate
from preceptor.lm.load import load_language_model
from preceptor.objectives import document_difficulty, make_mixture
from preceptor.systems.curriculum.difficulty import document_losses

letters = random.Random(0)
TEXTS = {  # what every Python has, and noise of which nothing but its alphabet can be learnt
    "code": [inspect.getsource(argparse)],
    "manual": list(topics.topics.values())[:30],
    "noise": ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=300)) for _ in range(100)],
}


def main(num_steps: int = 60, every: int = 10) -> dict[str, float]:
    lm = load_language_model("starter", device=torch.device("cpu"))
    datasets, samples = [], []
    for name, texts in TEXTS.items():
        train, rest = split_held_out(tokenise(texts, encode=lm.encode, begin=lm.begin_token), fraction=0.1)
        datasets.append(pack_blocks(name, train, block_length=64))
        samples.append([block.tolist() for block in pack_blocks(name, rest, block_length=64)][:20])
    mixture = make_mixture("learning_progress", num_datasets=len(datasets))
    sampler = MixtureSampler({blocks.name: len(blocks) for blocks in datasets}, seed=0)
    mixed = MixtureDataset(datasets, sampler=sampler)
    batches = iter(DataLoader(mixed, batch_size=8, collate_fn=partial(collate, filler=lm.begin_token)))

    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=5e-4)
    losses = document_losses(lm, samples)
    for step in range(num_steps):
        if step % every == 0:
            previous, losses = losses, document_losses(lm, samples)
            sampler.weights = mixture.update(document_difficulty(losses, previous=previous))
            print(step, {name: round(share, 2) for name, share in zip(TEXTS, mixture.weights.tolist(), strict=True)})
        optimiser.zero_grad()
        lm.model(**next(batches)).loss.backward()
        optimiser.step()
    return dict(zip(TEXTS, mixture.weights.tolist(), strict=True))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
