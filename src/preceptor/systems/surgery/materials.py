"""What a run works with and nothing changes: the text, the referee, and everything that is drawn once and kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from preceptor.run.random import derived_seed
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.ngram import NGram
from preceptor.systems.surgery.quality import Examiner
from preceptor.systems.surgery.referee import ModelReferee, NGramReferee, Referee, load_referee, training_tokens
from preceptor.systems.surgery.text import Corpus, draw_windows, make_corpus

NUM_FEATURE_WINDOWS = 4
"""Windows on which the surgeon looks at the heads' attention."""


@dataclass(frozen=True)
class Materials:
    """Text, referee and fixed draws.

    Attributes:
        corpus: the text.
        referee: gives partial rewards and reads what is written.
        examiner: on the training text: what edits are paid for.
        held_out_examiner: on the held-out text, measured at the end of an arm.
        feature_windows: where the surgeon looks at attention.
        watched: leading stretch of the held-out text, measured on the way.
        seed: of everything that is drawn.
    """

    corpus: Corpus
    referee: Referee
    examiner: Examiner
    held_out_examiner: Examiner
    feature_windows: Int[Tensor, "window time"]
    watched: Int[Tensor, " token"]
    seed: int

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """A generator for one ``purpose`` at one ``step``, the same whenever it is asked for.

        Nothing has to be saved to draw the same again; arms that name the same purpose see the same numbers; and what
        one part draws never moves another.
        """
        return generator(self.seed, purpose, step)


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """See :meth:`Materials.generator`."""
    return torch.Generator().manual_seed(derived_seed(seed, f"{purpose} {step}"))


def prepare(config: SurgeryConfig, *, device: torch.device) -> Materials:
    """Everything fixed of a run.

    Raises:
        DataError: the text, or what the referee cost, cannot be read.
        ModelError: the referee cannot be loaded.
    """
    block = config.student.block_size
    lm = load_referee(config.referee.model, device=device) if config.referee.kind == "model" else None
    corpus = make_corpus(
        config.data.text,
        tokens=config.data.tokens,
        vocab_size=config.data.vocab_size,
        train_share=config.data.train_share,
        block_size=block,
        tokenizer=None if lm is None else lm.tokenizer,
    )
    referee: Referee
    if lm is None:
        referee = NGramReferee(corpus.train, order=config.referee.order, vocab_size=corpus.vocab_size)
    else:
        tokens = config.referee.training_tokens or training_tokens(config.referee.model)
        referee = ModelReferee(lm, training_tokens=tokens, block_size=block)
    quality = config.quality
    weights = {
        "loss": quality.loss_weight,
        "referee": quality.referee_weight,
        "repetition": quality.repetition_weight,
        "distinct": quality.distinct_weight,
    }

    def examiner(tokens: Tensor, purpose: str, num_prompts: int, num_windows: int) -> Examiner:
        drawn = generator(config.seed, f"windows of {purpose}")
        return Examiner(
            referee,
            tokens=tokens,
            num_prompts=num_prompts,
            prompt_tokens=quality.prompt_tokens,
            continuation_tokens=quality.continuation_tokens,
            windows=draw_windows(tokens, num_windows=num_windows, length=block + 1, generator=drawn).to(device),
            weights=weights,
        )

    evaluation = config.evaluation
    features = draw_windows(
        corpus.train, num_windows=NUM_FEATURE_WINDOWS, length=block, generator=generator(config.seed, "features")
    )
    return Materials(
        corpus=corpus,
        referee=referee,
        examiner=examiner(corpus.train, "reward", quality.num_prompts, quality.num_windows),
        held_out_examiner=examiner(corpus.held_out, "judgement", evaluation.num_prompts, evaluation.num_windows),
        feature_windows=features.to(device),
        watched=corpus.held_out[: evaluation.num_windows * block + 1].to(device),
        seed=config.seed,
    )


def ladder(corpus: Corpus, *, order: int) -> dict[str, tuple[float, float]]:
    """Held-out cross-entropy (nats per token) and accuracy of each n-gram up to ``order``, fitted on the rest."""
    ngram = NGram(corpus.train, order=order, vocab_size=corpus.vocab_size)
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    return {names.get(n, f"{n}-gram"): ngram.score(corpus.held_out, order=n) for n in range(1, order + 1)}
