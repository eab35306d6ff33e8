"""Steps that a trainer takes and takes back: to compare numbers of threads, to count operations.

Batch, noise and dropout of a step are functions of its number, so that the steps of the run itself
are not changed by a rehearsal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lineage.threads import use_threads

if TYPE_CHECKING:
    from lineage.training.loop import Trainer

FEW_STEPS, SMALL = 50, 10**7
"""Number of steps, and of parameters, up to which the numbers of threads are not compared: it would
take as long as it could gain.
"""
COUNTED_STEPS = 16
"""Number of steps whose operations are counted: a lazy penalty is due in one of them."""


@contextmanager
def _rehearsed(trainer: Trainer) -> Iterator[None]:
    """Steps that are taken back at the end."""
    saved = copy.deepcopy(trainer.state())
    yield
    trainer.load_state(saved)


def choose_threads(trainer: Trainer) -> int | None:
    """For a budget that is not in minutes, time steps with several numbers of threads and keep the
    fastest. The state is restored, so that every step of the run is made with it.

    Returns:
        The number that is kept; None if it may change, does not matter, or the run is short.
    """
    if trainer.device.type != "cpu" or trainer.train.is_timed:
        return None
    if trainer.threads.fixed is not None or trainer.spent() >= 1:
        return trainer.threads.fixed
    if _is_short(trainer):
        trainer.threads.keep(1, "a short run")
        return None
    with _rehearsed(trainer):
        with use_threads(1):
            batch = trainer.loader.at(trainer.step)
            trainer.captions.encode(batch.caption)  # of a frozen encoder: in no measured step
        while trainer.threads.measuring:
            with trainer.threads.unit():
                trainer._advance(batch, collect_metrics=False)
    trainer.threads.keep(trainer.threads.count, trainer.threads.reason)
    return trainer.threads.fixed


def _is_short(trainer: Trainer) -> bool:
    """Whether a budget is too small to measure. A function of the settings alone, so that a resumed
    run gets the same answer.
    """
    train = trainer.train
    pictures, flops = train.max_pictures or math.inf, train.max_flops or math.inf
    steps = min(train.max_steps or math.inf, pictures / trainer.batch_size)
    if math.isfinite(flops):
        steps = min(steps, flops / max(1.0, trainer.flops_per_step))
    size = sum(p.numel() for group in trainer.groups.values() for p in group.parameters)
    return steps <= FEW_STEPS and size <= SMALL


def flops_per_step(trainer: Trainer) -> float:
    """Floating-point operations of matrix products, convolutions and attention in a step, forward
    and backward, those of reading its batch among them; the mean of the first steps of a run.
    """
    plain = sdpa_kernel(SDPBackend.MATH)  # the CPU's fused attention is not counted
    with use_threads(1), _rehearsed(trainer):
        trainer.step = 0
        with plain, FlopCount() as counted:
            for step in range(COUNTED_STEPS):
                trainer._advance(trainer.loader.at(step), collect_metrics=False)
    return counted.total / COUNTED_STEPS


class FlopCount(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside it, by PyTorch's own formulas.

    PyTorch's `FlopCounterMode` follows modules, too, and so cannot count a gradient with respect to
    some parameters alone, which is how each turn is trained.

    Attributes:
        total: Number of operations so far.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # late: it alone takes 200 MB

        super().__init__()
        self.total, self.formulas = 0, flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
