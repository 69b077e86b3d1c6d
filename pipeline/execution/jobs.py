"""Jobs of a running Ray cluster, by its Jobs API: handed over once under an id, followed to their end, stopped.

A job goes on without whoever handed it over. So a connection that breaks is made again, and the log, which Ray then
sends from its beginning, goes on where it was. The token is read here and sent in a header: it is in no error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pipeline.credentials import taking_none
from pipeline.errors import ConfigError, LostError, RunError

T = TypeVar("T")

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ANSWER_S = 60.0  # at most, for one request
SILENT_S = 150.0  # of a log, after which its stream is opened anew: one that is dead sounds like one that is quiet
PATIENCE_S = 600.0  # without any answer, after which the job is left to itself
PAUSE_S = (0.5, 10.0)  # between two tries, first and longest


class JobEnd(NamedTuple):
    """How a job ended: Ray's word for it, the command's exit status if it had one, and what Ray says about it."""

    status: str
    exit_status: int | None
    message: str


class Jobs:
    """The Jobs API of the cluster whose dashboard is at `address`; `note` is told when the connection breaks, and
    `variables` are those of the environment, which Ray reads too.

    Raises:
        ConfigError: the address is none, nobody answers there, or the token is missing or refused.
    """

    def __init__(self, address: str, note: Callable[[str], None], variables: MutableMapping[str, str]) -> None:
        self.address, self._note = checked_address(address), note
        token = read_token(variables)
        self._sent = token is not None
        headers = {"Authorization": f"Bearer {token}"} if self._sent else {}
        try:
            with _set_aside(variables, ADDRESS_VARIABLES):  # which Ray would take in place of the address
                self._client = _client()(self.address, headers=headers)
        except _broken() as error:
            raise ConfigError(
                f"Ray's Jobs API does not answer at {self.address}: {str(error).rstrip('.')}. Give --address the URL "
                "of the cluster's dashboard, such as http://HEAD:8265."
            ) from error
        except _refused():
            raise self._unauthorized() from None

    def hand_over(self, job_id: str, command: str, folder: Path, metadata: dict[str, str]) -> dict[str, str] | None:
        """Have the cluster run a shell command in a copy of `folder`, unless it knows a job by this id; then return
        the metadata of that one.

        Raises:
            RunError: the cluster refuses the job.
            LostError: nobody answers.
        """

        def known_or_new() -> dict[str, str] | None:
            try:
                return self._metadata(job_id)
            except LookupError:
                pass
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(folder)},
                    metadata=metadata,
                )
            except RuntimeError as refusal:
                try:
                    return self._metadata(job_id)  # somebody else handed it over in this very moment
                except LookupError:
                    raise RunError(f"The cluster at {self.address} refuses the job {job_id}: {refusal}") from refusal
            return None

        return self._patiently(job_id, known_or_new)

    def next_id(self, job_id: str) -> str:
        """Return the id of what is run again once it has ended: this one, or with the first number, from 2 on, whose
        job goes on or is not there. Raises LostError: nobody answers."""
        for number in itertools.count(1):
            numbered = job_id if number == 1 else f"{job_id}-{number}"
            try:
                if self._patiently(numbered, partial(self._end, numbered)) is None:
                    break
            except LookupError:
                break
        return numbered

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobEnd:
        """Give all of the job's log to `write`, each character once and in order, until the job has ended.

        Raises:
            LookupError: the cluster knows no such job.
            LostError: nobody answers any more; the job goes on.
        """
        log = _Log(write)
        pause = PAUSE_S[0]
        while True:
            before = log.written
            cut = asyncio.run(self._tail(job_id, log))
            end = self._patiently(job_id, lambda: self._end(job_id), cut)
            if end is not None:
                try:  # what a stream that broke at the very end did not bring
                    log.take(0, self._patiently(job_id, lambda: self._client.get_job_logs(job_id)))
                except LostError as error:
                    self._note(f"The end of the job's log cannot be read: {error}")
                return end
            pause = PAUSE_S[0] if log.written > before else min(2 * pause, PAUSE_S[1])
            time.sleep(pause)

    def stop(self, job_id: str) -> JobEnd:
        """Have a job end, and wait until it has. Raises LookupError: the cluster knows no such job."""
        self._patiently(job_id, lambda: self._client.stop_job(job_id))
        while (end := self._patiently(job_id, lambda: self._end(job_id))) is None:
            time.sleep(PAUSE_S[0])
        return end

    def _metadata(self, job_id: str) -> dict[str, str]:
        return dict(self._client.get_job_info(job_id).metadata or {})

    def _end(self, job_id: str) -> JobEnd | None:
        details = self._client.get_job_info(job_id)
        if not details.status.is_terminal():
            return None
        return JobEnd(details.status.value, details.driver_exit_code, details.message or "")

    async def _tail(self, job_id: str, log: _Log) -> Exception | None:
        """Follow one stream of the log; return what broke it, or None if it ended or was quiet for too long."""
        stream = self._client.tail_job_logs(job_id)
        position = 0
        try:
            while True:
                try:
                    text = await asyncio.wait_for(anext(stream), SILENT_S)
                except (StopAsyncIteration, TimeoutError):
                    return None
                except _broken() as error:
                    return error
                position = log.take(position, text)
        finally:
            await stream.aclose()

    def _patiently(self, job_id: str, ask: Callable[[], T], cut: Exception | None = None) -> T:
        """Return the answer, asking again while the connection is broken; `cut` has broken it already."""
        since, pause = time.monotonic(), PAUSE_S[0]
        if cut is not None:
            self._cut(cut)
        while True:
            try:
                answer = ask()
            except _refused():
                raise self._unauthorized() from None
            except _broken() as error:
                if time.monotonic() - since >= PATIENCE_S:
                    raise LostError(
                        f"The cluster at {self.address} has not answered for {PATIENCE_S:.0f} s: "
                        f"{str(error).rstrip('.')}. The job {job_id} goes on without this command, if its cluster does."
                    ) from error
                if cut is None:
                    self._cut(error)
                cut = error
                time.sleep(pause)
                pause = min(2 * pause, PAUSE_S[1])
            else:
                if cut is not None:
                    self._note(f"connected to {self.address} again")
                return answer

    def _cut(self, error: Exception) -> None:
        self._note(f"the connection to {self.address} is cut ({type(error).__name__}); the job goes on. Trying again")

    def _unauthorized(self) -> ConfigError:
        what = "refuses the token that was sent" if self._sent else "asks for a token, and none was found"
        return ConfigError(
            f"The cluster at {self.address} {what}. Set RAY_AUTH_TOKEN to its token, which `ray get-auth-token` prints "
            "on its head, or RAY_AUTH_TOKEN_PATH to a file that holds it; RAY_AUTH_MODE=disabled sends none."
        )


class _Log:
    """Writes a log that is told from its beginning again and again; each character once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self.written = write, 0

    def take(self, position: int, text: str) -> int:
        """Write what is new of a text that begins `position` characters into the log; return where it ends."""
        end = position + len(text)
        if end > self.written:
            self._write(text[max(0, self.written - position) :])
            self.written = end
        return end


