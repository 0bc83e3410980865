"""The protocol of engines: ours, Transformers' and a vLLM server's (a server of our own that speaks its API)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.errors import ConfigError, ModelError, ServiceError
from preceptor.lm.generators.audit import Audit, audit
from preceptor.lm.generators.base import Generations, Generator, OwnGenerator, counted, end_token
from preceptor.lm.generators.transformers_generate import TransformersGenerator
from preceptor.lm.generators.vllm import VLLMGenerator
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.score import token_log_probs
from tests.lm.generators.fake_server import FakeServer, serving

PROMPTS = ["A glacier moves", "Bread rises because yeast", "The tide"]
KEY = "sk-planted-secret"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model("starter", device=torch.device("cpu"))


@pytest.fixture
def server(lm: LanguageModel) -> Iterator[FakeServer]:
    with serving(lm) as server:
        yield server


Make = Callable[[str], Generator]


@pytest.fixture
def make(lm: LanguageModel, server: FakeServer, tmp_path: Path) -> Make:
    def build(name: str) -> Generator:
        if name == "vllm":
            return VLLMGenerator(lm, url=server.url, folder=tmp_path / "weights", api_key=KEY)
        return {"own": OwnGenerator, "transformers": TransformersGenerator}[name](lm)

    return build


def prompts(lm: LanguageModel) -> list[list[int]]:
    return [[lm.begin_token, *lm.encode(text)] for text in PROMPTS]


def write(lm: LanguageModel, engine: Generator, *, seed: int = 0, **options: Any) -> tuple[Generations, Sampling]:
    end = end_token(lm)
    sampling = Sampling(temperature=0.8, suppressed=[token for token in lm.never_drawn if token != end])
    settings: dict[str, Any] = {"number": 2, "num_tokens": 6, "sampling": sampling} | options
    return engine.generate(prompts(lm), generator=torch.Generator().manual_seed(seed), **settings), settings["sampling"]


@torch.no_grad()
def scored(lm: LanguageModel, found: Generations, sampling: Sampling, number: int = 2) -> torch.Tensor:
    """The log-probability of each token, from the model's whole distribution, row by row."""
    rows = []
    for row, tokens in enumerate(found.tokens.tolist()):
        prompt = prompts(lm)[row // number]
        text = torch.tensor([[*prompt, *tokens]])
        keep = torch.zeros_like(text, dtype=torch.bool)
        keep[:, len(prompt) - 1 : -1] = True
        logits = lm.forward(text, keep=keep).logits
        rows.append(sampling.log_probs(logits).gather(1, torch.tensor(tokens)[:, None])[:, 0])
    return torch.stack(rows)


def audited(lm: LanguageModel, found: Generations, sampling: Sampling, *, max_gap: float = 0.05) -> Audit:
    log_probs = scored(lm, found, sampling)
    return audit(found.log_probs, log_probs, mask=found.mask, max_weight=2.0, max_gap=max_gap, engine="it")


ENGINES = ("own", "transformers", "vllm")


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_says_is_what_the_model_says(name: str, lm: LanguageModel, make: Make) -> None:
    found, sampling = write(lm, make(name))
    assert found.tokens.shape == found.mask.shape == found.log_probs.shape == (6, 6)
    assert found.tokens[found.mask].unique().numel() > 5
    assert torch.equal(found.mask, counted(found.tokens, end=end_token(lm)) & found.mask)
    report = audited(lm, found, sampling)
    # float32 sums of 256 numbers in another order.
    assert report.gap < 1e-5
    assert report.weights == pytest.approx(torch.ones(6, 6), abs=1e-4)
    assert report.truncated == 0


@pytest.mark.parametrize("name", ENGINES)
def test_a_planted_shift_is_caught(name: str, lm: LanguageModel, make: Make) -> None:
    found, sampling = write(lm, make(name))
    shifted = Generations(found.tokens, found.mask, found.log_probs - 0.1)
    with pytest.raises(
        ModelError, match=r"it and the model that is trained are 0\.1 nats a token apart on \d+ sampled"
    ):
        audited(lm, shifted, sampling)
    assert audited(lm, shifted, sampling, max_gap=0.2).gap == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_seed_writes_the_same_and_another_seed_not(name: str, lm: LanguageModel, make: Make) -> None:
    first, again, other = (write(lm, make(name), seed=seed)[0].tokens for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "the continuations of one prompt differ"


@pytest.mark.parametrize("name", ENGINES)
def test_truncation_and_suppressed_tokens_are_kept_to(name: str, lm: LanguageModel, make: Make) -> None:
    greedy, _ = write(lm, make("own"), sampling=Sampling(top_k=1), number=1)
    suppressed = sorted({int(token) for token in greedy.tokens[:, 0]})
    sampling = Sampling(temperature=0.5, top_k=1, suppressed=suppressed)
    found, _ = write(lm, make(name), sampling=sampling, number=1)
    own, _ = write(lm, make("own"), sampling=sampling, number=1)
    assert torch.equal(found.tokens[found.mask], own.tokens[own.mask]), "the likeliest tokens but for the suppressed"
    assert not set(suppressed) & set(found.tokens[:, 0].tolist())
    assert found.log_probs[found.mask].abs().max() < 1e-6


@pytest.mark.parametrize("name", ENGINES)
def test_a_row_ends_with_the_end_token_which_counts(name: str, lm: LanguageModel, make: Make) -> None:
    everything_else = [token for token in range(lm.vocab_size) if token not in (end_token(lm), 300, 301)]
    found, sampling = write(lm, make(name), sampling=Sampling(temperature=4.0, suppressed=everything_else), number=8)
    ended = found.tokens == end_token(lm)
    assert 0 < int(found.mask.logical_not().sum()) < found.mask.numel(), "some rows ended early, and not all at once"
    for row, mask in zip(ended, found.mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (6 - length)
        assert length == 6 or bool(row[length - 1])
        assert not row[: length - 1].any()
    assert found.log_probs[found.mask].exp().sum() > 0
    log_probs = scored(lm, found, sampling, number=8)
    assert torch.allclose(found.log_probs[found.mask], log_probs[found.mask], atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_follows_the_weights(name: str, lm: LanguageModel, make: Make, server: FakeServer) -> None:
    engine = make(name)
    head = lm.model.get_output_embeddings().weight
    before = head.detach().clone()
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            head.add_(0.02 * torch.randn(head.shape, generator=generator))
        if name == "vllm":
            server.lm = load_language_model("starter", device=torch.device("cpu"))  # a server holds its own copy
            found, sampling = write(lm, engine)
            with pytest.raises(ModelError, match="give the engine the model's present weights"):
                audited(lm, found, sampling)
        engine.refresh()
        found, sampling = write(lm, engine)
        assert audited(lm, found, sampling).gap < 1e-5
    finally:
        with torch.no_grad():
            head.copy_(before)


def test_transformers_leaves_the_global_random_state_alone(lm: LanguageModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write(lm, TransformersGenerator(lm))
    assert torch.equal(torch.rand(3), expected)


def test_what_a_server_is_asked(lm: LanguageModel, make: Make, server: FakeServer) -> None:
    write(lm, make("vllm"))
    (path, body, authorization), *_ = server.requests
    assert (path, authorization) == ("/v1/completions", f"Bearer {KEY}")
    assert body["prompt"] == prompts(lm)
    assert (body["n"], body["max_tokens"], body["temperature"]) == (2, 6, 0.8)
    assert body["return_token_ids"] is True
    assert body["logprobs"] == 0
    assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [end_token(lm)])
    assert set(body["logit_bias"]) == {str(token) for token in lm.never_drawn if token != end_token(lm)}


def test_a_server_of_which_something_is_wrong(lm: LanguageModel, server: FakeServer, tmp_path: Path) -> None:
    engine = VLLMGenerator(lm, url=f"{server.url}/v1/", folder=tmp_path, api_key=KEY)
    assert KEY not in repr(vars(engine)) + repr(engine)
    for field in ("token_ids", "logprobs"):
        server.drop = field
        with pytest.raises(ServiceError, match=r"must be 0\.10\.2 or newer"):
            write(lm, engine)
    server.drop, server.status = "", 404
    with pytest.raises(ServiceError, match=r"refused /v1/completions with status 404: .*<api key>") as said:
        write(lm, engine)
    assert KEY not in str(said.value)
    with pytest.raises(ServiceError, match=r"refused /collective_rpc with status 404: .*VLLM_SERVER_DEV_MODE=1"):
        engine.refresh()
    with pytest.raises(ServiceError, match="does not answer"):
        VLLMGenerator(lm, url="http://127.0.0.1:9", folder=tmp_path)
    for url in ("127.0.0.1:8000", "http://me:secret@host:8000", "http://host:8000/?key=secret"):
        with pytest.raises(ConfigError, match="must be http") as refused:
            VLLMGenerator(lm, url=url, folder=tmp_path)
        assert "secret" not in str(refused.value)


def test_weights_are_truncated_and_unbiased_below_the_bound() -> None:
    sampled = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]])
    differences = torch.tensor([[0.1, -0.2, 3.0], [0.0, 50.0, -50.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = audit(sampled, sampled + differences, mask=mask, max_weight=2.0, max_gap=1.0, engine="it")
    assert found.gap == pytest.approx((0.1 + 0.2 + 3.0) / 4)
    assert found.max_gap == pytest.approx(3.0)
    assert found.truncated == 1 / 4
    expected = torch.tensor([[0.1, -0.2, 0.0], [0.0, 0.0, 0.0]]).exp()
    expected[0, 2] = 2.0
    assert torch.allclose(found.weights, expected)


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), -float("inf")])
def test_a_gap_that_is_no_number_stops_too(planted: float) -> None:
    sampled, scored_ = torch.zeros(1, 2), torch.tensor([[0.0, planted]])
    with pytest.raises(ModelError, match="nats a token apart"):
        audit(sampled, scored_, mask=torch.ones(1, 2, dtype=torch.bool), max_weight=2.0, max_gap=9.0, engine="it")
    # Where nothing counts it does not matter.
    mask = torch.tensor([[True, False]])
    assert audit(sampled, scored_, mask=mask, max_weight=2.0, max_gap=0.1, engine="it").gap == 0


def test_the_audit_of_our_own_scores_agrees_with_its_reference(lm: LanguageModel) -> None:
    found, _ = write(lm, OwnGenerator(lm), sampling=Sampling(), number=2)
    rows = [[*prompts(lm)[row // 2], *tokens] for row, tokens in enumerate(found.tokens.tolist())]
    spans = [[(len(row) - 6, len(row))] for row in rows]
    assert torch.allclose(
        torch.stack(list(token_log_probs(lm, rows, spans=spans))), scored(lm, found, Sampling()), atol=1e-5
    )
