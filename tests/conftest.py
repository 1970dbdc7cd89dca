"""Tiny random models that behave like the real one; everything runs offline on the CPU."""

import copy
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig, set_seed

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from checkpoint.tokenizer import train_tokenizer


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56)


def tiny_model(tokenizer, seed: int = 0, **text) -> AuLlavaForConditionalGeneration:
    """A model of two small layers on 16 patches of 56 pixels."""
    set_seed(seed)
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, use_mask_token=False
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape | text,
    )  # fmt: skip
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language, tokenizer=tokenizer)
    with torch.no_grad():  # spread the logits, so that answers are not all ties
        model.lm_head.weight.mul_(30)
    return model.eval()


@pytest.fixture
def model(tokenizer):
    return tiny_model(copy.deepcopy(tokenizer))
