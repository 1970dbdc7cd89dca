"""What is decided on distributions: both sides of a face joined, and what was fitted to validation people."""

import copy

import pytest
import torch
from conftest import tiny_model
from test_readout_pipeline import make
from undecided import TASKS, inputs_for, undecided_model

from au_llava import AuLlavaProcessor
from au_llava.action_units import TASKS as KNOWN
from au_llava.action_units import parse_answer, select
from au_llava.recognition_au_llava import Recognition


@pytest.fixture(scope="module")
def model(tokenizer):
    return undecided_model(tokenizer)


def ask(model, processor, task, units, **how):
    inputs, grammar = inputs_for(processor, task, units), processor.grammar(task, units)
    return model.recognize(**inputs, grammar=grammar, **how), inputs, grammar


@pytest.mark.parametrize("task", TASKS)
def test_the_most_probable_values_are_those_that_are_written(model, processor, task):
    answer, _, grammar = ask(model, processor, task, "feafa")
    assert torch.equal(grammar.values[grammar.most_probable(answer.distributions)], answer.values)


def test_a_likely_first_digit_beats_the_likeliest_value(processor):
    grammar = processor.grammar("intensity", "FEAFA1")
    distributions = torch.zeros(1, 1, 101)
    distributions[..., 5], distributions[..., 30:40] = 0.4, 0.06  # 0.05; or 0.30 to 0.39, together 0.6
    assert grammar.most_probable(distributions).tolist() == [[30]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("readout", ["exact", "parallel"])
def test_a_mirrored_face_gets_the_mirrored_answer(model, processor, task, readout):
    answer, inputs, grammar = ask(model, processor, task, "feafa", readout=readout, mirror=True)
    flipped = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(-1)}
    other = model.recognize(**flipped, grammar=grammar, readout=readout, mirror=True)
    places = torch.tensor(grammar.mirrored)
    assert places[:2].tolist() == [1, 0] and places[21].item() == 21  # the eyes change sides, one unit has none
    torch.testing.assert_close(other.distributions[:, places], answer.distributions, atol=1e-5, rtol=0)
    alone = model.recognize(**inputs, grammar=grammar, readout=readout)
    assert not torch.allclose(alone.distributions, answer.distributions, atol=1e-3)
    # The numbers are those of the joint distribution, and the tokens say them.
    torch.testing.assert_close(answer.expected_values, answer.distributions @ grammar.values)
    texts = processor.batch_decode(answer.sequences, skip_special_tokens=True)
    written = [parse_answer(text, task, select("feafa")) for text in texts]
    torch.testing.assert_close(torch.tensor(written).float(), answer.values.float())
    near = (answer.values[..., None] - grammar.values).abs().argmin(-1, keepdim=True)
    torch.testing.assert_close(answer.distributions.gather(-1, near)[..., 0], answer.probabilities)


def test_sides_that_are_sure_of_different_levels_are_both_heard(model, processor):
    answer, _, grammar = ask(model, processor, "intensity_level", "AU12")
    answer.distributions = torch.eye(6)[[0, 1, 2, 0, 1, 4]][:, None]  # three faces, then their mirror images
    answer.sequences = answer.sequences.repeat(2, 1)
    joint = answer.both_sides(grammar)
    expected = torch.eye(6)[[0, 1, 2]][:, None]
    expected[2, 0, [2, 4]] = 0.5
    torch.testing.assert_close(joint.distributions, expected, atol=1e-3, rtol=0)


def test_amid_a_training_answers_are_those_in_use_and_nothing_is_learnt(model, processor):
    own = copy.deepcopy(model)
    for layer in own.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    norm = torch.nn.BatchNorm1d(17)  # as encoders have them that are no transformers
    own.model.vision_tower.layernorm = torch.nn.Sequential(own.model.vision_tower.layernorm, norm)
    expected, _, _ = ask(own.eval(), processor, "detection", "bp4d")
    own.train()
    own.lm_head.eval()
    found, _, _ = ask(own, processor, "detection", "bp4d")
    assert torch.equal(found.distributions, expected.distributions)
    assert norm.num_batches_tracked == 0 and own.training and norm.training and not own.lm_head.training
    assert torch.equal(ask(own.eval(), processor, "detection", "bp4d")[0].distributions, expected.distributions)


@pytest.mark.parametrize(("task", "units"), [("detection", "AU6,AU12"), ("intensity_level", "bp4d")])
def test_answers_about_something_else_are_not_read(model, processor, task, units):
    answer, _, _ = ask(model, processor, "detection", "bp4d")
    for read in (processor.read, processor.calibrate):
        with pytest.raises(ValueError, match=r"about 12 Action Units with 2 values each, not about .* of " + task):
            read(answer, task, units)


def test_both_sides_count_alike_and_only_where_both_were_asked(model, processor):
    answer, inputs, grammar = ask(model, processor, "intensity_level", "FEAFA1,FEAFA22", mirror=True)
    assert grammar.mirrored == [-1, 1]  # the right eye was not asked about
    own, other = (
        model.recognize(**dict(inputs) | {"pixel_values": pixels}, grammar=grammar).distributions
        for pixels in (inputs["pixel_values"], inputs["pixel_values"].flip(-1))
    )
    torch.testing.assert_close(answer.distributions[:, 0], own[:, 0], atol=1e-5, rtol=0)
    mean = (own[:, 1] * other[:, 1]).sqrt()
    torch.testing.assert_close(answer.distributions[:, 1], mean / mean.sum(-1, keepdim=True), atol=1e-5, rtol=0)


