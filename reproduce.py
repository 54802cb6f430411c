"""Every figure and table of the paper, as the commands that make it.

    python reproduce.py fig2        # fig3, fig4a, fig4b, fig5, fig6, table1 ... table4, warmup, all
    python reproduce.py fig2 --variant unstandardized --seeds 0 1 2     # under other conditions
    python reproduce.py causes --variant light-vq   # all conditions whose names begin so; also: pretrained

A run or a measurement is made once, by the command that is printed, when the first target asks for it; what
was stopped goes on. Nothing is made anew when the code changes: delete out/reproduce then. There come the
numbers of every seed, as TARGET[-VARIANT][-kiloN][-seedN].json, and the pictures. Seeds are independent:
start one process a seed (OMP_NUM_THREADS=1), not two, and one for all at the end. Training budgets are the
paper's (section 4) by one factor, KILO or --kilo; COMMON, VARIANTS, pre-training and adaptation are ours.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from data import Parser, number, program
from figures import ALIGN, CODEBOOK, HERE, bars, curve, markdown, plot, rows_at
from formats import UserError, optional, whole

SEEDS = [0, 1, 2]
KILO = {"tiny": 25, "small": 100}       # our steps for 1,000 steps of the paper

# Name: flags of train.py. 8K is 8,000 steps of the paper, RUN@8K a run's checkpoint after so many, RUN@ its
# last. Branches of "warmup" start with fresh moments and their own learning-rate warm-up, unlike "joint".
BRANCHES = ("4K", "8K", "16K", "24K")
ADAPT, BUDGET = "--mode adapt --data held-out", "--adapter_steps 12K --adapt_steps 12K"
RUNS = {
    "pretrained": "--mode pretrain",
    "two-stage": "--dit_weights pretrained@ --mode two-stage --lam_steps 30K --wm_steps 30K",
    "two-stage-8K": "--dit_weights pretrained@ --mode two-stage --lam_steps 0 --init_lam two-stage@8K"
                    " --wm_steps 52K",
    "joint": "--dit_weights pretrained@ --warmup 8K --e2e 52K --eval_every 4K",
    "naive": "--dit_weights pretrained@ --warmup 0 --e2e 60K",
    "naive-trained": "--dit_weights pretrained@ --warmup 0 --e2e 30K --init_lam two-stage@30K",
    "both-random": "--pretrain 0 --warmup 0 --e2e 30K",
    "joint-24K": "--dit_weights pretrained@ --warmup 24K --e2e 36K",
    "warmup": "--dit_weights pretrained@ --warmup 30K --e2e 0",
    **{f"warmup-{k}": f"--init warmup@{k} --warmup 0 --e2e 12K" for k in BRANCHES},
    "frozen": "--dit_weights pretrained@ --warmup 8K --e2e 52K --eval_every 4K --freeze_lam",
    "two-stage-adapted": f"{ADAPT} --init two-stage@ {BUDGET}",
    "joint-adapted": f"{ADAPT} --init joint@38K {BUDGET}",
    "naive-adapted": f"{ADAPT} --init naive@38K {BUDGET}",
}
KEPT = ("4K", "8K", "14K", "16K", "22K", "24K", "30K", "38K")   # checkpoints that are needed later
COMMON = ("--vq_start 0 --cooldown 0 --real_share 0 --lr_warmup 2K --log_every 2K --eval_every 1000K "
          "--ckpt_every 2K --keep 30 --eval_clips 64")
LIGHT = "--standardize 0 --latent_scale 0.1"
VARIANTS = {                                        # numbers for tiny
    "main": "",                                     # the preset, but quantized from the first step
    "unstandardized": "--standardize 0 --latent_scale 0.3",         # the IDM's output times a constant
    "light-vq": LIGHT,                              # a third of that: the VQ losses weigh a ninth
    "light-vq-low-lr": f"{LIGHT} --lr 5e-4",
    "light-vq-bidirectional": f"{LIGHT} --causal 0",                # pre-training, as Open-Sora's was
    "light-vq-pretrain-3000": f"{LIGHT} --pretrain 3000",
}
MEASURES = {
    "probe": "evaluate.py --task probe --transitions 4096 --seeds SEED",
    "loss": "evaluate.py --task loss --data robots --clips 256 --seeds SEED",
    "predict": "evaluate.py --task predict --seeds SEED",
    "adapt": "evaluate.py --task adapt --transitions 4096 --seeds SEED",
    "codebook": "evaluate.py --task codebook",
    "transfer": "evaluate.py --task transfer",
    "plan": "plan.py --samples 32 --seeds SEED",
    "plan-bounds": "plan.py --samples 32 --random --oracle --seeds SEED",
}
ROBOTS = ("cross", "slide", "tank", "held-out")
ADAPTED = {"LAM30K+WM30K": "two-stage-adapted@", "WARM8K+E2E30K": "joint-adapted@",
           "naive 38K": "naive-adapted@"}


def read(file):
    """A file's text; none where it is not there"""
    return Path(file).read_text() if os.path.exists(file) else ""


