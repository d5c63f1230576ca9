"""What attention(), decode() and the layer refuse: with the shapes in the message, and before any backend runs."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import tilewise
from tilewise import FastMultiHeadSelfAttention
from tilewise.domain.errors import ConfigError, InputError, TilewiseError, UnsupportedError
from tilewise.layers.attention import attention

from .conftest import Ran

Case = tuple[dict[str, Any], str]
Q, K = (2, 8, 4, 16), (2, 9, 2, 16)
SHAPES = r"query \(2, 8, 4, 16\), key \(2, 9, 2, 16\), value \(2, 9, 2, 16\)"


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def good() -> dict[str, Any]:
    return {"query": of(*Q), "key": of(*K), "value": of(*K)}


def both(*shape: int) -> dict[str, torch.Tensor]:
    return {"key": of(*shape), "value": of(*shape)}


def as_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in good().items()}


def nested(layout: torch.layout = torch.strided) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the API of nested tensors is a prototype
        return torch.nested.nested_tensor([of(8, 4, 16), of(5, 4, 16)], layout=layout)


def quantised() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's old quantisation goes
        return {name: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8) for name, tensor in good().items()}


SHAPE_CASES: dict[str, Case] = {
    "rank": ({"query": of(8, 4, 16)}, r"expected 4 dimensions .* got query \(8, 4, 16\), key \(2, 9, 2, 16\)"),
    "rank in bhsd": ({"query": of(16), "layout": "bhsd"}, r"expected 4 dimensions .* got query \(16,\), key "),
    "batch": (both(3, 9, 2, 16), r"one batch size, got query \(2, 8, 4, 16\), key \(3, 9, 2, 16\)"),
    "lengths": ({"value": of(2, 7, 2, 16)}, r"same length and heads, got query .* value \(2, 7, 2, 16\)"),
    "value heads": ({"value": of(2, 9, 1, 16)}, r"same length and heads, got query .* value \(2, 9, 1, 16\)"),
    "head_dim": ({"key": of(2, 9, 2, 8)}, r"same head_dim, got query \(2, 8, 4, 16\), key \(2, 9, 2, 8\)"),
    "heads": (both(2, 9, 3, 16), r"of key heads, got 4 and 3 \(query \(2, 8, 4, 16\), key \(2, 9, 3, 16\)"),
    "fewer heads": (both(2, 9, 8, 16), r"of key heads, got 4 and 8 \(query \(2, 8, 4, 16\), key \(2, 9, 8, 16\)"),
    "no batch": (
        {"query": of(0, 8, 4, 16), **both(0, 9, 2, 16)},
        r"no empty dimension, got query \(0, 8, 4, 16\), key \(0, 9, 2, 16\)",
    ),
    "no queries": ({"query": of(2, 0, 4, 16)}, r"no empty dimension, got query \(2, 0, 4, 16\)"),
    "no keys": (both(2, 0, 2, 16), r"no empty dimension, got .* key \(2, 0, 2, 16\)"),
    "no heads": (both(2, 9, 0, 16), r"no empty dimension, got .* key \(2, 9, 0, 16\)"),
    "no head_dim": ({"query": of(2, 8, 4, 0), "key": of(2, 9, 2, 0)}, r"no empty dimension, got query \(2, 8, 4, 0\)"),
    "no values": ({"value": of(2, 9, 2, 0)}, r"no empty dimension, got .* value \(2, 9, 2, 0\)"),
}
DTYPE_CASES: dict[str, Case] = {
    "two dtypes": ({"key": of(*K, dtype=torch.float16)}, rf"one dtype, got query torch.float32, key .*\({SHAPES}\)"),
    **{
        str(dtype): (
            as_dtype(dtype),
            rf"float16, bfloat16 or float32, got {dtype} \({SHAPES}\).* use tilewise.kernels.reference.attention",
        )
        for dtype in (torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "quantised": (quantised(), rf"float16, bfloat16 or float32, got torch.qint8 \({SHAPES}\)"),
    "two devices": ({"key": of(*K, device="meta")}, rf"one device, got query cpu, key meta, value cpu \({SHAPES}\)"),
}
KIND_CASES: dict[str, Case] = {
    "a list": ({"query": [[1.0]]}, "query: expected a torch.Tensor, got list"),
    "a list in bhsd": ({"query": [[1.0]], "layout": "bhsd"}, "query: expected a torch.Tensor, got list"),
    "nothing": ({"value": None}, "value: expected a torch.Tensor, got NoneType"),
    "an array": ({"key": of(*K).numpy()}, "key: expected a torch.Tensor, got ndarray"),
    "an array as mask": ({"mask": of(8, 9).numpy()}, "mask: expected a torch.Tensor, got ndarray"),
    "a number as slopes": ({"alibi_slopes": 0.5}, "alibi_slopes: expected a torch.Tensor, got float"),
    "sparse": ({"key": of(*K).to_sparse()}, r"key: .* got torch.sparse_coo \(2, 9, 2, 16\); use key.to_dense\(\)"),
    "sparse mask": ({"mask": of(8, 9).to_sparse()}, r"mask: .* got torch.sparse_coo \(8, 9\); use mask.to_dense"),
    "nested": ({"query": nested()}, "query: expected a dense tensor, got a nested one of 2 parts"),
    "nested, jagged": ({"query": nested(torch.jagged)}, "query: expected a dense tensor, got a nested one of 2 parts"),
    "wrapped": (
        {"query": TwoTensor(of(*Q), of(*Q))},
        r"query: expected a plain tensor, got a TwoTensor \(2, 8, 4, 16\), which holds .* to_local\(\)",
    ),
    "wrapped mask": ({"mask": TwoTensor(of(8, 9), of(8, 9))}, r"mask: .* got a TwoTensor \(8, 9\)"),
}
MASK_CASES: dict[str, Case] = {
    "mask shape": ({"mask": of(8, 8)}, r"mask: .* = \(2, 4, 8, 9\), got \(8, 8\)"),
    "mask of the keys' heads": ({"mask": of(2, 2, 8, 9)}, r"mask: .* = \(2, 4, 8, 9\), got \(2, 2, 8, 9\)"),
    "mask rank": ({"mask": of(1, 2, 4, 8, 9)}, r"mask: .* got \(1, 2, 4, 8, 9\)"),
    "mask of nothing": ({"mask": of(8, 0)}, r"mask: .* got \(8, 0\)"),
    "mask of integers": ({"mask": of(8, 9, dtype=torch.int32)}, r"mask: expected bool .* got torch.int32 \(8, 9\)"),
    "mask of complex": ({"mask": of(8, 9, dtype=torch.complex64)}, r"got torch.complex64 \(8, 9\)"),
    "mask of float8": ({"mask": of(8, 9, dtype=torch.float8_e5m2)}, r"got torch.float8_e5m2 \(8, 9\)"),
    "mask device": ({"mask": of(8, 9, device="meta")}, r"mask: expected it on cpu .* got \(8, 9\) on meta"),
    "slopes shape": ({"alibi_slopes": of(3)}, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    "slopes of the keys": (
        {"alibi_slopes": of(2, 2)},
        r"slopes: expected shape \(4,\) or \(2, 4\), got \(2, 2\)",
    ),
    "slopes dtype": ({"alibi_slopes": of(4, dtype=torch.int64)}, r"floating point on cpu .* got torch.int64 \(4,\)"),
    "slopes device": ({"alibi_slopes": of(4, device="meta")}, r"got torch.float32 \(4,\) on meta"),
    "slopes that learn": ({"alibi_slopes": of(4).requires_grad_()}, r"alibi_slopes: \(4,\) get no gradient"),
}
OPTION_CASES: dict[str, Case] = {
    "window below -1": ({"window": (-2, 0)}, r"window: expected \(left, right\).* got \(-2, 0\)"),
    "window of three": ({"window": (1, 2, 3)}, r"window: .* got \(1, 2, 3\)"),
    "window of floats": ({"window": (1.5, 0)}, r"window: .* got \(1.5, 0\)"),
    "window of bools": ({"window": (True, False)}, r"window: .* got \(True, False\)"),
    "window of lists": ({"window": ([1], 0)}, r"window: .* got \(\[1\], 0\)"),
    "window as list": ({"window": [1, 2]}, r"window: expected a tuple .* got \[1, 2\]"),
    "window as number": ({"window": 128}, r"window: expected a tuple .* got 128"),
    "endless window": ({"window": (1 << 30, 0)}, r"window: .* -1 \(unbounded\) or from 0 to 1073741823, got"),
    "negative softcap": ({"softcap": -1.0}, "softcap: expected 0 .* got -1.0"),
    "softcap NaN": ({"softcap": float("nan")}, "softcap: .* got nan"),
    "endless softcap": ({"softcap": float("inf")}, "softcap: .* got inf"),
    "softcap as text": ({"softcap": "30"}, "softcap: .* got '30'"),
    "softcap as tensor": ({"softcap": of()}, r"softcap: .* got tensor\(1.\)"),
    "no softcap at all": ({"softcap": None}, "softcap: .* got None"),
    "scale NaN": ({"scale": float("nan")}, r"scale: expected a finite number, or None .* got nan"),
    "endless scale": ({"scale": float("-inf")}, "scale: .* got -inf"),
    "scale as text": ({"scale": "0.1"}, "scale: .* got '0.1'"),
    "scale as tensor": ({"scale": of()}, r"scale: .* got tensor\(1.\)"),
    "dropout of all": ({"dropout": 1.0}, "dropout: expected a share of at least 0 and below 1, got 1.0"),
    "negative dropout": ({"dropout": -0.1}, "dropout: .* got -0.1"),
    "dropout NaN": ({"dropout": float("nan")}, "dropout: .* got nan"),
    "dropout as tensor": ({"dropout": of() / 2}, r"dropout: .* got tensor\(0.5"),
    "negative seed": ({"dropout": 0.1, "seed": -1}, r"seed: expected a whole number from 0 to 2\*\*63 - 1, got -1"),
    "seed of 64 bits": ({"dropout": 0.1, "seed": 1 << 63}, "seed: .* got 9223372036854775808"),
    "seed as float": ({"dropout": 0.1, "seed": 1.0}, "seed: .* got 1.0"),
    "seed as tensor": ({"dropout": 0.1, "seed": torch.tensor(1)}, r"seed: .* got tensor\(1\)"),
    "layout": ({"layout": "sbhd"}, "layout: expected 'bshd' or 'bhsd', got 'sbhd'"),
    "layout as list": ({"layout": ["bshd"]}, r"layout: expected 'bshd' or 'bhsd', got \['bshd'\]"),
    "precision": ({"precision": "fast"}, "precision: expected 'ieee' or 'tf32', got 'fast'"),
    "causal as mask": ({"causal": of(8, 9)}, "causal: expected True or False, got tensor"),
    "causal as number": ({"causal": 2}, "causal: expected True or False, got 2"),
    "strict as text": ({"strict": "yes"}, "strict: expected True or False, got 'yes'"),
    "return_lse as list": ({"return_lse": []}, r"return_lse: expected True or False, got \[\]"),
    "backends": ({"backend": ["triton", "sdpa"]}, r"backend: expected a name or a Candidate, got \['triton', 'sdpa'\]"),
}
CASES = {**SHAPE_CASES, **DTYPE_CASES, **KIND_CASES, **MASK_CASES, **OPTION_CASES}


def refused(call: Callable[[], object], message: str, ran: Ran) -> None:
    """Twice: what is remembered of good calls and of the first bad one lets nothing through."""
    ran.clear()
    for _ in range(2):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert isinstance(caught.value, TilewiseError)
    assert ran == [], "nothing was launched"


@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, ran: Ran) -> None:
    changes, message = CASES[case]
    attention(**good())
    attention(**good(), alibi_slopes=of(4), window=(1, 2), mask=of(8, 9))
    assert len(ran) == 2
    refused(lambda: attention(**{**good(), **changes}), message, ran)


@pytest.mark.parametrize("name", ["triton", "triton_decode"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_head_dim_that_no_kernel_of_the_named_backend_has(name: str, strict: bool, ran: Ran) -> None:
    """Neither falls back: on no device would it be otherwise. The default computes it."""
    wide: dict[str, Any] = {"query": of(2, 8, 4, 264), "key": of(2, 9, 2, 264), "value": of(*K)}
    attention(**wide)
    assert len(ran) == 1
    message = rf"'{name}' takes a head_dim of at most 256, got query \(2, 8, 4, 264\) and value \(2, 9, 2, 16\)"
    refused(lambda: attention(**wide, backend=name, strict=strict), message, ran)
    values = {**good(), "value": of(2, 9, 2, 264)}
    refused(lambda: attention(**values, backend=name), r"got query .* and value \(2, 9, 2, 264\)", ran)


def test_a_backend_that_cannot_run_here_names_the_shapes(ran: Ran) -> None:
    with pytest.raises(UnsupportedError, match=r"triton cannot run inference.fp32.b2.h4.kv2.q8.k9.d16 on .*CUDA"):
        attention(**good(), backend="triton", strict=True)
    with pytest.raises(ConfigError, match="unknown backend 'nope'; expected one of sdpa"):
        attention(**good(), backend="nope")
    assert ran == []


def test_tensors_of_inference_mode_cannot_learn(ran: Ran) -> None:
    with torch.inference_mode():
        made = of(*K)
    attention(of(*Q), made, made)
    with torch.no_grad():
        attention(of(*Q).requires_grad_(), made, made)
    message = r"key: \(2, 9, 2, 16\) was made in inference mode, and autograd cannot keep it .* use key.clone\(\)"
    refused(lambda: attention(of(*Q).requires_grad_(), made, of(*K)), message, ran)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_distributed_tensor(ran: Ran) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = init_device_mesh("cpu", (1,))
    query, key = (DTensor.from_local(of(*shape), mesh, [Replicate()]) for shape in (Q, K))
    refused(lambda: attention(query, key, key), r"query: .* got a DTensor \(2, 8, 4, 16\), .* to_local\(\)", ran)
    attention(query.to_local(), key.to_local(), key.to_local())
    assert len(ran) == 1


# what looks odd and is right


def test_tensors_that_require_grad_under_inference_mode() -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in good().items()}
    with torch.inference_mode():
        out = attention(**leaves)
    assert isinstance(out, torch.Tensor)
    assert not out.requires_grad


class Named(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("backend", ["sdpa", "plain", "cpu_tiled"])
def test_views_of_all_kinds(backend: str) -> None:
    """Parameters and subclasses, expanded and overlapping memory, views with a flag for their sign."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2 * 8 * 2 * 16, generator=generator)
    overlapping = flat.as_strided((2, 8, 2, 16), (16, 32, 8, 1))
    expanded = flat[:128].view(1, 8, 1, 16).expand(2, 8, 2, 16)
    negative = torch.complex(overlapping, expanded).conj().imag
    assert negative.is_neg()
    for query in (overlapping, expanded, negative, torch.nn.Parameter(overlapping), overlapping.as_subclass(Named)):
        found = attention(query, expanded, negative, backend=backend, strict=True)
        wanted = attention(*(tensor.detach().clone() for tensor in (query, expanded, negative.resolve_neg())))
        torch.testing.assert_close(torch.Tensor(found), wanted, rtol=1e-5, atol=1e-5)


