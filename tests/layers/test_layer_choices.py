"""Which kernel a layer runs, and what it says when that is not the one that was asked for."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise import KeyValueCache
from tilewise.client.client import Client
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import ConfigError, InputError, UnsupportedError
from tilewise.domain.problem import Dtype, Problem
from tilewise.kernels import device as devices

from ..domain.examples import answer as an_answer
from .conftest import Ran
from .forms import DECOUPLED, EMBED, FORMS, HEADED, HEADS, layer_of, rows

CPU = torch.device("cpu")
SDPA, PLAIN = Candidate("sdpa"), Candidate("plain")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that the client was asked about."""
    problems: list[Problem] = []
    inner = Client.answer

    def answer(client: Client, problem: Problem) -> Answer:
        problems.append(problem)
        return inner(client, problem)

    monkeypatch.setattr(Client, "answer", answer)
    return problems


@pytest.mark.parametrize("form", FORMS)
def test_the_client_is_asked_once_per_problem(form: str, asked: list[Problem]) -> None:
    layer = layer_of(form, causal=True)
    for _ in range(3):
        layer(rows(9))
        layer(rows(9, batch=3))
    with torch.no_grad():
        for _ in range(2):
            layer(rows(9))
    assert len(asked) == len(set(asked)) == 3
    copy.deepcopy(layer)(rows(9))  # another layer of the same shapes asks nothing new
    assert len(asked) == 3


@pytest.mark.parametrize("form", HEADED)
def test_the_answer_runs(form: str, ran: Ran, configured: Callable[..., Path]) -> None:
    layer = layer_of(form, causal=True)
    tiled = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=16, block_k=64, heads_per_chunk=1))
    kv_heads = HEADS if form == "latent" else layer.num_kv_heads
    problem = Problem(batch=2, heads=HEADS, kv_heads=kv_heads, q_len=9, head_dim=12, dtype=Dtype.FP32, causal=True)
    found = an_answer(problem, device_key=devices.describe(CPU).key, software=devices.software(DeviceKind.CPU))
    configured(replace(found, plan=Plan(tiled)))
    with torch.no_grad():
        layer(rows(9))
        layer.kernel_type = "sdpa"
        layer(rows(9))
    assert ran == [tiled, SDPA]


@pytest.mark.parametrize("form", FORMS)
def test_one_query_with_a_cache_is_looked_up_as_decoding_is(form: str, asked: list[Problem]) -> None:
    options = {"absorb": False} if form in ("latent", "decoupled") else {}
    layer = layer_of(form, causal=True, **options).eval()
    with torch.no_grad():
        _, cache = layer(rows(20), use_cache=True)
        layer(rows(1), past_key_value=cache)
    assert [(problem.q_len, problem.kv_len, problem.causal) for problem in asked] == [(20, 20, True), (1, 21, False)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kernel_type", "ran_instead", "reason"),
    [("flash", SDPA, "sdpa_flash cannot run .*: needs a CUDA device"), ("triton", SDPA, "triton cannot run .*: needs"),
     ("sdpa", SDPA, None), ("pytorch", PLAIN, None), (PLAIN, PLAIN, None),
     (Candidate("sdpa_cudnn"), SDPA, "sdpa_cudnn cannot run")],
)  # fmt: skip
def test_kernel_types(
    form: str, kernel_type: str | Candidate, ran_instead: Candidate, reason: str | None, ran: Ran,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    layer = layer_of(form, kernel_type=kernel_type)
    for _ in range(2):
        layer(rows(9))
    assert ran == [ran_instead] * 2
    assert [record.levelno for record in caplog.records] == ([] if reason is None else [logging.WARNING])
    if reason is not None:
        assert caplog.records[0].getMessage().endswith("torch's own choice runs instead")
        strict = layer_of(form, kernel_type=kernel_type, strict=True)
        with pytest.raises(UnsupportedError, match=reason):
            strict(rows(9))


def test_a_growing_cache_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of("grouped", causal=True, kernel_type="triton").eval()
    with torch.no_grad():
        _, cache = layer(rows(5), use_cache=True)
        for _ in range(3):
            _, cache = layer(rows(1), past_key_value=cache, use_cache=True)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel_type", ["Flash", "cuda", "", None, 3, ["flash"]])
def test_an_unknown_kernel_type(form: str, kernel_type: object) -> None:
    with pytest.raises(InputError, match="kernel_type: expected one of auto, flash, triton, sdpa, pytorch, got"):
        layer_of(form, kernel_type=kernel_type)
    layer = layer_of(form)
    layer.kernel_type = kernel_type  # type: ignore[assignment]
    with pytest.raises(InputError, match="kernel_type: expected one of"):
        layer(rows(9))


def test_a_candidate_of_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'nope'"):
        layer_of("self", kernel_type=Candidate("nope"))(rows(9))


def test_a_candidate_in_a_compiled_graph(fresh_dynamo: None) -> None:  # noqa: ARG001
    layer = layer_of("self", kernel_type=PLAIN)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="expected a name while a graph is compiled"):
        torch.compile(layer, backend="eager", fullgraph=True)(rows(9))


