"""Latent action model (LAM): which discrete action leads from each frame to the next?

Paper: sections 3.1 and 3.2, appendix B.1. IDM (inverse dynamics model): an ST-Transformer (Xu et al. 2020,
as in Genie) looks at o_1..o_{t+1} and infers z_t; a vector quantizer makes it discrete. FDM (forward
dynamics model): a spatial Transformer that predicts o_{t+1} from o_t and z_t; only the two-stage baseline
has one.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from transformer import Block, Linear, sincos_2d
from vq import VectorQuantizer


@dataclass
class LAMConfig:
    size: int = 224             # frames are resized to size x size
    patch: int = 14
    width: int = 768
    depth: int = 12             # blocks of the IDM
    heads: int = 12
    fdm_depth: int = 12         # blocks of the FDM; 0: none
    num_codes: int = 32
    code_dim: int = 32
    tokens: int = 2             # k, codes a transition
    odd: bool = False           # (ours) z(o, o') = f(o, o') - f(o', o): undoing a move is its opposite
    standardize: bool = False   # (ours) normalise the IDM's output over the batch before quantizing
    latent_scale: float = 1.0   # (ours) scale of what is quantized: what the VQ losses' weight of 1 means


def patchify(video, p):
    """(b, c, t, h, w) -> (b, t, s, c*p*p)"""
    return rearrange(video, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)


class IDM(nn.Module):
    """ST-Transformer: k learned action queries join each frame's patches; what they hold at frame t+1
    becomes z_t.

    Temporal attention is causal, so z_t depends on frames 1..t+1 only; its positions are relative.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        n = cfg.size // cfg.patch
        self.patch = Linear(3 * cfg.patch ** 2, cfg.width)
        self.queries = nn.Parameter(torch.randn(cfg.tokens, cfg.width))
        # smooth over the frame, so that the difference of two places is nearly linear in it
        place = 0.5 + torch.arange(n) / n
        self.register_buffer("pos", sincos_2d(place, place, cfg.width), persistent=False)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width)
        self.out = Linear(cfg.width, cfg.code_dim)

    def forward(self, video):
        """video (b, 3, t, h, w) in [-1, 1] -> latent actions before quantization (b, t-1, k, d)"""
        b, t, k = video.shape[0], video.shape[2], self.cfg.tokens
        video = resize(video, self.cfg.size)
        x = self.patch(patchify(video, self.cfg.patch)) + self.pos              # (b, t, s, width)
        x = torch.cat([repeat(self.queries, "k d -> b t k d", b=b, t=t), x], 2)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, keep=k)          # of the last block only the queries are read
        return self.out(self.norm(x[:, 1:]))


