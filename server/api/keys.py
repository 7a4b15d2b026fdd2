"""API keys: where they come from, and who a presented one belongs to.

Only SHA-256 digests are kept. A key is long and random, unlike a password, so a fast hash gives
nothing away; a salt would only slow the comparison.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from server.config import HttpConfig
from server.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Printable ASCII that separates neither entries nor name and key.
_KEY = re.compile(r"[\x21-\x2b\x2d-\x39\x3b-\x7e]+")
_SHORTEST = 16
_BEARER = "bearer "


class KeyRing:
    """Names by digest of their key; several keys may share a name."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._names = dict(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._names.values())

    def name_of(self, authorization: str) -> str | None:
        """Whose key an Authorization header holds; None for nobody's.

        Every digest is compared, in constant time, whichever matches.
        """
        if authorization[: len(_BEARER)].lower() != _BEARER:
            return None
        presented = _digest(authorization[len(_BEARER) :].strip())
        found = None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, presented):
                found = name
        return found


def load_keys(http: HttpConfig, environ: Mapping[str, str] = os.environ) -> KeyRing:
    """The keys of `http.keys_file` and of the environment variable `http.keys_env`.

    An entry is `key` or `name:key`; entries stand on lines of their own, or in the variable also
    between commas. Lines that begin with # are comments.

    Raises:
        ConfigError: a source that cannot be read, holds no key or a malformed one; says where, and
            never what.
    """
    names: dict[bytes, str] = {}
    if http.keys_file is not None:
        _add(names, _read_file(http.keys_file).splitlines(), http.keys_file)
    if (text := environ.get(http.keys_env)) is not None:
        _add(names, re.split(r"[,\n]", text), f"environment variable {http.keys_env}")
    return KeyRing(names)


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"http.keys_file: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        # Its text would quote a byte of a key.
        raise ConfigError(f"http.keys_file: {path}: not plain ASCII") from None


def _add(names: dict[bytes, str], entries: Iterable[str], source: str) -> None:
    stripped = (entry.strip() for entry in entries)
    written = [
        (place, entry)
        for place, entry in enumerate(stripped, start=1)
        if entry and not entry.startswith("#")
    ]
    if not written:
        raise ConfigError(f"{source} holds no API key; leave it out to serve without keys")
    for place, entry in written:
        name, separator, key = entry.rpartition(":")
        if separator and not _NAME.fullmatch(name):
            raise ConfigError(
                f"{source}, entry {place}: a key's name is up to 64 letters, digits, dots, "
                "underscores and hyphens; a key itself holds no colon"
            )
        if not _KEY.fullmatch(key) or len(key) < _SHORTEST:
            raise ConfigError(
                f"{source}, entry {place}: a key is {_SHORTEST} or more printable ASCII "
                "characters without spaces, commas and colons"
            )
        if _digest(key) in names:
            raise ConfigError(f"{source}, entry {place}: this key has been given before")
        names[_digest(key)] = name or _unused(names, place)


def _unused(names: Mapping[bytes, str], place: int) -> str:
    """`key-` and the first number from `place` on that no key is called by."""
    taken = set(names.values())
    return next(name for n in count(place) if (name := f"key-{n}") not in taken)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
