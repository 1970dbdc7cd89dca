"""How many forward passes and how much time an answer takes, by each way of decoding it, side by side in one run.

    python benchmarks/decoding.py [--quick] [--json]

Times are medians. Ratios are to plain greedy `generate` in the same run, so that they mean the same on any machine.
"""

import argparse
import json
import statistics
import time

import torch

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, default_checkpoint
from au_llava.grammar_au_llava import GrammarLogitsProcessor


def faces(count: int) -> list:
    """The first test faces of the committed sample."""
    from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces

    builder = SyntheticFaces()
    builder.download_and_prepare()
    return builder.as_dataset("test")[:count]["image"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--quick", action="store_true", help="batch sizes 1 and 8, two repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()

    model = AuLlavaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AuLlavaProcessor.from_pretrained(args.model)
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    model.lm_head.register_forward_hook(count)
    rows = []
    print(f"{'task':16}{'batch':>6}  {'way':34}{'passes':>7}{'ms':>9}{'faces/s':>9}{'speed-up':>9}")
    for task in ("detection", "intensity_level", "intensity"):
        grammar = processor.grammar(task)
        for batch in (1, 8) if args.quick else (1, 8, 32):
            inputs = processor(images=faces(batch), task=task)
            rule = GrammarLogitsProcessor(grammar, inputs["input_ids"].shape[1])
            greedy = {**inputs, "do_sample": False, "max_new_tokens": len(grammar)}
            ways = {
                "generate": lambda greedy=greedy: model.generate(**greedy),
                "generate, grammar": lambda greedy=greedy, rule=rule: model.generate(
                    **greedy, logits_processor=[rule]
                ),
                "recognize, text computed each time": lambda inputs=inputs, grammar=grammar: model.recognize(
                    **inputs, grammar=grammar, reuse_prefix=False
                ),
                "recognize": lambda inputs=inputs, grammar=grammar: model.recognize(**inputs, grammar=grammar),
            }
            plain = None
            for name, run in ways.items():
                run()  # warm up, and fill the memory of texts
                times = []
                for _ in range(2 if args.quick else 5):
                    passes, start = 0, time.perf_counter()
                    with torch.inference_mode():
                        run()
                    times.append(time.perf_counter() - start)
                seconds = statistics.median(times)
                plain = plain or seconds
                rows.append(
                    {"task": task, "batch": batch, "way": name, "passes": passes, "seconds": seconds,
                     "speed_up": plain / seconds}
                )  # fmt: skip
                print(
                    f"{task:16}{batch:>6}  {name:34}{passes:>7}{1000 * seconds:>9.1f}{batch / seconds:>9.1f}"
                    f"{plain / seconds:>9.2f}"
                )
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
