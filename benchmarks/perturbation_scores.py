"""How well does a small scDFM predict perturbations that it never saw? Scores beside baselines and the ceiling.

    python benchmarks/perturbation_scores.py norman --seeds 3
    python benchmarks/perturbation_scores.py kang --data kang.h5ad --seeds 1

norman: the shipped subset, five pairs held out both of whose genes were seen alone (preset scdfm/norman_subset); the
Pearson correlation of deltas also over the genes that ten or more cells express.
kang: each cell type in turn without its stimulated cells (preset scdfm/kang); that file does not ship.
Trains, generates, prints a table for each split and appends all numbers to results/. Minutes to an hour on 2 CPU cores.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np

from scjax.data import datasets
from scjax.data.source import read_anndata
from scjax.data.splits import LeaveOut
from scjax.experiment import evaluate, train
from scjax.metrics.perturbation_report import render, to_json_dict, verdict
from scjax.predict import load, perturbation
from scjax.presets import preset
from scjax.train.hooks import Progress
from scjax.types import Population


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("norman", "kang"))
    parser.add_argument("--data", type=Path, help="the .h5ad of kang")
    parser.add_argument("--types", nargs="+", help="cell types of kang to hold out; each in turn by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n-steps", type=int, help="of training; the preset's by default")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()

    if args.question == "norman":
        adata = datasets.norman2019()
        experiments = {"combo_seen2": preset("scdfm/norman_subset").experiment}
    else:
        if args.data is None:
            parser.error("kang needs --data")
        adata, experiment = read_anndata(args.data), preset("scdfm/kang").experiment
        covariate = experiment.split.covariate
        types = args.types or sorted(set(map(str, adata.obs[covariate])))
        experiments = {name: replace(experiment, split=LeaveOut(covariate=covariate, value=name)) for name in types}

    for name, experiment in experiments.items():
        if args.n_steps is not None:
            experiment = replace(experiment, n_steps=args.n_steps, checkpoint_every=args.n_steps)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        with tempfile.TemporaryDirectory() as folder:
            found = scores(f"{args.question}, {name}", experiment, adata, Path(folder), seeds)
        if args.save:
            record = {"question": "perturbation_scores", "data": args.question, "split": name, "seeds": list(seeds)}
            record["n_steps"] = experiment.n_steps
            path = harness.RESULTS / f"perturbation_scores_{args.question}.json"
            harness.append(harness.environment() | record | found, path)


def scores(title, experiment, adata, folder: Path, seeds) -> dict:
    """Trains with each seed; the table as JSON, and what it leaves out."""
    runs, seconds = [folder / f"seed{seed}" for seed in seeds], []
    for seed, run in zip(seeds, runs, strict=True):
        started = time.perf_counter()
        train(replace(experiment, seed=seed), adata, run, hooks=[Progress(force=True)])
        seconds.append(time.perf_counter() - started)
    tables = evaluate({"scDFM": runs}, adata)
    print(f"\n{title}: trained in {', '.join(f'{s:.0f}' for s in seconds)} s")
    for table in tables:
        print(render(table))
        print("\n".join(verdict(table, "scDFM", metric.name) for metric in table.metrics))
    more = expressed(runs, adata) if "n_cells" in adata.var else {}
    return {"train_s": seconds, "tables": [to_json_dict(table) for table in tables], **more}


def expressed(runs, adata) -> dict:
    """Pearson of deltas over the genes that at least ten cells express, as the data's own page measures it."""
    trained = [load(run) for run in runs]
    known, test = trained[0].split.populations, trained[0].split.test
    real = perturbation.observed_cells(trained[0], adata, known)
    keep = np.isin(trained[0].genes, adata.var_names[adata.var["n_cells"] >= 10])
    means = {population: cells.mean(axis=0, dtype=np.float64)[keep] for population, cells in real.items()}
    control = means[Population(())]
    effects = {population: mean - control for population, mean in means.items()}
    additive = {p: sum(effects[Population((name,))] for name in p.perturbation) for p in test}
    pearson = lambda a, b: float(np.corrcoef(a, b)[0, 1])  # noqa: E731
    found = {"additive": {str(p): pearson(additive[p], effects[p]) for p in test}, "scDFM": []}
    for run in trained:
        sources = perturbation.read_sources(run, adata)
        cells, _ = perturbation.generate(run, sources, test)
        moved = {p: cells[p].x.mean(axis=0, dtype=np.float64)[keep] - control for p in test}
        found["scDFM"].append({str(p): pearson(moved[p], effects[p]) for p in test})
    print(f"Pearson of deltas over {int(keep.sum())} genes expressed in ten or more cells:")
    for name, values in [("additive", found["additive"]), *(("scDFM", v) for v in found["scDFM"])]:
        listed = ", ".join(f"{p} {v:.3f}" for p, v in values.items())
        print(f"  {name}: mean {np.mean(list(values.values())):.3f} ({listed})")
    return {"pearson_delta_expressed": found}


if __name__ == "__main__":
    main()
