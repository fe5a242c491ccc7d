"""The timing harness: workers take turns, times are per step, records are appended and never lost."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("benchmark_harness", ROOT / "benchmarks" / "harness.py")
harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import harness

log = Path({log!r})

def build():
    print("a library that talks")
    def call():
        print("and talks")
        with log.open("a") as file:
            file.write(sys.argv[1] + " ")
    return harness.Job(call, n_per_call=2, settings={{"who": sys.argv[1]}}, compile_s=1.5)

harness.serve(build, 1)
"""


@pytest.fixture
def commands(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(benchmarks=str(ROOT / "benchmarks"), log=str(tmp_path / "log")))
    return {side: [sys.executable, str(script), side] for side in ("ours", "theirs")}


def test_sides_take_turns_in_alternating_order(commands, tmp_path):
    result = harness.compare(commands, n_rounds=3, n_threads=1, progress=False)
    warm_up, rounds = "ours theirs ", "ours theirs theirs ours ours theirs "
    assert (tmp_path / "log").read_text() == warm_up + rounds
    assert list(result["sides"]) == ["ours", "theirs"]
    side = result["sides"]["ours"]
    assert side["wall_s"]["n"] == 3
    assert 0 < side["wall_s"]["min"] <= side["wall_s"]["median"] <= side["wall_s"]["max"]
    assert side["settings"] == {"who": "ours"}
    assert side["compile_s"] == 1.5
    assert side["peak_rss_bytes"] >= side["built_rss_bytes"] > 1e6
    assert 0 <= side["other_cores"]["min"] <= side["other_cores"]["max"]
    ratio = result["ratios"]["theirs/ours"]["wall_s"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    json.dumps(result)
    assert "theirs/ours" in harness.report("title", result)


def test_times_are_those_of_one_step(commands):
    script = Path(commands["ours"][1])
    text = script.read_text().replace('print("and talks")', "import time; time.sleep(0.5)")
    script.write_text(text.replace("n_per_call=2", "n_per_call=1000"))
    result = harness.compare({"ours": commands["ours"]}, n_rounds=1, n_threads=1, progress=False)
    assert 0.5 / 1000 <= result["sides"]["ours"]["wall_s"]["median"] < 0.5
    assert result["ratios"] == {}


def test_the_allocator_of_the_workers_is_a_choice(commands):
    script = Path(commands["ours"][1])
    text = script.read_text().replace('{"who": sys.argv[1]}', '{"set": __import__("os").environ.get("GLIBC_TUNABLES")}')
    script.write_text(text)
    for keep_memory in (True, False):
        result = harness.compare(
            {"ours": commands["ours"]}, n_rounds=1, n_threads=1, keep_memory=keep_memory, progress=False
        )
        settings = result["sides"]["ours"]["settings"]
        assert (settings["set"] == harness.KEEP_MEMORY) == keep_memory


def test_the_arithmetic_limit_stands_beside_the_time(commands):
    script = Path(commands["ours"][1])
    text = script.read_text().replace("compile_s=1.5", "flops=3e6, state_bytes=10**6, gemm=lambda: 2e9")
    script.write_text(text.replace('print("and talks")', "import time; time.sleep(0.1)"))
    result = harness.compare({"ours": commands["ours"]}, n_rounds=1, n_threads=1, progress=False)
    side = result["sides"]["ours"]
    assert side["flops"] == 3e6
    assert side["least_s"]["median"] == pytest.approx(1.5e-3)
    assert side["share"]["median"] == pytest.approx(1.5e-3 / side["wall_s"]["median"])
    assert 0 < side["share"]["median"] < 1.5e-3 / 0.05
    table = harness.report("title", result)
    assert "least seconds" in table
    assert f"{side['share']['median']:.0%}" in table


def test_statistics_and_ratios_go_round_by_round():
    runs = [{"wall_s": 3.0, "cpu_s": 4.0}, {"wall_s": 1.0, "cpu_s": 2.0}]
    assert harness._statistics(runs)["wall_s"] == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 2}
    ratios = harness._ratios(runs, [{"wall_s": 1.0, "cpu_s": 1.0}, {"wall_s": 2.0, "cpu_s": 1.0}])
    assert ratios["wall_s"] == {"median": 1.75, "min": 0.5, "max": 3.0, "n": 2}
    assert ratios["cpu_s"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}


def test_a_worker_that_dies_is_named(commands):
    commands["theirs"] = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="side 'theirs' ended early, with status 3"):
        harness.compare(commands, n_rounds=1, n_threads=1, progress=False)


def test_records_are_appended(tmp_path):
    path = tmp_path / "results" / "train_step.json"
    harness.append({"n": 1}, path)
    harness.append({"n": 2}, path)
    assert json.loads(path.read_text()) == [{"n": 1}, {"n": 2}]
    assert [p.name for p in path.parent.iterdir()] == ["train_step.json"]


def test_a_record_tells_where_it_was_made():
    record = harness.environment()
    assert set(record) == {"date", "commit", "machine", "versions"}
    assert record["machine"]["n_cores"] >= 1
    assert "jax" in record["versions"]
    json.dumps(record)
