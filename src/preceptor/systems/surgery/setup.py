"""What never changes in a run: the text, the reference model, the fixed draws and the plan of phases."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from preceptor.data.corpora.corpus import read_documents
from preceptor.errors import DataError
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.runs.random import derived_seed
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery.config import EDITING_ARMS, ControlOptions, PhaseOptions, SurgeryConfig
from preceptor.systems.surgery.reference_lm import (
    ModelReference,
    NGramReference,
    ReferenceLM,
    load_reference_model,
    training_tokens,
)
from preceptor.systems.surgery.rewards import Examiner, draw_windows

NUM_FEATURE_WINDOWS = 4
"""Windows on which the surgeon sees the attention of the heads."""

EQUAL_WITHIN = 0.01
"""Relative difference in updates below which a run at equal FLOPs would repeat the one at equal tokens."""


@dataclass(frozen=True)
class Setup:
    """Everything fixed of a run.

    Attributes:
        config: the whole configuration.
        device: of the student.
        folder: where the surgeon's replay buffer may spill.
        notice: tells the person something.
        corpus: the text.
        reference_lm: gives partial rewards and scores what the student writes.
        examiner: measures quality on the training text, which is what edits are rewarded for.
        held_out_examiner: measures quality on the held-out text, at the end of a phase.
        feature_windows: text on which the surgeon sees attention.
        watched: the beginning of the held-out text, measured now and then.
        world: the processes of the run, which share windows and prompts.
    """

    config: SurgeryConfig
    device: torch.device
    folder: Path
    notice: Callable[[str], None]
    corpus: Corpus
    reference_lm: ReferenceLM
    examiner: Examiner
    held_out_examiner: Examiner
    feature_windows: Int[Tensor, "window time"]
    watched: Int[Tensor, " token"]
    world: World = ALONE

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """A generator for one ``purpose`` at one ``step``, the same whenever it is asked for.

        So nothing needs saving to draw the same again, methods that name the same purpose see the same numbers, and
        what one part draws never shifts another. This is why the system has no random streams.
        """
        return _generator(self.config.seed, purpose, step)


def _generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, f"{purpose} {step}"))


def prepare(
    config: SurgeryConfig,
    *,
    device: torch.device,
    folder: Path,
    notice: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> Setup:
    """Everything fixed of a run in ``folder``.

    Raises:
        DataError: the text, or the number of tokens that the reference model was trained on, cannot be read.
        ModelError: the reference model cannot be loaded.
    """
    block = config.student.block_size
    lm = load_reference_model(config.referee.model, device=device) if config.referee.kind == "model" else None
    corpus = make_corpus(
        config.data.text,
        tokens=config.data.tokens,
        vocab_size=config.data.vocab_size,
        train_share=config.data.train_share,
        block_size=block,
        tokenizer=None if lm is None else lm.tokenizer,
    )
    reference_lm: ReferenceLM
    if lm is None:
        reference_lm = NGramReference(corpus.train, order=config.referee.order, vocab_size=corpus.vocab_size)
    else:
        num_tokens = config.referee.training_tokens or training_tokens(config.referee.model)
        reference_lm = ModelReference(lm, training_tokens=num_tokens, block_size=block)
    quality, evaluation = config.quality, config.evaluation

    def examiner(tokens: Tensor, purpose: str, num_prompts: int, num_windows: int) -> Examiner:
        generator = _generator(config.seed, f"windows of {purpose}")
        return Examiner(
            reference_lm,
            tokens=tokens,
            num_prompts=num_prompts,
            prompt_tokens=quality.prompt_tokens,
            continuation_tokens=quality.continuation_tokens,
            # One token more than a block: the last one is only predicted.
            windows=draw_windows(tokens, num_windows=num_windows, length=block + 1, generator=generator).to(device),
            weights={
                "loss": quality.loss_weight,
                "referee": quality.referee_weight,
                "repetition": quality.repetition_weight,
                "distinct": quality.distinct_weight,
            },
            world=world,
        )

    features = draw_windows(
        corpus.train, num_windows=NUM_FEATURE_WINDOWS, length=block, generator=_generator(config.seed, "features")
    )
    return Setup(
        config=config,
        device=device,
        folder=folder,
        notice=notice,
        corpus=corpus,
        reference_lm=reference_lm,
        examiner=examiner(corpus.train, "reward", quality.num_prompts, quality.num_windows),
        held_out_examiner=examiner(corpus.held_out, "judgement", evaluation.num_prompts, evaluation.num_windows),
        feature_windows=features.to(device),
        # As many blocks as windows, plus the token that the last one only predicts.
        watched=corpus.held_out[: evaluation.num_windows * block + 1].to(device),
        world=world,
    )


# ---- the text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        name: of the text.
        sha256: of its UTF-8 bytes.
        tokenizer: of characters or byte pairs.
        vocab_size: entries of the tokenizer.
        train: tokens to train on.
        held_out: tokens to evaluate on, which follow the others in the text.
    """

    name: str
    sha256: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    train: Int[Tensor, " token"]
    held_out: Int[Tensor, " token"]


