"""Rectified flow, and the world model that it trains together with its latent actions.

Paper: sections 3.1 and 3.3, appendix B.2 and B.3. Convention of Open-Sora v1.2 (after Liu et al. 2022, arXiv
2209.03003): flow time t is 0 for data and 1 for noise, x_t = (1-t) x_0 + t noise, and the network predicts
the velocity x_0 - noise.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from lam import TrueActions
from transformer import KVCache


@dataclass
class FlowConfig:
    time_shift: str = "auto"    # "auto": Open-Sora's formula; a number: r itself; "none": r = 1
    action_drop: float = 0.1    # chance that a latent frame's action is zeroed in training (appendix B.2)
    clip_drop: float = 0.1      # (ours) chance that all actions of a clip are
    real_share: float = 0.0     # (ours) adaptation: chance that the adapter drives a clip
    window: int = 0             # clean latent frames that a rollout sees at most; 0: all
    sampling_steps: int = 10
    guidance: float = 4.0


def time_ratio(shift, pixels, frames):
    """r of the time shift t' = r t / (1 + (r-1) t). Frames are latent (Open-Sora counts 0 below 17).

    shift: "auto" for Open-Sora's formula, "none" for r = 1, or r itself.
    """
    if shift == "auto":
        return math.sqrt(pixels / 512 ** 2) * math.sqrt(frames)
    return 1.0 if shift == "none" else float(shift)


def shift_time(t, r):
    return r * t / (1 + (r - 1) * t)


@torch.no_grad()
def sample(dit, x, context=1, actions=None, steps=10, guidance=4.0, shift="none", fps=None, cache=None):
    """Denoise all but the context frames by Euler steps over t = 1, 1-1/n, ... (shifted).

    Args:
        x: (b, c, l, h, w), its first `context` frames clean, the rest noise.
        context: clean frames in x; with a cache, which holds the past, it may be 0.
        actions: (b, l-1, action_dim) as for the DiT, or None.
        guidance: g of v_null + g (v_act - v_null), where v_null has no actions at the noised frames; 1: no
            v_null.
        shift: of the times, see `time_ratio`.
        cache: KVCache of earlier frames, read only.

    Returns latents (b, c, l, h, w).
    """
    b, _, l, h, w = x.shape
    past = cache.frames if cache else 0
    r = time_ratio(shift, h * w * dit.cfg.pixel_stride ** 2, past + l)
    times = shift_time(1 - torch.arange(steps + 1, device=x.device) / steps, r)
    times = times.clamp(max=1)                                                  # rounding may exceed 1
    noised = (torch.arange(l, device=x.device) >= context).float()              # (l,)
    n, guided = b, actions is not None and guidance != 1
    if guided:                                  # both branches are one batch and share the cache
        null = actions.clone()
        null[:, max(past + context - 1, 0):] = 0
        actions = torch.cat([actions, null])
        fps = None if fps is None else fps.repeat(2)
        n = 2 * b
    for t, t_next in zip(times[:-1], times[1:]):
        v = dit(x.repeat(n // b, 1, 1, 1, 1), (t * noised).expand(n, l), actions, fps, cache)
        if guided:
            v, v_null = v.chunk(2)
            v = v_null + guidance * (v - v_null)
        x = x + (t - t_next) * noised[:, None, None] * v
    return x


class Draw:
    """Random numbers for a batch that is spread over ranks.

    Each rank draws the whole and keeps its own rows, so that the same seed (run's seed, step) gives the
    same clips the same noise on any number of ranks.
    """

    def __init__(self, *seed, device="cpu", rank=0, ranks=1):
        mixed = 0
        for s in seed:
            mixed = (mixed * 1000003 + s + 1) % (2 ** 63 - 1)
        self.generator = torch.Generator(device).manual_seed(mixed)
        self.device, self.rank, self.ranks = device, rank, ranks

    def __call__(self, random, b, *shape):
        """random is torch.rand or torch.randn: (b, *shape)"""
        all_ranks = random(b * self.ranks, *shape, generator=self.generator, device=self.device)
        return all_ranks[self.rank * b:(self.rank + 1) * b]


def unseeded(device):
    """A Draw whose seed is the next number of torch's global generator, which goes on undisturbed"""
    return Draw(torch.randint(2 ** 31, ()).item(), device=device)


@dataclass
class Dream:
    """What a rollout has so far: clean latents, the actions between them, what they left in the DiT's cache.

    While all dreams of a batch share their past, it has a single row, which goes through the DiT once.
    """
    latents: torch.Tensor               # (b or 1, c, l, h, w)
    actions: torch.Tensor               # (b or 1, l-1, r*k*d)
    cache: KVCache = None
    first: int = 0                      # the latent frame with which the cache begins


class World(nn.Module):
    """Latent action model, causal DiT and VAE; one loss trains IDM, codebook and DiT (Figure 1b)."""

    def __init__(self, lam, dit, vae, cfg=FlowConfig()):
        super().__init__()
        self.lam, self.dit, self.vae, self.cfg = lam, dit, vae, cfg
        self.adapter = None                     # from real actions, once there is one
        self.look = ""                          # of the simulator's frames that it has seen, see `same_look`
        want = vae.time_stride * lam.cfg.tokens * lam.cfg.code_dim
        if dit.cfg.action_dim != want:
            raise ValueError(f"World: the DiT takes actions of {dit.cfg.action_dim} dims, "
                             f"the LAM gives {want} a latent frame")
        if (dit.cfg.channels, dit.cfg.pixel_stride) != (vae.channels, vae.pixel_stride):
            raise ValueError(f"World: the DiT takes latents of {dit.cfg.channels} channels and "
                             f"{dit.cfg.pixel_stride} pixels, "
                             f"the VAE makes {vae.channels} of {vae.pixel_stride}")

    def config(self):
        """What `checkpoint.restore` needs to build this World again."""
        return {
            "lam": asdict(self.lam.cfg),
            "dit": asdict(self.dit.cfg),
            "flow": asdict(self.cfg),
            "vae": self.vae.source,
            "adapter": self.adapter.action_dim if self.adapter else None,
            "look": self.look,
            "true_actions": self.true_actions,
        }

    @property
    def true_actions(self):
        """Whether the data's own actions drive the generator, and no LAM does"""
        return isinstance(self.adapter, TrueActions)

    def check_frames(self, t):
        """ValueError unless each latent frame but the first stands for time_stride frames and actions."""
        r = self.vae.time_stride

        def fits(t):
            return self.vae.latent_frames(t) == 1 + (t - 1) / r

        if not fits(t):
            valid = [str(n) for n in range(1 + r, 100, r) if fits(n)]
            raise ValueError(f"clips of {t} frames: this VAE needs {', '.join(valid)}")

    def pack(self, z):
        """Latent actions (b, t-1, k, d) -> what leads to each latent frame (b, l-1, r*k*d)"""
        self.check_frames(z.shape[1] + 1)
        return rearrange(z, "b (l r) k d -> b l (r k d)", r=self.vae.time_stride)

    def forward(self, video, draw=None, fps=None, use_actions=True, latents=None, real=None):
        """Flow-matching loss (section 3.3) plus the VQ losses, both with weight 1.

        Args:
            video: (b, 3, t, h, w) in [-1, 1].
            draw: source of randomness; None: unseeded.
            fps: (b,) frames a second, or None.
            use_actions: False for pre-training without action modules.
            latents: what the VAE makes of the video, where it is known.
            real: (b, t-1, a) real actions, for adaptation, and for a world that they drive.

        Returns:
            loss, and a dict: `flow` and `vq` (scalars), `indices` (b, t-1, k), and for each clip `clip_t`,
            `clip_flow` (b,).
        """
        draw = draw or unseeded(video.device)
        actions, indices, vq = None, None, video.new_zeros(())
        if use_actions:
            # infer and quantize
            z, indices, vq = self.encode(video, real, draw)
            z = self.drive(z, real, draw)
            actions = self.drop(self.pack(z), draw)                             # (b, l-1, r*k*d)
        # noise all frames but the context: 1 clean frame with probability 1/2, else 1 .. l-1
        x0 = self.vae.encode(video) if latents is None else latents             # (b, c, l, h, w)
        b, c, l, h, w = x0.shape
        r = time_ratio(self.cfg.time_shift, h * w * self.vae.pixel_stride ** 2, l)
        t = shift_time(draw(torch.randn, b).sigmoid(), r)                       # (b,)
        context = torch.where(draw(torch.rand, b) < 0.5, 1, 1 + (draw(torch.rand, b) * (l - 1)).long())
        noised = torch.arange(l, device=x0.device) >= context[:, None]          # (b, l)
        t_frame = t[:, None] * noised                                           # (b, l)
        noise = draw(torch.randn, b, c, l, h, w)
        mix = t_frame[:, None, :, None, None]
        x_t = (1 - mix) * x0 + mix * noise
        # predict the velocity, add up
        v = self.dit(x_t, t_frame, actions, fps)
        error = ((v.float() - (x0 - noise)) ** 2).mean((1, 3, 4))               # (b, l)
        clip_flow = (error * noised).sum(1) / noised.sum(1)                     # (b,)
        flow = clip_flow.mean()
        return flow + vq, {"flow": flow.detach(), "vq": vq.detach(), "indices": indices,
                           "clip_t": t, "clip_flow": clip_flow.detach()}

    def encode(self, video, real=None, draw=None):
        """What drives the generator along a clip: `LAM.encode`, or the `real` actions where they do."""
        if self.true_actions:
            return self.adapter(real.to(video.device)), None, video.new_zeros(())
        return self.lam.encode(video, draw)

    def drive(self, z, real, draw):
        """Adaptation (ours): the adapter drives some of the clips, by their real actions."""
        if real is None or not self.cfg.real_share or self.true_actions:
            return z
        driven = draw(torch.rand, len(z), 1, 1, 1) < self.cfg.real_share
        return torch.where(driven, self.latent_actions(real), z)

    def drop(self, actions, draw):
        """In training: zero actions of single latent frames and whole clips; guidance needs a null action."""
        if not self.training:
            return actions
        b, n, _ = actions.shape
        keep = draw(torch.rand, b, n, 1) >= self.cfg.action_drop
        keep &= draw(torch.rand, b, 1, 1) >= self.cfg.clip_drop
        return actions * keep

    def latent_actions(self, actions):
        """What the adapter makes of real actions (b, t-1, a): (b, t-1, k, d)"""
        if self.true_actions:
            return self.adapter(actions)
        return F.embedding(self.adapter(actions).argmax(-1), self.lam.vq.codebook)

    def begin(self, frames, z):
        """A dream's past, frames (b or 1, 3, t, h, w) in [-1, 1] and z (b or 1, t-1, k, d) -> Dream"""
        return Dream(self.vae.encode(frames), self.pack(z))

    @torch.no_grad()
    def step(self, dream, action, noise, steps=None, guidance=None, fps=None):
        """Dream one more latent frame: it is denoised given the clean past, which it joins.

        Args:
            dream: what `begin` or `step` returned; its cache is used up by this.
            action: (b, 1, r*k*d), leads to the new latent frame (`pack` makes it).
            noise: (b, c, 1, h, w), the new frame's at t = 1.
            steps, guidance: sampling settings; None: the world's own.
            fps: (b,) frames a second; None: 24.

        Returns the longer Dream.
        """
        steps = self.cfg.sampling_steps if steps is None else steps
        guidance = self.cfg.guidance if guidance is None else guidance
        b, (n, _, l, _, _) = len(action), dream.latents.shape
        fps = torch.full((b,), 24.0, device=action.device) if fps is None else fps
        window = self.cfg.window or l + 1
        cache, first = dream.cache, dream.first
        # the clean past goes through the DiT once; a full window slides, and starts over as a shorter clip
        if cache is None or cache.frames == window:
            cache, first = KVCache(), max(0, l - window)
        clean = dream.latents[:, :, first + cache.frames:]
        cache.append = True
        self.dit(clean, clean.new_zeros(n, clean.shape[2]), dream.actions[:, first:], fps[:n], cache)
        cache.append = False
        actions = torch.cat([dream.actions.expand(b, -1, -1), action], 1)       # (b, l, r*k*d)
        shift = self.cfg.time_shift
        x = sample(self.dit, noise, 0, actions[:, first:], steps, guidance, shift, fps, cache)
        latents = torch.cat([dream.latents.expand(b, -1, -1, -1, -1), x], 2)    # (b, c, l+1, h, w)
        return Dream(latents, actions, cache, first)

    @torch.no_grad()
    def rollout(self, frames, actions, steps=None, guidance=None, fps=None, draw=None):
        """Dream frame by frame: a loop over `step`.

        Args:
            frames: (b, 3, t0, h, w) in [-1, 1], the true past; (1, 3, t0, h, w) if all share it, and the
                actions inside it: then it goes through VAE and DiT once.
            actions: (b, t-1, k, d) latent actions of all transitions, those inside `frames` included.
            steps, guidance: sampling settings; None: the world's own.
            draw: source of the noise; None: unseeded.

        Returns:
            video (b, 3, t, h, w) in [-1, 1], whose first t0 frames are the past as decoded from its latents.
        """
        draw = draw or unseeded(frames.device)
        dream = self.begin(frames, actions[:len(frames), :frames.shape[2] - 1])
        packed = self.pack(actions)                                             # (b, l-1, r*k*d)
        b, (_, c, l0, h, w) = len(actions), dream.latents.shape
        for i in range(l0 - 1, packed.shape[1]):
            noise = draw(torch.randn, b, c, 1, h, w)
            dream = self.step(dream, packed[:, i:i + 1], noise, steps, guidance, fps)
        latents = dream.latents.expand(b, -1, -1, -1, -1)
        return self.vae.decode(latents, 1 + actions.shape[1]).clamp(-1, 1)
