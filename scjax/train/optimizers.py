"""From a frozen config to an optax transformation; the defaults are scIMF's."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from scjax.check import at_least, non_negative, one_of, positive, probability

__all__ = ["OptimizerConfig", "clip_by_norm", "learning_rate", "make_optimizer", "skip_unused"]

_OF_SCHEDULE = {
    "decay_every": "step",
    "decay_factor": "step",
    "final_fraction": "cosine",
    "cosine_updates": "cosine",
    "plateau_fraction": "plateau",
    "floor_fraction": "plateau",
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, clipping, warm-up and accumulation. Every default is scIMF's.

    An update is one change of the parameters: a step of training where `accumulate` is 1, and `accumulate` steps
    otherwise. Warm-up and schedule count updates. The schedules, from the peak at the end of the warm-up on:
    "constant"; "step", times `decay_factor` after every `decay_every` updates; "cosine", half a cosine down to
    `final_fraction` of the peak at the last update, or after `cosine_updates`; "plateau", PerturbDiff's, the peak for
    `plateau_fraction` of the run, then half a cosine that would reach zero just after the last update and is cut off
    at `floor_fraction` of the peak. A field of a schedule that is not chosen must be left alone.
    """

    learning_rate: float = 1e-3  # at the peak
    schedule: Literal["constant", "step", "cosine", "plateau"] = "step"  # of the learning rate, after the warm-up
    decay_every: int = 100  # of "step", updates
    decay_factor: float = 0.9  # of "step"
    final_fraction: float = 0.0  # of "cosine", of the peak
    cosine_updates: int | None = None
    """Of "cosine": updates from the peak to the bottom; after them the rate climbs again, as PyTorch's
    CosineAnnealingLR does. None: the bottom is at the last update."""
    plateau_fraction: float = 0.1  # of "plateau", of all updates, the warm-up's included
    floor_fraction: float = 0.1  # of "plateau", of the peak
    n_warmup: int = 0  # updates on which the rate climbs in a line from 0; the schedule begins after them
    warmup_from_zero: bool = False
    """Whether update i of the warm-up has i / n_warmup of the peak, as in PerturbDiff, whose first update does nothing
    but start the moments; or else (i + 1) / (n_warmup + 1)."""
    b1: float = 0.9  # Adam: decay of the mean of gradients
    b2: float = 0.999  # Adam: decay of the mean of their squares
    eps: float = 1e-8  # Adam: added to the root of that
    weight_decay: float = 0.0  # AdamW's, times the learning rate
    decayed: Literal["matrices", "all_but_biases"] = "matrices"
    """What weight decay pulls on: leaves of two axes or more; or, as in PerturbDiff, every leaf without "bias" in its
    name, scales of norms and null vectors included."""
    skip_unused: bool = False
    """Whether a module (the leaves of one dict) is left alone by an update in which it has no part (gradients of
    zeros): no decay, no moments, no count. PyTorch's optimisers do this for what the loss did not touch, optax's do
    not."""
    clip_norm: float | None = 0.1  # largest global norm of a gradient; None leaves it alone
    accumulate: int = 1  # gradients of this many batches are averaged for one update

    def __post_init__(self):
        positive("learning_rate", self.learning_rate)
        one_of("schedule", self.schedule, ("constant", "step", "cosine", "plateau"))
        at_least("decay_every", self.decay_every, 1)
        positive("decay_factor", self.decay_factor)
        non_negative("final_fraction", self.final_fraction)
        if self.cosine_updates is not None:
            at_least("cosine_updates", self.cosine_updates, 1)
        for f in fields(self):
            owner = _OF_SCHEDULE.get(f.name, self.schedule)
            if owner != self.schedule and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name} is of schedule={owner!r} and does nothing with {self.schedule!r}; "
                    f"leave it at {f.default}, got {getattr(self, f.name)}."
                )
        probability("plateau_fraction", self.plateau_fraction)
        if not 0 <= self.floor_fraction <= 1:
            raise ValueError(f"floor_fraction must lie in [0, 1], a part of the peak; got {self.floor_fraction!r}.")
        at_least("n_warmup", self.n_warmup, 0)
        if self.warmup_from_zero and not self.n_warmup:
            raise ValueError("warmup_from_zero does nothing without a warm-up; set n_warmup, got 0, or leave it False.")
        probability("b1", self.b1)
        probability("b2", self.b2)
        positive("eps", self.eps)
        non_negative("weight_decay", self.weight_decay)
        one_of("decayed", self.decayed, tuple(_DECAYED))
        if self.decayed != "matrices" and not self.weight_decay:
            raise ValueError(
                f"decayed={self.decayed!r} does nothing with weight_decay=0; leave it at 'matrices', or set a decay."
            )
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        at_least("accumulate", self.accumulate, 1)


