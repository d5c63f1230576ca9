"""What an A100 would run, sm_80's code, assembled for the GPU at hand: right on it, though its times say nothing.

Everything runs in a process of its own: kernels compiled for the GPU's own architecture must not be in it, and Triton
must not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "attention_forward",
    "dkdv_kernel",
    "dq_kernel",
    "delta_rows",
    "dbias_kernel",
    "attention_decode",
    "combine_splits",
}


def printed(command: str, cache: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sm80_code.py")), command, str(cache)],
        env={**environment, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_ptx_of_sm80_assembles_for_sm90(tmp_path: Path) -> None:
    found = printed("compile", tmp_path)
    assert found == {name: [] for name in KERNELS}


@pytest.mark.gpu
def test_code_of_sm80_is_right_here(tmp_path: Path) -> None:
    compiled, results = printed("run", tmp_path)
    assert compiled == {name: [] for name in KERNELS}
    assert len(results) > 100
    wrong = [result for result in results if not (isinstance(result[2], float) and result[2] <= 1)]
    assert not wrong, f"{len(wrong)} of {len(results)}: {wrong[:10]}"
