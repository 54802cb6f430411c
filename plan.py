"""Plan with a world model: search for actions whose dream ends at a goal image, act, look, plan again.

    python plan.py --ckpt out/toy-held-out --random --oracle        # the toy world; a run of --mode adapt
    python plan.py --env robodesk --ckpt out/desk --task push_red open_slide --goals goals
    python plan.py --collect robodesk --episodes 400 --out data/robodesk        # to train and adapt on

The adapter turns a candidate's real actions into latent ones, the world dreams them, and the dream is judged
by the goal (cost.py). Paper: section 4.4, table 4. On RoboDesk: VP2 (Tian et al. 2023, arXiv 2304.13723).
"""

import math
import os
import time
from argparse import Namespace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import desk
import toy
from checkpoint import load_checkpoint, restore
from config import PRECISIONS, Process
from cost import COSTS, open_cost
from data import Parser, number, program, to_video
from evaluate import open_results, run_folder, save_results, table
from flow import Draw
from formats import UserError, same_look
from goals import DEFAULT_GOALS, problems
from judge import save_gif
from metrics import wilson


def proposals(mean, std, samples, beta=0.5, generator=None):
    """Action sequences around a mean (horizon, a), clipped to [-1, 1]: (samples, horizon, a)

    The noise is correlated in time as in VP2 and PDDM (Nagabandi et al. 2019):
    n_t = beta n_(t-1) + (1 - beta) std e_t, n_1 = std e_1.
    """
    noise = torch.randn(samples, *mean.shape, generator=generator, device=mean.device) * std
    for t in range(1, len(mean)):
        noise[:, t] = beta * noise[:, t - 1] + (1 - beta) * noise[:, t]
    return (mean + noise).clamp(-1, 1)


def cem(score, mean, std, samples=200, iterations=3, elites=0.05, bounded=False, beta=0.5, generator=None):
    """Cross-entropy method: refit a Gaussian to the best sequences, again and again.

    Args:
        score: (samples, horizon, a) -> (samples,), higher is better.
        mean, std: (horizon, a), or what broadcasts to it for std: where to start.
        elites: share of the samples that is refitted to, at least 4.
        bounded: as in VP2 the std is at most half of the way from the mean to the nearer bound.

    Returns the best sequence seen (horizon, a); VP2 takes the best of the last iteration.
    """
    best, best_score = None, -math.inf
    for _ in range(iterations):
        if bounded:
            std = torch.minimum(std.expand_as(mean), (1 - mean.abs()) / 2)
        x = proposals(mean, std, samples, beta, generator)
        scores = score(x)
        top = x[scores.topk(min(samples, max(4, int(elites * samples)))).indices]
        if scores.max() > best_score:
            best, best_score = x[scores.argmax()], scores.max()
        mean, std = top.mean(0), top.std(0, unbiased=False)
    return best


def mppi(score, mean, std, samples=200, gamma=0.05, beta=0.5, generator=None):
    """Model predictive path integral control: the mean of all sequences, weighted by exp(gamma * score).

    Williams et al. 2017. Arguments as for `cem`; returns the mean (horizon, a).
    """
    x = proposals(mean, std, samples, beta, generator)
    return torch.einsum("n,nta->ta", (gamma * score(x)).softmax(0), x)


@torch.no_grad()
def dream(world, frames, past, actions, seed, fps, context=1, steps=None, guidance=None):
    """What the world expects of real actions (n, horizon, a): video (n, 3, horizon, h, w) in [-1, 1]

    The candidates share context and noise; equal ones are dreamed once. frames: uint8 (t, h, w, 3), what was
    seen; past: (t-1, a), what was done; context: how many frames the dream starts from at most.
    """
    r, horizon = world.vae.time_stride, actions.shape[1]
    context = 1 + (min(context, len(frames)) - 1) // r * r                  # whole latent frames
    done = past[len(past) - context + 1:].expand(len(actions), -1, -1)
    beyond = actions[:, -1:].expand(-1, -horizon % r, -1)
    actions = torch.cat([done, actions, beyond], 1)                             # (n, t-1, a)
    z, back = world.latent_actions(actions).unique(dim=0, return_inverse=True)  # (m, t-1, k, d), (n,)
    noise = Draw(seed, device=z.device)

    def same_noise(draw, b, *shape):
        return noise(draw, 1, *shape).expand(b, *shape)

    seen = to_video(torch.from_numpy(frames[None, -context:]), z.device)
    fps = torch.full((len(z),), float(fps), device=z.device)
    video = world.rollout(seen, z, steps, guidance, fps, same_noise)
    return video[back][:, :, context:context + horizon]


