"""The evaluation room: predictions that survive a kill, the command, protocols, damaged pictures."""

import copy
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, killed, tiny_model
from dataset_trees import feafa_tree
from huggingface_hub import ModelCard
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import evaluate_au
from au_llava import AuLlavaProcessor
from au_llava.action_units import PRESETS, TASKS
from au_llava.datasets_scripts.disfa import PARTS
from au_llava.datasets_scripts.feafa import find_recordings, in_random_test
from au_llava.datasets_scripts.preparation import Settings, prepare
from au_llava.datasets_scripts.recordings import Recording
from au_llava.datasets_scripts.synthetic_faces.builder import labels_of
from au_llava.photos import load_pipeline
from baselines import linear_head, tuning
from baselines.tuning import augmented, tune
from evaluation import calibration
from evaluation.answers import read_answers, read_origin
from evaluation.card import update_card
from evaluation.data import SAMPLE, read_set, spread
from evaluation.formats import SHARED, check_formats
from evaluation.people import check_apart, check_never_seen
from evaluation.predict import fingerprint, load, predict
from evaluation.robustness import curves, damaged
from evaluation.scores import score_row


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
    monkeypatch.setattr("evaluation.predict.PART", 4)
    whole = predict(faces, folder, tmp_path / "whole", batch_size=4)
    assert predict(faces, folder, tmp_path / "whole", batch_size=4).stat().st_mtime_ns == whole.stat().st_mtime_ns

    room = import_module("evaluation.predict")
    ask, calls = room._ask, []

    def killed_in_the_third_part(*args):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(room, "_ask", killed_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        predict(faces, folder, tmp_path / "killed", batch_size=4)
    assert not (tmp_path / "killed" / "predictions.parquet").exists()
    again = predict(faces, folder, tmp_path / "killed", batch_size=4)
    assert again.read_bytes() == whole.read_bytes()
    assert len(calls) == 3 + 5 - 2, "five parts, of which two were there"
    assert [path.name for path in again.parent.iterdir()] == ["predictions.parquet"]


def evaluate(*arguments):
    """The command, as it is typed."""
    argv, sys.argv = sys.argv, ["evaluate_au.py", *map(str, arguments), "--resamples", "20"]
    try:
        evaluate_au.main()
    finally:
        sys.argv = argv


SHARE = """
import sys
from pathlib import Path

import evaluate_au
from evaluation import predict

signs, ask, predict.PART = Path(sys.argv.pop(1)), predict._ask, 4


def signed(*args):
    (signs / f"process {predict.processes().process_index}, picture {args[2][0]}").touch()
    return ask(*args)


predict._ask = signed
evaluate_au.main()
"""


def test_two_processes_share_the_pictures_and_give_what_one_gives(folder, tmp_path, monkeypatch):
    (tmp_path / "share.py").write_text(SHARE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one, two = (tmp_path / name for name in ("one", "two"))
    two.mkdir()
    asked = ["--model", folder, "--limit", 20, "--tasks", "detection", "--output"]
    monkeypatch.setattr("evaluation.predict.PART", 4)
    evaluate(*asked, one)
    command = [sys.executable, *launcher, tmp_path / "share.py", two, *asked, two, "--resamples", 20]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
    signs = sorted(path.name for path in two.glob("process*"))
    assert [name[:9] for name in signs] == ["process 0"] * 3 + ["process 1"] * 2
    assert (one / "predictions.parquet").read_bytes() == (two / "predictions.parquet").read_bytes()
    first, second = (json.loads((path / "results.json").read_text()) for path in (one, two))
    assert first["tasks"] == second["tasks"]


def test_other_weights_pictures_or_settings_start_anew(folder, faces, tmp_path, tokenizer, processor):
    own, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, own)

    def made(pictures=faces) -> bytes:
        return predict(pictures, str(own), output, tasks=["detection"]).read_bytes()

    def values(file: bytes) -> list:
        return pq.read_table(pa.BufferReader(file))["expected_values"].to_pylist()

    def set_up(**changed) -> None:
        path = own / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    first = made()
    set_up(calibration={"detection": {"temperature": 2.0}})
    assert made() == first  # a calibration is applied to what was predicted
    black = faces.images.map(lambda row: {"image": Image.new("RGB", row["image"].size)})
    second = made(replace(faces, images=black))
    set_up(
        image_processor=json.loads((own / "processor_config.json").read_text())["image_processor"]
        | {"image_mean": [0, 0, 0]}
    )
    third = made()
    tiny_model(tokenizer, seed=1).save_pretrained(own)
    fourth = made()
    mended = replace(faces, subjects=["someone"] * len(faces))
    assert set(pq.read_table(pa.BufferReader(made(mended)))["subject"].to_pylist()) == {"someone"}
    distinct = [values(file) for file in (first, second, third, fourth)]
    assert all(a != b for number, a in enumerate(distinct) for b in distinct[:number])


def test_another_base_or_other_settings_of_an_adapter_are_another_model(folder, tmp_path):
    base, adapter = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("base", "adapter"))
    (adapter / "config.json").unlink()
    known = []
    for alpha in (8, 16):
        settings = {"base_model_name_or_path": str(base), "lora_alpha": alpha}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        known.append(fingerprint(str(adapter)))
    assert fingerprint(str(adapter)) == known[1] != known[0]
    os.utime(base / "model.safetensors", (0, 0))
    assert fingerprint(str(adapter)) != known[1]


