"""LLaMA-style inference: FastGroupedQueryAttention with RoPE, a prompt at once, then token by token with a cache.

    python examples/llama_inference.py
    python examples/llama_inference.py --embed-dim 8192 --heads 64 --kv-heads 8 --dtype float16 --device cuda

The last line says how far decoding is from the same tokens in one forward.
"""

import argparse
import time

import torch

from tilewise import FastGroupedQueryAttention

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    layer = FastGroupedQueryAttention(
        arguments.embed_dim, arguments.heads, arguments.kv_heads, bias=False, causal=True, position_method="rope",
        rope_base=500_000.0, rope_scaling=LLAMA3, max_seq_len=131_072, kernel_type=arguments.kernel,
        device=arguments.device, dtype=getattr(torch, arguments.dtype),
    ).eval()  # fmt: skip
    length = arguments.prompt + arguments.new
    x = torch.randn(
        arguments.batch, length, arguments.embed_dim, device=arguments.device, dtype=layer.q_proj.weight.dtype
    )
    start = time.perf_counter()
    out, cache = layer(x[:, : arguments.prompt], use_cache=True)
    outs = [out]
    for place in range(arguments.prompt, length):
        out, cache = layer(x[:, place : place + 1], past_key_value=cache, use_cache=True)
        outs.append(out)
    decoded = torch.cat(outs, 1)
    print(f"{arguments.prompt} tokens at once and {arguments.new} one by one: {time.perf_counter() - start:.2f} s")
    print(f"cache: {cache.length} tokens, {sum(each.nbytes for each in cache.tensors) / 2**20:.2f} MiB")
    whole = layer(x)
    print(f"largest difference from one forward: {float((decoded - whole).abs().max() / whole.abs().max()):.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are there already")
    parser.add_argument("--new", type=int, default=16, help="tokens that come one by one")
    parser.add_argument("--kernel", default="flash", choices=("auto", "flash", "triton", "sdpa", "pytorch"))
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
