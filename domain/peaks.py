"""What a device could do at most, and how near a kernel came: the roofline model (Williams, Waterman and Patterson,
Communications of the ACM 52(4), 2009).

Peaks are those of NVIDIA's data sheets, dense (without sparsity): A100 (2021), H100 (2023), H200 (2024). They are of
the full card at its own power limit; a slice of one, or a card of another kind, has none here.
"""

from dataclasses import dataclass

from .device import Device
from .problem import MAX_DECODE_Q_LEN, Dtype, Pass, Precision, Problem

_BYTES = {Dtype.FP16: 2, Dtype.BF16: 2, Dtype.FP32: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Dense peaks in TFLOP/s by kind of product, memory bandwidth in GB/s, and where the numbers come from."""

    half: float
    tf32: float
    fp32: float
    bandwidth: float
    power_w: int
    source: str

    def tflops(self, problem: Problem) -> float:
        """Return the peak of the matrix products of a problem's dtype."""
        if problem.dtype is not Dtype.FP32:
            return self.half
        return self.tf32 if problem.precision is Precision.TF32 else self.fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What limits a problem on a device: intensity in FLOP per byte, the roof above it in TFLOP/s, the bytes moved."""

    peaks: Peaks
    intensity: float
    roof: float
    peak: float
    bytes: float

    @property
    def bound(self) -> str:
        """Which of the two limits: `memory` or `compute`."""
        return "memory" if self.roof < self.peak else "compute"


_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 data sheet"
_H200 = "NVIDIA H200 data sheet"
_KNOWN = {
    "NVIDIA A100-SXM4-40GB": Peaks(half=312, tf32=156, fp32=19.5, bandwidth=1555, power_w=400, source=_A100),
    "NVIDIA A100-SXM4-80GB": Peaks(half=312, tf32=156, fp32=19.5, bandwidth=2039, power_w=400, source=_A100),
    "NVIDIA A100-PCIE-40GB": Peaks(half=312, tf32=156, fp32=19.5, bandwidth=1555, power_w=250, source=_A100),
    "NVIDIA A100 80GB PCIe": Peaks(half=312, tf32=156, fp32=19.5, bandwidth=1935, power_w=300, source=_A100),
    "NVIDIA H100 80GB HBM3": Peaks(half=989, tf32=494, fp32=67, bandwidth=3350, power_w=700, source=_H100),
    "NVIDIA H100 PCIe": Peaks(half=756, tf32=378, fp32=51, bandwidth=2000, power_w=350, source=_H100),
    "NVIDIA H200": Peaks(half=989, tf32=494, fp32=67, bandwidth=4800, power_w=700, source=_H200),
}


def peaks_of(device: Device | None) -> Peaks | None:
    """Return the peaks of a device; None where they are not known."""
    return None if device is None or device.mig else _KNOWN.get(device.name)


def moved_bytes(problem: Problem) -> float:
    """Return the least that a forward moves: queries, keys, values, the result, and what is stored of a mask, once."""
    rows = problem.batch * problem.q_len * problem.heads * (problem.head_dim + problem.v_head_dim)
    keys = problem.batch * problem.kv_len * problem.kv_heads * (problem.head_dim + problem.v_head_dim)
    total = float(_BYTES[problem.dtype] * (rows + keys))
    if problem.mask != "none":
        kind, _, flat = problem.mask.partition(".")
        sizes = {"b1": problem.batch, "h1": problem.heads, "q1": problem.q_len, "k1": problem.kv_len}
        elements = 1
        for name, size in sizes.items():
            elements *= 1 if name in flat else size
        total += elements * (1 if kind == "bool" else _BYTES[problem.dtype])
    return total


def roof_of(problem: Problem, device: Device | None) -> Roof | None:
    """Return the roof over the forward of a problem; None where the device's peaks, or its operations, are not known.

    A training step has no agreed count of operations, and that of packed sequences depends on their lengths. A window
    reads fewer keys in decoding, which is not counted.
    """
    peaks = peaks_of(device)
    if peaks is None or problem.pass_ is not Pass.INFERENCE or problem.varlen:
        return None
    if problem.window is not None and problem.q_len <= MAX_DECODE_Q_LEN:
        return None
    moved = moved_bytes(problem)
    intensity = problem.forward_flops / moved
    peak = peaks.tflops(problem)
    return Roof(
        peaks=peaks, intensity=intensity, roof=min(peak, intensity * peaks.bandwidth / 1e3), peak=peak, bytes=moved
    )
