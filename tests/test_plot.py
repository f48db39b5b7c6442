"""results/plot.py on made-up runs with known answers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import plot
import pytest
from conftest import ROOT

SCRIPT = ROOT / "results" / "plot.py"

CONFIG = {"preset": "small", "batch_size": 16, "device": "auto", "kl_balance": None}


@pytest.fixture
def make_run(tmp_path):
    """Makes a run folder whose evaluations are `returns`, 10000 frames apart; returns it."""

    def make(returns, env="walker-walk", algo="Dreamerv1", exp="default", seed=1, **more):
        folder = tmp_path / "runs" / env / algo / exp / str(seed)
        folder.mkdir(parents=True)
        config = {**CONFIG, "env": env, "algo": algo, "exp": exp, "seed": seed, **more}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [{"step": 500, "train/return": 7.0}]
        for number, mean in enumerate(returns, 1):
            row = {"step": 10_000 * number, "eval/return_mean": mean, "eval/return_std": 2.5}
            rows += [{"step": 10_000 * number, "train/return": 7.0}, row]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return make


def load_all(tmp_path):
    return [plot.load_run(folder) for folder in plot.find_runs([tmp_path / "runs"])]


def groups_of(tmp_path):
    return plot.group_runs(load_all(tmp_path))


def references():
    return plot.load_references(SCRIPT.with_name("reference_scores.csv"), ["Dreamer"])


def call(tmp_path, *words):
    return plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *words])


# ------------------------------------------------------------------------------- reading


def test_a_run_is_read(make_run):
    run = plot.load_run(make_run([1.0, 3.0], seed=4))
    assert run.evaluations == {10_000: (1.0, 2.5), 20_000: (3.0, 2.5)}
    assert run.config["seed"] == 4 and run.last == 20_000


def test_of_two_evaluations_at_a_step_the_later_counts(make_run):
    folder = make_run([1.0, 3.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10000, "eval/return_mean": 9.0}\n')
    evaluations = plot.load_run(folder).evaluations
    assert list(evaluations) == [10_000, 20_000]
    assert evaluations[10_000][0] == 9.0 and np.isnan(evaluations[10_000][1])


def test_runs_are_found_once_wherever_one_points(make_run, tmp_path):
    one, two = make_run([1.0]), make_run([1.0], env="cheetah-run")
    assert plot.find_runs([one]) == [one]
    assert sorted(plot.find_runs([tmp_path, one, tmp_path / "runs" / "walker-walk"])) == [two, one]


def test_a_line_that_is_still_being_written_is_no_error(make_run):
    folder = make_run([1.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20000, "eval/ret')
    assert list(plot.load_run(folder).evaluations) == [10_000]


@pytest.mark.parametrize("line", ["{", "[1]", "5", '"text"', '{"step": "x"}', '{"loss": 1}', ""])
def test_a_broken_line_is_named(make_run, line):
    folder = make_run([1.0])
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(plot.PlotError, match=r"metrics\.jsonl, line 4: "):
        plot.load_run(folder)


@pytest.mark.parametrize("text", ["{", "3", "[]", '{"env": "walker-walk"}'])
def test_a_broken_config_is_named(make_run, text):
    folder = make_run([1.0])
    (folder / "config.json").write_text(text)
    with pytest.raises(plot.PlotError, match=r"config\.json (is no JSON object|lacks .*preset)"):
        plot.load_run(folder)


def test_references_by_word():
    everything = plot.load_references(SCRIPT.with_name("reference_scores.csv"), [""])
    assert {row["frames"] for row in everything} == {"100000"}
    assert len({row["task"] for row in everything}) == 5
    assert references() == [row for row in everything if "Dreamer" in row["method"]]
    assert plot.load_references(SCRIPT.with_name("reference_scores.csv"), []) == []
    with pytest.raises(plot.PlotError, match=r"nonsense.*DrQ-v2"):
        plot.load_references(SCRIPT.with_name("reference_scores.csv"), ["nonsense"])


# ------------------------------------------------------------------- grouping, statistics


def test_seeds_are_averaged(make_run, tmp_path):
    for seed, returns in enumerate([[10.0, 40.0], [20.0, 50.0], [60.0, 90.0]], 1):
        # What differs here changes nothing that is learned.
        more = {"device": "cpu" if seed > 1 else "cuda", "total_steps": 20_000 * seed}
        make_run(returns, seed=seed, exp=f"exp{seed % 2}", **more)
    (group,) = groups_of(tmp_path)
    steps, returns = plot.curve(group)
    assert steps.tolist() == [10_000, 20_000]
    assert returns.mean(0).tolist() == [30.0, 60.0]
    assert group.settings == "small, exp0+exp1" and group.differ == ""
    assert plot.remarks([group]) == []


def test_other_settings_are_kept_apart(make_run, tmp_path):
    make_run([1.0])
    make_run([2.0], seed=2, kl_balance=0.8)
    make_run([3.0], exp="wide", batch_size=32)
    make_run([4.0], exp="gpu", preset="full", batch_size=50)
    make_run([5.0], algo="Dreamerv2")
    groups = {group.differ: group for group in groups_of(tmp_path)}
    assert set(groups) == {
        "small, batch_size=16, kl_balance=None",
        "small, batch_size=16, kl_balance=0.8",
        "small, batch_size=32, kl_balance=None",
        "full",
        "",
    }
    assert all(len(group.runs) == 1 for group in groups.values())
    assert groups[""].algo == "Dreamerv2"
    settings = groups["small, batch_size=32, kl_balance=None"].settings
    assert settings == "small, wide, batch_size=32, kl_balance=None"
    (remark,) = plot.remarks(list(groups.values())[:4])
    assert remark.startswith("walker-walk Dreamerv1: 4 settings, kept apart: ")


def test_what_differs_between_tasks_is_named_too(make_run, tmp_path):
    make_run([1.0], kl_scale=0.3)
    make_run([1.0], env="cheetah-run", kl_scale=1.0)
    make_run([1.0], env="cheetah-run", algo="Dreamerv2", kl_scale=1.0)
    differ = {(group.task, group.algo): group.differ for group in groups_of(tmp_path)}
    assert differ == {
        ("cheetah-run", "Dreamerv1"): "small, kl_scale=1",
        ("cheetah-run", "Dreamerv2"): "",
        ("walker-walk", "Dreamerv1"): "small, kl_scale=0.3",
    }
    assert plot.remarks(groups_of(tmp_path)) == []
    make_run([1.0], algo="Dreamerv2", preset="full", kl_scale=1.0)
    differ = {
        group.task: group.differ for group in groups_of(tmp_path) if group.algo == "Dreamerv2"
    }
    assert differ == {"cheetah-run": "small", "walker-walk": "full"}


def test_a_setting_that_one_run_does_not_know_keeps_it_apart(make_run, tmp_path):
    make_run([1.0])
    make_run([1.0], seed=2, new_flag=None)
    differ = {group.differ for group in groups_of(tmp_path)}
    assert differ == {"small, new_flag=unset", "small, new_flag=None"}


def test_a_seed_that_ran_twice_counts_once(make_run, tmp_path):
    make_run([1.0], exp="a")
    make_run([2.0, 3.0], exp="b")
    (group,) = groups_of(tmp_path)
    assert [run.last for run in group.runs] == [20_000]
    (remark,) = plot.remarks([group])
    assert "seed 1 again" in remark and remark.endswith(str(Path("a") / "1"))
    # What is left out gives the row no name either.
    assert group.settings == "small, b"


def test_the_mean_ends_where_the_first_seed_ends(make_run, tmp_path):
    make_run([10.0, 20.0, 30.0])
    make_run([20.0, 40.0], seed=2)
    (group,) = groups_of(tmp_path)
    steps, returns = plot.curve(group)
    assert steps.tolist() == [10_000, 20_000] and returns.mean(0).tolist() == [15.0, 30.0]
    assert plot.last_score(group) == ["20K", "30.0 ± 10.0"]
    (remark,) = plot.remarks([group])
    assert "the mean ends at 20000" in remark


def test_other_evaluation_frames_are_interpolated():
    runs = [
        plot.Run(Path("a"), {}, {0: (0.0, 0.0), 100: (10.0, 0.0)}),
        plot.Run(Path("b"), {}, {50: (1.0, 0.0), 100: (3.0, 0.0), 150: (4.0, 0.0)}),
    ]
    steps, returns = plot.curve(plot.Group("task", "algo", runs, [], "", ""))
    assert steps.tolist() == [50, 100]
    assert returns.tolist() == [[5.0, 10.0], [1.0, 3.0]]


def test_interval_holds_the_mean_within_the_seeds():
    returns = np.random.default_rng(0).normal(500, 100, (5, 7))
    returns[:, 3] = 42.0
    low, high = plot.interval(returns)
    mean = returns.mean(0)
    assert low.shape == high.shape == (7,)
    assert (returns.min(0) <= low).all() and (high <= returns.max(0)).all()
    apart = np.arange(7) != 3
    assert (low[apart] < mean[apart]).all() and (mean[apart] < high[apart]).all()
    assert low[3] == high[3] == 42.0
    assert np.array_equal(plot.interval(returns)[0], low)


def test_interval_of_many_seeds_is_that_of_the_normal():
    returns = np.random.default_rng(0).normal(0, 1, (400, 1))
    low, high = plot.interval(returns)
    half = 1.96 * returns.std() / 20
    assert (high - low).item() / 2 == pytest.approx(half, rel=0.05)


# -------------------------------------------------------------------------------- writing


def test_frames():
    words = [plot.frames(number) for number in (0, 500, 20_000, 100_000, 10_500, 1_000_000)]
    assert words == ["0", "500", "20K", "100K", "10.5K", "1M"]


def test_the_table(make_run, tmp_path):
    make_run([1.0, 10.0])
    make_run([2.0, 20.0], seed=2)
    make_run([3.0, 30.0], algo="Dreamerv2", exp="a|b")
    text = plot.table(groups_of(tmp_path), references())
    lines = text.splitlines()
    assert lines[0] == "| task | algorithm | settings | seeds | frames | return |"
    assert lines[2] == "| walker-walk | **Dreamerv1** | small, default | 2 | 20K | 15.0 ± 5.0 |"
    assert lines[3] == "| walker-walk | **Dreamerv2** | small, a\\|b | 1 | 20K | 30.0 ± 2.5 † |"
    assert "| walker-walk | Dreamer v1 official | published | 5 | 100K | 304.2 ± 62.5 |" in lines
    assert "† One seed: ± is over the episodes" in text
    assert "- DreamerV2 official: DERIVED" in text
    assert "cheetah-run" not in text


def test_the_table_without_what_is_not_known(make_run, tmp_path):
    make_run([10.0])
    make_run([20.0], seed=2)
    row = {"task": "walker-walk", "method": "m", "frames": "100000", "mean": "5", "what": "read"}
    text = plot.table(groups_of(tmp_path), [{**row, "std": "", "seeds": ""}])
    assert "| walker-walk | m | published | – | 100K | 5.0 |" in text
    assert "†" not in text


def test_the_table_of_each_run(make_run, tmp_path):
    folder = make_run([1.0, 2.0, 4.0, 8.0, 16.0])
    with (folder / "metrics.jsonl").open("a") as file:
        for hours in (1.25, 1.5):  # it was restored, and went on
            file.write(f'{{"step": 50000, "time/hours": {hours}}}\n')
        file.write('{"step": 51000, "time/hours": 9.0}\n')  # after the last evaluation
    make_run([5.0, 7.5], seed=2, exp="other")
    make_run([6.0], exp="twin")  # of seed 1, which got further
    row = {"step": 15_000, "eval/return_mean": 9.0}  # without a spread, between two columns
    (make_run([], algo="Dreamerv2") / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert plot.each_run(groups_of(tmp_path)).splitlines()[:5] == [
        "| task | algorithm | experiment | seed | 10K | 20K | 30K | 40K | last | at | hours |",
        "| " + " | ".join(["---"] * 11) + " |",
        "| walker-walk | Dreamerv1 | default | 1 "
        "| 1.0 | 2.0 | 4.0 | 8.0 | 16.0 ± 2.5 | 50K | 1.50 |",
        "| walker-walk | Dreamerv1 | other | 2 | 5.0 | 7.5 | – | – | 7.5 ± 2.5 | 20K | – |",
        "| walker-walk | Dreamerv2 | default | 1 | – | – | – | – | 9.0 | 15K | – |",
    ]


def test_on_the_way_is_interpolated_between_evaluations(make_run, tmp_path):
    make_run([0.0, 10.0, 20.0])
    row = plot.each_run(groups_of(tmp_path)).splitlines()[2]
    # At 6K frames nothing is known.
    assert "| 1 | – | 2.0 | 8.0 | 14.0 | 20.0 ± 2.5 | 30K |" in row


def test_the_command_writes_all(make_run, tmp_path, capsys):
    make_run([1.5, 10.0])
    make_run([2.0, 20.0], seed=2)
    make_run([3.0], algo="Dreamerv2")
    make_run([4.0], algo="Dreamerv2", exp="wide", batch_size=32)
    make_run([5.0], env="cheetah-run")
    make_run([5.0], env="fish-swim")  # no published scores of this
    unevaluated = make_run([], env="finger-spin")
    assert call(tmp_path) == 0
    notes = capsys.readouterr().err.splitlines()
    labels = "small, batch_size=16; small, batch_size=32"
    assert notes == [
        f"plot.py: {unevaluated}: no evaluation yet, left out",
        f"plot.py: walker-walk Dreamerv2: 2 settings, kept apart: {labels}",
    ]
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["task", "algo", "seed", "step", "return", "settings"]
    assert ["walker-walk", "Dreamerv1", "1", "10000", "1.5", "small, default"] in rows
    wide = ["walker-walk", "Dreamerv2", "1", "10000", "4.0", "small, wide, batch_size=32"]
    assert wide in rows and len(rows) == 1 + 8
    assert "| fish-swim | **Dreamerv1** |" in (tmp_path / "out" / "scores.md").read_text("utf-8")
    assert "| fish-swim | Dreamerv1 |" in (tmp_path / "out" / "scores.md").read_text("utf-8")
    image = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    assert image.shape[1] == 1800 and 1000 < image.shape[0] < 2500
    assert (image[..., :3].min(-1) < 0.9).mean() > 0.01


def test_what_the_picture_shows(make_run, tmp_path):
    make_run([10.0, 40.0])
    make_run([20.0, 60.0], seed=2)
    make_run([3.0, 4.0], algo="Dreamerv2")
    figure = plot.figure(groups_of(tmp_path), references())
    (panel,) = figure.axes
    first, second = panel.get_lines()
    assert first.get_ydata().tolist() == [15.0, 50.0]
    assert second.get_xdata().tolist() == [10_000, 20_000]
    assert [line.get_color() for line in (first, second)] == list(plot.COLORS.values())
    assert len(panel.collections) == 1  # a band for two seeds, none for one
    labels = [text.get_text().replace("\xa0", " ") for text in panel.get_legend().get_texts()]
    assert labels == ["Dreamerv1 (2 seeds)", "Dreamerv2 (1 seed)"]
    assert panel.get_legend().get_title().get_text() == "walker-walk"
    assert panel.get_xlim() == (0, 100_000)
    (strip,) = panel.child_axes
    published = [row for row in references() if row["task"] == "walker-walk"]
    marks = {container[0].get_ydata()[0] for container in strip.containers}
    assert marks == {float(row["mean"]) for row in published}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == sorted(row["method"] for row in published)


def test_many_long_labels_leave_the_panels_their_room(make_run, tmp_path):
    for number in range(8):
        many = {f"a_setting_with_a_long_name_{i}": number for i in range(6)}
        make_run([1.0, 2.0], exp=f"exp{number}", **many)
        make_run([1.0, 2.0], env="cheetah-run", exp=f"exp{number}", **many)
    figure = plot.figure(groups_of(tmp_path), [])
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert ax.get_window_extent().height / figure.dpi > 2
        legend = ax.get_legend().get_window_extent()
        assert legend.y0 >= ax.get_window_extent().y1 and legend.y1 <= figure.bbox.y1


def test_seeds_without_common_frames(make_run, tmp_path, capsys):
    make_run([1.0])
    folder = make_run([], seed=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20000, "eval/return_mean": 9.0}\n')
    assert call(tmp_path, "--references") == 0
    assert "no frames in common" in capsys.readouterr().err
    text = (tmp_path / "out" / "scores.md").read_text("utf-8")
    assert "| 2 | – | – |" in text and "published" not in text


# --------------------------------------------------------------------------------- errors


def test_no_run(tmp_path, capsys):
    assert call(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot.py: error: no run ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_evaluation(make_run, tmp_path, capsys):
    make_run([])
    assert call(tmp_path) == 2
    assert "no evaluation yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(make_run, tmp_path, capsys):
    make_run([1.0])
    (tmp_path / "out").write_text("")
    assert call(tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_matplotlib(make_run, tmp_path, capsys, monkeypatch):
    make_run([1.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(tmp_path) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_script(make_run, tmp_path):
    path = make_run([1.0]) / "metrics.jsonl"
    path.write_text("{\n")
    words = [sys.executable, str(SCRIPT), str(tmp_path), "--out", str(tmp_path / "out")]
    options = {"capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run(words, check=False, **options)
    assert result.returncode == 2
    assert result.stderr == f"plot.py: error: {path}, line 1: not a row of metrics\n"
    result = subprocess.run(words[:3], check=False, **options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
