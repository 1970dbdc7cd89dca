"""What the parallel read-out costs or gains against the exact one, and which decision suits which metric.

    python benchmarks/readouts.py --models runs/neutral_seed0 runs/neutral_seed1 --output runs/readouts

Each model, trained alike but for its seed, answers every picture of a rendered split by both read-outs; each
distribution is then decided by mode, mean and median. The table gives the mean over models and, in brackets, half the
distance between the best and the worst of them. Answers are kept in `--output`, so a stopped run goes on.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from au_llava.readout_au_llava import READOUTS
from au_llava.recognition_au_llava import DECISIONS
from evaluation.answers import read_answers
from evaluation.compare import COMPARED
from evaluation.data import SAMPLE, read_set
from evaluation.predict import predict
from evaluation.scores import is_detection, score_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders or Hub ids, one a seed")
    parser.add_argument("--data_dir", default=str(SAMPLE), help="rendered faces; by default the committed 300")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", default="runs/readouts")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()

    pictures = read_set("synthetic", args.data_dir, args.split, limit=args.limit)
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for number, model in enumerate(args.models):
        for readout in READOUTS:
            folder = Path(args.output, str(number), readout)
            stored = predict(pictures, model, folder, args.batch_size, readout=readout)
            for decision in DECISIONS:
                for task, answers in read_answers(stored, decision).items():
                    if task == "detection" and decision != "mode":
                        continue  # yes or no: there is nothing between to decide for
                    row = score_row(answers, answers.values, answers.expected_values, resamples=2)["mean"]
                    for name in COMPARED[is_detection(task)]:
                        found.setdefault((task, readout, decision, name), []).append(row[name]["value"])

    print(f"{'task':16}{'readout':10}{'decision':10}{'score':9}{'mean':>8}  (half range of {len(args.models)} models)")
    rows = []
    for (task, readout, decision, name), values in sorted(found.items()):
        mean, spread = float(np.mean(values)), float(np.ptp(values)) / 2
        rows.append({"task": task, "readout": readout, "decision": decision, "score": name, "values": values})
        print(f"{task:16}{readout:10}{decision:10}{name:9}{mean:8.3f}  ({spread:.3f})")
    if args.json:
        print(json.dumps({"models": args.models, "pictures": len(pictures.samples), "rows": rows}))


if __name__ == "__main__":
    main()
