"""A trained model of cell sets at work: sets of cells of a population, drawn from noise beside control cells."""

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from scjax import mesh as meshes
from scjax.check import at_least, finite, non_negative, one_of, suggestion
from scjax.checkpoint import Checkpoint
from scjax.config import from_dict
from scjax.data.cellsets import CovariateNames, read_control_cells
from scjax.data.conditions import CONTROL, OnUnknown, resolve_unknown, trained_names
from scjax.data.disk import Subset, is_on_disk, stacked
from scjax.data.expression import ModelCells
from scjax.data.preprocess import Transform
from scjax.data.source import as_joined, join
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import PerturbationSplit
from scjax.models import perturbdiff
from scjax.predict.parts import Part, Prediction
from scjax.predict.populations import (
    asked_conditions,
    brought_vectors,
    cells_of,
    check_vectors,
    number_of,
    unseen_parts,
)
from scjax.predict.record import covariate_columns, predicting_params, record
from scjax.processes.diffusion import Spacing, Variance
from scjax.types import Params, Population

__all__ = [
    "Controls",
    "GeneratedSets",
    "Sampler",
    "SetGenerationConfig",
    "TrainedCellSets",
    "check_generation",
    "generate",
    "observed_cells",
    "predict",
    "predicting",
    "read_sources",
]

Sampler: TypeAlias = Literal["ddim", "ddpm"]
Data: TypeAlias = AnnData | Sequence[tuple[str, AnnData]]  # one file, or several with the names of their sources

_OF_SAMPLER = {"eta": "ddim", "variance": "ddpm", "noise_weight": "ddpm"}


@dataclass(frozen=True, kw_only=True)
class SetGenerationConfig:
    """How cells are generated, where nothing else is asked for.

    Attributes:
        n_cells: of each condition and context.
        set_size: the most cells of one set, which see each other; None takes sampling.n_cells, the sets of training. A
            population of more cells is made as several sets of nearly equal size.
        n_steps: of the sampler, at most model.n_times.
        sampler: "ddim", or "ddpm".
        spacing: "respaced" spreads the steps over all times; "truncated" starts from pure noise at time n_steps - 1, as
            the PerturbDiff code does, which is not what the network has seen at that time.
        guidance: 1 is the condition itself; others need a model trained with condition_dropout. 1 more than the
            strength w of the PerturbDiff code.
        eta: of "ddim": noise in each step, 0 none, 1 as much as "ddpm".
        variance, noise_weight: of "ddpm", see `processes.diffusion.ddpm_step`.
        zero_below: values below it become 0, in units of log-normalised expression; 0 leaves all as they are.
    """

    n_cells: int = 256
    set_size: int | None = None
    n_steps: int = 100
    sampler: Sampler = "ddim"
    spacing: Spacing = "respaced"
    guidance: float = 2.0
    eta: float = 0.0
    variance: Variance = "large"
    noise_weight: float = 0.5
    zero_below: float = 0.0

    def __post_init__(self):
        at_least("n_cells", self.n_cells, 1)
        if self.set_size is not None:
            at_least("set_size", self.set_size, 1)
        at_least("n_steps", self.n_steps, 1)
        one_of("sampler", self.sampler, get_args(Sampler))
        one_of("spacing", self.spacing, get_args(Spacing))
        one_of("variance", self.variance, get_args(Variance))
        for name in ("guidance", "eta", "noise_weight", "zero_below"):
            non_negative(name, getattr(self, name))
        if self.eta > 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta!r}.")
        for f in fields(self):
            owner = _OF_SAMPLER.get(f.name, self.sampler)
            if owner != self.sampler and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name} is of sampler={owner!r} and does nothing with {self.sampler!r}; leave it at "
                    f"{f.default}, got {getattr(self, f.name)}."
                )


