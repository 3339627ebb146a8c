# SPDX-License-Identifier: Apache-2.0
"""MiniMax Sparse Attention: block selection, sparse attention and the KL loss that trains the selection.

`import msa` loads the operators' library and registers `torch.ops.msa.*`. The functions here are the same operators with
documentation; `msa.nn` holds a layer built of them. See `help(msa.select_blocks)` and its neighbours for shapes, dtypes and
errors, and `msa.ops` for the rules they share.

The library is looked for in the file that the environment variable MSA_LIBRARY names, else in `build/lib` of the source
tree this package lies in, else beside this file. Tested in tests/python/test_ops_package.py.
"""

from msa._library import library_path, load_library

load_library()

from msa import nn, ops  # noqa: E402  (they need the operators)
from msa.ops import (  # noqa: E402
    check_device_data,
    cuda_is_built,
    dense_attention,
    dense_attention_paged,
    index_kl,
    select_blocks,
    select_blocks_oracle,
    select_blocks_oracle_paged,
    select_blocks_paged,
    selection_recall,
    sparse_attention,
    sparse_attention_paged,
    topk_blocks,
    version,
)

__version__ = version()

__all__ = [
    "check_device_data",
    "cuda_is_built",
    "dense_attention",
    "dense_attention_paged",
    "index_kl",
    "library_path",
    "nn",
    "ops",
    "select_blocks",
    "select_blocks_oracle",
    "select_blocks_oracle_paged",
    "select_blocks_paged",
    "selection_recall",
    "sparse_attention",
    "sparse_attention_paged",
    "topk_blocks",
    "version",
]
