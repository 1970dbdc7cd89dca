"""The learning rate of every stage of the default checkpoint: up within some steps, then down along a cosine."""

import math

import torch


def set_rate(optimizers: list[torch.optim.Optimizer], highest: float, done: float, warm: float) -> None:
    """Set the rate of the step to come.

    Args:
        optimizers (`list[torch.optim.Optimizer]`): Whose parameter groups all get it.
        highest (`float`): The rate at the end of the warm-up; it ends at a fiftieth of it.
        done (`float`): Share of the training that is done, 0 to 1.
        warm (`float`): Share of the training in which the rate rises.
    """
    falling = max((1 + math.cos(math.pi * min(done, 1))) / 2, 0.02)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = highest * min(1, done / warm + 0.01) * falling
