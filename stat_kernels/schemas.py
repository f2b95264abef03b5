"""The operators' schemas, one text for both who define them.

The native library defines the operators when it is loaded: setup.py compiles this text into it.
Where there is no library, ``stat_kernels.native`` defines them from here. Nothing is imported.
"""

_INPUTS = (
    "Tensor q, Tensor k_cur, Tensor v_cur, Tensor? k_short, Tensor? v_short, "
    "Tensor? k_long, Tensor? v_long"
)
_REACH = "int left, int right, int frame_offset, bool causal_long"
_POOL_OPTIONS = "SymInt[] grid, int stride, int? short_stride, bool class_token, str long"
_WEIGHTS = (
    "Tensor? q_weight, Tensor? q_norm_weight, Tensor k_weight, Tensor k_norm_weight, "
    "Tensor v_weight, Tensor v_norm_weight"
)
_BIASES = "Tensor? q_norm_bias, Tensor k_norm_bias, Tensor v_norm_bias"
_SAVED = "Tensor kv, Tensor kv_stats, Tensor q, Tensor q_stats"
_CORE_OPTIONS = (
    "SymInt[] grid, int q_stride, int kv_stride, int? short_stride, bool class_token, str long, "
    "float eps, int left, int right, bool causal_long, float scale, str backend"
)

SCHEMAS = {
    "sta_forward": f"({_INPUTS}, {_REACH}, float scale, str backend) -> (Tensor out, Tensor lse)",
    "sta_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor? out, Tensor? lse, "
        f"{_REACH}, float scale, str backend) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "pool_forward": (
        f"(Tensor tokens, Tensor weight, Tensor norm_weight, Tensor norm_bias, {_POOL_OPTIONS}, "
        "float eps, str backend) -> (Tensor pooled, Tensor stats)"
    ),
    "pool_backward": (
        "(Tensor grad_pooled, Tensor tokens, Tensor weight, Tensor norm_weight, Tensor stats, "
        f"{_POOL_OPTIONS}, str backend) -> (Tensor grad_tokens, Tensor grad_params)"
    ),
    "core_forward": (
        f"(Tensor qkv, {_WEIGHTS}, {_BIASES}, {_CORE_OPTIONS}) -> "
        f"(Tensor out, Tensor lse, {_SAVED})"
    ),
    "core_backward": (
        f"(Tensor grad_out, Tensor qkv, {_WEIGHTS}, Tensor? out, Tensor? lse, {_SAVED}, "
        f"{_CORE_OPTIONS}) -> (Tensor grad_qkv, Tensor grad_kv_params, Tensor grad_q_params)"
    ),
    "bias_gelu_forward": "(Tensor x, Tensor bias, str backend) -> Tensor",
    "bias_gelu_backward": (
        "(Tensor grad_out, Tensor x, Tensor bias, str backend) -> (Tensor grad_x, Tensor grad_bias)"
    ),
    "bias_residual_forward": (
        "(Tensor skip, Tensor x, Tensor bias, Tensor? scale, str backend) -> Tensor"
    ),
    "bias_residual_backward": (
        "(Tensor grad_out, Tensor? scale, ScalarType dtype, str backend) -> "
        "(Tensor grad_x, Tensor grad_bias)"
    ),
}
