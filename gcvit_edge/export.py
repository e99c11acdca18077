"""Float export without quantization: the deploy form in every runtime, checked against PyTorch, as a bundle."""

import builtins
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import backend_names, load_backend
from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.bundle.manifest import GOLDEN_IMAGES
from gcvit_edge.bundle.output import staged_bundle
from gcvit_edge.bundle.pack import pack
from gcvit_edge.cpus import resolve_threads
from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import CheckFailed
from gcvit_edge.lower import lower_float
from gcvit_edge.measurement.accuracy import Logits, finite_db, sqnr_db
from gcvit_edge.measurement.machine import cpu_name
from gcvit_edge.measurement.parity import MIN_SQNR_DB
from gcvit_edge.model.variants import check_takes_rgb
from gcvit_edge.plan import bundle_path, sample_weights
from gcvit_edge.progress import Steps
from gcvit_edge.targets.local import TIMED_ROUNDS, Session, time_artifacts


def export_float(
    model: str | None = None,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
    backends: Sequence[str] | None = None,
    output: str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    zip: bool = False,
    steps: Steps | None = None,
) -> Bundle:
    """Exports a trained model in float32 for every backend, checks that each runtime agrees with PyTorch, packs a bundle.

    The arguments are those of `quantize`.

    Raises:
        UserError: bad input; nothing was written.
        CheckFailed: an artifact disagrees with PyTorch; nothing was written.
    """
    import torch

    from gcvit_edge.model.create import load_model

    threads = resolve_threads(threads)
    names = list(dict.fromkeys(backends or backend_names()))
    for name in names:
        load_backend(name)
    network, info = load_model(
        str(weights or sample_weights(model)), model, num_classes=num_classes, labels=labels, preprocessing=preprocessing
    )
    check_takes_rgb(network.config)
    path = bundle_path(output, f"{info.name}.float", zip)
    steps = steps or Steps()
    shape = (GOLDEN_IMAGES, network.config.in_chans, *network.config.img_size)
    golden = np.random.default_rng(0).standard_normal(shape, np.float32)
    with staged_bundle(path, force) as stage:
        with torch.no_grad():
            expected = network(torch.from_numpy(golden)).numpy()
        answers: dict[Artifact, Logits] = {}
        entries: list[dict[str, Any]] = []
        for name in names:
            with steps.step(f"{name}: export float"):
                artifact = lower_float(name, network, info, stage)
            with Session(artifact, threads) as session:
                answers[artifact] = session.infer(golden, lambda: None)
            parity = finite_db(sqnr_db(answers[artifact], expected))
            if parity < MIN_SQNR_DB["float"]:
                raise CheckFailed(
                    f"{artifact.name} disagrees with PyTorch: {parity:.1f} dB, expected {MIN_SQNR_DB['float']:.0f} dB or more"
                )
            entries.append(
                {
                    "backend": name,
                    "precision": "float",
                    "file": artifact.path.relative_to(stage).as_posix(),
                    "size_bytes": artifact.size_bytes,
                    "parity_db": round(parity, 1),
                }
            )
        with steps.step("time", TIMED_ROUNDS * len(answers), timed=True) as advance:
            timings = time_artifacts(list(answers), (1, *shape[1:]), threads, TIMED_ROUNDS, advance)
        report = {
            "model": info.name,
            "recipe": None,
            "images": 0,
            "artifacts": [entry | timing.report() for entry, timing in builtins.zip(entries, timings, strict=True)],
            "machine": {"cpu": cpu_name(), "threads": threads, "system": platform.platform(terse=True)},
            "seconds": {name: round(seconds, 2) for name, seconds in steps.seconds.items()},
        }
        pack(stage, info, answers, golden, report, None)
    return open_bundle(path)
