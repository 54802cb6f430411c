"""Train a latent action world model: pre-train a generator, warm up, co-evolve.

    python train.py                                                     # the toy world, on a laptop
    torchrun --nproc_per_node 8 train.py --mode joint --warmup 8000     # DDP
    python train.py --resume out/toy                                    # go on after a stop

Or in two stages, or adapt it to real actions: who trains on what in which phase is data, `phases` in
config.py. Output in out/NAME: config.json, metrics.jsonl, ckpt.pt and older ones, samples/*.gif.
Paper: section 3.3 (which gradients flow in which phase), appendix B.3 (recipe).
"""

import os
import signal
import warnings
from argparse import Namespace
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

import toy
from checkpoint import LatentCache, build, check_past, checkpoints, load_checkpoint, newest, restore
from config import PRESETS, Process, adopt, parse, phases
from data import clips, loader, parse_source, program, random_crop, sources, to_video
from flow import Draw
from formats import UserError, same_look
from lam import Adapter, TrueActions
from run import (Peak, Run, Stops, Watch, connected, describe, lock, of_first, run_folder, set_modes,
                 wait_for_all)
from vae import FrameVAE

MAX_NORM = 1.0                      # of the gradient, as in Open-Sora


# A phase's loss. model: the part of the world that computes it, which DDP may wrap; clip: a batch of clips;
# video: the same, cropped, (b, 3, t, h, w) in [-1, 1]; draw: source of randomness; latents: the VAE's, if at
# hand. Each returns the loss, and a dict of scalars and `indices` (b, t-1, k).


def flow(phase, world, model, clip, video, draw, latents):
    """The generator's loss, whose gradient also trains the LAM, and the VQ losses (`World.forward`)."""
    real = clip["actions"].to(video.device) if phase.real else None
    return model(video, draw, clip["fps"].to(video.device), phase.codes or phase.real, latents, real)


def pixels(phase, world, model, clip, video, draw, latents):
    """The FDM's pixel loss and the VQ losses (`LAM.forward`): the baseline's first stage."""
    return model(video, draw)


def codes(phase, world, model, clip, video, draw, latents):
    """Cross-entropy of the codes that the adapter makes of real actions, against the inferred ones."""
    indices = world.lam.encode(video)[1]                                        # (b, t-1, k)
    logits = model(clip["actions"].to(video.device))                            # (b, t-1, k, num_codes)
    loss = F.cross_entropy(logits.flatten(0, 2), indices.flatten())
    accuracy = (logits.argmax(-1) == indices).float().mean()
    return loss, {"accuracy": accuracy, "indices": indices}


def frames(phase, world, model, clip, video, draw, latents):
    """Reconstruction error of single frames, and the KL term (`FrameVAE.forward`)."""
    return model(video, draw)


# name: the part of the world that computes it, and the function
LOSSES = {"flow": ("world", flow), "pixels": ("lam", pixels), "codes": ("adapter", codes),
          "frames": ("vae", frames)}


# before the loop ---------------------------------------------------------------------------------------


def open_data(cfg):
    """Clips to `train` on and `heldout` ones, by the names of the phases' sources; `labelled`, where true
    actions are known: (name, training, held-out clips), only to judge by."""
    names = {phase.data for phase in phases(cfg)}
    train = {name: clips(name, cfg.size, cfg.frames, cfg.seed, "train") for name in names}
    heldout = {name: clips(name, cfg.size, cfg.eval_frames, cfg.seed, "heldout") for name in names}
    labelled = []
    for text in toy.MIXTURE if cfg.data == "toy" else sources(cfg.data):
        both = [clips([text], cfg.size, cfg.eval_frames, cfg.seed, split) for split in ("train", "heldout")]
        if both[0].labelled and both[1].labelled:
            labelled.append((parse_source(text)[0], *both))
    return Namespace(train=train, heldout=heldout, labelled=labelled)


def new_adapter(cfg, world, data):
    """What makes latent actions of the data's: to be trained, or with --actions true as it is."""
    if not data.heldout[cfg.data].labelled or not data.labelled:
        raise UserError(f"--data {cfg.data}: has no actions to adapt to; take one robot, e.g. held-out")
    torch.manual_seed(cfg.seed)
    actions = data.train[cfg.data][range(256)]["actions"].flatten(0, 1)         # (n, a)
    if cfg.actions == "latent":
        return Adapter(actions.shape[-1], world.lam.cfg)
    try:
        return TrueActions(actions.shape[-1], world.lam.cfg, actions)
    except ValueError as error:
        raise UserError(f"--data {cfg.data}: {error} (--tokens, --code_dim)") from None


