"""Times every sensible tile of Hopper's products, beside torch's.

    python -m benchmarks.gpu.hopper_linear [--bits 16] [--out FILE] [--linears qkv,down]
        [--tokens 128,256]

Each is compared with float64 first. Kernels are compiled by several processes, then measured by one
that keeps a journal; should it die or stand still, another goes on behind the case that did it. As
in `benchmarks.gpu.fp8_linear`, whose shapes these are, figures are GB/s of weights. "short" is the
error beyond that of rounding results to bfloat16: what the tensor cores' short sums cost. "host" is
what a call takes outside of graphs before it returns.
"""

import argparse
import functools
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.fp8_linear import DTYPE, LINEARS, inputs
from benchmarks.gpu.graph_time import Call, time_s
from benchmarks.gpu.kernels import ROTATION_BYTES
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.fp8_linear import library_linear
from kernels.gpu.hopper.linear import hopper_fp8_linear, hopper_linear
from kernels.gpu.hopper.linear_tiles import HopperTile
from kernels.gpu.sizes import ceil_div

NAMES = ("qkv", "output", "gate_up", "down")
TOKENS = (72, 128, 192, 256)
NUM_MULTIPROCESSORS = 132
MOST_SPLITS, MAX_SPLITS = 8, 16
# Of the programs that run at once, over all rounds, some may have nothing to do.
LEAST_USED = 0.7
# Twice what rounding to bfloat16 costs.
WRONG = 5e-3
NUM_HOST_CALLS = 20
NUM_COMPILERS, COMPILE_S, STALLED_S, MOST_DEATHS = 8, 60, 30, 4
WEIGHT_ROWS = {"tokens_are_rows": False}
FEW_TILES = [
    HopperTile(stages=6),
    HopperTile(stages=4),
    HopperTile(inner_bytes=256, stages=3),
    HopperTile(columns=64, stages=8),
    HopperTile(columns=64, inner_bytes=256, stages=4),
    HopperTile(columns=256, stages=4),
    HopperTile(stages=6, promoted=1),
    HopperTile(stages=6, promoted=4),
    HopperTile(**WEIGHT_ROWS, stages=6),
    HopperTile(**WEIGHT_ROWS, inner_bytes=256, stages=3),
    HopperTile(**WEIGHT_ROWS, rows=128, stages=4),
    HopperTile(**WEIGHT_ROWS, warpgroups=1, stages=4, programs=2),
    HopperTile(**WEIGHT_ROWS, warpgroups=1, inner_bytes=256, stages=2, programs=2),
    HopperTile(**WEIGHT_ROWS, rows=128, warpgroups=1, stages=3, programs=2),
    HopperTile(**WEIGHT_ROWS, warpgroups=3, stages=5),
]
MIDDLE_TILES = [
    HopperTile(warpgroups=3, stages=5),
    HopperTile(warpgroups=3, columns=64, stages=6),
    HopperTile(warpgroups=3, inner_bytes=256, stages=2),
    HopperTile(warpgroups=3, stages=5, promoted=4),
]
# Those for 128 tokens, twice.
TWICE = [HopperTile(columns=256, stages=4), HopperTile(**WEIGHT_ROWS, rows=128, stages=4)]
MANY_TILES = [
    HopperTile(rows=128, stages=4),
    HopperTile(rows=128, inner_bytes=256, stages=2),
    HopperTile(rows=128, columns=64, stages=5),
    HopperTile(rows=128, columns=64, stages=5, promoted=4),
    HopperTile(**WEIGHT_ROWS, columns=256, stages=4),
    HopperTile(**WEIGHT_ROWS, columns=256, inner_bytes=256, stages=2),
    *TWICE,
]


def label(tile: HopperTile | None) -> str:
    if tile is None:
        return "library"
    side = "tokens" if tile.tokens_are_rows else "weight"
    return (
        f"{side} {tile.warpgroups}x{tile.rows} by {tile.columns} /{tile.splits} m{tile.merged} "
        f"i{tile.inner_bytes} s{tile.stages} p{tile.promoted} x{tile.programs}"
    )


