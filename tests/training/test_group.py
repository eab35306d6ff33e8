"""A group: which optimiser moves what, steps by hand, clipping, averages, and going on exactly."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage.config import OptimConfig
from lineage.errors import UserError
from lineage.training import muon
from lineage.training.group import Group
from lineage.training.machine import Distributed
from lineage.training.muon import Muon

ALONE = Distributed()
PLAIN: dict[str, Any] = {
    "lr": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "ema_decay": 0.0,
}


class Net(nn.Module):
    """A table, a body of linear layers, norms and a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 6, bias=False))
        )
        self.mix = nn.Conv1d(6, 6, 1)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def modules_apart(self) -> list[nn.Module]:
        return [self.table, self.body, self.mix, self.norm, self.head]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.body(self.table(ids))[..., None])[..., 0]))


def group_of(modules: list[nn.Module], called: str = "net", **settings: Any) -> Group:
    return Group(called, modules, OptimConfig(**(PLAIN | settings)))


def names_moved(net: nn.Module, group: Group) -> dict[str, set[str]]:
    """By optimiser, the names of the parameters that it holds."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        kind: {names[id(p)] for part in one.param_groups for p in part["params"]}
        for kind, one in group.optimizers.items()
    }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(net: Net, step: int = 0) -> Tensor:
    ids = torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))
    return net(ids).square().mean() + (net(ids)[:, 0] * (ids - 3)).mean()


# --- who moves what ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_parameter_has_one_optimiser(name: str) -> None:
    net = Net()
    net.body[0].bias.requires_grad_(False)
    group = group_of(net.modules_apart(), name=name)
    parameters = [
        p for one in group.optimizers.values() for g in one.param_groups for p in g["params"]
    ]
    expected = {id(p) for p in net.parameters() if p.requires_grad}
    assert len(parameters) == len(expected) and {id(p) for p in parameters} == expected
    assert {id(p) for p in group.parameters} == expected


def test_muon_moves_the_matrices_of_hidden_linear_layers() -> None:
    """Not tables, heads, kernels of convolutions, norms or biases."""
    net = Net()
    moved = names_moved(net, group_of(net.modules_apart(), name="muon"))
    assert moved["muon"] == {"body.0.weight", "body.3.0.weight"}
    everything = {name for name, _ in net.named_parameters()}
    assert moved["optimizer"] == everything - moved["muon"]


@pytest.mark.parametrize(("fast", "close"), [(True, 1e-3), (False, 1e-2)])
def test_muon_steps_as_pytorch_s_does(
    fast: bool, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of several shapes, some of which occur twice, one of them without gradient; without
    fast bfloat16 in float32, which PyTorch's rounds.
    """
    monkeypatch.setattr(muon, "bfloat16_is_fast", lambda device: fast)
    shapes = [(4, 6), (6, 4), (4, 6), (8, 8), (6, 4), (5, 5)]
    ours = [torch.randn(shape, generator=seeded(3)).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for a, b in list(zip(ours, theirs, strict=True))[:-1]:
            a.grad = torch.randn(a.shape, generator=seeded(step))
            b.grad = a.grad.clone()
        for one in optimizers:
            one.step()
        for a, b in zip(ours, theirs, strict=True):  # the products are in bfloat16
            torch.testing.assert_close(a, b, rtol=0, atol=close)
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]
    for number, state in optimizers[1].state_dict()["state"].items():
        mine = optimizers[0].state_dict()["state"][number]
        assert mine.keys() == state.keys()
        torch.testing.assert_close(mine["momentum_buffer"], state["momentum_buffer"])


def test_within_one_module_all_its_linear_layers_are_hidden() -> None:
    net = Net()
    moved = names_moved(net, group_of([net], name="muon"))
    assert moved["muon"] == {"body.0.weight", "body.3.0.weight", "head.weight"}


def test_a_matrix_that_two_modules_share_is_moved_once() -> None:
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
    second[0].weight = first[0].weight
    group = group_of([first, second, first], name="muon")
    (part,) = group.optimizers["muon"].param_groups
    assert len(part["params"]) == 1 and part["params"][0] is first[0].weight
    assert len(group.parameters) == 3
    frozen = nn.Sequential(nn.Linear(4, 4))
    frozen[0].weight.requires_grad_(False)
    assert list(group_of([frozen], name="muon").optimizers) == ["optimizer"]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_there_is_no_muon_where_it_is_not_asked_for(name: str) -> None:
    net = Net()
    assert list(names_moved(net, group_of(net.modules_apart(), name=name))) == ["optimizer"]
    kind = group_of([net], name=name).optimizers["optimizer"]
    assert type(kind) is (torch.optim.Adam if name == "adam" else torch.optim.AdamW)


