"""One process on its own, and what `start` refuses; several processes are in train/test_shared.py."""

import jax
import pytest

from scjax import hosts


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with; nothing is joined."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    for name in hosts._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_process_on_its_own(joined):
    assert not hosts.start()
    assert not joined
    assert hosts.is_first()
    assert hosts.together(lambda: 3, "Work") == 3
    assert hosts.anyone(True)
    assert not hosts.anyone(False)
    hosts.check_agreed("the settings", "any")
    hosts.refuse_several("this")
    with pytest.raises(KeyError, match="gone"):
        hosts.together(lambda: {}["gone"], "Work")


def test_processes_are_named_by_arguments_or_by_the_environment(joined, monkeypatch):
    assert hosts.start("first:1234", 2, 1)
    for name, value in zip(hosts._VARIABLES, ("other:99", "3", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert hosts.start()
    assert not hosts.start("first:1234", 1, 0)  # arguments come before the environment
    assert [args for args, _ in joined] == [("first:1234", 2, 1), ("other:99", 3, 2), ("first:1234", 1, 0)]


def test_the_cluster_is_asked_for_on_request(joined):
    assert not hosts.start(detect=True)
    assert joined[0][0] == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "first:1234"}, r"all of coordinator, n_processes, process_id; coordinator=first:1234 came"),
        ({"n_processes": 2, "process_id": 0}, r"n_processes=2, process_id=0 came without \['coordinator'\]"),
        ({"coordinator": "first", "n_processes": 2, "process_id": 0}, "coordinator must be HOST:PORT; got 'first'"),
        ({"coordinator": "a:1", "n_processes": 2, "process_id": 2}, r"process_id must lie in 0, ..., 1 of 2 processes"),
        ({"coordinator": "a:1", "n_processes": 0, "process_id": 0}, "n_processes must be at least 1; got 0"),
        ({"process_id": 1, "detect": True}, "detect=True asks the cluster for process_id; leave them out"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_joined(joined, arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(**arguments)
    assert not joined


def test_half_an_environment_is_refused(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES=2 came without \['JAX_COORDINATOR_ADDRESS'"):
        hosts.start()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a whole number; got 'one'"):
        hosts.start()
    assert not joined
