"""Fine-tune AU-LLaVA on instruction samples with TRL's SFTTrainer.

    python train_sft.py --config recipes/smoke.yaml [--any_field value]
    accelerate launch train_sft.py --config recipes/paper_bp4d.yaml --fold 2

Every field of `arguments.py` and of TRL's `SFTConfig` may stand in the recipe or on the command line; see
docs/training.md. A run that was stopped goes on where it stopped.
"""

import json
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
from datasets import Dataset, concatenate_datasets
from huggingface_hub import get_token
from torch.nn import Linear
from transformers import set_seed
from transformers.utils import cached_file
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.adapters import (
    MADE_WITH,
    add_code,
    assemble,
    check_made_with,
    check_push,
    ever_seen,
    make_card,
    merge,
    never_seen,
    trained_on,
)
from au_llava.arguments import LORA_TARGETS, TOWERS, AuLlavaArguments, read_arguments
from au_llava.datasets_scripts.augmentation import Augmentation
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import Question, lists_in, mix, relations_in
from au_llava.datasets_scripts.sources import Source, digest_rows, draw_people, set_apart, who_is_in
from au_llava.losses import AnswerTargets, AnswerTrainer, presence
from au_llava.shared_prefix import SharedPrefixTrainer
from au_llava.trainer import check_space, full_disk_told, last_checkpoint
from push_to_hub import check_private, publish


# Fields that a run may go on with others of: they do not change what is learnt, or the base remembers them.
MAY_CHANGE = ("eval_data", "eval_limit", "resume", "merge", "public_licence")
MAY_CHANGE += ("vision", "language", "gguf_file", "prompt_layout")
# Names of linear layers in self-attention; SigLIP's pooling `head` has attention that is none, and is not used.
ATTENTION = re.compile(r"^(?!head\.).*(attn|attention)")
# Options of a source that evaluate_au.py refuses, for its own options say who is asked what.
SETTLED = ("split", "config_name", "fold", "task", "threshold", "action_units")


def read_rows(arguments: AuLlavaArguments) -> tuple[Dataset, Dataset | None, dict[str, list[str]]]:
    """The rows to train on, those to validate on, and by data set the people that were held out of the former."""
    train, validation, people = [], [], {}
    for text in arguments.train_data:
        train += Source(text.replace("{fold}", str(arguments.fold))).rows(questions=arguments.questions)
    if arguments.held_out:  # for all sources at once, for a person may be in several
        people = draw_people(train, arguments.held_out)
        train, validation = zip(*(set_apart(part, people) for part in train), strict=True)
    train = [part.select(range(min(len(part), arguments.limit or len(part)))) for part in train]
    validation = [*validation]
    for text in arguments.eval_data:
        validation += Source(text.replace("{fold}", str(arguments.fold))).rows("validation", arguments.questions)
    few = [
        part.select(np.linspace(0, len(part) - 1, min(len(part), arguments.eval_limit or len(part))).astype(int))
        for part in validation
    ]
    together = mix(train, arguments.weights) if arguments.weights else concatenate_datasets(train)
    return together, concatenate_datasets(few) if few else None, people


def count_rows(splits: dict[str, Dataset | None]) -> list[tuple[str, str, str, int]]:
    """Data set, task, split and number of samples."""
    return [
        (*name, split, count)
        for split, rows in splits.items()
        if rows is not None
        for name, count in Counter(zip(rows["dataset"], rows["task"], strict=True)).items()
    ]


def score_command(model: str, train_data: list[str]) -> str:
    """The command that scores a model on the test people of its data set, or on rendered faces if that is not one set.

    Args:
        model (`str`): Folder.
        train_data (`list[str]`): The sources that it was trained on.

    Example:

    >>> score_command("runs/mine", ["disfa:data/disfa?config_name=fold2&naming=megraphau"]).partition(" --dataset ")[2]
    "disfa --data_dir 'data/disfa?naming=megraphau' --fold 2 --output runs/mine-scores"
    """
    command = ["python", "evaluate_au.py", "--model", model]
    own = [source for source in map(Source, train_data) if source.name not in ("", "synthetic")]
    # Of BP4D, evaluate_au.py asks detection alone.
    own = [source for source in own if source.name != "bp4d" or "task=intensity_level" not in source.text]
    # And of DISFA what is present from the level 2 on, or by the paper's protocol from 3.
    own = [source for source in own if source.name != "disfa" or not re.search("threshold=[145]", source.text)]
    if len(own) == 1:
        name, place = own[0].name, own[0].text.removeprefix(f"{own[0].name}:")
        folder, _, query = place.partition("?")
        settled, options = ("split",) if name == "csv" else SETTLED, dict(parse_qsl(query))
        kept = "&".join(pair for pair in query.split("&") if pair.partition("=")[0] not in settled)
        command += ["--dataset", name, "--data_dir", f"{folder}?{kept}" if kept else folder]
        config = options.get("config_name", "")
        if config == "paper" or options.get("threshold") == "3":
            command += ["--protocol", "paper"]
        if config == "subject":
            command += ["--fold", options.get("fold", "1")]
        elif config.startswith("fold"):
            command += ["--fold", config.removeprefix("fold")]
    return shlex.join([*command, "--output", f"{model}-scores"])


