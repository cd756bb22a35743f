"""The devices of a host are checked before a run folder is made and before a process is started."""

import pytest
import torch

from headway.launcher.base.errors import SpecError
from headway.launcher.hosts.device import check_device
from headway.launcher.spec.load import load_spec


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_cuda_without_cuda_is_refused_before_the_run_folder(headway):
    done = headway.train("launch.device=cuda", "run_dir=never")
    assert done.returncode == 64 and "Traceback" not in done.stderr
    assert "launch.device: cuda is not available" in done.stderr and "launch.device=cpu" in done.stderr
    assert not (headway.folder / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_a_dry_run_says_that_this_machine_would_refuse(headway):
    done = headway.train("launch.device=cuda", "run_dir=never", "--dry-run")
    assert done.returncode == 0 and "# refused on this machine: launch.device: cuda" in done.stdout
    assert "headway.launcher.train.worker" in done.stdout


@pytest.mark.parametrize(
    ("device", "processes", "devices", "key"),
    [
        ("cuda", 1, 0, "launch.device"),
        ("cuda", 2, 1, "launch.processes"),
        ("auto", 2, 1, "launch.processes"),
        ("auto", 2, 0, None),
        ("cuda", 2, 2, None),
        ("cpu", 2, 1, None),
    ],
)
def test_each_process_needs_a_device(headway, monkeypatch, device, processes, devices, key):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    spec = load_spec(headway.spec, [f"launch.device={device}", f"launch.processes={processes}"]).spec
    if key is None:
        check_device(spec)
    else:
        with pytest.raises(SpecError, match=rf"^{key}: "):
            check_device(spec)


@pytest.mark.parametrize("method", ["torchrun", "slurm"])
def test_a_dry_run_says_that_the_dataset_is_missing_and_where_it_was_looked_for(headway, method):
    words = ("data.source={type: mds, path: sets/absent}", f"launch.method={method}", "run_dir=never", "--dry-run")
    done = headway.train(*words)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("# refused on this machine: ")]
    assert "no dataset here" in line and str(headway.folder / "sets" / "absent") in line and "data.source.path" in line
    assert "headway.launcher.train.worker" in done.stdout and not (headway.folder / "never").exists()
