"""Score an AU-LLaVA: predictions, scores with intervals beside baselines, a report, and the model card.

    python evaluate_au.py --model . --dataset synthetic --output runs/evaluation
    python evaluate_au.py --dataset synthetic --predictions runs/evaluation --output runs/again
    accelerate launch evaluate_au.py --model runs/bp4d_{fold} --dataset bp4d --data_dir data/bp4d --output runs/bp4d

A run that was stopped goes on where it stopped. `docs/evaluation.md` explains what is measured and how.
"""

import argparse
import shlex
import sys

from evaluation.answers import read_answers
from evaluation.calibration import load
from evaluation.data import QUESTIONS, SYNTHETIC_SAMPLE, read_set
from evaluation.predict import predict, processes
from evaluation.report import write_report
from evaluation.results import summarise, write_results
from evaluation.table import task_table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; {fold} in it stands for the number of the test fold")
    parser.add_argument("--dataset", choices=QUESTIONS, default="synthetic")
    parser.add_argument("--data_dir", help="folder of prepared Parquet shards; the committed sample for synthetic")
    parser.add_argument("--split", default="test")
    parser.add_argument("--protocol", default="standard", choices=("standard", "paper"))
    parser.add_argument("--fold", type=int, help="1, 2 or 3; all three by default, where the protocol has folds")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each fold, evenly spread")
    parser.add_argument("--tasks", nargs="+", help="only these of the data set's tasks")
    parser.add_argument("--output", required=True, help="folder for predictions, results and report")
    parser.add_argument("--predictions", help="score these stored predictions instead of a model")
    parser.add_argument("--calibration", help="model folder whose calibration is used; --model by default")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--resamples", type=int, default=1000, help="of people, for the intervals")
    args = parser.parse_args()
    if bool(args.model) == bool(args.predictions):
        parser.error("give --model to predict and score, or --predictions to score stored predictions")
    if args.model and not args.data_dir:
        if args.dataset != "synthetic":
            parser.error(f"--dataset {args.dataset} needs --data_dir, the folder of its prepared crops")
        args.data_dir = str(SYNTHETIC_SAMPLE)
    return args


def main() -> None:
    args = arguments()
    evaluation_set, predictions = None, args.predictions
    if args.data_dir:
        evaluation_set = read_set(args.dataset, args.data_dir, args.split, args.protocol, args.fold, args.limit)
    if args.model:
        predictions = predict(evaluation_set, args.model, args.output, args.batch_size, args.dtype, args.tasks)
    if not processes().is_main_process:
        return
    answers = read_answers(predictions)
    calibration = load(args.calibration or args.model)
    results = summarise(answers, vars(args), shlex.join(["python", *sys.argv]), calibration, args.resamples)
    write_results(results, args.output)
    report = write_report(results, answers, args.output, evaluation_set)
    for task, result in results["tasks"].items():
        print("\n" + task_table(task, result))
    print(f"\nProtocol: {results['protocol']}.\nWrote {report} and results.json beside it.")


if __name__ == "__main__":
    main()
