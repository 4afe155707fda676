"""The work of image-causal attention, as a list: which tokens attend to which image.

Twin of `miniflamingo.xattn.work_list`, built on phi's own device and without waiting for it. Each
row's tokens are sorted by the image they attend to (a stable sort, so any phi will do), and every
image's run of tokens is cut into items of at most `chunk`. Tokens that attend to nothing are items
of "image 0"; an image that nobody attends to owns one empty item. Letters: B batch, L text tokens,
N images of a row, R visual tokens of an image, H heads, K head width.

Algorithm. One kernel; a program takes up to 8 images of a row (0 among them). It counts the row's
tokens of earlier images and of its own, which says where a run begins and ends in order, then
writes its own tokens there. No program needs another's result, because places in the lists follow
from begin and end alone: the first item of image n stands at n + begin // chunk, the first slot
after as many as runs of more than chunk tokens can need in `begin` tokens. That leaves gaps, which
are filled with items of nothing. Work: B * (N + 1) * L comparisons.

Tested (interpreter): any phi, B, L and N from 0; not tested: any GPU.
"""

from typing import NamedTuple

from .runtime import (
    INTERPRET,
    cast,
    describe,
    launch,
    operator,
    store_rows,
    tl,
    torch,
    triton,
)

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class Source(NamedTuple):
    """What a list of work was built from: another phi would give wrong results with it."""

    name: str
    tensor: torch.Tensor  # kept, so that no other tensor can take its place in memory
    version: int | None  # how often it had been written to; None where torch does not count

    @classmethod
    def of(cls, name, tensor):
        """Remember a tensor as it is now. Under torch.compile, and of inference mode: uncounted."""
        uncounted = torch.compiler.is_compiling() or tensor.is_inference()
        return cls(name, tensor, None if uncounted else tensor._version)

    def check(self, given, may_wait):
        """ValueError unless `given` is what the work was built from, or holds the same.

        The same tensor, or a view of all of it, costs nothing to find out; the contents of another
        one are compared where that does not make the host wait, or may_wait.
        """
        tensor, compiling = self.tensor, torch.compiler.is_compiling()
        if not (compiling or self.version is None) and tensor._version != self.version:
            raise ValueError(f"work must be built again: its {self.name} was written to since then")
        if given is not tensor and (compiling or not _same(given, tensor, may_wait)):
            raise ValueError(f"work must be built from the {self.name} given, got that of another")


def _same(x, y, may_wait):
    """Whether two tensors share all of their memory or, where that may be read, are equal."""
    memories = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (x, y)]
    if memories[0] == memories[1]:
        return True
    if not (may_wait or x.device.type == "cpu") or x.device != y.device:
        return False
    return torch.equal(x.long(), y.long())  # in either's own dtype the other's might wrap


def check_chunk(chunk):
    """ValueError unless chunk, the most of an item, is None or a positive integer."""
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an integer above 0, got {chunk!r}")


def check_device(name, x):
    """ValueError unless kernels can read the tensor here."""
    if not (INTERPRET.value or x.is_cuda):
        raise ValueError(f"{name} must be on a GPU (cuda), got {describe(x)}")


class WorkList(NamedTuple):
    """The tokens of a batch grouped by image; depends on phi alone, so all layers share one."""

    order: torch.Tensor  # int32 [B, L]: each row's tokens, image by image
    # int32 [I, 5]: batch row, image (0: none), begin and end in order; a slot for its partial sums,
    # if other items share the image, else -1
    items: torch.Tensor  # of the forward pass, which needs no slots, and has none
    backward_items: torch.Tensor
    splits: torch.Tensor  # int32 [S, 3]: one of B*N images, its first slot and how many, or 0
    shape: tuple  # (B, L, N)
    chunks: tuple  # the most tokens of an item, forward and backward
    source: Source | None = None  # phi; None inside the operators, which are given the rest

    @property
    def num_slots(self):
        """Room for partial sums: at most this many items share their image with another."""
        B, L, N = self.shape
        return B * most_splits(N, L, self.chunks[1])[1]


