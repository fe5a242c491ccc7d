"""Experiments on sets of cells: training from scratch, pretraining on several sources, finetuning from another run."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from scjax.check import at_least, column, listed, one_of, suggestion
from scjax.config import to_dict
from scjax.data.cellsets import CellSetData, Unmatched, part_of_cells, prepare_cell_sets
from scjax.data.collate import make_cell_set_batches
from scjax.data.conditions import OnUnknown, as_columns
from scjax.data.leaks import Findings, check_split
from scjax.data.preprocess import Preprocess, Transform, check_generates_expression
from scjax.data.sampling import CellSetSampling
from scjax.data.source import SOURCE, Absent, join
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import HoldOutContexts, PerturbationSplit, PerturbationSplitRule
from scjax.experiment.evidence import Evidence
from scjax.experiment.held_out import population_tables
from scjax.experiment.run import Task, check_loop, check_validation, data_digest
from scjax.metrics.perturbation_report import DEFAULT_METRICS, PerturbationTable
from scjax.models import perturbdiff
from scjax.predict import cellsets as work
from scjax.predict import load
from scjax.predict.cellsets import SetGenerationConfig, TrainedCellSets, check_generation
from scjax.predict.populations import brought_vectors
from scjax.processes.diffusion import set_noise
from scjax.train.loop import Validate
from scjax.train.optimizers import OptimizerConfig
from scjax.train.step import EmaStart
from scjax.types import Params

__all__ = ["CellSetExperiment", "Pretrained", "check", "digest", "prepare", "tables"]

Data: TypeAlias = AnnData | Sequence[tuple[str, AnnData]]  # one, or several with the names of their sources

_N_VALIDATION = 8  # batches of which a validation score is the mean
_FRESH = ("cell_type", "batch", "joined", "condition", "time", "inputs", "layers")


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The run that finetuning starts from: its predicting parameters, by `models.perturbdiff.transfer`.

    The perturbations and the head are new; layers, time, and the projections of cells and covariates are kept. What has
    a row for each name (cell types, batches, genes) keeps the rows of the names that both runs have, wherever they
    stand, and draws the others afresh. All of it is told at the start of training and stored with the checkpoints.

    Attributes:
        run: its folder.
        step: of the checkpoint; the newest unless given.
        new_genes: draw the projections of cells and controls afresh, for another list of genes. False keeps the rows of
            the genes that both lists have.
        space: the source of the pretrained run whose projection is kept, where it had several and this run has one
            ("pbmc"); the batches of that source count by their own names there ("Donor1", not "pbmc_Donor1").
        fresh: further parts to draw afresh: "cell_type", "batch", "joined" (the layer that joins covariates),
            "condition", "time", "inputs", "layers".
    """

    run: str
    step: int | None = None
    new_genes: bool = False
    space: str | None = None
    fresh: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.run:
            raise ValueError("pretrained.run must name the folder of a run; got ''.")
        for part in self.fresh:
            one_of("pretrained.fresh", part, _FRESH)


