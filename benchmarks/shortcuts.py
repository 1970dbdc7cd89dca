"""Does the model read faces, or what only these renders have? The same people and expressions, drawn otherwise.

    python -m benchmarks.shortcuts                      # 200 test people, the default checkpoint
    python -m benchmarks.shortcuts --pictures 20 --json
    python -m benchmarks.shortcuts --conditions "other sculpts" --pictures 300

Each condition draws the same people with the same expressions and changes one thing: what is behind the head, the
whole scene, how a person does each action, whose idea of it that is, furrows and pores, light and shadow, colours. A
model that reads the shape of a face keeps its scores; one that has learnt a shortcut loses them where the shortcut is
gone. `changed` is the share of answered numbers that differ from those about the plain render. `--output` keeps the
pictures and the answers.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from tqdm import tqdm

from au_llava.datasets_scripts.synthetic_faces.expression import OTHER_RECIPES, RECIPES, personal_style
from au_llava.datasets_scripts.synthetic_faces.layout import FEATURES
from au_llava.datasets_scripts.synthetic_faces.renderer import render
from au_llava.datasets_scripts.synthetic_faces.sampler import Parts, draw_parts, render_sample
from au_llava.datasets_scripts.synthetic_faces.scene import draw_scene
from au_llava.datasets_scripts.synthetic_faces.writer import to_row
from evaluation.answers import read_answers
from evaluation.data import read_set
from evaluation.predict import predict
from evaluation.scores import score_row


PLAIN = "as it is"
SCORES = {"detection": ("f1", "roc_auc"), "intensity_level": ("mae", "icc31"), "intensity": ("mae", "icc31")}


# From what a picture is made of, and another generator, to the same with one thing changed.
CONDITIONS: dict[str, Callable[[Parts, np.random.Generator], Parts]] = {
    "another background": lambda parts, other: parts._replace(rng=other),
    "plain background": lambda parts, _: parts._replace(scene=replace(parts.scene, plain_background=True)),
    "another scene": lambda parts, other: parts._replace(scene=draw_scene(other), rng=other),
    # The same people with the same actions, done in another person's way: what "other sculpts" changes beside them.
    "another style": lambda parts, other: parts._replace(
        identity=replace(parts.identity, style=personal_style(other))
    ),
    # Each action as MakeHuman's own artists have sculpted it, where they have; in another person's way, too.
    "other sculpts": lambda parts, other: parts._replace(
        identity=replace(parts.identity, style=personal_style(other, recipes=RECIPES | OTHER_RECIPES))
    ),
    "no furrows": lambda parts, _: parts._replace(
        identity=replace(parts.identity, age_lines=0 * parts.identity.age_lines, relief=0 * parts.identity.relief),
        scene=replace(parts.scene, wrinkles=0.0),
    ),
    # The same light from all sides: no lit and unlit side, no highlights, no shadow that the nose throws.
    "no shading": lambda parts, _: parts._replace(
        scene=replace(parts.scene, light_colours=np.zeros((2, 3)), sky=np.full(3, 0.4), ground=np.full(3, 0.4))
    ),
}
GREY = "grey, equalised"  # no colour, and all shades of grey equally frequent, whatever the light


def draw(index: int, conditions: list[str]) -> dict[str, dict]:
    """One test person with one expression, as it is and under some conditions: rows as a split's files hold them."""
    sample = render_sample(index, "test")
    rows = {PLAIN: to_row(sample, index)}
    for name in conditions:
        if name == GREY:
            grey = ImageOps.equalize(Image.fromarray(sample.rendering.image).convert("L")).convert("RGB")
            other = replace(sample, rendering=replace(sample.rendering, image=np.asarray(grey)))
        else:
            parts = CONDITIONS[name](draw_parts(index, "test"), np.random.default_rng([index, 8]))
            other = replace(sample, rendering=render(*parts), jpeg_quality=parts.scene.jpeg_quality)
        rows[name] = to_row(other, index)
    return rows


def folder_name(condition: str) -> str:
    """Where in `--output` the pictures and answers of a condition lie."""
    return condition.replace(",", "").replace(" ", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="folder or Hub id")
    parser.add_argument("--pictures", type=int, default=200, help="how many test people, of 800")
    names = [*CONDITIONS, GREY]
    parser.add_argument("--conditions", nargs="+", choices=names, default=names, help="all by default")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/shortcuts"))
    parser.add_argument("--json", action="store_true", help="and one JSON object as the last line, with every unit")
    args = parser.parse_args()

    pictures = [draw(index, args.conditions) for index in tqdm(range(args.pictures), unit="person", desc="drawing")]
    results, units, plain = {}, {}, {}
    for name in pictures[0]:
        folder = args.output / folder_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([rows[name] for rows in pictures], schema=FEATURES.arrow_schema)
        pq.write_table(table, folder / "test-00000.parquet")
        answers = read_answers(predict(read_set("synthetic", folder), args.model, folder, args.batch_size))
        plain = plain or answers
        results[name], units[name] = {}, {}
        for task, answer in answers.items():
            row = score_row(answer, answer.values, answer.expected_values, resamples=2)
            results[name][task] = {score: row["mean"][score]["value"] for score in SCORES[task]}
            units[name][task] = {
                code: {score: own[score]["value"] for score in SCORES[task]}
                for code, own in row["action_units"].items()
            }
            results[name][task]["changed"] = float((answer.values != plain[task].values).mean())

    for task, scores in SCORES.items():
        print(f"{task:20}" + "".join(f"{score:>9}" for score in (*scores, "changed")))
        for name, found in results.items():
            print(f"  {name:18}" + "".join(f"{number:9.3f}" for number in found[task].values()))
    if args.json:
        about = {"model": args.model, "pictures": args.pictures}
        print(json.dumps(about | {"results": results, "action_units": units}))


if __name__ == "__main__":
    main()
