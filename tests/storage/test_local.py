"""What only a folder can suffer: kills, full disks, foreign files, races of processes, disks that go away."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from actstore.errors import ErrorKind, StorageError
from actstore.storage import LocalStorage, PutOutcome, durable, files, open_storage
from tests.storage import children

RACER = """
storage, me = open_storage(sys.argv[1]), int(sys.argv[2])
for line in sys.stdin:
    print(storage.put_new(f"race/{int(line) // 10}/{int(line)}", [bytes([me]) * 65536] * 2).value, flush=True)
"""


def test_one_winner_among_processes(tmp_path):
    """8 processes, 100 rounds; each round is one put of all at once. The winner's bytes are the stored ones."""
    open_storage(tmp_path, create=True)
    racers = [children.start(RACER, str(tmp_path), str(me)) for me in range(8)]
    storage = LocalStorage(tmp_path)
    try:
        for turn in range(100):
            for racer in racers:
                racer.stdin.write(f"{turn}\n")
            for racer in racers:
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers]
            assert sorted(answers) == ["created"] + ["exists"] * 7, (turn, answers)
            winner = answers.index("created")
            assert storage.get(f"race/{turn // 10}/{turn}") == bytes([winner]) * 131072
    finally:
        for racer in racers:
            racer.communicate(timeout=30)
    assert os.listdir(tmp_path / ".tmp") == []


WRITER = """
storage = open_storage(sys.argv[1])
for i in range(int(sys.argv[2]), 10**6):
    block = i.to_bytes(8, "big") * 131072
    assert storage.put_new(f"big/{i:07}", [block] * 6).value == "created"
    print(i, flush=True)
"""


def test_killed_writers_leave_whole_objects_only(tmp_path):
    """10 SIGKILLs at random moments of 6 MiB puts: what was acknowledged is there, what is there is whole."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    storage = open_storage(tmp_path, create=True)
    acknowledged: set[int] = set()
    first = 0
    for _ in range(10):
        with children.start(WRITER, str(tmp_path), str(first)) as writer:
            acknowledged.add(int(writer.stdout.readline()))
            time.sleep(rng.uniform(0.0, 0.03))
            writer.send_signal(signal.SIGKILL)
            acknowledged |= {int(line) for line in writer.stdout.read().split("\n") if line}
        keys = list(storage.list("big/"))
        for key in keys[-3:]:
            i = int(key.split("/")[1])
            assert storage.get(key) == i.to_bytes(8, "big") * 131072 * 6
        assert {f"big/{i:07}" for i in acknowledged} <= set(keys)
        first = int(keys[-1].split("/")[1]) + 1
        for key in keys:
            assert storage.head(key) == 6 << 20
        left = os.listdir(tmp_path / ".tmp")
        assert len(left) <= 10
    assert len(keys) <= len(acknowledged) + 10


def test_leftovers_of_crashes_are_cleared_when_old(tmp_path):
    tmp = tmp_path / ".tmp"
    tmp.mkdir()
    for name, age in (("old", 90_000), ("young", 1_000)):
        (tmp / name).write_bytes(b"torn")
        os.utime(tmp / name, (time.time() - age,) * 2)
    LocalStorage(tmp_path).put_new("a", [b"x"])
    assert os.listdir(tmp) == ["young"]


FULL = """
storage = open_storage(sys.argv[1])
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
assert storage.put_new("small", [b"x" * 1000]).value == "created"
for attempt in range(2):
    try:
        storage.put_new("a/large", [b"y" * 1048576] * 40)
    except ActstoreError as err:
        print(err.kind, "a/large" in str(err), str(40 << 20) in str(err))
assert list(storage.list("")) == ["small"] and storage.get("a/large") is None
assert os.listdir(os.path.join(sys.argv[1], ".tmp")) == []
assert storage.put_new("after", [b"z" * 1000]).value == "created"
print(*storage.list(""))
"""
TOLD = "storage-full True True\nstorage-full True True\nafter small\n"


def test_file_size_limit(tmp_path):
    assert children.run(FULL, str(tmp_path), str(3 << 20)) == TOLD


def test_disk_full(tmp_path):
    """On a file system of 8 MiB where this user may mount one; else again under a limit, of another size."""
    mount = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=8m tmpfs "{tmp_path}" && exec "$@"', "sh")
    may_mount = (
        shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    )
    if may_mount:
        assert children.run(FULL, str(tmp_path), wrap=mount) == TOLD
    else:
        assert children.run(FULL, str(tmp_path), str(39 << 20)) == TOLD


DENIED = """
storage = LocalStorage(sys.argv[1])
if os.geteuid() == 0 and sys.argv[2] == "drop":
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(storage.writable, storage.get("a"), *storage.list(""))
for operation in (lambda: storage.put_new("b", [b"1"]), lambda: storage.delete("a"), lambda: storage.put_hint("c", b"1")):
    try:
        operation()
    except ActstoreError as err:
        print(err.kind)
try:
    probe(storage)
except ActstoreError as err:
    print(err.kind)
"""
DENIED_TOLD = "False b'content' a\n" + "read-only\n" * 4


@pytest.fixture
def open_folder():
    """A folder whose parents every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_folder_of_another_user(open_folder):
    LocalStorage(open_folder).put_new("a", [b"content"])
    open_folder.chmod(0o555)
    assert children.run(DENIED, str(open_folder), "drop") == DENIED_TOLD


