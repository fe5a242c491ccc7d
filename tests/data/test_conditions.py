"""One condition has one name, and a name that training never saw is replaced as asked, or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scjax.data.conditions import (
    CONTROL,
    Resolved,
    canonical,
    dose_of,
    known_names,
    resolve_unknown,
    trained_names,
    with_dose,
)
from scjax.data.spec import DataSpec
from scjax.types import Population

TRAIN = (Population(()), Population(("A",)), Population(("B", "C")), Population(("A",), "line"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("A+B", ("A", "B")),
        ("B+A", ("A", "B")),
        ("B + A", ("A", "B")),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("control+A", ("A",)),
        ("A", ("A",)),
        ("ctrl", ()),
        ("control+ctrl", ()),
        ("PTPN9+PTPN12", ("PTPN12", "PTPN9")),  # code points, not numbers
    ],
)
def test_a_condition_has_one_name(name, parts):
    assert canonical(name) == parts


@given(st.lists(st.sampled_from(["A", "b", "C1", "ctrl"]), min_size=1, max_size=4, unique=True), st.randoms())
def test_order_and_controls_do_not_matter(names, random):
    shuffled = random.sample(names, len(names))
    assert canonical("+".join(names)) == canonical("+".join([*shuffled, "control"]))


@given(st.lists(st.sampled_from(["A", "b", "C1"]), max_size=3, unique=True))
def test_a_canonical_name_stays(names):
    population = Population(tuple(sorted(names)))
    assert canonical(population.condition) == population.perturbation


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A+", r"'A\+' has an empty part. Write 'A' or 'A\+control'"),
        ("", r"'' has an empty part"),
        ("A+B+A", r"'A\+B\+A' names 'A' twice, .* Write it once, or .*'A@2' for a dose"),
    ],
)
def test_names_without_a_meaning(name, message):
    with pytest.raises(ValueError, match=message):
        canonical(name)


def test_another_separator_and_control():
    assert canonical("NT|A|B", "|", ("NT",)) == ("A", "B")
    assert canonical("A+B", "|", ("NT",)) == ("A", "B")  # as canonical names are written


@pytest.mark.parametrize(
    ("dose", "name"),
    [(0.1, "x@0.1"), (float(np.float32(0.1)), "x@0.1"), (10.0, "x@10"), (1e6, "x@1e06"), (2.5e-7, "x@2.5e-07")],
)
def test_doses_have_one_form_that_can_be_read_again(dose, name):
    assert with_dose("x", dose) == name
    assert dose_of(name) == ("x", pytest.approx(dose))
    assert canonical(f"{name}+y@1") == (name, "y@1")


@pytest.mark.parametrize("name", ["x", "x@", "@1", "x@one", "x@nan", "a@b"])
def test_what_is_no_dose(name):
    assert dose_of(name) == (name, None)


def test_conditions_as_users_write_them():
    plain = DataSpec(space="counts", perturbation="p", control="DMSO")
    assert plain.parse_condition("B+A") == ("A", "B")
    assert plain.parse_condition("DMSO") == plain.parse_condition("control") == ()
    dosed = DataSpec(space="counts", perturbation="p", dose="d")
    assert dosed.parse_condition("B@2.0+ctrl+A@0.50") == ("A@0.5", "B@2")
    for wrong in ("A", "A@-1", "A@0", "A@x"):
        with pytest.raises(ValueError, match="write 'name@dose' with a positive number"):
            dosed.parse_condition(wrong)
    with pytest.raises(ValueError, match="'A@0.5' twice"):
        dosed.parse_condition("A@0.5+A@0.50")


def test_what_a_model_knows_depends_on_its_embedding():
    assert trained_names(TRAIN) == ("A", "B", "C")
    assert known_names(TRAIN, "table", genes=("G", "A"), vectors=("D",)) == ("A", "B", "C")
    assert known_names(TRAIN, "gene", genes=("G", "A"), vectors=("D",)) == ("A", "B", "C", "G")
    assert known_names(TRAIN, "vector", genes=("G", "A"), vectors=("D", "A")) == ("A", "D")


def test_known_names_stay_under_every_policy():
    for policy in ("error", "mean", "nearest"):
        found = resolve_unknown(("A", "B"), ("A", "B", "C"), policy)
        assert found == ((("A",), ("B",)), {})
        assert found.names(3) == ("A", "B", CONTROL)
    assert resolve_unknown((), (), "error").names(2) == (CONTROL, CONTROL)


def test_an_unknown_name_is_an_error_by_default():
    with pytest.raises(
        ValueError,
        match=r"'KLF2' is not known .* Did you mean 'KLF1'\? It knows KLF1, MAPK1. on_unknown='mean' or 'nearest'",
    ):
        resolve_unknown(("KLF2",), ("KLF1", "MAPK1"))


def test_mean_of_the_trained_not_of_all_known():
    found = resolve_unknown(("A", "X"), ("A", "B", "C", "G"), "mean", trained=("A", "B", "C"))
    assert found.parts == (("A",), ("A", "B", "C"))
    assert found.replaced == {"X": "mean of 3 trained perturbations"}


@given(
    st.lists(st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=4, unique=True), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_the_plain_mean_over_names_is_the_mean_of_the_parts(parts, free):
    """So that a model which averages its slots needs to know nothing of stand-ins."""
    values = dict(zip((*"ABCDE", CONTROL), np.random.default_rng(0).normal(size=6), strict=True))
    resolved, n_slots = Resolved(tuple(map(tuple, parts)), {}), len(parts) + free
    slots = [np.mean([values[name] for name in part]) for part in parts] + [values[CONTROL]] * free
    names = resolved.names(n_slots)
    assert len(names) % n_slots == 0
    np.testing.assert_allclose(np.mean([values[name] for name in names]), np.mean(slots), atol=1e-12)
    with pytest.raises(ValueError, match="too few"):
        resolved.names(len(parts) - 1)


def test_nearest_dose_is_that_of_the_same_drug_by_ratio():
    known = ("x@1", "x@100", "y@9")
    assert resolve_unknown(("x@9",), known, "nearest") == ((("x@1",),), {"x@9": "x@1"})
    assert resolve_unknown(("x@11",), known, "nearest").replaced == {"x@11": "x@100"}


def test_nearest_vector():
    vectors = {"A": [0.0, 0.0], "B": [3.0, 0.0], "X": [2.0, 0.5], "G": [2.0, 0.5], "z@1": [2.0, 0.0]}
    found = resolve_unknown(("X",), ("A", "B", "G"), "nearest", vectors, trained=("A", "B"))
    assert found.replaced == {"X": "B"}
    assert resolve_unknown(("z@1",), ("A", "B"), "nearest", vectors).replaced == {"z@1": "B"}


@pytest.mark.parametrize(
    ("part", "known", "vectors", "message"),
    [
        ("X", ("A",), None, r"nothing tells what is near 'X'; .* no external vectors .* Use on_unknown='mean'"),
        ("x@1", ("y@1",), None, r"nothing tells what is near 'x@1'; it is no dose of a trained drug"),
        ("AX", ("A",), {"AX1": [1.0], "A": [0.0]}, r"'AX' has no vector. Did you mean 'AX1'"),
        ("X", ("A",), {"X": [1.0]}, r"no trained perturbation has a vector"),
        ("X", (), {"X": [1.0]}, r"there is no trained one to stand for it"),
    ],
)
def test_nearest_says_what_it_lacks(part, known, vectors, message):
    with pytest.raises(ValueError, match=message):
        resolve_unknown((part,), known, "nearest", vectors)