def test_muon_alone_or_with_nothing_to_do() -> None:
    """Where all are hidden matrices, and where none is."""
    all_hidden = nn.Sequential(nn.Linear(4, 4, bias=False))
    none_hidden = nn.LayerNorm(4)
    for module, kinds in ((all_hidden, ["optimizer", "muon"]), (none_hidden, ["optimizer"])):
        group = group_of([module], name="muon")
        assert list(group.optimizers) == kinds
        before = [p.detach().clone() for p in module.parameters()]
        group.update(module(torch.randn(5, 4)).pow(4).mean(), 1.0, 0, ALONE)
        for parameter, old in zip(module.parameters(), before, strict=True):
            assert not torch.equal(parameter, old)


@pytest.mark.parametrize("text", ["bag", "transformer", "lstm"])
def test_of_a_prior_muon_moves_the_blocks(text: str, make_system: Callable[..., Any]) -> None:
    """Four matrices of each block of the prior, and those of a text encoder that has such."""
    system, _ = make_system("vqvae", text=text, encoder__num_heads=2)
    ((name, modules),) = system.groups().items()
    moved = names_moved(system, group_of(modules, name, name="muon"))
    block = ("attn.qkv.weight", "attn.proj.weight", "mlp.0.weight", "mlp.2.weight")
    expected = {f"transformer.blocks.{n}.{part}" for n in range(2) for part in block}
    if text == "transformer":
        linear = (*(f"attn.to_{x}" for x in ("q", "k", "v", "out")), "mlp.0", "mlp.2")
        expected |= {f"text.blocks.0.{part}.weight" for part in linear}
    assert moved["muon"] == expected


def test_weight_decay_spares_vectors() -> None:
    net = Net()
    group = group_of(net.modules_apart(), name="muon", weight_decay=0.3)
    decays = {
        id(p): part["weight_decay"]
        for one in group.optimizers.values()
        for part in one.param_groups
        for p in part["params"]
    }
    for name, parameter in net.named_parameters():
        assert decays[id(parameter)] == (0.3 if parameter.dim() > 1 else 0.0), name


# --- one step by hand -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_of_adam_by_hand(name: str) -> None:
    """Kingma and Ba 2015, algorithm 1; decay in the gradient, or beside it (AdamW)."""
    layer = nn.Linear(3, 2)
    group = group_of([layer], name=name, weight_decay=0.3)
    values = [p.detach().double().clone() for p in layer.parameters()]
    m = [torch.zeros_like(v) for v in values]
    s = [torch.zeros_like(v) for v in values]
    for step in range(4):
        x, rate = torch.randn(5, 3), (1.0, 0.5, 0.25, 2.0)[step]
        gradients = torch.autograd.grad(layer(x).pow(3).sum(), list(layer.parameters()))
        group.update(layer(x).pow(3).sum(), rate, step, ALONE)
        lr = 0.1 * rate
        for i, parameter in enumerate(layer.parameters()):
            g, decay = gradients[i].double(), 0.3 if parameter.dim() > 1 else 0.0
            if name == "adam":
                g = g + decay * values[i]
            else:
                values[i] = values[i] * (1 - lr * decay)
            m[i], s[i] = 0.8 * m[i] + 0.2 * g, 0.9 * s[i] + 0.1 * g * g
            first, second = m[i] / (1 - 0.8 ** (step + 1)), s[i] / (1 - 0.9 ** (step + 1))
            values[i] = values[i] - lr * first / (second.sqrt() + 1e-8)
            torch.testing.assert_close(parameter.detach().double(), values[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 12), (24, 6), (6, 24)], ids=str)
