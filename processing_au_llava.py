"""AuLlavaProcessor: an image and a task become tensors, and answers become named numbers again."""

from os.path import dirname

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, BitImageProcessorPil, LlavaProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import is_numpy_array

from .action_units import ActionUnit, describe, get_task, other_sides, select
from .answers_au_llava import AnswersMixin
from .configuration_au_llava import ACCESS
from .face_alignment import CROP_SIZE, open_image
from .grammar_au_llava import AnswerGrammar
from .templates_au_llava import CHAT_TEMPLATES, write_decision_files


class AuLlavaProcessor(AnswersMixin, LlavaProcessor):
    """Turns face crops and a task into model inputs, and a [`Recognition`] into named values.

    Args:
        image_processor: Resizes and normalises crops, e.g. `BitImageProcessorPil`.
        tokenizer: The language model's tokenizer, with the token `<image>`.
        patch_size (`int`, *optional*, defaults to 14): Pixels along the side of one image token.
        prompt_layout (`str`, *optional*, defaults to `"image_first"`): `"image_first"` puts the image before the text
            description, as LLaVA does; `"text_first"` puts it after, so that the text can be computed once for many
            images.
        chat_template (`str`, *optional*): A template of your own instead of the Vicuna layout.
        calibration (`dict`, *optional*): By task what [`Recognition.calibrated`] and [`Recognition.intervals`] apply:
            `temperature`, `decision`, `mass`; by code `thresholds`, `lines`, `margins`. `evaluate_au.py` fits it.
        trained_lists (`dict`, *optional*): By task, the lists of Action Unit codes that the model was trained to be
            asked about; see [`questions`]. `train_sft.py` stores them.
        free_tasks (`list[str]`, *optional*): Tasks of which it was asked about any selection of the units in them.
        mirror (`bool`, *optional*, defaults to `False`): Whether pipeline and evaluation also ask about each face's
            mirror image, and join both answers.

    Example:

    >>> from PIL import Image
    >>> from au_llava import AuLlavaProcessor, default_checkpoint
    >>> processor = AuLlavaProcessor.from_pretrained(default_checkpoint())
    >>> inputs = processor(images=Image.new("RGB", (224, 224)), task="intensity_level", action_units="disfa")
    >>> inputs["pixel_values"].shape
    torch.Size([1, 3, 160, 160])
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        prompt_layout: str = "image_first",
        chat_template: str | None = None,
        calibration: dict[str, dict] | None = None,
        trained_lists: dict[str, list[list[str]]] | None = None,
        free_tasks: list[str] | None = None,
        mirror: bool = False,
        **kwargs,
    ):
        if prompt_layout not in CHAT_TEMPLATES:
            raise ValueError(f"Unknown prompt_layout {prompt_layout!r}; accepted: {', '.join(CHAT_TEMPLATES)}.")
        self.prompt_layout = prompt_layout
        self.calibration = calibration or {}
        self.trained_lists, self.free_tasks = trained_lists or {}, free_tasks or []
        self.mirror = mirror
        self.loaded_by_pipeline: str | None = None  # from what place, where `pipeline` and not its user loaded it
        if chat_template is None or chat_template in CHAT_TEMPLATES.values():
            chat_template = CHAT_TEMPLATES[prompt_layout]
        # Only patches become image tokens: the model drops the encoder's class and register tokens.
        kwargs |= {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
        super().__init__(image_processor, tokenizer, patch_size=patch_size, chat_template=chat_template, **kwargs)

    @classmethod
    def from_backbones(
        cls, vision: str | None, language, patch_size: int = 14, gguf_file: str | None = None, view: float = 1.0,
        **kwargs,
    ) -> "AuLlavaProcessor":  # fmt: skip
        """The processor that goes with [`AuLlavaForConditionalGeneration.from_backbones`].

        Args:
            vision (`str`, *optional*): Hub id or folder of the vision encoder, whose picture size and normalisation
                are taken over; `None` gives 224 x 224 pixels and ImageNet's mean and deviation, as DINOv2 has them.
            language (`str` or tokenizer): Hub id or folder of the language model, or its tokenizer.
            patch_size (`int`, *optional*, defaults to 14): Pixels along the side of an encoder patch; for a
                convolutional encoder, how much smaller its last map is than the picture.
            view (`float`, *optional*, defaults to 1.0): The part of a crop's side, above 0 and up to 1, that the
                encoder sees, around the middle; the less of it, the larger the face.
            kwargs: `prompt_layout`, `chat_template`; and for what is loaded `token`, `cache_dir`, `local_files_only`
                and `trust_remote_code`.
        """
        access = {name: kwargs.pop(name) for name in ACCESS if name in kwargs}
        side, mean, deviation = CROP_SIZE, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        if vision is not None:
            source = AutoImageProcessor.from_pretrained(vision, **access)
            size, mean, deviation = source.crop_size or source.size, source.image_mean, source.image_std
            side = size["height"] or size["shortest_edge"]
        image_processor = BitImageProcessorPil(
            size={"shortest_edge": round(side / view)}, crop_size={"height": side, "width": side},
            image_mean=mean, image_std=deviation,
        )  # fmt: skip
        named = isinstance(language, str)
        tokenizer = AutoTokenizer.from_pretrained(language, gguf_file=gguf_file, **access) if named else language
        tokenizer.add_tokens("<image>", special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        return cls(image_processor, tokenizer, patch_size=patch_size, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "_from_pipeline" in kwargs:
            processor.loaded_by_pipeline = str(pretrained_model_name_or_path)
        return processor

    def to_json_file(self, json_file_path):
        """Write the settings, and beside them the decision pipeline's two files; [`save_pretrained`] uploads all."""
        super().to_json_file(json_file_path)
        write_decision_files(self, dirname(json_file_path))

    @property
    def image_tokens(self) -> int:
        """Image tokens that stand for one picture."""
        side = self.image_processor.crop_size
        return (side["height"] // self.patch_size) * (side["width"] // self.patch_size)

    @property
    def view(self) -> float:
        """The part of a face crop's side that the encoder sees, around the middle: above 0, up to 1."""
        return self.image_processor.crop_size["height"] / self.image_processor.size["shortest_edge"]

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        task: str | None = None,
        action_units: "str | list[str | ActionUnit] | None" = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare face crops for the model.

        Args:
            images: A crop, a list or a stack of crops: paths, URLs, PIL images or arrays of any mode, size and
                orientation, or tensors with the channels first, of values from 0 to 1 or 255. With `do_rescale=False`
                arrays and tensors go to the image processor as they are, of values from 0 to 1.
            text (`str` or `list[str]`, *optional*): Prompts of your own, with `<image>` in them, instead of a task.
            task (`str`, *optional*, defaults to `"detection"` when there is no `text`): `detection`, `intensity_level`
                or `intensity`.
            action_units (*optional*): A preset, codes, or [`ActionUnit`]s; defaults to the task's preset.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `(batch, length)`, left-padded, and `pixel_values`
            `(batch, 3, height, width)`.

        Raises:
            ValueError: Unknown task or Action Unit, no picture in `images`, or one that cannot be read.
        """
        scale = (kwargs | kwargs.get("images_kwargs", {})).get("do_rescale", True)
        images = None if images is None else _opened(images, scale)
        if isinstance(images, list) and not images:
            raise ValueError("`images` holds no picture; give at least one face crop.")
        if text is None and images is not None:
            text = [self.prompt(task or "detection", action_units)] * (len(images) if isinstance(images, list) else 1)
            kwargs = {"add_special_tokens": False, "return_tensors": "pt", "padding": True} | kwargs
        elif task is not None or action_units is not None:
            raise ValueError("Give either `text` or `task` and `action_units`, not both, and images with a task.")
        return super().__call__(images=images, text=text, **kwargs)

    def prompt(self, task: str, action_units=None) -> str:
        """The whole prompt with one `<image>` in it: chat layout, and T in the paper's three parts."""
        return self.apply_chat_template(self.messages(task, action_units), add_generation_prompt=True)

    def messages(self, task: str, action_units=None) -> list[dict]:
        """The user's turn, as `apply_chat_template` and `pipeline("image-text-to-text")` take it."""
        content = [{"type": "image"}, {"type": "text", "text": describe(task, action_units)}]
        return [{"role": "user", "content": content}]

    def grammar(self, task: str, action_units=None) -> AnswerGrammar:
        """The answers that a task allows, as this tokenizer writes them.

        Raises:
            ValueError: The tokenizer does not write every value of the task with equally many tokens of its own.
        """
        chosen, units = get_task(task), select(action_units, task)
        user = self.messages(task, units)
        start = len(self.apply_chat_template(user, add_generation_prompt=True))

        def completion(answer: str) -> str:
            return self.apply_chat_template([*user, {"role": "assistant", "content": answer}])[start:]

        # A pair of equal values shows what stands before, between and after values.
        texts = [completion(f"[{text}, {text}]") for text in chosen.texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        parts = []
        pairs = zip(chosen.texts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for text, whole, ids, offsets in pairs:
            first = whole.index(text)
            # Tokens of the two values, then what stands before, between and after them.
            values = [
                [place for place, (a, b) in enumerate(offsets) if start <= a < b <= start + len(text)]
                for start in (first, first + len(text) + 2)
            ]
            (a, b), (c, d) = ((places[0], places[-1] + 1) if places else (0, 0) for places in values)
            parts.append([tuple(ids[slice(*ends)]) for ends in ((a, b), (c, d), (0, a), (b, c), (d, None))])
        value_tokens, seconds, openings, separators, closings = zip(*parts, strict=True)
        same_frame = len(set(openings)) == len(set(separators)) == len(set(closings)) == 1
        same_width = len({len(tokens) for tokens in value_tokens}) == 1 and value_tokens[0]
        if not (same_frame and same_width and value_tokens == seconds):
            raise ValueError(
                f"This tokenizer does not write the values {chosen.texts[0]} to {chosen.texts[-1]} with equally many "
                "tokens of their own; use one in which each digit is a token, such as Llama's or Qwen's."
            )
        return AnswerGrammar(
            opening=list(openings[0]), separator=list(separators[0]), closing=list(closings[0]),
            value_tokens=torch.tensor(value_tokens), values=torch.tensor(chosen.values), count=len(units),
            neutral=self.tokenizer.convert_tokens_to_ids("?"), mirrored=other_sides(units),
        )  # fmt: skip


def _opened(images, scale: bool):
    """Open every picture in a nested list; tensors and arrays of what need not be scaled pass as they are."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return [_opened(image, scale) for image in images]
    if not scale and (isinstance(images, torch.Tensor) or is_numpy_array(images)):
        return images
    if isinstance(images, torch.Tensor):
        images = images.movedim(0, -1) if images.shape[0] in (1, 3, 4) else images
        images = (images.float() if images.is_floating_point() else images).cpu().numpy()
    return open_image(images)


AuLlavaProcessor.register_for_auto_class()
