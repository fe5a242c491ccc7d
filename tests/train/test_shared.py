"""One training on 8 devices of a process, and on 2 devices of each of 2 processes: the run of one device, and its
checkpoints go on anywhere. The work is done by `shared_run.py`, in processes of their own.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import regression
import shared_run
from programs import finish, free_port, start

from scjax.checkpoint import list_steps, read

PROGRAM = ("-W", "error", str(Path(__file__).with_name("shared_run.py")))
PATIENCE = 240  # seconds


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    finish(start(8, *PROGRAM, "devices", str(folder)), patience=PATIENCE)
    return folder, json.loads((folder / "devices.json").read_text())


@pytest.fixture(scope="module")
def processes(devices):
    """What each of the two tells; the first one's folder is that of `devices`."""
    folder, _ = devices
    port = free_port()
    finish(*(start(2, *PROGRAM, "processes", str(folder), port, str(number)) for number in range(2)), patience=PATIENCE)
    return folder, [json.loads((folder / f"process-{number}.json").read_text()) for number in range(2)]


def leaves(folder: Path, name: str) -> list[np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return [file[key] for key in file.files]


def assert_same_run(folder: Path, name: str, as_in: str = "one") -> None:
    """Twenty steps of Adam: sums in another order differ in the last digits of float32."""
    found, wanted = leaves(folder, name), leaves(folder, as_in)
    assert len(found) == len(wanted) > 20
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["replicated", "spread"])
def test_eight_devices_make_the_run_of_one(devices, name):
    assert_same_run(devices[0], name)


def test_large_arrays_are_spread_and_the_rest_is_told(devices):
    """Parameters and Adam's moments alike: an eighth of the two matrices, the whole of a vector."""
    _, found = devices
    wanted = {"w": [6, 2], "v": [2, 6], "odd": [3, 7], "b": [6]}
    assert found["parts"] == wanted | {f"adam {name}": shape for name, shape in wanted.items()}
    for line in found["warnings"]:
        assert line.startswith("shard_above=16: ")
        assert "whole, the first of them .params['odd'] (3, 7)" in line


def test_one_compilation_on_devices(devices):
    """The loss is traced as often for 4 calls as for 2, the second a short one."""
    _, found = devices
    short, both = found["traced"]
    assert both == 2 * short > 0


def test_batches_that_the_devices_cannot_share_are_refused(devices):
    _, found = devices
    assert found["refused"] == "the first axis of ['x'] must be a multiple of the 8 devices that share it; got 15."


@pytest.mark.parametrize("name", ["8_to_1", "8_to_4", "1_to_8"])
def test_a_checkpoint_goes_on_on_other_devices(devices, name):
    assert_same_run(devices[0], name)


def test_a_checkpoint_goes_on_bit_for_bit_on_the_same_devices(devices):
    folder, _ = devices
    for one, other in zip(leaves(folder, "8_to_8"), leaves(folder, "spread"), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", ["processes", "2_to_2", "8_to_2"])
def test_two_processes_make_the_run_of_one(processes, name):
    assert_same_run(processes[0], name)


def test_two_processes_hold_a_part_each(processes):
    for told in processes[1]:
        assert (told["parts"]["w"], told["parts"]["adam v"]) == ([6, 4], [4, 6])


def test_what_two_processes_saved_one_reads(processes):
    folder, _ = processes
    found = read(folder / "two", 20).arrays["state"]
    wanted = leaves(folder, "2_to_2")
    assert found["params"]["w"].shape == (6, 16)
    assert any(np.array_equal(found["params"]["w"], leaf) for leaf in wanted)


def test_the_first_process_alone_writes_and_talks(processes):
    folder, (first, second) = processes
    assert (first["first"], second["first"]) == (True, False)
    assert (first["told"], second["told"]) == (7, 0)  # five lines of the log and two validations
    assert "step 10/10" in (folder / "progress-0.txt").read_text()
    assert (folder / "progress-1.txt").read_text() == ""
    steps = [json.loads(line)["step"] for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15, 16, 18, 20, 20]
    assert list_steps(folder / "two") == (10, 15, 20)
    assert {p.name for p in (folder / "two").iterdir()} == {"10", "15", "20", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("what", "failed", "error", "told"),
    [
        ("broken", 1, "OSError: the file vanished", "A batch failed on process 1 of 2"),
        ("full", 0, "OSError: the disk is full", "A log failed on process 0 of 2"),
        ("strict", 0, "RuntimeError: too slow", "A batch failed on process 0 of 2"),
        ("last", 0, "OSError: a checkpoint could not be written", "The end of a run failed on process 0 of 2"),
        ("other run", 0, "holds checkpoints of another run", "Opening checkpoints failed on process 0 of 2"),
    ],
)
def test_what_fails_on_one_process_ends_the_other(processes, what, failed, error, told):
    """Neither waits for the other; what was saved before stays."""
    folder, both = processes
    assert error in both[failed][what]
    assert both[1 - failed][what].startswith(f"PeerError: {told}")
    if what != "other run":
        assert both[0]["steps"][what] == [5] == list(list_steps(folder / what))


def test_sigterm_to_one_process_stops_both_at_one_step(processes):
    _, both = processes
    for told in both:
        assert told["sigterm"].startswith("Interrupted: Stopped by SIGTERM after step 5; step 5 is saved in")
        assert told["steps"]["sigterm"] == [5]


def test_what_processes_must_agree_on(processes):
    for told in processes[1]:
        assert told["disagree"] == (
            "ValueError: the settings must be the same on all processes; on process 1 other than on 0."
        )
        assert told["no mesh"] == "ValueError: training without a mesh is for one process; there are 2."
        assert told["too few"].startswith("ValueError: n_devices must be all 4 devices of the 2 processes")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_loses_no_checkpoint(tmp_path):
    """The survivor learns of it within a minute and a half, ends with an error, and one device goes on."""
    port = free_port()
    survivor, victim = (start(2, *PROGRAM, "killed", str(tmp_path), port, str(number)) for number in range(2))
    try:
        survivor.communicate(timeout=PATIENCE)
        victim.communicate(timeout=PATIENCE)
    finally:
        survivor.kill()
        victim.kill()
    assert victim.returncode == -9
    assert survivor.returncode not in (0, -9)
    newest = list_steps(tmp_path / "killed")[-1]
    assert newest in (5, 10)
    found = shared_run.saved(tmp_path / "killed", shared_run.N_STEPS, resume=newest)
    wanted = shared_run.run()
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    assert regression.bits(found.key) == regression.bits(wanted.key)
