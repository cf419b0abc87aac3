"""Rows -> validated messages -> tokens -> batches.

    rows = read_rows("train.jsonl")                       every bad row of a file is named, in one pass
    tokens = tokenize_rows(rows, tokenizer, task=...)     Tokens: flat arrays, one row after the other
    tokens, cut = fit_context(tokens, 512, "error")       the truncation policy
    steps = epoch_batches(tokens, 32, seed, epoch)        which rows make up each optimizer step
    micro = split_batch(steps[0], tokens, world, accum)   who computes which of them
    batch = collate(tokens, micro[rank][k], pad_id)       tensors

The rows of an optimizer step depend on the seed and the global batch size alone, so a run gives the same
losses however the batch is divided among workers and accumulation steps, and a resumed run sees the rows
that an undisturbed one would have seen.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import prompts, storage
from helpers.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Row",
    "Tokens",
    "collate",
    "epoch_batches",
    "fit_context",
    "load_tokens",
    "read_rows",
    "save_tokens",
    "split_batch",
    "token_statistics",
    "tokenize_rows",
]

ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS = 20
# Rows are sorted by length within windows of this many optimizer steps: little padding, still shuffled.
SORTING_WINDOW = 50
# Batches are this many tokens wide, or a multiple: matrix kernels are made for a shape, and fewer shapes mean
# fewer kernels kept (on a CPU they took gigabytes in half an hour), tensor cores well filled.
WIDTH_STEP = 16


@dataclass(frozen=True)
class Row:
    """One validated row: chat messages (with tools), or plain text; `where` is its file:line."""

    where: str
    messages: list[prompts.Message] | None = None
    text: str | None = None
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows in flat arrays.

    input_ids: [tokens] int32; trained: [tokens] bool; offsets: [rows + 1] int64, where each row begins.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[rows] tokens per row."""
        return np.diff(self.offsets)

    @functools.cached_property
    def supervised(self) -> np.ndarray:
        """[rows] tokens per row that are targets of the loss; a row's first token never is."""
        targets = self.trained.astype(np.int64)
        targets[self.offsets[:-1][self.lengths > 0]] = 0
        ends = np.concatenate([[0], np.cumsum(targets)])
        return ends[self.offsets[1:]] - ends[self.offsets[:-1]]

    def row(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row k's ids and trained marks, as views."""
        part = slice(self.offsets[k], self.offsets[k + 1])
        return self.input_ids[part], self.trained[part]

    @classmethod
    def from_rows(cls, rows: list[tuple[Any, Any]]) -> Tokens:
        """Join rows of (ids, trained)."""
        lengths = [len(ids) for ids, _ in rows]
        return cls(
            np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows] or [np.zeros(0, np.int32)]),
            np.concatenate([np.asarray(trained, bool) for _, trained in rows] or [np.zeros(0, bool)]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


# Reading and checking ---------------------------------------------------------------------------------


def read_rows(path: str, task: str = "instruction_tuning") -> list[Row]:
    """Read and check a JSONL file, local or remote.

    Raises DataError naming every bad row as file:line (the first 20 are shown).
    """
    local = storage.fetch_file(path)
    name = Path(path).name
    rows, problems = [], []
    for number, line in _numbered_lines(local, name):
        where = f"{name}:{number}"
        try:
            rows.append(_parse_row(line, where, task))
        except DataError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
        more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError(f"{len(problems)} of {len(problems) + len(rows)} rows of {path} are unusable:\n  {shown}{more}")
    if not rows:
        raise DataError(f'{path} is empty: it needs at least one row like {{"messages": [...]}}')
    return rows


def _numbered_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the lines that hold something."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}:{number}: not UTF-8 text (byte {error.start}): save the file as UTF-8"
                ) from None
            if line:
                yield number, line


