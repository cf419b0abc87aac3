"""Which examples make up each optimizer step, who computes which of them, and the tensors.

    sequences = make_sequences(tokens, "packed", 4096)     one example each, or several when packed
    steps = epoch_batches(tokens, sequences, 32, seed, epoch)
    micro = split_batch(steps[0], tokens, world, accumulation)
    batch = collate(tokens, micro[rank][k], pad_id)

The examples of an optimizer step depend on the seed and the global batch size alone, so a run gives the same
losses however the batch is divided among workers and accumulation steps, and a resumed run trains on the examples
that an undisturbed one would have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from forgebook.data.image_batches import StoredImage
from forgebook.data.token_store import Tokens

if TYPE_CHECKING:
    from forgebook.data.masking import Encoded

__all__ = [
    "Batch",
    "Sequence",
    "collate",
    "epoch_batches",
    "group_size",
    "groups_by_length",
    "images_of",
    "make_batch",
    "make_sequences",
    "pack",
    "padding_in",
    "padding_share",
    "single_sequences",
    "split_batch",
]

# Numbers of the examples that share one line of a batch: one, or several when packed.
Sequence = np.ndarray
# The arguments of a model's forward pass, by name: tensors, and of `segments` a tensor and a number.
Batch = dict[str, Any]

# Sequences are sorted by length within windows of this many optimizer steps: little padding, still shuffled.
SORTING_WINDOW = 50
# Batches are a multiple of this many tokens wide: matrix kernels are compiled per shape, and fewer shapes mean
# fewer kernels in memory (on a CPU they took gigabytes in half an hour) and full tensor cores.
WIDTH_STEP = 16
IGNORED = -100


def group_size(task: str | None) -> int:
    """Return how many adjacent examples belong together: 2 for the chosen and the rejected answer of a pair."""
    return 2 if task == "preference_tuning" else 1


def groups_by_length(task: str | None) -> bool:
    """Return whether the examples of a step have similar lengths: not in classification.

    Where the examples of one label are the longer ones, as spam is, most steps would see one label alone, and each
    would pull the balance of the labels its way.
    """
    return task != "classification"


def make_sequences(tokens: Tokens, padding: str, context_length: int, group: int = 1) -> list[Sequence]:
    """Make the sequences of an epoch: packed examples, or each example (each pair, if `group` is 2) on its own."""
    if padding == "packed":
        return pack(tokens.lengths, context_length)
    return single_sequences(tokens, group)


def single_sequences(tokens: Tokens, group: int = 1) -> list[Sequence]:
    """Make a sequence of each example, or of each group of adjacent examples."""
    return list(np.arange(len(tokens)).reshape(-1, group))


def pack(lengths: np.ndarray, capacity: int) -> list[Sequence]:
    """Pack examples into as few sequences of `capacity` tokens as best-fit decreasing finds.

    lengths: [examples], none above capacity. Each example, the longest first, is added where it leaves the least
    room: at most 11/9 of the fewest sequences possible (Johnson, 1973). Returns arrays of example numbers.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room that some bin has left, sorted
    with_room: dict[int, list[int]] = {}
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[number].append(example)
        left = room - length
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(number)
    return [np.array(examples) for examples in bins]


