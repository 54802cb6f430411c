"""What was measured, as plots, as tables, and as docs/results.md.

    python figures.py       # writes every number and link of docs/results.md anew

The prose of docs/results.md is written by hand. What stands in it between two HTML comments is written from
assets/reproduce/*.json (reproduce.py makes them), from PAPER below and from the code; the first says how:

    <!--= JSON | row | column -->0.94 ± 0.03<!---->              mean ± standard deviation over seeds
    <!--= JSON | row minus row | column -->+0.67 ± 0.11 (p 0.0088)<!---->   paired by seed, p of a t-test
    <!--= JSON | row | column | seeds -->0.93, 0.97, 0.92<!---->            each seed
    <!--@ file.py | a piece of a line that no other has -->[file.py, line 12](../file.py#L12)<!---->
    <!-- table ... --> ... <!-- end -->          `table` below: rows, then columns
    <!-- verdicts ... --> ... <!-- end -->       `verdicts` below: claims, and under each what tells

A comment that names nothing is an error. An inline one may go over lines, but not start one: Markdown would
take the rest of that line for HTML. Drawing needs matplotlib, which is imported by what draws.
"""

import functools
import json
import os
import re
import sys

import numpy as np

from metrics import paired_t

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "docs", "results.md")
CODEBOOK = {"utilization": "codebook utilization", "max_usage": "max usage", "entropy": "entropy",
            "nmi": "NMI with the true action (cross, held-out)"}
ALIGN = {"latent_var": "variance of latent actions", "cka": "CKA of latent actions and action features",
         "sensitivity": "change of velocity by swapped actions",
         "grad_cosine": "cosine of successive IDM gradients", "nmi": "NMI with the true action"}


# what runs logged, as plots ---------------------------------------------------------------------------


def logged(folder, events, phase, end):
    """{step: log line} of the run in a folder, up to step `end`"""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    rows = [r for r in rows if r["event"] in events and phase in (None, r["phase"])]
    return {r["step"]: r for r in rows if end is None or r["step"] <= end}


def curve(lab, run, keys, events=("train",), phase=None, end=None):
    """What a run logged in all seeds of a reproduce.Lab, up to step `end`.

    Returns:
        steps, and {key: (seeds, steps)}, NaN where a number is missing.
    """
    logs = [logged(lab.folder(run, seed), events, phase, end) for seed in lab.seeds]
    steps = sorted(set.intersection(*map(set, logs)))                   # a stop may have cost an evaluation
    values = {k: np.array([[log[s].get(k) for s in steps] for log in logs], float) for k in keys}
    return np.array(steps), values


def curves(lab, arms, keys, events=("train",), phase=None, end=None):
    """{arm: curve} of {arm: run}"""
    return {arm: curve(lab, run, keys, events, phase, end) for arm, run in arms.items()}


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


def pyplot():
    """matplotlib's pyplot, drawing into files"""
    try:
        import matplotlib
    except ImportError:
        sys.exit("reproduce.py: needs pip install -r requirements-extra.txt")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def plot(path, curves, titles, levels=None, mark=None):
    """A panel a key, a line an arm: the mean over seeds and a band of one standard deviation.

    Args:
        curves: {arm: (steps, {key: (seeds, steps)})}.
        titles: {key: title of its panel}.
        levels: {arm: {key: [values]}}, dashed horizontal lines.
        mark: step of a dotted vertical line.
    """
    plt, levels = pyplot(), levels or {}
    size = max(6, 3.6 * len(titles)), 3.2
    figure, axes = plt.subplots(1, len(titles), figsize=size, layout="constrained", squeeze=False)
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
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(path, rows, arms, groups, keys):
    """A panel a key, a bar for each row `arm, group`: the mean and the standard deviation over seeds"""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(keys), figsize=(10, 3.2), layout="constrained")
    for axis, key in zip(axes, keys):
        for i, arm in enumerate(arms):
            values = np.transpose([rows[f"{arm}, {group}"][key] for group in groups])       # (seeds, groups)
            at = np.arange(len(groups)) + 0.4 * i - 0.2
            axis.bar(at, values.mean(0), 0.38, yerr=sd_of(values), label=arm)
        axis.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups], fontsize=8)
        axis.set_title(CODEBOOK[key], fontsize=10)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# numbers as text --------------------------------------------------------------------------------------


DECIMALS = {"psnr": 1, "ssim": 1, "controllability": 1, "l1": 3, "l1_constant": 3, "sensitivity": 3,
            "paper's l1": 4, "paper's average": 4}      # else 2


