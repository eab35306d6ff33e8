"""Euler's method on the straight line x_s = (1 - s) x_0 + s eps (Liu et al. 2022,
arXiv:2209.03003):

    x_s' = x_s + (s' - s) v,    v = eps - x_0 = (x_s - x_0) / s
"""

from __future__ import annotations

from torch import Tensor

from lineage.diffusion.samplers.base import Callback, Denoise, no_callback
from lineage.diffusion.schedules import SamplingSchedule
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams


def flow_euler(
    denoise: Denoise,
    x: Tensor,
    schedule: SamplingSchedule,
    noise: NoiseStreams,
    callback: Callback = no_callback,
) -> Tensor:
    """Integrate the velocity.

    Raises:
        UserError: for a schedule that is not on the straight line.
    """
    if any(abs(level.alpha + level.sigma - 1) > 1e-6 for level in schedule.levels):
        raise UserError("sampler=flow_euler needs process.schedule=flow: choose another.")
    for step, (level, next_level) in enumerate(schedule.steps()):
        x0 = denoise(x, level).x0
        callback(step, x, x0)
        velocity = (x - x0) / level.sigma
        x = x + (next_level.sigma - level.sigma) * velocity
    return x
