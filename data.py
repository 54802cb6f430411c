"""Clips for training and evaluation: the toy world, video files, HDF5, LeRobot, and mixtures of them.

    python data.py --data bridge:/data/bridge:0.3 human:/data/ssv2@fps=5:0.7 --stats --peek out.gif

A source is `[NAME:]PATH[@OPTION...][:WEIGHT]`. What lies at PATH tells its kind: the name of a toy source; a
folder with meta/info.json (LeRobot v2 or v3); *.hdf5 (robomimic's layout); else video files, with actions in
a .npz, .npy or .json of the same name. Options: `@fps=5` or `@stride=2` (frame skip), `@camera=KEY`,
`@flip=vertical|horizontal|180` (LIBERO's images are stored upside down; nothing is guessed), `@split=NAME`
(of the source's own), `@actions=sum|last` (over skipped frames).

A dataset maps a list of clip numbers to a batch: `video` uint8 (b, t, h, w, 3), `fps` (b,), `source` (b,)
int64, and where they are known `actions` (b, t-1, a) and `effects` (b, t-1). Clip i is the same wherever it
is drawn: ranks that take disjoint numbers see disjoint data, and a step's clips do not depend on the ranks.
"""

import argparse
import os
import shlex
import signal
import sys
import time

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

import toy
from episodes import Episodes
from formats import UserError, same_look, speaks, whole

TOY = ("toy", "robots", "web", *toy.EMBODIMENTS)


class Parser(argparse.ArgumentParser):
    """A command line of ours: a mistake in it ends the program with one line a node."""

    def __init__(self, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if speaks() else None)


def misfit(value, least, most):
    """What is wrong with a number that is not within bounds, as nan never is; nothing where it is"""
    return "" if least <= value <= most else f"{value}: must be at least {least:g}, at most {most:g}"


def number(kind, least=0, most=1e9):
    """A type of arguments: a number within bounds. kind: int or float"""
    def read(text):
        value = kind(text)
        if misfit(value, least, most):
            raise argparse.ArgumentTypeError(misfit(value, least, most))
        return value
    read.__name__ = kind.__name__           # argparse's word for what is no number
    return read


def program(main):
    """Run main(arguments). What a user can mend ends it with "NAME.py: message", one line a node: a mistake,
    a file that cannot be written, too little memory, Ctrl-C."""
    name = os.path.basename(sys.argv[0])
    try:
        main(sys.argv[1:])
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        # torch has a RuntimeError for memory that it cannot get; of any other one wants the traceback
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        # torch puts a traceback before what a loader's worker says, and the name of the error
        line = (str(error) or "out of memory").splitlines()[-1].removeprefix("formats.UserError: ")
        sys.exit(f"{name}: {line}" if speaks() or not isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        if speaks():
            print(f"{name}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


class ToyClips(Dataset):
    """Clips of the toy world, made as they are asked for: `web`, or of one embodiment.

    size: pixels of a square frame. frames: of a clip. split: "train" or "heldout", disjoint sets of worlds.
    """
    quick = True                                                # to make: see `loader`
    look = ""                                                   # not drawn by a simulator that has several

    def __init__(self, source, size, frames, seed=0, split="train"):
        if size < 8:
            raise UserError(f"--size {size}: toy robots and blocks need frames of 8 pixels or more")
        self.source, self.size, self.frames = source, size, frames
        self.stream = {"train": 2 * seed, "heldout": 1}[split]  # held-out clips are the same for all seeds
        self.labelled = source != "web"                         # true actions are known

    def origin(self, i):
        """Source and episode of clip i; here each clip has a world of its own"""
        return 0, i

    def __getitem__(self, indices):
        how = (self.stream, self.frames, self.size)
        batch = {"fps": np.full(len(indices), toy.ToyWorld.fps, np.float32),
                 "source": np.zeros(len(indices), np.int64)}
        if self.source == "web":
            batch["video"] = toy.web_clips(indices, *how)
        else:
            batch["video"], batch["actions"], batch["effects"] = toy.robot_clips(self.source, indices, *how)
        return {k: torch.from_numpy(v) for k, v in batch.items()}


class Mixture(Dataset):
    """Clips of several sources: each clip comes from one of them with the probability of its weight."""
    labelled = False            # robots differ in their actions

    def __init__(self, names, sources, weights, seed=(0, 2)):
        self.names, self.sources, self.seed, self.frames = names, sources, seed, sources[0].frames
        self.quick = all(source.quick for source in sources)
        self.look = same_look({name: source.look for name, source in zip(names, sources)})
        self.edges = np.cumsum(weights) / np.sum(weights)

    def which(self, indices):
        """The source of each clip (b,), as its place in `sources`"""
        u = [np.random.default_rng((*self.seed, int(i))).random() for i in indices]
        return np.searchsorted(self.edges, u, side="right")

    def origin(self, i):
        """Source and episode of clip i"""
        which = self.which([i])[0]
        return which, self.sources[which].origin(i)

    def __getitem__(self, indices):
        which = self.which(indices)
        rows = [np.flatnonzero(which == s) for s in range(len(self.sources))]
        parts = [source[[indices[i] for i in r]] for source, r in zip(self.sources, rows) if len(r)]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))   # to the order asked for
        batch = {k: torch.cat([part[k] for part in parts])[back] for k in ("video", "fps")}
        return batch | {"source": torch.from_numpy(which)}


