"""A vision encoder and linear heads on it go on learning together, for as much computing as a language model took."""

from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import nn
from tqdm import tqdm

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.backbones_au_llava import patches_of
from au_llava.datasets_scripts.augmentation import Augmentation, mirror_labels
from checkpoint.begun import KEEP, Course
from checkpoint.cost import operations
from checkpoint.pretrain import autocast
from checkpoint.rate import set_rate
from evaluation.data import EvaluationSet
from evaluation.scores import is_detection


def mean_features(model: AuLlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """`(pictures, width)`: the mean over patches of what the projector reads."""
    pixels = pixels.to(model.device, model.dtype)
    states = model.model.vision_tower(pixels).last_hidden_state
    return patches_of(states, pixels, model.config.vision_config).mean(1).float()


def augmented(pictures: EvaluationSet, rows: list[int], generator: np.random.Generator) -> tuple[list, torch.Tensor]:
    """Some pictures, changed at random, and the labels that belong to them, `(rows, units of all tasks)`.

    A picture is flipped only where its mirror image has labels for the same units, as in [`Augmentation`].
    """
    change, images, labels = Augmentation(flip=0), [], []
    for row, image in zip(rows, pictures.pictures(rows), strict=True):
        known = {task: dict(zip(pictures.units[task], values[row], strict=True))
                 for task, values in pictures.labels.items()}  # fmt: skip
        mirrored = {task: mirror_labels(own) for task, own in known.items()}
        if generator.random() < 0.5 and _units(mirrored) == _units(known):
            image, known = ImageOps.mirror(image), mirrored
        images.append(change(image.convert("RGB"), {}, generator)[0])
        # Mirrored, a unit that is unknown may be one that has no column.
        labels.append([own.get(code, np.nan) for task, own in known.items() for code in pictures.units[task]])
    return images, torch.tensor(labels, dtype=torch.float32)


def _units(labels: dict[str, dict[str, float]]) -> set[tuple[str, str]]:
    """Task and code of each label that is known."""
    return {(task, code) for task, own in labels.items() for code, value in own.items() if value == value}


def tune(
    model: AuLlavaForConditionalGeneration,
    processor: AuLlavaProcessor,
    train: EvaluationSet,
    compute: float,
    file: Path,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> int:
    """Train the vision encoder in place, with one linear head for all units of all tasks that is thrown away.

    The loss is the binary cross-entropy for `detection`, and for the other tasks the squared error in parts of a
    unit's variance; each task counts the same, unknown labels not at all.

    Args:
        compute (`float`): Floating-point operations to spend; at least one step is taken.
        file (`Path`): From which a stopped run goes on.

    Returns:
        `int`: How many pictures were shown.
    """
    torch.manual_seed(seed)
    device = model.device
    model.model.vision_tower.requires_grad_(True).train().to(memory_format=torch.channels_last)
    tasks = [task for task, values in train.labels.items() for _ in range(values.shape[1])]
    spread = np.concatenate([np.ma.masked_invalid(v).std(0).filled(1.0) for v in train.labels.values()])
    spread = torch.tensor(spread).float().clamp(min=1e-3).to(device)
    columns = {task: torch.tensor([own == task for own in tasks], device=device) for task in train.labels}
    width = model.model.multi_modal_projector.in_features
    head = nn.Linear(width, len(tasks)).to(device)
    nn.init.zeros_(head.weight)
    weights = [*model.model.vision_tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.05)

    def step(number: int) -> None:
        generator = np.random.default_rng([seed, number])
        rows = generator.choice(len(train), min(batch_size, len(train)), replace=False).tolist()
        images, labels = augmented(train, rows, generator)
        labels = labels.to(device)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with autocast(device):
            features = mean_features(model, pixels)
        said = head(features)
        losses = []
        for task, own in columns.items():
            guess, wanted = said[:, own], labels[:, own]
            known = ~wanted.isnan()
            if is_detection(task):
                errors = nn.functional.binary_cross_entropy_with_logits(guess, wanted.nan_to_num(), reduction="none")
            else:
                errors = (guess - wanted.nan_to_num() / spread[own]).pow(2)
            losses.append((errors * known).sum() / known.sum().clamp(min=1))
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    steps = max(1, int(compute / operations(step, 0)))
    course = Course(file, {"encoder": model.model.vision_tower, "head": head}, [optimizer])
    first = course.at.get("step", 1)
    for number in tqdm(range(first, steps), desc="tuning encoder and heads", unit="step", initial=first, total=steps):
        set_rate([optimizer], learning_rate, number / steps, 20 / steps)
        step(number)
        if (number + 1) % KEEP == 0:
            course.keep(step=number + 1)
    model.model.vision_tower.eval()
    return steps * min(batch_size, len(train))
