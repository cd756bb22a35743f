"""The examples for clusters have the form that Kubernetes and SkyPilot document, and their commands are ours.

Kubernetes refuses unknown fields only if it is asked to, and SkyPilot only when a task is launched. The models here
have the fields that the examples may use, from the API reference of Kubernetes 1.31 (Service v1, Job batch/v1) and the
schema of SkyPilot's task YAML.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "clusters"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""A name of RFC 1123, as Kubernetes wants it for everything here."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)?$")] | int


class Api(BaseModel):
    """Fields of the reference: no others, no conversions, names in camel case."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Api):
    name: Name
    labels: dict[str, str] = {}


class ServiceSpec(Api):
    cluster_ip: str = Field(alias="clusterIP")
    publish_not_ready_addresses: bool = False
    selector: dict[str, str]


class Service(Api):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class OnExitCodes(Api):
    container_name: Name | None = None
    operator: Literal["In", "NotIn"]
    values: list[Annotated[int, Field(ge=0, le=255)]] = Field(min_length=1, max_length=255)


class OnPodCondition(Api):
    type: str
    status: Literal["True", "False", "Unknown"]


class Rule(Api):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    on_exit_codes: OnExitCodes | None = None
    on_pod_conditions: list[OnPodCondition] | None = None


class FailurePolicy(Api):
    rules: list[Rule] = Field(max_length=20)


class Resources(Api):
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Mount(Api):
    name: Name
    mount_path: str = Field(pattern="^/[^:]*$")
    read_only: bool = False


class Capabilities(Api):
    add: list[str] = []


class ContainerSecurity(Api):
    capabilities: Capabilities | None = None


class Container(Api):
    name: Name
    image: str
    args: list[str]
    env: list[Any] = []
    resources: Resources = Resources()
    security_context: ContainerSecurity | None = None
    volume_mounts: list[Mount] = []


class Claim(Api):
    claim_name: Name


class EmptyDir(Api):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class Volume(Api):
    name: Name
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class PodSecurity(Api):
    run_as_user: int | None = None
    fs_group: int | None = None


class PodSpec(Api):
    subdomain: Name | None = None
    restart_policy: Literal["Never", "OnFailure"]  # those of a Job
    termination_grace_period_seconds: int = 30
    security_context: PodSecurity | None = None
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []


class PodTemplate(Api):
    spec: PodSpec


class JobSpec(Api):
    completion_mode: Literal["NonIndexed", "Indexed"] = "NonIndexed"
    completions: int = Field(ge=1)
    parallelism: int = Field(ge=1)
    backoff_limit: int = Field(ge=0)
    pod_failure_policy: FailurePolicy | None = None
    template: PodTemplate


class Job(Api):
    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


