import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import train_sft
from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.arguments import LORA_TARGETS, read_arguments
from au_llava.datasets_scripts.augmentation import Augmentation
from au_llava.datasets_scripts.collator import QuestionCollator, QuestionSampler
from au_llava.datasets_scripts.instructions import FEATURES, Question, Relations, instruct, make_row
from au_llava.losses import AnswerTrainer
from au_llava.shared_prefix import SharedPrefixTrainer
from au_llava.trainer import AuLlavaTrainer, scores


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    rows = []
    for number in range(8):
        image = Image.fromarray(generator.integers(0, 255, (224, 224, 3), dtype=np.uint8))
        labels = dict.fromkeys(["AU1", "AU6", "AU12"], float(number % 2))
        origin = {"dataset": "drawn", "subject": str(number), "sequence": "", "frame": number}
        rows.append(make_row(image, labels, "detection", instruct(labels, "detection"), **origin))
    return rows


@pytest.fixture(params=["text_first", "image_first"])
def layout(request, processor):
    return AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout=request.param)


def make_trainer(kind, model, processor, rows, folder, peft_config=None, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1} | settings
    arguments = SFTConfig(
        str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to="none",
        remove_unused_columns=False, logging_steps=1, save_strategy="no", **settings,
    )  # fmt: skip
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return kind(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows, features=FEATURES),
        processing_class=processor, data_collator=QuestionCollator(collate),
        peft_config=peft_config,
    )  # fmt: skip


def test_loss_is_on_the_answer_and_its_end_only(layout, rows):
    collator = QuestionCollator(DataCollatorForVisionLanguageModeling(layout, completion_only_loss=True))
    batch = collator(rows[:2])
    learnt = [layout.tokenizer.decode(line[line != -100]) for line in batch["labels"]]
    assert learnt == [" [0, 0, 0]</s>", " [1, 1, 1]</s>"]


def test_a_batch_asks_one_question_and_flips_keep_its_order(layout):
    image = Image.new("RGB", (224, 224), "tan")
    codes = [f"FEAFA{number}" for number in range(1, 25)]
    labels = {code: number / 100 for number, code in enumerate(codes)}
    origin = {"dataset": "drawn", "subject": "a", "sequence": "", "frame": 0}
    row = make_row(image, labels, "intensity", instruct(labels, "intensity"), **origin)
    collate = DataCollatorForVisionLanguageModeling(layout, completion_only_loss=True)
    collator = QuestionCollator(collate, Augmentation(flip=0.5), Question(shuffle=True, subset=0.5))
    asked = set()
    for collator.epoch in range(5):
        batch = collator([copy.deepcopy(row) for _ in range(6)])
        prompts = {layout.tokenizer.decode(line[label == -100]).split(" ASSISTANT:")[0]
                   for line, label in zip(batch["input_ids"], batch["labels"], strict=True)}  # fmt: skip
        assert len(prompts) == 1
        asked |= prompts
    assert len(asked) > 1  # epochs differ, and each is drawn the same again
    again = collator([copy.deepcopy(row) for _ in range(6)])
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


def test_augmented_one_sided_units_are_still_asked_about(processor):
    labels = {"FEAFA1": 0.5}
    origin = {"dataset": "own", "subject": "a", "sequence": "", "frame": 0}
    row = make_row(Image.new("RGB", (224, 224)), labels, "intensity", instruct(labels, "intensity"), **origin)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = QuestionCollator(collate, Augmentation(flip=1.0))([row])
    assert "FEAFA1 " in processor.tokenizer.decode(batch["input_ids"][0])


def test_validation_asks_as_users_do(layout, rows):
    """In order, about everything, and without the relations that only training tells of."""
    collate = DataCollatorForVisionLanguageModeling(layout, completion_only_loss=True)
    question = Question(shuffle=True, subset=0.5, relations=Relations((("AU6", "AU12", 0.85, 0.54),)))
    collator = QuestionCollator(collate, Augmentation(), question)
    told = [layout.tokenizer.decode(collator(rows[number : number + 1])["input_ids"][0]) for number in range(8)]
    assert any("in 85 % of frames" in text for text in told)
    batch = collator.plain()(rows[:1])
    users = layout(images=rows[0]["images"], task="detection", action_units="AU1,AU6,AU12")
    asked = batch["input_ids"][0][batch["labels"][0] == -100]
    assert layout.tokenizer.decode(asked) == layout.tokenizer.decode(users["input_ids"][0])
    assert torch.equal(batch["pixel_values"], users["pixel_values"])


def test_evaluate_scores_the_rows_that_it_is_given(tokenizer, processor, rows, tmp_path):
    """Of the same answers the errors to the lowest and to the highest label add up to the range."""
    trainer = make_trainer(AuLlavaTrainer, tiny_model(copy.deepcopy(tokenizer)), processor, rows, tmp_path)
    errors = []
    for level in (0.0, 5.0):
        given = [row | {"task": "intensity_level", "labels": [level] * 3} for row in rows]
        found = trainer.evaluate(Dataset.from_list(given, features=FEATURES), metric_key_prefix="other")
        errors.append(found["other_intensity_level_mae"])
    assert sum(errors) == pytest.approx(5, abs=1e-3)


def test_a_task_without_a_known_label_is_not_scored():
    unknown, level = np.full((2, 1), np.nan), np.array([[2.0], [3.0]])
    found = scores({"detection": [(["AU1"], unknown, unknown)], "intensity_level": [(["AU1"], level, level + 1)]})
    assert found == {"intensity_level_mae": 1.0, "score": 0.8}
    with pytest.raises(ValueError, match="no label is known"):
        scores({"detection": [(["AU1"], unknown, unknown)]})


