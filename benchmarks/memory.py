"""How much GPU memory training takes, and which GPU it fits: computed from sizes, without a GPU.

    python benchmarks/memory.py [--processes 8] [--text 510] [--answer 38] [--side 224] [--json]

One training step of the paper's pair (DINOv2 ViT-L/14 and Vicuna-7B) runs on the meta device, where tensors have a
size but no contents, with FlashAttention. What lives at the worst moment are the activations; weights, gradients and
optimizer states follow from the parameters and from how a strategy spreads them.
"""

import argparse
import json
import weakref
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, DynamicCache

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration
from au_llava.arguments import LORA_TARGETS
from au_llava.face_alignment import CROP_SIZE


GPUS = (16, 24, 40, 48, 80, 141)  # GB, as they are sold: V100, RTX 4090, A100, L40S, H100, H200
OVERHEAD = 1.5e9  # CUDA context, libraries' workspaces, blocks that the allocator cannot use
# Bits of a 4-bit weight in bitsandbytes: its own, a scale of 8 bits for 64 of them, and 32 bits for 256 scales.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# DeepSpeed's defaults: parameters of ZeRO-3 that may be gathered at once, and elements of each of two buckets.
LIVE, BUCKETS = 1_000_000_000, 2 * 500_000_000


ALONE, SPREAD = ("single", "ddp"), ("fsdp2", "zero2", "zero3")
WAYS = (
    ("lora", "plain", False, ALONE + SPREAD),
    ("lora", "shared prefix", False, (*ALONE, "zero2")),  # see SharedPrefixTrainer
    ("lora", "plain", True, ALONE + SPREAD),
    ("qlora", "plain", False, ALONE),
    ("qlora", "plain", True, ALONE),
    ("full", "plain", True, ALONE),
    ("full", "plain", False, SPREAD),
    ("full", "plain", True, SPREAD),
)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made under it: alive now (`live`) and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in args if isinstance(tensor, torch.Tensor)}

        def watch(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage not in self.seen and id(storage) not in given:  # a view of an old tensor takes no memory
                size = storage.nbytes()
                self.seen.add(storage)
                weakref.finalize(storage, self._free, size)
                self.live += size
                self.peak = max(self.peak, self.live)

        tree_map_only(torch.Tensor, watch, result)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, dropout=0.0, **kwargs):
    """Attention with FlashAttention's memory; on the meta device torch would write out the matrix of scores."""
    causal = module.is_causal if is_causal is None else is_causal
    if query.device.type == "meta":
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        return operator(query, key, value, dropout, causal, scale=scaling)[0].transpose(1, 2), None
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("sizes_only", flash)


