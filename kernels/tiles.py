"""What the Triton kernels and the backends that describe them both say about tiles; imports no triton."""


def padded(size: int) -> int:
    """Return the width of the tile that holds `size`: tiles are powers of two, and dots take 16 at least."""
    return max(16, 1 << (size - 1).bit_length())
