"""The decoder-only transformer: who sees whom, the cache, GPT-2's sizes, weights and numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.official.vqvae import gpt2_state
from lineage.vqvae.transformer import (
    GPT,
    Cache,
    Transformer,
    TransformerConfig,
    next_token_loss,
)

TOKENS, PLACES = 13, 12
CONFIG = TransformerConfig(width=12, layers=2, heads=3)


def gpt(config: TransformerConfig = CONFIG, tied: bool = True) -> GPT:
    """Weights large enough that a place which should not be seen would show."""
    model = GPT(config, TOKENS, PLACES, tied).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(TOKENS, (rows, length))


def cache_of(model: GPT, rows: int, length: int) -> Cache:
    return Cache(model.transformer.config, rows, length, model.head.weight)


# --- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 3, 2], [3, 1, 5], [1, 8]], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("room", [9, 12])
def test_cached_logits_are_those_without(chunks: list[int], rows: int, room: int) -> None:
    """Token by token and in chunks, also with room left over."""
    model, ids = gpt(), tokens(rows)
    cache, logits, first = cache_of(model, rows, room), [], 0
    for chunk in chunks:
        logits.append(model(ids[:, first : first + chunk], cache))
        first += chunk
        assert cache.used == first
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-4, atol=1e-5)


def test_a_cache_too_short_does_not_pass_unseen() -> None:
    model, ids = gpt(), tokens()
    cache = cache_of(model, 3, 5)
    model(ids[:, :5], cache)
    with pytest.raises((UserError, RuntimeError, IndexError)):
        model(ids[:, 5:6], cache)


@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [7, 2]], ids=str)
@pytest.mark.parametrize("opened", [4, 6])
def test_the_cache_knows_open_places(chunks: list[int], opened: int) -> None:
    """They stand in the first chunk, as a caption before its picture does."""
    model, ids = gpt(), tokens()
    cache, logits, first = cache_of(model, 3, 9), [], 0
    for chunk in chunks:
        logits.append(model(ids[:, first : first + chunk], cache, open_places=opened))
        first += chunk
    expected = model(ids, open_places=opened)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_greedy_tokens_by_hand() -> None:
    """The likeliest token of the whole sequence so far, with the cache and without."""
    model, ids = gpt(), tokens(4, 3)
    expected = ids
    while expected.shape[1] < PLACES:
        likeliest = [int(model(row[None])[0, -1].argmax()) for row in expected]
        expected = torch.cat([expected, torch.tensor(likeliest)[:, None]], dim=1)
    for cached in (True, False):
        assert torch.equal(model.greedy(ids, PLACES, cached), expected)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_greedy_gives_the_length_asked_for(cached: bool, more: int) -> None:
    model, ids = gpt(), tokens(2, 4)
    found = model.greedy(ids, 4 + more, cached)
    assert found.shape == (2, 4 + more) and torch.equal(found[:, :4], ids)


# --- who sees whom ----------------------------------------------------------------------------


def sees(model: GPT, opened: int, length: int = 7) -> list[list[bool]]:
    """[place][token]: whether another token there changes the logits here."""
    ids = tokens(1, length)
    before = model(ids, open_places=opened)
    found = []
    for place in range(length):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % TOKENS
        found.append((model(other, open_places=opened) != before).any(-1)[0])
    return torch.stack(found, dim=1).tolist()


@pytest.mark.parametrize("opened", [0, 1, 2, 4, 7, 9])
def test_each_place_sees_itself_and_before_and_open_places_each_other(opened: int) -> None:
    expected = [[j <= i or max(i, j) < opened for j in range(7)] for i in range(7)]
    assert sees(gpt(), opened) == expected


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_changes_nothing(cached: bool) -> None:
    """Rows of several lengths in one batch, places counted from their first real token: the logits
    of each alone. Also when they go on from a cache."""
    model, lengths, longest = gpt(), [9, 6, 1], 9
    rows = [tokens(1, length) for length in lengths]
    ids = torch.cat([torch.cat([tokens(1, longest - r.shape[1]), r], dim=1) for r in rows])
    pads = longest - torch.tensor(lengths)[:, None]
    count = torch.arange(longest)[None] - pads
    mask, place = count >= 0, count.clamp(min=0)
    if cached:
        cache = cache_of(model, 3, longest)
        logits = torch.cat(
            [
                model(ids[:, a:b], cache, mask=mask[:, :b], place=place[:, a:b])
                for a, b in ((0, 5), (5, 8), (8, 9))
            ],
            dim=1,
        )
    else:
        logits = model(ids, mask=mask, place=place)
    for number, row in enumerate(rows):
        alone = model(row)[0]
        torch.testing.assert_close(logits[number, -len(alone) :], alone, rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()
    assert not torch.allclose(model(ids)[1, -1], logits[1, -1], atol=1e-3)


def test_places_are_those_given() -> None:
    model, ids = gpt(), tokens(2, 4)
    place = torch.tensor([[0, 1, 2, 3], [5, 2, 2, 0]])
    expected = model.tok_emb.weight[ids] + model.pos_emb.weight[place]
    assert torch.equal(model.embed(ids, place), expected)
    assert torch.equal(model.embed(ids), model.embed(ids, torch.arange(4).expand(2, 4)))
    assert torch.equal(model.embed(ids, first=3), model.embed(ids, torch.arange(3, 7).expand(2, 4)))


def test_states_end_in_what_comes_out() -> None:
    """The first is what goes in, one for each block, and the last is normed."""
    network, x = gpt().transformer, torch.randn(2, 5, 12)
    states = network.states(x, open_places=2)
    assert len(states) == CONFIG.layers + 1 and torch.equal(states[0], x)
    assert torch.equal(states[-1], network(x, open_places=2))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    causal[:2, :2] = True
    torch.testing.assert_close(states[1], network.blocks[0](x, causal))
    torch.testing.assert_close(states[2], network.ln_f(network.blocks[1](states[1], causal)))


# --- layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "exact"])
def test_each_gelu_by_hand(kind: str) -> None:
    """x Phi(x), or its approximation by a tanh; they differ by less than a thousandth."""
    block = Transformer(TransformerConfig(4, 1, 1, kind)).blocks[0]
    x = torch.linspace(-3, 3, 25)
    gauss = [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x.tolist()]
    tanh = [
        v * (1 + math.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3))) / 2 for v in x.tolist()
    ]
    found = block.mlp[1](x).tolist()
    mine, other = (tanh, gauss) if kind == "tanh" else (gauss, tanh)
    assert found == pytest.approx(mine, abs=1e-6)
    assert found != pytest.approx(other, abs=1e-5) and found == pytest.approx(other, abs=1e-3)


def test_dropout_is_for_learning_alone() -> None:
    network = Transformer(TransformerConfig(12, 2, 3, dropout=0.5))
    x = torch.randn(1, 4, 12)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


# --- sizes and weights ------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_gpt2_small_has_as_many_parameters() -> None:
    """The head counted once, with the table that it is."""
    with torch.device("meta"):
        model = GPT(TransformerConfig(768, 12, 12), 50257, 1024)
    assert count(model) == 124_439_808


def test_tamings_transformer_has_as_many_parameters() -> None:
    """Of VQGAN's DRIN, with a head of its own."""
    with torch.device("meta"):
        model = GPT(TransformerConfig(1024, 24, 16, "exact"), 1024, 512, tied=False)
    assert count(model) == 304_932_864


