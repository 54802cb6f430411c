"""Files of video, HDF5 and LeRobot data: what is in one, some of its frames, actions beside it; their index.

A video is decoded whole only once, when the index of its folder is made; afterwards a clip is read from the
key frame before it. Nothing is guessed: what does not hold together is an error that says what is wrong.
"""

import contextlib
import fcntl
import glob
import hashlib
import importlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)      # what is wrong with a file is said once, by us

VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")
HDF5_ENDINGS = (".hdf5", ".h5")
UNKNOWN_FPS = 24.0                          # frames a second, where a file does not say
VERSION = 4                                 # of the index; one of another version is made anew
TOLD = set()                                # what was told about: sources, indices
WRITE_EVERY = 20                            # seconds of work on an index that may be lost


class UserError(Exception):
    """A user's mistake: one line that says what is wrong, where, and what would be right."""


def first_line(error):
    """What an exception says, on one line; its name, if it says nothing"""
    return (str(error) or type(error).__name__).splitlines()[0]


def speaks():
    """Whether this process may print a user's mistake: one a node does, where torchrun starts several."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def whole(path):
    """Write a file whole or not at all: yields `path`.part to write to, which becomes `path` in the end."""
    part = path + ".part"
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:          # Ctrl-C too leaves nothing half-written
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = path           # a full disk's has none
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def optional(package):
    """Import a package that not everybody needs. Raises UserError, with its `pip install`."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"needs pip install {package.split('.')[0]}") from None


def tell(about, line):
    """Say once what a run goes on without."""
    if about not in TOLD and speaks():
        print(line, file=sys.stderr)
    TOLD.add(about)


def inspect_video(file):
    """Decode a whole video, for the index. Raises UserError where that shows a fault; PyAV raises more.

    Returns a dict: `n` frames, their times `pts` and `regular` (see `frame_times`), `base` (seconds in a unit
    of time), `fps`, `hw` (pixels), `dims` of the actions beside it (0: there are none), `look`.
    """
    if is_cut(file):
        raise UserError("its end is missing")
    pts = []
    with av.open(os.path.abspath(file)) as container:
        if not container.streams.video:
            raise UserError("no video stream")
        stream = container.streams.best("video")
        h, w = stream.height, stream.width
        if not 0 < h * w <= 2 ** 26:
            raise UserError(f"frames of {w}x{h} pixels")
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise UserError(f"frame {len(pts)} is damaged")
            if frame.pts is None:
                raise UserError("its frames have no times")
            pts.append(frame.pts)
        base = float(stream.time_base)
    n, side, steps = len(pts), side_file(file), np.diff(pts)
    if not pts:
        raise UserError("no frame in it")
    if (steps <= 0).any():
        raise UserError("the times of its frames do not increase")
    rows, dims = read_side(side).shape if side else (n, 0)
    if rows not in (n - 1, n):
        raise UserError(f"{rows} actions beside {n} frames")
    fps = 1 / (np.mean(steps) * base) if n > 1 else UNKNOWN_FPS
    regular = n > 1 and bool((steps == steps[0]).all())
    return {"n": n, "fps": round(fps, 4), "pts": [pts[0], int(steps[0])] if regular else pts,
            "regular": regular, "base": base, "hw": [h, w], "dims": dims,
            "look": read_look(file)}


def is_cut(file):
    """Whether a file is shorter than it says: a cut MP4 does not decode, but others do, to a shorter film."""
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        head = f.read(4096)
        f.seek(max(0, size - 1))
        if head.startswith(b"GIF"):
            return f.read() != b";"
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little") > size
    at = head.find(b"\x18\x53\x80\x67") + 4                 # Matroska: the length of its segment
    width = 9 - int.from_bytes(head[at:at + 1], "big").bit_length()
    unknown = 2 ** (7 * width) - 1
    length = int.from_bytes(head[at:at + width], "big") & unknown
    return at >= 4 and length != unknown and at + width + length > size


def frame_times(info):
    """Times (n,) of a file's frames, in its own unit; the index has first and step of regular ones."""
    if not info["regular"]:
        return np.asarray(info["pts"])
    first, step = info["pts"]
    return first + step * np.arange(info["n"])


def read_video(file, info, wanted, fit=np.asarray):
    """Some frames of a video, in a list. Raises UserError where it is not what it was when it was indexed.

    Args:
        wanted: (t,) numbers of frames, none smaller than the one before it.
        fit: what each frame, uint8 (h, w, 3), goes through as soon as it is decoded: large ones are not kept.
    """
    pts = frame_times(info)[wanted].tolist()
    # from the key frame before them; from the start where that fails, and in a GIF, which builds up
    seekable = wanted[0] > 0 and not file.lower().endswith(".gif")
    for seek in (True, False) if seekable else (False,):
        found = decode(file, pts, seek, fit)
        if len(found) == len(set(pts)):
            return [found[p] for p in pts]
    raise UserError(f"{file}: does not decode as it did when it was indexed")


