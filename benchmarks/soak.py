"""Does memory stay flat? Thousands of pictures through the pipeline, with changing sizes, tasks and Action Units.

python -m benchmarks.soak                                  # 2,000 pictures, the default checkpoint
python -m benchmarks.soak --tiny                           # the same with two random layers: minutes less
python -m benchmarks.soak --detector cascade --pictures 200

The table shows the process's resident memory; the exit status is 1 where it grew by more than `--limit` MB after the
first fifth of the pictures, in which caches and allocators fill.
"""

import argparse
import gc
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import psutil
from PIL import Image
from tqdm import tqdm
from transformers import Dinov2Config, LlamaConfig
from transformers.utils import logging

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor, FacialActionUnitPipeline
from au_llava.action_units import TASKS
from checkpoint.tokenizer import train_tokenizer


GROUP = 20  # pictures asked the same; all questions come up within the first fifth of 2,000 pictures
UNITS = (None, "AU12", "AU6,AU12,AU25", "AU1,AU2,AU4")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def tiny_pipeline() -> FacialActionUnitPipeline:
    """Two random layers on 16 patches."""
    tokenizer = train_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, use_mask_token=False
    )
    model = AuLlavaForConditionalGeneration.from_backbones(
        vision, LlamaConfig(vocab_size=len(tokenizer), **shape), tokenizer=tokenizer
    )
    return FacialActionUnitPipeline(model.eval(), processor=AuLlavaProcessor.from_backbones(None, tokenizer, 56))


def write_pictures(folder: Path) -> list[Path]:
    """The example pictures in 24 sizes, and one file that is damaged."""
    paths = []
    for number, source in zip(range(24), cycle(sorted(EXAMPLES.glob("*.jpg"))), strict=False):
        side = 120 + 20 * number
        paths.append(folder / f"{number}.jpg")
        Image.open(source).resize((side, side + 30)).save(paths[-1])
    (folder / "damaged.jpg").write_bytes(paths[0].read_bytes()[:500])
    return [*paths, folder / "damaged.jpg"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="folder or Hub id")
    parser.add_argument("--tiny", action="store_true", help="two random layers instead")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--detector", default="none")
    parser.add_argument("--limit", type=float, default=20.0, help="MB that memory may grow")
    args = parser.parse_args()

    logging.set_verbosity_error()
    if args.tiny:
        pipe = tiny_pipeline()
    else:
        model = AuLlavaForConditionalGeneration.from_pretrained(args.model)
        pipe = FacialActionUnitPipeline(model, processor=AuLlavaProcessor.from_pretrained(args.model))
    process, seen, rows, failed, begun = psutil.Process(), 0, [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pictures = cycle(write_pictures(Path(folder)))
        questions = cycle([(task, units) for units in UNITS for task in TASKS])
        print("pictures  resident memory (MB)")
        with tqdm(total=args.pictures, unit="picture", disable=None) as bar:
            while seen < args.pictures:
                task, units = next(questions)
                some = islice(pictures, min(GROUP, args.pictures - seen))
                for faces in pipe(some, task=task, action_units=units, detector=args.detector):
                    failed += isinstance(faces, dict)
                    seen += 1
                    bar.update()
                gc.collect()
                rows.append((seen, process.memory_info().rss / 1e6))
                if len(rows) % 5 == 1 or seen == args.pictures:
                    bar.write(f"{seen:8,}  {rows[-1][1]:20.1f}", file=sys.stdout)
                    sys.stdout.flush()
    settled = [memory for number, memory in rows if number >= args.pictures / 5]
    quarter = -(-len(settled) // 4)  # most of each: single readings go up and down with what was just computed
    growth = max(settled[-quarter:]) - max(settled[:quarter])
    print(f"{seen:,} pictures, {failed} of them damaged, in {time.monotonic() - begun:.0f} s; memory grew by "
          f"{growth:.1f} MB after the first fifth (limit {args.limit:g} MB).")  # fmt: skip
    return int(growth > args.limit)


if __name__ == "__main__":
    sys.exit(main())
