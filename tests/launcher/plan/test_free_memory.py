"""Available memory of the host and its control groups."""

from headway.launcher.plan import free_memory


def test_available_memory_is_the_minimum_over_host_and_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert free_memory.available_bytes() <= 4000 * 1024
    listing = tmp_path / "listing"
    listing.write_text("0::/user/run\n")
    inner = tmp_path / "user" / "run"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("300\n")
    assert free_memory._groups(listing) == [700.0]
    listing.write_text("4:cpu,memory:/job\n2:cpuset:/other\n")
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000\n")
    (old / "memory.usage_in_bytes").write_text("6000\n")
    assert free_memory._groups(listing) == [0.0]
