r"""Training at scale: all three stages, on one process or many, CPU or GPU.

    python -m miniflamingo train-torch flamingo --out runs/big
    torchrun --nproc-per-node 8 -m miniflamingo train-torch flamingo --out runs/big
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 8 --max-restarts 3 \
        -m miniflamingo train-torch flamingo --out runs/big --resume

The same stages, batches, schedule and log as `python -m miniflamingo train`, in torch. All of the
distribution is torch's own: `fully_shard` (FSDP2) cuts parameters, gradients and AdamW's moments
over the processes; `torch.distributed.checkpoint` writes each process's part, and reads it back on
any number of processes; torchrun starts them, and starts them again when one dies. (The variable
keeps restarted processes from finding the addresses of the dead ones: pytorch issue 135712.)

Every process draws the same global batch from the one seed and takes its rows of it. Each divides
its summed loss by the global number of targets, so that the sum over the processes is the mean that
one process would have, and the curve does not depend on their number. As in the paper (section 3.2)
each update adds up the gradients of all datasets times lambda_m; trained parameters and moments are
float32, and with --precision bf16 (the default on a GPU) frozen parameters and activations are
bfloat16. Gradients are summed in float32 (a choice).

Tested on the CPU with gloo: one process and two, float32 and bfloat16, a killed worker. Not tested:
a GPU, NCCL, several machines. Each process builds the whole model before it is cut, for which one
of the paper's size is too large: that needs building on the meta device.
"""

import gc
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from tqdm import tqdm

from miniflamingo import __main__ as command_line
from miniflamingo import cards, outputs, runs, training
from miniflamingo.checks import from_json
from miniflamingo.command import Parser, exclude, some
from miniflamingo.module import write_atomically
from miniflamingo.prompt import IMAGE, PAD
from miniflamingo.worlds.datasets import IGNORED
from miniflamingo.xattn import compute_phi

from . import layers

# --- what is trained ------------------------------------------------------------------------------


class TextLoss(nn.Module):
    """The language model around its loss: tokens, targets int[B, L] -> the summed loss, []."""

    def __init__(self, stage, mesh, backend):
        super().__init__()
        self.model = layers.LanguageModel(stage.config.model)
        state = stage.model.state_dict().items()
        self.model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state})

    def units(self):
        """What is gathered at a time: the modules that fully_shard wraps, from the inside out."""
        return [*self.model.blocks, self]

    def rows(self, batch, rows):
        """Some rows of a drawn batch, as forward's arguments."""
        tokens = batch.tokens[rows]
        noise = () if batch.noise is None else (batch.noise[rows],)
        return tokens[:, :-1], np.where(tokens == PAD, IGNORED, tokens)[:, 1:], *noise

    def forward(self, tokens, targets, noise=None):
        return _summed_loss(self.model(tokens, noise=noise), targets)


class ContrastiveLoss(nn.Module):
    """The two encoders around their loss: pixels [B, height, width, 3], tokens int[B, L] -> [].

    Each process encodes its own rows and compares them with those of all processes: it gathers the
    unit vectors, and the gathering's gradient brings back what the others' rows say of its own.
    """

    def __init__(self, stage, mesh, backend):
        super().__init__()
        self.model, self.mesh = layers.ContrastiveModel.from_numpy(stage.model), mesh
        self.label_smoothing = stage.config.label_smoothing

    def units(self):
        """What is gathered at a time: the modules that fully_shard wraps, from the inside out."""
        return [*self.model.vision_encoder.blocks, *self.model.text_encoder.blocks, self]

    def rows(self, batch, rows):
        """Some rows of a drawn batch, as forward's arguments; ValueError for uneven shares."""
        pixels, tokens = batch
        if len(pixels) % self.mesh.size():
            raise ValueError(
                "a contrastive batch must divide evenly over the processes, got "
                f"{len(pixels)} rows for {self.mesh.size()} processes"
            )
        return pixels[rows], tokens[rows]

    def forward(self, pixels, tokens):
        images, texts, temperature = (x.float() for x in self.model(pixels, tokens))
        first = self.mesh.get_rank() * len(images)  # of this process, among all rows
        own = torch.arange(first, first + len(images), device=images.device)
        options = dict(reduction="sum", label_smoothing=self.label_smoothing)
        to_text = F.cross_entropy(temperature * images @ self.all_rows(texts).T, own, **options)
        to_image = F.cross_entropy(temperature * texts @ self.all_rows(images).T, own, **options)
        return to_text + to_image  # vision.contrastive_loss, the terms of these rows

    def all_rows(self, x):  # [B / processes, D] -> [B, D], the rows of process 0 first
        """Gathers; the gradient is added up over the processes and returned to each row's own."""
        rows = DTensor.from_local(x, self.mesh, [Shard(0)])
        return rows.full_tensor(grad_placements=[Partial()])