def tiles(name: str, num_tokens: int, bits: int) -> Iterator[HopperTile]:
    given = FEW_TILES
    if num_tokens > 192:
        given = MANY_TILES
    elif num_tokens > 128:
        given = [*MIDDLE_TILES, *MANY_TILES]
    for tile in given:
        if tile.promoted and bits != 8:
            continue
        num = ceil_div(num_tokens, tile.tokens) * ceil_div(LINEARS[name][0], tile.features)
        at_once = NUM_MULTIPROCESSORS * tile.programs
        used = {
            splits: num * splits / (ceil_div(num * splits, at_once) * at_once)
            for splits in range(1, MOST_SPLITS + 1)
        }
        good = [splits for splits in used if used[splits] >= LEAST_USED]
        most = 1 if tile.promoted or name == "gate_up" else 3
        for splits in good[:most]:
            yield replace(tile, splits=splits)
            if splits > 2 and not tile.promoted:
                yield replace(tile, splits=splits, merged=MAX_SPLITS)


def compile_tiles(share: int, num_shares: int, names: list[str], bits: int) -> None:
    """Into the cache on disk: those of this share."""
    distinct = {
        replace(tile, splits=min(tile.splits, 2), merged=2)
        for name, num_tokens in itertools.product(names, TOKENS)
        for tile in tiles(name, num_tokens, bits)
    }
    x = torch.randn(100, 4096, device="cuda", dtype=DTYPE)
    weight = torch.randn(1024, 4096, device="cuda", dtype=DTYPE)
    rows, weight_rows = quantize_rows(x), quantize_rows(weight)
    for tile in sorted(distinct, key=label)[share::num_shares]:
        try:
            if bits == 8:
                hopper_fp8_linear(rows, weight_rows, None, dtype=DTYPE, tile=tile)
            else:
                hopper_linear(x, weight, None, tile=tile)
        except Exception:  # noqa: BLE001, S112  (the measuring process says what it was)
            continue


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def exact_product(x: Fp8Rows | Tensor, weight: Fp8Rows | Tensor) -> Tensor:
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return x.double() @ weight.double().T
    return x.dequantized(torch.float64) @ weight.dequantized(torch.float64).T


class Case:
    """Products of one input and several weights, all of 8 bits or all of 16."""

    def __init__(self, x: Fp8Rows | Tensor, weights: list[Fp8Rows] | list[Tensor]) -> None:
        self._x, self._weights = x, weights
        values = weights[0] if isinstance(weights[0], Tensor) else weights[0].values
        self._num_weights, self._num_bytes = values.numel(), values.nbytes
        self._num_tokens = len(x if isinstance(x, Tensor) else x.values)
        exact = exact_product(x, weights[0])
        self._expected = exact
        self._rounding = relative_error(exact.to(DTYPE), exact)

    def measure(self, tile: HopperTile | None) -> dict[str, Any]:
        """Raises ValueError if results are wrong, or vary."""
        calls = [self._call(weight, tile) for weight in self._weights]
        actual = calls[0]()
        assert isinstance(actual, Tensor)
        error = relative_error(actual, self._expected)
        if not error < WRONG:
            raise ValueError(f"an error of {error:.2e}")
        for _ in range(3):
            again = calls[0]()
            if not torch.equal(actual, again):  # pyright: ignore[reportArgumentType]
                raise ValueError("results vary")
        seconds = time_s(calls)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(NUM_HOST_CALLS):
            calls[0]()
        host_s = (time.perf_counter() - started) / NUM_HOST_CALLS
        flops = 2 * self._num_tokens * self._num_weights
        return {
            "gb_per_s": round(self._num_bytes / seconds / 1e9),
            "us": round(1e6 * seconds, 2),
            "host_us": round(1e6 * host_s, 1),
            "tflops": round(flops / seconds / 1e12),
            "short": round(max(error**2 - self._rounding**2, 0) ** 0.5, 6),
        }

    def _call(self, weight: Fp8Rows | Tensor, tile: HopperTile | None) -> Call:
        if isinstance(weight, Tensor):
            if tile is None:
                return functools.partial(torch.nn.functional.linear, self._x, weight)
            return functools.partial(hopper_linear, self._x, weight, None, tile=tile)
        if tile is None:
            return functools.partial(library_linear, self._x, weight, None, dtype=DTYPE)
        options = {"dtype": DTYPE, "tile": tile}
        return functools.partial(hopper_fp8_linear, self._x, weight, None, **options)


