"""The toy world: robots that move on a table and push blocks, simulated in numpy, many worlds at once.

Robot and blocks fill one cell each of a lattice (cells of 4 pixels in small frames, 8 x 8 cells in larger ones); a step
moves the robot by at most one cell along one axis. Robots ("embodiments") differ in looks and in action space. `web`
clips, for pre-training a generator without actions, show drifting and bouncing sprites on varied backgrounds and no
robot. All of it is ours: the paper's data are real videos (appendix A).
"""

from dataclasses import dataclass

import numpy as np


def cells_of(size):
    """Cells along a side of a frame of `size` pixels: of 4 pixels each in small frames, else 8 cells."""
    return size // 4 if size < 32 else 8


@dataclass
class Embodiment:
    look: str                   # shape of the robot
    color: tuple                # of the robot, RGB
    table: tuple                # of the background, RGB
    matrix: tuple = None        # continuous actions a in [-1, 1] drive the robot by matrix @ a; None: discrete actions

    @property
    def action_dim(self):
        return 2 if self.matrix else len(MOVES)


MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])                    # stay, right, left, down, up
EMBODIMENTS = {
    "cross": Embodiment("square", (255, 80, 60), (45, 45, 65)),                 # 5 discrete actions, one-hot
    "slide": Embodiment("disc", (255, 150, 60), (70, 55, 45), ((1, 0), (0, 1))),
    "tank": Embodiment("diamond", (255, 90, 150), (35, 65, 75), ((.7, .7), (-.7, .7))),
    "held-out": Embodiment("ring", (255, 120, 110), (65, 55, 80), ((0, -1), (1, 0))),
}
MIXTURE = {"cross": 0.3, "slide": 0.2, "tank": 0.5}     # the paper's 30 % OXE, 20 % AgiBot, 50 % human video
TASKS = {"reach": 0, "push": 1}                         # which sprite must get to its goal: the robot, or block 0
BLOCKS = np.array([(60, 200, 80), (90, 220, 130), (40, 170, 60)])               # shades of green


class Rolls:
    """Uniform numbers of many seeded worlds, handed out in order: row i depends on (seed, indices[i]) alone."""

    def __init__(self, seed, indices, n=2048):
        self.u = np.stack([np.random.default_rng((seed, int(i))).random(n) for i in indices])
        self.at = 0

    def __call__(self, *shape):
        k = int(np.prod(shape))
        self.at += k
        return self.u[:, self.at - k:self.at].reshape(len(self.u), *shape)


def draw(image, shape, x, y, size, color):
    """Paint a sprite of `size` pixels with its top left corner at pixel (x, y) into each image (n, h, w, 3)."""
    yy, xx = np.mgrid[:image.shape[1], :image.shape[2]]
    half = np.asarray(size)[..., None, None] / 2
    dx = np.abs(xx - (np.asarray(x)[:, None, None] + half - 0.5))
    dy = np.abs(yy - (np.asarray(y)[:, None, None] + half - 0.5))
    inside = {"square": np.maximum(dx, dy), "disc": np.hypot(dx, dy), "diamond": (dx + dy) / 1.2,
              "ring": np.where(np.maximum(dx, dy) < half / 3, np.inf, np.hypot(dx, dy))}[shape] < half
    image[...] = np.where(inside[..., None], np.asarray(color).reshape(-1, 1, 1, 3), image)


