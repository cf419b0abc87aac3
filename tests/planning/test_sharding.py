"""How devices share a model, read from a config and its DeepSpeed file."""

import pytest

from conftest import config_for
from forgebook.planning.sharding import Sharding, sharding_of


@pytest.mark.parametrize(
    ("values", "stage", "is_fsdp", "offloads"),
    [
        ({"deepspeed": None}, 0, False, (False, False)),
        ({"sharding": "none"}, 0, False, (False, False)),
        ({"sharding": "zero_1"}, 1, False, (False, False)),
        ({"sharding": "fsdp"}, 3, True, (False, False)),
        ({"deepspeed": "zero_3_offload_optim+param"}, 3, False, (True, True)),
    ],
)
def test_what_is_shared_and_offloaded(values, stage, is_fsdp, offloads):
    sharding = sharding_of(config_for("org/model", **values), 1024)
    assert (sharding.stage, sharding.is_fsdp) == (stage, is_fsdp)
    assert (sharding.offload_optimizer, sharding.offload_param) == offloads


def test_buckets_are_deepspeeds():
    assert sharding_of(config_for("org/model", sharding="zero_3"), 1024).bucket > 0
    assert sharding_of(config_for("org/model", sharding="fsdp"), 1024) == Sharding(3, is_fsdp=True)
