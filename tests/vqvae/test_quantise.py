"""The quantiser: nearest codes, gradients, moving averages by hand, k-means and restarts."""

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
    codebook_usage,
    diagnose_usage,
    quantiser_terms,
)


def make_quantiser(codes: Tensor | None = None, **changes: Any) -> VectorQuantiser:
    """A quantiser with the codes `codes` (K, D), or random ones, and without restarts."""
    fields = {"num_codes": 7, "code_dim": 3, "init": "normal", "restart_threshold": 0.0} | changes
    if codes is not None:
        fields["num_codes"], fields["code_dim"] = codes.shape
    quantiser = VectorQuantiser(QuantiserConfig(**fields))
    if codes is not None:
        quantiser.embedding.data.copy_(codes)
    return quantiser


def state_of(quantiser: VectorQuantiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantiser.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- nearest codes ----------------------------------------------------------------------------


def test_nearest_by_loops() -> None:
    quantiser, z_e = make_quantiser(), torch.randn(5, 4, 3)
    ids = quantiser.nearest(z_e)
    assert ids.shape == (5, 4) and ids.dtype == torch.int64
    for row in range(5):
        for column in range(4):
            vector = z_e[row, column]
            distances = [float((vector - code).square().sum()) for code in quantiser.codebook]
            assert ids[row, column] == distances.index(min(distances))
    assert len(ids.unique()) > 3


@pytest.mark.parametrize("update", ["ema", "loss"])
@pytest.mark.parametrize("train", [False, True])
def test_z_q_holds_the_codes_from_before_the_step(update: str, train: bool) -> None:
    quantiser, z_e = make_quantiser(update=update).train(train), torch.randn(6, 3)
    codes = quantiser.embedding.detach().clone()
    quantised = quantiser(z_e)
    torch.testing.assert_close(quantised.z_q, codes[quantised.ids])
    assert torch.equal(quantised.ids, torch.cdist(z_e, codes).argmin(1))
    vectors = quantiser.lookup(quantised.ids[:, None])
    assert vectors.shape == (6, 1, 3)
    assert torch.equal(vectors[:, 0], quantiser.embedding[quantised.ids])


@pytest.mark.parametrize("shape", [(24, 3), (4, 6, 3), (2, 3, 4, 3)], ids=str)
def test_any_arrangement_of_the_vectors_gives_the_same(shape: tuple[int, ...]) -> None:
    """Codes, vectors, terms, and the codebook after the step."""
    z_e, codes = torch.randn(24, 3), torch.randn(7, 3)
    flat_quantiser, quantiser = make_quantiser(codes).train(), make_quantiser(codes).train()
    flat, quantised = flat_quantiser(z_e), quantiser(z_e.view(shape))
    assert quantised.ids.shape == shape[:-1] and quantised.z_q.shape == shape
    assert torch.equal(quantised.ids.flatten(), flat.ids)
    assert torch.equal(quantised.z_q.view(24, 3), flat.z_q)
    assert quantised.terms["commitment"].item() == pytest.approx(flat.terms["commitment"].item())
    assert equal(state_of(flat_quantiser), state_of(quantiser))


def test_autocast_does_not_change_the_codes() -> None:
    """Far from the origin, products in bfloat16 would confuse codes."""
    quantiser = make_quantiser(30 + torch.randn(7, 3)).eval()
    z_e = 30 + torch.randn(200, 3)
    exact, codes = quantiser(z_e), quantiser.codebook
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z_e @ codes.T).dtype == torch.bfloat16
        rounded = (codes.square().sum(1) - 2 * z_e @ codes.T).argmin(1)
        quantised = quantiser(z_e)
    assert torch.equal(quantised.ids, exact.ids) and not torch.equal(rounded, exact.ids)
    assert quantised.z_q.dtype == torch.float32 and torch.equal(quantised.z_q, exact.z_q)
    assert torch.equal(quantised.terms["commitment"], exact.terms["commitment"])


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_the_gradient_of_z_q_is_copied_to_z_e(update: str) -> None:
    quantiser, z_e = make_quantiser(update=update), torch.randn(2, 4, 3, requires_grad=True)
    direction = torch.randn(2, 4, 3)
    (quantiser(z_e).z_q * direction).sum().backward()
    assert z_e.grad is not None and torch.equal(z_e.grad, direction)
    assert quantiser.embedding.grad is None or not quantiser.embedding.grad.any()


