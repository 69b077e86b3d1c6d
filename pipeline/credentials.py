"""User and password in a URI: taken off it where it enters, and known to this process alone.

So whatever is kept or shown, a record, a line of the outbox, what Ray pickles, an error, holds the URI without them.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_URI = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?:(?P<login>[^/?#]*)@)?(?P<place>[^?#]*)(?P<query>.*)", re.I | re.S
)
_SHOWN = re.compile(  # hf://name@revision is no login; behind "user:" all is taken for the password, up to the last @
    r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*://)(?:[^/\s'\":@]*:[^\s'\"]*|(?<!hf://)[^/\s'\"]*)@", re.I
)
_PATH = re.compile(r"sqlite:|file:/(?!/[^/])|[./~]")  # in whose names an @ says nothing
_ADDRESS = re.compile(r"(?!hf:|file:)[a-z0-9+.-]+:", re.I)
_whole: dict[str, str] = {}  # URIs as they were given, by what is left of them


def without_credentials(uri: str) -> str:
    """Return a URI without user, password and query, which this process remembers. Raises ValueError, without the URI,
    if it cannot be told where a password begins or ends."""
    parts = _URI.fullmatch(uri)
    if _PATH.match(uri) or (parts is None and "@" not in uri):
        return uri
    if parts is None:
        raise ValueError("it holds an @, but no scheme such as https:// before it; a path begins with / or ./")
    if "@" in parts["place"] + parts["query"]:
        raise ValueError("an @ stands behind the host; in a user or password write / as %2F, ? as %3F and # as %23")
    bare = parts["scheme"] + parts["place"]
    if bare != uri:
        _whole[bare] = uri
    return bare


def taking_none(uri: str) -> str:
    """Return a URI of what takes no user or password. Raises ValueError, without the URI, if it may hold them."""
    if redacted(uri) != uri or ("@" in uri and _ADDRESS.match(uri)):
        raise ValueError(
            "it takes no user or password, and so no @; S3 has the AWS variables for them, and Ray RAY_AUTH_TOKEN"
        )
    return uri


def with_credentials(uri: str) -> str:
    """Return a URI as it was given to `without_credentials`."""
    return _whole.get(uri, uri)


def credentials_of(uri: str) -> tuple[str, str] | None:
    """Return the user and the password that were given with a URI."""
    parts = _URI.fullmatch(with_credentials(uri))
    if parts is None or not parts["login"]:
        return None
    user, _, password = parts["login"].partition(":")
    return unquote(user), unquote(password)


def came_with_a_uri(credentials: tuple[str | None, str | None]) -> bool:
    """Tell whether a user and a password were given with any URI."""
    return any(credentials_of(uri) == credentials for uri in _whole)


def redacted(text: str) -> str:
    """Return a text with users and passwords cut out of the URIs in it."""
    return _SHOWN.sub(r"\1", text)
