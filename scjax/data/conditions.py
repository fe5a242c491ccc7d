"""What was done to cells, by one name each: parsing, doses, and what to do about a name that training never saw."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from scjax.check import column, listed, one_of, suggestion
from scjax.types import Population

__all__ = [
    "CONTROL",
    "JOIN_CONTEXT",
    "CellKinds",
    "EmbeddingKind",
    "OnUnknown",
    "Pooling",
    "Resolved",
    "VectorDose",
    "as_columns",
    "as_number",
    "canonical",
    "canonical_parts",
    "dose_of",
    "dosed_vector",
    "known_names",
    "read_kinds",
    "resolve_unknown",
    "trained_names",
    "undosed_vector",
    "with_dose",
]

CONTROL = "control"  # the one name of the control in ids and tables, whatever the data call it
EmbeddingKind: TypeAlias = Literal["gene", "table", "vector"]
OnUnknown: TypeAlias = Literal["error", "mean", "nearest"]
VectorDose: TypeAlias = Literal["name", "append", "product"]
Pooling: TypeAlias = Literal["mean", "sum"]

_JOIN = "+"  # of canonical names, whatever the separator of the data is
JOIN_CONTEXT = " | "  # of the covariates' values


def canonical(name: str, separator: str = "+", control: Collection[str] = (CONTROL, "ctrl")) -> tuple[str, ...]:
    """The parts of a joined name, sorted, the control left out: `B+A` -> (A, B), `ctrl+A` -> (A,), `ctrl` -> ().

    Besides `separator`, "+" joins, as in canonical names. Blanks around a part do not count.

    Raises:
        ValueError: an empty part (`A+`), or a part twice (`A+A`): a cell has a perturbation or not. What is meant by a
            repeat, a second guide or a higher dose, belongs into the names (`A@2`).
    """
    parts = [part for piece in str(name).split(separator) for part in piece.split(_JOIN)]
    try:
        return canonical_parts(parts, control)
    except ValueError as err:
        raise ValueError(f"{name!r} {err}") from err


def canonical_parts(parts: Iterable[str], control: Collection[str] = (CONTROL, "ctrl")) -> tuple[str, ...]:
    """`canonical` of names that are split already. Its messages are to follow the whole name."""
    parts = [str(part).strip() for part in parts]
    if "" in parts:
        raise ValueError(f"has an empty part. Write 'A' or 'A{_JOIN}{next(iter(control))}' for A alone.")
    kept = [part for part in parts if part not in control]
    repeated = next((part for part in kept if kept.count(part) > 1), None)
    if repeated is not None:
        raise ValueError(
            f"names {repeated!r} twice, which is not another perturbation than {repeated!r} once. Write it once, or "
            f"give what differs in the names ('{repeated}@2' for a dose)."
        )
    return tuple(sorted(kept))


def with_dose(name: str, dose: float) -> str:
    """`name@dose`, the number by %g (`JQ1@0.5`), without the plus sign that would join names (`1e06`)."""
    return f"{name}@{dose:g}".replace("e+", "e")


def dose_of(name: str) -> tuple[str, float | None]:
    """`JQ1@0.5` -> (JQ1, 0.5); (name, None) where no number follows an @."""
    drug, at, number = name.rpartition("@")
    try:
        dose = float(number)
    except ValueError:
        return name, None
    return (drug, dose) if at and drug and math.isfinite(dose) else (name, None)


def dosed_vector(
    vector: Float[np.ndarray, " features"], dose: float, how: VectorDose, unit: float
) -> Float[np.ndarray, " features1"]:
    """The vector of a drug at a dose, with s = log(1 + dose / unit): [v, s] ("append") or [s v, s] ("product").

    s grows in proportion to doses far below the unit and by their logarithm far above it. With "product" the vector
    tends to that of nothing as the dose tends to zero, and twice the dose is not another drug.
    """
    one_of("how", how, ("append", "product"))
    s = math.log1p(dose / unit)
    return np.append(vector * s if how == "product" else vector, s).astype(vector.dtype)


def undosed_vector(vector: Float[np.ndarray, " features1"], how: VectorDose) -> Float[np.ndarray, " features"]:
    """The drug's own vector in what `dosed_vector` made of it, the dose above 0."""
    one_of("how", how, ("append", "product"))
    return vector[:-1] / vector[-1] if how == "product" else vector[:-1]


def trained_names(populations: Iterable[Population]) -> tuple[str, ...]:
    """All names, sorted, that occur in these populations: those of training, when a model is asked what it knows."""
    return tuple(sorted({part for population in populations for part in population.perturbation}))


def known_names(
    train: Iterable[Population], kind: EmbeddingKind, *, genes: Iterable[str] = (), vectors: Iterable[str] = ()
) -> tuple[str, ...]:
    """The names that a model trained on these populations can embed, sorted.

    A row of a table is learned only where its name was in a training population, whoever else has one. The token of a
    measured gene is learned as a gene (`genes`: those of the graph). An external vector says all that there is to know
    of a name (`vectors`: the names that have one).
    """
    one_of("kind", kind, ("gene", "table", "vector"))
    if kind == "vector":
        return tuple(sorted(set(vectors)))
    besides = genes if kind == "gene" else ()
    return tuple(sorted({*trained_names(train), *besides}))


