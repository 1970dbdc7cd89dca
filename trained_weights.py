"""Which weights of a model a training changes."""

import re

from torch.nn import Linear

from .arguments import TOWERS
from .modeling_au_llava import AuLlavaForConditionalGeneration


# Names of linear layers in self-attention; SigLIP's pooling `head` has attention that is none, and is not used.
ATTENTION = re.compile(r"^(?!head\.).*(attn|attention)")


def freeze(model: AuLlavaForConditionalGeneration, parts: list[str]) -> None:
    """Let parts of a model stay as they are; with the language model its head.

    Args:
        model ([`AuLlavaForConditionalGeneration`]): The model.
        parts (`list[str]`): `vision_tower`, `multi_modal_projector`, `language_model`, `lm_head`.

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
