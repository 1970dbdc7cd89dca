"""The evaluation room: predictions that survive a kill, intervals over people, cards, calibration, protocols."""

import doctest
import json
import sys
from importlib import import_module

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from huggingface_hub import ModelCard
from sklearn.metrics import brier_score_loss, f1_score

import evaluate_au
from au_llava.action_units import PRESETS, TASKS
from evaluation import bootstrap, calibration
from evaluation.answers import Answers, read_answers
from evaluation.card import update_card
from evaluation.compare import compare
from evaluation.data import read_set
from evaluation.formats import check_formats
from evaluation.predict import load, predict
from evaluation.published import PUBLISHED
from evaluation.results import summarise
from evaluation.robustness import curves, damaged
from evaluation.scores import MODEL, score, score_row


SETTINGS = {"dataset": "synthetic", "protocol": "standard", "split": "test", "model": "m", "predictions": None}


def make_answers(task="detection", split="test", seed=0, people=12, folds=(0,), noise=1.0) -> Answers:
    """Answers of an imagined model about three units: right but for noise; some labels are unknown."""
    random, grid = np.random.default_rng(seed), np.array(TASKS[task].values)
    count, units = 10 * people, list(PRESETS["bp4d"][:3])
    subjects = np.repeat([f"P{person:02d}" for person in range(people)], 10)
    labels = random.choice(grid, (count, 3), p=np.r_[0.6, np.full(len(grid) - 1, 0.4 / (len(grid) - 1))])
    logits = -np.abs(grid - (labels + random.normal(0, noise * grid[-1] / 3, labels.shape))[..., None]) * 4 / grid[-1]
    distributions = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return Answers(
        task=task, split=split, action_units=units, samples=np.array([f"{row:04d}" for row in range(count)]),
        subjects=subjects, folds=np.array(folds)[np.unique(subjects, return_inverse=True)[1] % len(folds)],
        groups={"skin": np.where(np.arange(count) % 2, "dark", "light")},
        labels=np.where(random.random(labels.shape) < 0.1, np.nan, labels),
        values=grid[distributions.argmax(-1)], expected_values=distributions @ grid, distributions=distributions,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, processor):
    """A tiny model, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def faces():
    return read_set("synthetic", limit=20)


@pytest.mark.parametrize(
    "name", ["answers", "bootstrap", "calibration", "data", "faces", "formats", "table", "predict", "compare"]
)
def test_examples(name):
    module = import_module(f"evaluation.{name}")
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0


# Predictions


def test_prediction_survives_a_kill(folder, faces, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.predict.PART", 8)
    whole = predict(faces, folder, tmp_path / "whole", batch_size=4)
    assert predict(faces, folder, tmp_path / "whole", batch_size=4).stat().st_mtime_ns == whole.stat().st_mtime_ns

    room = import_module("evaluation.predict")
    ask, calls = room._ask, []

    def killed_in_the_fifth_part(*args):
        calls.append(args[1:3])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(room, "_ask", killed_in_the_fifth_part)
    with pytest.raises(KeyboardInterrupt):
        predict(faces, folder, tmp_path / "killed", batch_size=4)
    assert not (tmp_path / "killed" / "predictions.parquet").exists()
    again = predict(faces, folder, tmp_path / "killed", batch_size=4)
    assert again.read_bytes() == whole.read_bytes()
    assert len(calls) == 5 + 9 - 4, "nine parts, of which four were there"
    assert [path.name for path in again.parent.iterdir()] == ["predictions.parquet"]


def test_other_weights_start_anew(folder, faces, tmp_path, tokenizer, processor):
    first = predict(faces, folder, tmp_path / "out", tasks=["detection"]).read_bytes()
    model = tiny_model(tokenizer, seed=1)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    second = predict(faces, str(tmp_path / "other"), tmp_path / "out", tasks=["detection"]).read_bytes()
    assert first != second


def test_stored_predictions_hold_what_the_model_said(folder, faces, tmp_path):
    stored = predict(faces, folder, tmp_path, batch_size=8)
    answers = read_answers(stored)
    assert list(answers) == list(TASKS)
    model, processor = load(folder)
    for task, answer in answers.items():
        units = faces.action_units(task)
        inputs = processor(images=faces.pictures([0, 1]), task=task, action_units=units)
        found = model.recognize(**inputs, grammar=processor.grammar(task, units))
        np.testing.assert_allclose(answer.values[:2], found.values, atol=1e-6)
        np.testing.assert_allclose(answer.distributions[:2], found.distributions, atol=1e-5)
        np.testing.assert_allclose(answer.labels, faces.labels[task], atol=1e-6)
    assert set(pq.read_table(stored)["split"].to_pylist()) == {"test"}


def test_command_scores_and_scores_again(folder, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate_au.py", *arguments, "--resamples", "20"])
        evaluate_au.main()
        return capsys.readouterr().out

    first, again = tmp_path / "first", tmp_path / "again"
    out = run(
        "--model",
        folder,
        "--output",
        str(first),
        "--limit",
        "20",
        "--update_card",
        "--formats",
        "4",
        "--robustness",
        "2",
    )
    assert "always positive" in out and "always zero" in out
    run("--predictions", str(first), "--output", str(again))
    results, rescored = (json.loads((path / "results.json").read_text()) for path in (first, again))
    assert results["tasks"] == rescored["tasks"]
    assert 0 <= results["formats"]["invalid"]["detection"] <= 1
    page = (first / "report.html").read_text()
    assert "src='http" not in page and "<script" not in page and results["protocol"] in page
    assert page.count("data:image/jpeg") == 3, "best and worst faces of each task"
    assert ModelCard.load(f"{folder}/README.md").data.eval_results[0].metric_type == "f1"
    out = run("--compare", str(first), str(first), "--output", str(tmp_path / "compared"))
    assert "[0.000, 0.000]" in out


# Scores and intervals


@pytest.mark.parametrize("task", TASKS)
def test_sums_give_the_metrics(task):
    answers = make_answers(task)
    row = score_row(answers, answers.values, answers.expected_values, resamples=10)
    kind = "detection" if task == "detection" else "intensity"
    sums = getattr(bootstrap, f"{kind}_sums")(answers.labels, answers.values)
    people = bootstrap.per_subject(sums, answers.subjects, answers.folds)
    for name, values in bootstrap.point(people, getattr(bootstrap, f"{kind}_scores")).items():
        expected = [row["action_units"][unit][name]["value"] for unit in answers.action_units]
        assert values == pytest.approx(expected, abs=1e-9), name


def test_intervals_resample_people_not_pictures():
    answers = make_answers(people=10)
    right = np.nan_to_num(answers.labels)
    wrong = np.isin(answers.subjects, ["P00", "P01", "P02"])  # three people are always answered wrongly
    values = np.where(wrong[:, None], 1 - right, right)
    alone = Answers(**{**answers.__dict__, "subjects": answers.samples})
    wide, narrow = (score_row(one, values, values, resamples=400)["mean"]["accuracy"] for one in (answers, alone))
    assert wide["value"] == narrow["value"]
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])
    # Ten people of whom seven are right: the share of right ones has this standard deviation.
    assert (wide["high"] - wide["low"]) / 3.92 == pytest.approx((0.7 * 0.3 / 10) ** 0.5, rel=0.2)


def test_mean_over_folds_then_units():
    answers = make_answers(folds=(1, 2, 3))
    row = score_row(answers, answers.values, answers.expected_values, resamples=20)
    folds = []
    for fold in (1, 2, 3):
        part = answers.take(answers.folds == fold)
        seen = ~np.isnan(part.labels)
        folds.append([f1_score(part.labels[s, c], part.values[s, c]) for c, s in enumerate(seen.T)])
    assert row["mean"]["f1"]["value"] == pytest.approx(np.mean(folds))
    assert row["spread"]["f1"] == pytest.approx(np.std(np.mean(folds, 1)))
    assert row["pooled"]["f1"] != pytest.approx(row["mean"]["f1"]["value"], abs=1e-6)


def test_baselines_and_groups():
    found = score(make_answers("intensity_level"), resamples=20)
    rows, answers = found["rows"], make_answers("intensity_level")
    assert list(rows) == [MODEL, f"{MODEL}, expected value", "predict the mean", "always zero"]
    assert rows["always zero"]["mean"]["mae"]["value"] == pytest.approx(np.nanmean(answers.labels, 0).mean())
    assert set(found["groups"]["skin"]) == {"dark", "light"}
    detection = score(make_answers(), resamples=20)["rows"]
    assert detection["always positive"]["mean"]["recall"]["value"] == 1
    assert detection["majority"]["mean"]["f1"]["value"] == 0


def test_comparison_is_paired():
    good, bad = ({"detection": make_answers(noise=noise)} for noise in (0.5, 1.5))
    (mean, *_) = compare(good, bad, resamples=200)["detection"]
    assert mean["low"] > 0 and mean["difference"] == pytest.approx(mean["first"] - mean["second"])
    shuffled = {"detection": bad["detection"].take(np.random.default_rng(0).permutation(120))}
    assert compare(good, shuffled, resamples=200)["detection"][0] == pytest.approx(mean)
    same = compare(good, good, resamples=20)["detection"]
    assert all(row["low"] == row["high"] == 0 for row in same)
    with pytest.raises(ValueError, match="labels"):
        compare(good, {"detection": make_answers(seed=1)})


def test_published_errors_are_marked():
    for _, rows in PUBLISHED.values():
        for row in rows:
            wrong = abs(row.mean - row.printed) > 0.001
            assert wrong == ("average does not follow" in row.note), row


# Calibration


def test_thresholds_never_see_test_data(tmp_path):
    with pytest.raises(ValueError, match="validation"):
        calibration.fit({"detection": make_answers(split="test")})
    fitted = calibration.fit({"detection": make_answers(split="validation", seed=5)})["detection"]
    test = make_answers()
    flipped = Answers(**{**test.__dict__, "labels": 1 - test.labels})
    one, other = (calibration.apply(answers, fitted) for answers in (test, flipped))
    assert np.array_equal(one.values, other.values), "answers do not depend on test labels"
    results = summarise({"detection": test}, SETTINGS, "c", {"detection": fitted}, resamples=10)
    assert results["tasks"]["detection"]["calibration"]["fitted"] == fitted
    assert f"{MODEL}, fitted thresholds" in results["tasks"]["detection"]["rows"]


def test_calibrating_reads_only_the_validation_split(folder, tmp_path, monkeypatch):
    from au_llava.datasets_scripts.synthetic_faces.writer import write_split

    write_split(tmp_path, "validation", 6)
    write_split(tmp_path, "test", 6)
    common = [
        "evaluate_au.py",
        "--model",
        folder,
        "--data_dir",
        str(tmp_path),
        "--resamples",
        "10",
        "--tasks",
        "detection",
    ]
    monkeypatch.setattr(sys, "argv", [*common, "--calibrate", "--output", str(tmp_path / "out")])
    evaluate_au.main()
    stored = calibration.load(folder)
    assert stored == calibration.fit(read_answers(tmp_path / "out" / "validation"))
    calibration.store({}, folder)


def test_thresholds_and_temperatures_are_the_best():
    answers = make_answers(split="validation", noise=1.2)
    fitted = calibration.fit({"detection": answers})["detection"]
    calibrated = calibration.apply(answers, fitted)
    for column, unit in enumerate(answers.action_units):
        seen = ~np.isnan(answers.labels[:, column])
        truth, probability = answers.labels[seen, column], calibrated.expected_values[seen, column]
        best = max(f1_score(truth, probability >= threshold) for threshold in probability)
        assert f1_score(truth, probability >= fitted["thresholds"][unit]) == pytest.approx(best)
    # Sharpened distributions need exactly the temperature that undoes the sharpening.
    sharp = calibration.apply(answers, {"temperature": 0.25})
    ratio = calibration.fit_temperature(sharp) / calibration.fit_temperature(answers)
    assert ratio == pytest.approx(4, rel=0.01)
    assert calibration.fit_threshold(np.zeros(3), np.ones(3)) == 0.5


def test_reliability():
    answers = make_answers()
    seen = ~np.isnan(answers.labels)
    found = calibration.reliability(answers)
    assert found["brier"] == pytest.approx(brier_score_loss(answers.labels[seen], answers.expected_values[seen]))
    assert sum(count for *_, count in found["bins"]) == seen.sum()
    sure = np.zeros((*answers.labels.shape, 2))
    sure[..., 1] = np.nan_to_num(answers.labels)
    sure[..., 0] = 1 - sure[..., 1]
    assert calibration.reliability(Answers(**{**answers.__dict__, "distributions": sure}))["ece"] == 0


def test_calibration_is_stored_with_the_processor(folder):
    before = json.loads(calibration.store({}, folder).read_text())
    fitted = {"detection": {"temperature": 1.5, "thresholds": {"AU1": 0.3}}}
    calibration.store(fitted, folder)
    assert calibration.load(folder) == fitted
    assert json.loads(calibration.store({}, folder).read_text()) == before
    assert calibration.load(None) == {}


# Card and protocols


def test_card_is_replaced_never_doubled(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: apache-2.0\ntags:\n- faces\n---\n\n# A model\n\nWords before.\n")
    answers = {"detection": make_answers(), "intensity": make_answers("intensity")}
    update_card(summarise(answers, SETTINGS, "first", resamples=10), readme)
    once = readme.read_text()
    other = SETTINGS | {"dataset": "bp4d"}
    update_card(summarise({"detection": make_answers()}, other, "first", resamples=10), readme)
    update_card(summarise(answers, SETTINGS, "first", resamples=10), readme)
    twice = readme.read_text()
    update_card(summarise(answers, SETTINGS, "first", resamples=10), readme)
    assert readme.read_text() == twice
    assert once.count("## Results on") == 1 and twice.count("## Results on") == 2
    assert "Words before." in twice and "license: apache-2.0" in twice
    metrics = [(entry.dataset_type, entry.metric_type) for entry in ModelCard(twice).data.eval_results]
    assert sorted(metrics) == [
        ("bp4d", "f1"), ("bp4d", "roc_auc"), ("synthetic", "f1"), ("synthetic", "icc31"), ("synthetic", "mae"),
        ("synthetic", "roc_auc"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def disfa_crops(tmp_path_factory):
    """Prepared crops in the shape of DISFA: two people of each fold."""
    from au_llava.datasets_scripts.disfa import PARTS
    from au_llava.datasets_scripts.preparation import Settings, prepare
    from au_llava.datasets_scripts.recordings import Recording

    root = tmp_path_factory.mktemp("disfa")
    for place, picture in enumerate(read_set("synthetic", limit=3).pictures([0, 1, 2])):
        picture.save(root / f"{place + 1}.png")
    images = tuple(root / f"{number}.png" for number in (1, 2, 3))
    levels = np.array([[0] * 12, [2] * 12, [3] * 11 + [np.nan]])
    recordings = [
        Recording("disfa", "intensity_level", PRESETS["disfa"], person, person, (1, 2, 3), levels, images=images)
        for part in PARTS
        for person in part[:2]
    ]
    prepare(recordings, root / "crops", Settings(detector="none"))
    return root / "crops"


def test_protocols_of_disfa(disfa_crops):
    standard = read_set("disfa", disfa_crops)
    paper = read_set("disfa", disfa_crops, protocol="paper", fold=2)
    assert len(standard) == 18 and sorted(set(standard.folds)) == [1, 2, 3] and set(paper.folds) == {2}
    assert standard.labels["detection"][:2].tolist() == [[0] * 8, [1] * 8]
    assert paper.labels["detection"][:2].tolist() == [[0] * 8, [0] * 8], "above 2, as the paper says"
    assert paper.labels["detection"][2, :7].tolist() == [1] * 7 and np.isnan(paper.labels["detection"][2, 7])
    assert standard.pictures([4])[0].size == (224, 224)
    with pytest.raises(ValueError, match="no fold 2"):
        read_set("synthetic", fold=2)


def test_missing_shards_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="synthetic_faces --output_dir"):
        read_set("synthetic", tmp_path, split="validation")
    with pytest.raises(FileNotFoundError, match="No predictions"):
        read_answers(tmp_path)


def test_free_text_and_contradictions(folder, faces):
    found = check_formats(*load(folder), faces, pictures=3)
    assert found["pictures"] == 3 and set(found["invalid"]) == set(TASKS) and len(found["contradictions"]) == 3


def test_robustness_damages_the_same_pictures_for_every_model(folder, faces, tmp_path):
    worse, again = damaged(faces, 2), damaged(faces, 2)
    assert len(worse) == 2 * 31
    assert np.array_equal(worse.pictures([0])[0], faces.pictures([0])[0])
    for row in range(2, 62):
        one, other = (np.asarray(some.pictures([row])[0]) for some in (worse, again))
        assert np.array_equal(one, other) and one.shape == (224, 224, 3)
        assert not np.array_equal(one, worse.pictures([row % 2])[0]), worse.samples[row]
    answers = read_answers(predict(worse, folder, tmp_path, tasks=["detection"]))
    found = curves(answers, resamples=10)["detection"]
    assert found["pictures"] == 2 and [len(kind["scores"]) for kind in found["damages"].values()] == [5] * 6
