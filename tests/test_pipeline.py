import copy
import json
import logging
from io import BytesIO

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from PIL import Image
from transformers.pipelines.pt_utils import KeyDataset

from au_llava.action_units import PRESETS, ActionUnit
from au_llava.pipeline_au_llava import FacialActionUnitPipeline


@pytest.fixture
def pipe(model, processor):
    return FacialActionUnitPipeline(model=model, processor=processor, task="facial-action-units")


@pytest.mark.parametrize(
    ("task", "count", "values"),
    [
        ("detection", 12, {0, 1}),
        ("intensity_level", 12, set(range(6))),
        ("intensity", 24, {step / 100 for step in range(101)}),
    ],
)
def test_each_task_gives_its_units_and_range(pipe, crops, task, count, values):
    (face,) = pipe(crops[0], task=task, detector="none")
    assert face["box"] is None and face["score"] is None and face["task"] == task
    assert len(face["action_units"]) == count
    for unit in face["action_units"].values():
        assert unit["value"] in values
        assert 0 <= unit["probability"] <= 1
        assert min(values) - 1e-6 <= unit["expected_value"] <= max(values) + 1e-6
    assert json.loads(json.dumps(face)) == face


def test_lists_keep_their_order_and_batches_change_nothing(pipe, crops):
    single = [pipe(crop, detector="none") for crop in crops]
    for batch_size in (1, 2, 8):
        together = pipe(crops, detector="none", batch_size=batch_size)
        for one, other in zip(single, together, strict=True):
            assert [u["value"] for u in one[0]["action_units"].values()] == [
                u["value"] for u in other[0]["action_units"].values()
            ]


def test_generators_are_streamed(pipe, crops):
    results = pipe((crop for crop in crops), detector="none", batch_size=2)
    assert len(next(results)) == 1
    assert len(list(results)) == 4


def test_whatever_holds_many_pictures_is_a_list(pipe, crops, tmp_path):
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for crop, name in zip(crops, names, strict=False):
        crop.save(name)
    table = Dataset.from_dict({"image": names})
    arrays = [np.asarray(crop) for crop in crops[:2]]
    expected = pipe(crops[:2], detector="none")
    many = [
        tuple(names),
        np.array(names),
        pd.Series(names),
        table["image"],
        KeyDataset(table, "image"),
        np.stack(arrays),
    ]
    for images in many:
        assert pipe(images, detector="none") == expected, type(images)
    assert list(pipe(dict.fromkeys(names).keys(), detector="none")) == expected
    file = (tmp_path / "0.png").read_bytes()
    for one in (arrays[0], arrays[0][..., 0], file, bytearray(file), memoryview(file), BytesIO(file)):
        assert pipe(one, detector="none")[0]["task"] == "detection"
    with open(names[0], "rb") as opened:
        assert pipe([opened, BytesIO((tmp_path / "1.png").read_bytes())], detector="none") == expected
    with pytest.raises(ValueError, match="The given dict"):
        pipe({"image": names[0]}, detector="none")


def test_paths_and_arrays_are_read(pipe, crops, tmp_path):
    crops[0].save(tmp_path / "face.png")
    one = pipe(str(tmp_path / "face.png"), detector="none")
    assert one == pipe(tmp_path / "face.png", detector="none")
    assert one == pipe(np.asarray(crops[0]), detector="none")


def test_one_bad_file_does_not_lose_the_others(pipe, crops, tmp_path):
    (tmp_path / "empty.jpg").touch()
    results = pipe([crops[0], str(tmp_path / "empty.jpg"), str(tmp_path / "none.jpg"), crops[1]], detector="none")
    assert results[0] == pipe(crops[0], detector="none") and results[3] == pipe(crops[1], detector="none")
    assert "empty.jpg" in results[1]["error"] and "none.jpg" in results[2]["error"]
    with pytest.raises(ValueError, match=r"empty\.jpg"):
        pipe(str(tmp_path / "empty.jpg"), detector="none")


