"""Gathered weights that stay, or do not."""

import pytest
from test_feasibility import resolved
from test_memory import big

from conftest import LORA
from forgebook.catalog import hardware_of, shape_of
from forgebook.planning.hardware import Cpu
from forgebook.planning.resharding import settle_resharding


@pytest.mark.parametrize(
    ("device", "chosen"),
    [("1xH200", False), ("1xA10G", True), (None, True), (Cpu("", 400 * 10**9, 400 * 10**9), False)],
)
def test_gathered_weights_stay_for_the_backward_pass_where_they_fit(device, chosen):
    """LoRA on 8B parameters and two workers: 16 GB of weights beside a half of them."""
    device = hardware_of(device)[1] if isinstance(device, str) else device
    shape = shape_of(big().model_id)
    config = resolved(sharding="fsdp", num_devices=2, lora_config=LORA, gradient_checkpointing=True)
    settled = settle_resharding(config, shape, 2, 400, device)
    assert settled.fsdp.reshard_after_forward is chosen
    assert settle_resharding(settled, shape, 2, 400, device) == settled
    moved = config.resolve(fsdp={"reshard_after_forward": "auto", "cpu_offload": True})
    assert settle_resharding(moved, shape, 2, 400, device).fsdp.cpu_offload
