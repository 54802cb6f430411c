"""What a plan is judged by: how far its frames are from the goal's image, and a classifier of success.

    python cost.py --task push_red --data data/robodesk --out push_red.pt       # for plan.py --classifier

Pixels and classifier as in VP2 (Tian et al. 2023, arXiv 2304.13723), summed over all frames of a plan; that
the last frame alone may be judged, or latents, is ours.
"""

import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import desk
from checkpoint import load_vae, write
from config import Process
from data import Parser, number, program
from episodes import Episodes
from evaluate import table
from formats import UserError, first_line, same_look, whole
from metrics import average_precision

COSTS = ("pixels", "last", "latent", "latent-last")


class Classifier(nn.Module):
    """VP2's success classifier of 64 x 64 images, under the names of its published weights."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnv = nn.Sequential(
                nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))

        def forward(self, x):
            return x + self.cnv(x)

    def __init__(self):
        super().__init__()
        middle = [layer for _ in range(3) for layer in (self.Residual(), nn.ReLU())]
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), *middle, nn.Conv2d(32, 3, 3, padding=1), nn.Flatten(),
            nn.Linear(3 * 64 * 64, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def forward(self, images):
        """(n, 3, 64, 64) in [0, 1] -> logits (n,)"""
        return self.net(images)[:, 0]


class Cost:
    """Scores of imagined frames, higher is better: minus half the squared error, plus 10 times the logits.

    Args:
        name: one of COSTS. last: only the last frame of a plan is judged, by the classifier too.
        vae: for errors of its latents; None: they are those of pixels in [0, 1].
        classifier: None: the goal's image alone.
    """

    def __init__(self, name="pixels", vae=None, classifier=None):
        self.last, self.vae, self.classifier = name.endswith("last"), vae, classifier

    def __call__(self, video, goal):
        """Frames to judge (n, 3, t, h, w) and a goal (3, h, w), in [-1, 1] -> sums over t: (n,)"""
        frames, goal = video.transpose(1, 2).flatten(0, 1), goal[None]          # (n*t, 3, h, w), (1, 3, h, w)
        if self.vae:
            # frame by frame, as a goal is but one
            error = in_parts(self.vae.encode, frames[:, :, None]) - self.vae.encode(goal[:, :, None])
        else:
            error = (frames - goal) / 2
        out = -0.5 * error.square().flatten(1).sum(1)                           # (n*t,)
        if self.classifier:
            out = out + 10 * in_parts(self.classifier, (frames + 1) / 2)
        return out.view(len(video), -1).sum(1)


@torch.no_grad()
def in_parts(model, x, size=256):
    """What a model makes of (m, ...): so many at a time, as hundreds of candidates do not fit into memory"""
    return torch.cat([model(part) for part in x.split(size)])


def open_cost(args, world, device):
    """The Cost that plan.py's arguments name. UserError: what it needs is missing, or does not fit."""
    vae = classifier = None
    if args.cost.startswith("latent"):
        vae = open_vae(args, world).to(device).eval()
    if args.classifier:
        classifier = open_classifier(args.classifier, args.task[0], args.look, args.size, device)
    return Cost(args.cost, vae, classifier)


def open_vae(args, world):
    """The world's VAE, or without a world that of --vae_weights"""
    vae = world.vae if world else None
    if args.vae_weights and not world:
        try:
            vae, learned = load_vae(args.vae_weights)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(error) from None
        same_look({f"--vae_weights {args.vae_weights}": learned, "--look": args.look})
    if not vae or vae.source == "none":
        raise UserError(f"--cost {args.cost}: takes a --ckpt with a VAE, or --vae_weights without a --ckpt")
    return vae


