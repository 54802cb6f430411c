"""How fast it is, each number as a ratio or as a share of what the machine can do.

    python bench.py                                         # the tiny preset, on whatever device there is
    python bench.py --preset small opensora --compile --json bench.json
    python bench.py --gpu 1                                 # then 2, 3: all that waits for a GPU, in out/gpu

Training is counted in FLOPs of matrix products, convolutions and attention, as torch's FlopCounterMode counts
them (recomputed activations left out), and divided by the rate of one large matrix product in that precision.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, suppress
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import plan
from checkpoint import build
from config import PRECISIONS, PRESETS, Process, parse, phases
from data import Parser, number, program
from dit import DiTBlock, DiTConfig
from flow import Draw, sample
from formats import UserError, whole
from lam import Adapter
from train import memory
from transformer import MLP, KVCache


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


def matmul_rate(device, dtype, rehearse=False):
    """FLOP/s of a square matrix product, the best of a few sizes"""
    sizes, rates = (1024, 2048) if device.type == "cpu" else (4096, 8192, 16384), []
    for n in (256,) if rehearse else sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n ** 3 / seconds(lambda: a @ b, device, 10))
    return max(rates)


def needed(cfg, process, clips):
    """GB of a step of the last phase"""
    with torch.device("meta"):
        world = build(cfg, {"dit_weights", "vae_weights"})
    return memory(cfg, world, phases(cfg)[-1], process, clips)[1]


def clips_that_fit(cfg, process):
    """Clips of a training step: the preset's, unless they would take too much memory; then it says so."""
    wanted = max(1, cfg.batch // cfg.accumulate)
    one = needed(cfg, process, 1)
    if process.cuda:
        room = 0.9 * torch.cuda.mem_get_info(process.device)[0] / 1e9
    else:                                       # half of the machine's, whose other half others may have
        room = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    here = f"GB, of which there are {room:.1f} here"
    if one > room:
        raise UserError(f"--preset {cfg.preset}: a training step of one clip takes about {one:.1f} {here}")
    most = needed(cfg, process, wanted)
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
    cfg = parse([f"--preset={preset}", f"--compile={args.compile}", *(f"--{s}" for s in args.set)])
    batch = args.batch or clips_that_fit(cfg, process)
    with process.device:                        # a GPU draws weights much faster
        world = build(cfg, {"dit_weights", "vae_weights"})
    world.lam.quantize = True
    if process.cuda:
        torch.cuda.reset_peak_memory_stats()
    took, flops = training(world, cfg, batch, process)
    whole_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if process.cuda else whole_process
    side = cfg.size // world.vae.pixel_stride // world.dit.cfg.patch
    patches = side ** 2 * world.vae.latent_frames(cfg.frames)
    numbers = {
        "preset": preset, "compile": cfg.compile, "batch": batch,
        "step_seconds": took, "step_gflop": flops / 1e9,
        "train_tokens_per_second": batch * patches / took, "train_share_of_matmul": flops / took / rate,
        "peak_memory_gb": peak / 1e9, "estimated_memory_gb": needed(cfg, process, batch),
    }
    if args.part == "training":
        return numbers
    # dreams have too many shapes to compile them all: see run.Watch
    with torch.compiler.set_stance("force_eager") if cfg.compile else nullcontext():
        frames = {n: frame_time(world, cfg, n, process) for n in (2, 4, 8, 16)}
        # of a VAE with a stride the random weights would be timed
        plans = planning(world, cfg, args.samples, process) if world.vae.time_stride == 1 else {}
    return numbers | {
        "rollout_seconds_a_frame": frames,
        "rollout_cached_speedup": frames[16]["plain"] / frames[16]["cached"],
        "frame16_over_frame2": frames[16]["cached"] / frames[2]["cached"],
    } | plans


def say(numbers, samples):
    """The numbers of a preset in sentences"""
    row = Namespace(**numbers)
    print(f"{row.preset}: training {row.train_tokens_per_second:.0f} tokens/s, "
          f"{row.train_share_of_matmul:.0%} of the matrix product's rate ({row.batch} clips, "
          f"{row.step_gflop:.1f} GFLOP in {row.step_seconds:.3f} s), peak memory {row.peak_memory_gb:.2f} GB")
    if "rollout_seconds_a_frame" not in row:
        return
    frames = ", ".join(f"after {n}: {s['cached']:.3f} s (no cache {s['plain']:.3f} s)"
                       for n, s in row.rollout_seconds_a_frame.items())
    eager = " (dreams are not compiled)" if row.compile else ""
    print(f"{row.preset}: a new frame{eager} {frames}; x{row.rollout_cached_speedup:.1f} at 16, "
          f"frame 16 / frame 2 {row.frame16_over_frame2:.2f}")
    if "plans_per_second" in row:
        print(f"{row.preset}: a plan of {samples} candidates x horizon 10, 3 denoising steps: "
              f"{1 / row.plans_per_second:.2f} s, x{row.plan_shared_speedup:.1f} faster than one by one")


def blocks(args, process, dtype, l=5):
    """Forward and backward of a spatial and a temporal block of the paper's size, in turns with Open-Sora's;
    each as it trains: ours under autocast, theirs with weights in bf16."""
    cfg, b = parse(["--preset=opensora", *(f"--{s}" for s in args.set)]), args.batch or 8
    d, s = cfg.hidden, (cfg.size // 8 // cfg.patch) ** 2
    with process.device:
        x, mod, noised = torch.randn(b, l, s, d), torch.randn(b, l, 6, d), torch.ones(b, l, dtype=torch.bool)
        our = [DiTBlock(DiTConfig(d, cfg.heads, causal=False), temporal) for temporal in (False, True)]
        their = opensora_blocks(d, cfg.heads, dtype) if "OPENSORA" in os.environ else []
    for block in our if args.compile else ():
        block.compile()

    def ours():
        y = x.clone().requires_grad_()
        with process.autocast():
            for block in our:
                y, _ = block(y, mod)
        y.square().mean().backward()

    def opensora():
        y, time = x.flatten(1, 2).to(dtype, copy=True).requires_grad_(), mod[:, 0].to(dtype)
        for block in their:
            y = block(y, None, time, None, noised, time, l, s)
        y.square().mean().backward()

    pairs = [ours, opensora] if their else [ours]
    rounds = [[seconds(pair, process.device, 1) for pair in pairs] for _ in range(20)]
    took = {pair.__name__: statistics.median(times) for pair, times in zip(pairs, zip(*rounds))}
    speedup = took["opensora"] / took["ours"] if their else "no folder of Open-Sora's source in $OPENSORA"
    return {"batch": b, "compile": args.compile, "blocks_seconds": took, "blocks_speedup": speedup}


def opensora_blocks(d, heads, dtype):
    """A spatial and a temporal block by Open-Sora v1.2's own code, in the folder $OPENSORA, without attention
    to text; $ROTARY: rotary_embedding_torch 0.5.3. Stand-ins: torch for flash-attn, our MLP for timm's."""
    unused = ("timm timm.models timm.models.layers timm.models.vision_transformer xformers xformers.ops "
              "mmengine mmengine.registry transformers opensora.utils opensora.utils.ckpt_utils")
    stand_ins = {name: mock.MagicMock() for name in unused.split()}
    for name in ("opensora", "opensora.models", "opensora.models.stdit", "opensora.acceleration"):
        folder = os.path.join(os.environ["OPENSORA"], *name.split("."))         # but not its __init__.py
        stand_ins[name] = Namespace(__name__=name, __path__=[folder], __spec__=None)
    sys.path.append(os.environ["ROTARY"])
    with mock.patch.dict(sys.modules, stand_ins):
        from opensora.models.stdit import stdit3
        from rotary_embedding_torch import RotaryEmbedding

    def attend(q, k, v, **_):                   # (b, s, n, e)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    sys.modules["flash_attn"] = Namespace(flash_attn_func=attend)
    stdit3.Mlp = mock.MagicMock(side_effect=lambda **sizes: MLP(sizes["in_features"]))
    turns = None, RotaryEmbedding(d // heads).to(dtype).rotate_queries_or_keys
    blocks = [stdit3.STDiT3Block(d, heads, rope=turn, qk_norm=True, temporal=bool(turn),
                                 enable_flash_attn=True).to(dtype) for turn in turns]
    for block in blocks:
        block.cross_attn.forward = mock.MagicMock(return_value=0)
    return blocks


# what waits for a GPU --------------------------------------------------------------------------------------

# what each call measures, the most wanted first: tests, training, or this program with these flags
CALLS = {
    1: {"tests": "", **{preset: f"--preset {preset} --part training" for preset in PRESETS}},
    2: {"opensora-compiled": "--preset opensora --part training --compile", "blocks": "--part blocks",
        "blocks-compiled": "--part blocks --compile",
        "small-compiled": "--preset small --part training --compile", "small-dreams": "--preset small",
        "tiny-compiled": "--preset tiny --part training --compile", "tiny-dreams": "--preset tiny",
        "opensora-dreams": "--preset opensora"},
    3: {"training": ""},
}


def item(name, flags, args, until):
    """The numbers of an item of CALLS, which SIGTERM stops where it would not end by a time."""
    here, run = os.path.dirname(__file__), os.path.join(args.out, "out", "small")
    command = [__file__, *flags.split(), "--json=item.json", f"--samples={args.samples}", "--set", *args.set]
    command += ["--rehearse"] if args.rehearse else []
    if name == "tests":
        command = ["-m", "pytest", "-q", "-k", "on_a_gpu", f"{here}/test_all.py"]
    if name == "training":
        command = [f"{here}/train.py", "--preset=small", "--name=small", *(f"--{s}" for s in args.set)]
        command += ["--resume=out/small"] if os.path.exists(os.path.join(run, "config.json")) else []
    grace = min(30, (until - time.time()) / 4)  # to write a checkpoint in
    limit = f"timeout --foreground --preserve-status -k {grace} {until - time.time() - grace}".split()
    with open(os.path.join(args.out, "log.txt"), "a+") as log:
        began = log.tell()
        status = subprocess.call([*limit, sys.executable, *command], cwd=args.out, stdout=log, stderr=log)
        log.seek(began)
        said = log.read().splitlines()[-20:] or [""]
    numbers, rows = {"summary": said[-1]}, []
    if name == "training":
        with suppress(FileNotFoundError), open(os.path.join(run, "metrics.jsonl")) as log:
            rows = [json.loads(line) for line in log if '"event": "train"' in line and line.endswith("\n")]
        curve = [[row[k] for k in ("step", "loss", "steps_per_second")] for row in rows]
        numbers = {"finished": status == 0, "step, loss, steps a second": curve}
        status = 0 if status == 143 else status                 # which SIGTERM has stopped
    elif name != "tests" and status == 0:
        with open(os.path.join(args.out, "item.json")) as f:
            numbers = json.load(f)
    why = [line for line in said if "Error" in line] or said
    return numbers | ({"failed": f"ended with {status}: {why[-1].strip():.300}"} if status else {})


def gpu_day(args, machine):
    """Measure what waits for a GPU, until the budget is spent; gpu.json, always whole, keeps what is done."""
    until, file, found = time.time() + args.budget, os.path.join(args.out, "gpu.json"), {}
    os.makedirs(args.out, exist_ok=True)
    try:
        with suppress(FileNotFoundError), open(file) as f:
            found = dict(json.load(f))
    except (ValueError, TypeError):
        raise UserError(f"{file}: not what --gpu writes; move it away") from None
    for name, flags in [item for call in args.gpu or CALLS for item in CALLS[call].items()]:
        before = found.get(name, {})            # of training it says whether it is finished
        done = machine.items() <= before.items() and before.get("finished", True)
        if done and not args.only or args.only and name not in args.only:
            continue
        began = time.time()
        guess = 5 if args.rehearse else 120 if "--compile" in flags else 60
        if until - began < guess:
            print(f"{name}: left for a later call, as it may take {guess} s", flush=True)
            continue
        numbers = item(name, flags, args, until)
        found[name] = numbers | machine | {"seconds": round(time.time() - began)}
        with whole(file) as part, open(part, "w") as f:
            json.dump(found, f, indent=1)
        told = {k: v[-1:] if isinstance(v, list) else v for k, v in numbers.items()}
        print(f"{name}: {json.dumps(told)}", flush=True)


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", nargs="+", default=["tiny"], choices=PRESETS)
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py, such as hidden=384")
    add("--batch", type=number(int, 1), help="clips a training step (the preset's)")
    add("--samples", type=number(int, 1), default=200, help="candidates of a plan")
    add("--precision", default="auto", choices=PRECISIONS, help="bf16 autocast; auto: on cuda")
    add("--compile", action="store_true", help="torch.compile the DiT in training; dreams stay eager")
    add("--part", choices=("training", "blocks"), help="alone; blocks: in turns with Open-Sora's")
    add("--json", metavar="FILE", help="write the last preset's numbers there")
    add("--gpu", nargs="*", type=number(int, 1, 3), metavar="CALL",
        help="1 tests, memory; 2 compiled steps, Open-Sora's blocks, dreams; 3 training; no number: all")
    add("--out", default="out/gpu", metavar="FOLDER", help="--gpu: of gpu.json, log.txt and the training")
    add("--budget", type=number(float, 1), default=480, help="--gpu: seconds that this call may take")
    add("--only", nargs="+", choices=[*CALLS[1], *CALLS[2], *CALLS[3]], help="--gpu: even if it has them")
    add("--rehearse", action="store_true", help="at sizes of no meaning; --gpu on a CPU too")
    args = parser.parse_args(argv)
    if args.gpu is not None and not (args.rehearse or torch.cuda.is_available()):
        parser.error("--gpu: there is none here; with --rehearse all runs at tiny sizes")
    if args.rehearse:                           # by what takes seconds on a CPU
        sizes = "hidden=16 depth=1 heads=2 lam_width=16 lam_depth=1 batch=2 accumulate=1 log_every=2"
        args.set, args.samples = sizes.split() + args.set, 2
    if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or ".", os.W_OK)):
        parser.error(f"--json {args.json}: takes the name of a file in a folder that can be written to")
    return args


def main(argv):
    args = parse_args(argv)
    process = Process.here(precision=args.precision)
    dtype = torch.bfloat16 if process.precision == "bf16" else torch.float32
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = {"device": torch.cuda.get_device_name() if process.cuda else cpu, "torch": torch.__version__,
               "precision": process.precision}
    if args.gpu is not None:
        return gpu_day(args, machine | {"rehearsal": args.rehearse})
    rate = matmul_rate(process.device, dtype, args.rehearse)
    machine["matmul_gflops"] = rate / 1e9
    print("device {device}; torch {torch}; {precision} matrix product {matmul_gflops:.0f} GFLOP/s"
          .format(**machine), flush=True)
    if args.part == "blocks":
        args.preset, numbers = [], machine | blocks(args, process, dtype)
        print(json.dumps(numbers))
    for preset in args.preset:
        numbers = machine | measure(preset, args, process, rate)
        say(numbers, args.samples)
    if args.json:
        with whole(args.json) as part, open(part, "w") as f:
            json.dump(numbers, f, indent=1)


if __name__ == "__main__":
    program(main)
