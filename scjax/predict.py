"""From a checkpoint and cells to predictions as an AnnData; the truth is never needed."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from scjax import __version__, checkpoint
from scjax.check import at_least, increasing
from scjax.config import from_dict
from scjax.data.preprocess import Transform
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec
from scjax.data.timeseries import solver_times
from scjax.models import scimf
from scjax.processes.sde import Trajectory
from scjax.types import Params

__all__ = ["Trained", "interaction_scores", "load", "predict", "project", "simulate_cells", "velocity"]


class Trained(NamedTuple):
    """A checkpoint ready for use.

    Attributes:
        params: the moving average where training kept one, else the last parameters.
        config: of the model.
        spec, transform: from an AnnData to the model's space and back.
        times: all times of the training data, held-out ones included.
        about: the document stored with the checkpoint.
        step: of training.
    """

    params: Params
    config: scimf.Config
    spec: DataSpec
    transform: Transform
    times: tuple[float, ...]
    about: dict[str, Any]
    step: int


def load(directory: str | Path, step: int | None = None) -> Trained:
    """The checkpoint of `step`, or the newest, of a run's folder or of its `checkpoints` folder.

    Raises:
        ValueError: no checkpoint there; a damaged one (the newest earlier one that is whole is named).
    """
    directory = Path(directory)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    found = checkpoint.read(directory, step)
    about, state = found.about, found.arrays["state"]
    settings = about["experiment"]
    return Trained(
        params=state.get("ema", state["params"]),
        config=from_dict(scimf.Config, settings["model"]),
        spec=from_dict(DataSpec, settings["spec"]),
        transform=Transform.from_tree(found.arrays["transform"], about["transform"]),
        times=tuple(about["times"]),
        about=about,
        step=found.step,
    )


def project(trained: Trained, adata: AnnData) -> Float[np.ndarray, "cells dims"]:
    """Cells in the model's space, by the transform that was fitted in training; genes are matched by name.

    Raises:
        ValueError: what `DataSpec.check` finds (a single time is enough here), missing genes, another width.
    """
    trained.spec.check(adata, min_times=1)
    source = open_source(adata, trained.spec)
    return trained.transform.apply(source.rows(np.arange(source.n_cells)), source.feature_names)


def simulate_cells(
    trained: Trained, x0: Float[np.ndarray, "cells dims"], times: Sequence[float], key: PRNGKeyArray
) -> Trajectory:
    """Cells of the first training time, in the model's space, at each of `times` (in the unit of the data)."""
    times = increasing("times", times)
    start = trained.times[0]
    if not times or times[0] < start:
        raise ValueError(f"times must name at least one time, none before the first of training, {start}; got {times}.")
    asked = times if times[0] == start else (start, *times)
    ts = solver_times(asked, trained.times, trained.about["experiment"]["time_scale"])
    simulate = jax.jit(lambda params, x, key: scimf.simulate(params, x, ts, key, config=trained.config))
    path = simulate(trained.params, jax.numpy.asarray(x0), key)
    return jax.tree.map(lambda a: np.asarray(a)[len(asked) - len(times) :], path)


