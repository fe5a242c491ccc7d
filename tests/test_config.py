"""Dataclasses to JSON and back: the same value; a wrong one is refused with its place and its mend."""

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.config import from_dict, from_json, override, to_dict, to_json
from scjax.data.spec import DataSpec
from scjax.experiment import TimeSeriesExperiment
from scjax.models.scimf import Config

EXPERIMENT = TimeSeriesExperiment(model=Config(n_dims=50), spec=DataSpec(space="counts", time="day"))


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float


@dataclass(frozen=True, kw_only=True)
class Box:
    sides: tuple[float, float]
    name: str = "box"


@dataclass(frozen=True, kw_only=True)
class Scene:
    shape: Circle | Box | None
    colour: Literal["red", "green"] | None = "red"
    n: int = 1
    widths: tuple[int, ...] = ()
    filled: bool = False
    border: Circle | None = None


SCENE = Scene(shape=Circle(radius=1.0))

# Plain values, as in a JSON file; the classes are made in the tests.
counts = st.integers(1, 100)
positive = st.floats(1e-6, 1e6)
splits = st.one_of(
    st.just({"kind": "HoldOutNone"}),
    st.just({"kind": "HoldOutInterior"}),
    st.fixed_dictionaries({"kind": st.just("HoldOutLast"), "n_times": counts}),
    st.fixed_dictionaries(
        {"kind": st.just("HoldOutTimes"), "times": st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=4)}
    ),
    st.just({"kind": "ReferenceSplit", "dataset": "Panc", "name": "leaveout4"}),
)


@st.composite
def experiments(draw):
    n_dims, scan_steps, by_genes = draw(counts), draw(counts), draw(st.booleans())
    return {
        "model": {
            "n_dims": n_dims,
            "n_heads": draw(st.sampled_from([h for h in range(1, n_dims + 1) if n_dims % h == 0])),
            "intrinsic_widths": draw(st.lists(counts, max_size=3)),
            "diffusion": draw(st.sampled_from(["constant", "learned", "mlp"])),
            "sigma": draw(st.floats(0, 1e6)),
            "residual": draw(st.booleans()),
        },
        "spec": {"space": "counts", "time": draw(st.text()), "cell_type": draw(st.none() | st.text())},
        "split": draw(splits),
        "preprocess": {
            "library_size": draw(st.sampled_from(["all_genes", "selected_genes", None])),
            "n_top_genes": n_dims if by_genes else None,
            "n_components": None if by_genes else n_dims,
        },
        "time_scale": draw(st.sampled_from(["real", "index", "mean_gap"])),
        "sampling": {"n_cells": draw(counts), "n_targets": draw(st.none() | counts)},
        "optimizer": {"learning_rate": draw(positive), "clip_norm": draw(st.none() | positive)},
        "scan_steps": scan_steps,
        "checkpoint_every": scan_steps * draw(counts),
        "ema_decay": draw(st.none() | st.floats(0, 0.999)),
        "seed": draw(st.integers(0, 2**32)),
    }


def holds(whole, part) -> bool:
    if isinstance(part, dict):
        return all(holds(whole[name], value) for name, value in part.items())
    return whole == part


@settings(max_examples=40, deadline=None)
@given(experiments())
def test_comes_back_from_json_as_it_went(tree):
    experiment = from_dict(TimeSeriesExperiment, tree)
    assert holds(to_dict(experiment), tree)
    assert from_dict(TimeSeriesExperiment, to_dict(experiment)) == experiment
    assert from_dict(TimeSeriesExperiment, json.loads(to_json(experiment))) == experiment


@settings(max_examples=20, deadline=None)
@given(experiments(), splits)
def test_override_changes_what_it_names_and_nothing_else(tree, split):
    """Values as text, as a command line gives them; and another class in the place of the former."""
    experiment = from_dict(TimeSeriesExperiment, tree)
    written = {f"split.{name}": json.dumps(value) for name, value in split.items()}
    changed = override(experiment, written | {"model.blur": "0.25"})
    assert holds(to_dict(changed), {"split": split, "model": {"blur": 0.25}})
    assert replace(changed, split=experiment.split, model=experiment.model) == experiment
    assert replace(changed.model, blur=experiment.model.blur) == experiment.model
    assert override(experiment, {}) == experiment


def test_file(tmp_path):
    (tmp_path / "scene.json").write_text(to_json(SCENE))
    assert from_json(Scene, tmp_path / "scene.json") == SCENE
    assert json.loads(to_json(SCENE))["shape"] == {"kind": "Circle", "radius": 1.0}


def test_one_class_or_none_needs_no_kind():
    scene = replace(SCENE, border=Circle(radius=2.0), shape=None)
    assert to_dict(scene)["border"] == {"radius": 2.0}
    assert from_dict(Scene, to_dict(scene)) == scene


def test_whole_numbers_are_real_numbers():
    """JSON does not tell 2 from 2.0."""
    found = from_dict(Scene, {"shape": {"kind": "Box", "sides": [1, 2]}})
    assert found.shape == Box(sides=(1.0, 2.0))
    assert all(isinstance(side, float) for side in found.shape.sides)


