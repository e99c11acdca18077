"""Options that several verbs share."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from gcvit_edge.errors import CheckFailed
    from gcvit_edge.measurement.devices import Device
    from gcvit_edge.measurement.result import Report


def add_model_options(parser: argparse.ArgumentParser, *, sample: bool = True) -> None:
    """Which network: --model, --weights, --num-classes, --labels, --preprocessing. sample: without --weights it is the embedded one."""
    group = parser.add_argument_group("model" + " (default: the embedded sample, gcvit_xxtiny on Fashion-MNIST)" * sample)
    group.add_argument("--model", metavar="NAME", help="variant, such as gcvit_xxtiny (default: recognised from the weights)")
    text = "checkpoint of timm, NVlabs or gcvit-edge (.safetensors, .pth), or hf-hub:ID"
    group.add_argument("--weights", metavar="FILE", required=not sample, help=text)
    group.add_argument("--num-classes", type=int, metavar="N", help="classes that the checkpoint must have (default: what it has)")
    group.add_argument("--labels", type=Path, metavar="FILE", help="class names in the order of the logits: a name a line, or JSON")
    group.add_argument(
        "--preprocessing", type=Path, metavar="FILE",
        help="preprocessor_config.json (default: the checkpoint's; else timm's crop 0.875, or NVlabs' own for its files)",
    )  # fmt: skip


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_model_options`, files read."""
    from gcvit_edge.data import read_labels, read_preprocessing

    return {
        "model": arguments.model,
        "weights": arguments.weights,
        "num_classes": arguments.num_classes,
        "labels": read_labels(arguments.labels) if arguments.labels else None,
        "preprocessing": read_preprocessing(arguments.preprocessing) if arguments.preprocessing else None,
    }


def add_output_options(parser: argparse.ArgumentParser, backends: str, name: str) -> None:
    """Where the bundle goes: --backends, --output, --zip, --force, --threads. backends, name: what the help says of their defaults."""
    text = f"executorch openvino onnx (default: {backends})"
    parser.add_argument("--backends", nargs="+", action="extend", metavar="B", help=text)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=f"the bundle to make (default: {name} in the current folder)")
    parser.add_argument("--zip", action="store_true", help="one .zip file instead of a folder")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is already there")
    add_threads(parser)


def add_training_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """What recipes that fine-tune learn from, and on what: --train, --device; the group that they are in."""
    group = parser.add_argument_group("fine-tuning, of recipes with a section `qat`")
    group.add_argument("--train", type=Path, metavar="DIR", help="to fine-tune on: a folder or .zip as above; other images than --eval")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    return group


def add_threads(parser: argparse.ArgumentParser, default: str = "as many as there are CPUs for this process") -> None:
    """--threads."""
    parser.add_argument("--threads", type=int, metavar="N", help=f"CPU threads of a timed artifact (default: {default})")


def add_devices(parser: argparse.ArgumentParser, *, evaluates: bool = False) -> None:
    """Where to measure: --target, --devices, --threads, --backend, and a flag for every option of a target.

    evaluates: without the options that only timing has.
    """
    from gcvit_edge.targets import target_names

    parser.add_argument(
        "--target", action="append", metavar="T",
        help=f"{', '.join(target_names())} (some take :ADDRESS), or a name from the devices file; may be given again (default: local)",
    )  # fmt: skip
    parser.add_argument("--devices", type=Path, metavar="FILE", help="names of devices (default: devices.yaml here, if it is needed)")
    add_backend(parser, "only the artifacts of this backend; may be given again (default: all)")
    if evaluates:
        text = "CPU threads of an artifact on targets that run one at a time (default: the CPUs; others run several, of one thread each)"
        parser.add_argument("--threads", type=int, metavar="N", help=text)
    else:
        add_threads(parser, "the CPUs of the device; here, those for this process")
    for name, options in _target_options().items():
        takers, (field, kind) = ", ".join(options), next(iter(options.values()))
        if evaluates and field.metadata.get("benchmark"):
            continue
        flag, text = f"--{name.replace('_', '-')}", f"{field.metadata['help']} (target {takers})"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=name.split("_")[-1].upper(), help=text)


def add_backend(parser: argparse.ArgumentParser, text: str) -> None:
    """--backend, once for each: with several values it would take a BUNDLE that follows it for one."""
    parser.add_argument("--backend", action="append", metavar="B", help=text)


def devices(arguments: argparse.Namespace) -> "list[Device]":
    """The devices that `add_devices` asks for, checked."""
    from gcvit_edge.measurement.devices import find_devices, names_target

    names, usual = arguments.target or ["local"], Path("devices.yaml")
    wanted = not all(map(names_target, names)) and usual.is_file()
    options = {name: getattr(arguments, name) for name in _target_options() if getattr(arguments, name, None) is not None}
    return find_devices(names, arguments.devices or (usual if wanted else None), arguments.threads, options)


def _target_options() -> "dict[str, dict[str, tuple[Field[Any], type]]]":
    """By option, and by target that has it: its field and type."""
    from gcvit_edge.targets import load_target, target_names

    found: dict[str, dict[str, tuple[Field[Any], type]]] = {}
    for target in target_names():
        options = load_target(target).Options
        kinds = get_type_hints(options)
        for field in fields(options):
            kind = next(kind for kind in (get_args(kinds[field.name]) or (kinds[field.name],)) if kind is not type(None))
            found.setdefault(field.name, {})[target] = field, kind
    return found


def skipped_lines(names: Sequence[str]) -> list[str]:
    """What to say of images that did not decode; nothing if there were none."""
    if not names:
        return []
    return [f"skipped {len(names)} images that do not decode: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"]


@contextmanager
def resumable(state: Path | None) -> Iterator[None]:
    """Says, when what is done inside is interrupted, where the run is saved, if it is."""
    try:
        yield
    except KeyboardInterrupt:
        saved = state is not None and state.exists()
        done = f"the run is saved in {state}: continue it with --resume" if saved else "nothing was written"
        raise KeyboardInterrupt(f"interrupted; {done}") from None


def measured(measure: "Callable[[], Report]") -> "tuple[Report, CheckFailed | KeyboardInterrupt | None]":
    """The report of devices that `measure` gives, and what the command ends with; interrupted, of those that were done."""
    from gcvit_edge.measurement.measure import Interrupted

    try:
        report = measure()
    except Interrupted as interruption:
        return interruption.report, interruption
    return report, report_error(report)


def report_error(report: "Report") -> "CheckFailed | None":
    """What a report of devices makes the command end with: wrong answers first, then devices that failed."""
    from gcvit_edge.errors import CheckFailed, WrongAnswer

    failed = [f"{run.device}: {run.error}" for run in report.runs if run.error]
    if report.wrong:
        wrong = f"logits other than the golden ones: {', '.join(report.wrong)}; the runtime there computes the artifact wrongly"
        if any(result.backend == "pytorch" and not result.parity.passed for run in report.runs for result in run.results):
            wrong += ", or PyTorch's --weights are not those that the bundle was made of"
        return WrongAnswer("\n".join([wrong, *failed]))
    return CheckFailed("\n".join(failed)) if failed else None
