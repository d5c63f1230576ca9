"""The benchmark of calls: every cell is timed, and the backend that computes nothing goes again."""

import json

from tilewise.bench import ops
from tilewise.domain import codec
from tilewise.kernels.backends import BACKENDS


def test_every_cell_is_timed() -> None:
    before = list(BACKENDS)
    report = ops.measure(3)
    assert [row.name for row in report.rows] == ["inference", "forward of training", "forward and backward", ops.COLD]
    assert all(len(row.medians) == len(ops.COLUMNS) and min(row.medians) > 0 for row in report.rows)
    lines = ops.table(report).splitlines()
    assert lines[0].split() == ["microseconds", *ops.COLUMNS]
    assert lines[3].split()[-4:] == [str(median) for median in report.rows[2].medians]
    assert codec.from_json(ops.Report, json.loads(json.dumps(codec.to_json(report)))) == report
    assert list(BACKENDS) == before