class Episode:
    """A start-goal pair in closed loop: plan, act out the plan's first actions, look, plan again.

    agent: it plans in a "world" or, as an "oracle", in the simulator; at "random" it has no plan.
    """

    def __init__(self, args, process, world, cost, agent, problem, seed):
        make, self.goal, image = problem
        self.args, self.process, self.world, self.cost = args, process, world, cost
        self.agent, self.seed, self.env, device = agent, seed, make(1), process.device
        # for a plan, and for its candidates
        self.copies = {n: make(n) for n in (1, args.samples)} if agent == "oracle" else {}
        for _ in range(args.zero_actions_before):
            self.env.step(np.zeros((1, self.env.action_dim)))
        self.target = to_video(torch.from_numpy(image[None, None]), device)[0, :, 0]    # (3, h, w)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.frames = [self.env.render()[0]]                            # what was seen
        self.past = torch.zeros(0, self.env.action_dim, device=device)  # what was done (t-1, a)
        self.imagined = []                                              # (3, h, w) after each action

    def imagine(self, actions, last=False):
        """What the agent expects of actions (n, horizon, a): video (n, 3, horizon, h, w) in [-1, 1]

        last: only its last frame, (n, 3, 1, h, w); the simulator renders no other, which takes it long.
        """
        args = self.args
        if self.agent == "world":
            with self.process.autocast():
                video = dream(self.world, np.stack(self.frames), self.past, actions,
                              self.seed + len(self.past), self.env.fps, args.context, args.sampling_steps,
                              args.guidance)
            return video[:, :, -1:] if last else video
        copies, frames = self.copies[len(actions)], []                  # what really happens
        copies.set_state(np.repeat(self.env.get_state(), len(actions), 0))
        for t in range(actions.shape[1]):
            copies.step(actions[:, t].cpu().numpy())
            if not last or t == actions.shape[1] - 1:
                frames.append(copies.render())
        return to_video(torch.from_numpy(np.stack(frames, 1)), actions.device)

    def score(self, actions):
        return self.cost(self.imagine(actions, self.cost.last), self.target)

    def plan(self, mean, std):
        """Actions to come (horizon, a). mean: what is left of the last plan; std: of the noise around it."""
        args, noise = self.args, {"beta": self.args.beta, "generator": self.generator}
        if self.agent == "random":
            return proposals(torch.zeros_like(mean), std, 1, **noise)[0]
        if args.planner == "cem":
            bounded = args.env == "robodesk"
            return cem(self.score, mean, std, args.samples, args.iterations, args.elites, bounded, **noise)
        return mppi(self.score, mean, std, args.samples, gamma=args.gamma, **noise)

    def run(self, task):
        """Act until the task is solved or no step is left: whether it is solved, seconds of each plan."""
        args, seconds, success = self.args, [], False
        mean = self.past.new_zeros(args.horizon, self.env.action_dim)
        std = mean.new_tensor(args.std).expand(self.env.action_dim)
        queue = [mean[0]] * args.wait
        while len(self.past) < args.steps and not success:
            if not queue:
                began = time.time()
                plan = self.plan(mean, std)
                seconds.append(time.time() - began)
                queue = list(plan[:args.replan])
                # what is left of it, with its last action repeated
                mean = torch.cat([plan[args.replan:], plan[-1:].expand(args.replan, -1)])
                if self.agent != "random":
                    self.imagined += self.imagine(plan[None, :args.replan])[0].unbind(1)
            action = queue.pop(0)[None]                                         # (1, a)
            self.env.step(action.cpu().numpy())
            self.past = torch.cat([self.past, action])
            self.frames.append(self.env.render()[0])
            success = bool(self.env.success(task, self.goal)[0])
        return success, seconds

    def videos(self):
        """What was seen, what was imagined (if anything was), and the goal: (1, 3, t, h, w) each"""
        seen = to_video(torch.from_numpy(np.stack(self.frames)[None]))
        goal = self.target.cpu()[None, :, None].expand_as(seen)
        if not self.imagined:
            return [seen, goal]
        imagined = torch.cat([seen[:, :, :1 + self.args.wait], torch.stack(self.imagined, 1).cpu()[None]], 2)
        return [seen, imagined[:, :, :seen.shape[2]], goal]


