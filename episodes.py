"""One source of files, a folder or a single file: its episodes, and clips from them.

Plain videos, HDF5 in robomimic's layout and LeRobot data all come down to a list of `Episode`. What cannot be
used is skipped and counted, with the reason; a file that goes bad later costs its clips, not the run.
"""

import hashlib
import os
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from formats import (HDF5_ENDINGS, VIDEO_ENDINGS, LeRobot, UserError, first_line, frame_times, index,
                     inspect_hdf5, inspect_video, optional, read_side, read_video, same_look, side_file, tell)

KEPT = {}                   # decoded episodes of small sources
MEMORY = 2 ** 31            # bytes for them; a source is small if it takes less than half of it


@dataclass
class Episode:
    name: str               # within its source, whichever the camera: its file, and what it is called in it
    file: str               # a video, or HDF5
    info: dict              # what the index says of the file: `n`, `fps`, `pts`, ...
    first: int              # where the episode starts in the file
    n: int                  # its frames
    dims: int = 0           # of an action; 0: it has none
    actions: tuple = None   # a file; and in it None, HDF5's data set of actions, or LeRobot's episode number
    key: str = None         # HDF5: the data set of frames
    low: int = 0            # only the frames low .. high-1 are used
    high: int = None        # None: to the end

    def times(self):
        """Seconds, of each frame that is used"""
        return frame_times(self.info)[self.first:self.first + self.n][self.low:self.high] * self.info["base"]

    def read_frames(self, wanted, fit):
        """Frames (t, ...), stacked, of increasing numbers (t,), each put through `fit`"""
        if not self.key:
            return np.stack(read_video(self.file, self.info, self.first + wanted, fit=fit))
        with optional("h5py").File(self.file) as f:
            return np.stack([fit(f[self.key][i]) for i in wanted])

    def read_actions(self):
        """(n or n-1, dims) float32: action t leads from frame t to t+1. UserError where they do not fit."""
        file, where = self.actions
        if where is None:
            actions = read_side(file)
        elif self.key:
            with optional("h5py").File(file) as f:
                actions = f[where][()].astype(np.float32)
        else:
            table = optional("pyarrow.parquet").read_table(
                file, columns=["action"], filters=[("episode_index", "=", where)], use_threads=False)
            actions = np.asarray(table["action"].to_pylist(), np.float32).reshape(len(table), -1)
        fits = len(actions) in (self.n - 1, self.n) and actions.shape[1:] == (self.dims,)
        if not fits or not np.isfinite(actions).all():
            raise UserError(f"{file}: actions {actions.shape} for {self.n} frames, or not all finite")
        return actions


def find_episodes(path, camera=None, split=None):
    """The kind of what lies at a path, list of Episode, {file or file:episode: why it is skipped}"""
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder")
    skipped = {}
    if os.path.isfile(os.path.join(path, "meta", "info.json")):
        return "LeRobot", list(lerobot_episodes(path, camera, split, skipped)), skipped
    files = sorted(files_in(path, skipped))
    hdf5 = [file for file in files if file.lower().endswith(HDF5_ENDINGS)]
    if hdf5:
        return "HDF5", list(hdf5_episodes(path, hdf5, camera, split, skipped)), skipped
    if split or camera:
        raise UserError(f"--data {path}: plain videos have no @split and no @camera")
    videos = [file for file in files if file.lower().endswith(VIDEO_ENDINGS) or file == path]
    if not videos:
        endings, why = " ".join(VIDEO_ENDINGS), "".join(f"; {name}: {why}" for name, why in skipped.items())
        raise UserError(f"--data {path}: no video ({endings}), HDF5 or LeRobot data in this folder{why}")
    return "video", list(video_episodes(path, videos, skipped)), skipped


def base_of(path):
    """The folder from which the files of a source are named"""
    return path if os.path.isdir(path) else os.path.dirname(path)