def open_classifier(path, task, look, size, device):
    """VP2's classifier, or one that was trained here. UserError: neither, another task's, another look's."""
    if size != 64:
        raise UserError(f"--classifier {path}: sees 64 x 64 pixels, this world dreams {size} x {size}")
    classifier = Classifier().to(device).eval()
    try:
        found = torch.load(path, device, weights_only=True)
        if "classifier" not in found:                           # VP2's are weights and nothing else
            found = {"classifier": found, "task": task, "look": "published"}
        classifier.load_state_dict(found["classifier"])
        known, learned = found["task"], found["look"]
    except Exception as error:              # whatever a wrong file makes torch raise
        raise UserError(f"--classifier {path}: not VP2's classifier, nor one of cost.py "
                        f"({first_line(error)})") from None
    if known != task:
        raise UserError(f"--classifier {path}: knows {known}, not {task}")
    same_look({f"--classifier {path}": learned, "--look": look})
    return classifier


# training a classifier


def examples(path, task, split):
    """Frames (m, 3, 64, 64) uint8 of a part of the episodes, whether the task is done (m,), their look"""
    dataset, frames, solved = Episodes(path, 64, 1, split=split), [], []
    for e in tqdm(dataset.episodes, f"reading {split}", dynamic_ncols=True, disable=None, leave=False):
        try:
            with np.load(e.actions[0]) as labels:
                done = labels["solved"][:, desk.TASKS.index(task)]
            if len(done) != e.n:
                raise UserError(f"{len(done)} labels for {e.n} frames")
        except Exception as error:          # no file of labels, one of another kind, or without this one
            raise UserError(f"--data {e.file}: what is beside it does not tell which tasks are done, as in "
                            f"episodes of plan.py --collect ({first_line(error)})") from None
        frames.append(e.read_frames(np.arange(e.n), dataset.fit)[e.low:e.high])
        solved.append(done[e.low:e.high])
    found, least = sum(done.any() for done in solved), 5 if split == "train" else 1
    if found < least:
        raise UserError(f"--data {path}: {task} is done in {found} of {len(solved)} {split} episodes, which "
                        f"takes {least} or more: collect more")
    images = torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.concatenate(solved)), dataset.look


def fit(images, solved, steps, batch, seed, process):
    """A Classifier of `examples`, trained as in VP2, but half of each batch are successes: they are rare"""
    torch.manual_seed(seed)
    model = Classifier().to(process.device)
    optimizer = torch.optim.Adam(model.parameters())
    kinds = [torch.nonzero(solved)[:, 0], torch.nonzero(~solved)[:, 0]]
    labels = torch.tensor([1.0, 0.0], device=process.device).repeat_interleave(batch // 2)
    bar = tqdm(range(steps), "training", dynamic_ncols=True, disable=None)
    for _ in bar:
        rows = torch.cat([kind[torch.randint(len(kind), (batch // 2,))] for kind in kinds])
        with process.autocast():
            logits = model(images[rows].to(process.device) / 255)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    return model.eval()


def measure(model, images, solved, process):
    """How right a classifier is on `examples`: {column: number}"""
    with process.autocast():
        logits = in_parts(lambda part: model(part.to(process.device) / 255), images).float().cpu()
    return {"right if done": (logits[solved] > 0).float().mean().item(),
            "right if not": (logits[~solved] < 0).float().mean().item(),
            "average precision": average_precision(logits, solved),
            "by chance": solved.float().mean().item(), "done": int(solved.sum()), "frames": len(solved)}


def main(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=desk.TASKS)
    add("--data", required=True, help="folder of episodes of plan.py --collect robodesk; a tenth is held out")
    add("--out", required=True, help="file to write")
    add("--steps", type=number(int, 1), default=100, help="of training")
    add("--batch", type=number(int, 2), default=32, help="frames, half of them successes")
    add("--seed", type=number(int), default=0)
    args = parser.parse_args(argv)
    if os.path.isdir(args.out or ".") or not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        parser.error(f"--out {args.out}: takes the name of a file, in a folder that can be written")
    process = Process.here()
    *train, look = examples(args.data, args.task, "train")
    *heldout, _ = examples(args.data, args.task, "heldout")
    model = fit(*train, args.steps, args.batch, args.seed, process)
    measured = measure(model, *heldout, process)
    with whole(args.out) as part:
        write({"classifier": model.state_dict(), "look": look, "heldout": measured, **vars(args)}, part)
    table("held out", {args.task: {column: [value] for column, value in measured.items()}})


if __name__ == "__main__":
    program(main)
