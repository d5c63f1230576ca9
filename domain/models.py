"""The attention shapes of the models that the benchmark is about."""

from dataclasses import dataclass

from .errors import SettingsError
from .problem import Dtype, Pass, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One attention layer of a model, with the batch and sequence that the benchmark page uses."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    seq_len: int
    batch: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def problem(self, *, pass_: Pass = Pass.INFERENCE, dtype: Dtype = Dtype.FP16, causal: bool = True) -> Problem:
        """Return the core of the layer: self-attention over the whole sequence."""
        return Problem(
            pass_=pass_,
            dtype=dtype,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            q_len=self.seq_len,
            head_dim=self.head_dim,
            causal=causal,
        )


MODELS = {
    shape.name: shape
    for shape in (
        # as the benchmark page has it: 7168 / 128 = 56, not DeepSeek's own latent attention
        ModelShape(name="deepseek_v3", hidden=7168, heads=128, kv_heads=128, seq_len=2048, batch=2),
        ModelShape(name="llama3_70b", hidden=8192, heads=64, kv_heads=8, seq_len=4096, batch=1),
        ModelShape(name="llama3_405b", hidden=16384, heads=128, kv_heads=8, seq_len=2048, batch=1),
    )
}


def model_named(name: str) -> ModelShape:
    """Return the shapes of a model. Raises SettingsError, listing the names, for an unknown one."""
    try:
        return MODELS[name]
    except KeyError:
        raise SettingsError(
            f"unknown model {name!r}; expected one of {', '.join(MODELS)}, or use --problem KEY"
        ) from None
