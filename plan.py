"""Plan with a world model: search for actions whose dream ends at a goal image, act, look, plan again.

    python plan.py --ckpt out/toy-held-out --random --oracle                    # the toy world; a run of train.py --mode adapt
    python plan.py --env robodesk --ckpt out/desk --task push_red open_slide --goals goals
    python plan.py --collect robodesk --episodes 400 --out data/robodesk        # record episodes to train and adapt on

Paper: section 4.4, table 4. Protocol on RoboDesk: VP2 (Tian et al. 2023, arXiv 2304.13723). A candidate is a sequence of
real actions; the adapter turns it into latent actions, the world dreams it, and its pixels are compared with the goal's.
"""

import argparse
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from tqdm import tqdm

import desk
import toy
from checkpoint import load_checkpoint, restore
from data import Parser, to_video
from evaluate import save_gif, save_results, table
from flow import Draw
from metrics import wilson


def proposals(mean, std, samples, beta=0.5, low=-1.0, high=1.0, generator=None):
    """Action sequences around a mean (horizon, a), clipped: (samples, horizon, a)

    The noise is correlated in time as in VP2 and PDDM (Nagabandi et al. 2019): n_t = beta n_(t-1) + (1 - beta) std e_t, n_1 = std e_1.
    """
    noise = torch.randn(samples, *mean.shape, generator=generator, device=mean.device) * std
    for t in range(1, len(mean)):
        noise[:, t] = beta * noise[:, t - 1] + (1 - beta) * noise[:, t]
    return (mean + noise).clamp(low, high)


def cem(score, mean, std, samples=200, iterations=3, elites=0.05, beta=0.5, low=-1.0, high=1.0, generator=None):
    """Cross-entropy method: refit a Gaussian to the best sequences, again and again.

    Args:
        score: (samples, horizon, a) -> (samples,), higher is better.
        mean, std: (horizon, a), or what broadcasts to it for std: where to start.
        elites: share of the samples that is refitted to, at least 4.
        beta, low, high: as for `proposals`.

    Returns:
        the best sequence seen (horizon, a); VP2 takes the best of the last iteration.
    """
    best, best_score = None, -math.inf
    for _ in range(iterations):
        x = proposals(mean, std, samples, beta, low, high, generator)
        scores = score(x)
        top = x[scores.topk(min(samples, max(4, int(elites * samples)))).indices]
        if scores.max() > best_score:
            best, best_score = x[scores.argmax()], scores.max()
        mean, std = top.mean(0), top.std(0, unbiased=False)
    return best


def mppi(score, mean, std, samples=200, iterations=1, gamma=0.05, beta=0.5, low=-1.0, high=1.0, generator=None):
    """Model predictive path integral control (Williams et al. 2017): the mean of all sequences, weighted by exp(gamma * score).

    Arguments as for `cem`; returns the mean (horizon, a).
    """
    for _ in range(iterations):
        x = proposals(mean, std, samples, beta, low, high, generator)
        mean = torch.einsum("n,nta->ta", (gamma * score(x)).softmax(0), x)
    return mean


def shift(plan, steps):
    """What is left of a plan (horizon, a) after some steps, its last action repeated: the next search starts there."""
    return torch.cat([plan[steps:], plan[-1:].expand(min(steps, len(plan)), -1)])


