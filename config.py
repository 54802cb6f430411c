"""Settings, presets, phases, and the command line that sets them.

A setting is written once, in its field of `Config`: default, help, bounds, the model size that it is.
Presets are plain dicts over those defaults. `phases` says what a run does: a phase is a row of data, the
loop is the same for all.
Paper: section 3.3 (which gradients flow in which phase), appendix B.3 (recipe).
"""

import glob
import json
import os
import shlex
from dataclasses import dataclass, field, fields, replace

import torch

from data import TOY, Parser, misfit

PRECISIONS = ("auto", "fp32", "bf16")


def setting(default, help, least=0, most=1e9, choices=None, size="", changes=False):
    """A field of `Config`: a number with least <= value <= most, or a text of some choices.

    size: the field of LAMConfig, DiTConfig or FlowConfig that it is. changes: a resumed run may change it.
    """
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices,
                                                size=size, changes=changes))


@dataclass
class Config:
    # the run
    name: str = setting("toy", "all is written to out/NAME; an older run there is moved aside", changes=True)
    preset: str = setting("tiny", "tiny (a laptop's CPU), small (one GPU) or opensora (the paper)",
                          choices=("tiny", "small", "opensora"))
    mode: str = setting("joint", "joint: the generator is the forward model; two-stage: first LAM with "
                                 "FDM, then the generator on the frozen LAM; pretrain: the generator "
                                 "alone, without actions; adapt: to the real actions of --data, from "
                                 "--init; vae: a small VAE of frames, for --vae_weights",
                      choices=("joint", "two-stage", "pretrain", "adapt", "vae"))
    data: str = setting("toy", "toy, or sources of video with weights: see python data.py --help")
    seed: int = setting(0, "seed of weights, data order and noise")
    init: str = setting("none", "run or checkpoint whose LAM, generator, action modules to start from")
    init_lam: str = setting("none", "run or checkpoint whose LAM to start from")
    resume: str = setting("none", "run folder to go on in, with its settings", changes=True)
    dit_weights: str = setting("none", "generator to start from: Open-Sora's folder or file, or our run")
    vae_weights: str = setting("none", "Open-Sora's VAE, a folder or file, or a run of --mode vae; none: "
                                       "pixels", changes=True)
    # phases
    pretrain: int = setting(300, "steps without actions; none with --dit_weights or --init", changes=True)
    causal: bool = setting(True, "pretrain: causal attention, as afterwards; 0: as Open-Sora, bidirectional")
    warmup: int = setting(100, "joint: steps with the generator frozen", changes=True)
    e2e: int = setting(3000, "joint: steps end to end", changes=True)
    freeze_lam: bool = setting(False, "joint: the LAM is frozen after warm-up")
    lam_steps: int = setting(1500, "two-stage: steps of LAM and FDM", changes=True)
    wm_steps: int = setting(1600, "two-stage: steps of the world model on the frozen LAM", changes=True)
    adapter_steps: int = setting(1000, "adapt: steps of the adapter, on 4 batches each", changes=True)
    adapt_steps: int = setting(600, "adapt: steps of the world model on the frozen LAM", changes=True)
    vae_steps: int = setting(3000, "vae: steps of the VAE", changes=True)
    actions: str = setting("latent", "joint: what drives the generator: latent actions, or the true ones of "
                                     "--data, the upper bound, with no LAM", choices=("latent", "true"))
    real_share: float = setting(0.5, "(ours) adapt: share of clips driven by real actions, through "
                                     "the adapter; the paper: 0", most=1, size="flow.real_share")
    # clips
    batch: int = setting(16, "clips a step, over all ranks", 1, 1e5)
    accumulate: int = setting(1, "parts into which a rank's batch is cut, for memory", least=1, changes=True)
    frames: int = setting(2, "frames a training clip, T; dreams see the last T-1", 2, 1e4)
    eval_frames: int = setting(8, "frames of the held-out clips that are dreamed from their first", 2, 1e4)
    size: int = setting(16, "pixels of a square frame", 1, 1e4)
    crop: float = setting(1.0, "smallest side of the random crop, a share of the frame; 1: none", 0.01, 1)
    # learning
    lr: float = setting(2e-3, "learning rate (AdamW)")
    lr_warmup: int = setting(50, "steps of linear learning-rate warm-up")
    cooldown: float = setting(0.3, "(ours) last share of the steps, in which the rate falls to zero", most=1)
    lam_lr: float = setting(0.1, "(ours) learning rate of IDM and codebook, as a share of --lr")
    # looking and keeping
    log_every: int = setting(50, "steps between log lines", least=1, changes=True)
    eval_every: int = setting(1000, "steps between evaluations on held-out clips", least=1, changes=True)
    eval_clips: int = setting(64, "held-out clips dreamed at the end, half before; probe and NMI take 64 "
                                  "transitions a clip, a quarter before, the codebook as many, up to 2048",
                              least=1, changes=True)
    ckpt_every: int = setting(500, "steps between checkpoints", least=1, changes=True)
    keep: int = setting(1, "older checkpoints to keep, as ckpt-STEP.pt", changes=True)
    # the machine
    device: str = setting("auto", "auto (cuda if there is one, else cpu), cpu, cuda or mps",
                          choices=("auto", "cpu", "cuda", "mps"), changes=True)
    precision: str = setting("auto", "auto (bf16 autocast on cuda, else fp32), fp32 or bf16",
                             choices=PRECISIONS, changes=True)
    compile: bool = setting(False, "torch.compile the DiT", changes=True)
    activation_checkpointing: bool = setting(False, "a third slower, for less memory", changes=True)
    latent_cache: str = setting("none", "folder for the VAE's latents of clips; needs --crop 1", changes=True)
    dry_run: bool = setting(False, "check everything, print what would train, and stop", changes=True)
    # latent action model
    lam_size: int = setting(16, "pixels of the IDM's square frame", 1, 1e4, size="lam.size")
    lam_patch: int = setting(4, "the IDM's patch", 1, 1e3, size="lam.patch")
    lam_width: int = setting(64, "the IDM's; heads have 64 channels, or half", 4, 1e5, size="lam.width")
    lam_depth: int = setting(2, "blocks of the IDM, and of the FDM", 1, 1e3, size="lam.depth")
    num_codes: int = setting(8, "codes in the codebook", 2, 1e6, size="lam.num_codes")
    code_dim: int = setting(16, "width of a code", 1, 1e4, size="lam.code_dim")
    tokens: int = setting(2, "codes a transition", 1, 1e3, size="lam.tokens")
    latent_scale: float = setting(0.03, "(ours) scale of latent actions, by which the VQ losses weigh",
                                  least=1e-6, size="lam.latent_scale")
    odd: bool = setting(True, "(ours) a reversed pair of frames has the opposite action", size="lam.odd")
    standardize: bool = setting(True, "(ours) of the IDM's output, over the batch", size="lam.standardize")
    vq_start: float = setting(0.39, "(ours) first share of the LAM's steps, in which latent actions are "
                                    "continuous; then k-means sets the codebook", most=0.99)
    # world model
    hidden: int = setting(128, "the DiT's width", 4, 1e5, size="dit.hidden")
    depth: int = setting(2, "the DiT's pairs of a spatial and a temporal block", 1, 1e3, size="dit.depth")
    heads: int = setting(8, "the DiT's attention heads", 1, 1e4, size="dit.heads")
    patch: int = setting(4, "the DiT's patch", 1, 1e3, size="dit.patch")
    action_std: float = setting(0.2, "std of the action MLP's last layer at the start", size="dit.action_std")
    time_shift: str = setting("40", "flow time's: auto (Open-Sora's), none, a number", size="flow.time_shift")
    sampling_steps: int = setting(10, "Euler steps of the sampler", least=1, size="flow.sampling_steps")
    guidance: float = setting(1.0, "scale of action guidance; 1: none", size="flow.guidance")


