"""What training never sees: rules, and what they resolve to on the times or on the populations of a data set.

Times: `split_times`. Perturbations: `split_populations`, whose unit is a population, that is all cells of one condition
in one context; controls are for training, unless whole contexts are held out. `save_split` and `load_split` take both.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from scjax.check import at_least, increasing, one_of, probability, suggestion
from scjax.config import from_dict, from_json, to_json
from scjax.data.conditions import CONTROL, JOIN_CONTEXT, canonical
from scjax.types import Population

__all__ = [
    "AdditiveSplit",
    "ComboSciPlexSplit",
    "HoldOutConditions",
    "HoldOutContexts",
    "HoldOutCrossed",
    "HoldOutGenes",
    "HoldOutInterior",
    "HoldOutLast",
    "HoldOutNone",
    "HoldOutPopulations",
    "HoldOutSeenDoubles",
    "HoldOutTimes",
    "LeaveOut",
    "PerturbationSplit",
    "PerturbationSplitRule",
    "ReferenceSplit",
    "TimeSplit",
    "TimeSplitRule",
    "UnseenSingles",
    "each_interior",
    "load_split",
    "save_split",
    "split_populations",
    "split_times",
]


@dataclass(frozen=True, kw_only=True)
class HoldOutNone:
    """Train on everything: every time, or every population."""


@dataclass(frozen=True, kw_only=True)
class HoldOutTimes:
    """Hold out these times, in the unit of the time column."""

    times: tuple[float, ...]

    def __post_init__(self):
        if not self.times:
            raise ValueError("times must name at least one time; to train on all of them use HoldOutNone().")


@dataclass(frozen=True, kw_only=True)
class HoldOutInterior:
    """Hold out every time but the first and the last, all at once. `each_interior` holds them out in turn."""


@dataclass(frozen=True, kw_only=True)
class HoldOutLast:
    """Hold out the last `n_times`: a forecast."""

    n_times: int

    def __post_init__(self):
        at_least("n_times", self.n_times, 1)


# Held-out indices of the time points, as in the published scIMF code.
_REFERENCE_N_TIMES = {"ZB": 12, "MEF": 19, "Panc": 8}
_REFERENCE_HELD_OUT: dict[str, dict[str, tuple[int, ...]]] = {
    "ZB": {
        "three_interpolation": (4, 6, 8),
        "two_forecasting": (10, 11),
        "remove_recovery": (2, 4, 6, 8, 10, 11),
        "all_times": (),
    },
    "MEF": {
        "three_interpolation": (5, 10, 15),
        "three_forecasting": (16, 17, 18),
        "remove_recovery": (5, 7, 9, 11, 15, 16, 17, 18),
        "all_times": (),
    },
    "Panc": {**{f"leaveout{k}": (k,) for k in range(1, 8)}, "all_times": ()},
}


@dataclass(frozen=True, kw_only=True)
class ReferenceSplit:
    """A split of scIMF by its published name; defined by the position of a time, so the number of times must agree.

    ZB is the zebrafish embryo (Farrell 2018, 12 times), MEF the reprogramming of fibroblasts by whole days (Schiebinger
    2019, 19), Panc the differentiation to beta cells (Veres 2019, 8).
    """

    dataset: Literal["ZB", "MEF", "Panc"]
    name: str

    def __post_init__(self):
        one_of("dataset", self.dataset, tuple(_REFERENCE_HELD_OUT))
        one_of("name", self.name, tuple(_REFERENCE_HELD_OUT[self.dataset]))


TimeSplitRule: TypeAlias = HoldOutNone | HoldOutTimes | HoldOutInterior | HoldOutLast | ReferenceSplit


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """A rule and what it came to: the times of training, the first always among them, and the held-out ones."""

    rule: TimeSplitRule
    train: tuple[float, ...]
    held_out: tuple[float, ...]

    @property
    def times(self) -> tuple[float, ...]:
        """All times of the data set, increasing."""
        return tuple(sorted((*self.train, *self.held_out)))


def split_times(rule: TimeSplitRule, times: Iterable[float]) -> TimeSplit:
    """The rule applied to the increasing times of a data set.

    Raises:
        ValueError: a time that the data set lacks, the first time held out, no interior time, fewer than two times left
            for training, or a reference split of another number of times.
    """
    times = increasing("times", times)
    held_out = _held_out(rule, times)
    if times[0] in held_out:
        raise ValueError(
            f"The first time, {times[0]}, cannot be held out: its cells are the start of every simulation. {rule}"
        )
    train = tuple(t for t in times if t not in held_out)
    if len(train) < 2:
        raise ValueError(f"{rule} leaves {len(train)} of {len(times)} times for training; it takes at least two.")
    return TimeSplit(rule=rule, train=train, held_out=tuple(t for t in times if t in held_out))


def each_interior(times: Iterable[float]) -> tuple[HoldOutTimes, ...]:
    """One rule for each time but the first and the last: leave one out, in turn."""
    times = increasing("times", times)
    if len(times) < 3:
        raise ValueError(f"There is no interior time among {times}.")
    return tuple(HoldOutTimes(times=(t,)) for t in times[1:-1])


@dataclass(frozen=True, kw_only=True)
class _WithValidation:
    """What all rules for populations share.

    Attributes:
        validation_fraction: share of the perturbed training populations that is kept for validation, rounded down; of
            their conditions, in all contexts, where the rule holds out whole conditions. Test populations never serve
            as validation, as they do in the scDFM code.
        validation_seed: which ones.
    """

    validation_fraction: float = 0.0
    validation_seed: int = 0

    def __post_init__(self):
        probability("validation_fraction", self.validation_fraction)
        at_least("validation_seed", self.validation_seed, 0)


@dataclass(frozen=True, kw_only=True)
class AdditiveSplit(_WithValidation):
    """Hold out a share of the combinations; every single stays in training, so that their effects can be added.

    The reference: the combinations of the data, sorted as the data write them, are shuffled by NumPy's legacy generator
    with seed 42 + fold, and the first int(0.3 n) are the test. The scDFM code makes folds 0 to 4 and the paper reports
    four. For a fold of its own `split_populations` must know how the data write their conditions (`written`).
    """

    fold: int = 0
    test_fraction: float = 0.3
    seed: int = 42

    def __post_init__(self):
        super().__post_init__()
        _check_fold(self)


@dataclass(frozen=True, kw_only=True)
class HoldOutGenes(_WithValidation):
    """Hold out genes: those of the first `n_doubles` of the test combinations of an `AdditiveSplit`.

    Attributes:
        fold, test_fraction, seed: of that split.
        n_doubles: 15 in the scDFM code ("combinations").
        follow: "paper": every condition that touches a held-out gene is test. "code": only those `n_doubles`
            combinations and the singles written `X+control` are; singles written `control+X`, all other combinations
            of held-out genes and the rest of the fold's test combinations are training, which leaks. Which singles
            these are only `written` tells; without it all of them are test.
    """

    fold: int = 0
    n_doubles: int = 15
    follow: Literal["paper", "code"] = "paper"
    test_fraction: float = 0.3
    seed: int = 42

    def __post_init__(self):
        super().__post_init__()
        _check_fold(self)
        at_least("n_doubles", self.n_doubles, 1)
        one_of("follow", self.follow, ("paper", "code"))


@dataclass(frozen=True, kw_only=True)
class UnseenSingles(_WithValidation):
    """Hold out `n_genes` of the genes that were perturbed alone, and every combination that contains one of them.

    The scDFM code means 12 random genes by "unseen" and never gets there; the draw (NumPy's `default_rng(seed)` over
    the sorted names) is ours.
    """

    n_genes: int = 12
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least("n_genes", self.n_genes, 1)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class HoldOutSeenDoubles(_WithValidation):
    """Hold out the doubles both of whose singles are in the data, in whatever context: `combo_seen2` elsewhere."""


@dataclass(frozen=True, kw_only=True)
class LeaveOut(_WithValidation):
    """Hold out all perturbed populations in which a covariate has this value: a cell type, a line, a donor.

    Their controls stay in training, as a prediction starts from them.
    """

    covariate: str
    value: str


@dataclass(frozen=True, kw_only=True)
class HoldOutConditions(_WithValidation):
    """Hold out these conditions, in all contexts. `B+A` is `A+B`, and `A+control` or `ctrl+A` is `A`."""

    conditions: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.conditions:
            raise ValueError("conditions must name at least one; to train on all of them use HoldOutNone().")


@dataclass(frozen=True, kw_only=True)
class HoldOutPopulations(_WithValidation):
    """Hold out these (condition, context) pairs; a context is written as in `Population`."""

    populations: tuple[tuple[str, str], ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.populations:
            raise ValueError("populations must name at least one; to train on all of them use HoldOutNone().")


@dataclass(frozen=True, kw_only=True)
class HoldOutCrossed(_WithValidation):
    """Hold out these conditions in these contexts: donors x perturbations, cell lines x perturbations.

    The conditions stay in training elsewhere, and the contexts stay with their other conditions and their controls. A
    condition need not occur in every one of the contexts; a name that is repeated counts once. These are the splits of
    the PerturbDiff code, which lists its donors or lines and its conditions.

    Attributes:
        covariates: what `values` are values of: ("donor",), or ("cell_type", "donor").
        values: the contexts, a value for each of `covariates`: (("Donor1",), ("Donor4",)).
        conditions: for test; None takes all.
        validation_conditions: for validation, in the same contexts; in place of a `validation_fraction`.
    """

    covariates: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    conditions: tuple[str, ...] | None = None
    validation_conditions: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _check_values(self.covariates, "values", self.values)
        if self.conditions is not None and not self.conditions:
            raise ValueError("conditions must name at least one; None takes all of them.")
        if self.validation_conditions and self.conditions is None:
            raise ValueError("conditions=None takes all conditions; none is left for validation_conditions.")
        if self.validation_conditions and self.validation_fraction:
            raise ValueError(
                f"validation_conditions and validation_fraction={self.validation_fraction} both choose what is kept "
                f"for validation; give one of them."
            )


@dataclass(frozen=True, kw_only=True)
class HoldOutContexts(_WithValidation):
    """Hold out whole contexts, their control cells too: donors, or cell types of donors.

    The one rule that holds out cells of data without perturbations. Of data with perturbations it makes contexts that
    training never saw: `LeaveOut` leaves it their controls.

    Attributes:
        covariates: what the values are values of: ("donor",), or ("cell_type", "donor").
        values: the contexts of the test, a value for each of `covariates`: (("Donor1",), ("Donor4",)).
        validation_values: those for validation; in place of a `validation_fraction`, which takes contexts too.
    """

    covariates: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    validation_values: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _check_values(self.covariates, "values", self.values)
        if self.validation_values:
            _check_values(self.covariates, "validation_values", self.validation_values)
        if self.validation_values and self.validation_fraction:
            raise ValueError(
                f"validation_values and validation_fraction={self.validation_fraction} both choose what is kept for "
                f"validation; give one of them."
            )
        both = sorted(set(self.values) & set(self.validation_values))
        if both:
            raise ValueError(f"{both[0]} is both for test and for validation. Take it out of one.")


def _check_values(covariates: tuple[str, ...], name: str, values: tuple[tuple[str, ...], ...]) -> None:
    if not covariates or len(set(covariates)) < len(covariates):
        raise ValueError(f"covariates must name at least one, each once; got {covariates}.")
    if not values:
        raise ValueError(f"{name} must hold at least one context; to train on all of them use HoldOutNone().")
    for context in values:
        if len(context) != len(covariates):
            raise ValueError(
                f"{name} must hold a value for each of the {len(covariates)} covariates {covariates}; got {context}."
            )


_COMBOSCIPLEX_TEST = (
    "Panobinostat+Crizotinib",
    "Panobinostat+Curcumin",
    "Panobinostat+SRT1720",
    "Panobinostat+Sorafenib",
    "SRT2104+Alvespimycin",
    "control+Alvespimycin",
    "control+Dacinostat",
)


@dataclass(frozen=True, kw_only=True)
class ComboSciPlexSplit(_WithValidation):
    """The seven conditions of ComboSciPlex that the scDFM code holds out, whatever the fold."""


PerturbationSplitRule: TypeAlias = (
    HoldOutNone
    | AdditiveSplit
    | HoldOutGenes
    | UnseenSingles
    | HoldOutSeenDoubles
    | LeaveOut
    | HoldOutConditions
    | HoldOutPopulations
    | HoldOutCrossed
    | HoldOutContexts
    | ComboSciPlexSplit
)


@dataclass(frozen=True, kw_only=True)
class PerturbationSplit:
    """A rule and what it came to: populations, sorted, each in one part.

    All controls are in `train`, but those of contexts that are held out as a whole (`HoldOutContexts`).
    """

    rule: PerturbationSplitRule
    train: tuple[Population, ...]
    validation: tuple[Population, ...]
    test: tuple[Population, ...]

    @property
    def populations(self) -> tuple[Population, ...]:
        """All of them, sorted."""
        return tuple(sorted((*self.train, *self.validation, *self.test)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PerturbationSplit":
        """What `config.to_dict` made of a split, also after JSON, which knows no named tuples."""
        return _from_record(from_dict(_Record, values))


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A PerturbationSplit as JSON gives it back."""

    rule: PerturbationSplitRule
    train: tuple[tuple[tuple[str, ...], str], ...]
    validation: tuple[tuple[tuple[str, ...], str], ...]
    test: tuple[tuple[tuple[str, ...], str], ...]


