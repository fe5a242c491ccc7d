"""How much memory does `scjax evaluate` take on two large sparse files, and how long?

    python benchmarks/evaluate_memory.py

200,000 real and 200,000 predicted cells x 2,000 genes, a tenth of the values not zero, log-normalised, as .h5ad:
controls and 20 perturbations in one context, half of which are predicted. The command runs in a process of its own and
writes its report; that process's high-water mark is told. The files are made here and removed.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import harness
import numpy as np
import pandas as pd
from scipy import sparse

GIB = 2**30


def make(path: Path, conditions: np.ndarray, n_genes: int, density: float, seed: int) -> None:
    """Values that a condition raises in a few genes; the sparsity of droplets."""
    rng = np.random.default_rng(seed)
    n_cells, per_cell = len(conditions), int(density * n_genes)
    indices = np.sort(rng.integers(0, n_genes, (n_cells, per_cell), np.int32), axis=1)
    values = rng.gamma(2.0, 0.5, (n_cells, per_cell)).astype(np.float32)
    codes, names = pd.factorize(conditions)
    raised = np.random.default_rng(7).random((len(names), n_genes)) < 0.02
    values *= 1 + raised[codes[:, None], indices]
    matrix = sparse.csr_matrix(
        (values.ravel(), indices.ravel(), np.arange(n_cells + 1) * per_cell), shape=(n_cells, n_genes)
    )
    matrix.sum_duplicates()
    obs = pd.DataFrame({"drug": pd.Categorical(conditions)}, index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--conditions", type=int, default=21, help="the control among them")
    parser.add_argument("--limit", type=float, default=6, help="GiB; more is a failure")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()

    names = np.array(["control", *(f"d{i}" for i in range(1, args.conditions))])
    real = names[np.arange(args.cells) % len(names)]
    held_out = names[1 : 1 + (len(names) - 1) // 2]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "real.h5ad", Path(folder) / "predicted.h5ad"
        make(files[0], real, args.genes, args.density, 0)
        make(files[1], held_out[np.arange(args.cells) % len(held_out)], args.genes, args.density, 1)
        command = [sys.executable, "-m", "scjax", "evaluate", "--predicted", str(files[1]), "--real", str(files[0])]
        command += ["--perturbation", "drug", "--space", "lognormalised", "--out", str(Path(folder) / "report")]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall_s = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        sizes = {path.stem: path.stat().st_size for path in files}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"peak_rss_bytes": usage.ru_maxrss * 1024, "wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime}
    print(f"peak {found['peak_rss_bytes'] / GIB:.2f} GiB (limit {args.limit:g}), {wall_s:.0f} s")
    if args.save:
        shapes = {"cells_real": args.cells, "cells_predicted": args.cells, "genes": args.genes}
        shapes |= {"density": args.density, "conditions": args.conditions, "predicted_conditions": len(held_out)}
        record = {"question": "memory of an evaluation", "shapes": shapes, "file_bytes": sizes}
        harness.append(harness.environment() | record | found, harness.RESULTS / "evaluate_memory.json")
    if found["peak_rss_bytes"] > args.limit * GIB:
        raise SystemExit(f"more than {args.limit:g} GiB")


if __name__ == "__main__":
    main()
