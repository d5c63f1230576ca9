"""The rows of the benchmark page: which layer of which model, and how it is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tilewise.domain.errors import SettingsError
from tilewise.domain.models import MODELS, ModelShape
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels.call import TORCH_DTYPES
from tilewise.layers.base import FastAttention
from tilewise.layers.latent import FastMultiHeadLatentAttention
from tilewise.layers.multi_head import (
    FastGroupedQueryAttention,
    FastMultiHeadAttention,
    FastMultiHeadSelfAttention,
    FastMultiQueryAttention,
)
from tilewise.layers.options import Options

# what --layers takes -> the name on the page
LAYERS = {
    "mha": "MultiHeadAttention",
    "self": "SelfAttention",
    "gqa": "GroupedQueryAttention",
    "mqa": "MultiQueryAttention",
    "latent": "LatentAttention",
    "mla": "DeepSeek's LatentAttention",
}
# those of the page, as their users write them; the class of DeepSeek's is that of the simple form
CLASSES = {
    "mha": "FastMultiHeadAttention",
    "self": "FastMultiHeadSelfAttention",
    "gqa": "FastGroupedQueryAttention",
    "mqa": "FastMultiQueryAttention",
    "latent": "FastMultiHeadLatentAttention",
}
GROUPED_HEADS = 8  # of the grouped row where the model's own layers share nothing
LATENT_SHARE = 8  # the simple form's latent is hidden / 8
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 1536, 512, 128, 64, 128  # DeepSeek V3's own
SWEEPS = {"seq_len": (512, 1024, 2048, 4096, 8192, 16384), "hidden": (4096, 7168, 8192, 16384)}
SWEPT_MODEL, SWEPT_LAYER = "deepseek_v3", "mha"  # those of the page: its sweeps pass through that row


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One row: self-attention of `layer` over the whole sequence. `sweep` is empty for a row of the page's table."""

    model: str
    layer: str
    pass_: Pass
    dtype: Dtype
    causal: bool
    batch: int
    seq_len: int
    hidden: int
    heads: int
    kv_heads: int
    sweep: str = ""

    @property
    def name(self) -> str:
        parts = [self.model, LAYERS[self.layer], str(self.pass_), str(self.dtype)]
        parts += ["causal"] if self.causal else ["full"]
        return " ".join([*parts, f"{self.sweep} {getattr(self, self.sweep)}" if self.sweep else ""]).rstrip()

    @property
    def head_dims(self) -> tuple[int, int]:
        """head_dim of queries and keys, and of values."""
        return (NOPE + ROPE, VALUE) if self.layer == "mla" else (self.hidden // self.heads,) * 2

    @property
    def problem(self) -> Problem:
        """The layer's core, as the layer looks it up."""
        head_dim, v_head_dim = self.head_dims
        return Problem(
            pass_=self.pass_, dtype=self.dtype, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads,
            q_len=self.seq_len, head_dim=head_dim, v_head_dim=v_head_dim, causal=self.causal,
        )  # fmt: skip

    def build(self, device: torch.device) -> FastAttention:
        """Return the layer, its weights drawn from seed 0."""
        torch.manual_seed(0)
        options: Options = {
            "bias": False, "causal": self.causal, "device": device, "dtype": TORCH_DTYPES[self.dtype], "strict": True,
            "max_seq_len": self.seq_len,
        }  # fmt: skip
        if self.layer == "mha":
            return FastMultiHeadAttention(self.hidden, self.heads, **options)
        if self.layer == "self":
            return FastMultiHeadSelfAttention(self.hidden, self.heads, **options)
        if self.layer == "gqa":
            return FastGroupedQueryAttention(self.hidden, self.heads, self.kv_heads, **options)
        if self.layer == "mqa":
            return FastMultiQueryAttention(self.hidden, self.heads, **options)
        if self.layer == "latent":
            return FastMultiHeadLatentAttention(
                self.hidden, self.heads, latent_dim=max(16, self.hidden // LATENT_SHARE), **options
            )
        return FastMultiHeadLatentAttention(
            self.hidden, self.heads, q_rank=Q_RANK, kv_rank=KV_RANK, nope_head_dim=NOPE, rope_head_dim=ROPE,
            v_head_dim=VALUE, **options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which rows are wanted; an empty tuple is all, None the model's own size."""

    models: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = tuple(Pass)
    dtype: Dtype = Dtype.FP16
    causal: bool = True
    sweeps: tuple[str, ...] = ()
    batch: int | None = None
    seq_len: int | None = None
    hidden: int | None = None
    heads: int | None = None


def specs(chosen: Chosen) -> tuple[Spec, ...]:
    """Return the rows of the table, or those of the sweeps that are chosen instead.

    Raises SettingsError for unknown names, and for sizes that do not divide.
    """
    layers = tuple(layer_named(name) for name in chosen.layers)
    for sweep in chosen.sweeps:
        if sweep not in SWEEPS:
            raise SettingsError(f"--sweep: expected seq_len or hidden, got {sweep!r}")
    names = chosen.models or ((SWEPT_MODEL,) if chosen.sweeps else ("deepseek_v3", "llama3_70b", "llama3_405b"))
    found: list[Spec] = []
    for name in names:
        if name not in MODELS:
            raise SettingsError(f"--models: expected some of {', '.join(MODELS)}, got {name!r}")
        shape = _resized(MODELS[name], chosen)
        defaults = (SWEPT_LAYER,) if chosen.sweeps else _layers_of(name)
        for pass_ in chosen.passes:
            rows = [_spec(shape, layer, pass_, chosen) for layer in layers or defaults]
            for row in rows:
                found += _swept(row, chosen) if chosen.sweeps else [row]
    return tuple(dict.fromkeys(found))


def layer_named(name: str) -> str:
    """Return a layer's short name, of that, of the page's name or of its class, in any case."""
    wanted = name.lower()
    for short, long in LAYERS.items():
        if wanted in (short, long.lower(), CLASSES.get(short, long).lower()):
            return short
    raise SettingsError(
        f"--layers: expected some of {', '.join(LAYERS)}, the page's names or those of classes, got {name!r}"
    )


def _layers_of(model: str) -> Sequence[str]:
    return [layer for layer in LAYERS if layer != "mla" or model == "deepseek_v3"]


def _resized(shape: ModelShape, chosen: Chosen) -> ModelShape:
    sizes = {name: getattr(chosen, name) for name in ("batch", "seq_len", "hidden", "heads")}
    resized = replace(shape, **{name: size for name, size in sizes.items() if size is not None})
    if resized.kv_heads > resized.heads or shape.kv_heads == shape.heads:
        resized = replace(resized, kv_heads=resized.heads)
    if resized.hidden % resized.heads:
        raise SettingsError(f"--hidden {resized.hidden}: expected a multiple of the {resized.heads} heads")
    return resized


def _spec(shape: ModelShape, layer: str, pass_: Pass, chosen: Chosen) -> Spec:
    shared = {"gqa": min(GROUPED_HEADS, shape.heads) if shape.kv_heads == shape.heads else shape.kv_heads, "mqa": 1}
    kv_heads = shared.get(layer, shape.heads)
    if shape.heads % kv_heads:
        raise SettingsError(f"--heads {shape.heads}: expected a multiple of the {kv_heads} heads of keys and values")
    return Spec(
        model=shape.name, layer=layer, pass_=pass_, dtype=chosen.dtype, causal=chosen.causal, batch=shape.batch,
        seq_len=shape.seq_len, hidden=shape.hidden, heads=shape.heads, kv_heads=kv_heads,
    )  # fmt: skip


def _swept(row: Spec, chosen: Chosen) -> list[Spec]:
    """Return the rows of each sweep; a size that was given on the command line is its largest."""
    found = []
    for sweep in chosen.sweeps:
        most = getattr(chosen, sweep) or max(SWEEPS[sweep])
        sizes = [size for size in SWEEPS[sweep] if size <= most] or [most // 4, most // 2, most]
        if sweep == "seq_len":
            found += [replace(row, seq_len=size, sweep=sweep) for size in sizes]
        else:
            found += [replace(row, hidden=size, sweep=sweep) for size in sizes if size % row.heads == 0]
    return found
