"""The attention layer: projections, pooling to three granularities, the operation, projection."""

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stat_kernels.cache import KVCache
from stat_kernels.checks import check_window
from stat_kernels.core import PoolParameters, packed_attention, pooled_rows
from stat_kernels.functional import shrinking_temporal_attention
from stat_kernels.mlp import linear_residual
from stat_kernels.pool_layout import pool_layout
from stat_kernels.products import apply_linear, linear

if TYPE_CHECKING:  # loading torch.distributed takes a while, and few callers need it
    from stat_kernels.distributed import ClipParallel

LONG_MODES = ("class", "mean", "none")


class ShrinkingTemporalAttention(nn.Module):
    """Multi-head shrinking temporal attention (STAT, AAAI 2022, eq. 1 to 8) over a clip's tokens.

    Each frame's queries attend to the frame's own pooled tokens, to the ``window - 1`` nearest
    frames' tokens pooled once more, and to one token of every frame. Keys and values are pooled by
    a depthwise convolution on head-dim channels, the same for all heads, then normalised over the
    head dim; a class token by-passes the convolution and goes through the norm (all of it as in
    MViT). Queries are pooled and normalised only where ``q_stride`` is above 1.

    Args:
        dim: channels of the input and of the output.
        num_heads: H; the head dim D is ``dim // num_heads``.
        window: t_o, odd: the frame itself and ``window // 2`` neighbours on either side; or a pair
            (left, right), how many neighbours before and after it.
        q_stride: stride of the query pooling, height and width; 1 leaves the queries as they are.
        kv_stride: stride of the key and value pooling.
        short_stride: average pooling from the keys to the neighbour frames' keys; a partial window
            at the grid's edge is averaged over what it holds (7x7 becomes 4x4).
        pool_kernel: (time, height, width) of the pooling convolution, odd; time 1 is per frame.
        short: attend to the neighbour frames.
        long: "class" attends to every frame's class token, "mean" to the mean of every frame's
            pooled tokens, "none" to neither.
        causal_long: frame i attends to those tokens of frames 0 to i only. With it, ``window=(r,
            0)`` and a pooling kernel of one frame, no output depends on later frames.
        qkv_bias: bias of the query, key and value projection.
        backend: of the operation (see `stat_kernels.explain`); None is the best usable one.

    Attributes:
        fused: pool and attend by one operator where the backend has kernels for both; then
            ``pool_q``, ``pool_k`` and ``pool_v`` are not called as modules, so their hooks do not
            run. False pools with PyTorch's own operations, for hooks and for comparisons.

    Raises:
        TypeError, ValueError: an argument is off; the message names it.
    """

    fused: bool = True  # of the class: layers pickled before it existed have it too

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int] = 7,
        q_stride: int = 1,
        kv_stride: int = 1,
        short_stride: int = 2,
        pool_kernel: tuple[int, int, int] = (1, 3, 3),
        short: bool = True,
        long: str = "class",
        qkv_bias: bool = True,
        backend: str | None = None,
        causal_long: bool = False,
    ) -> None:
        super().__init__()
        check_window(window)
        counts = {
            "dim": dim,
            "num_heads": num_heads,
            "q_stride": q_stride,
            "kv_stride": kv_stride,
            "short_stride": short_stride,
        }
        for name, value in counts.items():
            if not _is_count(value):
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads {num_heads}, got {dim}")
        sizes = tuple(pool_kernel) if isinstance(pool_kernel, (tuple, list)) else ()
        if len(sizes) != 3 or not all(_is_count(k) and k % 2 for k in sizes):
            raise ValueError(
                f"pool_kernel must be three odd ints (time, height, width), got {pool_kernel!r}"
            )
        if long not in LONG_MODES:
            raise ValueError(f"long must be one of 'class', 'mean', 'none', got {long!r}")
        if causal_long and long == "none":
            raise ValueError("causal_long needs long keys, got long='none'")

        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window, self.short, self.long, self.causal_long = window, short, long, causal_long
        self.q_stride, self.kv_stride, self.short_stride = q_stride, kv_stride, short_stride
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.pool_q = TokenPool(self.head_dim, pool_kernel, q_stride) if q_stride > 1 else None
        self.pool_k = TokenPool(self.head_dim, pool_kernel, kv_stride)
        self.pool_v = TokenPool(self.head_dim, pool_kernel, kv_stride)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        cache: KVCache | None = None,
        clip: "ClipParallel | None" = None,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Attention over the tokens of a clip.

        Args:
            x: (B, T, 1 + H * W, dim), each frame's class token first; with ``long`` other than
                "class" also (B, T, H * W, dim).
            grid: (H, W).
            cache: keys and values of the frames before x, to which those of x are added. It needs
                ``window=(left, 0)``, ``causal_long=True`` where there are long keys, and a pooling
                kernel of one frame.
            clip: where several processes share the clip: x and the result then are this process's
                frames of it. Hooks of ``qkv`` do not run.
            skip: (B, T, N', dim), the residual that the output is added to, in the pass that adds
                the bias of ``proj`` (see `stat_kernels.bias_residual`); None for none.
            scale: (B,), a factor of each clip's output in that sum; only with ``skip``.

        Returns:
            y (B, T, N', dim), class tokens as in x, and the grid (H', W') of its spatial tokens:
            ``grid`` over ``q_stride``, rounded up. With ``skip``, y is the sum.

        Raises:
            ValueError: x does not fit ``dim``, ``grid`` or the cache, or lacks class tokens.
        """
        class_token = self._check(x, grid)
        if cache is not None and self.pool_k.kernel[0] > 1:
            raise ValueError(
                f"a cache needs a pool_kernel of one frame in time, got {self.pool_k.kernel}"
            )
        if cache is not None and clip is not None:
            raise ValueError("cache and clip exclude each other, got both")
        out: Tensor | None
        if clip is not None:
            out = self._attend_part(x, grid, class_token, clip)
        else:
            # eq. 1: (B, T, N, 3, H, D)
            qkv = self._linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))
            fused = self.fused and cache is None
            out = self._attend_fused(qkv, grid, class_token) if fused else None
            if out is None:
                out = self._attend(qkv, grid, class_token, cache)
        grid_q = (-(-grid[0] // self.q_stride), -(-grid[1] // self.q_stride))
        if skip is None:
            return self._linear(self.proj, out.flatten(3)), grid_q
        backend = "reference" if self._plain else None
        return linear_residual(self.proj, out.flatten(3), skip, scale, backend=backend), grid_q

    @property
    def _plain(self) -> bool:
        """Whether PyTorch's own operations are asked for around the attention."""
        return not self.fused or self.backend == "reference"

    def _linear(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x) if self._plain else apply_linear(module, x)

    def _attend_fused(self, qkv: Tensor, grid: tuple[int, int], class_token: bool) -> Tensor | None:
        """Pooling and attention by one operator; None where no kernel pools such tokens."""
        return packed_attention(
            qkv,
            None if self.pool_q is None else self.pool_q.parameters_of_pooling(),
            self.pool_k.parameters_of_pooling(),
            self.pool_v.parameters_of_pooling(),
            grid=grid,
            q_stride=self.q_stride,
            kv_stride=self.kv_stride,
            short_stride=self.short_stride if self.short else None,
            class_token=class_token,
            long=self.long,
            eps=self.pool_k.norm.eps,
            window=self.window,
            causal_long=self.causal_long,
            backend=self.backend,
        )

    def _attend(
        self, qkv: Tensor, grid: tuple[int, int], class_token: bool, cache: KVCache | None = None
    ) -> Tensor:
        """The same with PyTorch's operations around the attention, and with past frames' keys."""
        q, k, v = qkv.unbind(3)  # (B, T, N, H, D) each
        if self.pool_q is not None:
            q, _ = self.pool_q(q, grid, class_token)
        pool = self._shrunk if cache is None else self._pool
        k_cur, k_short, k_long = pool(k, self.pool_k, grid, class_token)
        v_cur, v_short, v_long = pool(v, self.pool_v, grid, class_token)
        attend = partial(cache.attend, self) if cache is not None else shrinking_temporal_attention
        return attend(
            q, k_cur, v_cur, k_short, v_short, k_long, v_long,
            window=self.window, causal_long=self.causal_long, backend=self.backend,
        )  # fmt: skip

    def _attend_part(
        self, x: Tensor, grid: tuple[int, int], class_token: bool, clip: "ClipParallel"
    ) -> Tensor:
        """The same for this process's frames; queries are projected while keys travel."""
        from stat_kernels.distributed import KeyExchange

        halo = self.pool_k.kernel[0] // 2  # frames that the pooling reads on either side
        wide, first = clip.extend(x, halo, halo), clip.within(halo, halo).start
        own = slice(clip.own.start - first, clip.own.stop - first)
        k, v = self._project(wide, slice(1, 3)).unbind(3)
        k_cur, k_short, k_long = self._pool(k, self.pool_k, grid, class_token, own)
        v_cur, v_short, v_long = self._pool(v, self.pool_v, grid, class_token, own)
        own_keys = (k_short, v_short, k_long, v_long)
        exchange = KeyExchange(clip, *own_keys, self.window, self.causal_long)
        if self.pool_q is None:
            q = self._project(x, slice(1)).squeeze(3)
        else:
            q, _ = self.pool_q(self._project(wide, slice(1)).squeeze(3), grid, class_token)
            q = q[:, own]
        *keys, frame_offset = exchange.finish()
        return shrinking_temporal_attention(
            q, k_cur, v_cur, *keys, window=self.window, frame_offset=frame_offset,
            causal_long=self.causal_long, backend=self.backend,
        )  # fmt: skip

    def _project(self, x: Tensor, slots: slice) -> Tensor:
        """Some of queries, keys and values: (B, T, N, slots, H, D)."""
        if not isinstance(self.qkv, nn.Linear):
            kind = type(self.qkv).__name__
            raise TypeError(f"qkv must be a torch.nn.Linear where a clip is shared, got {kind}")
        weight, bias = self.qkv.weight.unflatten(0, (3, -1))[slots].flatten(0, 1), self.qkv.bias
        if bias is not None:
            bias = bias.unflatten(0, (3, -1))[slots].flatten()
        y = F.linear(x, weight, bias) if self._plain else linear(x, weight, bias)
        return y.unflatten(-1, (-1, self.num_heads, self.head_dim))

    def _pool(
        self,
        tokens: Tensor,
        pool: "TokenPool",
        grid: tuple[int, int],
        class_token: bool,
        own: slice = slice(None),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`_shrunk` of some frames, by one operator where the backend pools such tokens."""
        rows, short_stride = None, self.short_stride if self.short else None
        if self.fused:
            rows = pooled_rows(
                tokens, pool.parameters_of_pooling(), grid=grid, stride=pool.stride,
                short_stride=short_stride, class_token=class_token, long=self.long,
                eps=pool.norm.eps, backend=self.backend,
            )  # fmt: skip
        if rows is None:
            current, short, long = self._shrunk(tokens, pool, grid, class_token)
        else:
            layout = pool_layout(grid, pool.stride, short_stride, self.long)
            current, short, long = layout.split(rows)
        return (
            current[:, own],
            None if short is None else short[:, own],
            None if long is None else long[:, own],
        )

    def _shrunk(
        self, tokens: Tensor, pool: "TokenPool", grid: tuple[int, int], class_token: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pooling of keys (or values), eq. 2, and its granularities."""
        keep = class_token and self.long == "class"
        if class_token and not keep:  # nobody will attend to them
            tokens = tokens[:, :, 1:]
        return self._granularities(*pool(tokens, grid, keep))

    def _granularities(
        self, tokens: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys (or values) of the frame (B, T, Nc, H, D), its neighbours (Ns), the clip (no N)."""
        long = None
        if self.long == "class":
            # split, not two slices: its gradient is one concatenation instead of two padded sums
            long, tokens = tokens.split((1, grid[0] * grid[1]), dim=2)
            long = long.squeeze(2)
        elif self.long == "mean":
            long = tokens.mean(dim=2)
        return tokens, self._shrink(tokens, grid) if self.short else None, long

    def _shrink(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average pooling (eq. 3), partial windows too: (B, T, Nc, H, D) -> (B, T, Ns, H, D)."""
        if self.short_stride == 1:
            return tokens
        pooled = F.avg_pool2d(
            _as_images(tokens, grid).flatten(0, 1),
            self.short_stride,
            ceil_mode=True,
            count_include_pad=False,
        )
        return _as_tokens(pooled.unflatten(0, tokens.shape[:2]), self.head_dim)

    def _check(self, x: Tensor, grid: tuple[int, int]) -> bool:
        """Whether x has class tokens; raises where it does not fit."""
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be (height, width), two ints of at least 1, got {grid!r}")
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, T, N, {self.dim}), got {tuple(x.shape)}")
        spatial = grid[0] * grid[1]
        if x.shape[2] == spatial + 1:
            return True
        if self.long == "class":
            raise ValueError(
                f"x must be (B, T, {spatial + 1}, {self.dim}), a class token and then the "
                f"{grid[0]} x {grid[1]} grid's tokens, got {tuple(x.shape)}"
            )
        if x.shape[2] != spatial:
            raise ValueError(
                f"x must be (B, T, N, {self.dim}) with N {spatial} or, with class tokens, "
                f"{spatial + 1} for the {grid[0]} x {grid[1]} grid, got {tuple(x.shape)}"
            )
        return False

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, "
            f"q_stride={self.q_stride}, kv_stride={self.kv_stride}, "
            f"short_stride={self.short_stride}, short={self.short}, long={self.long!r}, "
            f"causal_long={self.causal_long}, backend={self.backend!r}"
        )


class TokenPool(nn.Module):
    """Depthwise convolution of the spatial tokens, all heads alike; LayerNorm over the head dim.

    Args:
        head_dim: D.
        kernel: (time, height, width), odd; padded by half of it.
        stride: along height and width.
    """

    def __init__(self, head_dim: int, kernel: tuple[int, int, int], stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(kernel), stride
        self.weight = nn.Parameter(torch.empty(head_dim, 1, *kernel))
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's own initialisation of a convolution, which MViT keeps for its pooling."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], class_token: bool
    ) -> tuple[Tensor, tuple[int, int]]:
        """tokens (B, T, N, H, D), N = h * w or one more -> the same of the pooled grid, and it."""
        head_dim = tokens.shape[-1]
        if class_token:
            first, tokens = tokens.split((1, grid[0] * grid[1]), dim=2)
        pooled = self._convolve(_as_images(tokens, grid))
        grid = (pooled.shape[-2], pooled.shape[-1])
        pooled = _as_tokens(pooled, head_dim)
        if class_token:
            pooled = torch.cat((first, pooled), dim=2)
        return self.norm(pooled), grid

    def parameters_of_pooling(self) -> PoolParameters:
        """What an operator needs that computes this module's forward."""
        return PoolParameters(self.weight, self.norm.weight, self.norm.bias)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"

    def _convolve(self, images: Tensor) -> Tensor:
        """(B, T, C, h, w) -> (B, T, C, h', w'), C the channels of all heads."""
        channels, (kt, kh, kw) = images.shape[2], self.kernel
        # the weights are few, the tokens many: repeat the former, leave the latter where they are
        weight = self.weight.repeat(channels // self.weight.shape[0], 1, 1, 1, 1)
        if kt == 1:  # frames are images: 2-D convolutions are the faster ones everywhere
            pooled = F.conv2d(
                images.flatten(0, 1),
                weight.squeeze(2),
                stride=self.stride,
                padding=(kh // 2, kw // 2),
                groups=channels,
            )
            return pooled.unflatten(0, images.shape[:2])
        pooled = F.conv3d(
            images.transpose(1, 2),
            weight,
            stride=(1, self.stride, self.stride),
            padding=(kt // 2, kh // 2, kw // 2),
            groups=channels,
        )
        return pooled.transpose(1, 2)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _as_images(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, T, h * w, H, D) -> (B, T, H * D, h, w), a view in channels-last order."""
    return tokens.flatten(3).unflatten(2, grid).permute(0, 1, 4, 2, 3)


def _as_tokens(images: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * D, h, w) -> (B, T, h * w, H, D), a view where the images are channels-last."""
    return images.permute(0, 1, 3, 4, 2).flatten(2, 3).unflatten(-1, (-1, head_dim))