PRESETS = {
    "tiny": {},                 # the defaults above
    # not yet trained: no GPU was at hand
    "small": dict(
        size=64, frames=16, eval_frames=16, crop=0.8, batch=64, accumulate=4,
        hidden=384, depth=8, heads=6, time_shift="100",
        lam_size=64, lam_patch=8, lam_width=384, lam_depth=6, num_codes=32, code_dim=32,
        pretrain=20000, warmup=8000, e2e=22000, lam_steps=15000, wm_steps=15000, adapt_steps=3000,
        lr=3e-4, lr_warmup=1000, eval_every=2000, ckpt_every=2000),
    # the paper (appendix B); the share of the crop is ours. Paths: where a download beside the code would lie
    "opensora": dict(
        data="videos", dit_weights="OpenSora-STDiT-v3", vae_weights="OpenSora-VAE-v1.2",
        size=256, frames=17, eval_frames=17, crop=0.8, batch=128,
        hidden=1152, depth=28, heads=16, patch=2, action_std=0.01, time_shift="auto", guidance=4.0,
        lam_size=224, lam_patch=14, lam_width=768, lam_depth=12, num_codes=32, code_dim=32,
        pretrain=0, warmup=8000, e2e=52000, lam_steps=30000, wm_steps=30000, adapt_steps=3000,
        lr=7.5e-5, lr_warmup=2000, eval_every=2000, ckpt_every=1000,
        # none of our additions
        real_share=0.0, cooldown=0.0, lam_lr=1.0, vq_start=0.0, odd=False, standardize=False,
        latent_scale=1.0),
}

