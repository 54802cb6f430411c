"""Measures of latent actions and of the world they drive; training reports them from here.

Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import numpy as np
import torch

from data import to_video
from flow import Draw
from vq import codebook_metrics

PSNR_CAP = 60.0     # dB, about the rounding error of 8-bit pixels: keeps frames that are equal from counting as infinite


def psnr(a, b):
    """Peak signal-to-noise ratio of videos (b, c, t, h, w) in [-1, 1] (range 2), mean over frames: (b,) dB"""
    mse = (a - b).float().pow(2).mean((1, 3, 4))                                # (b, t)
    return (10 * torch.log10(4 / mse.clamp(min=1e-12))).clamp(max=PSNR_CAP).mean(1)


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
    base = world.lam.cfg.num_codes ** torch.arange(out["indices"].shape[-1])
    return out | {"codes": (out["indices"] * base).sum(-1)}


@torch.no_grad()
def predict(world, dataset, n, steps=None, guidance=None, batch=64):
    """Dreams of held-out clips, frame by frame from one true frame (Table 2), under the same noise each time.

    Returns:
        dict of PSNRs over the generated frames only, mean over clips: `psnr` with inferred actions, `psnr_shuffled`
        with those of another clip of the source, `psnr_null` with zeros, `psnr_copy` of the first frame held still,
        `controllability` = psnr - psnr_shuffled; and the first videos [true, inferred, shuffled], each (n, 3, t, h, w).
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


def report(world, dataset, labelled=(), clips=64, transitions=2048, pairs=4096, **sampling):
    """Everything that a run measures on held-out clips.

    Args:
        dataset: held-out clips of the training mixture.
        labelled: (name, train dataset, held-out dataset) with true actions, for the probe; NMI where `effects` are known
            and actions are discrete.

    Returns:
        dict of numbers (None where the data do not allow one), and the videos of `predict`.
    """
    found = infer(world, dataset, -(-transitions // (dataset.frames - 1)))
    out = codebook_metrics(found["indices"].flatten(0, 1)[:transitions], world.lam.cfg.num_codes)
    prediction, shown = predict(world, dataset, clips, **sampling)
    out |= prediction | loss_by_time(world, dataset, clips)
    probes, out["nmi"] = [], None
    for name, train, test in labelled:
        n = -(-pairs // (test.frames - 1))
        a, b = infer(world, train, n), infer(world, test, n)
        flat = lambda x: x.flatten(0, 1)
        row = probe(flat(a["z"]), flat(a["actions"]), flat(b["z"]), flat(b["actions"]))
        out |= {f"probe_{k}/{name}": v for k, v in row.items()}
        probes.append(row)
        if name == "cross":
            out["nmi"] = nmi(b["codes"].flatten(), b["effects"].flatten())
    for k in ("r2", "l1"):
        out[f"probe_{k}"] = float(np.mean([p[k] for p in probes])) if probes else None
    return out, shown
