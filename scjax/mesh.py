"""Which devices share a run, and which part of an array each of them holds.

One mesh of all devices, with two axes: "batch" (populations, sets, cells that are independent of each other) and
"cells" (the cells of one large population). `jit` sees whole arrays: a loss over a population is the loss over all of
it, wherever its cells lie, and XLA adds the communication.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from scjax.batches import CellSetBatch, PairedBatch, TimeSeriesBatch
from scjax.check import at_least
from scjax.hosts import refuse_several

__all__ = [
    "AXES",
    "along_cells",
    "check_predicting",
    "check_shared",
    "everywhere",
    "fill_up",
    "make_mesh",
    "own_cells",
    "place",
    "put",
    "shardings",
    "spread",
    "split",
    "template",
    "told",
]

AXES = ("batch", "cells")


def make_mesh(n_devices: int | None = None, *, cells: int = 1) -> Mesh:
    """A mesh of axes "batch" and "cells"; None takes all devices of all processes.

    Args:
        cells: devices along the second axis; it must divide n_devices.

    Raises:
        ValueError: more devices than there are, fewer than all where there are several processes, or a number of them
            that `cells` does not divide.
    """
    devices = jax.devices()
    n = len(devices) if n_devices is None else n_devices
    at_least("n_devices", n, 1)
    at_least("cells", cells, 1)
    if n > len(devices):
        raise ValueError(
            f"n_devices must be at most the {len(devices)} devices of kind {devices[0].device_kind!r}; got {n}. On a "
            "CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of one."
        )
    if n < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"n_devices must be all {len(devices)} devices of the {jax.process_count()} processes, or None; got {n}."
        )
    if n % cells:
        raise ValueError(f"cells must divide n_devices; got cells={cells}, n_devices={n}.")
    return jax.make_mesh((n // cells, cells), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:n])


def check_shared(mesh: Mesh | None, shard_above: int | None) -> None:
    """A mesh that training can share, and `shard_above` only with one.

    Raises:
        ValueError: other axes, a process without a device of the mesh, or several processes without a mesh.
    """
    if mesh is None:
        if shard_above is not None:
            raise ValueError(f"shard_above={shard_above} needs a mesh of devices to spread over; got mesh=None.")
        refuse_several("training without a mesh")
        return
    if shard_above is not None:
        at_least("shard_above", shard_above, 1)
    _check_axes(mesh)
    left = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if left:
        raise ValueError(f"mesh must hold devices of every process; it has none of {sorted(left)}.")


def check_predicting(mesh: Mesh | None, what: str, n: int) -> None:
    """Predictions of `n` things at once can be shared by the mesh; always without one.

    Raises:
        ValueError: its devices do not divide n, called `what`; other axes; several processes.
    """
    if mesh is not None:
        refuse_several("a prediction on a mesh")
        _check_axes(mesh)
        _divisible(what, n, mesh)


def along_cells(mesh: Mesh) -> Mesh:
    """The same devices, all of them along "cells": they share one population."""
    return Mesh(mesh.devices.reshape(1, -1), AXES, axis_types=(AxisType.Auto,) * 2)  # in their order


def told(mesh: Mesh) -> str:
    """One line on the devices that share a run."""
    first, n_processes = mesh.devices.flat[0], len({device.process_index for device in mesh.devices.flat})
    of = f" of {n_processes} processes" if n_processes > 1 else ""
    axes = " x ".join(f"{mesh.shape[axis]} {axis}" for axis in AXES)
    devices = "device" if mesh.size == 1 else "devices"
    return f"trained on {mesh.size} {devices}{of} ({first.device_kind}): {axes}"


def split(batch: Any, mesh: Mesh) -> Any:
    """How a batch is cut: a tree of its structure with a PartitionSpec for each leaf (arrays or their shapes).

    - PairedBatch: the populations over "batch" and the cells of each over "cells", where these divide them; else the
      cells of each population over all devices. Likewise CellSetBatch, of sets.
    - TimeSeriesBatch: the cells of each time over all devices (`fill_up` makes the targets divisible).
    - anything else: the first axis of every leaf over all devices; scalars are held by each.

    Raises:
        ValueError: nothing of these is divisible; the numbers are told.
    """
    if isinstance(batch, TimeSeriesBatch):
        _divisible("the number of cells of the first time (sampling.n_cells)", batch.x0.shape[0], mesh)
        _divisible("the number of target cells, filled up (mesh.fill_up)", batch.targets.shape[1], mesh)
        return TimeSeriesBatch(
            x0=PartitionSpec(AXES),
            targets=PartitionSpec(None, AXES),
            weights=PartitionSpec(None, AXES),
            self_transport=None if batch.self_transport is None else PartitionSpec(),
            ts=batch.ts,
        )
    if isinstance(batch, PairedBatch):
        groups, within = _grouped("population", "sampling.n_populations", batch.source.shape, mesh)
        specs = {"source": within, "target": within, "perturbation": groups, "genes": PartitionSpec()}
        return PairedBatch(**specs)
    if isinstance(batch, CellSetBatch):
        groups, within = _grouped("set", "sampling.n_sets", batch.cells.shape, mesh)
        return CellSetBatch(
            cells=within,
            control=within,
            covariates={k: groups if len(v.shape) == 1 else within for k, v in batch.covariates.items()},
            mask=within,
            space=None if batch.space is None else groups,
            measured=None if batch.measured is None else groups,
        )

    def first_axis(path: Any, leaf: Any) -> PartitionSpec:
        if not leaf.shape:
            return PartitionSpec()
        _divisible(f"the first axis of {jax.tree_util.keystr(path) or 'the batch'}", leaf.shape[0], mesh)
        return PartitionSpec(AXES)

    return jax.tree_util.tree_map_with_path(first_axis, batch)


def own_cells(batch: Any, mesh: Mesh) -> Callable[[tuple[int, ...]], tuple[slice, ...]]:
    """Which cells of batches like this one the process must read: what its devices hold of them, as `split` cuts them.

    Returns:
        Of the shape of an array of cells the slices, as `scjax.data.collate.Share` has them: all cells where the array
        is still to be filled up, and where the process is the only one.
    """
    cuts = split(fill_up(batch, mesh), mesh)

    def cut_of(shape: tuple[int, ...]) -> PartitionSpec:
        if not isinstance(batch, TimeSeriesBatch):
            return _grouped("group", "groups", shape, mesh)[1]
        if len(shape) == 2:
            return cuts.x0
        return PartitionSpec() if shape[1] % mesh.size else cuts.targets

    def own(shape: tuple[int, ...]) -> tuple[slice, ...]:
        everywhere = NamedSharding(mesh, cut_of(shape)).devices_indices_map(shape)
        mine = [part for device, part in everywhere.items() if device.process_index == jax.process_index()]
        bounds = [[part.indices(n)[:2] for part in parts] for n, *parts in zip(shape, *mine, strict=True)]
        return tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in bounds)

    return own


def fill_up(batch: Any, mesh: Mesh) -> Any:
    """The batch with as many target cells as the devices divide: cells of mass 0, as `TimeSeriesBatch` has them.

    Other batches come back as they are. The loss is the same up to rounding.
    """
    if not isinstance(batch, TimeSeriesBatch):
        return batch
    missing = -batch.targets.shape[1] % mesh.size
    if not missing:
        return batch
    targets = np.concatenate([batch.targets, np.repeat(batch.targets[:, :1], missing, axis=1)], axis=1)
    weights = np.pad(batch.weights, ((0, 0), (0, missing)))
    return TimeSeriesBatch(
        x0=batch.x0, targets=targets, weights=weights, self_transport=batch.self_transport, ts=batch.ts
    )


def shardings(tree: Any, mesh: Mesh, shard_above: int | None = None) -> tuple[Any, tuple[str, ...]]:
    """Where each leaf of parameters or of a training state lies, and the names of those that could not be cut.

    Every device holds all of them; but of arrays with `shard_above` entries or more each device holds a part, cut along
    the longest axis that the number of devices divides. An array without such an axis is held whole, and named.
    """
    if shard_above is not None:
        at_least("shard_above", shard_above, 1)
    whole = []

    def one(path: Any, leaf: Any) -> NamedSharding:
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if shard_above is None or is_key or leaf.size < shard_above or mesh.size == 1:
            return NamedSharding(mesh, PartitionSpec())
        axes = [axis for axis, n in enumerate(leaf.shape) if n and n % mesh.size == 0]
        if not axes:
            whole.append(f"{jax.tree_util.keystr(path)} {tuple(leaf.shape)}")
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXES))

    return jax.tree_util.tree_map_with_path(one, tree), tuple(whole)


def template(tree: Any, mesh: Mesh, shard_above: int | None = None) -> Any:
    """Shapes that say where each leaf is to lie (see `shardings`): `like` of `scjax.checkpoint.read`."""
    where, _ = shardings(tree, mesh, shard_above)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, where)


def place(chunk: Any, mesh: Mesh) -> Any:
    """Stacked batches, [steps, ...] each leaf, on the devices as `split` cuts one batch.

    Every process hands in batches of the whole shape and keeps its own part of them; what else there is it need not
    have read (`own_cells`). Batches are functions of their number, so nothing is sent. Leaves that are spread over the
    processes already stay as they are, where a process makes its part alone
    (`jax.make_array_from_process_local_data`).
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), chunk)
    cuts = jax.tree.map(lambda cut: NamedSharding(mesh, PartitionSpec(None, *cut)), split(one, mesh), is_leaf=_is_cut)
    return jax.tree.map(put, chunk, cuts)


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array, or a random key, that every process has, laid out on the devices of all of them."""
    if isinstance(leaf, jax.Array) and leaf.committed and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of one length, of which each device gets a part; without a mesh all of it lies on the default device.

    Raises:
        ValueError: the devices do not divide the length.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    return jax.tree.map(lambda leaf, cut: put(leaf, NamedSharding(mesh, cut)), tree, split(tree, mesh))


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that each device of the mesh holds; without a mesh as they are."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def _grouped(name: str, option: str, shape: Sequence[int], mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
    """Of what is one for a group of cells, [groups, ...], and of what is one a cell, [groups, cells, ...]."""
    n_groups, n_cells = shape[:2]
    n_batch, n_within = (mesh.shape[axis] for axis in AXES)
    if n_groups % n_batch == 0 and n_cells % n_within == 0:
        return PartitionSpec("batch"), PartitionSpec("batch", "cells")
    if n_cells % mesh.size == 0:
        return PartitionSpec(), PartitionSpec(None, AXES)
    within = f" and sampling.n_cells one of {n_within}" if n_within > 1 else ""
    raise ValueError(
        f"a batch of {n_groups} {name}s of {n_cells} cells cannot be shared by {mesh.size} devices ({n_batch} x "
        f"{n_within}): {option} must be a multiple of {n_batch}{within}, or sampling.n_cells one of {mesh.size}."
    )


def _check_axes(mesh: Mesh) -> None:
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"mesh must have the axes {AXES} (scjax.mesh.make_mesh); got {mesh.axis_names}.")


def _divisible(what: str, n: int, mesh: Mesh) -> None:
    if n % mesh.size:
        raise ValueError(f"{what} must be a multiple of the {mesh.size} devices that share it; got {n}.")


def _is_cut(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
