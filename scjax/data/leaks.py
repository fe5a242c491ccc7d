"""Leaks and traps of a split, found before they become a score: a table of rules, and `check_split`, which applies it.

    findings = check_split(adata, data.split, data.transform, spec=spec)
    print(findings.render())          each with what was seen, in numbers, and what to do
    findings.stop()                   ValueError where one of them is an error that nobody allowed

Training and evaluation do the same. A rule says what the data show; what they do not show (a file whose genes somebody
chose before) it can at most suspect.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Int

from scjax.check import listed, one_of
from scjax.data.conditions import CONTROL, dose_of, trained_names
from scjax.data.evidence import Evidence
from scjax.data.perturbation import unseen_axis
from scjax.data.preprocess import Transform
from scjax.data.spec import AnnData, DataSpec
from scjax.data.splits import HoldOutContexts, HoldOutGenes, PerturbationSplit, TimeSplit, UnseenSingles
from scjax.types import Population

__all__ = ["RULES", "Finding", "Findings", "Rule", "Severity", "check_allowed", "check_split"]

Severity: TypeAlias = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """What a rule found.

    Attributes:
        rule: its name.
        severity: "error", the score is not what it is called; "warning", it may not be; "note", what one should know
            to read it.
        evidence: what was seen, with numbers and examples.
        mend: what to do.
    """

    rule: str
    severity: Severity
    evidence: str
    mend: str


class Rule(NamedTuple):
    """A line of the table.

    Attributes:
        severity: the worst that it finds.
        looks_for: in words.
        find: its findings in a data set.
    """

    name: str
    severity: Severity
    looks_for: str
    find: Callable[[Evidence], Iterator[Finding]]


@dataclass(frozen=True)
class Findings:
    """What `check_split` found, errors first.

    Attributes:
        rules: the names of all rules that looked.
        allowed: rules whose errors somebody accepts.
    """

    found: tuple[Finding, ...]
    rules: tuple[str, ...]
    allowed: tuple[str, ...] = ()

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        one_of("severity", severity, get_args(Severity))
        return tuple(finding for finding in self.found if finding.severity == severity)

    def stop(self) -> None:
        """ValueError for errors that are not allowed; it names their rules."""
        errors = [finding for finding in self.of("error") if finding.rule not in self.allowed]
        if errors:
            names = tuple(dict.fromkeys(finding.rule for finding in errors))
            listed = "\n".join(f"  {e.rule}: {e.evidence} {e.mend}" for e in errors)
            raise ValueError(
                f"check_split: {_number(len(errors), 'leak')} in the data or the split:\n{listed}\n"
                f"Where that is meant, allow_leaks={list(names)} accepts it, which is recorded."
            )

    def render(self) -> str:
        """A line that counts, then a finding and its mend on a line each."""
        counts = ", ".join(_number(len(self.of(severity)), severity) for severity in get_args(Severity))
        lines = [f"check_split: {len(self.rules)} rules; {counts}"]
        for finding in self.found:
            allowed = " (allowed)" if finding.severity == "error" and finding.rule in self.allowed else ""
            lines += [f"  {finding.severity}{allowed} {finding.rule}: {finding.evidence}", f"    {finding.mend}"]
        return "\n".join(lines)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and words; `from_json_dict` reads it."""
        return {
            "rules": list(self.rules),
            "allowed": list(self.allowed),
            "found": [finding._asdict() for finding in self.found],
        }

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> "Findings":
        found = tuple(Finding(**finding) for finding in values["found"])
        return cls(found, tuple(values["rules"]), tuple(values["allowed"]))


