"""How long is one training step of a model, and how many times faster than PyTorch?

    python benchmarks/train_step.py --model scimf --targets 512 6400

scIMF: 512 simulated cells of 50 dims, 8 times (7 observed ones, 70 Euler-Maruyama steps), the whole loss with the
transport term against all target cells of each time, gradients, clipping and Adam.
"""

import argparse
import sys
from functools import partial

import harness
from jobs import scimf

# Each names its SHAPES, and TRAIN: side -> builder of the job from the number of target cells.
MODELS = {"scimf": scimf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scimf")
    parser.add_argument("--targets", type=int, nargs="+", default=[512, 6400], help="observed cells of each time")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch beside it")
    parser.add_argument(
        "--single-backward",
        action="store_true",
        help="and PyTorch with one backward pass, unlike the published program",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores of a side while it runs")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before a call")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        harness.serve(partial(MODELS[args.model].TRAIN[args.worker], args.targets[0]), args.threads)
        return

    sides = ["scjax"] + (["peer"] if args.peer else []) + (["peer_single_backward"] if args.single_backward else [])
    for n_targets in args.targets:
        worker = [sys.executable, __file__, "--model", args.model, "--targets", str(n_targets)]
        commands = {side: [*worker, "--threads", str(args.threads), "--worker", side] for side in sides}
        result = harness.compare(commands, n_rounds=args.rounds, n_threads=args.threads, patience_s=args.patience)
        shapes = {"n_targets": n_targets} | MODELS[args.model].SHAPES
        record = {"question": "train_step", "model": args.model, "shapes": shapes, "n_threads": args.threads}
        print(harness.report(f"\ntraining step of {args.model}, {n_targets} target cells a time", result))
        if args.save:
            harness.append(harness.environment() | record | result, harness.RESULTS / f"train_step_{args.model}.json")


if __name__ == "__main__":
    main()
