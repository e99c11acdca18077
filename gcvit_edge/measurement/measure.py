"""Measuring a finished bundle on devices: latency, accuracy, and in either case whether the answers are right."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gcvit_edge import __version__
from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.data import Pixels, class_indices, decode_images, find_images
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import Classes, Logits, check_baseline, compare, hits, wilson_interval
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.result import Accuracy, Latency, Report, Result, Run
from gcvit_edge.measurement.timing import Mode, Timing, time_sessions
from gcvit_edge.progress import Advance, Steps
from gcvit_edge.targets import Case, Connection, Hold, Session, chunk_images, load_target, side_by_side


@dataclass(frozen=True)
class _Site:
    """A connected device. emulated: time says nothing there. failures: of cases there, in words."""

    device: Device
    connection: Connection
    threads: int
    emulated: bool
    failures: list[str]

    def note(self, case: Case, error: CheckFailed) -> None:
        """A case failed."""
        self.failures.append(f"{case.name}: {error}")

    @contextmanager
    def noted(self, case: Case) -> Iterator[None]:
        """What fails inside is the failure of this case, and ends nothing else."""
        try:
            yield
        except CheckFailed as error:
            self.note(case, error)


_Measure = Callable[[_Site, list[Case]], list[Result]]


class Interrupted(KeyboardInterrupt):
    """An interruption after some of several devices were done. report: theirs."""

    def __init__(self, report: Report) -> None:
        done = ", ".join(run.device for run in report.runs)
        super().__init__(f"interrupted; the results are those of {done}, done before")
        self.report = report


def benchmark_bundle(bundle: Bundle, devices: Sequence[Device], mode: Mode, steps: Steps, backends: Sequence[str] | None = None) -> Report:
    """Latency, load time, memory and parity of every artifact on every device, one device after the other.

    backends: None is all. An artifact whose answers are wrong is in the report like any other: see `Report.wrong`.

    Raises:
        UserError: a device cannot be reached or can run nothing of the bundle. Of several devices, see `Run.error`.
        CheckFailed: an artifact was changed, or none runs on the device. Of several devices, or if only some do not run, see `Run.error`.
        Interrupted: a KeyboardInterrupt that has the results of the devices that were done before.
    """

    def measure(site: _Site, cases: list[Case]) -> list[Result]:
        groups = [cases] if mode.together and not site.emulated else [[case] for case in cases]
        with steps.step(f"{site.device.name}: time", mode.turns * len(cases), timed=not site.emulated) as advance:
            return [result for group in groups for result in _time(bundle, site, group, mode, advance)]

    return _measured(bundle, mode.name, devices, _artifacts(bundle, backends), measure)


def evaluate_bundle(
    bundle: Bundle,
    devices: Sequence[Device],
    data: Path,
    steps: Steps,
    backends: Sequence[str] | None = None,
    eval_images: int | None = None,
) -> Report:
    """Top-1 and top-5 of every artifact on the images of `data`, on every device; against float, where the bundle has it.

    eval_images: how many of them, spread evenly over the classes; by default all.

    Raises:
        UserError: no images, or class folders that are no class of the model; and as `benchmark_bundle`.
        CheckFailed, Interrupted: as `benchmark_bundle`.
    """
    artifacts = _artifacts(bundle, backends)
    images = find_images(data, "evaluation")
    classes = class_indices(images, bundle.info.labels)  # of all, to refuse a folder of which none would be chosen
    if eval_images is not None:
        images = images.some(eval_images, seed=0)  # as recipes have it: the images that `quantize` takes
        classes = class_indices(images, bundle.info.labels)
    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as folder:
        with steps.step("read images", len(images.files)) as advance:
            pixels = decode_images(images, bundle.info.preprocessing, Path(folder) / "pixels.npy", advance)

        def measure(site: _Site, cases: list[Case]) -> list[Result]:
            with steps.step(f"{site.device.name}: evaluate", len(cases) * len(pixels.kept)) as advance:
                return _evaluate(bundle, site, cases, pixels, classes[pixels.kept], advance)

        return _measured(bundle, "evaluate", devices, artifacts, measure, pixels.skipped)


def _measured(
    bundle: Bundle, mode: Any, devices: Sequence[Device], artifacts: list[Artifact], measure: _Measure, skipped: Sequence[str] = ()
) -> Report:
    """The report of all devices, one after the other.

    Raises:
        Interrupted: some were done before.
    """
    runs: list[Run] = []

    def report() -> Report:
        return Report(
            gcvit_edge=__version__, finished=datetime.now(UTC).isoformat(timespec="seconds"), model=bundle.info.name, mode=mode,
            skipped_images=tuple(skipped), runs=tuple(runs),
        )  # fmt: skip

    try:
        for device in devices:
            runs.append(_run(device, artifacts, measure, alone=len(devices) == 1))
    except KeyboardInterrupt as interruption:
        if not runs:
            raise
        raise Interrupted(report()) from interruption
    return report()


def _artifacts(bundle: Bundle, backends: Sequence[str] | None) -> list[Artifact]:
    """The artifacts of these backends.

    Raises:
        UserError: the bundle has none of one of them.
        CheckFailed: one of them was changed after the bundle was made.
    """
    for backend in backends or ():
        bundle.artifact(backend)
    artifacts = [artifact for artifact in bundle.artifacts if not backends or artifact.backend in backends]
    for artifact in artifacts:
        bundle.verify_artifact(artifact)
    return artifacts


def _run(device: Device, artifacts: list[Artifact], measure: _Measure, *, alone: bool) -> Run:
    """A device's part of the report; what fails goes into it instead of ending everything, unless it is `alone` and all of it fails."""
    target = load_target(device.target)
    emulated = not target.MEASURES_TIME
    machine, results, failures = None, [], []
    try:
        cases = target.cases(artifacts, device.options)
        if not cases:
            raise UserError(f"{device.name} runs nothing of {', '.join(a.name for a in artifacts)}; {device.target}: {target.HELP}")
        with target.connect(device.address, device.options) as connection:
            machine = connection.machine()
            threads = device.threads or machine.cpus
            if threads > machine.cpus:
                raise UserError(f"{device.name} has {machine.cpus} CPUs, fewer than the {threads} threads asked for; give at most so many")
            results = measure(_Site(device, connection, threads, emulated, failures), cases)
    except (UserError, CheckFailed) as error:
        if alone and not results:
            raise
        failures.append(str(error))
    failure = "\n".join(failures) or None
    if alone and not results:
        raise CheckFailed(failure)
    return Run(device=device.name, target=device.target, emulated=emulated, machine=machine, results=tuple(results), error=failure)


