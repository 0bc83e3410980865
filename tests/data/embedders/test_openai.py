"""Nothing is bought twice, no cap is passed, no key is shown, whatever the service does."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from preceptor.data.embedders.base import TextEmbedder
from preceptor.data.embedders.openai import OPENAI_URL, OpenAIEmbedder
from preceptor.errors import ConfigError, DataError, ServiceError, StorageError

CANARY = "sk-canary-7Qz3kW9vTn"
PRICE = {"text-embedding-ada-002": 100, "text-embedding-3-small": 20, "text-embedding-3-large": 130}


def _load_fake_openai() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_openai", Path(__file__).with_name("fake_openai.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_openai = _load_fake_openai()


class Client:
    """Makes embedders on one cache folder and one server; ``slept`` is how long the SDK would have waited."""

    def __init__(self, folder: Path, server: Any, slept: list[float]) -> None:
        self.folder, self.server, self.slept = folder, server, slept
        self.opened: list[OpenAIEmbedder] = []

    def open(self, model: str = "text-embedding-3-small", **options: Any) -> OpenAIEmbedder:
        defaults: dict[str, Any] = {"max_usd": 1.0, "timeout": 5.0, "dimensions": 8 if "-3-" in model else None}
        defaults |= {"base_url": self.server.url}
        embedder = OpenAIEmbedder(model, api_key=CANARY, cache_dir=self.folder, **(defaults | options))
        self.opened.append(embedder)
        return embedder


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    """``play("429", "hang")``: a client of a server that misbehaves in this order and then answers rightly."""
    servers, clients = [], []
    slept: list[float] = []
    clock = types.SimpleNamespace(**{**vars(time), "sleep": slept.append})
    monkeypatch.setattr("openai._base_client.time", clock)

    def start(*script: str) -> Client:
        servers.append(fake_openai.FakeOpenAI(script).__enter__())
        clients.append(Client(tmp_path / "cache", servers[-1], slept))
        return clients[-1]

    yield start
    for client in clients:
        for embedder in client.opened:
            embedder.close()
    for server in servers:
        server.__exit__(None, None, None)


def texts_of(count: int, *, start: int = 0) -> list[str]:
    return [f"Sentence {number} of an article." for number in range(start, start + count)]


def spent(client: Client) -> int:
    """Nano-dollars by the file itself, read without the code under test."""
    with closing(sqlite3.connect(client.folder / "embeddings.sqlite3")) as database:
        return int(database.execute("SELECT coalesce(sum(nano_usd), 0) FROM purchases").fetchone()[0])


# --- what is bought ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["ok", "shuffled", "floats", "no_usage"])
def test_vectors_are_the_service_s_own_in_the_order_of_the_texts(play: Callable[..., Client], fault: str) -> None:
    client = play(fault)
    embedder: TextEmbedder = client.open()
    texts = [*texts_of(9), "Sentence 0 of an article."]  # one text twice
    vectors = embedder.embed(texts)
    expected = np.stack([client.server.vector(text, 8, sale=1) for text in texts])
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert np.array_equal(vectors.numpy(), expected)
    (request,) = client.server.requests
    assert request == {
        "model": "text-embedding-3-small",
        "input": texts[:9],
        "encoding_format": "base64",
        "dimensions": 8,
    }
    assert client.server.headers[0]["authorization"] == f"Bearer {CANARY}"
    assert (embedder.name, embedder.dimension) == ("openai", 8)
    assert embedder.version == f"text-embedding-3-small/8 at {client.server.url}"


def test_a_second_run_buys_nothing_and_sees_the_same_bits(play: Callable[..., Client]) -> None:
    client = play()
    first = client.open("text-embedding-ada-002").embed(texts_of(5))
    assert first.shape == (5, 1536)
    again = client.open("text-embedding-ada-002", max_usd=0.0).embed(texts_of(5)[::-1])
    assert torch.equal(again, first.flip(0))
    assert len(client.server.requests) == 1
    assert "dimensions" not in client.server.requests[0]
    # The fake is as little deterministic as the real one, so only the cache explains the equality.
    assert not np.array_equal(client.server.vector("a", 8, sale=1), client.server.vector("a", 8, sale=2))
    assert client.open().embed([]).shape == (0, 8)


def test_models_and_dimensions_do_not_share_vectors(play: Callable[..., Client]) -> None:
    client = play()
    for model, dimensions in [
        ("text-embedding-3-small", 8),
        ("text-embedding-3-small", 16),
        ("text-embedding-3-large", 8),
    ]:
        assert client.open(model, dimensions=dimensions).embed(["a"]).shape == (1, dimensions)
        assert client.opened[-1].num_cached == 1
    assert len(client.server.requests) == 3


def test_requests_keep_the_limits_of_count_and_tokens(play: Callable[..., Client]) -> None:
    client = play()
    client.open(batch_size=4).embed(texts_of(10))
    assert [len(request["input"]) for request in client.server.requests] == [4, 4, 2]
    long = [f"{number:04d}" + "x" * 8_000 for number in range(40)]  # 40 * 8,004 bytes: 37 fit into 300,000
    client.open(batch_size=2_048, timeout=30.0).embed(long)
    assert [len(request["input"]) for request in client.server.requests[3:]] == [37, 3]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "text 2 of 2 is empty"),
        (["a", "b" * 8_192], r"text 2 of 2 has 8,192 bytes, at most 8,191"),
        (["é" * 4_096], "has 8,192 bytes"),
        (["a", None], "text 2 of 2 must be a string, got NoneType"),
        ("a", "got one string"),
        (["a\udc80"], "no UTF-8 form"),
    ],
)
def test_unfit_texts_are_named_before_anything_is_bought(play: Callable[..., Client], texts: Any, message: str) -> None:
    client = play()
    with pytest.raises(DataError, match=message):
        client.open().embed(texts)
    assert client.server.requests == []
    assert spent(client) == 0
    assert client.open().embed(["b" * 8_191]).shape == (1, 8)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "500", "503_html", "500_echoes_key"])
def test_passing_refusals_are_retried_and_cost_nothing(play: Callable[..., Client], fault: str) -> None:
    client = play(*[fault] * 3)
    client.open().embed(texts_of(2))
    assert len(client.server.requests) == 4
    assert spent(client) == 20 * client.server.billed_tokens == 20 * 2 * 7  # 28 characters, 4 a token
    assert len(client.slept) == 3
    assert all(0.75 * ceiling <= wait <= ceiling for wait, ceiling in zip(client.slept, (0.5, 1.0, 2.0), strict=True))


def test_retry_after_is_obeyed_and_a_long_one_ends_the_call(play: Callable[..., Client]) -> None:
    client = play("429_retry_after", "429_date")
    client.open().embed(["a"])
    assert client.slept[0] == 7.0
    assert 25 < client.slept[1] <= 30
    client.server._refuse = lambda handler, fault, key: fake_openai._send(
        handler, 429, b"{}", extra="Retry-After: 3600\r\n"
    )
    client.server.script.append("429")
    with pytest.raises(ServiceError, match=r"HTTP 429; .* 1 texts cached"):
        client.open().embed(["b"])
    assert len(client.slept) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401_echoes_key", r"refused the API key \(HTTP 401\); set OPENAI_API_KEY"),
        ("403", "answered HTTP 403: refused by script: 403"),
        ("400", "answered HTTP 400"),
        ("redirect", "answered HTTP 302"),
    ],
)
def test_lasting_refusals_are_not_retried(play: Callable[..., Client], fault: str, message: str) -> None:
    client = play(fault)
    with pytest.raises(ServiceError, match=message):
        client.open().embed(["a"])
    assert (len(client.server.requests), client.slept, spent(client)) == (1, [], 0)


def test_an_exhausted_quota_is_told_apart_from_a_rate_limit(play: Callable[..., Client]) -> None:
    client = play(*["insufficient_quota"] * 3)
    with pytest.raises(ServiceError, match=r"quota is used up \(HTTP 429\).* after 3 attempts"):
        client.open(max_retries=2).embed(["a"])
    assert spent(client) == 0


def test_retries_end(play: Callable[..., Client]) -> None:
    client = play(*["500"] * 9)
    with pytest.raises(ServiceError, match=r"HTTP 500: refused by script: 500 after 3 attempts; \$0\.00 of \$1\.00"):
        client.open(max_retries=2).embed(["a"])
    assert len(client.server.requests) == 3


@pytest.mark.parametrize("fault", ["hang", "disconnect", "cut_body"])
def test_silence_is_retried_and_stays_charged_since_it_may_be_billed(play: Callable[..., Client], fault: str) -> None:
    client = play(fault)
    client.open(timeout=0.5).embed(["abcdefgh"])
    assert len(client.server.requests) == 2
    assert spent(client) == 20 * 8 + 20 * 2  # the worst case, a token a byte, and then what the answer says: 2 tokens
    assert client.server.billed_tokens == 4


def test_an_unreachable_service_costs_nothing(play: Callable[..., Client]) -> None:
    client = play()
    embedder = client.open(base_url="http://127.0.0.1:9/v1", max_retries=1)
    with pytest.raises(ServiceError, match=r"at http://127\.0\.0\.1:9/v1: no answer \(.*refused\)"):
        embedder.embed(["a"])
    assert spent(client) == 0


@pytest.mark.parametrize(
    ("fault", "message", "usable"),
    [
        ("cut_json", "not the JSON of a list of embeddings, or cut short", 0),
        ("not_json", "not the JSON", 0),
        ("wrong_dimension", r"index 0 has 7 components, expected 8 \(and 4 more\)", 0),
        ("nan_item", "index 2 holds NaN or infinity", 4),
        ("zero_item", "index 2 has norm 0, expected 1", 4),
        ("bad_base64", "index 2 is neither base64", 4),
        ("missing_item", "1 of 5 vectors are missing, the first is index 2", 4),
        ("duplicate_index", "index 2 comes twice", 4),
        ("foreign_index", r"an item has index 5, allowed are 0 to 4 \(and 1 more\)", 4),
    ],
)
def test_a_faulty_answer_is_named_kept_in_part_and_not_bought_again_unasked(
    play: Callable[..., Client], fault: str, message: str, usable: int
) -> None:
    client = play(fault)
    embedder = client.open()
    with pytest.raises(ServiceError, match=rf"{message}.*; {usable} of 5 vectors were usable"):
        embedder.embed(texts_of(5))
    assert (len(client.server.requests), client.slept) == (1, [])
    assert embedder.num_cached == usable
    assert spent(client) >= 20 * client.server.billed_tokens
    embedder.embed(texts_of(5))
    assert len(client.server.requests[1]["input"]) == 5 - usable
    assert not client.server.resent


# --- money ------------------------------------------------------------------------------------------------------------


def test_the_budget_ends_before_it_is_passed_and_says_what_is_kept(play: Callable[..., Client]) -> None:
    client = play()
    texts = [
        f"{number:04d}" for number in range(100)
    ]  # 4 bytes each, 1 token each: reserved 80, billed 20 nano-dollars
    embedder = client.open(max_usd=1e-6)  # 1,000 nano-dollars
    with pytest.raises(ServiceError) as caught:
        embedder.embed(texts)
    # Each call may reserve what is left, at 80 a text: 12 texts (240 billed), 9 of 760, 7 of 580, 5 of 440, 4 of 340,
    # 3 of 260, 2 of 200, 2 of 160, 1 of 120, 1 of 100, 1 of 80; then 60 are left, less than one text may cost.
    assert [len(request["input"]) for request in client.server.requests] == [12, 9, 7, 5, 4, 3, 2, 2, 1, 1, 1]
    assert str(caught.value) == (
        "budget reached: $0.00000094 of $0.000001 spent, 47 texts cached; nothing is lost; "
        "the next call may cost $0.00000008, raise max_usd to go on"
    )
    assert spent(client) == 20 * client.server.billed_tokens == 940
    with pytest.raises(ServiceError, match="budget reached"):  # a new process has the same budget
        client.open(max_usd=1e-6).embed(texts)
    assert client.open(max_usd=1e-6).embed(texts[:47]).shape == (47, 8)
    client.open(max_usd=1.0).embed(texts)
    assert not client.server.resent


def test_a_full_disk_is_met_before_the_purchase(play: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    client = play()
    embedder = client.open()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(StorageError, match="nothing was bought"):
        embedder.embed(["a"])
    assert client.server.requests == []


def test_300_random_faults_buy_nothing_twice_and_never_pass_the_cap(
    play: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    chance = random.Random(20)
    # "hang" costs the time-out, so there is one of it.
    faults = [*chance.choices([fault for fault in fake_openai.FAULTS if fault != "hang"], k=299), "hang"]
    chance.shuffle(faults)
    client = play(*faults)
    cap = 60_000  # nano-dollars; raised whenever it is reached
    texts = [f"Sentence {number}: {'ж' if number % 5 == 0 else 'x'}" * (1 + number % 4) for number in range(1_200)]
    open_embedder = lambda: client.open(batch_size=16, timeout=1.5, max_usd=cap / 1e9, max_retries=3)  # noqa: E731
    embedder = open_embedder()
    errors: list[str] = []
    caps: list[int] = []  # those that were reached
    for _ in range(5_000):
        if embedder.num_cached == len(texts):
            break
        start, restart = chance.randrange(len(texts)), chance.random() < 0.05
        try:
            embedder.embed(texts[start : start + chance.choice([1, 5, 40])])
        except ServiceError as error:
            errors.append(repr(error))
            if "budget reached" in errors[-1]:
                caps.append(cap)
                cap += 60_000
                restart = True
        if restart:
            embedder.close()
            embedder = open_embedder()
        assert 20 * client.server.billed_tokens <= spent(client) <= cap
    server = client.server
    assert sum(server.faults_played.values()) - server.faults_played["ok"] == 300
    assert set(server.faults_played) == {*fake_openai.FAULTS, "ok"}
    assert len(errors) > 100
    assert len(caps) > 5
    assert not server.resent
    assert set(server.delivered.values()) == {1}
    assert len(server.delivered) == len(texts)
    shown = caplog.text + "".join(errors) + repr(embedder) + repr(vars(embedder))
    shown += "".join(path.read_bytes().decode("latin-1") for path in client.folder.iterdir())
    assert CANARY not in shown
    assert "<api key>" in shown  # the service did quote it


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["401_echoes_key", "500_echoes_key", "disconnect", "cut_json"])
def test_no_traceback_shows_the_key(play: Callable[..., Client], fault: str) -> None:
    import traceback

    client = play(fault)
    embedder = client.open(max_retries=0)
    with pytest.raises(ServiceError) as caught:
        embedder.embed(["a"])
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    link: BaseException | None = caught.value
    while link is not None:  # nor does any chained error, printed or not
        assert CANARY not in repr(link)
        link = link.__context__
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):  # it cannot reach a checkpoint either
        pickle.dumps(embedder)


@pytest.mark.parametrize("key", ["", "  ", f"{CANARY}\n", f"{CANARY} x", f"{CANARY}é", f"{CANARY}\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_unquoted(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="API key") as caught:
        OpenAIEmbedder(api_key=key, cache_dir=tmp_path, max_usd=1.0)
    assert CANARY not in str(caught.value)


def test_all_faults_of_the_settings_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIEmbedder(
            "text-embedding-3-smal",
            api_key="",
            cache_dir=tmp_path,
            max_usd=1.0,
            base_url="https://me:secret@host/v1",
            batch_size=2_049,
            timeout=0.0,
            max_retries=-1,
            usd_per_million_tokens=float("nan"),
        )
    assert len(caught.value.faults) == 7
    assert "(did you mean 'text-embedding-3-small'?)" in str(caught.value)
    assert "state the dimension" in str(caught.value)
    assert "secret" not in str(caught.value)
    for model, dimensions in [
        ("text-embedding-ada-002", 256),
        ("text-embedding-3-small", 1_537),
        ("text-embedding-3-large", 0),
    ]:
        with pytest.raises(ConfigError, match=f"dimensions.*{dimensions}"):
            OpenAIEmbedder(model, api_key="k", cache_dir=tmp_path, max_usd=1.0, dimensions=dimensions)


# --- processes --------------------------------------------------------------------------------------------------------

PROCESS = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from preceptor.data.embedders.openai import OpenAIEmbedder
    from preceptor.data.embedders.paid_cache import PaidCache

    url, folder, dies_before_storing = sys.argv[1:4]
    if dies_before_storing:
        PaidCache.settle = lambda *_: os._exit(9)
    embedder = OpenAIEmbedder(
        "text-embedding-3-small", dimensions=8, api_key="k", cache_dir=Path(folder),
        base_url=url, max_usd=1.0, batch_size=7
    )
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    vectors = embedder.embed([f"Sentence {number} of an article." for number in range(100)])
    print(vectors.tolist())
    """
)