def test_stored_predictions_hold_what_the_model_said(folder, faces, tmp_path):
    stored = predict(faces, folder, tmp_path, batch_size=8)
    answers = read_answers(stored)
    assert list(answers) == list(TASKS)
    model, processor = load(folder)
    for task, answer in answers.items():
        units = faces.units[task]
        inputs = processor(images=faces.pictures([0, 1]), task=task, action_units=units)
        found = model.recognize(**inputs, grammar=processor.grammar(task, units))
        np.testing.assert_allclose(answer.values[:2], found.values, atol=1e-6)
        np.testing.assert_allclose(answer.distributions[:2], found.distributions, atol=1e-5)
        np.testing.assert_allclose(answer.labels, faces.labels[task], atol=1e-6)
    assert set(pq.read_table(stored)["split"].to_pylist()) == {"test"}


def test_mirror_images_are_asked_about_where_the_processor_says_so(folder, faces, tmp_path):
    own = tmp_path / "mirroring"
    shutil.copytree(folder, own)
    settings = own / "processor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"mirror": True}))
    found = {
        (name, mirror): read_answers(predict(faces, str(place), tmp_path / "out", tasks=["intensity"], mirror=mirror))
        for name, place in (("plain", folder), ("mirroring", own))
        for mirror in (None, True, False)
    }
    values = {how: answers["intensity"].distributions for how, answers in found.items()}
    for name in ("plain", "mirroring"):
        assert np.array_equal(values[name, None], values[name, name == "mirroring"])
        assert not np.allclose(values[name, True], values[name, False], atol=1e-3)
    model, processor = load(str(own))
    units = faces.units["intensity"]
    inputs = processor(images=faces.pictures([0, 1]), task="intensity", action_units=units)
    said = model.recognize(**inputs, grammar=processor.grammar("intensity", units), mirror=True)
    np.testing.assert_allclose(values["mirroring", None][:2], said.distributions, atol=1e-5)


