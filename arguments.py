"""What a training is told: the fields that a recipe, or the command line of `train_sft.py`, sets beside TRL's own."""

import sys
from dataclasses import dataclass, field

import yaml
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, TrlParser


# Self-attention projections of both towers, and nothing else (paper, section III-C).
# CLIP and SigLIP call the last of them `out_proj`, but so does SigLIP's pooling head, which is none and is not used.
# Phi-3 has one projection for three, GPT-NeoX and GPT-2 under names of their own.
_OWN_NAMES = r"self_attn\.(out_proj|dense)|(self_)?attention\.(query_key_value|dense)|attn\.c_(attn|proj)"
_ATTENTION = rf".*\.((q|k|v|o|qkv)_proj|{_OWN_NAMES})"
TOWERS = {"both": ("vision_tower", "language_model"), "encoder": ("vision_tower",), "llm": ("language_model",)}
LORA_TARGETS = {name: rf".*({'|'.join(towers)}){_ATTENTION}" for name, towers in TOWERS.items()}


# Fields of TRL's that would be passed over in silence, or spoil what a run leaves: the usual values, and what to do.
_PASSED_OVER: dict[str, tuple[tuple, str]] = {
    "resume_from_checkpoint": ((None,), "a run goes on from its output_dir by itself, see resume"),
    "save_only_model": ((False,), "no run goes on from a checkpoint without its optimizer; save_total_limit helps"),
    "data_seed": ((None,), "seed says in what order rows are drawn, too"),
    "label_smoothing_factor": ((0.0,), "soft_digits spreads labels to their neighbours"),
    "completion_only_loss": ((None, True), "the loss is on answers alone"),
    "loss_type": (("nll",), "the loss is a cross entropy, which soft_digits, rare_weight and format_weight change"),
    "router_aux_loss_coef": ((None,), "the loss is on answers alone, and none balances experts"),
    "train_sampling_strategy": (("random",), "rows are drawn in random order, with shared_prefix by question"),
    "pad_to_multiple_of": ((None,), "batches are as long as their longest question and answer"),
}


@dataclass
class AuLlavaArguments:
    """What is trained, and on what."""

    train_data: list[str] = field(
        metadata={"help": "Sources such as synthetic:FOLDER, bp4d:FOLDER?config_name=fold1, csv:FILE or a folder."}
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources answered during training: their split `validation`, or ?split=..."},
    )
    held_out: float = field(
        default=0.0, metadata={"help": "Share (0 to 1) of the training people set apart to validate on instead."}
    )
    fold: int = field(default=1, metadata={"help": "Stands for {fold} in sources and output_dir."})
    model: str | None = field(default=None, metadata={"help": "An AU-LLaVA to start from: Hub id or folder."})
    vision: str = field(default="facebook/dinov2-large", metadata={"help": "Else the vision encoder to start from."})
    language: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "And the language model."})
    gguf_file: str | None = field(default=None, metadata={"help": "The GGUF file inside the folder `language`."})
    prompt_layout: str = field(default="image_first", metadata={"help": "And image_first or text_first."})
    questions: list[str] = field(
        default_factory=lambda: ["detection:bp4d", "intensity_level:disfa", "intensity:feafa"],
        metadata={"help": "What is asked about each rendered face: task:preset or task:codes."},
    )
    weights: list[float] = field(
        default_factory=list,
        metadata={"help": "How often each source, by question, is drawn, relative to the others. Else each row once."},
    )
    limit: int | None = field(default=None, metadata={"help": "Use so many rows of each data set and question only."})
    eval_limit: int | None = field(default=200, metadata={"help": "And answer so many of each at every validation."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the weights: float32, bfloat16..., or auto: as stored with bf16 or fp16, else float32."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the language model in 4 bits (QLoRA)."})
    lora: str | None = field(default="both", metadata={"help": "Towers that get LoRA: both, encoder, llm; or null."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Without LoRA: parts that stay as they are, such as vision_tower, or language_model with its head."
        },
    )
    shuffle: bool = field(default=False, metadata={"help": "Ask about the Action Units in random order."})
    subset: float = field(default=0.0, metadata={"help": "Share of questions (0 to 1) about a random part of them."})
    relations: bool = field(
        default=False,
        metadata={"help": "Tell in T which units go together in training; only benchmarks/comparisons.py asks so."},
    )
    neutral: float = field(
        default=0.0, metadata={"help": "Share of answers (0 to 1) with hidden digits, for the parallel read-out."}
    )
    soft_digits: float = field(
        default=0.0, metadata={"help": "Spread of each label to its neighbours, as a share of the task's range."}
    )
    rare_weight: float = field(default=0.0, metadata={"help": "0 to 1: how far present units count more than absent."})
    format_weight: float = field(default=1.0, metadata={"help": "Weight of brackets, commas, points beside digits."})
    augment: bool = field(default=True, metadata={"help": "Vary the pictures."})
    shared_prefix: bool = field(default=False, metadata={"help": "Compute a batch's common text once (text_first)."})
    resume: bool = field(default=True, metadata={"help": "Go on from the last whole checkpoint in output_dir."})
    merge: bool = field(default=False, metadata={"help": "Also write the model with the adapter merged into it."})
    public_licence: str | None = field(
        default=None, metadata={"help": "What allows weights trained on BP4D, DISFA or FEAFA to be public."}
    )

    def lora_config(self) -> LoraConfig | None:
        """LoRA in the self-attention of the chosen towers, with the projector trained in full beside it; or none."""
        if not self.lora:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=LORA_TARGETS[self.lora],
            modules_to_save=["multi_modal_projector"],
            task_type="CAUSAL_LM",
        )

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """4 bits for the language model, whose head stays as it is; or none."""
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )


