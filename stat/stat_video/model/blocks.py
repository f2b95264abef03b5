"""The blocks of STAT: shrinking temporal attention, MLP, temporal aggregation, stochastic depth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stat_kernels import ShrinkingTemporalAttention, linear_gelu, linear_residual
from stat_kernels.distributed import ClipParallel
from stat_video.model.config import Q_POOL, STATConfig


class DropPath(nn.Module):
    """Stochastic depth: training drops a residual branch for whole clips, scaling up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """The factors (B,) of a branch for the clips x, float32; None where nothing is dropped."""
        if self.rate == 0 or not self.training:
            return None
        keep = 1 - self.rate
        return torch.empty(x.shape[0], device=x.device).bernoulli_(keep) / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Mlp(nn.Module):
    """Linear, GELU, linear, and the residual that their result is added to.

    Args:
        dim, hidden, dim_out: channels.
        backend: of the attention; with "reference" bias, GELU and residual are plain PyTorch, too,
            with any other the best kernels that there are.
    """

    backend: str | None = None  # of the class: models pickled before it existed have it too

    def __init__(self, dim: int, hidden: int, dim_out: int, backend: str | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim_out)
        self.backend = "reference" if backend == "reference" else None

    def forward(self, x: Tensor, skip: Tensor, scale: Tensor | None = None) -> Tensor:
        """``skip + scale * mlp(x)``: x (B, ..., dim), skip (B, ..., dim_out), scale (B,) or 1."""
        hidden = linear_gelu(self.fc1, x, backend=self.backend)
        return linear_residual(self.fc2, hidden, skip, scale, backend=self.backend)


class STABlock(nn.Module):
    """A pre-norm transformer block on shrinking temporal attention (eq. 9 and 10).

    Args:
        config: of the network.
        stage: index of the block's stage.
        first: the first block of a stage but the network's first: its queries are pooled 2 x 2, and
            its skip is max pooling (3 x 3, stride 2, as in MViT), class tokens by-passing.
        dim_out: channels that the MLP gives; where they are not the stage's own, the MLP's skip is
            a linear layer on the normed input.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, config: STATConfig, stage: int, first: bool, dim_out: int, drop_path: float
    ) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.q_stride = Q_POOL if first else 1
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ShrinkingTemporalAttention(
            dim,
            config.num_heads[stage],
            window=config.window,
            q_stride=self.q_stride,
            kv_stride=config.kv_strides[stage] * self.q_stride,
            short_stride=config.short_stride,
            pool_kernel=config.pool_kernel,
            short=config.short,
            long=config.long,
            qkv_bias=config.qkv_bias,
            backend=config.backend,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim_out, config.backend)
        self.skip = nn.Linear(dim, dim_out) if dim_out != dim else None
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, grid: tuple[int, int], clip: ClipParallel | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """x (B, T, N, dim) on ``grid`` -> (B, T, N', dim_out) and its grid; clip as in `STAT`."""
        skip, scale = self._pool(x, grid), self.drop_path(x)
        x, grid_out = self.attn(self.norm1(x), grid, clip=clip, skip=skip, scale=scale)
        z = self.norm2(x)
        skip = x if self.skip is None else self.skip(z)
        return self.mlp(z, skip, self.drop_path(x)), grid_out

    def _pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.q_stride == 1:
            return x
        spatial = grid[0] * grid[1]
        first, x = x.split(
            (x.shape[2] - spatial, spatial), dim=2
        )  # the class token, if there is one
        images = x.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(images, kernel_size=3, stride=self.q_stride, padding=1)
        pooled = pooled.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, x.shape[:2])
        return torch.cat((first, pooled), dim=2)


class AggregationLayer(nn.Module):
    """A pre-norm transformer layer over the video token and one token a frame."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim, backend)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1 + T, dim) -> the same."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, 1 + T, D)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = linear_residual(self.proj, y, x, backend=self.mlp.backend)
        return self.mlp(self.norm2(x), x)
