"""Does a vector of a gene tell a small model what perturbing it does, when training saw no cell of it?

    python benchmarks/unseen_perturbations.py norman --seeds 3
    python benchmarks/unseen_perturbations.py mcfaline --vectors screen --seeds 3
    python benchmarks/unseen_perturbations.py mcfaline --vectors screen --model perturbdiff

norman: K562 under CRISPR activation, six of the genes that were activated alone are held out with all their pairs (the
rule UnseenSingles draws them by name), so that pairs have one or two parts that training never saw.
mcfaline: three glioblastoma lines under CRISPR interference, three of the nine kinases held out in every line.

Where the vectors come from. Of the 31 targets of Norman one is among its measured genes, of the nine of McFaline none,
so that loadings of a gene in control cells, which any measured gene has, do not exist for them; and the published
embeddings of genes (ESM2, GenePT) are downloads. What is left without a look at a held-out cell:
names: the words and the letters of a gene's approved name (below, as the nomenclature gives it), each word and each
three letters of the symbol a fixed random direction in 32 dimensions, weighted by how few of the genes share it. Genes
of one family are near each other, and nothing else is known. It is GenePT's idea at its least.
screen: McFaline alone: what activating the same kinase did to K562, in the other data set: the effects on the genes
that both measured, on their principal components.

Beside the model stand rules that need no training, ridge regression and the nearest neighbour on the same vectors among
them. Trains, generates, prints a table for each kind of population, and appends every number to results/, the time of
compilation apart.
"""

import argparse
import hashlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np

from scjax.data import datasets
from scjax.data.embeddings import attach
from scjax.data.preprocess import Preprocess
from scjax.data.splits import HoldOutConditions, UnseenSingles
from scjax.experiment import evaluate, train
from scjax.metrics.perturbation_report import render, to_json_dict, verdict
from scjax.predict import GenerationConfig
from scjax.presets import preset
from scjax.train.hooks import Hook, Progress

NAMES = {
    "BPGM": "bisphosphoglycerate mutase",
    "CBL": "cbl proto oncogene",
    "CEBPE": "ccaat enhancer binding protein epsilon",
    "CNN1": "calponin 1",
    "FOXL2": "forkhead box l2",
    "FOXO4": "forkhead box o4",
    "HK2": "hexokinase 2",
    "HOXB9": "homeobox b9",
    "IER5L": "immediate early response 5 like",
    "KLF1": "klf transcription factor 1",
    "KMT2A": "lysine methyltransferase 2a",
    "MAP2K3": "mitogen activated protein kinase kinase 3",
    "MAP2K6": "mitogen activated protein kinase kinase 6",
    "MAP3K21": "mitogen activated protein kinase kinase kinase 21",
    "MAP4K3": "mitogen activated protein kinase kinase kinase kinase 3",
    "MAP4K5": "mitogen activated protein kinase kinase kinase kinase 5",
    "MAPK1": "mitogen activated protein kinase 1",
    "MIDN": "midnolin",
    "NIT1": "nitrilase 1",
    "PLK4": "polo like kinase 4",
    "PTPN12": "protein tyrosine phosphatase non receptor type 12",
    "PTPN9": "protein tyrosine phosphatase non receptor type 9",
    "RUNX1T1": "runx1 partner transcriptional co repressor 1",
    "SAMD1": "sterile alpha motif domain containing 1",
    "SET": "set nuclear proto oncogene",
    "SGK1": "serum glucocorticoid regulated kinase 1",
    "SLC38A2": "solute carrier family 38 member 2",
    "TBX3": "t box transcription factor 3",
    "TGFBR2": "transforming growth factor beta receptor 2",
    "TMSB4X": "thymosin beta 4 x linked",
    "ZBTB10": "zinc finger and btb domain containing 10",
}
N_FEATURES, N_COMPONENTS = 32, 8  # of "names"; of "screen"
TITLES = {"scdfm": "scDFM", "perturbdiff": "PerturbDiff"}


class Compiled(Hook):
    """How long the update took to compile, which the time of training holds too."""

    seconds = 0.0

    def on_compiled(self, seconds: float) -> None:
        self.seconds += seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("norman", "mcfaline"))
    parser.add_argument("--vectors", choices=("names", "screen"), default="names")
    parser.add_argument("--model", choices=tuple(TITLES), default="scdfm")
    parser.add_argument("--draw", type=int, default=0, help="of the held-out genes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n-steps", type=int, help="of training; 400 by default")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="append to results/")
    args = parser.parse_args()
    if args.vectors == "screen" and args.data == "norman":
        parser.error("the other screen has nine of Norman's 31 genes; take --vectors names")

    adata = datasets.norman2019() if args.data == "norman" else datasets.mcfaline2023()
    experiment = experiment_of(args.data, args.model, args.draw, args.n_steps)
    attach(adata, by_name() if args.vectors == "names" else by_screen(), experiment.spec)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    title = f"{TITLES[args.model]}, {args.data}, vectors of {args.vectors}, draw {args.draw}"
    with tempfile.TemporaryDirectory() as folder:
        table, times = scores(title, experiment, adata, Path(folder), seeds, TITLES[args.model])
    kinds = summary(table)
    print(told(kinds))
    if args.save:
        record = {"question": "unseen_perturbations", "data": args.data, "model": TITLES[args.model]}
        record |= {"vectors": args.vectors, "draw": args.draw, "seeds": list(seeds), "n_steps": experiment.n_steps}
        record |= {**times, "summary": kinds, "table": to_json_dict(table)}
        harness.append(harness.environment() | record, harness.RESULTS / f"unseen_perturbations_{args.data}.json")


