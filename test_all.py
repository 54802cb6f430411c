"""Tests: tiny models, real behaviour, minutes on two cores.

python -m pytest -q -n 2 --dist loadgroup test_all.py
"""

import argparse
import ast
import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import NamedTuple

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import checkpoint
import cost
import data
import desk
import episodes
import evaluate
import figures
import formats
import goals
import judge
import plan
import reproduce
import run as running
import toy
import train
import transformer
import weights
from checkpoint import LatentCache, build, load_checkpoint, load_world
from config import Config, Phase, Process, adopt, parse, phases
from conftest import (DAMAGES, counting, damage, lerobot, lpips_weights, moving_squares, needs, released,
                      robomimic, shades, told, write_actions, write_film)
from data import Mixture, ToyClips, another, clips, loader, program, random_crop, to_video
from dit import DiT, DiTConfig, load_opensora
from episodes import Episodes
from flow import Draw, FlowConfig, World, sample, shift_time, time_ratio
from formats import UserError, inspect_video, read_video
from judge import Lpips, align, loss_by_time, predict, video_measures
from lam import Adapter, LAM, LAMConfig, Standardize, TrueActions, resize
from metrics import (average_precision, cka, codebook_metrics, collapsed, frechet, joint_codes, nmi, paired_t,
                     probe, psnr, ssim, wilson)
from run import lock
from transformer import KVCache
from vae import FrameVAE, PixelVAE, load_opensora_vae
from vq import VectorQuantizer

HERE = os.path.dirname(os.path.abspath(__file__))
STDIT = os.path.join(HERE, "assets", "fixtures", "stdit3_tiny")
VAE = os.path.join(HERE, "assets", "fixtures", "vae_tiny")
# a run of train.py that is over in seconds
SMALL = """--hidden 16 --depth 1 --heads 2 --lam_width 16 --lam_depth 1 --batch 4 --vq_start 0
           --sampling_steps 2 --log_every 2 --eval_clips 4""".split()
PIXELS = dict(channels=3, out_channels=3, patch=4, pixel_stride=1)             # fields of DiTConfig


def small_world(seed=0, **lam):
    """A World of a few thousand weights, none of them zero, on clips of 8 x 8 pixels. lam: fields of its
    LAMConfig."""
    torch.manual_seed(seed)
    sizes = dict(size=8, patch=4, width=16, depth=2, heads=2, fdm_depth=1, num_codes=8, code_dim=4)
    lam = LAM(LAMConfig(**(sizes | lam)))
    dit = DiT(DiTConfig(hidden=16, heads=2, depth=2, action_dim=8, action_depth=2, **PIXELS))
    return awake(World(lam, dit, PixelVAE(), FlowConfig("8")))


def strided_world():
    """As `small_world`, on the latents of a VAE with a temporal stride of 4, for clips of 32 x 32 pixels."""
    vae, lam = load_opensora_vae(VAE), small_world().lam
    torch.manual_seed(0)
    dit = DiT(DiTConfig(hidden=16, heads=2, depth=2, patch=1, action_dim=32, action_depth=1))
    return awake(World(lam, dit, vae, FlowConfig("8")))


def awake(world):
    """Weights that start at zero hide what depends on them."""
    for p in world.parameters():
        if p.dim() and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return world.eval()


def video(b=2, t=6, size=8, seed=0):
    """Noise in [-1, 1]: (b, 3, t, size, size)"""
    return torch.rand(b, 3, t, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ctrl_c_reaches_it():
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # ignored where pytest runs in the background


def start(script, *args, cwd, processes=1, restarts=0):
    """A script of ours as a process group of its own, under torchrun if it is to be several processes."""
    command = [os.path.join(HERE, script), *map(str, args)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={processes}", f"--max-restarts={restarts}", *command]
    return subprocess.Popen([sys.executable, *command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True, preexec_fn=ctrl_c_reaches_it)


def run(script, *args, cwd, ok=True, processes=1, timeout=300):
    """Run a script of ours to its end, which must be a good one if `ok` and a bad one if not."""
    process = start(script, *args, cwd=cwd, processes=processes)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode == 0) == ok, out + err
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def until(condition, process, seconds=100):
    """Wait for a condition while the process lives."""
    limit = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < limit:
        time.sleep(0.01)
    if not condition():
        ended = process.poll() is not None
        pytest.fail(f"the process ended: {process.communicate(timeout=10)}" if ended else "too slow")


def complaint(done, script="train.py"):
    """The one line of a user's mistake."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{script}: "), done.stderr
    return lines[0]


def result(folder, name):
    """What the run out/NAME wrote into metrics.jsonl: all its lines, and the last one."""
    with open(os.path.join(folder, "out", name, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    return rows, rows[-1]


def influence(f, x, axis):
    """Which places of x along `axis` change which places of f(x) (b, n, ...): bool (x.shape[axis], n)"""
    y, rows = f(x), []
    for j in range(x.shape[axis]):
        other = x.clone()
        other.select(axis, j).add_(1)
        rows.append((f(other) != y).transpose(0, 1).flatten(1).any(1))          # (n,)
    return torch.stack(rows)


# quantizer --------------------------------------------------------------------------------------------------


def quantized():
    """A quantizer, latents (5, 3, 2, 4), and what it makes of them."""
    torch.manual_seed(0)
    vq, z = VectorQuantizer(8, 4), torch.randn(5, 3, 2, 4, requires_grad=True)
    return vq, z, *vq(z)


def test_quantizer_takes_the_nearest_code():
    vq, z, z_q, indices, _ = quantized()
    distance = (z[..., None, :] - vq.codebook).pow(2).sum(-1)                   # (5, 3, 2, 8)
    assert torch.equal(indices, distance.argmin(-1))
    assert torch.allclose(z_q, vq.codebook[indices], atol=1e-6)


def test_quantizer_passes_the_gradient_straight_through():
    _, z, z_q, _, _ = quantized()
    gradient = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad((z_q * gradient).sum(), z)[0], gradient)


def test_quantizer_loss_is_codebook_plus_commitment_with_weight_1_each():
    vq, z, _, indices, loss = quantized()
    apart = z - vq.codebook[indices]
    assert loss.shape == ()
    assert torch.allclose(loss, 2 * apart.pow(2).mean())
    # commitment alone pulls the latents, the codebook loss alone the codes
    to_z, to_codes = torch.autograd.grad(loss, [z, vq.codebook])
    assert torch.allclose(to_z, 2 * apart / apart.numel(), atol=1e-7)
    pull = torch.zeros(8, 4).index_add(0, indices.flatten(), -2 * apart.flatten(0, 2) / apart.numel())
    assert torch.allclose(to_codes, pull, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_the_codebook_starts_in_units_of_the_latents(scale):
    torch.manual_seed(0)
    sizes = dict(size=8, patch=4, width=16, depth=1, heads=2, fdm_depth=0, num_codes=8, code_dim=64)
    largest = LAM(LAMConfig(**sizes, latent_scale=scale)).vq.codebook.abs().max()
    assert 0.9 * scale / 8 < largest <= scale / 8


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 10
    vq = VectorQuantizer(8, 4)
    vq.fit(centres.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 4))
    assert torch.cdist(centres, vq.codebook).amin(1).max() < 0.2


@pytest.mark.parametrize("indices, want", [
    pytest.param(torch.arange(8), {"utilization": 1, "max_usage": 1 / 8, "entropy": 1}, id="all alike"),
    pytest.param(torch.zeros(9, dtype=int), {"utilization": 1 / 8, "max_usage": 1, "entropy": 0}, id="one"),
])
def test_codebook_metrics_known_answers(indices, want):
    assert codebook_metrics(indices, 8) == pytest.approx(want)


# latent action model ----------------------------------------------------------------------------------------


def test_a_transition_has_two_latent_actions_and_their_indices():
    z_q, indices, _ = small_world().lam.encode(video())
    assert z_q.shape == (2, 5, 2, 4)
    assert indices.shape == (2, 5, 2)


@pytest.mark.parametrize("odd", [False, True])
def test_latent_action_depends_on_its_next_frame_and_on_nothing_after_it(odd):
    lam = small_world(odd=odd, standardize=True).lam
    seen = influence(lam.infer, video(), axis=2)                                # (frame, transition)
    assert seen.diagonal(-1).all(), "action i leads to frame i+1"
    assert not seen.tril(-2).any(), "a later frame changes it"


def test_odd_latent_action_depends_on_its_two_frames_alone():
    seen = influence(small_world(odd=True, standardize=True).lam.infer, video(), axis=2)
    assert not seen.triu(1).any()


def test_odd_latent_actions_change_sign_when_time_is_reversed():
    lam, x = small_world(odd=True).lam, video()
    assert torch.allclose(lam.infer(x), -lam.infer(x.flip(2)).flip(1), atol=1e-5)


def test_odd_latent_action_of_a_still_clip_is_zero():
    still = video()[:, :, :1].expand(-1, -1, 6, -1, -1)
    assert small_world(odd=True).lam.infer(still).abs().max() == 0


def test_fdm_loss_trains_every_weight_of_the_lam():
    lam = small_world().lam.train()
    loss, out = lam(video())
    loss.backward()
    assert [name for name, p in lam.named_parameters() if p.grad is None] == []
    assert out["indices"].shape == (2, 5, 2)


def without_vq(lam):
    """The same LAM, whose VQ losses, which train the IDM too, have no gradient."""
    encode = lam.encode

    def muted(*args):
        z, indices, vq = encode(*args)
        return z, indices, vq.detach()
    lam.encode = muted
    return lam


def test_the_last_block_of_the_idm_computes_only_what_is_read():
    torch.manual_seed(0)
    block, x = transformer.Block(32, 2), torch.randn(3, 4, 6, 32)
    torch.testing.assert_close(block(x, keep=2), block(x)[:, :, :2], rtol=1e-5, atol=1e-6)


def test_fdm_error_alone_reaches_the_idm():
    lam = without_vq(small_world().lam)
    lam(video())[0].backward()
    assert lam.idm.out.weight.grad.abs().sum() > 0
    assert lam.vq.codebook.grad is None


def test_standardize_gives_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    norm, z = Standardize(2, 4), torch.randn(4000, 2, 2, 4) * 3 + 5
    for _ in range(100):                                        # until the running moments are those of z
        y = norm(z)
    assert y.mean((0, 1)).abs().max() < 0.01
    assert (y.std((0, 1)) - 1).abs().max() < 0.01


# world model ------------------------------------------------------------------------------------------------


def test_velocity_has_the_shape_of_the_latents():
    assert small_world().dit(video(), torch.rand(2, 6), torch.randn(2, 5, 8)).shape == (2, 3, 6, 8, 8)


def test_velocity_depends_on_the_frames_a_second_24_where_unknown():
    dit, x, t = small_world().dit, video(), torch.rand(2, 6)
    at_24 = dit(x, t, fps=torch.tensor([24.0, 24.0]))
    assert torch.equal(dit(x, t), at_24)
    changed = (dit(x, t, fps=torch.tensor([24.0, 5.0])) != at_24).flatten(1).any(1)
    assert changed.tolist() == [False, True]


def test_dit_is_causal_in_frames():
    dit, t, actions = small_world().dit, torch.rand(2, 6), torch.randn(2, 5, 8)
    seen = influence(lambda x: dit(x, t, actions).transpose(1, 2), video(), axis=2)     # (frame, frame)
    earlier = torch.ones_like(seen).tril(-1)
    assert seen[~earlier].all(), "a frame changes itself and all later ones"
    assert not seen[earlier].any(), "a frame changes an earlier one"


def test_an_action_first_changes_the_frame_that_it_leads_to():
    dit, x, t, actions = small_world().dit, video(), torch.rand(2, 6), torch.randn(2, 5, 8)
    seen = influence(lambda a: dit(x, t, a).transpose(1, 2), actions, axis=1)           # (action, frame)
    assert seen.diagonal(1).all(), "action j leads to frame j+1"
    assert not seen.tril().any(), "an action changes an earlier frame"


def test_bidirectional_dit_is_not_causal():
    torch.manual_seed(0)
    dit, t = DiT(DiTConfig(16, 2, 1, causal=False, action_dim=0, **PIXELS)), torch.rand(2, 6)
    torch.nn.init.normal_(dit.final_layer.linear.weight)        # zero at the start
    seen = influence(lambda x: dit(x, t).transpose(1, 2), video(), axis=2)
    assert seen.all()


def cached():
    """A DiT whose cache holds 3 clean frames, and a call on the 3 noised frames after them."""
    dit, x, actions = small_world().dit, video(), torch.randn(2, 5, 8)
    t = torch.tensor([0, 0, 0, 0.7, 0.7, 0.7]).expand(2, 6)
    cache = KVCache()
    dit(x[:, :, :2], t[:, :2], actions[:, :1], cache=cache)
    dit(x[:, :, 2:3], t[:, 2:3], actions[:, :2], cache=cache)
    cache.append = False
    go_on = functools.partial(dit, x[:, :, 3:], t[:, 3:], actions, cache=cache)
    return go_on, dit(x, t, actions)[:, :, 3:]


@torch.no_grad()
def test_cached_frames_give_the_same_velocity():
    go_on, want = cached()
    assert torch.allclose(go_on(), want, atol=1e-5)


def test_attention_of_more_rows_than_cuda_takes_is_the_same(monkeypatch):
    attention, rows = torch.nn.functional.scaled_dot_product_attention, []

    def counted(q, *args, **options):
        rows.append(len(q))
        return attention(q, *args, **options)

    def found():
        go_on, _ = cached()
        world = small_world(odd=True)
        world(video(), Draw(0))[0].backward()
        return [go_on(), *(p.grad for p in world.parameters() if p.grad is not None)]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    whole = found()
    assert max(rows) > 5
    rows.clear()
    monkeypatch.setattr(transformer, "ROWS", 5)
    parts = found()
    assert max(rows) == 5
    assert all(torch.allclose(part, same, atol=1e-6) for part, same in zip(parts, whole, strict=True))


@torch.no_grad()
def test_reading_a_cache_leaves_it_as_it_is():
    go_on, _ = cached()
    assert torch.equal(go_on(), go_on())


@pytest.mark.parametrize("rows, convolved", [(256, True), (255, False), (128, False), (264, False)])
def test_a_large_linear_layer_is_a_convolution_where_mkl_is_slow(rows, convolved, monkeypatch):
    monkeypatch.setattr(transformer, "CONVOLVE", True)
    calls, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: calls.append(1) or conv2d(*args))
    torch.manual_seed(0)
    ours = transformer.Linear(5, 7)
    x = torch.randn(rows, 5).requires_grad_()
    plain = torch.nn.functional.linear(x, ours.weight, ours.bias)
    leaves = [x, ours.weight, ours.bias]
    want = torch.autograd.grad(plain.square().sum(), leaves)
    made = ours(x)
    assert bool(calls) == convolved
    assert torch.allclose(made, plain, atol=1e-5)
    for got, grad in zip(torch.autograd.grad(made.square().sum(), leaves), want, strict=True):
        assert torch.allclose(got, grad, rtol=1e-4, atol=1e-3)


def test_rope_is_the_same_where_it_is_compiled(monkeypatch):
    x = torch.randn(2, 3, 5, 8, generator=seeded())
    plain = transformer.rope(x, 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(transformer.rope(x, 4), plain, atol=1e-6)


@pytest.mark.parametrize("shift, pixels, frames, r", [
    ("auto", 512 ** 2, 4, 2),
    ("auto", 256 ** 2, 16, 2),
    ("3", 1, 1, 3),
    ("none", 1, 1, 1),
    (1.0, 512 ** 2, 4, 1),
])
def test_time_ratio_is_open_soras_a_number_or_none(shift, pixels, frames, r):
    assert time_ratio(shift, pixels, frames) == r


def test_time_shift_keeps_data_and_noise_and_moves_what_is_between():
    assert shift_time(torch.tensor([0.0, 0.5, 1.0]), 3).tolist() == [0, 0.75, 1]


class Exact(torch.nn.Module):
    """The velocity where all data is one point: (x_0 - x_t) / t; or `off` beside it."""
    cfg = DiTConfig(pixel_stride=1)

    def __init__(self, data, off=0.0):
        super().__init__()
        self.data, self.off = data, off

    def forward(self, x, t, actions, fps, cache=None):
        return (self.data - x) / t.clamp(min=1e-9)[:, None, :, None, None] + self.off


@pytest.mark.parametrize("shift", ["none", 8.0])
def test_sampler_on_an_exact_velocity_reaches_the_data(shift):
    x, data = video(), video(seed=1)
    x[:, :, :2] = data[:, :, :2]
    y = sample(Exact(data), x, context=2, steps=10, shift=shift)
    assert torch.allclose(y, data, atol=1e-5)


def test_sampler_leaves_the_context_as_it_is():
    x = video()
    y = sample(Exact(video(seed=1)), x, context=2, steps=10)
    assert torch.equal(y[:, :, :2], x[:, :, :2])


def guided(steps):
    """A function of guidance and `null`: what the sampler makes of the same noise and actions, without those
    of the noised frames if null."""
    dit, x, actions = small_world().dit, video(), torch.randn(2, 5, 8)

    def go(guidance, null=False):
        given = actions.clone()
        if null:
            given[:, 1:] = 0                                    # frames 2.. are noised
        return sample(dit, x, 2, given, steps=steps, guidance=guidance)
    return go


def test_guidance_zero_is_the_null_action():
    go = guided(steps=3)
    assert torch.allclose(go(0.0), go(1.0, null=True), atol=1e-5)


def test_guidance_one_is_the_plain_model():
    go = guided(steps=3)
    # exactly 1 takes a path of its own, without v_null
    assert torch.allclose(go(1.0), go(1 + 1e-6), atol=1e-4)
    assert not torch.allclose(go(1.0), go(4.0), atol=1e-3)


def test_guidance_goes_on_from_the_null_action_through_the_plain_model():
    go = guided(steps=1)                                        # after one step it shows as it is
    plain, null = go(1.0), go(1.0, null=True)
    assert torch.allclose(go(4.0), null + 4 * (plain - null), atol=1e-5)


# World: dreams ----------------------------------------------------------------------------------------------

WORLDS = [pytest.param(small_world, 7, 8, id="pixels"), pytest.param(strided_world, 17, 32, id="strided")]
# every number of true frames with which a clip of t frames can begin
HISTORIES = [pytest.param(small_world, 7, 8, known, id=f"pixels-{known}") for known in range(1, 7)]
HISTORIES += [pytest.param(strided_world, 17, 32, known, id=f"strided-{known}") for known in range(1, 17, 4)]


def by_step(world, past, z, draw, t, **sampling):
    """What World.rollout does: a loop over World.step, from the past that World.begin made. A video of t
    frames."""
    actions, latents = world.pack(z), past.latents
    for i in range(latents.shape[2] - 1, actions.shape[1]):
        noise = draw(torch.randn, len(z), latents.shape[1], 1, *latents.shape[3:])      # (b, c, 1, h, w)
        past = world.step(past, actions[:, i:i + 1], noise, **sampling)
    return world.vae.decode(past.latents, t).clamp(-1, 1)


def without_cache(world, x, z, known, guidance, fps):
    """What World.rollout does, but the whole past goes through the DiT at each step."""
    draw, actions, past = Draw(5), world.pack(z), world.vae.encode(x[:, :, :known])
    for j in range(past.shape[2], actions.shape[1] + 1):
        noise = draw(torch.randn, *past[:, :, :1].shape)                        # (b, c, 1, h, w)
        now = torch.cat([past, noise], 2)
        past = sample(world.dit, now, j, actions[:, :j], 3, guidance, world.cfg.time_shift, fps)
    return world.vae.decode(past, x.shape[2]).clamp(-1, 1)


@pytest.mark.parametrize("make, t, size, known", HISTORIES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_cached_rollout_equals_the_plain_one_at_every_history(make, t, size, known, guidance):
    world, x, fps = make(), video(3, t, size), torch.tensor([5.0, 10.0, 30.0])
    z = world.lam.encode(x)[0]
    dream = world.rollout(x[:, :, :known], z, 3, guidance, fps, Draw(5))
    assert torch.allclose(dream, without_cache(world, x, z, known, guidance, fps), atol=1e-4)


@torch.no_grad()
def test_open_soras_time_shift_counts_the_cached_frames():
    world, x = small_world(), video()
    world.cfg.time_shift = "auto"
    z, fps = world.lam.encode(x)[0], torch.tensor([24.0, 24.0])
    dream = world.rollout(x[:, :, :3], z, 3, 1.0, fps, Draw(5))
    assert torch.allclose(dream, without_cache(world, x, z, 3, 1.0, fps), atol=1e-4)


@pytest.mark.parametrize("make, t, size, known", HISTORIES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_candidates_that_share_their_past_dream_what_each_dreams_alone(make, t, size, known, guidance):
    world, x = make(), video(3, t, size)
    z = world.lam.encode(x)[0]
    z[:, :known - 1] = z[:1, :known - 1]                        # the actions inside the past are shared too
    one = x[:1, :, :known]
    shared = world.rollout(one, z, 3, guidance, None, Draw(5))
    alone = world.rollout(one.expand(3, -1, -1, -1, -1), z, 3, guidance, None, Draw(5))
    assert torch.allclose(shared, alone, atol=1e-4)


@pytest.mark.parametrize("make, t, size", WORLDS)
@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_a_rollout_is_a_loop_over_step(make, t, size, window):
    world, x, fps = make(), video(3, t, size), torch.tensor([5.0, 10.0, 30.0])
    world.cfg.window = window
    z = world.lam.encode(x)[0]
    past = world.begin(x[:, :, :5], z[:, :4])
    stepped = by_step(world, past, z, Draw(5), t, steps=3, guidance=2.0, fps=fps)
    assert torch.equal(world.rollout(x[:, :, :5], z, 3, 2.0, fps, Draw(5)), stepped)


@pytest.mark.parametrize("make, t, size", WORLDS)
@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_a_shared_past_of_one_row_gives_what_equal_rows_give(make, t, size, window):
    world, x = make(), video(3, t, size)
    world.cfg.window = window
    z = world.lam.encode(x)[0]
    dreams = []
    for b in (1, 3):
        past = world.begin(x[:1, :, :5].expand(b, -1, -1, -1, -1), z[:1, :4].expand(b, -1, -1, -1))
        assert len(past.latents) == b
        dreams.append(by_step(world, past, z, Draw(5), t, steps=3, guidance=2.0))
    assert torch.allclose(*dreams, atol=1e-4)


@pytest.mark.parametrize("make, t, size", WORLDS)
@torch.no_grad()
def test_a_step_adds_one_latent_frame_and_keeps_the_past(make, t, size):
    world, x = make(), video(3, t, size)
    z = world.lam.encode(x)[0]
    past, action = world.begin(x[:, :, :5], z[:, :4]), world.pack(z)[:, -1:]
    longer = world.step(past, action, torch.randn_like(past.latents[:, :, :1]))
    assert longer.latents.shape[2] == past.latents.shape[2] + 1
    assert torch.equal(longer.latents[:, :, :-1], past.latents)
    assert torch.equal(longer.actions, torch.cat([past.actions, action], 1))


@torch.no_grad()
def test_a_window_sees_only_the_last_frames():
    world, x = small_world(), video()
    z = world.lam.encode(x)[0]
    world.cfg.window = 2
    late = world.rollout(x[:, :, :4], z, steps=3, draw=Draw(5))
    x[:, :, :2] = video(seed=3)[:, :, :2]                       # another past before the last two frames
    other = world.rollout(x[:, :, :4], z, steps=3, draw=Draw(5))
    assert torch.equal(late[:, :, 4:], other[:, :, 4:])


# World: loss ------------------------------------------------------------------------------------------------


def test_joint_loss_is_flow_plus_vq():
    loss, out = small_world().train()(video(), Draw(0))
    assert torch.allclose(loss, out["flow"] + out["vq"])
    assert torch.allclose(out["flow"], out["clip_flow"].mean())
    assert out["clip_flow"].shape == (2,)


def test_actions_are_dropped_in_training_alone():
    world, given = small_world(), []
    world.dit.register_forward_pre_hook(lambda module, args: given.append(args[2]))     # (b, l-1, d)
    for training in (True, False):
        world.train(training)
        world(video(64), Draw(0))
    dropped = [(actions == 0).all(2).any().item() for actions in given]
    assert dropped == [True, False]


@pytest.mark.parametrize("draws", [lambda world: world(video()), lambda world: world.rollout(
    video()[:, :, :1], world.lam.encode(video())[0], steps=1)])
def test_unseeded_noise_leaves_the_callers_generator_seeded(draws):
    after = []
    for _ in range(2):
        torch.manual_seed(7)
        draws(small_world(seed=7))
        after.append(torch.rand(1))
    assert torch.equal(*after)


@pytest.mark.parametrize("off, want", [(0.0, 0.0), (0.5, 0.25)])
def test_flow_is_the_mean_square_distance_from_the_exact_velocity(off, want):
    world, x = small_world(), video(8)
    world.dit = Exact(x, off)
    _, out = world(x, Draw(0))
    assert torch.allclose(out["clip_flow"], torch.full((8,), want), atol=1e-5)


@pytest.mark.parametrize("part", ["lam.idm", "lam.vq", "dit.action", "dit.spatial_blocks",
                                  "dit.temporal_blocks"])
def test_joint_loss_reaches_all_parts(part):
    world = small_world().train()
    world(video(), Draw(0))[0].backward()
    assert sum(p.grad.abs().sum() for p in world.get_submodule(part).parameters() if p.grad is not None) > 0


def test_flow_alone_reaches_the_idm():
    world = small_world().train()
    without_vq(world.lam)
    world(video(), Draw(0))[0].backward()
    assert world.lam.idm.out.weight.grad.abs().sum() > 0
    assert world.lam.vq.codebook.grad is None


def fresh_dit():
    """A DiT on pixels whose output alone is no longer at its start, and what it is given."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(64, 4, 2, action_dim=8, action_depth=2, **PIXELS))
    torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.1)
    return dit, video(), torch.rand(2, 6), torch.randn(2, 5, 8, requires_grad=True)


def test_fresh_actions_hardly_disturb_the_generator():
    dit, x, t, actions = fresh_dit()
    plain = dit(x, t)
    assert 0 < (dit(x, t, actions) - plain).std() / plain.std() < 0.1


def test_fresh_actions_move_the_idm():
    dit, x, t, actions = fresh_dit()
    dit(x, t, actions).square().sum().backward()
    assert actions.grad.abs().sum() > 0


def training_step(b):
    """b clips, and what World's loss gives the DiT for them: latents and times (b, l)."""
    world, x, given = small_world(), video(b), []
    world.dit.register_forward_pre_hook(lambda module, args: given.extend(args[:2]))
    world(x, Draw(0))
    return x, *given


@torch.no_grad()
def test_context_is_one_frame_half_the_time_else_any_number():
    _, _, t = training_step(64)
    count = (t == 0).sum(1)                                     # clean frames of each clip
    assert (t[:, 0] == 0).all(), "the first frame is always clean"
    assert set(count.tolist()) == {1, 2, 3, 4, 5}
    assert 0.4 < (count == 1).float().mean() < 0.8              # 1/2, and 1/5 of the other half


@torch.no_grad()
def test_context_is_clean():
    x, x_t, t = training_step(64)
    clean = t == 0                                              # (b, l)
    assert torch.equal(x_t.transpose(1, 2)[clean], x.transpose(1, 2)[clean])
    assert not torch.isclose(x_t, x).transpose(1, 2)[~clean].flatten(1).all(1).any()


@torch.no_grad()
def test_context_carries_no_loss():
    world, x = small_world(), video()
    plain = world(x, Draw(0))[0]

    def spoil(module, args, velocity):
        return velocity + 9 * (args[1] == 0)[:, None, :, None, None]
    world.dit.register_forward_hook(spoil)
    assert torch.equal(world(x, Draw(0))[0], plain)


def test_two_ranks_draw_what_one_draws():
    whole = Draw(1, 2)(torch.randn, 4, 3)
    parts = [Draw(1, 2, rank=r, ranks=2)(torch.randn, 2, 3) for r in range(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_another_step_draws_other_numbers():
    assert not torch.equal(Draw(1, 2)(torch.randn, 4, 3), Draw(1, 3)(torch.randn, 4, 3))


def adapting():
    """A World with an adapter, and its loss as a function of the share of clips that real actions drive."""
    world, x = small_world(), video()
    world.adapter = Adapter(3, world.lam.cfg)

    def loss(share, real):
        world.cfg.real_share = share
        return world(x, Draw(3), real=real)[0]
    return world, x, loss, torch.randn(2, 2, 5, 3)


@torch.no_grad()
def test_adaptation_drives_clips_by_real_actions():
    _, _, loss, (a, b) = adapting()
    assert loss(1.0, a) != loss(1.0, b)


@torch.no_grad()
def test_without_a_share_of_real_actions_nobody_looks_at_them():
    _, _, loss, (a, b) = adapting()
    assert loss(0.0, a) == loss(0.0, b)
    assert loss(0.0, a) == loss(1.0, None)


@torch.no_grad()
def test_clips_driven_by_real_actions_use_nothing_that_was_inferred():
    world, x, loss, (a, _) = adapting()
    given, vq = loss(1.0, a), world.lam.encode(x)[2]
    world.lam.encode = lambda *_: (torch.full((2, 5, 2, 4), 9.0), None, torch.zeros(()))
    assert torch.allclose(loss(1.0, a), given - vq, atol=1e-6)


@pytest.mark.parametrize("make, words", [
    pytest.param(lambda: LAM(LAMConfig(size=10, patch=4)),
                 "LAM: size 10 is not a multiple of its patch 4", id="patch"),
    pytest.param(lambda: small_world().dit(video(), torch.rand(2, 6), torch.zeros(2, 6, 8)),
                 r"actions \(2, 6, 8\), expected \(2, 5, 8\)", id="too many actions"),
    pytest.param(lambda: small_world(tokens=3),
                 "the DiT takes actions of 8 dims, the LAM gives 12", id="tokens"),
    pytest.param(lambda: World(small_world().lam, DiT(DiTConfig(16, 2, 1, action_dim=32, **PIXELS)),
                               load_opensora_vae(VAE)),
                 "the DiT takes latents of 3 channels and 1 pixels, the VAE makes 4 of 8", id="latents"),
])
def test_sizes_that_do_not_fit_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Open-Sora --------------------------------------------------------------------------------------------------
# assets/fixtures holds small checkpoints in the released layout and what Open-Sora's own code makes of them


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@torch.no_grad()
def test_dit_computes_what_open_sora_does(causal, masked):
    io, dit = load_file(f"{STDIT}/io.safetensors"), load_opensora(STDIT, causal, action_dim=8)
    noised = io["in.x_mask"] if masked else torch.ones_like(io["in.x_mask"])    # (b, l)
    want = io["out." + "causal_" * causal + ("masked" if masked else "plain")][:, :4]   # then comes sigma
    velocity = dit(io["in.x"], io["in.timestep"][:, None] / 1000 * noised, fps=io["in.fps"])
    # nobody uses what is predicted for context frames
    assert torch.allclose(velocity.transpose(1, 2)[noised], want.transpose(1, 2)[noised], atol=1e-5)


@pytest.mark.parametrize("shift, name", [("none", "out.causal_sample"),
                                         ("auto", "out.causal_sample_shifted")])
def test_sampler_computes_what_open_sora_does(shift, name):
    io, dit = load_file(f"{STDIT}/io.safetensors"), load_opensora(STDIT, action_dim=0)
    y = sample(dit, io["in.noise"], context=1, shift=shift, fps=io["in.fps"])
    assert torch.allclose(y, io[name], atol=1e-4)


@pytest.mark.parametrize("given, want, go, atol", [
    ("in.video", "out.latent", lambda vae, x: vae.encode(x), 1e-5),
    ("out.latent", "out.video", lambda vae, z: vae.decode(z, 17), 1e-4),
    ("in.video", "out.spatial_latent", lambda vae, x: vae.spatial_vae.encode(x), 1e-5),
    ("out.spatial_latent", "out.spatial_video", lambda vae, z: vae.spatial_vae.decode(z), 1e-4),
], ids=["encode", "decode", "spatial encode", "spatial decode"])
def test_vae_computes_what_open_sora_does(given, want, go, atol):
    io = load_file(f"{VAE}/io.safetensors")
    assert torch.allclose(go(load_opensora_vae(VAE), io[given]), io[want], atol=atol)


def test_latents_that_the_patch_does_not_divide_are_padded():
    x = torch.randn(1, 4, 2, 5, 9)                              # to 6 x 10
    assert load_opensora(STDIT, action_dim=0)(x, torch.rand(1, 2)).shape == x.shape


@pytest.mark.parametrize("place, row, col", [(0, 0, 0), (4, 0, 4), (7, 1, 2), (14, 2, 4)])
def test_position_grid_of_an_odd_aspect_ratio(place, row, col):
    dit = load_opensora(STDIT, action_dim=0)                    # width 48: 12 frequencies; 8 pixels a latent
    scale, base = (40 * 72) ** 0.5 / 512, round(15 ** 0.5)
    frequency = 10000 ** (-np.arange(12) / 12)
    x, y = (n / scale * base / count * frequency for n, count in ((col, 5), (row, 3)))
    want = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)]).astype(np.float32)
    got = dit.position(3, 5, 5, 9, "cpu")[place]                # 3 x 5 tokens of 5 x 9 latents
    assert torch.allclose(got, torch.from_numpy(want), atol=1e-5)


