"""What of a conversation is learned: the ids that the assistant wrote, found exactly, and no other.

The prompt is the encoder's own, tokenised as it is when serving, so a model is trained on what it will meet. What the
assistant wrote is noted by the encoder while it writes, never searched for in the text: a user who types a marker
changes nothing. Source: V4 report, chat format and quick instructions.

A reply is learned in the context in which it would be generated. Later turns of a plain conversation do not show the
reasoning of earlier ones, so there each turn is an example of its own; where all reasoning stays (tools are declared)
or there is none, one sequence shows every reply its context, and is one example.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rorqual.chat import RenderedPrompt, render_messages
from rorqual.chat.markers import IMAGE
from rorqual.data import encode_pieces
from rorqual.data.conversations import pieces_of_rendered
from rorqual.errors import DataError, RequestError
from rorqual.posttrain.conversations import Conversation, PlainText
from rorqual.posttrain.examples import Example
from rorqual.tokenizer import BOS, Tokenizer

_ASKING = ("user", "tool", "developer")
"""Roles after which earlier reasoning is dropped."""


def examples_of(sample: Conversation | PlainText, tokenizer: Tokenizer, revision: str = "2026-04") -> list[Example]:
    """The examples of one row; none where all its replies are masked.

    Raises: DataError naming the row for messages that cannot be rendered, or without any reply.
    """
    if isinstance(sample, PlainText):
        return [_plain_example(sample, tokenizer)]
    return [
        example
        for rendered, learned in _sequences(sample, revision)
        if (example := _example(rendered, learned, tokenizer, sample.source)).num_targets
    ]


def _sequences(sample: Conversation, revision: str) -> list[tuple[RenderedPrompt, set[int]]]:
    """Rendered sequences and the messages that are learned in each.

    Every turn is rendered as it would be when it is generated; one whose text begins with the whole text of the turn
    before it, is that sequence grown longer.
    """
    turns = _turns(sample.messages)
    if not turns:
        raise DataError(f"{sample.source} has no assistant message, so there is nothing to learn. Add an answer.")
    sequences: list[tuple[RenderedPrompt, set[int]]] = []
    for turn in turns:
        rendered = _render(sample, turn, revision)
        learned = _learned(sample, turn, rendered)
        if sequences and rendered.text.startswith(sequences[-1][0].text):
            learned |= sequences.pop()[1]
        sequences.append((rendered, learned))
    return sequences


def _turns(messages: Sequence[dict[str, Any]]) -> list[range]:
    """The messages between one question and the next, as places in the list, each ending with an assistant message."""
    turns: list[range] = []
    first = 0
    for i, message in enumerate(messages):
        if message.get("role") in _ASKING:
            first = i + 1
        elif message.get("role") == "assistant":
            if turns and turns[-1].start == first:
                turns.pop()
            turns.append(range(first, i + 1))
    return turns


def _render(sample: Conversation, turn: range, revision: str) -> RenderedPrompt:
    mode = sample.thinking_mode
    if mode is None:
        declares = sample.tools or any(m.get("tools") for m in sample.messages)
        places: Iterable[int] = range(len(sample.messages)) if declares else turn
        mode = "thinking" if any(sample.messages[i].get("reasoning_content") for i in places) else "chat"
    try:
        rendered = render_messages(
            sample.messages[: turn.stop],
            sample.tools,
            mode,
            sample.reasoning_effort if mode == "thinking" else None,
            revision,
            sample.drop_thinking,
        )
    except RequestError as error:
        raise DataError(f"{sample.source}: {error}") from error
    if IMAGE in rendered.text and (IMAGE, True) in rendered.pieces():
        raise DataError(f"{sample.source} has an image, of which nothing is learned here. Use rows of text alone.")
    return rendered


def _learned(sample: Conversation, turn: range, rendered: RenderedPrompt) -> set[int]:
    """Which messages of `turn` are learned. Beside the reply to a quick instruction nothing is, unless it is asked for:
    the rest of that conversation was already said, and the instruction only reads it.
    """
    replies = {reply.message: reply for reply in rendered.replies if reply.message in turn}
    has_task = any(reply.is_task for reply in replies.values())
    learned = set()
    for place, reply in replies.items():
        weight = _weight(sample, place)
        if weight is None:
            weight = place >= sample.num_given and (reply.is_task or not has_task)
        if weight:
            learned.add(place)
    return learned


def _weight(sample: Conversation, place: int) -> bool | None:
    """Whether the row itself says that a message is (`weight: 1`) or is not (`weight: 0`, `mask: true`) learned."""
    message = sample.messages[place]
    if message.get("mask") is not None:
        if not isinstance(message["mask"], bool | int) or message["mask"] not in (0, 1):
            raise DataError(f"{sample.source} has the mask {message['mask']!r}. Use true: the message is not learned.")
        if message["mask"]:
            return False
    weight = message.get("weight")
    if weight is None:
        return None
    if weight not in (0, 1):
        raise DataError(
            f"{sample.source} has a message of weight {weight!r}, and a message is learned or not. Use 0 or 1."
        )
    return bool(weight)


def _example(rendered: RenderedPrompt, learned: set[int], tokenizer: Tokenizer, source: str) -> Example:
    """Ids as when serving; an id is learned where all its bytes are a learned reply's."""
    ids = tokenizer.encode_guarded(rendered.pieces())
    ends = np.cumsum(tokenizer.byte_lengths[ids])
    starts = ends - tokenizer.byte_lengths[ids]
    text = rendered.text
    mask = np.zeros(len(ids), dtype=np.bool_)
    position = num_bytes = 0
    for reply in rendered.replies:
        begin = num_bytes + len(text[position : reply.start].encode())
        position, num_bytes = reply.stop, begin + len(text[reply.start : reply.stop].encode())
        if reply.message in learned:
            mask |= (starts >= begin) & (ends <= num_bytes)
    if num_bytes + len(text[position:].encode()) != (ends[-1] if len(ids) else 0):
        raise DataError(
            f"{source} does not come back from its ids: the tokenizer has no token for some of its characters, so "
            "what was learned could not be told apart. Use the tokenizer.json of a V4 checkpoint."
        )
    return Example(ids, mask.tolist(), source)


def _plain_example(sample: PlainText, tokenizer: Tokenizer) -> Example:
    """BOS, the prompt, and what is learned: the completion and its end. Prompt and completion are tokenised apart, as
    they are when the completion is generated. A text without prompt may be cut anywhere, unless it begins with BOS:
    then it is a conversation that somebody has rendered, whose markers count.
    """
    if sample.prompt is None and sample.completion.startswith(BOS):
        ids, loss_mask = encode_pieces(tokenizer, pieces_of_rendered(sample.completion))
        return Example(ids.tolist(), loss_mask.tolist(), sample.source)
    given = [tokenizer.bos_token_id]
    if sample.prompt:
        given += tokenizer.encode(sample.prompt.removeprefix(BOS), allow_special=False)
    written = tokenizer.encode(sample.completion, allow_special=False) + [tokenizer.eos_token_id]
    mask = [False] * len(given) + [True] * len(written)
    example = Example(given + written, mask, sample.source)
    return dataclasses.replace(example, is_splittable=True) if sample.prompt is None else example