def by_name() -> dict[str, np.ndarray]:
    """Vectors of unit length; those of genes that share much of their names are near each other."""
    parts = {gene: {*words.split(), *(gene[i : i + 3] for i in range(len(gene) - 2))} for gene, words in NAMES.items()}
    shared = {part: sum(part in of_gene for of_gene in parts.values()) for some in parts.values() for part in some}
    weight = {part: np.log(1 + len(NAMES) / n) for part, n in shared.items()}
    vectors = {gene: sum(weight[p] * _direction(p) for p in sorted(of_gene)) for gene, of_gene in parts.items()}
    return {gene: (v / np.linalg.norm(v)).astype(np.float32) for gene, v in vectors.items()}


def _direction(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return np.random.default_rng(seed).normal(size=N_FEATURES)


def by_screen() -> dict[str, np.ndarray]:
    """What activating a gene does to K562 (Norman), on the main components of all such effects; unit mean square."""
    adata = datasets.norman2019()
    x = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, np.float64)
    condition = adata.obs["perturbation"].astype(str).to_numpy()
    control = x[condition == "control"].mean(axis=0)
    singles = sorted({name for name in condition if name != "control" and "+" not in name})
    effects = np.stack([x[condition == name].mean(axis=0) - control for name in singles])
    left, scales, _ = np.linalg.svd(effects, full_matrices=False)
    found = left[:, :N_COMPONENTS] * scales[:N_COMPONENTS]
    found /= np.sqrt(np.mean(found**2))
    return dict(zip(singles, found.astype(np.float32), strict=True))


def experiment_of(data: str, model: str, draw: int, n_steps: int | None):
    if data == "norman":
        split = UnseenSingles(n_genes=6, seed=draw)
    else:
        kinases = sorted(set(datasets.mcfaline2023().obs["perturbation"]) - {"control"})
        chosen = np.random.default_rng(draw).choice(len(kinases), 3, replace=False)
        split = HoldOutConditions(conditions=tuple(kinases[i] for i in sorted(chosen)))
    n_steps = 400 if n_steps is None else n_steps
    genes = Preprocess(library_size=None, log1p=False, n_top_genes=150, scale=False, n_components=None)
    if model == "scdfm":
        start = preset("scdfm/norman_subset").experiment
        start = replace(
            start,
            sampling=replace(start.sampling, n_genes=75),
            generation=GenerationConfig(n_cells=64, solver="heun", n_steps=6, composition="additive", zero_below=0.1),
        )
    else:
        start = preset("perturbdiff/mcfaline").experiment
        start = replace(start, generation=replace(start.generation, n_cells=64))
    covariates = () if data == "norman" else ("cell_type",)
    return replace(
        start,
        model=replace(start.model, perturbation="vector"),
        spec=replace(start.spec, vectors="vectors", covariates=covariates),
        split=split,
        preprocess=genes,
        n_steps=n_steps,
        checkpoint_every=n_steps,
        optimizer=replace(start.optimizer, n_warmup=min(start.optimizer.n_warmup, n_steps - 1)),
    )


def scores(title, experiment, adata, folder: Path, seeds, model: str):
    """Trains with each seed: the table of all held-out populations, and the seconds of everything."""
    runs, trained, compiled = [folder / f"seed{seed}" for seed in seeds], [], []
    for seed, run in zip(seeds, runs, strict=True):
        watch, started = Compiled(), time.perf_counter()
        train(replace(experiment, seed=seed), adata, run, hooks=[Progress(experiment.cells_per_step), watch])
        trained.append(time.perf_counter() - started - watch.seconds)
        compiled.append(watch.seconds)
    started = time.perf_counter()
    table = evaluate({model: runs}, adata)[0]
    evaluated = time.perf_counter() - started
    print(f"\n{title}: trained in {', '.join(f'{s:.0f}' for s in trained)} s", flush=True)
    print(render(table))
    print("\n".join(verdict(table, model, metric.name) for metric in table.metrics))
    return table, {"train_s": trained, "compile_s": compiled, "evaluate_s": evaluated}


def summary(table) -> dict:
    """By kind of population, row and metric: [mean over populations and seeds, standard deviation over seeds or None,
    number of populations that have a value].
    """
    seen = {part for name in table.provenance["split"]["train"] for part in name[0]}
    kinds: dict[str, list[int]] = {"all": list(range(len(table.populations)))}
    for i, population in enumerate(table.populations):
        new = sum(part not in seen for part in population.perturbation)
        kind = "single" if len(population.perturbation) == 1 else f"pair, {new} of 2 unseen"
        kinds.setdefault(kind, []).append(i)
    found = {}
    for kind, places in kinds.items():
        rows = {}
        for row in table.rows:
            of_row = {}
            for metric in ("pearson_delta", "pearson_delta_hat", "l2", "energy_distance"):
                values = row.by_population(metric)[:, places]
                values = values[:, row.has_value(metric)[places] & np.isfinite(values).all(axis=0)]
                if values.size:
                    spread = float(values.mean(axis=1).std(ddof=1)) if len(values) > 1 else None
                    of_row[metric] = [float(values.mean()), spread, values.shape[1]]
            rows[row.name] = of_row
        found[kind] = {"populations": [str(table.populations[i]) for i in places], "rows": rows}
    return found


def told(kinds: dict) -> str:
    lines = []
    for kind, found in kinds.items():
        lines.append(f"\n{kind}: {', '.join(found['populations'])}")
        for name, of_row in found["rows"].items():
            cells = [f"{m} {v[0]:.4f}" + (f" +- {v[1]:.4f}" if v[1] is not None else "") for m, v in of_row.items()]
            lines.append(f"  {name:24}" + "; ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
