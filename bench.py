"""How fast it is, each number as a ratio or as a share of what the machine can do.

    python bench.py                                         # the tiny preset, on whatever device there is
    python bench.py --preset small opensora --compile --json bench.json

Training is counted in FLOPs of matrix products, convolutions and attention, forward and backward, as torch's
FlopCounterMode counts them (what the method needs: recomputed activations are left out), and divided by the
rate of one large matrix product on the same machine in the same precision.
"""

import json
import os
import platform
import resource
import statistics
import time
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import plan
from checkpoint import build
from config import PRECISIONS, PRESETS, Process, parse, phases
from data import Parser, number, program
from flow import Draw, sample
from formats import UserError, whole
from lam import Adapter
from train import memory
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


def clips_that_fit(cfg, process):
    """Clips of a training step: the preset's, unless they would take too much memory; then it says so."""
    with torch.device("meta"):
        world = build(cfg, {"dit_weights", "vae_weights"})
    wanted = max(1, cfg.batch // cfg.accumulate)
    one = memory(cfg, world, phases(cfg)[-1], process, 1)[1]
    if process.cuda:
        room = 0.9 * torch.cuda.mem_get_info(process.device)[0] / 1e9
    else:                                       # half of the machine's, whose other half others may have
        room = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    here = f"GB, of which there are {room:.1f} here"
    if one > room:
        raise UserError(f"--preset {cfg.preset}: a training step of one clip takes about {one:.1f} {here}")
    most = memory(cfg, world, phases(cfg)[-1], process, wanted)[1]
    if most <= room:
        return wanted
    fit = 1 + int((room - one) / (most - one) * (wanted - 1))   # each clip adds as much as the last, or more
    print(f"{cfg.preset}: {wanted} clips a step would take about {most:.1f} {here}; trains on {fit}")
    return fit


def training(world, cfg, batch, process):
    """Seconds and FLOPs of an end-to-end step"""
    device = process.device
    optimizer = torch.optim.AdamW(world.parameters(), cfg.lr, fused=True)   # as in train.py
    video = torch.rand(batch, 3, cfg.frames, cfg.size, cfg.size, device=device) * 2 - 1
    fps = torch.full((batch,), 24.0, device=device)
    latents = None
    if world.vae.time_stride > 1:               # as with --latent_cache
        l, side = world.vae.latent_frames(cfg.frames), cfg.size // world.vae.pixel_stride
        latents = torch.randn(batch, world.vae.channels, l, side, side, device=device)

    def step():
        with process.autocast():
            loss = world(video, Draw(0, device=device), fps, latents=latents)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    world.train()
    with FlopCounterMode(display=False) as counter:
        step()
    if cfg.compile:
        world.dit.compile()
    took = seconds(step, device)
    world.eval()
    return took, counter.get_total_flops()


@torch.no_grad()
def frame_time(world, cfg, n, process):
    """Seconds for one new latent frame after n others, with the cache and without"""
    device, side = process.device, cfg.size // world.vae.pixel_stride
    past = torch.randn(1, world.vae.channels, n, side, side, device=device)
    noise = torch.randn_like(past[:, :, :1])
    actions = torch.randn(1, n, world.dit.cfg.action_dim, device=device)
    fps, zeros = torch.full((1,), 24.0, device=device), past.new_zeros(1, n)
    settings = dict(actions=actions, steps=world.cfg.sampling_steps, guidance=1.0,
                    shift=world.cfg.time_shift, fps=fps)
    before = KVCache()                          # all of the past but its last frame
    with process.autocast():
        world.dit(past[:, :, :-1], zeros[:, 1:], actions[:, :n - 2], fps, before)

    def cached():
        """The last frame joins the past, the new one is denoised."""
        cache = KVCache()
        cache.past, cache.frames = dict(before.past), before.frames
        world.dit(past[:, :, -1:], zeros[:, :1], actions[:, :n - 1], fps, cache)
        cache.append = False
        sample(world.dit, noise, 0, cache=cache, **settings)

    def plain():
        sample(world.dit, torch.cat([past, noise], 2), n, **settings)

    with process.autocast():
        return {"cached": seconds(cached, device, 7), "plain": seconds(plain, device, 3)}


@torch.no_grad()
def planning(world, cfg, samples, process, horizon=10, alone=5):
    """Plans a second, and how much faster candidates are dreamed together than one by one"""
    device = process.device
    world.adapter = Adapter(4, world.lam.cfg).to(device)
    frames = np.random.default_rng(0).integers(0, 255, (1, cfg.size, cfg.size, 3), np.uint8)
    past, actions = torch.zeros(0, 4, device=device), torch.randn(samples, horizon, 4, device=device)

    def dream(some):
        plan.dream(world, frames, past, some, seed=0, fps=24, context=1, steps=3, guidance=1.0)

    few = actions[:alone].split(1)              # one by one only these are timed
    with process.autocast():
        together = seconds(lambda: dream(actions), device, 2)
        one = seconds(lambda: [dream(one) for one in few], device, 2) / len(few)
    return {"plan_shared_speedup": one * samples / together, "plans_per_second": 1 / together}


def measure(preset, args, process, rate):
    """Numbers of a preset: a dict"""
    flags = [f"--preset={preset}", *(f"--{setting}" for setting in args.set)]
    cfg = parse(flags + (["--compile"] if args.compile else []))
    batch = args.batch or clips_that_fit(cfg, process)
    world = build(cfg, {"dit_weights", "vae_weights"}).to(process.device)
    world.lam.quantize = True
    if process.cuda:
        torch.cuda.reset_peak_memory_stats()
    took, flops = training(world, cfg, batch, process)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024            # bytes, of the whole process
    if process.cuda:
        peak = torch.cuda.max_memory_allocated()
    side = cfg.size // world.vae.pixel_stride // world.dit.cfg.patch
    patches = side ** 2 * world.vae.latent_frames(cfg.frames)
    # dreams have too many shapes to compile them all: see run.Watch
    with torch.compiler.set_stance("force_eager") if cfg.compile else nullcontext():
        frames = {n: frame_time(world, cfg, n, process) for n in (2, 4, 8, 16)}
        # of a VAE with a stride the random weights would be timed
        plans = planning(world, cfg, args.samples, process) if world.vae.time_stride == 1 else {}
    return {
        "preset": preset, "compile": cfg.compile, "batch": batch,
        "step_seconds": took, "step_gflop": flops / 1e9,
        "train_tokens_per_second": batch * patches / took, "train_share_of_matmul": flops / took / rate,
        "peak_memory_gb": peak / 2 ** 30, "rollout_seconds_a_frame": frames,
        "rollout_cached_speedup": frames[16]["plain"] / frames[16]["cached"],
        "frame16_over_frame2": frames[16]["cached"] / frames[2]["cached"],
    } | plans


def say(numbers, samples):
    """The numbers of a preset in sentences"""
    row = Namespace(**numbers)
    frames = ", ".join(f"after {n}: {s['cached']:.3f} s (no cache {s['plain']:.3f} s)"
                       for n, s in row.rollout_seconds_a_frame.items())
    print(f"{row.preset}: training {row.train_tokens_per_second:.0f} tokens/s, "
          f"{row.train_share_of_matmul:.0%} of the matrix product's rate ({row.batch} clips, "
          f"{row.step_gflop:.1f} GFLOP in {row.step_seconds:.3f} s), peak memory {row.peak_memory_gb:.2f} GB")
    eager = " (dreams are not compiled)" if row.compile else ""
    print(f"{row.preset}: a new frame{eager} {frames}; x{row.rollout_cached_speedup:.1f} at 16, "
          f"frame 16 / frame 2 {row.frame16_over_frame2:.2f}")
    if "plans_per_second" in row:
        together = 1 / row.plans_per_second
        print(f"{row.preset}: a plan of {samples} candidates x horizon 10, 3 denoising steps: "
              f"{together:.2f} s together, {together * row.plan_shared_speedup:.2f} s one by one: "
              f"x{row.plan_shared_speedup:.1f}")


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", nargs="+", default=["tiny"], choices=PRESETS)
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py, such as hidden=384")
    add("--batch", type=number(int, 1), help="clips a training step (the preset's)")
    add("--samples", type=number(int, 1), default=200, help="candidates of a plan")
    add("--precision", default="auto", choices=PRECISIONS, help="bf16 autocast; auto: on cuda")
    add("--compile", action="store_true", help="torch.compile the DiT in training; dreams stay eager")
    add("--json", metavar="FILE", help="write the last preset's numbers there")
    args = parser.parse_args(argv)
    if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or ".", os.W_OK)):
        parser.error(f"--json {args.json}: takes the name of a file in a folder that can be written to")
    return args


def main(argv):
    args = parse_args(argv)
    process = Process.here(precision=args.precision)
    dtype = torch.bfloat16 if process.precision == "bf16" else torch.float32
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    rate = matmul_rate(process.device, dtype)
    machine = {"device": torch.cuda.get_device_name() if process.cuda else cpu, "torch": torch.__version__,
               "precision": process.precision, "matmul_gflops": rate / 1e9}
    print("device {device}; torch {torch}; {precision} matrix product {matmul_gflops:.0f} GFLOP/s"
          .format(**machine), flush=True)
    for preset in args.preset:
        numbers = machine | measure(preset, args, process, rate)
        say(numbers, args.samples)
    if args.json:
        with whole(args.json) as part, open(part, "w") as f:
            json.dump(numbers, f, indent=1)


if __name__ == "__main__":
    program(main)
