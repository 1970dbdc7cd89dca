"""The same vision encoder with a linear head for each Action Unit, and no language model.

    python -m baselines.linear_head --model . --data_dir data/synthetic --limit 8000 --output runs/linear_head
    python evaluate_au.py --model . --data_dir data/synthetic --beside runs/linear_head --output runs/evaluation

The encoder is AU-LLaVA's own, as it is; its patch features are averaged. Logistic regression answers `detection`,
ridge regression the other two tasks. How strongly they are regularised is chosen by cross-validation over people in
the training data. If this wins, the language model has added nothing to what the encoder sees.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from au_llava.action_units import get_task
from evaluation.data import SAMPLE, EvaluationSet, read_set
from evaluation.predict import SCHEMA, load, write
from evaluation.scores import is_detection


STRENGTHS = np.logspace(-4, 0, 5)  # of logistic regression's C; ridge's alpha spans 1 / C


@torch.inference_mode()
def encode(pictures: EvaluationSet, model, processor, batch_size: int = 32) -> np.ndarray:
    """Mean patch features `(pictures, width)` of the vision tower's last hidden state, the one the projector reads."""
    features = []
    for start in tqdm(range(0, len(pictures), batch_size), desc=f"encoding {pictures.split}", unit="batch"):
        rows = list(range(start, min(start + batch_size, len(pictures))))
        pixels = processor.image_processor(pictures.pictures(rows), return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels.to(model.device, model.dtype)).last_hidden_state
        states = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, -model.config.image_seq_length :]
        features.append(states.mean(1).float().cpu().numpy())
    return np.concatenate(features)


def fit_and_predict(
    task: str, train: np.ndarray, labels: np.ndarray, people: list[str], test: np.ndarray
) -> np.ndarray:
    """Fit heads, and answer about the test pictures.

    A ridge prediction, which lies between two values, is shared between them so that the mean is the prediction.

    Args:
        task (`str`): `detection`, `intensity_level` or `intensity`.
        train, test (`numpy.ndarray` of shape `(pictures, width)`): From [`encode`].
        labels (`numpy.ndarray` of shape `(pictures, units)`): Of the training pictures, NaN where unknown.
        people (`list[str]`): Who is in each training picture.

    Returns:
        `numpy.ndarray` of shape `(pictures, units, values)`: Distributions over the task's values.

    Raises:
        ValueError: A unit has no positive or no negative training label.
    """
    grid, people, columns = np.array(get_task(task).values), np.array(people), []
    for column in labels.T:
        seen = ~np.isnan(column)
        folds = list(GroupKFold(3).split(train[seen], groups=people[seen]))
        if is_detection(task):
            head = LogisticRegressionCV(
                Cs=STRENGTHS,
                cv=folds,
                scoring="neg_log_loss",
                max_iter=500,
                use_legacy_attributes=False,
                l1_ratios=(0,),
            )
            probability = make_pipeline(StandardScaler(), head).fit(train[seen], column[seen]).predict_proba(test)
            columns.append(probability)
            continue
        head = RidgeCV(alphas=1 / STRENGTHS, cv=folds)
        found = make_pipeline(StandardScaler(), head).fit(train[seen], column[seen]).predict(test)
        place = np.interp(found, grid, np.arange(len(grid)))
        columns.append(np.clip(1 - np.abs(place[:, None] - np.arange(len(grid))), 0, 1))
    return np.stack(columns, 1)


def rows(pictures: EvaluationSet, task: str, distributions: np.ndarray) -> list[dict]:
    """Rows as [`evaluation.predict.predict`] stores them."""
    grid, units = np.array(get_task(task).values), pictures.action_units(task)
    chosen = distributions.argmax(-1)
    return [
        {
            "sample": pictures.samples[row],
            "subject": pictures.subjects[row],
            "split": pictures.split,
            "fold": pictures.folds[row],
            "groups": list(pictures.groups[row].items()),
            "task": task,
            "action_units": units,
            "labels": pictures.labels[task][row].tolist(),
            "values": grid[chosen[row]].tolist(),
            "probabilities": distributions[row].max(-1).tolist(),
            "expected_values": (distributions[row] @ grid).tolist(),
            "distributions": distributions[row].tolist(),
        }
        for row in range(len(pictures))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the AU-LLaVA whose encoder is used")
    parser.add_argument("--data_dir", default=str(SAMPLE), help="rendered shards with the splits train and test")
    parser.add_argument("--limit", type=int, help="training pictures; as many as AU-LLaVA saw, to be fair")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    model, processor = load(args.model)
    train, test = (read_set("synthetic", args.data_dir, split, limit=limit)
                   for split, limit in (("train", args.limit), ("test", None)))  # fmt: skip
    seen, unseen = (encode(pictures, model, processor) for pictures in (train, test))
    found = []
    for task, labels in train.labels.items():
        found += rows(test, task, fit_and_predict(task, seen, labels, train.subjects, unseen))
    Path(args.output).mkdir(parents=True, exist_ok=True)
    write(Path(args.output, "predictions.parquet"), pa.Table.from_pylist(found, SCHEMA))
    print(f"Wrote {args.output}/predictions.parquet; show it with evaluate_au.py --beside {args.output}")


if __name__ == "__main__":
    main()
