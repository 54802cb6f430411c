"""Vector quantization: the bottleneck that makes latent actions discrete.

Paper: section 3.2 and appendix B.1 (32 codes of 32 dimensions, 2 tokens a transition = 1024 actions),
after van den Oord et al. 2017, arXiv 1711.00937, eq. 3.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient, codebook loss and commitment loss.

    Both losses have weight 1.0 (appendix B.3) and are means over all elements, so what 1.0 means depends on
    the scale of z; LAMConfig.latent_scale sets it. The codebook is trained by its loss, hence by the same
    averaged gradient on every rank.

    Args:
        num_codes: entries of the codebook, shared by all tokens.
        dim: width of a code.
    """

    def __init__(self, num_codes, dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))

    def forward(self, z):
        """z: (..., dim) -> z_q (..., dim), the nearest codes; indices (...) int64; loss, a scalar."""
        indices = torch.cdist(z.detach().reshape(-1, z.shape[-1]), self.codebook.detach()).argmin(-1)
        indices = indices.view(z.shape[:-1])
        codes = F.embedding(indices, self.codebook)
        loss = F.mse_loss(codes, z.detach()) + F.mse_loss(z, codes.detach())
        return z + (codes - z).detach(), indices, loss

    @torch.no_grad()
    def fit(self, z, iterations=20):
        """Set the codebook by k-means on z (n, dim), from k-means++ seeds (ours, not in the paper)."""
        generator = torch.Generator(z.device).manual_seed(0)
        centres = z[:1]
        while len(centres) < len(self.codebook):
            far = torch.cdist(z, centres).amin(1) ** 2 + 1e-12
            centres = torch.cat([centres, z[torch.multinomial(far, 1, generator=generator)]])
        for _ in range(iterations):
            nearest = torch.cdist(z, centres).argmin(1)
            nearest = F.one_hot(nearest, len(centres)).to(z.dtype)              # (n, codes)
            count = nearest.sum(0)[:, None]
            centres = torch.where(count > 0, nearest.T @ z / count.clamp(min=1), centres)
        self.codebook.copy_(centres)


