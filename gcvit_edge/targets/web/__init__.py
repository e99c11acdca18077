"""ONNX Runtime Web in this machine's browser: each artifact in a page of its own, in a browser of its own."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.targets import Case, Connection, Timed
from gcvit_edge.targets import Session as BaseSession
from gcvit_edge.targets._energy import Rapl
from gcvit_edge.targets._timeout import DEFAULT_SECONDS, TIMEOUT, check_timeout, patience
from gcvit_edge.targets.web._browser import Browser, browser_version, find_browser
from gcvit_edge.targets.web._runtime import missing_runtime, runtime_files
from gcvit_edge.targets.web._server import PageServer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gcvit_edge.artifact import Artifact
    from gcvit_edge.measurement.machine import Machine

HELP = "ONNX Runtime Web (WASM, SIMD, threads) in the Chromium or Firefox of this machine, web:BROWSER for one of several; runs onnx"
ADDRESS = "optional"
MEASURES_TIME = True

_PAGE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """timeout: also for the browser to start."""

    timeout: int = field(default=DEFAULT_SECONDS, metadata=TIMEOUT)


def missing(address: str) -> str | None:
    try:
        find_browser(address)
    except UserError as error:
        return str(error)
    return missing_runtime()


def cases(artifacts: "Sequence[Artifact]", options: Options) -> list[Case]:
    return [Case(artifact, "wasm") for artifact in artifacts if artifact.backend == "onnx"]


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    check_timeout(options.timeout)
    path = find_browser(address)
    yield Web(path, browser_version(path), options.timeout)


@dataclass(frozen=True)
class Web(Connection):
    """A browser of this machine. path: its program. version: name and version. timeout: seconds."""

    path: str
    version: str
    timeout: float

    def machine(self) -> "Machine":
        from gcvit_edge.measurement.machine import this_machine

        here = this_machine()
        return here.model_copy(update={"system": f"{here.system}, {self.version}"})

    def open(self, case: Case, threads: int, *, pinned: bool) -> "Session":
        """Never pinned: a browser has processes of its own, which would then wait for the threads that are timed."""
        return Session(case.artifact, self, threads)


class Session(BaseSession):
    """One artifact in one page. load_ms is without the transfer to the page."""

    runtime = "onnxruntime-web"

    def __init__(self, artifact: "Artifact", web: Web, threads: int) -> None:
        """Starts the browser and loads the artifact.

        Raises:
            CheckFailed: the browser or the runtime cannot do it; the message ends with what they printed.
        """
        self._name, self._web = artifact.path.name, web
        self._longest: float | None = None  # seconds of an inference so far, warm-up included
        page = {name: _PAGE / name for name in ("page.html", "page.js")}
        self._open = ExitStack()
        try:
            self._server = PageServer({**page, **runtime_files(), "model.onnx": artifact.path})
            self._open.callback(self._server.close)
            self._browser = Browser(web.path, f"{self._server.url}?threads={threads}")
            self._open.callback(self._browser.close)
            self.runtime_version = self._answer()["version"]
            self.runtime_rss_mb = self._browser.peak_rss_mb()
            self.load_ms = self._command("load")["load_ms"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open.close()

    def infer(self, images: "NDArray[np.float32]", advance: Callable[[], object]) -> "NDArray[np.float32]":
        import numpy as np

        self._server.images = images.astype("<f4")
        self._server.commands.put(("infer", {"count": len(images), "shape": images.shape[1:]}))
        logits = []
        for _ in images:
            logits.append(np.frombuffer(self._read(self._web.timeout), "<f4"))
            advance()
        return np.stack(logits).astype(np.float32)

    def time(self, image: "NDArray[np.float32]", runs: int, untimed: int = 0) -> Timed:
        self._server.images = image.astype("<f4")
        energy = Rapl()
        counters = energy.read()
        ms = self._command("time", runs=untimed + runs, shape=image.shape[1:])["ms"]
        self._longest = max([self._longest or 0, *(each / 1000 for each in ms)])
        timed = ms[untimed:]
        return Timed(tuple(timed), {rail: used * sum(timed) / sum(ms) for rail, used in energy.since(counters).items()})

    def peak_rss_mb(self) -> float:
        return self._browser.peak_rss_mb()

    def _command(self, name: str, **values: Any) -> dict[str, Any]:
        self._server.commands.put((name, values))
        return self._answer(values.get("runs", 1))

    def _answer(self, inferences: int = 1) -> dict[str, Any]:
        answer = self._read(patience(self._web.timeout, inferences, self._longest))
        return answer if isinstance(answer, dict) else self._fail("it posted logits that were not asked for")

    def _read(self, seconds: float) -> Any:
        """What the page posts next: a dict, or logits as bytes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                answer = self._server.answers.get(timeout=0.2)
            except queue.Empty:
                if self._browser.exit_code is not None:
                    self._fail(f"the browser ended with {self._browser.exit_code}")
                continue
            if isinstance(answer, dict) and "error" in answer:
                self._fail(answer["error"])
            return answer
        self._fail(f"the page did not answer within {seconds:.0f} s; give it longer with --timeout, or try another browser as web:BROWSER")

    def _fail(self, reason: str) -> NoReturn:
        printed = self._browser.log()
        raise CheckFailed(f"{self._name} does not run in {self._web.version}: {reason}" + (f"\n{printed}" if printed else ""))
