"""AU-LLaVA: a vision encoder, ONE linear projector and a language model (paper, section III-A and Fig. 1)."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    PreTrainedConfig,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones_au_llava import access_of, load_language_model, load_vision_tower, patches_of
from .configuration_au_llava import AuLlavaConfig
from .readout_au_llava import ReadoutMixin


class AuLlavaModel(LlavaModel):
    """Vision tower -> one `nn.Linear` -> language model, without the language modelling head.

    Args:
        config (`AuLlavaConfig`): The two backbones' configurations.

    Example:

    >>> from au_llava import AuLlavaConfig, AuLlavaModel
    >>> with torch.device("meta"):  # the paper's 7-billion-parameter pair, without its memory
    ...     model = AuLlavaModel(AuLlavaConfig())
    >>> model.multi_modal_projector
    Linear(in_features=1024, out_features=4096, bias=True)
    """

    config_class = AuLlavaConfig
    config: AuLlavaConfig

    def __init__(self, config: AuLlavaConfig):
        # LlavaModel.__init__ would build its own two-layer projector, and the language model with it.
        LlavaPreTrainedModel.__init__(self, config)
        try:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        except ValueError:  # it cannot attend as the language model is told to; convolutional encoders do not attend
            config.vision_config._attn_implementation = "eager"
            self.vision_tower = AutoModel.from_config(config.vision_config)
        language_model = AutoModel.from_config(config.text_config)
        self.multi_modal_projector = nn.Linear(  # type: ignore[assignment]
            config.vision_config.hidden_size, language_model.get_input_embeddings().embedding_dim
        )
        self.language_model = language_model
        self.post_init()

    def train(self, mode: bool = True) -> "AuLlavaModel":
        """As in PyTorch, but a frozen vision tower stays as it is in use: its batch norms and dropouts do not move."""
        super().train(mode)
        self.vision_tower.train(mode and any(weight.requires_grad for weight in self.vision_tower.parameters()))
        return self

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images and project their patches into the language model's space.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised face crops.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` is a list with one tensor `(patches, text_hidden_size)` an
            image.
        """
        looks = None if self.training else self.config.looks
        seen = pixel_values if not looks else torch.cat([moved(pixel_values, *look) for look in looks])
        if not torch.is_grad_enabled():  # in this order processors convolve faster by a third; the result is the same
            seen = seen.contiguous(memory_format=torch.channels_last)
        outputs = self.vision_tower(seen, return_dict=True)
        # The last hidden state has passed the encoder's final norm. Stock LLaVA reads `hidden_states`, which for
        # DINOv2 has not, and would leave the trained norm out.
        patches = patches_of(outputs.last_hidden_state, seen, self.config.vision_config)
        patches = patches.unflatten(0, (-1, len(pixel_values))).mean(0)  # over the looks
        outputs.pooler_output = list(self.multi_modal_projector(patches))
        return outputs


