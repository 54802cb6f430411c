"""Measures of latent actions and of the world they drive; training reports them from here.

    python evaluate.py --ckpt out/toy --task all            # Tables 1-3 and Figures 5-6 on a trained run
    python evaluate.py --compare out/toy out/two-stage      # two runs that were evaluated, side by side

Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import json
import math
import os
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

import toy
from data import TOY, DataError, Parser, clips, parse_source, sources, to_video
from checkpoint import load_checkpoint, restore
from flow import Draw, sample, shift_time, time_ratio
from lam import resize
from metrics import cka, codebook_metrics, frechet, nmi, paired_t, probe, psnr, ssim


class RandomFeatures(torch.nn.Module):
    """A 3-D convolutional network with fixed random weights (ours): features for `rfvd`, where FVD's network is not at hand."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        widths = [3, 32, 64]
        for i in range(2):
            self.register_buffer(f"w{i}", torch.randn(widths[i + 1], widths[i], 3, 3, 3, generator=g) / math.sqrt(widths[i] * 27 / 2))

    def forward(self, video):
        """(b, 3, t, h, w) in [-1, 1] -> (b, 64)"""
        for w in (self.w0, self.w1):
            video = F.relu(F.conv3d(video.float(), w, stride=(1, 2, 2), padding=1))
        return video.mean((2, 3, 4))


class I3D:
    """Features of FVD: the TorchScript I3D that StyleGAN-V's FVD uses (Skorokhodov et al. 2022), read from a file.

    Frames are resized to 224 x 224, bilinear, and kept in [-1, 1].
    """

    def __init__(self, path, device):
        self.net = torch.jit.load(path, map_location=device).eval()

    def __call__(self, video):
        """(b, 3, t, h, w) in [-1, 1], t >= 10 -> (b, 400)"""
        return self.net(resize(video.float(), 224), rescale=False, resize=False, return_features=True)


