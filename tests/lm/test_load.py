"""Loading by folder and by name: what fits is ready and silent, everything else is one clear line, soon."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from preceptor.cli import main
from preceptor.errors import ConfigError, MissingExtraError, ModelError
from preceptor.lm import load
from preceptor.lm.decode import Decoder
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.tokenizer import train_bpe_tokenizer

MakeLM = Callable[..., LanguageModel]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, make_lm: MakeLM) -> Path:
    """A small model as ``save_pretrained`` leaves it."""
    return save(make_lm(), tmp_path / "model")


def save(lm: LanguageModel, path: Path) -> Path:
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refusal(name: object, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_language_model(str(name), device=CPU, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(name), "NAME")) < 450
    return message


# ---- what fits ------------------------------------------------------------------------------------------------------


def test_a_folder_is_what_transformers_loads(folder: Path, make_lm: MakeLM) -> None:
    lm = load_language_model(str(folder), device=CPU)
    assert lm.name == str(folder)
    assert lm.dtype == torch.float32
    assert not lm.model.training
    tokens = torch.tensor([[0, 5, 17]])
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits[0]
    every = torch.ones_like(tokens, dtype=torch.bool)
    logits = lm.forward(tokens, keep=every).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # attention sums in another order
    assert torch.equal(make_lm().forward(tokens, keep=every).logits, logits)
    assert lm.encode("the sea") == make_lm().encode("the sea")


def test_a_model_saved_again_is_still_a_plain_model(folder: Path, tmp_path: Path) -> None:
    lm = load_language_model(str(folder), device=CPU)
    with torch.no_grad():
        lm.trainable_parameters()["model.layers.0.mlp.up_proj.weight"].mul_(1.5)
    lm.model.save_pretrained(tmp_path / "again")
    lm.tokenizer.save_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    inputs = tokenizer("the lighthouse", return_tensors="pt")["input_ids"]
    assert inputs[0].tolist() == [lm.begin_token, *lm.encode("the lighthouse")]
    never = [[token] for token in lm.special_tokens]
    generated = model.generate(inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, bad_words_ids=never)
    decoder = Decoder(lm, batch_size=1)
    decoder.append(inputs.tolist())
    greedy = Sampling(temperature=0.0, suppressed=lm.special_tokens)
    ours = decoder.generate(8, sampling=greedy, generator=torch.Generator()).tokens
    assert ours[0].tolist() == generated[0, inputs.shape[1] :].tolist()


def test_bfloat16(folder: Path) -> None:
    lm = load_language_model(str(folder), device=CPU, dtype=torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_real_models(name: str, real_lm: Any) -> None:
    lm = real_lm(name)
    assert lm.context_length == 512
    assert lm.begin_token == 1
    assert lm.special_tokens == (0, 1, 2)


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_starts_alike_in_every_run_and_moves_no_other_stream(folder: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    loaded, after = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(load_language_model(str(folder), device=CPU, adapter=Adapter(rank=3)))
        after.append(torch.rand(1).item())
        torch.manual_seed(seed)
        assert after[-1] == torch.rand(1).item()
    first, second = (lm.trainable_parameters() for lm in loaded)
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
    assert {min(parameter.shape) for parameter in first.values()} == {3}


def test_an_adapter_without_peft_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingExtraError, match=r"package 'peft'; install it with: pip install 'preceptor\[lora\]'"):
        load_language_model(str(folder), device=CPU, adapter=Adapter())


def test_adapters_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Adapter(rank=0, alpha=0.0)
    assert len(caught.value.faults) == 2


# ---- folders that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "some/deep/path"])
def test_a_missing_folder(name: str) -> None:
    assert refusal(name) == f"model folder {name} does not exist; check the path"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json; give the folder that save_pretrained wrote" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1_000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refusal(folder).startswith(f"model '{folder}' cannot be loaded: ")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)


def test_weights_that_lack_a_layer(folder: Path) -> None:
    """Transformers alone would make the layer up and go on."""
    change_config(folder, num_hidden_layers=3)
    assert "lack 9 tensors, the first of them model.layers.2." in refusal(folder)


def test_weights_of_more_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    assert "hold 9 tensors that config.json has no place for, the first of them model.layers.1." in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "is quantized (bitsandbytes)",
        ),
        ({"attn_implementation": "kernels-community/flash-attn"}, "asks for code from the hub (attn_implementation"),
        ({"_attn_implementation": "someone/kernel@main"}, "asks for code from the hub"),
        ({"text_config": {"attn_implementation": "a/b"}}, "asks for code from the hub"),
        ({"num_hidden_layers": 0}, "has num_hidden_layers 0, it must be 1 to 1,000 layers"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000, it must be 1 to 1,000 layers"),
        ({"num_hidden_layers": -2}, "has num_hidden_layers -2"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads 0"),
        ({"hidden_size": 0}, "has hidden_size 0"),
        ({"hidden_size": "32"}, "has hidden_size 32, it must be 1 to"),
        ({"vocab_size": 10**12}, "has vocab_size 1000000000000"),
        ({"intermediate_size": 10**9}, "cannot be loaded"),
        ({"head_dim": 0}, "cannot be"),
        ({"hidden_act": "no_such"}, "cannot be"),
        ({"rope_parameters": {"rope_type": "no_such"}}, "cannot be"),
        ({"max_position_embeddings": "many"}, "cannot be"),
        ({"dtype": "no_such"}, "cannot be"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_soon(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    began = time.monotonic()
    assert message in refusal(folder)
    assert time.monotonic() - began < 10


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, hidden_size=64)
    assert "cannot be loaded" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nonesuch"}', "\x00"])
def test_a_broken_configuration(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "cannot be loaded" in refusal(folder)


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_a_broken_tokenizer(folder: Path, text: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    refusal(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    texts = ["Other ships, other harbours, other seas and yet more lighthouses on quite other coasts."] * 4
    train_bpe_tokenizer(texts, vocab_size=305, context_length=96).save_pretrained(folder)
    assert "has 305 entries and the model 300; use the tokenizer" in refusal(folder)


def test_an_encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    config = BertConfig(vocab_size=300, **shape)
    BertLMHeadModel(config).save_pretrained(folder)
    train_bpe_tokenizer(["a b c"], vocab_size=259, context_length=64).save_pretrained(folder)
    assert "does not attend as it is told to" in refusal(folder)


class Hostile:
    """Unpickled, it would leave a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_and_no_code_is_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    torch.save(Hostile(mark), folder / "pytorch_model.bin")
    assert "model.safetensors" in refusal(folder)
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    its_own = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change_config(folder, model_type="evil", auto_map=its_own)
    assert "cannot be loaded" in refusal(folder)
    assert not mark.exists()


