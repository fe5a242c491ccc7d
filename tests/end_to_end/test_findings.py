"""What check_split finds stops a run, or goes with it: into its checkpoints, its tables, and onto the screen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series

from scjax import checkpoint
from scjax.cli import main
from scjax.config import to_json
from scjax.data.leaks import RULES, Findings
from scjax.experiment import cellsets, evaluate, perturbation, timeseries, train
from scjax.metrics.perturbation_report import DEFAULT_METRICS

COPIES = "duplicates-across-parts"
L2 = {"l2": DEFAULT_METRICS["l2"]}
KINDS = {
    "series": (tiny_series, timeseries, "day", 0.0, 2.0),
    "perturbation": (tiny_perturbation, perturbation, "condition", "ctrl", "g1+g0"),
    "cell sets": (tiny_cellsets, cellsets, "drug", "B", "A"),
}


def with_copies(tiny, column, of, to):
    """Half of the held-out cells are cells of training."""
    adata = tiny.make_adata()
    source, target = (np.flatnonzero(adata.obs[column] == value) for value in (of, to))
    n = min(len(source), len(target))
    x = adata.X.copy()
    x[target[:n]] = x[source[:n]]
    adata.X = x
    return adata


def rules_of(findings):
    return {f.rule for f in findings.found}


@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_stops_a_run_before_anything_is_written(kind, tmp_path):
    tiny, _, *how = KINDS[kind]
    with pytest.raises(
        ValueError, match=rf"{COPIES}: .* held-out cells .*allow_leaks=\['{COPIES}'\]".replace(".*", "(?s:.*)")
    ):
        train(tiny.EXPERIMENT, with_copies(tiny, *how), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_leak_that_is_allowed_is_recorded(tmp_path, capsys):
    adata = with_copies(tiny_series, *KINDS["series"][2:])
    experiment = replace(tiny_series.EXPERIMENT, allow_leaks=(COPIES,))
    run = train(experiment, adata, tmp_path / "run").workdir
    assert f"error (allowed) {COPIES}: " in capsys.readouterr().err
    saved = checkpoint.read_about(run / "checkpoints")["findings"]
    assert saved["allowed"] == [COPIES]
    (table,) = evaluate([run], adata, n_draws=2)
    assert table.provenance["findings"] == saved
    assert json.loads((run / "experiment.json").read_text())["allow_leaks"] == [COPIES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_settings_file_with_an_unknown_rule_is_refused(kind):
    with pytest.raises(ValueError, match=f"allow_leaks must be one of .* Did you mean '{COPIES}'"):
        replace(KINDS[kind][0].EXPERIMENT, allow_leaks=("duplicate-across-part",))


@pytest.mark.parametrize("kind", KINDS)
def test_findings_are_in_every_checkpoint_and_table(kind, request):
    tiny, name = KINDS[kind][0], {"series": "tiny_run", "perturbation": "perturbation_run", "cell sets": "cellset_run"}
    run = request.getfixturevalue(name[kind]).workdir
    saved = checkpoint.read_about(run / "checkpoints")["findings"]
    tables = evaluate([run], tiny.make_adata(), n_draws=2, **({} if kind == "series" else {"metrics": L2}))
    assert all(table.provenance["findings"] == saved for table in tables)
    findings = Findings.from_json_dict(saved)
    assert findings.rules == tuple(rule.name for rule in RULES)
    assert (
        rules_of(findings)
        == {
            "series": {"few-held-out-cells"},
            "perturbation": {"few-held-out-cells", "seen-elsewhere", "shared-controls", "targets-among-features"},
            "cell sets": {"few-held-out-cells", "seen-elsewhere", "shared-controls"},
        }[kind]
    )
    assert not findings.of("error")


def test_the_commands_print_them(tmp_path, tiny_run, capsys):
    tiny_series.make_adata().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "tiny.json").write_text(to_json(tiny_series.EXPERIMENT))
    data = ["--data", str(tmp_path / "cells.h5ad")]
    head = f"check_split: {len(RULES)} rules; 0 errors, 1 warning, 0 notes\n  warning few-held-out-cells: 1 of 1 "
    main(["train", "--config", str(tmp_path / "tiny.json"), *data, "--out", str(tmp_path / "run"), "--n-steps", "5"])
    assert head in capsys.readouterr().err
    main(["evaluate", "--runs", str(tiny_run.workdir), *data, "--n-draws", "2"])
    assert head in capsys.readouterr().out


def test_controls_that_were_divided_and_files_that_were_joined():
    """The training cells are those of the fit then too: nothing seems to be of other cells."""
    named = [("a", tiny_cellsets.make_adata()), ("b", tiny_cellsets.make_adata(donors=("e1", "e2")))]
    experiment = replace(
        tiny_cellsets.EXPERIMENT,
        control_seed=1,
        split=replace(tiny_cellsets.EXPERIMENT.split, values=(("a_d3",),)),
        preprocess=replace(tiny_cellsets.EXPERIMENT.preprocess, n_top_genes=5, target_sum="median"),
    )
    findings = cellsets.prepare(experiment, named).findings
    assert rules_of(findings) == {"few-held-out-cells", "seen-elsewhere"}
    findings = cellsets.prepare(replace(experiment, control_seed=None), named).findings
    assert rules_of(findings) == {"few-held-out-cells", "seen-elsewhere", "shared-controls"}
