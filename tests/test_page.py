"""The report folder: one page that loads nothing, tidy tables, JSON; the same bytes for the same tables."""

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from scjax import page
from scjax.experiment.evidence import Side, perturbation_evidence, series_evidence
from scjax.experiment.tidy import digest_of, score_rows
from scjax.metrics.baselines import training_free
from scjax.metrics.expression import EXPRESSION_METRICS
from scjax.metrics.perturbation_report import PerturbationRow, PerturbationTable, judge, perturbation_table
from scjax.metrics.population import POPULATION_METRICS, Score
from scjax.metrics.report import bounds, result_table
from scjax.plot.perturbation import NOISE_LEVEL
from scjax.types import Population

HOSTILE = '<script>alert("1")</script>&$x_{'
GENES = ["<b>g0</b>", "$g_{1", *(f"g{i}" for i in range(2, 10))]
METRICS = {name: EXPRESSION_METRICS[name] for name in ("pearson_delta", "l2", "overlap_at_N")}
FINDINGS = [
    {"rule": "same_cells", "severity": "note", "evidence": "none to speak of", "mend": "nothing"},
    {"rule": HOSTILE, "severity": "error", "evidence": "12 cells", "mend": "remove them"},
]


@pytest.fixture(scope="module")
def perturbed():
    """A table with hostile names, two models (one of them with a cell that is not finite), findings, and evidence."""
    rng = np.random.default_rng(0)

    def cells(n, *parts):
        shift = sum((np.random.default_rng([1, len(p)]).normal(size=10) for p in parts), np.zeros(10))
        return np.maximum(1 + shift + 0.4 * rng.normal(size=(n, 10)), 0)

    a, b, c = "A", HOSTILE, "three"
    training = {Population(()): cells(20), **{Population((p,)): cells(8, p) for p in (a, b, c)}}
    real = {Population((a, b)): cells(9, a, b), Population((b, c)): cells(8, b, c)}
    made = {p: cells(7, *p.perturbation) for p in real}
    broken = {p: x.copy() for p, x in made.items()}
    broken[Population((a, b))][0, 0] = np.nan
    models = {HOSTILE: [made, {p: x + 0.1 for p, x in made.items()}], "broken": [broken]}
    about = {"data": {"digest": "d" * 32}, "split": {"train": ["A"], "test": ["B"]}, "findings": FINDINGS}
    table = perturbation_table(
        "populations; of <i>a</i> test", models, training, real, METRICS, n_draws=2, seed=0, gene_names=GENES,
        provenance=about,
    )  # fmt: skip
    firsts = {name: seeds[0] for name, seeds in models.items()}
    return table, perturbation_evidence(table, firsts, training, real, GENES)


@pytest.fixture(scope="module")
def series():
    rng = np.random.default_rng(0)
    snapshots = {t: t + rng.normal(size=(12, 3)) for t in (0.0, 2.0)}
    rules = training_free(snapshots, 1.0, seed=0)
    real, made = 1 + rng.normal(size=(11, 3)), 1 + rng.normal(size=(10, 3))
    metrics = {"W1": POPULATION_METRICS["W1"]}
    table = result_table("time 1", {"model": [made, made + 0.1]}, rules, real, metrics, n_draws=2, seed=0)
    found = series_evidence(1.0, {"model": made}, snapshots, rules, real, list("xyz"), are_genes=False, seed=0)
    return table, found


@pytest.fixture(scope="module")
def text(perturbed):
    table, found = perturbed
    return page.render([table], [found])


@pytest.fixture(scope="module")
def series_text(series):
    table, found = series
    return page.render([table], [found])


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects them and the words outside of style."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_loads_nothing(text):
    tags = read(text).tags
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base"} == set()
    for _, attributes in tags:
        for name in ("src", "href", "style", "srcset"):
            assert re.match(r"data:image/svg\+xml;base64,|#", attributes.get(name) or "#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    for tag, attributes in tags:
        if tag == "img":
            drawn = base64.b64decode(attributes["src"].partition(",")[2]).decode()
            outside = re.findall(r"(?:href|src)=\"(?!#|data:)([^\"]*)", drawn)
            assert not outside
            assert "<script" not in drawn


def test_a_reader_without_eyes_finds_the_way(text):
    tags = read(text).tags
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) > 10
    assert all(len(a["alt"]) > 15 for a in images)
    assert {a.get("lang") for tag, a in tags if tag == "html"} == {"en"}
    assert all(a.get("tabindex") == "0" and a["aria-label"] for _, a in tags if a.get("class") == "scroll")
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")


def test_hostile_names_are_words(text):
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    words = " ".join(read(text).words)
    assert HOSTILE in words
    assert "populations; of <i>a</i> test" in words


def test_the_verdict_comes_first_then_leaks_then_scores(text, perturbed):
    table, _ = perturbed
    words = " ".join(read(text).words)
    order = ["Verdict", "Leaks", "Scores", "Ranking", "Figures of", "What the numbers are", "Failures", "Where the num"]
    places = [words.index(word) for word in order]
    assert places == sorted(places)
    assert words.index("remove them") < words.index("none to speak of")  # errors before notes
    for metric in table.metrics:
        assert metric.definition in words
    for row in table.rows:
        assert row.name in words
    assert "dddddddd" in words
    assert digest_of({"train": ["A"], "test": ["B"]}) in words


