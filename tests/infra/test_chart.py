"""The Helm chart: what it renders is valid, keeps its promises, and refuses what is misspelt."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from tests.infra.chart import CHART, EXAMPLES, clusters, documents, of_kind, pods, ray_pods, rendered, run

KUBERNETES = ("1.29", kubernetes_validate.latest_version().rpartition(".")[0])
CUSTOM = {"RayCluster", "RayJob", "PodMonitor", "PrometheusRule"}
CRDS = os.environ.get("BITMILL_KUBERAY_CRDS")
RAY_CLUSTER = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "gcsFaultToleranceOptions"),
    *("headGroupSpec", "workerGroupSpecs"),
}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
RAY_JOB = {
    *("entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
    *("backoffLimit", "submitterPodTemplate", "rayClusterSpec"),
}

examples = pytest.mark.parametrize("example", EXAMPLES)


@examples
def test_helm_finds_no_fault(example: str) -> None:
    done = run("helm", "lint", "--strict", str(CHART), *EXAMPLES[example])
    assert done.returncode == 0, done.stdout + done.stderr


@examples
@pytest.mark.parametrize("version", KUBERNETES)
def test_core_kinds_are_valid(example: str, version: str) -> None:
    validated = []
    for document in documents(example):
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)
            validated.append(document["kind"])
    assert {"ConfigMap", "ServiceAccount", "ResourceQuota", "NetworkPolicy", "Pod"} <= set(validated)


@examples
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_pod_inside_is_valid(example: str, version: str) -> None:
    """KubeRay's kinds have whole pods in them, which the core schemas know."""
    assert len(pods(example)) >= 3
    for template in pods(example):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    template = copy.deepcopy(ray_pods("defaults")[0])
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template}, "1.34", strict=True
        )


@examples
def test_rays_kinds_have_fields_that_kuberay_knows(example: str) -> None:
    for cluster in clusters(example):
        assert set(cluster) <= RAY_CLUSTER
        assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
        assert all(set(group) <= WORKER_GROUP for group in cluster["workerGroupSpecs"])
    assert all(set(job["spec"]) <= RAY_JOB for job in of_kind(example, "RayJob"))