# decoding


def decoding() -> dict[str, Any]:
    lengths = torch.tensor([9, 3], dtype=torch.int32)
    return {"query": of(2, 1, 4, 16), "key_cache": of(*K), "value_cache": of(*K), "lengths": lengths}


def paged(*shape: int, page: int = 0) -> dict[str, Any]:
    cache = of(6, 16, 2, 16)
    table = torch.full(shape, page, dtype=torch.int32)
    return {"key_cache": cache, "value_cache": cache, "block_table": table}


CACHES = r"query \(2, 1, 4, 16\), key \(2, 9, 2, 16\), value "
DECODE_CASES: dict[str, Case] = {
    "rank": ({"query": of(2, 4, 16)}, r"expected 4 dimensions .* got query \(2, 4, 16\)"),
    "batch": ({"query": of(3, 1, 4, 16)}, r"one batch size, got query \(3, 1, 4, 16\)"),
    "heads": ({"query": of(2, 1, 3, 16)}, r"of key heads, got 3 and 2 \(query \(2, 1, 3, 16\)"),
    "head_dim": ({"query": of(2, 1, 4, 8)}, r"same head_dim, got query \(2, 1, 4, 8\)"),
    "caches": ({"value_cache": of(2, 7, 2, 16)}, r"same length and heads, got .* value \(2, 7, 2, 16\)"),
    "too many queries": ({"query": of(2, 17, 4, 16)}, r"at most 16 queries a row, got query \(2, 17, 4, 16\)"),
    "dtypes": ({"query": of(2, 1, 4, 16).half()}, rf"one dtype, got query torch.float16, .*\({CACHES}"),
    "float64": (
        {name: tensor.double() for name, tensor in decoding().items() if name != "lengths"},
        rf"got torch.float64 \({CACHES}.*reference",
    ),
    "devices": ({"key_cache": of(*K, device="meta")}, rf"one device, got query cpu, key meta, .*\({CACHES}"),
    "a list": ({"query": [1.0]}, "query: expected a torch.Tensor, got list"),
    "sparse": ({"key_cache": of(*K).to_sparse()}, r"key_cache: .* got torch.sparse_coo \(2, 9, 2, 16\)"),
    "nested": ({"query": nested()}, "query: .* got a nested one of 2 parts"),
    "wrapped": ({"value_cache": TwoTensor(of(*K), of(*K))}, r"value_cache: .* got a TwoTensor \(2, 9, 2, 16\)"),
    "lengths as list": ({"lengths": [9, 3]}, "lengths: expected a torch.Tensor, got list"),
    "lengths shape": (
        {"lengths": torch.zeros(3, dtype=torch.int32)},
        r"lengths: expected shape \(batch,\) = \(2,\), got \(3,\)",
    ),
    "lengths dtype": ({"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths: expected int32 .* torch.int64 \(2,\)"),
    "lengths device": (
        {"lengths": torch.zeros(2, dtype=torch.int32, device="meta")},
        r"lengths: expected int32 on cpu .* got torch.int32 \(2,\) on meta",
    ),
    "too long": ({"lengths": torch.tensor([9, 10], dtype=torch.int32)}, "lengths: expected 0 to 9, .* got 9 to 10"),
    "negative length": ({"lengths": torch.tensor([9, -1], dtype=torch.int32)}, "lengths: .* got -1 to 9"),
    "table as list": ({**paged(2, 1), "block_table": [[0], [1]]}, "block_table: expected a torch.Tensor, got list"),
    "table shape": (paged(3, 1), r"block_table: expected shape \(batch, max_pages\) = \(2, .* got \(3, 1\)"),
    "table rank": (paged(2), r"block_table: expected shape .* got \(2,\)"),
    "empty table": (paged(2, 0), r"block_table: expected shape .* got \(2, 0\)"),
    "table dtype": (
        {**paged(2, 1), "block_table": torch.zeros(2, 1)},
        r"block_table: expected int32 .* got torch.float32 \(2, 1\)",
    ),
    "a page that is not there": (paged(2, 1, page=6), r"block_table: expected pages 0 to 5 .* got 6 at \(0, 0\)"),
    "a negative page": (paged(2, 1, page=-1), r"block_table: expected pages 0 to 5 .* got -1 at \(0, 0\)"),
    "softcap": ({"softcap": -1.0}, "softcap: expected 0"),
    "softcap NaN": ({"softcap": float("nan")}, "softcap: expected 0"),
    "scale": ({"scale": float("inf")}, "scale: expected a finite number"),
    "window of three": ({"window": (1, 2, 3)}, "window: expected"),
    "window below -1": ({"window": (-2, 0)}, "window: expected"),
    "window as list": ({"window": [3, 0]}, "window: expected"),
    "endless window": ({"window": (0, 1 << 40)}, "window: expected"),
    "strict": ({"strict": []}, "strict: expected True or False"),
    "backend": ({"backend": []}, "backend: expected a name"),
}


@pytest.mark.parametrize("case", DECODE_CASES)
def test_decode(case: str, ran: Ran) -> None:
    changes, message = DECODE_CASES[case]
    tilewise.decode(**decoding())
    assert len(ran) == 1
    refused(lambda: tilewise.decode(**{**decoding(), **changes}), message, ran)


@pytest.mark.parametrize("name", ["triton", "triton_decode"])
def test_decode_with_a_head_dim_that_no_kernel_has(name: str, ran: Ran) -> None:
    wide = {**decoding(), "query": of(2, 1, 4, 264), "key_cache": of(2, 9, 2, 264)}
    refused(lambda: tilewise.decode(**wide, backend=name), r"at most 256, got query \(2, 1, 4, 264\)", ran)


# the layer


def layer(**options: Any) -> FastMultiHeadSelfAttention:
    return FastMultiHeadSelfAttention(**{"embed_dim": 32, "num_heads": 4, **options})


LAYER_CASES: dict[str, Case] = {
    "rank": ({"query": of(12, 32)}, r"expected query \(batch, seq, 32\), got \(12, 32\)"),
    "four dimensions": ({"query": of(2, 2, 12, 32)}, r"expected query \(batch, seq, 32\), got \(2, 2, 12, 32\)"),
    "width": ({"query": of(2, 12, 31)}, r"expected query \(batch, seq, 32\), got \(2, 12, 31\)"),
    "no tokens": ({"query": of(2, 0, 32)}, r"no empty dimension, got query \(2, 0, 4, 8\)"),
    "dtype": ({"query": of(2, 12, 32).half()}, r"expected query torch.float32 on cpu .* got torch.float16 \(2, 12, 32"),
    "integers": ({"query": of(2, 12, 32).int()}, r"expected query torch.float32 on cpu .* got torch.int32 \(2, 12, 32"),
    "device": ({"query": of(2, 12, 32, device="meta")}, r"expected query .* on cpu .* \(2, 12, 32\) on meta"),
    "a list": ({"query": [1.0]}, "query: expected a torch.Tensor, got list"),
    "sparse": ({"query": of(2, 12, 32).to_sparse()}, r"query: .* got torch.sparse_coo \(2, 12, 32\)"),
    "nested": ({"query": nested()}, "query: .* got a nested one of 2 parts"),
    "mask shape": ({"query": of(2, 12, 32), "attn_mask": of(11, 12)}, r"mask: .* \(2, 4, 12, 12\), got \(11, 12\)"),
    "mask dtype": ({"query": of(2, 12, 32), "attn_mask": of(12, 12).long()}, r"mask: .* got torch.int64 \(12, 12\)"),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_the_layer(case: str, ran: Ran) -> None:
    changes, message = LAYER_CASES[case]
    refused(lambda: layer()(**changes), message, ran)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_type": "fast"}, "kernel_type: expected one of auto, flash, triton, sdpa, pytorch, got 'fast'"),
        ({"sliding_window": 0}, r"sliding_window: expected a whole number from 1 \(the position itself\) .* got 0"),
        ({"sliding_window": 1.5}, "sliding_window: .* got 1.5"),
        ({"sliding_window": 1 << 31}, "sliding_window: .* to 1073741823, got 2147483648"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of num_heads, got 30 and 4"),
        ({"embed_dim": 32.0}, "embed_dim: expected a whole number of at least 1, got 32.0"),
        ({"num_heads": 0}, "num_heads: expected a whole number of at least 1, got 0"),
        ({"head_dim": 0}, "head_dim: expected a whole number of at least 1, got 0"),
        ({"embed_dim": -32}, "embed_dim: expected a whole number of at least 1, got -32"),
    ],
)
def test_the_layers_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer(**options)


def test_the_layer_in_double_precision_points_to_the_reference(ran: Ran) -> None:
    double = layer(dtype=torch.float64)
    refused(lambda: double(of(2, 12, 32).double()), r"got torch.float64 \(query \(2, 12, 4, 8\).*reference", ran)


def test_the_layer_wider_than_its_kernel(ran: Ran) -> None:
    wide = layer(head_dim=264, kernel_type="triton")
    refused(lambda: wide(of(2, 12, 32)), r"at most 256, got query \(2, 12, 4, 264\)", ran)


def test_the_layer_under_autocast_takes_what_its_weights_are_not(ran: Ran) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer()(of(2, 12, 32).bfloat16())
    assert out.dtype is torch.bfloat16
    assert len(ran) == 1
