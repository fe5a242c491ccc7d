"""Steps to given times, for programs that must not call back to the host."""

from typing import Any

import diffrax
from jaxtyping import Array, Int, Real

__all__ = ["GivenSteps"]


class GivenSteps(diffrax.AbstractStepSizeController):
    """Steps to each of `ts`, which increase and begin and end with the solver's own times.

    It is `diffrax.StepTo` without its checks. They ask the host from within the compiled program, even of times that
    are constants there, and so does a solver that saves at times (`SaveAt(ts=...)`) or may throw: TPUs cannot, no
    such program is kept in a compilation cache, and here nothing can fail. Solve with `throw=False`, and save by
    `SaveAt(steps=...)`.
    """

    ts: Real[Array, " times"]

    def wrap(self, direction: Any) -> "GivenSteps":
        return self

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: None, args: Any, func: Any, error_order: Any
    ) -> tuple[Any, Int[Array, ""] | int]:
        return self.ts[1], 2

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, ...]:
        return True, t1, self.ts[controller_state], False, controller_state + 1, diffrax.RESULTS.successful
