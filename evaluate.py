"""The paper's tables on a trained run, and comparisons of runs: one function a task.

    python evaluate.py --ckpt out/toy --task all            # Tables 1-3 and Figures 5-6
    python evaluate.py --compare out/toy out/two-stage      # two runs that were evaluated, side by side

What is measured lies in judge.py. Numbers go to results.json in the run's folder, with the protocol by which
they were measured, pictures to samples/. Paper: section 4.1 (metrics), appendix C.1 (protocols).
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import toy
from checkpoint import load_checkpoint, load_world, restore
from config import ADAPT_BATCH, PRECISIONS, Config, Process
from data import TOY, Parser, clips, number, parse_source, program, sources, to_video
from flow import Draw, World
from formats import UserError, same_look, whole
from judge import infer, loss_by_time, predict, probe_source, save_gif, video_measures
from metrics import codebook_metrics, frechet, paired_t
from run import connected, of_first


def run_folder(ckpt):
    """Folder of the run that --ckpt names, itself or by a file in it"""
    return ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt) or "."


def table(title, rows):
    """Print {row: {column: [value of each seed]}} as mean +- standard deviation over seeds."""
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = [[title, *columns]]
    lines += [[name, *(cell(row.get(k)) for k in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip())
    print(flush=True)


def cell(values):
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def load_results(out):
    """What `save_results` wrote to out/results.json, if anything. Raises UserError for other content."""
    file = os.path.join(out, "results.json")
    if not os.path.exists(file):
        return {"step": None, "tables": {}, "protocol": {}}
    try:
        with open(file) as f:
            results = {"step": None, "protocol": {}} | json.load(f)
        numbers = [x for rows in results["tables"].values() for cells in rows.values()
                   for values in cells.values() for x in values]
        if not all(isinstance(x, (int, float)) for x in numbers) or type(results["protocol"]) is not dict:
            raise TypeError
        return results
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not the results of an evaluation; move it away") from None


def open_results(out):
    """Make the folder of results.json and samples/. What would fail after an hour of measuring fails here."""
    os.makedirs(os.path.join(out, "samples"), exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    load_results(out)


def save_results(out, ckpt, step, tables, protocol, more={}):
    """Write {task: {row: {column: [value of each seed]}}} to out/results.json.

    Other tasks of the same step stay there, and other rows that were measured by the same protocol.
    """
    results = load_results(out)
    if results["step"] != step:
        results = {"tables": {}, "protocol": {}}
    protocol = json.loads(json.dumps(protocol))                 # as it is read back: tuples are lists
    for task, rows in tables.items():
        alike = results["protocol"].get(task) == protocol
        results["tables"][task] = (results["tables"].get(task, {}) if alike else {}) | rows
        results["protocol"][task] = protocol
    with whole(os.path.join(out, "results.json")) as part, open(part, "w") as f:
        json.dump({"ckpt": ckpt, "step": step} | results | more, f, indent=1)


def read_results(names):
    """{(task, row, column): [values]} of an evaluated run; of several, A,B,..., a value is a run's mean."""
    runs = []
    for name in names.split(","):
        tables = load_results(name)["tables"]
        if not tables:
            raise UserError(f"--compare {name}: has no results.json; run --ckpt {name} first")
        runs.append({(task, row, column): values for task, rows in tables.items()
                     for row, cells in rows.items() for column, values in cells.items()})
    if len(runs) == 1:
        return runs[0]
    common = [key for key in runs[0] if all(run.get(key) for run in runs)]      # some have no value
    return {key: [float(np.mean(run[key])) for run in runs] for key in common}


def compare(a, b):
    """Two runs or two sets of runs side by side; their seeds, or the runs of the sets, are the pairs."""
    a, b = read_results(a), read_results(b)
    rows = {}
    for key in a:
        if key in b and len(a[key]) == len(b[key]):
            t, p = paired_t(a[key], b[key])
            rows[" ".join(key)] = {
                "A": a[key], "B": b[key], "A - B": [x - y for x, y in zip(a[key], b[key])],
                "t": [] if t is None else [t], "p": [] if p is None else [p], "n": [len(a[key])],
            }
    if not rows:
        raise UserError("--compare: the two have no measure with the same number of seeds in common")
    table("paired", rows)


