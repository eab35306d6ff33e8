"""Moving-average codebook (van den Oord et al. 2017, appendix A.1) of
lucidrains/vector-quantize-pytorch: outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineage.official.verify import Verifier, output
from lineage.vqvae.quantise import Quantised, QuantiserConfig, VectorQuantiser

NAMES = {"embed": "embedding", "cluster_size": "cluster_size", "embed_avg": "cluster_sum"}


class VQEMAOutputs(Verifier):
    """Outputs of `VectorQuantize`, before and after training steps on the same vectors."""

    name = "vq_ema"
    source = ("lucidrains/vector-quantize-pytorch",)

    def quantiser(self, steps: int = 0) -> VectorQuantiser:
        """Ours, after so many training steps on the file's vectors."""
        config = QuantiserConfig(
            num_codes=self.config["codebook_size"],
            code_dim=self.config["dim"],
            beta=self.config["commitment_weight"],
            ema_decay=self.config["decay"],
            init="normal",
            restart_threshold=0.0,
        )
        quantiser = VectorQuantiser(config).train()
        official = self.state[""]
        state = {ours: official[f"_codebook.{name}"][0] for name, ours in NAMES.items()}
        quantiser.load_state_dict({**state, "initialised": torch.tensor(True)})
        for _ in range(steps):
            quantiser(self.inputs["x"])
        return quantiser

    def quantised(self, mode: str) -> Quantised:
        return self.quantiser().train(mode == "train")(self.inputs["x"])

    @output("(eval|train)_indices")
    def indices(self, mode: str) -> Tensor:
        return self.quantised(mode).ids

    @output("(eval|train)_quantized")
    def quantized(self, mode: str) -> Tensor:
        return self.quantised(mode).z_q

    @output("train_commit_loss")
    def train_commit_loss(self) -> Tensor:
        return self.quantised("train").terms["commitment"]

    @output("eval_loss")
    def eval_loss(self) -> float:
        """Zero: outside of training the official code has no loss, and ours is not used."""
        return 0.0

    @output(r"after(\d*)/_codebook\.(embed|cluster_size|embed_avg)")
    def statistic(self, steps: str, name: str) -> Tensor:
        return getattr(self.quantiser(int(steps or 1)), NAMES[name])[None]

    @output(r"after(\d*)/_codebook\.initted")
    def initialised(self, steps: str) -> Tensor:
        return self.quantiser(int(steps or 1)).initialised