def _load(site: _Site, cases: list[Case], stack: ExitStack, *, pinned: bool) -> list[tuple[Case, Session]]:
    """The sessions of those cases that can be loaded, all at the same time, until `stack` closes them."""
    loaded: list[tuple[Case, Session]] = []
    for case in cases:
        with site.noted(case):
            session = site.connection.open(case, site.threads, pinned=pinned)
            stack.enter_context(site.noted(case))  # closing it may fail, which must not lose results
            loaded.append((case, stack.enter_context(session)))
    return loaded


def _time(bundle: Bundle, site: _Site, cases: list[Case], mode: Mode, advance: Advance) -> list[Result]:
    """Times the cases together, in turns; without those that cannot be loaded."""
    image = bundle.golden_input()[:1]
    results: list[Result] = []
    with ExitStack() as stack:
        loaded = _load(site, cases, stack, pinned=True)
        if site.emulated:
            for case, session in loaded:
                with site.noted(case):
                    result = _result(bundle, site, case, session, site.threads)
                    results.append(result.model_copy(update={"counts": session.counts(image)}))
            return results
        try:
            timings = time_sessions([session for _, session in loaded], image, site.threads, mode, advance)
        except CheckFailed as error:
            if len(loaded) == 1:
                site.note(loaded[0][0], error)
                return []
        else:
            for (case, session), timing in zip(loaded, timings, strict=True):
                with site.noted(case):
                    results.append(_result(bundle, site, case, session, site.threads).model_copy(update=_timed(timing, mode)))
            return results
    # one of them failed: each alone, which shows whose failure it was
    return [result for case, _ in loaded for result in _time(bundle, site, [case], mode, advance)]


def _timed(timing: Timing, mode: Mode) -> dict[str, Any]:
    """What a timing adds to a result."""
    latency = Latency(
        p50_ms=round(timing.percentile(50), 4),
        p90_ms=round(timing.percentile(90), 4),
        p99_ms=round(timing.percentile(99), 4),
        score_ms=round(timing.percentile(mode.score), 4),
        throughput_per_s=round(1000 * len(timing.samples) / sum(timing.samples), 3),
        samples_ms=tuple(round(ms, 4) for ms in timing.samples),
        spread=round(timing.spread, 4),
        noisy=timing.noisy,
        warm_up_runs=timing.warm_up_runs,
        stable=timing.stable,
    )
    energy = {rail: round(joules / len(timing.samples), 6) for rail, joules in timing.joules.items()}
    return {"first_ms": round(timing.first_ms, 4), "latency": latency, "energy_j": energy or None}