def test_a_first_step_of_muon_by_hand(shape: tuple[int, int]) -> None:
    """U V^T of the gradient U S V^T, nearly: all of its singular values become about one. As long
    as a step of Adam, whose entries are of size `lr`: 0.2 lr in the mean square."""
    rows, columns = shape
    body = nn.Sequential(nn.Linear(columns, rows, bias=False))
    group = group_of([body], name="muon", weight_decay=0.5, lr=0.01, lr_multipliers={"net": 2.0})
    weight = body[0].weight
    before = weight.detach().clone()
    slope = torch.randn(rows, columns)
    group.update((weight * slope).sum(), 0.5, 0, ALONE)
    lr = 0.01 * 2.0 * 0.5
    step = (before * (1 - lr * 0.5) - weight.detach()) / lr
    u, _, v = torch.linalg.svd(slope, full_matrices=False)
    turned = u.T @ step @ v.T / (0.2 * math.sqrt(max(shape)))
    assert turned.diagonal().min() > 0.4 and turned.diagonal().max() < 1.6
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 0.1
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_muon_has_a_memory() -> None:
    """Its step is that of a moving average of gradients, with Nesterov's look ahead."""
    body = nn.Sequential(nn.Linear(6, 6, bias=False))
    group, weight = group_of([body], name="muon", lr=0.01), body[0].weight
    slopes = [torch.randn(6, 6) for _ in range(3)]
    memory = torch.zeros(6, 6)
    for number, slope in enumerate(slopes):
        before = weight.detach().clone()
        group.update((weight * slope).sum(), 1.0, number, ALONE)
        memory = 0.95 * memory + 0.05 * slope
        u, _, v = torch.linalg.svd(0.05 * slope + 0.95 * memory)
        step = (before - weight.detach()).flatten()
        alike = torch.cosine_similarity(step, (u @ v).flatten(), dim=0)
        assert alike > 0.93, number
        if number:
            u, _, v = torch.linalg.svd(slope)
            assert torch.cosine_similarity(step, (u @ v).flatten(), dim=0) < alike - 0.05


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_rates_reach_every_optimiser(name: str) -> None:
    net = Net()
    group = group_of([net], name=name, lr=0.1, lr_multipliers={"net": 0.5, "other": 9.0})
    group.update(loss_of(net), 0.25, 0, ALONE)
    rates = {part["lr"] for one in group.optimizers.values() for part in one.param_groups}
    assert rates == {0.1 * 0.5 * 0.25}
    before = [p.detach().clone() for p in net.parameters()]
    group.update(loss_of(net), 0.0, 1, ALONE)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_the_step_without_the_mark_is_the_same_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's mark for its profiler is left out; where PyTorch sets none, nothing changes."""
    results = []
    for marked in (True, False):
        torch.manual_seed(0)
        net = Net()
        group = group_of([net], name=name, lr=0.1)
        if not marked:
            for one in group.optimizers.values():
                monkeypatch.setattr(type(one).step, "hooked", False)
        for step in range(3):
            group.update(loss_of(net), 1.0, step, ALONE)
        results.append([p.detach().clone() for p in net.parameters()])
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_state_of_other_shapes_is_refused() -> None:
    """The number of parameters is the same; PyTorch does not compare shapes, and its fused step
    writes beyond the end of the smaller ones."""
    one, other = (group_of([nn.Linear(*sizes)], lr=0.1) for sizes in ((3, 2), (2, 3)))
    one.update(sum(p.sum() for p in one.parameters), 1.0, 0, ALONE)
    with pytest.raises(ValueError, match="another shape"):
        other.load_optimizer_states(one.optimizer_states())
    again = group_of([nn.Linear(3, 2)], lr=0.1)
    again.load_optimizer_states(one.optimizer_states())


