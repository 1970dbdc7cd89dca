"""The evaluation room: predictions that survive a kill, the command, protocols, damaged pictures."""

import doctest
import json
import sys
from importlib import import_module

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from huggingface_hub import ModelCard

import evaluate_au
from au_llava.action_units import PRESETS, TASKS
from evaluation import calibration
from evaluation.answers import read_answers
from evaluation.data import read_set
from evaluation.formats import check_formats
from evaluation.predict import load, predict
from evaluation.robustness import curves, damaged


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


def test_calibrating_reads_only_the_validation_split(folder, tmp_path, monkeypatch):
    from au_llava.datasets_scripts.synthetic_faces.writer import write_split

    write_split(tmp_path, "validation", 6)
    write_split(tmp_path, "test", 6)
    command = (
        f"evaluate_au.py --model {folder} --data_dir {tmp_path} --output {tmp_path}/out --calibrate --resamples 10"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--tasks", "detection"])
    evaluate_au.main()
    stored = calibration.load(folder)
    assert stored == calibration.fit(read_answers(tmp_path / "out" / "validation"))
    calibration.store({}, folder)


def test_calibration_is_stored_with_the_processor(folder):
    before = json.loads(calibration.store({}, folder).read_text())
    fitted = {"detection": {"temperature": 1.5, "thresholds": {"AU1": 0.3}}}
    calibration.store(fitted, folder)
    assert calibration.load(folder) == fitted
    assert json.loads(calibration.store({}, folder).read_text()) == before
    assert calibration.load(None) == {}


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
