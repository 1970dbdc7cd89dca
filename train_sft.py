"""Fine-tune AU-LLaVA on instruction samples with TRL's SFTTrainer.

    python train_sft.py --config recipes/smoke.yaml [--any_field value]
    accelerate launch train_sft.py --config recipes/paper_bp4d.yaml --fold 2

Every field of `arguments.py` and of TRL's `SFTConfig` may stand in the recipe or on the command line; see
docs/training.md. A run that was stopped goes on where it stopped.
"""

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import get_token
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
from au_llava.arguments import LORA_TARGETS, TOWERS, read_arguments
from au_llava.datasets_scripts.augmentation import Augmentation
from au_llava.datasets_scripts.collator import NeutralDraft, QuestionCollator
from au_llava.datasets_scripts.instructions import Question, lists_in, relations_in
from au_llava.datasets_scripts.sources import digest_rows, who_is_in
from au_llava.losses import AnswerTargets, AnswerTrainer, presence
from au_llava.shared_prefix import SharedPrefixTrainer
from au_llava.trained_weights import count_weights, freeze, without_lora
from au_llava.trainer import check_space, full_disk_told, last_checkpoint
from au_llava.training_rows import count_rows, read_rows
from evaluation.command import score_command
from push_to_hub import check_private, publish


# Fields that a run may go on with others of: they do not change what is learnt, or the base remembers them.
MAY_CHANGE = ("eval_data", "eval_limit", "resume", "merge", "public_licence")
MAY_CHANGE += ("vision", "language", "gguf_file", "prompt_layout")


def main() -> None:
    arguments, training = read_arguments()
    recipe = Path(sys.argv[sys.argv.index("--config") + 1]).read_text() if "--config" in sys.argv else "none"
    if (token := get_token()) and token in recipe:  # as in `env: {HF_TOKEN: ...}`
        raise ValueError(
            "The recipe holds your Hub token and is printed in the model card; use `hf auth login` instead."
        )
    training.max_length = None  # cutting would cut image tokens
    training.remove_unused_columns = False  # questions are made from labels when a batch is drawn
    output_dir = str(Path(training.output_dir.replace("{fold}", str(arguments.fold))))  # without a slash at its end
    training.output_dir = output_dir
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