# ---- names on the hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_name_in_offline_mode(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"model '{name}' is no folder here, the hub cannot be reached (")
    assert message.endswith("or a hub name that this machine can reach")


@pytest.mark.parametrize("name", ["", "two words", "x@y", "a//b", "-a-"])
def test_a_name_that_no_model_can_have(name: str) -> None:
    refusal(name)


COMMIT = "0123456789" * 4


class FakeHub(BaseHTTPRequestHandler):
    """A hub that serves ``folder`` as someone/served; other names meet a refusal, a fault, or no answer in time."""

    folder: Path
    requests: list[str]
    refusals: ClassVar = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "broken": (503, "")}

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        name = next((part for part in self.path.split("/") if part in ("served", "hangs", *self.refusals)), "missing")
        file = self.folder / self.path.rpartition("/")[2]
        if name == "hangs":
            time.sleep(3)  # longer than it is waited for
        if name in self.refusals:
            status, code = self.refusals[name]
            self.answer(status, {"X-Error-Code": code})
        elif self.path == "/api/models/someone/served":
            self.answer(200, {}, json.dumps({"id": "someone/served", "sha": COMMIT}).encode())
        elif self.path.startswith(f"/someone/served/resolve/{COMMIT}/") and file.is_file():
            self.answer(200, {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}, file.read_bytes())
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


NAMES = ("missing", "gated", "broken", "hangs", "cached", "served")
PROGRAM = """
import json, sys, torch
from preceptor.lm import load
from transformers.utils import logging

before = logging.get_verbosity(), logging.is_progress_bar_enabled()
for name in sys.argv[1:]:
    load.HUB_TIMEOUT = 0.5 if name.endswith("hangs") else 60.0  # the others answer, if late on a busy machine
    try:
        text = f"vocabulary of {load.load_language_model(name, device=torch.device('cpu')).vocab_size}"
    except ValueError as error:
        text = f"{type(error).__name__}: {error}"
    print(json.dumps(text))
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
"""


@dataclass(frozen=True)
class Session:
    """What a process that is not offline printed of each load, and what the hub was asked meanwhile."""

    texts: dict[str, str]
    errors: str
    requests: list[str]


@pytest.fixture(scope="module")
def session(make_lm: MakeLM, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One process for all names, since importing torch is what takes long; the hub's address is read at import."""
    folder = tmp_path_factory.mktemp("served")
    save(make_lm(), folder)
    change_config(folder, bos_token_id=50_256)  # Transformers has advice on that
    # The cache as the hub's client lays it out.
    cached = tmp_path_factory.mktemp("home") / "hub" / "models--someone--cached"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    handler = type("Handler", (FakeHub,), {"folder": folder, "requests": []})
    handler.refusals = {**FakeHub.refusals, "cached": (503, "")}
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # who waited for the one that hangs has left
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cached.parents[1]),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_VERBOSITY": "info",
        }
        command = [sys.executable, "-c", PROGRAM, str(folder), *(f"someone/{name}" for name in NAMES)]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        server.shutdown()
    texts = [json.loads(line) for line in finished.stdout.splitlines()]
    return Session(dict(zip(("folder", *NAMES), texts, strict=True)), finished.stderr, handler.requests)


