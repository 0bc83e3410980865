from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.data.corpora.corpus import ADAPTERS, adapter_named, read_documents
from preceptor.errors import DataError


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    ("text", {"text": " Ice floats. "}, "Ice floats."),
    ("article", {"article": "(CNN) Ice.", "highlights": "no"}, "(CNN) Ice."),
    ("arxiv", {"title": "On ice", "abstract": "It floats."}, "On ice\n\nIt floats."),
    ("dialog", {"dialog": ["Cold ? ", " Yes ."]}, "Cold ?\nYes ."),
    ("english", {"translation": {"en": "ice", "fr": "glace"}}, "ice"),
    ("french", {"translation": {"en": "ice", "fr": "glace"}}, "glace"),
    ("code", {"path": "a.py", "text": "x = 1\n"}, "x = 1"),
    ("code", {"repo": "r", "content": "x = 2\n", "text": "no"}, "x = 2"),
    ("code", {"whole_func_string": "def f(): pass"}, "def f(): pass"),
    (
        "book",
        {"text": "It was\r\nthe best\nof times.\n\nIt was\nthe worst."},
        "It was the best of times.\n\nIt was the worst.",
    ),
    ("wikitext", {"text": ' He said : " well @-@ known " ( 1 ) . '}, 'He said: "well-known" (1).'),
    ("field:context", {"context": "Ice.", "question": "no"}, "Ice."),
]


@pytest.mark.parametrize(("adapter", "row", "expected"), ROWS)
def test_each_adapter_makes_a_document_of_its_row(adapter, row, expected, tmp_path):
    assert list(read_documents(jsonl(tmp_path / "rows.jsonl", [row]), adapter=adapter)) == [expected]


def test_every_adapter_is_tried():
    assert {adapter for adapter, *_ in ROWS} - {"field:context"} == set(ADAPTERS)


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_a_row_without_the_field_is_named(adapter, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"title_": "x"}])
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: no such row .*its fields are title_"):
        list(read_documents(path, adapter=adapter))


def test_what_is_absent_is_no_document_and_what_is_no_text_is_a_mistake(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": None}, {"text": "b"}])
    assert list(read_documents(path)) == ["b"]
    with pytest.raises(DataError, match="field 'text' holds int, not text"):
        list(read_documents(jsonl(tmp_path / "numbers.jsonl", [{"text": 3}])))


def test_rows_that_are_not_json_objects_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: not JSON"):
        list(read_documents(path))
    with pytest.raises(DataError, match=r"line 1: a list; a .jsonl file has one JSON object a line"):
        list(read_documents(jsonl(tmp_path / "lists.jsonl", [["a"]])))


def test_consecutive_rows_are_joined(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in ("a", "", "b", "c")])
    assert list(read_documents(path, join=2)) == ["a\n\nb", "c"]


def test_parquet_reads_as_jsonl_does(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"dialog": ["a", "b"]}, {"dialog": ["c"]}, {"dialog": []}] * 700  # more than are read at once
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = list(read_documents(jsonl(tmp_path / "rows.jsonl", rows), adapter="dialog"))
    assert list(read_documents(tmp_path / "rows.parquet", adapter="dialog")) == expected
    assert len(expected) == 1400
    with pytest.raises(DataError, match=r"rows.parquet, row 1: .*its fields are dialog"):
        list(read_documents(tmp_path / "rows.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad.parquet is no readable Parquet file"):
        list(read_documents(tmp_path / "bad.parquet"))


def test_a_folder_gives_its_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("second\n== heading ==\n\n\n\nend")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_text("no")
    assert list(read_documents(tmp_path)) == ["first", "second\n\nend"]


def test_faults_are_named(tmp_path):
    with pytest.raises(DataError, match=r"unknown adapter 'dialogue' \(did you mean 'dialog'\?\).* or field:NAME"):
        adapter_named("dialogue")
    with pytest.raises(DataError, match="unknown adapter 'field:'"):
        adapter_named("field:")
    with pytest.raises(DataError, match="does not exist"):
        list(read_documents(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        list(read_documents(tmp_path / "latin.txt"))