def meet(cfg, world, data):
    """What a world takes from its data: the look of their frames, and where it needs one an adapter.

    Raises UserError: it has learned another look, or there are no actions.
    """
    looks = {f"--data {name}": clips.look for name, clips in data.train.items()}
    world.look = same_look({"the run that it comes from": world.look} | looks)
    if (cfg.mode == "adapt" or cfg.actions == "true") and not world.adapter:
        world.adapter = new_adapter(cfg, world, data)
        world.lam.quantize &= not world.true_actions            # of the LAM, which nobody asks, no codes


def check(cfg, world):
    """UserError if the phases cannot train this world."""
    trains = {group for phase in phases(cfg) for group in phase.trains}
    inferred = any(phase.codes for phase in phases(cfg))
    if inferred and not world.lam.quantize and "lam" not in trains:
        raise UserError("the LAM would stay frozen, but its latent actions are still continuous: "
                        "the run it comes from was stopped too early")
    if "fdm" in trains and not world.lam.fdm:
        raise UserError(f"--init {cfg.init}: has no FDM to train; --lam_steps 0 goes on with its LAM")


def parameter_groups(world):
    """{group: parameters}; a phase trains some of the groups"""
    lam = [p for name, p in world.lam.named_parameters() if not name.startswith("fdm.")]
    fdm = list(world.lam.fdm.parameters()) if world.lam.fdm else []
    adapter = list(world.adapter.parameters()) if world.adapter else []
    vae = list(world.vae.parameters()) if isinstance(world.vae, FrameVAE) else []
    groups = {"lam": lam, "fdm": fdm, "action": list(world.dit.action.parameters()), "body": world.dit.body(),
              "adapter": adapter, "vae": vae}
    return {name: parameters for name, parameters in groups.items() if parameters}


