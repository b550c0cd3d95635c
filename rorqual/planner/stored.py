"""What the tensors of a checkpoint weigh, by part of the network."""

from collections.abc import Iterable

from rorqual.planner.parameters import find_component


def bytes_by_component(stored: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Bytes of stored tensors (official name, dtype, bytes) by component and dtype, largest component first.

    Scales count with their weights; tensors that no network has are `other`.
    """
    out: dict[str, dict[str, int]] = {}
    for name, dtype, nbytes in stored:
        share = out.setdefault(find_component(name) or "other", {})
        share[dtype] = share.get(dtype, 0) + nbytes
    return dict(sorted(out.items(), key=lambda item: -sum(item[1].values())))
