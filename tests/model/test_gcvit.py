"""The training form: logits of two independent implementations, and what the network promises."""

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image

from gcvit_edge.data import Preprocessing, read_image
from gcvit_edge.errors import UserError
from gcvit_edge.model.create import create_model
from gcvit_edge.model.gcvit import DropPath, partition_windows, reverse_windows

GOLDEN = {
    "nvlabs_plain": ".pth.tar",
    "nvlabs_layerscale": ".pth.tar",
    "timm_plain": ".safetensors",
    "timm_layerscale": ".safetensors",
}


def golden_model(golden, name):
    shape = {"mlp_ratio": 2.0, "layer_scale": 1e-5} if "layerscale" in name else {"mlp_ratio": 3.0}
    return create_model(weights=golden / (name + GOLDEN[name]), dim=16, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), **shape)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(golden, name):
    model = golden_model(golden, name)
    x = torch.from_numpy(np.load(golden / "input_seed7.npz")["x"]).float()
    expected = np.load(golden / f"{name}_logits.npy")
    assert expected.shape == (3, 10)
    with torch.no_grad():
        batch = model(x).numpy()
        single = torch.cat([model(image[None]) for image in x]).numpy()
    np.testing.assert_allclose(batch, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5)


def reference_images(shared, dataset, record):
    """Network inputs of the golden images of a trained checkpoint, preprocessed as its json says."""
    said = record["preprocess"]
    normal = {"mean": said["mean"], "std": said["std"], "interpolation": "bicubic"}
    if dataset == "fashion_mnist":
        preprocessing = Preprocessing(size=said["resize"], mode="squash", **normal)
        with gzip.open(shared / "data" / "fashion_mnist" / "t10k-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        chosen = [Image.fromarray(images[entry["t10k_index"]]) for entry in record["golden"]]
        return [preprocessing.normalize(preprocessing.pixels(image)) for image in chosen]
    side = said["center_crop"]
    preprocessing = Preprocessing(size=(side, side), resize=said["resize_shorter"], **normal)
    return [read_image(shared / "data" / entry["file"], preprocessing) for entry in record["golden"]]


@pytest.mark.parametrize(("dataset", "count"), [("fashion_mnist", 10), ("flowers", 10), ("tiny_imagenet", 16)])
def test_logits_of_trained_checkpoints_on_real_images(shared, dataset, count):
    path = shared / "checkpoints" / f"gcvit_xxtiny.{dataset}.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    expected = np.array([entry["logits"] for entry in record["golden"]])
    assert expected.shape == (count, record["num_classes"])
    model = create_model(record["model"], weights=path)
    with torch.no_grad():
        logits = np.concatenate([model(torch.from_numpy(x)).numpy() for x in reference_images(shared, dataset, record)])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-5)  # the reference is rounded to 1e-5


def test_logits_do_not_depend_on_the_rest_of_the_batch(tiny_model):
    x = torch.randn(4, 3, 64, 64) * torch.tensor([1.0, 30.0, 0.1, 1.0]).view(4, 1, 1, 1)
    with torch.no_grad():
        batch = tiny_model(x)
        single = torch.cat([tiny_model(image[None]) for image in x])
        reverse = tiny_model(x.flip(0)).flip(0)
    assert batch.std(0).min() > 1e-3  # the images do get different logits
    torch.testing.assert_close(batch, single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch, reverse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("classes", "channels"), [(1, 3), (37, 1), (1000, 4)])
def test_any_number_of_classes_and_channels(make_model, classes, channels):
    model = make_model(num_classes=classes, in_chans=channels)
    with torch.no_grad():
        assert model(torch.randn(2, channels, 64, 64)).shape == (2, classes)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 64), (160, 128)])