class FDM(nn.Module):
    """Spatial Transformer from the patches of o_t and the k action tokens of z_t to the pixels of o_{t+1}."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        n = cfg.size // cfg.patch
        self.patch = Linear(3 * cfg.patch ** 2, cfg.width)
        self.action = Linear(cfg.code_dim, cfg.width)
        nn.init.normal_(self.action.weight, std=1 / (cfg.latent_scale * cfg.code_dim ** 0.5))
        self.slot = nn.Parameter(torch.randn(cfg.tokens, cfg.width))            # tells the k tokens apart
        self.register_buffer("pos", sincos_2d(torch.arange(n), torch.arange(n), cfg.width), persistent=False)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, temporal=False) for _ in range(cfg.fdm_depth))
        self.norm = nn.LayerNorm(cfg.width)
        self.out = Linear(cfg.width, 3 * cfg.patch ** 2)

    def forward(self, video, z):
        """video (b, 3, t, h, w) and z (b, t, k, d) -> the frame after each (b, 3, t, h, w)"""
        n = self.cfg.size // self.cfg.patch
        x = self.patch(patchify(video, self.cfg.patch)) + self.pos              # (b, t, s, width)
        x = torch.cat([self.action(z) + self.slot, x], 2)
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm(x[:, :, self.cfg.tokens:]))
        return rearrange(x, "b t (h w) (c p q) -> b c t (h p) (w q)", h=n, p=self.cfg.patch, q=self.cfg.patch)


def resize(video, size):
    """(b, c, t, h, w) -> (b, c, t, size, size), bilinear"""
    if video.shape[-2:] == (size, size):
        return video
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))


class Standardize(nn.Module):
    """Subtract the running mean and divide by the running standard deviation of each element, over all ranks.

    Ours, not in the paper. No gradient flows through the statistics.
    """

    def __init__(self, *shape, momentum=0.05):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("moments", torch.zeros(2, *shape))                 # of z and z^2
        self.register_buffer("weight", torch.zeros(()))                         # corrects the zero start

    @torch.no_grad()
    def update(self, z):
        moments = torch.stack([z, z ** 2]).mean((1, 2))                         # (2, *shape)
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        self.moments.lerp_(moments, self.momentum)
        self.weight.lerp_(torch.ones_like(self.weight), self.momentum)

    def forward(self, z):
        """(b, t, *shape) -> the same shape"""
        if self.training:
            self.update(z)
        mean, square = self.moments / self.weight.clamp(min=1e-6)
        variance = (square - mean ** 2).clamp(min=1e-6)
        # before training z stays as it is
        variance = torch.where(self.weight > 0, variance, 1.0)
        return (z - mean) / variance.sqrt()


class LAM(nn.Module):
    """Latent action model: IDM and quantizer, and for the two-stage baseline an FDM.

    Raises ValueError: the frame size is not a multiple of the patch.
    """

    def __init__(self, cfg):
        super().__init__()
        if cfg.size % cfg.patch:
            raise ValueError(f"LAM: size {cfg.size} is not a multiple of its patch {cfg.patch}")
        self.cfg = cfg
        self.quantize = True                        # False: latent actions stay continuous
        self.idm = IDM(cfg)
        self.norm = Standardize(cfg.tokens, cfg.code_dim) if cfg.standardize else nn.Identity()
        self.vq = VectorQuantizer(cfg.num_codes, cfg.code_dim)
        self.vq.codebook.data *= cfg.latent_scale
        self.fdm = FDM(cfg) if cfg.fdm_depth else None

    def infer(self, video):
        """Latent actions before quantization: video (b, 3, t, h, w) in [-1, 1] -> (b, t-1, k, d)"""
        if self.cfg.odd:                            # from the two frames of a transition alone
            pairs = rearrange(video.unfold(2, 2, 1), "b c t h w two -> (b t) c two h w")
            z = self.idm(pairs) - self.idm(pairs.flip(2))
            z = rearrange(z, "(b t) 1 k d -> b t k d", b=len(video))
        else:
            z = self.idm(video)
        return self.norm(z.float()) * self.cfg.latent_scale

    def encode(self, video, draw=None):
        """Infer discrete latent actions; continuous ones with noise (in training) while `quantize` is off.

        Args:
            video: (b, 3, t, h, w) floats in [-1, 1].
            draw: source of the noise (flow.Draw); None: unseeded.

        Returns:
            z_q (b, t-1, k, d), where z_q[:, i] leads from frame i to i+1; indices (b, t-1, k) int64; the
            VQ loss.
        """
        z = self.infer(video)
        z_q, indices, loss = self.vq(z)
        if self.quantize:
            return z_q, indices, loss
        if self.training:
            # a soft bottleneck: what z is to tell must stand out from noise of half its scale
            noise = draw(torch.randn, *z.shape) if draw else torch.randn_like(z)
            z = z + 0.5 * self.cfg.latent_scale * noise
        return z, indices, 0 * loss                 # not a constant: under DDP every parameter must take part

    def forward(self, video, draw=None):
        """Two-stage loss: teacher-forced pixel MSE of the FDM (equation 1, appendix B.3) plus the VQ losses.

        Args:
            video: (b, 3, t, h, w) floats in [-1, 1].
            draw: as for `encode`.

        Returns loss, and a dict with `mse`, `vq` and `indices` (b, t-1, k).
        """
        z, indices, vq = self.encode(video, draw)
        video = resize(video, self.cfg.size)
        mse = F.mse_loss(self.fdm(video[:, :, :-1], z), video[:, :, 1:])
        return mse + vq, {"mse": mse.detach(), "vq": vq.detach(), "indices": indices}


class TrueActions(nn.Module):
    """Real actions themselves as latent ones, for a generator without a LAM: the upper bound. Ours.

    Each dimension is standardised by actions of the data, and takes the place of one of a latent action.

    Args:
        actions: (n, a) of the data, or None where moments are loaded; action_dim: a.
        cfg: LAMConfig of the latent actions that they replace.

    Raises ValueError: real actions have more dimensions than latent ones.
    """

    def __init__(self, action_dim, cfg, actions=None):
        super().__init__()
        self.action_dim, self.cfg = action_dim, cfg
        if action_dim > cfg.tokens * cfg.code_dim:
            raise ValueError(f"actions of {action_dim} dimensions do not fit into {cfg.tokens} tokens of "
                             f"{cfg.code_dim}")
        mean, std = torch.zeros(2, action_dim) if actions is None else (actions.mean(0), actions.std(0))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=1e-3))

    def forward(self, actions):
        """real actions (b, t-1, a) -> (b, t-1, k, d)"""
        z = self.cfg.latent_scale * (actions - self.mean) / self.std
        z = F.pad(z, (0, self.cfg.tokens * self.cfg.code_dim - self.action_dim))
        return z.unflatten(-1, (self.cfg.tokens, self.cfg.code_dim))


class Adapter(nn.Module):
    """From real actions to the latent action's codes: a two-layer MLP (appendix C.2; its width is ours).

    Args:
        action_dim: a, of the real actions.
        cfg: LAMConfig of the latent actions.
    """

    def __init__(self, action_dim, cfg, width=256):
        super().__init__()
        self.action_dim, self.cfg = action_dim, cfg
        logits = cfg.tokens * cfg.num_codes
        self.mlp = nn.Sequential(Linear(action_dim, width), nn.GELU(), Linear(width, logits))

    def forward(self, actions):
        """real actions (b, t-1, a) -> logits of the codes (b, t-1, k, num_codes)"""
        return self.mlp(actions).unflatten(-1, (self.cfg.tokens, self.cfg.num_codes))
