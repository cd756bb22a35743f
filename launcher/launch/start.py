"""`headway train`: run all checks, then start the processes and supervise them."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import DataError, datasets_of
from headway.data.manifest import read_manifest
from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.board.trackers.opening import check_installed
from headway.launcher.convert.start import prepare_start
from headway.launcher.hosts.commands import (
    LOOPBACK,
    check_caches,
    check_loopback,
    command,
    dry_run_text,
    forwarded,
    full_environment,
    hostfile,
    inherited,
    torchrun_folder,
)
from headway.launcher.hosts.device import check_device
from headway.launcher.hosts.faults import Ended, Fault, quoted, tail
from headway.launcher.hosts.place import (
    Place,
    check_address,
    check_ssh,
    hostfile_text,
    read_hostfile,
    remote_command,
    rendezvous_port,
    start_others,
    this_host,
)
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.stopping import stoppable
from headway.launcher.hosts.supervise import Alone, Control, supervise
from headway.launcher.hosts.wire import interfaces
from headway.launcher.plan.micro_batch.settle import check_one_host, number_of, settle
from headway.launcher.run.branching import inherited_attempts, parse
from headway.launcher.run.card import banner, run_card, with_attempts
from headway.launcher.run.identity import code_hash, mechanism_identity
from headway.launcher.run.machine import versions
from headway.launcher.run.records import kinds_and_steps
from headway.launcher.run.resolve import check_same_data, resolve
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.parallel.config import CheckpointError
from headway.parallel.manifest import step_of, steps_on_disk


def train(path: Path, overrides: Sequence[str], *, node_rank: int | None = None, dry_run: bool = False) -> int:
    """Train the run of a spec to its end, resuming from its run folder. Returns the exit status.

    `node_rank`: the number of this host among the hosts of the run. Raises SpecError, DataError or CheckpointError
    before any process is started if a check fails.
    """
    loaded = load_spec(path, overrides, no_auto=None)
    spec, auto = loaded.spec, bool(loaded.auto)
    run, arguments = RunDir.of(spec), [str(path), *overrides]
    if auto and (settled := _settled(run, spec)) is not None:
        spec, auto = settled, False
    if auto:
        check_one_host(spec, path)
    names = read_hostfile(spec)
    if spec.launch.method == "slurm" and node_rank is None and "SLURM_STEP_ID" not in os.environ:
        return _as_job(spec, run, arguments, dry_run=dry_run)
    check_address(spec)
    if dry_run:
        if auto:
            console.result("# train.micro_batch: auto is measured before this is started")
        _say_refusals(spec)
        if spec.init.run is not None:
            console.result(f"# a branch of {spec.init.run}, whose checkpoint is checked before this is started")
        if spec.init.weights is not None:
            console.result(
                f"# starts from the weights of {spec.init.weights}, which are checked before this is started"
            )
        console.result(dry_run_text(spec, run, names=names))
        if spec.launch.ssh and names is not None:
            console.result("# host 0 starts the launchers of the others by")
            for host, name in enumerate(names[1:], start=1):
                console.result(shlex.join(remote_command(name, host, arguments, Path.cwd())))
        return 0
    with stoppable():
        code = _train_here(spec, run, names, arguments, node_rank, auto=auto)
    if code == 0 and run.is_complete():
        _conclude(run)
    return code


def _say_complete(run: RunDir, spec: Spec) -> None:
    print(f"{run.path}: already complete; nothing to do (delete the folder to train anew)")
    if names := " and ".join(service.name for service in spec.tracking.services):
        print(f"`headway board {run.path} --send` sends {names} what it lacks of the run")


def _say_refusals(spec: Spec, *, device: bool = True) -> None:
    """Say in a dry run what a start on this machine would refuse: a plan for another machine is still printed."""
    for check in (check_device, _find_data) if device else (_find_data,):
        try:
            check(spec)
        except (SpecError, DataError) as e:
            console.result("\n".join(f"# {line}" for line in f"refused on this machine: {e}".splitlines()))


def _find_data(spec: Spec) -> None:
    """Raise DataError if the dataset is not there. Its shards are not verified."""
    for source in datasets_of(spec.data.source):
        if source.remote is None:
            read_manifest(Path(source.path))


def _settled(run: RunDir, spec: Spec) -> Spec | None:
    """`spec` with the micro-batch of the run in the folder, or else of the parent of a branch; None without them."""
    own = number_of(run, spec)
    return number_of(RunDir(parse(spec.init.run)[0]), spec) if own is None and spec.init.run is not None else own


def _conclude(run: RunDir) -> None:
    """Print the final result for `--quiet` and `--json`. Otherwise a rank has already printed it as text."""
    summary = read_mapping(run.summary)
    if console.wants_json():
        console.emit({"run_dir": str(run.path), **summary})
        return
    loss = summary.get("final_validation_loss")
    shown = f", validation loss {loss:.4f}" if isinstance(loss, int | float) else ""
    console.result(f"{run.path}: complete, {summary.get('tokens', 0):,} tokens{shown}", only_quiet=True)


def _train_here(
    spec: Spec, run: RunDir, names: Sequence[str] | None, arguments: Sequence[str], node_rank: int | None, *, auto: bool
) -> int:
    check_device(spec)
    host = this_host(spec, node_rank, os.environ)
    if host > 0:
        return _on_another_host(spec, run, host)
    if names is None or not spec.launch.ssh or node_rank is not None:
        return _on_first_host(spec, run, names, auto=auto)
    check_ssh(names[1:])
    run.refuse_foreign()
    run.logs.mkdir(parents=True, exist_ok=True)
    others = start_others(names, arguments, Path.cwd(), run.logs)
    try:
        return _on_first_host(spec, run, names, auto=auto)
    except HeadwayError as e:
        raise Ended(Fault(text="\n".join([str(e), *_said(others, run)]), code=e.exit_code)) from e
    finally:
        _end_others(others)


def _as_job(spec: Spec, run: RunDir, arguments: Sequence[str], *, dry_run: bool) -> int:
    from headway.launcher.hosts.slurm import FIRST, PORT, job_script, submit

    script = job_script(spec, run, arguments, Path.cwd())
    if dry_run:
        _say_refusals(spec, device=False)  # GPUs are those of the job's hosts
        console.result(f"# sbatch {shlex.quote(str(run.path / 'slurm' / 'job.sbatch'))}\n{script.rstrip()}")
        launch = spec.launch.model_copy(update={"address": FIRST})
        text = dry_run_text(spec.model_copy(update={"launch": launch}), run, port=PORT)
        console.result("\n".join(["# what the launcher then starts:", *(f"# {line}" for line in text.splitlines())]))
        return 0
    forwarded(spec, os.environ)
    run.refuse_foreign()
    if run.is_complete():
        _say_complete(run, spec)
        return 0
    _, info = resolve(spec)  # a job that cannot start would be noticed only after its time in the queue
    check_same_data(run, info)
    return submit(script, run)


def _on_first_host(spec: Spec, run: RunDir, names: Sequence[str] | None, *, auto: bool) -> int:
    """Lock the run folder and train, alone or with the other hosts. `auto`: find the micro-batch size first."""
    check_installed(spec.tracking)
    spec, info = resolve(spec)
    check_port(spec)
    env = forwarded(spec, os.environ)
    check_caches({name: os.environ[name] for name in inherited(spec)} | env)
    run.refuse_foreign()
    with run.locked():
        check_same_data(run, info)
        spec = settle(run, spec) if auto else spec
        run.adopt(spec)
        if run.is_complete():
            _say_complete(run, spec)
            return 0
        begin = spec.init.start_step
        newest = next(map(step_of, steps_on_disk(run.checkpoints)), begin)
        if newest == begin:
            check_no_history(run, begin=begin)
        before = read_mapping(run.card)
        info["conversion"] = prepare_start(run, spec)
        if info.get("branch") and not before:
            before = {"attempts": inherited_attempts(info["branch"])}
        card = with_attempts(run_card(spec, info), before, spec, from_step=newest)
        write_json(run.card, card)
        print(banner(spec, run, card), flush=True)
        # A rank that outlives a killed launcher holds this lock. Wait for ranks that the kernel is about to end.
        with run.locked("worker.lock", wait_s=10):
            pass
        if spec.launch.method == "deepspeed":
            hostfile(run).write_text(hostfile_text(spec, names))
        if spec.launch.hosts == 1:
            place = Place(host=0, hosts=1, processes=spec.launch.processes, name=socket.gethostname())
            return _until_done(run, spec, lambda budget: _see_through(spec, run, place, Alone(budget), env, None))
        return _until_done(run, spec, lambda budget: _with_others(spec, run, 0, info, env, budget))


def check_no_history(run: RunDir, *, begin: int = 0) -> None:
    """Raise CheckpointError if a run has no checkpoint but its records mention one: it would restart at step `begin`.

    Records up to `begin` are those of the parent of a branch.
    """
    told = (step for kind, step in kinds_and_steps(run) if kind == "checkpoint")
    saved = max((step for step in told if isinstance(step, int)), default=0)
    if saved > begin:
        raise CheckpointError(
            f"{run.checkpoints}: there is no checkpoint, but the run's records tell of one of step {saved}. Put it "
            f"back and start again; or delete {run.path}, or give another run_dir, to begin anew at step {begin}"
        )


def _until_done(run: RunDir, spec: Spec, start: Callable[[Restarts], int]) -> int:
    """Call `start`, and again after each fault while the restart budget allows it. Raises Ended as `start` does."""
    restarts = Restarts(run, spec.launch.restarts)
    while True:
        try:
            return start(restarts)
        except Ended as e:
            if not e.fault.again:
                raise
            restarts.pause(e.fault)


def _on_another_host(spec: Spec, run: RunDir, host: int) -> int:
    """Train together with the first host, which holds the locks of the run folder."""
    if run.is_complete():
        _say_complete(run, spec)
        return 0
    spec, info = resolve(spec)
    return _until_done(run, spec, lambda budget: _with_others(spec, run, host, info, {}, budget))


def _with_others(
    spec: Spec, run: RunDir, host: int, info: Mapping[str, Any], env: dict[str, str], restarts: Restarts
) -> int:
    from headway.launcher.hosts.connect import join

    equal = {"code": code_hash(), "data": info["fingerprint"], **mechanism_identity(spec), **versions()}
    joined = join(spec, run, host, equal, env=env, restarts=restarts)
    place = joined.place
    print(
        f"{place.name}: all {place.hosts} hosts are here; ranks {place.ranks[0]} to {place.ranks[-1]} run on this one"
    )
    return _see_through(spec, run, place, joined.control, joined.env, joined.interface)


def _see_through(
    spec: Spec, run: RunDir, place: Place, control: Control, extra: Mapping[str, str], interface: str | None
) -> int:
    env = full_environment(spec, extra, interface=interface)
    words = command(spec, run, host=place.host)
    launch = spec.launch
    try:
        status = supervise(run, place, control, words, env, hang_s=launch.hang_s, stop_s=launch.stop_s)
    finally:
        shutil.rmtree(torchrun_folder(run), ignore_errors=True)
    if place.is_first and not run.is_complete():  # DeepSpeed's launcher exits with 0 if a signal ended its processes
        raise HeadwayError(
            f"{run.path}: the processes ended before the training did; see {run.logs}, and start the same command again"
        )
    return status


def _said(others: Sequence[subprocess.Popen[bytes]], run: RunDir) -> list[str]:
    """The last output lines of the processes that failed."""
    bad = [host for host, process in enumerate(others, start=1) if process.poll()]
    return [line for host in bad for line in [f"host {host} said:", *quoted(tail(run.logs / f"ssh-{host}.log", 3))]]


def _end_others(others: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in others:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


# ---------------------------------------------------------------- before anything is started


def check_port(spec: Spec) -> None:
    """Raise SpecError if the rendezvous port of the run is known and in use on this host, which is the first one.

    Raises HeadwayError if the processes of a single host cannot connect to each other.
    """
    launch = spec.launch
    if launch.hosts == 1:
        check_loopback()
    port = rendezvous_port(spec) if launch.hosts > 1 else launch.port
    if port is None:
        return
    address = launch.address if launch.hosts > 1 and launch.address else LOOPBACK
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((socket.gethostbyname(address), port))
        except socket.gaierror as e:
            raise SpecError(
                f"launch.address: {address} has no IPv4 address ({e.strerror}); use another name, or an address"
            ) from e
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                have = ", ".join(f"{at} ({name})" for name, at in interfaces().items())
                raise SpecError(
                    f"launch.address: {address} is not an address of this host, which has {have}; start host 0 there, "
                    "or use one of these"
                ) from e
            free = "leave launch.port out to take any free port, or name another"
            free = free if launch.hosts == 1 else "name another launch.port, or end what listens there"
            raise SpecError(f"launch.port: {port} is taken ({e.strerror}); {free}") from e
