"""Vectors of queries and keys, against plain forward passes and attention weights computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Phi3Config, PreTrainedTokenizerBase

from preceptor.errors import ConfigError, ModelError, ShapeError
from preceptor.lm.embedding import MODEL_EMBEDDINGS, AttentionProjections, HiddenStates, key_vectors
from preceptor.lm.model import LanguageModel

MakeLM = Callable[..., LanguageModel]
ROW = [0, 5, 17, 40, 8]
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "eos_token_id": 1,
}


def captured(lm: LanguageModel, module: torch.nn.Module) -> Tensor:
    tokens = torch.tensor([ROW])
    return lm.forward(tokens, keep=torch.zeros_like(tokens, dtype=torch.bool), capture=module).captured


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_hidden_states(family: str, layer: int, make_lm: MakeLM) -> None:
    """Transformers' own ``hidden_states``; its last entry is after the final norm, which is applied to ours here."""
    lm = make_lm(family)
    embedding = HiddenStates(lm, layer=layer)
    assert embedding.query_module is embedding.key_module is lm.layers[layer]
    states = captured(lm, embedding.query_module)
    every = lm.model(input_ids=torch.tensor([ROW]), output_hidden_states=True, use_cache=False).hidden_states
    if layer % 2 == 0:
        expected = every[1]
    else:
        norm = lm.model.transformer.ln_f if family == "gpt2" else lm.model.model.norm
        states, expected = norm(states), every[2]
    torch.testing.assert_close(embedding.queries(states), expected)
    torch.testing.assert_close(embedding.keys(states), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_projections_give_the_attention_before_positions(layer: int, make_lm: MakeLM) -> None:
    """GPT-2 has no rotary positions, so its attention weights are the softmax of these inner products, by head."""
    lm = make_lm("gpt2", attention="eager")
    weights = lm.model(input_ids=torch.tensor([ROW]), output_attentions=True, use_cache=False).attentions[layer][0]
    embedding = AttentionProjections(lm, layer=layer)
    features = captured(lm, embedding.query_module)[0]
    queries, keys = embedding.queries(features).unflatten(-1, (4, 8)), embedding.keys(features).unflatten(-1, (4, 8))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for head in range(4):
        scores = 4 * queries[:, head] @ keys[:, head].T  # the mean over four heads is undone
        expected = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[head], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grouped", ["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_grouped_queries_meet_their_own_keys(grouped: str, make_lm: MakeLM) -> None:
    """The inner product is the mean over four query heads of q·k/√8, two of them to each key head."""
    lm = make_lm(grouped)
    embedding = AttentionProjections(lm, layer=1)
    q, k = (captured(lm, module)[0] for module in (embedding.query_module, embedding.key_module))
    assert q.shape == (5, 32)
    assert k.shape == (5, 16)
    heads = [q[:, 8 * h : 8 * h + 8] @ k[:, 8 * (h // 2) : 8 * (h // 2) + 8].T / 8**0.5 for h in range(4)]
    torch.testing.assert_close(embedding.queries(q) @ embedding.keys(k).T, sum(heads) / 4, atol=1e-5, rtol=1e-5)


def test_fused_projections_of_phi3(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_config(Phi3Config(**TINY, num_key_value_heads=2))
    lm = LanguageModel(model, tokenizer, name="phi")
    embedding = AttentionProjections(lm, layer=0)
    fused = captured(lm, embedding.query_module)[0]
    assert fused.shape == (5, 32 + 16 + 16)
    q, k = fused[:, :32], fused[:, 32:48]
    heads = [q[:, 8 * h : 8 * h + 8] @ k[:, 8 * (h // 2) : 8 * (h // 2) + 8].T / 8**0.5 for h in range(4)]
    torch.testing.assert_close(embedding.queries(fused) @ embedding.keys(fused).T, sum(heads) / 4)


@pytest.mark.parametrize("kind", sorted(MODEL_EMBEDDINGS))
def test_gradient_flows_into_the_model(family: str, kind: str, make_lm: MakeLM) -> None:
    lm = make_lm(family)
    embedding = MODEL_EMBEDDINGS[kind](lm, layer=1)
    embedding.queries(captured(lm, embedding.query_module)).square().sum().backward()
    first = next(parameter for name, parameter in lm.layers[0].named_parameters() if "mlp" in name)
    assert first.grad.abs().sum() > 0
    assert lm.model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", sorted(MODEL_EMBEDDINGS))
@pytest.mark.parametrize("max_tokens", [8_192, 16, 1])
def test_key_vectors_are_means_over_each_key_alone(
    family: str, kind: str, max_tokens: int, make_lm: MakeLM, plain: Any, random_tokens: Any
) -> None:
    lm = make_lm(family)
    embedding = MODEL_EMBEDDINGS[kind](lm, layer=-1)
    keys = [random_tokens(length) for length in (6, 1, 11, 3)]
    vectors = key_vectors(lm, embedding, keys, max_tokens=max_tokens)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    for key, vector in zip(keys, vectors, strict=True):
        expected = embedding.keys(plain.output(lm, embedding.key_module, [0, *key]))[1:].mean(0)
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_key_vectors_of_a_bfloat16_model_are_float32(make_lm: MakeLM) -> None:
    lm = make_lm(dtype=torch.bfloat16)
    for kind in MODEL_EMBEDDINGS.values():
        assert key_vectors(lm, kind(lm, layer=0), [[5, 6], [7]]).dtype == torch.float32


def test_versions_tell_embeddings_apart(make_lm: MakeLM) -> None:
    lm = make_lm()
    versions = {kind(lm, layer=layer).version for kind in MODEL_EMBEDDINGS.values() for layer in (0, 1)}
    assert len(versions) == 4


@pytest.mark.parametrize("kind", sorted(MODEL_EMBEDDINGS))
@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_refused(kind: str, layer: int, make_lm: MakeLM) -> None:
    with pytest.raises(ConfigError, match=rf"`layer` must lie in -2\.\.1 for tiny llama, got {layer}"):
        MODEL_EMBEDDINGS[kind](make_lm(), layer=layer)


def test_keys_that_cannot_be_embedded_are_refused(make_lm: MakeLM) -> None:
    lm = make_lm()
    embedding = HiddenStates(lm, layer=0)
    for keys in ([], [[5], []]):
        with pytest.raises(ShapeError, match="at least one token"):
            key_vectors(lm, embedding, keys)
    with pytest.raises(ModelError, match="a key of 97 tokens does not fit the context of 96"):
        key_vectors(lm, embedding, [[5] * 96])


def test_attention_of_another_build_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LanguageModel(AutoModelForCausalLM.from_config(GPTNeoXConfig(**TINY)), tokenizer, name="neox")
    with pytest.raises(ModelError, match=r"neox has no q_proj and k_proj.*use hidden_states"):
        AttentionProjections(lm, layer=0)
    assert HiddenStates(lm, layer=0)


def test_projections_include_the_adapter(make_lora: MakeLM) -> None:
    lm = make_lora()
    embedding = AttentionProjections(lm, layer=0)
    before = captured(lm, embedding.query_module).detach()
    for name, parameter in lm.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data += 0.5
    assert not torch.allclose(captured(lm, embedding.query_module), before)
    untrained = lm.initial_model()
    torch.testing.assert_close(captured(untrained, AttentionProjections(untrained, layer=0).query_module), before)
