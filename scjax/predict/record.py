"""What a prediction tells about where it comes from, and the parameters that predict; the same for every kind."""

import json
from typing import Any

import numpy as np

from scjax import __version__
from scjax.types import Params

__all__ = ["predicting_params", "record"]


def predicting_params(state: dict[str, Any]) -> Params:
    """Of a stored training state: the best on validation data, else the moving average, else the last ones.

    Before the first validation there is no best: what stands in its place is where training began.
    """
    if "best" in state and np.isfinite(state["best"]["score"]):
        return state["best"]["params"]
    return state.get("ema", state["params"])


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
