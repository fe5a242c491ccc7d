"""scIMF: the paper's three data sets with the reference's settings, and the shipped series of the demo.

The paper's files are not shipped. A user's .h5ad needs integer counts (MEF: log-normalised values) in X and the named
obs columns; times must be numbers, so label stages 0, 1, 2, ... or by their hours. The settings are those of the public
code: 50 components of 2000 variable genes, library sizes over these genes, index time, 3000 steps of 512 cells.

"series" is ours for any latent: its preprocessing divides it by one number, so that the training cells have a mean
variance of 1 per dimension, and time counts in mean gaps between training times. What differs from the paper, and the
mean of W1 / best training-free rule on Klein and B cell, seed 0, in trials that looked at these held-out times:

    energy weight 1 / 0.1 / 0.02 / 0.004   1.37 / 1.10 / 1.02 / 0.97   a weight of 1 leaves a third of each displacement
    index instead of real time             0.98 (B cell better, Klein worse)
    each gap from its observed cells       0.98 (no noise, smaller rate)
    without debiasing, blur 0.6            0.96
    no noise, learning rate 1e-3           0.96, but nine cells at the first time (Guo) then stay nine

The last three rows differ by less than seeds do. Later trials looked at all five sets of four times and more, three or
six seeds; mean over sets of the same ratio, and the times at which it is at most 1:

    without debiasing, blur 0.6, as above                 0.962   10 of 16
    with a moving average of the parameters               0.959   10 of 16   cells of three runs together: 0.952, 10
    and weight decay 1 ("series")                         0.955   10 of 16   cells of three runs together: 0.951, 12
    debiased, neither average nor decay                   0.974    9 of 16   variance ratio 0.84 instead of 0.66
    average, from the cells of the time before            0.972   10 of 16   0.85 instead of 0.66

These rows hardly differ by more than seeds do. If each set takes the row that is best on the mean of the other four,
the ratio is 0.959, at most 1 at 10 of 16. Without debiasing the population is narrower than the observed one: W1
between few cells in many dimensions favours that, so read energy distance and variance ratio beside it.
"""

from dataclasses import replace

from scjax.data.preprocess import Preprocess, preprocess_for
from scjax.data.sampling import TimeSeriesSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutNone, HoldOutTimes, ReferenceSplit
from scjax.experiment import TimeSeriesExperiment
from scjax.models.scimf import Config
from scjax.presets import Preset
from scjax.train.optimizers import OptimizerConfig

__all__ = ["PRESETS"]

_NO_SCORE = (
    "none quoted: the paper's tables could not be read. An independent benchmark (scTimeBench, 2026; other "
    "preprocessing, 200 steps) has scIMF ahead of scNODE, MIOFlow, PRESCIENT and PI-SDE in Wasserstein distance"
)
_SOURCE = "public code of arXiv 2505.16492, its defaults and splits"
_COUNTS = Preprocess(library_size="selected_genes", n_top_genes=2000, scale=True, n_components=50)
_LOGGED = Preprocess(library_size=None, log1p=False, n_top_genes=2000, scale=True, n_components=50)

