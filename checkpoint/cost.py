"""How much computing a stage of the default checkpoint takes, counted on one step of each kind."""

import json
from collections.abc import Callable
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from checkpoint.questions import LISTS, ROUND


def operations(run: Callable, *args) -> int:
    """Floating-point operations of one call of `run` with these arguments.

    A whole training is not put under the counter: that keeps the tensors of every step in memory for a while, and
    holds up each small product.
    """
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def cost_of(model: str) -> dict[str, int]:
    """Floating-point operations of the stages before, by name, as `cost.json` beside a model has them.

    Published weights have none: of these nothing is counted, and a line says so.
    """
    file = Path(model, "cost.json")
    if not file.is_file():
        print(f"No {file}: what the stages before have taken is not counted.")
        return {}
    return json.loads(file.read_text())


def operations_of(steps: int, learn: Callable[[int], object]) -> int:
    """Those of so many steps, in the order of `ROUND`; `learn` does one step about the question that it is given."""
    costs = [operations(learn, asked) for asked in range(len(LISTS))]
    return sum(costs[ROUND[step % len(ROUND)]] for step in range(steps))