def test_pictures_may_be_encoded_before(model, processor):
    answer, inputs, grammar = ask(model, processor, "detection", "bp4d", mirror=True, decision="mean")
    encoded = model.encode(inputs["pixel_values"], mirror=True)
    again = model.recognize(inputs["input_ids"], None, grammar, encoded=encoded, mirror=True, decision="mean")
    torch.testing.assert_close(again.distributions, answer.distributions, atol=1e-5, rtol=0)
    assert torch.equal(again.values, again.expected_values) and again.decision == "mean"


def test_pictures_that_were_encoded_otherwise_are_refused(model, processor):
    inputs, grammar = inputs_for(processor, "detection", "AU1"), processor.grammar("detection", "AU1")
    with pytest.raises(ValueError, match="6 prompts and 3 encoded pictures.*same `mirror`"):
        model.recognize(**inputs, grammar=grammar, encoded=model.encode(inputs["pixel_values"]), mirror=True)


def test_evidence_is_of_both_sides(model, processor):
    answer, inputs, grammar = ask(model, processor, "detection", "feafa", mirror=True, return_evidence=True)
    flipped = dict(inputs) | {"pixel_values": inputs["pixel_values"].flip(-1)}
    other = model.recognize(**flipped, grammar=grammar, mirror=True, return_evidence=True)
    places = torch.tensor(grammar.mirrored)
    torch.testing.assert_close(other.evidence[:, places].flip(-1), answer.evidence, atol=1e-6, rtol=0)
    sums = answer.evidence.sum((2, 3))
    assert torch.allclose(sums, sums.round(), atol=1e-5) and set(sums.round().flatten().tolist()) == {0, 1}


def test_the_pipeline_asks_as_its_processor_says(tokenizer, processor, crops):
    own = copy.deepcopy(processor)
    own.mirror = True
    model = tiny_model(copy.deepcopy(tokenizer))
    plain, mirrored = make(model, processor), make(model, own)
    question = {"task": "intensity", "action_units": "feafa"}
    assert mirrored(crops[:2], **question) == plain(crops[:2], mirror=True, **question)
    assert mirrored(crops[:2], mirror=False, **question) == plain(crops[:2], **question)
    assert mirrored(crops[0], **question) != plain(crops[0], **question)


def test_a_processor_remembers_whether_to_mirror(processor, tmp_path):
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, mirror=True)
    own.save_pretrained(tmp_path)
    assert AuLlavaProcessor.from_pretrained(tmp_path).mirror and not processor.mirror


def make_recognition(distributions: torch.Tensor, allowed: torch.Tensor) -> Recognition:
    places = distributions.argmax(-1)
    return Recognition(
        sequences=torch.zeros(1, 1, dtype=torch.long), values=allowed[places],
        probabilities=distributions.amax(-1), expected_values=distributions @ allowed,
        distributions=distributions, forwards=1,
    )  # fmt: skip


def test_lines_move_the_expected_value(processor):
    allowed, own = torch.tensor(KNOWN["intensity"].values), copy.deepcopy(processor)
    distributions = torch.zeros(1, 3, 101)
    distributions[..., 0], distributions[..., 60] = 0.75, 0.25  # 0.15 expected
    lines = {"FEAFA1": [0.05, 1.5], "FEAFA2": [0.2, 2.0]}
    own.calibration = {"intensity": {"temperature": 3.0, "lines": lines}}
    recognition = make_recognition(distributions, allowed)
    (face,) = own.read(recognition, "intensity", "FEAFA1,FEAFA2,FEAFA3")
    assert [unit["value"] for unit in face.values()] == [0.15, 0.0, 0.0]  # the third has no line and keeps its mode
    assert all(unit["expected_value"] > 0.15 for unit in face.values())  # the temperature moves what it moved before
    (mean,) = own.read(recognition.decide("mean", allowed), "intensity", "FEAFA1,FEAFA2,FEAFA3")
    assert all(unit["value"] == unit["expected_value"] for unit in mean.values())


def test_a_fitted_decision_stands_in_for_the_mode_alone(processor):
    allowed, own = torch.tensor(KNOWN["intensity_level"].values), copy.deepcopy(processor)
    recognition = make_recognition(torch.tensor([[[0.4, 0.2, 0.3, 0.1, 0.0, 0.0]]]), allowed)
    own.calibration = {"intensity_level": {"temperature": 1.0, "decision": "median"}}
    for decision, value in (("mode", 1), ("median", 1), ("mean", 1.1)):
        (face,) = own.read(recognition.decide(decision, allowed), "intensity_level", "AU1")
        assert face["AU1"]["value"] == pytest.approx(value)
    (plain,) = own.read(recognition, "intensity_level", "AU1", calibrated=False)
    assert plain["AU1"]["value"] == 0


def test_thresholds_may_be_set_without_a_temperature(processor):
    own, allowed = copy.deepcopy(processor), torch.tensor(KNOWN["detection"].values)
    own.calibration = {"detection": {"thresholds": {"AU1": 0.7}}}
    (face,) = own.read(make_recognition(torch.tensor([[[0.4, 0.6]]]), allowed), "detection", "AU1")
    assert face["AU1"]["value"] == 0 and face["AU1"]["expected_value"] == pytest.approx(0.6)