def test_a_tied_head_is_the_table() -> None:
    tied, apart = gpt(), gpt(tied=False)
    assert tied.head.weight is tied.tok_emb.weight
    assert apart.head.weight is not apart.tok_emb.weight
    assert count(apart) == count(tied) + TOKENS * 12
    ids, reloaded = torch.full((1, 4), 2), gpt()
    before = tied(ids)
    tied.tok_emb.weight.data[0] += 1  # a token that is not read
    assert torch.equal(tied(ids)[..., 1:], before[..., 1:])
    assert (tied(ids)[..., 0] != before[..., 0]).all()
    reloaded.load_state_dict(tied.state_dict())
    assert reloaded.head.weight is reloaded.tok_emb.weight
    assert torch.equal(reloaded(ids), tied(ids))


@pytest.mark.parametrize("layers", [1, 4])
def test_initial_weights_are_gpt2s(layers: int) -> None:
    """N(0, 0.02), the last layers of the branches smaller by the root of twice the blocks; norms
    and biases at one and zero."""
    model = GPT(TransformerConfig(64, layers, 2), 200, 200, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            value = float(".ln" in name and name.endswith("weight"))
            assert (parameter == value).all(), name
            continue
        last = name.endswith(("attn.proj.weight", "mlp.2.weight"))
        std = 0.02 / (2 * layers) ** 0.5 if last else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.06), name
        assert parameter.mean().item() == pytest.approx(0, abs=1e-3), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 0}, "transformer.width"),
        ({"layers": 0}, "transformer.layers"),
        ({"heads": 0}, "transformer.heads"),
        ({"width": 10, "heads": 4}, "width=10 cannot be shared by 4 heads"),
        ({"gelu": "relu"}, "transformer.gelu"),
        ({"dropout": 1.0}, "transformer.dropout"),
        ({"dropout": -0.1}, "transformer.dropout"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TransformerConfig(**changes)


# --- learning ---------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """Each logit is held against the next token; the last has none, the first token no logit."""
    logits, ids = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    total = 0.0
    for row in range(2):
        for place in range(3):
            scores = [math.exp(v) for v in logits[row, place].tolist()]
            total -= math.log(scores[int(ids[row, place + 1])] / sum(scores))
    assert next_token_loss(logits, ids).item() == pytest.approx(total / 6, rel=1e-5)


def test_a_small_one_learns_eight_sequences_by_heart() -> None:
    """From the first token, which no two share, it writes the rest."""
    ids = torch.cat([torch.arange(8)[:, None], torch.randint(8, (8, 7))], dim=1)
    model = GPT(TransformerConfig(32, 2, 4), 8, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = next_token_loss(model(ids), ids).item()
    assert first == pytest.approx(math.log(8), rel=0.02)
    for _ in range(80):
        loss = next_token_loss(model(ids), ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    assert torch.equal(model.greedy(ids[:, :1], 8), ids)


# --- the original -----------------------------------------------------------------------------


def test_transformers_gpt2_is_ours() -> None:
    """Logits, hidden states, loss, left padding and greedy tokens of random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=TOKENS,
        n_positions=PLACES,
        n_embd=12,
        n_layer=2,
        n_head=3,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    ours = GPT(CONFIG, TOKENS, PLACES).eval().requires_grad_(False)
    ours.load_state_dict(gpt2_state(theirs.state_dict()))
    ids = tokens()
    found = theirs(ids, labels=ids, output_hidden_states=True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours(ids), found.logits, **close)
    assert next_token_loss(ours(ids), ids).item() == pytest.approx(found.loss.item(), rel=1e-5)
    states = ours.transformer.states(ours.embed(ids))
    for mine, state in zip(states, found.hidden_states, strict=True):
        torch.testing.assert_close(mine, state, **close)
    mask = torch.arange(9)[None] >= torch.tensor([0, 2, 5])[:, None]
    place = (mask.cumsum(1) - 1).clamp(min=0)
    padded = theirs(ids, attention_mask=mask.long(), position_ids=place).logits
    mine = ours(ids, mask=mask, place=place)
    torch.testing.assert_close(mine[mask], padded[mask], **close)
    written = theirs.generate(ids[:, :4], max_length=PLACES, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.greedy(ids[:, :4], PLACES), written)
