"""Clips for training and evaluation: the toy world, video files, HDF5, LeRobot, and mixtures of them.

    python data.py --data bridge:/data/bridge:0.3 human:/data/ssv2@fps=5:0.7 --stats --peek out.gif

A source is `[NAME:]PATH[@OPTION...][:WEIGHT]`. What lies at PATH tells its kind: the name of a toy source; a folder with
meta/info.json (LeRobot v2 or v3); *.hdf5 (robomimic's layout); else video files, with actions in a .npz, .npy or .json of
the same name. Options: `@fps=5` or `@stride=2` (frame skip), `@camera=KEY`, `@flip=vertical|horizontal|180` (LIBERO's images
are stored upside down; nothing is guessed), `@split=NAME` (of the source's own), `@actions=sum|last` (over skipped frames).

A dataset maps a list of clip numbers to a batch: `video` uint8 (b, t, h, w, 3), `fps` (b,), `source` (b,) int64, and
where they are known `actions` (b, t-1, a) and `effects` (b, t-1). Clip i is the same wherever it is drawn, so ranks
that take disjoint numbers see disjoint data, and a step's clips do not depend on the number of ranks.
"""

import argparse
import glob
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

import toy
from formats import (HDF5_ENDINGS, VIDEO_ENDINGS, DataError, files_in, frame_times, index, inspect_hdf5, inspect_video, optional,
                     read_side, read_video, side_file)