@pytest.mark.parametrize("misplaced", [False, True])
def test_each_term_has_a_gradient_in_codes_or_vectors(misplaced: bool) -> None:
    """The codebook loss in the codes, the commitment loss in the vectors, as means of squares; beta
    is the weight of the latter, or, misplaced, of the former."""
    quantiser = make_quantiser(update="loss", beta=0.3, misplaced_beta=misplaced)
    z_e = torch.randn(8, 3, requires_grad=True)
    quantised = quantiser(z_e)
    codes, difference = quantiser.embedding, (quantiser.embedding[quantised.ids] - z_e).detach()
    weights = {"codebook": 0.3 if misplaced else 1.0, "commitment": 1.0 if misplaced else 0.3}
    for name, weight in weights.items():
        term = quantised.terms[name]
        assert term.item() == pytest.approx(weight * difference.square().mean().item())
        gradients = torch.autograd.grad(term, [z_e, codes], allow_unused=True)
        gradient, other = gradients if name == "commitment" else reversed(gradients)
        assert other is None or not other.any()
        expected = -difference
        if name == "codebook":
            expected = torch.zeros_like(codes)
            for number, row in zip(quantised.ids.tolist(), difference, strict=True):
                expected[number] += row
        torch.testing.assert_close(gradient, weight * 2 / 24 * expected)


def test_terms_by_hand() -> None:
    z_e, z_q = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])  # a mean of 1 and 4
    terms = {n: t.item() for n, t in quantiser_terms(z_e, z_q, 0.2).items()}
    assert terms == pytest.approx({"codebook": 2.5, "commitment": 0.5})
    terms = {n: t.item() for n, t in quantiser_terms(z_e, z_q, 0.2, misplaced_beta=True).items()}
    assert terms == pytest.approx({"codebook": 0.5, "commitment": 2.5})


def test_a_codebook_of_averages_has_no_loss_and_no_parameters() -> None:
    assert set(make_quantiser(update="ema")(torch.randn(4, 3)).terms) == {"commitment"}
    assert not list(make_quantiser(update="ema").parameters())
    trained = make_quantiser(update="loss")
    assert set(trained(torch.randn(4, 3)).terms) == {"codebook", "commitment"}
    assert [name for name, _ in trained.named_parameters()] == ["embedding"]


# --- moving averages --------------------------------------------------------------------------


def test_two_steps_of_the_averages_by_hand() -> None:
    """Sizes start as if all codes had been used equally often, and are smoothed for the division:
    (n + eps) / (total + K eps) total."""
    decay, codes = 0.6, [0.0, 10.0, -50.0]
    quantiser = make_quantiser(torch.tensor(codes)[:, None], ema_decay=decay).train()
    batches = [[1.0, -1.5, 9.0, 2.0], [8.0, 12.0, 13.0, 3.0, 0.5]]
    sizes = [4 / 3] * 3
    sums = [code * 4 / 3 for code in codes]
    for batch in batches:
        nearest = [min(range(3), key=lambda k, v=v: abs(v - codes[k])) for v in batch]
        assert quantiser(torch.tensor(batch)[:, None]).ids.tolist() == nearest
        for k in range(3):
            cluster = [v for v, number in zip(batch, nearest, strict=True) if number == k]
            sizes[k] = decay * sizes[k] + (1 - decay) * len(cluster)
            sums[k] = decay * sums[k] + (1 - decay) * sum(cluster)
        total = sum(sizes)
        smoothed = [(n + 1e-5) / (total + 3e-5) * total for n in sizes]
        codes = [s / n for s, n in zip(sums, smoothed, strict=True)]
        assert quantiser.cluster_size.tolist() == pytest.approx(sizes, rel=1e-5)
        assert quantiser.cluster_sum.flatten().tolist() == pytest.approx(sums, rel=1e-5)
        assert quantiser.embedding.flatten().tolist() == pytest.approx(codes, rel=1e-5)
    assert codes[2] == pytest.approx(-50, rel=1e-3)  # unused, so unchanged


