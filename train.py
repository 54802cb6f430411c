"""Train a latent action world model: pre-train a generator, warm up, co-evolve; or in two stages; or adapt it.

    python train.py                                                             # the toy world, on a laptop
    torchrun --nproc_per_node 8 train.py --mode joint --warmup 8000             # DDP
    python train.py --resume out/toy                                            # go on after a stop

Paper: section 3.3 (which gradients flow in which phase), appendix B.3 (recipe). A phase is a row of `phases`.
Output in out/NAME: config.json, metrics.jsonl, ckpt.pt and older ones, samples/*.gif.
"""

import json
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import toy
from checkpoint import LatentCache, build, checkpoints, newest, restore, save
from config import PRESETS, parse, phases
from data import DataError, clips, loader, parse_source, random_crop, sources, to_video
from evaluate import align, loss_by_time, report, save_gif
from flow import Draw
from lam import Adapter
from metrics import codebook_metrics, collapsed
from run import gather, last_checkpoint, speed, stop


def memory(cfg, world, groups, phase, clips):
    """Estimate of a process's memory in GB: float32 weights, gradients and Adam's moments, and the activations of its clips
    in bf16, by bytes saved a token, unit of width and block (measured with saved-tensor hooks)."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    state = 4 * count(world.parameters()) + 12 * sum(count(groups[g]) for g in phase["train"] if g in groups)
    dit, lam = world.dit.cfg, world.lam.cfg
    seen = cfg.frames * lam.width * ((lam.size // lam.patch) ** 2 + lam.tokens)
    dreamed = world.vae.latent_frames(cfg.frames) * dit.hidden * (cfg.size // (dit.patch * world.vae.pixel_stride)) ** 2
    saved = []                                                                  # token units, blocks, bytes
    if "lam" in phase["train"]:
        saved.append((seen, lam.depth, 96))
    if "fdm" in phase["train"]:
        saved.append((seen, lam.fdm_depth, 73))
    if phase["train"] & {"action", "body"}:
        saved.append((dreamed, 2 * dit.depth, 73 if "body" in phase["train"] else 51))
    again = cfg.activation_checkpointing                                        # then a block's input stays, and one block at a time
    return state / 1e9, clips * sum(n * (4 * blocks + size if again else blocks * size) for n, blocks, size in saved) / 1e9


@torch.no_grad()
def fit_codebook(world, dataset, clips=256):
    """k-means on the latent actions of some training clips; the same codebook on every rank."""
    device = world.lam.vq.codebook.device
    z = [world.lam.infer(to_video(dataset[range(i, i + 64)]["video"], device)) for i in range(0, clips, 64)]
    world.lam.vq.fit(torch.cat(z).flatten(0, 2))
    if dist.is_initialized():
        dist.broadcast(world.lam.vq.codebook.data, 0)


def open_data(cfg):
    """Training and held-out clips by name, and (name, training, held-out clips) where true actions are known: those are
    used to judge, never to train."""
    data, heldout = ({p["data"]: clips(p["data"], cfg.size, frames, cfg.seed, split) for p in phases(cfg)}
                     for frames, split in ((cfg.frames, "train"), (cfg.eval_frames, "heldout")))
    labelled = []
    for text in toy.MIXTURE if cfg.data == "toy" else sources(cfg.data):
        both = [clips([text], cfg.size, cfg.eval_frames, cfg.seed, split) for split in ("train", "heldout")]
        if both[0].labelled and both[1].labelled:
            labelled.append([parse_source(text)[0], *both])
    return data, heldout, labelled


def losses(phase, world, model, clip, video, draw, latents):
    """A phase's loss, and what it found on the way. `model` is the part of the world that DDP may wrap."""
    fps = clip["fps"].to(video.device)
    if phase["name"] == "lam":
        return model(video, draw)
    if phase["name"] == "adapter":
        codes = world.lam.encode(video)[1]                                      # (b, t-1, k)
        logits = model(clip["actions"].to(video.device))                        # (b, t-1, k, num_codes)
        return F.cross_entropy(logits.flatten(0, 2), codes.flatten()), {"accuracy": (logits.argmax(-1) == codes).float().mean(), "indices": codes}
    real = clip["actions"].to(video.device) if phase["name"] == "adapt" else None
    return model(video, draw, fps, phase["name"] != "pretrain", latents, real)


