"""Prefetching changes neither the order nor the values of batches, and neither hangs nor hides an error."""

import threading

import numpy as np
import pytest

from scjax.data.device import prefetch


def batch_at(step):
    return {"x": np.full((2,), step, np.float32), "parts": (np.array(step),)}


def running():
    return [t for t in threading.enumerate() if t.name.startswith("scjax-prefetch")]


@pytest.mark.parametrize("chunk", [1, 3, 10, 50])
@pytest.mark.parametrize("depth", [1, 2, 20])
def test_order_and_values_are_those_of_a_plain_loop(chunk, depth):
    chunks = list(prefetch(batch_at, 5, 27, chunk=chunk, depth=depth))
    assert [len(c["x"]) for c in chunks] == [min(chunk, 27 - s) for s in range(5, 27, chunk)]
    np.testing.assert_array_equal(np.concatenate([c["parts"][0] for c in chunks]), np.arange(5, 27))
    np.testing.assert_array_equal(np.concatenate([c["x"][:, 1] for c in chunks]), np.arange(5, 27))
    assert not running()


def test_nothing_to_do():
    assert list(prefetch(batch_at, 3, 3)) == []


def test_an_error_comes_in_its_turn_with_its_step():
    def broken(step):
        if step == 5:
            raise KeyError("lost")
        return batch_at(step)

    chunks = prefetch(broken, 0, 100, chunk=2, depth=4)
    assert [next(chunks)["parts"][0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(KeyError, match="lost") as caught:
        next(chunks)
    assert "While making the batch of step 5." in caught.value.__notes__
    assert not running()


def test_unequal_shapes_are_named_by_their_steps():
    with pytest.raises(ValueError, match="shape") as caught:
        list(prefetch(lambda step: np.zeros(step), 0, 4, chunk=2))
    assert any("steps 0 to 1" in note for note in caught.value.__notes__)


def test_leaving_early_stops_the_thread():
    asked = []

    def counted(step):
        asked.append(step)
        return batch_at(step)

    chunks = prefetch(counted, 0, 10_000, chunk=2, depth=3)
    next(chunks)
    chunks.close()
    assert not running()
    assert max(asked) < 10  # the chunk that was taken, and at most depth ahead


def test_only_depth_chunks_are_made_ahead():
    made = threading.Semaphore(0)
    asked = []

    def counted(step):
        asked.append(step)
        made.release()
        return batch_at(step)

    chunks = prefetch(counted, 0, 100, chunk=1, depth=2)
    next(chunks)
    for _ in range(3):  # one taken, two ahead
        assert made.acquire(timeout=30)
    assert not made.acquire(timeout=0.2)
    chunks.close()
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk": 0}, "chunk must be"), ({"depth": 0}, "depth must be"), ({}, "stop must be at least 9")],
)
def test_bad_input_is_met_before_the_first_batch(options, message):
    with pytest.raises(ValueError, match=message):
        prefetch(batch_at, 9, 8, **options)
