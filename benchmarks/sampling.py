"""How long does a model take to generate a population, and is it faster than PyTorch?

    python benchmarks/sampling.py --model scimf
    python benchmarks/sampling.py --model scdfm

scIMF: 2000 cells of 50 dims simulated jointly over 7 time units, 70 Euler-Maruyama steps, without dropout.

scDFM: 8 cells of 1000 genes, without dropout, 19 steps of the 3/8 rule; seconds are those of one of the 76 evaluations.
scjax's are the 76th part of a whole run, with all that is done once in a run. The peer does everything at every
evaluation; its are those of the first step.
"""

import argparse
import sys
from functools import partial

import harness
from jobs import scdfm, scimf

# Each names N_SAMPLED, SAMPLING_UNIT and SAMPLE: side -> builder of the job from the number of cells.
MODELS = {"scimf": scimf, "scdfm": scdfm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scimf")
    parser.add_argument("--cells", type=int, help="cells simulated together; the model's usual number by default")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch beside it")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="run all sides under settings of glibc that keep freed memory instead of giving it back at once",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="cores of a side while it runs")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before a call")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    job = MODELS[args.model]
    n_cells = args.cells or job.N_SAMPLED
    if args.worker:
        harness.serve(partial(job.SAMPLE[args.worker], n_cells), args.threads)
        return

    sides = ["scjax"] + (["peer"] if args.peer else [])
    worker = [sys.executable, __file__, "--model", args.model, "--cells", str(n_cells), "--threads", str(args.threads)]
    commands = {side: [*worker, "--worker", side] for side in sides}
    result = harness.compare(
        commands,
        n_rounds=args.rounds,
        n_threads=args.threads,
        patience_s=args.patience,
        keep_memory=args.keep_memory,
    )
    record = {"question": "sampling", "model": args.model, "shapes": {"n_cells": n_cells}, "n_threads": args.threads}
    record |= {"unit": job.SAMPLING_UNIT, "keep_memory": args.keep_memory}
    title = f"\nsampling of {args.model}, {n_cells} cells, {args.threads} threads, seconds of {job.SAMPLING_UNIT}"
    print(harness.report(title, result))
    if args.save:
        harness.append(harness.environment() | record | result, harness.RESULTS / f"sampling_{args.model}.json")


if __name__ == "__main__":
    main()