def save_gif(path, videos, fps=4, rows=4):
    """Videos [(n, 3, t, h, w) in [-1, 1], ...] side by side, one clip a row, as a GIF."""
    grid = torch.cat([torch.cat(list(F.pad(v[:rows], (1, 1, 1, 1), value=1.0)), 2) for v in videos], 3)  # (3, t, rows*h, n*w)
    scale = max(1, 128 // videos[0].shape[-1])
    frames = ((grid + 1) * 127.5).round().byte().permute(1, 2, 3, 0).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    imageio.imwrite(path, frames.numpy(), duration=1000 / fps, loop=0)


@torch.no_grad()
def infer(world, dataset, n, batch=64, start=0):
    """Latent actions of n clips from number `start` on: z (n, t-1, k*d), codes (n, t-1), indices (n, t-1, k), and the data's own labels"""
    device, parts = next(world.parameters()).device, []
    for i in range(start, start + n, batch):
        data = dataset[range(i, min(i + batch, start + n))]
        z, indices, _ = world.lam.encode(to_video(data["video"], device))
        parts.append({"z": z.flatten(2).float().cpu(), "indices": indices.cpu(),
                      **{k: v for k, v in data.items() if k in ("actions", "effects")}})
    out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return out | {"codes": code_numbers(world, out["indices"])}


def code_numbers(world, indices):
    """The k codes of a transition as one number: (..., k) -> (...)"""
    return (indices * world.lam.cfg.num_codes ** torch.arange(indices.shape[-1], device=indices.device)).sum(-1)


def fdm_rollout(world, video, z):
    """The FDM's own rollout, frame by frame from the first frame, at the LAM's resolution: (b, 3, t, size, size)"""
    frames = [resize(video[:, :, :1], world.lam.cfg.size)]
    for i in range(z.shape[1]):
        frames.append(world.lam.fdm(frames[-1], z[:, i:i + 1]).clamp(-1, 1))
    return torch.cat(frames, 2)


def dreams(world, data, variants, seed=0, steps=None, guidance=None):
    """Clips dreamed from their first frame, under the same noise each time (Table 2).

    Args:
        data: a batch of clips.
        variants: some of `inferred` actions; `shuffled`, those of another clip of the source; `null`, zeros; `copy`, the
            first frame held still; `whole`, inferred actions, but all frames of the clip at once; `fdm`, the FDM's own
            rollout; `adapted`, the adapter's codes for the true actions.

    Returns:
        the true video and a dict of videos (b, 3, t, h, w).
    """
    device = next(world.parameters()).device
    video, fps = to_video(data["video"], device), data["fps"].to(device)
    z = world.lam.encode(video)[0]
    # the clip before it in the same source; alone in its source, a clip keeps its actions
    order = torch.argsort(data["source"], stable=True)
    other = torch.empty_like(order)
    for s in data["source"].unique():
        mine = order[data["source"][order] == s]
        other[mine] = mine.roll(1)
    actions = {"inferred": z, "shuffled": z[other.to(device)], "null": torch.zeros_like(z)}
    if "adapted" in variants:
        actions["adapted"] = world.latent_actions(data["actions"].to(device))
    out = {}
    for v in variants:
        draw = Draw(seed, device=device)
        if v == "copy":
            out[v] = video[:, :, :1].expand_as(video)
        elif v == "fdm":
            out[v] = resize(fdm_rollout(world, video, z), video.shape[-1])
        elif v == "whole":
            first = world.vae.encode(video[:, :, :1])
            b, c, _, h, w = first.shape
            x = torch.cat([first, draw(torch.randn, b, c, world.vae.latent_frames(video.shape[2]) - 1, h, w)], 2)
            x = sample(world.dit, x, 1, world.pack(z), steps or world.cfg.sampling_steps, world.cfg.guidance if guidance is None else guidance,
                       world.cfg.time_shift, fps)
            out[v] = world.vae.decode(x, video.shape[2]).clamp(-1, 1)
        else:
            out[v] = world.rollout(video[:, :, :1], actions[v], steps, guidance, fps, draw)
    return video, out


@torch.no_grad()
def predict(world, dataset, n, variants=("inferred", "shuffled", "null", "copy"), measures={"psnr": psnr}, features={}, seed=0, batch=32, rank=0,
            ranks=1, **sampling):
    """Measure dreams of held-out clips, over the generated frames only. Ranks share the batches of clips.

    Args:
        measures: functions of two videos -> (b,). features: functions of a video -> (b, d), for Frechet distances.

    Returns:
        {variant: {measure: (n,) values of the clips}}, {variant or "true": {feature: (n, d)}}, and the first videos
        [true, first variant, second variant], each (b, 3, t, h, w), on the first rank.
    """
    parts, shown = [], None
    for i in range(rank * batch, n, ranks * batch):
        numbers = range(seed * n + i, seed * n + min(i + batch, n))             # a seed: other clips, other noise
        video, made = dreams(world, dataset[numbers], variants, seed * 1000003 + i, **sampling)
        shown = shown or [v.cpu() for v in [video, *made.values()][:3]]
        values = {v: {k: f(d[:, :, 1:], video[:, :, 1:]).cpu() for k, f in measures.items()} for v, d in made.items()}
        seen = {v: {k: f(d[:, :, 1:]).cpu() for k, f in features.items()} for v, d in {"true": video, **made}.items()}
        parts.append((i, values, seen))
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, parts)
        parts = sorted((p for mine in everyone for p in mine), key=lambda p: p[0])
    join = lambda at: {v: {k: torch.cat([p[at][v][k] for p in parts]) for k in row} for v, row in parts[0][at].items()}
    return join(1), join(2), shown


