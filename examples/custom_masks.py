"""Custom masks: FastMultiHeadAttention with triton, dropout 0.1, and a mask that no flag can say.

    python examples/custom_masks.py
    python examples/custom_masks.py --embed-dim 8192 --heads 64 --seq-len 4096 --dtype float16 --device cuda

Several documents lie in one row; a token attends its own document, and the row's first tokens, whatever theirs is. A
bias per head and distance is learned besides. The last lines check that nothing leaks between documents.
"""

import argparse

import torch
from torch import nn

from tilewise import FastMultiHeadAttention


def document_mask(documents: torch.Tensor, shared: int) -> torch.Tensor:
    """Return who attends whom, bool (batch, seq, seq), for the document of each token (batch, seq)."""
    same = documents[:, :, None] == documents[:, None, :]
    same[:, :, :shared] = True
    return same


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    placed = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    layer = FastMultiHeadAttention(
        arguments.embed_dim, arguments.heads, dropout=0.1, kernel_type=arguments.kernel, **placed
    )
    x = torch.randn(arguments.batch, arguments.seq_len, arguments.embed_dim, **placed, requires_grad=True)
    documents = torch.randint(3, (arguments.batch, arguments.seq_len), device=arguments.device).sort(-1).values
    mask = document_mask(documents, shared=2)
    near = nn.Parameter(torch.zeros(arguments.heads, 2 * arguments.seq_len - 1, **placed))
    places = torch.arange(arguments.seq_len, device=arguments.device)
    distance = places[:, None] - places + arguments.seq_len - 1

    def attend(rows: torch.Tensor) -> torch.Tensor:
        bias = near[:, distance].expand(arguments.batch, -1, -1, -1).masked_fill(~mask[:, None], -torch.inf)
        out: torch.Tensor = layer(rows, attn_mask=bias)
        return out

    attend(x).float().square().mean().backward()
    assert near.grad is not None
    print(f"gradient of the bias: {float(near.grad.float().norm()):.2e}")

    layer.eval()
    with torch.no_grad():
        other = x.clone()
        other[0, documents[0] == documents[0, -1]] += 1.0  # the last document changes
        changed = (attend(other) - attend(x))[0].abs().amax(-1) > 0
    leaked = changed & (documents[0] != documents[0, -1])
    print(f"tokens that changed: {int(changed.sum())}, outside the changed document: {int(leaked.sum())}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--kernel", default="triton", choices=("auto", "flash", "triton", "sdpa", "pytorch"))
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
