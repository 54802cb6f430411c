"""RoboDesk (Kannan et al. 2021), a simulated desk with a robot arm, behind the toy world's interface.

The environment is the published one; only rendering (its Pillow call is gone) and state access (its
`qpos_objects` are velocities) are ours. Protocol of VP2 (Tian et al. 2023, arXiv 2304.13723): an action is
held for 50 control steps. Rendered headless (MUJOCO_GL=egl, or osmesa); in software that is most of the time.
"""

import contextlib
import glob
import importlib.util
import io
import itertools
import os
from typing import NamedTuple

import av
import imageio.v3 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

from formats import HDF5_ENDINGS, UserError, first_line, optional, whole


class Route(NamedTuple):
    """How a scripted policy (ours) does a task: the hand goes beside an object, then through it (metres)."""
    kind: str                       # where MuJoCo lists the object: xpos (bodies), site_xpos or geom_xpos
    object: str
    aside: tuple                    # from the object to the place beside it
    through: tuple                  # from the object to where the hand goes then
    clear: tuple = (0, 0, 0)        # from the place beside it, while the hand is past it: how to come back
    fingers: int = 0                # -1: closed, 0: half open


ROUTES = {
    "push_red": Route("xpos", "red_button", (0, 0, .1), (0, 0, -.1), fingers=-1),
    "push_green": Route("xpos", "green_button", (0, 0, .1), (0, 0, -.1), fingers=-1),
    "push_blue": Route("xpos", "blue_button", (0, 0, .1), (0, 0, -.1), fingers=-1),
    "open_slide": Route("site_xpos", "slide_handle", (-.12, 0, 0), (.5, .03, 0), (0, -.15, 0)),
    "open_drawer": Route("geom_xpos", "drawer_handle", (0, .05, .05), (0, -.3, -.02)),  # rarely succeeds
    "upright_block_off_table": Route("xpos", "upright_block", (-.15, 0, -.05), (.3, 0, -.02), (0, 0, .15)),
    "flat_block_off_table": Route("xpos", "flat_block", (-.15, 0, -.05), (.3, 0, -.02), (0, 0, .15)),
}
TASKS = tuple(ROUTES)


@contextlib.contextmanager
def drawing():
    """What GL raises when it does not work has many forms."""
    try:
        yield
    except Exception as error:
        how = f"MUJOCO_GL={os.environ['MUJOCO_GL']} ({first_line(error)})"
        raise UserError(f"RoboDesk cannot render with {how}: egl needs Debian's libegl1 and libgl1-mesa-dri, "
                        "osmesa libosmesa6") from None


def environment(size):
    """The published environment, observations and rendering replaced. UserError where it cannot run."""
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
                camera = mujoco.Camera(self.physics, 120, 120, camera_id=-1)
                view = camera._render_camera
                view.distance, view.azimuth, view.elevation = 1.8, 90, -60
                view.lookat[:] = [0, 0.535, 1.1]
                image = camera.render()
                camera._scene.free()
            if not image.any():
                raise UserError("RoboDesk rendered an all-black frame with "
                                f"MUJOCO_GL={os.environ['MUJOCO_GL']}: try another (egl, osmesa)")
            return resized(Image.fromarray(image).crop((16.75, 25.0, 105.0, 88.75)), self.image_size)

    return Environment(action_repeat=50, image_size=size)


def resized(image, size):
    """(size, size, 3) uint8; as it is, where it has that size"""
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


class Desk:
    """n desks, simulated one after the other.

    A state has 73 numbers: robot qpos (9), robot qvel (9), object qpos (29), object qvel (26). An action has
    5 in [-1, 1]: the gripper's motion along x, y, z, the wrist's, and how far the fingers open.
    """
    action_dim, fps = 5, 10

    def __init__(self, n=1, size=64, seed=0):
        self.n, self.size, self.env = n, size, environment(size)
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

    def success(self, task, goal=None):
        """The environment's own test in the present states: (n,) bool. Goal states do not matter."""
        return np.array([self.env._get_task_reward(task, "success") > 0 for _ in self._each()])

    def script(self, task):
        """Endless actions (5,) for desk 0 along the task's `Route`: go beside the object, then through it."""
        route, beside = ROUTES[task], False
        for t in itertools.count():
            self._load(0)
            named = self.env.physics.named.data
            hand = named.site_xpos["end_effector"]
            place = getattr(named, route.kind)[route.object]
            target = place + route.aside
            beside = beside or t == 10 or np.linalg.norm(target - hand) < 0.1
            if beside:
                target = place + route.through
            elif hand[0] > target[0] + 0.05:
                target = target + route.clear
            yield np.concatenate([np.clip(5 * (target - hand), -1, 1), [0, route.fingers]])