@torch.no_grad()
def loss_by_time(world, dataset, n, use_actions=True, bins=4):
    """Flow loss on held-out clips by flow time: {"loss_t0.00": ..., "loss_t0.25": ...}, and the mean as `loss`"""
    device, parts = next(world.parameters()).device, []
    for i in range(0, n, 64):
        data = dataset[range(i, min(i + 64, n))]
        out = world(to_video(data["video"], device), Draw(0, 1, i, device=device), data["fps"].to(device), use_actions)[1]
        parts.append((out["clip_t"], out["clip_flow"]))
    t, loss = map(torch.cat, zip(*parts))
    which = (t * bins).long().clamp(max=bins - 1)
    return {"loss": loss.mean().item()} | {f"loss_t{k / bins:.2f}": loss[which == k].mean().item() for k in range(bins) if (which == k).any()}


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
    shown, names = None, {"psnr": "inferred", "psnr_shuffled": "shuffled", "psnr_null": "null", "psnr_copy": "copy"}
    out |= dict.fromkeys([*names, "controllability"])
    if clips:
        if world.adapter and labelled:
            names["psnr_adapted"] = "adapted"
        values, _, shown = predict(world, dataset, clips, names.values(), **sampling)
        out |= {k: values[v]["psnr"].mean().item() for k, v in names.items()} | loss_by_time(world, dataset, clips)
        out["controllability"] = out["psnr"] - out["psnr_shuffled"]
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


# the command line -----------------------------------------------------------------------------------------------------


def optional(args, size, frames, device):
    """LPIPS and FVD where they can be computed, and why not where they cannot: measures, features, {column: reason}"""
    measures, features, why = {"psnr": psnr}, {"rfvd": RandomFeatures().to(device)}, {}
    if size < 11:
        why["ssim"] = f"frames of {size} pixels are smaller than its window of 11"
    else:
        measures["ssim"] = lambda a, b: 100 * ssim(a, b)
    if size < 32:
        why["lpips"] = f"frames of {size} pixels are too small for its network"
    else:
        try:
            import lpips
            net = lpips.LPIPS(net="alex", verbose=False).to(device)
            by_frame = lambda v: rearrange(v.float(), "b c t h w -> (b t) c h w")
            measures["lpips"] = lambda a, b: 100 * net(by_frame(a), by_frame(b)).view(len(a), -1).mean(1)
        except ImportError:
            why["lpips"] = "needs pip install lpips"
        except Exception as error:                              # its network's weights are downloaded
            why["lpips"] = f"its network could not be loaded ({str(error).splitlines()[0]})"
    if not args.i3d:
        why["fvd"] = "needs --i3d PATH, StyleGAN-V's I3D as TorchScript"
    elif frames < 11:
        why["fvd"] = f"needs clips of at least 11 frames, of which 10 are generated; these have {frames}"
    else:
        try:
            features["fvd"] = I3D(args.i3d, device)
        except Exception as error:                              # whatever a broken file makes torch raise
            raise ValueError(f"--i3d {args.i3d}: cannot be read as TorchScript ({str(error).splitlines()[0]})") from None
    return measures, features, why


def predict_rows(world, dataset, variants, args, measures, features, rank, ranks):
    """{variant: {column: [value of each seed]}} and the first videos of the first seed"""
    rows, shown = {v: {} for v in variants}, None
    for seed in args.seeds:
        values, seen, videos = predict(world, dataset, args.clips, variants, measures, features, seed, rank=rank, ranks=ranks,
                                       steps=args.sampling_steps, guidance=args.guidance)
        shown = shown or videos
        for v in variants:
            numbers = {k: x.mean().item() for k, x in values[v].items()} | {k: frechet(x, seen["true"][k]) for k, x in seen[v].items()}
            for k, x in numbers.items():
                rows[v].setdefault(k, []).append(x)
    if "shuffled" in variants:
        rows["inferred"]["controllability"] = [a - b for a, b in zip(rows["inferred"]["psnr"], rows["shuffled"]["psnr"])]
    return rows, shown


