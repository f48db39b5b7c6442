"""Curves and tables of finished or running runs, beside published scores.

    python results/plot.py runs --out results/new
    python results/plot.py runs/walker-walk runs/cheetah-run/Dreamerv2 --out results/new
    python results/plot.py runs --references DrQ "MR.Q" --out results/new

RUN is the folder of a run, or any folder above runs. It writes `curves.png`, `scores.md` and
`scores.csv` (one row per evaluation of a seed). Runs are averaged over seeds only if they have the
same settings; otherwise they become curves and rows of their own, named by what differs.

The published scores are those of `reference_scores.csv`, at 100K frames.
"""

import argparse
import csv
import io
import json
import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

# Settings that do not change what is learned: runs that differ only in these belong together.
IGNORED = {
    "env", "seed", "logdir", "exp", "device", "precision", "max_hours", "eval_interval",
    "eval_episodes", "checkpoint_interval", "video_interval", "buffer_gb", "vector_env", "eager",
    "total_steps",
}  # fmt: skip
PUBLISHED_FRAMES = 100_000
# Okabe and Ito's palette: told apart with every kind of colour vision.
COLORS = {"Dreamerv1": "#0072B2", "Dreamerv2": "#D55E00"}
OTHER_COLOR = "#555555"
LINES = ("-", (0, (3.5, 1.2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = "osD^vPX*<>hp"
STYLE = {
    "font.size": 9, "legend.fontsize": 8.5, "legend.frameon": False, "legend.handlelength": 2.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True, "xtick.color": "#444444",
    "ytick.color": "#444444",
}  # fmt: skip


class PlotError(Exception):
    """What the user can mend, in one line."""


@dataclass(frozen=True)
class Run:
    """The settings of one run, its evaluations: step to (mean, std), by rising step; the hours
    that it took up to the last of these.
    """

    folder: Path
    config: dict
    evaluations: dict
    hours: float = np.nan

    @property
    def last(self) -> int:
        return max(self.evaluations)


@dataclass(frozen=True)
class Group:
    """Runs of one task, algorithm and settings, one per seed.

    `differ` says what sets it apart from the other groups of its algorithm, whatever their tasks,
    and is empty if nothing does. `settings` names it with its preset and experiments. `twins` are
    runs of a seed that the group already has: they are no further sample, and left out.
    """

    task: str
    algo: str
    runs: list[Run]
    twins: list[Run]
    differ: str
    settings: str

    @property
    def seeds(self) -> str:
        # A non-breaking space: a long label is wrapped before its bracket.
        return f"{len(self.runs)}\N{NO-BREAK SPACE}seed{'s' if len(self.runs) > 1 else ''}"


# ---------------------------------------------------------------------------------------- reading


def find_runs(paths: list[str]) -> list[Path]:
    """The folders of all runs at or below `paths`, each once.

    Raises:
        PlotError: there is none at or below one of them.
    """
    found = {}
    for path in paths:
        configs = sorted(Path(path).rglob("config.json"))
        folders = [c.parent for c in configs if (c.parent / "metrics.jsonl").is_file()]
        if not folders:
            raise PlotError(f"no run (config.json and metrics.jsonl) at or below {path}")
        found.update({folder.resolve(): folder for folder in folders})
    return list(found.values())


def load_run(folder: Path) -> Run:
    """Reads one run; of two evaluations at the same step the later counts.

    Raises:
        PlotError: `config.json` or a line of `metrics.jsonl` is not what a run writes.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("env", "algo", "exp", "seed", "preset") if key not in config]
    except (ValueError, TypeError):
        raise PlotError(f"{path} is no JSON object") from None
    if missing:
        raise PlotError(f"{path} lacks {', '.join(missing)}")
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    evaluations, hours = {}, {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step, mean = int(row["step"]), row.get("eval/return_mean")
            if "time/hours" in row:
                hours[step] = float(row["time/hours"])
            if mean is not None:
                evaluations[step] = float(mean), float(row.get("eval/return_std", np.nan))
        except (ValueError, TypeError, KeyError, OverflowError):
            # A last line without an end is being written now, or was when the run was killed.
            if number == len(lines) and not text.endswith("\n"):
                break
            raise PlotError(f"{path}, line {number}: not a row of metrics") from None
    at_end = hours.get(max(evaluations, default=0), np.nan)
    return Run(folder, config, dict(sorted(evaluations.items())), at_end)


def load_references(path: Path, words: list[str]) -> list[dict]:
    """Published scores at 100K frames of the methods whose names contain one of `words`.

    Raises:
        PlotError: a word is in no name.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["frames"]) == PUBLISHED_FRAMES]
    methods = sorted({row["method"] for row in rows})
    for word in words:
        if not any(word in method for method in methods):
            raise PlotError(f"--references {word}: in no name of {', '.join(methods)}")
    return [row for row in rows if any(word in row["method"] for word in words)]


# --------------------------------------------------------------------------- grouping, statistics


def settings_of(run: Run) -> dict:
    """The settings of a run that change what is learned."""
    return {key: value for key, value in run.config.items() if key not in IGNORED}


def differing(mine: dict, siblings: list[dict]) -> list[str]:
    """`key=value` where some of `siblings` differ from `mine`; only those of its preset count.

    A preset's name stands for its sizes, so between presets it is not spelt out what differs.
    """
    others = [other for other in siblings if other["preset"] == mine["preset"]]
    keys = dict.fromkeys(key for other in others for key in other)
    values = {key: [c.get(key, "unset") for c in (mine, *others)] for key in keys}
    return [f"{k}={plainly(v[0])}" for k, v in values.items() if any(x != v[0] for x in v)]


def plainly(value) -> str:
    """A setting in few characters: 1.0 as 1."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs: list[Run]) -> list[Group]:
    """Groups by task, algorithm and settings, in this order. `runs`: with evaluations."""
    together = {}
    for run in runs:
        name = run.config["env"], run.config["algo"], json.dumps(settings_of(run), sort_keys=True)
        together.setdefault(name, []).append(run)
    by_algo = {}
    for (_, algo, _), members in together.items():
        by_algo.setdefault(algo, []).append(settings_of(members[0]))
    groups = []
    for (task, algo, _), members in sorted(together.items(), key=lambda item: item[0]):
        mine = settings_of(members[0])
        parts = differing(mine, by_algo[algo])
        presets = {other["preset"] for other in by_algo[algo]}
        # Of a seed that was run twice, the run that got further.
        best = {r.config["seed"]: r for r in sorted(members, key=lambda r: r.last)}
        twins = [r for r in members if r is not best[r.config["seed"]]]
        kept = [best[seed] for seed in sorted(best)]
        exps = "+".join(sorted({run.config["exp"] for run in kept}))
        settings = ", ".join([mine["preset"], exps, *parts])
        differ = ", ".join([mine["preset"], *parts]) if parts or len(presets) > 1 else ""
        groups.append(Group(task, algo, kept, twins, differ, settings))
    return groups


def curve(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and returns (seeds, S) over the frames that every seed has reached.

    Seeds that were evaluated at other frames are interpolated linearly between their own.
    """
    first = max(min(run.evaluations) for run in group.runs)
    last = min(run.last for run in group.runs)
    steps = sorted({s for run in group.runs for s in run.evaluations if first <= s <= last})
    returns = [
        np.interp(steps, list(run.evaluations), [mean for mean, _ in run.evaluations.values()])
        for run in group.runs
    ]
    return np.array(steps), np.array(returns)


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (S,) of the mean over seeds at 95 % confidence. `returns`: (seeds > 1, S)."""
    from scipy.stats import bootstrap

    # Percentiles: the default, BCa, is undefined where all seeds agree.
    result = bootstrap((returns,), np.mean, axis=0, method="percentile", rng=0)
    return result.confidence_interval.low, result.confidence_interval.high


def remarks(groups: list[Group]) -> list[str]:
    """What is not as one would expect: several settings, a seed twice, seeds of other lengths."""
    lines = []
    for (task, algo), found in groupby(groups, key=lambda group: (group.task, group.algo)):
        siblings = list(found)
        if len(siblings) > 1:
            labels = "; ".join(group.differ for group in siblings)
            lines.append(f"{task} {algo}: {len(siblings)} settings, kept apart: {labels}")
        for group in siblings:
            title = f"{task} {algo} ({group.settings})"
            for run in group.twins:
                lines.append(f"{title}: seed {run.config['seed']} again, left out: {run.folder}")
            ends = sorted(run.last for run in group.runs)
            if not len(curve(group)[0]):
                lines.append(f"{title}: its seeds have no frames in common, so no mean")
            elif ends[0] < ends[-1]:
                lines.append(f"{title}: seeds end at {ends}; the mean ends at {ends[0]}")
    return lines


# ---------------------------------------------------------------------------------------- writing


def frames(number: float) -> str:
    """100000 as 100K."""
    for size, unit in ((1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def scores_csv(groups: list[Group]) -> str:
    """One row per evaluation of a seed, as it was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "algo", "seed", "step", "return", "settings"])
    for group in groups:
        for run in group.runs:
            for step, (mean, _) in run.evaluations.items():
                row = [group.task, group.algo, run.config["seed"], step, mean, group.settings]
                writer.writerow(row)
    return text.getvalue()


