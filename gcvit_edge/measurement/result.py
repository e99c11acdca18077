"""What `benchmark` and `evaluate` say, on every target: one schema, in JSON and in Python."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gcvit_edge.artifact import Computed
from gcvit_edge.measurement.machine import Machine
from gcvit_edge.measurement.parity import Parity

FORMAT_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Latency(_Part):
    """Of one inference, batch 1, timed on the device."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    score_ms: float = Field(description="what the mode is judged by: the median in quick, p90 in single-stream")
    throughput_per_s: float = Field(description="timed inferences by the time that they took, one after the other")
    samples_ms: tuple[float, ...] = Field(description="every timed inference, in order")
    spread: float = Field(description="(p90 - p50) / p50")
    noisy: bool = Field(description="the spread is past the limit: do not trust the figures")
    warm_up_runs: int
    stable: bool = Field(description="warm-up ended because two windows agreed, not because it reached its cap")


class Accuracy(_Part):
    """On the images of `evaluate`; from drop_points on, against the float artifact on the same device, where there is one."""

    images: int
    top1: float
    top1_ci95: tuple[float, float] = Field(description="Wilson's interval")
    top5: float
    drop_points: float | None = Field(default=None, description="of top-1, in percentage points; positive is worse")
    drop_ci95: tuple[float, float] | None = Field(default=None, description="for matched pairs")
    agreement: float | None = Field(default=None, description="fraction of images with the same top class")
    agreement_ci95: tuple[float, float] | None = Field(default=None, description="Wilson's interval")
    sqnr_db: float | None = Field(default=None, description="of the logits of all images; 999 when equal")
    sqnr_ci95: tuple[float, float] | None = Field(default=None, description="of a ratio of sums over images; 999 and -999 are infinite")


class Result(_Part):
    """Of one artifact, run in one way on one device."""

    backend: str
    precision: Computed
    execution: str = Field(description="how it was run: cpu, CUDA graphs, ...")
    runtime: str
    runtime_version: str
    threads: int
    files: dict[str, int] = Field(description="bytes by name")
    load_ms: float | None = Field(description="the runtime itself loaded before; absent under emulation, like all times")
    first_ms: float | None = Field(default=None, description="first inference after loading; of benchmark")
    latency: Latency | None = Field(default=None, description="of benchmark")
    peak_rss_mb: float | None = Field(description="highest resident memory of the process, 10^6 bytes; absent under emulation")
    runtime_rss_mb: float | None = Field(description="resident memory before the artifact was loaded")
    energy_j: dict[str, float] | None = Field(
        default=None, description="joules of one inference by power rail, all that the rail feeds included; absent where none can be read"
    )
    counts: dict[str, float] = Field(default={}, description="what the target counts in one inference, such as instructions")
    parity: Parity
    accuracy: Accuracy | None = Field(default=None, description="of evaluate")

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def name(self) -> str:
        """For messages: `onnx.int8 (cpu)`."""
        return f"{self.backend}.{self.precision} ({self.execution})"


class Run(_Part):
    """One device."""

    device: str = Field(description="its name in devices.yaml, else the --target as given")
    target: str
    emulated: bool = Field(description="numbers are right or wrong here, but times would say nothing")
    machine: Machine | None = Field(description="absent if the device could not be reached")
    results: tuple[Result, ...]
    error: str | None = Field(default=None, description="what failed on the device; results are of what did not")


class Report(_Part):
    """The document that `--json` prints."""

    format_version: Literal[1] = FORMAT_VERSION
    gcvit_edge: str = Field(description="version that measured")
    finished: str = Field(description="UTC, ISO 8601")
    model: str
    mode: Literal["quick", "single-stream", "evaluate"]
    skipped_images: tuple[str, ...] = Field(default=(), description="of evaluate: images that do not decode")
    runs: tuple[Run, ...]

    @property
    def wrong(self) -> list[str]:
        """Device and artifact of every result whose parity failed, for messages."""
        return [f"{run.device}: {result.name}" for run in self.runs for result in run.results if not result.parity.passed]
