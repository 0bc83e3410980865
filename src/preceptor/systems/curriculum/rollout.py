"""Rollouts: the policy goes on from the first tokens of documents, one batch on one KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.score import pad_rows

MAX_MASK = 2**24
"""Entries of the masks of packed groups: 64 MiB in float32."""

MIN_SHARED = 1 / 8
"""Share of the tokens from which packing pays for its mask."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document.

    Attributes:
        dataset: which it was drawn from.
        tokens: what the policy reads; at least one.
        reference: how the document really goes on, as many tokens as a continuation may have, or fewer.
    """

    dataset: str
    tokens: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Rollouts:
    """What the policy wrote; the ``group_size`` continuations of one prompt are neighbours.

    Attributes:
        prompts: one a row.
        tokens: what was drawn.
        mask: True = the token counts: it is not behind an end token.
        log_probs: of each drawn token under the distribution that it was drawn from, nats.
        entropy: of that distribution, nats.
    """

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    log_probs: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens that a continuation may have."""
        return int(self.tokens.shape[1])

    def continuation(self, index: int) -> list[int]:
        """The counted tokens of a row."""
        return [int(token) for token in self.tokens[index][self.mask[index]]]

    def at(self, indices: Int[Tensor, " kept"]) -> Rollouts:
        """The rows at ``indices``."""
        return Rollouts(
            prompts=tuple(self.prompts[index] for index in indices.tolist()),
            tokens=self.tokens[indices],
            mask=self.mask[indices],
            log_probs=self.log_probs[indices],
            entropy=self.entropy[indices],
        )

    def without(self, rows: Bool[Tensor, " batch"]) -> Rollouts:
        """The same with nothing counted in ``rows``."""
        return replace(self, mask=self.mask & ~rows[:, None])

    @property
    def groups(self) -> list[list[int]]:
        """Rows with the same prompt, in order of their first."""
        members: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            members.setdefault(prompt.tokens, []).append(row)
        return list(members.values())

    def padded(self, filler: int) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Prompts and continuations as rows padded on the right, and where the drawn tokens are predicted.

        Every row has as many predicting positions as drawn tokens, so what is computed there has the shape [batch,
        token] again.
        """
        rows = [[*prompt.tokens, *tokens] for prompt, tokens in zip(self.prompts, self.tokens.tolist(), strict=True)]
        padded = pad_rows(rows, filler=filler, device=self.tokens.device)
        first = torch.tensor([len(prompt.tokens) - 1 for prompt in self.prompts], device=padded.device)[:, None]
        time = torch.arange(padded.shape[1], device=padded.device)
        return padded, (time >= first) & (time < first + self.num_tokens)


def generate_rollouts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    num_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Rollouts:
    """``group_size`` continuations of every prompt, drawn in one batch; a prompt is read once for its group.

    A row that draws the tokenizer's end token is over: what is drawn after it does not count.

    Args:
        lm: the policy.
        prompts: what it goes on from.
        group_size: continuations of each prompt, at least 1.
        num_tokens: tokens of a continuation, at most.
        sampling: the distribution that is drawn from, without truncation.
        generator: of the draws.
    """
    decoder = Decoder(lm, batch_size=len(prompts))
    decoder.append([prompt.tokens for prompt in prompts])
    decoder.repeat(group_size)
    generated = decoder.generate(num_tokens, sampling=sampling, generator=generator)
    ends = generated.tokens == end_token(lm)
    return Rollouts(
        prompts=tuple(prompt for prompt in prompts for _ in range(group_size)),
        tokens=generated.tokens,
        mask=ends.cumsum(1) - ends.long() == 0,
        log_probs=generated.log_probs,
        entropy=generated.entropy,
    )


def end_token(lm: LanguageModel) -> int:
    """The token that ends a continuation, −1 where the tokenizer has none."""
    token = lm.tokenizer.eos_token_id
    return -1 if token is None else int(token)


def rollout_sampling(lm: LanguageModel, temperature: float) -> Sampling:
    """The distribution of rollouts: no control token but the end, and no truncation.

    A truncated distribution would make the ratio of PPO a ratio of two different supports.
    """
    end = end_token(lm)
    return Sampling(temperature=temperature, suppressed=[token for token in lm.special_tokens if token != end])


@dataclass(frozen=True)
class Passage:
    """What one pass reads to predict every drawn token once.

    Attributes:
        tokens: token ids.
        keep: True = a drawn token is predicted here.
        order: the rollout of each stretch of kept positions, in row-major order.
        visible: True = this token attends to that one; None where rows are plain.
        positions: of each token in its text; None where rows are plain.
    """

    tokens: Int[Tensor, "batch time"]
    keep: Bool[Tensor, "batch time"]
    order: Int[Tensor, " kept"]
    visible: Bool[Tensor, "batch time time"] | None = None
    positions: Int[Tensor, "batch time"] | None = None


def passage(rollouts: Rollouts, *, filler: int, packs: bool) -> Passage:
    """A row for each rollout or, where it pays and ``packs``, one for each group, which holds its prompt once.

    In a packed row the prompt is followed by the continuations, each of which begins with the prompt's last token and
    sees the prompt and itself.
    """
    groups, num_tokens, device = rollouts.groups, rollouts.num_tokens, rollouts.tokens.device
    prompts = [rollouts.prompts[members[0]].tokens for members in groups]
    packed_sizes = [
        len(prompt) - 1 + len(members) * num_tokens for prompt, members in zip(prompts, groups, strict=True)
    ]
    plain_size = sum(len(prompt.tokens) + num_tokens for prompt in rollouts.prompts)
    pays = sum(packed_sizes) <= (1 - MIN_SHARED) * plain_size and len(groups) * max(packed_sizes) ** 2 <= MAX_MASK
    if not (packs and pays):
        return Passage(*rollouts.padded(filler), order=torch.arange(len(rollouts), device=device))
    drawn = rollouts.tokens.tolist()
    rows: list[list[int]] = []
    texts: list[list[int]] = []  # 0 is the prompt, 1 the first continuation, …
    positions: list[list[int]] = []
    for prompt, members in zip(prompts, groups, strict=True):
        shared = len(prompt) - 1
        rows.append([*prompt[:-1], *(token for row in members for token in (prompt[-1], *drawn[row][:-1]))])
        texts.append([0] * shared + [text for text in range(1, len(members) + 1) for _ in range(num_tokens)])
        positions.append([*range(shared), *list(range(shared, shared + num_tokens)) * len(members)])
    text = pad_rows(texts, filler=-1, device=device)
    visible = (text[:, None, :] == 0) | (text[:, None, :] == text[:, :, None])
    return Passage(
        tokens=pad_rows(rows, filler=filler, device=device),
        keep=text > 0,
        order=torch.tensor([row for members in groups for row in members], device=device),
        visible=visible.tril(),
        positions=pad_rows(positions, filler=0, device=device),
    )


def rollout_log_probs(lm: LanguageModel, rollouts: Rollouts, sampling: Sampling) -> Float[Tensor, "batch token"]:
    """Log-probability in nats of each drawn token, without the logits of all places at once.

    Carries gradient into the trainable parameters of ``lm``, unless the caller switches it off.
    """
    read = passage(rollouts, filler=lm.begin_token, packs=lm.skips_hidden_slots)
    log_probs = lm.chosen_log_probs(
        read.tokens,
        keep=read.keep,
        chosen=rollouts.tokens[read.order].flatten(),
        attention_mask=read.visible,
        positions=read.positions,
        sampling=sampling,
    )
    return log_probs.view_as(rollouts.tokens)[read.order.argsort()]


def rollout_distributions(
    lm: LanguageModel, rollouts: Rollouts, sampling: Sampling
) -> Float[Tensor, "batch token vocab"]:
    """Log-probabilities in nats of the whole vocabulary at each place of the continuations.

    Carries gradient into the trainable parameters of ``lm``, unless the caller switches it off.
    """
    read = passage(rollouts, filler=lm.begin_token, packs=lm.skips_hidden_slots)
    output = lm.forward(read.tokens, keep=read.keep, attention_mask=read.visible, positions=read.positions)
    logits = output.logits.view(len(rollouts), rollouts.num_tokens, -1)[read.order.argsort()]
    return sampling.log_probs(logits, drawn=rollouts.tokens)