def test_command_scores_and_scores_again(folder, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    pq.write_table(pq.read_table(next(SAMPLE.glob("test-*.parquet"))).slice(0, 20), tmp_path / "test-00000.parquet")
    more = ("--data_dir", tmp_path, "--update_card", "--formats", "4", "--robustness", "6")
    evaluate("--model", folder, "--output", first, *more)
    out = capsys.readouterr().out
    assert "always positive" in out and "always zero" in out
    evaluate("--predictions", first, "--output", again)
    results, rescored = (json.loads((path / "results.json").read_text()) for path in (first, again))
    assert results["tasks"] == rescored["tasks"] and results["protocol"] == rescored["protocol"]
    assert 0 <= results["formats"]["invalid"]["detection"] <= 1
    assert set(results["formats"]["invalid_constrained"].values()) == {0}
    drawn = curves(read_answers(first / "robustness"), resamples=20)  # as `evaluate` asks
    assert results["robustness"]["intensity"]["clean"] == pytest.approx(drawn["intensity"]["clean"])
    page = (first / "report.html").read_text()
    assert "src='http" not in page and "<script" not in page
    assert page.count(results["protocol"]) == 1 + 3 + 2, "in the head, with each task, robustness and formats"
    assert page.count("data:image/jpeg") == 3, "best and worst faces of each task"
    card = ModelCard.load(f"{folder}/README.md")
    assert card.data.eval_results[0].metric_type == "f1"
    for line in ("| skin: ", "| gender: ", "| age: ", "| occlusion (", "| rotation (", "| under the grammar |"):
        assert line in card.text, line
    capsys.readouterr()
    evaluate("--compare", first, first, "--output", tmp_path / "compared")
    out = capsys.readouterr().out
    assert "[0.000, 0.000]" in out and results["protocol"] in out
    evaluate("--predictions", first, "--output", first)  # what was asked of the model beside them stays
    kept = json.loads((first / "results.json").read_text())
    assert all(kept[name] == results[name] for name in ("formats", "robustness")) and "formats" not in rescored


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model . --update_card --limit 3", "--update_card goes without --limit"),
        (
            "--model . --update_card --split validation --calibration other --decision mean",
            "--update_card goes without --split, --calibration, --decision",
        ),
        ("--model . --update_card --tasks detection --no-mirror", "--update_card goes without --tasks, --mirror"),
        ("--predictions {} --fold 1 --calibrate", "--predictions goes without --fold, --calibrate"),
        ("--predictions {} --limit 3 --readout parallel", "--predictions goes without --limit, --readout"),
        ("--predictions {0} --validation_dir {0} --dtype float16", "goes without --validation_dir, --dtype"),
        ("--compare {0} {0} --calibrate --tasks detection", "--compare goes without --tasks, --calibrate"),
        ("--compare {0} {0} --split test --beside {0}", "--compare goes without --split, --beside"),
        ("--model me/au --update_card", "write into --model, and me/au is no folder; download it first"),
        ("--model me/au{{fold}} --dataset disfa --calibrate", "and me/au1 is no folder; download it first"),
        ("--model . --limit -5", "--limit: '-5' is no number of 1 or more"),
        ("--model . --formats -3", "--formats: '-3' is no number of 1 or more"),
        ("--model . --robustness -3", "--robustness: '-3' is no number of 1 or more"),
        ("--model . --batch_size 0", "--batch_size: '0' is no number of 1 or more"),
        ("--model . --calibrate --limit 3 --no-mirror", "--calibrate goes without --limit, --mirror"),
        ("--model . --beside one/head two/head", "--beside one/head two/head: rows are named by their folders"),
        ("--model . --beside runs/AU-LLaVA runs/majority runs/mine", "'AU-LLaVA', 'majority' is the name of another"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(*arguments.format(tmp_path).split(), "--output", tmp_path)
    assert told in capsys.readouterr().err


def test_a_linear_head_needs_pictures_to_learn_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linear_head", "--model", ".", "--dataset", "csv", "--output", "head"])
    with pytest.raises(SystemExit):
        linear_head.main()
    assert "the following arguments are required: --data_dir" in capsys.readouterr().err


def test_rendered_faces_are_not_taken_for_prepared_crops():
    with pytest.raises(ValueError, match="manifest.json: no manifest of prepared crops, but of other files"):
        read_set("disfa", SAMPLE)


def test_calibrating_reads_only_the_validation_split(folder, tmp_path):
    sample = pq.read_table(next(SAMPLE.glob("test-*.parquet")))
    (tmp_path / "held").mkdir()
    pq.write_table(sample.slice(0, 10), tmp_path / "held" / "validation-00000.parquet")
    pq.write_table(sample.slice(10, 10), tmp_path / "test-00000.parquet")
    arguments = ("--model", folder, "--data_dir", tmp_path, "--validation_dir", tmp_path / "held", "--calibrate")
    evaluate(*arguments, "--tasks", "detection", "intensity_level", "--output", tmp_path / "first")
    stored = calibration.load(folder)
    assert {0: stored} == calibration.fit_folds(tmp_path / "first" / "validation")
    about = {"dataset": "synthetic", "protocol": "standard", "options": "", "fold": 0}
    assert stored["detection"]["fitted_on"] == [about]

    answers, tasks = (
        read_answers(tmp_path / "first"),
        json.loads((tmp_path / "first" / "results.json").read_text())["tasks"],
    )
    for task, raw in answers.items():
        after = calibration.apply(raw, stored[task])
        assert tasks[task]["calibration"]["before"]["brier"] == calibration.reliability(raw)["brier"]
        assert tasks[task]["calibration"]["after"]["ece"] == calibration.reliability(after)["ece"]
    at_half, at_fitted = (tasks["detection"]["rows"][row] for row in ("AU-LLaVA", "AU-LLaVA, calibrated"))
    after = calibration.apply(answers["detection"], stored["detection"])
    expected = score_row(after, after.values, after.expected_values, resamples=20)
    assert at_fitted["mean"] == expected["mean"] != at_half["mean"]
    page = (tmp_path / "first" / "report.html").read_text()
    assert page.count("Reliability of the probability") == 2 * 2 and "F1 at the threshold" in page
    evaluate("--predictions", tmp_path / "first", "--output", tmp_path / "again")  # those of validation lie there too
    assert json.loads((tmp_path / "again" / "results.json").read_text())["tasks"] == tasks

    for shard in tmp_path.glob("test-*.parquet"):  # other labels of the test pictures change nothing that was fitted
        table = pq.read_table(shard)
        place = table.column_names.index("occurrences")
        flipped = pa.array([[1 - value for value in row] for row in table["occurrences"].to_pylist()])
        pq.write_table(table.set_column(place, "occurrences", flipped.cast(table.schema.field(place).type)), shard)
    evaluate(*arguments, "--tasks", "detection", "--output", tmp_path / "second")
    flipped = read_answers(tmp_path / "second")["detection"]
    assert np.array_equal(flipped.labels, 1 - answers["detection"].labels)
    assert np.array_equal(flipped.values, answers["detection"].values) and calibration.load(folder) == stored
    for fewer in (False, True):  # other labels, and then fewer pictures
        if fewer:
            pq.write_table(sample.slice(10, 5), tmp_path / "test-00000.parquet")
        with pytest.raises(ValueError, match="first is about other pictures or labels, of synthetic; give the data"):
            evaluate("--predictions", tmp_path / "first", "--data_dir", tmp_path, "--output", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    forget(folder)


def test_facs_intensities_of_rendered_faces_are_a_set_of_their_own(folder, tmp_path):
    sample = pq.read_table(next(SAMPLE.glob("test-*.parquet")))
    pq.write_table(sample.slice(0, 10), tmp_path / "validation-00000.parquet")
    pq.write_table(sample.slice(10, 10), tmp_path / "test-00000.parquet")
    facs = read_set("synthetic_facs", tmp_path)
    assert list(facs.labels) == ["intensity"] and facs.units["intensity"] == list(PRESETS["disfa"])
    for row, labels in zip(sample.slice(10, 10).to_pylist(), facs.labels["intensity"], strict=True):
        known = labels_of(row, "intensity")
        assert labels == pytest.approx([known[unit] for unit in PRESETS["disfa"]], abs=1e-4)
    seen, warmth = {}, {}
    for dataset in ("synthetic_facs", "synthetic"):
        apart = read_set(dataset, tmp_path, "validation")
        fitted = calibration.fit_folds(predict(apart, folder, tmp_path / dataset, tasks=["intensity"]))[0]
        calibration.store(fitted, folder)
        seen |= fitted["intensity"]["lines"]
        warmth |= dict.fromkeys(apart.units["intensity"], fitted["intensity"]["temperature"])
    stored = calibration.load(folder)["intensity"]
    assert stored["lines"] == seen and {"AU12", "FEAFA1"} <= set(seen)
    assert stored["temperatures"] == warmth
    forget(folder)


def forget(folder):
    """Leave a model without a calibration."""
    processor = AuLlavaProcessor.from_pretrained(folder)
    processor.calibration = {}
    processor.save_pretrained(folder)


def test_calibration_is_stored_with_the_processor(folder):
    path = Path(folder, "processor_config.json")
    before = json.loads(path.read_text())
    fitted = {"detection": {"temperature": 1.5, "thresholds": {"AU1": 0.3}}}
    assert calibration.store(fitted, folder) == path
    assert calibration.load(folder) == fitted
    assert json.loads(path.read_text()) | {"calibration": {}} == before
    forget(folder)
    lists = (("FEAFA1", "feafa"), ("AU12", "csv"), ("AU12", "synthetic_facs"))  # the last word on a unit counts
    for number, (unit, dataset) in enumerate(lists, 1):
        newest = {"temperature": float(number), "temperatures": {unit: number}, "fitted_on": [{"dataset": dataset}]}
        calibration.store({"intensity": newest | {"lines": {unit: [0, number]}}}, folder)
        calibration.store({"detection": newest | {"thresholds": {unit: number / 9}}}, folder)
    both = {"temperature": 3.0, "temperatures": {"FEAFA1": 1, "AU12": 3}}
    both["fitted_on"] = [{"dataset": dataset} for _, dataset in lists]
    assert calibration.load(folder) == {
        "intensity": both | {"lines": {"FEAFA1": [0, 1], "AU12": [0, 3]}},
        "detection": both | {"thresholds": {"FEAFA1": 1 / 9, "AU12": 3 / 9}},
    }
    without = {"temperature": 4.0, "temperatures": {"AU12": 4}, "lines": {}, "fitted_on": [{"dataset": "csv"}]}
    calibration.store({"intensity": without}, folder)  # nobody showed AU12: a line of others is none of its
    assert calibration.load(folder)["intensity"]["lines"] == {"FEAFA1": [0, 1]}
    forget(folder)
    assert json.loads(path.read_text()) == before
    assert calibration.load(None) == {}
    earlier = {"detection": {"temperature": 1, "thresholds": {"AU1": 0.2}, "fitted_on": {"dataset": "bp4d"}}}
    path.write_text(json.dumps(before | {"calibration": earlier}))
    with pytest.raises(ValueError, match="detection was calibrated by an earlier version; --calibrate it again"):
        calibration.load(folder)
    newest = {"temperature": 2, "temperatures": {"AU2": 2}, "thresholds": {"AU2": 0.3}, "fitted_on": [{}]}
    calibration.store({"detection": newest}, folder)
    assert calibration.load(folder) == {"detection": newest}
    forget(folder)


@pytest.fixture(scope="module")
def disfa_crops(tmp_path_factory):
    """Prepared crops in the shape of DISFA: two people of each fold."""
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


def test_folds_are_counted_as_in_training(disfa_crops):
    first, last = read_set("disfa", disfa_crops, fold=1), read_set("disfa", disfa_crops, fold=3)
    turned = read_set("disfa", f"{disfa_crops}?naming=megraphau", fold=1)
    assert turned.subjects == last.subjects != first.subjects
    with pytest.raises(ValueError, match="goes without config_name, split, task"):
        read_set("disfa", f"{disfa_crops}?config_name=fold2&split=test&task=detection", fold=1)
    with pytest.raises(ValueError, match="unknown option nameing; accepted: .*naming"):
        read_set("disfa", f"{disfa_crops}?nameing=megraphau", fold=1)
    with pytest.raises(ValueError, match="camera, detector was settled when these crops were made; leave it out"):
        read_set("disfa", f"{disfa_crops}?camera=right&detector=scrfd", fold=1)
    with pytest.raises(ValueError, match="There is no split 'val'; accepted: train, validation, test"):
        read_set("disfa", disfa_crops, "val", fold=1)


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_validation_people_are_no_test_people(disfa_crops, protocol):
    for fold in (1, 2, 3):
        held, train, test = (
            read_set("disfa", disfa_crops, split, protocol, fold) for split in ("validation", "train", "test")
        )
        assert held.split == "validation" and len(held) == 3
        assert set(held.subjects) < set(train.subjects) and not set(test.subjects) & set(train.subjects)


@pytest.fixture(scope="module")
def own_csv(tmp_path_factory):
    """Twenty pictures of ten people with labels for two units, as the option `--data_dir` names them."""
    root = tmp_path_factory.mktemp("own")
    lines = ["image,subject,split,AU12,AU4"]
    for row, picture in enumerate(read_set("synthetic", limit=20).pictures(list(range(20)))):
        picture.save(root / f"{row}.png")
        lines.append(
            f"{row}.png,P{row // 2},{'test' if row < 8 else 'train'},{row % 2},{'' if row == 1 else row % 3 // 2}"
        )
    (root / "mine.csv").write_text("\n".join(lines) + "\n")
    return f"{root}/mine.csv?task=detection&detector=none&crops_dir={root}/crops"


def test_a_csv_of_one_s_own_is_scored_as_the_pipeline_answers(folder, own_csv, tmp_path, monkeypatch):
    train, held, test = (read_set("csv", own_csv, split) for split in ("train", "validation", "test"))
    name = f"csv:{Path(own_csv.partition('?')[0]).parent.name}/mine"
    assert (len(train), len(test), test.name) == (12, 8, name) and test.units == {"detection": ["AU12", "AU4"]}
    assert set(held.subjects) < set(train.subjects) and not set(test.subjects) & set(train.subjects)
    shutil.copytree(folder, tmp_path / "model")
    processor = AuLlavaProcessor.from_pretrained(folder)
    processor.trained_lists = {"detection": [list(PRESETS["bp4d"])]}  # of which two are asked about
    processor.save_pretrained(tmp_path / "model")
    asked = ("--model", tmp_path / "model", "--dataset", "csv", "--data_dir", own_csv)
    evaluate(*asked, "--calibrate", "--update_card", "--output", tmp_path / "out")

    answers = read_answers(tmp_path / "out")["detection"]
    pipe = load_pipeline(str(tmp_path / "model"))
    faces = pipe(test.pictures(list(range(8))), action_units="AU12,AU4", detector="none", calibrated=False)
    told = [[unit["expected_value"] for unit in face["action_units"].values()] for (face,) in faces]
    assert answers.expected_values == pytest.approx(np.array(told), abs=1e-5)
    assert answers.labels[:, 0].tolist() == [0, 1] * 4 and np.isnan(answers.labels[1, 1])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["dataset"] == name and results["protocol"].startswith("one's own pictures")
    fitted = calibration.load(tmp_path / "model")["detection"]
    assert fitted["fitted_on"][0]["dataset"] == name and set(fitted["thresholds"]) == {"AU12", "AU4"}
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"## Results on {name}" in card and f"name: Own pictures ({name})" in card
    evaluate(
        "--predictions", tmp_path / "out", "--dataset", "csv", "--data_dir", own_csv, "--output", tmp_path / "again"
    )
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["tasks"]["detection"]["rows"] == results["tasks"]["detection"]["rows"]
    found = check_formats(*load(str(tmp_path / "model")), test, 2)
    assert found["invalid_constrained"] == {"detection": 0}

    noted = tmp_path / "model" / "held_out.json"
    noted.write_text(json.dumps({"own": ["P5", "P9", "someone else"]}))
    evaluate(*asked, "--calibrate", "--output", tmp_path / "told")
    assert set(read_answers(tmp_path / "told" / "validation")["detection"].subjects) == {"P5", "P9"}
    noted.write_text(json.dumps({"own": ["someone else"]}))
    with pytest.raises(ValueError, match=r"was trained on everyone in .*mine\.csv.*--held_out 0.2"):
        evaluate(*asked, "--calibrate", "--output", tmp_path / "wrong")
    (tmp_path / "model" / "trained_on.json").write_text(json.dumps({"own": ["P2", "someone else"]}))
    with pytest.warns(UserWarning, match="model was trained on P2, who are in the split test, unless others"):
        evaluate(*asked, "--output", tmp_path / "seen")
    with pytest.raises(ValueError, match="--tasks: csv:.*/mine has no intensity; accepted: detection"):
        evaluate(*asked, "--tasks", "intensity", "--output", tmp_path / "wrong")
    with pytest.raises(ValueError, match="no fold 2"):
        read_set("csv", own_csv, fold=2)
    with pytest.raises(ValueError, match="--data_dir goes without split; --split, --fold"):
        read_set("csv", f"{own_csv}&split=train")


def test_csv_files_of_one_name_and_tasks_of_one_csv_are_sets_of_their_own(own_csv, tmp_path):
    site = shutil.copytree(Path(own_csv.partition("?")[0]).parent, tmp_path / "site")
    levels = own_csv.replace("task=detection", "task=intensity_level").replace("/crops", "/crops_of_levels")
    places = (own_csv, levels, f"{site}/mine.csv?detector=none&crops_dir={tmp_path}/crops")
    assert len({tuple(read_set("csv", place).origin().values()) for place in places}) == 3


def test_every_fold_is_calibrated_by_itself(folder, disfa_crops, tmp_path):
    for fold in (1, 2, 3):
        shutil.copytree(folder, tmp_path / f"model{fold}")
    data = ("--dataset", "disfa", "--data_dir", disfa_crops)
    one = ("--tasks", "detection", "--output")
    evaluate("--model", tmp_path / "model{fold}", *data, "--fold", "all", "--calibrate", *one, tmp_path / "out")
    for fold in (1, 2, 3):
        stored = calibration.load(tmp_path / f"model{fold}")
        about = {"dataset": "disfa", "protocol": "standard", "options": "", "fold": fold}
        assert stored["detection"]["fitted_on"] == [about]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]["detection"]["calibration"]["fitted"]) == ["1", "2", "3"]
    assert "one model for all folds" not in results["protocol"]
    with pytest.raises(ValueError, match="would have seen test people"):
        evaluate("--model", tmp_path / "model1", *data, "--fold", 2, *one, tmp_path / "wrong")
    with pytest.raises(SystemExit):
        evaluate("--model", folder, *data, "--calibrate", "--output", tmp_path / "wrong")

    whom = set(read_set("disfa", disfa_crops, "validation", fold=1).subjects)
    others = set(read_set("disfa", disfa_crops, "train", fold=1).subjects) - whom  # drawn among other people
    for known, asked in (({"disfa": [*others, "X"]}, others), ({"bp4d": []}, whom), ({"disfa": ["X"]}, None)):
        (tmp_path / "model1" / "held_out.json").write_text(json.dumps(known))
        fitted = ("--model", tmp_path / "model1", *data, "--fold", 1, "--calibrate", *one, tmp_path / "held")
        with pytest.raises(ValueError, match="on everyone in .*--held_out 0.2") if asked is None else nullcontext():
            evaluate(*fitted)
            assert set(read_answers(tmp_path / "held" / "validation")["detection"].subjects) == asked


def test_nobody_is_tested_whom_a_model_was_trained_on(folder, disfa_crops, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "model")
    learnt = sorted(set(read_set("disfa", disfa_crops, "train", fold=1).subjects))
    (tmp_path / "model" / "trained_on.json").write_text(json.dumps({"disfa": learnt, "bp4d": ["F001"]}))
    data = ("--model", tmp_path / "model", "--dataset", "disfa", "--data_dir", disfa_crops, "--tasks", "detection")
    evaluate(*data, "--fold", 1, "--output", tmp_path / "out")
    for fold in ("2", "all"):
        with pytest.raises(ValueError, match=r"trained on SN.* of fold 2; name the fold .*--split train"):
            evaluate(*data, "--fold", fold, "--output", tmp_path / "wrong")
    evaluate(*data, "--fold", 2, "--split", "train", "--output", tmp_path / "learnt")
    # Part B of FEAFA shows the same people.
    (tmp_path / "model" / "trained_on.json").write_text(json.dumps({"feafa": learnt}))
    with pytest.raises(ValueError, match=r"trained on SN.* of fold 2; name the fold"):
        evaluate(*data, "--fold", 2, "--output", tmp_path / "wrong")
    with pytest.raises(ValueError, match="was trained on SN.*, whom --calibrate would fit to"):
        evaluate(*data, "--fold", 1, "--calibrate", "--output", tmp_path / "wrong")
    monkeypatch.setattr(sys, "argv", ["linear_head", *map(str, data[:-2]), "--output", str(tmp_path / "head")])
    with pytest.raises(ValueError, match=r"trained on SN.* of fold 2; name the fold"):
        linear_head.main()
    people = sorted(set(read_set("synthetic", limit=3).subjects))
    (tmp_path / "model" / "trained_on.json").write_text(json.dumps({"synthetic_faces": people}))
    with pytest.warns(UserWarning, match=f"trained on {', '.join(people)}, who are in the split test, unless others"):
        check_never_seen(str(tmp_path / "model"), read_set("synthetic", limit=3))


def test_nobody_is_calibrated_on_and_tested(folder, own_csv, tmp_path):
    sample = next(SAMPLE.glob("test-*.parquet"))
    shutil.copy(sample, tmp_path / "validation-00000.parquet")
    asked = ("--model", folder, "--validation_dir", tmp_path, "--calibrate", "--tasks", "detection")
    with pytest.raises(ValueError, match="and others would be fitted on and tested; give other people with --valid"):
        evaluate(*asked, "--output", tmp_path / "out")
    tested = read_set("csv", own_csv)
    with pytest.warns(UserWarning, match="P0, P1, P2, P3 would be fitted on and tested, unless others"):
        check_apart(replace(tested, split="validation"), tested)


def trained_on(folder: str, copy: Path, lists: dict) -> None:
    """A copy of a model that says it was trained to be asked about some lists, and is not calibrated."""
    shutil.copytree(folder, copy)
    processor = AuLlavaProcessor.from_pretrained(folder)
    processor.trained_lists, processor.calibration = lists, {}
    processor.save_pretrained(copy)


def test_tasks_that_a_model_was_not_trained_for_are_left_out(folder, disfa_crops, tmp_path, capsys):
    trained_on(folder, tmp_path / "model", {"detection": [list(PRESETS["disfa8"])]})
    data = ("--model", tmp_path / "model", "--dataset", "disfa", "--data_dir", disfa_crops, "--fold", 1)
    evaluate(*data, "--output", tmp_path / "out")
    told = capsys.readouterr().out
    assert "was trained to answer detection alone; left out: intensity_level. To see what it guesses, name" in told
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]) == ["detection"]
    evaluate(*data, "--tasks", "intensity_level", "--output", tmp_path / "guessed")
    assert list(read_answers(tmp_path / "guessed")) == ["intensity_level"]
    with pytest.raises(ValueError, match="answer detection alone; name tasks of synthetic_facs with --tasks"):
        evaluate("--model", tmp_path / "model", "--dataset", "synthetic_facs", "--output", tmp_path / "none")


