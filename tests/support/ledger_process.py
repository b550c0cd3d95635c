"""A process that uses a ledger until it is killed:  python ledger_process.py FILE ACCOUNT MODE

`spend` reserves and settles for ever and prints each settled cost once it is settled; `hold` reserves, says so and
waits; `race N` tries N reservations at once with the others and prints how many it got.
"""

import sys
import time
from pathlib import Path

from rorqual.errors import RequestError
from rorqual.ledger.keys import Limits
from rorqual.ledger.ledger import Asked, Ledger, Used

WORST = 100


def asked(account: str) -> Asked:
    return Asked(account, "", "m", "/v1/chat/completions", "trace", 10, WORST)


def main() -> None:
    path, account, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    ledger = Ledger(path)
    if mode == "hold":
        ledger.reserve(asked(account), Limits())
        print("held", flush=True)
        time.sleep(600)
    elif mode == "spend":
        number = 0
        while True:
            reservation = ledger.reserve(asked(account), Limits())
            number += 1
            ledger.settle(reservation, Used(200, "stop", 10, 4, 6, 3, 0, number, number + 1, 0.1))
            print(number, flush=True)
    else:
        won = 0
        for _ in range(int(sys.argv[4])):
            try:
                reservation = ledger.reserve(asked(account), Limits())
            except RequestError as error:
                assert error.status == 402, error
                continue
            won += 1
            ledger.settle(reservation, Used(200, "stop", cost=WORST))
        print(won, flush=True)


if __name__ == "__main__":
    main()
