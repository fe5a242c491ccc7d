"""Several runs that differ in their seed alone, in one compiled program: the loop of `fit` with an axis of seeds."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from scjax.check import at_least
from scjax.hosts import refuse_several
from scjax.types import Batch, LossFn, Params

from .hooks import Hook
from .loop import (
    Interrupted,
    NonFiniteError,
    Patience,
    Runner,
    Stream,
    Validate,
    check_counts,
    check_same_form,
    chunks_of,
    in_order,
    named_metrics,
    newest_saved,
    not_finite,
    sigterm,
    stacked,
    validated,
)
from .state import Best, TrainState, init_state, own_copy, state_form
from .step import EmaStart, make_update, select

__all__ = ["Member", "fit_together", "make_group_update"]


class Member(NamedTuple):
    """What became of one run of the group.

    Attributes:
        state: after its last step; of a run that stopped, that of its `error`.
        error: why it stopped, where a number of it was not finite. The others went on.
    """

    state: TrainState
    error: NonFiniteError | None


def make_group_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
    *,
    ema_every: int = 1,
    ema_start: EmaStart = "initial",
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """As `make_scanned_update`, of states with a leading axis of runs: (states, batches, first, n, running).

    Leaves of `batches` are [steps, runs, ...], metrics [steps, runs]. A run takes part in step `first + i` where it is
    `running` and that is the step its state waits for; else its state and its zeros in the metrics stay. So a run that
    met a number that is not finite rests, and one that is ahead of the others waits for them.
    """
    update = make_update(loss_fn, tx, ema_decay, ema_every=ema_every, ema_start=ema_start)

    def advance(now: Bool[Array, ""], state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        after, metrics = update(state, batch)
        return select(now, after, state), {name: jnp.where(now, value, 0) for name, value in metrics.items()}

    advance_all = jax.vmap(advance)

    def group_update(
        states: TrainState, batches: Any, first: Int[Array, ""], n: Int[Array, ""], running: Bool[Array, " runs"]
    ) -> tuple[TrainState, dict[str, Float[Array, "steps runs"]]]:
        n_batches = jax.tree.leaves(batches)[0].shape[0]
        one = jax.tree.map(lambda leaf: leaf[0], batches)
        shapes = jax.eval_shape(advance_all, running, states, one)[1]
        metrics = {name: jnp.zeros((n_batches, *shape.shape), shape.dtype) for name, shape in shapes.items()}

        def some_to_come(carry: tuple[Any, TrainState, Any]) -> Any:
            i, states, _ = carry
            return (i < n) & jnp.any(running & (states.step >= first + i))

        def step(carry: tuple[Any, TrainState, Any]) -> tuple[Any, TrainState, Any]:
            i, states, metrics = carry
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), batches)
            states, now = advance_all(running & (states.step == first + i), states, batch)
            return i + 1, states, {name: metrics[name].at[i].set(now[name]) for name in metrics}

        _, states, metrics = jax.lax.while_loop(some_to_come, step, (jnp.zeros_like(n), states, metrics))
        return states, metrics

    return group_update


def fit_together(
    loss_fn: LossFn,
    params: Sequence[Params],
    tx: optax.GradientTransformation,
    batches: Sequence[Callable[[int], Batch]],
    *,
    keys: Sequence[PRNGKeyArray],
    n_steps: int,
    scan_steps: int = 10,
    ema_decay: float | None = None,
    ema_every: int = 1,
    ema_start: EmaStart = "initial",
    states: Sequence[TrainState | None] | None = None,
    stream: Stream | None = None,
    hooks: Sequence[Sequence[Hook]] | None = None,
    group_hooks: Sequence[Hook] = (),
    on_failure: Callable[[int, NonFiniteError], None] | None = None,
    log_every: int = 10,
    checkpoint_every: int | None = None,
    validate: Sequence[Validate] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
) -> list[Member]:
    """Trains every run until its `n_steps` steps are done, all of them in one program (`jax.vmap` over the runs).

    Run r is that of `fit(loss_fn, params[r], tx, batches[r], key=keys[r], ...)`, whose arguments these are, up to
    rounding: the same batches and keys at the same steps. All runs are in memory at once.

    Args:
        states: for each run the state that it goes on from, None for one that begins. They need not be equally far:
            a run that is ahead waits.
        hooks: those of each run; they are told of their run alone.
        group_hooks: are told of all of them: the mean of each metric over the runs that made the step. They are handed
            no checkpoint.
        on_failure: is told at once of a run that stopped: its place among the runs, and why.
        validate: of each run.
        patience: a run that is out of it rests, while others go on; it costs what it did.

    Returns:
        For each run its state. A run with a number that is not finite (loss, term, gradient, validation score, or a
        parameter that a hook is to save) stops there with its `error`, and takes nothing from the others.

    Raises:
        ValueError: as `fit`, and where the numbers of params, batches, keys, states, hooks or scores differ.
        Interrupted: SIGTERM, once all runs are with their hooks.
    """
    check_counts(scan_steps, n_steps, log_every, checkpoint_every, validate, validate_every, patience)
    refuse_several("fit_together")
    n_runs = len(params)
    at_least("the number of runs", n_runs, 1)
    states = [None] * n_runs if states is None else list(states)
    hooks = [()] * n_runs if hooks is None else list(hooks)
    given = {"batches": batches, "keys": keys, "states": states, "hooks": hooks}
    for name, values in (given if validate is None else {**given, "validate": validate}).items():
        if len(values) != n_runs:
            raise ValueError(f"{name} must hold one for each of the {n_runs} runs in params; it holds {len(values)}.")

    runs = []
    parts = {"ema": ema_decay is not None, "best": validate is not None}
    for r in range(n_runs):
        state = states[r]
        if state is not None:
            check_same_form(state, state_form(params[r], tx, keys[r], **parts))
        start = 0 if state is None else int(state.step)
        if start > n_steps:
            raise ValueError(
                f"n_steps must be at least the {start} steps that run {r} has done already; got {n_steps}."
            )
        state = init_state(params[r], tx, keys[r], **parts) if state is None else state
        patient = Patience(validate_every, patience)
        is_over = start == n_steps or patient.is_out(state)
        runs.append(_Run(r, hooks[r], start, state.best, patient, is_over, on_failure))
        states[r] = state._replace(best=None)  # pyright: ignore[reportArgumentType, reportCallIssue]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    del states, state
    if not any(run.is_on for run in runs):
        return [run.member(together) for run in runs]

    update = make_group_update(loss_fn, tx, ema_decay, ema_every=ema_every, ema_start=ema_start)
    start = min(run.start for run in runs if run.is_on)
    with ExitStack() as stack:
        terminated = stack.enter_context(sigterm())  # until the hooks have ended
        begun = [run for run in runs if run.is_on]
        for run in begun:
            for hook in run.hooks:
                stack.callback(hook.on_end)
                hook.on_start(run.start, n_steps)
        for hook in group_hooks:
            stack.callback(hook.on_end)
            hook.on_start(start, n_steps)
        told = [*group_hooks, *(hook for run in begun for hook in run.hooks)]
        together_at = lambda n: stacked([batch_at(n) for batch_at in batches])  # noqa: E731
        chunks = chunks_of(stream or in_order, together_at, start, n_steps, scan_steps)
        stack.callback(chunks.close)
        advance = Runner(update, scan_steps, told)
        log = _Log(runs, group_hooks, log_every, n_steps)
        for first, stop, chunk, waited in chunks:
            if terminated():
                break
            running = jnp.asarray([run.is_on for run in runs])
            together, metrics = advance(together, chunk, first, stop, waited, running)
            log.add(first, stop, metrics)
            validating = validate is not None and (stop % validate_every == 0 or stop == n_steps)
            saving = checkpoint_every is not None and stop % checkpoint_every == 0
            log.flush(together, n_pending=0 if validating or saving or terminated() or stop == n_steps else 1)
            if validating:
                for run in runs:
                    run.validate(together, stop, validate[run.number])  # pyright: ignore[reportOptionalSubscript]
            for run in runs if saving else ():
                run.save(together)
            for run in runs:
                if validating and run.is_on and run.is_out(together):
                    run.save(together)
                    run.is_on = False
            if terminated() or not any(run.is_on for run in runs):
                break
        log.flush(together, n_pending=0)
        for run in runs:
            run.save(together)
        for hook in (*group_hooks, *(hook for run in begun if run.error is None for hook in run.hooks)):
            hook.on_finish()
    if terminated():
        raise Interrupted(max(int(run.of(together).step) for run in runs), newest_saved(told))
    return [run.member(together) for run in runs]


class _Run:
    """One run of the group, seen from the host."""

    def __init__(
        self,
        number: int,
        hooks: Sequence[Hook],
        start: int,
        best: Best | None,
        patient: Patience,
        is_over: bool,
        on_failure: Callable[[int, NonFiniteError], None] | None,
    ):
        self.number, self.hooks, self.start, self.patient, self.on_failure = number, hooks, start, patient, on_failure
        self.best = best if best is None else own_copy(best)
        self.is_on = not is_over
        self.error: NonFiniteError | None = None
        self.last_saved = start

    def of(self, together: TrainState) -> TrainState:
        return jax.tree.map(lambda leaf: leaf[self.number], together)._replace(best=self.best)

    def member(self, together: TrainState) -> Member:
        return Member(self.of(together), self.error)

    def fail(self, error: NonFiniteError) -> None:
        self.error, self.is_on = error, False
        if self.on_failure is not None:
            self.on_failure(self.number, error)

    def is_out(self, together: TrainState) -> bool:
        return self.patient.is_out(self.of(together))

    def validate(self, together: TrainState, step: int, validate: Validate) -> None:
        if not self.is_on or self.start >= step:
            return
        try:
            self.best = validated(self.of(together), validate, self.hooks).best
        except NonFiniteError as err:
            self.fail(err)

    def save(self, together: TrainState) -> None:
        if not self.is_on:
            return
        state = self.of(together)
        if int(state.step) > self.last_saved:
            self.last_saved = int(state.step)
            try:
                for hook in self.hooks:
                    hook.on_checkpoint(state)
            except NonFiniteError as err:
                self.fail(err)


class _Log:
    """As that of `fit`, for each run; what is not finite stops the run that it is of."""

    def __init__(self, runs: Sequence[_Run], group_hooks: Sequence[Hook], every: int, n_steps: int):
        self.runs, self.group_hooks, self.every, self.n_steps = runs, group_hooks, every, n_steps
        self.pending = []

    def add(self, first: int, stop: int, metrics: Any) -> None:
        self.pending.append((first, stop, metrics))

    def flush(self, together: TrainState, n_pending: int) -> None:
        while len(self.pending) > n_pending:
            first, stop, metrics = self.pending.pop(0)
            metrics = jax.device_get(metrics)
            for i, step in enumerate(range(first, stop)):
                self._tell(step, {name: values[i] for name, values in metrics.items()}, together)

    def _tell(self, step: int, metrics: Mapping[str, Any], together: TrainState) -> None:
        due = (step + 1) % self.every == 0 or step + 1 == self.n_steps
        told = []
        for run in self.runs:
            if not run.is_on or step < run.start:
                continue
            now = named_metrics({name: values[run.number] for name, values in metrics.items()})
            if not now.pop("finite"):
                when = f"after {step} good steps, in the next one"
                run.fail(not_finite(when, step, now, run.of(together), run.hooks))
                continue
            told.append(now)
            for hook in run.hooks if due else ():
                hook.on_log(step + 1, now)
        if due and told:
            mean = {name: float(np.mean([one[name] for one in told])) for name in told[0]}
            for hook in self.group_hooks:
                hook.on_log(step + 1, mean)