def test_one_bad_picture_of_a_data_set_does_not_lose_the_others(pipe, crops, tmp_path):
    names = [str(tmp_path / f"{number}.jpg") for number in range(3)]
    for crop, name in zip(crops, names, strict=False):
        crop.save(name)
    table = Dataset.from_dict({"image": names}).cast_column("image", datasets.Image())
    expected = pipe(names, detector="none")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:-500])
    for images in (table["image"], KeyDataset(table, "image")):
        first, bad, last = pipe(images, detector="none")
        assert [first, last] == expected[::2] and "truncated" in bad["error"]
    whole = table.select([0, 2])
    assert pipe(whole.to_iterable_dataset()["image"], detector="none") == expected[::2]


def test_own_units_are_asked_about(pipe, crops):
    wink = ActionUnit("WINK", "Wink", "one eye closes while the other stays open", "eyelids")
    (face,) = pipe(crops[0], action_units=["AU12", wink], detector="none")
    assert face["action_units"]["WINK"]["name"] == "Wink"


def test_a_part_of_a_trained_list_is_answered_from_the_whole_list(model, processor, crops):
    own, some = copy.deepcopy(processor), "AU12,AU6"
    own.trained_lists = {"detection": [["AU9"], list(PRESETS["bp4d"])]}
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    whole, part = (pipe(crops[0], action_units=units)[0]["action_units"] for units in ("bp4d", some))
    assert list(part) == ["AU12", "AU6"] and all(part[code] == whole[code] for code in part)
    asked = [own.questions("detection", code) for code in ("AU12", "AU9")]
    assert [[(task, len(units)) for task, units in one] for one in asked] == [[("detection", 12)], [("detection", 1)]]


def test_units_of_several_lists_are_answered_from_each(model, processor, crops):
    own = copy.deepcopy(processor)
    own.trained_lists = {"detection": [["AU9", "AU6"], list(PRESETS["bp4d"])]}
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    (face,) = pipe(crops[0], action_units="AU9,AU12,AU6,AU1", return_evidence=True)
    (whole,), (other,) = (pipe(crops[0], action_units=units, return_evidence=True) for units in ("bp4d", "AU9,AU6"))
    assert list(face["action_units"]) == ["AU9", "AU12", "AU6", "AU1"]
    assert face["action_units"]["AU9"] == other["action_units"]["AU9"]
    for code in ("AU12", "AU6", "AU1"):  # AU6 is in both; the list with more of the units tells of it
        assert face["action_units"][code] == whole["action_units"][code]


def test_units_outside_the_trained_lists_are_guessed_with_a_warning_and_spoil_no_others(
    model, processor, crops, monkeypatch
):
    own, said = copy.deepcopy(processor), []
    own.trained_lists = {"detection": [["AU9"], ["AU6", "AU12"]]}
    monkeypatch.setattr("au_llava.answers_au_llava.logger.warning_once", said.append)
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    (face,), (known,) = (pipe(crops[0], action_units=units) for units in ("AU6,AU20", "AU6"))
    assert list(face["action_units"]) == ["AU6", "AU20"]
    assert face["action_units"]["AU6"] == known["action_units"]["AU6"]
    assert said == [
        "The model was not trained to answer detection for AU20, and will guess. It was trained on AU9; AU6, AU12."
    ]
    pipe(crops[0], task="intensity_level", action_units="AU12")
    assert "answer intensity_level for AU12, and will guess. It was trained on detection alone." in said[1]


def test_a_unit_of_one_s_own_is_not_taken_for_one_of_its_code(model, processor, crops):
    own = copy.deepcopy(processor)
    own.trained_lists = {"detection": [["AU6", "AU12"]]}
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    wink = ActionUnit("AU12", "Wink", "one eye closes while the other stays open", "eyelids")
    (both,), (alone,), (known,) = (pipe(crops[0], action_units=units) for units in (["AU6", wink], [wink], "AU6"))
    assert both["action_units"]["AU12"] == alone["action_units"]["AU12"]
    assert (
        both["action_units"]["AU12"]["name"] == "Wink" and both["action_units"]["AU6"] == known["action_units"]["AU6"]
    )