def adamw(cfg, groups):
    return torch.optim.AdamW([{"params": parameters} for parameters in groups.values()], lr=cfg.lr,
                             betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def save_memory(world):
    """Recompute each block's activations in the backward pass."""
    fdm = world.lam.fdm.blocks if world.lam.fdm else []
    for block in [*world.lam.idm.blocks, *fdm, *world.dit.spatial_blocks, *world.dit.temporal_blocks]:
        block.forward = partial(recompute, block.forward, use_reentrant=False)


@torch.no_grad()
def fit_codebook(world, dataset, clips=256):
    """k-means on the latent actions of some training clips; the same codebook on every rank."""
    device = world.lam.vq.codebook.device
    z = [world.lam.infer(to_video(dataset[range(i, i + 64)]["video"], device)) for i in range(0, clips, 64)]
    world.lam.vq.fit(torch.cat(z).flatten(0, 2))
    if dist.is_initialized():
        dist.broadcast(world.lam.vq.codebook.data, 0)
    world.lam.quantize = True


def quantize_at(cfg):
    """The step at which latent actions become discrete (--vq_start), or None if no LAM trains."""
    rows = [phase for phase in phases(cfg) if "lam" in phase.trains]
    return rows[0].first + int(cfg.vq_start * sum(phase.steps for phase in rows)) if rows else None


def begin(cfg, process, world, phase, groups, optimizer, fresh):
    """Freeze who does not train; groups that are `fresh` start with fresh moments.

    Returns what computes the phase's loss, under DDP where there are several ranks.
    """
    optimizer.zero_grad()
    if cfg.compile:
        torch.compiler.reset()                  # graphs of the phase before
    for name, parameters in groups.items():
        for p in parameters:
            p.requires_grad_(name in phase.trains)
            if name in fresh:
                optimizer.state.pop(p, None)
    set_modes(world, phase)
    for block in world.dit.temporal_blocks:
        block.attn.causal = phase.causal
    part, _ = LOSSES[phase.loss]
    model = world if part == "world" else getattr(world, part)
    if process.ranks == 1:
        return model
    devices = [process.local] if process.cuda else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def memory(cfg, world, phase, process, clips):
    """GB that a process needs for steps of so many clips: of weights, gradients and moments, and in all.

    A step is made as in `train`, but of fake tensors, which have shapes and no values, and what lives at any
    moment is counted. They are a CPU's, on any device. What kernels take for themselves does not count.
    """
    world = deepcopy(world)
    if cfg.mode == "adapt" and not world.adapter:               # --data is not there yet
        world.adapter = Adapter(1, world.lam.cfg)
    alone = Process(precision=process.precision)
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        groups = parameter_groups(world.to_empty(device="cpu"))
        optimizer = adamw(cfg, groups)
        # a first step makes moments, which stay, of all that has trained by the end of the phase
        for row in phases(cfg):
            for p in (p for name in row.trains for p in groups[name]):
                p.grad = torch.empty_like(p)
            if row.name == phase.name:
                break
        optimizer.step()
        model = begin(cfg, alone, world, phase, groups, optimizer, ())
        if cfg.activation_checkpointing:
            save_memory(world)
        trains = [p for name in phase.trains for p in groups[name]]
        state = peak.live + sum(p.nbytes for p in trains)
        if process.ranks * cfg.accumulate > 1:                  # gradients are there before the backward pass
            for p in trains:
                p.grad = torch.empty_like(p)
        peak.most = 0                                           # the first step does not count
        video = torch.empty(clips, 3, cfg.frames, cfg.size, cfg.size)
        actions = torch.empty(clips, cfg.frames - 1, world.adapter.action_dim if world.adapter else 0)
        clip = {"fps": torch.empty(clips), "actions": actions}
        with alone.autocast():
            # the VAE sees one clip: many would take it long, for little beside what training on them takes
            latents = world.vae.encode(video[:1]).expand(clips, -1, -1, -1, -1)
            loss, _ = LOSSES[phase.loss][1](phase, world, model, clip, video, Draw(0), latents)
        if phase.trains:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(world.parameters(), MAX_NORM)
            optimizer.step()
    return state / 1e9, peak.most / 1e9


# the loop ----------------------------------------------------------------------------------------------


def train(cfg, process, run, world, data, groups, optimizer, cache):
    watch, stops, vq_at = Watch(cfg, process, run, world, data), Stops(process.device), quantize_at(cfg)
    end, trained = 0, ()
    for phase in phases(cfg):
        start, end = end, end + phase.steps
        watch.begin(phase, end)
        if run.step >= end:                     # over before the run was resumed
            trained = phase.trains
            continue
        # who starts to train starts with fresh moments
        fresh = set(phase.trains) - set(trained) if run.step == start else ()
        model = begin(cfg, process, world, phase, groups, optimizer, fresh)
        trained = phase.trains
        if run.step == start and phase.dreams:
            run.record("align", phase, **watch.alignment())
        clips_of_phase, (part, loss_of) = data.train[phase.data], LOSSES[phase.loss]
        cached = cache is not None and phase.crop == 1 and part == "world"      # every crop has other latents
        # clip i of a source is always the same, so a run that goes on sees what it would have seen
        for batch in loader(clips_of_phase, phase.batch, run.step, end, process.rank, process.ranks):
            # learning rate; the LAM's is a share of it (--lam_lr)
            lr = phase.learning_rate(run.step)
            for name, group in zip(groups, optimizer.param_groups):
                group["lr"] = lr * (cfg.lam_lr if name == "lam" else 1)
            # the continuous start is over (--vq_start): from here on latent actions are codes
            if "lam" in phase.trains and not world.lam.quantize and run.step >= vq_at:
                fit_codebook(world, clips_of_phase)

            # forward and backward, part by part; noise depends on the seed, the step and the clip alone
            found, parts = [], cfg.accumulate
            for i in range(parts):
                clip = {name: x.chunk(parts)[i] for name, x in batch.items()}
                draw = Draw(cfg.seed, run.step, device=process.device, rank=process.rank * parts + i,
                            ranks=process.ranks * parts)
                video = random_crop(to_video(clip["video"], process.device), phase.crop, draw)
                last = i == parts - 1           # ranks add up their gradients once a step
                with nullcontext() if last or process.ranks == 1 else model.no_sync():
                    with process.autocast():
                        latents = cache.encode(clip["video"], video) if cached else None
                        loss, out = loss_of(phase, world, model, clip, video, draw, latents)
                    (loss / parts).backward()
                found.append({"loss": loss.detach(), **out})
            # of the whole gradient: what does not train has none
            norm = torch.nn.utils.clip_grad_norm_(world.parameters(), MAX_NORM)

            # whether to stop; for the loss a GPU waits, so at every tenth step, and before a checkpoint
            stops.look(sum(f["loss"] for f in found) + norm)
            terminated, done = stops.asked(), run.step + 1
            saves = done % cfg.ckpt_every == 0 or done == end or terminated
            if (saves or not process.cuda or done % 10 == 0) and stops.not_finite():
                run.stop("loss or gradient is not finite")
            optimizer.step()
            run.step += 1
            watch.add(found, norm)              # before gradients are gone
            optimizer.zero_grad()

            # log, save, evaluate; first the checkpoint, as an evaluation may take long
            if watch.logs_at(run.step):
                numbers = watch.numbers()
                run.record("train", phase, **numbers, lr=lr, **run.speed())
                run.bar.set_postfix_str(f"{phase.name} loss {numbers['loss']:.4f}")
            if saves:
                run.save(phase, world, optimizer)
            run.bar.update()
            if terminated:
                wait_for_all()
                run.stop("stopped by SIGTERM", 128 + signal.SIGTERM)
            pause = run.step % cfg.eval_every == 0 or run.step == end
            if process.master and pause and run.step < run.total:
                watch.evaluate("eval", share=2)
    if process.master:
        watch.evaluate("result")


def main(argv):
    cfg = parse(argv, __doc__)
    process = Process.here(cfg.device, cfg.precision)
    with connected(process):
        prepare_and_train(cfg, process)


def prepare_and_train(cfg, process):
    # a dry run of a preset needs none of the files that it would load
    absent = []
    for name in ("data", "dit_weights", "vae_weights"):
        path = getattr(cfg, name)
        if cfg.dry_run and path == PRESETS[cfg.preset].get(name) and not os.path.exists(path):
            absent.append(name)
    state, held = None, None

    def enter():
        """Keep others out of the run's folder; the checkpoint to go on from, where there is one"""
        nonlocal state, held
        if not cfg.dry_run:
            held = lock(run_folder(cfg))
        if cfg.resume == "none" or not checkpoints(cfg.resume):     # without any, a run starts over
            return None
        state, file = newest(cfg.resume)
        return file

    file = of_first(process, enter)
    if file:
        state = state or load_checkpoint(file)
        check_past(cfg, state)
    warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
    with torch.device("meta" if cfg.dry_run else "cpu"):
        world = restore(state, cfg.vae_weights) if state else build(cfg, absent)
    check(cfg, world)
    data = None if "data" in absent else open_data(cfg)
    if data:
        meet(cfg, world, data)
    cfg = adopt(cfg, world)
    world.to("meta" if cfg.dry_run else process.device)
    groups = parameter_groups(world)
    if process.master:
        share, rows = process.ranks * cfg.accumulate, phases(cfg) if cfg.dry_run else []
        needs = {row.name: memory(cfg, world, row, process, row.batch // share) for row in rows}
        if rows:                                # judge.infer and judge.loss_by_time take 64 clips at once
            row = replace(rows[-1], name="evaluations", trains=())
            needs[row.name] = memory(cfg, world, row, process, 64)
        describe(cfg, process, world, groups, absent, needs)
    if cfg.dry_run:
        return
    cache = LatentCache(world.vae, cfg.latent_cache) if cfg.latent_cache != "none" else None
    run = Run(cfg, process, state["step"] if state else 0, file, held)
    optimizer = adamw(cfg, groups)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        del state                                               # it maps the file
    if cfg.compile:
        world.dit.compile()
    if cfg.activation_checkpointing:
        save_memory(world)
    try:
        train(cfg, process, run, world, data, groups, optimizer, cache)
    except KeyboardInterrupt:
        run.stop("stopped by Ctrl-C")
    except OSError as error:                                    # a full disk
        run.stop(f"{run.out}: {error}")
    finally:
        run.bar.close()


if __name__ == "__main__":
    program(main)
