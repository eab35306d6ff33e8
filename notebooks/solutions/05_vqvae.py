# %% [markdown]
# # 05 · VQ-VAE: a picture as a list of symbols
#
# **The question.** A language model writes a sentence symbol by symbol. A picture has no symbols.
# Can a network learn an alphabet for pictures?
#
# Van den Oord, Vinyals and Kavukcuoglu (2017, [arXiv:1711.00937](https://arxiv.org/abs/1711.00937))
# learn one with a codebook between encoder and decoder. Files explained here:
# [quantise.py](../lineage/vqvae/quantise.py), [vqvae.py](../lineage/vqvae/vqvae.py),
# [codec.py](../lineage/vqvae/codec.py).

# %%
import torch
import torch.nn.functional as F
from IPython.display import display

import lineage
from lineage.course import begin, check, film, show, slider, source
from lineage.system import LabelledImage
from lineage.vqvae.quantise import VectorQuantiser, quantiser_terms
from lineage.vqvae.vqvae import VQVAE

begin("05_vqvae", minutes=1.5)

# %% [markdown]
# ## The idea in one figure
#
# Above: pictures. Middle: their codes, an 8 x 8 grid in which each colour stands for one of 32
# symbols. Below: what the decoder draws from the symbols alone.

# %%
system = lineage.load("pretrained:vqvae")
codec = system.codec.requires_grad_(False)
held = lineage.load_dataset("shapes", split="validation", size=32)
pictures = torch.stack([held[i].image for i in range(256)]).float() / 127.5 - 1

torch.manual_seed(5)
palette = torch.rand(codec.num_codes, 3) * 2 - 1  # a colour for each symbol
ids = codec.encode(pictures[:8])  # (8, 8, 8)
palette[ids.flatten().mode().values] = 0.9  # the most frequent one: background
maps = palette[ids].movedim(3, 1)
show([*pictures[:8], *maps, *codec.decode(ids)])

# %%
print(ids[0])
print(f"pixels: {pictures[0].numel() * 8} bits   codes: {ids[0].numel() * 5} bits (32 = 2^5)")

# %% [markdown]
# ## By hand
#
# The encoder gives a vector $z_e$ for each cell of the grid. The nearest of the $K$ code vectors
# $e_j$ takes its place (equations 1 and 2):
#
# $$k = \operatorname{argmin}_j \lVert z_e - e_j \rVert^2, \qquad z_q = e_k$$

# %%
codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # K = 3 codes, D = 2
z_e = torch.tensor([[0.9, 0.2], [0.1, 0.1], [0.3, 1.4], [0.8, -0.1]], requires_grad=True)
for vector in z_e.detach():
    distances = [float((vector - code).square().sum()) for code in codebook]
    print(vector, "distances", [f"{d:.2f}" for d in distances])

# %% [markdown]
# All vectors at once, with one matrix product. Do both agree?
#
# $$\lVert z - e \rVert^2 = \lVert z \rVert^2 - 2\, z \cdot e + \lVert e \rVert^2$$

# %%
distances = z_e.square().sum(1, keepdim=True) - 2 * z_e @ codebook.T + codebook.square().sum(1)
assert torch.allclose(distances, (z_e[:, None] - codebook).square().sum(2), atol=1e-6)
nearest = distances.argmin(1)
z_q = codebook[nearest]
print("codes", nearest)

# %% [markdown]
# `argmin` has no gradient: a small move of $z_e$ leaves the code as it is. The **straight-through**
# trick copies the gradient of $z_q$ to $z_e$. With $\mathrm{sg}$ for `detach`:
#
# $$z = z_e + \mathrm{sg}[z_q - z_e]$$

# %%
copied = z_e + (z_q - z_e).detach()
loss = (copied - 1).square().sum()  # some loss of the decoder
(gradient,) = torch.autograd.grad(loss, z_e)
print("value is z_q:          ", torch.allclose(copied, z_q))
print("gradient is z_q's own: ", torch.equal(gradient, 2 * (z_q - 1)))

