"""How fast AU-LLaVA trains, and how near that comes to what the machine can compute, by each way of training it.

    python benchmarks/training.py [--pair tiny] [--quick] [--json]
    python benchmarks/training.py --pair paper --workers 8   # one GPU of 80 GB or more: the 7-billion-parameter pair

Each way is a real run of the project's trainer on noise pictures and random labels; nothing is downloaded. Model FLOPs
utilisation (MFU) is the multiplications and additions that the way's forward and backward passes need (frozen weights
need no gradient; padding and recomputation are not counted), over time and over the rate of large matrix
multiplications, which is measured just before.
"""

import argparse
import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Dinov2Config, LlamaConfig, PrinterCallback, TrainerCallback, logging, set_seed
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
from au_llava.action_units import get_task, select
from au_llava.arguments import LORA_TARGETS
from au_llava.datasets_scripts.collator import QuestionCollator
from au_llava.datasets_scripts.instructions import FEATURES, instruct, make_row
from au_llava.face_alignment import CROP_SIZE
from au_llava.losses import AnswerTrainer
from au_llava.shared_prefix import SharedPrefixTrainer
from benchmarks.memory import PeakMemory, build, step


ONE = ("detection:bp4d",)
THREE = ("detection:bp4d", "intensity_level:disfa", "intensity:feafa")


@dataclass(frozen=True)
class Way:
    """One way of training.

    Args:
        name (`str`): For the table.
        layout (`str`): `image_first` or `text_first`.
        trainer (`type`): How batches are drawn and computed.
        questions (`tuple[str, ...]`): What is asked, equally often.
        settings (`dict`): Fields of `SFTConfig`.
    """

    name: str
    layout: str = "image_first"
    trainer: type = AnswerTrainer
    questions: tuple[str, ...] = ONE
    settings: tuple[tuple[str, bool], ...] = ()


class BucketedTrainer(AnswerTrainer):
    """The plain path, with batches of one question each, so of one length."""

    questions = SharedPrefixTrainer.questions


WAYS = (
    Way("image first"),
    Way("text first", "text_first"),
    Way("text first, shared prefix", "text_first", SharedPrefixTrainer),
    Way("three questions, mixed in batches", questions=THREE),
    Way("three questions, batches by length", trainer=BucketedTrainer, questions=THREE),
    Way("three questions, shared prefix", "text_first", SharedPrefixTrainer, THREE),
    Way("image first, gradient checkpointing", settings=(("gradient_checkpointing", True),)),
    Way("image first, float32", settings=(("bf16", False),)),
    Way("image first, torch.compile", settings=(("torch_compile", True),)),
)


def make_pair(pair: str) -> tuple[AuLlavaConfig, AuLlavaProcessor]:
    """The shape of the model, `tiny`, `default` (the checkpoint at the root) or `paper`, and the processor for it."""
    known = AuLlavaProcessor.from_pretrained(default_checkpoint())
    if pair == "default":
        return AuLlavaConfig.from_pretrained(default_checkpoint()), known
    processor = AuLlavaProcessor.from_backbones(None, known.tokenizer, patch_size=14 if pair == "paper" else 28)
    if pair == "paper":
        return AuLlavaConfig(image_token_index=processor.image_token_id), processor
    vision = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=28, use_mask_token=False
    )
    language = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    config = AuLlavaConfig(
        vision_config=vision, text_config=language, image_token_index=processor.image_token_id, image_seq_length=64
    )
    return config, processor


def make_rows(questions: tuple[str, ...], count: int) -> Dataset:
    """Noise pictures with random labels, `count` in all, the questions in turn."""
    generator, rows = np.random.default_rng(0), []
    for number, question in enumerate(islice(cycle(questions), count)):
        task, units = question.split(":")
        labels = {unit.code: generator.choice(get_task(task).values) for unit in select(units)}
        image = Image.fromarray(generator.integers(0, 255, (224, 224, 3), dtype=np.uint8))
        origin = {"dataset": "noise", "subject": str(number), "sequence": "", "frame": number}
        rows.append(make_row(image, labels, task, instruct(labels, task), **origin))
    return Dataset.from_list(rows, features=FEATURES)