class TrainedCellSets(NamedTuple):
    """A checkpoint of a run on cell sets, ready for use.

    Attributes:
        params: those that predict: the best on validation data, the moving average, or the last.
        config: of the model, the sizes that the data decide filled in.
        constants: external vectors, where there are any.
        spec, transform: from an AnnData to log-normalised expression of the kept genes.
        names: what the ids of the covariates mean, and the sources.
        measured: bool[sources, genes], which of the kept genes each source measured.
        split: what training saw.
        generation: the run's own defaults.
        about: the document stored with the checkpoint.
        step: of training.
    """

    params: Params
    config: perturbdiff.Config
    constants: perturbdiff.Constants
    spec: DataSpec
    transform: Transform
    names: CovariateNames
    measured: Bool[np.ndarray, "sources genes"]
    split: PerturbationSplit
    generation: SetGenerationConfig
    about: dict[str, Any]
    step: int

    @classmethod
    def from_checkpoint(cls, found: Checkpoint) -> "TrainedCellSets":
        about, settings = found.about, found.about["experiment"]
        constants = found.arrays.get("constants", {})  # nothing is stored of what is None
        return cls(
            params=predicting_params(found.arrays["state"]),
            config=from_dict(perturbdiff.Config, about["model"]),
            constants=perturbdiff.Constants(**{name: jnp.asarray(value) for name, value in constants.items()}),
            spec=from_dict(DataSpec, settings["spec"]),
            transform=Transform.from_tree(found.arrays["transform"], about["transform"]),
            names=from_dict(CovariateNames, about["names"]),
            measured=np.asarray(found.arrays["measured"]),
            split=PerturbationSplit.from_dict(about["split"]),
            generation=from_dict(SetGenerationConfig, settings["generation"]),
            about=about,
            step=found.step,
        )

    @property
    def genes(self) -> tuple[str, ...]:
        """The kept genes, in the order of `transform`."""
        return self.transform.feature_names

    @property
    def _sampling(self) -> dict[str, Any]:
        return self.about["experiment"]["sampling"]

    def _trained(self, role: str) -> list[Any]:
        """The names (or doses) of this role that were in a set of training."""
        return self.about["trained"][role]


class Controls(NamedTuple):
    """Control cells of one context, in the model's space.

    Attributes:
        x, names: of the cells; those on disk are read when they are asked for.
        covariates: int[cells] of the roles that the context does not tell; a generated cell has those of the control
            that it is given.
        kind: int[cells]; cells are drawn from each kind alike. One kind, but for stand-ins.
        source: the data's source that they are from.
        stands_in: where the context has no controls of its own, whose these are: "same batch" or "same cell type".
    """

    x: ModelCells
    names: np.ndarray
    covariates: dict[str, Int[np.ndarray, " cells"]]
    kind: Int[np.ndarray, " cells"]
    source: int = 0
    stands_in: str = ""


class GeneratedSets(NamedTuple):
    """Cells of one population, the place of the control cell that each was given, and the set that it was made in."""

    x: Float[np.ndarray, "n genes"]
    start: Int[np.ndarray, " n"]
    set: Int[np.ndarray, " n"]


def read_sources(
    trained: TrainedCellSets, adata: Data, contexts: Sequence[str] | None = None, *, source: str | None = None
) -> dict[str, Controls]:
    """The control cells of `adata` by context, transformed as in training; no other cell is looked at.

    A context that is asked for and has no control cells gets stand-ins as in training, where the run allows it
    (unmatched="fallback"), with a warning. A run without controls (sampling.controls="zeros") gets zeros, whatever is
    in `adata`.

    Args:
        adata: one, or several with the names of their sources; several of one name are files of one source.
        contexts: all that have control cells unless given.
        source: the name of the one that `adata` belongs to, where training joined several.

    Raises:
        ValueError: no control cells, a context without any or in several sources, missing genes, bad values, an unknown
            source, batch or cell type.
    """
    if trained._sampling["controls"] == "zeros":
        names = list(dict.fromkeys(name for name, _ in _named(trained, adata, source)))
        if len(names) > 1:
            raise ValueError(
                f"this run has no controls that would tell which of the sources {', '.join(map(repr, names))} a "
                "context is of; give the cells of one."
            )
        return _no_controls(trained, contexts, names[0])
    parts = _named(trained, adata, source)
    known = [_own_contexts(trained, name, part) for name, part in parts]
    everywhere = sorted({context for own in known for context in own})
    wanted = everywhere if contexts is None else list(dict.fromkeys(contexts))
    if contexts is not None:
        at_least("the number of contexts", len(wanted), 1)
    for context in wanted:
        sources = sorted({name for (name, _), own in zip(parts, known, strict=True) if context in own})
        if len(sources) > 1:
            raise ValueError(
                f"the context {context!r} has controls in {len(sources)} sources, {', '.join(sources)}; give one of "
                "them, or train with covariates that tell them apart (covariates may name 'source')."
            )
    of_part = [
        _read(trained, part, [context for context in wanted if context in own])
        for part, own in zip(parts, known, strict=True)
    ]
    here = {context: [read[context] for read in of_part if context in read] for context in wanted}
    lone = [context for context, some in here.items() if not some]
    found = {context: _joined(some) for context, some in here.items() if some}
    if lone or not found:
        found |= _stand_ins(trained, parts, known, lone, everywhere)
    return {context: found[context] for context in wanted}