@dataclass(frozen=True, kw_only=True)
class CellSetExperiment:
    """Everything that decides a run on cell sets but the data themselves.

    Attributes:
        kind: tells in a settings file which experiment it is.
        model: sizes and loss; the sizes that the data decide (n_genes, n_perturbations, ...) are theirs unless given.
            n_spaces is 1, whatever the number of sources, or that number.
        spec: what the parts of the AnnData mean.
        split: the populations that training never sees, and those that are kept for validation.
        preprocess: fitted on the training cells; without scaling and PCA.
        absent: of several sources, what to do about genes that not all of them have, see `data.source.join`.
        unmatched: perturbed cells without a control of their own context, see `data.cellsets.prepare_cell_sets`.
        control_seed: divides the controls of held-out contexts between the parts; None lets all parts use all.
        sampling: how many sets and cells a step sees, and which.
        generation: how cells are generated when nothing else is asked for.
        optimizer: Adam and its schedule.
        n_steps: of training.
        scan_steps: steps in one compiled call.
        ema_decay: of the moving average of the parameters, which then is what predicts; None keeps none.
        ema_every: the average takes part in every so many steps.
        ema_start: what it starts from, see `train.loop.fit`.
        pretrained: the run whose parameters this one starts from; None starts from random ones.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of scan_steps; the last step always has one.
        validate_every: steps between two losses on the validation populations, a multiple of scan_steps; the parameters
            of the lowest one predict. None, for a split that keeps none.
        patience: training ends after so many validations without a lower loss; None never does.
        allow_leaks: rules of `data.leaks.check_split` whose errors do not stop the run.
        seed: of parameters, cells, noise. The same seed gives the same run.
    """

    kind: Literal["CellSetExperiment"] = "CellSetExperiment"
    model: perturbdiff.Config = perturbdiff.Config()
    spec: DataSpec
    split: PerturbationSplitRule
    preprocess: Preprocess = Preprocess(scale=False, n_components=None)
    absent: Absent = "error"
    unmatched: Unmatched = "fallback"
    control_seed: int | None = None
    sampling: CellSetSampling = CellSetSampling()
    generation: SetGenerationConfig = SetGenerationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    n_steps: int = 200_000
    scan_steps: int = 10
    ema_decay: float | None = None
    ema_every: int = 1
    ema_start: EmaStart = "initial"
    pretrained: Pretrained | None = None
    log_every: int = 10
    checkpoint_every: int = 5000
    validate_every: int | None = None
    patience: int | None = None
    allow_leaks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        check_loop(self)
        at_least("ema_every", self.ema_every, 1)
        one_of("ema_start", self.ema_start, get_args(EmaStart))
        if self.ema_decay is None and (self.ema_every > 1 or self.ema_start != "initial"):
            raise ValueError(
                f"ema_every={self.ema_every} and ema_start={self.ema_start!r} are of a moving average; there is none "
                "with ema_decay=None."
            )
        if self.control_seed is not None:
            at_least("control_seed", self.control_seed, 0)
        if self.spec.time is not None and self.spec.perturbation is None:
            raise ValueError(
                f"spec.time={self.spec.time!r} makes a time series; cell sets need spec.perturbation, spec.cell_type "
                "or spec.batch."
            )
        check_generates_expression(self.preprocess, self.spec.space, "PerturbDiff")
        self._check_model()
        check_generation(self.generation, self.model)
        check_validation(self)

    def _check_model(self) -> None:
        if self.spec.perturbation is None and self.model.perturbation != "none":
            raise ValueError(
                f"model.perturbation={self.model.perturbation!r} needs spec.perturbation, the obs column of what was "
                "done to the cells; without perturbations set model.perturbation='none'."
            )
        if self.spec.perturbation is None and self.sampling.controls == "matched":
            raise ValueError(
                "sampling.controls='matched', but without spec.perturbation there are no controls; set "
                "sampling.controls='zeros'."
            )
        for role in ("cell_type", "batch"):
            kind = getattr(self.model, role)
            if kind != "none" and getattr(self.spec, role) is None:
                raise ValueError(
                    f"model.{role}={kind!r} needs spec.{role}, the obs column; without one set model.{role}='none'."
                )
        for role, key in (("perturbation", "vectors"), ("cell_type", "cell_type_vectors")):
            if getattr(self.model, role) == "vector" and getattr(self.spec, key) is None:
                raise ValueError(f"model.{role}='vector' needs external vectors; name them in spec.{key}.")
        if self.model.n_doses is not None and self.spec.dose is None:
            raise ValueError(
                f"model.n_doses={self.model.n_doses} needs spec.dose, the obs column of doses; it is None."
            )
        if self.model.n_doses is not None and self.spec.vector_dose != "name":
            raise ValueError(
                f"model.n_doses={self.model.n_doses} has an entry for each trained dose, and spec.vector_dose="
                f"{self.spec.vector_dose!r} makes doses numbers, of which any may be asked for; set model.n_doses=None."
            )

    @property
    def cells_per_step(self) -> int:
        return self.sampling.n_sets * self.sampling.n_cells


def check(adata: Data, spec: DataSpec) -> None:
    """What can be said of each file alone; `prepare` checks them together."""
    for name, one in _files(adata):
        try:
            if name:
                for role in _ROLES:
                    for key in as_columns(getattr(spec, role)):
                        if key != SOURCE:
                            column(role, key, one.obs)
            else:
                spec.check(one, min_cells=1, every_context=False, every_role=True)
        except ValueError as err:
            if name:
                err.add_note(f"In {name!r}.")
            raise


