"""A trained perturbation model at work: what control cells become under conditions, seen or not, without the truth."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from scjax import mesh as meshes
from scjax.check import at_least, finite, non_negative, one_of, suggestion
from scjax.checkpoint import Checkpoint
from scjax.config import from_dict
from scjax.data.conditions import OnUnknown, known_names, resolve_unknown, trained_names
from scjax.data.expression import ModelCells, transformed
from scjax.data.preprocess import Transform
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import PerturbationSplit
from scjax.data.vocabulary import Vocabulary
from scjax.models import scdfm
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
from scjax.processes.flow import Solver
from scjax.types import Params, Population

__all__ = [
    "Generated",
    "GenerationConfig",
    "Sources",
    "TrainedPerturbation",
    "generate",
    "observed_cells",
    "predict",
    "predicting",
    "read_sources",
]

Composition: TypeAlias = Literal["joint", "additive"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How cells are generated, where nothing else is asked for.

    Attributes:
        n_cells: of each condition and context. 128 in the scDFM code.
        solver: of the flow: "rk4_38" (the 3/8 rule of the scDFM code), "euler" (of its paper), "heun", "tsit5".
        n_steps: of the solver: 19 in the code (20 points), 100 in the paper; "tsit5" chooses its own.
        guidance: 1 is the condition itself; others need a model trained with condition_dropout.
        composition: of combinations: "joint", what the network says of all parts together, as in the reference;
            "additive", the control's velocity and what each part alone adds to it (`models.scdfm.parts_of`), which
            needs training with sampling.include_control and leaves out whatever the parts do to one another.
        zero_below: values below it become 0, in units of log-normalised expression; 0 leaves all as they are.
    """

    n_cells: int = 128
    solver: Solver = "rk4_38"
    n_steps: int = 19
    guidance: float = 1.0
    composition: Composition = "joint"
    zero_below: float = 0.0

    def __post_init__(self):
        one_of("composition", self.composition, get_args(Composition))
        at_least("n_cells", self.n_cells, 1)
        one_of("solver", self.solver, get_args(Solver))
        at_least("n_steps", self.n_steps, 1)
        non_negative("guidance", self.guidance)
        non_negative("zero_below", self.zero_below)


class TrainedPerturbation(NamedTuple):
    """A checkpoint of a perturbation run, ready for use.

    Attributes:
        params: those that predict: the best on validation data, the moving average, or the last.
        config: of the model, the sizes that the data decide filled in.
        constants: the gene graph, and external vectors where there are any.
        spec, transform: from an AnnData to log-normalised expression of the kept genes.
        vocabulary: ids of genes and perturbations.
        split: what training saw.
        n_slots: the most perturbations at once that the model knows.
        generation: the run's own defaults.
        about: the document stored with the checkpoint.
        step: of training.
    """

    params: Params
    config: scdfm.Config
    constants: scdfm.Constants
    spec: DataSpec
    transform: Transform
    vocabulary: Vocabulary
    split: PerturbationSplit
    n_slots: int
    generation: GenerationConfig
    about: dict[str, Any]
    step: int

    @classmethod
    def from_checkpoint(cls, found: Checkpoint) -> "TrainedPerturbation":
        about, settings, constants = found.about, found.about["experiment"], found.arrays["constants"]
        return cls(
            params=predicting_params(found.arrays["state"]),
            config=from_dict(scdfm.Config, about["model"]),
            constants=scdfm.Constants(**{name: jnp.asarray(value) for name, value in constants.items()}),
            spec=from_dict(DataSpec, settings["spec"]),
            transform=Transform.from_tree(found.arrays["transform"], about["transform"]),
            vocabulary=from_dict(Vocabulary, about["vocabulary"]),
            split=PerturbationSplit.from_dict(about["split"]),
            n_slots=about["n_slots"],
            generation=from_dict(GenerationConfig, settings["generation"]),
            about=about,
            step=found.step,
        )

    @property
    def genes(self) -> tuple[str, ...]:
        """The kept genes, in the order of `transform`."""
        return self.transform.feature_names


class Sources(NamedTuple):
    """Control cells of one context, in the model's space, with their names. Those on disk are read when asked for."""

    x: ModelCells
    names: np.ndarray


class Generated(NamedTuple):
    """Cells of one population, and the place of the control cell that each started as."""

    x: Float[np.ndarray, "n genes"]
    start: Int[np.ndarray, " n"]


