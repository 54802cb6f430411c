"""A run's state on disk: checkpoints, the World of one or of settings, latents of clips.

What is wrong with something that the user named is a `UserError`, one line.
"""

import glob
import hashlib
import os
import sys
import zipfile
from dataclasses import replace

import torch

from config import Config, mistyped, phases, sizes
from dit import DiT, DiTConfig, action_depth, load_opensora
from flow import FlowConfig, World
from formats import UserError, first_line, speaks, whole
from lam import LAM, Adapter, LAMConfig, TrueActions
from vae import FrameVAE, OpenSoraVAE, PixelVAE, load_opensora_vae


def load_checkpoint(path):
    """What `train.py` saved, from a run's folder or a checkpoint file, on the CPU.

    Raises UserError: nothing there, damaged, not a checkpoint of ours, or another version's.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}")
    try:
        # torch.load does not look at the checksums; of a node's processes one reads them, for all
        damaged = zipfile.ZipFile(path).testzip() if speaks() else None
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, "cpu", mmap=True, weights_only=True)
        missing = ({"world", "lam", "dit", "config", "step"} - state.keys()
                   or {"data", "size", "eval_frames", "seed"} - state["config"].keys()
                   or mistyped(state["config"]))
        if missing:
            raise ValueError(f"without {min(missing)}")
        for kind, part in ((LAMConfig, "lam"), (DiTConfig, "dit"), (FlowConfig, "flow")):
            kind(**state["world"][part])        # another version's has other fields
    except Exception as error:                  # whatever a broken file makes the readers raise
        raise UserError(f"{path}: not a whole checkpoint of train.py, or another version's "
                        f"({first_line(error)})") from None
    return state


def checkpoints(out):
    """Checkpoint files of a run, newest first: the dot of ckpt.pt sorts after ckpt-STEP.pt's hyphen."""
    return sorted(glob.glob(os.path.join(glob.escape(out), "ckpt[.-]*pt")), reverse=True)


def write(state, path):
    """torch.save. Where it fails OSError names the file, as torch does not."""
    try:
        torch.save(state, path)
    except RuntimeError:
        raise OSError(f"{path}: cannot be written; is the disk full?") from None


def save(out, keep, before, **state):
    """Write out/ckpt.pt whole. The one before, of step `before`, becomes ckpt-STEP.pt; `keep` of those."""
    path = os.path.join(out, "ckpt.pt")
    with whole(path) as part:
        write(state, part)
        if before is not None:
            os.replace(path, os.path.join(out, f"ckpt-{before:08d}.pt"))
    for old in checkpoints(out)[1 + keep:]:
        os.remove(old)


def newest(out):
    """Content and file of a run's newest checkpoint that is whole; stderr names those that are not."""
    for path in checkpoints(out):
        try:
            return load_checkpoint(path), path
        except UserError as error:
            print(f"  {error}; trying the one before", file=sys.stderr)
    raise UserError(f"--resume {out}: no checkpoint to go on from")


def check_past(cfg, state):
    """UserError if settings would make the steps that a run has taken those of other phases.

    A phase that is over keeps its length; the one that the run is in may become longer, or end at once.
    """
    def taken(cfg):
        told, left = [], state["step"]
        for row in phases(cfg):
            told += [f"{min(row.steps, left)} of {row.name}"] if left else []
            left -= min(row.steps, left)
        return ", ".join(told)

    was, now = taken(Config(**state["config"])), taken(cfg)
    if was != now:
        raise UserError(f"--resume {cfg.resume}: its steps were {was}; by these lengths they would be {now}")


def restore_vae(state, vae_weights=None):
    """The VAE of a checkpoint's content. vae_weights: where Open-Sora's lies now, or None, "none"."""
    source = state["world"]["vae"]
    if source == "none":
        return PixelVAE()
    if isinstance(source, dict):
        vae = FrameVAE(**source)
        vae.load_state_dict(state["vae"])
        return vae
    return load_opensora_vae(source if vae_weights in (None, "none") else vae_weights)


def restore(state, vae_weights=None):
    """World from a checkpoint's content; `vae_weights` as for `restore_vae`."""
    config = state["world"]
    try:
        vae = restore_vae(state, vae_weights)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(error) from None
    lam, dit = LAM(LAMConfig(**config["lam"])), DiT(DiTConfig(**config["dit"]))
    world = World(lam, dit, vae, FlowConfig(**config["flow"]))
    world.lam.load_state_dict(state["lam"])
    world.dit.load_state_dict(state["dit"])
    world.lam.quantize = state["quantize"]
    world.look = config.get("look", "")         # runs of before there were two have none
    if config["adapter"]:
        kind = TrueActions if config.get("true_actions") else Adapter           # older runs know no other
        world.adapter = kind(config["adapter"], world.lam.cfg)
        world.adapter.load_state_dict(state["adapter"])
    return world


def load_world(path, device="cpu", vae_weights=None):
    """Trained World, in eval mode, from a run's folder or a checkpoint file; raises as `load_checkpoint`."""
    return restore(load_checkpoint(path), vae_weights).to(device).eval()


def load_generator(path, **action):
    """DiT with the weights of a run of ours or of Open-Sora, and fresh action modules."""
    ours = os.path.isdir(path) and os.path.exists(os.path.join(path, "ckpt.pt"))
    if ours or not os.path.isdir(path):
        try:
            state = load_checkpoint(path)
        except UserError:
            if ours:
                raise
        else:
            dit = DiT(replace(DiTConfig(**state["world"]["dit"]), **action))
            body = {name: w for name, w in state["dit"].items() if not name.startswith("action.")}
            dit.load_state_dict(dit.state_dict() | body)
            return dit
    return load_opensora(path, **action)


