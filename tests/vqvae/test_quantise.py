"""The quantiser: the choice, what each term moves, averages by hand, starts and restarts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.vqvae.quantise import (
    COLLAPSED,
    QuantiserConfig,
    VectorQuantiser,
    quantiser_terms,
    usage_remark,
)


def made(at: Tensor | None = None, **settings: Any) -> VectorQuantiser:
    """A quantiser whose codes start `at` some place, or normal, and that never restarts any."""
    given = {"codes": 7, "width": 3, "start": "normal", "restart": 0.0} | settings
    if at is not None:
        given["codes"], given["width"] = at.shape
    quantiser = VectorQuantiser(QuantiserConfig(**given))
    if at is not None:
        quantiser.codes.data.copy_(at)
    return quantiser


def kept(quantiser: VectorQuantiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantiser.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the choice -------------------------------------------------------------------------------


def test_the_nearest_by_loops() -> None:
    quantiser, z = made(), torch.randn(5, 4, 3)
    ids = quantiser.nearest(z)
    assert ids.shape == (5, 4) and ids.dtype == torch.int64
    for row in range(5):
        for place in range(4):
            gaps = [float((z[row, place] - code).square().sum()) for code in quantiser.codes]
            assert ids[row, place] == gaps.index(min(gaps))
    assert len(ids.unique()) > 3


@pytest.mark.parametrize("codebook", ["average", "loss"])
@pytest.mark.parametrize("train", [False, True])
def test_values_are_the_codes_of_their_numbers(codebook: str, train: bool) -> None:
    """Those from before the step."""
    quantiser, z = made(codebook=codebook).train(train), torch.randn(6, 3)
    codes = quantiser.codes.detach().clone()
    found = quantiser(z)
    torch.testing.assert_close(found.values, codes[found.ids])
    assert torch.equal(found.ids, torch.cdist(z, codes).argmin(1))
    looked_up = quantiser.values(found.ids[:, None])
    assert looked_up.shape == (6, 1, 3)
    assert torch.equal(looked_up[:, 0], quantiser.codes[found.ids])


@pytest.mark.parametrize("shape", [(24, 3), (4, 6, 3), (2, 3, 4, 3)], ids=str)
def test_the_arrangement_of_the_vectors_does_not_matter(shape: tuple[int, ...]) -> None:
    """N, B N or B H W of them: numbers, values, terms and the codebook after the step."""
    z, codes = torch.randn(24, 3), torch.randn(7, 3)
    flat, other = made(codes).train(), made(codes).train()
    one, two = flat(z), other(z.view(shape))
    assert two.ids.shape == shape[:-1] and two.values.shape == shape
    assert torch.equal(two.ids.flatten(), one.ids)
    assert torch.equal(two.values.view(24, 3), one.values)
    assert two.terms["commitment"].item() == pytest.approx(one.terms["commitment"].item())
    assert same(kept(flat), kept(other))


def test_half_precision_around_it_does_not_change_the_numbers() -> None:
    """Far from the origin, products in bfloat16 would mistake one code for another."""
    quantiser = made(30 + torch.randn(7, 3)).eval()
    z = 30 + torch.randn(200, 3)
    exact = quantiser(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z @ quantiser.codes.T).dtype == torch.bfloat16
        rounded = (quantiser.codes.square().sum(1) - 2 * z @ quantiser.codes.T).argmin(1)
        found = quantiser(z)
    assert torch.equal(found.ids, exact.ids) and not torch.equal(rounded, exact.ids)
    assert found.values.dtype == torch.float32 and torch.equal(found.values, exact.values)
    assert torch.equal(found.terms["commitment"], exact.terms["commitment"])


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_the_gradient_is_copied_past_the_choice(codebook: str) -> None:
    """That of the values in z is the identity, and none goes to the codes."""
    quantiser, z = made(codebook=codebook), torch.randn(2, 4, 3, requires_grad=True)
    way = torch.randn(2, 4, 3)
    (quantiser(z).values * way).sum().backward()
    assert z.grad is not None and torch.equal(z.grad, way)
    assert quantiser.codes.grad is None or not quantiser.codes.grad.any()


@pytest.mark.parametrize("misplaced", [False, True])
def test_what_each_term_moves(misplaced: bool) -> None:
    """The codebook's term the codes alone, commitment the vectors alone, by the gradient of a mean
    of squares; beta on the vectors' term, or by the mistake on the codes'."""
    quantiser = made(codebook="loss", beta=0.3, misplaced_beta=misplaced)
    z = torch.randn(8, 3, requires_grad=True)
    found = quantiser(z)
    codes, gap = quantiser.codes, (quantiser.codes[found.ids] - z).detach()
    scales = {"codebook": 0.3 if misplaced else 1.0, "commitment": 1.0 if misplaced else 0.3}
    for name, scale in scales.items():
        assert found.terms[name].item() == pytest.approx(scale * gap.square().mean().item())
        grads = torch.autograd.grad(found.terms[name], [z, codes], allow_unused=True)
        mine, others = grads if name == "commitment" else reversed(grads)
        assert others is None or not others.any()
        expected = -gap
        if name == "codebook":
            expected = torch.zeros_like(codes)
            for number, row in zip(found.ids.tolist(), gap, strict=True):
                expected[number] += row
        torch.testing.assert_close(mine, scale * 2 / 24 * expected)


def test_terms_by_hand() -> None:
    z, code = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])  # a mean of 1 and 4
    right = {n: t.item() for n, t in quantiser_terms(z, code, 0.2).items()}
    wrong = {n: t.item() for n, t in quantiser_terms(z, code, 0.2, misplaced_beta=True).items()}
    assert right == pytest.approx({"codebook": 2.5, "commitment": 0.5})
    assert wrong == pytest.approx({"codebook": 0.5, "commitment": 2.5})


def test_averages_have_no_term_and_no_gradient() -> None:
    quantiser = made(codebook="average")
    assert set(quantiser(torch.randn(4, 3)).terms) == {"commitment"}
    assert not any(parameter.requires_grad for parameter in quantiser.parameters())
    assert set(made(codebook="loss")(torch.randn(4, 3)).terms) == {"codebook", "commitment"}
    assert all(parameter.requires_grad for parameter in made(codebook="loss").parameters())


# --- moving averages --------------------------------------------------------------------------


def test_two_steps_of_the_averages_by_hand() -> None:
    """Counts start as if the codes had always been used alike; then both averages go on, and the
    counts are smoothed: (n + eps) / (total + K eps) total."""
    decay, codes = 0.6, [0.0, 10.0, -50.0]
    quantiser = made(torch.tensor(codes)[:, None], decay=decay).train()
    batches = [[1.0, -1.5, 9.0, 2.0], [8.0, 12.0, 13.0, 3.0, 0.5]]
    counts = [4 / 3] * 3
    sums = [code * 4 / 3 for code in codes]
    for batch in batches:
        near = [min(range(3), key=lambda k, v=v: abs(v - codes[k])) for v in batch]
        found = quantiser(torch.tensor(batch)[:, None])
        assert found.ids.tolist() == near
        for k in range(3):
            mine = [v for v, number in zip(batch, near, strict=True) if number == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine)
        total = sum(counts)
        smoothed = [(n + 1e-5) / (total + 3e-5) * total for n in counts]
        codes = [s / n for s, n in zip(sums, smoothed, strict=True)]
        assert quantiser.counts.tolist() == pytest.approx(counts, rel=1e-5)
        assert quantiser.sums.flatten().tolist() == pytest.approx(sums, rel=1e-5)
        assert quantiser.codes.flatten().tolist() == pytest.approx(codes, rel=1e-5)
    assert codes[2] == pytest.approx(-50, rel=1e-3)  # unused, it stays


def test_averages_find_the_means_of_what_they_stand_for() -> None:
    centres = torch.tensor([[4.0, 0.0], [-4.0, 1.0]])
    quantiser = made(centres + torch.randn(2, 2), decay=0.8).train()
    batch = centres.repeat(50, 1) + 0.3 * torch.randn(100, 2)
    for _ in range(60):
        quantiser(batch)
    means = torch.stack([batch[k::2].mean(0) for k in (0, 1)])
    torch.testing.assert_close(quantiser.codes.data, means, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", ["normal", "kmeans"])
@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_evaluation_changes_nothing(codebook: str, start: str) -> None:
    """Neither codes nor counts, and k-means waits for the first batch of training."""
    quantiser = made(codebook=codebook, start=start, restart=0.5).eval()
    before = kept(quantiser)
    for _ in range(3):
        quantiser(torch.randn(9, 3))
    assert same(before, kept(quantiser))
    quantiser.train()(torch.randn(9, 3))
    assert not same(before, kept(quantiser))


def test_a_learnt_codebook_is_only_counted() -> None:
    """From an even share on, so that no code is out of use before it had its time."""
    quantiser = made(codebook="loss").train()
    before = kept(quantiser)
    found = quantiser(torch.randn(9, 3))
    assert torch.equal(quantiser.codes, before["codes"])
    sizes = torch.bincount(found.ids, minlength=7)
    torch.testing.assert_close(quantiser.counts, 0.99 * 9 / 7 + 0.01 * sizes)


# --- k-means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_two_clusters(seed: int) -> None:
    """Their means, wherever the start was drawn from."""
    torch.manual_seed(seed)
    quantiser, centres = made(codes=2, start="kmeans"), torch.tensor([[9.0, 0, 0], [-9.0, 5, 0]])
    batch = torch.cat([centres[0] + torch.randn(30, 3), centres[1] + torch.randn(20, 3)])
    quantiser.begin(batch)
    means = torch.stack([batch[:30].mean(0), batch[30:].mean(0)])
    order = quantiser.codes[:, 0].argsort(descending=True)
    torch.testing.assert_close(quantiser.codes.data[order], means)


def test_k_means_puts_codes_into_every_cluster() -> None:
    """And none outside: each is a mean of vectors that lie together."""
    centres = 20 * torch.eye(4)
    batch = centres.repeat(25, 1) + 0.5 * torch.randn(100, 4)
    quantiser = made(codes=16, width=4, start="kmeans", codebook="loss").train()
    found = quantiser(batch)
    gaps = torch.cdist(quantiser.codes.data, centres).min(1)
    widest = torch.cdist(batch, centres).min(1).values.max()  # a mean lies no further out
    assert gaps.values.max() <= widest + 1e-5 and set(gaps.indices.tolist()) == {0, 1, 2, 3}
    assert found.terms["commitment"] < 0.25 * 0.5**2  # nearer than the centres are


def test_k_means_runs_once() -> None:
    quantiser = made(start="kmeans", codebook="loss").train()
    assert not quantiser.begun
    quantiser(torch.randn(40, 3))
    first = quantiser.codes.detach().clone()
    quantiser(50 + torch.randn(40, 3))
    assert quantiser.begun and torch.equal(quantiser.codes, first)


def test_fewer_vectors_than_codes() -> None:
    """Each vector gets a code of its own; the codes left over stay where they were."""
    quantiser = made(start="kmeans", codebook="loss").train()
    before, batch = quantiser.codes.detach().clone(), 5 + torch.randn(4, 3)
    found = quantiser(batch)
    assert torch.equal(quantiser.codes[4:], before[4:])
    assert sorted(found.ids.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found.values, batch)


# --- restart ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_restart_puts_dead_codes_on_vectors(codebook: str, cosine: bool) -> None:
    """Of the batch; the one just below the share moves and the one just above it does not, and the
    living go where they would have gone anyway.

    Of a total of 100, 4 codes and a restart of 0.03 make 0.75 the least count.
    """
    codes = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, -1.0]])
    codes = F.normalize(codes, dim=1)
    batch = F.normalize(torch.rand(100, 3) * torch.tensor([1.0, 1.0, 0.2]), dim=1)
    counts = torch.tensor([60.0, 38.5, 0.78, 0.72]) / 0.99
    after = []
    for restart in (0.03, 0.0):
        quantiser = made(codes, codebook=codebook, restart=restart, cosine=cosine).train()
        quantiser.counts.copy_(counts)
        quantiser.sums.copy_(codes * counts[:, None])
        assert quantiser(batch).ids.max() == 1
        after.append(kept(quantiser))
    on, off = after
    assert torch.cdist(on["codes"][3:], batch).min() < 1e-6
    torch.testing.assert_close(off["codes"][2:], codes[2:], rtol=0, atol=1e-3)
    for name in ("codes", "counts", "sums"):
        assert torch.equal(on[name][:3], off[name][:3])
    assert on["counts"][3].item() == pytest.approx(off["counts"].sum().item() / 4)
    torch.testing.assert_close(on["sums"][3], on["codes"][3] * on["counts"][3])


def test_without_restart_a_code_out_of_reach_is_never_moved() -> None:
    quantiser = made(torch.tensor([[0.0], [1000.0]]), decay=0.5).train()
    for _ in range(8):
        quantiser(torch.randn(20, 1))
    assert quantiser.codes[1].item() == pytest.approx(1000, rel=1e-2)
    assert quantiser.counts[1] < 0.1


@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_no_code_is_dead_after_one_step(codebook: str) -> None:
    """Before there are any counts there is nothing to judge by."""
    codes = torch.tensor([[0.0], [1000.0]])
    quantiser = made(codes, decay=0.5, restart=0.9, codebook=codebook).train()
    quantiser(torch.randn(20, 1))
    assert quantiser.codes[1].item() == pytest.approx(1000, rel=1e-3)
    quantiser(torch.randn(20, 1))
    assert quantiser.codes[1].abs() < 10


def test_a_restarted_code_is_not_restarted_at_once() -> None:
    """It gets the count of an average code, hence time to find its vectors."""
    quantiser = made(torch.tensor([[0.0], [1000.0]]), decay=0.9, restart=0.03).train()
    quantiser.counts.copy_(torch.tensor([20.0, 0.0]))
    quantiser(torch.randn(20, 1))
    assert (quantiser.counts > 8).all()


# --- cosine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["normal", "kmeans"])
def test_codes_of_cosine_stay_of_length_one(start: str) -> None:
    quantiser = made(cosine=True, start=start, decay=0.5, restart=0.3).train()
    for step in range(12):
        found = quantiser(5 * torch.randn(20, 3))
        ones = quantiser.codes.norm(dim=1)
        torch.testing.assert_close(ones, torch.ones(7), msg=f"step {step}")
        torch.testing.assert_close(found.values.norm(dim=1), torch.ones(20))


def test_cosine_chooses_the_direction() -> None:
    quantiser, z = made(cosine=True).eval(), torch.randn(50, 3)
    fit = F.cosine_similarity(z[:, None], quantiser.codes[None], dim=2)
    assert torch.equal(quantiser(z).ids, fit.argmax(1))


def test_the_scale_of_the_vectors_does_not_matter_to_cosine() -> None:
    """Neither to the choice nor to the terms nor to the averages."""
    z, scale = torch.randn(30, 3), torch.rand(30, 1) * 9 + 0.1
    codes = F.normalize(torch.randn(7, 3), dim=1)
    one, two = made(codes, cosine=True).train(), made(codes, cosine=True).train()
    a, b = one(z), two(z * scale)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.values, b.values)
    torch.testing.assert_close(a.terms["commitment"], b.terms["commitment"])
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    plain = made(codes).train()
    assert not torch.equal(plain(z).ids, plain(z * scale).ids)


# --- how it fares -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"),
    [
        ([3.0, 3.0, 3.0, 3.0], 1.0, 4.0),
        ([5.0, 5.0, 0.0, 0.0], 0.5, 2.0),
        ([8.0, 0.0, 0.0, 0.0], 0.25, 1.0),
        ([98.8, 0.8, 0.2, 0.2], 0.5, None),  # 0.03 of an even share is 0.75
        ([98.9, 0.7, 0.2, 0.2], 0.25, None),
        ([2.0, 1.0, 1.0, 0.0], 0.75, 2**1.5),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 1.0),
    ],
    ids=str,
)
def test_usage_by_hand(counts: list[float], usage: float, perplexity: float | None) -> None:
    quantiser = made(codes=4)
    quantiser.counts.copy_(torch.tensor(counts))
    found = quantiser.usage()
    if perplexity is None:
        shares = [n / sum(counts) for n in counts]
        perplexity = math.exp(-sum(s * math.log(s) for s in shares))
    assert all(value.shape == () for value in found.values())
    assert found["usage"].item() == usage
    assert found["perplexity"].item() == pytest.approx(perplexity)


def test_the_remark_is_made_of_collapse_alone() -> None:
    assert usage_remark({}) == "" and usage_remark({"usage": COLLAPSED}) == ""
    assert usage_remark({"usage": 0.9, "perplexity": 1.0}) == ""
    told = usage_remark({"usage": 0.124})
    assert told == "codebook collapse: only 12% of the codes are in use"


def learn(restart: float, codebook: str) -> tuple[VectorQuantiser, float]:
    """Points of a plane through a codebook that starts far from where they arrive."""
    torch.manual_seed(3)
    quantiser = made(codes=16, width=2, codebook=codebook, decay=0.9, restart=restart).train()
    into, out = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(into.bias, 6.0)
    parameters = [*into.parameters(), *out.parameters()]
    parameters += [p for p in quantiser.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(150):
        points = torch.rand(128, 2) * 2 - 1
        found = quantiser(into(points))
        loss = F.mse_loss(out(found.values), points)
        optimiser.zero_grad()
        (loss + torch.stack(list(found.terms.values())).sum()).backward()
        optimiser.step()
    return quantiser, loss.item()


@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_a_codebook_collapses_without_restart_and_not_with_it(codebook: str) -> None:
    collapsed, worse = learn(0.0, codebook)
    used = {name: value.item() for name, value in collapsed.usage().items()}
    assert used["usage"] < 0.4 and used["perplexity"] < 6 and "collapse" in usage_remark(used)
    whole, better = learn(0.03, codebook)
    used = {name: value.item() for name, value in whole.usage().items()}
    assert used["usage"] > 0.8 and used["perplexity"] > 8 and usage_remark(used) == ""
    assert better < 0.7 * worse


# --- several processes ------------------------------------------------------------------------

SETTINGS = {
    "averages": {"start": "normal", "restart": 0.0},
    "k-means": {"start": "kmeans", "restart": 0.0},
    "restart": {"start": "normal", "restart": 0.5},
}
PROCESS = """
import json, sys
import torch
import torch.distributed as dist
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser

