"""Does scIMF predict a held-out time better than rules that need no training? Every interior time in turn.

    python benchmarks/series_scores.py --data ../shared/data --seeds 3
    python benchmarks/series_scores.py --data ../shared/data --only klein world

The settings are those of the preset scimf/series, the same for every set. Cells are the first ten principal components
fitted without the held-out time (EMT: its latent; B cell: its first components, without outliers; LARRY: its two
dimensions); the preset divides them by one number, so that the training cells have a mean variance of 1 per dimension.
Distances are told in that unit. Each table has the baselines of
`metrics.baselines.training_free`, all rows at equal cell numbers. The world is
`data.synthetic.InteractingParticles`, whose question is another: is the model above the floor by no more than half of
what the best baseline is above it?

Three times as many runs are trained, and groups of three also predict together: all their cells are one population. The
runs of a held-out time train in one program. Prints a line for each time and a summary, and appends all numbers to
results/. About two minutes a time on one core; with `--steps 20` a few seconds, to see whether it runs.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from scjax.data.collate import make_batches
from scjax.data.source import read_anndata
from scjax.data.splits import HoldOutTimes
from scjax.data.synthetic import InteractingParticles, Snapshots, to_anndata
from scjax.data.timeseries import TimeSeriesData, prepare_time_series
from scjax.metrics.baselines import training_free
from scjax.metrics.population import POPULATION_METRICS
from scjax.metrics.report import ResultTable, result_table, to_json_dict
from scjax.models import scimf
from scjax.presets import preset
from scjax.train.optimizers import make_optimizer
from scjax.train.state import init_state
from scjax.train.step import make_update

MODEL = "scIMF"
TOGETHER = "scIMF, cells of three runs together"
N_TOGETHER = 3
AGAIN = "the world again (floor)"  # as many cells as the real ones, which halves of them are not
PRESET = "scimf/series"
N_DIMS = 10
N_SIMULATED = 256  # at least: cells of a smaller first time are drawn again, and the noise parts them
MAX_EXACT = 6000  # cells of LARRY's last time
CHUNK = 50  # steps in one compiled call
FILES = {
    "klein": "ts_mesc_klein2015",
    "bcell": "ts_bcell_stategra",
    "emt": "ts_emt_cook2020",
    "hsmm": "ts_hsmm_trapnell2014",
    "guo": "ts_embryo_guo2010",
    "larry2d": "ts_larry2d_weinreb2020",
    "clones": "ts_larry_weinreb2020_clones",
    "mef": "ts_mef_schiebinger2019_subset",
}
JUDGED = ("klein", "bcell", "emt", "hsmm", "guo")  # four times or more
AS_IT_IS = ("emt", "larry2d")  # no components to be fitted
WORLD_HELD_OUT = (1.5, 3.0)

METRICS = {name: POPULATION_METRICS[name] for name in ("W1", "Energy", "variance_ratio")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the ts_*.h5ad; not needed for the world alone")
    parser.add_argument("--only", nargs="+", choices=(*FILES, "world"), help="these sets; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training; the preset's by default")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()
    names = args.only or [*FILES, "world"]
    if args.data is None and names != ["world"]:
        parser.error("give --data, the folder of the real sets, or --only world")

    rows = []
    for name in names:
        for held_out, snapshots in questions(name, args.data):
            started = time.perf_counter()
            table, unit = scores(name, snapshots, held_out, args.seeds, args.steps)
            row = verdict(name, held_out, table) | {"unit": unit, "seconds": time.perf_counter() - started}
            print(line(row), flush=True)
            rows.append(row)
            if args.save:
                record = {"question": "series_scores", "preset": PRESET, "steps": args.steps, **row}
                record |= {"table": to_json_dict(table)}
                harness.append(harness.environment() | record, harness.RESULTS / f"series_scores_{name}.json")
    print(summary(rows))


def questions(name: str, folder: Path | None) -> Iterator[tuple[float, Snapshots]]:
    """(held-out time, all cells in the space that was fitted without it)."""
    if name == "world":
        world = InteractingParticles().simulate(tuple(np.arange(9) * 0.5), seed=0)
        yield from ((t, world) for t in WORLD_HELD_OUT)
        return
    adata = read_anndata(folder / f"{FILES[name]}.h5ad")
    if name == "bcell":
        adata = adata[~adata.obs["outlier"].to_numpy(bool), :N_DIMS].copy()
    x = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
    x, observed = np.asarray(x, np.float64), adata.obs["time"].to_numpy(np.float64)
    for held_out in np.unique(observed)[1:-1]:
        cells = x if name in AS_IT_IS or name == "bcell" else components(x, observed != held_out)
        yield float(held_out), Snapshots(x=cells, time=observed, kind=np.full(len(cells), "cell"))


def components(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The first principal components of the training cells, centred and not scaled, of all cells."""
    centred = x - x[train].mean(axis=0)
    return centred @ np.linalg.svd(centred[train], full_matrices=False)[2][:N_DIMS].T