def digest(adata: Data, spec: DataSpec) -> str:
    """Of one AnnData, or of several with their names, in their order."""
    if not isinstance(adata, Sequence):
        return data_digest(adata, spec, _labels(adata, spec))
    h = hashlib.blake2b(digest_size=16)
    for name, one in adata:
        h.update(f"{name}\0{data_digest(one, spec, _labels(one, spec))}\0".encode())
    return h.hexdigest()


def prepare(experiment: CellSetExperiment, adata: Data, store: Path | None = None) -> Task:
    data = prepare_cell_sets(
        adata,
        experiment.spec,
        experiment.split,
        experiment.preprocess,
        absent=experiment.absent,
        unmatched=experiment.unmatched,
        control_seed=experiment.control_seed,
        store=store,
    )
    config = _sized(experiment.model, data)
    start, transferred = None, {}
    if experiment.pretrained is not None:
        before = _pretrained(experiment.pretrained)
        config = _as_wide(config, experiment.pretrained, before.config)
        start, transferred = _transfer(experiment.pretrained, before, config, data)
    constants = perturbdiff.Constants(
        None if config.perturbation != "vector" else jnp.asarray(data.vectors),
        None if config.cell_type != "vector" else jnp.asarray(data.cell_type_vectors),
    )
    batch_at = make_cell_set_batches(data, experiment.sampling, experiment.seed)
    arrays, transform = data.transform.to_tree()
    return Task(
        model=perturbdiff.build(config, constants),
        data=data,
        split=data.split,
        batches=_without_space(batch_at) if config.n_spaces == 1 else batch_at,
        arrays={"transform": arrays, "constants": constants, "measured": data.measured},
        about={
            "kind": "perturbdiff",
            "model": to_dict(config),
            "transform": transform,
            "names": to_dict(data.names),
            "trained": _trained_names(data, experiment.sampling),
            "unmatched": data.unmatched,
            "pretrained": transferred,
        },
        findings=_findings(to_dict(experiment), adata, experiment.spec, data.split, data.transform),
        validate=_validation(experiment, data, config, constants),
        start=start,
        told=_shown(transferred) if transferred else "",
        average={"ema_every": experiment.ema_every, "ema_start": experiment.ema_start},
    )


def tables(
    trained: Mapping[str, Sequence[TrainedCellSets]],
    adata: Data,
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
    """As `experiment.perturbation.tables`, on the genes that all sources measured.

    Each population is predicted from control cells of its context, or from those that stand in for them.
    """
    first = next(iter(trained.values()))[0]
    genes = first.measured.all(axis=0)
    at_least("the number of genes that all sources measured", int(genes.sum()), 1)
    vectors: dict[str, Any] = {}
    for _, one in _files(adata):
        vectors |= brought_vectors(first.spec, one)
    findings = _findings(first.about["experiment"], adata, first.spec, first.split, first.transform)
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
        vectors=vectors or None,
        provenance={**provenance, "findings": findings.to_json_dict()},
        genes=genes,
        controls=_said_of_controls(first),
        keep=keep,
    )


def _findings(
    settings: Mapping[str, Any], adata: Data, spec: DataSpec, split: PerturbationSplit, transform: Transform
) -> Findings:
    """`settings`: of the experiment, as a checkpoint has them."""
    one = join(adata, spec, absent=settings["absent"]).adata if isinstance(adata, Sequence) else adata
    populations, population_of = spec.read_populations(one)
    part = part_of_cells(split, populations, population_of, spec, settings["control_seed"])
    return check_split(one, split, transform, spec=spec, part=part, allowed=settings.get("allow_leaks", ()))


def _said_of_controls(trained: TrainedCellSets) -> str:
    if isinstance(trained.split.rule, HoldOutContexts):
        return "which training did not see"
    if trained.about["experiment"]["control_seed"] is not None:
        return "of which training saw a part"
    return "which training saw"


_ROLES = ("perturbation", "dose", "cell_type", "batch", "covariates")


