"""2,000 damaged data files: their rows are read or refused with their place, in readable words; none hangs."""

import csv
import gzip
import io
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import support_fuzz as fuzz
from conftest import REPOSITORY, TINY_MODEL, config_for
from forgebook.data import readers
from forgebook.data.data_sources import find_sources
from forgebook.data.examples import read_examples
from forgebook.errors import DataError
from forgebook.planning.prepare import check_rows
from forgebook.planning.token_count import count_data

INPUTS, SEED = 2000, int(os.environ.get("FUZZ_SEED", "14"))
# Not the receipts: the page on images makes them, so they are not in every checkout.
FILES = [path for path in sorted((REPOSITORY / "data").rglob("*.jsonl")) if path.parent.name != "receipts"]
TASKS = ("instruction_tuning", "causal_lm", "preference_tuning", "classification")
LABELS = ("yes", "no")
COMPRESSIONS = ("none", "snappy", "gzip", "zstd")
ALSO = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "tools": "[]"},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
    {"prompt": "p", "completion": "yes", "n": 3, "day": "2024-06-01"},
    {"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"text": "plain text\twith; signs, and \"quotes\""},
    {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", "train": false}]'},
]  # fmt: skip


@pytest.fixture(scope="module")
def seeds():
    """Real rows of each kind, and small ones of the other formats."""
    rows = []
    for path in FILES:
        with open(path) as file:
            rows.append([json.loads(file.readline()) for _ in range(6)])
    return [*rows, *([row] * 3 for row in ALSO)]


def lines_of(rows) -> bytes:
    return fuzz.encode("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table_of(rows, delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return text.getvalue().encode()


def parquet_of(rows, generator: random.Random) -> bytes:
    file = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows), file, row_group_size=generator.choice((1, 3, 100)),
        compression=generator.choice(COMPRESSIONS), use_dictionary=generator.random() < 0.5,
        data_page_version=generator.choice(("1.0", "2.0")), write_page_checksum=generator.random() < 0.2,
    )  # fmt: skip
    return file.getvalue().to_pybytes()


def damaged(rows, generator: random.Random) -> tuple[str, bytes]:
    """Write rows as a file of some kind, damaged in its bytes, its signs or its values; return its name, too."""
    kind = generator.choice(("jsonl", "jsonl", "json", "csv", "tsv", "parquet", "parquet", "jsonl.gz", "csv.gz"))
    if kind == "parquet":
        data = parquet_of(rows, generator)
        # Half of them in the pages alone: a damaged footer hides those.
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little") if generator.random() < 0.5 else len(data)
        return "r.parquet", fuzz.damage_bytes(data[:footer], generator) + data[footer:]
    if kind[:3] in ("csv", "tsv"):
        data = table_of(rows, "\t" if kind == "tsv" else ",")
    else:
        if in_values := generator.random() < 0.5:
            k = generator.randrange(len(rows))
            rows = [*rows[:k], fuzz.damage_values(rows[k], generator), *rows[k + 1 :]]
        data = fuzz.encode(json.dumps(rows, indent=1, ensure_ascii=False)) if kind == "json" else lines_of(rows)
        if in_values:
            return f"r.{kind}", gzip.compress(data, 1) if kind.endswith(".gz") else data
    if generator.random() < 0.6:
        data = fuzz.encode(fuzz.damage_tokens(data.decode(), generator))
    else:
        data = fuzz.damage_bytes(data, generator)
    if kind.endswith(".gz"):
        data = gzip.compress(data, 1)
        return f"r.{kind}", fuzz.damage_bytes(data, generator) if generator.random() < 0.5 else data
    return f"r.{kind}", data


def task_of(row: dict, generator: random.Random) -> str:
    """Choose a task, in most cases one that these rows are for."""
    if generator.random() < 0.3:
        return generator.choice(TASKS)
    if "chosen" in row:
        return "preference_tuning"
    return "causal_lm" if "text" in row else generator.choice(("instruction_tuning", "instruction_tuning", "causal_lm"))


def use(path, task: str) -> None:
    """Do what a run, preview and plan do with the rows before they are tokenized."""
    for source in find_sources(str(path)):
        for chunk in readers.split_source(source):
            for where, raw in readers.read_chunk(chunk):
                # Messages and the data report are files of UTF-8; what is read can be written again.
                (str(raw) if isinstance(raw, DataError) else json.dumps(raw, ensure_ascii=False, default=str)).encode()
                assert int(where.rpartition(":")[2]) > 0
    labels = {"classifier_config": {"label_tokens": list(LABELS)}} if task == "classification" else {}
    paths = {"train_path": str(path), "storage_path": str(path.parent / "runs"), "run_name": "run"}
    config = config_for(str(TINY_MODEL), task=task, **paths, **labels)
    count_data(config)
    try:
        check_rows(config)
    finally:
        read_examples(str(path), task, None, LABELS if task == "classification" else (), "drop")


@pytest.mark.slow
def test_a_damaged_file_is_read_or_refused(tmp_path, monkeypatch, seeds):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))
    generator, answers = random.Random(SEED), {}
    before = fuzz.peak_megabytes()
    for k in range(INPUTS):
        rows = generator.choice(seeds)
        name, data = damaged(rows, generator)
        path = tmp_path / name
        path.write_bytes(data)
        task = task_of(rows[0], generator)
        answers[k] = fuzz.answer_to(lambda path=path, task=task: use(path, task))
    counts, wrong = fuzz.report(answers)
    assert not wrong, "\n".join(wrong)
    assert counts["fine"] > INPUTS // 20 and counts["refused"] > INPUTS // 4
    assert fuzz.peak_megabytes() - before < fuzz.MEGABYTES
