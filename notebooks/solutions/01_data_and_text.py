# %% [markdown]
# # 01 · Data and text: what a caption holds
#
# **The question.** A text-to-image model learns from pictures and their captions, and from nothing
# else. What does a caption say, what does it leave open, and how does it become numbers?
#
# Files explained here: [contract.py](../lineage/data/contract.py) and
# [shapes.py](../lineage/data/shapes.py) for the data; [tokenizer.py](../lineage/text/tokenizer.py),
# [encoders.py](../lineage/text/encoders.py) and [char_cnn_rnn.py](../lineage/text/char_cnn_rnn.py)
# for the text.

# %%
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from IPython.display import display

import lineage
from lineage.cgan.joint_embedding import embedding_terms
from lineage.config import TextConfig
from lineage.course import begin, check, show, slider, source
from lineage.data.shapes import heldout_relation
from lineage.errors import UserError
from lineage.sheets import picture
from lineage.system import LabelledImage
from lineage.text import make_encoder, make_tokenizer
from lineage.text.contract import TextFeatures
from lineage.text.encoders import BagEncoder, TransformerEncoder
from lineage.text.token_encoder import TokenEncoder
from lineage.training.loader import Loader

begin("01_data_and_text", minutes=2)

# %% [markdown]
# ## The idea in one figure
#
# One caption, many pictures. All of these are called *a red square*; size and place are left open,
# and a model has to invent them.

# %%
data = lineage.load_dataset("shapes", split="train", size=32)
examples = [data[i] for i in range(600)]
squares = [e for e in examples if e.captions[0] == "a red square"][:8]
show([e.image for e in squares], [e.captions[1] for e in squares])

# %% [markdown]
# And one picture, several captions, all true. `shapes` is drawn by a program, so that the scene
# behind each picture is known.

# %%
example = data[12]
for thing in example.meta["objects"]:
    print(thing)
show([example.image] * len(example.captions), example.captions)

# %% [markdown]
# A caption says *what* and sometimes *where*. All else is left to chance. A model has to follow the
# first part, and to vary the second.
#
# ## By hand
#
# Networks read numbers. List the words, the most frequent first; a caption is then a row of
# positions in that list. Numbers 0, 1 and 2 are kept for padding, an unknown word and *no caption*.

# %%
captions = ["a red circle", "a red circle above a blue square"]
vocabulary = ["a", "circle", "red", "above", "blue", "square"]
id_of = {word: i for i, word in enumerate(vocabulary, start=3)}

rows = [[id_of.get(word, 1) for word in caption.split()] for caption in captions]
length = max(map(len, rows))
ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])  # (B, L)
mask = ids != 0  # True where there is a word
print(ids)
print(mask.int())

# %% [markdown]
# The class of the package agrees.

# %%
tokenizer = make_tokenizer("word", captions, vocab_size=100)
assert tokenizer.words == vocabulary
assert [tokenizer.encode(caption) for caption in captions] == rows
print("a purple circle ->", tokenizer.encode("a purple circle"), tokenizer.unknown("a purple kite"))

# %% [markdown]
# The simplest sentence vector is the mean of the word vectors, over words $l$ that are no padding
# (mask $m_l = 1$):
#
# $$s = \frac{\sum_l m_l\, w_l}{\sum_l m_l}$$
#
# Give each word its own axis, and the mean can be read: it is the share of each word.

# %%
vectors = torch.eye(len(vocabulary) + 3)  # row i is the vector of word i
words = vectors[ids]  # (B, L, D)
sentence = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
for caption, row in zip(captions, sentence[:, 3:].tolist(), strict=True):
    print([round(share, 2) for share in row], caption)

# %% [markdown]
# **Predict**: which of these has another vector than the first?

# %%
quartet = [
    "a red circle above a blue square",
    "a blue square above a red circle",
    "a blue circle above a red square",
    "a red square above a red circle",
]
for caption in quartet:
    row = vectors[tokenizer.encode(caption)].mean(0)[3:]
    print([round(share, 2) for share in row.tolist()], caption)

