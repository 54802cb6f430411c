"""The toy world: robots that move on a table and push blocks, simulated in numpy, many worlds at once.

Robot and blocks fill one cell each of a lattice (cells of 4 pixels in small frames, 8 x 8 cells in larger
ones); a step moves the robot by at most one cell along one axis. Robots ("embodiments") differ in looks and
in action space. `web` clips, for pre-training a generator without actions, show drifting and bouncing sprites
on varied backgrounds and no robot. All of it is ours: the paper's data are real videos (appendix A).

Shapes: n worlds, t frames; a state is (n, 1 + blocks, 2), cells (x, y) of the robot and then of the blocks.
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
    matrix: tuple = None        # actions a in [-1, 1] (2,) drive the robot by matrix @ a; None: discrete ones

    @property
    def action_dim(self):
        return 2 if self.matrix else len(MOVES)


MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])        # stay, right, left, down, up
EMBODIMENTS = {
    "cross": Embodiment("square", (255, 80, 60), (45, 45, 65)),     # 5 discrete actions, one-hot
    "slide": Embodiment("disc", (255, 150, 60), (70, 55, 45), ((1, 0), (0, 1))),
    "tank": Embodiment("diamond", (255, 90, 150), (35, 65, 75), ((.7, .7), (-.7, .7))),
    "held-out": Embodiment("ring", (255, 120, 110), (65, 55, 80), ((0, -1), (1, 0))),
}
MIXTURE = {"cross": 0.3, "slide": 0.2, "tank": 0.5}     # the paper's 30 % OXE, 20 % AgiBot, 50 % human video
TASKS = {"reach": 0, "push": 1}                         # what must get to its goal: the robot, or block 0
BLOCKS = np.array([(60, 200, 80), (90, 220, 130), (40, 170, 60)])   # shades of green


class Rolls:
    """Uniform numbers in [0, 1) of many seeded worlds, handed out in order; no row depends on the others."""

    def __init__(self, seed, indices):
        self.worlds = [np.random.default_rng((seed, int(i))) for i in indices]

    def __call__(self, *shape):
        """The next ones: (n, *shape)"""
        return np.stack([world.random(shape) for world in self.worlds])


def draw(image, shape, x, y, size, color):
    """Paint a square, disc, diamond or ring into each image (n, h, w, 3), in place.

    x, y: (n,) its top left pixel. size: of a side, one or (n,). color: RGB in 0..255, one or (n, 3).
    """
    yy, xx = np.mgrid[:image.shape[1], :image.shape[2]]
    half = np.asarray(size)[..., None, None] / 2
    dx = np.abs(xx - (np.asarray(x)[:, None, None] + half - 0.5))
    dy = np.abs(yy - (np.asarray(y)[:, None, None] + half - 0.5))
    if shape == "square":
        distance = np.maximum(dx, dy)                           # (n, h, w) from the middle
    elif shape == "disc":
        distance = np.hypot(dx, dy)
    elif shape == "diamond":
        distance = (dx + dy) / 1.2
    else:                                                       # a ring: a disc with a square hole
        distance = np.where(np.maximum(dx, dy) < half / 3, np.inf, np.hypot(dx, dy))
    inside = (distance < half)[..., None]                       # (n, h, w, 1)
    image[...] = np.where(inside, np.asarray(color).reshape(-1, 1, 1, 3), image)


class ToyWorld:
    """n tables of one embodiment, simulated together.

    indices: (n,); table i of a seed is always the same. size: pixels of a square frame. blocks: up to 3.
    """
    fps = 24

    def __init__(self, embodiment, indices, seed=0, size=32, blocks=2):
        self.body = EMBODIMENTS[embodiment]
        self.action_dim = self.body.action_dim
        self.size, self.cells = size, cells_of(size)
        self.n, self.blocks = len(indices), blocks
        self.rolls = Rolls(seed, indices)
        self.reset()

    def reset(self):
        """Place robot and blocks at random without overlap, and choose colours."""
        places = np.array([(x, y) for x in range(self.cells) for y in range(self.cells)])
        order = self.rolls(len(places)).argsort(1)[:, :1 + self.blocks]
        self.position = places[order]                           # (n, 1 + blocks, 2)
        jitter = self.rolls(1, 3)[:, 0] * 20 - 10
        self.table = np.clip(np.array(self.body.table) + jitter, 0, 255)            # (n, 3)
        self.colors = BLOCKS[self.rolls(len(BLOCKS)).argsort(1)[:, :self.blocks]]   # (n, blocks, 3)

    def get_state(self):
        """(n, 1 + blocks, 2) integer lattice positions (x, y), robot first"""
        return self.position.copy()

    def set_state(self, state):
        self.position = np.array(state)

    def move_of(self, action):
        """Moves (n, 2) that actions (n, action_dim) ask for: a cell along the axis driven most, or none"""
        if self.body.matrix is None:
            return MOVES[np.argmax(action, -1)]
        drive = np.clip(action, -1, 1) @ np.array(self.body.matrix).T
        strongest = np.abs(drive) == np.abs(drive).max(1, keepdims=True)
        return (np.sign(drive) * (strongest & (np.abs(drive) > 1 / 3))).astype(int)

    def action_for(self, move, u):
        """Random actions (n, action_dim) for moves (n, 2), but no close calls. u: (n, 2) uniform in [0, 1)"""
        if self.body.matrix is None:
            return np.eye(len(MOVES))[np.abs(MOVES - move[:, None]).sum(-1).argmin(1)]
        strong = 0.4 + 0.6 * u[:, :1]
        drive = np.where(move == 0, 0.9 * strong * (2 * u[:, 1:] - 1), move * strong)
        drive = np.where((move == 0).all(1, keepdims=True), 0.6 * (u - 0.5), drive)
        return np.clip(drive @ np.linalg.inv(np.array(self.body.matrix)).T, -1, 1)

    def step(self, action):
        """Apply actions (n, action_dim): the robot pushes what it meets; if that is stuck, nothing moves."""
        move = self.move_of(action)
        new = self.position.copy()
        new[:, 0] += move
        hit = (new[:, 1:] == new[:, :1]).all(-1)                # (n, blocks)
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

    def inside(self, places):
        """Whether all of the places (..., 2) are on the table"""
        return (places >= 0).all() and (places < self.cells).all()

    def success(self, task, goal):
        """Whether the robot (reach) or block 0 (push) is in its cell of the goal states: (n,) bool"""
        return (self.position[:, TASKS[task]] == goal[:, TASKS[task]]).all(-1)

    def distances(self, task, goal):
        """Steps from the first world to a goal state (1, 1 + blocks, 2): the robot's and block 0's"""
        steps = np.abs(self.position[0] - goal[0]).sum(-1)
        return {"robot": int(steps[0]), "block": int(steps[1])}

    def policy(self, goal):
        """Actions (n, action_dim) that head for waypoints (n, 2), which change at random, in place."""
        u = self.rolls(8)
        arrived = (goal == self.position[:, 0]).all(1) | (u[:, 0] < 0.2)
        goal[arrived] = np.floor(u[arrived, 1:3] * self.cells).astype(int)
        move = np.sign(goal - self.position[:, 0])
        axis = (u[:, 3] < 0.5).astype(int)                      # one axis at a time
        axis = np.where(move[np.arange(self.n), axis] == 0, 1 - axis, axis)
        move[np.arange(self.n), 1 - axis] = 0
        wander = MOVES[np.floor(u[:, 4] * len(MOVES)).astype(int)]
        return self.action_for(np.where(u[:, 5:6] < 0.3, wander, move), self.rolls(2))


def task_pairs(task, embodiment, n=30, seed=1000, size=20):
    """A world at n fixed starts, and goal states (n, 1 + blocks, 2)"""
    rng = np.random.default_rng((seed, TASKS[task]))
    world = ToyWorld(embodiment, range(n), seed, size)
    starts, goals = zip(*[task_pair(task, world, rng) for _ in range(n)])
    world.set_state(starts)
    return world, np.array(goals)


def task_pair(task, world, rng):
    """A start and a goal (1 + blocks, 2), drawn until they are fair.

    reach: the robot has at least 3 steps to go. push: block 0 has 2 cells to go along an axis, with the robot
    behind it in the end; at the start the robot is a step from there, and not on the block's other side.
    """
    while True:
        start = rng.integers(0, world.cells, (1 + world.blocks, 2))
        goal, push = start.copy(), MOVES[rng.integers(1, 5)]
        if task == "reach":
            goal[0] = rng.integers(0, world.cells, 2)
            fair = np.abs(goal[0] - start[0]).sum() >= 3
        else:
            goal[1] += 2 * push
            goal[0] = goal[1] - push
            behind = start[1] - push                            # where the robot has to get first
            way = behind - start[0]
            fair = world.inside(behind) and np.abs(way).sum() == 1 and way @ push >= 0
        apart = all(len(np.unique(state, axis=0)) == len(state) for state in (start, goal))
        if fair and apart and world.inside(goal):
            return start, goal


def robot_clips(embodiment, indices, seed, frames, size):
    """Clips of the behaviour policy: video (n, t, size, size, 3) uint8; actions (n, t-1, action_dim) float32;
    effects (n, t-1) int64, which of nine moves really happened.
    """
    world = ToyWorld(embodiment, indices, seed, size)
    goal = world.position[:, 0].copy()
    video, actions, effects = [world.render()], [], []
    for _ in range(frames - 1):
        before = world.position[:, 0]
        actions.append(world.policy(goal))
        moved = world.step(actions[-1])[:, 0] - before
        effects.append((moved[:, 0] + 1) * 3 + moved[:, 1] + 1)
        video.append(world.render())
    return np.stack(video, 1), np.stack(actions, 1).astype(np.float32), np.stack(effects, 1)


def web_clips(indices, seed, frames, size, sprites=3):
    """Sprites that drift, turn and bounce; nobody acts: video (n, t, size, size, 3) uint8"""
    rolls = Rolls(seed, indices)
    background = backgrounds(rolls, size)
    kind = np.floor(rolls(sprites) * 3).astype(int)
    side = np.rint(size * (0.15 + 0.2 * rolls(sprites)))
    color = rolls(sprites, 3) * 255
    high = size - side[..., None]                               # (n, sprites, 1) x and y, at most
    place = rolls(sprites, 2) * high                            # (n, sprites, 2)
    cell, velocity, video = size / cells_of(size), None, []
    for _ in range(frames):
        turn = rolls(sprites, 3)
        fresh = np.rint((turn[..., :2] * 2 - 1) * 1.5 * cell)   # up to 1.5 cells a frame
        velocity = fresh if velocity is None else np.where(turn[..., 2:] < 0.4, fresh, velocity)
        image = background.copy()
        for i in range(sprites):
            for k, shape in enumerate(("square", "disc", "diamond")):
                pick = kind[:, i] == k
                part = image[pick]
                draw(part, shape, *place[pick, i].T, side[pick, i], color[pick, i])
                image[pick] = part
        video.append(image.astype(np.uint8))
        place = place + velocity
        velocity = np.where((place < 0) | (place > high), -velocity, velocity)
        place = np.clip(place, 0, high)
    return np.stack(video, 1)


def backgrounds(rolls, size):
    """Two colours each, in stripes or in a smooth transition: (n, size, size, 3)"""
    yy, xx = np.mgrid[:size, :size] / size
    tilt = rolls(2)[..., None, None] * 2 - 1
    wave = tilt[:, 0] * xx + tilt[:, 1] * yy                    # (n, size, size)
    smooth, width = rolls(2).T[..., None, None]                 # (n, 1, 1) each
    stripes = np.sin(wave * (10 + 20 * width)) > 0
    blend = np.where(smooth < 0.4, stripes * 1.0, np.clip(wave + 0.5, 0, 1))[..., None]
    pair = rolls(2, 3)[:, :, None, None] * 255
    return pair[:, 0] * blend + pair[:, 1] * (1 - blend)
