"""What every kind of experiment does alike: who may write into a folder, the digest of the data, the run itself."""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from scjax import checkpoint, hosts
from scjax import mesh as meshes
from scjax.check import at_least, probability
from scjax.config import to_dict, to_json
from scjax.data.device import prefetch
from scjax.data.disk import cells_at_once, is_on_disk
from scjax.data.leaks import Findings, check_allowed
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec
from scjax.train.hooks import Hook, JsonlLogger, SaveCheckpoints, read_log
from scjax.train.loop import NonFiniteError, Validate, fit
from scjax.train.optimizers import make_optimizer
from scjax.train.state import TrainState, state_form
from scjax.types import Batch, LossFn, Model, Params

__all__ = [
    "CELLS",
    "FAILED",
    "Begun",
    "Run",
    "Task",
    "admit",
    "begin",
    "check_loop",
    "check_resumed",
    "check_same_data",
    "check_same_settings",
    "check_seeds",
    "check_validation",
    "comparable_runs",
    "data_digest",
    "holds_run",
    "loop_options",
    "record_failure",
    "recorded_failure",
    "say",
    "store_for",
    "train_task",
    "validation_options",
]

_SETTINGS, _SPLIT, _LOG = "experiment.json", "split.json", "metrics.jsonl"
_PART = ".part"  # the end of a file's name until it is whole
CELLS = "cells"  # in the folder of a run, the prepared cells of data that stay on disk
FAILED = "failed.json"  # in the folder of a run that met a number that is not finite


class Task(NamedTuple):
    """An experiment of any kind with its data: what the loop and the checkpoints need to know.

    Attributes:
        model: bound to sizes and constants, those that the data decide included.
        data: as the model sees them, for the caller of `train`.
        split: a dataclass, written as split.json.
        batches: batch n of the run; as a second argument the cells of it that are needed (`data.collate.Share`).
        arrays: fitted ones, kept in every checkpoint beside the state.
        about: what else a checkpoint tells: kind, transform, split, ...
        findings: of `data.leaks.check_split`; its errors end a run before it begins.
        validate: scores on data kept for that; None where nothing is.
        start: parameters of the first step, of a key; None draws them by `model.init`.
        told: what is written to stderr before training begins.
        average: options of the moving average, for `fit`.
        loss_on: the model's loss on the devices of a mesh; None where XLA alone may share its work among them.
    """

    model: Model
    data: Any
    split: Any
    batches: Callable[..., Batch]
    arrays: Mapping[str, Any]
    about: Mapping[str, Any]
    findings: Findings
    validate: Validate | None = None
    start: Callable[[Any], Params] | None = None
    told: str = ""
    average: Mapping[str, Any] = MappingProxyType({})
    loss_on: Callable[[Mesh], LossFn] | None = None


class Run(NamedTuple):
    """What `train` leaves: the final state, the data as the model saw them, and the folder."""

    state: TrainState
    data: Any
    workdir: Path


def check_loop(experiment: Any) -> None:
    """The settings of the loop, which every kind of experiment has under the same names."""
    for name in ("n_steps", "scan_steps", "log_every", "checkpoint_every"):
        at_least(name, getattr(experiment, name), 1)
    at_least("seed", experiment.seed, 0)
    check_allowed(experiment.allow_leaks)
    if experiment.ema_decay is not None:
        probability("ema_decay", experiment.ema_decay)
    if experiment.checkpoint_every % experiment.scan_steps:
        raise ValueError(
            "checkpoint_every must be a multiple of scan_steps; "
            f"got {experiment.checkpoint_every} and {experiment.scan_steps}."
        )
    make_optimizer(experiment.optimizer, experiment.n_steps)  # the door for what needs both


def check_validation(experiment: Any) -> None:
    """Whether the populations that the split keeps for validation are used, and there are any where they are to be."""
    split, every = experiment.split, experiment.validate_every
    ways = ("validation_fraction", "validation_conditions", "validation_values")
    kept = next((name for name in ways if getattr(split, name, None)), None)
    if kept is not None and every is None:
        raise ValueError(
            f"split.{kept}={getattr(split, kept)} keeps populations from training; set validate_every=50, say, to "
            "use them, or leave it out."
        )
    if kept is None and every is not None:
        raise ValueError(
            f"validate_every={every}, but the split keeps no population for that: set split.validation_fraction. The "
            "test populations are never looked at."
        )
    if experiment.patience is not None and every is None:
        raise ValueError(f"patience={experiment.patience} needs validate_every; it is None.")
    for name in ("validate_every", "patience"):
        if getattr(experiment, name) is not None:
            at_least(name, getattr(experiment, name), 1)
    if every is not None and every % experiment.scan_steps:
        raise ValueError(f"validate_every must be a multiple of scan_steps; got {every} and {experiment.scan_steps}.")


