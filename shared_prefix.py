"""Training that computes the text description once for a whole batch."""

import torch
from datasets import Dataset
from transformers import DynamicCache

from .losses import AnswerTrainer


class SharedPrefixTrainer(AnswerTrainer):
    """TRL's `SFTTrainer`, with the keys and values of the batch's common text computed once.

    With the text before the image (`prompt_layout="text_first"`), all prompts of a batch that asks one question begin
    alike, and what they share does not depend on the image. Loss and gradients are those of the plain path.

    Args:
        kwargs: As for `SFTTrainer`, with rows of `instructions.FEATURES`.

    Raises:
        ValueError: Gradient checkpointing is on, which keeps no cache; or FSDP or ZeRO-3 spread the weights, which
            would take a layer's weights away before the gradients of the cached keys and values have come back to it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.gradient_checkpointing:
            raise ValueError("A shared prefix needs the cache: set gradient_checkpointing to false.")
        if self.spread:
            raise ValueError("A shared prefix needs whole weights on each GPU: use DDP or ZeRO-2, not FSDP or ZeRO-3.")
        self.core().model.register_forward_pre_hook(compute_prefix, with_kwargs=True)

    def questions(self, rows: Dataset) -> list[str]:
        return [f"{task} {units}" for task, units in zip(rows["task"], rows["action_units"], strict=True)]

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"]
        shared = self.shared_length(ids)
        if shared > 1:  # one token at least has to stay, and one is not worth a pass
            rest = {name: inputs[name][:, shared:] for name in PER_TOKEN if name in inputs}
            inputs = inputs | rest | {"prefix_ids": ids[:1, :shared]}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def shared_length(self, input_ids: torch.Tensor) -> int:
        """Tokens that all rows `(batch, length)` begin with, up to the image."""
        image = input_ids == self.processing_class.image_token_id
        same = torch.eq(input_ids, input_ids[:1]).all(0) & ~image.any(0)
        return int(same.int().argmin())


# What a batch has for each token, except `attention_mask`, which has to cover the prefix, too.
PER_TOKEN = ("input_ids", "labels", "token_weights", "soft_targets")


def compute_prefix(model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before the model's forward pass: put the keys and values of `prefix_ids` `(1, tokens)` into its cache.

    It runs inside the wrapped model's own forward pass, so mixed precision and DDP see one pass.
    """
    prefix = kwargs.pop("prefix_ids", None)
    if prefix is not None:
        cache = DynamicCache(config=model.config)
        model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(kwargs["input_ids"]))
        # Since transformers 5.24 the model is given `cache`, and an older name beside it would be passed over.
        kwargs["cache" if "cache" in kwargs else "past_key_values"] = cache
    return args, kwargs