def files_in(path, skipped):
    """Files in a folder and its subfolders, each once, whatever links lead to it; nothing hidden.

    Links come last, so that a new one does not rename what was there. What cannot be listed goes into
    `skipped`: {folder or link: why}.
    """
    seen, places, links = set(), [path], []
    while places or links:
        place = places.pop() if places else links.pop()
        try:
            there = os.stat(place)
            names = os.listdir(place) if os.path.isdir(place) else None
        except OSError as error:
            skipped[place] = error.strerror
            continue
        if (there.st_dev, there.st_ino) in seen:
            continue
        seen.add((there.st_dev, there.st_ino))
        if names is None:
            yield place
            continue
        for inner in (os.path.join(place, name) for name in sorted(names, reverse=True) if name[0] != "."):
            (links if os.path.islink(inner) else places).append(inner)


def choose_camera(path, cameras, wanted):
    """The camera that is wanted, or the only one. UserError: there is no such camera, or a choice to make."""
    if wanted in cameras:
        return wanted
    if len(cameras) == 1 and not wanted:
        return next(iter(cameras))
    if not cameras:
        raise UserError(f"--data {path}: no camera in it that is stored as video; images are not read")
    raise UserError(f"--data {path}: which of its cameras? @camera={' or @camera='.join(cameras)}")


def video_episodes(path, files, skipped):
    """Each file an Episode, but those that go into `skipped`, with the reason"""
    base = base_of(path)
    for file, info in index(base, files, inspect_video, skipped).items():
        name, actions = os.path.relpath(file, base), (side_file(file), None)
        yield Episode(name, file, info, 0, info["n"], info["dims"], actions)


def hdf5_episodes(path, files, camera, split, skipped):
    """Each demonstration an Episode, but those that go, with the whole file or not, into `skipped`"""
    optional("h5py")        # where it is missing, no file is at fault
    base = base_of(path)
    for file, found in index(base, files, inspect_hdf5, skipped).items():
        if split and split not in found["splits"]:
            raise UserError(f"--data {path}: @split={split}: {file} has {list(found['splits'])}")
        for name, demo in found["demos"].items():
            if split and name not in found["splits"][split]:
                continue
            if not demo["cameras"]:
                skipped[f"{file}:{name}"] = "no uint8 images (n, h, w, 3) under obs"
                continue
            view = choose_camera(path, demo["cameras"], camera)
            info, shape = demo["cameras"][view], demo["actions"]
            n = info["n"]
            if shape and (len(shape) != 2 or shape[0] not in (n - 1, n)):
                skipped[f"{file}:{name}"] = f"actions of shape {tuple(shape)} beside {n} frames"
                continue
            actions, images = (file, f"data/{name}/actions"), f"data/{name}/obs/{view}"
            full = f"{os.path.relpath(file, base)}:{name}"
            yield Episode(full, file, info, 0, n, shape[1] if shape else 0, actions, images)


def lerobot_episodes(path, camera, split, skipped):
    """What the metadata list, each an Episode, but those that go into `skipped`"""
    optional("pyarrow.parquet")
    try:
        meta = LeRobot(path)
        rows = meta.rows(choose_camera(path, meta.cameras, camera), split)
    except UserError:
        raise
    except Exception as error:              # whatever broken metadata make the readers raise
        why = f"--data {path}: its LeRobot metadata cannot be read ({type(error).__name__}: {error})"
        raise UserError(why.splitlines()[0]) from None
    faults = {}
    videos = index(path, sorted({row.video for row in rows}), inspect_video, faults)
    for row in rows:
        try:
            first = meta.locate(row, videos[row.video])
        except (KeyError, UserError) as error:              # the video cannot be read, or does not fit
            skipped[f"{row.video}:{row.episode}"] = faults.get(row.video, str(error))
            continue
        name, actions, info = f"episode {row.episode}", (row.table, row.episode), videos[row.video]
        yield Episode(name, row.video, info | {"fps": meta.fps}, first, row.n, meta.dims, actions)


