"""Datasets over http(s), from a real server with faults: resumed, bounded, checked, and without secrets in messages."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from web_server import (
    PROXIES,
    Handler,
    WebServer,
    dripping,
    endless,
    moved,
    replaced,
    serving,
    silent,
    stalled,
    status,
    truncated,
)

from headway.data import fetch, mds
from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.loader import Loader, open_source
from headway.data.manifest import FileEntry, hash_file, read_manifest
from headway.data.remotes import http
from headway.data.verify import verify
from headway.launcher.base.errors import SpecError
from headway.launcher.spec.load import load_spec

SHARD = "train/shard.00000.mds"


@pytest.fixture(autouse=True)
def _no_proxies_and_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setattr(http.time, "sleep", lambda _: None)


@pytest.fixture
def web(dataset: Path, tmp_path: Path) -> Iterator[WebServer]:
    with serving(Path(shutil.copytree(dataset, tmp_path / "served"))) as server:
        yield server


def fetch_shard(web: WebServer, tmp_path: Path) -> bytes:
    """The first shard, as it arrives in a cache."""
    path = fetch.fetch_file(tmp_path / "cache", web.url, SHARD, read_manifest(web.root))
    return path.read_bytes()


def refused(web: WebServer, tmp_path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch_shard(web, tmp_path)
    folder = tmp_path / "cache" / "train"
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == []


def digests(source: MdsSource) -> list[int]:
    cfg = DataConfig(source=source, seq_len=32, workers=0, shuffle_window=2)
    with Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1) as batches:
        return [next(batches).digest for _ in range(12)]


def test_a_dataset_over_http_gives_the_batches_of_the_local_one(
    web: WebServer, source: MdsSource, tmp_path: Path
) -> None:
    there = MdsSource(type="mds", path=str(tmp_path / "cache"), remote=f"{web.url}/")
    assert verify(there, seq_len=32).fingerprint == verify(source).fingerprint
    assert not list((tmp_path / "cache").rglob("*.mds"))
    assert digests(there) == digests(source)
    fetched = len(web.fetched(".mds"))
    assert digests(there) == digests(source) and len(web.fetched(".mds")) == fetched


def test_a_transfer_that_breaks_off_goes_on_where_it_ended(web: WebServer, tmp_path: Path) -> None:
    web.faults = {"shard.00000.mds": [truncated(1000), truncated(2500), truncated(2700), truncated(3000)]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    asked = web.fetched(SHARD)
    assert [request.range for request in asked] == [None, *(f"bytes={n}-" for n in (1000, 2500, 2700, 3000))]
    assert sum(request.sent for request in asked) == (web.root / SHARD).stat().st_size


@pytest.mark.parametrize("which", ["tags", "ranges"])
def test_without_versions_or_ranges_it_begins_anew(web: WebServer, tmp_path: Path, which: str) -> None:
    setattr(web, which, False)
    web.faults = {"shard.00000.mds": [truncated(1000)]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    first, second = web.fetched(SHARD)
    assert second.status == 200 and (second.range is None) == (which == "tags") and first.sent == 1000


def test_a_file_that_was_replaced_meanwhile_is_read_from_its_start(web: WebServer, tmp_path: Path) -> None:
    web.faults = {"shard.00000.mds": [lambda handler, file: handler.serve(file, tag='"before"', stop=1000) is None]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    assert [(request.range, request.status) for request in web.fetched(SHARD)] == [(None, 200), ("bytes=1000-", 200)]


def test_a_transfer_that_gets_no_further_ends_after_three_attempts(web: WebServer, tmp_path: Path) -> None:
    web.always = truncated(1000)
    refused(web, tmp_path, r"cannot be fetched \(.*broke off; gave up after 3 attempts, at 1,000 bytes")
    assert len(web.fetched(SHARD)) == 3


def test_reading_waits_for_a_remote_that_comes_back(
    web: WebServer, source: MdsSource, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = MdsSource(type="mds", path=str(tmp_path / "cache"), remote=f"{web.url}/")
    verify(there, seq_len=32)
    web.faults = {path.name: [status(503)] * 10 for path in web.root.glob("train/*.mds")}  # three transfers fail
    assert digests(there) == digests(source)
    assert ".mds: cannot be fetched (the server answers 503" in (said := capfd.readouterr().err)
    assert 0 < said.count("it is asked again for 60 s") <= len(web.faults)


def test_an_outage_that_lasts_ends_the_reading_and_a_refusal_does_so_at_once(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mds, "_OUTAGE_S", 0.3)
    there = MdsSource(type="mds", path=str(tmp_path / "cache"), remote=f"{web.url}/")
    verify(there, seq_len=32)
    for code, passing in ((503, True), (404, False)):
        web.always, web.requests = status(code), []
        cfg = DataConfig(source=there, seq_len=32, workers=0, retry_s=0)
        split = open_source(cfg, split="validation")
        with pytest.raises(DataError, match=f"cannot be fetched .*{code}"):
            split.sample(0)
        assert len(web.requests) > 3 if passing else len(web.requests) == 1


@pytest.mark.parametrize("fault", [stalled, silent])
def test_a_server_that_stalls_is_left_and_asked_again(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault
) -> None:
    monkeypatch.setattr(http, "READ_S", 0.3)
    web.faults = {"shard.00000.mds": [fault]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    (tmp_path / "cache" / SHARD).unlink()
    web.always = fault
    refused(web, tmp_path, r"cannot be fetched \(no answer within .*3 attempts")


def test_a_server_that_is_too_slow_cannot_hold_a_run(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.5)
    web.always = dripping
    refused(web, tmp_path, "the transfer is too slow: [0-9]+ bytes until the deadline")


@pytest.mark.parametrize(
    ("code", "said"),
    [(404, "not there: data.source.remote is the address of the folder"), (403, "denied"), (401, "netrc"), (410, "")],
)
def test_a_refusal_is_final(web: WebServer, tmp_path: Path, code: int, said: str) -> None:
    web.always = status(code)
    refused(
        web, tmp_path, rf"{SHARD}: cannot be fetched \(the server answers {code} .*{said}.*check data\.source\.remote"
    )
    assert len(web.requests) == 1


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_failing_server_is_asked_again(web: WebServer, tmp_path: Path, code: int) -> None:
    web.faults = {"shard.00000.mds": [status(code), status(code)]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    (tmp_path / "cache" / SHARD).unlink()
    web.always = status(code)
    refused(web, tmp_path, rf"the server answers {code} .*3 attempts")
    assert len(web.requests) == 6


def test_wrong_bytes_are_refused_and_not_kept(web: WebServer, tmp_path: Path) -> None:
    data = bytearray((web.root / SHARD).read_bytes())
    data[-1] ^= 1
    web.always = replaced(bytes(data))
    refused(web, tmp_path, r"shard\.00000\.mds: .* but the manifest says")


@pytest.mark.parametrize("more", [-1, 1, 1 << 40])
def test_a_file_of_another_size_is_refused_before_it_is_transferred(web: WebServer, tmp_path: Path, more: int) -> None:
    size = (web.root / SHARD).stat().st_size + more
    web.always = lambda handler, _: handler.head(200, {"Content-Length": str(size)}) is None
    refused(web, tmp_path, f"the server has {size:,} bytes, but the manifest says")
    assert len(web.requests) == 1


def test_a_file_without_an_end_is_not_read_beyond_the_size_in_the_manifest(web: WebServer, tmp_path: Path) -> None:
    web.always = endless
    size = (web.root / SHARD).stat().st_size
    refused(web, tmp_path, f"the server sends more than the {size:,} bytes")


def test_a_manifest_has_a_limit_too(web: WebServer, tmp_path: Path) -> None:
    web.always = lambda handler, _: handler.head(200, {"Content-Length": str(1 << 40)}) is None
    with pytest.raises(DataError, match=r"MANIFEST\.json: cannot be fetched \(the server has .* more than the"):
        verify(MdsSource(type="mds", path=str(tmp_path / "cache"), remote=web.url))


def test_a_compressed_transfer_is_refused(web: WebServer, tmp_path: Path) -> None:
    web.always = replaced(b"x", Content_Encoding="gzip")
    refused(web, tmp_path, "the server sends the file in the encoding 'gzip'; switch that off")


def test_redirects_are_followed_five_times(web: WebServer, tmp_path: Path) -> None:
    web.faults = {"shard.00000.mds": [moved(f"/{SHARD}", code) for code in (301, 302, 303, 307, 308)]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    (tmp_path / "cache" / SHARD).unlink()
    web.always = moved(f"/{SHARD}")
    refused(web, tmp_path, "the server redirects more than 5 times")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/x", "//[x", "http://u:p@127.0.0.1/x"])
def test_redirects_to_other_places_are_refused(web: WebServer, tmp_path: Path, location: str) -> None:
    web.always = moved(location)
    refused(web, tmp_path, "the server redirects to (no web address|an address with a login in it)")
    assert len(web.requests) == 1


def test_the_body_of_a_redirect_is_not_read(web: WebServer, tmp_path: Path) -> None:
    def redirect(handler: Handler, _: Path) -> bool:
        handler.head(302, {"Location": f"/{SHARD}", "Transfer-Encoding": "chunked"})
        while not web.ended.is_set():
            handler.body(b"1000\r\n" + bytes(4096) + b"\r\n")
        return True

    web.faults = {"shard.00000.mds": [redirect]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()


def test_a_redirect_from_https_to_http_is_refused() -> None:
    assert http._redirected("https://a/x", "https://b/y?sign=1") == "https://b/y?sign=1"
    with pytest.raises(http.HttpError, match=r"from https to http \('b'\)"):
        http._redirected("https://a/x", "http://b/y?sign=secret")


def test_nothing_listens(tmp_path: Path, dataset: Path) -> None:
    with serving(dataset) as gone:
        pass
    refused(gone, tmp_path, r"cannot be fetched \(Connection refused; gave up after 3 attempts")


def test_the_password_of_a_proxy_is_in_no_message(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> None:
    with serving(dataset) as gone:
        pass
    monkeypatch.setenv("http_proxy", f"http://somebody:geheim@{gone.url.removeprefix('http://')}")
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        fetch_shard(web, tmp_path)
    assert "geheim" not in str(caught.value) and web.requests == []


def test_the_login_of_netrc_is_sent_to_its_host_only(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login reader password geheim\n")
    monkeypatch.setenv("NETRC", str(netrc))
    elsewhere = web.url.replace("127.0.0.1", "localhost")
    web.faults = {"shard.00000.mds": [moved(f"{elsewhere}/{SHARD}")]}
    assert fetch_shard(web, tmp_path) == (web.root / SHARD).read_bytes()
    login = f"Basic {base64.b64encode(b'reader:geheim').decode()}"
    assert [request.login for request in web.requests] == [login, None]


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("http://reader:geheim@host/x", "contains a login"),
        ("https://geheim@host/x", "contains a login"),
        ("sftp://reader:geheim@host/x", "contains a login"),
        ("https://host/x?token=geheim", "has a query"),
        ("https://host/x#geheim", "has a query"),
        ("https:///geheim", "names no host"),
        ("https://host:geheim/x", "is no address"),
        ("https://[geheim/x", "is no address"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(tmp_path: Path, remote: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MdsSource(type="mds", path="cache", remote=remote)
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"data:\n  source:\n    type: mds\n    path: cache\n    remote: '{remote}'\n")
    with pytest.raises(SpecError, match=rf"spec\.yaml:5:.* data\.source\.remote: {said}") as caught:
        load_spec(spec)
    assert "geheim" not in str(caught.value)


def test_other_addresses_are_accepted() -> None:
    for remote in (
        "https://host:8443/a%20b/x",
        "sftp://reader@host/x",
        "s3://bucket/a?b",
        "/folder/a@b:c",
        "HTTP://h/x",
    ):
        assert MdsSource(type="mds", path="cache", remote=remote).remote == remote


def test_names_are_quoted_and_a_folder_below_a_path_is_found(dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "served"
    shutil.copytree(dataset, root / "a" / "b")
    with serving(root) as web:
        path = tmp_path / "file"
        fetch._download(f"{web.url}/a/b//", "tokenizer.json", path, hash_file(dataset / "tokenizer.json"))
        assert path.read_bytes() == (dataset / "tokenizer.json").read_bytes()
        with pytest.raises(DataError, match="404"):
            fetch._download(f"{web.url}/a", "x y?z", path, FileEntry(bytes=1, xxh3_64="0" * 16))
        assert web.requests[-1].path == "/a/x%20y%3Fz"
