"""Targets: where artifacts run and are timed; one module each, the file name is the registry.

A target is a module with the members of `Target`. It connects to a device and loads artifacts there; a `Session`, an artifact
that is loaded, answers images and times itself. What is the same everywhere (warm-up, modes, parity, accuracy, the result) is
written once, in `timing.py` and `measure.py`. A target imports nothing heavy at the top: the command line reads the `Options`
of every target to make its flags.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar, cast

import gcvit_edge.targets as _package
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.registry import load_module, module_names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gcvit_edge.artifact import Artifact
    from gcvit_edge.data import Pixels, Preprocessing
    from gcvit_edge.measurement.machine import Machine
    from gcvit_edge.measurement.parity import Arithmetic

CHUNK_BYTES = 20_000_000  # of images, sent to the device at a time: 33 at 224 px; small boards have room for two


def target_names() -> list[str]:
    """All targets, available here or not."""
    return module_names(_package)


def load_target(name: str) -> "Target":
    """The target module `name`.

    Raises:
        UserError: unknown name (the message names the nearest one).
    """
    return cast(Target, load_module(_package, "target", name))


def parse_target(text: str) -> tuple[str, str]:
    """Name and address of a target written `NAME` or `NAME:ADDRESS`, such as `ssh:pi@board`; no address is "".

    Raises:
        UserError: unknown target, or an address where the target takes none, or none where it needs one.
    """
    name, colon, address = text.partition(":")
    target = load_target(name)
    if target.ADDRESS == "required" and not address:
        raise UserError(f"target {name!r} needs an address: {name}:ADDRESS; {target.HELP}")
    if colon and (target.ADDRESS == "none" or not address):
        raise UserError(f"target {text!r}: {name} takes no address; write {name}" if address else f"target {text!r} ends with a colon")
    return name, address


@dataclass(frozen=True)
class Case:
    """One way to run one artifact, a line of the result. execution: how, such as "cpu" or "CUDA graphs".

    arithmetic: what it computes in, where that is less exact than its precision. golden: the artifact of the bundle whose golden
    logits it must reproduce, where it is none of the bundle itself.
    """

    artifact: "Artifact"
    execution: str
    arithmetic: "Arithmetic | None" = None
    golden: "Artifact | None" = None

    @property
    def name(self) -> str:
        """For messages: `onnx.int8 (cpu)`."""
        return f"{self.artifact.name} ({self.execution})"


@dataclass(frozen=True)
class Timed:
    """ms: of each inference. joules: used meanwhile by each power rail that can be told for just that time; empty if none can."""

    ms: tuple[float, ...]
    joules: dict[str, float]


class Session(ABC):
    """An artifact loaded on a device, batch 1; leaving the context frees it.

    runtime, runtime_version: what runs it. load_ms: time to load it, the runtime itself loaded before. runtime_rss_mb: resident
    memory (10^6 bytes) before that.
    """

    runtime: str
    runtime_version: str
    load_ms: float
    runtime_rss_mb: float

    @abstractmethod
    def infer(self, images: "NDArray[np.float32]", advance: Callable[[], object]) -> "NDArray[np.float32]":
        """Logits (N, classes) float32 of the network inputs (N, C, H, W) float32; calls `advance` after each image.

        Raises:
            CheckFailed: the device does not run it; the message ends with what the runtime printed.
        """

    @abstractmethod
    def time(self, image: "NDArray[np.float32]", runs: int, untimed: int = 0) -> Timed:
        """Runs one input (1, C, H, W) float32 `runs` times, timed on the device itself, right after `untimed` times that are not.

        Raises:
            CheckFailed: as `infer`.
        """

    @abstractmethod
    def peak_rss_mb(self) -> float:
        """Highest resident memory of the process (all, where it is several) so far, in MB (10^6 bytes)."""

    def counts(self, image: "NDArray[np.float32]") -> dict[str, float]:
        """What the target counts in one inference of `image` (1, C, H, W), by name, such as instructions; usually nothing."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Frees the artifact, its process and its files on the device."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except CheckFailed:
            if error is None or isinstance(error, Exception):
                raise  # else it would hide an interruption

    def run(
        self, pixels: "Pixels", preprocessing: "Preprocessing", start: int, stop: int, advance: Callable[[], object]
    ) -> "NDArray[np.float32]":
        """Logits (stop - start, classes) of the images from `start` to `stop`, sent in chunks; calls `advance` after each."""
        import numpy as np

        images, logits = pixels.load(), []
        count = chunk_images(preprocessing)
        for first in range(start, stop, count):
            chunk = images[first : min(first + count, stop)]
            logits.append(self.infer(np.concatenate([preprocessing.normalize(image) for image in chunk]), advance))
        return np.concatenate(logits)


