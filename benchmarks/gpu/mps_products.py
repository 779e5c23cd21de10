"""Whether products are right on a share of a GPU, as MPS gives it to a process.

    python -m benchmarks.gpu.mps_products [--percentages 100 70 50] [--out results.json]

Starts NVIDIA's MPS and asks a process for each share; rows are products that came out wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cli.mps import mps_share, start_mps

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
NUM_TOKENS = (16, 64, 100, 300, 512, 1024, 2048, 4096, 8192)
# Rounding to bfloat16 is 3e-3 of a result's norm.
MAX_ERROR = 6e-3


def wrong_products() -> list[dict[str, Any]]:
    """In bfloat16 and fp8, against float32, on whatever share this process has."""
    import torch

    from kernels.fp8 import quantize_rows
    from kernels.fp8_linear import Fp8Linear, add_fp8_linear, fp8_linear

    wrong: list[dict[str, Any]] = []
    for out_features, in_features in SHAPES:
        dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        weight = quantize_rows(dense)
        for num_tokens in NUM_TOKENS:
            x = torch.randn(num_tokens, in_features, device="cuda", dtype=torch.bfloat16)
            rows = quantize_rows(x)
            residual = torch.randn(num_tokens, out_features, device="cuda", dtype=torch.bfloat16)
            exact = x.float() @ dense.float().T
            fp8_exact = rows.dequantized(torch.float32) @ weight.dequantized(torch.float32).T
            packed = Fp8Linear(weight, None, None)
            fp8_exact_sum = fp8_exact + residual.float()
            if not add_fp8_linear(rows, packed, stream := residual.clone()):
                stream = fp8_exact_sum
            for name, actual, expected in (
                ("bf16", x @ dense.T, exact),
                ("bf16, added", residual.clone().addmm_(x, dense.T), exact + residual.float()),
                ("fp8", fp8_linear(rows, packed, dtype=torch.bfloat16), fp8_exact),
                ("fp8, added", stream, fp8_exact_sum),
            ):
                error = ((actual.float() - expected).norm() / expected.norm()).item()
                if not error <= MAX_ERROR:
                    shape = [out_features, in_features]
                    wrong.append(
                        {
                            "product": name,
                            "tokens": num_tokens,
                            "weight": shape,
                            "error": str(error),
                        }
                    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--percentages", nargs="*", type=int, default=[100, 70, 50])
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(wrong_products()))
        return
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": arguments.commit,
        "wrong": {},
    }
    with TemporaryDirectory() as name:
        environ = start_mps(Path(name) / "mps")
        try:
            for percentage in arguments.percentages:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.gpu.mps_products", "--here"],
                    env=os.environ | environ | mps_share(percentage),
                    stdout=subprocess.PIPE,
                    check=True,
                )
                result["wrong"][percentage] = json.loads(done.stdout.splitlines()[-1])
                print(percentage, json.dumps(result["wrong"][percentage]), flush=True)
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"],
                env=os.environ | environ,
                input="quit\n",
                text=True,
                check=False,
                timeout=30,
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
