"""The work of image-causal attention, as a list: which tokens attend to which image.

Twin of `miniflamingo.xattn.work_list`, built on phi's own device and without waiting for it. Each
row's tokens are sorted by the image they attend to (a stable sort, so any phi will do), and every
image's run of tokens is cut into items of at most `chunk`. Tokens that attend to nothing are items
of "image 0"; an image that nobody attends to owns one empty item. Letters: B batch, L text tokens,
N images of a row, R visual tokens of an image, H heads, K head width.
"""

from typing import NamedTuple

from .runtime import cast, launch, store_rows, tl, torch, triton

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


class WorkList(NamedTuple):
    """The tokens of a batch grouped by image; depends on phi alone, so all layers share one."""

    order: torch.Tensor  # int32 [B, L]: each row's tokens, image by image
    items: torch.Tensor  # int32 [I, 5]: batch row, image (0: none), begin and end in order, slot
    splits: torch.Tensor  # int32 [B*N, 2]: an image's first slot and its number of slots, or 0
    shape: tuple  # (B, L, N)
    chunk: int  # the most tokens of an item
    source: Source | None = None  # phi; None inside the operators, which are given the rest

    @property
    def num_slots(self):
        """Room for partial sums: at most this many items share their image with another."""
        B, L, N = self.shape
        return B * L // self.chunk + min(B * N, B * L // (self.chunk + 1))


def build_work_list(phi, N, heads=1, check=True, chunk=None):
    """Group the tokens by image, on phi's device -> WorkList. phi int[B, L] in 0..N.

    N images in a row; heads is that of the attention, from which `chunk` follows by default. All
    sizes are known on the host, so nothing waits for the device, except that check=True reads phi
    there (see check_phi); unchecked, a phi outside 0..N counts as 0. The list is for this phi, as
    it is now (see Source.check). ValueError as check_phi, and for a wrong chunk.
    """
    check_phi(phi, N, check)
    check_chunk(chunk)
    (B, L), source = phi.shape, Source.of("phi", phi)
    chunk = chunk or choose_chunk(B * L * heads)
    phi = phi.long()
    phi = torch.where((phi >= 0) & (phi <= N), phi, 0)
    ordered, order = phi.sort(dim=1, stable=True)
    images = torch.arange(N + 2, device=phi.device).repeat(B, 1)  # image 0 stands for no image
    runs = torch.searchsorted(ordered, images)  # [B, N + 2]: where each image's run begins in order
    items, splits = cut_runs(runs, L, chunk)
    order = order.int().contiguous()  # sorting keeps phi's strides
    return WorkList(order, items.int(), splits.int(), (B, L, N), chunk, source)


def cut_runs(runs, L, chunk):
    """Cut the runs of tokens into items -> items [I, 5], splits [B*N, 2], as in WorkList."""
    B, images = runs.shape[0], runs.shape[1] - 1  # images count "image 0"
    begin, end = runs[:, :-1].flatten(), runs[:, 1:].flatten()  # of each run, [B * images]
    count = ((end - begin + chunk - 1) // chunk).clamp(min=1)  # of items, also for an empty run
    last = count.cumsum(0)
    item = torch.arange(len(count) + B * L // chunk, device=runs.device)  # as many as can be
    run = torch.searchsorted(last, item, right=True)  # the item's; beyond all runs, it is spare
    spare, run = run >= len(count), run.clamp(max=max(len(count) - 1, 0))
    part = item - (last - count)[run]
    image = torch.where(spare, 0, run % images)
    # partial sums: only images with several items have slots
    is_split = (count > 1) & (torch.arange(len(count), device=runs.device) % images > 0)
    slots = torch.where(is_split, count, 0)
    first_slot = slots.cumsum(0) - slots
    slot = torch.where(is_split[run] & ~spare, first_slot[run] + part, -1)
    begin = begin[run] + part * chunk
    end = torch.where(spare, begin, torch.minimum(begin + chunk, end[run]))
    splits = torch.stack([first_slot, slots], dim=1).view(B, images, 2)[:, 1:].reshape(-1, 2)
    return torch.stack([run // images, image, begin, end, slot], dim=1), splits


def check_phi(phi, N, check=True):
    """ValueError unless phi is int [B, L]; with check=True also unless 0 <= phi <= N."""
    if phi.ndim != 2 or phi.dtype not in INTEGERS:
        raise ValueError(f"phi must be int [B, L], got {phi.dtype} {list(phi.shape)}")
    if check and phi.numel():
        low, high = (int(x) for x in phi.aminmax())
        if low < 0 or high > N:
            raise ValueError(f"phi must lie in 0..{N} (N = {N} images), got {low}..{high}")


def choose_chunk(rows):
    """Tokens of an item, 64 to 512, for B*L*H = rows: long enough that partial sums stay cheap,
    short enough that one image alone gives 512 programs, about four for each processor of a GPU."""
    chunk = 64
    while chunk < 512 and rows // (2 * chunk) >= 512:
        chunk *= 2
    return chunk


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
def _sum_partials(part_ptr, out_ptr, splits_ptr, size, BLOCK: tl.constexpr):
    """Add up the partial sums [slots, size] of each image that has any, into out [B*N, size]."""
    blocks = tl.cdiv(size, BLOCK)
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    slot, slots = tl.load(splits_ptr + image * 2), tl.load(splits_ptr + image * 2 + 1)
    if slots > 0:
        i = block * BLOCK + tl.arange(0, BLOCK)
        part_ptr += slot.to(tl.int64) * size
        total = tl.zeros([BLOCK], part_ptr.dtype.element_ty)
        for _ in range(slots):
            total += tl.load(part_ptr + i, i < size, other=0.0)
            part_ptr += size
        total = cast(total, out_ptr.dtype.element_ty)
        tl.store(out_ptr + image.to(tl.int64) * size + i, total, i < size)


def sum_partials(parts, outs, work, BLOCK=1024):
    """Add up the partial sums of the images that have several items; the others are left alone."""
    if work.num_slots:
        for part, out in zip(parts, outs):
            size = part[0].numel()
            programs = len(work.splits) * triton.cdiv(size, BLOCK)
            launch(_sum_partials, programs, part, out, work.splits, size, BLOCK=BLOCK)
