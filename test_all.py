"""Tests: python -m pytest -q -n 2 --dist loadgroup test_all.py (tiny models, real behaviour; minutes on two cores)."""

import functools
import glob
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import desk
import evaluate
import plan
import reproduce
import toy
from conftest import needs
from data import Episodes, ToyClips, clips, loader, random_crop
from checkpoint import LatentCache, build, load_checkpoint, load_world
from config import parse
from dit import DiT, DiTConfig, load_opensora
from evaluate import align, predict
from flow import Draw, FlowConfig, World, sample, shift_time, time_ratio
from lam import LAM, Adapter, LAMConfig, Standardize
from metrics import cka, codebook_metrics, collapsed, frechet, nmi, paired_t, probe, psnr, ssim
from transformer import KVCache
from vae import OpenSoraVAE, PixelVAE, load_opensora_vae
from vq import VectorQuantizer

HERE = os.path.dirname(os.path.abspath(__file__))
STDIT, VAE = (os.path.join(HERE, "assets", "fixtures", name) for name in ("stdit3_tiny", "vae_tiny"))
SMALL = ["--hidden", "16", "--depth", "1", "--heads", "2", "--action_depth", "1", "--lam_width", "16", "--lam_depth", "1",
         "--fdm_depth", "1", "--batch", "4", "--vq_start", "0", "--sampling_steps", "2", "--log_every", "2", "--eval_transitions", "64", "--eval_clips", "4"]


def small_world(seed=0, **lam):
    """A World of a few thousand weights, none of them zero, on clips of 8 x 8 pixels."""
    torch.manual_seed(seed)
    lam = LAMConfig(**{**dict(size=8, patch=4, width=16, depth=2, heads=2, fdm_depth=1, num_codes=8, code_dim=4), **lam})
    return awake(World(LAM(lam), DiT(DiTConfig(16, 2, 2, 3, 4, 3, 1, action_dim=8, action_depth=2)), PixelVAE(), FlowConfig("8")))


def awake(world):
    for p in world.parameters():
        if p.dim() and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return world.eval()


def video(b=2, t=6, size=8, seed=0):
    return torch.rand(b, 3, t, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def start(script, *args, cwd, processes=1, restarts=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), os.path.join(HERE, script), *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))        # ignored where pytest runs in the background


def run(script, *args, cwd, ok=True, processes=1, timeout=300):
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
    assert condition(), process.communicate(timeout=10) if process.poll() is not None else "too slow"


