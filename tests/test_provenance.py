"""What a record says of the code that made it: sent, or else installed and checked out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from jobs.submit import code_files
from pipeline.provenance import CODE_FILE, code_version, provenance

PRINTED = "import json; from pipeline.provenance import provenance; print(json.dumps(provenance()))"


@pytest.fixture
def sent(tmp_path):
    """The folder of what a cluster is sent."""
    folder = tmp_path / "sent"
    for name, content in code_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def said_in(folder):
    """Return what the code in a folder says of itself, in a Python that has no packages at all."""
    command = [sys.executable, "-S", "-c", PRINTED]
    done = subprocess.run(
        command, cwd=folder.parent, env={**os.environ, "PYTHONPATH": str(folder)}, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def git(folder, *arguments):
    settings = ["-c", "user.name=n", "-c", "user.email=e@example", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_here_it_is_what_is_installed():
    said = provenance()
    assert said["bitmill"] == version("bitmill")
    assert said["torch"] == version("torch")


def test_code_that_was_sent_says_what_it_was_here(sent):
    said = said_in(sent)
    assert {name: said[name] for name in ("bitmill", "commit")} == code_version()
    assert said["bitmill"] == version("bitmill")
    assert said["torch"] == "unknown"


def test_what_was_sent_comes_before_another_version_that_is_installed(sent):
    (sent / CODE_FILE).write_text(json.dumps({"bitmill": "1.2", "commit": "abc"}))
    assert said_in(sent).items() >= {"bitmill": "1.2", "commit": "abc"}.items()
    (sent / "bitmill-3.4.dist-info").mkdir()
    (sent / "bitmill-3.4.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bitmill\nVersion: 3.4\n")
    assert said_in(sent).items() >= {"bitmill": "1.2", "commit": "abc"}.items()
    (sent / CODE_FILE).unlink()
    assert said_in(sent)["bitmill"] == "3.4"


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_where_nothing_tells_it_is_unknown(sent, content):
    (sent / CODE_FILE).unlink()
    if content is not None:
        (sent / CODE_FILE).write_text(content)
    assert said_in(sent).items() >= {"bitmill": "unknown", "commit": "unknown"}.items()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_the_commit_is_that_of_a_checkout_however_git_keeps_it(sent):
    (sent / CODE_FILE).unlink()
    git(sent, "init", "--quiet")
    git(sent, "add", "pipeline")
    git(sent, "commit", "--quiet", "--message", "first")
    commit = git(sent, "rev-parse", "HEAD")
    assert said_in(sent)["commit"] == commit
    git(sent, "pack-refs", "--all")
    assert said_in(sent)["commit"] == commit
    other = sent.parent / "other"
    git(sent, "worktree", "add", "--quiet", "-b", "other", str(other))
    assert said_in(other)["commit"] == commit
    (sent / "lib").mkdir()
    (sent / "pipeline").rename(sent / "lib" / "pipeline")
    assert said_in(sent / "lib")["commit"] == "unknown"  # of an environment that lies in somebody's checkout
