"""What two processes really hold under FSDP2: bytes of parameters, gradients and moments.

    python -m miniflamingo plan --fsdp2

Starts two processes of its own, on the CPU with gloo; each builds the same bridge, `train.shard`
cuts it, and after one step of AdamW each counts the bytes of its own parts of every tensor. The
numbers do not depend on the machine: what `plan` says of the same model is held against them.
"""

import os
import socket
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from miniflamingo.command import in_processes
from miniflamingo.flamingo import Flamingo
from miniflamingo.training import OptimiserConfig

from . import train

ROWS, TOKENS, IMAGES = 4, 12, 2


def local_bytes(x):
    """Bytes of this process's own part of a tensor."""
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.numel() * x.element_size()


def batch(config, rng):
    """The arguments of BridgeLoss.forward, for this process's rows."""
    vision, lm = config.vision, config.lm
    tokens = torch.from_numpy(rng.integers(4, lm.vocab_size, (ROWS, TOKENS)))
    features = rng.normal(size=(ROWS, IMAGES, 1, vision.num_features, vision.out_dim))
    phi = torch.ones(ROWS, TOKENS, dtype=torch.int32)
    return tokens, tokens, phi, torch.from_numpy(features.astype(np.float32))


def held(module, optimiser):
    """{part: bytes} of this process: weights that are frozen and that learn, gradients, moments."""
    own = list(module.parameters())
    trained = [p for p in own if p.requires_grad]
    states = [optimiser.state[p] for p in trained]
    return {
        "frozen weights": sum(local_bytes(p) for p in own if not p.requires_grad),
        "trained weights": sum(map(local_bytes, trained)),
        "gradients": sum(local_bytes(p.grad) for p in trained),
        "moments": sum(local_bytes(s[key]) for s in states for key in ("exp_avg", "exp_avg_sq")),
    }


def work(rank, world, port, config, precision):
    """One process: build, cut, one step -> its `held`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(world)}  # fmt: skip
    with train.processes("cpu") as mesh:
        stage = SimpleNamespace(features=None, model=Flamingo(config, rng=np.random.default_rng(0)))
        module = train.shard(train.BridgeLoss(stage, mesh, "torch"), mesh, precision)
        optimiser = train.build_optimiser(module, OptimiserConfig())
        module(*batch(config, np.random.default_rng(rank))).backward()
        optimiser.step()
        dist.barrier()
        return held(module, optimiser)


def measure(config, precision, world=2):
    """[{part: bytes}], one a process, of a FlamingoConfig in "fp32" or "bf16"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    columns = zip(*[(rank, world, port, config, precision) for rank in range(world)])
    return list(in_processes(world, work, *columns, method="spawn"))