@dataclass
class Case:
    """A trained run, the clips to measure it on, and what to measure."""
    args: Namespace             # the command line
    process: Process
    world: World
    config: dict                # the run's settings
    step: int                   # of its training
    heldout: dict               # {source: its held-out clips}
    measures: dict              # {column: function of two videos}
    features: dict              # {column: function of a video}, for the Frechet distance
    why: dict                   # {column: why it is not computed}
    out: str                    # folder of results.json and samples/

    def clips(self, data, split):
        return clips(data, self.config["size"], self.config["eval_frames"], self.config["seed"], split)

    @functools.cached_property
    def tuned(self):
        """A world with an adapter: this one, or what train.py makes of it, for which all ranks must ask.

        With it, held-out clips with true actions, their codes (n, k), and the adapter's for them (n, k).
        """
        world, source = self.world, self.args.adapt_data
        if not world.adapter:
            folder = of_first(self.process, lambda: adapted(self.args, self.config, self.step))
            world = load_world(folder, self.process.device, self.args.vae_weights)
        data = self.clips([source], "heldout")
        dims = data[[0]]["actions"].shape[-1] if data.labelled else 0
        if dims != world.adapter.action_dim:
            raise UserError(f"--adapt_data {source}: its actions have {dims} dimensions, "
                            f"the adapter takes {world.adapter.action_dim}")
        found = infer(world, data, self.args.transitions // 10)
        with torch.no_grad():
            guess = world.adapter(found["actions"].to(self.process.device)).argmax(-1).cpu()
        return world, data, found["indices"], guess


def label(source):
    """What a source is called in tables and files"""
    return parse_source(source)[0]


def by_column(seeds):
    """[{column: value} of each seed] -> {column: [value of each seed]}, of the columns that all seeds have"""
    common = [column for column in seeds[0] if all(column in numbers for numbers in seeds)]
    return {column: [numbers[column] for numbers in seeds] for column in common}


def probing(case):
    """Table 1: a linear probe from latent to true actions, a row for each source that has them."""
    args, rows = case.args, {}
    for source, test in case.heldout.items():
        if test.labelled:
            train = case.clips([source], "train")
            rows[label(source)] = by_column([
                probe_source(case.world, train, test, args.transitions, seed, True) for seed in args.seeds])
    if not rows:
        case.why["probe"] = "no source has actions"
    return rows


def losses(case):
    """The generator's flow loss, on clips as long as its own: with inferred actions, and with none."""
    args, rows = case.args, {}
    for source, data in case.heldout.items():
        # latent actions that are still continuous belong to a LAM that has not been trained
        kinds = ["inferred", "none"] if case.world.lam.quantize else ["none"]
        for kind in ["true", "none"] if case.world.true_actions else kinds:
            rows[f"{label(source)} {kind}"] = by_column([
                loss_by_time(case.world, data, args.clips, kind != "none", seed=seed)
                for seed in args.seeds])
    return rows


def prediction(case):
    """Table 2: dreams of held-out clips beside their controls, a row for each source and variant."""
    variants = ["inferred", "shuffled", "null", "copy", "whole"]
    if case.world.lam.fdm:
        variants.append("fdm")
    rows = {}
    for source, data in case.heldout.items():
        made, videos = predict_rows(case, case.world, data, variants)
        own = "true" if case.world.true_actions else "inferred"                 # actions that drive it
        rows |= {f"{label(source)} {own if variant == 'inferred' else variant}": row
                 for variant, row in made.items()}
        if case.process.master:
            save_gif(os.path.join(case.out, "samples", f"predict-{label(source)}.gif"), videos)
    return rows


def predict_rows(case, world, dataset, variants):
    """{variant: {column: [value of each seed]}} and the first videos of the first seed"""
    args, made, shown = case.args, {variant: [] for variant in variants}, None
    for seed in args.seeds:
        values, seen, videos = predict(
            world, dataset, args.clips, variants, case.measures, case.features, seed, rank=case.process.rank,
            ranks=case.process.ranks, steps=args.sampling_steps, guidance=args.guidance)
        shown = shown or videos
        for variant in variants:
            numbers = {k: x.mean().item() for k, x in values[variant].items()}
            numbers |= {k: frechet(x, seen["true"][k]) for k, x in seen[variant].items()}
            made[variant].append(numbers)
    rows = {variant: by_column(seeds) for variant, seeds in made.items()}
    if "shuffled" in variants:
        pairs = zip(rows["inferred"]["psnr"], rows["shuffled"]["psnr"])
        rows["inferred"]["controllability"] = [a - b for a, b in pairs]
    return rows, shown


def adaptation(case):
    """Table 3: dreams by a world adapted to true actions, driven by inferred actions and by true ones."""
    world, data, codes, guess = case.tuned
    rows, _ = predict_rows(case, world, data, ["inferred", "adapted", "copy"])
    rows["adapted"]["code_accuracy"] = [(guess == codes).float().mean().item()]
    return rows


def codebook(case):
    """Figure 5: how codes are used on training clips, on held-out ones, and by the adapter."""
    world, n, num_codes = case.world, case.args.transitions // 10, case.world.lam.cfg.num_codes
    usage = {"training": infer(world, case.clips(case.config["data"], "train"), n)["indices"]}
    for source, data in case.heldout.items():
        usage[f"inferred, {label(source)}"] = infer(world, data, n)["indices"]
    if world.adapter or case.args.task == "all":                # which has adapted the world by now
        *_, guess = case.tuned
        usage[f"adapter, {label(case.args.adapt_data)}"] = guess
    return {name: {k: [v] for k, v in codebook_metrics(x, num_codes).items()} for name, x in usage.items()}


@torch.no_grad()
def transfer(case):
    """Figure 6, a picture: actions of the first source's clips, acted out by themselves and by the last's."""
    names, device = list(case.heldout), case.process.device
    donor = to_video(case.heldout[names[0]][range(4)]["video"], device)
    # clips of other numbers: toy robots share worlds and moves clip by clip
    other = to_video(case.heldout[names[-1]][range(4, 8)]["video"], device)
    z, videos = case.world.lam.encode(donor)[0], [donor.cpu()]
    for start in (donor, other):
        made = case.world.rollout(start[:, :, :1], z, case.args.sampling_steps, case.args.guidance,
                                  draw=Draw(0, device=device))
        videos.append(made.cpu())
    save_gif(os.path.join(case.out, "samples", "transfer.gif"), videos)


TASKS = {"probe": probing, "loss": losses, "predict": prediction, "adapt": adaptation, "codebook": codebook,
         "transfer": transfer}
SHARED = ("predict", "adapt")       # many clips are dreamed, which ranks share; the rest is for the first


def adapted(args, config, step):
    """Folder of the run that adapts --ckpt, of this step, to --adapt_data: by train.py unless it is whole.

    It lies in the folder of --ckpt, so that it is not taken for that of another run or another step.
    """
    target = os.path.join(run_folder(args.ckpt), f"adapted-{label(args.adapt_data)}-{step}")
    log = Path(target, "metrics.jsonl")
    if log.exists() and '"event": "result"' in log.read_text():
        return target
    print(f"adapts {args.ckpt} to {args.adapt_data}: in {target}", flush=True)
    if not os.path.exists(os.path.join(target, "ckpt.pt")):
        # the run's settings, but for those that an adaptation has of its own, and that an older run had
        own = ("name", "preset", "mode", "data", "init", "init_lam", "dit_weights", "resume", "freeze_lam",
               "dry_run", "batch", "eval_clips", "precision")
        kept = {f.name: config[f.name] for f in fields(Config) if f.name in config and f.name not in own}
        if args.vae_weights:
            kept["vae_weights"] = args.vae_weights
        settings = Config(name=os.path.basename(target), mode="adapt", init=os.path.abspath(args.ckpt),
                          data=args.adapt_data, batch=ADAPT_BATCH, eval_clips=1, precision=args.precision,
                          **kept)
        os.makedirs(target, exist_ok=True)
        with whole(os.path.join(target, "config.json")) as part, open(part, "w") as f:
            json.dump(asdict(settings) | {"torchrun": None}, f, indent=1)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, script, f"--resume={target}"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, env=alone)
    if done.returncode:
        complaint = done.stderr.strip() or f"status {done.returncode}"
        raise UserError(f"adaptation failed: {complaint.splitlines()[-1]}")
    return target


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="run folder or checkpoint")
    add("--task", default="all", choices=(*TASKS, "all"))
    add("--data", nargs="+", help="sources to measure on, a row each (toy: all robots; else the run's own)")
    add("--adapt_data", help="source with actions to adapt to (toy: held-out)")
    add("--seeds", type=number(int), nargs="+", default=[0, 1, 2],
        help="each has its own clips, noise and probe")
    add("--clips", type=number(int, 2), default=64, help="dreamed clips a source and seed (the paper: 1920)")
    add("--transitions", type=number(int, 20), default=20000,
        help="of the probe, held out; a tenth for the codebook")
    add("--sampling_steps", type=number(int, 1), help="Euler steps (as trained)")
    add("--guidance", type=number(float), help="guidance scale (as trained)")
    add("--i3d", help="FVD's network: StyleGAN-V's I3D as TorchScript")
    add("--vae_weights", help="where Open-Sora's VAE lies now")
    add("--precision", default="auto", choices=PRECISIONS, help="bf16 autocast; auto: on cuda")
    add("--out", help="folder of results.json and samples (the run's)")
    add("--compare", nargs=2, metavar=("A", "B"), help="two evaluated runs, or comma-separated sets of them")
    args = parser.parse_args(argv)
    if not (args.ckpt or args.compare):
        parser.error("--ckpt: which run?")
    return args


