"""Every figure and table of the paper, as the commands that make it.

    python reproduce.py fig2                            # fig3, fig4a, fig4b, fig5, fig6, table1 ... table4, warmup, all
    python reproduce.py fig2 --variant unstandardized --seeds 0 1 2    # under other conditions
    python reproduce.py causes --variant light-vq       # under all conditions whose names begin so, side by side

A run or a measurement is made once, by the command that is printed, and shared by all figures that need it; what was
interrupted goes on. Seeds are independent: start one process a seed (OMP_NUM_THREADS=1), and one for all at the end;
but not two processes on one seed. What is there is not made anew when the code has changed: delete out/reproduce then.
Output: out/reproduce/TARGET[-VARIANT][-kiloN][-seedN].json with the numbers of every seed, .png or .gif, and a table, .md.
Training budgets are the paper's (section 4), all by one factor, KILO or --kilo; those of pre-training and adaptation, COMMON and
VARIANTS are ours.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np

from data import Parser
from evaluate import paired_t

HERE = os.path.dirname(os.path.abspath(__file__))
SEEDS = [0, 1, 2]
KILO = {"tiny": 25, "small": 100}       # our steps for 1,000 steps of the paper

# name: flags of train.py. 8K is 8,000 steps of the paper, RUN@8K the checkpoint of a run after so many, RUN@ its last.
# The branches of "warmup" start with fresh moments and a learning-rate warm-up of their own, unlike "joint".
RUNS = {
    "pretrained": "--mode pretrain",
    "two-stage": "--dit_weights pretrained@ --mode two-stage --lam_steps 30K --wm_steps 30K",
    "two-stage-8K": "--dit_weights pretrained@ --mode two-stage --lam_steps 0 --init_lam two-stage@8K --wm_steps 52K",
    "joint": "--dit_weights pretrained@ --warmup 8K --e2e 52K --eval_every 4K",
    "naive": "--dit_weights pretrained@ --warmup 0 --e2e 60K",
    "naive-trained": "--dit_weights pretrained@ --warmup 0 --e2e 30K --init_lam two-stage@30K",
    "both-random": "--pretrain 0 --warmup 0 --e2e 30K",
    "joint-24K": "--dit_weights pretrained@ --warmup 24K --e2e 36K",
    "warmup": "--dit_weights pretrained@ --warmup 30K --e2e 0",
    "warmup-4K": "--init warmup@4K --warmup 0 --e2e 12K",
    "warmup-8K": "--init warmup@8K --warmup 0 --e2e 12K",
    "warmup-16K": "--init warmup@16K --warmup 0 --e2e 12K",
    "warmup-24K": "--init warmup@24K --warmup 0 --e2e 12K",
    "frozen": "--dit_weights pretrained@ --warmup 8K --e2e 52K --eval_every 4K --freeze_lam",
    "two-stage-adapted": "--mode adapt --data held-out --init two-stage@ --adapter_steps 12K --adapt_steps 12K",
    "joint-adapted": "--mode adapt --data held-out --init joint@38K --adapter_steps 12K --adapt_steps 12K",
    "naive-adapted": "--mode adapt --data held-out --init naive@38K --adapter_steps 12K --adapt_steps 12K",
}
KEPT = ("4K", "8K", "14K", "16K", "22K", "24K", "30K", "38K")            # checkpoints that something starts from or measures
COMMON = "--vq_start 0 --cooldown 0 --real_share 0 --lr_warmup 2K --log_every 2K --eval_every 1000K --ckpt_every 2K --keep 30 --eval_clips 64 --eval_transitions 2048"
LIGHT = "--standardize 0 --latent_scale 0.1"
VARIANTS = {                                        # numbers for tiny
    "main": "",                                     # the devices of the preset, but quantized from the first step
    "unstandardized": "--standardize 0 --latent_scale 0.3",     # the IDM's output times a constant, which two-stage learns with
    "light-vq": LIGHT,                              # a third of that: the VQ losses weigh a ninth
    "light-vq-low-lr": f"{LIGHT} --lr 5e-4",
    "light-vq-bidirectional": f"{LIGHT} --causal 0",            # pre-training, as Open-Sora's was
    "light-vq-pretrain-3000": f"{LIGHT} --pretrain 3000",
}
MEASURES = {
    "probe": "evaluate.py --task probe --transitions 4096 --seeds SEED",
    "predict": "evaluate.py --task predict --seeds SEED",
    "adapt": "evaluate.py --task adapt --transitions 4096 --seeds SEED",
    "codebook": "evaluate.py --task codebook",
    "transfer": "evaluate.py --task transfer",
    "plan": "plan.py --samples 32 --seeds SEED",
    "plan-bounds": "plan.py --samples 32 --random --oracle --seeds SEED",
}


def pyplot():
    """matplotlib, which draws into files; only who draws needs it."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("reproduce.py: needs pip install -r requirements-extra.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def says(file, text):
    return os.path.exists(file) and open(file).read() == text


