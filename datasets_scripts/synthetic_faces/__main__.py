"""Render the synthetic faces: `python -m au_llava.datasets_scripts.synthetic_faces --output_dir DIR --split train`."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m au_llava.datasets_scripts.synthetic_faces",
        description="Render the synthetic faces as Parquet shards. A second run goes on where the first one stopped.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", choices=["train", "validation", "test"], action="append",
                        help="which split; may be given several times (default: all three)")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first images of each split, for a quick look")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--images_per_shard", type=int, default=250, help="images in one file (default: 250)")
    parser.add_argument("--seed", type=int, help="of people and pictures (default: that of the standard split)")
    parser.add_argument("--varied", type=float, default=0.0,
                        help="share of images of another make, for training (default: 0)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="for large training sets: in about half the time, with jagged edges")  # fmt: skip
    options = parser.parse_args(arguments)
    # One thread a process: the arrays are small, and several processes already fill the cores. To be set before numpy
    # loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from .writer import SEED, summary, write_split

    for split in options.split or ["train", "validation", "test"]:
        try:
            paths = write_split(
                options.output_dir,
                split,
                options.limit,
                options.workers,
                options.images_per_shard,
                SEED if options.seed is None else options.seed,
                options.varied,
                options.quick,
            )
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        counts = summary(paths)
        print(f"{split}: {counts['images']} images of {counts['identities']} people in {options.output_dir}")
        print(
            "  " + ", ".join(f"{code} {count / counts['images']:.0%}" for code, count in counts["occurrence"].items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
