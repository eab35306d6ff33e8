"""What one turn of a training step moves: parameters, their optimiser and their moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lineage.config import OptimConfig
from lineage.training.machine import Processes


class Group:
    """The parameters that one turn moves: their optimiser and their moving average.

    The average is taken of the modules' floating-point buffers too, such as the statistics of batch
    norm, which belong to the weights they were taken with.
    """

    def __init__(self, name: str, modules: list[nn.Module], config: OptimConfig) -> None:
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        self.parameters = list(unique.values())
        self.clip = config.clip
        self.lr = config.lr * config.rates.get(name, 1.0)
        hidden = _hidden(modules) if config.name == "muon" else []
        others = [p for p in self.parameters if not any(p is matrix for matrix in hidden)]
        decayed = [p for p in others if p.dim() > 1 and config.weight_decay > 0]
        kept = [p for p in others if p.dim() <= 1 or config.weight_decay == 0]
        parts: list[dict[str, Any]] = [{"params": kept, "weight_decay": 0.0}]
        if decayed:
            parts.insert(0, {"params": decayed, "weight_decay": config.weight_decay})
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "optimizer": kind(
                parts,
                lr=self.lr,
                betas=(config.beta1, config.beta2),
                fused=fused,
            )
        }
        if hidden:  # steps as long as Adam's, so that one rate serves both
            self.optimizers["muon"] = torch.optim.Muon(
                hidden,
                lr=self.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        self.decay = config.average
        buffers = {id(b): b for m in modules for b in m.buffers() if b.is_floating_point()}
        self.tracked: list[Tensor] = [*self.parameters, *buffers.values()]
        self.average = [t.detach().clone() for t in self.tracked] if self.decay else None

    def update(self, loss: Tensor, rate: float, step: int, processes: Processes) -> Tensor:
        """Minimise `loss` by one step at `rate` times the group's own.

        Returns the gradient's norm, before clipping.
        """
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward(inputs=self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        processes.average(gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        for optimizer in self.optimizers.values():
            for part in optimizer.param_groups:
                part["lr"] = self.lr * rate
            _step(optimizer)
        if self.average is not None:
            with torch.no_grad():  # a short memory at first, so that the start is forgotten
                decay = min(self.decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(self.average, self.tracked, 1 - decay)
        return norm

    def optimizer_states(self) -> dict[str, Any]:
        """The states of the optimisers, by name."""
        return {name: one.state_dict() for name, one in self.optimizers.items()}

    def load_optimizer_states(self, saved: dict[str, Any]) -> None:
        """Go on from what `optimizer_states` gave. Raises `KeyError`, `ValueError` for others."""
        for name, one in self.optimizers.items():
            one.load_state_dict(saved[name])
            for parameter, state in one.state.items():  # a fused step would write out of bounds
                if any(v.dim() and v.shape != parameter.shape for v in state.values()):
                    raise ValueError("the optimiser's state is of parameters of other shapes")


def _step(optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's step without what PyTorch wraps around it: a mark for its profiler, and
    hooks, of which there are none here. Between the layers of a small network that takes a third as
    long as the step itself.
    """
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]
    else:
        optimizer.step()


def _hidden(modules: list[nn.Module]) -> list[Tensor]:
    """The matrices that Muon moves: of linear layers inside of `modules`.

    A linear layer that is itself one of `modules` is a first or last one, which, as tables of
    tokens, are better left to Adam.
    """
    layers = [m for module in modules for m in module.modules() if m is not module]
    linear = {id(m.weight): m.weight for m in layers if isinstance(m, nn.Linear)}
    return [weight for weight in linear.values() if weight.requires_grad]