def test_a_step_leaves_no_mark_for_the_profiler() -> None:
    net = Net()
    group = group_of([net], lr=0.1)
    group.update(loss_of(net), 1.0, 0, ALONE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        group.update(loss_of(net), 1.0, 1, ALONE)
        group.optimizers["optimizer"].step()
    names = [event.name for event in profile.events()]
    assert sum("Optimizer.step" in name for name in names) == 1
    assert sum("_fused_adam" in name for name in names) == 2


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(UserError, match=r"name='muonn'.*'muon'"):
        OptimConfig(name="muonn")


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_turn_touches_its_own_parameters_alone(name: str) -> None:
    """No gradient is left on others, none of the turn before on its own."""
    net, other = Net(), Net()
    group = group_of(net.modules_apart(), name=name)
    before = [p.detach().clone() for p in other.parameters()]
    for step in range(2):
        group.update(loss_of(net, step) * loss_of(other, step), 1.0, step, ALONE)
    assert all(p.grad is None for p in other.parameters())
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    expected = torch.autograd.grad(loss_of(net, 9), group.parameters)
    group.update(loss_of(net, 9), 0.0, 2, ALONE)
    for parameter, gradient in zip(group.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_part_without_gradient_stays(name: str) -> None:
    """Without a gradient there is no step, no decay and no error."""
    used, unused = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    group = group_of([used, unused], name=name, weight_decay=0.5)
    before = [p.detach().clone() for p in unused.parameters()]
    group.update(used(torch.randn(3, 4)).sum(), 1.0, 0, ALONE)
    assert all(torch.equal(p, b) for p, b in zip(unused.parameters(), before, strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_the_norm_is_of_all_and_from_before_clipping(clip: float) -> None:
    """Over the matrices that Muon moves and all others together."""
    net = Net()
    group = group_of(net.modules_apart(), name="muon", grad_clip=clip)
    gradients = torch.autograd.grad(loss_of(net), group.parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    returned = group.update(loss_of(net), 0.0, 0, ALONE)
    assert returned.item() == pytest.approx(norm, rel=1e-4)
    factor = min(1.0, clip / norm) if clip else 1.0
    assert factor < 1 or clip != 0.01
    for parameter, gradient in zip(group.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-3, atol=1e-7)


# --- the moving average -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_is_of_parameters_and_statistics(name: str) -> None:
    """average <- d average + (1 - d) value, d from a short memory up; whole numbers have none, and
    what is not trained only where it is a statistic."""
    net = Net()
    net.body[0].bias.requires_grad_(False)
    group = group_of(net.modules_apart(), name=name, ema_decay=0.4, lr=0.05)
    tracked = [p for p in net.parameters() if p.requires_grad]
    tracked += [net.norm.running_mean, net.norm.running_var]
    assert [id(t) for t in group.tracked] == [id(t) for t in tracked]
    naive = [t.detach().clone() for t in tracked]
    for step in range(9):
        group.update(loss_of(net, step), 1.0, step, ALONE)
        d = min(0.4, (1 + step) / (10 + step))
        naive = [d * a + (1 - d) * t.detach() for a, t in zip(naive, tracked, strict=True)]
    assert group.average is not None
    for average, expected in zip(group.average, naive, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert not any(a.requires_grad for a in group.average)
    assert (group.average[0] - tracked[0]).abs().max() > 1e-4
    assert group_of([net], name=name).average is None


# --- going on ---------------------------------------------------------------------------------


def written(value: Any) -> Any:
    """`value` after a round trip through a file of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_a_group_goes_on_exactly(name: str) -> None:
    """From what a file holds of weights and optimisers, bit for bit."""
    settings: dict[str, Any] = {"name": name, "weight_decay": 0.1, "grad_clip": 1.0, "lr": 0.01}
    whole = Net()
    group = group_of(whole.modules_apart(), **settings)
    for step in range(3):
        group.update(loss_of(whole, step), 1.0, step, ALONE)
    weights, states = written(whole.state_dict()), written(group.optimizer_states())
    assert set(states) == ({"optimizer", "muon"} if name == "muon" else {"optimizer"})
    for step in range(3, 6):
        group.update(loss_of(whole, step), 1.0, step, ALONE)
    for forgetful in (False, True):
        part = Net()
        part.load_state_dict(weights)
        resumed = group_of(part.modules_apart(), **settings)
        if not forgetful:
            resumed.load_optimizer_states(states)
        for step in range(3, 6):
            resumed.update(loss_of(part, step), 1.0, step, ALONE)
        expected = whole.state_dict()
        same = [torch.equal(t, expected[n]) for n, t in part.state_dict().items()]
        assert all(same) != forgetful


def test_states_of_other_optimisers_are_refused() -> None:
    net = Net()
    muon = group_of(net.modules_apart(), name="muon")
    adamw = group_of(net.modules_apart(), name="adamw")
    for group in (muon, adamw):
        group.update(loss_of(net), 1.0, 0, ALONE)
    for group, other in ((muon, adamw), (adamw, muon)):
        with pytest.raises((KeyError, ValueError)):
            group.load_optimizer_states(written(other.optimizer_states()))
