"""The quantiser: vectors to the nearest of K code vectors (van den Oord et al. 2017,
arXiv:1711.00937).

The problem: a transformer writes tokens, a picture has none. What is new: an encoder's vectors are
replaced by the nearest entries of a codebook, whose numbers are the tokens; the gradient is copied
past the choice, which has none.

    equations 1, 2    `VectorQuantiser.nearest`: k = argmin_j |z - e_j|
    equation 3        `quantiser_terms`: |sg[z] - e|^2 moves the code, beta |z - sg[e]|^2 the
                      encoder
    straight-through  z + sg[e - z], in `VectorQuantiser.forward`
    appendix A.1      `VectorQuantiser.follow`: codes as moving averages of what they stand for, in
                      place of the first term

A code that nothing is near to is never moved again; with a few of them the codebook has collapsed.
Against that: the codebook may start from the data (k-means), codes that fell out of use are put
where data is (`restart`), and vectors may be compared by direction alone (`cosine`).

Departures: Laplace smoothing of the averages' counts, as all public codes have it. The public code
of VQGAN puts beta on the code's term by mistake; `misplaced_beta` does so too, for its numbers.

Axes: N vectors in any arrangement, D width, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.errors import UserError

EPSILON = 1e-5  # of the smoothed counts
ROUNDS = 10  # of k-means
DEAD = 0.03  # share of 1 / K below which a code is out of use


@dataclass(frozen=True)
class QuantiserConfig:
    """A codebook.

    Attributes:
        codes, width: K and D.
        beta: weight of the term that keeps the encoder near its codes.
        codebook: moved by its `loss`, or the moving `average` of what it stands for.
        decay: of that average.
        start: `normal` numbers, or `kmeans` of the first batch.
        restart: a code with a smaller share of the vectors than this share of 1 / K is put on a
            vector of the batch that is far from its code; 0 leaves it.
        cosine: compare directions, of vectors and codes of length one.
        misplaced_beta: see the header.
    """

    codes: int = 256
    width: int = 16
    beta: float = 0.25
    codebook: str = "average"
    decay: float = 0.99
    start: str = "kmeans"
    restart: float = DEAD
    cosine: bool = False
    misplaced_beta: bool = False

    def __post_init__(self) -> None:
        for name in ("codes", "width"):
            at_least(f"quantiser.{name}", getattr(self, name), 1)
        for name in ("beta", "restart"):
            at_least(f"quantiser.{name}", getattr(self, name), 0)
        one_of("quantiser.codebook", self.codebook, ("average", "loss"))
        one_of("quantiser.start", self.start, ("kmeans", "normal"))
        if not 0 <= self.decay < 1:
            raise UserError(f"quantiser.decay={self.decay} must be from 0 to below 1.")


@dataclass
class Quantised:
    """Vectors as codes.

    Attributes:
        values: (..., D) the codes, through which the gradient flows as if they were the vectors.
        ids: (...) int64, their numbers.
        terms: `commitment`, and `codebook` where a loss moves it.
    """

    values: Tensor
    ids: Tensor
    terms: dict[str, Tensor]


def quantiser_terms(
    z: Tensor, code: Tensor, beta: float, misplaced_beta: bool = False
) -> dict[str, Tensor]:
    """Equation 3 without its reconstruction, each a mean over vectors and entries.

    Args:
        z, code: (..., D) vectors and their codes.
    """
    codebook, commitment = F.mse_loss(code, z.detach()), F.mse_loss(z, code.detach())
    if misplaced_beta:
        return {"codebook": beta * codebook, "commitment": commitment}
    return {"codebook": codebook, "commitment": beta * commitment}


class VectorQuantiser(nn.Module):
    """The codebook and the choice from it."""

    def __init__(self, config: QuantiserConfig) -> None:
        super().__init__()
        self.config = config
        codes = torch.randn(config.codes, config.width) / config.width**0.5
        codes = F.normalize(codes, dim=1) if config.cosine else codes
        self.codes: Tensor
        if config.codebook == "loss":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.zeros(config.codes))  # moving average, a step's
        self.register_buffer("sums", torch.zeros_like(codes))  # of the vectors of each code
        self.register_buffer("begun", torch.tensor(config.start == "normal"))
        self.counts: Tensor
        self.sums: Tensor
        self.begun: Tensor

    def extra_repr(self) -> str:
        return f"codes={self.config.codes}, width={self.config.width}"

    def book(self) -> Tensor:
        """(K, D) the codes as they are compared and given: of length one under `cosine`, whatever
        an optimiser or an average over steps has made of them.
        """
        return F.normalize(self.codes, dim=1) if self.config.cosine else self.codes

    def nearest(self, z: Tensor) -> Tensor:
        """(..., D) -> (...) int64, the number of the nearest code."""
        with torch.autocast(z.device.type, enabled=False):  # distances must be exact
            flat, codes = z.float().reshape(-1, z.shape[-1]), self.book()
            flat = F.normalize(flat, dim=1) if self.config.cosine else flat
            squares = flat.square().sum(1, keepdim=True) - 2 * flat @ codes.T
            return (squares + codes.square().sum(1)).argmin(1).view(z.shape[:-1])

    def values(self, ids: Tensor) -> Tensor:
        """(...) numbers -> (..., D) codes."""
        return F.embedding(ids, self.book())

    def forward(self, z: Tensor) -> Quantised:
        """(..., D) -> codes. In training, a codebook of averages follows; this step's values are
        still those from before.
        """
        config = self.config
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if config.cosine:
                z = F.normalize(z, dim=-1)
            if self.training and not bool(self.begun):
                self.begin(z.detach())
            ids = self.nearest(z.detach())
            code = self.values(ids)
            terms = quantiser_terms(z, code, config.beta, config.misplaced_beta)
            if config.codebook == "average":
                del terms["codebook"]
            if self.training:
                self.follow(z.detach(), ids)
            return Quantised(z + (code - z).detach(), ids, terms)

    # --- the codebook --------------------------------------------------------------

    @torch.no_grad()
    def begin(self, z: Tensor) -> None:
        """k-means of a batch's vectors; codes more than there are vectors stay as they are.

        It starts from vectors that are far from those chosen before (k-means++, Arthur and
        Vassilvitskii 2007): most places of most pictures are background, which needs one code.
        """
        flat = z.reshape(-1, z.shape[-1])
        count = min(len(flat), len(self.codes))
        means = flat[torch.randint(len(flat), (1,), device=flat.device)]
        apart = (flat - means).square().sum(1)
        while len(means) < count:
            means = torch.cat([means, flat[_far(apart, 1)]])
            apart = torch.minimum(apart, (flat - means[-1]).square().sum(1))
        for _ in range(ROUNDS):
            near = torch.cdist(flat, means).argmin(1)
            sizes = torch.bincount(near, minlength=count).clamp(min=1)
            sums = torch.zeros_like(means).index_add_(0, near, flat)
            kept = torch.bincount(near, minlength=count) > 0
            means = torch.where(kept[:, None], sums / sizes[:, None], means)
        means = _of_first_process(means)
        self.codes[:count] = F.normalize(means, dim=1) if self.config.cosine else means
        self.begun.fill_(True)

    @torch.no_grad()
    def follow(self, z: Tensor, ids: Tensor) -> None:
        """Count the codes in use; move them if they are averages; restart those out of use."""
        config, codes = self.config, self.codes
        flat, near = z.reshape(-1, z.shape[-1]), ids.flatten()
        sizes = torch.bincount(near, minlength=len(codes)).to(flat.dtype)
        sums = torch.zeros_like(codes).index_add_(0, near, flat)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for counted in (sizes, sums):
                torch.distributed.all_reduce(counted)
        first = not bool(self.counts.any())
        if first:  # as if the start had always been in use
            self.counts.fill_(sizes.sum() / len(codes))
            self.sums.copy_(codes * self.counts[:, None])
        self.counts.lerp_(sizes, 1 - config.decay)
        self.sums.lerp_(sums, 1 - config.decay)
        if config.codebook == "average":
            total = self.counts.sum()
            smoothed = (self.counts + EPSILON) / (total + len(codes) * EPSILON) * total
            moved = self.sums / smoothed[:, None]
            codes.copy_(F.normalize(moved, dim=1) if config.cosine else moved)
        if config.restart > 0 and not first:
            self._restart(flat, near)

    def _restart(self, flat: Tensor, near: Tensor) -> None:
        """Put codes that fell out of use where vectors are far from the code `near` them."""
        share = self.counts / self.counts.sum().clamp(min=1e-12)
        dead = share < self.config.restart / len(self.codes)
        if not bool(dead.any()):
            return
        apart = (flat - self.book()[near]).square().sum(1)
        chosen = flat[_far(apart, int(dead.sum()))]
        chosen, count = _of_first_process(chosen), self.counts.sum() / len(self.codes)
        self.codes[dead] = chosen.to(self.codes.dtype)
        self.counts[dead], self.sums[dead] = count, chosen * count

    # --- how it fares -----------------------------------------------------------------

    def usage(self) -> dict[str, Tensor]:
        """`code_usage` of the last 1 / (1 - decay) steps."""
        return code_usage(self.counts)


@torch.no_grad()
def code_usage(counts: Tensor) -> dict[str, Tensor]:
    """How a codebook fares, from how often each code was used (K,).

    Returns:
        Scalars: `usage`, the share of codes in use, which stand for at least `DEAD` of what they
        would if all were equally frequent; `dead`, the number of the others; and `perplexity`, how
        many equally frequent codes would say as much.
    """
    share = counts / counts.sum().clamp(min=1e-12)
    used = share > DEAD / len(counts)
    return {
        "usage": used.float().mean(),
        "dead": (~used).float().sum(),
        "perplexity": torch.special.entr(share).sum().exp(),
    }


def _far(apart: Tensor, count: int) -> Tensor:
    """(count,) numbers of vectors, drawn with probabilities that go as their squared distances
    `apart` (N,) from their codes.
    """
    return torch.multinomial(apart + 1e-12, count, replacement=True)


def _of_first_process(tensor: Tensor) -> Tensor:
    """What the first process has, for all that train together: they share one codebook."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor


COLLAPSED = 0.5  # share of codes in use below which a codebook is in trouble


def usage_remark(means: dict[str, float]) -> str:
    """What the means of `usage` over some steps say, in a few words; empty if all is well."""
    if means.get("usage", 1) < COLLAPSED:
        return f"codebook collapse: only {means['usage']:.0%} of the codes are in use"
    return ""
