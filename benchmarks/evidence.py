"""How often the maps of where the model looked fall where the Action Unit is, on rendered faces.

    python benchmarks/evidence.py [--model .] [--task intensity_level] [--limit 60] [--methods attention occlusion]

For every face and every unit that its label says is clearly there, the unit's map is compared with the unit's region
on the crop (`au_llava.face_regions`). Three questions, each with what chance would give:

- peak: does the map's brightest cell lie in the region? By chance as often as the region is large.
- mass: how much of the map lies in the region? By chance as much as the region is large. A map that always shows the
  middle of the face beats this, so:
- own: does more of the unit's own map lie in its region than of the mean map of the other units of that face, whose
  regions are elsewhere? By chance for half of the maps.

In brackets 95 % intervals from resampling people.
"""

import argparse
import json

import numpy as np

from au_llava.action_units import TASKS, ActionUnit, select
from au_llava.datasets_scripts.synthetic_faces.builder import SyntheticFaces, labels_of
from au_llava.evidence_au_llava import GRID, METHODS
from au_llava.face_regions import region_mask
from au_llava.photos import load_pipeline


PRESENT = {"detection": 1, "intensity_level": 2, "intensity": 0.16}  # labels from here on count as clearly there


def cells_of(unit: ActionUnit) -> np.ndarray:
    """`(16, 16)`: which share of each cell of a map lies in the unit's region."""
    mask = region_mask(unit).astype(float)
    side = len(mask) // GRID
    return mask.reshape(GRID, side, GRID, side).mean((1, 3))


def compare(maps: dict[str, np.ndarray], regions: dict[str, np.ndarray], there: list[str]) -> list[dict]:
    """What the maps of one face say, a dictionary for each unit that is there.

    Args:
        maps (`dict[str, np.ndarray]`): By code, `(16, 16)` that sum to 1, or to 0 where nothing mattered.
        regions (`dict[str, np.ndarray]`): By code, what [`cells_of`] gives.
        there (`list[str]`): The units to look at.
    """
    found = []
    for code in there:
        region, own = regions[code], maps[code]
        area = region.mean()
        row, column = np.unravel_index(own.argmax(), own.shape)
        elsewhere = [other for other in maps if (regions[other] * region).sum() < 0.1 * region.sum()]
        others = np.mean([(maps[other] * region).sum() for other in elsewhere]) if elsewhere else np.nan
        mass = (own * region).sum()
        found.append(
            {
                "code": code,
                "area": area,
                "peak": float(region[row, column]) if own.any() else area,
                "mass": mass,
                # A map like the others', such as one that shows nothing, is a draw.
                "own": np.nan if np.isnan(others) else float(mass > others) + 0.5 * float(mass == others),
            }
        )
    return found


def summary(found: list[list[dict]], draws: int = 1000) -> dict[str, list[float]]:
    """Mean and 95 % interval over people of each number; `found` has a list for each person."""
    names = ("area", "peak", "mass", "own")
    people = [np.array([[entry[name] for name in names] for entry in entries]) for entries in found if entries]
    sums = np.array([np.nansum(person, 0) for person in people])
    counts = np.array([(~np.isnan(person)).sum(0) for person in people])
    picks = np.random.default_rng(0).integers(0, len(people), (draws, len(people)))
    means = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    middle = sums.sum(0) / np.maximum(counts.sum(0), 1)
    return {name: [middle[k], low[k], high[k]] for k, name in enumerate(names)}


def measure(pipe, faces, task: str, method: str) -> list[list[dict]]:
    """Ask about each face, and compare the maps of the units that are there with their regions, person by person.

    Args:
        pipe: The pipeline `facial-action-units`.
        faces: Rows of the rendered faces, with `image`, `identity` and labels.
        task (`str`): `detection`, `intensity_level` or `intensity`.
        method (`str`): `attention` or `occlusion`.
    """
    regions = {unit.code: cells_of(unit) for unit in select(None, task)}
    people: dict[str, list[dict]] = {}
    for row in faces:
        labels = labels_of(row, task)
        there = [code for code in regions if labels[code] >= PRESENT[task]]
        [face] = pipe(row["image"], task=task, detector="none", return_evidence=method)
        maps = {code: np.array(unit["evidence"]) for code, unit in face["action_units"].items()}
        people.setdefault(row["identity"], []).extend(compare(maps, regions, there))
    return list(people.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id (default: the one that comes along)")
    parser.add_argument("--task", choices=list(TASKS), default="intensity_level")
    parser.add_argument("--limit", type=int, default=60, help="number of faces (default: 60)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data_dir", help="rendered faces (default: the test faces that come with the project)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()

    builder = SyntheticFaces(config_name="faces", data_dir=arguments.data_dir)
    builder.download_and_prepare()
    faces = builder.as_dataset("test")
    faces = faces.select(range(min(arguments.limit, len(faces))))
    pipe = load_pipeline(arguments.model)
    results = {}
    for method in arguments.methods:
        found = measure(pipe, faces, arguments.task, method)
        results[method] = {"all": summary(found)}
        for code in (unit.code for unit in select(None, arguments.task)):
            own = [[entry for entry in entries if entry["code"] == code] for entries in found]
            if any(own):
                results[method][code] = summary(own)
        print(f"{method}, {arguments.task}, {len(faces)} faces, {sum(map(len, found))} maps")
        print(f"{'':9}{'region':>8}{'peak in it':>24}{'mass in it':>24}{'more than others':>24}")
        for code, numbers in results[method].items():
            cells = "".join(f"{f'{m:.3f} [{a:.3f}, {b:.3f}]':>24}" for m, a, b in list(numbers.values())[1:])
            print(f"{code:9}{numbers['area'][0]:>8.3f}{cells}")
        print(flush=True)
    if arguments.json:
        print(json.dumps({"model": pipe.model.name_or_path, "task": arguments.task, "results": results}))


if __name__ == "__main__":
    main()
