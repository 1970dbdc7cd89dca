"""How many forward passes and how much time an answer takes, by each way of decoding it, side by side in one run.

    python benchmarks/decoding.py [--quick] [--repeats 3] [--json] [--processor_time] [--only MODEL TASK BATCH]

The four ways are plain greedy `generate`, `generate` under the grammar, and our exact and parallel read-outs, each
with and without the text's keys and values from memory. Times are medians; speed-ups are against plain `generate`
without that memory in the same run, so that they mean the same on any machine. The exit status is 1 if a bar is
missed.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from PIL import Image, ImageChops, ImageEnhance
from transformers import Dinov2Config, LlamaConfig, set_seed
from transformers.utils import logging

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
from au_llava.action_units import TASKS
from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces
from au_llava.grammar_au_llava import AnswerGrammar, GrammarLogitsProcessor
from au_llava.readout_au_llava import READOUTS


QUICK_SECONDS = 25  # after these --quick starts no further measurement


def faces(count: int) -> list[Image.Image]:
    """The first test faces of the committed sample."""
    builder = SyntheticFaces()
    builder.download_and_prepare()
    return builder.as_dataset("test")[:count]["image"]


def mid_size(tokenizer) -> tuple[AuLlavaForConditionalGeneration, AuLlavaProcessor]:
    """A language model of 8 layers, 512 wide, with random weights, on 256 patches; text first."""
    set_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    vision = Dinov2Config(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, use_mask_token=False)
    language = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AuLlavaForConditionalGeneration.from_backbones(vision, language, tokenizer=tokenizer)
    return model.eval(), AuLlavaProcessor.from_backbones(None, tokenizer, prompt_layout="text_first")


class Passes:
    """Counts the language model's forward passes, and has the clock."""

    def __init__(self, model: AuLlavaForConditionalGeneration, clock: Callable[[], float]):
        self.count, self.clock = 0, clock
        model.model.language_model.register_forward_hook(self)

    def __call__(self, *_) -> None:
        self.count += 1


def measure(run: Callable, passes: Passes, repeats: int) -> tuple[float, int]:
    """Median seconds, and passes, of a run."""
    times = []
    for _ in range(repeats):
        passes.count, start = 0, passes.clock()
        with torch.inference_mode():
            run()
        times.append(passes.clock() - start)
    return statistics.median(times), passes.count


def ways(model, inputs: dict, grammar: AnswerGrammar) -> dict[tuple[str, bool], Callable]:
    """By name, and whether the text is taken from memory: what answers a batch."""
    ids = inputs["input_ids"]
    shared = model._shared_length(ids, inputs["attention_mask"])
    greedy = {**inputs, "do_sample": False, "max_new_tokens": len(grammar)}
    rule = GrammarLogitsProcessor(grammar, ids.shape[1])

    def generate(prefix: bool, **settings):
        if prefix:
            settings["past_key_values"] = model._cache(ids[:1, :shared], len(ids), None)
        return model.generate(**greedy, **settings)

    found: dict[tuple[str, bool], Callable] = {}
    for prefix in (False, True):
        found["generate", prefix] = lambda prefix=prefix: generate(prefix)
        found["generate, grammar", prefix] = lambda prefix=prefix: generate(prefix, logits_processor=[rule])
        for readout in READOUTS:
            found[readout, prefix] = lambda prefix=prefix, readout=readout: model.recognize(
                **inputs, grammar=grammar, reuse_prefix=prefix, readout=readout
            )
    return found


def compare(name, model, processor, passes, task, batch, pictures, repeats, rows) -> None:
    """Time all ways on one batch, and print a line for each."""
    grammar = processor.grammar(task)
    inputs = processor(images=pictures[:batch], task=task)
    plain = None
    for (way, prefix), run in ways(model, inputs, grammar).items():
        if way in READOUTS or prefix:
            measure(run, passes, 1)  # fills the memory of texts
        seconds, count = measure(run, passes, repeats)
        plain = plain or seconds
        row = {
            "model": name, "task": task, "batch": batch, "way": way, "shared_prefix": prefix, "passes": count,
            "milliseconds": 1000 * seconds, "images_per_second": batch / seconds, "speed_up": plain / seconds,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:9}{task:16}{batch:>6}  {way:18}{'yes' if prefix else 'no':>7}{count:>8}{1000 * seconds:>10.1f}"
            f"{batch / seconds:>10.1f}{plain / seconds:>10.2f}",
            flush=True,
        )


@torch.inference_mode()
def prompt_pass(model, processor, passes, picture, repeats: int) -> float:
    """How many times faster the language model reads a prompt whose text it knows; the encoder not counted."""
    inputs = processor(images=picture, task="intensity")
    ids = inputs["input_ids"]
    shared = model._shared_length(ids, inputs["attention_mask"])
    encoded = {"image": model.get_image_features(pixel_values=inputs["pixel_values"])}
    model._prefix(ids[:, :shared])

    def whole():
        model(input_ids=ids, mm_encoder_outputs=encoded, use_cache=True, logits_to_keep=1)

    def rest():
        cache = model._cache(ids[:, :shared], 1, None)
        model(input_ids=ids[:, shared:], past_key_values=cache, mm_encoder_outputs=encoded, logits_to_keep=1)

    whole(), rest()
    return measure(whole, passes, repeats)[0] / measure(rest, passes, repeats)[0]


