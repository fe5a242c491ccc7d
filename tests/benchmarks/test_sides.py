"""What the benchmarks count as the operations of a step."""

import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def sides():
    """The scripts import each other by name, so that their folder must be on the path."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import jobs.sides

        yield jobs.sides
    finally:
        sys.path.remove(str(BENCHMARKS))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_product_counts_two_operations_an_entry_and_term(sides):
    assert sides.matrix_flops(lambda a, b: a @ b, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
    batched = sides.matrix_flops(lambda a, b: jnp.einsum("nij,njk->nik", a, b), shape(7, 3, 4), shape(7, 4, 5))
    assert batched == 7 * 2 * 3 * 4 * 5


def test_what_the_result_does_not_depend_on_is_not_counted(sides):
    def function(a, b):
        jax.jit(jnp.matmul)(b, b)
        return a @ a

    assert sides.matrix_flops(function, shape(3, 3), shape(9, 9)) == 2 * 3**3


def test_rounds_branches_and_gradients_are_counted(sides):
    def loop(a):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.matmul)(x, a), None), a, None, length=5)[0]

    assert sides.matrix_flops(loop, shape(3, 3)) == 5 * 2 * 3**3

    def branch(a, coin):
        return jax.lax.cond(coin, lambda x: x @ x @ x, lambda x: x, a)

    coin = jax.ShapeDtypeStruct((), bool)
    assert sides.matrix_flops(branch, shape(3, 3), coin) == 2 * 2 * 3**3
    assert sides.matrix_flops(branch, shape(3, 3), coin, of_branches=statistics.mean) == 2 * 3**3

    gradient = jax.value_and_grad(lambda w, x: jnp.sum((x @ w) ** 2))
    assert sides.matrix_flops(gradient, shape(4, 5), shape(3, 4)) == 2 * (2 * 3 * 4 * 5)  # forth, and to w


def test_a_loop_of_unknown_length_is_refused(sides):
    def function(a):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, a)

    with pytest.raises(ValueError, match="matrix products of a while loop cannot be counted"):
        sides.matrix_flops(function, shape(3, 3))


def test_pytorch_is_counted_alike(sides):
    torch = pytest.importorskip("torch", reason="benchmarks' other side; of the extra 'torch'")
    with torch.device("meta"):
        w, x = torch.zeros(4, 5, requires_grad=True), torch.zeros(3, 4)
        q = torch.zeros(2, 8, 16, 6)
    assert sides.torch_matrix_flops(lambda: (x @ w).square().sum().backward()) == 2 * (2 * 3 * 4 * 5)
    attention = sides.torch_matrix_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * (2 * 2 * 8 * 16 * 16 * 6)


def test_a_large_product_is_measured(sides, monkeypatch):
    monkeypatch.setattr(sides, "GEMM_SIZE", 64)
    assert sides.jax_gemm()() > 1e6
