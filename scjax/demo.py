"""The main job on shipped data: fit a model without a part of them, predict that part, compare, draw."""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scjax.experiment import Experiment, evaluate, report_of, train
from scjax.presets import preset

__all__ = ["demo"]

_PRESETS = {"scimf": "scimf/klein", "scdfm": "scdfm/norman_subset"}
_WITH, _WITHOUT = "scIMF", "scIMF without interactions"
_SCDFM = "scDFM"


def demo(
    model: Literal["scimf", "scdfm"] = "scimf",
    *,
    n_seeds: int = 1,
    out: Path | None = None,
    experiment: Experiment | None = None,
) -> Path:
    """Trains, predicts what training never saw, compares and draws; returns the folder it wrote.

    "scimf": with and without interactions on Klein 2015, the held-out day. "scdfm": on the Norman 2019 subset, the
    pairs of genes both of which were seen alone.

    Args:
        n_seeds: trainings of each model; the table shows their spread.
        out: a new or empty folder; the first free one of scjax-demo, scjax-demo-2, ... unless given.
        experiment: other settings than those of the preset, on the same data.

    Raises:
        ValueError: an unknown model, n_seeds below 1, or `out` holds files: nothing is overwritten.
    """
    from scjax.check import at_least, one_of
    from scjax.config import to_json

    one_of("model", model, tuple(_PRESETS))
    at_least("seeds", n_seeds, 1)
    out = _free_folder() if out is None else out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out {out} exists already and is not overwritten; choose a new folder.")
    began = time.perf_counter()
    experiment = preset(_PRESETS[model]).experiment if experiment is None else experiment
    show = {"scimf": _time_series, "scdfm": _perturbations}[model](experiment)
    print(show.about)
    print(to_json(experiment), end="")

    runs: dict[str, list[Path]] = {name: [] for name in show.variants}
    for (name, variant), seed in itertools.product(show.variants.items(), range(n_seeds)):
        print(f"\ntraining {name}, seed {seed}")
        folder = out / "runs" / f"{variant.folder}-seed{seed}"
        runs[name].append(folder)
        _train(replace(variant.experiment, seed=seed), show.adata, folder)
    predicted = show.predict(show.adata, runs)
    tables = evaluate(runs, show.adata, **({"predicted": predicted} if predicted else {}))
    for table in tables:
        report = report_of(table)
        print("\n" + report.render(table))
        print("\n".join(report.verdict(table, next(iter(runs)), metric.name) for metric in table.metrics))
    numbers = [report_of(table).to_json_dict(table) for table in tables]
    (out / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n")
    figures = show.finish(out, show.adata, runs, tables, predicted)
    print(f"\nwritten to {out}: metrics.json, predictions.h5ad, {', '.join(figures)}, runs/")
    print(f"total {time.perf_counter() - began:.0f} s")
    return out


class _Variant(NamedTuple):
    folder: str
    experiment: Experiment


class _Show(NamedTuple):
    """Data with a word about them, the models that are trained, what they predict, and what comes after the tables."""

    adata: Any
    about: str
    variants: Mapping[str, _Variant]
    predict: Any  # (adata, runs) -> for each row an AnnData a seed; nothing where the tables' own way is cheap
    finish: Any  # (out, adata, runs, tables, predicted) -> names of the figures, which with other files it writes


def _train(experiment: Experiment, adata: Any, folder: Path) -> None:
    from scjax.train.hooks import Progress

    train(experiment, adata, folder, hooks=[Progress(experiment.cells_per_step, force=True)])


# -- a time series


def _time_series(experiment: Experiment) -> _Show:
    from scjax.data import datasets

    adata = datasets.klein2015()
    times = adata.obs["time"].value_counts().sort_index()
    about = (
        "Mouse embryonic stem cells after LIF withdrawal (Klein et al., Cell 2015): UMI counts of\n"
        f"{adata.n_obs} cells x {adata.n_vars} genes, days " + ", ".join(f"{t:g} ({n})" for t, n in times.items())
    )
    without = replace(experiment, model=replace(experiment.model, n_blocks=0))
    variants = {
        _WITH: _Variant("with-interactions", experiment),
        _WITHOUT: _Variant("without-interactions", without),
    }
    return _Show(adata, about, variants, lambda adata, runs: {}, _finish_time_series)


def _finish_time_series(
    out: Path, adata: Any, runs: Mapping[str, Sequence[Path]], tables: Sequence[Any], _: Mapping[str, Any]
) -> tuple[str, ...]:
    import numpy as np

    from scjax.plot import trajectory
    from scjax.plot.save import save
    from scjax.predict import load, predict, velocity

    for table in tables:
        with_, without = (table.row(name).mean("W1") for name in (_WITH, _WITHOUT))
        word = "help" if with_ < without else "do not help"
        print(f"Interactions {word} here: W1 is {with_:.3f} with them and {without:.3f} without.")

    trained = load(runs[_WITH][0])
    held_out = tuple(trained.about["split"]["held_out"])
    predicted, moving = predict(trained, adata, held_out), velocity(trained, adata)
    predicted.write_h5ad(out / "predictions.h5ad")
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
    return "predicted_over_observed.png", "trajectories.png"


# -- perturbations


def _perturbations(experiment: Experiment) -> _Show:
    from scjax.data import datasets

    adata = datasets.norman2019()
    names = adata.obs["perturbation"].astype(str).unique()
    about = (
        "K562 cells under CRISPR activation (Norman et al., Science 2019), log-normalised:\n"
        f"{adata.n_obs} cells x {adata.n_vars} genes; control, "
        f"{sum('+' not in n for n in names) - 1} single genes and {sum('+' in n for n in names)} pairs"
    )
    return _Show(adata, about, {_SCDFM: _Variant("scdfm", experiment)}, _predict_perturbations, _finish_perturbations)


def _predict_perturbations(adata: Any, runs: Mapping[str, Sequence[Path]]) -> dict[str, list[Any]]:
    """Once for tables, file and figures: this is a third of the demo's time."""
    from scjax.predict import load, predict

    def of(folder: Path) -> Any:
        trained = load(folder)
        return predict(trained, adata, [p.condition for p in trained.split.test])

    return {name: [of(folder) for folder in folders] for name, folders in runs.items()}


def _finish_perturbations(
    out: Path,
    adata: Any,
    runs: Mapping[str, Sequence[Path]],
    tables: Sequence[Any],
    predicted: Mapping[str, Sequence[Any]],
) -> tuple[str, ...]:
    import numpy as np

    from scjax.metrics.perturbation_baselines import fit_baselines
    from scjax.plot import perturbation
    from scjax.plot.save import save
    from scjax.predict import load, observed_cells
    from scjax.predict.populations import predicted_cells

    trained, generated = load(runs[_SCDFM][0]), predicted[_SCDFM][0]
    split = trained.split
    generated.write_h5ad(out / "predictions.h5ad")
    real, training = observed_cells(trained, adata, split.test), observed_cells(trained, adata, split.train)
    control = next(x for p, x in training.items() if p.is_control)
    made = predicted_cells(trained, generated, split.test)

    fitted = fit_baselines(training)
    additive = {p: fitted.predict(p)["additive"].delta for p in split.test}
    deltas = [{p: x.mean(axis=0) - control.mean(axis=0) for p, x in cells.items()} for cells in (real, made)]
    axes = perturbation.delta_scatter(
        *deltas,
        trained.genes,
        baseline={p: delta for p, delta in additive.items() if delta is not None},
        baseline_name="additive",
        predicted_name=_SCDFM,
    )
    save(axes[0], out / "deltas.png")

    strongest = max(real, key=lambda p: np.linalg.norm(deltas[0][p]))
    ax = perturbation.top_gene_distributions(
        control,
        real[strongest],
        made[strongest],
        trained.genes,
        title=f"{strongest}: the genes that change most",
        predicted_name=_SCDFM,
    )
    save(ax, out / "top_genes.png")

    table = tables[0]
    values = {row.name: row.by_population("l2").mean(axis=0) for row in table.rows}
    ceiling = table.of_kind("floor")[0].name
    ax = perturbation.metric_dots(values, highlighted=[_SCDFM], ceiling=ceiling, metric="L2 of the means ↓")
    save(ax, out / "l2.png")
    return "deltas.png", "top_genes.png", "l2.png"


def _free_folder() -> Path:
    names = itertools.chain(["scjax-demo"], (f"scjax-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())