def test_a_calibration_of_other_predictions_is_not_taken(folder, tmp_path):
    pq.write_table(pq.read_table(next(SAMPLE.glob("test-*.parquet"))).slice(0, 12), tmp_path / "test-00000.parquet")
    asked = ("--model", folder, "--data_dir", tmp_path, "--tasks", "detection")
    evaluate(*asked, "--output", tmp_path / "one")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    absurd = dict.fromkeys(PRESETS["bp4d"], 0.99)
    results["tasks"]["detection"]["calibration"]["fitted"] = {"0": {"temperature": 1.0, "thresholds": absurd}}
    (tmp_path / "one" / "results.json").write_text(json.dumps(results))
    assert evaluate_au.stored_calibration(tmp_path / "one")[0]["detection"]["thresholds"] == absurd
    rows = pq.read_table(tmp_path / "one" / "predictions.parquet")
    pq.write_table(rows.slice(0, 5), tmp_path / "one" / "predictions.parquet")
    assert evaluate_au.stored_calibration(tmp_path / "one") == {}


def test_a_model_that_was_trained_on_levels_alone_is_scored_on_presence_too(folder, disfa_crops, tmp_path, capsys):
    trained_on(folder, tmp_path / "model", {"intensity_level": [list(PRESETS["disfa"])]})
    data = ("--model", tmp_path / "model", "--dataset", "disfa", "--data_dir", disfa_crops, "--fold", 1)
    evaluate(*data, "--output", tmp_path / "out")
    tasks = read_answers(tmp_path / "out")
    assert set(tasks) == {"detection", "intensity_level"}
    places = [PRESETS["disfa"].index(code) for code in PRESETS["disfa8"]]
    present = tasks["intensity_level"].distributions[:, places, 2:].sum(-1)
    np.testing.assert_allclose(tasks["detection"].expected_values, present, atol=1e-5)
    np.testing.assert_array_equal(tasks["detection"].values, tasks["detection"].expected_values > 0.5)
    words = json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]
    assert f"whether {', '.join(PRESETS['disfa8'])} are present is told by their levels, 2 or more" in words
    evaluate(*data, "--protocol", "paper", "--output", tmp_path / "paper")  # whose presence is another
    assert "alone; left out: detection." in capsys.readouterr().out
    with pytest.raises(ValueError, match="answer intensity_level alone; name tasks of synthetic_facs with --tasks"):
        evaluate("--model", tmp_path / "model", "--dataset", "synthetic_facs", "--output", tmp_path / "none")