# %% [markdown]
# Now the decoder trains the encoder, but nothing trains the codes, and nothing keeps $z_e$ near
# them. Equation 3 adds two terms:
#
# $$L = -\ln p(x \mid z_q) + \lVert \mathrm{sg}[z_e] - e \rVert^2
#   + \beta \lVert z_e - \mathrm{sg}[e] \rVert^2$$
#
# The second moves the codes to the vectors, the third (the **commitment**) the vectors to their
# codes. Without $\beta$ both have the same value; the gradient differs. The first is the loss of
# the decoder: for pixels that are normal around its output, the squared error, up to constants.
#
# Appendix A.1 moves the codes without a loss: each code is a moving average of its vectors, with
# $N$ for their number and $m$ for their sum.

# %%
mine = z_e.detach()[nearest == 1]  # the two vectors of code 1
size, total = 2.0, 2.0 * codebook[1]
for step in range(5):
    size = 0.5 * size + 0.5 * len(mine)
    total = 0.5 * total + 0.5 * mine.sum(0)
    print(f"step {step}: code 1 = {total / size}   mean of its vectors = {mine.mean(0)}")

# %% [markdown]
# ## The real module
#
# One step of training, then the nearest code, the straight-through line, the two terms of
# equation 3 and the moving averages, in whose place the codebook term is left out. (`a.lerp_(b, w)`
# is $(1-w)a + wb$, in place; `cosine` and `misplaced_beta` are variants, off here.)

# %%
source(VQVAE.losses, "quantised =", "nll =")

# %%
source(VectorQuantiser.nearest, "flat, codebook", "return")

# %%
source(VectorQuantiser.forward, "ids = self.nearest", "return Quantised")

# %%
source(quantiser_terms, "codebook, commitment", "beta * commitment")

# %%
source(VectorQuantiser, "self.cluster_size.lerp_", "means =")

# %% [markdown]
# `smoothed` is $N$ plus a small constant, so that no code is divided by zero. The same lines, one
# after the other:

# %%
quantiser = codec.quantiser
z_e = codec.encoder(pictures[:4]).movedim(1, 3)  # (B, D, H, W) -> (B, H, W, D)
ids = quantiser.nearest(z_e)
z_q = quantiser.lookup(ids)
decoded = codec.decoder(z_q.movedim(3, 1))
values = {"pictures": pictures[:4], "z_e": z_e, "codebook": quantiser.codebook}
values |= {"ids": ids, "z_q": z_q, "decoded": decoded}
for name, value in values.items():
    print(f"{name:10}{tuple(value.shape)}")
print({name: f"{float(term):.4f}" for name, term in quantiser_terms(z_e, z_q, 0.25).items()})
print("squared error of the pixels:", F.mse_loss(decoded, pictures[:4]))

# %% [markdown]
# ## Training it live
#
# A thousand steps of the codec, about twenty seconds. The first column is the truth. **Predict**:
# what comes first, places, colours or outlines?


# %%
def train_codec(looks, **settings):
    """Train a codec; returns it, and the number of codes in use at each look."""
    rows = [[LabelledImage("", one)] for one in pictures[:5]]
    in_use, place = {}, display("", display_id=True)
    settings = {"codec_share": 0.5} | {name.replace("__", "."): v for name, v in settings.items()}
    for step in lineage.training_steps("vqvae", steps=2 * looks[-1], settings=settings):
        if step.stage == "prior":  # another model, which is trained after the codec
            break
        if step.number in looks:
            with step.trainer.averaged() as model, torch.no_grad():
                ids = model.encode(pictures)
                decoded = model.decode(ids[:5])
            for row, one in zip(rows, decoded, strict=True):
                row.append(LabelledImage(f"step {step.number}" if row is rows[-1] else "", one))
            in_use[step.number] = len(ids.unique())
            place.update(show(rows, side=64))
    return step.system.codec, in_use


new_codec, in_use = train_codec([1, 30, 100, 200, 300, 450, 700, 1000])

# %%
for step, number in in_use.items():
    print(f"step {step:4}: {number:2} of {new_codec.num_codes} codes in use {'#' * number}")

# %% [markdown]
# Places come first, then colours, then outlines. The codebook starts from the **k-means** clusters
# (cluster centres) of the first batch. The encoder changes quickly, its vectors move away, and few
# codes remain in use. Then each unused code is moved onto a vector that no code is near
# (`_restart_unused`), and colours appear.
#
# ## The pretrained run beside it
#
# The truth, the codec from above, and one that was trained for longer
# ([results/pretrained](../results/pretrained)).