def scores(name, snapshots, held_out, n_seeds, n_steps) -> tuple[ResultTable, float]:
    """The table of one held-out time, and its unit in that of the set."""
    seeds = range(n_seeds * N_TOGETHER)
    experiment = preset(PRESET).experiment
    model = replace(experiment.model, n_dims=snapshots.x.shape[1])
    experiment = replace(experiment, model=model, split=HoldOutTimes(times=(held_out,)))
    if n_steps is not None:
        experiment = replace(experiment, n_steps=n_steps, scan_steps=1, checkpoint_every=n_steps)
    data = prepare_time_series(
        to_anndata(snapshots),
        experiment.spec,
        experiment.split,
        experiment.preprocess,
        time_scale=experiment.time_scale,
    )
    unit = float(data.transform.std[0])
    predicted = simulated(data, experiment, fitted(data, experiment, seeds), seeds, held_out)
    known = {t: data.population(t) for t in data.split.train}
    baselines = training_free(known, held_out, seed=0, max_exact=MAX_EXACT)
    groups = [predicted[i : i + N_TOGETHER] for i in range(0, len(predicted), N_TOGETHER)]
    models = {MODEL: predicted[:n_seeds], TOGETHER: [np.concatenate(group) for group in groups]}
    if name == "world":
        again = [InteractingParticles().simulate((held_out,), seed=seed + 1).x for seed in range(n_seeds)]
        models[AGAIN] = [data.transform.apply(x, data.transform.input_names) for x in again]
    table = result_table(
        f"{name}, held-out time {held_out:g}",
        models,
        baselines,
        data.population(held_out),
        METRICS,
        seed=0,
        unit=f"root mean variance of the training cells, {unit:.6g} in the set's own",
    )
    return table, unit


def fitted(data: TimeSeriesData, experiment, seeds) -> scimf.Params:
    """Parameters of all seeds, stacked; each seed has initial values, batches and noise of its own."""
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    sources = [make_batches(data, experiment.sampling, seed) for seed in seeds]
    start, run = program(experiment.model, experiment.optimizer, experiment.n_steps, experiment.ema_decay)
    state = start(keys)
    for first in range(0, experiment.n_steps, CHUNK):
        steps = range(first, min(first + CHUNK, experiment.n_steps))
        state, metrics = run(state, stack([stack([batch_at(n) for batch_at in sources]) for n in steps]))
        if not np.all(metrics["finite"]):
            raise RuntimeError(f"training was not finite in steps {steps.start} to {steps.stop - 1}.")
    return state.params if experiment.ema_decay is None else state.ema


