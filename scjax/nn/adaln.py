"""Adaptive normalisation: a condition scales, shifts and gates what a layer does."""

from jaxtyping import Array, Float

__all__ = ["modulate"]


def modulate(
    x: Float[Array, "*n features"], shift: Float[Array, "*m features"], scale: Float[Array, "*m features"]
) -> Float[Array, "*n features"]:
    """The change x (1 + scale) + shift, the identity where the condition says nothing; both broadcast to x.

    Reference: Peebles and Xie, "Scalable diffusion models with transformers", ICCV 2023.
    """
    return x * (1 + scale) + shift
