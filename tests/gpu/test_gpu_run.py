"""The script for a GPU: a part that ends early is a row with the reason, and what it found before is kept."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

# By its place, as examples/evolve has a run.py too.
spec: Any = importlib.util.spec_from_file_location("gpu_run", Path(__file__).with_name("run.py"))
script = sys.modules["gpu_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
Row, in_process = script.Row, script.in_process
FIRST = 'print("row", \'{"what": "first", "value": 1.5, "at_least": 1.0}\', flush=True);'


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("raise ValueError('no kernel')", "exit 1: ValueError: no kernel"),
        ("import os; os.abort()", "exit -6: no message"),
        ("import time; time.sleep(60)", "it took longer than 3 s"),
    ],
)
def test_a_part_that_fails_or_is_too_slow_is_a_row_with_the_reason(then, reason):
    rows = in_process([sys.executable, "-c", FIRST + then], dict(os.environ), 3.0)
    assert rows == [Row("first", 1.5, at_least=1.0), Row("ended early", reason, failed=True)]
    assert [row.kept for row in rows] == [True, False]


def test_a_part_that_has_no_time_left_is_a_failed_row():
    (row,) = in_process([sys.executable, "-c", FIRST], dict(os.environ), 0.0)
    assert not row.kept


def test_a_figure_is_kept_between_its_bars_and_what_is_left_out_is_no_failure():
    assert [Row("x", v, at_least=1.0, at_most=2.0).kept for v in (0.9, 1.0, 2.0, 2.1)] == [False, True, True, False]
    assert Row("x", "left out").kept
