"""Outputs and all gradients of the Triton kernels over the table of tests/kernels/covering.py.

At small odd sizes in Triton's interpreter (or compiled, on a GPU), and on a GPU at real sizes: 121 cells of 1023.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tilewise.domain.config import Candidate, Config, Value
from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels.backends.triton import Triton
from tilewise.kernels.inputs import random_call
from tilewise.kernels.triton_kernels.common import dropout_mask
from tilewise.tuner.correctness import Checker

from .covering import BROADCAST, CELLS, FEATURES, HEAD_DIMS, LATENT, SHARING, Cell, every, pairs, problem_of
from .test_backends import H200
from .test_triton import HERE, can_use_tma
from .test_triton_cells import assert_gradients, candidate

TILES = ((16, 16), (32, 16), (16, 32))
SMALL, REAL = 21, 1000  # at least 17 queries: fewer of a length each are decoding


def test_every_pair_of_values_is_in_some_cell() -> None:
    wanted = {pair for cell in every() for pair in pairs(cell)}
    assert {pair for cell in CELLS for pair in pairs(cell[:4])} == wanted
    assert (len(CELLS), len(every())) == (121, 1023)
    assert len(wanted) == 11 * 3 + 11 * 4 + 11 * 11 + 3 * 4 + 3 * 11 + (3 * 10 + 1)
    assert [cell.dtype for cell in CELLS].count(Dtype.FP32) == 12


@pytest.mark.parametrize("unit", [SMALL, REAL])
def test_the_cells_are_what_they_are_called(unit: int) -> None:
    problems = {cell: problem_of(cell, unit=unit, batch=2) for cell in CELLS}
    assert len(set(problems.values())) == len(CELLS)
    for cell, problem in problems.items():
        assert problem.pass_ is Pass.TRAINING
        assert (problem.heads > problem.kv_heads) == (cell.sharing in ("gqa", "mqa"))
        assert (problem.mask != "none") == (cell.feature in ("bool", "bias", "bias gradient", "everything"))
        assert problem.bias_grad == (cell.feature in ("bias gradient", "everything"))
        assert (problem.window is not None) == (cell.feature == "window")
        assert problem.packed == (cell.feature == "varlen")
        assert not (cell.feature == "causal" and problem.q_len == problem.kv_len)
    masks = {problem.mask for problem in problems.values()}
    assert {f"bias{dims}" for dims in BROADCAST} <= masks
    assert {problem.dropout for problem in problems.values()} == {True, False}
    assert FEATURES.keys() == {cell.feature for cell in CELLS}
    assert SHARING.keys() == {cell.sharing for cell in CELLS}
    assert {*HEAD_DIMS, LATENT} == {cell.head_dims for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_small(cell: Cell) -> None:
    """Tiles smaller than a length; half of the cells by pointers, half through TMA, half in one loop, in all pairs."""
    batch = 3 if cell.feature == "varlen" else 1 + cell.number % 2
    call = random_call(problem_of(cell, unit=SMALL, batch=batch), HERE, seed=cell.number, empty=True)
    tma, in_registers = cell.number // 4 % 2 == 1 and can_use_tma(), cell.number // 8 % 2 == 1
    chosen = candidate(*TILES[cell.number % 3], tma=tma, in_registers=in_registers, one_loop=cell.number // 16 % 2 == 1)
    assert_gradients(call, chosen, keep=dropout_mask(call) if call.problem.dropout else None)


def ways(problem: Problem, device: Device) -> list[Candidate]:
    """Return the default, and in half precision every way to load tiles: warp-specialised, through TMA, by pointers.

    Each role takes the default config of its kernel, the other load path its tiles and one loop, and what it has not
    its default. With narrow heads the default is through TMA already, so there that way has one loop too.
    """
    default = Triton().default(problem, device)
    if problem.dtype is Dtype.FP32:  # compiles for long
        return [default]
    found = {default: None}
    for kind in ("hopper", "default", "flipped"):
        chosen = default
        for role, whole in Triton().spaces(problem, device).items():
            spaces = {space.kernel.partition("_")[0]: space for space in whole.by_kernel}
            if kind == "hopper":
                config = spaces["hopper"].default if "hopper" in spaces else spaces["triton"].default
            else:
                values = spaces["triton"].default.as_dict()
                other: dict[str, Value] = {"in_registers": False, "one_loop": True}
                if kind == "flipped":
                    other["tma"] = not values["tma"]
                elif max(problem.head_dim, problem.v_head_dim) > 64:
                    other = {}
                changed = {name: value for name, value in other.items() if name in values}
                config = Config.of(spaces["triton"].kernel, **{**values, **changed})
            chosen = chosen.with_config(role, config) if config in whole else chosen
        found[chosen] = None
    return list(found)


def test_the_ways_of_each_cell() -> None:
    """On sm_90 both load paths of every cell in half precision and, where there are some, warp-specialised kernels."""
    counted: Counter[str] = Counter()
    for cell in CELLS:
        problem = problem_of(cell, unit=REAL, batch=2)
        chosen = ways(problem, H200)
        assert chosen[0] == Triton().default(problem, H200)
        loops = (
            cell.dtype is not Dtype.FP32
            and cell.feature != "varlen"
            and max(problem.head_dim, problem.v_head_dim) <= 64
        )
        assert len(ways(problem, replace(H200, arch="sm_80"))) == 1 + loops
        forwards = {(config.kernel, config.as_dict().get("tma")) for config in map(Candidate.config, chosen) if config}
        if cell.dtype is Dtype.FP32:
            assert len(forwards) == 1
            continue
        assert {("triton_forward", True), ("triton_forward", False)} <= forwards
        counted["two ways" if len(forwards) == 2 else "three ways"] += 1
        assert (len(forwards) == 3) == (cell.feature != "varlen")
    assert counted == {"three ways": 99, "two ways": 10}


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_real(cell: Cell) -> None:
    """Every way to load tiles, within the checker's bound of float64."""
    device = devices.select("cuda")
    problem = problem_of(cell, unit=REAL, batch=2)
    checker = Checker(problem, device, seed=0)
    for chosen in ways(problem, devices.describe(device)):
        error = checker.check(chosen)
        assert error.worst <= 1, f"{chosen}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
def test_expanded_and_overlapping_tensors(tma: bool) -> None:
    """One key for all heads and one memory for key and value: strides of 0 and rows that overlap, on both paths."""
    if tma and not can_use_tma():
        pytest.skip("needs sm_90")
    problem = Problem(pass_=Pass.TRAINING, batch=2, heads=4, q_len=300, kv_len=260, head_dim=64, causal=True)
    call = random_call(problem, HERE, seed=0)
    shared = torch.randn(2 * 260 * 64 + 64, dtype=torch.float16, device=HERE)
    key = shared[:-64].view(2, 260, 1, 64).expand(2, 260, 4, 64)
    value = shared.as_strided((2, 260, 4, 64), (260 * 64, 64, 16, 1))
    assert_gradients(call.with_tensors(call.query, key, value), candidate(64, 64, tma=tma))


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = Problem(pass_=Pass.TRAINING, batch=2, heads=4, q_len=300, head_dim=64, causal=True)
    second = torch.device("cuda", 1)
    with torch.cuda.device(0):
        checker = Checker(problem, second, seed=0)
        for name in ("triton", "sdpa", "plain"):
            assert checker.check(Candidate(name)).worst <= 1, name
        assert torch.cuda.current_device() == 0