class BridgeLoss(nn.Module):
    """Flamingo around its loss: tokens, targets, phi int[B, L], features [B, N, T, S, D_v] -> [].

    The features come from the stage's pool; the frozen eye that made them is not needed here.
    """

    def __init__(self, stage, mesh, backend):
        super().__init__()
        self.features, self.backend = stage.features, backend
        self.model = layers.Flamingo.from_numpy(stage.model)
        self.model.vision_encoder = None

    def units(self):
        """What is gathered at a time: the modules that fully_shard wraps, from the inside out."""
        m = self.model
        return [*m.resampler.layers, *m.gated_xattn, *m.lm.blocks, self]

    def rows(self, batch, rows):
        """Some rows of a drawn batch, as forward's arguments."""
        phi = compute_phi(batch.tokens, IMAGE, batch.use_next)[rows, :-1]
        features = self.features(batch._replace(pictures=batch.pictures[rows]))
        return batch.tokens[rows, :-1], batch.targets[rows, 1:], phi, features

    def forward(self, tokens, targets, phi, features):
        media = self.model.resampler(features)
        logits = self.model.read(tokens, media, phi, self.backend, check=False)
        return _summed_loss(logits, targets)


def _summed_loss(logits, targets):
    logits, targets = logits.float().flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


LOSSES = {"lm": TextLoss, "vision": ContrastiveLoss, "flamingo": BridgeLoss}


