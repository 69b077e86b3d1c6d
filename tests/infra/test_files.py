"""The files of infra/ by the linters of their kinds; and the compose file as Docker Compose reads it."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.infra.chart import INFRA, ROOT

BIN = Path(sysconfig.get_path("scripts"))
MARKDOWN = sorted(INFRA.glob("*.md"))
YAML_RULES = """
extends: default
rules:
  line-length: {max: 130}
  document-start: disable
  comments: {min-spaces-from-content: 1}
  braces: {max-spaces-inside: 1}
  truthy: {check-keys: false}
"""


def tool(name: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / name), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, cwd=ROOT)


def composed(*options: str, environment: Path | None = None) -> subprocess.CompletedProcess[str]:
    file = environment or INFRA / ".env.example"
    command = ["--file", "infra/compose.yaml", "--env-file", str(file), "--profile", "smoke"]
    return tool("docker-compose", *command, "config", *options)


@pytest.fixture(scope="module")
def project() -> Any:
    done = composed("--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no variable is unset
    return json.loads(done.stdout)


def blocks(document: Path) -> list[str]:
    """The shell commands of a page, a block each."""
    return re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def test_yaml_is_clean() -> None:
    files = [str(path) for path in INFRA.rglob("*.yaml") if "templates" not in path.parts]
    assert len(files) >= 6
    done = tool("yamllint", "--strict", "--config-data", YAML_RULES, *files)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean() -> None:
    done = tool("hadolint", "--failure-threshold", "info", "infra/Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_pinned_and_not_run_as_root() -> None:
    text = (INFRA / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-\S+", base) for base in bases)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000"]
    assert text.index("USER 1000") > text.rindex("RUN ")


def test_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pipeline", "jobs", "configs", "constraints.txt", "infra/smoke.py"} <= names
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in names)


@pytest.mark.parametrize("document", [*MARKDOWN, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_is_clean(document: Path) -> None:
    scripts = blocks(document) if document.suffix == ".md" else [document.read_text()]
    assert scripts
    done = tool("shellcheck", "--shell=bash", "-", stdin="\n".join(scripts))
    assert done.returncode == 0, done.stdout


def test_docker_compose_reads_the_file(project: Any) -> None:
    services = {"postgres", "s3", "bucket", "mlflow", "ray-head", "ray-worker", "smoke"}
    assert set(project["services"]) == services


def test_each_service_is_pinned_and_asked_for_its_health(project: Any) -> None:
    for name, service in project["services"].items():
        assert re.fullmatch(r".+:v?\d+(\.\d+)+(-[a-z]+)?", service["image"]), name
        asked = "healthcheck" in service or name in ("bucket", "smoke", "ray-worker")  # which end, or Ray looks after
        assert asked, name
        if service["image"].startswith("bitmill:"):
            assert service["cap_drop"] == ["ALL"]


def test_nobody_gets_in_without_a_password_and_none_from_other_machines(project: Any) -> None:
    services = project["services"]
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
    assert services["ray-head"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--app-name=basic-auth" in services["mlflow"]["command"]
    assert "change-me-0f-s3" in project["configs"]["s3-users"]["content"]
    for name in ("mlflow", "s3", "ray-head", "ray-worker"):  # passwords are in no command line
        assert "change-me" not in " ".join(services[name]["command"]), name


def test_the_image_that_all_run_is_built_from_the_dockerfile(project: Any) -> None:
    built = {name: service for name, service in project["services"].items() if "build" in service}
    assert [*built] == ["smoke"]  # which the page builds
    build = built["smoke"]["build"]
    assert (Path(build["context"]), build["dockerfile"]) == (ROOT, "infra/Dockerfile")
    assert set(build["args"]) == {*re.findall(r"^ARG (\w+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE)}
    assert {project["services"][name]["image"] for name in ("ray-head", "ray-worker", "bucket")} == {
        built["smoke"]["image"]
    }


def test_each_password_is_asked_for(tmp_path: Path) -> None:
    lines = (INFRA / ".env.example").read_text().splitlines()
    secrets = [line for line in lines if "change-me" in line]
    assert len(secrets) == 5
    for secret in secrets:
        (tmp_path / "env").write_text("\n".join(line for line in lines if line != secret))
        done = composed("--quiet", environment=tmp_path / "env")
        assert done.returncode != 0
        assert f"required variable {secret.partition('=')[0]} is missing" in done.stderr
