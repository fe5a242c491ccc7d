"""The README's commands and examples run as printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from scjax.data import datasets

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_library_example():
    (example,) = blocks("python")
    names = {}
    exec(example, names)  # the reader's own paste
    assert names["path"].x.shape == (3, *names["x0"].shape)
    assert names["v"].shape == names["x0"].shape


def test_commands_on_a_users_file(tmp_path):
    """In the order of the README, on a file with a column of another name; only the number of steps is cut."""
    adata = datasets.klein2015()
    adata.obs["day"] = adata.obs.pop("time")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (script,) = (b for b in blocks("") if "scjax train" in b)
    lines = script.replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("scjax")]
    assert {shlex.split(c)[1] for c in commands} == {"show", "train", "predict", "evaluate"}
    for command in commands:
        words = shlex.split(
            re.sub(r"--n-steps \d+", "--n-steps 20 --sampling.n-cells 32 --sampling.n-targets 32", command)
        )
        done = subprocess.run(
            [sys.executable, "-m", "scjax", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "predicted.h5ad").exists()
    assert (tmp_path / "evaluation.json").exists()


def test_the_two_commands_come_first():
    first = blocks("")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines() if line] == ["make demo", "make test"]
    assert "make test" in (Path(__file__).parents[2] / ".ci" / "run").read_text()
