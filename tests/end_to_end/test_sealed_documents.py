"""Checkpoints of runs whose documents somebody else sealed: what they lack or have in another form is a ValueError."""

import copy
from pathlib import Path

import numpy as np
import pytest

from scjax import checkpoint, convert
from scjax.data.preprocess import Transform
from scjax.predict import load

RUNS = ("tiny_run", "perturbation_run", "cellset_run")
OTHERS = (None, 3, "x", [], {}, [None])


@pytest.fixture(params=RUNS)
def found(request):
    run = request.getfixturevalue(request.param)
    return checkpoint.read(Path(run.workdir) / "checkpoints")


@pytest.fixture
def sealed(monkeypatch, tmp_path):
    """Hands out this checkpoint in place of what the folder holds."""

    def as_if(found):
        monkeypatch.setattr(checkpoint, "read", lambda *args, **options: found)
        return tmp_path

    return as_if


def changed(tree, deepest=3):
    """Copies of a nested dict without one of its entries, or with something else in its place."""
    for key, value in tree.items():
        yield key, {k: v for k, v in tree.items() if k != key}
        for other in OTHERS:
            yield key, {**tree, key: copy.copy(other)}
        if isinstance(value, dict) and deepest > 1:
            for path, inner in changed(value, deepest - 1):
                yield f"{key}.{path}", {**tree, key: inner}


def outcome(of, folder):
    """Whether it was taken; anything but a ValueError is nobody's to expect."""
    try:
        of(folder)
    except ValueError:
        return False
    return True


def test_what_is_sealed_is_not_believed(found, sealed):
    assert outcome(load, sealed(found))
    refused = {"about": 0, "arrays": 0}
    for part in refused:
        for path, tree in changed(getattr(found, part)):
            try:
                refused[part] += not outcome(load, sealed(found._replace(**{part: tree})))
                outcome(convert.load, sealed(found._replace(**{part: tree})))
            except Exception as err:
                err.add_note(f"{part}: {path}")
                raise
    assert min(refused.values()) > 10


@pytest.mark.parametrize("missing", ["experiment", "transform"])
def test_what_is_missing_is_named(found, sealed, missing):
    about = {name: value for name, value in found.about.items() if name != missing}
    with pytest.raises(
        ValueError, match=rf"does not hold what .* expects of it \(KeyError: '{missing}'\). Read it with"
    ):
        load(sealed(found._replace(about=about)))


def test_weights_of_a_run_were_not_converted(found, sealed):
    state = {"params": found.arrays["state"]["params"]}
    with pytest.raises(ValueError, match="holds weights that were trained, not converted"):
        convert.told(sealed(found._replace(arrays={**found.arrays, "state": state})))


def test_no_parameters(found, sealed):
    with pytest.raises(ValueError, match="without parameters"):
        convert.load(sealed(found._replace(arrays={**found.arrays, "state": {}})))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_arrays_of_another_number_of_genes(found, name):
    arrays, rest = found.arrays["transform"], found.about["transform"]
    n = len(rest["feature_names"])
    assert Transform.from_tree(arrays, rest).mean.shape == (n,)
    with pytest.raises(
        ValueError, match=rf"{name} of a Transform of {n} genes must have the shape \({n},\); got \(1,\)"
    ):
        Transform.from_tree({**arrays, name: np.ones(1)}, rest)