def holds_run(workdir: Path) -> bool:
    return (workdir / _SETTINGS).exists()


def admit(workdir: Path, resume: bool, step: int | None) -> None:
    """Refuses a folder that holds something else, one that holds nothing to resume, and one that is being written into.

    A run that was killed before its first checkpoint is resumed from its beginning.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a folder; {workdir} is a file.")
    steps = checkpoint.list_steps(workdir / "checkpoints")
    if not resume:
        if step is not None:
            raise ValueError(f"step={step} says where to resume from; it needs resume=True.")
        if workdir.is_dir() and any(not _is_left_over(path) for path in workdir.iterdir()):
            what = "another run" if holds_run(workdir) else "other files"
            mend = ", or continue the run in it (resume=True)" if holds_run(workdir) else ""
            raise ValueError(f"workdir {workdir} holds {what}; nothing is overwritten. Choose a new folder{mend}.")
        return
    if not holds_run(workdir):
        raise ValueError(f"resume=True, but {workdir} holds no run. Start it in a new folder, with resume=False.")
    if step is not None and not steps:
        raise ValueError(f"step={step}, but the run in {workdir} ended before its first checkpoint. Leave step out.")
    with checkpoint.sole_writer(workdir / "checkpoints"):
        pass  # said here, before the data are prepared; the writer of the run holds the lock


def _is_left_over(path: Path) -> bool:
    """Of a run that was killed before its settings were written, and prepared cells: no file of anybody's."""
    if path.name == CELLS:
        return path.is_dir()
    if path.name == "checkpoints":
        return path.is_dir() and not any(inside.name != ".lock" for inside in path.iterdir())
    return path.name == f"{_SETTINGS}{_PART}"


def check_same_settings(before: Any, experiment: Any, workdir: Path) -> None:
    if type(before) is not type(experiment):
        raise ValueError(f"{workdir} holds a run of kind {before.kind!r}, not {experiment.kind!r}. Use a new folder.")
    if before != experiment:
        differ = "; ".join(
            f"{place}: {old!r} there, {new!r} here" for place, old, new in _differences(before, experiment)
        )
        raise ValueError(f"{workdir} holds a run of other settings ({differ}). Use them, or a new folder.")


def train_task(
    experiment: Any,
    adata: AnnData,
    workdir: Path,
    digest: str,
    prepare: Callable[[Any, AnnData, Path | None], Task],
    *,
    resume: bool,
    step: int | None,
    hooks: Sequence[Hook],
    keep: int = 3,
    mesh: Mesh | None = None,
    shard_above: int | None = None,
) -> Run:
    """Trains what `prepare` makes of the data; `admit` has let it in. See `scjax.experiment.train`."""

    def ready() -> tuple[Task, Callable[[int], Batch], Begun]:
        if resume:
            check_resumed(experiment, workdir, step, digest)
        task = prepare(experiment, adata, store_for(workdir, adata, digest))
        if not resume:
            task.findings.stop()
        batches = task.batches if mesh is None else _shared(task.batches, mesh)  # an error before anything is written
        start = task.start or jax.jit(task.model.init)
        begun = begin(experiment, task, adata, workdir, digest, start, resume, step, mesh, shard_above)
        return task, batches, begun

    task, batches, begun = hosts.together(ready, "Preparing the run")
    # A shared folder may show its newest checkpoint to one host before the other.
    begins = "none" if begun.state is None else str(int(begun.state.step))
    hosts.check_agreed("the checkpoint that the run goes on from", begins)
    tell(task)
    if mesh is not None:
        say(meshes.told(mesh))
    validation = {} if task.validate is None else {"validate": task.validate, **validation_options(experiment)}
    with begun.writer(keep) as writer, recorded_failure(workdir):
        state = fit(
            task.model.loss if mesh is None or task.loss_on is None else task.loss_on(mesh),
            begun.params,
            begun.tx,
            batches,
            key=begun.key,
            state=begun.state,
            donate_state=True,
            hooks=(*begun.hooks(writer), *hooks),
            mesh=mesh,
            shard_above=shard_above,
            **loop_options(experiment, task),
            **validation,
        )
    return Run(state, task.data, workdir)


def _shared(batches: Callable[..., Batch], mesh: Mesh) -> Callable[[int], Batch]:
    """Batches that the devices divide; of several processes each reads the cells that its own devices hold.

    Raises:
        ValueError: the devices cannot share the batches of this run.
    """
    own = meshes.own_cells(batches(0), mesh)
    if jax.process_count() == 1:
        return lambda n: meshes.fill_up(batches(n), mesh)
    return lambda n: meshes.fill_up(batches(n, own), mesh)


