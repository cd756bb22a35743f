"""The Slurm job script, and its execution with substitutes for Slurm's programs that run everything on this machine."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_folders import steps_done

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.commands import full_environment
from headway.launcher.hosts.slurm import array_script, job_script
from headway.launcher.launch.start import train
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.parallel.config import LaunchConfig
from headway.parallel.slurm import SlurmConfig

JOB = ("launch.method=slurm", "launch.hosts=2", "launch.rendezvous_s=60", "launch.port=31800", "run_dir=job")

STAND_INS = {
    "sbatch": """
[ "$1" = --parsable ] || exit 2
cp "$2" submitted
echo '4242;here'
""",
    "scontrol": """
case "$1" in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >> requeued ;;
esac
""",
    "srun": """
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do
    SLURM_STEP_ID=0 SLURM_NODEID=$node "$@" & tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
    while :; do
        wait "$task"
        status=$?
        kill -0 "$task" 2>/dev/null || break
    done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
""",
}


@pytest.fixture
def headway(headway_alone):
    """Without the fork server: these tests are about the processes between the command and its ranks."""
    return headway_alone


@pytest.fixture
def slurm(headway, monkeypatch):
    """Substitutes for Slurm's programs, first on PATH."""
    folder = headway.folder / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text("#!/bin/bash" + text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.chdir(headway.folder)
    return headway


@pytest.fixture
def submits(slurm, fork_server):
    """The same with commands of the fork server, where jobs are only submitted."""
    slurm.server = fork_server
    return slurm


def script(headway, *overrides: str, folder: Path | None = None) -> str:
    spec = load_spec(headway.spec, ["launch.method=slurm", *overrides]).spec
    return job_script(spec, RunDir.of(spec), ["tiny.yaml", *overrides], folder or headway.folder)


def test_the_script_requests_the_settings_of_the_spec(headway):
    text = script(
        headway,
        "launch.hosts=4",
        "launch.slurm={partition: gpu, account: a1, time: 1-12:00:00, gpus_per_node: 8, warn_s: 600, requeue: false, "
        "options: [--exclusive, --mem=64G]}",
    )
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert lines >= {
        *("--nodes=4", "--ntasks-per-node=1", "--partition=gpu", "--account=a1", "--time=1-12:00:00"),
        *("--gpus-per-node=8", "--signal=B:TERM@600", "--no-requeue", "--exclusive", "--mem=64G", "--job-name=tiny"),
    }
    assert "scontrol requeue" not in text
    assert "--requeue" in script(headway) and "scontrol requeue" in script(headway)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_warning_that_comes_too_late_to_save_is_refused(headway):
    with pytest.raises(SpecError, match=r"launch\.slurm\.warn_s: 120 s before .* such as 180, or a launch\.stop"):
        script(headway, "launch.slurm.warn_s=120")
    with pytest.raises(SpecError, match=r"launch\.slurm\.warn_s: 300 s before"):
        script(headway, "launch.stop_s=400")
    assert "--signal=B:TERM@121" in script(headway, "launch.slurm.warn_s=121")


def sbatch_lines(text: str) -> list[str]:
    """Options that sbatch reads: it stops at the first command."""
    head = text.split("\n\n", 1)[0]
    return [line.removeprefix("#SBATCH ") for line in head.splitlines()[1:]]


def srun_words(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    return shlex.split(line.removesuffix("\\").removesuffix("&"))


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["launch.device=cuda", "launch.processes=4"], ["--gpus-per-node=4"]),
        (["launch.device=cuda", "launch.processes=4", "launch.slurm.gpus_per_node=8"], ["--gpus-per-node=8"]),
        (["launch.device=cuda", "launch.slurm.options=[--gres=gpu:h100:4]"], ["--gres=gpu:h100:4"]),
        (["launch.device=cuda", "launch.slurm.options=[--gpus=4]"], ["--gpus=4"]),
        (["launch.device=cuda", "launch.slurm.options=['--gres=tmp:9']"], ["--gpus-per-node=1", "--gres=tmp:9"]),
        (["launch.device=cpu", "launch.processes=4"], []),
        (["launch.processes=4"], []),
    ],
)
def test_a_job_for_cuda_asks_for_a_gpu_for_each_process(headway, overrides, gpus):
    lines = sbatch_lines(script(headway, *overrides))
    assert [line for line in lines if line.startswith(("--gpu", "--gres"))] == gpus


