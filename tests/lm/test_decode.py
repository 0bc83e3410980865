"""Decoding on the KV cache, against encoding everything again, alone, with plain Transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.errors import ModelError, NumericError, ShapeError
from preceptor.lm.decode import Decoder, Generated
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

# float32 rounds logits of magnitude 10 to about 1e-6; other kernels for other shapes add in another order.
TOLERANCE = 1e-5
SAMPLING = Sampling(temperature=0.8, suppressed=(0, 1, 2))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected_log_probs(logits: Tensor) -> Tensor:
    """The distribution of ``SAMPLING``, spelled out."""
    logits = logits.double() / 0.8
    logits[..., :3] = -math.inf
    return logits - logits.exp().sum(-1, keepdim=True).log()


class Checked:
    """A decoder beside the rows that it should hold; everything that it generates is checked by encoding them again."""

    def __init__(self, lm: LanguageModel, prompts: list[list[int]], plain: Any) -> None:
        self.lm, self.plain = lm, plain
        self.rows = [list(prompt) for prompt in prompts]
        self.decoder = Decoder(lm, batch_size=len(prompts), capture=lm.layers[-1])
        self.decoder.append(prompts)
        self.generator = seeded()

    def append(self, sequences: list[list[int]]) -> None:
        self.decoder.append(sequences)
        for row, sequence in zip(self.rows, sequences, strict=True):
            row += sequence

    def generate(self, num_tokens: int) -> Generated:
        generated = self.decoder.generate(num_tokens, sampling=SAMPLING, generator=self.generator)
        assert generated.tokens.shape == (len(self.rows), num_tokens)
        for index, row in enumerate(self.rows):
            start = len(row)
            row += generated.tokens[index].tolist()
            log_probs = expected_log_probs(self.plain.logits(self.lm, row)[start - 1 : -1])
            chosen = log_probs.gather(-1, generated.tokens[index][:, None])[:, 0]
            entropy = -(log_probs.exp() * log_probs.clamp_min(-1e9)).sum(-1)
            states = self.plain.output(self.lm, self.lm.layers[-1], row)[start:]
            close(generated.log_probs[index], chosen)
            close(generated.entropy[index], entropy)
            close(generated.captured[index], states)
        assert self.decoder.lengths.tolist() == [len(row) for row in self.rows]
        return generated


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", None])  # None: sdpa, where the family has it
def test_decoding_equals_encoding_everything_again(
    family: str, attention: str | None, make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    lm = make_lm(family, attention=attention)
    checked = Checked(lm, [[0, *random_tokens(length)] for length in (3, 9, 1)], plain)
    checked.generate(3)
    checked.append([random_tokens(4), [], random_tokens(7)])
    checked.generate(2)
    checked.append([[], [], []])
    checked.append([[], random_tokens(1), []])
    checked.append([random_tokens(2), random_tokens(5), []])
    checked.generate(3)


def test_rewinding_forgets(make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any) -> None:
    checked = Checked(make_lm(), [[0, *random_tokens(length)] for length in (3, 6)], plain)
    checked.generate(2)
    rows, mark = [list(row) for row in checked.rows], checked.decoder.mark()
    for seed in (1, 2, 1):
        checked.generator = seeded(seed)
        checked.append([random_tokens(5), []])
        checked.generate(4)
        checked.decoder.rewind(mark)
        checked.rows = [list(row) for row in rows]
    checked.append([[], random_tokens(3)])
    checked.generate(2)


@pytest.mark.parametrize("lengths", [(3, 6), (4, 4)], ids=["ragged", "even"])
def test_a_rewound_decoder_goes_on_from_the_mark(
    family: str, lengths: tuple[int, int], make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    """Nothing is read in between that would tell again which slots are holes, or what comes next."""
    checked = Checked(make_lm(family), [[0, *random_tokens(length)] for length in lengths], plain)
    rows, mark = [list(row) for row in checked.rows], checked.decoder.mark()
    checked.append([random_tokens(5), random_tokens(2)])
    checked.generate(2)
    checked.decoder.rewind(mark)
    checked.rows = rows
    checked.generate(3)


@pytest.mark.parametrize("lengths", [(3, 6), (4, 4)], ids=["ragged", "even"])
def test_a_prompt_is_read_once_for_its_group(
    family: str, lengths: tuple[int, int], make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    """Three rows of each prompt, side by side, which then go their own ways; before the first token, and after some."""
    checked = Checked(make_lm(family), [[0, *random_tokens(length)] for length in lengths], plain)
    for times in (3, 1, 2):
        checked.decoder.repeat(times)
        checked.rows = [list(row) for row in checked.rows for _ in range(times)]
        generated = checked.generate(3)
    assert len({tuple(row) for row in generated.tokens.tolist()}) > 2
    checked.append([random_tokens(index) for index in range(12)])
    checked.generate(2)


def test_a_row_does_not_depend_on_its_neighbours(
    family: str, make_lm: Callable[..., LanguageModel], random_tokens: Any
) -> None:
    """Greedy, so that the same draws need no shared generator."""
    lm, greedy = make_lm(family), Sampling(temperature=0.0)
    prompts = [[0, *random_tokens(length)] for length in (2, 7, 4, 11, 1)]
    values = [random_tokens(length) for length in (5, 0, 9, 1, 3)]

    def two_rounds(indices: list[int]) -> tuple[Tensor, Tensor]:
        decoder = Decoder(lm, batch_size=len(indices), capture=lm.layers[0])
        decoder.append([prompts[index] for index in indices])
        first = decoder.generate(3, sampling=greedy, generator=seeded())
        decoder.append([values[index] for index in indices])
        second = decoder.generate(4, sampling=greedy, generator=seeded())
        return torch.cat([first.tokens, second.tokens], 1), torch.cat([first.captured, second.captured], 1)

    tokens, states = two_rounds([0, 1, 2, 3, 4])
    for index in range(5):
        alone_tokens, alone_states = two_rounds([index])
        assert alone_tokens[0].tolist() == tokens[index].tolist()
        close(states[index], alone_states[0])


@pytest.mark.parametrize("prompt_length", [250, 700])
def test_the_buffers_grow(
    prompt_length: int, make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    lm = make_lm(max_position_embeddings=2_048, num_hidden_layers=1)
    checked = Checked(lm, [[0, *random_tokens(prompt_length)], [0]], plain)
    checked.generate(10)
    checked.append([random_tokens(1), random_tokens(600)])
    checked.generate(3)


def test_holes_do_not_use_up_the_context(
    family: str, make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    """Two rows that grow in turns hold twice as many slots as either has tokens: more than there are positions."""
    lm = make_lm(family)
    checked = Checked(lm, [[0], [0]], plain)
    for _ in range(3):
        checked.append([random_tokens(18), []])
        checked.append([[], random_tokens(18)])
    assert 2 * 3 * 18 > 96 >= lm.context_length
    checked.generate(3)


def test_nothing_is_encoded_twice(make_lm: Callable[..., LanguageModel], random_tokens: Any) -> None:
    lm, seen = make_lm(), []
    embedding = lm.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].numel()))
    decoder = Decoder(lm, batch_size=2)
    decoder.append([random_tokens(5)] * 2)
    decoder.generate(4, sampling=SAMPLING, generator=seeded())
    decoder.append([random_tokens(3)] * 2)
    decoder.generate(2, sampling=SAMPLING, generator=seeded())
    assert sum(seen) == 2 * (5 + 4 + 3 + 2)


def test_one_generator_gives_one_text(make_lm: Callable[..., LanguageModel]) -> None:
    def draws(seed: int) -> list[list[int]]:
        decoder = Decoder(make_lm(), batch_size=3)
        decoder.append([[0]] * 3)
        return decoder.generate(12, sampling=SAMPLING, generator=seeded(seed)).tokens.tolist()

    assert draws(1) == draws(1) != draws(2)
    assert len({tuple(row) for row in draws(1)}) == 3  # rows draw apart


def test_top_k_and_top_p_record_what_was_sampled(make_lm: Callable[..., LanguageModel], plain: Any) -> None:
    """The recorded probabilities are renormalised over at most three tokens, found here by sorting."""
    lm = make_lm()
    decoder = Decoder(lm, batch_size=4)
    decoder.append([[0, 7]] * 4)
    generated = decoder.generate(6, sampling=Sampling(top_k=3, top_p=0.9), generator=seeded())
    for index in range(4):
        row = [0, 7, *generated.tokens[index].tolist()]
        for at, token in enumerate(row[2:], start=2):
            probabilities = plain.logits(lm, row)[at - 1].double().softmax(-1)
            best = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:3]
            mass, kept = sum(probabilities[other] for other in best), []
            while not kept or sum(probabilities[other] for other in kept) < 0.9 * mass:
                kept.append(best[len(kept)])
            expected = probabilities[token] / sum(probabilities[other] for other in kept)
            assert token in kept
            assert float(generated.log_probs[index, at - 2]) == pytest.approx(math.log(expected), abs=TOLERANCE)


def test_bfloat16_records_float32_log_probabilities(make_lm: Callable[..., LanguageModel], plain: Any) -> None:
    lm = make_lm(dtype=torch.bfloat16)
    decoder = Decoder(lm, batch_size=2)
    decoder.append([[0, 5, 6], [0]])
    generated = decoder.generate(5, sampling=SAMPLING, generator=seeded())
    assert generated.log_probs.dtype == generated.entropy.dtype == torch.float32
    for index, prompt in enumerate(([0, 5, 6], [0])):
        row = [*prompt, *generated.tokens[index].tolist()]
        expected = expected_log_probs(plain.logits(lm, row)[len(prompt) - 1 : -1])
        chosen = expected.gather(-1, generated.tokens[index][:, None])[:, 0]
        # bfloat16 keeps 8 bits: logits of magnitude 4 are rounded to 1/64, in each of several additions.
        torch.testing.assert_close(generated.log_probs[index].double(), chosen, atol=0.15, rtol=0)


def test_no_gradient_is_recorded(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm()
    decoder = Decoder(lm, batch_size=1, capture=lm.layers[0])
    decoder.append([[0]])
    generated = decoder.generate(2, sampling=SAMPLING, generator=seeded())
    for values in (generated.log_probs, generated.entropy, generated.captured):
        assert not values.requires_grad


def test_a_full_context_is_refused_and_leaves_the_rows_as_they_were(
    make_lm: Callable[..., LanguageModel], plain: Any, random_tokens: Any
) -> None:
    lm = make_lm()
    checked = Checked(lm, [[0, *random_tokens(9)], [0, *random_tokens(79)]], plain)
    generator = seeded(3)
    before = generator.get_state()
    with pytest.raises(ModelError, match="97 tokens does not fit the context of 96 tokens of tiny llama"):
        checked.decoder.generate(17, sampling=SAMPLING, generator=generator)
    with pytest.raises(ModelError, match="100 tokens does not fit the context of 96"):
        checked.append([[], random_tokens(20)])
    assert torch.equal(generator.get_state(), before)
    checked.append([random_tokens(80), []])
    checked.generate(6)
    assert checked.decoder.lengths.tolist() == [96, 86]


def test_calls_that_make_no_sense_are_refused(make_lm: Callable[..., LanguageModel]) -> None:
    with pytest.raises(ShapeError, match="`times` must be at least 1, got 0"):
        Decoder(make_lm(), batch_size=1).repeat(0)
    decoder = Decoder(make_lm(), batch_size=2)
    with pytest.raises(ModelError, match="append a prompt"):
        decoder.generate(1, sampling=SAMPLING, generator=seeded())
    with pytest.raises(ModelError, match="starts empty"):
        decoder.append([[0, 4], []])
    with pytest.raises(ShapeError, match="each of 2 rows, got 3"):
        decoder.append([[0]] * 3)
    assert decoder.lengths.tolist() == [0, 0]
    decoder.append([[0], [0, 4]])
    with pytest.raises(ShapeError, match="at least 1, got 0"):
        decoder.generate(0, sampling=SAMPLING, generator=seeded())


def test_broken_weights_are_named(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm()
    decoder = Decoder(lm, batch_size=1)
    lm.model.get_output_embeddings().weight.data[:] = math.nan
    decoder.append([[0]])
    with pytest.raises(NumericError, match="NaN"):
        decoder.generate(1, sampling=SAMPLING, generator=seeded())


# ---- pretrained models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_real_models_decode_as_they_encode(name: str, real_lm: Any, plain: Any) -> None:
    lm = real_lm(name)
    prompts = [[1, *lm.encode(text)] for text in ("Once upon a time", "The dog ran", "A")]
    checked = Checked(lm, prompts, plain)
    checked.generate(6)
    checked.append([lm.encode(" He was very happy."), [], lm.encode(" Then they all went home to eat.")])
    checked.generate(6)


def test_greedy_text_of_a_real_model_is_the_known_one(real_lm: Any, test_data: Path) -> None:
    document = (test_data / "lm" / "stories260k" / "expected_greedy.md").read_text(encoding="utf-8")
    (known,) = re.findall(r"-t 0\.0\n(.*?)\n```", document, flags=re.DOTALL)
    assert known.startswith("Once upon a time, there was a little girl named Lily.")
    lm = real_lm("stories260k")
    decoder = Decoder(lm, batch_size=1)
    decoder.append([[lm.begin_token]])
    tokens = decoder.generate(260, sampling=Sampling(temperature=0.0), generator=seeded()).tokens[0].tolist()
    assert lm.decode(tokens)[: len(known)] == known


@pytest.mark.gpu
def test_a_gpu_draws_and_records_what_the_cpu_does(family: str, make_lm: Callable[..., LanguageModel]) -> None:
    def run(device: str) -> Generated:
        lm = make_lm(family)
        lm.model.to(device)
        decoder = Decoder(lm, batch_size=3)
        decoder.append([[0, 5, 9], [0], [0, 8]])
        return decoder.generate(12, sampling=SAMPLING, generator=seeded())

    cpu, gpu = run("cpu"), run("cuda")
    assert gpu.tokens.tolist() == cpu.tokens.tolist()
    torch.testing.assert_close(gpu.log_probs.cpu(), cpu.log_probs, atol=1e-4, rtol=1e-4)  # other kernels
