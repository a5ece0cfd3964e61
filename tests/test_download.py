"""download.py against a real HTTP server on this machine, with a small archive of the official layout."""

import hashlib
import io
import random
import re
import resource
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from harness import download
from harness.errors import RunError
from harness.files import LOCK_FILE

NAMES = ("test_X.bin", "test_y.bin", "train_X.bin", "train_y.bin")
NOISE = random.Random(0)
CONTENTS = dict(zip(NAMES, map(NOISE.randbytes, (600_000, 800, 400_000, 500)), strict=True))
SPECS = {name: data.FileSpec(len(content), hashlib.md5(content).hexdigest()) for name, content in CONTENTS.items()}
UNLABELLED = NOISE.randbytes(24_000_000)
Member = tuple[str, bytes] | tarfile.TarInfo


def pack(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def official_layout(**changed: bytes) -> list[Member]:
    return [(f"stl10_binary/{name}", changed.get(name[:-4], content)) for name, content in CONTENTS.items()]


ARCHIVE = pack(*official_layout())


class Server:
    """Gives one of `answers` (content, bytes of it to send or None for all) a request, the last one to all the rest."""

    def __init__(self) -> None:
        self.answers: list[tuple[bytes, int | None]] = [(ARCHIVE, None)]
        self.requests = self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body, limit = outer.answers[min(outer.requests, len(outer.answers) - 1)]
                outer.requests += 1
                self.send_response(200 if self.path == "/stl10_binary.tar.gz" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    for start in range(0, len(body[:limit]), 1 << 15):
                        outer.sent += self.wfile.write(body[:limit][start : start + (1 << 15)])
                except ConnectionError:  # the client has gone
                    self.close_connection = True

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # so that closing waits for the open answers
        self.url = f"http://127.0.0.1:{self.http.server_port}/stl10_binary.tar.gz"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def fetch(server: Server, data_dir: Path, **options) -> None:
    download.fetch(data_dir, SPECS, server.url, pauses=(0, 0), **options)


def present(data_dir: Path) -> dict[str, bytes]:
    """Everything below the folder, hidden and temporary files too, but for the lock."""
    paths = [path for path in data_dir.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(data_dir)): path.read_bytes() for path in paths}


def wanted(*names: str) -> dict[str, bytes]:
    return {f"stl10_binary/{name}": CONTENTS[name] for name in names or NAMES}


def test_the_transfer_stops_before_the_unlabelled_images(server, tmp_path):
    archive = pack(*official_layout(), ("stl10_binary/unlabeled_X.bin", UNLABELLED))
    server.answers = [(archive, None)]
    fetch(server, tmp_path / "data")
    assert present(tmp_path / "data") == wanted()
    server.http.shutdown()
    server.http.server_close()
    # What the sockets' buffers swallow is beyond our control, hence the large rest.
    assert len(ARCHIVE) < server.sent < len(archive) / 2 and server.requests == 1


def test_files_that_are_right_are_neither_fetched_nor_touched(server, tmp_path):
    fetch(server, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "stl10_binary").glob("*.bin")}
    fetch(server, tmp_path)
    assert server.requests == 1
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(b"damaged")
    fetch(server, tmp_path)
    assert server.requests == 2 and present(tmp_path) == wanted()
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"train_X.bin"}


@pytest.mark.parametrize("cut", [0, 1, 5_000, 300_000, 700_000, len(ARCHIVE) - 2_000])
def test_a_cut_connection_is_tried_again(server, tmp_path, cut):
    server.answers = [(ARCHIVE, cut), (ARCHIVE, None)]
    fetch(server, tmp_path)
    assert present(tmp_path) == wanted() and server.requests == 2


def test_members_of_an_earlier_attempt_are_kept(server, tmp_path):
    other = pack(*official_layout(test_X=bytes(600_000)))
    server.answers = [(ARCHIVE, 700_000), (other, None)]
    fetch(server, tmp_path)  # the second answer's test_X would be refused
    assert present(tmp_path) == wanted() and server.requests == 2


