"""Experiments on time series: a population seen at some times, some of which training never sees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from scjax.batches import TimeSeriesBatch
from scjax.check import one_of
from scjax.config import from_dict
from scjax.data.collate import make_batches
from scjax.data.leaks import check_split
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import HoldOutInterior, TimeSplit, TimeSplitRule
from scjax.data.timeseries import TimeScale, TimeSeriesData, prepare_time_series
from scjax.experiment.evidence import Evidence, series_evidence
from scjax.experiment.run import Task, check_loop, comparable_runs, data_digest
from scjax.mesh import along_cells
from scjax.metrics.baselines import training_free
from scjax.metrics.population import POPULATION_METRICS, Metric
from scjax.metrics.report import ResultTable, result_table
from scjax.models import scimf
from scjax.predict import TrainedTimeSeries, project, simulate_cells
from scjax.train.optimizers import OptimizerConfig
from scjax.types import LossFn, Metrics, Params, Scalar

__all__ = ["TimeSeriesExperiment", "check", "digest", "prepare", "tables"]


@dataclass(frozen=True, kw_only=True)
class TimeSeriesExperiment:
    """Everything that decides a run on a time series but the data themselves.

    Attributes:
        kind: tells in a settings file which experiment it is.
        model: sizes, physics and loss; `n_dims` must be what `preprocess` (or the latent itself) gives.
        spec: what the parts of the AnnData mean.
        split: the times that training never sees.
        preprocess: fitted on the cells of the training times.
        time_scale: "real", the times of the data; "index", their position, as in the scIMF code; "mean_gap", in units
            of the mean gap between training times.
        sampling: how many cells a step sees.
        optimizer: Adam and its schedule.
        n_steps: of training.
        scan_steps: steps in one compiled call.
        ema_decay: of the moving average of the parameters, which then is what predicts; None keeps none.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of scan_steps; the last step always has one.
        allow_leaks: rules of `data.leaks.check_split` whose errors do not stop the run.
        seed: of parameters, cells, noise. The same seed gives the same run.
    """

    kind: Literal["TimeSeriesExperiment"] = "TimeSeriesExperiment"
    model: scimf.Config
    spec: DataSpec
    split: TimeSplitRule = HoldOutInterior()
    preprocess: Preprocess = Preprocess()
    time_scale: TimeScale = "real"
    sampling: TimeSeriesSampling = TimeSeriesSampling()
    optimizer: OptimizerConfig = OptimizerConfig()
    n_steps: int = 3000
    scan_steps: int = 10
    ema_decay: float | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    allow_leaks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        check_loop(self)
        one_of("time_scale", self.time_scale, get_args(TimeScale))
        if self.spec.time is None:
            raise ValueError("spec.time must name the obs column of sampling times; got None.")
        n_dims = self.preprocess.n_components or self.preprocess.n_top_genes
        if n_dims is not None and n_dims != self.model.n_dims:
            raise _width_error(self, n_dims)

    @property
    def cells_per_step(self) -> int:
        return self.sampling.n_cells


def check(adata: AnnData, spec: DataSpec) -> None:
    spec.check(adata)


def digest(adata: AnnData, spec: DataSpec) -> str:
    return data_digest(adata, spec, [spec.read_times(adata).tobytes()])


def prepare(experiment: TimeSeriesExperiment, adata: AnnData, store: Path | None = None) -> Task:
    data = prepare_time_series(
        adata,
        experiment.spec,
        experiment.split,
        experiment.preprocess,
        time_scale=experiment.time_scale,
        store=store,
    )
    if data.n_dims != experiment.model.n_dims:
        raise _width_error(experiment, data.n_dims)
    arrays, transform = data.transform.to_tree()
    return Task(
        model=scimf.build(experiment.model),
        data=data,
        split=data.split,
        batches=_batches(experiment, data),
        arrays={"transform": arrays},
        about={"kind": "scimf", "transform": transform, "times": list(data.times)},
        findings=check_split(adata, data.split, data.transform, spec=experiment.spec, allowed=experiment.allow_leaks),
        loss_on=partial(_loss_on, experiment.model),
    )


def _loss_on(config: scimf.Config, mesh: Mesh) -> LossFn:
    """Tiles of attention are told of the devices, else each of them would be put together from all: 20,480 cells on 4
    devices take four times as long. Few cells are left to XLA, as on one device.
    """

    def loss(params: Params, batch: TimeSeriesBatch, key: PRNGKeyArray) -> tuple[Scalar, Metrics]:
        tiles = scimf.is_in_tiles(config, len(batch.x0))
        return scimf.loss(params, batch, key, config=config, mesh=along_cells(mesh) if tiles else None)

    return loss


def tables(
    trained: Mapping[str, Sequence[TrainedTimeSeries]],
    adata: AnnData,
    *,
    metrics: Mapping[str, Metric] = POPULATION_METRICS,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int = 0,
    provenance: Mapping[str, Any],
    keep: list[Evidence] | None = None,
) -> list[ResultTable]:
    """One a held-out time; `keep` gets the evidence of each, for its figures. See `scjax.experiment.evaluate`."""
    first = comparable_runs(trained, ("split", "times", "transform"))[0]
    split = first.about["split"]
    if not split["held_out"]:
        raise ValueError("the runs held out no time, so there is nothing to evaluate; train with a split that does.")

    findings = check_split(
        adata,
        from_dict(TimeSplit, split),
        first.transform,
        spec=first.spec,
        allowed=first.about["experiment"].get("allow_leaks", ()),
    )
    provenance = {**provenance, "findings": findings.to_json_dict()}
    latent, time = project(first, adata), first.spec.read_times(adata)
    population = {t: latent[time == t] for t in first.times}
    simulated = {
        name: [simulate_cells(run, population[run.times[0]], split["held_out"], jax.random.key(seed)).x for run in rows]
        for name, rows in trained.items()
    }
    snapshots = {u: population[u] for u in split["train"]}
    tables = []
    for i, t in enumerate(split["held_out"]):
        rules = training_free(snapshots, t, seed=seed)
        table = result_table(
            f"held-out time {t:g}, trained on times {', '.join(f'{u:g}' for u in split['train'])}",
            {name: [x[i] for x in paths] for name, paths in simulated.items()},
            rules,
            population[t],
            metrics,
            n_cells=n_cells,
            n_draws=n_draws,
            seed=seed,
            provenance=provenance,
        )
        tables.append(table)
        if keep is not None:
            made = {name: paths[0][i] for name, paths in simulated.items()}
            names, are_genes = _features(first)
            keep.append(
                series_evidence(t, made, snapshots, rules, population[t], names, are_genes=are_genes, seed=seed)
            )
    return tables


def _features(trained: TrainedTimeSeries) -> tuple[list[str], bool]:
    """Names of the model's dimensions, and whether they are expression as it is: neither components nor scaled."""
    steps = trained.transform
    if steps.components is not None:
        return [f"PC {d + 1}" for d in range(steps.n_dims)], False
    plain = not steps.mean.any() and bool((steps.std == 1).all())
    return list(steps.feature_names), plain and steps.space != "latent"


def _batches(experiment: TimeSeriesExperiment, data: TimeSeriesData) -> Callable[..., Any]:
    """Batch n of the run; what data populations cost among themselves is computed once, where they are always whole."""
    plain = make_batches(data, experiment.sampling, experiment.seed)
    if experiment.sampling.n_targets is not None or experiment.model.sinkhorn != "annealed":
        return plain
    own = jax.jit(lambda batch: scimf.target_self_transport(batch, config=experiment.model))(plain(0))
    return make_batches(data, experiment.sampling, experiment.seed, np.asarray(own))


def _width_error(experiment: TimeSeriesExperiment, n_dims: int) -> ValueError:
    steps = experiment.preprocess
    return ValueError(
        f"model.n_dims={experiment.model.n_dims}, but the cells have {n_dims} dimensions after preprocessing "
        f"(expression={experiment.spec.expression!r}, n_top_genes={steps.n_top_genes}, "
        f"n_components={steps.n_components}). Set model.n_dims={n_dims}, or another number of components."
    )