def read_arguments(options: list[str] | None = None) -> tuple[AuLlavaArguments, SFTConfig]:
    """Recipe and command line, or one ValueError that says what is wrong with them."""
    for option in sys.argv[1:] if options is None else options:
        if option.startswith("--config="):  # of which TRL takes no notice
            raise ValueError(f"{option} is not understood; write --config {option.removeprefix('--config=')}.")
    try:
        arguments, training = TrlParser(
            (AuLlavaArguments, SFTConfig)  # type: ignore[arg-type]  # it takes any dataclass
        ).parse_args_and_config(options)
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"The recipe cannot be read: {error}") from error
    for name in ("train_data", "eval_data", "questions", "freeze"):
        value = getattr(arguments, name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"The recipe's {name} is {value!r}; give a list of texts")
    if not isinstance(arguments.weights, list) or not all(isinstance(one, (int, float)) for one in arguments.weights):
        raise ValueError(f"The recipe's weights is {arguments.weights!r}; give a list of numbers.")
    if training.hub_token is not None:  # command line and recipe are printed in the card, which may be public
        raise ValueError("hub_token would be written into the model card; use `hf auth login` or HF_TOKEN instead.")
    if arguments.lora == "null":  # on the command line it is a word
        arguments.lora = None
    if arguments.lora not in (None, *LORA_TARGETS):
        raise ValueError(f"Unknown lora {arguments.lora!r}; accepted: {', '.join(LORA_TARGETS)}, null.")
    for name in ("held_out", "subset", "neutral", "soft_digits", "rare_weight"):
        share = getattr(arguments, name) or 0.0  # null in a recipe
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; give a share, 0 to 1.")
        setattr(arguments, name, share)
    for name in ("limit", "eval_limit"):
        if (count := getattr(arguments, name)) is not None and count < 1:
            raise ValueError(f"{name} is {count}; give 1 or more, or leave it out.")
    if arguments.lora and arguments.freeze:
        raise ValueError("freeze is for training without LoRA, which moves nothing but itself and the projector.")
    for name, (usual, remedy) in _PASSED_OVER.items():
        if (value := getattr(training, name)) not in usual:
            raise ValueError(f"{name} is {value!r}, and would do nothing or harm: {remedy}.")
    if training.ddp_find_unused_parameters is None and not arguments.lora:
        # On some weights of an encoder no patch depends, such as DINOv2's mask token or a pooling head. DDP would wait
        # for their gradients; transformers lets it, where activations are computed again.
        training.ddp_find_unused_parameters = True
    if (training.metric_for_best_model or "").endswith("_mae"):
        training.greater_is_better = False  # transformers takes every metric but a loss for one that should be high
    return arguments, training
