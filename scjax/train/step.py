"""One optimiser step as a pure function of state and batch, and several of them in one compiled call."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from scjax.check import at_least, one_of
from scjax.types import Batch, LossFn, Metrics, Params

from .state import TrainState

__all__ = ["ChunkFn", "EmaStart", "UpdateFn", "make_scanned_update", "make_update"]

UpdateFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
ChunkFn: TypeAlias = Callable[[TrainState, Any, Any, Any], tuple[TrainState, dict[str, Float[Array, " steps"]]]]
EmaStart: TypeAlias = Literal["initial", "first_step"]

_RESERVED = ("loss", "grad_norm", "finite", "step", "seconds", "waited")  # the last three are the log's


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
    *,
    ema_every: int = 1,
    ema_start: EmaStart = "initial",
) -> UpdateFn:
    """One step: the gradient of `loss_fn(params, batch, fold_in(state.key, state.step))`, through `tx`.

    The metrics are the loss, the norm of its gradient before any clipping, the loss's own terms, and "finite": 1, or 0
    where one of these is not finite. Then nothing is learned from the batch: the state comes back as it went in, step
    included, and stays the last good one.

    With `ema_decay`, ema <- decay ema + (1 - decay) params (`optax.incremental_update`) after the steps 0, `ema_every`,
    2 `ema_every`, ..., counted from 0; under gradient accumulation a step is a batch, not a change of the parameters.
    The average starts at the "initial" parameters, or at those after the "first_step", which replace it.

    Raises:
        ValueError: settings of an average that is not kept, or that cannot be; and when traced, a term that is no
            scalar or bears a name of the loop's own, `ema_decay` without an average in the state, or the reverse.
    """
    _check_ema(ema_decay, ema_every, ema_start)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if (state.ema is None) != (ema_decay is None):
            has = "no moving average" if state.ema is None else "a moving average"
            raise ValueError(
                f"ema_decay={ema_decay!r}, and the state has {has}; start it with init_state(..., ema=...)."
            )
        key = jax.random.fold_in(state.key, state.step)
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        _check_terms(terms)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **terms}
        finite = jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(m, jnp.float32) for m in metrics.values()])))

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = _average(params, state.ema, ema_decay, state.step, ema_every, ema_start)
        old = (state.step, state.params, state.ema, state.opt_state)
        new = (state.step + 1, params, ema, opt_state)
        step, params, ema, opt_state = select(finite, new, old)
        state = state._replace(step=step, params=params, ema=ema, opt_state=opt_state)
        return state, {**metrics, "finite": finite.astype(jnp.float32)}

    return update


def make_scanned_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
    *,
    ema_every: int = 1,
    ema_start: EmaStart = "initial",
) -> ChunkFn:
    """Steps `first`, ..., `first + n - 1` in one call: `(state, batches, first, n) -> (state, metrics)`.

    `batches` is a tree of stacked batches, of which the first `n` are used; every metric is an array with an entry for
    each, zero where no step was made. `first` and `n` are values, not shapes, so that one compilation serves every
    call, a short last one too, and the numbers do not depend on how a run is cut into calls.

    A batch is applied only to the state of its own step. After a step that was not finite nothing more happens, in this
    call or in later ones: the state waits at the step that failed.
    """
    update = make_update(loss_fn, tx, ema_decay, ema_every=ema_every, ema_start=ema_start)

    def scanned_update(
        state: TrainState, batches: Any, first: Int[Array, ""], n: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Float[Array, " steps"]]]:
        n_batches = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(update, state, jax.tree.map(lambda leaf: leaf[0], batches))[1]
        metrics = {name: jnp.zeros(n_batches, shape.dtype) for name, shape in shapes.items()}

        def in_step(carry: tuple[Any, TrainState, Any]) -> Any:
            i, state, _ = carry
            return (i < n) & (state.step == first + i)

        def advance(carry: tuple[Any, TrainState, Any]) -> tuple[Any, TrainState, Any]:
            i, state, metrics = carry
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), batches)
            state, now = update(state, batch)
            return i + 1, state, {name: metrics[name].at[i].set(now[name]) for name in metrics}

        # A scan would need the number of steps as a shape, hence a program for every length that occurs.
        _, state, metrics = jax.lax.while_loop(in_step, advance, (jnp.zeros_like(n), state, metrics))
        return state, metrics

    return scanned_update


def _average(
    params: Params, ema: Params | None, decay: float | None, step: Int[Array, ""], every: int, start: EmaStart
) -> Params | None:
    """The moving average after step number `step`, which made `params`."""
    if ema is None:
        return None
    new: Any = optax.incremental_update(params, ema, 1.0 - decay)  # pyright: ignore[reportOperatorIssue]
    if every > 1:
        new = select(step % every == 0, new, ema)
    return select(step == 0, params, new) if start == "first_step" else new


def select(condition: Any, one: Any, other: Any) -> Any:
    """One of two trees, by a condition that is known on the device."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _check_ema(decay: float | None, every: int, start: str) -> None:
    at_least("ema_every", every, 1)
    one_of("ema_start", start, get_args(EmaStart))
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1); got {decay!r}.")
    if decay is None and (every > 1 or start != "initial"):
        raise ValueError(
            f"ema_every={every} and ema_start={start!r} are of a moving average; without ema_decay there is none. "
            "Give a decay, or leave both alone."
        )


def _check_terms(terms: Mapping[str, Any]) -> None:
    for name, term in terms.items():
        if name in _RESERVED:
            raise ValueError(
                f"a term of the loss must not be named {name!r}; {', '.join(_RESERVED)} are the loop's own."
            )
        if jnp.shape(term) != ():
            raise ValueError(f"the terms of a loss must be scalars; {name!r} has shape {jnp.shape(term)}.")
