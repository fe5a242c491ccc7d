"""The benchmark of one accelerator at toy sizes, on whatever machine this is: every part, and what may go wrong."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(path, *options):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(path), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_ceilings_are_measured_by_both_libraries_and_records_are_kept(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('[{"an": "older record"}]')
    (older, record), said = run(path, "--parts", "ceilings")
    assert older == {"an": "older record"}
    assert record["question"] == "gpu"
    assert record["tiny"] is True
    assert set(record["ceilings"]) == {"product_float32", "product_tensorfloat32", "product_bfloat16", "copy"}
    assert all(rate > 0 for rate in record["ceilings"].values())
    of = {library: [p for p in record["pieces"] if p["library"] == library] for library in ("scjax", "peer")}
    assert len(of["scjax"]) == 4
    assert not any("error" in piece for piece in of["scjax"])
    if HAS_TORCH:
        assert [p["piece"] for p in of["peer"]] == [p["piece"] for p in of["scjax"]]
        assert not any("error" in piece for piece in of["peer"])
    else:
        (only,) = of["peer"]
        assert only["piece"] == "start"
        assert "torch" in only["error"]
    assert "ceilings/scjax/product_float32" in said


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    """Training, sampling and attention of all systems, in both precisions, and the peers as published and compiled."""
    pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")
    (record,), said = run(tmp_path / "gpu.json", "--budget", "3000")
    failed = {f"{p['part']}/{p['library']}/{p['piece']}": p["error"] for p in record["pieces"] if "error" in p}
    assert not failed, failed
    for system in ("scimf", "scdfm", "perturbdiff"):
        of_system = [p for p in record["pieces"] if p["part"] == system and "error" not in p]
        assert len(of_system) == 8
        assert all(p["flops"] > 0 and p["flops_s"] > 0 for p in of_system)
        assert f"{system}: peer train_compiled_bfloat16 / scjax train_float32" in record["ratios"]
        assert set(record["shares"][f"{system}/scjax/train_float32"]) == {"flops"}
    of_attention = [p for p in record["pieces"] if p["part"] == "attention"]
    assert len(of_attention) == 10
    assert {p["settings"]["way"] for p in of_attention if p["piece"].endswith("blockwise")} == {"blockwise"}
    assert all(
        set(record["shares"][f"attention/{p['library']}/{p['piece']}"]) == {"flops", "bytes"} for p in of_attention
    )


# -- what may go wrong


def sizes(**more):
    return SimpleNamespace(jobs={}, calls=(1, 3), shortest_s=0.0, **more)


@pytest.fixture
def pieces(gpu, monkeypatch):
    """A part of three pieces, the second of which finds no memory; no library is asked."""

    def full():
        raise MemoryError("no 74 GiB are left")

    job = gpu.Job(lambda: None, compile_s=0.5, flops=2e6, settings={"bytes": 8.0})
    of = [gpu.Piece("one", lambda: job), gpu.Piece("two", full), gpu.Piece("three", lambda: job._replace(n_per_call=4))]
    monkeypatch.setattr(gpu, "pieces_of", lambda library, part, sizes: of)
    monkeypatch.setattr(gpu, "_open", lambda library: "a device")
    monkeypatch.setattr(gpu, "_memory", lambda library: {"peak_device_bytes": 7})
    monkeypatch.setattr(gpu, "_let_go", lambda library: None)
    return of


def test_a_piece_that_fails_loses_no_other(gpu, pieces):
    one, two, three = gpu.work("scjax", "scimf", sizes(), 60)
    assert two == {
        "part": "scimf", "library": "scjax", "piece": "two", "device": "a device",
        "error": "MemoryError: no 74 GiB are left",
    }  # fmt: skip
    for piece in (one, three):
        assert piece["flops_s"] == pytest.approx(2e6 / piece["wall_s"]["median"])
        assert piece["bytes_s"] == pytest.approx(8 / piece["wall_s"]["median"])
        assert piece["compile_s"] == 0.5
        assert piece["peak_device_bytes"] == 7


def test_what_finds_no_time_is_told(gpu, pieces):
    told = list(gpu.work("scjax", "scimf", sizes(), -1))
    assert [p["piece"] for p in told] == ["one", "two", "three"]
    assert all(p["error"].startswith("not run") for p in told)


def test_calls_end_with_the_time(gpu):
    calls = []
    job = gpu.Job(lambda: calls.append(None))
    measured = gpu.measure(job, SimpleNamespace(calls=(5, 9), shortest_s=60.0), time.monotonic() - 1)
    assert len(calls) == 2  # one to warm up, and one
    assert measured["wall_s"]["n"] == 1
    assert measured["flops_s"] is None


def test_a_process_that_dies_is_recorded_after_what_it_told(gpu, monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import sys\nprint('{\"piece\": \"one\"}', flush=True)\nprint('out of luck', file=sys.stderr)\nsys.exit(3)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    one, end = gpu.ask("scjax", "scdfm", 60, tiny=True)
    assert one == {"piece": "one"}
    assert end["piece"] == "end"
    assert "status 3" in end["error"]
    assert "out of luck" in end["error"]


def test_parts_for_which_no_time_is_left_are_told(gpu, tmp_path):
    record = gpu.run(["scimf", "scdfm"], tmp_path / "gpu.json", budget_s=0.0, tiny=True, peer=True)
    assert [(p["part"], p["library"]) for p in record["pieces"]] == [
        ("scimf", "scjax"), ("scimf", "peer"), ("scdfm", "scjax"), ("scdfm", "peer")
    ]  # fmt: skip
    assert all("no time was left" in p["error"] for p in record["pieces"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == [record]


def test_shares_of_the_ceilings_and_ratios(gpu):
    def piece(part, library, name, median, flops_s=None, bytes_s=None):
        of = {"part": part, "library": library, "piece": name, "wall_s": {"median": median}}
        return of | {"flops_s": flops_s, "bytes_s": bytes_s}

    found = gpu.summary(
        [
            piece("ceilings", "scjax", "product_float32", 1, flops_s=40.0),
            piece("ceilings", "peer", "product_float32", 1, flops_s=50.0),
            piece("ceilings", "scjax", "product_bfloat16", 1, flops_s=400.0),
            piece("ceilings", "scjax", "copy", 1, bytes_s=4.0),
            piece("scdfm", "scjax", "train_float32", 2.0, flops_s=25.0),
            piece("scdfm", "scjax", "train_bfloat16", 0.5, flops_s=100.0),
            piece("scdfm", "peer", "train_float32", 10.0, flops_s=5.0),
            piece("scdfm", "peer", "train_compiled_bfloat16", 4.0, flops_s=40.0),
            piece("attention", "peer", "cells_8_bfloat16", 4.0, flops_s=40.0, bytes_s=1.0),
            {"part": "attention", "library": "scjax", "piece": "cells_8_bfloat16", "error": "no"},
        ]
    )
    assert found["ceilings"] == {"product_float32": 50.0, "product_bfloat16": 400.0, "copy": 4.0}
    assert found["shares"]["scdfm/scjax/train_bfloat16"] == {"flops": 0.25}
    assert found["shares"]["scdfm/peer/train_float32"] == {"flops": 0.1}
    assert found["shares"]["attention/peer/cells_8_bfloat16"] == {"flops": 0.1, "bytes": 0.25}
    assert found["ratios"] == {
        "scdfm: peer train_float32 / scjax train_float32": 5.0,
        "scdfm: peer train_float32 / scjax train_bfloat16": 20.0,
        "scdfm: peer train_compiled_bfloat16 / scjax train_float32": 2.0,
        "scdfm: peer train_compiled_bfloat16 / scjax train_bfloat16": 8.0,
    }
