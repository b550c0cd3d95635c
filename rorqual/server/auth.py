"""Who asks: the key of a request's headers, and the two ways the hosted API says no.

Source: DeepSeek's API documentation and its observed answers.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError, RequestError
from rorqual.ledger import keys
from rorqual.ledger.database import Database
from rorqual.ledger.keys import Key, Limits


@dataclass(frozen=True)
class Identity:
    """Whom a request is for. account: the key's name, empty where no key is asked for."""

    account: str = ""
    limits: Limits = Limits()
    key: Key | None = None


class NoKey(Exception):
    """A request without any key; the hosted API answers it in plain text."""


def sent_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key of the two headers; a Bearer value wins, also when it is wrong."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return (x_api_key or "").strip() or None


class Gatekeeper:
    """Knows the keys: those given on the command line, by name, and those of the ledger.

    Whether keys are asked for is settled when the server starts, so that revoking the last one opens nothing.
    """

    def __init__(self, given: Mapping[str, str], database: Database | None, *, is_open: bool | None = None) -> None:
        """is_open: ask for no key; None asks when there is one to ask for.

        Raises: ConfigError when a key was given the name of one in the ledger.
        """
        self._given = {name: keys.digest(secret) for name, secret in given.items()}
        self._database = database
        in_ledger = [] if database is None else keys.every(database)
        for key in in_ledger:
            if key.name in self._given:
                raise ConfigError(
                    f"a key was given by the name {key.name!r}, which a key of the ledger has, so their usage would be "
                    "one. Name it otherwise in the key file."
                )
        self.says_open = is_open is True
        has_keys = bool(self._given) or any(key.revoked is None for key in in_ledger)
        self.is_open = not has_keys if is_open is None else is_open

    def identify(self, authorization: str | None, x_api_key: str | None) -> Identity:
        """Raises: NoKey without one, RequestError 401 for one that is not known."""
        if self.is_open:
            return Identity()
        secret = sent_key(authorization, x_api_key)
        if secret is None:
            raise NoKey
        digest, name = keys.digest(secret), None
        for known, expected in self._given.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, expected):
                name = known
        if name is not None:
            return Identity(name)
        key = None if self._database is None else keys.find(self._database, secret)
        if key is None:
            raise RequestError(
                f"Authentication Fails, Your api key: ****{secret[-4:]} is invalid",
                status=401,
                type="authentication_error",
                code="invalid_request_error",
            )
        return Identity(key.name, key.limits, key)


def check_exposure(host: str, gatekeeper: Gatekeeper) -> None:
    """Raises: ConfigError when others could reach a server that asks for no key, and nobody said that they may."""
    if gatekeeper.is_open and not gatekeeper.says_open and not is_loopback(host):
        raise ConfigError(
            f"the server would listen on {host!r}, which other machines reach, and it has no keys, so anybody could "
            "use it. Make keys (rorqual keys add NAME), give some (--key-file FILE), or say --no-auth."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key_file(path: Path) -> dict[str, str]:
    """Keys by name from lines of `KEY` or `NAME KEY`; `#` begins a comment. Raises: ConfigError."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the key file {path} cannot be read: {error}. Give a text file with one key a line."
        ) from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, secret = (f"key-{number}", words[0]) if len(words) == 1 else (words[0], words[1])
        if len(words) > 2 or name in found:
            raise ConfigError(
                f"line {number} of {path} is not `KEY` or `NAME KEY` with a name of its own. Correct that line."
            )
        found[name] = secret
    if not found:
        raise ConfigError(f"the key file {path} holds no key, so nobody could come in. Write one key a line.")
    return found
