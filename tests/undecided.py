"""A tiny model whose answers vary, and what tests ask it."""

import copy

import torch
from conftest import tiny_model

from au_llava.grammar_au_llava import GrammarLogitsProcessor


TASKS = ["detection", "intensity_level", "intensity"]


def undecided_model(tokenizer):
    """A wide initialisation makes answers differ from slot to slot, so that drafts are often wrong."""
    model = tiny_model(copy.deepcopy(tokenizer), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator))
        # All digits nearly alike, so that each slot's state decides between them.
        digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
        noise = torch.randn(len(digits), model.lm_head.in_features, generator=generator)
        model.lm_head.weight[digits] = model.lm_head.weight[digits[0]] + noise * 0.3
    return model


def inputs_for(processor, task, units, count=3, seed=0):
    images = torch.rand(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    return processor(images=list(images), task=task, action_units=units, do_rescale=False)


def generated(model, inputs, grammar):
    length = inputs["input_ids"].shape[1]
    rule = GrammarLogitsProcessor(grammar, length)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=len(grammar), logits_processor=[rule])
    return output[:, length:]
