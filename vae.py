"""Between pixels and latents.

`PixelVAE` is the identity, for models that work on pixels (presets tiny and small). `FrameVAE` is small, of
single frames, and trained here. `OpenSoraVAE` is the video VAE of Open-Sora v1.2 (hpcaitech/Open-Sora, branch
opensora/v1.2): an image VAE (AutoencoderKL, Rombach et al. 2022) takes each frame to 8x8 times smaller
latents, a causal 3-D VAE (after MAGVIT-v2, Yu et al. 2024) takes 4 frames of those to one. Module names are
those of the released weights.
"""

import os
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from weights import fill, open_weights


class PixelVAE(nn.Module):
    """The identity, with a VAE's interface: latents are the pixels, one latent frame a frame."""

    channels, pixel_stride, time_stride, source = 3, 1, 1, "none"

    def latent_frames(self, frames):
        return frames

    def encode(self, video, sample=False):
        """video (b, 3, t, h, w) in [-1, 1] -> latents (b, 3, t, h, w)"""
        return video

    def decode(self, latents, frames):
        """latents (b, 3, l, h, w) -> video (b, 3, frames, h, w), about in [-1, 1]"""
        return latents[:, :, :frames]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input. conv(cin, cout, kernel) is 2-D, or causal 3-D."""

    def __init__(self, cin, cout, conv, norm, shortcut):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), conv(cin, cout, 3)
        self.norm2, self.conv2 = norm(cout), conv(cout, cout, 3)
        self.shortcut = shortcut if cin != cout else None       # its name in the released weights
        if self.shortcut:
            self.add_module(shortcut, conv(cin, cout, 1))

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (getattr(self, self.shortcut)(x) if self.shortcut else x)


def resnets(cin, cout, n, block):
    return nn.Sequential(*[block(cin if i == 0 else cout, cout) for i in range(n)])


def posterior(moments, sample):
    """Mean, or a draw, of the Gaussian whose mean and log variance lie along the channels"""
    mean, logvar = moments.chunk(2, 1)
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean) if sample else mean


# the image VAE -----------------------------------------------------------------------------------


class PixelAttention(nn.Module):
    """One head over the places of a frame, plus the input."""

    def __init__(self, c, norm):
        super().__init__()
        self.group_norm = norm(c)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(self, x):
        """(n, c, h, w) -> (n, c, h, w)"""
        y = self.group_norm(x).flatten(2).transpose(1, 2)                       # (n, h*w, c)
        y = self.to_out(F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    def __init__(self, c, block, norm):
        super().__init__()
        self.resnets = nn.ModuleList([block(c, c), block(c, c)])
        self.attentions = nn.ModuleList([PixelAttention(c, norm)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ImageCoder(nn.Module):
    """Encoder or decoder: levels of residual blocks, between which the resolution changes by 2."""

    def __init__(self, cin, cout, widths, layers, groups, up):
        super().__init__()
        conv = partial(nn.Conv2d, padding="same")
        norm = partial(nn.GroupNorm, groups, eps=1e-6)
        block = partial(ResBlock, conv=conv, norm=norm, shortcut="conv_shortcut")
        self.up, last = up, len(widths) - 1
        self.conv_in = conv(cin, widths[0], 3)
        levels = []
        for i, width in enumerate(widths):
            level = nn.ModuleDict({"resnets": resnets(widths[max(i - 1, 0)], width, layers, block)})
            if i < last:
                name = "upsamplers" if up else "downsamplers"
                resize = conv(width, width, 3) if up else nn.Conv2d(width, width, 3, stride=2)
                level[name] = nn.ModuleList([nn.ModuleDict({"conv": resize})])
            levels.append(level)
        self.add_module("up_blocks" if up else "down_blocks", nn.ModuleList(levels))
        self.mid_block = Middle(widths[0] if up else widths[-1], block, norm)
        self.conv_norm_out, self.conv_out = norm(widths[-1]), conv(widths[-1], cout, 3)

    def forward(self, x):
        """(n, cin, h, w) -> (n, cout, h', w')"""
        x = self.conv_in(x)
        if self.up:
            x = self.mid_block(x)
        for level in self.up_blocks if self.up else self.down_blocks:
            x = level["resnets"](x)
            if "upsamplers" in level:
                x = level["upsamplers"][0]["conv"](F.interpolate(x, scale_factor=2.0))
            if "downsamplers" in level:
                x = level["downsamplers"][0]["conv"](F.pad(x, (0, 1, 0, 1)))
        if not self.up:
            x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class ImageVAE(nn.Module):
    """Frame by frame, `micro_batch` frames at a time so that memory stays bounded."""

    def __init__(self, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                 latent_channels=4, scaling_factor=0.18215, micro_batch=4):
        super().__init__()
        z, widths = latent_channels, list(block_out_channels)
        self.stride, self.scaling, self.micro_batch = 2 ** (len(widths) - 1), scaling_factor, micro_batch
        self.module = nn.ModuleDict({
            "encoder": ImageCoder(3, 2 * z, widths, layers_per_block, norm_num_groups, up=False),
            "decoder": ImageCoder(z, 3, widths[::-1], layers_per_block + 1, norm_num_groups, up=True),
            "quant_conv": nn.Conv2d(2 * z, 2 * z, 1),
            "post_quant_conv": nn.Conv2d(z, z, 1)})

    def by_frame(self, video, *names):
        """What the modules of these names, one after the other, make of each frame"""
        modules = nn.Sequential(*[self.module[name] for name in names])
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        frames = torch.cat([modules(part) for part in frames.split(self.micro_batch)])
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))

    def encode(self, video, sample=False):
        """video (b, 3, t, h, w) in [-1, 1] -> (b, 4, t, h/8, w/8)"""
        return posterior(self.by_frame(video, "encoder", "quant_conv"), sample) * self.scaling

    def decode(self, latents):
        """(b, 4, t, h/8, w/8) -> (b, 3, t, h, w)"""
        return self.by_frame(latents / self.scaling, "post_quant_conv", "decoder")


class FrameVAE(nn.Module):
    """A small VAE of single frames, trained by `train.py --mode vae`: 8x8 times smaller latents. Ours.

    Open-Sora's image coder with three narrow levels, on squares of 2x2 pixels. As in latent diffusion
    (Rombach et al. 2022, section 3.1) the KL term weighs little: it only bounds how exact a latent can be.
    Latents leave the VAE standardised, by the moments that each channel had in training.

    Args:
        channels: of a latent; width: of the finest level, a multiple of 8; beta: weight of the KL term.
    """

    pixel_stride, time_stride = 8, 1
    chunk = 1                                                   # frames that are encoded together

    def __init__(self, channels=16, width=32, beta=1e-4):
        super().__init__()
        self.channels, self.beta = channels, beta
        self.source = {"channels": channels, "width": width, "beta": beta}      # with the weights, all it is
        widths = [width, 2 * width, 4 * width]
        self.encoder = ImageCoder(12, 2 * channels, widths, 1, 8, up=False)
        self.decoder = ImageCoder(channels, 12, widths[::-1], 1, 8, up=True)
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.01)       # it keeps the moments

    def latent_frames(self, frames):
        return frames

    def moments(self, video):
        """(b, 3, t, h, w) -> means and log variances of the posteriors (b*t, 2*channels, h/8, w/8)"""
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        return self.encoder(F.pixel_unshuffle(frames, 2)).float()

    def pixels(self, z):
        """Latents before they are standardised (n, channels, h, w) -> frames (n, 3, 8h, 8w)"""
        return F.pixel_shuffle(self.decoder(z), 2).float()

    def forward(self, video, draw):
        """Loss: squared error of frames decoded from draws of their posteriors, plus beta KL, both as means.

        video (b, 3, t, h, w) in [-1, 1]; draw: source of randomness. Returns loss, {"mse", "kl"}.
        """
        mean, logvar = self.moments(video).chunk(2, 1)
        noise = draw(torch.randn, len(video), video.shape[2], *mean.shape[1:]).flatten(0, 1)
        z = mean + (0.5 * logvar).exp() * noise
        self.norm(z.detach())
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        mse = F.mse_loss(self.pixels(z), frames)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return mse + self.beta * kl, {"mse": mse.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def encode(self, video, sample=False):
        """video (b, 3, t, h, w) in [-1, 1], h and w multiples of 8 -> latents (b, channels, t, h/8, w/8)"""
        z = posterior(self.moments(video), sample)
        z = F.batch_norm(z, self.norm.running_mean, self.norm.running_var)
        return rearrange(z, "(b t) c h w -> b c t h w", b=len(video))

    @torch.no_grad()
    def decode(self, latents, frames):
        """The inverse of `encode`: (b, channels, l, h, w) -> (b, 3, frames, 8h, 8w), about in [-1, 1]"""
        z = rearrange(latents[:, :, :frames].float(), "b c t h w -> (b t) c h w")
        std = (self.norm.running_var + self.norm.eps).sqrt()
        z = z * std[:, None, None] + self.norm.running_mean[:, None, None]
        return rearrange(self.pixels(z), "(b t) c h w -> b c t h w", b=len(latents))


# the temporal VAE --------------------------------------------------------------------------------


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: zeros are padded in front."""

    def __init__(self, cin, cout, kernel, stride=1, bias=True):
        super().__init__()
        self.pad = (kernel // 2,) * 4 + (kernel - stride, 0)
        self.conv = nn.Conv3d(cin, cout, kernel, (stride, 1, 1), bias=bias)

    def forward(self, x):
        return self.conv(F.pad(x, self.pad))


class TimeEncoder(nn.Module):
    """Levels of residual blocks; where `halve` says so, a level ends in a convolution of stride 2 in time."""

    def __init__(self, z, base, widths, n, halve, block, norm):
        super().__init__()
        self.conv_in = CausalConv3d(z, base, 3, bias=False)
        below = [base] + widths
        self.block_res_blocks = nn.ModuleList(resnets(b, w, n, block) for b, w in zip(below, widths))
        self.conv_blocks = nn.ModuleList(CausalConv3d(w, w, 3, stride=2) if h else nn.Identity()
                                         for w, h in zip(widths, halve))
        self.res_blocks = resnets(widths[-1], widths[-1], n, block)
        self.norm1, self.conv2 = norm(widths[-1]), CausalConv3d(widths[-1], 2 * z, 1)

    def forward(self, x):
        x = self.conv_in(x)
        *levels, last = self.block_res_blocks
        for blocks, resize in zip(levels, self.conv_blocks):
            x = resize(blocks(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(last(x)))))


