"""transformers' own decision pipeline, asking this model about Action Units."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline
from undecided import undecided_model

from au_llava import AuLlavaProcessor, default_checkpoint
from au_llava.action_units import CATALOGUE, ActionUnit, select
from au_llava.templates_au_llava import decision_files


LEVELS = ["absent", "trace", "slight", "marked", "severe", "maximum"]
NOUL = {"type": "noul"}
WINK = ActionUnit("WINK", "Wink", "one eye closes while the other stays open", "eyelids")


@pytest.fixture(scope="module", params=["image_first", "text_first"])
def folder(request, tokenizer, processor, tmp_path_factory):
    own = AuLlavaProcessor(
        processor.image_processor, copy.deepcopy(tokenizer), patch_size=56, prompt_layout=request.param,
        calibration={"detection": {"temperature": 1.5}},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("decision") / f"tiny_{request.param}"
    undecided_model(tokenizer).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decide(folder):
    return pipeline("decision", model=str(folder), trust_remote_code=True)


@pytest.fixture
def face():
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 255, (224, 224, 3), generator=generator, dtype=torch.uint8).numpy())


def ask(decide, face, questions):
    passes = []
    handle = decide.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    answers = decide({"state": {"photo": "face-1"}, "questions": questions, "assets": {"face-1": face}})
    handle.remove()
    assert len(passes) == 1
    return answers


def ours(decide, folder, face, task, units):
    processor = AuLlavaProcessor.from_pretrained(folder)
    inputs = processor(images=face, task=task, action_units=units)
    recognition = decide.model.recognize(**inputs, grammar=processor.grammar(task, units), readout="parallel")
    return processor.calibrate(recognition, task, units)


@pytest.mark.parametrize("units", [["AU12"], ["AU1", "AU12", "FEAFA12"], ["AU6", WINK], "bp4d"])
def test_presence_of_several_units_in_one_pass(decide, folder, face, units):
    units = select(units)
    known = [unit for unit in units if unit.code in CATALOGUE]
    questions = {unit.code: {"type": "noul"} for unit in units}
    for unit in units:
        if unit not in known:
            questions[unit.code]["instructions"] = unit.line()
    answers = ask(decide, face, questions)
    expected = ours(decide, folder, face, "detection", units).expected_values[0].tolist()
    assert [answers[unit.code]["noul"] for unit in units] == pytest.approx(expected, abs=1e-4)


def test_levels_of_several_units_in_one_pass(decide, folder, face):
    questions = {name: {"type": "score", "instructions": code, "criteria": LEVELS} for name, code in
                 {"smile": "AU12", "frown": "AU4"}.items()}  # fmt: skip
    answers = ask(decide, face, questions)
    expected = ours(decide, folder, face, "intensity_level", "AU12,AU4")
    for number, answer in enumerate(answers.values()):
        chances = list(answer["probabilities"].values())
        assert chances == pytest.approx(expected.distributions[0, number].tolist(), abs=1e-4)
        assert answer["score"] == pytest.approx(expected.expected_values[0, number].item(), abs=1e-4)


@pytest.fixture(scope="module")
def trained_on_lists(folder, tmp_path_factory):
    """The same model as if it had been trained on two lists alone."""
    place = tmp_path_factory.mktemp("lists") / folder.name
    shutil.copytree(folder, place)
    processor = AuLlavaProcessor.from_pretrained(folder)
    detection = [["AU9", "AU4"], ["AU1", "AU4", "AU6", "AU12"]]
    processor.trained_lists = {"detection": detection, "intensity_level": [["AU4", "AU12"]]}
    processor.free_tasks = ["intensity_level"]
    processor.save_pretrained(place)
    return place


def test_of_a_list_that_the_model_was_trained_on_all_is_asked(trained_on_lists, face):
    decide = pipeline("decision", model=str(trained_on_lists), trust_remote_code=True)
    expected = ours(decide, trained_on_lists, face, "detection", "AU1,AU4,AU6,AU12").expected_values[0].tolist()
    for codes, places in ((["AU4", "AU12"], [1, 3]), (["AU1"], [0]), (["AU1", "AU4", "AU6", "AU12"], [0, 1, 2, 3])):
        answers = ask(decide, face, dict.fromkeys(codes, NOUL))
        found = [answers[code]["noul"] for code in codes]
        assert found == pytest.approx([expected[place] for place in places], abs=1e-4)
    levels = ask(decide, face, {"AU12": {"type": "score", "criteria": LEVELS}})  # trained on any selection
    alone = ours(decide, trained_on_lists, face, "intensity_level", "AU12").expected_values[0].item()
    assert levels["AU12"]["score"] == pytest.approx(alone, abs=1e-4)
    for strange in (["AU12", "AU4"], ["AU9", "AU12"], ["AU12", "AU43"]):
        with pytest.raises(Exception, match="in its order: AU9, AU4; AU1, AU4, AU6, AU12"):
            ask(decide, face, dict.fromkeys(strange, NOUL))


def test_a_task_that_the_model_was_not_trained_on_is_not_asked(folder, face, tmp_path):
    place = shutil.copytree(folder, tmp_path / "model")
    processor = AuLlavaProcessor.from_pretrained(folder)
    processor.trained_lists = {"detection": [["AU1", "AU12"]], "intensity": [["AU1", "AU12"]]}
    processor.save_pretrained(place)
    decide = pipeline("decision", model=str(place), trust_remote_code=True)
    assert ask(decide, face, {"AU12": NOUL})
    with pytest.raises(Exception, match="to answer score questions. It was trained on detection, intensity alone"):
        ask(decide, face, {"AU12": {"type": "score", "criteria": LEVELS}})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"state": "nothing", "questions": {"AU1": NOUL}}, "one picture"),
        ({"state": "face", "questions": {"AU1": NOUL, "AU2": {"type": "score", "criteria": LEVELS}}}, "either"),
        ({"state": "face", "questions": {"AU1": {"type": "choice", "criteria": {"a": None}}}}, "either"),
        ({"state": "face", "questions": {"AU1": {"type": "score", "criteria": LEVELS[:3]}}}, "6 criteria"),
        ({"state": "face", "questions": {"joy": NOUL}}, "joy is no Action Unit"),
        ({"state": "face", "questions": {"AU1": NOUL, "brow": NOUL | {"instructions": "AU1"}}}, "about a unit of"),
        ({"state": "face", "questions": {"AU1": NOUL | {"instructions": "Of the face"}}}, "stands in a question, too"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(decide, face, request_, message):
    with pytest.raises(Exception, match=message):
        decide(request_ | {"assets": {"face": face}})


def test_the_files_at_the_root_belong_to_the_default_checkpoint():
    root = default_checkpoint()
    processor = AuLlavaProcessor.from_pretrained(root)
    for name, text in decision_files(processor).items():
        assert Path(root, name).read_text(encoding="utf-8") == text, f"write {name} again: processor.save_pretrained"