meet, rank, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
apart = {}
for name, given in settings.items():
    torch.manual_seed(0)
    quantiser = VectorQuantiser(QuantiserConfig(codes=16, width=2, decay=0.3, **given)).train()
    torch.manual_seed(10 + rank)
    for _ in range(4):
        quantiser(torch.randn(20, 2))
    apart[name] = 0.0
    for tensor in quantiser.state_dict().values():
        both = [torch.zeros(tensor.shape) for _ in range(2)]
        dist.all_gather(both, tensor.float())
        apart[name] = max(apart[name], (both[0] - both[1]).abs().max().item())
print(json.dumps(apart))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How far the codebooks of two processes are from each other after four steps."""
    meet = tmp_path_factory.mktemp("processes") / "meet"
    root = Path(__file__).resolve().parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(meet), str(rank), json.dumps(SETTINGS)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=60) for process in started]
    assert all(process.returncode == 0 for process in started), out[0][1][-2000:]
    found: dict[str, float] = json.loads(out[0][0])
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("name", SETTINGS)
def test_processes_that_train_together_have_one_codebook(
    name: str, apart: dict[str, float]
) -> None:
    """Each sees vectors and draws of its own; a token must mean the same to all."""
    assert apart[name] < 1e-5


# --- keeping and refusing ---------------------------------------------------------------------


@pytest.mark.parametrize("codebook", ["average", "loss"])
def test_a_state_kept_goes_on_alike(codebook: str) -> None:
    """Codes, averages and whether k-means is done: the next step is the same."""
    one = made(codebook=codebook, start="kmeans", decay=0.7).train()
    for _ in range(3):
        one(torch.randn(20, 3))
    two = made(codebook=codebook, start="kmeans", decay=0.7).train()
    two.load_state_dict(kept(one))
    assert same(kept(one), kept(two)) and two.begun
    batch = torch.randn(20, 3)
    assert torch.equal(one(batch).ids, two(batch).ids)
    assert same(kept(one), kept(two))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codes", 0),
        ("width", 0),
        ("beta", -0.1),
        ("restart", -0.1),
        ("codebook", "averages"),
        ("start", "zeros"),
        ("decay", 1.0),
        ("decay", -0.1),
        ("decay", math.nan),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"quantiser.{name}"):
        QuantiserConfig(**{name: value})
