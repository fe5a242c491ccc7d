"""All that a training run is at one moment: what a checkpoint must hold for the run to go on as if uninterrupted."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from scjax.types import Params

__all__ = ["Best", "TrainState", "init_state", "own_copy", "state_form"]

T = TypeVar("T")


class Best(NamedTuple):
    """The parameters with the lowest validation score so far, and the step after which it was measured."""

    score: Any  # float32 scalar; infinite before the first validation
    step: Any  # int32 scalar
    params: Params


class TrainState(NamedTuple):
    """`step` counts finished steps, so it is also the number of the next one, whose key is `fold_in(key, step)`."""

    step: Any  # int32 scalar
    params: Params
    ema: Params | None  # moving average of params; None where it is off
    opt_state: Any
    key: PRNGKeyArray
    best: Best | None = None  # None where nothing is validated


def init_state(
    params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, *, ema: bool = False, best: bool = False
) -> TrainState:
    """The state before the first step. It owns its arrays: the loop may donate them and leave the caller's whole.

    The moving average starts at `params`, without a correction for that. `best` makes room for early stopping.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=own_copy(params),
        ema=own_copy(params) if ema else None,
        opt_state=own_copy(tx.init(params)),  # some transformations keep params themselves
        key=own_copy(key),
        best=Best(jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32), own_copy(params)) if best else None,
    )


def state_form(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, **parts: bool) -> TrainState:
    """The shapes of `init_state`, of which nothing is computed: the template that reads a checkpoint."""
    return jax.eval_shape(lambda params, key: init_state(params, tx, key, **parts), params, key)


def own_copy(tree: T) -> T:
    """The same values in buffers that nobody else holds."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
