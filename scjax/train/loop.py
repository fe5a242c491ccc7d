"""The training loop: it sees a loss, a transformation and a stream of batches, and knows no model."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from scjax import hosts
from scjax import mesh as meshes
from scjax.check import at_least
from scjax.types import Batch, LossFn, Params

from .errors import Interrupted, NonFiniteError, Saved
from .hooks import VALIDATION, Hook
from .state import Best, TrainState, init_state, own_copy, state_form
from .step import EmaStart, make_scanned_update

__all__ = ["Interrupted", "NonFiniteError", "Stream", "Validate", "fit", "in_order"]  # the rest serves `ensemble` too

_log_of_module = logging.getLogger(__name__)

Stream: TypeAlias = Callable[..., Iterable[Any]]
Validate: TypeAlias = Callable[[Params], Mapping[str, Any]]


def fit(
    loss_fn: LossFn,
    params: Params,
    tx: optax.GradientTransformation,
    batches: Callable[[int], Batch],
    *,
    key: PRNGKeyArray,
    n_steps: int,
    scan_steps: int = 10,
    ema_decay: float | None = None,
    ema_every: int = 1,
    ema_start: EmaStart = "initial",
    state: TrainState | None = None,
    donate_state: bool = False,
    stream: Stream | None = None,
    hooks: Sequence[Hook] = (),
    log_every: int = 10,
    checkpoint_every: int | None = None,
    validate: Validate | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    mesh: Mesh | None = None,
    shard_above: int | None = None,
) -> TrainState:
    """Trains until `n_steps` steps are done, counted from the first step of the run.

    Step n uses `batches(n)` and the key `fold_in(key, n)`: it does not depend on when the run was interrupted, nor on
    `scan_steps`. The loop never touches the caller's arrays, but for those of `donate_state`.

    Args:
        params: where training begins: a model's `init`, or the parameters of another run that is to be continued on
            other data or with another transformation; the optimiser's state is new.
        batches: batch n, a pure function of n; all of one structure and shape.
        scan_steps: steps in one compiled call. What the loop does beside (checkpoints, validation, SIGTERM) it does
            between calls, at multiples of this.
        ema_decay: of the moving average of the parameters; None keeps none.
        ema_every: the average takes part in the steps 0, `ema_every`, 2 `ema_every`, ..., counted from 0.
        ema_start: what it starts from: the "initial" parameters, or those after the "first_step".
        state: continues the run that this state is of; its parameters, optimiser state and key are used in place
            of `params` and `key`, which only say what is expected: shapes of them (`jax.eval_shape`) will do.
        donate_state: the arrays of `state` are used up, so that no second copy of them takes memory.
        stream: `stream(batches, start, stop, chunk=...)` yields batches stacked `chunk` at a time, as
            `scjax.data.device.prefetch` does in a thread; None makes them in line.
        log_every: the metrics of these steps, and of the last, go to the hooks.
        checkpoint_every: calls `on_checkpoint`, also at the end; None, at the end only.
        validate: scores of parameters (the moving average where there is one) on data kept for validation, never on
            test data; called as it is, so jit it. The first score is minimised, the others are only logged; the best
            parameters are kept in `state.best`.
        patience: stops after this many validations in a row without a better score; None never does.
        mesh: the devices that share each batch, cut as `scjax.mesh.split` says; None uses the default device. The
            result is that of one device up to rounding. With several processes (`scjax.hosts.start`) all of them call
            this with the same arguments, and `batches` makes the whole batch on each.
        shard_above: parameters, averages and optimiser states of so many entries or more are spread over the devices of
            the mesh, one part each (`scjax.mesh.shardings`); None keeps all of them on every device. An array that
            cannot be cut stays whole, which is logged as a warning.

    Returns:
        The state after the last step, laid out as in training. Where it stopped early `step` is less than `n_steps`.

    Raises:
        ValueError: arguments that do not fit each other, batches of different shapes or not divisible by the devices, a
            `state` of other parameters.
        scjax.hosts.PeerError: another process of the run failed.
        NonFiniteError: a loss, term, gradient or validation score is NaN or infinite; or the parameters are, where a
            hook saves them.
        Interrupted: SIGTERM, where this runs in the main thread. A second SIGTERM acts at once.
    """
    meshes.check_shared(mesh, shard_above)
    if shard_above is not None:
        loss_fn = _of_whole_parameters(loss_fn, mesh)  # pyright: ignore[reportArgumentType]
        validate = validate and _scores_of_whole_parameters(validate, mesh)  # pyright: ignore[reportArgumentType]
    update = make_scanned_update(loss_fn, tx, ema_decay, ema_every=ema_every, ema_start=ema_start)
    check_counts(scan_steps, n_steps, log_every, checkpoint_every, validate, validate_every, patience)
    parts = {"ema": ema_decay is not None, "best": validate is not None}
    form = state_form(params, tx, key, **parts)
    where = None if mesh is None else _places(form, mesh, shard_above)
    if state is None:
        state = _first(params, tx, key, parts, where)
    else:
        check_same_form(state, form)
        state = _laid_out(state if donate_state else own_copy(state), where)
    start = int(state.step)
    if start > n_steps:
        raise ValueError(f"n_steps must be at least the {start} steps that state has done already; got {n_steps}.")
    patient = Patience(validate_every, patience)
    if start == n_steps or patient.is_out(state):
        return state

    hooks = _of_this_process(hooks)
    with ExitStack() as stack:
        terminated = _Agreed(stack.enter_context(sigterm()))  # until the hooks have ended

        def begin() -> None:
            for hook in hooks:
                stack.callback(hook.on_end)
                hook.on_start(start, n_steps)

        hosts.together(begin, "The start of a hook")
        chunks = chunks_of(stream or in_order, batches, start, n_steps, scan_steps)
        stack.callback(chunks.close)
        run = Runner(update, scan_steps, hooks, mesh)
        log = _Log(hooks, log_every, n_steps)
        last_saved = start

        def save(state: TrainState) -> None:
            nonlocal last_saved
            if int(state.step) > last_saved:
                hosts.together(lambda: [hook.on_checkpoint(state) for hook in hooks], "A checkpoint")
                last_saved = int(state.step)

        def flush(state: TrainState, n_pending: int) -> None:
            hosts.together(lambda: log.flush(state, n_pending), "A log")

        for first, stop, chunk, waited in chunks:
            terminated.ask()
            if terminated():
                break
            state, metrics = run(state, chunk, first, stop, waited)
            log.add(first, stop, metrics)
            validating = validate is not None and (stop % validate_every == 0 or stop == n_steps)
            saving = checkpoint_every is not None and stop % checkpoint_every == 0
            # Reading the metrics waits for the device. One call behind, it waits for a call that is done.
            flush(state, n_pending=0 if validating or saving or terminated() or stop == n_steps else 1)
            if validating:
                state = hosts.together(partial(validated, state, validate, hooks), "A validation")  # pyright: ignore[reportArgumentType]
            if saving:
                save(state)
            if terminated() or (validating and patient.is_out(state)):
                break
        flush(state, n_pending=0)
        save(state)
        hosts.together(lambda: [hook.on_finish() for hook in hooks], "The end of a run")
        terminated.ask()  # of a signal since the last call
    if terminated():
        raise Interrupted(int(state.step), newest_saved(hooks))
    terminated.pass_on()
    return state


def in_order(batches: Callable[[int], Batch], start: int, stop: int, *, chunk: int) -> Iterator[Any]:
    """Batches start, ..., stop - 1 stacked `chunk` at a time, made when they are asked for; the last may be fewer."""
    for first in range(start, stop, chunk):
        group = [batches(n) for n in range(first, min(first + chunk, stop))]
        for n, batch in enumerate(group, start=first):
            _check_same_batch(group[0], batch, n)
        yield stacked(group)


def stacked(batches: Sequence[Batch]) -> Any:
    """With a leading axis for them; on the host where they are there."""

    def stack(*leaves: Any) -> Any:
        return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)

    return jax.tree.map(stack, *batches)


# -- calls of the compiled update


class Runner:
    """Compiles for the first chunk that comes, tells the hooks how long it took, and runs every chunk with that.

    They hear first how long the loop `waited` for the chunk.
    """

    def __init__(self, update: Any, scan_steps: int, hooks: Sequence[Hook], mesh: Mesh | None = None):
        self.update, self.scan_steps, self.hooks, self.mesh = update, scan_steps, hooks, mesh
        self.compiled = None

    def __call__(
        self, state: TrainState, chunk: Any, first: int, stop: int, waited: float, *more: Any
    ) -> tuple[TrainState, Any]:
        args = hosts.together(partial(self._ready, state, chunk, first, stop, waited, *more), "A batch")
        if self.compiled is None:  # in which GPUs of several processes wait for each other
            hosts.together(partial(self._compile, *args), "Compiling")
        inner, metrics = self.compiled(*args)  # pyright: ignore[reportOptionalCall]
        return inner._replace(best=state.best), metrics

    def _ready(self, state: TrainState, chunk: Any, first: int, stop: int, waited: float, *more: Any) -> Any:
        for hook in self.hooks:
            hook.on_wait(first, waited)
        n = stop - first
        chunk = jax.tree.map(lambda leaf: _padded(leaf, n, self.scan_steps), chunk)
        inner = state._replace(best=None)  # no business of the update
        if self.compiled is None:  # as batches come: on devices NumPy's wide numbers are narrow ones
            self.example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), chunk)
        _check_same_batch(self.example, chunk, first)
        if self.mesh is not None:
            chunk = meshes.place(chunk, self.mesh)
        return inner, chunk, jnp.int32(first), jnp.int32(n), *more

    def _compile(self, state: TrainState, *args: Any) -> None:
        began = time.perf_counter()
        self.compiled = self._jitted(state).lower(state, *args).compile()
        for hook in self.hooks:
            hook.on_compiled(time.perf_counter() - began)

    def _jitted(self, state: TrainState) -> Any:
        if self.mesh is None:
            return jax.jit(self.update, donate_argnums=0)
        stays = jax.tree.map(lambda leaf: leaf.sharding, state)
        return jax.jit(self.update, donate_argnums=0, out_shardings=(stays, NamedSharding(self.mesh, PartitionSpec())))


def _padded(leaf: Any, n: int, length: int) -> Any:
    """A short chunk in the shape of a full one; the update does not look at what is added."""
    if leaf.shape[0] != n:
        raise ValueError(f"stream must yield {n} stacked batches here; got {leaf.shape[0]}.")
    if n == length:
        return leaf
    library = jnp if isinstance(leaf, jax.Array) else np
    return library.concatenate([leaf, library.repeat(leaf[-1:], length - n, axis=0)])


def chunks_of(
    stream: Stream, batches: Callable[[int], Batch], start: int, stop: int, size: int
) -> Generator[tuple[int, int, Any, float], None, None]:
    """(first, stop, stacked batches, seconds that they took), cut at multiples of `size` whatever the start."""
    aligned = min(stop, -(-start // size) * size)
    for a, b in ((start, aligned), (aligned, stop)):
        if a == b:
            continue
        chunks = iter(stream(batches, a, b, chunk=size))
        try:
            for first in range(a, b, size):
                began = time.perf_counter()
                chunk = hosts.together(partial(next, chunks, None), "A batch")
                if chunk is None:
                    raise ValueError(f"stream ended before step {first}; it must yield the batches up to step {b - 1}.")
                yield first, min(first + size, b), chunk, time.perf_counter() - began
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()


# -- logging, validation


class _Log:
    """Metrics wait here on the device until they are due."""

    def __init__(self, hooks: Sequence[Hook], every: int, n_steps: int):
        self.hooks, self.every, self.n_steps = hooks, every, n_steps
        self.pending = []

    def add(self, first: int, stop: int, metrics: Any) -> None:
        self.pending.append((first, stop, metrics))

    def flush(self, state: TrainState, n_pending: int) -> None:
        while len(self.pending) > n_pending:
            first, stop, metrics = self.pending.pop(0)
            metrics = jax.device_get(metrics)
            for i, step in enumerate(range(first, stop)):
                now = named_metrics({name: values[i] for name, values in metrics.items()})
                if not now.pop("finite"):
                    raise not_finite(f"after {step} good steps, in the next one", step, now, state, self.hooks)
                if (step + 1) % self.every == 0 or step + 1 == self.n_steps:
                    for hook in self.hooks:
                        hook.on_log(step + 1, now)


def named_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(values[name]) for name in sorted(values, key=_place)}


def _place(name: str) -> tuple[int, str]:
    """The loss, its terms, the rest: `jit` returns a dict in the order of its keys."""
    return {"loss": 0, "grad_norm": 2}.get(name, 1), name


class Patience:
    def __init__(self, every: int, patience: int | None):
        self.every, self.patience = every, patience

    def is_out(self, state: TrainState) -> bool:
        if self.patience is None or state.best is None:
            return False
        return int(state.step) - int(state.best.step) >= self.patience * self.every


def validated(state: TrainState, validate: Validate, hooks: Sequence[Hook]) -> TrainState:
    params = state.params if state.ema is None else state.ema
    scores = {f"{VALIDATION}{name}": float(value) for name, value in validate(params).items()}
    if not scores:
        raise ValueError("validate must return at least one score by name; got none.")
    step = int(state.step)
    if not all(map(math.isfinite, scores.values())):
        raise not_finite(f"of the parameters after step {step}", step, scores, state, hooks)
    for hook in hooks:
        hook.on_log(step, scores)
    score = jnp.float32(next(iter(scores.values())))  # as it is kept: 0.1 is less than its own float32
    if score >= state.best.score:  # pyright: ignore[reportOptionalMemberAccess]
        return state
    return state._replace(best=Best(score, jnp.int32(step), own_copy(params)))


def not_finite(
    when: str, step: int, metrics: Mapping[str, float], state: TrainState, hooks: Sequence[Hook]
) -> NonFiniteError:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    # A term says more than the sum that it spoils.
    term = next((name for name in bad if name not in ("loss", "grad_norm")), bad[0])
    problem = f"{term} is {metrics[term]} {when}"
    return NonFiniteError(problem, step=step, term=term, metrics=metrics, state=state, saved=newest_saved(hooks))


def newest_saved(hooks: Sequence[Hook]) -> Saved | None:
    return max((hook.saved for hook in hooks if hook.saved), key=lambda s: s.step, default=None)


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come. Only the main thread may listen; elsewhere the signal does what it does."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    restored = signal.SIG_DFL if before is None else before  # None: set by other code than Python's

    def handle(number: int, frame: Any) -> None:
        came.set()
        signal.signal(signal.SIGTERM, restored)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, restored)


class _Agreed:
    """Whether SIGTERM has come. Several processes ask each other once before each call, so that all stop at one."""

    def __init__(self, came: Callable[[], bool]):
        self.came, self.agreed = came, False

    def ask(self) -> None:
        self.agreed = hosts.anyone(self.came())

    def __call__(self) -> bool:
        return self.came() if jax.process_count() == 1 else self.agreed

    def pass_on(self) -> None:
        """A signal that came too late to be agreed on does what it would do outside."""
        if self.came():
            signal.raise_signal(signal.SIGTERM)


# -- several devices, several processes


def _places(form: TrainState, mesh: Mesh, shard_above: int | None) -> TrainState:
    """The sharding of each array of a state of this form."""
    where, whole = meshes.shardings(form, mesh, shard_above)
    if whole and hosts.is_first():
        _log_of_module.warning(
            "shard_above=%d: %d arrays have no axis that is a multiple of the %d devices; each device holds them "
            "whole, the first of them %s",
            shard_above,
            len(whole),
            mesh.size,
            ", ".join(whole[:3]),
        )
    return where


def _laid_out(state: TrainState, where: Any) -> TrainState:
    return state if where is None else jax.tree.map(meshes.put, state, where)


def _first(
    params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, parts: Mapping[str, bool], where: Any
) -> TrainState:
    """The state before the first step, by one program; averages and the optimiser's arrays are made where they are to
    lie, so that no device ever holds more than its part of them.
    """
    if where is not None:
        params, key = jax.tree.map(meshes.put, (params, key), (where.params, where.key))
    return jax.jit(lambda params, key: init_state(params, tx, key, **parts), out_shardings=where)(params, key)


def _of_whole_parameters(loss_fn: LossFn, mesh: Mesh) -> LossFn:
    """The loss with its parameters brought together on every device for the time of a step.

    Without this XLA would cut the activations as the parameters happen to be cut, against the batch's own cut.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss(params: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Any, Any]:
        return loss_fn(jax.lax.with_sharding_constraint(params, everywhere), batch, key)

    return loss


