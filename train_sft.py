"""Fine-tune AU-LLaVA on instruction samples with TRL's SFTTrainer.

    python train_sft.py --config recipes/smoke.yaml [--any_field value]
    accelerate launch train_sft.py --config recipes/paper_bp4d.yaml --fold 2

Every field of [`AuLlavaArguments`] and of TRL's `SFTConfig` may stand in the recipe or on the command line; see
docs/training.md. A run that was stopped goes on where it stopped.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import BitsAndBytesConfig, set_seed
from trl import SFTConfig, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.adapters import add_code, assemble, check_push, make_card, merge, trained_on
from au_llava.datasets_scripts.augmentation import Augmentation
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import Question, lists_in, relations_in
from au_llava.datasets_scripts.sources import Source, hold_out
from au_llava.losses import AnswerTargets, AnswerTrainer, presence
from au_llava.shared_prefix import SharedPrefixTrainer
from au_llava.trainer import check_space, full_disk_told, last_checkpoint


# Self-attention projections of both towers, and nothing else (paper, section III-C).
LORA_TARGETS = {
    "both": r".*(vision_tower|language_model).*\.(q|k|v|o)_proj",
    "encoder": r".*vision_tower.*\.(q|k|v|o)_proj",
    "llm": r".*language_model.*\.(q|k|v|o)_proj",
}


@dataclass
class AuLlavaArguments:
    """What is trained, and on what."""

    train_data: list[str] = field(
        metadata={"help": "Sources such as synthetic:FOLDER, bp4d:FOLDER?config_name=fold1, csv:FILE or a folder."}
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Sources whose split `validation` is answered during training."}
    )
    held_out: float = field(
        default=0.0, metadata={"help": "Share (0 to 1) of the training people set apart to validate on instead."}
    )
    fold: int = field(default=1, metadata={"help": "Stands for {fold} in sources and output_dir."})
    model: str | None = field(default=None, metadata={"help": "An AU-LLaVA to start from: Hub id or folder."})
    vision: str = field(default="facebook/dinov2-large", metadata={"help": "Else the vision encoder to start from."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "And the language model."})
    gguf_file: str | None = field(default=None, metadata={"help": "The GGUF file inside the folder `language`."})
    prompt_layout: str = field(default="image_first", metadata={"help": "image_first or text_first."})
    questions: list[str] = field(
        default_factory=lambda: ["detection:bp4d", "intensity_level:disfa", "intensity:feafa"],
        metadata={"help": "What is asked about each rendered face: task:preset or task:codes."},
    )
    limit: int | None = field(default=None, metadata={"help": "Use so many rows of each data set and question only."})
    eval_limit: int = field(default=200, metadata={"help": "And answer so many of each at every validation."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto (as stored), float32, bfloat16..."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the language model in 4 bits (QLoRA)."})
    lora: str | None = field(default="both", metadata={"help": "Towers that get LoRA: both, encoder, llm; or null."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Without LoRA: parts that stay as they are, such as vision_tower."}
    )
    shuffle: bool = field(default=False, metadata={"help": "Ask about the Action Units in random order."})
    subset: float = field(default=0.0, metadata={"help": "Share of questions (0 to 1) about a random part of them."})
    relations: bool = field(
        default=False, metadata={"help": "Tell in T which Action Units go together in the training data."}
    )
    neutral: float = field(
        default=0.0, metadata={"help": "Share of answers (0 to 1) with hidden digits, for the parallel read-out."}
    )
    soft_digits: float = field(
        default=0.0, metadata={"help": "Spread of each label to its neighbours, as a share of the task's range."}
    )
    rare_weight: float = field(default=0.0, metadata={"help": "0 to 1: how far present units count more than absent."})
    format_weight: float = field(default=1.0, metadata={"help": "Weight of brackets, commas, points beside digits."})
    augment: bool = field(default=True, metadata={"help": "Vary the pictures."})
    shared_prefix: bool = field(default=False, metadata={"help": "Compute a batch's common text once (text_first)."})
    resume: bool = field(default=True, metadata={"help": "Go on from the last whole checkpoint in output_dir."})
    merge: bool = field(default=False, metadata={"help": "Also write the model with the adapter merged into it."})
    public_licence: str | None = field(
        default=None, metadata={"help": "What allows weights trained on BP4D, DISFA or FEAFA to be public."}
    )


def read_arguments(options: list[str] | None = None) -> tuple[AuLlavaArguments, SFTConfig]:
    """Recipe and command line, or one ValueError that says what is wrong with them."""
    try:
        arguments, training = TrlParser((AuLlavaArguments, SFTConfig)).parse_args_and_config(options)
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"The recipe cannot be read: {error}") from error
    for name in ("train_data", "eval_data", "questions", "freeze"):
        value = getattr(arguments, name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"The recipe's {name} is {value!r}; give a list of texts")
    if arguments.lora == "null":  # on the command line it is a word
        arguments.lora = None
    if arguments.lora not in (None, *LORA_TARGETS):
        raise ValueError(f"Unknown lora {arguments.lora!r}; accepted: {', '.join(LORA_TARGETS)}, null.")
    return arguments, training


def read_rows(arguments: AuLlavaArguments) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to validate on."""
    train, validation = [], []
    for text in arguments.train_data:
        for part in Source(text.replace("{fold}", str(arguments.fold))).rows(questions=arguments.questions):
            if arguments.held_out:
                part, apart = hold_out(part, arguments.held_out)
                validation.append(apart)
            train.append(part.select(range(min(len(part), arguments.limit or len(part)))))
    for text in arguments.eval_data:
        validation += Source(text.replace("{fold}", str(arguments.fold))).rows("validation", arguments.questions)
    few = [
        part.select(np.linspace(0, len(part) - 1, min(len(part), arguments.eval_limit)).astype(int))
        for part in validation
    ]
    return concatenate_datasets(train), concatenate_datasets(few) if few else None


