"""`bitmill submit`: another command as a job of a Ray cluster, under an id that runs once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

import jobs
import pipeline
from jobs.commands.options import Exit
from jobs.display import print_table
from jobs.submitted import MARK
from pipeline.config.run import Config
from pipeline.credentials import credentials_of, redacted
from pipeline.errors import ConfigError, RunError
from pipeline.execution.jobs import JobEnd, Jobs
from pipeline.provenance import CODE_FILE, code_version
from pipeline.store.locations import storage_uri, tracking_uri
from pipeline.tracking.runs import sqlite_file

CONFIG_FILE = "config.yaml"
LIMIT_BYTES = 8 * 2**20  # of what is sent: code and a configuration are about 1 MiB
ANOTHER_ID = "give --id another name"
REPEATED = ("retrain",)  # commands that do something else the next time
CODE = {".py", ".html", ".js"}  # what an installed package holds; figures and tables of benchmarks stay here
TEXTS = ("data.source", "data.validation", "data.test")
MODELS = ("model.source", "model.tokenizer")  # where they are directories
KIB = 2**10


class Submission(NamedTuple):
    """What is to be sent: the job's id, its arguments behind `bitmill`, and the content of its files by their paths.
    `repeats`: once the job of this id has ended, the same is run again, under the id with a number."""

    id: str
    arguments: tuple[str, ...]
    files: dict[str, bytes]
    repeats: bool = False

    @property
    def entrypoint(self) -> str:
        """Return the shell command of the job."""
        return shlex.join(["python", "-m", "jobs.submitted", *self.arguments])

    @property
    def digest(self) -> str:
        """Return what tells another command or configuration under the same id."""
        return _digest(self.arguments, self.files[CONFIG_FILE])


def prepare(command: str, config: Config, options: Sequence[str], job_id: str | None, day: str) -> Submission:
    """Return what `bitmill COMMAND CONFIG OPTIONS` takes on a cluster; without an id, one of the day and the content,
    which a tick, that is to be run again, repeats.

    Raises:
        ConfigError: the id is none, the files are too many bytes, or a URI holds a password.
    """
    arguments = (command, CONFIG_FILE, *options)
    text = yaml.safe_dump(sent_fields(config), sort_keys=False, allow_unicode=True)
    if redacted(text) != text:
        raise ConfigError(
            "A URI of the configuration holds a user or a password, and Ray keeps what is sent. Take it out: the "
            "cluster's own environment has such, in the AWS variables, MLFLOW_TRACKING_USERNAME and _PASSWORD."
        )
    content = text.encode()
    files = {CONFIG_FILE: content, **code_files()}
    if sum(map(len, files.values())) > LIMIT_BYTES:
        largest = sorted(files.items(), key=lambda file: -len(file[1]))[:5]
        listed = ", ".join(f"{name} ({len(content) / KIB:,.0f} KiB)" for name, content in largest)
        raise ConfigError(
            f"What would be sent takes {sum(map(len, files.values())) / KIB:,.0f} KiB, and {LIMIT_BYTES / KIB:,.0f} "
            f"KiB is the limit: configuration and code alone belong there. The largest: {listed}. Take them out of "
            f"{Path(pipeline.__file__).parents[1]}."
        )
    repeats = job_id is None and command in REPEATED
    job_id = job_id or f"{command}-{config.name}-{day}-{_digest(arguments, content)[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", job_id):
        raise ConfigError(
            f"--id is {job_id!r}; valid: up to 128 letters, digits, '.', '_' and '-', the first a letter or digit, "
            "such as NAME-2026-11-27"
        )
    return Submission(job_id, arguments, files, repeats)


def sent_fields(config: Config) -> dict[str, Any]:
    """Return the fields of a configuration that means on the cluster what it means here: paths are absolute, the store
    and the registry are those of here, and Ray is the cluster's own. No user or password is in it."""
    fields = config.model_dump(mode="json", by_alias=True)
    places = fields["resources"]
    fields |= {section: _of_here(section, fields[section]) for section in ("data", "model")}
    if (retrain := fields["retrain"]) is not None:
        retrain["on_decision"] = None  # a command of this machine, which may have a secret in it
        retrain["recipes"] = [{path: _of_here(path, v) for path, v in recipe.items()} for recipe in retrain["recipes"]]
    if (sweep := fields["sweep"]) is not None:
        for path, values in sweep["space"].items():
            sweep["space"][path] = [_of_here(path, v) for v in values] if isinstance(values, list) else values
    del places["ray_address"]
    places["storage_uri"] = storage_uri(config.resources.model_copy(update={"namespace": None}))
    registry = tracking_uri(config.resources)
    places["tracking_uri"] = f"sqlite:///{file}" if (file := sqlite_file(registry)) else registry
    if (scratch := places["local_cache_dir"]) is not None and not scratch.startswith("~"):  # each machine's own
        places["local_cache_dir"] = os.path.abspath(scratch)
    return fields