def test_file_system_mounted_read_only(open_folder):
    """A read-only bind mount where this user may make one; else a folder without the right to write."""
    LocalStorage(open_folder).put_new("a", [b"content"])
    here = f'"{open_folder}"'
    script = f'mount --bind {here} {here} && mount -o remount,ro,bind {here} && exec "$@"'
    mount = ("unshare", "-m", "sh", "-c", script, "sh")
    may_mount = (
        shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    )
    if may_mount:
        assert children.run(DENIED, str(open_folder), "keep", wrap=mount) == DENIED_TOLD
    else:
        open_folder.chmod(0o555)
        assert children.run(DENIED, str(open_folder), "drop") == DENIED_TOLD


def test_links_in_place_of_objects_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"outside")
    storage = open_storage(tmp_path / "store", create=True)
    storage.put_new("folder/object", [b"inside"])
    link = tmp_path / "store" / "folder" / "link"
    link.symlink_to(secret)
    reads = [
        lambda: storage.get("folder/link"),
        lambda: storage.head("folder/link"),
        lambda: storage.get_ranges("folder/link", [(0, 3)]),
        lambda: storage.read_into("folder/link", 0, memoryview(bytearray(3))),
    ]
    for read in reads:
        with pytest.raises(StorageError, match="symbolic link"):
            read()
    assert storage.put_new("folder/link", [b"mine"]) is PutOutcome.EXISTS
    assert secret.read_bytes() == b"outside"
    assert list(storage.list("")) == ["folder/object"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    assert storage.put_new("folder/link", [b"mine"]) is PutOutcome.EXISTS
    assert not (tmp_path / "nowhere").exists()


def test_folders_may_be_links_and_loops_end(tmp_path):
    storage = open_storage(tmp_path / "store", create=True)
    other = tmp_path / "other-disk"
    other.mkdir()
    (tmp_path / "store" / "runs").symlink_to(other)
    assert storage.put_new("runs/a/b", [b"x"]) is PutOutcome.CREATED
    (other / "loop").symlink_to(other)
    (tmp_path / "store" / "self").symlink_to(tmp_path / "store")
    assert list(storage.list("")) == ["runs/a/b"]
    assert (other / "a" / "b").read_bytes() == b"x"


def test_foreign_files_are_not_listed(tmp_path):
    storage = open_storage(tmp_path, create=True)
    storage.put_new("a/b", [b"x"])
    for name in (".hidden", "with space", "a/.DS_Store", "a/b.c.."):
        (tmp_path / name).write_bytes(b"foreign")
    os.mkfifo(tmp_path / "a" / "pipe")
    assert list(storage.list("")) == ["a/b"]
    with pytest.raises(StorageError, match="no regular file"):
        storage.get("a/pipe")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    storage = open_storage(tmp_path, create=True)
    storage.put_new("a", [b"x"])
    with pytest.raises(StorageError, match=r"folder is needed|Not a") as caught:
        storage.put_new("a/b", [b"y"])
    assert "'a/b' (1 bytes)" in str(caught.value)
    assert caught.value.kind is ErrorKind.STORAGE_FAILED


def test_folder_removed_behind_our_back(tmp_path):
    storage = open_storage(tmp_path, create=True)
    assert storage.put_new("a/b/c", [b"x"]) is PutOutcome.CREATED
    shutil.rmtree(tmp_path / "a")
    assert storage.put_new("a/b/c", [b"y"]) is PutOutcome.CREATED
    assert storage.get("a/b/c") == b"y"


def test_a_root_that_went_away_is_not_an_empty_store(tmp_path):
    root = tmp_path / "store"
    storage = open_storage(root, create=True)
    storage.put_new("a", [b"x"])
    assert storage.get("b") is None
    root.rename(tmp_path / "moved")
    operations = [
        lambda: storage.get("a"),
        lambda: storage.head("a"),
        lambda: list(storage.list("")),
        lambda: storage.get_ranges("a", [(0, 1)]),
        lambda: storage.put_new("c", [b"x"]),
        lambda: storage.delete("a"),
    ]
    for operation in operations:
        with pytest.raises(StorageError):
            operation()
    root.mkdir()
    for operation in (*operations[:3], operations[4], lambda: storage.put_hint("c", b"x")):
        with pytest.raises(StorageError, match="no longer the folder"):
            operation()
    assert list(root.iterdir()) == []


def test_every_new_folder_is_made_durable_once(tmp_path):
    """The order of the calls that a power cut would test, as strace sees them."""
    strace = shutil.which("strace")
    code = """
storage = open_storage(sys.argv[1])
storage.put_new("x/y/z", [b"content"])
"""
    if strace is None:
        children.run(code, str(tmp_path))
        assert (tmp_path / "x" / "y" / "z").read_bytes() == b"content"
        return
    log = tmp_path / "trace"
    (tmp_path / "store").mkdir()
    children.run(
        code,
        str(tmp_path / "store"),
        wrap=(strace, "-f", "-y", "-o", str(log), "-e", "trace=fsync,link,linkat"),
    )
    calls = [line for line in log.read_text().splitlines() if "store" in line]
    order = [("fsync" if "fsync" in line else "link", ".tmp/" in line) for line in calls]
    assert order.index(("fsync", True)) < order.index(("link", True)) < len(order) - 1
    assert "fsync" in calls[-1]
    assert "x/y>" in calls[-1]
    assert sum("fsync" in line and "store>" in line for line in calls) >= 1


def test_ranges_far_past_the_end_cost_nothing(tmp_path):
    storage = open_storage(tmp_path, create=True)
    storage.put_new("a", [b"abc"])
    assert storage.get_ranges("a", [(1, 10**15), (10**15, 10**16)]) == [b"bc", b""]


def test_make_directories_races(tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    durable.make_directories(str(deep))
    durable.make_directories(str(deep))
    assert deep.is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        durable.make_directories(str(tmp_path / "file" / "x"))


def test_reasons_name_the_error():
    assert files.reason(OSError(28, "No space left on device")) == "No space left on device (ENOSPC)"