def score(mean: float, std: float = np.nan) -> str:
    """`mean ± std`, without what is not known."""
    spread = "" if np.isnan(std) else f" ± {std:.1f}"
    return "–" if np.isnan(mean) else f"{mean:.1f}{spread}"


def last_score(group: Group) -> list[str]:
    """Frames and `mean ± std` of the last evaluation that all seeds have."""
    steps, returns = curve(group)
    if not len(steps):
        return ["–", "–"]
    end = returns[:, -1]
    if len(end) > 1:
        return [frames(steps[-1]), score(end.mean(), end.std())]
    mean, std = group.runs[0].evaluations[steps[-1]]
    return [frames(steps[-1]), score(mean, std) + ("" if np.isnan(std) else " †")]


def markdown(rows: list[list]) -> list[str]:
    """Lines of a table; the first of `rows` is its head."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return ["| " + " | ".join(row) + " |" for row in cells]


def table(groups: list[Group], references: list[dict]) -> str:
    """Markdown: per task the last evaluation of each group, then the published scores."""
    rows = [["task", "algorithm", "settings", "seeds", "frames", "return"]]
    used = {}
    for task, members in groupby(groups, key=lambda group: group.task):
        for group in members:
            label = f"**{group.algo}**"
            rows.append([task, label, group.settings, len(group.runs), *last_score(group)])
        for row in (row for row in references if row["task"] == task):
            published = score(float(row["mean"]), float(row["std"] or "nan"))
            at = frames(int(row["frames"]))
            rows.append([task, row["method"], "published", row["seeds"] or "–", at, published])
            used[row["method"]] = row["what"]
    lines = markdown(rows)
    lines += ["", "Bold: this repository, mean ± population standard deviation over seeds."]
    if any("†" in line for line in lines):
        lines += ["", "† One seed: ± is over the episodes of that evaluation, not over seeds."]
    if used:
        lines += ["", "What the published numbers are, as their sources give them:", ""]
        lines += [f"- {method}: {what}." for method, what in sorted(used.items())]
    return "\n".join(lines) + "\n"


def each_run(groups: list[Group]) -> str:
    """Markdown: one row per run, its mean returns on the way, its last evaluation and its hours.

    On the way means at fifths of the frames of the longest run, interpolated as in `curve`. Twins
    are left out here too.
    """
    runs = [(group, run) for group in groups for run in group.runs]
    fifths = np.arange(1, 5) * max(run.last for _, run in runs) / 5
    head = ["task", "algorithm", "experiment", "seed", *map(frames, fifths), "last", "at", "hours"]
    rows = [head]
    for group, run in runs:
        means, end = [mean for mean, _ in run.evaluations.values()], run.last
        way = np.interp(fifths, list(run.evaluations), means, np.nan, np.nan)
        last = [score(*run.evaluations[end]), frames(end)]
        hours = "–" if np.isnan(run.hours) else f"{run.hours:.2f}"
        experiment = ", ".join(filter(None, [run.config["exp"], group.differ]))
        name = [group.task, group.algo, experiment, run.config["seed"]]
        rows.append([*name, *map(score, way), *last, hours])
    text = "Means of evaluations; ± of the last is the standard deviation over its episodes."
    return "\n".join([*markdown(rows), "", text]) + "\n"


def figure(groups: list[Group], references: list[dict]):
    """One panel per task: curves, their intervals, and a strip of published scores beside them."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks = {task: list(g) for task, g in groupby(groups, key=lambda group: group.task)}
    shown = [row for row in references if row["task"] in tasks]
    methods = sorted({row["method"] for row in shown})
    columns = min(2, len(tasks))
    height = -(-len(tasks) // columns)
    # Legends stand above the panels; the panels of a row begin where its longest one ends.
    lines = [sum(legend_text(g).count("\n") + 1 for g in members) for members in tasks.values()]
    legends = sum(max(lines[i : i + columns]) for i in range(0, len(lines), columns))
    size = 9, 0.5 + 2.8 * height + 0.19 * legends
    with matplotlib.rc_context(STYLE):
        # A Figure that pyplot does not know is drawn by Agg, with or without a display.
        fig = Figure(size, dpi=200, layout="constrained")
        axes = list(fig.subplots(height, columns, squeeze=False).flat)
        marks = {}
        for ax, (task, members) in zip(axes, tasks.items(), strict=False):
            draw_panel(ax, task, members)
            marks |= draw_published(ax, [row for row in shown if row["task"] == task], methods)
        for ax in axes[max(0, len(tasks) - columns) : len(tasks)]:
            ax.set_xlabel("environment frames")
        spare = axes[len(tasks) :]
        for ax in spare:
            ax.axis("off")
        if methods:
            title = f"published, at {frames(PUBLISHED_FRAMES)} frames (mean ± std)"
            place = {"loc": "center"} if spare else {"loc": "outside lower center", "ncols": 3}
            handles = [marks[method] for method in methods]
            (spare[0] if spare else fig).legend(handles, methods, title=title, **place)
        band = any(len(group.runs) > 1 for group in groups)
        note = " (mean; band: 95 % interval by bootstrap, of two seeds their range)" if band else ""
        fig.supylabel("evaluation return" + note, fontsize=9)
    return fig


def legend_text(group: Group) -> str:
    """What a curve is called, in lines of a panel's width."""
    name = ", ".join(filter(None, [group.algo, group.differ]))
    return textwrap.fill(f"{name} ({group.seeds})", 54)


def draw_panel(ax, task: str, groups: list[Group]) -> None:
    """The curves of one task; its title stands over their legend."""
    drawn = []
    for group in groups:
        steps, returns = curve(group)
        color = COLORS.get(group.algo, OTHER_COLOR)
        dashes = LINES[drawn.count(group.algo) % len(LINES)]
        drawn.append(group.algo)
        ax.plot(
            steps, returns.mean(0), label=legend_text(group), color=color, linestyle=dashes,
            linewidth=1.8, marker="o", markersize=2.6, clip_on=False,
        )  # fmt: skip
        if len(returns) > 1 and len(steps):
            ax.fill_between(steps, *interval(returns), color=color, alpha=0.18, linewidth=0)
    ax.set_xlim(0, max(run.last for group in groups for run in group.runs))
    ax.set_ylim(bottom=min(0, ax.dataLim.y0))
    ax.xaxis.set_major_formatter(lambda x, _: frames(x))
    # Above the axes, so that it never hides a curve.
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "borderaxespad": 0.2}
    ncols = 1 if any(group.differ for group in groups) else 2
    legend = ax.legend(title=task, alignment="left", ncols=ncols, **place)
    legend.get_title().set_fontweight("bold")


