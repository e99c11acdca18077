"""Layouts of state dicts: NVlabs' made ours (timm's), and what the tensors say of the network that they are for."""

import math
import re
from collections.abc import Sequence

from torch import Tensor

from gcvit_edge.errors import UserError
from gcvit_edge.model.variants import GCViTConfig

State = dict[str, Tensor]
Size = tuple[int, int]  # height, width

_NVLABS_RULES = [
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.", lambda m: f"stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}."),
    (r"^levels\.", "stages."),
    (r"\.conv\.0\.", ".conv_dw."),
    (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
    (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
    (r"\.conv\.3\.", ".conv_pw."),
    (r"(downsample|stem\.down)\.(conv_dw|conv_pw|se)\.", r"\1.conv_block.\2."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"\.gamma1$", ".ls1.gamma"),
    (r"\.gamma2$", ".ls2.gamma"),
    (r"^norm\.", "stages.3.norm."),
    (r"^head\.", "head.fc."),
]


def from_nvlabs(state: State) -> State:
    """NVlabs' keys to ours; the buffer relative_position_index is recomputed, SE linears become 1x1 convolutions."""
    out = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        for pattern, new in _NVLABS_RULES:
            key = re.sub(pattern, new, key)
        out[key] = value[:, :, None, None] if ".se.fc" in key and value.ndim == 2 else value
    return out


def infer_config(state: State, source: str) -> tuple[GCViTConfig, tuple[Size, ...]]:
    """The shape that a state dict in our layout was made for, read off its tensors; and the input sizes that it may be for, of which the
    shape has the first.

    Raises:
        UserError: the keys are not those of a GC ViT, or its tables of position biases are of no windows.
    """
    try:
        dim, in_chans = state["stem.conv1.weight"].shape[:2]
        depths, heads, positions, ratios, pooled = [], [], [], [], []
        for stage in range(4):
            table = state[f"stages.{stage}.blocks.0.attn.rel_pos.relative_position_bias_table"]
            heads.append(table.shape[1])
            positions.append(table.shape[0])
            pattern = re.compile(rf"stages\.{stage}\.blocks\.(\d+)\.")
            depths.append(1 + max(int(found[1]) for key in state if (found := pattern.match(key))))
            hidden, width = state[f"stages.{stage}.blocks.0.mlp.fc1.weight"].shape
            ratios.append(hidden / width)
            pooled.append(sum(f"stages.{stage}.global_block.blocks.conv{level}.conv_dw.weight" in state for level in range(1, 33)))
        se_dim = state["stem.down.conv_block.se.fc1.weight"].shape[0]
        scale = state.get("stages.0.blocks.0.ls1.gamma")
        head = state.get("head.fc.weight", state.get("head.fc.bias"))
    except (KeyError, ValueError, IndexError) as error:
        sample = ", ".join(list(state)[:3])
        raise UserError(
            f"checkpoint {source} is no complete GC ViT in timm's or NVlabs' key layout: {error} is missing; "
            f"it has {len(state)} keys, such as {sample}"
        ) from error
    sizes, windows = _windows(positions, pooled, source)
    config = GCViTConfig(
        dim=dim,
        depths=tuple(depths),
        num_heads=tuple(heads),
        mlp_ratio=max(ratios),  # the lowest that gives all widths, each of which is rounded down
        layer_scale=None if scale is None else 1e-5,
        img_size=sizes[0],
        window_size=windows,
        in_chans=in_chans,
        num_classes=0 if head is None else head.shape[0],
        se_multiple=8 if se_dim != dim // 4 else 1,
    )
    return config, sizes


def _windows(positions: Sequence[int], pooled: Sequence[int], source: str) -> tuple[tuple[Size, ...], tuple[int, ...] | None]:
    """The input sizes that it may be for, and the windows of the four stages if they are not those that scale with it. positions: lengths
    of their tables of position biases, (2h - 1)(2w - 1) for a window of h x w. pooled: blocks of their global query generators.

    Raises:
        UserError: no windows have such tables.
    """
    sides = [math.isqrt(count) for count in positions]
    if all(side * side == count and side % 2 for side, count in zip(sides, positions, strict=True)):
        windows = [(side + 1) // 2 for side in sides]
        if windows == [windows[3], windows[3], windows[3] * 2, windows[3]]:
            return ((windows[3] * 32, windows[3] * 32),), None
        # one block stands for no pooling or for one; more of them for as many
        levels = [(0, 1) if blocks < 2 else (blocks,) for blocks in pooled]
        fit = [{(window << level) * (4 << stage) for level in levels[stage]} for stage, window in enumerate(windows)]
        found = sorted(set.intersection(*fit))
        if not found:
            raise UserError(f"checkpoint {source} has windows of {windows} positions and {list(pooled)} poolings, which fit no input size")
        return tuple((side, side) for side in found), tuple(windows)
    first, _, third, _ = positions  # of a window, and of one twice as high and wide: two equations for h and w
    area = (third - 2 * first + 1) // 8
    total = (4 * area + 1 - first) // 2
    root = math.isqrt(max(total * total - 4 * area, 0))
    height, width = (total + root) // 2, (total - root) // 2
    of = [(2 * height * scale - 1) * (2 * width * scale - 1) for scale in (1, 1, 2, 1)]
    if width < 1 or of != list(positions):
        raise UserError(f"checkpoint {source} has tables of {positions} position biases, which are of no windows; is it complete?")
    return ((32 * height, 32 * width), (32 * width, 32 * height)), None
