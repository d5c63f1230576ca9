"""The scripts of the recommended uses, each at a small size, and what they claim of themselves."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tilewise.layers import rotation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_a_cpu_as_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions come from torch's operators there; Triton's interpreter takes many times as long."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(rotation, "_runs_on", lambda _: False)


def said(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def last_number(text: str) -> float:
    return float(re.findall(r"[0-9.]+(?:e[+-]\d+)?", text)[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # in float16 Adam divides by zero
def test_training_learns(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--steps", "150", "--seq-len", "24", "--vocabulary", "16", "--embed-dim", "48", "--dtype", dtype)
    lines = said("train_gpt.py", monkeypatch, capsys, *flags).splitlines()
    first, last = last_number(lines[0]), last_number(lines[-1])
    assert first > 2.5
    assert last < 0.6 * first


def test_decoding_is_the_full_forward(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = said("llama_inference.py", monkeypatch, capsys, "--embed-dim", "64", "--prompt", "40", "--new", "5")
    assert "cache: 45 tokens" in out
    assert last_number(out) < 1e-5


def test_masks_keep_documents_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = said("custom_masks.py", monkeypatch, capsys, "--embed-dim", "32", "--seq-len", "40")
    assert last_number(out.splitlines()[0]) > 0
    changed = re.search(r"changed: (\d+), outside the changed document: (\d+)", out)
    assert changed is not None
    assert int(changed[1]) > 0
    assert int(changed[2]) == 0


def test_padding_of_a_source_is_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = said("encoder_decoder.py", monkeypatch, capsys, "--embed-dim", "32", "--source", "20", "--target", "7")
    assert "result (4, 7, 64)" in out
    assert last_number(out) < 1e-5


def test_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--embed-dim", "64", "--heads", "4", "--seq-len", "96", "--window", "16", "--runs", "1")
    out = said("cpu_inference.py", monkeypatch, capsys, *flags)
    assert "auto runs sdpa (default) for inference.fp32.b1.h4.kv4.q96.k96.d16.causal.window16" in out
    assert last_number(out) < 1e-4


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        *((name, flag, "fast") for name in ("custom_masks.py", "encoder_decoder.py", "llama_inference.py")
          for flag in ("--dtype", "--kernel")),
        ("train_gpt.py", "--dtype", "float16"),
        ("train_gpt.py", "--kernel", "fast"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be(
    name: str, flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        said(name, monkeypatch, capsys, flag, value)
    assert f"argument {flag}: invalid choice: '{value}' (choose from " in capsys.readouterr().err


def test_every_example_is_run_here() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"demo.py"}
    assert {name for name in scripts if f'"{name}"' in Path(__file__).read_text()} == scripts