ADAPT_BATCH = 16                # the paper's (appendix C.2)


def sizes(cfg, part):
    """The settings that are fields of a part's own config: part "lam", "dit" or "flow" -> {field: value}"""
    own = [f for f in fields(cfg) if f.metadata["size"].startswith(part + ".")]
    return {f.metadata["size"].removeprefix(part + "."): getattr(cfg, f.name) for f in own}


def adopt(cfg, world):
    """Settings with the sizes of a world's LAM and DiT, which --init, --init_lam and --dit_weights bring."""
    brought = {}
    for f in fields(cfg):
        part, _, name = f.metadata["size"].partition(".")
        if part in ("lam", "dit") and name != "action_std":     # of a start that is over
            brought[f.name] = getattr(getattr(world, part).cfg, name)
    return replace(cfg, **brought)


# processes and phases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """Which of torchrun's processes this is, and the device that it works on."""
    rank: int = 0
    ranks: int = 1
    local: int = 0                      # number on its node
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"             # of the models, fp32 or bf16; weights are float32 in either

    @classmethod
    def here(cls, device="auto", precision="auto"):
        """From torchrun's environment.

        device: auto (cuda if there is one, else cpu), cpu, cuda or mps. precision: one of PRECISIONS
        """
        rank, ranks, local = (int(os.environ.get(name, default))
                              for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if precision == "auto":
            precision = "bf16" if device == "cuda" else "fp32"
        device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        return cls(rank, ranks, local, device, precision)

    @property
    def master(self):
        return self.rank == 0

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def autocast(self):
        """Of what a model computes, in training and wherever it is asked"""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class Phase:
    """A row of what a run does."""
    name: str
    steps: int
    trains: tuple                       # groups of parameters: lam, fdm, action, body, adapter, vae
    loss: str                           # a key of train.LOSSES: flow, pixels, codes or frames
    data: str
    batch: int                          # clips a step, over all ranks
    crop: float                         # smallest side of the random crop; 1 where the LAM is frozen
    codes: bool = True                  # latent actions are inferred
    real: bool = False                  # real actions drive clips: --real_share of them, or all (--actions)
    dreams: bool = True                 # the generator listens to them, so it can be asked to dream
    causal: bool = True                 # temporal attention of the generator
    # the learning-rate schedule, which phases of one training share
    first: int = 0                      # the step at which it starts
    length: int = 1                     # its steps
    lr: float = 0.0
    lr_warmup: int = 0
    cooldown: float = 0.0

    def learning_rate(self, step):
        """Linear warm-up, constant, and over the last share a linear fall to zero."""
        at = step - self.first
        lr = self.lr * min(1, (at + 1) / max(1, self.lr_warmup))
        if self.cooldown:
            lr *= min(1, (self.length - at) / (self.cooldown * self.length))
        return lr


def phases(cfg):
    """What a run does, in order: a list of `Phase`.

    Models that are trained apart (LAM, then world model; adapter, then world) have a schedule of the
    learning rate each; warm-up and end-to-end training share one.
    """
    def phase(name, steps, trains, loss="flow", **more):
        crop = cfg.crop if "lam" in trains else 1.0
        common = dict(data=cfg.data, batch=cfg.batch, crop=crop, lr=cfg.lr, lr_warmup=cfg.lr_warmup,
                      cooldown=cfg.cooldown)
        return Phase(name, steps, trains, loss, **(common | more))

    web = "web" if cfg.data in TOY else cfg.data
    true = cfg.actions == "true"
    lam = () if true else ("lam",)
    together = ("action", "body") if cfg.freeze_lam else lam + ("action", "body")
    pretrain = phase("pretrain", cfg.pretrain, ("body",), data=web, crop=cfg.crop, codes=False, dreams=False,
                     causal=cfg.causal)
    schedules = {
        "pretrain": [],
        "two-stage": [[phase("lam", cfg.lam_steps, ("lam", "fdm"), "pixels", dreams=False)],
                      [phase("wm", cfg.wm_steps, ("action", "body"))]],
        "joint": [[phase("warmup", cfg.warmup, lam + ("action",), codes=not true, real=true),
                   phase("e2e", cfg.e2e, together, codes=not true, real=true)]],
        "adapt": [[phase("adapter", cfg.adapter_steps, ("adapter",), "codes", batch=4 * cfg.batch,
                         dreams=False)],
                  [phase("adapt", cfg.adapt_steps, ("action", "body"), real=True)]],
        "vae": [[phase("vae", cfg.vae_steps, ("vae",), "frames", codes=False, dreams=False)]],
    }[cfg.mode]
    if cfg.mode == "pretrain" or cfg.mode != "vae" and cfg.dit_weights == cfg.init == "none":
        schedules = [[pretrain]] + schedules
    rows, first = [], 0
    for schedule in schedules:
        length = sum(row.steps for row in schedule)
        rows += [replace(row, first=first, length=length) for row in schedule if row.steps]
        first += length
    return rows


# the command line ------------------------------------------------------------------------------------


def boolean(text):
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError
    return text.lower() in ("1", "true")


def parse(argv, description=None):
    """Config from the command line: what was given, over the values of the preset or of the run to resume."""
    parser = Parser(description)
    for f in fields(Config):
        options = {"type": f.type, "choices": f.metadata["choices"], "metavar": f.type.__name__.upper()}
        if f.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True}
        if f.name == "data":
            options["nargs"] = "+"
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (tiny: {f.default})", **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "data" in given:
        given["data"] = shlex.join(given["data"])
    base = PRESETS[given.get("preset", "tiny")]
    if given.get("mode") == "adapt":
        base = base | {"batch": ADAPT_BATCH}
    own = os.path.join("out", given.get("name", Config.name))
    if restarted(own):
        given = {"resume": own}
    if given.get("resume", "none") != "none":
        base = resumed(parser, given)
    cfg = Config(**(base | given))
    check(parser, cfg, base)
    return cfg


