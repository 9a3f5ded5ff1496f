from __future__ import annotations

import pytest

from vipllava.config.batch import accumulation_steps, largest_micro_batch
from vipllava.types import ConfigError


@pytest.mark.parametrize(
    ("global_batch", "micro", "devices", "nodes", "steps"),
    [(256, 32, 8, 1, 1), (128, 8, 8, 1, 2), (128, 16, 1, 1, 8), (128, 8, 8, 2, 1), (7, 7, 1, 1, 1)],
)
def test_accumulation(global_batch: int, micro: int, devices: int, nodes: int, steps: int):
    assert accumulation_steps(global_batch, micro, devices, nodes) == steps


def test_error_names_numbers_and_what_works():
    with pytest.raises(ConfigError) as error:
        accumulation_steps(100, 7, 4, 1)
    assert str(error.value) == (
        "global_batch_size=100 is not a multiple of micro_batch_size=7 x "
        "devices=4 x num_nodes=1 = 28; nearest global batch sizes that are: 84, "
        "112; or keep it with micro_batch_size=5 or 25"
    )


def test_error_offers_fewer_devices_when_no_micro_batch_fits():
    with pytest.raises(ConfigError, match=r"that are: 96; or keep it with devices=2$"):
        accumulation_steps(64, 32, 3, 1)


def test_error_when_nodes_do_not_divide():
    with pytest.raises(ConfigError, match="no micro-batch divides it on 3 nodes"):
        accumulation_steps(64, 1, 8, 3)


def test_numbers_below_one_are_all_named():
    with pytest.raises(ConfigError, match=r"global_batch_size=0, devices=-1: must"):
        accumulation_steps(0, 1, -1, 1)


@pytest.mark.parametrize(
    ("limit", "global_batch", "devices", "nodes", "micro"),
    [(32, 256, 8, 1, 32), (32, 256, 8, 2, 16), (32, 64, 8, 1, 8), (10, 64, 1, 1, 8)],
)
def test_largest_micro_batch(limit: int, global_batch: int, devices: int, nodes: int, micro: int):
    assert largest_micro_batch(limit, global_batch, devices, nodes) == micro


def test_largest_micro_batch_without_any():
    assert largest_micro_batch(32, 64, 3, 1) is None
