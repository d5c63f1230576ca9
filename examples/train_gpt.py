"""Training at long context, GPT-style: causal FastMultiHeadSelfAttention with flash and dropout 0.1.

    python examples/train_gpt.py                                             a minute on two CPU cores
    python examples/train_gpt.py --embed-dim 8192 --heads 64 --seq-len 8192 --dtype bfloat16 --device cuda

One block learns to repeat what it saw half a sequence before, which only attention can.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from tilewise import FastMultiHeadSelfAttention


class Block(nn.Module):
    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        width = arguments.embed_dim
        self.tokens = nn.Embedding(arguments.vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attentions = nn.ModuleList(
            FastMultiHeadSelfAttention(
                width, arguments.heads, causal=True, dropout=0.1, kernel_type=arguments.kernel, position_method="rope",
                max_seq_len=arguments.seq_len,
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = nn.Linear(width, arguments.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for attend, norm in zip(self.attentions, self.norms, strict=False):
            x = x + attend(norm(x))
        logits: torch.Tensor = self.out(self.norms[-1](x))
        return logits


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = Block(arguments).to(arguments.device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    half = arguments.seq_len // 2
    for step in range(arguments.steps):
        first = torch.randint(arguments.vocabulary, (arguments.batch, half), device=arguments.device)
        tokens = first.repeat(1, 2)
        logits = model(tokens[:, :-1])
        # what comes after the half has been seen before
        loss = F.cross_entropy(logits[:, half - 1 :].flatten(0, 1).float(), tokens[:, half:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, arguments.steps // 5) == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kernel", default="flash", choices=("auto", "flash", "triton", "sdpa", "pytorch"))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
