"""One experiment from data to checkpoint to table: the settings as a value, and what is done with them.

run = train(experiment, adata, "runs/first")          the folder holds settings, split, log, checkpoints
table = evaluate(["runs/first"], adata)[0]            what training never saw, against baselines and real cells
table = evaluate_files({"mine": ["predicted.h5ad"]}, "real.h5ad", spec=spec)[0]        predictions of any tool
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from jax.sharding import Mesh

from scjax import hosts
from scjax.check import at_least, one_of
from scjax.config import from_dict, from_json, to_json
from scjax.data.spec import AnnData
from scjax.experiment import cellsets, perturbation, timeseries
from scjax.experiment.cellsets import CellSetExperiment, Pretrained
from scjax.experiment.files import evaluate_files
from scjax.experiment.perturbation import PerturbationExperiment
from scjax.experiment.run import (
    Run,
    admit,
    check_same_data,
    check_same_settings,
    check_seeds,
    comparable_runs,
    holds_run,
    train_task,
)
from scjax.experiment.seeds import SeedRuns, check_group, train_tasks
from scjax.experiment.timeseries import TimeSeriesExperiment
from scjax.experiment.uncertainty import predict_intervals
from scjax.mesh import check_shared
from scjax.metrics import perturbation_report, report
from scjax.predict import load, model_title
from scjax.train.hooks import Hook

__all__ = [
    "CellSetExperiment",
    "Experiment",
    "PerturbationExperiment",
    "Pretrained",
    "Run",
    "SeedRuns",
    "TimeSeriesExperiment",
    "digest_of",
    "evaluate",
    "evaluate_files",
    "predict_intervals",
    "read_experiment",
    "report_of",
    "train",
    "train_seeds",
]

Experiment: TypeAlias = TimeSeriesExperiment | PerturbationExperiment | CellSetExperiment

# Each kind of experiment, and the module with its `digest`, `prepare` and `tables`.
_KINDS: dict[str, tuple[type, ModuleType]] = {
    "TimeSeriesExperiment": (TimeSeriesExperiment, timeseries),
    "PerturbationExperiment": (PerturbationExperiment, perturbation),
    "CellSetExperiment": (CellSetExperiment, cellsets),
}


def read_experiment(path: str | Path) -> Experiment:
    """An experiment from a JSON file, or from the folder of a run. Without a "kind" it is one on a time series.

    Raises:
        ValueError: a folder without a run, or what `config.from_json` finds.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no run and no settings file {path}.")
    if path.is_dir():
        if not (path / "experiment.json").exists():
            raise ValueError(f"{path} is not the folder of a run: it holds no experiment.json.")
        path = path / "experiment.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        tree = None  # from_json says what is wrong
    try:
        cls = _class_of(tree)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    return from_json(cls, path)


def train(
    experiment: Experiment,
    adata: AnnData,
    workdir: str | Path,
    *,
    resume: bool = False,
    step: int | None = None,
    hooks: Sequence[Hook] = (),
    keep: int = 3,
    mesh: Mesh | None = None,
    shard_above: int | None = None,
) -> Run:
    """Prepares the data, trains, and writes `workdir`:

        experiment.json   the settings                     metrics.jsonl   loss and terms, one line a logged step
        split.json        the rule and what it came to     checkpoints/    one folder a saved step
        failed.json       only where a number was not finite: which one, and at which step
        cells/            only of data on disk: the cells in the model's space, see `data.store`; it can be made again

    Args:
        adata: in memory, or on disk (`read_anndata(path, backed=True)`): the batches, and so the run, are the same.
        resume: continue the run in `workdir`; settings and data must be the same. Step n uses the same cells and noise
            as in an uninterrupted run, so the result is the same: bit for bit on the same devices, on others up to
            rounding.
        step: of the checkpoint to resume from, the newest unless given. Later ones are set aside, not deleted.
        hooks: besides the log and the checkpoints, `train.hooks.Progress()` for instance.
        keep: so many of the newest checkpoints stay. Where there is a validation each of them also holds the parameters
            with the best score so far, which predict; they are never lost with an older checkpoint.
        mesh: the devices that share each step, `scjax.mesh.make_mesh()` for all; None uses one. The run can be resumed
            on others. After `scjax.hosts.start` every process calls this; the first alone writes to `workdir`, which
            the others can read.
        shard_above: spread arrays of so many entries or more over the devices, see `train.loop.fit`.

    Raises:
        ValueError: data that do not fit the spec, an error of `data.leaks.check_split` that `allow_leaks` does not
            name, a folder that holds something else (nothing is ever overwritten), a resumed run with other settings or
            other data, a damaged checkpoint, batches that the devices cannot share, other settings or data on another
            process.
        scjax.hosts.PeerError: another process failed.
        train.loop.NonFiniteError, train.loop.Interrupted: see there.
    """
    workdir = Path(workdir)
    at_least("keep", keep, 1)
    check_shared(mesh, shard_above)
    module = _KINDS[experiment.kind][1]

    def admitted() -> str:
        admit(workdir, resume, step)
        if resume:
            check_same_settings(read_experiment(workdir), experiment, workdir)
        module.check(adata, experiment.spec)
        return module.digest(adata, experiment.spec)

    digest = hosts.together(admitted, "Looking at folder and data")
    hosts.check_agreed("the settings", to_json(experiment))
    hosts.check_agreed("the data", digest)
    return train_task(
        experiment,
        adata,
        workdir,
        digest,
        module.prepare,
        resume=resume,
        step=step,
        hooks=hooks,
        keep=keep,
        mesh=mesh,
        shard_above=shard_above,
    )


