"""How batches and parameters are cut. The devices are one real one, said to be eight: nothing is computed on them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from scjax.batches import CellSetBatch, PairedBatch, TimeSeriesBatch
from scjax.mesh import (
    AXES,
    check_shared,
    fill_up,
    make_mesh,
    own_cells,
    place,
    put,
    shardings,
    split,
    template,
    told,
)


class Device:
    """Of which a mesh only asks who it is."""

    def __init__(self, number, process=0):
        self.id, self.process_index, self.platform, self.device_kind = number, process, "cpu", "cpu"
        self.client = jax.devices()[0].client


def mesh_of(n_batch, n_cells, n_processes=1):
    """The first process, which is the one of the tests, has the first devices."""
    n = n_batch * n_cells
    devices = [Device(i, i * n_processes // n) for i in range(n)]
    return Mesh(np.array(devices).reshape(n_batch, n_cells), AXES)


def paired(n_populations, n_cells):
    x = np.zeros((n_populations, n_cells, 5), np.float32)
    return PairedBatch(source=x, target=x, perturbation=np.zeros((n_populations, 2), int), genes=np.arange(5))


def sets(n_sets, n_cells):
    x = np.zeros((n_sets, n_cells, 5), np.float32)
    return CellSetBatch(
        cells=x,
        control=x,
        covariates={"perturbation": np.zeros(n_sets, int), "batch": np.zeros((n_sets, n_cells), int)},
        mask=x[..., 0] == 0,
        measured=np.ones((n_sets, 5), bool),
    )


def series(n_cells, n_targets):
    rng = np.random.default_rng(0)
    weights = np.full((2, n_targets), 1 / n_targets, np.float32)
    targets = rng.normal(size=(2, n_targets, 3)).astype(np.float32)
    return TimeSeriesBatch(
        x0=targets[0, :n_cells], targets=targets, weights=weights, self_transport=weights[:, 0], ts=(0.0, 1.0, 2.0)
    )


def test_populations_are_cut_first_and_cells_where_they_are_few():
    whole = split(paired(8, 6), mesh_of(4, 2))
    assert (whole.source, whole.target) == (P("batch", "cells"),) * 2
    assert (whole.perturbation, whole.genes) == (P("batch"), P())
    one = split(paired(1, 48), mesh_of(4, 2))
    assert (one.source, one.perturbation, one.genes) == (P(None, AXES), P(), P())


def test_sets_are_cut_with_what_is_known_about_them():
    many = split(sets(4, 6), mesh_of(4, 1))
    assert many.cells == many.control == many.mask == many.covariates["batch"] == P("batch", "cells")
    assert many.covariates["perturbation"] == many.measured == P("batch")
    assert many.space is None
    few = split(sets(2, 16), mesh_of(4, 2))
    assert few.mask == few.covariates["batch"] == P(None, AXES)
    assert few.covariates["perturbation"] == few.measured == P()


def test_cells_of_every_time_are_cut():
    cut = split(series(16, 24), mesh_of(4, 2))
    assert (cut.x0, cut.targets, cut.weights, cut.self_transport) == (P(AXES), P(None, AXES), P(None, AXES), P())
    assert split(replace(series(16, 24), self_transport=None), mesh_of(8, 1)).self_transport is None


def test_any_other_tree_is_cut_along_its_first_axis():
    cut = split({"x": np.zeros((8, 3)), "scale": np.float32(1)}, mesh_of(4, 2))
    assert cut == {"x": P(AXES), "scale": P()}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            paired(3, 12),
            r"3 populations of 12 cells cannot be shared by 8 devices \(4 x 2\): sampling.n_populations must be a "
            "multiple of 4 and sampling.n_cells one of 2, or sampling.n_cells one of 8",
        ),
        (paired(4, 7), "4 populations of 7 cells"),
        (sets(3, 6), "batch of 3 sets of 6 cells .*sampling.n_sets must be a multiple of 4"),
        (series(10, 24), r"first time \(sampling.n_cells\) must be a multiple of the 8 devices that share it; got 10"),
        (series(16, 23), "target cells, filled up .* must be a multiple of the 8"),
        ({"a": {"x": np.zeros((6, 3))}}, r"first axis of \['a'\]\['x'\] must be a multiple of the 8 .* got 6"),
    ],
)
def test_what_cannot_be_cut_is_told_with_its_numbers(batch, message):
    with pytest.raises(ValueError, match=message):
        split(batch, mesh_of(4, 2))


@pytest.mark.parametrize(
    ("batch", "mesh", "shape", "own"),
    [
        (paired(8, 6), (4, 2, 2), (8, 6, 5), (slice(0, 4), slice(0, 6), slice(0, 5))),
        (paired(1, 48), (4, 2, 4), (1, 48, 5), (slice(0, 1), slice(0, 12), slice(0, 5))),
        (sets(4, 6), (4, 1, 2), (4, 6, 5), (slice(0, 2), slice(0, 6), slice(0, 5))),
        (series(16, 24), (4, 2, 2), (16, 3), (slice(0, 8), slice(0, 3))),
        (series(16, 24), (4, 2, 2), (2, 24, 3), (slice(0, 2), slice(0, 12), slice(0, 3))),
        (series(16, 20), (4, 2, 2), (2, 20, 3), (slice(0, 2), slice(0, 20), slice(0, 3))),
        (sets(4, 6), (4, 1, 1), (4, 6, 5), (slice(0, 4), slice(0, 6), slice(0, 5))),
    ],
    ids=["populations", "cells of a population", "sets", "first time", "targets", "targets to fill up", "alone"],
)
def test_a_process_reads_what_its_devices_hold(batch, mesh, shape, own):
    assert own_cells(batch, mesh_of(*mesh))(shape) == own


def test_targets_are_filled_up_with_cells_of_no_mass():
    before = series(16, 21)
    after = fill_up(before, mesh_of(4, 2))
    assert after.targets.shape == (2, 24, 3)
    np.testing.assert_array_equal(after.targets[:, :21], before.targets)
    np.testing.assert_array_equal(after.targets[:, 21:], np.repeat(before.targets[:, :1], 3, axis=1))
    np.testing.assert_array_equal(after.weights[:, 21:], 0)
    np.testing.assert_allclose(after.weights.sum(1), 1, rtol=1e-6)
    assert fill_up(after, mesh_of(4, 2)) is after
    other = paired(3, 5)
    assert fill_up(other, mesh_of(4, 2)) is other


def test_arrays_are_cut_by_their_size():
    tree = {
        "tall": jax.ShapeDtypeStruct((24, 16), jnp.float32),
        "wide": jax.ShapeDtypeStruct((8, 40), jnp.float32),
        "odd": jax.ShapeDtypeStruct((21, 30), jnp.float32),
        "small": jax.ShapeDtypeStruct((8,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    where, whole = shardings(tree, mesh_of(4, 2), 100)
    wanted = {"tall": P(AXES), "wide": P(None, AXES), "odd": P(), "small": P(), "key": P()}
    assert {name: one.spec for name, one in where.items()} == wanted
    assert whole == ("['odd'] (21, 30)",)
    where, whole = shardings(tree, mesh_of(4, 2))
    assert {one.spec for one in where.values()} == {P()}
    assert whole == ()
    like = template(tree, mesh_of(4, 2), 100)["wide"]
    assert (like.shape, like.dtype, like.sharding.spec) == ((8, 40), jnp.float32, P(None, AXES))


def test_a_mesh_of_the_devices_at_hand():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"batch": jax.device_count(), "cells": 1}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    assert told(make_mesh(1)) == "trained on 1 device (cpu): 1 batch x 1 cells"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_devices": 0}, "n_devices must be at least 1"),
        ({"n_devices": 10_000}, "n_devices must be at most the .* devices of kind 'cpu'; got 10000"),
        ({"n_devices": 1, "cells": 2}, "cells must divide n_devices; got cells=2, n_devices=1"),
    ],
)
def test_meshes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**options)


def test_what_training_can_share():
    check_shared(None, None)
    check_shared(make_mesh(1), 8)
    with pytest.raises(ValueError, match="shard_above=8 needs a mesh"):
        check_shared(None, 8)
    with pytest.raises(ValueError, match="shard_above must be at least 1"):
        check_shared(make_mesh(1), 0)
    with pytest.raises(ValueError, match=r"axes \('batch', 'cells'\) .* got \('data',\)"):
        check_shared(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), None)


def test_arrays_and_keys_are_put_where_they_belong(key):
    mesh = make_mesh(1)
    everywhere = NamedSharding(mesh, P())
    for value in (np.arange(3.0, dtype=np.float32), jnp.arange(3), key, np.float32(2)):
        placed = put(value, everywhere)
        assert placed.sharding.is_equivalent_to(everywhere, placed.ndim)
        same = jax.random.key_data if placed.dtype == key.dtype else np.asarray
        np.testing.assert_array_equal(same(placed), same(value))
        assert put(placed, everywhere) is placed
    chunk = place({"x": np.zeros((5, 4, 2), np.float32)}, mesh)
    assert chunk["x"].sharding == NamedSharding(mesh, P(None, AXES))
    alone = SingleDeviceSharding(jax.devices()[0])
    assert put(jnp.arange(3), alone).sharding == alone
