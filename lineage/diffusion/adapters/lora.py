"""`lora`: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

The problem: fine-tuning a large model gives a second one of the same size for each style or
subject. What is new: the change of a weight matrix is a product of two thin ones. It costs a
hundredth of the parameters, and is merged into the weights, so that sampling is as fast as before.

    section 4.1, equation 3   W' = W + (alpha / r) B A,  A (r, in) from a normal distribution,
                              B (out, r) from zero                          `LowRank.delta`
    section 4.1               no cost when sampling: W' is an ordinary matrix          `merged`
    section 4.2               which matrices: those of the attention
                                                                     `LoRAConfig.target_modules`

The loss is that of the base (`DiffusionModel.losses`). A is called `down` and B `up`, as in all
public files. Convolutions, which the paper leaves out, follow kohya-ss/sd-scripts: `down` has the
kernel of the layer, and `up` is 1 x 1.

Departure: instead of W x + (alpha / r) B A x the network computes W' x. It is the same function, in
fewer and larger products, which small networks gain from (results/lora/speed.json).

Axes: r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lineage.bounds import Dim, PositiveFloat, Texts
from lineage.config import configuration
from lineage.diffusion.adapters.adapted import AdaptedModel
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.text.contract import TextFeatures

ATTENTION = ("to_q", "to_k", "to_v", "to_out")
"""Last parts of the names of the layers of an attention."""


@configuration
class LoRAConfig:
    """Sizes of an adapter.

    Attributes:
        rank: r, rank of the change of every layer.
        alpha: Factor alpha; the change is multiplied by alpha / r.
        target_modules: Last parts of the names of the layers that are adapted, as in peft; the
            network's linear layers and convolutions among them.
    """

    rank: Dim = 4
    alpha: PositiveFloat = 4.0
    target_modules: Texts = ATTENTION


# --- section 4.1 ----------------------------------------------------------------------------------


class LowRank(nn.Module):
    """The change of one weight.

    Args:
        shape: Shape of the weight, (out, in) or (out, in, kh, kw).
        rank: r.
        alpha: Factor alpha.
    """

    alpha: Tensor

    def __init__(self, shape: Sequence[int], rank: int, alpha: float) -> None:
        super().__init__()
        outputs, *inputs = shape
        self.down = nn.Parameter(torch.empty(rank, *inputs).normal_(std=1 / rank))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *[1] * (len(inputs) - 1)))
        self.register_buffer("alpha", torch.tensor(float(alpha)))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """(alpha / r) B A, of the weight's shape."""
        product = self.up.flatten(1) @ self.down.flatten(1)  # (out, in kh kw)
        return self.alpha / self.rank * product.unflatten(1, self.down.shape[1:])

    def extra_repr(self) -> str:
        shape = (self.up.shape[0], *self.down.shape[1:])
        return f"{tuple(shape)}, rank={self.rank}, alpha={self.alpha.item():g}"


class LoRA(nn.Module):
    """Changes of some layers of a model.

    Args:
        changes: `LowRank` of each layer, by the layer's name in the model.
    """

    def __init__(self, changes: Mapping[str, LowRank]) -> None:
        super().__init__()
        for name, change in changes.items():
            *outer, last = name.split(".")
            place: nn.Module = self
            for part in outer:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, change)

    def changes(self) -> dict[str, LowRank]:
        """`LowRank` of each layer, by the layer's name."""
        return {name: one for name, one in self.named_modules() if isinstance(one, LowRank)}

    def deltas(self) -> dict[str, Tensor]:
        """The change of each weight, by the weight's name."""
        return {f"{name}.weight": change.delta() for name, change in self.changes().items()}


def make_lora(model: DiffusionModel, config: LoRAConfig) -> LoRA:
    """An adapter of the model's network that changes nothing yet.

    Raises:
        UserError: the network has no layer of the names in `config.target_modules`.
    """
    layers = {name: w for name, w in adaptable(model) if name.startswith("network.")}
    chosen = {n: w for n, w in layers.items() if n.rpartition(".")[2] in config.target_modules}
    if not chosen:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise UserError(
            f"target_modules={','.join(config.target_modules)} names no layer of the network: "
            f"its layers end with {ends}."
        )
    return LoRA({n: LowRank(w.shape, config.rank, config.alpha) for n, w in chosen.items()})