def matmul_rate(device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of the machine's best large matrix multiplication."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20 if device == "cuda" else 8):
        wait(device)
        start = clock()
        left @ right
        wait(device)
        best = min(best, clock() - start)
    return 2 * size**3 / best


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """What time is told by."""
    return time.process_time if args.processor_time else time.perf_counter


def wait(device: str) -> None:
    """Let the GPU finish what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def flops(
    config: AuLlavaConfig, lora: bool, batch: int, text: int, answer: int, shared: bool, side: int = CROP_SIZE
) -> int:
    """Operations of one forward and backward pass, counted by torch on the meta device.

    Args:
        config ([`AuLlavaConfig`]): The model's shape.
        lora (`bool`): Train the paper's LoRA, or everything.
        batch (`int`): Pictures.
        text (`int`): Tokens of the prompt without the image.
        answer (`int`): Tokens of the answer.
        shared (`bool`): Whether the text is computed once for the batch.
        side (`int`, *optional*, defaults to 224): Pixels along a side of a picture.
    """
    model = build(copy.deepcopy(config), lora, checkpointing=False)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_backward
    with FlopCounterMode(display=False, custom_mapping={attention: attention_backward}) as counter:
        step(model, batch, text, answer, shared, side)
    return counter.get_total_flops()


def attention_backward(gradient: tuple, query: tuple, key: tuple, value: tuple, *args, **kwargs) -> int:
    """Operations of attention's backward pass, from shapes; torch's own count adds the scores computed again."""
    return 2 * sdpa_flop_count(query, key, value)


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, data included."""

    def __init__(self, device: str, clock: Callable[[], float]):
        self.device, self.clock, self.times = device, clock, [clock()]

    def on_step_end(self, args, state, control, **kwargs):
        wait(self.device)
        self.times.append(self.clock())

    def seconds(self) -> float:
        """The mean step, for steps about other questions take other times; without the first third of them, in which
        memory is taken and kernels are chosen."""
        times = np.diff(self.times)
        return float(times[len(times) // 3 :].mean())


def measure(
    way: Way, args, config: AuLlavaConfig, processor: AuLlavaProcessor, device: str, folder: str, counted: dict
) -> dict:
    """Train for some steps in one way; `counted` keeps what [`flops`] found, by its arguments."""
    made, expected = processor.image_tokens, config.image_seq_length
    if made != expected:
        raise ValueError(f"The processor writes {made} image tokens, and the model makes {expected}; give its own.")
    set_seed(0)
    lora = args.pair == "paper"
    processor = AuLlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=processor.patch_size, prompt_layout=way.layout
    )
    with torch.device(device):
        dtype = torch.bfloat16 if args.pair == "paper" else torch.float32
        model = AuLlavaForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)
    settings = {"bf16": True, "gradient_checkpointing": False} | dict(way.settings)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    watch = Stopwatch(device, clock(args))
    trainer = way.trainer(
        model=model,
        args=SFTConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, max_length=None, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no", use_cpu=device == "cpu",
            dataloader_num_workers=args.workers, remove_unused_columns=False, **settings,
        ),
        train_dataset=make_rows(way.questions, args.batch * (args.steps + len(THREE))),
        processing_class=processor,
        data_collator=QuestionCollator(collate),
        callbacks=[watch],
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules=LORA_TARGETS["both"], modules_to_save=["multi_modal_projector"]
        )
        if lora
        else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as train_sft.py does
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()

    seconds, shared = watch.seconds(), way.trainer is SharedPrefixTrainer
    needed = tokens = 0
    for question in way.questions:
        task, units = question.split(":")
        # The image stands in the prompt as one token here.
        text = len(processor.tokenizer(processor.prompt(task, units), add_special_tokens=False)["input_ids"]) - 1
        answer = len(processor.grammar(task, units))
        shape = (lora, args.batch, text, answer, shared, processor.image_processor.crop_size["height"])
        if shape not in counted:
            counted[shape] = flops(config, *shape)
        needed += counted[shape] / len(way.questions)
        tokens += (text + processor.image_tokens + answer) / len(way.questions)
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:  # what a step makes, beside weights and optimizer states; with gradients, which are freed after each step
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.zero_grad()
        with PeakMemory() as tensors:
            trainer.training_step(trainer.model, batch)
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        held = [*trainer.model.parameters(), *states]
        memory = tensors.peak + sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    return {
        "way": way.name,
        "samples_per_second": args.batch / seconds,
        "tokens_per_second": args.batch * tokens / seconds,
        "tokens": round(tokens),
        "memory_bytes": memory,
        "flops_per_sample": needed / args.batch,
        "flops_per_second": needed / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["tiny", "default", "paper"], default="default")
    parser.add_argument("--batch", type=int, help="pictures a step; 16, with --quick 4")
    parser.add_argument("--steps", type=int, help="optimizer steps a way; 12, with --quick 3")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--ways", help="only the ways whose name holds this, torch.compile among them")
    parser.add_argument("--quick", action="store_true", help="the tiny pair and few steps; no torch.compile")
    parser.add_argument(
        "--processor_time", action="store_true", help="count this process's seconds on the CPU: for a busy machine"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.pair = "tiny"
    args.batch = args.batch or (4 if args.quick else 16)
    args.steps = args.steps or (3 if args.quick else 12)

    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.pair == "paper" and device == "cpu":
        parser.error("the paper's pair wants a CUDA GPU of 80 GB or more; benchmarks/memory.py says what it takes")
    config, processor = make_pair(args.pair)
    rates = {
        half: matmul_rate(device, torch.bfloat16 if half else torch.float32, clock(args)) for half in (True, False)
    }
    print(f"{args.pair}, batch {args.batch}, {device}; matrix multiplication: "
          f"{rates[True] / 1e12:.3f} TFLOP/s in bfloat16, {rates[False] / 1e12:.3f} in float32")  # fmt: skip
    print("| way | samples/s | tokens a sample | tokens/s | peak memory, GB | TFLOP a sample | TFLOP/s | MFU |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict] = []
    counted: dict[tuple, int] = {}
    for way in WAYS:
        settings = dict(way.settings)
        if args.ways and args.ways not in way.name:
            continue
        skipped = None
        if settings.get("torch_compile") and (args.quick or not args.ways):
            skipped = "left out, for compiling takes minutes; --ways torch.compile measures it alone"
        elif settings.get("torch_compile") and device == "cpu" and not shutil.which("g++"):
            skipped = "torch.compile needs a C++ compiler, and there is no g++"
        elif settings.get("bf16") is False and args.pair == "paper":
            skipped = "the paper's pair is benchmarked in bfloat16 only"
        if skipped:
            rows.append({"way": way.name, "skipped": skipped})
            print(f"| {way.name} | {skipped} |" + " |" * 6, flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(way, args, config, processor, device, folder, counted)
            except RuntimeError as error:  # out of memory, or not compilable: the other ways still count
                rows.append({"way": way.name, "skipped": f"{type(error).__name__}: {error}"})
                print(f"| {way.name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |" + " |" * 6)
                continue
            finally:
                torch.cuda.empty_cache()
        row["mfu"] = row["flops_per_second"] / rates[settings.get("bf16", True)]
        rows.append(row)
        print(
            f"| {way.name} | {row['samples_per_second']:.2f} | {row['tokens']} | {row['tokens_per_second']:.0f} | "
            f"{row['memory_bytes'] / 1e9:.2f} | {row['flops_per_sample'] / 1e12:.4f} | "
            f"{row['flops_per_second'] / 1e12:.3f} | {row['mfu']:.1%} |", flush=True,
        )  # fmt: skip
    if args.json:
        facts = {
            "pair": args.pair,
            "batch": args.batch,
            "steps": args.steps,
            "processor_time": args.processor_time,
            "device": device,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "matmul_bf16": rates[True],
            "matmul_float32": rates[False],
            "rows": rows,
        }
        if device == "cuda":
            facts["gpu"] = torch.cuda.get_device_name()
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