def draw_published(ax, rows: list[dict], methods: list[str]) -> dict:
    """A strip at the right edge, one column per method, so that equal scores do not overlap.

    A mark has the colour of the algorithm that it is and a shape of its own. Returns the marks.
    """
    if not rows:
        return {}
    strip = ax.inset_axes([1.01, 0, 0.035 * (len(methods) + 1), 1])
    marks = {}
    for row in rows:
        column, plain = methods.index(row["method"]), row["method"].lower().replace(" ", "")
        color = next((c for algo, c in COLORS.items() if algo.lower() in plain), OTHER_COLOR)
        marks[row["method"]] = strip.errorbar(
            column, float(row["mean"]), float(row["std"]) if row["std"] else None, color=color,
            linestyle="none", marker=MARKERS[column % len(MARKERS)], markerfacecolor="white",
            markersize=5.5, elinewidth=0.8,
        )  # fmt: skip
    ax.set_xlim(right=max(PUBLISHED_FRAMES, ax.get_xlim()[1]))
    ax.set_ylim(top=max(ax.get_ylim()[1], strip.get_ylim()[1]))
    strip.set(xlim=(-1, len(methods)), ylim=ax.get_ylim(), xticks=[], facecolor="#f6f6f6")
    strip.tick_params(left=False, labelleft=False)
    strip.spines[:].set_visible(False)
    return marks


