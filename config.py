"""Settings, presets, phases, and the command line of train.py."""

import json
import os
import shlex
from dataclasses import dataclass, field, fields

import torch

from checkpoint import checkpoints
from data import TOY, Parser


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # the run
    name: str = setting("toy", "run name; everything is written to out/NAME, an older run there is moved aside")
    preset: str = setting("tiny", "tiny (a laptop's CPU), small (one GPU) or opensora (the paper)")
    mode: str = setting("joint", "joint: the generator is the forward model; two-stage: first LAM with FDM, then the generator on the frozen LAM; "
                        "pretrain: the generator alone, without actions; adapt: to the real actions of --data, from --init")
    data: str = setting("toy", "toy, or files and folders of video, HDF5 or LeRobot data, several with weights: see python data.py --help")
    seed: int = setting(0, "seed of weights, data order and noise")
    pretrain: int = setting(300, "steps without actions, on web clips for the toy world; none with --dit_weights or --init")
    causal: bool = setting(True, "pretrain: temporal attention is causal, as afterwards; 0: bidirectional, as Open-Sora was trained")
    warmup: int = setting(100, "joint: steps with the generator frozen")
    e2e: int = setting(3000, "joint: steps end to end")
    lam_steps: int = setting(1500, "two-stage: steps of LAM and FDM")
    wm_steps: int = setting(1600, "two-stage: steps of the world model on the frozen LAM")
    adapter_steps: int = setting(1000, "adapt: steps of the adapter from real actions to codes, on 4 batches each")
    adapt_steps: int = setting(600, "adapt: steps of the world model on the frozen LAM")
    real_share: float = setting(0.5, "(ours) adapt: share of clips that the adapter drives, so that the world learns what real actions do where they "
                                "fail, as at a wall; the paper: 0, all driven by inferred actions")
    freeze_lam: bool = setting(False, "joint: the LAM is frozen after warm-up")
    init: str = setting("none", "run folder or checkpoint whose LAM, generator and action modules to start from, with their sizes")
    init_lam: str = setting("none", "run folder or checkpoint whose LAM to start from, with its sizes")
    resume: str = setting("none", "run folder to go on in, with its settings")
    dit_weights: str = setting("none", "generator to start from, with its sizes: Open-Sora's folder or file, or a run of ours (not its action modules)")
    vae_weights: str = setting("none", "Open-Sora's VAE, a folder or file; none: the model works on pixels")
    batch: int = setting(16, "clips a step, over all ranks")
    accumulate: int = setting(1, "parts of a rank's batch that go through the model one after the other (--standardize sees each alone)")
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
    eval_clips: int = setting(64, "held-out clips that are dreamed at the end, half as many before")
    eval_transitions: int = setting(4096, "held-out transitions for probe and NMI at the end, a quarter before; half for the codebook")
    ckpt_every: int = setting(500, "steps between checkpoints")
    keep: int = setting(1, "older checkpoints to keep, as ckpt-STEP.pt")
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
    fdm_depth: int = setting(2, "two-stage: blocks of the FDM")
    vq_start: float = setting(0.39, "(ours) first share of the LAM's steps with continuous latent actions, after which k-means sets the codebook; 0: none")
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
    "small": dict(size=64, frames=16, eval_frames=16, batch=64, accumulate=4, hidden=384, depth=8, heads=6, action_depth=6, time_shift="100", crop=0.8,
                  lam_size=64, lam_patch=8, lam_width=384, lam_depth=6, lam_heads=6, fdm_depth=6, num_codes=32, code_dim=32,
                  pretrain=20000, warmup=8000, e2e=22000, lam_steps=15000, wm_steps=15000, adapt_steps=3000, lr=3e-4, lr_warmup=1000, eval_every=2000, ckpt_every=2000),
    # the paper (appendix B); the share of the crop is ours. Paths are where a download beside the code would lie
    "opensora": dict(data="videos", dit_weights="OpenSora-STDiT-v3", vae_weights="OpenSora-VAE-v1.2",
                     size=256, frames=17, eval_frames=17, batch=128, crop=0.8, pretrain=0, warmup=8000, e2e=52000, lam_steps=30000,
                     wm_steps=30000, adapt_steps=3000, real_share=0.0, lr=7.5e-5, lr_warmup=2000, cooldown=0.0, lam_lr=1.0, vq_start=0.0, pairs=False, odd=False, standardize=False, latent_scale=1.0,
                     lam_size=224, lam_patch=14, lam_width=768, lam_depth=12, lam_heads=12, fdm_depth=12, num_codes=32, code_dim=32,
                     hidden=1152, depth=28, heads=16, patch=2, action_depth=6, action_std=0.01, time_shift="auto", guidance=4.0,
                     eval_every=2000, ckpt_every=1000),
}