def main(argv):
    cfg = parse(argv)
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    master, cuda = rank == 0, torch.cuda.is_available() and cfg.device in ("auto", "cuda")
    device = f"cuda:{local}" if cuda else cfg.device if cfg.device != "auto" else "cpu"
    state, step, saved = None, 0, None          # saved: step and file of the last checkpoint
    try:
        if cfg.resume != "none" and checkpoints(cfg.resume):                    # without any, a run starts over in its folder
            state, file = newest(cfg.resume)
            step, saved = state["step"], (state["step"], file)
        # a dry run of a preset needs none of the files that it would load
        absent = [k for k in ("data", "dit_weights", "vae_weights") if cfg.dry_run and getattr(cfg, k) == PRESETS[cfg.preset].get(k)
                  and not os.path.exists(getattr(cfg, k))]
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        with torch.device("meta" if cfg.dry_run else "cpu"):
            world = restore(state, cfg.vae_weights if os.path.exists(cfg.vae_weights) else None) if state else build(cfg, absent)
        trains = set().union(*(p["train"] for p in phases(cfg)))
        if not world.lam.quantize and trains != {"body"} and "lam" not in trains:
            raise ValueError("the LAM would stay frozen, but its latent actions are still continuous: the run it comes from was stopped too early")
        if "fdm" in trains and not world.lam.fdm:
            raise ValueError(f"--init {cfg.init}: has no FDM to train; --lam_steps 0 goes on with its LAM")
        data, heldout, labelled = open_data(cfg) if "data" not in absent else (None, None, None)
        if cfg.mode == "adapt" and data and not world.adapter:
            if not heldout[cfg.data].labelled or not labelled:
                raise DataError(f"--data {cfg.data}: has no actions to adapt to; take one robot, e.g. held-out")
            torch.manual_seed(cfg.seed)
            world.adapter = Adapter(heldout[cfg.data][[0]]["actions"].shape[-1], world.lam.cfg)
        cache = LatentCache(world.vae, cfg.latent_cache) if cfg.latent_cache != "none" and not cfg.dry_run else None
    except (DataError, ValueError, FileNotFoundError, RuntimeError) as error:
        stop(error)
    # the sizes of --init, --init_lam and --dit_weights hold
    dit, lam = world.dit.cfg, world.lam.cfg
    cfg = replace(cfg, hidden=dit.hidden, depth=dit.depth, heads=dit.heads, patch=dit.patch, lam_size=lam.size, lam_patch=lam.patch,
                  lam_width=lam.width, lam_depth=lam.depth, lam_heads=lam.heads, num_codes=lam.num_codes, code_dim=lam.code_dim, tokens=lam.tokens,
                  pairs=lam.pairs, odd=lam.odd, difference=lam.difference, standardize=lam.standardize, latent_scale=lam.latent_scale)
    world.to("meta" if cfg.dry_run else device)
    groups = {"lam": [p for name, p in world.lam.named_parameters() if not name.startswith("fdm.")],
              "fdm": list(world.lam.fdm.parameters()) if world.lam.fdm else [], "action": list(world.dit.action.parameters()),
              "body": world.dit.body(), "adapter": list(world.adapter.parameters()) if world.adapter else []}
    groups = {k: v for k, v in groups.items() if v}
    if master:
        sizes = ", ".join(f"{k} {sum(p.numel() for p in v) / 1e6:.2f} M" for k, v in groups.items())
        print(f"{cfg.name}: {sizes} parameters; batch {cfg.batch} = {ranks} x {cfg.accumulate} x {cfg.batch // ranks // cfg.accumulate} "
              f"clips of {cfg.frames} frames on {device}")
        for p in phases(cfg):
            print(f"  {p['name']}: {p['steps']} steps on {p['data']}, trains {' + '.join(sorted(p['train']))}")
            if cfg.dry_run:
                weights, activations = memory(cfg, world, groups, p, p["batch"] // ranks // cfg.accumulate)
                print(f"    about {weights + activations:.1f} GB a process: {weights:.1f} weights, gradients, moments + {activations:.1f} activations in bf16")
    if cfg.dry_run:
        if cfg.preset == "opensora":
            print(f"  IDM {sum(p.numel() for p in world.lam.idm.parameters()) / 1e9:.3f} B, generator with action modules "
                  f"{sum(p.numel() for p in world.dit.parameters()) / 1e9:.3f} B; the paper says 0.93 B, which does not follow from its parts")
        for k in absent:
            print(f"  --{k} {getattr(cfg, k)}: not there yet; a run needs it")
        return
    if ranks > 1:
        if cuda:
            torch.cuda.set_device(device)
        # restarted ranks must not find the addresses of dead ones, so each attempt has keys of its own
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "0"
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])   # (nodes count their restarts apart)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks,
                                timeout=timedelta(hours=2))                     # rank 0 evaluates while the others wait
        steps = gather(torch.tensor(step, device=device)).tolist()
        if len(set(steps)) > 1:
            stop(f"--resume {cfg.resume}: ranks found checkpoints of different steps, {steps}")
    out = os.path.join("out", cfg.name) if cfg.resume == "none" else cfg.resume
    log = os.path.join(out, "metrics.jsonl")
    if master:
        if state:
            print(f"  goes on at step {step} of {file}")
        if cfg.resume == "none" and os.path.exists(out):
            aside = next(f"{out}.{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{out}.{i}"))
            os.rename(out, aside)
            print(f"  {out} exists: moved to {aside}")
        os.makedirs(os.path.join(out, "samples"), exist_ok=True)
        rows = open(log).readlines() if os.path.exists(log) else []
        # rows that come after the checkpoint will be written again
        rows = [(row, json.loads(row)) for row in rows if row.endswith("}\n")]
        rows = "".join(row for row, r in rows if r["step"] <= step and r["event"] != "result" and (r["event"], r["step"]) != ("align", step))
        settings = asdict(replace(cfg, resume="none")) | {"torchrun": os.getppid() if ranks > 1 else None}
        for file, text in {log: rows, os.path.join(out, "config.json"): json.dumps(settings, indent=1)}.items():
            with open(file + ".part", "w") as f:
                f.write(text)
            os.replace(file + ".part", file)

    def record(event, **numbers):
        """One object in metrics.jsonl, one line on the terminal."""
        if master:
            with open(log, "a") as f:
                f.write(json.dumps({"event": event, **numbers}) + "\n")
            short = {k: v for k, v in numbers.items() if "/" not in k}
            tqdm.write(f"{event}: " + " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in short.items()))

    def checkpoint():
        nonlocal saved
        rng = gather(torch.get_rng_state().to(device)).cpu()                    # of every rank
        path = os.path.join(out, "ckpt.pt")
        if master and saved != (step, path):
            save(out, cfg.keep, saved[0] if saved and saved[1] == path else None, step=step, phase=phase["name"], rng=rng, world=world.config(), lam=world.lam.state_dict(),
                 dit=world.dit.state_dict(), adapter=world.adapter and world.adapter.state_dict(), quantize=world.lam.quantize,
                 optimizer=optimizer.state_dict(), config=asdict(cfg))
        saved = step, path

    def evaluate(event, phase, share=1):
        """Measure on held-out clips; `share` of the final numbers of clips."""
        world.eval()
        with autocast, eager():
            if phase["name"] == "pretrain":
                numbers = dict.fromkeys(("utilization", "entropy", "max_usage", "psnr", "psnr_shuffled", "psnr_null", "psnr_copy", "probe_r2",
                                         "probe_l1", "nmi")) | loss_by_time(world, heldout[phase["data"]], 256, False)
            else:
                numbers, videos = report(world, heldout[phase["data"]], labelled, -(-cfg.eval_clips // share) if phase["dreams"] else 0,
                                         min(2048, cfg.eval_transitions), cfg.eval_transitions // share ** 2)
                if videos:
                    save_gif(os.path.join(out, "samples", f"{step:06d}.gif"), videos)
        record(event, phase=phase["name"], step=step, **numbers)

    def eager():
        """Dreams have too many shapes to compile them all."""
        return torch.compiler.set_stance("force_eager") if cfg.compile else nullcontext()

    def diagnose():
        if not (master and phase["dreams"]):
            return {}
        world.eval()
        with autocast, eager():
            numbers = align(world, fixed, known)
        set_modes()
        return numbers

    def set_modes():
        world.train()
        world.lam.train("lam" in phase["train"])                                # a frozen LAM does not update its moments either

    def halt(why, status=1):
        bar.close()
        stop(f"{why} at step {step}; {last_checkpoint(out)}", status)

    optimizer = torch.optim.AdamW([{"params": p} for p in groups.values()], lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=cuda or None)
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if len(state["rng"]) == ranks:
            torch.set_rng_state(state["rng"][rank].clone())
        del state                                                               # it maps the file
    if cfg.compile:
        world.dit.compile()
    if cfg.activation_checkpointing:
        for block in [*world.lam.idm.blocks, *(world.lam.fdm.blocks if world.lam.fdm else []), *world.dit.spatial_blocks, *world.dit.temporal_blocks]:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if master and any(p["dreams"] for p in phases(cfg)):
        fixed = heldout[cfg.data][range(max(8, 256 // (cfg.frames - 1)))]
        known = next((test[range(len(fixed["fps"]))] for name, _, test in labelled if name == "cross"), None)
    lam_phases = [p for p in phases(cfg) if "lam" in p["train"]]
    vq_at = lam_phases[0]["first"] + int(cfg.vq_start * sum(p["steps"] for p in lam_phases)) if lam_phases else None
    terminated, ends, ended = [], torch.zeros(2, device=device), False
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
    end, trained, alarmed = 0, set(), False
    bar = tqdm(total=sum(p["steps"] for p in phases(cfg)), initial=step, disable=None if master else True, dynamic_ncols=True)
    first_step, first_time = step, time.time()
    try:
        for phase in phases(cfg):
            start, end = end, end + phase["steps"]
            if step < end:
                # who trains: the others stay bit-equal; who starts to train starts with fresh moments
                optimizer.zero_grad()
                if cfg.compile:
                    torch.compiler.reset()                                      # graphs of the phase before
                for name, parameters in groups.items():
                    for p in parameters:
                        p.requires_grad_(name in phase["train"])
                        if name not in trained and step == start:
                            optimizer.state.pop(p, None)
                target = {"lam": world.lam, "adapter": world.adapter}.get(phase["name"], world)
                model = DistributedDataParallel(target, [local] if cuda else None, gradient_as_bucket_view=True) if ranks > 1 else target
                set_modes()
                for block in world.dit.temporal_blocks:
                    block.attn.causal = cfg.causal or phase["name"] != "pretrain"
                if step == start and phase["dreams"]:
                    record("align", phase=phase["name"], step=step, **diagnose())
            trained, recent, began, idm_grad = phase["train"], [], time.time(), None
            for batch in loader(data[phase["data"]], phase["batch"], step, end, rank, ranks):
                at = step - phase["first"]
                lr = cfg.lr * min(1, (at + 1) / max(1, cfg.lr_warmup))
                if cfg.cooldown:
                    lr *= min(1, (phase["length"] - at) / (cfg.cooldown * phase["length"]))
                for name, group in zip(groups, optimizer.param_groups):
                    group["lr"] = lr * (cfg.lam_lr if name == "lam" else 1)
                if "lam" in phase["train"] and not world.lam.quantize and step >= vq_at:
                    fit_codebook(world, data[phase["data"]])
                    world.lam.quantize = True

                parts, found = cfg.accumulate, []
                for i in range(parts):
                    clip = {k: v.chunk(parts)[i] for k, v in batch.items()}
                    draw = Draw(cfg.seed, step, device=device, rank=rank * parts + i, ranks=ranks * parts)
                    video = random_crop(to_video(clip["video"], device), phase["crop"], draw)
                    with model.no_sync() if ranks > 1 and i < parts - 1 else nullcontext():
                        with autocast:
                            cached = cache and phase["crop"] == 1 and phase["train"] & {"action", "body"}
                            latents = cache.encode(clip["video"], video) if cached else None
                            loss, out_of = losses(phase, world, model, clip, video, draw, latents)
                        (loss / parts).backward()
                    found.append({"loss": loss.detach(), **out_of})
                norm = torch.nn.utils.clip_grad_norm_(world.parameters(), cfg.clip)
                bad = sum(f["loss"] for f in found) + norm
                ends = torch.maximum(ends, torch.stack([~bad.isfinite(), torch.tensor(bool(terminated), device=device)]).float())
                # a GPU waits for the CPU to read this, so it does at every tenth step, and before a checkpoint
                if not cuda or step % 10 == 9 or (step + 1) % cfg.ckpt_every == 0 or step + 1 == end:
                    if ranks > 1:                                               # all end at the same step, or none
                        dist.all_reduce(ends, dist.ReduceOp.MAX)
                    not_finite, ended = ends.tolist()
                    if not_finite:
                        halt("loss or gradient is not finite")
                optimizer.step()
                step += 1

                mean = lambda k: torch.stack([f[k] for f in found]).mean()
                numbers = {k: mean(k) for k, v in found[0].items() if k != "indices" and v.dim() == 0} | {"norm": norm}
                recent = recent[-49:] + [(numbers, torch.cat([f["indices"] for f in found]) if phase["name"] != "pretrain" else None)]
                if step % cfg.log_every in (0, cfg.log_every - 1) and "lam" in phase["train"]:
                    before, idm_grad = idm_grad, torch.cat([p.grad.flatten() for p in world.lam.idm.parameters()])
                optimizer.zero_grad()
                if step % cfg.log_every == 0 or step == end:
                    shown = {k: torch.stack([r[0][k] for r in recent[-cfg.log_every:]]).mean().item() for k in numbers}
                    if phase["name"] != "pretrain" and world.lam.quantize:
                        indices = gather(torch.stack([r[1] for r in recent])).flatten(0, -2)
                        shown |= codebook_metrics(indices, world.lam.cfg.num_codes)
                        if "lam" in phase["train"] and collapsed(indices) != alarmed:
                            alarmed = not alarmed
                            record("alarm", phase=phase["name"], step=step, message="the codebook has collapsed: nearly all transitions have "
                                   "the same codes" if alarmed else "the codebook has recovered", max_usage=shown["max_usage"])
                    if idm_grad is not None and before is not None:
                        shown["grad_cosine"] = F.cosine_similarity(before, idm_grad, 0).item()
                    record("train", phase=phase["name"], step=step, **shown, **diagnose(), lr=lr, seconds=round(time.time() - began, 1),
                           **speed(step - first_step, bar.total - step, time.time() - first_time))
                    bar.set_postfix_str(f"{phase['name']} loss {shown['loss']:.4f}")
                if step % cfg.ckpt_every == 0 or step == end or ended:
                    checkpoint()
                bar.update()
                if ended:
                    halt("ended by SIGTERM", 128 + signal.SIGTERM)
                if master and (step % cfg.eval_every == 0 or step == end) and step < bar.total:
                    evaluate("eval", phase, share=2)
                    set_modes()
        if master:
            evaluate("result", phase)
    except KeyboardInterrupt:
        halt("interrupted")
    finally:
        bar.close()
        if ranks > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
