"""World model backbone: a causal spatio-temporal diffusion Transformer, conditioned on latent actions.

Open-Sora v1.2's STDiT3 (hpcaitech/Open-Sora, branch opensora/v1.2) without its text path, with a causal
mask in the temporal attention (appendix B.2), plus the paper's action conditioning: a self-attention
network over the action sequence and an MLP whose scale, shift and gate are added to those of the flow time
in every block (section 3.3). Module names are those of the released weights.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from transformer import MLP, Attention, Block, Linear, sincos_2d
from weights import fill, open_weights


@dataclass
class DiTConfig:
    hidden: int = 1152
    heads: int = 16
    depth: int = 28             # pairs of a spatial and a temporal block
    channels: int = 4           # of the latents
    patch: int = 2              # spatial; the temporal patch is 1
    out_channels: int = 8       # Open-Sora also predicts an unused sigma; pixel models set this to `channels`
    pixel_stride: int = 8       # pixels a latent cell: the position grid is in pixels
    causal: bool = True         # in temporal attention; Open-Sora itself is bidirectional
    action_dim: int = 256       # r*k*d, what leads to one latent frame; 0: no action modules
    action_depth: int = 6       # causal blocks over the action sequence
    action_scale: float = 1.0   # (ours) standard deviation to expect of the actions
    # (ours) standard deviation of the action MLP's last layer at the start. Fresh codes change the velocity
    # of the fixture in assets/ by 0.3 %, yet gradient flows
    action_std: float = 0.01
    mlp_ratio: float = 4
    input_sq_size: int = 512    # side in pixels at which a token is one unit of the position grid


def zero(linear):
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def action_depth(depth):
    """Blocks over the actions, beside `depth` pairs of blocks: 6 (the paper), or fewer (ours)."""
    return min(6, depth)


class Embedder(nn.Module):
    """A scalar -> 256 sinusoids [cos, sin] -> Linear, SiLU, Linear."""

    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, d), nn.SiLU(), Linear(d, d))

    def forward(self, x):
        """x (...) -> (..., d)"""
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angle = x.float()[..., None] * freq
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class DiTBlock(nn.Module):
    """x += gate * attn(norm(x) * (1 + scale) + shift), then the same with the MLP; spatial or temporal."""

    def __init__(self, cfg, temporal):
        super().__init__()
        d = cfg.hidden
        self.temporal = temporal
        self.attn = Attention(d, cfg.heads, rope=temporal, causal=temporal and cfg.causal)
        self.mlp = MLP(d, cfg.mlp_ratio)
        self.norm1 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d ** 0.5)
        with torch.no_grad():               # from scratch, gates near 1 learn much faster than gates near 0
            self.scale_shift_table[[2, 5]] += 1

    def forward(self, x, mod, past=None):
        """x (b, l, s, d), mod (b, l, 6, d) -> (b, l, s, d) and the temporal (k, v)"""
        b = len(x)
        mod = (self.scale_shift_table + mod)[:, :, :, None]                     # (b, l, 6, 1, d)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(2)            # each (b, l, 1, d)
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        if self.temporal:
            y, kv = self.attn(rearrange(y, "b l s d -> (b s) l d"), past)
            y = rearrange(y, "(b s) l d -> b l s d", b=b)
        else:
            y, kv = self.attn(rearrange(y, "b l s d -> (b l) s d"))
            y = rearrange(y, "(b l) s d -> b l s d", b=b)
        x = torch.addcmul(x, gate1, y)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))), kv


class FinalLayer(nn.Module):
    """Tokens -> the pixels of their patches, after a norm that the flow time (and fps) modulates."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.hidden, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, cfg.hidden) / cfg.hidden ** 0.5)
        self.linear = Linear(cfg.hidden, cfg.patch ** 2 * cfg.out_channels)

    def forward(self, x, time):
        """x (b, l, s, d), time (b, l, d) -> (b, l, s, patch * patch * out_channels)"""
        mod = (self.scale_shift_table + time[:, :, None]).unsqueeze(3)          # (b, l, 2, 1, d)
        shift, scale = mod.unbind(2)                                            # each (b, l, 1, d)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class ActionModules(nn.Module):
    """Action sequence -> six modulations for each latent frame (section 3.3, appendix B.2).

    Causal blocks whose output projections start at zero, then an MLP whose last layer starts small.
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.hidden
        self.embed = Linear(cfg.action_dim, d)
        depth = range(cfg.action_depth)
        self.blocks = nn.ModuleList(Block(d, cfg.heads, spatial=False, ratio=2) for _ in depth)
        self.mlp = nn.Sequential(Linear(d, d), nn.SiLU(), Linear(d, 6 * d))
        for block in self.blocks:
            zero(block.temporal.proj)
            zero(block.mlp.fc2)
        nn.init.normal_(self.embed.weight, std=1 / (cfg.action_scale * cfg.action_dim ** 0.5))
        nn.init.normal_(self.mlp[2].weight, std=cfg.action_std)
        nn.init.zeros_(self.mlp[2].bias)

    def features(self, actions):
        """actions (b, l-1, action_dim) -> (b, l, d); the first frame gets the null action, zeros"""
        x = self.embed(F.pad(actions, (0, 0, 1, 0)))[:, :, None]                # (b, l, 1, d)
        for block in self.blocks:
            x = block(x)
        return x[:, :, 0]

    def forward(self, actions):
        """actions (b, l-1, action_dim) -> (b, l, 6, d)"""
        return self.mlp(self.features(actions)).unflatten(-1, (6, -1))


class DiT(nn.Module):
    """Predicts the velocity x_0 - noise of each latent frame from noised and clean frames.

    Latents that the patch does not divide are padded with zeros at the right and at the bottom.

    Raises ValueError: actions of another shape.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d = cfg.hidden
        side = (1, cfg.patch, cfg.patch)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(cfg.channels, d, side, stride=side)})
        self.t_embedder = Embedder(d)
        self.fps_embedder = Embedder(d)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        self.spatial_blocks = nn.ModuleList(DiTBlock(cfg, temporal=False) for _ in range(cfg.depth))
        self.temporal_blocks = nn.ModuleList(DiTBlock(cfg, temporal=True) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        self.action = ActionModules(cfg) if cfg.action_dim else None
        zero(self.t_block[1])
        zero(self.final_layer.linear)

    def body(self):
        """Parameters of the pre-trained generator: all but the action modules."""
        return [p for name, p in self.named_parameters() if not name.startswith("action.")]

    def position(self, rows, cols, h, w, device):
        """Open-Sora's position embedding of the token grid of (h, w) latents: (rows*cols, d)"""
        scale = math.sqrt(h * w) * self.cfg.pixel_stride / self.cfg.input_sq_size
        base = round(math.sqrt(rows * cols))
        y, x = (torch.arange(n, device=device) / scale * base / n for n in (rows, cols))
        return sincos_2d(y, x, self.cfg.hidden)

    def forward(self, x, t, actions=None, fps=None, cache=None):
        """
        Args:
            x: (b, c, l, h, w) latents; context frames clean, the others noised.
            t: (b, l) flow time in [0, 1], 0 for context frames.
            actions: (b, l-1, action_dim), actions[:, j] leads from latent frame j to j+1; with a cache,
                those since the first cached frame. None: the action modules are skipped.
            fps: (b,) frames a second; None: 24.
            cache: KVCache of the frames before x, or None.

        Returns velocity (b, c, l, h, w).
        """
        cfg, (b, c, l, h, w) = self.cfg, x.shape
        start = cache.frames if cache else 0
        rows, cols = -(-h // cfg.patch), -(-w // cfg.patch)
        fps = torch.full((b,), 24.0, device=x.device) if fps is None else fps
        x = self.x_embedder["proj"](F.pad(x, (0, -w % cfg.patch, 0, -h % cfg.patch)))
        x = rearrange(x, "b d l h w -> b l (h w) d")
        x = x + self.position(rows, cols, h, w, x.device).to(x.dtype)
        time = self.t_embedder(1000 * t) + self.fps_embedder(fps)[:, None]      # (b, l, d)
        mod = self.t_block(time).unflatten(-1, (6, -1))                         # (b, l, 6, d)
        if actions is not None:
            expected = (b, start + l - 1, cfg.action_dim)
            if actions.shape != expected:
                raise ValueError(f"DiT: actions {tuple(actions.shape)}, expected {expected}")
            mod = mod + self.action(actions)[:, start:]
        for i in range(cfg.depth):
            x, _ = self.spatial_blocks[i](x, mod)
            x, kv = self.temporal_blocks[i](x, mod, cache.past.get(i) if cache else None)
            if cache and cache.append:
                cache.past[i] = kv
        if cache and cache.append:
            cache.frames += l
        x = self.final_layer(x, time)
        x = rearrange(x, "b l (h w) (p q c) -> b c l (h p) (w q)", h=rows, p=cfg.patch, q=cfg.patch)
        return x[:, :c, :, :h, :w]


def load_opensora(path, causal=True, **overrides):
    """Open-Sora v1.2's STDiT3 with its text path left out and fresh action modules.

    Every tensor is taken over but those of `cross_attn`, `y_embedder` and `rope.freqs`, which RoPE
    computes itself.

    Args:
        path: the released folder (config.json, model.safetensors), or a file of its tensors.
        causal: mask temporal attention (the paper); False is Open-Sora itself.
        overrides: fields of DiTConfig that are not those of the checkpoint, such as action_dim.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a file that cannot be read, or a tensor that is missing, unexpected or of another shape.
    """
    config, read = open_weights(path)
    try:
        sizes = sizes_of({name: tensor.shape for name, tensor in read().items()})
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not an STDiT3 ({error})") from None
    sizes |= {"input_sq_size": config.get("input_sq_size", 512), "causal": causal,
              "action_depth": action_depth(sizes["depth"])}
    cfg = DiTConfig(**(sizes | overrides))
    with torch.device("meta"):
        dit = DiT(replace(cfg, action_dim=0))
    loaded, skipped = fill(dit, read, path, ("cross_attn.", "y_embedder.", "rope.freqs"))
    dit.cfg, dit.action = cfg, ActionModules(cfg) if cfg.action_dim else None
    new = sum(p.numel() for p in dit.parameters()) - loaded
    print(f"{path}: {loaded / 1e6:.2f} M parameters loaded, {skipped / 1e6:.2f} M of the text path skipped, "
          f"{new / 1e6:.2f} M new")
    return dit


def sizes_of(shape):
    """Fields of DiTConfig that the shapes of STDiT3's tensors tell; KeyError and the like if they are not."""
    hidden, channels, _, patch, _ = shape["x_embedder.proj.weight"]
    blocks = {name.split(".")[1] for name in shape if name.startswith("spatial_blocks.")}
    return {
        "hidden": hidden,
        "channels": channels,
        "patch": patch,
        "depth": len(blocks),
        "heads": hidden // shape["spatial_blocks.0.attn.q_norm.weight"][0],
        "mlp_ratio": shape["spatial_blocks.0.mlp.fc1.weight"][0] / hidden,
        "out_channels": shape["final_layer.linear.weight"][0] // patch ** 2,
    }
