"""What `launch:` may say, and the exact commands and environments that come of it; no process is started."""

import shlex
import subprocess
from pathlib import Path

import pytest

from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError
from headway.launcher.hosts.commands import command, dry_run_text, forwarded, full_environment
from headway.launcher.hosts.place import check_ssh, read_hostfile, remote_command, this_host
from headway.launcher.launch.start import check_port, train
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

TWO = ("launch.hosts=2", "launch.address=10.0.0.1", "launch.processes=2")


@pytest.fixture
def load(headway, monkeypatch):
    monkeypatch.chdir(headway.folder)

    def load(*overrides: str) -> Spec:
        return load_spec(headway.spec, overrides).spec

    return load


@pytest.mark.parametrize(
    ("overrides", "reason", "choices"),
    [
        (
            ["hosts=2"],
            "launch.address: 2 hosts need the address",
            ["address with a name", "method slurm"],
        ),
        (["hostfile=h"], "launch.hostfile: only method deepspeed", ["method deepspeed", "leave hostfile out"]),
        (["ssh=true"], "launch.ssh: only method deepspeed", ["method deepspeed", "leave ssh out"]),
        (["method=deepspeed", "ssh=true"], "launch.ssh: the names of the other hosts", ["hostfile", "ssh false"]),
        (["slurm.partition=gpu"], "launch.slurm: only method slurm", ["method slurm", "leave slurm out"]),
        (["env={A B: x}"], "launch.env: 'A B' is not a valid variable name", ["letters", "leave it out"]),
        (["env={'A;id': x}"], "launch.env: 'A;id' is not a valid variable name", ["letters", "leave it out"]),
        (["env={RANK: '3'}"], "launch.env: RANK determines which code", ["another name", "leave it out"]),
        (["env={PYTHONPATH: /x}"], "launch.env: PYTHONPATH determines", ["another name", "leave it out"]),
        (["env={LD_PRELOAD: /x}"], "launch.env: LD_PRELOAD determines", ["another name", "leave it out"]),
        (["env={OMP_NUM_THREADS: '3'}"], "launch.env: Headway sets OMP_NUM_THREADS", ["threads", "leave it out"]),
        (["env={NCCL_SOCKET_IFNAME: eth0}"], "launch.env: Headway sets", ["interface", "leave it out"]),
        (['env={A: "x\\ny"}'], "launch.env: the value of A", ["one line", "name of a file"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_two_choices(load, overrides, reason, choices):
    with pytest.raises(SpecError) as caught:
        load(*(f"launch.{o}" for o in overrides))
    assert reason in str(caught.value)
    for choice in choices:
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--mem=3G --wrap=id", "plain characters"),
        ("--mem=3G\n#SBATCH --wrap=id", "plain characters"),
        ("--comment=$(id)", "plain characters"),
        ("-N 3", "plain characters"),
        ("--nodes=3", "launch.hosts|use hosts"),
        ("--signal=KILL", "slurm.warn_s"),
        ("--wrap=id", "would change how"),
        ("--dependency=afterok:1", "would change how"),
        ("--cpus-per-task=4", "slurm.cpus_per_task"),
    ],
)
def test_an_option_of_sbatch_is_one_plain_option_that_headway_does_not_write(load, option, reason):
    text = option.replace("\n", "\\n")
    with pytest.raises(SpecError, match=reason):
        load("launch.method=slurm", f'launch.slurm.options=["{text}"]')


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ("srun: ['--cpu-bind=cores --pty']", "not a single srun option"),
        ("srun: ['-n 3']", "not a single srun option"),
        ("srun: ['--export=$(id)']", "not a single srun option"),
        ("srun: [--ntasks=3]", "would change how"),
        ("srun: [--cpus-per-task=3]", "slurm.cpus_per_task"),
        ("srun: [--nodes=3]", "use hosts"),
        ("setup: ['']", "not one line"),
        ('setup: ["a\\nb"]', "not one line"),
        ("setup: ['#SBATCH --wrap=id']", "not one line"),
        ("python: /a b/python", "launch.slurm.python"),
        ("python: -c", "no path of a program|launch.slurm.python"),
        ("memory: 64 G", "launch.slurm.memory"),
        ("memory: 64G, options: [--mem-per-cpu=2G]", "options set the memory too"),
        ("cpus_per_task: 0", "launch.slurm.cpus_per_task"),
    ],
)
def test_what_slurm_or_the_shell_would_misread_is_refused(load, keys, reason):
    with pytest.raises(SpecError, match=reason):
        load("launch.method=slurm", f"launch.slurm={{{keys}}}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", "10.0.0.1;id"),
        ("address", "-oProxyCommand=id"),
        ("address", "a b"),
        ("interface", "eth0;id"),
        ("interface", "../x"),
        ("interface", "a-name-that-is-too-long"),
        ("slurm.partition", "gpu --wrap=id"),
        ("slurm.time", "soon"),
    ],
)
def test_a_name_that_a_shell_or_program_could_misread_is_refused(load, key, value):
    with pytest.raises(SpecError, match=f"launch.{key}"):
        load("launch.method=slurm", f"launch.{key}='{value}'")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a slots=2\nb slots=2\n", None),
        ("a slots=2  # rack 1\n\nb slots=2", None),
        ("a slots=2\n", "names 1 hosts, but launch.hosts is 2; use launch.hosts=1, or a file with 2 hosts"),
        ("# none yet\n", "names 0 hosts, but launch.hosts is 2; write a line `name slots=2` for each host"),
        ("a slots=2\na slots=2\n", "repeats a host"),
        ("a slots=2\nb slots=4\n", "4 slots, but launch.processes is 2"),
        ("h$(id) slots=2\nb slots=2\n", "not `name slots=N`"),
        ("h;id slots=2\nb slots=2\n", "not `name slots=N`"),
        ("../x slots=2\nb slots=2\n", "not `name slots=N`"),
        ("-oProxyCommand=id slots=2\nb slots=2\n", "not `name slots=N`"),
        ("a slots=999999999999\nb slots=2\n", "not `name slots=N`"),
    ],
)
def test_a_hostfile_has_plain_names_and_fits_the_spec(load, tmp_path, text, reason):
    path = tmp_path / "hostfile"
    path.write_text(text)
    spec = load(*TWO, "launch.method=deepspeed", f"launch.hostfile={path}")
    if reason is None:
        assert read_hostfile(spec) == ["a", "b"]
        return
    with pytest.raises(SpecError) as caught:
        read_hostfile(spec)
    assert reason in str(caught.value)