def check_split(
    adata: AnnData,
    split: TimeSplit | PerturbationSplit,
    transform: Transform | None = None,
    *,
    spec: DataSpec,
    part: Int[np.ndarray, " cells"] | None = None,
    digests: tuple[str, str] | None = None,
    allowed: Sequence[str] = (),
) -> Findings:
    """All rules applied to a data set under a split. `spec.check(adata)` is the caller's; join several files first.

    A pass or two over the matrix in parts, and one more over the training cells where genes were chosen.

    Args:
        transform: as it was fitted; without it nothing is said of genes chosen, scaling and PCA.
        part: int8[cells] as `CellSetData.part` has it, where cells of one population are in different parts.
        digests: of these data and of those that a checkpoint was trained on, to be compared.
        allowed: rules whose errors do not stop anything (`Findings.stop`).

    Raises:
        ValueError: an unknown name in `allowed`, a part of another length, populations or times that cannot be read.
    """
    check_allowed(allowed)
    if part is not None and len(part) != adata.n_obs:
        raise ValueError(f"part must have an entry for each of the {adata.n_obs} cells; got {len(part)}.")
    evidence = Evidence(adata=adata, spec=spec, split=split, transform=transform, given_part=part, digests=digests)
    found = [finding for rule in RULES for finding in rule.find(evidence)]
    found.sort(key=lambda finding: get_args(Severity).index(finding.severity))
    return Findings(tuple(found), tuple(rule.name for rule in RULES), tuple(allowed))


def check_allowed(names: Iterable[str]) -> None:
    """ValueError for a name that is no rule."""
    for name in names:
        one_of("allow_leaks", name, tuple(rule.name for rule in RULES))


_Seen: TypeAlias = tuple[Severity, str, str]  # severity, evidence, mend
_Find: TypeAlias = Callable[[Evidence], Iterator[_Seen]]
_rules: list[Rule] = []


def _rule(name: str, severity: Severity) -> Callable[[_Find], _Find]:
    """Puts a function into the table; its docstring is what the rule looks for."""

    def register(find: _Find) -> _Find:
        def findings(evidence: Evidence) -> Iterator[Finding]:
            for found, seen, mend in find(evidence):
                yield Finding(name, found, seen, mend)

        _rules.append(Rule(name, severity, " ".join(find.__doc__.split()), findings))  # pyright: ignore[reportOptionalMemberAccess]
        return find

    return register


# ---------------------------------------------------------------- the split itself


@_rule("test-in-training", "error")
def _test_in_training(e: Evidence) -> Iterator[_Seen]:
    """A population or a time that is both for training and for test."""
    if isinstance(e.split, TimeSplit):
        train, test = e.split.train, e.split.held_out
    else:
        train, test = e.parts["train"], e.parts["test"]
    both = sorted(set(train) & set(test))
    if both:
        yield (
            "error",
            f"{len(both)} of {len(set(test))} held-out {_units(e)} are in training too: {listed(both)}.",
            "Take them out of one part; split_times and split_populations make disjoint ones.",
        )


@_rule("test-as-validation", "error")
def _test_as_validation(e: Evidence) -> Iterator[_Seen]:
    """A population of the test, or of training, that also chooses the parameters as validation."""
    if e.is_series:
        return
    severities: dict[str, Severity] = {"test": "error", "train": "warning"}
    for other, severity in severities.items():
        both = sorted(set(e.parts["validation"]) & set(e.parts[other]))
        if both:
            yield (
                severity,
                f"{len(both)} of {len(set(e.parts['validation']))} validation populations are in {other} too: "
                f"{listed(both)}.",
                "Keep some of the training populations for validation (validation_fraction); the test is opened once.",
            )


@_rule("stale-split", "error")
def _stale_split(e: Evidence) -> Iterator[_Seen]:
    """Populations or times that the split names and the data lack, or the other way round: a split of other data."""
    if isinstance(e.split, TimeSplit):
        here, told = set(e.time.tolist()), set(e.split.times)
    else:
        here, told = set(e.populations), set().union(*e.parts.values())
    for names, what in ((told - here, "of the split, not of the data"), (here - told, "of the data, in no part")):
        if names:
            yield (
                "error",
                f"{_number(len(names), 'time' if e.is_series else 'population')} {what}: {listed(sorted(names))}.",
                "Make the split again from its rule on these data, or load the data that it was made for.",
            )


