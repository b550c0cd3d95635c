"""What the chat path asks of accounts: may this request run, what does it cost, and how did it end."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from starlette.requests import HTTPConnection

from rorqual import log
from rorqual.errors import ConfigError, RequestError
from rorqual.ledger import keys
from rorqual.ledger.keys import Limits
from rorqual.ledger.ledger import Asked, Ledger, Reservation, Used, balance_of
from rorqual.money import amount_text
from rorqual.planner.prices import Cost, Price, PriceTable, Tokens, hosted_prices
from rorqual.server.auth import Gatekeeper, Identity

logger = log.get(__name__)

CLIENT_GONE = "client_gone"
CUT_OFF = "insufficient_system_resource"


class _Timing(Protocol):
    @property
    def queue_s(self) -> float: ...
    @property
    def first_token_s(self) -> float: ...


class Running(Protocol):
    """What a ticket needs of the request it was drawn for; `rorqual.engine.Request` is one."""

    @property
    def timing(self) -> _Timing: ...
    @property
    def error(self) -> Exception | None: ...
    def cancel(self) -> None: ...


class Tariff:
    """Prices of the models served: the user's table, then the hosted API's for names it has, else nothing.

    like: a hosted model whose prices hold for every model that has none. Raises: ConfigError when it has none itself.
    """

    def __init__(self, own: PriceTable | None = None, *, like: str | None = None) -> None:
        if like is not None and like not in hosted_prices().models():
            known = ", ".join(hosted_prices().models())
            raise ConfigError(f"{like!r} has no prices that could hold for other models. Use one of {known}.")
        self._own, self._like = own or PriceTable(), like
        self.currency = self._own.price[0].currency if self._own.price else "USD"

    def price(self, model: str, when: datetime) -> Price:
        """The price at that moment, all rates 0 for a model without one."""
        found = self._own.find(model, when, self.currency) or hosted_prices().find(model, when, self.currency)
        if found is None and self._like is not None:
            alike = hosted_prices().find(self._like, when, self.currency)
            found = None if alike is None else replace(alike, model=model)
        return found or Price(model, 0, 0, 0, self.currency)


@dataclass(frozen=True)
class Outcome:
    """How a request ended, for its log line and the counters."""

    asked: Asked
    used: Used
    currency: str
    first_token_s: float | None


class Ticket:
    """One request between admission and its end. Calls after its end do nothing."""

    def __init__(self, accounts: Accounts, asked: Asked, price: Price, held: Reservation | None) -> None:
        self._accounts, self._asked, self._price, self._held = accounts, asked, price, held
        self._started = accounts.clock() if held is None else held.started
        self._began = time.monotonic()
        self._usage: Callable[[], Mapping[str, Any]] = dict
        self._running: Running | None = None
        self._is_cut = False
        self._writing: Future[None] | None = None
        self.outcome: Outcome | None = None

    @property
    def asked(self) -> Asked:
        return self._asked

    @property
    def is_held(self) -> bool:
        """Whether money or a place is reserved for it, which has to be given back in time."""
        return self._held is not None

    def follow(self, running: Running, usage: Callable[[], Mapping[str, Any]]) -> None:
        """Say what runs, and where its usage object (of chat completions) can be read at any moment."""
        self._running, self._usage = running, usage
        if self._is_cut:
            running.cancel()

    def cut(self) -> None:
        """End the request where it stands; its answer says that the service did."""
        self._is_cut = True
        if self._running is not None:
            self._running.cancel()

    def cost(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """`rorqual.cost` of an answer: amounts as texts, the price and its date, and the cost without a cache."""
        return self._cost(usage).to_dict()

    async def settle(self, finish: str, status: int = 200) -> None:
        """Charge what was used; it is committed when this returns."""
        if self.outcome is None:
            usage = self._usage()
            cost = self._cost(usage)
            details = usage.get("completion_tokens_details") or {}
            used = Used(
                status,
                CUT_OFF if self._is_cut else finish,
                cost.tokens.hit + cost.tokens.miss,
                cost.tokens.hit,
                cost.tokens.miss,
                cost.tokens.output,
                int(details.get("reasoning_tokens") or 0),
                cost.total,
                cost.without_cache,
                time.monotonic() - self._began,
            )
            self._end(used)
        if self._writing is not None:
            # The writer finishes what it was given even when nobody waits for it any more.
            await asyncio.shield(asyncio.wrap_future(self._writing))

    def cancel(self, status: int = 500) -> None:
        """Give the reservation back and charge nothing: the request failed."""
        if self.outcome is None:
            self._end(Used(status, "error", duration=time.monotonic() - self._began))

    async def close(self, status: int, *, gone: bool) -> None:
        """End what was left open, as the HTTP exchange did: with that status, or with the client going away."""
        if self.outcome is None:
            if gone or status == 499:
                await self.settle(CLIENT_GONE, 499)
            elif status >= 400 or self._running is None or self._running.error is not None:
                self.cancel(status if status >= 400 else 500)
        await self.settle("stop", status)

    def _cost(self, usage: Mapping[str, Any]) -> Cost:
        at = datetime.fromtimestamp(self._started, UTC)
        return Cost(Tokens.from_usage(usage), self._price, at)

    def _end(self, used: Used) -> None:
        timing = None if self._running is None else self._running.timing
        first = None if timing is None or not timing.first_token_s else timing.queue_s + timing.first_token_s
        self.outcome = Outcome(self._asked, used, self._price.currency, first)
        self._writing = self._accounts.write(self._asked, self._held, self._started, used)


class Accounts:
    """Keys, budgets, limits and prices of a server. Without arguments: no keys, no bounds, nothing written.

    limits: those of keys that have none of their own, and of the server where it asks for no keys.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        *,
        given_keys: Mapping[str, str] | None = None,
        is_open: bool | None = None,
        limits: Limits | None = None,
        tariff: Tariff | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits or Limits()
        if ledger is None and self._limits:
            ledger = Ledger(None, clock=clock)
        self.ledger, self.clock, self._tariff = ledger, clock, tariff or Tariff()
        if ledger is not None:
            ledger.use_currency(self._tariff.currency)
        self.gatekeeper = Gatekeeper(given_keys or {}, None if ledger is None else ledger.database, is_open=is_open)
        # SQLite writes one after the other anyway; a thread of their own keeps them off the event loop.
        self._writer = None if ledger is None else ThreadPoolExecutor(1, "ledger")

    async def admit(
        self, http: HTTPConnection | None, model: str, *, prompt_tokens: int, max_tokens: int, user_id: str = ""
    ) -> Ticket:
        """A ticket for a request that is about to run, with the most it can cost reserved.

        http: where the middleware left who asks; None for nobody in particular.
        Raises: RequestError 429 over a limit of the key, 402 when its budget does not hold that much.
        """
        state: dict[str, Any] = {} if http is None else http.scope.setdefault("state", {})
        identity: Identity = state.get("identity") or Identity()
        price = self._tariff.price(model, datetime.fromtimestamp(self.clock(), UTC))
        asked = Asked(
            identity.account,
            user_id,
            model,
            "" if http is None else endpoint_of(http.scope),
            state.get("trace", ""),
            prompt_tokens,
            price.worst_case(prompt_tokens, max_tokens),
        )
        limits = identity.limits.or_else(self._limits)
        held = None
        if self.ledger is not None and (identity.account or limits):
            held = await self._reserve(self.ledger, asked, limits)
        ticket = Ticket(self, asked, price, held)
        state.setdefault("tickets", []).append(ticket)
        return ticket

    async def balance(self, identity: Identity) -> dict[str, Any]:
        """The body of `GET /user/balance`. A key without a budget is available and has nothing to count."""
        available, granted, topped_up = True, 0, 0
        if self.ledger is not None and identity.key is not None:
            key = await asyncio.to_thread(keys.named, self.ledger.database, identity.account)
            held = await asyncio.to_thread(self.ledger.held, identity.account)
            available, granted, topped_up = balance_of(key, held)
        info = {
            "currency": self._tariff.currency,
            "total_balance": amount_text(granted + topped_up),
            "granted_balance": amount_text(granted),
            "topped_up_balance": amount_text(topped_up),
        }
        return {"is_available": available, "balance_infos": [info]}

    def write(self, asked: Asked, held: Reservation | None, started: float, used: Used) -> Future[None] | None:
        """Hand the end of a request to the writer; None where nothing is kept."""
        if self._writer is None:
            return None
        return self._writer.submit(self._write, asked, held, started, used)

    def close(self) -> None:
        """Write what is waiting and close the ledger."""
        if self.ledger is not None and self._writer is not None:
            self._writer.shutdown()
            self.ledger.close()

    def _write(self, asked: Asked, held: Reservation | None, started: float, used: Used) -> None:
        assert self.ledger is not None
        try:
            if held is not None:
                self.ledger.settle(held, used)
            else:
                self.ledger.record(asked, started, used)
        except sqlite3.Error:  # the answer is made; it goes out all the same
            logger.exception("request %s could not be written to the ledger: %s", asked.trace, used)

    async def _reserve(self, ledger: Ledger, asked: Asked, limits: Limits) -> Reservation:
        assert self._writer is not None
        reserving = self._writer.submit(ledger.reserve, asked, limits)
        try:
            return await asyncio.shield(asyncio.wrap_future(reserving))
        except asyncio.CancelledError:  # the client left meanwhile; what is reserved for it must not stay

            def give_back(done: Future[Reservation]) -> None:
                if done.exception() is None:
                    self.write(asked, done.result(), done.result().started, Used(499, CLIENT_GONE))

            reserving.add_done_callback(give_back)
            raise
        except sqlite3.Error as error:
            raise RequestError(
                f"The server's ledger cannot be written ({error}), so nothing can be charged. Its operator has to act.",
                status=503,
                type="server_error",
            ) from error


def endpoint_of(scope: Mapping[str, Any]) -> str:
    """The route's pattern, so that there are few of them; `other` where none matches."""
    route = scope.get("route")
    if route is not None:
        return str(getattr(route, "path", "other"))
    path: str = scope["path"]  # refused before it was routed, perhaps
    known = getattr(scope.get("app"), "routes", ())
    return path if any(getattr(route, "path", None) == path for route in known) else "other"


def account_of(http: HTTPConnection | None) -> str:
    """The name of the key that asks; empty where none is asked for."""
    identity = None if http is None else http.scope.get("state", {}).get("identity")
    return "" if identity is None else str(identity.account)


def owner_of(http: HTTPConnection | None, user_id: str) -> str:
    """Whose a conversation is: the key's end user. Owners share neither cache nor remembered reasoning."""
    account = account_of(http)
    return f"{account}/{user_id}" if account else user_id
