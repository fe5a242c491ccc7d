"""Transport between cells that lie on four virtual devices, and on one; prints what was found as JSON."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scjax.losses import annealed_sinkhorn_divergence, self_transport, sinkhorn, solve_sinkhorn
from scjax.mesh import AXES, make_mesh

sinkhorn.ROWS, sinkhorn.COLUMNS = 32, 48  # several tiles of 160 x 96 cells


def annealed(x, y):
    return annealed_sinkhorn_divergence(x, y, blur=0.5) + self_transport(x, blur=0.5)


def converged(x, y):
    return solve_sinkhorn(x, y, blur=0.5).divergence


def compiled(f, x, y):
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(x, y).compile()


def largest_error(got, want):
    of = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), got, want)
    return max(jax.tree.leaves(of))


rng = np.random.default_rng(0)
x, y = (jnp.asarray(rng.normal(size=(n, 3)) + n / 96, jnp.float32) for n in (160, 96))
spread = [jax.device_put(cells, NamedSharding(make_mesh(), PartitionSpec(AXES))) for cells in (x, y)]
found = {}
for way, pairs in {"dense": 2**24, "tiles": 0}.items():
    sinkhorn.DENSE_PAIRS = pairs
    for f in (annealed, converged):
        one, many = compiled(partial(f), x, y), compiled(partial(f), *spread)  # `partial`: a program of its own
        work = [program.cost_analysis()["flops"] for program in (one, many)]
        error = largest_error(*jax.device_get((many(*spread), one(x, y))))
        found[f"{way} {f.__name__}"] = {"error": error, "work": work[1] / work[0]}
json.dump(found, sys.stdout)