class Parser(argparse.ArgumentParser):
    """A command line of ours: a mistake ends it with one line a node."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


class ToyClips(Dataset):
    """Toy world clips: source `web`, one embodiment (then with actions), or `robots`, the mixture.

    Args:
        split: "train" or "heldout", two disjoint sets of worlds.
    """

    def __init__(self, source, size, frames, seed=0, split="train"):
        self.source, self.size, self.frames = source, size, frames
        self.names = list(toy.MIXTURE) if source == "robots" else [source]
        self.stream = {"train": 2 * seed, "heldout": 1}[split]                  # held-out clips are the same for all seeds
        self.labelled = source in toy.EMBODIMENTS                               # true actions are known
        self.light = True                                                       # quick to draw from

    def __getitem__(self, indices):
        indices = np.asarray(indices)
        if self.source == "robots":
            u = toy.Rolls((self.stream, 1), indices, 1)(1)[:, 0]
            which = np.searchsorted(np.cumsum(list(toy.MIXTURE.values())), u)
        else:
            which = np.zeros(len(indices), int)
        batch = {"video": np.empty((len(indices), self.frames, self.size, self.size, 3), np.uint8),
                 "fps": np.full(len(indices), toy.ToyWorld.fps, np.float32), "source": which}
        for i, name in enumerate(self.names):
            rows = which == i
            if name == "web":
                batch["video"] = toy.web_clips(indices, self.stream, self.frames, self.size)
            elif rows.any():
                video, actions, effects = toy.robot_clips(name, indices[rows], self.stream, self.frames, self.size)
                batch["video"][rows] = video
                if len(self.names) == 1:
                    batch |= {"actions": actions, "effects": effects}
        return {k: torch.from_numpy(v) for k, v in batch.items()}


# a source: its episodes, and clips from them --------------------------------------------------------------------------


@dataclass
class Episode:
    file: str                   # a video, or HDF5
    info: dict                  # of the file: `n`, `fps`, `pts`, ...
    first: int                  # where the episode starts in the file
    n: int                      # its frames
    dims: int = 0               # of its actions; 0: it has none
    actions: tuple = None       # where they are: (file, key or episode number)
    key: str = None             # HDF5: the dataset of frames
    low: int = 0                # only the frames low .. high-1 are used
    high: int = None

    def __post_init__(self):
        self.high = self.n if self.high is None else self.high

    def times(self):
        """Seconds of the frames that are used"""
        return frame_times(self.info)[self.first + self.low:self.first + self.high] * self.info["base"]


class Episodes(Dataset):
    """Clips from anywhere in the episodes of one source; frames are cropped to the centre square and resized.

    The last tenth of the episodes, at least one, is held out; of a single one, its second half.

    Args:
        path: see the top of this file. options: {fps, stride, camera, flip, split, actions} as text.

    Raises:
        DataError: nothing there, an option that makes no sense, or no clip long enough.
    """

    def __init__(self, path, size, frames, seed=0, split="train", options={}):
        self.path, self.size, self.frames, self.seed, self.failed = path, size, frames, (seed, split == "heldout"), {}
        unknown = set(options) - {"fps", "stride", "camera", "flip", "split", "actions"}
        if unknown:
            raise DataError(f"--data {path}: no option @{unknown.pop()}; there are @fps @stride @camera @flip @split @actions")
        self.flip, self.merge, self.camera, self.part = (options.get(k) for k in ("flip", "actions", "camera", "split"))
        try:
            self.rate, self.stride = float(options.get("fps", 0)), int(options.get("stride", 1))
            assert (self.rate > 0 or "fps" not in options) and self.stride >= 1 and not {"fps", "stride"} <= set(options)
        except (ValueError, AssertionError):
            raise DataError(f"--data {path}: @fps takes a number above 0, @stride a whole one; only one of them") from None
        for k, choices in (("flip", ("vertical", "horizontal", "180")), ("actions", ("sum", "last"))):
            if options.get(k, choices[0]) not in choices:
                raise DataError(f"--data {path}: @{k}={options[k]}: choose from {', '.join(choices)}")
        if not os.path.exists(path):
            raise DataError(f"--data {path}: no such file or folder")
        inside = lambda *ends: sorted(f for f in files_in(path) if f.lower().endswith(ends))
        self.skipped = {}
        if os.path.isfile(os.path.join(path, "meta", "info.json")):
            self.kind, episodes = "LeRobot", self.lerobot()
        elif path.lower().endswith(HDF5_ENDINGS) or not os.path.isfile(path) and inside(*HDF5_ENDINGS):
            self.kind, episodes = "HDF5", self.hdf5([path] if os.path.isfile(path) else inside(*HDF5_ENDINGS))
        else:
            if self.part or self.camera:
                raise DataError(f"--data {path}: plain videos have no @split and no @camera")
            files = [path] if os.path.isfile(path) else inside(*VIDEO_ENDINGS)
            if not files:
                raise DataError(f"--data {path}: no video ({' '.join(VIDEO_ENDINGS)}), HDF5 or LeRobot data in this folder")
            self.kind, episodes = "video", self.videos(files)
        every = len(episodes) + len(self.skipped)
        if len(episodes) == 1:
            e = episodes[0]
            e.low, e.high = {"train": (0, e.n // 2), "heldout": (e.n // 2, e.n), "all": (0, e.n)}[split]
        elif split != "all":
            held = max(1, len(episodes) // 10)
            episodes = episodes[:-held] if split == "train" else episodes[-held:]
        counts = []
        for e in episodes:
            if self.rate and self.rate > e.info["fps"] * 1.01:
                raise DataError(f"--data {path}: @fps={self.rate:g}, but {e.file} has {e.info['fps']:g} frames a second")
            counts.append(self.starts_in(e))
            if counts[-1] < 1:
                self.skipped[f"{e.file}{':' + e.key if e.key else ''}"] = f"{e.high - e.low} frames{' for this half' * (e.high - e.low < e.n)}, too short for a clip"
        self.episodes = [e for e, c in zip(episodes, counts) if c > 0]
        if not self.episodes:
            why = "".join(f": {k}: {v}" for k, v in list(self.skipped.items())[:1])
            raise DataError(f"--data {path}: no {split} clip of {frames} frames{why}")
        if self.skipped and split != "heldout" and path not in TOLD and os.environ.get("LOCAL_RANK", "0") == "0":
            TOLD.add(path)
            some = "; ".join(f"{k}: {v}" for k, v in list(self.skipped.items())[:5])
            print(f"data: {path}: skips {len(self.skipped)} of {every}: {some}{'; ...' if len(self.skipped) > 5 else ''}", file=sys.stderr)
        self.ends = np.cumsum([c for c in counts if c > 0])
        self.light = sum(e.n for e in self.episodes) * size * size * 3 < MEMORY // 4
        dims = {e.dims for e in self.episodes}
        self.labelled = len(dims) == 1 and dims != {0}

    def videos(self, files):
        episodes = []
        for file, info in index(self.path, files, inspect_video).items():
            rows = info.get("actions")
            if "error" in info or rows and rows[0] not in (info["n"] - 1, info["n"]):
                self.skipped[file] = info.get("error") or f"{rows[0]} actions beside {info['n']} frames"
            else:
                episodes.append(Episode(file, info, 0, info["n"], *(rows[1], (side_file(file), None)) if rows else ()))
        return episodes

    def hdf5(self, files):
        episodes = []
        for file, found in index(self.path, files, inspect_hdf5).items():
            if "error" in found:
                self.skipped[file] = found["error"]
                continue
            if self.part and self.part not in found["splits"]:
                raise DataError(f"--data {self.path}: @split={self.part}: {file} has {', '.join(found['splits']) or 'none'}")
            for name, demo in found["demos"].items():
                if self.part and name not in found["splits"][self.part]:
                    continue
                if not demo["cameras"]:
                    self.skipped[f"{file}:{name}"] = "no uint8 images (n, h, w, 3) under obs"
                    continue
                camera = self.choose(demo["cameras"])
                n, rows = demo["cameras"][camera], demo["actions"]
                if rows and (len(rows) != 2 or rows[0] not in (n - 1, n)):
                    self.skipped[f"{file}:{name}"] = f"actions of shape {tuple(rows)} beside {n} frames"
                    continue
                info = {"n": n, "fps": demo["fps"], "pts": [0, 1], "regular": True, "base": 1 / demo["fps"], "hw": demo["hw"]}
                episodes.append(Episode(file, info, 0, n, rows[1] if rows else 0, (file, f"data/{name}/actions"), f"data/{name}/obs/{camera}"))
        return episodes

    def lerobot(self):
        parquet, meta = optional("pyarrow.parquet"), os.path.join(self.path, "meta")
        try:
            with open(os.path.join(meta, "info.json")) as f:
                info = json.load(f)
            old, rate = info["codebase_version"].startswith("v2"), float(info["fps"])
            if not rate > 0:
                raise ValueError("fps is not above 0")
            if not old and not info["codebase_version"].startswith("v3"):
                raise DataError(f"--data {self.path}: LeRobot {info['codebase_version']}; v2.x and v3.0 can be read")
            camera = self.choose([k for k, f in info["features"].items() if f["dtype"] == "video"])
            dims = int(np.prod(info["features"].get("action", {"shape": [0]})["shape"]))
            place = lambda key, **names: os.path.join(self.path, info[key].format(video_key=camera, **names))
            rows = []               # episode, frames, seconds into its video, table of actions, video
            if old:
                with open(os.path.join(meta, "episodes.jsonl")) as f:
                    for row in map(json.loads, f):
                        e = row["episode_index"]
                        names = dict(episode_index=e, episode_chunk=e // info.get("chunks_size", 1000))
                        rows.append((e, int(row["length"]), 0.0, place("data_path", **names), place("video_path", **names)))
            else:
                for file in glob.glob(os.path.join(glob.escape(meta), "episodes", "**", "*.parquet"), recursive=True):
                    video = f"videos/{camera}/"
                    columns = [p + k for p in ("data/", video) for k in ("chunk_index", "file_index")] + [video + "from_timestamp", "episode_index", "length"]
                    for row in parquet.read_table(file, columns=columns, use_threads=False).to_pylist():
                        where = [place(key, chunk_index=row[p + "chunk_index"], file_index=row[p + "file_index"])
                                 for key, p in (("data_path", "data/"), ("video_path", video))]
                        rows.append((row["episode_index"], row["length"], row[video + "from_timestamp"], *where))
            if self.part:
                if self.part not in info["splits"]:
                    raise DataError(f"--data {self.path}: @split={self.part}: there are {', '.join(info['splits'])}")
                low, high = map(int, info["splits"][self.part].split(":"))
                rows = [row for row in rows if low <= row[0] < high]
        except DataError:
            raise
        except Exception as error:                              # whatever broken metadata makes the readers raise
            raise DataError(f"--data {self.path}: its LeRobot metadata cannot be read ({type(error).__name__}: {error})".splitlines()[0]) from None
        found, episodes = index(self.path, sorted({row[4] for row in rows if os.path.exists(row[4])}), inspect_video), []
        for e, n, at, table, video in sorted(rows):
            file = found.get(video, {"error": "no such file"})
            if "error" not in file:
                times = (frame_times(file) - frame_times(file)[0]) * file["base"]
                first = int(np.abs(times - at).argmin())
                if abs(times[first] - at) > 0.5 / rate or first + n > file["n"] or old and n != file["n"]:
                    file = {"error": f"its {file['n']} frames are not those of episode {e}"}
                elif file["n"] > 1 and abs(file["fps"] / rate - 1) > 0.1:
                    file = {"error": f"has {file['fps']:g} frames a second, info.json says {rate:g}"}
                elif dims and not os.path.exists(table):
                    file = {"error": f"{table} is missing"}
            if "error" in file:
                self.skipped[f"{video}:{e}"] = file["error"]
            else:
                episodes.append(Episode(video, file | {"fps": rate}, first, n, dims, (table, e)))
        return episodes

    def choose(self, cameras):
        """The camera that was asked for, or the only one."""
        if self.camera in cameras or len(cameras) == 1 and not self.camera:
            return self.camera or next(iter(cameras))
        raise DataError(f"--data {self.path}: " + (f"which of its cameras? @camera={' or @camera='.join(cameras)}" if cameras else "no camera in it"))

    def starts_in(self, e):
        """How many frames of an episode a clip may start at."""
        if not self.rate:
            return e.high - e.low - self.stride * (self.frames - 1)
        times = e.times()
        return int(np.searchsorted(times, times[-1] - (self.frames - 1) / self.rate + 1e-4, side="right")) if len(times) else 0

    def clip(self, e, start):
        """Frames (t, size, size, 3), and actions (t-1, a) or None, of the clip that starts at a frame of an episode."""
        wanted = start + self.stride * np.arange(self.frames)
        if self.rate:
            times = e.times()
            wanted = np.abs(times[:, None] - (times[start] + np.arange(self.frames) / self.rate)).argmin(0)
        wanted = e.low + wanted                                 # (t,) frames of the episode
        if self.light:
            key = (e.file, e.key, e.first, self.size, self.flip)
            if key not in KEPT:
                KEPT[key] = self.read_frames(e, np.arange(e.n))
            images = KEPT[key][wanted]
        else:
            images = self.read_frames(e, wanted)
        actions = None
        if self.labelled:                                       # action t leads from frame t to t+1
            every = self.read_actions(e)
            actions = np.stack([every[max(b - 1, 0)] if self.merge == "last" else every[a:b].sum(0) for a, b in zip(wanted[:-1], wanted[1:])])
        return images, actions

    def read_frames(self, e, wanted):
        """Some frames of an episode, by increasing numbers: uint8 (t, size, size, 3)"""
        if not e.key:
            return np.stack(read_video(e.file, e.info, e.first + wanted, fit=self.fit))
        with optional("h5py").File(e.file) as f:
            return np.stack([self.fit(f[e.key][i]) for i in wanted])

    def read_actions(self, e):
        """(n or n-1, a) float32 of an episode"""
        file, key = e.actions
        if key is None:
            actions = read_side(file)
        elif e.key:
            with optional("h5py").File(file) as f:
                actions = f[key][()].astype(np.float32)
        else:
            table = optional("pyarrow.parquet").read_table(file, columns=["action"], filters=[("episode_index", "=", key)], use_threads=False)
            actions = np.asarray(table["action"].to_pylist(), np.float32).reshape(len(table), -1)
        if len(actions) not in (e.n - 1, e.n) or actions.shape[1:] != (e.dims,) or not np.isfinite(actions).all():
            raise DataError(f"{file}: actions {actions.shape} for the {e.n} frames of an episode, or not all of them finite")
        return actions

    def fit(self, image):
        if self.flip:
            image = {"vertical": image[::-1], "horizontal": image[:, ::-1], "180": image[::-1, ::-1]}[self.flip]
        h, w = image.shape[:2]
        side = min(h, w)
        box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((self.size, self.size), Image.Resampling.LANCZOS, box))

    def __getitem__(self, indices):
        video, fps, actions = [], [], []
        for i in indices:
            rng = np.random.default_rng((*self.seed, int(i)))
            for _ in range(20):                                 # a file that has gone bad does not stop a run
                at = rng.integers(self.ends[-1])
                k = int(np.searchsorted(self.ends, at, side="right"))
                e = self.episodes[k]
                try:
                    frames, a = self.clip(e, int(at - (self.ends[k - 1] if k else 0)))
                    break
                except Exception as error:                      # whatever the reader raises
                    if e.file not in self.failed:
                        print(f"data: {e.file} cannot be read any more, other clips are drawn ({(str(error).splitlines() or [''])[0]})", file=sys.stderr)
                    self.failed[e.file] = self.failed.get(e.file, 0) + 1
            else:
                raise DataError(f"--data {self.path}: 20 clips in a row cannot be read any more")
            video.append(frames), actions.append(a)
            fps.append(self.rate or e.info["fps"] / self.stride)
        batch = {"video": torch.from_numpy(np.stack(video)), "fps": torch.tensor(fps, dtype=torch.float32),
                 "source": torch.zeros(len(video), dtype=torch.long)}
        if self.labelled:
            batch["actions"] = torch.from_numpy(np.stack(actions))
        return batch


TOLD = set()                # sources whose skipped files were listed
KEPT = {}                   # decoded episodes of small sources
MEMORY = 2 ** 30            # bytes: a source that has less than a quarter of it, once decoded and resized, is kept


class Mixture(Dataset):
    """Clips of several sources: each clip comes from one of them with the probability of its weight."""

    labelled = False

    def __init__(self, names, sources, weights, seed=0):
        self.names, self.sources, self.seed, self.frames = names, sources, seed, sources[0].frames
        self.light = all(source.light for source in sources)
        self.edges = np.cumsum(weights) / np.sum(weights)

    def __getitem__(self, indices):
        which = np.array([np.searchsorted(self.edges, np.random.default_rng((self.seed, 2, int(i))).random(), side="right") for i in indices])
        rows = [np.flatnonzero(which == s) for s in range(len(self.sources))]
        parts = [self.sources[s][[indices[i] for i in r]] for s, r in enumerate(rows) if len(r)]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        batch = {k: torch.cat([p[k] for p in parts])[back] for k in ("video", "fps")}
        return batch | {"source": torch.from_numpy(which)}


TOY = ("toy", "robots", "web", *toy.EMBODIMENTS)


def sources(data):
    """The sources that `--data` names, one text each; a list is left as it is."""
    try:
        return data if isinstance(data, list) else [data] if os.path.exists(data) else shlex.split(data)
    except ValueError as error:
        raise DataError(f"--data {data}: {error}") from None


def parse_source(text):
    """`[NAME:]PATH[@OPTION...][:WEIGHT]` -> name, path, options, weight or None"""
    if os.path.exists(text) or text in TOY:
        return os.path.basename(os.path.normpath(text)), text, {}, None
    body, _, last = text.rpartition(":")
    try:
        weight = float(last) if body else None
    except ValueError:
        weight = None
    body = body if weight is not None else text
    name, _, path = body.partition(":")
    path, *options = (path or body).split("@")
    if weight is not None and not 0 < weight < float("inf"):
        raise DataError(f"--data {text}: a weight must be above 0")
    if any("=" not in o for o in options):
        raise DataError(f"--data {text}: options read @NAME=VALUE")
    return name if path != body.split("@")[0] else os.path.basename(os.path.normpath(path)), path, dict(o.split("=", 1) for o in options), weight


def clips(data, size, frames, seed=0, split="train"):
    """The dataset that `--data` names: one source, or several with their weights (equal ones where none are given)."""
    made, weights, names = [], [], []
    for name, path, options, weight in map(parse_source, sources(data)):
        if path in TOY and not options:
            made.append(ToyClips("robots" if path == "toy" else path, size, frames, seed, split))
        else:
            made.append(Episodes(path, size, frames, seed, split, options))
        weights.append(weight), names.append(name)
    if not made:
        raise DataError("--data: no source given")
    if len(set(names)) < len(names):
        raise DataError(f"--data {data}: two sources have the same name; give them names, NAME:PATH")
    if len({w is None for w in weights}) > 1:
        raise DataError(f"--data {data}: give all sources a weight, or none")
    return made[0] if len(made) == 1 else Mixture(names, made, [1 if w is None else w for w in weights], seed)


def loader(dataset, batch, start, stop, rank=0, ranks=1):
    """One batch a step for steps start..stop-1: this rank's share of the step's global batch."""
    local = batch // ranks
    numbers = [range(step * batch + rank * local, step * batch + (rank + 1) * local) for step in range(start, stop)]
    cuda = torch.cuda.is_available()        # on a CPU a worker would take a core, which light clips are not worth
    workers = 4 if cuda else 1 - dataset.light
    return DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=cuda, worker_init_fn=undisturbed)


def undisturbed(_):
    """A loader worker leaves it to its parent to end on a signal: torchrun sends them to the whole process group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_video(frames, device="cpu"):
    """uint8 (b, t, h, w, 3) -> float (b, 3, t, h, w) in [-1, 1] on the device"""
    return frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_crop(video, smallest, draw):
    """One random square window a clip, of side `smallest` to 1 times the frame's, resized back: (b, c, t, h, w)"""
    if smallest >= 1:
        return video
    b, c, t, h, w = video.shape
    scale = smallest + (1 - smallest) * draw(torch.rand, b)
    shift = (draw(torch.rand, b, 2) * 2 - 1) * (1 - scale)[:, None]
    theta = torch.zeros(b, 2, 3, device=video.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (b, c, h, w), align_corners=False)
    return F.grid_sample(video.flatten(1, 2), grid, padding_mode="border", align_corners=False).view(b, c, t, h, w)


