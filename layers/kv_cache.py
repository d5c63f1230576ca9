"""What a layer keeps of earlier tokens: `past_key_value`, and what use_cache=True returns."""

import torch

from tilewise.domain.errors import InputError

LEAST_ROOM = 256  # rows


class _Store:
    """Tensors (batch, capacity, ...), of which the first `filled` rows are written."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], filled: int) -> None:
        self.tensors, self.filled = tensors, filled


class KeyValueCache:
    """Keys and values, or whatever a layer makes them of, of `length` tokens; nothing that was cached ever changes.

    `tensors` are (batch, length, ...): keys and values (batch, length, kv_heads, head_dim) of the layers with heads,
    the latents (batch, length, rank + rope_head_dim) of the latent layer, and int64 positions (batch, length) behind
    them where keys are placed late. To reorder or cut it make a new one of their parts.

    `append` writes into room that it keeps behind the last token, so that a step of decoding does not copy the cache;
    while gradients are recorded, and in compiled graphs, it copies. Two continuations of one cache do not meet: whoever
    comes second gets a copy.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        if not tensors or any(tensor.dim() < 2 or tensor.shape[:2] != tensors[0].shape[:2] for tensor in tensors):
            raise InputError(
                "cache: expected tensors (batch, length, ...) of one batch and length, got "
                f"{[tuple(tensor.shape) for tensor in tensors]}"
            )
        self.tensors = tensors
        self.length: int = tensors[0].shape[1]
        self._store: _Store | None = None

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    def append(self, *new: torch.Tensor) -> "KeyValueCache":
        """Return a cache of these tokens and `new` ones, tensors like those that are cached, in their order.

        Raises InputError where they do not fit.
        """
        self._check(new)
        if (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # what autograd or a graph keeps is not written into
            pairs = zip(self.tensors, new, strict=True)
            return KeyValueCache(tuple(torch.cat((old, fresh), 1) for old, fresh in pairs))
        length = self.length + new[0].shape[1]
        store = self._store
        if store is None or store.filled != self.length or length > store.tensors[0].shape[1] or _is_foreign(store):
            store = self._roomier(length)
        for buffer, fresh in zip(store.tensors, new, strict=True):
            buffer[:, self.length : length] = fresh
        store.filled = length
        longer = KeyValueCache(tuple(buffer[:, :length] for buffer in store.tensors))
        longer._store = store
        return longer

    def _check(self, new: tuple[torch.Tensor, ...]) -> None:
        fits = len(new) == len(self.tensors) and all(
            (old.shape[0], old.shape[2:], old.dtype, old.device)
            == (fresh.shape[0], fresh.shape[2:], fresh.dtype, fresh.device)
            for old, fresh in zip(self.tensors, new, strict=False)
        )
        if not fits:
            raise InputError(
                f"past_key_value: expected a cache like {_described(new)}, whatever its length, got "
                f"{_described(self.tensors)}; give what this layer returned for this batch with use_cache=True"
            )

    def _roomier(self, length: int) -> _Store:
        capacity = length + max(length // 4, LEAST_ROOM)
        buffers = tuple(old.new_empty(old.shape[0], capacity, *old.shape[2:]) for old in self.tensors)
        for buffer, old in zip(buffers, self.tensors, strict=True):
            buffer[:, : self.length] = old
        return _Store(buffers, self.length)


def _is_foreign(store: _Store) -> bool:
    """Whether a buffer was made in inference mode, and cannot be written outside of it."""
    return store.tensors[0].is_inference() and not torch.is_inference_mode_enabled()


def _described(tensors: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in tensors)
