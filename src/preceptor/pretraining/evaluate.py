"""What a pretrained model is worth on text that it never saw: bits per byte and the preference for true context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, context_length: int
) -> float:
    """Bits that the model needs per UTF-8 byte of ``documents`` (total bits over total bytes).

    Each document is cut into consecutive windows of ``context_length`` tokens, each starting with the begin token, so
    every token is scored once with what precedes it in its window.
    """
    bits, num_bytes = 0.0, 0
    for document in documents:
        tokens = tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # Bytes and not tokens in the denominator: models with other tokenizers can be compared.
        num_bytes += len(document.encode())
        # One token of the window is the begin token, hence the step of context_length − 1.
        for start in range(0, len(tokens), context_length - 1):
            window = torch.tensor([[tokenizer.bos_token_id, *tokens[start : start + context_length - 1]]])
            logits = model(window.to(model.device)).logits[0, :-1].float()  # [time, vocab]
            bits += F.cross_entropy(logits, window[0, 1:].to(model.device), reduction="sum").item() / math.log(2)
    return bits / num_bytes


@torch.no_grad()
def previous_sentence_preference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, articles: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """Mean gain in nats per token of a sentence after its true predecessor over a foreign one, and its standard error.

    ``articles`` are lists of sentences. The foreign predecessor of a sentence is the one at the same relative place of
    the next article in the list, so the comparison is deterministic and never within one article.
    """
    gains = []
    for index, sentences in enumerate(articles):
        others = articles[(index + 1) % len(articles)]
        for position in range(1, len(sentences)):
            # The same relative place: an introduction follows an introduction.
            foreign = others[(position - 1) * len(others) // len(sentences)]
            true = _sentence_log_prob(model, tokenizer, sentences[position - 1], sentences[position])
            gains.append(true - _sentence_log_prob(model, tokenizer, foreign, sentences[position]))
    mean = sum(gains) / len(gains)
    # n − 1: the standard error of a mean over sentences.
    variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return mean, math.sqrt(variance / len(gains))


def _sentence_log_prob(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, sentence: str
) -> float:
    """Mean log-probability in nats per token of ``sentence`` after ``context``."""
    before = tokenizer(context, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # The space belongs to the sentence's first token, as it would in running text.
    tokens = tokenizer(" " + sentence, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    window = torch.tensor([[tokenizer.bos_token_id, *before, *tokens]], device=model.device)
    logits = model(window).logits[0, -len(tokens) - 1 : -1].float()  # [sentence, vocab]
    return -F.cross_entropy(logits, window[0, -len(tokens) :]).item()
