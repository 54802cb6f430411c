"""Train a latent action world model: pre-train a generator, warm up, co-evolve.

    python train.py                                                             # the toy world, on a laptop
    torchrun --nproc_per_node 8 train.py --mode joint --warmup 8000             # DDP

Paper: section 3.3 (which gradients flow in which phase), appendix B.3 (recipe). A phase is a row of `phases`.
Output in out/NAME: config.json, metrics.jsonl, ckpt.pt, samples/*.gif.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

import imageio.v3 as imageio
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import toy
from data import DataError, clips, loader, random_crop, to_video
from dit import DiT, DiTConfig, load_opensora
from evaluate import loss_by_time, report
from flow import Draw, FlowConfig, World, load_checkpoint
from lam import LAM, LAMConfig
from vae import LatentCache, OpenSoraVAE, PixelVAE, load_opensora_vae
from vq import codebook_metrics


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # the run
    name: str = setting("toy", "run name; everything is written to out/NAME, an older run there is moved aside")
    preset: str = setting("tiny", "tiny (a laptop's CPU), small (one GPU) or opensora (the paper)")
    mode: str = setting("joint", "joint: the generator is the forward model; pretrain: the generator alone, without actions")
    data: str = setting("toy", "toy, or a video file, or a folder of video files")
    seed: int = setting(0, "seed of weights, data order and noise")
    pretrain: int = setting(300, "steps without actions, on web clips for the toy world; 0 or --dit_weights: none")
    warmup: int = setting(100, "steps with the generator frozen")
    e2e: int = setting(3000, "steps end to end")
    dit_weights: str = setting("none", "generator to start from, with its sizes: Open-Sora's folder or file, or a run of ours (not its action modules)")
    vae_weights: str = setting("none", "Open-Sora's VAE, a folder or file; none: the model works on pixels")
    batch: int = setting(16, "clips a step, over all ranks")
    frames: int = setting(2, "frames a training clip, T; dreams see the last T-1")
    eval_frames: int = setting(8, "frames of the held-out clips that are dreamed from their first")
    size: int = setting(16, "pixels of a square frame")
    crop: float = setting(1.0, "smallest side of the random crop, as a share of the frame; 1: none")
    lr: float = setting(2e-3, "learning rate (AdamW)")
    lr_warmup: int = setting(50, "steps of linear learning-rate warm-up")
    cooldown: float = setting(0.3, "last share of the steps over which the learning rate falls to zero (ours); 0: constant")
    lam_lr: float = setting(0.1, "(ours) learning rate of IDM and codebook, as a share of --lr")
    clip: float = setting(1.0, "largest norm of the gradient")
    log_every: int = setting(50, "steps between log lines")
    eval_every: int = setting(1000, "steps between evaluations on held-out clips")
    ckpt_every: int = setting(500, "steps between checkpoints")
    device: str = setting("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps")
    compile: bool = setting(False, "torch.compile the DiT")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third slower")
    latent_cache: str = setting("none", "folder that keeps the VAE's latents of clips for later epochs and runs; needs --crop 1")
    dry_run: bool = setting(False, "check everything, print what would train, and stop")
    # latent action model
    lam_size: int = setting(16, "pixels of the IDM's square frame")
    lam_patch: int = setting(4, "the IDM's patch")
    lam_width: int = setting(64, "the IDM's width")
    lam_depth: int = setting(2, "the IDM's blocks")
    lam_heads: int = setting(2, "the IDM's attention heads")
    num_codes: int = setting(8, "codes in the codebook")
    code_dim: int = setting(16, "width of a code")
    tokens: int = setting(2, "codes a transition")
    latent_scale: float = setting(0.03, "(ours) scale of the latent actions: what the VQ losses' weight of 1 means")
    pairs: bool = setting(True, "(ours) the IDM sees only the two frames of a transition")
    odd: bool = setting(True, "(ours) latent actions are odd in time: the reversed pair has the opposite one")
    difference: bool = setting(False, "(ours) the IDM sees frame differences instead of frames")
    standardize: bool = setting(True, "(ours) normalise the IDM's output before quantizing")
    vq_start: int = setting(1200, "(ours) steps of warm-up and e2e with continuous latent actions; then k-means sets the codebook")
    # world model
    hidden: int = setting(128, "the DiT's width")
    depth: int = setting(2, "the DiT's pairs of a spatial and a temporal block")
    heads: int = setting(8, "the DiT's attention heads")
    patch: int = setting(4, "the DiT's patch")
    action_depth: int = setting(2, "causal blocks over the action sequence")
    action_std: float = setting(0.2, "standard deviation of the action MLP's last layer at the start")
    time_shift: str = setting("40", "flow-time shift: auto (Open-Sora's formula), none, or a number r")
    sampling_steps: int = setting(10, "Euler steps of the sampler")
    guidance: float = setting(1.0, "scale of action guidance; 1: none")


PRESETS = {
    "tiny": {},                 # the defaults above
    # not yet trained: no GPU was at hand
    "small": dict(size=64, frames=16, eval_frames=16, batch=64, hidden=384, depth=8, heads=6, action_depth=6, time_shift="100", crop=0.8,
                  lam_size=64, lam_patch=8, lam_width=384, lam_depth=6, lam_heads=6, num_codes=32, code_dim=32,
                  pretrain=20000, warmup=8000, e2e=22000, vq_start=10000, lr=3e-4, lr_warmup=1000, eval_every=2000, ckpt_every=2000),
    # the paper (appendix B); the share of the crop is ours. Paths are where a download beside the code would lie
    "opensora": dict(data="videos", dit_weights="OpenSora-STDiT-v3", vae_weights="OpenSora-VAE-v1.2",
                     size=256, frames=17, eval_frames=17, batch=128, crop=0.8, pretrain=0, warmup=8000, e2e=52000, lr=7.5e-5, lr_warmup=2000,
                     cooldown=0.0, lam_lr=1.0, vq_start=0, pairs=False, odd=False, standardize=False, latent_scale=1.0,
                     lam_size=224, lam_patch=14, lam_width=768, lam_depth=12, lam_heads=12, num_codes=32, code_dim=32,
                     hidden=1152, depth=28, heads=16, patch=2, action_depth=6, action_std=0.01, time_shift="auto", guidance=4.0,
                     eval_every=2000, ckpt_every=1000),
}


def phases(cfg):
    """What a run does, in order. A row: steps, data, groups of parameters that train, whether actions are used, and the
    first step and length of its learning-rate schedule (pre-training has one of its own)."""
    pretrain = dict(name="pretrain", steps=cfg.pretrain, data="web" if cfg.data == "toy" else cfg.data, train={"body"}, actions=False)
    warmup = dict(name="warmup", steps=cfg.warmup, data=cfg.data, train={"lam", "action"}, actions=True)
    e2e = dict(name="e2e", steps=cfg.e2e, data=cfg.data, train={"lam", "action", "body"}, actions=True)
    pretrained = [pretrain] if cfg.dit_weights == "none" and cfg.pretrain else []
    main = [] if cfg.mode == "pretrain" else [p for p in (warmup, e2e) if p["steps"]]
    first = 0
    for schedule in (pretrained, main):
        length = sum(p["steps"] for p in schedule)
        for p in schedule:
            p.update(first=first, length=length)
        first += length
    return pretrained + main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: {message}\n")


def flag(kind, text):
    if kind is not bool:
        return kind(text)
    return {"1": True, "0": False, "true": True, "false": False}[text.lower()]


def parse(argv):
    """Config from the command line: the preset's values, and over them what was given."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        switch = {"nargs": "?", "const": "1"} if f.type is bool else {}
        text = f"{f.metadata['help']} (tiny: {f.default})"
        parser.add_argument(f"--{f.name}", metavar=f.type.__name__.upper(), help=text, **switch)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for f in fields(Config):
        if f.name in given:
            try:
                given[f.name] = flag(f.type, given[f.name])
            except (ValueError, KeyError):
                parser.error(f"--{f.name} {given[f.name]}: not {'0 or 1' if f.type is bool else 'a number'}")
    for name, choices in {"preset": PRESETS, "mode": ("joint", "pretrain"), "device": ("auto", "cpu", "cuda", "mps")}.items():
        if name in given and given[name] not in choices:
            parser.error(f"--{name} {given[name]}: choose from {', '.join(choices)}")
    cfg = Config(**(PRESETS[given.get("preset", "tiny")] | given))
    least = {"frames": 2, "eval_frames": 2, "batch": 1, "size": 1, "log_every": 1, "eval_every": 1, "ckpt_every": 1, "num_codes": 2, "sampling_steps": 1}
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and value < least.get(f.name, 0):
            parser.error(f"--{f.name} {value}: must be at least {least.get(f.name, 0)}")
    if cfg.batch % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--batch {cfg.batch}: must be a multiple of the number of processes, {os.environ['WORLD_SIZE']}")
    if not phases(cfg):
        parser.error("nothing to train: every phase has 0 steps")
    if cfg.latent_cache != "none" and (cfg.crop < 1 or cfg.vae_weights == "none"):
        parser.error(f"--latent_cache {cfg.latent_cache}: needs --crop 1, as every crop has other latents, and --vae_weights")
    return cfg


