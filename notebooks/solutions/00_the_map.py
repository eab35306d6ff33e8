# %% [markdown]
# # 00 · The map: from words to pictures
#
# **The question.** How did machines learn to draw what a sentence says, and which idea came from
# where?
#
# This notebook shows the whole journey. The others walk it, one system at a time. Files explained
# here: [catalog.py](../lineage/catalog.py), [system.py](../lineage/system.py).

# %%
from collections import Counter
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown

import lineage
from lineage.catalog import CATALOG, FAMILIES, Row, drawing, working
from lineage.course import begin, check, show, slider, source
from lineage.pretrained import pretrained, run_folder
from lineage.system import LabelledImage, System
from lineage.training.cost import read_cost

begin("00_the_map", minutes=1)

# %% [markdown]
# ## The idea in one figure
#
# A lane for each family, a column for each year. Coloured systems work in this package. Grey ones
# are planned.

# %%
HUES = ("#8a6552", "#c8453b", "#cf7f0c", "#7a5195", "#23805f", "#2c6fbb")
COLOURS = dict(zip(FAMILIES, HUES, strict=True))


def name_plate(ax, x, y, row):
    """The title of a system in a box: coloured if it works, grey if it is planned."""
    face, ink = (COLOURS[row.family], "white") if row.works else ("#ebebeb", "#6f6f6f")
    title = fill(row.title, 12, break_on_hyphens=False)
    box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": "white"}
    ax.text(x, y, title, color=ink, size=9, ha="center", va="center", linespacing=1.0, bbox=box)


# %%
years = sorted({row.year for row in CATALOG.values()})
fig, ax = plt.subplots(figsize=(9.6, 7.4), layout="constrained")
top = 0
for family in FAMILIES:
    lines = Counter()  # systems so far in the column of a year
    for row in CATALOG.values():
        if row.family == family:
            name_plate(ax, years.index(row.year), top + lines[row.year] + 0.5, row)
            lines[row.year] += 1
    height = max(lines.values())
    ax.axhspan(top, top + height, color=COLOURS[family], alpha=0.09, linewidth=0)
    ax.text(-0.6, top + height / 2, family, color=COLOURS[family], va="center", ha="right")
    top += height
ax.set(xlim=(-0.55, len(years) - 0.45), ylim=(top, 0), yticks=[])
ax.set_xticks(range(len(years)), [str(year) for year in years], weight="bold")
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# Read it from the upper left to the lower right. Search comes first, then GANs. In 2021 everything
# happens at once; afterwards most new systems are diffusion models.
#
# ## By hand
#
# One system is one row of the catalogue.

# %%
row = CATALOG["ldm"]
for name in ("title", "year", "paper", "idea", "family", "builds_on", "stages", "status"):
    print(f"{name:10}{getattr(row, name)}")

# %% [markdown]
# `builds_on` has the closest ancestor first. Follow it, and history runs backwards.

# %%
key = "dit"
while key:
    row = CATALOG[key]
    print(f"{row.year}  {row.title:18}{row.idea}")
    key = next(iter(row.builds_on), None)

# %% [markdown]
# ## The real module
#
# All that a row holds, and how the working systems are found:

# %%
source(Row, "key: str", "return self.status")

# %%
source(working)

# %% [markdown]
# Every system keeps one promise, whatever is inside: captions and noise go in, pictures come out.

# %%
source(System.sample)

# %% [markdown]
# ## Looking inside: who builds on whom
#
# The closest ancestor gives the branch. Two passes are enough: give each system a place, then draw.


# %%
def place_below(key, depth, line, places):
    """Put a system and all that grow from it into `places`; returns the next free line."""
    start = line
    for child in CATALOG.values():
        if child.builds_on[:1] == (key,):
            line = place_below(child.key, depth + 1, line, places)
    end = max(line, start + 1)
    places[key] = (depth, (start + end - 1) / 2)
    return end


places, line = {}, 0
for row in CATALOG.values():
    if not row.builds_on:
        line = place_below(row.key, 0, line, places) + 0.4

