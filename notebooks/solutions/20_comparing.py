# %% [markdown]
# # 20 · Comparing: which system is better?
#
# **The question.** Two systems draw. Which is better, by how much, and how sure is that?
#
# One number hides more than it shows. So each score here stands between a floor and a ceiling, has
# an interval, and is then fooled on purpose. Files explained here:
# [judge.py](../lineage/evaluation/judge.py), [prompts.py](../lineage/evaluation/prompts.py),
# [metrics.py](../lineage/evaluation/metrics.py),
# [intervals.py](../lineage/evaluation/intervals.py),
# [seeds.py](../lineage/evaluation/seeds.py).

# %%
import math
from collections import Counter

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

import lineage
from lineage.catalog import CATALOG
from lineage.config import TrainConfig
from lineage.course import begin, check, show, slider, source
from lineage.data.contract import to_bytes, to_unit
from lineage.data.shapes import LEVELS
from lineage.evaluation import metrics, sections
from lineage.evaluation.exam import exam
from lineage.evaluation.intervals import mean_score, resample_indices
from lineage.evaluation.judge import PARTS, Judge, relations, verdict
from lineage.evaluation.prompts import SPLITS, TASKS, make_prompts
from lineage.evaluation.real import PromptSet
from lineage.evaluation.scenes import SceneSpec, draw_scenes
from lineage.evaluation.table import cell
from lineage.pretrained import pretrained, run_folder
from lineage.training.cost import read_cost

