"""The five layers against float64 written out, with every backend that runs here: outputs and every gradient."""

from typing import Any

import pytest
import torch

from tilewise import KeyValueCache
from tilewise.domain.config import Candidate
from tilewise.kernels.backends import BACKENDS, flex
from tilewise.layers.base import FastAttention

from .forms import EMBED, FORMS, HEADED, HEADS, PLAIN, Attends, alibi, doubled, expected, layer_of, reach, rows

# Without a GPU Triton's kernels run in its interpreter, on tensors of the CPU; test_layers_gpu.py is for a GPU.
KERNELS = ("sdpa", "sdpa_math", "plain", "cpu_tiled", *(() if torch.cuda.is_available() else ("triton",)))
TAKES_MASKS = tuple(name for name in KERNELS if name != "cpu_tiled")


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in KERNELS:
        triton = BACKENDS["triton"]
        monkeypatch.setattr(triton, "supports", lambda *_: None)
        monkeypatch.setattr(triton, "spaces", lambda *_: {})


def on(form: str, kernel: str, **options: Any) -> FastAttention:
    return layer_of(form, kernel_type=Candidate(kernel), strict=True, **options)


def tensor(found: object) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found


def assert_right(
    layer: FastAttention, inputs: tuple[torch.Tensor, ...], how: Attends = PLAIN, **options: Any
) -> torch.Tensor:
    """The result and the gradients of inputs and weights are those of the layer written out."""
    layer.zero_grad()
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    out = tensor(layer(*leaves, **options))
    weights = doubled(layer)
    query, key, value = (exact * 3)[:3] if len(exact) == 1 else (*exact, exact[-1])[:3]
    wanted = expected(layer, weights, query, key, value, how)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(grad)
    wanted.backward(grad.double())
    for found, right in zip(leaves, exact, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-4, msg=name)
        assert name.startswith("k") or name == "qkv_proj.bias" or bool((parameter.grad != 0).any()), name
    return out.detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_self_attention_and_every_gradient(form: str, kernel: str) -> None:
    assert_right(on(form, kernel), (rows(11),), Attends(rope=form == "decoupled"))
    assert_right(on(form, kernel, bias=False, causal=True), (rows(11),),
                 Attends(mask=reach(11, 11, right=0), rope=form == "decoupled"))  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_cross_attention_of_two_tensors(form: str, kernel: str) -> None:
    """The page's "size of tensor a must match the size of tensor b" came from a key taken for a mask."""
    assert_right(on(form, kernel), (rows(5), rows(13, seed=1)), Attends(rope=form == "decoupled"))


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3}, {"position_method": "rope"}, {"position_method": "alibi"}]
)
@pytest.mark.parametrize("form", HEADED)
def test_the_last_query_stands_where_the_last_key_does(form: str, options: dict[str, Any]) -> None:
    layer, x = layer_of(form, causal=True, **options), rows(11)
    torch.testing.assert_close(tensor(layer(x[:, -4:], x)), tensor(layer(x))[:, -4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_tensor_three_times(form: str) -> None:
    layer, x = layer_of(form, causal=True, position_method="rope"), rows(9)
    assert torch.equal(tensor(layer(x, x, x)), tensor(layer(x)))
    assert torch.equal(tensor(layer(x, x)), tensor(layer(x)))


@pytest.mark.parametrize("form", [form for form in FORMS if "latent" not in form and form != "decoupled"])
def test_cross_attention_of_three_tensors(form: str) -> None:
    assert_right(layer_of(form), (rows(5), rows(13, seed=1), rows(13, seed=2)))


@pytest.mark.parametrize("form", ["multi-head", "grouped", "multi-query"])
def test_keys_and_values_of_other_widths(form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 13, 20, generator=generator), torch.randn(2, 13, 28, generator=generator)
    assert_right(layer_of(form, kdim=20, vdim=28), (rows(5), key, value))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_sliding_window(form: str, kernel: str, causal: bool) -> None:
    layer = on(form, kernel, causal=causal, sliding_window=4)
    how = Attends(mask=reach(11, 11, left=3, right=0 if causal else 3), rope=form == "decoupled")
    assert_right(layer, (rows(11),), how)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", TAKES_MASKS)
def test_a_mask_whose_first_tiles_are_wholly_hidden(form: str, kernel: str) -> None:
    mask = torch.rand(2, 1, 3, 150, generator=torch.Generator().manual_seed(4)) < 0.8
    mask[..., :140] = False
    mask[1, :, 2] = False  # and a query that sees nothing
    layer = on(form, kernel)
    out = assert_right(layer, (rows(3), rows(150, seed=1)), Attends(mask=mask, rope=form == "decoupled"),
                       attn_mask=mask)  # fmt: skip
    torch.testing.assert_close(out[1, 2], layer.o_proj.bias.detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 9), (2, 9), (2, 5, 9), (2, HEADS, 5, 9), (1, 9), (2, 1, 9), (1, 1, 5, 9)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_every_form_of_mask(form: str, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(shape, generator=generator) < 0.7 if kind == "bool" else torch.randn(shape, generator=generator)
    full = {2: mask[None, None] if shape[0] != 2 else mask[:, None, None], 3: mask.view(shape[0], 1, -1, 9), 4: mask}
    layer = layer_of(form)
    how = Attends(mask=full[len(shape)], rope=form == "decoupled")
    assert_right(layer, (rows(5), rows(9, seed=1)), how, attn_mask=mask)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_that_learns_gets_a_gradient(form: str) -> None:
    bias = torch.zeros(1, HEADS, 7, 7, requires_grad=True)
    tensor(layer_of(form)(rows(7), attn_mask=bias)).square().sum().backward()
    assert bias.grad is not None
    assert bool((bias.grad != 0).any())


@pytest.mark.parametrize("form", HEADED)
@pytest.mark.parametrize("kernel", TAKES_MASKS)
def test_alibi_counts_once(form: str, kernel: str) -> None:
    layer = on(form, kernel, position_method="alibi", causal=True)
    bias = alibi(11, 11).masked_fill(~reach(11, 11, right=0), -torch.inf)
    assert_right(layer, (rows(11),), Attends(mask=bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [(5, 13), (13, 5), (9, 9)])
def test_rope_of_as_many_keys_as_there_are(form: str, kernel: str, lengths: tuple[int, int]) -> None:
    layer = on(form, kernel, position_method="rope", rope_base=500.0)
    assert_right(layer, (rows(lengths[0]), rows(lengths[1], seed=1)), Attends(rope=True, base=500.0))


@pytest.mark.parametrize("form", FORMS)
def test_position_ids(form: str) -> None:
    layer = layer_of(form, position_method="rope")
    ids = torch.tensor([[0, 1, 2, 7, 8], [3, 4, 5, 6, 9]])
    assert_right(layer, (rows(5),), Attends(rope=True, of_query=ids, of_key=ids), position_ids=ids)
    of_key = torch.arange(7) * 3
    how = Attends(rope=True, of_query=ids, of_key=of_key)
    assert_right(layer, (rows(5), rows(7, seed=1)), how, position_ids=(ids, of_key))
    how = Attends(rope=True, of_query=ids)
    assert_right(layer, (rows(5), rows(7, seed=1)), how, position_ids=ids)


@pytest.mark.parametrize("form", HEADED)
@pytest.mark.parametrize("method", ["none", "rope"])
def test_queries_and_keys_are_normalised_before_they_are_placed(form: str, method: str) -> None:
    layer = layer_of(form, qk_norm=True, position_method=method)
    assert_right(layer, (rows(7),), Attends(rope=method == "rope"))


# what differs between layers does not differ between kernels here
@pytest.mark.parametrize(
    ("form", "kernel"), [*((form, "sdpa") for form in FORMS), ("grouped", "plain"), ("self", "triton")]
)
@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (7, 7)),
        ({"causal": True}, (7, 7)),
        ({"causal": True}, (9, 4)),
        ({"causal": True, "sliding_window": 3}, (7, 7)),
        ({"position_method": "alibi", "causal": True}, (7, 7)),
    ],
)
def test_a_zero_key_is_seen_by_all(form: str, kernel: str, options: dict[str, Any], lengths: tuple[int, int]) -> None:
    if form == "decoupled" and "position_method" in options:
        options = {**options, "position_method": "rope"}
    layer = on(form, kernel, add_zero_attn=True, **options)
    left, right = options.get("sliding_window", 0) - 1, 0 if "causal" in options else -1
    mask = torch.zeros(1, 1, *lengths).masked_fill(~reach(*lengths, left=left, right=right), -torch.inf)
    if options.get("position_method") == "alibi":
        mask = mask + alibi(*lengths)
    how = Attends(mask=mask, zero=True, rope=form == "decoupled")
    inputs = (rows(lengths[0]),) if lengths[0] == lengths[1] else (rows(lengths[0]), rows(lengths[1], seed=1))
    assert_right(layer, inputs, how)
    given = torch.rand(*lengths, generator=torch.Generator().manual_seed(6)) < 0.6
    how = Attends(mask=mask.masked_fill(~given, -torch.inf), zero=True, rope=form == "decoupled")
    assert_right(layer, inputs, how, attn_mask=given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", TAKES_MASKS)
def test_dropout_keeps_the_expectation(form: str, kernel: str) -> None:
    """Every one of 200 equal queries is a draw; without biases the layer is linear in the weights that are dropped."""
    options = {"position_method": "none"} if form == "decoupled" else {}
    layer = on(form, kernel, dropout=0.25, bias=False, **options)
    query, key = rows(1, batch=1).expand(-1, 200, -1), rows(9, batch=1, seed=1)
    torch.manual_seed(7)
    dropped, plain = tensor(layer(query, key)).detach()[0], tensor(layer.eval()(query, key)).detach()[0]
    assert len(dropped.unique(dim=0)) > 150
    error = dropped.std(0) / 200**0.5
    assert bool((error > 0).all())
    assert bool(((dropped.mean(0) - plain[0]).abs() < 5 * error).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_heads_of_56(form: str, kernel: str) -> None:
    """The page's DeepSeek row: 7168 / 128. No power of two, and no multiple of 16."""
    options = {"nope_head_dim": 40, "rope_head_dim": 16, "v_head_dim": 56} if form == "decoupled" else {"head_dim": 56}
    assert_right(on(form, kernel, causal=True, position_method="rope", **options), (rows(9),),
                 Attends(mask=reach(9, 9, right=0), rope=True))  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_flex_attention_infers(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it has no gradients. The graphs run as they are: inductor's part is tested with the kernels."""
    monkeypatch.setattr(flex, "compiler", lambda: lambda graph, _: graph)
    monkeypatch.setattr(BACKENDS["flex_cpu"], "supports", lambda *_: None)
    flex.program.cache_clear()
    layer, x = on(form, "flex_cpu", causal=True, sliding_window=4, position_method="rope").eval(), rows(11)
    mask = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(8)) < 0.8
    with torch.no_grad():
        for given in (None, mask):
            seen = reach(11, 11, left=3, right=0) & (torch.tensor(True) if given is None else given)
            wanted = expected(layer, doubled(layer), x, x, x, Attends(mask=seen, rope=True))
            torch.testing.assert_close(tensor(layer(x, attn_mask=given)).double(), wanted, rtol=1e-4, atol=1e-5)
    flex.program.cache_clear()


# caches


METHODS = [(form, method) for form in FORMS for method in ("none", "rope", "alibi", "dynamic", "module")]
METHODS = [each for each in METHODS if each[0] != "decoupled" or each[1] not in ("alibi", "module")]


class Shifting(torch.nn.Module):
    """Positions added to queries and keys, and a bias of the distance."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, of_query: torch.Tensor, of_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bias = (of_query[:, None, :, None] - of_key[:, None, None, :]).float() * 0.1
        return query + of_query[..., None, None].sin(), key + of_key[..., None, None].cos(), bias


def placed_by(method: str) -> dict[str, Any]:
    if method == "dynamic":
        scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
        return {"position_method": "rope", "rope_scaling": scaling}
    return {"position_method": Shifting() if method == "module" else method}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("form", "method"), METHODS)
def test_decoding_with_a_cache_is_the_full_forward(form: str, method: str, window: int | None) -> None:
    layer = layer_of(form, causal=True, sliding_window=window, **placed_by(method)).eval()
    x = rows(12)
    with torch.no_grad():
        out, cache = layer(x[:, :5], use_cache=True)
        parts = [out]
        for first, last in ((5, 6), (6, 9), (9, 10), (10, 12)):
            out, cache = layer(x[:, first:last], past_key_value=cache, use_cache=True)
            parts.append(out)
            # dynamic scaling changes with the length, so earlier results are not those of the whole
            whole = tensor(layer(x[:, :last]))
            torch.testing.assert_close(out, whole[:, first:], rtol=1e-4, atol=1e-5)
        assert isinstance(cache, KeyValueCache)
        assert cache.length == 12
        if method != "dynamic":
            torch.testing.assert_close(torch.cat(parts, 1), tensor(layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_decodes(form: str, kernel: str) -> None:
    # of several queries at once absorbed projections need a mask
    options = {"absorb": None if kernel in TAKES_MASKS else False} if form in ("latent", "decoupled") else {}
    layer = on(form, kernel, causal=True, position_method="rope", **options).eval()
    x = rows(9)
    with torch.no_grad():
        _, cache = layer(x[:, :5], use_cache=True)
        chunk, cache = layer(x[:, 5:8], past_key_value=cache, use_cache=True)
        last = tensor(layer(x[:, 8:], past_key_value=cache))
        whole = tensor(layer(x))
    torch.testing.assert_close(torch.cat((chunk, last), 1), whole[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_does_not_hold_the_zero_key(form: str) -> None:
    layer = layer_of(form, causal=True, add_zero_attn=True).eval()
    x = rows(9)
    with torch.no_grad():
        _, cache = layer(x[:, :5], use_cache=True)
        chunk, cache = layer(x[:, 5:8], past_key_value=cache, use_cache=True)
        last = tensor(layer(x[:, 8:], past_key_value=cache))
        torch.testing.assert_close(torch.cat((chunk, last), 1), tensor(layer(x))[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_another_tensor_are_appended_too(form: str) -> None:
    layer = layer_of(form, position_method="rope").eval()
    query, key = rows(4), rows(9, seed=1)
    with torch.no_grad():
        _, cache = layer(query, key[:, :6], use_cache=True)
        found = tensor(layer(query, key[:, 6:], past_key_value=cache))
        torch.testing.assert_close(found, tensor(layer(query, key)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_positions_of_a_padded_batch_stay_with_its_cache(form: str) -> None:
    """Two sequences, one padded on the left: decoded together they give what each gives alone."""
    layer = layer_of(form, causal=True, position_method="rope").eval()
    long, short = rows(8, batch=1), rows(5, batch=1, seed=1)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 3, EMBED), short), 1)))
    real = torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
    ids = (real.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        _, cache = layer(batch[:, :6], attn_mask=real[:, :6], position_ids=ids[:, :6], use_cache=True)
        out = tensor(layer(batch[:, 6:], attn_mask=real[:, None], position_ids=ids[:, 6:], past_key_value=cache))
        torch.testing.assert_close(out[:1], tensor(layer(long))[:, 6:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[1:], tensor(layer(short))[:, 3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_a_cache(form: str) -> None:
    layer = layer_of(form, causal=True)
    x = rows(8).requires_grad_()
    _, cache = layer(x[:, :5], use_cache=True)
    out = tensor(layer(x[:, 5:], past_key_value=cache))
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(tensor(layer(x))[:, 5:].square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# dtypes, layouts, what comes besides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_positions_keep_their_precision_in_half(form: str, dtype: torch.dtype) -> None:
    """At position 2000 a half has no fraction left: an angle in it would be wrong by as much as 0.5."""
    layer = layer_of(form, position_method="rope", causal=True, max_seq_len=4096).to(dtype)
    ids = torch.arange(2000, 2009)
    x = rows(9).to(dtype)
    wanted = expected(layer, doubled(layer), x, x, x,
                      Attends(mask=reach(9, 9, right=0), rope=True, of_query=ids, of_key=ids))  # fmt: skip
    out = tensor(layer(x, position_ids=ids))
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    options = {} if form == "decoupled" else {"qk_norm": True}
    layer = layer_of(form, position_method="rope", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, cache = layer(rows(7), use_cache=True)
    assert out.dtype is torch.bfloat16
    assert {each.dtype for each in cache.tensors} - {torch.int64} == {torch.bfloat16}
    torch.testing.assert_close(out.float(), tensor(layer(rows(7))), rtol=0, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_sequence_first(form: str) -> None:
    layer, other = layer_of(form), layer_of(form, batch_first=False)
    query, key = rows(5), rows(9, seed=1)
    out, cache = other(query.transpose(0, 1), key.transpose(0, 1), use_cache=True)
    torch.testing.assert_close(out.transpose(0, 1), tensor(layer(query, key)))
    assert cache.tensors[0].shape[:2] == (2, 9)
    torch.testing.assert_close(tensor(other(query.transpose(0, 1))).transpose(0, 1), tensor(layer(query)))


@pytest.mark.parametrize("form", FORMS)
def test_the_lse_and_the_order_of_what_is_returned(form: str) -> None:
    layer = layer_of(form, causal=True)
    out, lse, cache = layer(rows(5), return_lse=True, use_cache=True)
    assert (lse.shape, lse.dtype, lse.requires_grad) == ((2, HEADS, 5), torch.float32, False)
    assert isinstance(cache, KeyValueCache)
    torch.testing.assert_close(out, tensor(layer(rows(5))), rtol=1e-4, atol=1e-5)
    # the LSE after another key of score 0 says what the first was
    zeroed = layer_of(form, causal=True, add_zero_attn=True)
    _, more = zeroed(rows(5), return_lse=True)
    torch.testing.assert_close(more.exp(), lse.exp() + 1, rtol=1e-4, atol=1e-4)
