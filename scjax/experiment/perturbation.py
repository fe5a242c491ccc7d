"""Experiments on perturbations: populations of controls and perturbed cells, some of which training never sees."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from scjax.check import column
from scjax.config import to_dict
from scjax.data.collate import make_paired_batches
from scjax.data.conditions import OnUnknown, as_columns
from scjax.data.graph import GraphRule
from scjax.data.leaks import check_split
from scjax.data.perturbation import PerturbationData, prepare_perturbation
from scjax.data.preprocess import Preprocess, check_generates_expression
from scjax.data.sampling import PairedSampling
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import PerturbationSplitRule
from scjax.experiment.evidence import Evidence
from scjax.experiment.held_out import population_tables
from scjax.experiment.run import Task, check_loop, check_validation, data_digest
from scjax.metrics.perturbation_report import DEFAULT_METRICS, PerturbationTable
from scjax.models import scdfm
from scjax.predict import perturbation as work
from scjax.predict.perturbation import GenerationConfig, TrainedPerturbation
from scjax.train.loop import Validate
from scjax.train.optimizers import OptimizerConfig

__all__ = ["PerturbationExperiment", "check", "digest", "prepare", "tables"]

_N_VALIDATION = 8  # batches of which a validation score is the mean


@dataclass(frozen=True, kw_only=True)
class PerturbationExperiment:
    """Everything that decides a run on perturbations but the data themselves.

    Attributes:
        kind: tells in a settings file which experiment it is.
        model: sizes and loss; n_tokens, n_perturbations and n_vector are the data's unless given.
        spec: what the parts of the AnnData mean.
        split: the populations that training never sees, and the share of the others that is kept for validation.
        preprocess: fitted on the cells of the training populations; without scaling and PCA.
        graph: which genes a gene attends to, by co-expression in the cells of training.
        sampling: how many populations, cells and genes a step sees.
        generation: how cells are generated when nothing else is asked for.
        optimizer: Adam and its schedule.
        n_steps: of training.
        scan_steps: steps in one compiled call.
        ema_decay: of the moving average of the parameters, which then is what predicts; None keeps none.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of scan_steps; the last step always has one.
        validate_every: steps between two losses on the validation populations, a multiple of scan_steps; the parameters
            of the lowest one predict. None, for a split that keeps none.
        patience: training ends after so many validations without a lower loss; None never does.
        allow_leaks: rules of `data.leaks.check_split` whose errors do not stop the run.
        seed: of parameters, cells, genes, noise. The same seed gives the same run.
    """

    kind: Literal["PerturbationExperiment"] = "PerturbationExperiment"
    model: scdfm.Config = scdfm.Config()
    spec: DataSpec
    split: PerturbationSplitRule
    preprocess: Preprocess = Preprocess(scale=False, n_components=None)
    graph: GraphRule = GraphRule()
    sampling: PairedSampling = PairedSampling()
    generation: GenerationConfig = GenerationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    n_steps: int = 100_000
    scan_steps: int = 10
    ema_decay: float | None = None
    log_every: int = 10
    checkpoint_every: int = 5000
    validate_every: int | None = None
    patience: int | None = None
    allow_leaks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        check_loop(self)
        if self.spec.perturbation is None:
            raise ValueError("spec.perturbation must name the obs column of what was done to the cells; got None.")
        if self.spec.pooling != "mean":
            raise ValueError(
                f"spec.pooling={self.spec.pooling!r} is of cell sets; scDFM takes the mean of the parts' embeddings."
            )
        check_generates_expression(self.preprocess, self.spec.space, "scDFM")
        if self.generation.guidance != 1 and not self.model.condition_dropout:
            raise ValueError(
                f"generation.guidance={self.generation.guidance} needs model.condition_dropout above 0; it is 0."
            )
        check_validation(self)

    @property
    def cells_per_step(self) -> int:
        return self.sampling.n_populations * self.sampling.n_cells


def check(adata: AnnData, spec: DataSpec) -> None:
    spec.check(adata)


def digest(adata: AnnData, spec: DataSpec) -> str:
    return data_digest(adata, spec, _labels(adata, spec))


def prepare(experiment: PerturbationExperiment, adata: AnnData, store: Path | None = None) -> Task:
    data = prepare_perturbation(
        adata, experiment.spec, experiment.split, experiment.preprocess, experiment.graph, store=store
    )
    config = _sized(experiment.model, data)
    vectors = None if config.perturbation != "vector" else jnp.asarray(data.vectors)
    constants = scdfm.Constants(graph=jnp.asarray(data.graph), vectors=vectors)
    arrays, transform = data.transform.to_tree()
    return Task(
        model=scdfm.build(config, constants),
        data=data,
        split=data.split,
        batches=make_paired_batches(data, experiment.sampling, experiment.seed, config.perturbation),
        arrays={"transform": arrays, "constants": constants},
        about={
            "kind": "scdfm",
            "model": to_dict(config),
            "transform": transform,
            "vocabulary": to_dict(data.vocabulary),
            "n_slots": data.n_slots,
        },
        findings=check_split(adata, data.split, data.transform, spec=experiment.spec, allowed=experiment.allow_leaks),
        validate=_validation(experiment, data, config, constants),
    )


def tables(
    trained: Mapping[str, Sequence[TrainedPerturbation]],
    adata: AnnData,
    *,
    predicted: Mapping[str, Sequence[AnnData]] | None = None,
    metrics: Mapping[str, Any] = DEFAULT_METRICS,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    provenance: Mapping[str, Any],
    keep: list[Evidence] | None = None,
) -> list[PerturbationTable]:
    """One of all test populations, and where they are new in several ways, one of each way besides.

    Each population is predicted from the control cells of its context, as many cells as the run's own settings say.
    Controls are training data too, on both sides of every comparison. See `scjax.experiment.evaluate`.

    Args:
        predicted: rows whose cells are there already, an AnnData a seed as `predict.predict` gives it (see
            `predict.populations.predicted_cells` for what it must hold): the row of a model of `trained`, which then
            generates nothing, or one of any other method.
        metrics: by name, see `metrics.expression` and `metrics.perturbation_report`.
        n_cells: the most cells of a population in a draw of those metrics that need equal numbers.
        n_draws: such draws.
        seed: of the draws, and of the generated cells.
        on_unknown: what to do about perturbations that training never saw, see `predict.perturbation.predict`.
        keep: a list that gets the evidence of each table, for its figures.

    Raises:
        ValueError: nothing held out, runs that differ in their split or genes, predictions that lack a population or a
            gene, or that other runs made than those of their row.
    """
    first = next(iter(trained.values()))[0]
    spec = first.spec
    findings = check_split(
        adata,
        first.split,
        first.transform,
        spec=spec,
        allowed=first.about["experiment"].get("allow_leaks", ()),
    )
    return population_tables(
        trained,
        adata,
        work,
        predicted=predicted,
        metrics=metrics,
        n_cells=n_cells,
        n_draws=n_draws,
        seed=seed,
        on_unknown=on_unknown,
        vectors=spec.read_vectors(adata) or None,
        provenance={**provenance, "findings": findings.to_json_dict()},
        keep=keep,
    )


def _sized(config: scdfm.Config, data: PerturbationData) -> scdfm.Config:
    """The model with the sizes that the data decide; larger tables than that may be asked for."""
    if config.perturbation == "vector" and data.vectors is None:
        raise ValueError("model.perturbation='vector' needs external vectors; name them in spec.vectors.")
    sizes = {"n_tokens": data.vocabulary.n_tokens}
    if config.perturbation == "table":
        sizes["n_perturbations"] = data.vocabulary.n_perturbations
    if config.perturbation == "vector":
        sizes["n_vector"] = data.vectors.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    for name, needed in sizes.items():
        given = getattr(config, name)
        if given is not None and (given < needed or (name == "n_vector" and given != needed)):
            raise ValueError(f"model.{name} must be the data's {needed}, or None, which takes it; got {given}.")
    return replace(config, **{name: n for name, n in sizes.items() if getattr(config, name) is None})


def _validation(
    experiment: PerturbationExperiment, data: PerturbationData, config: scdfm.Config, constants: scdfm.Constants
) -> Validate | None:
    """The loss without dropout on the same cells, genes and noise each time."""
    if experiment.validate_every is None:
        return None
    batch_at = make_paired_batches(
        data, experiment.sampling, experiment.seed, config.perturbation, data.split.validation
    )
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batch_at, range(_N_VALIDATION)))
    keys = jax.random.split(jax.random.key(experiment.seed), _N_VALIDATION)
    model = scdfm.build(replace(config, dropout=0.0, condition_dropout=0.0), constants)

    @jax.jit
    def scores(params: Any, batches: Any, keys: Any) -> dict[str, Any]:
        def one(pair: Any) -> dict[str, Any]:
            loss, terms = model.loss(params, *pair)
            return {"loss": loss, **terms}

        return jax.tree.map(jnp.mean, jax.lax.map(one, (batches, keys)))

    def validate(params: Any) -> dict[str, Any]:
        found = scores(params, batches, keys)
        return {"loss": found.pop("loss"), **found}  # the first is what is minimised; jit sorts the names

    return validate


def _labels(adata: AnnData, spec: DataSpec) -> Iterator[bytes]:
    for role in ("perturbation", "dose", "covariates"):
        for name in as_columns(getattr(spec, role)):
            column(role, name, adata.obs)
            yield "\0".join(map(str, adata.obs[name])).encode()
    for name, vector in sorted(spec.read_vectors(adata).items()):
        yield name.encode() + np.asarray(vector, np.float64).tobytes()
