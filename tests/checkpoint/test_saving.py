"""Saves that are killed, interrupted and raced: the old adapter or the new one, whole, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomise
from torch import Tensor, nn

import fxpeft
from fxpeft import CheckpointError, LoraConfig, files
from fxpeft.checkpoint import CONFIG, WEIGHTS, read
from fxpeft.checkpoint.writing import write_files

pytestmark = pytest.mark.filterwarnings("error:.*was changed after")
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
fork = multiprocessing.get_context("fork")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).eval()


def content(number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One of two adapters of equal shapes whose configs and tensors are different."""
    model = net()
    config = LoraConfig(r=3, lora_alpha=5 + 7 * number, target_modules=["0", "2"], rank_pattern={"2": 2})
    fxpeft.add_adapter(model, config)
    tensors = fxpeft.adapter_state_dict(model)
    randomise(tensors.values(), number)
    return config.to_dict(), {k: v.detach().clone() for k, v in tensors.items()}


CONTENTS = [content(0), content(1)]


def save(folder: Path, number: int) -> None:
    write_files(folder, *CONTENTS[number])


def number_in(folder: Path) -> int:
    """Which of the two a folder holds, whole."""
    found = read(folder)
    number = int(found.config.lora_alpha == CONTENTS[1][0]["lora_alpha"])
    assert all(torch.equal(v, CONTENTS[number][1][k]) for k, v in found.tensors.items())
    return number


@torch.no_grad()
def output(folder: Path) -> Tensor:
    model = net()
    fxpeft.load_adapter(model, folder)
    result: Tensor = model(X)
    return result


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "a", 0)
    return tmp_path / "a"


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked process that does some work."""

    def run() -> None:
        work()
        os._exit(0)

    child = fork.Process(target=run)
    child.start()
    child.join(30)
    assert child.exitcode is not None
    return child.exitcode


# --- killed ---


STEPS = ("open", "fsync", "replace", "chmod", "unlink")


def die_at(at: int) -> None:
    """From now on this process dies right before its ``at``-th step in the file system."""
    left = [at]

    def counted(name: str) -> Any:
        real = getattr(os, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, counted(name))


def test_a_save_that_dies_at_any_step_leaves_one_adapter_and_the_next_save_sweeps(tmp_path: Path) -> None:
    seen = []
    for at in range(100):
        folder = tmp_path / str(at)
        save(folder, 0)

        def dies(folder: Path = folder, at: int = at) -> None:
            die_at(at)
            save(folder, 1)

        code = in_child(dies)
        seen.append(number_in(folder))
        save(folder, at % 2)
        assert names(folder) == [CONFIG, WEIGHTS]
        assert number_in(folder) == at % 2
        if code == 0:
            break
    assert seen == sorted(seen)
    assert 5 < at < 50
    assert set(seen) == {0, 1}


def test_killed_between_the_two_files_the_new_adapter_is_read_by_every_entry(folder: Path) -> None:
    def dies() -> None:
        real, count = Path.replace, [0]

        def replace(*args: Any) -> Path:
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        Path.replace = replace  # type: ignore[method-assign]
        save(folder, 1)

    old = output(folder)
    assert in_child(dies) == -signal.SIGKILL
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == CONTENTS[0][0]["lora_alpha"]
    assert number_in(folder) == 1
    save(folder.parent / "new", 1)
    wanted = output(folder.parent / "new")
    assert not torch.equal(wanted, old)
    assert torch.equal(output(folder), wanted)
    model = net()
    fxpeft.prepare_hotswap(model, 4, targets=["0", "2"])
    fxpeft.add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    fxpeft.hotswap(model, folder)
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted)


def test_sixty_kills(tmp_path: Path) -> None:
    """At any moment whatever, from outside."""
    folder, chance, begun = tmp_path / "a", random.Random(0), fork.Event()
    save(folder, 0)

    def forever(first: int) -> None:
        begun.set()  # a busy machine may start it late
        for number in range(first, 10**6):
            save(folder, number % 2)

    seen = set()
    for kill in range(60):
        child = fork.Process(target=forever, args=(kill,))
        begun.clear()
        child.start()
        assert begun.wait(60)
        time.sleep(chance.uniform(0.005, 0.05))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
        seen.add(number_in(folder))
        assert len(names(folder)) <= 5  # what those before left was swept
    assert seen == {0, 1}
    save(folder, 1)
    assert names(folder) == [CONFIG, WEIGHTS]


def test_an_interrupt_between_the_two_files_comes_after_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        done = real(self, target)
        if target.name == WEIGHTS:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 1)
    assert number_in(folder) == 1
    assert names(folder) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("step", ["write_bytes", "chmod", "replace"])
def test_a_save_that_fails_leaves_the_old_adapter(
    folder: Path, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (folder / name).read_bytes() for name in names(folder)}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(type(error)):
            save(folder, 1)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_only_what_a_save_left_is_swept(folder: Path) -> None:
    own = folder / f".unfinished-{'0' * 16}-{WEIGHTS}"
    others = [
        f".unfinished-{'0' * 16}-model.safetensors", f".unfinished-notes-{WEIGHTS}", f".{WEIGHTS}.original",
        f".unfinished-{'0' * 16}-{WEIGHTS}.bak", "README.md",
    ]  # fmt: skip
    for name in (own.name, *others):
        (folder / name).write_text("text")
    save(folder, 1)
    assert names(folder) == sorted((CONFIG, WEIGHTS, *others))


# --- beside others ---


def test_readers_beside_a_writer_never_see_a_mixture(folder: Path) -> None:
    def writes() -> None:
        for number in range(60):
            save(folder, number % 2)

    child = fork.Process(target=writes)
    child.start()
    seen = []
    while child.is_alive() or len(seen) < 10:
        seen.append(number_in(folder))
    child.join()
    assert child.exitcode == 0
    assert set(seen) == {0, 1}
    assert names(folder) == [CONFIG, WEIGHTS]


def test_readers_beside_a_writer_through_transformers(folder: Path) -> None:
    from fxpeft.integrations.transformers import loading

    done = threading.Event()

    def writes() -> None:
        for number in range(40):
            save(folder, number % 2)
        done.set()

    thread = threading.Thread(target=writes)
    thread.start()
    seen = set()
    while not done.is_set():
        found = loading.read(str(folder), None, None, download={})
        number = int(found.config.lora_alpha == CONTENTS[1][0]["lora_alpha"])
        assert all(torch.equal(v, CONTENTS[number][1][k]) for k, v in found.tensors.items())
        seen.add(number)
    thread.join()
    assert seen == {0, 1}


def test_writers_take_turns(folder: Path) -> None:
    """Four at once, threads and processes: whole adapters, also at the end, and no live one's files are swept."""

    def writes() -> None:
        for number in range(10):
            save(folder, number % 2)

    def threads() -> None:
        several = [threading.Thread(target=writes) for _ in range(2)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()

    children = [fork.Process(target=threads) for _ in range(2)]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        number_in(folder)
    assert [child.exitcode for child in children] == [0, 0]
    assert number_in(folder) in (0, 1)
    assert names(folder) == [CONFIG, WEIGHTS]


def test_a_save_waits_for_another_one_but_not_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT", 0.1)
    with files.replacing(folder / "other") as (path,):
        with pytest.raises(CheckpointError, match="another process or thread has been saving here for"):
            save(folder, 1)
        path.write_text("text")
    assert number_in(folder) == 0
    save(folder, 1)
    assert number_in(folder) == 1


def test_a_child_that_was_forked_in_a_save_does_not_keep_the_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAIT", 1.0)
    with files.replacing(folder / "other"):
        child = fork.Process(target=time.sleep, args=(20,))
        child.start()
    save(folder, 1)
    child.kill()
    child.join()


# --- the config and its tensors ---


def test_a_config_that_was_edited_loads_with_a_warning(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values))  # written differently, the same config
    assert number_in(folder) == 0
    (folder / CONFIG).write_text(json.dumps(values | {"lora_alpha": 9}))
    with pytest.warns(UserWarning, match=f"{CONFIG}: it was changed after {WEIGHTS} was saved with it"):
        assert read(folder).config.lora_alpha == 9


