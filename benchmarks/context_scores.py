"""How well does a small PerturbDiff predict what a perturbation does to cells of a kind that it never saw perturbed?

    python benchmarks/context_scores.py kang_types --data kang.h5ad --seeds 3
    python benchmarks/context_scores.py kang_donors --data kang.h5ad --types "B cells" "CD4 T cells"
    python benchmarks/context_scores.py mcfaline_lines

kang_types: each cell type in turn without its stimulated cells (preset perturbdiff/kang).
kang_donors: one donor's stimulated cells of some types held out together; the other donor shows what they do.
mcfaline_lines: each line of the shipped data in turn without its perturbed cells (preset perturbdiff/mcfaline). Its
effects are weak; it shows whether the model invents some.
Trains, generates, prints a table for each split and one of all, and appends every number to results/. Minutes a split
and seed on 2 CPU cores. Kang's file does not ship.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import harness

from scjax.data import datasets
from scjax.data.source import read_anndata
from scjax.data.splits import HoldOutCrossed, LeaveOut
from scjax.experiment import evaluate, train
from scjax.metrics.perturbation_report import render, to_json_dict, verdict
from scjax.presets import preset
from scjax.train.hooks import Progress

MODEL = "PerturbDiff"
SUMMARY = ("pearson_delta", "l2", "r2", "energy_distance", "variance_ratio")
OF_DONORS = ("B cells", "CD14+ Monocytes", "CD4 T cells")  # types of which the donor has 50 stimulated cells or more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("kang_types", "kang_donors", "mcfaline_lines"))
    parser.add_argument("--data", type=Path, help="the .h5ad of kang")
    parser.add_argument("--types", nargs="+", help="cell types (or lines) to hold out; by default each in turn")
    parser.add_argument("--donor", default="107", help="of kang_donors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n-steps", type=int, help="of training; the preset's by default")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()
    if args.question == "mcfaline_lines":
        adata = datasets.mcfaline2023()
    elif args.data is None:
        parser.error(f"{args.question} needs --data")
    else:
        adata = read_anndata(args.data)

    seeds, tables = range(args.first_seed, args.first_seed + args.seeds), {}
    for name, experiment in experiments(args, adata).items():
        if args.n_steps is not None:
            warmup = min(experiment.optimizer.n_warmup, args.n_steps - 1)
            optimizer = replace(experiment.optimizer, n_warmup=warmup)
            steps = {
                "n_steps": args.n_steps,
                "checkpoint_every": args.n_steps,
                "scan_steps": 10 if args.n_steps % 10 == 0 else 1,
            }
            experiment = replace(experiment, optimizer=optimizer, **steps)
        with tempfile.TemporaryDirectory() as folder:
            tables[name], seconds = scores(f"{args.question}, {name}", experiment, adata, Path(folder), seeds)
        if args.save:
            record = {"question": "context_scores", "data": args.question, "split": name, "seeds": list(seeds)}
            record |= {"n_steps": experiment.n_steps, "train_s": seconds, "table": to_json_dict(tables[name])}
            harness.append(harness.environment() | record, harness.RESULTS / f"context_scores_{args.question}.json")
    print(f"\n{args.question}, {len(seeds)} seeds\n{summary(tables)}")


def experiments(args, adata) -> dict:
    """By the name of the split."""
    if args.question == "kang_donors":
        experiment = preset("perturbdiff/kang").experiment
        types = tuple(args.types or OF_DONORS)
        return {
            f"donor {args.donor}: {', '.join(types)}": replace(
                experiment,
                spec=replace(experiment.spec, batch="donor", covariates=("cell_type", "donor")),
                split=HoldOutCrossed(
                    covariates=("cell_type", "donor"), values=tuple((name, args.donor) for name in types)
                ),
                sampling=replace(experiment.sampling, group_by=("perturbation", "cell_type", "batch")),
            )
        }
    experiment = preset({"kang_types": "perturbdiff/kang", "mcfaline_lines": "perturbdiff/mcfaline"}[args.question])
    types = args.types or sorted(set(map(str, adata.obs["cell_type"])))
    return {name: replace(experiment.experiment, split=LeaveOut(covariate="cell_type", value=name)) for name in types}


def scores(title, experiment, adata, folder: Path, seeds):
    """Trains with each seed: the table of all held-out populations, and the seconds of each training."""
    runs, seconds = [folder / f"seed{seed}" for seed in seeds], []
    for seed, run in zip(seeds, runs, strict=True):
        started = time.perf_counter()
        train(replace(experiment, seed=seed), adata, run, hooks=[Progress(experiment.cells_per_step, force=True)])
        seconds.append(time.perf_counter() - started)
    table = evaluate({MODEL: runs}, adata)[0]
    print(f"\n{title}: trained in {', '.join(f'{s:.0f}' for s in seconds)} s")
    print(render(table))
    print("\n".join(verdict(table, MODEL, metric.name) for metric in table.metrics))
    return table, seconds


def summary(tables) -> str:
    """A block for each metric: a line for each row of the tables, a column for each split and their mean."""
    names = list(tables)
    rows = [row.name for row in tables[names[0]].rows]
    width = max(map(len, rows))
    lines = [f"{'':{width}}  " + "  ".join(f"{name[:15]:>15}" for name in (*names, "mean"))]
    for metric in SUMMARY:
        lines.append(f"{metric}, mean over populations and seeds (of the model: +- standard deviation over seeds)")
        for name in rows:
            found = [tables[split].row(name) for split in names]
            means = [row.mean(metric) for row in found]
            spread = [row.sd_seeds(metric) for row in found]
            cells = [f"{m:.4f}" + (f" +- {s:.4f}" if s is not None else "") for m, s in zip(means, spread, strict=True)]
            cells.append(f"{sum(means) / len(means):.4f}")
            lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
