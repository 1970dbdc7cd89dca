import copy

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from undecided import inputs_for, undecided_model

from au_llava.action_units import TASKS, select
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import instruct, make_row


def rows_for(task, count=2):
    codes = [unit.code for unit in select(None, task)[:3]]
    rows = []
    for number in range(count):
        labels = {code: TASKS[task].values[(number + place) % 2 * -1] for place, code in enumerate(codes)}
        image = Image.new("RGB", (224, 224), (40 * number, 90, 120))
        rows.append(row_of(image, labels, task, number))
    return rows


def row_of(image, labels, task, number):
    origin = {"dataset": "drawn", "subject": str(number), "sequence": "", "frame": number}
    return make_row(image, labels, task, instruct(labels, task), **origin)


def collator_for(processor, share):
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return QuestionCollator(collate, neutral=NeutralDraft(processor, share) if share is not None else None)


@pytest.mark.parametrize(
    ("task", "shown"),
    [("detection", " [?, ?, ?]</s>"), ("intensity_level", " [?, ?, ?]</s>"), ("intensity", " [?.??, ?.??, ?.??]</s>")],
)
def test_neutral_rows_hide_every_digit_of_the_input_and_none_of_the_labels(processor, task, shown):
    rows = rows_for(task)
    plain = collator_for(processor, None)(copy.deepcopy(rows))
    hidden = collator_for(processor, 1.0)(copy.deepcopy(rows))
    assert torch.equal(plain["labels"], hidden["labels"])
    answers = [
        processor.tokenizer.decode(line[label != -100])
        for line, label in zip(hidden["input_ids"], hidden["labels"], strict=True)
    ]
    assert answers == [shown] * 2
    prompts = plain["labels"] == -100
    assert torch.equal(plain["input_ids"][prompts], hidden["input_ids"][prompts])
    # What the model is trained on is what the read-out shows it.
    draft = processor.grammar(task, select(None, task)[:3]).neutral_draft()
    assert torch.equal(hidden["input_ids"][0, -len(draft) :], draft)


def test_a_share_of_the_rows_is_neutral(processor):
    collator, rows = collator_for(processor, 0.5), rows_for("detection", 8)
    neutral = processor.grammar("detection").neutral
    hidden = []
    for collator.epoch in range(4):
        hidden.append((collator(copy.deepcopy(rows))["input_ids"] == neutral).any(1))
    assert 0.2 < torch.cat(hidden).float().mean() < 0.8


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(processor, share):
    with pytest.raises(ValueError, match=rf"neutral is {share}"):
        NeutralDraft(processor, share)


@pytest.fixture(scope="module")
def model(tokenizer):
    return undecided_model(tokenizer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", ["image_first", "text_first"])
def test_one_pass_reads_what_a_plain_forward_over_the_neutral_draft_says(model, processor, task, layout):
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout=layout)
    grammar, inputs = own.grammar(task, "disfa"), inputs_for(own, task, "disfa")
    passes = []
    handle = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    answer = model.recognize(**inputs, grammar=grammar, readout="parallel")
    handle.remove()
    assert len(passes) == answer.forwards == 1

    draft = grammar.neutral_draft().expand(3, -1)
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([inputs["input_ids"], draft], 1),
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(draft)], 1),
            pixel_values=inputs["pixel_values"],
        ).logits[:, inputs["input_ids"].shape[1] - 1 : -1]
    digits = grammar.value_tokens
    for number, slots in enumerate(grammar.slots()):
        expected = torch.ones(3, len(digits))
        for value, tokens in enumerate(digits):
            for place, slot in enumerate(slots):
                rivals = digits[(digits[:, :place] == tokens[:place]).all(1), place].unique()
                chances = logits[:, slot, rivals].softmax(-1)
                expected[:, value] *= chances[:, (rivals == tokens[place]).nonzero()[0, 0]]
        torch.testing.assert_close(answer.distributions[:, number], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer.distributions.sum(-1), torch.ones(3, 12))