def complaint(done, script="train.py"):
    """The one line of a user's mistake."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: "), done.stderr
    return lines[0]


# quantizer ------------------------------------------------------------------------------------------------------------


def test_quantizer_takes_the_nearest_code_and_passes_the_gradient_straight_through():
    torch.manual_seed(0)
    vq, z = VectorQuantizer(8, 4), torch.randn(5, 3, 2, 4, requires_grad=True)
    z_q, indices, loss = vq(z)
    assert z_q.shape == z.shape and indices.shape == (5, 3, 2) and loss.shape == ()
    distance = (z[..., None, :] - vq.codebook).pow(2).sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    assert torch.allclose(z_q, vq.codebook[indices], atol=1e-6)
    assert torch.allclose(loss, 2 * (z - vq.codebook[indices]).pow(2).mean())   # codebook + commitment, weight 1 each
    g = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad((z_q * g).sum(), z)[0], g)


def test_the_codebook_starts_in_units_of_the_latents():
    torch.manual_seed(0)
    for scale in (1.0, 0.03):
        codes = LAM(LAMConfig(size=8, patch=4, width=16, depth=1, heads=2, num_codes=8, code_dim=64, latent_scale=scale)).vq.codebook
        assert 0.9 * scale / 8 < codes.abs().max() <= scale / 8


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 10
    vq = VectorQuantizer(8, 4)
    vq.fit(centres.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 4))
    assert torch.cdist(centres, vq.codebook).amin(1).max() < 0.2


def test_codebook_metrics_known_answers():
    assert codebook_metrics(torch.arange(8), 8) == pytest.approx({"utilization": 1, "max_usage": 1 / 8, "entropy": 1})
    assert codebook_metrics(torch.zeros(9, dtype=int), 8) == pytest.approx({"utilization": 1 / 8, "max_usage": 1, "entropy": 0})


# latent action model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
def test_latent_action_depends_on_nothing_after_its_next_frame(pairs):
    lam, x = small_world(pairs=pairs, odd=pairs, difference=not pairs, standardize=True).lam, video()
    z, indices, _ = lam.encode(x)
    assert z.shape == (2, 5, 2, 4) and indices.shape == (2, 5, 2)
    z = lam.infer(x)
    for j in range(1, 6):
        y = x.clone()
        y[:, :, j] = video(seed=1)[:, :, j]
        changed = (lam.infer(y) != z).flatten(2).any(2).any(0)                  # (t-1,)
        assert not changed[:j - 1].any() and changed[j - 1]
        if pairs:
            assert not changed[j + 1:].any()


def test_odd_latent_actions_change_sign_when_time_is_reversed():
    lam, x = small_world(pairs=True, odd=True).lam, video()
    assert torch.allclose(lam.infer(x), -lam.infer(x.flip(2)).flip(1), atol=1e-5)
    assert lam.infer(x[:, :, :1].expand(-1, -1, 6, -1, -1)).abs().max() == 0


def test_fdm_loss_trains_every_weight_of_the_lam():
    lam = small_world().lam.train()
    loss, out = lam(video())
    loss.backward()
    assert out["indices"].shape == (2, 5, 2) and all(p.grad is not None for p in lam.parameters())


def test_standardize_gives_zero_mean_and_unit_variance():
    norm, z = Standardize(2, 4), torch.randn(4000, 2, 2, 4) * 3 + 5
    for _ in range(100):
        y = norm(z)
    assert y.mean((0, 1)).abs().max() < 0.01 and (y.std((0, 1)) - 1).abs().max() < 0.01


# world model ----------------------------------------------------------------------------------------------------------


def test_dit_is_causal_in_frames_and_actions():
    dit, x, t = small_world().dit, video(), torch.rand(2, 6)
    a = torch.randn(2, 5, 8)
    v = dit(x, t, a)
    assert v.shape == x.shape
    for j in range(6):
        y = x.clone()
        y[:, :, j] += 1
        changed = (dit(y, t, a) != v).any(0).any(0).flatten(1).any(1)           # (l,)
        assert not changed[:j].any() and changed[j:].all()
    for j in range(5):
        b = a.clone()
        b[:, j] += 1
        changed = (dit(x, t, b) != v).any(0).any(0).flatten(1).any(1)
        assert not changed[:j + 1].any() and changed[j + 1]                     # action j first changes frame j+1


def test_bidirectional_dit_is_not_causal():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(16, 2, 1, 3, 4, 3, 1, causal=False, action_dim=0))
    torch.nn.init.normal_(dit.final_layer.linear.weight)
    x = video()
    y = x.clone()
    y[:, :, -1] += 1
    assert (dit(x, torch.rand(2, 6)) != dit(y, torch.rand(2, 6)))[:, :, 0].any()


@torch.no_grad()
def test_cached_frames_give_the_same_velocity():
    dit, x, a = small_world().dit, video(), torch.randn(2, 5, 8)
    t = torch.tensor([0, 0, 0, 0.7, 0.7, 0.7]).expand(2, 6)
    cache = KVCache()
    dit(x[:, :, :2], t[:, :2], a[:, :1], cache=cache)
    dit(x[:, :, 2:3], t[:, 2:3], a[:, :2], cache=cache)
    cache.append = False
    for _ in range(2):                                                          # reading twice changes nothing
        assert torch.allclose(dit(x[:, :, 3:], t[:, 3:], a, cache=cache), dit(x, t, a)[:, :, 3:], atol=1e-5)


def test_time_shift_is_open_soras():
    assert time_ratio("auto", 512 ** 2, 4) == 2 and time_ratio("3", 1, 1) == 3 and time_ratio("none", 1, 1) == 1
    assert shift_time(torch.tensor([0.0, 0.5, 1.0]), 3).tolist() == [0, 0.75, 1]


@torch.no_grad()
def test_sampler_on_an_exact_velocity_reaches_the_data():
    class Exact(torch.nn.Module):       # all data is one point, so the velocity is known: (x_0 - x_t) / t
        cfg = DiTConfig(pixel_stride=1)

        def forward(self, x, t, actions, fps, cache):
            return (self.data - x) / t.clamp(min=1e-9)[:, None, :, None, None]
    exact, x = Exact(), video()
    exact.data = video(seed=1)
    x[:, :, :2] = exact.data[:, :, :2]
    for shift in (False, 8.0):
        y = sample(exact, x, context=2, steps=10, shift=shift)
        assert torch.equal(y[:, :, :2], x[:, :, :2]) and torch.allclose(y, exact.data, atol=1e-5)


@torch.no_grad()
def test_guidance_one_is_the_plain_model_and_zero_is_the_null_action():
    dit, x, a = small_world().dit, video(), torch.randn(2, 5, 8)
    null = a.clone()
    null[:, 1:] = 0                                                             # frames 2.. are noised
    go = lambda a, g: sample(dit, x, 2, a, steps=3, guidance=g)
    assert torch.allclose(go(a, 0.0), go(null, 1.0), atol=1e-5)
    assert not torch.allclose(go(a, 4.0), go(a, 1.0), atol=1e-3)


def strided_world():
    """As `small_world`, on the latents of a VAE with a temporal stride of 4."""
    vae = load_opensora_vae(VAE)
    torch.manual_seed(0)
    dit = DiT(DiTConfig(16, 2, 2, vae.channels, 1, 2 * vae.channels, 8, action_dim=32, action_depth=1))
    return awake(World(small_world().lam, dit, vae, FlowConfig("8")))


@pytest.mark.parametrize("make, t, size", [(small_world, 7, 8), (strided_world, 17, 32)])
@pytest.mark.parametrize("guidance", (1.0, 2.0))
@torch.no_grad()
def test_cached_rollout_equals_the_plain_one_at_every_history_length(make, t, size, guidance):
    world, x, r = make(), video(3, t, size), 1 if size == 8 else 4
    z, fps = world.lam.encode(x)[0], torch.tensor([5.0, 10.0, 30.0])
    a = world.pack(z)
    for known in range(1, t, r):                                                # true frames
        dream = world.rollout(x[:, :, :known], z, 3, guidance, fps, Draw(5))
        draw, past = Draw(5), world.vae.encode(x[:, :, :known])
        for j in range(past.shape[2], a.shape[1] + 1):                          # no cache: the whole past goes through the DiT at each step
            now = torch.cat([past, draw(torch.randn, 3, *past.shape[1:2], 1, *past.shape[3:])], 2)
            past = sample(world.dit, now, j, a[:, :j], 3, guidance, world.cfg.time_shift, fps)
        assert torch.allclose(dream, world.vae.decode(past, t).clamp(-1, 1), atol=1e-4)
        # candidates that share their past, which goes through VAE and DiT once
        mine = torch.cat([z[:1, :known - 1].expand(3, -1, -1, -1), z[:, known - 1:]], 1)
        shared, own = (world.rollout(first, mine, 3, guidance, None, Draw(5)) for first in (x[:1, :, :known], x[:1, :, :known].expand(3, -1, -1, -1, -1)))
        assert torch.allclose(shared, own, atol=1e-4)


@torch.no_grad()
def test_adaptation_drives_clips_by_real_actions():
    world, x = small_world(), video()
    world.adapter = Adapter(3, world.lam.cfg)
    a, b = torch.randn(2, 2, 5, 3)
    loss = lambda share, real: setattr(world.cfg, "real_share", share) or world(x, Draw(3), real=real)[0]
    assert loss(1.0, a) != loss(1.0, b) and loss(0.0, a) == loss(0.0, b) == loss(1.0, None)
    # with a share of 1 it is the loss on the adapter's latent actions, and on nothing that was inferred
    given, vq = loss(1.0, a), world.lam.encode(x)[2]
    world.lam.encode = lambda *_: (torch.full((2, 5, 2, 4), 9.0), None, torch.zeros(()))
    assert torch.allclose(loss(1.0, a), given - vq, atol=1e-6)


@torch.no_grad()
def test_a_window_sees_only_the_last_frames():
    world, x = small_world(), video()
    z = world.lam.encode(x)[0]
    world.cfg.window = 2                                                        # a window sees only the last two frames
    late = world.rollout(x[:, :, :4], z, steps=3, draw=Draw(5))
    other = world.rollout(torch.cat([video(seed=3)[:, :, :2], x[:, :, 2:4]], 2), z, steps=3, draw=Draw(5))
    assert torch.equal(late[:, :, 4:], other[:, :, 4:])


def test_joint_loss_reaches_idm_codebook_actions_and_body():
    world = small_world().train()
    loss, out = world(video(), Draw(0))
    loss.backward()
    assert torch.allclose(loss, out["flow"] + out["vq"]) and out["clip_flow"].shape == (2,)
    for part in (world.lam.idm, world.lam.vq, world.dit.action, world.dit.spatial_blocks):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0


def test_fresh_actions_hardly_disturb_the_generator_yet_move_the_idm():
    torch.manual_seed(0)
    dit = DiT(DiTConfig(64, 4, 2, 3, 4, 3, 1, action_dim=8, action_depth=2))
    torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.1)
    x, t, a = video(), torch.rand(2, 6), torch.randn(2, 5, 8, requires_grad=True)
    plain, acted = dit(x, t), dit(x, t, a)
    assert 0 < (acted - plain).std() / plain.std() < 0.1
    acted.square().sum().backward()
    assert a.grad.abs().sum() > 0


def test_context_is_clean_and_carries_no_loss():
    world = small_world()
    seen = {}
    world.dit.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], t=args[1]))
    x = video(64)
    world(x, Draw(0))
    clean = seen["t"] == 0                                                      # (b, l)
    count = clean.sum(1)
    assert clean[:, 0].all() and set(count.tolist()) == {1, 2, 3, 4, 5} and 0.4 < (count == 1).float().mean() < 0.8
    assert torch.equal(seen["x"].transpose(1, 2)[clean], x.transpose(1, 2)[clean])


def test_two_ranks_draw_what_one_draws():
    whole = Draw(1, 2)(torch.randn, 4, 3)
    parts = [Draw(1, 2, rank=r, ranks=2)(torch.randn, 2, 3) for r in range(2)]
    assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, Draw(1, 3)(torch.randn, 4, 3))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="multiple of its patch"):
        LAM(LAMConfig(size=10, patch=4))
    with pytest.raises(ValueError, match="actions"):
        small_world().dit(video(), torch.rand(2, 6), torch.zeros(2, 6, 8))


# Open-Sora's weights: assets/fixtures holds small checkpoints in the released layout and what Open-Sora's own code makes of them


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_dit_computes_what_open_sora_does(causal):
    io, dit = load_file(f"{STDIT}/io.safetensors"), load_opensora(STDIT, causal, action_dim=8)
    t, prefix = io["in.timestep"][:, None].expand(-1, 5) / 1000, "out.causal_" if causal else "out."
    for name, times in {"plain": t, "masked": t * io["in.x_mask"]}.items():
        assert torch.allclose(dit(io["in.x"], times, fps=io["in.fps"]), io[prefix + name][:, :4], atol=1e-5), name


@torch.no_grad()
def test_sampler_computes_what_open_sora_does():
    io, dit = load_file(f"{STDIT}/io.safetensors"), load_opensora(STDIT, action_dim=0)
    for name, shift in {"out.causal_sample": False, "out.causal_sample_shifted": True}.items():
        assert torch.allclose(sample(dit, io["in.noise"], context=1, shift=shift, fps=io["in.fps"]), io[name], atol=1e-4), name


def test_vae_computes_what_open_sora_does():
    io, vae = load_file(f"{VAE}/io.safetensors"), load_opensora_vae(VAE)
    assert torch.allclose(vae.encode(io["in.video"]), io["out.latent"], atol=1e-5)
    assert torch.allclose(vae.decode(io["out.latent"], 17), io["out.video"], atol=1e-4)
    assert torch.allclose(vae.spatial_vae.encode(io["in.video"]), io["out.spatial_latent"], atol=1e-5)
    assert torch.allclose(vae.spatial_vae.decode(io["out.spatial_latent"]), io["out.spatial_video"], atol=1e-4)


def test_position_grid_of_an_odd_aspect_ratio():
    dit = load_opensora(STDIT, action_dim=0)                    # width 48, patch 2, 8 pixels a latent
    assert dit(torch.randn(1, 4, 2, 5, 9), torch.rand(1, 2)).shape == (1, 4, 2, 5, 9)           # padded to 6 x 10
    scale, base = (40 * 72) ** 0.5 / 512, round(15 ** 0.5)
    for place, row, col in ((0, 0, 0), (4, 0, 4), (7, 1, 2), (14, 2, 4)):
        want = [f(n / scale * base / count * 10000 ** (-i / 12)) for n, count in ((col, 5), (row, 3)) for f in (np.sin, np.cos) for i in range(12)]
        assert torch.allclose(dit.position(3, 5, 5, 9, "cpu")[place], torch.tensor(want, dtype=torch.float32), atol=1e-5)


def test_vae_works_in_chunks_of_17_frames_and_pads_in_front():
    vae, x = load_opensora_vae(VAE), torch.rand(2, 3, 21, 16, 24) * 2 - 1
    z = vae.encode(x)
    assert z.shape == (2, 4, 6, 2, 3) and torch.equal(z[:, :, :5], vae.encode(x[:, :, :17])) and vae.decode(z, 21).shape == x.shape
    assert torch.allclose(z[:, :, 5:], vae.encode(x[:, :, 17:]), atol=1e-5)
    y = x.clone()
    y[:, :, 1] = 0                                              # its convolutions are causal; its norms leak a little over the chunk
    first, second = (vae.encode(y) - z).abs().amax((0, 1, 3, 4))[:2]
    assert 0 < first < second / 5
    torch.manual_seed(0)
    assert not torch.equal(vae.encode(x, sample=True), z)
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ValueError, match="5 latent frames, but 21 frames have 6"):
        vae.decode(z[:, :, :5], 21)


@torch.no_grad()
def test_fresh_actions_hardly_disturb_open_sora_yet_reach_the_idm():
    torch.manual_seed(0)
    io, lam = load_file(f"{STDIT}/io.safetensors"), LAM(LAMConfig(size=8, patch=4, width=16, depth=1, heads=2, fdm_depth=0))
    world = World(lam, load_opensora(STDIT), load_opensora_vae(VAE), FlowConfig())
    x, t = io["in.x"], io["in.timestep"][:, None] / 1000 * io["in.x_mask"]
    z = world.pack(lam.encode(video(2, 17))[0])
    plain, acted = world.dit(x, t), world.dit(x, t, z)
    assert 0 < ((acted - plain)[:, :, 1:].std() / plain[:, :, 1:].std()) < 0.02
    with torch.enable_grad():
        world(video(1, 17, 16), Draw(0))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (lam.idm.out.weight, lam.idm.queries, lam.idm.patch.weight))
    with pytest.raises(ValueError, match="5, 9, 13, 17, 21, 25, 29, 33"):
        world(video(1, 16, 16))


def sparse(path, shapes):
    """A .safetensors file of float32 zeros that takes no room on the disk; its size in bytes"""
    head, at = {}, 0
    for k, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        head[k] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text), f.truncate(8 + len(text) + at)
    return at


def released(folder):
    """Files of the released sizes and with the released configs' fields: DiT with text path, VAE."""
    with torch.device("meta"):
        dit, vae = DiT(DiTConfig(action_dim=0)), OpenSoraVAE()
    shapes = {k: v.shape for k, v in dit.state_dict().items()} | {"rope.freqs": (36,), "y_embedder.y_embedding": (300, 4096)}
    for i in range(28):
        for block in (f"spatial_blocks.{i}", f"temporal_blocks.{i}"):
            shapes |= {f"{block}.cross_attn.{n}.weight": (m * 1152, 1152) for n, m in (("q_linear", 1), ("kv_linear", 2), ("proj", 1))}
    configs = {"stdit": {"model_type": "STDiT3", "depth": 28, "hidden_size": 1152, "num_heads": 16, "input_sq_size": 512},
               "vae": {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17, "scale": [3.85, 2.32, 2.33, 3.06],
                       "shift": [-0.1, 0.34, 0.27, 0.98], "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
                       "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None}}}
    sizes = {}
    for name, tensors in {"stdit": shapes, "vae": {k: v.shape for k, v in vae.state_dict().items()}}.items():
        os.makedirs(folder / name)
        sizes[name] = sparse(folder / name / "model.safetensors", tensors)
        (folder / name / "config.json").write_text(json.dumps(configs[name]))
    return sizes


def test_full_size_weights_need_no_more_memory_than_the_model(tmp_path):
    sizes = released(tmp_path)
    assert 4.7e9 < sizes["stdit"] < 4.9e9 and 1.5e9 < sizes["vae"] < 1.6e9      # the released files are 4.84 and 1.57 GB
    code = """if True:
        import resource, sys
        from dit import load_opensora
        from vae import load_opensora_vae
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for load in (load_opensora_vae, load_opensora):
            before = peak()
            model = load(sys.argv[1 + (load is load_opensora)])
            size = sum(4 * p.numel() for p in model.parameters())
            print(size, peak() - before)
            del model"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "vae", tmp_path / "stdit"], cwd=HERE, capture_output=True, text=True, timeout=300)
    rows = [line.split() for line in done.stdout.splitlines() if line[0].isdigit()]
    assert len(rows) == 2, done.stderr
    for size, peak in rows:
        assert int(peak) < 1.1 * int(size)
    assert "904.07 M parameters loaded" in done.stdout


def mistreat(how, path):
    tensors = load_file(f"{STDIT}/model.safetensors")
    first = "spatial_blocks.1.attn.qkv.weight"
    if how == "missing":
        del tensors[first]
    if how == "extra":
        tensors["spatial_blocks.1.attn.lora"] = torch.zeros(2)
    if how == "shape":
        tensors[first] = tensors[first][:-1].clone()
    if how == "list":
        torch.save(list(tensors.values()), path / "w.pt")
    elif how == "code":                                         # a pickle that would run code
        torch.save({"x": os.getcwd}, path / "w.pt")
    elif how == "pt":
        torch.save(tensors, path / "w.pt")
    elif how == "folder":
        return path
    else:
        save_file(tensors, path / "w.safetensors")
        if how == "truncated":
            os.truncate(path / "w.safetensors", 500000)
        return path / "w.safetensors"
    return path / "w.pt"


@pytest.mark.parametrize("how, words", [
    ("missing", "1 tensors missing, e.g. spatial_blocks.1.attn.qkv.weight"),
    ("extra", "1 tensors unexpected, e.g. spatial_blocks.1.attn.lora"),
    ("shape", "1 tensors of another shape, e.g. spatial_blocks.1.attn.qkv.weight (143, 48) instead of (144, 48)"),
    ("truncated", "cannot be read as weights"), ("code", "cannot be read as weights"), ("list", "not a state dict"),
    ("folder", "not a released folder"), ("pt", None)])
def test_bad_weights_get_one_line(how, words, tmp_path):
    path = str(mistreat(how, tmp_path))
    if words is None:
        good = load_opensora(STDIT, action_dim=0).state_dict()
        assert all(torch.equal(v, good[k]) for k, v in load_opensora(path, action_dim=0).state_dict().items())
        return
    with pytest.raises(ValueError) as error:
        load_opensora(path)
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
    done = run("train.py", "--dit_weights", path, "--vae_weights", VAE, "--frames", 5, "--eval_frames", 5, cwd=tmp_path, ok=False)
    assert words in complaint(done) and not (tmp_path / "out").exists()


def test_bad_vae_weights_and_released_config(tmp_path):
    tensors = load_file(f"{VAE}/model.safetensors")
    (tmp_path / "config.json").write_text('{"vae_2d": {}, "vae_temporal": {}}')
    save_file(tensors, tmp_path / "model.safetensors")          # small tensors, but a config without sizes: the released ones
    with pytest.raises(ValueError, match=r"of another shape, e.g. \S+ \(8, 3, 3, 3\) instead of \(128, 3, 3, 3\)"):
        load_opensora_vae(str(tmp_path))
    with pytest.raises(ValueError, match="tensors missing"):
        load_opensora_vae(STDIT)
    with pytest.raises(ValueError, match="not an STDiT3"):
        load_opensora(VAE)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_opensora_vae(str(tmp_path / "nothing"))


def test_latent_cache_never_gives_a_stale_latent(tmp_path):
    vae, clips = load_opensora_vae(VAE), torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8)
    as_video = lambda c: c.permute(0, 4, 1, 2, 3) / 127.5 - 1
    want = vae.encode(as_video(clips))
    count = lambda: len(os.listdir(tmp_path))
    assert torch.allclose(LatentCache(vae, tmp_path).encode(clips, as_video(clips)), want, atol=1e-6) and count() == 3
    cache = LatentCache(vae, tmp_path)
    cache.vae = None                                            # found on the disk: the VAE is not asked
    assert torch.allclose(cache.encode(clips[[2, 0]], as_video(clips[[2, 0]])), want[[2, 0]], atol=1e-6)
    clips[1, 0, 0, 0, 0] += 1                                   # another clip, another VAE: neither is taken for the old one
    LatentCache(vae, tmp_path).encode(clips, as_video(clips))
    assert count() == 4
    vae.shift += 1
    assert torch.allclose(LatentCache(vae, tmp_path).encode(clips[:1], as_video(clips[:1])), want[:1] - 1 / vae.scale, atol=1e-5)


# toy world and data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", toy.EMBODIMENTS)
def test_toy_action_t_changes_frame_t_plus_one_first(name):
    frames, actions, effects = toy.robot_clips(name, range(20), 0, 8, 20)
    assert frames.shape == (20, 8, 20, 20, 3) and frames.dtype == np.uint8
    assert actions.shape == (20, 7, toy.EMBODIMENTS[name].action_dim) and effects.shape == (20, 7)
    moved = (frames[:, 1:] != frames[:, :-1]).any((2, 3, 4))
    assert np.array_equal(moved, effects != 4)                                  # effect 4: nothing moved


def test_toy_world_pushes_blocks_blocks_stop_at_walls_and_states_return():
    world = toy.ToyWorld("slide", range(1), size=20)
    world.set_state([[[1, 1], [2, 1], [0, 4]]])
    assert world.step(np.array([[1.0, 0]])).tolist() == [[[2, 1], [3, 1], [0, 4]]]
    state, picture = world.get_state(), world.render()
    for _ in range(3):
        world.step(np.array([[1.0, 0]]))
    assert world.get_state()[0, 1].tolist() == [4, 1] and world.get_state()[0, 0].tolist() == [3, 1]    # 5 cells: 0..4
    world.set_state(state)
    assert np.array_equal(world.render(), picture)


def test_toy_actions_ask_for_the_moves_they_were_made_for():
    want = np.tile(toy.MOVES, (20, 1))
    for name in toy.EMBODIMENTS:
        world = toy.ToyWorld(name, range(100))
        assert np.array_equal(world.move_of(world.action_for(want, np.random.default_rng(0).random((100, 2)))), want)


@pytest.mark.parametrize("task", toy.TASKS)
def test_toy_tasks_start_unsolved_and_goals_are_solutions(task):
    world, goal = toy.task_pairs(task, "held-out", size=20)
    again = toy.task_pairs(task, "held-out", size=20)
    assert np.array_equal(again[1], goal) and np.array_equal(again[0].get_state(), world.get_state())
    assert not world.success(task, goal).any()
    world.set_state(goal)
    assert world.success(task, goal).all()


def test_toy_clips_are_seeded_disjoint_and_mixed():
    data = ToyClips("robots", 20, 4)
    a, b = data[range(300)], data[[7]]
    assert torch.equal(a["video"][7], b["video"][0])
    share = torch.bincount(a["source"]) / 300
    assert torch.allclose(share, torch.tensor([0.3, 0.2, 0.5]), atol=0.08)
    assert not torch.equal(ToyClips("robots", 20, 4, split="heldout")[[7]]["video"], b["video"])
    assert not torch.equal(ToyClips("robots", 20, 4, seed=1)[[7]]["video"], b["video"])


def test_ranks_share_each_batch():
    data = ToyClips("cross", 20, 2)
    one = [b["video"] for b in loader(data, 8, 3, 5)]
    two = [list(loader(data, 8, 3, 5, rank, 2)) for rank in range(2)]
    assert len(one) == 2 and all(torch.equal(x, torch.cat([p["video"], q["video"]])) for x, p, q in zip(one, *two))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with an mp4, a webm and a gif of moving squares; the mp4 has actions."""
    folder = tmp_path_factory.mktemp("films")
    frames = toy.robot_clips("slide", range(1), 0, 20, 48)[0][0].repeat(2, 1)   # (20, 96, 48, 3)
    imageio.imwrite(folder / "a.mp4", frames, plugin="pyav", codec="libx264", fps=12)
    imageio.imwrite(folder / "b.webm", frames, plugin="pyav", codec="libvpx-vp9", fps=12)
    imageio.imwrite(folder / "c.gif", frames, duration=80, loop=0)
    imageio.imwrite(folder / "a-short.gif", frames[:3], duration=80, loop=0)
    np.savez(folder / "a.npz", actions=np.arange(38.0).reshape(19, 2))
    return folder


def test_video_files_are_read_cropped_and_resized(films):
    data = Episodes(str(films), 20, 8)
    assert len(data.episodes) == 2 and len(data.skipped) == 1 and "3 frames, too short" in data.skipped[str(films / "a-short.gif")]
    assert len(Episodes(str(films), 20, 8, split="heldout").episodes) == 1
    batch = data[range(5)]
    assert batch["video"].shape == (5, 8, 20, 20, 3) and batch["fps"].min() == 12
    whole = Episodes(str(films / "a.mp4"), 48, 10)                              # a single file: its first half
    truth = toy.robot_clips("slide", range(1), 0, 20, 48)[0][0].repeat(2, 1)[:, 24:72]
    assert np.abs(whole[[0]]["video"][0].numpy().astype(int) - truth[:10]).mean() < 8
    rest = Episodes(str(films / "a.mp4"), 48, 10, split="heldout")[[0]]
    assert np.abs(rest["video"][0].numpy().astype(int) - truth[10:]).mean() < 8 and rest["actions"][0, :, 0].tolist() == list(range(20, 38, 2))


def shades(n, h=32, w=32):
    """Frames (n, h, w, 3) that tell their number by their brightness: 6 t, for up to 40."""
    return np.broadcast_to((6 * np.arange(n))[:, None, None, None], (n, h, w, 3)).astype(np.uint8)


def told(batch):
    """The numbers (b, t) that the frames of `shades` tell."""
    return (batch["video"].float().mean((2, 3, 4)) / 6).round()


def write_film(path, frames, codec="libx264", times=None, sound=False, **options):
    """A video whose frame i is shown at times[i] / 100 s (every 10th of a second)."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else stream.pix_fmt
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        if sound:
            tone = file.add_stream("aac", rate=8000)
            noise = av.AudioFrame.from_ndarray(np.random.default_rng(0).normal(0, 0.1, (1, 8000 * len(frames) // 10)).astype(np.float32), "fltp", "mono")
            noise.sample_rate = 8000
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            picture.pts, picture.time_base = (10 * i if times is None else times[i]), Fraction(1, 100)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
        if sound:
            file.mux(tone.encode(noise)), file.mux(tone.encode(None))


@pytest.mark.parametrize("end, options", [
    ("mp4", dict(g=7)), ("mp4", dict(g=250, bf=3)), ("mp4", dict(g=5, sound=True)), ("mkv", dict(g=9)), ("webm", dict(codec="libvpx-vp9", g=6)), ("gif", {}),
    ("mp4", dict(times=np.cumsum(np.random.default_rng(0).integers(3, 40, 40)))), ("mp4", dict(h=33, w=47)), ("mov", dict(h=16, w=400))])
def test_seeking_gives_the_very_frames_of_decoding_from_the_start(end, options, tmp_path):
    options = dict(options)
    file, frames = str(tmp_path / f"film.{end}"), shades(40, options.pop("h", 32), options.pop("w", 32))
    imageio.imwrite(file, frames, duration=100, loop=0) if end == "gif" else write_film(file, frames, **options)
    with av.open(file) as container:
        truth = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    info = data.inspect_video(file)
    assert info["n"] == len(truth) == 40 and info["hw"] == list(frames.shape[1:3])
    for wanted in ([0, 1], [39], [13, 14, 15], [2, 20, 38], [7], [35, 36]):
        assert all(np.array_equal(a, truth[i]) for a, i in zip(data.read_video(file, info, np.array(wanted)), wanted, strict=True))
    clip = Episodes(file, 8, 5)[range(6)]
    assert (told(clip).diff(dim=1) == 1).all() and clip["video"].shape == (6, 5, 8, 8, 3)


@pytest.mark.parametrize("end", ("npz", "npy", "json"))
def test_actions_stay_aligned_with_their_frames(end, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MEMORY", 0 if end == "npy" else data.MEMORY)     # clips are read on their own, or from kept episodes
    for name in "ab":                       # frame t tells t, action t is t
        write_film(tmp_path / f"{name}.mp4", shades(20))
        actions = np.arange(19.0)[:, None]
        np.savez(tmp_path / f"{name}.npz", actions=actions) if end == "npz" else np.save(tmp_path / f"{name}.npy", actions) if end == "npy" else \
            (tmp_path / f"{name}.json").write_text(json.dumps({"actions": actions.tolist()}))
    batch = Episodes(str(tmp_path), 32, 5)[range(20)]
    assert torch.equal(told(batch)[:, :-1], batch["actions"][..., 0])
    # skipped frames: their actions are summed, or the last is taken
    for options in (dict(stride="3"), dict(fps="3.4")):
        batch, last = (Episodes(str(tmp_path), 32, 5, options=options | how)[range(20)] for how in ({}, {"actions": "last"}))
        seen = told(batch)
        assert torch.equal(last["actions"][..., 0], seen[:, 1:] - 1)
        sums = [[sum(range(int(a), int(b))) for a, b in zip(row[:-1], row[1:])] for row in seen]
        assert batch["actions"][..., 0].tolist() == sums and batch["fps"][0] == pytest.approx(10 / 3 if "stride" in options else 3.4)
    assert (seen.diff(dim=1) - 10 / 3.4).abs().max() < 1                        # the nearest frames to every 1 / 3.4 s


def robomimic(file, demos=4, n=12):
    needs("h5py")
    import h5py
    with h5py.File(file, "w") as f:
        for d in range(demos):
            f[f"data/demo_{d}/actions"] = np.arange(n * 2.0).reshape(n, 2)      # as many as frames: the last leads beyond
            f[f"data/demo_{d}/obs/agentview_image"] = shades(n)
            f[f"data/demo_{d}/obs/wrist_image"] = np.zeros((n, 16, 16, 3), np.uint8)
            f[f"data/demo_{d}/obs/joint_pos"] = np.zeros((n, 7))
        f["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        f["mask/train"] = np.array([b"demo_0", b"demo_2", b"demo_3"])


def test_robomimic_hdf5_is_read(tmp_path):
    robomimic(tmp_path / "a.hdf5")
    with pytest.raises(data.DataError, match="@camera=agentview_image or @camera=wrist_image"):
        Episodes(str(tmp_path), 32, 4)
    source = Episodes(str(tmp_path), 32, 4, options={"camera": "agentview_image"})
    assert len(source.episodes) == 3 and source.labelled
    batch = source[range(10)]
    assert torch.equal(told(batch)[:, :-1] * 2, batch["actions"][..., 0]) and (batch["fps"] == 20).all()
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    robomimic(spoiled / "a.hdf5", 6)
    import h5py
    with h5py.File(spoiled / "a.hdf5", "a") as f:
        f["data/demo_1/actions"][3] = np.nan
        del f["data/demo_2/obs/agentview_image"], f["data/demo_2/obs/wrist_image"]
        f["data"].attrs["env_args"] = "null"
    bad = Episodes(str(spoiled), 32, 4, split="all", options={"camera": "agentview_image"})
    assert bad.labelled and "no uint8 images" in bad.skipped[f"{spoiled}/a.hdf5:demo_2"] and (bad[range(40)]["fps"] == 24).all()
    assert bad.failed and bad[range(40)]["actions"].isfinite().all()
    shutil.rmtree(spoiled)
    assert batch["video"].max() == 6 * told(batch).max()                        # exact: nothing is encoded
    assert len(Episodes(str(tmp_path), 32, 4, split="all", options={"camera": "agentview_image"}).episodes) == 4
    halves = np.concatenate([np.zeros((12, 16, 32, 3)), np.full((12, 16, 32, 3), 255)], 1).astype(np.uint8)
    with h5py.File(tmp_path / "b.hdf5", "w") as f:
        f["data/demo_0/obs/image"] = halves
    up, down = (clips(f"{tmp_path}/b.hdf5{flip}", 32, 4)[[0]]["video"][0, 0] for flip in ("@flip=vertical", ""))
    assert up[0].min() == 255 and down[0].max() == 0
    only = clips(f"{tmp_path}/a.hdf5@camera=agentview_image@split=train", 32, 4)
    assert [e.key.split("/")[1] for e in only.episodes] == ["demo_0", "demo_2"]                     # demo_3 is held out


def lerobot(root, version, lengths=(15, 12, 20), fps=10):
    """A LeRobot data set; frame t of every episode tells t, action t is (t, episode)."""
    needs("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq
    old = version == "v2.1"
    info = {"codebase_version": version, "fps": fps, "chunks_size": 1000, "splits": {"train": "0:2"},
            "features": {"observation.images.top": {"dtype": "video", "shape": [32, 32, 3]}, "action": {"dtype": "float32", "shape": [2]}},
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet" if old else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4" if old else
                          "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    rows = [{"episode_index": e, "action": [float(t), float(e)], "timestamp": t / fps, "frame_index": t} for e, n in enumerate(lengths) for t in range(n)]

    def put(path, rows):
        os.makedirs(os.path.dirname(root / path), exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / path)

    def film(path, frames):
        os.makedirs(os.path.dirname(root / path), exist_ok=True)
        write_film(root / path, frames, g=2)

    os.makedirs(root / "meta")
    if old:
        for e, n in enumerate(lengths):
            put(f"data/chunk-000/episode_{e:06d}.parquet", [r for r in rows if r["episode_index"] == e])
            film(f"videos/chunk-000/observation.images.top/episode_{e:06d}.mp4", shades(n))
        (root / "meta/episodes.jsonl").write_text("".join(json.dumps({"episode_index": e, "length": n}) + "\n" for e, n in enumerate(lengths)))
    else:
        put("data/chunk-000/file-000.parquet", rows)
        film("videos/observation.images.top/chunk-000/file-000.mp4", np.concatenate([shades(n) for n in lengths[:2]]))
        film("videos/observation.images.top/chunk-000/file-001.mp4", shades(lengths[2]))
        key = "videos/observation.images.top/"
        put("meta/episodes/chunk-000/file-000.parquet", [
            {"episode_index": e, "length": n, "data/chunk_index": 0, "data/file_index": 0, key + "chunk_index": 0, key + "file_index": int(e == 2),
             key + "from_timestamp": lengths[0] / fps if e == 1 else 0.0} for e, n in enumerate(lengths)])
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("version", ("v2.1", "v3.0"))
def test_lerobot_is_read(version, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MEMORY", 0)
    lerobot(tmp_path / "set", version)
    source = clips(str(tmp_path / "set"), 32, 5)
    assert source.kind == "LeRobot" and [e.n for e in source.episodes] == [15, 12] and clips(str(tmp_path / "set"), 32, 5, split="heldout").episodes[0].n == 20
    batch = source[range(30)]
    assert torch.equal(told(batch)[:, :-1], batch["actions"][..., 0]) and (batch["fps"] == 10).all()
    assert (told(batch).diff(dim=1) == 1).all() and set(batch["actions"][:, 0, 1].tolist()) == {0, 1}       # no clip spans two episodes
    assert [e.n for e in clips(f"{tmp_path / 'set'}@split=train", 32, 5, split="all").episodes] == [15, 12]
    (tmp_path / "set/meta/info.json").write_text('{"codebase_version": "v2.1"}')
    with pytest.raises(data.DataError, match="metadata cannot be read"):
        clips(str(tmp_path / "set"), 32, 5)


def test_index_is_made_once_and_renewed_for_changed_files(films, tmp_path, monkeypatch):
    folder = tmp_path / "films"
    shutil.copytree(films, folder, ignore=shutil.ignore_patterns(".cola*"))
    looked = []
    inspect = data.inspect_video
    monkeypatch.setattr(data, "inspect_video", functools.wraps(inspect)(lambda file: (looked.append(os.path.basename(file)), inspect(file))[1]))
    Episodes(str(folder), 8, 8), Episodes(str(folder), 8, 8, split="heldout")
    assert sorted(looked) == ["a-short.gif", "a.mp4", "b.webm", "c.gif"]
    write_film(folder / "a.mp4", shades(20))
    np.savez(folder / "b.npz", actions=np.zeros((5, 2)))                        # does not fit
    looked.clear()
    assert "5 actions beside 20 frames" in Episodes(str(folder), 8, 8).skipped[str(folder / "b.webm")] and sorted(looked) == ["a.mp4", "b.webm"]
    # a file that is gone, after the index was read, does not stop a run
    shutil.copy(folder / "c.gif", folder / "d.gif")
    source = Episodes(str(folder), 8, 8)
    os.remove(source.episodes[0].file)
    assert source[range(20)]["video"].shape == (20, 8, 8, 8, 3) and len(source.failed) == 1


def test_files_are_found_once_whatever_links_there_are(tmp_path):
    (tmp_path / "my videos").mkdir()
    write_film(tmp_path / "my videos/a@b.mp4", shades(20)), write_film(tmp_path / "my videos/c.mp4", shades(16))
    for link, target in (("me", "."), ("up", ".."), ("gone.mp4", "nowhere"), ("d.mp4", "c.mp4")):
        os.symlink(target, tmp_path / "my videos" / link)
    source = Episodes(str(tmp_path / "my videos"), 8, 4, split="all")
    assert sorted(e.n for e in source.episodes) == [16, 16, 20] and len(source.skipped) == 1
    # two files of one folder, each a source of its own, of the same size and time
    (a, b), times = (tmp_path / "my videos" / n for n in ("a@b.mp4", "c.mp4")), (10 ** 9, 10 ** 9)
    os.truncate(b, a.stat().st_size), os.utime(a, times), os.utime(b, times)
    assert [clips([str(f)], 8, 4, split="all").episodes[0].n for f in (a, b, a)] == [20, 16, 20]
    assert clips([f"{tmp_path}/my videos@stride=2"], 8, 4)[[0]]["fps"] == 5
    # a pause in the film: the same frame is the nearest twice, and the last action holds
    write_film(tmp_path / "pause.mp4", shades(20), times=[10 * i + 60 * (i > 9) for i in range(20)])
    np.save(tmp_path / "pause.npy", np.arange(19.0)[:, None])
    batch = clips(f"{tmp_path}/pause.mp4@fps=5@actions=last", 8, 4, split="all")[range(30)]
    assert torch.equal(batch["actions"][..., 0], told(batch)[:, 1:] - 1)


def test_mixture_draws_by_weight_on_any_number_of_ranks(films, tmp_path):
    write_film(tmp_path / "white.mp4", np.full((20, 32, 32, 3), 255, np.uint8))
    text = f"mine:{films}:0.3 white:{tmp_path}/white.mp4@stride=2:0.5 cross:0.2"
    mixture = clips(text, 16, 4)
    assert mixture.names == ["mine", "white", "cross"]
    which = mixture[range(600)]["source"]
    assert (torch.bincount(which) / 600 - torch.tensor([0.3, 0.5, 0.2])).abs().max() < 0.05
    batch = mixture[range(16)]
    assert (batch["video"][batch["source"] == 1] > 250).all() and (batch["fps"][batch["source"] == 1] == 5).all()
    whole = next(iter(loader(mixture, 8, 3, 4)))
    parts = [next(iter(loader(mixture, 8, 3, 4, rank, 2))) for rank in range(2)]
    assert all(torch.equal(whole[k], torch.cat([p[k] for p in parts])) for k in ("video", "source", "fps"))


@pytest.mark.parametrize("text, words", [
    ("/no/such", "no such file"), ("{}@fps", "options read"), ("{}@speed=2", "no option @speed"), ("{}@flip=up", "choose from vertical"), ("{}@fps=x", "@fps takes a number"),
    ("{}@fps=90", "frames a second"), ("{}:0", "above 0"), ("a:{}:0.5 b:{}", "all sources a weight"), ("{} {}", "the same name"), ("{}/a.npz", "no train clip"),
])
def test_bad_sources_get_one_line(text, words, films):
    with pytest.raises(data.DataError, match=words):
        clips(text.replace("{}", str(films)), 16, 4)


def damage(rng, raw, how):
    """Bytes of a file that somebody spoiled."""
    if how == "truncated":
        return raw[:int(rng.integers(1, len(raw) - 1))]
    if how == "flipped":
        raw = bytearray(raw)
        for at in rng.integers(0, len(raw), 20):
            raw[at] ^= 1 << int(rng.integers(8))
        return bytes(raw)
    if how == "zeros":
        return raw[:len(raw) // 4] + bytes(len(raw) // 2) + raw[-(len(raw) // 4):]
    if how == "header":                     # numbers near the start become huge
        return raw[:int(rng.integers(4, 60))] + b"\xff" * int(rng.integers(4, 40)) + raw[100:]
    return {"empty": b"", "text": b"not a video\n" * 50, "noise": rng.bytes(3000)}[how]


def test_200_damaged_files_are_counted_and_none_stops_the_run(tmp_path):
    rng = np.random.default_rng(0)
    os.makedirs(tmp_path / "good")
    write_film(tmp_path / "good/x.mp4", shades(20), g=5), write_film(tmp_path / "good/x.webm", shades(20), "libvpx-vp9")
    imageio.imwrite(tmp_path / "good/x.gif", shades(20), duration=100, loop=0)
    os.makedirs(tmp_path / "bad")
    hows, made = ("truncated", "flipped", "zeros", "header", "empty", "text", "noise"), {}
    for i in range(170):
        end, how = ("mp4", "webm", "gif")[i % 3], hows[i % 7]
        wrong = ("mp4", "webm", "gif")[(i + 1) % 3] if i % 20 == 19 else end    # another format under this name
        file = tmp_path / f"bad/{i:03d}-{how}.{end}"
        file.write_bytes(damage(rng, (tmp_path / f"good/x.{wrong}").read_bytes(), how))
        np.save(file.with_suffix(".npy"), np.arange(19.0)[:, None])
        made[str(file)] = how
    for i in range(30):                     # a good video, and damaged actions
        shutil.copy(tmp_path / "good/x.mp4", tmp_path / f"bad/z{i:02d}.mp4")
        np.savez(tmp_path / "good/y.npz", actions=np.arange(19.0)[:, None])
        (tmp_path / f"bad/z{i:02d}.npz").write_bytes(damage(rng, (tmp_path / "good/y.npz").read_bytes(), hows[i % 7]))
        made[str(tmp_path / f"bad/z{i:02d}.mp4")] = hows[i % 7]
    for i in range(3):
        write_film(tmp_path / f"bad/zz{i}.mp4", shades(20))
        np.save(tmp_path / f"bad/zz{i}.npy", np.arange(19.0)[:, None])
    began = time.time()
    source = Episodes(str(tmp_path / "bad"), 8, 4, split="all")
    used = {e.file for e in source.episodes}
    assert time.time() - began < 60 and set(made) - used == set(source.skipped) and len(used) + len(source.skipped) == 203
    assert not [f for f in used if made.get(f) in ("empty", "text", "noise")] and len(source.skipped) > 120
    for e in source.episodes:               # what is used has all its frames, and its own actions; flipped pixels of a GIF nobody can tell
        for start in (0, 8, e.n - 4):
            try:
                frames, actions = source.clip(e, start)
            except Exception as error:
                assert "decode" in str(error)
                continue
            assert frames.shape == (4, 8, 8, 3) and actions[:, 0].tolist() == [start, start + 1, start + 2]
            if e.file.endswith("mp4") or made.get(e.file) == "truncated":
                assert np.abs(frames.mean((1, 2, 3)) / 6 - np.arange(start, start + 4)).max() < 1.5
    assert source[range(50)]["video"].shape[0] == 50


def test_14_damaged_hdf5_files_are_counted_and_none_stops_the_run(tmp_path):
    rng, hows = np.random.default_rng(0), ("truncated", "flipped", "zeros", "header", "empty", "text", "noise")
    robomimic(tmp_path / "good.hdf5", 1, 20)
    os.makedirs(tmp_path / "h5")
    for i in range(14):
        (tmp_path / f"h5/{i:02d}.hdf5").write_bytes(damage(rng, (tmp_path / "good.hdf5").read_bytes(), hows[i % 7]))
    shutil.copy(tmp_path / "good.hdf5", tmp_path / "h5/zz.hdf5")
    source = Episodes(str(tmp_path / "h5"), 8, 4, split="all", options={"camera": "agentview_image"})
    assert len(source.skipped) + len(source.episodes) == 15 and len(source.skipped) >= 10


def test_memory_stays_flat_over_drawn_clips(films, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MEMORY", 0)                                      # keep nothing
    robomimic(tmp_path / "a.hdf5")
    mixture = clips(f"{films} {tmp_path}/a.hdf5@camera=agentview_image", 16, 4)
    before = 0
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20
    for i in range(0, 600, 20):
        mixture[range(i, i + 20)]
        before = resident() if i == 200 else before if i > 200 else None
    assert resident() - before < 15         # MB over 400 clips; 10,000 were measured by hand, see the README


def test_peek_and_stats_show_what_training_will_see(films, tmp_path):
    done = run("data.py", "--data", f"mine:{films}:0.5", "cross:0.5", "--frames", 4, "--stats", "--peek", "p.gif", cwd=tmp_path)
    line = next(text for text in done.stdout.splitlines() if text.startswith("mine")).split()
    assert line[1:3] == ["video", "3"] and "48x96" in line and "skips 1 of 4" in done.stderr
    assert imageio.imread(tmp_path / "p.gif").shape == (4, 3 * 156, 4 * 132, 3)
    assert "no such file" in complaint(run("data.py", "--data", "/no/such", cwd=tmp_path, ok=False), "data.py")


def test_random_crop_is_one_window_a_clip():
    x = video(4, 3, 16)[:, :, :1].expand(-1, -1, 3, -1, -1)
    y = random_crop(x, 0.6, Draw(0))
    assert y.shape == x.shape and torch.equal(y[:, :, 0], y[:, :, 2]) and not torch.allclose(x, y)
    assert random_crop(x, 1.0, None) is x


# measures -------------------------------------------------------------------------------------------------------------


def test_psnr_known_answers():
    x = torch.zeros(2, 3, 4, 8, 8)
    assert torch.allclose(psnr(x, x + 0.2), torch.full((2,), 20.0), atol=1e-4)  # 10 log10(4 / 0.04)
    assert torch.equal(psnr(x, x), torch.full((2,), 60.0))


def test_cka_and_collapse_known_answers():
    x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6) and cka(x, torch.randn(2000, 5)) < 0.05 and cka(x, torch.ones(2000, 3)) == 0
    codes = torch.tensor([[0, 1]] * 96 + [[1, 0]] * 4)          # two codes in use, yet no information
    assert collapsed(codes) and not collapsed(codes[40:])


def test_alignment_of_a_world_that_ignores_actions():
    world, data = small_world(), ToyClips("cross", 8, 4)
    world.cfg.window = 3
    world.lam.vq.fit(world.lam.infer(data[range(32)]["video"].permute(0, 4, 1, 2, 3) / 127.5 - 1).flatten(0, 2))
    good = align(world, data[range(32)], data[range(32)])
    assert 0 < good["cka"] <= 1 and good["sensitivity"] > 0 and good["latent_var"] > 0 and -0.5 < good["nmi"] <= 1
    world.dit.action.mlp[2].weight.data.zero_()
    assert align(world, data[range(32)])["sensitivity"] == 0


def test_adapter_learns_codes_from_real_actions():
    torch.manual_seed(0)
    adapter = Adapter(3, LAMConfig(num_codes=8, tokens=2))
    actions, optimizer = torch.rand(64, 5, 3), torch.optim.Adam(adapter.parameters(), 1e-2)
    codes = (actions[..., :2] * 8).long()                                       # (b, t-1, k)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(adapter(actions).flatten(0, 2), codes.flatten())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert adapter(actions).shape == (64, 5, 2, 8) and (adapter(actions).argmax(-1) == codes).float().mean() > 0.9


def test_psnr_and_ssim_are_scikit_images():
    # by scikit-image 0.26: mean over frames of peak_signal_noise_ratio(data_range=2) and structural_similarity(data_range=2, channel_axis=0,
    # gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    g = np.random.default_rng(0)
    a = g.uniform(-1, 1, (2, 3, 4, 20, 24))
    b = np.clip(a + g.normal(0, 0.3, a.shape), -1, 1)
    yy, xx = np.mgrid[:32, :40] / 10
    smooth = lambda k: np.array([[[np.sin(xx * (c + 1) + yy + t * k + i) for t in range(3)] for c in range(3)] for i in range(2)])
    for a, b, want_psnr, want_ssim in ((a, b, [17.311943, 17.190056], [0.6146350, 0.6199761]),
                                       (smooth(0.3), smooth(0.35) * 0.9, [27.812996, 27.800467], [0.9411236, 0.9422779])):
        a, b = torch.tensor(a), torch.tensor(b)
        assert torch.allclose(psnr(a, b), torch.tensor(want_psnr), atol=1e-4) and torch.allclose(ssim(a, b), torch.tensor(want_ssim), atol=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(2))
    with pytest.raises(ValueError, match="window of 11x11"):
        ssim(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8))


def test_frechet_distance_known_answers():
    g = torch.Generator().manual_seed(0)
    def sample_of(mean, std, n=500):                            # features with exactly these moments
        x = torch.randn(n, 3, generator=g, dtype=torch.double)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double))[0]
        return x * torch.tensor(std) @ turn + torch.tensor(mean)
    a, b = sample_of([0.0, 1, 2], [1.0, 2, 3]), sample_of([1.0, 1, 0], [2.0, 2, 1], 300)
    assert frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-9)          # squared differences of means and, axes shared, of deviations
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a[:3], b[:3]) > 0            # fewer clips than features


def test_paired_t_known_answers():
    assert paired_t([1, 2, 3], [0, 0, 0]) == pytest.approx((3.464102, 0.074180), abs=1e-4)      # by scipy.stats.ttest_rel
    assert paired_t([5, 7, 9, 11, 10], [4, 8, 6, 9, 9]) == pytest.approx((1.809068, 0.144704), abs=1e-5)
    assert paired_t([1, 2], [0, 1]) == (None, None)


def test_nmi_known_answers():
    e = torch.randint(0, 5, (4000,), generator=torch.Generator().manual_seed(0))
    assert nmi(3 * e + 1, e) == pytest.approx(1, abs=0.01)
    assert nmi(torch.randint(0, 64, (4000,)), e) == pytest.approx(0, abs=0.02)
    assert nmi((e > 0).long(), e) == pytest.approx(0.31, abs=0.02)              # moved or not: H(1/5) / log 5


def test_probe_known_answers():
    a = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    good = probe(a @ torch.tensor([[1.0, 2], [0, 1]]), a, a[:500] @ torch.tensor([[1.0, 2], [0, 1]]), a[:500])
    assert good["r2"] > 0.999 and good["l1"] < 0.02
    noise = torch.randn(3000, 4)
    bad = probe(noise, a, torch.randn(500, 4), a[:500])
    assert abs(bad["r2"]) < 0.05 and bad["l1"] == pytest.approx(bad["l1_constant"], abs=0.03)


def test_controllability_of_a_world_that_ignores_actions_is_zero():
    world = small_world()
    world.dit.action.forward = lambda a: torch.zeros(len(a), a.shape[1] + 1, 6, 16)
    out, _, shown = predict(world, ToyClips("robots", 8, 4), 8, steps=2)
    assert torch.equal(out["inferred"]["psnr"], out["shuffled"]["psnr"]) and torch.equal(out["inferred"]["psnr"], out["null"]["psnr"])
    assert out["inferred"]["psnr"].shape == (8,) and len(shown) == 3


# the command line -----------------------------------------------------------------------------------------------------


def result(folder, name):
    rows = [json.loads(line) for line in open(os.path.join(folder, "out", name, "metrics.jsonl"))]
    return rows, rows[-1]


def test_joint_training_from_nothing(tmp_path):
    done = run("train.py", "--name", "a", "--pretrain", 4, "--warmup", 4, "--e2e", 4, "--eval_every", 6, *SMALL, cwd=tmp_path)
    rows, last = result(tmp_path, "a")
    assert [r["phase"] for r in rows if r["event"] == "train"] == ["pretrain"] * 2 + ["warmup"] * 2 + ["e2e"] * 2
    assert last["event"] == "result" and "result: " in done.stdout + done.stderr
    for key in ("utilization", "entropy", "max_usage", "psnr", "psnr_shuffled", "psnr_null", "psnr_copy", "probe_r2", "probe_l1", "nmi"):
        assert isinstance(last[key], float), key
    assert json.load(open(tmp_path / "out/a/config.json"))["warmup"] == 4
    assert imageio.imread(tmp_path / "out/a/samples/000012.gif").shape[0] == 8
    # the run's world is what was saved
    world = load_world(str(tmp_path / "out/a"))
    assert world.rollout(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 2, world.lam.cfg.code_dim)).shape == (1, 3, 4, 16, 16)
    # its generator starts another run, which moves the first one aside
    run("train.py", "--name", "a", "--dit_weights", "out/a", "--warmup", 0, "--e2e", 2, *SMALL, cwd=tmp_path)
    assert (tmp_path / "out/a.1/ckpt.pt").exists() and result(tmp_path, "a")[0][0]["phase"] == "e2e"


def groups(lam, dit):
    """What trains together: {group: tensors}. Running moments are the LAM's too."""
    parts = {"lam": [v for k, v in lam.items() if not k.startswith("fdm.")], "fdm": [v for k, v in lam.items() if k.startswith("fdm.")],
             "action": [v for k, v in dit.items() if k.startswith("action.")], "body": [v for k, v in dit.items() if not k.startswith("action.")]}
    return {k: v for k, v in parts.items() if v}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs to start from."""
    folder = tmp_path_factory.mktemp("trained")
    run("train.py", "--name", "joint", "--pretrain", 2, "--warmup", 2, "--e2e", 2, *SMALL, cwd=folder)
    run("train.py", "--name", "two", "--mode", "two-stage", "--pretrain", 2, "--lam_steps", 2, "--wm_steps", 0, *SMALL, cwd=folder)
    return folder


# the README's table of arms: what each phase trains, and that the rest stays bit-equal
ARMS = {
    "joint": ([], {"pretrain": "body", "warmup": "lam action", "e2e": "lam action body"}),
    "two-stage": (["--mode", "two-stage"], {"pretrain": "body", "lam": "lam fdm", "wm": "action body"}),
    "naive": (["--warmup", "0"], {"pretrain": "body", "e2e": "lam action body"}),
    "naive, trained IDM": (["--warmup", "0", "--init_lam", "out/two"], {"pretrain": "body", "e2e": "lam action body"}),
    "both random": (["--warmup", "0", "--pretrain", "0"], {"e2e": "lam action body"}),
    "pure warm-up": (["--e2e", "0"], {"pretrain": "body", "warmup": "lam action"}),
    "frozen LAM": (["--freeze_lam"], {"pretrain": "body", "warmup": "lam action", "e2e": "action body"}),
    "branch": (["--init", "out/joint", "--warmup", "0"], {"e2e": "lam action body"}),
    "second stage on a joint LAM": (["--mode", "two-stage", "--init_lam", "out/joint", "--lam_steps", "0"], {"pretrain": "body", "wm": "action body"}),
    "adapt": (["--mode", "adapt", "--init", "out/joint", "--data", "held-out"], {"adapter": "", "adapt": "action body"}),
    "pre-training": (["--mode", "pretrain", "--dit_weights", "out/joint"], {"pretrain": "body"}),
}


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize("arm", ARMS)
def test_each_phase_trains_its_groups_and_leaves_the_rest_bit_equal(arm, trained, monkeypatch):
    args, want = ARMS[arm]
    monkeypatch.chdir(trained)
    steps = [a for k in ("pretrain", "warmup", "e2e", "lam_steps", "wm_steps", "adapter_steps", "adapt_steps") if f"--{k}" not in args for a in (f"--{k}", "3")]
    args = ["--name", "x", *args, *steps, *SMALL, "--keep", "9", "--ckpt_every", "100", "--standardize", "1"]
    world = build(parse(args))
    before = groups(world.lam.state_dict(), world.dit.state_dict())
    run("train.py", *args, cwd=trained)
    for i, (phase, trains) in enumerate(want.items()):
        last = i == len(want) - 1
        state = load_checkpoint("out/x/ckpt.pt" if last else f"out/x/ckpt-{3 * i + 3:08d}.pt")
        after = groups(state["lam"], state["dit"])
        assert state["phase"] == phase and after.keys() == before.keys()
        for name in after:
            same = [torch.equal(a, b) for a, b in zip(after[name], before[name])]
            assert (sum(same) < len(same) / 2) if name in trains.split() else all(same), (phase, name)
        before = after
    if arm == "adapt":                                          # the adapter trains in its phase, and stays in the next
        torch.manual_seed(0)
        fresh = Adapter(2, world.lam.cfg).state_dict()
        adapter, last = load_checkpoint("out/x/ckpt-00000003.pt")["adapter"], state["adapter"]
        assert all(torch.equal(adapter[k], last[k]) and not torch.equal(adapter[k], fresh[k]) for k in fresh)


def test_modes_start_from_the_same_weights():
    a, b = (build(parse(["--mode", mode])) for mode in ("joint", "two-stage"))
    for part in ("lam", "dit"):
        mine, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items()) and all(k.startswith("fdm.") for k in theirs.keys() - mine.keys())


def near(folder, a, b, args, tolerance=0.02):
    """Two runs have moved to the same weights, up to a small share of the way from where they started."""
    a, b = (load_checkpoint(str(folder / "out" / name)) for name in (a, b))
    world = build(parse([str(x) for x in args]))
    for part in ("lam", "dit"):
        for k, first in getattr(world, part).state_dict().items():
            assert (a[part][k] - b[part][k]).norm() <= tolerance * (a[part][k] - first).norm() + 1e-6, k


@pytest.mark.parametrize("args", [["--mode", "two-stage", "--pretrain", 0, "--lam_steps", 20, "--wm_steps", 20],
                                  ["--pretrain", 2, "--warmup", 20, "--e2e", 20, "--vq_start", 0.3]])
def test_two_processes_of_4_clips_equal_one_of_8(args, tmp_path):
    """In LAM, WM and both joint phases; codebook, k-means and running moments included."""
    args = [*SMALL, "--batch", 8, "--standardize", 1, "--lr", "3e-4", "--frames", 4, *args]
    run("train.py", "--name", "one", *args, cwd=tmp_path)
    run("train.py", "--name", "two", *args, cwd=tmp_path, processes=2)
    near(tmp_path, "one", "two", args)


def test_parts_of_a_batch_equal_the_whole(tmp_path):
    args = [*SMALL, "--batch", 8, "--standardize", 0, "--lr", "3e-4", "--frames", 4, "--pretrain", 2, "--warmup", 5, "--e2e", 5]
    run("train.py", "--name", "one", *args, cwd=tmp_path)
    run("train.py", "--name", "parts", *args, "--accumulate", 4, cwd=tmp_path)
    near(tmp_path, "one", "parts", args)


@pytest.mark.parametrize("args, words", [
    (["--data", "/no/such/path"], "no such file"),
    (["--data", "NOTVIDEO"], "no train clip of 2 frames: "),
    (["--data", "SHORT", "--frames", "8"], "no train clip of 8 frames"),
    (["--data", "EMPTY"], "HDF5 or LeRobot data in this folder"),
    (["--no_such_flag", "1"], "unrecognized arguments"),
    (["--preset", "huge"], "choose from tiny"),
    (["--mode", "magic"], "choose from joint"),
    (["--size", "18"], "multiple"),
    (["--warmup", "-1"], "at least 0"),
    (["--batch", "many"], "not a number"),
    (["--pretrain", "0", "--warmup", "0", "--e2e", "0"], "nothing to train"),
    (["--mode", "adapt"], "needs --init"),
    (["--mode", "two-stage", "--lam_steps", "0"], "needs --init_lam"),
    (["--resume", "nowhere"], "not the folder of a run"),
    (["--heads", "3"], "must be a multiple of 4 and of 2 x --heads"),
    (["--time_shift", "0"], "auto, none, or a number above 0"),
    (["--lam_patch", "0"], "at least 1"),
    (["--mode", "adapt", "--init", "RUN"], "no checkpoint at"),
    (["--batch", "16", "--accumulate", "3"], "multiple of processes x --accumulate"),
    (["--vq_start", "1"], "below 1"),
    (["--dit_weights", "/no/such/run"], "no checkpoint"),
    (["--vae_weights", "/no/such/vae"], "no such file"),
    (["--vae_weights", VAE, "--size", "32", "--frames", "16"], "this VAE needs 5, 9,"),
    (["--latent_cache", "latents"], "needs --vae_weights"),
    (["--preset", "opensora"], "no such file"),
])
def test_bad_input_gets_one_line(args, words, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"this is no video")
    (tmp_path / "empty").mkdir()
    imageio.imwrite(tmp_path / "short.gif", np.zeros((3, 32, 32, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None] * 80)
    names = {"NOTVIDEO": tmp_path / "bad.mp4", "SHORT": tmp_path / "short.gif", "EMPTY": tmp_path / "empty"}
    done = run("train.py", *[names.get(a, a) for a in args], cwd=tmp_path, ok=False)
    assert words in complaint(done) and not (tmp_path / "out").exists()


def test_bidirectional_pretraining_leaves_a_causal_generator(tmp_path):
    for name, causal in (("a", 1), ("b", 0)):
        run("train.py", "--name", name, "--pretrain", 3, "--warmup", causal, "--e2e", 0, "--causal", causal, *SMALL, "--depth", 2, cwd=tmp_path)
    body = lambda path: {k: v for k, v in load_checkpoint(str(path))["dit"].items() if not k.startswith("action.")}
    a, b = body(tmp_path / "out/a"), body(tmp_path / "out/b")                   # warm-up keeps the body
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert all(block.attn.causal for block in load_world(str(tmp_path / "out/b")).dit.temporal_blocks)


def test_ctrl_c_keeps_the_last_checkpoint(tmp_path):
    process = start("train.py", "--name", "a", "--pretrain", "100000", "--ckpt_every", "5", *SMALL, cwd=tmp_path)
    kept = tmp_path / "out/a/ckpt.pt"
    until(kept.exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in err and f"{os.path.join('out', 'a')}/ckpt.pt" in err.splitlines()[-1]
    load_world(str(kept))


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
    done = subprocess.run([sys.executable, "-c", code, "--name", "a", "--pretrain", "9", "--ckpt_every", "5", *SMALL], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": HERE}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "the last checkpoint, of step 5, is out/a/ckpt.pt" in complaint(done)
    load_world(str(tmp_path / "out/a"))


def test_a_log_has_no_progress_bar_but_tells_the_speed(tmp_path):
    done = run("train.py", "--name", "a", "--mode", "pretrain", "--pretrain", 4, *SMALL, cwd=tmp_path)
    assert "\r" not in done.stdout + done.stderr and not done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("train: "))
    assert all(word in line for word in (" step=2 ", " steps_per_second=", " minutes_left="))


def test_the_command_that_the_project_is_for(tmp_path):
    """`torchrun train.py --mode joint --warmup 8000` of the README, with tiny budgets."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", os.path.join(HERE, "train.py"), "--mode", "joint", "--warmup", "4"]
    done = subprocess.run([*torchrun, "--pretrain", "2", "--e2e", "2", *SMALL], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "result: " in done.stdout, done.stdout + done.stderr
    assert result(tmp_path, "toy")[1]["step"] == 8


# stops of all kinds ---------------------------------------------------------------------------------------------------

LONG = ["--pretrain", "40", "--warmup", "40", "--e2e", "80", "--ckpt_every", "3", *SMALL, "--vq_start", "0.4", "--log_every", "20", "--standardize", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    run("train.py", "--name", "1", *LONG, cwd=folder)
    run("train.py", "--name", "2", *LONG, cwd=folder, processes=2)
    return folder


def equal(a, b):
    a, b = (load_checkpoint(str(path)) for path in (a, b))
    assert a["step"] == b["step"] and all(torch.equal(v, b[part][k]) for part in ("lam", "dit") for k, v in a[part].items())
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert all(same(v, b["optimizer"]["state"][i][k]) for i, moments in a["optimizer"]["state"].items() for k, v in moments.items())


def newest_step(out):
    try:
        return max(json.loads(line)["step"] for line in open(out / "metrics.jsonl"))
    except (OSError, ValueError):
        return -1


@pytest.mark.xdist_group("whole")
@pytest.mark.parametrize("processes, kills", [(1, 10), (2, 1)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(processes, kills, whole, tmp_path):
    chance, out = random.Random(0), tmp_path / "out/k"
    for kill in range(kills + 1):
        known = (out / "ckpt.pt").stat().st_mtime_ns if (out / "ckpt.pt").exists() else 0
        process = start("train.py", *(["--resume", "out/k"] if known else ["--name", "k", *LONG]), cwd=tmp_path, processes=processes)
        if kill == kills:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
            break
        until(lambda: (out / "ckpt.pt").exists() and (out / "ckpt.pt").stat().st_mtime_ns != known, process)
        time.sleep(chance.random() * 0.15)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    equal(out, whole / "out" / str(processes))
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    steps = [r["step"] for r in rows if r["event"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 160 and rows[-1]["event"] == "result"


@pytest.mark.xdist_group("whole")
def test_a_dead_rank_is_restarted_by_torchrun(whole, tmp_path):
    process = start("train.py", "--name", "k", *LONG, cwd=tmp_path, processes=2, restarts=1)
    until((tmp_path / "out/k/ckpt.pt").exists, process)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(open(f"/proc/{pid}/stat").read().split()[3]) == process.pid and b"\0RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "goes on at step" in out, out + err
    equal(tmp_path / "out/k", whole / "out/2")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    short = ["--name", "k", "--mode", "pretrain", "--pretrain", 30, *SMALL]
    process = start("train.py", *short, "--ckpt_every", 1000, cwd=tmp_path)
    until(lambda: newest_step(tmp_path / "out/k") >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run("train.py", "--resume", "out/k", cwd=tmp_path)
    shutil.move(tmp_path / "out/k", tmp_path / "out/resumed")
    run("train.py", *short, cwd=tmp_path)
    equal(tmp_path / "out/k", tmp_path / "out/resumed")
    assert [r["step"] for r in result(tmp_path, "k")[0]] == [r["step"] for r in result(tmp_path, "resumed")[0]]


@pytest.mark.xdist_group("whole")
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_writes_a_last_checkpoint(processes, whole, tmp_path):
    process = start("train.py", "--name", "k", *LONG, "--ckpt_every", 1000, cwd=tmp_path, processes=processes)
    until(lambda: newest_step(tmp_path / "out/k") >= 20, process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    step = load_checkpoint(str(tmp_path / "out/k"))["step"]
    assert process.returncode != 0 and f"ended by SIGTERM at step {step}" in err and step >= 20
    run("train.py", "--resume", "out/k", cwd=tmp_path, processes=processes)
    equal(tmp_path / "out/k", whole / "out" / str(processes))


@pytest.mark.xdist_group("whole")
@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, whole, tmp_path):
    shutil.copytree(whole / "out/1", tmp_path / "out/k")
    newest = tmp_path / "out/k/ckpt.pt"
    assert sorted(f.name for f in newest.parent.glob("ckpt*")) == ["ckpt-00000159.pt", "ckpt.pt"]
    if harm == "gone":
        newest.unlink()
    else:
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content[:len(content) // 2] if harm == "truncated" else content)
    done = run("train.py", "--resume", "out/k", cwd=tmp_path)
    assert "goes on at step 159" in done.stdout and (harm == "gone" or "ckpt.pt: not a whole checkpoint" in done.stderr)
    equal(newest, whole / "out/1")


@pytest.mark.xdist_group("whole")
def test_a_run_is_resumed_with_its_own_settings(whole, tmp_path):
    shutil.copytree(whole / "out/1", tmp_path / "out/k")
    done = run("train.py", "--resume", "out/k", "--batch", 8, cwd=tmp_path, ok=False)
    assert "--batch 8: a run is resumed with its own settings, here 4" in complaint(done)


def test_loader_workers_leave_signals_to_their_parent():
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    batches = torch.utils.data.DataLoader(ToyClips("cross", 8, 2), batch_size=None, sampler=[[i] for i in range(40)], num_workers=2,
                                          worker_init_fn=loader(ToyClips("cross", 8, 2), 1, 0, 1).worker_init_fn, prefetch_factor=1)
    for i, _ in enumerate(batches):
        if i == 2:
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
    assert i == 39


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = run("train.py", "--name", "k", "--pretrain", 50, "--lr", "1e30", "--lr_warmup", 0, "--ckpt_every", 1, *SMALL, cwd=tmp_path, ok=False)
    line = done.stderr.splitlines()[-1]
    step = load_checkpoint(str(tmp_path / "out/k"))["step"]
    assert f"not finite at step {step}; the last checkpoint, of step {step}, is out/k/ckpt.pt" in line and "Traceback" not in done.stderr
    assert all(v.isfinite().all() for v in load_checkpoint(str(tmp_path / "out/k"))["dit"].values())


def test_a_collapsed_codebook_raises_the_alarm_once_and_the_run_goes_on(tmp_path):
    run("train.py", "--name", "k", "--pretrain", 0, "--warmup", 0, "--e2e", 8, *SMALL, "--standardize", 0, "--latent_scale", 0.01, cwd=tmp_path)
    rows, last = result(tmp_path, "k")
    assert [r["message"] for r in rows if r["event"] == "alarm"] == ["the codebook has collapsed: nearly all transitions have the same codes"]
    assert last["event"] == "result"


def test_real_video_trains_and_says_what_it_cannot_measure(films, tmp_path):
    run("train.py", "--name", "v", "--data", films, "--frames", 4, "--eval_frames", 4, "--pretrain", 2, "--warmup", 2, "--e2e", 2, *SMALL, cwd=tmp_path)
    last = result(tmp_path, "v")[1]
    assert last["nmi"] is None and last["probe_r2"] is None and last["psnr"] > 0


def test_paper_preset_is_counted_without_being_built(tmp_path):
    done = run("train.py", "--preset", "opensora", "--dry_run", cwd=tmp_path)
    for words in ("action 73.37 M", "body 904.07 M", "warmup: 8000 steps on videos, trains action + lam", "e2e: 52000 steps", "GB a process",
                  "batch 128", "--vae_weights OpenSora-VAE-v1.2: not there yet"):
        assert words in done.stdout, words
    assert "no such file" in complaint(run("train.py", "--preset", "opensora", "--dry_run", "--vae_weights", "gone", cwd=tmp_path, ok=False))


def test_open_sora_weights_train_from_the_command_line(tmp_path):
    args = ["--dit_weights", STDIT, "--vae_weights", VAE, "--frames", 5, "--eval_frames", 9, "--action_depth", 1, "--lam_width", 16, "--lam_depth", 1,
            "--batch", 2, "--vq_start", 0, "--sampling_steps", 2, "--warmup", 2, "--e2e", 2, "--time_shift", "auto", "--eval_clips", 4, "--eval_transitions", 64]
    run("train.py", "--name", "a", *args, "--latent_cache", "latents", cwd=tmp_path)
    run("train.py", "--name", "b", *args, "--activation_checkpointing", cwd=tmp_path)
    assert len(os.listdir(tmp_path / "latents")) == 8 and json.load(open(tmp_path / "out/a/config.json"))["hidden"] == 48
    a, b = (load_world(str(tmp_path / "out" / name)) for name in "ab")
    for k, v in a.state_dict().items():                         # neither changes what is computed
        assert torch.allclose(v, b.state_dict()[k], atol=1e-4), k
    assert a.rollout(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 8, 2, 16)).shape == (1, 3, 9, 16, 16)


# evaluation -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with an FDM, evaluated whole, which adapts it first."""
    folder = tmp_path_factory.mktemp("judged")
    run("train.py", "--name", "r", "--mode", "two-stage", "--pretrain", 2, "--lam_steps", 2, "--wm_steps", 2, "--adapter_steps", 2, "--adapt_steps", 2,
        *SMALL, cwd=folder)
    done = run("evaluate.py", "--ckpt", "out/r", "--clips", 66, "--transitions", 64, "--seeds", 0, 1, cwd=folder)
    return folder, done


@pytest.mark.xdist_group("judged")
def test_evaluation_writes_every_table_and_picture(judged):
    folder, done = judged
    results = json.load(open(folder / "out/r/results.json"))
    tables = results["tables"]
    assert set(tables["probe"]) == set(toy.EMBODIMENTS) and set(tables["probe"]["cross"]) == {"l1", "l1_constant", "l1_shuffled", "r2", "nmi"}
    for variant in ("inferred", "shuffled", "null", "copy", "whole", "fdm"):
        row = tables["predict"][f"held-out {variant}"]
        assert len(row["psnr"]) == 2 and row["rfvd"][0] >= 0 and -100 <= row["ssim"][0] <= 100
    assert set(tables["adapt"]["adapted"]) >= {"psnr", "code_accuracy"} and set(tables["codebook"]) >= {"training", "inferred, held-out", "adapter, held-out"}
    assert set(results["not_computed"]) >= {"lpips", "fvd"} and "lpips: not computed; frames of 16 pixels" in done.stdout
    assert imageio.imread(folder / "out/r/samples/transfer.gif").shape[0] == 8 and (folder / "out/r/samples/predict-held-out.gif").exists()
    assert (folder / "out/r-held-out/ckpt.pt").exists()


@pytest.mark.xdist_group("judged")
def test_evaluation_on_two_ranks_equals_one(judged):
    folder, _ = judged
    tables = lambda: json.load(open(folder / "out/r/results.json"))["tables"]["predict"]
    args = ["--ckpt", "out/r", "--task", "predict", "--data", "cross", "--clips", 66, "--seeds", 0]
    run("evaluate.py", *args, cwd=folder)
    one = tables()
    run("evaluate.py", *args, cwd=folder, processes=2)
    for variant, row in tables().items():
        assert all(v == pytest.approx(one[variant][k], rel=1e-4, abs=1e-5) for k, v in row.items()), variant


def test_results_measured_alike_stay_and_others_go(tmp_path):
    read = lambda: json.load(open(tmp_path / "results.json"))["tables"]
    evaluate.save_results(str(tmp_path), "r", 5, {"plan": {"reach": {"success": [1.0]}}, "probe": {"x": {}}}, {"seeds": (0,), "steps": 6})
    evaluate.save_results(str(tmp_path), "r", 5, {"plan": {"push": {"success": [0.5]}}}, {"seeds": [0], "steps": 6})
    assert set(read()["plan"]) == {"reach", "push"} and set(read()) == {"plan", "probe"}
    evaluate.save_results(str(tmp_path), "r", 5, {"plan": {"push": {"success": [0.1]}}}, {"seeds": [0], "steps": 9})       # another protocol
    assert read()["plan"] == {"push": {"success": [0.1]}} and "probe" in read()
    evaluate.save_results(str(tmp_path), "r", 6, {"probe": {}}, {})                                                         # a later step
    assert set(read()) == {"probe"}


def test_an_adaptation_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate.subprocess, "run", lambda command, **_: calls.append(command[2:]) or subprocess.CompletedProcess([], 0))
    (tmp_path / "r").mkdir()
    args, target = evaluate.parse(["--ckpt", str(tmp_path / "r"), "--adapt_data", "held-out"]), tmp_path / "r-held-out"
    assert evaluate.adapted(args, {"seed": 3, "batch": 64}) == str(target)
    assert "--mode=adapt" in calls[0] and "--seed=3" in calls[0] and not any(flag.startswith(("--batch", "--resume")) for flag in calls[0])
    target.mkdir()
    (target / "ckpt.pt").touch(), (target / "metrics.jsonl").write_text('{"event": "train"}\n')
    evaluate.adapted(args, {})
    assert calls[1] == [f"--resume={target}"]
    (target / "metrics.jsonl").write_text('{"event": "result"}\n')
    evaluate.adapted(args, {})
    assert len(calls) == 2


def test_lpips_and_fvd_are_what_their_networks_say(monkeypatch, tmp_path):
    class Lpips(torch.nn.Module):                               # the package's interface: frames (n, 3, h, w) -> (n, 1, 1, 1)
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    class Detector(torch.nn.Module):                            # StyleGAN-V's I3D's interface
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            assert x.shape[3] == 224 and x.shape[4] == 224 and not rescale and not resize and return_features
            return x.mean((3, 4)).flatten(1)[:, ::5]
    monkeypatch.setitem(sys.modules, "lpips", type(sys)("lpips"))
    sys.modules["lpips"].LPIPS = Lpips
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    args = evaluate.parse(["--ckpt", "x", "--i3d", str(tmp_path / "i3d.pt")])
    measures, features, why = evaluate.optional(args, 32, 12, "cpu")
    a, b = video(3, 12, 32), video(3, 12, 32, seed=1)
    assert not why and torch.allclose(measures["lpips"](a, b), 100 * (a - b).abs().mean((1, 2, 3, 4)), atol=1e-4)
    assert features["fvd"](a).shape == (3, 8) and set(evaluate.optional(args, 32, 8, "cpu")[2]) == {"fvd"}
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="cannot be read as TorchScript"):
        evaluate.optional(evaluate.parse(["--ckpt", "x", "--i3d", str(tmp_path / "bad.pt")]), 32, 12, "cpu")


@pytest.mark.xdist_group("judged")
def test_comparison_of_two_runs(judged, tmp_path):
    for name, shift in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        rows = {"inferred": {"psnr": [20.0 + i * (i + shift) for i in range(3)]}}
        (tmp_path / name / "results.json").write_text(json.dumps({"tables": {"predict": rows}}))
    done = run("evaluate.py", "--compare", "a", "b", cwd=tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("predict inferred psnr"))
    assert "21.667 +- 2.082" in line and "-1.000 +- 1.000" in line and "-1.732" in line and "3.000" in line
    assert "a-1" in complaint(run("evaluate.py", "--compare", "a,a-1", "b", cwd=tmp_path, ok=False), "evaluate.py")


@pytest.mark.xdist_group("judged")
@pytest.mark.parametrize("args, words", [
    (["--ckpt", "nowhere"], "no checkpoint at"), ([], "which run?"), (["--ckpt", "out/r", "--clips", "1"], "too few"),
    (["--ckpt", "out/r", "--task", "adapt", "--adapt_data", "toy"], "has no actions"),
    (["--ckpt", "out/r-held-out", "--task", "adapt", "--adapt_data", "cross"], "takes 2"),
    (["--ckpt", "out/r", "--task", "predict", "--i3d", "out/r/config.json", "--data", "cross"], "at least 11 frames"),
    (["--ckpt", "out/r", "--task", "probe", "--data", "/no/such/video"], "no such file"),
])
def test_bad_evaluations_get_one_line(args, words, judged):
    folder, _ = judged
    done = run("evaluate.py", *args, *(["--clips", 66, "--seeds", 0] if "--clips" not in args else []), cwd=folder, ok="11 frames" in words)
    assert words in (done.stdout if "11 frames" in words else complaint(done, "evaluate.py"))


# planning -------------------------------------------------------------------------------------------------------------


def test_cem_and_mppi_find_the_optimum_of_known_functions():
    target = torch.tensor([[0.5, -0.3], [0.9, 1.4], [-0.2, 0.0]])              # 1.4 lies beyond the bound
    score = lambda x: -(x - target).square().sum((1, 2))
    search = dict(mean=torch.zeros(3, 2), std=torch.ones(2), beta=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plan.cem(score, samples=300, iterations=12, **search), target.clamp(-1, 1), atol=0.03)
    mean = torch.zeros(3, 2)
    for _ in range(8):                                                          # warm starts
        mean = plan.mppi(score, mean, torch.tensor([0.2, 0.2]), samples=2000, iterations=4, gamma=50.0, beta=0.0, generator=search["generator"])
    assert torch.allclose(mean, target.clamp(-1, 1), atol=0.05)
    # two hills, of which the start is nearer to the lower
    hills = lambda x: torch.exp(-8 * (x - 0.8).square().sum((1, 2))) + 0.5 * torch.exp(-8 * (x + 0.2).square().sum((1, 2)))
    assert torch.allclose(plan.cem(hills, torch.zeros(1, 2), torch.ones(2), 500, 8, beta=0.0), torch.full((1, 2), 0.8), atol=0.1)
    # gamma of 0 weighs all alike; a high one takes the best
    g = lambda: torch.Generator().manual_seed(1)
    x = plan.proposals(torch.zeros(3, 2), torch.ones(2), 50, generator=g())
    assert torch.allclose(plan.mppi(score, torch.zeros(3, 2), torch.ones(2), 50, gamma=0.0, generator=g()), x.mean(0), atol=1e-6)
    assert torch.allclose(plan.mppi(score, torch.zeros(3, 2), torch.ones(2), 50, gamma=1e5, generator=g()), x[score(x).argmax()], atol=1e-5)


def test_proposals_are_correlated_and_bounded_and_plans_shift():
    x = plan.proposals(torch.zeros(3, 1), torch.tensor([0.1]), 200000, 0.5, generator=torch.Generator().manual_seed(0))[..., 0]
    assert torch.allclose(x.std(0), torch.tensor([0.1, 0.1 * 0.5 ** 0.5, 0.1 * 0.375 ** 0.5]), rtol=0.01)      # n_t = n_(t-1)/2 + std e/2
    assert abs(torch.corrcoef(x.T)[0, 1] - 0.5 ** 0.5) < 0.01
    assert plan.proposals(torch.ones(2, 2), torch.ones(2), 100, low=-0.5, high=0.7).max() == 0.7
    assert plan.shift(torch.arange(4.0)[:, None], 2)[:, 0].tolist() == [2, 3, 3, 3]


def test_reward_is_the_formula_of_vp2():
    video, goal = torch.full((2, 3, 4, 64, 64), -1.0), torch.full((3, 64, 64), -1.0)
    video[1] = 1.0                                                              # white against black: an error of 1 everywhere
    assert plan.reward(video, goal).tolist() == [0.0, -0.5 * 3 * 4 * 64 * 64]
    classifier = plan.Classifier().eval()
    assert {"net.0.weight", "net.1.cnv.0.weight", "net.5.cnv.2.bias", "net.7.weight", "net.9.weight", "net.11.bias"} <= set(classifier.state_dict())
    with torch.no_grad():
        logits = classifier(torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)]))
        got = plan.reward(video, goal, classifier)
    assert torch.allclose(got, torch.tensor([0.0, -24576.0]) + 40 * logits, atol=1e-2)


def test_wilson_interval():
    assert np.allclose(plan.wilson(0.5, 10), (0.2366, 0.7634), atol=1e-4) and np.allclose(plan.wilson(0, 30), (0, 0.1135), atol=1e-4)


@pytest.mark.parametrize("stride, context", [(1, 2), (4, 6)])
def test_dreams_of_candidates_are_rollouts_of_their_latent_actions(stride, context):
    """Equal candidates are dreamed once, the horizon is rounded up to whole latent frames, and only it is returned."""
    world = small_world() if stride == 1 else strided_world()
    world.adapter = Adapter(3, world.lam.cfg)
    size = 8 if stride == 1 else 32
    frames = np.random.default_rng(0).integers(0, 255, (7, size, size, 3), np.uint8)
    past, actions = torch.randn(6, 3), torch.randn(5, 3, 3)
    actions[3] = actions[1]
    got = plan.dream(world, frames, past, actions, 7, 24, context, 2, 1.0)
    assert got.shape == (5, 3, 3, size, size) and torch.equal(got[3], got[1]) and not torch.equal(got[0], got[1])
    seen = 2 if stride == 1 else 5                                              # 6 frames are not whole latent ones
    for i in (0, 4):
        whole = torch.cat([past[7 - seen:], actions[i], *([actions[i, -1:]] if stride == 4 else [])])[None]
        want = world.rollout(torch.from_numpy(frames[None, -seen:]).permute(0, 4, 1, 2, 3) / 127.5 - 1, world.latent_actions(whole), 2, 1.0,
                             torch.tensor([24.0]), Draw(7))
        assert torch.allclose(got[i], want[0, :, seen:seen + 3], atol=1e-4)


def test_toy_tasks_are_easy_for_the_oracle_and_hard_for_chance(tmp_path):
    run("plan.py", "--oracle", "--random", "--seeds", 0, "--out", "p", cwd=tmp_path)
    table = json.load(open(tmp_path / "p/results.json"))["tables"]["plan"]
    for task in toy.TASKS:
        assert table[f"{task} oracle"]["success"][0] >= 0.9 and table[f"{task} random"]["success"][0] <= 0.1
        assert table[f"{task} random"]["high"][0] < table[f"{task} oracle"]["low"][0]
    assert imageio.imread(tmp_path / "p/samples/plan/push-oracle-0-29.gif").shape[1:] == (18 * 8, 3 * 18 * 8, 3)       # saw | dreamed | goal


@pytest.mark.xdist_group("judged")
@pytest.mark.parametrize("planner", ("cem", "mppi"))
def test_planning_with_a_world_from_the_command_line(planner, judged):
    folder, _ = judged
    done = run("plan.py", "--ckpt", "out/r-held-out", "--task", "reach", "--pairs", 2, "--seeds", 0, 1, "--samples", 6, "--planner", planner, cwd=folder)
    results = json.load(open(folder / "out/r-held-out/results.json"))
    row = results["tables"]["plan"]["reach world"]
    assert len(row["success"]) == 2 and row["low"][0] <= np.mean(row["success"]) <= row["high"][0] and row["pairs"] == [2] and row["seconds a plan"][0] > 0
    assert "reach world" in done.stdout and "cost pixels" in done.stdout and results["protocol"]["plan"]["planner"] == planner
    assert len(imageio.imread(folder / "out/r-held-out/samples/plan/reach-world-1-01.gif")) <= 7        # the start and 6 steps


@pytest.mark.xdist_group("judged")
@pytest.mark.parametrize("args, words", [
    ([], "which run?"), (["--oracle", "--task", "fly"], "toy has reach, push"), (["--ckpt", "out/r"], "has no adapter"),
    (["--ckpt", "out/r-held-out", "--env", "robodesk"], "not to robodesk"), (["--ckpt", "nowhere"], "no checkpoint"),
    (["--random", "--env", "robodesk", "--task", "push_red", "--goals", "nowhere"], "no goal of the task push_red"),
    (["--oracle", "--replan", "9"], "only --horizon 5"), (["--oracle", "--classifier", "x"], "it knows one task"),
    (["--oracle", "--task", "reach", "--classifier", "out/r/config.json"], "sees 64 x 64 pixels"),
    (["--random", "--env", "robodesk", "--task", "push_red", "--classifier", "out/r/config.json"], "not VP2's classifier"), (["--oracle", "--samples", "0"], "at least 1"),
])
def test_bad_plans_get_one_line(args, words, judged, monkeypatch, capsys):
    if args in ([], ["--ckpt", "nowhere"]):
        assert words in complaint(run("plan.py", *args, cwd=judged[0], ok=False), "plan.py")
        return
    monkeypatch.chdir(judged[0])
    with pytest.raises((SystemExit, ValueError, desk.DeskError)) as error:      # what the others raise is printed alike
        plan.main(args)
    assert words in str(error.value) + capsys.readouterr().err


def test_robodesk_states_are_whole_and_success_is_its_own(tmp_path):
    needs("robodesk")
    world = desk.Desk(2)
    states = world.reset(3)
    picture = world.render()
    actions = np.array([[0.5, 0.2, -1, 0, 1], [-1, 0.0, -1, 0, -1]])
    after = world.step(actions)
    assert not np.array_equal(world.render()[0], picture[0]) and not np.array_equal(after[0], after[1])
    world.set_state(states)
    assert np.array_equal(world.render(), picture)                              # the same state gives the same frame
    assert np.array_equal(world.step(actions), after)                           # and the same future
    # a desk that goes on does what one that is put there does
    alone = desk.Desk(1)
    alone.set_state(states[:1])
    assert np.allclose(alone.step(actions[:1])[0], after[0], atol=1e-9)
    onward = alone.step(actions[:1])                                            # it moves by now: velocities count
    alone.set_state(after[:1])
    assert np.allclose(alone.step(actions[:1]), onward, atol=1e-6)
    for task in desk.TASKS:
        assert np.abs(next(world.script(task))).max() <= 1 and not world.success(task).any()
        assert bool(world.env.reward_functions[task]("success")) == world.success(task)[1]
    state = world.reset(0)
    state[1, 18] = -0.25                                                        # the drawer of one desk, pulled out
    world.set_state(state)
    assert world.success("open_drawer").tolist() == [False, True]


def test_robodesk_episodes_are_recorded_once_and_serve_as_goals(tmp_path):
    needs("robodesk")
    desk.collect(str(tmp_path / "a"), 2, steps=2)
    made = {f: os.path.getmtime(f) for f in map(str, (tmp_path / "a").iterdir())}
    assert len(made) == 4
    desk.collect(str(tmp_path / "a"), 2, steps=2)
    assert made == {f: os.path.getmtime(f) for f in map(str, (tmp_path / "a").iterdir())}
    video = next(f for f in made if f.endswith(".mp4"))
    with np.load(video[:-4] + ".npz") as labels:
        assert labels["actions"].shape == (2, 5) and labels["states"].shape == (3, 73)
        world = desk.Desk()
        world.set_state(labels["states"][1:2])
        world.step(labels["actions"][1:])
        assert np.allclose(world.get_state()[0], labels["states"][2], atol=1e-9)
        assert np.abs(imageio.imread(video, plugin="pyav")[2].astype(int) - world.render()[0]).max() <= 3      # colour conversion
    desk.make_goals("open_drawer", str(tmp_path / "goals"), 1)
    (state, image), = desk.goals("open_drawer", str(tmp_path / "goals"), 30)
    assert state.shape == (73,) and image.shape == (64, 64, 3)
    import h5py
    with h5py.File(tmp_path / "goals.hdf5", "w") as f:                          # as VP2's: states have the hand's place at their end
        for i in (2, 10):
            f[f"data/demo_{i}/states"] = np.full((4, 76), i)
            f[f"data/demo_{i}/obs/camera_image"] = np.full((4, 64, 64, 3), i, np.uint8)
    found = desk.goals("push_red", str(tmp_path / "goals.hdf5"), 30)
    assert [s[0] for s, _ in found] == [2, 10] and found[1][0].shape == (73,) and (found[1][1] == 10).all()


def test_robodesk_that_cannot_be_used_says_why(monkeypatch):
    needs("robodesk")
    world = desk.Desk()
    from dm_control import mujoco
    monkeypatch.setattr(mujoco.Camera, "render", lambda self: np.zeros((120, 120, 3), np.uint8))
    with pytest.raises(desk.DeskError, match="all-black"):
        world.render()
    monkeypatch.setattr(mujoco.Camera, "render", lambda self: 1 / 0)
    with pytest.raises(desk.DeskError, match="cannot render with MUJOCO_GL="):
        world.render()
    monkeypatch.setattr(desk.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(desk.DeskError, match="pip install robodesk==1.0.0"):
        desk.Desk()


# the paper's figures and tables ---------------------------------------------------------------------------------------


def test_a_table_is_made_by_the_commands_it_prints_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capfd):
    needs("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(reproduce.KILO, "tiny", 1)
    monkeypatch.setitem(reproduce.VARIANTS, "main", shlex.join(["--pretrain", "2", *SMALL, "--log_every", "30"]))
    monkeypatch.setitem(reproduce.RUNS, "joint", "--dit_weights pretrained@ --warmup 8K --e2e 24K")
    monkeypatch.setitem(reproduce.RUNS, "two-stage", "--dit_weights pretrained@ --mode two-stage --lam_steps 30K --wm_steps 2K")
    monkeypatch.setitem(reproduce.MEASURES, "probe", "evaluate.py --task probe --transitions 70 --seeds SEED")
    reproduce.main(["table1", "--seeds", "3"])
    made = json.load(open("out/reproduce/table1-seed3.json"))
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python ")]
    assert printed == made["commands"] and len(printed) == 5
    assert [line.split()[1] for line in printed] == ["train.py"] * 3 + ["evaluate.py"] * 2 and all("--seed" in line for line in printed)
    assert "--init" not in printed[0] and "--warmup 8 --e2e 24" in printed[2] and "joint/ckpt-00000030.pt" in printed[4]
    table = open("out/reproduce/table1-seed3.md").read()
    one = made["rows"]["held-out: LAM30K"]["l1"][0]
    assert f"| held-out: LAM30K | {one:.4g} |" in table and "*held-out: WARM8K+E2E22K minus held-out: LAM30K*" in table
    # what is there is not made again; what was stopped goes on; what other flags made is made anew
    folder = tmp_path / "out/reproduce/tiny-main/3"
    log = folder / "joint/metrics.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-1]))
    before = (folder / "two-stage/metrics.jsonl").stat().st_mtime_ns
    monkeypatch.setitem(reproduce.MEASURES, "probe", "evaluate.py --task probe --transitions 71 --seeds SEED")
    reproduce.main(["table1", "--seeds", "3"])
    assert re.findall("^goes on by: .* ([^ ]+)$", capfd.readouterr().out, re.M) == ["out/reproduce/tiny-main/3/joint"]
    assert all("--transitions 71" in (folder / run / "probe-30K.txt").read_text() for run in ("joint", "two-stage"))
    assert (folder / "two-stage/metrics.jsonl").stat().st_mtime_ns == before and log.read_text().splitlines(keepends=True)[-1] == whole[-1]
    os.remove(folder / "joint/ckpt-00000030.pt")
    with pytest.raises(SystemExit, match="ckpt-00000030.pt is gone"):      # the run's last one, of step 32, does not stand in
        reproduce.main(["table1", "--seeds", "3"])
    monkeypatch.setitem(reproduce.RUNS, "joint", "--dit_weights nowhere --warmup 8K --e2e 24K")
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    for _ in range(2):                          # the second time too: what other flags made does not stand in
        with pytest.raises(SystemExit, match="this failed.*nowhere"):
            reproduce.main(["table1", "--seeds", "3"])


def test_every_target_draws_what_the_runs_logged(tmp_path, monkeypatch, capsys):
    needs("matplotlib")
    monkeypatch.chdir(tmp_path)
    lab, keys = reproduce.Lab("tiny", "main", []), [*reproduce.CODEBOOK, *reproduce.ALIGN, "psnr", "controllability", "loss"]
    trained = []

    def train(self, run, seed):
        """Two phases of logs: a number is seed + step / 10,000"""
        trained.append((run, seed))
        os.makedirs(lab.folder(run, seed), exist_ok=True)
        rows = [{"event": "align", "phase": "warmup", "step": 0} | dict.fromkeys(keys, 7), {"event": "align", "phase": "wm", "step": 750, "nmi": 0.9}]
        rows += [{"event": e, "phase": "lam" if step <= 750 else "wm", "step": step} | dict.fromkeys(keys, seed + step / 10000) for step in range(50, 1501, 50)
                 for e in ("train", "eval", "result")]
        with open(os.path.join(lab.folder(run, seed), "metrics.jsonl"), "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)

    def measure(self, task, ckpt, seed):
        cells = dict.fromkeys(("l1", "l1_constant", "r2", "nmi", "psnr", "ssim", "rfvd", "controllability", *reproduce.CODEBOOK, "success"), [seed + len(ckpt)])
        names = [f"{r}{v}" for r in reproduce.ROBOTS for v in ("", " inferred", " fdm", " copy")]
        names += ["training", "inferred, held-out", "adapter, held-out", "inferred", "adapted", "copy"]
        names += [f"{goal} {agent}" for goal in ("reach", "push") for agent in ("world", *("random", "oracle") * (task == "plan-bounds"))]
        if task == "transfer":
            (tmp_path / "a.gif").write_bytes(b"GIF")
            return "a.gif"
        return {n: cells for n in names}
    monkeypatch.setattr(reproduce.Lab, "train", train)
    monkeypatch.setattr(reproduce.Lab, "measure", measure)
    reproduce.main(["all", "--seeds", "0", "1", "2"])
    reproduce.main(["causes", "--seeds", "0", "1", "2"])
    files = set(os.listdir("out/reproduce"))
    pictures = {"fig2.png", "fig3.png", "fig4a.png", "fig4b.png", "fig5.png", "fig6.gif", "warmup.png"}
    assert pictures | {"causes.png"} | {f"{t}{end}" for t in reproduce.TARGETS for end in (".json", ".md")} - {"fig6.md"} <= files
    read = lambda t: json.load(open(f"out/reproduce/{t}.json"))["rows"]
    assert read("fig2")["pre IDM + pre WM"]["max_usage"] == [0.075, 1.075, 2.075]                # at 30K = 750 steps
    assert read("fig2")["two-stage LAM"] == dict.fromkeys(("utilization", "max_usage", "entropy"), [0.075, 1.075, 2.075]) | {"nmi": [0.9] * 3}
    assert read("table2")["tank: WARM8K+E2E30K"]["psnr"] == [9, 10, 11] and read("table4")["naive 38K"]["average"] == [14, 15, 16]
    assert read("table4")["random actions, one seed"]["reach"] == read("table4")["true simulator, one seed"]["push"] == [18] and read("table3")["first frame held still"]["psnr"] == [18, 19, 20]
    assert read("warmup")["before"]["cka"] == [7] * 3 and read("warmup")["no warm-up (naive), after 8K"]["cka"] == [0.02, 1.02, 2.02]
    assert read("causes")["naive, as it is"] == read("causes")["warm-up, as it is"] and read("causes")["naive, as it is"]["pre-trained loss"] == [0.15, 1.15, 2.15]
    assert {run for run, _ in trained} == set(reproduce.RUNS)
    assert "| *WARM8K+E2E30K minus naive 38K* | 0 ± 0 |" in open("out/reproduce/table4.md").read()
    a, b = [1.0, 2.0, 4.0], [0.5, 1.0, 2.0]
    assert f"1.167 ± 0.76 (p {paired_t(a, b)[1]:.2g})" in reproduce.markdown({"A": {"x": a}, "B": {"x": b}}, [("A", "B")])


def test_the_readme_quotes_the_code_and_names_what_is_there():
    readme = open(os.path.join(HERE, "README.md")).read()
    quotes = re.findall(r"```python\n# (\w+\.py), .*\n([^`]+)```", readme)
    for file, text in quotes:
        lines = [line.strip() for line in open(os.path.join(HERE, file))]
        assert all(any(quoted.strip() in line for line in lines) for quoted in text.splitlines()), (file, text)
    assert len(quotes) >= 4
    assert set(re.findall(r"\]\((assets/[^)]+)\)", readme)) <= {os.path.relpath(p, HERE) for p in glob.glob(HERE + "/assets/**", recursive=True)}
    assert {f for f in re.findall(r"^\| `(\w+\.py)`", readme, re.M)} == {os.path.basename(f) for f in glob.glob(HERE + "/*.py")}


def test_bad_targets_get_one_line(tmp_path):
    for flags, word in ((["fig9"], "fig9"), (["fig2", "--variant", "odd"], "odd"), (["fig2", "--seeds", "x"], "x"), (["fig2", "--kilo", "0"], "--kilo 0")):
        assert word in complaint(run("reproduce.py", *flags, cwd=tmp_path, ok=False), "reproduce.py")
    assert not os.path.exists(tmp_path / "out")
    slow = reproduce.Lab("tiny", "light-vq", [], 50)
    assert slow.folder("naive", 0).endswith("tiny-light-vq-kilo50/0/naive") and slow.words("--warmup 8K", 0) == ["--warmup", "400"]


# speed ----------------------------------------------------------------------------------------------------------------


def test_bench_measures_what_it_says(tmp_path):
    done = run("bench.py", "--set", "hidden=16", "depth=1", "heads=2", "action_depth=1", "lam_width=16", "lam_depth=1", "--batch", 2, "--json", "b.json", cwd=tmp_path)
    numbers = json.load(open(tmp_path / "b.json"))
    assert {"train_share_of_matmul", "rollout_cached_speedup", "frame16_over_frame2", "plan_shared_speedup", "decode_seek_speedup", "peak_memory_gb",
            "device"} <= set(numbers)
    assert 0 < numbers["train_share_of_matmul"] < 1.2 and numbers["decode_seek_speedup"] > 2 and numbers["plan_shared_speedup"] > 5
    assert 0.05 < numbers["peak_memory_gb"] < 8 and "one by one" in done.stdout
    assert "choose from" in complaint(run("bench.py", "--preset", "huge", cwd=tmp_path, ok=False), "bench.py")
