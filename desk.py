"""RoboDesk (Kannan et al. 2021), a simulated desk with a robot arm, behind the toy world's interface.

The environment is the published one; only rendering (its Pillow call is gone) and state access (its
`qpos_objects` are velocities) are ours. As in VP2 (Tian et al. 2023, arXiv 2304.13723) an action is held for
50 control steps. Rendered headless (MUJOCO_GL=egl, or osmesa); in software that is most of the time.
"""

import contextlib
import glob
import importlib.util
import io
import itertools
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from formats import UserError, first_line, read_look, same_look, tell, whole


class Route(NamedTuple):
    """How a scripted policy (ours) does a task: places that the hand goes to, one after the other."""
    kind: str                       # where MuJoCo lists the object: xpos (bodies), site_xpos or geom_xpos
    object: str
    places: tuple                   # metres from where the object is by then; the last one is beyond it
    fingers: int = 0                # -1: closed, 0: half open


PRESS = (0, 0, .12), (0, 0, -.05)
ROUTES = {
    "push_red": Route("xpos", "red_button", PRESS, fingers=-1),
    "push_green": Route("xpos", "green_button", PRESS, fingers=-1),
    "push_blue": Route("xpos", "blue_button", PRESS, fingers=-1),
    "open_slide": Route("site_xpos", "slide_handle", ((-.1, -.12, 0), (-.1, 0, 0), (.5, 0, 0))),
    # by some 0.1 m of the 0.2: so near to its foot the arm does not fold
    "open_drawer": Route("geom_xpos", "drawer_handle", ((0, .03, .12), (0, .03, -.01), (0, -.3, -.15)), -1),
    "upright_block_off_table": Route("xpos", "upright_block",
                                     ((-.12, 0, .1), (-.12, 0, -.06), (.3, 0, -.06))),
    "flat_block_off_table": Route("xpos", "flat_block", ((0, .1, .12), (0, .1, 0), (0, -.3, 0))),
}
TASKS = tuple(ROUTES)
JOINTS = {"open_slide": "slide_joint", "open_drawer": "drawer_joint"}       # others are called as the object
CLOSE_SLIDE = Route("site_xpos", "slide_handle", ((.1, -.12, 0), (.1, 0, 0), (-.5, 0, 0)))
# of those routes, CLOSE_SLIDE and nudges in `turn`: a button moves but once, a ball rolls by itself
LIKING = np.array((1, 1, 1, 4, 8, 4, 4, 2, 1, 4, 4))
LOOKS = {"published": 120, "fast": 240}         # pixels drawn before the benchmark's crop is resized


@contextlib.contextmanager
def drawing():
    """What GL raises when it does not work has many forms."""
    try:
        yield
    except Exception as error:
        how = f"MUJOCO_GL={os.environ['MUJOCO_GL']} ({first_line(error)})"
        raise UserError(f"RoboDesk cannot render with {how}: egl needs Debian's libegl1 and libgl1-mesa-dri, "
                        "osmesa libosmesa6") from None


def environment(size, look):
    """The published environment, observations and rendering replaced. UserError where it cannot run.

    The look "fast" (ours) has no shadows, whose map costs a software renderer most, and no reflections; its
    edges are smoothed by more pixels instead of more samples a pixel. Its desk is darker: another look.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    for package in ("gym", "mujoco", "dm_control", "robodesk"):
        if importlib.util.find_spec(package) is None:
            install = 'pip install robodesk==1.0.0 dm_control==1.0.50 "mujoco<4" gym'
            raise UserError(f"no {package} here: {install}")
    with drawing(), contextlib.redirect_stderr(io.StringIO()):  # gym says at each import that it is old
        from dm_control import mujoco
        from dm_control.rl.control import PhysicsError
        from robodesk import RoboDesk

    class Environment(RoboDesk):
        unstable = PhysicsError

        def _get_obs(self):                                     # theirs renders at each call
            return {}

        def render(self):
            """uint8 (size, size, 3), from the benchmark's camera"""
            with drawing():
                pixels = LOOKS[look]
                camera = mujoco.Camera(self.physics, pixels, pixels, camera_id=-1)
                view = camera._render_camera
                view.distance, view.azimuth, view.elevation = 1.8, 90, -60
                view.lookat[:] = [0, 0.535, 1.1]
                image = camera.render()
                camera._scene.free()
            if not image.any():
                raise UserError("RoboDesk rendered an all-black frame with "
                                f"MUJOCO_GL={os.environ['MUJOCO_GL']}: try another (egl, osmesa)")
            crop = [x * pixels / 120 for x in (16.75, 25.0, 105.0, 88.75)]
            return resized(Image.fromarray(image).crop(crop), self.image_size)

    env = Environment(action_repeat=50, image_size=size, reward="sparse")       # the one that costs least
    if look == "fast":                                          # read when the first frame is drawn
        model = env.physics.model
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0
    return env


def resized(image, size):
    """(size, size, 3) uint8; as it is, where it has that size"""
    return np.array(image.resize((size, size), Image.Resampling.LANCZOS))


