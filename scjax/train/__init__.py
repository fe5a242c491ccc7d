"""Training of anything with a loss: optimizers, the state of a run, one step, the loop, and what happens beside it."""
