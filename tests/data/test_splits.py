"""Rules resolve to the times or populations they promise; the first time and the controls are never held out."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from scjax.config import from_dict, override, to_dict
from scjax.data.splits import (
    AdditiveSplit,
    ComboSciPlexSplit,
    HoldOutConditions,
    HoldOutContexts,
    HoldOutCrossed,
    HoldOutGenes,
    HoldOutInterior,
    HoldOutLast,
    HoldOutNone,
    HoldOutPopulations,
    HoldOutSeenDoubles,
    HoldOutTimes,
    LeaveOut,
    PerturbationSplit,
    PerturbationSplitRule,
    ReferenceSplit,
    TimeSplit,
    UnseenSingles,
    each_interior,
    load_split,
    save_split,
    split_populations,
    split_times,
)
from scjax.types import Population

DAYS = (0.0, 2.0, 4.0, 7.0)
RULES = [
    (HoldOutNone(), ()),
    (HoldOutTimes(times=(4.0,)), (4.0,)),
    (HoldOutInterior(), (2.0, 4.0)),
    (HoldOutLast(n_times=2), (4.0, 7.0)),
]


@pytest.mark.parametrize(("rule", "held_out"), RULES)
def test_rules(rule, held_out):
    split = split_times(rule, DAYS)
    assert split.held_out == held_out
    assert split.train == tuple(t for t in DAYS if t not in held_out)
    assert split.times == DAYS
    assert split.rule == rule


def test_interior_times_in_turn():
    assert each_interior(DAYS) == (HoldOutTimes(times=(2.0,)), HoldOutTimes(times=(4.0,)))


@pytest.mark.parametrize(
    ("dataset", "name", "n_times", "held_out"),
    [
        ("ZB", "three_interpolation", 12, (4, 6, 8)),
        ("ZB", "two_forecasting", 12, (10, 11)),
        ("ZB", "remove_recovery", 12, (2, 4, 6, 8, 10, 11)),
        ("ZB", "all_times", 12, ()),
        ("MEF", "three_interpolation", 19, (5, 10, 15)),
        ("MEF", "three_forecasting", 19, (16, 17, 18)),
        ("MEF", "remove_recovery", 19, (5, 7, 9, 11, 15, 16, 17, 18)),
        ("MEF", "all_times", 19, ()),
        ("Panc", "all_times", 8, ()),
        *[("Panc", f"leaveout{k}", 8, (k,)) for k in range(1, 8)],
    ],
)
def test_splits_of_the_reference(dataset, name, n_times, held_out):
    times = [3.3 + i**1.5 for i in range(n_times)]
    split = split_times(ReferenceSplit(dataset=dataset, name=name), times)
    assert [times.index(t) for t in split.held_out] == list(held_out)
    assert len(split.train) + len(held_out) == n_times


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_times(HoldOutTimes(times=(0.0,)), DAYS), "first time, 0.0, cannot be held out: .* the start"),
        (lambda: split_times(HoldOutTimes(times=(3.0,)), DAYS), "3.0 is not a time of the data, which are 0.0, 2.0"),
        (lambda: split_times(HoldOutLast(n_times=4), DAYS), "first time"),
        (lambda: split_times(HoldOutLast(n_times=3), DAYS), "leaves 1 of 4 times"),
        (lambda: split_times(HoldOutInterior(), (0.0, 1.0)), "no interior time"),
        (lambda: each_interior((0.0, 1.0)), "no interior time"),
        (lambda: split_times(ReferenceSplit(dataset="Panc", name="leaveout1"), DAYS), "Panc has 8 times, .* have 4"),
        (lambda: split_times(HoldOutNone(), (0.0, 2.0, 2.0)), "repeated"),
        (lambda: ReferenceSplit(dataset="Panc", name="leaveout8"), "name must be one of .*leaveout7"),
        (lambda: HoldOutLast(n_times=0), "n_times must be at least 1"),
        (lambda: HoldOutTimes(times=()), "use HoldOutNone"),
    ],
)
def test_bad_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_time_stored_in_single_precision_is_recognised():
    assert split_times(HoldOutTimes(times=(0.1,)), (0.0, 0.10000000149011612, 1.0)).held_out == (0.10000000149011612,)


@pytest.mark.parametrize("rule", [r for r, _ in RULES])
def test_json_round_trip_and_no_overwriting(rule, tmp_path):
    split = split_times(rule, DAYS)
    assert from_dict(TimeSplit, to_dict(split)) == split
    save_split(tmp_path / "split.json", split)
    assert load_split(tmp_path / "split.json") == split
    with pytest.raises(FileExistsError):
        save_split(tmp_path / "split.json", split)


NAMES = tuple("ABCDEFGHIJ")
CONTROL = Population(())
SINGLES = [Population((a,)) for a in NAMES]
DOUBLES = [Population(pair) for pair in itertools.combinations(NAMES, 2)]
POPULATIONS = [CONTROL, *SINGLES, *DOUBLES]
LINES = [
    Population(names, f"{line} | {batch}")
    for names in ((), ("A",), ("B",), ("A", "B"))
    for line in ("A172", "T98G")
    for batch in ("1", "2")
]
PERTURBATION_RULES = [
    (AdditiveSplit(fold=1), POPULATIONS),
    (HoldOutGenes(fold=0, n_doubles=2), POPULATIONS),
    (HoldOutGenes(fold=0, n_doubles=2, follow="code"), POPULATIONS),
    (UnseenSingles(n_genes=3), POPULATIONS),
    (HoldOutSeenDoubles(), POPULATIONS),
    (HoldOutConditions(conditions=("B+A", "C")), POPULATIONS),
    (HoldOutPopulations(populations=(("A", "A172 | 1"), ("B+A", "T98G | 2"))), LINES),
    (LeaveOut(covariate="line", value="T98G"), LINES),
    (HoldOutCrossed(covariates=("batch",), values=(("1",),), conditions=("A", "B+A")), LINES),
]


def split_by(rule, populations):
    return split_populations(rule, populations, ("line", "batch") if populations is LINES else ())


def conditions(part):
    return {p.condition for p in part}


@pytest.mark.parametrize(("rule", "populations"), PERTURBATION_RULES)
def test_every_population_is_in_one_part_and_controls_are_for_training(rule, populations):
    for rule in (rule, replace(rule, validation_fraction=0.4)):  # noqa: B020, PLW2901
        split = split_by(rule, populations)
        parts = (*split.train, *split.validation, *split.test)
        assert len(parts) == len(set(parts)) == len(populations)
        assert split.populations == tuple(sorted(populations))
        assert not any(p.is_control for p in (*split.validation, *split.test))
        assert split.test
        assert bool(split.validation) == bool(rule.validation_fraction)
        for part in (split.train, split.validation, split.test):
            assert part == tuple(sorted(part))


@pytest.mark.parametrize(("rule", "populations"), PERTURBATION_RULES)
def test_the_order_of_the_populations_does_not_matter(rule, populations):
    rule = replace(rule, validation_fraction=0.4)
    shuffled = [populations[i] for i in np.random.default_rng(0).permutation(len(populations))]
    covariates = ("line", "batch") if populations is LINES else ()
    assert split_populations(rule, shuffled, covariates) == split_populations(rule, populations, covariates)


@pytest.mark.parametrize(("rule", "populations"), PERTURBATION_RULES)
def test_validation_is_drawn_from_training_and_leaves_the_test_alone(rule, populations):
    plain = split_by(rule, populations)
    validated = [
        split_by(replace(rule, validation_fraction=0.4, validation_seed=seed), populations) for seed in range(6)
    ]
    for split in validated:
        assert split.test == plain.test
        assert set(split.validation) < set(plain.train)
    assert len({split.validation for split in validated}) > 1  # the seed chooses


@pytest.mark.parametrize(("rule", "populations"), PERTURBATION_RULES)
def test_json_round_trip_of_populations(rule, populations, tmp_path):
    split = split_by(replace(rule, validation_fraction=0.4), populations)
    assert PerturbationSplit.from_dict(json.loads(json.dumps(to_dict(split)))) == split
    save_split(tmp_path / "split.json", split)
    again = load_split(tmp_path / "split.json")
    assert again == split
    assert isinstance(again.test[0], Population)
    with pytest.raises(FileExistsError):
        save_split(tmp_path / "split.json", split)


def test_a_rule_is_chosen_by_its_kind():
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        rule: PerturbationSplitRule

    settings = Settings(rule=AdditiveSplit(fold=2))
    assert from_dict(Settings, to_dict(settings)) == settings
    changed = override(settings, {"rule.kind": "LeaveOut", "rule.covariate": "line", "rule.value": "T98G"})
    assert changed.rule == LeaveOut(covariate="line", value="T98G")


def test_additive_holds_out_combinations_only():
    splits = [split_populations(AdditiveSplit(fold=fold), POPULATIONS) for fold in range(5)]
    assert len({split.test for split in splits}) == 5
    for split in splits:
        assert len(split.test) == int(0.3 * len(DOUBLES))
        assert set(SINGLES) < set(split.train)
    # seed and fold are added
    assert split_populations(AdditiveSplit(fold=0, seed=44), POPULATIONS).test == splits[2].test
    assert len(split_populations(AdditiveSplit(test_fraction=0.5), POPULATIONS).test) == len(DOUBLES) // 2


def test_a_combination_is_held_out_in_every_context():
    populations = [Population(p.perturbation, line) for p in POPULATIONS for line in ("x", "y")]
    alone = split_populations(AdditiveSplit(), POPULATIONS)
    both = split_populations(AdditiveSplit(validation_fraction=0.2), populations, ("line",))
    assert conditions(both.test) == conditions(alone.test)
    assert len(both.test) == 2 * len(alone.test)
    assert len(both.validation) == 2 * len(conditions(both.validation)) == 2 * int(0.2 * (55 - len(alone.test)))


def test_the_spelling_of_the_data_decides_a_fold_as_it_does_in_the_code():
    """B+A sorts behind all A+..., so that the shuffle puts other doubles first."""
    written = [p.perturbation[::-1] if p.perturbation == ("A", "B") else p.perturbation for p in POPULATIONS[1:]]
    doubles = sorted("+".join(names) for names in written if len(names) == 2)
    np.random.RandomState(42).shuffle(doubles)
    expected = {"+".join(sorted(name.split("+"))) for name in doubles[: int(0.3 * 45)]}
    split = split_populations(AdditiveSplit(), POPULATIONS, written=written)
    assert conditions(split.test) == expected
    assert split.test != split_populations(AdditiveSplit(), POPULATIONS).test


def test_two_spellings_are_one_condition():
    """Of 46 spelled doubles 13 are test; a double that is written twice counts as held out if one of them is."""
    twice = {names for fold in range(5) for names in held_out_twice(fold)}
    assert twice == {("A", "B")}


def held_out_twice(fold):
    written = [*(p.perturbation for p in POPULATIONS), ("B", "A")]
    spelled = sorted("+".join(names) for names in written if len(names) == 2)
    np.random.RandomState(42 + fold).shuffle(spelled)
    split = split_populations(AdditiveSplit(fold=fold), POPULATIONS, written=written)
    assert conditions(split.test) == {"+".join(sorted(name.split("+"))) for name in spelled[:13]}
    return [p.perturbation for p in split.test if p.perturbation == ("A", "B")]


@pytest.mark.parametrize("fold", range(5))
def test_held_out_genes_as_the_paper_means_them(fold):
    rule = HoldOutGenes(fold=fold, n_doubles=2)
    split = split_populations(rule, POPULATIONS)
    code = split_populations(replace(rule, follow="code"), POPULATIONS)
    genes = {p.condition for p in code.test if len(p.perturbation) == 1}
    assert conditions(split.test) == {p.condition for p in POPULATIONS if genes & set(p.perturbation)}
    assert len(code.test) == len(genes) + 2
    assert {name for p in code.test if len(p.perturbation) == 2 for name in p.perturbation} == genes
    assert conditions(code.test) - genes <= conditions(split_populations(AdditiveSplit(fold=fold), POPULATIONS).test)


def test_unseen_singles_take_their_combinations_with_them():
    splits = [split_populations(UnseenSingles(n_genes=2, seed=seed), POPULATIONS) for seed in range(5)]
    for split in splits:
        genes = {p.condition for p in split.test if len(p.perturbation) == 1}
        assert len(genes) == 2
        assert conditions(split.test) == {p.condition for p in POPULATIONS if genes & set(p.perturbation)}
    assert len({split.test for split in splits}) > 1


def test_seen_doubles_have_both_singles():
    populations = [CONTROL, *(Population(tuple(names)) for names in ("A", "B", "C", "AB", "AD", "DE", "ABC"))]
    assert conditions(split_populations(HoldOutSeenDoubles(), populations).test) == {"A+B"}


def test_leaving_out_a_value_of_a_covariate():
    for place, (covariate, value) in enumerate((("line", "T98G"), ("batch", "2"))):
        split = split_by(LeaveOut(covariate=covariate, value=value), LINES)
        expected = {p for p in LINES if p.context.split(" | ")[place] == value and not p.is_control}
        assert set(split.test) == expected
        assert {p for p in LINES if p.is_control} < set(split.train)
    # Validation then are single populations: their conditions stay in training in other contexts.
    split = split_by(LeaveOut(covariate="line", value="T98G", validation_fraction=0.2), LINES)
    assert len(split.validation) == 1
    assert conditions(split.validation) < conditions(split.train)


def test_named_conditions_in_any_spelling():
    for names in (("A+B", "C"), ("B+A", "C+control"), ("B + A", "ctrl+C")):
        assert conditions(split_populations(HoldOutConditions(conditions=names), POPULATIONS).test) == {"A+B", "C"}


def test_combosciplex():
    held_out = [
        ("Crizotinib", "Panobinostat"),
        ("Curcumin", "Panobinostat"),
        ("Panobinostat", "SRT1720"),
        ("Panobinostat", "Sorafenib"),
        ("Alvespimycin", "SRT2104"),
        ("Alvespimycin",),
        ("Dacinostat",),
    ]
    populations = [CONTROL, Population(("Panobinostat",)), *map(Population, held_out)]
    split = split_populations(ComboSciPlexSplit(), populations)
    assert {p.perturbation for p in split.test} == set(held_out)
    with pytest.raises(ValueError, match="'control.Dacinostat' is no condition of the data"):
        split_populations(ComboSciPlexSplit(), populations[:-1])


def test_conditions_crossed_with_contexts():
    rule = HoldOutCrossed(
        covariates=("batch",), values=(("1",),), conditions=("A", "A"), validation_conditions=("B+A", "A+B")
    )
    split = split_by(rule, LINES)
    assert set(split.test) == {Population(("A",), f"{line} | 1") for line in ("A172", "T98G")}
    assert set(split.validation) == {Population(("A", "B"), f"{line} | 1") for line in ("A172", "T98G")}
    assert {p for p in LINES if p.is_control} <= set(split.train)
    everywhere = replace(rule, conditions=None, validation_conditions=())
    assert set(split_by(everywhere, LINES).test) == {p for p in LINES if p.context.endswith("1") and not p.is_control}


def test_conditions_crossed_with_pairs_of_covariates():
    rule = HoldOutCrossed(covariates=("batch", "line"), values=(("1", "T98G"), ("2", "A172")), conditions=("A",))
    assert set(split_by(rule, LINES).test) == {Population(("A",), "T98G | 1"), Population(("A",), "A172 | 2")}


def test_a_condition_may_lack_cells_in_some_of_the_contexts():
    fewer = [p for p in LINES if p != Population(("A",), "T98G | 1")]
    rule = HoldOutCrossed(covariates=("batch",), values=(("1",),), conditions=("A",))
    assert split_populations(rule, fewer, ("line", "batch")).test == (Population(("A",), "A172 | 1"),)


def test_validation_of_contexts_that_are_all_test_otherwise():
    """The only other condition of the context is the one for validation."""
    only = [p for p in LINES if p.perturbation in ((), ("A",), ("B",))]
    rule = HoldOutCrossed(
        covariates=("batch",), values=(("1",), ("2",)), conditions=("A",), validation_conditions=("B",)
    )
    only.append(Population(("A", "B"), "A172 | 3"))
    split = split_populations(rule, only, ("line", "batch"))
    assert conditions(split.test) == {"A"}
    assert conditions(split.validation) == {"B"}


CONTEXTS = [Population((), f"{line} | {batch}") for line in ("A172", "T98G") for batch in ("1", "2", "3")]


def split_contexts(rule, **options):
    return split_populations(rule, CONTEXTS, ("line", "batch"), perturbed=False, **options)


def test_whole_contexts_without_perturbations(tmp_path):
    rule = HoldOutContexts(covariates=("batch",), values=(("1",),), validation_values=(("3",),))
    split = split_contexts(rule)
    assert {p.context for p in split.test} == {"A172 | 1", "T98G | 1"}
    assert {p.context for p in split.validation} == {"A172 | 3", "T98G | 3"}
    assert {p.context for p in split.train} == {"A172 | 2", "T98G | 2"}
    save_split(tmp_path / "split.json", split)
    assert load_split(tmp_path / "split.json") == split
    pair = split_contexts(HoldOutContexts(covariates=("line", "batch"), values=(("T98G", "2"),)))
    assert [p.context for p in pair.test] == ["T98G | 2"]
    assert split_contexts(HoldOutNone()).train == tuple(sorted(CONTEXTS))


def test_a_fraction_of_contexts_for_validation_takes_whole_ones():
    rule = HoldOutContexts(covariates=("batch",), values=(("1",),), validation_fraction=0.5)
    split = split_contexts(rule)
    kept = {p.context.split(" | ")[1] for p in split.validation}
    assert len(kept) == 1
    assert len(split.validation) == 2
    assert kept.isdisjoint(p.context.split(" | ")[1] for p in split.train)


def test_whole_contexts_take_their_controls_along():
    split = split_by(HoldOutContexts(covariates=("line",), values=(("T98G",),)), LINES)
    assert set(split.test) == {p for p in LINES if p.context.startswith("T98G")}
    assert any(p.is_control for p in split.test)
    left = split_by(LeaveOut(covariate="line", value="T98G"), LINES)
    assert set(left.test) == {p for p in split.test if not p.is_control}


def test_nothing_held_out_on_request():
    split = split_populations(HoldOutNone(), POPULATIONS)
    assert (split.train, split.validation, split.test) == (tuple(sorted(POPULATIONS)), (), ())


def test_the_global_generator_is_left_alone():
    np.random.seed(7)
    expected = np.random.rand(3)
    np.random.seed(7)
    split_populations(AdditiveSplit(), POPULATIONS)
    np.testing.assert_array_equal(np.random.rand(3), expected)


def crossed(**fields):
    return HoldOutCrossed(**{"covariates": ("batch",), "values": (("1",),), "conditions": ("A",), **fields})


def contexts(**fields):
    return HoldOutContexts(**{"covariates": ("batch",), "values": (("1",),), **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_populations(AdditiveSplit(), [CONTROL]), "all of them are controls"),
        (lambda: split_populations(AdditiveSplit(), [CONTROL, *SINGLES]), "holds out none of 10 perturbed"),
        (lambda: split_populations(HoldOutSeenDoubles(), SINGLES), "holds out none of 10 perturbed"),
        (lambda: split_populations(UnseenSingles(n_genes=10), POPULATIONS), "holds out all 55 .* none is left"),
        (lambda: split_populations(UnseenSingles(n_genes=11), POPULATIONS), "n_genes must be at most 10, the singles"),
        (lambda: split_populations(HoldOutGenes(fold=0), POPULATIONS), "n_doubles must be at most 13, .* got 15"),
        (
            lambda: split_populations(HoldOutConditions(conditions=("KLF2",)), [Population(("KLF1",)), *SINGLES]),
            "'KLF2' is no condition of the data. Did you mean 'KLF1'. There are 11: A, B",
        ),
        (lambda: split_populations(HoldOutConditions(conditions=("ctrl",)), POPULATIONS), "Controls cannot be held"),
        (lambda: split_by(LeaveOut(covariate="lines", value="T98G"), LINES), "got 'lines'. Did you mean 'line'"),
        (lambda: split_by(LeaveOut(covariate="line", value="T98"), LINES), "line='T98'. Did you mean 'T98G'.*: A172"),
        (lambda: split_populations(LeaveOut(covariate="line", value="x"), LINES), "which are none; got 'line'"),
        (lambda: split_populations(LeaveOut(covariate="line", value="x"), LINES, ("line",)), "has 2 parts, the cov"),
        (
            lambda: split_by(HoldOutPopulations(populations=(("A", "T98G"),)), LINES),
            r"no population of 'A' in the context 'T98G'. Did you mean 'T98G . \d'",
        ),
        (
            lambda: split_populations(AdditiveSplit(validation_fraction=0.01), POPULATIONS),
            "validation_fraction must be at least 0.0238 to keep one of 42 training conditions; got 0.01",
        ),
        (lambda: split_populations(AdditiveSplit(), POPULATIONS, written=[("A", "X")]), "'A.X' is not one"),
        (lambda: split_populations(AdditiveSplit(), POPULATIONS, written=[("A",)]), "'A.B' is missing"),
        (lambda: split_by(crossed(values=(("9",),)), LINES), "no perturbed population has batch='9'.* There are: 1, 2"),
        (lambda: split_by(crossed(covariates=("plate",)), LINES), "HoldOutCrossed: covariate must be one of .*'plate'"),
        (lambda: split_by(crossed(conditions=("C",)), LINES), "'C' is no condition of the data"),
        (
            lambda: split_populations(
                crossed(covariates=("line", "batch"), values=(("T98G", "3"),)),
                [*LINES, Population(("A",), "A172 | 3")],
                ("line", "batch"),
            ),
            "no perturbed population has line='T98G' and batch='3' together",
        ),
        (
            lambda: split_by(crossed(validation_conditions=("A",)), LINES),
            "'A' is both for test and for validation",
        ),
        (lambda: crossed(covariates=()), "covariates must name at least one"),
        (lambda: crossed(values=()), "values must hold at least one context"),
        (lambda: crossed(values=(("1", "2"),)), "a value for each of the 1 covariates"),
        (lambda: crossed(conditions=()), "None takes all"),
        (lambda: crossed(conditions=None, validation_conditions=("A",)), "none is left for validation_conditions"),
        (lambda: crossed(validation_conditions=("B",), validation_fraction=0.2), "give one of them"),
        (lambda: contexts(validation_values=(("2",),), validation_fraction=0.2), "give one of them"),
        (lambda: contexts(validation_values=(("1",),)), "both for test and for validation"),
        (lambda: split_contexts(contexts(values=(("9",),))), "no population has batch='9'"),
        (lambda: split_contexts(contexts(values=(("1",), ("2",), ("3",)))), "holds out all 6 populations"),
        (
            lambda: split_contexts(contexts(validation_values=(("2",), ("3",)))),
            "keeps the remaining 4 populations for validation",
        ),
        (lambda: split_contexts(LeaveOut(covariate="batch", value="1")), "holds out perturbations, and the data have"),
        (lambda: split_by(contexts(values=(("1",), ("2",))), LINES), "holds out all 12 perturbed populations"),
        (lambda: AdditiveSplit(fold=-1), "fold must be at least 0"),
        (lambda: AdditiveSplit(test_fraction=1.0), "test_fraction must lie in"),
        (lambda: AdditiveSplit(validation_fraction=1.0), "validation_fraction must lie in"),
        (lambda: HoldOutGenes(n_doubles=0), "n_doubles must be at least 1"),
        (lambda: HoldOutGenes(seed=-1), "seed must be at least 0"),
        (lambda: UnseenSingles(n_genes=0), "n_genes must be at least 1"),
        (lambda: HoldOutConditions(conditions=()), "use HoldOutNone"),
        (lambda: HoldOutPopulations(populations=()), "use HoldOutNone"),
        (
            lambda: PerturbationSplit.from_dict(
                {"rule": {"kind": "AdditiveSplit"}, "train": ["A"], "validation": [], "test": []}
            ),
            r"train\[0\] must be a list; got 'A'",
        ),
    ],
)
def test_bad_rules_for_populations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_that_is_no_split(tmp_path):
    path = tmp_path / "split.json"
    for text, message in (("{", "no valid JSON"), ("[]", "must be an object"), ('{"a": 1}', "a is not a field")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_split(path)