def open_case(args, process):
    """What the command line names, opened. Raises UserError for what cannot be."""
    state = load_checkpoint(args.ckpt)
    config, world = state["config"], restore(state, args.vae_weights).to(process.device).eval()
    if world.true_actions and args.task not in ("predict", "loss"):
        raise UserError(f"{args.ckpt}: is driven by true actions; of it --task predict and loss are measured")
    if args.task in ("codebook", "transfer", "all") and not world.lam.quantize:
        raise UserError(f"{args.ckpt}: its latent actions are still continuous")
    measured = video_measures(config["size"], config["eval_frames"], process.device, args.i3d)
    case = Case(args, process, world, config, state["step"], {}, *measured, args.out or run_folder(args.ckpt))
    on_toys = config["data"] in TOY
    for name in args.data or (toy.EMBODIMENTS if on_toys else sources(config["data"])):
        case.heldout[name] = case.clips([name], "heldout")
        same_look({f"--ckpt {args.ckpt}": world.look, f"--data {name}": case.heldout[name].look})
    if not args.adapt_data:
        labelled = [name for name, data in case.heldout.items() if data.labelled]
        args.adapt_data = config["data"]
        if labelled and not world.adapter:
            args.adapt_data = "held-out" if on_toys else labelled[0]
    return case