def test_files_of_others_have_no_note(folder: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"])
    theirs = peft.get_peft_model(net(), config)
    randomise(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = net()
    fxpeft.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model(X), theirs(X))
    theirs.save_pretrained(str(folder))  # over ours
    assert torch.equal(output(folder), output(tmp_path / "theirs"))


def test_peft_reads_what_was_saved(folder: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(net(), str(folder)).eval()
    torch.testing.assert_close(theirs(X), output(folder))


# --- the file system ---


def test_links_stay_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (folder / WEIGHTS).rename(tmp_path / "store" / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "store" / "blob")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    save(tmp_path / "link", 1)
    assert (folder / WEIGHTS).is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert number_in(folder) == 1
    assert names(tmp_path / "store") == ["blob"]
    assert names(folder) == [CONFIG, WEIGHTS]


def test_modes(folder: Path) -> None:
    for name, mode in ((CONFIG, 0o440), (WEIGHTS, 0o604)):
        (folder / name).chmod(mode)
    save(folder, 1)
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in (CONFIG, WEIGHTS)] == [0o440, 0o604]


def test_the_umask_counts_and_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        os.umask(0o027)
        os.umask = None  # type: ignore[assignment]
        save(tmp_path / "a", 0)
        modes = {stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in (CONFIG, WEIGHTS)}
        os._exit(0 if modes == {0o640} else 1)

    assert in_child(work) == 0


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_is_not_written_over(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    left = ({CONFIG, WEIGHTS} - {name}).pop()
    before = (folder / left).read_bytes()
    with pytest.raises(CheckpointError, match=f"{name}: expected a file, or none"):
        save(folder, 1)
    assert (folder / left).read_bytes() == before
    assert names(folder) == [CONFIG, WEIGHTS]


def test_files_and_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: the new folders' names, both files, and, after the renames, the names in the folder."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        steps.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        steps.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save(tmp_path / "new" / "a", 0)
    assert sorted(steps[:2]) == sorted(["new", tmp_path.name])
    assert [step.rpartition("-")[2] for step in steps[2:]] == [
        WEIGHTS, CONFIG, f"rename {WEIGHTS}", f"rename {CONFIG}", "a",
    ]  # fmt: skip