def measure(start, task, pairs, args, picture):
    """A row of the table, {column: [values]}: start(problem, seed) are episodes of start-goal pairs"""
    won, seconds, shares = [], [], []
    runs = tqdm([(seed, i) for seed in args.seeds for i in range(len(pairs))], os.path.basename(picture),
                dynamic_ncols=True, disable=None, leave=False)
    for seed, i in runs:
        episode = start(pairs[i], (seed * 1000 + i) * 1000)
        before = episode.env.distances(task, episode.goal)
        solved, took = episode.run(task)
        after = episode.env.distances(task, episode.goal)
        shares.append({k: 1 - after[k] / before[k] for k in before if before[k] > NEAR})
        save_gif(f"{picture}-{seed}-{i:02d}.gif", episode.videos())
        won.append(solved)
        seconds += took
        runs.set_postfix_str(f"success {np.mean(won):.2f}")
    success = np.reshape(won, (len(args.seeds), len(pairs))).mean(1).tolist()
    low, high = wilson(np.mean(success), len(pairs))
    nearer = {}
    for k in before:
        by_seed = [[share[k] for share in row if k in share] for row in np.reshape(shares, (-1, len(pairs)))]
        nearer[f"{k} nearer"] = [float(np.mean(row)) for row in by_seed if row]
    return {"success": success, **nearer, "seconds a plan": [float(np.mean(seconds))] if seconds else [],
            "low": [low], "high": [high], "pairs": [len(pairs)], "samples": [args.samples]}


NEAR = 1e-3         # metres, or the toy's steps: who starts nearer to the goal has no distance to remove
DEFAULTS = {
    "toy": dict(task=tuple(toy.TASKS), planner="cem", samples=64, horizon=5, replan=2, steps=6, wait=0,
                context=1, std=[1.2], elites=0.2, sampling_steps=2, size=16, zero_actions_before=0),
    # VP2's, but for the sampler
    "robodesk": dict(task=desk.TASKS, planner="mppi", samples=None, horizon=10, replan=1, steps=15, wait=1,
                     context=2, std=[0.5, 0.5, 0.5, 0.1, 0.1], elites=0.05, sampling_steps=3, size=64,
                     zero_actions_before=1),                    # they are not counted
}
SAMPLES = {"open_slide": 800, "open_drawer": 800}               # VP2's, of other tasks 200


def parse(argv):
    parser = Parser(__doc__)
    add, count, share = parser.add_argument, number(int, 1, 1e6), number(float, 0, 1)
    add("--ckpt", help="run folder or checkpoint of train.py --mode adapt")
    add("--random", action="store_true", help="also act at random: the lower bound")
    add("--oracle", action="store_true", help="also plan in the true simulator: the upper bound")
    add("--env", default="toy", choices=DEFAULTS)
    add("--task", nargs="+", help="(all of the environment's)")
    add("--goals", default=DEFAULT_GOALS, help="RoboDesk's: folder (the default is filled up) or VP2's HDF5")
    add("--goal_from", type=count, help="RoboDesk's: start at most so many actions before the goal")
    add("--cost", default="pixels", choices=COSTS,
        help="what of a plan is compared with the goal: pixels or latents, of all its frames or the last")
    add("--classifier", help="success classifier of a single task, VP2's or of cost.py, besides --cost")
    add("--pairs", type=count, default=30, help="start-goal pairs a task")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2],
        help="of planner and dreams; the pairs stay")
    add("--planner", choices=("cem", "mppi"), help="(toy: cem, robodesk: mppi)")
    add("--samples", type=count, help="candidates of an iteration (64; robodesk 200, slide and drawer 800)")
    add("--iterations", type=count, default=3, help="of CEM")
    add("--elites", type=share, help="share of CEM's samples that is refitted to (toy 0.2, robodesk 0.05)")
    add("--gamma", type=number(float), default=0.05, help="MPPI's weight of the reward")
    add("--beta", type=share, default=0.5, help="correlation of the noise in time")
    add("--std", type=number(float), nargs="+", help="of the noise, one for all actions or one each")
    add("--horizon", type=count, help="actions of a plan (toy 5, robodesk 10)")
    add("--replan", type=count, help="actions before the next plan (toy 2, robodesk 1)")
    add("--steps", type=count, help="actions of an episode (toy 6, robodesk 15)")
    add("--wait", type=number(int), help="of them, zero actions before the first plan (toy 0, robodesk 1)")
    add("--context", type=count, help="frames that a dream starts from, at most (toy 1, robodesk 2)")
    add("--sampling_steps", type=count, help="Euler steps (toy 2, robodesk 3)")
    add("--guidance", type=number(float), default=1.0, help="guidance scale; 1: none")
    add("--vae_weights", help="where Open-Sora's VAE lies now; without --ckpt the VAE of --cost latent")
    add("--precision", default="auto", choices=PRECISIONS, help="bf16 autocast; auto: on cuda")
    add("--out", help="folder of results.json and GIFs (the run's, or out/plan-ENV), or to collect in")
    add("--collect", choices=("robodesk",), help="record episodes instead of planning; what is there stays")
    add("--episodes", type=count, default=400, help="to collect")
    add("--workers", type=count, default=os.cpu_count(), help="processes that collect; all make the same")
    add("--look", choices=desk.LOOKS, help="RoboDesk's (that of --ckpt, else published); fast: no shadows")
    default = DEFAULTS[parser.parse_args(argv).env]
    parser.set_defaults(**default)
    args = parser.parse_args(argv)
    if args.replan > args.horizon:
        parser.error(f"--replan {args.replan}: a plan has only --horizon {args.horizon} actions")
    dims = len(default["std"])
    if len(args.std) not in (1, dims):
        parser.error(f"--std: takes 1 number{f' or {dims}' if dims > 1 else ''}, not {len(args.std)}")
    for task in args.task:
        if task not in default["task"]:
            parser.error(f"--task {task}: {args.env} has {', '.join(default['task'])}")
    if args.classifier and len(args.task) != 1:
        parser.error("--classifier: it knows one task; name it with --task")
    if args.goal_from and args.env != "robodesk":
        parser.error("--goal_from: RoboDesk's goals alone are recorded")
    if not (args.ckpt or args.random or args.oracle or args.collect):
        parser.error("--ckpt: which run? (or --random, --oracle)")
    return args