@pytest.mark.parametrize("form", ["grouped", "latent", "decoupled"])  # those that share no code
def test_layers_compile_into_one_graph(form: str, fresh_dynamo: None) -> None:  # noqa: ARG001
    """Positions, masks and caches included; the next lengths use the same graph."""
    layer = layer_of(form, causal=True, position_method="rope", sliding_window=5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    real = torch.tensor([[True] * 9, [False] * 2 + [True] * 7])
    for length in (9, 7):
        x, mask = rows(length), real[:, :length]
        torch.testing.assert_close(compiled(x, attn_mask=mask), layer(x, attn_mask=mask), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        _, cache = layer(rows(6), use_cache=True)
        out, longer = compiled(rows(3, seed=1), past_key_value=cache, use_cache=True)
        wanted, _ = layer(rows(3, seed=1), past_key_value=cache, use_cache=True)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert longer.length == 9


@pytest.mark.parametrize("form", ["grouped", "decoupled"])
def test_masks_and_positions_after_lengths_have_become_symbols(form: str, fresh_dynamo: None) -> None:  # noqa: ARG001
    layer = layer_of(form, causal=True, position_method="rope")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for length in (9, 8):
            compiled(rows(length))
        given: dict[str, Any]
        for given in (
            {"attn_mask": torch.rand(2, 7) < 0.7},
            {"attn_mask": torch.randn(2, 1, 7, 7)},
            {"position_ids": torch.arange(7)},
            {"position_ids": torch.arange(7).repeat(2, 1)},
        ):
            torch.testing.assert_close(compiled(rows(7), **given), layer(rows(7), **given), rtol=1e-5, atol=1e-5)


# transforms


def test_a_kernel_that_a_transform_cannot_see_through_is_not_demoted(
    ran: Ran, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = layer_of("grouped", causal=True, kernel_type=Candidate("cpu_tiled")), rows(6)
    weights = dict(layer.named_parameters())
    for _ in range(2):
        found = torch.func.grad(lambda given: torch.func.functional_call(layer, given, (x,)).square().sum())(weights)
        ran.clear()
        layer(x).square().sum().backward()
        assert [each.backend for each in ran] == ["cpu_tiled", "sdpa"]  # which computes the gradients
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-4)
            weight.grad = None
    (said,) = caplog.records
    assert "cpu_tiled failed inside a transform of torch.func" in said.getMessage()


def test_dropout_has_one_seed_for_all_of_a_vmap() -> None:
    layer, x = layer_of("self", dropout=0.5), rows(6)

    def each(row: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer(row[None])[0]
        return out

    with pytest.raises(InputError, match=r"dropout: expected one seed for a call, .* use randomness='same'"):
        torch.vmap(each, randomness="different")(x)
    assert torch.vmap(each, randomness="same")(x).shape == x.shape


# absorption


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("form", "options"), [("latent", {}), ("latent", {"position_method": "alibi"}),
                                               ("decoupled", {})])  # fmt: skip
def test_absorbed_projections_give_the_same(form: str, options: dict[str, object], bias: bool, ran: Ran) -> None:
    given = {"causal": True, "bias": bias, **options}
    absorbing, expanding = (layer_of(form, absorb=absorb, **given).eval() for absorb in (True, False))
    x, widths = rows(12), []
    with torch.no_grad():
        for layer in (absorbing, expanding):
            first, cache = layer(x[:, :8], use_cache=True)
            widths.append((first, layer(x[:, 8:10], past_key_value=cache), layer(x[:, 8:9], past_key_value=cache)))
    for found, wanted in zip(*widths, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(ran) == 6


@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"add_zero_attn": True}, {"causal": False}])
def test_absorbed_projections_with_masks_and_the_lse(options: dict[str, object], kind: str) -> None:
    given = {"causal": True, **options}
    generator = torch.Generator().manual_seed(1)
    shape = (2, HEADS, 3, 11)
    mask = torch.rand(shape, generator=generator) < 0.7 if kind == "bool" else torch.randn(shape, generator=generator)
    found = []
    for absorb in (True, False):
        layer = layer_of("decoupled", absorb=absorb, **given).eval()
        with torch.no_grad():
            _, cache = layer(rows(8), use_cache=True)
            found.append(layer(rows(3, seed=1), attn_mask=mask, past_key_value=cache, return_lse=True))
    for absorbed, expanded in zip(*found, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-4, atol=1e-5)


def test_projections_are_absorbed_where_that_is_cheaper(asked: list[Problem]) -> None:
    """The latents are then attended by one head as wide as a latent, whose queries are the heads."""
    layer = layer_of("decoupled", causal=True, kv_rank=48).eval()
    with torch.no_grad():
        _, cache = layer(rows(200), use_cache=True)
        layer(rows(1), past_key_value=cache)
        layer(rows(190), past_key_value=cache)
    width = 48 + DECOUPLED["rope_head_dim"]
    found = [(each.heads, each.kv_heads, each.q_len, each.head_dim, each.v_head_dim) for each in asked]
    assert found == [(HEADS, HEADS, 200, 24, 24), (1, 1, HEADS, width, 48), (HEADS, HEADS, 190, 24, 24)]