class Classifier(nn.Module):
    """VP2's success classifier of 64 x 64 images, under the names of its published weights."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))

        def forward(self, x):
            return x + self.cnv(x)

    def __init__(self):
        super().__init__()
        middle = [layer for _ in range(3) for layer in (self.Residual(), nn.ReLU())]
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *middle, nn.Conv2d(32, 3, 3, padding=1), nn.Flatten(),
                                 nn.Linear(3 * 64 * 64, 1024), nn.ReLU(), nn.Linear(1024, 1))

    def forward(self, images):
        """(n, 3, 64, 64) in [0, 1] -> logits (n,)"""
        return self.net(images)[:, 0]


def reward(video, goal, classifier=None):
    """VP2's, over all frames: minus half the summed squared error, plus 10 times the summed logits; pixels count in [0, 1].

    Args:
        video: (n, 3, t, h, w) in [-1, 1]; goal: (3, h, w) in [-1, 1].

    Returns:
        (n,)
    """
    out = -0.5 * ((video - goal[:, None]) / 2).square().sum((1, 2, 3, 4))
    if classifier:
        out += 10 * classifier(rearrange((video + 1) / 2, "n c t h w -> (n t) c h w")).view(len(video), -1).sum(1)
    return out


@torch.no_grad()
def dream(world, frames, past, actions, seed, fps, context=1, steps=None, guidance=None):
    """What the world expects of real actions.

    All candidates share context and noise, and equal latent actions are dreamed once.

    Args:
        frames: uint8 (t, h, w, 3), what was seen; past: (t-1, a), what was done.
        actions: (n, horizon, a).
        context: of the frames, how many the dream starts from at most.

    Returns:
        video (n, 3, horizon, h, w) in [-1, 1].
    """
    r, horizon = world.vae.time_stride, actions.shape[1]
    context = 1 + (min(context, len(frames)) - 1) // r * r                      # whole latent frames
    actions = torch.cat([past[len(past) - context + 1:].expand(len(actions), -1, -1), actions,
                         actions[:, -1:].expand(-1, -horizon % r, -1)], 1)
    z, back = world.latent_actions(actions).unique(dim=0, return_inverse=True)  # (m, t-1, k, d), (n,)
    noise = Draw(seed, device=z.device)
    same = lambda draw, b, *shape: noise(draw, 1, *shape).expand(b, *shape)
    seen = to_video(torch.from_numpy(frames[None, -context:]), z.device)
    video = world.rollout(seen, z, steps, guidance, torch.full((len(z),), float(fps), device=z.device), same)
    return video[back][:, :, context:context + horizon]


def simulate(copies, state, actions):
    """What really happens: as `dream`, with n copies of the simulator."""
    copies.set_state(np.repeat(state, len(actions), 0))
    frames = []
    for t in range(actions.shape[1]):
        copies.step(actions[:, t].cpu().numpy())
        frames.append(copies.render())
    return to_video(torch.from_numpy(np.stack(frames, 1)), actions.device)


def episode(agent, make, task, goal, image, world, classifier, args, seed):
    """One episode in closed loop.

    Args:
        agent: "world" plans in the world model, "oracle" in the simulator, "random" draws a plan and follows it.
        make: n -> n copies of the environment at the start; goal: its state, (1, ...); image: uint8 (size, size, 3).

    Returns:
        success, seconds of planning a plan, videos [what was seen, what was dreamed, the goal] (1, 3, t, h, w).
    """
    device = next(world.parameters()).device if world else torch.device("cpu")
    env, generator = make(1), torch.Generator(device).manual_seed(seed)
    copies = {n: make(n) for n in (1, args.samples)} if agent == "oracle" else None
    target = to_video(torch.from_numpy(image[None, None]), device)[0, :, 0]
    std = torch.tensor(args.std, device=device).expand(env.action_dim)
    mean = torch.zeros(args.horizon, env.action_dim, device=device)
    queue, frames, past, dreamed, seconds, success = [mean[0]] * args.wait, [env.render()[0]], [], [], [], False
    while len(past) < args.steps and not success:
        if not queue:
            began, now = time.time(), len(past)

            def imagine(actions):
                if agent == "oracle":
                    return simulate(copies[len(actions)], env.get_state(), actions)
                return dream(world, np.stack(frames), torch.stack([mean[0], *past])[1:], actions, seed + now, env.fps, args.context,
                             args.sampling_steps, args.guidance)

            score = lambda actions: reward(imagine(actions), target, classifier)
            common = dict(samples=args.samples, beta=args.beta, generator=generator)
            if agent == "random":
                plan = proposals(torch.zeros_like(mean), std, 1, args.beta, generator=generator)[0]
            elif args.planner == "cem":
                plan = cem(score, mean, std, iterations=args.iterations, elites=args.elites, **common)
            else:
                plan = mppi(score, mean, std, gamma=args.gamma, **common)
            queue, mean = list(plan[:args.replan]), shift(plan, args.replan)
            seconds.append(time.time() - began)
            dreamed += list(imagine(plan[None, :args.replan])[0].unbind(1)) if agent != "random" else []
        past.append(queue.pop(0))
        env.step(past[-1][None].cpu().numpy())
        frames.append(env.render()[0])
        success = bool(env.success(task, goal)[0])
    seen = to_video(torch.from_numpy(np.stack(frames)[None]))
    videos = [seen, target.cpu()[None, :, None].expand_as(seen)]
    if dreamed:                                                 # before the first plan there is no dream
        videos.insert(1, torch.cat([seen[:, :, :1 + args.wait], torch.stack(dreamed, 1).cpu()[None]], 2)[:, :, :len(frames)])
    return success, float(np.mean(seconds)), videos


# the command line -----------------------------------------------------------------------------------------------------


DEFAULT_GOALS = os.path.join("out", "goals")
DEFAULTS = {
    "toy": dict(tasks=tuple(toy.TASKS), planner="cem", samples=64, horizon=5, replan=2, steps=6, wait=0, context=1, std=[1.2], elites=0.2,
                sampling_steps=2, size=16),
    # VP2's, but for the sampler; of its samples see `main`
    "robodesk": dict(tasks=desk.TASKS, planner="mppi", samples=None, horizon=10, replan=1, steps=15, wait=1, context=2, std=[0.5, 0.5, 0.5, 0.1, 0.1],
                     elites=0.05, sampling_steps=3, size=64),
}


def problems(args, task, robot, size):
    """(make, goal state, goal image) of each start-goal pair."""
    if args.env == "toy":
        world, goal = toy.task_pairs(task, robot, args.pairs, size=size)
        starts = world.get_state()
        world.set_state(goal)
        images = world.render()
        build = lambda i, n: toy.ToyWorld(robot, [i] * n, 1000, size)           # as in `task_pairs`
    else:
        if args.goals == DEFAULT_GOALS:
            desk.make_goals(task, args.goals, args.pairs, size)
        pairs = desk.goals(task, args.goals, args.pairs, size)
        starts, images, goal = np.stack([p[0] for p in pairs]), [p[1] for p in pairs], [None] * len(pairs)
        build = lambda i, n: desk.Desk(n, size)

    def maker(i):
        def make(n):
            world = build(i, n)
            world.set_state(np.repeat(starts[i:i + 1], n, 0))
            return world
        return make
    return [(maker(i), goal[i:i + 1], images[i]) for i in range(len(images))]


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder or checkpoint of train.py --mode adapt")
    add("--random", action="store_true", help="also act at random: the lower bound")
    add("--oracle", action="store_true", help="also plan in the true simulator: the upper bound")
    add("--env", default="toy", choices=DEFAULTS)
    add("--task", nargs="+", help="(all of the environment's)")
    add("--goals", default=DEFAULT_GOALS, help="RoboDesk: folder of recorded goals, or VP2's HDF5; what lacks in the default folder is recorded")
    add("--classifier", help="VP2's success classifier, a file of weights, for a single task; without it pixels alone count")
    add("--pairs", type=int, default=30, help="start-goal pairs a task")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of planner and dreams; the pairs stay")
    add("--planner", choices=("cem", "mppi"), help="(toy: cem, robodesk: mppi)")
    add("--samples", type=int, help="candidates of a search iteration (64; robodesk 200, slide and drawer 800)")
    add("--iterations", type=int, default=3, help="of CEM")
    add("--elites", type=float, help="share of CEM's samples that is refitted to (toy 0.2, robodesk 0.05)")
    add("--gamma", type=float, default=0.05, help="MPPI's weight of the reward")
    add("--beta", type=float, default=0.5, help="correlation of the noise in time")
    add("--std", type=float, nargs="+", help="of the noise, one for all actions or one each")
    add("--horizon", type=int, help="actions of a plan (toy 5, robodesk 10)")
    add("--replan", type=int, help="actions before the next plan (toy 2, robodesk 1)")
    add("--steps", type=int, help="actions of an episode (toy 6, robodesk 15)")
    add("--wait", type=int, help="of them, zero actions before the first plan (toy 0, robodesk 1)")
    add("--context", type=int, help="frames that a dream starts from, at most (toy 1, robodesk 2)")
    add("--sampling_steps", type=int, help="Euler steps (toy 2, robodesk 3)")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1: none")
    add("--vae_weights", help="where Open-Sora's VAE lies now")
    add("--out", help="folder of results.json and of the GIFs, one an episode (the run's folder, or out/plan-ENV); of the episodes to collect")
    add("--collect", choices=("robodesk",), help="record episodes instead of planning; goes on where it was stopped")
    add("--episodes", type=int, default=400, help="to collect")
    args = parser.parse_args(argv)
    defaults = DEFAULTS[args.env]
    for k in ("planner", "samples", "horizon", "replan", "steps", "wait", "context", "std", "elites", "sampling_steps"):
        if getattr(args, k) is None:
            setattr(args, k, defaults[k])
    for k in ("pairs", "samples", "iterations", "horizon", "replan", "steps", "context", "sampling_steps", "episodes"):
        if getattr(args, k) is not None and getattr(args, k) < 1:
            parser.error(f"--{k} {getattr(args, k)}: must be at least 1")
    if args.replan > args.horizon:
        parser.error(f"--replan {args.replan}: a plan has only --horizon {args.horizon} actions")
    dims = 5 if args.env == "robodesk" else 1
    if len(args.std) not in (1, dims):
        parser.error(f"--std: takes 1 number{' or 5' * (dims > 1)}, not {len(args.std)}")
    args.task = args.task or list(defaults["tasks"])
    for task in args.task:
        if task not in defaults["tasks"]:
            parser.error(f"--task {task}: {args.env} has {', '.join(defaults['tasks'])}")
    if args.classifier and len(args.task) != 1:
        parser.error("--classifier: it knows one task; name it with --task")
    if not (args.ckpt or args.random or args.oracle or args.collect):
        parser.error("--ckpt: which run? (or --random, --oracle)")
    return args


def main(argv):
    args = parse(argv)
    if args.collect:
        return desk.collect(args.out or os.path.join("data", args.collect), args.episodes, seed=args.seeds[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, robot, size, step = None, "held-out", DEFAULTS[args.env]["size"], None
    if args.ckpt:
        state = load_checkpoint(args.ckpt)
        world, size, step = restore(state, args.vae_weights).to(device).eval(), state["config"]["size"], state["step"]
        robot = state["config"]["data"] if args.env == "toy" else None
        if not world.adapter:
            raise ValueError(f"{args.ckpt}: has no adapter from real actions; make one: train.py --mode adapt --init {args.ckpt} --data SOURCE")
        dims = toy.EMBODIMENTS[robot].action_dim if robot in toy.EMBODIMENTS else desk.Desk.action_dim
        if world.adapter.action_dim != dims or args.env == "toy" and robot not in toy.EMBODIMENTS:
            raise ValueError(f"{args.ckpt}: is adapted to the {world.adapter.action_dim}-dimensional actions of {state['config']['data']}, not to {args.env}")
    classifier = None
    if args.classifier:
        if size != 64:
            raise ValueError(f"--classifier {args.classifier}: VP2's classifier sees 64 x 64 pixels, this world dreams {size} x {size}")
        classifier = Classifier().to(device).eval()
        try:
            classifier.load_state_dict(torch.load(args.classifier, device, weights_only=True))
        except Exception as error:                              # whatever a wrong file makes torch raise
            raise ValueError(f"--classifier {args.classifier}: not VP2's classifier ({str(error).splitlines()[0]})") from None
    out = args.out or (os.path.join("out", f"plan-{args.env}") if not args.ckpt else
                       args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt) or ".")
    pictures = os.path.join(out, "samples", "plan")
    os.makedirs(pictures, exist_ok=True)
    agents = ["world"] * bool(world) + ["random"] * args.random + ["oracle"] * args.oracle
    protocol = {k: v for k, v in vars(args).items() if k not in ("ckpt", "task", "collect", "episodes", "out", "random", "oracle", "vae_weights", "samples")}
    protocol |= {"size": size, "cost": "pixels and classifier" if classifier else "pixels", "success": "the task's own test at any recorded state",
                 "interval": "Wilson, 95 %, n = pairs"}
    began, rows = time.time(), {}
    for task in args.task:
        settings = argparse.Namespace(**vars(args))
        settings.samples = args.samples or (800 if task in ("open_slide", "open_drawer") else 200)      # VP2's
        pairs = problems(args, task, robot, size)
        for agent in agents:
            row = rows[f"{task} {agent}"] = {"success": [], "seconds a plan": []}
            bar = tqdm(total=len(pairs) * len(args.seeds), desc=f"{task} {agent}", dynamic_ncols=True, disable=None, leave=False)
            for seed in args.seeds:
                won = []
                for i, (make, goal, image) in enumerate(pairs):
                    success, seconds, videos = episode(agent, make, task, goal, image, world, classifier, settings, (seed * 1000 + i) * 1000)
                    save_gif(os.path.join(pictures, f"{task}-{agent}-{seed}-{i:02d}.gif"), videos)
                    won.append(success), row["seconds a plan"].append(seconds), bar.update()
                    bar.set_postfix_str(f"success {np.mean(won):.2f}")
                row["success"].append(float(np.mean(won)))
            bar.close()
            row["seconds a plan"] = [float(np.mean(row["seconds a plan"]))]
            row["low"], row["high"] = ([x] for x in wilson(np.mean(row["success"]), len(pairs)))
            row["pairs"], row["samples"] = [len(pairs)], [settings.samples]
            save_results(out, args.ckpt, step, {"plan": rows}, protocol)
    table("plan", rows)
    print(", ".join(f"{k} {v}" for k, v in protocol.items()) + f"; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (desk.DeskError, ValueError, FileNotFoundError) as error:
        sys.exit(f"plan.py: {error}")