def _scores_of_whole_parameters(validate: Validate, mesh: Mesh) -> Validate:
    """Every process may then look at all of them, also on the host."""
    return lambda params: validate(jax.device_put(params, NamedSharding(mesh, PartitionSpec())))


def _of_this_process(hooks: Sequence[Hook]) -> list[Hook]:
    if jax.process_count() == 1:
        return list(hooks)
    # Those of all processes come first: what they do together is not to wait for a hook that failed on the first.
    mine = [hook for hook in hooks if hosts.is_first() or hook.every_process]
    return sorted(mine, key=lambda hook: not hook.every_process)


# -- guards


def check_counts(
    scan_steps: int,
    n_steps: int,
    log_every: int,
    checkpoint_every: int | None,
    validate: Validate | Sequence[Validate] | None,
    validate_every: int,
    patience: int | None,
) -> None:
    at_least("n_steps", n_steps, 1)
    at_least("scan_steps", scan_steps, 1)
    at_least("log_every", log_every, 1)
    if patience is not None:
        at_least("patience", patience, 1)
        if validate is None:
            raise ValueError(f"patience={patience} needs validate, the scores to be patient about; got None.")
    multiples = {"checkpoint_every": checkpoint_every, "validate_every": None if validate is None else validate_every}
    for name, every in multiples.items():
        if every is None:
            continue
        at_least(name, every, 1)
        if every % scan_steps:
            near = max(1, round(every / scan_steps)) * scan_steps
            raise ValueError(
                f"{name} must be a multiple of scan_steps={scan_steps}, the steps of one call; got {every}. "
                f"Take {near}, or scan_steps={math.gcd(every, scan_steps)}."
            )


def check_same_form(state: TrainState, expected: TrainState) -> None:
    wanted, found = (dict(_by_path(s)) for s in (expected, state))
    for path in wanted | found:
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"state is not one of this run: {path} is {found.get(path, 'absent')}; "
                f"params, tx, ema_decay and validate ask for {wanted.get(path, 'none')}."
            )


def _check_same_batch(example: Any, batch: Any, step: int) -> None:
    wanted, found = dict(_by_path(example)), dict(_by_path(batch))
    if jax.tree.structure(example) != jax.tree.structure(batch):
        raise ValueError(
            f"all batches must have one structure (static fields included); batch {step} has "
            f"{jax.tree.structure(batch)}, the first {jax.tree.structure(example)}."
        )
    for path in wanted:
        if wanted[path] != found[path]:
            raise ValueError(
                f"all batches must have one shape, for one compilation; {path.lstrip('.') or 'the array'} of batch "
                f"{step} is {found[path]}, of the first {wanted[path]}. Pad it, with weights of 0."
            )


def _by_path(tree: Any) -> Iterator[tuple[str, str]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        yield jax.tree_util.keystr(path), f"{dtype}{list(np.shape(leaf))}"
