"""Measures of latent actions and of the world they drive; training reports them from here.

Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F

from data import to_video
from flow import Draw, shift_time, time_ratio
from vq import codebook_metrics

PSNR_CAP = 60.0     # dB, about the rounding error of 8-bit pixels: keeps frames that are equal from counting as infinite


def psnr(a, b):
    """Peak signal-to-noise ratio of videos (b, c, t, h, w) in [-1, 1] (range 2), mean over frames: (b,) dB"""
    mse = (a - b).float().pow(2).mean((1, 3, 4))                                # (b, t)
    return (10 * torch.log10(4 / mse.clamp(min=1e-12))).clamp(max=PSNR_CAP).mean(1)


def save_gif(path, videos, fps=4, rows=4):
    """Videos [(n, 3, t, h, w) in [-1, 1], ...] side by side, one clip a row, as a GIF."""
    grid = torch.cat([torch.cat(list(F.pad(v[:rows], (1, 1, 1, 1), value=1.0)), 2) for v in videos], 3)  # (3, t, rows*h, n*w)
    scale = max(1, 128 // videos[0].shape[-1])
    frames = ((grid + 1) * 127.5).round().byte().permute(1, 2, 3, 0).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    imageio.imwrite(path, frames.numpy(), duration=1000 / fps, loop=0)


def collapsed(indices, share=0.95):
    """Whether nearly all transitions have the same codes: indices (n, k). The limit is ours."""
    return (indices.unique(dim=0, return_counts=True)[1].max() / len(indices)).item() >= share


def cka(x, y):
    """Linear centred kernel alignment of features (n, p) and (n, q), in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414);
    0 if either is constant."""
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
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


def probe(z, actions, z_test, actions_test, steps=1000, batch=512):
    """Linear probe from latent to real actions (Table 1): one layer, L1 loss, 1000 steps of 512; R2 of least squares.

    Args:
        z, z_test: (n, d) frozen latent actions; actions, actions_test: (n, a).

    Returns:
        dict: `l1`, test loss of the probe; `l1_constant`, that of the constant predictor; `r2`, variance explained on
        test data by the least-squares probe, mean over action dimensions.
    """
    g = torch.Generator().manual_seed(0)
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
    residual = (ones(z_test / scale) @ fit - actions_test).pow(2).mean(0)
    return {"l1": (linear(z_test / scale) - actions_test).abs().mean().item(),
            "l1_constant": (actions_test - actions.median(0).values).abs().mean().item(),
            "r2": (1 - residual / actions_test.double().var(0)).mean().item()}


@torch.no_grad()
def infer(world, dataset, n, batch=64):
    """Latent actions of n held-out clips: z (n, t-1, k*d), codes (n, t-1), indices (n, t-1, k), and the data's own labels"""
    device, parts = next(world.parameters()).device, []
    for i in range(0, n, batch):
        data = dataset[range(i, min(i + batch, n))]
        z, indices, _ = world.lam.encode(to_video(data["video"], device))
        parts.append({"z": z.flatten(2).float().cpu(), "indices": indices.cpu(),
                      **{k: v for k, v in data.items() if k in ("actions", "effects")}})
    out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return out | {"codes": code_numbers(world, out["indices"])}


def code_numbers(world, indices):
    """The k codes of a transition as one number: (..., k) -> (...)"""
    return (indices * world.lam.cfg.num_codes ** torch.arange(indices.shape[-1], device=indices.device)).sum(-1)


@torch.no_grad()
def predict(world, dataset, n, steps=None, guidance=None, batch=64):
    """Dreams of held-out clips, frame by frame from one true frame (Table 2), under the same noise each time.

    Returns:
        dict of PSNRs over the generated frames only, mean over clips: `psnr` with inferred actions, `psnr_shuffled`
        with those of another clip of the source, `psnr_null` with zeros, `psnr_copy` of the first frame held still,
        `psnr_adapted`, if there is an adapter, with its codes for the true actions, `controllability` = psnr -
        psnr_shuffled; and the first videos [true, inferred, shuffled], each (n, 3, t, h, w).
    """
    device, rows, shown = next(world.parameters()).device, [], None
    for i in range(0, n, batch):
        data = dataset[range(i, min(i + batch, n))]
        video, fps = to_video(data["video"], device), data["fps"].to(device)
        z = world.lam.encode(video)[0]
        # the clip before it in the same source; alone in its source, a clip keeps its actions
        order = torch.argsort(data["source"], stable=True)
        other = torch.empty_like(order)
        for s in data["source"].unique():
            mine = order[data["source"][order] == s]
            other[mine] = mine.roll(1)
        dream = lambda a: world.rollout(video[:, :, :1], a, steps, guidance, fps, Draw(0, i, device=device))
        dreams = {"psnr": dream(z), "psnr_shuffled": dream(z[other]), "psnr_null": dream(torch.zeros_like(z)),
                  "psnr_copy": video[:, :, :1].expand_as(video)}
        if world.adapter and "actions" in data:
            codes = world.adapter(data["actions"].to(device)).argmax(-1)        # (b, t-1, k)
            dreams["psnr_adapted"] = dream(F.embedding(codes, world.lam.vq.codebook))
        rows.append({k: psnr(v[:, :, 1:], video[:, :, 1:]).cpu() for k, v in dreams.items()})
        shown = shown or [v.cpu() for v in (video, dreams["psnr"], dreams["psnr_shuffled"])]
    out = {k: torch.cat([r[k] for r in rows]).mean().item() for k in rows[0]}
    return out | {"controllability": out["psnr"] - out["psnr_shuffled"]}, shown