def random_actions(rng, keep=0.8):
    """Endless correlated random actions (5,)."""
    action = rng.uniform(-1, 1, 5)
    while True:
        yield action
        action = keep * action + (1 - keep) * rng.normal(0, 2, 5)


def play(desk, task, actions, steps, until_success=False):
    """Take up to `steps` of the actions on desk 0: frames (t, size, size, 3) uint8, and a dict of
    `actions` (t-1, 5), `states` (t, 73), `success`, `task`.
    """
    frames, states = [desk.render()[0]], [desk.get_state()[0]]
    done, success = [], False
    for action in itertools.islice(actions, steps):
        done.append(np.clip(action, -1, 1).astype(np.float32))
        states.append(desk.step(done[-1][None])[0])
        frames.append(desk.render()[0])
        success |= bool(desk.success(task)[0])
        if success and until_success:
            break
    labels = dict(actions=np.stack(done), states=np.stack(states), success=success, task=task)
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


def collect(folder, episodes, size=64, seed=0, steps=15):
    """Record the episodes that are not in the folder yet: 70 % scripted with noise, 30 % random."""
    os.makedirs(folder, exist_ok=True)
    desk = Desk(1, size)
    for i in tqdm(range(episodes), "recording", dynamic_ncols=True, disable=None):
        rng = np.random.default_rng((seed, i))
        task = TASKS[rng.integers(len(TASKS))]
        scripted = rng.random() < 0.7
        path = os.path.join(folder, f"{'script' if scripted else 'random'}_{task}_{i:05d}")
        if not os.path.exists(path + ".mp4"):
            desk.reset(seed * 10 ** 6 + i)
            noisy = (a + rng.normal(0, (0.4, 0.4, 0.4, 0.2, 0.2)) for a in desk.script(task))
            actions = noisy if scripted else random_actions(rng)
            write_episode(path, *play(desk, task, actions, steps), desk.fps)


def make_goals(task, folder, n, size=64, steps=24):
    """Record start-goal pairs as goal_TASK_i until there are n: scripted episodes that succeed."""
    os.makedirs(folder, exist_ok=True)
    desk = Desk(1, size)
    pattern = os.path.join(glob.escape(folder), f"goal_{task}_*.mp4")
    for i in itertools.count():
        if len(glob.glob(pattern)) >= n:
            return
        path = os.path.join(folder, f"goal_{task}_{i:04d}")
        if os.path.exists(path + ".mp4"):
            continue
        desk.reset(2 ** 31 + i + 1)                             # no seed of `collect`
        if task == "open_drawer":                               # a script is weak at it
            episode = pull_drawer(desk)
        else:
            episode = play(desk, task, desk.script(task), steps, until_success=True)
        if episode[1]["success"]:
            write_episode(path, *episode, desk.fps)


def pull_drawer(desk):
    """An episode of two frames, as `play` makes them, in which the drawer comes out by itself"""
    before, start = desk.render(), desk.get_state()
    end = start.copy()
    end[0, 18] = -0.25                                          # its joint
    desk.set_state(end)
    labels = dict(actions=np.zeros((1, 5), np.float32), states=np.concatenate([start, end]),
                  success=bool(desk.success("open_drawer")[0]), task="open_drawer")
    return np.concatenate([before, desk.render()]), labels


def goals(task, path, n, size=64):
    """Up to n pairs of start state (73,) and goal image (size, size, 3), recorded episodes or VP2's.

    path: a folder of goal_TASK_*.mp4 and .npz; or VP2's HDF5 file, or a folder with robodesk_TASK/goals.hdf5.
    """
    file = path if path.endswith(HDF5_ENDINGS) else os.path.join(path, f"robodesk_{task}", "goals.hdf5")
    pairs = []
    if os.path.isfile(file):
        with optional("h5py").File(file) as f:
            for name in sorted(f["data"], key=lambda k: int(k.split("_")[-1]))[:n]:
                demo = f["data"][name]
                start = int(demo["start_index"][()]) if "start_index" in demo else 0
                pairs.append((demo["states"][start][:73], demo["obs/camera_image"][-1]))
    else:
        for video in sorted(glob.glob(os.path.join(glob.escape(path), f"goal_{task}_*.mp4")))[:n]:
            with np.load(video[:-4] + ".npz") as labels:
                pairs.append((labels["states"][0], imageio.imread(video, plugin="pyav")[-1]))
    if not pairs:
        raise UserError(f"--goals {path}: no goal of the task {task}")
    return [(state, resized(Image.fromarray(image), size)) for state, image in pairs]
