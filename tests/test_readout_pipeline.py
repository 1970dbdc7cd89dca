"""How the pipeline asks: read-out, decision, batches, memory, threads, devices."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import pipeline

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, photos
from au_llava.pipeline_au_llava import FacialActionUnitPipeline


def make(model, processor, **settings):
    return FacialActionUnitPipeline(
        model=model, processor=processor, task="facial-action-units", detector="none", **settings
    )


@pytest.fixture
def pipe(model, processor):
    return make(model, processor)


def values(results):
    return [[unit["value"] for unit in face["action_units"].values()] for (face,) in results]


def test_readout_and_decision_reach_the_model(pipe, crops):
    passes = []
    pipe.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    (face,) = pipe(crops[0], task="intensity", readout="parallel", decision="mean")
    assert len(passes) == 1
    for unit in face["action_units"].values():
        assert unit["value"] == unit["expected_value"]
    for settings in ({"readout": "magic"}, {"decision": "best"}):
        with pytest.raises(ValueError, match="accepted"):
            pipe(crops[0], **settings)


@pytest.mark.parametrize("mirror", [False, True])
def test_several_questions_encode_a_face_once(pipe, crops, mirror):
    seen = []
    pipe.model.model.vision_tower.register_forward_hook(lambda tower, given, made: seen.append(len(given[0])))
    asked = photos.questions(["detection", "intensity_level", "intensity"])
    found = list(photos.recognize(pipe, crops, asked, detector="none", batch_size=2, mirror=mirror))
    assert seen == [count * (1 + mirror) for count in (2, 2, 1)]
    for number, (task, units) in enumerate(asked):
        one_by_one = pipe(crops, task=task, action_units=units, batch_size=2, mirror=mirror)
        assert [photo.answers[number] for photo in found] == one_by_one


def test_a_question_is_written_once_for_all_batches(pipe, crops, monkeypatch):
    written, prompt = [], type(pipe.processor).prompt
    monkeypatch.setattr(type(pipe.processor), "prompt", lambda *given: written.append(1) or prompt(*given))
    faces = [face for crop in crops for face in pipe.preprocess(crop, detector="none")]
    pipe.forward(faces, questions=photos.questions(["detection", "intensity"]), batch_size=2)
    assert len(written) == 2


def test_calibration_is_used_unless_turned_off(model, processor, crops):
    own, settings = copy.deepcopy(processor), {"action_units": "AU1,AU2"}
    own.calibration = {"detection": {"temperature": 2.0, "thresholds": {"AU1": 0.0, "AU2": 1.0}}}
    plain, fitted = make(model, processor), make(model, own)
    (face,) = fitted(crops[0], **settings)
    assert [unit["value"] for unit in face["action_units"].values()] == [1, 0]
    assert fitted(crops[0], calibrated=False, **settings) == plain(crops[0], **settings) != [face]


def test_an_adapter_is_asked_as_the_processor_beside_it_says(model, processor, tmp_path):
    beside, base = copy.deepcopy(processor), AuLlavaProcessor.from_pretrained
    beside.calibration = {"detection": {"temperature": 3.0}}
    (tmp_path / "alone").mkdir()
    processor.save_pretrained(tmp_path / "base")
    beside.save_pretrained(tmp_path / "whole")
    loaded = base(tmp_path / "base", _from_pipeline="facial-action-units")
    model.name_or_path = str(tmp_path / "base")
    for name, known in (("whole", beside), ("alone", processor)):
        model.adapter = str(tmp_path / name)
        assert make(model, loaded).processor.calibration == known.calibration
        chosen = base(tmp_path / "base")  # by the user
        assert make(model, chosen).processor is chosen
    assert "by_pipeline" not in (tmp_path / "base" / "processor_config.json").read_text()


def test_a_processor_that_is_named_beside_an_adapter_is_taken(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    own = copy.deepcopy(processor)
    for folder, temperature in (("base", 2.0), ("adapter", 3.0), ("mine", 4.0)):
        own.calibration = {"detection": {"temperature": temperature}}
        own.save_pretrained(tmp_path / folder)
    for given, taken in ((None, 3.0), (str(tmp_path / "mine"), 4.0)):
        pipe = pipeline("facial-action-units", str(tmp_path / "adapter"), processor=given, trust_remote_code=True)
        assert pipe.processor.calibration == {"detection": {"temperature": taken}}


def test_the_processor_comes_from_where_the_adapter_came_from(model, processor, tmp_path, monkeypatch):
    asked = {}
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    access = {"revision": "v1", "cache_dir": str(tmp_path / "cache")}
    loaded = AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "adapter", adapter_kwargs=access)
    processor.save_pretrained(tmp_path / "base")
    given = AuLlavaProcessor.from_pretrained(tmp_path / "base", _from_pipeline="facial-action-units")
    monkeypatch.setattr(AuLlavaProcessor, "from_pretrained", lambda place, **access: asked.update(access) or given)
    make(loaded, given)
    assert asked == access


def test_a_batch_that_memory_has_no_room_for_is_halved_and_nothing_is_lost(pipe, crops, caplog):
    expected = values(pipe(crops, batch_size=1))
    sizes = []

    def crowd(module, arguments, outputs):
        """With more than two pictures, really ask for more memory than any machine has."""
        sizes.append(len(arguments[0]))
        if sizes[-1] > 2:
            torch.empty(2**56)

    pipe.model.model.vision_tower.register_forward_hook(crowd)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    assert values(pipe(crops, batch_size=4)) == expected
    assert sizes == [4, 2, 2, 1]
    assert values(pipe(crops, batch_size=4)) == expected
    assert sizes[4:] == [2, 2, 1]
    logger.removeHandler(caplog.handler)
    assert caplog.text.count("Memory ran out at 4 faces; going on with 2 at a time") == 1


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory(pipe, crops):
    def fail(*_):
        raise RuntimeError("something else")

    pipe.model.model.vision_tower.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        pipe(crops)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_ahead_change_neither_order_nor_errors(pipe, crops, tmp_path, workers):
    (tmp_path / "empty.jpg").touch()
    mixed = [crops[0], str(tmp_path / "empty.jpg"), *crops[1:]]
    results = pipe(mixed, batch_size=2, num_workers=workers)
    assert "empty.jpg" in results.pop(1)["error"]
    assert values(results) == values([pipe(crop) for crop in crops])


@pytest.mark.parametrize("setting", ["batch_size", "num_workers", "max_faces"])
@pytest.mark.parametrize("count", [-1, "4", 2.5])
def test_what_is_no_number_of_things_is_refused(pipe, crops, setting, count):
    with pytest.raises(ValueError, match=f"{setting} is {count!r}; give a whole number"):
        pipe(crops[0], **{setting: count})


def test_faces_are_found_while_the_model_is_at_work(pipe, crops):
    """Without any thread ahead, the second photograph would be opened after the first answer."""
    seen = []

    def stream():
        for number, crop in enumerate(crops):
            seen.append(number)
            yield crop

    next(pipe(stream(), batch_size=1))
    assert len(seen) > 1


def test_static_shapes_fill_the_last_batch(pipe, crops):
    sizes = []
    pipe.model.model.vision_tower.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    assert values(pipe(crops, batch_size=2, static_shapes=True)) == values([pipe(crop) for crop in crops])
    assert sizes[:3] == [2, 2, 2]


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}])
def test_dtype_and_device_map_are_honoured(model, processor, crops, tmp_path, settings):
    model.save_pretrained(tmp_path)
    loaded = AuLlavaForConditionalGeneration.from_pretrained(tmp_path, **settings)
    assert loaded.dtype == settings.get("dtype", torch.float32)
    (face,) = make(loaded, copy.deepcopy(processor))(crops[0], task="intensity_level")
    assert all(unit["value"] in range(6) for unit in face["action_units"].values())


def test_parts_of_the_model_may_lie_on_disk(model, processor, crops, tmp_path):
    model.save_pretrained(tmp_path / "model")
    spread = AuLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu",
                    "model.language_model": "disk", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    whole = make(model, processor)(crops[:2], task="intensity")
    assert values(make(spread, processor)(crops[:2], task="intensity")) == values(whole)