def measure(journal: Path, names: list[str], all_tokens: list[int], bits: int) -> None:
    """Every case that the journal doesn't know."""
    begun = {entry["begin"] for entry in read(journal) if "begin" in entry}
    # Each capture of a graph collects garbage: what is here by now is none.
    gc.freeze()
    with journal.open("a") as file:
        for name in names:
            out_features, in_features = LINEARS[name]
            num_weights = max(2, ROTATION_BYTES // (out_features * in_features))
            x, weights = inputs(max(all_tokens), name, num_weights)
            wide = [weight.dequantized(DTYPE) for weight in weights] if bits == 16 else []
            for num_tokens in all_tokens:
                part = x[:num_tokens]
                case = Case(part, wide) if wide else Case(quantize_rows(part), weights)
                for tile in (None, *tiles(name, num_tokens, bits)):
                    key = f"{name}, {num_tokens} tokens: {label(tile)}"
                    if key in begun:
                        continue
                    entry: dict[str, Any] = {"linear": name, "tokens": num_tokens, "key": key}
                    entry["tile"] = tile and asdict(tile)
                    print(json.dumps({"begin": key, "entry": entry}), file=file, flush=True)
                    try:
                        entry |= case.measure(tile)
                    except Exception as error:  # noqa: BLE001  (what doesn't compile is skipped)
                        entry["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                    print(json.dumps(entry), file=file, flush=True)
                    # After an error of the card all else would fail, too: this ends the process.
                    torch.cuda.synchronize()
            del x, weights, wide, case


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def results_of(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entry of each case; one that was begun and not ended was fatal."""
    begun = {x["begin"]: x["entry"] | {"failed": "fatal"} for x in journal if "begin" in x}
    return list((begun | {x["key"]: x for x in journal if "key" in x}).values())


def run_all(journal: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.hopper_linear"]
    compilers = [
        subprocess.Popen([*command, "--compile-share", f"{i}/{NUM_COMPILERS}", *arguments])
        for i in range(NUM_COMPILERS)
    ]
    deadline = time.monotonic() + COMPILE_S
    for compiler in compilers:
        try:
            compiler.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            compiler.kill()
            compiler.wait()
    for _ in range(MOST_DEATHS):
        measuring = subprocess.Popen([*command, "--journal", str(journal), *arguments])
        if ended_well(measuring, journal):
            return
        print("ended by:", journal.read_text().splitlines()[-1:], flush=True)


def ended_well(process: subprocess.Popen[bytes], journal: Path) -> bool:
    """Waits for as long as the journal grows."""
    size = -1
    while journal.stat().st_size > size:
        size = journal.stat().st_size
        try:
            return process.wait(STALLED_S) == 0
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
    return False


def report(entries: list[dict[str, Any]]) -> None:
    cases = sorted({(entry["linear"], entry["tokens"]) for entry in entries})
    for name, num_tokens in cases:
        mine = [x for x in entries if (x["linear"], x["tokens"]) == (name, num_tokens)]
        timed = sorted((x for x in mine if "us" in x), key=lambda x: x["us"])
        print(f"{name}, {num_tokens} tokens ({len(mine) - len(timed)} of {len(mine)} failed)")
        libraries = [x for x in timed if x["tile"] is None]
        for x in [*libraries, *[x for x in timed if x["tile"] is not None][:4]]:
            shown = x["key"].split(": ")[1]
            figures = f"{x['gb_per_s']:5} GB/s {x['us']:7} us  short {x['short']:.1e}"
            print(f"  {figures}  host {x['host_us']:5} us  {shown}")
    for entry in entries:
        if "failed" in entry:
            print("failed:", entry["key"], entry["failed"].split("\n")[0])
    print(len(entries), "cases")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--linears", default=",".join(NAMES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--compile-share", help="k/n: only compile part k of n of the tiles")
    parser.add_argument("--journal", type=Path, help="only measure what this doesn't have")
    args = parser.parse_args()
    names = args.linears.split(",")
    if args.compile_share:
        compile_tiles(*map(int, args.compile_share.split("/")), names, args.bits)
        return
    if args.journal:
        measure(args.journal, names, list(map(int, args.tokens.split(","))), args.bits)
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        journal = Path(file.name)
        started = time.monotonic()
        shapes = ["--linears", args.linears, "--tokens", args.tokens]
        run_all(journal, [*shapes, "--bits", str(args.bits)])
        entries = results_of(read(journal))
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name(),
        "seconds": round(time.monotonic() - started),
        "bits": args.bits,
        "cases": entries,
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    report(entries)


if __name__ == "__main__":
    main()