# %%
fig, ax = plt.subplots(figsize=(9.6, 8.2), layout="constrained")
t = np.linspace(0, 1, 60)
for row in CATALOG.values():
    name_plate(ax, *places[row.key], row)
    for number, parent in enumerate(row.builds_on):
        (x0, y0), (x1, y1) = places[parent], places[row.key]
        style = {"color": COLOURS[row.family], "lw": 1.8, "alpha": 0.75}
        if number:
            style = {"color": "#8f8f8f", "lw": 0.9, "ls": (0, (4, 3))}
        across = x0 + (x1 - x0) * t + 0.5 * (x0 == x1) * np.sin(np.pi * t)
        down = y0 + (y1 - y0) * t**2 * (3 - 2 * t)  # flat at both ends
        ax.plot(across, down, zorder=0, **style)
ax.set(xlim=(-0.35, 4.5), ylim=(line - 0.6, -0.8))
ax.axis("off")
plt.show()

# %% [markdown]
# Solid lines lead to the closest ancestor, dashed ones to others. **Predict**: from which system do
# most dashed lines start? What does it lend, since it cannot draw?
#
# ## The pretrained runs
#
# Small trained systems come with the package, all trained on the same captioned pictures.

# %%
systems = {key: lineage.load(f"pretrained:{key}") for key in pretrained() if key in drawing()}
print(f"{'system':13}{'year':6}{'file':>7}{'training':>13}   stages")
for key in pretrained():
    folder = run_folder(f"pretrained:{key}")
    size = (folder / "model.safetensors").stat().st_size / 1e6
    minutes = sum(stage["cpu_seconds"] for stage in read_cost(folder).values()) / 60
    stages = " → ".join(CATALOG[key].stages)
    print(f"{key:13}{CATALOG[key].year:<6}{size:>4.1f} MB{minutes:>9.1f} min   {stages}")

# %% [markdown]
# `clip` draws nothing: it compares pictures with words. VQGAN+CLIP and CLIPDraw draw with its
# gradient. No network of theirs was trained to draw captions: each picture is optimised, which
# takes seconds. One caption, drawn twice by every system that draws, each time from other noise.

# %%
wanted = "a red circle above a blue square"
columns = []
for key, system in systems.items():
    label = f"{CATALOG[key].year} {CATALOG[key].title}"
    column = [LabelledImage("", image) for image in system.generate([wanted] * 2, seed=1)]
    columns.append([*column[:-1], LabelledImage(label, column[-1].image)])
parts = [columns[first : first + 4] for first in range(0, len(columns), 4)]
rows = [list(row) for part in parts for row in zip(*part, strict=True)]
show(rows)

# %% [markdown]
# Compare columns. Is each object there? Has it its own colour? Is it where the caption says?
# Notebook 20 asks a judge instead of your eyes.
#
# ## What each family optimises
#
# Symbols: picture $x$, caption $c$, noise $z$.
#
# | family | one equation | about |
# |---|---|---|
# | `retrieval` | $\hat x = x_i$ with $i = \arg\max_i \cos(h(c), h(c_i))$ | search |
# | `cgan` | $\min_G \max_D \mathbb E \log D(x, c) + \mathbb E \log(1 - D(G(z, c), c))$ | a game |
# | `attngan` | $L = L_G + \lambda L_{\mathrm{DAMSM}}$ (equation 3) | words and regions |
# | `clip` | $L = -\tfrac12\,\mathbb E\,(\log p(c \mid x) + \log p(x \mid c))$ | pairs |
# | `vqvae` | $L = -\sum_n \log p(k_n \mid k_{<n}, c)$ | the next code |
# | `diffusion` | $L = \mathbb E\,\lVert \epsilon - \epsilon_\theta(x_t, t, c) \rVert^2$ | noise |
#
# Search learns nothing, and AttnGAN adds a term to a GAN. The other four, on numbers small
# enough to check:

# %%
real, fake = torch.tensor([2.0]), torch.tensor([-1.0])  # logits of a discriminator
yes, no = torch.ones(1), torch.zeros(1)
bce = F.binary_cross_entropy_with_logits
print(f"cgan       D {bce(real, yes) + bce(fake, no):.3f}   G {bce(fake, yes):.3f}")

