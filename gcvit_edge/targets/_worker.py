"""A fresh Python process that holds one artifact: `python -m gcvit_edge.targets._worker BACKEND FILE THREADS [CPU,CPU...]`.

Its protocol is that of `_process.py`. The CPUs are those that it is pinned to. Answers go to what was standard output when
it started; whatever the runtime prints goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gcvit_edge.backends import Runner, load_backend, package_version
from gcvit_edge.targets._energy import Rapl


def main() -> None:
    name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:  # before the runtime is imported: it counts the CPUs that it may use then
        os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[4].split(",")})
    backend = load_backend(name)
    serve(backend.import_runtime, lambda: backend.load(path, threads))


def serve(import_runtime: Callable[[], str], load: Callable[[], Runner]) -> None:
    """Imports the runtime, which gives its name, loads an artifact, and does what the lines of standard input say."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    runtime = import_runtime()
    before = peak_rss_mb()
    start = time.perf_counter()
    run = load()
    load_ms = 1000 * (time.perf_counter() - start)
    answer({"load_ms": load_ms, "runtime_rss_mb": before, "runtime": runtime, "runtime_version": package_version(runtime)})

    energy = Rapl()
    for line in sys.stdin:
        match line.rstrip("\n").split("\t"):
            case "infer", source, target, *shape:
                count, *size = map(int, shape)
                logits = []
                with open(source, "rb") as file:  # one at a time: the peak of memory is to be the model's
                    for _ in range(count):
                        logits.append(run(np.fromfile(file, "<f4", prod(size)).reshape((1, *size))))
                        answer({"done": 1})
                np.concatenate(logits).astype("<f4").tofile(target)
                answer({"finished": True})
            case "time", source, untimed, runs, *shape:
                image = np.fromfile(source, "<f4").reshape((1, *map(int, shape)))
                for _ in range(int(untimed)):
                    run(image)
                counters = energy.read()
                ms = [_milliseconds(run, image) for _ in range(int(runs))]
                answer({"ms": ms, "joules": energy.since(counters)})
            case ["memory"]:
                answer({"peak_rss_mb": peak_rss_mb()})
            case words:
                raise ValueError(f"unknown command {words}")


def _milliseconds(run: Any, image: Any) -> float:
    start = time.perf_counter()
    run(image)
    return 1000 * (time.perf_counter() - start)


def peak_rss_mb(pid: int | None = None) -> float:
    """Highest resident memory so far of a process (None: this one), in MB (10^6 bytes).

    Linux: VmHWM, because ru_maxrss is inherited from the process that started this one.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import psutil

    info = psutil.Process(pid).memory_info()
    return getattr(info, "peak_wset", info.rss) / 1e6


if __name__ == "__main__":
    main()
