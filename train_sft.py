"""Fine-tune AU-LLaVA on instruction samples with TRL's SFTTrainer.

    python train_sft.py --config recipes/checkpoint.yaml [--any_field value]
    accelerate launch train_sft.py --config recipes/paper_bp4d.yaml

Every field of [`AuLlavaArguments`] and of TRL's `SFTConfig` may stand in the recipe or on the command line.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from trl import SFTConfig, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.datasets_scripts.augmentation import Augmentation
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import Question
from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces
from au_llava.face_alignment import CROP_SIZE
from au_llava.losses import AnswerTargets, AnswerTrainer, presence
from au_llava.shared_prefix import SharedPrefixTrainer


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
        metadata={"help": "Folders of Parquet shards: prepared data sets, or synthetic:FOLDER for rendered faces."}
    )
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
    lora: str | None = field(default="both", metadata={"help": "Towers that get LoRA: both, encoder, llm; or null."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Without LoRA: parts that stay as they are, such as vision_tower."}
    )
    shuffle: bool = field(default=False, metadata={"help": "Ask about the Action Units in random order."})
    subset: float = field(default=0.0, metadata={"help": "Share of questions (0 to 1) about a random part of them."})
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


def load_rows(source: str, questions: list[str]) -> list[Dataset]:
    """The training rows of one data set, in the columns of `instructions.FEATURES`."""
    if not source.startswith("synthetic:"):
        return [Dataset.from_parquet([str(path) for path in sorted(Path(source).glob("*.parquet"))])]
    parts = []
    for question in questions:
        task, units = question.split(":")
        builder = SyntheticFaces(config_name=task, data_dir=source.removeprefix("synthetic:"), action_units=units)
        builder.download_and_prepare()
        parts.append(builder.as_dataset("train"))
    return parts


def main() -> None:
    parser = TrlParser((AuLlavaArguments, SFTConfig))
    arguments, training = parser.parse_args_and_config()
    training.max_length = None  # cutting would cut image tokens
    training.remove_unused_columns = False  # questions are made from labels when a batch is drawn

    # Model
    if arguments.model:
        model = AuLlavaForConditionalGeneration.from_pretrained(arguments.model)
        processor = AuLlavaProcessor.from_pretrained(arguments.model)
    else:
        model = AuLlavaForConditionalGeneration.from_backbones(
            arguments.vision, arguments.language, gguf_file=arguments.gguf_file
        )
        processor = AuLlavaProcessor.from_backbones(
            arguments.vision,
            arguments.language,
            patch_size=CROP_SIZE // math.isqrt(model.config.image_seq_length),
            gguf_file=arguments.gguf_file,
            prompt_layout=arguments.prompt_layout,
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

    # Data
    parts = [part for source in arguments.train_data for part in load_rows(source, arguments.questions)]
    train = concatenate_datasets([part.select(range(min(len(part), arguments.limit or len(part)))) for part in parts])
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
        Question(shuffle=arguments.shuffle, subset=arguments.subset),
        NeutralDraft(processor, arguments.neutral) if arguments.neutral else None,
        targets,
    )

    # Training
    trainer_class = SharedPrefixTrainer if arguments.shared_prefix else AnswerTrainer
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train,
        processing_class=processor,
        peft_config=peft_config,
        data_collator=collator,
    )
    sizes = {name: sum(w.numel() for w in part.parameters()) for name, part in model.model.named_children()}
    learnt = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    print(f"Parameters: {sizes}; trainable: {learnt:,}")
    print(f"Samples: {len(train):,} from {', '.join(arguments.train_data)}")
    trainer.train(resume_from_checkpoint=any(Path(training.output_dir).glob("checkpoint-*")))
    trainer.save_model()
    processor.save_pretrained(training.output_dir)
    print(f"Saved to {training.output_dir}; load it with AutoModel.from_pretrained(..., trust_remote_code=True).")


if __name__ == "__main__":
    main()