def checked_address(address: str) -> str:
    """Return the URL of a dashboard. Raises ConfigError: it is none, or holds a user or a password."""
    try:
        url = taking_none(address if "://" in address else f"http://{address}").rstrip("/")
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise ConfigError(f"--address is no address of a cluster: {error}.") from None
    if not valid or parts.query or parts.fragment:
        raise ConfigError(
            f"--address is {address!r}; it takes the URL of a Ray cluster's dashboard, such as http://HEAD:8265."
        )
    return url


def read_token(variables: Mapping[str, str]) -> str | None:
    """Return the token that Ray would take by these variables of the environment, or None where there is none or
    RAY_AUTH_MODE is disabled.

    Raises:
        ConfigError: it is asked for and missing, cannot be read, or is none. The token is not in the message.
    """
    mode = variables.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    origin, token = "RAY_AUTH_TOKEN", variables.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        named = variables.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named or "~/.ray/auth_token").expanduser()
        origin = f"RAY_AUTH_TOKEN_PATH ({path})" if named else str(path)
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            if named or mode == "token":
                why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
                raise ConfigError(
                    f"No token can be read from {origin}: {why}. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file "
                    "that holds the cluster's token; RAY_AUTH_MODE=disabled sends none."
                ) from None
            return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"What {origin} holds is no token: a token is one word of printable ASCII characters. `ray get-auth-token` "
            "prints that of a cluster."
        )
    return token or None


def _client() -> Any:
    """Return Ray's client, made to give up on what never answers and to tell what is missing from what is broken."""
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # each upload, each stream that ends is INFO to them

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
            answer = super()._do_request(method, endpoint, timeout=ANSWER_S, **settings)
            if answer.status_code in (502, 503, 504):  # a gateway's words for a head that is away
                raise ConnectionError(f"the answer is status {answer.status_code}.")
            if answer.status_code == 404 and endpoint.startswith("/api/jobs/"):
                raise LookupError(f"no such job: {endpoint}")
            return answer

    return Client


def _broken() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises, a head that cannot answer now, and what answers but is no Ray."""
    import aiohttp
    import requests

    return (OSError, RuntimeError, KeyError, requests.RequestException, aiohttp.ClientError)


def _refused() -> type[Exception]:
    from ray.exceptions import AuthenticationError

    refused: type[Exception] = AuthenticationError
    return refused


@contextmanager
def _set_aside(variables: MutableMapping[str, str], names: tuple[str, ...]) -> Iterator[None]:
    """Have variables not be set while inside."""
    kept = {name: variables.pop(name) for name in names if name in variables}
    try:
        yield
    finally:
        variables.update(kept)
