"""A fresh process that holds one artifact: `python -m gcvit_edge.targets._worker BACKEND FILE THREADS`.

Reads one JSON command a line from standard input, and answers in JSON lines on what was standard output when it started;
whatever the runtime prints goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gcvit_edge.backends import load_backend
from gcvit_edge.data import Preprocessing


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    backend = load_backend(name)
    importlib.import_module(backend.RUNTIME)
    before = peak_rss_mb()
    start = time.perf_counter()
    run = backend.load(path, threads)
    answer({"load_ms": 1000 * (time.perf_counter() - start), "runtime_rss_mb": before})

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "run":
            pixels = np.load(command["pixels"], mmap_mode="r")
            preprocessing = Preprocessing.model_validate(command["preprocessing"])
            logits = []
            for position in range(command["start"], command["stop"]):
                logits.append(run(preprocessing.normalize(pixels[position]))[0])
                answer({"done": 1})
            np.save(command["out"], np.stack(logits))
            answer({"finished": True})
        elif command["do"] == "replay":
            inputs = np.load(command["inputs"])
            np.save(command["out"], np.concatenate([run(inputs[i : i + 1]) for i in range(len(inputs))]))
            answer({"finished": True})
        elif command["do"] == "time":
            image = np.random.default_rng(0).standard_normal(command["shape"], np.float32)
            answer({"ms": [_milliseconds(run, image) for _ in range(command["runs"])]})
        elif command["do"] == "memory":
            answer({"peak_rss_mb": peak_rss_mb()})


def _milliseconds(run: Any, image: Any) -> float:
    start = time.perf_counter()
    run(image)
    return 1000 * (time.perf_counter() - start)


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB (10^6 bytes).

    Linux: VmHWM, because ru_maxrss is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss) / 1e6


if __name__ == "__main__":
    main()