class Lab:
    """The runs and measurements of one preset, variant and time scale, by seed."""

    def __init__(self, preset, variant, seeds, kilo=None):
        self.preset, self.variant, self.seeds, self.kilo = preset, variant, seeds, kilo or KILO[preset]
        self.name = "-".join([preset, variant] + [f"kilo{kilo}"] * (self.kilo != KILO[preset]))
        self.commands = []              # that a target takes, as printed

    def folder(self, run, seed):
        return os.path.join("out", "reproduce", self.name, str(seed), run)

    def steps(self, text):
        return int(text[:-1]) * self.kilo

    def checkpoint(self, text, seed):
        """RUN@8K or RUN@ -> path; a run's last checkpoint is its folder"""
        run, at = text.split("@")
        folder = self.folder(run, seed)
        file = os.path.join(folder, f"ckpt-{self.steps(at):08d}.pt") if at else folder
        if os.path.exists(file):
            return file
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            if json.loads(f.readlines()[-1])["step"] != self.steps(at):
                sys.exit(f"reproduce.py: {file} is gone; delete {folder} and start again")
        return folder

    def words(self, text, seed):
        """The words of a command with their steps, checkpoints and seeds filled in"""
        return [str(self.steps(w)) if w[:-1].isdigit() and w.endswith("K") else self.checkpoint(w, seed) if "@" in w
                else str(seed) if w == "SEED" else w for w in text.split()]

    def command(self, script, flags):
        command = shlex.join(["python", script, *flags])
        if command not in self.commands:
            self.commands.append(command)
            print(command, flush=True)
        return command

    def execute(self, command, flags):
        done = subprocess.run([sys.executable, os.path.join(HERE, command.split()[1]), *flags], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"reproduce.py: this failed: {command}")

    def train(self, run, seed):
        """Train a run, and what it starts from, unless that is done. Returns its recipe: its command, then theirs."""
        parents = [self.train(word.split("@")[0], seed) for word in RUNS[run].split() if "@" in word]
        out = self.folder(run, seed)
        flags = self.words(f"{COMMON} {VARIANTS[self.variant]} {RUNS[run]}", seed)
        flags = ["--name", os.path.relpath(out, "out"), "--preset", self.preset, "--seed", str(seed), *flags]
        command = self.command("train.py", flags)
        recipe, metrics, note = "\n".join([command, *parents]), os.path.join(out, "metrics.jsonl"), out + ".txt"
        if says(note, recipe) and os.path.exists(metrics):
            if '"event": "result"' in open(metrics).read():
                return recipe
            flags = ["--resume", out]
            print(f"goes on by: python train.py --resume {out}")
        elif os.path.exists(metrics):
            os.replace(metrics, metrics + ".old")           # of another recipe; train.py moves its folder aside
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with open(note, "w") as f:
            f.write(recipe)
        self.execute(command, flags)
        kept = {f"ckpt-{self.steps(k):08d}.pt" for k in KEPT}
        for file in os.listdir(out):
            if file.startswith("ckpt-") and file not in kept:
                os.remove(os.path.join(out, file))
        return recipe

    def measure(self, task, ckpt, seed):
        """{row: {column: [value]}} of a checkpoint RUN@8K, measured unless that is done."""
        run, at = ckpt.split("@")
        trained = self.train(run, seed)
        script, *flags = self.words(MEASURES[task], seed)
        out = os.path.join(self.folder(run, seed), f"{task}-{at or 'last'}")
        flags = ["--ckpt", self.checkpoint(ckpt, seed), *flags, "--out", out]
        command = self.command(script, flags)
        recipe, note = f"{command}\n{trained}", out + ".txt"
        if not says(note, recipe):
            self.execute(command, flags)
            with open(note, "w") as f:                      # once it is whole
                f.write(recipe)
        if task == "transfer":
            return os.path.join(out, "samples", "transfer.gif")
        with open(os.path.join(out, "results.json")) as f:
            return json.load(f)["tables"][task.split("-")[0]]


