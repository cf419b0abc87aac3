"""Files of every kind, and what is message of damaged ones: an error with its line, never a traceback or a hang."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from forgebook.config.data_block import DataSource
from forgebook.data import readers
from forgebook.data.data_sources import Source, find_sources
from forgebook.data.examples import read_examples
from forgebook.data.images import check_image
from forgebook.errors import DataError, StorageError
from support_vision import draw

ROWS = [chat(f"question {k}", f"answer {k}") for k in range(5)]


def everything(path):
    """Read a path's rows, whatever is in their places."""
    return [
        (where, raw)
        for source in find_sources(str(path))
        for chunk in readers.split_source(source)
        for where, raw in readers.read_chunk(chunk)
    ]


def errors(path) -> list[str]:
    return [str(raw) for _, raw in everything(path) if isinstance(raw, DataError)]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_csv(path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["messages"])
        writer.writeheader()
        writer.writerows({"messages": json.dumps(row["messages"])} for row in ROWS)


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def write_parquet_of_json(path):
    pq.write_table(pa.table({"messages": [json.dumps(row["messages"]) for row in ROWS]}), path)


def write_jsonl_of_json(path):
    path.write_text("".join(json.dumps({"messages": json.dumps(row["messages"])}) + "\n" for row in ROWS))


def write_gzip(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.jsonl", write_jsonl),
        ("lines-in-a.json", write_jsonl),
        ("r.json", write_json),
        ("r.csv", write_csv),
        ("r.parquet", write_parquet),
        ("text-cells.parquet", write_parquet_of_json),
        ("r.jsonl.gz", write_gzip),
        ("text-cells.jsonl", write_jsonl_of_json),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    read = read_examples(str(tmp_path / name))
    assert [row.messages for row in read] == [row["messages"] for row in ROWS]
    assert len({row.where for row in read}) == 5 and read[0].where.startswith(f"{name}:")


@pytest.mark.parametrize(
    ("name", "delimiter"), [("r.tsv", "\t"), ("tabs.csv", "\t"), ("r.csv", ";"), ("r.tsv.gz", "\t"), ("r.csv.gz", ",")]
)
def test_cells_are_divided_by_what_the_header_has(tmp_path, name, delimiter):
    content = f"prompt{delimiter}completion\nq{delimiter}a\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    [row] = read_examples(str(tmp_path / name))
    assert [message["content"] for message in row.conversation] == ["q", "a"]


def test_gzip_of_other_kinds(tmp_path):
    write_csv(tmp_path / "a.csv")
    write_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert len(read_examples(str(tmp_path / f"{name}.gz"))) == 5


def test_a_hub_data_set_is_read_with_datasets(tmp_path):
    """No hub in the tests: the library reads a folder the same way."""
    write_jsonl(tmp_path / "train.jsonl")
    read = read_examples(f"hf://{tmp_path}:train")
    assert [row.messages for row in read] == [row["messages"] for row in ROWS]
    with pytest.raises(StorageError, match="the split is missing"):
        read_examples(f"hf://{tmp_path}")
    with pytest.raises(StorageError, match="could not be loaded"):
        read_examples(f"hf://{tmp_path}:no-such-split")
    with pytest.raises(StorageError, match="could not be loaded"):
        read_examples("hf://no-such-owner/no-such-set/main:train")


@pytest.mark.parametrize("kind", ["folder of images", "Parquet", "Parquet, lists"])
def test_images_of_a_hub_data_set_are_read_as_they_are_stored(kind, tmp_path):
    import datasets

    paths = [str(draw(tmp_path / f"drawn/{k}.png", size=(40 + k, 30))) for k in range(3)]
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    if kind == "folder of images":
        rows = [{"file_name": f"{k}.png", "messages": talk} for k in range(3)]
        (tmp_path / "drawn/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = tmp_path / "drawn"
    else:
        image, listed = datasets.Image(), kind == "Parquet, lists"
        columns = {"images": [[path] for path in paths]} if listed else {"image": paths}
        table = datasets.Dataset.from_dict(columns | {"messages": [talk] * 3})
        table = table.cast_column(*(("images", datasets.List(image)) if listed else ("image", image)))
        folder = tmp_path / "set"
        folder.mkdir()
        table.to_parquet(folder / "train.parquet")
    examples = read_examples(f"hf://{folder}:train", "vision_language")
    read = [check_image(one, tmp_path / "store") for row in examples for one in row.messages[0]["images"]]
    assert [(file.width, file.height) for file in read] == [(40, 30), (41, 30), (42, 30)]


def test_globs_and_mixes(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "other.txt"):
        write_jsonl(tmp_path / name)
    found = find_sources([str(tmp_path / "*.jsonl"), DataSource(path=str(tmp_path / "other.txt"), weight=0.5)])
    assert [(source.uri.rsplit("/", 1)[1], source.weight) for source in found] == [
        ("a.jsonl", 1), ("b.jsonl", 1), ("other.txt", 0.5),
    ]  # fmt: skip
    with pytest.raises(StorageError, match="matches no file"):
        find_sources(str(tmp_path / "*.parquet"))


def test_pieces_hold_every_line_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 150)
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"n": k, "x": "y" * (37 * k % 200)}) for k in range(50)))
    chunks = readers.split_source(Source(str(path)))
    read = [pair for chunk in chunks for pair in readers.read_chunk(chunk)]
    assert len(chunks) > 10
    assert [(where, raw["n"]) for where, raw in read] == [(f"r.jsonl:{k + 1}", k) for k in range(50)]