def train_seeds(
    experiment: Experiment,
    adata: AnnData,
    workdirs: Sequence[str | Path],
    seeds: Sequence[int],
    *,
    together: int | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
) -> SeedRuns:
    """`train` with several seeds, which share one compiled program; each has a folder as `train` writes it.

    A run sees the cells and the noise that it would see alone, and ends where it would end alone, up to rounding. Each
    can be resumed alone, by `train` with its seed, as well as with the others.

    Args:
        experiment: its own seed is not used.
        workdirs: the folder of each seed.
        seeds: all different.
        together: so many at most are trained at a time, for each holds its parameters, its activations and its copy of
            the prepared data in memory; None trains all at once. What is left over makes a smaller group, which is
            compiled once more.
        resume: all of them, each from its newest checkpoint; one that is ahead waits for the others, and one whose
            folder holds no run yet begins. One at least must hold a run.
        hooks: are told of each group: the mean of each metric over its seeds. They are handed no checkpoint.

    Returns:
        The runs, and which of them failed. A seed with a number that is not finite stops, leaves failed.json in its
        folder and takes nothing from the others.

    Raises:
        ValueError: as `train`; repeated seeds or folders, or not as many of both.
        train.loop.Interrupted: SIGTERM, once all are saved. Groups that had not begun have no folder.
    """
    hosts.refuse_several("train_seeds")
    folders = [Path(folder) for folder in workdirs]
    check_group(folders, seeds, together)
    begun = [resume and holds_run(folder) for folder in folders]
    if not any(begun):
        begun = [resume] * len(folders)  # where that is True, the first is refused
    for folder, seed, resumed in zip(folders, seeds, begun, strict=True):
        admit(folder, resumed, None)
        if resumed:
            check_same_settings(read_experiment(folder), replace(experiment, seed=seed), folder)
    module = _KINDS[experiment.kind][1]
    module.check(adata, experiment.spec)
    digest = module.digest(adata, experiment.spec)
    size = len(seeds) if together is None else together
    runs, failed = [], {}
    for i in range(0, len(seeds), size):
        some = slice(i, i + size)
        done = train_tasks(
            experiment, adata, folders[some], seeds[some], digest, module.prepare, resume=resume, hooks=hooks
        )
        runs += done.runs
        failed |= done.failed
    return SeedRuns(tuple(runs), failed)


def evaluate(
    workdirs: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    adata: AnnData,
    *,
    step: int | None = None,
    **options: Any,
) -> list[Any]:
    """Tables of what the runs never saw: the trained models, training-free baselines and real against real.

    Args:
        workdirs: runs that differ in their seed and in nothing else, one row of the table; or, by the names of the
            rows, the runs of several models. All of them must be of one kind and one split of these data.
        step: of the checkpoints; the newest of each run unless given.
        options: of `timeseries.tables`, which gives one table a held-out time, or of `perturbation.tables`, which gives
            one of all held-out populations: metrics, n_cells, n_draws, seed, ...; `keep`, a list, gets the evidence of
            each table (`experiment.evidence`), from which `scjax.page` draws its figures.

    Raises:
        ValueError: nothing held out, runs of different kinds, splits or spaces, a row of different models, data that
            are not those of the runs, a damaged checkpoint.
    """
    named = workdirs if isinstance(workdirs, Mapping) else {None: workdirs}
    for name, folders in named.items():
        if isinstance(folders, str | Path) or not folders:
            raise ValueError(f"workdirs must be a list of run folders, or lists by name; got {folders!r} for {name!r}.")
    trained = {name: [load(folder, step) for folder in folders] for name, folders in named.items()}
    trained = {model_title(runs[0].config) if name is None else name: runs for name, runs in trained.items()}
    runs = [one for of_row in trained.values() for one in of_row]
    module = _module_of(runs[0].about)
    for one in runs:
        if _module_of(one.about) is not module:
            raise ValueError(
                f"runs {one.about['run']} and {runs[0].about['run']} are of kinds {one.about['kind']!r} and "
                f"{runs[0].about['kind']!r}; they cannot share a table. Evaluate them one by one."
            )
    check_same_data(runs[0].about, module.digest(adata, runs[0].spec), "evaluate")
    for name, of_row in trained.items():
        settings = (one.about["experiment"] for one in of_row)
        check_seeds(name, [from_dict(_class_of(tree), tree) for tree in settings])
    comparable_runs(trained, ("data",))
    provenance = {
        "runs": {name: [one.about["run"] for one in of_row] for name, of_row in trained.items()},
        "steps": {name: [one.step for one in of_row] for name, of_row in trained.items()},
        "data": runs[0].about["data"],
        "split": runs[0].about["split"],
    }
    return module.tables(trained, adata, provenance=provenance, **options)


def digest_of(experiment: Experiment, adata: AnnData) -> str:
    """Of all that the experiment sees of these data; `train` and `evaluate` know them again by it."""
    module = _KINDS[experiment.kind][1]
    module.check(adata, experiment.spec)
    return module.digest(adata, experiment.spec)


def report_of(table: Any) -> ModuleType:
    """The module with `render`, `verdict` and `to_json_dict` for this table."""
    return perturbation_report if isinstance(table, perturbation_report.PerturbationTable) else report


def _class_of(tree: Any) -> type:
    """Of the experiment that these settings are of."""
    kind = tree.get("kind", "TimeSeriesExperiment") if isinstance(tree, dict) else "TimeSeriesExperiment"
    one_of("kind", kind, tuple(_KINDS))
    return _KINDS[kind][0]


def _module_of(about: Mapping[str, Any]) -> ModuleType:
    return _KINDS[about["experiment"]["kind"]][1]