class TimeDecoder(nn.Module):
    """The encoder backwards: a level begins with a convolution whose channels become two frames."""

    def __init__(self, z, widths, n, halve, block, norm):
        super().__init__()
        self.conv1 = CausalConv3d(z, widths[-1], 3)
        self.res_blocks = resnets(widths[-1], widths[-1], n, block)
        above = widths[1:] + widths[-1:]
        self.block_res_blocks = nn.ModuleList(resnets(a, w, n, block) for a, w in zip(above, widths))
        self.conv_blocks = nn.ModuleList(CausalConv3d(a, 2 * a, 3) if h else nn.Identity()
                                         for a, h in zip(above, halve))
        self.norm1, self.conv_out = norm(widths[0]), CausalConv3d(widths[0], z, 3)
        self.halve = halve

    def forward(self, x):
        x = self.res_blocks(self.conv1(x))
        for i in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[i](x)
            if i and self.halve[i - 1]:
                x = rearrange(self.conv_blocks[i - 1](x), "b (c two) l h w -> b c (l two) h w", two=2)
        return self.conv_out(F.silu(self.norm1(x)))


class TimeVAE(nn.Module):
    """Latents of frames <-> fewer latents; zeros in front fill up a clip that the stride does not divide."""

    def __init__(self, filters=128, num_groups=32, num_res_blocks=4, channel_multipliers=(1, 2, 2, 4),
                 temporal_downsample=(False, True, True), z=4):
        super().__init__()
        self.stride = 2 ** sum(temporal_downsample)
        norm = partial(nn.GroupNorm, num_groups)
        block = partial(ResBlock, conv=partial(CausalConv3d, bias=False), norm=norm, shortcut="conv3")
        args = [filters * m for m in channel_multipliers], num_res_blocks, temporal_downsample, block, norm
        self.encoder, self.decoder = TimeEncoder(z, filters, *args), TimeDecoder(z, *args)
        self.quant_conv, self.post_quant_conv = CausalConv3d(2 * z, 2 * z, 1), CausalConv3d(z, z, 1)

    def encode(self, x, sample=False):
        """(b, z, t, h, w) -> (b, z, ceil(t / stride), h, w)"""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.stride, 0))
        return posterior(self.quant_conv(self.encoder(x)), sample)

    def decode(self, latents, frames):
        return self.decoder(self.post_quant_conv(latents))[:, :, -frames % self.stride:]


