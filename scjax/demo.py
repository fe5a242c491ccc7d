"""The main job on shipped data: fit scIMF without one time point, predict it, compare, draw."""

import dataclasses
import itertools
import json
import time
from pathlib import Path

from scjax.experiment import Experiment, evaluate, train
from scjax.metrics.report import ResultTable
from scjax.presets import preset

__all__ = ["demo"]

_WITH, _WITHOUT = "scIMF", "scIMF without interactions"


def demo(*, n_seeds: int = 1, out: Path | None = None, experiment: Experiment | None = None) -> Path:
    """Trains with and without interactions on Klein 2015, predicts the held-out day; returns the folder it wrote.

    Args:
        n_seeds: trainings of each model; the table shows their spread.
        out: a new or empty folder; the first free one of scjax-demo, scjax-demo-2, ... unless given.
        experiment: other settings than those of the preset scimf/klein, on the same data.

    Raises:
        ValueError: n_seeds below 1, or `out` holds files: nothing is overwritten.
    """
    from scjax.check import at_least
    from scjax.config import to_json
    from scjax.data import datasets
    from scjax.metrics.report import render, to_json_dict, verdict
    from scjax.predict import load, predict, velocity
    from scjax.train.hooks import Progress

    at_least("seeds", n_seeds, 1)
    out = _free_folder() if out is None else out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out {out} exists already and is not overwritten; choose a new folder.")
    began = time.perf_counter()
    experiment = preset("scimf/klein").experiment if experiment is None else experiment
    adata = datasets.klein2015()
    times = adata.obs["time"].value_counts().sort_index()
    print("Mouse embryonic stem cells after LIF withdrawal (Klein et al., Cell 2015): UMI counts of")
    print(f"{adata.n_obs} cells x {adata.n_vars} genes, days " + ", ".join(f"{t:g} ({n})" for t, n in times.items()))
    print(to_json(experiment), end="")

    runs: dict[str, list[Path]] = {_WITH: [], _WITHOUT: []}
    for name, seed in itertools.product(runs, range(n_seeds)):
        print(f"\ntraining {name}, seed {seed}")
        n_blocks = experiment.model.n_blocks if name == _WITH else 0
        settings = dataclasses.replace(
            experiment, seed=seed, model=dataclasses.replace(experiment.model, n_blocks=n_blocks)
        )
        folder = out / "runs" / f"{'with' if name == _WITH else 'without'}-interactions-seed{seed}"
        runs[name].append(folder)
        train(settings, adata, folder, hooks=[Progress(settings.sampling.n_cells, force=True)])

    tables = evaluate(runs, adata)
    for table in tables:
        print("\n" + render(table))
        print("\n".join(verdict(table, _WITH, metric.name) for metric in table.metrics))
        print(_use_of_interactions(table))
    (out / "metrics.json").write_text(json.dumps([to_json_dict(table) for table in tables], indent=1) + "\n")

    trained = load(runs[_WITH][0])
    held_out = tuple(trained.about["split"]["held_out"])
    predicted = predict(trained, adata, held_out)
    predicted.write_h5ad(out / "predictions.h5ad")
    _draw(out, trained, adata, predicted, velocity(trained, adata), held_out)
    print(f"\nwritten to {out}: metrics.json, predictions.h5ad, predicted_over_observed.png, trajectories.png, runs/")
    print(f"total {time.perf_counter() - began:.0f} s")
    return out


def _use_of_interactions(table: ResultTable) -> str:
    with_, without = (table.row(name).mean("W1") for name in (_WITH, _WITHOUT))
    word = "help" if with_ < without else "do not help"
    return f"Interactions {word} here: W1 is {with_:.3f} with them and {without:.3f} without."


def _draw(out, trained, adata, predicted, moving, held_out):
    import numpy as np

    from scjax.plot import trajectory
    from scjax.plot.save import save
    from scjax.predict import predict

    column = trained.spec.time
    latent, day = moving.obsm["X_latent"], moving.obs[column].to_numpy()
    observed = {t: latent[day == t] for t in trained.times}
    axes = trajectory.predicted_over_observed(
        observed,
        {t: predicted.obsm["X_latent"][predicted.obs[column].to_numpy() == t] for t in held_out},
        time_unit="days",
    )
    save(axes[0], out / "predicted_over_observed.png")

    ts = np.linspace(trained.times[0], trained.times[-1], 29)
    dense = predict(trained, adata, ts)
    paths = dense.obsm["X_latent"].reshape(len(ts), -1, latent.shape[1])
    ax = trajectory.trajectories(paths, ts, observed=latent, time_unit="days")
    trajectory.velocities(latent, moving.obsm["velocity_latent"], ax=ax, time_step=0.4)
    ax.set_title(ax.get_title() + "\narrows: velocity of observed cells, way of 0.4 days")
    save(ax, out / "trajectories.png")


def _free_folder() -> Path:
    names = itertools.chain(["scjax-demo"], (f"scjax-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())
