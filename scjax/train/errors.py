"""How training ends before its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .state import TrainState

__all__ = ["Interrupted", "NonFiniteError", "Saved"]


class Saved(NamedTuple):
    """Where a run can be taken up again."""

    directory: Path
    step: int


class NonFiniteError(ArithmeticError):
    """A loss, a term, a gradient, a validation score or a parameter was NaN or infinite.

    Attributes:
        step: finished steps before the one that failed (its number for keys and batches); of a validation or of
            parameters, the step after which they were so.
        term: the first name that was not finite; "parameters" for them.
        metrics: all of that step's, or the scores of that validation; nothing of parameters.
        state: the last good one; of a validation or of parameters, the one that was looked at.
        saved: the newest checkpoint of the run, if a hook writes any.
    """

    def __init__(
        self,
        problem: str,
        *,
        step: int,
        term: str,
        metrics: Mapping[str, float],
        state: TrainState,
        saved: Saved | None,
    ):
        self.step, self.term, self.metrics, self.state, self.saved = step, term, dict(metrics), state, saved
        values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        where = f"step {saved.step} in {saved.directory}" if saved else "none was written"
        super().__init__(
            f"{problem}{values and f' ({values})'}. The last good checkpoint: {where}. A lower learning rate or "
            "clip_norm is the usual mend."
        )


class Interrupted(SystemExit):
    """SIGTERM came, and what was done is with the hooks. Uncaught, it ends Python with its message and status 1; the
    command line ends with status 0 and the command to go on.

    Attributes:
        step: finished steps.
        saved: the checkpoint to resume from, if a hook writes any.
    """

    def __init__(self, step: int, saved: Saved | None):
        self.step, self.saved = step, saved
        if saved:
            resume = f"step {saved.step} is saved in {saved.directory}: continue with resume=True (--resume)."
        else:
            resume = "there is no checkpoint of this run."
        super().__init__(f"Stopped by SIGTERM after step {step}; {resume}")