# what the runs say ----------------------------------------------------------------------------------------------------


def curve(lab, run, keys, events=("train",), phase=None, end=None):
    """(steps, {key: (seeds, steps)}): what the runs of all seeds logged up to step `end`"""
    logs = []
    for seed in lab.seeds:
        with open(os.path.join(lab.folder(run, seed), "metrics.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        logs.append({r["step"]: r for r in rows if r["event"] in events and phase in (None, r["phase"]) and r["step"] <= (end or r["step"])})
    steps = sorted(set.intersection(*map(set, logs)))                           # a stop may have cost an evaluation
    value = lambda row, k: np.nan if row.get(k) is None else row[k]
    return np.array(steps), {k: np.array([[value(log[s], k) for s in steps] for log in logs], float) for k in keys}


def rows_at(curves, step=None):
    """{arm: {key: [value of each seed]}} at a step, else the last, of what all seeds logged there"""
    at = lambda steps: -1 if step is None else steps.tolist().index(step)
    return {arm: {k: v[:, at(steps)].tolist() for k, v in values.items() if not np.isnan(v[:, at(steps)]).any()} for arm, (steps, values) in curves.items()}


def sd_of(values):
    """Standard deviation over seeds, the first axis"""
    return np.std(values, 0, ddof=min(1, len(values) - 1))


def plot(path, curves, titles, levels={}, mark=None):
    """A panel a key, a line an arm: the mean over seeds and a band of one standard deviation. levels: {arm: {key: [values]}}, dashed"""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(titles), figsize=(max(6, 3.6 * len(titles)), 3.2), layout="constrained", squeeze=False)
    for axis, (key, title) in zip(axes[0], titles.items()):
        for arm, (steps, values) in curves.items():
            mean, sd = values[key].mean(0), sd_of(values[key])
            line, = axis.plot(steps, mean, label=arm, marker="." if len(steps) < 15 else None)
            axis.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)
        for arm, row in levels.items():
            axis.axhline(np.mean(row[key]), color="black", linestyle="--", linewidth=1, label=arm)
        if mark:
            axis.axvline(mark, color="black", linestyle=":", linewidth=1)
        if key in CODEBOOK:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=10), axis.set_xlabel("steps"), axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(path, rows, arms, groups, keys):
    """A panel a key, a bar for each row `arm, group`"""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(keys), figsize=(10, 3.2), layout="constrained")
    for axis, key in zip(axes, keys):
        for i, arm in enumerate(arms):
            values = [rows[f"{arm}, {group}"][key] for group in groups]
            axis.bar(np.arange(len(groups)) + 0.4 * i - 0.2, np.mean(values, 1), 0.38, yerr=sd_of(np.transpose(values)), label=arm)
        axis.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups], fontsize=8), axis.set_title(CODEBOOK[key], fontsize=10)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


CODEBOOK = {"utilization": "codebook utilization", "max_usage": "max usage", "entropy": "entropy", "nmi": "NMI with the true action (cross, held-out)"}
ALIGN = {"latent_var": "variance of latent actions", "cka": "CKA of latent actions and action features",
         "sensitivity": "change of velocity by swapped actions", "grad_cosine": "cosine of successive IDM gradients", "nmi": "NMI with the true action"}
ROBOTS = ("cross", "slide", "tank", "held-out")


def lam_level(lab):
    """The codebook of the two-stage LAM at its end"""
    steps, values = curve(lab, "two-stage", CODEBOOK, phase="lam")
    values["nmi"] = curve(lab, "two-stage", ["nmi"], ("align",))[1]["nmi"]   # logged when the generator starts on it
    return rows_at({"two-stage LAM": (steps, values)})


def fig2(lab, out):
    """Codebook in joint training without warm-up, from a random or a trained IDM; both random; and with warm-up"""
    arms = {"rand IDM + pre WM (naive)": "naive", "pre IDM + pre WM": "naive-trained", "rand IDM + rand WM": "both-random", "warm-up, then joint": "joint"}
    curves = {arm: curve(lab, run, CODEBOOK, end=lab.steps("30K")) for arm, run in arms.items()}
    plot(out + ".png", curves, CODEBOOK, lam_level(lab))
    naive = "rand IDM + pre WM (naive)"
    return rows_at(curves) | lam_level(lab), [(naive, "two-stage LAM"), ("pre IDM + pre WM", "two-stage LAM"), ("warm-up, then joint", naive),
                                              ("warm-up, then joint", "pre IDM + pre WM"), ("rand IDM + rand WM", naive)]


