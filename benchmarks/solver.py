"""Does solving through diffrax cost more than a plain rematerialised scan? Same drift, same noise, interleaved rounds.

python benchmarks/solver.py
"""

import argparse
import statistics
import time

import harness
import jax
import jax.numpy as jnp

from scjax.models import scimf
from scjax.processes import sde

SHAPES = {"n_cells": 512, "n_dims": 50, "n_steps": 70, "n_times": 8}
CONFIG = scimf.Config(n_dims=50, dropout=0.0)
TS = tuple(float(t) for t in range(SHAPES["n_times"]))


def through_diffrax(params, x0, key):
    path = scimf.simulate(params, x0, TS, key, config=CONFIG)
    return jnp.mean(path.x[1:] ** 2) + jnp.mean(path.kinetic_energy[-1])


def plain_scan(params, x0, key):
    grid = sde.time_grid(TS, CONFIG.dt)
    dts = jnp.asarray(grid.dts, x0.dtype)

    @jax.checkpoint
    def step(state, k):
        x, energy = state
        v = scimf.drift(params, x, config=CONFIG)
        dW = jnp.sqrt(dts[k]) * jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        x = x + v * dts[k] + scimf.diffusion(params, x, config=CONFIG) * dW
        return (x, energy + jnp.sum(v**2, -1) * dts[k]), x

    start = (x0, jnp.zeros(x0.shape[0], x0.dtype))
    (_, energy), xs = jax.lax.scan(step, start, jnp.arange(len(dts)))
    return jnp.mean(xs[grid.observed[1:] - 1] ** 2) + jnp.mean(energy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()
    params = scimf.init(jax.random.key(0), CONFIG)
    x0 = jax.random.normal(jax.random.key(1), (SHAPES["n_cells"], SHAPES["n_dims"]))
    inputs = (params, x0, jax.random.key(2))
    record = {"question": "solver", "shapes": SHAPES}
    for kind, of in (("value", lambda f: f), ("value_and_grad", jax.value_and_grad)):
        compiled, sides = {}, {"diffrax": through_diffrax, "scan": plain_scan}
        for name, function in sides.items():
            began = time.perf_counter()
            compiled[name] = jax.jit(of(function)).lower(*inputs).compile()
            record[f"{kind}_{name}_compile_s"] = time.perf_counter() - began
        values = {name: jax.tree.leaves(f(*inputs))[0] for name, f in compiled.items()}
        assert abs(values["diffrax"] / values["scan"] - 1) < 1e-5, values
        seconds = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, f in compiled.items():
                began = time.perf_counter()
                jax.block_until_ready(f(*inputs))
                seconds[name].append(time.perf_counter() - began)
        ratio = statistics.median(d / s for d, s in zip(seconds["diffrax"], seconds["scan"], strict=True))
        record |= {f"{kind}_{name}_s": statistics.median(s) for name, s in seconds.items()}
        record[f"{kind}_ratio"] = ratio
        record |= {f"{kind}_{n}_temp_bytes": f.memory_analysis().temp_size_in_bytes for n, f in compiled.items()}
        times = ", ".join(f"{n} {statistics.median(s):.3f} s" for n, s in seconds.items())
        print(f"{kind}: {times}; diffrax / scan {ratio:.3f} (median of {args.rounds} rounds)")
    if args.save:
        harness.append(harness.environment() | record, harness.RESULTS / "solver.json")


if __name__ == "__main__":
    main()