def make_optimizer(config: OptimizerConfig, n_steps: int) -> optax.GradientTransformation:
    """clip, then Adam, then weight decay, then the learning rate, as the config says, for a run of `n_steps` batches.

    Raises:
        ValueError: `accumulate` does not divide `n_steps` (the last gradients would be lost), or the warm-up is longer
            than the run.
    """
    at_least("n_steps", n_steps, 1)
    if n_steps % config.accumulate:
        raise ValueError(
            f"accumulate must divide n_steps, or the last gradients are never used; "
            f"got accumulate={config.accumulate}, n_steps={n_steps}."
        )
    parts = [] if config.clip_norm is None else [clip_by_norm(config.clip_norm)]
    adamw = [optax.scale_by_adam(config.b1, config.b2, config.eps)]
    if config.weight_decay:
        adamw.append(optax.add_decayed_weights(config.weight_decay, mask=_DECAYED[config.decayed]))
    parts += [skip_unused(optax.chain(*adamw))] if config.skip_unused else adamw
    parts.append(optax.scale_by_learning_rate(learning_rate(config, n_steps // config.accumulate)))
    tx = optax.chain(*parts)
    return tx if config.accumulate == 1 else optax.MultiSteps(tx, config.accumulate).gradient_transformation()


def learning_rate(config: OptimizerConfig, n_updates: int) -> optax.Schedule:
    """The rate of update 0, 1, ..., n_updates - 1.

    Raises:
        ValueError: the warm-up leaves no update to the schedule, or warm-up and plateau none to the cosine.
    """
    n, n_flat = config.n_warmup, 0
    if n >= n_updates:
        raise ValueError(f"n_warmup must be less than the number of updates, {n_updates}; got {n}.")
    if config.schedule == "plateau":
        n_flat = int(config.plateau_fraction * n_updates)
        if n + n_flat >= n_updates:
            raise ValueError(
                f"n_warmup and plateau_fraction must leave updates to the cosine; of {n_updates} they take {n} and "
                f"{n_flat}, got plateau_fraction={config.plateau_fraction}."
            )
    after = _after_warmup(config, n_updates - n, n_flat)
    if not n:
        return after
    # Unless asked for, the first update is not wasted on a rate of zero: update i has (i + 1) / (n + 1) of the peak.
    peak = config.learning_rate
    start = 0.0 if config.warmup_from_zero else peak / (n + 1)
    return optax.join_schedules([optax.linear_schedule(start, peak, n), after], [n])


def _after_warmup(config: OptimizerConfig, n_updates: int, n_flat: int) -> optax.Schedule:
    peak = config.learning_rate
    if config.schedule == "step":
        return optax.exponential_decay(peak, config.decay_every, config.decay_factor, staircase=True)
    if config.schedule == "cosine" and config.cosine_updates is not None:
        low, half = peak * config.final_fraction, config.cosine_updates
        return lambda update: low + (peak - low) * (1 + jnp.cos(jnp.pi * update / half)) / 2
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, max(n_updates - 1, 1), alpha=config.final_fraction)
    if config.schedule == "plateau":

        def flat_then_cosine(update: Any) -> Any:
            done = jnp.maximum(update - n_flat, 0) / (n_updates - n_flat)
            return peak * jnp.maximum(config.floor_fraction, (1 + jnp.cos(jnp.pi * done)) / 2)

        return flat_then_cosine
    return optax.constant_schedule(peak)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / (norm + 1e-6)), norm over all leaves.

    This is `torch.nn.utils.clip_grad_norm_`. optax's own divides by the norm alone, and Adam does not forgive the
    difference: where the first moments are tiny it shows at 1e-5.
    """

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def skip_unused(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for each module as if it were the only one, and only in the updates that use it.

    A module is the leaves that lie in one dict, as a kernel and its bias do. It is used where their gradients are not
    all zero throughout: that stands for PyTorch's "has a gradient", which belongs to what the loss was computed from,
    and not to a zero that a kernel gets from an input of zeros. Where a module is not used its update is zero, and its
    state (Adam's moments, and the count that corrects their bias) stays.
    """

    def init(params: optax.Params) -> dict[str, Any]:
        return {name: inner.init(leaves) for name, leaves in _modules(params).items()}

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        weights = {} if params is None else _modules(params)
        done, after = {}, {}
        for name, grads in _modules(updates).items():
            used = jnp.any(jnp.stack([jnp.any(g != 0) for g in grads.values()]))
            steps: Any
            steps, new = inner.update(grads, state[name], weights.get(name))
            done[name] = {leaf: jnp.where(used, step, 0) for leaf, step in steps.items()}
            after[name] = jax.tree.map(lambda n, o, used=used: jnp.where(used, n, o), new, state[name])
        return jax.tree_util.tree_map_with_path(lambda path, _: done[_module(path)][_leaf(path)], updates), after

    return optax.GradientTransformation(init, update)


def _modules(tree: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.setdefault(_module(path), {})[_leaf(path)] = leaf
    return found


def _module(path: tuple[Any, ...]) -> str:
    return "params" + jax.tree_util.keystr(path[:-1])


def _leaf(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[-1:]) or "array"


def _is_matrix(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _is_no_bias(params: optax.Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in _leaf(path), params)


_DECAYED = {"matrices": _is_matrix, "all_but_biases": _is_no_bias}
