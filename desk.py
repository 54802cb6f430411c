"""RoboDesk (Kannan et al. 2021), a simulated desk with a robot arm, behind the toy world's interface.

    pip install robodesk==1.0.0 dm_control==1.0.50 "mujoco<4" gym               # and Debian's libegl1 libgl1-mesa-dri

The environment is the published one; only rendering (its Pillow call is gone) and state access (its `qpos_objects` are
velocities) are ours. Protocol of VP2 (Tian et al. 2023, arXiv 2304.13723): an action is held for 50 control steps. Rendered
headless: MUJOCO_GL=egl, or osmesa. A frame takes a fraction of a second in software, a step a tenth of that.
"""

import contextlib
import glob
import importlib.util
import io
import itertools
import os

import av
import imageio.v3 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

TASKS = ("push_red", "push_green", "push_blue", "open_slide", "open_drawer", "upright_block_off_table", "flat_block_off_table")


class DeskError(Exception):
    """Why RoboDesk cannot be used here, in one line."""


@contextlib.contextmanager
def drawing():
    """What GL raises when it does not work has many forms."""
    try:
        yield
    except Exception as error:
        raise DeskError(f"RoboDesk cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({str(error).splitlines()[0]}): egl needs Debian's "
                        "libegl1 and libgl1-mesa-dri, osmesa libosmesa6") from None


def environment(size):
    """The published environment, with observations and rendering replaced."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    for package in ("gym", "mujoco", "dm_control", "robodesk"):
        if importlib.util.find_spec(package) is None:
            raise DeskError(f'no {package} here: pip install robodesk==1.0.0 dm_control==1.0.50 "mujoco<4" gym')
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
                raise DeskError(f"RoboDesk rendered an all-black frame with MUJOCO_GL={os.environ['MUJOCO_GL']}: try another (egl, osmesa)")
            image = Image.fromarray(image).crop((16.75, 25.0, 105.0, 88.75))
            return np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS))

    return Environment(action_repeat=50, image_size=size)


class Desk:
    """n desks, simulated one after the other.

    A state has 73 numbers: robot qpos (9), robot qvel (9), object qpos (29), object qvel (26). An action has 5 in [-1, 1]:
    the gripper's motion along x, y, z, the wrist's, and how far the fingers open.
    """
    action_dim, fps = 5, 10

    def __init__(self, n=1, size=64, seed=0):
        self.n, self.size, self.env = n, size, environment(size)
        self.reset(seed)

    def reset(self, seed=0):
        """Robot and objects at random places, the same in all n."""
        before = np.random.get_state()
        np.random.seed(seed)                                    # the environment draws from numpy's global state
        self.env.reset()
        np.random.set_state(before)
        self.set_state(np.repeat(self._read()[None], self.n, 0))
        return self.get_state()

    def _read(self):
        q, v, k = self.env.physics.data.qpos, self.env.physics.data.qvel, self.env.num_joints
        return np.concatenate([q[:k], v[:k], q[k:], v[k:]])

    def _load(self, i):
        """Put desk i into the simulator, unless it is there."""
        if self.loaded != i:
            physics, state, k = self.env.physics, self.states[i], self.env.num_joints
            objects = physics.model.nq - k
            physics.reset()
            physics.data.qpos[:] = np.concatenate([state[:k], state[2 * k:2 * k + objects]])
            physics.data.qvel[:] = np.concatenate([state[k:2 * k], state[2 * k + objects:]])
            physics.forward()
            self.env.physics_copy.data.qpos[:] = physics.data.qpos
            self.loaded = i

    def get_state(self):
        """(n, 73)"""
        return self.states.copy()

    def set_state(self, states):
        self.states, self.loaded = np.array(states, np.float64), None

    def step(self, actions):
        """Apply actions (n, 5)."""
        for i, action in enumerate(np.clip(actions, -1, 1)):
            self._load(i)
            try:
                self.env.step(action)
                self.states[i] = self._read()
            except self.env.unstable:                           # the simulation diverged: the desk stays as it was
                self.loaded = None
        return self.get_state()

    def render(self):
        """uint8 (n, size, size, 3)"""
        return np.stack([(self._load(i), self.env.render())[1] for i in range(self.n)])

    def success(self, task, goal=None):
        """The environment's own test in the present states: (n,) bool. Goal states do not matter."""
        return np.array([(self._load(i), self.env._get_task_reward(task, "success"))[1] > 0 for i in range(self.n)])

    def script(self, task):
        """Actions of a scripted policy (ours) for desk 0, one by one: go beside the object, then through it."""
        self._load(0)
        named = self.env.physics.named.data
        clear, fingers = (0, 0, 0), 0                           # how to get past the object; 0: half open
        if task.startswith("push"):
            place, aside, through, fingers = lambda: named.xpos[task[5:] + "_button"], (0, 0, 0.1), (0, 0, -0.1), -1
        elif task == "open_slide":
            place, aside, through, clear = lambda: named.site_xpos["slide_handle"], (-0.12, 0, 0), (0.5, 0.03, 0), (0, -0.15, 0)
        elif task == "open_drawer":                             # rarely succeeds
            place, aside, through = lambda: named.geom_xpos["drawer_handle"], (0, 0.05, 0.05), (0, -0.3, -0.02)
        else:
            place, aside, through, clear = lambda: named.xpos[task[:-len("_off_table")]], (-0.15, 0, -0.05), (0.3, 0, -0.02), (0, 0, 0.15)
        beside = False
        for t in itertools.count():
            self._load(0)
            hand = named.site_xpos["end_effector"]
            target = place() + aside
            beside = beside or t == 10 or np.linalg.norm(target - hand) < 0.1
            target = place() + through if beside else target + clear if hand[0] > target[0] + 0.05 else target
            yield np.concatenate([np.clip(5 * (target - hand), -1, 1), [0, fingers]])