def test_averages_converge_to_the_means_of_their_clusters() -> None:
    centres = torch.tensor([[4.0, 0.0], [-4.0, 1.0]])
    quantiser = make_quantiser(centres + torch.randn(2, 2), ema_decay=0.8).train()
    batch = centres.repeat(50, 1) + 0.3 * torch.randn(100, 2)
    for _ in range(60):
        quantiser(batch)
    means = torch.stack([batch[k::2].mean(0) for k in (0, 1)])
    torch.testing.assert_close(quantiser.embedding.data, means, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["normal", "kmeans"])
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_evaluation_changes_nothing(update: str, init: str) -> None:
    """Neither codes nor sizes, and k-means waits for the first batch of training."""
    quantiser = make_quantiser(update=update, init=init, restart_threshold=0.5).eval()
    before = state_of(quantiser)
    for _ in range(3):
        quantiser(torch.randn(9, 3))
    assert equal(before, state_of(quantiser))
    quantiser.train()(torch.randn(9, 3))
    assert not equal(before, state_of(quantiser))


def test_statistics_of_a_codebook_that_its_loss_moves() -> None:
    """Its codes stay; sizes start at an even share, so that no code is out of use too early."""
    quantiser = make_quantiser(update="loss").train()
    before = state_of(quantiser)
    quantised = quantiser(torch.randn(9, 3))
    assert torch.equal(quantiser.embedding, before["embedding"])
    sizes = torch.bincount(quantised.ids, minlength=7)
    torch.testing.assert_close(quantiser.cluster_size, 0.99 * 9 / 7 + 0.01 * sizes)


# --- k-means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_two_clusters(seed: int) -> None:
    """Whatever centres it starts from."""
    torch.manual_seed(seed)
    quantiser = make_quantiser(num_codes=2, init="kmeans")
    centres = torch.tensor([[9.0, 0, 0], [-9.0, 5, 0]])
    batch = torch.cat([centres[0] + torch.randn(30, 3), centres[1] + torch.randn(20, 3)])
    quantiser.kmeans_init(batch)
    means = torch.stack([batch[:30].mean(0), batch[30:].mean(0)])
    order = quantiser.embedding[:, 0].argsort(descending=True)
    torch.testing.assert_close(quantiser.embedding.data[order], means)


def test_kmeans_puts_codes_into_every_cluster() -> None:
    """And none outside: each is a mean of neighbouring vectors."""
    centres = 20 * torch.eye(4)
    batch = centres.repeat(25, 1) + 0.5 * torch.randn(100, 4)
    quantiser = make_quantiser(num_codes=16, code_dim=4, init="kmeans", update="loss").train()
    quantised = quantiser(batch)
    distances = torch.cdist(quantiser.embedding.data, centres).min(1)
    radius = torch.cdist(batch, centres).min(1).values.max()
    assert distances.values.max() <= radius + 1e-5
    assert set(distances.indices.tolist()) == {0, 1, 2, 3}
    assert quantised.terms["commitment"] < 0.25 * 0.5**2  # closer than the centres are


def test_kmeans_runs_once() -> None:
    quantiser = make_quantiser(init="kmeans", update="loss").train()
    assert not quantiser.initialised
    quantiser(torch.randn(40, 3))
    codes = quantiser.embedding.detach().clone()
    quantiser(50 + torch.randn(40, 3))
    assert quantiser.initialised and torch.equal(quantiser.embedding, codes)


def test_kmeans_of_fewer_vectors_than_codes() -> None:
    """Each vector gets a code of its own; the other codes keep their values."""
    quantiser = make_quantiser(init="kmeans", update="loss").train()
    before, batch = quantiser.embedding.detach().clone(), 5 + torch.randn(4, 3)
    quantised = quantiser(batch)
    assert torch.equal(quantiser.embedding[4:], before[4:])
    assert sorted(quantised.ids.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(quantised.z_q, batch)


# --- restart ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_restart_moves_unused_codes_to_vectors_of_the_batch(update: str, cosine: bool) -> None:
    """Of two codes, the one just below the threshold moves and the one just above it does not; the
    codes in use are updated as without restarts.

    With a total of 100 and 4 codes, a threshold of 0.03 is a size of 0.75.
    """
    codes = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, -1.0]])
    codes = F.normalize(codes, dim=1)
    batch = F.normalize(torch.rand(100, 3) * torch.tensor([1.0, 1.0, 0.2]), dim=1)
    sizes = torch.tensor([60.0, 38.5, 0.78, 0.72]) / 0.99
    states = []
    for threshold in (0.03, 0.0):
        quantiser = make_quantiser(
            codes, update=update, restart_threshold=threshold, cosine=cosine
        ).train()
        quantiser.cluster_size.copy_(sizes)
        quantiser.cluster_sum.copy_(codes * sizes[:, None])
        assert quantiser(batch).ids.max() == 1
        states.append(state_of(quantiser))
    on, off = states
    assert torch.cdist(on["embedding"][3:], batch).min() < 1e-6
    torch.testing.assert_close(off["embedding"][2:], codes[2:], rtol=0, atol=1e-3)
    for name in ("embedding", "cluster_size", "cluster_sum"):
        assert torch.equal(on[name][:3], off[name][:3])
    assert on["cluster_size"][3].item() == pytest.approx(off["cluster_size"].sum().item() / 4)
    expected = on["embedding"][3] * on["cluster_size"][3]
    torch.testing.assert_close(on["cluster_sum"][3], expected)


