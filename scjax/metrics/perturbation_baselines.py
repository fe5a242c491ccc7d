"""Predictions of a perturbation's effect without training a model: what a model has to beat.

All see the *training* populations alone (cells by `Population`; the controls are those that are `.is_control`), never
the cells to be predicted. Every rule predicts a delta, the change of the mean; its cells are the control cells of the
target's context, each moved by that delta. They keep the controls' spread, and are not clipped at zero.

A perturbation's delta is its mean minus the mean of its own context's controls. Where a rule averages over
perturbations each weighs the same, whatever its number of cells or of contexts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from scjax import check
from scjax.metrics.baselines import Baseline
from scjax.types import Population

__all__ = ["RULES", "Delta", "FittedBaselines", "fit_baselines", "perturbation_baselines"]

RULES = {
    "control": "no change: the context's control cells",
    "mean of perturbations": "mean delta of the training perturbations",
    "additive": "sum of the deltas of the parts alone, in the same context if they are there",
    "shift": "the perturbation's mean delta in the other contexts",
    "nearest": "mean delta of the training perturbations nearest to it: by the cosine of their vectors if given, "
    "else by the parts that they share (shared / all)",
    "ridge": "ridge regression of the delta on the vectors of the parts, or on indicators of them; strength by "
    "leave-one-perturbation-out",
}

STRENGTHS = tuple(
    10.0**k for k in range(-3, 4)
)  # of the ridge, relative to the features' mean variance summed over rows
ON_CELLS = "cells: the context's controls moved by it, not clipped"


class Delta(NamedTuple):
    """The change of the mean that a rule predicts, or None with the reason why it predicts none here."""

    delta: np.ndarray | None
    note: str


@dataclass(frozen=True)
class FittedBaselines:
    """What the rules remember of the training populations.

    Attributes:
        controls: the control cells of each context.
        deltas: of every training perturbation and context.
        vectors: a vector for each part, or None where parts are known by name alone.
    """

    controls: Mapping[str, np.ndarray]
    deltas: Mapping[Population, np.ndarray]
    by_perturbation: Mapping[tuple[str, ...], np.ndarray]  # mean over contexts
    vectors: Mapping[str, np.ndarray] | None
    ridge: "Ridge | str"  # or why there is none

    @property
    def mean_delta(self) -> Float[np.ndarray, " genes"]:
        """Mean over the training perturbations; the reference of the metrics named "hat"."""
        return np.mean(list(self.by_perturbation.values()), axis=0)

    def predict(self, target: Population) -> dict[str, Delta]:
        """The delta of each rule for one population.

        Raises:
            ValueError: a target that was trained on, that is the control, or whose context has no controls.
        """
        if target.is_control:
            raise ValueError("target is the control itself: it has no effect to predict.")
        if target in self.deltas:
            raise ValueError(f"target={target} is among the training populations. Leave it out.")
        if target.context not in self.controls:
            known = ", ".join(map(repr, self.controls))
            raise ValueError(
                f"the context of target={target} has no control cells; training has those of {known}."
                + check.suggestion(target.context, self.controls)
            )
        n = len(self.by_perturbation)
        return {
            "control": Delta(np.zeros_like(self.mean_delta), "no change: the context's control cells"),
            "mean of perturbations": Delta(self.mean_delta, f"mean delta of the {n} training perturbations"),
            "additive": self._additive(target),
            "shift": self._shift(target),
            "nearest": self._nearest(target),
            "ridge": self._ridge(target),
        }

    def cells(self, target: Population, delta: np.ndarray) -> Float[np.ndarray, "_cells genes"]:
        """All control cells of the target's context, moved by `delta`."""
        return self.controls[target.context] + delta[None]

    def _additive(self, target: Population) -> Delta:
        if len(target.perturbation) < 2:
            return Delta(None, "not defined: not a combination")
        missing = [part for part in target.perturbation if (part,) not in self.by_perturbation]
        if missing:
            return Delta(None, f"not defined: {' and '.join(missing)} alone is not in training")
        parts, elsewhere = [], []
        for part in target.perturbation:
            here = self.deltas.get(Population((part,), target.context))
            parts.append(self.by_perturbation[(part,)] if here is None else here)
            elsewhere += [] if here is not None else [part]
        note = "sum of the deltas of the parts alone"
        if elsewhere:
            note += f" ({' and '.join(elsewhere)} from other contexts)"
        return Delta(np.sum(parts, axis=0), note)

    def _shift(self, target: Population) -> Delta:
        seen = [p.context for p in self.deltas if p.perturbation == target.perturbation]
        if not seen:
            return Delta(None, "not defined: the perturbation is in no other context of training")
        return Delta(self.by_perturbation[target.perturbation], f"its mean delta in {len(seen)} other contexts")

    def _nearest(self, target: Population) -> Delta:
        if self.vectors is None:
            parts = set(target.perturbation)
            near = {p: len(parts & set(p)) / len(parts | set(p)) for p in self.by_perturbation}
            if not (most := max(near.values())):
                return Delta(None, "not defined: no training perturbation shares a part")
            by = "that share the largest part of their names (shared / all parts)"
        else:
            if unknown := [part for part in target.perturbation if part not in self.vectors]:
                return Delta(None, f"not defined: no vector of {' and '.join(unknown)}")
            vector = _features(target.perturbation, self.vectors)
            known = [p for p in self.by_perturbation if all(part in self.vectors for part in p)]
            if not known:
                return Delta(None, "not defined: no training perturbation has a vector")
            near = {p: _cosine(vector, _features(p, self.vectors)) for p in known}
            most, by = max(near.values()), "of most similar vector (cosine)"
        chosen = [p for p, value in near.items() if value == most]
        names = ", ".join("+".join(p) for p in chosen[:3]) + (", ..." if len(chosen) > 3 else "")
        delta = np.mean([self.by_perturbation[p] for p in chosen], axis=0)
        return Delta(delta, f"mean delta of the training perturbations {by}: {names}")

    def _ridge(self, target: Population) -> Delta:
        if isinstance(self.ridge, str):
            return Delta(None, f"not defined: {self.ridge}")
        unknown = [part for part in target.perturbation if part not in self.ridge.vectors]
        kind = "vectors" if self.vectors is not None else "indicators"
        if self.vectors is not None and unknown:
            return Delta(None, f"not defined: no vector of {' and '.join(unknown)}")
        if len(unknown) == len(target.perturbation):
            return Delta(None, "not defined: none of its parts is in training")
        note = f"ridge regression of the delta on {kind} of the parts, strength {self.ridge.strength:g} of the mean "
        note += "variance, by leave-one-perturbation-out"
        if unknown:
            note += f" ({' and '.join(unknown)} unseen: adds nothing)"
        known = tuple(part for part in target.perturbation if part not in unknown)
        return Delta(self.ridge.predict(_features(known, self.ridge.vectors)), note)


