"""Clips for training and evaluation: the toy world, or any video files.

A dataset maps a list of clip numbers to a batch: `video` uint8 (b, t, h, w, 3), `fps` (b,), `source` (b,) int64, and
where they are known `actions` (b, t-1, a) and `effects` (b, t-1). Clip i is the same wherever it is drawn, so ranks
that take disjoint numbers see disjoint data, and a step's clips do not depend on the number of ranks.
"""

import glob
import os
import signal

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import toy

VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")


class DataError(Exception):
    """A user's mistake about data, in one line."""


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


class VideoClips(Dataset):
    """Clips from a video file, or all those in a folder and its subfolders, decoded once and kept in memory.

    Frames are cropped to the centre square and resized. A NAME.npz with `actions` (t-1, a) beside NAME.mp4 is read
    too. The last tenth of the files, at least one, is held out; of a single file, its second half.

    Raises:
        DataError: nothing there, no video, or no clip long enough.
    """

    def __init__(self, path, size, frames, seed=0, split="train"):
        if not os.path.exists(path):
            raise DataError(f"--data {path}: no such file or folder")
        files = [path] if os.path.isfile(path) else sorted(
            f for f in glob.glob(os.path.join(glob.escape(path), "**", "*"), recursive=True) if f.lower().endswith(VIDEO_ENDINGS))
        if not files:
            raise DataError(f"--data {path}: no video in this folder ({' '.join(VIDEO_ENDINGS)})")
        single, held = len(files) == 1, max(1, len(files) // 10)
        if not single:
            files = files[:-held] if split == "train" else files[-held:]
        self.size, self.frames, self.seed = size, frames, (seed, split == "heldout")
        self.episodes, self.skipped = [], []
        for file in tqdm(files, "reading video", disable=len(files) < 20, leave=False):
            video, fps = self.read(file)
            side = os.path.splitext(file)[0] + ".npz"
            actions = np.load(side)["actions"].astype(np.float32) if os.path.exists(side) else None
            if single:
                half = slice(0, len(video) // 2) if split == "train" else slice(len(video) // 2, None)
                video, actions = video[half], None if actions is None else actions[half]
            if len(video) < frames:
                self.skipped.append(f"{file}: {len(video)} frames, a clip needs {frames}")
                continue
            self.episodes.append((video, fps, actions))
        if not self.episodes:
            raise DataError(f"--data {path}: no clip of {frames} frames in the {split} files ({self.skipped[0]})")
        self.labelled = all(a is not None for _, _, a in self.episodes)
        self.starts = np.cumsum([len(v) - frames + 1 for v, _, _ in self.episodes])

    def read(self, file):
        """uint8 (t, size, size, 3) and frames a second of a video file"""
        try:
            fps = imageio.immeta(file, plugin="pyav").get("fps") or 24
            frames = [self.fit(frame) for frame in imageio.imiter(file, plugin="pyav")]
        except Exception as error:                              # whatever the decoder raises on a bad file
            raise DataError(f"--data {file}: not a video that can be decoded ({str(error).splitlines()[0]})") from None
        return np.stack(frames), fps

    def fit(self, frame):
        h, w = frame.shape[:2]
        side = min(h, w)
        box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        return np.asarray(Image.fromarray(frame[..., :3]).resize((self.size, self.size), Image.Resampling.LANCZOS, box))

    def __getitem__(self, indices):
        video, fps, actions = [], [], []
        for i in indices:
            start = np.random.default_rng((*self.seed, int(i))).integers(self.starts[-1])
            e = np.searchsorted(self.starts, start, side="right")
            v, f, a = self.episodes[e]
            at = self.starts[e] - 1 - start
            video.append(v[at:at + self.frames]), fps.append(f)
            actions.append(None if a is None else a[at:at + self.frames - 1])
        batch = {"video": torch.from_numpy(np.stack(video)), "fps": torch.tensor(fps, dtype=torch.float32),
                 "source": torch.zeros(len(video), dtype=torch.long)}
        if self.labelled:
            batch["actions"] = torch.from_numpy(np.stack(actions))
        return batch


TOY = ("toy", "robots", "web", *toy.EMBODIMENTS)


def clips(data, size, frames, seed=0, split="train"):
    """The dataset that `--data` names: `toy`, the name of a toy source, or a path."""
    if data in TOY:
        return ToyClips("robots" if data == "toy" else data, size, frames, seed, split)
    return VideoClips(data, size, frames, seed, split)


def loader(dataset, batch, start, stop, rank=0, ranks=1):
    """One batch a step for steps start..stop-1: this rank's share of the step's global batch."""
    local = batch // ranks
    numbers = [range(step * batch + rank * local, step * batch + (rank + 1) * local) for step in range(start, stop)]
    cuda = torch.cuda.is_available()        # toy clips cost a few per cent of a step on a CPU, where workers would take its cores
    return DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=4 if cuda else 0, pin_memory=cuda, worker_init_fn=undisturbed)


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