def fig3(lab, out):
    """Codebook in joint training (12K) after warm-ups of several lengths, all branches of one warm-up run (30K)"""
    curves = {"pure warm-up": curve(lab, "warmup", CODEBOOK), "warm-up 0K": curve(lab, "naive", CODEBOOK, end=lab.steps("12K"))}
    for k in ("4K", "8K", "16K", "24K"):
        steps, values = curve(lab, f"warmup-{k}", CODEBOOK)
        curves[f"warm-up {k}"] = steps + lab.steps(k), values
    plot(out + ".png", curves, CODEBOOK)
    return rows_at(curves), [(f"warm-up {k}", "warm-up 0K") for k in ("4K", "8K", "16K", "24K")]


def fig4a(lab, out):
    """Probing loss on the held-out robot: LAM taught by a frozen generator against one by a generator that trains"""
    at = ("8K", "14K", "22K", "30K")
    curves = {}
    for arm, run in {"pure warm-up": "warmup", "warm-up + e2e": "joint"}.items():
        found = [[lab.measure("probe", f"{run}@{k}", seed)["held-out"] for k in at] for seed in lab.seeds]
        curves[arm] = np.array([lab.steps(k) for k in at]), {c: np.array([[row[c][0] for row in rows] for rows in found]) for c in ("l1", "l1_constant")}
    plot(out + ".png", curves, {"l1": "probe L1, held-out robot"}, {"constant predictor": {"l1": curves["pure warm-up"][1]["l1_constant"][:, 0]}})
    return rows_at(curves), [("warm-up + e2e", "pure warm-up")]


def fig4b(lab, out):
    """Prediction while the LAM evolves or stays frozen after warm-up"""
    keys = {"psnr": "PSNR, inferred actions (dB)", "controllability": "controllability (dB)"}
    curves = {arm: curve(lab, run, keys, ("eval", "result")) for arm, run in {"LAM frozen after warm-up": "frozen", "warm-up + e2e": "joint"}.items()}
    plot(out + ".png", curves, keys)
    return rows_at(curves), [("warm-up + e2e", "LAM frozen after warm-up")]


def fig5(lab, out):
    """Codebook on training clips, on clips of the held-out robot, and as the adapter makes it of that robot's actions"""
    rows = {}
    for arm, run, tuned in (("two-stage", "two-stage@", "two-stage-adapted@"), ("joint", "joint@38K", "joint-adapted@")):
        for seed in lab.seeds:
            base, adapted = lab.measure("codebook", run, seed), lab.measure("codebook", tuned, seed)
            for where, found in {"training": base["training"], "inferred": adapted["inferred, held-out"], "adapter": adapted["adapter, held-out"]}.items():
                for k, v in found.items():
                    rows.setdefault(f"{arm}, {where}", {}).setdefault(k, []).extend(v)
    bars(out + ".png", rows, ("two-stage", "joint"), ("training", "inferred", "adapter"), ("utilization", "max_usage", "entropy"))
    return rows, [("joint, adapter", "two-stage, adapter")]


def fig6(lab, out):
    """Latent actions of one clip applied to the first frame of another robot's"""
    for seed in lab.seeds[:1]:
        shutil.copy(lab.measure("transfer", "joint@", seed), out + ".gif")
    return {}, []


def by_source(lab, task, arms, columns, rows_of):
    """{"source arm": {column: [value of each seed]}} of measured checkpoints"""
    rows = {}
    for source in ROBOTS:
        for arm, ckpt in arms.items():
            found = [lab.measure(task, ckpt, seed)[rows_of.format(source)] for seed in lab.seeds]
            rows[f"{source}: {arm}"] = {c: [v for f in found for v in f[c]] for c in columns if c in found[0]}
    return rows


def table1(lab, out):
    """Linear probe of latent actions, L1"""
    rows = by_source(lab, "probe", {"LAM30K": "two-stage@30K", "WARM8K+E2E22K": "joint@30K"}, ("l1", "l1_constant", "r2", "nmi"), "{}")
    return rows, [(f"{s}: WARM8K+E2E22K", f"{s}: LAM30K") for s in ROBOTS]


