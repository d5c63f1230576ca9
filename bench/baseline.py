"""The baseline of the benchmark page, pinned: attention as bmm, softmax, bmm over copies of all heads.

What the page calls PyTorch. Every step is a call of its own over the whole score matrix: heads are copied to the front,
shared keys and values are repeated, the causal mask is made anew. Change nothing here: published figures are ratios to
it, and `tilewise bench --trinix` holds it against that library's own "pytorch" layers.
"""

import torch
import torch.nn.functional as F


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool, dropout: float = 0.0
) -> torch.Tensor:
    """Return (batch, q_len, heads, v_head_dim) of query (batch, q_len, heads, dim), keys and values with fewer heads.

    Causal is aligned top-left; queries and keys are of one length here.
    """
    batch, q_len, heads, _ = query.shape
    kv_len = key.shape[1]
    q, k, v = (_heads_first(each, heads) for each in (query, key, value))
    scores = torch.bmm(q, k.transpose(1, 2)) * scale
    if causal:
        later = torch.ones(q_len, kv_len, device=query.device).triu(diagonal=1).bool()
        scores.masked_fill_(later, float("-inf"))
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=dropout > 0)
    return torch.bmm(weights, v).view(batch, heads, q_len, -1).transpose(1, 2)


def _heads_first(each: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (batch * heads, length, dim), a copy; each key and value stands once for every head that shares it."""
    swapped = each.transpose(1, 2)
    shared = heads // swapped.shape[1]
    if shared > 1:
        swapped = swapped[:, :, None].expand(-1, -1, shared, -1, -1).reshape(each.shape[0], heads, each.shape[1], -1)
    return swapped.contiguous().view(-1, each.shape[1], each.shape[3])


def needed_bytes(batch: int, heads: int, q_len: int, kv_len: int, element: int, *, training: bool) -> int:
    """Return about what the score matrices take at the peak, beside everything else.

    Inference holds two at once, products and their scaled copy; the backward four: the weights kept, their gradient,
    the scores' and its scaled copy.
    """
    return batch * heads * q_len * kv_len * element * (4 if training else 2)
