"""Runs of one experiment with several seeds, trained together in one compiled program."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scjax.check import at_least
from scjax.data.spec import AnnData
from scjax.experiment.run import (
    Run,
    Task,
    begin,
    check_resumed,
    holds_run,
    loop_options,
    record_failure,
    say,
    store_for,
    tell,
    validation_options,
)
from scjax.train.ensemble import fit_together
from scjax.train.hooks import Hook
from scjax.train.loop import NonFiniteError

__all__ = ["SeedRuns", "check_group", "train_tasks"]


class SeedRuns(NamedTuple):
    """What training with several seeds leaves.

    Attributes:
        runs: of each seed, in the order asked for; the state of one that failed is that of its error.
        failed: by seed, why a run stopped before its end.
    """

    runs: tuple[Run, ...]
    failed: Mapping[int, NonFiniteError]


def check_group(workdirs: Sequence[Path], seeds: Sequence[int], together: int | None) -> None:
    at_least("the number of seeds", len(seeds), 1)
    for seed in seeds:
        at_least("each of seeds", seed, 0)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, for the same training counts once; got {list(seeds)}.")
    if len(workdirs) != len(seeds):
        raise ValueError(f"workdirs must hold a folder for each of the {len(seeds)} seeds; it holds {len(workdirs)}.")
    if len({folder.resolve() for folder in workdirs}) < len(workdirs):
        raise ValueError(f"workdirs must differ; got {', '.join(map(str, workdirs))}.")
    if together is not None:
        at_least("together", together, 1)


def train_tasks(
    experiment: Any,
    adata: AnnData,
    workdirs: Sequence[Path],
    seeds: Sequence[int],
    digest: str,
    prepare: Callable[[Any, AnnData, Path | None], Task],
    *,
    resume: bool,
    hooks: Sequence[Hook],
) -> SeedRuns:
    """One program for all of these; `admit` has let each of them in. See `scjax.experiment.train_seeds`."""
    resumed = [resume and holds_run(workdir) for workdir in workdirs]
    for workdir, goes_on in zip(workdirs, resumed, strict=True):
        if goes_on:
            check_resumed(experiment, workdir, None, digest)
        elif resume:
            say(f"{workdir} holds no run yet; its seed begins.")
    settings = [replace(experiment, seed=seed) for seed in seeds]
    store = store_for(workdirs[0], adata, digest)
    tasks = [prepare(one, adata, store) for one in settings]
    first = tasks[0]
    for seed, task in zip(seeds[1:], tasks[1:], strict=True):
        _check_same_task(first, task, seeds[0], seed)
    for task, goes_on in zip(tasks, resumed, strict=True):
        if not goes_on:
            task.findings.stop()
    start = first.start or jax.jit(first.model.init)
    begun = [
        begin(one, task, adata, workdir, digest, task.start or start, goes_on, None)
        for one, task, workdir, goes_on in zip(settings, tasks, workdirs, resumed, strict=True)
    ]
    tell(first)
    validation = {}
    if first.validate is not None:
        validation = {"validate": [task.validate for task in tasks], **validation_options(experiment)}

    def recorded(number: int, error: NonFiniteError) -> None:
        record_failure(workdirs[number], error)
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        say(f"seed {seeds[number]} stopped, the others go on without it: {error}{notes}")

    with ExitStack() as stack:
        writers = [stack.enter_context(one.writer()) for one in begun]
        members = fit_together(
            first.model.loss,
            [one.params for one in begun],
            begun[0].tx,
            [task.batches for task in tasks],
            keys=[one.key for one in begun],
            states=[one.state for one in begun],
            hooks=[one.hooks(writer) for one, writer in zip(begun, writers, strict=True)],
            group_hooks=hooks,
            on_failure=recorded,
            **loop_options(experiment, first),
            **validation,
        )
    runs = (
        Run(member.state, task.data, workdir) for member, task, workdir in zip(members, tasks, workdirs, strict=True)
    )
    failed = {seed: one.error for seed, one in zip(seeds, members, strict=True) if one.error is not None}
    return SeedRuns(tuple(runs), failed)


def _check_same_task(first: Task, other: Task, seed: int, other_seed: int) -> None:
    """The loss of the first serves all, so what it is made of must not depend on the seed."""
    same = first.about == other.about and jax.tree.structure(first.arrays) == jax.tree.structure(other.arrays)
    if not same or not all(map(np.array_equal, jax.tree.leaves(first.arrays), jax.tree.leaves(other.arrays))):
        raise ValueError(
            f"seeds {seed} and {other_seed} prepare the data differently, so they cannot train together; train them "
            "one by one."
        )