def random_actions(rng, keep=0.8):
    """Endless correlated random actions (5,)."""
    action = rng.uniform(-1, 1, 5)
    while True:
        yield action
        action = keep * action + (1 - keep) * rng.normal(0, 2, 5)


def play(desk, task, actions, steps, until_success=False):
    """Act on desk 0: frames (t, size, size, 3), dict of `actions` (t-1, 5), `states` (t, 73), `success`, `task`"""
    frames, states, done, success = [desk.render()[0]], [desk.get_state()[0]], [], False
    for action in itertools.islice(actions, steps):
        done.append(np.clip(action, -1, 1).astype(np.float32))
        desk.step(done[-1][None])
        frames.append(desk.render()[0])
        states.append(desk.get_state()[0])
        success |= bool(desk.success(task)[0])
        if success and until_success:
            break
    return np.stack(frames), dict(actions=np.array(done, np.float32).reshape(-1, 5), states=np.stack(states), success=success, task=task)


def write(path, frames, labels):
    """An episode as path.npz and path.mp4 (H.264, lossless but for the colour space); the video comes last."""
    np.savez(path + ".part.npz", **labels)
    os.replace(path + ".part.npz", path + ".npz")
    with av.open(path + ".part", "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Desk.fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode(None))
    os.replace(path + ".part", path + ".mp4")


def collect(folder, episodes, size=64, seed=0, steps=15):
    """Record the episodes that are not in the folder yet: 70 % scripted with noise, 30 % random."""
    os.makedirs(folder, exist_ok=True)
    desk = Desk(1, size)
    for i in tqdm(range(episodes), "recording", dynamic_ncols=True, disable=None):
        rng = np.random.default_rng((seed, i))
        task, scripted = TASKS[rng.integers(len(TASKS))], rng.random() < 0.7
        path = os.path.join(folder, f"{'script' if scripted else 'random'}_{task}_{i:05d}")
        if not os.path.exists(path + ".mp4"):
            desk.reset(seed * 10 ** 6 + i)
            noisy = (a + rng.normal(0, (0.4, 0.4, 0.4, 0.2, 0.2)) for a in desk.script(task))
            write(path, *play(desk, task, noisy if scripted else random_actions(rng), steps))


def make_goals(task, folder, n, size=64, steps=24):
    """Record start-goal pairs as goal_TASK_i until there are n: scripted episodes that succeed; the drawer is pulled out by hand."""
    os.makedirs(folder, exist_ok=True)
    desk, pattern, i = Desk(1, size), os.path.join(glob.escape(folder), f"goal_{task}_*.mp4"), 0
    while len(glob.glob(pattern)) < n:
        path, i = os.path.join(folder, f"goal_{task}_{i:04d}"), i + 1
        if not os.path.exists(path + ".mp4"):
            state = desk.reset(2 ** 31 + i)                     # no seed of `collect`
            if task == "open_drawer":                           # a script is weak at it
                frames, labels = play(desk, task, [], 0)
                state[0, 18] = -0.25                            # its joint
                desk.set_state(state)
                after, then = play(desk, task, [], 0)
                frames, labels["states"] = np.concatenate([frames, after]), np.concatenate([labels["states"], then["states"]])
                labels |= dict(actions=np.zeros((1, 5), np.float32), success=bool(desk.success(task)[0]))
            else:
                frames, labels = play(desk, task, desk.script(task), steps, until_success=True)
            if labels["success"]:
                write(path, frames, labels)


def goals(task, path, n, size=64):
    """Up to n pairs of start state (73,) and goal image (size, size, 3) from recorded episodes or VP2's HDF5 files.

    Args:
        path: folder of goal_TASK_*.mp4 and .npz; or an HDF5 file of VP2's, or the folder that has it as robodesk_TASK/goals.hdf5.

    Raises:
        DeskError: no goal of the task there.
    """
    benchmark = os.path.join(path, f"robodesk_{task}", "goals.hdf5")
    pairs, file = [], path if path.endswith((".hdf5", ".h5")) else benchmark
    if os.path.isfile(file):
        try:
            import h5py
        except ImportError:
            raise DeskError(f"{file}: needs pip install h5py") from None
        with h5py.File(file) as f:
            for name in sorted(f["data"], key=lambda k: int(k.split("_")[-1]))[:n]:
                demo = f["data"][name]
                start = int(demo["start_index"][()]) if "start_index" in demo else 0
                pairs.append((demo["states"][start][:73], demo["obs/camera_image"][-1]))
    else:
        for video in sorted(glob.glob(os.path.join(glob.escape(path), f"goal_{task}_*.mp4")))[:n]:
            with np.load(video[:-4] + ".npz") as labels:
                pairs.append((labels["states"][0], imageio.imread(video, plugin="pyav")[-1]))
    if not pairs:
        raise DeskError(f"--goals {path}: no goal of the task {task}")
    fit = lambda image: np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
    return [(state, fit(image) if len(image) != size else image) for state, image in pairs]
