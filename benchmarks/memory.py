"""How much memory does a training step of the reference's own size take?

    python benchmarks/memory.py --model scdfm

scDFM: 48 cells, 1000 of 5029 genes, width 512, 4 layers, as its published program builds it. The compiler tells, no
step is made; `--run` makes one and tells what the process really held.
"""

import argparse
import time

import harness
from jobs import scdfm

# Each names `memory`: the compiled step for so many cells and such a width.
MODELS = {"scdfm": scdfm}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="scdfm")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--limit", type=float, default=24, help="GiB; more is a failure")
    parser.add_argument("--run", action="store_true", help="make one step, too")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()

    started = time.perf_counter()
    compiled = MODELS[args.model].memory(args.batch, args.d_model)
    found = {"compile_s": time.perf_counter() - started}
    analysis = compiled.analysis
    found |= {
        "argument_bytes": analysis.argument_size_in_bytes,
        "temp_bytes": analysis.temp_size_in_bytes,
        "output_bytes": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    }
    total = found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"]
    print(f"training step of {args.model}, {args.batch} cells, width {args.d_model}; GiB:")
    for name in ("argument", "temp", "output"):
        print(f"  {name:9}{found[f'{name}_bytes'] / GIB:7.2f}")
    print(f"  {'sum':9}{total / GIB:7.2f}   (limit {args.limit:g}; compiled in {found['compile_s']:.0f} s)")
    if args.run:
        started = time.perf_counter()
        compiled.run()
        found |= {"step_s": time.perf_counter() - started, "peak_rss_bytes": harness.peak_bytes()}
        print(f"  {'process':9}{found['peak_rss_bytes'] / GIB:7.2f}   (one step in {found['step_s']:.0f} s)")
    if args.save:
        shapes = {"batch_size": args.batch} | MODELS[args.model].SHAPES | {"d_model": args.d_model}
        record = {"question": "memory", "model": args.model, "shapes": shapes, "settings": dict(compiled.settings)}
        harness.append(harness.environment() | record | found, harness.RESULTS / f"memory_{args.model}.json")
    if max(total, found.get("peak_rss_bytes", 0)) > args.limit * GIB:
        raise SystemExit(f"more than {args.limit:g} GiB")


if __name__ == "__main__":
    main()
