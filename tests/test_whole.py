"""What is made is there when it is whole, and replaces nothing."""

import os

import pytest

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


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_has_come_meanwhile_stays(tmp_path, monkeypatch, name, links):
    """Also where the file system knows no links."""

    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / name
    if not links:
        monkeypatch.setattr(os, "link", no_links)
        make(tmp_path / "other", "all of it")
        (tmp_path / "other").unlink()
    with pytest.raises(FileExistsError, match="something came there meanwhile, and is not overwritten"):
        make(path, "late", lambda: written(path, "early"))
    assert text_of(path) == "early"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_link_to_nowhere_and_what_comes_at_the_very_moment_stay(tmp_path, monkeypatch):
    """The latter between the look whether it is there and the renaming."""
    path, link = tmp_path / "file", os.link
    with pytest.raises(FileExistsError):
        make(path, "late", lambda: path.symlink_to(tmp_path / "nowhere"))
    assert path.is_symlink()
    path.unlink()

    def late(made, at):
        path.write_text("early")
        link(made, at)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError):
        make(path, "late")
    assert path.read_text() == "early"


def test_what_a_killed_maker_left_is_removed(tmp_path, monkeypatch):
    """Of this machine and of a process that is gone, or was this one's namesake. Others may still be at work, also on a
    machine of a like name, and so may another part of this process.
    """
    monkeypatch.setattr(whole.socket, "gethostname", lambda: "here")
    gone = {f".file.part-here-{number}.0a" for number in (2**22 + 5, 2**70, os.getpid())}
    others = {f".file.part-here-{os.getppid()}.0a", ".file.part-there-1.0a", f".file.part-here-1-{2**22 + 5}.0a"}
    others |= {f".other.part-here-{2**22 + 5}.0a"}
    for left in gone | others:
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("half of")
    path = tmp_path / "file"

    def another_makes_it():
        make(path, "early")
        path.unlink()

    make(path, "late", another_makes_it)
    assert path.read_text() == "late"
    assert {p.name for p in tmp_path.iterdir()} == {"file", *others}
