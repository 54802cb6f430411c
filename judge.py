"""What a World is worth on held-out clips: its latent actions, its dreams, how well its parts fit each other.

Training reports from here, and evaluate.py makes the paper's tables of it. A dream stands beside its
controls: with another clip's actions, with none, and the first frame held still.

Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import warnings

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

import toy
from data import another, to_video
from flow import Draw, sample, shift_time, time_ratio
from formats import UserError, first_line, optional, whole
from lam import resize
from metrics import cka, codebook_metrics, joint_codes, nmi, probe, psnr, ssim


class Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) with AlexNet, times 100, mean over frames."""

    def __init__(self, device):
        try:
            package = optional("lpips")
        except RuntimeError:
            # PyPI's torchvision is built for CUDA: beside a CPU build of torch its import fails for want of
            # two operators, which LPIPS does not use
            for name in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", signature)
            package = optional("lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # it calls torchvision in an older way
            self.net = package.LPIPS(net="alex", verbose=False).to(device)

    def __call__(self, a, b):
        """Videos (b, 3, t, h, w) in [-1, 1] -> (b,)"""
        a_frames, b_frames = (rearrange(v.float(), "b c t h w -> (b t) c h w") for v in (a, b))
        return 100 * self.net(a_frames, b_frames).view(len(a), -1).mean(1)


class I3D:
    """Features of FVD: the I3D of StyleGAN-V's FVD (Skorokhodov et al. 2022), from a file of TorchScript."""

    def __init__(self, path, device):
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
        except Exception as error:                              # whatever a broken file makes torch raise
            raise UserError(f"--i3d {path}: cannot be read as TorchScript ({first_line(error)})") from None

    def __call__(self, video):
        """(b, 3, t, h, w) in [-1, 1], t >= 10, resized to 224 x 224 -> (b, 400)"""
        return self.net(resize(video.float(), 224), rescale=False, resize=False, return_features=True)


def video_measures(size, frames, device, i3d=None):
    """What can be measured here of videos of so many pixels and frames, and why the rest cannot.

    Returns {column: function of two videos -> (b,)}, {column: function of a video -> (b, d), features for
    the Frechet distance} and {column: why it is not computed}. Raises UserError if i3d, the file of FVD's
    network, is not TorchScript.
    """
    measures, features, why = {"psnr": psnr}, {}, {}
    if size < 11:
        why["ssim"] = f"frames of {size} pixels are smaller than its window of 11"
    else:
        measures["ssim"] = lambda a, b: 100 * ssim(a, b)
    if size < 32:
        why["lpips"] = f"frames of {size} pixels are too small for its network"
    else:
        try:
            measures["lpips"] = Lpips(device)
        except UserError as error:
            why["lpips"] = str(error)
        except Exception as error:                              # its network's weights are downloaded
            why["lpips"] = f"its network could not be loaded ({first_line(error)})"
    if not i3d:
        why["fvd"] = "needs --i3d PATH, StyleGAN-V's I3D as TorchScript"
    elif frames < 11:
        why["fvd"] = f"needs clips of at least 11 frames, of which 10 are generated; these have {frames}"
    else:
        features["fvd"] = I3D(i3d, device)
    return measures, features, why


def save_gif(path, videos, fps=4, rows=4):
    """Videos [(n, 3, t, h, w) in [-1, 1], ...] side by side, one clip a row, as a GIF."""
    framed = [F.pad(video[:rows], (1, 1, 1, 1), value=1.0) for video in videos]
    grid = rearrange(framed, "v n c t h w -> t (n h) (v w) c")
    pixels = ((grid + 1) * 127.5).round().byte()
    scale = max(1, 128 // videos[0].shape[-1])
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    # in memory first: where the disk is full, imageio's writer would complain twice
    gif = imageio.imwrite("<bytes>", pixels.numpy(), extension=".gif", duration=1000 / fps, loop=0)
    with whole(path) as part, open(part, "wb") as f:
        f.write(gif)


@torch.no_grad()
def infer(world, dataset, at_least, part=0, batch=64):
    """Latent actions of as many clips as hold so many transitions, a row each; another part has other clips.

    Returns tensors on the CPU: `z` (n, k*d), `indices` (n, k); of the data `actions` (n, a) and `effects`
    (n,), where they are known.
    """
    device, parts = next(world.parameters()).device, []
    n = max(1, -(-at_least // (dataset.frames - 1)))            # clips
    for i in range(part * n, (part + 1) * n, batch):
        data = dataset[range(i, min(i + batch, (part + 1) * n))]
        z, indices, _ = world.lam.encode(to_video(data["video"], device))
        if not z.isfinite().all():
            raise UserError("latent actions are not finite numbers: the run has diverged; try a lower --lr")
        found = {"z": z.flatten(2).float().cpu(), "indices": indices.cpu()}
        parts.append(found | {k: data[k] for k in ("actions", "effects") if k in data})
    return {k: torch.cat([found[k] for found in parts]).flatten(0, 1) for k in parts[0]}


def probe_source(world, train, test, pairs, seed=0, shuffled=False):
    """What latent actions tell of true ones: metrics.probe's numbers, and `nmi` for a toy of discrete moves.

    Args:
        train, test: clips of one source. pairs: transitions of each, at least.
        seed: of the probe; another one has other clips.
        shuffled: also probe latent actions of other transitions, as `l1_shuffled`.
    """
    a, b = infer(world, train, pairs, seed), infer(world, test, pairs, seed)
    with torch.autocast("cpu", enabled=False):                  # --precision is of the models
        out = probe(a["z"], a["actions"], b["z"], b["actions"], seed=seed)
        if shuffled:
            z = a["z"][torch.randperm(len(a["z"]), generator=torch.Generator().manual_seed(seed))]
            out["l1_shuffled"] = probe(z, a["actions"], b["z"], b["actions"], seed=seed)["l1"]
    if world.lam.quantize and "effects" in b and toy.EMBODIMENTS[test.source].matrix is None:
        out["nmi"] = nmi(joint_codes(b["indices"]), b["effects"])
    return out


@torch.no_grad()
def reconstruct(vae, dataset, n, batch=16):
    """PSNR, SSIM (x100) of n held-out clips as the VAE decodes them, and the first [clips, decoded]"""
    device, scores, shown = next(vae.parameters()).device, [], None
    for i in range(0, n, batch):
        video = to_video(dataset[range(i, min(i + batch, n))]["video"], device)
        decoded = vae.decode(vae.encode(video), video.shape[2]).clamp(-1, 1)
        shown = shown or [video.cpu(), decoded.cpu()]
        too_small = video.shape[-1] < 11                        # for SSIM's window
        scores.append([psnr(decoded, video)] + ([] if too_small else [100 * ssim(decoded, video)]))
    of_vae = [torch.cat(values).mean().item() for values in zip(*scores)]
    return dict.fromkeys(RESULTS) | dict(zip(("psnr_vae", "ssim_vae"), of_vae)), shown


def fdm_rollout(world, video, z):
    """The FDM's own rollout from the first frame, at the LAM's resolution: (b, 3, t, size, size)"""
    frames = [resize(video[:, :, :1], world.lam.cfg.size)]
    for i in range(z.shape[1]):
        frames.append(world.lam.fdm(frames[-1], z[:, i:i + 1]).clamp(-1, 1))
    return torch.cat(frames, 2)


def whole_rollout(world, video, z, fps, draw, steps=None, guidance=None):
    """All frames of the clip dreamed at once from the first, not one after the other: (b, 3, t, h, w)"""
    steps = world.cfg.sampling_steps if steps is None else steps
    guidance = world.cfg.guidance if guidance is None else guidance
    first = world.vae.encode(video[:, :, :1])
    b, c, _, h, w = first.shape
    noise = draw(torch.randn, b, c, world.vae.latent_frames(video.shape[2]) - 1, h, w)
    x = torch.cat([first, noise], 2)                                            # (b, c, l, h, w)
    x = sample(world.dit, x, 1, world.pack(z), steps, guidance, world.cfg.time_shift, fps)
    return world.vae.decode(x, video.shape[2]).clamp(-1, 1)


def dreams(world, data, variants, others=None, seed=0, steps=None, guidance=None):
    """Clips dreamed from their first frame, under the same noise each time (Table 2).

    Args:
        variants: some of `inferred` actions (the true ones where those drive the world); `shuffled`, those of
            `others`, as many clips; `null`, zeros; `copy`, the first frame held still, as the VAE decodes it;
            `whole`, inferred actions, but all frames of the clip at once; `fdm`, the FDM's own rollout;
            `adapted`, the adapter's codes for the true actions.
        steps, guidance: sampling settings; None: the world's own.

    Returns the true video (b, 3, t, h, w) and {variant: such a video}.
    """
    device = next(world.parameters()).device
    video, fps = to_video(data["video"], device), data["fps"].to(device)
    z = world.encode(video, data.get("actions"))[0]                             # (b, t-1, k, d)
    actions = {"inferred": z, "null": torch.zeros_like(z)}
    if "shuffled" in variants:
        actions["shuffled"] = world.encode(to_video(others["video"], device), others.get("actions"))[0]
    if "adapted" in variants:
        actions["adapted"] = world.latent_actions(data["actions"].to(device))
    out = {}
    for variant in variants:
        draw = Draw(seed, device=device)                        # the same noise for all
        if variant == "copy":                                   # as the VAE decodes it
            first = world.vae.decode(world.vae.encode(video[:, :, :1]), 1)
            out[variant] = first.expand_as(video)
        elif variant == "fdm":
            out[variant] = resize(fdm_rollout(world, video, z), video.shape[-1])
        elif variant == "whole":
            out[variant] = whole_rollout(world, video, z, fps, draw, steps, guidance)
        else:
            out[variant] = world.rollout(video[:, :, :1], actions[variant], steps, guidance, fps, draw)
    return video, out


@torch.no_grad()
def predict(world, dataset, n, variants=("inferred", "shuffled", "null", "copy"), measures={"psnr": psnr},
            features={}, seed=0, batch=32, rank=0, ranks=1, **sampling):
    """Measure dreams of n held-out clips, over the generated frames only. Ranks share the batches of clips.

    Args:
        variants, sampling: as for `dreams`; shuffled actions are those of `data.another` clip.
        measures: functions of two videos -> (b,). features: functions of a video -> (b, d).
        seed: another one has other clips and other noise.

    Returns {variant: {measure: (n,) values of the clips}}, {variant or "true": {feature: (n, d)}}, and the
    first videos [true, first variant, second variant], each (b, 3, t, h, w), on the first rank.
    """
    parts, shown = {}, None                                     # by the number of their first clip
    for i in range(rank * batch, n, ranks * batch):
        numbers = range(seed * n + i, seed * n + min(i + batch, n))
        others = dataset[[another(dataset, j) for j in numbers]] if "shuffled" in variants else None
        video, made = dreams(world, dataset[numbers], variants, others, seed * 1000003 + i, **sampling)
        if shown is None:
            shown = [v.cpu() for v in [video, *made.values()][:3]]
        true = video[:, :, 1:]                                  # the first frame is given
        new = {variant: v[:, :, 1:] for variant, v in made.items()}
        with torch.autocast(true.device.type, enabled=False):   # --precision is of the models
            values = {variant: {k: f(v, true).cpu() for k, f in measures.items()}
                      for variant, v in new.items()}
            new["true"] = true
            seen = {variant: {k: f(v).cpu() for k, f in features.items()} for variant, v in new.items()}
        parts[i] = values, seen
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, parts)
        parts = {i: part for mine in everyone for i, part in mine.items()}
    values, seen = zip(*(parts[i] for i in sorted(parts)))
    return join(values), join(seen), shown


def join(parts):
    """[{variant: {key: (b, ...)}}, ...] -> {variant: {key: (n, ...)}}"""
    return {variant: {k: torch.cat([part[variant][k] for part in parts]) for k in row}
            for variant, row in parts[0].items()}


def as_trained(world, data):
    """Clips, as many frames of each as the generator sees at once: video (b, 3, t, h, w), fps (b,), and the
    true actions (b, t-1, a) if those drive it."""
    device, frames = next(world.parameters()).device, 1 + world.cfg.window * world.vae.time_stride
    known = world.true_actions and "actions" in data
    real = data["actions"][:, :frames - 1] if known else None
    return to_video(data["video"][:, :frames], device), data["fps"].to(device), real


@torch.no_grad()
def loss_by_time(world, dataset, n, use_actions=True, bins=4, seed=0):
    """Flow loss on held-out clips by flow time: {"loss_t0.00": ..., "loss_t0.25": ...}, its mean as `loss`

    As in training, but for dropped actions: the clips are as long, and the context is drawn.
    """
    parts = []
    for i in range(0, n, 64):
        video, fps, real = as_trained(world, dataset[range(seed * n + i, seed * n + min(i + 64, n))])
        found = world(video, Draw(seed, 1, i, device=video.device), fps, use_actions, real=real)[1]
        parts.append((found["clip_t"], found["clip_flow"]))
    t, loss = (torch.cat(part) for part in zip(*parts))                         # (n,) each
    in_bin = (t * bins).long().clamp(max=bins - 1)
    out = {"loss": loss.mean().item()}
    for k in range(bins):
        if (in_bin == k).any():
            out[f"loss_t{k / bins:.2f}"] = loss[in_bin == k].mean().item()
    return out


def clips_to_align(world, size, frames):
    """How many clips `align` is to get: 256 transitions, as far as they are 2^15 tokens, but at least 8."""
    tokens = world.vae.latent_frames(frames) * (size // world.vae.pixel_stride // world.dit.cfg.patch) ** 2
    return max(8, min(256 // (frames - 1), 2 ** 15 // tokens))


@torch.no_grad()
def align(world, batch, known=None):
    """How well latent actions and generator fit each other, on held-out clips; reviewers of the paper asked.

    Args:
        batch: clips, of which `as_trained` is used.
        known: clips with discrete `effects`, or None.

    Returns `latent_var`, variance of the latent actions; `cka` of latent actions and what the action modules
    make of them; `sensitivity`, relative change of the predicted velocity at t = 1/2 (shifted) when clips
    swap their actions, of the first 64; `nmi` of codes and effects, if they are known and there are codes.
    """
    video, fps, real = as_trained(world, batch)
    device, frames = video.device, video.shape[2]
    actions, x0 = world.pack(world.encode(video, real)[0]), world.vae.encode(video[:64])
    b, c, l, h, w = x0.shape
    t = shift_time(0.5, time_ratio(world.cfg.time_shift, h * w * world.vae.pixel_stride ** 2, l))
    t = torch.full((b, l), t, device=device)
    t[:, 0] = 0
    mix = t[:, None, :, None, None]
    x = (1 - mix) * x0 + mix * Draw(0, 2, device=device)(torch.randn, *x0.shape)
    moves = actions[:b]
    v, swapped = (world.dit(x, t, a, fps[:b])[:, :, 1:].float() for a in (moves, moves.roll(1, 0)))
    features = world.dit.action.features(actions)[:, 1:]                        # (b, l-1, d)
    out = {
        "latent_var": actions.var((0, 1)).mean().item(),
        "cka": cka(actions.flatten(0, 1), features.flatten(0, 1)),
        "sensitivity": ((swapped - v).norm() / v.norm().clamp(min=1e-12)).item(),
    }
    if known and world.lam.quantize:
        indices = world.lam.encode(as_trained(world, known)[0])[1]
        codes = joint_codes(indices.flatten(0, 1).cpu())
        out["nmi"] = nmi(codes, known["effects"][:, :frames - 1].flatten())
    return out


DREAMED = {"psnr": "inferred", "psnr_shuffled": "shuffled", "psnr_null": "null", "psnr_copy": "copy"}
# what a result always has; None where it cannot be measured
RESULTS = ("utilization", "max_usage", "entropy", *DREAMED, "controllability", "nmi", "probe_r2", "probe_l1")


def report(world, dataset, labelled, clips, transitions, pairs):
    """Everything that a run measures: numbers (None where the data allow none), and the videos of `predict`.

    Args:
        dataset: held-out clips. labelled: (name, train, held-out clips) with true actions, for the probe.
        clips: how many are dreamed; 0 (a LAM without a generator): none.
        transitions, pairs: how many of the codebook, and of the probe a source.
    """
    out, shown = dict.fromkeys(RESULTS), None
    if world.lam.quantize:
        indices = infer(world, dataset, transitions)["indices"]     # (n, k)
        out |= codebook_metrics(indices[:transitions], world.lam.cfg.num_codes)
    if clips:
        adapted = world.adapter and labelled and not world.true_actions
        variants = DREAMED | ({"psnr_adapted": "adapted"} if adapted else {})
        values, _, shown = predict(world, dataset, clips, variants.values())
        out |= {k: values[variant]["psnr"].mean().item() for k, variant in variants.items()}
        out |= loss_by_time(world, dataset, clips)
        out["controllability"] = out["psnr"] - out["psnr_shuffled"]
    probed = [] if world.true_actions else labelled
    rows = {name: probe_source(world, train, test, pairs) for name, train, test in probed}
    for name, row in rows.items():
        out["nmi"] = row.pop("nmi", out["nmi"])
        out |= {f"probe_{k}/{name}": v for k, v in row.items()}
    for k in ("r2", "l1") if rows else ():
        out[f"probe_{k}"] = float(np.mean([row[k] for row in rows.values()]))
    return out, shown
