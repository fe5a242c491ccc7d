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


class Model(NamedTuple):
    """A configuration with its functions bound to it: all that training, prediction and tests use of a model."""

    config: Any
    init: InitFn
    loss: LossFn
    predict: PredictFn