begin("20_comparing", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# The same captions, a real picture first, then the oldest system of each family. Below each picture
# is what a small network, the judge, detects in it. (Systems that draw with CLIP's gradient are
# left out: hundreds of pictures would take them minutes. Their scores are in
# [results/pretrained](../results/pretrained).)

# %%
judge = Judge.load()
keys = [key for key in pretrained() if CATALOG[key].family != "clip"]
systems = {key: lineage.load(f"pretrained:{key}") for key in keys}
oldest = {CATALOG[key].family: key for key in reversed(list(systems))}
wanted = ["a red circle", "a circle left of a triangle", "a yellow circle"]
prompts = {prompt.prompt: prompt for prompt in make_prompts("easy")}
chosen = PromptSet(judge, [prompts[text] for text in wanted], "the figure", 32, seed=0)


def labelled(pictures, name):
    """Pictures with the judge's reading; the verdict on each stands before it."""
    found = judge.detect(pictures)
    marks = ["right" if one["strict"] else "wrong" for one in chosen.verdicts(found)]
    texts = [f"{name}, {mark}: {one}" for mark, one in zip(marks, found, strict=True)]
    return list(zip(texts, pictures, strict=True))


columns = [labelled(chosen.pictures, "real")]
columns += [labelled(to_bytes(systems[key].generate(wanted)), key) for key in oldest.values()][::-1]
show([list(row) for row in zip(*columns, strict=True)])

# %% [markdown]
# ## By hand: what is equal?
#
# A comparison needs an equal budget. A step of one system may cost four times a step of another,
# and another program may take half of the processor.

# %%
cost_of_step = {"small steps": 0.02, "large steps": 0.08}  # seconds of the processor
print("steps in one minute    quiet machine   busy machine")
for name, seconds in cost_of_step.items():
    for budget, shares in {"clock": (1.0, 0.5), "processor": (1.0, 1.0)}.items():
        quiet, busy = (60 * share / seconds for share in shares)
        print(f"{name}, {budget:9}  {quiet:12.0f}   {busy:12.0f}")

# %% [markdown]
# Minutes of the **clock** say how long you wait. Minutes of the **processor** are nearly the same
# work on a busy machine, so they are fair between systems. **Steps** give the same weights twice,
# but favour the system with costly steps. The loop stops at whichever is spent first:

# %%
source(TrainConfig.spent, "budgets = (")

# %% [markdown]
# What the pretrained runs spent:

# %%
print(f"{'system':13}{'steps':>8}{'pictures':>11}{'processor':>13}")
for key in systems:
    stages = read_cost(run_folder(f"pretrained:{key}")).values()
    steps, pictures, seconds = (
        sum(stage[name] for stage in stages) for name in ("steps", "pictures", "cpu_seconds")
    )
    print(f"{key:13}{steps:>8,}{pictures:>11,}{seconds / 60:>9.1f} min")

# %% [markdown]
# ## The real module: a judge that reads a picture
#
# The judge finds centres of objects on a grid, and a shape and a colour for each. As tensors:

# %%
maps = judge.detection_maps(chosen.pictures)
for name in ("heatmap", "shape", "colour", "geometry", "features"):
    print(f"{name:10}{tuple(getattr(maps, name).shape)}")
for one in judge.detect(chosen.pictures)[1].objects:
    print(f"{one.colour} {one.shape} at x {one.x:.2f}, y {one.y:.2f}, radius {one.radius:.2f}")

heat = to_bytes(maps.heatmap[1].sigmoid()[None] * 2 - 1)
show([chosen.pictures[1], heat], ["picture", "centres of objects"])

# %% [markdown]
# A verdict compares the objects with the prompt. `strict` allows nothing else in the picture; the
# parts are milder.

# %%
source(verdict, "shapes = {o.shape", "return {")

# %% [markdown]
# Where does "left of" end? Move the circle around the square.

# %%
small = [
    SceneSpec((thing,), size="small", place="in the middle")
    for thing in (("circle", "red"), ("square", "blue"))
]
ball, box = to_unit(torch.from_numpy(draw_scenes(LEVELS["easy"], small, seed=0, size=32)))


def moved(angle):
    """The circle at an angle of the square, fourteen pixels apart."""
    turn = math.radians(angle)
    down, right = round(-7 * math.sin(turn)), round(7 * math.cos(turn))
    return torch.minimum(ball.roll((down, right), (1, 2)), box.roll((-down, -right), (1, 2)))


slider(moved, "angle", list(range(0, 360, 15)), still=[0, 30, 60, 90, 135, 180])

# %%
angles = range(0, 195, 15)
turned = to_bytes(torch.stack([moved(angle) for angle in angles]))
for angle, found in zip(angles, judge.detect(turned), strict=True):
    first, second = sorted(found.objects, key=lambda thing: thing.shape)
    print(f"{angle:4}°  {' and '.join(sorted(relations(first, second))) or 'none'}")

# %% [markdown]
# GenEval's rule: along an axis, the distance, less a margin, must exceed half of the whole. On a
# diagonal little decides.
#
# ## Six tasks between a floor and a ceiling
#
# GenEval (Ghosh et al. 2023, [arXiv:2310.11513](https://arxiv.org/abs/2310.11513)) has six tasks.
# Here each has prompts of combinations that training shows, and of **unseen** ones. Eight of each
# are enough to learn from, and too few to publish.

# %%
per_task = Counter()
few = []
for prompt in make_prompts("easy"):
    per_task[prompt.tag, prompt.split] += 1
    if per_task[prompt.tag, prompt.split] <= 8:
        few.append(prompt)
questions = PromptSet(judge, few, "eight of each", 32, seed=0)
captions = [prompt.prompt for prompt in few]
firsts = [next(p for p in few if (p.tag, p.split) == (tag, s)) for tag in TASKS for s in SPLITS]
for seen, unseen in zip(firsts[::2], firsts[1::2], strict=True):
    print(f"{seen.tag:15}{seen.prompt:35}{unseen.prompt}")

# %% [markdown]
# The ceiling, *real*: real pictures with their own prompts. The floor, *shuffled*: real pictures,
# each with another prompt of its task.

# %%
real, shuffled = questions.rows()
lines = {task: ("tasks", task) for task in TASKS}
lines |= {f"part: {part}": ("parts", part) for part in PARTS}
print(f"{'± half an interval':20}{'real':>14}{'shuffled':>14}")
for name, (kind, key) in lines.items():
    values = [cell(bound["test"][kind][key]) for bound in (real, shuffled)]
    print("{:20}{:>14}{:>14}".format(name, *values))

# %% [markdown]
# Look at `count`: wrong pictures get most of it right, since most prompts name one or two objects.
# Without its floor this score would look like success.
#
# And who judges the judge? Its exam: real pictures, and near misses with one attribute wrong.

# %%
result = exam(judge, few, size=32)
print(f"real pictures accepted: {min(result['accepted'].values()):.2f} or more in each task")
for attribute, share in result["near_misses_by_attribute"].items():
    print(f"accepted although wrong in {attribute:10} {share:.2f}")

# %% [markdown]
# ## The pretrained runs beside each other

# %%
drawn = {key: to_bytes(system.generate(captions)) for key, system in systems.items()}


def tasks_of(pictures):
    """The section `composition` of pictures of all prompts."""
    return sections.composition(few, questions.verdicts(judge.detect(pictures)))


scores = {"shuffled": shuffled, **{key: tasks_of(x) for key, x in drawn.items()}, "real": real}
fig, ax = plt.subplots(figsize=(8.4, 0.42 * len(scores) + 1), layout="constrained")
for shift, split, colour in ((-0.12, "test", "#2c6fbb"), (0.12, "heldout", "#cf7f0c")):
    for y, row in enumerate(scores.values()):
        one = row[split]["overall"]
        ax.plot(one["interval"], [y + shift] * 2, color=colour, lw=2, alpha=0.5)
        ax.plot(one["value"], y + shift, "o", color=colour, label=split if y == 0 else None)
ax.set_yticks(range(len(scores)), scores)
ax.set(xlim=(-0.03, 1.03), xlabel="mean of the six tasks, with its interval")
ax.invert_yaxis()
ax.grid(axis="x", alpha=0.3)
ax.legend(title="combinations", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
plt.show()

# %% [markdown]
# Two systems whose intervals overlap widely are not yet ordered. Blue far to the right of orange:
# the system has learned combinations, not their parts. A dot without a line: the bootstrap fails,
# since each task was all right or all wrong and resampling changes nothing.
#
# ## Fair and unfair
#
# Which is better, `dit` or `ddpm`? Both drew the same prompts, so subtract prompt by prompt: a hard
# prompt is hard for both, and cancels. If the interval of the **paired** difference holds 0, do not
# claim one.

# %%
from lineage.evaluation.seeds import difference

source(difference, "pairs = [", "return seeds_score")


# %%
def verdicts_on(key, seed=0, **options):
    """Verdicts on one picture of each prompt."""
    pictures = systems[key].generate(captions, seed=seed, **options)
    return questions.verdicts(judge.detect(to_bytes(pictures)))


def best_of(tries):
    """Of several pictures of a prompt the verdict on a right one, if there is any."""
    return [max(prompt, key=lambda one: one["strict"]) for prompt in zip(*tries, strict=True)]


dit = [verdicts_on("dit", seed) for seed in range(3)]
ddpm, hurried = verdicts_on("ddpm"), verdicts_on("ddpm", sampling_steps=5)
pairs = {
    "one picture each": (dit[0], ddpm),
    "the best of three of dit": (best_of(dit), ddpm),
    "ddpm in 5 steps instead of 25": (dit[0], hurried),
}
for name, both in pairs.items():
    one, other = ({"composition": sections.composition(few, one)} for one in both)
    lead = difference([one], [other])
    low, high = lead["interval"]
    reading = "no difference" if low <= 0 <= high else "dit" if low > 0 else "ddpm"
    print(f"{name:31}dit - ddpm {lead['value']:+.2f} ({low:+.2f} to {high:+.2f})  {reading}")

# %% [markdown]
# The same two systems, and other conclusions. The second line lets somebody choose for `dit` alone,
# the third spares effort for `ddpm` alone. The first is fair in drawing, and still unfair: the
# table above says who trained longer. It orders two runs, and not two architectures.
#
# `lineage.compare` keeps all of this equal: data, processor time, prompts, judge.
# `compare_runs` does the same for finished runs, and cannot make their budgets equal:

# %%
import json
import tempfile

from lineage.comparison.run import compare_runs

folder = tempfile.mkdtemp()
runs = ["pretrained:vqvae", "pretrained:dalle"]
page = compare_runs(runs, out=folder, pictures=100)
report = json.loads(page.with_suffix(".json").read_text())
for one in report["answers"]:
    print(f"{one['question']}\n    {one['answer']}")
for key, one in report["systems"].items():
    minutes = sum(stage["cpu_seconds"] for stage in one["training"].values()) / 60
    print(f"{key}: {minutes:.0f} minutes of training")

# %% [markdown]
# `page` is a whole report: open it in a browser. For a fair one, train both:
# `lineage compare vqvae dalle --minutes 5 --seeds 3` takes half an hour.
#
# ## FID, by hand
#
# FID compares two clouds of features: their means and their covariances (Heusel et al. 2017,
# equation 6).
#
# $$d^2 = \lVert \mu_r - \mu_f \rVert^2 + \mathrm{Tr}\left(\Sigma_r + \Sigma_f
#   - 2(\Sigma_r \Sigma_f)^{1/2}\right)$$
#
# With one feature this is $(\mu_r - \mu_f)^2 + (\sigma_r - \sigma_f)^2$.

# %%
a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]])
by_hand = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
print(f"by hand {by_hand:.4f}   FID {metrics.frechet_distance(a, b):.4f}")
source(metrics.frechet_distance, "(mu_r, sigma_r)")

