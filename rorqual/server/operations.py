"""Running a server for others: accounts, log, meters, and going away, put around the application in one place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest

from rorqual.server import logs
from rorqual.server.accounts import Accounts
from rorqual.server.auth import Identity
from rorqual.server.drain import Drain
from rorqual.server.gate import Gate
from rorqual.server.guard import MAX_BODY_BYTES, Guard
from rorqual.server.meters import Meters
from rorqual.server.watch import Watch


@dataclass(frozen=True)
class Operations:
    """How a server is run; the defaults ask for no key, bound nothing and keep nothing.

    allowed_origins: web pages that may call the API from a browser, `*` for all; none otherwise.
    max_body_bytes: the largest request body that is read.
    """

    accounts: Accounts = field(default_factory=Accounts)
    allowed_origins: Sequence[str] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    meters: Meters = field(default_factory=Meters)
    drain: Drain = field(default_factory=Drain)

    def close(self) -> None:
        """Close the accounts' ledger."""
        self.accounts.close()

    def install(self, app: FastAPI, allowed_hosts: Collection[str] | None) -> None:
        """Put the middleware around `app`, innermost first, and add the balance's route."""
        app.add_middleware(Gate, accounts=self.accounts, drain=self.drain)
        app.add_middleware(Guard, allowed_hosts=allowed_hosts, max_body_bytes=self.max_body_bytes)
        if self.allowed_origins:  # outside of the gate: browsers ask without a key, and must be able to read refusals
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.allowed_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[*logs.TRACE_HEADERS, "retry-after"],
            )
        app.add_middleware(Watch, meters=self.meters, drain=self.drain)

        @app.get("/user/balance")
        @app.get("/v1/user/balance", include_in_schema=False)
        async def user_balance(http: HttpRequest) -> dict[str, Any]:
            """What is left of the budget of the key that asks."""
            identity: Identity = getattr(http.state, "identity", Identity())
            return await self.accounts.balance(identity)
