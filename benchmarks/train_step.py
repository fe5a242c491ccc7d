"""How long is one training step of a model, and how many times faster than PyTorch?

    python benchmarks/train_step.py --model scimf --targets 512 6400
    python benchmarks/train_step.py --model scdfm --batch 4 8

scIMF: 512 simulated cells of 50 dims, 8 times (7 observed ones, 70 Euler-Maruyama steps), the whole loss with the
transport term against all target cells of each time, gradients, clipping and Adam.

scDFM: 1000 of 5029 genes, width 128, 4 layers, dropout on, the whole loss with the MMD, gradients and Adam. The peer
holds 1.6 GB a cell of the batch.
"""

import argparse
import sys
from functools import partial
from types import ModuleType
from typing import NamedTuple

import harness
from jobs import scdfm, scimf


class Question(NamedTuple):
    """What is varied of a model.

    Attributes:
        job: names its SHAPES, and TRAIN: side -> builder of the job from the size.
        option: the command line's word for the size.
        sizes: unless others are asked for.
        field: the size in a record.
        unit: in a title.
    """

    job: ModuleType
    option: str
    sizes: tuple[int, ...]
    field: str
    unit: str


MODELS = {
    "scimf": Question(scimf, "targets", (512, 6400), "n_targets", "target cells a time"),
    "scdfm": Question(scdfm, "batch", (4, 8), "batch_size", "cells a batch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scimf")
    parser.add_argument("--targets", type=int, nargs="+", help="scimf: observed cells of each time")
    parser.add_argument("--batch", type=int, nargs="+", help="scdfm: cells of a batch")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch beside it")
    parser.add_argument(
        "--single-backward",
        action="store_true",
        help="and PyTorch with one backward pass, unlike the published program",
    )
    parser.add_argument("--remat", action="store_true", help="and scjax rematerialised: slower, in less memory")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="run all sides under settings of glibc that keep freed memory instead of giving it back at once",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores of a side while it runs")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before a call")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    question = MODELS[args.model]
    for other in {q.option for q in MODELS.values()} - {question.option}:
        if getattr(args, other) is not None:
            parser.error(f"--{other} is no size of {args.model}; its size is --{question.option}")
    sizes = getattr(args, question.option) or question.sizes
    if args.worker:
        harness.serve(partial(question.job.TRAIN[args.worker], sizes[0]), args.threads)
        return

    optional = {"peer": args.peer, "peer_single_backward": args.single_backward, "scjax_remat": args.remat}
    sides = ["scjax", *(side for side, wanted in optional.items() if wanted)]
    if missing := set(sides) - set(question.job.TRAIN):
        parser.error(f"{args.model} has no side {missing.pop()}; it has {', '.join(question.job.TRAIN)}")
    for size in sizes:
        worker = [sys.executable, __file__, "--model", args.model, f"--{question.option}", str(size)]
        commands = {side: [*worker, "--threads", str(args.threads), "--worker", side] for side in sides}
        result = harness.compare(
            commands,
            n_rounds=args.rounds,
            n_threads=args.threads,
            patience_s=args.patience,
            keep_memory=args.keep_memory,
        )
        shapes = {question.field: size} | question.job.SHAPES
        record = {"question": "train_step", "model": args.model, "shapes": shapes, "n_threads": args.threads}
        record |= {"keep_memory": args.keep_memory}
        print(harness.report(f"\ntraining step of {args.model}, {size} {question.unit}", result))
        if args.save:
            harness.append(harness.environment() | record | result, harness.RESULTS / f"train_step_{args.model}.json")


if __name__ == "__main__":
    main()