class Desk:
    """n desks, simulated one after the other.

    A state has 73 numbers: robot qpos (9), robot qvel (9), object qpos (29), object qvel (26). An action has
    5 in [-1, 1]: the gripper's motion along x, y, z, the wrist's, and how far the fingers open.
    """
    action_dim, fps = 5, 10

    def __init__(self, n=1, size=64, seed=0, look="published"):
        self.n, self.size, self.look, self.env = n, size, look, environment(size, look)
        self.reset(seed)

    def reset(self, seed=0):
        """Put robot and objects at random places, the same in all n."""
        before = np.random.get_state()
        np.random.seed(seed)                    # the environment draws from this global state
        self.env.reset()
        np.random.set_state(before)
        self.set_state(np.repeat(self._read()[None], self.n, 0))

    def _read(self):
        """The state (73,) that the simulator is in"""
        q, v, k = self.env.physics.data.qpos, self.env.physics.data.qvel, self.env.num_joints
        return np.concatenate([q[:k], v[:k], q[k:], v[k:]])

    def _load(self, i):
        """Put desk i into the simulator, unless it is there."""
        if self.loaded == i:
            return
        physics, k = self.env.physics, self.env.num_joints
        robot_q, robot_v, q, v = np.split(self.states[i], [k, 2 * k, k + physics.model.nq])
        physics.reset()
        physics.data.qpos[:] = np.concatenate([robot_q, q])
        physics.data.qvel[:] = np.concatenate([robot_v, v])
        physics.forward()
        self.env.physics_copy.data.qpos[:] = physics.data.qpos
        self.loaded = i

    def _each(self):
        """The desks' numbers, while each is in the simulator"""
        for i in range(self.n):
            self._load(i)
            yield i

    def get_state(self):
        """(n, 73)"""
        return self.states.copy()

    def set_state(self, states):
        self.states, self.loaded = np.array(states, np.float64), None

    def step(self, actions):
        """Apply actions (n, 5), clipped to [-1, 1]: states (n, 73)"""
        for i in self._each():
            try:
                self.env.step(np.clip(actions[i], -1, 1))
                self.states[i] = self._read()
            except self.env.unstable:           # it diverged: the desk stays as it was
                self.loaded = None
        return self.get_state()

    def render(self):
        """uint8 (n, size, size, 3)"""
        return np.stack([self.env.render() for _ in self._each()])

    def tell_how_it_renders(self):
        """A line on stderr where it is done in software: how long a frame takes, and what would help"""
        self.render()                                           # the first one takes longer
        began = time.time()
        self.render()
        ms = 1000 * (time.time() - began)
        with self.env.physics.contexts.gl.make_current() as context:
            name = context.call(importlib.import_module("OpenGL.GL").glGetString, 0x1F01).decode()  # RENDERER
        if any(word in name.lower() for word in ("llvmpipe", "softpipe", "swrast")):
            faster = "" if self.look == "fast" else ", as would --look fast where all goals are our own"
            tell("frames", f"RoboDesk is drawn in software ({name}), {ms:.0f} ms a frame: a GPU with "
                           f"MUJOCO_GL=egl would help{faster}")

    def success(self, task, goal=None):
        """The environment's own test in the present states: (n,) bool. Goal states do not matter."""
        return np.array([self.env._get_task_reward(task, "success") > 0 for _ in self._each()])

    def solved(self):
        """Which of `TASKS` are done on desk 0: a list of bool"""
        return [bool(self.success(task)[0]) for task in TASKS]

    def places(self, route):
        """Where the hand and the route's object are on desk 0: two arrays (3,), metres"""
        self._load(0)
        named = self.env.physics.named.data
        return named.site_xpos["end_effector"], getattr(named, route.kind)[route.object]

    def distances(self, task, goal):
        """Metres from desk 0 to a goal state (1, 73), of the hand and of the object; nan where that is None

        The object's by its joint: a button stays where it is, but goes down by a centimetre.
        """
        if goal is None:
            return {"hand": np.nan, "object": np.nan}
        there = Desk(1, self.size, look=self.look)              # so that nothing changes here
        there.set_state(goal)
        joint, where = JOINTS.get(task, ROUTES[task].object), []
        for desk in (self, there):
            hand = desk.places(ROUTES[task])[0]
            where.append((hand, desk.env.physics.named.data.qpos[joint][:3]))   # after that a block's turn
        return {name: float(np.linalg.norm(a - b)) for name, a, b in zip(("hand", "object"), *where)}

    def script(self, route, patience=8):
        """Actions (5,) for desk 0 along a `Route`, up to `patience` of them to a place, until it is stuck."""
        at, taken, before = 0, 0, np.inf
        while True:
            hand, place = self.places(route)
            last, away = at == len(route.places) - 1, place + route.places[at] - hand
            stuck = taken > 1 and np.linalg.norm(hand - before) < 0.01
            if last and stuck:                  # to push on would be actions without effect
                return
            if not last and (stuck or np.linalg.norm(away) < 0.04 or taken == patience):
                at, taken, away = at + 1, 0, place + route.places[at + 1] - hand
            taken, before = taken + 1, hand.copy()
            yield np.concatenate([np.clip(12 * away, -1, 1), [0, route.fingers]])       # 1: some 8 cm


