"""The three systems on several devices and processes, as programs; each writes the final states to a folder.
scIMF comes twice, the second time with attention in tiles.

python shared_systems.py devices FOLDER                 on one device, and on 8 of one process
python shared_systems.py processes FOLDER PORT NUMBER   on 2 devices of each of two processes, after the former
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import tiny_cellsets
import tiny_perturbation
import tiny_series

from scjax import hosts
from scjax.data.splits import HoldOutSeenDoubles
from scjax.experiment import train
from scjax.mesh import make_mesh

TINY = {"scimf": tiny_series, "tiles": tiny_series, "scdfm": tiny_perturbation, "perturbdiff": tiny_cellsets}
ABOVE = 16


def experiment(name: str):
    """Eight cells are divisible; eps keeps Adam from making steps of the rounding where a gradient is zero."""
    tiny = TINY[name].EXPERIMENT
    more = {"split": HoldOutSeenDoubles(validation_fraction=0.34), "validate_every": 5} if name == "scdfm" else {}
    if name == "tiles":
        more["model"] = replace(tiny.model, attention="blockwise")
    return replace(
        tiny,
        sampling=replace(tiny.sampling, n_cells=8),
        optimizer=replace(tiny.optimizer, eps=1e-3),
        n_steps=10,
        checkpoint_every=5,
        **more,
    )


def run(folder: Path, case: str, name: str, **options) -> None:
    done = train(experiment(name), TINY[name].make_adata(), folder / f"{name}-{case}", **options)
    learned = (done.state.params, done.state.ema, done.state.best)
    from jax.experimental.multihost_utils import process_allgather

    local = lambda leaf: leaf.is_fully_addressable or leaf.is_fully_replicated  # noqa: E731
    leaves = [np.asarray(x if local(x) else process_allgather(x, tiled=True)) for x in jax.tree.leaves(learned)]
    part = max(leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(done.state.params))
    smallest = min(leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(done.state.params))
    if hosts.is_first():
        np.savez(folder / f"{name}-{case}.npz", *leaves, largest_part=part, smallest_part=smallest)


def main() -> None:
    what, folder, *more = sys.argv[1:]
    folder = Path(folder)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if what == "devices":
        for name in TINY:
            run(folder, "one", name)
            run(folder, "replicated", name, mesh=make_mesh(cells=2))
            run(folder, "spread", name, mesh=make_mesh(), shard_above=ABOVE)
            shutil.copytree(folder / f"{name}-spread", folder / f"{name}-resumed")
        return
    port, number = more
    hosts.start(f"localhost:{port}", 2, int(number))
    shared = {"mesh": make_mesh(), "shard_above": ABOVE}
    for name in TINY:
        run(folder, "processes", name, **shared)
        run(folder, "resumed", name, resume=True, step=5, **shared)


if __name__ == "__main__":
    main()
