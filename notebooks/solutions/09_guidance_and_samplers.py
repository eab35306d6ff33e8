# %% [markdown]
# # 09 · Guidance and samplers: more from the same network
#
# **The question.** The network of the last notebook is trained. Can it follow captions more
# closely, draw in ten steps, and change a given picture, all without another step of training?
#
# Yes: it only answers "which picture is in this noise?". What we do with its answers is free.
# Files explained here: [guidance.py](../lineage/diffusion/guidance.py),
# [model.py](../lineage/diffusion/model.py), [samplers](../lineage/diffusion/samplers).

# %%
import inspect
from collections import Counter
from itertools import pairwise

import torch

import lineage
from lineage.course import begin, check, film, show, slider, source, watch
from lineage.data.contract import to_bytes
from lineage.diffusion.guidance import Guidance
from lineage.diffusion.model import keep_outside
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Estimate
from lineage.diffusion.samplers.dpm_solver import multistep
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.nn.noise import NoiseStreams
from lineage.system import LabelledImage

begin("09_guidance_and_samplers", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# Each row starts from the same noise and uses the same weights. Only one number changes: the
# **guidance scale** $s$. At 0 the caption is ignored, at 1 the network is taken as it is.

# %%
system = lineage.load("pretrained:ddpm")
process = system.process
captions = ["a red circle", "two blue squares", "a red circle above a blue square"]
scales = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
drawn = {s: system.generate(captions, guidance=s) for s in scales}
show([[LabelledImage(f"s = {s:g}", drawn[s][i]) for s in scales] for i in range(len(captions))])

# %% [markdown]
# A larger scale pushes harder towards the caption, and at last out of all pictures: edges break and
# colours turn hard.
#
# ## By hand: guidance
#
# Ho and Salimans (2022, [arXiv:2207.12598](https://arxiv.org/abs/2207.12598), equation 6, with
# $s = 1 + w$) need two predictions of the same network, with the caption $c$ and without it:
#
# $$\hat x_0 = \hat x_0(x_t) + s \left(\hat x_0(x_t, c) - \hat x_0(x_t)\right)$$
#
# Four "pictures" of one pixel: two are called blue, two red. The perfect network is their mean,
# weighed by how well each explains $x_t$.

# %%
values = torch.tensor([-2.0, -1.0, 1.0, 2.0])
names = ["blue", "blue", "red", "red"]


def mean_picture(x, sigma, name=None):
    """The perfect estimate of x_0 for a noised pixel x, with or without a caption."""
    known = torch.tensor([name in (None, one) for one in names])
    weights = (-((x - values) ** 2) / (2 * sigma**2)).masked_fill(~known, -torch.inf).softmax(0)
    return (weights * values).sum().item()


for x, sigma in ((0.0, 1.0), (0.5, 1.0), (1.0, 0.3)):
    cond, uncond = mean_picture(x, sigma, "red"), mean_picture(x, sigma)
    guided = [f"{uncond + s * (cond - uncond):6.2f}" for s in (0, 1, 2, 4)]
    print(f"x={x:.1f} sigma={sigma:.1f}   s = 0, 1, 2, 4:", *guided)

# %% [markdown]
# The reddest picture is 2. In heavy noise, guidance asks for more than that: it **extrapolates**.
# In little noise, once the pixel is red, both predictions agree and guidance does nothing.
#
# ## By hand: sampling is a differential equation
#
# Divide by $\alpha_t$: $x_t / \alpha_t = x_0 + \sigma \epsilon$, where $\sigma$ is the
# `karras_sigma`. Karras et al. (2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364)) read
# sampling without new noise as an ordinary differential equation:
#
# $$\frac{dx}{d\sigma} = \frac{x - \hat x_0(x, \sigma)}{\sigma}$$
#
# Euler's method follows it along straight lines. For pixels that are normal with deviation 0.5, all
# is known: $\hat x_0 = x\, s^2 / (s^2 + \sigma^2)$ and $x(\sigma) \propto \sqrt{s^2 + \sigma^2}$.


# %%
def euler_by_hand(x, sigmas, deviation=0.5):
    """Follow the equation from the first sigma to the last."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = x * deviation**2 / (deviation**2 + sigma**2)
        slope = (x - x0) / sigma
        x_next = x + (sigma_next - sigma) * slope
        print(f"sigma {sigma:4.1f}   x {x:6.3f}   x0 {x0:6.3f}   slope {slope:6.3f}")
        x = x_next
    return x


end = euler_by_hand(8.0, [8.0, 4.0, 2.0, 1.0, 0.0])
print(f"end {end:.3f}, exactly {8.0 * 0.5 / (0.5**2 + 8.0**2) ** 0.5:.3f}")

# %% [markdown]
# More steps come closer. How much closer? The package's samplers on the same problem: `euler`, and
# DPM-Solver++(2M) (Lu et al. 2022, [arXiv:2211.01095](https://arxiv.org/abs/2211.01095)), which
# also uses the estimate of the step before.


# %%
def normal_pixels(x, level):
    """The perfect estimate as samplers call it: x is alpha x_0 + sigma eps."""
    sigma = level.karras_sigma
    return Estimate((x / level.alpha) * 0.25 / (0.25 + sigma**2))


noise = NoiseStreams.for_pictures(0, 1, "cpu")
errors = {name: [] for name in ("euler", "dpmpp_2m")}
for name, n in ((name, n) for name in errors for n in (10, 20, 40, 80)):
    schedule = process.sampling_schedule(n, "karras")
    sigma = schedule.levels[0].karras_sigma
    x = torch.full((1, 1, 1, 1), sigma * schedule.levels[0].alpha, dtype=torch.float64)
    exact = sigma * 0.5 / (0.25 + sigma**2) ** 0.5
    errors[name].append(abs(SAMPLERS[name](normal_pixels, x, schedule, noise).item() - exact))
for name, row in errors.items():
    print(f"{name:10}", "  ".join(f"{error:.5f}" for error in row))

# %% [markdown]
# Euler's method has **order 1**: twice the steps, half the error. 2M has order 2: a quarter.
#
# ## The real module
#
# Training drops some captions, so that one network learns both predictions.

# %%
source(type(system).losses, "keep =", "text.where")

# %% [markdown]
# Sampling asks both in one batch of twice the size, then combines.

# %%
source(type(system).denoiser, "if guidance.acts", "prediction = guidance.combine")

# %%
source(Guidance.combine)

# %% [markdown]
# The same lines on two captions.

# %%
text, null = system.text.encode(captions[:2]), system.text.null(2)
both = type(text).cat([text, null])
x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([900, 900])
with torch.no_grad():
    output = system.network(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
cond, uncond = output.chunk(2)
guided = Guidance(scale=3.0).combine(cond, uncond)
for name, value in {"both": both.words, "output": output, "cond": cond, "guided": guided}.items():
    print(f"{name:8}{tuple(value.shape)}")
assert torch.allclose(Guidance(scale=1.0).combine(cond, uncond), cond, atol=1e-6)
print(f"largest value: cond {cond.abs().max():.2f}, guided {guided.abs().max():.2f}")

# %% [markdown]
# Guided values leave $[-1, 1]$; `threshold="clip"` cuts them off. Each step now costs twice.
#
# Two samplers in the coordinates of the process. Ancestral sampling (`ddpm`) adds new noise in each
# step. DDIM (Song et al. 2020, [arXiv:2010.02502](https://arxiv.org/abs/2010.02502), equation 12)
# keeps the noise that it has.

# %%
source(SAMPLERS["ddim"], "for step", "return x")

# %% [markdown]
# And two of the equation: Euler's line, and the step of DPM-Solver++ (`m[0]` is the estimate, `D1`
# how it changes).

# %%
source(inspect.unwrap(SAMPLERS["euler"]), "x0 = denoise", "x = x0")

# %%
source(multistep, "x_coef =", "x = x_coef")

# %% [markdown]
# `euler` is DDIM divided by $\alpha$. One step by both:

# %%
level, next_level = (process.level(t) for t in (700, 500))
x, x0 = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32).clamp(-1, 1)
eps = (x - level.alpha * x0) / level.sigma
by_ddim = next_level.alpha * x0 + next_level.sigma * eps
scaled, sigma, sigma_next = x / level.alpha, level.karras_sigma, next_level.karras_sigma
by_euler = next_level.alpha * (x0 + sigma_next * (scaled - x0) / sigma)
print(f"largest difference {(by_ddim - by_euler).abs().max():.1e}")

# %% [markdown]
# ## Training it live
#
# 500 steps from random weights, about forty seconds; a tenth of the captions is dropped. The
# pictures are drawn with guidance 3.

# %%
watched = watch(lineage.training_steps("ddpm", steps=500), captions, guidance=3.0)

# %% [markdown]
# **Predict** the same network at other scales, then look. Is guidance of more use to this weak
# network than to the pretrained one above?

# %%
scales = [0.0, 1.0, 3.0, 8.0]
drawn = {s: watched.system.generate(captions, guidance=s) for s in scales}
show([[LabelledImage(f"s = {s:g}", drawn[s][i]) for s in scales] for i in range(len(captions))])

# %% [markdown]
# Guidance repairs little here: what the weak network gets roughly right at 1, a larger scale blows
# up. Guidance needs two good predictions.
#
# ## The pretrained run beside it
#
# How much guidance is good? A detector judges 40 prompts with places and colours: right if the
# picture shows exactly the scene. Differences below about 0.15 are chance.

# %%
judge = Judge.load()
prompts = [p for p in make_prompts("easy") if p.split == "test"]
prompts = [p for p in prompts if p.tag in ("position", "color_attr")][::3][:40]


def share_right(**options):
    """Share of the prompts whose picture shows exactly the scene."""
    pictures = system.generate([p.prompt for p in prompts], **options)
    found = judge.detect(to_bytes(pictures))
    return sum(verdict(f, p)["strict"] for f, p in zip(found, prompts, strict=True)) / len(prompts)


for s in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
    print(f"guidance {s:4g}   right {share_right(guidance=s):.2f}")

# %% [markdown]
# Without the caption hardly any picture is right, and too much guidance destroys pictures that
# were right before. What is lost earlier is **variety**. The sizes of 24 red circles, as shares of
# the side:

# %%
for s in (1.0, 2.0, 4.0, 6.0):
    found = judge.detect(to_bytes(system.generate(["a red circle"] * 24, guidance=s)))
    radius = torch.tensor([one.radius for f in found for one in f.objects])
    print(f"guidance {s:g}   radius {radius.mean():.2f}   deviation {radius.std():.3f}")

# %% [markdown]
# The data has small and large circles. Guidance prefers what says "red circle" loudest: the large
# ones.
#
# A **negative prompt** stands in place of no caption, so that guidance moves away from it. Colours
# of 24 pictures of "a circle":

# %%
for negative in ("", "a red circle", "a blue circle"):
    pictures = system.generate(["a circle"] * 24, guidance=3.0, negative=negative)
    colours = Counter(one.colour for f in judge.detect(to_bytes(pictures)) for one in f.objects)
    print(f"negative {negative!r:16}", dict(colours.most_common()))

# %% [markdown]
# Where does a large scale break the picture? Scale 8, only within an **interval** of sigmas:

# %%
intervals = {"everywhere": (), "sigma above 1": (1, 1000), "sigma below 1": (0, 1)}
rows = {n: system.generate(captions, guidance=8.0, interval=i) for n, i in intervals.items()}
show([[LabelledImage(name, image) for image in images] for name, images in rows.items()])

# %% [markdown]
# Here edges break in little noise. There both predictions should agree; what is left of their
# difference is the network's own error, and guidance multiplies it by 8. (Kynkäänniemi et al. 2024,
# [arXiv:2404.07724](https://arxiv.org/abs/2404.07724), found for photographs that heavy noise is a
# harmful end too: there guidance costs variety.)
#
# ## Number of steps against quality
#
# `euler` and `dpmpp_2m` space their steps as Karras et al., `ddpm` and `ddim` evenly in $t$.

# %%
print("steps     ", *(f"{n:6}" for n in (3, 5, 10, 25)))
for name in ("ddpm", "ddim", "euler", "dpmpp_2m"):
    row = [share_right(sampler=name, sampling_steps=n) for n in (3, 5, 10, 25)]
    print(f"{name:10}", *(f"{share:6.2f}" for share in row))

# %% [markdown]
# The first steps buy most, and most differences here are chance. Another view is sharper: without
# new noise, a sampler goes to one fixed picture, and more steps only come closer to it. New noise
# leads to another picture each time.

# %%
counts = [3, 5, 10, 25, 100]
rows = {name: [] for name in ("ddpm", "ddim", "dpmpp_2m")}
for name, row in rows.items():
    row += [system.generate(captions, sampler=name, sampling_steps=n) for n in counts]
    print(f"{name:10}", *(f"{(x - row[-1]).square().mean().sqrt():6.3f}" for x in row[:-1]))
show([
    [LabelledImage(f"{name} {n}", x[2]) for n, x in zip(counts, row, strict=True)]
    for name, row in rows.items()
])  # fmt: skip

# %% [markdown]
# The numbers are distances to the same sampler's picture of 100 steps.
#
# ## Looking inside
#
# What does guidance multiply? Both predictions along one sampling, and their distance.

# %%
path = system.trajectory(captions[2], sampling_steps=25, guidance=1.0)[::4]
asked = {s: system.denoiser(captions[2:], Guidance(scale=s), "clip") for s in (1.0, 0.0)}
with torch.no_grad():
    rows = {s: [ask(step.x_t, step.level).x0[0] for step in path] for s, ask in asked.items()}
for step, cond, uncond in zip(path, *rows.values(), strict=True):
    distance = (cond - uncond).square().mean().sqrt()
    print(f"sigma {step.level.karras_sigma:7.2f}   cond - uncond {distance:.3f}")
labels = [f"sigma {step.level.karras_sigma:.2g}" for step in path]
show([*rows[1.0], *rows[0.0]], labels * 2, columns=len(path))

# %% [markdown]
# Above with the caption, below without. In noise only the caption says what comes. Later $x_t$
# shows it, and both agree: the caption decides early.
#
# Without new noise, the starting noise alone fixes the picture. Move from one noise to another,
# along a circle, as normal noise lies near a sphere.

# %%
first, second = NoiseStreams.for_pictures(5, 2, "cpu").randn(3, 32, 32)
schedule = process.sampling_schedule(10, "karras")


def between(share):
    """The picture of a noise between two noises."""
    angle = torch.tensor(share * torch.pi / 2)
    x = (angle.cos() * first + angle.sin() * second)[None]
    with torch.no_grad():
        denoise = system.denoiser(["two blue squares"], Guidance(2.0), "clip")
        return SAMPLERS["dpmpp_2m"](denoise, x, schedule, noise)[0]


shares = [i / 20 for i in range(21)]
slider(between, "share", shares, still=shares[::3])

# %% [markdown]
# Places move a little, then jump: there are only a few arrangements, and almost nothing lies
# between them.
#
# ## Starting from a picture
#
# **SDEdit** (Meng et al. 2021, [arXiv:2108.01073](https://arxiv.org/abs/2108.01073)): noise a
# picture up to a level in the middle, then denoise it for another caption. `strength` is the share
# of the steps that are taken.

# %%
data = lineage.load_dataset("shapes", split="train", size=32)
image = data[3].image[None].float() / 127.5 - 1


def edited(strength):
    """The first picture, drawn again as a red square."""
    return system.generate("a red square", image=image, strength=strength)[0]


print("from", data[3].captions[0])
slider(edited, "strength", [i / 10 for i in range(1, 11)], still=[0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1])

# %% [markdown]
# An outline changes early; a colour stays until much noise hides it. At strength 1 the first
# picture is forgotten.
#
# **Inpainting by replacement** repaints a masked part. In each step, the estimate outside the mask
# is replaced by the picture.

# %%
source(keep_outside, "def inpaint", "return estimate")

# %%
image = data[4].image[None].float() / 127.5 - 1
mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
mask[..., :16] = True  # the left half
wishes = ["a red circle left of a green square", "a blue cross left of a green square"]
painted = system.generate(wishes * 3, image=image, mask=mask)
assert torch.equal(painted[:, :, :, 16:], image[:, :, :, 16:].expand(6, -1, -1, -1))
show([image[0], *painted], [data[4].captions[0], *wishes * 3], columns=7)

# %% [markdown]
# ## Where it fails, and what came next
#
# Guidance adds no knowledge. Does more of it repair a scene that the network gets wrong?

# %%
hard = "a green cross left of a yellow triangle"
tries = torch.cat([system.generate([hard] * 6, guidance=s) for s in (1.0, 3.0, 8.0)])
show(tries, [f"s = {s}" for s in (1, 3, 8) for _ in range(6)], columns=6)

# %% [markdown]
# Guidance makes colours harder, repairs few scenes and breaks others. And each step still computes
# every pixel, most of them white:

# %%
film(system, hard)

# %% [markdown]
# Fewer steps are one half of speed. The other half is a smaller picture: the next notebook moves
# diffusion into the latents of an autoencoder.
#
# ## Exercises
#
# **1. Drop** (1 point). `words` is (B, L, D), `null` (L, D) stands for "no caption", and `u` (B,)
# is uniform in [0, 1). Drop a caption where `u` is below `prob`.


# %%
def drop_captions(words, null, u, prob):
    """Words (B, L, D), those of dropped captions replaced by null."""
    ### BEGIN SOLUTION
    keep = (u >= prob)[:, None, None]  # (B, 1, 1)
    return torch.where(keep, words, null)
    ### END SOLUTION


# %%
check.drop_captions(drop_captions)

# %% [markdown]
# **2. Guide** (2 points). `network(x, t, text)` takes any batch. Call it **once**; `t` is (B,),
# `text` and `null` are (B, D). With a `negative` text (B, D), that one takes the place of `null`.


# %%
def guided_prediction(network, x_t, t, text, null, scale, negative=None):
    """Prediction (B, 3, S, S) with guidance."""
    ### BEGIN SOLUTION
    away = null if negative is None else negative
    output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, away]))
    cond, uncond = output.chunk(2)
    return uncond + scale * (cond - uncond)
    ### END SOLUTION


# %%
check.guided_prediction(guided_prediction)

# %% [markdown]
# **3. DDIM** (2 points). One step without new noise. Levels have numbers `alpha` and `sigma`.


# %%
def ddim_step(x, x0, level, next_level):
    """x (B, 3, S, S) at the next level, from x at this level and the estimate x0."""
    ### BEGIN SOLUTION
    eps = (x - level.alpha * x0) / level.sigma
    return next_level.alpha * x0 + next_level.sigma * eps
    ### END SOLUTION


# %%
check.ddim_step(ddim_step)

# %% [markdown]
# **4. Extend** (2 points). DPM-Solver++(2M) in $x / \alpha$, with $h = \log(\sigma / \sigma')$ and
# $r = h_\text{before} / h$ (algorithm 2). The step before had the estimate `x0_before` at
# `sigma_before`:
#
# $$D = \left(1 + \tfrac{1}{2r}\right) \hat x_0 - \tfrac{1}{2r} \hat x_0^\text{before}, \qquad
#   x' = \tfrac{\sigma'}{\sigma}\, x + (1 - e^{-h})\, D$$


# %%
def dpmpp_2m_step(x, x0, x0_before, sigma_before, sigma, sigma_next):
    """x (B, 3, S, S) at sigma_next; all sigmas are numbers."""
    ### BEGIN SOLUTION
    h = torch.tensor(sigma / sigma_next).log()
    r = torch.tensor(sigma_before / sigma).log() / h
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    return sigma_next / sigma * x + (1 - torch.exp(-h)) * d
    ### END SOLUTION


# %%
check.dpmpp_2m_step(dpmpp_2m_step)

# %% [markdown]
# **5. Predict, then measure** (1 point). A method of order $p$ has errors of about $C\, n^{-p}$ for
# $n$ steps. Guess $p$ of both rows printed above; then compute it from the first and last number.


# %%
def convergence_order(steps, errors):
    """p, from lists of numbers of steps and their errors."""
    ### BEGIN SOLUTION
    steps, errors = torch.tensor(steps).double(), torch.tensor(errors).double()
    return float((errors[0] / errors[-1]).log() / (steps[-1] / steps[0]).log())
    ### END SOLUTION


# %%
check.convergence_order(convergence_order)