def sources(data):
    """The sources of a list, or of a text as the shell reads it, one text each. UserError: an open quote."""
    if isinstance(data, list):
        return data
    try:
        return shlex.split(data)
    except ValueError as error:
        raise UserError(f"--data {data}: {error}") from None


def parse_source(text):
    """`[NAME:]PATH[@OPTION...][:WEIGHT]` -> name, path, options {name: text}, weight or None

    Where PATH itself has an @ or a colon in it, the longest one that is there is taken.
    """
    if os.path.exists(text) or text in TOY:
        return os.path.basename(os.path.normpath(text)), text, {}, None
    body, _, last = text.rpartition(":")
    try:
        weight = float(last) if body else None
    except ValueError:
        weight = None
    if weight is None:
        body = text
    elif not 0 < weight < 1e9:
        raise UserError(f"--data {text}: a weight must be above 0, and below 1e9")
    pieces = body.split("@")
    for n in range(len(pieces), 0, -1):
        place, options = "@".join(pieces[:n]), pieces[n:]
        name, _, path = place.partition(":")
        if os.path.exists(place) or not path:
            name, path = "", place
        if os.path.exists(path):
            break
    if any("=" not in option for option in options):
        raise UserError(f"--data {text}: options read @NAME=VALUE")
    name = name or os.path.basename(os.path.normpath(path))
    return name, path, dict(option.split("=", 1) for option in options), weight


def clips(data, size, frames, seed=0, split="train"):
    """The dataset that `--data` names: one source, or several by weight (equal ones where none are given)."""
    names, made, weights, data = [], [], [], sources(data)
    for name, path, options, weight in map(parse_source, data):
        names.append(name)
        weights.append(weight)
        if path in ("toy", "robots") and not options:
            robots = [ToyClips(robot, size, frames, seed, split) for robot in toy.MIXTURE]
            made.append(Mixture([*toy.MIXTURE], robots, [*toy.MIXTURE.values()], (robots[0].stream, 1)))
        elif path in TOY and not options:
            made.append(ToyClips(path, size, frames, seed, split))
        else:
            made.append(Episodes(path, size, frames, seed, split, options))
    if not made:
        raise UserError("--data: no source given")
    if len(set(names)) < len(names):
        raise UserError(f"--data {' '.join(data)}: two sources of the same name; give them names, NAME:PATH")
    if None in weights and any(weights):
        raise UserError(f"--data {' '.join(data)}: give all sources a weight, or none")
    if len(made) == 1:
        return made[0]
    return Mixture(names, made, [weight or 1 for weight in weights], (seed, 2))


def another(dataset, i, tries=1000):
    """The number of the first clip after clip i of the same source, but of another episode.

    Where the source has a single episode it is another clip of that; where no clip is found, i.
    """
    (source, episode), same = dataset.origin(i), i
    for j in range(i + 1, i + 1 + tries):
        its_source, its_episode = dataset.origin(j)
        if its_source == source and its_episode != episode:
            return j
        if its_source == source and same == i:
            same = j
    return same


def loader(dataset, batch, start, stop, rank=0, ranks=1):
    """For each of the steps start..stop-1, this rank's share of its global batch of `batch` clips."""
    local = batch // ranks
    firsts = range(start * batch + rank * local, stop * batch, batch)
    numbers = [range(first, first + local) for first in firsts]
    cuda = torch.cuda.is_available()
    # on a CPU a worker takes a core from training
    workers = 4 if cuda else int(not dataset.quick)
    return DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=cuda,
                      worker_init_fn=undisturbed)


