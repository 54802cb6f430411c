"""Start-goal pairs that plans are tried on: the toy world's, RoboDesk's recorded here, and VP2's.

RoboDesk's goals are scripted episodes (ours) up to their first success. Their files hold every state, so that
a pair may start anywhere in them: at the beginning, or a few actions before the goal.
"""

import glob
import itertools
import os
from functools import partial

import imageio.v3 as imageio
import numpy as np
from PIL import Image

import toy
from desk import ROUTES, TASKS, Desk, check_look, one_desk, play, resized, write_episode
from formats import HDF5_ENDINGS, UserError, optional, same_look, tell

DEFAULT_GOALS = os.path.join("out", "goals")


def problems(args, task, robot):
    """Start-goal pairs of a task: (n -> n copies of the environment at the start, goal state, goal image)"""
    if args.env == "toy":
        world, goals = toy.task_pairs(task, robot, args.pairs, size=args.size)
        starts = world.get_state()
        world.set_state(goals)
        images, goals = world.render(), goals[:, None]
    else:
        if args.goals == DEFAULT_GOALS:
            make_goals(task, args.goals, args.pairs, args.size, args.look)
        pairs = read_goals(task, args.goals, args.pairs, args.size, args.look, args.goal_from)
        starts, goals, images = zip(*pairs)
        one_desk(args.size, args.look).tell_how_it_renders()

    def make(i, n):
        # 1000: the seed of `task_pairs`
        if args.env == "robodesk":
            env = Desk(n, args.size, look=args.look)
        else:
            env = toy.ToyWorld(robot, [i] * n, 1000, args.size)
        env.set_state(np.repeat(starts[i][None], n, 0))
        return env

    return [(partial(make, i), goals[i], images[i]) for i in range(len(images))]


def make_goals(task, folder, n, size=64, look="published", steps=24):
    """Record start-goal pairs as goal_TASK_i until there are n: scripted episodes that succeed."""
    os.makedirs(folder, exist_ok=True)
    check_look(folder, look)
    desk = one_desk(size, look)
    desk.tell_how_it_renders()
    pattern = os.path.join(glob.escape(folder), f"goal_{task}_*.mp4")
    for i in itertools.count():
        if len(glob.glob(pattern)) >= n:
            return
        path = os.path.join(folder, f"goal_{task}_{i:04d}")
        if os.path.exists(path + ".mp4"):
            continue
        desk.reset(2 ** 31 + i + 1)                             # no seed of `collect`
        # the arm cannot, see `ROUTES`
        actions = pull_drawer(desk) if task == "open_drawer" else desk.script(ROUTES[task])
        frames, labels = play(desk, actions, steps, task)
        if labels["solved"][-1, TASKS.index(task)]:
            write_episode(path, frames, labels, desk.fps)


def pull_drawer(desk):
    """One action (5,), before which the drawer of desk 0 comes out by itself"""
    state = desk.get_state()
    state[0, 18] = -0.25                                        # its joint
    desk.set_state(state)
    yield np.zeros(5)


def read_goals(task, path, n, size=64, look="published", before=None):
    """Up to n pairs of start state (73,), goal state (1, 73), goal image (size, size, 3), recorded or VP2's.

    path: a folder of goal_TASK_*.mp4 and .npz; or VP2's HDF5 file, or a folder with robodesk_TASK/goals.hdf5.
    before: at most so many actions lead from start to goal; None: as many as were recorded.
    A goal state is None where VP2's file has none. UserError: there is no goal, or goals have another look.
    """
    file = path if path.endswith(HDF5_ENDINGS) else os.path.join(path, f"robodesk_{task}", "goals.hdf5")
    found = []                                                  # start, states (t, 73), images (t, h, w, 3)
    if os.path.isfile(file):
        same_look({f"--goals {path}": "published", "--look": look})
        with optional("h5py").File(file) as f:
            for name in sorted(f["data"], key=lambda k: int(k.split("_")[-1]))[:n]:
                demo = f["data"][name]
                start = int(demo["start_index"][()]) if "start_index" in demo else 0
                found.append((start, demo["states"][:, :73], demo["obs/camera_image"][()]))
    else:
        check_look(path, look)
        for video in sorted(glob.glob(os.path.join(glob.escape(path), f"goal_{task}_*.mp4")))[:n]:
            with np.load(video[:-4] + ".npz") as labels:
                found.append((0, labels["states"], imageio.imread(video, plugin="pyav")))
    if not found:
        raise UserError(f"--goals {path}: no goal of the task {task}")
    pairs = []
    for start, states, images in found:
        goal = states[-1:] if len(states) == len(images) else None
        if before:
            start = max(start, len(states) - 1 - before)
        if goal is None:
            tell(path, f"--goals {path}: its images have no states: hand nearer, object nearer stay empty")
        pairs.append((states[start], goal, resized(Image.fromarray(images[-1]), size)))
    return pairs
