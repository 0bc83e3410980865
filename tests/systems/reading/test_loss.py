"""Where gradient goes and where it does not, and that it is the gradient of the loss that the documentation states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading import loss
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.loss import Coefficients, UpdateMetrics, accumulate_gradient, score_actions
from preceptor.systems.reading.policy import Keys, Policy, identity_projection
from tests.systems.reading.planted import learn, planted_config, planted_cost, planted_run, planted_setup
from tests.systems.reading.small import HashedBytes, language_model, perturb, policies, rollout

NOTHING = Coefficients(query=0, selection=0, value_kl=0, query_kl=0, query_entropy=0, selection_entropy=0)
ALL = Coefficients(query=1.0, selection=0.7, value_kl=0.3, query_kl=0.4, query_entropy=0.05, selection_entropy=0.06)


def only(**coefficients: float) -> Coefficients:
    return dataclasses.replace(NOTHING, **coefficients)


def advantages_of(trajectories: Trajectories) -> Tensor:
    """Different numbers of either sign for every step."""
    batch, steps = trajectories.order.shape
    return torch.linspace(-1.3, 1.7, batch * steps).reshape(batch, steps).cos()


def gradients(
    policy: Policy,
    trajectories: Trajectories,
    keys: Keys,
    *,
    coefficients: Coefficients,
    reference_model: LanguageModel | None = None,
    kept_mask: Tensor | None = None,
    micro_batch_size: int = 99,
) -> tuple[dict[str, Tensor], UpdateMetrics]:
    """The gradient of every trainable parameter (zeros where none came), starting from none."""
    parameters = policy.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    measured = accumulate_gradient(
        policy,
        trajectories,
        keys,
        advantages=advantages_of(trajectories).to(keys.vectors.dtype),
        kept_mask=torch.ones(len(trajectories), dtype=torch.bool) if kept_mask is None else kept_mask,
        reference_model=reference_model,
        coefficients=coefficients,
        micro_batch_size=micro_batch_size,
    )
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}, measured


def reached(found: dict[str, Tensor]) -> set[str]:
    return {name for name, gradient in found.items() if bool(gradient.ne(0).any())}


# ---- which parameters move -------------------------------------------------------------------------------------------


def test_training_moves_the_policy_and_the_projection_and_nothing_else(tmp_path: Path) -> None:
    config = planted_config("update.steps=2", "update.query_kl_coefficient=0.01")
    with planted_run(tmp_path / "run", config) as run:
        setup = planted_setup(config, run)
        moving = {name: p.detach().clone() for name, p in setup.policy.parameters().items()}
        still = {name: p.detach().clone() for name, p in setup.initial_policy.lm.model.named_parameters()}
        keys, table = setup.keys["planted"], planted_cost(config.seed)
        vectors, centre = keys.vectors.clone(), keys.centre.clone()
        learn(setup)
    assert {name for name, p in setup.policy.parameters().items() if not torch.equal(p, moving[name])} == set(moving)
    assert len(moving) == 2 * 9 + 1 + 1 + 1  # nine weights a layer, tied embedding, final norm, projection
    for name, parameter in setup.initial_policy.lm.model.named_parameters():
        assert torch.equal(parameter, still[name]), name
        assert parameter.grad is None
    assert torch.equal(keys.vectors, vectors)
    assert torch.equal(keys.centre, centre)
    assert torch.equal(setup.reader.cost, table)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks Transformers for it
def test_with_an_adapter_only_the_adapter_and_the_projection_get_gradient(tmp_path: Path) -> None:
    plain = language_model()
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), device=torch.device("cpu"), adapter=Adapter(rank=2))
    policy, untrained, article, keys = policies(lm)
    perturb(policy, scale=0.05)  # B starts at zero, where A has no gradient yet
    trajectories = rollout(policy, article, keys)
    found, _ = gradients(policy, trajectories, keys, coefficients=ALL, reference_model=untrained.lm)
    assert reached(found) == set(found)
    assert {name.split(".")[0] for name in found} == {"model", "projection"}
    assert all("lora_" in name for name in found if name.startswith("model."))
    frozen = [p for name, p in lm.model.named_parameters() if "lora_" not in name]
    assert len(frozen) == 3 * 9 + 3  # nothing of the model under it: three layers, embedding, norm, head
    assert all(not p.requires_grad and p.grad is None for p in frozen)


def test_the_reference_gets_no_gradient_and_keeps_its_weights() -> None:
    policy, untrained, article, keys = policies(language_model())
    perturb(policy, scale=0.05)
    before = {name: p.clone() for name, p in untrained.lm.model.named_parameters()}
    gradients(policy, rollout(policy, article, keys), keys, coefficients=ALL, reference_model=untrained.lm)
    for name, parameter in untrained.lm.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("projected", [False, True])
def test_a_text_embedder_teaches_through_query_tokens_and_a_projection_alone(projected: bool) -> None:
    lm = language_model()
    own, _, article, _ = policies(lm)
    policy = Policy(lm, sampling=own.sampling, embedding=None, text_embedder=HashedBytes(), temperature=3.0)
    keys = policy.embed_keys(article)
    if projected:
        policy.projection = identity_projection(32, device=lm.device)
    assert policy.selection_has_gradient == projected
    trajectories = rollout(policy, article, keys)
    selection, _ = gradients(policy, trajectories, keys, coefficients=only(selection=1.0, selection_entropy=1.0))
    assert reached(selection) == ({"projection.weight"} if projected else set())
    query, _ = gradients(policy, trajectories, keys, coefficients=only(query=1.0))
    assert reached(query) == set(query) - {"projection.weight"}


# ---- which layers ----------------------------------------------------------------------------------------------------


def test_the_selection_reaches_the_layers_up_to_the_tapped_one_and_the_query_reaches_the_head() -> None:
    policy, _, article, keys = policies(language_model(), layer=-2)
    trajectories = rollout(policy, article, keys)

    selection, _ = gradients(policy, trajectories, keys, coefficients=only(selection=1.0))
    below = {name for name in selection if ".layers.0." in name or ".layers.1." in name or "embed_tokens" in name}
    assert len(below) == 2 * 9 + 1
    assert reached(selection) == below | {"projection.weight"}

    query, _ = gradients(policy, trajectories, keys, coefficients=only(query=1.0))
    assert reached(query) == set(query) - {"projection.weight"}
    assert "model.lm_head.weight" in reached(query)


def test_an_attention_embedding_reaches_its_query_projection_and_not_its_key_projection() -> None:
    from preceptor.lm.embedding import AttentionProjections

    lm = language_model()
    own, _, article, _ = policies(lm)
    policy = Policy(lm, sampling=own.sampling, embedding=AttentionProjections(lm, layer=1), temperature=0.1)
    keys = policy.embed_keys(article)
    found, _ = gradients(policy, rollout(policy, article, keys), keys, coefficients=only(selection=1.0))
    assert {name for name in reached(found) if ".layers.1." in name} == {
        "model.model.layers.1.input_layernorm.weight",
        "model.model.layers.1.self_attn.q_proj.weight",
    }
    assert not any(".layers.2." in name for name in reached(found))


# ---- what is scored is what was sampled ------------------------------------------------------------------------------

SAMPLINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.7, "top_k": 40, "top_p": 0.9},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_scoring_a_rollout_gives_back_its_log_probs(sampling: dict[str, Any]) -> None:
    policy, _, article, keys = policies(language_model(), **sampling)
    trajectories = rollout(policy, article, keys, num_episodes=6)
    assert len(set(map(tuple, trajectories.order.tolist()))) > 1  # rows of different length and content
    scores = score_actions(policy, trajectories, keys)
    torch.testing.assert_close(scores.query_log_probs, trajectories.query_log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.query_entropy, trajectories.query_entropy, rtol=0, atol=1e-5)
    chosen = trajectories.selection_log_probs.gather(-1, trajectories.order[..., None])[..., 0]
    torch.testing.assert_close(scores.selection_log_probs, chosen, rtol=0, atol=1e-5)
    ratios = (scores.query_log_probs - trajectories.query_log_probs).exp()
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-5)


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_kl_and_its_gradient_are_zero_before_the_first_step_and_not_after_it() -> None:
    policy, untrained, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys)
    coefficients = only(value_kl=1.0, query_kl=1.0)
    found, measured = gradients(policy, trajectories, keys, coefficients=coefficients, reference_model=untrained.lm)
    assert measured.value_kl == pytest.approx(0.0, abs=1e-6)
    assert measured.query_kl == pytest.approx(0.0, abs=1e-6)
    assert max(float(gradient.abs().max()) for gradient in found.values()) < 1e-5

    perturb(policy, scale=0.02)
    found, measured = gradients(policy, trajectories, keys, coefficients=coefficients, reference_model=untrained.lm)
    assert measured.value_kl is not None
    assert measured.query_kl is not None
    assert measured.value_kl > 1e-3
    assert measured.query_kl > 1e-3
    assert reached(found) == set(found) - {"projection.weight"}
    for part, other in (("value_kl", "query_kl"), ("query_kl", "value_kl")):
        alone, _ = gradients(
            policy,
            trajectories,
            keys,
            coefficients=dataclasses.replace(coefficients, **{other: 0}),
            reference_model=untrained.lm,
        )
        assert "model.lm_head.weight" in reached(alone), part


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    policy, untrained, article, keys = policies(language_model(), temperature=1.0)
    perturb(policy, scale=0.02)
    trajectories = rollout(policy, article, keys, num_episodes=7, budget=3)
    kept_mask = torch.tensor([True, False, True, True, True, False, True])
    arguments: dict[str, Any] = {"coefficients": ALL, "reference_model": untrained.lm, "kept_mask": kept_mask}
    whole, whole_metrics = gradients(policy, trajectories, keys, **arguments)
    for size in (1, 2, 3):
        parts, metrics = gradients(policy, trajectories, keys, micro_batch_size=size, **arguments)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert dataclasses.astuple(metrics) == pytest.approx(dataclasses.astuple(whole_metrics), abs=1e-5)


def test_nothing_passing_gives_no_gradient() -> None:
    policy, untrained, article, keys = policies(language_model())
    trajectories = rollout(policy, article, keys)
    nobody = torch.zeros(4, dtype=torch.bool)
    found, measured = gradients(
        policy, trajectories, keys, coefficients=ALL, reference_model=untrained.lm, kept_mask=nobody
    )
    assert reached(found) == set()
    assert (measured.policy_loss, measured.value_kl, measured.query_kl) == (0.0, None, None)


def slow_loss(
    policy: Policy,
    reference: LanguageModel,
    trajectories: Trajectories,
    keys: Keys,
    *,
    advantages: Tensor,
    passed: list[int],
    weights: Coefficients,
    layer: int,
) -> Tensor:
    """The loss of the documentation, one trajectory, one token at a time, with the bare Transformers model."""
    sampling, article = policy.sampling, trajectories.article
    terms: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(Coefficients)}
    for episode in passed:
        tokens, places = list(article.prompt), []
        for pair, query in zip(
            trajectories.order[episode].tolist(), trajectories.queries[episode].tolist(), strict=True
        ):
            start = len(tokens)
            tokens += query
            middle = len(tokens)
            tokens += article.values[pair]
            places.append((pair, start, middle, len(tokens)))
        ids = torch.tensor([tokens])
        output = policy.lm.model(input_ids=ids, output_hidden_states=True)
        logits, states = output.logits[0], output.hidden_states[layer + 1][0]
        with torch.no_grad():
            old = reference.model(input_ids=ids).logits[0].log_softmax(-1)
        now = logits.log_softmax(-1)
        allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
        allowed[list(sampling.suppressed)] = False
        remaining = list(range(len(keys.vectors)))
        for step, (pair, start, middle, end) in enumerate(places):
            advantage = advantages[episode, step]
            for at in range(start, middle):
                acting = (logits[at - 1][allowed] / sampling.temperature).log_softmax(-1)
                token = int(allowed[: tokens[at]].sum())  # its place among the allowed ones
                terms["query"].append(-advantage * acting[token])
                terms["query_entropy"].append(acting.exp() @ acting)
                terms["query_kl"].append(now[at - 1].exp() @ (now[at - 1] - old[at - 1]))
            for at in range(middle, end):
                terms["value_kl"].append(now[at - 1].exp() @ (now[at - 1] - old[at - 1]))
            vector = states[start:middle].mean(0) - keys.centre
            if policy.projection is not None:
                vector = policy.projection.weight @ vector
            choice = (keys.vectors[remaining] @ vector / policy.temperature).log_softmax(-1)
            terms["selection"].append(-advantage * choice[remaining.index(pair)])
            terms["selection_entropy"].append(choice.exp() @ choice)
            remaining.remove(pair)
    return sum(
        (getattr(weights, name) * torch.stack(values).mean() for name, values in terms.items()), start=torch.zeros(())
    )


def rms_norm(norm: LlamaRMSNorm, states: Tensor) -> Tensor:
    return norm.weight * states * (states.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def test_the_gradient_is_that_of_the_documented_loss_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    # The system computes its losses in float32; in float64 differences are exact enough to tell terms of 1 % apart.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)  # Transformers' own computes in float32 whatever it gets
    lm = language_model()
    lm.model.double()
    policy, untrained, article, keys = policies(lm, layer=1, temperature=0.8)
    policy.temperature = 1.5
    perturb(policy, scale=0.05)
    trajectories = rollout(policy, article, keys, num_episodes=3, budget=3, query_tokens=2)
    passed, advantages = [0, 2], advantages_of(trajectories).double()

    def loss(weights: Coefficients = ALL) -> float:
        others: dict[str, Any] = {"advantages": advantages, "passed": passed, "weights": weights, "layer": 1}
        with torch.no_grad():
            return float(slow_loss(policy, untrained.lm, trajectories, keys, **others))

    found, measured = gradients(
        policy,
        trajectories,
        keys,
        coefficients=ALL,
        reference_model=untrained.lm,
        kept_mask=torch.tensor([True, False, True]),
    )
    kinds = {
        name.replace("layers.0", "layers.N").replace("layers.1", "layers.N").replace("layers.2", "layers.N")
        for name in found
    }
    assert len(kinds) == 9 + 3 + 1
    step = 1e-5
    for name, parameter in policy.parameters().items():
        place = found[name].abs().argmax()
        with torch.no_grad():
            entry = parameter.view(-1)[place : place + 1]
            entry += step
            above = loss()
            entry -= 2 * step
            below = loss()
            entry += step
        expected = (above - below) / (2 * step)
        assert found[name].view(-1)[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9), name
    assert measured.policy_loss == pytest.approx(loss(only(query=ALL.query, selection=ALL.selection)), abs=1e-9)
    assert measured.query_kl == pytest.approx(loss(only(query_kl=1.0)), abs=1e-9)
    assert measured.value_kl == pytest.approx(loss(only(value_kl=1.0)), abs=1e-9)
    assert measured.query_entropy == pytest.approx(-loss(only(query_entropy=1.0)), abs=1e-9)


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("with_values", [True, False])
def test_many_logits_are_scored_a_few_positions_at_a_time(
    with_reference: bool, with_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers and gradients, and never the logits of more than five positions."""
    found = []
    for in_parts in (False, True):
        policy, untrained, article, keys = policies(language_model(), top_k=50)
        perturb(policy, scale=0.05)
        trajectories = rollout(policy, article, keys)
        if in_parts:
            monkeypatch.setattr(loss, "MAX_SAVED_LOGITS", 5 * 300)
        heights: list[int] = []
        head = policy.lm.model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _inputs, output, heights=heights: heights.append(len(output)))
        scores = loss.score_actions(
            policy, trajectories, keys,
            reference_model=untrained.lm if with_reference else None, with_values=with_values,
        )  # fmt: skip
        tensors = [scores.query_log_probs, scores.query_entropy]
        tensors += [each for each in (scores.query_kl, scores.value_kl) if each is not None]
        sum((number + 1) * each.square().sum() for number, each in enumerate(tensors)).backward()  # type: ignore[union-attr]
        gradients = [parameter.grad for parameter in policy.lm.trainable_parameters().values()]
        found.append([*(each.detach() for each in tensors), *gradients])
        assert (max(heights) <= 5) == in_parts
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(
            parts, whole, rtol=2e-5, atol=2e-5 * float(whole.abs().max() if whole.numel() else 1)
        )