def main(argv):
    args = parse(argv)
    if args.compare:
        return compare(*args.compare)
    process = Process.here(precision=args.precision)
    with connected(process, hours=24):              # the first adapts and measures alone
        evaluate(args, process)


def evaluate(args, process):
    case = open_case(args, process)
    open_results(case.out)
    cfg, frames = case.world.cfg, case.config["eval_frames"]
    protocol = {                                                # numbers compare with those measured alike
        "clips": args.clips, "frames": frames, "generated": frames - 1, "size": case.config["size"],
        "trained_frames": 1 + cfg.window * case.world.vae.time_stride,
        "transitions": args.transitions, "seeds": args.seeds,
        "sampling_steps": args.sampling_steps or cfg.sampling_steps,
        "guidance": cfg.guidance if args.guidance is None else args.guidance,
        "precision": process.precision, "lpips": "alex, x100", "ssim": "x100"}
    tasks = list(TASKS) if args.task == "all" else [args.task]
    for task in tasks:
        with process.autocast():
            rows = TASKS[task](case) if process.master or task in SHARED else None
        if process.master:
            if rows:
                table(task, rows)
            tables = {task: rows} if rows else {}
            save_results(case.out, args.ckpt, case.step, tables, protocol, {"not_computed": case.why})
    if process.master:
        for column in ("ssim", "lpips", "fvd"):
            if column in case.why and set(tasks) & set(SHARED):
                print(f"{column}: not computed; {case.why[column]}")
        print("protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()))


if __name__ == "__main__":
    program(main)