def load_vae(path):
    """The VAE of a run of ours, with the look of what it has seen, or Open-Sora's, with ""."""
    if not (os.path.exists(os.path.join(path, "ckpt.pt")) or os.path.basename(path).startswith("ckpt")):
        return load_opensora_vae(path), ""
    state = load_checkpoint(path)
    if state["world"]["vae"] == "none":
        raise UserError(f"--vae_weights {path}: has no VAE of its own; --mode vae trains one")
    return restore_vae(state), state["world"]["look"]


def build_lam(cfg):
    """A fresh LAM by train.py's settings, or the one of --init_lam; with an FDM only in two-stage mode.

    Where the LAM of --init_lam does not train any more, its FDM comes with it, if it has one.
    """
    fdm_depth = cfg.lam_depth if cfg.mode == "two-stage" else 0
    if cfg.init_lam == "none":
        heads = cfg.lam_width // min(64, cfg.lam_width // 2)
        lam = LAM(LAMConfig(**sizes(cfg, "lam"), heads=heads, fdm_depth=fdm_depth))
        lam.quantize = cfg.vq_start == 0
        return lam
    trained = load_checkpoint(cfg.init_lam)
    lam_cfg = LAMConfig(**trained["world"]["lam"])
    comes = cfg.mode == "two-stage" and not cfg.lam_steps       # its FDM; else none, or a fresh one
    lam = LAM(lam_cfg if comes else replace(lam_cfg, fdm_depth=fdm_depth))
    fresh = {name: w for name, w in lam.state_dict().items() if name.startswith("fdm.")}
    weights = {name: w for name, w in trained["lam"].items() if comes or not name.startswith("fdm.")}
    lam.load_state_dict(fresh | weights)
    lam.quantize = trained["quantize"]
    return lam


def build(cfg, absent=()):
    """World by train.py's settings.

    Weights are fresh but for what --init, --init_lam, --dit_weights and --vae_weights bring, unless that
    is `absent` (names of settings, for a dry run). LAM and generator are seeded apart, so that all modes
    start from the same.

    Raises UserError: a file that is not what its setting wants, sizes that do not fit.
    """
    try:
        if cfg.init != "none":
            world = restore(load_checkpoint(cfg.init), cfg.vae_weights)
            world.adapter = None
        else:
            world = build_parts(cfg, absent)
        side = world.vae.pixel_stride * (1 if cfg.mode == "vae" else world.dit.cfg.patch)
        if cfg.size % side:
            raise ValueError(f"--size {cfg.size} is not a multiple of {side}, the DiT's patch in pixels")
        window = world.vae.latent_frames(cfg.frames) - 1
        world.cfg = FlowConfig(**sizes(cfg, "flow"), window=window)
        for t in (cfg.frames, cfg.eval_frames):
            world.check_frames(t)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(error) from None
    return world


def build_parts(cfg, absent):
    torch.manual_seed(cfg.seed)
    lam = build_lam(cfg)
    look = ""
    if cfg.mode == "vae":
        vae = FrameVAE()
    elif cfg.vae_weights == "none":
        vae = PixelVAE()
    elif "vae_weights" in absent:
        vae = OpenSoraVAE()
    else:
        vae, look = load_vae(cfg.vae_weights)
    action = dict(action_dim=vae.time_stride * lam.cfg.tokens * lam.cfg.code_dim,
                  action_scale=lam.cfg.latent_scale, action_std=cfg.action_std)     # of DiTConfig
    torch.manual_seed(cfg.seed)
    if cfg.dit_weights == "none" or "dit_weights" in absent:
        outputs = 2 * vae.channels if isinstance(vae, OpenSoraVAE) else vae.channels
        latents = dict(channels=vae.channels, out_channels=outputs, pixel_stride=vae.pixel_stride)
        if isinstance(vae, FrameVAE):           # (ours) a token is one unit of the position grid
            latents["input_sq_size"] = cfg.size
        dit = DiT(DiTConfig(**sizes(cfg, "dit") | action | latents, action_depth=action_depth(cfg.depth)))
    else:
        dit = load_generator(cfg.dit_weights, **action)
    world = World(lam, dit, vae)
    world.look = look
    return world


class LatentCache:
    """Latents of clips on disk, a file each, named by a hash of pixels, VAE and precision: none is stale."""

    def __init__(self, vae, folder):
        self.vae, self.folder, self.key = vae, folder, hashlib.blake2b()
        self.key.update(str(vae.chunk).encode())
        for tensor in vae.state_dict().values():
            self.key.update(tensor.cpu().numpy())
        os.makedirs(folder, exist_ok=True)

    def encode(self, clips, video):
        """uint8 clips (b, t, h, w, 3) and the same as video (b, 3, t, h, w) -> latents (b, c, l, h, w)"""
        precision = torch.bfloat16 if torch.is_autocast_enabled(video.device.type) else torch.float32
        files = [self.file(clip, precision) for clip in clips]
        new = [i for i, file in enumerate(files) if not os.path.exists(file)]
        if new:
            for i, latent in zip(new, self.vae.encode(video[new]).cpu()):
                own = f"{files[i]}.{os.getpid()}"      # ranks may write the same file at once
                with whole(own) as part:
                    write(latent.clone(), part)
                os.replace(own, files[i])
        return torch.stack([torch.load(file, weights_only=True) for file in files]).to(video.device)

    def file(self, clip, precision):
        key = self.key.copy()
        key.update(f"{tuple(clip.shape)} {precision}".encode())
        key.update(clip.contiguous().numpy())
        return os.path.join(self.folder, key.hexdigest()[:32] + ".pt")