def chunked():
    """Open-Sora's VAE, clips of a chunk of 17 frames and 4 more, 16 x 24 pixels, and their latents."""
    vae, x = load_opensora_vae(VAE), video(2, 21, 24)[:, :, :, :16]
    return vae, x, vae.encode(x)


def test_21_frames_have_6_latent_frames():
    vae, x, z = chunked()
    assert z.shape == (2, 4, 6, 2, 3)
    assert vae.decode(z, 21).shape == x.shape


def test_vae_works_in_chunks_of_17_frames():
    vae, x, z = chunked()
    assert torch.equal(z[:, :, :5], vae.encode(x[:, :, :17]))
    assert torch.allclose(z[:, :, 5:], vae.encode(x[:, :, 17:]), atol=1e-5)


def test_the_first_latent_of_a_chunk_stands_for_its_first_frame_alone():
    vae, x, z = chunked()
    x[:, :, 1] = 0
    first, second = (vae.encode(x) - z).abs().amax((0, 1, 3, 4))[:2]
    # convolutions are causal and pad in front, but the norms leak a little over the chunk
    assert 0 < first < second / 5


def test_vae_draws_from_its_posterior_if_asked():
    vae, x, z = chunked()
    torch.manual_seed(0)
    assert not torch.equal(vae.encode(x, sample=True), z)


def test_vae_names_frames_of_a_wrong_size():
    with pytest.raises(ValueError, match="frames of 20x16: the VAE needs multiples of 8"):
        load_opensora_vae(VAE).encode(torch.zeros(1, 3, 1, 20, 16))


def test_vae_names_a_wrong_number_of_latent_frames():
    with pytest.raises(ValueError, match="5 latent frames, but 21 frames have 6"):
        load_opensora_vae(VAE).decode(torch.zeros(1, 4, 5, 2, 2), 21)


def opensora_world():
    """A World around Open-Sora's tiny weights, with a fresh LAM and fresh action modules."""
    torch.manual_seed(0)
    lam = LAM(LAMConfig(size=8, patch=4, width=16, depth=1, heads=2, fdm_depth=0))
    return World(lam, load_opensora(STDIT), load_opensora_vae(VAE), FlowConfig())


@torch.no_grad()
def test_fresh_actions_hardly_disturb_open_sora():
    world, io = opensora_world(), load_file(f"{STDIT}/io.safetensors")
    x, t = io["in.x"], io["in.timestep"][:, None] / 1000 * io["in.x_mask"]
    actions = world.pack(world.lam.encode(video(2, 17))[0])
    plain, acted = (world.dit(x, t, a)[:, :, 1:] for a in (None, actions))      # the first frame is context
    assert 0 < (acted - plain).std() / plain.std() < 0.02


@pytest.mark.parametrize("weight", ["out.weight", "queries", "patch.weight"])
def test_open_soras_flow_reaches_the_idm(weight):
    world = opensora_world()
    without_vq(world.lam)
    world(video(1, 17, 16), Draw(1))[0].backward()              # Draw(0) drops the actions of the clip
    assert world.lam.idm.get_parameter(weight).grad.abs().sum() > 0


def test_frames_that_the_temporal_stride_does_not_fit_are_named():
    with pytest.raises(ValueError, match="clips of 16 frames: this VAE needs 5, 9, 13, 17, 21, 25, 29, 33"):
        opensora_world()(video(1, 16, 16))


# weights that others released -------------------------------------------------------------------------------


def test_our_models_are_of_the_released_sizes(tmp_path):
    sizes = released(tmp_path)                                  # the released files are 4.84 and 1.57 GB
    assert 4.7e9 < sizes["stdit"] < 4.9e9
    assert 1.5e9 < sizes["vae"] < 1.6e9


LOAD = """
import resource, sys
from dit import load_opensora
from vae import load_opensora_vae

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

name, path = sys.argv[1:]
before = peak()
model = load_opensora(path) if name == "stdit" else load_opensora_vae(path)
print(sum(4 * p.numel() for p in model.parameters()), peak() - before)
"""


@pytest.mark.parametrize("name, words", [("stdit", "904.07 M parameters loaded"), ("vae", "")],
                         ids=["stdit", "vae"])
def test_full_size_weights_need_no_more_memory_than_the_model(name, words, tmp_path):
    released(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, name, tmp_path / name], cwd=HERE, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    size, peak = map(int, last.split())
    assert peak < 1.1 * size
    assert words in "".join(said)


FORMS = {"folder": STDIT, ".safetensors": f"{STDIT}/model.safetensors", ".pt": "w.pt", ".pth": "w.pth",
         ".pt of old": "old.pt"}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_same_from_every_form_of_file(form, tmp_path):
    tensors = load_file(f"{STDIT}/model.safetensors")
    path = tmp_path / FORMS[form]                               # an absolute path stays as it is
    if path.parent == tmp_path:
        torch.save(tensors, path, _use_new_zipfile_serialization=path.name != "old.pt")
    loaded = load_opensora(path, action_dim=0).state_dict()
    assert [name for name, w in loaded.items() if not torch.equal(w, tensors[name])] == []


BAD_WEIGHTS = {
    "missing": "1 tensors missing, e.g. spatial_blocks.1.attn.qkv.weight",
    "extra": "1 tensors unexpected, e.g. spatial_blocks.1.attn.lora",
    "shape": "1 tensors of another shape, e.g. spatial_blocks.1.attn.qkv.weight (143, 48) instead of "
             "(144, 48)",
    "truncated": "cannot be read as weights",
    "code": "cannot be read as weights",
    "list": "not a state dict",
    "folder": "not a released folder",
}


def mistreat(how, folder):
    """Open-Sora's tiny DiT with something wrong; its path."""
    tensors, name = load_file(f"{STDIT}/model.safetensors"), "spatial_blocks.1.attn.qkv.weight"
    if how == "folder":
        return str(folder)                                      # an empty one
    if how in ("code", "list"):                                 # a pickle that names a function
        torch.save({"x": os.getcwd} if how == "code" else list(tensors.values()), folder / "w.pt")
        return str(folder / "w.pt")
    if how == "missing":
        del tensors[name]
    if how == "extra":
        tensors["spatial_blocks.1.attn.lora"] = torch.zeros(2)
    if how == "shape":
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "w.safetensors")
    if how == "truncated":
        os.truncate(folder / "w.safetensors", 500000)
    return str(folder / "w.safetensors")


@pytest.mark.parametrize("how", BAD_WEIGHTS)
def test_bad_weights_are_an_error_of_one_line(how, tmp_path):
    with pytest.raises(ValueError) as error:
        load_opensora(mistreat(how, tmp_path))
    assert BAD_WEIGHTS[how] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("how", BAD_WEIGHTS)
def test_bad_weights_stop_the_command_line_before_anything_is_written(how, tmp_path):
    path = mistreat(how, tmp_path)
    done = run("train.py", "--dit_weights", path, "--vae_weights", VAE, "--frames", 5, "--eval_frames", 5,
               cwd=tmp_path, ok=False)
    assert BAD_WEIGHTS[how] in complaint(done)
    assert not (tmp_path / "out").exists()