def start_process(client: Client, *, dies_before_storing: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, client.server.url, str(client.folder), "1" * dies_before_storing]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def release(process: subprocess.Popen[str]) -> int:
    """Wait until ``process`` has imported everything, let it go on, return its id."""
    assert process.stdin is not None
    assert process.stdout is not None
    identity = int(process.stdout.readline())
    process.stdin.write("go\n")
    process.stdin.flush()
    return identity


def test_two_processes_share_a_cache_and_one_killed_in_a_purchase_blocks_nobody(play: Callable[..., Client]) -> None:
    client = play()
    victim, survivor = start_process(client), start_process(client)
    client.server.script.extend(["ok", f"kill:{release(victim)}"])
    assert victim.wait(timeout=30) == -9
    victim.communicate()
    release(survivor)  # wants sentences 0 to 99 at the same time as the embedder below wants 50 to 149
    vectors = client.open(batch_size=5).embed(texts_of(100, start=50))
    told = json.loads(survivor.communicate(timeout=30)[0])
    assert {len(request["input"]) for request in client.server.requests} >= {5, 7}  # both did buy
    assert not client.server.resent
    assert len(client.server.delivered) == 150
    assert np.array_equal(np.array(told, dtype=np.float32)[50:], vectors[:50].numpy())
    # The killed process's reservation stands: 7 texts of 28 or 29 bytes at most, instead of the 7 or 8 tokens each.
    assert 20 * client.server.billed_tokens <= spent(client) <= 20 * (client.server.billed_tokens + 7 * 29)


