"""Distances between two populations of cells, differentiable in both."""

from scjax.losses.mmd import energy_distance, mmd2
from scjax.losses.sinkhorn import (
    SinkhornSolution,
    annealed_sinkhorn_divergence,
    self_transport,
    sinkhorn_divergence,
    sinkhorn_plan,
    solve_sinkhorn,
)

__all__ = [
    "SinkhornSolution",
    "annealed_sinkhorn_divergence",
    "energy_distance",
    "mmd2",
    "self_transport",
    "sinkhorn_divergence",
    "sinkhorn_plan",
    "solve_sinkhorn",
]
