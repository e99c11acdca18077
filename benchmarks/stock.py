"""The stock way: what a user does without us. timm's model, each tool's own exporter and INT8 quantizer, with their defaults.

pip install timm==1.0.31
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import package_version
from gcvit_edge.cache import digest
from gcvit_edge.model.gcvit import GCViT


def stock_onnx(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """torch.onnx.export, quant_pre_process and quantize_static with their defaults, but that there are no symbolic shapes to infer."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            sample = next(self.samples, None)
            return None if sample is None else {"image": sample}

    paths = {precision: folder / f"stock.{precision}.onnx" for precision in ("float", "prepared", "int8")}
    example = (torch.from_numpy(images[0]),)
    torch.onnx.export(model, example, paths["float"], dynamo=True, input_names=["image"], output_names=["logits"], external_data=False)
    quant_pre_process(paths["float"], paths["prepared"], skip_symbolic_shape=True)
    quantize_static(paths["prepared"], paths["int8"], Reader())
    return [Artifact("onnx", "float", paths["float"], (paths["float"],)), Artifact("onnx", "int8", paths["int8"], (paths["int8"],))]


def stock_openvino(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """openvino.convert_model, and nncf.quantize as its guide says for transformers."""
    import nncf
    import openvino

    graph = openvino.convert_model(model, example_input=torch.from_numpy(images[0]), input=[1, *images[0].shape[1:]])
    quantized = nncf.quantize(graph, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    artifacts = []
    for precision, each in (("float", graph), ("int8", quantized)):
        path = folder / f"stock.{precision}.xml"
        openvino.save_model(each, path)  # weights that are float are halved, which is the default
        artifacts.append(Artifact("openvino", precision, path, (path, path.with_suffix(".bin"))))  # type: ignore[arg-type]
    return artifacts


def stock_executorch(model: torch.nn.Module, images: list[np.ndarray], folder: Path) -> list[Artifact]:
    """PT2E static INT8 with XNNPACK's quantizer, lowered with the XNNPACK partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (torch.from_numpy(images[0]),)
    program = torch.export.export(model, example)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for image in images:
            prepared(torch.from_numpy(image))
    quantized = torch.export.export(convert_pt2e(prepared), example)
    artifacts = []
    for precision, each in (("float", program), ("int8", quantized)):
        path = folder / f"stock.{precision}.pte"
        path.write_bytes(to_edge_transform_and_lower(each, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
        artifacts.append(Artifact("executorch", precision, path, (path,)))  # type: ignore[arg-type]
    return artifacts


STOCK = {"executorch": stock_executorch, "onnx": stock_onnx, "openvino": stock_openvino}


def stock_model(name: str, model: GCViT) -> torch.nn.Module:
    """timm's network of the variant `name`, with the weights of ours."""
    import timm

    theirs = timm.create_model(name, num_classes=model.config.num_classes, img_size=model.config.img_size).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def stock_made_by() -> str:
    """Digest of what decides the stock artifacts, beside weights and images: these programs, and the tools' versions."""
    tools = ("torch", "timm", "executorch", "torchao", "onnx", "onnxruntime", "openvino", "nncf")
    programs = (file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return digest([*programs, *(f"{tool} {package_version(tool)}" for tool in tools)])
