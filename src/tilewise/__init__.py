"""tilewise: which attention kernel, with which tile sizes, is fastest here.

    import tilewise
    out = tilewise.attention(query, key, value, causal=True)        # the fastest known way on this device
    out = tilewise.decode(query, keys, values, lengths=lengths)     # a few new tokens against a cache
    tilewise.configure(source="http://tilewise.internal:8000")      # ask a service, not the local snapshot
    tilewise.ready()                                                # seal the answers before the first step
    tilewise.warmup([problem])                                      # compile and try what will run
    tilewise.answer(problem)                                        # what would run, and why
    layer = tilewise.FastMultiHeadSelfAttention(8192, 64, causal=True)

Names load on first use: `import tilewise` imports neither torch nor triton nor httpx.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewise.client.client import Client
    from tilewise.domain.answer import Answer, Match
    from tilewise.domain.config import Candidate, Config, Plan
    from tilewise.domain.device import Device
    from tilewise.domain.errors import TilewiseError
    from tilewise.domain.problem import Problem
    from tilewise.layers.attention import attention
    from tilewise.layers.decode import decode
    from tilewise.layers.kv_cache import KeyValueCache
    from tilewise.layers.latent import FastMultiHeadLatentAttention
    from tilewise.layers.multi_head import (
        FastGroupedQueryAttention,
        FastMultiHeadAttention,
        FastMultiHeadSelfAttention,
        FastMultiQueryAttention,
    )
    from tilewise.layers.session import answer, configure, ready, refresh
    from tilewise.layers.state_dicts import weights_from_deepseek, weights_from_llama, weights_from_torch
    from tilewise.layers.warmup import warmup

__version__ = "0.1.0"

_HOMES = {
    "Answer": "domain.answer",
    "Candidate": "domain.config",
    "Client": "client.client",
    "Config": "domain.config",
    "Device": "domain.device",
    "FastGroupedQueryAttention": "layers.multi_head",
    "FastMultiHeadAttention": "layers.multi_head",
    "FastMultiHeadLatentAttention": "layers.latent",
    "FastMultiHeadSelfAttention": "layers.multi_head",
    "FastMultiQueryAttention": "layers.multi_head",
    "KeyValueCache": "layers.kv_cache",
    "Match": "domain.answer",
    "Plan": "domain.config",
    "Problem": "domain.problem",
    "TilewiseError": "domain.errors",
    "answer": "layers.session",
    "attention": "layers.attention",
    "configure": "layers.session",
    "decode": "layers.decode",
    "ready": "layers.session",
    "refresh": "layers.session",
    "warmup": "layers.warmup",
    "weights_from_deepseek": "layers.state_dicts",
    "weights_from_llama": "layers.state_dicts",
    "weights_from_torch": "layers.state_dicts",
}

__all__ = [
    "Answer",
    "Candidate",
    "Client",
    "Config",
    "Device",
    "FastGroupedQueryAttention",
    "FastMultiHeadAttention",
    "FastMultiHeadLatentAttention",
    "FastMultiHeadSelfAttention",
    "FastMultiQueryAttention",
    "KeyValueCache",
    "Match",
    "Plan",
    "Problem",
    "TilewiseError",
    "answer",
    "attention",
    "configure",
    "decode",
    "ready",
    "refresh",
    "warmup",
    "weights_from_deepseek",
    "weights_from_llama",
    "weights_from_torch",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tilewise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tilewise.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
