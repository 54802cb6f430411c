"""A run around the loop: its ranks, folder and log, what is measured on the way, how it is stopped."""

import fcntl
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from checkpoint import newest, save
from config import phases
from formats import UserError, speaks, whole
from judge import RESULTS, align, clips_to_align, loss_by_time, reconstruct, report, save_gif
from metrics import codebook_metrics, collapsed
from vae import FrameVAE

WINDOW = 50                     # steps whose codes count for the codebook's metrics in a log line


@contextmanager
def connected(process, hours=2):
    """The ranks that torchrun started find each other. hours: to wait for the slowest."""
    if process.ranks == 1:
        yield
        return
    if process.cuda:
        torch.cuda.set_device(process.device)
    # restarted ranks must not find the addresses of dead ones, so each attempt has keys of its own;
    # only on a single node, because nodes count their restarts apart
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
    # what lies on CPUs goes by gloo: objects, reasons to stop, and barriers, none of which a GPU waits for
    backend = "cpu:gloo,cuda:nccl" if process.cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.ranks,
                            timeout=timedelta(hours=hours))
    try:
        yield
        wait_for_all()
    finally:
        gc.collect()            # cycles of DDP hold the group, whose threads must not outlive it
        dist.destroy_process_group()


def wait_for_all():
    """Ranks leave together: with the first that has stopped torchrun ends those that are still at work."""
    if dist.is_initialized():
        dist.barrier()


def of_first(process, ask):
    """What ask() returns on the first rank, for all ranks; where it raises UserError, all do."""
    answer = [None]
    if process.master:
        try:
            answer = [ask()]
        except UserError as error:
            answer = [error]
    if process.ranks > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def gather(x):
    """x of all ranks, stacked"""
    if not dist.is_initialized():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


class Stops:
    """Reasons of one rank to stop that all must follow at the same step: SIGTERM, a number not finite."""

    def __init__(self, device):
        self.terminated, self.seen = False, torch.tensor(False, device=device)
        signal.signal(signal.SIGTERM, self.terminate)

    def terminate(self, *_):
        self.terminated = True

    def asked(self):
        """Whether SIGTERM has come to any rank. Ranks agree on it on their CPUs: their GPUs go on."""
        return bool(gather(torch.tensor(self.terminated)).any())

    def look(self, number):
        """Remember, without waiting for the device, whether a scalar is finite."""
        self.seen = self.seen | ~number.isfinite()

    def not_finite(self):
        """Whether any rank has seen a number that is not finite. Each waits for its device."""
        return bool(gather(self.seen).any())


def run_folder(cfg):
    return os.path.join("out", cfg.name) if cfg.resume == "none" else cfg.resume


def lock(folder):
    """Keep other processes out of a run's folder, until this one ends or closes the file that it gets.

    Unlike other kinds of locks, this one is neither left behind by SIGKILL nor held by the loader's workers,
    which live on for a while; and it stays with a folder that is renamed. None where there is no folder.
    Raises UserError: another process has it. A file system without locks keeps nobody out.
    """
    if not os.path.exists(folder):
        return None
    file = open(os.path.join(folder, ".lock"), "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read() or 'another process'} is training there") from None
    except OSError:                             # no locks, or no room for the name
        pass
    return file


