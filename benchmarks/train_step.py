"""How long is one training step of a model, and how many times faster than PyTorch?

    python benchmarks/train_step.py --model scimf --targets 512 6400
    python benchmarks/train_step.py --model scdfm --batch 4 8
    python benchmarks/train_step.py --model perturbdiff --sets 2

scIMF: 512 simulated cells of 50 dims, 8 times (7 observed ones, 70 Euler-Maruyama steps), the whole loss with the
transport term against all target cells of each time, gradients, clipping and Adam.

scDFM: 1000 of 5029 genes, width 128, 4 layers, dropout on, the whole loss with the MMD, gradients and Adam. The peer
holds 1.6 GB a cell of the batch.

PerturbDiff: sets of 256 cells, 2000 genes, width 512, 8 layers of 8 heads, half of the steps (or of the sets) with a
first guess, half without their covariates; squared error and energy distance, gradients, clipping, AdamW, the moving
average at every tenth step. Beside the times stand the operations of the matrix products and what one large product
reaches in the same process.
"""

import argparse
from functools import partial
from types import ModuleType
from typing import NamedTuple

import harness
from jobs import perturbdiff, scdfm, scimf


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
    "perturbdiff": Question(perturbdiff, "sets", (2,), "n_sets", "sets of 256 cells"),
}
# Option of the command line -> the side that it adds.
ADDED = {
    "single_backward": "peer_single_backward",
    "log_once": "peer_log_once",
    "remat": "scjax_remat",
    "batch_coins": "scjax_batch_coins",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scimf")
    parser.add_argument("--targets", type=int, nargs="+", help="scimf: observed cells of each time")
    parser.add_argument("--batch", type=int, nargs="+", help="scdfm: cells of a batch")
    parser.add_argument("--sets", type=int, nargs="+", help="perturbdiff: sets of a batch")
    parser.add_argument(
        "--single-backward",
        action="store_true",
        help="scimf: and PyTorch with one backward pass, unlike the published program",
    )
    parser.add_argument(
        "--log-once",
        action="store_true",
        help="perturbdiff: and PyTorch without the second distance for the log, unlike the published program",
    )
    parser.add_argument("--remat", action="store_true", help="and scjax rematerialised: slower, in less memory")
    parser.add_argument(
        "--batch-coins",
        action="store_true",
        help="perturbdiff: and scjax with coins that fall for a whole batch, as in the published program",
    )
    harness.add_options(parser, n_rounds=5)
    args = parser.parse_args()
    question = MODELS[args.model]
    for other in {q.option for q in MODELS.values()} - {question.option}:
        if getattr(args, other) is not None:
            parser.error(f"--{other} is no size of {args.model}; its size is --{question.option}")
    sizes = getattr(args, question.option) or question.sizes
    if args.worker:
        harness.serve(partial(question.job.TRAIN[args.worker], sizes[0]), args.threads)
        return

    sides = ["scjax", *(["peer"] if args.peer else [])]
    sides += [side for option, side in ADDED.items() if getattr(args, option)]
    if missing := set(sides) - set(question.job.TRAIN):
        parser.error(f"{args.model} has no side {missing.pop()}; it has {', '.join(question.job.TRAIN)}")
    for size in sizes:
        shapes = {question.field: size} | question.job.SHAPES
        harness.ask(
            args,
            [__file__, "--model", args.model, f"--{question.option}", str(size)],
            sides,
            {"question": "train_step", "model": args.model, "shapes": shapes},
            f"\ntraining step of {args.model}, {size} {question.unit}",
        )


if __name__ == "__main__":
    main()
