"""Which rule each of torch's functions has, by name."""

from __future__ import annotations

import torch.nn.functional as F

from neusemslice.profiling import compositions as made
from neusemslice.profiling import rules
from neusemslice.profiling.compositions import made_of
from neusemslice.profiling.paired import Rule, Table


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


TABLE = Table(
    rules={
        **_rules(
            rules.linear,
            """
        add sub rsub neg pos positive sum mean cumsum trace diff cat stack hstack vstack
        dstack column_stack row_stack where masked_fill masked_select masked_scatter copy clone
        contiguous to float double half bfloat16 type type_as cpu cuda
        view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as
        broadcast_to broadcast_tensors permute transpose swapaxes swapdims movedim moveaxis t T mT
        adjoint getitem setitem narrow select slice index_select index index_put index_add
        index_copy index_fill take take_along_dim gather scatter_add
        split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unbind unfold fold
        im2col col2im
        repeat tile repeat_interleave roll flip fliplr flipud rot90 tril triu diag diagonal
        diag_embed as_strided detach_copy pad constant_pad_nd zero fill alias lift_fresh
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa
        """,
        ),
        **_rules(
            rules.product,
            """
        mul matmul rmatmul mm bmm mv dot inner outer ger addmm addbmm baddbmm addmv addr addcmul
        linear bilinear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d
        conv_transpose3d einsum lerp
        """,
        ),
        **_rules(rules.quadratic, "square var var_mean"),
        **_rules(
            rules.smooth,
            """
        gelu silu sigmoid tanh softplus log_sigmoid logsigmoid mish elu selu celu erf erfc exp2
        expm1 log log2 log10 log1p sin cos tan sinh cosh asinh atan arctan logit log_sigmoid_forward
        """,
        ),
        **_rules(
            rules.kinked,
            """
        leaky_relu prelu relu6 hardtanh clamp clamp_min clamp_max threshold abs softshrink
        hardshrink nan_to_num floor ceil round trunc fix sign
        """,
        ),
        **_rules(rules.maximum, "max min amax amin maximum minimum fmax fmin"),
        **_rules(rules.softmax, "softmax log_softmax logsumexp"),
        **_rules(rules.dropout, "dropout alpha_dropout feature_dropout feature_alpha_dropout"),
        **_rules(rules.kept, "detach data"),
        **rules.CLOSED,
        "pow": rules.power,
        "div": rules.quotient,
        **{
            f"max_pool{n}d{name}": rules.max_pool(pool, n, indices=bool(name))
            for n, pool in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d), 1)
            for name in ("", "_with_indices")
        },
        "adaptive_max_pool1d": rules.max_pool(F.adaptive_max_pool1d, 1, indices=True),
        "adaptive_max_pool2d": rules.max_pool(F.adaptive_max_pool2d, 2, indices=True),
        "adaptive_max_pool3d": rules.max_pool(F.adaptive_max_pool3d, 3, indices=True),
        "layer_norm": made_of(made.layer_norm),
        "rms_norm": made_of(made.rms_norm),
        "group_norm": made_of(made.group_norm),
        "scaled_dot_product_attention": made_of(made.scaled_dot_product_attention),
        "glu": made_of(made.glu),
        "hardsigmoid": made_of(made.hardsigmoid),
        "hardswish": made_of(made.hardswish),
        "std": made_of(made.std),
        "linalg_vector_norm": made_of(made.vector_norm),
        "batch_norm": rules.batch_norm,
        "instance_norm": made.instance_norm,
    },
    followed=_names(
        """
        eq ne lt le gt ge isnan isinf isfinite isclose logical_and logical_or logical_not
        logical_xor bucketize searchsorted argmax argmin argsort nonzero any all long int short bool
        """
    ),
    made=_names(
        """
        zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full
        register_hook retain_grad requires_grad
        """
    ),
    values=_names(
        """
        item __bool__ __int__ __float__ __index__ __contains__ tolist equal allclose is_nonzero
        """
    ),
    leaving=_names("numpy __array__"),
)
