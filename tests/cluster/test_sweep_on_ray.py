"""Sweeps on real Ray: stopped trials free what they held, and a killed driver's sweep ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.util import placement_group_table

from jobs.bench.chaos.cluster import Cluster
from jobs.bench.chaos.processes import start
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import FencedOffError, LostError
from pipeline.execution import progress_actor
from pipeline.execution.engine import Engine
from pipeline.execution.ray_tune import LOSS, STEP, run_trials
from pipeline.store.lease import Lease, Owner
from pipeline.store.locations import tracking_uri
from pipeline.store.objects import open_objects
from pipeline.store.records import Student
from pipeline.store.step_store import StepDir
from pipeline.sweep.run import SweepResult, plan_sweep, run_sweep
from pipeline.tracking import runs
from tests.conftest import Recorder
from tests.mlflow_server import LOGIN, assert_untold, serve_mlflow

DEADLINE_S = 900  # bounds what hangs; a busy machine may take its time
pytestmark = pytest.mark.timeout(2 * DEADLINE_S)
BITS = ["2-2-8", "4-4-8", "8-8-8"]
SHARED = ("tokenize", "finetune", "cache")


def with_shared_steps(folder: Path, finished: Any) -> Path:
    """A folder with a store that holds what the trials share."""
    for stage in SHARED:
        shutil.copytree(finished.folder(stage).parent.parent, folder / "store" / stage)
    return folder


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[Path]:
    """The folder of a session whose processes inherit the URI of a registry with user and password."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}@127.0.0.1:9")
        ray.init(address="local", num_cpus=2, namespace="bitmill", log_to_driver=False, dashboard_host="127.0.0.1")
    yield Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1]
    ray.shutdown()


def assert_all_cpus_are_freed() -> None:
    end = time.monotonic() + 60  # Ray frees them a little later than it says that a trial ended
    while (held() or ray.available_resources().get("CPU") != 2) and time.monotonic() < end:
        time.sleep(0.5)
    assert held() == []
    assert ray.available_resources().get("CPU") == 2


