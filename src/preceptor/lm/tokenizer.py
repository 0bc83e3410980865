"""Training a byte-pair tokenizer on one's own text, in the format that Transformers loads."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from preceptor.errors import ConfigError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def train_bpe_tokenizer(texts: Iterable[str], *, vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most ``vocab_size`` tokens, trained on ``texts``; deterministic.

    It works on bytes, so every string round-trips exactly and nothing is unknown. The three control tokens come first
    (begin 0, end 1, pad 2); text that spells one of them stays text under ``split_special_tokens=True``. Every digit is
    a token of its own, so that numbers do not fill the vocabulary.

    Args:
        texts: training texts.
        vocab_size: number of tokens, at least 259 (256 bytes and the control tokens); few texts may yield fewer.
        context_length: context of the model in tokens, recorded with the tokenizer.

    Raises:
        ConfigError: ``vocab_size`` is too small for all bytes.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    if vocab_size < smallest:
        raise ConfigError(f"`vocab_size` must be at least {smallest}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
