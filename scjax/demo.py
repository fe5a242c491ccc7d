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

_PRESETS = {"scimf": "scimf/klein", "scdfm": "scdfm/norman_subset", "perturbdiff": "perturbdiff/mcfaline"}
_N_STEPS = {"scdfm": 600}  # of training, where the preset's would take the demo too long
_WITH, _WITHOUT = "scIMF", "scIMF without interactions"
_SCDFM = "scDFM"
_PERTURBDIFF = "PerturbDiff"
_N_REAL_SETS = 40  # drawn of the real cells of a population, to see how the means of such sets vary


def demo(
    model: Literal["scimf", "scdfm", "perturbdiff"] = "scimf",
    *,
    n_seeds: int = 1,
    out: Path | None = None,
    experiment: Experiment | None = None,
) -> Path:
    """Trains, predicts what training never saw, compares and draws; returns the folder it wrote.

    "scimf": with and without interactions on Klein 2015, the held-out day. "scdfm": on the Norman 2019 subset, the
    pairs of genes both of which were seen alone, in half the preset's steps. "perturbdiff": on McFaline 2023, kinases
    in lines that lack them.

    Args:
        n_seeds: trainings of each model; the table shows their spread.
        out: a new or empty folder; the first free one of scjax-demo, scjax-demo-2, ... unless given.
        experiment: other settings than those of the preset, on the same data.

    Raises:
        ValueError: an unknown model, n_seeds below 1, or `out` holds files: nothing is overwritten.
    """
    from scjax.check import at_least, one_of

    one_of("model", model, tuple(_PRESETS))
    at_least("seeds", n_seeds, 1)
    out = _free_folder() if out is None else out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out {out} exists already and is not overwritten; choose a new folder.")
    began = time.perf_counter()
    if experiment is None:
        experiment = preset(_PRESETS[model]).experiment
        experiment = replace(experiment, n_steps=_N_STEPS.get(model, experiment.n_steps))
    show = {"scimf": _time_series, "scdfm": _perturbations, "perturbdiff": _cell_sets}[model](experiment)
    print(show.about)
    print(f"settings: experiment.json in each folder of {out / 'runs'}")

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

    from scjax.metrics.report import judge
    from scjax.plot import trajectory
    from scjax.plot.save import save
    from scjax.predict import load, predict, velocity

    for table in tables:
        with_, without = (table.row(name).mean("W1") for name in (_WITH, _WITHOUT))
        words = {"win": "help", "tie": "make no clear difference", "lose": "do not help"}
        if (found := judge(table, _WITH, "W1", (_WITHOUT,)).outcome) in words:
            print(f"Interactions {words[found]} here: W1 is {with_:.3f} with them and {without:.3f} without.")

    trained: Any = load(runs[_WITH][0])
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
    ax.set_title(ax.get_title() + "\narrows: path of an observed cell over 0.4 days at its velocity")
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
        trained: Any = load(folder)
        return predict(trained, adata, [p.condition for p in trained.split.test])

    return {name: [of(folder) for folder in folders] for name, folders in runs.items()}


def _finish_perturbations(
    out: Path,
    adata: Any,
    runs: Mapping[str, Sequence[Path]],
    tables: Sequence[Any],
    predicted: Mapping[str, Sequence[Any]],
) -> tuple[str, ...]:
    predicted[_SCDFM][0].write_h5ad(out / "predictions.h5ad")
    held_out = _held_out(runs, adata, predicted)
    return _draw_effects(out, held_out, tables[0], baseline="additive")


# -- cell sets


def _cell_sets(experiment: Experiment) -> _Show:
    from scjax.data import datasets

    adata = datasets.mcfaline2023()
    lines = ", ".join(sorted(adata.obs["cell_type"].astype(str).unique()))
    about = (
        "Three glioblastoma lines under CRISPR interference (McFaline-Figueroa et al., Cell Genomics 2024), "
        f"log-normalised:\n{adata.n_obs} cells x {adata.n_vars} genes of {lines}; control and "
        f"{adata.obs['perturbation'].nunique() - 1} kinases and receptors, of which training lacks three in each line"
    )
    variants = {_PERTURBDIFF: _Variant("perturbdiff", experiment)}
    return _Show(adata, about, variants, _predict_cell_sets, _finish_cell_sets)