def probe_rows(world, train, test, args):
    """One row of Table 1: {column: [value of each seed]}; every seed has other clips"""
    n, flat, row = -(-args.transitions // (test.frames - 1)), lambda x: x.flatten(0, 1), {}
    for seed in args.seeds:
        a, b = infer(world, train, n, start=seed * n), infer(world, test, n, start=seed * n)
        x, y, x_test, y_test = flat(a["z"]), flat(a["actions"]), flat(b["z"]), flat(b["actions"])
        mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        numbers = probe(x, y, x_test, y_test, seed=seed) | {"l1_shuffled": probe(x[mixed], y, x_test, y_test, seed=seed)["l1"]}
        if world.lam.quantize and "effects" in b and toy.EMBODIMENTS[test.source].matrix is None:
            numbers["nmi"] = nmi(b["codes"].flatten(), b["effects"].flatten())
        for k, v in numbers.items():
            row.setdefault(k, []).append(v)
    return row


def table(title, rows):
    """Print {row: {column: [value of each seed]}} as mean +- standard deviation over seeds."""
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    cell = lambda v: "-" if not v else f"{np.mean(v):.3f}" + (f" +- {np.std(v, ddof=1):.3f}" if len(v) > 1 else "")
    lines = [[title, *columns]] + [[name, *(cell(row.get(k)) for k in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip())
    print(flush=True)


def save_results(out, ckpt, step, tables, protocol, more={}):
    """Write {task: {row: {column: [value of each seed]}}} to out/results.json, where other tasks of the same step stay."""
    results, file = {"ckpt": ckpt, "step": step, "tables": {}, "protocol": {}}, os.path.join(out, "results.json")
    if os.path.exists(file):
        with open(file) as f:
            old = json.load(f)
        results = old if old["step"] == step else results
    protocol = json.loads(json.dumps(protocol))
    for task, rows in tables.items():                           # and other rows that were measured alike
        alike = results["tables"].get(task, {}) if results["protocol"].get(task) == protocol else {}
        results["tables"][task], results["protocol"][task] = alike | rows, protocol
    with open(file + ".part", "w") as f:
        json.dump(results | more, f, indent=1)
    os.replace(file + ".part", file)


def compare(a, b):
    """Two runs, or two comma-separated sets of runs, side by side: a run's seeds, or the runs of a set, are the pairs."""
    def read(names):
        runs = []
        for name in names.split(","):
            try:
                with open(os.path.join(name, "results.json")) as f:
                    runs.append(json.load(f))
            except (OSError, ValueError):
                raise ValueError(f"--compare {name}: has no results.json; run --ckpt {name} first") from None
        flat = [{(task, row, k): v for task in run["tables"] for row, cells in run["tables"][task].items() for k, v in cells.items()} for run in runs]
        return flat[0] if len(runs) == 1 else {k: [float(np.mean(f[k])) for f in flat] for k in flat[0] if all(k in f for f in flat)}
    a, b = read(a), read(b)
    rows = {}
    for key in a:
        if key in b and len(a[key]) == len(b[key]):
            t, p = paired_t(a[key], b[key])
            rows[" ".join(key)] = {"A": a[key], "B": b[key], "A - B": [x - y for x, y in zip(a[key], b[key])], "t": [t] if t is not None else [],
                                   "p": [p] if p is not None else [], "n": [len(a[key])]}
    if not rows:
        raise ValueError("--compare: the two have no measure with the same number of seeds in common")
    table("paired", rows)


def adapted(args, config):
    """Folder of the run adapted from --ckpt to --adapt_data; made by train.py if there is none, or gone on with if it was stopped."""
    out = os.path.normpath(args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt))
    name = f"{os.path.basename(out)}-{parse_source(args.adapt_data)[0]}"
    target = os.path.join(os.path.dirname(out), name)
    log, flags = os.path.join(target, "metrics.jsonl"), [f"--resume={target}"]
    if not os.path.exists(log) or '"event": "result"' not in open(log).read():
        if not os.path.exists(os.path.join(target, "ckpt.pt")):
            skip = ("name", "preset", "mode", "data", "init", "init_lam", "dit_weights", "resume", "freeze_lam", "dry_run", "batch")
            flags = [f"--{k}={v}" for k, v in (config | {"eval_clips": 1, "eval_transitions": 64}).items() if k not in skip]
            flags += ["--mode=adapt", f"--init={args.ckpt}", f"--data={args.adapt_data}", f"--name={name}"]
        print(f"adapts to {args.adapt_data}: train.py --mode adapt --init {args.ckpt} --data {args.adapt_data} --name {name}", flush=True)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        done = subprocess.run([sys.executable, script, *flags], cwd=os.path.dirname(os.path.dirname(os.path.abspath(out))),
                              stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=alone)
        if done.returncode:
            raise ValueError(f"adaptation failed: {done.stderr.strip().splitlines()[-1]}")
    return target


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder or checkpoint")
    add("--task", default="all", choices=("probe", "predict", "adapt", "codebook", "transfer", "all"))
    add("--data", nargs="+", help="sources to measure on, a row each (toy: every robot and the held-out one; else the run's own)")
    add("--adapt_data", help="source with actions to adapt to (toy: held-out)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a seed has clips, noise and probe of its own")
    add("--clips", type=int, default=64, help="dreamed clips a source and seed (the paper: 1920)")
    add("--transitions", type=int, default=20000, help="held-out transitions of the probe, and of the codebook a tenth")
    add("--sampling_steps", type=int, help="Euler steps (as trained)")
    add("--guidance", type=float, help="guidance scale (as trained)")
    add("--i3d", help="FVD's network: StyleGAN-V's I3D as TorchScript")
    add("--vae_weights", help="where Open-Sora's VAE lies now")
    add("--out", help="folder of results.json and samples (the run's)")
    add("--compare", nargs=2, metavar=("A", "B"), help="two evaluated runs, or comma-separated sets of them")
    args = parser.parse_args(argv)
    if not (args.ckpt or args.compare):
        parser.error("--ckpt: which run?")
    for k in ("clips", "transitions", "sampling_steps"):
        if getattr(args, k) is not None and getattr(args, k) < 2 - (k == "sampling_steps"):
            parser.error(f"--{k} {getattr(args, k)}: too few")
    return args


def main(argv):
    args = parse(argv)
    if args.compare:
        return compare(*args.compare)
    rank, ranks, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    state = load_checkpoint(args.ckpt)
    config, world = state["config"], restore(state, args.vae_weights).to(device).eval()
    known = config["data"] in TOY
    names = args.data or (list(toy.EMBODIMENTS) if known else sources(config["data"]))
    open_clips = lambda name, split: clips([name], config["size"], config["eval_frames"], config["seed"], split)
    heldout = {name: open_clips(name, "heldout") for name in names}
    labelled = [name for name in names if heldout[name].labelled]
    args.adapt_data = args.adapt_data or (config["data"] if world.adapter or not labelled else "held-out" if known else labelled[0])
    wants = lambda task: args.task in (task, "all")
    measures, features, why = optional(args, config["size"], config["eval_frames"], device)
    if args.clips < 64 and rank == 0 and (wants("predict") or wants("adapt")):
        print(f"warning: {args.clips} clips are fewer than the 64 features of rfvd; its covariance is singular", file=sys.stderr)
    if ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    out = args.out or (args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt) or ".")
    tables, pictures = {}, os.path.join(out, "samples")
    os.makedirs(pictures, exist_ok=True)

    def show(task, rows):
        tables[task] = rows
        if rank == 0:
            table(task, rows)

    if wants("probe") and rank == 0:
        rows = {parse_source(name)[0]: probe_rows(world, open_clips(name, "train"), heldout[name], args) for name in labelled}
        if rows:
            show("probe", rows)
        else:
            why["probe"] = "no source has actions"
    if wants("predict"):
        variants = ["inferred", "shuffled", "null", "copy", "whole"] + ["fdm"] * bool(world.lam.fdm)
        rows = {}
        for name, data in heldout.items():
            made, videos = predict_rows(world, data, variants, args, measures, features, rank, ranks)
            rows |= {f"{parse_source(name)[0]} {v}": row for v, row in made.items()}
            if videos and rank == 0:
                save_gif(os.path.join(pictures, f"predict-{parse_source(name)[0]}.gif"), videos)
        show("predict", rows)
    usage = {}
    if (wants("codebook") or wants("transfer")) and not world.lam.quantize:
        raise ValueError(f"{args.ckpt}: its latent actions are still continuous")
    if wants("codebook") and rank == 0:
        count = lambda data, n: infer(world, data, -(-n // (data.frames - 1)))["indices"].flatten(0, 1)
        usage["training"] = count(clips(config["data"], config["size"], config["eval_frames"], config["seed"]), args.transitions // 10)
        usage |= {f"inferred, {parse_source(name)[0]}": count(data, args.transitions // 10) for name, data in heldout.items()}
    if wants("adapt") or (wants("codebook") and world.adapter):
        if world.adapter:
            tuned, data = world, open_clips(args.adapt_data, "heldout")
        else:
            target = adapted(args, config) if rank == 0 else None
            if ranks > 1:
                target = [target]
                dist.broadcast_object_list(target)
                target = target[0]
            tuned, data = restore(load_checkpoint(target), args.vae_weights).to(device).eval(), open_clips(args.adapt_data, "heldout")
        dims = data[[0]]["actions"].shape[-1] if data.labelled else 0
        if dims != tuned.adapter.action_dim:
            raise ValueError(f"--adapt_data {args.adapt_data}: its actions have {dims} dimensions, the adapter takes {tuned.adapter.action_dim}")
        found = infer(tuned, data, -(-args.transitions // 10 // (data.frames - 1)))
        with torch.no_grad():
            guess = tuned.adapter(found["actions"].to(device)).argmax(-1).cpu()
        usage["adapter, " + parse_source(args.adapt_data)[0]] = guess.flatten(0, 1)
        if wants("adapt"):
            rows, _ = predict_rows(tuned, data, ["inferred", "adapted", "copy"], args, measures, features, rank, ranks)
            rows["adapted"] |= {"code_accuracy": [(guess == found["indices"]).float().mean().item()]}
            show("adapt", rows)
    if wants("codebook") and rank == 0:
        show("codebook", {name: {k: [v] for k, v in codebook_metrics(x, world.lam.cfg.num_codes).items()} for name, x in usage.items()})
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
            figure, axes = plt.subplots(len(usage), 1, figsize=(6, 1.5 * len(usage)), sharex=True, layout="constrained")
            for axis, (name, x) in zip(np.atleast_1d(axes), usage.items()):
                axis.bar(range(world.lam.cfg.num_codes), torch.bincount(x.flatten(), minlength=world.lam.cfg.num_codes) / x.numel())
                axis.set_title(name, fontsize=9)
            axes[-1].set_xlabel("code"), figure.supylabel("share")
            figure.savefig(os.path.join(pictures, "codebook.png"), dpi=100)
        except ImportError:
            why["codebook.png"] = "needs pip install matplotlib"
    if wants("transfer") and rank == 0:
        names = list(heldout)
        # other clips than the donor's: toy robots share worlds and moves clip by clip
        donor, other = (to_video(heldout[n][range(i, i + 4)]["video"], device) for n, i in ((names[0], 0), (names[-1], 4)))
        with torch.no_grad():
            z = world.lam.encode(donor)[0]
            made = [world.rollout(v[:, :, :1], z, args.sampling_steps, args.guidance, draw=Draw(0, device=device)) for v in (donor, other)]
        save_gif(os.path.join(pictures, "transfer.gif"), [v.cpu() for v in (donor, *made)])
    if rank == 0:
        if wants("predict") or wants("adapt"):
            for column in ("ssim", "lpips", "fvd"):
                if column in why:
                    print(f"{column}: not computed; {why[column]}")
        protocol = {"clips": args.clips, "frames": config["eval_frames"], "generated": config["eval_frames"] - 1, "size": config["size"],
                    "transitions": args.transitions, "seeds": args.seeds, "sampling_steps": args.sampling_steps or world.cfg.sampling_steps,
                    "guidance": world.cfg.guidance if args.guidance is None else args.guidance, "lpips": "alex, x100", "ssim": "x100",
                    "rfvd": "random 3-D conv net of 64 features, not FVD"}
        print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()))
        save_results(out, args.ckpt, state["step"], tables, protocol, {"not_computed": why})
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: {error}")