def test_failures_are_told(text):
    """The broken model is failed in every metric, and its figures are those of what is whole."""
    words = " ".join(read(text).words)
    assert "broken: 1 predicted cells are not finite." in words
    assert "1 of them are left out: they hold cells that are not finite." in words
    assert "failed (1)" in words
    assert "Every value could be computed." not in words


def test_headline_counts_ties_apart():
    """Of six populations: clearly better, within the interval, clearly worse, failed; a count has no better."""
    rng = np.random.default_rng(0)
    metrics = [EXPRESSION_METRICS[name] for name in ("l2", "mse", "mae", "r2", "de_nsig_counts_pred")]
    noise = rng.normal(size=6)
    ours = [np.full(6, 1.0), 2 + noise - noise.mean(), np.full(6, 3.0), np.full(6, np.nan), np.ones(6)]
    counted = {m.name: np.ones((1, 6), bool) for m in metrics}

    def row(name, kind, values, n_seeds):
        values = {m.name: np.tile(v, (n_seeds, 1, 1)) for m, v in zip(metrics, values, strict=True)}
        return PerturbationRow(name, kind, values, counted)

    rule = row("rule", "baseline", [np.full(6, 2.0)] * 5, 1)
    names = tuple(Population((name,)) for name in "ABCDEF")
    for n_seeds, seeds in ((1, "one seed"), (3, "3 seeds")):
        table = PerturbationTable(
            "t", tuple(metrics), (row("m", "model", ours, n_seeds), rule), names, (9,) * 6, (4,) * 6, 1, 5, 3, 0
        )
        found = page.render([table])
        words = " ".join(read(found).words)
        assert f"m  ({seeds}) beats every baseline in 1 of 4 metrics" in words
        assert "a worse, ties with the best of them in 1, loses in 1, has no value in 1." in words
        marks = [a["class"] for tag, a in read(found).tags if tag == "li"]
        assert marks == ["win", "tie", "lose", "failed", "none"]
        assert [judge(table, "m", m.name).outcome or "none" for m in metrics] == marks
    assert page._counted([None]) == "can be compared in no metric."


def test_rows_and_columns_without_a_value_are_not_among_the_scores(perturbed, text):
    """Nothing is known of "shift" here; why stands among the notes."""
    table, _ = perturbed
    scores = text.split('aria-label="Scores"')[1].split("</table>")[0]
    assert "shift" not in scores
    assert "additive" in scores
    assert "shift" in text.split("<span>What the rows are")[1].split("</table>")[0]
    empty = {row.name: {**row.counted, "l2": np.zeros_like(row.counted["l2"])} for row in table.rows}
    without = replace(table, rows=tuple(replace(row, counted=empty[row.name]) for row in table.rows))
    scores = page.render([without]).split('aria-label="Scores"')[1].split("</table>")[0]
    assert "l2" not in scores
    assert "overlap_at_N" in scores


def test_real_against_real_that_is_not_the_best_is_a_noise_level(series):
    """In the ranking and its note; other tables have a ceiling."""
    table, _ = series
    told = {}
    for factor in (0.01, 100.0):
        rows = tuple(scaled(row, factor) if row.kind == "floor" else row for row in table.rows)
        told[factor] = page.render([replace(table, rows=rows)])
    assert "real vs real (noise level)" in told[100.0]
    assert NOISE_LEVEL in told[100.0]
    assert "noise level" not in told[0.01]


def scaled(row, factor):
    def one(comparison):
        scores = {k: Score(tuple(factor * v for v in s.values)) for k, s in comparison.scores.items()}
        return replace(comparison, scores=scores)

    return replace(row, comparisons=tuple(map(one, row.comparisons)))


def test_coverage_of_each_gene(text):
    """Predicted cells half as wide as the real ones hold 59 % of them between their 5 % and 95 % quantiles."""
    assert "Calibration: cells in the predicted 90 %" in " ".join(read(text).words)
    rng = np.random.default_rng(0)
    real, narrow = (Side(300, *[np.zeros(20)] * 3, scale * rng.normal(size=(300, 20))) for scale in (1.0, 0.5))
    of_real, of_predicted = page._within_predicted(real, narrow)
    assert of_real.mean() == pytest.approx(0.589, abs=0.02)
    assert of_predicted == pytest.approx(0.9, abs=1e-6)
    zeros = Side(300, *[np.zeros(20)] * 3, np.zeros((300, 20)))
    assert page._within_predicted(zeros, zeros)[0] == pytest.approx(1)


def test_without_a_search_for_leaks_the_page_says_so(series_text):
    words = " ".join(read(series_text).words)
    assert "were not searched for leaks" in words
    assert "Every value could be computed." in words
    assert "Change of the mean of each feature since time 0" in words
    assert "Calibration: variance" in words
    assert "Calibration: share of zeros" not in words  # coordinates have none