def decode(file, pts, seek, fit):
    """{time: what `fit` makes of the frame}, of those of the times `pts` that are found"""
    missing, found = set(pts), {}
    with av.open(os.path.abspath(file)) as container:
        stream = container.streams.best("video")
        if seek:
            container.seek(pts[0], stream=stream)
        try:
            for frame in container.decode(stream):
                if frame.pts in missing and not frame.is_corrupt:
                    turns = round(frame.rotation / 90) % 4      # a phone that was held upright
                    found[frame.pts] = fit(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                if frame.pts is None or frame.pts >= pts[-1]:
                    break
        except av.FFmpegError:
            if not seek:                    # else the caller tries again from the start
                raise
    return found


def inspect_hdf5(file):
    """{demos: {name: {cameras: {key: as for a video}, actions: shape or None}}, splits: {name: demos}}"""
    with optional("h5py").File(file) as f:
        fps = UNKNOWN_FPS
        with contextlib.suppress(Exception):                    # many writers, many forms
            given = float(json.loads(f["data"].attrs["env_args"])["env_kwargs"]["control_freq"])
            fps = given if 0 < given < float("inf") else fps
        names = sorted(f["data"], key=lambda name: (len(name), name))       # demo_2 before demo_10
        demos = {name: inspect_demo(f["data"][name], fps) for name in names}
        splits = {k: [name.decode() for name in v[()]] for k, v in f.get("mask", {}).items()}
    return {"demos": demos, "splits": splits}


def inspect_demo(demo, fps):
    """Cameras are what has uint8 images (n, h, w, 3) under `obs`."""
    cameras = {}
    for key, images in demo["obs"].items():
        # a group has no dtype
        if getattr(images, "dtype", None) == np.uint8 and images.shape[3:] == (3,) and len(images):
            for i in (0, len(images) - 1):
                images[i]                                   # h5py raises where it cannot be read
            cameras[key] = {"n": len(images), "fps": fps, "pts": [0, 1], "regular": True, "base": 1 / fps,
                            "hw": images.shape[1:3]}
    return {"cameras": cameras, "actions": demo["actions"].shape if "actions" in demo else None}


def side_file(video):
    """The file of actions beside a video, or None"""
    stem = os.path.splitext(video)[0]
    return next((stem + end for end in (".npz", ".npy", ".json") if os.path.exists(stem + end)), None)


def read_side(file):
    """Actions (n, a) float32 of a .npz or .json (under `actions`) or a .npy. Raises UserError for others."""
    if file.endswith(".json"):
        with open(file) as f:
            found = json.load(f)
    else:
        found = np.load(file)
    if not isinstance(found, (list, np.ndarray)):
        found = found.get("actions", ())
    actions = np.asarray(found, np.float32)
    if actions.ndim != 2 or not np.isfinite(actions).all():
        raise UserError(f"{os.path.basename(file)}: actions are not (n, a) finite numbers")
    return actions


def read_look(video):
    """The look in which a simulator's film is drawn, as the file beside it says; "" of other films"""
    side = side_file(video)
    if not (side or "").endswith(".npz"):
        return ""
    with np.load(side) as found:
        # RoboDesk's episodes, of which the first ones do not say it
        return str(found["look"]) if "look" in found else "published" if "states" in found else ""


def same_look(looks):
    """The look that all have which have one. UserError: a simulator's frames do not all look alike.

    looks: {who, for the message: the look, "" of what no simulator has drawn}
    """
    having = {who: look for who, look in looks.items() if look}
    if len(set(having.values())) > 1:
        told = ", ".join(f"{who} has {look}" for who, look in having.items())
        raise UserError(f"two looks of a simulator's frames: {told}; take one")
    return next(iter(having.values()), "")


class Row(NamedTuple):
    """An episode, as LeRobot's metadata list it."""
    episode: int
    n: int                                  # its frames
    at: float                               # seconds into its video
    table: str                              # the Parquet file of its actions
    video: str


class LeRobot:
    """The metadata of a LeRobot data set. Version 2 has a video an episode; in version 3 a video has many.

    Broken metadata raise whatever json, pyarrow and dict do; UserError: another version, or no such split.
    """

    def __init__(self, root):
        self.root = root
        with open(os.path.join(root, "meta", "info.json")) as f:
            self.info = json.load(f)
        version = self.info["codebase_version"]
        self.old, self.fps = version.startswith("v2"), float(self.info["fps"])
        if not self.fps > 0:
            raise ValueError("fps is not above 0")
        if not self.old and not version.startswith("v3"):
            raise UserError(f"--data {root}: LeRobot {version}; v2.x and v3.0 can be read")
        features = self.info["features"]
        self.cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        self.dims = int(np.prod(features.get("action", {"shape": [0]})["shape"]))

    def rows(self, camera, split=None):
        """A Row an episode, by number: all, or those of a split, which info.json gives as FIRST:END"""
        rows = sorted(self.row(camera, found) for found in self.listed(camera))
        if not split:
            return rows
        splits = self.info["splits"]
        if split not in splits:
            raise UserError(f"--data {self.root}: @split={split}: there are {', '.join(splits)}")
        first, end = map(int, splits[split].split(":"))
        return [row for row in rows if first <= row.episode < end]

    def listed(self, camera):
        """What the metadata say of each episode, dicts; in version 3 with the numbers of its files"""
        meta = os.path.join(self.root, "meta")
        if self.old:
            with open(os.path.join(meta, "episodes.jsonl")) as f:
                return list(map(json.loads, f))
        columns = [f"{part}/{k}_index" for part in ("data", f"videos/{camera}") for k in ("chunk", "file")]
        columns += [f"videos/{camera}/from_timestamp", "episode_index", "length"]
        files = glob.glob(f"{glob.escape(meta)}/episodes/**/*.parquet", recursive=True)
        return optional("pyarrow.parquet").read_table(files, columns=columns, use_threads=False).to_pylist()

    def row(self, camera, found):
        """A Row of one of those dicts. In version 2 the files follow from the episode's number."""
        e, files = found["episode_index"], []
        chunk = e // self.info.get("chunks_size", 1000)
        for pattern, part in (("data_path", "data"), ("video_path", f"videos/{camera}")):
            names = {k: found.get(f"{part}/{k}") for k in ("chunk_index", "file_index")}
            names |= dict(video_key=camera, episode_index=e, episode_chunk=chunk)
            files.append(os.path.join(self.root, self.info[pattern].format(**names)))
        return Row(e, int(found["length"]), found.get(f"videos/{camera}/from_timestamp", 0.0), *files)

    def locate(self, row, video):
        """The frame of an indexed video that an episode starts at. Raises UserError where they do not fit."""
        times = frame_times(video)
        seconds = (times - times[0]) * video["base"]            # (n,)
        first = int(np.abs(seconds - row.at).argmin())
        off = abs(seconds[first] - row.at) > 0.5 / self.fps
        if off or first + row.n > video["n"] or self.old and row.n != video["n"]:
            raise UserError(f"its {video['n']} frames are not those of episode {row.episode}")
        if video["n"] > 1 and abs(video["fps"] / self.fps - 1) > 0.1:
            raise UserError(f"has {video['fps']:g} frames a second, info.json says {self.fps:g}")
        if self.dims and not os.path.exists(row.table):
            raise UserError(f"{row.table} is missing")
        return first


def index(base, files, inspect, skipped):
    """{file: what `inspect` says of it}, kept in `base`, else in `out`; why it cannot goes into `skipped`.

    It is renewed for files whose size or time of change differs. Other processes wait for the one that does.
    """
    base = os.path.abspath(base)
    folder, name = base, f".cola-index-{inspect.__name__}.json"
    if not os.access(folder, os.W_OK):
        folder, name = "out", f"{name}-{hashlib.sha256(os.fsencode(base)).hexdigest()[:12]}"
    path = os.path.join(folder, name)
    keys = {file: os.path.relpath(file, base) for file in files}

    def look(file):
        try:
            return inspect(file)
        except Exception as error:          # whatever a reader raises on a bad file
            return {"error": first_line(error)}

    with contextlib.ExitStack() as lock:
        with contextlib.suppress(OSError):                  # where there are no locks nobody waits
            opened = os.open(base, os.O_RDONLY)
            lock.callback(os.close, opened)
            fcntl.flock(opened, fcntl.LOCK_EX)
        known = read_index(path)
        stamps = {file: stamp(file) for file in files}
        fresh = [file for file in files if known.get(keys[file], {}).get("stamp") != stamps[file]]
        title = f"index of {os.path.basename(base)}"
        hidden = True if len(fresh) < 20 else None              # None: unless on a terminal
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            infos, written = pool.map(look, fresh), time.monotonic()
            for file, info in zip(fresh, tqdm(infos, title, len(fresh), disable=hidden, leave=False)):
                known[keys[file]] = info | {"stamp": stamps[file]}
                if file == fresh[-1] or time.monotonic() > written + WRITE_EVERY:
                    write_index(path, known)
                    written = time.monotonic()
    found = {file: known[keys[file]] for file in files}
    skipped |= {file: info["error"] for file, info in found.items() if "error" in info}
    return {file: info for file, info in found.items() if "error" not in info}


def read_index(path):
    """The records of an index that are whole and of our version: the others can be made again"""
    try:
        with open(path) as f:
            return {key: info for key, (mark, info) in json.load(f).items() if mark == seal(info)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_index(path, known):
    """It saves time, nothing else: no run ends because it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with whole(path) as part, open(part, "w") as f:
            json.dump({key: (seal(info), info) for key, info in known.items()}, f)
    except (OSError, UserError) as error:
        tell(path, f"data: the index {path} cannot be written ({first_line(error)})")


def seal(info):
    """What tells a record of an index that is whole, and of this version of what `inspect_*` return"""
    return hashlib.sha256(json.dumps([VERSION, info], sort_keys=True).encode()).hexdigest()[:16]


def stamp(file):
    """Size and time of change of a file, and of the actions beside it"""
    there = [os.stat(f) for f in (file, side_file(file)) if f and os.path.exists(f)]
    return [[s.st_size, s.st_mtime_ns] for s in there]