def _of_here(path: str, value: Any) -> Any:
    """Return the value of a section or of a setting, by its dotted path, with paths of files as the commands resolve
    them, from the working directory; absolute."""
    if isinstance(value, dict) and "." not in path:
        return {knob: _of_here(f"{path}.{knob}", each) for knob, each in value.items()}
    if path in TEXTS and isinstance(value, list | dict):  # of sources, or one with its split
        if isinstance(value, dict):
            return {**value, "path": _of_here(path, value["path"])}
        return [_of_here(path, source) for source in value]
    if not isinstance(value, str):
        return value
    if path in TEXTS and "://" not in value:
        return os.path.abspath(value)
    if path in MODELS and Path(value).expanduser().is_dir():
        return os.path.abspath(Path(value).expanduser())
    return value


def code_files() -> dict[str, bytes]:
    """Return the content of the product's own files by their paths, as they are imported here, and of one that says
    which version they are: the machines of a cluster need the libraries alone."""
    files = {CODE_FILE: json.dumps(code_version()).encode()}
    for package in (pipeline, jobs):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*")):
            if path.suffix in CODE and path.is_file():
                files[str(path.relative_to(folder.parent))] = path.read_bytes()
    return files


def submit(
    submission: Submission, config: Config, address: str, console: Console, commands_of: Callable[[str], Sequence[str]]
) -> Any:
    """Run a submission, or attach to the job that has its id; return the document of the job's `--json`.

    An interrupt leaves the job to itself, and says the commands by which to attach to it and to stop it, which
    `commands_of` returns for the job's id.

    Raises:
        ConfigError: the job ended with exit status 2, or another one has its id.
        RunError: the job failed or was stopped.
    """
    for caution in cautions(config):
        console.print(caution, style="yellow")
    cluster = Jobs(address, console.print, os.environ)
    job_id = cluster.next_id(submission.id) if submission.repeats else submission.id
    again = "give the command again" if submission.repeats else ANOTHER_ID
    with tempfile.TemporaryDirectory() as folder:
        for name, content in submission.files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        metadata = {"bitmill": submission.digest}
        before = cluster.hand_over(job_id, submission.entrypoint, Path(folder), metadata)
    if before is None:
        console.print(f"job {job_id}: handed over to {cluster.address}")
    elif before == metadata:
        console.print(
            f"job {job_id}: {cluster.address} has it already, and it is not run a second time. This is its log; "
            f"to run the same again once it has ended, {again}."
        )
    else:
        raise ConfigError(
            f"The cluster at {cluster.address} has a job {job_id} already, of another command or configuration; "
            "nothing was run. Give --id a name that is not taken, or what that job was given."
        )
    log = Log(lambda line: console.out(line, end="", highlight=False))
    try:
        end = cluster.follow(job_id, log.take)
    except LookupError:
        raise RunError(
            f"The cluster at {cluster.address} knows no job {job_id} any more: its head was lost, and with it what it "
            "knew. What the job committed is kept; to go on, give the command again."
        ) from None
    except KeyboardInterrupt:
        to_attach, to_stop = commands_of(job_id)
        console.print(
            f"\ndetached: the job {job_id} goes on.\nFollow it again: {to_attach}\nStop it: {to_stop}",
            soft_wrap=True,
        )
        raise
    log.close()
    return outcome(job_id, end, log.document, again)