def undisturbed(_):
    """A loader worker leaves it to its parent to end on a signal: torchrun sends them to the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_video(frames, device="cpu"):
    """uint8 (b, t, h, w, 3) -> float (b, 3, t, h, w) in [-1, 1] on the device"""
    return frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_crop(video, smallest, draw):
    """A random square window of each clip (b, c, t, h, w), `smallest` to 1 times as wide, resized back."""
    if smallest >= 1:
        return video
    b, c, t, h, w = video.shape
    scale = smallest + (1 - smallest) * draw(torch.rand, b)             # (b,); draw is a flow.Draw
    shift = (draw(torch.rand, b, 2) * 2 - 1) * (1 - scale)[:, None]     # (b, 2)
    theta = torch.zeros(b, 2, 3, device=video.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (b, c, h, w), align_corners=False)      # (b, h, w, 2)
    frames = video.flatten(1, 2)                                        # (b, c t, h, w)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False).view(b, c, t, h, w)


def peek(path, dataset, names, n=12, columns=4, side=128):
    """A GIF of what training will see: n clips, the names of their sources, actions where they are known."""
    shown, pages = [], []
    for i in range(n):
        which, _ = dataset.origin(i)
        # a mixture leaves actions out
        source = dataset.sources[which] if isinstance(dataset, Mixture) else dataset
        shown.append((names[which], source[[i]]))
    for t in range(dataset.frames):
        page = Image.new("RGB", (columns * (side + 4), -(-n // columns) * (side + 28)), "white")
        write = ImageDraw.Draw(page)
        for i, (name, clip) in enumerate(shown):
            x, y = i % columns * (side + 4), i // columns * (side + 28)
            frame = Image.fromarray(clip["video"][0, t].numpy())
            page.paste(frame.resize((side, side), Image.Resampling.NEAREST), (x, y))
            text = f"{name} {float(clip['fps']):.3g} fps\n"
            if "actions" in clip and t < clip["actions"].shape[1]:
                text += " ".join(f"{a:+.2f}" for a in clip["actions"][0, t][:4].tolist())
            write.text((x, y + side), text, "black")
        pages.append(np.asarray(page))
    with whole(path) as part, open(part, "wb") as f:
        f.write(imageio.imwrite("<bytes>", np.stack(pages), extension=".gif", duration=250, loop=0))


COLUMNS = {"source": "<16", "kind": "<8", "episodes": ">8", "frames": ">9", "hours": ">7", "pixels": ">16",
           "fps": ">9", "actions": ">8", "skipped": ">8", "clips/s": ">8"}


def stats(data, size, frames):
    """Print a row a source: what there is, and how many clips a second are read."""
    print(" ".join(f"{column:{form}}" for column, form in COLUMNS.items()))
    for text in sources(data):
        name, path, options, _ = parse_source(text)
        if path in TOY:
            dataset = clips([text], size, frames)
            row = {"kind": "toy", "episodes": "endless", "pixels": f"{size}x{size}", "fps": toy.ToyWorld.fps}
        else:
            dataset = Episodes(path, size, frames, split="all", options=options)
            episodes = dataset.episodes
            sizes = ends([tuple(e.info["hw"]) for e in episodes])
            rates = ends([round(e.info["fps"], 2) for e in episodes])
            hours = sum(e.n / e.info["fps"] for e in episodes) / 3600
            row = {"kind": dataset.kind, "episodes": len(episodes), "frames": sum(e.n for e in episodes),
                   "hours": f"{hours:.3f}", "pixels": "..".join(f"{w}x{h}" for h, w in sizes),
                   "fps": "-".join(f"{rate:g}" for rate in rates),
                   "actions": "-".join(map(str, ends([e.dims for e in episodes]))),
                   "skipped": len(dataset.skipped)}
        began = time.time()
        dataset[range(16)]
        row |= {"source": name, "clips/s": f"{16 / (time.time() - began):.1f}"}
        print(" ".join(f"{row.get(column, ''):{form}}" for column, form in COLUMNS.items()))


def ends(values):
    """The smallest and the largest of them; one, where they are equal"""
    return sorted({min(values), max(values)})


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="one source, or several")
    parser.add_argument("--size", type=int, default=64, help="pixels of a square frame")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip")
    parser.add_argument("--peek", metavar="GIF", help="write what training will see")
    parser.add_argument("--stats", action="store_true", help="print what there is")
    args = parser.parse_args(argv)
    if args.frames < 2 or args.size < 1 or 48 * args.frames * args.size ** 2 > 2 ** 32:
        parser.error("--frames must be at least 2, --size at least 1, and 16 such clips at most 4 GiB")
    folder = os.path.dirname(args.peek or "") or "."
    if args.peek is not None and not (args.peek.endswith(".gif") and os.access(folder, os.W_OK)):
        parser.error(f"--peek {args.peek}: takes the name of a .gif in a folder that can be written")
    if args.stats or not args.peek:
        stats(args.data, args.size, args.frames)
    if args.peek:
        dataset = clips(args.data, args.size, args.frames)
        names = dataset.names if hasattr(dataset, "names") else [parse_source(args.data[0])[0]]
        peek(args.peek, dataset, names)


if __name__ == "__main__":
    program(main)
