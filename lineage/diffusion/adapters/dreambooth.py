"""`dreambooth`: a subject from a few pictures (Ruiz et al. 2022, arXiv:2208.12242).

The problem: a model draws any dog, and not mine. What is new: fine-tune the whole network on three
to five pictures of the subject, captioned with a rare word and its class ("a sks dog"), and at the
same time on pictures of the class that the model itself has drawn, so that it does not forget what
a dog is.

    section 3.2              a rare word for the subject: one that the model knows nothing about.
                             With a tokeniser of words, any word that it has never read
    section 3.3, equation 2  L = E |x - x_hat(x_t, c)|^2 + lambda E |x_pr - x_hat(x_pr_t, c_pr)|^2
                                                                              `turn`
    section 3.3              x_pr = the frozen base's own samples for captions c_pr of the class
                                                                `data/prior.py`, and the recipe

Rows 0, 2, 4, ... of a batch are of the subject and the others of the class. With `use_lora` a
low-rank adapter is trained in place of a copy of the network, as the community does.

Departures: the text encoder stays as it is (the paper trains it, too); the class pictures may be
of everything that the base draws, since the words of a small data set have no classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from lineage.bounds import NonNegativeFloat, PositiveInt, Texts
from lineage.config import configuration
from lineage.diffusion.adapters.adapted import ADAPTER, AdaptedModel
from lineage.diffusion.adapters.lora import LoRAConfig, LoRANetwork, make_lora
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError
from lineage.system import Trainable, Turn


@configuration
class DreamBoothConfig:
    """Prior preservation.

    Attributes:
        prior_weight: Weight lambda of the loss on pictures of the class; 0 leaves them out.
        num_prior: Number of pictures of the class, which the base draws before the training.
        prior_captions: Captions of those pictures; if empty, those of `prior_data`.
        prior_data: Data set that the captions are taken from.
        use_lora: If true, a low-rank adapter is trained in place of the whole network.
    """

    prior_weight: NonNegativeFloat = 1.0
    num_prior: PositiveInt = 200
    prior_captions: Texts = ()
    prior_data: str = "shapes"
    use_lora: bool = False


class DreamBoothModel(AdaptedModel):
    """A base, and the fine-tuned network of a subject.

    Args:
        base: Trained model.
        config: Prior preservation.
        lora: Sizes of the low-rank adapter, if one is used.
    """

    def __init__(self, base: DiffusionModel, config: DreamBoothConfig, lora: LoRAConfig) -> None:
        if config.use_lora:
            adapter = make_lora(base, lora)
            super().__init__(base, LoRANetwork(base.network, adapter), adapter)
        else:
            network = copy.deepcopy(base.network).requires_grad_(True)
            super().__init__(base, network, network)
        self.prior_weight = config.prior_weight

    def check_shape(self, height: int, width: int) -> None:
        if self.training and self.prior_weight > 0:  # the class is drawn as squares
            Trainable.check_shape(self, height, width)
        super().check_shape(height, width)

    def turn(self, rows: Mapping[str, Tensor]) -> Turn:
        """Equation 2."""
        loss = torch.stack([*rows.values()]).sum(0)  # (B,)
        if self.prior_weight == 0:
            return Turn(ADAPTER, {"subject": loss.mean()})
        if len(loss) == 1:
            raise UserError(
                "A batch of 1 holds no picture of the class: set train.batch_size=2 or more, or "
                "adapter.prior_weight=0."
            )
        subject, prior = loss[0::2].mean(), loss[1::2].mean()
        return Turn(ADAPTER, {"subject": subject, "prior": self.prior_weight * prior})