def test_nothing_but_the_answer_is_printed(session: Session) -> None:
    """No bars on standard error, no advice; asserts in that process that the settings were put back."""
    assert session.errors == ""


def test_the_hub_serves_a_model(session: Session) -> None:
    assert session.texts["folder"] == session.texts["served"] == "vocabulary of 300"
    files = {request for request in session.requests if "/served/resolve/" in request}
    assert all(f"/resolve/{COMMIT}/" in request for request in files)
    assert f"GET /someone/served/resolve/{COMMIT}/model.safetensors" in files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no model 'someone/missing', neither as a folder here nor on the hub"),
        ("gated", "model 'someone/gated' is gated; accept its terms on the hub"),
        ("broken", "model 'someone/broken' is no folder here, the hub cannot be reached ("),
        ("hangs", "model 'someone/hangs' is no folder here, the hub cannot be reached ("),
    ],
)
def test_what_the_hub_says_is_passed_on_at_once(name: str, message: str, session: Session) -> None:
    assert session.texts[name].startswith(f"ModelError: {message}")
    assert "\n" not in session.texts[name]
    assert [request for request in session.requests if name in request] == [f"GET /api/models/someone/{name}"]


def test_a_model_downloaded_before_loads_while_the_hub_is_down(session: Session) -> None:
    assert session.texts["cached"] == "vocabulary of 300"
    assert [request for request in session.requests if "cached" in request] == ["GET /api/models/someone/cached"]


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_is_quiet_only_while_loading(folder: Path, bars: bool) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()

    def choose(verbosity: int, bars: bool) -> None:
        transformers_logging.set_verbosity(verbosity)
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()

    try:
        choose(logging.INFO, bars)
        load_language_model(str(folder), device=CPU)
        (folder / "tokenizer.json").unlink()
        refusal(folder)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled() == bars
        assert are_progress_bars_disabled() == (not bars)
    finally:
        choose(*before)


# ---- a base in 4 bits ------------------------------------------------------------------------------------------------


def test_4_bits_are_refused_in_one_line_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(
        ConfigError, match=r"4 bits need an NVIDIA GPU, got the device cpu; set `model.quantization` to"
    ):
        load_language_model("starter", device=torch.device("cpu"), adapter=Adapter(2), in_4bit=True)
    with pytest.raises(ConfigError, match="frozen and cannot learn; give it an adapter"):
        load_language_model("starter", device=cuda, in_4bit=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"a model in 4 bits needs .*'bitsandbytes'.*preceptor\[quantized\]"):
        load_language_model("starter", device=cuda, adapter=Adapter(2), in_4bit=True)


def test_the_command_refuses_4_bits_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "model.quantization=4bit", "--set", "model.adapter_rank=2"]
    words = ["run", "reading", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*words, *sets]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("preceptor: error: weights in 4 bits need an NVIDIA GPU")
    assert main([*words, *sets[:2]]) == 2
    assert "an adapter must learn; set `model.adapter_rank`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # those of bitsandbytes on a CPU
def test_an_adapter_learns_on_a_base_in_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes on a CPU too, slowly; so all but the device is seen here where it is installed."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # a kernel of a CPU alone, without gradient
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    train_bpe_tokenizer(["A hive has one queen."], vocab_size=300, context_length=64).save_pretrained(tmp_path)
    cpu, settings = torch.device("cpu"), load._in_4bit

    def on_a_cpu(device: torch.device, dtype: torch.dtype, adapter: Adapter | None) -> dict[str, Any]:
        return {**settings(torch.device("cuda"), dtype, adapter), "device_map": {"": device}}

    monkeypatch.setattr(load, "_in_4bit", on_a_cpu)
    lm = load_language_model(str(tmp_path), device=cpu, adapter=Adapter(2), in_4bit=True)
    tokens = torch.arange(40).reshape(2, 20)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    before = lm.forward(tokens, keep=keep).logits
    exact = load_language_model(str(tmp_path), device=cpu).forward(tokens, keep=keep).logits
    assert 0.001 < (before - exact).norm() / exact.norm() < 0.2  # rounded, and still that model
    assert not lm.has_engine  # it cannot read packed weights
    before.logsumexp(-1).sum().backward()
    learning = lm.trainable_parameters()
    assert all("lora_" in name for name in learning)
    assert all(bool(p.grad is not None and p.grad.ne(0).any()) for name, p in learning.items() if "lora_B" in name)
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(0.1)
        assert not torch.allclose(lm.forward(tokens, keep=keep).logits, before)
        assert torch.equal(lm.initial_model().forward(tokens, keep=keep).logits, before)  # the adapter switched off