def part_of(episodes, split):
    """Held out are the episodes whose lot is below a tenth; at least one is, and at least one is trained on.

    An episode's lot comes from its name: neither other episodes nor their order, no seed and no place on the
    disk move it to the other part. Of a single episode the second half is held out.
    """
    if split == "all" or not episodes:
        return episodes
    if len(episodes) == 1:
        half = episodes[0].n // 2
        return [replace(episodes[0], high=half) if split == "train" else replace(episodes[0], low=half)]
    lots = sorted(map(lot, episodes))
    held = sum(u < 0.1 for u in lots)
    first = lots[min(max(held, 1), len(lots) - 1)]              # of those that are trained on
    return [e for e in episodes if (lot(e) < first) == (split == "heldout")]


def lot(episode):
    """A number in [0, 1): the hash of its name"""
    return int.from_bytes(hashlib.sha256(os.fsencode(episode.name)).digest(), "big") / 2 ** 256


@dataclass
class Options:
    """How clips are taken from a source: what follows its path as @NAME=VALUE."""
    fps: float = 0          # frames a second of a clip; 0: every `stride`-th frame of the file
    stride: int = 1
    camera: str = None
    flip: str = None        # vertical, horizontal or 180
    split: str = None       # one of the source's own
    actions: str = "sum"    # of the frames that are skipped: the sum, or the last

    @classmethod
    def read(cls, path, given):
        """From {name: text}. Raises UserError for what makes no sense."""
        names = [field.name for field in fields(cls)]
        choices = {"flip": ("vertical", "horizontal", "180"), "actions": ("sum", "last")}
        for name, text in given.items():
            if name not in names:
                raise UserError(f"--data {path}: no option @{name}; there are @{' @'.join(names)}")
            if text not in choices.get(name, (text,)):
                raise UserError(f"--data {path}: @{name}={text}: choose from {', '.join(choices[name])}")
        try:
            fps, stride = float(given.get("fps", 0)), int(given.get("stride", 1))
        except ValueError:
            fps = stride = 0                                    # refused just below
        if stride < 1 or "fps" in given and not fps > 0 or {"fps", "stride"} <= set(given):
            raise UserError(f"--data {path}: @fps takes a number above 0, @stride a whole one; not both")
        return cls(**{**given, "fps": fps, "stride": stride})