class Run:
    """The folder of a run, out/NAME, and all that is written there, by the first rank alone.

    Args:
        step: where it starts; file: the checkpoint that it goes on from, or None.
        held: the `lock` of a folder that is there already.
    """

    def __init__(self, cfg, process, step=0, file=None, held=None):
        self.cfg, self.process, self.step, self.lock = cfg, process, step, held
        self.out = run_folder(cfg)
        self.log = os.path.join(self.out, "metrics.jsonl")
        # the step of ckpt.pt, if it is whole
        self.saved = step if file == os.path.join(self.out, "ckpt.pt") else None
        self.total = sum(phase.steps for phase in phases(cfg))
        if process.master:
            self.open_folder()
            if file:
                print(f"  goes on at step {step} of {file}")
        # no bar where the output is a file: there the log lines tell how far it is
        self.bar = tqdm(total=self.total, initial=step, disable=None if process.master else True,
                        dynamic_ncols=True)
        self.first, self.began = step, time.time()

    def open_folder(self):
        """Make the folder and its first files. An older run is moved aside, unless this goes on with it."""
        self.lock = self.lock or lock(self.out)                 # another run may have made it by now
        if self.cfg.resume == "none" and os.path.exists(self.out):
            number = 1
            while os.path.exists(f"{self.out}.{number}"):
                number += 1
            os.rename(self.out, f"{self.out}.{number}")
            print(f"  {self.out} exists: moved to {self.out}.{number}")
            self.lock.close()                   # that run may go on
        os.makedirs(os.path.join(self.out, "samples"), exist_ok=True)
        if self.cfg.resume == "none":
            self.lock = lock(self.out)
        launch = os.getppid() if self.process.ranks > 1 else None               # see config.restarted
        settings = asdict(replace(self.cfg, resume="none")) | {"torchrun": launch}
        rows = self.rows_to_keep()
        with whole(self.log) as part, open(part, "w") as f:
            f.writelines(rows)
        with whole(os.path.join(self.out, "config.json")) as part, open(part, "w") as f:
            json.dump(settings, f, indent=1)

    def rows_to_keep(self):
        """Lines of the log up to the checkpoint; what comes after will be written again."""
        if not os.path.exists(self.log):
            return []
        kept, damaged = [], 0
        with open(self.log, errors="replace") as f:
            for line in f:
                if not line.endswith("\n"):     # the last one, half-written
                    break
                try:
                    row = json.loads(line)
                    step, event = row["step"], row["event"]
                    if step < self.step or step == self.step and event not in ("align", "result"):
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    damaged += 1
        if damaged:
            shutil.copy(self.log, self.log + ".damaged")
            print(f"  {self.log}: {damaged} damaged lines are left out, and kept in {self.log}.damaged")
        return kept

    def record(self, event, phase, **numbers):
        """One object in metrics.jsonl, one line on the terminal."""
        if not self.process.master:
            return
        numbers = {"phase": phase.name, "step": self.step} | numbers
        with open(self.log, "a") as f:
            f.write(json.dumps({"event": event, **finite(numbers)}) + "\n")
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in numbers.items() if "/" not in k}
        tqdm.write(f"{event}: " + " ".join(f"{k}={v}" for k, v in shown.items()))

    def speed(self):
        """How fast the run goes, and how long it has to go"""
        done, seconds = self.step - self.first, time.time() - self.began
        left = (self.total - self.step) * seconds / done
        return {"steps_per_second": round(done / seconds, 2), "minutes_left": round(left / 60, 1)}

    def save(self, phase, world, optimizer):
        if not self.process.master:
            return
        adapter = world.adapter.state_dict() if world.adapter else None
        vae = world.vae.state_dict() if isinstance(world.vae, FrameVAE) else None
        save(self.out, self.cfg.keep, self.saved, step=self.step, phase=phase.name, world=world.config(),
             lam=world.lam.state_dict(), dit=world.dit.state_dict(), adapter=adapter, vae=vae,
             quantize=world.lam.quantize, optimizer=optimizer.state_dict(), config=asdict(self.cfg))
        self.saved = self.step

    def stop(self, why, status=1):
        """End the program with one line a node that says what can be gone on from."""
        self.bar.close()
        try:
            state, file = newest(self.out)      # the folder knows: memory may be a moment behind it
            kept = f"the last checkpoint, of step {state['step']}, is {file}"
        except UserError:
            kept = "no checkpoint was written yet"
        if speaks():
            print(f"train.py: {why} at step {self.step}; {kept}", file=sys.stderr)
        sys.exit(status)


def finite(numbers):
    """What JSON can say of numbers {name: value}: null of those that are infinite or none"""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def set_modes(world, phase):
    world.train()
    world.lam.train("lam" in phase.trains)      # a frozen LAM does not update its moments either