class Ridge(NamedTuple):
    """delta = intercept + (features - their mean) @ weights, the intercept not shrunk."""

    vectors: Mapping[str, np.ndarray]
    centre: np.ndarray
    intercept: np.ndarray
    weights: np.ndarray
    strength: float  # of STRENGTHS
    errors: tuple[float, ...]  # mean squared leave-one-perturbation-out error at each of STRENGTHS

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self.intercept + (features - self.centre) @ self.weights


def fit_baselines(training: Mapping[Population, Any], *, vectors: Mapping[str, Any] | None = None) -> FittedBaselines:
    """All that the rules need, computed once for any number of targets.

    Args:
        training: cells [cells, genes] of the training populations and of the controls of every context.
        vectors: of the parts (genes, drugs), for the rules "nearest" and "ridge"; a combination is the sum of its
            parts. Without them a part is known by its name alone.

    Raises:
        ValueError: no controls, no perturbation, a perturbation without controls of its context, unequal numbers of
            genes, values that are not finite, vectors of unequal length or zero.
    """
    cells = {p: np.asarray(x, np.float64) for p, x in training.items()}
    for population, x in cells.items():
        if x.ndim != 2 or not len(x):
            raise ValueError(f"training[{population}] must be [cells, genes] with a cell at least; got {x.shape}.")
        check.finite(f"training[{population}]", x)
        if population.is_control:
            check.at_least(f"the number of cells of training[{population}]", len(x), 2)
    if len({x.shape[1] for x in cells.values()}) > 1:
        shapes = {str(p): x.shape for p, x in cells.items()}
        raise ValueError(f"the training populations must have equal numbers of genes; got {shapes}.")
    controls = {p.context: x for p, x in cells.items() if p.is_control}
    if not controls:
        raise ValueError("training must hold control cells, a Population with no perturbation; it has none.")
    deltas = {}
    for population, x in cells.items():
        if population.is_control:
            continue
        if population.context not in controls:
            raise ValueError(f"training has {population}, and no control cells of its context.")
        deltas[population] = x.mean(axis=0) - controls[population.context].mean(axis=0)
    if not deltas:
        raise ValueError("training must hold at least one perturbation besides the controls.")
    names = sorted({p.perturbation for p in deltas})
    by_perturbation = {
        name: np.mean([d for p, d in deltas.items() if p.perturbation == name], axis=0) for name in names
    }
    checked = None if vectors is None else _checked(vectors)
    return FittedBaselines(controls, deltas, by_perturbation, checked, _fit_ridge(by_perturbation, checked))