def predict(
    trained: Trained,
    adata: AnnData,
    times: Iterable[float],
    *,
    n_cells: int | None = None,
    seed: int = 0,
) -> AnnData:
    """The population at each of `times`, simulated from the cells of `adata` that were sampled at the first time.

    All cells develop together, since they interact: the population's size is part of the prediction and is recorded.

    Args:
        adata: with cells of the first training time; cells of other times are not looked at.
        times: in the unit of the data, from the first training time on; they need not have been observed.
        n_cells: of the simulated population: drawn from the first cells without replacement, or with it if there are
            fewer; None takes each of them once.
        seed: of that draw and of the noise.

    Returns:
        One row a cell and time. X: normalised expression (log1p of library-size normalised counts, where that is what
        training saw), float32[rows, genes]; obsm["X_latent"]: the model's space; obs: time, the name of the cell it
        started as, kinetic energy, seed; uns["scjax"]: config, checkpoint, versions.

    Raises:
        ValueError: no cell of the first time, times before it or unsorted, missing genes, bad values.
    """
    import anndata
    import pandas as pd

    times = increasing("times", times)
    start = trained.times[0]
    observed = trained.spec.read_times(adata)
    first = np.flatnonzero(np.isclose(observed, start, rtol=1e-6))
    if not len(first):
        raise ValueError(
            f"adata must hold cells of the first training time, {start}, for a prediction starts from them; "
            f"obs[{trained.spec.time!r}] has {np.unique(observed).tolist()}."
        )
    x0 = project(trained, adata[first])
    names = adata.obs_names[first].to_numpy()
    key_noise = jax.random.key(seed)
    if n_cells is not None:
        at_least("n_cells", n_cells, 1)
        rows = np.random.default_rng(seed).choice(len(first), n_cells, replace=n_cells > len(first))
        x0, names = x0[rows], names[rows]
    path = simulate_cells(trained, x0, times, key_noise)
    latent = path.x.reshape(-1, path.x.shape[-1])
    obs = pd.DataFrame(
        {
            trained.spec.time: np.repeat(np.asarray(times), len(x0)),
            "start_cell": np.tile(names, len(times)),
            "kinetic_energy": path.kinetic_energy.reshape(-1),
            "seed": seed,
        },
        index=[f"{i}-t{t:g}" for t in times for i in range(len(x0))],
    )
    predicted = anndata.AnnData(
        X=trained.transform.inverse(latent), obs=obs, var=pd.DataFrame(index=list(trained.transform.feature_names))
    )
    predicted.obsm["X_latent"] = latent
    predicted.uns["scjax"] = _record(trained, n_cells=len(x0))
    return predicted


def velocity(trained: Trained, adata: AnnData) -> AnnData:
    """The cells of `adata` with the velocity that the model gives them; each time is one population.

    obsm["X_latent"] and obsm["velocity_latent"] (per time unit of the solver), layers["velocity"] in gene space, over
    the genes of the transform, whose X is the normalised expression.

    Raises:
        ValueError: as `project`.
    """
    import anndata
    import pandas as pd

    latent = project(trained, adata)
    times = trained.spec.read_times(adata)
    drift = jax.jit(lambda params, x: scimf.drift(params, x, config=trained.config))
    v = np.empty_like(latent)
    for t in np.unique(times):
        rows = np.flatnonzero(times == t)
        v[rows] = np.asarray(drift(trained.params, jax.numpy.asarray(latent[rows])))
    source = open_source(adata, trained.spec)
    found = anndata.AnnData(
        X=trained.transform.normalise(source.rows(np.arange(source.n_cells)), source.feature_names).astype(np.float32),
        obs=adata.obs.copy(),
        var=pd.DataFrame(index=list(trained.transform.feature_names)),
    )
    found.obsm["X_latent"], found.obsm["velocity_latent"] = latent, v
    found.layers["velocity"] = trained.transform.inverse_velocity(v)
    found.uns["scjax"] = _record(trained)
    return found


def interaction_scores(
    trained: Trained, adata: AnnData, time: float, *, softmax: bool = True, scale_by_value: bool = True
) -> Float[Array, "heads cells cells"]:
    """How strongly each cell observed at `time` (row) is driven by each other (column); in the order of `adata`.

    `metrics.interaction` makes matrices between cell types of it; see `models.scimf.interaction_scores` for the
    options.

    Raises:
        ValueError: no cell at that time, a model without interaction, or as `project`.
    """
    times = trained.spec.read_times(adata)
    rows = np.flatnonzero(np.isclose(times, time, rtol=1e-6))
    if not len(rows):
        raise ValueError(f"time must be one of the observed times {np.unique(times).tolist()}; got {time}.")
    x = jax.numpy.asarray(project(trained, adata[rows]))
    return scimf.interaction_scores(
        trained.params, x, config=trained.config, softmax=softmax, scale_by_value=scale_by_value
    )


def _record(trained: Trained, **more: Any) -> dict[str, Any]:
    import json

    return {
        "version": __version__,
        "run": trained.about["run"],
        "step": trained.step,
        "experiment": json.dumps(trained.about["experiment"]),
        "space": "normalised expression in X, the model's space in obsm['X_latent']",
        **more,
    }
