"""A checkpoint is whole or not there, whoever fails, is killed, or writes beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from server.storage.checkpoint_cases import OWNER, automatic, content, saved_model
from server.storage.stored_checkpoints import NAMED, refusal

from gradwire_proto.errors import (
    AlreadyExists,
    CheckpointNotFound,
    GradwireError,
)
from gradwire_proto.values import Segment
from gradwire_server.storage import checkpoint_store
from gradwire_server.storage.manifest import MANIFEST
from gradwire_server.storage.object_folders import ObjectFolders


def torn(segments: Path) -> Any:
    """One whose writing fails after some of its files."""
    saved = saved_model(segments)
    (name, tensor), *_ = [each for each in saved.state.tensors.items() if isinstance(each[1].data, Segment)]
    lost = replace(tensor, data=replace(tensor.data, path=str(segments / "gone")))
    return replace(saved, state=replace(saved.state, tensors={**saved.state.tensors, name: lost}))


def test_checkpoint_that_failed_leaves_nothing(storage, segments):
    with pytest.raises(GradwireError):
        storage.store.write(NAMED, torn(segments))
    assert storage.store.list() == [] and not storage.leftovers()
    storage.store.write(NAMED, saved_model(segments))


def test_failed_one_leaves_the_one_that_is_there(local, segments):
    local.store.write("auto/digits/4", automatic(segments, 4, step=1))
    with pytest.raises(GradwireError):
        local.store.write("auto/digits/4", replace(torn(segments), automatic=True))
    assert local.store.read("auto/digits/4").state.step == 1


def test_folder_without_a_manifest_is_invisible_and_swept(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/4", automatic(segments, 4))
    for key in (NAMED, "auto/digits/4"):
        storage.files.rm_file(storage.path(key, MANIFEST))
    assert storage.store.list() == [] and storage.store.newest("digits") is None
    assert isinstance(refusal(lambda: storage.store.read(NAMED)), CheckpointNotFound)
    storage.opened().sweep()
    assert not [path for path in storage.files.find(storage.root) if "/auto/" in path]


def test_named_one_whose_writer_was_killed_is_invisible_and_swept(storage, segments, monkeypatch):
    rmtree, remove = shutil.rmtree, ObjectFolders._remove

    def refuse(*_):
        raise KeyError("as the test wants it")

    def die(*_):
        # A killed process removes nothing.
        monkeypatch.setattr(ObjectFolders, "_remove", refuse)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_store.Manifest, "of", die)
        with pytest.raises(KeyboardInterrupt):
            storage.store.write(NAMED, saved_model(segments))
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(ObjectFolders, "_remove", remove)
    assert storage.files.find(storage.root) and storage.store.list() == []
    storage.opened().sweep()
    assert storage.leftovers() == []
    storage.store.write(NAMED, saved_model(segments))


def test_sweep_removes_what_readers_and_writers_left(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.read(NAMED)
    storage.opened().sweep()
    assert not storage.leftovers()
    assert storage.store.read(NAMED).name == "best"


def test_sweep_puts_back_what_was_being_replaced(local, segments):
    local.store.write("auto/digits/4", automatic(segments, 4))
    aside = Path(local.root) / ".replaced" / OWNER / "auto@digits@4"
    aside.parent.mkdir(parents=True)
    os.rename(Path(local.root) / "auto" / OWNER / "digits/4", aside)
    assert local.store.newest("digits") is None
    local.opened().sweep()
    assert local.store.read("auto/digits/4").name == "digits/4"


@pytest.mark.slow
def test_killed_writer_leaves_whole_checkpoints_only(local, segments, tmp_path):
    program = tmp_path / "writer.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        from gradwire_server.storage.checkpoint_store import CheckpointStore
        from server.storage.checkpoint_cases import OWNER, automatic
        store, number = CheckpointStore(sys.argv[1], Path(sys.argv[2]), owner=OWNER), int(sys.argv[4])
        saved = automatic(Path(sys.argv[3]), number)
        print("ready", flush=True)
        while True:
            from dataclasses import replace
            number += 1
            store.write(f"auto/digits/{number}", replace(saved, state=replace(saved.state, command=number)))
        """)
    )
    path = os.pathsep.join([*filter(None, sys.path)])
    found = 0
    for round_ in range(2):
        process = subprocess.Popen(
            [sys.executable, str(program), local.url, str(tmp_path), str(segments), str(round_ * 1000)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.013 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for number in local.store.automatic("digits"):
            read = local.store.read(f"auto/digits/{number}")
            assert read.state.command == number
            read.remove_files()
            found += 1
    assert found
    local.opened().sweep()
    assert not local.leftovers()


def test_reader_beside_a_writer_sees_whole_ones_only(storage, segments):
    ended = threading.Event()
    first, *models = [automatic(segments, 4, step=step) for step in range(6)]
    storage.store.write("auto/digits/4", first)

    def replace_again_and_again() -> None:
        try:
            for saved in models:
                storage.store.write("auto/digits/4", saved)
        finally:
            ended.set()

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    last = False
    while not last:
        # Once behind its end, however little this thread runs.
        last = ended.is_set()
        for checkpoint in storage.store.list():
            assert checkpoint.name == "digits/4"
    writer.join()
    assert storage.store.get("auto/digits/4").step == 5


def test_two_writers_of_one_name_end_with_one_checkpoint(storage, segments):
    models = [saved_model(segments, step=step, request_id=None) for step in range(4)]
    won, refused = [], []

    def write(index: int) -> None:
        try:
            won.append((index, storage.store.write(NAMED, models[index])))
        except AlreadyExists:
            refused.append(index)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((index, written),) = won
    assert len(refused) == 3 and written.step == index
    assert content(storage.store.read(NAMED)) == content(models[index])
