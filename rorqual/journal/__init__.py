"""The write-ahead log of rollouts: append, group commit, checksums, recovery, replay.

    with rorqual.Journal("runs/journal") as journal:
        lsn = journal.append(Tokens(request=1, first_position=0, policy_version=0, ids=(17,), logprobs=(-0.5,)))
        journal.commit()                       # durable now
        for lsn, record in journal.replay():   # in order, each checked
            ...

`frames` has the format of the files, `recovery` what counts after a crash; `docs/journal.md` has both in words.
"""

from rorqual.journal.compaction import Compacted, compact
from rorqual.journal.keys import call_key, canonical
from rorqual.journal.reader import Reader
from rorqual.journal.reading import replay_folder
from rorqual.journal.records import (
    Attach,
    Close,
    EnvSnapshot,
    Event,
    Fence,
    KVReference,
    PolicySwitch,
    Preempt,
    Record,
    Request,
    Resume,
    Reward,
    RngNote,
    Tokens,
    ToolCall,
    ToolResult,
)
from rorqual.journal.verification import Report, verify
from rorqual.journal.writer import Journal

__all__ = [
    "Attach",
    "Close",
    "Compacted",
    "EnvSnapshot",
    "Event",
    "Fence",
    "Journal",
    "KVReference",
    "PolicySwitch",
    "Preempt",
    "Reader",
    "Record",
    "Report",
    "Request",
    "Resume",
    "Reward",
    "RngNote",
    "Tokens",
    "ToolCall",
    "ToolResult",
    "call_key",
    "canonical",
    "compact",
    "replay_folder",
    "verify",
]