def read_sources(
    trained: TrainedPerturbation, adata: AnnData, contexts: Sequence[str] | None = None
) -> dict[str, Sources]:
    """The control cells of `adata` by context, transformed as in training; no other cell is looked at.

    Raises:
        ValueError: no control cells, a context without any, missing genes, bad values.
    """
    rows = trained.spec.read_controls(adata)
    columns, control = trained.spec.perturbation, " or ".join(map(repr, trained.spec.control_names))
    if not rows:
        raise ValueError(
            f"adata must hold control cells, for predictions start from them; none has {control} in obs[{columns!r}]."
        )
    if contexts is not None:
        at_least("the number of contexts", len(contexts), 1)
    for context in rows if contexts is None else contexts:
        if context not in rows:
            raise ValueError(
                f"contexts must have control cells in adata; {context!r} has none."
                f"{suggestion(context, rows)} There are: {', '.join(map(repr, rows))}."
            )
    found = {}
    for context in rows if contexts is None else contexts:
        cells = adata[rows[context]]
        trained.spec.check(cells, min_cells=0)
        found[context] = Sources(transformed(cells, trained.spec, trained.transform), cells.obs_names.to_numpy())
    return found


def observed_cells(
    trained: TrainedPerturbation, adata: AnnData, populations: Iterable[Population]
) -> dict[Population, Float[np.ndarray, "_cells genes"]]:
    """All cells of these populations, controls or perturbed, in the model's space; for comparisons.

    Raises:
        ValueError: what `DataSpec.check` finds, a population without cells.
    """
    trained.spec.without_vectors().check(adata, min_cells=1)
    return cells_of(trained, adata, populations)


def generate(
    trained: TrainedPerturbation,
    sources: Mapping[str, Sources],
    populations: Sequence[Population],
    *,
    generation: GenerationConfig | None = None,
    genes: Sequence[str] | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    vectors: Mapping[str, Any] | None = None,
    chunk: int = 32,
    mesh: Mesh | None = None,
) -> tuple[dict[Population, Generated], dict[str, str]]:
    """Cells of each population from the control cells of its context, and what stood for names that are not known.

    What comes out for a population depends on the seed, its name and its controls, not on the others. One compiled
    program of `chunk` cells serves them all.

    Args:
        generation: the run's own unless given.
        genes: their names, any of the kept ones in any order; all of them unless given.
        on_unknown: see `data.conditions.resolve_unknown`.
        vectors: external vectors by name, besides those of training; as a table has them, see `DataSpec.vector_dose`.
        chunk: cells that are generated together: memory against speed; the noise of a cell depends on it.
        mesh: the devices that share each chunk, which must be a multiple of them (`scjax.mesh.make_mesh()` for all);
            the cells are those of one device but for rounding.

    Raises:
        ValueError: an unknown perturbation or gene, more perturbations at once than in training, the control where it
            was never a target.
    """
    generation = trained.generation if generation is None else generation
    genes = trained.genes if genes is None else tuple(genes)
    made, replaced = _generating(
        trained, sources, populations, generation, genes, seed, on_unknown, vectors, chunk, mesh
    )
    return dict(made()), replaced


