"""Near duplicates by embeddings: of a column, a file or an endpoint; planted ones are found, and at which recall."""

import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import REPOSITORY, chat
from forgebook.config.parse import load_config
from forgebook.curation import embeddings
from forgebook.curation.curate import curate
from forgebook.errors import ConfigError, DataError
from support_endpoint import endpoint

THINGS = "kettle drum lamp sofa violin printer carpet phone".split()
# The same question in other words. By their words (similarity: 1) none of the examples are near duplicates.
FIRST = "How do I send the {} back to your shop when it arrives broken?"
SECOND = "My new {} came in pieces. What is the way of returning such a thing?"
ANSWER = "Put it in its box, print the label from our page, and bring both to the nearest post office."


def rows_of():
    """Sixteen examples: the second eight ask what the first eight did. One asks the same about a number."""
    questions = [text.format(thing) for text in (FIRST, SECOND) for thing in THINGS]
    rows = [chat(question, ANSWER) for question in questions]
    return [*rows, chat(FIRST.format("kettle 300"), ANSWER)]


def meaning(text):
    """Embed a text by the thing it is about, and a little by its words."""
    vector = np.random.default_rng(zlib.crc32(text.encode())).normal(size=32) * 0.02
    thing = next((k for k, one in enumerate(THINGS) if one in text), 0)
    return vector + np.eye(32)[thing]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEBOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_npy(tmp_path):
    def call(rows, name="vectors.npy"):
        np.save(tmp_path / name, matrix(rows))
        return tmp_path / name

    return call


@pytest.fixture
def run(write_rows, tmp_path):
    def call(rows, *settings, valid=None):
        validation = write_rows(valid, "valid.jsonl") if valid else "null"
        config = load_config(REPOSITORY / "training_configs/tiny/quickstart.yaml", [
            f"train_path={write_rows(rows)}", f"valid_path={validation}", "curation.similarity=1",
            *(f"curation.embeddings.{one}" for one in settings),
        ])  # fmt: skip
        curation = curate(config, tmp_path / "clean.jsonl")
        found = {(one.number, one.of, one.reason) for one in curation.findings if "cosine" in one.detail}
        return curation, found

    return call


PLANTED = {(k + 8, k, "near_duplicate") for k in range(8)}


def matrix(rows):
    return np.array([meaning(row["messages"][-2]["content"]) for row in rows])


def test_other_words_for_the_same_are_found_by_a_column_and_nothing_else(run):
    rows = [row | {"vector": vector.tolist()} for row, vector in zip(rows_of(), matrix(rows_of()), strict=True)]
    curation, found = run(rows, "column=vector")
    assert found == PLANTED  # the one about another number is none
    assert curation.judges["embeddings"] == {"similarity": 0.95, "examples": 17, "dimensions": 32, "close_pairs": 10}
    written = (curation.out).read_text().splitlines()
    assert len(written) == 9 and "vector" not in json.loads(written[0])


def test_a_file_has_an_embedding_for_every_row_malformed_ones_too(run, tmp_path):
    rows = rows_of()
    rows.insert(3, {"messages": [{"role": "robot", "content": "?"}]})
    vectors = np.insert(matrix(rows_of()), 3, 0, axis=0)
    np.save(tmp_path / "v.npy", vectors.astype(np.float16))
    assert run(rows, f"file={tmp_path / 'v.npy'}")[1] == PLANTED
    pq.write_table(pa.table({"id": range(18), "embedding": vectors.tolist()}), tmp_path / "v.parquet")
    assert run(rows, f"file={tmp_path / 'v.parquet'}")[1] == PLANTED


def test_an_endpoint_embeds_in_batches_and_is_not_asked_twice(run, monkeypatch):
    monkeypatch.setattr(embeddings, "TEXTS_PER_REQUEST", 5)

    def embed(body):
        data = [{"index": k, "embedding": meaning(text).tolist()} for k, text in enumerate(body["input"])]
        return json.dumps({"data": data[::-1], "usage": {"prompt_tokens": 9}})

    with endpoint(embed) as (url, requests):
        settings = ["endpoint.model=embedder", f"endpoint.base_url={url}"]
        curation, found = run(rows_of(), *settings)
        assert found == PLANTED and curation.judges["embeddings"]["input_tokens"] == 36
        assert [len(request["input"]) for request in requests].count(5) == 3 and len(requests) == 4
        assert {request["path"] for request in requests} == {"/v1/embeddings"}
        assert run(rows_of(), *settings)[1] == found and len(requests) == 4


def test_a_validation_example_in_other_words_is_an_overlap(run, write_npy):
    with_vectors = [row | {"v": vector.tolist()} for row, vector in zip(rows_of(), matrix(rows_of()), strict=True)]
    _, found = run(with_vectors[8:], "column=v", valid=with_vectors[:8])
    assert found == {(k, -1 - k, "validation_overlap") for k in range(8)}
    # A file for the training rows alone: those of validation are compared by their words.
    assert run(rows_of()[8:], f"file={write_npy(rows_of()[8:])}", valid=rows_of()[:8])[1] == set()
    both = [f"file={write_npy(rows_of()[8:])}", f"validation_file={write_npy(rows_of()[:8], 'valid.npy')}"]
    assert run(rows_of()[8:], *both, valid=rows_of()[:8])[1] == found


def test_what_does_not_fit_the_rows_is_named(run, write_npy, tmp_path):
    with pytest.raises(ConfigError, match=r"embeddings.file: .*vectors.npy has 8 embeddings for at least 17 rows"):
        run(rows_of(), f"file={write_npy(rows_of()[:8])}")
    with pytest.raises(ConfigError, match=r"nowhere.npy cannot be read"):
        run(rows_of(), f"file={tmp_path / 'nowhere.npy'}")
    with pytest.raises(DataError, match=r"rows.jsonl:1: v: missing; curation.embeddings.column needs a list"):
        run(rows_of(), "column=v")
    with pytest.raises(ConfigError, match="lists of 2 and of 3 numbers"):
        run([chat("Where?", "Here.") | {"v": [1, 2]}, chat("When?", "Now.") | {"v": [1, 2, 3]}], "column=v")
    with pytest.raises(ConfigError, match="needs one of column, file and endpoint"):
        run(rows_of(), "column=v", f"file={tmp_path / 'nowhere.npy'}")


def test_close_pairs_among_many_are_found_in_cells():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(24_000, 48)).astype(np.float32)
    vectors[20_000:] = vectors[:4_000] + rng.normal(size=(4_000, 48)) * 0.2  # cosine about 0.98
    vectors[500:700] = vectors[500]  # 200 copies make no 19,900 pairs
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = list(embeddings.close_pairs(vectors, 0.95))
    pairs = {(left, right) for left, right, _ in found}
    assert len(pairs) == len(found) and all(left < right for left, right in pairs)
    assert sum((k, k + 20_000) in pairs for k in range(500)) >= 490
    assert sum(500 <= left < right < 700 for left, right in pairs) <= 16 * 200
    assert {right for _, right in pairs} >= set(range(501, 700))
    cosines = [float(vectors[left] @ vectors[right]) for left, right, _ in found[:50]]
    assert cosines == pytest.approx([cosine for *_, cosine in found[:50]], abs=1e-5)
