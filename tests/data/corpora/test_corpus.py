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
    with pytest.raises(DataError, match=r"line 1: a list; such a file has one JSON object a line"):
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


def test_json_and_tables_give_their_rows(tmp_path):
    rows = [{"body": "Gulls cry,"}, {"body": 'and "sing".\nLoudly.'}]
    array, lines, table, tabs = (tmp_path / f"rows.{suffix}" for suffix in ("json", "ndjson", "csv", "tsv"))
    array.write_text(json.dumps(rows, indent=1))
    table.write_text('id,body\n1,"Gulls cry,"\n2,"and ""sing"".\nLoudly."\n')
    tabs.write_text('id\tbody\n1\tGulls cry,\n2\t"and ""sing"".\nLoudly."\n')
    for path in (array, jsonl(lines, rows), jsonl(tmp_path / "lines.JSON", rows), table, tabs):
        assert list(read_documents(path, adapter="field:body")) == [row["body"] for row in rows]
    table.write_text("body\n" + "x" * 200_000 + "\n")  # longer than the csv module takes unasked
    assert list(map(len, read_documents(table, adapter="field:body"))) == [200_000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1]", "row 1: a int; such a file is an array of objects"),
        ("a.json", "[", "a.json: not JSON"),
        ("a.json", '{"a":\n 1}', "line 1: not JSON"),
        ("a.csv", "text\na,b\n", "line 2: more cells than the 1 fields"),
        ("a.csv", 'text\n"a', "line 1: unexpected end of data"),
        ("a.csv", "body\na\n", "line 2: no such row .*its fields are body"),
        ("a.docx", "x", "'.docx' files are not understood; rows come as .jsonl"),
        ("a.jsonl.gz", "x", "'.gz' files are not understood"),
        ("a.jsonl", '{"text": "a \\ud83d b"}', r"line 1: '\\ud83d' at character 2 is half a character"),
        ("a.jsonl", '{"n": ' + "7" * 6_000 + "}", "line 1: not JSON .*digits"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_an_adapter_is_for_rows(tmp_path):
    (tmp_path / "a.txt").write_text("It rains.")
    with pytest.raises(DataError, match=r"a\.txt is plain text, which has no rows for the adapter 'field:body'"):
        list(read_documents(tmp_path / "a.txt", adapter="field:body"))


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ("Hi. Hello.", "holds str, not a list"),
        (["Hi.", None], "a turn of NoneType"),
        ([{"a": "Hi."}], "a turn of dict"),
    ],
)
def test_a_dialogue_is_a_list_of_texts(tmp_path, dialog, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: .*{message}"):
        list(read_documents(jsonl(tmp_path / "rows.jsonl", [{"dialog": dialog}]), adapter="dialog"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in [("a.txt", "== Title ==\nIt rains."), ("b.jsonl", '{"text": "It rains."}\n')]:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert list(read_documents(tmp_path / name)) == ["It rains."]
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbftext\nIt rains.\n")
    assert list(read_documents(tmp_path / "c.csv")) == ["It rains."]


def test_a_cloned_dataset_gives_its_rows_and_not_its_card(tmp_path):
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "LICENSE").write_text("As you like.")
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "train-1.jsonl", [{"text": "second"}])
    jsonl(tmp_path / "data" / "train-0.jsonl", [{"text": "first"}])
    (tmp_path / ".git").mkdir()
    jsonl(tmp_path / ".git" / "x.jsonl", [{"text": "no"}])
    assert list(read_documents(tmp_path)) == ["first", "second"]