def _files(adata: Data) -> Sequence[tuple[str, AnnData]]:
    return adata if isinstance(adata, Sequence) else [("", adata)]


def _labels(adata: AnnData, spec: DataSpec) -> Iterator[bytes]:
    for role in _ROLES:
        for name in as_columns(getattr(spec, role)):
            if name == SOURCE and name not in adata.obs:  # a column that joining makes
                continue
            column(role, name, adata.obs)
            yield "\0".join(map(str, adata.obs[name])).encode()
    for key, read in ((spec.vectors, spec.read_vectors), (spec.cell_type_vectors, spec.read_cell_type_vectors)):
        for name, vector in sorted(read(adata).items()) if key in adata.uns else ():
            yield name.encode() + np.asarray(vector, np.float64).tobytes()


def _sized(config: perturbdiff.Config, data: CellSetData) -> perturbdiff.Config:
    """The model with the sizes that the data decide; larger tables than that may be asked for."""
    sizes, wanted = data.sizes, {"n_genes": True}
    for role, table, features in (
        ("perturbation", "n_perturbations", "n_perturbation_features"),
        ("cell_type", "n_cell_types", "n_cell_type_features"),
        ("batch", "n_batches", None),
    ):
        wanted |= {"table": {table: False}, "vector": {features: True}, "none": {}}[getattr(config, role)]
    if config.n_doses is not None:  # None is no covariate
        wanted["n_doses"] = False
    for name, exactly in wanted.items():
        given, needed = getattr(config, name), sizes[name]
        if needed is None:
            raise ValueError(f"model.{name}: the data have no such names; is the table of vectors empty?")
        if given is not None and (given < needed or (exactly and given != needed)):
            least = "" if exactly else " or more"
            raise ValueError(f"model.{name} must be the data's {needed}{least}, or None, which takes it; got {given}.")
    if config.n_spaces not in (1, sizes["n_spaces"]):
        raise ValueError(
            f"model.n_spaces must be 1, one input projection for all, or {sizes['n_spaces']}, one for each source of "
            f"the data; got {config.n_spaces}."
        )
    return replace(config, **{name: sizes[name] for name in wanted if getattr(config, name) is None})


def _without_space(batch_at: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, share=None: replace(batch_at(step, share), space=None)


def _trained_names(data: CellSetData, sampling: CellSetSampling) -> dict[str, list[Any]]:
    """The names (or doses) of each role that are in a set of training: the entries of a table that are learned."""
    rows = data.target_rows(include_control=sampling.include_control)
    return {role: [getattr(data.names, role)[i] for i in np.unique(ids[rows])] for role, ids in data.covariates.items()}


def _validation(
    experiment: CellSetExperiment, data: CellSetData, config: perturbdiff.Config, constants: perturbdiff.Constants
) -> Validate | None:
    """The loss on the same cells, times and noise each time, with everything shown that training shows at all."""
    if experiment.validate_every is None:
        return None
    sampling = replace(experiment.sampling, order="uniform")
    batch_at = make_cell_set_batches(data, sampling, experiment.seed, data.split.validation)
    batch_at = _without_space(batch_at) if config.n_spaces == 1 else batch_at
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batch_at, range(_N_VALIDATION)))
    n = sampling.n_sets
    # All batches together: times spread evenly over the schedule, in random order.
    times = ((np.arange(_N_VALIDATION * n) + 0.5) * config.n_times / (_N_VALIDATION * n)).astype(np.int32)
    times = np.random.default_rng(experiment.seed).permutation(times).reshape(_N_VALIDATION, n)
    keys = jax.random.split(jax.random.key(experiment.seed), _N_VALIDATION)
    coins = perturbdiff.Coins(
        jnp.full(n, config.condition_dropout == 1), jnp.full(n, config.control_dropout == 1), jnp.zeros(n, bool)
    )

    @jax.jit
    def scores(params: Any, batches: Any, times: Any, keys: Any) -> dict[str, Any]:
        def one(given: Any) -> dict[str, Any]:
            batch, t, key = given
            noise = set_noise(key, batch.cells.shape, config.shared_noise)
            loss, terms = perturbdiff.loss_at(params, batch, t, noise, coins, constants=constants, config=config)
            return {"loss": loss, **terms}

        return jax.tree.map(jnp.mean, jax.lax.map(one, (batches, times, keys)))

    def validate(params: Any) -> dict[str, Any]:
        found = scores(params, batches, times, keys)
        return {"loss": found.pop("loss"), **found}  # the first is what is minimised; jit sorts the names

    return validate


