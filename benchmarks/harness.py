"""Programs timed side by side: one worker process a side, all rounds interleaved, one JSON record a comparison.

A worker builds its job, then waits on its standard input while another one runs, so that no two thread pools share
the cores, and so that a slow minute of the machine falls on all sides alike. Compilation is timed apart and never
counted as work; peak memory is the high-water mark of the worker's own resident memory.

On a machine that others use, PyTorch's threads spin at their barriers and its wall *and* CPU seconds grow tenfold,
which flatters scjax. So each call tells how many cores other processes had meanwhile; believe rounds where that is
near 0, or CPU seconds with one thread a side.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Job",
    "Memory",
    "add_options",
    "append",
    "ask",
    "compare",
    "environment",
    "peak_bytes",
    "report",
    "serve",
]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
PACKAGES = ("scjax", "jax", "jaxlib", "flax", "optax", "diffrax", "ott-jax", "torch", "numpy")


class Job(NamedTuple):
    """What one side does.

    Attributes:
        call: one piece of work; returns when the result is there.
        n_per_call: steps (or samples) in a call; times are divided by it.
        settings: what a reader needs to repeat it, JSON-ready.
        compile_s: seconds of tracing and compilation, where there is any.
        temp_bytes: the compiled program's own figure for its temporary memory, where it tells.
        flops: operations of the matrix products of a step, where they are counted.
        state_bytes: what must be held between steps or for each of them (parameters, gradients, moments, averages).
        gemm: measures the operations per second of one large matrix product with this side's library; asked after each
            call, so that both see the machine in one state. Goes with `flops`.
    """

    call: Callable[[], Any]
    n_per_call: int = 1
    settings: Mapping[str, Any] = {}
    compile_s: float | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    state_bytes: int | None = None
    gemm: Callable[[], float] | None = None


class Memory(NamedTuple):
    """A compiled program whose memory is asked for.

    Attributes:
        analysis: the compiler's `memory_analysis()`.
        run: makes the inputs and runs it once.
        settings: what a reader needs to repeat it, JSON-ready.
    """

    analysis: Any
    run: Callable[[], Any]
    settings: Mapping[str, Any] = {}


def serve(build: Callable[[], Job], n_threads: int) -> None:
    """The life of a worker: build, one unmeasured call, then a measured call for each line `run` until `stop`."""
    # The protocol keeps the pipe to itself; whatever libraries print goes to stderr.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_threads])
    job = build()
    built_bytes = peak_bytes()
    first_call_s = _timed(job.call)[0]
    say(
        n_per_call=job.n_per_call,
        settings=dict(job.settings),
        compile_s=job.compile_s,
        first_call_s=first_call_s,
        temp_bytes=job.temp_bytes,
        flops=job.flops,
        state_bytes=job.state_bytes,
        built_rss_bytes=built_bytes,
    )
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        busy = _busy_seconds()
        wall_s, cpu_s = _timed(job.call)
        others = max(0.0, _busy_seconds() - busy - cpu_s) / wall_s
        measured = {"wall_s": wall_s / job.n_per_call, "cpu_s": cpu_s / job.n_per_call, "other_cores": others}
        if job.gemm is not None:
            gemm_flops_s = job.gemm()
            least_s = job.flops / gemm_flops_s
            measured |= {"gemm_flops_s": gemm_flops_s, "least_s": least_s, "share": least_s / measured["wall_s"]}
        say(**measured)
    say(peak_rss_bytes=peak_bytes())


def compare(
    commands: Mapping[str, Sequence[str]],
    *,
    n_rounds: int,
    n_threads: int,
    patience_s: float = 0,
    keep_memory: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Times of every side over `n_rounds` rounds; each round runs every side once, in alternating order.

    Args:
        commands: command line of each side's worker, which ends in `serve`. The first side is the one that the others
            are divided by.
        n_rounds: measured calls a side.
        n_threads: cores that a side has while it runs.
        patience_s: before each call, wait so long at most for other processes to leave the cores alone.
        keep_memory: glibc keeps what is freed. By default it gives large blocks back at once, and a program that frees
            and takes gigabytes at every step spends most of its time on having the kernel zero pages.
        progress: print a line a round.

    Returns:
        `sides`, and `ratios`: of each other side's time to the first one's, in wall and in CPU seconds, round by round:
        median, smallest, largest.

    Raises:
        RuntimeError: a worker ended early; its own message stands above on stderr.
    """
    workers = {}
    try:
        for side, command in commands.items():  # one at a time: compilation has the cores to itself
            workers[side] = _Worker(side, command, n_threads, keep_memory)
        seconds: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for n in range(n_rounds):
            order = list(workers) if n % 2 == 0 else list(reversed(workers))
            for side in order:
                _wait_for_quiet(patience_s)
                seconds[side].append(workers[side].ask("run"))
            if progress:
                times = ", ".join(
                    f"{side} {taken[-1]['wall_s']:.3g} s (others {taken[-1]['other_cores']:.1f} cores)"
                    for side, taken in seconds.items()
                )
                print(f"round {n + 1}/{n_rounds}: {times}", flush=True)
        sides = {
            side: worker.started | _statistics(seconds[side]) | worker.ask("stop") for side, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()
    first, *others = sides
    return {
        "sides": sides,
        "ratios": {f"{other}/{first}": _ratios(seconds[other], seconds[first]) for other in others},
    }


def add_options(parser: argparse.ArgumentParser, *, n_rounds: int, peer: bool = True) -> None:
    """What every script that times sides has on its command line; `ask` reads it. `peer`: PyTorch may be a side."""
    if peer:
        parser.add_argument(
            "--peer", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch beside it"
        )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="run all sides under settings of glibc that keep freed memory instead of giving it back at once",
    )
    parser.add_argument("--rounds", type=int, default=n_rounds)
    parser.add_argument("--threads", type=int, default=2, help="cores of a side while it runs")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before a call")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def ask(
    args: argparse.Namespace, worker: Sequence[str], sides: Sequence[str], record: Mapping[str, Any], title: str
) -> None:
    """Times the sides, prints the table, appends the record to the results of its question and model.

    Args:
        args: the options of `add_options`.
        worker: the script and its options that name the work; a side's own are added.
        sides: of the comparison, the first being what the others are divided by.
        record: "question", "model", "shapes" and whatever else a reader needs.
        title: of the table.
    """
    common = [sys.executable, *worker, "--threads", str(args.threads)]
    result = compare(
        {side: [*common, "--worker", side] for side in sides},
        n_rounds=args.rounds,
        n_threads=args.threads,
        patience_s=args.patience,
        keep_memory=args.keep_memory,
    )
    print(report(title, result))
    if args.save:
        settings = {"n_threads": args.threads, "keep_memory": args.keep_memory}
        path = RESULTS / f"{record['question']}_{record['model']}.json"
        append(environment() | record | settings | result, path)


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a record."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "n_cores": len(_cores()), "system": f"{platform.system()} {platform.machine()}"},
        "versions": versions,
    }


