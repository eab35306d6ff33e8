"""The page of a comparison in a real browser, without which these tests are skipped."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lineage
from lineage.sheets import picture, save_picture

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium is installed")
HOSTILE = "<img src=x onerror=alert(1)>"

PROBE = """
<script>
const seen = [];
window.onerror = message => seen.push(String(message));
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
window.onload = () => {
  const inScroll = e => e.closest(".scroll, .wide, pre");
  const width = document.documentElement.clientWidth;
  const contrasts = [...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
    .filter(e => e.getClientRects().length)
    .map(e => {
      const style = getComputedStyle(e);
      const colour = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
      const pair = [light(colour), light(behind(e))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), e.tagName + " " + e.textContent.slice(0, 30)];
    });
  document.title = JSON.stringify({
    errors: seen,
    width: document.documentElement.scrollWidth - width,
    wide: [...document.querySelectorAll("body *")]
      .filter(e => !inScroll(e) && !e.closest("svg") && e.getBoundingClientRect().right > width + 1)
      .map(e => e.tagName + "." + e.className).slice(0, 5),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length,
    requests: performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    contrast: contrasts.sort((a, b) => a[0] - b[0])[0],
  });
};
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three systems over two seeds, one of whose captions is hostile."""
    root = tmp_path_factory.mktemp("page")
    data = root / "data"
    for number, example in zip(range(40), lineage.load_dataset("shapes", size=16), strict=False):
        caption = HOSTILE if number % 5 == 0 else example.captions[0]
        save_picture(picture(example.image), data / f"{number:02d}.png")
        (data / f"{number:02d}.txt").write_text(caption)
    report = lineage.compare(
        ["retrieval", "ddpm", "vqvae"],
        data=f"folder:{data}?splits=seeded",
        preset="smoke",
        steps=8,
        seeds=2,
        pictures=20,
        out=root / "out",
        scorer="none",
        features="judge",
    )
    text = report.read_text(encoding="utf-8")
    assert HOSTILE not in text and HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in text
    probed = root / "probed.html"
    probed.write_text(text.replace("<head>", "<head>" + PROBE), encoding="utf-8")
    return probed


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_readable(page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    """No error, no request, nothing wider than the window, all pictures, contrast of 4.5."""
    found = probe(page, width, dark, tmp_path)
    assert found["dark"] is dark
    assert found["errors"] == [] and found["requests"] == []
    assert found["width"] <= 0 and found["wide"] == []
    assert found["images"] > 24 and found["broken"] == 0
    assert found["contrast"][0] >= 4.5, found["contrast"]


def probe(page: Path, width: int, dark: bool, profile: Path) -> dict[str, Any]:
    """What the probe finds in a window of this width."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r"<title>(\{.*?\})</title>", result.stdout, re.DOTALL)
    assert match is not None, result.stdout[:500] + result.stderr[-500:]
    return dict(json.loads(html.unescape(match[1])))