def say(line: str) -> None:
    """On stderr, once for all processes of a run."""
    if hosts.is_first():
        sys.stderr.write(f"{line}\n")


def store_for(workdir: Path, adata: AnnData, digest: str) -> Path | None:
    """Where the prepared cells of these data are kept, if the data stay on disk; a resumed run finds them there."""
    if not is_on_disk(adata):
        return None
    store = workdir / CELLS / digest
    say(f"the data stay on disk; the cells of the model's space are kept in {store}")
    return store


def tell(task: Task) -> None:
    """What was found in the data and the split, and what the run starts from."""
    for told in (task.findings.render(), task.told):
        if told:
            say(told)


class Begun(NamedTuple):
    """A run whose folder is ready, before its first step or the next one.

    Attributes:
        params, key: of the first step; of a run that goes on from `state` the shapes of the parameters alone.
        tx: its optimizer.
        state: that of the checkpoint of `step`, from which it is resumed.
        about: what every checkpoint tells.
        arrays: kept in every checkpoint beside the state.
        resumed: the folder is this run's already.
    """

    params: Params
    key: Any
    tx: Any
    state: TrainState | None
    step: int | None
    about: dict[str, Any]
    arrays: Mapping[str, Any]
    workdir: Path
    resumed: bool

    def writer(self, keep: int = 3) -> checkpoint.CheckpointWriter:
        folder = self.workdir / "checkpoints"
        return checkpoint.CheckpointWriter(folder, about=self.about, keep=keep, resume_from=self.step)

    def hooks(self, writer: checkpoint.CheckpointWriter) -> tuple[Hook, ...]:
        return SaveCheckpoints(writer, self.arrays), JsonlLogger(self.workdir / _LOG, resumed=self.resumed)


def begin(
    experiment: Any,
    task: Task,
    adata: AnnData,
    workdir: Path,
    digest: str,
    start: Callable[[Any], Params],
    resume: bool,
    step: int | None,
    mesh: Mesh | None = None,
    shard_above: int | None = None,
) -> Begun:
    """The state that `task` begins from, or goes on from, laid out on the mesh; a new run's folder gets its settings.

    Of several processes the first alone writes.
    """
    tx = make_optimizer(experiment.optimizer, experiment.n_steps)
    key_init, key_train = jax.random.split(jax.random.key(experiment.seed))
    if resume and checkpoint.list_steps(workdir / "checkpoints"):
        params = jax.eval_shape(start, key_init)
        ema, best = experiment.ema_decay is not None, task.validate is not None
        template = state_form(params, tx, key_train, ema=ema, best=best)
        if mesh is not None:
            template = meshes.template(template, mesh, shard_above)
        saved = checkpoint.read(workdir / "checkpoints", step, like={"state": template})
        step, state = saved.step, saved.arrays["state"]
    else:
        params, state = start(key_init), None
    if resume and hosts.is_first():
        (workdir / FAILED).unlink(missing_ok=True)  # it failed; whether it does now will be seen

    about = {
        **task.about,
        "experiment": to_dict(experiment),
        "split": to_dict(task.split),
        "data": {"digest": digest, "n_cells": _n_cells(adata)},
    }
    about["run"] = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    about["findings"] = task.findings.to_json_dict()
    about["provenance"] = checkpoint.provenance()
    if state is None and hosts.is_first():
        _write_settings(workdir, to_json(experiment), to_json(task.split), resume)
    return Begun(params, key_train, tx, state, step, about, task.arrays, workdir, resume)


