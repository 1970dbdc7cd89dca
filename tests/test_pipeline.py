import copy
import json
import logging

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


@pytest.fixture
def crops():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(5)]


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
    for one in (arrays[0], arrays[0][..., 0], (tmp_path / "0.png").read_bytes()):
        assert pipe(one, detector="none")[0]["task"] == "detection"
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
    assert [len(*own.questions("detection", code)) for code in ("AU12", "AU9")] == [12, 1]


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
    monkeypatch.setattr("au_llava.processing_au_llava.logger.warning_once", said.append)
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
    monkeypatch.setattr("au_llava.processing_au_llava.logger.warning_once", said.append)
    assert [[unit.code for unit in units] for units in own.questions("detection", "AU12,AU9")] == [["AU12", "AU9"]]
    assert not said and len(*own.questions("detection", "AU12,AU20")) == 2 and "for AU20" in said[0]


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


def test_a_processor_of_another_model_is_refused(model, processor):
    other = copy.deepcopy(processor)
    other.patch_size = 14
    with pytest.raises(ValueError, match=r"256 of them.*16 of them"):
        FacialActionUnitPipeline(model=model, processor=other, task="facial-action-units")
