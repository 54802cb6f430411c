"""Between pixels and latents.

`PixelVAE` is the identity, for models that work on pixels (presets tiny and small).
"""

import torch.nn as nn


class PixelVAE(nn.Module):
    """The identity, with a VAE's interface: latents are the pixels, one latent frame a frame."""

    channels, pixel_stride, time_stride = 3, 1, 1

    def encode(self, video, sample=False):
        """video (b, 3, t, h, w) in [-1, 1] -> latents (b, 3, t, h, w)"""
        return video

    def decode(self, latents, frames):
        """latents (b, 3, l, h, w) -> video (b, 3, frames, h, w), clamped to [-1, 1]"""
        return latents[:, :, :frames].clamp(-1, 1)
