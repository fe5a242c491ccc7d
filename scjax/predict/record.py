"""What a prediction tells about where it comes from, and the parameters that predict; the same for every kind."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from scjax import __version__
from scjax.data.conditions import JOIN_CONTEXT
from scjax.types import Params

__all__ = ["covariate_columns", "predicting_params", "record"]

_OWN = ("condition", "context", "set", "source_cell", "seed")  # columns of obs that say how cells were made


def predicting_params(state: dict[str, Any]) -> Params:
    """Of a stored training state: the best on validation data, else the moving average, else the last ones.

    Before the first validation there is no best: what stands in its place is where training began.
    """
    if "best" in state and np.isfinite(state["best"]["score"]):
        return state["best"]["params"]
    return state.get("ema", state["params"])


def covariate_columns(covariates: Sequence[str], context: str, /, **more: Any) -> dict[str, Any]:
    """Columns of obs for the cells of a context, named as in the data; what a prediction has under that name itself
    (condition, context, set, source_cell, seed) does not replace it: it is `covariate_<name>` then.

    Args:
        more: further columns that are named by the data.
    """
    values = context.split(JOIN_CONTEXT) if covariates else []
    columns = {**dict(zip(covariates, values, strict=True)), **more}
    return {f"covariate_{name}" if name in _OWN else name: value for name, value in columns.items()}


def record(trained: Any, *, space: str, **more: Any) -> dict[str, Any]:
    """The entry uns["scjax"] of what `trained` made, in types that .h5ad and .zarr can hold.

    Args:
        space: what X and obsm hold, in words.
        more: what the prediction was asked for.
    """
    return {
        "version": __version__,
        "versions": json.dumps(trained.about["provenance"]["versions"]),  # of what trained it
        "run": trained.about["run"],
        "step": trained.step,
        "experiment": json.dumps(trained.about["experiment"]),
        "split": json.dumps(trained.about["split"]),
        "space": space,
        **more,
    }
