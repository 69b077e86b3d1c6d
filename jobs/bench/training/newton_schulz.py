"""What an iteration of Newton and Schulz takes in bf16 and in fp32 on this CPU, and where it lacks units for bf16.

Run as a program it measures in its own process and prints the milliseconds: libraries look once for what a CPU has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from statistics import median

import torch

from jobs.bench.training.measures import seconds_a_step
from pipeline.models.device import CPU
from pipeline.training.muon import orthogonalised

ROWS, COLUMNS = 192, 768
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # Keller Jordan's
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # as CPUs without AVX-512 are


def orthogonalising(rounds: int) -> dict[str, float]:
    """Time an iteration over a matrix of 192 x 768 on one thread, in processes that use what this CPU has and its AVX2
    alone; return milliseconds, and the time in bf16 over that in fp32 of each."""
    given: dict[str, float] = {}
    for suffix, environment in (("", {}), ("_avx2", AVX2_ALONE)):
        command = [sys.executable, "-m", __name__, str(rounds)]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        times = json.loads(done.stdout)
        given |= {f"{dtype}{suffix}_ms": 1e3 * seconds for dtype, seconds in times.items()}
        given[f"of_fp32{suffix}"] = times["bf16"] / times["fp32"]
    return given


def timed(rounds: int) -> dict[str, float]:
    """Return the median seconds of an iteration by dtype, taken in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    matrix = torch.randn(1, ROWS, COLUMNS)
    stacks = {"fp32": matrix / matrix.norm(), "bf16": (matrix / matrix.norm()).bfloat16()}
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for _ in range(rounds + 1):
        for name, stack in stacks.items():
            times[name].append(seconds_a_step(partial(_iterate, stack), 0, 1, CPU))
    return {name: median(seconds[1:]) for name, seconds in times.items()}  # the first warms up


def _iterate(stack: torch.Tensor, step: int) -> None:
    orthogonalised(stack, COEFFICIENTS, 1)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(timed(int(sys.argv[1]))))
