"""The configuration of a STAT network: a frozen dataclass, validated when created, and presets."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

LARGEST = 2**31 - 1  # some kernels count in 32 bits
MOST_LAYERS = 256  # far beyond what trains, and built in a second or two
Q_POOL = 2  # a stage's first block (but the network's) pools its queries by this factor, a side


@dataclass(frozen=True)
class STATConfig:
    """The hyperparameters of a STAT. Lists are converted to tuples (JSON and YAML have no tuples).

    Attributes:
        frames: T, frames of a clip.
        image_size: H = W of a frame, pixels.
        in_channels: colour channels of a frame.
        num_classes: logits of the classifier.
        class_names: one name per class, or empty.
        stem_channels: output channels of the stem's convolutions but the last, which gives dims[0].
        stem_temporal_kernel: kernel size along time of the stem's convolutions, odd.
        stem_spatial_kernel: kernel size along height and width, odd.
        stem_strides: (time, height, width) stride of each convolution.
        depths: blocks in each stage.
        dims: channels of each stage.
        num_heads: heads of each stage.
        window: t_o, number of frames that short-term attention spans, odd, including the frame
            itself.
        short: short-term attention (SA of the paper's Table 1).
        long: what long-term attention (LA) reads of every frame: "class" its class token, "mean"
            the mean of its pooled tokens, "none" nothing.
        class_token: whether each frame has a class token. Without one, the mean of a frame's tokens
            represents it (Table 3's other row is ``long="mean", class_token=False``).
        kv_strides: stride of the key and value pooling on each stage's own grid. The input of a
            stage's first block is on the previous stage's grid, so it pools keys by the factor of
            its query pooling as well; all blocks of all stages can thus have the same key grid.
        short_stride: average pooling from the keys to the short-term keys.
        pool_kernel: (time, height, width) of the pooling convolutions, odd.
        mlp_ratio: hidden channels of an MLP over its input channels.
        qkv_bias: bias of the query, key and value projections.
        temporal_position: a position embedding for each token frame, beside the spatial one.
        aggregation_layers: transformer layers over the frames' tokens (l_ta); 0 averages them.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        dropout: rate of dropout before the classifier.
        backend: of the attention; None takes the best usable one.

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    frames: int = 16
    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 400
    class_names: tuple[str, ...] = ()
    stem_channels: tuple[int, ...] = (64, 96)
    stem_temporal_kernel: int = 3
    stem_spatial_kernel: int = 3
    stem_strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (1, 2, 2), (1, 2, 2))
    depths: tuple[int, ...] = (6, 5, 4)
    dims: tuple[int, ...] = (192, 384, 768)
    num_heads: tuple[int, ...] = (2, 4, 8)
    window: int = 3
    short: bool = True
    long: Literal["class", "mean", "none"] = "class"
    class_token: bool = True
    kv_strides: tuple[int, ...] = (4, 2, 1)
    short_stride: int = 2
    pool_kernel: tuple[int, int, int] = (1, 3, 3)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    temporal_position: bool = True
    aggregation_layers: int = 1
    drop_path: float = 0.0
    dropout: float = 0.0
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _as_tuple(value))
            _check(_largest(value) <= LARGEST, name, f"at most {LARGEST}", value)
        check_common(self)
        for name in ("in_channels", "short_stride"):
            _check(
                _is_count(getattr(self, name)), name, "an int of at least 1", getattr(self, name)
            )
        for name in ("stem_temporal_kernel", "stem_spatial_kernel", "window"):
            value = getattr(self, name)
            _check(_is_count(value) and value % 2 == 1, name, "an odd int of at least 1", value)
        for name in ("short", "class_token", "qkv_bias", "temporal_position"):
            _check(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        self._check_stem()
        self._check_stages()
        self._check_the_rest()

    def _check_stem(self) -> None:
        strides = self.stem_strides
        good = isinstance(strides, tuple) and len(strides) > 0
        good = good and all(_are_counts(s, 3) for s in strides)
        wanted = "one (time, height, width) of ints of at least 1 a convolution"
        _check(good, "stem_strides", wanted, strides)
        wanted = f"{len(strides) - 1} ints of at least 1, one less than stem_strides has entries"
        good = _are_counts(self.stem_channels, len(strides) - 1)
        _check(good, "stem_channels", wanted, self.stem_channels)

    def _check_stages(self) -> None:
        _check(_are_counts(self.depths), "depths", "an int of at least 1 a stage", self.depths)
        _check(
            sum(self.depths) <= MOST_LAYERS, "depths", f"{MOST_LAYERS} in all at most", self.depths
        )
        for name in ("dims", "num_heads", "kv_strides"):
            wanted = f"an int of at least 1 a stage, {len(self.depths)} as in depths"
            good = _are_counts(getattr(self, name), len(self.depths))
            _check(good, name, wanted, getattr(self, name))
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            wanted = f"divisible by num_heads {self.num_heads}, stage by stage"
            _check(dim % heads == 0, "dims", wanted, self.dims)

    def _check_the_rest(self) -> None:
        _check(
            _are_counts(self.pool_kernel, 3) and all(k % 2 for k in self.pool_kernel),
            "pool_kernel",
            "three odd ints (time, height, width)",
            self.pool_kernel,
        )
        modes = ("class", "mean", "none")
        _check(self.long in modes, "long", "one of 'class', 'mean', 'none'", self.long)
        _check(
            self.class_token or self.long != "class",
            "long",
            "'mean' or 'none' where class_token is False",
            self.long,
        )
        good = _is_real(self.mlp_ratio) and 0 < self.mlp_ratio < math.inf
        _check(good, "mlp_ratio", "a number above 0", self.mlp_ratio)
        layers = self.aggregation_layers
        good = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 0
        _check(good, "aggregation_layers", "an int of at least 0", layers)
        _check(layers <= MOST_LAYERS, "aggregation_layers", f"{MOST_LAYERS} at most", layers)

    @classmethod
    def preset(cls, name: str) -> "STATConfig":
        """The configuration named `name`, one of `PRESETS`; modify it with ``dataclasses.replace``.

        ``stat_b16``, ``stat_b32``, ``stat_b64``: the paper's network for 16, 32 and 64 frames of
        224x224, 15 blocks in three stages. The appendix with its true depths was never published:
        6, 5, 4 are those whose multiply-adds agree with the figures of the paper's Tables 1 and 2.
        ``stat_tiny``: four blocks for 16 frames of 64x64, small enough to train on a CPU.
        """
        _check(name in PRESETS, "preset", f"one of {', '.join(PRESETS)}", name)
        return cls(**PRESETS[name])

    @property
    def token_frames(self) -> int:
        """The number of token frames after the stem (n_t; T / 2 in the paper)."""
        frames = self.frames
        for stride, _, _ in self.stem_strides:
            frames = ceil_div(frames, stride)
        return frames

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the stem's grid of tokens (n_h, n_w)."""
        return self.grid_of(self.image_size, self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The stem's grid of tokens for frames of height x width pixels."""
        for _, stride_h, stride_w in self.stem_strides:
            height, width = ceil_div(height, stride_h), ceil_div(width, stride_w)
        return height, width

    @property
    def stage_grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each stage's token grid."""
        grids = [self.token_grid]
        for _ in self.depths[1:]:
            grids.append((ceil_div(grids[-1][0], Q_POOL), ceil_div(grids[-1][1], Q_POOL)))
        return tuple(grids)


PRESETS: dict[str, dict[str, Any]] = {
    "stat_b16": {"frames": 16, "window": 3},
    "stat_b32": {"frames": 32, "window": 5},
    "stat_b64": {"frames": 64, "window": 7},
    "stat_tiny": {
        "frames": 16,
        "image_size": 64,
        "num_classes": 10,
        "stem_channels": (24, 48),
        "depths": (2, 2),
        "dims": (64, 128),
        "num_heads": (2, 4),
        "kv_strides": (2, 1),
        "window": 3,
    },
}


def check_common(config: Any) -> None:
    """Check the fields that the configurations of all models have. Raises ValueError."""
    for name in ("frames", "image_size", "num_classes"):
        value = getattr(config, name)
        _check(_is_count(value), name, "an int of at least 1", value)
    for name in ("drop_path", "dropout"):
        value = getattr(config, name)
        _check(_is_real(value) and 0 <= value < 1, name, "a number in [0, 1)", value)
    names, classes = config.class_names, config.num_classes
    good = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    good = good and len(names) in (0, classes)
    _check(good, "class_names", f"empty or num_classes ({classes}) strings", names)
    good = config.backend is None or isinstance(config.backend, str)
    _check(good, "backend", "the name of an attention backend or None", config.backend)


def ceil_div(size: int, stride: int) -> int:
    """Outputs of a convolution whose odd kernel is padded by half of it: one a started stride."""
    return -(-size // stride)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _largest(value: Any) -> int:
    """The largest int of a field, 0 where there is none."""
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) else 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_counts(values: Any, length: int | None = None) -> bool:
    if not isinstance(values, tuple) or not all(_is_count(v) for v in values):
        return False
    return len(values) == length if length is not None else len(values) > 0


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(good: bool, name: str, wanted: str, found: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {wanted}, got {found!r}")
