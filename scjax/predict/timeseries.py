"""A trained time series model at work: cells of the first time simulated to others, velocities, who drives whom."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from scjax import mesh as meshes
from scjax.check import at_least, column, increasing
from scjax.checkpoint import Checkpoint
from scjax.config import from_dict
from scjax.data.disk import cells_at_once, is_on_disk
from scjax.data.expression import transform_all
from scjax.data.preprocess import Transform
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec
from scjax.data.timeseries import solver_times
from scjax.models import scimf
from scjax.predict.graphs import embedded_velocity, sparse_attention
from scjax.predict.parts import Part, Prediction
from scjax.predict.record import predicting_params, record
from scjax.types import Params

__all__ = [
    "TrainedTimeSeries",
    "interaction_score_blocks",
    "interaction_scores",
    "predict",
    "project",
    "simulate_cells",
    "velocity",
]

_SAME = 1e-6  # relative: a column stored as float32 holds 0.1 as 0.100000001
_SPACE = "normalised expression in X, the model's space in obsm['X_latent']"


class TrainedTimeSeries(NamedTuple):
    """A checkpoint of a time series run, ready for use.

    Attributes:
        params: those that predict: the moving average where training kept one, else the last.
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

    @classmethod
    def from_checkpoint(cls, found: Checkpoint) -> "TrainedTimeSeries":
        about, settings = found.about, found.about["experiment"]
        return cls(
            params=predicting_params(found.arrays["state"]),
            config=from_dict(scimf.Config, settings["model"]),
            spec=from_dict(DataSpec, settings["spec"]),
            transform=Transform.from_tree(found.arrays["transform"], about["transform"]),
            times=tuple(about["times"]),
            about=about,
            step=found.step,
        )


def project(trained: TrainedTimeSeries, adata: AnnData) -> Float[np.ndarray, "cells dims"]:
    """Cells in the model's space, by the transform that was fitted in training.

    Genes are matched by name: their order does not matter, and others are ignored. A latent space has no others: its
    width must be that of training.

    Raises:
        ValueError: what `DataSpec.check` finds (a single time is enough here), missing genes, another width.
    """
    trained.spec.check(adata, min_times=1)
    source, names = open_source(adata, trained.spec), trained.transform.input_names
    if trained.spec.expression.startswith("obsm/") and len(source.feature_names) != len(names):
        raise ValueError(
            f"{trained.spec.expression} must have the {len(names)} dimensions of training; "
            f"it has {len(source.feature_names)}. Give cells in the latent space that the model was trained in."
        )
    return np.asarray(transform_all(source, trained.transform))


def simulate_cells(
    trained: TrainedTimeSeries,
    x0: Float[np.ndarray, "cells dims"],
    times: Sequence[float],
    key: PRNGKeyArray,
    *,
    mesh: Mesh | None = None,
) -> scimf.Trajectory:
    """Cells of the first training time, in the model's space, at each of `times` (in the unit of the data).

    The kinetic energy counts from the first training time on.

    Args:
        mesh: the devices that share the population (`scjax.mesh.make_mesh()` for all); the number of cells must be a
            multiple of them. The cells are those of one device but for rounding. attention="dense" is then computed
            as "auto", for dense holds all pairs on one device.

    Raises:
        ValueError: no times, unsorted or repeated ones, one before the first of training, or, for a run with
            time_scale="index", one that the data do not have; cells that the mesh cannot share.
    """
    times = _checked_times(trained, times)
    meshes.check_predicting(mesh, "the number of cells (n_cells)", len(x0))
    start = trained.times[0]
    asked = times if times[0] == start else (start, *times)
    split, scale = trained.about["split"], trained.about["experiment"]["time_scale"]
    ts = solver_times(asked, trained.times, scale, split["train"])
    config = trained.config
    if mesh is not None:
        mesh = meshes.along_cells(mesh)
        config = replace(config, attention="auto") if config.attention == "dense" else config
    params, key = meshes.everywhere((trained.params, key), mesh)
    path = _simulate(params, meshes.spread(x0, mesh), key, ts=ts, config=config, mesh=mesh)
    return jax.tree.map(lambda a: np.asarray(a)[len(asked) - len(times) :], path)