def _predict_cell_sets(adata: Any, runs: Mapping[str, Sequence[Path]]) -> dict[str, list[Any]]:
    """Every kinase in every line, of which those are kept that training did not see there."""
    from scjax.predict import load, predict
    from scjax.types import Population

    def of(folder: Path) -> Any:
        trained: Any = load(folder)
        test = trained.split.test
        made = predict(trained, adata, sorted({p.condition for p in test}))
        keys = zip(made.obs["condition"].map(trained.spec.parse_condition), made.obs["context"], strict=True)
        return made[[Population(*key) in test for key in keys]].copy()

    return {name: [of(folder) for folder in folders] for name, folders in runs.items()}


def _finish_cell_sets(
    out: Path,
    adata: Any,
    runs: Mapping[str, Sequence[Path]],
    tables: Sequence[Any],
    predicted: Mapping[str, Sequence[Any]],
) -> tuple[str, ...]:
    generated = predicted[_PERTURBDIFF][0]
    generated.write_h5ad(out / "predictions.h5ad")
    held_out = _held_out(runs, adata, predicted)
    print("\n" + _strength(tables[0]))
    figures = _draw_effects(out, held_out, tables[0], baseline="shift")
    return *figures, _draw_sets(out, held_out, generated)


def _strength(table: Any) -> str:
    """How large the effects are beside the noise of the means, and what that leaves to a model: of this table alone."""
    import numpy as np

    model, control, ceiling = table.row(_PERTURBDIFF), table.row("control"), table.of_kind("floor")[0]
    rules = [row for row in table.of_kind("baseline") if np.isfinite(row.mean("pearson_delta"))]
    best = max(rules, key=lambda row: row.mean("pearson_delta"), default=None)
    l2 = {name: row.mean("l2") for name, row in (("model", model), ("control", control), ("ceiling", ceiling))}
    r = {name: row.mean("pearson_delta") for name, row in (("model", model), ("ceiling", ceiling))}
    weak = l2["control"] < 1.5 * l2["ceiling"]
    lines = [
        f"The mean of unperturbed control cells is {l2['control']:.2f} away from that of the perturbed ones (l2), one "
        f"half of the perturbed cells {l2['ceiling']:.2f} from the other:",
        "the effects are weak, hardly above the noise of so few cells, and these data rank no models."
        if weak
        else "the effects stand out of the noise.",
        f"{_PERTURBDIFF} comes to {l2['model']:.2f}, "
        + ("nearer than doing nothing." if l2["model"] < l2["control"] else "no nearer than doing nothing."),
        f"Its changes correlate with the real ones at {r['model']:.2f}, those of one half with the other at "
        f"{r['ceiling']:.2f}"
        + ("." if best is None else f", the best rule's ({best.name}) at {best.mean('pearson_delta'):.2f}."),
    ]
    return "\n".join(lines)


def _draw_sets(out: Path, held_out: "_HeldOut", generated: Any) -> str:
    """The population of each context with the largest effect: means of generated sets, and of real ones of as many
    cells, drawn with replacement, so that they vary as sets of independent cells do.
    """
    import numpy as np

    from scjax.plot import perturbation
    from scjax.plot.save import save

    real, made = held_out.real, held_out.made
    strongest = {}
    for p in sorted(real, key=held_out.effect):
        strongest[p.context] = p
    rng, number = np.random.default_rng(0), generated.obs["set"].to_numpy()
    panels, spread = {}, []
    for context in sorted(strongest):
        p = strongest[context]
        of_set = number[(generated.obs["condition"] == p.condition) & (generated.obs["context"] == context)]
        sets = [made[p][of_set == n] for n in np.unique(of_set)]
        n_cells = min(len(cells) for cells in sets)

        def means_of(cells: Any, n_cells: int = n_cells) -> Any:
            return np.stack([rng.choice(cells, n_cells).mean(axis=0) for _ in range(_N_REAL_SETS)])

        control, observed = means_of(held_out.control[context]), means_of(real[p])
        predicted = np.stack([cells[:n_cells].mean(axis=0) for cells in sets])
        spread.append([means.var(axis=0, ddof=1).sum() for means in (control, observed, predicted)])
        drawn_from = f"{len(held_out.control[context])} control, {len(real[p])} observed cells"
        panels[f"{p}: sets of {n_cells}\nof {drawn_from}"] = (control, observed, predicted)
    of_control, of_real, of_made = np.sqrt(np.mean(spread, axis=0))
    print(
        f"Means of sets of equal size vary by {of_made:.2f} (generated), {of_real:.2f} (real, perturbed), "
        f"{of_control:.2f} (control): root of their variance summed over genes."
    )
    note = (
        "Control and observed sets are resampled, with replacement, from the same few cells: the clouds show how sets\n"
        "vary, not how well the means are known, and look better separated than the populations are."
    )
    axes = perturbation.set_means(panels, predicted_name=_PERTURBDIFF, note=note)
    save(axes[0], out / "sets.png")
    return "sets.png"


