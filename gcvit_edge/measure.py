"""Measuring a finished bundle: accuracy on other images, latency on this machine."""

import tempfile
from pathlib import Path
from typing import Any

from gcvit_edge.bundle import Bundle
from gcvit_edge.data import class_indices, decode_images, find_images
from gcvit_edge.errors import UserError
from gcvit_edge.evaluate import compare, hits, wilson_interval
from gcvit_edge.machine import cpu_name
from gcvit_edge.pipeline import timing_entry
from gcvit_edge.plan import resolve_threads
from gcvit_edge.progress import Steps
from gcvit_edge.targets.local import run_artifacts, time_artifacts


def evaluate_bundle(bundle: Bundle, data: Path, steps: Steps) -> dict[str, Any]:
    """Top-1 and top-5 of every artifact on the images of `data`; against float, where the bundle has float artifacts.

    Raises:
        UserError: no images, or class folders that are no class of the model.
    """
    images = find_images(data, "evaluation")
    classes = class_indices(images, bundle.info.labels)
    artifacts = bundle.artifacts
    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as folder:
        with steps.step("read images", len(images.files)) as advance:
            pixels = decode_images(images, bundle.info.preprocessing, Path(folder) / "pixels.npy", advance)
        with steps.step("evaluate", len(artifacts) * len(pixels.kept)) as advance:
            logits = run_artifacts(artifacts, pixels, bundle.info.preprocessing, advance)
    labels = classes[pixels.kept]
    reference = next((logits[i] for i, artifact in enumerate(artifacts) if artifact.precision == "float"), None)
    entries = []
    for artifact, answers in zip(artifacts, logits, strict=True):
        right = int(hits(answers, labels, 1).sum())
        entry: dict[str, Any] = {
            "backend": artifact.backend,
            "precision": artifact.precision,
            "top1": right / len(labels),
            "top1_ci95": wilson_interval(right, len(labels)),
            "top5": float(hits(answers, labels, 5).mean()),
        }
        if reference is not None and artifact.precision != "float":
            accuracy = compare(answers, reference, labels)
            entry |= {key: getattr(accuracy, key) for key in ("drop_points", "drop_ci95", "agreement", "sqnr_db")}
        entries.append(entry)
    return {"model": bundle.info.name, "images": len(labels), "skipped_images": list(pixels.skipped), "artifacts": entries}


def benchmark_bundle(bundle: Bundle, threads: int | None, rounds: int, steps: Steps) -> dict[str, Any]:
    """Latency, load time and memory of every artifact, each in a fresh process, rounds interleaved.

    Raises:
        UserError: no rounds or threads.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}")
    threads, artifacts = resolve_threads(threads), bundle.artifacts
    preprocessing = bundle.info.preprocessing
    with steps.step("time", rounds * len(artifacts)) as advance:
        timings = time_artifacts(artifacts, (1, len(preprocessing.mean), *preprocessing.size), threads, rounds, advance)
    entries = [
        {"backend": artifact.backend, "precision": artifact.precision, "size_bytes": artifact.size_bytes} | timing_entry(timing)
        for artifact, timing in zip(artifacts, timings, strict=True)
    ]
    return {"model": bundle.info.name, "artifacts": entries, "machine": {"cpu": cpu_name(), "threads": threads}}
