"""Batches made ahead of the consumer, in order."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from scjax.check import at_least

__all__ = ["prefetch"]


def prefetch(
    batch_at: Callable[[int], Any], start: int, stop: int, *, chunk: int = 1, depth: int = 2
) -> Generator[Any, None, None]:
    """Batches start, ..., stop - 1 as pytrees stacked along a new first axis, `chunk` of them at a time.

    One background thread makes up to `depth` chunks ahead, in order; the last chunk may be shorter. All batches of a
    chunk have one structure and one shape. Leaving the loop early, or closing the generator, stops the thread after the
    batch in hand.

    Raises:
        ValueError: chunk or depth below 1, or stop before start.
        Exception: what `batch_at` raised, when its chunk is asked for, with a note that names the step.
    """
    at_least("chunk", chunk, 1)
    at_least("depth", depth, 1)
    at_least("stop", stop, start)
    return _prefetch(batch_at, start, stop, chunk, depth)


def _prefetch(
    batch_at: Callable[[int], Any], start: int, stop: int, chunk: int, depth: int
) -> Generator[Any, None, None]:
    closed = False

    def make(first: int) -> Any:
        batches = []
        for step in range(first, min(first + chunk, stop)):
            if closed:
                return None
            try:
                batches.append(batch_at(step))
            except Exception as err:
                err.add_note(f"While making the batch of step {step}.")
                raise
        return _stack(batches, first)

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scjax-prefetch")
    try:
        firsts = iter(range(start, stop, chunk))
        ahead: deque[Future[Any]] = deque(executor.submit(make, first) for first in islice(firsts, depth))
        while ahead:
            stacked = ahead.popleft().result()
            ahead.extend(executor.submit(make, first) for first in islice(firsts, 1))
            yield stacked
    finally:
        closed = True
        executor.shutdown(cancel_futures=True)


def _stack(batches: list[Any], first: int) -> Any:
    import jax

    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    except ValueError as err:
        err.add_note(f"While stacking the batches of steps {first} to {first + len(batches) - 1}: their shapes differ.")
        raise