# %% [markdown]
# The first three are one **bag of words**. Which object is above, and which one is red, is lost.
#
# ## The real module: data
#
# An `Example` is a picture and its captions. A training step receives a `Batch`.

# %%
batch = Loader(data, batch_size=64, seed=0).at(0)
low, high = batch.image.aminmax()
print("image  ", tuple(batch.image.shape), f"from {low:.2f} to {high:.2f}")
print("label  ", tuple(batch.label.shape))
print("caption", batch.caption[:3])

# %% [markdown]
# Each visit of a picture draws one of its captions, by a number that depends on nothing but seed,
# picture and visit. Picture 12 at six visits:

# %%
for caption in data.batch([12] * 6, epochs=range(6), seed=0).caption:
    print(caption)

# %% [markdown]
# A test must ask for more than memory. So `train` lacks some combinations, and every scene of the
# split `heldout` has one. Counts of objects in 600 scenes, `train / heldout`:

# %%
heldout = lineage.load_dataset("shapes", split="heldout", size=32)
unseen = [heldout[i] for i in range(600)]
counts = [
    Counter((thing["shape"], thing["colour"]) for e in split for thing in e.meta["objects"])
    for split in (examples, unseen)
]
colours = ("red", "green", "blue", "yellow")
print(" " * 10, *(f"{colour:>12}" for colour in colours))
for shape in ("circle", "square", "triangle", "cross"):
    pairs = (f"{counts[0][shape, colour]} / {counts[1][shape, colour]}" for colour in colours)
    print(f"{shape:10}", *(f"{pair:>12}" for pair in pairs))

# %% [markdown]
# No yellow circle and no green triangle in `train`, though yellow, green, circles and triangles are
# there. Some relations are missing too; shapes are numbered in the order of the table.

# %%
source(heldout_relation)

# %%
new = {e.captions[0]: e.image for e in unseen if len(e.meta["objects"]) < 3}
show([*new.values()][:8], [*new][:8])

# %% [markdown]
# **Your own pictures.** A folder with a text file beside each picture is a data set: one caption a
# line. What cannot be used is named.

# %%
with tempfile.TemporaryDirectory() as folder:
    for number, one in enumerate(examples[:3]):
        picture(one.image, 64).save(Path(folder, f"{number}.png"))
        Path(folder, f"{number}.txt").write_text("\n".join(one.captions))
    Path(folder, "forgotten.txt").write_text("a kite without a picture")
    own = lineage.load_dataset(f"folder:{folder}", size=32)
    mine = [own[i] for i in range(len(own))]
    print([(skipped.path, skipped.reason) for skipped in own.skipped])
show([one.image for one in mine], [" / ".join(one.captions[:2]) for one in mine])

# %% [markdown]
# **A second world, without a download.** The font of your system holds thousands of small pictures
# with names: its emoji. (Without such a font, the cells go on with `shapes`.)

# %%
try:
    world = lineage.load_dataset("emoji", size=32)
    print(f"{len(world):,} emoji to train on, in the groups of Unicode, which are the labels")
except UserError as reason:
    world = data
    print(reason)

# %%
some = world.showcase(16)
show([one.image for one in some], [one.captions[0] for one in some])

# %% [markdown]
# Nobody drew these to teach a network. **Predict**: how many words do their captions have, against
# those of `shapes`, and how many of them stand in one caption only?

# %%
for name, one in {"shapes": data, "emoji": world}.items():
    words = [word for c in one.all_captions(3000) for word in set(re.findall(r"\w+", c.lower()))]
    counts = Counter(words)
    once = sum(number == 1 for number in counts.values())
    print(f"{name:8}{len(counts):5} words, {once / len(counts):4.0%} of them in one caption only")

