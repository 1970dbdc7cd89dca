"""The Evaluate modules: their own examples, scikit-learn, SciPy, pingouin, a textbook, and columns without a score."""

import doctest
import importlib.util
import runpy
import warnings

import evaluate
import gradio
import numpy as np
import pandas
import pingouin
import pytest
from conftest import ROOT
from scipy.stats import pearsonr
from sklearn import metrics as sklearn_metrics


NAN = float("nan")


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detection():
    return evaluate.load(str(ROOT / "metrics" / "au_detection"))


@pytest.fixture(scope="module")
def intensity():
    return evaluate.load(str(ROOT / "metrics" / "au_intensity"))


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name", ["au_detection", "au_intensity"])
def test_examples(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(module_of(name), extraglobs={"evaluate": evaluate}, raise_on_error=True)
    assert result.attempted >= 5


@pytest.mark.parametrize("name", ["au_detection", "au_intensity"])
def test_the_page_of_a_space_scores_what_is_typed(name, monkeypatch):
    pages = []
    monkeypatch.setattr(gradio.Interface, "launch", lambda page, **_: pages.append(page))
    monkeypatch.chdir(ROOT / "metrics" / name)
    runpy.run_path("app.py")
    result = pages[0].fn("[[1, 0], [0, 1]]", "[[1, NaN], [1, 1]]")
    assert result["unknown"] == 1 and len(result["action_units"]) == 2
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("gradio=="))
    assert f"sdk_version: {version.removeprefix('gradio==')}\n" in (ROOT / "metrics" / name / "README.md").read_text()


def test_detection_agrees_with_scikit_learn(detection):
    random = np.random.default_rng(0)
    truth = (random.random((200, 3)) < [0.1, 0.5, 0.8]).astype(float)
    probability = np.clip(0.3 * truth + random.random((200, 3)) * 0.7, 0, 1)
    answer = (probability > 0.5).astype(float)
    holes = random.random((200, 3)) < 0.2
    result = detection.compute(
        predictions=answer, references=np.where(holes, NAN, truth), probabilities=probability, action_units=list("abc")
    )
    expected = {name: [] for name in ("f1", "precision", "recall", "accuracy", "balanced_accuracy")}
    expected |= {"roc_auc": [], "average_precision": []}
    for column in range(3):
        seen = ~holes[:, column]
        for name, values in expected.items():
            function = sklearn_metrics.__dict__.get(f"{name}_score")
            guess = probability if name in ("roc_auc", "average_precision") else answer
            values.append(function(truth[seen, column], guess[seen, column]))
    for name, values in expected.items():
        assert [unit[name] for unit in result["action_units"].values()] == pytest.approx(values)
        assert result[name] == pytest.approx(np.mean(values))
    assert result["unknown"] == holes.sum() and result["degenerate"] == {}
    assert result["action_units"]["a"]["support"] == (~holes[:, 0]).sum()
    assert result["action_units"]["c"]["base_rate"] == pytest.approx(truth[~holes[:, 2], 2].mean())


def test_detection_columns_that_break_formulas(detection):
    references = [[0, 1, 0, NAN], [0, 1, 1, NAN]]
    predictions = [[0, 1, 0, 1], [1, 1, 0, 0]]
    result = detection.compute(predictions=predictions, references=references, probabilities=predictions)
    absent, full, missed, unknown = result["action_units"].values()
    assert (absent["f1"], absent["roc_auc"], absent["average_precision"]) == (0, 0.5, 0)
    assert (full["f1"], full["roc_auc"], full["balanced_accuracy"]) == (1, 0.5, 1)
    assert (missed["f1"], missed["roc_auc"], missed["support"], missed["positives"]) == (0, 0.5, 2, 1)
    assert np.isnan(unknown["f1"]) and unknown["support"] == unknown["positives"] == 0 and unknown["unknown"] == 2
    assert unknown.keys() == full.keys()
    hard = detection.compute(predictions=predictions, references=references)["action_units"]
    assert hard["3"].keys() == hard["1"].keys() == full.keys() - {"roc_auc", "average_precision"}
    alone = detection.compute(predictions=[[0], [0]], references=[[0], [1]], probabilities=[[0.2], [0.4]])
    assert alone["roc_auc"] == 1, "one picture with the unit is enough to rank"
    assert result["f1"] == pytest.approx(1 / 3), "the column without labels stays out of the mean"
    assert set(result["degenerate"]) == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": [[0.4], [1.0]]}, "other than 0 and 1"),
        ({"references": [[9.0], [1.0]]}, "NaN"),
        ({"probabilities": [[1.2], [1.0]]}, "0 to 1"),
        ({"action_units": ["AU1", "AU2"]}, "do not fit"),
    ],
)
def test_detection_refuses(detection, change, message):
    with pytest.raises(ValueError, match=message):
        detection.compute(**{"predictions": [[1.0], [0.0]], "references": [[1.0], [0.0]]} | change)


