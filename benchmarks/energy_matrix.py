"""How long do the energy distances between all pairs of conditions take, beside a loop over scipy's cdist?

    python benchmarks/energy_matrix.py --dims 50 500
    python benchmarks/energy_matrix.py --pertpy-python ENVIRONMENT/bin/python

The loop computes each condition's own mean once, and each pair once. All sides compute in double precision and must
agree. `--no-peer` leaves the loop out; `--pertpy-python` names an interpreter that has pertpy (and need not have
scjax), whose pairwise "edistance" of the same cells is timed too.
"""

import argparse
import sys
from functools import partial

import harness
import numpy as np

N_CONDITIONS, N_CELLS = 100, 100
AGREEMENT = 1e-6  # of the sums of all distances; pertpy's intermediate precision is its own affair


def populations(n_conditions: int, n_cells: int, n_dims: int) -> list[np.ndarray]:
    """Clouds of float32 cells whose means lie about as far apart as conditions do in log-normalised expression."""
    rng = np.random.default_rng(0)
    shifts = 0.3 * rng.normal(size=(n_conditions, 1, n_dims))
    return list((rng.normal(size=(n_conditions, n_cells, n_dims)) + shifts).astype(np.float32))


def scjax(sizes: tuple[int, int, int]) -> harness.Job:
    from scjax.metrics.population import energy_distance_matrix

    cells = populations(*sizes)
    return _job(lambda: energy_distance_matrix(cells, "energy_euclidean_v"))


def cdist_loop(sizes: tuple[int, int, int]) -> harness.Job:
    from scipy.spatial.distance import cdist

    cells = populations(*sizes)

    def call() -> np.ndarray:
        n = len(cells)
        within = [cdist(x, x).mean() for x in cells]
        matrix = np.zeros((n, n))
        for i in range(n):
            for j in range(i):
                matrix[i, j] = matrix[j, i] = 2 * cdist(cells[i], cells[j]).mean() - within[i] - within[j]
        return matrix

    return _job(call)


def pertpy(sizes: tuple[int, int, int]) -> harness.Job:
    import anndata
    from pertpy.tools import Distance

    cells = populations(*sizes)
    names = [f"c{i:04d}" for i in range(sizes[0])]
    adata = anndata.AnnData(np.zeros((sizes[0] * sizes[1], 1), np.float32), obsm={"X_pca": np.concatenate(cells)})
    adata.obs["condition"] = np.repeat(names, sizes[1])
    adata.obs["condition"] = adata.obs["condition"].astype("category")
    distance = Distance("edistance", obsm_key="X_pca")
    return _job(lambda: distance.pairwise(adata, groupby="condition", show_progressbar=False).to_numpy())


SIDES = {"scjax": scjax, "cdist loop": cdist_loop, "pertpy": pertpy}


def _job(matrix) -> harness.Job:
    found = {}  # is read after the first call, which is not measured

    def call() -> None:
        found["sum"] = float(matrix().sum())

    return harness.Job(call, settings=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--conditions", type=int, default=N_CONDITIONS)
    parser.add_argument("--cells", type=int, default=N_CELLS, help="of each condition")
    parser.add_argument("--pertpy-python", help="an interpreter that has pertpy, which is then timed too")
    harness.add_options(parser, n_rounds=5)
    args = parser.parse_args()
    if args.worker:
        harness.serve(partial(SIDES[args.worker], (args.conditions, args.cells, args.dims[0])), args.threads)
        return

    pythons = {"scjax": sys.executable}
    pythons |= {"cdist loop": sys.executable} if args.peer else {}
    pythons |= {"pertpy": args.pertpy_python} if args.pertpy_python else {}
    for n_dims in args.dims:
        shapes = {"conditions": args.conditions, "cells": args.cells, "dims": n_dims}
        options = [word for name, size in shapes.items() for word in (f"--{name}", str(size))]
        commands = {
            side: [python, __file__, *options, "--threads", str(args.threads), "--worker", side]
            for side, python in pythons.items()
        }
        result = harness.compare(
            commands,
            n_rounds=args.rounds,
            n_threads=args.threads,
            patience_s=args.patience,
            keep_memory=args.keep_memory,
        )
        sums = {side: found["settings"]["sum"] for side, found in result["sides"].items()}
        for side, value in sums.items():
            if abs(value / sums["scjax"] - 1) > AGREEMENT:
                raise SystemExit(f"{side} computes something else: the distances sum to {value}, not {sums['scjax']}")
        print(harness.report(f"\nenergy distances of {args.conditions} conditions x {args.cells} x {n_dims}", result))
        if args.save:
            record = {"question": "energy_matrix", "shapes": shapes, "n_threads": args.threads}
            harness.append(harness.environment() | record | result, harness.RESULTS / "energy_matrix.json")


if __name__ == "__main__":
    main()