def count_rows(splits: dict[str, Dataset | None]) -> list[tuple[str, str, str, int]]:
    """Data set, task, split and number of samples."""
    return [
        (*name, split, count)
        for split, rows in splits.items()
        if rows is not None
        for name, count in Counter(zip(rows["dataset"], rows["task"], strict=True)).items()
    ]


def main() -> None:
    arguments, training = read_arguments()
    recipe = Path(sys.argv[sys.argv.index("--config") + 1]).read_text() if "--config" in sys.argv else "none"
    training.max_length = None  # cutting would cut image tokens
    training.remove_unused_columns = False  # questions are made from labels when a batch is drawn
    training.output_dir = output_dir = training.output_dir.replace("{fold}", str(arguments.fold))
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, and validated
    resumed = last_checkpoint(output_dir)
    if resumed and not arguments.resume:
        raise ValueError(f"{output_dir} holds checkpoints of another run; give another output_dir, or --resume.")
    set_seed(training.seed)

    # Data
    with training.main_process_first(desc="data"):
        train, validation = read_rows(arguments)
    if validation is None and training.eval_strategy != "no":
        raise ValueError("eval_strategy is set, but there is no one to validate on: give held_out or eval_data.")

    # Model
    base = arguments.model or f"{output_dir}-base"
    if not arguments.model:
        stored = "float32" if arguments.dtype == "auto" else arguments.dtype
        with training.main_process_first(desc="model"), full_disk_told(base):
            layout = arguments.prompt_layout
            assemble(base, arguments.vision, arguments.language, arguments.gguf_file, layout, stored)
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # an adapter is to find it from anywhere
    if Path(base, "adapter_config.json").is_file():
        raise ValueError(f"{base} is an adapter; train on from the merged model, which --merge writes.")
    names = trained_on(train.unique("dataset"), base)
    public = training.hub_private_repo is False
    if push:
        check_push(names, public, arguments.public_licence, base if arguments.lora and not arguments.merge else None)
    quantization = None
    if arguments.load_in_4bit:
        skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=skipped,
        )
    model = AuLlavaForConditionalGeneration.from_pretrained(
        base, dtype=arguments.dtype, quantization_config=quantization
    )
    processor = AuLlavaProcessor.from_pretrained(base)
    asked = lists_in(train)
    if arguments.shuffle or arguments.subset:  # then it learns to answer about any selection
        processor.trained_lists = {task: kept for task, kept in processor.trained_lists.items() if task not in asked}
    else:
        processor.trained_lists |= asked
    made, expected = (processor.image_tokens, processor.image_token_id), model.config
    if made != (expected.image_seq_length, expected.image_token_id):
        raise ValueError(
            f"{base}: its processor writes {made[0]} image tokens (id {made[1]}) for a picture, and its model expects "
            f"{expected.image_seq_length} (id {expected.image_token_id}); use the processor saved with the model."
        )
    peft_config = None
    if arguments.lora:
        peft_config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=LORA_TARGETS[arguments.lora],
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        )
    for part in arguments.freeze:
        model.model.get_submodule(part).requires_grad_(False)
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.model.named_children()}

    # Training
    targets = None
    if arguments.soft_digits or arguments.rare_weight or arguments.format_weight != 1:
        targets = AnswerTargets(
            processor,
            arguments.soft_digits,
            arguments.rare_weight,
            arguments.format_weight,
            presence(train.select_columns(["task", "action_units", "labels"])),
        )
    collator = QuestionCollator(
        DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True),
        Augmentation() if arguments.augment else None,
        Question(arguments.shuffle, arguments.subset, relations_in(train) if arguments.relations else None),
        NeutralDraft(processor, arguments.neutral) if arguments.neutral else None,
        targets,
        training.seed,
    )
    trainer_class = SharedPrefixTrainer if arguments.shared_prefix else AnswerTrainer
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        peft_config=peft_config,
        data_collator=collator,
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad and (training.bf16 or training.fp16):
            weight.data = weight.data.float()  # small steps vanish in 16 bits
    learnt = {
        name: sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
        for name, part in trainer.core().model.named_children()
    }
    parameters = "Parameters (trained / all): " + "; ".join(
        f"{name} {learnt[name]:,} / {size:,}" for name, size in sizes.items()
    )
    parameters += f"; together {sum(learnt.values()):,} trained."
    counts = count_rows({"train": train, "validation": validation})
    batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps < 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(len(train) / batch))
    origins = [base] if arguments.model else [arguments.vision, arguments.language]
    home = training.hub_model_id if push and training.hub_model_id else output_dir
    trainer.card = make_card(
        home, origins, bool(peft_config), names, arguments.public_licence, parameters, counts, recipe
    )
    if trainer.is_world_process_zero():
        print(parameters)
        for count in counts:
            print("Samples: {} {}, {}: {:,}".format(*count))
        print(f"Steps: {steps:,} of {batch} samples on {training.world_size} process(es).")
        print(f"Going on from {resumed}." if resumed else f"Starting anew in {output_dir}.")
        whole, trained = sum(sizes.values()), sum(learnt.values())
        merged = whole if arguments.merge and peft_config else 0
        check_space(training, steps, trained if peft_config else whole, trained, merged)
    with full_disk_told(output_dir):
        trainer.train(resume_from_checkpoint=resumed)
        trainer.save_model()

    # Result
    if not trainer.is_world_process_zero():
        return
    trainer.create_model_card()
    if peft_config:
        add_code(trainer.core(), output_dir)
    result = output_dir
    print(f"\nSaved {'an adapter' if peft_config else 'a model'} to {result}.")
    if arguments.merge and peft_config:
        result = f"{output_dir}-merged"
        with full_disk_told(result):
            merge(output_dir, result)
        print(f"Saved the merged model to {result}.")
    print(
        f'Use it: pipeline("facial-action-units", model="{result}", trust_remote_code=True), or AutoModel and '
        f"AutoProcessor.from_pretrained.\nScore it: python evaluate_au.py --model {result} --output {result}-scores"
    )
    if push:
        from push_to_hub import publish

        print(f"Pushed: {publish(result, training.hub_model_id or Path(result).name, public=public).commit_url}")


if __name__ == "__main__":
    main()
