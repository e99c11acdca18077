"""How the layers that stay float were found, in words."""

from typing import Any

from gcvit_edge.measurement.accuracy import wilson_interval


def search_lines(report: dict[str, Any]) -> list[str]:
    """A line or more for each artifact of a search; none for recipes without one."""
    searched = [entry for entry in report["artifacts"] if entry["search"]]
    lines = [line for entry in searched for line in _lines(entry, report["limits"]["max_drop"])]
    return [*lines, *_too_easy(searched[0]["search"], report)] if searched else []


def _lines(entry: dict[str, Any], limit: float) -> list[str]:
    backend, search = entry["backend"], entry["search"]
    kept, tried, ms = search["kept_float"], search["tried"], search["latency_ms"]
    plain = tried[0]
    if not kept:
        return [f"{backend}: plain INT8 loses at most {plain['drop_ci95'][1]:.2f} points on held-out images, so no layer stays float"]
    trials = [trial for trial in tried if trial["layers_float"] == len(kept)]
    shipped = next((trial for trial in reversed(trials) if trial["within"]), trials[-1])  # a safe choice that is not does not ship
    shown = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
    found = search["found"]
    if kept != found:
        kept_ms, other = "safe", f"the {len(found)} layers that were found first take {ms['chosen']:.1f}"
    else:
        kept_ms, other = "chosen", f"the safe choice {ms['safe']:.1f} (the first {len(search['safe_choice'])} layers in float)"
    return [
        f"{backend}: {len(kept)} layers stay float, {shown}: at most {shipped['drop_ci95'][1]:.2f} points on held-out images "
        f"(limit {limit}{'' if shipped['within'] else ', which nothing keeps there'}; plain INT8 {plain['drop_ci95'][1]:.2f})",
        f"  {ms[kept_ms]:.1f} ms; plain INT8 {ms['plain']:.1f}, float {ms['float']:.1f}, {other}",
    ]


def _too_easy(search: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """A warning where float answers the images that judged better than the evaluation images, by more than chance."""
    judged, evaluated = search["float_top1"], report["float"]["top1"]
    low, _ = wilson_interval(round(judged * search["images"]), search["images"])
    _, high = wilson_interval(round(evaluated * report["images"]), report["images"])
    if low <= high:
        return []
    return [
        f"Float is right on {judged:.1%} of the held-out images and on {evaluated:.1%} of the evaluation images: it was probably trained "
        "on the former, which then lose less than new ones do. Give --calib images that it was not trained on."
    ]