# both --------------------------------------------------------------------------------------------


class OpenSoraVAE(nn.Module):
    """Open-Sora v1.2's frozen video VAE: 4 channels, 8x8 in space, 4 in time, in chunks of 17 frames.

    The first latent of a chunk stands for its first frame alone, each other one for 4 frames. Convolutions
    are causal, but the norms average over the chunk: a first frame encoded alone differs a little from the
    same frame with its future.

    Args:
        spatial, temporal: sizes of `ImageVAE` and `TimeVAE`, named as in config.json; empty: as released.
        chunk: frames that are encoded together (`micro_frame_size`).
    """

    def __init__(self, spatial={}, temporal={}, chunk=17):
        super().__init__()
        self.spatial_vae = ImageVAE(**spatial)
        self.channels = spatial.get("latent_channels", 4)
        self.temporal_vae = TimeVAE(**temporal, z=self.channels)
        self.chunk = chunk
        self.pixel_stride, self.time_stride = self.spatial_vae.stride, self.temporal_vae.stride
        self.source = None                                      # path of the weights
        # of each channel; in the released weights -0.10, 0.34, 0.27, 0.98 and 3.85, 2.32, 2.33, 3.06
        self.register_buffer("shift", torch.empty(1, self.channels, 1, 1, 1))
        self.register_buffer("scale", torch.empty(1, self.channels, 1, 1, 1))

    def latent_frames(self, frames):
        """How many latent frames a clip of so many frames has"""
        whole, rest = divmod(frames, self.chunk)
        return whole * -(-self.chunk // self.time_stride) + -(-rest // self.time_stride)

    @torch.no_grad()
    def encode(self, video, sample=False):
        """Latents of a video: means of the posteriors, or draws from them.

        Args:
            video: (b, 3, t, h, w) in [-1, 1], h and w multiples of 8.

        Returns (b, 4, latent_frames(t), h/8, w/8), of about unit variance.
        Raises ValueError: another frame size.
        """
        h, w = video.shape[3:]
        if h % self.pixel_stride or w % self.pixel_stride:
            raise ValueError(f"frames of {h}x{w}: the VAE needs multiples of {self.pixel_stride}")
        x = self.spatial_vae.encode(video, sample)
        z = torch.cat([self.temporal_vae.encode(c, sample) for c in x.split(self.chunk, 2)], 2)
        return (z.float() - self.shift) / self.scale

    @torch.no_grad()
    def decode(self, latents, frames):
        """The inverse: latents (b, 4, l, h, w) -> video (b, 3, frames, 8h, 8w), about in [-1, 1].

        Raises ValueError: l is not latent_frames(frames).
        """
        l = latents.shape[2]
        if l != self.latent_frames(frames):
            raise ValueError(f"{l} latent frames, but {frames} frames have {self.latent_frames(frames)}")
        chunks = (latents * self.scale + self.shift).split(self.latent_frames(self.chunk), 2)
        lengths = [min(self.chunk, frames - first) for first in range(0, frames, self.chunk)]
        x = torch.cat([self.temporal_vae.decode(*pair) for pair in zip(chunks, lengths)], 2)
        return self.spatial_vae.decode(x).float()


def load_opensora_vae(path):
    """Open-Sora v1.2's VAE from its released folder (config.json, model.safetensors) or a file of tensors.

    Sizes are those under `spatial` and `temporal` of config.json, and the released ones where it names none.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a file that cannot be read, or a tensor that is missing, unexpected or of another shape.
    """
    config, read = open_weights(path)
    try:
        with torch.device("meta"):
            chunk = config.get("micro_frame_size", 17) or 10 ** 6       # null: clips are never cut
            vae = OpenSoraVAE(config.get("spatial", {}), config.get("temporal", {}), chunk)
    except Exception as error:                  # whatever odd sizes make torch's modules raise
        raise ValueError(f"{path}: config.json does not fit ({error})") from None
    fill(vae, read, path)
    vae.source = os.path.abspath(path)
    return vae.eval().requires_grad_(False)