def _from_record(record: _Record) -> PerturbationSplit:
    parts = {name: tuple(starmap(Population, getattr(record, name))) for name in ("train", "validation", "test")}
    return PerturbationSplit(rule=record.rule, **parts)


def split_populations(
    rule: PerturbationSplitRule,
    populations: Sequence[Population],
    covariates: tuple[str, ...] = (),
    *,
    written: Iterable[tuple[str, ...]] = (),
    perturbed: bool = True,
) -> PerturbationSplit:
    """The rule applied to the populations of a data set.

    Args:
        covariates: what the parts of a context are, in their order.
        written: how the data write their conditions: names in the order of the data, "control" for a control, as
            ("B", "A") or ("control", "A"). The scDFM code sorts and compares these spellings, so its folds depend on
            them (`AdditiveSplit`, `HoldOutGenes`; other rules do not look). Without it a condition counts as written
            in its canonical form, a single as `A+control`. Two spellings of a condition remain one condition, which
            is held out where the code holds out one of them.
        perturbed: False for data without perturbations, whose populations are all (): HoldOutNone and HoldOutContexts.

    Raises:
        ValueError: no perturbed population, a condition, context or covariate that the data lack, nothing held out,
            nothing left to train on, a fraction so small that no population is kept for validation.
    """
    populations = tuple(sorted(set(populations)))
    if not perturbed and not isinstance(rule, HoldOutNone | HoldOutContexts):
        raise ValueError(f"{rule} holds out perturbations, and the data have none. Use HoldOutContexts or HoldOutNone.")
    # What can be held out: a context goes with its controls, else these stay.
    units = tuple(p for p in populations if not p.is_control or isinstance(rule, HoldOutContexts) or not perturbed)
    what = "perturbed populations" if perturbed else "populations"

    def learnable(parts: Iterable[Population]) -> int:
        return sum(not (perturbed and p.is_control) for p in parts)

    if not learnable(units):
        raise ValueError("populations must hold at least one that is perturbed; all of them are controls.")
    test = _test_populations(rule, units, covariates, tuple(written))
    train = [p for p in units if p not in test]
    if not test and not isinstance(rule, HoldOutNone):
        alone = perturbed and all(len(p.perturbation) < 2 for p in units)
        joined = " No condition names two perturbations; spec.separator says what joins names." if alone else ""
        raise ValueError(f"{rule} holds out none of {len(units)} {what}; HoldOutNone() says so.{joined}")
    if not learnable(train):
        raise ValueError(f"{rule} holds out all {learnable(units)} {what}; none is left to train on.")
    validation = set() if isinstance(rule, HoldOutNone) else _validation(rule, train, covariates)
    if not learnable(p for p in train if p not in validation):
        raise ValueError(
            f"{rule} keeps the remaining {learnable(train)} {what} for validation; none is left to train on."
        )
    return PerturbationSplit(
        rule=rule,
        train=tuple(p for p in populations if p not in test and p not in validation),
        validation=tuple(sorted(validation)),
        test=tuple(sorted(test)),
    )


