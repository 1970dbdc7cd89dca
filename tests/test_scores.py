"""What is computed from stored answers: scores, intervals over people, comparison, calibration, the card."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from au_llava.action_units import PRESETS, TASKS
from au_llava.recognition_au_llava import Recognition
from evaluation import bootstrap, calibration
from evaluation.answers import Answers, decide
from evaluation.card import update_card
from evaluation.compare import compare
from evaluation.published import PUBLISHED
from evaluation.report import write_report
from evaluation.results import summarise
from evaluation.scores import MODEL, score, score_row
from evaluation.table import verdicts


SETTINGS = {"dataset": "synthetic", "protocol": "standard", "options": "", "split": "test", "models": ["m"]}


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


def test_resampled_ranks_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    labels = np.where(random.random(200) < 0.1, np.nan, random.random(200) < 0.3)
    probability = (random.random(200) * 0.7 + np.nan_to_num(labels) * 0.3).round(1)  # with many ties
    owner, seen = random.integers(0, 15, 200), ~np.isnan(labels)
    (weights,) = bootstrap.draw_people([15], 20)
    found = bootstrap.rank_scores(labels, probability, owner, weights)
    for row, weight in enumerate(weights[:, owner][:, seen]):
        for score_of, ours in zip((roc_auc_score, average_precision_score), found[:, row], strict=True):
            assert ours == pytest.approx(score_of(labels[seen], probability[seen], sample_weight=weight))
    assert bootstrap.rank_scores(np.ones(15), np.ones(15), np.arange(15), weights)[:, 0].tolist() == [0.5, 1]


def test_ranks_have_intervals_over_people():
    row = score_row(answers := make_answers(folds=(1, 2)), answers.values, answers.expected_values, resamples=100)
    for name in ("roc_auc", "average_precision"):
        for entry in (row["mean"][name], *(unit[name] for unit in row["action_units"].values())):
            assert entry["low"] < entry["value"] < entry["high"]


def test_a_score_that_few_people_tell_of_has_no_interval():
    answers = make_answers("intensity_level")
    answers.labels[answers.subjects > "P01", 0] = np.nan  # only two people are known
    answers.labels[(answers.subjects != "P03") & ~np.isnan(answers.labels[:, 1]), 1] = 0  # only one shows the unit
    row = score_row(answers, answers.values, answers.expected_values, resamples=50)
    blank = {(unit, name) for unit, own in row["action_units"].items() for name in own if np.isnan(own[name]["low"])}
    assert blank == {("AU1", name) for name in row["mean"]} | {("AU2", "mae_nonzero")}
    assert row["mean"]["mae"]["low"] < row["mean"]["mae"]["value"] < row["mean"]["mae"]["high"]
    other = replace(answers, values=answers.values[::-1])
    compared = compare({"intensity_level": answers}, {"intensity_level": other}, resamples=50)["intensity_level"]
    assert {line["action_unit"] for line in compared if np.isnan(line["low"])} == {"AU1"}


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


def test_a_unit_that_one_fold_cannot_score_is_named():
    answers = make_answers(folds=(1, 2))
    answers.labels[answers.folds == 2, 0] = 0
    row = score_row(answers, answers.values, answers.expected_values, resamples=2)
    assert list(row["degenerate"]) == ["AU1"] and row["degenerate"]["AU1"].startswith("in fold 2 no positive label")
    answers.labels[:, 0] = 0
    row = score_row(answers, answers.values, answers.expected_values, resamples=2)
    assert row["degenerate"]["AU1"].startswith("no positive label")
    assert "AU1" in score(answers, resamples=2)["groups"]["skin"]["dark"]["degenerate"]


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


def test_thresholds_never_see_test_data(tmp_path):
    with pytest.raises(ValueError, match="validation"):
        calibration.fit({"detection": make_answers(split="test")})
    with pytest.warns(UserWarning, match=r"detection is calibrated on fewer than 6 people \(5\), who"):
        calibration.fit({"detection": make_answers(split="validation", people=5)})
    fitted = calibration.fit({"detection": make_answers(split="validation", seed=5)})["detection"]
    test = make_answers()
    flipped = Answers(**{**test.__dict__, "labels": 1 - test.labels})
    one, other = (calibration.apply(answers, fitted) for answers in (test, flipped))
    assert np.array_equal(one.values, other.values), "answers do not depend on test labels"
    results = summarise({"detection": test}, SETTINGS, "c", {0: {"detection": fitted}}, resamples=10)
    assert results["tasks"]["detection"]["calibration"]["fitted"] == {"0": fitted}
    assert f"{MODEL}, calibrated" in results["tasks"]["detection"]["rows"]


def test_margins_hold_nine_of_ten_errors():
    answers = make_answers("intensity_level", split="validation").take(slice(0, 29))
    answers.labels[:], answers.values[:] = 1, 3
    answers.values[:19, 0], answers.labels[:19, 0] = 0, [0] * 17 + [1, 4]  # the 18th of 19 errors, the whole of 10
    answers.labels[19:, 0] = [3] * 8 + [2, 1]
    answers.labels[:21, 1] = np.nan  # eight are left: too few to promise anything
    answers.labels[:, 2] = np.nan
    margins = calibration.fit_margins(answers)
    assert margins == {"AU1": [1, 2], "AU2": [5, 5]}
    answers = make_answers("intensity", split="validation").take(slice(0, 20))
    answers.values[:, 0], answers.labels[:, 0] = 0.5, 0.5 + 0.1234
    assert calibration.fit_margins(answers)["AU1"] == [1, 0.13], "ends are values of the task"


@pytest.mark.parametrize("task", ["intensity_level", "intensity"])
def test_intervals_hold_nine_of_ten_labels_of_other_people(task):
    fitted = calibration.fit({task: make_answers(task, split="validation", people=60, seed=1)})[task]
    found = summarise({task: make_answers(task, people=60)}, SETTINGS, "c", {0: {task: fitted}}, resamples=2)
    told = found["tasks"][task]["calibration"]["intervals"]
    known = ~np.isnan(make_answers(task, people=60).labels)
    assert told["lowest"]["answers"] + told["more"]["answers"] == known.sum()
    whole = TASKS[task].values[-1]
    assert all(kind["holds"] > 0.86 and 0 < kind["width"] < 0.9 * whole for kind in told.values())
    if task == "intensity":  # a model that is worse at these faces, and does not know it
        unlike = calibration.apply(make_answers(task, people=60, noise=3), fitted)
        assert calibration.coverage(unlike, {0: fitted})["more"]["holds"] < 0.75
    mean = decide(make_answers(task, people=60), "mean")  # of which the pipeline gives no interval
    found = summarise({task: mean}, SETTINGS, "c", {0: {task: fitted}}, resamples=2)
    assert found["tasks"][task]["calibration"]["intervals"] is None
    unlike = make_answers(task, people=60)
    del fitted["margins" if task == "intensity" else "mass"]
    assert calibration.coverage(unlike, {0: fitted}) is None


def test_a_calibration_of_another_fold_is_refused():
    fitted = calibration.fit({"detection": make_answers(split="validation", folds=(1,))})["detection"]
    fitted["fitted_on"] = [{"dataset": "disfa", "protocol": "standard", "options": "", "fold": 1}]
    test, disfa = make_answers(folds=(1, 2)), SETTINGS | {"dataset": "disfa"}
    with pytest.raises(ValueError, match="fold 2"):
        summarise({"detection": test}, disfa, "c", {1: {"detection": fitted}, 2: {"detection": fitted}})
    paper = disfa | {"protocol": "paper"}  # whose labels are others: neither refused nor applied
    found = summarise({"detection": test.take(test.folds == 1)}, paper, "c", {1: {"detection": fitted}}, resamples=2)
    assert not found["tasks"]["detection"]["calibration"]["fitted"]
    frames = {"fitted_on": [{"dataset": "feafa", "protocol": "paper", "options": "", "fold": 0}]}  # it has no folds
    videos = {"dataset": "feafa", "protocol": "standard", "options": ""}
    assert calibration.own_people({1: {"intensity": frames}}, "intensity", videos) == {}
    fewer = disfa | {"options": "drop_bad_landmarks=True"}  # the same people
    found = summarise({"detection": test.take(test.folds == 1)}, fewer, "c", {1: {"detection": fitted}}, resamples=2)
    assert found["tasks"]["detection"]["calibration"]["fitted"]
    named = disfa | {"options": "naming=megraphau"}  # other people in this fold
    with pytest.raises(ValueError, match="would have seen test people"):
        summarise({"detection": test.take(test.folds == 1)}, named, "c", {1: {"detection": fitted}}, resamples=2)
    other = SETTINGS | {"dataset": "bp4d"}  # other people
    summarise({"detection": test}, other, "c", dict.fromkeys((1, 2), {"detection": fitted}), resamples=10)


def test_people_that_a_calibration_was_fitted_on_are_not_scored_with_it():
    held = make_answers(split="validation")
    fitted = calibration.fit({"detection": held})["detection"]
    fitted["fitted_on"] = [{"dataset": "synthetic", "protocol": "standard", "options": "", "fold": 0}]
    for answers, calibrated in ((held, False), (make_answers(split="train"), False), (make_answers(), True)):
        found = summarise({"detection": answers}, SETTINGS, "c", {0: {"detection": fitted}}, resamples=2)
        result = found["tasks"]["detection"]
        assert bool(result["calibration"]["fitted"]) == calibrated == (f"{MODEL}, calibrated" in result["rows"])
    assert not calibration.own_people({0: {"detection": fitted}}, "detection", {"dataset": "synthetic_facs"}, "train")


def test_each_fold_has_its_own_thresholds():
    test = make_answers(folds=(1, 2))
    fitted = {fold: {"temperature": float(fold), "thresholds": {"AU1": fold / 3}} for fold in (1, 2)}
    whole = calibration.apply_folds(test, fitted)
    for fold in (1, 2):
        part = calibration.apply(test.take(test.folds == fold), fitted[fold])
        assert np.array_equal(whole.values[test.folds == fold], part.values)
        assert np.array_equal(whole.distributions[test.folds == fold], part.distributions)
    assert not np.array_equal(whole.values, test.values)


def test_the_better_of_two_models_is_named():
    good, bad = make_answers(noise=0.5), make_answers(noise=3)
    own = {0: calibration.fit({"detection": make_answers(split="validation", noise=3)})}
    one, other = (
        summarise({"detection": ours}, SETTINGS, "c", own, {"head": ({"detection": theirs}, own)}, resamples=100)
        for ours, theirs in ((good, bad), (bad, good))
    )
    first, second = (verdicts(found["tasks"]["detection"]) for found in (one, other))
    assert [line.split(":")[0] for line in first] == ["Mean F1", "Mean ROC-AUC"] * 2
    assert re.match(rf"Mean F1: {MODEL} \(.*\) is better than head \(", first[0])
    assert re.match(rf"Mean F1: head \(.*\) is better than {MODEL} \(", second[0])
    assert re.match(rf"Mean F1: head, calibrated .* is better than {MODEL}, calibrated", second[2])
    assert "head, calibrated" in other["tasks"]["detection"]["rows"]
    good, bad = make_answers("intensity", noise=0.5), make_answers("intensity", noise=3)
    found = summarise({"intensity": good}, SETTINGS, "c", None, {"head": ({"intensity": bad}, {})}, resamples=100)
    for line in verdicts(found["tasks"]["intensity"]):  # MAE, where less is better, and ICC
        assert re.search(rf": {MODEL} \(.*\) is better than head", line)
    found = summarise({"intensity": good}, SETTINGS, "c", None, {"head": ({"intensity": good}, {})}, resamples=100)
    assert "not clearly apart" in verdicts(found["tasks"]["intensity"])[0]


def test_our_rows_alone_stand_out(tmp_path):
    ours, settings = {"detection": make_answers()}, SETTINGS | {"decision": "mode", "readout": "exact"}
    results = summarise(ours, settings, "c", None, {f"{MODEL}-before": (ours, {})}, resamples=2)
    page = write_report(results, ours, tmp_path).read_text()
    assert f"<tr class=ours><td>{MODEL}</td>" in page and f"<tr><td>{MODEL}-before</td>" in page


@pytest.mark.parametrize(
    ("task", "fitted", "told"),
    [
        ("intensity", {"temperature": 0.4, "temperatures": dict.fromkeys(("AU1", "AU2", "AU4"), 0.5)}, 0.5),
        ("detection", {"thresholds": {"AU1": 0.3}}, 1),  # as one may write it oneself
    ],
)
def test_report_and_card_tell_the_temperature_that_was_applied(tmp_path, task, fitted, told):
    ours, settings = {task: make_answers(task)}, SETTINGS | {"decision": "mode", "readout": "exact"}
    results = summarise(ours, settings, "c", {0: {task: fitted}}, resamples=2)
    assert f"Temperature {told}, fitted" in write_report(results, ours, tmp_path).read_text()
    assert f" tested | {told:.2f} |" in update_card(results, tmp_path / "README.md").read_text()


def test_remarks_in_the_report_are_about_the_answers_that_it_shows(tmp_path):
    ours, settings = {"detection": make_answers()}, SETTINGS | {"decision": "mode", "readout": "exact"}
    always = {0: {"detection": {"thresholds": dict.fromkeys(ours["detection"].action_units, 0.0)}}}
    always[0]["detection"] |= {"temperature": 1.0, "fitted_on": []}
    results = summarise(ours, settings, "c", always, resamples=2)
    assert "always predicted" in write_report(results, ours, tmp_path).read_text()


@pytest.mark.parametrize("people", [1, 5])
def test_a_few_people_tell_nothing_of_others(people):
    for task in ("detection", "intensity"):
        ours, theirs = (make_answers(task, people=people, noise=noise) for noise in (0.5, 3))
        result = summarise({task: ours}, SETTINGS, "c", None, {"head": ({task: theirs}, {})})["tasks"][task]
        assert all(np.isnan([entry["low"], entry["high"]]).all() for entry in result["rows"][MODEL]["mean"].values())
        assert all(line.split("; ")[0].endswith("are not clearly apart") for line in verdicts(result))
        assert "[" not in "".join(verdicts(result))


def test_values_that_hardly_vary_still_correlate():
    labels = np.random.default_rng(0).random((200, 1))
    values = 0.1 + 1e-5 * labels
    found = bootstrap.intensity_scores(bootstrap.intensity_sums(labels, values).sum(0))
    assert found["pearson"] == pytest.approx(1, abs=1e-3)
    constant = bootstrap.intensity_sums(labels, np.full_like(labels, 0.1)).sum(0)
    assert bootstrap.intensity_scores(constant)["pearson"] == 0


def test_it_is_told_how_often_each_unit_occurs():
    answers = make_answers("intensity")
    answers.labels[:, 0], answers.labels[:4, 0] = np.nan, [0.0, 0.01, 0.0, 1.0]  # shut, a trace, shut, all of it
    answers.labels[:, 1] = np.nan
    result = score(answers, resamples=2)
    known = answers.labels[~np.isnan(answers.labels[:, 2]), 2]
    assert list(result["base_rate"].values()) == pytest.approx([0.5, 0, (known > 0).mean()], abs=1e-6)
    assert result["unknown"] == 356 - len(known) and result["samples"] == 120


def test_thresholds_and_temperatures_are_the_best():
    answers = make_answers(split="validation", noise=1.2)
    fitted = calibration.fit({"detection": answers})["detection"]
    calibrated = calibration.apply(answers, fitted)
    for column, unit in enumerate(answers.action_units):
        seen = ~np.isnan(answers.labels[:, column])
        truth, probability = answers.labels[seen, column], calibrated.expected_values[seen, column]
        best = max(f1_score(truth, probability >= threshold) for threshold in probability)
        assert f1_score(truth, probability >= calibration.best_threshold(truth, probability)) == pytest.approx(best)
        assert f1_score(truth, probability >= fitted["thresholds"][unit]) > best - 0.08
    mixed = calibration.apply(answers, {"temperature": 2.0, "temperatures": {answers.action_units[0]: 0.5}})
    for columns, temperature in ((slice(1), 0.5), (slice(1, None), 1.0)):
        alike = calibration.apply(answers, {"temperature": temperature})
        np.testing.assert_array_equal(mixed.distributions[:, columns], alike.distributions[:, columns])
    # Sharpened distributions need exactly the temperature that undoes the sharpening.
    sharp = calibration.apply(answers, {"temperature": 0.25})
    ratio = calibration.fit_temperature(sharp) / calibration.fit_temperature(answers)
    assert ratio == pytest.approx(4, rel=0.01)
    assert calibration.fit_threshold(np.zeros(3), np.ones(3)) == 0.5
    alone = np.arange(30) == 7  # resampled pictures without it tell nothing
    assert calibration.fit_threshold(alone.astype(float), 0.1 + 0.8 * alone) == pytest.approx(0.5)


def test_a_threshold_is_the_best_of_all_cuts_where_probabilities_are_alike():
    generator = np.random.default_rng(0)
    for _ in range(100):
        truth, probability = generator.integers(0, 2, 8).astype(float), generator.integers(0, 5, 8) / 5
        truth[0] = 1
        best = max(f1_score(truth, probability >= cut) for cut in probability)
        assert f1_score(truth, probability >= calibration.best_threshold(truth, probability)) == pytest.approx(best)


def test_thresholds_hang_less_on_single_pictures_than_where_f1_peaks():
    generator, found = np.random.default_rng(0), {"peak": [], "fitted": []}

    def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (generator.random(count) < 0.1).astype(float)
        return labels, 1 / (1 + np.exp(2 - 2 * labels - 1.2 * generator.normal(size=count)))

    many, certain = pictures(20000)
    for _ in range(30):
        few = pictures(150)
        found["peak"].append(calibration.best_threshold(*few))
        found["fitted"].append(calibration.fit_threshold(*few))
    assert np.std(found["fitted"]) < 0.8 * np.std(found["peak"])
    reached = {name: np.mean([f1_score(many, certain >= one) for one in own]) for name, own in found.items()}
    assert reached["fitted"] > reached["peak"]


def test_lines_undo_what_a_model_does_to_intensities():
    truth = make_answers("intensity", split="validation", people=40)
    shy = replace(truth, expected_values=np.clip(0.15 + 0.5 * np.nan_to_num(truth.labels), 0, 1))
    for unit, (zero, slope) in calibration.fit({"intensity": shy})["intensity"]["lines"].items():
        assert (zero, slope) == pytest.approx((0.15, 2.0)), unit
    silent = replace(truth, labels=truth.labels * np.array([1, 0, 1]))
    assert list(calibration.fit({"intensity": silent})["intensity"]["lines"]) == ["AU1", "AU4"]


def test_levels_are_decided_by_what_errs_least():
    answers = make_answers("intensity_level", split="validation")
    doubting = answers.distributions * 0.55
    doubting[..., 0] += 0.45  # most probable is 0, however sure the model is that something is there
    for distributions, best in ((answers.distributions, "mode"), (doubting, "median")):
        told = replace(answers, distributions=distributions, values=distributions.argmax(-1).astype(float))
        fitted = calibration.fit({"intensity_level": told})["intensity_level"]
        errors = {
            way: np.nanmean(np.abs(calibration.apply(told, fitted | {"decision": way}).values - told.labels))
            for way in ("mode", "median")
        }
        assert fitted["decision"] == best == min(errors, key=errors.get)


@pytest.mark.parametrize("task", TASKS)
def test_reports_and_users_get_the_same_calibrated_answers(task, processor):
    answers = make_answers(task)
    fitted = {"temperature": 1.7} | {
        "detection": {"thresholds": {"AU1": 0.2, "AU4": 0.9}},
        "intensity_level": {"decision": "median"},
        "intensity": {"lines": {"AU1": [0.2, 1.4], "AU4": [0.05, 0.8]}},
    }[task]
    expected = calibration.apply(answers, fitted)
    tensors = {
        name: torch.tensor(answers.__dict__[name]).float() for name in ("values", "expected_values", "distributions")
    }
    raw = Recognition(sequences=None, probabilities=tensors["values"], forwards=1, **tensors)
    calibrated = copy.deepcopy(processor)
    calibrated.calibration = {task: fitted}
    found = calibrated.calibrate(raw, task, answers.action_units)
    assert not np.array_equal(expected.values, answers.values)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    np.testing.assert_allclose(found.expected_values, expected.expected_values, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("decision", ["mode", "mean", "median"])
def test_reports_decide_as_the_model_does(task, decision):
    answers, grid = make_answers(task), torch.tensor(TASKS[task].values)
    tensors = {
        name: torch.tensor(answers.__dict__[name]).float() for name in ("values", "expected_values", "distributions")
    }
    raw = Recognition(sequences=None, probabilities=tensors["values"], forwards=1, **tensors)
    found = decide(answers, decision).values
    if task != "detection":
        np.testing.assert_allclose(found, raw.decide(decision, grid).values, atol=1e-6)
    else:
        assert found is answers.values, "yes or no, however it is decided"


def test_reliability():
    answers = make_answers()
    seen = ~np.isnan(answers.labels)
    found = calibration.reliability(answers)
    both = 2 * brier_score_loss(answers.labels[seen], answers.expected_values[seen])  # of yes and of no
    assert found["brier"] == pytest.approx(both)
    assert sum(count for *_, count in found["bins"]) == seen.sum()
    sure = np.zeros((*answers.labels.shape, 2))
    sure[..., 1] = np.nan_to_num(answers.labels)
    sure[..., 0] = 1 - sure[..., 1]
    assert calibration.reliability(Answers(**{**answers.__dict__, "distributions": sure}))["ece"] == 0
    # Of what is answered, not of what is most probable: lines answer other values than that.
    half = make_answers("intensity_level")
    half = replace(half, values=np.zeros_like(half.values))
    (seen, zero) = ~np.isnan(half.labels), half.distributions[..., 0]
    for mean, share, count in calibration.reliability(half)["bins"]:
        own = seen & (
            np.minimum((zero * calibration.BINS).astype(int), calibration.BINS - 1) == int(mean * calibration.BINS)
        )
        assert (own.sum(), (half.labels[own] == 0).mean()) == (count, pytest.approx(share))


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
    assert "| AU-LLaVA (paper), published, 12 units | 0.603 | |" in twice
    assert "EAC, published as 0.559: the printed average does not follow" in twice
    assert "Words before." in twice and "license: apache-2.0" in twice
    metrics = [(entry.dataset_type, entry.metric_type) for entry in ModelCard(twice).data.eval_results]
    assert sorted(metrics) == [
        ("bp4d", "f1"), ("bp4d", "roc_auc"), ("synthetic", "f1"), ("synthetic", "icc31"), ("synthetic", "mae"),
        ("synthetic", "roc_auc"),
    ]  # fmt: skip
