"""A training run laid out over devices: bytes of one device, bytes sent, seconds a step.

    Plan(config, Training(...), Layout(...), devices.find("h200")).memory()

Three ways to spread a model, which multiply: devices = data x tensor x pipeline.

    data       each group of devices has rows of the batch. sharding "none": everything whole in
               each; "zero1": the optimiser's state cut over the groups (Rajbhandari et al., 2020,
               section 5.1); "fsdp2": parameters and gradients, too (their stage 3), gathered a
               unit at a time
    tensor     every matrix cut along the heads or the hidden width (Shoeybi et al., 2019, section
               3): two sums over the group in each block, forward and backward
    pipeline   the blocks in consecutive stages (Narayanan et al., 2021, section 2.2): of m
               micro-batches, (p - 1) / m of the time goes to filling and emptying it

All formulas are sums and products of `counting`'s; what is assumed beyond them, report.assumptions
says.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from miniflamingo.checks import check_at_least, check_range, check_types
from miniflamingo.cost import counting
from miniflamingo.cost.counting import Flops, Sequence
from miniflamingo.cost.devices import Device
from miniflamingo.dialects import check_one_of
from miniflamingo.flamingo import FlamingoConfig

SHARDINGS = ("none", "zero1", "fsdp2")
BYTES = {"bf16": 2, "fp32": 4}
MOMENTS = 8  # AdamW's two, float32
TRAINED = ("resampler", "gated_xattn", "eoc_embedding", "eoc_head")
# The paper's mixture (section 3.2, appendix): a page of M3W is 256 tokens and 5 images, a video 8
# frames. The padded lengths of captions are not stated: about twice their means, 12.4 and 20.5
# tokens, and for videos as for ALIGN.
MIXTURE = {
    "M3W": Sequence(256, 5),
    "ALIGN": Sequence(32, 1),
    "LTIP": Sequence(64, 1),
    "VTP": Sequence(32, 1, 8),
}


@dataclass(frozen=True)
class Layout:
    """How many devices, and how they share the work; ValueError where they can not."""

    devices: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharding: str = "zero1"

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "devices", "tensor", "pipeline")
        check_one_of(self, SHARDINGS, "sharding")
        if self.devices % (self.tensor * self.pipeline):
            raise ValueError(
                "devices must be a multiple of tensor * pipeline, got "
                f"{self.devices} and {self.tensor} * {self.pipeline}"
            )

    @property
    def data(self):
        """How many groups have rows of their own."""
        return self.devices // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class Training:
    """What is trained and how; ValueError for a value that cannot be.

    batch sequences of each of the data sets `sequences` in every step, micro_batch of them at a
    time in each group. precision is that of products, activations and frozen numbers; trained is
    how trained numbers are stored (bf16: with a master copy in float32), gradients how theirs are.
    recompute keeps inputs of units alone; fused attention keeps no weights; eye=False: features of
    the frozen eye come from disk. positions: a matrix D x D a block for relative positions, as in
    the paper's LM. utilisation: the share of the peak that products reach; overlap: the share of
    computing behind which data-parallel communication can hide; reserve: of memory, for what is not
    counted.
    """

    sequences: tuple = (Sequence(256, 5),)
    batch: int = 256
    micro_batch: int = 1
    steps: int = 500_000
    precision: str = "bf16"
    trained: str = "fp32"
    gradients: str = "bf16"
    recompute: bool = True
    fused: bool = True
    eye: bool = True
    positions: bool = True
    utilisation: float = 0.5
    overlap: float = 1.0
    reserve: float = 0.1

    def __post_init__(self):
        check_at_least(self, 1, "batch", "micro_batch", "steps")
        check_one_of(self, tuple(BYTES), "precision", "trained", "gradients")
        check_range(self, 0, 1, "utilisation", "overlap", "reserve")
        if not self.sequences:
            raise ValueError("sequences must hold those of a data set, got none")
        if not self.utilisation:
            raise ValueError("utilisation must be above 0, got 0")


class Sent(NamedTuple):
    """Bytes that each device sends in a step, the bandwidth that they go over, and whether they
    can hide behind computing."""

    bytes: float
    bandwidth: float
    hides: bool


class Numbers(NamedTuple):
    """How many numbers the fullest device's share of the model has, before it is cut over data."""

    trained: float
    frozen: float
    eye: float