def observed_cells(
    trained: TrainedCellSets, adata: Data, populations: Iterable[Population]
) -> dict[Population, Float[np.ndarray, "_cells genes"]]:
    """All cells of these populations, controls or perturbed, in the model's space; for comparisons.

    Raises:
        ValueError: what `DataSpec.check` and `join` find, a population without cells.
    """
    if isinstance(adata, Sequence):
        adata = join(adata, trained.spec, absent=trained.about["experiment"]["absent"]).adata
    trained.spec.without_vectors().check(adata, min_cells=1, every_context=False)
    return cells_of(trained, adata, populations)


def generate(
    trained: TrainedCellSets,
    sources: Mapping[str, Controls],
    populations: Sequence[Population],
    *,
    generation: SetGenerationConfig | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    vectors: Mapping[str, Any] | None = None,
    chunk: int = 8,
    mesh: Mesh | None = None,
) -> tuple[dict[Population, GeneratedSets], dict[str, str]]:
    """Cells of each population, and what stood for names that are not known.

    Where the sets of training were of one cell type and batch, so are these; what the context does not tell is as
    frequent among the sets as it is among the controls. What comes out for a population depends, but for rounding, on
    the seed, its name and its controls, and not on the others. One compiled program of `chunk` sets serves them all.

    Args:
        generation: the run's own unless given.
        on_unknown: what stands for a perturbation that training never saw, see `data.conditions.resolve_unknown`; also
            for a cell type or a batch that was in no set of training, where the model has a table of them.
        vectors: external vectors by name, besides those of training; as a table has them, see `DataSpec.vector_dose`.
        chunk: sets that are generated together: memory against speed.
        mesh: the devices that share each chunk, which must be a multiple of them (`scjax.mesh.make_mesh()` for all).

    Raises:
        ValueError: an unknown perturbation, dose, cell type or batch, the control where it was never a target, guidance
            without a model for it.
    """
    generation = trained.generation if generation is None else generation
    made, replaced = _generating(trained, sources, populations, generation, seed, on_unknown, vectors, chunk, mesh)
    return dict(made()), replaced


