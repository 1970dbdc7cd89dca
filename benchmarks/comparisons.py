"""What helps: train the same start in several ways, each with the same budget and several seeds, and compare.

    python benchmarks/comparisons.py --start runs/reading --data synthetic:data/synthetic --steps 100 --seeds 0 1

Every way changes fields of the recipe. A run whose scores are stored is not repeated, so a stopped comparison goes on.
The table of all ways goes to docs/comparisons.md.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from au_llava import AuLlavaForConditionalGeneration, AuLlavaProcessor
from au_llava.action_units import describe, get_task, select
from au_llava.datasets_scripts.instructions import Relations, relations_in
from au_llava.datasets_scripts.sources import Source, digest_rows


ROOT = Path(__file__).resolve().parent.parent
# Scores of other ones are no answer.
ASKED = ("start", "start_sha256", "recipe", "recipe_sha256", "data", "data_sha256", "test", "test_sha256", "limit")
ASKED += ("test_limit", "steps")
QUESTIONS = ("detection:bp4d", "intensity_level:disfa", "intensity:feafa")
# By name the fields that differ from the recipe. `SEPARATE` and `LAYOUT` are more than a field; see `train`.
SEPARATE, LAYOUT = "one model for each task", "image before text"
WAYS: dict[str, list[str]] = {
    "the recipe": [],
    "present units count more (rare_weight 0.5)": ["--rare_weight", "0.5"],
    "soft digits (soft_digits 0.05)": ["--soft_digits", "0.05"],
    "brackets and commas count less (format_weight 0.1)": ["--format_weight", "0.1"],
    "units in random order (shuffle)": ["--shuffle", "true"],
    "half of the questions about some units (subset 0.5)": ["--subset", "0.5"],
    "relations between units in T (relations)": ["--relations", "true"],
    LAYOUT: ["--shared_prefix", "false"],
    SEPARATE: [],
}
# Of each task the scores in the table: name, metric, the better direction.
SCORES = {
    "detection": (("F1", "f1", 1), ("ROC-AUC", "roc_auc", 1)),
    "intensity_level": (("MAE", "mae", -1), ("ICC", "icc31", 1)),
    "intensity": (("MAE", "mae", -1), ("ICC", "icc31", 1)),
}


def turn_around(start: str, folder: Path) -> str:
    """The same model with the image before the text in its processor's prompts."""
    if not folder.is_dir():
        folder.with_suffix(".part").mkdir(parents=True, exist_ok=True)
        for path in Path(start).iterdir():
            if path.is_file():
                shutil.copy(path, folder.with_suffix(".part"))
        own = AuLlavaProcessor.from_pretrained(start)
        other = AuLlavaProcessor(
            own.image_processor, own.tokenizer, patch_size=own.patch_size, prompt_layout="image_first"
        )
        other.save_pretrained(folder.with_suffix(".part"))
        os.replace(folder.with_suffix(".part"), folder)
    return str(folder)


