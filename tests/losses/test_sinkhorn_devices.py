"""Devices that hold the cells share the transport between them. The work is done by `sinkhorn_on_devices.py`."""

import json
from pathlib import Path

import pytest
from programs import finish, start


@pytest.fixture(scope="module")
def found():
    (told,) = finish(start(4, str(Path(__file__).with_name("sinkhorn_on_devices.py"))), patience=300)
    return json.loads(told.splitlines()[-1])


@pytest.mark.parametrize("how", ["annealed", "converged"])
@pytest.mark.parametrize("way", ["dense", "tiles"])
def test_four_devices_share_the_work_and_find_the_same(found, way, how):
    """Value and gradients; of the operations that the compiler counts (of a loop those of one turn) each has its part.

    That is a quarter, and a little of what all of them do.
    """
    one = found[f"{way} {how}"]
    assert one["error"] < 1e-5
    assert one["work"] < 0.35