@_rule("same-perturbation-two-names", "error")
def _two_names(e: Evidence) -> Iterator[_Seen]:
    """Conditions of different parts that differ in case, blanks, hyphens or the sign that joins names only."""
    if not e.is_perturbed:
        return
    known = {_loose(name) for name in trained_names(e.populations)}
    part_of = {p: part for part, populations in e.parts.items() for p in populations if not p.is_control}
    alike: dict[tuple[str, ...], list[Population]] = defaultdict(list)
    for p in part_of:
        alike[_loose_parts(p, known)].append(p)
    leaks: dict[frozenset[str], str] = {}
    aliases: dict[frozenset[str], str] = {}
    for populations in alike.values():
        if len({p.perturbation for p in populations}) == 1:
            continue
        for one, other in itertools.combinations(populations, 2):
            if one.perturbation == other.perturbation:
                continue
            parts = {part_of[one], part_of[other]}
            is_leak = one.context == other.context and "test" in parts and len(parts) == 2
            names = frozenset((one.condition, other.condition))
            told = f"{one.condition!r} ({part_of[one]}) and {other.condition!r} ({part_of[other]})"
            (leaks if is_leak else aliases).setdefault(names, told)
    mend = "Give one perturbation one name, names joined by one sign, then split again."
    if leaks:
        told = listed(leaks.values())
        yield "error", f"{_number(len(leaks), 'held-out condition')} under another name: {told}.", mend
    told = [told for names, told in aliases.items() if names not in leaks]
    if told:
        yield "warning", f"{_number(len(told), 'pair')} of names for what looks like one: {listed(told)}.", mend


@_rule("control-by-another-name", "warning")
def _other_control(e: Evidence) -> Iterator[_Seen]:
    """Names that usually mean a control and count as a perturbation here."""
    if not e.is_perturbed:
        return
    known = set(e.spec.control_names) | {CONTROL}
    found = [n for n in trained_names(e.populations) if _loose(dose_of(n)[0]) in _CONTROLS and n not in known]
    if found:
        n = sum(count for p, count in e.n_cells_of.items() if set(found) & set(p.perturbation))
        yield (
            "warning",
            f"{listed(map(repr, found))} of {n} cells count as perturbations; control is "
            f"{' or '.join(map(repr, e.spec.control_names))}.",
            "Add the name to spec.control, if these cells are controls.",
        )


@_rule("seen-elsewhere", "warning")
def _seen_elsewhere(e: Evidence) -> Iterator[_Seen]:
    """Held-out populations whose perturbation training saw, in other contexts or in other combinations."""
    if not e.is_perturbed:
        return
    split = PerturbationSplit(rule=e.split.rule, **e.parts)  # pyright: ignore[reportArgumentType]
    train = {p for p in e.parts["train"] if not p.is_control}
    names, conditions, contexts = set(trained_names(train)), {p.perturbation for p in train}, {p.context for p in train}
    axis_of: dict[tuple[bool, ...], str] = {}  # of the first of its kind: there may be a hundred thousand populations
    axes: dict[str, list[Population]] = defaultdict(list)
    for p in e.parts["test"]:
        if not p.is_control and p not in train:  # else test-in-training says so
            kind = (names.issuperset(p.perturbation), p.perturbation in conditions, p.context in contexts)
            if kind not in axis_of:
                axis_of[kind] = unseen_axis(p, split)
            axes[axis_of[kind]].append(p)
    seen = {axis: some for axis, some in axes.items() if "perturbation" not in axis}
    if not seen:
        return
    told = "; ".join(f"{axis}: {len(some)} ({listed(some, 3)})" for axis, some in axes.items())
    n, n_seen = sum(map(len, axes.values())), sum(map(len, seen.values()))
    promised = isinstance(e.split.rule, UnseenSingles | HoldOutGenes)
    yield (
        "warning" if promised else "note",
        f"training saw the perturbations of {n_seen} of {n} held-out populations elsewhere; new in the test, {told}.",
        f"{type(e.split.rule).__name__} means unseen perturbations; hold out every population that has one of them."
        if promised
        else "Call it so. Compare with the mean effect in the other contexts, or with the sum of the single effects.",
    )


# ---------------------------------------------------------------- times