def outcome(job_id: str, end: JobEnd, document: str, again: str) -> Any:
    """Return the document of a job that ended as a command that found something or nothing; `again` says how to run the
    same once more. Raises as `submit`."""
    if end.exit_status in (0, Exit.NOTHING) and end.status != "STOPPED":
        try:
            return json.loads(document)
        except json.JSONDecodeError:
            if end.exit_status:
                return None
            raise RunError(
                f"The job {job_id} succeeded, and its document is not in what could be read of its log. What it made "
                f"is kept; to have it said again, {again}."
            ) from None
    if end.status == "STOPPED":
        raise RunError(f"The job {job_id} was stopped; what was committed is kept. To go on, {again}.")
    if end.exit_status == Exit.USAGE:
        raise ConfigError(f"The job {job_id} ended with exit status 2: its log, above, says what to change.")
    if end.exit_status is None:  # it never ran, or its node is gone
        raise RunError(f"The job {job_id} failed: {last_line(end.message)} What was committed is kept.")
    raise RunError(
        f"The job {job_id} failed with exit status {end.exit_status}: its log, above, says why. What was committed is "
        f"kept; to go on, {again}."
    )


def stop(submission: Submission, address: str, console: Console) -> dict[str, Any]:
    """Have the job of a submission end and wait for it; return nothing if there is none."""
    cluster = Jobs(address, console.print, os.environ)
    job_id = cluster.next_id(submission.id) if submission.repeats else submission.id
    try:
        end = cluster.stop(job_id)
    except LookupError:
        console.print(f"{cluster.address} has no job {job_id}")
        return {}
    said = "was stopped; what was committed is kept" if end.status == "STOPPED" else f"had ended before: {end.status}"
    console.print(f"job {job_id} {said}")
    return {"submission_id": job_id, "status": end.status}


class Log:
    """A job's log: lines are shown once they are whole, but for those of its document, which are kept."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._rest, self.document = show, "", ""

    def take(self, text: str) -> None:
        """Take the next characters of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(MARK):
                self.document += line.removeprefix(MARK)
            else:
                self._show(line + "\n")

    def close(self) -> None:
        """Show a last line that has no end."""
        if self._rest:
            self.take("\n")


def cautions(config: Config) -> list[str]:
    """Return what a job on other machines will lack."""
    fields = sent_fields(config)["resources"]
    paths = [fields["storage_uri"], str(sqlite_file(fields["tracking_uri"]) or "")]
    said = [
        f"{path} is a path: the machines of the cluster must share it with this one."
        for path in paths
        if path.startswith("/") and not path.startswith(f"{paths[0]}/")
    ]
    if credentials_of(fields["tracking_uri"]):
        said.append(
            f"User and password of {fields['tracking_uri']} are not sent: a job takes MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD of its cluster's environment, as it does the AWS variables."
        )
    return said


def print_plan(submission: Submission, config: Config, console: Console) -> dict[str, Any]:
    """Print what would be sent, for people; return it for `--json`."""
    sizes = {name: len(content) for name, content in submission.files.items()}
    folders: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for name, size in sizes.items():
        top = "/".join(name.split("/")[:2]) if name.count("/") > 1 else name.split("/")[0]
        folders[top] += size
        files[top] += 1
    rows = [(top, f"{files[top]}", f"{size / KIB:,.1f}") for top, size in folders.items()]
    print_table(console, ("sent", "files", "KiB"), rows)
    total = sum(sizes.values())
    console.print(f"{total / KIB:,.1f} KiB of at most {LIMIT_BYTES / KIB:,.0f}; nothing else is sent")
    console.print(f"job {submission.id}: {submission.entrypoint}", soft_wrap=True)
    for caution in cautions(config):
        console.print(caution, style="yellow")
    return {"submission_id": submission.id, "entrypoint": submission.entrypoint, "bytes": total, "files": sizes}


def last_line(message: str) -> str:
    """Return the last line of what Ray says, which holds the cause of a traceback."""
    return (message.strip().splitlines() or ["Ray does not say why."])[-1].strip()


def today() -> str:
    """Return the day, in UTC, as 2026-11-27."""
    return datetime.now(UTC).date().isoformat()


def _digest(arguments: Sequence[str], content: bytes) -> str:
    return hashlib.sha256(json.dumps(list(arguments)).encode() + content).hexdigest()