# %% [markdown]
# Features here are the judge's 64. Real pictures against other real pictures should have distance
# 0. **Predict**: what happens with few pictures?

# %%
data = lineage.load_dataset("shapes", split="train", size=32)
features = judge.features(torch.stack([data[i].image for i in range(1600)]))
for n in (80, 200, 400, 800):
    one, other = features[:n], features[n : 2 * n]
    fid, kid = metrics.frechet_distance(one, other), metrics.kernel_distance(one, other)
    print(f"{n:4} pictures   FID {fid:.3f}   KID {kid:+.4f}")

# %% [markdown]
# FID falls with the number of pictures alone: compare FIDs of equally many only. KID (Binkowski et
# al. 2018) compares all pairs by a kernel, and is unbiased: it lies around 0, also below.
#
# Now a cloud that FID cannot tell from the real one. Reflect each feature at the mean: mean and
# covariance stay, and everything else is wrong.

# %%
reflected = 2 * features.mean(0) - features
precision, _ = metrics.precision_recall(features[:400], reflected[400:800])
fid = metrics.frechet_distance(features, reflected)
print(f"FID {abs(fid):.4f}   precision {precision.mean():.2f}")

# %% [markdown]
# ## Precision and recall
#
# **Precision**: which generated pictures lie within reach of a real one? **Recall**: which real
# pictures lie within reach of a generated one? A picture reaches as far as its $k$-th neighbour
# (Kynkäänniemi et al. 2019, equations 1 and 2). Four numbers, $k = 1$:

