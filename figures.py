"""What was measured, as plots, as tables, and as docs/results.md.

    python figures.py       # writes every number and link of docs/results.md anew

The prose of docs/results.md is written by hand. What stands there between a comment and <!----> is written
from the code and from assets/reproduce/*.json (reproduce.py makes them; paper.json is typed from the paper):

    <!-- mean JSON | row | column -->0.94 ± 0.03<!---->             ± standard deviation over seeds
    <!-- mean JSON | row minus row | column -->+0.67 ± 0.11 (p 0.0088)<!---->   paired by seed, p of a t-test
    <!-- seeds JSON | row | column -->0.93, 0.97, 0.92<!---->
    <!-- link file.py | a piece of a line that no other has -->[file.py, line 12](../file.py#L12)<!---->
    <!-- table ... --> and <!-- verdicts ... -->    over lines: see `table` and `verdicts` below

One that names nothing is an error. None in a sentence may start a line, or Markdown takes the rest for HTML.
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from data import Parser, program
from formats import UserError, optional
from metrics import paired_t

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "docs", "results.md")
CODEBOOK = {"utilization": "codebook utilization", "max_usage": "max usage", "entropy": "entropy",
            "nmi": "NMI with the true action (cross, held-out)"}
ALIGN = {"latent_var": "variance of latent actions", "cka": "CKA of latent actions and action features",
         "sensitivity": "change of velocity by swapped actions",
         "grad_cosine": "cosine of successive IDM gradients", "nmi": "NMI with the true action"}
FORMAT = {"psnr": ".1f", "ssim": ".1f", "controllability": ".1f", "l1": ".3f", "l1_constant": ".3f",
          "loss": ".3f", "sensitivity": ".3f", "latent_var": ".1e", "paper's l1": ".4f",
          "paper's average": ".4f"}
VERDICTS = ("reproduced", "direction only", "not told apart", "not reproduced")


def curve(lab, run, keys, events=("train",), end=np.inf):
    """What a run of a reproduce.Lab logged, to step `end`: steps, {key: (seeds, steps), NaN where missing}"""
    logs = []                   # {step: log line} of each seed
    for seed in lab.seeds:
        rows = [row for row in lab.log(run, seed) if row["event"] in events and row["step"] <= end]
        logs.append({row["step"]: row for row in rows})
    steps = sorted(set.intersection(*map(set, logs)))                   # a stop may have cost an evaluation
    values = {k: np.array([[log[s].get(k) for s in steps] for log in logs], float) for k in keys}
    return np.array(steps), values


def rows_at(curves, step=None):
    """{arm: {key: [value of each seed]}} at a step, else the last, of what all seeds logged there"""
    rows = {}
    for arm, (steps, values) in curves.items():
        at = -1 if step is None else steps.tolist().index(step)
        rows[arm] = {k: v[:, at].tolist() for k, v in values.items() if not np.isnan(v[:, at]).any()}
    return rows


def sd_of(values):
    """Standard deviation over seeds, the first axis; 0 of a single one"""
    return np.std(values, 0, ddof=min(1, len(values) - 1))


def plot(path, curves, titles, levels=None, mark=None):
    """A panel a key, a line an arm: the mean over seeds and a band of one standard deviation.

    Args:
        curves: {arm: (steps, {key: (seeds, steps)})}. titles: {key: title of its panel}.
        levels: {arm: {key: [values]}}, dashed horizontal lines. mark: step of a dotted vertical line.
    """
    size = max(6, 3.6 * len(titles)), 3.2
    figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)
    for axis, (key, title) in zip(axes[0], titles.items()):
        for arm, (steps, values) in curves.items():
            mean, sd = values[key].mean(0), sd_of(values[key])
            line, = axis.plot(steps, mean, label=arm, marker="." if len(steps) < 15 else None)
            axis.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)
        for arm, row in (levels or {}).items():
            axis.axhline(np.mean(row[key]), color="black", linestyle="--", linewidth=1, label=arm)
        if mark:
            axis.axvline(mark, color="black", linestyle=":", linewidth=1)
        if key in CODEBOOK:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)


def bars(path, rows, arms, groups, keys):
    """A panel a key, a bar for each row `arm, group`: the mean and the standard deviation over seeds"""
    figure = optional("matplotlib.figure").Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(keys))
    for axis, key in zip(axes, keys):
        for i, arm in enumerate(arms):
            values = np.transpose([rows[f"{arm}, {group}"][key] for group in groups])       # (seeds, groups)
            at = np.arange(len(groups)) + 0.4 * i - 0.2
            axis.bar(at, values.mean(0), 0.38, yerr=sd_of(values), label=arm)
        axis.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups], fontsize=8)
        axis.set_title(CODEBOOK[key], fontsize=10)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def number(x, column, sign=""):
    return format(x, sign + FORMAT.get(column, ".2f"))


def spread(values, column, sign=""):
    """[value of each seed] -> `mean ± standard deviation`"""
    mean = number(np.mean(values), column, sign)
    return mean if len(values) == 1 else f"{mean} ± {number(sd_of(values), column)}"


def shown(values, column):
    """[values of a row] -> their mean; of two rows -> what the first has more, paired by seed, with its p"""
    if len(values) == 1:
        return spread(values[0], column)
    a, b = values
    text = spread([x - y for x, y in zip(a, b, strict=True)], column, "+")
    _, p = paired_t(a, b)
    if p is None:
        return text
    digits = 3 if f"{p:.2g}" == "0.05" else 2           # on which side of the limit
    return f"{text} (p {p:.{digits}g})"


def cell(rows, row, column):
    """Text of a row, or of `row minus row`; "" where that was not measured"""
    values = [rows.get(name, {}).get(column) for name in row.split(" minus ")]
    return "" if None in values else shown(values, column)


def grid(rows):
    """Rows of cells, the first of them the head -> a Markdown table"""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def markdown(rows, pairs):
    """A table of all there is: the rows {row: {column: [values]}}, and the differences of pairs (row, row)"""
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    labels = {row: row for row in rows} | {f"*{a} minus {b}*": f"{a} minus {b}" for a, b in pairs}
    lines = [[label, *(cell(rows, row, k) or "-" for k in columns)] for label, row in labels.items()]
    return grid([["", *columns], *lines])


@functools.cache
def measured(name):
    """{row: {column: [value of each seed]}} of assets/reproduce/NAME.json"""
    return json.loads(Path(HERE, "assets", "reproduce", name + ".json").read_text())["rows"]


def values_of(what):
    """`JSON | row | column` or `JSON | row minus row | column` -> [values of each row], the column"""
    try:
        name, row, column = what.split(" | ")
        return [measured(name)[r][column] for r in row.split(" minus ")], column
    except (KeyError, ValueError):
        raise ValueError(f"{what}: names nothing") from None


def seeds_of(what):
    values, column = values_of(what)
    return ", ".join(number(x, column) for x in values[0])


def link(what):
    """Link to the one line of a file of ours that holds a piece of text: `file | piece`"""
    file, piece = what.split(" | ")
    code = Path(HERE, file).read_text().split("\n")
    lines = [i for i, line in enumerate(code, 1) if piece in line]
    if len(lines) != 1:
        raise ValueError(f"{what}: in {len(lines)} lines, must be in one")
    return f"[{file}, line {lines[0]}](../{file}#L{lines[0]})"


def named(line):
    """`label = what`, or what is its own label"""
    label, _, what = line.strip().rpartition(" = ")
    return label or what, what


def entry(row, what):
    """A cell of a table: the row stands for * in `JSON | * | column` or `JSON | * | column / column`"""
    name, pattern, columns = what.split(" | ")
    row = " minus ".join(pattern.replace("*", r) for r in row.split(" minus "))
    found = [cell(measured(name), row, column) for column in columns.split(" / ")]
    return " / ".join(x or "-" for x in found) if any(found) else ""


def table(text):
    """A table by lines `label = row` or `row`, a line `columns`, and lines `head = column` (see `entry`).

    What was not measured stays empty, but not in all of a row or a column.
    """
    rows, columns = (list(map(named, part.splitlines())) for part in text.split("\ncolumns\n"))
    cells = [[entry(row, what) for _, what in columns] for _, row in rows]
    for (_, what), line in [*zip(rows, cells), *zip(columns, zip(*cells))]:
        if not any(line):
            raise ValueError(f"table: {what} names nothing")
    lines = [[label, *line] for (label, _), line in zip(rows, cells)]
    return "\n" + grid([["", *(head for head, _ in columns)], *lines])


def verdict(a, b, sign):
    """What seeds say of a claim that a is more (+), less (-) or as much (=) as b: rule in docs/results.md"""
    d = np.subtract(a, b) * (-1 if sign == "-" else 1)
    _, p = paired_t(a, b)
    if not d.mean() or abs(d.mean()) < sd_of(d):
        return "not told apart"
    if sign == "=" or d.mean() < 0:
        return "not reproduced"
    return "reproduced" if (d > 0).all() and p is not None and p < 0.05 else "direction only"


def verdicts(text):
    """A table of claims: lines, and under each, indented, `label = JSON | row minus row | column | sign`"""
    lines = [["claim", "verdict", "what tells"]]
    for part in re.split(r"\n(?=\S)", text):
        claim, *tests = part.splitlines()
        if not tests:
            raise ValueError(f"verdicts: {claim}: nothing tells")
        found, numbers = [], []
        for label, what in map(named, tests):
            what, _, sign = what.rpartition(" | ")
            (a, b), column = values_of(what)
            found.append(verdict(a, b, sign))
            numbers.append(f"{label}: {shown((a, b), column)}, {found[-1]}")
        counts = [f"**{v}** {found.count(v)} of {len(found)}" for v in VERDICTS if v in found]
        lines.append([claim, "<br>".join(counts), "<br>".join(numbers)])
    return "\n" + grid(lines)


KINDS = {"mean": lambda what: shown(*values_of(what)), "seeds": seeds_of, "link": link, "table": table,
         "verdicts": verdicts}
COMMENT = re.compile(f"<!-- ({'|'.join(KINDS)})" + r"(\s.*?\s)-->(?:(?!<!--).)*<!---->", re.S)


def filled(text):
    """docs/results.md anew; ValueError or OSError for a comment that names nothing, is open, starts a line"""
    def fill(match):
        kind, what = match.groups()
        return f"<!-- {kind}{what}-->{KINDS[kind](what.strip())}<!---->"

    astray = re.search(r"^(?:[ >*+-]|\d+\.)*<!-- \w+ .*", text, re.M)
    if astray:
        raise ValueError(f"{astray[0]}: a comment may not start a line")
    if text.count("<!--") != 2 * len(COMMENT.findall(text)):
        raise ValueError(f"a comment is not closed by <!---->, or none of {', '.join(KINDS)}")
    return COMMENT.sub(fill, text)


def main(argv):
    Parser(__doc__).parse_args(argv)
    text = Path(RESULTS).read_text()
    try:
        new = filled(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{os.path.relpath(RESULTS)}: {error}") from None
    Path(RESULTS).write_text(new)
    print(f"{os.path.relpath(RESULTS)}: {'as it was' if new == text else 'written anew'}")


if __name__ == "__main__":
    program(main)
