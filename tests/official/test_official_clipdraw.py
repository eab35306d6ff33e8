"""The verifier of CLIPDraw: the reference file, and one of other sizes, computed by loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lineage.official.verify import FileCheck, as_text, verify

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [folder / "shared" / "reference" for folder in ROOT.parents]
REFERENCE = next((f / "clipdraw.safetensors" for f in FOLDERS if f.is_dir()), None)

HEIGHT, WIDTH, SAMPLES, CANVAS, VIEWS, STEPS, SCHEDULE = 7, 9, 6, 100, 3, 8, 20
rng = np.random.default_rng(0)


def check(path: Path) -> FileCheck:
    (checked,) = verify([path])
    return checked


@pytest.mark.skipif(
    REFERENCE is None or not REFERENCE.is_file(), reason="the reference file is not there"
)
def test_every_output_of_the_reference_agrees() -> None:
    assert REFERENCE is not None
    checked = check(REFERENCE)
    assert checked.system == "clipdraw" and checked.passed, as_text(checked)
    assert len(checked.outputs) == 29


# --- a file of other sizes ------------------------------------------------------------------------


def at(points: np.ndarray, t: float) -> np.ndarray:
    weights = [math.comb(3, k) * t**k * (1 - t) ** (3 - k) for k in range(4)]
    return np.array(weights) @ points


def distance(points: np.ndarray, query: np.ndarray) -> float:
    """By the roots of the quintic."""
    powers = np.array([[1, 0, 0, 0], [-3, 3, 0, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) @ points
    powers[0] -= query
    square = sum(np.polynomial.Polynomial(powers[:, axis]) ** 2 for axis in (0, 1))
    roots = [r.real for r in square.deriv().roots() if abs(r.imag) < 1e-6 and 0 <= r.real <= 1]
    return min(float(np.hypot(*(at(points, t) - query))) for t in (0.0, 1.0, *roots))


def path_distance(points: np.ndarray, query: np.ndarray) -> float:
    return min(distance(points[k : k + 4], query) for k in range(0, len(points) - 1, 3))


def walk(count: int) -> np.ndarray:
    start = [WIDTH / 3, HEIGHT / 3] + rng.random((1, 2)) * 3
    return np.concatenate([start, 5 * (rng.random((3 * count, 2)) - 0.5)]).cumsum(0)


def scene_tensors() -> dict[str, Tensor]:
    """Two strokes, each sub-sample by itself."""
    paths, radii = [walk(2), walk(1)], np.array([0.8, 1.7])
    colors = rng.random((2, 4))
    covered, exact = np.zeros((2, HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH, 3))
    rgba, far = np.zeros((HEIGHT, WIDTH, 4)), np.zeros((2, HEIGHT, WIDTH))
    for y in range(HEIGHT):
        for x in range(WIDTH):
            far[:, y, x] = [path_distance(p, np.array([x + 0.5, y + 0.5])) for p in paths]
            for j in range(SAMPLES):
                for i in range(SAMPLES):
                    q = np.array([x + (i + 0.5) / SAMPLES, y + (j + 0.5) / SAMPLES])
                    rgb, alpha = np.zeros(3), 0.0
                    for p, (own, r, c) in enumerate(zip(paths, radii, colors, strict=True)):
                        if path_distance(own, q) < r:
                            covered[p, y, x] += 1 / SAMPLES**2
                            rgb, alpha = (1 - c[3]) * rgb + c[3] * c[:3], alpha + c[3] * (1 - alpha)
                    exact[y, x] += (rgb + 1 - alpha) / SAMPLES**2
                    if alpha:
                        rgba[y, x] += np.array([*(rgb / alpha), alpha]) / SAMPLES**2
    tensors = {f"input/scene4/points{i}": own for i, own in enumerate(paths)}
    tensors |= {"input/scene4/stroke_width": radii, "input/scene4/stroke_color": colors}
    tensors["output/scene4/distance"] = far
    single = {
        "coverage": covered,
        "image_exact": exact,
        "rgba_diffvg": rgba,
        "image_clipdraw": rgba[..., 3:] * rgba[..., :3] + 1 - rgba[..., 3:],
    }
    tensors |= {f"output/scene4/{name}": v.astype(np.float32) for name, v in single.items()}
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def init_tensors() -> dict[str, Tensor]:
    """Three strokes; none has three segments."""
    draws, points, colors, counts = [], [], [], [2, 1, 2]
    for count in counts:
        x, y = rng.random(2)
        draws += [count, x, y]
        points.append((x, y))
        for _ in range(3 * count):
            u, v = rng.random(2)
            draws += [u, v]
            x, y = x + 0.1 * (u - 0.5), y + 0.1 * (v - 0.5)
            points.append((x, y))
        colors.append(rng.random(4))
        draws += colors[-1].tolist()
    return {
        "input/init/draws": torch.tensor(draws, dtype=torch.float64),
        "output/init/num_segments": torch.tensor(counts),
        "output/init/points": CANVAS * torch.tensor(points, dtype=torch.float32),
        "output/init/stroke_color": torch.from_numpy(np.array(colors)).float(),
    }


def loss_tensors() -> dict[str, Tensor]:
    """The gradient of a cosine is (b/|b| - cos a/|a|) / |a|."""
    views, text = rng.normal(size=(VIEWS, 5)), rng.normal(size=(2, 5))
    loss, grad = {"plain": 0.0, "with_negative": 0.0}, {n: np.zeros((VIEWS, 5)) for n in "pn"}
    for row, a in enumerate(views):
        for weight, b, names in ((-1.0, text[0], "pn"), (0.3, text[1], "n")):
            norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
            cosine = a @ b / (norm_a * norm_b)
            for name in names:
                loss["plain" if name == "p" else "with_negative"] += weight * cosine
                grad[name][row] += weight * (b / norm_b - cosine * a / norm_a) / norm_a
    arrays = {
        "input/loss/image_features": views,
        "input/loss/text_features": text,
        "output/loss/plain": np.array([loss["plain"]]),
        "output/loss/plain_grad": grad["p"],
        "output/loss/with_negative": np.array([loss["with_negative"]]),
        "output/loss/with_negative_grad": grad["n"],
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in arrays.items()}


def opt_tensors() -> dict[str, Tensor]:
    """Adam by its formula."""
    tensors = {}
    ranges = {"points": (-math.inf, math.inf), "width": (1.0, 50.0), "color": (0.0, 1.0)}
    shapes = {"points": (2, 4, 2), "width": (2,), "color": (2, 4)}
    for name, lr in (("points", 1.0), ("width", 0.1), ("color", 0.01)):
        value = 1 + 0.1 * rng.random(shapes[name]) if name == "width" else rng.random(shapes[name])
        tensors[f"input/opt/{name}"] = value
        grads = tensors[f"input/opt/grad_{name}"] = rng.normal(size=(STEPS, *shapes[name]))
        m, v, values = 0.0, 0.0, []
        for step, g in enumerate(grads):
            if name == "points":
                lr = 0.1 if step >= 0.75 * STEPS else 0.4 if step >= 0.5 * STEPS else 1.0
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            value = (value - lr * m_hat / (np.sqrt(v_hat) + 1e-8)).clip(*ranges[name])
            values.append(value)
        tensors[f"output/opt/{name}"] = np.stack(values)
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()}


def curve_tensors() -> dict[str, Tensor]:
    curves, query = 20 * rng.random((3, 4, 2)), 20 * rng.random((5, 2))
    t, h = np.array([0.0, 0.4]), 1e-3
    slopes = [  # exact for a cubic
        [(8 * (at(c, s + h) - at(c, s - h)) - at(c, s + 2 * h) + at(c, s - 2 * h)) / (12 * h)]
        for c in curves
        for s in t
    ]
    arrays = {
        "input/curve/points": curves,
        "input/curve/query": query,
        "input/curve/t": t,
        "output/curve/at_t": np.array([[at(c, s) for s in t] for c in curves]),
        "output/curve/tangent": np.array(slopes).reshape(3, 2, 2),
        "output/curve/distance": np.array([[distance(c, q) for q in query] for c in curves]),
    }
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    steps = torch.tensor([0, 9, 10, 14, 15, 19])
    rates = torch.tensor([1, 1, 0.4, 0.4, 0.1, 0.1], dtype=torch.float64)
    return {
        "input/schedule/t": steps,
        "output/schedule/points_lr": rates,
        **scene_tensors(),
        **init_tensors(),
        **loss_tensors(),
        **opt_tensors(),
        **curve_tensors(),
    }


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    sentences = {
        "output/scene4/coverage": f"{SAMPLES} x {SAMPLES} grid",
        "output/init/points": f"in pixels of a {CANVAS} x {CANVAS} canvas",
        "input/schedule/t": f"iteration of {SCHEDULE}",
    }
    metadata = {
        "source": "analytic, and kvfrans/clipdraw",
        "config": json.dumps({}),
        "tensors": json.dumps(sentences),
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    return path


def test_a_file_of_other_sizes_agrees(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checked = check(write(tmp_path / "other.safetensors", tensors))
    assert checked.system == "clipdraw" and checked.passed, as_text(checked)
    assert len(checked.outputs) == sum(name.startswith("output/") for name in tensors)


@pytest.mark.parametrize(
    "name",
    [
        *("scene4/coverage", "scene4/distance", "scene4/image_exact", "scene4/image_clipdraw"),
        *("init/points", "loss/with_negative", "opt/points", "opt/width", "curve/tangent"),
        "schedule/points_lr",
    ],
)
def test_a_wrong_output_fails_alone(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = tensors[f"output/{name}"].clone()
    wrong.view(-1)[-1] += 1e-2
    checked = check(write(tmp_path / "wrong.safetensors", {**tensors, f"output/{name}": wrong}))
    assert [output.name for output in checked.outputs if not output.passed] == [name]