# %% [markdown]
# A word that was read once cannot be learnt well. All real captions have such a long tail. What can
# be learnt nevertheless? The system of notebook 10 trained on the emoji for 45 minutes of one core.
# It draws captions that it has never read. **Predict**: which of the eight will it draw well?

# %%
trained = lineage.load("pretrained:ldm_emoji")
asked = ["man farmer, medium-dark skin tone", "police officer, medium skin tone",
         "kiss: woman, woman, medium skin tone and light skin tone",
         "woman wearing turban, medium skin tone", "person: white hair, dark skin tone",
         "man judge, medium-light skin tone", "mosquito", "calendar"]  # fmt: skip
show(trained.generate(asked, seed=0), asked)

# %% [markdown]
# It puts together what it knows from other captions. *mosquito* and *calendar* stand in no caption
# of the training, so both are the same unknown word to it.
#
# Other data sets are read as they come ([data/README.md](../data/README.md)), and
# `lineage data stats` counts what is in them.

# %% [markdown]
# ## The real module: text
#
# Every encoder has one method, `encode(list[str]) -> TextFeatures`, and all families use it.

# %%
source(TextFeatures, "words: (B, L, Dw)", "ids: (B, L)")

# %%
source(TokenEncoder._features)

# %% [markdown]
# `bag` is the mean from above. `transformer` adds positions, attends from each word to those before
# it, and reads the sentence at the last word.

# %%
source(BagEncoder.forward)

# %%
source(TransformerEncoder.forward)

# %% [markdown]
# The same lines, one after the other.

# %%
torch.manual_seed(0)
tokenizer = make_tokenizer("word", data.all_captions(limit=2000), vocab_size=4096)
config = TextConfig(width=8, num_heads=2, conv_channels=12)
encoder = make_encoder("transformer", config, tokenizer)
rows = [tokenizer.encode(caption) for caption in captions]
length = max(map(len, rows))
ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
mask = ids != 0
causal_mask = torch.ones(length, length, dtype=torch.bool).tril()
x = encoder.token_emb(ids) + encoder.pos_emb[:length]
embedded = x
for block in encoder.blocks:
    x = block(x, causal_mask)
words = encoder.norm(x)
last = mask.sum(1) - 1
sentence = words[torch.arange(len(ids)), last]
assert torch.allclose(sentence, encoder.encode(captions).sentence, atol=1e-5)
for name, value in {"ids": ids, "embedded": embedded, "words": words, "sentence": sentence}.items():
    print(f"{name:12}{tuple(value.shape)}")
print("causal_mask", causal_mask.int(), sep="\n")
print("last", last)

# %% [markdown]
# Four encoders, and how far one word reaches. Two captions differ in *blue* and *green*; `x` marks
# word vectors that differ.

# %%
two = ["a red circle above a blue square", "a red circle above a green square"]
print(f"{'':14}{'words':14}{'sentence':12}differ")
for name in ("bag", "lstm", "transformer", "char_cnn_rnn"):
    torch.manual_seed(0)
    text = make_encoder(name, config, tokenizer).eval().encode(two)
    change = (text.words[0] - text.words[1]).abs().amax(1) > 1e-5
    marks = "".join("x" if differs else "." for differs in change)
    shapes = f"{tuple(text.words.shape)!s:14}{tuple(text.sentence.shape)!s:12}"
    print(f"{name:14}{shapes}{marks}")

# %% [markdown]
# A vector of `bag` belongs to its word alone. `lstm` reads in both directions, so that every vector
# changes. `transformer` is **causal**: words before the change stay as they are. `char_cnn_rnn` has
# no words at all, but a vector for about 18 characters; a misspelt word is no unknown word to it.

# %%
misspelt = "a purpel circle that is abvoe a square"
for name in ("bag", "char_cnn_rnn"):
    encoder = make_encoder(name, config, tokenizer)
    print(f"{name:14}tokens {encoder.tokens(misspelt)}  unknown {encoder.unknown([misspelt])}")