def test_of_tasks_trained_on_any_selection_just_the_units_are_asked_about(processor, monkeypatch):
    own, said = copy.deepcopy(processor), []
    own.trained_lists, own.free_tasks = {"detection": [["AU9"], ["AU6", "AU12"]]}, ["detection"]
    monkeypatch.setattr("au_llava.answers_au_llava.logger.warning_once", said.append)

    def asked(units: str) -> list:
        return [(task, [unit.code for unit in some]) for task, some in own.questions("detection", units)]

    assert asked("AU12,AU9") == [("detection", ["AU12", "AU9"])] and not said
    assert (
        asked("AU12,AU20,AU9") == [("detection", ["AU12", "AU9"]), ("detection", ["AU20"])] and "for AU20" in said[0]
    )
    own.trained_lists["intensity_level"] = [["AU9", "AU20", "AU25"]]
    assert asked("AU25,AU12,AU20")[1] == ("intensity_level", ["AU9", "AU20", "AU25"]) and len(said) == 1
    own.free_tasks = ["intensity_level"]
    assert asked("AU25,AU12,AU20") == [("detection", ["AU6", "AU12"]), ("intensity_level", ["AU25", "AU20"])]


def test_what_was_fitted_to_answers_is_not_applied_to_guesses(model, processor, crops):
    own = copy.deepcopy(processor)
    own.trained_lists = {"detection": [["AU6", "AU12"]], "intensity_level": [["AU6", "AU12"]]}
    own.calibration = {
        "detection": {"temperature": 3.0, "thresholds": {"AU12": 0.9, "AU20": 0.01}},
        "intensity_level": {"temperature": 3.0, "mass": 0.8},
    }
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    ears = ActionUnit("AU12", "Ear Wiggle", "the ears move back", "ears")
    for units in ("AU20", [ears]):
        for task in ("detection", "intensity_level"):
            (found,), (raw,) = (pipe(crops[0], task=task, action_units=units, calibrated=c) for c in (True, False))
            assert found == raw
    (known,) = pipe(crops[0], action_units="AU12,AU20")
    assert [unit["threshold"] for unit in known["action_units"].values()] == [0.9, 0.5]
    (known,) = pipe(crops[0], task="intensity_level", action_units="AU12,AU20")
    assert ["interval" in unit for unit in known["action_units"].values()] == [True, False]


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_presence_that_levels_tell_is_that_of_the_median_level(model, processor, crops, temperature):
    own, units = copy.deepcopy(processor), list(PRESETS["disfa"])
    own.trained_lists = {"intensity_level": [units]}
    own.calibration = {"intensity_level": {"temperature": temperature, "decision": "median"}}
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    faces = [face for crop in crops for face in pipe.preprocess(crop, "none")]
    asked = [(task, own.questions(task, units)[0][1]) for task in ("detection", "intensity_level")]
    for present, level in zip(*pipe.forward(faces, questions=asked, batch_size=5), strict=True):
        assert [present[code]["value"] for code in units] == [int(level[code]["value"] >= 2) for code in units]