def test_the_shared_prefix_gives_the_same_loss_and_gradients(tokenizer, layout, rows, tmp_path):
    results = []
    for kind in (SFTTrainer, SharedPrefixTrainer):
        model = tiny_model(copy.deepcopy(tokenizer))
        trainer = make_trainer(kind, model, layout, rows, tmp_path)
        batch = trainer.data_collator(copy.deepcopy(rows[:4]))
        model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}))
    (plain, gradients), (shared, other) = results
    torch.testing.assert_close(plain, shared, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == other.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-4, rtol=1e-3, msg=name)


def test_text_first_shares_the_whole_description(tokenizer, processor, rows, tmp_path):
    lengths = {}
    for name in ("text_first", "image_first"):
        own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout=name)
        trainer = make_trainer(SharedPrefixTrainer, tiny_model(copy.deepcopy(tokenizer)), own, rows, tmp_path)
        batch = trainer.data_collator(copy.deepcopy(rows[:4]))
        lengths[name] = trainer.shared_length(batch["input_ids"])
    assert lengths["text_first"] > 3 * lengths["image_first"]


@pytest.mark.parametrize("kind", [SFTTrainer, SharedPrefixTrainer])
def test_full_training_moves_every_weight_and_learns(tokenizer, processor, rows, tmp_path, kind):
    own = AuLlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=56, prompt_layout="text_first")
    model = tiny_model(copy.deepcopy(tokenizer))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(kind, model, own, rows, tmp_path, max_steps=6, learning_rate=5e-3)
    trainer.train()
    still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert not [name for name in still if not name.endswith("key.bias")]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", [AnswerTrainer, SharedPrefixTrainer])
def test_questions_longer_than_the_table_of_places_are_one_clear_error(tokenizer, processor, rows, tmp_path, kind):
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer), "n_positions": 180}
    model = AuLlavaForConditionalGeneration.from_backbones(vision, GPT2Config(**size), copy.deepcopy(tokenizer))
    with pytest.raises(ValueError, match="tokens long, but gpt2 has places for 180; ask about fewer Action Units"):
        make_trainer(kind, model, processor, rows, tmp_path).train()


def test_several_processes_do_without_weights_on_which_no_patch_depends(process_group, tmp_path):
    options = ["--train_data", "x", "--output_dir", str(tmp_path), "--bf16", "false", "--lora", "null"]
    find_unused = bool(read_arguments(options)[1].ddp_find_unused_parameters)  # so does transformers take it
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
    language = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    ids = torch.tensor([[99] * 16 + [1, 2, 3]])
    for _ in range(2):
        wrapped(input_ids=ids, pixel_values=torch.randn(1, 3, 224, 224), labels=ids).loss.backward()
    assert model.model.vision_tower.embeddings.mask_token.grad is None


@pytest.mark.parametrize("towers", ["both", "encoder", "llm"])
def test_lora_trains_attention_of_the_chosen_towers_and_the_projector(tokenizer, processor, rows, tmp_path, towers):
    from peft import LoraConfig

    config = LoraConfig(
        r=8, target_modules=LORA_TARGETS[towers], modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM"
    )
    trainer = make_trainer(
        SFTTrainer, tiny_model(copy.deepcopy(tokenizer)), processor, rows, tmp_path, peft_config=config
    )
    learnt = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    lora = {name for name in learnt if "lora_" in name}
    assert learnt - lora == {
        f"base_model.model.model.multi_modal_projector.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert len(lora) == 2 * 4 * 2 * (2 if towers == "both" else 1)  # A and B, four projections, two layers a tower
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == learnt


@pytest.mark.parametrize("kind", [CLIPVisionConfig, SiglipVisionConfig, ViTConfig, Dinov2WithRegistersConfig])
def test_lora_reaches_all_of_attention_in_other_encoders(kind):
    from peft import LoraConfig, get_peft_model

    from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration

    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        config = AuLlavaConfig(vision_config=kind(**shape), text_config=LlamaConfig(vocab_size=32001, **text))
        model = AuLlavaForConditionalGeneration(config)
        model = get_peft_model(model, LoraConfig(target_modules=LORA_TARGETS["encoder"]), low_cpu_mem_usage=True)
    learnt = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learnt) == 3 * 4 * 2 and not [name for name in learnt if "head." in name]


@pytest.mark.parametrize(
    ("kind", "count", "missed"),
    [
        (Phi3Config, 2, []),
        (GPTNeoXConfig, 2, []),
        (PhiConfig, 4, []),
        (GPTJConfig, 3, ["language_model: out_proj"]),
        (GPT2Config, 2, []),
    ],
    ids=["phi3", "gpt_neox", "phi", "gptj", "gpt2"],
)
def test_lora_reaches_attention_in_other_language_models_or_it_is_told(kind, count, missed):
    from peft import LoraConfig, get_peft_model

    from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration

    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 32001}
    text = kind(**shape, tie_word_embeddings=False, pad_token_id=0, rotary_dim=8)
    vision = ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, image_size=28, patch_size=14)
    with torch.device("meta"):
        model = AuLlavaForConditionalGeneration(AuLlavaConfig(vision_config=vision, text_config=text))
        model = get_peft_model(model, LoraConfig(target_modules=LORA_TARGETS["llm"]), low_cpu_mem_usage=True)
    learnt = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learnt) == 3 * count * 2
    assert train_sft.without_lora(model.get_base_model(), "llm") == missed


def test_sampler_gives_every_row_once_and_whole_batches_of_one_question():
    questions = ["a"] * 10 + ["b"] * 7
    sampler = QuestionSampler(questions, batch_size=4, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(17)) and order == list(sampler)
    for start in range(0, 12, 4):
        assert len({questions[row] for row in order[start : start + 4]}) == 1
    sampler.set_epoch(1)
    assert list(sampler) != order
