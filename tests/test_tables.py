"""Tables and prompt files as people bring them: encodings, separators, quotes, bad rows."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from pixart_jax import tables
from pixart_jax.errors import UserError
from pixart_jax.text import read_prompts


def read(path, data: bytes | str):
    """(rows without their places, reports)."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    reports = []
    rows = list(tables.rows(path, lambda *report: reports.append(report)))
    return [row for _, row in rows], reports


TABLE = "file_name,text\n000.jpg,a red circle\n001.jpg,b\n"
ROWS = [{"file_name": "000.jpg", "text": "a red circle"}, {"file_name": "001.jpg", "text": "b"}]


@pytest.mark.parametrize(
    "data",
    [
        TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", "|"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        TABLE.replace("file_name,text", " file_name , text "),
        TABLE.replace(",", ", ").replace("b", '"b"'),
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        TABLE.encode("utf-32"),
    ],
)
def test_separators_line_ends_and_byte_order_marks_of_csv(tmp_path, data):
    assert read(tmp_path / "t.CSV", data) == (ROWS, [])


@pytest.mark.parametrize(
    ("name", "data", "rows", "report"),
    [
        ("t.csv", 'a,b\n1,"open\n2,x\n3,y\n', 2, ("t.csv, line 2", "an unclosed quote")),
        ("t.csv", 'a,b\n1,"open\n2,x\n3,"y"\n', 2, ("t.csv, line 2", "text beside")),
        ("t.csv", 'a,b\n1,"two\nlines"\n2,x\n', 2, None),
        ("t.csv", "a,b\n1,2,3\n2,x\n", 1, ("t.csv, line 2", "3 fields under 2 columns")),
        ("t.csv", b"a,b\n1,caf\xe9\n", 1, ("t.csv, line 2", "U+FFFD")),
        ("t.csv", "a,b\n1,x\u2028y\x0bz\n", 1, None),
        ("t.jsonl", '{"a": 1}\n\n{"a": \n[1]\n{"a": 2}', 2, ("t.jsonl, line 3", "not valid JSON")),
        ("t.jsonl", "[" * 100_000, 0, ("t.jsonl, line 1", "not valid JSON")),
        ("t.jsonl", '{"a": "x\u2028y"}\n', 1, None),
        ("t.json", '[{"a": 1}, 3]', 1, ("t.json, entry 2", "int")),
    ],
)
def test_a_bad_row_is_reported_and_the_others_are_read(tmp_path, name, data, rows, report):
    found, reports = read(tmp_path / name, data)
    assert len(found) == rows
    if report is None:
        assert not reports
    else:
        assert reports[0][0] == report[0] and report[1] in reports[0][2]


def test_coco_and_kohya_json(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "x"}, {"image_id": 7, "caption": "y"}],
    }
    rows, _ = read(tmp_path / "captions_val2017.json", json.dumps(coco))
    assert [(row["file_name"], row["caption"]) for row in rows] == [("a.jpg", "x"), ("a.jpg", "y")]
    rows, _ = read(tmp_path / "meta_cap.json", json.dumps({"d/a.png": {"caption": "x"}}))
    assert rows == [{"file_name": "d/a.png", "caption": "x"}]


def test_parquet_leaves_out_bytes(tmp_path):
    table = pyarrow.table({"image": [{"bytes": b"\x89PNG", "path": "a.png"}], "text": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    rows = list(tables.rows(tmp_path / "t.parquet", lambda *_: None))
    assert rows == [("t.parquet, row 1", {"image": {"path": "a.png"}, "text": "x"})]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.csv", "prompt\na cat, sitting\n", "p.csv, line 2: unreadable row, 2 fields under 1"),
        ("p.csv", 'prompt,seed\n"a cat,1\na dog,2\n', "line 2: unreadable row, an unclosed quote"),
        ("p.csv", "prompt,seed\ncat,3e99\n", "line 2: seed '3e99' is not a whole number"),
        ("p.jsonl", '{"prompt": "x", "seed": 1e999}', "line 1: seed 'inf' is not a whole number"),
        ("p.jsonl", '{"prompt": "x", "height": %s}' % ("9" * 5000), "line 1: unreadable row"),
        (
            "p.jsonl",
            '{"prompt": "a red \\ud83d circle"}',
            r"line 1: prompt has an invalid character, '\ud83d', at 6",
        ),
        ("p.jsonl", '{"prompt": ["x"]}', "line 1: prompt ['x'] is not text"),
        ("p.jsonl", '{"text": "x"}', "line 1: no column 'prompt' (columns: text)"),
        ("p.jsonl", "[" * 100_000, "line 1: unreadable row"),
        ("p.txt", b"caf\xe9\n", "line 1: not UTF-8"),
        ("p.json", "{", "is not valid JSON"),
    ],
)
def test_a_bad_prompt_file_is_one_line(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "prompts"),
    [
        ("p.txt", "a red\x0bcircle\na blue\x0cstar\na green\u2028square\n", 3),
        ("p.txt", "a\r\nb\rc\n\n", 3),
        ("p.csv", "Prompt, Seed\na red circle, 4\n", 1),
        ("p.tsv", "prompt\tseed\na red circle\t3\n", 1),
        ("p.JSONL", '{"prompt": "a red\u2028circle"}\n{"prompt": "a blue star"}\n', 2),
        ("p.json", '[{"prompt": "a", "seed": 18446744073709551615}]', 1),
        ("p.csv", "prompt;height\na, b;64\n", 1),
    ],
)
def test_prompts_are_read_as_they_are_meant(tmp_path, name, data, prompts):
    (tmp_path / name).write_bytes(data.encode())
    assert len(read_prompts(tmp_path / name)) == prompts
