"""The cases that `make memcheck` runs under compute-sanitizer: interpreted where there is no GPU."""

import pytest

from tilewise.bench import memcheck
from tilewise.kernels import device as devices

DEVICE = devices.select()


@pytest.mark.parametrize("case", list(memcheck.cases(DEVICE))[::3], ids=lambda case: str(case.kernels))
def test_a_case_is_right(case: memcheck.Case) -> None:
    assert memcheck.worst(case, DEVICE) <= memcheck.TOLERANCE


def test_every_kernel_has_a_case() -> None:
    kernels = " ".join(case.kernels for case in memcheck.cases(DEVICE))
    for name in ("forward", "delta", "dkdv", "dq", "dbias", "keep_mask", "decode", "combine", "mask", "packed"):
        assert name in kernels


def test_the_kernels_of_layers_are_right() -> None:
    found = dict(memcheck.of_layers(DEVICE))
    assert {name.split()[0].rstrip(":") for name in found} == {"turn_heads", "join_heads"}
    assert max(found.values()) < 1e-6


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decoding = list(memcheck.cases(DEVICE))[-1:]
    monkeypatch.setattr(memcheck, "cases", lambda _: decoding)
    monkeypatch.setattr(memcheck, "of_layers", lambda _: ())
    memcheck.main()
    assert capsys.readouterr().out.startswith("ok  ")
    monkeypatch.setattr(memcheck, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="1 cases are off by more than 0"):
        memcheck.main()