def _parse_row(line: str, where: str, task: str) -> Row:
    """Parse one line into a Row, or raise DataError with its place, field and mend."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}): each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {type(row).__name__}, need an object with the key 'messages'")
    if "messages" not in row:
        if task == "causal_lm" and isinstance(row.get("text"), str) and row["text"]:
            return Row(where, text=row["text"])
        also = " or a non-empty 'text'" if task == "causal_lm" else ""
        raise DataError(f"{where}: no 'messages' (its keys: {', '.join(row) or 'none'}): add a list of messages{also}")
    _check_messages(row["messages"], where, needs_answer=task != "causal_lm")
    return Row(where, messages=row["messages"], tools=row.get("tools"))


def _check_messages(messages: Any, where: str, needs_answer: bool) -> None:
    """Raise DataError unless messages are a conversation that can be rendered (and has an answer to train)."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages: need a non-empty list of {{role, content}}, got {_brief(messages)}")
    for k, message in enumerate(messages):
        at = f"{where}: messages[{k}]"
        if not isinstance(message, dict):
            raise DataError(f"{at}: need an object with role and content, got {_brief(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{at}.role: got {_brief(role)}, need one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not (role == "assistant" and message.get("tool_calls")):
            raise DataError(f"{at}.content: need a string, got {_brief(message.get('content'))}")
        if role == "system" and k > 0:
            raise DataError(f"{at}.role: a system message can only come first")
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where}: messages: no assistant turn, so nothing to train on: "
            "add the answer, or set task: causal_lm to train on every token"
        )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# Tokenising -------------------------------------------------------------------------------------------


def tokenize_rows(
    rows: list[Row],
    tokenizer,
    prompt_format=None,
    task: str = "instruction_tuning",
    on_progress: Callable[[int], None] = lambda done: None,
) -> Tokens:
    """Tokenise rows and mark what the task trains: every token (causal_lm) or the assistant's turns.

    Raises DataError, with file:line, for a row in which no token would be trained.
    """
    trained = "all" if task == "causal_lm" else "assistant"
    encoded = []
    for done, row in enumerate(rows, 1):
        try:
            if row.text is not None:
                one = prompts.encode_text(row.text, tokenizer)
            else:
                one = prompts.encode(row.messages, tokenizer, prompt_format, trained=trained, tools=row.tools)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if not any(one.trained[1:]):
            raise DataError(f"{row.where}: no token of this row would be trained: is its assistant turn empty?")
        encoded.append((one.input_ids, one.trained))
        on_progress(done)
    return Tokens.from_rows(encoded)


def token_statistics(tokens: Tokens) -> dict[str, float]:
    """Summarise a set: rows, tokens, percentiles of the row length, share of tokens that are trained."""
    p50, p95, p99 = np.percentile(tokens.lengths, [50, 95, 99], method="inverted_cdf")
    return {
        "rows": len(tokens),
        "tokens": int(tokens.lengths.sum()),
        "supervised_tokens": int(tokens.supervised.sum()),
        "supervised_share": round(float(tokens.supervised.sum() / max(1, tokens.lengths.sum())), 4),
        "tokens_p50": int(p50),
        "tokens_p95": int(p95),
        "tokens_p99": int(p99),
        "tokens_max": int(tokens.lengths.max()),
    }


def fit_context(
    tokens: Tokens, context_length: int, policy: str, name: str = "the data"
) -> tuple[Tokens, dict[str, int]]:
    """Apply the truncation policy to rows longer than context_length.

    policy: "error" refuses if a trained token would be lost (a prompt's unneeded tail may go), "drop" leaves
            such rows out, "left" / "right" cut that end off.

    Returns the tokens and what it did: rows_cut, rows_dropped, tokens_cut, answer_tokens_cut.
    Raises DataError if anything would be lost under "error", or if nothing trained is left of a row or set.
    """
    long = np.flatnonzero(tokens.lengths > context_length)
    kept, dropped, answer_lost = [], 0, 0
    cut = set(long.tolist())
    for k in range(len(tokens)):
        ids, trained = tokens.row(k)
        if k in cut:
            keep = slice(len(ids) - context_length, None) if policy == "left" else slice(0, context_length)
            lost = int(trained[1:].sum() - trained[keep][1:].sum())
            if policy == "drop" or (policy != "error" and not trained[keep][1:].any()):
                dropped += 1
                answer_lost += int(trained[1:].sum())
                continue
            answer_lost += lost
            ids, trained = ids[keep], trained[keep]
        kept.append((ids, trained))
    if policy == "error" and answer_lost:
        raise DataError(
            f"{len(long)} of {len(tokens)} rows of {name} are longer than context_length {context_length} and would "
            f"lose {answer_lost} trained tokens: set context_length to {int(tokens.lengths.max())} to lose none, "
            "or truncation to drop, left or right"
        )
    if not kept:
        raise DataError(
            f"no row of {name} has a trained token within context_length {context_length}: "
            f"the longest row has {int(tokens.lengths.max())} tokens"
        )
    fitted = Tokens.from_rows(kept) if len(long) else tokens
    done = {
        "rows_cut": len(long) - dropped,
        "rows_dropped": dropped,
        "tokens_cut": int(tokens.lengths.sum() - fitted.lengths.sum()),
        "answer_tokens_cut": answer_lost,
    }
    return fitted, done


