"""What a wrapped model gives, what it refuses to wrap, and what stays as it was while it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from preceptor.errors import ModelError
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.vocabulary import context_length

MakeLM = Callable[..., LanguageModel]
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE_WEIGHTS = {"initializer_range": 0.2}
TINY_LLAMA = TINY | LARGE_WEIGHTS | {"num_key_value_heads": 4, "intermediate_size": 48, "pad_token_id": 2}


def logits_of(lm: LanguageModel, tokens: Tensor) -> Tensor:
    return lm.forward(tokens, keep=torch.ones_like(tokens, dtype=torch.bool)).logits


TOKENS = torch.tensor([[0, 5, 17, 40, 8], [0, 9, 9, 210, 33]])


# ---- the forward pass -----------------------------------------------------------------------------------------------


def test_logits_and_states_are_those_of_the_model(family: str, make_lm: MakeLM, plain: Any) -> None:
    lm = make_lm(family)
    keep = torch.tensor([[True, False, False, True, True], [False, False, True, False, False]])
    output = lm.forward(TOKENS, keep=keep, capture=lm.layers[0])
    expected = torch.cat([plain.logits(lm, row.tolist())[kept] for row, kept in zip(TOKENS, keep, strict=True)])
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    states = torch.stack([plain.output(lm, lm.layers[0], row.tolist()) for row in TOKENS])
    torch.testing.assert_close(output.captured, states, atol=1e-5, rtol=1e-5)
    assert lm.forward(TOKENS, keep=torch.zeros_like(keep)).logits.shape == (0, 300)


def test_logits_are_computed_where_they_are_kept_alone(family: str, make_lm: MakeLM) -> None:
    """But for Gemma 2, which caps its logits after the head."""
    lm, rows = make_lm(family), []
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.numel() // 300))
    keep = torch.zeros(2, 5, dtype=torch.bool)
    keep[1, 3] = True
    lm.forward(TOKENS, keep=keep)
    assert rows == ([10] if family == "gemma2" else [1])


def test_layers_are_the_decoders(family: str, make_lm: MakeLM) -> None:
    lm = make_lm(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    assert len(lm.layers) == 3
    assert len({type(layer) for layer in lm.layers}) == 1


def test_experts_are_not_taken_for_layers(make_lm: MakeLM) -> None:
    lm = make_lm()
    lm.model.model.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    assert lm.layers is lm.model.model.layers


def test_dropout_is_off(make_lm: MakeLM) -> None:
    lm = make_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    assert torch.equal(logits_of(lm, TOKENS), logits_of(lm, TOKENS))


def test_bfloat16_gives_float32_logits(make_lm: MakeLM) -> None:
    lm = make_lm(dtype=torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    assert logits_of(lm, TOKENS).dtype == torch.float32


# ---- what fits ------------------------------------------------------------------------------------------------------


def wrapped(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer, name="it")


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, **LARGE_WEIGHTS, max_position_embeddings=64),
        FalconConfig(**TINY, **LARGE_WEIGHTS, alibi=True),
        BertConfig(**TINY, **LARGE_WEIGHTS, intermediate_size=48, is_decoder=False),
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, max_position_embeddings=64),
    ],
    ids=["bloom: ALiBi", "falcon: ALiBi", "bert: bidirectional", "mamba: recurrent"],
)
def test_models_that_do_not_attend_as_told_are_refused(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ModelError, match="it does not attend as it is told to"):
        wrapped(config, tokenizer)


def test_scaled_logits_are_exact(tokenizer: PreTrainedTokenizerBase, plain: Any) -> None:
    lm = wrapped(CohereConfig(**TINY_LLAMA, logit_scale=0.0625, bos_token_id=0), tokenizer)
    torch.testing.assert_close(logits_of(lm, TOKENS[:1]), plain.logits(lm, TOKENS[0].tolist()))


LONG = {"max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 128}
GPT_NEO = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**TINY_LLAMA | LONG), 512),
        (LlamaConfig(**TINY_LLAMA | LONG, rope_parameters=YARN), 512),
        (Phi3Config(**TINY_LLAMA | LONG, original_max_position_embeddings=128, rope_parameters=LONGROPE), 128),
        (Qwen2Config(**TINY_LLAMA | LONG, sliding_window=16, use_sliding_window=False), 512),
        (Qwen2Config(**TINY_LLAMA | LONG, sliding_window=16, use_sliding_window=True, max_window_layers=1), 16),
        (Gemma3TextConfig(**TINY_LLAMA | LONG, sliding_window=32, head_dim=8), 32),
        (GPTNeoConfig(**GPT_NEO | LONG, window_size=24, attention_types=[[["global", "local"], 1]]), 24),
        (GPTNeoConfig(**GPT_NEO | LONG, window_size=24, attention_types=[[["global"], 2]]), 512),
    ],
    ids=["llama", "llama yarn", "phi3 longrope", "qwen2 full", "qwen2 window", "gemma3 window", "neo window", "neo"],
)
def test_the_context_ends_where_attention_changes(
    config: PreTrainedConfig, expected: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert wrapped(config, tokenizer).context_length == expected


def test_the_window_of_mistral_and_gemma2_ends_the_context(make_lm: MakeLM) -> None:
    assert make_lm("mistral").context_length == make_lm("gemma2").context_length == 64
    assert make_lm("mistral", sliding_window=None).context_length == make_lm("gpt2").context_length == 96


def test_a_context_that_nobody_states_is_refused() -> None:
    with pytest.raises(ModelError, match="configuration of it states no context length"):
        context_length(PreTrainedConfig(), "it")


# ---- text -----------------------------------------------------------------------------------------------------------


def spelled(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every control token of ``tokenizer`` and how it is spelled."""
    return {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}