# ---------------------------------------------------------------- finetuning


class _Rows(NamedTuple):
    """How the names of a role were matched: places in the new list, and in the pretrained one, of those both have."""

    new: np.ndarray
    old: np.ndarray
    kept: list[str]
    fresh: list[str]
    left_behind: list[str]


def _pretrained(pretrained: Pretrained) -> TrainedCellSets:
    try:
        found = load(pretrained.run, pretrained.step)
    except (ValueError, OSError) as err:
        raise ValueError(f"pretrained.run={pretrained.run!r}: {err}") from err
    if not isinstance(found, TrainedCellSets):
        raise ValueError(
            f"pretrained.run={pretrained.run!r} must be a run of PerturbDiff; it is one of {found.about['kind']}."
        )
    return found


def _as_wide(config: perturbdiff.Config, pretrained: Pretrained, before: perturbdiff.Config) -> perturbdiff.Config:
    """covariate_width="genes" is the pretrained model's number of genes, where its layers of that width are kept."""
    if config.covariate_width == "genes" and not {"joined", "condition"} <= set(pretrained.fresh):
        return replace(config, covariate_width=before.width_of_covariates)
    return config


def _transfer(
    pretrained: Pretrained, before: TrainedCellSets, config: perturbdiff.Config, data: CellSetData
) -> tuple[Callable[[PRNGKeyArray], Params], dict[str, Any]]:
    """Parameters of the first step as a function of the key, and what became of everything, for the checkpoint."""
    if pretrained.space is not None:
        one_of("pretrained.space", pretrained.space, before.names.sources)
    matched = _matched(pretrained, before, config, data)
    number = None if pretrained.space is None else before.names.sources.index(pretrained.space)
    # `transfer` compares sizes: those of the parts that are matched by name are the new ones already.
    as_new = replace(before.config, n_spaces=config.n_spaces) if "source" in matched else before.config
    table: list[perturbdiff.Transferred] = []
    # A run of the same seed began with the draws of this key: what is fresh would repeat them, row for row.
    stream = int(before.about["run"][:7], 16)

    def placed(key: PRNGKeyArray, old: Params) -> Params:
        key = jax.random.fold_in(key, stream)
        aligned = _aligned(old, perturbdiff.init(key, config), matched)
        params, found = perturbdiff.transfer(
            key, aligned, as_new, config, new_genes=pretrained.new_genes, space=number, fresh=pretrained.fresh
        )
        table[:] = found
        return params

    jax.eval_shape(placed, jax.random.key(0), before.params)  # what does not fit is an error here; fills the table
    roles = {"embedding": ("cell_type", "batch"), "state": ("gene",), "previous": ("gene",), "control": ("gene",)}
    arrays = []
    for name, shape, action in table:
        *_, part, last = name.split(".")
        of = [r for r in roles.get(last, ()) if r in matched and (r == part or part == "inputs")]
        if of and action.startswith("kept"):
            rows = matched[of[0]]
            action = f"{action}: {len(rows.kept)} of {len(rows.kept) + len(rows.fresh)} rows, by name"
            action += f"; {len(rows.fresh)} fresh" if rows.fresh else ""
        arrays.append([name, list(shape), action])
    about = {
        "run": before.about["run"],
        "step": before.step,
        "covariate_width": config.width_of_covariates,
        "arrays": arrays,
        "rows": {
            role: {"kept": rows.kept, "fresh": rows.fresh, "left_behind": rows.left_behind}
            for role, rows in matched.items()
        },
    }
    return partial(jax.jit(placed), old=before.params), about