class Watch:
    """Measures a run while it trains.

    For each log line the means of the last steps, the codebook, an alarm when it collapses, and how LAM and
    generator fit each other; now and then everything else, on held-out clips.
    """

    def __init__(self, cfg, process, run, world, data):
        self.cfg, self.process, self.run, self.world, self.data = cfg, process, run, world, data
        self.alarmed = False
        if process.master and any(phase.dreams for phase in phases(cfg)):
            self.fixed = data.heldout[cfg.data][range(clips_to_align(world, cfg.size, cfg.frames))]
            robot = [heldout for name, _, heldout in data.labelled if name == "cross"]
            self.known = robot[0][range(len(self.fixed["fps"]))] if robot else None

    def begin(self, phase, end):
        """A phase begins, whose last step is the run's `end`-th."""
        self.phase, self.end = phase, end
        self.recent = []                        # (numbers, indices) of the last steps
        self.grads = {}                         # step: the IDM's gradient, of steps that a log line needs

    def add(self, found, norm):
        """found: what the losses of a step's parts returned"""
        scalars = [name for name, v in found[0].items() if name != "indices" and v.dim() == 0]
        numbers = {name: torch.stack([f[name] for f in found]).mean() for name in scalars}
        indices = torch.cat([f["indices"] for f in found]) if self.phase.codes else None
        self.recent = self.recent[1 - WINDOW:] + [(numbers | {"norm": norm}, indices)]
        step = self.run.step
        if "lam" in self.phase.trains and (self.logs_at(step) or self.logs_at(step + 1)):
            self.grads = {k: grad for k, grad in self.grads.items() if k == step - 1}
            self.grads[step] = torch.cat([p.grad.flatten() for p in self.world.lam.idm.parameters()])

    def logs_at(self, step):
        """Whether a log line follows this step"""
        return step % self.cfg.log_every == 0 or step == self.end

    def numbers(self):
        """For a log line. Every rank must ask, as the codes of all count."""
        last = [numbers for numbers, _ in self.recent[-self.cfg.log_every:]]
        out = {name: torch.stack([row[name] for row in last]).mean().item() for name in last[0]}
        if self.phase.codes and self.world.lam.quantize:
            indices = gather(torch.stack([indices for _, indices in self.recent])).flatten(0, -2)
            out |= codebook_metrics(indices, self.world.lam.cfg.num_codes)
            if "lam" in self.phase.trains and collapsed(indices) != self.alarmed:
                self.alarmed = not self.alarmed
                message = ("the codebook has collapsed: nearly all transitions have the same codes"
                           if self.alarmed else "the codebook has recovered")
                self.run.record("alarm", self.phase, message=message, max_usage=out["max_usage"])
        if len(self.grads) == 2:                # of this step and the one before
            out["grad_cosine"] = F.cosine_similarity(*self.grads.values(), 0).item()
        return out | self.alignment()

    def alignment(self):
        """How LAM and generator fit each other, on fixed held-out clips (`judge.align`)"""
        if not (self.process.master and self.phase.dreams):
            return {}
        with self.measuring():
            return align(self.world, self.fixed, self.known)

    def evaluate(self, event, share=1):
        """Measure on held-out clips, and log it as `event`; `share` of the final numbers of clips."""
        cfg, heldout, videos = self.cfg, self.data.heldout[self.phase.data], None
        with self.measuring():
            if self.phase.codes or self.phase.real:
                dreamed = -(-cfg.eval_clips // share) if self.phase.dreams else 0
                transitions = 64 * cfg.eval_clips
                numbers, videos = report(self.world, heldout, self.data.labelled, dreamed,
                                         min(2048, transitions), transitions // share ** 2)
            elif self.phase.loss == "frames":
                numbers, videos = reconstruct(self.world.vae, heldout, cfg.eval_clips)
            else:
                numbers = dict.fromkeys(RESULTS) | loss_by_time(self.world, heldout, 256, False)
        if videos:
            save_gif(os.path.join(self.run.out, "samples", f"{self.run.step:06d}.gif"), videos)
        self.run.record(event, self.phase, precision=self.process.precision, **numbers)

    @contextmanager
    def measuring(self):
        """Eval mode, and no compiled graphs: dreams have too many shapes to compile them all."""
        eager = torch.compiler.set_stance("force_eager") if self.cfg.compile else nullcontext()
        self.world.eval()
        with self.process.autocast(), eager:
            yield
        set_modes(self.world, self.phase)


def count(parameters):
    return sum(p.numel() for p in parameters)


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors while this is entered: those that `live`, and the `most` at any moment."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, weakref.WeakSet()

    def add(self, x):
        storage = x.untyped_storage()           # views share it
        if storage not in self.known:
            self.known.add(storage)
            weakref.finalize(storage, self.free, storage.nbytes())
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)

    def free(self, size):
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


def fits(gigabytes):
    """The smallest card (GB of its name, which are 2^30 bytes) that holds so much, or None.

    Of a card 1 GB is for CUDA's context and libraries, and of the rest a tenth for gaps that the allocator
    leaves between tensors and for what kernels take for themselves: both are our guess.
    """
    return next((card for card in (8, 16, 24, 40, 80) if gigabytes <= 0.9 * (card * 2 ** 30 / 1e9 - 1)), None)


def describe(cfg, process, world, groups, absent, needs):
    """needs: {name of a phase: what `train.memory` says}, of a dry run"""
    parts = ", ".join(f"{name} {count(parameters) / 1e6:.2f} M" for name, parameters in groups.items())
    share = process.ranks * cfg.accumulate
    print(f"{cfg.name}: {parts} parameters; batch {cfg.batch} = {process.ranks} x {cfg.accumulate} x "
          f"{cfg.batch // share} clips of {cfg.frames} frames on {process.device} "
          f"in {process.precision}")
    for phase in phases(cfg):
        trains = " + ".join(sorted(phase.trains))
        print(f"  {phase.name}: {phase.steps} steps on {phase.data}, trains {trains}")
        if cfg.dry_run:
            state, peak = needs[phase.name]
            print(f"    {peak:.2f} GB a process: {state:.2f} weights, gradients, moments"
                  f" + {peak - state:.2f} activations in {process.precision}")
    if cfg.dry_run and cfg.preset == "opensora":
        idm, dit = (count(model.parameters()) / 1e9 for model in (world.lam.idm, world.dit))
        print(f"  IDM {idm:.3f} B, generator with action modules {dit:.3f} B; the paper says 0.93 B, "
              "which does not follow from its parts")
    for name in absent:
        print(f"  --{name} {getattr(cfg, name)}: not there yet; a run needs it")
    if cfg.dry_run:
        card = fits(max(peak for _, peak in needs.values()))
        none = "no card of 80 GB: raise --accumulate, or --activation_checkpointing"
        print(f"  evaluations: {needs['evaluations'][1]:.2f} GB; "
              f"in {process.precision} fits {f'a card of {card} GB' if card else none}")
