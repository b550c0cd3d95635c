"""Pages of several tensors from rows of bytes: what reading them from disk ends with.

P pages, N rows. A row holds one page's bytes of every part, part after part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.ops import registry
from rorqual.ops.native import library


def scatter(content: Tensor, pages: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Fill page pages[i] of every part from row i of `content`.

    Shapes: content uint8 [N, bytes of a page in all parts together], its rows contiguous; parts [P, ...], contiguous.
    """
    is_native = registry.allows("native") and library.load() is not None
    if is_native and content.is_cpu and content.stride(-1) == 1 and all(part.is_cpu for part in parts):
        places = [(part.data_ptr(), part.stride(0) * part.itemsize) for part in parts]
        library.call(
            "scatter_pages", content, torch.tensor(pages), torch.tensor(places),
            len(pages), content.stride(0), len(places),
        )  # fmt: skip
        return
    reference(content, pages, parts)


def reference(content: Tensor, pages: Sequence[int], parts: Sequence[Tensor]) -> None:
    """The same in torch."""
    at = 0
    for part in parts:
        size = part[0].nbytes
        rows = content[:, at : at + size].view(part.dtype).unflatten(1, part.shape[1:])
        part.index_copy_(0, torch.tensor(pages, dtype=torch.int64, device=part.device), rows.to(part.device))
        at += size
