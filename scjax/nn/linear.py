"""A linear layer that starts as PyTorch's does, so that training begins where the references began."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

__all__ = ["Linear"]


class Linear(nn.Module):
    """x W + b; entries of W and b start uniform within 1 / sqrt(number of inputs)."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        bound = x.shape[-1] ** -0.5

        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        y = x @ self.param("kernel", uniform, (x.shape[-1], self.features))
        return y + self.param("bias", uniform, (self.features,))[None] if self.use_bias else y
