"""One file of video or HDF5: what is in it, a few of its frames, its actions; and the index of a folder of them."""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)      # what is wrong with a file is said once, by us


VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")


HDF5_ENDINGS = (".hdf5", ".h5")


class DataError(Exception):
    """A user's mistake about data, in one line."""


class MissingPackage(DataError):
    pass


def inspect_video(file):
    """Decode a video once: frame count `n`, `fps`, `pts` of its frames ([first, step] where regular), their unit `base`, `hw`,
    and the shape of the `actions` beside it"""
    pts = []
    with av.open(os.path.abspath(file)) as container:
        if not container.streams.video:
            raise DataError("no video stream")
        stream = container.streams.best("video")
        h, w = stream.height, stream.width
        if not 0 < h * w <= 2 ** 26:
            raise DataError(f"frames of {w}x{h} pixels")
        for frame in container.decode(stream):
            if frame.is_corrupt or frame.pts is None:
                raise DataError(f"frame {len(pts)} is damaged" if frame.is_corrupt else "its frames have no times")
            pts.append(frame.pts)
        base = float(stream.time_base)
    side = side_file(file)
    steps = np.diff(pts)
    if not pts or (steps <= 0).any():
        raise DataError("no frame in it" if not pts else "the times of its frames do not increase")
    fps = 1 / (np.mean(steps) * base) if len(pts) > 1 else 24.0
    regular = len(pts) > 1 and (steps == steps[0]).all()
    return {"n": len(pts), "fps": round(fps, 4), "pts": [pts[0], int(steps[0])] if regular else pts, "regular": bool(regular), "base": base, "hw": [h, w],
            "actions": list(read_side(side).shape) if side else None}


def frame_times(info):
    """pts (n,) of a video's frames"""
    return info["pts"][0] + info["pts"][1] * np.arange(info["n"]) if info["regular"] else np.asarray(info["pts"])


def read_video(file, info, wanted, seek=True, fit=np.asarray):
    """Some frames, given by increasing numbers, as RGB arrays that went through `fit`: seeks to the key frame before, or decodes from
    the start where that fails."""
    pts = frame_times(info)[wanted].tolist()
    missing = set(pts)
    seek &= wanted[0] > 0 and not file.lower().endswith(".gif")                 # a GIF's frames build on each other
    for seeks in [True, False] if seek else [False]:
        found = {}
        with av.open(os.path.abspath(file)) as container:
            stream = container.streams.best("video")
            if seeks:
                container.seek(pts[0], stream=stream)
            with contextlib.suppress(av.FFmpegError if seeks else ()):
                for frame in container.decode(stream):
                    if frame.pts in missing and not frame.is_corrupt:
                        found[frame.pts] = fit(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
                    if frame.pts is None or frame.pts >= pts[-1]:
                        break
        if len(found) == len(missing):
            return [found[p] for p in pts]
    raise DataError(f"{file}: does not decode as it did when it was indexed")


def inspect_hdf5(file):
    """The demonstrations in a robomimic file: {name: {cameras: {key: n}, actions: [rows, dims], hw, fps}}, and its own splits"""
    h5py = optional("h5py")
    with h5py.File(file) as f:
        demos, fps = {}, 24.0                   # where unknown
        with contextlib.suppress(Exception):    # many writers, many forms
            fps = float(json.loads(f["data"].attrs["env_args"])["env_kwargs"]["control_freq"])
        fps = fps if 0 < fps < float("inf") else 24.0
        for name in sorted(f["data"], key=lambda k: (len(k), k)):
            demo = f["data"][name]
            cameras = {k: v.shape for k, v in demo["obs"].items() if getattr(v, "ndim", 0) == 4 and v.dtype == np.uint8 and v.shape[-1] == 3 and len(v)}
            for key, shape in cameras.items():
                demo["obs"][key][0], demo["obs"][key][shape[0] - 1]             # can be read
            actions = demo["actions"].shape if "actions" in demo else None
            demos[name] = {"cameras": {k: s[0] for k, s in cameras.items()}, "hw": list(next(iter(cameras.values()), [0, 0, 0])[1:3]), "fps": fps,
                           "actions": list(actions) if actions else None}
        splits = {k: [n.decode() for n in v[()]] for k, v in f.get("mask", {}).items()}
    return {"demos": demos, "splits": splits}


def optional(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackage(f"needs pip install {package.split('.')[0]}") from None


def side_file(video):
    """The file of actions beside a video, or None"""
    stem = os.path.splitext(video)[0]
    return next((stem + end for end in (".npz", ".npy", ".json") if os.path.exists(stem + end)), None)


def read_side(file):
    """Actions (n, a) float32 of a .npz or .json (under `actions`) or a .npy"""
    if file.endswith(".json"):
        with open(file) as f:
            actions = json.load(f)
        actions = actions.get("actions", ()) if isinstance(actions, dict) else actions
    else:
        actions = np.load(file)
        actions = actions["actions"] if file.endswith(".npz") else actions
    actions = np.asarray(actions, np.float32)
    if actions.ndim != 2 or not np.isfinite(actions).all():
        raise DataError(f"{os.path.basename(file)}: actions are not (n, a) finite numbers")
    return actions


def files_in(path):
    """Files in a folder and its subfolders, links followed once; nothing hidden."""
    seen = {os.path.realpath(path)}
    for folder, inner, names in os.walk(path, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in inner if not name.startswith(".")}
        inner[:] = [name for name in sorted(real) if real[name] not in seen]
        seen |= set(real.values())
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def index(root, files, inspect):
    """{file: what `inspect` says, or {"error": why it cannot}}, kept beside the source (or in `out`, where that cannot be written)
    and renewed for files whose size or time of change differs; other processes wait for the one that makes it."""
    folder = base = os.path.abspath(root) if os.path.isdir(root) else os.path.dirname(os.path.abspath(root))
    name = f".cola-index-{inspect.__name__}.json"
    if not os.access(folder, os.W_OK):
        folder, name = "out", f"{name}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"
        os.makedirs(folder, exist_ok=True)
    path, lock = os.path.join(folder, name), os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with open(path) as f:
                known = {k: v for k, v in json.load(f).items() if "stamp" in v}
        except (OSError, ValueError, AttributeError, TypeError):
            known = {}

        def stamp(file):
            side = side_file(file)
            return [[s.st_size, s.st_mtime_ns] for s in map(os.stat, filter(os.path.exists, [file] + [side] * bool(side)))]

        def look(file):
            try:
                return inspect(file)
            except MissingPackage:
                raise
            except Exception as error:                          # whatever the reader raises on a bad file
                return {"error": (str(error).splitlines() or [type(error).__name__])[0]}

        keys = {file: os.path.relpath(file, base) for file in files}
        stamps = {file: stamp(file) for file in files}
        fresh = [file for file in files if known.get(keys[file], {}).get("stamp") != stamps[file]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bar = tqdm(pool.map(look, fresh), f"index of {os.path.basename(os.path.abspath(root))}", len(fresh), disable=True if len(fresh) < 20 else None, leave=False)
            for file, info in zip(fresh, bar):
                known[keys[file]] = info | {"stamp": stamps[file]}
        if fresh:
            with open(path + ".part", "w") as f:
                json.dump(known, f)
            os.replace(path + ".part", path)
    finally:
        os.close(lock)
    return {file: known[keys[file]] for file in files}
