"""Parameters that one turn of a training step updates, their optimiser and their moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineage.config import OptimConfig
from lineage.training.machine import Distributed
from lineage.training.muon import Muon
from lineage.training.store import is_dense


class Group:
    """Parameters of one turn, with their optimiser and the moving average of their weights.

    The average covers the modules' floating-point buffers too, such as the statistics of batch
    norm, which belong to the weights they were computed with.

    Args:
        name: Name of the group, by which `lr_multipliers` finds it.
        modules: Modules whose parameters are updated.
        config: Optimiser, rates, clipping and averaging.
    """

    def __init__(self, name: str, modules: list[nn.Module], config: OptimConfig) -> None:
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        self.parameters = list(unique.values())
        self.grad_clip = config.grad_clip
        self.lr = config.lr * config.lr_multipliers.get(name, 1.0)
        hidden = _hidden_matrices(modules) if config.name == "muon" else []
        others = [p for p in self.parameters if not any(p is matrix for matrix in hidden)]
        self.optimizers = {"optimizer": _adam(others, config, self.lr)}
        if hidden:  # steps as long as Adam's, so that one rate serves both
            self.optimizers["muon"] = Muon(hidden, self.lr, config.weight_decay)
        self.ema_decay = config.ema_decay
        buffers = {id(b): b for m in modules for b in m.buffers() if b.is_floating_point()}
        self.tracked: list[Tensor] = [*self.parameters, *buffers.values()]
        self.average = [t.detach().clone() for t in self.tracked] if self.ema_decay else None

    def update(self, loss: Tensor, lr_factor: float, step: int, processes: Distributed) -> Tensor:
        """Minimise `loss` by one step at `lr_factor` times the group's rate.

        Returns the norm of the gradient before clipping.
        """
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward(inputs=self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        processes.all_reduce_mean(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        for optimizer in self.optimizers.values():
            for part in optimizer.param_groups:
                part["lr"] = self.lr * lr_factor
            _step(optimizer)
        if self.average is not None:
            with torch.no_grad():  # a short memory at first, so that the initial weights fade
                decay = min(self.ema_decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(self.average, self.tracked, 1 - decay)
        return norm

    def optimizer_states(self) -> dict[str, Any]:
        """States of the optimisers, by name."""
        return {name: one.state_dict() for name, one in self.optimizers.items()}

    def load_optimizer_states(self, saved: dict[str, Any]) -> None:
        """Restore `optimizer_states`: the moments alone, while rates and the like stay ours.

        Raises `KeyError`, `ValueError`, `TypeError` for those of other groups.
        """
        for name, one in self.optimizers.items():
            own, state = one.state_dict()["param_groups"], saved[name]["state"]
            if [part["params"] for part in saved[name]["param_groups"]] != [
                part["params"] for part in own
            ]:
                raise ValueError("the optimiser's state is of other parameters")
            numbers = [number for part in own for number in part["params"]]
            parameters = [p for part in one.param_groups for p in part["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            for number, moments in state.items():
                _check_moments(moments, _MOMENTS[name], of[number])
            one.load_state_dict({"state": state, "param_groups": own})

    def load_average(self, saved: Sequence[Tensor]) -> None:
        """Restore `average`. Raises `ValueError`, `TypeError` for that of another group."""
        for average, value in zip(self.average or [], saved, strict=True):
            _check_tensor("average", value, average.shape, average.dtype)
            average.copy_(value)


_MOMENTS = {"optimizer": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}
"""Names of what each optimiser stores for a parameter."""


def _check_moments(moments: dict[str, Any], names: set[str], parameter: Tensor) -> None:
    """Raise `ValueError` if what is saved for a parameter does not fit it: a fused step would read
    and write out of bounds.
    """
    if moments.keys() != names:
        raise ValueError("the optimiser's state is of another optimiser")
    for name, value in moments.items():
        shape, dtype = parameter.shape, parameter.dtype
        if name == "step":
            shape, dtype = torch.Size(), torch.float32
        _check_tensor(name, value, shape, dtype)


def _check_tensor(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not is_dense(value) or value.shape != shape or value.dtype != dtype:
        raise ValueError(f"the optimiser's {name} is of another shape or kind")


def _adam(parameters: Sequence[Tensor], config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """Adam or AdamW, with weight decay for matrices and kernels alone."""
    decayed = [p for p in parameters if p.dim() > 1 and config.weight_decay > 0]
    others = [p for p in parameters if p.dim() <= 1 or config.weight_decay == 0]
    parts: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}]
    if decayed:
        parts.insert(0, {"params": decayed, "weight_decay": config.weight_decay})
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return kind(parts, lr=lr, betas=(config.beta1, config.beta2), fused=fused)


def _step(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's step without PyTorch's mark for its profiler and its hooks (there are none),
    which cost a third as much as the step itself between the layers of a small network.
    """
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]
    else:
        optimizer.step()


def _hidden_matrices(modules: list[nn.Module]) -> list[Tensor]:
    """Matrices that Muon updates: those of linear layers inside of `modules`.

    A linear layer that is itself one of `modules` is a first or last layer, which, as tables of
    tokens, is better left to Adam.
    """
    layers = [m for module in modules for m in module.modules() if m is not module]
    linear = {id(m.weight): m.weight for m in layers if isinstance(m, nn.Linear)}
    return [weight for weight in linear.values() if weight.requires_grad]
