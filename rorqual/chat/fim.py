"""Fill-in-the-middle prompts: text before a gap and text after it; the model writes the gap, then EOS.

Source: the V3 training format, whose three markers V4 keeps. No BOS by default: whether DeepSeek's hosted
endpoint puts one is not known, and the markers already say where the document starts.
"""

from rorqual.chat.markers import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from rorqual.chat.prompt import PromptWriter, RenderedPrompt
from rorqual.errors import RequestError


def render_fim(prefix: str, suffix: str, *, add_default_bos_token: bool = False) -> RenderedPrompt:
    """Like `fim_prompt`, with the places of the markers (for tokenising callers' text without them)."""
    for param, value in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(value, str):
            raise RequestError(
                f"{param} is {type(value).__name__}, but only text can stand around the gap. "
                f'Send a string; "" means nothing there.',
                param=param,
            )
    writer = PromptWriter()
    if add_default_bos_token:
        writer.fixed(BOS)
    writer.fixed(FIM_BEGIN)
    writer.caller(prefix)
    writer.fixed(FIM_HOLE)
    writer.caller(suffix)
    writer.fixed(FIM_END)
    return writer.finish("prefix")


def fim_prompt(prefix: str, suffix: str, *, add_default_bos_token: bool = False) -> str:
    """Return the text after which the model writes what belongs between `prefix` and `suffix`.

    >>> fim_prompt("def add(a, b):", "print(add(1, 2))")
    '<｜fim▁begin｜>def add(a, b):<｜fim▁hole｜>print(add(1, 2))<｜fim▁end｜>'

    Raises: RequestError when either is not a string.
    """
    return render_fim(prefix, suffix, add_default_bos_token=add_default_bos_token).text
