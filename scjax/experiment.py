"""One experiment from data to checkpoint to table: the settings as a value, and what is done with them.

run = train(experiment, adata, "runs/first")          the folder holds settings, split, log, checkpoints
table = evaluate(["runs/first"], adata)[0]            each held-out time against baselines and real cells
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scjax import checkpoint
from scjax.check import at_least, non_negative
from scjax.config import from_dict, from_json, to_dict, to_json
from scjax.data.collate import make_batches
from scjax.data.device import prefetch
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import AnnData, DataSpec, expression_matrix
from scjax.data.splits import HoldOutInterior, TimeSplitRule, save_split
from scjax.data.timeseries import TimeScale, TimeSeriesData, prepare_time_series
from scjax.metrics.baselines import training_free
from scjax.metrics.population import POPULATION_METRICS, Metric
from scjax.metrics.report import ResultTable, result_table
from scjax.models import scimf
from scjax.predict import Trained, load, simulate_cells
from scjax.train.hooks import Hook, JsonlLogger, SaveCheckpoints
from scjax.train.loop import fit
from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import TrainState, init_state

__all__ = ["Experiment", "Run", "evaluate", "read_experiment", "train"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run but the data themselves.

    Attributes:
        model: sizes, physics and loss; `n_dims` must be what `preprocess` (or the latent itself) gives.
        spec: what the parts of the AnnData mean.
        split: the times that training never sees.
        preprocess: fitted on the cells of the training times.
        time_scale: "real", the times of the data; "index", their position, as in the scIMF code.
        sampling: how many cells a step sees.
        optimizer: Adam and its schedule.
        n_steps: of training.
        scan_steps: steps in one compiled call.
        ema_decay: of the moving average of the parameters, which then is what predicts; None keeps none.
        log_every, checkpoint_every: in steps; the latter a multiple of scan_steps.
        seed: of parameters, cells, noise. The same seed gives the same run.
    """

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
    seed: int = 0

    def __post_init__(self):
        at_least("n_steps", self.n_steps, 1)
        at_least("scan_steps", self.scan_steps, 1)
        non_negative("seed", self.seed)
        if self.checkpoint_every % self.scan_steps:
            raise ValueError(
                f"checkpoint_every must be a multiple of scan_steps; got {self.checkpoint_every} and {self.scan_steps}."
            )


class Run(NamedTuple):
    """What `train` leaves: the final state, the data as the model saw them, and the folder."""

    state: TrainState
    data: TimeSeriesData
    workdir: Path


def read_experiment(path: str | Path) -> Experiment:
    """An experiment from a JSON file, or from the folder of a run."""
    path = Path(path)
    return from_json(Experiment, path / "experiment.json" if path.is_dir() else path)


def train(
    experiment: Experiment,
    adata: AnnData,
    workdir: str | Path,
    *,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
) -> Run:
    """Prepares the data, trains, and writes `workdir`:

        experiment.json   the settings        metrics.jsonl   loss and terms, one line a logged step
        split.json        rule and times      checkpoints/    one folder a saved step

    Args:
        resume: continue the run in `workdir` from its newest checkpoint; settings and data must be the same. Step n
            uses the same cells and noise as in an uninterrupted run, so the result is the same, bit for bit.
        hooks: besides the log and the checkpoints, `train.hooks.Progress()` for instance.

    Raises:
        ValueError: data that do not fit the spec, a folder that holds something else (nothing is ever overwritten),
            a resumed run with other settings or other data.
        train.loop.NonFiniteError, train.loop.Interrupted: see there.
    """
    workdir = Path(workdir)
    _admit(workdir, experiment, resume)
    data = prepare_time_series(
        adata, experiment.spec, experiment.split, experiment.preprocess, time_scale=experiment.time_scale
    )
    _check_width(experiment, data)
    model = scimf.build(experiment.model)
    tx = make_optimizer(experiment.optimizer, experiment.n_steps)
    key_init, key_train = jax.random.split(jax.random.key(experiment.seed))
    arrays, transform = data.transform.to_tree()
    about = {
        "kind": "scimf",
        "experiment": to_dict(experiment),
        "transform": transform,
        "split": to_dict(data.split),
        "times": list(data.times),
        "data": {"digest": _digest(adata, experiment.spec), "n_cells": int(adata.n_obs)},
    }
    about["run"] = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    about["provenance"] = checkpoint.provenance()

    params, state, step = jax.jit(model.init)(key_init), None, None
    folder = workdir / "checkpoints"
    if resume:
        step = checkpoint.list_steps(folder)[-1]
        template = jax.eval_shape(
            lambda p, k: init_state(p, tx, k, ema=experiment.ema_decay is not None), params, key_train
        )
        saved = checkpoint.read(folder, step, like={"state": template})
        if saved.about["run"] != about["run"]:
            raise ValueError(
                f"{workdir} holds a run on other data: it was trained on {saved.about['data']}, "
                f"these are {about['data']}. Resume with the same file, or choose another folder."
            )
        state = saved.arrays["state"]
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "experiment.json").write_text(to_json(experiment))
        save_split(workdir / "split.json", data.split)

    with checkpoint.CheckpointWriter(folder, about=about, resume_from=step) as writer:
        state = fit(
            model.loss,
            params,
            tx,
            _batches(experiment, data),
            key=key_train,
            n_steps=experiment.n_steps,
            scan_steps=experiment.scan_steps,
            ema_decay=experiment.ema_decay,
            state=state,
            stream=prefetch,
            hooks=(
                SaveCheckpoints(writer, {"transform": arrays}),
                JsonlLogger(workdir / "metrics.jsonl"),
                *hooks,
            ),
            log_every=experiment.log_every,
            checkpoint_every=experiment.checkpoint_every,
        )
    return Run(state, data, workdir)