class Lab:
    """The runs and measurements of one preset, variant and time scale, by seed."""

    def __init__(self, preset, variant, seeds, kilo=None):
        self.preset, self.variant, self.seeds, self.kilo = preset, variant, seeds, kilo or KILO[preset]
        self.name = f"{preset}-{variant}" + (f"-kilo{kilo}" if self.kilo != KILO[preset] else "")
        self.commands = []              # that a target takes, as printed

    def folder(self, run, seed):
        return os.path.join("out", "reproduce", self.name, str(seed), run)

    def steps(self, text):
        """8K -> our steps for 8,000 of the paper's"""
        return int(text[:-1]) * self.kilo

    def checkpoint(self, text, seed):
        """RUN@8K or RUN@ -> path; a run's last checkpoint is its folder"""
        run, at = text.split("@")
        folder = self.folder(run, seed)
        if not at:
            return folder
        file = os.path.join(folder, f"ckpt-{self.steps(at):08d}.pt")
        if os.path.exists(file):
            return file
        if self.log(run, seed)[-1]["step"] != self.steps(at):
            raise UserError(f"{file} is gone; delete {folder} and start again")
        return folder

    def word(self, word, seed):
        """A word of a command with its steps, checkpoint or seed filled in"""
        if word.endswith("K") and word[:-1].isdigit():
            return str(self.steps(word))
        if "@" in word:
            return self.checkpoint(word, seed)
        return str(seed) if word == "SEED" else word

    def command(self, script, flags):
        """The command as one would type it, printed once a target"""
        command = shlex.join(["python", script, *flags])
        if command not in self.commands:
            self.commands.append(command)
            print(command, flush=True)
        return command

    def execute(self, command, flags):
        script = os.path.join(HERE, command.split()[1])
        if subprocess.run([sys.executable, script, *flags], stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"this failed: {command}")

    def train(self, run, seed):
        """Train a run, and what it starts from, unless that is done; its recipe: its command, then theirs"""
        parents = [self.train(word.split("@")[0], seed) for word in RUNS[run].split() if "@" in word]
        out = self.folder(run, seed)
        flags = [self.word(w, seed) for w in f"{COMMON} {VARIANTS[self.variant]} {RUNS[run]}".split()]
        flags = ["--name", os.path.relpath(out, "out"), "--preset", self.preset, "--seed", str(seed), *flags]
        command = self.command("train.py", flags)
        recipe = "\n".join([command, *parents])
        note, metrics = out + ".txt", os.path.join(out, "metrics.jsonl")
        if read(note) == recipe and os.path.exists(metrics):
            if '"event": "result"' in read(metrics):
                return recipe
            flags = ["--resume", out]
            print(f"goes on by: python train.py --resume {out}")
        elif os.path.exists(metrics):
            os.replace(metrics, metrics + ".old")       # of another recipe; train.py moves its folder aside
        os.makedirs(os.path.dirname(out), exist_ok=True)
        Path(note).write_text(recipe)
        self.execute(command, flags)
        kept = {f"ckpt-{self.steps(k):08d}.pt" for k in KEPT}
        for file in os.listdir(out):
            if file.startswith("ckpt-") and file not in kept:
                os.remove(os.path.join(out, file))
        return recipe

    def measure(self, task, ckpt, seed):
        """{row: {column: [value]}} of a checkpoint RUN@8K, unless that is done; of `transfer` the picture"""
        run, at = ckpt.split("@")
        trained = self.train(run, seed)
        script, *flags = [self.word(w, seed) for w in MEASURES[task].split()]
        out = os.path.join(self.folder(run, seed), f"{task}-{at or 'last'}")
        flags = ["--ckpt", self.checkpoint(ckpt, seed), *flags, "--out", out]
        command = self.command(script, flags)
        recipe, note = f"{command}\n{trained}", out + ".txt"
        if read(note) != recipe:
            self.execute(command, flags)
            Path(note).write_text(recipe)                   # once it is whole
        if task == "transfer":
            return os.path.join(out, "samples", "transfer.gif")
        return json.loads(read(os.path.join(out, "results.json")))["tables"][task.split("-")[0]]

    def log(self, run, seed):
        """Lines of a run's log, as dicts; the run is trained unless that is done"""
        self.train(run, seed)
        log = read(os.path.join(self.folder(run, seed), "metrics.jsonl"))
        return [json.loads(line) for line in log.splitlines()]

    def values(self, task, ckpt, row, columns):
        """{column: [value of each seed]} of a row of a measurement, without the columns that it has not"""
        found = [self.measure(task, ckpt, seed)[row] for seed in self.seeds]
        return {c: [v for f in found for v in f[c]] for c in columns if c in found[0]}