# -- what models of perturbations share


class _HeldOut(NamedTuple):
    """Cells [cells, genes] of the first run: control cells by context, real and generated ones by population."""

    name: str
    trained: Any
    training: Mapping[Any, Any]
    control: Mapping[str, Any]
    real: Mapping[Any, Any]
    made: Mapping[Any, Any]

    def delta(self, cells: Any, population: Any) -> Any:
        """Change of the mean against the controls of the context."""
        return cells.mean(axis=0) - self.control[population.context].mean(axis=0)

    def effect(self, population: Any) -> float:
        import numpy as np

        return float(np.linalg.norm(self.delta(self.real[population], population)))


def _held_out(runs: Mapping[str, Sequence[Path]], adata: Any, predicted: Mapping[str, Sequence[Any]]) -> _HeldOut:
    from scjax.predict import cellsets, load, observed_cells
    from scjax.predict.populations import predicted_cells

    name = next(iter(runs))
    trained: Any = load(runs[name][0])
    observed = cellsets.observed_cells if isinstance(trained, cellsets.TrainedCellSets) else observed_cells
    training, real = (observed(trained, adata, part) for part in (trained.split.train, trained.split.test))  # pyright: ignore[reportArgumentType]
    control = {p.context: cells for p, cells in training.items() if p.is_control}
    return _HeldOut(name, trained, training, control, real, predicted_cells(trained, predicted[name][0], real))


def _draw_effects(out: Path, held_out: _HeldOut, table: Any, *, baseline: str) -> tuple[str, ...]:
    from scjax.metrics.perturbation_baselines import fit_baselines
    from scjax.plot import perturbation
    from scjax.plot.save import save

    genes, real, made = held_out.trained.genes, held_out.real, held_out.made
    fitted = fit_baselines(held_out.training)
    rule = {p: fitted.predict(p)[baseline].delta for p in real}
    axes = perturbation.delta_scatter(
        *({p: held_out.delta(x, p) for p, x in cells.items()} for cells in (real, made)),
        genes,  # pyright: ignore[reportCallIssue]
        baseline={p: delta for p, delta in rule.items() if delta is not None},
        baseline_name=baseline,
        predicted_name=held_out.name,
    )
    save(axes[0], out / "deltas.png")

    strongest = max(real, key=held_out.effect)
    ax = perturbation.top_gene_distributions(
        held_out.control[strongest.context],
        real[strongest],
        made[strongest],
        genes,
        title=f"{strongest}: the genes that change most",
        predicted_name=held_out.name,
    )
    save(ax, out / "top_genes.png")

    values = {row.name: row.by_population("l2").mean(axis=0) for row in table.rows if row.has_value("l2").any()}
    ceiling = table.of_kind("floor")[0].name
    ax = perturbation.metric_dots(
        values, highlighted=[held_out.name], ceiling=ceiling, metric="L2 of the means ↓", lower_is_better=True
    )
    save(ax, out / "l2.png")
    return "deltas.png", "top_genes.png", "l2.png"


def _free_folder() -> Path:
    names = itertools.chain(["scjax-demo"], (f"scjax-demo-{n}" for n in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())
