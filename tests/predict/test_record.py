"""Columns of obs of a prediction that data name."""

from scjax.predict.record import covariate_columns


def test_columns_of_the_data_have_their_names():
    assert covariate_columns(("line", "batch"), "K562 | b1", kind="T") == {"line": "K562", "batch": "b1", "kind": "T"}
    assert covariate_columns(("line",), "") == {"line": ""}
    assert covariate_columns((), "") == {}
    assert covariate_columns(("a",), "x", covariates="y", context="z") == {
        "a": "x", "covariates": "y", "covariate_context": "z"
    }  # fmt: skip


def test_what_a_prediction_says_itself_does_not_replace_them():
    told = covariate_columns(("condition", "line"), "sick | K562", set=["s1", "s1"])
    assert told == {"covariate_condition": "sick", "line": "K562", "covariate_set": ["s1", "s1"]}