def test_values_that_are_configs_already():
    assert from_dict(Scene, {"shape": Box(sides=(1.0, 2.0))}) == Scene(shape=Box(sides=(1.0, 2.0)))
    assert override(SCENE, {"border": Circle(radius=3.0)}).border == Circle(radius=3.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"colur": "red"}, r"^colur is not a field of Scene. Did you mean 'colour'\? It has: shape, colour, n"),
        ({"colour": "reed"}, r"^colour must be one of 'red', 'green'; got 'reed'. Did you mean 'red'\?"),
        ({"n": 1.5}, "^n must be int; got 1.5"),
        ({"n": True}, "^n must be int; got True"),
        ({"n": "1"}, "^n must be int; got '1'"),
        ({"n": None}, "^n must be int; got None"),
        ({"filled": 1}, "^filled must be bool; got 1"),
        ({"widths": 3}, "^widths must be a list; got 3"),
        ({"widths": [1, 2.5]}, r"^widths\[1\] must be int; got 2.5"),
        ({"border": 3}, "^border must be an object of fields; got 3"),
        ({"border": {"radius": "wide"}}, "^border.radius must be float; got 'wide'"),
        ({"border": {"radius": True}}, "^border.radius must be float; got True"),
        ({"border": {"radius": float("nan")}}, "^border.radius must be a finite number; got nan"),
        ({"border": {"radius": float("inf")}}, "^border.radius must be a finite number; got inf"),
        ({"border": {"radius": 10**400}}, "^border.radius must be a number that a float can hold"),
        ({"border": {}}, "^border lacks radius, which has no default"),
        ({"shape": {"radius": 1.0}}, "^shape must be an object whose kind is one of 'Circle', 'Box'; got kind None"),
        ({"shape": {"kind": "Circel"}}, r"got kind 'Circel'. Did you mean 'Circle'\?"),
        ({"shape": {"kind": ["Circle"]}}, r"got kind \['Circle'\]"),
        ({"shape": "Bxo"}, r"got 'Bxo'. Did you mean 'Box'\?"),
        (
            {"shape": {"kind": "Circle", "raduis": 1.0}},
            r"^shape.raduis is not a field of Circle. Did you mean 'radius'",
        ),
        ({"shape": {"kind": "Box", "sides": [1.0]}}, r"^shape.sides must hold 2 values; got \[1.0\]"),
    ],
)
def test_value_that_a_field_cannot_hold(changed, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Scene, to_dict(SCENE) | changed)


def test_missing_field():
    with pytest.raises(ValueError, match="^Scene lacks shape, which has no default"):
        from_dict(Scene, {})
    with pytest.raises(ValueError, match=r"^Scene must be an object of fields; got \[1\]"):
        from_dict(Scene, [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON: Expecting property name"),
        ("", "is no valid JSON: Expecting value"),
        ('{"n": 1, "n": 2}', "'n' occurs more than once in one object"),
        ('{"shape": null, "m": 2}', "m is not a field of Scene"),
        ('{"shape": {"kind": "Circle", "radius": NaN}}', "shape.radius must be a finite number; got nan"),
    ],
)
def test_file_that_holds_no_config(tmp_path, text, message):
    (tmp_path / "scene.json").write_text(text)
    with pytest.raises(ValueError, match=f"scene.json.*{message}"):
        from_json(Scene, tmp_path / "scene.json")


def test_file_of_bytes(tmp_path):
    (tmp_path / "scene.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"scene.json: 'utf-8' codec"):
        from_json(Scene, tmp_path / "scene.json")


def test_override_picks_another_class_in_any_order():
    assignments = {"shape.sides": "[1, 2]", "shape.kind": "Box"}
    assert override(SCENE, assignments).shape == Box(sides=(1.0, 2.0))
    assert override(SCENE, dict(reversed(assignments.items()))).shape == Box(sides=(1.0, 2.0))
    box = Scene(shape=Box(sides=(1.0, 2.0), name="mine"))
    assert override(box, {"shape.kind": "Box", "shape.sides": "[3, 4]"}).shape == Box(sides=(3.0, 4.0), name="mine")
    with pytest.raises(ValueError, match="^shape lacks radius, which has no default"):
        override(box, {"shape.kind": "Circle"})


def test_override_reads_text_as_json_where_it_is_json():
    found = override(SCENE, {"shape.radius": "3e-4", "filled": "true", "colour": "null", "widths": "[1, 2]"})
    assert found == replace(SCENE, shape=Circle(radius=3e-4), filled=True, colour=None, widths=(1, 2))
    assert override(SCENE, {"colour": "green"}).colour == "green"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shap.radius", r"^shap.radius: shap is no object with fields. Did you mean 'shape'\?"),
        ("shape.radus", r"^shape.radus is not a field of Circle. Did you mean 'radius'\?"),
        ("shape.radius.x", "^shape.radius.x: shape.radius is no object with fields"),
        ("n.x", "^n.x: n is no object with fields"),
        ("kind", "^kind is not a field of Scene"),
        ("", "^ is not a field of Scene"),
    ],
)
def test_override_of_no_field(name, message):
    with pytest.raises(ValueError, match=message):
        override(SCENE, {name: "1"})


def test_checks_of_the_class_hold_for_what_is_read():
    tree = to_dict(EXPERIMENT)
    tree["model"]["n_heads"] = 3
    with pytest.raises(ValueError, match="n_heads must divide n_dims; got n_heads=3, n_dims=50"):
        from_dict(TimeSeriesExperiment, tree)


def test_configs_stay_as_they_are():
    before = to_json(EXPERIMENT)
    override(EXPERIMENT, {"model.n_heads": 1, "split.kind": "HoldOutNone"})
    assert to_json(EXPERIMENT) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPERIMENT.seed = 1