def train(name: str, seed: int, args: argparse.Namespace, folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Train in one way: folders of models, and what each is to be asked."""
    turned = Path(args.output, f"start-image_first-{args.start_sha256}")
    start = turn_around(args.start, turned) if name == LAYOUT else args.start
    parts = [(question,) for question in QUESTIONS] if name == SEPARATE else [QUESTIONS]
    made = []
    for number, asked in enumerate(parts):
        output = folder / str(number)
        fields = {
            "model": start, "train_data": args.data, "limit": args.limit, "seed": seed, "output_dir": output,
            "max_steps": args.steps // len(parts), "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        command = [sys.executable, "train_sft.py", "--config", args.recipe]
        for field, value in fields.items():
            command += [f"--{field}", str(value)] if value is not None else []
        with open(folder / f"{number}.log", "w") as log:
            code = subprocess.run(
                [*command, "--questions", *asked, *WAYS[name]], cwd=ROOT, stdout=log, stderr=log
            ).returncode
        if code:
            raise RuntimeError(f"Training {name!r}, seed {seed}, failed; see {log.name}.")
        made.append((output, asked))
    return made


def read_rows(source: str, questions: tuple[str, ...], limit: int | None) -> Dataset:
    """Rows of all questions, at most `limit` of each."""
    parts = Source(source).rows(questions=questions)
    return concatenate_datasets([part.select(range(min(len(part), limit or len(part)))) for part in parts])


@torch.inference_mode()
def score(model_dir: Path, rows: Dataset, relations: Relations | None, batch_size: int = 32) -> dict[str, float]:
    """Ask a trained model about all rows; the means over Action Units of [`SCORES`], e.g. `detection F1`."""
    model = AuLlavaForConditionalGeneration.from_pretrained(model_dir).eval()
    processor = AuLlavaProcessor.from_pretrained(model_dir)
    groups = defaultdict(list)
    for number, (task, codes) in enumerate(zip(rows["task"], rows["action_units"], strict=True)):
        groups[task, tuple(codes)].append(number)
    found = {}
    for (task, codes), numbers in groups.items():
        units, grammar = select(list(codes)), processor.grammar(task, list(codes))
        text = describe(task, units, relations.sentence(units) if relations else "")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        labels, values, expected = [], [], []
        for start in range(0, len(numbers), batch_size):
            batch = rows[numbers[start : start + batch_size]]
            crops = [images[0] for images in batch["images"]]
            inputs = processor(
                images=crops, text=[prompt] * len(crops), padding=True, add_special_tokens=False, return_tensors="pt"
            )
            answer = model.recognize(**inputs, grammar=grammar)
            labels += batch["labels"]
            values.append(answer.values.numpy())
            expected.append(answer.expected_values.numpy())
        about = {"references": np.array(labels, float), "action_units": list(codes)}
        if len(get_task(task).values) == 2:
            metric = evaluate.load(str(ROOT / "metrics/au_detection"))
            result = metric.compute(
                predictions=np.concatenate(values), probabilities=np.concatenate(expected), **about
            )
        else:  # the mean of the distribution tells more than its mode, which soon is always 0
            metric = evaluate.load(str(ROOT / "metrics/au_intensity"))
            result = metric.compute(predictions=np.concatenate(expected), **about)
        found |= {f"{task} {title}": float(result[key]) for title, key, _ in SCORES[task]}
    return found


def run(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and score one way with one seed, or read the scores that are there.

    Raises:
        ValueError: Those that are there were made of other data, or by other steps.
    """
    folder = Path(args.output, f"{list(WAYS).index(name)}-{seed}")
    stored, settings = folder / "scores.json", {option: getattr(args, option) for option in ASKED}
    if stored.is_file():
        known = json.loads(stored.read_text())
        if known["settings"] != settings:
            raise ValueError(f"{stored} was made with {known['settings']}, not {settings}; give another --output.")
        return known["scores"]
    folder.mkdir(parents=True, exist_ok=True)
    relations = relations_in(read_rows(args.data, QUESTIONS, args.limit)) if "--relations" in WAYS[name] else None
    scores = {}
    for model_dir, asked in train(name, seed, args, folder):
        scores |= score(model_dir, read_rows(args.test, asked, args.test_limit), relations)
        shutil.rmtree(model_dir)
    (folder / "scores.part").write_text(json.dumps({"settings": settings, "scores": scores}))
    os.replace(folder / "scores.part", stored)
    return scores


def checksum(path: Path) -> str:
    """The beginning of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def noise(results: dict[str, list[dict]]) -> dict[str, float]:
    """For each score the least difference between two means over seeds that is beyond chance.

    Twice the standard error of such a difference. The spread between seeds is pooled over all ways, for two or three
    seeds of one way say little.
    """
    limits = {}
    for name in next(iter(results.values()))[0]:
        groups = [[scores[name] for scores in seeds] for seeds in results.values()]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum(sum((value - statistics.mean(group)) ** 2 for value in group) for group in groups)
        limits[name] = 2 * math.sqrt(squares / freedom * 2 / len(groups[0])) if freedom else math.inf
    return limits


def table(results: dict[str, list[dict]]) -> str:
    """Means over seeds as Markdown, with marks where a way is better or worse than the first one beyond noise."""
    names, limits = list(next(iter(results.values()))[0]), noise(results)
    better = {f"{task} {title}": sign for task, scores in SCORES.items() for title, _, sign in scores}
    base = {name: statistics.mean(scores[name] for scores in next(iter(results.values()))) for name in names}
    lines = ["| | " + " | ".join(f"{name} {'↑' if better[name] > 0 else '↓'}" for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for way, seeds in results.items():
        cells = []
        for name in names:
            mean = statistics.mean(scores[name] for scores in seeds)
            gain = better[name] * (mean - base[name])
            mark = " **better**" if gain > limits[name] else " **worse**" if -gain > limits[name] else ""
            cells.append(f"{mean:.3f}{mark}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines.append("| *within noise below* | " + " | ".join(f"{limits[name]:.3f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="runs/reading", help="the AU-LLaVA that every way starts from")
    parser.add_argument("--recipe", default="recipes/comparison.yaml")
    parser.add_argument("--data", default="synthetic:data/synthetic", help="source of training rows")
    parser.add_argument("--test", default="synthetic:?split=test", help="source of rows to score on")
    parser.add_argument("--limit", type=int, help="use so many faces")
    parser.add_argument("--test_limit", type=int, help="score on so many faces")
    parser.add_argument("--steps", type=int, default=100, help="of each way; three models share them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", help="numbers of ways, from 0, the recipe itself; all by default")
    parser.add_argument("--output", default="runs/comparisons")
    parser.add_argument("--page", default="docs/comparisons.md", help="where the table goes")
    args = parser.parse_args()

    if not Path(args.start, "config.json").is_file():
        parser.error(f"--start {args.start} is no folder of an AU-LLaVA; checkpoint/reading.py makes one")
    args.start_sha256 = checksum(Path(args.start, "model.safetensors"))  # another model may come to lie there,
    args.recipe_sha256 = checksum(Path(args.recipe))  # the recipe may change, and more faces come to the folders
    args.data_sha256 = digest_rows(read_rows(args.data, QUESTIONS, args.limit))
    args.test_sha256 = digest_rows(read_rows(args.test, QUESTIONS, args.test_limit))
    chosen = [list(WAYS)[int(number)] for number in args.ways] if args.ways else list(WAYS)
    results: dict[str, list[dict]] = {name: [] for name in chosen}
    with tqdm(total=len(chosen) * len(args.seeds)) as progress:
        for seed in args.seeds:
            for name in chosen:
                progress.set_description(f"{name}, seed {seed}")
                results[name].append(run(name, seed, args))
                progress.update()
    print(table(results))
    if len(chosen) < len(WAYS):
        print(f"These are {len(chosen)} of {len(WAYS)} ways, so that {args.page} stays as it is.")
        return
    page = Path(args.page)
    head = page.read_text().partition("<!-- table -->")[0] if page.is_file() else ""
    text = f"{head}<!-- table -->\n{table(results)}\n\nMade by `python {' '.join(sys.argv)}`.\n"
    page.with_suffix(".part").write_text(text)
    os.replace(page.with_suffix(".part"), page)


if __name__ == "__main__":
    main()