@torch.no_grad()
def loss_by_time(world, dataset, n, use_actions=True, bins=4):
    """Flow loss on held-out clips by flow time: {"loss_t0.00": ..., "loss_t0.25": ...}, and the mean as `loss`"""
    device = next(world.parameters()).device
    data = dataset[range(n)]
    _, out = world(to_video(data["video"], device), Draw(0, 1, device=device), data["fps"].to(device), use_actions)
    which = (out["clip_t"] * bins).long().clamp(max=bins - 1)
    result = {f"loss_t{k / bins:.2f}": out["clip_flow"][which == k].mean().item() for k in range(bins) if (which == k).any()}
    return {"loss": out["clip_flow"].mean().item(), **result}


@torch.no_grad()
def align(world, batch, known=None):
    """How well latent actions and generator fit each other, on a fixed batch of held-out clips; reviewers of the paper asked.

    Args:
        batch: clips; of each, as many frames are used as the generator sees at once.
        known: clips with discrete `effects`, or None.

    Returns:
        dict: `latent_var`, variance of the latent actions; `cka` of latent actions and what the action modules make of
        them; `sensitivity`, relative change of the predicted velocity at t = 1/2 (shifted) when clips swap their
        actions; `nmi` of codes and effects, if they are known and there are codes yet.
    """
    device, r = next(world.parameters()).device, world.vae.time_stride
    frames = 1 + world.cfg.window * r
    cut = lambda data: to_video(data["video"][:, :frames], device)
    video, fps = cut(batch), batch["fps"].to(device)
    actions, x0 = world.pack(world.lam.encode(video)[0]), world.vae.encode(video)
    b, c, l, h, w = x0.shape
    t = shift_time(0.5, time_ratio(world.cfg.time_shift, h * w * world.vae.pixel_stride ** 2, l))
    t = torch.full((b, l), t, device=device)
    t[:, 0] = 0
    mix = t[:, None, :, None, None]
    x = (1 - mix) * x0 + mix * Draw(0, 2, device=device)(torch.randn, *x0.shape)
    v, swapped = (world.dit(x, t, a, fps)[:, :, 1:].float() for a in (actions, actions.roll(1, 0)))
    features = world.dit.action.features(actions)[:, 1:]                        # (b, l-1, d)
    out = {"latent_var": actions.var((0, 1)).mean().item(), "cka": cka(actions.flatten(0, 1), features.flatten(0, 1)),
           "sensitivity": ((swapped - v).norm() / v.norm().clamp(min=1e-12)).item()}
    if known and world.lam.quantize:
        codes = code_numbers(world, world.lam.encode(cut(known))[1])
        out["nmi"] = nmi(codes.flatten().cpu(), known["effects"][:, :frames - 1].flatten())
    return out


def report(world, dataset, labelled=(), clips=64, transitions=2048, pairs=4096, **sampling):
    """Everything that a run measures on held-out clips.

    Args:
        dataset: held-out clips of the training mixture.
        clips: how many are dreamed; 0 (a LAM without a generator): none.
        labelled: (name, train dataset, held-out dataset) with true actions, for the probe; NMI where `effects` are known
            and actions are discrete.

    Returns:
        dict of numbers (None where the data do not allow one), and the videos of `predict`, or None.
    """
    out = dict.fromkeys(("utilization", "max_usage", "entropy"))
    if world.lam.quantize:
        found = infer(world, dataset, -(-transitions // (dataset.frames - 1)))
        out = codebook_metrics(found["indices"].flatten(0, 1)[:transitions], world.lam.cfg.num_codes)
    if clips:
        prediction, shown = predict(world, dataset, clips, **sampling)
        out |= prediction | loss_by_time(world, dataset, clips)
    else:
        out |= dict.fromkeys(("psnr", "psnr_shuffled", "psnr_null", "psnr_copy", "controllability"))
        shown = None
    probes, out["nmi"] = [], None
    for name, train, test in labelled:
        n = -(-pairs // (test.frames - 1))
        a, b = infer(world, train, n), infer(world, test, n)
        flat = lambda x: x.flatten(0, 1)
        row = probe(flat(a["z"]), flat(a["actions"]), flat(b["z"]), flat(b["actions"]))
        out |= {f"probe_{k}/{name}": v for k, v in row.items()}
        probes.append(row)
        if name == "cross" and world.lam.quantize:
            out["nmi"] = nmi(b["codes"].flatten(), b["effects"].flatten())
    for k in ("r2", "l1"):
        out[f"probe_{k}"] = float(np.mean([p[k] for p in probes])) if probes else None
    return out, shown
