"""What is made is there when it is whole, and replaces nothing."""

import os

import pytest
from programs import start

from scjax import whole
from scjax.whole import made_whole


def make(path, text, *meanwhile):
    """A file, or a folder with one file where the name asks for one; `meanwhile` happens before it gets its name."""
    with made_whole(path) as beside:
        written(beside, text)
        for happens in meanwhile:
            happens()


def written(path, text):
    if path.name == "folder":
        path.mkdir()
        path = path / "inside"
    path.write_text(text)


def text_of(path):
    return (path / "inside" if path.name == "folder" else path).read_text()


@pytest.mark.parametrize("name", ["file", "folder"])
def test_it_is_there_when_it_is_whole(tmp_path, name):
    seen = []
    make(tmp_path / name, "all of it", lambda: seen.append((tmp_path / name).exists()))
    assert seen == [False]
    assert text_of(tmp_path / name) == "all of it"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_after_an_error_nothing_is(tmp_path, error):
    def fails():
        raise error

    with pytest.raises(type(error)):
        make(tmp_path / "file", "half of", fails)
    assert list(tmp_path.iterdir()) == []


def no_links(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_has_come_meanwhile_stays(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(FileExistsError, match="something came there meanwhile, and is not overwritten"):
        make(path, "late", lambda: written(path, "early"))
    assert text_of(path) == "early"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_link_to_nowhere_stays(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileExistsError):
        make(path, "late", lambda: path.symlink_to(tmp_path / "nowhere"))
    assert path.is_symlink()


@pytest.mark.parametrize(("name", "call"), [("file", "link"), ("folder", "rename")])
def test_what_comes_at_the_very_moment_stays(tmp_path, monkeypatch, name, call):
    """After any look whether it is there."""
    path, move = tmp_path / name, getattr(os, call)

    def late(made, at):
        if at == path:
            written(path, "early")
        move(made, at)

    monkeypatch.setattr(os, call, late)
    with pytest.raises(FileExistsError, match="something came there meanwhile"):
        make(path, "late")
    assert text_of(path) == "early"


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "file"
    make(path, "all of it")
    assert path.read_text() == "all of it"
    path.unlink()
    with pytest.raises(FileExistsError, match="something came there meanwhile"):
        make(path, "late", lambda: path.write_text("early"))
    assert path.read_text() == "early"


def test_a_link_that_is_told_of_twice(tmp_path, monkeypatch):
    """NFS may ask again when the answer was lost."""
    link = os.link

    def again(made, at):
        link(made, at)
        link(made, at)

    monkeypatch.setattr(os, "link", again)
    make(tmp_path / "file", "all of it")
    assert (tmp_path / "file").read_text() == "all of it"


def test_what_a_killed_maker_left_is_removed(tmp_path, monkeypatch):
    """Of this machine, and where nobody holds its lock. Others may still be at work, and so may this process."""
    monkeypatch.setattr(whole.socket, "gethostname", lambda: "here")
    gone = ".file.part-here-0000000a"
    others = {".file.part-there-0000000a", ".file.part-here-1-0000000a", ".other.part-here-0000000a"}
    for left in (gone, *others):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("half of")
        (tmp_path / left / ".lock").touch()
    (tmp_path / ".file.part-here-0000000b").mkdir()  # whose maker has no lock yet
    path, seen = tmp_path / "file", []

    def another_makes_it():
        seen.extend(p.name for p in tmp_path.iterdir())
        make(path, "early")
        path.unlink()

    make(path, "late", another_makes_it)
    assert gone not in seen
    assert path.read_text() == "late"
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".file.part-here-0000000b", *others}


def test_what_a_process_is_making_is_left_to_it_until_it_is_killed(tmp_path):
    program = f"""
import sys, time
from pathlib import Path
from scjax.whole import made_whole
with made_whole({str(tmp_path / "file")!r}) as beside:
    beside.write_text("half of")
    sys.stdout.write("making\\n")
    sys.stdout.flush()
    time.sleep(600)
"""
    running = start(1, "-c", program)
    try:
        assert running.stdout.readline() == "making\n"
        make(tmp_path / "file", "first")
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        running.kill()
        running.communicate()
    (tmp_path / "file").unlink()
    make(tmp_path / "file", "second")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