def test_reports_tell_whose_pictures_were_asked_for(folder, disfa_crops, tmp_path):
    data = ("--model", folder, "--dataset", "disfa", "--data_dir", f"{disfa_crops}?naming=megraphau", "--fold", 1)
    evaluate(*data, "--output", tmp_path / "out")
    evaluate("--predictions", tmp_path / "out", "--output", tmp_path / "again")
    for place in ("out", "again"):
        words = json.loads((tmp_path / place / "results.json").read_text())["protocol"]
        assert "(ME-GraphAU's order)" in words and "(asked for with naming=megraphau); only fold 1" in words
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert read_set("disfa", f"{disfa_crops}?naming=jaanet&drop_bad_landmarks=false", fold=1).options == ""
    for options in ("naming=megraphau", ""):
        update_card(results | {"settings": results["settings"] | {"options": options}}, tmp_path / "README.md")
    part = {"detection": results["tasks"]["detection"]}
    update_card(results | {"tasks": part}, tmp_path / "README.md")  # the levels of the earlier call go
    names = [(e.dataset_type, e.dataset_config) for e in ModelCard.load(tmp_path / "README.md").data.eval_results]
    assert ("disfa", "detection, standard naming=megraphau protocol") in names
    assert ("disfa", "intensity_level, standard naming=megraphau protocol") not in names
    assert ("disfa", "intensity_level, standard protocol") in names
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "torn.md").write_text(card.replace("disfa standard naming=megraphau: end", "another: end"))
    with pytest.raises(ValueError, match="torn.md: of the comments .* one is missing; put it back"):
        update_card(results, tmp_path / "torn.md")
    assert card.count("disfa standard naming=megraphau: begin") == card.count("disfa standard: begin") == 1
    assert "detection, standard naming=megraphau protocol" in card and "detection, standard protocol" in card