def number(x, column, sign=""):
    if column == "latent_var":
        return f"{x:{sign}.1e}"
    return f"{x:{sign}.{DECIMALS.get(column, 2)}f}"


def spread(values, column, sign=""):
    """[value of each seed] -> `mean ± standard deviation`"""
    mean = number(np.mean(values), column, sign)
    return mean if len(values) == 1 else f"{mean} ± {number(sd_of(values), column)}"


def difference(a, b, column):
    """Values of two rows, paired by seed -> `mean ± standard deviation (p ...)` of what a has more"""
    _, p = paired_t(a, b)
    text = spread(np.subtract(a, b), column, "+")
    if p is None:
        return text
    digits = 3 if f"{p:.2g}" == "0.05" else 2           # on which side of the limit
    return f"{text} (p {p:.{digits}g})"


def grid(rows):
    """Rows of cells, the first of them the head -> a Markdown table"""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def markdown(rows, pairs):
    """A table of all there is: the rows {row: {column: [values]}}, and the differences of pairs (row, row)"""
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(spread(row[k], k) if row.get(k) else "-" for k in columns)])
    for a, b in pairs:
        both = [k for k in columns if rows[a].get(k) and len(rows[a][k]) == len(rows[b].get(k, []))]
        lines.append([f"*{a} minus {b}*",
                      *(difference(rows[a][k], rows[b][k], k) if k in both else "-" for k in columns)])
    return grid(lines)


# docs/results.md --------------------------------------------------------------------------------------


def of_paper(table, arms, column, found):
    """Rows `TABLE, data: arm` of {data: a number for each arm}"""
    pairs = ((data, arm, x) for data, xs in found.items() for arm, x in zip(arms, xs))
    return {f"{table}, {data}: {arm}": {column: [x]} for data, arm, x in pairs}


ARMS = ("LAM30K+WM30K", "LAM8K+WM52K", "WARM8K+E2E52K", "WARM8K+E2E30K")
PAPER = {       # the paper's numbers, by its tables
    **of_paper("Table 1", ("LAM30K", "WARM8K+E2E22K"), "l1", {
        "Bridge": (0.0827, 0.0815), "RT-1": (0.1191, 0.1206), "Kuka": (0.0741, 0.0736),
        "Droid": (0.1912, 0.1911), "AgiBot": (0.1035, 0.0908), "LIBERO": (0.1614, 0.1623)}),
    **of_paper("Table 2", ARMS, "psnr", {"OXE": (22.34, 21.91, 22.57, 22.26),
                                         "LIBERO": (23.13, 22.72, 23.33, 23.25)}),
    **of_paper("Table 3", ARMS[::3], "psnr", {
        "LIBERO, GT-LAM": (25.51, 25.85), "LIBERO, real action": (22.45, 22.68),
        "RoboDesk, GT-LAM": (24.21, 24.29), "RoboDesk, real action": (20.03, 21.37)}),
    **of_paper("Table 4", ARMS[::3], "average", {"RoboDesk": (0.0694, 0.1312)}),
}


@functools.cache
def measured(name):
    """{row: {column: [value of each seed]}} of assets/reproduce/NAME.json, or of the paper"""
    if name == "paper":
        return PAPER
    try:
        with open(os.path.join(HERE, "assets", "reproduce", name + ".json")) as f:
            return json.load(f)["rows"]
    except OSError:
        raise ValueError(f"{name}: there is no assets/reproduce/{name}.json") from None


def cell(name, rows, column):
    """Text of a row, or of the difference of two; "" where that was not measured"""
    values = [measured(name).get(row, {}).get(column) for row in rows]
    if not all(values) or len({len(v) for v in values}) > 1:
        return ""
    column = f"paper's {column}" if name == "paper" else column
    return spread(values[0], column) if len(values) == 1 else difference(*values, column)


def values_of(name, row, column):
    try:
        return measured(name)[row][column]
    except KeyError:
        raise ValueError(f"{name} | {row} | {column}: names nothing") from None


def inline(what):
    """A number in a sentence: [JSON, row or `row minus row`, column], or with `seeds` the numbers of a row"""
    name, row, column, *form = what
    rows = row.split(" minus ")
    values = [values_of(name, r, column) for r in rows]
    if form == ["seeds"]:
        return ", ".join(number(x, column) for x in values[0])
    if form:
        raise ValueError(f"{' | '.join(what)}: `seeds` or nothing")
    return cell(name, rows, column)


def named(line):
    """`label = what`, or what is its own label"""
    label, equals, what = line.partition(" = ")
    return (label.strip(), what.strip()) if equals else (line.strip(), line.strip())