def shard(module, mesh, precision):
    """fully_shard the module's units over the mesh, in float32 or mixed precision ("bf16")."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    for unit in layers.without_scalars(module).units():
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return module


def build_optimiser(module, config):
    """torch's AdamW with the groups of miniflamingo.training.AdamW; "scale" multiplies the rate."""
    groups = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            in_resampler = name.startswith("model.resampler.")
            decays, scale = parameter.ndim > 1 and not in_resampler, 1.0
            if name.endswith(("alpha_xattn", "alpha_dense")):
                scale = config.alpha_rate
            elif in_resampler:
                scale = config.resampler_rate
            groups.setdefault((scale, decays), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "scale": scale,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(groups, config.rate, (config.beta1, config.beta2))


# --- runs -----------------------------------------------------------------------------------------


class Agreed(ValueError):
    """An error of one process that all of them raise; the first one says it."""


@contextmanager
def together(checkpoint=None):
    """What one process raises in the `with` block, all raise behind it, so that none waits for one
    that is gone. In the block, all or none of the processes speak to each other."""
    fault = None
    try:
        yield
    except CheckpointException as error:  # its own text is a traceback of each process
        fault = f"{checkpoint}: {next(iter(error.failures.values()))[0]}"
    except (ValueError, OSError) as error:
        fault = error
    failed = torch.tensor(float(fault is not None))
    dist.all_reduce(failed)
    if failed > 0:
        faults = [None] * dist.get_world_size()
        dist.all_gather_object(faults, None if fault is None else str(fault) or repr(fault))
        raise Agreed(next(text for text in faults if text is not None))


class ShardedRun:
    """miniflamingo.training.Run over the processes of a mesh: checkpoints/, log.jsonl,
    model.safetensors (the NumPy model's file).

    All processes must see the folder `out`. ValueError, in all of them, when it cannot be written
    to, is being trained in, holds a run that is not to be resumed, or one that is damaged or has
    another config; or when a batch has too few rows.
    """

    def __init__(self, stage, out, mesh, resume=False, checkpoint_every=100, precision="fp32",
                 backend="auto"):  # fmt: skip
        self.stage, self.out, self.checkpoint_every = stage, Path(out), checkpoint_every
        self.rank, self.world = mesh.get_rank(), mesh.size()
        self.device, self.precision = torch.device(mesh.device_type), precision
        positive = {name: w for name, w in stage.weights.items() if w != 0}
        self.weights = training.check_weights(positive)
        self.checkpoints, self.log_path = self.out / "checkpoints", self.out / "log.jsonl"
        self.costs, self.parts, self.saved = runs.Costs(), [], None
        self.rng, self.step, self.lock = np.random.default_rng([stage.config.seed, 1]), 0, None
        with together():
            self.lock = runs.Lock(self.out) if self.rank == 0 else None
        try:
            self.begin(resume, mesh, backend)
        except BaseException:
            self.release()
            raise

    def begin(self, resume, mesh, backend):
        """Build what is trained, take up the last checkpoint, and clear away what is left over."""
        folder = self.latest()
        with together():
            if folder is None or not resume:
                beginning = ("log.jsonl", "checkpoints")
                runs.check_free(self.out, resume, self.checkpoint_every, beginning)
        module = LOSSES[self.stage.name](self.stage, mesh, backend).to(self.device)
        self.module = shard(module, mesh, self.precision)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimiser = build_optimiser(self.module, self.stage.config.optimiser)
        if folder:
            self.load(folder)
        with together():
            if self.rank == 0:
                runs.cut_log(self.log_path, self.step)
                runs.sweep(self.out)
                self.checkpoints.mkdir(exist_ok=True)
                self.sweep(folder)

    def release(self):
        """Let other processes train in the folder."""
        if self.lock is not None:
            self.lock.release()

    def train(self, progress=True):
        """Go on until the last step; True when that was reached, False when interrupted.

        FloatingPointError when the loss or the gradient is not finite: the last checkpoint stays.
        """
        before = self.step == self.stage.config.optimiser.steps  # and what it has written then,
        before = before and (self.out / "model.safetensors").exists()  # whoever changed it, stays
        try:
            finished = self._train(progress)
            if finished and not before:
                self.export()
        finally:
            self.release()
        return finished

    def _train(self, progress):
        steps, first, stopped = self.stage.config.optimiser.steps, self.rank == 0, False
        bar = tqdm(total=steps, initial=self.step, disable=not (progress and first))
        path = self.log_path if first else os.devnull
        with bar, open(path, "a", encoding="utf-8") as log, training.asked_to_stop() as stop:
            while self.step < steps and not stopped:
                record, stopped = self.update(stop.is_set())
                with together():
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                bar.set_postfix(loss=f"{record['loss']:.3f}", rate=f"{record['rate']:.1e}")
                bar.update()
                if self.step % self.checkpoint_every == 0:
                    self.save(log)
            self.save(log)
        if self.step < steps and first:
            print(f"Interrupted after step {self.step}; go on with --resume --out {self.out}")
        return self.step == steps

    def update(self, stop=False):
        """One update -> its log record, and whether any process was asked to stop."""
        batches = {name: self.stage.draw(name, self.rng) for name in self.weights}
        counts = {name: self.stage.count(batch) for name, batch in batches.items()}
        weights = training.step_weights(self.stage.strategy, self.weights, self.step, counts)
        self.optimiser.zero_grad()
        sums = []
        for name, weight in weights.items():
            loss = self.module(*self.own_rows(name, batches[name]))
            # fully_shard averages over the processes: times their number, it adds up
            (loss * (weight * self.world / counts[name])).backward()
            sums.append(loss.detach().double())
        *sums, stopped = self.add_up([*sums, torch.tensor(float(stop))])
        losses = {name: total / counts[name] for name, total in zip(weights, sums)}
        norm, rate = self.apply_gradient(losses)
        parts = {name: weights[name] * losses[name] for name in losses}
        record = {
            "step": self.step, "loss": sum(parts.values()), "losses": losses, "weighted": parts,
            "gradient_norm": norm, "rate": rate, **self.gates(),
        }  # fmt: skip
        return record, stopped > 0

    def own_rows(self, name, batch):
        """This process's rows of a batch, every world-th one, as tensors on its device."""
        rows = len(batch[0])
        if rows < self.world:
            raise ValueError(f"a batch of {name} has {rows} rows, for {self.world} processes")
        arrays = self.module.rows(batch, slice(self.rank, None, self.world))
        return [torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in arrays]

    def add_up(self, values):
        """The sums of some scalars over the processes, as floats."""
        total = torch.stack([value.to(self.device, torch.float64) for value in values])
        dist.all_reduce(total)
        return total.tolist()

    def apply_gradient(self, losses):
        """Clip, and step -> (norm before clipping, rate)."""
        config = self.stage.config.optimiser
        norm = nn.utils.clip_grad_norm_(self.trained, config.clip).full_tensor().item()
        wrong = [f"the loss of dataset {n!r} is {x}" for n, x in losses.items() if x - x != 0]
        if wrong or norm - norm != 0:
            kept = f"the last checkpoint is {self.latest()}" if self.latest() else "none saved"
            what = wrong[0] if wrong else f"the gradient's norm is {norm}"
            raise FloatingPointError(f"step {self.step + 1}: {what}; {kept}")
        rate = float(training.scheduled_rate(config, self.step))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimiser.step()
        self.step += 1
        return norm, rate

    def gates(self):
        """As Stage.gates, from the first process, which holds the only element of each gate."""
        values = {"alpha_xattn": [], "alpha_dense": []}
        for name, parameter in self.module.named_parameters():
            if (kind := name.split(".")[-1]) in values and self.rank == 0:
                values[kind].append(parameter.to_local().item())
        return {kind: gates for kind, gates in values.items() if gates}

    # --- checkpoints ---

    def latest(self):
        """The folder of the last whole checkpoint, or None."""
        whole = [f for f in self.folders() if all((f / name).exists() for name in MARKS)]
        return max(whole, key=lambda folder: int(folder.name), default=None)

    def folders(self):
        """The folders of checkpoints, whole or not: those with a step for a name."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return [path for path in found if path.name.isdecimal() and path.is_dir()]

    def sweep(self, kept):
        """Remove all checkpoints but one: earlier ones, and what killed processes left."""
        for folder in self.folders():
            if folder != kept:
                shutil.rmtree(folder)

    def identity(self):
        """What must be the same for a run to be resumed, as JSON values."""
        return json.loads(json.dumps(self.stage.identity() | {"precision": self.precision}))

    def state(self):
        """The trained parameters and the optimiser's moments, each process's own part."""
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimiser = get_state_dict(self.module, self.optimiser, options=options)
        return {"model": model, "optimiser": optimiser}

    def save(self, log):
        """Write a checkpoint, and then remove the one before. run.json makes it whole, and is
        written last; the lines of the open file `log` reach the disk before."""
        if self.saved == self.step:
            return
        folder = self.checkpoints / f"{self.step:07d}"
        with together():
            if self.rank == 0:
                os.fsync(log.fileno())
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
        with together(folder):
            dcp.save(self.state(), checkpoint_id=folder)
        seconds = self.add_up([torch.tensor(self.costs.seconds())])[0]
        self.parts, sums = self.costs.parts(seconds), self.digests(folder)
        with together():
            if self.rank == 0:
                about = {"step": self.step, "rng": self.rng.bit_generator.state,
                         "config": self.identity(), "parts": self.parts, "files": sums}  # fmt: skip
                text = json.dumps(about | {"sha256": _digest(about)}, indent=1)
                write_atomically(folder / "run.json", text.encode())
                self.sweep(folder)
        self.saved = self.step

    def digests(self, folder):
        """{name: sha256} of a checkpoint's files, of which each process reads a share."""
        with together():
            files = sorted(path for path in folder.iterdir() if path.name != "run.json")
            mine = files[self.rank :: self.world]
            own = {path.name: runs.file_digest(path) for path in mine}
        every = [None] * self.world
        dist.all_gather_object(every, own)
        return {name: sums[name] for sums in every for name in sums}

    def load(self, folder):
        """Take up a checkpoint, of any number of processes; ValueError for another config, and for
        what is not as it was saved."""
        with together():
            about = self.read_about(folder)
        if "files" in about:  # the first edition's have none
            sums, kept = self.digests(folder), about["files"]
            with together():
                wrong = sorted(n for n in kept.keys() | sums.keys() if kept.get(n) != sums.get(n))
                if wrong:
                    raise ValueError(f"{folder} has missing or damaged files: {some(wrong)}")
        state = self.state()
        with together():
            self.check_stored(folder, state)
        with together(folder):
            dcp.load(state, checkpoint_id=folder)
        with together():
            check_numbers(folder, state)
        set_state_dict(
            self.module, self.optimiser, model_state_dict=state["model"],
            optim_state_dict=state["optimiser"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        self.step, self.rng.bit_generator.state = about["step"], about["rng"]
        self.saved, self.parts = self.step, self.costs.before

    def read_about(self, folder):
        """What run.json says of a checkpoint; ValueError when it is damaged or of another run."""
        path = folder / "run.json"
        about = from_json(path.read_bytes().decode(errors="replace"), path)
        if missing := {"step", "rng", "config"} - set(about if isinstance(about, dict) else ()):
            raise ValueError(f"{path} has no {some(sorted(missing))}")
        runs.check_identity(self.out, about["config"], self.identity())
        runs.checked_step(about["step"], self.stage.config.optimiser.steps, path)
        runs.checked_rng(about["rng"], path)
        first_edition = about.keys().isdisjoint(("sha256", "parts", "files"))
        if not first_edition and about.pop("sha256", "") != _digest(about):
            raise ValueError(f"{path} is damaged: it does not hold what its sha256 stands for")
        if about["step"] != int(folder.name):
            raise ValueError(f"{path}: step must be that of its folder, got {about['step']}")
        self.costs.load(about.get("parts", []), path)
        return about

    def check_stored(self, folder, state):
        """ValueError unless each tensor is in the checkpoint, with its own shape and dtype."""
        stored, faults = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata, []
        for name, own in _tensors(state):
            found = stored.get(name)
            kind = (list(found.size), found.properties.dtype) if hasattr(found, "size") else None
            if kind != (expected := (list(own.shape), own.dtype)):
                faults.append(f"{name} expected {expected}, got {kind}")
        if faults:
            raise ValueError(f"{folder} does not fit the run: {some(faults, '; ')}")

    def export(self):
        """Write model.safetensors, the file of the NumPy model; its frozen parts as they came."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        state = get_model_state_dict(self.module, options=options)
        with together():
            if self.rank == 0:
                names = {n.removeprefix("model."): x for n, x in state.items()}
                own = self.stage.model.state_dict() | layers.numpy_state(names)
                self.stage.model.load_state_dict(own)
                self.stage.save(self.out / "model.safetensors")
                if self.parts:
                    cards.record_run(self.out, runs.seconds(self.parts), self.parts)


MARKS = (".metadata", "run.json")  # a checkpoint that has both is whole


def _digest(about):
    return runs.digest([json.dumps(about, sort_keys=True).encode()])


def _tensors(state):
    """Yield (name, tensor) of ShardedRun.state: parameters and moments, as dcp names them."""
    yield from ((f"model.{name}", x) for name, x in state["model"].items())
    for name, moments in state["optimiser"]["state"].items():
        yield from ((f"optimiser.state.{name}.{kind}", x) for kind, x in moments.items())


def check_numbers(folder, state):
    """ValueError unless this process's part of a state is finite, and no square below 0."""
    for name, x in _tensors(state):
        own = x.to_local() if isinstance(x, DTensor) else x
        if not own.isfinite().all():
            raise ValueError(f"{folder}: {name} is not finite")
        if name.endswith(".exp_avg_sq") and (own < 0).any():
            raise ValueError(f"{folder}: {name} has values below 0")


# --- the command ----------------------------------------------------------------------------------


@contextmanager
def processes(device="auto"):
    """The mesh of torchrun's processes, or of this one alone, for the time of a `with` block."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    finally:
        gc.collect()  # a sharded module outlives its last reference, and keeps gloo's threads
        dist.destroy_process_group()


def parser():
    """The options of `python -m miniflamingo train`, and those of this file."""
    top = Parser(prog="python -m miniflamingo train-torch", description=__doc__)
    stages = top.add_subparsers(dest="stage", required=True)
    for name in LOSSES:
        command = stages.add_parser(name)
        command_line.add_training(command, name)
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU")
        command.add_argument("--backend", choices=layers.BACKENDS, default="auto")
        only = "only convert the last checkpoint to model.safetensors"
        command.add_argument("--export", action="store_true", help=only)
    return top


def run(options):
    """Train as a list of command-line options says; returns the exit code."""
    arguments = parser().parse_args(options)
    exclude(arguments, ("--export", "--resume"))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU that torch can use, got none")
    first = not int(os.environ.get("RANK", 0))
    try:
        with processes(arguments.device) as mesh:
            with together():
                outputs.check_folder(arguments.out)
                stage = command_line.build_stage(arguments)
            return train(stage, mesh, arguments)
    except Agreed:
        if first:
            raise
        return 2  # the first process says it
    except FloatingPointError:
        if first:
            raise
        return 1


def train(stage, mesh, arguments):
    """Train a stage on a mesh, or export its last checkpoint; returns the exit code."""
    precision = arguments.precision or ("bf16" if mesh.device_type == "cuda" else "fp32")
    sharded = ShardedRun(
        stage, arguments.out, mesh, arguments.resume or arguments.export,
        arguments.checkpoint_every, precision, arguments.backend,
    )  # fmt: skip
    if not arguments.export:
        return 0 if sharded.train() else 130  # as after Ctrl-C
    try:
        if sharded.step == 0:
            raise Agreed(f"there is no checkpoint in {arguments.out} to export")
        sharded.export()
    finally:
        sharded.release()
    return 0