def contexts() -> Iterator[str]:
    for before in ("", " ", "x", "sea ", "\n", "<", "é", "1", "<|", "\u2581"):
        for after in ("", " ", "y", " sea", "\n", ">", "漢", "2", "|>", "\u2581"):
            yield f"{before}{{}}{after}"
    yield from ("{0}{0}", "a {0} b {0} c", "{0} {0}{0}")


def assert_text_stays_text(lm: LanguageModel) -> int:
    tried = 0
    control = spelled(lm.tokenizer)
    for content in control.values():
        for context in contexts():
            text = context.format(content)
            tokens = lm.encode(text)
            assert not set(tokens) & set(lm.special_tokens), f"{text!r} holds a control token"
            if "\u2581" not in text:  # how some tokenizers spell a space
                assert lm.decode(tokens).strip() == text.strip()
            tried += 1
    assert control
    return tried


@pytest.fixture
def with_tokenizer(make_lm: MakeLM) -> Callable[[PreTrainedTokenizerBase], LanguageModel]:
    def wrap(tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
        model = make_lm(vocab_size=max(len(tokenizer), 300), num_hidden_layers=1).model
        return LanguageModel(model, tokenizer, name="tiny")

    return wrap


def test_text_never_becomes_a_control_token(make_lm: MakeLM) -> None:
    lm = make_lm()
    assert lm.special_tokens == (0, 1, 2)
    assert lm.tokenizer("<|end|>", add_special_tokens=False)["input_ids"] == [1]  # without our care it would
    assert assert_text_stays_text(lm) == 3 * 103


def test_text_never_becomes_a_chat_marker(tokenizer: PreTrainedTokenizerBase, with_tokenizer: Any) -> None:
    """Markers that are special but have no role of their own, as Llama 3's."""
    marked = deepcopy(tokenizer)
    marked.add_tokens([AddedToken(f"<|{name}_id|>", special=True) for name in ("start_header", "end_header", "eot")])
    lm = with_tokenizer(marked)
    assert lm.special_tokens == (0, 1, 2, *range(len(tokenizer), len(tokenizer) + 3))
    assert assert_text_stays_text(lm) == 6 * 103


@pytest.mark.parametrize("name", ["lm/stories260k", "lm/stories3m", "tokenizers/gpt2"])
def test_text_never_becomes_a_control_token_of_a_real_tokenizer(
    name: str, test_data: Path, with_tokenizer: Any
) -> None:
    lm = with_tokenizer(AutoTokenizer.from_pretrained(test_data / name, local_files_only=True))
    assert assert_text_stays_text(lm) == (1 if "gpt2" in name else 3) * 103


@pytest.fixture
def unigram() -> PreTrainedTokenizerFast:
    """A unigram vocabulary has control tokens among its pieces; ``split_special_tokens`` alone does not help."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("\u2581", -2.0)]
    pieces += [(character, -5.0) for character in "abc</s>xy12\n|éun"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_text_never_becomes_a_control_token_of_a_unigram_vocabulary(
    unigram: PreTrainedTokenizerFast, with_tokenizer: Any
) -> None:
    lm = with_tokenizer(unigram)
    assert 1 in unigram("a</s>b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text in ("a</s>b", "</s>", "<s></s> a <s>", "x" * 40 + "</s>" * 3):
        tokens = lm.encode(text)
        assert not {1, 2} & set(tokens)
        assert lm.decode(tokens).replace(" ", "") == text.replace(" ", "")
    assert lm.encode("a漢b").count(0) == 1  # what is unknown is text


def test_a_unigram_control_token_is_spelled_out_and_the_rest_stays(
    unigram: PreTrainedTokenizerFast, with_tokenizer: Any
) -> None:
    lm = with_tokenizer(unigram)
    for before, after in (("xy 12", "abc"), ("a" * 30, "cab " * 9)):
        cut = unigram(before + "</s>" + after, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        at = cut.index(1)
        spelled_out = [unigram.convert_tokens_to_ids(character) for character in "</s>"]
        assert lm.encode(before + "</s>" + after) == [*cut[:at], *spelled_out, *cut[at + 1 :]]


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "unk_token"])
@pytest.mark.parametrize(
    ("name", "spelling"), [("lm/stories3m", "!"), ("tokenizers/gpt2", "."), ("tokenizers/gpt2", "the")]
)
def test_a_named_token_that_is_ordinary_text_stays_text(
    name: str, spelling: str, role: str, test_data: Path, tmp_path: Path, with_tokenizer: Any
) -> None:
    """Whatever a tokenizer names as pad or end is listed as added and special when it is loaded again."""
    own = AutoTokenizer.from_pretrained(test_data / name, local_files_only=True)
    named = AutoTokenizer.from_pretrained(test_data / name, local_files_only=True)
    setattr(named, role, spelling)
    named.save_pretrained(tmp_path)
    lm = with_tokenizer(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True))
    token = int(lm.tokenizer.convert_tokens_to_ids(spelling))
    assert token == getattr(lm.tokenizer, f"{role}_id")
    assert token not in lm.special_tokens
    text = f"The ship sailed{spelling} It saw the sea! Nobody knew{spelling}\nthe end.{spelling}"
    assert lm.encode(text) == own(text, add_special_tokens=False)["input_ids"]
    assert token in lm.encode(text)


def test_ids_without_a_token_are_known_and_never_drawn(make_lm: MakeLM, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LanguageModel(make_lm(vocab_size=450).model, tokenizer, name="tiny")
    assert lm.nameless_tokens == tuple(range(len(tokenizer), 450))
    assert lm.never_drawn == (0, 1, 2, *range(len(tokenizer), 450))
    decoder = Decoder(lm, batch_size=8)
    decoder.append([[0]] * 8)
    sampling = Sampling(suppressed=lm.never_drawn)
    drawn = decoder.generate(40, sampling=sampling, generator=torch.Generator().manual_seed(0)).tokens
    assert 3 <= int(drawn.min()) <= int(drawn.max()) < len(tokenizer)


def test_a_token_chosen_greedily_is_certain(make_lm: MakeLM) -> None:
    lm = make_lm()
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    best = logits_of(lm, TOKENS).argmax(-1).flatten()
    greedy = Sampling(temperature=0)
    assert lm.chosen_log_probs(TOKENS, keep=keep, chosen=best, sampling=greedy).tolist() == [0.0] * len(best)


@pytest.mark.parametrize("name", ["lm/stories260k", "lm/stories3m", "tokenizers/gpt2"])
def test_text_round_trips(name: str, test_data: Path, with_tokenizer: Any) -> None:
    lm = with_tokenizer(AutoTokenizer.from_pretrained(test_data / name, local_files_only=True))
    seen = 0
    for article in sorted((test_data / "wiki" / "articles").glob("*.txt"))[:20]:
        text = article.read_text(encoding="utf-8")[:2_000].strip()
        assert lm.decode(lm.encode(text)) == text
        seen += 1
    assert seen == 20


def test_a_continuation_gets_one_space(test_data: Path, with_tokenizer: Any) -> None:
    """Tokenizers like Llama 2's put a space before every text of their own accord."""
    for name in ("lm/stories260k", "tokenizers/gpt2"):
        lm = with_tokenizer(AutoTokenizer.from_pretrained(test_data / name, local_files_only=True))
        assert lm.decode([*lm.encode("One."), *lm.encode(" Two  words."), *lm.encode(" 3")]) == "One. Two  words. 3"


def test_a_long_text_is_encoded_without_advice(
    make_lm: MakeLM, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = LanguageModel(make_lm().model, deepcopy(tokenizer), name="tiny")
    capfd.readouterr()
    assert len(lm.encode("sea " * 500)) > 96
    assert capfd.readouterr().err == ""


def test_a_tokenizer_of_another_model_is_refused(make_lm: MakeLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"has 300 entries and the model 280; use the tokenizer"):
        LanguageModel(make_lm(vocab_size=280).model, tokenizer, name="tiny")


def test_control_tokens_beyond_the_model_are_left_out(make_lm: MakeLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 3's text models have a tokenizer with one image token more than the model has entries."""
    larger = deepcopy(tokenizer)
    larger.add_tokens([AddedToken("<|image|>", special=True)])
    lm = LanguageModel(make_lm(vocab_size=len(tokenizer)).model, larger, name="tiny")
    assert lm.special_tokens == (0, 1, 2)
    assert max(lm.encode("a <|image|> b")) < lm.vocab_size


def test_a_tokenizer_without_a_begin_token_uses_the_end_token(make_lm: MakeLM, tokenizer: Any) -> None:
    bare = deepcopy(tokenizer)
    bare.bos_token = None
    assert LanguageModel(make_lm().model, bare, name="tiny").begin_token == 1
    bare.eos_token = None
    with pytest.raises(ModelError, match="no begin or end token"):
        LanguageModel(make_lm().model, bare, name="tiny")


# ---- learning and staying -------------------------------------------------------------------------------------------


def learn(lm: LanguageModel) -> None:
    """One step of an optimiser that moves every trainable parameter."""
    parameters = lm.trainable_parameters()
    optimiser = torch.optim.SGD(parameters.values(), lr=0.5)
    logits_of(lm, TOKENS).log_softmax(-1)[:, 7].sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def test_the_untrained_model_stays_while_the_model_learns(family: str, make_lm: MakeLM) -> None:
    lm = make_lm(family)
    before = logits_of(lm, TOKENS).detach()
    untrained, frozen = lm.initial_model(), lm.frozen_copy()
    live = {parameter.data_ptr() for parameter in lm.model.parameters()}
    for copy in (untrained, frozen):
        assert live.isdisjoint(parameter.data_ptr() for parameter in copy.model.parameters())
        assert not copy.trainable_parameters()
    assert len(lm.trainable_parameters()) == len(list(lm.model.parameters()))
    learn(lm)
    assert not torch.allclose(logits_of(lm, TOKENS), before)
    for copy in (untrained, frozen):
        assert torch.equal(logits_of(copy, TOKENS), before)
        assert not logits_of(copy, TOKENS).requires_grad


def test_a_frozen_copy_can_be_refreshed(make_lm: MakeLM) -> None:
    lm = make_lm()
    snapshot = lm.frozen_copy()
    learn(lm)
    snapshot.model.load_state_dict(lm.model.state_dict())
    after = logits_of(lm, TOKENS).detach()
    assert torch.equal(logits_of(snapshot, TOKENS), after)
    learn(lm)
    assert torch.equal(logits_of(snapshot, TOKENS), after)


def test_gradient_reaches_what_is_trainable(family: str, make_lm: MakeLM) -> None:
    lm = make_lm(family)
    logits_of(lm, TOKENS).log_softmax(-1)[:, 7].sum().backward()
    missing = [name for name, parameter in lm.trainable_parameters().items() if not parameter.grad.abs().sum() > 0]
    # A key's bias adds the same to every score of a query, which softmax takes away: its gradient is rounding at most.
    assert [name for name in missing if "k_proj.bias" not in name] == []


def test_with_lora_the_untrained_model_is_a_view(family: str, make_lora: MakeLM, make_lm: MakeLM) -> None:
    lm = make_lora(family)
    base = logits_of(make_lm(family), TOKENS).detach()
    untrained = lm.initial_model()
    assert untrained.model is lm.model  # no copy
    assert untrained.name == f"tiny {family} + LoRA (untrained)"
    assert torch.equal(logits_of(lm, TOKENS), logits_of(untrained, TOKENS))
    for _ in range(2):
        learn(lm)
    assert torch.equal(logits_of(untrained, TOKENS), base)
    assert not torch.allclose(logits_of(lm, TOKENS), base, atol=1e-3)
    assert not untrained.trainable_parameters()


def test_lora_trains_the_adapter_of_every_linear_layer_and_nothing_else(family: str, make_lora: MakeLM) -> None:
    lm = make_lora(family)
    names = set(lm.trainable_parameters())
    # GPT-2 has four linear maps a layer (fused projections), the others seven; each gets two matrices; two layers.
    assert len(names) == 2 * 2 * (4 if family == "gpt2" else 7)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    before = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    for _ in range(2):  # in the first step the second matrix is zero and lets no gradient through to the first
        learn(lm)
    moved = {name for name, parameter in lm.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == names


def test_with_lora_gradient_survives_a_look_at_the_untrained_model(make_lora: MakeLM) -> None:
    """Switching the adapter off between forward and backward does not cut the graph."""
    lm = make_lora()
    untrained = lm.initial_model()
    loss = logits_of(lm, TOKENS).log_softmax(-1)[:, 7].sum()
    with torch.no_grad():
        logits_of(untrained, TOKENS)
    loss.backward()
    assert all(parameter.grad is not None for parameter in lm.trainable_parameters().values())


def test_with_lora_a_frozen_copy_copies_the_adapter_alone(make_lora: MakeLM) -> None:
    lm = make_lora()
    learn(lm)
    after = logits_of(lm, TOKENS).detach()
    frozen = lm.frozen_copy()
    shared = {parameter.data_ptr() for parameter in lm.model.parameters()}
    own = {name for name, parameter in frozen.model.named_parameters() if parameter.data_ptr() not in shared}
    assert own == set(lm.trainable_parameters())
    assert not frozen.trainable_parameters()
    learn(lm)
    assert torch.equal(logits_of(frozen, TOKENS), after)
    assert not logits_of(frozen, TOKENS).requires_grad
    assert lm.trainable_parameters()  # the live adapter still learns
    frozen.model.load_state_dict(lm.model.state_dict())
    assert torch.equal(logits_of(frozen, TOKENS), logits_of(lm, TOKENS))


def test_lora_under_bfloat16(make_lora: MakeLM) -> None:
    lm = make_lora(dtype=torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    before = logits_of(lm.initial_model(), TOKENS)
    learn(lm)
    assert torch.equal(logits_of(lm.initial_model(), TOKENS), before)