def append(record: Mapping[str, Any], path: Path) -> None:
    """Adds `record` to the JSON list in `path`; the file is replaced in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text()) if path.exists() else []
    text = json.dumps([*records, record], indent=1) + "\n"
    beside = path.with_name(path.name + f".{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def report(title: str, result: Mapping[str, Any]) -> str:
    """The comparison as a table for a terminal and for Markdown."""
    lines = [
        title,
        "",
        "| side | seconds: median (min - max) | CPU s | others' cores | n | compile s | peak MB | XLA temporaries MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        wall = side["wall_s"]
        compiled = "-" if side["compile_s"] is None else f"{side['compile_s']:.1f}"
        temporary = "-" if side["temp_bytes"] is None else f"{side['temp_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {name} | {wall['median']:.3g} ({wall['min']:.3g} - {wall['max']:.3g}) "
            f"| {side['cpu_s']['median']:.3g} | {side['other_cores']['median']:.2f} | {wall['n']} | {compiled} "
            f"| {side['peak_rss_bytes'] / 1e6:.0f} | {temporary} |"
        )
    if any("share" in side for side in result["sides"].values()):
        lines += ["", *_arithmetic(result["sides"])]
    lines.append("")
    for name, ratio in result["ratios"].items():
        wall, cpu = ratio["wall_s"], ratio["cpu_s"]
        lines.append(
            f"{name}: {wall['median']:.1f} times the wall time (rounds {wall['min']:.1f} - {wall['max']:.1f}), "
            f"{cpu['median']:.1f} times the CPU time ({cpu['min']:.1f} - {cpu['max']:.1f})"
        )
    return "\n".join(lines)


def _arithmetic(sides: Mapping[str, Any]) -> list[str]:
    """What the matrix products of a step, and what it must hold, make impossible to go below."""
    lines = [
        "| side | GFLOP of matrix products | GFLOP/s of one large product | least seconds "
        "| of the time taken (min - max) | least MB | of the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        if "share" not in side:
            continue
        share, least = side["share"], side["state_bytes"]
        lines.append(
            f"| {name} | {side['flops'] / 1e9:.0f} | {side['gemm_flops_s']['median'] / 1e9:.0f} "
            f"| {side['least_s']['median']:.3g} | {share['median']:.0%} ({share['min']:.0%} - {share['max']:.0%}) "
            f"| {least / 1e6:.0f} | {least / side['peak_rss_bytes']:.0%} |"
        )
    return lines


class _Worker:
    def __init__(self, side: str, command: Sequence[str], n_threads: int, keep_memory: bool) -> None:
        self.side = side
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(n_threads))
        # A compile cache would turn the compile time into a reading time, and what is timed is this checkout, whose
        # commit the record names, not an installed copy.
        kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
        allocator = {"GLIBC_TUNABLES": KEEP_MEMORY} if keep_memory else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | threads | allocator
        )
        try:
            self.started = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, word: str) -> dict[str, Any]:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of side {self.side!r} ended early, with status {self.process.wait()}.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _statistics(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: _spread([run[name] for run in runs]) for name in runs[0]}


def _ratios(slow: Sequence[Mapping[str, float]], fast: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    pairs = list(zip(slow, fast, strict=True))
    return {name: _spread([s[name] / f[name] for s, f in pairs]) for name in ("wall_s", "cpu_s")}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def _busy_seconds() -> float:
    """CPU seconds of all processes of the machine since it started; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _wait_for_quiet(patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        busy = _busy_seconds()
        time.sleep(0.5)
        if _busy_seconds() - busy < 0.05:  # a tenth of a core
            return


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory too, which a fork inherits
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """The checked-out commit, with `+` where tracked files differ from it; `unknown` outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "scjax", "benchmarks"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = [line for line in state.stdout.splitlines() if "benchmarks/results/" not in line]
    return head.stdout.strip() + ("+" if changed else "")
