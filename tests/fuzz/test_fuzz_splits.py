"""Split files, as `train` writes them and `evaluate --split` reads them."""

import json

import pytest
from hypothesis import strategies as st
from malformed import fuzz, fuzz_file, malformed_texts, malformed_trees, put

from scjax.config import to_dict
from scjax.data.splits import (
    HoldOutConditions,
    HoldOutCrossed,
    HoldOutTimes,
    PerturbationSplit,
    load_split,
    save_split,
    split_populations,
    split_times,
)
from scjax.types import Population

POPULATIONS = [
    Population(perturbation, context)
    for perturbation in ((), ("A",), ("B",), ("A", "B"), ("C",))
    for context in ("one", "two")
]
SPLITS = [
    split_times(HoldOutTimes(times=(1.0, 2.0)), (0.0, 1.0, 2.0, 4.0)),
    split_populations(HoldOutConditions(conditions=("A+B",), validation_fraction=0.4), POPULATIONS),
    split_populations(HoldOutCrossed(covariates=("line",), values=(("one",),)), POPULATIONS, ("line",)),
]
TREES = [json.loads(json.dumps(to_dict(split))) for split in SPLITS]
NO_DEFAULT = {"rule", "train", "held_out", "validation", "test", "times", "conditions", "covariates", "values", "kind"}


def required(tree, at):
    """Fields without a default; of the rules, conditions of HoldOutCrossed has one."""
    is_optional = at == ("rule", "conditions") and tree["rule"]["kind"] == "HoldOutCrossed"
    return isinstance(at[-1], str) and at[-1] in NO_DEFAULT and not is_optional


@st.composite
def overlapping(draw):
    """A time or population that stands twice, in one part or in two: cells of training in the test."""
    tree = draw(st.sampled_from(TREES))
    parts = [name for name in ("train", "held_out", "validation", "test") if name in tree]
    one, other = draw(st.sampled_from([name for name in parts if tree[name]])), draw(st.sampled_from(parts))
    return put(tree, (other,), [*tree[other], draw(st.sampled_from(tree[one]))])


WRONG = malformed_trees(TREES, required) | overlapping()


@pytest.mark.parametrize("n", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_split_file(tmp_path, n):
    fuzz_file(n, tmp_path / "split.json", malformed_texts(TREES, WRONG), load_split)


@pytest.mark.parametrize("n", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_split_of_a_checkpoint(n):
    """The same, as a dict of the document that is stored with arrays."""
    wrong = malformed_trees(TREES[1:], required)
    fuzz(n, wrong, PerturbationSplit.from_dict)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: type(split.rule).__name__)
def test_what_is_right_is_read(tmp_path, split):
    save_split(tmp_path / "split.json", split)
    assert load_split(tmp_path / "split.json") == split
