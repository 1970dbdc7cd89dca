"""The same vision encoder with a linear head for each Action Unit, and no language model.

    python -m baselines.linear_head --model . --data_dir data/synthetic --limit 8000 --output runs/linear_head
    python evaluate_au.py --model . --data_dir data/synthetic --beside runs/linear_head --output runs/evaluation
    python -m baselines.linear_head --model runs/bp4d_{fold} --dataset bp4d --data_dir data/bp4d --output runs/head

The encoder is AU-LLaVA's own; its patch features are averaged. Logistic regression answers `detection`, ridge
regression the other two tasks. How strongly they are regularised is chosen by cross-validation over people in the
training data. If this wins, the language model has added nothing to what the encoder sees. Where the model looks at
each picture more than once, or also at its mirror image, so does this.

With `--compute 5e13`, the encoder first goes on learning on these pictures with linear heads on top, for so many
floating-point operations: as many as the language model had, so that both had the same. `cost.json` of
`checkpoint.practice` says how many, and `total_flos` in the `trainer_state.json` of `train_sft.py`.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from au_llava.action_units import get_task, other_sides, select
from au_llava.datasets_scripts.preparation import count
from au_llava.modeling_au_llava import moved
from baselines.tuning import mean_features, tune
from checkpoint.begun import begin
from evaluation.answers import STAMP
from evaluation.data import FOLDS, OWN, QUESTIONS, EvaluationSet, has_folds, read_set, spread
from evaluation.people import check_never_seen, people_apart
from evaluation.predict import answer_table, fingerprint, load, of_fold, write
from evaluation.scores import is_detection


STRENGTHS = np.logspace(-4, 0, 5)  # of logistic regression's C; ridge's alpha spans 1 / C


@torch.inference_mode()
def encode(pictures: EvaluationSet, model, processor, flip: bool = False, batch_size: int = 32) -> np.ndarray:
    """What [`mean_features`] gives for all pictures, or for their mirror images, `(pictures, width)`.

    Each is looked at as often as the model looks at it.
    """
    features, looks = [], model.config.looks or [[1, 0]]
    for start in tqdm(range(0, len(pictures), batch_size), desc=f"encoding {pictures.split}", unit="batch"):
        rows = list(range(start, min(start + batch_size, len(pictures))))
        pixels = processor.image_processor(pictures.pictures(rows), return_tensors="pt")["pixel_values"]
        pixels = pixels.flip(-1) if flip else pixels
        each = [mean_features(model, moved(pixels, *look)) for look in looks]
        features.append(torch.stack(each).mean(0).cpu().numpy())
    return np.concatenate(features)


def fit(task: str, features: np.ndarray, labels: np.ndarray, people: list[str]) -> list:
    """Fit a head for each Action Unit.

    Args:
        task (`str`): `detection`, `intensity_level` or `intensity`.
        features (`numpy.ndarray` of shape `(pictures, width)`): From [`encode`].
        labels (`numpy.ndarray` of shape `(pictures, units)`): NaN where unknown.
        people (`list[str]`): Who is in each picture.

    Returns:
        `list`: For each unit a fitted scikit-learn estimator, or the mean label (`float`) of a unit that cannot be
        learnt: too few people, or for `detection` not both classes among the people on either side of every split.
    """
    people, heads = np.array(people), []
    for column in labels.T:
        seen = ~np.isnan(column)
        x, y, who = features[seen], column[seen], people[seen]
        splits = list(GroupKFold(min(3, len(set(who)))).split(x, groups=who)) if len(set(who)) > 1 else []
        if is_detection(task):
            splits = [sides for sides in splits if all(len(set(y[side])) == 2 for side in sides)]
        if not splits:
            heads.append(float(y.mean()) if len(y) else 0.0)
            continue
        head = RidgeCV(alphas=1 / STRENGTHS, cv=splits)
        if is_detection(task):
            head = LogisticRegressionCV(
                Cs=STRENGTHS,
                cv=splits,
                scoring="neg_log_loss",
                max_iter=500,
                use_legacy_attributes=False,
                l1_ratios=(0,),
            )
        heads.append(make_pipeline(StandardScaler(), head).fit(x, y))
    return heads


def predict(task: str, heads: list, features: np.ndarray) -> np.ndarray:
    """What the heads predict, `(pictures, units)`: P(present) for `detection`, else a value of the task."""
    columns = []
    for head in heads:
        if isinstance(head, float):
            columns.append(np.full(len(features), head))
        else:
            columns.append(head.predict_proba(features)[:, 1] if is_detection(task) else head.predict(features))
    return np.stack(columns, 1)


def answer(task: str, predicted: np.ndarray) -> np.ndarray:
    """Distributions over the task's values `(pictures, units, values)`.

    What lies between two values is shared between them so that the mean is the prediction.
    """
    places = np.arange(len(get_task(task).values))
    place = np.interp(predicted, get_task(task).values, places)
    return np.clip(1 - np.abs(place[..., None] - places), 0, 1)


def tables(
    pictures: EvaluationSet, heads: dict[str, list], features: np.ndarray, mirrored: np.ndarray | None = None
) -> list[pa.Table]:
    """The answers about some pictures, as [`evaluation.predict.predict`] stores them.

    Args:
        features, mirrored (`numpy.ndarray` of shape `(pictures, width)`): Of the pictures and, where the model is
            asked about these, too, of their mirror images: the mean of both predictions is the answer then. Of a unit
            whose other side is not asked about, the picture's own prediction stays, as in [`Recognition.both_sides`].
    """
    found = []
    for task, own in heads.items():
        predicted, grid = predict(task, own, features), np.array(get_task(task).values)
        if mirrored is not None:
            places = np.array(other_sides(select(pictures.units[task])))
            joined = (predicted + predict(task, own, mirrored)[:, places]) / 2
            predicted = np.where(places >= 0, joined, predicted)
        distributions = answer(task, predicted)
        chosen, rows = distributions.argmax(-1), list(range(len(pictures)))
        likely, mean = distributions.max(-1), distributions @ grid
        found.append(answer_table(pictures, task, rows, grid[chosen], likely, mean, distributions))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the AU-LLaVA whose encoder is used; {fold} as in evaluate_au")
    parser.add_argument("--dataset", choices=[*QUESTIONS, OWN], default="synthetic")
    parser.add_argument("--protocol", default="standard", choices=("standard", "paper"))
    parser.add_argument("--fold", choices=FOLDS, default="all", help="test only one, where the data set has folds")
    parser.add_argument("--data_dir", required=True, help="the shards with the split train, prepared crops, or a csv")
    parser.add_argument("--test_dir", help="the shards with the split test; --data_dir by default")
    parser.add_argument("--limit", type=count, help="training pictures; as many as AU-LLaVA saw, to be fair")
    parser.add_argument("--compute", type=float, help="operations for which encoder and heads go on learning first")
    parser.add_argument("--calibrate", action="store_true", help="leave the validation people out, for thresholds")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    command = shlex.join(["python", "-m", "baselines.linear_head", *sys.argv[1:]])
    args.fold = FOLDS[args.fold]

    found, sources = {"test": [], "validation": []}, {}
    tuned = Path(args.output, "tuned")  # where a stopped run goes on from, fold by fold
    for fold in (1, 2, 3) if has_folds(args.dataset, args.protocol) and not args.fold else (args.fold,):
        source = of_fold(args.model, fold or 0)
        sources[str(fold or 0)] = [source, fingerprint(source)]
        model, processor = load(source)
        what = {"protocol": args.protocol, "fold": fold}
        train = read_set(args.dataset, args.data_dir, "train", **what)
        asked = {"test": read_set(args.dataset, args.test_dir or args.data_dir, "test", **what)}
        check_never_seen(source, asked["test"])
        if args.calibrate:
            asked["validation"] = people_apart(args.model, args.dataset, args.data_dir, **what)
            check_never_seen(source, asked["validation"])
            kept_out = set(asked["validation"].subjects)
            train = train.take([row for row, subject in enumerate(train.subjects) if subject not in kept_out])
        train = train.take(spread(len(train), args.limit))
        if args.compute:
            made_of = {"model": fingerprint(source), "pictures": train.fingerprint(), "compute": args.compute}
            course = begin(str(tuned / str(fold or 0)), **made_of) / "tuned.pt"
            shown = tune(model, processor, train, args.compute, course)
            print(f"The encoder went on learning from {shown:,} pictures.")
        features = encode(train, model, processor)
        heads = {task: fit(task, features, labels, train.subjects) for task, labels in train.labels.items()}
        for split, pictures in asked.items():
            mirrored = encode(pictures, model, processor, flip=True) if processor.mirror else None
            found[split] += tables(pictures, heads, encode(pictures, model, processor), mirrored)
    shutil.rmtree(Path(args.output, "validation"), ignore_errors=True)  # of an older head
    for split, folder in (("test", Path(args.output)), ("validation", Path(args.output, "validation"))):
        if found[split]:
            folder.mkdir(parents=True, exist_ok=True)
            origin = asked[split].origin() | {"model": sources, "command": command}
            stamp = {STAMP: json.dumps(origin)}
            write(folder / "predictions.parquet", pa.concat_tables(found[split]).replace_schema_metadata(stamp))
    if args.compute:
        shutil.rmtree(tuned)
    print(f"Wrote {args.output}/predictions.parquet; show it with evaluate_au.py --beside {args.output}")


if __name__ == "__main__":
    main()
