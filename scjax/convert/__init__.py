"""Weights of the PyTorch programs of the three papers to parameters and back, all or nothing.

state = read_torch("weights.pt")                     a flat dict of arrays; nothing in the file is run
weights = from_torch(state)                          system, config, params and constants, for `scjax.models`
save("converted", weights, source=..., sha256=...)   a checkpoint, as `scjax convert` makes it
load("converted").weights                            from a converted checkpoint, or from a run
write_torch("back.pt", to_torch(weights))            the names and shapes of the PyTorch program, bit for bit

What is known of each system stands in `scjax.convert.scimf`, `scdfm` and `perturbdiff`.
"""

from scjax.convert.checkpoints import Loaded, digest, load, save, told
from scjax.convert.files import check_new, read_torch, write_torch
from scjax.convert.systems import SYSTEMS, Weights, from_torch, system_of, to_torch

__all__ = [
    "SYSTEMS",
    "Loaded",
    "Weights",
    "check_new",
    "digest",
    "from_torch",
    "load",
    "read_torch",
    "save",
    "system_of",
    "to_torch",
    "told",
    "write_torch",
]