def predict(
    trained: TrainedTimeSeries,
    adata: AnnData,
    times: Iterable[float],
    *,
    n_cells: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> AnnData:
    """The population at each of `times`, simulated from the cells of `adata` that were sampled at the first time.

    All cells develop together, since they interact: the population's size is part of the prediction and is recorded.

    Args:
        adata: with cells of the first training time; cells of other times are not looked at.
        times: in the unit of the data, from the first training time on; they need not have been observed.
        n_cells: of the simulated population: drawn from the first cells without replacement, or with it if there are
            fewer; None takes each of them once.
        seed: of that draw and of the noise.
        mesh: the devices that share the population, as for `simulate_cells`.

    Returns:
        One row a cell and time. X: normalised expression (log1p of library-size normalised counts, where that is what
        training saw), float32[rows, genes]; obsm["X_latent"]: the model's space; obs: time, the name of the cell it
        started as, kinetic energy spent since the first time, seed; uns["scjax"]: settings as JSON, run and step of the
        checkpoint, its split, versions.

    Raises:
        ValueError: no cell of the first time, times before it, unsorted or (time_scale="index") not observed, missing
            genes, bad values, cells that the mesh cannot share.
    """
    return predicting(trained, adata, times, n_cells=n_cells, seed=seed, mesh=mesh).in_memory()


def predicting(
    trained: TrainedTimeSeries,
    adata: AnnData,
    times: Iterable[float],
    *,
    n_cells: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Prediction:
    """`predict`, with the simulated cells in the model's space in memory, and some of them as genes."""
    import pandas as pd

    times = _checked_times(trained, times)
    at_least("seed", seed, 0)
    if n_cells is not None:
        at_least("n_cells", n_cells, 1)
    first = _rows_at(trained, adata, trained.times[0])
    if not len(first):
        raise ValueError(
            f"adata must hold cells of the first training time, {trained.times[0]}, for a prediction starts from them; "
            f"obs[{trained.spec.time!r}] has {_some_times(trained, adata)}."
        )
    x0, names = project(trained, adata[first]), adata.obs_names[first].to_numpy()
    if n_cells is not None:
        rows = np.random.default_rng(seed).choice(len(first), n_cells, replace=n_cells > len(first))
        x0, names = x0[rows], names[rows]
    path = simulate_cells(trained, x0, times, jax.random.key(seed), mesh=mesh)
    latent = np.asarray(path.x).reshape(-1, path.x.shape[-1])
    obs = pd.DataFrame(
        {
            "start_cell": pd.Categorical(np.tile(names, len(times))),  # as anndata would write it
            "kinetic_energy": path.kinetic_energy.reshape(-1),
            "seed": seed,
            trained.spec.time: np.repeat(np.asarray(times), len(x0)),
        },
        index=[f"{i}-t{t!r}" for t in times for i in range(len(x0))],
    )

    def parts() -> Iterator[Part]:
        for rows in _chunks(len(latent), len(trained.transform.feature_names)):
            yield Part(trained.transform.inverse(latent[rows]), obs.iloc[rows], {"X_latent": latent[rows]})

    return Prediction(
        n_cells=len(latent),
        genes=trained.transform.feature_names,
        parts=parts,
        uns={"scjax": record(trained, space=_SPACE, n_cells=len(x0), seed=seed)},
        obsm={"X_latent": latent.shape[1]},
    )


def velocity(
    trained: TrainedTimeSeries, adata: AnnData, *, bases: Sequence[str] = (), n_partners: int | None = None
) -> AnnData:
    """The cells of `adata` with the velocity that the model gives them; each time is one population.

    In the names that scVelo, CellRank and scanpy look for, over the genes of the transform:

        X, layers["Ms"]                    normalised expression, which the velocity is that of
        layers["velocity"]                 in gene space, per time unit of the solver
        obsm["X_latent"]                   the model's space
        obsm["velocity_latent"]            in it
        obsm["velocity_NAME"]              arrows for obsm["X_NAME"], see `graphs.embedded_velocity`; with `bases`
        obsp["interaction"]                CSR, float32[cells, cells]; with `n_partners`

    Row i of the interaction is what cell i attends to the others that were sampled at its time, softmax weights
    averaged over heads, of the `n_partners` strongest alone: it sums to 1 where these are all the others, else to less,
    and to 0 for a cell that is alone. Other entries of obsm and uns stay; one of these names that was there before is
    kept as "<name>_before", which must be free.

    Args:
        bases: names of embeddings, umap for obsm["X_umap"].
        n_partners: of each cell; None leaves the interaction out.

    Raises:
        ValueError: as `project`; an embedding that is not there; partners of a model without interaction.
    """
    return predicting_velocity(trained, adata, bases=bases, n_partners=n_partners).in_memory()


def predicting_velocity(
    trained: TrainedTimeSeries, adata: AnnData, *, bases: Sequence[str] = (), n_partners: int | None = None
) -> Prediction:
    """`velocity`, with the cells in the model's space in memory, and some of them as genes."""
    for basis in bases:
        if basis == "latent":
            raise ValueError("bases: velocity_latent is always there, as the model has it; leave 'latent' out.")
        column("bases", f"X_{basis}", adata.obsm, "adata.obsm")
    if n_partners is not None:
        at_least("n_partners", n_partners, 1)
        if not trained.config.n_blocks:
            raise ValueError("n_partners asks for the interaction; this model has none (n_blocks=0). Leave it out.")
    ours = ("X_latent", "velocity_latent", *(f"velocity_{basis}" for basis in bases))
    for key in ours:
        if key in adata.obsm and f"{key}_before" in adata.obsm:
            raise ValueError(
                f"obsm holds {key!r} and {key + '_before'!r}, as which the former would be kept: rename one."
            )
    # Read before anything is computed, as on disk there may be some that cannot be.
    kept = {f"{key}_before" if key in ours else key: adata.obsm[key] for key in adata.obsm}
    kept = {key: matrix[:] if is_on_disk(matrix) else matrix for key, matrix in kept.items()}
    latent = project(trained, adata)
    times = trained.spec.read_times(adata)
    populations = [np.flatnonzero(times == t) for t in np.unique(times)]
    v = np.empty_like(latent)
    for rows in populations:
        v[rows] = _drift(trained.params, jnp.asarray(latent[rows]), config=trained.config)
    arrows = {
        f"velocity_{basis}": embedded_velocity(latent, v, np.asarray(adata.obsm[f"X_{basis}"][:], np.float32))
        for basis in bases
    }
    graphs = {} if n_partners is None else {"interaction": _interaction(trained, latent, populations, n_partners)}
    source = open_source(adata, trained.spec)

    def parts() -> Iterator[Part]:
        for rows in _chunks(len(latent), len(source.feature_names)):
            x = source.rows(np.arange(len(latent))[rows])
            x = trained.transform.normalise(x, source.feature_names).astype(np.float32)
            yield Part(
                x,
                adata.obs.iloc[rows],
                {"X_latent": latent[rows], "velocity_latent": v[rows]},
                {"velocity": trained.transform.inverse_velocity(v[rows]), "Ms": x},
            )

    return Prediction(
        n_cells=len(latent),
        genes=trained.transform.feature_names,
        parts=parts,
        uns={key: value for key, value in adata.uns.items() if key != "scjax"}
        | {"scjax": record(trained, space=_SPACE)},
        obsm={"X_latent": latent.shape[1], "velocity_latent": latent.shape[1]},
        layers=("velocity", "Ms"),
        tables=kept | arrows,
        graphs=graphs,
    )


def _interaction(
    trained: TrainedTimeSeries, latent: np.ndarray, populations: Sequence[np.ndarray], n_partners: int
) -> Any:
    """CSR of all cells; those of different times do not meet."""
    from scipy import sparse

    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for rows in populations:
        if len(rows) > 1:
            blocks = _score_blocks(trained, jnp.asarray(latent[rows]), 256, softmax=True, scale_by_value=False)
            found.extend(sparse_attention(blocks, rows, n_partners))
    receivers, senders, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return sparse.csr_matrix((weights, (receivers, senders)), shape=(len(latent), len(latent)))


def interaction_scores(
    trained: TrainedTimeSeries, adata: AnnData, time: float, *, softmax: bool = True, scale_by_value: bool = True
) -> Float[Array, "heads cells cells"]:
    """How strongly each cell observed at `time` (row) is driven by each other (column); in the order of `adata`.

    `metrics.interaction` makes matrices between cell types of it; see `models.scimf.interaction_scores` for the
    options.

    Raises:
        ValueError: no cell at that time, a model without interaction, or as `project`.
    """
    return scimf.interaction_scores(
        trained.params,
        _cells_at(trained, adata, time),
        config=trained.config,
        softmax=softmax,
        scale_by_value=scale_by_value,
    )


def interaction_score_blocks(
    trained: TrainedTimeSeries,
    adata: AnnData,
    time: float,
    *,
    n_receivers: int = 256,
    softmax: bool = True,
    scale_by_value: bool = True,
) -> Iterator[Float[np.ndarray, "heads receivers cells"]]:
    """`interaction_scores` in blocks of `n_receivers` rows, in order, for more cells than have room in one matrix.

    `metrics.interaction.top_partners` and `type_interactions` read them.

    Raises:
        ValueError: as `interaction_scores`, or a block without receivers; before the first block is asked for.
    """
    at_least("n_receivers", n_receivers, 1)
    x = _cells_at(trained, adata, time)
    return _score_blocks(trained, x, n_receivers, softmax=softmax, scale_by_value=scale_by_value)


def _score_blocks(
    trained: TrainedTimeSeries, x: Float[Array, "cells dims"], n_receivers: int, *, softmax: bool, scale_by_value: bool
) -> Iterator[Float[np.ndarray, "heads receivers cells"]]:
    of = _heads(trained.params, x, config=trained.config)
    n_cells = of.q.shape[1]

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, n_cells, n_receivers):
            # The last block is filled up with its last cell, so that there is one program.
            receivers = np.minimum(np.arange(start, start + n_receivers), n_cells - 1)
            scores = _receiver_scores(of, jnp.asarray(receivers), softmax=softmax, scale_by_value=scale_by_value)
            yield np.asarray(scores)[:, : n_cells - start]

    return blocks()


def _chunks(n: int, n_genes: int) -> Iterator[slice]:
    step = cells_at_once(n_genes)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@partial(jax.jit, static_argnames=("ts", "config", "mesh"))
def _simulate(params, x0, key, *, ts, config, mesh):
    return scimf.simulate(params, x0, ts, key, config=config, mesh=mesh)


_receiver_scores = jax.jit(scimf.receiver_scores, static_argnames=("softmax", "scale_by_value"))


@partial(jax.jit, static_argnames="config")
def _heads(params, x, *, config):
    return scimf.heads(params, x, config=config)


@partial(jax.jit, static_argnames="config")
def _drift(params, x, *, config):
    return scimf.drift(params, x, config=config)


def _checked_times(trained: TrainedTimeSeries, times: Iterable[float]) -> tuple[float, ...]:
    """Increasing, from the first training time on; one that means an observed time is exactly that one."""
    times = increasing("times", times)
    start = trained.times[0]
    times = tuple(next((known for known in trained.times if math.isclose(known, t, rel_tol=_SAME)), t) for t in times)
    if not times or times[0] < start:
        raise ValueError(f"times must name at least one time, none before the first of training, {start}; got {times}.")
    return times


def _cells_at(trained: TrainedTimeSeries, adata: AnnData, time: float) -> Float[Array, "cells dims"]:
    """Those observed at a time, in the model's space."""
    rows = _rows_at(trained, adata, time)
    if not len(rows):
        raise ValueError(f"time must be one of the observed times {_some_times(trained, adata)}; got {time}.")
    return jnp.asarray(project(trained, adata[rows]))


def _rows_at(trained: TrainedTimeSeries, adata: AnnData, time: float) -> np.ndarray:
    return np.flatnonzero(np.isclose(trained.spec.read_times(adata), time, rtol=_SAME, atol=0.0))


def _some_times(trained: TrainedTimeSeries, adata: AnnData) -> str:
    return ", ".join(map(str, np.unique(trained.spec.read_times(adata))[:20])) or "none"
