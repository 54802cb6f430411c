"""A run's state on disk: checkpoints, and a World made from one or from train.py's settings; latents of clips."""

import glob
import hashlib
import os
import sys
import zipfile
from dataclasses import replace

import torch

from dit import DiT, DiTConfig, load_opensora
from flow import FlowConfig, World
from lam import LAM, Adapter, LAMConfig
from vae import OpenSoraVAE, PixelVAE, load_opensora_vae


def load_checkpoint(path):
    """What `train.py` saved, from a run's folder or a checkpoint file, on the CPU.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: damaged, or not a checkpoint of ours.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        damaged = zipfile.ZipFile(path).testzip()               # torch.load does not look at the checksums
        state = torch.load(path, "cpu", mmap=True, weights_only=True)
        state["world"], state["lam"], state["dit"]
    except Exception as error:                                  # whatever a broken file makes the readers raise
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({str(error).splitlines()[0]})") from None
    if damaged:
        raise ValueError(f"{path}: not a whole checkpoint of train.py (checksum of {damaged})")
    return state


def checkpoints(out):
    """Checkpoint files of a run, newest first."""
    return [f for f in [os.path.join(out, "ckpt.pt")] if os.path.exists(f)] + sorted(glob.glob(os.path.join(out, "ckpt-*.pt")), reverse=True)


def save(out, keep, before, **state):
    """Write out/ckpt.pt atomically; the one before, of step `before`, becomes ckpt-STEP.pt, and `keep` of those stay."""
    path = os.path.join(out, "ckpt.pt")
    torch.save(state, path + ".part")
    if before is not None:
        os.replace(path, os.path.join(out, f"ckpt-{before:08d}.pt"))
    os.replace(path + ".part", path)
    for old in checkpoints(out)[1 + keep:]:
        os.remove(old)


def newest(out):
    """Content of the newest checkpoint that is whole, and its file; those that are not are named."""
    for path in checkpoints(out):
        try:
            return load_checkpoint(path), path
        except ValueError as error:
            print(f"  {error}; trying the one before", file=sys.stderr)
    raise ValueError(f"--resume {out}: no checkpoint to go on from")


def restore(state, vae_weights=None):
    """World from a checkpoint's content. vae_weights: where Open-Sora's VAE lies now, if it has moved."""
    config = state["world"]
    vae = PixelVAE() if config["vae"] == "none" else load_opensora_vae(vae_weights or config["vae"])
    world = World(LAM(LAMConfig(**config["lam"])), DiT(DiTConfig(**config["dit"])), vae, FlowConfig(**config["flow"]))
    world.lam.load_state_dict(state["lam"])
    world.dit.load_state_dict(state["dit"])
    world.lam.quantize = state["quantize"]
    if config["adapter"]:
        world.adapter = Adapter(config["adapter"], world.lam.cfg)
        world.adapter.load_state_dict(state["adapter"])
    return world


def load_world(path, device="cpu", vae_weights=None):
    """Trained World, in eval mode, from a run's folder or a checkpoint file; raises what `load_checkpoint` does."""
    return restore(load_checkpoint(path), vae_weights).to(device).eval()


