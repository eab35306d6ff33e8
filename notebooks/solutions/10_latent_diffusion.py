# %% [markdown]
# # 10 · Latent diffusion: noise where the picture is small
#
# **The question.** A diffusion model in pixels computes every pixel in every step, also those of a
# white wall. Can it work on a short description of the picture, and leave the pixels to somebody
# else?
#
# Rombach et al. (2021, [arXiv:2112.10752](https://arxiv.org/abs/2112.10752)) train an autoencoder
# first, then diffuse in its latents; Stable Diffusion is this model. Files explained here:
# [ldm.py](../lineage/diffusion/ldm.py), [autoencoder.py](../lineage/nn/autoencoder.py),
# [spatial_transformer.py](../lineage/diffusion/networks/spatial_transformer.py).

# %%
import inspect

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lineage
from lineage.course import begin, check, film, show, slider, source, watch
from lineage.data.contract import to_bytes
from lineage.diffusion.ldm import DiagonalGaussian, LatentSpace, latent_scale
from lineage.diffusion.networks.spatial_transformer import BasicTransformerBlock
from lineage.diffusion.networks.unet import make_unet
from lineage.evaluation.judge import Judge
from lineage.system import LabelledImage

begin("10_latent_diffusion", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# A picture becomes 8 channels of 8 x 8 latents; one is shown in grey. Noise is added **to the
# latents**. Below: what the decoder makes of them.

# %%
system = lineage.load("pretrained:ldm")
space, process = system.space, system.process
data = lineage.load_dataset("shapes", split="train", size=32)
images = torch.stack([data[i].image for i in range(8)]).float() / 127.5 - 1  # (8, 3, 32, 32)


def grey(channel):
    """One channel (8, 8) as a picture (1, 32, 32)."""
    return F.interpolate(channel[None, None] / 3, scale_factor=4)[0]


torch.manual_seed(0)
with torch.no_grad():
    z0 = space.encode_image(images)  # (8, 8, 8, 8)
    strongest = z0.std((0, 2, 3)).argmax()
    eps = torch.randn_like(z0[:1])
    noised = {t: process.add_noise(z0[4:5], eps, torch.tensor([t])) for t in (0, 300, 600, 900)}
    rows = [[LabelledImage("picture", images[4])], [LabelledImage("", torch.ones(3, 32, 32))]]
    for t, z in noised.items():
        rows[0].append(LabelledImage(f"latents, t = {t}", grey(z[0, strongest])))
        rows[1].append(LabelledImage("decoded", space.decode(z)[0].clamp(-1, 1)))
show(rows)

# %% [markdown]
# 3 x 32 x 32 = 3,072 numbers became 8 x 8 x 8 = 512. The decoder adds the sharp edges.
#
# ## By hand: a little regularisation
#
# The encoder returns a mean $\mu$ and a variance $\sigma^2$ for each latent number; the decoder
# gets $z = \mu + \sigma \epsilon$. A penalty keeps them near a standard normal:
#
# $$\mathrm{KL} = \tfrac{1}{2}\left(\mu^2 + \sigma^2 - 1 - \log \sigma^2\right)$$
#
# KL is defined as the mean of $\log q(z) - \log p(z)$ over $z$ from $q = N(\mu, \sigma^2)$, with
# $p = N(0, 1)$. Does the formula agree?

# %%
normal = torch.distributions.Normal
for mean, std in ((0.0, 1.0), (2.0, 1.0), (0.0, 0.1), (2.0, 0.1)):
    q = DiagonalGaussian(*torch.tensor([[mean], [2 * torch.tensor(std).log()]])[..., None, None])
    z = mean + std * torch.randn(200_000)
    drawn = (normal(mean, std).log_prob(z) - normal(0.0, 1.0).log_prob(z)).mean()
    print(f"mean {mean:.0f} std {std:.1f}   formula {q.kl().item():.3f}   drawn {drawn:.3f} nats")

# %% [markdown]
# A mean far from 0 and a small std cost most. Both let the decoder read the latent exactly; the
# penalty limits how much a latent says.
#
# ## By hand: the scale
#
# The noise schedule expects numbers of standard deviation (std) about 1. Latents have any std. The
# signal-to-noise ratio $\alpha_t^2\, \mathrm{std}^2 / \sigma_t^2$ at three steps:

# %%
for std in (0.2, 1.0, 5.0):
    ratio = [(process.alpha[t] * std / process.sigma[t]).item() ** 2 for t in (100, 500, 900)]
    print(f"std {std:.1f}   t = 100, 500, 900:", "  ".join(f"{r:8.3f}" for r in ratio))

# %% [markdown]
# With std 5 the noise is weak in half the steps, which are then too easy; with std 0.2 the latents
# drown early. So latents are divided by their std (appendix G).
#
# ## The real module
#
# **Stage 1**, the autoencoder. Its step:

# %%
source(type(space.autoencoder).losses, "posterior = ", "}")

# %%
source(DiagonalGaussian, "def from_moments", "return kl")

# %% [markdown]
# **Stage 2** freezes the autoencoder and trains the model of the last two notebooks. Only its
# `Space` is new: it turns pictures into $x_0$ (`encode`) and back (`decode`).

# %%
source(LatentSpace.encode)

# %%
source(inspect.unwrap(latent_scale), "for first", "scale =")

# %% [markdown]
# Both, line by line.

# %%
with torch.no_grad():
    hidden = space.autoencoder.encoder(images)
    moments = space.autoencoder.quant_conv(hidden)
    posterior = DiagonalGaussian.from_moments(moments)
    z = posterior.sample(torch.randn_like(posterior.mean))
    x0 = z * space.scale
    decoded = space.decode(x0)
steps = {"images": images, "hidden": hidden, "moments": moments, "z": z, "x0": x0}
for name, value in {**steps, "decoded": decoded}.items():
    print(f"{name:9}{tuple(value.shape)!s:18} deviation {value.std():.2f}")
print(f"scale {space.scale:.3f}, mean squared error {F.mse_loss(decoded, images):.5f}")

# %% [markdown]
# **Cross-attention** (equation 3) lets every cell of the latents read the words: queries from the
# cells, keys and values from the text.

# %%
source(BasicTransformerBlock.forward)

# %%
caption = "a red circle above a blue square"
text = system.text.encode([caption])
block = system.network.up[0].attentions[-1].transformer_blocks[0]
cells = torch.randn(1, 16, block.norm2.normalized_shape[0])  # a map of 4 x 4 cells
attn, mask = block.cross_attn, text.mask[:, None, None]
for name, value in {
    "cells": cells,
    "words": text.words,
    "query": attn.to_q(cells),
    "key": attn.to_k(text.words),
    "result": attn(cells, text.words, mask),
}.items():
    print(f"{name:8}{tuple(value.shape)}")

# %% [markdown]
# ## Training it live
#
# Both stages from random weights: 200 steps of the autoencoder, then 600 of the denoiser. While
# the first learns, keep what it makes of four pictures.

# %%
reconstructions = [[LabelledImage("picture", image) for image in images[:4]]]


def with_reconstructions(steps):
    """The same steps; at some, the autoencoder's pictures are kept."""
    for step in steps:
        if step.stage == "autoencoder" and step.number in (10, 50, 200):
            with torch.no_grad():
                decoded = step.system.decode(step.system.encode(images[:4]).mean)
            label = f"step {step.number}"
            reconstructions.append([LabelledImage(label, image) for image in decoded])
        yield step


captions = ["a red circle", "two blue squares", caption]
live = {"steps": 800, "settings": {"autoencoder_share": 0.25}}
watched = watch(with_reconstructions(lineage.training_steps("ldm", **live)), captions)

# %%
show(reconstructions)

# %% [markdown]
# A rough autoencoder limits everything after it: the denoiser can only return what the decoder can
# draw.
#
# ## The weight of the KL term
#
# **Predict** for the weights 0, 0.1 and 3: which has the best reconstructions, and which turns
# plain normal noise into something like pictures?


# %%
def train_autoencoder(kl_weight):
    """An autoencoder after 150 steps."""
    settings = {"autoencoder.kl_weight": kl_weight, "autoencoder_share": 0.99}
    for step in lineage.training_steps("ldm", steps=150, settings=settings):
        if step.spent >= 1:
            break
    return step.system.eval()


normal_latents = torch.randn(3, *space.shape)
blank = [LabelledImage("normal noise", torch.ones(3, 32, 32))] * 3
rows = [[LabelledImage("picture", image) for image in images[:3]] + blank]
for weight in (0.0, 0.1, 3.0):
    autoencoder = train_autoencoder(weight)
    with torch.no_grad():
        q = autoencoder.encode(images)
        decoded, noise = autoencoder.decode(q.mean)[:3], autoencoder.decode(normal_latents)
    rows.append([LabelledImage(f"KL weight {weight:g}", one) for one in (*decoded, *noise)])
    error = F.mse_loss(decoded, images[:3])
    print(f"weight {weight:3g}   mean squared error {error:.3f}", end="   ")
    print(f"means' deviation {q.mean.std():.2f}   noise {q.std.mean():.2f}")
show(rows)

# %% [markdown]
# Without KL, latents spread out: good pictures, but noise decodes to nothing known. A large weight
# makes every latent noisy, and the decoder loses colours. Latents need not be normal, since a
# diffusion model can learn any distribution. So the paper's weight is tiny: it only keeps them from
# growing.
#
# ## The pretrained run beside it
#
# The same system after a longer training, and the pixel model of notebook 8 with a like budget.

# %%
pixels = lineage.load("pretrained:ddpm")
show([*watched.system.generate(captions), *system.generate(captions), *pixels.generate(captions)],
     ["800 steps"] * 3 + ["ldm"] * 3 + ["ddpm"] * 3, columns=3)  # fmt: skip

# %% [markdown]
# What does one call of the denoiser cost? Multiplications and additions, counted by PyTorch. The
# third row asks the **same UNet** to work on pixels.


# %%
def operations(function, *inputs):
    """Millions of operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() / 1e6


with torch.no_grad():
    words, t = system.text.encode([caption]), torch.tensor([500])
in_pixels = make_unet(system.config.unet, system.text.word_dim, system.text.sentence_dim)
picture, latent = torch.randn(1, 3, 32, 32), torch.randn(1, *space.shape)
print(f"ldm, one step           {operations(system.network, latent, t, words):7.1f}")
print(f"its decoder, once       {operations(space.decode, latent):7.1f}")
print(f"the same UNet on pixels {operations(in_pixels, picture, t, words):7.1f}")
print(f"ddpm, one step          {operations(pixels.network, picture, t, words):7.1f}")

# %% [markdown]
# The decoder is paid once, the UNet in each of the 25 sampling steps, twice with guidance. (The
# UNet of `ddpm` is half as wide and works on patches of 2 x 2 pixels, so that its step costs about
# as much as one of `ldm`.) At 512 pixels the gap made the method famous.
#
# ## Looking inside
#
# What do latents hold? All eight channels of two pictures, then the picture decoded.

# %%
with torch.no_grad():
    decoded = space.decode(z0).clamp(-1, 1)
rows = [
    [*(LabelledImage(f"channel {c}", grey(z0[i, c])) for c in range(8)),
     LabelledImage("decoded", decoded[i])]
    for i in (3, 4)
]  # fmt: skip
show(rows)

# %% [markdown]
# Every channel is a small, coarse picture. If a cell stands for its 4 x 4 pixels, moving the
# latents by one cell should move the picture by four pixels. (What leaves comes back at the left.)


# %%
def moved(cells):
    """The picture whose latents are shifted to the right."""
    with torch.no_grad():
        return space.decode(torch.roll(z0[3:4], cells, dims=3))[0].clamp(-1, 1)


slider(moved, "cells", list(range(8)), still=[0, 1, 2, 3, 4, 5])

# %% [markdown]
# Halfway between two pictures, in pixels (above) and in latents (below):

# %%
shares = torch.linspace(0, 1, 7)[:, None, None, None]
blended = (1 - shares) * images[3] + shares * images[4]
with torch.no_grad():
    between = space.decode((1 - shares) * z0[3] + shares * z0[4]).clamp(-1, 1)
show([*blended, *between], columns=7)

# %% [markdown]
# In both, one object fades out while the other fades in; none moves. Latents say what is at each
# place, not which objects there are: that is left to the denoiser.
#
# Which cells read which words? The four heads of a block at the coarsest level of the UNet, where
# 8 x 8 latents have become 4 x 4 cells, in the middle of a sampling.


# %%
def attention_maps(caption, step):
    """The step of a sampling, and attention (heads, L, 4, 4) of the cells to each word."""
    seen = []

    def look(attn, inputs):
        x, words, mask = inputs
        q, k = (part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                for part in (attn.to_q(x), attn.to_k(words)))  # fmt: skip
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        seen.append(scores.softmax(3)[0])  # (heads, N, L)

    point = system.trajectory(caption, sampling_steps=10, guidance=1.0)[step]
    hook = block.cross_attn.register_forward_pre_hook(look)
    with torch.no_grad():
        t = torch.tensor([point.level.timestep])
        system.network(point.x_t, t, system.text.encode([caption]))
    hook.remove()
    return point, seen[0].transpose(1, 2).unflatten(2, (4, 4))


# %%
tokens = system.text.tokens(caption)
point, maps = attention_maps(caption, step=4)
with torch.no_grad():
    guess = space.decode(point.x0)[0].clamp(-1, 1)
rows = []
for head in F.interpolate(2 * maps - 1, scale_factor=8):  # (L, 32, 32)
    row = [LabelledImage(token, one[None]) for token, one in zip(tokens, head, strict=True)]
    rows.append([LabelledImage("estimate", guess), *row])
show(rows)

# %% [markdown]
# White is attention 1. Some heads read a colour where its object is. Others leave their weight on a
# word that says little, such as "a": the softmax must put it somewhere. (The text encoder is a
# causal transformer, so a later word also holds the earlier ones.)
#
# ## Where it fails, and what came next
#
# The autoencoder is a ceiling. A detector names the objects of 200 pictures before and after
# encoding, without any diffusion:

# %%
judge = Judge.load()
real = torch.stack([data[i].image for i in range(200)]).float() / 127.5 - 1
with torch.no_grad():
    coded = system.reconstruct(real)
before, after = (judge.detect(to_bytes(x)) for x in (real, coded))
same = sum(sorted(str(a).split(", ")) == sorted(str(b).split(", "))
           for a, b in zip(before, after, strict=True))  # fmt: skip
print(f"the same objects in {same} of 200 pictures")
error = (coded - real).square().mean((1, 2, 3))
worst = error.argsort(descending=True)[:6]
show([*real[worst], *coded[worst]], ["picture"] * 6 + ["decoded"] * 6, columns=6)

# %% [markdown]
# On such flat pictures nearly every object survives; edges turn soft and the ground gets speckles.
# Small faces and letters of the first Stable Diffusion failed here. The other fault is an old one.
# Training never shows a green triangle or a yellow circle; asked for both, the system often gives
# each the colour of the other, for those it knows:

# %%
hard = "a green triangle and a yellow circle"
show(system.generate([hard] * 8), [hard] + [""] * 7)

# %%
film(system, hard)

# %% [markdown]
# The denoiser is still a UNet, made for pixels. Latents are so few that a plain transformer can
# take them as words: the next notebook.
#
# ## Exercises
#
# `mean`, `log_variance` and `eps` are (B, C, H, W).
#
# **1. Sample** (1 point). Latents $z = \mu + \sigma \epsilon$, so that a gradient reaches `mean`
# and `log_variance`, which is $\log \sigma^2$.


# %%
def sample_posterior(mean, log_variance, eps):
    """z (B, C, H, W)."""
    ### BEGIN SOLUTION
    return mean + (0.5 * log_variance).exp() * eps
    ### END SOLUTION


# %%
check.sample_posterior(sample_posterior)

# %% [markdown]
# **2. Regularise** (2 points). The KL divergence to $N(0, 1)$ of each picture, in nats: a sum over
# its numbers.


# %%
def kl_to_standard_normal(mean, log_variance):
    """KL divergence (B,)."""
    ### BEGIN SOLUTION
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return kl.sum((1, 2, 3))
    ### END SOLUTION


# %%
check.kl_to_standard_normal(kl_to_standard_normal)

# %% [markdown]
# **3. Scale** (1 point). The one factor that gives latents (B, C, H, W) the deviation 1 over all
# their numbers.


# %%
def scale_of_latents(z):
    """The factor, a scalar tensor."""
    ### BEGIN SOLUTION
    return 1 / z.std(correction=0)
    ### END SOLUTION


# %%
check.scale_of_latents(scale_of_latents)

# %% [markdown]
# **4. Attend** (2 points). Cross-attention with one head: $\mathrm{softmax}(Q K^T / \sqrt{D})\, V$,
# the softmax over the words. $Q$ is `to_q(cells)`, $K$ and $V$ are `to_k(words)` and `to_v(words)`,
# all of width D. `cells` (B, N, D), `words` (B, L, Dw); `mask` (B, L) is False on padding, which
# gets weight 0.


# %%
def cross_attention(cells, words, mask, to_q, to_k, to_v):
    """For each cell a mixture of the words' values, (B, N, D)."""
    ### BEGIN SOLUTION
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (B, N, L)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(2) @ v
    ### END SOLUTION


# %%
check.cross_attention(cross_attention)

# %% [markdown]
# **5. Predict** (1 point). Self-attention over $N$ cells makes $N^2$ comparisons. Predict for
# `size=512` and `factor=8`, then write the function: how many times more are made with each pixel
# as a cell than with cells of `factor` x `factor` pixels?


# %%
def attention_saving(size, factor):
    """Comparisons in size x size pixels, divided by those in the latents."""
    ### BEGIN SOLUTION
    return (size**2) ** 2 / ((size // factor) ** 2) ** 2
    ### END SOLUTION


# %%
check.attention_saving(attention_saving)