def test_the_pieces_of_a_file_are_alike_so_that_processes_end_together(tmp_path, monkeypatch):
    """A file of little more than a piece is four small ones, not a large and a tiny one; a small file is one."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10_000)
    path = tmp_path / "r.jsonl"
    for rows, pieces in ((90, 1), (110, 4), (450, 8)):
        path.write_text("\n".join(json.dumps({"x": "y" * 90}) for _ in range(rows)))
        chunks = readers.split_source(Source(str(path)))
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert len(sizes) == pieces and min(sizes) > 0.85 * max(sizes), sizes
    path.write_text("")
    assert readers.split_source(Source(str(path))) == []


def test_columns_of_parquet_give_no_keys_that_were_not_written(tmp_path):
    """Peers' point 22: a column's type has the keys of all rows, and fills them with nulls."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    asked = {"role": "user", "content": "q"}
    pq.write_table(pa.Table.from_pylist([*ROWS, {"messages": [asked, called]}]), tmp_path / "r.parquet")
    read = read_examples(str(tmp_path / "r.parquet"))
    assert read[0].messages == ROWS[0]["messages"]
    assert read[5].messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


# Damaged ----------------------------------------------------------------------------------------------


def test_a_truncated_gzip_names_the_last_line(tmp_path):
    packed = gzip.compress("".join(json.dumps(chat("q" * k, str(k))) + "\n" for k in range(2000)).encode())
    (tmp_path / "r.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"r\.jsonl\.gz:\d+: the gzip file is damaged or cut off here"):
        read_examples(str(tmp_path / "r.jsonl.gz"))


def test_byte_order_mark_and_windows_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert [row.where for row in read_examples(str(path))] == [f"r.jsonl:{k}" for k in (1, 3, 5, 7, 9)]


def test_a_line_of_50_megabytes_is_named_and_the_rest_read(tmp_path):
    path = tmp_path / "r.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f'{good}\n{{"messages": "{"x" * 50 * 2**20}"}}\n{good}\n')
    assert errors(path) == ["r.jsonl:2: a line of 50 MB, more than 16: split the text into lines"]
    assert [where for where, raw in everything(path) if isinstance(raw, dict)] == ["r.jsonl:1", "r.jsonl:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [}', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"messages": 1, "messages": 2}', "the key 'messages' is repeated"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}', "the key 'role' is repeated"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{", "not valid JSON.*: each line must be one JSON object"),
        (b'{"text": ' + b"[" * 150 + b"]" * 150 + b"}", "JSON nested more than 100 levels deep: flatten it$"),
        (b'{"messages": "' + b"[" * 5000 + b'"}', "messages: not valid JSON"),
        (b"null", "the row is a JSON null; expected an object"),
        (b'"text"', "the row is a JSON string"),
        (b'{"messages": [null]}', r"messages\[0\] is null; expected an object with role and content"),
        (b'{"messages": [{"role": null, "content": "x"}]}', r"messages\[0\]\.role is null"),
        (b'{"messages": {"role": "user"}}', "expected a non-empty list"),
    ],
)
def test_a_bad_line_is_reported_in_its_place(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"1 of 3 rows .*\n  r\.jsonl:2: .*{message}"):
        read_examples(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"messages": 1},\n {"messages": 2},\n oops]', r"r\.json:3: not valid JSON"),
        ('[{"a": 1}]\n[]', r"r\.json:1: there is text after the end"),
        ('[{"a": 1},\n', r"r\.json:2: not valid JSON"),
        ('[{"text": "\\ud800"},\n {"messages": 1}]', r"r\.json:1: half of a surrogate pair"),
        ("[" + "[" * 150 + "]" * 150 + "]", r"r\.json:1: JSON nested more than 100 levels"),
    ],
)
def test_a_damaged_json_array_is_reported_with_its_line(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(str(tmp_path / "r.json"))


def test_lines_of_a_csv_are_those_of_the_file(tmp_path):
    (tmp_path / "r.csv").write_bytes(b'prompt,completion\na,b\n\n\n"c\nc",d\r\ne,"f\r\n\r\nf"\ng,h\n')
    examples = read_examples(str(tmp_path / "r.csv"))
    assert [one.where.split(":")[1] for one in examples] == ["2", "5", "7", "10"]


def test_a_csv_whose_header_looks_like_an_array(tmp_path):
    (tmp_path / "r.csv").write_text("[id],prompt,completion\n1,a,b\n")
    assert read_examples(str(tmp_path / "r.csv"))[0].messages[1]["content"] == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'messages\n"[{oops"\n', r"r\.csv:2: messages: not valid JSON"),
        (b"prompt,completion\na,b,c\n", r"r\.csv:2: more or fewer cells than the header"),
        (b"prompt,completion\na,\xff\n", r"r\.csv:2: not UTF-8"),
        (b"prompt,\xff\na,b\n", r"r\.csv:2: not UTF-8"),
        (b'prompt,completion\n"a,b\n', r"r\.csv:2: not valid CSV"),
        (b'"prompt"x,completion\na,b\n', r"r\.csv:1: not valid CSV"),
    ],
)
def test_a_damaged_csv_is_reported_with_its_line(tmp_path, content, message):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(str(tmp_path / "r.csv"))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("r.csv", ["prompt,completion", "q,a", '"q"1,a', "q,b"], r"^r\.csv:3: not valid CSV"),
        ("r.csv", ["prompt,completion", "q,a", '"q,a', "q,b"], r"^r\.csv:3: not valid CSV"),
        ("r.json", ['[{"text": "a"},', '{"text": b},', '{"text": "c"}]'], r"^r\.json:2: not valid JSON"),
        ("r.json", ['[{"text": "a"}]', '[{"text": "b"}, {"text": "c"}]'], r"^r\.json:1: there is text after"),
    ],
)
def test_rows_that_cannot_be_counted_are_not_dropped(tmp_path, name, rows, message):
    """Such a file had lost all rows after the first bad one, and the run said that it dropped one."""
    (tmp_path / name).write_text("\n".join(rows))
    task = "causal_lm" if name == "r.json" else "instruction_tuning"
    for on_bad_rows in ("fail", "drop"):
        with pytest.raises(DataError, match=f"{message}.*Nothing after this can be read"):
            read_examples(str(tmp_path / name), task, on_bad_rows=on_bad_rows)