def open_world(args, device):
    """The world of --ckpt, the data that it is adapted to, the pixels of its frames, and its step."""
    state = load_checkpoint(args.ckpt)
    config, world = state["config"], restore(state, args.vae_weights).to(device).eval()
    if not world.adapter:
        raise UserError(f"{args.ckpt}: has no adapter from real actions; make one: "
                        f"train.py --mode adapt --init {args.ckpt} --data SOURCE")
    robot = toy.EMBODIMENTS.get(config["data"])             # whose actions may be as many as a desk's
    body = robot if args.env == "toy" else None if robot else desk.Desk
    if body is None or world.adapter.action_dim != body.action_dim:
        raise UserError(f"{args.ckpt}: is adapted to the {world.adapter.action_dim}-dimensional actions of "
                        f"{config['data']}, not to {args.env}")
    if args.env == "robodesk":
        # without a look the world is older than there being two
        look = world.look or "published"
        args.look = same_look({f"--ckpt {args.ckpt}": look, "--look": args.look})
    return world, config["data"], config["size"], state["step"]


def main(argv):
    args = parse(argv)
    if args.collect:
        return desk.collect(args.out or os.path.join("data", args.collect), args.episodes,
                            look=args.look or "published", seed=args.seeds[0], workers=args.workers)
    process = Process.here(precision=args.precision)
    world, robot, step = None, "held-out", None
    out = args.out or (run_folder(args.ckpt) if args.ckpt else os.path.join("out", f"plan-{args.env}"))
    if args.ckpt:
        world, robot, args.size, step = open_world(args, process.device)
    if args.env == "robodesk":
        args.look = args.look or "published"
    cost = open_cost(args, world, process.device)
    open_results(out)
    pictures = os.path.join(out, "samples", "plan")
    os.makedirs(pictures, exist_ok=True)
    apart = ["ckpt", "task", "collect", "episodes", "workers", "out", "random", "oracle", "samples"]
    if args.ckpt:
        apart.append("vae_weights")         # which is the world's, wherever it lies
    protocol = {k: v for k, v in vars(args).items() if k not in apart} | {
        "precision": process.precision, "cost": args.cost + (" and classifier" if args.classifier else ""),
        "nearer": "share of the distance to the goal state that an episode removes (-: there is none)",
        "success": "the task's own test at any recorded state", "interval": "Wilson, 95 %, n = pairs"}
    began, rows = time.time(), {}
    asked = {"world": args.ckpt, "random": args.random, "oracle": args.oracle}
    for task in args.task:
        settings = Namespace(**vars(args) | {"samples": args.samples or SAMPLES.get(task, 200)})
        pairs = problems(args, task, robot)
        for agent in [name for name in asked if asked[name]]:
            start = partial(Episode, settings, process, world, cost, agent)
            picture = os.path.join(pictures, f"{task}-{agent}")
            rows[f"{task} {agent}"] = measure(start, task, pairs, settings, picture)
            save_results(out, args.ckpt, step, {"plan": rows}, protocol)
    table("plan", rows)
    print(", ".join(f"{k} {v}" for k, v in protocol.items()) + f"; {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    program(main)
