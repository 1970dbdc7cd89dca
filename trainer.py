"""The trainer behind `train_sft.py`: TRL's, validated by answers, and made to survive."""

import errno
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from sklearn.metrics import f1_score
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from .action_units import get_task
from .datasets_scripts.collator import QuestionCollator, QuestionSampler
from .modeling_au_llava import AuLlavaForConditionalGeneration
from .processing_au_llava import AuLlavaProcessor


class AuLlavaTrainer(SFTTrainer):
    """TRL's `SFTTrainer` for rows of `instructions.FEATURES`.

    - [`evaluate`] also asks the model, through `recognize`, and scores its answers: `eval_detection_f1`,
      `eval_intensity_mae` and so on, and `eval_score`, their mean as in [`scores`], to choose the best checkpoint by.
    - A loss that is not a number ends the run at once, before it is saved.
    - The order of rows and what is drawn for a batch depend on seed, epoch and rows alone, so a resumed run goes on
      exactly as it would have.

    Args:
        card (`str`, *optional*): The model card, written wherever the trainer writes one.
        people (`dict`, *optional*): By file name, whom the weights know, and whom not: written beside all of them.
        kwargs: As for `SFTTrainer`.

    Raises:
        ValueError: Answers cannot be asked for while the weights are spread over devices (FSDP, ZeRO-3), and processes
            that outlive an epoch (`dataloader_persistent_workers`) would draw the same again in the next one.
    """

    processing_class: AuLlavaProcessor
    data_collator: QuestionCollator

    def __init__(self, *args, card: str | None = None, people: dict[str, dict] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.card, self.people = card, people or {}
        self.args.logging_nan_inf_filter = False  # it would hide what `training_step` looks for
        self.add_callback(_SetEpoch(self))
        if self.args.dataloader_persistent_workers:
            raise ValueError(
                "Processes that stay are not told that a new epoch begins, and would ask and augment as in the first "
                "one again: set dataloader_persistent_workers to false."
            )
        self.spread = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # no single process holds the weights
        if self.spread and self.args.eval_strategy != "no":
            raise ValueError(
                "With FSDP or ZeRO-3 no single process holds the model, which answers need: set eval_strategy to 'no' "
                "and score the checkpoints with evaluate_au.py."
            )

    def core(self):
        """The model itself, LoRA included, without what PEFT and Accelerate wrapped around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # Order and draws

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = QuestionSampler(
            self.questions(rows), self.args.train_batch_size * self.args.world_size, self.args.seed
        )
        return self.sampler

    def questions(self, rows: Dataset) -> list[str]:
        """What may not be mixed in one batch; here everything may."""
        return [""] * len(rows)

    # Survival

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}, and everything after it would be "
                "lost. Lower learning_rate or max_grad_norm, or train in bf16 or float32 instead of fp16; --resume "
                "goes on from the last checkpoint, which is sound."
            )
        return loss

    # `Trainer` would load a full checkpoint by the names in memory, and pass over in silence all weights that are
    # stored under others: those of DINOv2's self-attention.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            restore(self.model, str(self.state.best_model_checkpoint))

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs)
        # Of a run that ended within an epoch `Trainer` would take one step more, each time it is given again.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):  # DeepSpeed has one of its own
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        given = schedule.base_lrs
        settings = ("weight_decay", "betas", "eps")
        kept = [{name: own[name] for name in settings if name in own} for own in schedule.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        # States bring their rates, decays and the place in the old schedule along; those of the arguments count.
        schedule.base_lrs = given
        groups = schedule.optimizer.param_groups
        for group, own, rate, share in zip(groups, kept, given, schedule.lr_lambdas, strict=True):
            group |= own | {"initial_lr": rate, "lr": rate * share(schedule.last_epoch)}
        schedule._last_lr = [group["lr"] for group in groups]

    def note_people(self, folder: str) -> None:
        """Write beside weights whom they know; without it `evaluate_au.py` would test them on anyone."""
        if self.is_world_process_zero():
            for file, names in self.people.items():
                Path(folder, file).write_text(json.dumps(names, indent=1))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.note_people(output_dir)
        # The main process now writes trainer_state.json, which tells a whole checkpoint from a part of one.
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args, **kwargs) -> None:
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(self.card, encoding="utf-8")

    # Validation

    def get_eval_dataloader(self, eval_dataset=None):
        collator = self.data_collator
        self.data_collator = collator.plain()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None  # `Trainer` always gives some
        found = scores(self.answers(dataloader.dataset))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def answers(self, rows: Dataset) -> dict[str, list[tuple[list[str], np.ndarray, np.ndarray]]]:
        """Ask the model about all rows; the processes share the work.

        Returns:
            `dict`: By task a list of `(codes, labels, values)`, the arrays of shape `(samples, units)`.
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for number, (task, codes) in enumerate(zip(rows["task"], rows["action_units"], strict=True)):
            groups[task, tuple(codes)].append(number)
        model, processor, every, found = self.core(), self.processing_class, list(rows["labels"]), []
        for (task, codes), numbers in groups.items():
            labels = np.array([every[number] for number in numbers], float)
            known = [code for code, column in zip(codes, labels.T, strict=True) if not np.isnan(column).all()]
            asked = processor.questions(task, known) if known else []
            grammars = [processor.grammar(*question) for question in asked]
            units = [unit.code for _, whole in asked for unit in whole]
            columns, places = ([some.index(code) for code in known] for some in (codes, units))
            mine = slice(self.args.process_index, None, self.args.world_size)
            for start in range(0, len(numbers[mine]), self.args.eval_batch_size):
                batch = slice(start, start + self.args.eval_batch_size)
                crops, told = [images[0] for images in rows[numbers[mine][batch]]["images"]], []
                for (about, whole), grammar in zip(asked, grammars, strict=True):
                    inputs = processor(images=crops, task=about, action_units=whole)
                    with self.accelerator.autocast():
                        answer = model.recognize(**inputs, grammar=grammar, mirror=processor.mirror)
                    told.append(processor.told(answer, about, task, whole, calibrated=False).values.float().cpu())
                values = np.full((len(crops), len(codes)), np.nan)
                if told:
                    values[:, columns] = torch.cat(told, 1)[:, places]
                found.append((task, codes, labels[mine][batch], values))
        joined: dict[tuple, list] = defaultdict(list)
        for task, codes, labels, values in gather_object(found):
            joined[task, codes].append((labels, values))
        answers: dict[str, list] = defaultdict(list)
        for (task, codes), parts in sorted(joined.items()):
            labels, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            answers[task].append((list(codes), labels, values))
        return answers


class _SetEpoch(TrainerCallback):
    """Tells sampler and collator which epoch begins; through Accelerate's wrappers it does not reach them reliably."""

    def __init__(self, trainer: AuLlavaTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        self.trainer.sampler.set_epoch(epoch)
        self.trainer.data_collator.epoch = epoch


def scores(answers: dict[str, list[tuple[list[str], np.ndarray, np.ndarray]]]) -> dict[str, float]:
    """Mean F1 or MAE over Action Units for each task, and one number to compare checkpoints by.

    Args:
        answers (`dict`): From [`AuLlavaTrainer.answers`].

    Returns:
        `dict`: `detection_f1` (0 to 1), or `TASK_mae` in the task's own range, for each task; `score` (0 to 1), the
        mean over the tasks of F1 and of 1 - MAE / range. Unknown labels are left out, and so is a task that has no
        others; a unit that is neither present nor found has F1 0.

    Raises:
        ValueError: No label is known.

    Example:

    >>> labels, values = np.array([[1.0, 0.0], [1.0, np.nan]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> scores({"detection": [(["AU1", "AU2"], labels, values)]})["detection_f1"]
    0.3333
    """
    found, parts = {}, []
    for task, sets in answers.items():
        low, *_, high = get_task(task).values
        detection = len(get_task(task).values) == 2
        units = []
        for _, labels, values in sets:
            for label, value in zip(labels.T, values.T, strict=True):
                seen = ~np.isnan(label)
                if detection and seen.any():
                    units.append(float(f1_score(label[seen], value[seen], zero_division=0)))
                elif seen.any():
                    units.append(float(np.abs(label[seen] - value[seen]).mean()))
        if not units:
            continue
        mean = float(np.mean(units))
        found[f"{task}_{'f1' if detection else 'mae'}"] = round(mean, 4)
        parts.append(mean if detection else 1 - mean / (high - low))
    if not parts:
        raise ValueError("Of the rows to validate on no label is known; give rows with labels.")
    return found | {"score": round(float(np.mean(parts)), 4)}


def restore(model: AuLlavaForConditionalGeneration, folder: str) -> None:
    """Give a model that is being trained in full the weights of a checkpoint, all of them.

    Args:
        model ([`AuLlavaForConditionalGeneration`]): Keeps its own precision.
        folder (`str`): What `save_pretrained` wrote.

    Raises:
        RuntimeError: The checkpoint is of a model of another shape.
    """
    model.load_state_dict(AuLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint; what a killed run left half-written is passed over.

    `trainer_state.json` is written last, so a folder in which it can be read is whole.

    Args:
        output_dir: The run's folder.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


# What safetensors and torch say when a disk is full: their files are not written by Python.
DISK_FULL = ("No space left", "os error 28", "iostream error", "failed writing file")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, as Python, torch and safetensors each say it."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in DISK_FULL)


@contextmanager
def full_disk_told(folder: str | Path) -> Iterator[None]:
    """Make one clear error of whatever a writer says when the disk is full.

    Args:
        folder: Where it was writing.

    Raises:
        OSError: The disk is full; `errno` is `ENOSPC`.

    Example:

    >>> with full_disk_told("runs/mine"):
    ...     pass  # save a checkpoint there
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC, "The disk is full. Free some space and give the same command again: it goes on from the "
            "last whole checkpoint. No space left in", str(folder),
        ) from error  # fmt: skip


def check_space(training: TrainingArguments, steps: int, weights: int, learnt: int, merged: int = 0) -> None:
    """See before a training whether the disk has room for the most that will lie in its folder at a time.

    Args:
        training (`TrainingArguments`): Where, how often and how many checkpoints are kept. What a run
            before has left there counts as room, for it is among the checkpoints that are counted.
        steps (`int`): Optimizer steps of the run.
        weights (`int`): Numbers in the weights of a checkpoint, of four bytes each.
        learnt (`int`): Trained numbers among them; the optimizer keeps two more for each.
        merged (`int`, *optional*, defaults to 0): Bytes of the model that is merged at the end.

    Raises:
        OSError: It has not; `errno` is `ENOSPC`.
    """
    if training.save_strategy == "no":
        checkpoints = 0
    elif training.save_strategy == "epoch":
        checkpoints = math.ceil(training.num_train_epochs)
    else:
        checkpoints = math.ceil(steps / training.save_steps if training.save_steps >= 1 else 1 / training.save_steps)
    if training.save_total_limit:  # the last and the best one stay, and the next is written before another goes
        kept = max(training.save_total_limit, 2 if training.load_best_model_at_end else 1)
        checkpoints = min(checkpoints, kept + 1)
    needed = 4 * (checkpoints * (weights + 2 * learnt) + weights) + merged
    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise OSError(
            errno.ENOSPC,
            f"The run will write up to {needed / 1e9:.1f} GB, and only {(free + there) / 1e9:.1f} GB are free for it "
            "(save_total_limit bounds the checkpoints) in",
            str(folder),
        )
