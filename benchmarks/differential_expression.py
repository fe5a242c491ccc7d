"""How long do the rank sums of many perturbations against shared controls take, and how much faster than scanpy's?

    python benchmarks/differential_expression.py
    python benchmarks/differential_expression.py --peer-conditions 10 --rounds 5

Simulated sparse log-normalised counts. Both sides give p-value, false discovery rate and fold change of every gene and
condition: scjax through `differential_expression_table`, controls sorted anew in each call; scanpy through
`rank_genes_groups(method="wilcoxon", reference="control", tie_correct=True)` on the dense matrix, which it handles
fastest. Its work is the same for each condition, so that with `--peer-conditions` some stand for all (what it does once
a call then weighs more); times are per condition. Needs scanpy, unless `--no-peer`.
"""

import argparse
import importlib.metadata
import sys
import time
import warnings
from pathlib import Path

import harness
import numpy as np

from scjax.metrics.expression import Control, differential_expression_table
from scjax.metrics.rank_sum import rank_sum
from scjax.types import Population

DEPTH = 10_000  # counts that a cell is brought to
SHAPES = {"n_conditions": 100, "n_cells": 100, "n_controls": 5_000, "n_genes": 5_000}


def world(n_conditions: int, n_cells: int, n_controls: int, n_genes: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Overdispersed counts of cells of unlike depth; a condition moves a twentieth of the genes."""
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(-2.3, 1.6, n_genes))

    def cells(n: int, shift: np.ndarray | float) -> np.ndarray:
        depth = np.exp(rng.normal(0, 0.35, (n, 1)))
        counts = rng.poisson(rate * np.exp(shift) * depth * rng.gamma(2, 0.5, (n, n_genes))).astype(np.float32)
        return np.log1p(counts / counts.sum(axis=1, keepdims=True) * DEPTH)

    control = cells(n_controls, 0.0)
    moved = (np.where(rng.random(n_genes) < 0.05, rng.normal(0, 1, n_genes), 0) for _ in range(n_conditions))
    return control, [cells(n_cells, shift) for shift in moved]


def scjax_job(shapes: dict[str, int]) -> harness.Job:
    control, conditions = world(**shapes)
    cells = {Population((f"p{i}",)): x for i, x in enumerate(conditions)}

    def call():
        return differential_expression_table(cells, {"": Control(control)})

    seconds = []
    for _ in range(2):  # the first one compiles
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return harness.Job(call, len(conditions), {"n_conditions": len(conditions)}, max(0.0, seconds[0] - seconds[1]))


def scanpy_job(shapes: dict[str, int], n_conditions: int) -> harness.Job:
    import scanpy

    control, conditions = world(**shapes)
    adata = annotated(control, conditions[:n_conditions])
    began = time.perf_counter()
    ranked(scanpy, annotated(control[:50, :20], [x[:50, :20] for x in conditions[:1]]))  # numba compiles
    compile_s = time.perf_counter() - began
    return harness.Job(lambda: ranked(scanpy, adata), n_conditions, {"n_conditions": n_conditions}, compile_s)


def annotated(control: np.ndarray, conditions: list[np.ndarray]):
    import anndata
    import pandas

    names = np.repeat(["control", *(f"p{i}" for i in range(len(conditions)))], [len(control), *map(len, conditions)])
    obs = pandas.DataFrame({"condition": pandas.Categorical(names)}, index=list(map(str, range(len(names)))))
    return anndata.AnnData(np.concatenate([control, *conditions]), obs)


def ranked(scanpy, adata) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fold changes of genes that nobody expresses
        scanpy.tl.rank_genes_groups(adata, "condition", reference="control", method="wilcoxon", tie_correct=True)


def agreement(shapes: dict[str, int], with_scanpy: bool) -> dict[str, float]:
    """Largest relative error of log p against scipy, and of z against scanpy (which corrects no continuity)."""
    from scipy.stats import mannwhitneyu

    control, (x, *_) = world(**{**shapes, "n_conditions": 1})
    ours = rank_sum(x, control)
    varies = (x != x[0]).any(axis=0) | (control != x[0]).any(axis=0)
    double = (cells[:, varies].astype(np.float64) for cells in (x, control))  # else scipy's p is in single precision
    theirs = mannwhitneyu(*double, method="asymptotic", axis=0)
    with np.errstate(divide="ignore"):
        ours_log, log_p = np.log(ours.p_value[varies]), np.log(theirs.pvalue)
    wrong = np.abs(ours_log - log_p) / np.maximum(np.abs(log_p), 1)
    found = {
        "genes_compared": int(varies.sum()),
        "statistics_that_differ": int(np.sum(ours.statistic[varies] != theirs.statistic)),
        "log_p_against_scipy": float(wrong.max()),
        "least_p": float(theirs.pvalue.min()),
    }
    if with_scanpy:
        import scanpy

        adata = annotated(control, [x])
        ranked(scanpy, adata)
        table = scanpy.get.rank_genes_groups_df(adata, "p0").set_index("names").loc[list(adata.var_names)]
        off = ours.statistic - len(x) * len(control) / 2
        counted = ours.z != 0
        uncorrected = ours.z[counted] * np.abs(off[counted]) / (np.abs(off[counted]) - 0.5)
        error = np.abs(table["scores"].to_numpy()[counted] - uncorrected) / np.maximum(np.abs(uncorrected), 1)
        found["z_against_scanpy"] = float(error.max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser, n_rounds=3)
    for name, value in SHAPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--peer-conditions", type=int, help="conditions that scanpy tests in a call; all by default")
    args = parser.parse_args()
    shapes = {name: getattr(args, name) for name in SHAPES}
    n_peer = args.n_conditions if args.peer_conditions is None else args.peer_conditions
    if args.worker:
        job = (lambda: scjax_job(shapes)) if args.worker == "scjax" else (lambda: scanpy_job(shapes, n_peer))
        harness.serve(job, args.threads)
        return
    agreed = agreement(shapes, args.peer)
    print(", ".join(f"{name} {value:.3g}" for name, value in agreed.items()), flush=True)
    worker = [sys.executable, str(Path(__file__).resolve())]
    worker += [f"--{name.replace('_', '-')}={value}" for name, value in shapes.items()]
    worker += [f"--peer-conditions={n_peer}", f"--threads={args.threads}"]
    result = harness.compare(
        {side: [*worker, "--worker", side] for side in (["scjax", "scanpy"] if args.peer else ["scjax"])},
        n_rounds=args.rounds,
        n_threads=args.threads,
        patience_s=args.patience,
        keep_memory=args.keep_memory,
    )
    print(harness.report(f"Differential expression, seconds of a condition: {shapes}", result))
    if args.save:
        control, conditions = world(**{**shapes, "n_conditions": 1})
        density = {"density": round(float(np.mean(np.concatenate([control, *conditions]) != 0)), 3)}
        record = harness.environment()
        if args.peer:
            record["versions"] |= {name: importlib.metadata.version(name) for name in ("scanpy", "numba", "scipy")}
        record |= {"question": "differential_expression", "shapes": shapes | density, "agreement": agreed}
        record |= {"n_threads": args.threads, "keep_memory": args.keep_memory} | result
        harness.append(record, harness.RESULTS / "differential_expression.json")


if __name__ == "__main__":
    main()
