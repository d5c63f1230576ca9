"""Turns what `tilewise tune --json` printed into a table for readers.

python -m tilewise.bench.verdicts bench/results/NAME.json > bench/results/NAME.md
"""

import json
import sys
from pathlib import Path

from tilewise.domain import codec
from tilewise.domain.answer import Answer, Finalist
from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.software import Software

HEADER = (
    "| problem | torch's default ms | cuDNN ms | best Triton ms | winner | ms | TFLOP/s | over default | over cuDNN | "
    "Triton over cuDNN | trials | noise |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table(answers: list[Answer]) -> str:
    """Return a Markdown table; every ratio is between two candidates of one interleaved final."""
    return "\n".join([HEADER, *map(_row, answers)])


def finals(answers: list[Answer]) -> str:
    """Return every finalist of every problem as Markdown."""
    lines = ["| problem | finalist | median ms | p20 | p80 | ratio to torch's default | samples |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for answer in answers:
        for finalist in _finalists(answer):
            m = finalist.measurement
            lines.append(
                f"| {answer.problem.key} | {finalist.candidate} | {m.median_ms:.4f} | {m.p20_ms:.4f} | {m.p80_ms:.4f} "
                f"| {m.ratio:.4f} | {m.samples} |"
            )
    return "\n".join(lines)


def _row(answer: Answer) -> str:
    finalists = {finalist.candidate: finalist for finalist in _finalists(answer)}
    won = finalists[answer.plan.forward]
    default = next(f for f in finalists.values() if answer.evidence and f.candidate == answer.evidence.reference)
    cudnn = finalists.get(Candidate("sdpa_cudnn"))
    triton = next((f for f in _finalists(answer) if f.candidate.backend == "triton"), None)
    milliseconds = won.measurement.median_ms
    assert answer.evidence is not None
    cells = [
        answer.problem.key,
        _ms(default),
        _ms(cudnn),
        _ms(triton),
        str(won.candidate),
        f"{milliseconds:.4f}",
        f"{answer.problem.forward_flops / milliseconds / 1e9:.0f}",
        _over(default, won),
        _over(cudnn, won),
        _over(cudnn, triton),
        str(answer.evidence.trials),
        f"{answer.evidence.noise:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def _finalists(answer: Answer) -> tuple[Finalist, ...]:
    return answer.evidence.finalists if answer.evidence else ()


def _ms(finalist: Finalist | None) -> str:
    return "-" if finalist is None else f"{finalist.measurement.median_ms:.4f}"


def _over(slower: Finalist | None, faster: Finalist | None) -> str:
    if slower is None or faster is None or not slower.measurement.ratio or not faster.measurement.ratio:
        return "-"
    return f"{slower.measurement.ratio / faster.measurement.ratio:.3f}x"


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text())
    answers = [codec.from_json(Answer, item) for item in document["answers"]]
    device, software = codec.from_json(Device, document["device"]), codec.from_json(Software, document["software"])
    versions = ", ".join(
        f"{name} {getattr(software, name)}"
        for name in ("torch", "triton", "cuda", "driver", "cudnn")
        if getattr(software, name)
    )
    print(f"{device.name} ({device.key}); {versions}.\n")
    print("Ratios are between candidates of one interleaved final; above 1 is faster than what stands behind `over`.\n")
    print(f"{table(answers)}\n\n## The finals\n\n{finals(answers)}")


if __name__ == "__main__":
    main()