def restarted(out):
    """Whether torchrun has restarted this process, on one node, after a checkpoint of the same launch."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    saved = glob.glob(os.path.join(glob.escape(out), "ckpt*.pt"))
    return again and alone and saved and read_settings(out).get("torchrun") == os.getppid()


def read_settings(run):
    """What config.json in a run's folder holds; nothing where there is none, or no settings in it"""
    try:
        with open(os.path.join(run, "config.json")) as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    return {} if not isinstance(found, dict) or mistyped(found) else found


def mistyped(settings):
    """Names of the settings whose values are of another type, as in a damaged file"""
    kinds = {f.name: (int, float) if f.type is float else (f.type,) for f in fields(Config)}
    return [name for name in kinds if name in settings and type(settings[name]) not in kinds[name]]


def resumed(parser, given):
    """The settings of the run to go on with, unless what was given contradicts them."""
    run = given["resume"]
    base = read_settings(run)
    try:
        base.pop("torchrun")                    # of which launch it was
        cfg = Config(**base)
    except (KeyError, TypeError):
        parser.error(f"--resume {run}: not the folder of a run, or of another version, or damaged")
    for f in fields(Config):
        if f.name in given and not f.metadata["changes"] and given[f.name] != getattr(cfg, f.name):
            parser.error(f"--{f.name} {given[f.name]}: a run is resumed with its own settings, here "
                         f"{getattr(cfg, f.name)}")
    moved = given.get("vae_weights", cfg.vae_weights)
    if moved != cfg.vae_weights and (cfg.vae_weights == "none" or not os.path.exists(moved)):
        parser.error(f"--vae_weights {moved}: must be where {cfg.vae_weights} lies now")
    return base