# the command line -----------------------------------------------------------------------------------------------------


def peek(path, dataset, names, n=12, columns=4, side=128):
    """A GIF of what training will see: clips with the names of their sources, and their actions where they are known."""
    shown = [dataset[[i]] for i in range(n)]
    pages = []
    for t in range(dataset.frames):
        page = Image.new("RGB", (columns * (side + 4), -(-n // columns) * (side + 28)), "white")
        write = ImageDraw.Draw(page)
        for i, clip in enumerate(shown):
            which, (x, y) = int(clip["source"]), (i % columns * (side + 4), i // columns * (side + 28))
            if isinstance(dataset, Mixture):                    # which leaves out actions
                clip = dataset.sources[which][[i]]
            page.paste(Image.fromarray(clip["video"][0, t].numpy()).resize((side, side), Image.Resampling.NEAREST), (x, y))
            write.text((x, y + side), f"{names[which]} {float(clip['fps']):.3g} fps", "black")
            if "actions" in clip and t < clip["actions"].shape[1]:
                write.text((x, y + side + 12), " ".join(f"{a:+.2f}" for a in clip["actions"][0, t][:4].tolist()), "black")
        pages.append(np.asarray(page))
    imageio.imwrite(path, np.stack(pages), duration=250, loop=0)


def stats(data, size, frames):
    """Print a row a source: what there is, how many clips a second are read, and what seeking wins over decoding from the start."""
    print(f"{'source':16} {'kind':8} {'episodes':>8} {'frames':>9} {'hours':>7} {'pixels':>16} {'fps':>9} {'actions':>8} {'skipped':>8} {'clips/s':>8} {'seeking':>8}")
    for text in sources(data):
        name, path, options, _ = parse_source(text)
        dataset = clips([text], size, frames) if path in TOY else Episodes(path, size, frames, split="all", options=options)
        began = time.time()
        dataset[range(16)]
        speed = 16 / (time.time() - began)
        if path in TOY:
            print(f"{name:16} {'toy':8} {'endless':>8} {'':9} {'':7} {f'{size}x{size}':>16} {toy.ToyWorld.fps:9} {'':8} {'':8} {speed:8.1f}")
            continue
        spread = lambda values: f"{min(values):g}" + (f"-{max(values):g}" if max(values) > min(values) else "")
        sizes = sorted({tuple(e.info["hw"]) for e in dataset.episodes})
        pixels = "..".join(f"{w}x{h}" for h, w in sizes[::max(1, len(sizes) - 1)])
        longest, ratio = max(dataset.episodes, key=lambda e: e.info["n"]), ""
        if not longest.key:                                     # four clips of the longest video, and the same without seeking
            seconds = []
            for seek in (True, False):
                began = time.time()
                for share in (0.2, 0.4, 0.6, 0.8):
                    read_video(longest.file, longest.info, int(share * (longest.info["n"] - frames)) + np.arange(frames), seek)
                seconds.append(time.time() - began)
            ratio = f"x{seconds[1] / seconds[0]:.1f}"
        hours = sum(e.n / e.info["fps"] for e in dataset.episodes) / 3600
        print(f"{name:16} {dataset.kind:8} {len(dataset.episodes):8} {sum(e.n for e in dataset.episodes):9} {hours:7.3f} {pixels:>16} "
              f"{spread([round(e.info['fps'], 2) for e in dataset.episodes]):>9} {spread([e.dims for e in dataset.episodes]):>8} {len(dataset.skipped):8} {speed:8.1f} {ratio:>8}")


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="one source, or several")
    parser.add_argument("--size", type=int, default=64, help="pixels of a square frame")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip")
    parser.add_argument("--peek", metavar="GIF", help="write what training will see")
    parser.add_argument("--stats", action="store_true", help="print what there is")
    args = parser.parse_args(argv)
    if args.frames < 2 or args.size < 1:
        parser.error("--frames must be at least 2, --size at least 1")
    if args.peek and not (args.peek.endswith(".gif") and os.path.isdir(os.path.dirname(args.peek) or ".")):
        parser.error(f"--peek {args.peek}: takes the name of a .gif in a folder that is there")
    data = shlex.join(args.data)
    if args.stats or not args.peek:
        stats(data, args.size, args.frames)
    if args.peek:
        dataset = clips(data, args.size, args.frames)
        peek(args.peek, dataset, getattr(dataset, "names", None) or [parse_source(args.data[0])[0]])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"data.py: {error}")
