"""How near recognition comes to what the hardware allows: by default the paper's 7B pair, random weights, on one GPU.

    python benchmarks/gpu.py [--task detection] [--batches 1 8 32 128] [--compile] [--json]
    python benchmarks/gpu.py --model . --device cpu --dtype float32 --batches 1 2

For each pass the least time is the larger of its floating-point operations over the measured matrix-product rate and
the bytes of its weights, keys and values over the measured memory bandwidth. The share is that sum over the time
taken. `--compile` measures everything once more with torch.compile on norms and gated MLPs, where an operation at a
time costs memory bandwidth.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
from au_llava.readout_au_llava import READOUTS


def seconds(run: Callable, device: torch.device, repeats: int) -> float:
    """Median time of a run."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def hardware(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a large matrix product, and bytes a second of a large copy."""
    side, size = (8192, 2**31) if device.type != "cpu" else (1024, 2**26)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    memory = torch.empty(size, dtype=torch.int8, device=device)
    rate = 2 * side**3 / seconds(lambda: matrix @ matrix, device, 5)
    return rate, 2 * size / seconds(lambda: memory.clone(), device, 5)  # read and written


class Work:
    """Adds up the least time of every pass through the encoder and the language model."""

    def __init__(self, model: AuLlavaForConditionalGeneration, rate: float, bandwidth: float):
        self.rate, self.bandwidth, self.least, self.passes = rate, bandwidth, 0.0, 0
        vision, language = model.model.vision_tower, model.model.language_model
        vision.register_forward_hook(lambda tower, inputs, outputs: self.encoder(tower, outputs))
        language.register_forward_pre_hook(lambda tower, _, inputs: self.language(tower, inputs), with_kwargs=True)
        model.lm_head.register_forward_pre_hook(lambda layer, inputs: self.head(layer, *inputs))

    def add(self, operations: float, size: float) -> None:
        self.least += max(operations / self.rate, size / self.bandwidth)

    def encoder(self, tower, outputs) -> None:
        """Every weight times every place of the last map or sequence: an estimate for convolutional encoders."""
        states = outputs.last_hidden_state
        batch, places = states.shape[0], states[0].numel() // tower.config.hidden_size
        weights = sum(weight.numel() for weight in tower.parameters())
        self.add(2 * weights * places * batch, weights * states.element_size())

    def head(self, layer, states: torch.Tensor) -> None:
        """The output layer, for the tokens that it is asked about."""
        weights, tokens = layer.weight.numel(), states[..., 0].numel()
        self.add(2 * weights * tokens, weights * states.element_size())

    def language(self, tower, inputs: dict) -> None:
        """Products with all weights, and attention to what came before."""
        embeddings, config = inputs["inputs_embeds"], tower.config
        batch, tokens, _ = embeddings.shape
        cache = inputs["cache" if "cache" in inputs else "past_key_values"]  # until transformers 5.23
        reach = tokens + int(cache.get_seq_length())
        weights = sum(weight.numel() for weight in tower.layers.parameters())
        seen = tokens * (reach - (tokens - 1) / 2)  # by all of them together: none sees those that come after it
        attention = 4 * config.num_hidden_layers * config.hidden_size * seen
        kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * reach * batch
        self.add((2 * weights * tokens + attention) * batch, (weights + kept) * embeddings.element_size())
        self.passes += 1


def compile_parts(language: torch.nn.Module) -> None:
    """Compile each layer's norms and its MLP: all layers share what was compiled for the first."""
    for layer in language.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; by default the paper's pair with random weights")
    parser.add_argument("--task", default="detection")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="and compiled; the first batch takes a minute more")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    known = AuLlavaProcessor.from_pretrained(args.model or default_checkpoint())
    if args.model:
        model = AuLlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype, device_map={"": device})
        processor = known
    else:
        processor = AuLlavaProcessor.from_backbones(None, known.tokenizer, prompt_layout="text_first")
        config = AuLlavaConfig(image_token_index=processor.image_token_id, image_seq_length=processor.image_tokens)
        with device:
            model = AuLlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.eval()
    rate, bandwidth = hardware(device, dtype)
    work, grammar, rows = Work(model, rate, bandwidth), processor.grammar(args.task), []
    print(
        f"matrix product {rate / 1e12:.1f} TFLOP/s, memory {bandwidth / 1e9:.0f} GB/s, {args.dtype} on {args.device}"
    )
    print(f"{args.task}, {len(grammar)} tokens an answer, {model.num_parameters():,} parameters")
    print("batch  readout     compiled  passes        ms   images/s  share of the limit")
    for compiled, batch in itertools.product([False, True][: 1 + args.compile], args.batches):
        if compiled and batch == args.batches[0]:
            compile_parts(model.model.language_model)
        pixels = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        inputs = processor(images=list(pixels), task=args.task, do_rescale=False)
        for readout in READOUTS:

            def run(inputs=inputs, readout=readout):
                work.least, work.passes = 0.0, 0
                model.recognize(**inputs, grammar=grammar, readout=readout)

            taken = seconds(run, device, args.repeats)
            share = work.least / taken
            rows.append(
                {"batch": batch, "readout": readout, "compiled": compiled, "passes": work.passes,
                 "milliseconds": 1000 * taken, "images_per_second": batch / taken, "share_of_limit": share}
            )  # fmt: skip
            print(
                f"{batch:>5}  {readout:12}{'yes' if compiled else 'no':8}{work.passes:>8}{1000 * taken:>10.1f}"
                f"{batch / taken:>11.1f}{share:>20.2f}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"flops": rate, "bandwidth": bandwidth, "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