@pytest.mark.parametrize(("cut", "kept"), [(0, 0), (300_000, 0), (700_000, 2), (len(ARCHIVE) - 2_000, 2)])
def test_a_connection_that_always_breaks_ends_in_one_sentence(server, tmp_path, cut, kept):
    server.answers = [(ARCHIVE, cut)]
    with pytest.raises(RunError) as caught:
        fetch(server, tmp_path)
    message = str(caught.value)
    assert server.requests == 3 and "\n" not in message
    for part in (server.url, ", ".join(sorted(NAMES[kept:])), "--data-dir", "stl10_binary.tar.gz", "--demo"):
        assert part in message
    assert present(tmp_path) == (wanted(*NAMES[:kept]) if kept else {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [lambda old: old[:-1] + b"!", lambda old: old[:-1], lambda old: old + b"!"])
def test_a_wrong_member_never_gets_its_name(server, tmp_path, name, change: Callable[[bytes], bytes]):
    server.answers = [(pack(*official_layout(**{name[:-4]: change(CONTENTS[name])})), None)]
    with pytest.raises(RunError, match=f"{name} in it is not the official file"):
        fetch(server, tmp_path)
    before = NAMES[: NAMES.index(name)]
    assert present(tmp_path) == (wanted(*before) if before else {})


def test_hostile_members_are_passed_over(server, tmp_path):
    evil = b"evil" * 100
    link, hard, device, folder = (tarfile.TarInfo(f"stl10_binary/{name}") for name in NAMES)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "stl10_binary/train_y.bin"
    device.type, folder.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    names = [
        "../train_y.bin",
        "/tmp/stl10_binary/train_y.bin",
        "stl10_binary/../train_y.bin",
        "stl10_binary/../../evil",
        "./stl10_binary/train_y.bin",
        "train_y.bin",
        "stl10_binary/train_y.bin/evil",
        "stl10_binary/.train_y.bin.tmp",
        "stl10_binary/other.bin",
    ]
    hostile = [link, hard, device, folder, *((name, evil) for name in names)]
    server.answers = [(pack(*hostile, *official_layout()), None)]
    fetch(server, tmp_path / "a" / "data")
    assert present(tmp_path) == {f"a/data/{name}": content for name, content in wanted().items()}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_members_that_are_not_there_are_named(server, tmp_path):
    server.answers = [(pack(*official_layout()[:3]), None)]
    with pytest.raises(RunError, match="it ends before train_y.bin"):
        fetch(server, tmp_path)
    assert present(tmp_path) == wanted(*NAMES[:3])


@pytest.mark.parametrize("body", [b"", b"<html>Sign in to this network</html>", random.Random(1).randbytes(50_000)])
def test_an_answer_that_is_no_archive_is_refused(server, tmp_path, body):
    server.answers = [(body, None)]
    with pytest.raises(RunError, match="cannot fetch test_X.bin"):
        fetch(server, tmp_path)
    assert present(tmp_path) == {}


def test_http_errors_and_absent_servers_are_told(server, tmp_path):
    server.url += ".moved"
    with pytest.raises(RunError, match="HTTP Error 404"):
        fetch(server, tmp_path)
    server.url = "http://127.0.0.1:1/stl10_binary.tar.gz"
    with pytest.raises(RunError, match="Connection refused"):
        fetch(server, tmp_path)
    assert present(tmp_path) == {}


def test_a_silent_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    silent = threading.Event()

    class Slow(bytes):
        def __getitem__(self, key):
            silent.wait(20)
            return bytes.__getitem__(self, key)

    server.answers = [(Slow(ARCHIVE), None)]
    with pytest.raises(RunError, match="timed out"):
        fetch(server, tmp_path)
    silent.set()
    assert present(tmp_path) == {}


def test_an_archive_in_the_folder_is_used_instead_of_the_network(server, tmp_path):
    (tmp_path / "stl10_binary.tar.gz").write_bytes(ARCHIVE)
    fetch(server, tmp_path)
    assert server.requests == 0
    assert present(tmp_path) == wanted() | {"stl10_binary.tar.gz": ARCHIVE}


@pytest.mark.parametrize("cut", [0, 5, 5_000, 700_000, len(ARCHIVE) - 2_000])
def test_a_truncated_archive_in_the_folder_is_named(server, tmp_path, cut):
    archive = tmp_path / "stl10_binary.tar.gz"
    archive.write_bytes(ARCHIVE[:cut])
    with pytest.raises(RunError) as caught:
        fetch(server, tmp_path)
    assert f"{archive} is damaged or not the official archive" in str(caught.value)
    assert server.requests == 0
    kept = NAMES[:2] if cut >= 700_000 else ()
    assert present(tmp_path) == (wanted(*kept) if kept else {}) | {"stl10_binary.tar.gz": ARCHIVE[:cut]}


def test_a_folder_under_the_archives_name_is_named(server, tmp_path):
    (tmp_path / "stl10_binary.tar.gz").mkdir()
    with pytest.raises(RunError, match="stl10_binary.tar.gz is damaged.*Is a directory"):
        fetch(server, tmp_path)


def test_a_file_in_the_folders_place_is_named(server, tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(RunError, match=str(tmp_path / "data")):
        fetch(server, tmp_path / "data")
    assert server.requests == 0 and present(tmp_path) == {"data": b"in the way"}


def test_a_member_that_cannot_be_put_in_place_is_named_at_once(server, tmp_path):
    (tmp_path / "stl10_binary" / "train_X.bin").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot write .*train_X.bin: Is a directory"):
        fetch(server, tmp_path)
    assert server.requests == 1 and present(tmp_path) == wanted(*NAMES[:2])


def test_a_full_disk_is_no_broken_connection(server, tmp_path):
    """A limit on the size of a file stands in for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(RunError, match=f"cannot write {tmp_path}/stl10_binary/test_X.bin: File too large"):
            fetch(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert server.requests == 1 and present(tmp_path) == {}


def test_an_interrupt_leaves_no_temporary_file(server, tmp_path, monkeypatch):
    class Interrupted:
        parts = [CONTENTS["test_X.bin"][:1000]]

        def read(self, size: int) -> bytes:
            if self.parts:
                return self.parts.pop()
            (temporary,) = present(tmp_path)
            assert re.fullmatch(r"stl10_binary/\.test_X\.bin\.[0-9a-f]{8}\.tmp", temporary)
            raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path)
    assert present(tmp_path) == {}


def test_progress_without_a_terminal_is_lines_alone(server, tmp_path, capsys):
    server.answers = [(ARCHIVE, 300_000), (ARCHIVE, None)]
    fetch(server, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and server.url in lines[0] and "next attempt in 0 s" in lines[1]


def test_the_labelled_members_are_the_default():
    assert set(download.LABELLED) == set(NAMES)
    assert sum(spec.bytes for spec in download.LABELLED.values()) == 13_000 * (96 * 96 * 3 + 1)