@_rule("start-time-scored", "error")
def _start_scored(e: Evidence) -> Iterator[_Seen]:
    """The time whose cells a simulation is given, or an earlier one, among those that are scored."""
    if isinstance(e.split, TimeSplit) and e.split.train:
        early = sorted(t for t in e.split.held_out if t <= min(e.split.train))
        if early:
            yield (
                "error",
                f"held-out times not after the first training time {min(e.split.train):g}, where simulations start: "
                f"{listed(early)}.",
                "Hold out later times; the start is given, not predicted.",
            )


@_rule("neighbouring-times", "warning")
def _neighbours(e: Evidence) -> Iterator[_Seen]:
    """A held-out time next to a training time, so that copying that one is a prediction."""
    if not isinstance(e.split, TimeSplit) or not e.split.held_out or not e.split.train:
        return
    usual = float(np.median(np.diff(sorted(set(e.split.times))))) if len(set(e.split.times)) > 1 else 0.0
    for t in e.split.held_out:
        near = min(e.split.train, key=lambda u: abs(u - t))
        if 0 < abs(near - t) < _NEAR * usual:
            yield (
                "warning",
                f"the held-out time {t:g} is {abs(near - t):.2g} from the training time {near:g}; times are usually "
                f"{usual:.2g} apart.",
                "Merge the two times, or hold out both.",
            )


# ---------------------------------------------------------------- what was fitted


@_rule("genes-from-test-cells", "error")
def _genes_from_test(e: Evidence) -> Iterator[_Seen]:
    """Kept genes, or a median total, that all cells give and the training cells do not."""
    origin = e.gene_choice
    if origin is None or not e.is_test.any():
        return
    if e.transform.preprocess.select_on == "all":  # pyright: ignore[reportOptionalMemberAccess]
        yield (
            "warning",
            f"select_on='all' let {int(e.is_test.sum())} held-out cells choose genes too; {origin.told}.",
            "Set preprocess.select_on='train'; keep 'all' for comparisons with numbers that were made so.",
        )
    elif origin.cells == "all cells":
        yield (
            "error",
            f"all {len(e.part)} cells, {int(e.is_test.sum())} held-out ones among them, choose the transform's genes: "
            f"{origin.told}.",
            "Fit the transform on the training cells.",
        )


@_rule("genes-chosen-before", "warning")
def _genes_before(e: Evidence) -> Iterator[_Seen]:
    """Data that hold variable genes only, chosen by nobody knows which cells."""
    if e.spec.space == "latent" or not e.is_test.any():
        return
    place, _, name = e.spec.expression.partition("/")
    mark = None
    if place == "obsm":
        mark = f"obsm[{name!r}]" if re.search("hvg|variable", name, re.IGNORECASE) else None
    else:
        for column in e.adata.var:
            values = e.adata.var[column]
            if values.dtype == bool and values.all() and re.search("hvg|highly_variable$", str(column)):
                mark = f"var[{column!r}], which is true of all"
    if mark is not None:
        yield (
            "warning",
            f"the {len(e.features)} genes were chosen as variable ones ({mark}) before the split; if the "
            f"{int(e.is_test.sum())} held-out cells took part, the choice knows them.",
            "Give all genes and choose with preprocess.n_top_genes, or choose them on the training cells.",
        )


@_rule("scaling-from-test-cells", "error")
def _scaling_from_test(e: Evidence) -> Iterator[_Seen]:
    """Means, standard deviations or a PCA that are those of all cells and not those of the training cells."""
    origin = e.scaling
    if origin is not None and origin.cells == "all cells":
        yield (
            "error",
            f"scaling or PCA are those of all {len(e.part)} cells, {int(e.is_test.sum())} held-out ones among them; "
            f"{origin.told}.",
            "Fit the transform on the training cells.",
        )


