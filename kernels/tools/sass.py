"""Read machine code: its loops, the path through it, and how long one warp needs for it.

For NVIDIA the code is what nvdisasm prints of a cubin (SASS); each instruction carries the cycles
until the next may start, and which of six scoreboards it waits for or sets. For AMD it is the
assembly that LLVM writes, where s_waitcnt waits. A warp of AMD's (a wave) has 64 threads.
"""

import re
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from .compile import _tool


@dataclass(frozen=True)
class Instruction:
    """One instruction; a branch has a target, the index of an instruction."""

    op: str
    arguments: str = ""
    conditional: bool = False
    target: int | None = None
    control: int = 0  # NVIDIA's 21 bits: stall, yield, write and read scoreboard, wait mask

    @property
    def flops(self):
        """Of a warp's share of a matrix instruction: 2*m*n*k; a HGMMA is that of four warps."""
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(\d\d)(\d)(\d+)", self.op)
        shape = shape or re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", self.op)
        if not shape:
            return 0
        m, n, k = (int(x) for x in shape.groups() if x)
        return 2 * m * n * k // (4 if self.op.startswith("HGMMA") else 1)

    @property
    def ends(self):
        """Whether a warp ends here."""
        return self.op in ("EXIT", "s_endpgm")

    @property
    def goes_on(self):
        """Whether the next instruction may follow."""
        return self.conditional or not (self.ends or self.target is not None)


@dataclass(frozen=True, eq=False)
class Code:
    """A kernel's instructions, in the order of its code."""

    instructions: tuple

    def following(self, i):
        """The places of the instructions that may come after the i-th; none is the end."""
        x = self.instructions[i]
        return [i + 1] * x.goes_on + ([] if x.target is None else [x.target])

    @cached_property
    def loops(self):
        """[range] of each loop, from its label to the branch back; outer ones before inner ones.

        A branch back that does not come by again is none: AMD's blocks are in any order.
        """
        ends = {}
        for i, x in enumerate(self.instructions):
            if x.target is not None and x.target < i and i in self._reached(x.target):
                ends[x.target] = i + 1  # several branches to one label are one loop
        return [range(start, ends[start]) for start in sorted(ends)]

    def _reached(self, start):
        """The places that can be reached from one."""
        found, new = set(), [start]
        while new:
            i = new.pop()
            if i not in found:
                found.add(i)
                new += self.following(i)
        return found

    def body(self, loop):
        """The instructions of a loop that are in no loop inside it."""
        inner = [x for x in self.loops if x != loop and x[0] in loop]
        return [self.instructions[i] for i in loop if not any(i in x for x in inner)]

    def path(self, longest):
        """The longest, or shortest, way from start to end, past what is in a loop."""
        ways = {None: (0, None)}  # of each instruction: (length of its way, the next one's place)
        for i in self._last_first():
            on = [(ways[j][0] + (i not in self._inside), j) for j in self._ahead(i)]
            ways[i] = (max if longest else min)(on, key=lambda way: way[0])
        taken, i = [], 0
        while i is not None:
            taken += [] if i in self._inside else [self.instructions[i]]
            i = ways[i][1]
        return taken

    @cached_property
    def _inside(self):
        """{place in a loop: the outermost loop around it}."""
        return {i: loop for loop in reversed(self.loops) for i in loop}

    def _ahead(self, i):
        """The places that may follow, where a loop is one place, its first; None is the end."""
        if self.instructions[i].ends and not self.instructions[i].conditional:
            return [None]
        loop = self._inside.get(i, (i,))
        on = {j for x in loop for j in self.following(x) if j not in loop}
        ends = any(self.instructions[x].ends for x in loop)
        return [None] * ends + sorted(self._inside.get(j, (j,))[0] for j in on)

    def _last_first(self):
        """The places of all instructions, each after all that may follow it."""
        order, seen, stack = [], set(), [(0, False)]
        while stack:
            i, done = stack.pop()
            if done:
                order.append(i)
            elif i not in seen:
                seen.add(i)
                stack += [(i, True), *((j, False) for j in self._ahead(i) if j is not None)]
        return order


# --- reading --------------------------------------------------------------------------------------

CUDA = re.compile(
    r"^\s*(?:(?P<label>\.L\w+):|/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)"
    r"(?P<rest>[^;]*);\s*/\* 0x\w+ \*/\s*/\* 0x(?P<control>\w+) \*/)",
    re.M,
)
AMD = re.compile(
    r"^(?:(?P<label>\.LBB\w+):|\s+(?P<op>(?:s|v|ds|global|buffer|flat|scratch)_\w+)(?P<rest>[^;\n]*))",
    re.M,
)


