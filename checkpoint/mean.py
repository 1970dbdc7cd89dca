"""The mean of the weights of encoders that have gone on from each other: it tells more than any of them, for nothing.

    python -m checkpoint.mean --encoders . runs/short --shares 0.4 0.6 --output_dir runs/mean

Each is a folder that `checkpoint.pretrain` has written, or an AU-LLaVA; so is what `checkpoint.pretrain --encoder` and
`checkpoint.reading --encoder` take, and what is written here is of the first kind.
"""

import argparse
import math

import torch
from transformers import PreTrainedModel

from checkpoint.pretrain import encoder_of, write_encoder


@torch.no_grad()
def mean_of(encoders: list[PreTrainedModel], shares: list[float]) -> PreTrainedModel:
    """The first encoder, with the mean of all weights; what only counts steps stays.

    Args:
        encoders (`list[PreTrainedModel]`): Of one shape.
        shares (`list[float]`): How much of each; 1 in all.
    """
    states = [encoder.state_dict() for encoder in encoders]
    for name, weight in states[0].items():
        if weight.is_floating_point():
            weight.copy_(sum(share * state[name] for share, state in zip(shares, states, strict=True)))
    return encoders[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", required=True, nargs="+")
    parser.add_argument("--shares", required=True, nargs="+", type=float, help="of each; 1 in all")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    if len(args.shares) != len(args.encoders) or not math.isclose(sum(args.shares), 1, abs_tol=1e-6):
        parser.error(f"--shares {args.shares}: one for each of {len(args.encoders)} encoders, and 1 in all")
    write_encoder(mean_of([encoder_of(folder) for folder in args.encoders], args.shares), args.output_dir)


if __name__ == "__main__":
    main()