def epoch_batches(
    tokens: Tokens, sequences: list[Sequence], global_batch: int, seed: int, epoch: int, *, by_length: bool = True
) -> list[list[Sequence]]:
    """Divide an epoch's sequences into optimizer steps: shuffled, and grouped by length if `by_length`.

    Returns one list of sequences per step, each of global_batch, the last maybe shorter.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sequences))
    lengths = _sequence_lengths(tokens, sequences)
    window = SORTING_WINDOW * global_batch
    steps = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        if by_length:
            part = part[np.argsort(lengths[part], kind="stable")]
        batches = [part[k : k + global_batch] for k in range(0, len(part), global_batch)]
        steps += [batches[k] for k in rng.permutation(len(batches))]
    # A short batch in the middle would make steps differ in kind; it comes last, once.
    steps.sort(key=len, reverse=True)
    return [[sequences[k] for k in step] for step in steps]


def padding_share(
    tokens: Tokens, steps: list[list[Sequence]], world: int, accumulation: int, width: int | None = None
) -> float:
    """Compute the share of padding among the tokens of an epoch's steps.

    width: the tokens of every line, if not those of the longest sequence (`padding: max_length`).
    """
    micros = (
        micro[rank::world]
        for step in steps
        for micro in np.array_split(np.sort(_sequence_lengths(tokens, step))[::-1], accumulation)
        for rank in range(world)
    )
    return padding_in(micros, width)


def padding_in(batches: Iterable[np.ndarray], width: int | None = None) -> float:
    """Compute the share of padding in batches, each an array of the lengths of its sequences; width as above."""
    tokens, positions = 0, 0
    for lengths in batches:
        tokens += int(lengths.sum())
        # An empty part of a step still takes part in collectives, with one line.
        positions += max(1, len(lengths)) * (width or _round_up(int(lengths.max(initial=1))))
    return max(0.0, 1 - tokens / positions) if positions else 0.0


def _round_up(length: int) -> int:
    return math.ceil(length / WIDTH_STEP) * WIDTH_STEP


def split_batch(sequences: list[Sequence], tokens: Tokens, world: int, accumulation: int) -> list[list[list[Sequence]]]:
    """Deal one step's sequences to ranks and micro batches: [rank][micro] lists of sequences.

    Micro batches are grouped by length (little padding), and every rank gets its share of each length
    (no rank waits for another). A part may be empty in an epoch's last step.
    """
    ordered = np.argsort(-_sequence_lengths(tokens, sequences), kind="stable")
    parts: list[list[list[Sequence]]] = [[] for _ in range(world)]
    for micro in np.array_split(ordered, accumulation):
        for rank in range(world):
            parts[rank].append([sequences[k] for k in micro[rank::world]])
    return parts


def _sequence_lengths(tokens: Tokens, sequences: list[Sequence]) -> np.ndarray:
    if len(sequences) == 0:
        return np.zeros(0, np.int64)
    lengths = tokens.lengths[np.concatenate(sequences)]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in sequences])[:-1]])
    return np.add.reduceat(lengths, starts)


def collate(
    tokens: Tokens,
    sequences: list[Sequence],
    pad_id: int,
    pad_to: int | None = None,
    *,
    packed: bool = False,
    one_line: bool = False,
    filler: np.ndarray | None = None,
) -> Batch:
    """Stack sequences into tensors, padded on the right.

    Returns input_ids [sequences, length] and labels [sequences, length], where labels[:, t] is the token that
    position t predicts, or -100; supervised [positions], the indexes of those that predict one, counted through all
    lines; and counts [sequences], how many each has. They are counted here, as a GPU that counted them would make the
    host wait. Tokens after an example's last one in the loss are left out: they can change no loss. No attention mask
    is needed: under causal attention no token attends to the padding on its right.

    Examples of a sequence, a preference pair, are lines of their own unless packed.

    packed: also return position_ids [sequences, length], from 0 in each example; from them attention keeps the
            examples of one sequence apart. The padding counts as an example of its own.
    one_line: return all sequences in a single line, without padding between them, for kernels that keep examples apart
              by their lengths: position_ids, and segments: where each example begins and the last one ends, int32
              [examples + 1], and the tokens of the longest. counts are still those of each sequence.
    filler: ids of a line to add, of which nothing is in the loss.
    pad_to: pad to this many tokens rather than to the longest sequence, rounded up (`padding: max_length`).
    """
    import torch

    if not packed:
        sequences = [example[None] for sequence in sequences for example in np.asarray(sequence)]
    lines = [_line(tokens, sequence) for sequence in sequences]
    # An empty part (more workers than examples in the last step) still takes part in collectives: one dead token.
    if filler is not None:
        lines.append((filler, np.full(len(filler), IGNORED), np.arange(len(filler))))
    lines = lines or [(np.full(1, pad_id), np.full(1, IGNORED), np.zeros(1, np.int64))]
    counts = np.array([(targets != IGNORED).sum() for _, targets, _ in lines], np.int64)
    if one_line:
        ids, targets, places = (np.concatenate(column) for column in zip(*lines, strict=True))
        lines = [(ids, targets, places)]
    longest = max(len(ids) for ids, _, _ in lines)
    width = pad_to or _round_up(longest)
    input_ids = np.full((len(lines), width), pad_id, np.int64)
    labels = np.full((len(lines), width), IGNORED, np.int64)
    positions = np.zeros((len(lines), width), np.int64)
    for k, (ids, targets, places) in enumerate(lines):
        input_ids[k, : len(ids)] = ids
        labels[k, : len(ids)] = targets
        positions[k] = np.concatenate([places, np.arange(width - len(ids))])
    arrays = {
        "input_ids": input_ids,
        "labels": labels,
        "supervised": np.flatnonzero(labels != IGNORED),
        "counts": counts,
    }
    if packed or one_line:
        arrays["position_ids"] = positions
    batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if one_line:
        starts = np.append(np.flatnonzero(positions == 0), width).astype(np.int32)
        batch["segments"] = torch.from_numpy(starts), int(np.diff(starts).max())
    return batch


def make_batch(encoded: Iterable[Encoded], pad_id: int) -> Batch:
    """Stack encoded examples, one per line: its tensors as `collate` makes them."""
    tokens = Tokens.from_encoded(encoded)
    return collate(tokens, list(np.arange(len(tokens))[:, None]), pad_id)


def images_of(tokens: Tokens, sequences: list[Sequence]) -> list[list[StoredImage]]:
    """List the images of each line that `collate` makes of sequences of one example each."""
    lines = []
    for example in np.concatenate(sequences) if sequences else ():
        last = np.flatnonzero(tokens.example(example)[1])[-1]
        stored = ((one, tokens.store_of(example)) for one in tokens.images_of(example))
        lines.append([(one, store) for one, store in stored if one.stop <= last])
    return lines


def _line(tokens: Tokens, examples: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join the examples of a sequence: ids, the token that each predicts, positions."""
    ids, labels, positions = [], [], []
    for k in examples:
        example_ids, mask = tokens.example(k)
        last = np.flatnonzero(mask)[-1]
        ids.append(example_ids[:last])
        labels.append(np.where(mask[1 : last + 1], example_ids[1 : last + 1], IGNORED))
        positions.append(np.arange(last))
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(positions)