def freeze(model: AuLlavaForConditionalGeneration, parts: list[str]) -> None:
    """Let parts of a model stay as they are; with the language model its head.

    Raises:
        ValueError: There is no such part, or nothing is left to train.
    """
    for name in parts:
        try:
            part = model.get_submodule("lm_head" if name == "lm_head" else f"model.{name}")
        except AttributeError as error:
            known = ", ".join([*(child for child, _ in model.model.named_children()), "lm_head"])
            raise ValueError(f"freeze names {name!r}, which is no part of the model; its parts: {known}.") from error
        part.requires_grad_(False)
        if name == "language_model":
            model.lm_head.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"freeze names {', '.join(parts)}, which leaves nothing to train; name less.")


def count_weights(model: AuLlavaForConditionalGeneration, trained: bool = False) -> dict[str, int]:
    """Numbers in each part, all or the trained ones; a head that is tied to the embeddings counts with them."""
    parts = dict(model.model.named_children())
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        parts["lm_head"] = model.lm_head
    return {
        name: sum(weight.numel() for weight in part.parameters() if weight.requires_grad or not trained)
        for name, part in parts.items()
    }


def without_lora(model: AuLlavaForConditionalGeneration, towers: str) -> list[str]:
    """Linear layers in the self-attention of the chosen towers that have no LoRA, each kind once."""
    return sorted(
        {
            f"{tower}: {name.split('.')[-1]}"
            for tower in TOWERS[towers]
            for name, part in model.model.get_submodule(tower).named_modules()
            if isinstance(part, Linear) and ATTENTION.search(name) and "lora_" not in name and "base_layer" not in name
        }
    )


