"""The guards: silent on what is right, one voice on what is not."""

import math

import numpy as np
import pytest

from scjax import check


def test_right_values_pass():
    check.one_of("colour", "red", ("red", "green"))
    check.positive("dt", 1e-300)
    check.non_negative("sigma", 0.0)
    check.at_least("n", 1, 1)
    check.probability("dropout", 0.0)
    check.finite("x", np.zeros((2, 3)))
    check.column("time", "day", ["day", "batch"])
    assert check.increasing("ts", np.array([0, 1, 2.5])) == (0.0, 1.0, 2.5)
    assert check.increasing("ts", ["1", 2]) == (1.0, 2.0)
    assert check.increasing("ts", []) == ()


@pytest.mark.parametrize(
    ("guard", "arguments", "message"),
    [
        (check.one_of, ("rd", ("red", "green")), r"x must be one of 'red', 'green'; got 'rd'. Did you mean 'red'\?"),
        (check.one_of, (7, (1, 2)), r"x must be one of 1, 2; got 7\.$"),
        (check.positive, (0.0,), "x must be a positive number; got 0.0"),
        (check.positive, (math.inf,), "x must be a positive number; got inf"),
        (check.positive, (math.nan,), "x must be a positive number; got nan"),
        (check.non_negative, (-0.5,), "x must be zero or a positive number; got -0.5"),
        (check.non_negative, (math.nan,), "x must be zero or a positive number; got nan"),
        (check.at_least, (0, 1), "x must be at least 1; got 0"),
        (check.probability, (1.0,), r"x must lie in \[0, 1\); got 1.0"),
        (check.probability, (-0.1,), r"x must lie in \[0, 1\); got -0.1"),
        (check.probability, (math.nan,), r"x must lie in \[0, 1\); got nan"),
        (
            check.increasing,
            ((0.0, 2.0, 1.0),),
            r"x must increase strictly; 1.0 after 2.0 is unsorted. Got \(0.0, 2.0, 1",
        ),
        (check.increasing, ((0.0, 1.0, 1.0),), "x must increase strictly; 1.0 after 1.0 is repeated"),
        (check.increasing, ((math.nan, 1.0),), "x must be finite"),
        (check.increasing, ((0.0, math.inf),), "x must be finite"),
        (check.increasing, (("two",),), r"x must be numbers; got \('two',\)"),
        (check.increasing, ((None,),), r"x must be numbers; got \(None,\)"),
    ],
)
def test_wrong_values_are_named(guard, arguments, message):
    with pytest.raises(ValueError, match=message):
        guard("x", *arguments)


def test_finite_counts_and_places_what_is_not():
    values = np.array([[0.0, np.inf], [np.nan, 1.0]])
    with pytest.raises(ValueError, match=r"x must hold finite numbers; 2 of 4 .* the first at \(0, 1\): inf"):
        check.finite("x", values)


def test_column_lists_what_there_is():
    with pytest.raises(ValueError, match=r"time names a column of adata.obs; 'dya' is not one. Did you mean 'day'\?"):
        check.column("time", "dya", ["day", "batch"])
    with pytest.raises(ValueError, match=r"gene names a column of adata.var; 'id' is not one. It has: none\."):
        check.column("gene", "id", [], table="adata.var")


def test_suggestion():
    assert check.suggestion("pertubation", ["perturbation", "time"]) == " Did you mean 'perturbation'?"
    assert check.suggestion("zebra", ["perturbation", 3]) == ""
