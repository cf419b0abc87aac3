"""Keys and values of answers in progress, in memory that rows join and leave without a copy of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from forgebook.planning.hardware import host_memory

__all__ = ["add_rows", "keep_rows", "rows_cache", "rows_that_fit"]

# Columns that memory grows by: it is copied once in so many steps, where DynamicCache copies it at each.
BLOCK = 128
# Answers at a time: on a GPU a step takes about as long for one as for many, a CPU is busy with fewer.
MOST_ROWS, MOST_ROWS_ON_CPU = 256, 64
# Of the free memory; the rest is for the activations and logits of a step.
MEMORY_SHARE = 0.5


class RowsLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, columns, head size] views of memory for `capacity` rows.

    The newest token of every row is in the last column. A shorter row begins later; what is before it is masked.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._rows = self._start = self._end = 0
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def add_rows(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add rows whose columns are at most those of the rows that are here."""
        count, columns = keys.shape[0], keys.shape[2]
        if self._rows == 0:
            self.lazy_initialization(keys, values)
            self._start, self._end = 0, columns
            self._memory = self._allocate(keys, columns), self._allocate(values, columns)
        for memory, added in zip(self._memory or (), (keys, values), strict=True):
            memory[self._rows : self._rows + count, :, self._end - columns : self._end] = added
        self._rows += count
        self._set_views()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the next columns of all rows; return all keys and values."""
        assert self._memory is not None
        end = self._end + key_states.shape[2]
        if end > self._memory[0].shape[2]:
            grown = []
            for view in (self.keys, self.values):
                memory = self._allocate(view, view.shape[2])
                memory[: self._rows, :, : view.shape[2]] = view
                grown.append(memory)
            self._memory = grown[0], grown[1]
            self._start, self._end, end = 0, self._end - self._start, end - self._start
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[: self._rows, :, self._end : end] = states
        self._end = end
        self._set_views()
        return self.keys, self.values

    def keep(self, sources: Sequence[int], unused: int) -> None:
        """Let row k be what row sources[k] was, and drop the first columns that no row uses any more."""
        self._start += unused
        moved = [(to, of) for to, of in enumerate(sources) if to != of]
        if moved:
            to, of = (torch.tensor(rows, device=self.keys.device) for rows in zip(*moved, strict=True))
            for memory in self._memory or ():
                memory[to, :, self._start : self._end] = memory[of, :, self._start : self._end]
        self._rows = len(sources)
        self._set_views()

    def _allocate(self, like: torch.Tensor, columns: int) -> torch.Tensor:
        # Zeros: what is masked must still be finite.
        return like.new_zeros((self._capacity, like.shape[1], columns + BLOCK, like.shape[3]))

    def _set_views(self) -> None:
        assert self._memory is not None
        self.keys, self.values = (memory[: self._rows, :, self._start : self._end] for memory in self._memory)


def rows_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache | None:
    """Make a cache whose rows come and go; None for a model with sliding windows or recurrent states.

    Those have no columns in which a later prompt could find its place.
    """
    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RowsLayer(capacity) for _ in cache.layers]
    return cache


def rows_that_fit(model, columns: int) -> int:
    """Count the answers whose keys and values fit in the free memory. columns: tokens of prompt and answer."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Models with latent attention name two sizes of their own, and store keys of all heads.
    sizes = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
    heads = getattr(config, "num_key_value_heads", None) or heads
    per_row = config.num_hidden_layers * heads * sum(sizes) * (columns + BLOCK) * model.dtype.itemsize
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else host_memory()[1]
    return max(1, min(MOST_ROWS if on_gpu else MOST_ROWS_ON_CPU, int(MEMORY_SHARE * free / per_row)))


def add_rows(cache: DynamicCache, computed: DynamicCache) -> None:
    """Add the rows of computed prompts to a cache of `rows_cache`."""
    for layer, added in zip(cache.layers, computed.layers, strict=True):
        if added.is_initialized:  # not so where a layer reads the keys of another
            layer.add_rows(added.keys, added.values)


def keep_rows(cache: DynamicCache, sources: Sequence[int], unused: int) -> None:
    """Let row k of a cache be what row sources[k] was; unused: the first columns that no row needs any more.

    Of a cache that is not of `rows_cache` no columns are dropped.
    """
    indices = torch.tensor(sources, dtype=torch.long)
    for layer in cache.layers:
        if isinstance(layer, RowsLayer):
            if layer.is_initialized:
                layer.keep(sources, unused)
        else:
            layer.reorder_cache(indices)