def read(binary):
    """Triton's binary -> Code."""
    if "amdgcn" in binary.asm:
        return parse(binary.asm["amdgcn"], AMD)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [_tool("nvdisasm"), "-c", "-hex", file.name]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return parse(done.stdout, CUDA)


def parse(text, grammar):
    """The text of a disassembly, by the grammar CUDA or AMD -> Code."""
    found, labels = [], {}
    for match in grammar.finditer(text):
        fields = match.groupdict()
        if fields["label"]:
            labels[fields["label"]] = len(found)
        else:
            found.append(fields)
    instructions = []
    for i, fields in enumerate(found):
        op, rest = fields["op"], fields["rest"].strip()
        label = (
            re.search(r"\.L\w+", rest) if re.match("BRA|CALL.REL.NOINC|s_c?branch", op) else None
        )
        target = labels[label[0]] if label else None
        if target == i:  # behind the end of a kernel, for padding
            break
        conditional = bool(fields.get("guard")) or "cbranch" in op or "P" in rest.split("`")[0]
        conditional &= bool(label or op == "EXIT")
        control = int(fields.get("control") or "0", 16) >> 41
        instructions.append(Instruction(op, rest, conditional, target, control))
    return Code(tuple(instructions))


# --- one warp alone -------------------------------------------------------------------------------

# cycles until a result is there, of what has no fixed latency: shared memory (arXiv 2402.13499);
# the others are of that size, and were not measured here
SHARED, OTHERS, BARRIER = 29, 24, 25
FIELDS = (0, 15), (5, 7), (8, 7), (11, 63)  # of the control bits: shift, mask
WAITS = ("BAR.", "MEMBAR", "FENCE", "s_barrier")


class Warp:
    """A warp that has its processor to itself: `time` is the cycle in which it stands."""

    def __init__(self, device):
        self.device, self.time = device, 0.0
        self.boards = [0.0] * 6
        self.products, self.copy, self.copies = 0.0, 0.0, deque()  # when they are done
        self.loads, self.shared = deque(), deque()  # AMD's, in their order

    def step(self, x):
        """Go past one instruction."""
        if x.op.startswith(WAITS):
            self.time += BARRIER
        (self.step_amd if x.op[0].islower() else self.step_cuda)(x)

    def step_cuda(self, x):
        """By its control bits: stall, scoreboards to set (write, read), and to wait for."""
        stall, write, read, wait = (x.control >> s & m for s, m in FIELDS)
        self.time = max([self.time, *(b for i, b in enumerate(self.boards) if wait >> i & 1)])
        if x.op.startswith("LDGSTS"):
            self.copy = self.time + self.device.latency
        elif x.op == "LDGDEPBAR":
            self.copies.append(self.copy)
        elif x.op == "DEPBAR.LE":
            self.time = _wait(self.copies, int(x.arguments.split(",")[1], 16), self.time)
        elif x.op.startswith("WARPGROUP.DEPBAR"):
            self.time = max(self.time, self.products + OTHERS)
        elif x.op.startswith("HGMMA"):  # four warps' at 4096 flops a cycle
            self.products = max(self.products, self.time) + max(8, x.flops / 1024)
        done = self.load(x, "128") if x.op.startswith("LDG") else OTHERS
        done = SHARED if x.op.startswith(("LDS", "STS")) else done
        for board, cycles in ((write, done), (read, OTHERS)):
            if board < 6:
                self.boards[board] = max(self.boards[board], self.time + cycles)
        self.time += max(1, stall)

    def load(self, x, wide):
        """Cycles of a load: narrow ones are of lists, which all heads read: the L2 has them."""
        return self.device.latency if wide in x.op else self.device.cache_latency

    def step_amd(self, x):
        """A vector instruction takes four cycles, a product its share of 512 flops a cycle."""
        if x.op == "s_waitcnt":
            for queue, name in ((self.loads, "vmcnt"), (self.shared, "lgkmcnt")):
                left = re.search(rf"{name}\((\d+)\)", x.arguments)
                if left:
                    self.time = _wait(queue, int(left[1]), self.time)
        elif re.match("(global|buffer)_load", x.op):
            self.loads.append(self.time + self.load(x, "dwordx4"))
        elif x.op.startswith(("ds_", "s_load")):
            self.shared.append(self.time + 2 * SHARED)
        self.time += max(x.flops / 512, 1 if x.op.startswith("s_") else 4)


def _wait(queue, left, time):
    """The cycle in which all but the `left` youngest of a queue are done."""
    while len(queue) > left:
        time = max(time, queue.popleft())
    return time


def cycles(instructions, device, repeats=1):
    """One warp's, for the last of `repeats` turns: a loop's later turns find their loads done."""
    warp, before = Warp(device), 0.0
    for _ in range(repeats):
        before = warp.time
        for x in instructions:
            warp.step(x)
    return warp.time - before
