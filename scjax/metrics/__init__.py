"""What a prediction is worth.

Time series: `population` measures distances between clouds of cells, `baselines` predicts without training, `report`
puts models beside baselines and the real-vs-real floor and says which wins, `interaction` sums up who acts on whom.
Perturbations: the same roles are those of `expression`, `perturbation_baselines` and `perturbation_report`.
"""
