"""How much computing a stage of the default checkpoint takes, counted on one step of each kind."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def operations(run: Callable, *args) -> int:
    """Floating-point operations of one call of `run` with these arguments.

    A whole training is not put under the counter: that keeps the tensors of every step in memory for a while, and
    holds up each small product.
    """
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()