def table2(lab, out):
    """Video prediction, frame by frame from the first, with inferred actions"""
    arms = {"LAM30K+WM30K": "two-stage@", "LAM8K+WM52K": "two-stage-8K@", "WARM8K+E2E52K": "joint@", "WARM8K+E2E30K": "joint@38K", "naive 60K": "naive@"}
    columns = ("psnr", "ssim", "rfvd", "controllability")
    rows = by_source(lab, "predict", arms, columns, "{} inferred")
    rows |= by_source(lab, "predict", {"LAM30K, FDM's own rollout": "two-stage@"}, columns, "{} fdm")
    rows |= by_source(lab, "predict", {"first frame held still": "two-stage@"}, columns, "{} copy")
    rows = {r: rows[r] for s in ROBOTS for r in rows if r.startswith(s + ":")}
    return rows, [(f"{s}: {a}", f"{s}: {b}") for s in ROBOTS for a, b in (
        ("WARM8K+E2E52K", "LAM30K+WM30K"), ("WARM8K+E2E52K", "LAM8K+WM52K"), ("WARM8K+E2E30K", "LAM30K+WM30K"), ("WARM8K+E2E30K", "LAM8K+WM52K"),
        ("WARM8K+E2E52K", "naive 60K"), ("naive 60K", "LAM30K+WM30K"), ("LAM30K, FDM's own rollout", "LAM30K+WM30K"))]


ADAPTED = {"LAM30K+WM30K": "two-stage-adapted@", "WARM8K+E2E30K": "joint-adapted@", "naive 38K": "naive-adapted@"}


def table3(lab, out):
    """Video prediction of worlds adapted to the held-out robot, with inferred actions and with real ones through the adapter"""
    rows = {}
    for kind, name in {"inferred": "GT-LAM", "adapted": "real action"}.items():
        for arm, ckpt in ADAPTED.items():
            found = [lab.measure("adapt", ckpt, seed)[kind] for seed in lab.seeds]
            rows[f"{name}: {arm}"] = {c: [v for f in found for v in f[c]] for c in ("psnr", "ssim", "rfvd", "code_accuracy") if c in found[0]}
    still = [lab.measure("adapt", "two-stage-adapted@", seed)["copy"] for seed in lab.seeds]            # the same clips for every arm
    rows["first frame held still"] = {c: [v for f in still for v in f[c]] for c in ("psnr", "ssim", "rfvd")}
    return rows, [(f"{n}: WARM8K+E2E30K", f"{n}: {arm}") for n in ("GT-LAM", "real action") for arm in ("LAM30K+WM30K", "naive 38K")]


def table4(lab, out):
    """Planning with worlds adapted to the held-out robot: success rate on the toy tasks, between random actions and the true simulator"""
    agents = {arm: ("plan", ckpt, "world", lab.seeds) for arm, ckpt in ADAPTED.items()}
    agents |= {f"{name}, one seed": ("plan-bounds", "two-stage-adapted@", agent, lab.seeds[:1]) for name, agent in (("random actions", "random"), ("true simulator", "oracle"))}
    rows = {}
    for arm, (task, ckpt, agent, seeds) in agents.items():
        found = [lab.measure(task, ckpt, seed) for seed in seeds]
        rows[arm] = {goal: [v for f in found for v in f[f"{goal} {agent}"]["success"]] for goal in ("reach", "push")}
        rows[arm]["average"] = np.mean([rows[arm]["reach"], rows[arm]["push"]], 0).tolist()
    return rows, [("WARM8K+E2E30K", "LAM30K+WM30K"), ("WARM8K+E2E30K", "naive 38K")]


def warmup(lab, out):
    """How LAM and generator fit each other before, during and after warm-up, and without one"""
    curves = {arm: curve(lab, run, ALIGN, end=lab.steps("38K")) for arm, run in {"warm-up, then joint": "joint", "no warm-up (naive)": "naive"}.items()}
    plot(out + ".png", curves, ALIGN, mark=lab.steps("8K"))
    rows = {f"{arm}, after {k}": row for k in ("2K", "8K", "38K") for arm, row in rows_at(curves, lab.steps(k)).items()}
    start = rows_at({"before": curve(lab, "joint", ALIGN, ("align",), "warmup")})
    return start | rows, [(f"warm-up, then joint, after {k}", f"no warm-up (naive), after {k}") for k in ("2K", "8K", "38K")]


