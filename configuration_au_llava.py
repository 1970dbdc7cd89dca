"""AuLlavaConfig: which vision encoder and which language model an AU-LLaVA joins."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


# What configurations, weights, tokenizers and picture settings of other models are all loaded with
ACCESS = ("token", "cache_dir", "local_files_only", "trust_remote_code")


@strict
class AuLlavaConfig(LlavaConfig):
    r"""Configuration of [`AuLlavaForConditionalGeneration`].

    Without arguments it is the paper's pair (section IV-B): DINOv2 ViT-L/14 and Vicuna-7B.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to DINOv2 ViT-L/14):
            Any Hugging Face vision encoder.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a `LlamaConfig` of 7 billion parameters):
            Any Hugging Face causal language model.
        image_token_index (`int`, *optional*, defaults to 32000):
            Token id that stands for one image patch; also readable as `image_token_id`.
        image_seq_length (`int`, *optional*, defaults to 256):
            Patch tokens of one image: 16 x 16 for a 224 x 224 pixel crop and 14 pixel patches.
        looks (`list[list[float]]`, *optional*):
            How to look at each picture, once for each `[enlargement, turn in degrees]`, in use but not in training:
            what the encoder says of a patch is the mean over the looks. By default one look, at the picture as it is.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the language modelling head has a bias, as Phi's has.

    `projector_hidden_act`, `multimodal_projector_bias` and the `vision_feature_*` fields come with `LlavaConfig` and
    are not used: the projector is one `nn.Linear` and it reads the encoder's last hidden state.

    Example:

    >>> from transformers import Dinov2Config, LlamaConfig
    >>> config = AuLlavaConfig(vision_config=Dinov2Config(hidden_size=64), text_config={"model_type": "llama"})
    >>> config.vision_config.hidden_size, config.text_config.model_type
    (64, 'llama')
    """

    model_type = "au_llava"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="dinov2",
            init_kwargs={
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 518,
                "patch_size": 14,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    image_seq_length: int = 256
    looks: list | None = None
    lm_head_bias: bool = False
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # `save_pretrained` records only the class of the saved object; the other doors are opened here.
        self.auto_map = {
            "AutoConfig": "configuration_au_llava.AuLlavaConfig",
            "AutoModel": "modeling_au_llava.AuLlavaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_au_llava.AuLlavaForConditionalGeneration",
        } | (self.auto_map or {})
        self.custom_pipelines = {
            "facial-action-units": {
                "impl": "pipeline_au_llava.FacialActionUnitPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
            }
        } | (self.custom_pipelines or {})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read a `config.json`, as [`from_pretrained`] does.

        Raises:
            OSError: The folder holds none. Transformers would say nothing and take the paper's pair.
            ValueError: It belongs to another kind of model. Transformers only warns, and would build the paper's pair
                with random weights.
        """
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not values:
            raise OSError(
                f"{pretrained_model_name_or_path} holds no config.json; give a folder that save_pretrained wrote."
            )
        kind = values.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: its config.json says model_type {kind!r}, not {cls.model_type!r}; "
                "give an AU-LLaVA, or join two backbones by from_backbones."
            )
        return values, unused


AuLlavaConfig.register_for_auto_class()