def test_levels_tell_of_presence_where_nothing_else_does(model, processor, crops, monkeypatch):
    own, said, asked = copy.deepcopy(processor), [], []
    own.trained_lists = {"detection": [["AU6", "AU12"]], "intensity_level": [["AU12", "AU20", "AU25"]]}
    monkeypatch.setattr("au_llava.answers_au_llava.logger.warning_once", said.append)
    ((task, whole),) = own.questions("detection", "AU25")
    assert (task, [unit.code for unit in whole]) == ("intensity_level", ["AU12", "AU20", "AU25"])
    inputs = own(images=crops, task=task, action_units=whole)
    levels = model.recognize(**inputs, grammar=own.grammar(task, whole))
    present = levels.distributions[:, 2, 2:].sum(-1).tolist()
    middle = sum(sorted(present)[1:3]) / 2
    own.calibration = {"detection": {"thresholds": {"AU25": middle}}, "intensity_level": {"decision": "mean"}}
    pipe = FacialActionUnitPipeline(model=model, processor=own, task="facial-action-units", detector="none")
    found = [face["action_units"] for (face,) in pipe(crops, action_units="AU25,AU12", return_evidence=True)]
    (alone,) = pipe(crops[0], action_units="AU12")
    assert found[0]["AU12"]["value"] == alone["action_units"]["AU12"]["value"] and not said
    for face, share in zip(found, present, strict=True):
        unit = face["AU25"]
        assert unit["expected_value"] == pytest.approx(share, abs=1e-5) and unit["threshold"] == round(middle, 6)
        assert unit["value"] == (share >= middle) and np.sum(unit["evidence"]) in (0, pytest.approx(1, abs=1e-4))
        assert unit["probability"] == pytest.approx(share if unit["value"] else 1 - share, abs=1e-5)
    (mean,) = pipe(crops[0], action_units="AU25", decision="mean")
    assert mean["action_units"]["AU25"]["value"] == found[0]["AU25"]["expected_value"]
    # Asked about levels, too, the model answers once.
    recognize = model.recognize
    monkeypatch.setattr(model, "recognize", lambda *args, **how: asked.append(how) or recognize(*args, **how))
    faces = pipe.preprocess(crops[0], "none")
    both = pipe.forward(faces, questions=[("detection", whole[2:]), (task, whole)], batch_size=1)
    assert len(asked) == 1 and both[0][0]["AU25"]["value"] in (0, 1) and len(both[1][0]) == 3


def test_no_face_is_an_empty_list_and_a_warning_that_names_the_picture(pipe, tmp_path, caplog):
    blank = Image.new("RGB", (320, 240), "grey")
    blank.save(tmp_path / "wall.png")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        assert pipe(tmp_path / "wall.png", detector="cascade") == []
        assert pipe([tmp_path / "wall.png", blank], detector="cascade") == [[], []]
    told = [record.message for record in caplog.records if "No face" in record.message]
    wall = f"No face found in {tmp_path / 'wall.png'}."
    assert told == [wall, wall, "No face found in the Image given as number 2."]


def test_settings_can_be_given_once(model, processor, crops):
    pipe = FacialActionUnitPipeline(
        model=model, processor=processor, task="facial-action-units", detector="none", action_units="AU1", batch_size=2
    )
    assert [list(face["action_units"]) for (face,) in pipe(crops)] == [["AU1"]] * 5
    levels = FacialActionUnitPipeline(model=model, processor=processor, task="intensity_level", detector="none")
    assert levels(crops[0])[0]["task"] == "intensity_level"
    assert levels(crops[0], task="intensity")[0]["task"] == "intensity"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_units": "AU99"}, "AU99"),
        ({"action_units": []}, "empty"),
        ({"task": "smile"}, "smile"),
        ({"detector": "magic"}, "magic"),
        ({"max_faces": 0}, "max_faces"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
@pytest.mark.parametrize("many", [False, True])
def test_bad_settings_are_refused_for_one_and_for_many(pipe, crops, settings, message, many):
    with pytest.raises(ValueError, match=message):
        pipe(crops if many else crops[0], **{"detector": "none"} | settings)


def test_a_task_in_the_place_of_a_batch_size_is_refused(pipe, crops):
    with pytest.raises(TypeError, match="positional"):
        pipe(crops[0], "intensity")


def test_a_processor_of_another_model_is_refused(model, processor):
    other = copy.deepcopy(processor)
    other.patch_size = 14
    with pytest.raises(ValueError, match=r"256 of them.*16 of them"):
        FacialActionUnitPipeline(model=model, processor=other, task="facial-action-units")
