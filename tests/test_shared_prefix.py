import copy

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaProcessor, shared_prefix
from au_llava.action_units import PRESETS
from au_llava.arguments import LORA_TARGETS
from au_llava.datasets_scripts.collator import QuestionCollator
from au_llava.datasets_scripts.instructions import FEATURES, instruct, make_row
from au_llava.losses import AnswerTargets, AnswerTrainer, presence
from au_llava.shared_prefix import SharedPrefixTrainer


@pytest.fixture(scope="module")
def rows():
    """One question, but some labels unknown, so that prompts and answers of a batch differ in length."""
    rows = []
    for number in range(8):
        values = [float((number + place) % 2) for place in range(12)]
        labels = dict(zip(PRESETS["bp4d"], values, strict=True))
        if number % 3 == 0:
            labels |= {"AU23": float("nan"), "AU24": float("nan")}
        image = Image.effect_noise((224, 224), 30 + 10 * number).convert("RGB")
        origin = {"dataset": "drawn", "subject": str(number), "sequence": "", "frame": number}
        rows.append(make_row(image, labels, "detection", instruct(labels, "detection"), **origin))
    return rows


@pytest.fixture
def change(tokenizer, processor, rows, tmp_path):
    """How far one optimizer step of learning rate 1 moves each weight: its gradient."""
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")

    def run(kind, lora=False, targets=None, **settings) -> dict[str, torch.Tensor]:
        arguments = SFTConfig(
            str(tmp_path), use_cpu=True, gradient_checkpointing=False, max_length=None, report_to="none",
            remove_unused_columns=False, save_strategy="no", max_steps=1, learning_rate=1.0, optim="sgd",
            max_grad_norm=0.0, lr_scheduler_type="constant", disable_tqdm=True,
            **{"bf16": False, "per_device_train_batch_size": 4} | settings,
        )  # fmt: skip
        collate = DataCollatorForVisionLanguageModeling(own, completion_only_loss=True)
        adapter = LoraConfig(
            r=4, target_modules=LORA_TARGETS["both"], modules_to_save=["multi_modal_projector"],
            init_lora_weights=False,
        )  # fmt: skip
        trainer = kind(
            model=tiny_model(copy.deepcopy(tokenizer)), args=arguments,
            train_dataset=Dataset.from_list(rows, features=FEATURES), processing_class=own,
            data_collator=QuestionCollator(collate, targets=targets and targets(own)),
            peft_config=adapter if lora else None,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        learnt = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        for name, weight in learnt.items():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        before = {name: weight.detach().clone() for name, weight in learnt.items()}
        trainer.train()
        return {name: weight.detach() - before[name] for name, weight in learnt.items()}

    return run


def every_setting(processor):
    shares = {("detection", code): 0.25 for code in PRESETS["bp4d"]}
    return AnswerTargets(processor, soft_digits=0.1, rare_weight=0.5, format_weight=0.3, shares=shares)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"lora": True}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        {"lora": True, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "targets": every_setting},
    ],
    ids=["lora", "accumulation", "lora, accumulation and a weighted loss"],
)
def test_one_step_is_that_of_the_plain_path(change, settings):
    plain, shared = change(AnswerTrainer, **settings), change(SharedPrefixTrainer, **settings)
    assert plain.keys() == shared.keys()
    assert any(difference.abs().max() > 1e-3 for difference in plain.values())
    for name, difference in plain.items():
        torch.testing.assert_close(difference, shared[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_path(change, monkeypatch):
    def distance(one, other):
        return sum((one[name] - other[name]).square().sum() for name in one).sqrt()

    kept = []

    def compute_prefix(model, args, kwargs, original=shared_prefix.compute_prefix):
        result = original(model, args, kwargs)
        cache = kwargs["cache" if "cache" in kwargs else "past_key_values"]
        kept.append((cache.layers[0].keys, torch.is_autocast_enabled("cpu")))
        return result

    monkeypatch.setattr(shared_prefix, "compute_prefix", compute_prefix)
    exact = change(AnswerTrainer, lora=True)
    plain, shared = (change(kind, lora=True, bf16=True) for kind in (AnswerTrainer, SharedPrefixTrainer))
    size = distance(exact, {name: torch.zeros(()) for name in exact})
    assert 0 < distance(shared, exact) < 1.5 * distance(plain, exact) + 1e-4 * size
    assert distance(shared, exact) < 0.1 * size
    # The prefix, too, is computed in mixed precision, and its keys then serve the batch of four.
    keys, mixed_precision = kept[0]
    assert mixed_precision and len(keys) == 4 and keys.shape[2] > 300


def test_ddp_gets_the_gradients_of_the_plain_path(tokenizer, processor, rows, process_group):
    """Both passes lie inside the wrapper's one forward pass, so that its hooks see each gradient once and whole."""
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    collate = QuestionCollator(DataCollatorForVisionLanguageModeling(own, completion_only_loss=True))
    batch = dict(collate(copy.deepcopy(rows[:4])))
    plain, model = tiny_model(copy.deepcopy(tokenizer)), tiny_model(copy.deepcopy(tokenizer))
    plain(**batch).loss.backward()

    model.model.register_forward_pre_hook(shared_prefix.compute_prefix, with_kwargs=True)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ids, shared = batch.pop("input_ids"), 300
    batch |= {"input_ids": ids[:, shared:], "prefix_ids": ids[:1, :shared], "labels": batch["labels"][:, shared:]}
    wrapped(**batch, use_cache=False).loss.backward()
    found = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(found[name].grad, weight.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_shares_come_from_the_rows(rows):
    shares = presence(rows)
    assert shares["detection", "AU1"] == 0.5 and shares["detection", "AU24"] == 0.4