@_rule("embedding-from-test-cells", "error")
def _embedding(e: Evidence) -> Iterator[_Seen]:
    """A latent that was fitted on held-out cells, as a PCA shows, or on nobody knows which cells."""
    if e.spec.space != "latent" or not e.is_test.any() or e.is_train.sum() < 3:
        return
    name, n_test = e.spec.expression, int(e.is_test.sum())
    train, every = (e.projection(np.flatnonzero(rows)) for rows in (e.is_train, np.ones_like(e.is_train)))
    mend = (
        "Give the genes and let preprocess.n_components fit a PCA on the training cells, or fit the embedding on them."
    )
    if e.matrix.shape[1] > 1 and train.is_of_its_fit:
        return
    if e.matrix.shape[1] > 1 and every.is_of_its_fit:
        yield (
            "error",
            f"{name!r} is a PCA of all cells, {n_test} held-out ones among them: over all of them its coordinates have "
            f"mean 0 and no correlation, over the training cells a mean up to {train.mean:.2g} standard deviations and "
            f"correlations up to {train.correlation:.2g}.",
            mend,
        )
    else:
        yield (
            "warning",
            f"{name!r} was made outside; whether the {n_test} held-out cells took part cannot be seen.",
            mend,
        )


@_rule("stale-transform", "error")
def _stale_transform(e: Evidence) -> Iterator[_Seen]:
    """A transform that neither the training cells nor all cells give: another split, another version of the data."""
    if e.transform is None:
        return
    mend = "Fit it again on the training cells of these data, or load the data that it was fitted on."
    if e.missing_genes:
        yield (
            "error",
            f"the data lack {len(e.missing_genes)} of the transform's {len(e.transform.input_names)} genes: "
            f"{listed(e.missing_genes)}.",
            mend,
        )
    genes = e.gene_choice if e.transform.preprocess.select_on == "train" else None
    for what, origin in (("genes", genes), ("scaling or PCA", e.scaling)):
        if origin is not None and origin.cells == "other cells":
            yield "error", f"the {what} of the transform are of other cells; {origin.told}.", mend


@_rule("stale-data", "error")
def _stale_data(e: Evidence) -> Iterator[_Seen]:
    """Data that are not those of the checkpoint."""
    if e.digests is not None and e.digests[0] != e.digests[1]:
        yield (
            "error",
            f"the digest of these data is {e.digests[0]}, that of the checkpoint's {e.digests[1]}.",
            "Evaluate on the data of the training, or train again.",
        )


@_rule("targets-among-features", "note")
def _targets(e: Evidence) -> Iterator[_Seen]:
    """Genes that held-out conditions perturb among the genes that are compared."""
    if not e.is_perturbed:
        return
    genes = set(e.features if e.transform is None else e.transform.feature_names)
    targets = {dose_of(name)[0] for name in trained_names(e.parts["test"])}
    found = sorted(targets & genes)
    if found:
        yield (
            "note",
            f"{len(found)} of the {len(targets)} perturbed genes of the test are among the {len(genes)} features "
            f"({listed(found)}); their own level tells which perturbation it is.",
            "Read discrimination scores without the target genes beside those with them.",
        )


@_rule("zero-vectors", "error")
def _zero_vectors(e: Evidence) -> Iterator[_Seen]:
    """External vectors that are all zero, or the same for two perturbations: unknown ones that pass for known."""
    if not e.is_perturbed or e.spec.vectors is None:
        return
    test, train = trained_names(e.parts["test"]), set(trained_names(e.parts["train"]))
    vectors = e.spec.vectors_of({*test, *train}, e.spec.read_vectors(e.adata))
    own = {n: v if e.spec.vector_dose == "name" else v[:-1] for n, v in vectors.items()}  # a dose is never zero
    mend = f"Correct uns[{e.spec.vectors!r}], or hold out nothing that has no vector (on_unknown says what to do)."
    parts: tuple[tuple[set[str], Severity], ...] = ((set(test), "error"), (train - set(test), "warning"))
    for names, severity in parts:
        zero = sorted(n for n in names if n in vectors and not np.any(own[n]))
        if zero:
            part = "held-out" if severity == "error" else "training"
            n_zero = _number(len(zero), f"{part} perturbation")
            yield severity, f"{n_zero} with a vector of zeros: {listed(zero)}.", mend
    same: dict[bytes, list[str]] = defaultdict(list)
    for name in sorted({*test, *train}):
        if name in vectors and np.any(own[name]):
            same[vectors[name].tobytes()].append(name)
    twins = ["=".join(names) for names in same.values() if len(names) > 1 and set(test) & set(names)]
    if twins:
        yield (
            "warning",
            f"{_number(len(twins), 'vector')} of held-out perturbations are those of others too: {listed(twins)}.",
            "The model cannot tell them apart. Give each its own, or read them as one.",
        )