def test_features_of_the_four_stages(make_model, size):
    height, width = size
    model = make_model(img_size=size, features_only=True)
    assert model.head is None
    with torch.no_grad():
        features = model(torch.randn(2, 3, *size))
    expected = [(2, 16 << stage, height // (4 << stage), width // (4 << stage)) for stage in range(4)]
    assert [tuple(feature.shape) for feature in features] == expected


def test_logits_are_the_head_of_the_pooled_last_features(tiny_model):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = tiny_model.forward_features(x)[-1]
        logits = last.mean((2, 3)) @ tiny_model.head.fc.weight.T + tiny_model.head.fc.bias
        torch.testing.assert_close(tiny_model(x), logits)


def test_no_classes_is_features_only(make_model):
    model = make_model(num_classes=0)
    with torch.no_grad():
        assert len(model(torch.randn(1, 3, 64, 64))) == 4


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 1, 64, 64), (3, 64, 64)])
def test_wrong_input_shape_names_both(tiny_model, shape):
    with pytest.raises(UserError) as error:
        tiny_model(torch.zeros(shape))
    assert "(B, 3, 64, 64)" in str(error.value)
    assert str(shape) in str(error.value)


def test_windows_are_image_major_and_come_back():
    x = torch.arange(2 * 4 * 6 * 5.0).view(2, 4, 6, 5)
    windows = partition_windows(x, (2, 3))
    assert windows.shape == (8, 6, 5)
    torch.testing.assert_close(windows[0], x[0, :2, :3].reshape(6, 5))
    torch.testing.assert_close(windows[1], x[0, :2, 3:].reshape(6, 5))
    torch.testing.assert_close(windows[6], x[1, 2:, :3].reshape(6, 5))
    assert torch.equal(reverse_windows(windows, (2, 3), 4, 6), x)


def test_attention_stays_in_its_window_and_positions_keep_their_bias(make_model):
    """A block without global query: a changed position changes its own window only."""
    block = make_model().stages[0].blocks[0]
    x = torch.randn(1, 16, 16, 16)
    changed = x.clone()
    changed[0, 5, 9] = torch.randn(16)
    with torch.no_grad():
        difference = (block(x, None) - block(changed, None)).abs().sum(-1)[0]
    touched = difference > 1e-6
    assert touched[4:6, 8:10].all()
    assert touched.sum() == 4


def test_position_bias_is_by_relative_position(make_model):
    bias = make_model(img_size=(64, 96)).stages[0].blocks[0].attn.rel_pos
    assert bias.relative_position_bias_table.shape == (3 * 5, 1)
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(torch.arange(15.0)[:, None])
        full = bias()[0].view(2, 3, 2, 3)
    for row, col, other_row, other_col in np.ndindex(2, 3, 2, 3):
        assert full[row, col, other_row, other_col] == (row - other_row + 1) * 5 + col - other_col + 2


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20_000, 2, 3))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_is_random_in_training_only(make_model):
    x = torch.randn(8, 3, 64, 64)
    model, plain = make_model(drop_path=0.5), make_model()
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * index / 7 for index in range(8)])
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert torch.equal(model(x), plain(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        assert torch.equal(plain.train()(x), plain(x))


def test_drop_path_keeps_the_mean_of_a_block(make_model):
    """The branches of one block, averaged over many draws, are those of the block without drop path."""
    torch.manual_seed(0)
    attention_only = make_model(drop_path=0.5).stages[3].blocks[0]
    with torch.no_grad():
        attention_only.mlp.fc2.weight.zero_()  # the MLP sees a random input, so its mean is another
        attention_only.mlp.fc2.bias.zero_()
        x = torch.randn(1, 2, 2, 128)
        exact = attention_only.eval()(x, None)
        drawn = attention_only.train()(x.expand(4000, -1, -1, -1), None)
    assert drawn.std(0).max() > 0
    torch.testing.assert_close(drawn.mean(0), exact[0], rtol=0, atol=0.1 * float((exact - x).abs().max()))


def test_gradients_reach_every_parameter(tiny_model):
    tiny_model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


def test_weights_for_another_input_size_give_nearly_the_same_features(golden):
    """A network of 256 px from weights of 224 px: interpolated biases, and logits that still follow the image."""
    model = golden_model(golden, "timm_plain")
    larger = create_model(weights=golden / "timm_plain.safetensors", dim=16, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8), img_size=256)
    assert [stage.blocks[0].attn.rel_pos.relative_position_bias_table.shape[0] for stage in larger.stages] == [225, 225, 961, 225]
    x = torch.from_numpy(np.load(golden / "input_seed7.npz")["x"]).float()
    with torch.no_grad():
        before = model(x)
        after = larger(torch.nn.functional.interpolate(x, (256, 256), mode="bicubic"))
    assert torch.isfinite(after).all()
    assert (after - before).norm() < 0.5 * before.norm()
