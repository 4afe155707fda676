"""The two stages of miniflamingo.real in torch: the same batches, losses, optimiser and log.

    training.Run(in_torch(stage), out)

The twin shares its memory with the NumPy model: an update of one is an update of the other, so
that checkpoints, resuming and the optimiser stay the NumPy run's own, and only the forward and the
backward are torch's.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from miniflamingo.real import features
from miniflamingo.worlds.datasets import IGNORED

from . import layers


def in_torch(stage, threads=None):
    """A stage of miniflamingo.real whose gradients torch computes; threads: None leaves torch's."""
    if threads:
        torch.set_num_threads(threads)
    stage.backward = Gradients(stage.model, *TWINS[stage.name])
    return stage


class Gradients:
    """Stands in for Stage.backward, by the twin of a model."""

    def __init__(self, model, build, loss):
        self.model, self.build, self.loss, self.twin, self.shared = model, build, loss, None, None

    def __call__(self, batch, weight):
        """As Stage.backward."""
        if self.twin is None:  # by now the optimiser has put the parameters where they stay
            self.twin = share(self.build(self.model), self.model)
            own = dict(self.model.named_parameters())
            self.shared = [(own[n], p) for n, p in self.twin.named_parameters() if p.requires_grad]
        loss = self.loss(self.twin, batch)
        (weight * loss).backward()
        for ours, theirs in self.shared:
            if theirs.grad is not None:
                grad = theirs.grad.numpy()
                ours.grad, theirs.grad = grad if ours.grad is None else ours.grad + grad, None
        return loss.item()


def share(twin, model):
    """A twin on the meta device, with the NumPy model's own arrays as its parameters."""
    named = dict(model.named_parameters())
    with warnings.catch_warnings():  # an array that is read-only is frozen, too
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        state = {name: torch.from_numpy(p.data) for name, p in named.items()}
    twin.load_state_dict(state, assign=True)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(named[name].requires_grad)
    return twin


def encode_chunk(folder, artist, first):
    """As miniflamingo.real.features.encode_chunk."""
    torch.set_num_threads(1)
    eye = features.open_eye(folder)
    with torch.device("meta"):
        twin = layers.EfficientNetLite(eye.config)
    twin = share(twin, eye).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def see(pixels):
        grids = twin.grid(torch.from_numpy(pixels).float() / 255)
        return grids.flatten(2).transpose(1, 2).half().numpy()

    return features.encode_with(see, folder, artist, first)


class Aligned(nn.Module):
    """The twin of miniflamingo.real.stages.Aligned."""

    def __init__(self, resampler, dim):
        super().__init__()
        self.resampler, self.dim = resampler, dim
        self.log_inverse_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, features, vectors):  # -> the loss, []
        media = self.resampler(features[:, None, None]).mean(2).squeeze(1)
        images, texts = F.normalize(media[:, : self.dim], dim=-1), F.normalize(vectors, dim=-1)
        return contrastive(images, texts, self.log_inverse_temperature.exp())


def contrastive(images, texts, inverse_temperature, label_smoothing=0.0):  # [B, D] * 2 -> []
    """The twin of miniflamingo.vision.contrastive_loss."""
    logits, own = inverse_temperature * images @ texts.T, torch.arange(len(images))
    cross_entropy = partial(F.cross_entropy, target=own, label_smoothing=label_smoothing)
    return cross_entropy(logits) + cross_entropy(logits.T)


def _aligned(model):
    with torch.device("meta"):
        return Aligned(layers.build_resampler(model.bridge), model.dim)


def _aligned_loss(twin, batch):
    return twin(*(torch.from_numpy(x) for x in batch))


def flamingo(model):
    """The twin of a Flamingo, without storage."""
    with torch.device("meta"):
        return layers.Flamingo(model.config)


def _flamingo_loss(twin, batch):
    media, loss = see(twin, batch.places, batch.stills, batch.clips), 0.0
    for rows, L in batch.groups():
        tokens, targets, phi, shares = (torch.from_numpy(x[rows, :L]) for x in batch[:4])
        learned = targets != IGNORED
        logits = twin.read(tokens, media[rows], phi, check=False, keep=learned)
        nats = F.cross_entropy(logits, targets[learned], reduction="none")
        loss = loss + (nats * shares[learned]).sum()
    return loss


def see(twin, places, stills, clips):
    """As miniflamingo.real.stages.see."""
    seen = [twin.resampler(torch.from_numpy(x)[:, None]) for x in (stills, clips) if len(x)]
    return torch.cat(seen).squeeze(1)[places]


TWINS = {"warm": (_aligned, _aligned_loss), "real": (flamingo, _flamingo_loss)}