def test_linear_head_stands_in_the_same_table(folder, disfa_crops, tmp_path, monkeypatch, capsys):
    head, ours = tmp_path / "head", tmp_path / "ours"
    data = ["--model", folder, "--dataset", "disfa", "--data_dir", str(disfa_crops), "--fold", "1"]
    (head / "validation").mkdir(parents=True)
    (head / "validation" / "old.parquet").touch()  # of an older head
    (head / "notes.txt").touch()  # of someone else
    monkeypatch.setattr(sys, "argv", ["linear_head", *data, "--calibrate", "--output", str(head)])
    linear_head.main()
    assert (head / "notes.txt").exists() and not (head / "validation" / "old.parquet").exists()
    assert set(read_answers(head)) == {"detection", "intensity_level"}
    evaluate(*data, "--tasks", "detection", "--output", ours, "--beside", head)
    results = json.loads((ours / "results.json").read_text())
    result = results["tasks"]["detection"]
    assert {"head", "head, calibrated"} < set(result["rows"])
    assert re.match(r"python -m baselines.linear_head .*\npython evaluate_au.py .* --beside", results["command"])
    assert [pair["metric"] for pair in result["comparisons"]] == ["f1", "roc_auc"]
    assert "Mean F1: " in capsys.readouterr().out and "only fold 1" in results["protocol"]
    for option, value in (("--split", "validation"), ("--protocol", "paper"), ("--dataset", "feafa")):
        with pytest.raises(SystemExit):
            evaluate("--predictions", ours, option, value, "--output", tmp_path / "wrong")
        assert f"leave {option} out" in capsys.readouterr().err
    evaluate(*data, "--tasks", "intensity_level", "--output", tmp_path / "levels")
    evaluate("--predictions", ours, "--output", tmp_path / "again", "--beside", tmp_path / "levels")
    told = "--beside levels: no row, for it has answers of intensity_level and these are of detection."
    assert told in capsys.readouterr().out
    evaluate("--predictions", ours, "--output", tmp_path / "again")  # knows the data set that it is about
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["settings"]["dataset"] == "disfa" and again["tasks"]["detection"]["published"] == result["published"]
    assert again["protocol"] == results["protocol"]


