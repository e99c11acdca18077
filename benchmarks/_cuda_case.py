"""One configuration of `cuda.py`, its entry on standard output: `python _cuda_case.py MODEL BATCH WAY DEVICE`."""

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from _random_network import random_network

from gcvit_edge.measurement.parity import check_parity
from gcvit_edge.targets._pytorch_ways import compute_in, prepare
from gcvit_edge.targets.cuda import WAYS, computed_in

ROUNDS = 30
ROUND_SECONDS = 0.1  # of inferences in a row, so that starting them does not count
COMPARED = 16  # images whose answers are checked


def main() -> None:
    name, batch, (dtype_name, way), device = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(), sys.argv[4]
    model = random_network(name).to(device)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, 3, *model.config.img_size), np.float32)).to(device)
    compute_in(["float32"])
    with torch.no_grad():
        expected = torch.cat([model(image) for image in images[:COMPARED].split(1)]).cpu().numpy()
    steps = [*WAYS[way].split(", "), dtype_name]
    dtype = compute_in(steps)
    model, images = model.to(dtype), images.to(dtype)
    start = time.perf_counter()
    forward = prepare(model, steps, images)
    with torch.no_grad():
        logits = forward(images)[:COMPARED].float().cpu().numpy()
        ready = time.perf_counter() - start
        samples = timed(lambda: forward(images), device)
    parity = check_parity(logits, expected, computed_in(way, dtype_name))
    middle = statistics.median(samples)
    entry = {
        "p50_ms": round(middle, 4),
        "min_ms": round(min(samples), 4),
        "quartiles_ms": np.percentile(samples, [25, 75]).round(4).tolist(),
        "images_per_s": round(1000 * batch / middle, 1),
        "sqnr_db": round(parity.sqnr_db, 1),
        "passed": parity.passed,
        "peak_memory_mb": None if device == "cpu" else round(torch.cuda.max_memory_allocated(device) / 1e6, 1),
        "ready_s": round(ready, 1),
    }
    print(json.dumps(entry))


def timed(infer: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of one inference in each of `ROUNDS` rounds, after a warm-up of one round; the device is waited for once a round."""

    def seconds(runs: int) -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(runs):
            infer()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    runs = max(1, round(ROUND_SECONDS / max(seconds(3) / 3, 1e-6)))
    seconds(runs)
    return [1000 * seconds(runs) / runs for _ in range(ROUNDS)]


if __name__ == "__main__":
    main()