def adaptable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of each linear layer and convolution."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module.weight


# --- with a network -------------------------------------------------------------------------------


class LoRANetwork(nn.Module):
    """A network whose weights are W' in place of W; the network itself is left as it is.

    Args:
        network: Network of a model.
        lora: Adapter of that model, whose names begin with `network.`.
    """

    def __init__(self, network: nn.Module, lora: LoRA) -> None:
        super().__init__()
        self.network, self.lora = network, lora
        self._cached: tuple[list[tuple[int, int]], dict[str, Tensor]] | None = None

    def forward(self, x_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """As of the network: x_t (B, C, H, W), t (B,) -> (B, C', H, W)."""
        own = {name.removeprefix("network."): weight for name, weight in self.weights().items()}
        return functional_call(self.network, own, (x_t, t, text))

    def weights(self) -> dict[str, Tensor]:
        """W' of each adapted layer; without gradients they are computed once."""
        if torch.is_grad_enabled():
            return self._changed()
        changed = [self.get_parameter(f"{name}.weight") for name in self.lora.changes()]
        version = [(p.data_ptr(), p._version) for p in (*self.lora.parameters(), *changed)]
        if self._cached is None or self._cached[0] != version:
            self._cached = version, self._changed()
        return self._cached[1]

    def _changed(self) -> dict[str, Tensor]:
        deltas = self.lora.deltas()
        return {name: self.get_parameter(name) + delta for name, delta in deltas.items()}


class LoRAModel(AdaptedModel):
    """A base whose network a `LoRA` changes."""

    adapter: LoRA

    def __init__(self, base: DiffusionModel, config: LoRAConfig) -> None:
        lora = make_lora(base, config)
        super().__init__(base, LoRANetwork(base.network, lora), lora)


# --- several adapters, merged ---------------------------------------------------------------------


@torch.no_grad()
def merge(model: nn.Module, adapters: Sequence[tuple[LoRA, float]]) -> dict[str, Tensor]:
    """Add the changes of some adapters to a model's weights, each times its scale.

    Args:
        model: Model whose names the adapters have.
        adapters: Adapters and their scales; a negative scale draws the opposite, and 0 nothing.

    Returns:
        The weights as they were, by name, for `unmerge`: subtracting the changes again would leave
        rounding errors.

    Raises:
        UserError: an adapter does not fit the model.
    """
    for adapter, _ in adapters:
        check_fits(model, adapter)
    before: dict[str, Tensor] = {}
    for adapter, scale in adapters:
        for name, delta in adapter.deltas().items() if scale else ():
            weight = model.get_parameter(name)
            before.setdefault(name, weight.clone())
            weight.add_((scale * delta).to(weight))
    return before


@torch.no_grad()
def unmerge(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Restore the weights that `merge` returned, to the bit."""
    for name, weight in before.items():
        model.get_parameter(name).copy_(weight)


@contextmanager
def merged(model: nn.Module, adapters: Sequence[tuple[LoRA, float]]) -> Iterator[None]:
    """The model with the changes of some adapters; afterwards it is as it was."""
    before = merge(model, adapters)
    try:
        yield
    finally:
        unmerge(model, before)


def check_fits(model: nn.Module, adapter: LoRA) -> None:
    """Raise `UserError` if a layer of the adapter is not in the model, or has another shape."""
    layers = {name: tuple(weight.shape) for name, weight in adaptable(model)}
    for name, change in adapter.changes().items():
        own = (change.up.shape[0], *change.down.shape[1:])
        if name not in layers:
            raise UserError(f"The adapter changes {name}, a layer that the model does not have.")
        if layers[name] != own:
            raise UserError(
                f"The adapter was made for another model: its change of {name} is {own}, and the "
                f"weight there {layers[name]}."
            )