def _write_settings(workdir: Path, settings: str, split: str, resume: bool) -> None:
    """The settings are what makes a folder that of a run, so they are there as a whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    with checkpoint.sole_writer(workdir / "checkpoints"):
        for name, text in ((_SETTINGS, settings), (_SPLIT, split)):
            path = workdir / name
            if not path.exists():
                _write_whole(path, text)
            elif not resume:
                raise ValueError(f"another run began in {workdir} meanwhile; choose a new folder.")
            elif name == _SPLIT and path.read_text(encoding="utf-8") != text:
                raise ValueError(f"{path} is not the split of these data by these settings; choose a new folder.")


def loop_options(experiment: Any, task: Task) -> dict[str, Any]:
    """Of `fit` and of `fit_together`."""
    return {
        "n_steps": experiment.n_steps,
        "scan_steps": experiment.scan_steps,
        "ema_decay": experiment.ema_decay,
        **task.average,
        "stream": prefetch,
        "log_every": experiment.log_every,
        "checkpoint_every": experiment.checkpoint_every,
    }


def validation_options(experiment: Any) -> dict[str, Any]:
    return {"validate_every": experiment.validate_every, "patience": experiment.patience}


@contextmanager
def recorded_failure(workdir: Path) -> Iterator[None]:
    """A number that is not finite leaves a record of it in the folder of the run, besides the error; other errors tell
    what is left.
    """
    try:
        yield
    except NonFiniteError as err:
        if hosts.is_first():
            record_failure(workdir, err)
        raise
    except Exception as err:
        err.add_note(_what_is_left(workdir))
        raise


def _what_is_left(workdir: Path) -> str:
    steps = checkpoint.list_steps(workdir / "checkpoints")
    if not steps:
        return f"The run in {workdir} has no checkpoint yet."
    return f"The newest checkpoint of the run in {workdir} is step {steps[-1]}: continue with resume=True (--resume)."


def record_failure(workdir: Path, error: NonFiniteError) -> None:
    """Writes failed.json, whole or not at all; where the disk takes nothing, the error says so and remains the news."""
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in error.metrics.items()}
    told = {"step": error.step, "term": error.term, "metrics": metrics, "message": str(error)}
    try:
        _write_whole(workdir / FAILED, json.dumps(told, indent=2) + "\n")
    except OSError as err:
        error.add_note(f"{workdir / FAILED} could not be written: {err.strerror}.")


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + _PART)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def data_digest(adata: AnnData, spec: DataSpec, labels: Iterable[bytes]) -> str:
    """Of expression, of what the cells are labelled with, and of feature names; the same for dense and sparse."""
    source = open_source(adata, spec)
    h = hashlib.blake2b(digest_size=16)
    step = cells_at_once(len(source.feature_names))
    for start in range(0, source.n_cells, step):
        h.update(source.rows(np.arange(start, min(start + step, source.n_cells))).data)
    for label in labels:
        h.update(label)
    h.update("\0".join(source.feature_names).encode())
    return h.hexdigest()


def check_resumed(experiment: Any, workdir: Path, step: int | None, digest: str) -> None:
    """A run that has checkpoints needs its data again; one that was killed before the first of them begins again, which
    stderr tells. One that has lost them does not.
    """
    if checkpoint.list_steps(workdir / "checkpoints"):
        check_same_data(checkpoint.read_about(workdir / "checkpoints", step), digest, workdir)
        return
    logged = max((row["step"] for row in read_log(workdir / _LOG)), default=0)
    if logged > 2 * experiment.checkpoint_every:  # one may have been under way, and the next one waits for it
        raise ValueError(
            f"resume=True, but {workdir} has no checkpoint, and its log goes up to step {logged}: the checkpoints are "
            "gone. Put them back, or start in a new folder."
        )
    say(f"{workdir} has no checkpoint yet; the run begins again at its first step.")


def check_same_data(about: Mapping[str, Any], digest: str, doing: str | Path) -> None:
    if about["data"]["digest"] != digest:
        raise ValueError(
            f"{doing}: these are other data than those of run {about['run']}, which was trained on "
            f"{about['data']['n_cells']} cells of digest {about['data']['digest']}; the digest here is {digest}. "
            "Expression, gene names and the obs columns of the spec must be the same, in the same order."
        )


def check_seeds(name: str, experiments: Sequence[Any]) -> None:
    """The runs of one row are trainings of one experiment with different seeds."""
    first, *others = experiments
    for other in others:
        differ = [place for place, *_ in _differences(first, other) if place != "seed"]
        if differ:
            raise ValueError(
                f"the runs of one row may differ in their seed only; those of {name!r} differ in {', '.join(differ)}. "
                "Give each model a name of its own."
            )
    seeds = [e.seed for e in experiments]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs of {name!r} have the seeds {seeds}; the same training counts once.")


def comparable_runs(trained: Mapping[str, Sequence[Any]], parts: Iterable[str]) -> list[Any]:
    """The runs of all rows of a table, which agree in these parts of what their checkpoints tell."""
    runs = [run for of_row in trained.values() for run in of_row]
    first = runs[0].about
    for about, part in itertools.product((run.about for run in runs), parts):
        if about[part] != first[part]:
            raise ValueError(
                f"runs {about['run']} and {first['run']} differ in their {part} ({about[part]!r:.200}, "
                f"{first[part]!r:.200}); they cannot share a table. Evaluate them one by one."
            )
    return runs


def _n_cells(adata: Any) -> int:
    """Of one AnnData, or of several with their names."""
    files = [one for _, one in adata] if isinstance(adata, Sequence) else [adata]
    return sum(int(one.n_obs) for one in files)


def _differences(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
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
