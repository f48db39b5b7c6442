"""results/scaling.py on a tiny run."""

import pytest
import scaling
from conftest import SHORT_RUN


def test_a_tiny_run_is_restored_and_goes_on(capsys):
    row = scaling.measure(7, {**SHORT_RUN, "device": "cpu"})
    rows = (7 + scaling.ITERATIONS) * 21  # of 20 actions each
    assert row["replay GB"] == pytest.approx(rows * (64 * 64 * 3 + 4 * 3) / 1e9)
    assert row["episodes"] == 7
    assert all(0 < value < float("inf") for value in row.values())
    assert row["iteration s"] > SHORT_RUN["update_steps"] * row["gradient step ms"] / 1000
    assert "damaged" not in capsys.readouterr().out
