"""Checkpoints, in a folder and in a store of objects: whole or not there, and read only as they were written."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from server.storage.checkpoint_cases import OWNER, automatic, content, net, saved_model

from gradwire_proto.errors import (
    AlreadyExists,
    CheckpointNotFound,
    FailedPrecondition,
    GradwireError,
    InvalidArgument,
    ResourceExhausted,
)
from gradwire_proto.values import Segment
from gradwire_server.storage import checkpoint_store, local_folders
from gradwire_server.storage.checkpoint_folders import place
from gradwire_server.storage.checkpoint_store import CheckpointStore, key_of
from gradwire_server.storage.manifest import FILES, MANIFEST
from gradwire_server.storage.object_folders import ObjectFolders

NAMED = "named/best"
DATA = Path(__file__).parent / "data"


class Storage:
    """A store, and a hand in what it keeps. `url`: of its root."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.files, self.root = fsspec.core.url_to_fs(url)
        self.store = self.opened()

    def opened(self, **options: Any) -> CheckpointStore:
        return CheckpointStore(self.url, self.folder / "cache", **{"owner": OWNER, **options})

    def path(self, key: str, name: str) -> str:
        return f"{self.root}/{place(key, OWNER)}/{name}"

    def leftovers(self) -> list[str]:
        """The files that belong to no checkpoint that is shown."""
        own = [self.path(each, name) for each in self.store._folders.keys("") for name in (MANIFEST, *FILES)]
        cached = [str(path) for path in (self.folder / "cache").rglob("*") if path.is_file()]
        return sorted({*self.files.find(self.root)} - {*own}) + cached