# what may differ when a run is resumed
CHANGEABLE = ("resume", "name", "pretrain", "warmup", "e2e", "lam_steps", "wm_steps", "adapter_steps", "adapt_steps", "log_every", "eval_every",
              "eval_clips", "eval_transitions", "ckpt_every", "keep", "accumulate", "device", "compile", "activation_checkpointing", "latent_cache",
              "vae_weights", "dry_run")


def phases(cfg):
    """What a run does, in order: who trains for how many steps. Phases of one schedule share a learning-rate schedule, which
    starts at step `first` and is `length` steps long: models that are trained apart have one each."""
    e2e = {"action", "body"} if cfg.freeze_lam else {"lam", "action", "body"}
    schedules = {"pretrain": [],
                 "two-stage": [[("lam", cfg.lam_steps, {"lam", "fdm"})], [("wm", cfg.wm_steps, {"action", "body"})]],
                 "joint": [[("warmup", cfg.warmup, {"lam", "action"}), ("e2e", cfg.e2e, e2e)]],
                 "adapt": [[("adapter", cfg.adapter_steps, {"adapter"})], [("adapt", cfg.adapt_steps, {"action", "body"})]]}[cfg.mode]
    if cfg.mode == "pretrain" or cfg.dit_weights == cfg.init == "none":
        schedules = [[("pretrain", cfg.pretrain, {"body"})]] + schedules
    rows, first = [], 0
    for schedule in schedules:
        length = sum(steps for _, steps, _ in schedule)
        for name, steps, train in schedule:
            rows.append(dict(name=name, steps=steps, train=train, first=first, length=length,
                             data="web" if name == "pretrain" and cfg.data in TOY else cfg.data,
                             batch=4 * cfg.batch if name == "adapter" else cfg.batch,
                             crop=cfg.crop if train & {"lam"} or name == "pretrain" else 1.0,       # none where the LAM is frozen
                             dreams=name not in ("pretrain", "lam", "adapter")))                    # the generator learns actions
        first += length
    return [row for row in rows if row["steps"]]