def test_both_refuse_what_would_be_scored_wrongly(detection, intensity):
    for metric in (detection, intensity):
        with pytest.raises(ValueError, match="AU6, AU6: scores are told by name; give each name once"):
            metric.compute(predictions=[[0.0, 1.0]], references=[[0.0, 1.0]], action_units=["AU6", "AU6"])
        with pytest.raises(ValueError, match=r"predictions have the shape \(0,\); give one row a sample"):
            metric._compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="references hold infinite values"):
        intensity.compute(predictions=[[0.0]], references=[[float("inf")]])


def test_batches_give_the_whole(detection, intensity):
    truth = np.random.default_rng(1).integers(0, 2, (40, 2)).astype(float)
    for metric in (detection, intensity):
        whole = metric.compute(predictions=truth[::-1].copy(), references=truth)
        for start in range(0, 40, 7):
            metric.add_batch(predictions=truth[::-1][start : start + 7], references=truth[start : start + 7])
        assert metric.compute() == whole


def test_icc_agrees_with_pingouin_and_the_textbook():
    icc = module_of("au_intensity").intraclass_correlation
    shrout_fleiss = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    random = np.random.default_rng(2)
    for ratings in (np.array(shrout_fleiss, float), random.random((30, 2)) + random.random((30, 1))):
        targets, judges = np.indices(ratings.shape)
        table = {"target": targets.ravel(), "judge": judges.ravel(), "rating": ratings.ravel()}
        found = pingouin.intraclass_corr(
            pandas.DataFrame(table),
            targets="target", raters="judge", ratings="rating",
        )["ICC"].tolist()  # fmt: skip
        assert icc(ratings) == pytest.approx((found[2], found[1]))
    assert icc(shrout_fleiss) == pytest.approx((0.71, 0.29), abs=0.005)


def test_intensity_agrees_with_the_libraries(intensity):
    random, icc = np.random.default_rng(3), module_of("au_intensity").intraclass_correlation
    truth = random.integers(0, 6, (150, 2)).astype(float)
    answer = np.clip(truth + random.normal(0, 1, truth.shape), 0, 5)
    holes = random.random(truth.shape) < 0.2
    result = intensity.compute(predictions=answer, references=np.where(holes, NAN, truth))
    for column, scores in enumerate(result["action_units"].values()):
        x, y = truth[~holes[:, column], column], answer[~holes[:, column], column]
        assert scores["mae"] == pytest.approx(np.abs(x - y).mean())
        assert scores["mae_nonzero"] == pytest.approx(np.abs(x - y)[x > 0].mean())
        assert scores["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(x, y))
        assert scores["pearson"] == pytest.approx(pearsonr(x, y).statistic)
        ccc = 2 * scores["pearson"] * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert scores["ccc"] == pytest.approx(ccc)
        assert (scores["icc31"], scores["icc21"]) == pytest.approx(icc(np.stack([x, y], 1)))
    assert result["unknown"] == holes.sum()


def test_intensity_columns_that_break_formulas(intensity):
    references = [[0, 1, NAN, 0.1], [0, 2, NAN, 0.1], [0, 3, NAN, 0.1]]
    predictions = [[0, 0.3, 1, 0.2], [1, 0.3, 1, 0.2], [2, 0.1 + 0.2, 1, 0.2]]
    result = intensity.compute(predictions=predictions, references=references)
    zero, constant, unknown, both = result["action_units"].values()
    assert np.isnan(zero["mae_nonzero"]) and zero["mae"] == 1
    assert [constant[name] for name in ("pearson", "ccc", "icc31", "icc21")] == [0, 0, 0, 0], "0.1 + 0.2 is 0.3"
    assert np.isnan(unknown["mae"]) and both["icc31"] == 0
    assert [[column["nonzero"], column["base_rate"]] for column in (zero, constant)] == [[0, 0], [3, 1]]
    assert result["mae"] == pytest.approx((1 + 1.7 + 0.1) / 3)
    assert set(result["degenerate"]) == {"0", "1", "2", "3"}
    with pytest.raises(ValueError, match="NaN or infinite"):
        intensity.compute(predictions=[[NAN]], references=[[1.0]])