class Mkdir:
    """Pickled: an order to make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickled_code_runs(tmp_path):
    torch.save({"x": Mkdir(tmp_path / "made")}, tmp_path / "w.pt")
    with open(tmp_path / "plain.pt", "wb") as f:
        pickle.dump({"x": Mkdir(tmp_path / "made")}, f, protocol=2)
    for file in ("w.pt", "plain.pt"):
        with pytest.raises(ValueError, match="more than tensors"):
            load_opensora(tmp_path / file)
        assert not (tmp_path / "made").exists(), file


@pytest.mark.parametrize("content", [
    pytest.param({}, id="empty"),
    pytest.param(torch.zeros(2), id="tensor"),
    pytest.param({"model": {"w": torch.zeros(2)}}, id="nested"),
    pytest.param({"w": torch.zeros(2), "step": 3}, id="number"),
    pytest.param({0: torch.zeros(2)}, id="unnamed"),
])
def test_what_is_no_dict_of_tensors_by_name_is_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    _, read = weights.open_weights(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: not a state dict \(tensors by name\)"):
        read()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_with_half_of_a_release_is_none(file, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match="which holds config.json and model.safetensors"):
        weights.open_weights(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"[1, 2]", b"null", b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json: not a JSON object"):
        weights.open_weights(tmp_path)


def test_the_config_beside_a_file_is_read_and_may_be_missing(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    config, read = weights.open_weights(tmp_path / "w.safetensors")
    assert config == {}
    assert read()["w"].shape == (2,)
    (tmp_path / "config.json").write_text('{"depth": 3}')
    assert weights.open_weights(tmp_path / "w.safetensors")[0] == {"depth": 3}


@pytest.mark.parametrize("load", [load_opensora, load_opensora_vae])
def test_weights_that_are_not_there_are_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
        load(tmp_path / "nothing")


def test_a_vae_is_no_dit():
    with pytest.raises(ValueError, match="not an STDiT3"):
        load_opensora(VAE)


def test_a_dit_is_no_vae():
    with pytest.raises(ValueError, match="tensors missing"):
        load_opensora_vae(STDIT)


def vae_with_config(folder, config):
    """Open-Sora's tiny VAE with another config.json"""
    save_file(load_file(f"{VAE}/model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_vae_whose_config_names_no_sizes_is_of_the_released_ones(tmp_path):
    path = vae_with_config(tmp_path, {"vae_2d": {}, "vae_temporal": {}})        # as in the released one
    words = r"of another shape, e.g. \S+ \(8, 3, 3, 3\) instead of \(128, 3, 3, 3\)"
    with pytest.raises(ValueError, match=words):
        load_opensora_vae(path)


def test_a_vae_config_of_impossible_sizes_is_named(tmp_path):
    path = vae_with_config(tmp_path, {"spatial": {"norm_num_groups": 7}})
    with pytest.raises(ValueError, match="config.json does not fit"):
        load_opensora_vae(path)


# the small VAE of frames ------------------------------------------------------------------------------------

VAE_RUN = ["--mode", "vae", "--name", "vae", "--frames", "2", "--patch", "1", *SMALL, "--vae_steps", "8"]


def test_a_frame_vae_learns_frames_and_standardises_their_latents():
    torch.manual_seed(0)
    vae, frames = FrameVAE(channels=8, width=8), to_video(ToyClips("cross", 16, 2)[range(64)]["video"])
    before = psnr(vae.eval().decode(vae.encode(frames), 2), frames).mean()
    optimizer = torch.optim.AdamW(vae.train().parameters(), 3e-3)
    for step in range(150):
        loss, _ = vae(frames[16 * (step % 4):][:16], Draw(0, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    z = vae.eval().encode(frames)
    assert z.shape == (64, 8, 2, 2, 2)
    assert psnr(vae.decode(z, 2), frames).mean() > before + 8
    assert vae.decode(z, 1).shape == (64, 3, 1, 16, 16)
    std, mean = torch.std_mean(vae.encode(frames, sample=True), (0, 2, 3, 4))
    assert (std - 1).abs().max() < 0.4 and mean.abs().max() < 0.4


def test_the_loss_of_a_frame_vae_is_its_error_plus_beta_times_torchs_kl():
    torch.manual_seed(0)
    vae, frames = FrameVAE(channels=8, width=8, beta=0.5), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    loss, out = vae(frames, Draw(0))
    mean, logvar = vae.moments(frames).chunk(2, 1)
    unit = torch.distributions.Normal(0, 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), unit).mean()
    torch.testing.assert_close(out["kl"], kl.detach())
    torch.testing.assert_close(loss, out["mse"] + 0.5 * kl)


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    run("train.py", *VAE_RUN, cwd=folder)
    return folder


def test_a_run_trains_a_vae_and_shows_what_it_makes_of_frames(vae_run):
    rows = [json.loads(line) for line in open(vae_run / "out/vae/metrics.jsonl")]
    assert rows[-1]["event"] == "result" and 0 < rows[-1]["psnr_vae"] < 40
    assert {"mse", "kl"} <= rows[0].keys()
    assert imageio.imread(vae_run / "out/vae/samples/000008.gif").shape[-1] == 3
    fresh = build(parse(VAE_RUN))
    state = load_checkpoint(str(vae_run / "out/vae"))
    assert [k for k, v in fresh.dit.state_dict().items() if not torch.equal(v, state["dit"][k])] == []
    moved = [not torch.equal(v, state["vae"][k]) for k, v in fresh.vae.state_dict().items()]
    assert all(moved)


def test_a_run_of_a_vae_goes_on_bit_equal(vae_run):
    run("train.py", *VAE_RUN, "--name", "half", "--vae_steps", 8, "--ckpt_every", 4, "--keep", 3, cwd=vae_run)
    os.remove(vae_run / "out/half/ckpt.pt")
    run("train.py", "--resume", "out/half", cwd=vae_run)
    a, b = (load_checkpoint(str(vae_run / "out" / name)) for name in ("vae", "half"))
    assert [k for k, v in a["vae"].items() if not torch.equal(v, b["vae"][k])] == []


def test_a_world_carries_the_vae_that_it_was_trained_with(vae_run):
    run("train.py", "--name", "latent", *SMALL, "--patch", 1, "--vae_weights", "out/vae", "--pretrain", 2,
        "--warmup", 2, "--e2e", 2, cwd=vae_run)
    trained = load_checkpoint(str(vae_run / "out/vae"))["vae"]
    os.rename(vae_run / "out/vae", vae_run / "out/elsewhere")
    try:
        world = load_world(str(vae_run / "out/latent"))
        run("train.py", "--resume", "out/latent", "--e2e", 3, cwd=vae_run)
    finally:
        os.rename(vae_run / "out/elsewhere", vae_run / "out/vae")
    assert [k for k, v in world.vae.state_dict().items() if not torch.equal(v, trained[k])] == []
    dit = world.dit.cfg
    assert (dit.channels, dit.out_channels, dit.pixel_stride) == (16, 16, 8)


def test_an_oracle_plans_by_the_latents_of_a_vae(vae_run):
    done = run("plan.py", "--oracle", "--task", "reach", "--pairs", 2, "--seeds", 0, "--samples", 8, "--cost",
               "latent-last", "--vae_weights", "out/vae", "--out", "plan", cwd=vae_run)
    assert "cost latent-last, " in done.stdout
    results = json.loads((vae_run / "plan/results.json").read_text())
    assert results["protocol"]["plan"]["cost"] == "latent-last"
    assert results["protocol"]["plan"]["vae_weights"] == "out/vae"
    assert len(results["tables"]["plan"]["reach oracle"]["robot nearer"]) == 1


def test_latents_that_are_compared_are_those_of_the_world(monkeypatch):
    args = argparse.Namespace(cost="latent", classifier=None, vae_weights="v", look="fast")
    world = small_world()
    world.vae = FrameVAE(channels=8, width=8)
    assert cost.open_cost(args, world, "cpu").vae is world.vae
    alone, args.look = FrameVAE(channels=8, width=8), "published"
    monkeypatch.setattr(cost, "load_vae", lambda path: (alone, "published"))
    assert cost.open_cost(args, None, "cpu").vae is alone
    monkeypatch.setattr(cost, "load_vae", lambda path: (alone, "fast"))
    with pytest.raises(UserError, match="--vae_weights v has fast, --look has published; take one"):
        cost.open_cost(args, None, "cpu")


def test_latents_of_a_frame_vae_are_cached(vae_run):
    args = ["--vae_weights", "out/vae", *SMALL, "--patch", 1, "--pretrain", 2, "--warmup", 0, "--e2e", 2]
    run("train.py", "--name", "plain", *args, cwd=vae_run)
    run("train.py", "--name", "cached", *args, "--latent_cache", "cache", cwd=vae_run)
    assert os.listdir(vae_run / "cache")
    plain, cached = (load_checkpoint(str(vae_run / "out" / name))["dit"] for name in ("plain", "cached"))
    for k, v in plain.items():
        torch.testing.assert_close(cached[k], v, rtol=1e-4, atol=1e-5)


def test_frames_too_small_for_ssim_have_none():
    vae, heldout = FrameVAE(channels=4, width=8).eval(), ToyClips("cross", 8, 2, split="heldout")
    numbers, _ = judge.reconstruct(vae, heldout, 2)
    assert numbers["psnr_vae"] > 0 and "ssim_vae" not in numbers


def test_a_run_without_a_vae_of_its_own_brings_none(vae_run):
    run("train.py", "--name", "pixels", *SMALL, "--mode", "pretrain", "--pretrain", 1, cwd=vae_run)
    done = run("train.py", "--vae_weights", "out/pixels", *SMALL, "--patch", 1, cwd=vae_run, ok=False)
    assert "out/pixels: has no VAE of its own" in complaint(done)


# latents of clips on the disk -------------------------------------------------------------------------------


def as_video(clips):
    """uint8 (b, t, h, w, 3) -> (b, 3, t, h, w) in [-1, 1]"""
    return clips.permute(0, 4, 1, 2, 3) / 127.5 - 1


def vae_and_clips():
    torch.manual_seed(0)
    return load_opensora_vae(VAE), torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8)


@pytest.fixture
def kept(tmp_path):
    """A VAE, three clips, their latents; and the folder of a LatentCache that has seen them."""
    vae, clips = vae_and_clips()
    LatentCache(vae, tmp_path).encode(clips, as_video(clips))
    return vae, clips, vae.encode(as_video(clips)), tmp_path


def test_latent_cache_encodes_as_the_vae_does_and_keeps_a_file_a_clip(tmp_path):
    vae, clips = vae_and_clips()
    z = LatentCache(vae, tmp_path).encode(clips, as_video(clips))
    assert torch.allclose(z, vae.encode(as_video(clips)), atol=1e-6)
    assert len(os.listdir(tmp_path)) == 3


def test_kept_latents_are_found_without_asking_the_vae(kept):
    vae, clips, want, folder = kept
    cache = LatentCache(vae, folder)
    cache.vae = None
    assert torch.allclose(cache.encode(clips[[2, 0]], as_video(clips[[2, 0]])), want[[2, 0]], atol=1e-6)


def test_a_clip_that_differs_in_one_value_is_not_taken_for_the_kept_one(kept):
    vae, clips, _, folder = kept
    clips[1, 0, 0, 0, 0] += 1
    z = LatentCache(vae, folder).encode(clips, as_video(clips))
    assert len(os.listdir(folder)) == 4
    assert torch.allclose(z, vae.encode(as_video(clips)), atol=1e-6)


def test_latents_of_another_precision_are_not_taken_for_this_ones(kept):
    vae, clips, want, folder = kept
    with Process(precision="bf16").autocast():
        z = LatentCache(vae, folder).encode(clips, as_video(clips))
    assert not torch.allclose(z, want, atol=1e-6)
    assert len(os.listdir(folder)) == 6


def test_latents_of_another_vae_are_not_taken_for_this_ones(kept):
    vae, clips, want, folder = kept
    vae.shift += 1
    z = LatentCache(vae, folder).encode(clips[:1], as_video(clips[:1]))
    assert torch.allclose(z, want[:1] - 1 / vae.scale, atol=1e-5)


# the toy world ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toy.EMBODIMENTS)
def test_a_toy_clip_has_an_action_and_an_effect_for_each_step(name):
    frames, actions, effects = toy.robot_clips(name, range(20), 0, 8, 20)
    assert frames.shape == (20, 8, 20, 20, 3)
    assert frames.dtype == np.uint8
    assert actions.shape == (20, 7, toy.EMBODIMENTS[name].action_dim)
    assert effects.shape == (20, 7)


NOTHING_MOVED = 4                           # of the nine effects 3 (dx + 1) + dy + 1


@pytest.mark.parametrize("name", toy.EMBODIMENTS)
def test_toy_action_t_changes_frame_t_plus_one_first(name):
    frames, _, effects = toy.robot_clips(name, range(20), 0, 8, 20)
    changed = (frames[:, 1:] != frames[:, :-1]).any((2, 3, 4))
    assert np.array_equal(changed, effects != NOTHING_MOVED)


@pytest.mark.parametrize("name", toy.EMBODIMENTS)
def test_where_a_toy_robot_moves_it_moves_as_its_action_asks(name):
    _, actions, effects = toy.robot_clips(name, range(20), 0, 8, 20)
    asked = toy.ToyWorld(name, range(1)).move_of(actions.reshape(140, -1))
    asked = 3 * (asked[:, 0] + 1) + asked[:, 1] + 1
    effects = effects.reshape(140)
    moved = effects != NOTHING_MOVED
    assert moved.sum() > 30
    assert np.array_equal(effects[moved], asked[moved])


@pytest.mark.parametrize("name", toy.EMBODIMENTS)
def test_toy_actions_ask_for_the_moves_they_were_made_for(name):
    want = np.tile(toy.MOVES, (20, 1))
    world = toy.ToyWorld(name, range(100))
    actions = world.action_for(want, np.random.default_rng(0).random((100, 2)))
    assert np.array_equal(world.move_of(actions), want)


RIGHT = np.array([[1.0, 0]])                # an action of the embodiment "slide"


def toy_table(*places):
    """A table of 5 x 5 cells: robot and two blocks at these places (x, y)."""
    world = toy.ToyWorld("slide", range(1), size=20)
    world.set_state([places])
    return world


@pytest.mark.parametrize("before, after", [
    pytest.param([[1, 1], [4, 2], [0, 4]], [[2, 1], [4, 2], [0, 4]], id="moves-where-it-is-free"),
    pytest.param([[1, 1], [2, 1], [0, 4]], [[2, 1], [3, 1], [0, 4]], id="pushes-a-block"),
    pytest.param([[4, 1], [2, 1], [0, 4]], [[4, 1], [2, 1], [0, 4]], id="stops-at-the-wall"),
    pytest.param([[1, 1], [2, 1], [3, 1]], [[1, 1], [2, 1], [3, 1]], id="cannot-push-two-blocks"),
])
def test_a_toy_robot_that_steps_to_the_right(before, after):
    assert toy_table(*before).step(RIGHT).tolist() == [after]


def test_a_toy_block_that_is_pushed_on_and_on_stops_at_the_wall():
    world = toy_table([1, 1], [2, 1], [0, 4])
    for _ in range(4):
        world.step(RIGHT)
    assert world.get_state().tolist() == [[[3, 1], [4, 1], [0, 4]]]


def test_a_toy_state_that_is_set_again_gives_the_same_picture():
    world = toy_table([1, 1], [2, 1], [0, 4])
    state, picture = world.get_state(), world.render()
    world.step(RIGHT)
    assert not np.array_equal(world.render(), picture)
    world.set_state(state)
    assert np.array_equal(world.render(), picture)


@pytest.mark.parametrize("task", toy.TASKS)
def test_a_toy_task_has_the_same_starts_and_goals_each_time(task):
    (world, goal), (again, same) = (toy.task_pairs(task, "held-out", size=20) for _ in range(2))
    assert np.array_equal(goal, same)
    assert np.array_equal(world.get_state(), again.get_state())


@pytest.mark.parametrize("task", toy.TASKS)
def test_toy_tasks_start_unsolved(task):
    world, goal = toy.task_pairs(task, "held-out", size=20)
    assert not world.success(task, goal).any()


@pytest.mark.parametrize("task", toy.TASKS)
def test_the_goals_of_toy_tasks_solve_them(task):
    world, goal = toy.task_pairs(task, "held-out", size=20)
    world.set_state(goal)
    assert world.success(task, goal).all()


def test_a_toy_clip_is_the_same_in_whatever_batch_it_is_drawn():
    source = clips("toy", 20, 4)
    assert torch.equal(source[range(300)]["video"][7], source[[7]]["video"][0])


@pytest.mark.parametrize("other", [dict(split="heldout"), dict(seed=1)], ids=["split", "seed"])
def test_toy_clips_of_another_split_or_seed_are_others(other):
    clip = clips("toy", 20, 4)[[7]]["video"]
    assert not torch.equal(clips("toy", 20, 4, **other)[[7]]["video"], clip)


@pytest.mark.parametrize("make", [functools.partial(toy.robot_clips, "slide"), toy.web_clips],
                         ids=["robots", "web"])
def test_long_toy_clips_begin_as_short_ones_do(make):
    long, short = (make(range(3), 0, frames, 8) for frames in (500, 20))
    for a, b in zip(long, short) if isinstance(long, tuple) else [(long, short)]:
        assert len(a[0]) - len(b[0]) == 480
        assert np.array_equal(a[:, :len(b[0])], b)


def test_toy_robots_are_mixed_30_20_50():
    which = clips("toy", 20, 4)[range(300)]["source"]
    share = torch.bincount(which) / 300
    torch.testing.assert_close(share, torch.tensor([0.3, 0.2, 0.5]), atol=0.08, rtol=0)


def test_ranks_share_each_batch():
    source = ToyClips("cross", 20, 2)
    whole = [batch["video"] for batch in loader(source, 8, 3, 5)]
    first, second = ([batch["video"] for batch in loader(source, 8, 3, 5, rank, 2)] for rank in range(2))
    assert len(whole) == 2
    for batch, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(batch, torch.cat([a, b]))


# films ------------------------------------------------------------------------------------------------------


def lengths(source):
    """The frames of a source's episodes"""
    return [episode.n for episode in source.episodes]


def test_a_batch_of_films_has_the_size_that_is_asked_for(films):
    assert Episodes(str(films), 20, 8)[range(5)]["video"].shape == (5, 8, 20, 20, 3)


def test_clips_have_the_rate_of_their_film(films):
    assert (Episodes(str(films / "a.mp4"), 20, 8)[range(5)]["fps"] == 12).all()
    assert Episodes(str(films), 20, 8)[range(5)]["fps"].min() == 12


def test_a_film_too_short_for_a_clip_is_skipped_with_the_reason(films):
    skipped = Episodes(str(films), 20, 8).skipped
    assert list(skipped) == [str(films / "a-short.gif")]
    assert "3 frames, too short" in skipped[str(films / "a-short.gif")]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with two subfolders of 40 films each, named after what is in them"""
    folder = tmp_path_factory.mktemp("many")
    write_film(folder / "film.mp4", shades(8))
    for i in range(80):
        file = folder / ("push", "slide")[i // 40] / f"{i:02d}.mp4"
        file.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "film.mp4", file)
    os.remove(folder / "film.mp4")
    return folder


def parts(path, **options):
    """The names of the episodes of a source that are trained on, and of those that are held out"""
    return [{episode.name for episode in Episodes(str(path), 8, 2, split=split, **options).episodes}
            for split in ("train", "heldout")]


def share(name):
    """What decides on an episode, written anew: its hash as a fraction of the largest one"""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 16 ** 64


def test_about_a_tenth_of_a_folder_of_films_is_held_out_by_their_names(many):
    every = {f"{('push', 'slide')[i // 40]}/{i:02d}.mp4" for i in range(80)}
    held = {name for name in every if share(name) < 0.1}
    assert 4 <= len(held) <= 12
    assert {name[0] for name in held} == {"p", "s"}             # whatever the alphabet
    assert parts(many) == [every - held, held]


def test_another_place_seed_or_order_holds_out_the_same_films(many, tmp_path, monkeypatch):
    other = shutil.copytree(many, tmp_path / "elsewhere/other name", ignore=shutil.ignore_patterns(".cola*"))
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listed(folder), key=share))
    assert parts(other, seed=3) == parts(many)


def test_a_film_stays_in_its_part_when_others_are_added(many, tmp_path):
    grown = shutil.copytree(many, tmp_path / "grown")
    for i in range(80, 120):
        shutil.copy(many / "push/00.mp4", grown / f"{i}.mp4")
    for before, after in zip(parts(many), parts(grown)):
        assert {name for name in after if "/" in name} == before


@pytest.mark.parametrize("names, held", [
    pytest.param("abcdefgu", "du", id="those-below-a-tenth"),   # 0.79 0.24 0.18 0.096 0.25 0.15 0.80 0.05
    pytest.param("abcefg", "f", id="none-is-the-smallest-goes"),
    pytest.param("psu", "su", id="all-are-the-largest-stays"),  # 0.08 0.02 0.05
])
def test_of_few_episodes_some_are_held_out_and_some_trained_on(names, held):
    found = [episodes.Episode(name, name, {}, 0, 9) for name in names]
    assert "".join(e.name for e in episodes.part_of(found, "heldout")) == held
    assert {e.name for e in episodes.part_of(found, "train")} == set(names) - set(held)


@pytest.mark.parametrize("split, half", [
    pytest.param("train", slice(10), id="train"),
    pytest.param("heldout", slice(10, 20), id="heldout"),
])
def test_of_a_single_film_the_second_half_is_held_out(split, half, films):
    """A clip of ten frames fills a half: its frames, the middle square of the film's, and their actions."""
    batch = Episodes(str(films / "a.mp4"), 48, 10, split=split)[range(8)]
    want = moving_squares()[half, 24:72]
    error = np.abs(batch["video"].numpy().astype(int) - want).mean()
    assert error < 4                        # H.264 makes an error of 2, another frame one of 6
    assert batch["actions"][:, :, 0].tolist() == [list(range(0, 38, 2))[half][:9]] * 8


UNEVEN = np.random.default_rng(0).integers(3, 40, 40).cumsum()
FILMS = {                                   # ending, height and width, and how it is written
    "mp4": ("mp4", (32, 32), dict(g=7)),
    "mp4-with-b-frames": ("mp4", (32, 32), dict(g=250, bf=3)),
    "mp4-with-sound": ("mp4", (32, 32), dict(g=5, sound=True)),
    "mp4-of-uneven-times": ("mp4", (32, 32), dict(times=UNEVEN)),
    "mp4-of-odd-sides": ("mp4", (33, 47), {}),
    "mov-very-wide": ("mov", (16, 400), {}),
    "mkv": ("mkv", (32, 32), dict(g=9)),
    "webm": ("webm", (32, 32), dict(codec="libvpx-vp9", g=6)),
    "gif": ("gif", (32, 32), {}),
}


@pytest.fixture(scope="module", params=FILMS.values(), ids=FILMS)
def film(request, tmp_path_factory):
    """A film whose 40 frames tell their numbers: its file, and the frames (40, h, w, 3) decoded in order."""
    end, (h, w), options = request.param
    file = str(tmp_path_factory.mktemp("film") / f"film.{end}")
    if end == "gif":
        imageio.imwrite(file, shades(40, h, w), duration=100, loop=0)
    else:
        write_film(file, shades(40, h, w), **options)
    with av.open(file) as container:
        return file, np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_the_index_of_a_film_counts_its_frames_and_pixels(film):
    file, frames = film
    info = inspect_video(file)
    assert info["n"] == 40
    assert len(frames) == 40
    assert info["hw"] == list(frames.shape[1:3])


def test_seeking_gives_the_very_frames_of_decoding_from_the_start(film):
    file, frames = film
    info = inspect_video(file)
    for wanted in ([0, 1], [39], [13, 14, 15], [2, 20, 38], [7], [35, 36]):
        found = read_video(file, info, np.array(wanted))
        assert np.array_equal(found, frames[wanted]), f"frames {wanted}"


def test_a_late_frame_is_reached_from_the_key_frame_before_it_but_in_a_gif(film, monkeypatch):
    """The frames of a GIF build on each other."""
    file, frames = film
    seeks, decode = [], formats.decode

    def watched(file, pts, seek, fit):
        seeks.append(seek)
        return decode(file, pts, seek, fit)
    monkeypatch.setattr(formats, "decode", watched)
    assert np.array_equal(read_video(file, inspect_video(file), np.array([39])), frames[[39]])
    assert seeks == [not file.endswith(".gif")]


def test_a_clip_has_consecutive_frames(film):
    clip = Episodes(film[0], 8, 5)[range(6)]
    assert clip["video"].shape == (6, 5, 8, 8, 3)
    assert (told(clip).diff(dim=1) == 1).all()


# actions beside films ---------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2 ** 30], ids=["read-anew", "kept"])
def memory(request, monkeypatch):
    """Clips are read on their own each time, or taken from decoded episodes that stay in memory."""
    monkeypatch.setattr(episodes, "MEMORY", request.param)


@pytest.fixture(scope="module", params=["npz", "npy", "json"])
def acted(request, tmp_path_factory):
    """A folder of two films whose frame t tells t, and actions in a file of this ending: action t is t."""
    folder = tmp_path_factory.mktemp("acted")
    for name in "ab":
        write_film(folder / f"{name}.mp4", shades(20))
        write_actions(folder / f"{name}.{request.param}", counting(20))
    return folder


def test_action_t_leads_from_frame_t_to_the_next(acted, memory):
    batch = Episodes(str(acted), 32, 5)[range(20)]
    assert torch.equal(batch["actions"][..., 0], told(batch)[:, :-1])


SKIPPING = pytest.mark.parametrize("options", [{"stride": "3"}, {"fps": "3.4"}], ids=["stride", "fps"])


@SKIPPING
def test_actions_of_skipped_frames_are_summed(options, acted, memory):
    batch = Episodes(str(acted), 32, 5, options=options)[range(20)]
    numbers = told(batch).int().tolist()
    sums = [[sum(range(a, b)) for a, b in zip(row[:-1], row[1:])] for row in numbers]
    assert batch["actions"][..., 0].tolist() == sums


@SKIPPING
def test_instead_the_last_action_of_skipped_frames_can_be_taken(options, acted, memory):
    batch = Episodes(str(acted), 32, 5, options=options | {"actions": "last"})[range(20)]
    assert torch.equal(batch["actions"][..., 0], told(batch)[:, 1:] - 1)


def test_a_stride_takes_every_so_many_frames_and_divides_the_rate(acted, memory):
    batch = Episodes(str(acted), 32, 5, options={"stride": "3"})[range(20)]
    assert (told(batch).diff(dim=1) == 3).all()
    assert batch["fps"].tolist() == pytest.approx([10 / 3] * 20)


def test_a_rate_takes_the_frames_nearest_to_it(acted, memory):
    batch = Episodes(str(acted), 32, 5, options={"fps": "3.4"})[range(20)]
    numbers = told(batch)
    steps = (torch.arange(5) * 10 / 3.4).round()                # 0, 3, 6, 9, 12
    assert torch.equal(numbers - numbers[:, :1], steps.expand(20, -1))
    assert batch["fps"].tolist() == pytest.approx([3.4] * 20)


def test_during_a_pause_in_a_film_the_last_action_holds(tmp_path):
    """The same frame is then the nearest one twice."""
    write_film(tmp_path / "pause.mp4", shades(20), times=[10 * i + 60 * (i > 9) for i in range(20)])
    write_actions(tmp_path / "pause.npy", counting(20))
    batch = clips(f"{tmp_path}/pause.mp4@fps=5@actions=last", 8, 4, split="all")[range(30)]
    assert (told(batch).diff(dim=1) == 0).any()
    assert torch.equal(batch["actions"][..., 0], told(batch)[:, 1:] - 1)


# HDF5 -------------------------------------------------------------------------------------------------------

FRONT = {"camera": "agentview_image"}


@pytest.fixture
def demos(tmp_path):
    """A folder with a robomimic file of four demonstrations."""
    needs("h5py")
    robomimic(tmp_path / "a.hdf5")
    return tmp_path


def test_of_several_cameras_one_must_be_chosen(demos):
    with pytest.raises(UserError, match="@camera=agentview_image or @camera=wrist_image"):
        Episodes(str(demos), 32, 4)


def test_robomimic_frames_are_exact(demos):
    batch = Episodes(str(demos), 32, 4, options=FRONT)[range(10)]
    numbers = told(batch)[:, :, None, None, None]
    assert (batch["video"] == 6 * numbers).all()                # nothing is encoded


def test_robomimic_actions_lead_from_their_frames(demos):
    source = Episodes(str(demos), 32, 4, options=FRONT)
    assert source.labelled
    batch = source[range(10)]
    assert torch.equal(batch["actions"][..., 0], 2 * told(batch)[:, :-1])


def test_a_robomimic_file_tells_its_rate(demos):
    assert (Episodes(str(demos), 32, 4, options=FRONT)[range(10)]["fps"] == 20).all()


def test_a_robomimic_file_that_does_not_tell_its_rate_is_taken_for_24(demos):
    import h5py
    with h5py.File(demos / "a.hdf5", "a") as f:
        f["data"].attrs["env_args"] = "null"
    assert (Episodes(str(demos), 32, 4, options=FRONT)[range(10)]["fps"] == 24).all()


@pytest.mark.parametrize("camera", ["agentview_image", "wrist_image"])
def test_demonstrations_are_held_out_one_by_one_whichever_the_camera(camera, demos):
    robomimic(demos / "f.hdf5", 16)
    every = {f"a.hdf5:demo_{i}" for i in range(4)} | {f"f.hdf5:demo_{i}" for i in range(16)}
    held = {name for name in every if share(name) < 0.1}
    assert {name[0] for name in held} == {"a", "f"}
    assert parts(demos, options={"camera": camera}) == [every - held, held]


def test_a_file_of_demonstrations_is_divided_alone_as_in_its_folder(demos):
    robomimic(demos / "f.hdf5", 16)
    alone, together = (parts(demos / name, options=FRONT) for name in ("a.hdf5", ""))
    assert alone == [{name for name in part if name[0] == "a"} for part in together]
    assert alone[1] == {"a.hdf5:demo_3"}


def test_a_split_of_the_files_own_can_be_chosen(demos):
    source = clips(f"{demos}/a.hdf5@camera=agentview_image@split=train", 32, 4)
    names = [episode.key.split("/")[1] for episode in source.episodes]
    assert names == ["demo_0", "demo_2"]                        # demo_3 is held out


def test_a_demonstration_without_images_is_skipped_with_the_reason(demos):
    import h5py
    with h5py.File(demos / "a.hdf5", "a") as f:
        del f["data/demo_2/obs/agentview_image"], f["data/demo_2/obs/wrist_image"]
    source = Episodes(str(demos), 32, 4, split="all", options=FRONT)
    assert len(source.episodes) == 3
    assert "no uint8 images" in source.skipped[f"{demos}/a.hdf5:demo_2"]


def test_actions_that_are_not_finite_are_never_drawn(demos):
    import h5py
    with h5py.File(demos / "a.hdf5", "a") as f:
        f["data/demo_1/actions"][3] = np.nan
    source = Episodes(str(demos), 32, 4, split="all", options=FRONT)
    assert source.labelled
    assert source[range(40)]["actions"].isfinite().all()
    assert list(source.failed) == [f"{demos}/a.hdf5"]


@pytest.mark.parametrize("flip, corner", [
    pytest.param("", (0, 0), id="as-it-is"),
    pytest.param("@flip=vertical", (-1, 0), id="vertical"),
    pytest.param("@flip=horizontal", (0, -1), id="horizontal"),
    pytest.param("@flip=180", (-1, -1), id="180"),
])
def test_images_are_flipped_as_asked(flip, corner, tmp_path):
    """The white corner of a black image, at the top left, is found again."""
    needs("h5py")
    import h5py
    images = np.zeros((12, 32, 32, 3), np.uint8)
    images[:, :16, :16] = 255
    with h5py.File(tmp_path / "b.hdf5", "w") as f:
        f["data/demo_0/obs/image"] = images
    image = clips(f"{tmp_path}/b.hdf5{flip}", 32, 4)[[0]]["video"][0, 0, :, :, 0]
    corners = {(row, column): int(image[row, column]) for row in (0, -1) for column in (0, -1)}
    assert corners == {place: 255 * (place == corner) for place in corners}


# LeRobot ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def lerobot_set(request, tmp_path_factory):
    """A LeRobot data set of three episodes of 15, 12 and 13 frames."""
    needs("pyarrow")
    root = tmp_path_factory.mktemp("lerobot") / "set"
    lerobot(root, request.param)
    return str(root)


def test_a_folder_of_lerobots_is_known_by_its_metadata(lerobot_set):
    assert clips(lerobot_set, 32, 5).kind == "LeRobot"


@pytest.mark.parametrize("split, want", [("train", [15, 12]), ("heldout", [13]), ("all", [15, 12, 13])])
def test_a_lerobot_episode_is_held_out_by_its_number_in_both_versions(split, want, lerobot_set):
    assert lengths(clips(lerobot_set, 32, 5, split=split)) == want
    assert min(range(3), key=lambda number: share(f"episode {number}")) == 2    # 13 frames


def test_a_split_of_lerobots_own_can_be_chosen(lerobot_set):
    assert lengths(clips(f"{lerobot_set}@split=train", 32, 5, split="all")) == [15, 12]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_each_lerobot_episode_that_is_too_short_is_counted(version, tmp_path):
    """In version 3 the first two share a video."""
    needs("pyarrow")
    lerobot(tmp_path / "set", version, (5, 6, 13))
    skipped = clips(f"{tmp_path}/set", 32, 8, split="all").skipped
    assert skipped == {f"{tmp_path}/set/episode {i}": f"{5 + i} frames, too short for a clip" for i in (0, 1)}


def test_lerobot_clips_have_the_rate_of_the_metadata(lerobot_set):
    assert (clips(lerobot_set, 32, 5)[range(30)]["fps"] == 10).all()


def test_lerobot_actions_lead_from_their_frames(lerobot_set, memory):
    batch = clips(lerobot_set, 32, 5)[range(30)]
    assert torch.equal(batch["actions"][..., 0], told(batch)[:, :-1])


def test_no_lerobot_clip_spans_two_episodes(lerobot_set, memory):
    batch = clips(lerobot_set, 32, 5)[range(30)]
    episode = batch["actions"][..., 1]                          # (b, t-1)
    assert (told(batch).diff(dim=1) == 1).all()
    assert (episode == episode[:, :1]).all()
    assert set(episode[:, 0].tolist()) == {0, 1}


def test_a_lerobot_camera_that_is_stored_as_images_is_named(tmp_path):
    needs("pyarrow")
    (tmp_path / "meta").mkdir()
    info = {"codebase_version": "v3.0", "fps": 10, "features": {"front": {"dtype": "image"}}}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="no camera in it that is stored as video"):
        clips(str(tmp_path), 32, 5)


def test_lerobot_metadata_that_are_broken_get_one_line(tmp_path):
    needs("pyarrow")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text('{"codebase_version": "v2.1"}')
    with pytest.raises(UserError, match="metadata cannot be read") as error:
        clips(str(tmp_path), 32, 5)
    assert len(str(error.value).splitlines()) == 1


# the index of a folder, and finding its files ---------------------------------------------------------------


@pytest.fixture
def copied(films, tmp_path):
    """A copy of `films` that has no index yet."""
    return shutil.copytree(films, tmp_path / "films", ignore=shutil.ignore_patterns(".cola*"))


@pytest.fixture
def looked(monkeypatch):
    """The names of the films that are decoded for an index, while it happens."""
    names = []

    @functools.wraps(inspect_video)         # the index is called after it
    def look(file):
        names.append(os.path.basename(file))
        return inspect_video(file)
    monkeypatch.setattr(episodes, "inspect_video", look)
    return names


def test_each_film_is_decoded_once_for_the_index(copied, looked):
    Episodes(str(copied), 8, 8)
    Episodes(str(copied), 8, 8, split="heldout")
    assert sorted(looked) == ["a-short.gif", "a.mp4", "b.webm", "c.gif"]


def test_the_index_is_renewed_for_a_changed_film_and_for_changed_actions(copied, looked):
    Episodes(str(copied), 8, 8)
    looked.clear()
    write_film(copied / "a.mp4", shades(20))
    write_actions(copied / "b.npz", np.zeros((19, 2)))
    Episodes(str(copied), 8, 8)
    assert sorted(looked) == ["a.mp4", "b.webm"]


INDEX = ".cola-index-inspect_video.json"


@pytest.mark.parametrize("damage", [
    pytest.param("record[1].pop('fps')", id="lacks-a-key"),
    pytest.param("record[1]['pts'] = 3", id="another-type"),
    pytest.param("record[1]['n'] += 1", id="another-value"),
])
def test_a_record_of_the_index_that_was_changed_is_made_again(damage, copied, looked):
    before = lengths(Episodes(str(copied), 8, 8))
    looked.clear()
    records = json.loads((copied / INDEX).read_text())
    exec(damage, {"record": records["b.webm"]})
    (copied / INDEX).write_text(json.dumps(records))
    assert lengths(Episodes(str(copied), 8, 8)) == before
    assert looked == ["b.webm"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a.mp4": {"stamp": []}}', '{"a.mp4": [null, null]}'])
def test_an_index_of_another_structure_is_made_again(text, copied, looked):
    (copied / INDEX).write_text(text)
    Episodes(str(copied), 8, 8)
    assert len(looked) == 4


def test_an_index_of_another_version_is_made_again(copied, looked, monkeypatch):
    Episodes(str(copied), 8, 8)
    looked.clear()
    monkeypatch.setattr(formats, "VERSION", 99)
    Episodes(str(copied), 8, 8)
    assert len(looked) == 4


@pytest.mark.parametrize("place", ["taken", "full", "read-only"])
def test_an_index_that_cannot_be_written_is_told_once_and_ends_nothing(place, copied, tmp_path, monkeypatch,
                                                                       capsys):
    monkeypatch.chdir(tmp_path)
    if place == "taken":
        (copied / INDEX).mkdir()
    elif place == "full":
        os.symlink("/dev/full", copied / f"{INDEX}.part")
    else:                                   # and `out` cannot be made
        monkeypatch.setattr(os, "access", lambda *_: False)
        (tmp_path / "out").write_text("")
    for split in ("train", "heldout"):
        assert Episodes(str(copied), 8, 8, split=split).episodes
    told_lines = [line for line in capsys.readouterr().err.splitlines() if "skips" not in line]
    assert len(told_lines) == 1
    assert "cannot be written" in told_lines[0]
    assert not os.path.lexists(copied / f"{INDEX}.part")


def test_an_index_is_written_as_it_grows(copied, monkeypatch):
    """What was looked at before the program was killed is not lost."""
    @functools.wraps(inspect_video)
    def look(file):
        if file.endswith("c.gif"):
            raise KeyboardInterrupt
        return inspect_video(file)
    monkeypatch.setattr(episodes, "inspect_video", look)
    monkeypatch.setattr(formats, "WRITE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        Episodes(str(copied), 8, 8)
    assert list(json.loads((copied / INDEX).read_text())) == ["a-short.gif", "a.mp4", "b.webm"]


def test_a_film_beside_actions_that_do_not_fit_is_skipped_with_the_reason(copied):
    write_actions(copied / "b.npz", np.zeros((5, 2)))
    skipped = Episodes(str(copied), 8, 8).skipped
    assert skipped[str(copied / "b.webm")] == "5 actions beside 20 frames"


@pytest.mark.parametrize("actions", [
    pytest.param(np.full((19, 2), np.nan), id="not-finite"),
    pytest.param(np.zeros(19), id="not-a-table"),
])
def test_a_film_beside_actions_that_make_no_sense_is_skipped_with_the_reason(actions, copied):
    write_actions(copied / "b.npz", actions)
    skipped = Episodes(str(copied), 8, 8).skipped
    assert skipped[str(copied / "b.webm")] == "b.npz: actions are not (n, a) finite numbers"


def test_a_film_that_is_gone_costs_its_clips_but_not_the_run(copied):
    source = Episodes(str(copied), 8, 8)
    gone = source.episodes[0].file
    os.remove(gone)
    assert source[range(20)]["video"].shape == (20, 8, 8, 8, 3)
    assert list(source.failed) == [gone]


@pytest.mark.filterwarnings("ignore:This process")              # torch warns of any fork
def test_a_mistake_that_a_loaders_worker_finds_is_one_line(copied, monkeypatch):
    source = Episodes(str(copied), 8, 8)
    source.quick = False                    # else there is no worker
    for episode in source.episodes:
        os.remove(episode.file)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        program(lambda _: next(iter(loader(source, 2, 0, 1))))
    assert str(end.value) == f"train.py: --data {copied}: 20 clips in a row cannot be read any more"


@pytest.mark.parametrize("room, kept", [(2 ** 30, 3), (20 * 8 * 8 * 3 + 1, 2), (1, 1)])
def test_small_sources_stay_in_memory_until_it_is_full(room, kept, copied, monkeypatch):
    monkeypatch.setattr(episodes, "KEPT", {})
    source = Episodes(str(copied), 8, 8, split="all")
    monkeypatch.setattr(episodes, "MEMORY", room)
    for number in (range(20), range(20)):
        source[number]
    assert len(episodes.KEPT) == kept


@pytest.fixture
def looks(tmp_path):
    """Folders of two films each: of a simulator in one look, in another, before there were two; and others"""
    for name, labels in {"new": {"look": "fast"}, "newer": {"look": "fast"}, "old": {"states": 0},
                         "published": {"look": "published"}, "film": {}}.items():
        (tmp_path / name).mkdir()
        for i in "ab":
            write_film(tmp_path / name / f"{i}.mp4", shades(8))
            np.savez(tmp_path / name / f"{i}.npz", actions=counting(8), **labels)
    return tmp_path


@pytest.mark.parametrize("names, look", [
    (["new"], "fast"), (["old"], "published"), (["film"], ""), (["old", "published"], "published"),
    (["new", "newer", "film", "web"], "fast"), (["new", "published"], None), (["old", "film", "new"], None),
])
def test_frames_of_two_looks_are_not_mixed(names, look, looks, monkeypatch):
    monkeypatch.chdir(looks)
    if look is None:
        with pytest.raises(UserError, match="two looks of a simulator's frames: .* has .*; take one"):
            clips(names, 32, 4)
    else:
        assert clips(names, 32, 4).look == look


def test_a_folder_of_two_looks_is_refused(looks):
    shutil.copytree(looks / "old", looks / "new" / "more")
    with pytest.raises(UserError, match="b.mp4 has fast, .*more/b.mp4 has published; take one"):
        clips([str(looks / "new")], 32, 4)


def test_a_run_keeps_the_look_of_its_data(looks, monkeypatch, refusal_of):
    monkeypatch.chdir(looks)
    size = "--size 8 --patch 4 --lam_size 8 --lam_patch 4 --frames 4 --eval_frames 4 --pretrain 0".split()
    train.main([*SMALL, *size, "--data", "new", "--name", "r", "--warmup", "1", "--e2e", "1"])
    assert load_world("out/r").look == "fast"
    refused = refusal_of(train.main, *SMALL, *size, "--mode", "adapt", "--init", "out/r", "--data", "old",
                         "--name", "s")
    assert refused == ("two looks of a simulator's frames: the run that it comes from has fast, "
                       "--data old has published; take one")
    assert not os.path.exists("out/s/config.json")
    assert refusal_of(evaluate.main, "--ckpt", "out/r", "--data", "old").endswith(
        "--ckpt out/r has fast, --data old has published; take one")


@pytest.fixture
def spaced(tmp_path):
    """A folder with a space in its name; a film of 20 frames, which has an @ in its name, and one of 16."""
    folder = tmp_path / "my videos"
    folder.mkdir()
    write_film(folder / "a@b.mp4", shades(20))
    write_film(folder / "c.mp4", shades(16))
    return folder


def test_a_link_that_leads_round_in_a_circle_is_followed_once(spaced):
    os.symlink(".", spaced / "me")
    os.symlink("..", spaced / "up")
    assert sorted(lengths(Episodes(str(spaced), 8, 4, split="all"))) == [16, 20]


def test_a_folder_that_a_link_leads_to_again_is_read_once(spaced):
    for name in ("inner", "outer"):
        (spaced / name).mkdir()
    write_film(spaced / "inner/e.mp4", shades(18))
    os.symlink("../inner", spaced / "outer/again")
    assert sorted(lengths(Episodes(str(spaced), 8, 4, split="all"))) == [16, 18, 20]


def test_a_link_to_a_film_elsewhere_is_a_film_and_one_to_nowhere_is_skipped(spaced, films):
    os.symlink(films / "a.mp4", spaced / "d.mp4")
    os.symlink("nowhere", spaced / "gone.mp4")
    source = Episodes(str(spaced), 8, 4, split="all")
    assert sorted(lengths(source)) == [16, 20, 20]
    assert list(source.skipped) == [str(spaced / "gone.mp4")]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_film_counts_once_under_its_own_name_whatever_links_lead_to_it(link, spaced):
    link(spaced / "c.mp4", spaced / "z.mp4")
    os.symlink("c.mp4", spaced / "b.mp4")
    source = Episodes(str(spaced), 8, 4, split="all")
    assert [episode.name for episode in source.episodes] == ["a@b.mp4", "c.mp4"]


def test_two_links_in_a_folder_to_one_folder_count_once(spaced, films):
    for name in ("first", "second"):
        os.symlink(films, spaced / name)
    assert len(Episodes(str(spaced), 8, 8, split="all").episodes) == 2 + 3


def test_a_folder_that_is_locked_is_counted_and_named(spaced, monkeypatch):
    """Permissions do not stop root, as whom the tests may run."""
    (spaced / "locked").mkdir()
    listed = os.listdir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listed(folder)
    monkeypatch.setattr(os, "listdir", refuse)
    assert Episodes(str(spaced), 8, 4).skipped == {f"{spaced}/locked": "Permission denied"}
    with pytest.raises(UserError, match="no video.*locked: Permission denied"):
        Episodes(str(spaced / "locked"), 8, 4)


def test_two_films_of_the_same_size_and_time_are_not_taken_for_each_other(spaced):
    """Each is a source of its own; the index that they share lies in their folder."""
    first, second = spaced / "a@b.mp4", spaced / "c.mp4"
    os.truncate(second, first.stat().st_size)                   # longer: what follows a film is ignored
    for file in (first, second):
        os.utime(file, (10 ** 9, 10 ** 9))
    for file, n in ((first, 20), (second, 16), (first, 20)):
        assert lengths(clips([str(file)], 8, 4, split="all")) == [n]


def test_the_path_of_a_single_source_may_have_a_space_in_it(spaced):
    assert lengths(clips([str(spaced)], 8, 4, split="all")) == [20, 16]
    assert lengths(clips(shlex.quote(str(spaced)), 8, 4, split="all")) == [20, 16]


def test_the_paths_in_a_list_of_sources_may_have_spaces_in_them(spaced):
    assert clips([f"{spaced}@stride=2"], 8, 4)[[0]]["fps"] == 5


def test_two_sources_are_not_a_folder_with_the_names_of_both(spaced, monkeypatch, capsys):
    monkeypatch.chdir(spaced.parent)
    for name in ("my", "videos"):
        os.symlink(spaced, name)
    for given in (["my", "videos"], ["my videos"]):
        data.main(["--data", *given, "--frames", "4"])
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row[:16].strip() for row in rows] == given
    assert clips("my videos", 8, 4).names == ["my", "videos"]


@pytest.mark.parametrize("text, name, options, weight", [
    pytest.param("at@home", "at@home", {}, None, id="an-at"),
    pytest.param("at@home@fps=5", "at@home", {"fps": "5"}, None, id="an-at-and-an-option"),
    pytest.param("x:at@home@fps=5@flip=180:0.3", "x", {"fps": "5", "flip": "180"}, 0.3, id="everything"),
    pytest.param("at@home@fps=9", "at@home@fps=9", {}, None, id="what-looks-like-an-option"),
    pytest.param("at@home@fps=9@stride=2:2", "at@home@fps=9", {"stride": "2"}, 2, id="and-one-that-is"),
    pytest.param("12:30@fps=5", "12:30", {"fps": "5"}, None, id="a-colon"),
])
def test_the_longest_path_that_is_there_is_taken(text, name, options, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("at", "at@home", "at@home@fps=9", "12:30"):
        os.mkdir(folder)
    path = "at@home" if name == "x" else name
    assert data.parse_source(text) == (name, path, options, weight)


# mixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(films, tmp_path):
    """30 % of the films, 50 % of a white one with every second frame left out, 20 % of the toy world."""
    write_film(tmp_path / "white.mp4", np.full((20, 32, 32, 3), 255, np.uint8))
    return clips(f"mine:{films}:0.3 white:{tmp_path}/white.mp4@stride=2:0.5 cross:0.2", 16, 4)


def test_a_mixture_knows_its_sources_by_name(mixture):
    assert mixture.names == ["mine", "white", "cross"]


def test_a_mixture_draws_by_weight(mixture):
    share = torch.bincount(mixture[range(600)]["source"]) / 600
    torch.testing.assert_close(share, torch.tensor([0.3, 0.5, 0.2]), atol=0.05, rtol=0)


def test_the_clips_of_a_mixture_are_of_the_source_they_name(mixture):
    batch = mixture[range(16)]
    white = batch["source"] == 1
    assert 0 < white.sum() < 16
    brightness = batch["video"].float().mean((1, 2, 3, 4))
    assert (batch["video"][white] > 250).all()
    assert (brightness[~white] < 250).all()
    assert (batch["fps"][white] == 5).all()
    assert (batch["fps"][~white] > 5).all()


def test_ranks_share_each_batch_of_a_mixture(mixture):
    whole = next(iter(loader(mixture, 8, 3, 4)))
    parts = [next(iter(loader(mixture, 8, 3, 4, rank, 2))) for rank in range(2)]
    for key in ("video", "source", "fps"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts])), key


@pytest.mark.parametrize("data", ["mixture", "robots"])
def test_another_clip_is_of_the_same_source_and_another_episode(data, mixture):
    # in 20 clips of these, some are alone of their source
    dataset = mixture if data == "mixture" else clips("toy", 8, 4)
    for i in range(20):
        j = another(dataset, i)
        assert j > i
        (source, episode), (other_source, other_episode) = dataset.origin(i), dataset.origin(j)
        assert other_source == source
        alone = data == "mixture" and source == 1               # the white film is the only one of its source
        assert alone or other_episode != episode


def test_where_a_source_has_one_clip_another_is_itself(tmp_path):
    write_film(tmp_path / "short.mp4", shades(4))
    short = clips(f"a:{tmp_path}/short.mp4", 8, 4, split="all")
    lonely = Mixture(["a", "b"], [short, ToyClips("cross", 8, 4)], [1e-9, 1.0])
    assert another(short, 3) == 4
    lonely.which = lambda indices: np.array([int(i != 3) for i in indices])
    assert another(lonely, 3) == 3


@pytest.mark.parametrize("text, words", [
    pytest.param("/no/such", "no such file", id="no-such-file"),
    pytest.param("{}@fps", "options read", id="option-without-value"),
    pytest.param("{}@speed=2", "no option @speed", id="unknown-option"),
    pytest.param("{}@flip=up", "choose from vertical", id="unknown-flip"),
    pytest.param("{}@fps=x", "@fps takes a number", id="rate-that-is-no-number"),
    pytest.param("{}@fps=90", "frames a second", id="rate-above-the-films"),
    pytest.param("{}@fps=nan", "@fps takes a number", id="rate-that-is-nan"),
    pytest.param("{}@fps=inf", "frames a second", id="endless-rate"),
    pytest.param("{}@stride=1000000000000", "too short", id="stride-of-a-trillion"),
    pytest.param("{}:0", "above 0", id="weight-of-zero"),
    pytest.param("{}:nan", "above 0", id="weight-that-is-nan"),
    pytest.param("{}:1e308", "below 1e9", id="weight-without-end"),
    pytest.param("a:{}:0.5 b:{}", "all sources a weight", id="weights-for-some-only"),
    pytest.param("{} {}", "the same name", id="two-of-one-name"),
    pytest.param("{}/a.npz", "no train clip", id="file-that-is-no-film"),
])
def test_bad_sources_get_one_line(text, words, films):
    with pytest.raises(UserError, match=words) as error:
        clips(text.replace("{}", str(films)), 16, 4)
    assert len(str(error.value).splitlines()) == 1


# damaged files ----------------------------------------------------------------------------------------------


def damaged_films(good, bad, rng):
    """170 films in the folder `bad`, with good actions beside them: {file: how it is damaged}"""
    made = {}
    for i in range(170):
        end, how = ("mp4", "webm", "gif")[i % 3], DAMAGES[i % 7]
        truly = end
        if i % 20 == 19:                    # another format under this name
            truly = ("mp4", "webm", "gif")[(i + 1) % 3]
        file = bad / f"{i:03d}-{how}.{end}"
        file.write_bytes(damage(rng, (good / f"x.{truly}").read_bytes(), how))
        write_actions(file.with_suffix(".npy"), counting(20))
        made[str(file)] = how
    return made


def damaged_actions(good, bad, rng):
    """30 good films in the folder `bad`, and damaged actions beside them: {film: how they are damaged}"""
    made = {}
    for i in range(30):
        film, how = bad / f"z{i:02d}.mp4", DAMAGES[i % 7]
        shutil.copy(good / "x.mp4", film)
        film.with_suffix(".npz").write_bytes(damage(rng, (good / "y.npz").read_bytes(), how))
        made[str(film)] = how
    return made


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """200 damaged films, {file: how}; the source that they make with 3 good ones; seconds that it took."""
    good, bad = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("bad")
    write_film(good / "x.mp4", shades(20), g=5)
    write_film(good / "x.webm", shades(20), "libvpx-vp9")
    imageio.imwrite(good / "x.gif", shades(20), duration=100, loop=0)
    write_actions(good / "y.npz", counting(20))
    rng = np.random.default_rng(0)
    made = damaged_films(good, bad, rng) | damaged_actions(good, bad, rng)
    for i in range(3):
        write_film(bad / f"zz{i}.mp4", shades(20))
        write_actions(bad / f"zz{i}.npy", counting(20))
    began = time.time()
    source = Episodes(str(bad), 8, 4, split="all")
    return made, source, time.time() - began


def test_each_of_200_damaged_films_is_used_or_skipped_with_the_reason(spoiled):
    made, source, _ = spoiled
    used = {episode.file for episode in source.episodes}
    assert set(source.skipped) == set(made) - used
    assert len(used) + len(source.skipped) == 203
    assert all(source.skipped.values())
    assert len(source.skipped) > 120


def test_what_is_no_film_at_all_is_not_used(spoiled):
    made, source, _ = spoiled
    used = {made.get(episode.file) for episode in source.episodes}
    assert not used & {"empty", "text", "noise"}


def test_a_film_with_a_damaged_frame_is_skipped_with_its_number(tmp_path):
    """Noise cannot be compressed: the middle half of a file is frames, and its ends stay as they are."""
    rng = np.random.default_rng(0)
    write_film(tmp_path / "good.mp4", shades(20))
    for i in range(5):                      # a decoder does not notice each damage
        file = tmp_path / f"{i}.mp4"
        write_film(file, rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), g=5)
        raw = file.read_bytes()
        quarter = len(raw) // 4
        file.write_bytes(raw[:quarter] + damage(rng, raw[quarter:-quarter], "flipped") + raw[-quarter:])
    skipped = Episodes(str(tmp_path), 8, 4, split="all").skipped
    assert any(re.fullmatch(r"frame \d+ is damaged", why) for why in skipped.values()), skipped


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("end, codec", [("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "libx264"),
                                        ("gif", None)])
def test_a_film_whose_end_is_missing_is_skipped_with_the_reason(end, codec, share, tmp_path):
    """The decoder takes it for a shorter one."""
    whole, cut = tmp_path / f"whole.{end}", tmp_path / f"cut.{end}"
    if codec:
        write_film(whole, shades(40), codec, g=5)
    else:
        imageio.imwrite(whole, shades(40), duration=100, loop=0)
    raw = whole.read_bytes()
    cut.write_bytes(raw[:int(share * len(raw))])
    source = Episodes(str(tmp_path), 8, 4, split="all")
    assert lengths(source) == [40]
    assert source.skipped == {str(cut): "its end is missing"}


def test_200_damaged_films_are_looked_through_within_a_minute(spoiled):
    assert spoiled[2] < 60


def test_what_is_used_of_damaged_films_has_all_its_frames_and_its_own_actions(spoiled):
    made, source, _ = spoiled
    for episode in source.episodes:
        for start in (0, 8, episode.n - 4):
            where = f"{episode.file} from frame {start}"
            try:
                frames, actions = source.clip(episode, start)
            except Exception as error:      # whatever a reader raises: it says that it cannot decode
                assert "decode" in str(error), where
                continue
            assert frames.shape == (4, 8, 8, 3), where
            assert actions[:, 0].tolist() == [start, start + 1, start + 2], where
            if episode.file.endswith("mp4") or made.get(episode.file) == "truncated":
                numbers = frames.mean((1, 2, 3)) / 6            # of a GIF's flipped pixels nobody can tell
                assert np.abs(numbers - np.arange(start, start + 4)).max() < 1.5, where


def test_damaged_films_do_not_stop_a_run(spoiled):
    assert spoiled[1][range(50)]["video"].shape == (50, 4, 8, 8, 3)


@pytest.fixture
def spoiled_demos(tmp_path):
    """A source of 14 damaged HDF5 files and a good one."""
    needs("h5py")
    (tmp_path / "h5").mkdir()
    robomimic(tmp_path / "h5/zz.hdf5", 1, 20)
    raw, rng = (tmp_path / "h5/zz.hdf5").read_bytes(), np.random.default_rng(0)
    for i in range(14):
        (tmp_path / f"h5/{i:02d}.hdf5").write_bytes(damage(rng, raw, DAMAGES[i % 7]))
    return Episodes(str(tmp_path / "h5"), 8, 4, split="all", options=FRONT)


def test_each_of_14_damaged_hdf5_files_is_used_or_skipped_with_the_reason(spoiled_demos):
    assert len(spoiled_demos.skipped) + len(spoiled_demos.episodes) == 15
    assert len(spoiled_demos.skipped) >= 10
    assert all(spoiled_demos.skipped.values())


def test_damaged_hdf5_files_do_not_stop_a_run(spoiled_demos):
    assert spoiled_demos[range(50)]["video"].shape == (50, 4, 8, 8, 3)


# what training sees -----------------------------------------------------------------------------------------


def resident():
    """MB that this process takes"""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


@pytest.mark.parametrize("kinds", ["films", "films-and-hdf5"])
def test_memory_stays_flat_over_drawn_clips(kinds, films, tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "MEMORY", 0)                  # keep nothing
    text = str(films)
    if kinds == "films-and-hdf5":
        needs("h5py")
        robomimic(tmp_path / "a.hdf5")
        text += f" {tmp_path}/a.hdf5@camera=agentview_image"
    source = clips(text, 64, 4)             # 48 kB a clip
    for i in range(0, 220, 20):                                 # until caches are full
        source[range(i, i + 20)]
    before = resident()
    for i in range(220, 600, 20):
        source[range(i, i + 20)]
    assert resident() - before < 15         # over 380 clips


@pytest.fixture(scope="module")
def shown(films, tmp_path_factory):
    """What data.py says of the films and a toy robot, and the folder of its picture."""
    folder = tmp_path_factory.mktemp("shown")
    sources = [f"mine:{films}:0.5", "cross:0.5"]
    return run("data.py", "--data", *sources, "--frames", 4, "--stats", "--peek", "p.gif", cwd=folder), folder


def test_stats_have_a_row_a_source(shown):
    rows = {line.split()[0]: line.split() for line in shown[0].stdout.splitlines()}
    assert list(rows) == ["source", "mine", "cross"]
    assert rows["mine"][1:3] == ["video", "3"]                  # kind, episodes
    assert "48x96" in rows["mine"]


def test_stats_say_what_is_skipped(shown):
    assert "skips 1 of 4" in shown[0].stderr


def test_peek_shows_twelve_clips_in_four_columns(shown):
    assert imageio.imread(shown[1] / "p.gif").shape == (4, 3 * 156, 4 * 132, 3)


@pytest.mark.parametrize("flags, words", [
    ("--size 1000000000000", "at most 4 GiB"),
    ("--frames 1000000000000", "at most 4 GiB"),
    ("--frames -1", "at least 2"),
    ("--size 0", "at least 1"),
    ("--peek", "expected one argument"),
    ("--peek=", "a folder that can be written"),
    ("--peek p.png", "takes the name of a .gif"),
    ("--peek nowhere/p.gif", "a folder that can be written"),
    ("--peek folder.gif", "Is a directory"),
    ("--peek full.gif", "No space left"),
    ("--data cross:nan", "above 0"),
    ("--data cross --size 7", "need frames of 8 pixels or more"),
])
def test_bad_looks_at_data_get_one_line(flags, words, tmp_path, monkeypatch, refusal_of):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.gif")
    os.symlink("/dev/full", "full.gif.part")
    assert words in refusal_of(data.main, "--data", "cross", "--frames", 4, *flags.split())
    assert os.listdir("folder.gif") == []
    assert not os.path.exists("full.gif")


def test_data_that_are_not_there_get_one_line(tmp_path):
    done = run("data.py", "--data", "/no/such", cwd=tmp_path, ok=False)
    assert "no such file" in complaint(done, "data.py")


def test_a_random_crop_is_one_window_a_clip():
    still = video(4, 1, 16).expand(-1, -1, 3, -1, -1)           # (4, 3, t, 16, 16), all frames alike
    cropped = random_crop(still, 0.6, Draw(0))
    assert cropped.shape == still.shape
    assert torch.equal(cropped[:, :, 0], cropped[:, :, 2])
    assert not torch.allclose(cropped, still)


def test_a_random_crop_is_of_a_side_between_the_smallest_and_the_whole():
    """On a ramp from left to right the slope tells the side of the window."""
    ramp = torch.linspace(-1, 1, 64).expand(32, 1, 1, 64, -1)   # (b, c, t, h, w)
    cropped = random_crop(ramp, 0.6, Draw(0))[:, 0, 0, 32]      # (b, w)
    sides = (cropped[:, 40] - cropped[:, 20]) / (ramp[0, 0, 0, 0, 40] - ramp[0, 0, 0, 0, 20])
    assert 0.6 <= sides.min() < 0.7
    assert 0.9 < sides.max() <= 1
    assert cropped.abs().max() <= 1                             # no window leaves the frame


def test_a_random_crop_of_the_whole_frame_changes_nothing():
    clip = video(4, 3, 16)
    assert random_crop(clip, 1.0, None) is clip


# how a program ends -----------------------------------------------------------------------------------------


def ending(error, local_rank, monkeypatch):
    """What a program that raises `error` hands to sys.exit, on this process of a node."""
    def main(arguments):
        raise error
    monkeypatch.setattr(sys, "argv", ["/some/where/data.py"])
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:     # a Ctrl-C that gets out ends pytest too
        program(main)
    assert end.type is SystemExit
    return end.value.code


@pytest.mark.parametrize("local_rank, code", [("0", "data.py: no such source"), ("1", 1)])
def test_a_users_mistake_is_told_by_one_process_of_a_node(local_rank, code, monkeypatch, capsys):
    assert ending(UserError("no such source"), local_rank, monkeypatch) == code     # a text: it is printed
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("local_rank, told_then", [("0", "data.py: stopped by Ctrl-C\n"), ("1", "")])
def test_ctrl_c_is_told_by_one_process_of_a_node(local_rank, told_then, monkeypatch, capsys):
    assert ending(KeyboardInterrupt(), local_rank, monkeypatch) == 130
    assert capsys.readouterr().err == told_then


# files that are written -------------------------------------------------------------------------------------


def test_a_file_is_written_whole(tmp_path):
    file = tmp_path / "numbers"
    with formats.whole(str(file)) as part:
        with open(part, "w") as f:
            f.write("12")
        assert not file.exists()
    assert file.read_text() == "12"
    assert os.listdir(tmp_path) == ["numbers"]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    file = tmp_path / "numbers"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), formats.whole(str(file)) as part, open(part, "w") as f:
        f.write("1")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers"]


