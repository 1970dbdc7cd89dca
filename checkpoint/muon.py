"""Muon for the default checkpoint: each layer's weights get steps of equal size in all directions.

A small encoder and the reading layer learn far more from each picture than with AdamW (docs/checkpoint.md).
"""

import torch
from torch import nn


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for convolutions too: a filter for one output is one row of a matrix.

    Rates and decays mean what they mean for AdamW (Liu et al., 2025, "Muon is scalable for LLM training").

    Args:
        weights (`list[nn.Parameter]`): Matrices `(out, in)` and filters `(out, in, height, width)`, the latter in
            channels-last order.
        lr (`float`), weight_decay (`float`): As of AdamW.

    Raises:
        ValueError: Filters are in another order, so that their matrix would be a copy.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float = 0.05):
        self.weights = weights
        matrices = [nn.Parameter(rows_of(weight.data)) for weight in weights]
        if any(matrix.data_ptr() != weight.data_ptr() for matrix, weight in zip(matrices, weights, strict=True)):
            raise ValueError("Filters must be in channels-last order: model.to(memory_format=torch.channels_last).")
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = None if weight.grad is None else rows_of(weight.grad)
        return super().step(closure)


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    """A layer's weights as a matrix, a row for each output; shares memory with filters in channels-last order."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def layer_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a module's linear and convolutional layers that are trained: what Muon is for."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def make_optimizers(hidden: nn.Module, weights: list[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers of `hidden`, and AdamW for the other ones of `weights`: heads, norms, biases."""
    inner = layer_weights(hidden)
    ids = {id(weight) for weight in inner}
    others = [weight for weight in weights if weight.requires_grad and id(weight) not in ids]
    return [Muon(inner, lr), torch.optim.AdamW(others, lr=lr, weight_decay=0.05, fused=True)]
