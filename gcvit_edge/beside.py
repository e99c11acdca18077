"""Float artifacts of all backends, made by another process while this one makes the quantized ones.

Exporters use one thread, so two cores have both in the time of one. The process is a fresh one, not a fork, which OpenMP's threads do not
survive: `python -m gcvit_edge.beside CHECKPOINT FOLDER LIST BACKEND...` writes the artifacts below FOLDER and their names into LIST.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.artifact import Artifact
from gcvit_edge.errors import CheckFailed

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.model.info import ModelInfo


class FloatArtifacts:
    """The process and what it makes."""

    def __init__(self, model: "GCViT", info: "ModelInfo", names: Sequence[str], folder: Path, work: Path) -> None:
        """Starts the process. folder: where the artifacts go, as a bundle has them. work: for files of its own."""
        from gcvit_edge.model.checkpoint import save_checkpoint

        checkpoint, self._list = work / "beside.safetensors", work / "beside.json"
        save_checkpoint(model, info, checkpoint, half=False)
        self._folder = folder
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by close()
        files = (str(path.resolve()) for path in (checkpoint, folder, self._list))
        # -P: nothing is imported from the current folder, which may hold an onnx.py of the user's own
        command = [sys.executable, "-P", "-m", "gcvit_edge.beside", *files, *names]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def wait(self) -> list[Artifact]:
        """Waits for the artifacts; they are in the order of the backends.

        Raises:
            CheckFailed: one could not be made; the message ends with what the process printed.
        """
        if self._process.wait() != 0:
            self._log.seek(0)
            printed = "\n".join(self._log.read().splitlines()[-12:])
            raise CheckFailed(f"the float artifacts could not be made (exit code {self._process.returncode}):\n{printed}")
        artifacts = []
        for name, relative in json.loads(self._list.read_text()).items():
            files = tuple(self._folder / file for file in relative)
            artifacts.append(Artifact(name, "float", files[0], files))
        return artifacts

    def close(self) -> None:
        """Ends the process, whether it is done or not."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def main() -> None:
    from gcvit_edge.lower import lower_float
    from gcvit_edge.model.create import load_model

    checkpoint, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[4:]
    model, info = load_model(checkpoint)
    made = {name: lower_float(name, model, info, folder).files for name in names}
    listed = {name: [file.relative_to(folder).as_posix() for file in files] for name, files in made.items()}
    Path(sys.argv[3]).write_text(json.dumps(listed))


if __name__ == "__main__":
    main()