class ToyWorld:
    """n tables of one embodiment, simulated together.

    Args:
        embodiment: key of EMBODIMENTS.
        indices: (n,) which worlds; world i of a seed is always the same.
        size: pixels of a square frame.
    """
    fps = 24

    def __init__(self, embodiment, indices, seed=0, size=32, blocks=2):
        self.body, self.size, self.cells, self.n, self.blocks = EMBODIMENTS[embodiment], size, cells_of(size), len(indices), blocks
        self.action_dim = self.body.action_dim
        self.rolls = Rolls(seed, indices)
        self.reset()

    def reset(self):
        """Place robot and blocks at random without overlap, and choose colours."""
        places = np.array([(x, y) for x in range(self.cells) for y in range(self.cells)])
        order = self.rolls(len(places)).argsort(1)[:, :1 + self.blocks]
        self.position = places[order]                                           # (n, 1 + blocks, 2): robot first
        jitter = self.rolls(1, 3) * 20 - 10
        self.table = np.clip(np.array(self.body.table) + jitter[:, 0], 0, 255)  # (n, 3)
        self.colors = BLOCKS[self.rolls(len(BLOCKS)).argsort(1)[:, :self.blocks]]
        return self.get_state()

    def get_state(self):
        """(n, 1 + blocks, 2) integer lattice positions (x, y), robot first"""
        return self.position.copy()

    def set_state(self, state):
        self.position = np.array(state)

    def move_of(self, action):
        """The move (n, 2) that an action (n, action_dim) asks for: a cell along the axis that is driven most, or none"""
        if self.body.matrix is None:
            return MOVES[np.argmax(action, -1)]
        drive = np.clip(action, -1, 1) @ np.array(self.body.matrix).T
        strongest = np.abs(drive) == np.abs(drive).max(1, keepdims=True)
        return (np.sign(drive) * (strongest & (np.abs(drive) > 1 / 3))).astype(int)

    def action_for(self, move, u):
        """A random action that makes the move (n, 2), drawn from all that do but for close calls: u (n, 2) uniform."""
        if self.body.matrix is None:
            return np.eye(len(MOVES))[np.abs(MOVES - move[:, None]).sum(-1).argmin(1)]
        strong = 0.4 + 0.6 * u[:, :1]
        drive = np.where(move == 0, 0.9 * strong * (2 * u[:, 1:] - 1), move * strong)
        drive = np.where((move == 0).all(1, keepdims=True), 0.6 * (u - 0.5), drive)
        return np.clip(drive @ np.linalg.inv(np.array(self.body.matrix)).T, -1, 1)

    def step(self, action):
        """Apply actions (n, action_dim). The robot pushes what it meets; if that cannot move, nothing does."""
        move = self.move_of(action)
        new = self.position.copy()
        new[:, 0] += move
        hit = (new[:, 1:] == new[:, :1]).all(-1)                                # (n, blocks)
        new[:, 1:] += hit[..., None] * move[:, None]
        apart = (new[:, :, None] != new[:, None]).any(-1) | np.eye(1 + self.blocks, dtype=bool)
        valid = ((new >= 0) & (new < self.cells)).all((1, 2)) & apart.all((1, 2))
        self.position = np.where(valid[:, None, None], new, self.position)
        return self.get_state()

    def render(self):
        """uint8 (n, size, size, 3)"""
        image = np.broadcast_to(self.table[:, None, None], (self.n, self.size, self.size, 3)).copy()
        cell = self.size // self.cells
        for i in range(self.blocks):
            draw(image, "square", *(self.position[:, 1 + i] * cell).T, cell, self.colors[:, i])
        draw(image, self.body.look, *(self.position[:, 0] * cell).T, cell, self.body.color)
        return image.astype(np.uint8)

    def success(self, task, goal):
        """Whether the robot (reach) or block 0 (push) is in its cell of the goal states (n, 1 + blocks, 2): (n,) bool"""
        return (self.position[:, TASKS[task]] == goal[:, TASKS[task]]).all(-1)

    def policy(self, goal):
        """One step of the behaviour policy: head for a waypoint, which changes at random, pushing what is in the way.

        goal (n, 2) is updated in place; returns actions (n, action_dim).
        """
        u = self.rolls(8)
        arrived = (goal == self.position[:, 0]).all(1) | (u[:, 0] < 0.2)
        goal[arrived] = np.floor(u[arrived, 1:3] * self.cells).astype(int)
        move = np.sign(goal - self.position[:, 0])
        axis = (u[:, 3] < 0.5).astype(int)                                      # one axis at a time
        axis = np.where(move[np.arange(self.n), axis] == 0, 1 - axis, axis)
        move[np.arange(self.n), 1 - axis] = 0
        wander = MOVES[np.floor(u[:, 4] * len(MOVES)).astype(int)]
        return self.action_for(np.where(u[:, 5:6] < 0.3, wander, move), self.rolls(2))