# %%
def reconstruct(model, images):
    """Pictures by way of their codes."""
    with torch.no_grad():
        return model.decode(model.encode(images))


for name, model in {"1,000 steps": new_codec, "pretrained": codec}.items():
    mse = F.mse_loss(reconstruct(model, pictures), pictures)
    print(f"{name:12} squared error {mse:.4f}")
rows = [pictures[:8], reconstruct(new_codec, pictures[:8]), reconstruct(codec, pictures[:8])]
show(torch.cat(rows))

# %% [markdown]
# ## Looking inside
#
# What does each symbol mean? A grid of one code alone, the most frequent first, with its share of
# all cells.

# %%
shares = codec.encode(pictures).flatten().bincount(minlength=codec.num_codes) / (256 * 64)
order = shares.argsort(descending=True)
alone = codec.decode(order[:, None, None].expand(-1, 8, 8))
show(alone, [f"{k}: {shares[k]:.1%}" for k in order.tolist()], side=64)

# %% [markdown]
# Background takes the largest share. Some codes are plain colours. Others give little alone, since
# they stand at edges, beside other codes. A code is no
# patch: the decoder's convolutions join it with its neighbours. Put each code in turn into four
# cells of an empty picture:

# %%
ids = codec.encode(pictures[3:4])  # (1, 8, 8)
background = order[0]


def put(code):
    """An empty picture with a code in its four central cells."""
    grid = torch.full((1, 8, 8), int(background))
    grid[:, 3:5, 3:5] = order[code]
    return codec.decode(grid)[0]


slider(put, "rank", list(range(codec.num_codes)), still=list(range(8, 32, 3)))

# %%
other = ids.clone()
other[0, 4, 4] = order[5] if ids[0, 4, 4] != order[5] else order[6]
changed = (codec.decode(other) - codec.decode(ids))[0].abs().sum(0) > 0.05  # (32, 32)
height, width = changed.any(1).sum(), changed.any(0).sum()
print(f"one cell holds 4 x 4 pixels; its code changes {height} x {width} pixels")

# %% [markdown]
# Symbols can be edited like text. Move every symbol two cells to the right (what leaves comes back
# at the left), or join the upper half of one grid with the lower half of another. Objects that are
# cut come out broken:

# %%
ids = codec.encode(pictures[:6])
moved = ids.roll(2, dims=2)
joined = torch.cat([ids[:, :4], ids.roll(1, dims=0)[:, 4:]], dim=1)
show(torch.cat([codec.decode(grid) for grid in (ids, moved, joined)]), columns=6)

# %% [markdown]
# **Break it.** The recipe `collapse` has 256 codes, which start from random numbers, move by their
# loss, and are never restarted.

# %%
_, in_use = train_codec([1, 100, 400], recipe="collapse")
print({step: f"{number} of 256 codes" for step, number in in_use.items()})

# %% [markdown]
# Most codes are nearest to no vector, get no gradient and stay where they are: the **codebook
# collapse**. A few come into use when vectors move near them. Pictures can still be right, but most
# of the codebook is wasted.
#
# ## A prior over the symbols, in short
#
# The codec alone invents nothing. A second network learns which symbols follow each other, and
# which follow a caption: $p(k_1 \dots k_{64}) = \prod_i p(k_i \mid k_{<i}, \text{caption})$. The
# paper takes a PixelCNN, the package a transformer: notebook 06 explains it.

# %%
film(system, "a green cross left of a yellow triangle")

# %%
batch = held.batch(range(128), [0] * 128, seed=0)
with torch.no_grad():
    nats = system.stage_scores(batch)["nats_per_code"].mean()
bits = 64 * nats / torch.tensor(2.0).log()
print(f"codes of a picture: {64 * 5} bits if all are equally likely, {bits:.0f} under the prior")

# %% [markdown]
# ## Where it fails, and what came next
#
# Captions of combinations that the training set does not hold: the prior changes the colour or the
# shape, or mixes two colours in one object.

# %%
unseen = lineage.load_dataset("shapes", split="heldout", size=32)
captions = [unseen[i].captions[0] for i in range(8)]
show(system.generate(captions), captions)