# %%
real_line = torch.tensor([[0.0], [1.0], [2.0], [5.0]])  # their radii: 1, 1, 1, 3
fake_line = torch.tensor([[1.4], [1.5], [1.6], [9.0]])  # their radii: 0.1, 0.1, 0.1, 7.4
precision, recall = metrics.precision_recall(real_line, fake_line, k=1)
print("precision", precision.tolist())
print("recall   ", recall.tolist())

# %% [markdown]
# The far point 9 reaches half of the real ones: one outlier buys recall. A larger $k$ and more
# pictures help.
#
# ## Memorisation
#
# `retrieval` stores training pictures. How near is a picture to the nearest of them? The test of
# Meehan et al. (2020): 0.5 if as near as unseen real pictures, 1 for copies.

# %%
source(metrics.data_copying, "difference =", "return")

# %%
stored = judge.features(systems["retrieval"].pictures)  # training pictures
again = [PromptSet(judge, few, "", 32, seed).pictures for seed in range(1, 5)]
reference = judge.features(torch.cat(again))  # real pictures of the same prompts
seen = torch.tensor([prompt.split == "test" for prompt in few])  # (P,)
as_new_as_real = metrics.nearest_distance(reference[seen.repeat(4)], stored)


def copying(pictures):
    """0.5 for pictures as new as real ones, 1 for copies."""
    distance = metrics.nearest_distance(judge.features(pictures[seen]), stored)
    return metrics.data_copying(distance, as_new_as_real).mean()


copies = to_bytes(systems["retrieval"].generate(captions, paste=False))
for key, pictures in {**drawn, "whole pictures": copies, "real": questions.pictures}.items():
    print(f"{key:15}copying {copying(pictures):.2f}")

# %% [markdown]
# `retrieval` pastes parts of pictures; without pasting it copies whole ones.
#
# ## Looking inside an interval
#
# Other prompts would give another score. The **bootstrap** estimates how far off: draw the verdicts
# again with replacement, many times (Efron 1979).

# %%
verdicts = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
for row in resample_indices(5, seed=0, times=3):
    print(f"verdicts {row.tolist()} -> mean {verdicts[row].mean():.1f}")
for n in (8, 32, 128, 512):
    low, high = mean_score((torch.arange(n) % 4 < 3).double())["interval"]
    print(f"{n:4} pictures, 0.75 of them right: from {low:.2f} to {high:.2f}")

# %% [markdown]
# Four times the pictures, half the interval. But an interval of pictures says nothing of training
# again. Train one system with five **seeds** (it stores 64 pictures, other ones each time):

# %%
for seed in range(5):
    for step in lineage.training_steps("retrieval", steps=1, seed=seed):
        trained = step.system
    score = tasks_of(to_bytes(trained.generate(captions)))["test"]["overall"]
    print(f"seed {seed}   {cell(score)}")

# %% [markdown]
# Differences between seeds can exceed an interval. `--seeds 3` trains each system three times, and
# resamples runs and prompts.
#
# ## Where it fails: each metric, fooled on purpose
#
# Several sets of pictures for the same prompts. The first one deserves its scores.

