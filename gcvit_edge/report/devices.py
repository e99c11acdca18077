"""A report of devices on the terminal: all side by side in one table."""

from rich.markup import escape
from rich.table import Table

from gcvit_edge.measurement.result import Report, Result, Run
from gcvit_edge.report.table import compact_table, compared_cells, noisy


def benchmark_table(report: Report) -> Table:
    """Latency, load time, memory and parity, a line for each artifact on each device; fits 80 columns on one way of running."""
    results = [result for run in report.runs for result in run.results]
    energy = any(result.energy_j for result in results)
    table = _table(report, f"{report.mode}, batch 1")
    for heading in ("p50 ms", "p90", "p99", "load", "MB", "RAM", "parity", *(["J"] if energy else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in report.runs:
        for result in run.results:
            cells = [*_latency(result, report.mode), _number(result.load_ms, 0), f"{result.size_bytes / 1e6:.1f}"]
            cells += [_number(result.peak_rss_mb, 0), _parity(result), *([_energy(result)] if energy else [])]
            table.add_row(*_head(report, run, result, " "), *cells)
        if run.error:
            table.add_row(escape(run.device), _failed(run))
    return table


def accuracy_table(report: Report) -> Table:
    """Accuracy of each artifact on each device, below it 95 % intervals; against the float artifact only where there is one.

    Fits 80 columns on one way of running.
    """
    found = [result.accuracy for run in report.runs for result in run.results if result.accuracy]
    compared = any(accuracy.drop_points is not None for accuracy in found)
    caption = "drop in points, SQNR in dB; below them, 95 % intervals" if compared else "below it, its 95 % interval"
    table = _table(report, f"{max((accuracy.images for accuracy in found), default=0)} images", caption)
    columns = ("drop", "agree", "SQNR") if compared else ()
    for heading in ("top-1", "top-5", *columns, "parity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in report.runs:
        for result in run.results:
            table.add_row(*_head(report, run, result, "\n"), *_accuracy(result)[: 2 + len(columns)], _parity(result))
        if run.error:
            table.add_row(escape(run.device), _failed(run))
    return table


def _failed(run: Run) -> str:
    return "[red]failed in part[/]" if run.results else "[red]failed[/]"


def _table(report: Report, what: str, caption: str | None = None) -> Table:
    table = compact_table(f"{escape(report.model)}, {what}", caption)
    if _several_devices(report):
        table.add_column("device", overflow="fold")
    table.add_column("artifact", no_wrap=True)
    if _several_ways(report):
        table.add_column("run on", overflow="fold")
    return table


def _head(report: Report, run: Run, result: Result, separator: str) -> list[str]:
    """The first cells of a row. separator: between an artifact's backend and its precision."""
    device = [escape(run.device)] if _several_devices(report) else []
    return [*device, f"{result.backend}{separator}{result.precision}", *([result.execution] if _several_ways(report) else [])]


def _several_devices(report: Report) -> bool:
    """Or a single one that failed, which its row says."""
    return len(report.runs) > 1 or any(run.error for run in report.runs)


def _several_ways(report: Report) -> bool:
    return len({result.execution for run in report.runs for result in run.results}) > 1


def machine_lines(report: Report) -> list[str]:
    """What each device is."""
    lines = []
    for run in report.runs:
        if run.machine:
            threads = ", ".join(sorted({f"{r.threads} thread{'s' if r.threads > 1 else ''}" for r in run.results})) or "not measured"
            lines.append(f"{run.device}: {run.machine.title}; {threads}" + ("; emulated: no times" if run.emulated else ""))
    return lines


def count_lines(report: Report) -> list[str]:
    """What was counted in one inference of each artifact, if anything."""
    return [
        f"{run.device}: {result.name}: " + ", ".join(f"{count / 1e6:.2f} M {name}" for name, count in result.counts.items())
        for run in report.runs
        for result in run.results
        if result.counts
    ]


def warnings(report: Report) -> list[str]:
    """What makes figures doubtful."""
    lines = []
    for run in report.runs:
        for result in run.results:
            if result.latency and result.latency.noisy:
                lines.append(f"warning: {run.device}: {result.name}: {noisy(result.latency.spread)}")
            elif result.latency and not result.latency.stable:
                lines.append(f"warning: {run.device}: {result.name}: still not stable after {result.latency.warm_up_runs} warm-up runs")
    return lines


def _latency(result: Result, mode: str) -> list[str]:
    """p50, p90, p99; what the mode is judged by is bold."""
    if result.latency is None:
        return ["-"] * 3
    latency = result.latency
    p50, p90 = f"{latency.p50_ms:.2f}", f"{latency.p90_ms:.2f}"
    bold = [f"[bold]{p50}[/]", p90] if mode == "quick" else [p50, f"[bold]{p90}[/]"]
    return [*bold, f"{latency.p99_ms:.2f}"]


def _accuracy(result: Result) -> list[str]:
    accuracy = result.accuracy
    if accuracy is None:
        return ["-"] * 5
    low, high = accuracy.top1_ci95
    cells = [f"{accuracy.top1:.2%}\n[dim]{100 * low:.1f} {100 * high:.1f}[/]", f"{accuracy.top5:.2%}"]
    if accuracy.drop_points is None or accuracy.drop_ci95 is None or accuracy.agreement_ci95 is None or accuracy.sqnr_ci95 is None:
        return [*cells, "", "", ""]
    return [*cells, *compared_cells(accuracy.model_dump())]


def _parity(result: Result) -> str:
    parity = result.parity
    level = "equal" if parity.equal else f"{parity.sqnr_db:.0f} dB"
    return level if parity.passed else f"[red]wrong, {level}[/]"


def _energy(result: Result) -> str:
    return "\n".join(f"{escape(rail)} {joules:.3g}" for rail, joules in (result.energy_j or {}).items()) or "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