def build_work_list(phi, N, heads=1, check=True, chunk=None):
    """Group the tokens by image, on phi's device -> WorkList. phi int[B, L] in 0..N.

    N images in a row; heads is that of the attention, from which `chunk` follows by default. All
    sizes are known on the host, so nothing waits for the device, except that check=True reads phi
    there (see check_phi); unchecked, a phi outside 0..N counts as 0. The list is for this phi, as
    it is now (see Source.check). ValueError as check_phi, and for a wrong chunk or device.
    """
    check_phi(phi, N, check)
    check_chunk(chunk)
    check_device("phi", phi)
    chunks = (chunk, chunk) if chunk else choose_chunks(phi.numel() * heads)
    return WorkList(*_build(phi, N, *chunks), (*phi.shape, N), chunks, Source.of("phi", phi))


def count_items(shape, chunks):
    """How many items a list of shape (B, L, N) has, for each of two chunks."""
    B, L, N = shape
    return tuple(B * (N + 1 + L // chunk) for chunk in chunks)


def most_splits(runs, tokens, chunk):
    """The most of `runs` runs that can be longer than chunk, with so many tokens, and their items.

    Also the most of both that come before a place in order: hence the places of what comes there.
    """
    splits = min(runs, tokens // (chunk + 1))
    return splits, splits + (tokens - splits) // chunk if splits else 0


def check_phi(phi, N, check=True):
    """ValueError unless phi is int [B, L]; with check=True also unless 0 <= phi <= N."""
    if phi.ndim != 2 or phi.dtype not in INTEGERS:
        raise ValueError(f"phi must be int [B, L], got {phi.dtype} {list(phi.shape)}")
    if check and phi.numel():
        low, high = (int(x) for x in phi.aminmax())
        if low < 0 or high > N:
            raise ValueError(f"phi must lie in 0..{N} (N = {N} images), got {low}..{high}")


def choose_chunks(rows):
    """Tokens of an item, forward and backward, for B*L*H = rows.

    Short enough that one image alone gives 2,048 programs, several for each place of a GPU, so that
    the last round of them, which few take part in, is short; in the backward pass 256, about one
    for each place, for there every item more means partial sums. By prediction, not by measurement.
    """
    return tuple(_longest(rows // programs, most) for programs, most in ((2048, 512), (256, 2048)))


def _longest(rows, most):  # the power of two, 64 to most, that is at most rows
    chunk = 64
    while chunk < most and 2 * chunk <= rows:
        chunk *= 2
    return chunk


# --- building it --------------------------------------------------------------------------------


@triton.jit
def _list_work(
    phi_ptr, order_ptr, items_ptr, backward_ptr, splits_ptr, phi_b, phi_l, L, N,
    chunk, backward_chunk, num_splits, num_slots, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N + 1, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    image = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    phi_ptr += b * phi_b
    earlier = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    own = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in range(0, L, BLOCK_M):
        token, n = _load_images(phi_ptr, start, phi_l, L, N, BLOCK_M)
        earlier += (n < image[:, None]).to(tl.int32)
        own += (n == image[:, None]).to(tl.int32)
    begin = tl.sum(earlier, 1)
    end = begin + tl.sum(own, 1)
    order_ptr += b * L
    place = begin  # in order, of the next of each image's tokens
    for start in range(0, L, BLOCK_M):
        token, n = _load_images(phi_ptr, start, phi_l, L, N, BLOCK_M)
        own = (n == image[:, None]).to(tl.int32)
        places = place[:, None] + tl.cumsum(own, 1) - own
        tl.store(order_ptr + places, tl.broadcast_to(token, [BLOCK_N, BLOCK_M]), own > 0)
        place += tl.sum(own, 1)
    splits_ptr += b * num_splits * 3
    slot = store_split(splits_ptr, b * N, b * num_slots, image, N, begin, end, backward_chunk)
    items_ptr += b * (N + 1 + L // chunk) * 5
    backward_ptr += b * (N + 1 + L // backward_chunk) * 5
    _store_items(items_ptr, b, image, N, begin, end, tl.full([BLOCK_N], -1, tl.int32), chunk)
    _store_items(backward_ptr, b, image, N, begin, end, slot, backward_chunk)


@triton.jit
def _load_images(phi_ptr, start, phi_l, L, N, BLOCK_M: tl.constexpr):
    """Some tokens and their images, [1, M] both; a token past the end has none of 0..N."""
    token = (start + tl.arange(0, BLOCK_M))[None, :]
    n = tl.load(phi_ptr + token.to(tl.int64) * phi_l, token < L, other=0).to(tl.int64)
    n = tl.where((n >= 0) & (n <= N), n, 0).to(tl.int32)
    return token, tl.where(token < L, n, 2**31 - 1)


@triton.jit
def store_split(splits_ptr, owner, slot, run, runs, begin, end, chunk):
    """List the runs that have several items, of some of 1..runs -> their first slots, or -1.

    owner and slot are the number of run 1 and of the first slot. The list has as many places for a
    run as `most_splits` grows by it; all but the first of a run with several items say: no slots.
    """
    place, slots = _most_splits(tl.maximum(run - 1, 0), begin, chunk)
    next_place, _ = _most_splits(run, end, chunk)
    room = tl.where(run <= runs, next_place - place, 0)
    is_split = (run > 0) & (end - begin > chunk)
    slot = (slot + slots).to(tl.int32)
    splits_ptr += place * 3
    count = tl.where(is_split, (end - begin + chunk - 1) // chunk, 0)
    for i in range(0, tl.max(room)):
        tl.store(splits_ptr, (owner + run - 1).to(tl.int32), i < room)
        tl.store(splits_ptr + 1, slot, i < room)
        tl.store(splits_ptr + 2, count, i < room)
        splits_ptr += 3
        count = tl.zeros_like(count)
    return tl.where(is_split, slot, -1)


@triton.jit
def _most_splits(runs, tokens, chunk):
    splits = tl.minimum(runs, tokens // (chunk + 1))
    return splits, tl.where(splits > 0, splits + (tokens - splits) // chunk, 0)


@triton.jit
def cut(run, runs, begin, end, chunk):
    """Cut some of the runs 0..runs into items -> their first place in the list, room, number.

    There may be room for one more item, one of nothing.
    """
    room = tl.where(run <= runs, 1 + end // chunk - begin // chunk, 0)
    return run + begin // chunk, room, tl.maximum((end - begin + chunk - 1) // chunk, 1)


@triton.jit
def locate_items(begin, end, chunk, start, PARTS: tl.constexpr):
    """Items start.. of some runs: their numbers [1, PARTS], and what they hold, [runs, PARTS]."""
    part = (start + tl.arange(0, PARTS))[None, :]
    item_begin = begin[:, None] + tl.minimum(part * chunk, (end - begin)[:, None])
    return part, item_begin, tl.minimum(item_begin + chunk, end[:, None])


@triton.jit
def _store_items(items_ptr, b, image, N, begin, end, slot, chunk, PARTS: tl.constexpr = 32):
    place, room, count = cut(image, N, begin, end, chunk)
    for start in range(0, tl.max(room), PARTS):
        part, item_begin, item_end = locate_items(begin, end, chunk, start, PARTS)
        item, is_item = items_ptr + (place[:, None] + part) * 5, part < count[:, None]
        is_listed = part < room[:, None]
        tl.store(item, b.to(tl.int32), is_listed)
        tl.store(item + 1, tl.where(is_item, image[:, None], 0), is_listed)
        tl.store(item + 2, item_begin, is_listed)
        tl.store(item + 3, item_end, is_listed)
        is_shared = is_item & (slot >= 0)[:, None]
        tl.store(item + 4, tl.where(is_shared, slot[:, None] + part, -1), is_listed)


def launch_list(phi, N, chunk, backward_chunk):
    """Start the kernel -> order, items, backward_items, splits, as in WorkList.

    With tiles of 4,096 numbers instead of 2,048, sm_90 spills 24 bytes.
    """
    B, L = phi.shape
    num_splits, num_slots = most_splits(N, L, backward_chunk)
    lists = _empty_lists(phi, N, chunk, backward_chunk)
    BLOCK_N = min(8, triton.next_power_of_2(N + 1))
    launch(
        _list_work, B * triton.cdiv(N + 1, BLOCK_N), phi, *lists, *phi.stride(), L, N,
        chunk, backward_chunk, num_splits, num_slots,
        BLOCK_N=BLOCK_N, BLOCK_M=2048 // BLOCK_N, num_warps=8,
    )  # fmt: skip
    return lists


def _empty_lists(phi, N, chunk, backward_chunk):
    B, L = phi.shape
    items = count_items((B, L, N), (chunk, backward_chunk))
    shapes = (B, L), *((count, 5) for count in items), (B * most_splits(N, L, backward_chunk)[0], 3)
    return tuple(torch.empty(s, dtype=torch.int32, device=phi.device) for s in shapes)


@operator("work_list")
def _build(
    phi: torch.Tensor, N: int, chunk: int, backward_chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_list(phi, N, chunk, backward_chunk)


_build.register_fake(_empty_lists)


# --- what the kernels do with it ----------------------------------------------------------------


@triton.jit
def load_item(items_ptr, item):
    """An item's batch row, image, and range of places in order; 64 bits where offsets follow."""
    items_ptr += item * 5
    b, image = tl.load(items_ptr).to(tl.int64), tl.load(items_ptr + 1).to(tl.int64)
    return b, image, tl.load(items_ptr + 2), tl.load(items_ptr + 3)


@triton.jit
def store_zeros(
    ptr, order_ptr, begin, end, stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Zeros for the tokens at places begin..end of order."""
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        token = tl.load(order_ptr + place, place < end, other=0)
        zeros = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        store_rows(ptr, token, stride, place < end, zeros, K, BLOCK_K)


@triton.jit
def _sum_partials(
    part_ptr, out_ptr, more_part_ptr, more_out_ptr, splits_ptr, size,
    MORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    splits_ptr += tl.program_id(0) // blocks * 3
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image, slot = tl.load(splits_ptr).to(tl.int64), tl.load(splits_ptr + 1).to(tl.int64)
    slots = tl.load(splits_ptr + 2)
    if slots > 0:
        _add_up(part_ptr + slot * size, out_ptr + image * size, i, slots, size, BLOCK)
        if MORE:
            _add_up(more_part_ptr + slot * size, more_out_ptr + image * size, i, slots, size, BLOCK)


@triton.jit
def _add_up(part_ptr, out_ptr, i, slots, size, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], part_ptr.dtype.element_ty)
    for _ in range(slots):
        total += tl.load(part_ptr + i, i < size, other=0.0)
        part_ptr += size
    tl.store(out_ptr + i, cast(total, out_ptr.dtype.element_ty), i < size)


def sum_partials(parts, outs, splits, BLOCK=1024):
    """Add up the partial sums [slots, ...] of split images, into one or two outs [images, ...].

    Images with one item are left alone. One launch; none where no image can be split.
    """
    if len(splits):
        size, more = parts[0][0].numel(), len(parts) > 1
        programs = len(splits) * triton.cdiv(size, BLOCK)
        tensors = parts[0], outs[0], parts[-1], outs[-1]
        launch(_sum_partials, programs, *tensors, splits, size, MORE=more, BLOCK=BLOCK)
