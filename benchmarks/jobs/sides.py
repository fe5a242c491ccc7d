"""What the jobs of all models share: how a side is compiled and called, and the arithmetic that it cannot go below.

A matrix product [n, k] @ [k, m] is 2 n k m operations; all others are counted as none. Beside it one large product is
measured with the side's own library: the two give the least time of a step on the machine as it is at that minute.
"""

import os
import time
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from harness import Job, Memory

__all__ = [
    "compiled",
    "jax_gemm",
    "jax_memory",
    "jax_training",
    "matrix_flops",
    "prepare_torch",
    "torch_gemm",
    "torch_matrix_flops",
]

GEMM_SIZE, GEMM_REPEATS = 2048, 3


def compiled(function: Callable, *args: Any) -> tuple[Any, float]:
    """The jitted `function` compiled for `args`, and the seconds of tracing and compiling."""
    started = time.perf_counter()
    ready = function.lower(*args).compile()
    return ready, time.perf_counter() - started


def jax_training(
    update: Callable, state: Any, chunk: Any, n_steps: int, *, settings: Mapping[str, Any], **more: Any
) -> Job:
    """Steps of the compiled loop, `n_steps` a call, each call going on from the last one's state.

    Args:
        update: jitted `make_scanned_update`, which may take the state's memory.
        state: before the first step.
        chunk: stacked batches, on the device.
        n_steps: of a call.
        settings: what a reader needs to repeat it.
        **more: of `Job`.
    """
    import jax
    import jax.numpy as jnp

    n = jnp.asarray(n_steps, jnp.int32)
    update, compile_s = compiled(update, state, chunk, state.step, n)

    def call() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, chunk, jnp.array(state.step), n))
        if not bool(metrics["finite"].all()):
            raise RuntimeError(f"the loss is not finite; what was timed is no training: {metrics}")

    return Job(
        call,
        n_per_call=n_steps,
        settings=settings,
        compile_s=compile_s,
        temp_bytes=update.memory_analysis().temp_size_in_bytes,
        **more,
    )


def jax_sampling(run: Callable, *args: Any, **more: Any) -> Job:
    """A jitted function of `args`, called anew each time.

    Args:
        run: jitted.
        *args: the same for every call.
        **more: of `Job`.
    """
    import jax

    run, compile_s = compiled(run, *args)
    return Job(
        lambda: jax.block_until_ready(run(*args)),
        compile_s=compile_s,
        temp_bytes=run.memory_analysis().temp_size_in_bytes,
        **more,
    )


def jax_memory(
    update: Callable, make_state: Callable[[], Any], make_chunk: Callable[[], Any], settings: Mapping[str, Any]
) -> Memory:
    """One step of the compiled loop, compiled for shapes alone."""
    import jax
    import jax.numpy as jnp

    one = jax.ShapeDtypeStruct((), jnp.int32)
    ready, _ = compiled(update, jax.eval_shape(make_state), jax.eval_shape(make_chunk), one, one)

    def run() -> None:
        state, chunk = make_state(), jax.tree.map(jnp.asarray, make_chunk())
        jax.block_until_ready(ready(state, chunk, jnp.array(state.step), jnp.asarray(1, jnp.int32)))

    return Memory(ready.memory_analysis(), run, settings=settings)


def prepare_torch() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def matrix_flops(function: Callable, *args: Any, of_branches: Callable[[list[float]], float] = max) -> float:
    """Operations of all matrix products that the result of `function(*args)` depends on.

    Args:
        function: not jitted.
        *args: arrays or shapes.
        of_branches: what counts of the branches of a condition, from the operations of each.

    Raises:
        ValueError: a loop whose number of rounds nobody knows before.
    """
    import jax
    from jax.interpreters import partial_eval

    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(jaxpr, of_branches)


def _flops(jaxpr: Any, of_branches: Callable[[list[float]], float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * prod(out) * prod(lhs[axis] for axis in contracted)
        elif name == "cond":
            total += of_branches([_flops(branch.jaxpr, of_branches) for branch in params["branches"]])
        elif name == "while" and _flops(params["body_jaxpr"].jaxpr, of_branches):
            raise ValueError("the matrix products of a while loop cannot be counted; count those of one round.")
        else:
            inner = sum(_flops(getattr(p, "jaxpr", p), of_branches) for p in params.values() if _is_jaxpr(p))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def torch_matrix_flops(function: Callable[[], Any]) -> float:
    """Operations of all matrix products that a call makes, backward pass included.

    On the device "meta" nothing is computed, and attention is written out, so that its products are counted, too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def jax_gemm() -> Callable[[], float]:
    """Measures the operations per second of one large matrix product in single precision."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((GEMM_SIZE, GEMM_SIZE), jnp.float32)
    return lambda: _fastest(lambda: jax.block_until_ready(product(a)))


def torch_gemm() -> Callable[[], float]:
    """The same with PyTorch."""
    import torch

    a = torch.ones(GEMM_SIZE, GEMM_SIZE)
    return lambda: _fastest(lambda: a @ a)


def _fastest(product: Callable[[], Any]) -> float:
    product()  # compiles, wakes the threads
    seconds = []
    for _ in range(GEMM_REPEATS):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return 2.0 * GEMM_SIZE**3 / min(seconds)