def causes(lab, out):
    """Codebook after 60K steps of joint training, without a warm-up and with 24K of it, under conditions that differ in one setting each"""
    settings = {"as it is": lab.variant} | {v[len(lab.variant) + 1:].replace("-", " "): v for v in VARIANTS if v.startswith(lab.variant + "-")}
    rows = {}
    for setting, variant in settings.items():
        other = Lab(lab.preset, variant, lab.seeds, lab.kilo)
        other.commands = lab.commands
        for run in ("pretrained", "naive", "joint-24K"):
            for seed in lab.seeds:
                other.train(run, seed)
        for arm, run in {"naive": "naive", "warm-up": "joint-24K"}.items():
            rows |= rows_at({f"{arm}, {setting}": curve(other, run, CODEBOOK)})
            rows[f"{arm}, {setting}"]["pre-trained loss"] = curve(other, "pretrained", ["loss"], ("result",))[1]["loss"][:, -1].tolist()
    bars(out + ".png", rows, ("naive", "warm-up"), settings, ("max_usage", "nmi"))
    return rows, [(f"warm-up, {s}", f"naive, {s}") for s in settings]


# target: its runs, and what is made of them
TARGETS = {
    "fig2": (["naive", "naive-trained", "both-random", "joint", "two-stage"], fig2),
    "fig3": (["naive", "warmup", "warmup-4K", "warmup-8K", "warmup-16K", "warmup-24K"], fig3),
    "table2": (["two-stage", "two-stage-8K", "joint", "naive"], table2),
    "fig4a": (["warmup", "joint"], fig4a),
    "fig4b": (["frozen", "joint"], fig4b),
    "warmup": (["joint", "naive"], warmup),
    "table1": (["two-stage", "joint"], table1),
    "table3": (["two-stage-adapted", "joint-adapted", "naive-adapted"], table3),
    "fig5": (["two-stage-adapted", "joint-adapted"], fig5),
    "fig6": ([], fig6),                 # of one seed
    "table4": (["two-stage-adapted", "joint-adapted", "naive-adapted"], table4),
    "causes": (["naive", "joint-24K"], causes),
}


def markdown(rows, pairs):
    """The rows as mean +- standard deviation over seeds, and the paired differences"""
    spread = lambda v: "-" if not len(v) else f"{np.mean(v):.4g}" + (f" ± {sd_of(v):.2g}" if len(v) > 1 else "")
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = [["", *columns], ["---"] * (1 + len(columns))] + [[name, *(spread(row.get(k, [])) for k in columns)] for name, row in rows.items()]
    for a, b in pairs:
        cells = []
        for k in columns:
            x, y = rows[a].get(k, []), rows[b].get(k, [])
            t, p = paired_t(x, y) if len(x) == len(y) > 1 else (None, None)
            cells.append("-" if len(x) != len(y) or not x else spread(np.subtract(x, y)) + (f" (p {p:.2g})" if p is not None else ""))
        lines.append([f"*{a} minus {b}*", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--preset", default="tiny", choices=KILO)
    parser.add_argument("--variant", default="main", choices=VARIANTS)
    parser.add_argument("--kilo", type=int, help="our steps for 1,000 of the paper's (tiny 25, small 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args(argv)
    if args.kilo is not None and args.kilo < 1:
        parser.error(f"--kilo {args.kilo}: must be at least 1")
    lab = Lab(args.preset, args.variant, args.seeds, args.kilo)
    pyplot()                            # before hours of training, not after
    for target in [t for t in TARGETS if t != "causes"] if args.target == "all" else [args.target]:
        lab.commands, (runs, show) = [], TARGETS[target]
        for seed in args.seeds:
            for run in runs:
                lab.train(run, seed)
        other = [v for v in lab.name.split("-") if v not in ("tiny", "main")] + [f"seed{s}" for s in args.seeds if args.seeds != SEEDS]
        out = os.path.join("out", "reproduce", "-".join([target, *other]))
        rows, pairs = show(lab, out)
        files = {".json": json.dumps({"target": target, "preset": args.preset, "variant": args.variant, "seeds": args.seeds, "steps of 1K": lab.kilo,
                                      "commands": lab.commands, "rows": rows}, indent=1)}
        print(f"\n{target}: {show.__doc__}")
        if rows:
            files[".md"] = markdown(rows, pairs)
            print(f"n = {len(args.seeds)} seeds; mean ± standard deviation; differences are paired by seed, p of a t-test\n{files['.md']}")
        for end, content in files.items():
            with open(out + end + ".part", "w") as f:
                f.write(content)
            os.replace(out + end + ".part", out + end)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("reproduce.py: terminated; the same command goes on"))    # and its child ends with it
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("reproduce.py: interrupted; the same command goes on")
