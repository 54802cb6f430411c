"""Numbers from tensors: what a video, a codebook, a probe is worth. No World in here."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange


PSNR_CAP = 60.0     # dB, about the rounding error of 8-bit pixels: keeps frames that are equal from counting as infinite


def psnr(a, b):
    """Peak signal-to-noise ratio of videos (b, c, t, h, w) in [-1, 1] (range 2), mean over frames: (b,) dB"""
    mse = (a - b).float().pow(2).mean((1, 3, 4))                                # (b, t)
    return (10 * torch.log10(4 / mse.clamp(min=1e-12))).clamp(max=PSNR_CAP).mean(1)


def ssim(a, b):
    """Structural similarity of videos (b, c, t, h, w) in [-1, 1], mean over channels and frames: (b,) in [-1, 1]

    Wang et al. 2004, with the Gaussian window of 11 x 11 pixels (sigma 1.5), only where it fits into the frame: what
    scikit-image computes with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2.

    Raises:
        ValueError: frames of less than 11 x 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM: frames of {a.shape[-2]}x{a.shape[-1]} pixels are smaller than its window of 11x11")
    x = torch.arange(11, device=a.device) - 5
    window = torch.softmax(-x ** 2 / (2 * 1.5 ** 2), 0)
    blur = lambda v: F.conv2d(F.conv2d(v, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    p, q = (rearrange(v.float(), "b c t h w -> (b c t) 1 h w") for v in (a, b))
    mp, mq = blur(p), blur(q)
    vp, vq, cov = blur(p * p) - mp ** 2, blur(q * q) - mq ** 2, blur(p * q) - mp * mq
    c1, c2 = 0.02 ** 2, 0.06 ** 2                                               # (0.01 * 2)^2, (0.03 * 2)^2
    similar = (2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2))
    return similar.mean((1, 2, 3)).view(len(a), -1).mean(1)


def frechet(x, y):
    """Frechet distance between Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500)."""
    x, y = x.double(), y.double()
    a, b = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                     # of a; covariances are symmetric
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).clamp(min=0).item()


def collapsed(indices, share=0.95):
    """Whether nearly all transitions have the same codes: indices (n, k). The limit is ours."""
    return (indices.unique(dim=0, return_counts=True)[1].max() / len(indices)).item() >= share


def cka(x, y):
    """Linear centred kernel alignment of features (n, p) and (n, q), in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414);
    0 if either is constant."""
    x, y = (v.cpu().double() - v.cpu().double().mean(0) for v in (x, y))
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-30)).item()


def nmi(codes, effects):
    """I(codes; effects) / H(effects), minus the same with permuted codes, for two (n,) int tensors."""
    def information(x, y):
        joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.double)
        joint.index_put_((x, y), torch.ones(len(x), dtype=torch.double), accumulate=True)
        p = joint / len(x)
        independent = p.sum(1, keepdim=True) * p.sum(0)
        return (p * (p / independent).clamp(min=1e-300).log()).nan_to_num().sum()
    entropy = information(effects, effects)
    permuted = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    return ((information(codes, effects) - information(permuted, effects)) / entropy).item()


def probe(z, actions, z_test, actions_test, steps=1000, batch=512, seed=0):
    """Linear probe from latent to real actions (Table 1): one layer, L1 loss, 1000 steps of 512; R2 of least squares.

    Args:
        z, z_test: (n, d) frozen latent actions; actions, actions_test: (n, a).

    Returns:
        dict: `l1`, test loss of the probe; `l1_constant`, that of the constant predictor; `r2`, variance explained on
        test data by the least-squares probe, mean over the action dimensions that vary there.
    """
    g = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(z.shape[1], actions.shape[1])
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.copy_(actions.median(0).values)
    scale = z.std() + 1e-8
    optimizer = torch.optim.Adam(linear.parameters(), 1e-2)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(z), (batch,), generator=g)
            loss = (linear(z[rows] / scale) - actions[rows]).abs().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    ones = lambda x: torch.cat([x, torch.ones(len(x), 1)], 1).double()
    # few codes: the features are rank deficient but for rounding, which rcond keeps from being fitted
    fit = torch.linalg.lstsq(ones(z / scale), actions.double(), rcond=1e-4, driver="gelsd").solution
    residual, var = (ones(z_test / scale) @ fit - actions_test).pow(2).mean(0), actions_test.double().var(0)
    explained = (1 - residual / var)[var > 1e-12]
    return {"l1": (linear(z_test / scale) - actions_test).abs().mean().item(),
            "l1_constant": (actions_test - actions.median(0).values).abs().mean().item(),
            "r2": explained.mean().item() if len(explained) else 0.0}


def paired_t(a, b):
    """Paired t-test: t and its two-sided p, by integrating the density; None where the differences do not vary."""
    d = np.asarray(a) - np.asarray(b)
    if len(d) < 2 or not d.std():
        return None, None
    t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
    beyond = math.atan(abs(t) / math.sqrt(len(d) - 1))          # with t = sqrt(n-1) tan(angle), the density is cos^(n-2)
    area = lambda start: np.trapezoid(np.cos(x := np.linspace(start, np.pi / 2, 10001)) ** (len(d) - 2), x)
    return float(t), float(area(beyond) / area(0))


def codebook_metrics(indices, num_codes):
    """How much of the codebook is in use (Figures 2, 3, 5).

    Args:
        indices: codes of any shape, tokens pooled.
        num_codes: size of the codebook.

    Returns:
        dict of floats in [0, 1]: `utilization`, the share of codes used at all; `max_usage`, the share of the most
        used code; `entropy` of the usage, divided by log(num_codes).
    """
    usage = torch.bincount(indices.flatten(), minlength=num_codes).cpu().double()
    p = usage / usage.sum()
    return {
        "utilization": (usage > 0).double().mean().item(),
        "max_usage": p.max().item(),
        "entropy": -(p * p.clamp(min=1e-12).log()).sum().item() / math.log(num_codes),
    }


def wilson(rate, n, z=1.96):
    """95 % confidence interval of a share of n (Wilson 1927)."""
    middle, spread = rate + z ** 2 / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z ** 2 / (4 * n ** 2))
    return max(0.0, (middle - spread) / (1 + z ** 2 / n)), min(1.0, (middle + spread) / (1 + z ** 2 / n))