def strict(schema: Any) -> Any:
    """Return a schema that knows no other fields than those it names."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.skipif(CRDS is None, reason="BITMILL_KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_rays_kinds_are_valid(kind: str) -> None:
    text = (Path(str(CRDS)) / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, yaml.CSafeLoader)
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {}, "labels": {}}}
    validator = jsonschema.Draft202012Validator(strict(schema))
    for example in EXAMPLES:
        for document in of_kind(example, kind):
            validator.validate(document)
    misspelt = copy.deepcopy(of_kind("spot-gpu", kind)[0])
    misspelt["spec"]["rayVersions"] = "2"
    with pytest.raises(jsonschema.ValidationError, match="rayVersions"):
        validator.validate(misspelt)


@examples
def test_no_pod_has_more_rights_than_it_needs(example: str) -> None:
    for template in pods(example):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
    assert {
        account["metadata"]["name"]: account["automountServiceAccountToken"]
        for account in of_kind(example, "ServiceAccount")
    } == {
        "prod-head": True,
        "prod-worker": False,
        "prod-submitter": False,
    }


@examples
def test_secrets_are_named_and_never_held(example: str) -> None:
    assert of_kind(example, "Secret") == []
    for template in pods(example):
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                secret = any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "KEY"))
                assert not secret or "secretKeyRef" in variable["valueFrom"]


@examples
def test_ray_has_memory_for_dev_shm_and_its_nodes_disk_for_the_cache(example: str) -> None:
    for template in ray_pods(example):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(volumes[mounts["/home/bitmill/.cache"]]["emptyDir"]) == {"sizeLimit"}


def test_the_head_is_on_demand_and_computes_nothing_while_workers_are_spot() -> None:
    (cluster,) = of_kind("spot-gpu", "RayCluster")
    spec = cluster["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    kinds = [g["template"]["spec"]["nodeSelector"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert [kind["karpenter.sh/capacity-type"] for kind in kinds] == ["on-demand", "spot", "spot"]
    gpu = {group["groupName"]: group for group in spec["workerGroupSpecs"]}["gpu"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["enableInTreeAutoscaling"]
    assert "replicas" not in gpu  # which the autoscaler sets, and an upgrade would set back
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "bitmill-redis"
    assert "gcsFaultToleranceOptions" not in clusters("defaults")[0]


def test_a_job_waits_in_kueues_queue_with_a_cluster_of_its_own() -> None:
    nodes = {}
    for job in of_kind("spot-gpu", "RayJob"):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ml-team"
        assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "batch"
        assert job["spec"]["shutdownAfterJobFinishes"]
        cluster = job["spec"]["rayClusterSpec"]
        assert not cluster["enableInTreeAutoscaling"]
        nodes[job["spec"]["entrypoint"]] = [(g["groupName"], g["replicas"]) for g in cluster["workerGroupSpecs"]]
    assert nodes == {
        'bitmill compress /etc/bitmill/chat.yaml "--bits" "2-2-8"': [("gpu", 1)],
        "bitmill sweep /etc/bitmill/chat.yaml": [("gpu", 4)],
    }


def test_a_head_that_is_gone_is_missed_where_there_should_be_one() -> None:
    def heads(*options: str) -> list[str]:
        made = filter(None, yaml.safe_load_all(rendered("--set", "monitoring.enabled=true", *options).stdout))
        (found,) = (document["spec"]["groups"] for document in made if document["kind"] == "PrometheusRule")
        assert [rule for group in found for rule in group["rules"] if rule["alert"] == "BitmillNoTick"]
        return [rule["expr"] for group in found for rule in group["rules"] if rule["alert"] == "BitmillHeadLost"]

    assert heads("--set", "cluster.enabled=false") == []
    (expression,) = heads()
    absent = promql_parser.parse(expression)
    assert absent.func.name == "absent"  # of a pod that is gone there is no series
    (ready,) = absent.args
    assert (str(ready.op), ready.rhs.val) == ("==", 1)
    matchers = {matcher.name: matcher.value for matcher in ready.lhs.matchers.matchers}
    assert matchers == {"condition": "true", "namespace": "ml", "pod": "prod-head-.*"}


def test_ticks_never_overlap_and_do_not_pile_up() -> None:
    (cron,) = of_kind("spot-gpu", "CronJob")
    spec = cron["spec"]
    assert cron["apiVersion"] == "batch/v1"
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] == 3600
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (7, 7)
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 21600
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    names = {variable["name"] for variable in container["env"]}
    assert "--id=$(TICK)" in container["args"]
    assert {"TICK", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI", "BITMILL_STORAGE_URI"} <= names


REFUSED = {
    "a misspelt value": (["--set", "clusters.enabled=true"], "clusters"),
    "a misspelt value inside": (["--set", "cluster.head.cpus=2"], "cpus"),
    "a password in a URI": (["--set", "mlflow.uri=http://me:secret@mlflow"], "uri"),
    "a store that is no S3": (["--set", "store.uri=/data"], "uri"),
    "a command that is no job": (
        ["--set", "jobs[0].name=x,jobs[0].command=gc,jobs[0].config=chat.yaml,jobs[0].workers.cpu=1"],
        "command",
    ),
    "a configuration that is missing": (
        ["--set", "jobs[0].name=x,jobs[0].command=sweep,jobs[0].config=no.yaml,jobs[0].workers.cpu=1"],
        "the job x names the configuration no.yaml, which configs lacks",
    ),
    "a group that is missing": (
        ["--set", "cluster.workers.tpu.minReplicas=1,cluster.workers.tpu.maxReplicas=1"],
        "workers names the group tpu, which groups lacks",
    ),
    "a schedule of a configuration that is missing": (
        ["--set", "retrain[0].name=x,retrain[0].config=no.yaml,retrain[0].schedule=@daily"],
        "the schedule x names the configuration no.yaml, which configs lacks",
    ),
    "a schedule without a cluster": (
        [*EXAMPLES["spot-gpu"], "--set", "cluster.enabled=false"],
        "retrain submits to the standing cluster: set cluster.enabled",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_helm_refuses(what: str) -> None:
    options, needle = REFUSED[what]
    done = rendered(*options)
    assert done.returncode != 0
    assert needle in done.stderr


def test_the_schema_knows_every_value_that_there_is() -> None:
    """So that a documented value is never refused, and one that is taken is documented."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(values: Any, knows: Any, path: str) -> None:
        if isinstance(values, dict) and "properties" in knows:
            assert set(values) | {"global"} == set(knows["properties"]) | {"global"}, path
            for name, value in values.items():
                check(value, knows["properties"][name], f"{path}.{name}")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")