@lru_cache
def program(model, optimizer, n_steps, ema_decay):
    """Initial states and several updates, both over seeds; compiled anew only for other times or another width."""
    tx = make_optimizer(optimizer, n_steps)
    update = jax.vmap(make_update(partial(scimf.loss, config=model), tx, ema_decay))
    start = jax.vmap(lambda key: init_state(scimf.init(key, model), tx, key, ema=ema_decay is not None))
    return jax.jit(start), jax.jit(partial(jax.lax.scan, update))


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def simulated(data: TimeSeriesData, experiment, params, seeds, held_out) -> list[np.ndarray]:
    """The cells of each seed at the held-out time, from the cells of the first time."""
    first = data.times[0]
    cells = data.population(first)
    again = np.random.default_rng(0).choice(len(cells), max(N_SIMULATED - len(cells), 0))
    x0 = jnp.asarray(np.concatenate([cells, cells[again]]))
    ts = data.solver_times((first, held_out))
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(jnp.array(list(seeds)))
    simulate = jax.vmap(lambda p, key: scimf.simulate(p, x0, ts, key, config=experiment.model).x[-1])
    return list(np.asarray(jax.jit(simulate)(params, keys)))


def verdict(name: str, held_out: float, table: ResultTable) -> dict:
    """The numbers of one held-out time that the summary is made of."""
    best = min(table.of_kind("baseline"), key=lambda row: row.mean("W1"))
    model, again = table.row(MODEL), [row for row in table.rows if row.name == AGAIN]
    (floor,) = again or table.of_kind("floor")
    w1, least, baseline = (row.mean("W1") for row in (model, floor, best))
    return {
        "set": name,
        "held_out": held_out,
        "n_cells": table.n_cells,
        "best": best.name,
        "ratio": w1 / baseline,
        "ratio_together": table.row(TOGETHER).mean("W1") / baseline,
        "ratio_of_seeds": [c.scores["W1"].mean / baseline for c in model.comparisons],
        "floor_ratio": least / baseline,
        "excess": (w1 - least) / (baseline - least),
        "energy_ratio": model.mean("Energy") / min(row.mean("Energy") for row in table.of_kind("baseline")),
        "variance": model.mean("variance_ratio"),
        "variance_of_best": best.mean("variance_ratio"),
    }


def line(row: dict) -> str:
    return (
        f"{row['set']:8s} {row['held_out']:<8.4g} n {row['n_cells']:<5d} W1 / best {row['ratio']:.3f} "
        f"({', '.join(f'{r:.3f}' for r in row['ratio_of_seeds'])}; together {row['ratio_together']:.3f})  "
        f"floor / best {row['floor_ratio']:.3f}  "
        f"energy / best {row['energy_ratio']:.3f}  variance {row['variance']:.2f} "
        f"(best rule {row['variance_of_best']:.2f}: {row['best']})  {row['seconds']:.0f} s"
    )


def summary(rows: list[dict]) -> str:
    """By set, over the sets with four times or more, and the world."""
    lines = []
    for key, model in (("ratio", MODEL), ("ratio_together", TOGETHER)):
        of_set = {name: [row[key] for row in rows if row["set"] == name] for name in (row["set"] for row in rows)}
        lines += [
            f"{model}, {name}: W1 / best training-free {np.mean(ratios):.3f} over {len(ratios)} held-out times"
            for name, ratios in of_set.items()
        ]
        judged = {name: ratios for name, ratios in of_set.items() if name in JUDGED}
        if judged:
            every, mean = np.concatenate(list(judged.values())), np.mean([np.mean(r) for r in judged.values()])
            lines.append(
                f"{model}, sets with four times or more: mean over sets {mean:.3f} (wanted: at "
                f"most 0.95), over times {every.mean():.3f}; at most 1 on {(every <= 1).sum()} of "
                f"{len(every)} times (wanted: two thirds)"
            )
    lines += [
        f"world, time {row['held_out']:g}: above the floor by {row['excess']:.2f} of the baseline's excess (wanted: at "
        "most 0.5)"
        for row in rows
        if row["set"] == "world"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