def test_the_first_digit_asked_for_is_the_same_in_both_readouts(model, processor):
    grammar, inputs = processor.grammar("intensity_level"), inputs_for(processor, "intensity_level", None)
    exact = model.recognize(**inputs, grammar=grammar)
    parallel = model.recognize(**inputs, grammar=grammar, readout="parallel")
    torch.testing.assert_close(exact.distributions[:, 0], parallel.distributions[:, 0], atol=1e-5, rtol=0)
    assert not torch.allclose(exact.distributions[:, 1:], parallel.distributions[:, 1:], atol=1e-2)


def test_training_on_neutral_rows_teaches_the_parallel_readout(tokenizer, processor):
    """A picture's brightness decides three levels; one pass has to tell them after training on neutral rows."""
    own = type(processor)(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    model = tiny_model(copy.deepcopy(tokenizer)).train()
    rows = []
    for bright in (0, 1):
        labels = {"AU1": 5.0 * bright, "AU6": 5.0 - 5.0 * bright, "AU12": 5.0 * bright}
        image = Image.new("RGB", (224, 224), (255 * bright,) * 3)
        rows.append(row_of(image, labels, "intensity_level", bright))
    batch = collator_for(own, 1.0)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs = own(images=[row["images"][0] for row in rows], task="intensity_level", action_units="AU1,AU6,AU12")
    grammar = own.grammar("intensity_level", "AU1,AU6,AU12")
    answer = model.eval().recognize(**inputs, grammar=grammar, readout="parallel")
    assert answer.values.tolist() == [[0, 5, 0], [5, 0, 5]]


@pytest.mark.parametrize("readout", ["exact", "parallel"])
@pytest.mark.parametrize("task", TASKS)
def test_decisions_are_those_of_the_distribution(model, processor, task, readout):
    grammar, inputs = processor.grammar(task, "bp4d"), inputs_for(processor, task, "bp4d")
    answers = {
        decision: model.recognize(**inputs, grammar=grammar, readout=readout, decision=decision)
        for decision in ("mode", "mean", "median")
    }
    distributions = answers["mode"].distributions
    torch.testing.assert_close(answers["mean"].values, distributions @ grammar.values)
    median = answers["median"].values
    below = (distributions * (grammar.values < median[..., None])).sum(-1)
    upto = (distributions * (grammar.values <= median[..., None])).sum(-1)
    assert (below < 0.5 + 1e-6).all() and (upto > 0.5 - 1e-6).all()
    for decision, answer in answers.items():
        assert torch.equal(answer.sequences, answers["mode"].sequences)
        (face, *_) = processor.read(answer, task, "bp4d")
        given = [unit["value"] for unit in face.values()]
        assert given == pytest.approx(answer.values[0].tolist(), abs=1e-5), decision
        assert all(isinstance(value, float) for value in given) == (decision == "mean" or task == "intensity")


def test_a_decision_is_taken_again_after_calibration(model, processor):
    own = copy.deepcopy(processor)
    own.calibration = {"intensity_level": {"temperature": 4.0}}
    grammar, inputs = own.grammar("intensity_level", "bp4d"), inputs_for(own, "intensity_level", "bp4d")
    plain = model.recognize(**inputs, grammar=grammar, decision="mean")
    fitted = own.calibrate(plain, "intensity_level", "bp4d")
    assert not torch.allclose(plain.values, fitted.values)
    torch.testing.assert_close(fitted.values, fitted.distributions @ grammar.values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"readout": "magic"}, "magic.*exact, parallel"),
        ({"decision": "best"}, "best.*mode, mean, median"),
        ({"readout": "parallel", "draft": torch.zeros(3, 4, dtype=torch.long)}, "draft of its own"),
    ],
)
def test_unknown_ways_are_refused(model, processor, settings, message):
    grammar, inputs = processor.grammar("detection", "AU1"), inputs_for(processor, "detection", "AU1")
    with pytest.raises(ValueError, match=message):
        model.recognize(**inputs, grammar=grammar, **settings)
