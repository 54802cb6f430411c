"""The parts that all Transformers here share: position embeddings, attention, MLP, block, a cache of keys
and values.

Shape key of the repository: b batch, t frames, l latent frames, c channels, h w height and width, s tokens
a frame, k action tokens a transition, d width, n attention heads, e width of a head.
"""

from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

# rows of a batch that attend at once: a grid of CUDA holds 65,535, and the backward pass of flash attention
# counts heads x width x 128 queries of each row in 32 bits, which 16 heads of 72 exceed after 10,922 rows
ROWS = 8192


def mkl_is_slow():
    """Whether MKL, to which torch gives matrix products, leaves AVX-512 unused: on processors of AMD"""
    try:
        with open("/proc/cpuinfo") as f:
            amd = "AuthenticAMD" in f.read(200)
    except OSError:                                                             # another system than Linux
        return False
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


CONVOLVE = mkl_is_slow()


class Linear(nn.Linear):
    """nn.Linear; where MKL is slow, a large one in float32 is a convolution of 1 x 1 pixels.

    Convolutions go to oneDNN, twice as fast there (torch 2.13 on a Zen 5, forward and backward), but not
    those of fewer than 16 images.
    """

    def forward(self, x):
        rows = x.numel() // self.in_features
        large = rows >= 256 and rows % 16 == 0
        float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (CONVOLVE and x.device.type == "cpu" and large and float32):
            return super().forward(x)
        images = x.reshape(16, rows // 16, 1, self.in_features).permute(0, 3, 1, 2)
        y = F.conv2d(images, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def rope(x, start=0):
    """Rotary position embedding, interleaved pairs, base 10000 (Su et al. 2021, arXiv 2104.09864).

    x (b, n, t, e) at positions start, start + 1, ... -> the same shape
    """
    t, e = x.shape[-2:]
    place = torch.arange(start, start + t, device=x.device)
    frequency = 10000 ** (-torch.arange(0, e, 2, device=x.device) / e)
    angle = place[:, None] * frequency                                          # (t, e/2)
    pairs = x.float().unflatten(-1, (-1, 2))                                    # (b, n, t, e/2, 2)
    if torch.compiler.is_compiling():           # which fuses operations, but knows no complex numbers
        cos, sin, (even, odd) = angle.cos(), angle.sin(), pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    else:                                       # on a CPU five to ten times faster
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    return turned.flatten(-2).to(x.dtype)


def sincos(position, d):
    """Fixed embedding [sin, cos] of positions (n,) over frequencies 10000^(-2i/d) -> (n, d)"""
    angle = position[:, None] * 10000 ** (-torch.arange(0, d, 2, device=position.device) / d)
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_2d(rows, cols, d):
    """Fixed embedding of a grid, its columns in the first half of the channels: (rows * cols, d)"""
    y = sincos(rows, d // 2)[:, None].expand(-1, len(cols), -1)                 # (rows, cols, d/2)
    x = sincos(cols, d // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([x, y], -1).flatten(0, 1)


class KVCache:
    """Temporal keys and values of the clean past. The DiT reads them, and while `append` adds its own."""

    def __init__(self):
        self.past, self.frames, self.append = {}, 0, True


def extend(past, new):
    """Keys or values of earlier positions (m, n, p, e), then those of new ones (b, n, s, e): (b, n, p+s, e)

    Where m < b the past is shared: row i of the new goes on from row i modulo m.
    """
    m = len(past)
    past = past.expand(len(new) // m, *past.shape)                              # (b/m, m, n, p, e)
    new = new.unflatten(0, (-1, m))                                             # (b/m, m, n, s, e)
    return torch.cat([past, new], 3).flatten(0, 1)


def attend(q, k, v, mask, causal):
    """(b, n, s, e) and keys and values (b, n, p+s, e) -> (b, n, s, e), at most ROWS of the batch at once"""
    if len(q) > ROWS:
        parts = zip(q.split(ROWS), k.split(ROWS), v.split(ROWS))
        return torch.cat([attend(*part, mask, causal) for part in parts])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention with normalised q and k; optionally RoPE, a causal mask, a cached past."""

    def __init__(self, d, heads, rope=False, causal=False):
        super().__init__()
        self.heads, self.rope, self.causal = heads, rope, causal
        self.qkv = Linear(d, 3 * d)
        self.q_norm = nn.RMSNorm(d // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(d // heads, eps=1e-6)
        self.proj = Linear(d, d)

    def forward(self, x, past=None, keep=None):
        """x (b, s, d), past (k, v) as for `extend` or None -> (b, s, d), and (k, v) of past and x

        keep: only the first so many tokens ask, and are returned; None: all.
        """
        q, k, v = rearrange(self.qkv(x), "b s (three n e) -> three b n s e", three=3, n=self.heads)
        q = q[:, :, :keep]
        # under autocast a float32 weight would keep torch from its fused kernel, and q and k in float32
        q, k = (F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
                for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        start = 0 if past is None else past[0].shape[2]
        if self.rope:
            q, k = rope(q, start), rope(k, start)
        mask = None
        if past is not None:
            k, v = extend(past[0], k), extend(past[1], v)
            if self.causal:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(start)
        # on a CPU the fused kernel is slow for the few frames of a toy clip
        few = x.device.type == "cpu" and q.shape[2] * k.shape[2] <= 16
        with sdpa_kernel(SDPBackend.MATH) if few else nullcontext():
            y = attend(q, k, v, mask, causal=self.causal and past is None)
        return self.proj(rearrange(y, "b n s e -> b s (n e)")), (k, v)


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between them; the inner one is `ratio` times as wide."""

    def __init__(self, d, ratio=4):
        super().__init__()
        self.fc1 = Linear(d, round(ratio * d))
        self.fc2 = Linear(round(ratio * d), d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block over tokens (b, t, s, d): spatial and/or causal temporal attention, then an MLP."""

    def __init__(self, d, heads, spatial=True, temporal=True, ratio=4):
        super().__init__()
        if spatial:
            self.spatial_norm, self.spatial = nn.LayerNorm(d), Attention(d, heads)
        if temporal:
            self.temporal_norm, self.temporal = nn.LayerNorm(d), Attention(d, heads, rope=True, causal=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(d), MLP(d, ratio)
        self.has_spatial, self.has_temporal = spatial, temporal

    def forward(self, x, keep=None):
        """x (b, t, s, d) -> the same shape; or, where nobody reads the rest, its first `keep` tokens alone"""
        b, t, s, d = x.shape
        if self.has_spatial:
            y, _ = self.spatial(self.spatial_norm(x).view(b * t, s, d), keep=keep)
            x = x[:, :, :keep] + y.view(b, t, -1, d)
        if self.has_temporal:
            y = rearrange(self.temporal_norm(x), "b t s d -> (b s) t d")
            y, _ = self.temporal(y)
            x = x + rearrange(y, "(b s) t d -> b t s d", b=b)
        return x + self.mlp(self.mlp_norm(x))