@pytest.mark.parametrize(
    ("overrides", "cpus"),
    [
        (["launch.threads=4", "launch.processes=2"], 8),
        (["launch.threads=4", "launch.slurm.cpus_per_task=10"], 10),
        (["launch.threads=null", "launch.slurm.cpus_per_task=10"], 10),
        (["launch.threads=null"], None),
    ],
)
def test_srun_gets_the_cpus_too(headway, overrides, cpus):
    text = script(headway, *overrides)
    option = [] if cpus is None else [f"--cpus-per-task={cpus}"]
    for words in (sbatch_lines(text), srun_words(text)):
        assert [w for w in words if w.startswith("--cpus-per-task")] == option


def test_containers_setup_and_python_are_in_the_script_as_they_were_written(headway):
    image, mounts = "--container-image=registry.example.org#team/image:1", "--container-mounts=/data:/data,/a:/b"
    text = script(
        headway,
        f"launch.slurm.srun=['{image}', '{mounts}', --cpu-bind=cores]",
        "launch.slurm.setup=[module load cuda, '. \"$HOME/env dir/activate\"']",
        "launch.slurm.python=/opt/env/bin/python3",
        "launch.slurm.memory=64G",
    )
    words = srun_words(text)
    assert {image, mounts, "--cpu-bind=cores"} <= set(words[: words.index("bash")])
    inner = shlex.split(words[words.index("-c") + 1])
    assert inner[:5] == ["exec", "/opt/env/bin/python3", "-P", "-m", "headway.launcher"]
    # before `set -u`, under which many activation scripts fail
    assert '\n\nmodule load cuda\n. "$HOME/env dir/activate"\nset -u\n' in text
    assert "--mem=64G" in sbatch_lines(text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.fixture
def element(tmp_path, monkeypatch):
    """Starts the script of an array of two parts as its element 3. `srun` is the text of the substitute for srun."""

    def start(srun: str, requeue: bool = True) -> subprocess.Popen:
        for name, text in (("scontrol", STAND_INS["scontrol"]), ("srun", srun)):
            (tmp_path / name).write_text("#!/bin/bash\n" + text)
            (tmp_path / name).chmod(0o755)
        launch = LaunchConfig(method="slurm", slurm=SlurmConfig(requeue=requeue))
        where = {"name": "x", "log": tmp_path / "%A_%a.log", "folder": tmp_path}
        text = array_script(launch, ["array-cell", "a.json"], parts=2, array="0-3", **where)
        env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
        env |= {"SLURM_JOB_NODELIST": "a", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        return subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=env, start_new_session=True)

    return start


def test_an_element_that_is_warned_of_its_limit_is_requeued_and_starts_no_further_part(element, tmp_path):
    process = element('sleep 60 &\ntrap "kill $!; exit 75" TERM\necho "${@: -1}" >> parts\nwait\n')
    end = time.monotonic() + 60
    while not (tmp_path / "parts").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # only to the script, as with `--signal=B:TERM`
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "parts").read_text() == "0\n"
    assert (tmp_path / "requeued").read_text() == "7_3\n"


def test_a_part_that_fails_does_not_stop_the_next_one(element, tmp_path):
    process = element('echo "${@: -1}" >> parts\n[ "${@: -1}" = 1 ] || exit 74\n')
    assert process.wait(timeout=60) == 74
    assert (tmp_path / "parts").read_text() == "0\n1\n"
    assert not (tmp_path / "requeued").exists()


def test_an_element_is_not_requeued_where_the_spec_says_so(element, tmp_path):
    assert element("exit 75\n", requeue=False).wait(timeout=60) == 75
    assert not (tmp_path / "requeued").exists()


def test_overrides_reach_the_job_as_they_were_written(headway):
    spec = load_spec(headway.spec, ["launch.method=slurm"]).spec
    odd = ["tiny.yaml", 'launch.env={A: "it\'s $(touch evil)"}']
    text = job_script(spec, RunDir.of(spec), odd, headway.folder)
    at = text.index("srun ")
    line = text[at : text.index(" &\n", at)].replace("srun ", "printf '%s\\0' ", 1)
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=headway.folder)
    inner = next(word for word in shown.stdout.split("\0") if word.startswith("exec "))
    again = inner.replace("exec ", "printf '%s\\0' ", 1)
    shown = subprocess.run(["bash", "-c", again], capture_output=True, text=True, check=True, cwd=headway.folder)
    assert odd[1] in shown.stdout.split("\0")
    assert not (headway.folder / "evil").exists()


@pytest.mark.parametrize("name", ["a b", "a%j", "a'b", "a$(id)"])
def test_a_path_that_sbatch_would_misread_is_refused(headway, name):
    with pytest.raises(SpecError, match=r"launch\.method.*use a path of letters"):
        script(headway, folder=headway.folder / name)