def fig2(lab, out):
    """Codebook in joint training without warm-up, with random or trained IDM; both random; with warm-up"""
    naive, trained, random = "rand IDM + pre WM (naive)", "pre IDM + pre WM", "rand IDM + rand WM"
    joint, level, end = "warm-up, then joint", "two-stage LAM", lab.steps("30K")
    arms = {naive: "naive", trained: "naive-trained", random: "both-random", joint: "joint"}
    curves = {arm: curve(lab, run, CODEBOOK, end=end) for arm, run in arms.items()}
    rows = rows_at(curves | {level: curve(lab, "two-stage", CODEBOOK, end=end)})
    nmi = curve(lab, "two-stage", ["nmi"], ("align",))              # logged when the generator starts on it
    rows[level] |= rows_at({level: nmi})[level]
    plot(out + ".png", curves, CODEBOOK, {level: rows[level]})
    return rows, [(naive, level), (trained, level), (joint, naive), (joint, trained), (random, naive)]


def fig3(lab, out):
    """Codebook in joint training (12K) after warm-ups of several lengths, branches of one warm-up run"""
    curves = {"pure warm-up": curve(lab, "warmup", CODEBOOK),
              "warm-up 0K": curve(lab, "naive", CODEBOOK, end=lab.steps("12K"))}
    for k in BRANCHES:
        steps, values = curve(lab, f"warmup-{k}", CODEBOOK)
        curves[f"warm-up {k}"] = steps + lab.steps(k), values
    plot(out + ".png", curves, CODEBOOK)
    return rows_at(curves), [(f"warm-up {k}", "warm-up 0K") for k in BRANCHES]


def fig4a(lab, out):
    """Probing loss on the held-out robot: LAM taught by a frozen generator against one by one that trains"""
    at, curves = ("8K", "14K", "22K", "30K"), {}
    for arm, run in {"pure warm-up": "warmup", "warm-up + e2e": "joint"}.items():
        found = [lab.values("probe", f"{run}@{k}", "held-out", ("l1", "l1_constant")) for k in at]
        values = {c: np.transpose([f[c] for f in found]) for c in found[0]}                 # (seeds, steps)
        curves[arm] = np.array([lab.steps(k) for k in at]), values
    level = {"constant predictor": {"l1": curves["pure warm-up"][1]["l1_constant"][:, 0]}}
    plot(out + ".png", curves, {"l1": "probe L1, held-out robot"}, level)
    return rows_at(curves), [("warm-up + e2e", "pure warm-up")]


def fig4b(lab, out):
    """Prediction while the LAM evolves or stays frozen after warm-up"""
    titles = {"psnr": "PSNR, inferred actions (dB)", "controllability": "controllability (dB)"}
    arms = {"LAM frozen after warm-up": "frozen", "warm-up + e2e": "joint"}
    curves = {arm: curve(lab, run, titles, ("eval", "result")) for arm, run in arms.items()}
    plot(out + ".png", curves, titles)
    return rows_at(curves), [("warm-up + e2e", "LAM frozen after warm-up")]


