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

from preceptor import mixtures

letters = random.Random(0)
TEXTS = {  # what every Python has, and noise of which nothing but its alphabet can be learnt
    "code": [inspect.getsource(argparse)],
    "manual": list(topics.topics.values())[:30],
    "noise": ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=300)) for _ in range(100)],
}


def main(num_steps: int = 60, every: int = 10) -> dict[str, float]:
    lm = mixtures.load_language_model("starter", device=torch.device("cpu"))
    datasets, samples = [], []
    for name, texts in TEXTS.items():
        documents = mixtures.tokenise(texts, encode=lm.encode, begin=lm.begin_token)
        train, rest = mixtures.split_held_out(documents, fraction=0.1)
        datasets.append(mixtures.pack_blocks(name, train, block_length=64))
        samples.append([block.tolist() for block in mixtures.pack_blocks(name, rest, block_length=64)][:20])
    mixture = mixtures.make_mixture("learning_progress", num_datasets=len(datasets))
    sampler = mixtures.MixtureSampler({blocks.name: len(blocks) for blocks in datasets}, seed=0)
    mixed = mixtures.MixtureDataset(datasets, sampler=sampler)
    # With num_workers=2 two processes read, and new weights hold four batches later.
    batches = mixed.batches(batch_size=8, collate_fn=partial(mixtures.collate, filler=lm.begin_token))

    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-4)
    losses = mixtures.document_losses(lm, samples)
    for step in range(num_steps):
        if step % every == 0:
            previous, losses = losses, mixtures.document_losses(lm, samples)
            sampler.weights = mixture.update(mixtures.document_difficulty(losses, previous=previous))
            print(step, {name: round(share, 2) for name, share in zip(TEXTS, mixture.weights.tolist(), strict=True)})
        optimizer.zero_grad()
        lm.model(**next(batches)).loss.backward()
        optimizer.step()
    return dict(zip(TEXTS, mixture.weights.tolist(), strict=True))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