# measures ---------------------------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 4, 8, 8)
    assert torch.allclose(psnr(x, x + 0.2), torch.full((2,), 20.0), atol=1e-4)      # 10 log10(4 / 0.04)


def test_psnr_of_equal_videos_is_capped():
    x = torch.zeros(2, 3, 4, 8, 8)
    assert torch.equal(psnr(x, x), torch.full((2,), 60.0))


def noisy():
    """Noise, and the same with more noise: two videos (2, 3, 4, 20, 24)"""
    g = np.random.default_rng(0)
    a = g.uniform(-1, 1, (2, 3, 4, 20, 24))
    b = np.clip(a + g.normal(0, 0.3, a.shape), -1, 1)
    return torch.tensor(a), torch.tensor(b)


def waves():
    """Smooth waves, and somewhat faster, fainter ones: two videos (2, 3, 3, 32, 40)"""
    y, x = np.mgrid[:32, :40] / 10

    def wave(speed):
        return torch.tensor(np.array([[[np.sin(x * (c + 1) + y + t * speed + i) for t in range(3)]
                                       for c in range(3)] for i in range(2)]))

    return wave(0.3), wave(0.35) * 0.9


# the mean over frames of peak_signal_noise_ratio(data_range=2) and structural_similarity(data_range=2,
# channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False), by scikit-image 0.26
@pytest.mark.parametrize("measure, videos, values", [
    (psnr, noisy, [17.311943, 17.190056]),
    (ssim, noisy, [0.6146350, 0.6199761]),
    (psnr, waves, [27.812996, 27.800467]),
    (ssim, waves, [0.9411236, 0.9422779]),
])
def test_psnr_and_ssim_are_scikit_images(measure, videos, values):
    assert torch.allclose(measure(*videos()), torch.tensor(values), atol=1e-4)


def test_measures_take_float32_whatever_the_models_precision(monkeypatch):
    world, clips, autocast = small_world(), ToyClips("cross", 8, 4), []

    def measure(*_):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(4)

    monkeypatch.setattr(judge, "probe", lambda *_, seed: {"l1": measure()})
    with Process(precision="bf16").autocast():
        predict(world, clips, 4, ["copy"], {"m": measure}, {"f": measure})
        judge.probe_source(world, clips, clips, 30, shuffled=True)
    assert autocast == [False] * 5


def test_ssim_of_equal_videos_is_one():
    a, _ = waves()
    assert torch.allclose(ssim(a, a), torch.ones(2))


def test_ssim_refuses_frames_smaller_than_its_window():
    with pytest.raises(ValueError, match="window of 11x11"):
        ssim(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8))


def test_cka_does_not_see_turns_scales_and_shifts():
    x = torch.randn(2000, 5, generator=seeded())
    turn = torch.linalg.qr(torch.randn(5, 5, generator=seeded(1)))[0]
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6)


def test_cka_of_independent_features_is_small():
    assert cka(torch.randn(2000, 5, generator=seeded()), torch.randn(2000, 5, generator=seeded(1))) < 0.05


def test_cka_of_constant_features_is_zero():
    assert cka(torch.randn(2000, 5, generator=seeded()), torch.ones(2000, 3)) == 0


@pytest.mark.parametrize("common, rare, verdict", [(96, 4, True), (56, 4, False)])
def test_a_codebook_has_collapsed_when_95_percent_of_the_codes_are_equal(common, rare, verdict):
    codes = torch.tensor([[0, 1]] * common + [[1, 0]] * rare)   # two codes in use, yet hardly any information
    assert collapsed(codes) == verdict


def features_of(mean, std, n, seed):
    """n features with exactly this mean and, along axes that all of these share, these deviations"""
    x = torch.randn(n, 3, generator=seeded(seed), dtype=torch.double)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    axes = torch.linalg.qr(torch.randn(3, 3, generator=seeded(1), dtype=torch.double))[0]
    return white * torch.tensor(std) @ axes + torch.tensor(mean)


def test_frechet_distance_adds_up_differences_of_means_and_of_deviations():
    a = features_of([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 500, 2)
    b = features_of([1.0, 1.0, 0.0], [2.0, 2.0, 1.0], 300, 3)
    assert frechet(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4), rel=1e-9)


def test_frechet_distance_of_features_to_themselves_is_zero():
    a = features_of([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 500, 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_clips_than_features_is_a_number():
    a = features_of([0.0, 1.0, 2.0], [1.0, 2.0, 3.0], 500, 2)
    b = features_of([1.0, 1.0, 0.0], [2.0, 2.0, 1.0], 300, 3)
    assert 0 < frechet(a[:3], b[:3]) < float("inf")


@pytest.mark.parametrize("a, b, t, p", [
    ([1, 2, 3], [0, 0, 0], 3.464102, 0.074180),
    ([5, 7, 9, 11, 10], [4, 8, 6, 9, 9], 1.809068, 0.144704),
])
def test_paired_t_of_known_lists(a, b, t, p):
    needs("scipy")
    assert paired_t(a, b) == pytest.approx((t, p), abs=1e-5)


def test_paired_t_of_differences_that_do_not_vary_is_none():
    assert paired_t([1, 2], [0, 1]) == (None, None)


EFFECTS = torch.randint(0, 5, (4000,), generator=seeded())


@pytest.mark.parametrize("codes, value", [
    pytest.param(3 * EFFECTS + 1, pytest.approx(1, abs=0.01), id="other names for the effects"),
    pytest.param(torch.randint(0, 64, (4000,), generator=seeded(1)), pytest.approx(0, abs=0.02), id="chance"),
    pytest.param((EFFECTS > 0).long(), pytest.approx(0.31, abs=0.02), id="moved or not: H(1/5) / log 5"),
])
def test_nmi_of_known_codes(codes, value):
    assert nmi(codes, EFFECTS) == value


def test_a_probe_of_a_linear_map_finds_it():
    actions = torch.randn(3000, 2, generator=seeded())
    z = actions @ torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = probe(z, actions, z[:500], actions[:500])
    assert found["r2"] > 0.999
    assert found["l1"] < 0.02


def test_a_probe_of_noise_is_no_better_than_the_constant():
    actions = torch.randn(3000, 2, generator=seeded())
    found = probe(torch.randn(3000, 4, generator=seeded(1)), actions,
                  torch.randn(500, 4, generator=seeded(2)), actions[:500])
    assert abs(found["r2"]) < 0.05
    assert found["l1"] == pytest.approx(found["l1_constant"], abs=0.03)


def aligned():
    """A small world that sees three frames, its codes fitted to toy clips: the world and those clips"""
    world, clips = small_world(), ToyClips("cross", 8, 4)[range(32)]
    world.cfg.window = 3
    world.lam.vq.fit(world.lam.infer(to_video(clips["video"])).flatten(0, 2))
    return world, clips


def test_alignment_lies_within_its_bounds():
    world, clips = aligned()
    found = align(world, clips, clips)
    assert 0 < found["cka"] <= 1
    assert found["sensitivity"] > 0
    assert found["latent_var"] > 0
    assert -0.5 < found["nmi"] <= 1


@pytest.mark.parametrize("size, patch, frames, clips", [
    pytest.param(16, 4, 2, 256, id="tiny: 256 transitions"),
    pytest.param(64, 4, 2, 64, id="2^15 tokens"),
    pytest.param(64, 4, 16, 8, id="small: at least 8 clips"),
])
def test_alignment_is_measured_within_a_budget_of_tokens(size, patch, frames, clips):
    lam = LAM(LAMConfig(size=16, patch=4, width=16, depth=1, heads=2, fdm_depth=0, code_dim=4))
    world = World(lam, DiT(DiTConfig(16, 2, 1, action_dim=8, **PIXELS | {"patch": patch})), PixelVAE())
    assert judge.clips_to_align(world, size, frames) == clips


def test_a_world_that_ignores_actions_is_not_sensitive_to_them():
    world, clips = aligned()
    world.dit.action.mlp[2].weight.data.zero_()
    assert align(world, clips)["sensitivity"] == 0


def test_a_world_that_ignores_actions_dreams_equally_well_with_any():
    world = small_world()
    world.dit.action.forward = lambda a: torch.zeros(len(a), a.shape[1] + 1, 6, 16)
    found, _, shown = predict(world, clips("toy", 8, 4), 8, steps=2)
    psnrs = {variant: numbers["psnr"] for variant, numbers in found.items()}
    assert psnrs["inferred"].shape == (8,)
    assert torch.equal(psnrs["inferred"], psnrs["shuffled"])
    assert torch.equal(psnrs["inferred"], psnrs["null"])
    assert len(shown) == 3                      # the true videos, and the dreams of two variants


def test_the_loss_is_measured_on_clips_as_long_as_those_of_training():
    world, seen = small_world(), []
    world.cfg.window = 1                        # trained on two frames
    world.dit.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    found = loss_by_time(world, clips("toy", 8, 6, split="heldout"), 70)
    assert set(seen) == {2}
    alone = loss_by_time(world, clips("toy", 8, 2, split="heldout"), 70)
    assert found == pytest.approx(alone)


def test_the_loss_of_another_seed_is_that_of_other_clips():
    world, heldout = small_world(), clips("toy", 8, 6, split="heldout")
    world.cfg.window = 5
    assert loss_by_time(world, heldout, 8)["loss"] != loss_by_time(world, heldout, 8, seed=1)["loss"]


def test_more_joint_codes_than_an_integer_holds_are_counted():
    codes = torch.randint(0, 32, (500, 64), generator=seeded())         # 32 ** 64 joint codes
    codes[250:] = codes[:250]
    found = joint_codes(codes)
    assert torch.equal(found[250:], found[:250])
    assert found.max() == 249
    assert nmi(found, found % 2) > 0.4


def test_adapter_learns_codes_from_real_actions():
    torch.manual_seed(0)
    adapter = Adapter(3, LAMConfig(num_codes=8, tokens=2))
    actions, optimizer = torch.rand(64, 5, 3), torch.optim.Adam(adapter.parameters(), 1e-2)
    codes = (actions[..., :2] * 8).long()                                       # (b, t-1, k)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(adapter(actions).flatten(0, 2), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = adapter(actions)
    assert logits.shape == (64, 5, 2, 8)
    assert (logits.argmax(-1) == codes).float().mean() > 0.9


# settings and phases ----------------------------------------------------------------------------------------


@pytest.fixture
def refusal(capsys):
    """A function that parses arguments which must be refused, and returns the one line that says why"""
    def refuse(*args):
        with pytest.raises(SystemExit) as end:
            parse([str(a) for a in args])
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    return refuse


@pytest.mark.parametrize("args, words", [
    (["--preset", "huge"], "invalid choice: 'huge' (choose from"),
    (["--mode", "magic"], "invalid choice: 'magic' (choose from"),
    (["--warmup", "-1"], "at least 0"),
    (["--lam_patch", "0"], "at least 1"),
    (["--vq_start", "1"], "at most 0.99"),
    (["--latent_scale", "0"], "at least 1e-06"),
    (["--crop", "inf"], "at most 1"),
    (["--cooldown", "1.1"], "at most 1"),
    (["--real_share", "2"], "at most 1"),
    (["--hidden", "1000000000000"], "at most 100000"),
    (["--batch", "1000000000000"], "at most 100000"),
    (["--batch", "many"], "invalid int value: 'many'"),
    (["--odd", "perhaps"], "invalid boolean value: 'perhaps'"),
    (["--pretrain", "0", "--warmup", "0", "--e2e", "0"], "nothing to train"),
    (["--mode", "adapt"], "needs --init"),
    (["--mode", "two-stage", "--lam_steps", "0"], "needs --init_lam"),
    (["--resume", "nowhere"], "not the folder of a run"),
    (["--heads", "3"], "must be a multiple of 4 and of 2 x --heads"),
    (["--time_shift", "0"], "auto, none, or a number above 0"),
    (["--time_shift", "inf"], "auto, none, or a number above 0"),
    (["--batch", "16", "--accumulate", "3"], "multiple of processes x --accumulate"),
    (["--latent_cache", "latents"], "needs --vae_weights"),
    (["--actions", "true", "--mode", "two-stage"], "has no LAM to train"),
    (["--mode", "vae", "--init", "out/toy"], "trains a VAE from scratch"),
])
def test_settings_that_make_no_sense_get_one_line(args, words, refusal):
    assert words in refusal(*args)


@pytest.mark.parametrize("device, precision, used", [
    ("cpu", "auto", "fp32"),
    ("cpu", "bf16", "bf16"),
    ("cuda", "auto", "bf16"),
    ("cuda", "fp32", "fp32"),
])
def test_precision_is_bf16_on_cuda_unless_it_is_said(device, precision, used):
    assert Process.here(device, precision).precision == used


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_models_compute_in_the_precision_of_their_process(precision, dtype):
    with Process(precision=precision).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.type is float])
def test_no_setting_is_infinite_or_not_a_number(name, value, refusal):
    assert f"--{name} {value}: must be at least" in refusal(f"--{name}={value}")


@pytest.mark.parametrize("name", ["", ".", "..", "../assets", "/tmp/run", "a//b", "a/", "a/../../b",
                                  "a" * 300, "a\nb", "\udcff"])
def test_a_name_that_leads_out_of_the_folder_out_or_is_none_gets_one_line(name, refusal):
    assert "must be the name of a folder in out" in refusal("--name", name)


@pytest.mark.parametrize("name", ["toy", "a/b/c", "...", "my run", "-", "\u00e4"])
def test_other_names_are_taken(name):
    assert parse([f"--name={name}"]).name == name


def test_every_size_is_a_field_of_the_part_that_it_names():
    parts = {"lam": LAMConfig, "dit": DiTConfig, "flow": FlowConfig}
    known = {f"{part}.{f.name}" for part, config in parts.items() for f in fields(config)}
    named = {f.metadata["size"] for f in fields(Config)} - {""}
    assert named and named <= known, named - known


# all that --init brings, none of them a default
OTHER_SIZES = dict(lam_size=8, lam_patch=2, lam_width=16, lam_depth=1, num_codes=4, code_dim=8, tokens=1,
                   latent_scale=0.5, odd=False, standardize=False, hidden=32, depth=1, heads=2, patch=2)


def test_the_sizes_of_a_built_world_come_back_into_the_settings():
    sized = {f.name for f in fields(Config) if f.metadata["size"].startswith(("lam.", "dit."))}
    assert OTHER_SIZES.keys() == sized - {"action_std"}         # that one is of the start alone
    assert not [name for name, value in OTHER_SIZES.items() if value == getattr(Config, name)]
    world = build(Config(**OTHER_SIZES))
    assert adopt(Config(), world) == Config(**OTHER_SIZES)


# of 50 steps from step 100 on, 10 warm up and the last 10 cool down
SCHEDULE = dict(first=100, length=50, lr=2.0, lr_warmup=10, cooldown=0.2)


@pytest.mark.parametrize("step, rate, changes", [
    pytest.param(100, 0.2, {}, id="warm-up begins"),
    pytest.param(104, 1.0, {}, id="half of the warm-up"),
    pytest.param(109, 2.0, {}, id="warm-up ends"),
    pytest.param(125, 2.0, {}, id="constant"),
    pytest.param(140, 2.0, {}, id="the fall begins"),
    pytest.param(145, 1.0, {}, id="half of the fall"),
    pytest.param(149, 0.2, {}, id="last step"),
    pytest.param(150, 0.0, {}, id="the end"),
    pytest.param(100, 2.0, {"lr_warmup": 0}, id="no warm-up"),
    pytest.param(149, 2.0, {"cooldown": 0.0}, id="no fall"),
])
def test_the_learning_rate_warms_up_stays_and_falls_to_zero(step, rate, changes):
    phase = Phase("e2e", 50, ("body",), "flow", "toy", 4, 1.0, **SCHEDULE | changes)
    assert phase.learning_rate(step) == pytest.approx(rate)


# the command line -------------------------------------------------------------------------------------------

PATIENCE = 200                  # seconds; what a quiet machine does at once may wait long on a busy one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs to look at and to start from, and what the first of them printed"""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train.py", "--name", "joint", "--pretrain", 4, "--warmup", 4, "--e2e", 4, "--eval_every", 6,
               *SMALL, cwd=folder)
    run("train.py", "--name", "two", "--mode", "two-stage", "--pretrain", 2, "--lam_steps", 2,
        "--wm_steps", 0, *SMALL, cwd=folder)
    return folder, done


def test_a_run_logs_its_phases_in_their_order(trained):
    rows, _ = result(trained[0], "joint")
    logged = [row["phase"] for row in rows if row["event"] == "train"]
    assert logged == ["pretrain"] * 2 + ["warmup"] * 2 + ["e2e"] * 2


def test_a_log_ends_with_every_number_of_the_result(trained):
    _, last = result(trained[0], "joint")
    assert last["event"] == "result"
    for key in ("utilization", "entropy", "max_usage", "psnr", "psnr_shuffled", "psnr_null", "psnr_copy",
                "probe_r2", "probe_l1", "nmi"):
        assert isinstance(last[key], float), key


def test_the_result_is_printed(trained):
    assert "result: " in trained[1].stdout


def test_a_log_has_no_progress_bar(trained):
    assert "\r" not in trained[1].stdout
    assert not trained[1].stderr


@pytest.mark.parametrize("words", [" step=2 ", " steps_per_second=", " minutes_left="])
def test_the_first_line_of_a_log_tells_the_speed(words, trained):
    lines = [line for line in trained[1].stdout.splitlines() if line.startswith("train: ")]
    assert words in lines[0]


def test_a_run_keeps_its_settings(trained):
    assert json.load(open(trained[0] / "out/joint/config.json"))["warmup"] == 4


def test_a_run_draws_its_dreams(trained):
    frames = imageio.imread(trained[0] / "out/joint/samples/000012.gif")
    assert frames.shape[0] == 8


def test_the_saved_world_dreams(trained):
    world = load_world(str(trained[0] / "out/joint"))
    z = torch.zeros(1, 3, 2, world.lam.cfg.code_dim)
    assert world.rollout(torch.zeros(1, 3, 1, 16, 16), z).shape == (1, 3, 4, 16, 16)


def test_a_run_may_start_from_the_generator_of_the_one_that_it_moves_aside(trained, tmp_path):
    shutil.copytree(trained[0] / "out/joint", tmp_path / "out/a")
    run("train.py", "--name", "a", "--dit_weights", "out/a", "--warmup", 0, "--e2e", 2, *SMALL, cwd=tmp_path)
    assert (tmp_path / "out/a.1/ckpt.pt").exists()
    rows, _ = result(tmp_path, "a")
    assert rows[0]["phase"] == "e2e"            # no pre-training: the generator is trained


# the README's table of arms: what each phase trains, and that the rest stays bit-equal
ARMS = {
    "joint": ([], {"pretrain": "body", "warmup": "lam action", "e2e": "lam action body"}),
    "two-stage": (["--mode", "two-stage"], {"pretrain": "body", "lam": "lam fdm", "wm": "action body"}),
    "naive": (["--warmup", "0"], {"pretrain": "body", "e2e": "lam action body"}),
    "naive, trained IDM": (["--warmup", "0", "--init_lam", "out/two"],
                           {"pretrain": "body", "e2e": "lam action body"}),
    "both random": (["--warmup", "0", "--pretrain", "0"], {"e2e": "lam action body"}),
    "pure warm-up": (["--e2e", "0"], {"pretrain": "body", "warmup": "lam action"}),
    "frozen LAM": (["--freeze_lam"], {"pretrain": "body", "warmup": "lam action", "e2e": "action body"}),
    "branch": (["--init", "out/joint", "--warmup", "0"], {"e2e": "lam action body"}),
    "second stage on a joint LAM": (["--mode", "two-stage", "--init_lam", "out/joint", "--lam_steps", "0"],
                                    {"pretrain": "body", "wm": "action body"}),
    "adapt": (["--mode", "adapt", "--init", "out/joint", "--data", "held-out"],
              {"adapter": "adapter", "adapt": "action body"}),
    "pre-training": (["--mode", "pretrain", "--dit_weights", "out/joint"], {"pretrain": "body"}),
}
STEPS = ("pretrain", "warmup", "e2e", "lam_steps", "wm_steps", "adapter_steps", "adapt_steps")


def groups(lam, dit, adapter):
    """What trains together, of state dicts: {group: tensors}. Running moments are the LAM's too."""
    fdm = [v for k, v in lam.items() if k.startswith("fdm.")]
    parts = {
        "lam": [v for k, v in lam.items() if not k.startswith("fdm.")],
        "fdm": fdm,
        "action": [v for k, v in dit.items() if k.startswith("action.")],
        "body": [v for k, v in dit.items() if not k.startswith("action.")],
        "adapter": list((adapter or {}).values()),
    }
    return {name: tensors for name, tensors in parts.items() if tensors}


def at_the_start(args):
    """The groups of a run before its first step"""
    cfg = parse(args)
    world, adapter = build(cfg), None
    if cfg.mode == "adapt":
        torch.manual_seed(cfg.seed)
        adapter = Adapter(2, world.lam.cfg).state_dict()        # the robot has two motors
    return groups(world.lam.state_dict(), world.dit.state_dict(), adapter)


@pytest.mark.parametrize("arm", ARMS)
def test_each_phase_trains_its_groups_and_leaves_the_rest_bit_equal(arm, trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    flags, want = ARMS[arm]
    three_each = [a for name in STEPS if f"--{name}" not in flags for a in (f"--{name}", "3")]
    args = ["--name", "x", *flags, *three_each, *SMALL, "--keep", "9", "--ckpt_every", "100",
            "--standardize", "1"]
    before = at_the_start(args)
    run("train.py", *args, cwd=trained[0])
    files = [f"out/x/ckpt-{3 * i:08d}.pt" for i in range(1, len(want))] + ["out/x/ckpt.pt"]
    for file, (phase, trains) in zip(files, want.items(), strict=True):
        state = load_checkpoint(file)
        assert state["phase"] == phase
        after = groups(state["lam"], state["dit"], state["adapter"])
        assert after.keys() == before.keys()
        for name, tensors in after.items():
            moved = [not torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)]
            if name not in trains.split():
                assert not any(moved), f"{phase} has changed {name}"
            elif name == "adapter":
                assert all(moved), f"{phase} has not trained all of {name}"
            else:                               # three steps do not reach what starts behind zeros
                assert sum(moved) > len(moved) / 2, f"{phase} has not trained {name}"
        before = after