# %% [markdown]
# The prior pays for each symbol, so fewer symbols would be welcome. Take cells of 8 x 8 pixels: 16
# symbols in place of 64.

# %%
_, _ = train_codec([200, 700], codec__num_downsamples=3)

# %% [markdown]
# Colours and outlines blur: the squared error prefers the mean of all pictures that a symbol can
# stand for. VQGAN
# (Esser et al. 2020, [arXiv:2012.09841](https://arxiv.org/abs/2012.09841)) compares features of a
# network and adds a discriminator ([vqgan.py](../lineage/vqvae/vqgan.py)). The pretrained run of
# it, drawing unseen captions with the same prior:

# %%
vqgan = lineage.load("pretrained:vqgan")
show(vqgan.generate(captions), captions)

# %% [markdown]
# Its codec takes longer to train: three networks in place of one.
#
# ## Exercises
#
# Each has a check in the next cell. Tensors: `z_e` and `z_q` are (N, D), `codebook` is (K, D),
# `ids` is (N,) of whole numbers.
#
# **1. Build** (1 point). Equation 1: the nearest code.


# %%
def nearest_code(z_e, codebook):
    """Index (N,) of the code that is nearest to each vector."""
    ### BEGIN SOLUTION
    distances = (z_e[:, None] - codebook).square().sum(2)  # (N, K)
    return distances.argmin(1)
    ### END SOLUTION


# %%
check.nearest_code(nearest_code)

# %% [markdown]
# **2. Copy the gradient** (1 point). A tensor with the value of `z_q`. In the backward pass its
# gradient goes to `z_e` unchanged; `z_q` gets none.


# %%
def straight_through(z_e, z_q):
    """A tensor (N, D): the value of z_q, the gradient to z_e only."""
    ### BEGIN SOLUTION
    return z_e + (z_q - z_e).detach()
    ### END SOLUTION


# %%
check.straight_through(straight_through)

# %% [markdown]
# **3. Pull both ways** (2 points). The second and third term of equation 3, as means over all
# numbers. One moves `z_q`, the other `z_e`.


# %%
def codebook_loss(z_e, z_q, beta):
    """Codebook loss plus beta times the commitment loss, a scalar."""
    ### BEGIN SOLUTION
    codebook = F.mse_loss(z_q, z_e.detach())
    commitment = F.mse_loss(z_e, z_q.detach())
    return codebook + beta * commitment
    ### END SOLUTION


# %%
check.codebook_loss(codebook_loss)

# %% [markdown]
# **4. Extend: no loss for the codes** (2 points). Appendix A.1, without smoothing:
# $N \leftarrow \text{decay} \cdot N + (1 - \text{decay})\, n$ and
# $m \leftarrow \text{decay} \cdot m + (1 - \text{decay})\, s$. Here $n$ (K,) counts the vectors of
# each code in this batch, and $s$ (K, D) is their sum. `size` and `total` are the old $N$ and $m$:
# leave them as they are. Return $m / N$; no $N$ is 0.


# %%
def ema_codes(z_e, ids, size, total, decay):
    """The new codes (K, D)."""
    ### BEGIN SOLUTION
    one_hot = F.one_hot(ids, len(size)).to(z_e.dtype)  # (N, K)
    size = decay * size + (1 - decay) * one_hot.sum(0)
    total = decay * total + (1 - decay) * one_hot.T @ z_e
    return total / size[:, None]
    ### END SOLUTION


# %%
check.ema_codes(ema_codes)

# %% [markdown]
# **5. Predict, then measure** (1 point). One code fills almost half of all cells. How many equally
# frequent codes would carry as much? The perplexity $\exp(-\sum_k p_k \ln p_k)$ says it; $p_k$ is
# the share of cells with code $k$, and unused codes add nothing. Guess, then compute
# `code_perplexity(codec.encode(pictures).flatten(), 32)`.


# %%
def code_perplexity(ids, num_codes):
    """Perplexity of the codes' frequencies, a scalar."""
    ### BEGIN SOLUTION
    shares = ids.bincount(minlength=num_codes) / len(ids)
    return torch.special.entr(shares).sum().exp()
    ### END SOLUTION


# %%
check.code_perplexity(code_perplexity)
