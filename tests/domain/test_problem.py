"""Problem: keys round trip, impossible problems are refused, buckets are stable."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.domain.errors import ProblemError
from tilewise.domain.problem import Dtype, Layout, Pass, Precision, Problem

sizes = st.integers(1, 1 << 20)
sides = st.integers(-1, 1 << 16)
DIMS = ("b1", "h1", "q1", "k1")
masks = st.one_of(
    st.just("none"),
    st.builds(
        lambda kind, dims: ".".join([kind, "".join(dim for dim in DIMS if dim in dims)] if dims else [kind]),
        st.sampled_from(["bool", "bias"]),
        st.sets(st.sampled_from(DIMS)),
    ),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads, group = draw(st.integers(1, 64)), draw(st.integers(1, 16))
    pass_, dtype, mask = draw(st.sampled_from(Pass)), draw(st.sampled_from(Dtype)), draw(masks)
    return Problem(
        pass_=pass_,
        dtype=dtype,
        batch=draw(sizes),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=draw(sizes),
        kv_len=draw(sizes),
        head_dim=draw(st.integers(1, 512)),
        v_head_dim=draw(st.integers(0, 512)),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(sides, sides)),
        mask=mask,
        bias_grad=draw(st.booleans()) and mask.startswith("bias") and pass_ is Pass.TRAINING,
        alibi=draw(st.booleans()),
        dropout=draw(st.booleans()),
        softcap=draw(st.booleans()),
        precision=draw(st.sampled_from(Precision)) if dtype is Dtype.FP32 else Precision.IEEE,
        varlen=draw(st.booleans()),
        page_size=draw(st.sampled_from([0, 16, 256])),
        layout=draw(st.sampled_from(Layout)),
        deterministic=draw(st.booleans()),
    )


@given(problems())
def test_key_round_trips_and_is_url_safe(problem: Problem) -> None:
    assert Problem.parse(problem.key) == problem
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", problem.key)


@given(problems())
def test_bucket_is_a_fixed_point_and_never_smaller(problem: Problem) -> None:
    bucket = problem.bucket()
    assert bucket.bucket() == bucket
    for name in ("batch", "q_len", "kv_len"):
        assert getattr(bucket, name) >= getattr(problem, name)
    assert bucket.q_len <= max(16, problem.q_len * 5 / 4)
    assert (bucket.q_len == bucket.kv_len) or problem.q_len != problem.kv_len
    assert dataclasses.replace(bucket, batch=1, q_len=1, kv_len=1) == dataclasses.replace(
        problem, batch=1, q_len=1, kv_len=1
    )


@given(problems(), problems())
def test_different_problems_have_different_keys(one: Problem, other: Problem) -> None:
    assert (one.key == other.key) == (one == other)


def test_the_key_of_the_design() -> None:
    problem = Problem(batch=2, heads=128, q_len=2048, head_dim=56, causal=True)
    assert problem.key == "inference.fp16.b2.h128.kv128.q2048.k2048.d56.causal"


def test_two_spellings_of_one_window_are_one_problem() -> None:
    base = Problem(batch=1, heads=8, q_len=64, head_dim=64)
    one = dataclasses.replace(base, causal=True, window=(256, -1))
    other = dataclasses.replace(base, window=(256, 0))
    assert one == other
    assert one.key.endswith(".causal.window256")
    assert dataclasses.replace(base, window=(-1, 0)) == dataclasses.replace(base, causal=True)
    assert dataclasses.replace(base, window=(-1, -1)) == base


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 6, "kv_heads": 4}, "multiple of kv_heads"),
        ({"q_len": 0}, "q_len"),
        ({"head_dim": True}, "head_dim"),
        ({"mask": "bias."}, "mask"),
        ({"mask": "float"}, "mask"),
        ({"window": (-2, 0)}, "window"),
        ({"bias_grad": True}, "bias_grad"),
        ({"precision": Precision.TF32}, "tf32"),
        ({"page_size": -1}, "page_size"),
    ],
)
def test_impossible_problems_are_refused(change: dict[str, object], says: str) -> None:
    sizes: dict[str, object] = {"batch": 1, "heads": 8, "q_len": 64, "head_dim": 64}
    with pytest.raises(ProblemError, match=says):
        Problem(**(sizes | change))  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "key",
    [
        "",
        "nonsense",
        "inference.fp16.b2.h128.kv128.q2048.k2048.d56.causal.",
        "inference.fp16.b02.h128.kv128.q2048.k2048.d56",  # not canonical
        "inference.fp16.b2.h128.kv128.q2048.k2048.d56.dv56",  # a default written out
        "inference.fp64.b2.h128.kv128.q2048.k2048.d56",
        "inference.fp16.b2.h128.kv5.q2048.k2048.d56",
        "inference.fp16.b٢.h128.kv128.q2048.k2048.d56",
        "inference.fp16.b2.h128.kv128.q2048.k2048.d56.alibi.causal",
        f"inference.fp16.b{'9' * 5000}.h1.kv1.q1.k1.d1",
    ],
)
def test_bad_keys_are_refused_with_what_was_expected(key: str) -> None:
    with pytest.raises(ProblemError):
        Problem.parse(key)


@given(problems().filter(lambda problem: problem.q_len * problem.kv_len < 1 << 16 and problem.q_len < 512))
def test_attended_pairs_counts_them(problem: Problem) -> None:
    left, right = problem.window or (-1, 0 if problem.causal else -1)
    offset = problem.kv_len - problem.q_len
    count = sum(
        (left == -1 or j >= i + offset - left) and (right == -1 or j <= i + offset + right)
        for i in range(problem.q_len)
        for j in range(problem.kv_len)
    )
    assert problem.attended_pairs == count