# ---------------------------------------------------------------- cells


@_rule("duplicates-across-parts", "error")
def _duplicates_across(e: Evidence) -> Iterator[_Seen]:
    """Held-out cells whose expression is, value for value, that of a training cell."""
    found, ok = _comparable(e)
    train, test = np.flatnonzero(e.is_train & ok), np.flatnonzero(e.is_test & ok)
    copies = test[np.isin(found[test], found[train])]
    if len(copies):
        share, names = len(copies) / int(e.is_test.sum()), e.adata.obs_names
        first = [(i, train[np.argmax(found[train] == found[i])]) for i in copies[:3]]
        yield (
            "error" if share >= _MANY_COPIES else "warning",
            f"{len(copies)} of {int(e.is_test.sum())} held-out cells ({share:.2%}) are copies of training cells: "
            f"{listed([f'{names[i]}={names[j]}' for i, j in first], 3)}.",
            "Remove the copies before splitting; cells that were counted or padded twice are no new cells.",
        )


@_rule("duplicates-within-part", "warning")
def _duplicates_within(e: Evidence) -> Iterator[_Seen]:
    """Cells that occur more than once in a part."""
    found, ok = _comparable(e)
    told = []
    for part, mask in (("training", e.is_train), ("test", e.is_test)):
        rows = np.flatnonzero(mask & ok)
        n = len(rows) - len(np.unique(found[rows]))
        if n:
            told.append(f"{n} of {int(mask.sum())} {part} cells")
    if told:
        yield (
            "warning",
            f"{' and '.join(told)} repeat the expression of another one of their part.",
            "Remove the copies; they make populations look larger and differences surer than they are.",
        )


@_rule("shared-controls", "note")
def _shared_controls(e: Evidence) -> Iterator[_Seen]:
    """Control cells that training sees and predictions of the test start from."""
    if not e.is_perturbed or not e.is_test.any():
        return
    contexts = {p.context for p in e.parts["test"]}
    n = sum(count for p, count in e.n_cells_of.items() if p.is_control and p.context in contexts)
    here = np.array([p.is_control and p.context in contexts for p in e.populations])[e.population_of]
    shared = int((here & e.is_shared).sum())
    if shared:
        yield (
            "note",
            f"{shared} of the {n} control cells of held-out contexts are in training; predictions start from "
            "them and are compared with them.",
            "Say so. Cell sets can divide them (control_seed), HoldOutContexts holds them out with their context.",
        )


@_rule("no-own-controls", "warning")
def _no_controls(e: Evidence) -> Iterator[_Seen]:
    """Held-out populations without control cells in their own context."""
    if not e.is_perturbed:
        return
    controlled = {p.context for p in e.populations if p.is_control}
    test = [p for p in sorted(set(e.parts["test"])) if not p.is_control]
    alone = [p for p in test if p.context not in controlled]
    if alone:
        yield (
            "warning",
            f"{len(alone)} of {len(test)} held-out populations have no control cells of their context: "
            f"{listed(alone)}.",
            "Their effect is measured against other cells' controls; match within fewer covariates, or leave them out.",
        )


@_rule("controls-differ", "note")
def _controls_differ(e: Evidence) -> Iterator[_Seen]:
    """Control cells of a held-out context unlike those of every context in which training saw perturbations."""
    if not e.is_perturbed:
        return
    trained = {p.context for p in e.parts["train"] if not p.is_control}
    new = {p.context for p in e.parts["test"]} - trained
    controlled = {p.context for p in e.populations if p.is_control}
    if not new & controlled or not trained & controlled or e.spec.space == "latent":
        return
    contexts, mean = e.control_profiles()
    mean = mean - mean.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    mean = mean / np.where(norm > 0, norm, 1.0)
    seen = [i for i, context in enumerate(contexts) if context in trained]
    far = []
    for i, context in enumerate(contexts):
        if context in new:
            nearest = seen[int(np.argmax(mean[seen] @ mean[i]))]
            r = float(mean[nearest] @ mean[i])
            if r < _ALIKE:
                far.append(f"{context!r} (nearest {contexts[nearest]!r}, correlation {r:.2f})")
    if far:
        yield (
            "note",
            f"the controls of {len(far)} of {len(new)} held-out contexts are unlike those of any context with training "
            f"perturbations: {listed(far)}.",
            "A prediction there is an extrapolation; compare with the control itself as a baseline.",
        )