def save_split(path: str | Path, split: TimeSplit | PerturbationSplit) -> None:
    """JSON of the rule and of what it came to. An existing file is never overwritten: FileExistsError."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(to_json(split))


def load_split(path: str | Path) -> TimeSplit | PerturbationSplit:
    """What `save_split` wrote. ValueError for anything else, a time or population in two parts included."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        fields = {}  # `from_json` says what is wrong
    if isinstance(fields, dict) and "test" in fields:
        split = _from_record(from_json(_Record, path))
        everything = (*split.train, *split.validation, *split.test)
    else:
        split = from_json(TimeSplit, path)
        everything = (*split.train, *split.held_out)
    twice = next((one for one, n in Counter(everything).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: {twice} occurs more than once; each belongs to one part of a split, once.")
    if not split.train:
        raise ValueError(f"{path}: train must hold something to learn from; it is empty.")
    return split


def _held_out(rule: TimeSplitRule, times: tuple[float, ...]) -> set[float]:
    match rule:
        case HoldOutNone():
            return set()
        case HoldOutTimes(times=wanted):
            return {_known(t, times) for t in wanted}
        case HoldOutInterior():
            if len(times) < 3:
                raise ValueError(f"HoldOutInterior: there is no interior time among {times}.")
            return set(times[1:-1])
        case HoldOutLast(n_times=n):
            return set(times[-n:])
        case ReferenceSplit(dataset=dataset, name=name):
            if len(times) != _REFERENCE_N_TIMES[dataset]:
                raise ValueError(
                    f"ReferenceSplit: {dataset} has {_REFERENCE_N_TIMES[dataset]} times, the data have {len(times)}: "
                    f"{times}. Name the times themselves with HoldOutTimes."
                )
            return {times[i] for i in _REFERENCE_HELD_OUT[dataset][name]}


def _known(time: float, times: tuple[float, ...]) -> float:
    for t in times:
        if math.isclose(time, t, rel_tol=1e-6):  # a column stored as float32 holds 0.1 as 0.100000001
            return t
    raise ValueError(f"HoldOutTimes: {time} is not a time of the data, which are {', '.join(map(str, times))}.")


def _check_fold(rule: AdditiveSplit | HoldOutGenes) -> None:
    at_least("fold", rule.fold, 0)
    at_least("seed", rule.seed, 0)
    probability("test_fraction", rule.test_fraction)


def _test_populations(
    rule: PerturbationSplitRule,
    perturbed: tuple[Population, ...],
    covariates: tuple[str, ...],
    written: tuple[tuple[str, ...], ...],
) -> set[Population]:
    def where(held_out: Callable[[tuple[str, ...]], bool]) -> set[Population]:
        return {p for p in perturbed if held_out(p.perturbation)}

    conditions = sorted({p.perturbation for p in perturbed})
    match rule:
        case HoldOutNone():
            return set()
        case AdditiveSplit():
            spellings = _spellings(conditions, written)
            held_out = set(_test_combinations(rule, spellings))
            return where(lambda names: not held_out.isdisjoint(spellings[names]))
        case HoldOutGenes(n_doubles=n_doubles, follow=follow):
            spellings = _spellings(conditions, written)
            first = _test_combinations(rule, spellings)
            if n_doubles > len(first):
                raise ValueError(
                    f"n_doubles must be at most {len(first)}, the test combinations of {rule}; got {n_doubles}."
                )
            genes = {name for names in first[:n_doubles] for name in names}
            if follow == "paper":
                return where(lambda names: not genes.isdisjoint(names))
            held_out = {*first[:n_doubles], *((gene, CONTROL) for gene in genes)}
            return where(lambda names: not held_out.isdisjoint(spellings[names]))
        case UnseenSingles(n_genes=n_genes, seed=seed):
            singles = [names[0] for names in conditions if len(names) == 1]
            if n_genes > len(singles):
                raise ValueError(f"n_genes must be at most {len(singles)}, the singles of the data; got {n_genes}.")
            genes = set(np.random.default_rng(seed).permutation(singles)[:n_genes].tolist())
            return where(lambda names: not genes.isdisjoint(names))
        case HoldOutSeenDoubles():
            singles = {names[0] for names in conditions if len(names) == 1}
            return where(lambda names: len(names) == 2 and singles.issuperset(names))
        case LeaveOut(covariate=covariate, value=value):
            return _with_values("LeaveOut", (covariate,), (value,), perturbed, covariates)
        case HoldOutCrossed():
            return _crossed(rule, perturbed, covariates, rule.conditions)
        case HoldOutContexts(covariates=names, values=values):
            return _in_contexts("HoldOutContexts", names, values, perturbed, covariates)
        case HoldOutConditions(conditions=wanted):
            keys = {_known_condition(name, conditions) for name in wanted}
            return where(lambda names: names in keys)
        case ComboSciPlexSplit():
            keys = {_known_condition(name, conditions) for name in _COMBOSCIPLEX_TEST}
            return where(lambda names: names in keys)
        case HoldOutPopulations(populations=wanted):
            return {_known_population(condition, context, perturbed) for condition, context in wanted}


def _spellings(
    conditions: list[tuple[str, ...]], written: tuple[tuple[str, ...], ...]
) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    if not written:
        return {names: [names if len(names) > 1 else (*names, CONTROL)] for names in conditions}
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {names: [] for names in conditions}
    for spelling in sorted(set(written)):
        names = tuple(sorted(name for name in spelling if name != CONTROL))
        if names in found:
            found[names].append(spelling)
        elif names:
            raise ValueError(f"written must hold conditions of the data; {'+'.join(spelling)!r} is not one.")
    for names, spellings in found.items():
        if not spellings:
            raise ValueError(f"written must hold every condition of the data; {'+'.join(names)!r} is missing.")
    return found


def _test_combinations(
    rule: AdditiveSplit | HoldOutGenes, spellings: dict[tuple[str, ...], list[tuple[str, ...]]]
) -> list[tuple[str, ...]]:
    """In shuffled order."""
    combinations = sorted(
        (spelling for names, several in spellings.items() if len(names) > 1 for spelling in several), key="+".join
    )
    order = np.arange(len(combinations))
    np.random.RandomState(rule.seed + rule.fold).shuffle(order)
    return [combinations[i] for i in order[: int(rule.test_fraction * len(order))]]


def _in_contexts(
    rule: str,
    names: tuple[str, ...],
    values: tuple[tuple[str, ...], ...],
    perturbed: Sequence[Population],
    covariates: tuple[str, ...],
) -> set[Population]:
    return set().union(*(_with_values(rule, names, some, perturbed, covariates) for some in values))


def _with_values(
    rule: str,
    names: tuple[str, ...],
    values: tuple[str, ...],
    perturbed: Sequence[Population],
    covariates: tuple[str, ...],
) -> set[Population]:
    """The populations in whose context these covariates have these values; at least one."""
    parts_of = _context_parts(rule, names, perturbed, covariates)
    places = [covariates.index(name) for name in names]
    found = {p for p, parts in parts_of.items() if tuple(parts[i] for i in places) == values}
    if not found:
        what = "population" if rule == "HoldOutContexts" else "perturbed population"
        for name, place, value in zip(names, places, values, strict=True):
            known = sorted({parts[place] for parts in parts_of.values()})
            if value not in known:
                raise ValueError(
                    f"{rule}: no {what} has {name}={value!r}.{suggestion(value, known)} There are: {', '.join(known)}."
                )
        together = " and ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise ValueError(f"{rule}: no {what} has {together} together.")
    return found


def _context_parts(
    rule: str, names: tuple[str, ...], populations: Sequence[Population], covariates: tuple[str, ...]
) -> dict[Population, list[str]]:
    for name in names:
        if name not in covariates:
            raise ValueError(
                f"{rule}: covariate must be one of the covariates of the data, which are "
                f"{', '.join(map(repr, covariates)) or 'none'}; got {name!r}.{suggestion(name, covariates)}"
            )
    parts_of = {p: p.context.split(JOIN_CONTEXT) for p in populations}
    for p, parts in parts_of.items():
        if len(parts) != len(covariates):
            raise ValueError(
                f"The context {p.context!r} has {len(parts)} parts, the covariates are {len(covariates)}: "
                f"{', '.join(covariates)}. No value may contain ' | '."
            )
    return parts_of


def _crossed(
    rule: HoldOutCrossed,
    perturbed: Sequence[Population],
    covariates: tuple[str, ...],
    wanted: tuple[str, ...] | None,
) -> set[Population]:
    found = _in_contexts("HoldOutCrossed", rule.covariates, rule.values, perturbed, covariates)
    if wanted is None:
        return found
    conditions = sorted({p.perturbation for p in perturbed})
    keys = {_known_condition(name, conditions) for name in wanted}
    return {p for p in found if p.perturbation in keys}


def _known_condition(condition: str, conditions: list[tuple[str, ...]]) -> tuple[str, ...]:
    names = canonical(condition)
    if not names:
        raise ValueError(f"Controls cannot be held out: {condition!r}. Every prediction starts from them.")
    if names in conditions:
        return names
    known = ["+".join(names) for names in conditions]
    raise ValueError(
        f"{condition!r} is no condition of the data.{suggestion('+'.join(names), known)} "
        f"There are {len(known)}: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}."
    )


def _known_population(condition: str, context: str, perturbed: tuple[Population, ...]) -> Population:
    names = _known_condition(condition, sorted({p.perturbation for p in perturbed}))
    if Population(names, context) not in perturbed:
        contexts = [p.context for p in perturbed if p.perturbation == names]
        raise ValueError(
            f"The data have no population of {condition!r} in the context {context!r}.{suggestion(context, contexts)} "
            f"Its contexts are: {', '.join(map(repr, contexts))}."
        )
    return Population(names, context)


def _validation(rule: _WithValidation, train: list[Population], covariates: tuple[str, ...]) -> set[Population]:
    match rule:
        case HoldOutCrossed(validation_conditions=wanted) if wanted:
            both = sorted({canonical(name) for name in wanted} & {canonical(name) for name in rule.conditions})  # pyright: ignore[reportOptionalIterable]
            if both:
                raise ValueError(f"{'+'.join(both[0])!r} is both for test and for validation. Take it out of one.")
            parts_of = _context_parts("HoldOutCrossed", rule.covariates, train, covariates)
            places = [covariates.index(name) for name in rule.covariates]
            keys = {_known_condition(name, sorted({p.perturbation for p in train})) for name in wanted}
            found = {
                p
                for p, parts in parts_of.items()
                if tuple(parts[i] for i in places) in rule.values and p.perturbation in keys
            }
            if not found:
                raise ValueError(f"{rule}: none of validation_conditions occurs in these contexts.")
            return found
        case HoldOutContexts(validation_values=values) if values:
            return _in_contexts("HoldOutContexts", rule.covariates, values, train, covariates)
    if rule.validation_fraction == 0:
        return set()
    # What a test population leaves in training, a validation population must leave there too.
    if isinstance(rule, HoldOutContexts):
        places = [covariates.index(name) for name in rule.covariates]
        unit_of = {
            p: tuple(parts[i] for i in places)
            for p, parts in _context_parts("HoldOutContexts", rule.covariates, train, covariates).items()
        }
        what = "contexts"
    elif isinstance(rule, LeaveOut | HoldOutPopulations | HoldOutCrossed):
        unit_of, what = {p: p for p in train}, "populations"
    else:
        unit_of, what = {p: p.perturbation for p in train}, "conditions"
    units = sorted(set(unit_of.values()))
    n = int(rule.validation_fraction * len(units))
    if n == 0:
        raise ValueError(
            f"validation_fraction must be at least {1 / len(units):.3g} to keep one of {len(units)} training {what}; "
            f"got {rule.validation_fraction}."
        )
    order = np.random.default_rng(rule.validation_seed).permutation(len(units))
    kept = {units[i] for i in order[:n]}
    return {p for p in train if unit_of[p] in kept}