def test_linear_head_learns_and_says_the_base_rate_where_it_cannot():
    random = np.random.default_rng(0)
    features, people = random.normal(size=(60, 4)), [f"P{row % 6}" for row in range(60)]
    labels = np.stack([features[:, 0] > 0, np.zeros(60), np.where(np.arange(60) % 6 == 0, 1, np.nan)], 1).astype(float)
    heads = linear_head.fit("detection", features, labels, people)
    found = linear_head.answer("detection", linear_head.predict("detection", heads, features))
    assert found.shape == (60, 3, 2) and np.allclose(found.sum(-1), 1)
    assert (found[:, 0].argmax(-1) == labels[:, 0]).mean() > 0.95
    assert (found[:, 1, 1] == 0).all() and (found[:, 2, 1] == 1).all()
    heads = linear_head.fit("intensity", features, np.clip(features[:, 1:2] / 4 + 0.5, 0, 1), people)
    predicted = linear_head.predict("intensity", heads, features)
    mean = linear_head.answer("intensity", predicted)[:, 0] @ np.array(TASKS["intensity"].values)
    assert np.abs(mean - np.clip(features[:, 1] / 4 + 0.5, 0, 1)).max() < 0.05


def test_linear_head_sees_both_sides(folder):
    faces, (model, processor) = read_set("synthetic", limit=12), load(folder)
    plain, flipped = (linear_head.encode(faces, model, processor, flip=flip) for flip in (False, True))
    heads = {"intensity": linear_head.fit("intensity", plain, faces.labels["intensity"], faces.subjects)}
    said = [
        np.array(linear_head.tables(faces, heads, *sides)[0]["expected_values"].to_pylist())
        for sides in ((plain, flipped), (flipped, plain), (plain,))
    ]
    places = processor.grammar("intensity", "feafa").mirrored
    np.testing.assert_allclose(said[0], said[1][:, places], atol=1e-5)
    assert not np.allclose(said[0], said[2], atol=1e-3)
    model.config.looks = [[1, 0], [1.3, 0]]
    assert not np.allclose(linear_head.encode(faces, model, processor), plain, atol=1e-3)


