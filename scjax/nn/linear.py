"""A linear layer that starts as PyTorch's does, so that training begins where the references began."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

__all__ = ["Linear"]


class Linear(nn.Module):
    """x W + b; entries of W and b start uniform within 1 / sqrt(number of inputs).

    `dtype` is that of the product and of the result; None takes the widest of x, W and b.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        bound = x.shape[-1] ** -0.5

        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        kernel = self.param("kernel", uniform, (x.shape[-1], self.features))
        bias = self.param("bias", uniform, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x @ kernel
        return y if bias is None else y + bias[None]
