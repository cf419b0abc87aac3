"""Which blocks and marked keys the classes of a config hold."""

from forgebook.config import blocks
from forgebook.config.block_keys import marked_keys, models_in
from forgebook.config.schema import FinetuneConfig


def test_blocks_inside_a_type():
    assert list(models_in(blocks.LogprobProcessor | None)) == [blocks.LogprobProcessor]
    assert list(models_in(list[str])) == []


def test_marked_keys_are_dotted_and_in_order():
    assert marked_keys(blocks.GenerationConfig, blocks.Mark.AUTO) == ["prompt_format"]
    assert "generation_config.stopping_sequences" in marked_keys(FinetuneConfig, blocks.Mark.NO_EFFECT)