def held() -> list[Any]:
    """Placement groups that are not removed."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_stopped_trials_of_many_workers_free_their_cpus(
    two_cpus: Path, tiny_config: Callable[..., Config], finished: Any, tmp_path: Path
) -> None:
    config = tiny_config(
        with_shared_steps(tmp_path, finished),
        distill={"steps": 160, "eval_every": 10, "eval_rows": 8},
        resources={"workers": 2},
        sweep={
            "space": {"distill.lr": [2e-3, 1e-6, 1e-7]},
            "asha": {"grace_steps": 10, "reduction_factor": 2},
        },
    )
    found = run_sweep(plan_sweep(config), Recorder())
    assert sorted(trial.status for trial in found.trials) == ["done", "stopped", "stopped"]
    assert found.front == (found.trials[0].key,)
    for stopped in found.trials[1:]:
        assert 10 <= stopped.last["step"] < 160
        assert stopped.version is None
    assert_all_cpus_are_freed()


class Killing(Recorder):
    """Kills a process of the first trial that reports, once, and looks into what Tune has written by then."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title, self.killed = title, 0

    def advanced(self, stage: str, done: int, total: int, note: str) -> None:
        if stage == "trials" and "validation" in note and not self.killed:
            below = {child.pid for child in psutil.Process().children(recursive=True)}
            named = ((p, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"]))
            ours = [p for p, name in named if p.pid in below and self.title in name]
            self.killed = ours[0].pid
            psutil.Process(self.killed).kill()  # not by what was listed, which may be of an earlier process of its id
            assert_untold(Path(tempfile.gettempdir()))
        super().advanced(stage, done, total, note)


@pytest.mark.parametrize(
    ("workers", "title"), [(1, "ImplicitFunc"), pytest.param(2, "RayTrainWorker", marks=pytest.mark.soak)]
)
def test_a_trial_whose_worker_was_killed_is_tried_again_and_no_secret_is_told(
    two_cpus: Path,
    tiny_config: Callable[..., Config],
    finished: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    title: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve_mlflow(tmp_path_factory.mktemp("server")) as address:
        config = tiny_config(
            with_shared_steps(tmp_path, finished),
            distill={"steps": 400, "eval_every": 10, "eval_rows": 8},
            resources={"workers": workers, "checkpoint_minutes": 0.001, "tracking_uri": f"http://{LOGIN}@{address}"},
            sweep={"space": {"distill.seed": [1, 2]}},
        )
        killing = Killing(title)
        found = run_sweep(plan_sweep(config), killing)
    assert killing.killed
    assert_untold(tmp_path)
    assert_untold(two_cpus)
    assert [trial.status for trial in found.trials] == ["done", "done"]
    assert_all_cpus_are_freed()


class Touching:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class OneTrial:
    """A source of one trial, which remembers its end."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Any]] = [("key", None)]
        self.ends: list[tuple[str, str, str]] = []

    def next(self) -> tuple[str, Any] | None:
        return self.given.pop() if self.given else None

    def reported(self, key: str, result: dict[str, Any]) -> None: ...

    def goes_on(self, key: str, step: int, nats: float) -> bool:
        return True

    def ended(self, key: str, status: str, failure: str) -> None:
        self.ends.append((key, status, failure))


def test_no_error_of_a_trial_is_unpickled_from_the_store(two_cpus: Path, tmp_path: Path) -> None:
    resources, touched = Resources(workers=1, max_failures=0), tmp_path / "touched"

    def planting(trial: Any, report: Any) -> None:
        context = ray.tune.get_context()
        folder = attempt / context.get_experiment_name() / Path(context.get_trial_dir()).name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.pkl").write_bytes(pickle.dumps(Touching(touched)))
        raise LostError("a disk went away")

    with StepDir(str(tmp_path), "sweep", "f" * 32, str(tmp_path)).hold(True, print) as held:
        attempt, source = Path(held.run_folder()[0]), OneTrial()
        run_trials(planting, source, Engine(resources), held, None)
        assert [str(path.relative_to(attempt)).count("/") for path in attempt.rglob("error.pkl")] == [2]
    assert not touched.exists()
    ((key, status, failure),) = source.ends
    assert (key, status) == ("key", "lost")
    assert "a disk went away" in failure


class TakenOver(OneTrial):
    """A source that finds, when its trial reports, that another process holds the sweep."""

    def reported(self, key: str, result: dict[str, Any]) -> None:
        raise FencedOffError("The sweep is no longer ours.")


def test_a_sweep_that_was_taken_over_says_so(two_cpus: Path, tmp_path: Path) -> None:
    def reporting(trial: Any, report: Any) -> None:
        report({STEP: 1, LOSS: 1.0})

    step_dir, engine = StepDir(str(tmp_path), "sweep", "f" * 32, str(tmp_path)), Engine(Resources(workers=1))
    with pytest.raises(FencedOffError, match="no longer ours"):
        run_trials(reporting, TakenOver(), engine, step_dir, None)
    assert_all_cpus_are_freed()


def test_a_sweep_that_is_taken_over_ends_trials_that_report_nothing(
    two_cpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_actor, "LOOK_S", 0.1)
    step_dir, engine = StepDir(str(tmp_path), "sweep", "f" * 32, str(tmp_path)), Engine(Resources(workers=1))

    def training(trial: Any, report: Any) -> None:
        open_objects(str(tmp_path)).write(f"sweep/{'f' * 32}/lease.json", Lease(Owner("elsewhere", 1, 0), 9).to_json())
        time.sleep(DEADLINE_S)

    with (
        step_dir.hold(False, print) as held,
        pytest.raises(FencedOffError, match="held by process 1 on elsewhere"),
    ):
        run_trials(training, OneTrial(), engine, held, None)
    assert_all_cpus_are_freed()


class Project:
    """The command on a configuration of three trials whose shared steps are done."""

    def __init__(self, root: Path, fields: dict[str, Any]) -> None:
        self.root, self.path = root, root / "config.yaml"
        self.path.write_text(yaml.safe_dump(fields))
        self.started: dict[int, float] = {}

    def start(self, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cli", "sweep", str(self.path), "--json"]
        with open(self.root / "stdout", "w") as stdout, open(self.root / "stderr", "a") as stderr:
            return start(command, stdout=stdout, stderr=stderr, text=True, env=os.environ | (environment or {}))

    def until(self, happened: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
        """Poll until something has happened or the driver has ended, taking note of what it starts."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(driver.pid).children(recursive=True):
                    self.started[process.pid] = process.create_time()
            if happened() or driver.poll() is not None:
                return
            time.sleep(0.1)
        raise TimeoutError((self.root / "stderr").read_text()[-3000:])

    def finish(self, environment: dict[str, str] | None = None) -> dict[str, Any]:
        driver = self.start(environment)
        self.until(lambda: False, driver)
        assert driver.returncode == 0, (self.root / "stderr").read_text()[-3000:]
        document: dict[str, Any] = json.loads((self.root / "stdout").read_text())
        return document

    def reap(self) -> None:
        for pid, created in self.started.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    process.kill()

    def trials(self) -> set[str]:
        """The trials that are written down, by whichever attempt."""
        return {path.name for path in self.root.glob("store/sweep/*/*/trials/*.json")}


@pytest.fixture
def project(tmp_path: Path, finished: Any, tiny_fields: Callable[..., dict[str, Any]]) -> Iterator[Project]:
    made = Project(tmp_path, swept(with_shared_steps(tmp_path, finished), tiny_fields, workers=1))
    yield made
    made.reap()


def swept(folder: Path, tiny_fields: Callable[..., dict[str, Any]], workers: int) -> dict[str, Any]:
    return tiny_fields(
        folder,
        distill={"steps": 60, "eval_every": 10, "eval_rows": 8},
        resources={"workers": workers, "checkpoint_minutes": 0.001},
        sweep={"space": {"quant.bits": BITS}, "max_concurrent": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, finished: Any, tiny_fields: Callable[..., dict[str, Any]]
) -> SweepResult:
    folder = with_shared_steps(tmp_path_factory.mktemp("undisturbed"), finished)
    config = Config.model_validate(swept(folder, tiny_fields, workers=0))
    return run_sweep(plan_sweep(config), Recorder())


def check(project: Project, document: dict[str, Any], undisturbed: SweepResult) -> None:
    """Trials, their results, MLflow's runs and versions are those of a sweep that nobody disturbed."""
    expected = {trial.key: trial for trial in undisturbed.trials}
    assert {trial["trial_key"]: trial["metrics"]["student"] for trial in document["trials"]} == {
        key: trial.student for key, trial in expected.items()
    }
    assert set(document["front"]) == set(undisturbed.front)
    assert len(project.trials()) == len(BITS)
    config = Config.model_validate(yaml.safe_load(project.path.read_text()))
    client = runs.connect(tracking_uri(config.resources))
    logged = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.data.tags[runs.KEY_TAG] for run in logged) == sorted([*expected, document["sweep_key"]])
    (parent,) = (run for run in logged if run.data.tags[runs.KEY_TAG] == document["sweep_key"])
    for run in logged:
        if run is not parent:
            assert run.data.tags[runs.PARENT_TAG] == parent.info.run_id
            points = client.get_metric_history(run.info.run_id, "distill/validation_nats")  # in order of arrival
            assert sorted(point.step for point in points) == [0, 10, 20, 30, 40, 50, 60]
    assert len(client.search_model_versions("name = 'tiny'")) == len(BITS)
    assert not list(project.root.glob("store/sweep/*/*/attempt"))


@contextlib.contextmanager
def met_in_training(project: Project, seed: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Give the command; yield it some time after its first trial has a checkpoint. Its last trial cannot end in the
    block, where somebody else holds its training."""
    config = Config.model_validate(yaml.safe_load(project.path.read_text()))
    (last,) = (trial for trial in plan_sweep(config).known if trial.values["quant.bits"] == BITS[-1])
    with last.plan.step(Student).dir.hold(False, print):
        driver = project.start(environment)
        checkpoints = "store/distill/*/*/attempt/*checkpoint*"
        project.until(lambda: bool(project.trials()) or any(project.root.glob(checkpoints)), driver)
        end = time.monotonic() + random.Random(seed).uniform(0, 3)
        project.until(lambda: time.monotonic() > end, driver)
        assert driver.poll() is None, (project.root / "stderr").read_text()[-3000:]
        yield driver
        driver.wait(DEADLINE_S)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 15))
def test_a_killed_driver_then_the_same_command(project: Project, undisturbed: SweepResult, seed: int) -> None:
    with met_in_training(project, seed, {}) as driver:
        os.kill(driver.pid, signal.SIGKILL)
    check(project, project.finish(), undisturbed)


def test_a_killed_head_then_a_new_one_and_the_same_command(project: Project, undisturbed: SweepResult) -> None:
    with Cluster(2) as cluster:
        with met_in_training(project, 1, cluster.variables) as driver:
            cluster.kill_head()
            project.until(lambda: False, driver)
        assert driver.returncode == 1
        assert len(project.trials()) < len(BITS)
        cluster.begin()
        check(project, project.finish(cluster.variables), undisturbed)