def task_pairs(task, embodiment, n=30, seed=1000, size=20):
    """Fixed pairs of start and goal.

    Returns:
        the world at its n starts, and goal states (n, 1 + blocks, 2): for `reach` the robot is at least 3 steps along the axes away; for
        `push` block 0 is 2 cells along an axis, with the robot behind it, and the robot starts a step from there.
    """
    rng = np.random.default_rng((seed, TASKS[task]))
    world = ToyWorld(embodiment, range(n), seed, size)
    start, goal = world.get_state(), world.get_state()
    for i in range(n):
        valid = False
        while not valid:
            start[i] = rng.integers(0, world.cells, start[i].shape)
            goal[i], push = start[i], MOVES[rng.integers(1, 5)]
            if task == "reach":
                goal[i, 0] = rng.integers(0, world.cells, 2)
                valid = np.abs(goal[i, 0] - start[i, 0]).sum() >= 3
            else:
                goal[i, 1] += 2 * push
                goal[i, 0] = goal[i, 1] - push
                way = start[i, 1] - push - start[i, 0]                          # to where the robot has to get first
                valid = (goal[i] - 3 * push >= 0)[1].all() and (goal[i] - 3 * push < world.cells)[1].all()
                valid &= np.abs(way).sum() == 1 and way @ push >= 0             # not from the block's other side
            valid &= (goal[i] >= 0).all() and (goal[i] < world.cells).all()
            valid &= all(len(np.unique(state, axis=0)) == len(state) for state in (start[i], goal[i]))
    world.set_state(start)
    return world, goal


def robot_clips(embodiment, indices, seed, frames, size):
    """Clips of the behaviour policy.

    Returns:
        video (n, t, size, size, 3) uint8; actions (n, t-1, action_dim) float32; effects (n, t-1) int64, the move that
        really happened, one of nine.
    """
    world = ToyWorld(embodiment, indices, seed, size)
    goal, video, actions, effects = world.position[:, 0].copy(), [world.render()], [], []
    for _ in range(frames - 1):
        before = world.position[:, 0]
        actions.append(world.policy(goal))
        moved = world.step(actions[-1])[:, 0] - before
        effects.append((moved[:, 0] + 1) * 3 + moved[:, 1] + 1)
        video.append(world.render())
    return np.stack(video, 1), np.stack(actions, 1).astype(np.float32), np.stack(effects, 1)


def web_clips(indices, seed, frames, size, sprites=3):
    """Sprites that drift, turn and bounce over varied backgrounds; nobody acts: video (n, t, size, size, 3) uint8"""
    rolls = Rolls(seed, indices)
    yy, xx = np.mgrid[:size, :size] / size
    tilt = rolls(2)[..., None, None] * 2 - 1
    wave = tilt[:, 0] * xx + tilt[:, 1] * yy                                    # (n, h, w)
    u = rolls(2)
    striped = (np.sin(wave * (10 + 20 * u[:, 1, None, None])) > 0)
    blend = np.where(u[:, 0, None, None] < 0.4, striped * 1.0, np.clip(wave + 0.5, 0, 1))[..., None]
    pair = rolls(2, 3)[:, :, None, None] * 255
    background = pair[:, 0] * blend + pair[:, 1] * (1 - blend)                  # (n, h, w, 3)
    shapes = np.array(["square", "disc", "diamond"])
    kind = np.floor(rolls(sprites) * 3).astype(int)
    side = np.rint(size * (0.15 + 0.2 * rolls(sprites)))
    color = rolls(sprites, 3) * 255
    place = rolls(sprites, 2) * (size - side[..., None])
    cell, velocity, video = size / cells_of(size), None, []
    for _ in range(frames):
        turn = rolls(sprites, 3)
        fresh = np.rint((turn[..., :2] * 2 - 1) * 1.5 * cell)                   # up to 1.5 cells a frame
        velocity = fresh if velocity is None else np.where(turn[..., 2:] < 0.4, fresh, velocity)
        image = background.copy()
        for i in range(sprites):
            for k, shape in enumerate(shapes):
                pick = kind[:, i] == k
                if pick.any():
                    part = image[pick]
                    draw(part, shape, place[pick, i, 0], place[pick, i, 1], side[pick, i], color[pick, i])
                    image[pick] = part
        video.append(image.astype(np.uint8))
        place = place + velocity
        high = size - side[..., None]
        velocity = np.where((place < 0) | (place > high), -velocity, velocity)
        place = np.clip(place, 0, high)
    return np.stack(video, 1)