# caches


def test_two_continuations_of_one_cache_do_not_meet() -> None:
    start = KeyValueCache((torch.zeros(1, 3, 2),))
    with torch.no_grad():
        one = start.append(torch.ones(1, 1, 2))
        left, right = one.append(torch.full((1, 2, 2), 2.0)), one.append(torch.full((1, 1, 2), 3.0))
    assert left.tensors[0][0, :, 0].tolist() == [0, 0, 0, 1, 2, 2]
    assert right.tensors[0][0, :, 0].tolist() == [0, 0, 0, 1, 3]
    assert (start.length, one.length, left.length, right.length) == (3, 4, 6, 5)


def test_a_step_of_decoding_does_not_copy_the_cache() -> None:
    with torch.no_grad():
        cache = KeyValueCache((torch.zeros(1, 3, 2),)).append(torch.ones(1, 1, 2))
        places = {cache.tensors[0].data_ptr()}
        for _ in range(100):
            cache = cache.append(torch.ones(1, 1, 2))
            places.add(cache.tensors[0].data_ptr())
    assert len(places) == 1
    assert float(cache.tensors[0].sum()) == 202


def test_a_cache_of_inference_mode_can_be_continued_outside() -> None:
    with torch.inference_mode():
        cache = KeyValueCache((torch.zeros(1, 3, 2),)).append(torch.ones(1, 1, 2))
    with torch.no_grad():
        assert cache.append(torch.ones(1, 1, 2)).tensors[0].sum() == 4
    assert cache.append(torch.ones(1, 1, 2)).tensors[0].sum() == 4


@pytest.mark.parametrize(
    "new", [(torch.ones(2, 1, 2),), (torch.ones(1, 1, 3),), (torch.ones(1, 1, 2).half(),), (torch.ones(1, 1, 2),) * 2]
)
def test_what_does_not_fit_a_cache(new: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(InputError, match="past_key_value: expected a cache like"):
        KeyValueCache((torch.zeros(1, 3, 2),)).append(*new)


# positions


def test_alibis_slopes_of_any_number_of_heads() -> None:
    """The first and the last are those of the powers of two around it, as in the paper's code."""
    from tilewise.layers.positions import alibi_slopes

    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(1) == [2**-8]


def test_rotary_tables_are_kept_once_and_never_cast() -> None:
    from tilewise.layers.positions import Rope, Span

    one, other = layer_of("self", position_method="rope").half(), layer_of("multi-head", position_method="rope")
    tables = []
    for layer in (one, other):
        assert isinstance(layer.positions, Rope)
        tables.append(layer.positions.table(Span(3, 4), CPU)[0])
    assert tables[0].data_ptr() == tables[1].data_ptr()
    assert tables[0].dtype is torch.float32
    assert not [name for name, _ in one.named_buffers()]
    assert isinstance(other.positions, Rope)
    beyond, _ = other.positions.table(Span(2046, 4), CPU)
    torch.testing.assert_close(beyond[:, :2], other.positions.table(Span(2046, 2), CPU)[0], rtol=0, atol=0)


class Wrong(torch.nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_: torch.Tensor) -> object:
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [(torch.ones(1), r"expected Wrong to return \(query, key\)"), ((None, None), "expected Wrong to return"),
     ((torch.ones(1), torch.ones(2)), r"keep the shapes \(2, 5, 4, 12\) and \(2, 5, 4, 12\), got \(1,\) and \(2,\)")],
)  # fmt: skip
def test_a_module_that_returns_something_else(result: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_of("self", position_method=Wrong(result))(rows(5))


def test_a_module_that_learns() -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(HEADS, 9, 9))

        def forward(self, query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return query, key, self.bias

    layer = layer_of("self", position_method=Learned())
    out = layer(rows(9))
    assert isinstance(out, torch.Tensor)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    gradient = gradients["position_method.bias"]
    assert gradient is not None
    assert bool((gradient != 0).any())
    assert layer.o_proj.weight.shape == (EMBED, EMBED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel_type", ["auto", "pytorch"])
def test_a_layer_on_the_meta_device_gives_shapes(form: str, kernel_type: str) -> None:
    layer = layer_of(form, causal=True, dropout=0.1, kernel_type=kernel_type, device="meta")
    x = rows(5).to("meta").requires_grad_()
    out, lse, cache = layer(x, attn_mask=torch.zeros(5, 5, device="meta"), return_lse=True, use_cache=True)
    assert (out.shape, lse.shape, cache.length) == (x.shape, (2, HEADS, 5), 5)
    out.sum().backward()
    assert all(weight.grad is not None and weight.grad.is_meta for weight in layer.parameters())
    with torch.no_grad():
        assert layer(x[:, :1], past_key_value=cache).is_meta
    with pytest.raises(InputError, match=r"expected query torch.float32 on meta .* got torch.float16 \(2, 5, 48\)"):
        layer(x.half())