def _generating(
    trained: TrainedPerturbation,
    sources: Mapping[str, Sources],
    populations: Sequence[Population],
    generation: GenerationConfig,
    genes: tuple[str, ...],
    seed: int,
    on_unknown: OnUnknown,
    vectors: Mapping[str, Any] | None,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[Callable[[], Iterator[tuple[Population, Generated]]], dict[str, str]]:
    """`generate`, one population after the other, once everything is known to be in order."""
    at_least("seed", seed, 0)
    at_least("chunk", chunk, 1)
    meshes.check_predicting(mesh, "chunk", chunk)
    at_least("the number of genes", len(genes), 1)
    repeated = next((name for name, n in Counter(genes).items() if n > 1), None)
    if repeated is not None:
        raise ValueError(f"genes must differ; {repeated!r} is repeated.")
    tokens = trained.vocabulary.gene_tokens(genes)
    place = {name: i for i, name in enumerate(trained.genes)}
    for name in genes:
        if name not in place:  # a token of a perturbed gene that the data did not measure
            raise ValueError(f"genes must be among the {len(place)} that training kept; {name!r} was not measured.")
    columns = np.array([place[name] for name in genes])

    if generation.composition == "additive" and not trained.about["experiment"]["sampling"]["include_control"]:
        raise ValueError(
            "composition='additive' adds to the velocity of the control, which this run never saw as a target "
            "(sampling.include_control=False). Use composition='joint'."
        )
    embedding, replaced = {}, {}
    for population in populations:
        told = [population.perturbation]
        if generation.composition == "additive":  # free slots and the last place are the control's
            singles = [(name,) for name in population.perturbation]
            told = [*singles, *[()] * (trained.n_slots + 1 - len(singles))]
        parts, stand_ins = zip(*(_embedding(trained, names, on_unknown, vectors or {}) for names in told), strict=True)
        embedding[population] = jnp.stack(parts)
        for some in stand_ins:
            replaced |= some
    params, constants, of_genes = meshes.everywhere((trained.params, trained.constants, jnp.asarray(tokens)), mesh)
    weights = (1.0,)
    if generation.composition == "additive":
        weights = (*([1.0] * trained.n_slots), 1.0 - trained.n_slots)
    starts_as_control = trained.config.start == "control"
    for population in populations if starts_as_control else ():
        n = len(sources[population.context].x)
        at_least(f"the number of control cells of context {population.context!r}", n, 2)

    def cells_of(population: Population) -> Generated:
        x, n = sources[population.context].x, generation.n_cells
        rng = np.random.default_rng([seed, number_of(population)])
        drawn = rng.permutation(len(x))[:n]  # each once; more than there are, again at random
        drawn = np.concatenate([drawn, rng.choice(len(x), n - len(drawn))])
        shown = (drawn + rng.integers(1, len(x), n)) % len(x) if starts_as_control else drawn
        key = jax.random.fold_in(jax.random.key(seed), number_of(population))
        condition = meshes.everywhere(embedding[population], mesh)
        parts = []
        for i, start in enumerate(range(0, n, chunk)):
            part = slice(start, start + chunk)
            # A short chunk repeats its cells, and drops them.
            begin, controls = (x[np.resize(rows[part], chunk)][:, columns] for rows in (drawn, shown))
            cells = _sample(
                params,
                *meshes.spread((controls, begin if starts_as_control else None), mesh),
                condition,
                of_genes,
                meshes.everywhere(jax.random.fold_in(key, i), mesh),
                constants,
                config=trained.config,
                solver=generation.solver,
                n_steps=generation.n_steps,
                guidance=generation.guidance,
                weights=weights,
            )
            parts.append(np.asarray(cells)[: n - start])
        made = np.concatenate(parts)
        if generation.solver == "tsit5" and not np.isfinite(made).all():
            raise ArithmeticError(
                f"solver='tsit5' did not arrive for {population}: the velocity needs steps smaller than it may take. "
                "Take solver='rk4_38' with more n_steps."
            )
        return Generated(np.where(made < generation.zero_below, 0, made), drawn)

    return lambda: ((population, cells_of(population)) for population in populations), replaced


def predict(
    trained: TrainedPerturbation,
    adata: AnnData,
    conditions: Iterable[str],
    *,
    contexts: Sequence[str] | None = None,
    n_cells: int | None = None,
    genes: Sequence[str] | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    solver: Solver | None = None,
    n_steps: int | None = None,
    guidance: float | None = None,
    composition: Composition | None = None,
    zero_below: float | None = None,
    chunk: int = 32,
    mesh: Mesh | None = None,
) -> AnnData:
    """Cells of each condition in each context, generated from the control cells of `adata` in that context.

    Args:
        adata: with control cells; others are not looked at.
        conditions: as the data of training write them: `B+A`, `ctrl+A` and `A` are understood; any combination of names
            that training saw, in as many slots.
        contexts: where; all that have control cells unless given.
        n_cells: of each condition and context; like solver, n_steps, guidance, composition and zero_below (see
            `GenerationConfig`) the run's own unless given.
        genes: any of the kept genes, in any order; all of them unless given. The model sees these and no others.
        seed: of noise and of the draw of controls. A condition's cells do not depend on which others are asked for.
        on_unknown: "mean" and "nearest" let others stand for a perturbation that training never saw, and say so in
            uns["scjax"]["replaced"]; "error" refuses.
        chunk: cells that are generated together: memory against speed; the noise of a cell depends on it.
        mesh: the devices that share each chunk, which must be a multiple of them (`scjax.mesh.make_mesh()` for all);
            the cells are those of one device but for rounding.

    Returns:
        One row a cell. X: log-normalised expression, not negative, float32[rows, genes]; obs: condition, context, the
        columns of the covariates (`record.covariate_columns`), the name of the control cell it started as, seed;
        uns["scjax"]: settings as JSON, run and step of the checkpoint, solver, what was replaced, what training never
        saw and vectors tell, versions.

    Raises:
        ValueError: no control cells, an unknown condition, context or gene, bad values among the controls.
    """
    options = {
        "contexts": contexts,
        "n_cells": n_cells,
        "genes": genes,
        "seed": seed,
        "on_unknown": on_unknown,
        "solver": solver,
        "n_steps": n_steps,
        "guidance": guidance,
        "composition": composition,
        "zero_below": zero_below,
        "chunk": chunk,
        "mesh": mesh,
    }
    return predicting(trained, adata, conditions, **options).in_memory()


def predicting(
    trained: TrainedPerturbation,
    adata: AnnData,
    conditions: Iterable[str],
    *,
    contexts: Sequence[str] | None = None,
    n_cells: int | None = None,
    genes: Sequence[str] | None = None,
    seed: int = 0,
    on_unknown: OnUnknown = "error",
    solver: Solver | None = None,
    n_steps: int | None = None,
    guidance: float | None = None,
    composition: Composition | None = None,
    zero_below: float | None = None,
    chunk: int = 32,
    mesh: Mesh | None = None,
) -> Prediction:
    """`predict`, one condition and context in memory at a time."""
    import pandas as pd

    given = {
        "n_cells": n_cells,
        "solver": solver,
        "n_steps": n_steps,
        "guidance": guidance,
        "composition": composition,
        "zero_below": zero_below,
    }
    generation = replace(trained.generation, **{name: value for name, value in given.items() if value is not None})
    asked = asked_conditions(trained.spec, conditions)
    sources = read_sources(trained, adata, contexts)
    populations = [Population(names, context) for names in asked for context in sources]
    genes = trained.genes if genes is None else tuple(genes)
    vectors = brought_vectors(trained.spec, adata)
    cells, replaced = _generating(
        trained, sources, populations, generation, genes, seed, on_unknown, vectors, chunk, mesh
    )

    def parts() -> Iterator[Part]:
        for population, (x, drawn) in cells():
            obs = pd.DataFrame(
                {
                    **covariate_columns(trained.spec.covariates, population.context),
                    "condition": population.condition,
                    "context": population.context,
                    "source_cell": sources[population.context].names[drawn],
                    "seed": seed,
                },
                index=[f"{i}-{population}" for i in range(len(x))],
            )
            yield Part(x, obs)

    unseen: dict[str, str] = {}
    if trained.config.perturbation == "vector":
        known = {*trained_names(trained.split.train), *replaced}
        unseen = unseen_parts(trained.spec, known, asked)
    told = record(
        trained,
        space="log-normalised expression in X",
        seed=seed,
        replaced=json.dumps(replaced),
        unseen=json.dumps(unseen),
        chunk=chunk,
        **{f.name: getattr(generation, f.name) for f in fields(generation)},
    )
    n_cells = len(populations) * generation.n_cells
    return Prediction(n_cells=n_cells, genes=genes, parts=parts, uns={"scjax": told}, categories=True)


@partial(jax.jit, static_argnames=("config", "solver", "n_steps", "guidance", "weights"))
def _sample(params, source, begin, embedding, genes, key, constants, *, config, solver, n_steps, guidance, weights):
    perturbation = jnp.broadcast_to(embedding[None], (len(source), *embedding.shape))
    return scdfm.sample(
        params,
        source,
        perturbation,
        genes,
        key,
        begin=begin,
        constants=constants,
        config=config,
        solver=solver,
        n_steps=n_steps,
        guidance=guidance,
        weights=weights,
    )


@partial(jax.jit, static_argnames="config")
def _of_ids(params, ids, constants, *, config):
    return scdfm.perturbation_embedding(params, ids, constants=constants, config=config)[0]


@partial(jax.jit, static_argnames="config")
def _of_vectors(params, vectors, *, config):
    return scdfm.embed_vectors(params, vectors, config=config).mean(axis=0)


def _embedding(
    trained: TrainedPerturbation, names: tuple[str, ...], on_unknown: OnUnknown, vectors: Mapping[str, Any]
) -> tuple[Any, dict[str, str]]:
    """float[d] of a perturbation, and what stood for which of its names."""
    kind, vocabulary = trained.config.perturbation, trained.vocabulary
    if not names and not trained.about["experiment"]["sampling"]["include_control"]:
        raise ValueError(
            "conditions: the control is no perturbation, and this run never saw it as a target "
            "(sampling.include_control=False). Leave it out."
        )
    known_vectors = {}
    if kind == "vector":
        stored = dict(zip(vocabulary.perturbations, np.asarray(trained.constants.vectors), strict=True))
        table = {**vectors, **trained.spec.table_of(stored)}
        known_vectors = {**trained.spec.vectors_of(names, table), **stored}
        if on_unknown == "error":
            check_vectors(trained.spec, names, known_vectors, vectors)
    resolved = resolve_unknown(
        names,
        known_names(trained.split.train, kind, genes=trained.genes, vectors=known_vectors),
        on_unknown,
        known_vectors or vectors,
        trained=trained_names(trained.split.train),
    )
    slots = resolved.names(trained.n_slots)
    if kind == "vector":
        width = trained.config.n_vector
        for name in slots:
            if np.shape(known_vectors[name]) != (width,):
                raise ValueError(
                    f"the vector of {name!r} must have the {width} features of training; "
                    f"got the shape {np.shape(known_vectors[name])}."
                )
        table = np.stack([known_vectors[name] for name in slots]).astype(np.float32)
        finite("the external vectors", table)
        return _of_vectors(trained.params, jnp.asarray(table), config=trained.config), resolved.replaced
    ids = vocabulary.encode([slots], kind, len(slots))
    return _of_ids(trained.params, jnp.asarray(ids), trained.constants, config=trained.config), resolved.replaced