def test_a_hostfile_that_is_not_there_is_a_file_that_is_not_there(load):
    with pytest.raises(NoInputError, match=r"launch\.hostfile: absent"):
        read_hostfile(load(*TWO, "launch.method=deepspeed", "launch.hostfile=absent"))


@pytest.mark.parametrize(
    ("node_rank", "environment", "host"),
    [(0, {}, 0), (1, {}, 1), (None, {"SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}, 1), (2, {}, None), (None, {}, None)],
)
def test_which_host_this_is_comes_from_the_command_or_from_slurm(load, node_rank, environment, host):
    spec = load(*TWO)
    if host is not None:
        assert this_host(spec, node_rank, environment) == host
        return
    with pytest.raises(SpecError, match="node-rank"):
        this_host(spec, node_rank, environment)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("step", [False, True])
def test_hosts_without_an_address_are_told_how_a_slurm_job_gives_it(load, headway, monkeypatch, dry_run, step):
    rank = None if step else 1
    if step:  # in a shell that srun started
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        monkeypatch.setenv("SLURM_NODEID", "0")
    overrides = ["launch.method=slurm", "launch.hosts=2", "launch.processes=2"]
    with pytest.raises(SpecError, match=r"launch\.address: 2 hosts .*without --node-rank.* launch\.address=NAME"):
        train(headway.spec, overrides, node_rank=rank, dry_run=dry_run)
    assert not RunDir.of(load()).path.exists()


# ---------------------------------------------------------------- commands and environments


def words(spec: Spec, host: int = 0) -> str:
    return " ".join(command(spec, RunDir.of(spec), host=host))


def test_each_host_starts_torchrun_towards_the_first_one(load):
    spec = load(*TWO, "launch.port=31000")
    for host in (0, 1):
        assert f"--node-rank {host} --master-addr 10.0.0.1 --master-port 31000 --nnodes 2" in words(spec, host)
    assert "--nproc-per-node 2 --max-restarts 0 -m headway.launcher.train.worker" in words(spec)


def test_each_host_starts_the_launcher_of_deepspeed_with_a_hostfile_and_without_its_ssh(load):
    spec = load(*TWO, "launch.method=deepspeed")
    for host in (0, 1):
        assert f"--no_ssh --node_rank {host} --master_addr 10.0.0.1 --master_port 29500" in words(spec, host)
    assert f"--hostfile {RunDir.of(spec).path.resolve() / 'hostfile'}" in words(spec)


def test_ranks_see_what_headway_and_the_spec_set_and_little_else(load, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("TOKEN_OF_HUB", "secret")
    spec = load(*TWO, "launch.interface=eth7", "launch.env={TOKEN_OF_HUB: null, MODE: 'a b'}")
    env = full_environment(spec, forwarded(spec, {"TOKEN_OF_HUB": "secret"}), interface="lo")
    assert env["TOKEN_OF_HUB"] == "secret" and env["MODE"] == "a b" and env["PYTHONSAFEPATH"] == "1"
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "eth7"
    assert "PYTHONPATH" not in env and "NCCL_DEBUG" not in env
    with pytest.raises(SpecError, match=r"launch\.env: TOKEN_OF_HUB not set"):
        forwarded(spec, {})


def test_the_cache_of_compiled_code_is_that_of_the_spec(load):
    name = "TORCHINDUCTOR_CACHE_DIR"
    assert full_environment(load(), {})[name].endswith(".cache/headway/inductor")
    spec = load(f"launch.env={{{name}: /scratch/compiled}}")
    assert full_environment(spec, forwarded(spec, {}))[name] == "/scratch/compiled"
    assert f"{name}=/scratch/compiled" in dry_run_text(spec, RunDir.of(spec))


def test_a_dry_run_shows_every_host_in_lines_that_a_shell_reads_back(load, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_HUB", "secret")
    spec = load(
        *TWO, "launch.interface=lo", "launch.env={TOKEN_OF_HUB: null, MODE: \"a 'b' $(id)\"}", "run_dir='r u$n'"
    )
    text = dry_run_text(spec, RunDir.of(spec))
    assert "secret" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    for host, line in enumerate(lines):
        shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
        read = shown.stdout.split("\0")[:-1]
        assert read[:2] == ["env", "-i"]
        env = full_environment(spec, {"TOKEN_OF_HUB": "secret", "MODE": "a 'b' $(id)"})
        assert dict(word.split("=", 1) for word in read[2 : 2 + len(env)]) == env
        assert read[2 + len(env) :] == command(spec, RunDir.of(spec), host=host)


def test_a_dry_run_with_ssh_shows_how_the_others_are_started(load, headway, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    more = [*TWO, "launch.method=deepspeed", f"launch.hostfile={tmp_path / 'hosts'}", "launch.ssh=true"]
    assert train(headway.spec, more, dry_run=True) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("ssh "))
    assert shlex.split(line) == remote_command("b", 1, [str(headway.spec), *more], Path.cwd())
    assert "# host 1 of 2 (b)" in out


def test_what_a_remote_shell_reads_is_quoted(tmp_path):
    folder = tmp_path / "a b;$(id)"
    folder.mkdir()
    words = remote_command("b", 1, ["spec.yaml", "name=x;touch${IFS}evil", "run_dir=it's"], folder)
    assert words[:-2] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--"] and words[-2] == "b"
    shown = subprocess.run(
        ["sh", "-c", words[-1].replace(" && exec ", " && pwd && printf '%s\\n' ")],
        capture_output=True,
        text=True,
        check=True,
    )
    read = shown.stdout.splitlines()
    assert read[0] == str(folder)
    assert read[-5:] == ["spec.yaml", "name=x;touch${IFS}evil", "run_dir=it's", "--node-rank", "1"]
    assert list(folder.iterdir()) == []


def test_a_host_that_ssh_does_not_reach_is_named_before_anything_starts(tmp_path, monkeypatch):
    fake = tmp_path / "ssh"
    fake.write_text(
        '#!/bin/sh\nfor w; do [ "$w" = bad ] && { echo "bad: Permission denied" >&2; exit 255; }; done; exit 0\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check_ssh(["good", "fine"])
    with pytest.raises(HeadwayError, match=r"on bad: bad: Permission denied\n.*launch\.ssh=false"):
        check_ssh(["good", "bad"])


def test_an_address_of_another_host_is_refused_with_those_of_this_one(load):
    spec = load("launch.hosts=2", "launch.address=192.0.2.1")
    with pytest.raises(SpecError, match=r"192\.0\.2\.1 is not an address of this host.*127\.0\.0\.1 \(lo\)"):
        check_port(spec)