def test_findings_of_a_search(series):
    """In the form of the search itself: which rules looked, and what the user allows."""
    table, _ = series
    found = {"found": FINDINGS[:1], "rules": ["same_cells", "same_genes"], "allowed": ["same_cells"]}
    for findings, told in (
        (found, ("searched for leaks by 2 rules (same_cells, same_genes); found: 1.", "note, allowed")),
        ({**found, "found": []}, ("(same_cells, same_genes); none was found.",)),
        (FINDINGS, ("searched for leaks; found: 2.", "12 cells")),
    ):
        words = " ".join(read(page.render([replace(table, provenance={"findings": findings})])).words)
        assert all(word in words for word in told)


def test_many_tables_have_a_list_of_contents(series, perturbed):
    reader = read(page.render([series[0], perturbed[0]]))
    links = [a["href"] for tag, a in reader.tags if tag == "a"]
    assert links == ["#table-1", "#table-2"]
    assert {"table-1", "table-2"} <= {a.get("id") for _, a in reader.tags}


def test_intervals_are_those_of_the_rows(series):
    """Six populations have intervals; the baseline that predicts none of them has not."""
    rng = np.random.default_rng(0)
    training = {Population(p): rng.normal(1, 1, (6, 4)) ** 2 for p in ((), ("A",), ("B",))}
    real = {Population((name,)): rng.normal(1, 1, (6, 4)) ** 2 for name in "CDEFGH"}
    metrics = {"l2": EXPRESSION_METRICS["l2"]}
    table = perturbation_table("t", {"m": [real]}, training, real, metrics, seed=0, gene_names=list("wxyz"))
    found = [row.interval("l2") for row in table.rows]
    shown = page.render([table]).split('aria-label="Scores"')[1].split("</table>")[0]
    assert shown.count('<span class="ends">[') == sum(one.exists for one in found) >= 4
    assert bounds(found[0]) in shown
    assert 'class="ends">[' not in page.render([series[0]]), "two draws are too few"
    with pytest.raises(ValueError, match="evidence must be one for each of 1 tables; got 2"):
        page.render([series[0]], [series[1]] * 2)
    with pytest.raises(ValueError, match="at least one table"):
        page.render([])


def test_the_same_bytes(perturbed, text, series, series_text, tmp_path):
    """As before, for both kinds of tables; what is there is never overwritten."""
    for name, (table, found) in {"one": perturbed, "two": series}.items():
        page.write(tmp_path / name, [table], [found])
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert names == {"metrics.csv", "report.html", "results.json", "scores.csv", "tables.csv"}
    assert (tmp_path / "one" / "report.html").read_text(encoding="utf-8") == text
    assert (tmp_path / "two" / "report.html").read_text(encoding="utf-8") == series_text
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        page.write(tmp_path / "one", [perturbed[0]])


def test_tidy_tables(perturbed, series, tmp_path):
    tables = [perturbed[0], series[0]]
    page.write(tmp_path / "out", tables, about={"command": "evaluate"})
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = perturbed[0]
    first = [r for r in rows if r["table"] == "1" and r["row"] == HOSTILE and r["metric"] == "l2"]
    assert [(r["seed"], r["condition"]) for r in first] == [
        (seed, p.condition) for seed in "01" for p in table.populations
    ]
    np.testing.assert_array_equal([float(r["value"]) for r in first], table.row(HOSTILE).by_population("l2").ravel())
    status = {(r["row"], r["metric"], r["population"]): r["status"] for r in rows if r["table"] == "1"}
    lost, other = map(str, table.populations)
    assert status["broken", "l2", lost] == "failed"
    assert status["broken", "l2", other] == "ok"
    assert status["shift", "l2", other] == "undefined"
    assert {r["kind"] for r in rows} == {"model", "baseline", "ceiling"}
    assert [r["value"] for r in rows if r["row"] == "shift"] == [""] * 6
    second = [r for r in rows if r["table"] == "2" and r["row"] == "model"]
    assert [float(r["value"]) for r in second] == [c.scores["W1"].mean for c in series[0].row("model").comparisons]
    with open(tmp_path / "out" / "metrics.csv", encoding="utf-8", newline="") as file:
        metrics = {r["metric"]: r for r in csv.DictReader(file)}
    assert set(metrics) == {*METRICS, "W1"}
    assert metrics["l2"]["definition"] == METRICS["l2"].definition
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["command"] == "evaluate"
    assert found["hashes"]["data"] == "d" * 32
    assert len(found["tables"]) == 2


def test_parquet(perturbed, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is written where pyarrow is installed")
    page.write(tmp_path / "out", [perturbed[0]], formats=("parquet",))
    rows = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert rows == list(score_rows([perturbed[0]]))
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_formats_are_checked_before_anything_is_written(perturbed, tmp_path, monkeypatch):
    table, _ = perturbed
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for formats, message in (
        (("parquet",), "needs pyarrow"),
        (("xlsx",), "must be one of 'csv', 'parquet'; got 'xlsx'"),
        ((), "it is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            page.write(tmp_path / "out", [table], formats=formats)
    with pytest.raises(ValueError, match="folder that does not exist"):
        page.write(tmp_path / "no" / "out", [table])
    assert not (tmp_path / "out").exists()