def random_actions(rng, keep=0.8):
    """Endless correlated random actions (5,)."""
    action = rng.uniform(-1, 1, 5)
    while True:
        yield action
        action = keep * action + (1 - keep) * rng.normal(0, 2, 5)


def nudge(name, rng):
    """A route that pushes a body on the table in some direction"""
    angle = rng.uniform(-np.pi, np.pi)
    way = np.array([np.cos(angle), np.sin(angle), 0])
    return Route("xpos", name, (-.12 * way + (0, 0, .08), -.12 * way, .3 * way))


def turn(desk, rng):
    """Actions (5,) of up to 16 steps: the hand goes for what is there, rather what is near, or wanders."""
    nudges = [nudge(name, rng) for name in ("ball", "upright_block", "flat_block")]
    routes = [*ROUTES.values(), CLOSE_SLIDE, *nudges]
    hand, places = desk.places(routes[0])[0], np.array([desk.places(route)[1] for route in routes])
    weights = LIKING * np.exp(-np.linalg.norm(places - hand, axis=1) / 0.3) * (places[:, 2] > 0.6)
    route = routes[rng.choice(len(routes), p=weights / weights.sum())]
    actions = random_actions(rng) if rng.random() < 0.15 else desk.script(route)
    return itertools.islice(actions, int(rng.integers(8, 17)))


def behave(desk, rng):
    """Endless actions (5,), noisy, of some speed: turns, in half of the episodes after one task's script."""
    noise, speed = rng.uniform(0, 0.4) * np.array((1, 1, 1, .5, .5)), rng.uniform(0.7, 1)
    task = desk.script(ROUTES[rng.choice(TASKS)])
    actions = itertools.islice(task, 24 if rng.random() < 0.5 else 0)
    while True:
        for action in actions:
            yield speed * action + rng.normal(0, noise)
        actions = turn(desk, rng)


def play(desk, actions, steps, until=None):
    """Take up to `steps` of the actions on desk 0, or until a task is done: frames (t, size, size, 3) uint8,
    and a dict of `actions` (t-1, 5), `states` (t, 73), `solved` (t, tasks) bool, `look`.
    """
    frames, states, solved, done = [], [], [], []

    def see():
        frames.append(desk.render()[0])
        states.append(desk.get_state()[0])
        solved.append(desk.solved())

    see()
    for action in itertools.islice(actions, steps):
        done.append(np.clip(action, -1, 1).astype(np.float32))
        desk.step(done[-1][None])
        see()
        if until and solved[-1][TASKS.index(until)]:
            break
    labels = dict(actions=np.stack(done), states=np.stack(states), solved=np.array(solved), look=desk.look)
    return np.stack(frames), labels


def write_episode(path, frames, labels, fps):
    """Arrays `labels` as path.npz and `frames` (t, h, w, 3) uint8 as path.mp4; where that is, all is."""
    with whole(path + ".npz") as part, open(part, "wb") as file:
        np.savez(file, **labels)
    with whole(path + ".mp4") as part, av.open(part, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "0"})     # only colours lose a little
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in [*map(av.VideoFrame.from_ndarray, frames), None]:          # None: the end
            file.mux(stream.encode(frame))


def path_of(folder, i):
    return os.path.join(folder, f"desk_{i:05d}")


@cache
def one_desk(size, look):
    """A process's desk: contexts of GL are few, and slow to come by"""
    return Desk(1, size, look=look)


def record(i, folder, size, look, seed, steps):
    """Write episode i. It depends on these numbers alone, not on the process and what that has done."""
    desk, rng = one_desk(size, look), np.random.default_rng((seed, i))
    desk.reset(int(rng.integers(2 ** 31)))                      # the seeds above are those of goals
    actions = behave(desk, rng)
    for action in itertools.islice(actions, int(rng.integers(9))):      # so that not all begin far away
        desk.step(action[None])
    write_episode(path_of(folder, i), *play(desk, actions, steps), desk.fps)


def follow_parent():
    """In a process that records: after Ctrl-C its episode is finished, but it ends where its parent does."""
    def end():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end, daemon=True).start()


def collect(folder, episodes, size=64, look="published", seed=0, steps=16, workers=1):
    """Record the episodes that are not in the folder yet. Each can be used as soon as its mp4 is there."""
    os.makedirs(folder, exist_ok=True)
    check_look(folder, look)
    one_desk(size, look).tell_how_it_renders()
    missing = [i for i in range(episodes) if not os.path.exists(path_of(folder, i) + ".mp4")]
    pool = ProcessPoolExecutor(workers, get_context("spawn"), follow_parent)    # GL does not survive a fork
    try:
        made = pool.map(partial(record, folder=folder, size=size, look=look, seed=seed, steps=steps), missing)
        for _ in tqdm(made, "recording", len(missing), dynamic_ncols=True, disable=None):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def check_look(folder, look):
    """UserError if episodes in a folder have another look."""
    for video in glob.glob(os.path.join(glob.escape(folder), "*.mp4"))[:1]:
        same_look({folder: read_look(video), "--look": look})