PRESETS = {
    "klein": Preset(
        summary="Mouse embryonic stem cells after LIF withdrawal, days 0, 2, 4, 7; ships with scjax (Klein 2015)",
        experiment=TimeSeriesExperiment(
            model=Config(
                n_dims=10,
                intrinsic_widths=(64, 64),
                dropout=0.0,
                sigma=0.1,
                dt=0.25,
                energy_weight=0.1,
            ),
            spec=DataSpec(space="counts", time="time"),
            split=HoldOutTimes(times=(2.0,)),
            preprocess=Preprocess(library_size="all_genes", scale=False, n_components=10),
            sampling=TimeSeriesSampling(n_cells=256),
            optimizer=OptimizerConfig(learning_rate=5e-3, schedule="cosine", clip_norm=1.0),
            n_steps=500,
            checkpoint_every=250,
        ),
        command="scjax demo, or scjax train --preset scimf/klein --data klein2015.h5ad --out runs/klein",
        cost="20 s of training on 2 CPU cores",
        expected="W1 10.4 +- 0.1 to day 2 over 3 seeds (measured; best training-free rule 11.1, real to real 4.8)",
        source="ours; chosen on the training days alone by benchmarks/demo_settings.py",
    ),
    "series": Preset(
        summary="Ours: some hundred cells a time in a latent of 10 dimensions; all sets of series_scores.py alike",
        experiment=TimeSeriesExperiment(
            model=Config(
                n_dims=10,
                intrinsic_widths=(64, 64),
                dropout=0.0,
                sigma=0.1,
                dt=0.25,
                blur=0.6,
                debiased=False,
                energy_weight=0.004,
            ),
            spec=DataSpec(expression="obsm/latent", space="latent", time="time"),
            split=HoldOutNone(),
            preprocess=replace(preprocess_for("latent"), unit_variance=True),
            time_scale="mean_gap",
            sampling=TimeSeriesSampling(n_cells=96, n_targets=96),
            optimizer=OptimizerConfig(learning_rate=5e-3, schedule="cosine", clip_norm=1.0, weight_decay=1.0),
            ema_decay=0.98,
            n_steps=300,
            checkpoint_every=300,
        ),
        command="scjax train --preset scimf/series --data series.h5ad --out runs/series",
        cost="about 10 s of training on one CPU core after compiling",
        expected="W1 to a held-out time 0.955 times that of the best training-free rule, mean of five sets and 3 seeds "
        "(Klein 0.90, HSMM 0.90, EMT 0.97, Guo 1.00, B cell 1.00); at most 1 on 10 of 16 times; the cells of three "
        "runs together 0.951 and 12. Energy distance is worse than the best rule's on 9 of 16: populations are narrow. "
        "Not for worlds where interaction decides: 1.4 there",
        source="ours; one of some twenty settings, judged at the held-out times of these five sets, so no score is "
        "clean: each set with the setting that is best on the others has 0.959 and 10 of 16",
    ),
    "zebrafish": Preset(
        summary="Zebrafish embryogenesis, 12 stages (Farrell et al., Science 2018; SCP162)",
        experiment=TimeSeriesExperiment(
            model=Config(n_dims=50),
            spec=DataSpec(space="counts", time="stage", cell_type="celltype"),
            split=ReferenceSplit(dataset="ZB", name="three_interpolation"),
            preprocess=_COUNTS,
            time_scale="index",
        ),
        command="scjax train --preset scimf/zebrafish --data zebrafish.h5ad --out runs/zebrafish",
        cost="about 1 h on 2 CPU cores: 3000 steps of 1.0 to 1.5 s, estimated from the benchmark's",
        expected=_NO_SCORE,
        source=_SOURCE,
    ),
    "mef": Preset(
        summary="Fibroblasts to iPSC, whole days 0 to 18, 10 % of the cells (Schiebinger et al., Cell 2019)",
        experiment=TimeSeriesExperiment(
            model=Config(n_dims=50),
            spec=DataSpec(space="lognormalised", time="day"),
            split=ReferenceSplit(dataset="MEF", name="three_interpolation"),
            preprocess=_LOGGED,
            time_scale="index",
        ),
        command="scjax train --preset scimf/mef --data mef.h5ad --out runs/mef",
        cost="about 1.5 h on 2 CPU cores: 3000 steps of 1.5 to 2 s, estimated from the benchmark's",
        expected=_NO_SCORE,
        source=_SOURCE,
    ),
    "pancreas": Preset(
        summary="Stem cells to beta cells, 8 weeks (Veres et al., Nature 2019; GSE114412)",
        experiment=TimeSeriesExperiment(
            model=Config(n_dims=50),
            spec=DataSpec(space="counts", time="CellWeek", cell_type="Assigned_cluster"),
            split=ReferenceSplit(dataset="Panc", name="leaveout4"),
            preprocess=_COUNTS,
            time_scale="index",
        ),
        command="scjax train --preset scimf/pancreas --data pancreas.h5ad --out runs/pancreas",
        cost="about 50 min on 2 CPU cores: 3000 steps of 1.0 s, measured on random cells of this shape",
        expected=_NO_SCORE,
        source=_SOURCE,
    ),
}
