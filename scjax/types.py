"""The words that all parts share: what a model is, and what its functions take and give."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Float, PRNGKeyArray

Params: TypeAlias = dict[str, Any]  # nested dict of float arrays
Scalar: TypeAlias = Float[Array, ""]
Metrics: TypeAlias = dict[str, Scalar]
Batch: TypeAlias = Any  # one of scjax.batches, or any pytree that a user's own loss understands

InitFn: TypeAlias = Callable[[PRNGKeyArray], Params]
LossFn: TypeAlias = Callable[[Params, Batch, PRNGKeyArray], tuple[Scalar, Metrics]]
PredictFn: TypeAlias = Callable[..., Any]


class Population(NamedTuple):
    """Cells of one perturbation in one context: the unit of splits, predictions and tables of perturbation data.

    Attributes:
        perturbation: what was done, sorted names, control left out; () is the control itself.
        context: the values of the covariates within which controls are matched (cell type, line, batch), joined by
            " | "; "" where there are none.
    """

    perturbation: tuple[str, ...]
    context: str = ""

    @property
    def condition(self) -> str:
        """`A+B`, or `control`."""
        return "+".join(self.perturbation) or "control"

    @property
    def is_control(self) -> bool:
        return not self.perturbation

    def __str__(self) -> str:
        return f"{self.condition} ({self.context})" if self.context else self.condition


class Model(NamedTuple):
    """A configuration with its functions bound to it: all that training, prediction and tests use of a model."""

    config: Any
    init: InitFn
    loss: LossFn
    predict: PredictFn
