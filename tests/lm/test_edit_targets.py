from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from preceptor.errors import ConfigError, ModelError
from preceptor.lm.edit_targets import ROLES, Target, attention_targets, layer_targets, named_targets

SIZES = {"vocab_size": 17, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4}
GPT = {"n_layer": 2, "n_embd": 16, "n_head": 4}
FALCON = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
# Name: configuration, number of key-value heads.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({"model_type": "gpt2", **GPT}, 4),
    "llama": ({"model_type": "llama", **LLAMA, "num_key_value_heads": 2}, 2),
    "qwen3, wide heads": ({"model_type": "qwen3", **LLAMA, "num_key_value_heads": 2, "head_dim": 8}, 2),
    "phi": ({"model_type": "phi", **LLAMA}, 4),
    "phi3, fused and grouped": ({"model_type": "phi3", **LLAMA, "num_key_value_heads": 2}, 2),
    "gpt_neox": ({"model_type": "gpt_neox", **LLAMA}, 4),
    "gpt_neo": (
        {
            "model_type": "gpt_neo",
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 4,
            "attention_types": [[["global"], 2]],
        },
        4,
    ),
    "gptj": ({"model_type": "gptj", **GPT, "rotary_dim": 4}, 4),
    "gpt_bigcode, one key": ({"model_type": "gpt_bigcode", **GPT, "multi_query": True}, 1),
    "gpt_bigcode": ({"model_type": "gpt_bigcode", **GPT, "multi_query": False}, 4),
    "opt": ({"model_type": "opt", **LLAMA, "ffn_dim": 8, "word_embed_proj_dim": 16}, 4),
    "bloom": ({"model_type": "bloom", "n_layer": 2, "hidden_size": 16, "n_head": 4}, 4),
    "falcon": ({"model_type": "falcon", **FALCON, "multi_query": False}, 4),
    "falcon, one key": ({"model_type": "falcon", **FALCON, "multi_query": True}, 1),
    "falcon, grouped": ({"model_type": "falcon", **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "mpt": ({"model_type": "mpt", "n_layers": 2, "d_model": 16, "n_heads": 4, "expansion_ratio": 1}, 4),
    "persimmon": ({"model_type": "persimmon", **LLAMA}, 4),
    "bert": ({"model_type": "bert", **LLAMA}, 4),
    "roberta": ({"model_type": "roberta", **LLAMA}, 4),
    "distilbert": ({"model_type": "distilbert", "n_layers": 2, "dim": 16, "n_heads": 4, "hidden_dim": 8}, 4),
}


def build(name: str) -> nn.Module:
    configuration = {**SIZES, "max_position_embeddings": 32, **MODELS[name][0]}
    config = AutoConfig.for_model(configuration.pop("model_type"), **configuration)
    torch.manual_seed(0)
    bidirectional = config.model_type in ("bert", "roberta", "distilbert")
    model = (AutoModelForMaskedLM if bidirectional else AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()  # so that a head with weights of zero gives zero
            elif parameter.ndim == 2:
                parameter.normal_(std=0.3)  # the usual 0.02 leaves attention nearly uniform
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.arange(1, 10)[None]
    output: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return output


@torch.no_grad()
def fill(target: Target, head: int, value: float | None) -> None:
    """Head ``head`` of the target becomes ``value``, or noise."""
    view = target.view
    rows = view[head // view.shape[1], head % view.shape[1]]
    rows.copy_(torch.randn(rows.shape) if value is None else torch.full(rows.shape, value))


@pytest.mark.parametrize("name", MODELS)
def test_roles_and_heads_are_what_they_do(name: str) -> None:
    """Zero queries make the keys irrelevant, and zero values the output projection, for this head and no other.

    The model itself is asked, so a wrong row, head, role or layout shows; keys and queries of equal number could change
    places here, which the next test excludes.
    """
    num_key_value_heads = MODELS[name][1]
    group_size = 4 // num_key_value_heads
    found = attention_targets(build(name))
    assert [target.role for target in found] == [*ROLES, *ROLES]
    assert [target.num_heads for target in found[:4]] == [4, num_key_value_heads, num_key_value_heads, 4]
    for shared in range(num_key_value_heads):
        own_queries = range(shared * group_size, (shared + 1) * group_size)
        for zeroed, changed, num_changed in (("query", "key", num_key_value_heads), ("value", "output", 4)):
            model = build(name)
            target = dict(zip(ROLES, attention_targets(model, layers=[0]), strict=True))
            for head in own_queries if zeroed == "query" else [shared]:
                fill(target[zeroed], head, 0.0)  # type: ignore[index]
            silent = {shared} if changed == "key" else set(own_queries)
            for head in range(num_changed):
                before = logits(model)
                fill(target[changed], head, None)  # type: ignore[index]
                assert torch.equal(logits(model), before) == (head in silent), (zeroed, shared, changed, head)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3, fused and grouped", "gpt_neox", "opt", "bert", "gpt_bigcode"])
def test_queries_are_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen where Transformers hands them to attention: a zero head of the query matrix gives a zero query, no more."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append((query, key, value))
        return real(module, query, key, value, *rest, **more)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    for number, role in enumerate(ROLES[:3]):
        model = build(name)
        fill(attention_targets(model, roles=[role], layers=[0])[0], 1, 0.0)
        seen.clear()
        logits(model)
        for other, states in enumerate(seen[0]):
            is_zero = (states == 0).all(dim=(0, 2, 3)).tolist()
            assert is_zero == [other == number and head == 1 for head in range(states.shape[1])]


def test_the_view_is_the_live_weight_and_the_matrix_a_copy() -> None:
    model = build("gpt2")
    query, _, _, output = attention_targets(model, layers=[1])
    weight: Tensor = model.transformer.h[1].attn.c_attn.weight  # type: ignore[union-attr, index]
    assert query.name == "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(query.matrix(), weight.detach()[:, :16].T)  # Conv1D: [in, out]
    assert query.view.shape == (1, 4, 4, 16)
    query.matrix().zero_()
    assert weight.detach().any(dim=0).all()
    query.write(torch.ones(16, 16))
    assert (weight[:, :16] == 1).all()
    assert not (weight[:, 16:] == 1).any()
    assert torch.equal(output.matrix(), model.transformer.h[1].attn.c_proj.weight.detach())  # type: ignore[union-attr, index]


def test_layers_and_roles_are_chosen() -> None:
    model = build("llama")
    found = attention_targets(model, roles=["output", "query"], layers=[1])
    assert [target.name for target in found] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]
    with pytest.raises(ConfigError, match=r"got 'keys' \(did you mean 'key'\?\)"):
        attention_targets(model, roles=["keys"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\], got 2"):
        attention_targets(model, layers=[2])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_looked_through() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    plain = attention_targets(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    found = attention_targets(wrapped)
    assert [target.parameter for target in found] == [target.parameter for target in plain]
    names = dict(wrapped.named_parameters())
    assert all(names[target.name] is target.parameter for target in found)


def test_shared_layers_are_targets_once() -> None:
    model = build("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    assert len(attention_targets(model)) == 4
    model = build("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr, index]
    assert len(attention_targets(model)) == 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("codegen", **SIZES, n_layer=1, n_embd=16, n_head=4, rotary_dim=4)
        ),
    ],
)
def test_an_unknown_layout_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError, match="has no attention of a known layout; choose targets by name instead"):
        attention_targets(make())


@pytest.mark.parametrize(
    ("name", "of_layer"), [("llama", ["gate_proj", "up_proj", "down_proj"]), ("gpt2", ["c_fc", "c_proj"])]
)
def test_all_matrices_of_the_layers(name: str, of_layer: list[str]) -> None:
    model = build(name)
    found = layer_targets(model)
    attention = attention_targets(model)
    assert [target.name for target in found[: len(attention)]] == [target.name for target in attention]
    mlps = found[len(attention) :]
    assert [target.name.split(".")[-2] for target in mlps] == of_layer * 2
    assert {(target.role, target.num_heads) for target in mlps} == {(None, 1)}
    # Every matrix but the embeddings and the head of the vocabulary, and each number of it once.
    matrices = {
        parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and _is_of_a_layer(name)
    }
    assert {target.parameter for target in found} == matrices
    assert sum(target.view.numel() for target in found) == sum(parameter.numel() for parameter in matrices)
    # Rows are what a layer puts out, however its weight lies.
    for target in mlps:
        layer = model.get_submodule(target.name.removesuffix(".weight"))
        x = torch.randn(2, target.matrix().shape[1], generator=torch.Generator().manual_seed(0))
        bias = layer.bias if getattr(layer, "bias", None) is not None else 0.0
        torch.testing.assert_close(x @ target.matrix().T + bias, layer(x), rtol=1e-4, atol=1e-5)


def _is_of_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def test_targets_by_name() -> None:
    model = build("llama")
    found = named_targets(model, ["*.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
    assert [target.name for target in found] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert [(target.role, target.num_heads) for target in found] == [(None, 1)] * 3
    assert torch.equal(found[1].matrix(), model.model.layers[0].mlp.up_proj.weight.detach())  # type: ignore[union-attr, index]
    with pytest.raises(ConfigError) as caught:
        named_targets(model, ["model.layers.0.self_attn.q_proj.wight", "*.bias"])
    assert caught.value.faults[0].endswith("(did you mean 'model.layers.0.self_attn.q_proj.weight'?)")
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match="at least one name"):
        named_targets(model, [])
