"""Training curves from logged rows."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scjax.plot.training import loss_terms, read_metrics

ROWS = [{"step": 10, "loss": 4.0, "sinkhorn": 3.0}, {"step": 0, "loss": 8.0}, {"step": 20, "loss": None, "val": 1.0}]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_terms_are_drawn_over_their_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    ax = loss_terms(path, ("loss", "sinkhorn"))
    loss, sinkhorn = ax.lines
    np.testing.assert_array_equal(loss.get_xydata(), [[0, 8], [10, 4], [20, np.nan]])
    np.testing.assert_array_equal(sinkhorn.get_xydata(), [[10, 3]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["loss", "sinkhorn"]
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "training step")
    assert loss_terms(ROWS, log=False, ax=ax) is ax


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_terms(ROWS, ("sinkhron",)), "Did you mean 'sinkhorn'"),
        (lambda: loss_terms([{"loss": 1.0}]), 'must have a "step"; row 1 has loss'),
        (lambda: loss_terms([{"step": 1, "a": -1.0}], ("a",)), "never positive"),
    ],
)
def test_bad_terms_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"), [('{"step": 1}\n{"st', "line 2, is no JSON"), ("3", "line 1, must be an object")]
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_importing_the_plots_and_metrics_loads_nothing_heavy():
    modules = "scjax.plot.trajectory, scjax.plot.interaction, scjax.plot.training, scjax.metrics.report"
    heavy = ("matplotlib", "ot", "ott", "sklearn", "torch", "pandas")
    code = f"import sys, {modules}, scjax.metrics.interaction; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
