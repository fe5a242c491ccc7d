"""Which times training never sees: rules, and what they resolve to on the times of a data set."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from scjax.check import at_least, increasing, one_of
from scjax.config import from_json, to_json

__all__ = [
    "HoldOutInterior",
    "HoldOutLast",
    "HoldOutNone",
    "HoldOutTimes",
    "ReferenceSplit",
    "TimeSplit",
    "TimeSplitRule",
    "each_interior",
    "load_split",
    "save_split",
    "split_times",
]


@dataclass(frozen=True, kw_only=True)
class HoldOutNone:
    """Train on every time."""


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


def save_split(path: str | Path, split: TimeSplit) -> None:
    """JSON of the rule and of its times. An existing file is never overwritten: FileExistsError."""
    with open(path, "x") as file:
        file.write(to_json(split))


def load_split(path: str | Path) -> TimeSplit:
    """What `save_split` wrote. ValueError for anything else."""
    return from_json(TimeSplit, path)


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