def test_without_restart_an_unused_code_is_never_moved() -> None:
    quantiser = make_quantiser(torch.tensor([[0.0], [1000.0]]), ema_decay=0.5).train()
    for _ in range(8):
        quantiser(torch.randn(20, 1))
    assert quantiser.embedding[1].item() == pytest.approx(1000, rel=1e-2)
    assert quantiser.cluster_size[1] < 0.1


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_no_code_is_restarted_in_the_first_step(update: str) -> None:
    """There are no sizes yet."""
    codes = torch.tensor([[0.0], [1000.0]])
    quantiser = make_quantiser(codes, ema_decay=0.5, restart_threshold=0.9, update=update).train()
    quantiser(torch.randn(20, 1))
    assert quantiser.embedding[1].item() == pytest.approx(1000, rel=1e-3)
    quantiser(torch.randn(20, 1))
    assert quantiser.embedding[1].abs() < 10


def test_a_restarted_code_is_not_restarted_at_once() -> None:
    """It gets the size of an average code."""
    codes = torch.tensor([[0.0], [1000.0]])
    quantiser = make_quantiser(codes, ema_decay=0.9, restart_threshold=0.03).train()
    quantiser.cluster_size.copy_(torch.tensor([20.0, 0.0]))
    quantiser(torch.randn(20, 1))
    assert (quantiser.cluster_size > 8).all()


# --- cosine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["normal", "kmeans"])
def test_cosine_codes_keep_length_one(init: str) -> None:
    quantiser = make_quantiser(cosine=True, init=init, ema_decay=0.5, restart_threshold=0.3).train()
    for step in range(12):
        quantised = quantiser(5 * torch.randn(20, 3))
        lengths = quantiser.embedding.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(7), msg=f"step {step}")
        torch.testing.assert_close(quantised.z_q.norm(dim=1), torch.ones(20))


def test_cosine_chooses_the_most_similar_direction() -> None:
    quantiser, z_e = make_quantiser(cosine=True).eval(), torch.randn(50, 3)
    similarity = F.cosine_similarity(z_e[:, None], quantiser.embedding[None], dim=2)
    assert torch.equal(quantiser(z_e).ids, similarity.argmax(1))


def test_cosine_ignores_the_lengths_of_the_vectors() -> None:
    """In codes, terms and averages."""
    z_e, scale = torch.randn(30, 3), torch.rand(30, 1) * 9 + 0.1
    codes = F.normalize(torch.randn(7, 3), dim=1)
    quantisers = [make_quantiser(codes, cosine=True).train() for _ in range(2)]
    a, b = quantisers[0](z_e), quantisers[1](z_e * scale)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.z_q, b.z_q)
    torch.testing.assert_close(a.terms["commitment"], b.terms["commitment"])
    torch.testing.assert_close(quantisers[0].state_dict(), quantisers[1].state_dict())
    plain = make_quantiser(codes).train()
    assert not torch.equal(plain(z_e).ids, plain(z_e * scale).ids)


# --- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "usage", "perplexity"),
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
def test_usage_by_hand(sizes: list[float], usage: float, perplexity: float | None) -> None:
    metrics = codebook_usage(torch.tensor(sizes))
    if perplexity is None:
        shares = [n / sum(sizes) for n in sizes]
        perplexity = math.exp(-sum(s * math.log(s) for s in shares))
    assert all(value.shape == () for value in metrics.values())
    assert metrics["codebook_usage"].item() == usage
    assert metrics["unused_codes"].item() == 4 * (1 - usage)
    assert metrics["perplexity"].item() == pytest.approx(perplexity)