def test_without_sbatch_the_message_names_a_login_node(headway, monkeypatch):
    monkeypatch.chdir(headway.folder)
    monkeypatch.setenv("PATH", str(headway.folder))
    with pytest.raises(HeadwayError, match=r"no sbatch on this machine.*login node"):
        train(headway.spec, list(JOB))


def test_a_dry_run_prints_the_script_and_submits_nothing(slurm, capsys):
    assert train(slurm.spec, list(JOB), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in out and "torch.distributed.run --node-rank 1 --master-addr FIRST_HOST" in out
    assert not (slurm.folder / "job").exists() and not (slurm.folder / "submitted").exists()


def test_a_job_saves_before_its_time_limit_and_continues_when_requeued(slurm):
    done = slurm.train(*JOB)
    assert done.returncode == 0 and done.stdout.startswith("submitted job 4242; its log is job/slurm/4242.log"), (
        done.stderr
    )
    run, job = slurm.folder / "job", slurm.folder / "submitted"
    assert job.read_text() == (run / "slurm" / "job.sbatch").read_text()
    env = {**os.environ, "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "a[1-2]"}

    def queue() -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", str(job)],
            cwd=slurm.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        slurm.started.append(process)
        return process

    first = queue()
    slurm.wait_for(lambda: steps_done(run) >= 4, first)
    first.send_signal(signal.SIGTERM)  # only to the script, as with `--signal=B:TERM`
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert (slurm.folder / "requeued").read_text() == "4242\n"
    stopped_at = steps_done(run)
    assert stopped_at < 40 and (run / "checkpoints" / f"step-{stopped_at:010d}").is_dir()
    second = queue()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert f"(step {stopped_at}/40)" in said and steps_done(run) == 40
    assert (slurm.folder / "requeued").read_text() == "4242\n"


def test_a_second_job_is_refused_while_the_first_is_queued(submits):
    squeue = submits.folder / "bin" / "squeue"
    squeue.write_text("#!/bin/bash\n[[ \" $* \" == *' --jobs=4242 '* ]] && cat state\n")
    squeue.chmod(0o755)
    assert submits.train(*JOB).returncode == 0
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        (submits.folder / "submitted").unlink(missing_ok=True)
        (submits.folder / "state").write_text(state + "\n")
        done = submits.train(*JOB)
        assert done.returncode != 0 and f"job 4242 of this run is {state}" in done.stderr, done.stderr
        assert "scancel 4242" in done.stderr and not (submits.folder / "submitted").exists()
    (submits.folder / "state").write_text("TIMEOUT\n")
    assert submits.train(*JOB).returncode == 0 and (submits.folder / "submitted").exists()
    squeue.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert submits.train(*JOB).returncode == 0
    squeue.write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    done = submits.train(*JOB)
    assert done.returncode != 0 and "cannot tell the state of its job 4242" in done.stderr


def test_a_dataset_that_does_not_exist_is_refused_before_the_queue(submits):
    done = submits.train(*JOB, "data.source={type: mds, path: nowhere}")
    assert done.returncode == 65 and "no dataset here" in done.stderr, done.stderr
    assert not (submits.folder / "submitted").exists() and not (submits.folder / "job").exists()


def test_a_login_node_without_gpus_submits_a_run_for_cuda(submits):
    done = submits.train(*JOB, "launch.device=cuda")
    assert done.returncode == 0 and "submitted job 4242" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "right"),
    [(2, 2, "cuda", True), (8, 2, "cuda", True), (1, 2, "cpu", True), (1, 2, "cuda", False), (3, 4, "auto", False)],
)
def test_a_job_with_fewer_gpus_than_processes_is_refused_before_the_queue(submits, gpus, processes, device, right):
    done = submits.train(
        *JOB, f"launch.slurm.gpus_per_node={gpus}", f"launch.processes={processes}", f"launch.device={device}"
    )
    assert (done.returncode == 0) == right == (submits.folder / "submitted").exists(), done.stderr
    if not right:
        assert done.returncode == 64 and "launch.slurm.gpus_per_node: " in done.stderr, done.stderr
        assert f"use {processes}, or processes {gpus}" in done.stderr
        assert not (submits.folder / "job").exists()


def test_ranks_inherit_proxies_and_certificates(headway, monkeypatch):
    given = {"https_proxy": "http://proxy.example.org:3128", "NO_PROXY": "localhost", "SSL_CERT_DIR": "/etc/ca"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")  # of the shell alone
    env = full_environment(load_spec(headway.spec, []).spec, {})
    assert env.items() >= given.items() and "NCCL_DEBUG" not in env