@pytest.fixture(params=["folder", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    url = str(tmp_path / "checkpoints") if request.param == "folder" else f"memory://{secrets.token_hex(8)}"
    made = Storage(url, tmp_path)
    yield made
    if request.param == "objects":
        with contextlib.suppress(FileNotFoundError):
            made.files.rm(made.root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints"), tmp_path)


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    folder = tmp_path / "segments"
    folder.mkdir()
    return folder


def refusal(call: Callable[[], Any]) -> GradwireError:
    with pytest.raises(GradwireError) as refused:
        call()
    return refused.value


# --- what comes back ----------------------------------------------------------------------------------------------


def test_model_comes_back_as_it_was_saved(storage, segments):
    saved = saved_model(segments)
    written = storage.store.write(NAMED, saved)
    found = storage.opened().read(NAMED)
    assert content(found) == content(saved)
    assert found.torch_version == torch.__version__
    assert (written.name, written.step, written.command, written.automatic) == ("best", 3, 5, False)
    sizes = [storage.files.size(storage.path(NAMED, name)) for name in FILES]
    assert written == storage.store.get(NAMED) and written.nbytes == sum(sizes)


def test_model_without_optimizer_gradients_and_variants_comes_back(storage, segments):
    saved = saved_model(segments)
    state = replace(saved.state, optimizer=None, held=(None, None), opened=(), splits={}, trained=())
    saved = replace(saved, state=state, replies=(), request_id=None)
    storage.store.write(NAMED, saved)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_weights_load_into_the_users_own_module(storage, segments, tmp_path):
    trained, ids = net(1), torch.randint(7, (6, 3))
    storage.store.write(NAMED, saved_model(segments, trained))
    storage.files.get(storage.path(NAMED, "weights.safetensors"), str(tmp_path / "weights.safetensors"))
    fresh = net(2)
    weights = load_file(tmp_path / "weights.safetensors")
    assert list(trained.state_dict().keys() ^ weights.keys()) == []
    fresh.load_state_dict(weights, strict=True)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.eval()(ids), trained.eval()(ids))
    assert all(torch.equal(each, trained.state_dict()[name]) for name, each in fresh.state_dict().items())


def test_parameters_that_safetensors_has_no_type_for_come_back(storage, segments):
    module = torch.nn.Module()
    module.z = torch.nn.Parameter(torch.randn(3, dtype=torch.complex128))
    saved = saved_model(segments, module)
    storage.store.write(NAMED, saved)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_another_torch_is_logged(storage, segments, caplog, monkeypatch):
    monkeypatch.setattr("gradwire_server.storage.manifest.version", lambda _: "1.0")
    storage.store.write(NAMED, saved_model(segments))
    assert storage.store.read(NAMED).torch_version == "1.0"
    assert "under torch 1.0" in caplog.text


def test_files_that_were_read_belong_to_the_reader(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    read = storage.store.read(NAMED)
    assert storage.leftovers()
    read.remove_files()
    read.remove_files()
    assert not storage.leftovers()
    assert content(storage.store.read(NAMED)) == content(saved)


def test_deleting_takes_nothing_from_a_reader(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    read = storage.store.read(NAMED)
    storage.store.delete(NAMED)
    assert content(read) == content(saved)


def test_one_that_is_deleted_while_it_is_read_is_not_found(storage, segments, monkeypatch):
    storage.store.write(NAMED, saved_model(segments))
    fetch = storage.store._folders.fetch

    def too_late(key: str, names: list[str]) -> Path:
        storage.opened().delete(key)
        return fetch(key, names)

    monkeypatch.setattr(storage.store._folders, "fetch", too_late)
    assert isinstance(refusal(lambda: storage.store.read(NAMED)), CheckpointNotFound)
    assert not storage.leftovers()


def test_files_of_a_saved_model_are_removed_with_it(segments):
    saved = saved_model(segments)
    assert any(segments.iterdir())
    saved.remove_files()
    assert not any(segments.iterdir())


def test_first_version_is_still_read(tmp_path):
    shutil.copytree(DATA / "checkpoint-1", tmp_path / "checkpoints")
    found = CheckpointStore(str(tmp_path / "checkpoints"), tmp_path / "cache", owner=OWNER).read("named/first")
    (tmp_path / "segments").mkdir()
    expected = content(saved_model(tmp_path / "segments", name="first"))
    random = {"tensors", "optimizer", "held"}
    seen = content(found)
    assert {name: seen[name] for name in expected.keys() - random} == {
        name: expected[name] for name in expected.keys() - random
    }
    assert {name: tensor[:2] for name, tensor in seen["tensors"].items()} == {
        name: tensor[:2] for name, tensor in expected["tensors"].items()
    }
    assert seen["tensors"]["a_bfloat16"] == expected["tensors"]["a_bfloat16"]
    assert seen["tensors"]["_constant0"] == expected["tensors"]["_constant0"]
    for part in ("param_groups", "schedule", "scaler"):
        assert seen["optimizer"][part] == expected["optimizer"][part]
    assert [held and held.keys() for held in found.state.held] == [{"embed.weight", "scale"}, None]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_missing_cut_or_changed_is_named(storage, segments, name):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    path = storage.path(NAMED, name)
    whole = storage.files.cat_file(path)
    damages = [None, whole[:-1], whole + b"\0"]
    for position in {0, len(whole) // 2, len(whole) - 1} if whole else ():
        damages.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for damage in damages:
        if damage is None:
            storage.files.rm_file(path)
        else:
            storage.files.pipe_file(path, damage)
        error = refusal(lambda: storage.store.read(NAMED))
        assert error.reason == "CHECKPOINT_CORRUPT" and name in str(error) and "best" in str(error)
        assert not storage.leftovers()
        storage.files.pipe_file(path, whole)
    assert content(storage.store.read(NAMED)) == content(saved)


def test_damaged_manifest_is_refused_and_not_listed(storage, segments, caplog):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("named/other", saved_model(segments, name="other"))
    path = storage.path(NAMED, MANIFEST)
    storage.files.pipe_file(path, storage.files.cat_file(path).replace(b'"step": 3', b'"step": 4'))
    assert refusal(lambda: storage.store.read(NAMED)).reason == "CHECKPOINT_CORRUPT"
    assert [each.name for each in storage.store.list()] == ["other"]
    assert "manifest.json" in caplog.text


def test_another_version_is_refused(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    path = storage.path(NAMED, MANIFEST)
    storage.files.pipe_file(path, storage.files.cat_file(path).replace(b'"version": 1', b'"version": 7', 1))
    assert refusal(lambda: storage.store.read(NAMED)).reason == "CHECKPOINT_VERSION"
    assert refusal(lambda: storage.store.get(NAMED)).reason == "CHECKPOINT_VERSION"


@pytest.mark.parametrize("act", ["read", "get", "delete"])
def test_checkpoint_that_is_not_there_is_not_found(storage, segments, act):
    for _ in range(2):
        error = refusal(lambda: getattr(storage.store, act)(NAMED))
        assert isinstance(error, CheckpointNotFound) and error.resource == "checkpoints/best"
        # Another one being there changes nothing.
        storage.store.write(f"named/{secrets.token_hex(4)}", saved_model(segments))


@pytest.mark.parametrize(
    "key", ["named/../best", "named/a/b", "auto/digits", "auto/../1", "auto/a/../1", "x/y", "named/"]
)
def test_key_that_leads_elsewhere_is_refused(storage, key):
    with pytest.raises(ValueError):
        storage.store.read(key)


def test_name_that_is_taken_is_refused(storage, segments):
    saved = saved_model(segments)
    storage.store.write(NAMED, saved)
    for request_id in (None, "00000000-0000-4000-8000-000000000002"):
        error = refusal(lambda: storage.store.write(NAMED, replace(saved_model(segments), request_id=request_id)))  # noqa: B023
        assert isinstance(error, AlreadyExists) and error.reason == "CHECKPOINT_EXISTS"
    assert content(storage.store.read(NAMED)) == content(saved)


def test_repeat_of_the_request_gets_the_first_answer(storage, segments):
    first = storage.store.write(NAMED, saved_model(segments))
    again = saved_model(segments, step=9, created_at=1_800_000_000.0)
    assert storage.opened().write(NAMED, again) == first
    assert storage.opened().answered(NAMED, "digits", again.request_id) == first
    assert storage.store.answered("named/other", "digits", again.request_id) is None


def test_request_id_of_another_models_request_is_refused(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    error = refusal(lambda: storage.store.write(NAMED, saved_model(segments, model_id="letters")))
    assert isinstance(error, InvalidArgument) and error.reason == "REQUEST_ID_REUSED"


def test_automatic_one_takes_the_place_of_one_with_its_number(storage, segments):
    storage.store.write("auto/digits/4", automatic(segments, 4, step=1))
    storage.store.write("auto/digits/4", automatic(segments, 4, step=2))
    assert storage.store.read("auto/digits/4").state.step == 2
    storage.store.read("auto/digits/4").remove_files()


# --- which are there ----------------------------------------------------------------------------------------------


def test_newest_is_that_of_the_highest_number(storage, segments):
    assert storage.store.newest("digits") is None
    for number in (0, 10, 9):
        storage.store.write(f"auto/digits/{number}", automatic(segments, number))
    storage.store.write("auto/digits2/99", automatic(segments, 99, "digits2"))
    assert storage.store.newest("digits") == "auto/digits/10"
    assert storage.store.automatic("digits") == [10, 9, 0]


def test_list_has_what_starts_so(storage, segments):
    assert storage.store.list() == []
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/4", automatic(segments, 4))
    storage.store.write("auto/digits2/5", automatic(segments, 5, "digits2"))
    assert [each.name for each in storage.store.list()] == ["digits/4", "digits2/5", "best"]
    assert [each.name for each in storage.store.list("named/")] == ["best"]
    assert [each.name for each in storage.store.list("auto/digits/")] == ["digits/4"]
    assert [key_of(each.name) for each in storage.store.list()] == ["auto/digits/4", "auto/digits2/5", NAMED]


def test_what_was_deleted_is_gone(storage, segments):
    storage.store.write(NAMED, saved_model(segments))
    storage.store.delete(NAMED)
    assert storage.store.list() == [] and not storage.leftovers()
    storage.store.write(NAMED, saved_model(segments, step=8))
    assert storage.store.get(NAMED).step == 8


def test_automatic_ones_go_with_their_model(storage, segments):
    for number in (0, 4):
        storage.store.write(f"auto/digits/{number}", automatic(segments, number))
    storage.store.write("auto/digits2/5", automatic(segments, 5, "digits2"))
    storage.store.write(NAMED, saved_model(segments))
    storage.store.delete_automatic("digits")
    assert [each.name for each in storage.store.list()] == ["digits2/5", "best"]


# --- half-written ones --------------------------------------------------------------------------------------------


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

    def die(saved, files):
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
    models = [automatic(segments, 4, step=step) for step in range(6)]

    def replace_again_and_again() -> None:
        try:
            for saved in models:
                storage.store.write("auto/digits/4", saved)
        finally:
            ended.set()

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    seen = 0
    while not ended.is_set():
        for checkpoint in storage.store.list():
            assert checkpoint.name == "digits/4"
            seen += 1
    writer.join()
    assert seen and storage.store.get("auto/digits/4").step == 5


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


# --- a storage that fails -----------------------------------------------------------------------------------------


def test_full_disk_is_told_and_leaves_nothing(local, segments):
    saved = saved_model(segments)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file of more bytes than this is refused by the system, as one for which there is no room.
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, whole[1]))
    try:
        error = refusal(lambda: local.store.write(NAMED, saved))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert isinstance(error, ResourceExhausted) and error.reason == "STORAGE_FULL" and error.outcome == "not_applied"
    assert local.store.list() == [] and not local.leftovers()
    local.store.write(NAMED, saved)
    assert content(local.store.read(NAMED)) == content(saved)


def test_read_only_folder_is_told(local, segments, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    saved = saved_model(segments)
    with monkeypatch.context() as patch:
        # Root, as whom tests may run, writes wherever modes forbid it.
        patch.setattr(local_folders.os, "open", refuse)
        error = refusal(lambda: local.store.write(NAMED, saved))
    assert isinstance(error, FailedPrecondition) and error.reason == "STORAGE_READ_ONLY"
    assert not local.leftovers()


def test_everything_is_on_the_disk_before_it_is_shown(local, segments, monkeypatch):
    order: list[tuple[str, Any]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        order.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any) -> None:
        order.append(("rename", {path.stat().st_ino: path.name for path in [source, *Path(source).iterdir()]}))
        rename(source, target)

    monkeypatch.setattr(local_folders.os, "fsync", recorded_fsync)
    monkeypatch.setattr(local_folders.os, "rename", recorded_rename)
    local.store.write(NAMED, saved_model(segments))
    (at,) = [index for index, (what, _) in enumerate(order) if what == "rename"]
    flushed = {inode for _, inode in order[:at]}
    assert order[at][1].keys() <= flushed and len(order[at][1]) == len(FILES) + 2
    assert {each for _, each in order[at + 1 :]} >= {(Path(local.root) / "named").stat().st_ino}


def test_nothing_is_shown_or_removed_by_a_service_that_was_taken_over_from(storage, segments):
    def fenced() -> None:
        raise FailedPrecondition("another service has taken over", reason="MODEL_FENCED")

    storage.store.write(NAMED, saved_model(segments))
    old = storage.opened(fence=fenced)
    assert refusal(lambda: old.write("named/other", saved_model(segments))).reason == "MODEL_FENCED"
    assert refusal(lambda: old.delete(NAMED)).reason == "MODEL_FENCED"
    assert [each.name for each in storage.store.list()] == ["best"]


def test_what_the_new_service_swept_the_old_one_cannot_show(local, segments, monkeypatch):
    old = local.opened(fence=lambda: local.opened().sweep())
    assert refusal(lambda: old.write(NAMED, saved_model(segments))).reason == "MODEL_FENCED"
    assert local.store.list() == []


def test_file_system_without_links_is_read_all_the_same(local, segments, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(local_folders.os, "link", refuse)
    saved = saved_model(segments)
    local.store.write(NAMED, saved)
    assert content(local.store.read(NAMED)) == content(saved)


# --- several services ---------------------------------------------------------------------------------------------


def test_services_share_named_checkpoints_and_leave_each_others_automatic_ones_alone(storage, segments):
    other = storage.opened(owner="fedcba9876543210")
    storage.store.write(NAMED, saved_model(segments))
    storage.store.write("auto/digits/4", automatic(segments, 4))
    other.sweep()
    assert [each.name for each in other.list()] == ["best"] and other.automatic("digits") == []
    other.write("auto/digits/4", automatic(segments, 4, step=9))
    other.delete_automatic("digits")
    other.write("auto/digits/5", automatic(segments, 5))
    assert storage.store.automatic("digits") == [4] and storage.store.get("auto/digits/4").step == 3
    assert refusal(lambda: other.write(NAMED, saved_model(segments, request_id=None))).reason == "CHECKPOINT_EXISTS"
    other.delete(NAMED)
    assert [key_of(each.name) for each in storage.store.list()] == ["auto/digits/4"]


def test_what_another_service_is_writing_or_reading_is_not_swept(storage, segments, monkeypatch):
    other = CheckpointStore(storage.url, storage.folder / "cache of the other", owner="fedcba9876543210")
    write, check = checkpoint_store.write_files, checkpoint_store.check_file

    def written(draft, saved):
        files = write(draft, saved)
        other.sweep()
        return files

    def checked(*arguments):
        other.sweep()
        check(*arguments)

    monkeypatch.setattr(checkpoint_store, "write_files", written)
    monkeypatch.setattr(checkpoint_store, "check_file", checked)
    for key, saved in ((NAMED, saved_model(segments)), ("auto/digits/4", automatic(segments, 4))):
        storage.store.write(key, saved)
        assert content(storage.store.read(key)) == content(saved)