@pytest.mark.parametrize("run, depth", [("two", 1), ("joint", 0)])
def test_a_second_stage_has_the_fdm_that_its_lam_was_trained_with_or_none(run, depth, trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    built = build(parse(["--mode", "two-stage", "--lam_steps", "0", "--init_lam", f"out/{run}"])).lam
    assert built.cfg.fdm_depth == depth
    want = load_checkpoint(f"out/{run}")["lam"]
    assert built.state_dict().keys() == want.keys()
    assert [k for k, v in built.state_dict().items() if not torch.equal(v, want[k])] == []


def test_a_phases_last_line_compares_the_gradients_of_its_last_two_steps(tmp_path, monkeypatch):
    """20 steps, logged at 8, 16 and, the end, at 20"""
    seen = {}

    def log(watch):
        seen[watch.run.step] = list(watch.grads)
        return numbers(watch)
    numbers = train.Watch.numbers
    monkeypatch.setattr(train.Watch, "numbers", log)
    monkeypatch.chdir(tmp_path)
    train.main(["--name", "g", "--pretrain", "0", "--warmup", "0", "--e2e", "20", *SMALL, "--log_every", "8"])
    assert seen == {8: [7, 8], 16: [15, 16], 20: [19, 20]}


def test_true_actions_are_standardised_and_fill_the_place_of_latent_ones():
    torch.manual_seed(0)
    cfg, actions = LAMConfig(tokens=2, code_dim=4, latent_scale=0.1), torch.randn(200, 5) * 3 + 1
    z = TrueActions(5, cfg, actions)(actions.view(100, 2, 5))
    assert z.shape == (100, 2, 2, 4)
    flat = z.flatten(2).flatten(0, 1)
    torch.testing.assert_close(flat[:, :5].std(0), torch.full((5,), 0.1))
    torch.testing.assert_close(flat.mean(0), torch.zeros(8))
    assert not flat[:, 5:].any()
    with pytest.raises(ValueError, match="9 dimensions do not fit"):
        TrueActions(9, cfg)


def test_true_actions_drive_a_world_and_its_lam_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--name", "true", *SMALL, "--data", "cross", "--actions", "true"]
    done = run("train.py", *args, "--pretrain", 2, "--warmup", 3, "--e2e", 6, cwd=tmp_path)
    result = json.loads(open("out/true/metrics.jsonl").readlines()[-1])
    assert result["psnr"] and result["controllability"] is not None
    assert result["nmi"] is result["probe_r2"] is result["utilization"] is None, done.stdout
    world, fresh = load_world("out/true"), build(parse(args))
    assert world.true_actions
    lam = world.lam.state_dict()
    assert [k for k, v in fresh.lam.state_dict().items() if not torch.equal(v, lam[k])] == []
    data = clips("cross", 16, 3, split="heldout")[range(4)]
    others = data | {"actions": -data["actions"]}
    _, made = judge.dreams(world, data, ["inferred", "adapted", "shuffled"], others)
    assert torch.equal(made["inferred"], made["adapted"])
    assert not torch.equal(made["inferred"], made["shuffled"])
    run("evaluate.py", "--ckpt", "out/true", "--task", "predict", "--clips", 2, "--seeds", 0,
        "--data", "cross", cwd=tmp_path)
    assert "cross true" in json.load(open("out/true/results.json"))["tables"]["predict"]
    refused = run("evaluate.py", "--ckpt", "out/true", "--task", "probe", cwd=tmp_path, ok=False)
    assert "is driven by true actions" in complaint(refused, "evaluate.py")
    run("plan.py", "--ckpt", "out/true", "--pairs", 1, "--seeds", 0, "--samples", 4, cwd=tmp_path)


@pytest.mark.parametrize("part", ["lam", "dit"])
def test_modes_start_from_the_same_weights(part):
    joint, two_stage = (getattr(build(parse(["--mode", mode])), part).state_dict()
                        for mode in ("joint", "two-stage"))
    assert [k for k in two_stage.keys() - joint.keys() if not k.startswith("fdm.")] == []
    assert [k for k, v in joint.items() if not torch.equal(v, two_stage[k])] == []


def fake_world(args):
    """A World of fake tensors, which have shapes, dtypes and devices, but no values; and its settings"""
    cfg = parse(["--frames", "4", *args])
    world = build(replace(cfg, init="none"))
    world.adapter, world.lam.quantize = Adapter(2, world.lam.cfg), True
    return cfg, world


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("phase, args", [
    ("pretrain", ["--mode", "pretrain"]),
    ("warmup", []),
    ("e2e", ["--odd", "0", "--standardize", "0"]),
    ("lam", ["--mode", "two-stage", "--activation_checkpointing"]),
    ("wm", ["--mode", "two-stage"]),
    ("adapter", ["--mode", "adapt", "--init", "run"]),
    ("adapt", ["--mode", "adapt", "--init", "run"]),
])
def test_types_fit_in_every_phase(phase, args, precision):
    with FakeTensorMode():
        cfg, world = fake_world(args)
        process, groups = Process(precision=precision), train.parameter_groups(world)
        phase = next(row for row in phases(cfg) if row.name == phase)
        model = train.begin(cfg, process, world, phase, groups, torch.optim.AdamW(world.parameters()), ())
        if cfg.activation_checkpointing:
            train.save_memory(world)
        clip = {"fps": torch.full((2,), 24.0), "actions": torch.randn(2, 3, 2)}
        with process.autocast():
            loss, _ = train.LOSSES[phase.loss][1](phase, world, model, clip, torch.rand(2, 3, 4, 16, 16),
                                                  Draw(0), None)
        loss.backward()
        assert loss.dtype == torch.float32
        for name in phase.trains:
            assert {p.grad.dtype for p in groups[name]} == {torch.float32}, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_types_fit_in_dreams_and_plans(guidance, precision, monkeypatch):
    def as_they_are(z, dim, return_inverse):                    # which are equal depends on values
        return z, torch.arange(len(z))

    monkeypatch.setattr(torch.Tensor, "unique", as_they_are)
    with FakeTensorMode(allow_non_fake_inputs=True), Process(precision=precision).autocast(), torch.no_grad():
        _, world = fake_world(["--mode", "two-stage"])
        world.eval()
        x = torch.rand(2, 3, 6, 16, 16)                         # longer than the generator's window
        z, draw = world.lam.encode(x)[0], Draw(0)
        seen = [world.rollout(x[:, :, :1], z, 2, guidance, draw=draw), judge.fdm_rollout(world, x, z),
                judge.whole_rollout(world, x, z, torch.full((2,), 24.0), draw, 2, guidance)]
        assert {made.dtype for made in seen} == {torch.float32}
        frames = np.zeros((3, 16, 16, 3), np.uint8)
        dreamed = plan.dream(world, frames, torch.randn(2, 2), torch.randn(5, 4, 2), 0, 24, 2, 2, guidance)
        assert (dreamed.shape, dreamed.dtype) == ((5, 3, 4, 16, 16), torch.float32)


def assert_near(folder, a, b, args, tolerance=0.02):
    """Two runs have moved to the same weights, up to a small share of the way from where they started."""
    a, b = (load_checkpoint(str(folder / "out" / name)) for name in (a, b))
    world = build(parse([str(x) for x in args]))
    for part in ("lam", "dit"):
        for k, first in getattr(world, part).state_dict().items():
            apart, way = (a[part][k] - b[part][k]).norm(), (a[part][k] - first).norm()
            # AdamW makes steps of the rounding of gradients that are nearly zero
            assert apart <= tolerance * way + 2e-5, f"{part}: {k}"


@pytest.mark.parametrize("args", [
    pytest.param(["--mode", "two-stage", "--pretrain", 0, "--lam_steps", 20, "--wm_steps", 20],
                 id="two-stage"),
    pytest.param(["--pretrain", 2, "--warmup", 20, "--e2e", 20, "--vq_start", 0.3], id="joint"),
])
def test_two_processes_of_4_clips_equal_one_of_8(args, tmp_path):
    """In LAM, WM and both joint phases; codebook, k-means and running moments included."""
    args = [*SMALL, "--batch", 8, "--standardize", 1, "--lr", "3e-4", "--frames", 4, *args]
    run("train.py", "--name", "one", *args, cwd=tmp_path)
    run("train.py", "--name", "two", *args, cwd=tmp_path, processes=2)
    assert_near(tmp_path, "one", "two", args)


def test_parts_of_a_batch_equal_the_whole(tmp_path):
    args = [*SMALL, "--batch", 8, "--standardize", 0, "--lr", "3e-4", "--frames", 4,
            "--pretrain", 2, "--warmup", 5, "--e2e", 5]
    run("train.py", "--name", "one", *args, cwd=tmp_path)
    run("train.py", "--name", "parts", *args, "--accumulate", 4, cwd=tmp_path)
    assert_near(tmp_path, "one", "parts", args)


@pytest.mark.parametrize("args, words", [
    (["--no_such_flag", "1"], "unrecognized arguments"),
    (["--data", "/no/such/path"], "no such file"),
    (["--data", "NOTVIDEO"], "no train clip of 2 frames: "),
    (["--data", "SHORT", "--frames", "8"], "no train clip of 8 frames"),
    (["--data", "EMPTY"], "HDF5 or LeRobot data in this folder"),
    (["--size", "18"], "multiple"),
    (["--mode", "adapt", "--init", "EMPTY"], "no checkpoint at"),
    (["--dit_weights", "/no/such/run"], "no such file or folder"),
    (["--vae_weights", "/no/such/vae"], "no such file"),
    (["--vae_weights", VAE, "--size", "32", "--frames", "16"], "this VAE needs 5, 9,"),
    (["--preset", "opensora"], "no such file"),
    (["--preset", "opensora", "--dry_run", "--vae_weights", "gone"], "no such file"),
], ids=lambda value: None if isinstance(value, str) else " ".join(os.path.basename(a) for a in value))
def test_a_bad_start_gets_one_line_and_leaves_nothing(args, words, tmp_path):
    names = {"NOTVIDEO": tmp_path / "bad.mp4", "SHORT": tmp_path / "short.gif", "EMPTY": tmp_path / "empty"}
    names["NOTVIDEO"].write_bytes(b"this is no video")
    names["EMPTY"].mkdir()
    shades = np.arange(0, 240, 80, dtype=np.uint8)[:, None, None, None]
    imageio.imwrite(names["SHORT"], shades.repeat(32, 1).repeat(32, 2).repeat(3, 3))
    done = run("train.py", *[names.get(a, a) for a in args], cwd=tmp_path, ok=False)
    assert words in complaint(done)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    """A folder with a run whose pre-training is causal and one whose is bidirectional"""
    folder = tmp_path_factory.mktemp("directions")
    for name, causal in (("causal", 1), ("bidirectional", 0)):
        run("train.py", "--name", name, "--pretrain", 3, "--warmup", causal, "--e2e", 0, "--causal", causal,
            *SMALL, "--depth", 2, cwd=folder)
    return folder


def test_bidirectional_pretraining_learns_another_generator(directions):
    def body(name):                             # which warm-up leaves as it is
        dit = load_checkpoint(str(directions / "out" / name))["dit"]
        return {k: v for k, v in dit.items() if not k.startswith("action.")}

    causal, bidirectional = body("causal"), body("bidirectional")
    assert any(not torch.equal(v, bidirectional[k]) for k, v in causal.items())


def test_a_generator_that_was_pretrained_in_both_directions_dreams_causally(directions):
    blocks = load_world(str(directions / "out/bidirectional")).dit.temporal_blocks
    assert [block.attn.causal for block in blocks] == [True, True]


def test_help_shows_the_commands_of_train(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "python train.py --resume out/toy" in capsys.readouterr().out


def test_the_command_that_the_project_is_for(tmp_path):
    """`torchrun train.py --mode joint --warmup 8000` of the README, with tiny budgets."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    args = ["--mode", "joint", "--warmup", "4", "--pretrain", "2", "--e2e", "2", *SMALL]
    with socket.socket() as free:               # the usual port may be in use by another torchrun
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run([*torchrun, os.path.join(HERE, "train.py"), *args], cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PET_MASTER_PORT": port},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result: " in done.stdout
    assert result(tmp_path, "toy")[1]["step"] == 8


# stops of all kinds -----------------------------------------------------------------------------------------

LONG = ["--pretrain", "40", "--warmup", "40", "--e2e", "80", "--ckpt_every", "3", *SMALL,
        "--vq_start", "0.4", "--log_every", "20", "--standardize", "1"]


def children(process):
    """{pid: environment} of the processes that a process has started"""
    found = {}
    for folder in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):                      # it has ended meanwhile
            after_name = open(f"{folder}/stat").read().rsplit(")", 1)[1].split()
            if int(after_name[1]) == process.pid:
                found[int(os.path.basename(folder))] = open(f"{folder}/environ", "rb").read()
    return found


def kill(process):
    """SIGKILL for a process and for torchrun's workers, as when the machine loses power.

    Each worker leads a session of its own: killing torchrun's process group leaves them running.
    """
    for pid in [process.pid, *children(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture
def begin():
    """`start`, for processes that do not outlive the test"""
    processes = []

    def begin(*args, **more):
        processes.append(start(*args, **more))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            kill(process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with runs that nothing stopped, of one and of two processes"""
    folder = tmp_path_factory.mktemp("whole")
    run("train.py", "--name", "1", *LONG, cwd=folder)
    run("train.py", "--name", "2", *LONG, cwd=folder, processes=2)
    return folder


def assert_equal(a, b):
    """Two runs are at the same step, with bit-equal weights and moments."""
    a, b = (load_checkpoint(str(path)) for path in (a, b))
    assert a["step"] == b["step"]
    for part in ("lam", "dit"):
        assert a[part].keys() == b[part].keys()
        assert [k for k, v in a[part].items() if not torch.equal(v, b[part][k])] == [], part
    moments, others = a["optimizer"]["state"], b["optimizer"]["state"]
    assert moments.keys() == others.keys()
    for i in moments:
        different = [k for k, v in moments[i].items() if not torch.equal(v, others[i][k])]
        assert different == [], f"optimizer, parameter {i}"


def newest_step(out):
    """The last step in a run's log; -1 while there is none"""
    try:
        return max(json.loads(line)["step"] for line in open(out / "metrics.jsonl"))
    except (OSError, ValueError):
        return -1


def saved_at(out):
    """When a run's newest checkpoint got its name; 0 while there is none"""
    try:
        return (out / "ckpt.pt").stat().st_mtime_ns
    except OSError:
        return 0


def step_before(out):
    """The step of the checkpoint before the newest; 0 while there is none"""
    return max([int(file.stem.removeprefix("ckpt-")) for file in out.glob("ckpt-*.pt")], default=0)


@pytest.mark.parametrize("processes, kills", [(1, 6), (2, 1)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(processes, kills, whole, tmp_path, begin):
    chance, out = random.Random(0), tmp_path / "out/k"
    args = ["--name", "k", *LONG]
    # moments are told by steps, as seconds are many steps on a quiet machine and none on a busy one; after
    # the last of them comes enough for the run not to be over before it is killed
    for step in sorted(chance.sample(range(130), kills)):
        known = saved_at(out)
        process = begin("train.py", *args, cwd=tmp_path, processes=processes)
        until(lambda: saved_at(out) > known and step_before(out) >= step, process)
        time.sleep(chance.random() * 0.05)      # about the time from one checkpoint to the next
        assert process.poll() is None
        kill(process)
        args = ["--resume", "out/k"]
    assert load_checkpoint(str(out))["step"] < 160
    run("train.py", *args, cwd=tmp_path, processes=processes)
    assert_equal(out, whole / "out" / str(processes))
    rows, last = result(tmp_path, "k")
    steps = [row["step"] for row in rows if row["event"] == "train"]
    assert steps == list(range(20, 161, 20))    # each once, though some were taken twice
    assert last["event"] == "result"


def test_a_dead_rank_is_restarted_by_torchrun(whole, tmp_path, begin):
    process = begin("train.py", "--name", "k", *LONG, cwd=tmp_path, processes=2, restarts=1)
    until((tmp_path / "out/k/ckpt.pt").exists, process)
    second = [pid for pid, environment in children(process).items() if b"\0RANK=1\0" in environment]
    assert len(second) == 1
    os.kill(second[0], signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert "goes on at step" in out
    assert_equal(tmp_path / "out/k", whole / "out/2")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, begin):
    args = ["--name", "k", "--mode", "pretrain", *SMALL]
    process = begin("train.py", *args, "--pretrain", 100000, "--ckpt_every", 100000, cwd=tmp_path)
    until(lambda: newest_step(tmp_path / "out/k") >= 2, process)
    kill(process)
    assert not (tmp_path / "out/k/ckpt.pt").exists()
    run("train.py", "--resume", "out/k", "--pretrain", 30, cwd=tmp_path)
    run("train.py", *args, "--pretrain", 30, "--name", "straight", cwd=tmp_path)
    assert_equal(tmp_path / "out/k", tmp_path / "out/straight")
    resumed, straight = ([row["step"] for row in result(tmp_path, name)[0]] for name in ("k", "straight"))
    assert resumed == straight


ENDLESS = ["--mode", "pretrain", "--pretrain", 100000, "--ckpt_every", 2, *SMALL]


@pytest.mark.parametrize("args", [
    ["--name", "k", *ENDLESS], ["--resume", "out/k"], ["--resume", "out/moved"]], ids=lambda args: args[1])
def test_the_folder_of_a_live_run_is_left_to_it(args, tmp_path, begin):
    process = begin("train.py", "--name", "k", *ENDLESS, cwd=tmp_path)
    out = tmp_path / "out/k"
    until((out / "ckpt.pt").exists, process)
    if args[1] == "out/moved":
        process.send_signal(signal.SIGSTOP)     # its next line would show it that its folder is gone
        out = out.rename(tmp_path / "out/moved")
    done = run("train.py", *args, cwd=tmp_path, ok=False)
    where = "out/k" if args[0] == "--name" else args[1]
    assert f"{where}: process {process.pid} on " in complaint(done)
    assert process.poll() is None
    assert os.listdir(tmp_path / "out") == [out.name]


def test_workers_that_torchrun_left_behind_keep_their_folder(tmp_path, begin):
    process = begin("train.py", "--name", "k", *ENDLESS, cwd=tmp_path, processes=2)
    until((tmp_path / "out/k/ckpt.pt").exists, process)
    ranks = [pid for pid, environment in children(process).items() if b"\0RANK=" in environment]
    process.kill()
    process.wait()
    try:
        for processes in (1, 2):
            done = run("train.py", "--resume", "out/k", cwd=tmp_path, processes=processes, ok=False)
            told = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
            assert len(told) == 1, done.stderr
            assert "is training there" in told[0]
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)


def test_a_run_goes_on_while_the_loaders_of_the_one_that_was_killed_still_live(films, tmp_path, begin,
                                                                               monkeypatch):
    script = tmp_path / "workers.py"            # train.py, but that no source is small enough to need none
    script.write_text("import sys, episodes, train\nepisodes.MEMORY = 0\ntrain.main(sys.argv[1:])")
    monkeypatch.setenv("PYTHONPATH", HERE)
    process = begin(script, "--name", "k", *ENDLESS, "--data", films, cwd=tmp_path)
    until((tmp_path / "out/k/ckpt.pt").exists, process)
    workers = list(children(process))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for worker in workers:                      # by itself it ends within seconds
        os.kill(worker, signal.SIGSTOP)
    try:
        step = load_checkpoint(str(tmp_path / "out/k"))["step"]
        run("train.py", "--resume", "out/k", "--pretrain", step + 1, cwd=tmp_path)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    assert workers


def test_a_run_that_is_moved_aside_may_go_on_beside_the_new_one(trained, tmp_path, begin):
    shutil.copytree(trained[0] / "out/joint", tmp_path / "out/k")
    process = begin("train.py", "--name", "k", *ENDLESS, cwd=tmp_path)
    until((tmp_path / "out/k.1").exists, process)
    run("train.py", "--resume", "out/k.1", "--e2e", 5, cwd=tmp_path)
    assert process.poll() is None


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", refused)
    for _ in range(2):
        lock(str(tmp_path))


@pytest.mark.parametrize("moment", [1, 2])
def test_a_checkpoint_that_was_being_renamed_leaves_a_whole_one(moment, tmp_path, monkeypatch):
    """Its one before gets another name first, then it gets its own."""
    def save(step, before):
        world = {"lam": {}, "dit": {}, "flow": {}}
        checkpoint.save(str(tmp_path), 1, before, step=step, world=world, lam={}, dit={},
                        config=asdict(Config()))

    rename, calls = os.replace, []

    def killed(old, new):
        calls.append(new)
        if len(calls) == moment:
            raise SystemExit
        rename(old, new)

    save(3, None)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        save(6, 3)
    state, file = checkpoint.newest(str(tmp_path))
    assert state["step"] == 3
    assert os.path.basename(file) == ("ckpt.pt" if moment == 1 else "ckpt-00000003.pt")


def test_ctrl_c_leaves_the_checkpoint_that_it_names(tmp_path, begin):
    process = begin("train.py", "--name", "a", "--pretrain", "100000", "--ckpt_every", "5", *SMALL,
                    cwd=tmp_path)
    until((tmp_path / "out/a/ckpt.pt").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    line = complaint(subprocess.CompletedProcess(process.args, 1, "", err))
    assert "stopped by Ctrl-C at step " in line
    # ckpt.pt, but for the moment in which that becomes ckpt-STEP.pt and has no successor yet
    told, file = line.split("the last checkpoint, of step ")[1].split(", is ")
    assert load_checkpoint(str(tmp_path / file))["step"] == int(told)
    load_world(str(tmp_path / file))


def test_ctrl_c_in_the_very_moment_a_checkpoint_gets_its_name(tmp_path):
    code = """if True:
        import os, sys, train
        rename = os.replace

        def interrupted(old, new):
            rename(old, new)
            if new.endswith("ckpt.pt"):
                raise KeyboardInterrupt
        os.replace = interrupted
        train.main(sys.argv[1:])"""
    args = ["--name", "a", "--pretrain", "9", "--ckpt_every", "5", *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}, timeout=300)
    assert done.returncode == 1
    assert "the last checkpoint, of step 5, is out/a/ckpt.pt" in complaint(done)
    load_world(str(tmp_path / "out/a"))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_writes_a_last_checkpoint(processes, whole, tmp_path, begin):
    process = begin("train.py", "--name", "k", *LONG, "--ckpt_every", 1000, cwd=tmp_path, processes=processes)
    until(lambda: newest_step(tmp_path / "out/k") >= 20, process)
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    step = load_checkpoint(str(tmp_path / "out/k"))["step"]
    assert 20 <= step < 160
    told = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1, told                 # one line a node, not one a rank
    assert f"stopped by SIGTERM at step {step}; the last checkpoint, of step {step}, is " in told[0]
    run("train.py", "--resume", "out/k", cwd=tmp_path, processes=processes)
    assert_equal(tmp_path / "out/k", whole / "out" / str(processes))


def test_a_run_keeps_its_last_checkpoint_and_the_one_before(whole):
    files = sorted(file.name for file in (whole / "out/1").glob("ckpt*"))
    assert files == ["ckpt-00000159.pt", "ckpt.pt"]


def truncate(content):
    return content[:len(content) // 2]


def flip_a_bit(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:          # between its entries a bit means nothing
        tensor = max((file.read(name) for name in file.namelist()), key=len)
    at = content.index(tensor) + len(tensor) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


# of several processes the first of the node reads the checksums, and all of them go on from what it has found
@pytest.mark.parametrize("harm, processes", [(truncate, 1), (flip_a_bit, 1), (flip_a_bit, 2)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, processes, whole, tmp_path):
    shutil.copytree(whole / f"out/{processes}", tmp_path / "out/k")
    newest = tmp_path / "out/k/ckpt.pt"
    newest.write_bytes(harm(newest.read_bytes()))
    done = run("train.py", "--resume", "out/k", cwd=tmp_path, processes=processes)
    assert done.stderr.count("ckpt.pt: not a whole checkpoint") == 1
    assert "goes on at step 159" in done.stdout
    assert_equal(newest, whole / f"out/{processes}")


@pytest.mark.parametrize("local_rank, reads", [("0", True), ("1", False)])
def test_one_process_of_a_node_reads_the_checksums_of_a_checkpoint(local_rank, reads, trained, monkeypatch):
    files = []
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: files.append(self))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    load_checkpoint(str(trained[0] / "out/joint"))
    assert bool(files) == reads


def test_ranks_on_gpus_have_a_device_each_and_exchange_what_lies_on_cpus_by_gloo(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, timeout, **_: done.extend([backend, timeout]))
    second = torch.device("cuda:1")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with running.connected(Process(1, 2, 1, second), hours=24):
        pass
    assert done == [second, "cpu:gloo,cuda:nccl", timedelta(hours=24)]


def test_a_lost_checkpoint_gives_way_to_the_one_before(whole, tmp_path):
    shutil.copytree(whole / "out/1", tmp_path / "out/k")
    (tmp_path / "out/k/ckpt.pt").unlink()
    done = run("train.py", "--resume", "out/k", cwd=tmp_path)
    assert "goes on at step 159" in done.stdout
    assert_equal(tmp_path / "out/k", whole / "out/1")


def test_a_run_is_resumed_with_its_own_settings(trained, refusal):
    line = refusal("--resume", trained[0] / "out/joint", "--batch", 8)
    assert "--batch 8: a run is resumed with its own settings, here 4" in line


def test_a_run_that_is_resumed_may_go_on_longer(trained):
    assert parse(["--resume", str(trained[0] / "out/joint"), "--e2e", "6"]).e2e == 6


@pytest.mark.parametrize("flags, words", [
    (["--warmup", 0], "4 of warmup, 4 of e2e; by these lengths they would be 4 of pretrain, 4 of e2e"),
    (["--pretrain", 5], "by these lengths they would be 5 of pretrain, 4 of warmup, 3 of e2e"),
    (["--e2e", 3], "by these lengths they would be 4 of pretrain, 4 of warmup, 3 of e2e"),
])
def test_what_a_run_has_done_keeps_its_phases(flags, words, trained, monkeypatch, refusal_of):
    monkeypatch.chdir(trained[0])
    assert words in refusal_of(train.main, "--resume", "out/joint", *flags)


@pytest.mark.parametrize("step, lengths, fits", [
    (6, {"warmup": 2}, True), (6, {"warmup": 1}, False), (6, {"warmup": 9, "e2e": 0}, True),
    (4, {"pretrain": 5}, True), (5, {"pretrain": 5}, False), (3, {"warmup": 0}, True), (12, {"e2e": 9}, True),
])
def test_phases_to_come_and_the_one_of_now_may_change_their_lengths(step, lengths, fits, trained):
    config = load_checkpoint(str(trained[0] / "out/joint"))["config"]
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="by these lengths"):
        checkpoint.check_past(Config(**config | lengths), {"config": config, "step": step})


def test_a_mistyped_vae_is_not_replaced_by_the_old_one(trained, tmp_path, refusal):
    shutil.copytree(trained[0] / "out/joint", tmp_path / "r")
    assert "--vae_weights nowhere: must be where none lies now" in refusal("--resume", tmp_path / "r",
                                                                           "--vae_weights", "nowhere")
    config = json.loads((tmp_path / "r/config.json").read_text())
    (tmp_path / "r/config.json").write_text(json.dumps(config | {"vae_weights": "vae"}))
    assert "must be where vae lies now" in refusal("--resume", tmp_path / "r", "--vae_weights", "nowhere")
    assert parse(["--resume", str(tmp_path / "r"), "--vae_weights", VAE]).vae_weights == VAE


@pytest.mark.parametrize("content", [
    "", "null", "[]", "3", "{}", '{"torchrun": null, "lr":', '{"torchrun": null, "huge": 1}', "\udcff",
    *(json.dumps({"torchrun": None} | wrong) for wrong in (
        {"lr": None}, {"lr": "1"}, {"batch": 1.5}, {"batch": True}, {"data": ["toy"]}, {"odd": 1}))])
def test_damaged_settings_of_a_run_get_one_line(content, tmp_path, refusal):
    (tmp_path / "config.json").write_bytes(os.fsencode(content))
    assert "not the folder of a run, or of another version, or damaged" in refusal("--resume", tmp_path)


@pytest.mark.parametrize("wrong, words", [
    ({"mode": "x"}, "must be one of"), ({"lr": float("nan")}, "--lr nan"),
    ({"batch": -4}, "--batch -4: must be at least 1")])
def test_settings_of_a_run_that_make_no_sense_get_one_line(wrong, words, tmp_path, refusal):
    (tmp_path / "config.json").write_text(json.dumps({"torchrun": None} | wrong))
    assert words in refusal("--resume", tmp_path)


def test_damaged_lines_of_a_log_cost_no_other(trained, tmp_path):
    shutil.copytree(trained[0] / "out/joint", tmp_path / "out/k")
    log = tmp_path / "out/k/metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    wrong = [b"\xff{\n", b"null\n", b'{"step": 2}\n', b'{"step": "2", "event": "train"}\n', b'{"event": \n']
    log.write_bytes(b"".join([lines[0], *wrong, *lines[1:], lines[1][:9]]))
    before = log.read_bytes()
    done = run("train.py", "--resume", "out/k", "--e2e", 6, cwd=tmp_path)
    assert f"metrics.jsonl: {len(wrong)} damaged lines" in done.stdout
    assert (tmp_path / "out/k/metrics.jsonl.damaged").read_bytes() == before
    assert log.read_bytes().startswith(b"".join(lines[:-1]))    # the last one is the result of step 12
    assert result(tmp_path, "k")[1]["step"] == 14


@pytest.mark.parametrize("config", [None, [], {}, 3, {"size": None}, {"size": "16"}])
def test_a_checkpoint_with_damaged_settings_gets_one_line(config, trained, tmp_path):
    state = torch.load(trained[0] / "out/joint/ckpt.pt", weights_only=True)
    known = state["config"] if config and type(config) is dict else {}
    state["config"] = known | config if known else config
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt: not a whole checkpoint of train.py") as error:
        load_world(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_version_gets_one_line(trained, tmp_path):
    state = torch.load(trained[0] / "out/joint/ckpt.pt", weights_only=True)
    state["world"]["lam"]["pairs"] = True
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="another version's .*'pairs'"):
        load_world(str(tmp_path))


# what a full disk, or a place that cannot be written to, leaves


def confined(tmp_path, program, size, *args, cwd=None):
    """What a program says that has to stop, as no file may become larger than `size` bytes"""
    script = tmp_path / f"confined/{program}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {HERE!r})
        import data, {program}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)           # an error then, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
        data.program({program}.main)""")
    return complaint(run(script, *args, cwd=cwd or tmp_path, ok=False), f"{program}.py")


@pytest.mark.parametrize("size, file", [(10, "config.json"), (1000, "config.json"), (3000, ""),
                                        (30000, "ckpt.pt")])
def test_a_full_disk_stops_a_run_with_one_line(size, file, tmp_path):
    args = ["--name", "k", "--pretrain", 100, "--warmup", 0, "--e2e", 0, *SMALL, "--ckpt_every", 50]
    line = confined(tmp_path, "train", size, *args, "--log_every", 50 if file else 1)
    assert os.path.join("out/k", file).rstrip("/") in line
    assert list(tmp_path.glob("out/k/*.part")) == []
    run("train.py", *args, "--pretrain", 2, cwd=tmp_path)       # once there is room again
    assert result(tmp_path, "k")[1]["step"] == 2


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path):
    shutil.copytree(whole / "out/1", tmp_path / "out/k")
    line = confined(tmp_path, "train", 30000, "--resume", "out/k", "--e2e", 84)
    assert "out/k/ckpt.pt.part: cannot be written; is the disk full?" in line
    assert "the last checkpoint, of step 160, is out/k/ckpt.pt" in line
    assert sorted(f.name for f in tmp_path.glob("out/k/ckpt*")) == ["ckpt-00000159.pt", "ckpt.pt"]
    run("train.py", "--resume", "out/k", cwd=tmp_path)


def test_a_picture_that_cannot_be_written_stops_a_run_with_one_line(trained, tmp_path):
    shutil.copytree(trained[0] / "out/joint", tmp_path / "out/k")
    (tmp_path / "out/k/samples/000014.gif").mkdir()
    line = complaint(run("train.py", "--resume", "out/k", "--e2e", 6, cwd=tmp_path, ok=False))
    assert "000014.gif" in line
    assert "the last checkpoint, of step 14, is out/k/ckpt.pt" in line
    assert list(tmp_path.glob("out/k/samples/*.part")) == []


def test_a_place_where_nothing_can_be_made_stops_a_run_with_one_line(tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "out/toy" in complaint(run("train.py", "--pretrain", 2, *SMALL, cwd=tmp_path, ok=False))


def test_too_little_memory_gets_one_line(monkeypatch, capsys):
    def main(_):
        torch.empty(2 ** 50)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="^train.py: .* you tried to allocate"):
        program(main)


def test_loader_workers_leave_signals_to_their_parent():
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    clips, others = ToyClips("cross", 8, 2), set(torch.multiprocessing.active_children())
    ignoring = loader(clips, 1, 0, 1).worker_init_fn
    batches = torch.utils.data.DataLoader(clips, batch_size=None, sampler=[[i] for i in range(40)],
                                          num_workers=2, worker_init_fn=ignoring, prefetch_factor=1)
    for i, _ in enumerate(batches):
        if i == 2:
            workers = set(torch.multiprocessing.active_children()) - others
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGTERM)
    assert i == 39


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run("train.py", "--name", "k", "--pretrain", 50, "--lr", "1e9", "--lr_warmup", 0,
               "--ckpt_every", 1, *SMALL, cwd=tmp_path, ok=False)
    state = load_checkpoint(str(tmp_path / "out/k"))
    step = state["step"]
    want = f"not finite at step {step}; the last checkpoint, of step {step}, is out/k/ckpt.pt"
    assert want in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [k for k, v in state["dit"].items() if not v.isfinite().all()] == []


def test_numbers_that_are_none_become_null_in_the_log():
    assert running.finite({"a": float("nan"), "b": float("-inf"), "c": 0.5, "d": 3, "e": None}) == {
        "a": None, "b": None, "c": 0.5, "d": 3, "e": None}


def test_a_world_that_has_diverged_gets_one_line_when_it_is_judged():
    world = small_world()
    world.lam.idm.out.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the run has diverged"):
        judge.infer(world, ToyClips("cross", 8, 4), 8)


def test_a_collapsed_codebook_raises_the_alarm_once_and_the_run_goes_on(tmp_path):
    run("train.py", "--name", "k", "--pretrain", 0, "--warmup", 0, "--e2e", 8, *SMALL, "--standardize", 0,
        "--latent_scale", 0.01, cwd=tmp_path)
    rows, last = result(tmp_path, "k")
    alarms = [row["message"] for row in rows if row["event"] == "alarm"]
    assert alarms == ["the codebook has collapsed: nearly all transitions have the same codes"]
    assert last["event"] == "result"


# other data and other weights -------------------------------------------------------------------------------


def test_real_video_trains_and_says_what_it_cannot_measure(films, tmp_path):    # noqa: F811
    run("train.py", "--name", "v", "--data", films, "--frames", 4, "--eval_frames", 4, "--pretrain", 2,
        "--warmup", 2, "--e2e", 2, *SMALL, cwd=tmp_path)
    last = result(tmp_path, "v")[1]
    assert last["nmi"] is None
    assert last["probe_r2"] is None
    assert last["psnr"] > 0


def test_the_papers_preset_is_counted_without_being_built(tmp_path):
    done = run("train.py", "--preset", "opensora", "--dry_run", cwd=tmp_path)
    for words in ("action 73.37 M", "body 904.07 M", "warmup: 8000 steps on videos, trains action + lam",
                  "e2e: 52000 steps", "GB a process", "batch 128",
                  "fits no card of 80 GB: raise --accumulate",
                  "--vae_weights OpenSora-VAE-v1.2: not there yet"):
        assert words in done.stdout, words


def most_bytes(step):
    """Bytes that step() has at any moment, beside what there was before, as torch's profiler records them"""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]    # negative where it is freed
    return np.cumsum(sizes).max()


@pytest.mark.parametrize("args", [
    "",
    "--precision bf16",
    "--mode two-stage --odd 0",
    "--hidden 384 --heads 6 --lam_width 384 --size 32 --batch 4 --pretrain 0",
    "--frames 6 --depth 8 --lam_depth 6 --lam_size 32 --activation_checkpointing --pretrain 0",
    "--frames 4 --accumulate 2 --warmup 0",
    f"--frames 5 --eval_frames 5 --size 64 --vae_weights {VAE} --patch 2 --pretrain 0",
    "--mode adapt --init run --precision bf16",
], ids=["tiny", "bf16", "two-stage", "wide", "recomputed", "in-parts", "vae", "adapt"])
def test_memory_is_what_a_step_takes_at_most(args):
    cfg = parse(args.split())
    world, process = build(replace(cfg, init="none")), Process.here("cpu", cfg.precision)
    if cfg.mode == "adapt":
        world.adapter = Adapter(2, world.lam.cfg)
    world.lam.quantize = True
    needs = {row: train.memory(cfg, world, row, process, row.batch // cfg.accumulate) for row in phases(cfg)}
    if cfg.activation_checkpointing:
        train.save_memory(world)
    groups = train.parameter_groups(world)
    optimizer = train.adamw(cfg, groups)
    weights = sum(x.untyped_storage().nbytes() for x in world.state_dict().values())

    def backward():
        clip = {"fps": torch.full((b,), 24.0), "actions": torch.zeros(b, cfg.frames - 1, 2)}
        x = video(b, cfg.frames, cfg.size)
        with process.autocast():
            train.LOSSES[phase.loss][1](phase, world, model, clip, x, Draw(0), None)[0].backward()

    def step():
        for _ in range(cfg.accumulate):
            backward()
        torch.nn.utils.clip_grad_norm_(world.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for phase, (_, peak) in needs.items():
        b = phase.batch // cfg.accumulate
        model = train.begin(cfg, process, world, phase, groups, optimizer, ())
        step()                                                  # makes moments
        moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
        assert peak == pytest.approx((weights + moments + most_bytes(step)) / 1e9, rel=0.05), phase.name


@pytest.mark.parametrize("gigabytes, card", [(6.8, 8), (6.9, 16), (22, 24), (76, 80), (77, None)])
def test_a_card_has_room_for_cuda_too(gigabytes, card):
    assert running.fits(gigabytes) == card


@pytest.mark.parametrize("args, words", [
    ([], "in fp32 fits a card of 8 GB"),
    (["--batch", "100000", "--accumulate", "1000"], "in fp32 fits a card of 8 GB"),
])
def test_a_dry_run_names_the_smallest_card_that_it_fits(args, words, capsys):
    train.main(["--device", "cpu", "--dry_run", "--mode", "two-stage", "--pretrain", "0", *args])
    assert words in capsys.readouterr().out


@pytest.fixture(scope="module")
def open_sora(tmp_path_factory):
    """A folder with two runs on Open-Sora's weights: one caches latents, one recomputes activations"""
    folder = tmp_path_factory.mktemp("open_sora")
    args = ["--dit_weights", STDIT, "--vae_weights", VAE, "--frames", 5, "--eval_frames", 9, "--batch", 2,
            "--lam_width", 16, "--lam_depth", 1, "--warmup", 2, "--e2e", 2, "--vq_start", 0,
            "--time_shift", "auto", "--sampling_steps", 2, "--eval_clips", 4]
    run("train.py", "--name", "cached", *args, "--latent_cache", "latents", cwd=folder)
    run("train.py", "--name", "recomputed", *args, "--activation_checkpointing", cwd=folder)
    return folder


def test_the_cache_keeps_the_latents_of_each_clip(open_sora):
    assert len(os.listdir(open_sora / "latents")) == 8          # 4 steps of 2 clips


def test_latents_that_cannot_be_written_leave_nothing_behind(tmp_path, monkeypatch):
    def full(state, file):
        pathlib.Path(file).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")            # torch's words for a full disk
    cache = LatentCache(load_opensora_vae(VAE), str(tmp_path))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written; is the disk full?"):
        cache.encode(torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8), video(1, 5, 32))
    assert os.listdir(tmp_path) == []


def test_settings_take_the_sizes_of_open_soras_weights(open_sora):
    assert json.load(open(open_sora / "out/cached/config.json"))["hidden"] == 48


def test_neither_cached_latents_nor_recomputed_activations_change_what_is_learnt(open_sora):
    cached, recomputed = (load_world(str(open_sora / "out" / name)).state_dict()
                          for name in ("cached", "recomputed"))
    assert [k for k, v in cached.items() if not torch.allclose(v, recomputed[k], atol=1e-4)] == []


def test_a_world_on_open_soras_weights_dreams(open_sora):
    world = load_world(str(open_sora / "out/cached"))
    dream = world.rollout(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 8, 2, 16))
    assert dream.shape == (1, 3, 9, 16, 16)


# fuzzed command lines ---------------------------------------------------------------------------------------
# many more of them: FUZZ=500 python -m pytest -q -k fuzzed test_all.py

TINY = f"{shlex.join(SMALL)} --data tank --name n --eval_clips 2"
JOINT = f"{TINY} --pretrain 1 --warmup 1 --e2e 1"
MEASURE = "--ckpt out/r --data tank --clips 2 --transitions 20 --seeds 0 --sampling_steps 1"
PLAN = "--pairs 1 --seeds 0 --samples 4 --iterations 1 --steps 2"
# for each program, lines that are right and over in seconds
LINES = {
    "train": [JOINT, f"{JOINT} --data films", f"{JOINT} --ckpt_every 1 --crop 0.5",
              f"{TINY} --mode pretrain --pretrain 2 --data films:1 toy:2",
              f"{TINY} --mode two-stage --pretrain 1 --lam_steps 1 --wm_steps 1",
              f"{TINY} --mode adapt --init out/r --data held-out --adapter_steps 1 --adapt_steps 1",
              f"{JOINT} --dit_weights dit --vae_weights vae --frames 5 --eval_frames 5 --latent_cache cache",
              "--resume out/r --wm_steps 3", "--dry_run --preset small", "--dry_run --preset opensora"],
    "evaluate": [*(f"{MEASURE} --task {task}" for task in evaluate.TASKS),
                 "--compare out/r out/cut", "--compare out/r,out/r out/r,out/cut"],
    "plan": [f"{PLAN} --ckpt out/r-held-out", f"{PLAN} --random --oracle --task reach --planner mppi",
             "--random --env robodesk --task push_red --goals films"],
    "data": ["--data films --stats", "--data toy --stats",
             "--data films:0.3 cross:0.7 --size 8 --peek p.gif"],
    "bench": ["--batch 1 --samples 2 --json b.json --set hidden=16 depth=1 heads=2 lam_width=16 lam_depth=1"],
    "reproduce": [f"{target} --kilo 1 --seeds 3" for target in reproduce.TARGETS],
}
NUMBERS = "0 1 2 3 7 -1 0.5 -0.5 1e-9 1e12 1000000 1000000000000000000 nan inf -inf".split()
WORDS = ["", " ", ".", "..", "none", "n", "a b", "a/b", "ü漢", "x" * 300, "out", "out/r", "out/r-held-out",
         "out/r/ckpt.pt", "out/r/config.json", "out/null", "out/types", "out/cut", "out/odd", "out/r,out/odd",
         "nowhere", "empty", "films", "films/a.mp4", "films/a.npz", "films/a.mp4/n", "cut.mp4", "dit", "vae",
         "p.gif", "nowhere/p.gif", "beside", "../beside", "{here}/beside"]
SOURCES = ["toy", "robots", "web", "cross", "held-out", "films", "films/a.mp4", "cut.mp4", "a.hdf5",
           "lerobot", "empty", "out", "nowhere", "", "..", "'", ":", "@", "films@", "films:0", "films:nan",
           "films:1e-300", "toy@fps=5", "a:films@fps=5:1", "films@fps=nan", "films@fps=1e-9",
           "films@stride=-1", "films@stride=1000000000000000000", "films@flip=180", "films@flip=up",
           "films@camera=a", "films@split=", "films@actions=last", "a=films"]


@functools.cache
def flags_of(name):
    """The flags of a program, as its own parser has them: argparse's actions"""
    class Built(Exception):
        pass

    def built(parser, argv):
        raise Built(parser)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built) as parser:
        patch.setattr(argparse.ArgumentParser, "parse_args", built)
        sys.modules[name].main([])
    return [action for action in parser.value.args[0]._actions if action.option_strings]


def some_value(rng, flag):
    """A value for a flag: often of its kind, seldom a sensible one"""
    if flag.dest == "set":                                      # of bench.py: a setting of train.py
        setting = rng.choice(flags_of("train"))
        return f"{setting.dest}={some_value(rng, setting)}"
    if rng.random() < 0.1:
        return rng.choice(NUMBERS + WORDS + SOURCES)
    if flag.choices:
        return rng.choice(list(flag.choices))
    if flag.type not in (None, str):
        return rng.choice(NUMBERS)
    return rng.choice(SOURCES if "data" in flag.dest else WORDS)


def fuzzed(number):
    """A program, the words of its command line, a right one with up to three mistakes in it, and how many
    bytes a file may have: now and then the disk is full."""
    rng = random.Random(number)
    [name] = rng.choices(list(LINES), (4, 2, 2, 2, 1, 1))       # about as many as they have flags
    words = shlex.split(rng.choice(LINES[name]))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        kind, flag = rng.randrange(16), rng.choice(flags_of(name))
        spelled = flag.option_strings[-1]
        values = [some_value(rng, flag) for _ in range(rng.choice((1, 1, 2)))]
        if kind == 0:
            words.pop(rng.randrange(len(words)))
        elif kind == 1:
            words[rng.randrange(len(words))] = rng.choice(NUMBERS + WORDS + SOURCES)
        elif kind == 2:
            words.append(f"{spelled}s=1")                       # no such flag
        elif kind == 3 or flag.nargs == 0:
            words.append(spelled)
        elif flag.nargs in (None, "?"):
            words.append(f"{spelled}={values[0]}")
        else:
            words += [spelled, *values]
    return name, words, rng.choice([2 ** 28] * 9 + [2 ** 14])


def fail(*_):
    raise UserError("stands for hours of training")


def quick(*_):
    return 1e9


def obey(name, words, room, folder):
    """Be a program, in a process of its own that may not take much memory."""
    os.setsid()
    os.chdir(folder / "here")
    for stream in (1, 2):
        os.dup2(os.open(folder / f"stream{stream}", os.O_CREAT | os.O_WRONLY), stream)
    pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 ** 32,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reproduce.Lab.execute = fail
    bench.matmul_rate = quick
    sys.argv = [f"{name}.py", *words]
    program(sys.modules[name].main)


@pytest.fixture(scope="module")
def forks():
    """Makes processes in no time: forks of one that has imported everything, and has no threads"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", HERE)
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def found(judged, films, tmp_path_factory):
    """A folder with what the lines name: runs, films and weights, and some of each that are damaged"""
    folder = tmp_path_factory.mktemp("found")
    for run in ("r", "r-held-out"):
        shutil.copytree(judged.folder / "out" / run, folder / "out" / run)
    for run in ("null", "types", "cut", "odd"):
        shutil.copytree(folder / "out/r", folder / "out" / run)
    (folder / "out/null/config.json").write_text("null")
    config = json.loads((folder / "out/r/config.json").read_text())
    config |= {"size": "16", "data": 5, "batch": None}
    (folder / "out/types/config.json").write_text(json.dumps(config))
    (folder / "out/cut/ckpt.pt").write_bytes((folder / "out/r/ckpt.pt").read_bytes()[:1000])
    (folder / "out/odd/results.json").write_text("[1]")
    lines = (folder / "out/r/metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "out/odd/metrics.jsonl").write_text("".join([lines[0], '{"a": tru}\n', "[]\n", *lines[1:]]))
    for name, source in (("films", films), ("dit", STDIT), ("vae", VAE)):
        shutil.copytree(source, folder / name)
    (folder / "cut.mp4").write_bytes((films / "a.mp4").read_bytes()[:2000])
    (folder / "a.hdf5").write_bytes(b"no HDF5")
    (folder / "empty").mkdir()
    (folder / "beside").mkdir()
    (folder / "beside/file").touch()
    (folder / "lerobot/meta").mkdir(parents=True)
    (folder / "lerobot/meta/info.json").write_text("null")
    return folder


def contents(folder):
    """{a file in the folder: its bytes}"""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def end(process, patience=10):
    """Wait until a process ends, after a while by Ctrl-C; whether that was needed."""
    process.join(patience)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):               # it has just ended
        if late:
            os.kill(process.pid, signal.SIGINT)
            process.join(60)
        os.killpg(process.pid, signal.SIGKILL)                  # and its children, if any are left
    process.join()
    return late


@pytest.mark.parametrize("number", range(int(os.environ.get("FUZZ", 60))))
def test_a_fuzzed_line_ends_well_or_with_one_line(number, forks, found, tmp_path):
    name, words, room = fuzzed(number)
    here = tmp_path / "here"
    words = [word.replace("{here}", str(here)) for word in words]
    shutil.copytree(found, here)
    process = forks.Process(target=obey, args=(name, words, room, tmp_path))
    process.start()
    late = end(process)
    said = (tmp_path / "stream2").read_text(errors="replace")
    after = contents(here)
    numbers = b"".join(text for file, text in after.items() if file.endswith((".json", ".jsonl")))
    # the rest tells of films and checkpoints that are skipped
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("data: ", "  "))]
    faults = {
        "a traceback": "Traceback" in said,
        f"status {process.exitcode}": process.exitcode not in (0, 1, 2, 130 if late else 0),
        "not one line": process.exitcode and not (len(lines) == 1 and lines[0].startswith(f"{name}.py: ")),
        "NaN in a file": b"NaN" in numbers or b"Infinity" in numbers,
        "half a file": any(file.endswith(".part") for file in after),
        "moved what is not its own": "beside/file" not in after,
        "refused, and yet changed something": process.exitcode == 2 and after != contents(found),
    }
    if any(faults.values()):
        command = f"ulimit -f {room // 1024}; " + shlex.join(["python", f"{HERE}/{name}.py", *words])
        why = ", ".join(fault for fault, there in faults.items() if there)
        pytest.fail(f"{why}, in a copy of {found}:\n{command}\n{said[-3000:]}", pytrace=False)
    shutil.rmtree(here)


# the code itself --------------------------------------------------------------------------------------------

# an import never runs upwards in this list
ORDER = ("vq transformer lam weights vae dit flow toy formats episodes desk data config checkpoint metrics "
         "judge run evaluate train goals cost plan bench figures reproduce").split()
TESTS = ("test_all", "conftest")


def texts():
    """{module: its source}"""
    files = glob.glob(os.path.join(HERE, "*.py"))
    return {os.path.basename(file)[:-3]: open(file).read() for file in sorted(files)}


def test_functions_have_at_most_60_lines():
    allowed = {"train.train": 80}               # the loop, which is to be seen in one piece
    too_long = {}
    for module, text in texts().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = 1 + node.end_lineno - node.lineno
                if lines > allowed.get(f"{module}.{node.name}", 60):
                    too_long[f"{module}.{node.name}"] = lines
    assert not too_long


def test_files_have_at_most_400_lines():
    lines = {module: len(text.splitlines()) for module, text in texts().items() if module != "test_all"}
    assert {module: n for module, n in lines.items() if n > 400} == {}


def test_modules_have_at_most_7400_lines_together():
    assert sum(len(text.splitlines()) for module, text in texts().items() if module not in TESTS) <= 7400


def test_there_are_at_most_64_settings():
    assert len(fields(Config)) <= 64


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(texts().keys() - set(TESTS))


def test_imports_never_run_upwards():
    upwards = []
    for module, text in texts().items():
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            upwards += [f"{module} imports {name}" for name in names if name in ORDER and module in ORDER
                        and ORDER.index(name) >= ORDER.index(module)]
    assert upwards == []


# these, and `seeded` of part C, stand in the same file, once the parts are one


# evaluation -------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    folder: pathlib.Path        # has the run in out/r, and as out/r-held-out the one that is adapted from it
    said: str                   # by the evaluation, on stdout
    results: dict


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with an FDM, every table and picture made of it"""
    folder = tmp_path_factory.mktemp("judged")
    run("train.py", "--name", "r", "--mode", "two-stage", "--pretrain", 2, "--lam_steps", 2, "--wm_steps", 2,
        "--adapter_steps", 2, "--adapt_steps", 2, *SMALL, cwd=folder)
    done = run("evaluate.py", "--ckpt", "out/r", "--clips", 8, "--transitions", 64, "--seeds", 0, 1,
               cwd=folder)
    (folder / "out/r-held-out").symlink_to("r/adapted-held-out-6")
    return Judged(folder, done.stdout, json.loads((folder / "out/r/results.json").read_text()))


@pytest.fixture
def refusal_of(capsys):
    """A function that runs a program which must refuse its arguments, and returns the one line that says why.

    A mistake in the flags ends it; of any other, `program` prints the line.
    """
    def refuse(main, *args):
        with pytest.raises((SystemExit, UserError, OSError)) as end:
            main([str(a) for a in args])
        said = capsys.readouterr().err if end.type is SystemExit else str(end.value)
        lines = said.splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    return refuse


def test_the_probe_has_a_row_for_each_robot(judged):
    assert set(judged.results["tables"]["probe"]) == set(toy.EMBODIMENTS)


def test_the_probe_stands_beside_its_controls(judged):
    row = judged.results["tables"]["probe"]["cross"]
    assert set(row) == {"l1", "l1_constant", "l1_shuffled", "r2", "nmi"}
    assert {k for k, values in row.items() if len(values) != 2} == set()        # of two seeds


VARIANTS = "inferred shuffled null copy whole fdm".split()


def test_prediction_has_a_row_for_each_robot_and_variant(judged):
    rows = judged.results["tables"]["predict"]
    assert set(rows) == {f"{robot} {variant}" for robot in toy.EMBODIMENTS for variant in VARIANTS}


@pytest.mark.parametrize("kind", ["inferred", "none"])
def test_the_loss_has_a_row_with_actions_and_one_without(kind, judged):
    assert len(judged.results["tables"]["loss"][f"tank {kind}"]["loss"]) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_dreams_are_measured_for_each_seed(variant, judged):
    row = judged.results["tables"]["predict"][f"held-out {variant}"]
    assert len(row["psnr"]) == 2
    assert len(row["ssim"]) == 2
    assert all(-100 <= value <= 100 for value in row["ssim"]), row["ssim"]


def test_controllability_is_what_shuffled_actions_lose(judged):
    rows = judged.results["tables"]["predict"]
    lost = np.subtract(rows["held-out inferred"]["psnr"], rows["held-out shuffled"]["psnr"])
    assert rows["held-out inferred"]["controllability"] == pytest.approx(list(lost), abs=1e-9)


@pytest.mark.parametrize("column", ["psnr", "code_accuracy"])
def test_the_adapted_world_is_measured(column, judged):
    assert column in judged.results["tables"]["adapt"]["adapted"]


def test_an_evaluation_of_everything_leaves_the_adapted_run(judged):
    assert (judged.folder / "out/r/adapted-held-out-6/ckpt.pt").exists()


@pytest.mark.parametrize("codes", ["training", "inferred, held-out", "adapter, held-out"])
def test_the_codebook_has_a_row_for_codes_of_each_origin(codes, judged):
    assert codes in judged.results["tables"]["codebook"]


@pytest.mark.parametrize("measure", ["lpips", "fvd"])
def test_what_is_not_computed_is_recorded(measure, judged):
    assert measure in judged.results["not_computed"]


def test_the_precision_of_an_evaluation_is_recorded(judged):
    assert judged.results["protocol"]["predict"]["precision"] == "fp32"
    assert "precision fp32" in judged.said


def test_what_is_not_computed_is_printed_with_its_reason(judged):
    assert "lpips: not computed; frames of 16 pixels" in judged.said


@pytest.mark.parametrize("name", ["transfer", "predict-held-out"])
def test_pictures_show_whole_clips(name, judged):
    assert imageio.imread(judged.folder / f"out/r/samples/{name}.gif").shape[0] == 8


def test_evaluation_on_two_ranks_equals_one(judged):
    found = {}
    for processes in (1, 2):
        out = f"out/by-{processes}"
        # 40 clips are two batches, one a rank
        run("evaluate.py", "--ckpt", "out/r", "--task", "predict", "--data", "cross", "--clips", 40,
            "--seeds", 0, "--out", out, cwd=judged.folder, processes=processes)
        rows = json.loads((judged.folder / out / "results.json").read_text())["tables"]["predict"]
        found[processes] = {f"{row} {column}": value for row, columns in rows.items()
                            for column, (value,) in columns.items()}
    assert {"cross inferred psnr", "cross fdm ssim"} <= found[1].keys()
    assert found[2] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


# what results.json keeps from one evaluation to the next


REACH, PUSH = {"reach": {"success": [1.0]}}, {"push": {"success": [0.5]}}
PROTOCOL = {"seeds": (0,), "steps": 6}


@pytest.fixture
def saved(tmp_path):
    """A function that saves tables of a step, and returns all tables that the file then has.

    It has those of the tasks `plan` and `probe` already, measured at step 5 by PROTOCOL.
    """
    def save(step, tables, protocol):
        evaluate.save_results(str(tmp_path), "r", step, tables, protocol)
        return json.loads((tmp_path / "results.json").read_text())["tables"]

    save(5, {"plan": REACH, "probe": {"x": {}}}, PROTOCOL)
    return save


def test_rows_that_were_measured_alike_stay(saved):
    assert saved(5, {"plan": PUSH}, PROTOCOL)["plan"] == REACH | PUSH


def test_a_row_that_is_measured_again_is_replaced(saved):
    again = {"reach": {"success": [0.1]}}
    assert saved(5, {"plan": again}, PROTOCOL)["plan"] == again


def test_rows_that_were_measured_by_another_protocol_go(saved):
    assert saved(5, {"plan": PUSH}, PROTOCOL | {"steps": 9})["plan"] == PUSH


@pytest.mark.parametrize("steps", [6, 9])
def test_tables_of_other_tasks_stay_whatever_their_protocol(steps, saved):
    assert saved(5, {"plan": PUSH}, PROTOCOL | {"steps": steps})["probe"] == {"x": {}}


@pytest.mark.parametrize("content", [
    "", "null", "[]", "{}", '{"tables": 3}', '{"tables": {"a": 1}}', '{"tables": {"a": {"b": {"c": 1}}}}',
    '{"tables": {"a": {"b": {"c": ["1"]}}}}', '{"tables": {}, "protocol": null}'])
@pytest.mark.parametrize("script, args", [
    (evaluate, ["--ckpt", "out/r"]), (evaluate, ["--compare", "other", "other"]), (plan, ["--random"])])
def test_a_file_of_other_results_is_refused_before_measuring(script, args, content, judged, tmp_path,
                                                            monkeypatch, refusal_of):
    monkeypatch.setattr(evaluate, "TASKS", {})
    monkeypatch.setattr(plan, "measure", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(judged.folder / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.json").write_text(content)
    more = ["--out", "other"] if "--compare" not in args else []
    assert "other/results.json: not the results of an evaluation" in refusal_of(script.main, *args, *more)
    assert (tmp_path / "other/results.json").read_text() == content


@pytest.mark.parametrize("script, args", [(evaluate, ["--ckpt", "out/r"]), (plan, ["--random"])])
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(script, args, judged, monkeypatch):
    monkeypatch.setattr(evaluate, "TASKS", {})
    monkeypatch.setattr(plan, "measure", None)
    monkeypatch.chdir(judged.folder)
    with pytest.raises(OSError, match="out/r/config.json"):     # `program` makes a line of it
        script.main([*args, "--out", "out/r/config.json"])


@pytest.mark.parametrize("script, args", [
    ("plan", "--random --task reach --pairs 1 --seeds 0 --out p"),
    ("bench", "--batch 1 --samples 1 --json p/b.json --set hidden=16 depth=1 heads=2 lam_depth=1")])
def test_a_full_disk_stops_what_measures_with_one_line(script, args, tmp_path):
    (tmp_path / "p").mkdir()
    line = confined(tmp_path, script, 100, *args.split())
    assert line.startswith(f"{script}.py: [Errno 27] File too large: 'p/")
    assert list(tmp_path.glob("p/**/*.part")) == []


def test_tables_of_an_earlier_step_go(saved):
    assert saved(6, {"probe": {}}, {}) == {"probe": {}}


# the adaptation that an evaluation starts


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A folder with a short run in runs/r, of which an earlier checkpoint is kept, and none in out"""
    folder = tmp_path_factory.mktemp("moved")
    run("train.py", "--name", "r", "--pretrain", 2, "--warmup", 1, "--e2e", 1, "--ckpt_every", 3,
        "--adapter_steps", 1, "--adapt_steps", 1, *SMALL, cwd=folder)
    (folder / "out").rename(folder / "runs")
    return folder


@pytest.mark.parametrize("place, ckpt, step", [
    (".", "runs/r", 4), ("runs/r", ".", 4), ("runs/r", "ckpt.pt", 4), ("/", "ABSOLUTE", 4),
    (".", "runs/r/ckpt-00000003.pt", 3)])
def test_a_run_is_adapted_wherever_it_lies_and_whoever_calls(place, ckpt, step, moved, monkeypatch, capsys):
    monkeypatch.chdir(moved / place)
    shutil.rmtree(moved / f"runs/r/adapted-held-out-{step}", ignore_errors=True)
    ckpt = str(moved / "runs/r") if ckpt == "ABSOLUTE" else ckpt
    evaluate.main(["--ckpt", ckpt, "--task", "adapt", "--clips", "2", "--transitions", "20", "--seeds", "0"])
    assert "code_accuracy" in capsys.readouterr().out
    made = load_checkpoint(str(moved / f"runs/r/adapted-held-out-{step}"))
    assert all(torch.equal(v, made["lam"][k]) for k, v in load_checkpoint(ckpt)["lam"].items())
    assert not (moved / "out").exists()


class Trainings:
    """Stands for `subprocess.run`: notes how train.py was called, and ends it with `status`."""
    status, stderr = 0, ""

    def __init__(self):
        self.flags, self.options = [], []

    def __call__(self, command, **options):
        python, script, *flags = command
        assert python == sys.executable
        assert os.path.basename(script) == "train.py"
        self.flags.append(flags)
        self.options.append(options)
        return subprocess.CompletedProcess(command, self.status, stderr=self.stderr)


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Calls of train.py, none of which does anything, in a folder where nothing is but the run out/r"""
    (tmp_path / "out/r").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = Trainings()
    monkeypatch.setattr(evaluate.subprocess, "run", calls)
    return calls


ADAPTED = "out/r/adapted-held-out-30"


def adapt(config={}, *args):
    flags = ["--ckpt", "out/r", "--adapt_data", "held-out", *args]
    return evaluate.adapted(evaluate.parse(flags), config, 30)


def leave_adaptation(log):
    """Leave a checkpoint and a log's line in the folder of an adaptation, as one does."""
    os.makedirs(ADAPTED)
    pathlib.Path(ADAPTED, "ckpt.pt").touch()
    pathlib.Path(ADAPTED, "metrics.jsonl").write_text(log + "\n")


def settings_of_adaptation():
    """Those that differ from the defaults"""
    defaults = asdict(Config())
    settings = parse([f"--resume={ADAPTED}"])
    return {name: value for name, value in asdict(settings).items() if value != defaults[name]}


def test_an_adaptation_is_a_run_of_train_within_the_one_that_it_starts_from(trainings):
    assert adapt() == ADAPTED
    assert trainings.flags == [[f"--resume={ADAPTED}"]]
    assert settings_of_adaptation() == {"name": "adapted-held-out-30", "mode": "adapt", "data": "held-out",
                                        "init": os.path.abspath("out/r"), "eval_clips": 1,
                                        "resume": ADAPTED}


def test_an_adaptation_runs_in_the_callers_folder(trainings):
    adapt()
    assert "cwd" not in trainings.options[0]


def test_an_adaptation_keeps_the_settings_of_its_run(trainings):
    adapt({"seed": 3})
    assert settings_of_adaptation()["seed"] == 3


def test_an_adaptation_finds_the_vae_where_it_lies_now(trainings):
    adapt({"vae_weights": "there"}, "--vae_weights", "here")
    assert settings_of_adaptation()["vae_weights"] == "here"


def test_an_adaptation_takes_no_setting_that_it_has_itself_or_that_is_gone(trainings):
    adapt({"seed": 3, "batch": 64, "pairs": True, "resume": "", "freeze_lam": True})
    assert not {"batch", "pairs", "freeze_lam"} & settings_of_adaptation().keys()


def test_an_adaptation_is_one_process_whatever_the_ranks_of_the_evaluation(trainings, monkeypatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    adapt()
    assert not torchrun.keys() & trainings.options[0]["env"].keys()


def test_an_adaptation_that_was_stopped_is_gone_on_with(trainings):
    leave_adaptation('{"event": "train"}')
    assert adapt() == ADAPTED
    assert trainings.flags == [[f"--resume={ADAPTED}"]]


def test_an_adaptation_that_is_whole_is_used(trainings):
    leave_adaptation('{"event": "result"}')
    assert adapt() == ADAPTED
    assert trainings.flags == []


def test_an_adaptation_that_fails_says_why_in_one_line(trainings):
    trainings.status, trainings.stderr = 1, "warning\ntrain.py: no room\n"
    with pytest.raises(UserError, match="^adaptation failed: train.py: no room$"):
        adapt()


# LPIPS for real


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """The measure, with its real network, and the heads of that as another package has them"""
    needs("lpips")
    folder = tmp_path_factory.mktemp("lpips")
    heads = lpips_weights(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        return Lpips("cpu"), heads


def still(name):
    """An image of the LPIPS repository as a video of two equal frames (1, 3, 2, 64, 64)"""
    image = imageio.imread(os.path.join(HERE, "assets", "fixtures", "lpips", f"{name}.png"))
    return to_video(torch.from_numpy(image)[None, None].expand(1, 2, *image.shape))


@pytest.mark.parametrize("name, distance", [("ex_p0", 72.2), ("ex_p1", 13.8), ("ex_ref", 0.0)])
@torch.no_grad()
def test_lpips_of_its_repositorys_images_is_what_that_says(name, distance, lpips):
    measure, _ = lpips
    assert measure(still("ex_ref"), still(name)).tolist() == pytest.approx([distance], abs=0.05)


def test_lpips_has_the_heads_that_another_port_has(lpips):
    measure, heads = lpips
    for lin, head in zip(measure.net.lins, heads, strict=True):
        assert torch.equal(lin.model[-1].weight, head)


# LPIPS and FVD, by networks of a few lines behind the interfaces of the real ones


class Distance(torch.nn.Module):
    """Stands for lpips.LPIPS: frames (n, 3, h, w), twice -> (n, 1, 1, 1)"""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"

    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


class Detector(torch.nn.Module):
    """Stands for StyleGAN-V's I3D: (b, 3, t, 224, 224) -> (b, 3t)"""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        assert x.shape[3] == 224
        assert x.shape[4] == 224
        assert not rescale
        assert not resize
        assert return_features
        return x.mean((3, 4)).flatten(1)


@pytest.fixture
def i3d(tmp_path, monkeypatch):
    """A file with FVD's network, where the package lpips is installed too"""
    package = type(sys)("lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    return str(tmp_path / "i3d.pt")


def test_lpips_is_100_times_what_its_network_says_of_frames(i3d):
    measures, _, _ = video_measures(32, 12, "cpu", i3d)
    a, b = video(3, 12, 32), video(3, 12, 32, seed=1)
    assert torch.allclose(measures["lpips"](a, b), 100 * (a - b).abs().mean((1, 2, 3, 4)), atol=1e-4)


def test_fvd_has_the_features_that_its_network_makes_of_larger_frames(i3d):
    _, features, _ = video_measures(32, 12, "cpu", i3d)
    clips = video(3, 12, 32)
    assert torch.allclose(features["fvd"](clips), resize(clips, 224).mean((3, 4)).flatten(1), atol=1e-5)


@pytest.mark.parametrize("size, frames, missing", [
    pytest.param(32, 12, set(), id="nothing is missing"),
    pytest.param(32, 8, {"fvd"}, id="too short"),
    pytest.param(16, 12, {"lpips"}, id="too small for LPIPS"),
    pytest.param(8, 12, {"lpips", "ssim"}, id="too small for SSIM"),
])
def test_what_videos_are_too_small_or_too_short_for_has_a_reason(size, frames, missing, i3d):
    measures, features, why = video_measures(size, frames, "cpu", i3d)
    assert set(why) == missing
    assert set(measures) | set(features) == {"psnr", "ssim", "lpips", "fvd"} - missing


def test_a_file_that_is_no_network_gets_one_line(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(UserError, match="cannot be read as TorchScript") as error:
        video_measures(32, 12, "cpu", str(tmp_path / "bad.pt"))
    assert "\n" not in str(error.value)


def test_an_evaluation_goes_on_without_fvd_where_clips_are_too_short(judged, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(judged.folder)
    evaluate.main(["--ckpt", "out/r", "--task", "predict", "--data", "cross", "--clips", "8", "--seeds", "0",
                   "--i3d", "out/r/config.json", "--out", str(tmp_path)])
    assert "fvd: not computed; needs clips of at least 11 frames" in capsys.readouterr().out
    assert "cross inferred" in json.loads((tmp_path / "results.json").read_text())["tables"]["predict"]


# comparisons


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """The folders a and b of two evaluated runs, with a PSNR of each of three seeds"""
    monkeypatch.chdir(tmp_path)
    for name, values in {"a": [20.0, 21.0, 24.0], "b": [20.0, 22.0, 26.0]}.items():
        tables = {"predict": {"inferred": {"psnr": values}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"tables": tables}))
    return tmp_path


def compared(a, b, capsys):
    """{column: cell} of the one row of a comparison"""
    evaluate.main(["--compare", a, b])
    header, row = (re.split("  +", line) for line in capsys.readouterr().out.strip().splitlines())
    return dict(zip(header, row, strict=True))


def test_two_runs_are_compared_seed_by_seed(two_runs, capsys):
    needs("scipy")
    row = compared("a", "b", capsys)
    assert row["paired"] == "predict inferred psnr"
    assert row["A"] == "21.667 +- 2.082"
    assert row["B"] == "22.667 +- 3.055"
    assert row["A - B"] == "-1.000 +- 1.000"
    assert row["t"] == "-1.732"
    assert row["p"] == "0.225"
    assert row["n"] == "3.000"


def test_sets_of_runs_are_compared_by_the_runs_means(two_runs, capsys):
    needs("scipy")
    row = compared("a,b", "b,b", capsys)
    assert row["A"] == "22.167 +- 0.707"                        # of 65/3 and 68/3
    assert row["B"] == "22.667 +- 0.000"
    assert row["n"] == "2.000"


def test_what_has_no_value_is_left_out_of_a_comparison(two_runs, capsys):
    needs("scipy")
    for name in ("a", "b"):
        file = two_runs / name / "results.json"
        tables = json.loads(file.read_text())["tables"]
        tables["predict"]["inferred"]["seconds"] = []           # random actions take no plan, say
        file.write_text(json.dumps({"tables": tables}))
    assert compared("a,b", "b,b", capsys)["paired"] == "predict inferred psnr"


@pytest.mark.parametrize("sets", [("a,a-1", "b"), ("b", "a-1")])
def test_a_comparison_names_the_run_that_was_not_evaluated(sets, two_runs, refusal_of):
    assert "--compare a-1: has no results.json" in refusal_of(evaluate.main, "--compare", *sets)


# mistakes


@pytest.mark.parametrize("args, words", [
    pytest.param([], "which run?", id="in the flags"),
    pytest.param(["--ckpt", "nowhere"], "no checkpoint at", id="in what they name"),
])
@pytest.mark.parametrize("script", ["evaluate.py", "plan.py"])
def test_a_mistake_ends_the_program_with_one_line(script, args, words, judged):
    assert words in complaint(run(script, *args, cwd=judged.folder, ok=False), script)


@pytest.mark.parametrize("ckpt, args, words", [
    ("r", ["--clips", 1], "argument --clips: 1: must be at least 2"),
    ("r", ["--seeds", -1], "argument --seeds: -1: must be at least 0"),
    ("r", ["--guidance", "nan"], "argument --guidance: nan: must be at least 0"),
    ("r", ["--transitions", 9], "argument --transitions: 9: must be at least 20"),
    ("r", ["--task", "adapt", "--adapt_data", "toy"], "has no actions"),
    ("r-held-out", ["--task", "adapt", "--adapt_data", "cross"], "takes 2"),
    ("r", ["--task", "probe", "--data", "/no/such/video"], "no such file"),
])
def test_bad_evaluations_get_one_line(ckpt, args, words, judged, monkeypatch, refusal_of):
    monkeypatch.chdir(judged.folder)
    assert words in refusal_of(evaluate.main, "--ckpt", f"out/{ckpt}", "--seeds", 0, *args)


# planning ---------------------------------------------------------------------------------------------------


TARGET = torch.tensor([[0.5, -0.3], [0.9, 1.4], [-0.2, 0.0]])   # (horizon, a); 1.4 lies beyond the bound


def near_target(x):
    return -(x - TARGET).square().sum((1, 2))


def two_hills(x):
    """The higher one at 0.8, the lower one at -0.2"""
    high, low = ((x - top).square().sum((1, 2)) for top in (0.8, -0.2))
    return torch.exp(-8 * high) + 0.5 * torch.exp(-8 * low)


def test_cem_finds_an_optimum():
    found = plan.cem(near_target, torch.zeros(3, 2), torch.ones(2), samples=300, iterations=12, beta=0.0,
                     generator=seeded())
    assert torch.allclose(found, TARGET.clamp(-1, 1), atol=0.03)


def test_cem_finds_the_higher_hill_from_a_start_nearer_to_the_lower():
    found = plan.cem(two_hills, torch.zeros(1, 2), torch.ones(2), samples=500, iterations=8, beta=0.0,
                     generator=seeded())
    assert torch.allclose(found, torch.full((1, 2), 0.8), atol=0.1)


def test_cem_within_bounds_looks_at_most_half_of_the_way_to_the_nearer_bound():
    seen = []

    def score(x):
        seen.append(x)
        return near_target(x)
    plan.cem(score, torch.tensor([[0.0, 0.9]]), torch.tensor([2.0, 2.0]), 4000, iterations=1, bounded=True,
             beta=0.0, generator=seeded())
    spread = (seen[0][:, 0] - torch.tensor([0.0, 0.9])).clamp(max=0).square().mean(0) * 2     # the half below
    assert torch.allclose(spread.sqrt(), torch.tensor([0.5, 0.05]), rtol=0.05)


def test_mppi_finds_an_optimum_over_warm_starts():
    mean, generator = torch.zeros(3, 2), seeded()
    for _ in range(32):
        mean = plan.mppi(near_target, mean, torch.tensor([0.2, 0.2]), samples=2000, gamma=50.0, beta=0.0,
                         generator=generator)
    assert torch.allclose(mean, TARGET.clamp(-1, 1), atol=0.05)


def mppi_at(gamma):
    """What MPPI makes of 50 samples, and these"""
    around = torch.zeros(3, 2), torch.ones(2), 50
    found = plan.mppi(near_target, *around, gamma=gamma, generator=seeded(1))
    return found, plan.proposals(*around, generator=seeded(1))


def test_mppi_weighs_all_samples_alike_at_gamma_0():
    found, samples = mppi_at(0.0)
    assert torch.allclose(found, samples.mean(0), atol=1e-6)


def test_mppi_takes_the_best_sample_at_a_high_gamma():
    found, samples = mppi_at(1e5)
    assert torch.allclose(found, samples[near_target(samples).argmax()], atol=1e-5)


@pytest.fixture(scope="module")
def correlated():
    """Many proposals of three actions with one dimension around zero, n_t = n_(t-1) / 2 + std e_t / 2"""
    x = plan.proposals(torch.zeros(3, 1), torch.tensor([0.1]), 200000, beta=0.5, generator=seeded())
    return x[..., 0]                                            # (n, horizon)


def test_proposals_have_the_deviations_of_vp2s_noise(correlated):
    want = 0.1 * torch.tensor([1, 0.5, 0.375]).sqrt()
    assert torch.allclose(correlated.std(0), want, rtol=0.01)


def test_proposals_are_correlated_in_time(correlated):
    assert torch.corrcoef(correlated.T)[0, 1] == pytest.approx(0.5 ** 0.5, abs=0.01)


def test_proposals_stay_within_bounds():
    x = plan.proposals(torch.zeros(2, 2), torch.ones(2), 100, generator=seeded())
    assert x.max() == 1
    assert x.min() == -1


def black_and_white():
    """A black video and a white one, of 4 frames: (2, 3, 4, 64, 64)"""
    return torch.stack([torch.full((3, 4, 64, 64), shade) for shade in (-1.0, 1.0)])


BLACK = torch.full((3, 64, 64), -1.0)


def test_a_plan_costs_half_the_squared_error_of_all_frames():
    assert cost.Cost()(black_and_white(), BLACK).tolist() == [0.0, -0.5 * 3 * 4 * 64 * 64]


@torch.no_grad()
def test_a_classifier_adds_10_times_its_logits_of_all_frames():
    torch.manual_seed(0)
    classifier = cost.Classifier().eval()
    logits = classifier(torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)]))       # black and white
    got = cost.Cost("pixels", None, classifier)(black_and_white(), BLACK)
    assert torch.allclose(got, torch.tensor([0.0, -24576.0]) + 10 * 4 * logits, atol=1e-2)


def test_latents_cost_half_their_squared_error_frame_by_frame():
    torch.manual_seed(0)
    vae, video = FrameVAE(channels=8, width=8).eval(), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    error = vae.encode(video) - vae.encode(video[:1, :, :1])
    got = cost.Cost("latent", vae)(video, video[0, :, 0])
    assert torch.allclose(got, -0.5 * error.square().sum((1, 2, 3, 4)), rtol=1e-4)
    assert got[0] > got[1]                                      # its first frame is the goal


def test_latents_of_a_vae_of_whole_films_are_compared_frame_by_frame():
    vae, video = load_opensora_vae(VAE), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    judged = cost.Cost("latent", vae)
    got = judged(video, video[0, :, 0])
    assert torch.allclose(got, sum(judged(video[:, :, t:t + 1], video[0, :, 0]) for t in range(5)), rtol=1e-4)


def test_a_batch_of_any_size_is_judged_in_parts():
    assert torch.equal(cost.in_parts(torch.neg, torch.arange(7.0), size=3), -torch.arange(7.0))


def lamps(folder, episodes=20, solved=True):
    """Write episodes of six frames; a lamp goes on at the fifth, which does the task push_green"""
    rng = np.random.default_rng(0)
    for i in range(episodes):
        frames = rng.integers(0, 100, (6, 64, 64, 3)).astype(np.uint8)
        frames[4:, 20:40, 20:40] += 100
        done = np.zeros((6, 7), bool)
        done[4:, desk.TASKS.index("push_green")] = True
        labels = dict(actions=np.zeros((5, 5)), look="fast") | ({"solved": done} if solved else {})
        desk.write_episode(str(folder / f"desk_{i:05d}"), frames, labels, 10)


@pytest.fixture(scope="module")
def lamp(tmp_path_factory):
    """A trained classifier's file, the table that its training ended with, and the folder of its episodes"""
    folder = tmp_path_factory.mktemp("lamps")
    (folder / "data").mkdir()
    lamps(folder / "data")
    done = run("cost.py", "--task", "push_green", "--data", "data", "--out", "c.pt", "--steps", 20,
               "--batch", 8, cwd=folder)
    return folder / "c.pt", done.stdout, folder / "data"


@torch.no_grad()
def test_a_classifier_learns_from_our_episodes_what_success_looks_like(lamp):
    file, said, _ = lamp
    classifier = cost.open_classifier(str(file), "push_green", "fast", 64, "cpu")
    images = torch.full((2, 3, 64, 64), 0.2)
    images[1, :, 20:40, 20:40] += 0.4
    dark, lit = classifier(images)
    assert dark < 0 < lit
    title, row = (line.split() for line in said.splitlines()[:2])
    assert title[-2:] == ["done", "frames"]
    *_, precision, chance, positives, frames = map(float, row[1:])
    assert (precision, chance) == (1, pytest.approx(1 / 3, abs=1e-3))           # two of six frames
    heldout = len(Episodes(str(lamp[2]), 64, 1, split="heldout").episodes)
    assert (positives, frames) == (2 * heldout, 6 * heldout)


def test_a_classifier_of_the_same_seed_has_the_same_weights(lamp):
    images, solved, look = cost.examples(str(lamp[2]), "push_green", "train")
    assert look == "fast"
    made = [cost.fit(images, solved, 2, 4, seed, Process()).state_dict() for seed in (1, 1, 2)]
    same = [all(torch.equal(w, other[k]) for k, w in made[0].items()) for other in made[1:]]
    assert same == [True, False]


def test_half_of_what_a_classifier_is_trained_on_are_successes(monkeypatch):
    seen, images = [], torch.zeros(100, 3, 64, 64, dtype=torch.uint8)
    images[:2] = 255                                            # two successes of a hundred

    def forward(self, x):
        seen.append(x)
        return self.net[0](x).mean((1, 2, 3))

    monkeypatch.setattr(cost.Classifier, "forward", forward)
    cost.fit(images, torch.arange(100) < 2, 3, 8, 0, Process())
    assert [x.mean((1, 2, 3)).tolist() for x in seen] == [[1] * 4 + [0] * 4] * 3


@pytest.mark.parametrize("task, look, words", [
    ("push_red", "fast", "knows push_green, not push_red"),
    ("push_green", "published", "c.pt has fast, --look has published; take one"),
])
def test_a_classifier_judges_its_own_task_in_its_own_look(task, look, words, lamp):
    with pytest.raises(UserError, match=words):
        cost.open_classifier(str(lamp[0]), task, look, 64, "cpu")


def test_vp2s_classifier_knows_the_published_look(tmp_path):
    torch.manual_seed(0)
    theirs, file = cost.Classifier(), str(tmp_path / "push_red.pt")
    torch.save(theirs.state_dict(), file)
    opened = cost.open_classifier(file, "push_red", "published", 64, "cpu")
    assert all(torch.equal(w, theirs.state_dict()[k]) for k, w in opened.state_dict().items())
    with pytest.raises(UserError, match="push_red.pt has published, --look has fast; take one"):
        cost.open_classifier(file, "push_red", "fast", 64, "cpu")


@pytest.mark.parametrize("how, args, words", [
    ({}, ["--task", "open_slide"], "open_slide is done in 0 of 18 train episodes, which takes 5 or more"),
    ({"solved": False}, [], "does not tell which tasks are done, as in episodes of plan.py --collect"),
    ({"episodes": 4}, [], "push_green is done in 3 of 3 train episodes, which takes 5 or more"),
    ({}, ["--out", "."], "--out .: takes the name of a file"),
    ({}, ["--out", "nowhere/c.pt"], "--out nowhere/c.pt: takes the name of a file, in a folder that can be"),
    ({}, ["--task", "fly"], "argument --task: invalid choice: 'fly'"),
])
def test_a_classifier_that_cannot_be_trained_says_why(how, args, words, tmp_path, monkeypatch, refusal_of):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    lamps(tmp_path / "data", **how)
    refused = refusal_of(cost.main, "--task", "push_green", "--data", "data", "--out", "c.pt", *args)
    assert words in refused
    assert not os.path.exists("c.pt")


def test_the_classifier_has_the_names_of_vp2s_weights():
    names = cost.Classifier().state_dict().keys()
    for name in ("net.0.weight", "net.1.cnv.0.weight", "net.5.cnv.2.bias", "net.7.weight", "net.9.weight",
                 "net.11.bias"):
        assert name in names


@pytest.mark.parametrize("scores, labels, found", [
    ([3, 2, 1, 0], [1, 1, 0, 0], 1),
    ([0, 1, 2, 3], [1, 1, 0, 0], (1 / 3 + 2 / 4) / 2),
    ([3, 2, 1, 0], [1, 0, 1, 0], (1 + 2 / 3) / 2),
    ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),                        # by chance
])
def test_average_precision_known_answers(scores, labels, found):
    assert average_precision(torch.tensor(scores), torch.tensor(labels).bool()) == pytest.approx(found)


@pytest.mark.parametrize("share, n, interval", [
    (0.5, 10, (0.2366, 0.7634)),
    (0, 30, (0, 0.1135)),
])
def test_wilson_interval_known_answers(share, n, interval):
    assert wilson(share, n) == pytest.approx(interval, abs=1e-4)


class Candidates(NamedTuple):
    """What a world dreamed of five candidates of three actions, the fourth equal to the second"""
    world: object
    frames: np.ndarray          # (7, h, w, 3), what was seen
    past: torch.Tensor          # (6, a), what was done
    actions: torch.Tensor       # (5, 3, a)
    seen: int                   # of the frames, those that the dream starts from
    beyond: int                 # actions that fill up the last latent frame
    batches: list               # how many candidates each rollout had
    video: torch.Tensor         # (5, 3, 3, h, w)


# with a temporal stride of 4, a context of 6 frames is not one of whole latent ones
@pytest.fixture(params=[(small_world, 8, 2, 2, 0), (strided_world, 32, 6, 5, 1)], ids=["plain", "strided"])
def candidates(request, monkeypatch):
    make, size, context, seen, beyond = request.param
    world = make()
    world.adapter = Adapter(3, world.lam.cfg)
    rollout, batches = world.rollout, []

    def counted(frames, actions, *args):
        batches.append(len(actions))
        return rollout(frames, actions, *args)

    frames = np.random.default_rng(0).integers(0, 255, (7, size, size, 3), np.uint8)
    past, actions = torch.randn(6, 3, generator=seeded()), torch.randn(5, 3, 3, generator=seeded(1))
    actions[3] = actions[1]
    with monkeypatch.context() as patch:
        patch.setattr(world, "rollout", counted)
        dreamed = plan.dream(world, frames, past, actions, 7, 24, context, 2, 1.0)
    return Candidates(world, frames, past, actions, seen, beyond, batches, dreamed)


def test_only_the_horizon_of_a_dream_is_returned(candidates):
    size = candidates.frames.shape[1]
    assert candidates.video.shape == (5, 3, 3, size, size)


def test_equal_candidates_are_dreamed_once(candidates):
    assert candidates.batches == [4]
    assert torch.equal(candidates.video[3], candidates.video[1])
    assert not torch.equal(candidates.video[0], candidates.video[1])


@pytest.mark.parametrize("i", [0, 4])
def test_the_dream_of_a_candidate_is_the_rollout_of_its_latent_actions(i, candidates):
    world, actions, seen = candidates.world, candidates.actions[i], candidates.seen
    whole = torch.cat([candidates.past[7 - seen:], actions, actions[-1:].expand(candidates.beyond, -1)])
    context = torch.from_numpy(candidates.frames[None, -seen:]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    want = world.rollout(context, world.latent_actions(whole[None]), 2, 1.0, torch.tensor([24.0]), Draw(7))
    assert torch.allclose(candidates.video[i], want[0, :, seen:seen + 3], atol=1e-4)


# plans in the toy world, from the command line


@pytest.fixture(scope="module")
def bounds(tmp_path_factory):
    """The folder with the results of an agent that plans in the simulator and of one that acts at random"""
    folder = tmp_path_factory.mktemp("bounds")
    run("plan.py", "--oracle", "--random", "--seeds", 0, "--out", "p", cwd=folder)
    return folder / "p"


@pytest.mark.parametrize("task", toy.TASKS)
def test_toy_tasks_are_easy_for_the_oracle_and_hard_for_chance(task, bounds):
    table = json.loads((bounds / "results.json").read_text())["tables"]["plan"]
    oracle, chance = table[f"{task} oracle"], table[f"{task} random"]
    assert oracle["success"][0] >= 0.9
    assert chance["success"][0] <= 0.1
    assert chance["high"][0] < oracle["low"][0]


@pytest.mark.parametrize("task, what", [("reach", "robot"), ("push", "robot"), ("push", "block")])
def test_the_oracle_comes_nearer_to_the_goal_than_chance(task, what, bounds):
    table = json.loads((bounds / "results.json").read_text())["tables"]["plan"]
    oracle, chance = (table[f"{task} {agent}"][f"{what} nearer"][0] for agent in ("oracle", "random"))
    assert oracle >= 0.9
    assert chance <= 0.5


def test_what_is_at_its_goal_from_the_start_cannot_come_nearer(bounds):
    table = json.loads((bounds / "results.json").read_text())["tables"]["plan"]
    assert table["reach oracle"]["block nearer"] == []


def test_what_comes_nearer_is_a_mean_over_the_episodes_of_a_seed_that_begin_apart(monkeypatch):
    ways = iter([(4, 1), (2, 3), (0, 5), (8, 8), (1, 0), (0, 0)])           # before and after an episode

    def start(problem, seed):
        steps = iter(next(ways))
        env = argparse.Namespace(distances=lambda task, goal: {"robot": next(steps)})
        return argparse.Namespace(env=env, goal=None, run=lambda task: (False, []), videos=list)

    monkeypatch.setattr(plan, "save_gif", lambda *_: None)
    row = plan.measure(start, "reach", range(3), plan.parse(["--random", "--seeds", "0", "1"]), "p")
    assert row["robot nearer"] == [(3 / 4 - 1 / 2) / 2, (0 + 1) / 2]


@pytest.mark.parametrize("name, frames", [("pixels", 5), ("last", 1)])
def test_an_oracle_renders_only_what_is_judged(name, frames, monkeypatch):
    args = plan.parse(["--oracle", "--task", "reach", "--samples", "7", "--cost", name])
    problem, judged = goals.problems(args, "reach", "held-out")[0], cost.Cost(name)
    episode = plan.Episode(args, Process(), None, judged, "oracle", problem, 0)
    actions, rendered = torch.randn(7, 5, 2, generator=seeded()), []
    whole, render = episode.imagine(actions), episode.copies[7].render
    monkeypatch.setattr(episode.copies[7], "render", lambda: rendered.append(7) or render())
    scores = episode.score(actions)
    assert len(rendered) == frames
    assert torch.equal(scores, cost.Cost()(whole[:, :, -frames:], episode.target))
    assert len(whole.unique(dim=0)) > 1                         # candidates do not do the same


def test_a_picture_shows_what_was_seen_what_was_dreamed_and_the_goal(bounds):
    picture = imageio.imread(bounds / "samples/plan/push-oracle-0-29.gif")
    assert picture.shape[1:] == (18 * 8, 3 * 18 * 8, 3)


class Planned(NamedTuple):
    planner: str
    folder: pathlib.Path        # of the run
    said: str                   # on stdout
    results: dict


@pytest.fixture(scope="module", params=["cem", "mppi"])
def planned(request, judged):
    """Plans with the adapted world, for two pairs and two seeds"""
    done = run("plan.py", "--ckpt", "out/r-held-out", "--task", "reach", "--pairs", 2, "--seeds", 0, 1,
               "--samples", 6, "--planner", request.param, cwd=judged.folder)
    folder = judged.folder / "out/r-held-out"
    return Planned(request.param, folder, done.stdout, json.loads((folder / "results.json").read_text()))


def test_success_is_recorded_for_each_seed_within_its_interval(planned):
    row = planned.results["tables"]["plan"]["reach world"]
    assert len(row["success"]) == 2
    assert row["low"][0] <= np.mean(row["success"]) <= row["high"][0]
    assert row["pairs"] == [2]


def test_a_plan_takes_time(planned):
    assert planned.results["tables"]["plan"]["reach world"]["seconds a plan"][0] > 0


def test_the_protocol_of_plans_is_recorded(planned):
    assert planned.results["protocol"]["plan"]["planner"] == planned.planner
    assert planned.results["protocol"]["plan"]["precision"] == "fp32"


@pytest.mark.parametrize("words", ["reach world", "cost pixels"])
def test_plans_end_in_a_table_and_their_protocol(words, planned):
    assert words in planned.said


def test_an_episode_is_shown_from_its_start_to_its_last_step(planned):
    frames = imageio.imread(planned.folder / "samples/plan/reach-world-1-01.gif")
    assert 2 <= len(frames) <= 7                                # the start and up to 6 steps


def test_a_world_of_a_toy_robot_does_not_plan_on_a_desk_that_takes_as_many_actions(monkeypatch):
    world = small_world()
    world.adapter = Adapter(desk.Desk.action_dim, world.lam.cfg)
    state = {"config": {"data": "cross", "size": 8}, "step": 1}
    monkeypatch.setattr(plan, "load_checkpoint", lambda _: state)
    monkeypatch.setattr(plan, "restore", lambda *_: world)
    with pytest.raises(UserError, match="is adapted to the 5-dimensional actions of cross, not to robodesk"):
        plan.open_world(plan.parse(["--ckpt", "r", "--env", "robodesk"]), "cpu")
    state["config"]["data"] = "data/robodesk"
    assert plan.open_world(plan.parse(["--ckpt", "r", "--env", "robodesk"]), "cpu")[0] is world


@pytest.mark.parametrize("learned, asked, used", [
    ("fast", None, "fast"), ("fast", "fast", "fast"), ("published", None, "published"),
    ("", None, "published"), ("fast", "published", None), ("published", "fast", None), ("", "fast", None),
])
def test_a_world_plans_in_the_look_that_it_has_learned(learned, asked, used, monkeypatch):
    world = small_world()
    world.adapter, world.look = Adapter(desk.Desk.action_dim, world.lam.cfg), learned
    monkeypatch.setattr(plan, "load_checkpoint", lambda _: {"config": {"data": "d", "size": 8}, "step": 1})
    monkeypatch.setattr(plan, "restore", lambda *_: world)
    args = plan.parse(["--ckpt", "r", "--env", "robodesk"] + ["--look", asked] * (asked is not None))
    if used:
        plan.open_world(args, "cpu")
        assert args.look == used
    else:
        with pytest.raises(UserError, match=f"--ckpt r has {learned or 'published'}, --look has {asked}"):
            plan.open_world(args, "cpu")


@pytest.mark.parametrize("args, words", [
    (["--oracle", "--task", "fly"], "toy has reach, push"),
    (["--ckpt", "out/r"], "has no adapter"),
    (["--ckpt", "out/r-held-out", "--env", "robodesk"], "not to robodesk"),
    (["--random", "--env", "robodesk", "--task", "push_red", "--goals", "nowhere"],
     "no goal of the task push_red"),
    (["--oracle", "--replan", "9"], "only --horizon 5"),
    (["--oracle", "--goal_from", "3"], "--goal_from: RoboDesk's goals alone"),
    (["--oracle", "--goal_from", "0"], "--goal_from: 0: must be at least 1"),
    (["--oracle", "--cost", "latent"], "--cost latent: takes a --ckpt with a VAE, or --vae_weights"),
    (["--ckpt", "out/r-held-out", "--cost", "latent-last"], "--cost latent-last: takes a --ckpt with a VAE"),
    (["--oracle", "--cost", "latent", "--vae_weights", "out/r"], "out/r: has no VAE of its own"),
    (["--oracle", "--cost", "latent", "--vae_weights", "out/r/config.json"], "out/r/config.json"),
    (["--oracle", "--classifier", "x"], "it knows one task"),
    (["--oracle", "--task", "reach", "--classifier", "out/r/config.json"], "sees 64 x 64 pixels"),
    (["--random", "--env", "robodesk", "--task", "push_red", "--classifier", "out/r/config.json"],
     "not VP2's classifier, nor one of cost.py"),
    (["--oracle", "--samples", "0"], "at least 1"),
    (["--oracle", "--std", "nan"], "argument --std: nan: must be at least 0"),
    (["--oracle", "--beta", "1.1"], "argument --beta: 1.1: must be at least 0, at most 1"),
    (["--oracle", "--gamma", "inf"], "argument --gamma: inf: must be"),
    (["--oracle", "--elites", "-1"], "argument --elites: -1.0: must be"),
    (["--oracle", "--wait", "-1"], "argument --wait: -1: must be"),
    (["--oracle", "--guidance", "nan"], "argument --guidance: nan: must be"),
    (["--oracle", "--seeds", "-1"], "argument --seeds: -1: must be"),
])
def test_bad_plans_get_one_line(args, words, judged, monkeypatch, refusal_of):
    monkeypatch.chdir(judged.folder)
    assert words in refusal_of(plan.main, *args)


# RoboDesk


ACTIONS = np.array([[0.5, 0.2, -1, 0, 1], [-1, 0.0, -1, 0, -1]])


@pytest.fixture(scope="module")
def robodesk():
    needs("robodesk")
    return desk.Desk(2)


@pytest.fixture
def desks(robodesk):
    """Two desks that start alike"""
    robodesk.reset(3)
    return robodesk


def test_robodesks_start_alike_and_act_apart(desks):
    start = desks.get_state()
    after = desks.step(ACTIONS)
    assert np.array_equal(start[0], start[1])
    assert not np.array_equal(after[0], after[1])


def test_an_episode_on_a_robodesk_begins_after_a_zero_action_as_in_vp2(desks, monkeypatch):
    took, start = [], desks.get_state()
    env = desk.Desk(1)
    env.set_state(start[:1])
    step = env.step
    monkeypatch.setattr(env, "step", lambda actions: took.append(actions) or step(actions))
    problem = (lambda n: env), None, env.render()[0]
    episode = plan.Episode(plan.parse(["--random", "--env", "robodesk"]), Process(), None, None, "random",
                           problem, 0)
    assert [a.tolist() for a in took] == [[[0.0] * 5]]
    assert len(episode.past) == 0                               # it is not counted
    assert np.array_equal(episode.frames[0], env.render()[0])


def test_what_a_robodesk_does_shows(desks):
    before = desks.render()
    desks.step(ACTIONS)
    assert not np.array_equal(desks.render()[0], before[0])


def test_a_robodesks_state_gives_the_same_frame_and_the_same_future(desks):
    start, before = desks.get_state(), desks.render()
    after = desks.step(ACTIONS)
    desks.set_state(start)
    assert np.array_equal(desks.render(), before)
    assert np.array_equal(desks.step(ACTIONS), after)


def test_a_robodesk_among_two_does_what_one_alone_does(desks):
    alone = desk.Desk(1)
    alone.set_state(desks.get_state()[:1])
    after = desks.step(ACTIONS)
    assert np.allclose(alone.step(ACTIONS[:1])[0], after[0], atol=1e-9)


def test_a_robodesk_that_goes_on_does_what_one_that_is_put_there_does():
    needs("robodesk")
    alone = desk.Desk(1)
    moving = alone.step(ACTIONS[:1])                            # velocities count
    onward = alone.step(ACTIONS[:1])
    alone.set_state(moving)
    assert np.allclose(alone.step(ACTIONS[:1]), onward, atol=1e-6)


@pytest.mark.parametrize("task", desk.TASKS)
def test_a_robodesk_task_starts_unsolved_and_has_a_script(task, desks):
    assert not desks.success(task).any()
    assert np.abs(next(desks.script(desk.ROUTES[task]))).max() <= 1


@pytest.mark.parametrize("task", ["push_blue", "flat_block_off_table"])
def test_a_robodesk_script_does_its_task(task, monkeypatch):
    needs("robodesk")
    alone = desk.Desk(1, seed=100)
    monkeypatch.setattr(alone.env, "render", lambda: ACTIONS)   # frames take long
    _, labels = desk.play(alone, alone.script(desk.ROUTES[task]), 24, task)
    assert labels["solved"].any(1).tolist() == [False] * (len(labels["solved"]) - 1) + [True]
    assert labels["solved"][-1].tolist() == [name == task for name in desk.TASKS]


@pytest.mark.parametrize("task, moved, way", [
    ("open_drawer", 18, -0.25), ("open_slide", 19, 0.3), ("push_green", 21, -0.01),
    ("upright_block_off_table", 34, 0.2), ("flat_block_off_table", 41, -0.1)])
def test_a_robodesks_object_is_as_far_from_its_goal_as_its_joint(task, moved, way, desks):
    start, goal = desks.get_state()[:1], desks.get_state()[:1]
    goal[0, moved] += way
    assert desks.distances(task, goal) == pytest.approx({"hand": 0, "object": abs(way)}, abs=1e-9)
    assert desks.distances(task, start) == {"hand": 0, "object": 0}
    assert np.array_equal(desks.get_state()[:1], start)


def test_a_robodesks_hand_is_as_far_from_its_goal_as_it_has_gone(desks):
    start, route = desks.get_state()[:1], desk.ROUTES["push_red"]
    at = desks.places(route)[0].copy()
    desks.step(ACTIONS)
    way = np.linalg.norm(desks.places(route)[0] - at)
    assert way > 0.01
    assert desks.distances("push_red", start)["hand"] == pytest.approx(way, abs=1e-6)


def test_a_robodesk_whose_goal_has_no_state_is_at_no_distance_from_it(desks):
    assert np.isnan(list(desks.distances("push_red", None).values())).all()


@pytest.fixture
def opened(desks):
    """The same, the drawer of the second pulled out"""
    states = desks.get_state()
    states[1, 18] = -0.25
    desks.set_state(states)
    return desks


def test_a_drawer_that_is_pulled_out_is_an_open_drawer(opened):
    assert opened.success("open_drawer").tolist() == [False, True]


@pytest.mark.parametrize("task", desk.TASKS)
def test_success_is_what_robodesk_itself_says(task, opened):
    ours = opened.success(task)
    theirs = opened.env.reward_functions[task]("success")        # of the desk in the simulator, the second
    assert bool(theirs) == ours[1]


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with two recorded episodes of two steps, in the published look"""
    needs("robodesk")
    folder = tmp_path_factory.mktemp("collected")
    desk.collect(str(folder), 2, steps=2)
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """The same in the fast look"""
    needs("robodesk")
    folder = tmp_path_factory.mktemp("fast")
    desk.collect(str(folder), 2, look="fast", steps=2)
    return folder


def test_robodesk_episodes_are_the_same_for_any_number_of_processes(fast, tmp_path):
    desk.collect(str(tmp_path), 3, look="fast", steps=2, workers=2)
    for file in fast.glob("desk_*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert len(list(tmp_path.glob("*.mp4"))) == 3
    films = {file.read_bytes() for file in tmp_path.glob("*.mp4")}
    assert len(films) == 3                                      # no two are alike


def test_the_looks_of_a_robodesk_differ_but_not_what_happens(collected, fast):
    name = "desk_00000"
    labels = [np.load(folder / f"{name}.npz") for folder in (collected, fast)]
    assert np.array_equal(labels[0]["states"], labels[1]["states"])
    looks = [imageio.imread(folder / f"{name}.mp4", plugin="pyav").mean() for folder in (collected, fast)]
    assert looks[0] > looks[1] + 5                              # it is darker


def test_robodesk_episodes_tell_their_look(collected, fast):
    assert [Episodes(str(folder), 64, 3, split="all").look for folder in (collected, fast)] == [
        "published", "fast"]


def test_two_looks_of_a_robodesk_do_not_share_a_folder(fast, refusal_of):
    refused = refusal_of(plan.main, "--collect", "robodesk", "--episodes", 3, "--out", fast)
    assert refused == (f"two looks of a simulator's frames: {fast} has fast, --look has published; take one")


@pytest.mark.parametrize("renderer, said", [
    (b"llvmpipe (LLVM 15)",
     r"RoboDesk is drawn in software \(llvmpipe \(LLVM 15\)\), \d+ ms a frame: a GPU with MUJOCO_GL=egl "
     r"would help, as would --look fast where all goals are our own\n"),
    (b"NVIDIA H200/PCIe", ""),
])
def test_a_robodesk_that_is_rendered_in_software_says_so(renderer, said, desks, monkeypatch, capsys):
    from OpenGL import GL
    monkeypatch.setattr(GL, "glGetString", lambda _: renderer)
    monkeypatch.setattr(formats, "TOLD", set())
    for _ in range(2):
        desks.tell_how_it_renders()
    assert re.fullmatch(said, capsys.readouterr().err)


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("desk_*")}


def test_robodesk_episodes_are_recorded_once(collected):
    made = times(collected)
    assert sorted(name[-4:] for name in made) == [".mp4", ".mp4", ".npz", ".npz"]
    desk.collect(str(collected), 2, steps=2)
    assert times(collected) == made


def test_a_recorded_robodesk_episode_can_be_acted_again(collected):
    film = next(collected.glob("*.mp4"))
    with np.load(film.with_suffix(".npz")) as labels:
        actions, states = labels["actions"], labels["states"]
    assert actions.shape == (2, 5)
    assert states.shape == (3, 73)
    world = desk.Desk()
    world.set_state(states[1:2])
    world.step(actions[1:])
    assert np.allclose(world.get_state()[0], states[2], atol=1e-9)
    error = imageio.imread(film, plugin="pyav")[2].astype(int) - world.render()[0]
    assert np.abs(error).max() <= 3                             # the video's colours are converted


def test_a_recorded_robodesk_episode_serves_as_a_goal(tmp_path):
    needs("robodesk")
    goals.make_goals("open_drawer", str(tmp_path / "goals"), 1)
    found = goals.read_goals("open_drawer", str(tmp_path / "goals"), 30)
    assert [(start.shape, goal.shape, image.shape) for start, goal, image in found] == [
        ((73,), (1, 73), (64, 64, 3))]
    env = desk.Desk()
    env.set_state(found[0][1])
    assert env.success("open_drawer").tolist() == [True]


@pytest.fixture
def counted_goals(tmp_path):
    """A folder with two goals of six states: state t of goal i is all 10 i + t, its image as bright"""
    for i in range(2):
        shades = 10 * i + np.arange(6)
        labels = dict(actions=np.zeros((5, 5)), states=np.repeat(shades[:, None], 73, 1),
                      solved=np.zeros((6, 7), bool), look="fast")
        images = np.broadcast_to(shades[:, None, None, None], (6, 64, 64, 3)).astype(np.uint8)
        desk.write_episode(str(tmp_path / f"goal_push_red_000{i}"), images, labels, 10)
    return str(tmp_path)


@pytest.mark.parametrize("before, starts", [(None, [0, 10]), (1, [4, 14]), (5, [0, 10]), (99, [0, 10])])
def test_goals_lie_as_many_actions_ahead_as_are_asked_for(before, starts, counted_goals):
    found = goals.read_goals("push_red", counted_goals, 30, look="fast", before=before)
    assert [start[0] for start, _, _ in found] == starts
    assert [goal.tolist() for _, goal, _ in found] == [[[5] * 73], [[15] * 73]]     # the last state
    for (_, _, image), shade in zip(found, (5, 15)):
        assert np.abs(image.astype(int) - shade).max() <= 2     # the video's colours are converted


def test_goals_of_another_look_are_refused(collected, tmp_path):
    for ending in (".mp4", ".npz"):
        shutil.copy(collected / f"desk_00000{ending}", tmp_path / f"goal_push_red_0000{ending}")
    assert goals.read_goals("push_red", str(tmp_path), 1)
    with pytest.raises(UserError, match=f"{tmp_path} has published, --look has fast; take one"):
        goals.read_goals("push_red", str(tmp_path), 1, look="fast")


def test_vp2s_goals_are_read_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "TOLD", set())
    needs("h5py")
    import h5py
    with h5py.File(tmp_path / "goals.hdf5", "w") as f:
        for i in (2, 10):
            # VP2's states end in the hand's place, 3 numbers
            f[f"data/demo_{i}/states"] = np.full((4 if i == 2 else 1, 76), i)
            f[f"data/demo_{i}/obs/camera_image"] = np.full((4, 64, 64, 3), i, np.uint8)
    found = goals.read_goals("push_red", str(tmp_path / "goals.hdf5"), 30)
    assert [start.shape for start, _, _ in found] == [(73,), (73,)]
    assert [start[0] for start, _, _ in found] == [2, 10]
    for (_, _, image), i in zip(found, (2, 10)):
        assert (image == i).all()
    assert (found[0][1] == 2).all()
    assert found[1][1] is None                                  # only the start has a state
    assert "goals.hdf5: its images have no states: hand nearer, object nearer stay empty" in (
        capsys.readouterr().err)
    with pytest.raises(UserError, match="goals.hdf5 has published, --look has fast; take one"):
        goals.read_goals("push_red", str(tmp_path / "goals.hdf5"), 30, look="fast")


@pytest.mark.parametrize("camera, words", [
    pytest.param(lambda self: np.zeros((120, 120, 3), np.uint8), "all-black", id="black"),
    pytest.param(lambda self: 1 / 0, "cannot render with MUJOCO_GL=", id="broken"),
])
def test_a_robodesk_that_cannot_be_seen_says_why(camera, words, monkeypatch):
    needs("robodesk")
    from dm_control import mujoco
    world = desk.Desk()
    monkeypatch.setattr(mujoco.Camera, "render", camera)
    with pytest.raises(UserError, match=words):
        world.render()


def test_a_robodesk_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(desk.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install robodesk==1.0.0"):
        desk.Desk()


# on a GPU -------------------------------------------------------------------------------------------------
# skipped where there is none; `bench.py --gpu` finds them by their names


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.backends.cudnn.flags(allow_tf32=False):          # which would round what is compared
        yield torch.device("cuda")


def drawing_on(device):
    """A Draw of the CPU's numbers, on any device"""
    draw = Draw(0)
    return lambda random, b, *shape: draw(random, b, *shape).to(device)


def learnt(world, clip, device, precision="fp32"):
    """The loss of a clip on a device, and {parameter: gradient}, on the CPU"""
    world.to(device).zero_grad()
    with Process(device=device, precision=precision).autocast():
        loss, _ = world(clip.to(device), drawing_on(device))
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in world.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make, clip", [
    pytest.param(small_world, video(), id="pixels"),
    pytest.param(strided_world, video(t=9, size=32), id="strided latents"),
])
def test_loss_and_gradients_are_the_cpus_on_a_gpu(make, clip, gpu):
    want, wanted = learnt(make(), clip, torch.device("cpu"))
    found, gradients = learnt(make(), clip, gpu)
    assert found == pytest.approx(want, rel=1e-4)
    for name, grad in wanted.items():
        assert (gradients[name] - grad).norm() < 1e-2 * grad.norm() + 1e-6, name


def test_bf16_changes_the_loss_by_little_on_a_gpu(gpu):
    loss, _ = learnt(small_world(), video(), gpu)
    rounded, _ = learnt(small_world(), video(), gpu, "bf16")
    assert rounded == pytest.approx(loss, rel=0.03)
    assert rounded != loss


def test_a_dream_is_the_cpus_on_a_gpu(gpu):
    world, past, actions = small_world(), video(t=2), Draw(1)(torch.randn, 2, 5, 2, 4)
    want = world.rollout(past, actions, draw=drawing_on("cpu"))
    found = world.to(gpu).rollout(past.to(gpu), actions.to(gpu), draw=drawing_on(gpu)).cpu()
    assert torch.allclose(found, want, atol=1e-3)


def test_more_rows_than_a_grid_holds_attend_on_a_gpu(gpu):
    attention = transformer.Attention(16, 2, rope=True, causal=True).to(gpu)
    x = torch.randn(70000, 3, 16, device=gpu, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = attention(x)
        few, _ = attention(x[-100:])
    y.sum().backward()
    assert torch.allclose(y[-100:], few, atol=1e-2)
    assert x.grad.isfinite().all()
    assert x.grad[-1].any()


def test_a_compiled_generator_gives_the_same_on_a_gpu(gpu):
    dit = small_world().dit.to(gpu)
    x, t, actions = video().to(gpu), torch.rand(2, 6, device=gpu), torch.randn(2, 5, 8, device=gpu)
    want = dit(x, t, actions)
    dit.compile()
    assert torch.allclose(dit(x, t, actions), want, atol=1e-3)


def test_a_run_and_its_resumption_train_in_bf16_on_a_gpu(gpu, tmp_path):
    run("train.py", "--name", "g", "--pretrain", 2, "--warmup", 1, "--e2e", 2, *SMALL, cwd=tmp_path)
    run("train.py", "--resume", "out/g", "--e2e", 4, cwd=tmp_path)
    rows, last = result(tmp_path, "g")
    assert (last["event"], last["step"], last["precision"]) == ("result", 7, "bf16")
    assert all(np.isfinite(row["loss"]) for row in rows if row["event"] == "train")
    load_world(str(tmp_path / "out/g")).rollout(video(1, 1, 16), torch.zeros(1, 3, 2, 16))      # on a CPU


# speed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """What bench.py says of a small model on stdout, and its numbers"""
    folder = tmp_path_factory.mktemp("benched")
    done = run("bench.py", "--set", "hidden=16", "depth=1", "heads=2", "lam_width=16", "lam_depth=1",
               "--batch", 2, "--json", "b.json", cwd=folder)
    return done.stdout, json.loads((folder / "b.json").read_text())


@pytest.mark.parametrize("name, low, high", [
    ("train_share_of_matmul", 0, 1.2),
    ("rollout_cached_speedup", 0, float("inf")),
    ("frame16_over_frame2", 0, float("inf")),
    ("plan_shared_speedup", 5, float("inf")),
    ("peak_memory_gb", 0.05, 8),
])
def test_bench_measures_what_it_says(name, low, high, benched):
    assert low < benched[1][name] < high


def test_bench_names_the_machine(benched):
    assert benched[1]["device"]


def test_bench_prints_its_numbers_in_sentences(benched):
    assert "one by one" in benched[0]


@pytest.mark.parametrize("gigabytes, clips, said", [
    pytest.param(80, 16, "", id="all fit"),
    pytest.param(32, 6, "16 clips a step would take about 35.0 GB, of which there are 16.0 here; trains on 6",
                 id="some fit"),
])
def test_bench_trains_on_the_clips_that_fit(gigabytes, clips, said, monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory", lambda cfg, world, phase, process, n: (3.0, 3.0 + 2.0 * n))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": gigabytes, "SC_PAGE_SIZE": 1e9}.get)
    assert bench.clips_that_fit(Config(), Process()) == clips
    assert said in capsys.readouterr().out


def test_a_preset_of_which_no_clip_fits_gets_one_line(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 32, "SC_PAGE_SIZE": 1e9}.get)
    with pytest.raises(UserError, match="one clip takes about .* GB, of which there are 16.0 here"):
        bench.clips_that_fit(parse(["--preset", "opensora"]), Process())


def test_dreams_are_timed_without_the_graphs_of_training(monkeypatch, capsys):
    stances = []

    def timed(*_):
        stances.append(torch._dynamo.eval_frame._stance.stance)
        return {"cached": 1.0, "plain": 2.0, "plan_shared_speedup": 2.0, "plans_per_second": 1.0}

    monkeypatch.setattr(bench, "training", lambda *_: (1.0, 1e9))
    monkeypatch.setattr(bench, "frame_time", timed)
    monkeypatch.setattr(bench, "planning", timed)
    args = bench.parse_args(["--compile", "--batch", "1"])
    bench.say(bench.measure("tiny", args, Process(), 1e9), 200)
    assert stances == ["force_eager"] * 5
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert "a new frame (dreams are not compiled) after 2" in capsys.readouterr().out


# a world of pixels, as it takes seconds to draw the weights of Open-Sora's VAE
REHEARSAL = ["--gpu", "--rehearse", "--out", "o", "--set", "vae_weights=none", "size=32", "lam_size=32",
             "lam_patch=8", "patch=4", "eval_clips=2"]
ITEMS = {name for items in bench.CALLS.values() for name in items}
A_FEW = ["tests", "opensora", "tiny-compiled", "blocks", "small-dreams"]        # one of each kind


def measured(folder):
    """What gpu.json holds"""
    return json.loads((folder / "o/gpu.json").read_text())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A folder in which all that waits for a GPU was rehearsed"""
    folder = tmp_path_factory.mktemp("rehearsed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")                # to compile takes a minute
        patch.delenv("OPENSORA", raising=False)
        run("bench.py", *REHEARSAL, "--only", *A_FEW, cwd=folder)
    return folder


def test_all_that_waits_for_a_gpu_is_rehearsed(rehearsed):
    found = measured(rehearsed)
    assert found.keys() == {*A_FEW}
    assert {name: row["failed"] for name, row in found.items() if "failed" in row} == {}
    assert all(row["device"] and row["rehearsal"] for row in found.values())
    assert "7 skipped" in found["tests"]["summary"] or torch.cuda.is_available()
    assert found["opensora"]["peak_memory_gb"] > found["opensora"]["estimated_memory_gb"] > 0
    assert found["opensora"]["step_seconds"] > 0
    assert found["tiny-compiled"]["compile"]
    assert found["small-dreams"]["plans_per_second"] > 0
    assert found["blocks"]["blocks_speedup"] == "no folder of Open-Sora's source in $OPENSORA"


def test_what_is_measured_is_not_measured_again(rehearsed):
    before = measured(rehearsed)
    said = run("bench.py", *REHEARSAL, "--budget", 4, cwd=rehearsed).stdout
    assert {line.split(":")[0] for line in said.splitlines()} == ITEMS - {*A_FEW}
    assert measured(rehearsed) == before


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    done = run("bench.py", *REHEARSAL, "heads=3", "--only", "tiny", "tests", cwd=tmp_path)
    found = measured(tmp_path)
    assert found["tiny"]["failed"].startswith("ended with 2: bench.py: --hidden 16: must be a multiple")
    assert "failed" not in found["tests"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["tests", "tiny"]


def test_training_goes_on_in_the_next_call_and_nothing_begins_that_would_not_end(tmp_path):
    steps = []
    for call in (1, 2):
        done = run("bench.py", *REHEARSAL, "--gpu", 3, "--budget", 20, cwd=tmp_path)
        training = measured(tmp_path)["training"]
        assert not training["finished"]
        assert "failed" not in training, (training, (tmp_path / "o/log.txt").read_text())
        steps.append(load_checkpoint(str(tmp_path / "o/out/small"))["step"])
        assert training["step, loss, steps a second"][-1][0] in (steps[-1], steps[-1] - 1)
    assert 0 < steps[0] < steps[1]
    done = run("bench.py", *REHEARSAL, "--budget", 4, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == len(ITEMS)
    assert "tiny: left for a later call, as it may take 5 s" in done.stdout
    assert measured(tmp_path).keys() == {"training"}


def test_a_call_that_is_cut_off_leaves_what_it_has(tmp_path):
    process = start("bench.py", *REHEARSAL, "--only", "tiny", "opensora", "small-dreams", cwd=tmp_path)
    until((tmp_path / "o/gpu.json").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = measured(tmp_path)
    assert "small-dreams" not in first
    assert first["tiny"]["step_seconds"] > 0


def test_a_bad_preset_gets_one_line(refusal_of):
    assert "choose from" in refusal_of(bench.main, "--preset", "huge")


@pytest.mark.parametrize("args, words", [
    (["--samples", "0"], "argument --samples: 0: must be at least 1"),
    (["--batch", "0"], "argument --batch: 0: must be at least 1"),
    (["--json", "nowhere/b.json"], "--json nowhere/b.json: takes the name of a file"),
    (["--json", "."], "--json .: takes the name of a file"),
    (["--gpu", "4"], "argument --gpu: 4: must be at least 1, at most 3"),
    (["--gpu", "--only", "huge"], "argument --only: invalid choice: 'huge'"),
])
def test_bad_benchmarks_get_one_line(args, words, refusal_of):
    assert words in refusal_of(bench.main, *args)


@pytest.mark.parametrize("content", ["", "null", "{"])
def test_a_damaged_gpu_json_gets_one_line_and_stays(content, refusal_of, tmp_path):
    (tmp_path / "gpu.json").write_text(content)
    assert "not what --gpu writes" in refusal_of(bench.main, "--gpu", "--rehearse", "--out", tmp_path)
    assert (tmp_path / "gpu.json").read_text() == content


def test_what_waits_for_a_gpu_is_not_measured_without_one(refusal_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpu: there is none here" in refusal_of(bench.main, "--gpu", "1")


# the paper's figures and tables ---------------------------------------------------------------------------


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """table1 of seed 3, with budgets of a few steps; returns its folder of runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(reproduce.KILO, "tiny", 1)
    flags = ["--pretrain", "2", *SMALL, "--log_every", "30"]
    monkeypatch.setitem(reproduce.VARIANTS, "main", shlex.join(flags))
    monkeypatch.setitem(reproduce.RUNS, "joint", "--dit_weights pretrained@ --warmup 8K --e2e 24K")
    two_stage = "--dit_weights pretrained@ --mode two-stage --lam_steps 30K --wm_steps 2K"
    monkeypatch.setitem(reproduce.RUNS, "two-stage", two_stage)
    probe = "evaluate.py --task probe --transitions 70 --seeds SEED"
    monkeypatch.setitem(reproduce.MEASURES, "probe", probe)
    return tmp_path / "out/reproduce/tiny-main/3"


def test_a_table_is_made_by_the_commands_it_prints_and_goes_on_where_it_was_stopped(small_table, capfd):
    reproduce.main(["table1", "--seeds", "3"])
    made = json.load(open("out/reproduce/table1-seed3.json"))
    out = capfd.readouterr().out
    printed = [line for line in out.splitlines() if line.startswith("python ")]
    assert printed == made["commands"]
    scripts = [line.split()[1] for line in printed]
    assert scripts == ["train.py", "train.py", "evaluate.py", "train.py", "evaluate.py"]
    assert all("--seed" in line for line in printed) and "--init" not in printed[0]
    assert "--warmup 8 --e2e 24" in printed[3] and "joint/ckpt-00000030.pt" in printed[4]
    assert f"| held-out: LAM30K | {made['rows']['held-out: LAM30K']['l1'][0]:.3f} |" in out
    assert "*held-out: WARM8K+E2E22K minus held-out: LAM30K*" in out
    # joint was stopped before its last line
    log = small_table / "joint/metrics.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-1]))
    before = (small_table / "two-stage/metrics.jsonl").stat().st_mtime_ns
    reproduce.main(["table1", "--seeds", "3"])
    goes_on = re.findall("^goes on by: .* ([^ ]+)$", capfd.readouterr().out, re.M)
    assert goes_on == ["out/reproduce/tiny-main/3/joint"]
    assert log.read_text().splitlines(keepends=True)[-1] == whole[-1]
    assert (small_table / "two-stage/metrics.jsonl").stat().st_mtime_ns == before


@pytest.fixture
def commands(small_table, monkeypatch):
    """The commands of small_table that reproduce.py runs, none of which is really run."""
    ran = []

    def fake(command, **_):
        ran.append(" ".join(command[1:]).removeprefix(HERE + os.sep))
        flags = dict(zip(command[2::2], command[3::2]))
        out = flags.get("--out") or flags.get("--resume") or os.path.join("out", flags["--name"])
        os.makedirs(out, exist_ok=True)
        for name in ("ckpt.pt", "ckpt-00000030.pt", "ckpt-00000031.pt"):
            with open(os.path.join(out, name), "w"):
                pass
        with open(os.path.join(out, "metrics.jsonl"), "w") as f:
            f.write(json.dumps({"step": 32, "event": "result"}))
        with open(os.path.join(out, "results.json"), "w") as f:
            json.dump({"tables": {"probe": {robot: {"l1": [0.5]} for robot in reproduce.ROBOTS}}}, f)
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    return ran


def test_runs_and_measurements_are_made_once(commands, small_table):
    reproduce.main(["table1", "--seeds", "3"])
    assert len(commands) == 5 and len(set(commands)) == 5
    reproduce.main(["table1", "--seeds", "3"])
    assert len(commands) == 5
    assert not (small_table / "joint/ckpt-00000031.pt").exists()        # nothing starts from it


def test_what_other_flags_made_does_not_stand_in(commands, monkeypatch):
    reproduce.main(["table1", "--seeds", "3"])
    probe = "evaluate.py --task probe --transitions 71 --seeds SEED"
    monkeypatch.setitem(reproduce.MEASURES, "probe", probe)
    reproduce.main(["table1", "--seeds", "3"])
    assert len(commands) == 7 and all("--transitions 71" in c for c in commands[5:])
    monkeypatch.setitem(reproduce.RUNS, "pretrained", "--mode pretrain --lr 1")
    reproduce.main(["table1", "--seeds", "3"])
    assert len(commands) == 12              # the generator, what starts from it, and what measures that


def test_a_lost_checkpoint_is_named_and_the_last_one_does_not_stand_in(commands, small_table):
    reproduce.main(["table1", "--seeds", "3"])
    os.remove(small_table / "joint/ckpt-00000030.pt")                   # the run's last one is of step 32
    with pytest.raises(UserError, match="ckpt-00000030.pt is gone; delete .*joint and start again"):
        reproduce.main(["table1", "--seeds", "3"])


def test_a_command_that_fails_is_named_every_time(commands, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    for _ in range(2):
        with pytest.raises(UserError, match="this failed: python train.py .*pretrained"):
            reproduce.main(["table1", "--seeds", "3"])
    assert not os.path.exists("out/reproduce/table1-seed3.json")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Runs of two phases whose logs hold seed + step / 10,000, and measurements of seed + length of RUN@8K.

    Returns what was trained or measured, as (run, seed).
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF")
    keys, made = [*figures.CODEBOOK, *figures.ALIGN, "psnr", "controllability"], []
    columns = ("l1", "l1_constant", "r2", "loss", "psnr", "ssim", "controllability", "success",
               *figures.CODEBOOK)

    def train(lab, run, seed):
        made.append((run, seed))
        os.makedirs(lab.folder(run, seed), exist_ok=True)
        rows = [{"event": "align", "phase": "warmup", "step": 0} | dict.fromkeys(keys, 7),
                {"event": "align", "phase": "wm", "step": 750, "nmi": 0.9}]
        for step in range(50, 1501, 50):
            row = {"phase": "lam" if step <= 750 else "wm", "step": step}
            row |= dict.fromkeys(keys, seed + step / 10000)
            rows += [row | {"event": event} for event in ("train", "eval", "result")]
        with open(os.path.join(lab.folder(run, seed), "metrics.jsonl"), "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)

    def measure(lab, task, ckpt, seed):
        train(lab, ckpt.split("@")[0], seed)
        rows = [f"{r}{v}" for r in reproduce.ROBOTS for v in ("", " inferred", " fdm", " copy")]
        rows += ["training", "inferred, held-out", "adapter, held-out", "inferred", "adapted", "copy",
                 "robots none"]
        agents = ("world", "random", "oracle") if task == "plan-bounds" else ("world",)
        rows += [f"{goal} {agent}" for goal in ("reach", "push") for agent in agents]
        cells = dict.fromkeys(columns, [seed + len(ckpt)])
        return "a.gif" if task == "transfer" else {row: cells for row in rows}
    monkeypatch.setattr(reproduce.Lab, "train", train)
    monkeypatch.setattr(reproduce.Lab, "measure", measure)
    return made


def rows_of(target):
    """The rows that a target has written."""
    with open(f"out/reproduce/{target}.json") as f:
        return json.load(f)["rows"]


def test_every_target_writes_its_numbers_and_its_picture(logs, capsys):
    needs("matplotlib")
    needs("scipy")
    reproduce.main(["all", "--seeds", "0", "1", "2"])
    for target in ("pretrained", "causes"):
        reproduce.main([target, "--seeds", "0", "1", "2"])
    drawn = {"fig2", "fig3", "fig4a", "fig4b", "fig5", "warmup", "causes"}
    files = {f for f in os.listdir("out/reproduce") if os.path.isfile(os.path.join("out/reproduce", f))}
    assert files == {f"{t}.png" for t in drawn} | {"fig6.gif"} | {f"{t}.json" for t in reproduce.TARGETS}
    assert {run for run, _ in logs} == set(reproduce.RUNS)
    assert rows_of("pretrained") == {"as it is": {"loss": [11, 12, 13]}}
    assert rows_of("causes")["naive, as it is"] == rows_of("causes")["warm-up, as it is"]


def test_curves_end_at_the_papers_steps(logs, capsys):
    needs("matplotlib")
    needs("scipy")
    for target in ("fig2", "warmup"):
        reproduce.main([target, "--seeds", "0", "1", "2"])
    ends, level = [0.075, 1.075, 2.075], rows_of("fig2")["two-stage LAM"]           # 30K are 750 steps
    assert rows_of("fig2")["pre IDM + pre WM"]["max_usage"] == ends
    assert level == dict.fromkeys(("utilization", "max_usage", "entropy"), ends) | {"nmi": [0.9] * 3}
    assert rows_of("warmup")["before"]["cka"] == [7] * 3
    assert rows_of("warmup")["no warm-up (naive), after 8K"]["cka"] == [0.02, 1.02, 2.02]


def test_tables_hold_the_measurement_of_every_seed_and_need_no_matplotlib(logs, monkeypatch, capsys):
    needs("scipy")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for target in ("table2", "table3", "table4"):
        reproduce.main([target, "--seeds", "0", "1", "2"])
    assert rows_of("table2")["tank: WARM8K+E2E30K"]["psnr"] == [9, 10, 11]
    assert rows_of("table3")["first frame held still"]["psnr"] == [18, 19, 20]
    assert rows_of("table4")["naive 38K"]["average"] == [14, 15, 16]
    assert rows_of("table4")["random actions, one seed"]["reach"] == [18]
    assert rows_of("table4")["true simulator, one seed"]["push"] == [18]
    assert "| *WARM8K+E2E30K minus naive 38K* | +0.00 ± 0.00 |" in capsys.readouterr().out


@pytest.mark.parametrize("flags, package", [
    (["fig2", "--seeds", "0"], "matplotlib"), (["table1", "--seeds", "0", "1"], "scipy")])
def test_a_target_says_what_package_is_missing_before_it_trains(logs, monkeypatch, flags, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs pip install {package}$"):
        reproduce.main(flags)
    assert not logs


@pytest.mark.parametrize("flags, word", [
    (["fig9"], "fig9"), (["fig2", "--variant", "odd"], "odd"), (["fig2", "--seeds", "x"], "x"),
    (["fig2", "--kilo", "0"], "--kilo: 0: must be"), (["fig2", "--seeds", "-1"], "--seeds: -1: must be")])
def test_bad_targets_get_one_line(tmp_path, flags, word):
    assert word in complaint(run("reproduce.py", *flags, cwd=tmp_path, ok=False), "reproduce.py")
    assert not os.path.exists(tmp_path / "out")


def test_another_time_scale_has_its_own_folder_and_steps():
    slow = reproduce.Lab("tiny", "light-vq", [], 50)
    assert slow.folder("naive", 0).endswith("tiny-light-vq-kilo50/0/naive")
    assert [slow.word(word, 3) for word in ("--warmup", "8K", "SEED")] == ["--warmup", "400", "3"]


# docs/results.md ------------------------------------------------------------------------------------------


def results():
    with open(figures.RESULTS) as f:
        return f.read()


def test_the_results_are_written_from_what_was_measured_and_from_the_code():
    needs("scipy")
    assert figures.filled(results()) == results(), "run python figures.py"


def test_the_results_say_that_scipy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match="needs pip install scipy$"):
        figures.filled(results())


def test_the_results_lead_to_what_is_there():
    text = results()
    heads = re.findall("^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    files = set(re.findall(r"\]\(\.\./([^)#]+)", text))
    assert {f for f in files if not os.path.exists(os.path.join(HERE, f))} == set()
    kept = {"assets/reproduce/" + name for name in os.listdir(os.path.join(HERE, "assets/reproduce"))}
    assert kept - files == set()


def test_numbers_of_the_results_known_answers(monkeypatch):
    needs("scipy")
    rows = {"A": {"x": [1.0, 2.0, 4.0], "l1": [0.5]}, "B": {"x": [0.5, 1.0, 2.0]}}
    monkeypatch.setattr(figures, "measured", {"j": rows}.__getitem__)
    p = paired_t(rows["A"]["x"], rows["B"]["x"])[1]
    text = "1 <!-- mean j | A | x -->?<!----> 2 <!-- seeds j | A | x --><!---->"
    text += " 3 <!-- mean j | A minus B | x --><!---->"
    shown = re.sub("<!--.*?-->", "", figures.filled(text), flags=re.S)
    assert shown == f"1 2.33 ± 1.53 2 1.00, 2.00, 4.00 3 +1.17 ± 0.76 (p {p:.2g})"
    assert "| A | 2.33 ± 1.53 | 0.500 |\n| B | 1.17 ± 0.76 | - |\n" in figures.markdown(rows, [])
    assert f"| *A minus B* | +1.17 ± 0.76 (p {p:.2g}) | - |" in figures.markdown(rows, [("A", "B")])
    table = figures.table("A\nless = A minus B\ncolumns\nboth = j | * | x / l1\nl1 = j | * | l1")
    assert table.splitlines()[3:] == ["| A | 2.33 ± 1.53 / 0.500 | 0.500 |",
                                      f"| less | +1.17 ± 0.76 (p {p:.2g}) / - |  |"]


@pytest.mark.parametrize("a, b, sign, answer", [
    ([2.0, 3.1, 4.0], [1.0, 2.0, 3.0], "+", "reproduced"),
    ([2.0, 3.1, 4.0], [1.0, 2.0, 3.0], "-", "not reproduced"),
    ([2.0, 3.1, 4.0], [1.0, 2.0, 3.0], "=", "not reproduced"),
    ([2.0, 4.0, 3.2], [1.0, 2.0, 3.0], "+", "direction only"),          # every seed, p 0.18
    ([2.0, 4.0, 2.9], [1.0, 2.0, 3.0], "+", "not told apart"),          # not in every seed
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "+", "not told apart"),
    ([2.0, 1.0, 3.0], [1.0, 2.0, 3.0], "=", "not told apart"),
    ([2.0], [1.0], "+", "direction only")])
def test_the_rule_of_verdicts_known_answers(a, b, sign, answer):
    needs("scipy")
    assert figures.verdict(a, b, sign) == answer


def test_a_claim_counts_its_verdicts():
    needs("scipy")
    text = "Warm-ups help\n  16K = fig3-light-vq-kilo50 | warm-up 16K minus warm-up 0K | nmi | +\n"
    text += "  4K = fig3-light-vq-kilo50 | warm-up 4K minus warm-up 0K | nmi | +"
    claim, verdicts, numbers = figures.verdicts(text).splitlines()[3].strip("| ").split(" | ")
    assert claim == "Warm-ups help" and verdicts == "**reproduced** 1 of 2<br>**not told apart** 1 of 2"
    assert numbers.startswith("16K: +0.56 ± 0.02 (p 0.00036), reproduced<br>4K: ")


def test_a_link_leads_to_its_line():
    with open(os.path.join(HERE, "vq.py")) as f:
        line = 1 + f.read().split("class VectorQuantizer")[0].count("\n")
    marker = "x <!-- link vq.py | class VectorQuantizer -->"
    assert figures.filled(marker + "old<!---->") == f"{marker}[vq.py, line {line}](../vq.py#L{line})<!---->"


@pytest.mark.parametrize("text, word", [
    ("x <!-- mean fig9 | A | nmi --><!---->", "fig9"),
    ("x <!-- mean fig2 | A | nmi --><!---->", "names nothing"),
    ("x <!-- seeds fig2 | two-stage LAM | A --><!---->", "names nothing"),
    ("x <!-- mean fig2 | two-stage LAM --><!---->", "two-stage LAM: names nothing"),
    ("x <!-- mode fig2 | two-stage LAM | nmi --><!---->", "none of mean, seeds"),
    ("x <!-- link vq.py | class Nowhere --><!---->", "in 0 lines"),
    ("x <!-- link vq.py | self --><!---->", "must be in one"),
    ("x <!-- link nowhere.py | self --><!---->", "nowhere.py"),
    ("x <!-- mean fig2 | two-stage LAM | nmi -->0.9", "not closed"),
    ("x <!-- mean fig2 | two-stage LAM | nmi -->0.9 <!-- link vq.py | def fit( --><!---->", "not closed"),
    ("- <!-- mean fig2 | two-stage LAM | nmi --><!---->", "may not start a line"),
    ("<!-- table\nnowhere\ncolumns\nNMI = fig2 | * | nmi\n-->\n<!---->", "nowhere names nothing"),
    ("<!-- table\ntwo-stage LAM\ncolumns\nNMI = fig2 | * | nowhere\n-->\n<!---->", "names nothing"),
    ("<!-- verdicts\nA claim\n-->\n<!---->", "nothing tells"),
    ("<!-- verdicts\nA claim\n  NMI = fig2 | two-stage LAM | nmi | +\n-->\n<!---->", "not enough values")])
def test_a_comment_that_names_nothing_is_an_error(text, word):
    with pytest.raises((OSError, ValueError), match=word):
        figures.filled(text)