class Episodes(Dataset):
    """Clips from anywhere in the episodes of one source; frames are cropped to the centre square and resized.

    size: pixels of a square frame. frames: of a clip. split: "train" or "heldout", see `part_of`; or "all".
    options: {name: text}, see `Options`.
    """

    def __init__(self, path, size, frames, seed=0, split="train", options={}):
        self.path, self.size, self.frames, self.seed = path, size, frames, (seed, split == "heldout")
        self.options = Options.read(path, options)
        self.kind, found, self.skipped = find_episodes(path, self.options.camera, self.options.split)
        self.failed = {}                                        # files that went bad later, and why
        every = len(found) + len(self.skipped)
        self.episodes, starts = [], []
        for e in part_of(found, split):
            n, used = self.starts_in(e), len(e.times())
            if n > 0:
                self.episodes.append(e)
                starts.append(n)
            else:
                half = " for this half" if used < e.n else ""
                name = os.path.join(base_of(path), e.name)
                self.skipped[name] = f"{used} frames{half}, too short for a clip"
        reasons = [f"{name}: {why}" for name, why in self.skipped.items()]
        if not self.episodes:
            raise UserError(": ".join([f"--data {path}: no {split} clip of {frames} frames", *reasons[:1]]))
        if reasons and split != "heldout":
            more = "; ..." if len(reasons) > 5 else ""
            tell(path, f"data: {path}: skips {len(reasons)} of {every}: {'; '.join(reasons[:5])}{more}")
        self.ends = np.cumsum(starts)           # the clips of all episodes, counted through
        # decoded episodes stay in memory
        self.quick = 3 * size * size * sum(e.n for e in self.episodes) < MEMORY // 2
        examples = {e.info.get("look"): e.file for e in self.episodes}      # a file of each look
        self.look = same_look({file: look for look, file in examples.items()})
        dims = {e.dims for e in self.episodes}
        self.labelled = len(dims) == 1 and dims != {0}          # true actions are known

    def starts_in(self, e):
        """At how many frames of an episode a clip may start. UserError: the file has too few a second."""
        rate, times = self.options.fps, e.times()
        if not rate:
            return len(times) - self.options.stride * (self.frames - 1)
        if rate > e.info["fps"] * 1.01:
            raise UserError(f"--data {e.file}: @fps={rate:g}, but it has {e.info['fps']:g} frames a second")
        if len(times) == 0:
            return 0
        return int(np.searchsorted(times, times[-1] - (self.frames - 1) / rate + 1e-4, side="right"))

    def frames_from(self, e, start):
        """The frames of an episode (t,) that make the clip which starts at its start-th frame in use"""
        if not self.options.fps:
            return e.low + start + self.options.stride * np.arange(self.frames)
        times = e.times()
        ideal = times[start] + np.arange(self.frames) / self.options.fps
        return e.low + np.abs(times[:, None] - ideal).argmin(0)                 # the nearest ones

    def clip(self, e, start):
        """Frames (t, size, size, 3) uint8 of the clip that starts there; actions (t-1, a) float32, or None"""
        wanted = self.frames_from(e, start)
        key = (e.file, e.key, e.first, e.n, self.size, self.options.flip)
        room = MEMORY / getattr(get_worker_info(), "num_workers", 1)    # of all sources, and all workers
        if self.quick and key not in KEPT and sum(images.nbytes for images in KEPT.values()) < room:
            KEPT[key] = e.read_frames(np.arange(e.n), self.fit)
        images = KEPT[key][wanted] if key in KEPT else e.read_frames(wanted, self.fit)
        if not self.labelled:
            return images, None
        every = e.read_actions()                                # action i leads from frame i to i+1
        if self.options.actions == "last":
            return images, np.stack([every[max(b - 1, 0)] for b in wanted[1:]])
        return images, np.stack([every[a:b].sum(0) for a, b in zip(wanted[:-1], wanted[1:])])

    def fit(self, image):
        """An image (h, w, 3) as the clips have it: flipped, its centre square, resized"""
        if self.options.flip in ("vertical", "180"):
            image = image[::-1]
        if self.options.flip in ("horizontal", "180"):
            image = image[:, ::-1]
        h, w = image.shape[:2]
        side = min(h, w)
        square = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        image = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.LANCZOS, square))

    def __getitem__(self, indices):
        video, actions, fps = zip(*[self.clip_number(int(i)) for i in indices])
        batch = {"video": torch.from_numpy(np.stack(video)), "fps": torch.tensor(fps, dtype=torch.float32),
                 "source": torch.zeros(len(video), dtype=torch.long)}
        if self.labelled:
            batch["actions"] = torch.from_numpy(np.stack(actions))
        return batch

    def place(self, rng):
        """Where a clip lies that is drawn: the number of its episode, its start among the starts of all"""
        at = rng.integers(self.ends[-1])
        return int(np.searchsorted(self.ends, at, side="right")), int(at)

    def origin(self, i):
        """Source and episode of clip i"""
        return 0, self.place(np.random.default_rng((*self.seed, i)))[0]

    def clip_number(self, i):
        """Clip i, always the same: frames, actions, frames a second"""
        rng = np.random.default_rng((*self.seed, i))
        for _ in range(20):                     # a file that has gone bad does not stop a run
            k, at = self.place(rng)
            e, before = self.episodes[k], self.ends[k - 1] if k else 0
            try:
                frames, actions = self.clip(e, at - int(before))
            except Exception as error:                          # whatever the reader raises
                if e.file not in self.failed:
                    why = self.failed[e.file] = first_line(error)
                    print(f"data: {e.file} cannot be read any more, other clips are drawn ({why})",
                          file=sys.stderr)
            else:
                return frames, actions, self.options.fps or e.info["fps"] / self.options.stride
        raise UserError(f"--data {self.path}: 20 clips in a row cannot be read any more")