def main() -> None:
    arguments, training = read_arguments()
    recipe = Path(sys.argv[sys.argv.index("--config") + 1]).read_text() if "--config" in sys.argv else "none"
    if (token := get_token()) and token in recipe:  # as in `env: {HF_TOKEN: ...}`
        raise ValueError(
            "The recipe holds your Hub token and is printed in the model card; use `hf auth login` instead."
        )
    training.max_length = None  # cutting would cut image tokens
    training.remove_unused_columns = False  # questions are made from labels when a batch is drawn
    training.output_dir = output_dir = training.output_dir.replace("{fold}", str(arguments.fold))
    result = f"{output_dir}-merged" if arguments.merge and arguments.lora else output_dir
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, and validated
    resumed = last_checkpoint(output_dir)
    if resumed and not arguments.resume:
        raise ValueError(f"{output_dir} holds checkpoints of another run; give another output_dir, or --resume.")
    set_seed(training.seed)

    # Data
    with training.main_process_first(desc="data"):
        train, validation, held_out = read_rows(arguments)
    if validation is None and training.eval_strategy != "no":
        raise ValueError("eval_strategy is set, but there is no one to validate on: give held_out or eval_data.")

    # Model
    base = arguments.model or f"{output_dir}-base"
    if not arguments.model:
        stored = "float32" if arguments.dtype == "auto" else arguments.dtype
        # On a disk that all machines share one process alone may write.
        with training.main_process_first(local=False, desc="model"), full_disk_told(base):
            layout = arguments.prompt_layout
            assemble(base, arguments.vision, arguments.language, arguments.gguf_file, layout, stored)
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # an adapter is to find it from anywhere
    made_with = {name: value for name, value in asdict(arguments).items() if name not in MAY_CHANGE}
    made_with |= {"model": base, "train_data's rows": digest_rows(train)}
    if resumed:
        check_made_with(output_dir, made_with)
    if cached_file(base, "adapter_config.json", _raise_exceptions_for_missing_entries=False):
        raise ValueError(f"{base} is an adapter; train on from the merged model, which --merge writes.")
    names = trained_on(train.unique("dataset"), base)
    seen = who_is_in([train])
    people = {"held_out.json": never_seen(base, seen, held_out), "trained_on.json": ever_seen(base, seen)}
    public = training.hub_private_repo is False
    if push:
        repo_id = training.hub_model_id or Path(result).name
        check_push(names, public, arguments.public_licence, base if arguments.lora and not arguments.merge else None)
        if not public:
            check_private(repo_id)
        if not get_token():  # the Hub hides private repositories from strangers, so that none of the above tells
            raise ValueError("push_to_hub needs a token of the Hub; run `hf auth login` first, or set HF_TOKEN.")
    dtype = arguments.dtype
    if dtype == "auto" and not (training.bf16 or training.fp16):
        dtype = "float32"  # small steps vanish in the 16 bits that weights are often stored in
    model = AuLlavaForConditionalGeneration.from_pretrained(
        base, dtype=dtype, quantization_config=arguments.quantization_config()
    )
    processor = AuLlavaProcessor.from_pretrained(base)
    processor.calibration = {}  # what was fitted to the base's answers does not fit those to come
    asked = lists_in(train)
    processor.trained_lists |= asked
    processor.free_tasks = [task for task in processor.free_tasks if task not in asked]
    if arguments.subset:  # then it learns to answer about any selection
        processor.free_tasks += asked
    made, expected = (processor.image_tokens, processor.image_token_id), model.config
    if made != (expected.image_seq_length, expected.image_token_id):
        raise ValueError(
            f"{base}: its processor writes {made[0]} image tokens (id {made[1]}) for a picture, and its model expects "
            f"{expected.image_seq_length} (id {expected.image_token_id}); use the processor saved with the model."
        )
    freeze(model, arguments.freeze)
    if arguments.lora and not any(
        re.fullmatch(LORA_TARGETS[arguments.lora], name) for name, _ in model.named_modules()
    ):
        raise ValueError(
            f"lora {arguments.lora} finds no self-attention in the {' or '.join(TOWERS[arguments.lora])} of {base}; "
            "give other towers, or null to train all weights."
        )
    sizes = count_weights(model)

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
        peft_config=arguments.lora_config(),
        data_collator=collator,
        people=people,
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad and (training.bf16 or training.fp16):
            weight.data = weight.data.float()  # small steps vanish in 16 bits
    learnt = count_weights(trainer.core(), trained=True)
    missed = without_lora(trainer.core(), arguments.lora) if arguments.lora else []
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
    # A bare name is not where visitors find it; a folder's name becomes the repository's when it is pushed.
    home = repo_id if push and "/" in repo_id else output_dir
    trainer.card = make_card(
        home, origins, bool(arguments.lora), names, arguments.public_licence, parameters, counts, recipe
    )
    if trainer.is_world_process_zero():
        print(parameters)
        if missed:
            print(f"LoRA does not reach {', '.join(missed)} in self-attention, which stay as they are.")
        for count in counts:
            print("Samples: {} {}, {}: {:,}".format(*count))
        print(f"Steps: {steps:,} of {batch} samples on {training.world_size} process(es).")
        print(f"Going on from {resumed}." if resumed else f"Starting anew in {output_dir}.")
        whole, trained = sum(sizes.values()), sum(learnt.values())
        size = AuLlavaConfig.from_pretrained(base).dtype.itemsize  # merged is what is stored, not what was loaded
        merged = size * model.num_parameters() if arguments.merge and arguments.lora else 0
        check_space(training, steps, trained if arguments.lora else whole, trained, merged)
        Path(output_dir, MADE_WITH).write_text(json.dumps(made_with))
    trainer.note_people(output_dir)
    with full_disk_told(output_dir):
        trainer.train(resume_from_checkpoint=resumed)
        trainer.save_model()

    # Result
    if not trainer.is_world_process_zero():
        return
    trainer.create_model_card()
    if arguments.lora:
        add_code(trainer.core(), output_dir)
    print(f"\nSaved {'an adapter' if arguments.lora else 'a model'} to {output_dir}.")
    if result != output_dir:
        with full_disk_told(result):
            merge(output_dir, result)
        print(f"Saved the merged model to {result}.")
    sources = [text.replace("{fold}", str(arguments.fold)) for text in arguments.train_data]
    print(
        f'Use it: pipeline("facial-action-units", model="{result}", trust_remote_code=True), or AutoModel and '
        f"AutoProcessor.from_pretrained.\nScore it: {score_command(result, sources)}"
    )
    if push:
        revision = training.hub_revision or "main"
        commit = publish(result, repo_id, public=public, revision=revision, public_licence=arguments.public_licence)
        print(f"Pushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
