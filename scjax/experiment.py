"""One experiment from data to checkpoint to table: the settings as a value, and what is done with them.

run = train(experiment, adata, "runs/first")          the folder holds settings, split, log, checkpoints
table = evaluate(["runs/first"], adata)[0]            each held-out time against baselines and real cells
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from scjax import checkpoint
from scjax.check import at_least, one_of, probability
from scjax.config import from_dict, from_json, to_dict, to_json
from scjax.data.collate import make_batches
from scjax.data.device import prefetch
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import HoldOutInterior, TimeSplitRule, save_split
from scjax.data.timeseries import TimeScale, TimeSeriesData, prepare_time_series
from scjax.metrics.baselines import training_free
from scjax.metrics.population import POPULATION_METRICS, Metric
from scjax.metrics.report import ResultTable, result_table
from scjax.models import scimf
from scjax.predict import Trained, load, project, simulate_cells
from scjax.train.hooks import Hook, JsonlLogger, SaveCheckpoints
from scjax.train.loop import fit
from scjax.train.optimizers import OptimizerConfig, make_optimizer
from scjax.train.state import TrainState, init_state

__all__ = ["Experiment", "Run", "evaluate", "read_experiment", "train"]

_CHUNK = 4096  # cells that are read together


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
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of scan_steps; the last step always has one.
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
        for name in ("n_steps", "scan_steps", "log_every", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        one_of("time_scale", self.time_scale, get_args(TimeScale))
        if self.ema_decay is not None:
            probability("ema_decay", self.ema_decay)
        if self.checkpoint_every % self.scan_steps:
            raise ValueError(
                f"checkpoint_every must be a multiple of scan_steps; got {self.checkpoint_every} and {self.scan_steps}."
            )
        make_optimizer(self.optimizer, self.n_steps)  # the door for what needs both
        n_dims = self.preprocess.n_components or self.preprocess.n_top_genes
        if n_dims is not None and n_dims != self.model.n_dims:
            raise _width_error(self, n_dims)


class Run(NamedTuple):
    """What `train` leaves: the final state, the data as the model saw them, and the folder."""

    state: TrainState
    data: TimeSeriesData
    workdir: Path


def read_experiment(path: str | Path) -> Experiment:
    """An experiment from a JSON file, or from the folder of a run.

    Raises:
        ValueError: a folder without a run, or what `config.from_json` finds.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no run and no settings file {path}.")
    if not path.is_dir():
        return from_json(Experiment, path)
    if not (path / "experiment.json").exists():
        raise ValueError(f"{path} is not the folder of a run: it holds no experiment.json.")
    return from_json(Experiment, path / "experiment.json")