def load_generator(path, **action):
    """DiT with the weights of a run of ours or of Open-Sora, and fresh action modules."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "ckpt.pt")):
        return load_opensora(path, **action)
    try:
        state = load_checkpoint(path)
    except ValueError:
        if os.path.isdir(path):
            raise
        return load_opensora(path, **action)
    dit = DiT(replace(DiTConfig(**state["world"]["dit"]), **action))
    dit.load_state_dict(dit.state_dict() | {k: v for k, v in state["dit"].items() if not k.startswith("action.")})
    return dit


def build(cfg, absent=()):
    """World by train.py's settings, with fresh weights but for what --init, --init_lam, --dit_weights and --vae_weights bring, unless it is `absent`.

    LAM and generator are seeded apart, so that all modes start from the same ones.
    """
    if cfg.init != "none":
        world = restore(load_checkpoint(cfg.init), None if cfg.vae_weights == "none" else cfg.vae_weights)
        world.adapter = None
    else:
        trained = load_checkpoint(cfg.init_lam) if cfg.init_lam != "none" else None
        sizes = trained["world"]["lam"] if trained else dict(
            size=cfg.lam_size, patch=cfg.lam_patch, width=cfg.lam_width, depth=cfg.lam_depth, heads=cfg.lam_heads, num_codes=cfg.num_codes,
            code_dim=cfg.code_dim, tokens=cfg.tokens, pairs=cfg.pairs, odd=cfg.odd, difference=cfg.difference, standardize=cfg.standardize,
            latent_scale=cfg.latent_scale)
        torch.manual_seed(cfg.seed)
        lam = LAM(LAMConfig(**sizes | {"fdm_depth": cfg.fdm_depth if cfg.mode == "two-stage" else 0}))
        lam.quantize = cfg.vq_start == 0
        if trained:
            lam.load_state_dict({k: v for k, v in lam.state_dict().items() if k.startswith("fdm.")}
                                | {k: v for k, v in trained["lam"].items() if not k.startswith("fdm.")})
            lam.quantize = trained["quantize"]
        vae = PixelVAE() if cfg.vae_weights == "none" else OpenSoraVAE() if "vae_weights" in absent else load_opensora_vae(cfg.vae_weights)
        action = dict(action_dim=vae.time_stride * lam.cfg.tokens * lam.cfg.code_dim, action_depth=cfg.action_depth,
                      action_scale=lam.cfg.latent_scale, action_std=cfg.action_std)
        torch.manual_seed(cfg.seed)
        if cfg.dit_weights == "none" or "dit_weights" in absent:
            outputs = vae.channels if cfg.vae_weights == "none" else 2 * vae.channels
            dit = DiT(DiTConfig(cfg.hidden, cfg.heads, cfg.depth, vae.channels, cfg.patch, outputs, vae.pixel_stride, **action))
        else:
            dit = load_generator(cfg.dit_weights, **action)
        world = World(lam, dit, vae)
    side = world.dit.cfg.patch * world.vae.pixel_stride
    if cfg.size % side:
        raise ValueError(f"--size {cfg.size} is not a multiple of {side}, the side of the DiT's patch in pixels")
    world.cfg = FlowConfig(cfg.time_shift, real_share=cfg.real_share, window=world.vae.latent_frames(cfg.frames) - 1, sampling_steps=cfg.sampling_steps, guidance=cfg.guidance)
    for t in (cfg.frames, cfg.eval_frames):
        world.check_frames(t)
    return world


class LatentCache:
    """Latents of clips on disk, one file a clip, named by a hash of its pixels, of the VAE's weights and of the precision:
    whatever changes, a stale latent is never found.
    """

    def __init__(self, vae, folder):
        self.vae, self.folder, self.key = vae, folder, hashlib.blake2b()
        self.key.update(str(vae.chunk).encode())
        for tensor in vae.state_dict().values():
            self.key.update(tensor.cpu().numpy())
        os.makedirs(folder, exist_ok=True)

    def encode(self, clips, video):
        """uint8 clips (b, t, h, w, 3) and the same as video (b, 3, t, h, w) in [-1, 1] -> latents (b, c, l, h, w)"""
        files = []
        for clip in clips:
            key = self.key.copy()
            key.update(f"{tuple(clip.shape)} {torch.is_autocast_enabled()}".encode())
            key.update(clip.contiguous().numpy())
            files.append(os.path.join(self.folder, key.hexdigest()[:32] + ".pt"))
        new = [i for i, file in enumerate(files) if not os.path.exists(file)]
        if new:
            for i, latent in zip(new, self.vae.encode(video[new]).cpu()):
                part = f"{files[i]}.{os.getpid()}"
                torch.save(latent.clone(), part)
                os.replace(part, files[i])
        return torch.stack([torch.load(file, weights_only=True) for file in files]).to(video.device)
