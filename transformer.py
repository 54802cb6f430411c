"""The Transformer parts that all models here share: attention, block, position embeddings, a cache of keys and values."""

from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel


def rope(x, start=0):
    """Rotary position embedding, interleaved pairs, base 10000 (Su et al. 2021): x (b, n, t, e), first position start."""
    t, e = x.shape[-2:]
    angle = torch.arange(start, start + t, device=x.device)[:, None] * 10000 ** (
        -torch.arange(0, e, 2, device=x.device) / e)                                  # (t, e/2)
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def sincos(position, d):
    """Fixed embedding [sin, cos] of a 1-D position tensor over frequencies 10000^(-2i/d): (n,) -> (n, d)."""
    angle = position[:, None] * 10000 ** (-torch.arange(0, d, 2, device=position.device) / d)
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_2d(rows, cols, d):
    """Embedding of a grid: first half of the channels for the column, second for the row: (rows*cols, d)."""
    y = sincos(rows, d // 2)[:, None].expand(-1, len(cols), -1)
    x = sincos(cols, d // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([x, y], -1).flatten(0, 1)


class KVCache:
    """Temporal keys and values of the clean past. A call of the DiT reads them, and adds its own while `append`."""

    def __init__(self):
        self.past, self.frames, self.append = {}, 0, True


class Attention(nn.Module):
    """Multi-head self-attention; optionally RMS-normalised q and k, RoPE, a causal mask, a cached past."""

    def __init__(self, d, heads, rope=False, causal=False):
        super().__init__()
        self.heads, self.rope, self.causal = heads, rope, causal
        self.qkv = nn.Linear(d, 3 * d)
        self.q_norm = nn.RMSNorm(d // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(d // heads, eps=1e-6)
        self.proj = nn.Linear(d, d)

    def forward(self, x, past=None):
        """x: (b, s, d); past: (k, v) of earlier positions, each (b, n, p, e), or of fewer rows that x repeats: row i goes on from row
        i modulo their number. Returns (b, s, d) and all (k, v)."""
        q, k, v = rearrange(self.qkv(x), "b s (three n e) -> three b n s e", three=3, n=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        start = 0 if past is None else past[0].shape[2]
        if self.rope:
            q, k = rope(q, start), rope(k, start)
        mask = None
        if past is not None:
            rows = len(past[0])
            k, v = (torch.cat([old.expand(len(x) // rows, *old.shape), new.unflatten(0, (-1, rows))], 3).flatten(0, 1)
                    for old, new in zip(past, (k, v)))
            if self.causal:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(start)
        # on a CPU the fused kernel is slow for the few frames of a toy clip
        plain = x.device.type == "cpu" and q.shape[2] * k.shape[2] <= 16
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, is_causal=self.causal and past is None)
        return self.proj(rearrange(y, "b n s e -> b s (n e)")), (k, v)


class MLP(nn.Module):
    def __init__(self, d, ratio=4):
        super().__init__()
        self.fc1 = nn.Linear(d, round(ratio * d))
        self.fc2 = nn.Linear(round(ratio * d), d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm Transformer block over tokens (b, t, s, d): spatial and/or causal temporal attention, then an MLP."""

    def __init__(self, d, heads, spatial=True, temporal=True, ratio=4):
        super().__init__()
        if spatial:
            self.spatial_norm, self.spatial = nn.LayerNorm(d), Attention(d, heads)
        if temporal:
            self.temporal_norm, self.temporal = nn.LayerNorm(d), Attention(d, heads, rope=True, causal=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(d), MLP(d, ratio)
        self.has_spatial, self.has_temporal = spatial, temporal

    def forward(self, x):
        b, t, s, d = x.shape
        if self.has_spatial:
            x = x + self.spatial(self.spatial_norm(x).view(b * t, s, d))[0].view(b, t, s, d)
        if self.has_temporal:
            y = rearrange(self.temporal_norm(x), "b t s d -> (b s) t d")
            x = x + rearrange(self.temporal(y)[0], "(b s) t d -> b t s d", b=b)
        return x + self.mlp(self.mlp_norm(x))
