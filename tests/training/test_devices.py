"""What is trained on a GPU, without one: PyTorch's fake tensors say on which device each tensor would be, and refuse to mix them.

Gradients need the driver of a GPU and are not looked at.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gcvit_edge.model.deploy import deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.learned import learnable
from gcvit_edge.quantization.scheme import Rounding
from gcvit_edge.recipe import Operator, Recipe
from gcvit_edge.training.optimization import objective
from gcvit_edge.training.settings import TrainSettings

OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})


def on_gpu(module: nn.Module) -> nn.Module:
    """With parameters and buffers as fake tensors of a GPU, inside a FakeTensorMode. A tensor that is neither stays where it is."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"), value.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
    return module


def network(model: GCViT) -> nn.Module:
    return model.train()


def student(model: GCViT) -> nn.Module:
    recipe = Recipe(name="tiny", description="")  # type: ignore[call-arg]
    images = torch.randn(4, 1, 3, 32, 32).numpy()
    return learnable(
        calibrate(model, recipe, lambda: iter(images)), [Rounding(OPERATORS, Arithmetic(activations="int8", linear_output=True))]
    )


@pytest.mark.parametrize("trained", [network, student])
def test_all_of_a_forward_pass_is_on_the_gpu(trained: Callable[[GCViT], nn.Module], small_model: Callable[..., GCViT]) -> None:
    model, teacher = trained(small_model(drop_path=0.1)), deploy(small_model().eval())
    with FakeTensorMode():
        model, teacher = on_gpu(model), on_gpu(teacher)
        images, classes = torch.empty(2, 3, 32, 32, device="cuda"), torch.empty(2, dtype=torch.int64, device="cuda")
        logits = model(images)
        settings = TrainSettings.model_validate({"distillation": {}, "label_smoothing": 0.1})
        assert objective(logits, classes, teacher(images), settings).device.type == logits.device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):  # it would be seen
            model(images.cpu())