def fig5(lab, out):
    """Codebook on training clips, on the held-out robot's, and as the adapter makes it of its actions"""
    columns = ("utilization", "max_usage", "entropy")
    arms = {"two-stage": ("two-stage@", "two-stage-adapted@"), "joint": ("joint@38K", "joint-adapted@")}
    rows = {}
    for arm, (base, adapted) in arms.items():
        rows[f"{arm}, training"] = lab.values("codebook", base, "training", columns)
        rows[f"{arm}, inferred"] = lab.values("codebook", adapted, "inferred, held-out", columns)
        rows[f"{arm}, adapter"] = lab.values("codebook", adapted, "adapter, held-out", columns)
    bars(out + ".png", rows, arms, ("training", "inferred", "adapter"), columns)
    return rows, [("joint, adapter", "two-stage, adapter")]


def fig6(lab, out):
    """Latent actions of one clip applied to the first frame of another robot's"""
    shutil.copy(lab.measure("transfer", "joint@", lab.seeds[0]), out + ".gif")
    return {}, []


def table1(lab, out):
    """Linear probe of latent actions, L1"""
    arms = {"LAM30K": "two-stage@30K", "WARM8K+E2E22K": "joint@30K"}
    columns = ("l1", "l1_constant", "r2", "nmi")
    rows = {f"{s}: {arm}": lab.values("probe", c, s, columns) for s in ROBOTS for arm, c in arms.items()}
    return rows, [(f"{s}: WARM8K+E2E22K", f"{s}: LAM30K") for s in ROBOTS]


def table2(lab, out):
    """Video prediction, frame by frame from the first, with inferred actions"""
    arms = {"LAM30K+WM30K": ("two-stage@", "inferred"), "LAM8K+WM52K": ("two-stage-8K@", "inferred"),
            "WARM8K+E2E52K": ("joint@", "inferred"), "WARM8K+E2E30K": ("joint@38K", "inferred"),
            "naive 60K": ("naive@", "inferred"), "LAM30K, FDM's own rollout": ("two-stage@", "fdm"),
            "first frame held still": ("two-stage@", "copy")}
    columns = ("psnr", "ssim", "controllability")
    rows = {f"{s}: {arm}": lab.values("predict", ckpt, f"{s} {kind}", columns)
            for s in ROBOTS for arm, (ckpt, kind) in arms.items()}
    pairs = (("WARM8K+E2E52K", "LAM30K+WM30K"), ("WARM8K+E2E52K", "LAM8K+WM52K"),
             ("WARM8K+E2E30K", "LAM30K+WM30K"), ("WARM8K+E2E30K", "LAM8K+WM52K"),
             ("WARM8K+E2E52K", "naive 60K"), ("naive 60K", "LAM30K+WM30K"),
             ("LAM30K, FDM's own rollout", "LAM30K+WM30K"))
    return rows, [(f"{s}: {a}", f"{s}: {b}") for s in ROBOTS for a, b in pairs]


def table3(lab, out):
    """Prediction by worlds adapted to the held-out robot, with inferred and with real actions (adapter)"""
    columns, kinds = ("psnr", "ssim", "code_accuracy"), {"GT-LAM": "inferred", "real action": "adapted"}
    rows = {f"{name}: {arm}": lab.values("adapt", ckpt, kind, columns)
            for name, kind in kinds.items() for arm, ckpt in ADAPTED.items()}
    rows["first frame held still"] = lab.values("adapt", "two-stage-adapted@", "copy", columns)
    return rows, [(f"{name}: WARM8K+E2E30K", f"{name}: {arm}") for name in kinds
                  for arm in ("LAM30K+WM30K", "naive 38K")]


def table4(lab, out):
    """Planning with worlds adapted to the held-out robot: success between random actions and the simulator"""
    def success(task, ckpt, agent, seeds):
        found = [lab.measure(task, ckpt, seed) for seed in seeds]
        row = {goal: [f[f"{goal} {agent}"]["success"][0] for f in found] for goal in ("reach", "push")}
        return row | {"average": np.mean([row["reach"], row["push"]], 0).tolist()}

    rows = {arm: success("plan", ckpt, "world", lab.seeds) for arm, ckpt in ADAPTED.items()}
    for name, agent in (("random actions", "random"), ("true simulator", "oracle")):
        rows[f"{name}, one seed"] = success("plan-bounds", "two-stage-adapted@", agent, lab.seeds[:1])
    return rows, [("WARM8K+E2E30K", "LAM30K+WM30K"), ("WARM8K+E2E30K", "naive 38K")]


