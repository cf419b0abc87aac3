"""The cache whose rows come and go, against one that is rebuilt from each row's own keys."""

import random

import torch
from transformers import LlamaConfig

from conftest import TINY_MODEL
from forgebook.inference import cache as caches

LAYERS = 2


def states(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, 2, columns, 4)


def test_rows_that_join_leave_and_grow_hold_their_own_keys():
    chance = random.Random(0)
    config = LlamaConfig(num_hidden_layers=LAYERS)
    cache = caches.rows_cache(config, 4)
    rows: list[torch.Tensor] = []  # each row's keys, [heads, its own columns, head size]; its values are their double
    for length in [9, 5, 200, 7, 3, 150, 6]:
        width = max((row.shape[1] for row in rows), default=length)
        prompts = states(min(4 - len(rows), 2), min(length, width))
        computed = caches.DynamicCache(config=config)
        for layer in range(LAYERS):
            computed.update(prompts + layer, 2 * (prompts + layer), layer)
        caches.add_rows(cache, computed)
        rows += list(prompts)
        for _ in range(chance.randrange(1, 2 * caches.BLOCK)):
            new = states(len(rows), 1)
            for layer in range(LAYERS):
                keys, values = cache.update(new + layer, 2 * (new + layer), layer)
                rows_here = [torch.cat([row, new[k]], 1) for k, row in enumerate(rows)]
                for k, row in enumerate(rows_here):
                    assert torch.equal(keys[k, :, keys.shape[2] - row.shape[1] :], row + layer)
                assert torch.equal(values, 2 * keys) and torch.isfinite(keys).all()
            rows = rows_here
        kept = sorted(chance.sample(range(len(rows)), chance.randrange(len(rows))))
        sources = [k if k in kept else None for k in range(len(kept))]
        moved = [k for k in kept if k >= len(kept)]
        sources = [moved.pop() if source is None else source for source in sources]
        before = cache.get_seq_length()
        rows = [rows[k] for k in sources]
        longest = max((row.shape[1] for row in rows), default=0)
        caches.keep_rows(cache, sources, before - longest)
        assert cache.get_seq_length() == longest


def test_a_model_with_sliding_windows_has_no_such_cache():
    from transformers import AutoConfig, Gemma3TextConfig

    assert caches.rows_cache(AutoConfig.from_pretrained(TINY_MODEL), 4) is not None
    assert caches.rows_cache(Gemma3TextConfig(), 4) is None


def test_as_many_answers_at_a_time_as_fit_in_memory(monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    cache = caches.DynamicCache(config=model.config)
    model(torch.ones((1, 10), dtype=torch.long), past_key_values=cache)
    measured = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values)) / 10
    for free, rows in ((0, 1), (2 * 7.5 * measured * (100 + caches.BLOCK), 7), (1e12, caches.MOST_ROWS_ON_CPU)):
        monkeypatch.setattr(caches, "host_memory", lambda free=free: (free, free))
        assert caches.rows_that_fit(model, 100) == rows
