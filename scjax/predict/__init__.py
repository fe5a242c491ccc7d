"""From a checkpoint and cells to predictions as an AnnData; the truth is never needed.

trained = load("runs/first")                        the kind of run decides what it can predict:
predict(trained, adata, [2.0, 4.5])                 a time series: the population at these times
predict(trained, adata, ["KLF1+MAP2K6"])            perturbations: what control cells become, or sets of such cells
predicting(trained, adata, ...).write("p.zarr")     the same, to a file as it is made, whatever memory there is
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from scjax import checkpoint
from scjax.data.spec import AnnData
from scjax.models import perturbdiff, scdfm, scimf
from scjax.predict import cellsets, perturbation, timeseries
from scjax.predict.cellsets import SetGenerationConfig, TrainedCellSets
from scjax.predict.observed import observing
from scjax.predict.parts import Prediction
from scjax.predict.perturbation import GenerationConfig, TrainedPerturbation, observed_cells
from scjax.predict.timeseries import (
    TrainedTimeSeries,
    interaction_score_blocks,
    interaction_scores,
    project,
    simulate_cells,
    velocity,
)

__all__ = [
    "MODELS",
    "GenerationConfig",
    "SetGenerationConfig",
    "Trained",
    "TrainedCellSets",
    "TrainedPerturbation",
    "TrainedTimeSeries",
    "interaction_score_blocks",
    "interaction_scores",
    "load",
    "model_title",
    "observed_cells",
    "observing",
    "predict",
    "predicting",
    "project",
    "simulate_cells",
    "velocity",
]

Trained: TypeAlias = TrainedTimeSeries | TrainedPerturbation | TrainedCellSets


class ModelKind(NamedTuple):
    """What the rest of the library must know to tell one model from another.

    Attributes:
        title: its name in tables.
        module: of `scjax.models`.
        restore: a checkpoint to the Trained of its kind.
    """

    title: str
    module: ModuleType
    restore: Callable[[checkpoint.Checkpoint], Trained]


MODELS: dict[str, ModelKind] = {  # by the `kind` that a checkpoint is stored under
    "scimf": ModelKind("scIMF", scimf, TrainedTimeSeries.from_checkpoint),
    "scdfm": ModelKind("scDFM", scdfm, TrainedPerturbation.from_checkpoint),
    "perturbdiff": ModelKind("PerturbDiff", perturbdiff, TrainedCellSets.from_checkpoint),
}


def model_title(config: Any) -> str:
    """What tables call the model that this configuration is of."""
    return next(model.title for model in MODELS.values() if isinstance(config, model.module.Config))


def load(directory: str | Path, step: int | None = None) -> Trained:
    """The checkpoint of `step`, or the newest, of a run's folder or of its `checkpoints` folder.

    Raises:
        ValueError: no checkpoint there, or of something else; a damaged one (the newest earlier one that is whole is
            named); one whose document or arrays are not those of such a run.
    """
    directory = Path(directory)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    found = checkpoint.read(directory, step)
    with checkpoint.understanding(directory):
        kind = found.about.get("kind")
        if kind not in MODELS:
            raise ValueError(f"{directory} holds checkpoints of kind {kind!r}, not of a run of {', '.join(MODELS)}.")
        return MODELS[kind].restore(found)


def predict(trained: Trained, adata: AnnData, wanted: Iterable[Any], **options: Any) -> AnnData:
    """Times of a time series, conditions of perturbations.

    `options` and what comes back: see `timeseries.predict`, `perturbation.predict` and `cellsets.predict`.
    """
    return _module_of(trained).predict(trained, adata, wanted, **options)


def predicting(trained: Trained, adata: AnnData, wanted: Iterable[Any], **options: Any) -> Prediction:
    """`predict`, made some cells at a time: `.write(path)` to .h5ad or .zarr, `.in_memory()` as `predict` has it."""
    return _module_of(trained).predicting(trained, adata, wanted, **options)


def _module_of(trained: Trained) -> ModuleType:
    modules = {TrainedTimeSeries: timeseries, TrainedPerturbation: perturbation, TrainedCellSets: cellsets}
    return modules[type(trained)]
