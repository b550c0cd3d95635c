"""A tokenizer for engines that are asked for ids alone."""


class IdsOnly:
    """No text, and no token that ends a reply."""

    eos_token_id = -1
    control_token_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("this benchmark sends ids")

    def stream_decoder(self) -> "IdsOnly":
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
