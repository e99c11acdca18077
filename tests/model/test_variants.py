"""Official shapes against what NVlabs' and timm's own code builds, and the checks of a shape."""

import json

import pytest
import torch

from gcvit_edge.errors import UserError
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.variants import VARIANTS, GCViTConfig, nvlabs_crop, variant_config

NVLABS = (
    "gc_vit_xxtiny", "gc_vit_xtiny", "gc_vit_tiny", "gc_vit_tiny2", "gc_vit_small", "gc_vit_small2", "gc_vit_base",
    "gc_vit_large", "gc_vit_large_384_21k", "gc_vit_large_512_21k",
)  # fmt: skip


def meta_model(name):
    with torch.device("meta"):
        return GCViT(variant_config(name))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_reference_lists_the_same_variants(golden):
    reference = json.loads((golden / "nvlabs_variants.json").read_text())
    assert set(reference) == set(NVLABS)
    assert {name.replace("gc_vit", "gcvit") for name in reference} | {"gcvit_large_224_21k"} == set(VARIANTS)


@pytest.mark.parametrize("name", NVLABS)
def test_parameters_and_keys_are_those_of_nvlabs(golden, name):
    reference = json.loads((golden / "nvlabs_variants.json").read_text())[name]
    config, model = variant_config(name), meta_model(name)
    for field in ("depths", "num_heads"):
        assert list(getattr(config, field)) == reference[field]
    assert [config.window(stage) for stage in range(4)] == [(side, side) for side in reference["window_size"]]
    assert (config.dim, config.mlp_ratio, config.layer_scale) == (reference["dim"], reference["mlp_ratio"], reference.get("layer_scale"))
    assert parameters(model) == reference["params"]
    # NVlabs stores the relative position index of every block, which is computed here
    assert len(model.state_dict()) + sum(config.depths) == reference["keys"]
    assert not any(key.endswith("relative_position_index") for key in model.state_dict())


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "gcvit_xtiny", "gcvit_tiny", "gcvit_small", "gcvit_base"])
def test_parameters_are_those_of_timm(golden, name):
    reference = json.loads((golden / "timm_params.json").read_text())
    assert len(reference) == 5
    assert parameters(meta_model(name)) == reference[name]


def test_large_for_224_px_is_large():
    assert VARIANTS["gcvit_large_224_21k"] == VARIANTS["gcvit_large"]
    assert parameters(meta_model("gcvit_large_224_21k")) == 202_075_570


def test_unknown_variant_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown model 'gcvit_tinny'; did you mean 'gcvit_tiny'\? known: gcvit_xxtiny"):
        variant_config("gcvit_tinny")


@pytest.mark.parametrize(
    ("name", "crop"),
    [("gcvit_xxtiny", (1.0, False)), ("gcvit_xtiny", (0.875, False)), ("gcvit_small", (0.875, False)),
     ("gcvit_large", (1.0, False)), ("gcvit_large_384_21k", (1.0, True)), ("gcvit_large_512_21k", (1.0, True))],
)  # fmt: skip
def test_evaluation_crop_of_nvlabs(name, crop):
    assert nvlabs_crop(name) == crop


def test_windows_scale_with_the_input():
    config = GCViTConfig(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), mlp_ratio=3, img_size=(64, 96))
    assert [config.feature_size(stage) for stage in range(4)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [config.window(stage) for stage in range(4)] == [(2, 3), (2, 3), (4, 6), (2, 3)]
    assert [config.query_levels(stage) for stage in range(4)] == [3, 2, 0, 0]
    assert [config.stage_dim(stage) for stage in range(4)] == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("dim", "mlp_ratio", "widths"),
    [
        (16, 3, [48, 96, 192, 384]),
        (44, 60 / 44, [60, 120, 240, 480]),  # 44 * (60 / 44) is less than 60 in floating point
        (16, 2.7, [43, 86, 172, 345]),  # 43.2, 86.4, 172.8, 345.6
    ],
)
def test_mlp_width_rounds_down(dim, mlp_ratio, widths):
    config = GCViTConfig(dim=dim, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=mlp_ratio)
    assert [config.mlp_dim(stage) for stage in range(4)] == widths
    with torch.device("meta"):
        assert [stage.blocks[0].mlp.fc1.out_features for stage in GCViT(config).stages] == widths


def test_squeeze_width_rounds_up():
    config = GCViTConfig(dim=36, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=3, se_multiple=8)
    assert (config.se_dim(36), config.se_dim(32), config.se_dim(72)) == (16, 8, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1)}, "one entry per stage"),
        ({"depths": (1, 1, 1), "num_heads": (1, 2, 4)}, "depths has 3 entries; GC ViT has 4 stages"),
        ({"window_size": (7, 7, 14)}, "one entry per stage"),
        ({"num_heads": (1, 2, 3, 8)}, "stage 3 is 64 wide, which 3 heads do not divide"),
        ({"depths": (1, 0, 1, 1)}, "every size must be positive"),
        ({"in_chans": 0}, "every size must be positive"),
        ({"num_classes": -1}, "every size must be positive"),
        ({"img_size": (224, 230)}, r"img_size \(224, 230\) is not a multiple of 32 pixels; try 224"),
        ({"img_size": (16, 224)}, "not a multiple of 32 pixels; try 32"),
        ({"window_size": (7, 7, 14, 5)}, "stage 4 has 7x7 positions, which is not its 5x5 window times a power of two"),
        ({"img_size": (224, 448), "window_size": (7, 7, 14, 7)}, "stage 1 has 56x112 positions"),
    ],
)
def test_impossible_shapes(change, message):
    shape = {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "mlp_ratio": 3.0}
    with pytest.raises(UserError, match=message):
        GCViTConfig(**shape | change)