bpe = make_tokenizer("bpe", data.all_captions(limit=2000), vocab_size=400)
print(f"{'bpe':14}tokens {[bpe.decode([i]) for i in bpe.encode(misspelt)]}")

# %% [markdown]
# The third way is byte-pair encoding: known words are one token, others fall into pieces.
#
# **No caption** has features too, `null`. Some captions are replaced by it in training; guidance
# compares drawings with and without the caption (notebook 09).

# %%
encoder = make_encoder("bag", config, tokenizer)
text = encoder.encode(captions)
mixed = text.where(torch.tensor([True, False]), encoder.null(2))
print("ids", mixed.ids, "mask", mixed.mask.int(), sep="\n")
assert torch.equal(encoder.encode([""]).sentence, encoder.null(1).sentence)

# %% [markdown]
# ## Training it live
#
# What can an encoder learn? The first stage of `gan_int_cls` trains it together with an encoder of
# pictures: the product of a picture's vector and its caption's is to exceed that of wrong pairs by
# 1.

# %%
source(embedding_terms, "scores = images", "}")

# %% [markdown]
# Below: which of many new pictures fits each caption best. The bag first, then the LSTM.

# %%
test = lineage.load_dataset("shapes", split="test", size=32)
gallery = [e for e in (test[i] for i in range(800)) if e.meta["relation"]]
images = torch.stack([e.image for e in gallery]).float() / 127.5 - 1
wanted = [
    "a blue triangle left of a red circle",
    "a red circle left of a blue triangle",
    "a green cross left of a red square",
]


def scores(model, captions):
    """Fit (B, N) of captions and pictures of the gallery: products of their vectors."""
    model.eval()
    with torch.no_grad():
        fit = model.text.encode(captions).sentence @ model.image_encoder(images).T
    model.train()
    return fit


# %%
def train(encoder, steps=500):
    """A matching model after `steps` steps; shows the best picture for each caption."""
    rows, place = [[] for _ in wanted], display("", display_id=True)
    settings = {"text": encoder, "text_share": 0.9}
    for step in lineage.training_steps("gan_int_cls", steps=round(steps / 0.9), settings=settings):
        if step.stage != "text":
            break
        model = step.system
        if step.number in (1, 25, 50, 100, 200, 300, 400, 500):
            for row, best in zip(rows, scores(model, wanted).argmax(1), strict=True):
                row.append(LabelledImage(f"{encoder} {step.number}", gallery[best].image))
            place.update(show(rows))
    return model


models = {name: train(name) for name in ("bag", "lstm")}

# %% [markdown]
# Colours come first, then shapes. The bag gives one picture to the first two captions, at every
# step: it has to. How often does a caption beat its own reversal?

# %%
pattern = re.compile(r"(.*) (left of|right of|above|below) (.*)")
own = [e.captions[0] for e in gallery]
reversals = [pattern.sub(r"\3 \2 \1", caption) for caption in own]
print(f"{own[0]}  |  {reversals[0]}")
for name, model in models.items():
    right, wrong = (scores(model, texts).diagonal() for texts in (own, reversals))
    better, gap = (right > wrong + 1e-3).float().mean(), (right - wrong).abs().mean()
    print(f"{name:6}right order preferred: {better:.0%}   (mean gap {gap:.4f})")

# %% [markdown]
# The two scores of the bag are equal. The LSTM *can* separate them, yet a coin would be right half
# of the time: in a random batch, few rivals differ in order alone, so that words suffice. Large
# models have the same weakness (Yuksekgonul et al. 2023,
# [arXiv:2210.01936](https://arxiv.org/abs/2210.01936)).
#
# ## The pretrained run beside it
#
# What does a word do to a picture? A diffusion model (notebook 08) with a `transformer` encoder
# draws each caption from the same noise.

# %%
system = lineage.load("pretrained:ddpm")


def draw(caption):
    """One picture; the noise is always the same."""
    return system.generate(caption, sampling_steps=40)[0]


