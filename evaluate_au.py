"""Score an AU-LLaVA: predictions, scores with intervals beside baselines, a report, and the model card.

    python evaluate_au.py --model . --dataset synthetic --data_dir data/synthetic --calibrate --output runs/evaluation
    python evaluate_au.py --model runs/bp4d_{fold} --dataset bp4d --data_dir data/bp4d --output runs/bp4d
    python evaluate_au.py --predictions runs/evaluation --output runs/scored_again
    python evaluate_au.py --compare runs/evaluation runs/other --output runs/comparison

A run that was stopped goes on where it stopped; `accelerate launch` or `torchrun` before `evaluate_au.py` shares the
work between processes, with the same result. `docs/evaluation.md` explains what is measured and how.
"""

import argparse
import shlex
import sys
from pathlib import Path

from evaluation import calibration
from evaluation.answers import read_answers
from evaluation.card import update_card
from evaluation.compare import compare, comparison_table
from evaluation.data import QUESTIONS, SAMPLE, EvaluationSet, read_set
from evaluation.formats import check_formats
from evaluation.predict import load, predict, processes
from evaluation.report import write_report
from evaluation.results import summarise, write_json
from evaluation.robustness import curves, damaged
from evaluation.table import task_table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub id; {fold} in it stands for the number of the test fold")
    what.add_argument("--predictions", help="score these stored predictions; needs no model")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two folders of stored predictions")
    parser.add_argument("--output", required=True, help="folder for predictions, results and report")
    parser.add_argument("--dataset", choices=QUESTIONS, default="synthetic")
    parser.add_argument("--data_dir", help="folder of prepared Parquet shards; the committed sample for synthetic")
    parser.add_argument("--split", default="test")
    parser.add_argument("--protocol", default="standard", choices=("standard", "paper"))
    parser.add_argument("--fold", type=int, choices=(1, 2, 3), help="by default all three, where there are folds")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each fold, evenly spread")
    parser.add_argument("--tasks", nargs="+", help="only these of the data set's tasks")
    parser.add_argument("--calibrate", action="store_true", help="first fit on split validation; store in --model")
    parser.add_argument("--calibration", help="model folder whose calibration is used; --model by default")
    parser.add_argument("--formats", type=int, default=0, help="on so many pictures, free text and contradictions")
    parser.add_argument("--beside", nargs="+", default=[], help="folders of other predictions: one more row each")
    parser.add_argument("--robustness", type=int, default=0, help="damage so many pictures in 30 ways")
    parser.add_argument("--update_card", action="store_true", help="write the results into the README.md of --model")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--resamples", type=int, default=1000, help="of people, for the intervals")
    args = parser.parse_args()
    one_model = args.model and "{fold}" not in args.model
    if not one_model and (args.calibrate or args.update_card or args.formats or args.robustness):
        parser.error("--calibrate, --update_card, --formats and --robustness need one --model, without {fold}")
    if args.model and not args.data_dir:
        if args.dataset != "synthetic":
            parser.error(f"--dataset {args.dataset} needs --data_dir, the folder of its prepared crops")
        args.data_dir = str(SAMPLE)
    return args


def read(args: argparse.Namespace, split: str) -> EvaluationSet:
    return read_set(args.dataset, args.data_dir, split, args.protocol, args.fold, args.limit)


def calibrate(args: argparse.Namespace) -> None:
    """Fit on the validation split, and store in the model's folder."""
    output = Path(args.output, "validation")
    stored = predict(read(args, "validation"), args.model, output, args.batch_size, args.dtype, args.tasks)
    if processes().is_main_process:
        calibration.store(calibration.fit(read_answers(stored)), args.model)
    processes().wait_for_everyone()


def main() -> None:
    args = arguments()
    if args.compare:
        comparison = compare(*(read_answers(folder) for folder in args.compare), args.resamples)
        write_json(comparison, args.output, "comparison.json")
        print(comparison_table(comparison))
        return
    if args.calibrate:
        calibrate(args)
    evaluation_set = read(args, args.split) if args.data_dir else None
    stored = args.predictions
    if args.model:
        stored = predict(evaluation_set, args.model, args.output, args.batch_size, args.dtype, args.tasks)
    if args.robustness:
        worse = damaged(evaluation_set, args.robustness)
        harmed = predict(worse, args.model, Path(args.output, "robustness"), args.batch_size, args.dtype, args.tasks)
    if not processes().is_main_process:
        return

    answers, fitted = read_answers(stored), calibration.load(args.calibration or args.model)
    beside = {Path(folder).name: read_answers(folder) for folder in args.beside}
    results = summarise(answers, vars(args), shlex.join(["python", *sys.argv]), fitted, beside, args.resamples)
    if args.formats:
        model, processor = load(args.model, args.dtype)
        results["formats"] = check_formats(model, processor, evaluation_set, args.formats, args.batch_size)
    if args.robustness:
        results["robustness"] = curves(read_answers(harmed))
    write_json(results, args.output, "results.json")
    report = write_report(results, answers, args.output, evaluation_set)
    if args.update_card:
        update_card(results, Path(args.model, "README.md"))
    for task, result in results["tasks"].items():
        print("\n" + task_table(task, result))
    print(f"\nProtocol: {results['protocol']}.\nWrote {report} and results.json beside it.")


if __name__ == "__main__":
    main()