def load_generator(path, **action):
    """DiT with the weights of a run of ours or of Open-Sora, and fresh action modules."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "ckpt.pt")):
        return load_opensora(path, **action)
    try:
        state = load_checkpoint(path)
    except ValueError:
        return load_opensora(path, **action)
    dit = DiT(replace(DiTConfig(**state["world"]["dit"]), **action))
    dit.load_state_dict(dit.state_dict() | {k: v for k, v in state["dit"].items() if not k.startswith("action.")})
    return dit


def build(cfg, absent=()):
    """World with fresh weights, but for those that --dit_weights and --vae_weights name, unless they are `absent`."""
    lam = LAMConfig(cfg.lam_size, cfg.lam_patch, cfg.lam_width, cfg.lam_depth, cfg.lam_heads, 0, cfg.num_codes, cfg.code_dim,
                    cfg.tokens, cfg.pairs, cfg.odd, cfg.difference, cfg.standardize, cfg.latent_scale)
    vae = PixelVAE() if cfg.vae_weights == "none" else OpenSoraVAE() if "vae_weights" in absent else load_opensora_vae(cfg.vae_weights)
    action = dict(action_dim=vae.time_stride * cfg.tokens * cfg.code_dim, action_depth=cfg.action_depth,
                  action_scale=cfg.latent_scale, action_std=cfg.action_std)
    if cfg.dit_weights == "none" or "dit_weights" in absent:
        outputs = vae.channels if cfg.vae_weights == "none" else 2 * vae.channels
        dit = DiT(DiTConfig(cfg.hidden, cfg.heads, cfg.depth, vae.channels, cfg.patch, outputs, vae.pixel_stride, **action))
    else:
        dit = load_generator(cfg.dit_weights, **action)
    if cfg.size % (dit.cfg.patch * vae.pixel_stride):
        raise ValueError(f"--size {cfg.size} is not a multiple of {dit.cfg.patch * vae.pixel_stride}, the side of the DiT's patch in pixels")
    flow = FlowConfig(cfg.time_shift, window=vae.latent_frames(cfg.frames) - 1, sampling_steps=cfg.sampling_steps, guidance=cfg.guidance)
    world = World(LAM(lam), dit, vae, flow)
    [world.check_frames(t) for t in (cfg.frames, cfg.eval_frames)]
    return world


def memory(cfg, world, groups, phase, clips):
    """Estimate of a GPU's memory in GB: float32 weights, gradients and Adam's moments, and the activations of its clips in
    bf16, by bytes that are saved a token, unit of width and block (measured with saved-tensor hooks)."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    trained = sum(count(groups[g]) for g in phase["train"])
    state = 4 * count(world.parameters()) + 12 * trained
    dit, lam, latents = world.dit.cfg, cfg, world.vae.latent_frames(cfg.frames)
    tokens = latents * (cfg.size // (dit.patch * world.vae.pixel_stride)) ** 2
    frame = (cfg.lam_size // cfg.lam_patch) ** 2 + cfg.tokens
    saved = [(tokens * dit.hidden, 2 * dit.depth, 73 if "body" in phase["train"] else 51)]
    if phase["actions"]:
        saved.append((cfg.frames * frame * cfg.lam_width, cfg.lam_depth, 96))
    if cfg.activation_checkpointing:
        activations = sum(n * (4 * blocks + size) for n, blocks, size in saved)
    else:
        activations = sum(n * blocks * size for n, blocks, size in saved)
    return state / 1e9, activations * clips / 1e9


def save(path, **state):
    """Write a checkpoint atomically."""
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def save_gif(path, videos, fps=4, rows=4):
    """Videos [(n, 3, t, h, w) in [-1, 1], ...] side by side, one clip a row, as a GIF."""
    grid = torch.cat([torch.cat(list(F.pad(v[:rows], (1, 1, 1, 1), value=1.0)), 2) for v in videos], 3)  # (3, t, rows*h, n*w)
    scale = max(1, 128 // videos[0].shape[-1])
    frames = ((grid + 1) * 127.5).round().byte().permute(1, 2, 3, 0).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    imageio.imwrite(path, frames.numpy(), duration=1000 / fps, loop=0)


def gather(x):
    """x of all ranks, stacked"""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


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
    sources = list(toy.MIXTURE) if cfg.data == "toy" else [cfg.data] if "actions" in heldout[phases(cfg)[-1]["data"]][[0]] else []
    labelled = [[s] + [clips(s, cfg.size, cfg.eval_frames, cfg.seed, split) for split in ("train", "heldout")] for s in sources]
    return data, heldout, labelled


def main(argv):
    cfg = parse(argv)
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    master, cuda = rank == 0, torch.cuda.is_available() and cfg.device in ("auto", "cuda")
    device = f"cuda:{local}" if cuda else cfg.device if cfg.device != "auto" else "cpu"
    torch.manual_seed(cfg.seed)
    try:
        # a dry run of a preset needs none of the files that it would load
        absent = [k for k in ("data", "dit_weights", "vae_weights") if cfg.dry_run and getattr(cfg, k) == PRESETS[cfg.preset].get(k)
                  and not os.path.exists(getattr(cfg, k))]
        with torch.device("meta" if cfg.dry_run else "cpu"):
            world = build(cfg, absent)
        data, heldout, labelled = open_data(cfg) if "data" not in absent else (None, None, None)
        cache = LatentCache(world.vae, cfg.latent_cache) if cfg.latent_cache != "none" and not cfg.dry_run else None
    except (DataError, ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"train.py: {error}")
    for k in ("hidden", "depth", "heads", "patch"):                             # those of --dit_weights hold
        setattr(cfg, k, getattr(world.dit.cfg, k))
    world.to("meta" if cfg.dry_run else device)
    groups = {"lam": list(world.lam.parameters()), "action": list(world.dit.action.parameters()), "body": world.dit.body()}
    if master:
        sizes = ", ".join(f"{k} {sum(p.numel() for p in v) / 1e6:.2f} M" for k, v in groups.items())
        print(f"{cfg.name}: {sizes} parameters; batch {cfg.batch} = {ranks} x {cfg.batch // ranks} clips of {cfg.frames} frames on {device}")
        for p in phases(cfg):
            print(f"  {p['name']}: {p['steps']} steps on {p['data']}, trains {' + '.join(sorted(p['train']))}")
            if cfg.dry_run:
                state, activations = memory(cfg, world, groups, p, cfg.batch // ranks)
                print(f"    about {state + activations:.1f} GB a process: {state:.1f} weights, gradients, moments + {activations:.1f} activations in bf16")
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
        dist.init_process_group("nccl" if cuda else "gloo")
    out = os.path.join("out", cfg.name)
    if master:
        if os.path.exists(out):
            aside = next(f"{out}.{i}" for i in range(1, 10 ** 6) if not os.path.exists(f"{out}.{i}"))
            os.rename(out, aside)
            print(f"  {out} exists: moved to {aside}")
        os.makedirs(os.path.join(out, "samples"))
        with open(os.path.join(out, "config.json"), "w") as f:
            json.dump(asdict(cfg), f, indent=1)

    def record(event, **numbers):
        """One object in metrics.jsonl, one line on the terminal."""
        if master:
            with open(os.path.join(out, "metrics.jsonl"), "a") as f:
                f.write(json.dumps({"event": event, **numbers}) + "\n")
            short = {k: v for k, v in numbers.items() if "/" not in k}
            tqdm.write(f"{event}: " + " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in short.items()))

    def checkpoint():
        if master:
            save(os.path.join(out, "ckpt.pt"), world=world.config(), lam=world.lam.state_dict(), dit=world.dit.state_dict(),
                 quantize=world.lam.quantize, step=step, config=asdict(cfg))

    def evaluate(event, phase, **size):
        world.eval()
        if phase["actions"]:
            numbers, videos = report(world, heldout[phase["data"]], labelled, **size)
            save_gif(os.path.join(out, "samples", f"{step:06d}.gif"), videos)
        else:
            numbers = loss_by_time(world, heldout[phase["data"]], 256, False)
        record(event, phase=phase["name"], step=step, **numbers)
        world.train()

    optimizer = torch.optim.AdamW([{"params": p} for p in groups.values()], lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.01)
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    if cfg.compile:
        world.dit.compile()
    if cfg.activation_checkpointing:
        for block in [*world.lam.idm.blocks, *world.dit.spatial_blocks, *world.dit.temporal_blocks]:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    step, saved, trained = 0, None, set()
    bar = tqdm(total=sum(p["steps"] for p in phases(cfg)), disable=not master, dynamic_ncols=True)
    try:
        for phase in phases(cfg):
            # who trains: the others stay bit-equal; who starts to train starts with fresh moments
            for name, parameters in groups.items():
                for p in parameters:
                    p.requires_grad_(name in phase["train"])
                    if name not in trained:
                        optimizer.state.pop(p, None)
            trained = phase["train"]
            model = DistributedDataParallel(world, [local] if cuda else None, gradient_as_bucket_view=True) if ranks > 1 else world
            world.train()
            end, recent, began = step + phase["steps"], [], time.time()
            for batch in loader(data[phase["data"]], cfg.batch, step, end, rank, ranks):
                at = step - phase["first"]
                lr = cfg.lr * min(1, (at + 1) / max(1, cfg.lr_warmup))
                if cfg.cooldown:
                    lr *= min(1, (phase["length"] - at) / (cfg.cooldown * phase["length"]))
                for name, group in zip(groups, optimizer.param_groups):
                    group["lr"] = lr * (cfg.lam_lr if name == "lam" else 1)
                if phase["actions"] and at <= cfg.vq_start:
                    world.lam.quantize = at == cfg.vq_start
                    if at == cfg.vq_start:
                        fit_codebook(world, data[phase["data"]])

                draw = Draw(cfg.seed, step, device=device, rank=rank, ranks=ranks)
                video = random_crop(to_video(batch["video"], device), cfg.crop, draw)
                with autocast:
                    latents = cache.encode(batch["video"], video) if cache else None
                    loss, found = model(video, draw, batch["fps"].to(device), phase["actions"], latents)
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(world.parameters(), cfg.clip)
                optimizer.step()
                step += 1

                recent = recent[-49:] + [{"flow": found["flow"], "vq": found["vq"], "norm": norm, "indices": found["indices"]}]
                if step % cfg.log_every == 0 or step == end:
                    mean = lambda k: torch.stack([r[k] for r in recent[-cfg.log_every:]]).mean().item()
                    numbers = {k: mean(k) for k in ("flow", "vq", "norm")}
                    if phase["actions"]:
                        numbers |= codebook_metrics(gather(torch.stack([r["indices"] for r in recent])), cfg.num_codes)
                    record("train", phase=phase["name"], step=step, **numbers, lr=lr, seconds=round(time.time() - began, 1))
                    bar.set_postfix_str(f"{phase['name']} loss {numbers['flow']:.4f}")
                if step % cfg.eval_every == 0 or step == end:
                    if master and step < bar.total:
                        evaluate("eval", phase, clips=32, pairs=1024)
                if step % cfg.ckpt_every == 0 or step == end:
                    checkpoint()
                    saved = step
                bar.update()
        if master:
            evaluate("result", phase)
    except KeyboardInterrupt:
        kept = f"the last checkpoint, of step {saved}, is {out}/ckpt.pt" if saved else "no checkpoint was written yet"
        sys.exit(f"train.py: interrupted at step {step}; {kept}")
    finally:
        bar.close()
        if ranks > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