def test_a_process_that_dies_between_answer_and_store_loses_what_was_in_flight_and_no_money(
    play: Callable[..., Client],
) -> None:
    client = play()
    victim = start_process(client, dies_before_storing=True)
    release(victim)
    assert victim.wait(timeout=30) == 9
    victim.communicate()
    (lost,) = client.server.requests
    reserved = 20 * sum(len(text) for text in lost["input"])
    assert spent(client) == reserved  # the worst case stands: a token a byte
    embedder = client.open()
    embedder.embed(texts_of(100))
    assert set(client.server.resent) == set(lost["input"])
    assert spent(client) == reserved + 20 * (
        client.server.billed_tokens - sum(map(fake_openai.count_tokens, lost["input"]))
    )


# --- other services ---------------------------------------------------------------------------------------------------


def test_any_model_of_any_service_with_a_stated_dimension(play: Callable[..., Client]) -> None:
    client = play("long_vectors")
    embedder = client.open("BAAI/bge-m3", dimensions=16, usd_per_million_tokens=0.05)
    vectors = embedder.embed(texts_of(3))
    expected = np.stack([client.server.vector(text, 16, sale=1) for text in texts_of(3)])
    # Sent at three times their length; float32 rounds when they are brought back to 1.
    torch.testing.assert_close(vectors, torch.from_numpy(expected), atol=1e-6, rtol=0)
    (request,) = client.server.requests
    assert request["model"] == "BAAI/bge-m3"
    assert "dimensions" not in request  # few other models can shorten, and some servers refuse to be asked
    assert spent(client) == 50 * client.server.billed_tokens
    free = client.open("BAAI/bge-m3", dimensions=16, usd_per_million_tokens=0.0, max_usd=0.0)
    assert free.embed(["more"]).shape == (1, 16)
    unpriced = client.open("another", dimensions=16)  # counted at the highest known price
    before, billed = spent(client), client.server.billed_tokens
    unpriced.embed(["abcd"])
    assert spent(client) - before == 130 * (client.server.billed_tokens - billed)
    client.server.script.append("wrong_dimension")
    with pytest.raises(ServiceError, match="15 components, expected 16"):
        embedder.embed(["yet another"])


