import copy

import numpy as np
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava.action_units import TASKS, select
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import instruct, make_row


def rows_for(task, count=2):
    codes = [unit.code for unit in select(None, task)[:3]]
    rows = []
    for number in range(count):
        labels = {code: TASKS[task].values[(number + place) % 2 * -1] for place, code in enumerate(codes)}
        image = Image.new("RGB", (224, 224), (40 * number, 90, 120))
        rows.append(make_row(image, labels, task, instruct(labels, task)))
    return rows


def collator_for(processor, share):
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return QuestionCollator(collate, neutral=NeutralDraft(processor, share) if share is not None else None)


@pytest.mark.parametrize(
    ("task", "shown"),
    [("detection", " [?, ?, ?]</s>"), ("intensity_level", " [?, ?, ?]</s>"), ("intensity", " [?.??, ?.??, ?.??]</s>")],
)
def test_neutral_rows_hide_every_digit_of_the_input_and_none_of_the_labels(processor, task, shown):
    rows = rows_for(task)
    np.random.seed(0)
    plain = collator_for(processor, None)(copy.deepcopy(rows))
    np.random.seed(0)
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
    np.random.seed(1)
    collator, rows = collator_for(processor, 0.5), rows_for("detection", 8)
    neutral = processor.grammar("detection").neutral
    hidden = torch.cat([(collator(copy.deepcopy(rows))["input_ids"] == neutral).any(1) for _ in range(4)])
    assert 0 < hidden.sum() < len(hidden)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(processor, share):
    with pytest.raises(ValueError, match=rf"neutral is {share}"):
        NeutralDraft(processor, share)