def restarted(out):
    """Whether torchrun has restarted this process, on a single node, after a checkpoint of the same launch."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or not checkpoints(out):
        return False
    with open(os.path.join(out, "config.json")) as f:
        return json.load(f).get("torchrun") == os.getppid()


def flag(kind, text):
    if kind is not bool:
        return kind(text)
    return {"1": True, "0": False, "true": True, "false": False}[text.lower()]


def parse(argv):
    """Config from the command line: the values of the preset, or of the run to resume, and over them what was given."""
    parser = Parser(__doc__)
    for f in fields(Config):
        switch = {"nargs": "?", "const": "1"} if f.type is bool else {"nargs": "+"} if f.name == "data" else {}
        text = f"{f.metadata['help']} (tiny: {f.default})"
        parser.add_argument(f"--{f.name}", metavar=f.type.__name__.upper(), help=text, **switch)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if "data" in given:
        given["data"] = shlex.join(given["data"])
    for f in fields(Config):
        if f.name in given:
            try:
                given[f.name] = flag(f.type, given[f.name])
            except (ValueError, KeyError):
                parser.error(f"--{f.name} {given[f.name]}: not {'0 or 1' if f.type is bool else 'a number'}")
    for name, choices in {"preset": PRESETS, "mode": ("joint", "two-stage", "pretrain", "adapt"), "device": ("auto", "cpu", "cuda", "mps")}.items():
        if name in given and given[name] not in choices:
            parser.error(f"--{name} {given[name]}: choose from {', '.join(choices)}")
    base = PRESETS[given.get("preset", "tiny")]
    if given.get("mode") == "adapt":
        base = base | {"batch": 16}             # the paper's (appendix C.2)
    own = os.path.join("out", given.get("name", Config.name))
    if restarted(own):
        given = {"resume": own}
    if given.get("resume", "none") != "none":
        try:
            with open(os.path.join(given["resume"], "config.json")) as f:
                base = json.load(f)
            base.pop("torchrun")
            cfg = Config(**base)
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"--resume {given['resume']}: not the folder of a run, or of another version")
        fixed = [k for k, v in given.items() if v != getattr(cfg, k) and k not in CHANGEABLE]
        if fixed:
            parser.error(f"--{fixed[0]} {given[fixed[0]]}: a run is resumed with its own settings, here {getattr(cfg, fixed[0])}")
    cfg = Config(**(base | given))
    least = {"frames": 2, "eval_frames": 2, "batch": 1, "accumulate": 1, "size": 1, "log_every": 1, "eval_every": 1, "eval_clips": 1,
             "eval_transitions": 8, "ckpt_every": 1, "num_codes": 2, "sampling_steps": 1, "code_dim": 1, "tokens": 1, "lam_size": 1,
             "lam_patch": 1, "lam_width": 4, "lam_heads": 1, "lam_depth": 1, "hidden": 4, "heads": 1, "depth": 1, "patch": 1, "fdm_depth": 1}
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and not value >= least.get(f.name, 0):
            parser.error(f"--{f.name} {value}: must be at least {least.get(f.name, 0)}")
    for width, heads in (("hidden", "heads"), ("lam_width", "lam_heads")):
        if getattr(cfg, width) % (2 * getattr(cfg, heads)) or getattr(cfg, width) % 4:
            parser.error(f"--{width} {getattr(cfg, width)}: must be a multiple of 4 and of 2 x --{heads}, {2 * getattr(cfg, heads)}")
    try:
        assert cfg.time_shift in ("auto", "none") or float(cfg.time_shift) > 0
    except (ValueError, AssertionError):
        parser.error(f"--time_shift {cfg.time_shift}: auto, none, or a number above 0")
    if cfg.device in ("cuda", "mps") and not getattr(torch, {"cuda": "cuda", "mps": "mps"}[cfg.device]).is_available():
        parser.error(f"--device {cfg.device}: there is none here")
    parts = int(os.environ.get("WORLD_SIZE", 1)) * cfg.accumulate
    if cfg.batch % parts:
        parser.error(f"--batch {cfg.batch}: must be a multiple of processes x --accumulate, {parts}")
    if not phases(cfg):
        parser.error("nothing to train: every phase has 0 steps")
    if cfg.vq_start >= 1:
        parser.error(f"--vq_start {cfg.vq_start}: a share of the LAM's steps, below 1")
    if cfg.mode == "adapt" and cfg.init == "none":
        parser.error("--mode adapt: needs --init, a trained world")
    if cfg.mode == "two-stage" and not cfg.lam_steps and cfg.init == cfg.init_lam == "none":
        parser.error("--lam_steps 0: needs --init_lam or --init, a trained LAM")
    if cfg.init != "none" and (cfg.init_lam != "none" or cfg.dit_weights not in ("none", base.get("dit_weights"))):
        parser.error("--init: brings LAM and generator; --init_lam and --dit_weights would replace them")
    if cfg.latent_cache != "none" and (cfg.vae_weights == "none" or not any(p["crop"] == 1 and p["dreams"] for p in phases(cfg))):
        parser.error(f"--latent_cache {cfg.latent_cache}: needs --vae_weights, and --crop 1 as every crop has other latents")
    return cfg