match = torch.tensor([[4.0, 1.0], [0.0, 3.0]])  # pictures x captions
own = torch.arange(2)
print(f"clip       {(F.cross_entropy(match, own) + F.cross_entropy(match.T, own)) / 2:.3f}")

logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # two places, three codes
codes = torch.tensor([0, 2])
print(f"vqvae      {F.cross_entropy(logits, codes, reduction='sum'):.3f}")

eps, predicted = torch.tensor([0.5, -1.0]), torch.tensor([0.4, -0.7])
print(f"diffusion  {F.mse_loss(predicted, eps, reduction='sum'):.3f}")

# %% [markdown]
# **Predict**: the generator improves, so `fake` rises to 1. Which of the GAN's two losses falls?
# The players pull against each other. The other losses have one direction: down.
#
# ## Where it fails, and what came next
#
# No training picture has a yellow circle. Yellow squares and red circles are there. Move the
# slider through the years.

# %%
unseen = "a yellow circle"


def drawn_by(key):
    """The picture of the unseen combination by one system."""
    return systems[key].generate([unseen])[0]


slider(drawn_by, "system", list(systems), still=list(systems))

# %% [markdown]
# Search returns a picture that it has stored, or pastes parts of some. A learned system may join a
# known colour with a known shape, and often misses. Each new system of the map mends something;
# "Where it fails" in each notebook says what.
#
# ## How to read the other notebooks
#
# All have the same sections: *question, one figure, by hand, the real module, training live, the
# pretrained run, looking inside, where it fails, exercises*. Letters mean the same everywhere: B
# pictures, L words, S side, D width. Run cells from top to bottom; one cell's answer is often the
# next cell's question.

# %%
lines = ["| year | system | idea | notebook |", "|---|---|---|---|"]
for key in working():
    row, found = CATALOG[key], sorted(Path().glob(f"[0-9][0-9]_{key}.ipynb"))
    link = f"[{found[0].stem}]({found[0].name})" if found else ""
    lines.append(f"| {row.year} | {row.title} | {row.idea} | {link} |")
Markdown("\n".join(lines))

# %% [markdown]
# ## Exercises
#
# An exercise is a function with a gap. Write it, run the cell, then run the check below it: the
# check names what is wrong in one sentence. `catalog` is `CATALOG`, or a smaller one.
#
# **1. Look up** (1 point). A system's ancestors: all that it builds on, and all that those build
# on.


# %%
def all_ancestors(catalog, key):
    """Set of the keys that a system builds on, directly or not."""
    ### BEGIN SOLUTION
    found = set()
    for parent in catalog[key].builds_on:
        found |= {parent} | all_ancestors(catalog, parent)
    return found
    ### END SOLUTION


# %%
check.all_ancestors(all_ancestors)

# %% [markdown]
# **2. Predict, then count** (1 point). Which system has the most descendants? Guess from the tree;
# all lines count, also dashed ones. The oldest wins a tie.


# %%
def most_built_on(catalog):
    """Key of the system on which most others build, directly or not."""
    ### BEGIN SOLUTION
    counts = dict.fromkeys(catalog, 0)
    for key in catalog:
        waiting, found = list(catalog[key].builds_on), set()
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += catalog[parent].builds_on
        for parent in found:
            counts[parent] += 1
    return max(counts, key=counts.get)
    ### END SOLUTION


# %%
check.most_built_on(most_built_on)

# %% [markdown]
# **3. Extend** (2 points). The longest line of ancestors that ends in a system, oldest first, such
# as `["gan_int_cls", "stackgan", "attngan"]`. Any of several longest ones is right.


# %%
def longest_line(catalog, key):
    """List of keys, each built on the one before it; the last is `key`."""
    ### BEGIN SOLUTION
    lines = [longest_line(catalog, parent) for parent in catalog[key].builds_on]
    return [*max(lines, key=len, default=[]), key]
    ### END SOLUTION


# %%
check.longest_line(longest_line)
