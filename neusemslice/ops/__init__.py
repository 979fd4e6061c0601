"""Typed wrappers of the operators in ``torch.ops.neusemslice``.

Importing this package loads the compiled extension and registers shape inference for
``torch.compile`` and ``torch.export``. Every operator mutates only what its trailing underscore
and its docstring say.
"""

from neusemslice import _extension

_extension.load()

# The operators exist only once the extension is loaded.
from neusemslice.ops.class_stats import (  # noqa: E402
    STATISTICS,
    ClassOrder,
    ClassStats,
    class_order,
    class_stats_,
    class_stats_many_,
    class_stats_merge_,
)
from neusemslice.ops.contribution import CONTRIBUTION_STATISTICS, contribution_  # noqa: E402
from neusemslice.ops.gram import Gram, gram_  # noqa: E402
from neusemslice.ops.masked_optim import masked_adamw_, masked_sgd_  # noqa: E402
from neusemslice.ops.rows import (  # noqa: E402
    rows_bias_backward,
    rows_conv_backward,
    rows_linear_backward,
    rows_norm_backward,
)
from neusemslice.ops.similarity import (  # noqa: E402
    Edges,
    Neighbours,
    bitset_pack,
    bitset_similarity,
    bitset_similarity_edges,
    bitset_similarity_topk,
    bitset_unpack,
    pairwise_similarity,
    pairwise_similarity_edges,
    pairwise_similarity_topk,
)

__all__ = [
    "CONTRIBUTION_STATISTICS",
    "STATISTICS",
    "ClassOrder",
    "ClassStats",
    "Edges",
    "Gram",
    "Neighbours",
    "bitset_pack",
    "bitset_similarity",
    "bitset_similarity_edges",
    "bitset_similarity_topk",
    "bitset_unpack",
    "class_order",
    "class_stats_",
    "class_stats_many_",
    "class_stats_merge_",
    "contribution_",
    "gram_",
    "masked_adamw_",
    "masked_sgd_",
    "pairwise_similarity",
    "pairwise_similarity_edges",
    "pairwise_similarity_topk",
    "rows_bias_backward",
    "rows_conv_backward",
    "rows_linear_backward",
    "rows_norm_backward",
]
