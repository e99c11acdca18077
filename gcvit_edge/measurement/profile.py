"""Where an artifact's time goes: operators as the runtime runs them, and a verdict in words."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gcvit_edge.artifact import Precision
from gcvit_edge.errors import UserError

if TYPE_CHECKING:
    from gcvit_edge.bundle import Bundle
    from gcvit_edge.progress import Steps

Kind = Literal["matrix", "quantization", "layout", "other"]
KINDS: dict[Kind, str] = {
    "matrix": "linears, convolutions, attention",
    "quantization": "rounding to integers and back",
    "layout": "transposes, reorders, reshapes",
    "other": "norms, softmax, GELU, additions and the like",
}
RUNS = 30


@dataclass(frozen=True)
class Operator:
    """One operator of a compiled artifact. operator: the runtime's name of its kind. ms: median over runs. integer: its products are
    in INT8. delegated: inside a delegate, or run by the one execution provider there is."""

    name: str
    operator: str
    kind: Kind
    ms: float
    integer: bool = False
    delegated: bool = True


def profile_bundle(bundle: "Bundle", backend: str, threads: int | None, etdump: Path | None, steps: "Steps") -> dict[str, Any]:
    """Operators of a backend's artifacts by time, and a verdict. etdump: read this profile, of any device, instead of running them here;
    such a file does not say how many threads there were, nor of what precision it is, unless its name does (`profile_file`).

    Raises:
        UserError: the bundle has no artifact of `backend`, or `etdump` is given for another backend than ExecuTorch.
        CheckFailed: the golden input of the bundle is missing or damaged.
    """
    from gcvit_edge.backends import load_backend
    from gcvit_edge.plan import resolve_threads

    artifacts = {artifact.precision: artifact for artifact in bundle.artifacts if artifact.backend == backend}
    if not artifacts:
        have = ", ".join(sorted({artifact.backend for artifact in bundle.artifacts}))
        raise UserError(f"the bundle has no artifact of backend {backend!r}; it has {have}")
    if etdump and (backend != "executorch" or not etdump.is_file()):
        raise UserError(f"--etdump needs the profile of an ExecuTorch artifact, got {etdump} for backend {backend!r}")
    if etdump and threads is not None:
        raise UserError(f"--etdump reads what was measured before, so --threads {threads} has no effect; leave one of them out")
    profiles: dict[str, Any] = {}
    if etdump:
        from gcvit_edge.backends.executorch import read_etdump

        threads, named = None, etdump.stem.rpartition(".")[2]
        with steps.step(f"read {etdump.name}"):
            profiles[named if named in ("float", *get_args(Precision)) else etdump.name] = summarize(*read_etdump(etdump))
    else:
        threads, image = resolve_threads(threads), bundle.golden_input()[:1]
        for precision in sorted(artifacts, key=lambda precision: precision != "float"):
            with steps.step(f"profile {backend}.{precision}"):
                profiles[precision] = summarize(*load_backend(backend).profile(artifacts[precision].path, threads, image, RUNS))
    return {
        "model": bundle.info.name,
        "backend": backend,
        "threads": threads,
        "profiles": profiles,
        "verdict": verdict(list(profiles.values())[-1], profiles["float"] if len(profiles) > 1 else None),
    }


def summarize(operators: Sequence[Operator], delegate_calls: int | None) -> dict[str, Any]:
    """Totals of a profile: time and number by kind and by operator, and what is in integers."""
    total = sum(each.ms for each in operators)
    by_kind: dict[str, list[Operator]] = {kind: [each for each in operators if each.kind == kind] for kind in KINDS}
    by_name: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for each in operators:
        by_name[each.operator, each.kind, each.integer].append(each.ms)
    matrix = by_kind["matrix"]
    return {
        "total_ms": round(total, 3),
        "kinds": {kind: {"ms": round(sum(e.ms for e in each), 3), "count": len(each)} for kind, each in by_kind.items()},
        "integer": {
            "count": sum(each.integer for each in matrix),
            "of": len(matrix),
            "ms": round(sum(each.ms for each in matrix if each.integer), 3),
        },
        "delegate_calls": delegate_calls,
        "delegated_share": round(sum(each.ms for each in operators if each.delegated) / total, 4) if total else None,
        "operators": [
            {"operator": name, "kind": kind, "integer": integer, "count": len(times), "ms": round(sum(times), 3)}
            for (name, kind, integer), times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        ],
    }


def verdict(quantized: dict[str, Any], reference: dict[str, Any] | None) -> list[str]:
    """Why an artifact is as fast as it is; `reference` is the summary of its float original."""
    kinds, total, integer = quantized["kinds"], quantized["total_ms"], quantized["integer"]
    matrix, rest = kinds["matrix"]["ms"], kinds["other"]["ms"]
    overhead = kinds["quantization"]["ms"] + kinds["layout"]["ms"]
    lines = [
        f"{integer['count']} of {integer['of']} linears, convolutions and attention products are integer arithmetic: "
        f"{integer['ms']:.1f} of {matrix:.1f} ms. The rest of the {total:.1f} ms: {overhead:.1f} rounding and layout, "
        f"{rest:.1f} float operators between them."
    ]
    share = quantized["delegated_share"]
    if quantized["delegate_calls"] is not None:
        calls = quantized["delegate_calls"]
        lines.append(f"{calls} delegate call{'s' if calls != 1 else ''}, {share:.0%} of the time inside.")
    if reference is None:
        return [*lines, "Without a profile of the float artifact (quantize --keep-float) there is nothing to compare with."]
    before = reference["total_ms"]
    saved = reference["kinds"]["matrix"]["ms"] - matrix
    added = overhead - reference["kinds"]["quantization"]["ms"] - reference["kinds"]["layout"]["ms"]
    faster = before / total
    if faster < 1.05:
        why = "because no product is in integers" if not integer["count"] else f"because rounding and layout cost {added:.1f} ms more"
        return [*lines, f"INT8 is no faster than float ({total:.1f} against {before:.1f} ms): its products save {saved:.1f} ms, {why}."]
    bound = before / (total - integer["ms"])
    return [
        *lines,
        f"{faster:.2f}x as fast as float ({before:.1f} ms): products save {saved:.1f} ms, rounding and layout add {added:+.1f}. "
        f"Were integer products free, it would be {bound:.2f}x: what bounds it is {_largest(quantized)}.",
    ]


def _largest(summary: dict[str, Any]) -> str:
    left = [each for each in summary["operators"] if not each["integer"]][:3]
    return ", ".join(f"{each['operator']} ({each['ms']:.1f} ms)" for each in left)