@dataclass(frozen=True)
class Plan:
    """A model, its training, a layout, a device. ValueError where they do not fit together."""

    config: FlamingoConfig
    training: Training
    layout: Layout
    device: Device

    def __post_init__(self):
        c, t, n = self.config, self.training, self.layout
        counting.check_config(c)
        heads = {"the LM's": c.lm.heads, "the gated layers'": c.xattn_heads,
                 "the resampler's": c.resampler_heads}  # fmt: skip
        for whose, number in heads.items():
            if number % n.tensor:
                raise ValueError(f"tensor must divide {whose} {number} heads, got {n.tensor}")
        if c.lm.depth % n.pipeline:
            raise ValueError(f"pipeline must divide {c.lm.depth} blocks, got {n.pipeline}")
        if t.batch % (n.data * t.micro_batch):
            raise ValueError(
                "batch must be a multiple of data-parallel groups * micro_batch, got "
                f"{t.batch} and {n.data} * {t.micro_batch}"
            )

    # --- numbers ---

    def parameters(self):
        """{part: numbers} as `sizes` prints them."""
        counts = counting.parameters(self.config)
        if self.training.positions:
            counts["relative positions"] = self.config.lm.depth * self.config.lm.dim**2
        return counts

    def numbers(self):
        """Numbers: of the first stage, which has the resampler, the eye and the table, too."""
        counts, n = self.parameters(), self.layout
        table = self.config.lm.vocab_size * self.config.lm.dim
        blocks = counts["lm"] - table + counts.get("relative positions", 0)
        gated, others = counts["gated_xattn"], sum(counts.get(p, 0) for p in TRAINED)
        trained = gated / n.pipeline + others - gated
        eye = counts["vision_encoder"] * self.training.eye
        return Numbers(trained / n.tensor, (blocks / n.pipeline + table) / n.tensor, eye)

    def unit(self):
        """Numbers of the largest unit: a block of the LM or a gated layer."""
        block = counting.lm_block(self.config) + self.config.lm.dim**2 * self.training.positions
        return max(block, counting.gated_block(self.config))

    # --- memory ---

    def memory(self, recompute=None):
        """{part: bytes} of the fullest device; recompute replaces the training's own."""
        return self.state() | {
            "activations": self.activations(recompute),
            "logits": self.logits(),
            "buffers": self.buffers(),
        }

    def state(self):
        """{part: bytes} of what stays from step to step."""
        t, n, own = self.training, self.layout, self.numbers()
        everything = n.data if n.sharding == "fsdp2" else 1
        optimiser = n.data if n.sharding in ("zero1", "fsdp2") else 1
        return {
            "frozen weights": BYTES[t.precision] * (own.frozen / everything + own.eye),
            "trained weights": BYTES[t.trained] * own.trained / everything,
            "gradients": BYTES[t.gradients] * own.trained / everything,
            "moments": MOMENTS * own.trained / optimiser,
            "master copies": 4 * own.trained / optimiser * (t.trained == "bf16"),
        }

    def activations(self, recompute=None):
        """Bytes kept for the backward pass, of the largest data set's micro-batch, and the eye's
        largest maps. A pipeline's first stage holds p micro-batches of its p-th of the blocks."""
        t, n, c = self.training, self.layout, self.config
        recompute = t.recompute if recompute is None else recompute
        under_way = min(n.pipeline, self.micro_batches()) / n.pipeline
        most = 0
        for s in t.sequences:
            whole, cut = counting.kept(c, s, recompute, t.fused)
            eye = counting.largest_map(c.vision) * s.images * s.frames * t.eye
            most = max(most, (whole + cut / n.tensor) * under_way + eye)
        return BYTES[t.precision] * t.micro_batch * most

    def logits(self):
        """Bytes: as they come, in float32, their log-softmax and its gradient."""
        t = self.training
        each = 12 + 2 * (t.precision == "bf16")
        words = max(s.tokens for s in t.sequences) * self.config.lm.vocab_size
        return each * t.micro_batch * words / self.layout.tensor

    def buffers(self):
        """Bytes for communication: what is gathered or cast, reduced, or on its way."""
        t, n, c = self.training, self.layout, self.config
        gated, compute = counting.gated_block(c) / n.tensor, BYTES[t.precision]
        cast = compute * gated * (t.trained != t.precision)
        reduced = BYTES[t.gradients] * gated * (n.data > 1)
        if n.sharding == "fsdp2" and n.data > 1:  # one unit in use, the next under way
            cast = 2 * compute * self.unit() / n.tensor
        rows = compute * t.micro_batch * max(s.tokens for s in t.sequences) * c.lm.dim
        return cast + reduced + rows * ((n.tensor > 1) + 2 * (n.pipeline > 1))

    def room(self):
        """Bytes of a device that the plan may fill."""
        return self.device.memory * (1 - self.training.reserve)

    def fits(self):
        """Whether the fullest device has room for all of it."""
        return sum(self.memory().values()) <= self.room()

    # --- arithmetic ---

    def micro_batches(self):
        """How many a group works through in a step, of each data set."""
        return self.training.batch // (self.layout.data * self.training.micro_batch)

    def flops(self):
        """{part: Flops} of a step, on all devices."""
        t, total = self.training, {}
        for s in t.sequences:
            for part, number in counting.flops(self.config, s).items():
                number = Flops(number.forward, number.backward, number.again * t.recompute)
                total[part] = total.get(part, Flops()) + number.times(t.batch)
        if not t.eye:
            del total["vision_encoder"]
        return total

    def peak(self):
        """Flops a second of one device in the training's precision."""
        return self.device.flops if self.training.precision == "bf16" else self.device.fp32_flops

    # --- communication ---

    def sent(self):
        """{what: Sent} of a device in the middle of everything, a step."""
        n = self.layout
        parts = {"sums over tensor": self._tensor, "pipeline": self._pipeline,
                 "data": self._data}  # fmt: skip
        sizes = {"sums over tensor": n.tensor, "pipeline": n.pipeline, "data": n.data}
        return {name: part() for name, part in parts.items() if sizes[name] > 1}

    def _link(self, group):
        """The bandwidth between the devices of a group that takes in `group` neighbours."""
        return self.device.link if group <= self.device.near else self.device.far

    def _data(self):
        """Gradients are summed, and what is cut is put together: a ring sends (d - 1) / d of a
        tensor to gather it or to scatter its sum."""
        t, n, own = self.training, self.layout, self.numbers()
        share, compute = (n.data - 1) / n.data, BYTES[t.precision]
        summed = BYTES[t.gradients] * own.trained
        if n.sharding == "fsdp2":  # gathered twice in each micro-batch, forward and backward
            gathered = 2 * compute * (own.trained + own.frozen)
            total = (gathered + summed) * self.micro_batches() * len(t.sequences)
        else:  # scattered and gathered: ZeRO-1 gathers the new weights, where others do the sums
            total = summed + (BYTES[t.trained] * own.trained if n.sharding == "zero1" else summed)
        return Sent(share * total, self._link(n.devices), True)

    def _rows(self, each_token, each_latent, each_feature=0):
        """Bytes of so many tensors [L, D], [N R, D_m] and [N M, D_m] a sequence, for a group."""
        t, c, total = self.training, self.config, 0
        for s in t.sequences:
            features = s.images * s.frames * c.vision.num_features
            media = (each_latent * s.images * c.num_latents + each_feature * features) * c.media_dim
            total += each_token * s.tokens * c.lm.dim + media
        return BYTES[t.precision] * total * t.batch / self.layout.data

    def _tensor(self):
        """Two sums [L, D] a block forward, two backward, two more where it is recomputed; the
        same of the resampler's [N R, D_m], whose features' gradient is a sum, too; one each for
        the table, the head and the gated layers' visual tokens. A sum sends 2 (t - 1) / t."""
        c, n = self.config, self.layout
        passes = 3 if self.training.recompute else 2
        gated, depth = len(c.layers()), c.resampler_depth
        tokens = 2 * passes * (c.lm.depth + gated) / n.pipeline + 2
        total = self._rows(tokens, 2 * passes * depth + gated / n.pipeline, depth)
        return Sent(2 * (n.tensor - 1) / n.tensor * total, self._link(n.tensor), False)

    def _pipeline(self):
        """Text and visual tokens to the next stage, and their gradients back."""
        n = self.layout
        return Sent(self._rows(2, 2), self._link(n.tensor * n.pipeline), False)

    # --- time ---

    def seconds(self):
        """{part: seconds} of a step: computing, the pipeline's filling and emptying, and what of
        the communication does not hide."""
        t, n = self.training, self.layout
        work = sum(sum(part) for part in self.flops().values())
        computing = work / (n.devices * self.peak() * t.utilisation)
        bubble = computing * (n.pipeline - 1) / (self.micro_batches() * len(t.sequences))
        taken = {True: 0.0, False: 0.0}
        for sent in self.sent().values():
            taken[sent.hides] += sent.bytes / sent.bandwidth
        waiting = taken[False] + max(0.0, taken[True] - t.overlap * computing)
        return {"computing": computing, "bubble": bubble, "waiting": waiting}

    def days(self):
        """Of all steps."""
        return sum(self.seconds().values()) * self.training.steps / 86_400

    def model_utilisation(self):
        """Flops of the task, without what is made again, over the peak's in a step's time."""
        work = sum(part.forward + part.backward for part in self.flops().values())
        return work / (self.layout.devices * self.peak() * sum(self.seconds().values()))


def quickest(config, training, layout, device):
    """The Plan with the micro-batch that takes the least time of those that fit; 1 where none
    does. ValueError as Plan."""
    plans = [Plan(config, replace(training, micro_batch=1), layout, device)]
    rows = training.batch // layout.data
    for most in range(2, rows + 1):
        if rows % most == 0:
            smaller = replace(training, micro_batch=most)
            plans.append(Plan(config, smaller, layout, device))
    fitting = [plan for plan in plans if plan.fits()] or plans[:1]
    return min(fitting, key=lambda plan: sum(plan.seconds().values()))


def batch_within(plan, days):
    """How many sequences of each data set a step can have for the run to take so many days, if
    nothing but computing took time."""
    t = plan.training
    one = sum(sum(part) for part in plan.flops().values()) / t.batch
    rate = plan.layout.devices * plan.peak() * t.utilisation
    return rate * days * 86_400 / t.steps / one