# %%
fine = questions.pictures
noise = torch.randn(fine.shape, generator=torch.Generator().manual_seed(0))
fooling = {
    "real": fine,
    "captions exchanged": fine.roll(16, 0),
    "left-right exchanged": fine.flip(3),
    "one picture for all": fine[:1].expand_as(fine),
    "a little noise": to_bytes((to_unit(fine) + 0.12 * noise).clamp(-1, 1)),
    "copies": copies,
    "copies and collages": drawn["retrieval"],
}
gans = [key for key in drawn if CATALOG[key].family == "cgan"]
fooling |= {f"a GAN, {key}": drawn[key] for key in gans[:1]}
examples = [captions.index(text) for text in ("a red circle", "a circle left of a triangle")]
columns = [[("", x[examples[0]]), (name, x[examples[1]])] for name, x in fooling.items()]
show([list(row) for row in zip(*columns, strict=True)])

# %%
heads = ("tasks", "position", "colour", "unseen", "FID", "precision", "recall", "copying")
table = ["| pictures | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
for name, pictures in fooling.items():
    score, own = tasks_of(pictures), judge.features(pictures)
    precision, recall = metrics.precision_recall(reference, own)
    shares = (
        score["test"]["overall"],
        score["test"]["tasks"]["position"],
        score["test"]["parts"]["colour"],
        score["heldout"]["overall"],
    )
    numbers = [share["value"] for share in shares]
    numbers += [metrics.frechet_distance(reference, own), precision.mean(), recall.mean()]
    cells = " | ".join(f"{number:.2f}" for number in (*numbers, copying(pictures)))
    table.append(f"| {name} | {cells} |")
Markdown("\n".join(table))

# %% [markdown]
# Read it by line. Each line fools some scores, and others reveal it:
#
# - *Captions exchanged*, *left-right exchanged*: FID, precision and recall take no captions.
# - *One picture for all*: precision is perfect; recall and FID reveal it.
# - *A little noise*: the tasks are perfect; FID and precision reveal it.
# - *Copies and collages*: the tasks are perfect; `unseen` reveals it. *Copies*: so does `copying`.
# - *A GAN*: colours come early; `tasks` reveals that shapes and places are still missing.
#
# What came next: people choose between two pictures of large models, since a detector measures no
# taste. People disagree too, so those scores need intervals as well.
#
# ## Exercises
#
# Each has a check in the next cell.
#
# **1. Judge** (1 point). The strict verdict: `found` and `wanted` are lists of pairs such as
# `("red", "circle")`, in any order. No object too many, none too few.


# %%
def strict_scene(found, wanted):
    """True if both lists hold the same objects equally often."""
    ### BEGIN SOLUTION
    return sorted(found) == sorted(wanted)
    ### END SOLUTION


# %%
check.strict_scene(strict_scene)

# %% [markdown]
# **2. Build** (2 points). FID of features that do not depend on each other: covariances are
# diagonal, `var` holds the diagonal.


# %%
def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    """FID, a number, from means (D,) and variances (D,)."""
    ### BEGIN SOLUTION
    return ((mean_a - mean_b) ** 2).sum() + ((var_a.sqrt() - var_b.sqrt()) ** 2).sum()
    ### END SOLUTION


# %%
check.frechet_diagonal(frechet_diagonal)

# %% [markdown]
# **3. Build** (2 points). KID with kernel $k(x, y) = (x^\top y / D + 1)^3$. Within a set, a picture
# is not paired with itself.
#
# $$\frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
#   - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)$$


# %%
def unbiased_kid(x, y):
    """KID, a number, between features (N, D) and (M, D)."""

    ### BEGIN SOLUTION
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        square, n = kernel(a, a), len(a)
        return (square.sum() - square.diagonal().sum()) / (n * (n - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()
    ### END SOLUTION


# %%
check.unbiased_kid(unbiased_kid)

# %% [markdown]
# **4. Break** (1 point). Features (count, D) with perfect precision and a recall below 0.1, made
# from real ones.


# %%
def fool_precision(real, count):
    """Features (count, D) that only precision likes; `real` is (N, D)."""
    ### BEGIN SOLUTION
    return real[:1].repeat(count, 1)
    ### END SOLUTION


# %%
check.fool_precision(fool_precision)

# %% [markdown]
# **5. Measure** (2 points). The 95 % bootstrap interval of a mean. Row t of `indices` (T, N) says
# which of the `values` (N,) the t-th resampled set holds. `torch.quantile` helps.


# %%
def bootstrap_interval(values, indices):
    """Lower and upper end, (2,)."""
    ### BEGIN SOLUTION
    means = values[indices].mean(1)  # (T,)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype))
    ### END SOLUTION


# %%
check.bootstrap_interval(bootstrap_interval)
