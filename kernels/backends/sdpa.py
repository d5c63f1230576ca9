"""torch.nn.functional.scaled_dot_product_attention: its own choice, and each of its implementations by name."""

import abc
import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Pass, Problem

from ..backend import Backend, Gradients, unsupported_feature
from ..cache import flattened, unsupported_cache
from ..call import Call, allowed
from ..packed import on_padded
from . import sdpa_fused


class Sdpa(Backend):
    """SDPA, left to choose by itself.

    What it has no argument for (windows, ALiBi, bottom-right, lengths) becomes a mask.
    """

    name = "sdpa"
    differentiable = True

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return unsupported_feature(problem, "softcap", "page_size", "deterministic") or unsupported_cache(problem)

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        return on_padded(flattened(call), _attend)

    def pinned(self, call: Call) -> Backend:
        if not _is_plain(call):
            return self
        with torch.enable_grad():  # what it takes depends on whether gradients are wanted
            query, key, value = (tensor.detach().requires_grad_() for tensor in _bhsd(call))
            choice = torch._fused_sdp_choice(
                query,
                key,
                value,
                is_causal=_is_causal(call.problem),
                scale=call.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return _BY_CHOICE.get(choice, self)


def _attend(call: Call) -> tuple[torch.Tensor, None]:
    query, key, value = _bhsd(call)
    given = _given(call)
    with _seeded(call):
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=given.mask,
            dropout_p=call.dropout,
            is_causal=given.is_causal,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if given.empty_rows is not None:
        out = out.masked_fill(given.empty_rows, 0)
    return out.transpose(1, 2), None


class _Chosen(Sdpa):
    """SDPA held to one of its implementations."""

    choice: SDPBackend

    def pinned(self, call: Call) -> Backend:  # noqa: ARG002
        return self

    def saves(self, call: Call) -> bool:
        is_causal = _is_causal(call.problem)
        return _is_plain(call) and sdpa_fused.is_fused(self.choice, *_bhsd(call), is_causal=is_causal)

    def saving_forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        out, lse = sdpa_fused.forward(self.choice, *_bhsd(call), is_causal=_is_causal(call.problem), scale=call.scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        call: Call,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        candidate: Candidate,  # noqa: ARG002
    ) -> Gradients:
        found = sdpa_fused.backward(
            self.choice,
            grad_out.transpose(1, 2),
            *_bhsd(call),
            out.transpose(1, 2),
            lse,
            is_causal=_is_causal(call.problem),
            scale=call.scale,
        )
        return Gradients(*(gradient.transpose(1, 2) for gradient in found))

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        with sdpa_kernel(self.choice):
            return super().forward(call, config)


class SdpaMath(_Chosen):
    """matmul, softmax, matmul inside SDPA."""

    name = "sdpa_math"
    choice = SDPBackend.MATH


class _ChosenCuda(_Chosen):
    def supports(self, problem: Problem, device: Device) -> str | None:
        if device.kind is not DeviceKind.CUDA:
            return "needs a CUDA device"
        return super().supports(problem, device) or self._why_not(problem)

    @abc.abstractmethod
    def _why_not(self, problem: Problem) -> str | None:
        """Return what this implementation lacks for a problem that SDPA itself takes."""


class SdpaCudnn(_ChosenCuda):
    """cuDNN's fused attention."""

    name = "sdpa_cudnn"
    choice = SDPBackend.CUDNN_ATTENTION

    def _why_not(self, problem: Problem) -> str | None:
        if problem.dtype is Dtype.FP32:
            return "needs fp16 or bf16"
        if problem.head_dim % 8 or problem.v_head_dim % 8:
            return "needs head_dim in multiples of 8"
        return None


class SdpaFlash(_ChosenCuda):
    """FlashAttention 2 as torch ships it."""

    name = "sdpa_flash"
    choice = SDPBackend.FLASH_ATTENTION

    def _why_not(self, problem: Problem) -> str | None:
        if problem.dtype is Dtype.FP32:
            return "needs fp16 or bf16"
        if _needs_mask(problem):
            return "takes no mask, and a window, ALiBi, lengths or q_len != kv_len needs one"
        if problem.head_dim > 256 or problem.v_head_dim != problem.head_dim:
            return "needs one head_dim of at most 256"
        return None


class SdpaEfficient(_ChosenCuda):
    """The memory-efficient kernel from xFormers as torch ships it."""

    name = "sdpa_efficient"
    choice = SDPBackend.EFFICIENT_ATTENTION

    def _why_not(self, problem: Problem) -> str | None:
        if problem.heads != problem.kv_heads:
            return "needs kv_heads = heads"
        return None


_CHOSEN: tuple[_Chosen, ...] = (SdpaCudnn(), SdpaFlash(), SdpaEfficient(), SdpaMath())
_BY_CHOICE: dict[int, Backend] = {backend.choice.value: backend for backend in _CHOSEN}
SDPA_BACKENDS: tuple[Backend, ...] = (Sdpa(), *_CHOSEN)


def _bhsd(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return call.query.transpose(1, 2), call.key.transpose(1, 2), call.value.transpose(1, 2)


def _is_plain(call: Call) -> bool:
    return call.dropout == 0 and not _needs_mask(call.problem)


def _is_causal(problem: Problem) -> bool:
    return problem.causal and problem.q_len > 1


def _needs_mask(problem: Problem) -> bool:
    """Whether what is attended cannot be said by SDPA's is_causal, which is aligned top-left."""
    causal_needs_mask = problem.causal and problem.q_len not in (1, problem.kv_len)
    return problem.mask != "none" or problem.alibi or problem.window is not None or causal_needs_mask or problem.varlen


@contextlib.contextmanager
def _seeded(call: Call) -> Iterator[None]:
    """Within, the device's generator starts from the call's seed, so that the same seed drops the same weights."""
    if call.dropout == 0:
        yield
        return
    device = call.query.device
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(call.seed)
    try:
        yield
    finally:
        generator.set_state(state)


@dataclass(frozen=True, slots=True)
class _Given:
    """What SDPA is told about who attends whom.

    empty_rows, broadcastable to (B, H, Q, 1), are the queries with nothing to attend: SDPA's CUDA kernels give such
    rows an average of the values, or NaN, so they are set to 0 afterwards. For a training step an additive mask lets
    such a row attend everything, so that its backward meets no NaN either.
    """

    mask: torch.Tensor | None
    is_causal: bool
    empty_rows: torch.Tensor | None


def _given(call: Call) -> _Given:
    problem, mask = call.problem, call.mask
    if not _needs_mask(problem):
        return _Given(None, _is_causal(problem), None)
    reach = empty = None
    if call.window != (-1, -1):
        reach, empty = _reach(problem.q_len, problem.kv_len, call.window, call.query.device)
    if mask is not None and mask.dtype is torch.bool:
        mask = mask if reach is None else mask & reach
        empty = ~mask.any(-1, keepdim=True)
        reach = None
    if call.alibi_slopes is not None:
        bias = _alibi(call)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask
        mask = bias
    if reach is not None:
        mask = reach if mask is None else mask.masked_fill(~reach, -torch.inf)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(call.query.dtype)
        if call.mask is not None and not call.mask_is_bool:
            empty = mask.detach().amax(-1, keepdim=True) == -torch.inf
        if empty is not None and problem.pass_ is Pass.TRAINING:
            mask = mask.masked_fill(empty, 0)
    return _Given(mask, False, empty)


@functools.lru_cache(maxsize=4)
def _reach(
    q_len: int, kv_len: int, window: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the window's mask (Q, K) and its empty rows (Q, 1), None without any.

    Kept, as a training loop would keep it: building it is not attention's cost.
    """
    with torch.inference_mode(mode=False):
        rows, columns = torch.arange(q_len, device=device), torch.arange(kv_len, device=device)
        reach = allowed(rows, columns, kv_len - q_len, window)
        assert reach is not None, "a window of (-1, -1) needs no mask"
        # of a window only the right side can leave a query nothing: the first, where there are fewer keys
        some_empty = window[1] != -1 and kv_len - q_len + window[1] < 0
        return reach, ~reach.any(-1, keepdim=True) if some_empty else None


def _alibi(call: Call) -> torch.Tensor:
    slopes = call.alibi_slopes
    assert slopes is not None
    q_len, kv_len = call.problem.q_len, call.problem.kv_len
    rows = torch.arange(q_len, device=slopes.device) + kv_len - q_len
    distance = (rows[:, None] - torch.arange(kv_len, device=slopes.device)).abs()
    return -(slopes if slopes.dim() == 2 else slopes[None])[..., None, None] * distance