def test_the_service_is_part_of_the_version(tmp_path: Path) -> None:
    def version(base_url: str | None) -> str:
        embedder = OpenAIEmbedder(api_key="k", cache_dir=tmp_path, max_usd=1.0, base_url=base_url)
        embedder.close()
        return embedder.version

    assert version(None) == version(OPENAI_URL) == version(OPENAI_URL + "/") == "text-embedding-ada-002/1536"
    assert version("https://x.openai.azure.com?api-version=1") == (
        "text-embedding-ada-002/1536 at https://x.openai.azure.com"
    )


@pytest.mark.parametrize(
    ("tail", "version"),
    [
        ("?api-version=2025-01-01", "2025-01-01"),
        ("/openai/deployments/my-deployment/embeddings?api-version=2023-05-15", "2023-05-15"),
        ("/openai/deployments/my-deployment", "2024-10-21"),
    ],
)
def test_azure_is_spoken_to_as_azure_wants_it(play: Callable[..., Client], tail: str, version: str) -> None:
    client = play()
    embedder = client.open("my-deployment", dimensions=16, base_url=client.server.url.removesuffix("/v1") + tail)
    embedder.embed(["a"])
    (headers,) = client.server.headers
    assert headers["api-key"] == CANARY
    assert client.server.paths == [f"/openai/deployments/my-deployment/embeddings?api-version={version}"]
    assert CANARY not in (client.folder / "embeddings.sqlite3").read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    ("base_url", "kind"),
    [
        ("https://x.openai.azure.com", "AzureOpenAI"),
        ("https://x.openai.azure.com/openai/v1", "OpenAI"),
        ("https://gateway.example/azure.com/v1", "OpenAI"),
    ],
)
def test_azure_is_known_by_its_address(tmp_path: Path, base_url: str, kind: str) -> None:
    embedder = OpenAIEmbedder(api_key="k", cache_dir=tmp_path, max_usd=1.0, base_url=base_url)
    assert type(embedder.close.__self__).__name__ == kind  # type: ignore[attr-defined]
    embedder.close()


@pytest.mark.parametrize("base_url", ["ftp://host", "host/v1", "https://", "https://host:x/v1", "https://[::1/v1"])
def test_a_base_url_that_is_none_is_refused(tmp_path: Path, base_url: str) -> None:
    with pytest.raises(ConfigError, match="base_url must be"):
        OpenAIEmbedder(api_key="k", cache_dir=tmp_path, max_usd=1.0, base_url=base_url)
