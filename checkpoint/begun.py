"""A stage goes on where it was stopped, but not from what another one has left in its folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from au_llava.adapters import MADE_WITH, check_made_with


KEEP = 200  # steps between the states that a stopped run goes on from


def begin(output_dir: str, **made_of) -> Path:
    """The folder of a stage, made if need be, with a note of what it is made of.

    Args:
        output_dir (`str`): The folder.
        made_of: What may not change while the stage goes on: see [`version_of`] for files.

    Raises:
        ValueError: The folder was begun with something else.
    """
    folder = Path(output_dir)
    check_made_with(folder, made_of)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE_WITH).write_text(json.dumps(made_of))
    return folder


def version_of(file: str | Path) -> list:
    """What tells a file from others that come to lie there: its whole path, size in bytes and time of change."""
    path = Path(file).resolve()
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def save(file: Path, content: Any) -> None:
    """Write a file that `torch.load` reads, whole or not at all."""
    torch.save(content, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, from the file where an earlier run has written it."""
    if not file.is_file():
        save(file, make())
    return torch.load(file, weights_only=True)


class Course:
    """How far a training is: weights and optimizers, in a file that a stopped run goes on from.

    Args:
        file (`Path`): If it is there, modules and optimizers take up what it holds.
        modules (`dict[str, nn.Module]`): By the names of their weights in the file.
        optimizers (`list[torch.optim.Optimizer]`): Of these modules.

    Attributes:
        at (`dict`): What [`Course.keep`] was given when the file was written; empty where there was none.
    """

    def __init__(self, file: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]):
        self.file, self.modules, self.optimizers = file, modules, optimizers
        self.at: dict[str, Any] = {}
        if file.is_file():
            self.at = torch.load(file, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(self.at.pop(name))
            for optimizer, known in zip(optimizers, self.at.pop("optimizers"), strict=True):
                optimizer.load_state_dict(known)

    def keep(self, **at) -> None:
        """Write the file; `at` says how far the training is."""
        weights = {name: module.state_dict() for name, module in self.modules.items()}
        save(self.file, weights | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]} | at)