def moved(pictures: torch.Tensor, enlargement: float, turn: float) -> torch.Tensor:
    """Square pictures as a slightly different crop would have shown them.

    Args:
        pictures (`torch.Tensor` of shape `(batch, channels, side, side)`): Any pixel values.
        enlargement (`float`): Above 1 brings the middle nearer.
        turn (`float`): Degrees, counter-clockwise.

    Returns:
        `torch.Tensor` of the same shape; what lies outside is filled with the nearest edge.
    """
    if (enlargement, turn) == (1, 0):
        return pictures
    angle = math.radians(turn)
    cosine, sine = math.cos(angle) / enlargement, math.sin(angle) / enlargement
    where = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], device=pictures.device)
    grid = functional.affine_grid(where.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    drawn = functional.grid_sample(pictures.float(), grid, "bicubic", "border", align_corners=False)
    return drawn.to(pictures.dtype)


class AuLlavaForConditionalGeneration(ReadoutMixin, LlavaForConditionalGeneration, GenerationMixin):
    """AU-LLaVA with its language modelling head: trains, generates text, and answers by [`recognize`].

    Example:

    >>> from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
    >>> from PIL import Image
    >>> model = AuLlavaForConditionalGeneration.from_pretrained(default_checkpoint())
    >>> processor = AuLlavaProcessor.from_pretrained(default_checkpoint())
    >>> ((task, units),) = processor.questions("detection", "AU6,AU12")  # of a list that it was trained on: bp4d
    >>> inputs = processor(images=Image.new("RGB", (224, 224)), task=task, action_units=units)
    >>> answer = model.recognize(**inputs, grammar=processor.grammar(task, units))
    >>> answer.values.shape
    torch.Size([1, 12])
    """

    config_class = AuLlavaConfig
    config: AuLlavaConfig
    adapter: str | None = None  # where a loaded PEFT adapter came from,
    adapter_access: dict = {}  # and the revision, token and cache folder that it was loaded with

    def __init__(self, config: AuLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = AuLlavaModel(config)
        language = self.model.language_model
        words = language.get_input_embeddings()
        self.lm_head = nn.Linear(words.embedding_dim, words.num_embeddings, bias=config.lm_head_bias)
        # LLaVA ties to `embed_tokens`, as Llama calls it; GPT-2, OPT, BLOOM and Falcon have other names for it.
        name = next(name for name, part in language.named_modules() if part is words)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedConfig,
        language: str | PreTrainedConfig,
        tokenizer=None,
        gguf_file: str | None = None,
        **kwargs,
    ) -> "AuLlavaForConditionalGeneration":
        """Join a vision encoder and a language model by a new, untrained projector.

        Args:
            vision (`str` or `PreTrainedConfig`): Hub id or folder of the encoder; a config gives random weights.
            language (`str` or `PreTrainedConfig`): The same for the causal language model.
            tokenizer (*optional*): The language model's tokenizer; loaded from `language` if that is a name. The token
                `<image>` is added to it, and the embeddings grow if it needs a row that is not there.
            gguf_file (`str`, *optional*): The GGUF file inside the folder `language`.
            kwargs: Go to both `from_pretrained` calls: `dtype` (by default that of the language model, as it is
                stored), `attn_implementation`, `device_map` and so on; `token`, `cache_dir`, `local_files_only` and
                `trust_remote_code` also to those of configurations and tokenizer.

        Returns:
            [`AuLlavaForConditionalGeneration`]; its processor comes from [`AuLlavaProcessor.from_backbones`].

        Raises:
            ValueError: The encoder cannot be asked about each patch of a picture, or its weights are not there; or
                the language model cannot be given patches, or keeps something else than keys and values.

        Example:

        >>> from transformers import Dinov2Config, LlamaConfig
        >>> model = AuLlavaForConditionalGeneration.from_backbones(
        ...     Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        ...     LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
        ... )
        >>> model.config.image_token_id, model.get_input_embeddings().num_embeddings
        (99, 100)
        """
        vision_tower, patches = load_vision_tower(vision, **kwargs)
        language_model = load_language_model(language, gguf_file, **kwargs)
        if isinstance(language, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(language, gguf_file=gguf_file, **access_of(kwargs))
        if vision_tower.dtype != language_model.dtype:  # as each is stored: DINOv2 in float32, Vicuna in float16
            vision_tower.to(language_model.dtype)
        vocabulary = language_model.config.vocab_size
        if tokenizer is None:
            image_token_id = vocabulary
        else:
            tokenizer.add_tokens("<image>", special_tokens=True)
            image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        config = cls.config_class(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            image_token_index=image_token_id,
            tie_word_embeddings=language_model.config.tie_word_embeddings,
            lm_head_bias=language_model.get_output_embeddings().bias is not None,
            attn_implementation={  # for a config resets those of its parts
                "vision_config": vision_tower.config._attn_implementation,
                "text_config": language_model.config._attn_implementation,
            },
        )
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = vision_tower
        model.model.language_model = language_model.base_model
        model.model.multi_modal_projector = nn.Linear(
            vision_tower.config.hidden_size,
            language_model.get_input_embeddings().embedding_dim,
            dtype=language_model.dtype,
            device=vision_tower.device,
        )
        model._init_weights(model.model.multi_modal_projector)
        model.lm_head = language_model.get_output_embeddings()
        model.generation_config = language_model.generation_config
        if image_token_id >= vocabulary:
            model.resize_token_embeddings(image_token_id + 1)
        model.config.image_seq_length = patches
        return model

    @torch.no_grad()
    def count_patches(self, side: int) -> int:
        """How many patches, and so image tokens, the vision tower makes of a picture of `side` times `side` pixels."""
        tower = self.model.vision_tower
        crop = torch.zeros(1, 3, side, side, dtype=tower.dtype, device=tower.device)
        return len(self.get_image_features(crop).pooler_output[0])

    def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
        self.check_places(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        # `pipeline(model=ADAPTER)` loads the base's processor; ours then asks for the one beside the adapter.
        loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        config, own = kwargs.get("load_config"), kwargs.get("adapter_kwargs")
        access = (config.download_kwargs if config else {}) | (own or {})
        self.adapter_access = {name: access[name] for name in ("revision", "token", "cache_dir") if access.get(name)}
        self.adapter = peft_model_id
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        # `config.json` names the pipeline's file; transformers copies each file that an import line in this one names.
        from .pipeline_au_llava import FacialActionUnitPipeline  # noqa: F401

        # Where `self.model` was saved by itself, it stands in the config of both as what AutoModel opens.
        self.config.auto_map["AutoModel"] = "modeling_au_llava.AuLlavaForConditionalGeneration"
        super().save_pretrained(save_directory, **kwargs)


AuLlavaModel.register_for_auto_class("AutoModel")
AuLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
