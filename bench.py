"""How fast it is, each number as a ratio or as a share of what the machine can do.

    python bench.py                                         # the tiny preset, on whatever device there is
    python bench.py --preset small opensora --compile --json bench.json

Training is counted in FLOPs of matrix products, convolutions and attention, forward and backward, as torch's FlopCounterMode
counts them (what the method needs: recomputed activations are left out), and divided by the rate of one large matrix product
on the same machine in the same precision.
"""

import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import av
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import plan
from checkpoint import build
from config import PRESETS, parse
from flow import Draw, sample
from lam import Adapter
from transformer import KVCache


def seconds(f, device, repeat=5):
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product, the best of a few sizes"""
    rates = []
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n ** 3 / seconds(lambda: a @ b, device, 10))
    return max(rates)


def training(world, cfg, batch, device, autocast):
    """Seconds and FLOPs of an end-to-end step"""
    optimizer = torch.optim.AdamW(world.parameters(), cfg.lr, fused=device.type == "cuda" or None)    # as in train.py
    video = torch.rand(batch, 3, cfg.frames, cfg.size, cfg.size, device=device) * 2 - 1
    latents = None
    if world.vae.time_stride > 1:               # as with --latent_cache
        latents = torch.randn(batch, world.vae.channels, world.vae.latent_frames(cfg.frames), cfg.size // 8, cfg.size // 8, device=device)
    fps = torch.full((batch,), 24.0, device=device)

    def step():
        with autocast:
            loss = world(video, Draw(0, device=device), fps, latents=latents)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), cfg.clip)
        optimizer.step(), optimizer.zero_grad()

    world.train()
    with FlopCounterMode(display=False) as counter:
        step()
    if cfg.compile:
        world.dit.compile()
    took = seconds(step, device)
    world.eval()
    return took, counter.get_total_flops()


@torch.no_grad()
def frame_times(world, cfg, batch, device, autocast, history=16):
    """Seconds for one new latent frame after 2, 4, .. `history` others: {frames: (with cache, without)}"""
    side, fps = cfg.size // world.vae.pixel_stride, torch.full((batch,), 24.0, device=device)
    steps, shift, out = world.cfg.sampling_steps, world.cfg.time_shift, {}
    for n in (k for k in (2, 4, 8, 16, 32) if k <= history):
        past = torch.randn(batch, world.vae.channels, n, side, side, device=device)
        actions, new = torch.randn(batch, n, world.dit.cfg.action_dim, device=device), torch.randn_like(past[:, :, :1])
        cache = KVCache()
        with autocast:
            world.dit(past[:, :, :-1], past.new_zeros(batch, n - 1), actions[:, :n - 2], fps, cache)
            held, frames = cache.past, cache.frames

            def cached():                       # the last frame joins the past, the new one is denoised
                cache.past, cache.frames, cache.append = dict(held), frames, True
                world.dit(past[:, :, -1:], past.new_zeros(batch, 1), actions[:, :n - 1], fps, cache)
                cache.append = False
                sample(world.dit, new, 0, actions, steps, 1.0, shift, fps, cache)

            plain = lambda: sample(world.dit, torch.cat([past, new], 2), n, actions, steps, 1.0, shift, fps)
            out[n] = seconds(cached, device, 7), seconds(plain, device, 3)
    return out


@torch.no_grad()
def planning(world, cfg, device, autocast, samples, horizon=10, alone=5):
    """Seconds to dream all candidates of a plan together, and one by one (of which a few are timed)"""
    world.adapter = Adapter(4, world.lam.cfg).to(device)
    frames, actions = np.random.default_rng(0).integers(0, 255, (1, cfg.size, cfg.size, 3), np.uint8), torch.randn(samples, horizon, 4, device=device)
    go = lambda a: plan.dream(world, frames, torch.zeros(0, 4, device=device), a, 0, 24, 1, 3, 1.0)
    with autocast:
        together, single = seconds(lambda: go(actions), device, 2), seconds(lambda: [go(a) for a in actions[:alone].split(1)], device, 2)
    return together, single / min(alone, samples) * samples


def decoding(frames=3000, h=144, w=256, clip=8, draws=8):
    """Clips a second drawn from a two-minute video, by seeking and from the start"""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "film.mp4")
        picture = np.random.default_rng(0).integers(0, 255, (h // 4, w // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        with av.open(file, "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width = h, w
            for i in range(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(picture, 3 * i, 1))))
            container.mux(stream.encode(None))
        info, cpu = data.inspect_video(file), torch.device("cpu")
        starts = np.random.default_rng(1).integers(0, frames - clip, draws)
        go = lambda seek: [data.read_video(file, info, s + np.arange(clip), seek) for s in starts]
        return draws / seconds(lambda: go(True), cpu, 2), draws / seconds(lambda: go(False), cpu, 1)


def main(argv):
    parser = data.Parser(__doc__)
    parser.add_argument("--preset", nargs="+", default=["tiny"], choices=PRESETS)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py over the preset, such as hidden=384")
    parser.add_argument("--batch", type=int, help="clips a training step (the preset's)")
    parser.add_argument("--samples", type=int, default=200, help="candidates of a plan")
    parser.add_argument("--compile", action="store_true", help="torch.compile the DiT in training")
    parser.add_argument("--json", metavar="FILE", help="write the last preset's numbers there")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, autocast = (torch.bfloat16, torch.autocast("cuda", torch.bfloat16)) if device.type == "cuda" else (torch.float32, nullcontext())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    numbers, say = {}, tqdm.write
    bar = tqdm(total=2 + 3 * len(args.preset), dynamic_ncols=True, disable=None, leave=False)
    rate = matmul_rate(device, dtype)
    bar.update()
    seek, start = decoding()
    bar.update()
    say(f"device {name}; torch {torch.__version__}; {dtype} matrix product {rate / 1e9:.0f} GFLOP/s")
    say(f"decode: {seek:.1f} clips/s by seeking in two minutes of video, {start:.1f} from the start: x{seek / start:.1f}")
    for preset in args.preset:
        cfg = parse([f"--preset={preset}", *(f"--{s}" for s in args.set), *(["--compile"] if args.compile else [])])
        world = build(cfg, {"dit_weights", "vae_weights"}).to(device)
        world.lam.quantize = True
        batch = args.batch or max(1, cfg.batch // cfg.accumulate)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took, flops = training(world, cfg, batch, device, autocast)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        bar.update()
        patches = (cfg.size // world.vae.pixel_stride // world.dit.cfg.patch) ** 2 * world.vae.latent_frames(cfg.frames)
        frames = frame_times(world, cfg, 1, device, autocast)
        bar.update()
        numbers = {"preset": preset, "device": name, "torch": torch.__version__, "matmul_gflops": rate / 1e9, "batch": batch, "step_seconds": took,
                   "train_tokens_per_second": batch * patches / took, "step_gflop": flops / 1e9, "train_share_of_matmul": flops / took / rate,
                   "rollout_seconds_a_frame": {n: {"cached": a, "plain": b} for n, (a, b) in frames.items()},
                   "rollout_cached_speedup": frames[16][1] / frames[16][0], "frame16_over_frame2": frames[16][0] / frames[2][0],
                   "decode_seek_speedup": seek / start, "decode_clips_per_second": seek, "peak_memory_gb": peak / 2 ** 30}
        say(f"{preset}: training {numbers['train_tokens_per_second']:.0f} tokens/s, {numbers['train_share_of_matmul']:.0%} of the matrix product's rate "
            f"({batch} clips, {flops / 1e9:.1f} GFLOP in {took:.3f} s), peak memory {numbers['peak_memory_gb']:.2f} GB")
        say(f"{preset}: a new frame " + ", ".join(f"after {n}: {a:.3f} s (no cache {b:.3f} s)" for n, (a, b) in frames.items())
            + f"; x{numbers['rollout_cached_speedup']:.1f} at 16, frame 16 / frame 2 {numbers['frame16_over_frame2']:.2f}")
        if world.vae.time_stride == 1:          # else the VAE's random weights would be timed
            together, alone = planning(world, cfg, device, autocast, args.samples)
            numbers |= {"plan_shared_speedup": alone / together, "plans_per_second": 1 / together}
            say(f"{preset}: a plan of {args.samples} candidates x horizon 10, 3 denoising steps: {together:.2f} s together, {alone:.2f} s one by one: x{alone / together:.1f}")
        bar.update()
    bar.close()
    if args.json:
        with open(args.json + ".part", "w") as f:
            json.dump(numbers, f, indent=1)
        os.replace(args.json + ".part", args.json)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
