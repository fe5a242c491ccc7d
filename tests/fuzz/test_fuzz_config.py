"""Settings: experiment.json, --config, --set."""

import dataclasses
import json
import typing

import pytest
from hypothesis import strategies as st
from malformed import DEEP, fuzz, fuzz_file, junk, malformed_texts, malformed_trees, nested, places, words

from scjax import presets
from scjax.cli import main
from scjax.config import override, to_dict
from scjax.experiment import read_experiment

EXPERIMENTS = [
    presets.preset(name).experiment
    for name in ("scimf/klein", "scdfm/norman_additive", "scdfm/kang", "perturbdiff/kang", "perturbdiff/pbmc_scratch")
]
TREES = [json.loads(json.dumps(to_dict(experiment))) for experiment in EXPERIMENTS]


def required(tree, at):
    """Whether the dataclass that holds the field there gives it no default."""
    node = EXPERIMENTS[TREES.index(tree)]
    for name in at[:-1]:
        if not dataclasses.is_dataclass(node):
            return False
        node = getattr(node, name, None)
    if not dataclasses.is_dataclass(node):
        return False
    if at[-1] == "kind":
        return len(at) > 1  # without one at the top it is a time series, by the format
    field = {f.name: f for f in dataclasses.fields(node)}[at[-1]]
    return field.default is field.default_factory is dataclasses.MISSING


WRONG = malformed_trees(TREES, required)
FEW_AND_MANY = pytest.mark.parametrize("n", [80, pytest.param(900, marks=pytest.mark.slow)])


@FEW_AND_MANY
def test_settings_file(tmp_path, n):
    fuzz_file(n, tmp_path / "experiment.json", malformed_texts(TREES, WRONG), read_experiment)


def assignments():
    """One that is wrong: no such field, a value that it cannot hold; beside right ones."""
    fields = sorted(
        {".".join(map(str, at)) for tree in TREES for at in places(tree) if all(type(k) is str for k in at)}
    )
    unknown = st.builds(lambda field, word: f"{field}.{word}?", st.sampled_from(fields), words) | words.map(
        lambda word: f"?{word}"
    )
    deep = st.sampled_from([nested, "[".__mul__, '{"a":'.__mul__]).flatmap(lambda make: st.just(DEEP).map(make))
    value = deep | st.sampled_from(['{"no such": 1}', "NaN", "1e999", "[[[]]]"])
    return st.tuples(unknown, value | words | junk) | st.tuples(st.sampled_from(fields), value)


@FEW_AND_MANY
def test_overrides(n):
    """As --set makes them; what is a word to a field of words is not tried on such."""

    def attempt(case):
        experiment, (name, value) = case
        override(experiment, {name: value})

    def is_wrong(case):
        experiment, (name, value) = case
        node, hint = experiment, None
        for part in name.split("."):
            if not dataclasses.is_dataclass(node) or part not in {f.name for f in dataclasses.fields(node)}:
                return True
            hint, node = typing.get_type_hints(type(node))[part], getattr(node, part)
        return not (isinstance(value, str) and "str" in str(hint) and not value.startswith('{"no'))

    fuzz(n, st.tuples(st.sampled_from(EXPERIMENTS), assignments()).filter(is_wrong), attempt)


@pytest.mark.parametrize("content", [b"[" * DEEP, b"\x80\x04N.", b'{"kind": []}', b"", b"\xff\xfe{"])
@pytest.mark.parametrize("command", ["show", "train"])
def test_command_line(tmp_path, capsys, content, command):
    (tmp_path / "settings.json").write_bytes(content)
    path = str(tmp_path / "settings.json")
    with pytest.raises(SystemExit) as ended:
        main([command, path] if command == "show" else [command, "--config", path, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "settings.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_and_links_in_place_of_a_file(tmp_path):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    for name in ("loop.json", "gone.json", "."):
        with pytest.raises((ValueError, OSError)):
            read_experiment(tmp_path / name)
    with pytest.raises((ValueError, OSError)):
        read_experiment("nul\0byte.json")