def read_text(path: str) -> tuple[str, str]:
    """The name and the content of the text file ``path``; if it is empty, of Python's own reference documentation.

    That documentation comes with every complete Python (half a million characters of plain English and code), so there
    is something to learn from without a download.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or this Python has no documentation.
    """
    if path:
        return Path(path).stem, "\n\n".join(read_documents(Path(path)))
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError("this Python comes without its documentation; give a text file with --text FILE") from error
    return "python_documentation", "\n\n".join(topics[name].strip() for name in sorted(topics))


def character_tokenizer(text: str, *, context_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose entries are the different characters of ``text``, in the order of their code points.

    >>> tokenizer = character_tokenizer("abba", context_length=8)
    >>> tokenizer("bab", add_special_tokens=False)["input_ids"], tokenizer.decode([0, 1])
    ([1, 0, 1], 'ab')
    """
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=context_length, clean_up_tokenization_spaces=False
    )


def make_corpus(
    path: str,
    *,
    tokens: str,
    vocab_size: int,
    train_share: float,
    block_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """The text of ``path`` as tokens, split into a leading part to train on and the held-out rest.

    Characters are those of the whole text, as in nanoGPT; a byte-pair encoding is fitted on the training part alone.

    Args:
        path: as for :func:`read_text`.
        tokens: ``characters``, ``bpe``, or ``referee``, which takes ``tokenizer``.
        vocab_size: of the byte-pair encoding.
        train_share: fraction of the characters to train on, in (0, 1).
        block_size: tokens of the student's context; each part must hold more than two such blocks.
        tokenizer: of the reference model.

    Raises:
        DataError: as :func:`read_text`, or the text is too short.
    """
    name, text = read_text(path)
    cut = int(train_share * len(text))  # in characters, so every tokenizer splits the text at the same place
    if tokens == "characters":
        tokenizer = character_tokenizer(text, context_length=block_size)
    elif tokens == "bpe":
        tokenizer = train_bpe_tokenizer([text[:cut]], vocab_size=vocab_size, context_length=block_size)
    assert tokenizer is not None, "the reference model's tokenizer is missing"
    train, held_out = (encode(tokenizer, part) for part in (text[:cut], text[cut:]))
    for part, what in ((train, "training"), (held_out, "held-out")):
        if len(part) <= 2 * block_size:
            raise DataError(
                f"the {what} part of {name} has {len(part)} tokens, a block of {block_size} needs more than "
                f"{2 * block_size}; give a longer text"
            )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, digest, tokenizer, len(tokenizer), train, held_out)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Int[Tensor, " token"]:
    """The tokens of ``text``, in which nothing is a control token."""
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    )


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one kind for one method.

    Attributes:
        method: the condition whose result is the student at the end; the records call it the arm.
        kind: ``bootstrap`` (updates), ``surgery`` (edits of a frozen student) or ``joint`` (updates and edits).
        start: from the random weights, from the end of bootstrapping, or from where the phase before it ended.
        num_steps: edits where there is a surgeon, otherwise updates.
        objective: of the updates.
        surgeon: who proposes edits; None proposes none.
        continues: the surgeon of the phase before it goes on.
    """

    method: str
    kind: Literal["bootstrap", "surgery", "joint"]
    start: Literal["initial", "bootstrapped", "as_it_is"]
    num_steps: int
    objective: str
    surgeon: str | None = None
    continues: bool = False


def plan_phases(
    *,
    phases: PhaseOptions,
    controls: ControlOptions,
    objective: str,
    gradient_steps: int,
    equal_flops_steps: Callable[[str], int],
    pretrained: bool = False,
) -> tuple[Phase, ...]:
    """All phases of a run, in order: bootstrapping, surgery and joint learning, then every control.

    Args:
        phases: their lengths.
        controls: which methods and further objectives to run.
        objective: of the run.
        gradient_steps: updates that cost as much as the edits of a method.
        equal_flops_steps: for another objective, the updates that cost as much as bootstrapping.
        pretrained: whether a surgeon that was trained before takes part.
    """
    methods = controls.arms

    def surgery(method: str) -> Phase:
        return Phase(method, "surgery", "bootstrapped", phases.surgery_edits, objective, surgeon=method)

    joint_phase = Phase("joint", "joint", "as_it_is", phases.joint_edits, objective, surgeon="learned", continues=True)
    plan = [Phase("no_edit", "bootstrap", "initial", phases.bootstrap_steps, objective)]
    if "learned" in methods:
        plan.append(surgery("learned"))
    if "joint" in methods:
        plan.append(joint_phase)
    if pretrained:
        plan.append(surgery("pretrained"))
        plan.append(replace(joint_phase, method="joint_pretrained", surgeon="pretrained"))
    plan += [surgery(method) for method in EDITING_ARMS if method in methods and method != "learned"]
    if "gradient" in methods:
        plan.append(Phase("gradient", "bootstrap", "bootstrapped", gradient_steps, objective))
    if "training" in methods:
        plan.append(Phase("training", "joint", "bootstrapped", phases.joint_edits, objective))
    for other in controls.objectives:
        plan.append(Phase(other, "bootstrap", "initial", phases.bootstrap_steps, other))
        steps = equal_flops_steps(other)
        if abs(steps - phases.bootstrap_steps) > EQUAL_WITHIN * phases.bootstrap_steps:
            plan.append(Phase(f"{other}_equal_flops", "bootstrap", "initial", steps, other))
    return tuple(phase for phase in plan if phase.num_steps)