def table(text):
    """A table by its description.

    Lines of rows, `row` or `label = row` or `label = row minus row`; a line `columns`; lines of columns,
    `head = JSON | row | column`, in which * stands for the row of the line, and `column / column` for two
    numbers in a cell. What was not measured stays empty, but not in all of a row or a column.
    """
    rows, _, columns = text.partition("\ncolumns\n")
    rows, columns = ([named(line) for line in part.strip().splitlines()] for part in (rows, columns))
    lines = [["", *(head for head, _ in columns)]]
    for label, row in rows:
        lines.append([label])
        for _, what in columns:
            name, pattern, keys = what.split(" | ")
            names = " minus ".join(pattern.replace("*", r) for r in row.split(" minus "))
            found = [cell(name, names.split(" minus "), key) for key in keys.split(" / ")]
            lines[-1].append(" / ".join(x or "-" for x in found) if any(found) else "")
    for i, line in enumerate(lines[1:]):
        if not any(line[1:]):
            raise ValueError(f"table: the row {rows[i][1]} names nothing")
    for i, (_, what) in enumerate(columns):
        if not any(line[1 + i] for line in lines[1:]):
            raise ValueError(f"table: the column {what} names nothing")
    return grid(lines)


VERDICTS = ("reproduced", "direction only", "not told apart", "not reproduced")


def verdict(a, b, sign):
    """What seeds say of a claim that row a has more (sign +), less (-) or as much (=) as row b.

    *Reproduced*: the sign in every seed, and p < 0.05 of a paired t-test. *Direction only*: the sign in the
    mean difference, which is at least its standard deviation. *Not reproduced*: as much, against the sign or
    where no difference should be. *Not told apart*: the rest.
    """
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
    for part in re.split(r"\n(?=\S)", text.strip("\n")):
        claim, *tests = part.splitlines()
        found, numbers = [], []
        for label, what in map(named, tests):
            name, row, column, sign = what.split(" | ")
            a, b = (values_of(name, r, column) for r in row.split(" minus "))
            found.append(verdict(a, b, sign))
            numbers.append(f"{label}: {difference(a, b, column)}, {found[-1]}")
        if not found:
            raise ValueError(f"verdicts: {claim}: nothing tells")
        counts = [f"**{v}** {found.count(v)} of {len(found)}" for v in VERDICTS if v in found]
        lines.append([claim, "<br>".join(counts), "<br>".join(numbers)])
    return grid(lines)


def link(what):
    """Link to the one line of a file of ours that holds a piece of text: [file, piece]"""
    file, piece = what
    path = os.path.join(HERE, file)
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            lines = [i for i, line in enumerate(f, 1) if piece in line]
    if len(lines) != 1:
        raise ValueError(f"{file} | {piece}: in {len(lines)} lines, must be in one")
    return f"[{file}, line {lines[0]}](../{file}#L{lines[0]})"


INLINE = re.compile(r"<!--([=@]) ((?:(?!-->).)*?) ?-->((?:(?!<!--).)*)<!---->", re.S)
BLOCK = re.compile(r"<!-- (table|verdicts)\n((?:(?!-->).)*)-->\n((?:(?!<!--).)*)<!-- end -->", re.S)


def filled(text):
    """docs/results.md with every number and link anew

    Raises:
        ValueError: a comment that names nothing, is not closed, or starts a line.
    """
    def fill(match):
        make = {"=": inline, "@": link}[match[1]]
        what = " ".join(match[2].split()).split(" | ")
        return f"<!--{match[1]} {match[2]} -->{make(what)}<!---->"

    def block(match):
        make = {"table": table, "verdicts": verdicts}[match[1]]
        return f"<!-- {match[1]}\n{match[2]}-->\n{make(match[2])}<!-- end -->"

    astray = re.search(r"^(?:[ >*+-]|\d+\.)*<!--[=@].*", text, re.M)
    if astray:
        raise ValueError(f"{astray[0]}: a comment may not start a line")
    closed = len(INLINE.findall(text)) + len(BLOCK.findall(text))
    if closed != len(re.findall("<!--[=@]|<!-- table|<!-- verdicts", text)):
        raise ValueError("a comment is not closed by <!----> or <!-- end -->")
    return INLINE.sub(fill, BLOCK.sub(block, text))


def main():
    with open(RESULTS) as f:
        text = f.read()
    try:
        new = filled(text)
    except ValueError as error:
        sys.exit(f"figures.py: {os.path.relpath(RESULTS)}: {error}")
    if new != text:
        with open(RESULTS, "w") as f:
            f.write(new)
    print(f"{os.path.relpath(RESULTS)}: {'as it was' if new == text else 'written anew'}")


if __name__ == "__main__":
    main()