def _evaluate(bundle: Bundle, site: _Site, cases: list[Case], pixels: Pixels, labels: Classes, advance: Advance) -> list[Result]:
    """Runs the cases on all images, side by side where the device takes several."""
    answer_all = _answers_in_turn if site.connection.side_by_side == 1 else _answers_side_by_side
    answers = answer_all(bundle, site, cases, pixels, advance)
    references = _references(site, answers, labels)
    other = next(iter(references.values()), None)
    return [
        result.model_copy(
            update={"accuracy": _accuracy(logits, None if result.precision == "float" else references.get(result.backend, other), labels)}
        )
        for result, logits in answers
    ]


def _answers_side_by_side(bundle: Bundle, site: _Site, cases: list[Case], pixels: Pixels, advance: Advance) -> list[tuple[Result, Logits]]:
    """Result and logits of each case that runs, so many at the same time as the device takes, one thread each."""

    def answer(case: Case, hold: Hold) -> tuple[Result, Logits] | None:
        answered = None
        with site.noted(case), hold(site.connection.open(case, 1, pinned=False)) as session:
            logits = session.run(pixels, bundle.info.preprocessing, 0, len(pixels.kept), advance)
            answered = _result(bundle, site, case, session, 1), logits
        return answered  # though closing the session may have failed

    answers = side_by_side(answer, cases, site.connection.side_by_side)
    return [answered for answered in answers if answered is not None]


def _answers_in_turn(bundle: Bundle, site: _Site, cases: list[Case], pixels: Pixels, advance: Advance) -> list[tuple[Result, Logits]]:
    """The same, one at a time, all of them on some images before any is on the next: where images are sent, once is enough."""
    with ExitStack() as stack:
        running: list[tuple[Case, Session, list[Logits]]] = [(*each, []) for each in _load(site, cases, stack, pinned=False)]
        count = chunk_images(bundle.info.preprocessing)
        for start in range(0, len(pixels.kept), count):
            running, before = [], running
            for case, session, logits in before:
                with site.noted(case):
                    stop = min(start + count, len(pixels.kept))
                    logits.append(session.run(pixels, bundle.info.preprocessing, start, stop, advance))
                    running.append((case, session, logits))
        answers = []
        for case, session, logits in running:
            with site.noted(case):
                answers.append((_result(bundle, site, case, session, site.threads), np.concatenate(logits)))
    return answers


def _references(site: _Site, answers: Sequence[tuple[Result, Logits]], labels: Classes) -> dict[str, Logits]:
    """By backend the float logits that its others are compared with, if there are any of either; of wrong answers, which the report says
    anyway, none, nor of ones that are no baseline, which is a failure."""
    floats = [(result, logits) for result, logits in answers if result.precision == "float"]
    references: dict[str, Logits] = {}
    for result, logits in floats if len(floats) < len(answers) else ():
        if result.backend in references or not result.parity.passed:
            continue
        try:
            check_baseline(logits, labels)
        except CheckFailed as error:
            site.failures.append(f"{result.name}: {error}")
        else:
            references[result.backend] = logits
    return references


def _accuracy(logits: Logits, reference: Logits | None, labels: Classes) -> Accuracy:
    right, against = int(hits(logits, labels, 1).sum()), None
    if reference is not None:
        against = compare(logits, reference, labels)
    return Accuracy(
        images=len(labels),
        top1=right / len(labels),
        top1_ci95=wilson_interval(right, len(labels)),
        top5=float(hits(logits, labels, 5).mean()),
        drop_points=against and against.drop_points,
        drop_ci95=against and against.drop_ci95,
        agreement=against and against.agreement,
        agreement_ci95=against and against.agreement_ci95,
        sqnr_db=against and against.sqnr_db,
        sqnr_ci95=against and against.sqnr_ci95,
    )


def _result(bundle: Bundle, site: _Site, case: Case, session: Session, threads: int) -> Result:
    """What every result has: the artifact, its parity, and what loading it took."""
    artifact = case.artifact
    golden = session.infer(bundle.golden_input(), lambda: None)
    return Result(
        backend=artifact.backend,
        precision=artifact.precision,
        execution=case.execution,
        runtime=session.runtime,
        runtime_version=session.runtime_version,
        threads=threads,
        files={file.name: file.stat().st_size for file in artifact.files},
        load_ms=None if site.emulated else round(session.load_ms, 2),
        peak_rss_mb=None if site.emulated else round(session.peak_rss_mb(), 1),
        runtime_rss_mb=None if site.emulated else round(session.runtime_rss_mb, 1),
        parity=bundle.parity(case, golden),
    )
