"""Encoder and decoder: attention both ways over a source, causal over a target, and across from one to the other.

    python examples/encoder_decoder.py
    python examples/encoder_decoder.py --embed-dim 4096 --heads 32 --source 2048 --dtype float16 --device cuda

The sources have different lengths; a (batch, seq) mask hides the padding, and the last line shows that it does.
"""

import argparse

import torch

from tilewise import FastMultiHeadAttention, FastMultiHeadSelfAttention


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    width, heads = arguments.embed_dim, arguments.heads
    placed = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    encode = FastMultiHeadSelfAttention(width, heads, kernel_type=arguments.kernel, **placed).eval()
    read = FastMultiHeadSelfAttention(width, heads, causal=True, kernel_type=arguments.kernel, **placed).eval()
    # the encoder may be narrower than the decoder
    across = FastMultiHeadAttention(2 * width, heads, kdim=width, vdim=width, kernel_type=arguments.kernel, **placed)
    across.eval()
    widen = torch.nn.Linear(width, 2 * width, **placed)

    lengths = torch.linspace(arguments.source // 2, arguments.source, arguments.batch, device=arguments.device).long()
    real = torch.arange(arguments.source, device=arguments.device) < lengths[:, None]
    source = torch.randn(arguments.batch, arguments.source, width, **placed)
    target = torch.randn(arguments.batch, arguments.target, width, **placed)

    def translate(rows: torch.Tensor) -> torch.Tensor:
        memory = encode(rows, attn_mask=real)
        out: torch.Tensor = across(widen(read(target)), memory, attn_mask=real)
        return out

    out = translate(source)
    print(f"source {tuple(source.shape)}, target {tuple(target.shape)}, result {tuple(out.shape)}")
    other = translate(source.masked_fill(~real[..., None], 7.0))
    print(f"largest difference when only the padding changes: {float((out - other).abs().max()):.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--target", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kernel", default="auto", choices=("auto", "flash", "triton", "sdpa", "pytorch"))
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
