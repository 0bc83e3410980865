"""Reading from the command line: what it refuses, in one line and without a trace, and what it takes in its stride."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.cli import main
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.export import load_model
from preceptor.runs.folder import open_run
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.reading import loop
from preceptor.systems.reading.articles import bundled_article, select_pairs, tokenize_article
from preceptor.systems.reading.config import DataOptions
from preceptor.systems.reading.environment import run_episodes
from preceptor.systems.reading.policy import load_policy
from preceptor.systems.reading.setup import Setup

QUICK = (
    "data.num_pairs=3", "data.num_probes=1", "episode.batch_size=4", "episode.query_tokens=2", "update.steps=2",
    "evaluation.every=1", "evaluation.num_episodes=2", "evaluation.num_orders=3", "evaluation.best_of=1",
    "evaluation.beam_width=1", "save_every=1",
)  # fmt: skip

Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Arguments of a quick run of the tiny model in ``tmp_path/run``; options given later win."""
    monkeypatch.setenv("PRECEPTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def arguments(*options: str, settings: tuple[str, ...] = ()) -> list[str]:
        sets = [argument for setting in (*QUICK, *settings) for argument in ("--set", setting)]
        common = ["run", "reading", "--model", str(tiny_folder), "--out", "run", "--threads", "1", "--no-report"]
        return [*common, *sets, *options]

    return arguments


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], *, exit_code: int = 2) -> str:
    """The one line that is said."""
    assert main(arguments) == exit_code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("preceptor: error: ")
    return lines[0]


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def sentences(count: int) -> str:
    """As many sentences, each with its number in words, in one line."""
    numerals = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return " ".join(
        f"The birds of group {' '.join(numerals[int(digit)] for digit in str(number))} sing well."
        for number in range(count)
    )


# ---- inputs that cannot be used --------------------------------------------------------------------------------------

ARTICLES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "white": (" \n\n \t\n", "is empty"),
    "one sentence": ("The birds of the north sing well.", "too short for one pair"),
    "two sentences": (sentences(2), "has 1 usable pairs, and at least 2 are to be read"),
    "binary": (b"\x7fELF\0\0\0" * 99, "is binary"),
    "latin-1": ("Die Vögel singen. Sie fliegen.".encode("latin-1"), "is not UTF-8"),
    "utf-16": (sentences(20).encode("utf-16"), "is UTF-16"),
    "unbroken": ("x" * 1_000_000, "without a space"),
    "only links": ("<html><body><script>alert(1)</script></body></html>", "article"),
}


@pytest.mark.parametrize("kind", ARTICLES)
def test_an_article_that_cannot_be_read_is_refused_and_leaves_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content, text = ARTICLES[kind]
    path = written(tmp_path / "article.txt", content)
    assert text in refusal(capsys, command("--article", path))
    assert not (tmp_path / "run").exists()


