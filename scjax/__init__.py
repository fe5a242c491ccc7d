"""Generative models of single-cell populations: scIMF, scDFM and PerturbDiff, as pure functions in JAX.

Importing this package loads none of its parts and changes no setting of JAX; import the part you use:
`from scjax.models import scimf`, `from scjax.losses import sinkhorn_divergence`, `from scjax.data import datasets`.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
