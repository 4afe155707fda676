"""The work of the resampler's attention, as a list: which features belong to which image.

Images and clips share a batch, each with its own number of features, possibly none. Their features
lie in one tensor, image after image: packed (told by offsets), or padded to M rows an image (told
by lengths). They are cut into items of at most `chunk` features, on the device and without waiting
for it, by the same `cut_runs` as the tokens of image-causal attention. Every image has at least one
item, and the first of them also takes the latents. Letters: B images of the batch, M features of a
padded image, `total` rows of features.
"""

from typing import NamedTuple

from .runtime import describe, tl, torch, triton
from .work_list import INTEGERS, Source, check_chunk, cut_runs


class FeatureList(NamedTuple):
    """The features of a batch by image; depends on their numbers alone, so all layers share one."""

    # int32 [I, 6]: image (-1: none); begin and end of its features; where the padding behind them
    # ends; slot for partial sums (-1: the image has no other item); 1 if it takes the latents, or 0
    items: torch.Tensor
    splits: torch.Tensor  # int32 [B, 2]: an image's first slot and its number of slots, or 0
    shape: tuple  # (B, total)
    chunk: int  # the most features of an item
    source: Source | None = None  # offsets or lengths; None inside the operators

    @property
    def num_slots(self):
        """Room for partial sums: at most this many items share their image with another."""
        B, total = self.shape
        return 0 if total <= self.chunk else total // self.chunk + min(B, total // (self.chunk + 1))


def build_feature_list(offsets, total, heads=1, check=True, chunk=None):
    """Packed features: image b owns rows offsets[b] to offsets[b + 1] -> FeatureList.

    offsets int[B + 1], from 0 up to `total`. heads is that of the attention, from which `chunk`
    follows by default. check=True reads the offsets, for which the host waits for the device;
    unchecked, wrong ones are clamped into order and range. ValueError otherwise.
    """
    if offsets.ndim != 1 or not len(offsets) or offsets.dtype not in INTEGERS:
        raise ValueError(f"offsets must be int [B + 1], got {describe(offsets)}")
    if check:
        read = offsets.tolist()
        if read[0] or read[-1] != total or read != sorted(read):
            raise ValueError(
                f"offsets must rise from 0 to {total}, the number of features, got {read}"
            )
    bounds = offsets.long().clamp(0, total).cummax(0).values
    bounds[-1:] = total
    return _cut(bounds, bounds[1:], total, heads, chunk, Source.of("offsets", offsets))


def build_padded_list(lengths, M, heads=1, check=True, chunk=None):
    """Padded features: of its M rows, image b owns the first lengths[b] -> FeatureList.

    lengths int[B] in 0..M; heads, check and chunk as in build_feature_list. ValueError otherwise.
    """
    if lengths.ndim != 1 or lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be int [B], got {describe(lengths)}")
    if check and len(lengths):
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > M:
            raise ValueError(f"lengths must lie in 0..{M} (M = {M} features), got {low}..{high}")
    B = len(lengths)
    starts = torch.arange(B + 1, device=lengths.device) * M
    ends = starts[:-1] + lengths.long().clamp(0, M)
    return _cut(starts, ends, B * M, heads, chunk, Source.of("lengths", lengths))


def _cut(bounds, ends, total, heads, chunk, source):
    """bounds [B + 1] of the images' rows, ends [B] of their features -> FeatureList."""
    check_chunk(chunk)
    B = len(ends)
    chunk = chunk or choose_chunk(B, total, heads)
    pad = torch.nn.functional.pad
    runs, ends = pad(bounds, (1, 0)), pad(ends, (1, 0))  # cut_runs counts from "image 0"
    runs[-1:] = total  # no image at all: then the rows are padding
    items, splits = cut_runs(runs[None], total, chunk)
    image, begin, stop, slot = items[:, 1:].unbind(1)
    end = torch.maximum(begin, torch.minimum(stop, ends[image]))
    latents = (image > 0) & (begin == runs[image])
    items = torch.stack([image - 1, begin, end, stop, slot, latents], dim=1)
    return FeatureList(items.int(), splits.int(), (B, total), chunk, source)


def choose_chunk(B, total, heads):
    """Features of an item: all, where B*H programs fill a GPU (256, about two for each processor);
    else 1024 to 128, so that there are so many. An item's partial sums [R, K] in float32, written
    and read again, are as many bytes as the keys and values of 2*R features in 16 bits."""
    if B * heads >= 256:
        return max(total, 1)
    chunk = 1024
    while chunk > 128 and total // chunk * heads < 256:
        chunk //= 2
    return chunk


@triton.jit
def load_features(items_ptr, item):
    """An item as in FeatureList.items; 64 bits where offsets follow."""
    items_ptr += item * 6
    image, begin, end = tl.load(items_ptr), tl.load(items_ptr + 1), tl.load(items_ptr + 2)
    stop, slot, latents = tl.load(items_ptr + 3), tl.load(items_ptr + 4), tl.load(items_ptr + 5)
    return image.to(tl.int64), begin, end, stop, slot.to(tl.int64), latents