def build(config: AuLlavaConfig, lora: bool, checkpointing: bool, dtype: torch.dtype = torch.bfloat16):
    """The model on the meta device, ready to train: with the paper's LoRA, or in full."""
    config._attn_implementation = "sizes_only"
    with torch.device("meta"):
        model = AuLlavaForConditionalGeneration(config)
        if lora:
            adapter = LoraConfig(r=8, target_modules=LORA_TARGETS["both"], modules_to_save=["multi_modal_projector"])
            model = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    model = model.to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def step(model, batch: int, text: int, answer: int, shared: bool = False, side: int = CROP_SIZE) -> None:
    """One forward and backward pass, on the model's own device.

    Args:
        model: AU-LLaVA, or a `PeftModel` of one.
        batch (`int`): Pictures.
        text (`int`): Tokens of the prompt without the image.
        answer (`int`): Tokens of the answer, on which the loss is.
        shared (`bool`, *optional*): Compute the prompt's text once for the batch, as `SharedPrefixTrainer` does.
        side (`int`, *optional*, defaults to 224): Pixels along a side of a picture.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    device, words = core.device, core.get_input_embeddings()
    # A mask that is ready is taken as it is; making one would look at values, which the meta device has not.
    ready = {"attention_mask": torch.zeros(1, 1, 1, 1, device=device)}
    pictures = torch.zeros(batch, 3, side, side, dtype=core.dtype, device=device)
    image = torch.stack(core.get_image_features(pictures).pooler_output)
    cache = None
    if shared:
        cache = DynamicCache(config=core.config)
        prefix = torch.zeros(1, text, dtype=torch.long, device=device)
        core.model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True, **ready)
        cache.batch_repeat_interleave(batch)
    ids = torch.zeros(batch, answer + (0 if shared else text), dtype=torch.long, device=device)
    embedded = torch.cat([words(ids), image], 1)
    states = core.model.language_model(inputs_embeds=embedded, past_key_values=cache, use_cache=False, **ready)
    logits = core.lm_head(states.last_hidden_state[:, -answer:]).float()
    labels = torch.zeros(batch * answer, dtype=torch.long, device=device)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()


def activations(model, batch: int, text: int, answer: int, shared: bool = False, side: int = CROP_SIZE) -> int:
    """Bytes of a step at its worst moment, beyond weights and their gradients."""

    def drop(weight: torch.Tensor) -> None:
        weight.grad = None  # gradients are counted with the weights

    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters() if weight.requires_grad]
    with PeakMemory() as memory:
        step(model, batch, text, answer, shared, side)
    for hook in hooks:
        hook.remove()
    return memory.peak


@dataclass(frozen=True)
class Sizes:
    """How many parameters a model has, and which parts of it a strategy treats apart.

    Args:
        frozen (`int`): Parameters that stay as they are.
        learnt (`int`): Parameters that are trained.
        linear (`int`): Those of the language model's linear layers, which QLoRA keeps in 4 bits.
        layer (`int`): The largest layer, which FSDP gathers as one.
        ends (`int`): Embeddings and language modelling head, which FSDP gathers beside it.
    """

    frozen: int
    learnt: int
    linear: int
    layer: int
    ends: int

    @classmethod
    def of(cls, model) -> "Sizes":
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = core.model.language_model.layers
        count = {True: 0, False: 0}
        for weight in model.parameters():
            count[weight.requires_grad] += weight.numel()
        return cls(
            frozen=count[False],
            learnt=count[True],
            linear=sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2),
            layer=sum(weight.numel() for weight in layers[0].parameters()),
            ends=core.get_input_embeddings().weight.numel() + core.lm_head.weight.numel(),
        )


def held(sizes: Sizes, tuning: str, strategy: str, processes: int) -> float:
    """Bytes of weights, gradients, optimizer states and buffers on each GPU.

    Args:
        sizes ([`Sizes`]): Of the model that `tuning` trains.
        tuning (`str`): `lora`, `qlora`, `full`.
        strategy (`str`): `single`, `ddp`, `fsdp2`, `zero2` or `zero3`; the files of `recipes/accelerate/`.
        processes (`int`): GPUs that share the work.

    Frozen weights are bfloat16. Trained ones are float32 in `train_sft.py`, as are their gradients and AdamW's two
    moments: 16 bytes a weight. On one GPU and under DDP, computing in bfloat16 keeps a copy of 2 bytes more. FSDP2
    spreads all 16; DeepSpeed keeps weights and gradients in bfloat16 beside a float32 copy and the moments, again 16
    bytes, of which ZeRO-2 spreads all but the weights, and ZeRO-3 all.
    """
    frozen, learnt = 2.0 * sizes.frozen, float(sizes.learnt)
    if tuning == "qlora":
        frozen -= (2 - NF4) * sizes.linear
    buckets = 2 * min(BUCKETS, 2 * learnt)
    return {
        "single": frozen + 18 * learnt,
        "ddp": frozen + 18 * learnt + 4 * learnt,  # a second copy of the gradients, on its way to the others
        # This layer and the next one are gathered, in the precision of computing, and one layer's gradients.
        "fsdp2": (frozen + 16 * learnt) / processes + 2 * (3 * sizes.layer + sizes.ends),
        "zero2": frozen + 2 * learnt + 14 * learnt / processes + buckets,
        "zero3": (frozen + 16 * learnt) / processes + 2 * LIVE + buckets,
    }[strategy]


def table(processes: int, text: int, answer: int, side: int) -> list[dict]:
    """A row for each way of training: bytes at rest, bytes a sample, and the largest batch that each GPU takes."""
    rows = []
    for tuning, path, checkpointing, strategies in WAYS:
        # With float32 weights the sums that run through the layers are float32, too.
        dtype = torch.float32 if tuning == "full" and "single" in strategies else torch.bfloat16
        model = build(AuLlavaConfig(), tuning != "full", checkpointing, dtype)
        shape = (text, answer, path == "shared prefix", side)
        one, two = (activations(model, batch, *shape) for batch in (1, 2))
        sample = two - one
        for strategy in strategies:
            rest = held(Sizes.of(model), tuning, strategy, processes) + one - sample + OVERHEAD
            rows.append(
                {
                    "tuning": tuning,
                    "path": path,
                    "checkpointing": checkpointing,
                    "strategy": strategy,
                    "fixed_bytes": rest,
                    "sample_bytes": sample,
                    "batch": {gpu: max(0, int((gpu * 1e9 - rest) // sample)) for gpu in GPUS},
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="GPUs that DDP, FSDP2 and ZeRO spread over")
    parser.add_argument("--text", type=int, default=510, help="tokens of the prompt without the image; 12 units")
    parser.add_argument("--answer", type=int, default=38, help="tokens of the answer; 12 units of one digit")
    parser.add_argument("--side", type=int, default=CROP_SIZE, help="pixels along a side of a picture, 14 a patch")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()

    rows = table(args.processes, args.text, args.answer, args.side)
    image = (args.side // AuLlavaConfig().vision_config.patch_size) ** 2
    print(f"Largest batch a GPU, {args.text} + {image} + {args.answer} tokens a sample, {args.processes} processes")
    print(
        "| tuning | path | checkpointing | strategy | fixed GB | GB a sample | " + " | ".join(f"{g} GB" for g in GPUS)
    )
    print("|" + "---|" * (6 + len(GPUS)))
    for row in rows:
        cells = [row["tuning"], row["path"], "on" if row["checkpointing"] else "off", row["strategy"]]
        cells += [f"{row['fixed_bytes'] / 1e9:.1f}", f"{row['sample_bytes'] / 1e9:.2f}"]
        print("| " + " | ".join(cells + [str(size or "-") for size in row["batch"].values()]) + " |")
    if args.json:
        print(json.dumps({"processes": args.processes, "text": args.text, "answer": args.answer, "rows": rows}))


if __name__ == "__main__":
    main()
