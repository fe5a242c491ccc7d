"""How much memory does a training step of the reference's own size take?

    python benchmarks/memory.py --model scdfm
    python benchmarks/memory.py --model perturbdiff

scDFM: 48 cells, 1000 of 5029 genes, width 512, 4 layers, as its published program builds it. PerturbDiff: 8 sets of 256
cells, 2000 genes, width 512, 8 layers. The compiler tells, no step is made; `--run` makes one and tells what the
process really held. Layers are rematerialised; `--no-remat` keeps all activations.
"""

import argparse
import time

import harness
from jobs import perturbdiff, scdfm

# Each names `memory`: the compiled step of such a batch and width; MEMORY_BATCH, and BATCH_UNIT, what it counts.
MODELS = {"scdfm": scdfm, "perturbdiff": perturbdiff}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scdfm")
    parser.add_argument("--batch", type=int, help="cells (scdfm) or sets (perturbdiff); as published by default")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument(
        "--remat", action=argparse.BooleanOptionalAction, default=True, help="compute activations again when needed"
    )
    parser.add_argument("--limit", type=float, default=24, help="GiB; more is a failure")
    parser.add_argument("--run", action="store_true", help="make one step, too")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()

    started = time.perf_counter()
    job = MODELS[args.model]
    batch_size = args.batch or job.MEMORY_BATCH
    compiled = job.memory(batch_size, args.d_model, remat=args.remat)
    found = {"compile_s": time.perf_counter() - started}
    analysis = compiled.analysis
    found |= {
        "argument_bytes": analysis.argument_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    }
    total = found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"]
    print(f"training step of {args.model}, {batch_size} {job.BATCH_UNIT}, width {args.d_model}; GiB:")
    for name in ("argument", "temp", "output"):
        print(f"  {name:9}{found[f'{name}_bytes'] / GIB:7.2f}")
    print(f"  {'sum':9}{total / GIB:7.2f}   (limit {args.limit:g}; compiled in {found['compile_s']:.0f} s)")
    if args.run:
        started = time.perf_counter()
        compiled.run()
        found |= {"step_s": time.perf_counter() - started, "peak_rss_bytes": harness.peak_bytes()}
        print(f"  {'process':9}{found['peak_rss_bytes'] / GIB:7.2f}   (one step in {found['step_s']:.0f} s)")
    if args.save:
        shapes = {"batch_size": batch_size} | job.SHAPES | {"d_model": args.d_model}
        record = {"question": "memory", "model": args.model, "shapes": shapes, "settings": dict(compiled.settings)}
        harness.append(harness.environment() | record | found, harness.RESULTS / f"memory_{args.model}.json")
    if max(total, found.get("peak_rss_bytes", 0)) > args.limit * GIB:
        raise SystemExit(f"more than {args.limit:g} GiB")


if __name__ == "__main__":
    main()