class Resolved(NamedTuple):
    """A condition in names that a model knows.

    Attributes:
        parts: for each part of the condition the names whose mean embedding stands for it; one name where it is known.
        replaced: what stands for an unknown part, in words, to be recorded with the prediction.
    """

    parts: tuple[tuple[str, ...], ...]
    replaced: dict[str, str]

    def names(self, n_slots: int) -> tuple[str, ...]:
        """The names to encode, `n_slots` of them or a multiple: their plain mean is the mean of the parts' means.

        Free slots hold the control, as in training. A part of k names beside known ones makes every other slot occur k
        times: [mean(A, B), control] -> A, B, control, control.

        Raises:
            ValueError: more parts than slots.
        """
        if len(self.parts) > n_slots:
            raise ValueError(
                f"n_slots={n_slots} is too few for {len(self.parts)} perturbations at once: {self.parts}. The model "
                f"was trained with {n_slots}."
            )
        slots = [*self.parts, *[(CONTROL,)] * (n_slots - len(self.parts))]
        width = math.lcm(*map(len, slots))
        return tuple(name for slot in slots for name in slot for _ in range(width // len(slot)))


def resolve_unknown(
    parts: Sequence[str],
    known: Collection[str],
    policy: OnUnknown = "error",
    vectors: Mapping[str, Any] | None = None,
    *,
    trained: Collection[str] | None = None,
) -> Resolved:
    """What stands for the parts of a condition that a model does not know.

    Args:
        parts: canonical names.
        known: names that need no stand-in, see `known_names`.
        policy: "error" raises; "mean" takes the mean embedding of all trained perturbations; "nearest" takes the
            nearest trained dose (by ratio) of the same drug, else the trained perturbation of the nearest vector
            (Euclidean).
        vectors: external vectors by name, for "nearest".
        trained: names of training perturbations, the stand-ins; None takes `known`.

    Raises:
        ValueError: an unknown part under "error"; under "nearest" one without vector and of no trained drug; no trained
            perturbation at all.
    """
    one_of("policy", policy, ("error", "mean", "nearest"))
    known, stand_ins = set(known), sorted(known if trained is None else trained)
    resolved, replaced = [], {}
    for part in parts:
        if part in known:
            resolved.append((part,))
            continue
        if policy == "error":
            raise ValueError(
                f"perturbation {part!r} is not known to the model: it was in no training population."
                f"{suggestion(part, known)} It knows {listed(sorted(known), 10) or 'none'}. on_unknown='mean' or "
                "'nearest' would let another stand for it."
            )
        if not stand_ins:
            raise ValueError(f"perturbation {part!r} is not known, and there is no trained one to stand for it.")
        if policy == "mean":
            resolved.append(tuple(stand_ins))
            replaced[part] = f"mean of {len(stand_ins)} trained perturbations"
        else:
            near = _nearest_dose(part, stand_ins) or _nearest_vector(part, stand_ins, vectors)
            resolved.append((near,))
            replaced[part] = near
    return Resolved(tuple(resolved), replaced)


def _nearest_dose(part: str, stand_ins: Sequence[str]) -> str | None:
    drug, dose = dose_of(part)
    if dose is None:
        return None
    same = [(name, other) for name, (d, other) in zip(stand_ins, map(dose_of, stand_ins), strict=True) if d == drug]
    same = [(name, other) for name, other in same if other is not None]
    if not same:
        return None
    if dose > 0 and all(other > 0 for _, other in same):  # doses are spaced by factors
        return min(same, key=lambda pair: abs(math.log(pair[1] / dose)))[0]
    return min(same, key=lambda pair: abs(pair[1] - dose))[0]


def _nearest_vector(part: str, stand_ins: Sequence[str], vectors: Mapping[str, Any] | None) -> str:
    if not vectors:
        raise ValueError(
            f"on_unknown='nearest': nothing tells what is near {part!r}; it is no dose of a trained drug, and there "
            f"are no external vectors (DataSpec.vectors). Use on_unknown='mean'."
        )
    if part not in vectors:
        raise ValueError(
            f"on_unknown='nearest': {part!r} has no vector.{suggestion(part, vectors)} Add it or use on_unknown='mean'."
        )
    candidates = [name for name in stand_ins if name in vectors]
    if not candidates:
        raise ValueError(f"on_unknown='nearest': no trained perturbation has a vector; {part!r} has no neighbour.")
    here = np.asarray(vectors[part], np.float64)
    away = [float(np.linalg.norm(np.asarray(vectors[name], np.float64) - here)) for name in candidates]
    return candidates[int(np.argmin(away))]


class CellKinds(NamedTuple):
    """What the obs columns of perturbation, dose and covariates say. Cells that agree in all of them are of one kind.

    Attributes:
        kind: of each cell.
        populations: of each kind; where it could not be read, that of the controls stands in.
        spellings: of each kind, the names in the order of the data; ("A", "control") for A alone.
        incomplete: kinds without a value in a column other than the dose.
        problems, dose_problems: kinds that cannot be read for another reason, and the reason.
    """

    kind: Int[np.ndarray, " cells"]
    populations: list[Population]
    spellings: list[tuple[str, ...]]
    incomplete: set[int]
    problems: dict[int, str]
    dose_problems: dict[int, str]

    def is_sound(self, kind: int) -> bool:
        return not (kind in self.incomplete or kind in self.problems or kind in self.dose_problems)


def read_kinds(
    obs: Any,
    perturbation: str | tuple[str, ...],
    dose: str | tuple[str, ...] | None,
    covariates: tuple[str, ...],
    *,
    separator: str,
    control: tuple[str, ...],
) -> CellKinds:
    """The kinds of cells in an obs table, see DataSpec for the roles. Raises ValueError for a missing column only."""
    roles = {"perturbation": as_columns(perturbation), "dose": as_columns(dose), "covariates": covariates}
    for role, keys in roles.items():
        for key in keys:
            column(role, key, obs)
    seen: dict[tuple[str | None, ...], int] = {}
    values_of = zip(*(_words(obs[key]) for keys in roles.values() for key in keys), strict=True)
    kind = np.array([seen.setdefault(values, len(seen)) for values in values_of], np.int64)
    found = CellKinds(kind, [], [], set(), {}, {})
    n_names, n_doses = len(roles["perturbation"]), len(roles["dose"])
    for i, values in enumerate(seen):
        names, doses, context = values[:n_names], values[n_names : n_names + n_doses], values[n_names + n_doses :]
        parts, spelling = (), ()
        if None in names or None in context:
            found.incomplete.add(i)
        else:
            try:
                spelling = _spelling(names, doses, separator, control, joined=isinstance(perturbation, str))  # pyright: ignore[reportArgumentType]
                parts = tuple(sorted(name for name in spelling if name != CONTROL))
            except _DoseError as err:
                found.dose_problems[i] = f"dose: {err}"
            except ValueError as err:
                found.problems[i] = f"perturbation: {err}"
        for key, value in zip(covariates, context, strict=True):
            if value is not None and JOIN_CONTEXT in value:
                found.problems[i] = (
                    f"covariates: {value!r} of obs[{key!r}] holds {JOIN_CONTEXT!r}, which joins covariates. Rename it."
                )
        found.populations.append(Population(parts, JOIN_CONTEXT.join(value or "" for value in context)))
        found.spellings.append(spelling if len(spelling) != 1 or spelling == (CONTROL,) else (*spelling, CONTROL))
    return found


def as_columns(role: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if role is None else (role,) if isinstance(role, str) else role


class _DoseError(ValueError):
    pass


def _spelling(
    given: tuple[str, ...], doses: tuple[str | None, ...], separator: str, control: tuple[str, ...], *, joined: bool
) -> tuple[str, ...]:
    """The names, with doses, of one kind of cell, in the order of the data. The messages begin with the value."""
    whole = separator.join(given)
    names = [name.strip() for name in (given[0].split(separator) if joined else given)]
    for name in names:
        sign = next((sign for sign in (_JOIN, separator) if sign in name), None)
        if sign is not None:
            raise ValueError(f"{name!r} holds {sign!r}, which joins names. Rename this perturbation.")
    if CONTROL in names and CONTROL not in control:
        raise ValueError(f"{CONTROL!r} is a perturbation here, as control={control}. Add it to control, or rename it.")
    if doses and any(name not in control for name in names):
        names = _dosed(whole, names, doses, separator, control)
    try:
        canonical_parts(names, control)
    except ValueError as err:
        raise ValueError(f"{whole!r} {err}") from err
    return tuple(CONTROL if name in control else name for name in names)


def _dosed(
    whole: str, names: list[str], doses: tuple[str | None, ...], separator: str, control: tuple[str, ...]
) -> list[str]:
    if len(doses) < len(names):  # one column: a dose for all names, or one a name
        shared = doses[0] is None or as_number(doses[0]) is not None
        doses = doses * len(names) if shared else tuple(doses[0].split(separator))  # pyright: ignore[reportOptionalMemberAccess]
        if len(doses) != len(names):
            raise _DoseError(f"{separator.join(doses)!r} has {len(doses)} numbers for the {len(names)} of {whole!r}.")  # pyright: ignore[reportArgumentType]
    dosed = []
    for name, given in zip(names, doses, strict=True):
        if name in control or not name:
            dosed.append(name)
            continue
        number = as_number(given)
        if number is None or not (math.isfinite(number) and number > 0):
            what = "no value" if given is None else repr(given)
            mend = " A dose of zero is a control: give these cells its name." if number == 0 else ""
            raise _DoseError(f"{whole!r} has {what} for a dose, which must be a positive number.{mend}")
        dosed.append(with_dose(name, number))
    return dosed


def as_number(text: Any) -> float | None:
    """None where it is no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _words(values: Any) -> list[str | None]:
    """The values of an obs column as words, None where there is none."""
    missing = values.isna().to_numpy()
    return [None if gone else str(value) for value, gone in zip(values.to_numpy(dtype=object), missing, strict=True)]
