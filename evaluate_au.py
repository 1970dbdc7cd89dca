"""Score an AU-LLaVA: predictions, scores with intervals beside baselines, a report, and the model card.

    python evaluate_au.py --model . --dataset synthetic --data_dir data/synthetic --calibrate --output runs/evaluation
    python evaluate_au.py --model runs/bp4d_{fold} --dataset bp4d --data_dir data/bp4d --output runs/bp4d
    python evaluate_au.py --model runs/mine --dataset csv --data_dir "labels.csv?task=detection" --output runs/scores
    python evaluate_au.py --predictions runs/evaluation --output runs/scored_again
    python evaluate_au.py --compare runs/evaluation runs/other --output runs/comparison

A run that was stopped goes on where it stopped; `accelerate launch` or `torchrun` before `evaluate_au.py` shares the
work between processes, with the same result. `docs/evaluation.md` explains what is measured and how.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

from au_llava import AuLlavaProcessor
from au_llava.action_units import cover, select
from au_llava.datasets_scripts.preparation import count
from au_llava.datasets_scripts.report import read_json
from au_llava.readout_au_llava import READOUTS
from au_llava.recognition_au_llava import DECISIONS
from evaluation import calibration
from evaluation.answers import Answers, read_answers, read_origin, stamp_of
from evaluation.card import update_card
from evaluation.compare import compare, comparison_table
from evaluation.data import (
    FOLDS,
    OWN,
    QUESTIONS,
    RENDERED,
    SAMPLE,
    SPLITS,
    EvaluationSet,
    has_folds,
    is_own,
    protocol_in_words,
    read_set,
)
from evaluation.formats import check_formats
from evaluation.people import check_apart, check_held_out, check_never_seen, people_apart
from evaluation.predict import load, of_fold, predict, processes
from evaluation.report import write_report
from evaluation.results import summarise, write_json
from evaluation.robustness import curves, damaged
from evaluation.scores import BASELINES, OURS
from evaluation.table import task_table


SCORE_AGAIN = "delete it, and score again"
_ASKED = ("fold", "limit", "tasks", "readout", "mirror")  # less than everything, or not as users are answered


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub id; {fold} in it stands for the number of the test fold")
    what.add_argument("--predictions", help="score these stored predictions; needs no model")
    two = "two folders of stored predictions, compared as the models gave them, uncalibrated"
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help=two)
    parser.add_argument("--output", required=True, help="folder for predictions, results and report")
    sets = [*QUESTIONS, OWN]
    parser.add_argument("--dataset", choices=sets, help="synthetic by default; with --predictions, theirs")
    where = "folder of prepared Parquet shards, the committed sample for synthetic; a csv and its options for csv"
    parser.add_argument("--data_dir", help=where)
    parser.add_argument(
        "--validation_dir", help="folder of the split validation for --calibrate; --data_dir by default"
    )
    parser.add_argument("--split", choices=SPLITS, help="test by default; with --predictions, theirs")
    which = "standard by default; with --predictions, theirs"
    parser.add_argument("--protocol", choices=("standard", "paper"), help=which)
    parser.add_argument("--fold", choices=FOLDS, default="all", help="test only one, where the data set has folds")
    parser.add_argument("--limit", type=count, help="at most so many pictures of each fold, evenly spread")
    parser.add_argument("--tasks", nargs="+", help="only these of the data set's tasks")
    parser.add_argument(
        "--calibrate", action="store_true", help="first fit on the validation people; store in --model"
    )
    parser.add_argument("--calibration", help="model folder whose calibration is used; --model by default")
    parser.add_argument("--formats", type=count, default=0, help="on so many pictures, free text and contradictions")
    parser.add_argument("--beside", nargs="+", default=[], help="folders of other predictions: one more row each")
    parser.add_argument("--robustness", type=count, default=0, help="damage so many pictures in 30 ways")
    parser.add_argument("--update_card", action="store_true", help="write the results into the README.md of --model")
    parser.add_argument("--batch_size", type=count, default=32)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--readout", default="exact", choices=READOUTS, help="how the model is read; see recognize")
    parser.add_argument("--decision", default="mode", choices=DECISIONS, help="what is scored of each distribution")
    mirrored = "whether to ask about mirror images, too; by default as the model's processor says"
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, help=mirrored)
    parser.add_argument("--resamples", type=count, default=1000, help="of people, for the intervals")
    args = parser.parse_args()

    def refuse(what: str, names: tuple[str, ...], why: str) -> None:
        given = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"{what} goes without {', '.join(given)}: {why}")

    settled = "what was asked, and of whom, is settled"
    if args.predictions:
        refuse("--predictions", (*_ASKED, "calibrate", "validation_dir", "batch_size", "dtype"), settled)
    if args.compare:
        taken = ("model", "predictions", "compare", "output", "decision", "resamples")
        refuse("--compare", tuple(name for name in vars(args) if name not in taken), settled)
    if args.update_card:
        split = () if args.split == "test" else ("split",)
        refuse(
            "--update_card",
            (*_ASKED, *split, "calibration", "decision"),
            "the card tells how users are answered, on all test pictures",
        )
    names = [Path(folder).name for folder in args.beside]
    if len(set(names)) < len(names):
        parser.error(f"--beside {' '.join(args.beside)}: rows are named by their folders; give folders of other names")
    if taken := [name for name in names if name in (*OURS, *BASELINES) or name.endswith(", calibrated")]:
        parser.error(f"--beside: {', '.join(map(repr, taken))} is the name of another row; rename that folder")
    if args.calibrate:
        refuse("--calibrate", ("limit", "readout", "mirror"), "what is fitted is applied to the answers of all users")
    args.fold, args.options = FOLDS[args.fold], ""
    if args.predictions:  # about what they were made for
        origin = read_origin(args.predictions)
        theirs = origin | {"dataset": origin["dataset"].partition(":")[0]}
        for name in ("dataset", "split", "protocol"):
            if getattr(args, name) not in (None, theirs[name]):
                parser.error(f"{args.predictions} is about the {name} {theirs[name]}; leave --{name} out")
        known = ("dataset", "protocol", "options", "split", "readout")
        vars(args).update({name: origin[name] for name in known if name in origin})
    args.dataset, args.split = args.dataset or "synthetic", args.split or "test"
    args.protocol = args.protocol or "standard"
    one_model = args.model and "{fold}" not in args.model
    if not one_model and (args.update_card or args.formats or args.robustness):
        parser.error("--update_card, --formats and --robustness need one --model, without {fold}")
    if args.update_card or args.calibrate:  # the first fold's, of models for each
        folder = of_fold(args.model, args.fold or int(has_folds(args.dataset, args.protocol)))
        if not Path(folder).is_dir():
            parser.error(
                f"--calibrate and --update_card write into --model, and {folder} is no folder; download it first"
            )
    if args.calibrate and (one_model and not args.fold and has_folds(args.dataset, args.protocol)):
        parser.error(
            "--calibrate needs --fold N where there are folds, or a model for each fold with {fold} in its name: the "
            "people of the other folds are test people"
        )
    if args.model and not args.data_dir:
        if args.dataset not in RENDERED:
            what = "your csv and its options" if is_own(args.dataset) else "the folder of its prepared crops"
            parser.error(f"--dataset {args.dataset} needs --data_dir, {what}")
        args.data_dir = str(SAMPLE)
    return args


def answered(model: str, about: EvaluationSet) -> list[str]:
    """The tasks of a set that a model was trained to answer, as far as its processor tells; others are left out.

    Raises:
        ValueError: There is none.
    """
    settings, _ = AuLlavaProcessor.get_processor_dict(of_fold(model, min(about.folds)))
    lists = settings.get("trained_lists") or about.labels
    # Levels tell of presence, but of that which the paper's protocol means for DISFA.
    told_by = lists if about.protocol == "standard" else {}
    strange = [
        task for task in about.labels if task not in lists and cover(task, select(about.units[task]), told_by)[1]
    ]
    known = [task for task in about.labels if task not in strange]
    told = f"{model} was trained to answer {', '.join(lists)} alone"
    if not known:
        raise ValueError(f"{told}; name tasks of {about.name} with --tasks to see what it guesses.")
    if strange and processes().is_main_process:
        print(f"{told}; left out: {', '.join(strange)}. To see what it guesses, name tasks with --tasks.")
    return known


def calibrate(args: argparse.Namespace, how: tuple, about: EvaluationSet) -> None:
    """Fit on the validation people of each fold, and store in the folder of its model.

    Raises:
        ValueError: Some of them are tested, in `about`, or were trained on.
    """
    folder = args.validation_dir or args.data_dir
    apart = people_apart(args.model, args.dataset, folder, args.protocol, args.fold)
    if args.dataset not in RENDERED and not is_own(args.dataset):  # rendered faces come with a split of their own
        for fold, people in apart.people().items():
            check_held_out(of_fold(args.model, fold), args.dataset, people)
    check_apart(apart, about)
    stored = predict(apart, args.model, Path(args.output, "validation"), *how)
    if processes().is_main_process:
        for fold, fitted in calibration.fit_folds(stored).items():
            calibration.store(fitted, of_fold(args.model, fold))
    processes().wait_for_everyone()


def stored_calibration(folder: str) -> dict[int, dict]:
    """What predictions were calibrated by: by test fold, as their `results.json` has it.

    Where that is not there or is of other predictions, as beside a baseline's, it is fitted on those about the
    validation people.
    """
    results, validation = Path(folder, "results.json"), Path(folder, "validation")
    fitted: dict[int, dict] = {}
    found = read_json(results, SCORE_AGAIN) if results.is_file() else {}
    if found.get("predictions") == stamp_of(folder):
        for task, result in found["tasks"].items():
            for fold, own in result["calibration"]["fitted"].items():
                fitted.setdefault(int(fold), {})[task] = own
    elif validation.is_dir() and read_origin(validation)["model"] == read_origin(folder)["model"]:
        fitted = calibration.fit_folds(validation)
    return fitted


def asked_before(results: dict, output: str) -> dict:
    """Form and robustness that `results.json` tells of these very predictions, decided and calibrated as now."""
    file = Path(output, "results.json")
    known = read_json(file, SCORE_AGAIN) if file.is_file() else {}

    def about(found: dict) -> tuple:
        fitted = {task: result["calibration"]["fitted"] for task, result in found["tasks"].items()}
        return found["predictions"], found["settings"]["decision"], fitted

    same = "predictions" in known and about(known) == about(results)
    return {name: known[name] for name in ("formats", "robustness") if same and name in known}


def check_about(args: argparse.Namespace, answers: dict[str, Answers], about: EvaluationSet) -> None:
    """Refuse a data set that stored predictions are not about: their report would name it and show its faces.

    Raises:
        ValueError: Origin, pictures or labels differ. There may be more pictures, as after `--limit` or `--fold`.
    """
    origin, places = read_origin(args.predictions), {sample: place for place, sample in enumerate(about.samples)}

    def known(task: str, found: Answers) -> bool:
        if not places.keys() >= set(found.samples):
            return False
        labels = about.labels[task][[places[sample] for sample in found.samples]]
        return np.array_equal(labels.astype(np.float32), found.labels.astype(np.float32), equal_nan=True)  # as stored

    same = all(origin[name] == value for name, value in about.origin().items())
    if not (same and all(known(task, found) for task, found in answers.items())):
        raise ValueError(
            f"--data_dir {args.data_dir}: {args.predictions} is about other pictures or labels, of "
            f"{origin['dataset']}; give the data that it was made with, or leave --data_dir out."
        )


def main() -> None:
    args = arguments()
    if args.compare:
        comparison = compare(*(read_answers(folder, args.decision) for folder in args.compare), args.resamples)
        write_json(comparison, args.output, "comparison.json")
        about = read_origin(args.compare[0])
        words = protocol_in_words(about["dataset"], about["protocol"], about["options"])
        print(f"{comparison_table(comparison)}\n\nProtocol: {words}.")
        return
    evaluation_set = None
    if args.data_dir:
        evaluation_set = read_set(args.dataset, args.data_dir, args.split, args.protocol, args.fold, args.limit)
        args.dataset, args.options = evaluation_set.name, evaluation_set.options
        if strange := set(args.tasks or ()) - set(evaluation_set.labels):
            known = ", ".join(evaluation_set.labels)
            raise ValueError(f"--tasks: {args.dataset} has no {', '.join(sorted(strange))}; accepted: {known}.")
    if args.model:
        check_never_seen(args.model, evaluation_set)
        args.tasks = args.tasks or answered(args.model, evaluation_set)
    how = (args.batch_size, args.dtype, args.tasks, args.readout, args.mirror)
    if args.calibrate:
        calibrate(args, how, evaluation_set)
    stored = args.predictions
    if args.model:
        stored = predict(evaluation_set, args.model, args.output, *how)
    if args.robustness:
        worse = damaged(evaluation_set, args.robustness)
        harmed = predict(worse, args.model, Path(args.output, "robustness"), *how)
    if not processes().is_main_process:
        return

    answers = read_answers(stored, args.decision)
    if args.predictions and evaluation_set:
        check_about(args, answers, evaluation_set)
    source, folds = args.calibration or args.model, {int(fold) for task in answers.values() for fold in task.folds}
    if source:
        fitted = {fold: calibration.load(of_fold(source, fold)) for fold in folds}
    else:
        fitted = stored_calibration(stored)
    beside = {
        Path(folder).name: (read_answers(folder, args.decision), stored_calibration(folder)) for folder in args.beside
    }
    for name, (found, _) in beside.items():
        if not answers.keys() & found.keys():
            ours = ", ".join(answers)
            print(f"--beside {name}: no row, for it has answers of {', '.join(found)} and these are of {ours}.")
    origin = read_origin(stored)
    settings = vars(args) | {"models": sorted({name for name, _ in origin["model"].values()})}
    settings["by_levels"] = origin.get("by_levels", [])
    origins = [read_origin(folder) for folder in args.beside]
    commands = [origin["command"] for origin in origins if "command" in origin]  # of baselines
    commands.append(shlex.join(["python", *sys.argv]))
    results = summarise(answers, settings, "\n".join(commands), fitted, beside, args.resamples)
    if args.formats:
        model, processor = load(args.model, args.dtype)
        results["formats"] = check_formats(model, processor, evaluation_set, args.formats, args.batch_size, args.tasks)
    if args.robustness:
        applied = {task: result["calibration"]["fitted"] for task, result in results["tasks"].items()}
        results["robustness"] = curves(read_answers(harmed, args.decision), applied, args.resamples)
    results["predictions"] = stamp_of(stored)
    results = asked_before(results, args.output) | results
    write_json(results, args.output, "results.json")
    report = write_report(results, answers, args.output, evaluation_set)
    if args.update_card:
        update_card(results, Path(args.model, "README.md"))
    for task, result in results["tasks"].items():
        print("\n" + task_table(task, result))
    print(f"\nSplit: {args.split}. Protocol: {results['protocol']}.\nWrote {report} and results.json beside it.")


if __name__ == "__main__":
    main()
