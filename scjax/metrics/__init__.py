"""What a prediction is worth.

Time series: `population` measures distances between clouds of cells, `baselines` predicts without training, `report`
puts models beside baselines and the real-vs-real floor and says which wins, `interaction` sums up who acts on whom,
`lineage` compares states and their transitions with those of clones.
Perturbations: the same roles are those of `expression`, `perturbation_baselines` and `perturbation_report`; `rank_sum`
tests all genes of many populations at once, `clustering` compares clusters of perturbations.
`intervals` says how sure a mean over populations, times and seeds is, `conformal` how far off a predicted mean may be.
"""
