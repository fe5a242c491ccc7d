"""How long does a model take to generate a population, and is it faster than PyTorch?

    python benchmarks/sampling.py --model scimf
    python benchmarks/sampling.py --model scdfm
    python benchmarks/sampling.py --model perturbdiff

scIMF: 2000 cells of 50 dims simulated jointly over 7 time units, 70 Euler-Maruyama steps, without dropout.

scDFM: 8 cells of 1000 genes, without dropout, 19 steps of the 3/8 rule; seconds are those of one of the 76 evaluations.
scjax's are the 76th part of a whole run, with all that is done once in a run. The peer does everything at every
evaluation; its are those of the first step.

PerturbDiff: 512 cells of 2000 genes in sets of 256, DDIM with guidance; seconds are those of one step. scjax's are the
tenth part of a run of 10 steps, with all that is done once in a run; the peer's are those of the first steps of 100.
"""

import argparse
from functools import partial

import harness
from jobs import perturbdiff, scdfm, scimf

# Each names N_SAMPLED, SAMPLING_UNIT and SAMPLE: side -> builder of the job from the number of cells.
MODELS = {"scimf": scimf, "scdfm": scdfm, "perturbdiff": perturbdiff}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scimf")
    parser.add_argument("--cells", type=int, help="cells generated together; the model's usual number by default")
    harness.add_options(parser, n_rounds=7)
    args = parser.parse_args()
    job = MODELS[args.model]
    n_cells = args.cells or job.N_SAMPLED
    if args.worker:
        harness.serve(partial(job.SAMPLE[args.worker], n_cells), args.threads)
        return

    harness.ask(
        args,
        [__file__, "--model", args.model, "--cells", str(n_cells)],
        ["scjax", *(["peer"] if args.peer else [])],
        {
            "question": "sampling",
            "model": args.model,
            "shapes": {"n_cells": n_cells} | getattr(job, "SAMPLING_SHAPES", {}),
            "unit": job.SAMPLING_UNIT,
        },
        f"\nsampling of {args.model}, {n_cells} cells, {args.threads} threads, seconds of {job.SAMPLING_UNIT}",
    )


if __name__ == "__main__":
    main()
