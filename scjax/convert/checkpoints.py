"""Checkpoints of converted weights: written with all that is known of them, and opened again, as those of runs are.

A converted PerturbDiff model is stored as a run of its kind, so that finetuning starts from it (`pretrained.run`), and,
where genes, names and the columns of the data are told, `scjax predict` takes it. The other two lack what no state dict
has, and are opened by `load` for the functions of `scjax.models`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scjax import checkpoint
from scjax.check import at_least
from scjax.config import from_dict, to_dict
from scjax.convert.systems import SYSTEMS, Weights
from scjax.models import perturbdiff
from scjax.whole import made_whole

__all__ = ["Loaded", "digest", "load", "save", "told"]

WhichParams: TypeAlias = Literal["last", "ema", "best"]

_SPECIAL = ("<pad>", "<cls>", "<mask>", "control")  # the first tokens of scDFM
_ROLES = ("perturbation", "cell_type", "batch")
_LACKS = {  # what predicting from cells needs, and a state dict has not
    "scimf": "the transform into the latent space, the times and the columns of its data",
    "scdfm": "the gene graph, the transform and the columns of its data",
}
_INSTEAD = {
    "scimf": "scjax.models.scimf.simulate on cells in the latent space that it was trained in",
    "scdfm": "scjax.models.scdfm.sample, with a graph of the training cells by scjax.data.graph",
}


class Loaded(NamedTuple):
    """Weights with the document stored beside them.

    Attributes:
        weights: for the functions of `scjax.models`, and for `to_torch`.
        genes: names of the genes, in the order of the model; () where nobody told them.
        names: by role ("tokens", "perturbations"; "perturbation", "cell_type", "batch"), names in the order of ids.
        about: the document.
        step: of training; 0 of converted weights.
    """

    weights: Weights
    genes: tuple[str, ...]
    names: dict[str, tuple[str, ...]]
    about: dict[str, Any]
    step: int


def save(
    folder: str | Path,
    weights: Weights,
    *,
    source: str,
    sha256: str,
    genes: Sequence[str] = (),
    vocabulary: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> None:
    """A new folder with one checkpoint, whole or not there.

    Args:
        source, sha256: name of the file that the weights are from, and `digest` of its bytes.
        genes: PerturbDiff: the names of its genes, in its order. scDFM's are in its vocabulary.
        vocabulary: what ids mean, as lists in their order or as objects of name to id. scDFM: the file of its program,
            {"<pad>": 0, ...}; with a table of perturbations {"tokens": ..., "perturbations": ...}. PerturbDiff: of
            "perturbation", "cell_type" and "batch" those that are known, as its dictionaries have them (the first row
            of its table, "no perturbation", is not of them), and under "dose" the doses.
        spec: PerturbDiff: a `scjax.data.spec.DataSpec` as JSON, of the data to predict from.

    Raises:
        ValueError: the folder exists; names that repeat, or are not as many as the model has ids.
        FileExistsError: something has come there meanwhile.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"out {folder} exists already and is not overwritten; choose another name.")
    system, config = weights.system, weights.config
    kind, more, arrays = _KINDS[system](weights, tuple(genes), vocabulary, spec)
    about = {
        "run": hashlib.blake2b(f"{sha256} {to_dict(config)} {more}".encode(), digest_size=8).hexdigest(),
        "kind": kind,
        "model": to_dict(config),
        **more,
        "converted": {
            "system": system,
            "source": source,
            "sha256": sha256,
            "spaces": list(weights.spaces),
            "assumed": weights.assumed,
            "genes": list(genes),
            "from_state_dict": weights.originals is not None,
        },
        "provenance": checkpoint.provenance(),
    }
    constants = {} if weights.constants is None else weights.constants._asdict()
    arrays |= {
        "state": {"params": weights.params},
        "constants": {name: table for name, table in constants.items() if table is not None},
        "originals": weights.originals or {},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with made_whole(folder) as beside, checkpoint.CheckpointWriter(beside, about=about) as writer:
        writer.save(0, arrays)


def load(folder: str | Path, step: int | None = None, *, weights: WhichParams | None = None) -> Loaded:
    """The weights in a checkpoint: a converted one, or one of a training run.

    Args:
        folder: of the checkpoint or the run.
        step: the newest unless given.
        weights: of a run that keeps several: its "last" parameters, their moving average "ema", or the "best" on
            validation data.

    Raises:
        ValueError: no checkpoint there, a damaged one, one of something else; `weights` are none that it has, or
            are missing where it has several.
    """
    folder = Path(folder)
    directory = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    with checkpoint.understanding(directory):
        return _understood(checkpoint.read(directory, step), folder, weights)


def told(folder: str | Path) -> str:
    """What a converted checkpoint holds, in lines.

    Raises:
        ValueError: as for `load`; the weights were trained here.
    """
    loaded = load(folder)
    if "converted" not in loaded.about:
        raise ValueError(f"{folder} holds weights that were trained, not converted; `scjax show` tells of them.")
    weights, about = loaded.weights, loaded.about["converted"]
    system = SYSTEMS[weights.system]
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    assumed = ", ".join(f"{name}={value}" for name, value in weights.assumed.items())
    names = ", ".join(f"{len(some)} of {role}" for role, some in loaded.names.items())
    return "\n".join(
        [
            f"{folder}: {system.title}, converted, run {loaded.about['run']}, {count} parameters",
            f"  from {about['source']}, sha256 {about['sha256']}",
            f"  genes: {len(loaded.genes) or 'not told'}; names: {names or 'not told'}",
            *([f"  taken from the published settings, as tensors do not tell them: {assumed}"] if assumed else []),
            *(["  if the weights were trained with others, convert again: --set NAME=VALUE"] if assumed else []),
            *_uses(loaded),
        ]
    )


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _understood(found: checkpoint.Checkpoint, folder: Path, weights: WhichParams | None) -> Loaded:
    about, state = found.about, found.arrays.get("state", {})
    converted = about.get("converted", {})
    system = converted.get("system", about.get("kind"))
    if system not in SYSTEMS:
        raise ValueError(f"{folder} holds checkpoints of kind {system!r}, not of {', '.join(SYSTEMS)}.")
    best: Any = state.get("best")
    if best is not None and not np.isfinite(best["score"]):
        best = {"params": None}  # not validated yet: it is where training began
    choices = {"last": state.get("params"), "ema": state.get("ema"), "best": best and best["params"]}
    choices = {name: params for name, params in choices.items() if params is not None}
    if not choices:
        raise ValueError(f"{folder} holds a checkpoint of {SYSTEMS[system].title} without parameters.")
    if weights is None and len(choices) > 1:
        raise ValueError(f"weights must say which of {', '.join(choices)} are meant: {folder} keeps all of them.")
    chosen = next(iter(choices)) if weights is None else weights
    if chosen not in choices:
        raise ValueError(f"weights must be one of {', '.join(choices)}, which {folder} has; got {chosen!r}.")
    config = from_dict(
        SYSTEMS[system].model.Config, about["model"] if "model" in about else about["experiment"]["model"]
    )
    constants, spaces = None, tuple(converted.get("spaces", ()))
    names = about.get("vocabulary" if system == "scdfm" else "names", {})
    if system == "perturbdiff":
        tables = found.arrays.get("constants", {})
        constants = perturbdiff.Constants(**{name: jnp.asarray(table) for name, table in tables.items()})
        if not converted and config.n_spaces > 1:
            spaces = tuple(names["sources"])
    genes = converted["genes"] if converted else about["transform"]["feature_names"]
    return Loaded(
        weights=Weights(
            system=system,
            config=config,
            params=jax.tree.map(jnp.asarray, choices[chosen]),
            constants=constants,
            spaces=spaces,
            originals=found.arrays.get("originals", {}) if converted.get("from_state_dict") else None,
            assumed=converted.get("assumed", {}),
        ),
        genes=tuple(genes),
        names={role: tuple(names[role]) for role in ("tokens", "perturbations", *_ROLES) if names.get(role)},
        about=about,
        step=found.step,
    )


def _uses(loaded: Loaded) -> list[str]:
    """What it is good for, and what not."""
    if loaded.weights.system == "perturbdiff":
        column = loaded.about["experiment"]["spec"]["perturbation"]
        cannot = f"  no predictions from cells ({column})" if column.startswith(_UNTOLD) else "  scjax predict: yes"
        return ["  finetuning starts from it: --pretrained.run FOLDER", cannot]
    return [
        f"  no predictions from cells, which need {_LACKS[loaded.weights.system]}",
        f"  what works: {_INSTEAD[loaded.weights.system]}",
    ]


# ---------------------------------------------------------------- the documents of each kind

_UNTOLD = "unknown: "


def _of_scimf(
    weights: Weights, genes: tuple[str, ...], vocabulary: Mapping[str, Any] | None, spec: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    if genes or vocabulary or spec:
        raise ValueError("genes, vocabulary and spec are not of scIMF, whose cells are points of a latent space.")
    return _without("scimf"), {}, {}


def _of_scdfm(
    weights: Weights, genes: tuple[str, ...], vocabulary: Mapping[str, Any] | None, spec: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    if spec:
        raise ValueError("spec is not of scDFM: without its gene graph no cells can be predicted from data.")
    if vocabulary is None:
        if genes:
            raise ValueError("genes of scDFM have tokens: give the vocabulary, too.")
        return _without("scdfm"), {}, {}
    parts = dict(vocabulary) if {"tokens"} <= set(vocabulary) <= {"tokens", "perturbations"} else {"tokens": vocabulary}
    tokens = _names("vocabulary", parts["tokens"])
    if tokens[: len(_SPECIAL)] != _SPECIAL:
        raise ValueError(f"vocabulary must begin with {', '.join(_SPECIAL)}; got {', '.join(tokens[:4])}.")
    _check_number("vocabulary", tokens, weights.config.n_tokens, at_most=True)
    if unknown := [gene for gene in genes if gene not in tokens[len(_SPECIAL) :]]:
        raise ValueError(f"genes: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''} have no token.")
    perturbations = _names("perturbations", parts.get("perturbations", ("control",)))
    if weights.config.perturbation == "table":
        _check_number("perturbations", perturbations, weights.config.n_perturbations, at_most=True)
    if "control" not in perturbations:
        raise ValueError(f"perturbations must have 'control'; got {', '.join(perturbations[:5])}.")
    return _without("scdfm"), {"vocabulary": {"tokens": list(tokens), "perturbations": list(perturbations)}}, {}


def _of_perturbdiff(
    weights: Weights, genes: tuple[str, ...], vocabulary: Mapping[str, Any] | None, spec: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The document of a run, whose split is empty: nobody told what training saw."""
    config, constants = weights.config, weights.constants or perturbdiff.Constants()
    if genes:
        _check_number("genes", _names("genes", genes), config.n_genes)
    if spec and (spec.get("space", "lognormalised") != "lognormalised" or spec.get("perturbation") is None):
        raise ValueError(
            "spec must name the column of perturbations, and cells be log-normalised, as PerturbDiff was trained; got "
            f"perturbation={spec.get('perturbation')!r}, space={spec.get('space')!r}."
        )
    names: dict[str, list[Any]] = {role: [] for role in (*_ROLES, "dose")}
    for role, given in (vocabulary or {}).items():
        if role not in (*_ROLES, "dose"):
            raise ValueError(f"vocabulary of PerturbDiff has {', '.join(_ROLES)} and dose; got {role!r}.")
        if role == "dose":
            names[role] = _doses(given)
            _check_number("vocabulary: dose", names[role], config.n_doses or 0)
            continue
        names[role] = list(_names(role, given))
        table = getattr(constants, f"{role}_vectors", None)
        rows = getattr(config, {"perturbation": "n_perturbations", "cell_type": "n_cell_types"}.get(role, "n_batches"))
        rows = len(table) if table is not None else rows
        if rows is None:
            raise ValueError(f"vocabulary: the model has no {role}s to be named; leave them out.")
        if role == "perturbation" and len(names[role]) + 1 == rows:
            names[role] = ["control", *names[role]]  # the row of "no perturbation"
        _check_number(f"vocabulary: {role}", names[role], rows)
    missing = [
        *([] if genes else ["genes (--genes)"]),
        *(
            f"the names of {role} (--vocabulary)"
            for role in _ROLES
            if getattr(config, role) != "none" and not names[role]
        ),
        *(["the doses (--vocabulary)"] if config.n_doses is not None and not names["dose"] else []),
        *([] if spec else ["the columns of the data (--set spec.perturbation=COLUMN, ...)"]),
    ]
    nobody = {"space": "lognormalised", "perturbation": f"{_UNTOLD}this converted model lacks {', '.join(missing)}"}
    columns = nobody if missing else {"space": "lognormalised", **(spec or {})}
    sources = list(weights.spaces) or [""]
    of_data = {"cell_type_column": columns.get("cell_type"), "batch_column": columns.get("batch")}
    no_steps = {"library_size": None, "log1p": False, "scale": False, "n_components": None}
    more = {
        "experiment": {
            "kind": "CellSetExperiment",
            "spec": dict(columns),
            "sampling": {"n_cells": 256, "group_by": None, "controls": "matched", "include_control": False},
            "generation": {} if config.condition_dropout else {"guidance": 1.0},
            "unmatched": "error",
            "absent": "error",
            "control_seed": None,
        },
        "split": {"rule": {"kind": "HoldOutNone"}, "train": [], "validation": [], "test": []},
        "data": {"digest": "", "n_cells": 0},
        "transform": {
            "preprocess": no_steps,
            "space": "lognormalised",
            "input_names": list(genes),
            "feature_names": list(genes),
            "target_sum": None,
        },
        "names": {
            **names,
            "sources": sources,
            "covariates": list(columns.get("covariates", ())),
            **of_data,
        },
        "trained": {role: some for role, some in names.items() if some},  # as far as anybody can tell
    }
    arrays = {
        "transform": {"mean": np.zeros(len(genes)), "std": np.ones(len(genes))},
        "measured": np.ones((len(sources), config.n_genes), bool),
    }
    return "perturbdiff", more, arrays


_KINDS = {"scimf": _of_scimf, "scdfm": _of_scdfm, "perturbdiff": _of_perturbdiff}


def _without(system: str) -> str:
    """The kind under which the others are stored: who opens it as a run is told why it is none."""
    return f"weights of {SYSTEMS[system].title}, without {_LACKS[system]} (scjax.convert.load opens them)"


def _names(what: str, given: Any) -> tuple[str, ...]:
    """In the order of their ids; `given` has that order, or says the ids."""
    if isinstance(given, Mapping):
        ids = list(given.values())
        if sorted(i if type(i) is int else -1 for i in ids) != list(range(len(ids))):
            raise ValueError(f"{what} must give the ids 0, 1, ... to its {len(ids)} names, each once.")
        given = sorted(given, key=given.__getitem__)
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(n, str) and n for n in given):
        raise ValueError(f"{what} must be a list of names, or an object of name to id; got {given!r:.80}.")
    if repeated := sorted(
        {name for name in given if list(given).count(name) > 1} if len(set(given)) < len(given) else ()
    ):
        raise ValueError(f"{what} must be unique; {repeated[0]!r} is repeated.")
    at_least(f"the number of {what}", len(given), 1)
    return tuple(given)


def _doses(given: Any) -> list[float]:
    """In the order of their ranks."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(type(d) in (int, float) for d in given):
        raise ValueError(f"vocabulary: dose must be a list of numbers; got {given!r:.80}.")
    return [float(dose) for dose in given]


def _check_number(what: str, names: Sequence[Any], wanted: int, at_most: bool = False) -> None:
    if len(names) > wanted or (not at_most and len(names) < wanted):
        raise ValueError(f"{what} must be the model's {wanted}{' or fewer' if at_most else ''}; got {len(names)}.")