@_rule("batch-confounded", "warning")
def _confounded(e: Evidence) -> Iterator[_Seen]:
    """Held-out populations or times that were measured only in batches of which training has no cell."""
    columns = [e.spec.batch] if e.spec.batch is not None else [c for c in e.adata.obs if str(c).lower() in _BATCHES]
    meant = e.split.rule.covariates if isinstance(e.split.rule, HoldOutContexts) else ()
    for column in columns:
        if column in meant or column not in e.adata.obs:
            continue
        measured = e.adata.obs[column].astype("category").cat
        values, codes = list(measured.categories), measured.codes.to_numpy()
        if (codes < 0).any() or len(values) > len(codes) / 2:
            continue  # not known of all cells, or names of cells
        trained = np.isin(np.arange(len(values)), codes[e.is_train])
        alone = {name: rows for name, rows in e.held_out_groups.items() if not trained[codes[rows]].any()}
        if alone:
            which = sorted({str(values[c]) for rows in alone.values() for c in np.unique(codes[rows])})
            yield (
                "warning",
                f"{len(alone)} of {len(e.held_out_groups)} held-out {_units(e)} ({listed(alone)}) are only in values "
                f"of obs[{column!r}] that training has not ({listed(which)}).",
                "Batch and effect cannot be told apart there; hold out what was measured beside training cells.",
            )


@_rule("few-held-out-cells", "warning")
def _few_cells(e: Evidence) -> Iterator[_Seen]:
    """Held-out populations or times of so few cells that a score is mostly noise."""
    few = {name: len(rows) for name, rows in e.held_out_groups.items() if len(rows) < _FEW_CELLS}
    if few:
        told = [f"{name} {n}" for name, n in sorted(few.items(), key=lambda item: item[1])]
        yield (
            "warning",
            f"{len(few)} of {len(e.held_out_groups)} held-out {_units(e)} have fewer than {_FEW_CELLS} cells: "
            f"{listed(told)}.",
            "Read their scores beside the real-against-real row, or leave them out.",
        )


@_rule("small-training", "error")
def _small_training(e: Evidence) -> Iterator[_Seen]:
    """Nothing, or hardly anything, to train on."""
    n_train, n_test = int(e.is_train.sum()), int(e.is_test.sum())
    if e.is_series:
        word, least, units = "time", 2, set(e.split.train) & set(e.time.tolist())
    elif e.is_perturbed:
        word, least, units = "condition", 1, {p.perturbation for p in e.parts["train"] if not p.is_control}
    else:
        word, least, units = "population", 1, set(e.parts["train"])
    told = f"training has {_number(len(units), word)} and {n_train} cells, {n_test} cells are held out."
    if len(units) < least or n_train < 2:
        yield "error", told, "Hold out less."
    elif n_train < min(_SMALL, n_test):
        yield "warning", told, "Hold out less, or do not expect much."


# ---------------------------------------------------------------- values


@_rule("space-declared-wrong", "error")
def _wrong_space(e: Evidence) -> Iterator[_Seen]:
    """Integers that are called log-normalised or a latent, and normalised counts without their logarithm."""
    if e.spec.space == "counts":
        return  # spec.check refuses fractions
    x = _sample(e)
    stored = x[x != 0]
    if stored.size and (stored == np.round(stored)).all() and stored.max() > 1:
        kind = "error" if e.spec.space == "lognormalised" else "warning"
        yield (
            kind,
            f"all values of {len(x)} cells are integers, up to {stored.max():g}, but space={e.spec.space!r}.",
            "They look like counts: set spec.space='counts', or take logarithms first.",
        )
    elif e.spec.space == "lognormalised" and _multiples(x, 0) >= _MOST > _multiples(x, 1):
        yield (
            "error",
            f"in {len(x)} cells the values themselves are multiples of the smallest one ({_multiples(x, 0):.0%} of "
            f"them), not their exponentials, but space='lognormalised'.",
            "They look like normalised counts without the logarithm: apply log1p.",
        )