# ------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str):
        self.exit(2, f"plot.py: error: {message} (see --help)\n")


def make(runs: list[str], out: Path, words: list[str]) -> None:
    """The whole command. Everything is made before anything is written."""
    loaded = [load_run(folder) for folder in find_runs(runs)]
    evaluated = [run for run in loaded if run.evaluations]
    if not evaluated:
        raise PlotError(f"no evaluation yet in {', '.join(str(run.folder) for run in loaded)}")
    groups = group_runs(evaluated)
    notes = [f"{run.folder}: no evaluation yet, left out" for run in loaded if not run.evaluations]
    references = load_references(Path(__file__).with_name("reference_scores.csv"), words)
    image = figure(groups, references)
    out.mkdir(parents=True, exist_ok=True)
    image.savefig(out / "curves.png")
    scores = f"{table(groups, references)}\n## Each run\n\n{each_run(groups)}"
    (out / "scores.md").write_text(scores, encoding="utf-8")
    (out / "scores.csv").write_text(scores_csv(groups), encoding="utf-8")
    for line in notes + remarks(groups):
        print(f"plot.py: {line}", file=sys.stderr)
    print(f"written to {out}: curves.png, scores.md, scores.csv; runs: {len(evaluated)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a folder above runs")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="made if needed")
    parser.add_argument(
        "--references", nargs="*", default=["Dreamer"], metavar="WORD",
        help="published methods whose names contain a word, case counts (default: Dreamer); "
        "without a word: none",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        make(args.runs, args.out, args.references)
    except ModuleNotFoundError as error:
        print(f"plot.py: error: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return 2
    except (PlotError, OSError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