def check(parser, cfg, base):
    """End the program with one line if settings do not make sense, alone or together. base: the preset's"""
    for f in fields(Config):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        wrong = misfit(value, f.metadata["least"], f.metadata["most"]) if f.type in (int, float) else ""
        if choices and value not in choices:    # argparse has looked at what was given, not at config.json
            wrong = f"{value}: must be one of {', '.join(choices)}"
        if wrong:
            parser.error(f"--{f.name} {wrong}")
    for part in cfg.name.split("/") if cfg.resume == "none" else ():
        # file systems end names at 255 bytes, and a run that is moved aside gets a number
        if part in ("", ".", "..") or not cfg.name.isprintable() or len(cfg.name.encode()) > 240:
            parser.error(f"--name {cfg.name!a:.80}: must be the name of a folder in out, or several with / "
                         "between them")
    if cfg.hidden % (2 * cfg.heads) or cfg.hidden % 4:
        parser.error(f"--hidden {cfg.hidden}: must be a multiple of 4 and of 2 x --heads, {2 * cfg.heads}")
    if cfg.lam_width % (4 if cfg.lam_width < 128 else 64):
        parser.error(f"--lam_width {cfg.lam_width}: must be a multiple of 64, or of 4 below 128")
    try:
        shifts = cfg.time_shift in ("auto", "none") or 0 < float(cfg.time_shift) < float("inf")
    except ValueError:
        shifts = False
    if not shifts:
        parser.error(f"--time_shift {cfg.time_shift}: auto, none, or a number above 0")
    if cfg.device in ("cuda", "mps") and not getattr(torch, cfg.device).is_available():
        parser.error(f"--device {cfg.device}: there is none here")
    parts = int(os.environ.get("WORLD_SIZE", 1)) * cfg.accumulate
    if cfg.batch % parts:
        parser.error(f"--batch {cfg.batch}: must be a multiple of processes x --accumulate, {parts}")
    rows = phases(cfg)
    if not rows:
        parser.error("nothing to train: every phase has 0 steps")
    if cfg.mode == "adapt" and cfg.init == "none":
        parser.error("--mode adapt: needs --init, a trained world")
    if cfg.mode == "vae" and (cfg.init, cfg.init_lam, cfg.dit_weights) != ("none",) * 3:
        parser.error("--mode vae: trains a VAE from scratch, without --init, --init_lam, --dit_weights")
    if cfg.actions == "true" and cfg.mode != "joint":
        parser.error(f"--actions true: has no LAM to train, so --mode joint alone, not {cfg.mode}")
    if cfg.mode == "two-stage" and not cfg.lam_steps and cfg.init == cfg.init_lam == "none":
        parser.error("--lam_steps 0: needs --init_lam or --init, a trained LAM")
    replaced = cfg.init_lam != "none" or cfg.dit_weights not in ("none", base.get("dit_weights"))
    if cfg.init != "none" and replaced:
        parser.error("--init: brings LAM and generator; --init_lam and --dit_weights would replace them")
    cacheable = cfg.vae_weights != "none" and any(row.crop == 1 and row.dreams for row in rows)
    if cfg.latent_cache != "none" and not cacheable:
        parser.error(f"--latent_cache {cfg.latent_cache}: needs --vae_weights, and --crop 1 as every crop "
                     "has other latents")
