"""A process that writes a journal until it is killed:  python journal_process.py FOLDER [SEGMENT_BYTES]

Appends records that follow from their LSN alone, in batches, and prints each durable LSN once `commit` gave it.
Ends with 3 when the journal was taken over.
"""

import sys
from random import Random

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, Record, Tokens


def record_of(lsn: int) -> Record:
    """What stands under an LSN."""
    random = Random(lsn)
    if random.random() < 0.1:
        return Event("OUTPUT", {"text": random.randbytes(random.choice([1, 900, 9000]))})
    return Tokens(lsn % 7, lsn, 1, (random.randrange(1 << 17),), (-0.25 * (lsn % 40),))


def main() -> None:
    segment_bytes = int(sys.argv[2]) if len(sys.argv) > 2 else 64 << 20
    journal = Journal(sys.argv[1], segment_bytes=segment_bytes)
    random = Random(journal.durable_lsn)
    try:
        while True:
            for _ in range(random.choice([1, 1, 3, 40])):
                journal.append(record_of(journal.last_lsn + 1))
            print(journal.commit(), flush=True)
    except JournalError as error:
        sys.stderr.write(str(error))
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