variants = [
    "a red circle",
    "a blue circle",
    "a blue square",
    "two blue squares",
    "three blue squares",
    "a small blue square",
    "a square",
    "",
]
show([draw(caption) for caption in variants], [*variants[:-1], "(no caption)"])

# %% [markdown]
# One word changes, and so does one thing in the picture, or a little more. Where the caption is
# silent, the noise decides.
#
# ## Looking inside
#
# Word by word: move the number of words that the model reads.

# %%
every = ["a", "green", "cross", "left", "of", "a", "yellow", "square"]
slider(lambda count: draw(" ".join(every[:count])), "words", range(9), still=[0, *range(2, 9)])

# %% [markdown]
# ## Where it fails, and what came next
#
# Words without a token are all one `<unk>`, whose vector was never trained. An unseen pair such as
# *a yellow circle* may well succeed, as both words are known. Two things are harder: order and
# colours get mixed.

# %%
hard = [
    "a purple circle",
    "a kite",
    "a yellow circle",
    "a green triangle",
    *wanted[:2],
    "a red circle and a blue cross",
    "a blue circle and a red cross",
]
print("no token:", system.text.unknown(hard))
show([draw(caption) for caption in hard], hard)

# %% [markdown]
# Later systems take an encoder that has read far more text: CLIP, T5, and several together
# (`text=pretrained:NAME`). For now, one sentence vector will do. The next notebook gives it to the
# first systems that drew.
#
# ## Exercises
#
# Each has a check in the next cell. `words` is (B, L, D), `mask` is (B, L), True where there is a
# word.
#
# **1. Number the words** (2 points). Split at blanks. `id_of` gives the number of a word; 0 is
# padding, 1 an unknown word.


# %%
def token_ids(captions, id_of):
    """Numbers (B, L) of the words, int64, padded on the right; L words in the longest."""
    ### BEGIN SOLUTION
    rows = [[id_of.get(word, 1) for word in caption.split()] for caption in captions]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
    ### END SOLUTION


# %%
check.token_ids(token_ids)

# %% [markdown]
# **2. Average** (2 points). The mean of each caption's own words. Padding may hold any numbers.


# %%
def mean_of_words(words, mask):
    """Sentence vectors (B, D)."""
    ### BEGIN SOLUTION
    return (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    ### END SOLUTION


# %%
check.mean_of_words(mean_of_words)

# %% [markdown]
# **3. Read the last word** (1 point). The sentence of the transformer: each caption has its own
# last word.


# %%
def state_at_last_word(words, mask):
    """Vectors (B, D) at the last word of each caption."""
    ### BEGIN SOLUTION
    return words[torch.arange(len(words)), mask.sum(1) - 1]
    ### END SOLUTION


# %%
check.state_at_last_word(state_at_last_word)

# %% [markdown]
# **4. Predict** (2 points). Can a bag of words tell two captions apart? Words outside `id_of` all
# have the number 1.


# %%
def same_bag(first, second, id_of):
    """True if both captions have the same words equally often, in whatever order."""
    ### BEGIN SOLUTION
    one, other = (sorted(id_of.get(w, 1) for w in text.split()) for text in (first, second))
    return one == other
    ### END SOLUTION


# %%
check.same_bag(same_bag)

# %% [markdown]
# **5. Extend** (2 points). What tests a model beyond its training? Find the unseen pairs: each
# scene is a list of (shape, colour).


# %%
def unseen_pairs(train_scenes, other_scenes):
    """Pairs (shape, colour) of the other scenes, as a set, whose shape and whose colour both occur
    in training, but never together."""
    ### BEGIN SOLUTION
    known = {pair for scene in train_scenes for pair in scene}
    shapes, colours = {shape for shape, _ in known}, {colour for _, colour in known}
    others = {pair for scene in other_scenes for pair in scene} - known
    return {(s, c) for s, c in others if s in shapes and c in colours}
    ### END SOLUTION


# %%
check.unseen_pairs(unseen_pairs)