def test_a_tuned_encoder_reads_more_and_leaves_the_language_model_alone(tokenizer, tmp_path, monkeypatch):
    model = tiny_model(copy.deepcopy(tokenizer))
    processor = AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56)
    faces = read_set("synthetic", limit=24)
    bright = np.array([[float(row % 2)] for row in range(24)])
    labels = {"detection": np.repeat(bright, 12, 1), "intensity_level": np.full((24, 12), np.nan)}
    easy = replace(faces, labels=labels, change=lambda picture, row: picture.point(lambda v: v // 4 + 180 * (row % 2)))
    before = copy.deepcopy(model.state_dict())
    with FlopCounterMode(display=False) as counter:
        shown = tune(model, processor, easy, 1, tmp_path / "one.pt", batch_size=8)
    assert shown == 8  # at least one step
    compute = 12.5 * counter.get_total_flops()

    def go_on(name: str) -> int:
        model.load_state_dict(before)
        return tune(model, processor, easy, compute, tmp_path / name, batch_size=8, learning_rate=3e-3)

    assert go_on("whole.pt") == 12 * 8
    whole = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(tuning, "KEEP", 4)
    with killed(monkeypatch, tuning, step=8), pytest.raises(KeyboardInterrupt):
        go_on("stopped.pt")
    assert go_on("stopped.pt") == 12 * 8
    assert all(torch.equal(whole[name], weight) for name, weight in model.state_dict().items())
    moved = {
        name.split(".")[1] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert moved == {"vision_tower"}
    features = linear_head.encode(easy, model, processor)
    assert np.linalg.norm(features[::2].mean(0) - features[1::2].mean(0)) > features[::2].std(0).mean()


def test_labels_are_mirrored_with_the_face():
    faces = read_set("synthetic", limit=2)
    seen = [augmented(faces, [0], np.random.default_rng(seed))[1][0] for seed in range(8)]
    plain = torch.tensor(np.concatenate([values[0] for values in faces.labels.values()])).float()
    kinds = {tuple(labels.tolist()) for labels in seen}
    assert len(kinds) == 2 and tuple(plain.tolist()) in kinds
    other = next(labels for labels in seen if not torch.equal(labels, plain))
    assert torch.equal(other[:24], plain[:24])  # detection and levels have no sides
    assert other[24:26].tolist() == plain[24:26].tolist()[::-1]  # FEAFA's left and right eye


def test_protocols_of_feafa(folder, tmp_path, capsys):
    prepare(find_recordings(feafa_tree(tmp_path / "feafa")), tmp_path / "crops", Settings(detector="none"))
    prepare(find_recordings(tmp_path / "feafa", "B"), tmp_path / "crops_b", Settings(detector="none"))
    part_b = read_set("feafa", f"{tmp_path}/crops_b?part=B", protocol="paper", split="train")
    assert {subject[:2] for subject in part_b.subjects} == {"SN"}
    standard = read_set("feafa", tmp_path / "crops")
    assert len(standard) == 12 and sorted(set(standard.folds)) == [1, 2, 3]
    data = ("--dataset", "feafa", "--data_dir", tmp_path / "crops", "--protocol", "paper")
    evaluate("--model", folder, *data, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["intensity"]
    drawn = sum(in_random_test("PV001", frame) for frame in range(10))
    assert found["samples"] == drawn + in_random_test("PV008", 3) + in_random_test("PV003", 0) > 0
    assert found["folds"] == [0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("it leaks") >= 2 and "a misprint, ten times too large" in page
    out = capsys.readouterr().out
    assert "RA-UWML, published, 12 units" in out and "DRML, published as 0.549: the printed average" in out


def test_missing_shards_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="synthetic_faces --output_dir"):
        read_set("synthetic", tmp_path, split="validation")
    with pytest.raises(FileNotFoundError, match="No predictions"):
        read_answers(tmp_path)
    pq.write_table(pa.table({"AU12": [1]}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="own.parquet: no predictions that evaluate_au.py wrote"):
        read_origin(tmp_path / "own.parquet")


def test_free_text_and_contradictions(folder, faces):
    model, processor = load(folder)
    found = check_formats(model, processor, faces, pictures=3)
    assert found["pictures"] == 3 and set(found["invalid"]) == set(TASKS) and len(found["contradictions"]) == 3
    assert found["contradictions_calibrated"] == found["contradictions"]
    # Where every unit counts as present, its level contradicts that as often as it is 0.
    always = dict.fromkeys(PRESETS["bp4d"], 0.0)
    processor.calibration = {"detection": {"temperature": 1.0, "thresholds": always}}
    processor.trained_lists = {"intensity": [list(PRESETS["disfa"])]}
    few = check_formats(model, processor, faces, 3, tasks=["intensity"])  # all that it was trained to answer
    assert set(few["invalid"]) == {"intensity"} and few["contradictions"] == {}
    processor.trained_lists |= {"detection": [list(PRESETS["bp4d"])], "intensity_level": [list(PRESETS["disfa"])]}
    again = check_formats(model, processor, faces, pictures=3)
    pair = "detection / intensity_level"
    inputs = processor(images=faces.pictures(spread(len(faces), 3)), task="intensity_level")
    levels = model.recognize(**inputs, grammar=processor.grammar("intensity_level")).values
    columns = [PRESETS["disfa"].index(code) for code in SHARED]
    assert again["contradictions_calibrated"][pair] == pytest.approx(float((levels[:, columns] == 0).float().mean()))


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
    always = {"temperature": 1.0, "thresholds": dict.fromkeys(PRESETS["bp4d"], 0.0)}
    positive = curves(answers, {"detection": {"0": always}}, resamples=10)["detection"]
    assert {score["value"] for kind in positive["damages"].values() for score in kind["scores"]} == {
        positive["clean"]["value"]
    }
