from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from preceptor.data.corpora.datasets import Source, hub_documents, read_sources, source_faults
from preceptor.errors import DataError, MissingExtraError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "plain.txt").write_text("A whole document.")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(5)))
    (tmp_path / "empty.jsonl").write_text("\n")
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """What ``load_dataset`` reads as it reads the hub: a folder of data files, one a split."""
    pytest.importorskip("datasets", reason="needs the extra datasets")
    folder = tmp_path / "on_the_hub"
    folder.mkdir()
    for split, num in (("train", 6), ("test", 2)):
        rows = [{"dialog": [f"{split} {n}", "yes"], "id": n} for n in range(num)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_local_sources_are_read_by_name(texts):
    sources = [Source("whole", "plain.txt"), Source("rows", "rows.jsonl", max_documents=3)]
    assert read_sources(sources, root=texts) == {"whole": ["A whole document."], "rows": ["row 0", "row 1", "row 2"]}


def test_absolute_locations_need_no_root(texts):
    assert read_sources([Source("whole", str(texts / "plain.txt"))])["whole"] == ["A whole document."]


def test_everything_that_is_wrong_is_said_at_once(texts):
    sources = [
        Source("good", "plain.txt"),
        Source("gone", "gone.jsonl"),
        Source("empty", "empty.jsonl"),
        Source("field", "rows.jsonl", adapter="article"),
        Source("hub", "someone/something"),
        Source("path", "../x/../y z"),
    ]
    with pytest.raises(DataError) as caught:
        read_sources(sources, root=texts)
    message = str(caught.value)
    assert "dataset 'gone':" in message
    assert "gone.jsonl does not exist" in message
    assert "dataset 'empty': empty.jsonl has no text" in message
    assert "dataset 'field':" in message
    assert "its fields are text" in message
    assert "hub dataset someone/something needs `max_documents`" in message
    assert "dataset 'path':" in message
    assert "good" not in message
    assert message.count("dataset '") == 5


def test_faults_that_need_no_reading():
    faults = source_faults(
        [
            Source("a", "x.txt", adapter="txt"),
            Source("a", "y.txt", join=0),
            Source("", ""),
            Source("b", "z.txt", max_documents=-1),
        ]
    )
    assert [fault.split(";")[0] for fault in faults] == [
        "dataset 'a' is listed twice",
        "dataset 'a': unknown adapter 'txt' (did you mean 'text'?)",
        "dataset 'a': `join` must be at least 1, got 0",
        "a dataset needs a name and a location, got '' at ''",
        "dataset 'b': `max_documents` must be at least 0, got -1",
    ]
    assert source_faults([]) == ["no dataset is listed; list at least one"]
    with pytest.raises(DataError, match="no dataset is listed"):
        read_sources([])


def test_hub_documents_are_those_of_the_split(hub):
    assert list(hub_documents(Source("d", str(hub), adapter="dialog", split="test"))) == ["test 0\nyes", "test 1\nyes"]
    assert len(list(hub_documents(Source("d", str(hub), adapter="dialog", join=4)))) == 2


def test_hub_rows_are_streamed_not_all_read(hub):
    (hub / "train.jsonl").rename(hub / "train-00000.jsonl")
    (hub / "train-00001.jsonl").write_text('{"broken"\n')
    documents = hub_documents(Source("d", str(hub), adapter="dialog"))
    assert [next(documents) for _ in range(6)] == [f"train {n}\nyes" for n in range(6)]
    with pytest.raises(DataError, match="cannot be read"):
        next(documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "split validation cannot be read .*check its name, subset and split"),
        ({"subset": "fr"}, "cannot be read .*fr"),
        ({"adapter": "text"}, r"split train, row 1: no such row .*its fields are dialog, id"),
        ({"location": "nobody/nothing-of-that-name"}, "nobody/nothing-of-that-name, split train cannot be read"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, changes, message):
    source = Source(**{"name": "d", "location": str(hub), "adapter": "dialog", "max_documents": 2} | changes)
    with pytest.raises(DataError, match=message):
        list(hub_documents(source))


def test_broken_hub_data_is_named(hub):
    (hub / "train.jsonl").write_text('{"dialog": ["first"]}\n{"broken"\n')
    with pytest.raises(DataError, match="cannot be read"):
        list(hub_documents(Source("d", str(hub), adapter="dialog")))


def test_a_dataset_that_is_code_is_not_run(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra datasets")
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be read"):
        list(hub_documents(Source("d", str(folder))))
    assert not (tmp_path / "ran").exists()


def test_a_hub_name_reaches_the_hub_reader(texts, hub, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return iter([{"text": f"row {n}"} for n in range(9)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("wiki", "Salesforce/wikitext", subset="wikitext-103-raw-v1", split="validation", max_documents=2)
    assert read_sources([source], root=texts) == {"wiki": ["row 0", "row 1"]}
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", True)]


def test_the_missing_extra_is_named(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'preceptor\[datasets\]'"):
        list(hub_documents(Source("d", "someone/something")))
    with pytest.raises(DataError, match=r"dataset 'd': .*preceptor\[datasets\]"):
        read_sources([Source("d", "someone/something", max_documents=1)], root=texts)


def test_real_corpora_are_read(test_data: Path):
    sources = [
        Source("books", "books.jsonl", adapter="book", join=8, max_documents=20),
        Source("cnn", "cnn_dailymail.jsonl", adapter="article", max_documents=20),
        Source("code", "code.jsonl", adapter="code", max_documents=20),
        Source("dialogues", "daily_dialog.jsonl", adapter="dialog", max_documents=20),
        Source("europarl", "europarl_en_fr.jsonl", adapter="english", join=4, max_documents=20),
        Source("shakespeare", "tinyshakespeare.txt"),
        Source("wikitext", "wikitext2_raw_test.jsonl", adapter="wikitext", max_documents=20),
    ]
    documents = read_sources(sources, root=test_data / "corpora")
    assert {name: len(texts) for name, texts in documents.items()} == dict.fromkeys(documents, 20) | {"shakespeare": 1}
    assert documents["europarl"][0].startswith("Resumption of the session")
    assert documents["dialogues"][0] == "The kitchen stinks .\nI'll throw out the garbage ."
    assert all(" @-@ " not in text for text in documents["wikitext"])