def perturbation_baselines(
    training: Mapping[Population, Any], target: Population, *, vectors: Mapping[str, Any] | None = None
) -> dict[str, Baseline]:
    """Cells of every rule for one target, by name; a rule that is not defined here has none and says why.

    Arguments and errors as `fit_baselines`, which serves many targets, and `FittedBaselines.predict`.
    """
    fitted = fit_baselines(training, vectors=vectors)
    return {
        name: Baseline(None, note) if delta is None else Baseline(fitted.cells(target, delta), f"{note}; {ON_CELLS}")
        for name, (delta, note) in fitted.predict(target).items()
    }


def _fit_ridge(
    by_perturbation: Mapping[tuple[str, ...], np.ndarray], vectors: Mapping[str, np.ndarray] | None
) -> Ridge | str:
    if vectors is None:
        parts = sorted({part for name in by_perturbation for part in name})
        vectors = dict(zip(parts, np.eye(len(parts)), strict=True))
    names = [name for name in by_perturbation if all(part in vectors for part in name)]
    if len(names) < 3:
        return f"needs three training perturbations with known parts; there are {len(names)}"
    x = np.stack([_features(name, vectors) for name in names])
    y = np.stack([by_perturbation[name] for name in names])
    centre, intercept = x.mean(axis=0), y.mean(axis=0)
    left, scales, right = np.linalg.svd(x - centre, full_matrices=False)
    if scales[0] <= 1e-9 * np.abs(x).max():
        return "all training perturbations have the same features"
    projected = left.T @ (y - intercept)
    unit = float(np.sum(scales**2)) / len(names)

    def errors(strength: float) -> float:
        shrunk = scales**2 / (scales**2 + strength * unit)
        residual = (y - intercept) - (left * shrunk) @ projected
        leverage = 1 / len(names) + (left**2) @ shrunk  # the intercept's share is the first term
        return float(np.mean((residual / (1 - leverage)[:, None]) ** 2))

    left_out = tuple(errors(strength) for strength in STRENGTHS)
    strength = STRENGTHS[int(np.argmin(left_out))]
    weights = right.T @ ((scales / (scales**2 + strength * unit))[:, None] * projected)
    return Ridge(vectors, centre, intercept, weights, strength, left_out)


def _features(perturbation: tuple[str, ...], vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.sum([vectors[part] for part in perturbation], axis=0)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length > 0 else -1.0  # parts that cancel are like nothing


def _checked(vectors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {part: np.asarray(v, np.float64) for part, v in vectors.items()}
    if not arrays:
        raise ValueError("vectors must hold the vector of at least one part; it is empty. Leave it out instead.")
    for part, v in arrays.items():
        if v.ndim != 1 or not np.isfinite(v).all() or not v.any():
            raise ValueError(f"vectors[{part!r}] must be one finite vector, not all zero; got {v}.")
    if len({v.size for v in arrays.values()}) > 1:
        raise ValueError(f"vectors must have one length; got {sorted({v.size for v in arrays.values()})}.")
    return arrays
