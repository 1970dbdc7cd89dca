"""Tiny random models that behave like the real one; everything runs offline on the CPU."""

import copy
import os
from contextlib import contextmanager
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, LlamaConfig, set_seed

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from checkpoint.begun import Course
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


@contextmanager
def killed(monkeypatch, stage, **at):
    """Within it a training of the module `stage` is killed as soon as it has kept that it is at some place."""

    class Killed(Course):
        def keep(self, **now) -> None:
            super().keep(**now)
            if now == at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "Course", Killed)
        yield


@pytest.fixture
def model(tokenizer):
    return tiny_model(copy.deepcopy(tokenizer))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """The tiny model and its processor, as a user would have them on disk; only to be read."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(copy.deepcopy(tokenizer)).save_pretrained(path)
    AuLlavaProcessor.from_backbones(None, copy.deepcopy(tokenizer), patch_size=56).save_pretrained(path)
    return str(path)


@pytest.fixture
def crops():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