def evaluate(
    workdirs: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    adata: AnnData,
    *,
    metrics: Mapping[str, Metric] = POPULATION_METRICS,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int = 0,
) -> list[ResultTable]:
    """One table a held-out time: the trained models, training-free baselines and real against real.

    Args:
        workdirs: runs of one experiment that differ in their seed; or, by name, the runs of each model. All of them
            must have held out the same times of these data.
        n_cells: of each population in each comparison; the smallest population unless given.
        n_draws: repeated draws of cells.
        seed: of the draws and of the simulations' noise.

    Raises:
        ValueError: no held-out time, runs of different splits or spaces, data that are not those of the runs.
    """
    named = workdirs if isinstance(workdirs, Mapping) else {"scIMF": workdirs}
    trained = {name: [load(Path(w) / "checkpoints") for w in folders] for name, folders in named.items()}
    first = next(iter(trained.values()))[0]
    experiment = from_dict(Experiment, first.about["experiment"])
    digest = _digest(adata, experiment.spec)
    for runs in trained.values():
        for run in runs:
            _check_comparable(run, first, digest)
    data = prepare_time_series(
        adata, experiment.spec, experiment.split, experiment.preprocess, time_scale=experiment.time_scale
    )
    if not data.split.held_out:
        raise ValueError("the runs held out no time, so there is nothing to evaluate; train with a split that does.")
    snapshots = {t: data.population(t) for t in data.split.train}
    start = data.population(data.times[0])
    simulated = {
        name: [simulate_cells(run, start, data.split.held_out, jax.random.key(seed)).x for run in runs]
        for name, runs in trained.items()
    }
    return [
        result_table(
            f"held-out time {t:g}, trained on times {', '.join(f'{u:g}' for u in data.split.train)}",
            {name: [x[i] for x in paths] for name, paths in simulated.items()},
            training_free(snapshots, t, seed=seed),
            data.population(t),
            metrics,
            n_cells=n_cells,
            n_draws=n_draws,
            seed=seed,
            provenance={
                "runs": {name: [run.about["run"] for run in runs] for name, runs in trained.items()},
                "data": first.about["data"],
                "split": first.about["split"],
            },
        )
        for i, t in enumerate(data.split.held_out)
    ]


def _batches(experiment: Experiment, data: TimeSeriesData) -> Callable[[int], Any]:
    """Batch n of the run; what data populations cost among themselves is computed once, where they are always whole."""
    plain = make_batches(data, experiment.sampling, experiment.seed)
    if experiment.sampling.n_targets is not None or experiment.model.sinkhorn != "annealed":
        return plain
    own = jax.jit(lambda batch: scimf.target_self_transport(batch, config=experiment.model))(plain(0))
    return make_batches(data, experiment.sampling, experiment.seed, np.asarray(own))


def _admit(workdir: Path, experiment: Experiment, resume: bool) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a folder; {workdir} is a file.")
    settings = workdir / "experiment.json"
    if not resume:
        if workdir.is_dir() and any(workdir.iterdir()):
            what = "another run" if settings.exists() else "other files"
            raise ValueError(
                f"workdir {workdir} holds {what}, which would be overwritten. "
                "Choose a new folder, or resume=True to continue the run in it."
            )
        return
    if not settings.exists() or not checkpoint.list_steps(workdir / "checkpoints"):
        raise ValueError(f"resume=True, but {workdir} holds no run with a checkpoint. Start it with resume=False.")
    before = read_experiment(workdir)
    if before != experiment:
        old, new = to_dict(before), to_dict(experiment)
        differ = [f"{k}: {old[k]!r} there, {new[k]!r} here" for k in new if old[k] != new[k]]
        raise ValueError(f"{workdir} holds a run of other settings ({'; '.join(differ)}). Use them, or a new folder.")


def _check_width(experiment: Experiment, data: TimeSeriesData) -> None:
    if experiment.model.n_dims != data.n_dims:
        raise ValueError(
            f"model.n_dims={experiment.model.n_dims}, but the cells have {data.n_dims} dimensions after preprocessing "
            f"(expression={experiment.spec.expression!r}, n_components={experiment.preprocess.n_components}). "
            f"Set model.n_dims={data.n_dims}, or another number of components."
        )


def _check_comparable(run: Trained, first: Trained, digest: str) -> None:
    if run.about["data"]["digest"] != digest:
        raise ValueError(
            f"these are not the data of run {run.about['run']}: their digest is {digest}, "
            f"it was trained on {run.about['data']}."
        )
    for part in ("split", "times", "transform"):
        if run.about[part] != first.about[part]:
            raise ValueError(
                f"runs {run.about['run']} and {first.about['run']} differ in {part}; they cannot share a table. "
                "Evaluate them one by one."
            )


def _digest(adata: AnnData, spec: DataSpec) -> str:
    """Of expression, genes and times; the same for dense and sparse."""
    from scipy import sparse

    matrix = sparse.csr_matrix(expression_matrix(adata, spec))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    h = hashlib.blake2b(digest_size=16)
    for part in (matrix.data.astype(np.float64), matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)):
        h.update(part.tobytes())
    h.update(spec.read_times(adata).tobytes())
    h.update("\0".join(map(str, adata.var_names)).encode())
    return h.hexdigest()
