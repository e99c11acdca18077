"""A session whose artifact is held by a process that reads commands and answers in JSON lines, wherever that process runs.

The process is `_worker.py`, or any program with the same protocol. Files are float32, little endian, in C order, nothing else.
It first loads the artifact and answers

    {"load_ms": 41.3, "runtime_rss_mb": 61.0, "runtime": "onnxruntime", "runtime_version": "1.32.0"}

and then to each line of standard input, its words separated by tabs:

    infer IN OUT N C H W          {"done": 1} after each of the N images, {"finished": true} once OUT has the logits (N, classes)
    time IN UNTIMED RUNS C H W    {"ms": [8.1, ...], "joules": {"package-0": 0.4}}: one image, RUNS times, right after UNTIMED others
                                  of which nothing is said; the rails may be none
    memory                        {"peak_rss_mb": 214.5}

It ends when standard input does. When something fails it says so on standard error and ends with an exit code other than 0.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, Protocol

from gcvit_edge.errors import CheckFailed
from gcvit_edge.targets import Case, Session, Timed
from gcvit_edge.targets._timeout import patience, readable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gcvit_edge.artifact import Artifact

_INPUT, _OUTPUT = "images.f32", "logits.f32"

# of the targets that run the native runner
ETDUMP = {
    "help": "folder for an ETDump of each .pte's last timed runs, which slows them; `gcvit-edge profile --etdump` reads it",
    "benchmark": True,
    "output": True,
}


def runner_cases(artifacts: "Sequence[Artifact]", options: object) -> list[Case]:
    """What the native runner runs: the `cases` of the targets that run it."""
    return [Case(artifact, "cpu") for artifact in artifacts if artifact.backend == "executorch"]


def profile_file(folder: Path, artifact: "Artifact") -> Path:
    """Where the ETDump of an artifact goes in `folder`, which is made.

    Raises:
        CheckFailed: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckFailed(f"cannot make the folder of profiles {folder}: {error.strerror}") from error
    return folder.resolve() / f"{artifact.path.stem}.etdump"


class Folder(Protocol):
    """A folder on the device, for one session."""

    def put(self, name: str, content: bytes) -> None:
        """Writes a file."""
        ...

    def get(self, name: str) -> bytes:
        """Reads a file."""
        ...

    def path(self, name: str) -> str:
        """The file as the process there names it."""
        ...

    def remove(self) -> None:
        """Removes the folder."""
        ...


class LocalFolder:
    """A temporary folder of this machine."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gcvit-edge-")
        self._root = Path(self._folder.name)

    def put(self, name: str, content: bytes) -> None:
        (self._root / name).write_bytes(content)

    def get(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def path(self, name: str) -> str:
        return str(self._root / name)

    def remove(self) -> None:
        self._folder.cleanup()


class ProcessSession(Session):
    """The session of one such process."""

    def __init__(self, artifact: "Artifact", command: Sequence[str], folder: Folder, timeout: float | None = None) -> None:
        """Starts `command` and waits until it has loaded the artifact; `folder` is removed at the end.

        timeout: seconds for loading and for one inference; None waits for ever.

        Raises:
            CheckFailed: it ended, took too long, or answers in another protocol; the message ends with what it printed.
        """
        self.artifact, self._timeout = artifact, timeout
        self._folder, self._sent = folder, None
        self._longest: float | None = None  # seconds of an inference, of those that were timed
        self._received = b""
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        try:
            ready = self._read("load_ms", "runtime_rss_mb", "runtime", "runtime_version")
        except BaseException:
            self.close()
            raise
        self.load_ms = ready["load_ms"]
        self.runtime_rss_mb = ready["runtime_rss_mb"]
        self.runtime, self.runtime_version = ready["runtime"], ready["runtime_version"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):  # not communicate(): what it has started may hold them
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._log.close()
        self._folder.remove()

    def infer(self, images: "NDArray[np.float32]", advance: Callable[[], object]) -> "NDArray[np.float32]":
        import numpy as np

        self._command("infer", self._put(images), self._folder.path(_OUTPUT), *images.shape)
        for _ in images:
            self._read("done")
            advance()
        self._read("finished")
        logits = self._folder.get(_OUTPUT)
        if not logits or len(logits) % (4 * len(images)):
            self._fail(f"got {len(logits)} bytes of logits of {len(images)} images, expected as many float32 values of each")
        return np.frombuffer(logits, "<f4").reshape(len(images), -1).astype(np.float32)

    def time(self, image: "NDArray[np.float32]", runs: int, untimed: int = 0) -> Timed:
        self._command("time", self._put(image), untimed, runs, *image.shape[1:])
        answer = self._read("ms", "joules", inferences=untimed + runs)
        self._longest = max([self._longest or 0, *(each / 1000 for each in answer["ms"])])
        return Timed(tuple(answer["ms"]), answer["joules"])

    def peak_rss_mb(self) -> float:
        self._command("memory")
        return self._read("peak_rss_mb")["peak_rss_mb"]

    def _put(self, images: "NDArray[np.float32]") -> str:
        """The file of these images on the device, sent unless they are the ones sent last."""
        if images is not self._sent:
            self._folder.put(_INPUT, images.astype("<f4", copy=False).tobytes())
            self._sent = images
        return self._folder.path(_INPUT)

    def _command(self, *words: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(("\t".join(map(str, words)) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail(self._ending(self._process.wait()))

    def _read(self, *keys: str, inferences: int = 1) -> dict[str, Any]:
        """The next answer, which has these keys, to what so many inferences are needed for."""
        line = self._line(None if self._timeout is None else patience(self._timeout, inferences, self._longest))
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() >= set(keys):
            self._fail(f"got {line[:200].decode(errors='replace')!r}, expected an answer of the runner with {', '.join(keys)}")
        return answer

    def _line(self, seconds: float | None) -> bytes:
        assert self._process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._received:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            if left == 0 or not readable(self._process.stdout, left):
                self._fail(f"no answer within {seconds:.0f} s; give it longer with --timeout")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                self._fail(self._ending(self._process.wait()))
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _fail(self, reason: str) -> NoReturn:
        raise CheckFailed(f"{self.artifact.path.name} does not run in {self.artifact.backend} ({reason}):\n{self._printed()}")

    def _printed(self) -> str:
        """The last lines that it printed for people."""
        self._log.seek(0)
        return "".join(self._log.readlines()[-15:])

    def _ending(self, code: int) -> str:
        """What an exit code means; 137 is a shell's word for a child that was killed."""
        return "process was killed, perhaps for want of memory" if code in (-9, 137) else f"process ended with {code}"
