"""`verify` for the metrics: pytorch-fid, torchmetrics and the formulas of the papers."""

from __future__ import annotations

import re
from functools import cached_property

import torch
from torch import Tensor

from lineage.evaluation import metrics
from lineage.official.verify import NotComputed, Verifier, output


class Metrics(Verifier):
    """Metrics of two sets of features, of class probabilities, and of pairs of embeddings."""

    name = "metrics"
    source = ("pytorch-fid", "torchmetrics")

    @output("mu_(real|fake)")
    def mean(self, side: str) -> Tensor:
        return metrics.mean_and_covariance(self.inputs[side])[0]

    @output("sigma_(real|fake)")
    def covariance(self, side: str) -> Tensor:
        return metrics.mean_and_covariance(self.inputs[side])[1]

    @output("fid", r"fid_first_?(\d+)")
    def fid(self, count: str | None = None) -> float:
        return metrics.frechet_distance(*self._first(count))

    @output("fid_self")
    def fid_self(self) -> float:
        return metrics.frechet_distance(self.inputs["real"], self.inputs["real"])

    @output("kid_unbiased", r"kid_unbiased_first_?(\d+)")
    def kid(self, count: str | None = None) -> float:
        return metrics.kernel_distance(*self._first(count))

    def _first(self, count: str | None) -> tuple[Tensor, Tensor]:
        """The first `count` rows of real and of generated features, or all."""
        rows = None if count is None else int(count)
        return self.inputs["real"][:rows], self.inputs["fake"][:rows]

    @output(r"k(\d+)/(precision|recall)")
    def precision_recall(self, k: str, which: str) -> Tensor:
        values = metrics.precision_recall(self.inputs["real"], self.inputs["fake"], int(k))
        return values[which == "recall"].mean()

    @output(r"k(\d+)/(density|coverage)")
    def density_coverage(self, k: str, which: str) -> Tensor:
        values = metrics.density_coverage(self.inputs["real"], self.inputs["fake"], int(k))
        return values[which == "coverage"].mean()

    @cached_property
    def split_scores(self) -> Tensor:
        """The inception score of each part; the file says how many parts there are."""
        sentence = str(self.reference.sentences.get("output/inception_score_splits", ""))
        number = re.search(r"(\d+) consecutive splits", sentence)
        if "inception_score_splits" in self.outputs:
            splits = self.outputs["inception_score_splits"].numel()
        elif "splits" in self.config:
            splits = int(self.config["splits"])
        elif number:
            splits = int(number[1])
        else:
            raise NotComputed("the file does not say the number of splits")
        return metrics.inception_score(self.inputs["is_probs"], splits)

    @output("inception_score_splits")
    def inception_score_splits(self) -> Tensor:
        return self.split_scores

    @output("inception_score_mean_std")
    def inception_score(self) -> Tensor:
        return torch.stack([self.split_scores.mean(), self.split_scores.std(correction=0)])

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Features of the first pictures and of their captions."""
        text = self.inputs["clip_text"]
        return self.inputs["real"][: len(text)], text

    @output("clip_score")
    def clip_score(self) -> Tensor:
        return metrics.clip_score(*self._pairs()).mean()

    @output("clip_score_torchmetrics_order")
    def clip_score_clamped_last(self) -> Tensor:
        return (100 * metrics.cosine(*self._pairs())).mean().clamp(min=0)

    @output("r_precision")
    def r_precision(self) -> Tensor:
        return metrics.r_precision(
            self.inputs["rprec_image"], self.inputs["rprec_candidates"]
        ).mean()

    @output("rprec_cosine")
    def r_precision_cosine(self) -> Tensor:
        return metrics.cosine(self.inputs["rprec_image"][:, None], self.inputs["rprec_candidates"])
