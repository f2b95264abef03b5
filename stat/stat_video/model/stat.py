"""STAT, the shrinking temporal attention transformer for video classification."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stat_kernels.distributed import ClipParallel
from stat_video.model.blocks import AggregationLayer, STABlock
from stat_video.model.config import STATConfig
from stat_video.model.pretrained import MODEL_CARD, PretrainedMixin
from stat_video.model.stem import ConvStem


class STAT(
    nn.Module,
    PretrainedMixin,
    library_name="stat-kernels",
    license="apache-2.0",
    pipeline_tag="video-classification",
    model_card_template=MODEL_CARD,
):
    """Video clip to class logits ("Shrinking Temporal Attention in Transformers for Video Action
    Recognition", AAAI 2022).

    A convolutional stem makes tokens, a class token is put before each frame's, position embeddings
    are added, stages of `STABlock` follow (fewer tokens and more channels from one to the
    next), and a learnable video token gathers the frames' class tokens in a transformer layer.

    ``save_pretrained(directory)`` and ``STAT.from_pretrained(directory)`` write and read weights
    (safetensors) and configuration (config.json).

    Args:
        config: a `STATConfig`, for example ``STATConfig.preset("stat_b16")``.
    """

    def __init__(self, config: STATConfig) -> None:
        super().__init__()
        if not isinstance(config, STATConfig):
            raise TypeError(f"config must be a STATConfig, got {type(config).__name__}")
        self.config = config
        self.checkpointing = False
        kt, ks = config.stem_temporal_kernel, config.stem_spatial_kernel
        self.stem = ConvStem(
            (config.in_channels, *config.stem_channels, config.dims[0]),
            kernel=(kt, ks, ks),
            strides=config.stem_strides,
        )
        self._add_tokens(config)
        self.stages: Any = _stages(config)  # of STABlock; a ModuleList's items are typed as Module
        dim = config.dims[-1]
        self.aggregation = nn.ModuleList(
            AggregationLayer(
                dim, config.num_heads[-1], config.mlp_ratio, config.qkv_bias, config.backend
            )
            for _ in range(config.aggregation_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(_initialise_linear)

    def _add_tokens(self, config: STATConfig) -> None:
        """Class and video token and the position embeddings; None for what there is not."""

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))

        tokens = config.token_grid[0] * config.token_grid[1] + config.class_token
        self.spatial_position = parameter(tokens, config.dims[0])
        self.register_parameter("class_token", None)
        self.register_parameter("temporal_position", None)
        self.register_parameter("video_token", None)
        if config.class_token:
            self.class_token = parameter(config.dims[0])
        if config.temporal_position:
            self.temporal_position = parameter(config.token_frames, config.dims[0])
        if config.aggregation_layers:
            self.video_token = parameter(config.dims[-1])

    def forward(
        self, video: Tensor, *, interpolate: bool = False, clip: ClipParallel | None = None
    ) -> Tensor:
        """Clips to logits.

        Args:
            video: (B, in_channels, T, H, W), normalised; T is at most the configuration's frames
                (a shorter clip has the first temporal positions), H and W are its image_size.
            interpolate: take any T, H and W; position embeddings are interpolated, linearly over
                time for more frames than the configuration's, bicubically over another grid.
            clip: how several processes divide the frames of tokens of a clip of the configuration's
                size. Each passes its `part` of the video and gets the same logits. The gradient of
                the loss is then the mean of what the processes compute, as DDP and FSDP average it.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: the clip is not of such a size.
        """
        features = self.forward_features(video, interpolate=interpolate, clip=clip)
        return self.head(self.dropout(features))

    def forward_features(
        self, video: Tensor, *, interpolate: bool = False, clip: ClipParallel | None = None
    ) -> Tensor:
        """As ``forward``, to the classifier's input (B, dims[-1])."""
        reads = None
        if clip is None:
            self._check(video, interpolate)
        else:
            reads = self._reads(clip)
            self._check_part(video, reads, interpolate)
        x, grid = self._embed(video, reads), self._grid(video)
        for stage in self.stages:
            for block in stage:
                if self.checkpointing and torch.is_grad_enabled():
                    x, grid = checkpoint(block, x, grid, clip, use_reentrant=False)
                else:
                    x, grid = block(x, grid, clip)
        frames = x[:, :, 0] if self.config.class_token else x.mean(dim=2)  # (B, T', dim)
        if clip is not None:
            frames = clip.gather(frames)
        if not self.aggregation:
            return self.norm(frames.mean(dim=1))
        x = torch.cat((self.video_token.expand(frames.shape[0], 1, -1), frames), dim=1)
        for layer in self.aggregation:
            x = layer(x)
        return self.norm(x[:, 0])

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, first to last."""
        return [block for stage in self.stages for block in stage]

    @property
    def head_dims(self) -> set[int]:
        """Head dims of the attention."""
        c = self.config
        return {dim // heads for dim, heads in zip(c.dims, c.num_heads, strict=True)}

    def set_channels_last(self, enabled: bool) -> None:
        """Memory layout of the stem's convolutions (see `ConvStem`)."""
        self.stem.set_channels_last(enabled)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices and tokens that are not decayed: none."""
        return set()

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Activation checkpointing of every block: less memory in training, one more forward."""
        self.checkpointing = enabled

    def part(self, video: Tensor, clip: ClipParallel | None) -> Tensor:
        """The frames of a whole video (B, C, T, H, W) that this process reads of a shared clip."""
        return video if clip is None else video[:, :, self._reads(clip)[0]]

    def _reads(self, clip: ClipParallel) -> list[slice]:
        """What the stem reads for this process's frames of tokens. Raises ValueError."""
        if clip.num_frames != self.config.token_frames:
            raise ValueError(
                f"clip must divide the clip's {self.config.token_frames} frames of tokens, got "
                f"{clip}"
            )
        return self.stem.reads(self.config.frames, clip.own)

    def _embed(self, video: Tensor, reads: list[slice] | None) -> Tensor:
        """Tokens with positions, (B, T', N, dims[0]), each frame's class token first."""
        x = self.stem(video, reads)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(*x.shape[:2], 1, -1), x), dim=2)
        return x + self._position(x.shape[1], self._grid(video), reads)

    def _grid(self, video: Tensor) -> tuple[int, int]:
        """Height and width of the stem's grid of tokens for these images."""
        size = video.shape[3:]
        if torch.jit.is_tracing():  # a traced size cannot be an entry of an operator's int list
            size = torch.Size(map(int, size))
        return self.config.grid_of(*size)

    def _position(self, frames: int, grid: tuple[int, int], reads: list[slice] | None) -> Tensor:
        """Embeddings (T' or 1, N, dims[0]) of a clip's tokens, interpolated where need be."""
        position: Tensor = self.spatial_position
        table = self.config.token_grid
        if grid != table:
            spatial = table[0] * table[1]
            first, image = position.split((position.shape[0] - spatial, spatial))
            image = image.T.unflatten(1, table)[None]  # (1, dims[0], h, w)
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
            position = torch.cat((first, image[0].flatten(1).T))
        if self.temporal_position is None:
            return position
        temporal: Tensor = self.temporal_position
        if reads is not None:
            temporal = temporal[reads[-1]]
        if frames > temporal.shape[0]:
            temporal = F.interpolate(temporal.T[None], size=frames, mode="linear")[0].T
        return position + temporal[:frames, None]

    def _check_part(self, video: Tensor, reads: list[slice], interpolate: bool) -> None:
        c, frames = self.config, reads[0].stop - reads[0].start
        if interpolate:
            raise ValueError("interpolate and clip exclude each other, got both")
        expected = (c.in_channels, frames, c.image_size, c.image_size)
        if video.dim() != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(
                f"video must be this process's part (B, {', '.join(map(str, expected))}) of the "
                f"clip, got {tuple(video.shape)}"
            )

    def _check(self, video: Tensor, interpolate: bool) -> None:
        c = self.config
        size = c.image_size
        fits = video.dim() == 5 and video.shape[1] == c.in_channels and min(video.shape[2:]) > 0
        fits_table = fits and video.shape[2] <= c.frames and tuple(video.shape[3:]) == (size, size)
        if not (fits if interpolate else fits_table):
            raise ValueError(
                f"video must be (B, {c.in_channels}, T, {size}, {size}) with T from 1 to "
                f"{c.frames}, or any T, H, W where interpolate=True, got {tuple(video.shape)}"
            )


def _stages(config: STATConfig) -> nn.ModuleList:
    rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
    stages = nn.ModuleList()
    for stage, depth in enumerate(config.depths):
        next_dim = config.dims[min(stage + 1, len(config.dims) - 1)]
        blocks = (
            STABlock(
                config,
                stage,
                first=i == 0 and stage > 0,
                dim_out=next_dim if i == depth - 1 else config.dims[stage],
                drop_path=rates.pop(0),
            )
            for i in range(depth)
        )
        stages.append(nn.ModuleList(blocks))
    return stages


def _initialise_linear(module: nn.Module) -> None:
    """Truncated normal of 0.02 and zero biases; convolutions and norms keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
