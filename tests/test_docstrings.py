"""The examples in the docstrings are true."""

import doctest
from importlib import import_module

import pytest


MODULES = [
    "au_llava.action_units",
    "au_llava.configuration_au_llava",
    "au_llava.modeling_au_llava",
    "au_llava.processing_au_llava",
    "au_llava.face_alignment",
    "au_llava.drawing",
    "au_llava.smoothing",
    "au_llava.datasets_scripts.augmentation",
    "au_llava.datasets_scripts.collator",
    "au_llava.datasets_scripts.instructions",
    "au_llava.datasets_scripts.synthetic_faces.expression",
    "checkpoint.language",
    "checkpoint.tokenizer",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