def save_tokens(tokens: Tokens, path: Path) -> None:
    """Write tokens as an Arrow file that workers can map into memory."""
    import pyarrow as pa

    table = pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(tokens.offsets, tokens.input_ids),
            "trained": pa.LargeListArray.from_arrays(tokens.offsets, tokens.trained.view(np.int8)),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def load_tokens(path: Path) -> Tokens:
    """Map a file of save_tokens into memory; nothing is copied."""
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    ids, trained = batch.column("input_ids"), batch.column("trained")
    return Tokens(ids.values.to_numpy(), trained.values.to_numpy().view(bool), ids.offsets.to_numpy())


# Batches ----------------------------------------------------------------------------------------------


def epoch_batches(tokens: Tokens, global_batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Divide an epoch's rows into optimizer steps: shuffled, rows of like length together.

    Returns one array of row numbers per step, each [global_batch], the last maybe shorter.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(tokens))
    window = SORTING_WINDOW * global_batch
    steps = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(tokens.lengths[part], kind="stable")]
        batches = [part[k : k + global_batch] for k in range(0, len(part), global_batch)]
        steps += [batches[k] for k in rng.permutation(len(batches))]
    # A short batch in the middle would make steps differ in kind; it goes last, once.
    steps.sort(key=len, reverse=True)
    return steps


def split_batch(rows: np.ndarray, tokens: Tokens, world: int, accumulation: int) -> list[list[np.ndarray]]:
    """Deal one step's rows to ranks and micro batches: [rank][micro] arrays of row numbers.

    Rows of like length share a micro batch (little padding), and every rank gets its share of each length
    (no rank waits for another). A part may be empty in an epoch's last step.
    """
    ordered = rows[np.argsort(-tokens.lengths[rows], kind="stable")]
    parts: list[list[np.ndarray]] = [[] for _ in range(world)]
    for micro in np.array_split(ordered, accumulation):
        for rank in range(world):
            parts[rank].append(micro[rank::world])
    return parts


def collate(tokens: Tokens, rows: np.ndarray, pad_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Stack rows into tensors, padded on the right.

    Returns input_ids [rows, length] and labels [rows, length], where labels[:, t] is the token that position
    t predicts, or -100. Tokens behind a row's last trained one are left out: they can change no loss. No
    attention mask is needed: under causal attention a real token never sees the padding on its right.

    pad_to: pad to this many tokens rather than to the longest row, rounded up (`padding: max_length`).
    """
    import torch

    pairs = []
    for k in rows:
        ids, trained = tokens.row(k)
        last = np.flatnonzero(trained)[-1]
        labels = np.where(trained[1 : last + 1], ids[1 : last + 1], -100)
        pairs.append((ids[:last], labels))
    # An empty part (more workers than rows in the last step) still takes part in collectives: one dead token.
    pairs = pairs or [(np.full(1, pad_id), np.full(1, -100))]
    longest = max(len(ids) for ids, _ in pairs)
    width = pad_to or math.ceil(longest / WIDTH_STEP) * WIDTH_STEP
    input_ids = np.full((len(pairs), width), pad_id, np.int64)
    labels = np.full((len(pairs), width), -100, np.int64)
    for k, (ids, targets) in enumerate(pairs):
        input_ids[k, : len(ids)] = ids
        labels[k, : len(ids)] = targets
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
