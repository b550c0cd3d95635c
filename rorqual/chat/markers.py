"""The markers and the fixed wording of the DeepSeek-V4 prompt format.

The bar in the markers is U+FF5C and the low block is U+2581; the ASCII look-alikes are other tokens. Every
marker is one token of the vocabulary; everything else here (headings, tag names, `<tool_result>`) is ordinary
text. The wording is what released checkpoints were trained on, so a changed space is a bug.
"""

import re
from typing import Final

from rorqual.tokenizer.special import ASSISTANT as ASSISTANT
from rorqual.tokenizer.special import BOS, DSML, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, LATEST_REMINDER, USER
from rorqual.tokenizer.special import END_THINK as THINK_END
from rorqual.tokenizer.special import THINK as THINK_START

IMAGE: Final = "<｜deepseek_image｜>"

TASK_MARKERS: Final[dict[str, str]] = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# What the encoder may write by itself; used to tell its own markers from the same characters in callers'
# text.
MARKERS: Final[tuple[str, ...]] = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    LATEST_REMINDER,
    THINK_START,
    THINK_END,
    DSML,
    IMAGE,
    FIM_BEGIN,
    FIM_HOLE,
    FIM_END,
    *TASK_MARKERS.values(),
)
MARKER_PATTERN: Final = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")

# A reply may not hold these in its reasoning or content; inside the values of a call they are text.
FORBIDDEN_IN_REPLY: Final[tuple[str, ...]] = (BOS, EOS, THINK_START, THINK_END, DSML)

THINKING_MODES: Final = ("chat", "thinking")
REVISIONS: Final = ("2026-04", "2026-07")
ROLES: Final = ("system", "user", "assistant", "tool", "latest_reminder", "developer")

CALLS_OPEN: Final = f"<{DSML}tool_calls>"
CALLS_CLOSE: Final = f"</{DSML}tool_calls>"
INVOKE_OPEN: Final = f"<{DSML}invoke"
INVOKE_CLOSE: Final = f"</{DSML}invoke>"
PARAMETER_OPEN: Final = f"<{DSML}parameter"
PARAMETER_CLOSE: Final = f"</{DSML}parameter>"

RESULT_OPEN: Final = "<tool_result>"
RESULT_CLOSE: Final = "</tool_result>"

TOOLS_BEFORE_SCHEMAS: Final = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"{CALLS_OPEN}" block like the following:

{CALLS_OPEN}
{INVOKE_OPEN} name="$TOOL_NAME">
{PARAMETER_OPEN} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_CLOSE}
...
{INVOKE_CLOSE}
{INVOKE_OPEN} name="$TOOL_NAME2">
...
{INVOKE_CLOSE}
{CALLS_CLOSE}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""

TOOLS_AFTER_SCHEMAS: Final = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

RESPONSE_FORMAT_HEADING: Final = """## Response Format:

You MUST strictly adhere to the following schema to reply:
"""

_EFFORT_A: Final = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root \
cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial \
scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered \
alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""

_EFFORT_B: Final = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively \
decompose the problem into its most fundamental components, trace every causal chain to its root, and \
resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are \
certain that no assumption remains unchecked and no error remains undiscovered.

"""

# Text put before the first message in thinking mode. The same word selects other text in each revision, which
# is why the revision belongs to the checkpoint and not to the request.
EFFORT_TEXTS: Final[dict[str, dict[str | None, str]]] = {
    "2026-04": {None: "", "high": "", "max": _EFFORT_A},
    "2026-07": {None: "", "low": "", "high": _EFFORT_A, "max": _EFFORT_B},
}