def drafts(model, processor, task: str, pictures: list, others: list) -> dict[str, float]:
    """Mean passes of the exact read-out at batch 1, by where its first draft comes from."""
    grammar = processor.grammar(task)

    def answer(picture, **settings):
        return model.recognize(**processor(images=picture, task=task), grammar=grammar, **settings)

    frequent = torch.cat([answer(picture).sequences for picture in others]).mode(0).values[None]
    counts: dict[str, list[int]] = {"lowest values": [], "most frequent values": [], "neutral pass": [], "frame": []}
    for picture in pictures:
        counts["lowest values"].append(answer(picture).forwards)
        counts["most frequent values"].append(answer(picture, draft=frequent).forwards)
        first = answer(picture, readout="parallel")
        counts["neutral pass"].append(first.forwards + answer(picture, draft=first.sequences).forwards)
        before = ImageEnhance.Brightness(ImageChops.offset(picture, 2, 1)).enhance(1.02)
        counts["frame"].append(answer(picture, draft=answer(before).sequences).forwards)
    return {source: statistics.mean(numbers) for source, numbers in counts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--quick", action="store_true", help="fewer batches and repeats, within 50 seconds")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, of which the median is told")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--processor_time", action="store_true", help="seconds of the processor, where other work shares the machine"
    )
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "TASK", "BATCH"), help="one part: mid-size intensity 32")
    args = parser.parse_args()
    if args.only and (args.only[0] not in ("default", "mid-size") or args.only[1] not in TASKS):
        parser.error(
            f"--only {' '.join(args.only)}: give default or mid-size, one of {', '.join(TASKS)}, and a number"
        )
    logging.disable_progress_bar()
    clock = time.process_time if args.processor_time else time.perf_counter
    started = clock()

    model = AuLlavaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AuLlavaProcessor.from_pretrained(args.model)
    count, repeats = (8, 1) if args.quick else (32, args.repeats)
    if args.only:
        count = max(count, int(args.only[2]))  # faces enough for a batch
    pictures = [picture.convert("RGB") for picture in faces(2 * count)]
    pictures, others = pictures[:count], pictures[count:]
    wide, wide_processor = mid_size(processor.tokenizer)

    def late() -> bool:
        return args.quick and clock() - started > QUICK_SECONDS

    def about() -> dict:
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": clock() - started}

    known = {"default": (model, processor, Passes(model, clock))}
    known["mid-size"] = (wide, wide_processor, Passes(wide, clock))
    header = (f"{name:{width}}" for name, width in (("model", 9), ("task", 16), ("batch", 8), ("way", 18)))
    print(*header, "prefix  passes        ms   faces/s  speed-up", sep="")
    rows: list[dict] = []
    if args.only:
        name, task, batch = args.only
        compare(name, *known[name], task, int(batch), pictures, repeats, rows)
        if args.json:
            print(json.dumps(about() | {"rows": rows}))
        return 0

    # What the bars are about comes first, in case time runs out.
    passes: dict[str, dict[str, float]] = {}
    for task in ("detection", "intensity"):
        grammar, found = processor.grammar(task), {}
        for readout in READOUTS:
            runs = [
                model.recognize(**processor(images=picture, task=task), grammar=grammar, readout=readout).forwards
                for picture in pictures
            ]
            found[readout] = statistics.median(runs)
        passes[task] = found
    faster = prompt_pass(*known["mid-size"], pictures[0], 3)
    plan = [("default", task, batch) for batch in (1, 8, 32) for task in ("intensity", "detection", "intensity_level")]
    plan += [("mid-size", task, batch) for batch in (1, 8, 32) for task in TASKS]
    for name, task, batch in plan:
        if (rows and late()) or (args.quick and batch > 8):
            continue
        compare(name, *known[name], task, batch, pictures, repeats, rows)
    sources = {} if late() else {task: drafts(model, processor, task, pictures, others) for task in TASKS}
    for task, numbers in sources.items():
        told = ", ".join(f"{source} {number:.2f}" for source, number in numbers.items())
        print(f"passes of the exact read-out by its first draft, {task}: {told}")

    exact = next(
        row for row in rows if (row["task"], row["way"], row["shared_prefix"]) == ("intensity", "exact", True)
    )
    bars = {
        "exact, 12 binary units: median passes (at most 3)": (passes["detection"]["exact"], 3, False),
        "exact, 24 intensities: median passes (at most 8)": (passes["intensity"]["exact"], 8, False),
        "parallel: passes (1)": (max(found["parallel"] for found in passes.values()), 1, False),
        "exact, 24 intensities, batch 1: speed-up (at least 5)": (exact["speed_up"], 5, True),
        "shared prefix, mid-size: prompt pass faster (at least 2)": (faster, 2, True),
    }
    missed = [bar for bar, (value, limit, more) in bars.items() if (value < limit if more else value > limit)]
    for bar, (value, _, _) in bars.items():
        print(f"{'missed' if bar in missed else 'held  '}  {bar}: {value:.2f}")
    if args.json:
        values = {bar: value for bar, (value, _, _) in bars.items()}
        print(json.dumps({**about(), "rows": rows, "drafts": sources, "bars": values, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
