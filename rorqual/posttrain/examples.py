"""One training example: token ids, and which of them are learned."""

from dataclasses import dataclass

from rorqual.errors import DataError


@dataclass(frozen=True)
class Example:
    """Ids of one text, and for each whether it is learned.

    `loss_mask[i]` is about `ids[i]`: True where the model is trained to predict this id from those before it. The
    first id has nothing before it, so its mask has no effect.
    Raises: DataError unless both are equally long.
    """

    ids: list[int]
    loss_mask: list[bool]
    source: str = ""
    """Where it comes from (`chat.jsonl:12`), for messages."""
    is_splittable: bool = False
    """Whether it may be cut anywhere (plain text): each part is learned without what stood before it."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_mask):
            raise DataError(
                f"An example{f' from {self.source}' if self.source else ''} has {len(self.ids)} ids and "
                f"{len(self.loss_mask)} mask values; each id needs one. Make them equally long."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Ids that are learned."""
        return sum(self.loss_mask[1:])