def test_a_damaged_page_of_parquet_is_reported_with_its_row(tmp_path):
    path = tmp_path / "r.parquet"
    rows = [chat(f"question {k} " + "x" * 50, f"answer {k}") for k in range(3000)]
    pq.write_table(pa.table({"messages": [json.dumps(row["messages"]) for row in rows]}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(0)
    begin = middle.dictionary_page_offset or middle.data_page_offset
    content[begin : begin + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^r\.parquet:1001: the Parquet file is damaged here \(.*Nothing after this"):
        read_examples(str(path), on_bad_rows="drop")


def test_text_in_parquet_that_is_not_utf8_is_reported_with_its_row(tmp_path):
    binary = pa.array([b"a", b"\xff\xfe", b"c"])
    wrong = pa.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    pq.write_table(pa.table({"prompt": ["q"] * 3, "completion": wrong}), tmp_path / "r.parquet")
    assert [where for where, raw in everything(tmp_path / "r.parquet") if isinstance(raw, dict)] == [
        "r.parquet:1", "r.parquet:3",
    ]  # fmt: skip
    assert "save text as UTF-8" in errors(tmp_path / "r.parquet")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("".join(map(json.dumps, ROWS)).encode("utf-16"), "UTF-16 or UTF-32 text: save the file as UTF-8"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "a pointer of Git LFS .*: run git lfs",
        ),
        (b"<!DOCTYPE html>\n<html>", "a web page, not a file of data"),
        (b"\n<HTML lang=en>", "a web page, not a file of data"),
        (json.dumps(ROWS[0], indent=2).encode(), "a JSON object over several lines; expected one object per line"),
    ],
    ids="utf-16 lfs html html-tag indented".split(),
)
def test_a_file_of_another_form_is_named_as_what_it_is(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(str(tmp_path / "rows.jsonl"))


def test_a_column_that_is_repeated_is_an_error(tmp_path):
    """Of two columns with one name only the last would be read."""
    (tmp_path / "r.csv").write_text("prompt,completion,completion\nq,a,b\n")
    with pytest.raises(DataError, match=r"r\.csv:1: the column 'completion' is repeated"):
        read_examples(str(tmp_path / "r.csv"))
    (tmp_path / "r.csv").write_text("prompt,completion,,\nq,a,,\n")
    assert len(read_examples(str(tmp_path / "r.csv"))) == 1
    table = pa.table([["q"], ["a"], ["b"]], names=["prompt", "completion", "completion"])
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet: the column 'completion' is repeated"):
        read_examples(str(tmp_path / "r.parquet"))


def test_names_in_capitals(tmp_path):
    (tmp_path / "R.CSV.GZ").write_bytes(gzip.compress(b"prompt,completion\nq,a\n"))
    assert len(read_examples(str(tmp_path / "R.CSV.GZ"))) == 1


@pytest.mark.parametrize("content", [b"PAR1 this is not parquet", b"\0\1\2\3" * 100])
def test_other_files_are_rejected(tmp_path, content):
    (tmp_path / "r.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable Parquet file|neither text nor Parquet"):
        read_examples(str(tmp_path / "r.parquet"))