def chunk_images(preprocessing: "Preprocessing") -> int:
    """Images that are sent to a device at a time."""
    height, width = preprocessing.size
    return max(1, CHUNK_BYTES // (4 * 3 * height * width))


MOST_AT_ONCE = 64  # sessions; each is a process with a runtime in it

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Hold = Callable[[Session], AbstractContextManager[Session]]


def side_by_side(work: Callable[[Job, Hold], Answer], jobs: Sequence[Job], at_once: int) -> list[Answer]:
    """`work` of every job, so many at the same time, but at most `MOST_AT_ONCE`. It enters its session by the function that it is given,
    which closes it at the end.

    Whatever ends this early, an interruption too, closes all sessions at once: threads that wait for an answer of one end then.
    """
    if at_once == 1:  # without a thread, an interruption ends what is being loaded too
        return [work(job, lambda session: session) for job in jobs]
    held: set[Session] = set()  # who takes a session out closes it
    ended = Event()

    @contextmanager
    def hold(session: Session) -> Iterator[Session]:
        held.add(session)
        try:
            if ended.is_set():  # while it was loaded
                raise CancelledError
            yield session
        finally:
            with suppress(KeyError):
                held.remove(session)
                session.close()

    with ThreadPoolExecutor(min(at_once, MOST_AT_ONCE)) as pool:
        try:
            answers = [pool.submit(work, job, hold) for job in jobs]
            for done in wait(answers, return_when=FIRST_EXCEPTION).done:
                done.result()  # raises what failed first, while others still run
            return [answer.result() for answer in answers]
        except BaseException:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while held:
                with suppress(Exception):  # or it would hide what ended this
                    held.pop().close()
            raise


class Connection(ABC):
    """A device that can be reached. side_by_side: artifacts that accuracy may be measured of at the same time, one thread each."""

    side_by_side: int = 1

    @abstractmethod
    def machine(self) -> "Machine":
        """What the device is, read now; `cpus` is the default number of threads."""

    @abstractmethod
    def open(self, case: Case, threads: int, *, pinned: bool) -> Session:
        """Loads an artifact in a fresh process. pinned: it is timed, so keep it on `threads` CPUs if the device can do that.

        Raises:
            CheckFailed: the runtime cannot load it; the message ends with what the runtime printed.
        """


class Target(Protocol):
    """What a target module has."""

    HELP: str
    """What it is, and what it can run, in one line."""

    ADDRESS: Literal["none", "optional", "required"]
    """Whether something follows the name and a colon in `--target`."""

    MEASURES_TIME: bool
    """False for emulation, whose time says nothing: results then have no latency, load time or energy."""

    Options: ClassVar[type[Any]]
    """Frozen dataclass of the target's own options, all with defaults and a `help` in their metadata. Each is a key in
    devices.yaml and a flag of `benchmark` and `evaluate`; str, int, Path or bool. Metadata of some: `benchmark`, no flag of
    `evaluate`; `output`, a folder that is written, in which every device has its own, by its name."""

    def missing(self, address: str) -> str | None:
        """What is missing on this machine and how to install it; None if the target can be used. address: as for `connect`, "" for any."""
        ...

    def cases(self, artifacts: "Sequence[Artifact]", options: Any) -> list[Case]:
        """Every way in which this target runs these artifacts of a bundle, in the order of the result."""
        ...

    def connect(self, address: str, options: Any) -> AbstractContextManager[Connection]:
        """Connects; leaving the context removes what was put on the device.

        Raises:
            UserError: the device cannot be reached; the message says what to check.
        """
        ...
