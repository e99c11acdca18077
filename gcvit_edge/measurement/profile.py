"""Where an artifact's time goes: operators as the runtime runs them, and a verdict in words."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gcvit_edge.artifact import Precision
from gcvit_edge.backends import load_backend
from gcvit_edge.cpus import resolve_threads
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.machine import without_int8_products
from gcvit_edge.measurement.operators import KINDS, TimedOperator

if TYPE_CHECKING:
    from gcvit_edge.bundle import Bundle
    from gcvit_edge.progress import Steps

RUNS = 30


def profile_bundle(bundle: "Bundle", backend: str, threads: int | None, etdump: Path | None, steps: "Steps") -> dict[str, Any]:
    """Operators of a backend's artifacts by time, and a verdict. etdump: read this profile, of any device, instead of running them here;
    such a file does not say how many threads there were, nor of what precision it is, unless its name does (`profile_file`).

    Raises:
        UserError: the bundle has no artifact of `backend`, or `etdump` is given for another backend than ExecuTorch or is no ETDump.
        CheckFailed: the golden input of the bundle, or an artifact, is missing or was changed.
    """
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
        for artifact in artifacts.values():
            bundle.verify_artifact(artifact)
        threads, image = resolve_threads(threads), bundle.golden_input()[:1]
        for precision in sorted(artifacts, key=lambda precision: precision != "float"):
            with steps.step(f"profile {backend}.{precision}", timed=True):
                profiles[precision] = summarize(*load_backend(backend).profile(artifacts[precision].path, threads, image, RUNS))
    name = list(profiles)[-1]
    lines = verdict(name, profiles[name], profiles.get("float") if name != "float" else None)
    if profiles[name]["integer"]["count"] and not etdump and (handicap := without_int8_products([backend])):
        lines.append(handicap)
    return {
        "model": bundle.info.name,
        "backend": backend,
        "threads": threads,
        "profiles": profiles,
        "verdict": lines,
    }


def summarize(operators: Sequence[TimedOperator], delegate_calls: int | None) -> dict[str, Any]:
    """Totals of a profile: time and number by kind and by operator, and what is in integers. delegate_calls: None in a runtime without
    delegates, where there is no share of them either."""
    total = sum(each.ms for each in operators)
    by_kind: dict[str, list[TimedOperator]] = {kind: [each for each in operators if each.kind == kind] for kind in KINDS}
    by_name: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for each in operators:
        by_name[each.operator, each.kind, each.integer].append(each.ms)
    matrix, delegated = by_kind["matrix"], sum(each.ms for each in operators if each.delegated)
    return {
        "total_ms": round(total, 3),
        "kinds": {kind: {"ms": round(sum(e.ms for e in each), 3), "count": len(each)} for kind, each in by_kind.items()},
        "integer": {
            "count": sum(each.integer for each in matrix),
            "of": len(matrix),
            "ms": round(sum(each.ms for each in matrix if each.integer), 3),
        },
        "delegate_calls": delegate_calls,
        "delegated_share": round(delegated / total, 4) if total and delegate_calls is not None else None,
        "operators": [
            {"operator": name, "kind": kind, "integer": integer, "count": len(times), "ms": round(sum(times), 3)}
            for (name, kind, integer), times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        ],
    }


def verdict(name: str, profile: dict[str, Any], reference: dict[str, Any] | None) -> list[str]:
    """Why an artifact is as fast as it is.

    name: its precision, or the file of the profile where that is not known. reference: the summary of its float original.
    """
    total, integer = profile["total_ms"], profile["integer"]
    if not total:
        return ["The profile has no operators."]
    ms = _ms(profile)
    if integer["count"]:
        products = f"{integer['count']} of {integer['of']} linears, convolutions and attention products are integer arithmetic: "
        products += f"{integer['ms']:.1f} of {ms['products']:.1f} ms."
    else:
        products = f"None of {integer['of']} linears, convolutions and attention products is integer arithmetic: {ms['products']:.1f} ms."
    rest = ", ".join(f"{took:.1f} {what}" for what, took in ms.items() if what != "products")
    lines = [f"{products} The rest of the {total:.1f} ms: {rest}."]
    calls, share = profile["delegate_calls"], profile["delegated_share"]
    if calls is not None:
        lines.append(f"{calls} delegate call{'s' if calls != 1 else ''}, {share:.0%} of the time inside.")
    if reference is not None:
        return [*lines, _comparison(name, profile, reference)]
    if name in get_args(Precision):
        return [*lines, "Without a profile of the float artifact (quantize --with-float) there is nothing to compare with."]
    return [*lines, "There is no second profile to compare it with."]


def _comparison(name: str, profile: dict[str, Any], reference: dict[str, Any]) -> str:
    """How fast it is beside float, and what makes it so."""
    total, before, integer_ms = profile["total_ms"], reference["total_ms"], profile["integer"]["ms"]
    faster = before / total
    how = "" if faster >= 1.05 else "hardly faster, " if faster > 1 else "no faster, "
    ms, float_ms = _ms(profile), _ms(reference)
    changes = {what: ms.get(what, 0.0) - float_ms.get(what, 0.0) for what in ms | float_ms}
    text = (
        f"{name} is {how}{faster:.2f}x as fast as float ({total:.1f} against {before:.1f} ms): "
        f"{', '.join(f'{what} {change:+.1f}' for what, change in changes.items())} ms."
    )
    if faster >= 1.05:
        if 0 < integer_ms < total:
            text += f" Were integer products free, it would be {before / (total - integer_ms):.2f}x."
        return f"{text} What bounds it is {_largest(profile)}."
    growth, kind = max((each["ms"] - reference["kinds"][kind]["ms"], kind) for kind, each in profile["kinds"].items())
    return f"{text} What takes longer is, most of all, {KINDS[kind]}: {growth:.1f} ms more." if growth >= 0.05 else text


def _ms(profile: dict[str, Any]) -> dict[str, float]:
    """Its time by what a verdict tells apart."""
    ms = {kind: each["ms"] for kind, each in profile["kinds"].items()}
    parts = {"products": ms["matrix"], "rounding and layout": ms["quantization"] + ms["layout"], "other operators": ms["other"]}
    return parts | ({"of no operator": ms["unattributed"]} if ms["unattributed"] else {})


def _largest(summary: dict[str, Any]) -> str:
    left = [each for each in summary["operators"] if not each["integer"] and each["kind"] != "unattributed"][:3]
    return ", ".join(f"{each['operator']} ({each['ms']:.1f} ms)" for each in left)