class Strict(BaseModel):
    """Keys of SkyPilot's schemas: no others, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Recovery(Strict):
    strategy: str | None = None
    max_restarts_on_errors: int = Field(default=0, ge=0)
    recover_on_exit_codes: list[Annotated[int, Field(ge=0, le=255)]] = []


class NodeResources(Strict):
    """`get_resources_schema`."""

    infra: str = Field(pattern=r"^(aws|gcp|azure|lambda|nebius|runpod|slurm|(kubernetes|k8s)(/.+)?)(/[^/]+){0,2}$")
    accelerators: str = Field(pattern=r"^[A-Za-z0-9-]+:[0-9]+$")
    network_tier: Literal["standard", "best"] = "standard"
    cpus: str | int | None = None
    memory: str | int | None = None
    disk_size: str | int | None = None
    use_spot: bool = False
    job_recovery: str | Recovery | None = None


class Task(Strict):
    """`get_task_schema`."""

    name: str
    num_nodes: int
    resources: NodeResources
    volumes: dict[Annotated[str, Field(pattern="^[/~]")], str] = {}
    workdir: str | None = None
    envs: dict[Annotated[str, Field(pattern="^[a-zA-Z_][a-zA-Z0-9_]*$")], str | None] = {}
    file_mounts: dict[str, Any] = {}
    setup: str = ""
    run: str


@pytest.fixture(scope="module")
def documents() -> tuple[Service, Job]:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    return Service.model_validate(service), Job.model_validate(job)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.model_validate(yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text()))


def spec_of(folder: Path) -> Path:
    """A spec that 16 processes can train."""
    path = folder / "spec.yaml"
    path.write_text(
        "model: {width: 64, layers: 1, ffn_width: 64}\nattention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 16}\n"
        "data: {seq_len: 32, source: {type: synthetic, task: copy}}\noptimizer: {lr: 1.0e-3}\n"
        "train: {tokens: 10240, global_batch: 16, micro_batch: 1}\n"
    )
    return path


def dry_run(headway, words: list[str], folder: Path) -> str:
    """What the command of an example would start, on this host."""
    assert words[0] == "train"
    done = headway.run("train", "--dry-run", *words[1:])
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs").exists()
    return done.stdout


def test_the_pods_of_the_job_find_each_other(documents: tuple[Service, Job]) -> None:
    service, job = documents
    pod = job.spec.template.spec
    assert service.spec.cluster_ip == "None" and service.spec.selector == {"job-name": job.metadata.name}
    assert service.spec.publish_not_ready_addresses  # hosts look for each other before they are ready
    assert pod.subdomain == service.metadata.name
    (container,) = pod.containers
    assert f"launch.address={job.metadata.name}-0.{pod.subdomain}" in container.args
    assert job.spec.completion_mode == "Indexed" and job.spec.completions == job.spec.parallelism


def test_the_job_asks_for_what_the_command_uses(documents: tuple[Service, Job]) -> None:
    _, job = documents
    pod = job.spec.template.spec
    (container,) = pod.containers
    given = dict(word.split("=", 1) for word in container.args if "=" in word)
    assert int(given["launch.hosts"]) == job.spec.completions
    assert int(given["launch.processes"]) == container.resources.limits["nvidia.com/gpu"]
    volumes = {volume.name: volume for volume in pod.volumes}
    mounted = {mount.mount_path: volumes[mount.name] for mount in container.volume_mounts}
    assert mounted["/shared"].persistent_volume_claim and given["run_dir"].startswith("/shared/")
    memory = mounted["/dev/shm"].empty_dir
    assert memory is not None and memory.medium == "Memory"
    from headway.parallel.config import LaunchConfig

    assert pod.termination_grace_period_seconds > LaunchConfig().stop_s
    assert pod.restart_policy == "Never"  # podFailurePolicy needs it
    policy = job.spec.pod_failure_policy
    assert policy is not None and policy.rules[0].on_exit_codes is not None
    assert policy.rules[0].on_exit_codes.container_name == container.name


@pytest.mark.parametrize("host", [0, 1])
def test_the_command_of_the_job_is_ours(documents: tuple[Service, Job], headway, tmp_path: Path, host: int) -> None:
    (container,) = documents[1].spec.template.spec.containers
    spec = spec_of(tmp_path)
    words = [
        word.replace("$(JOB_COMPLETION_INDEX)", str(host))
        .replace("/shared/spec.yaml", str(spec))
        .replace("run_dir=/shared", f"run_dir={tmp_path}")
        for word in container.args
    ]
    assert "headway-0.headway" in dry_run(headway, words, tmp_path)


@pytest.mark.parametrize("host", [0, 1])
def test_the_command_of_the_task_is_ours(task: Task, headway, tmp_path: Path, host: int) -> None:
    """The script runs with a `headway` that notes its words, in the environment that SkyPilot gives to a node."""
    home, told = tmp_path / "home", tmp_path / "told"
    program = home / "headway" / "bin" / "headway"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {told}\n")
    program.chmod(0o755)
    gpus = task.resources.accelerators.partition(":")[2]
    node = {
        "SKYPILOT_NODE_RANK": str(host),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": str(task.num_nodes),
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
    }
    own = {"SPEC": str(spec_of(tmp_path)), "RUN": str(tmp_path / "runs" / "spec")}
    assert own.keys() == task.envs.keys()
    done = subprocess.run(
        ["bash", "-c", task.run], env={"PATH": os.environ["PATH"], "HOME": str(home), **node, **own}, text=True
    )
    assert done.returncode == 0
    words = told.read_text().splitlines()
    assert words[-2:] == ["--node-rank", str(host)] and "launch.hosts=2" in words and "launch.processes=8" in words
    assert "10.0.0.1" in dry_run(headway, words, tmp_path)


@pytest.mark.parametrize("status", [64, 65, 66, 75])
def test_the_exit_statuses_in_the_examples_are_documented(
    documents: tuple[Service, Job], task: Task, status: int
) -> None:
    text = (EXAMPLES.parents[1] / "faults.md").read_text()
    assert f"| {status} |" in text
    policy, recovery = documents[1].spec.pod_failure_policy, task.resources.job_recovery
    assert policy is not None and isinstance(recovery, Recovery)
    rule = policy.rules[0].on_exit_codes
    assert rule is not None and (status in rule.values) != (status in recovery.recover_on_exit_codes)


def test_a_misspelt_key_is_seen(documents: tuple[Service, Job]) -> None:
    job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    _, raw = job
    raw["spec"]["completionsMode"] = raw["spec"].pop("completionMode")
    with pytest.raises(ValidationError, match="completionsMode"):
        Job.model_validate(raw)
    raw = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    raw["nodes"] = raw.pop("num_nodes")
    with pytest.raises(ValidationError, match="nodes"):
        Task.model_validate(raw)
