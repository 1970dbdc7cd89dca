"""The two backbones that an AU-LLaVA joins: loaded, and looked over before they are joined."""

import math
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .configuration_au_llava import ACCESS
from .face_alignment import CROP_SIZE


logger = logging.get_logger(__name__)


def load_vision_tower(vision: str | PreTrainedConfig, **kwargs) -> tuple[PreTrainedModel, int]:
    """A vision encoder, which knows afterwards how wide its patches are (`config.hidden_size`), and how many it makes.

    Args:
        vision (`str` or `PreTrainedConfig`): Hub id or folder; of CLIP and SigLIP only the image side is taken. A
            config gives random weights.
        kwargs: As those of [`AuLlavaForConditionalGeneration.from_backbones`].

    Raises:
        ValueError: None of its weights are there, as where it is a part of a larger model; or it cannot be asked
            about each patch of a picture.
    """
    if isinstance(vision, str):
        config = AutoConfig.from_pretrained(vision, **access_of(kwargs))
        if "vision_config" in config.sub_configs:
            config = config.vision_config
        tower, report = AutoModel.from_pretrained(vision, config=config, output_loading_info=True, **kwargs)
        if report["missing_keys"] >= dict(tower.named_parameters()).keys():
            raise ValueError(
                f"{vision} keeps no weights where {config.model_type} looks for them; give the vision encoder by "
                "itself, not a model that it is a part of."
            )
    else:
        tower = AutoModel.from_config(vision, **_making(kwargs))
    patches, width = black_patches(tower).shape
    if (named := tower.config.to_dict().get("hidden_size", width)) != width:
        raise ValueError(
            f"{tower.config.model_type} has a hidden_size of {named}, but tells {width} numbers of each patch; take "
            "another encoder, such as DINOv2, CLIP, SigLIP, Swin or ConvNeXt."
        )
    tower.config.hidden_size = width  # which convolutional encoders call by other names
    return tower, patches


def load_language_model(language: str | PreTrainedConfig, gguf_file: str | None = None, **kwargs) -> PreTrainedModel:
    """A causal language model, with its head.

    Args:
        language (`str` or `PreTrainedConfig`): Hub id or folder; a config gives random weights.
        gguf_file (`str`, *optional*): The GGUF file inside the folder `language`.
        kwargs: As those of [`AuLlavaForConditionalGeneration.from_backbones`].

    Raises:
        ValueError: It keeps a state in place of keys and values, which cannot go back to an earlier token; or it
            has an encoder of its own, or cannot be given patches in place of words.
    """
    if isinstance(language, str):
        model = AutoModelForCausalLM.from_pretrained(language, gguf_file=gguf_file, **kwargs)
    else:
        model = AutoModelForCausalLM.from_config(language, **_making(kwargs))
    config = model.config
    if model._is_stateful:
        raise ValueError(
            f"{config.model_type} keeps a state in place of keys and values, so answers cannot be drafted and "
            "verified; take a language model that attends in every layer, such as Llama, Qwen, Mistral or Gemma."
        )
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} has an encoder of its own; give a language model by itself.")
    try:
        with torch.no_grad():
            core: Any = model.base_model
            words = core.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long, device=model.device))
            patches = torch.ones_like(words)
            told = core(inputs_embeds=patches, past_key_values=DynamicCache(), use_cache=True)
            told.past_key_values.get_seq_length()
            model.get_output_embeddings()(told.last_hidden_state)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as fault:
        raise ValueError(
            f"{config.model_type} cannot be the language model, which is given patches in place of words, and keeps "
            f"keys and values in every layer: {fault}"
        ) from fault
    usual = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
    settings = usual | config.to_dict()
    for name, nothing in usual.items():
        if (value := settings[name]) not in (None, nothing):  # MPT has names of scales, and None for them
            logger.warning(
                f"{config.model_type} has {name}={value}, which is left out here: until it has been trained, it is "
                "surer or less sure of each token than by itself."
            )
    return model


def patches_of(states: torch.Tensor, pixel_values: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What a vision tower says of each patch, without class and register tokens.

    Args:
        states (`torch.Tensor`): The tower's `last_hidden_state`: `(batch, tokens, vision_hidden_size)`, or a map
            `(batch, vision_hidden_size, rows, columns)`.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): The pictures that it saw.
        config (`PreTrainedConfig`): The tower's.

    Returns:
        `torch.Tensor` of shape `(batch, patches, vision_hidden_size)`.

    Raises:
        ValueError: The tower tells of fewer pictures or patches than there are.
    """
    if len(states) != len(pixel_values):  # as Pixtral, which strings them together
        raise ValueError(f"Of {len(pixel_values)} pictures the vision tower tells as of {len(states)}.")
    if states.ndim == 4:  # of convolutional encoders
        return states.flatten(2).transpose(1, 2)
    told = states.shape[1]
    if "depths" in vars(config):  # from stage to stage Swin and Hiera join patches; those of a square are left
        patches = math.isqrt(told) ** 2
    else:
        rows, columns = (size // config.patch_size for size in pixel_values.shape[-2:])
        patches = rows * columns
    if told < patches:  # as ViTMAE, which hides most
        raise ValueError(f"Of {patches} patches the vision tower tells {told}; it must tell all.")
    return states[:, -patches:]  # class and register tokens, if there are any, come before


@torch.no_grad()
def black_patches(tower: PreTrainedModel) -> torch.Tensor:
    """What a vision tower says of the patches of a black crop.

    Returns:
        `torch.Tensor` of shape `(patches, vision_hidden_size)`: of a crop of 224 pixels, or of the size that it was
        made for, where it takes no other, as CLIP, SigLIP and ViT, or has stages, as Swin.

    Raises:
        ValueError: It wants more than a picture, or does not tell of each patch.
    """
    sides: list[Any] = [CROP_SIZE, tower.config.to_dict().get("image_size")]
    if "depths" in vars(tower.config):  # Swin, once given a smaller picture, keeps smaller windows
        sides.reverse()
    faults = []
    for side in filter(None, sides):
        try:
            crops = torch.zeros(2, 3, side, side, dtype=tower.dtype, device=tower.device)
            return patches_of(tower(crops).last_hidden_state, crops, tower.config)[0]
        except (AttributeError, RuntimeError, TypeError, ValueError) as fault:
            faults.append(fault)
    raise ValueError(
        f"{tower.config.model_type} cannot be the vision tower, which is given square pictures (batch, 3, side, side) "
        f"and tells of each patch: {faults[0]}"
    ) from faults[0]


def access_of(kwargs: dict) -> dict:
    """Those arguments that say how files are come by."""
    return {name: kwargs[name] for name in ACCESS if name in kwargs}


def _making(kwargs: dict) -> dict:
    """Those arguments that a model made from a configuration takes."""
    return {name: kwargs[name] for name in kwargs if name == "trust_remote_code" or name not in ACCESS}
