"""A folder or a file is replaced as a whole: in which order, and what is left afterwards."""
import os

import pytest

from minillm import atomic_folder
from minillm.atomic_folder import hold, replaced_file, replaced_folder, sync
from minillm.errors import UserError

NAMES = {"a.bin", "b.bin"}


def write(path, text):
    """A new version of the folder at `path`."""
    with replaced_folder(str(path), NAMES) as folder:
        for name in NAMES:
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)


def contents(path):
    return {file.name: file.read_text() for file in path.iterdir()}


NEW = {"a.bin": "new", "b.bin": "new"}


@pytest.mark.parametrize("old", [False, True])
def test_all_is_on_the_disk_before_the_folders_change_places(tmp_path, monkeypatch, old):
    """And the new names are, before anybody is told that they are there."""
    if old:
        write(tmp_path / "out", "old")
    events, take_place = [], atomic_folder._take_place
    monkeypatch.setattr(atomic_folder, "sync", lambda path: events.append(os.path.basename(path)))
    monkeypatch.setattr(atomic_folder, "_take_place",
                        lambda *paths: events.append("change places") or take_place(*paths))

    write(tmp_path / "out", "new")

    assert sorted(events[:2]) == ["a.bin", "b.bin"]
    assert events[2:] == [".out.partial", "change places", tmp_path.name]
    assert contents(tmp_path / "out") == NEW


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    (tmp_path / "a").touch()

    sync(tmp_path / "a")
    sync(tmp_path)

    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_only_a_folder_may_be_impossible_to_sync(tmp_path, monkeypatch):
    """Windows opens no folders."""
    def refuse(*arguments):
        raise PermissionError
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "open", refuse)

    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "a")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_nothing_is_left_beside_the_new_folder(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda a, b: False)

    for text in ("old", "new"):
        write(tmp_path / "out", text)

    assert contents(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "out", "new")

    with pytest.raises(ZeroDivisionError):
        with replaced_folder(str(tmp_path / "out"), NAMES) as folder:
            open(os.path.join(folder, "a.bin"), "w").close()
            1 / 0

    assert contents(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("new_was_there", [False, True])
def test_a_run_that_was_killed_between_two_renames_is_repaired(tmp_path, new_was_there):
    """Before the new folder took the name, or just after it, when the old one was to go."""
    write(tmp_path / "out", "new")
    if new_was_there:
        (tmp_path / ".out.partial.old").mkdir()
    else:
        (tmp_path / "out").rename(tmp_path / ".out.partial.old")

    with pytest.raises(ZeroDivisionError):
        with replaced_folder(str(tmp_path / "out"), NAMES):
            assert contents(tmp_path / "out") == NEW
            1 / 0

    assert contents(tmp_path / "out") == NEW and os.listdir(tmp_path) == ["out"]


def test_what_a_killed_run_had_written_does_not_get_into_the_new_folder(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.bin").touch()

    write(tmp_path / "out", "new")

    assert contents(tmp_path / "out") == NEW


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    write(tmp_path / "there", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there")

    write(tmp_path / "link", "new")

    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "there") == NEW


def test_a_folder_with_other_things_or_a_disk_of_its_own_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "out", "new")
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other things .thesis.txt."):
        write(tmp_path / "out", "newer")
    (tmp_path / "out" / "thesis.txt").unlink()

    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match="is a mount point"):
        write(tmp_path / "out", "newer")

    assert contents(tmp_path / "out") == NEW


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path):
    with replaced_folder(str(tmp_path / "out"), NAMES):
        with pytest.raises(UserError, match="another run is writing"):
            write(tmp_path / "out", "second")

    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == NEW


def test_a_lock_is_free_again_once_it_is_released(tmp_path):
    lock = str(tmp_path / "lock")
    held = hold(lock, "busy here")
    with pytest.raises(UserError, match="busy here: wait for it"):
        hold(lock, "busy here")

    held.release()

    hold(lock, "busy here").release()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replaced_file(path) as new:
        assert str(os.getpid()) in new           # another process writes elsewhere
        with open(new, "w") as file:
            file.write("whole")
    with pytest.raises(ZeroDivisionError):
        with replaced_file(path) as new:
            open(new, "w").close()
            1 / 0

    assert contents(tmp_path) == {"file": "whole"}


def test_a_file_is_replaced_behind_a_link_and_a_device_is_not(tmp_path):
    """As root, /dev/null would be a file from then on, and /dev/stdout no link."""
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    for link, target in (("link", "file"), ("link to pipe", "pipe"), ("new link", "new")):
        (tmp_path / link).symlink_to(target)

    for name in ("link", "new link"):
        with replaced_file(tmp_path / name) as new, open(new, "w") as file:
            file.write("whole")
    for name in ("pipe", "link to pipe"):
        with pytest.raises(OSError, match="it is not a file"), replaced_file(tmp_path / name):
            pass

    assert (tmp_path / "file").read_text() == (tmp_path / "new").read_text() == "whole"
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
