# %% [markdown]
# # 11 · Transformers for diffusion: the picture as a sentence
#
# **The question.** All denoisers so far are UNets: convolutions, two or three sizes, skips.
# Language models have one plain block, again and again. Does diffusion need anything else?
#
# Peebles and Xie (2022, [arXiv:2212.09748](https://arxiv.org/abs/2212.09748)) say no: the
# **diffusion transformer**, DiT. Files explained here:
# [networks/dit.py](../lineage/diffusion/networks/dit.py), [dit.py](../lineage/diffusion/dit.py),
# [attention.py](../lineage/nn/attention.py).

# %%
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

import lineage
from lineage.course import begin, check, film, show, slider, source, watch
from lineage.data.contract import to_bytes
from lineage.diffusion.networks.dit import Block, DiT, modulate, sincos_pos_emb
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.nn.attention import Attention
from lineage.system import LabelledImage

begin("11_transformers_for_diffusion", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# Cut a picture into squares and read them row by row: a sentence of sixteen words. (DiT cuts the
# latents; one patch of 2 x 2 latents lies over 8 x 8 pixels.)

# %%
system = lineage.load("pretrained:dit")
network, space = system.network, system.space
data = lineage.load_dataset("shapes", split="train", size=32)
image = data[4].image
tiles = rearrange(image, "c (h p) (w q) -> (h w) c p q", p=8, q=8)  # (16, 3, 8, 8)
show([image, *tiles], ["picture", *map(str, range(16))], columns=17, side=44)

# %% [markdown]
# ## By hand: patches
#
# A map of 4 x 4 numbers and patches of 2 x 2: four tokens of four numbers.

# %%
grid = torch.arange(16.0).view(1, 1, 4, 4)
tokens = rearrange(grid, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
print(grid[0, 0], tokens[0], sep="\n")

# %% [markdown]
# A linear layer then makes each token as wide as the transformer. Cutting and the linear layer
# together are one convolution whose stride is its size:

# %%
weight = torch.randn(5, 1, 2, 2)  # to width 5
by_conv = F.conv2d(grid, weight, stride=2).flatten(2).transpose(1, 2)
by_linear = tokens @ weight.flatten(1).T
assert torch.allclose(by_conv, by_linear, atol=1e-5)
print(tuple(by_conv.shape))

# %% [markdown]
# ## By hand: positions
#
# Attention has no input that says where a token stands. **Predict** what it returns if the tokens
# come in another order.

# %%
torch.manual_seed(0)
attention, x = Attention(8, 2), torch.randn(1, 4, 8)
order = torch.tensor([2, 0, 3, 1])
with torch.no_grad():
    print((attention(x[:, order]) - attention(x)[:, order]).abs().max())

# %% [markdown]
# The same results in the other order: up to rounding, nothing. So each place adds a fixed vector of
# sines and cosines, half of it for the column, half for the row. Each row of the figure is one of
# the 16 places:

# %%
table = sincos_pos_emb(128, 4, 4)  # (16, 128)
show([F.interpolate(table[None, None], (128, 128))[0]], ["16 places x 128 numbers"], side=256)

# %% [markdown]
# ## By hand: adaptive layer norm, zero
#
# Time and text form one vector $c$. It does not enter as a token: it sets shift $\beta$, scale
# $\gamma$ and gate $\alpha$ of every block (figure 3 of the paper):
#
# $$x + \alpha \odot f\left(\mathrm{norm}(x) \odot (1 + \gamma) + \beta\right)$$

# %%
x = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])  # one token of width 4
normed = F.layer_norm(x, (4,))
shift, scale = torch.tensor([[0.5, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
print("normed   ", normed)
print("modulated", modulate(normed, shift, scale))
for gate in (0.0, 0.5, 1.0):
    print(f"gate {gate:.1f} ", x + gate * modulate(normed, shift, scale))

# %% [markdown]
# **Zero**: the layer that computes $\alpha, \beta, \gamma$ starts at zero. With $\alpha = 0$ each
# block returns its input; training opens the gates.
#
# ## The real module

# %%
source(DiT.tokens)

# %%
source(Block.forward)

# %%
source(DiT.forward)

# %% [markdown]
# Line by line, on two noised latents. The words of the caption stand before the patches, which is
# this package's addition: the paper has classes.

# %%
text, t = system.text.encode(["a red circle", "two blue squares"]), torch.tensor([300, 700])
z_t = torch.randn(2, *space.shape)
with torch.no_grad():
    c = F.silu(network.condition(t, text))
    patches, words = network.tokens(z_t), network.word_proj(text.words)
    x = torch.cat([words, patches], dim=1)
    parts = network.blocks[0].modulation(c).chunk(6, dim=1)
    out = network(z_t, t, text)
steps = {"z_t": z_t, "c": c, "patches": patches, "words": words, "x": x, "one part": parts[0]}
for name, value in {**steps, "out": out}.items():
    print(f"{name:9}{tuple(value.shape)}")

# %% [markdown]
# A network with random weights: its blocks are the identity, and its result is zero.

# %%
fresh = DiT(network.config, system.text.word_dim, system.text.sentence_dim, space.shape, 8)
text = text.detach()
c = F.silu(fresh.condition(t, text))
print("change by a block:", (fresh.blocks[0](x, c) - x).abs().max().item())
loss = F.mse_loss(fresh(z_t, t, text), torch.randn_like(z_t))
loss.backward()
moves = [n for n, p in fresh.named_parameters() if p.grad is not None and p.grad.any()]
print("parameters with a gradient:", moves)

# %% [markdown]
# In the first step only the last layer learns. Then the gates, then all the rest.
#
# ## Training it live
#
# 600 steps of the transformer from random weights, in the latents of the pretrained run's
# autoencoder. The gates are measured on the way.

# %%
opened = {}


def gates(system, t):
    """Mean size of the two gates of each block at timestep t, (depth, 2)."""
    with torch.no_grad():
        text = system.text.encode(["a red circle"])
        c = F.silu(system.network.condition(torch.tensor([t]), text))
        parts = [torch.stack(b.modulation(c).chunk(6, dim=1)) for b in system.network.blocks]
    return torch.stack([part[[2, 5]].abs().mean((1, 2)) for part in parts])


def with_gates(steps):
    """The same steps; at some, the gates are measured."""
    for step in steps:
        if step.number in (1, 2, 10, 50, 200, 600):
            opened[step.number] = gates(step.system, 500)
        yield step


# %%
captions = ["a red circle", "two blue squares", "a red circle above a blue square"]
trained = {"autoencoder": "pretrained:dit"}
steps = lineage.training_steps("dit", steps=600, stages_from=trained)
watched = watch(with_gates(steps), captions)

# %%
print("step   gate of the attention, then of the MLP, of each block")
for step, gate in opened.items():
    print(f"{step:4}  ", "  ".join(f"{a:.3f} {m:.3f}" for a, m in gate.tolist()))

# %% [markdown]
# The gates open from zero, without a jump, while the pictures appear.
#
# ## The pretrained run beside it
#
# `ldm` has the same kind of autoencoder, the same process and budget; only the network differs.

# %%
unet = lineage.load("pretrained:ldm")
show([*watched.system.generate(captions), *system.generate(captions), *unet.generate(captions)],
     ["600 steps"] * 3 + ["dit"] * 3 + ["ldm"] * 3, columns=3)  # fmt: skip

# %% [markdown]
# A detector judges 40 prompts with places and colours; differences below about 0.15 are chance.


# %%
def operations(function, *inputs):
    """Millions of operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() / 1e6


judge = Judge.load()
prompts = [p for p in make_prompts("easy") if p.split == "test"]
prompts = [p for p in prompts if p.tag in ("position", "color_attr")][::3][:40]
for name, one in {"ldm": unet, "dit": system}.items():
    with torch.no_grad():
        words = one.text.encode([captions[2]])
    pictures = one.generate([p.prompt for p in prompts])
    found = judge.detect(to_bytes(pictures))
    right = [verdict(f, p)["strict"] for f, p in zip(found, prompts, strict=True)]
    parameters = sum(p.numel() for p in one.network.parameters()) / 1e6
    million = operations(one.network, z_t[:1], t[:1], words)
    print(f"{name}   right {sum(right) / len(right):.2f}   {parameters:.2f} M parameters", end=" ")
    print(f"  {million:.0f} M operations")
refused = [number for number, is_right in enumerate(right) if not is_right][:8]
failures, wishes = pictures[refused], [prompts[number].prompt for number in refused]

# %% [markdown]
# The plain transformer needs fewer operations for a step, and nothing in it is made for pictures.
# The paper's point is another one: its quality grows steadily with its operations.
#
# ## Looking inside
#
# Words and patches share one attention. Where do the patches look, block by block?


# %%
def attention_maps(caption, step):
    """The step of a sampling, and the attention (L + N, L + N) of each block."""
    seen = []

    def look(attn, inputs, options):
        q, k = (layer(inputs[0]).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                for layer in (attn.to_q, attn.to_k))  # fmt: skip
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~options["mask"], -torch.inf)
        seen.append(scores.softmax(3).mean(1)[0])

    point = system.trajectory(caption, sampling_steps=10, guidance=1.0)[step]
    hooks = [b.attn.register_forward_pre_hook(look, with_kwargs=True) for b in network.blocks]
    with torch.no_grad():
        network(point.x_t, torch.tensor([point.level.timestep]), system.text.encode([caption]))
    for hook in hooks:
        hook.remove()
    return point, seen


# %%
caption = captions[2]
words = system.text.tokens(caption)
point, maps = attention_maps(caption, step=4)
rows = []
for number, weights in enumerate(maps):
    to_words = weights[-16:, : len(words)]  # (N, L)
    print(f"block {number}: share of the patches' attention on words {to_words.sum(1).mean():.2f}")
    to_words = to_words / to_words.max()
    rows.append([LabelledImage(word, F.interpolate(to_words[:, i].view(1, 1, 4, 4) * 2 - 1,
                 scale_factor=8)[0]) for i, word in enumerate(words)])  # fmt: skip
with torch.no_grad():
    guess = space.decode(point.x0)[0].clamp(-1, 1)
show([[LabelledImage("estimate", guess), *row] for row in rows])

# %% [markdown]
# One row for each block, bright where a patch reads that word, scaled to the block's largest
# weight. Blocks differ in their work: some read words by place, others by object.
#
# Do gates depend on the noise? Both gates of each block at five timesteps:

# %%
for t in (50, 250, 500, 750, 950):
    row = "   ".join(f"{a:.2f} {m:.2f}" for a, m in gates(system, t).tolist())
    print(f"t = {t:3}   {row}")

# %% [markdown]
# **Break it.** The table of positions alone says where a patch lies. **Predict** the pictures if
# rows and columns of the table are exchanged, and if the table is zero.

# %%
right = network.grid_pos_emb.clone()
exchanged = right.view(4, 4, -1).transpose(0, 1).reshape(16, -1)
rows = []
for name, table in {"right": right, "exchanged": exchanged, "zero": 0 * right}.items():
    network.grid_pos_emb.copy_(table)
    drawn = system.generate([caption, "two blue squares"] * 3)
    rows.append([LabelledImage(name, picture) for picture in drawn])
network.grid_pos_emb.copy_(right)
show(rows)

# %% [markdown]
# Exchanged, what was side by side stands one above the other, and the patches no longer fit
# together: their content is not turned. Without the table they agree on nothing.
#
# What does a block add? Multiply the change by the middle block, as its gates do:


# %%
def damped(factor):
    """The picture if the changes by the middle block are multiplied by a factor."""

    def damp(_, inputs, out):
        return inputs[0] + factor * (out - inputs[0])

    hook = network.blocks[len(network.blocks) // 2].register_forward_hook(damp)
    picture = system.generate(caption)[0]
    hook.remove()
    return picture


factors = [i / 4 for i in range(9)]
slider(damped, "factor", factors, still=[0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])

# %% [markdown]
# Without its change an object is lost or torn; with twice the change, colours break.
#
# ## Where it fails, and what came next
#
# Attention compares all tokens with all. Halve the patch, and there are four times as many tokens;
# the number of parameters hardly changes:

# %%
with torch.no_grad():
    text, t = system.text.encode([caption]), torch.tensor([500])
for patch in (4, 2, 1):
    config = replace(network.config, patch_size=patch)
    one = DiT(config, system.text.word_dim, system.text.sentence_dim, space.shape, 8)
    parameters = sum(p.numel() for p in one.parameters()) / 1e6
    million = operations(one, z_t[:1], t, text)
    print(f"patch {patch}   {64 // patch**2:2} tokens   {parameters:.2f} M parameters", end="   ")
    print(f"{million:.0f} M operations")

# %% [markdown]
# In the paper, smaller patches draw better at the same number of parameters: operations count.
#
# Pictures of the 40 prompts that the detector refused, each with the wish that was not met:

# %%
show(failures, wishes)

# %%
film(system, wishes[0])

# %% [markdown]
# Later systems keep this block and give the words weights of their own (Stable Diffusion 3, FLUX),
# and walk along straight lines from noise to picture.
#
# ## Exercises
#
# Axes: B, C channels, N tokens, D width, P patch.
#
# **1. Cut** (2 points). Latents (B, C, H, W) into tokens, row by row. Within a token: row, column,
# channel, in this order, the channel fastest.


# %%
def patchify(z, patch):
    """Tokens (B, N, P P C)."""
    ### BEGIN SOLUTION
    z = z.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, P, w, P)
    return z.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    ### END SOLUTION


# %%
check.patchify(patchify)

# %% [markdown]
# **2. Paste** (1 point). The way back. `height` is the number of patches in a column; the map need
# not be square.


# %%
def unpatchify(tokens, patch, height):
    """Latents (B, C, H, W)."""
    ### BEGIN SOLUTION
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, -1))  # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    ### END SOLUTION


# %%
check.unpatchify(unpatchify)

# %% [markdown]
# **3. Modulate** (1 point). Tokens (B, N, D) with shift and scale (B, D) of each picture.


# %%
def modulate_tokens(x, shift, scale):
    """x (1 + scale) + shift, (B, N, D)."""
    ### BEGIN SOLUTION
    return x * (1 + scale[:, None]) + shift[:, None]
    ### END SOLUTION


# %%
check.modulate_tokens(modulate_tokens)

# %% [markdown]
# **4. Gate** (2 points). Half a block: `f` maps tokens to tokens, `norm` is a layer norm, and
# `modulation` maps $c$ (B, D) to shift, scale and gate, (B, 3 D) in this order.


# %%
def gated_branch(x, c, norm, f, modulation):
    """x + gate f(modulated norm(x)), (B, N, D)."""
    ### BEGIN SOLUTION
    shift, scale, gate = modulation(c)[:, None].chunk(3, dim=2)  # (B, 1, D) each
    return x + gate * f(norm(x) * (1 + scale) + shift)
    ### END SOLUTION


# %%
check.gated_branch(gated_branch)

# %% [markdown]
# **5. Place** (2 points). The table of one axis: the sines of $p\, \omega_k$, then the cosines, for
# positions $p = 0 \dots L-1$ and $\omega_k = 10000^{-k / (D/2)}$, $k = 0 \dots D/2 - 1$.


# %%
def position_table(length, dim):
    """Positions (L, D)."""
    ### BEGIN SOLUTION
    omega = 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(length)[:, None] * omega  # (L, D / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
    ### END SOLUTION


# %%
check.position_table(position_table)