FAULTS: dict[str, tuple[list[str], int, str]] = {
    "no such article": (["--article", "./nothing.txt"], 2, "nothing.txt"),
    "a folder as article": (["--article", "."], 2, "is a folder"),
    "no network": (["--article", "Alan Turing"], 6, "wikipedia.org"),
    "no such folder": (["--train-articles", "nowhere"], 2, "is not a folder of articles"),
    "empty folder": (["--eval-articles", "."], 2, "there is no article in the folder"),
    "both": (["--article", "a.txt", "--train-articles", "b"], 2, "exclude each other"),
    "no such model": (["--model", "./nothing"], 2, "model folder ./nothing does not exist"),
    "no model in the folder": (["--model", "."], 2, "has no config.json"),
    "no hub": (["--model", "nobody/nothing"], 2, "nobody/nothing"),
    "no such reader": (["--set", "reward.reader=./nothing"], 2, "model folder ./nothing does not exist"),
    "no such layer": (["--set", "selection.layer=7"], 2, "`layer` must lie in -2..1"),
    "no key": (["--set", "selection.embedder=openai"], 2, "set the environment variable OPENAI_API_KEY"),
    "over the context": (
        ["--set", "data.num_pairs=0", "--set", "episode.query_tokens=150"], 2,
        "do not fit the context of 1024 tokens: ",
    ),
    "budget over the pairs": (["--set", "episode.budget=4"], 2, "`episode.budget` must be at most `data.num_pairs`"),
    "unknown key": (["--set", "update.learning_rat=1"], 2, "did you mean 'update.learning_rate'?"),
    "unknown preset": (["--preset", "smok"], 2, "did you mean 'smoke'?"),
    "unknown option": (["--artcle", "x"], 2, "did you mean '--article'?"),
    "too long a name": (["--article", "x" * 5000], 2, "neither a path nor a title"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_input_is_one_line_with_its_exit_code_and_leaves_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options, exit_code, text = FAULTS[kind]
    assert text in refusal(capsys, command(*options), exit_code=exit_code)
    assert not (tmp_path / "run").exists()


def test_the_gap_is_measured_now_and_then_and_at_the_end(command: Command) -> None:
    assert main(command(settings=("update.steps=5", "evaluation.every=2"))) == 0
    measured = [row["step"] for row in read_jsonl(Path("run/metrics.jsonl")) if "gap_closed_train" in row]
    assert measured == [2, 4, 5]


def test_a_policy_may_write_no_control_token(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Setup] = []
    real = loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *given: (prepared.append(real(*given)), prepared[0])[1])
    assert main(command(settings=("update.steps=1",))) == 0
    (setup,) = prepared
    lm = setup.policy.lm
    assert {*lm.special_tokens} <= {*lm.never_drawn} == {*setup.policy.sampling.suppressed}
    assert setup.initial_policy.sampling == setup.policy.sampling


def test_a_budget_over_all_pairs_of_an_article_is_refused_before_the_first_step(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "birds.txt", sentences(12))
    settings = ("data.num_pairs=0", "episode.budget=6")
    line = refusal(capsys, command("--article", path, settings=settings))
    assert "`episode.budget` must lie in 1..5 for birds, which has 5 pairs, got 6" in line
    assert not (tmp_path / "run").exists()


def test_over_the_context_says_a_number_that_then_fits(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("data.num_pairs=0", "episode.query_tokens=150")
    line = refusal(capsys, command(settings=settings))
    match = re.search(r"(\d+) pairs of .* do not fit the context of 1024 tokens: (\d+) do; lower data\.num_pairs", line)
    assert match, line
    assert 2 <= int(match[2]) < int(match[1])
    assert main(command(settings=(settings[1], f"data.num_pairs={match[2]}", "update.steps=0"))) == 0


def test_after_a_refusal_the_same_folder_can_be_used(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()  # made by the user, who keeps it
    for _ in range(2):
        refusal(capsys, command("--article", "./nothing.txt"))
    assert main(command()) == 0
    capsys.readouterr()
    assert "already holds a run" in refusal(capsys, command())  # what has begun is never thrown away
    assert (tmp_path / "run" / "result.json").is_file()


def test_a_notice_before_the_refusal_does_not_keep_the_folder(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "birds.txt", sentences(6))  # three pairs, fewer than are asked for
    assert main(command("--article", path, settings=("data.num_pairs=8", "selection.layer=7"))) == 2
    said = capsys.readouterr().err
    assert "'birds' is short: " in said
    assert not (tmp_path / "run").exists()


def test_a_refusal_leaves_no_folder_of_the_default_name(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("--article", "./nothing.txt")
    at = arguments.index("--out")
    refusal(capsys, arguments[:at] + arguments[at + 2 :])
    assert not list((tmp_path / "runs").iterdir())


def test_weights_that_are_cut_short_or_not_finite(
    command: Command, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny_folder, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(capsys, command("--model", str(cut)))

    nan = tmp_path / "nan"
    shutil.copytree(tiny_folder, nan)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(nan)
    capsys.readouterr()
    line = refusal(capsys, command("--model", str(nan)), exit_code=3)
    assert "NaN" in line


# ---- a run that is there already -------------------------------------------------------------------------------------


def test_a_run_in_use_is_left_alone(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command()) == 0
    capsys.readouterr()
    with open_run(tmp_path / "run", quiet=True):
        assert "in use by pid" in refusal(capsys, ["resume", "run"], exit_code=4)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    result = (tmp_path / "run" / "result.json").read_text()
    weights = tmp_path / "run" / "checkpoints" / "step-000002" / "policy.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    (tmp_path / "run" / "result.json").unlink()
    capsys.readouterr()
    assert main(["resume", "run", "--no-report"]) == 0
    said = capsys.readouterr().err
    assert "checkpoint step-000002 is damaged (policy.safetensors: sha256 differs); using step-000001" in said
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(result)

    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    assert "no usable checkpoint" in refusal(capsys, ["resume", "run"], exit_code=5)


def test_a_full_disk_is_said_and_the_run_goes_on_later(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = shutil.disk_usage, []

    def full(path: Any) -> Any:
        calls.append(path)
        usage = real(path)
        return usage if len(calls) < 2 else usage._replace(free=100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        assert main(command()) == 5
    said = capsys.readouterr().err
    assert "disk full: checkpoint step-000002" in said
    assert "checkpoint step-000001 is intact" in said
    assert "Traceback" not in said
    assert main(["resume", "run", "--no-report"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


def test_a_failure_of_the_first_step_keeps_the_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs were sound and something was computed: what is there is resumed, not thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        assert main(command()) == 5
    assert (tmp_path / "run" / "manifest.json").is_file()
    assert main(["resume", "run", "--no-report"]) == 0
    capsys.readouterr()


# ---- articles that are strange and readable --------------------------------------------------------------------------

HOSTILE = "\n\n".join(
    f"{text} stands at the head of this sentence. And {text} may also follow in the next one."
    for text in (
        "<script>alert(1)</script>", "<|begin|> with <|end|>", "</s> or <unk>",
        "\u202eThe reversed mark\u202c", "{title} {0} %s",
        "A \"quoted\" 'word' & more", "The path ../../etc/passwd", "An emoji 👩‍👩‍👧", "$(reboot) and `reboot`",
        "{{ 7*7 }}",
    )
)  # fmt: skip


def test_a_hostile_article_is_read_as_text_and_shown_as_text(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "<script>x.txt", HOSTILE)
    arguments = command("--article", path, settings=("data.num_pairs=6", "data.num_probes=2"))
    arguments.remove("--no-report")
    assert main(arguments) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<script>x" not in page
    assert "49" not in re.findall(r"\{\{.*?\}\}|49 may", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    special = {0, 1, 2}
    for row in map(json.loads, (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()):
        for span in row["policy_spans"]:
            if span["kind"] in ("value", "query"):
                assert not special & set(row["policy_token_ids"][span["start"] : span["end"]])
        assert not special & set(row["reader_token_ids"][1:])
    capsys.readouterr()


def test_a_line_of_a_megabyte_is_read(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "long.txt", sentences(26_000))
    assert (tmp_path / "long.txt").stat().st_size > 1_000_000
    assert main(command("--article", path, settings=("update.steps=1",))) == 0
    capsys.readouterr()


def test_chunks(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("data.pairing=chunks", "data.key_tokens=10", "data.value_tokens=16")
    assert main(command(settings=settings)) == 0
    (article,) = json.loads((tmp_path / "run" / "articles.json").read_text()).values()
    assert len(article["pairs"]) == 3
    text = " ".join(bundled_article().text.split())
    for pair in article["pairs"]:
        assert " ".join(pair["value"].split()) in text
    capsys.readouterr()


@pytest.mark.parametrize(
    "settings",
    [
        ("selection.embedder=attention",),
        ("reward.kind=probe", "reward.context=queries", "episode.budget=2"),
        ("update.reward_filter=best_fraction", "update.advantage=leave_one_out", "update.micro_batch_size=3"),
        ("selection.projection=false", "selection.centre=false", "selection.temperature=1", "update.optimizer=adam"),
        ("reward.credit=trajectory", "reward.pair_baseline=false", "update.query_kl_coefficient=0"),
        ("model.dtype=bfloat16",),
    ],
    ids=" ".join,
)
def test_other_configurations_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    assert main(command(settings=settings)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not any("nonfinite" in row for row in rows)
    capsys.readouterr()


# ---- what a run leaves -----------------------------------------------------------------------------------------------

METRICS = {
    "step", "article", "reward", "normalised_reward", "reward_values_context", "reward_queries_context",
    "reward_by_position", "passed_fraction", "policy_loss", "value_kl", "query_kl", "gradient_norm", "query_entropy",
    "query_entropy_maximum", "selection_entropy", "gap_closed_train", "tokens_per_second", "peak_memory_mib",
}  # fmt: skip


def test_smoke_takes_under_a_minute_and_leaves_every_file(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE_DIR", str(tmp_path / "cache"))
    bundled = (resources.files("preceptor") / "starter" / "model.safetensors").is_file()
    model = [] if bundled else ["--model", str(tiny_folder)]
    began = time.process_time()
    assert main(["run", "reading", "--preset", "smoke", "--out", str(tmp_path / "run"), "--threads", "1", *model]) == 0
    assert time.process_time() - began < 60
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} >= {
        "articles.json", "checkpoints", "config.yaml", "decisions.jsonl", "manifest.json", "metrics.jsonl",
        "model", "report.html", "result.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]) >= METRICS
    result = json.loads((folder / "result.json").read_text())
    assert set(result) >= {"system", "status", "config", "seeds", "arms", "gap_closed", "verdict"}
    for metric in ("order_gain", "selection_gain", "progress_auc", "reward"):
        assert set(result["arms"]["learned"][metric]) >= {"mean", "low", "high", "unit", "n"}
    assert set(result["gap_closed"]) == {"train", "held_out"}
    said = capsys.readouterr().out
    assert "learned" in said
    assert "random" in said
    assert result["verdict"].split(".")[0] in " ".join(said.split())


def test_metrics_are_what_their_names_say(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step's means, from the decisions of the same step."""
    assert main(command(settings=("reward.context=queries", "update.steps=1"))) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    decisions = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()][:4]

    def mean(values: Any) -> float:
        values = list(values)
        return sum(values) / len(values)

    assert row["reward"] == pytest.approx(mean(d["reward"] for d in decisions), abs=1e-6)
    assert row["reward_queries_context"] == pytest.approx(row["reward"], abs=1e-6)
    assert row["reward_values_context"] != pytest.approx(row["reward"], abs=1e-4)
    for position in range(3):
        values = [
            [span for span in d["reader_spans"] if span["kind"] == "value"][position]["log_probs"] for d in decisions
        ]
        assert row["reward_by_position"][position] == pytest.approx(mean(map(mean, values)), abs=1e-5)
    import math

    entropies = [
        -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(3 - step)
        for d in decisions
        for step, probabilities in enumerate(d["selection_probabilities"][:2])  # the last choice is none
    ]
    assert row["selection_entropy"] == pytest.approx(mean(entropies), abs=1e-5)
    assert row["query_entropy_maximum"] == pytest.approx(math.log(700 - 3))
    assert row["episodes"] == 4
    assert row["passed_fraction"] == 1.0
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks Transformers for it
@pytest.mark.parametrize("adapter_rank", [0, 2])
def test_what_was_learned_comes_out(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter_rank: int
) -> None:
    """``model/`` loads in Transformers and reproduces what was recorded; with the selection, it reads in the order."""
    settings = (f"model.adapter_rank={adapter_rank}", "update.learning_rate=1e-2", "update.steps=3")
    assert main(command(settings=settings)) == 0
    folder, special = tmp_path / "run", [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    learned = [row for row in decisions if row["arm"] == "learned" and row["episode"] >= 3 * 4]
    assert len(learned) == 2
    for row in learned:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["policy_token_ids"]])).logits[0]
        logits[:, special] = -torch.inf
        log_probs = logits.log_softmax(-1)
        for span in row["policy_spans"]:
            if span["kind"] == "query":
                tokens = row["policy_token_ids"][span["start"] : span["end"]]
                found = [float(log_probs[span["start"] + at - 1, token]) for at, token in enumerate(tokens)]
                assert found == pytest.approx(span["sampled_log_probs"], abs=1e-5)

    lm = LanguageModel(*load_model(folder / "model"), name="learned")
    policy, keys = load_policy(folder / "model", lm)
    assert policy.temperature == learned[0]["temperature"]
    ((name, order),) = json.loads((folder / "result.json").read_text())["order"].items()
    pairs = select_pairs(bundled_article(), DataOptions(num_pairs=3, num_probes=1), lm, name=name)
    article = tokenize_article(pairs, lm, prompt="{title}\n", use_chat_template=True)
    trajectories = run_episodes(
        policy, article, keys[name], num_episodes=1, budget=3, query_tokens=2,
        generators={"query": torch.Generator()}, greedy=True,
    )  # fmt: skip
    assert trajectories.order.tolist() == [order]
    assert sorted(order) == [0, 1, 2]
    capsys.readouterr()


# ---- chat templates -------------------------------------------------------------------------------------------------

CLOCK = (
    "{% for message in messages %}{% if loop.first %}<|begin|>{{ strftime_now('%H:%M:%S.%f') }}\n{% endif %}"
    "{{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
)


def test_a_template_that_reads_the_clock_is_rendered_once(
    tiny_folder: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CLOCK
    tokenizer.save_pretrained(folder)
    assert main(command("--model", str(folder))) == 0
    run = tmp_path / "run"
    kept = json.loads((run / "chat_markers.json").read_text())
    assert list(kept) == [str(folder)]
    result = (run / "result.json").read_bytes()
    assert main(["replay", str(run)]) == 0
    # A resume goes on under the prompt that the run began with.
    (run / "result.json").unlink()
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert main(["resume", str(run), "--no-report"]) == 0
    assert json.loads((run / "chat_markers.json").read_text()) == kept
    assert (run / "result.json").read_bytes() == result
    assert main(["replay", str(run)]) == 0
    capsys.readouterr()


def test_chat_values_read_as_the_template_renders_them(tiny_folder: Path) -> None:
    lm = load_language_model(str(tiny_folder), device=torch.device("cpu"))
    lm.tokenizer.chat_template = CLOCK.replace("strftime_now('%H:%M:%S.%f')", "'noon'")
    pairs = select_pairs(bundled_article(), DataOptions(num_pairs=4), lm, name="it")
    article = tokenize_article(pairs, lm, prompt="Read {title}.", use_chat_template=True)
    tokens = article.policy_sequence([2, 0], [lm.encode("one"), lm.encode("two")]).tokens
    texts = [f"Read {pairs.title}.", "one", pairs.values[2], "two", pairs.values[0]]
    conversation = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    rendered = lm.tokenizer.apply_chat_template(conversation, tokenize=False)
    assert lm.decode(tokens) == rendered.removesuffix("\n")
    assert tokens == tuple(lm.tokenizer(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"])


def test_keys_that_all_read_the_same_are_told(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.txt").write_text("It tells of boats and lamps. " * 30)
    assert main(command("--article", "page.txt")) == 0
    assert "every key of 'page' reads the same" in capsys.readouterr().err


def test_what_is_left_out_and_another_language_are_told(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"Der Hafen der Stadt wurde im {n}. Jahr von den Leuten gebaut und nicht mit dem Fluss." for n in range(10, 30)
    ]
    (tmp_path / "page.txt").write_text(" ".join(lines) + " Ja.")
    assert main(command("--article", "page.txt")) == 0
    said = capsys.readouterr().err
    assert "sentences of 'page' cannot be read: " in said
    assert "shorter than 15 characters" in said
    assert "'page' reads like 'de', and its sentences are split as 'en'; set data.language=de" in said
