"""The three stages of the small world with torch's gradients: the same batches, optimiser and log.

    training.Run(in_torch(stage), out)

Two to three times as fast as NumPy on one core; `train.py` is for many processes and a GPU.
"""

import torch
import torch.nn.functional as F
from torch import nn

from miniflamingo.prompt import IMAGE, PAD
from miniflamingo.training import by_length
from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import compute_phi

from . import layers
from .real import Gradients, contrastive, flamingo


def in_torch(stage, threads=1):
    """A stage of miniflamingo.training whose gradients torch computes."""
    torch.set_num_threads(threads)
    build, loss = TWINS[stage.name]
    stage.backward = Gradients(stage.model, build, lambda twin, batch: loss(twin, batch, stage))
    return stage


def _language(model):
    with torch.device("meta"):
        return layers.LanguageModel(model.config)


def _language_loss(twin, batch, stage):
    tokens = torch.from_numpy(batch.tokens)
    noise = None if batch.noise is None else torch.from_numpy(batch.noise)
    logits, targets = twin(tokens[:, :-1], noise=noise).flatten(0, 1), tokens[:, 1:]
    return F.cross_entropy(logits, targets.flatten(), ignore_index=PAD)


def _contrastive(model):
    return layers.ContrastiveModel.from_numpy(model).to("meta")


def _contrastive_loss(twin, batch, stage):
    return contrastive(*twin(*map(torch.from_numpy, batch)), stage.config.label_smoothing)


def _flamingo_loss(twin, batch, stage):
    media = twin.resampler(torch.from_numpy(stage.features(batch)), backend="torch")
    phi = torch.from_numpy(compute_phi(batch.tokens, IMAGE, batch.use_next))
    tokens, targets, loss = *map(torch.from_numpy, batch[:2]), 0.0
    for rows, L in by_length(batch.tokens):
        read = tokens[rows, : L - 1], media[rows], phi[rows, : L - 1]
        logits = twin.read(*read, backend="torch", check=False).flatten(0, 1)
        wanted = targets[rows, 1:L].flatten()
        loss = loss + F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return loss / stage.count(batch)


class Aligned(nn.Module):
    """The twin of miniflamingo.fewshot.warm.Aligned."""

    def __init__(self, config):
        super().__init__()
        self.resampler = layers.build_resampler(config)
        self.log_inverse_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, *features):  # [B, 1, 1, S, D_v] * 2 -> the loss, []
        seen = (self.resampler(x, backend="torch").mean(2).squeeze(1) for x in features)
        first, second = (F.normalize(x, dim=-1) for x in seen)
        return contrastive(first, second, self.log_inverse_temperature.exp())


def _aligned(model):
    with torch.device("meta"):
        return Aligned(model.config)


def _aligned_loss(twin, batch, stage):
    return twin(*map(torch.from_numpy, batch))


TWINS = {
    "warm": (_aligned, _aligned_loss),
    "lm": (_language, _language_loss),
    "vision": (_contrastive, _contrastive_loss),
    "flamingo": (flamingo, _flamingo_loss),
}