def train(
    experiment: Experiment,
    adata: AnnData,
    workdir: str | Path,
    *,
    resume: bool = False,
    step: int | None = None,
    hooks: Sequence[Hook] = (),
) -> Run:
    """Prepares the data, trains, and writes `workdir`:

        experiment.json   the settings        metrics.jsonl   loss and terms, one line a logged step
        split.json        rule and times      checkpoints/    one folder a saved step

    Args:
        resume: continue the run in `workdir`; settings and data must be the same. Step n uses the same cells and noise
            as in an uninterrupted run, so the result is the same, bit for bit.
        step: of the checkpoint to resume from, the newest unless given. Later ones are set aside, not deleted.
        hooks: besides the log and the checkpoints, `train.hooks.Progress()` for instance.

    Raises:
        ValueError: data that do not fit the spec, a folder that holds something else (nothing is ever overwritten),
            a resumed run with other settings or other data, a damaged checkpoint.
        train.loop.NonFiniteError, train.loop.Interrupted: see there.
    """
    workdir = Path(workdir)
    folder = workdir / "checkpoints"
    _admit(workdir, experiment, resume, step)
    experiment.spec.check(adata)
    digest = _digest(adata, experiment.spec)
    model = scimf.build(experiment.model)
    tx = make_optimizer(experiment.optimizer, experiment.n_steps)
    key_init, key_train = jax.random.split(jax.random.key(experiment.seed))
    params, state = jax.jit(model.init)(key_init), None
    if resume:
        template = jax.eval_shape(
            lambda p, k: init_state(p, tx, k, ema=experiment.ema_decay is not None), params, key_train
        )
        saved = checkpoint.read(folder, step, like={"state": template})
        _check_same_data(saved.about, digest, workdir)
        step, state = saved.step, saved.arrays["state"]

    data = prepare_time_series(
        adata, experiment.spec, experiment.split, experiment.preprocess, time_scale=experiment.time_scale
    )
    if data.n_dims != experiment.model.n_dims:
        raise _width_error(experiment, data.n_dims)
    arrays, transform = data.transform.to_tree()
    about = {
        "kind": "scimf",
        "experiment": to_dict(experiment),
        "transform": transform,
        "split": to_dict(data.split),
        "times": list(data.times),
        "data": {"digest": digest, "n_cells": int(adata.n_obs)},
    }
    about["run"] = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    about["provenance"] = checkpoint.provenance()
    if not resume:
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
    step: int | None = None,
) -> list[ResultTable]:
    """One table a held-out time: the trained models, training-free baselines and real against real.

    Args:
        workdirs: runs that differ in their seed and in nothing else, one row of the table; or, by the names of the
            rows, the runs of several models. All of them must have held out the same times of these data.
        n_cells: of each population in each comparison; the smallest population unless given.
        n_draws: repeated draws of cells.
        seed: of the draws and of the simulations' noise.
        step: of the checkpoints; the newest of each run unless given.

    Raises:
        ValueError: no held-out time, runs of different splits or spaces, a row of different models, data that are not
            those of the runs, a damaged checkpoint.
    """
    named = workdirs if isinstance(workdirs, Mapping) else {"scIMF": workdirs}
    for name, folders in named.items():
        if isinstance(folders, str | Path) or not folders:
            raise ValueError(f"workdirs must be a list of run folders, or lists by name; got {folders!r} for {name!r}.")
    trained = {name: [load(folder, step) for folder in folders] for name, folders in named.items()}
    runs = [run for of_model in trained.values() for run in of_model]
    _check_same_data(runs[0].about, _digest(adata, runs[0].spec), "evaluate")
    for name, of_model in trained.items():
        _check_seeds(name, of_model)
    for run in runs:
        _check_comparable(run, runs[0])
    split = runs[0].about["split"]
    if not split["held_out"]:
        raise ValueError("the runs held out no time, so there is nothing to evaluate; train with a split that does.")

    latent, time = project(runs[0], adata), runs[0].spec.read_times(adata)
    population = {t: latent[time == t] for t in runs[0].times}
    simulated = {
        name: [simulate_cells(run, population[run.times[0]], split["held_out"], jax.random.key(seed)).x for run in rows]
        for name, rows in trained.items()
    }
    return [
        result_table(
            f"held-out time {t:g}, trained on times {', '.join(f'{u:g}' for u in split['train'])}",
            {name: [x[i] for x in paths] for name, paths in simulated.items()},
            training_free({u: population[u] for u in split["train"]}, t, seed=seed),
            population[t],
            metrics,
            n_cells=n_cells,
            n_draws=n_draws,
            seed=seed,
            provenance={
                "runs": {name: [run.about["run"] for run in rows] for name, rows in trained.items()},
                "steps": {name: [run.step for run in rows] for name, rows in trained.items()},
                "data": runs[0].about["data"],
                "split": split,
            },
        )
        for i, t in enumerate(split["held_out"])
    ]


def _batches(experiment: Experiment, data: TimeSeriesData) -> Callable[[int], Any]:
    """Batch n of the run; what data populations cost among themselves is computed once, where they are always whole."""
    plain = make_batches(data, experiment.sampling, experiment.seed)
    if experiment.sampling.n_targets is not None or experiment.model.sinkhorn != "annealed":
        return plain
    own = jax.jit(lambda batch: scimf.target_self_transport(batch, config=experiment.model))(plain(0))
    return make_batches(data, experiment.sampling, experiment.seed, np.asarray(own))