def warmup(lab, out):
    """How LAM and generator fit each other before, during and after warm-up, and without one"""
    arms = {"warm-up, then joint": "joint", "no warm-up (naive)": "naive"}
    curves = {arm: curve(lab, run, ALIGN, end=lab.steps("38K")) for arm, run in arms.items()}
    plot(out + ".png", curves, ALIGN, mark=lab.steps("8K"))
    rows = rows_at({"before": curve(lab, "joint", ALIGN, ("align",), end=0)})
    for k in ("2K", "8K", "38K"):
        rows |= {f"{arm}, after {k}": row for arm, row in rows_at(curves, lab.steps(k)).items()}
    return rows, [[f"{arm}, after {k}" for arm in arms] for k in ("2K", "8K", "38K")]


def conditions(lab):
    """{setting: Lab} of a variant, and of those whose names begin with its"""
    settings, start = {"as it is": lab.variant}, lab.variant + "-"
    settings |= {v.removeprefix(start).replace("-", " "): v for v in VARIANTS if v.startswith(start)}
    labs = {setting: Lab(lab.preset, variant, lab.seeds, lab.kilo) for setting, variant in settings.items()}
    for other in labs.values():
        other.commands = lab.commands
    return labs


def pretrained(lab, out):
    """Flow loss of the pre-trained generator on robots, without actions, one setting changed at a time"""
    labs = conditions(lab)
    rows = {s: other.values("loss", "pretrained@", "robots none", ("loss",)) for s, other in labs.items()}
    return rows, [(setting, "as it is") for setting in labs if setting != "as it is"]


def causes(lab, out):
    """Codebook after 60K joint steps, with and without 24K of warm-up, one setting changed at a time"""
    rows, settings = {}, conditions(lab)
    for setting, other in settings.items():
        arms = {f"naive, {setting}": "naive", f"warm-up, {setting}": "joint-24K"}
        rows |= rows_at({arm: curve(other, run, CODEBOOK) for arm, run in arms.items()})
    bars(out + ".png", rows, ("naive", "warm-up"), settings, ("max_usage", "nmi"))
    return rows, [(f"warm-up, {s}", f"naive, {s}") for s in settings]


SHOWN = fig2, fig3, table2, fig4a, fig4b, warmup, table1, table3, fig5, fig6, table4, pretrained, causes
TARGETS = {show.__name__: show for show in SHOWN}


def make(target, lab):
    """Show a target, a function that returns its rows and the pairs of rows whose difference it is about"""
    lab.commands = []
    name = [target] + [part for part in lab.name.split("-") if part not in ("tiny", "main")]
    if lab.seeds != SEEDS:
        name += [f"seed{s}" for s in lab.seeds]
    out = os.path.join("out", "reproduce", "-".join(name))
    rows, pairs = TARGETS[target](lab, out)
    print(f"\n{target}: {TARGETS[target].__doc__}")
    if rows:
        print(f"{len(lab.seeds)} seeds: mean ± standard deviation; differences paired by seed, p of a t-test")
        print(markdown(rows, pairs))
    made = {"target": target, "preset": lab.preset, "variant": lab.variant, "seeds": lab.seeds,
            "steps of 1K": lab.kilo, "commands": lab.commands, "rows": rows}
    with whole(out + ".json") as part, open(part, "w") as f:
        json.dump(made, f, indent=1)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--preset", default="tiny", choices=KILO)
    parser.add_argument("--variant", default="main", choices=VARIANTS)
    parser.add_argument("--kilo", type=number(int, 1),
                        help="our steps for 1,000 of the paper's (tiny 25, small 100)")
    parser.add_argument("--seeds", type=number(int), nargs="+", default=SEEDS)
    args = parser.parse_args(argv)
    of_one = [t for t in TARGETS if t not in ("pretrained", "causes")]      # these compare conditions
    targets = of_one if args.target == "all" else [args.target]
    if not all(t.startswith("table") for t in targets):
        optional("matplotlib")          # or the complaint would come after an hour of training
    if len(args.seeds) > 1:
        optional("scipy")
    lab = Lab(args.preset, args.variant, args.seeds, args.kilo)
    for target in targets:
        make(target, lab)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # as Ctrl-C; its child ends with it
    program(main)
