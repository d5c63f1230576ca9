"""The demo at a small size: the whole path of `make demo`, twice."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_demo_runs_and_runs_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--device", "cpu", "--seq-len", "128"]
    command += ["--seconds", "3", "--folder", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    trials = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"the service at http://127\.0\.0\.1:\d+ has the answers", done.stdout)
        rows = re.findall(r"^(inference\.fp32\S+) .*?(\d+)  (\S+) \(default (\S+)\)$", done.stdout, re.MULTILINE)
        assert [row[0].partition("causal")[2] for row in rows] == ["", ".window16"]
        assert all(float(error) < 1e-5 for row in rows for error in row[2:])
        trials.append([int(row[1]) for row in rows])
    assert all(second >= first for first, second in zip(*trials, strict=True))
