"""The work of the resampler's attention, as a list: which features belong to which image.

Images and clips share a batch, each with its own number of features, possibly none. Their features
lie in one tensor, image after image: packed (told by offsets), or padded to M rows an image (told
by lengths). They are cut into items of at most `chunk` features, by one kernel and without waiting
for the device, as the tokens of image-causal attention are (see work_list.py). Every image has at
least one item, and the first of them also takes the latents. Letters: B images of the batch, M
features of a padded image, `total` rows of features.
"""

from typing import NamedTuple

from .runtime import describe, launch, operator, tl, torch, triton
from .work_list import (
    INTEGERS,
    Source,
    check_chunk,
    check_device,
    cut,
    locate_items,
    most_splits,
    store_split,
)


class FeatureList(NamedTuple):
    """The features of a batch by image; depends on their numbers alone, so all layers share one."""

    # int32 [I, 6]: image (-1: none); begin and end of its features; where the padding behind them
    # ends; slot for partial sums (-1: the image has no other item); 1 if it takes the latents, or 0
    items: torch.Tensor
    splits: torch.Tensor  # int32 [S, 3]: an image, its first slot and its number of slots, or 0
    shape: tuple  # (B, total)
    chunk: int  # the most features of an item
    source: Source | None = None  # offsets or lengths; None inside the operators

    @property
    def num_slots(self):
        """Room for partial sums: at most this many items share their image with another."""
        return most_splits(*self.shape, self.chunk)[1]


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
    return _list("offsets", offsets, total, -1, heads, chunk)


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
    return _list("lengths", lengths, len(lengths) * M, M, heads, chunk)


def _list(name, given, total, M, heads, chunk):
    """The FeatureList of given lengths or, with M = -1, offsets."""
    check_chunk(chunk)
    check_device(name, given)
    B = len(given) - (M < 0)
    chunk = chunk or choose_chunk(B, total, heads)
    lists = _build(given, total, M, chunk)
    return FeatureList(*lists, (B, total), chunk, Source.of(name, given))


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


# --- building it --------------------------------------------------------------------------------


@triton.jit
def _list_features(
    given_ptr, items_ptr, splits_ptr, stride, B, total, M, chunk,
    PADDED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr = 128,
    PARTS: tl.constexpr = 32,
):  # fmt: skip
    # images, counted from 1; 0 are rows that come before all images
    run = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    if PADDED:
        begin, stop = tl.maximum(run - 1, 0) * M, run * M
        is_image = (run > 0) & (run <= B)
        length = tl.load(given_ptr + (run - 1) * stride, is_image, other=0).to(tl.int64)
        end = begin + tl.minimum(tl.maximum(length, 0), M).to(tl.int32)
    else:
        begin = _largest(given_ptr, stride, run, B, total, BLOCK)
        stop = tl.where(run < B, _largest(given_ptr, stride, run + 1, B, total, BLOCK), total)
        end = tl.where(run > 0, stop, 0)
    slot = store_split(splits_ptr, 0, 0, run, B, begin, stop, chunk)
    place, room, count = cut(run, B, begin, stop, chunk)
    count = tl.where(run > 0, count, 0)
    for start in range(0, tl.max(room), PARTS):
        part, item_begin, item_stop = locate_items(begin, stop, chunk, start, PARTS)
        item, is_item = items_ptr + (place[:, None] + part) * 6, part < count[:, None]
        is_listed, item_end = part < room[:, None], tl.minimum(item_stop, end[:, None])
        tl.store(item, tl.where(is_item, run[:, None] - 1, -1), is_listed)
        tl.store(item + 1, item_begin, is_listed)
        tl.store(item + 2, tl.maximum(item_begin, item_end), is_listed)
        tl.store(item + 3, item_stop, is_listed)
        is_shared = is_item & (slot >= 0)[:, None]
        tl.store(item + 4, tl.where(is_shared, slot[:, None] + part, -1), is_listed)
        tl.store(item + 5, (is_item & (part == 0)).to(tl.int32), is_listed)


@triton.jit
def _largest(offsets_ptr, stride, count, B, total, BLOCK: tl.constexpr):
    """The largest of the first `count` offsets, clamped into 0..total: in order, whatever comes."""
    largest = tl.zeros_like(count).to(tl.int64)
    for start in range(0, tl.minimum(tl.max(count), B + 1), BLOCK):
        i = (start + tl.arange(0, BLOCK))[None, :]
        is_before = (i < count[:, None]) & (i <= B)
        offset = tl.load(offsets_ptr + i * stride, is_before, other=0).to(tl.int64)
        largest = tl.maximum(largest, tl.max(tl.minimum(offset, total), 1))
    return largest.to(tl.int32)


def launch_list(given, total, M, chunk):
    """Start the kernel -> items, splits, as in FeatureList; M is -1 for offsets."""
    B, lists = len(given) - (M < 0), _empty_lists(given, total, M, chunk)
    BLOCK_B = min(16, triton.next_power_of_2(B + 1))
    launch(
        _list_features, triton.cdiv(B + 1, BLOCK_B), given, *lists, given.stride(0), B, total, M,
        chunk, PADDED=M >= 0, BLOCK_B=BLOCK_B,
    )  # fmt: skip
    return lists


def _empty_lists(given, total, M, chunk):
    B = len(given) - (M < 0)
    shapes = (B + 1 + total // chunk, 6), (most_splits(B, total, chunk)[0], 3)
    return tuple(torch.empty(s, dtype=torch.int32, device=given.device) for s in shapes)


@operator("feature_list")
def _build(
    given: torch.Tensor, total: int, M: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_list(given, total, M, chunk)


_build.register_fake(_empty_lists)


@triton.jit
def load_features(items_ptr, item):
    """An item as in FeatureList.items; 64 bits where offsets follow."""
    items_ptr += item * 6
    image, begin, end = tl.load(items_ptr), tl.load(items_ptr + 1), tl.load(items_ptr + 2)
    stop, slot, latents = tl.load(items_ptr + 3), tl.load(items_ptr + 4), tl.load(items_ptr + 5)
    return image.to(tl.int64), begin, end, stop, slot.to(tl.int64), latents
