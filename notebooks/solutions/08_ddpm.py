# %% [markdown]
# # 08 · DDPM: a picture out of noise
#
# **The question.** A GAN learns to draw in one step, and two networks must keep each other in
# balance. Can one network learn to draw with a plain squared error?
#
# Ho, Jain and Abbeel (2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239)) say yes, if it
# draws in many small steps. Files explained here:
# [process.py](../lineage/diffusion/process.py), [model.py](../lineage/diffusion/model.py),
# [ddpm.py](../lineage/diffusion/ddpm.py).

# %%
import torch
import torch.nn.functional as F

import lineage
from lineage.course import begin, check, film, show, slider, source, watch
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Estimate
from lineage.nn.noise import NoiseStreams

begin("08_ddpm", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# Add a little noise to a picture, again and again, until nothing is left. That direction needs no
# learning. Then train a network to go back one step.

# %%
system = lineage.load("pretrained:ddpm")
process = system.process
data = lineage.load_dataset("shapes", split="train", size=32)

picture = data[3].image[None].float() / 127.5 - 1  # (1, 3, 32, 32) in [-1, 1]
torch.manual_seed(0)
eps = torch.randn_like(picture)
steps = [0, 100, 200, 300, 500, 700, 850, 999]
noised = [process.add_noise(picture, eps, torch.tensor([t]))[0] for t in steps]
show(noised, [f"t = {t}" for t in steps])

# %% [markdown]
# ## By hand
#
# One step shrinks the picture and adds Gaussian noise of variance $\beta_t$ (equation 2):
#
# $$x_t = \sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon$$
#
# Four steps are enough to read. Each multiplies the picture by $\sqrt{1-\beta_t}$ and the variance
# of the noise by $1-\beta_t$, and adds $\beta_t$.

# %%
betas = torch.tensor([0.1, 0.2, 0.4, 0.8])
signal, variance = 1.0, 0.0
for t, beta in enumerate(betas.tolist()):
    signal = (1 - beta) ** 0.5 * signal
    variance = (1 - beta) * variance + beta
    print(f"t={t}  signal x {signal:.4f}   noise variance {variance:.4f}")

# %% [markdown]
# No loop is needed. With $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$, equation 4 jumps to any
# $t$ at once:
#
# $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$
#
# Do both agree? (The code counts steps from 0, the paper from 1: `t = 0` already has one step of
# noise. $x_0$ is always the clean picture.)

# %%
alphas_cumprod = torch.cumprod(1 - betas, 0)
print("sqrt(abar)", alphas_cumprod.sqrt())
print("1 - abar  ", 1 - alphas_cumprod)
assert torch.isclose(alphas_cumprod[-1].sqrt(), torch.tensor(signal))
assert torch.isclose(1 - alphas_cumprod[-1], torch.tensor(variance))

# %% [markdown]
# ## The real module
#
# The package calls $\sqrt{\bar\alpha_t}$ `alpha` and $\sqrt{1-\bar\alpha_t}$ `sigma`, since other
# processes have other schedules.

# %%
source(type(process).add_noise)

# %% [markdown]
# Training is algorithm 1: noise a picture to a random level, predict, take the squared error of
# `prediction` and `target`. (`keep` replaces some captions by an empty one, for the next notebook.)

# %%
source(type(system).losses, "x0 = self.space", "process.target")

# %% [markdown]
# The same lines, one after the other, on a batch of four.

# %%
examples = [data[i] for i in range(4)]
captions = [example.captions[0] for example in examples]
x0 = torch.stack([example.image for example in examples]).float() / 127.5 - 1
t = torch.tensor([50, 300, 600, 900])
eps = torch.randn_like(x0)
x_t = process.add_noise(x0, eps, t)
text = system.text.encode(captions)
with torch.no_grad():
    prediction = system.network(x_t, t, text)

for name, value in {"x0": x0, "t": t, "x_t": x_t, "words": text.words}.items():
    print(f"{name:12}{tuple(value.shape)}")
print(f"{'prediction':12}{tuple(prediction.shape)}   of {process.config.prediction}")
print("squared error by t:", F.mse_loss(prediction, x0, reduction="none").mean((1, 2, 3)))

# %% [markdown]
# The target here is $x_0$, not $\epsilon$ as in the paper: both say the same, and on a small budget
# $x_0$ is learned far faster. The error grows with $t$, as less of the picture is left.

# %%
show([*x_t, *prediction], [*[f"x_t, t = {i}" for i in t.tolist()], *captions], columns=4)

# %% [markdown]
# ## Training it live
#
# 600 steps from random weights, about forty seconds. Each row is one caption, always from the same
# noise. **Predict**: which of the three captions will be right last?

# %%
wanted = ["a red circle", "two blue squares", "a green cross left of a yellow triangle"]
watched = watch(lineage.training_steps("ddpm", steps=600), wanted)

# %% [markdown]
# The colour and place of a single object come first, outlines later: the squared error is largest
# where the colour is wrong. Two different objects take longest.

# %% [markdown]
# ## The pretrained run beside it
#
# The same network, trained for longer ([results/pretrained](../results/pretrained)).

# %%
show([*watched.system.generate(wanted), *system.generate(wanted)], columns=3)

# %% [markdown]
# ## Looking inside
#
# Sampling (algorithm 2) starts with pure noise. At each step the network predicts $x_0$. Then
# $x_{t-1}$ is drawn from a normal distribution whose mean lies between that $x_0$ and $x_t$
# (exercise 3). Above: $x_t$. Below: the predicted $x_0$. The label `sigma` is noise over signal,
# $\sqrt{1-\bar\alpha_t} / \sqrt{\bar\alpha_t}$.

# %%
film(system, wanted[2])

# %% [markdown]
# `trajectory` gives every step as tensors. From which $t$ on does the estimate hardly change?

# %%
path = system.trajectory(wanted[2], sampling_steps=20)
final = path[-1].x0
for step in path[::4]:
    error = (step.x0 - final).square().mean().item()
    print(f"t = {step.level.timestep:4.0f}   squared error to the final picture {error:.3f}")

# %% [markdown]
# Move the noise level: the best guess of $x_0$ from one look at $x_t$. With much noise it is a
# blur, the mean of all pictures that are still possible.


# %%
def guess(t):
    """The network's estimate of the first picture, in one step from timestep t."""
    at = torch.tensor([t])
    with torch.no_grad():
        noised = process.add_noise(x0[:1], eps[:1], at)
        return system.network(noised, at, system.text.encode(captions[:1]))[0]


slider(guess, "t", list(range(0, 1000, 50)), still=[0, 200, 400, 600, 800, 950])

# %% [markdown]
# ## Memorising and generalising
#
# For a data set of $N$ pictures, the perfect denoiser is known in closed form. It weighs each
# picture by how well it explains $x_t$, and returns the mean:
#
# $$\hat x_0(x_t) = \sum_i w_i\, x^{(i)}, \qquad
#   w = \mathrm{softmax}_i\left(-\frac{\lVert x_t - \alpha x^{(i)} \rVert^2}{2 \sigma^2}\right)$$

# %%
pictures = torch.stack([data[i].image for i in range(64)]).float() / 127.5 - 1  # (N, 3, 32, 32)


def ideal_x0(x_t, level):
    """Mean of the pictures, weighed by how well they explain x_t."""
    distance = (x_t[:, None] - level.alpha * pictures).flatten(2).square().sum(2)  # (B, N)
    weights = (-distance / (2 * level.sigma**2)).softmax(1)
    return torch.einsum("bn,nchw->bchw", weights, pictures)


levels = [process.level(t) for t in (950, 800, 600, 400)]
x_t = torch.cat([process.add_noise(pictures[:1], eps[:1], level) for level in levels])
best = torch.cat([ideal_x0(x[None], level) for x, level in zip(x_t, levels, strict=True)])
show([*x_t, *best], [f"t = {level.timestep:.0f}" for level in levels] * 2, columns=4)

# %% [markdown]
# Sample with it (`ddim` is a sampler of the next notebook), and only pictures of the data set come
# out: it **memorises**. The network draws others: of the first 2,000 training pictures, the nearest
# usually differs in place, size or shape. It **generalises**.

# %%
noise = NoiseStreams.for_pictures(0, 4, "cpu")
start, schedule = noise.randn(3, 32, 32), process.sampling_schedule(50)
copied = SAMPLERS["ddim"](lambda x, level: Estimate(ideal_x0(x, level)), start, schedule, noise)
learned = system.generate(captions)
training = torch.stack([data[i].image for i in range(2000)]).float() / 127.5 - 1
for name, drawn in {"ideal denoiser": copied, "network": learned}.items():
    distance = torch.cdist(drawn.flatten(1), training.flatten(1)).min(1).values
    print(f"{name:15} distance to the nearest training picture: {distance.mean():.2f}")

# %%
nearest = training[torch.cdist(learned.flatten(1), training.flatten(1)).argmin(1)]
show([*copied, *learned, *nearest], ["copied"] * 4 + ["drawn"] * 4 + ["nearest"] * 4, columns=4)

# %% [markdown]
# ## Where it fails, and what came next
#
# A caption whose pairs of shape and colour the training set does not hold, eight tries.

# %%
hard = "a yellow circle above a green triangle"
show(system.generate([hard] * 8), [hard] + [""] * 7)

# %% [markdown]
# The network confuses which object has which colour, shape or place. 25 steps for one picture (a
# thousand in the paper) are slow, too. The next notebook explains the guidance that these pictures
# already use, and samplers that need ten steps.
#
# ## Exercises
#
# Each has a check in the next cell. Tensors: `x0`, `x_t`, `eps` are (B, 3, S, S), `t` is (B,) of
# whole numbers, `alphas_cumprod` and `betas` are (T,).
#
# **1. Build** (2 points). Equation 4 for a batch in which every picture has its own $t$.


# %%
def q_sample(x0, t, eps, alphas_cumprod):
    """x_t (B, 3, S, S) of equation 4."""
    ### BEGIN SOLUTION
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    ### END SOLUTION


# %%
check.q_sample(q_sample)

# %% [markdown]
# **2. Invert** (1 point). The network predicts $\epsilon$: which $x_0$ does it mean?


# %%
def x0_from_noise(x_t, t, eps, alphas_cumprod):
    """x_0 (B, 3, S, S) that x_t and eps imply."""
    ### BEGIN SOLUTION
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    ### END SOLUTION


# %%
check.x0_from_noise(x0_from_noise)

# %% [markdown]
# **3. Step back** (2 points). The mean of $x_{t-1}$ if $x_t$ and $x_0$ are known, equation 7:
#
# $$\frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0 +
#   \frac{\sqrt{1-\beta_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t$$
#
# Each picture has its own $t$. At $t = 0$ take $\bar\alpha_{-1} = 1$: the mean is then $x_0$.


# %%
def posterior_mean(x0, x_t, t, betas):
    """Mean (B, 3, S, S) of x_(t-1), given x_t and x_0."""
    ### BEGIN SOLUTION
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1), abar[:-1]])  # alphas_cumprod of t - 1
    beta, abar, before = (v[t].view(-1, 1, 1, 1) for v in (betas, abar, before))
    of_x0 = before.sqrt() * beta / (1 - abar)
    of_xt = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return of_x0 * x0 + of_xt * x_t
    ### END SOLUTION


# %%
check.posterior_mean(posterior_mean)

# %% [markdown]
# **4. Memorise** (2 points). The weights of the ideal denoiser, for numbers `alpha` and `sigma` and
# `pictures` (N, 3, S, S).


# %%
def ideal_weights(x_t, alpha, sigma, pictures):
    """Probabilities (B, N) of the pictures, given x_t (B, 3, S, S)."""
    ### BEGIN SOLUTION
    distance = (x_t[:, None] - alpha * pictures[None]).flatten(2).square().sum(2)
    return (-distance / (2 * sigma**2)).softmax(1)
    ### END SOLUTION


# %%
check.ideal_weights(ideal_weights)

# %% [markdown]
# **5. Predict, then measure** (1 point). From which $t$ on is the factor of the noise,
# $\sqrt{1-\bar\alpha_t}$, larger than that of the picture, $\sqrt{\bar\alpha_t}$? Guess from the
# first figure, then compute it.


# %%
def half_noise_step(alphas_cumprod):
    """The first t, an int, at which the noise has the larger factor."""
    ### BEGIN SOLUTION
    return int((1 - alphas_cumprod > alphas_cumprod).nonzero()[0])
    ### END SOLUTION


# %%
check.half_noise_step(half_noise_step)