def test_diagnosis_names_a_collapse_alone() -> None:
    assert diagnose_usage({}) == "" and diagnose_usage({"codebook_usage": COLLAPSED}) == ""
    assert diagnose_usage({"codebook_usage": 0.9, "perplexity": 1.0}) == ""
    diagnosis = diagnose_usage({"codebook_usage": 0.124})
    assert diagnosis == "codebook collapse: only 12% of the codes are in use"


def train_autoencoder(restart_threshold: float, update: str) -> tuple[VectorQuantiser, float]:
    """Autoencode points of a plane with a codebook that starts far from them."""
    torch.manual_seed(3)
    quantiser = make_quantiser(
        num_codes=16,
        code_dim=2,
        update=update,
        ema_decay=0.9,
        restart_threshold=restart_threshold,
    ).train()
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(encoder.bias, 6.0)
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantiser.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(150):
        points = torch.rand(128, 2) * 2 - 1
        quantised = quantiser(encoder(points))
        loss = F.mse_loss(decoder(quantised.z_q), points)
        optimizer.zero_grad()
        (loss + torch.stack(list(quantised.terms.values())).sum()).backward()
        optimizer.step()
    return quantiser, loss.item()


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_a_codebook_collapses_without_restarts_and_not_with_them(update: str) -> None:
    def metrics_of(quantiser: VectorQuantiser) -> dict[str, float]:
        metrics = codebook_usage(quantiser.cluster_size)
        return {name: value.item() for name, value in metrics.items()}

    quantiser, collapsed_loss = train_autoencoder(0.0, update)
    metrics = metrics_of(quantiser)
    assert metrics["codebook_usage"] < 0.4 and metrics["perplexity"] < 6
    assert "collapse" in diagnose_usage(metrics)
    quantiser, loss = train_autoencoder(0.03, update)
    metrics = metrics_of(quantiser)
    assert metrics["codebook_usage"] > 0.8 and metrics["perplexity"] > 8
    assert diagnose_usage(metrics) == ""
    assert loss < 0.7 * collapsed_loss


# --- several processes ------------------------------------------------------------------------

SETTINGS = {
    "averages": {"init": "normal", "restart_threshold": 0.0},
    "k-means": {"init": "kmeans", "restart_threshold": 0.0},
    "restart": {"init": "normal", "restart_threshold": 0.5},
}
PROCESS = """
import json, sys
import torch
import torch.distributed as dist
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser

meet, rank, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
differences = {}
for name, fields in settings.items():
    torch.manual_seed(0)
    config = QuantiserConfig(num_codes=16, code_dim=2, ema_decay=0.3, **fields)
    quantiser = VectorQuantiser(config).train()
    torch.manual_seed(10 + rank)
    for _ in range(4):
        quantiser(torch.randn(20, 2))
    differences[name] = 0.0
    for tensor in quantiser.state_dict().values():
        both = [torch.zeros(tensor.shape) for _ in range(2)]
        dist.all_gather(both, tensor.float())
        differences[name] = max(differences[name], (both[0] - both[1]).abs().max().item())
print(json.dumps(differences))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Largest difference of the codebooks of two processes after four steps."""
    meet = tmp_path_factory.mktemp("processes") / "meet"
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(meet), str(rank), json.dumps(SETTINGS)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1][-2000:]
    values: dict[str, float] = json.loads(outputs[0][0])
    return values


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("name", SETTINGS)
def test_processes_that_train_together_have_one_codebook(
    name: str, differences: dict[str, float]
) -> None:
    """Although their vectors and random numbers differ."""
    assert differences[name] < 1e-5


# --- states and configurations ----------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_a_loaded_state_continues_alike(update: str) -> None:
    """Codes, averages and whether k-means is done."""
    first = make_quantiser(update=update, init="kmeans", ema_decay=0.7).train()
    for _ in range(3):
        first(torch.randn(20, 3))
    second = make_quantiser(update=update, init="kmeans", ema_decay=0.7).train()
    second.load_state_dict(state_of(first))
    assert equal(state_of(first), state_of(second)) and second.initialised
    batch = torch.randn(20, 3)
    assert torch.equal(first(batch).ids, second(batch).ids)
    assert equal(state_of(first), state_of(second))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_codes", 0),
        ("code_dim", 0),
        ("beta", -0.1),
        ("restart_threshold", -0.1),
        ("update", "averages"),
        ("init", "zeros"),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("ema_decay", math.nan),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        QuantiserConfig(**{name: value})