def _matched(
    pretrained: Pretrained, before: TrainedCellSets, config: perturbdiff.Config, data: CellSetData
) -> dict[str, _Rows]:
    """By role, for those parts of the parameters that are kept and have a row for each name."""
    matched, names = {}, data.names
    for role in ("cell_type", "batch"):
        if role not in pretrained.fresh and getattr(config, role) == getattr(before.config, role) == "table":
            prefix = ""
            if role == "batch" and pretrained.space is not None and len(before.names.sources) > 1:
                prefix = f"{pretrained.space}_"  # as `join` names the batches of several sources
            mend = f"name {role!r} in pretrained.fresh"
            matched[role] = _match(role, getattr(names, role), getattr(before.names, role), mend, prefix)
    if "inputs" not in pretrained.fresh and not pretrained.new_genes:
        mend = "set pretrained.new_genes=True"
        matched["gene"] = _match("gene", data.transform.feature_names, before.genes, mend)
    several = before.config.n_spaces > 1 and config.n_spaces > 1
    if several and "inputs" not in pretrained.fresh and not pretrained.new_genes:
        matched["source"] = _match("source", names.sources, before.names.sources, "name 'inputs' in pretrained.fresh")
    return matched


def _match(role: str, names: Sequence[str], old: Sequence[str], mend: str, prefix: str = "") -> _Rows:
    """`prefix`: what a name may have in front of it in the old list."""
    place = {name: i for i, name in enumerate(old)}
    there = {name: next((n for n in (name, prefix + name) if n in place), None) for name in names}
    both = [name for name in names if there[name] is not None]
    if not both:
        raise ValueError(
            f"pretrained.run: no {role} of these data ({listed(names)}) is one of the pretrained model's "
            f"({listed(old)}).{suggestion(names[0], old)} If that is right, {mend}: all are then drawn afresh."
        )
    return _Rows(
        new=np.array([i for i, name in enumerate(names) if there[name] is not None]),
        old=np.array([place[there[name]] for name in both]),  # pyright: ignore[reportArgumentType]
        kept=both,
        fresh=[name for name in names if there[name] is None],
        left_behind=[name for name in old if name not in set(there.values())],
    )


_ROWS = {  # where the rows of a role are: the path of an array, and its axis
    "cell_type": ((("covariates", "cell_type", "embedding"), 0),),
    "batch": ((("covariates", "batch", "embedding"), 0),),
    "gene": tuple((("inputs", name), 1) for name in ("state", "previous", "control")),
    "source": tuple((("inputs", name), 0) for name in ("state", "previous", "control", "bias", "control_bias")),
}


def _aligned(old: Params, fresh: Params, matched: Mapping[str, _Rows]) -> Params:
    """The pretrained parameters with the new model's rows: those of shared names, and fresh ones for the others."""
    old = jax.tree.map(lambda leaf: leaf, old)  # dicts of our own
    for role, rows in matched.items():
        for (*parents, last), axis in _ROWS[role]:
            node, new = old, fresh
            for parent in parents:
                node, new = node[parent], new[parent]
            target = list(node[last].shape)
            target[axis] = new[last].shape[axis]
            if any(a != b for i, (a, b) in enumerate(zip(target, new[last].shape, strict=True)) if i and i != axis):
                continue  # of another width: `transfer` says so
            kept = jnp.take(node[last], rows.old, axis=axis)
            start = jnp.broadcast_to(new[last][:1], target) if axis and target[0] != new[last].shape[0] else new[last]
            place = (slice(None),) * axis + (rows.new,)
            node[last] = start.at[place].set(kept)
    return old


def _shown(transferred: Mapping[str, Any]) -> str:
    lines = [f"parameters from run {transferred['run']}, step {transferred['step']}:"]
    width = max(len(name) for name, *_ in transferred["arrays"])
    sizes = ["x".join(map(str, shape)) for _, shape, _ in transferred["arrays"]]
    lines += [
        f"  {name:<{width}}  {size:>{max(map(len, sizes))}}  {action}"
        for (name, _, action), size in zip(transferred["arrays"], sizes, strict=True)
    ]
    for role, rows in transferred["rows"].items():
        told = [f"{len(some)} {what.replace('_', ' ')} ({listed(some)})" for what, some in rows.items() if some]
        lines.append(f"  rows of each {role.replace('_', ' ')}: {', '.join(told)}")
    return "\n".join(lines)