def _generating(
    trained: TrainedCellSets,
    sources: Mapping[str, Controls],
    populations: Sequence[Population],
    generation: SetGenerationConfig,
    seed: int,
    on_unknown: OnUnknown,
    vectors: Mapping[str, Any] | None,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[Callable[[], Iterator[tuple[Population, GeneratedSets]]], dict[str, str]]:
    """`generate`, one population after the other, once everything is known to be in order."""
    at_least("seed", seed, 0)
    at_least("chunk", chunk, 1)
    meshes.check_predicting(mesh, "chunk", chunk)
    check_generation(generation, trained.config)
    width = generation.set_size or trained._sampling["n_cells"]
    generation = replace(generation, set_size=width)
    speaker = _Covariates(trained, on_unknown, vectors or {})
    plans = [plan for p in populations for plan in _plan(p, sources[p.context], generation, trained, speaker, seed)]
    embedding = speaker.embedding(plans)
    params, constants = meshes.everywhere((trained.params, trained.constants), mesh)

    def sets() -> Iterator[tuple[_Set, np.ndarray]]:
        for start in range(0, len(plans), chunk):
            yield from _sets_of(start)

    def _sets_of(start: int) -> Iterator[tuple[_Set, np.ndarray]]:
        some = plans[start : start + chunk]
        here = [some[i % len(some)] for i in range(chunk)]  # a short chunk repeats its sets, and drops them
        rows = [start + i % len(some) for i in range(chunk)]
        controls = np.stack([sources[plan.population.context].x[plan.rows] for plan in here])
        source = np.array([sources[plan.population.context].source for plan in here], np.int32)
        of_sets = (
            controls,
            embedding[rows],
            np.stack([plan.mask for plan in here]),
            source if trained.config.n_spaces > 1 else None,
            None if trained.measured.all() else trained.measured[source],
            jnp.stack([plan.key for plan in here]),
        )
        cells = _sample(
            params,
            *meshes.spread(of_sets, mesh),
            constants,
            config=trained.config,
            generation=replace(generation, n_cells=1, zero_below=0.0),  # neither is of the program
        )
        yield from zip(some, np.asarray(cells), strict=False)

    def by_population() -> Iterator[tuple[Population, GeneratedSets]]:
        for population, of_it in itertools.groupby(sets(), lambda pair: pair[0].population):
            made = [(cells[plan.mask], plan) for plan, cells in of_it]
            yield population, _collected(made, generation.zero_below)

    return by_population, speaker.replaced


def predict(
    trained: TrainedCellSets,
    adata: Data,
    conditions: Iterable[str],
    *,
    contexts: Sequence[str] | None = None,
    source: str | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    chunk: int = 8,
    mesh: Mesh | None = None,
    **generation: Any,
) -> AnnData:
    """Cells of each condition in each context, generated in sets beside the control cells of `adata` in that context.

    Args:
        adata: with control cells; others are not looked at. One, or several with the names of their sources.
        conditions: as the data of training write them: `B+A`, `ctrl+A` and `A` are understood.
        contexts: where; all that have control cells unless given. One without gets stand-ins, see `read_sources`.
        source: the name of the one that `adata` belongs to, where training joined several.
        seed: of noise and of the draw of controls. A condition's cells do not depend on which others are asked for.
        on_unknown: "mean" and "nearest" let others stand for a perturbation (or cell type, or batch) that training
            never saw, and say so in uns["scjax"]["replaced"]; "error" refuses.
        chunk: sets that are generated together: memory against speed.
        mesh: the devices that share each chunk, which must be a multiple of them (`scjax.mesh.make_mesh()` for all).
        generation: fields of `SetGenerationConfig`, the run's own unless given: n_cells, set_size, n_steps, sampler,
            spacing, guidance, eta, ...; None is as not given.

    Returns:
        One row a cell. X: log-normalised expression, not negative, float32[rows, genes], the genes that the sources of
        these contexts measured; obs: condition, context, the columns of the covariates, cell type and batch
        (`record.covariate_columns`), the number of the set in its condition and context, the name of the control cell
        that it was given, seed; uns["scjax"]: settings as JSON, run and step of the checkpoint, sampler and spacing,
        what was replaced, stand-ins for controls, versions.

    Raises:
        ValueError: no control cells, an unknown condition or context, bad values among the controls, an option that
            `SetGenerationConfig` does not have.
    """
    options = {"contexts": contexts, "source": source, "seed": seed, "on_unknown": on_unknown}
    return predicting(trained, adata, conditions, **options, chunk=chunk, mesh=mesh, **generation).in_memory()


def predicting(
    trained: TrainedCellSets,
    adata: Data,
    conditions: Iterable[str],
    *,
    contexts: Sequence[str] | None = None,
    source: str | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    chunk: int = 8,
    mesh: Mesh | None = None,
    **generation: Any,
) -> Prediction:
    """`predict`, one condition and context in memory at a time."""
    known = [f.name for f in fields(SetGenerationConfig)]
    for name in generation:
        one_of("the name of an option", name, known)
    chosen = replace(trained.generation, **{name: value for name, value in generation.items() if value is not None})
    chosen = replace(chosen, set_size=chosen.set_size or trained._sampling["n_cells"])
    asked = asked_conditions(trained.spec, conditions)
    sources = read_sources(trained, adata, contexts, source=source)
    populations = [Population(names, context) for names in asked for context in sources]
    brought: dict[str, Any] = {}
    for part in [adata] if not isinstance(adata, Sequence) else [a for _, a in adata]:
        brought |= brought_vectors(trained.spec, part)
    cells, replaced = _generating(trained, sources, populations, chosen, seed, on_unknown, brought, chunk, mesh)
    genes = trained.measured[sorted({controls.source for controls in sources.values()})].all(axis=0)

    def parts() -> Iterator[Part]:
        for population, made in cells():
            yield Part(made.x[:, genes], _obs(trained, population, sources[population.context], made, seed))

    unseen: dict[str, str] = {}
    if trained.config.perturbation == "vector":
        known = trained_names(trained.split.train)
        unseen = unseen_parts(trained.spec, known, [names for names in asked if "+".join(names) not in replaced])
    told = record(
        trained,
        space="log-normalised expression in X",
        seed=seed,
        replaced=json.dumps(replaced),
        unseen=json.dumps(unseen),
        unmatched=json.dumps({context: c.stands_in for context, c in sources.items() if c.stands_in}),
        chunk=chunk,
        **{f.name: getattr(chosen, f.name) for f in fields(chosen)},
    )
    return Prediction(
        n_cells=len(populations) * chosen.n_cells,
        genes=tuple(name for name, kept in zip(trained.genes, genes, strict=True) if kept),
        parts=parts,
        uns={"scjax": told},
        categories=True,
    )


def check_generation(generation: SetGenerationConfig, config: perturbdiff.Config) -> None:
    """What of the settings needs a model of its kind."""
    if generation.guidance != 1 and not config.condition_dropout:
        raise ValueError(
            f"generation.guidance={generation.guidance} needs model.condition_dropout above 0; it is 0. Without it "
            "there is no prediction without the condition: use generation.guidance=1."
        )
    if generation.n_steps > config.n_times:
        raise ValueError(
            f"generation.n_steps must be at most model.n_times={config.n_times}; got {generation.n_steps}."
        )


# ---------------------------------------------------------------- control cells


def _named(trained: TrainedCellSets, adata: Data, source: str | None) -> list[tuple[str, AnnData]]:
    if isinstance(adata, Sequence):
        if source is not None:
            raise ValueError(
                f"source={source!r} is the name of one AnnData; these come with their names. Leave it out."
            )
        at_least("the number of AnnData", len(adata), 1)
        return list(adata)
    return [(_the_source(trained, source), adata)]


def _the_source(trained: TrainedCellSets, source: str | None) -> str:
    known = trained.names.sources
    if source is None:
        if len(known) > 1:
            raise ValueError(
                f"source must say which of the {len(known)} sources of training these cells belong to: "
                f"{', '.join(map(repr, known))}."
            )
        return known[0]  # pyright: ignore[reportGeneralTypeIssues]
    trained.names.id_of("sources", source)
    return source


def _own_contexts(trained: TrainedCellSets, name: str, adata: AnnData) -> tuple[str, ...]:
    trained.names.id_of("sources", name)
    if name:  # obs as it was joined, without the expression
        adata = as_joined(name, adata, trained.spec, (), prefix=len(trained.names.sources) > 1)
    return tuple(trained.spec.read_controls(adata))


def _read(trained: TrainedCellSets, part: tuple[str, AnnData], contexts: Sequence[str] | None) -> dict[str, Controls]:
    """The controls of these contexts of one file; None takes all, and there must be some."""
    name, adata = part
    if contexts is not None and not contexts:
        return {}
    source = trained.names.id_of("sources", name)
    read = read_control_cells(
        adata,
        trained.spec,
        trained.transform,
        trained.names,
        contexts,
        source=name,
        measured=trained.measured[source],
    )
    return {
        context: Controls(cells.x, cells.names, cells.covariates, np.zeros(len(cells.x), np.int64), source)
        for context, cells in read.items()
    }


def _joined(parts: Sequence[Controls]) -> Controls:
    first = parts[0]
    return first._replace(
        x=stacked([c.x for c in parts]),
        names=np.concatenate([c.names for c in parts]),
        covariates={role: np.concatenate([c.covariates[role] for c in parts]) for role in first.covariates},
        kind=np.concatenate([c.kind for c in parts]),
    )


def _stand_ins(
    trained: TrainedCellSets,
    parts: Sequence[tuple[str, AnnData]],
    known: Sequence[tuple[str, ...]],
    lone: Sequence[str],
    everywhere: Sequence[str],
) -> dict[str, Controls]:
    """Controls for contexts without any: other cell types of the batch, else the cell type in other batches."""
    if not everywhere or trained.about["experiment"]["unmatched"] == "error":
        for part in parts:  # says what is missing
            _read(trained, part, list(lone) or None)
    told = {context: trained.names.ids_of(Population((), context)) for context in lone}
    everyone = []
    for part, own in zip(parts, known, strict=True):
        for context, one in _read(trained, part, own).items():
            ids = trained.names.ids_of(Population((), context))
            of_context = {r: np.full(len(one.x), ids[r], np.int32) for r in ("cell_type", "batch") if r in ids}
            everyone.append(one._replace(covariates={**one.covariates, **of_context}))
    found = {}
    for context, ids in told.items():
        choices = []
        for same, other, word in (("batch", "cell_type", "same batch"), ("cell_type", "batch", "same cell type")):
            if same in ids and not choices:
                choices = [
                    (c, np.flatnonzero(c.covariates[same] == ids[same]), c.covariates.get(other), word)
                    for c in everyone
                    if same in c.covariates
                ]
                choices = [choice for choice in choices if len(choice[1])]
        if not choices or len({c.source for c, *_ in choices}) > 1:
            what = "none of the same batch or cell type" if not choices else "stand-ins in several sources"
            raise ValueError(
                f"contexts must have control cells in adata; {context!r} has none, and there are {what}."
                f"{suggestion(context, everywhere)} There are: {', '.join(map(repr, everywhere))}."
            )
        found[context] = Controls(
            x=stacked([Subset(c.x, rows) if is_on_disk(c.x) else c.x[rows] for c, rows, *_ in choices]),
            names=np.concatenate([c.names[rows] for c, rows, *_ in choices]),
            covariates={},
            kind=np.concatenate([np.zeros(len(rows), np.int64) if k is None else k[rows] for _, rows, k, _ in choices]),
            source=choices[0][0].source,
            stands_in=choices[0][3],
        )
    kinds = {"same batch": "other cell types of the same batch", "same cell type": "its cell type in other batches"}
    for context, controls in found.items():
        warnings.warn(
            f"the context {context!r} has no control cells; those of {kinds[controls.stands_in]} stand in.",
            UserWarning,
            stacklevel=3,
        )
    return found


def _no_controls(trained: TrainedCellSets, contexts: Sequence[str] | None, source: str) -> dict[str, Controls]:
    if contexts is not None:
        at_least("the number of contexts", len(contexts), 1)
    known = sorted({p.context for p in trained.split.populations})
    number = trained.names.id_of("sources", source)
    zeros = Controls(
        np.zeros((1, len(trained.genes)), np.float32), np.array([""], object), {}, np.zeros(1, np.int64), number
    )
    for context in contexts or ():
        trained.names.ids_of(Population((), context))
    return dict.fromkeys(known if contexts is None else contexts, zeros)


# ---------------------------------------------------------------- covariates


class _Set(NamedTuple):
    """A set to be generated: rows of controls, which of them are no filler, and its number in its population."""

    population: Population
    number: int
    rows: Int[np.ndarray, " cells"]
    mask: Bool[np.ndarray, " cells"]
    own: tuple[tuple[str, Any], ...]  # ids that the context does not tell, by role: one, or one a cell
    key: Any


class _Covariates:
    """Ids of populations, stand-ins for what training never saw, and the vectors that a network is given for both."""

    def __init__(self, trained: TrainedCellSets, on_unknown: OnUnknown, vectors: Mapping[str, Any]):
        one_of("on_unknown", on_unknown, get_args(OnUnknown))
        self.trained = trained
        self.on_unknown: OnUnknown = on_unknown
        self.roles = perturbdiff.roles(trained.config)
        self.replaced: dict[str, str] = {}
        self.conditions = list(trained.names.perturbation)
        self.brought = vectors
        self.known_table = dict(vectors)
        self.vectors: dict[str, Any] = {}
        self.table = None
        if trained.config.perturbation == "vector":
            self.table = list(np.asarray(trained.constants.perturbation_vectors))
            self.vectors = dict(zip(self.conditions, self.table, strict=True))
            self.known_table |= trained.spec.table_of(self.vectors)

    def admit(self, population: Population) -> None:
        """Refuses a condition that the model cannot be asked for; all of it is known afterwards."""
        trained = self.trained
        if population.is_control and not trained.spec.is_unperturbed and not trained._sampling["include_control"]:
            raise ValueError(
                "conditions: the control is no perturbation, and this run never saw it as a target "
                "(sampling.include_control=False). Leave it out."
            )
        if not population.is_control and "perturbation" not in self.roles:
            raise ValueError(
                f"conditions: {population.condition!r} is a perturbation, and this run was trained without "
                "(model.perturbation='none'). Ask for 'control', or finetune it."
            )
        for role in self.roles:
            if role in ("perturbation", "dose"):
                self._perturbed(population)
            else:
                ids = trained.names.ids_of(Population((), population.context))
                if role in ids:
                    self._of_role(role, ids[role])

    def _perturbed(self, population: Population) -> list[tuple[int, int]]:
        """Ids and ranks of doses of what is, or stands for, this perturbation."""
        trained, name = self.trained, population.condition
        if "perturbation" not in self.roles:
            return [(0, self._dose(population))]
        parts = population.perturbation
        if self.table is not None and parts and name not in self.vectors:
            self._find_vector(name, parts)
        seen = trained._trained("perturbation")
        known = seen if self.table is None else [*self.vectors, *seen]
        resolved = resolve_unknown(
            [name],
            known,
            self.on_unknown,
            self.vectors or self.brought,
            trained=[other for other in seen if other != CONTROL],
        )
        self.replaced |= resolved.replaced
        found = []
        for stand_in in resolved.parts[0]:
            names = () if stand_in == CONTROL else tuple(stand_in.split("+"))
            found.append((self._row(stand_in), self._dose(Population(names, ""))))
        return found

    def _find_vector(self, name: str, parts: tuple[str, ...]) -> None:
        """The condition's own vector, or those of its parts, pooled; none where on_unknown has something to say."""
        spec = self.trained.spec
        own = spec.vectors_of([name], self.known_table) if spec.vector_dose == "name" or len(parts) == 1 else {}
        of_parts = {
            **spec.vectors_of(parts, self.known_table),
            **{p: self.vectors[p] for p in parts if p in self.vectors},
        }
        if name in own:
            self.vectors[name] = own[name]
        elif all(part in of_parts for part in parts):
            of_parts = [of_parts[part] for part in parts]
            widths = {vector.shape for vector in of_parts}
            if len(widths) > 1:
                raise ValueError(f"the vectors of the parts of {name!r} must have one length; got {sorted(widths)}.")
            self.vectors[name] = spec.pooled(of_parts)
        elif self.on_unknown == "error":
            check_vectors(spec, parts, of_parts, self.brought)

    def _dose(self, population: Population) -> int:
        if "dose" not in self.roles:
            return 0
        rank, seen = self.trained.names.dose_rank(population), self.trained._trained("dose")
        dose = self.trained.names.dose[rank]
        if dose not in seen:
            raise ValueError(
                f"the dose {dose:g} was in no set of training, so the model's entry for it was never learned; there "
                f"were {', '.join(f'{known:g}' for known in seen)}."
            )
        return rank

    def _row(self, condition: str) -> int:
        if condition not in self.conditions:  # a new vector
            vector, width = np.asarray(self.vectors[condition]), self.trained.config.n_perturbation_features
            if vector.shape != (width,):
                raise ValueError(
                    f"the vector of {condition!r} must have the {width} features of training; got the shape "
                    f"{vector.shape}."
                )
            finite(f"the vector of {condition!r}", vector)
            self.conditions.append(condition)
            self.table.append(vector)  # pyright: ignore[reportOptionalMemberAccess]
        return self.conditions.index(condition)

    def _of_role(self, role: str, number: int) -> list[int]:
        """A cell type or a batch, or what stands for one of which no set of training was."""
        trained, names = self.trained, getattr(self.trained.names, role)
        if getattr(trained.config, role) == "vector" or names[number] in trained._trained(role):
            return [number]
        name, seen = names[number], trained._trained(role)
        if self.on_unknown != "mean":
            raise ValueError(
                f"{role} {name!r} was in no set of training, so the model's entry for it was never learned. "
                f"on_unknown='mean' lets the mean of all others stand for it; or train with "
                f"sampling.include_control=True, which shows its controls, or with model.{role}='none'."
            )
        self.replaced[name] = f"mean of {len(seen)} trained values of {role}"
        return [names.index(other) for other in seen]

    def embedding(self, plans: Sequence[_Set]) -> Float[np.ndarray, "sets rows width"]:
        """Of each set: one row, or, where a covariate changes within some set, one a cell."""
        per_cell = any(np.ndim(ids) for plan in plans for _, ids in plan.own)
        rows: dict[tuple[Any, ...], int] = {}
        of_set = []
        for plan in plans:
            told = self.trained.names.ids_of(Population((), plan.population.context))
            perturbed = tuple(self._perturbed(plan.population))
            n = len(plan.rows) if per_cell else 1
            own = {role: np.broadcast_to(ids, n) for role, ids in plan.own}
            of_cell = []
            for i in range(n):
                ids = {role: int(own[role][i]) if role in own else told[role] for role in _DRAWN if role in self.roles}
                of_cell.append(rows.setdefault((perturbed, *ids.items()), len(rows)))
            of_set.append(of_cell)
        return self._embed(list(rows))[np.array(of_set)]

    def _embed(self, rows: list[tuple[Any, ...]]) -> np.ndarray:
        """Where something has stand-ins, their mean: the vector is linear in each of its parts."""
        entries: list[dict[str, int]] = []
        weights: list[tuple[int, int, float]] = []
        for i, (perturbed, *own) in enumerate(rows):
            choices: list[list[dict[str, int]]] = [[{"perturbation": p, "dose": d} for p, d in perturbed]]
            choices += [[{role: j} for j in self._of_role(role, number)] for role, number in own]
            first = {role: j for some in choices for role, j in some[0].items()}
            weights.append((i, len(entries), 1.0))
            base = len(entries)
            entries.append(first)
            for some in choices:
                for other in some if len(some) > 1 else ():
                    weights += [(i, len(entries), 1 / len(some)), (i, base, -1 / len(some))]
                    entries.append({**first, **other})
        ids = {role: jnp.asarray([entry[role] for entry in entries], jnp.int32) for role in self.roles}
        constants = self.trained.constants
        if self.table is not None:
            constants = constants._replace(perturbation_vectors=jnp.asarray(np.stack(self.table), jnp.float32))
        made = np.asarray(_embedding(self.trained.params, ids, constants, config=self.trained.config))[:, 0]
        made = np.broadcast_to(made, (len(entries), made.shape[1]))
        out = np.zeros((len(rows), made.shape[1]))
        for i, j, weight in weights:
            out[i] += weight * made[j]
        return out.astype(np.float32)


_DRAWN = ("cell_type", "batch")  # roles that a context may leave to the control cells


# ---------------------------------------------------------------- sets


def _plan(
    population: Population,
    controls: Controls,
    generation: SetGenerationConfig,
    trained: TrainedCellSets,
    covariates: _Covariates,
    seed: int,
) -> list[_Set]:
    """The sets of a population. Those of training tell which covariates are one within a set."""
    covariates.admit(population)
    drawn = {role: ids for role, ids in controls.covariates.items() if role in covariates.roles}
    told = trained.names.ids_of(Population((), population.context))
    for role in _DRAWN:
        if role in covariates.roles and role not in told and role not in drawn:
            raise ValueError(
                f"the context {population.context!r} must tell the {role}, which the model was trained with: there "
                f"are no control cells that do. Train with it among the covariates."
            )
    group_by = trained._sampling["group_by"]
    apart = [role for role in drawn if group_by is None or role in group_by]
    rng = np.random.default_rng([seed, number_of(population)])
    key = jax.random.fold_in(jax.random.key(seed), number_of(population))
    keys = np.stack([np.zeros(len(controls.x), np.int64), *(drawn[role] for role in apart)])
    found, group_of = np.unique(keys, axis=1, return_inverse=True)
    group_of = group_of.reshape(-1)  # NumPy 2.0 alone gives it another axis
    plans: list[_Set] = []
    for group, n in enumerate(_shares(np.bincount(group_of), generation.n_cells).tolist()):
        rows = np.flatnonzero(group_of == group)
        chosen = _draw(rng, rows, controls.kind[rows], n)
        for part in np.array_split(chosen, -(-n // generation.set_size)) if n else ():
            filled = np.resize(part, generation.set_size)  # pyright: ignore[reportArgumentType, reportCallIssue]
            own = {role: drawn[role][filled] for role in drawn}
            own |= {role: ids for role, ids in zip(apart, found[1:, group], strict=True)}
            mask = np.arange(generation.set_size) < len(part)  # pyright: ignore[reportArgumentType, reportCallIssue]
            plans.append(
                _Set(population, len(plans), filled, mask, tuple(own.items()), jax.random.fold_in(key, len(plans)))
            )
    return plans


def _shares(sizes: Int[np.ndarray, " groups"], n: int) -> Int[np.ndarray, " groups"]:
    """So many cells in proportion to the sizes, the remainders to the largest fractions."""
    exact = n * sizes / sizes.sum()
    whole = np.floor(exact).astype(np.int64)
    last = np.argsort(whole - exact, kind="stable")[: n - whole.sum()]
    whole[last] += 1
    return whole


def _draw(rng: np.random.Generator, rows: np.ndarray, kind: np.ndarray, n: int) -> Int[np.ndarray, " n"]:
    """Each once, and then again at random; of several kinds each as likely, with replacement, as in training."""
    kinds = np.unique(kind)
    if len(kinds) > 1:
        which = rng.integers(len(kinds), size=n)
        return np.array([rng.choice(rows[kind == kinds[i]]) for i in which], np.int64)
    once = rng.permutation(rows)[:n]
    return np.concatenate([once, rng.choice(rows, n - len(once))])


def _collected(sets: Sequence[tuple[np.ndarray, _Set]], zero_below: float) -> GeneratedSets:
    x = np.concatenate([made for made, _ in sets])
    return GeneratedSets(
        np.where(x < zero_below, 0, x),
        np.concatenate([plan.rows[plan.mask] for _, plan in sets]),
        np.concatenate([np.full(int(plan.mask.sum()), plan.number) for _, plan in sets]),
    )


def _obs(trained: TrainedCellSets, population: Population, controls: Controls, made: GeneratedSets, seed: int) -> Any:
    import pandas as pd

    names = trained.names
    drawn: dict[Any, Any] = {
        column: [getattr(names, role)[i] for i in controls.covariates[role][made.start]]
        for role, column in (("cell_type", names.cell_type_column), ("batch", names.batch_column))
        if role in controls.covariates
    }
    several = {"source": names.sources[controls.source]} if len(names.sources) > 1 else {}
    return pd.DataFrame(
        {
            **several,
            **covariate_columns(names.covariates, population.context, **drawn),
            "condition": population.condition,
            "context": population.context,
            "set": made.set,
            "source_cell": controls.names[made.start],
            "seed": seed,
        },
        index=[f"{i}-{population}" for i in range(len(made.x))],
    )


@partial(jax.jit, static_argnames=("config", "generation"))
def _sample(params, control, embedding, mask, space, measured, keys, constants, *, config, generation):
    """Each set by a key of its own, so that the sets beside it do not matter."""

    def of_set(control, embedding, mask, space, measured, key):
        one = jax.tree.map(lambda a: a[None], (control, embedding, mask, space, measured))
        control, embedding, mask, space, measured = one
        return perturbdiff.sample(
            params,
            control,
            embedding,
            key,
            constants=constants,
            config=config,
            n_steps=generation.n_steps,
            sampler=generation.sampler,
            spacing=generation.spacing,
            guidance=generation.guidance,
            eta=generation.eta,
            variance=generation.variance,
            noise_weight=generation.noise_weight,
            mask=mask,
            space=space,
            measured=measured,
        )[0]

    return jax.vmap(of_set)(control, embedding, mask, space, measured, keys)


@partial(jax.jit, static_argnames="config")
def _embedding(params, ids, constants, *, config):
    return perturbdiff.covariate_embedding(params, ids, constants=constants, config=config)