@_rule("logged-twice", "error")
def _logged_twice(e: Evidence) -> Iterator[_Seen]:
    """Log-normalised values of which the logarithm was taken again."""
    if e.spec.space != "lognormalised":
        return
    x = _sample(e)
    if (x < 0).any() or x.max(initial=0.0) > _LARGEST_TWICE:
        return
    if _multiples(x, 2) >= _MOST > max(_multiples(x, 1), _multiples(x, 0)):
        yield (
            "error",
            f"in {len(x)} cells exp(exp(x) - 1) - 1 gives multiples of the smallest value ({_multiples(x, 2):.0%} of "
            f"them), exp(x) - 1 does not; the largest value is {x.max():.2g}.",
            "Take the counts, or undo one logarithm (numpy.expm1).",
        )


RULES: tuple[Rule, ...] = tuple(_rules)


_CONTROLS = {
    *(
        "control",
        "ctrl",
        "controls",
        "nontargeting",
        "nontarget",
        "nt",
        "ntc",
        "safetargeting",
        "scramble",
        "scrambled",
    ),
    *("dmso", "dmsotf", "vehicle", "untreated", "unperturbed", "unstimulated", "mock", "pbs", "none", "wildtype", "wt"),
}
_BATCHES = {"batch", "donor", "sample", "plate", "lane", "gem_group", "library", "replicate", "run", "sequencing_batch"}
_NEAR = 0.05  # of the usual distance of two times
_MANY_COPIES = 0.01  # of the held-out cells
_LEAST_VALUES = 5  # that are not zero: cells with fewer can agree by chance
_FEW_CELLS = 20
_SMALL = 500  # training cells; with more it does not matter that the test is larger
_ALIKE = 0.9  # correlation of mean profiles
_MOST = 0.9  # of the values
_SAMPLE = 256  # cells whose values are looked at
_LARGEST_TWICE = 4.0  # log1p of log1p of 1e21


def _units(e: Evidence) -> str:
    return "times" if e.is_series else "populations"


def _number(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _loose(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"[\s_-]", "", name.casefold())


def _loose_parts(p: Population, known: Collection[str]) -> tuple[str, ...]:
    """Of a condition, names that another sign joins taken apart where each of them is a name of its own."""
    parts = []
    for name in p.perturbation:
        pieces = [_loose(piece) for piece in re.split(r"[_|;,/&:]", name)]
        pieces = [piece for piece in pieces if piece not in _CONTROLS]
        is_joined = re.search(r"[_|;,/&:]", name) and pieces and all(piece in known for piece in pieces)
        parts += pieces if is_joined else [_loose(name)]
    return tuple(sorted(parts))


def _comparable(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints, and the cells that have enough values to be told apart by them."""
    found, n_nonzero = e.fingerprints
    return found, n_nonzero >= (1 if e.spec.space == "latent" else _LEAST_VALUES)


def _sample(e: Evidence) -> np.ndarray:
    n = len(e.part)
    return e.dense(np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64))).astype(np.float64)


def _multiples(x: np.ndarray, n_logs: int) -> float:
    """The median over cells of the share of values that are whole multiples of the cell's smallest one, where `n_logs`
    logarithms are undone first: 1 for counts that were scaled and logged so often.
    """
    shares = []
    for cell in x:
        values = cell[cell > 0]
        for _ in range(n_logs):
            values = np.expm1(values)
        if not len(values):
            continue
        ratio = values / values.min()
        ratio = ratio[(ratio > 1.5) & (ratio < 100)]
        if len(ratio):
            shares.append(float(np.mean(np.abs(ratio - np.round(ratio)) < 1e-4 * ratio)))
    return float(np.median(shares)) if shares else 0.0
