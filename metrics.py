"""Numbers from tensors: what a video, a codebook, a probe is worth. No World in here.

Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from formats import optional

PSNR_CAP = 60.0     # dB, about the rounding error of 8-bit pixels: equal frames do not count as infinite


def psnr(a, b):
    """Peak signal-to-noise ratio of videos (b, c, t, h, w) in [-1, 1] (range 2), mean over frames: (b,) dB"""
    mse = (a - b).float().pow(2).mean((1, 3, 4))                                # (b, t)
    return (10 * torch.log10(4 / mse.clamp(min=1e-12))).clamp(max=PSNR_CAP).mean(1)


def ssim(a, b):
    """Structural similarity of videos (b, c, t, h, w) in [-1, 1], mean over frames: (b,), at most 1

    Wang et al. 2004, with the Gaussian window of 11 x 11 pixels (sigma 1.5), only where it fits into the
    frame: what scikit-image computes with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=2. Raises ValueError for smaller frames.
    """
    h, w = a.shape[-2:]
    if min(h, w) < 11:
        raise ValueError(f"SSIM: frames of {h}x{w} pixels are smaller than its window of 11x11")
    x = torch.arange(11, device=a.device) - 5
    window = torch.softmax(-x ** 2 / (2 * 1.5 ** 2), 0)

    def blur(images):                           # the window is the product of a column and a row
        return F.conv2d(F.conv2d(images, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    p, q = (rearrange(v.float(), "b c t h w -> (b c t) 1 h w") for v in (a, b))
    mean_p, mean_q = blur(p), blur(q)
    var_p = blur(p * p) - mean_p ** 2
    var_q = blur(q * q) - mean_q ** 2
    cov = blur(p * q) - mean_p * mean_q
    c1, c2 = 0.02 ** 2, 0.06 ** 2               # (0.01 * range)^2 and (0.03 * range)^2
    similar = ((2 * mean_p * mean_q + c1) * (2 * cov + c2)
               / ((mean_p ** 2 + mean_q ** 2 + c1) * (var_p + var_q + c2)))
    return similar.mean((1, 2, 3)).view(len(a), -1).mean(1)


def frechet(x, y):
    """Frechet distance of Gaussians with the means and covariances of features x (n, d) and y (m, d).

    |mean x - mean y|^2 + tr(a + b - 2 sqrt(a b)) for covariances a, b (Heusel et al. 2017, arXiv 1706.08500).
    """
    x, y = x.double(), y.double()
    a, b = x.T.cov(), y.T.cov()                                                 # (d, d)
    # tr sqrt(a b) by eigenvalues of a symmetric matrix: a b has those of sqrt(a) b sqrt(a)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).clamp(min=0).item()


def cka(x, y):
    """Linear centred kernel alignment of features (n, p) and (n, q), in [0, 1]; 0 if either is constant.

    Kornblith et al. 2019 (arXiv 1905.00414).
    """
    x, y = x.cpu().double(), y.cpu().double()
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-30)).item()


def codebook_metrics(indices, num_codes):
    """How much of the codebook is in use (Figures 2, 3, 5), by codes of any shape: numbers in [0, 1].

    `utilization` is the share of codes used at all, `max_usage` the share of the most used one, `entropy`
    that of the usage, divided by log(num_codes).
    """
    usage = torch.bincount(indices.flatten(), minlength=num_codes).cpu().double()
    p = usage / usage.sum()
    return {
        "utilization": (usage > 0).double().mean().item(),
        "max_usage": p.max().item(),
        "entropy": -(p * p.clamp(min=1e-12).log()).sum().item() / math.log(num_codes),
    }


def collapsed(indices, share=0.95):
    """Whether nearly all transitions have the same codes: indices (n, k). The limit is ours."""
    counts = indices.unique(dim=0, return_counts=True)[1]
    return (counts.max() / len(indices)).item() >= share


def joint_codes(indices):
    """Transitions with the same k codes get the same number: (n, k) -> (n,), from 0 to how many there are"""
    return indices.unique(dim=0, return_inverse=True)[1]


def nmi(codes, effects):
    """What codes tell of effects: I(codes; effects) / H(effects), minus the same with permuted codes.

    The subtraction takes out what few samples make seem informative. Both are (n,) int tensors from 0 on.
    """
    def information(x, y):
        joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.double)
        joint.index_put_((x, y), torch.ones(len(x), dtype=torch.double), accumulate=True)
        p = joint / len(x)
        independent = p.sum(1, keepdim=True) * p.sum(0)
        return (p * (p / independent).clamp(min=1e-300).log()).nan_to_num().sum()

    permuted = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    entropy = information(effects, effects)
    return ((information(codes, effects) - information(permuted, effects)) / entropy).item()


def probe(z, actions, z_test, actions_test, steps=1000, batch=512, seed=0):
    """Linear probe from latent to real actions (Table 1): one layer, L1 loss, 1000 steps of 512.

    For frozen latent actions (n, d) and actions (n, a): `l1`, test loss of the probe; `l1_constant`, that of
    the constant predictor; `r2`, share of the test variance that a least-squares probe explains, mean over
    the action dimensions that vary there.
    """
    scale = z.std() + 1e-8
    z, z_test = z / scale, z_test / scale
    constant = actions.median(0).values                     # (a,) what minimises L1 without looking at z
    linear = fit_l1(z, actions, constant, steps, batch, seed)
    explained = r2(z, actions, z_test, actions_test)
    return {
        "l1": (linear(z_test) - actions_test).abs().mean().item(),
        "l1_constant": (actions_test - constant).abs().mean().item(),
        "r2": explained.mean().item() if len(explained) else 0.0,
    }


def fit_l1(x, y, start, steps, batch, seed):
    """The linear map x (n, d) -> y (n, a) of least L1 loss, as a function; Adam from the constant `start`"""
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], 1e-2)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=generator)
            loss = (F.linear(x[rows], weight, bias) - y[rows]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda x: F.linear(x, weight.detach(), bias.detach())


def r2(x, y, x_test, y_test):
    """Share of the test variance that least squares explain, of each dimension of y that varies there"""
    x, x_test = (F.pad(v, (0, 1), value=1.0).double() for v in (x, x_test))     # ones, for the constant
    # with few codes the features are rank deficient but for rounding, which rcond keeps from being fitted
    fit = torch.linalg.lstsq(x, y.double(), rcond=1e-4, driver="gelsd").solution
    residual = (x_test @ fit - y_test).pow(2).mean(0)
    variance = y_test.double().var(0)
    return (1 - residual / variance)[variance > 1e-12]


def average_precision(scores, labels):
    """Of scores (n,) for labels (n,) bool, some True: the mean of the precision down to each of these

    1: all of them come first; the share of them: no better than chance. Equal scores are one threshold.
    """
    found = scores >= scores[labels][:, None]                                   # (positives, n)
    return (found[:, labels].sum(1) / found.sum(1)).mean().item()


def paired_t(a, b):
    """Paired t-test of two equally long lists: t, two-sided p; both None if the differences do not vary."""
    difference = np.asarray(a) - np.asarray(b)
    if len(difference) < 2 or not difference.std():
        return None, None
    t, p = optional("scipy.stats").ttest_rel(a, b)
    return float(t), float(p)


def wilson(rate, n, z=1.96):
    """95 % confidence interval of a share `rate` of n trials (Wilson 1927): low, high in [0, 1]"""
    middle = rate + z ** 2 / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z ** 2 / (4 * n ** 2))
    low, high = (middle - spread) / (1 + z ** 2 / n), (middle + spread) / (1 + z ** 2 / n)
    return max(0.0, low), min(1.0, high)