def _admit(workdir: Path, experiment: Experiment, resume: bool, step: int | None) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a folder; {workdir} is a file.")
    settings, steps = workdir / "experiment.json", checkpoint.list_steps(workdir / "checkpoints")
    if not resume:
        if step is not None:
            raise ValueError(f"step={step} says where to resume from; it needs resume=True.")
        if workdir.is_dir() and any(workdir.iterdir()):
            what = "another run" if settings.exists() else "other files"
            mend = ", or continue the run in it (resume=True, --resume)" if settings.exists() and steps else ""
            raise ValueError(f"workdir {workdir} holds {what}; nothing is overwritten. Choose a new folder{mend}.")
        return
    if not settings.exists() or not steps:
        what = "a run that ended before its first checkpoint" if settings.exists() else "no run"
        raise ValueError(f"resume=True, but {workdir} holds {what}. Start it in a new folder, with resume=False.")
    before = read_experiment(workdir)
    if before != experiment:
        differ = "; ".join(
            f"{place}: {old!r} there, {new!r} here" for place, old, new in _differences(before, experiment)
        )
        raise ValueError(f"{workdir} holds a run of other settings ({differ}). Use them, or a new folder.")


def _differences(one: Experiment, other: Experiment) -> Iterator[tuple[str, Any, Any]]:
    def flat(tree: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{at}{name}.")
            else:
                yield f"{at}{name}", value

    before, after = dict(flat(to_dict(one))), dict(flat(to_dict(other)))
    for place in before | after:
        if before.get(place) != after.get(place):
            yield place, before.get(place), after.get(place)


def _width_error(experiment: Experiment, n_dims: int) -> ValueError:
    steps = experiment.preprocess
    return ValueError(
        f"model.n_dims={experiment.model.n_dims}, but the cells have {n_dims} dimensions after preprocessing "
        f"(expression={experiment.spec.expression!r}, n_top_genes={steps.n_top_genes}, "
        f"n_components={steps.n_components}). Set model.n_dims={n_dims}, or another number of components."
    )


def _check_same_data(about: Mapping[str, Any], digest: str, doing: str | Path) -> None:
    if about["data"]["digest"] != digest:
        raise ValueError(
            f"{doing}: these are other data than those of run {about['run']}, which was trained on "
            f"{about['data']['n_cells']} cells of digest {about['data']['digest']}; the digest here is {digest}. "
            "Expression, gene names and times must be the same, in the same order."
        )


def _check_seeds(name: str, runs: Sequence[Trained]) -> None:
    """The runs of one row are trainings of one experiment with different seeds."""
    first, *others = (from_dict(Experiment, run.about["experiment"]) for run in runs)
    for other in others:
        differ = [place for place, *_ in _differences(first, other) if place != "seed"]
        if differ:
            raise ValueError(
                f"the runs of one row may differ in their seed only; those of {name!r} differ in {', '.join(differ)}. "
                "Give each model a name of its own."
            )
    seeds = [e.seed for e in (first, *others)]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs of {name!r} have the seeds {seeds}; the same training counts once.")


def _check_comparable(run: Trained, first: Trained) -> None:
    for part in ("data", "split", "times", "transform"):
        if run.about[part] != first.about[part]:
            raise ValueError(
                f"runs {run.about['run']} and {first.about['run']} differ in their {part} ({run.about[part]!r:.200}, "
                f"{first.about[part]!r:.200}); they cannot share a table. Evaluate them one by one."
            )


def _digest(adata: AnnData, spec: DataSpec) -> str:
    """Of expression, feature names and times; the same for dense and sparse."""
    source = open_source(adata, spec)
    h = hashlib.blake2b(digest_size=16)
    for start in range(0, source.n_cells, _CHUNK):
        h.update(source.rows(np.arange(start, min(start + _CHUNK, source.n_cells))).tobytes())
    h.update(spec.read_times(adata).tobytes())
    h.update("\0".join(source.feature_names).encode())
    return h.hexdigest()
