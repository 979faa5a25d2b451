"""What a swap waits for: parts called on their own, copies, release and removal, checkpoints, forks."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from swapping import NAMES, X, close, fresh, is_free, lock_of, net, prepared, slow_swaps, threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxpeft
from fxpeft.errors import LockError

WAYS: dict[str, Callable[[nn.Sequential], Tensor]] = {
    "call": lambda model: model(X),
    "forward": lambda model: model.forward(X),
    "part": lambda model: model[0](X),
    "part's forward": lambda model: model[0].forward(X),
    "slice": lambda model: model[0].down(model[0].up(X)),
}


@pytest.mark.parametrize("way", WAYS)
def test_parts_called_on_their_own_see_one_adapter(way: str, folders: dict[str, str]) -> None:
    model = prepared(folders)
    allowed = []
    for folder in folders.values():
        bare = net()
        fxpeft.load_adapter(bare, folder)
        with torch.no_grad():
            allowed.append(WAYS[way](bare))
    wrong: list[bool] = []

    def compute() -> None:
        with torch.no_grad():
            if way == "slice":  # several calls: each is whole, and a hold makes them one
                with fxpeft.hold(model):
                    found = WAYS[way](model)
            else:
                found = WAYS[way](model)
        wrong.append(not close(found, *allowed))

    with slow_swaps(), threads(compute, compute):
        for i in range(40):
            fxpeft.set_adapter(model, NAMES[i % 3])
    assert len(wrong) > 40
    assert sum(wrong) == 0


def test_the_check_for_mixtures_can_fail(folders: dict[str, str], outputs: Any) -> None:
    from fxpeft.serving.guard import unguard_forwards

    model = prepared(folders)
    unguard_forwards(model)
    wrong: list[bool] = []

    def compute() -> None:
        with torch.no_grad():
            wrong.append(not close(model(X), *outputs.values()))

    with slow_swaps(), threads(compute, compute):
        for i in range(40):
            fxpeft.set_adapter(model, NAMES[i % 3])
    assert sum(wrong) > 0


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("part", [False, True])
def test_copies_under_swaps_hold_one_adapter(way: Any, part: bool, folders: dict[str, str], outputs: Any) -> None:
    model = prepared(folders)
    allowed = outputs.values()
    if part:
        allowed = []
        for folder in folders.values():
            bare = net()
            fxpeft.load_adapter(bare, folder)
            allowed.append(bare[0](X).detach())
    made: list[nn.Module] = []

    def swap() -> None:
        for name in NAMES:
            fxpeft.set_adapter(model, name)

    with slow_swaps(), threads(swap):
        for _ in range(15):
            made.append(way(model[0] if part else model))
    for twin in made:
        with torch.no_grad():
            assert close(twin(X), *allowed)
    if not part:
        twin = made[-1]
        assert close(twin(X), outputs[fxpeft.active_adapters(twin)[0]])
        fxpeft.set_adapter(twin, "c")  # its lock is its own
        assert close(twin(X), outputs["c"])
        assert lock_of(twin) is not lock_of(model)
        assert lock_of(twin).timeout == lock_of(model).timeout


def test_release_and_prepare_under_load_wait_as_a_swap_does(folders: dict[str, str], outputs: Any) -> None:
    model = prepared(folders)
    wrong: list[bool] = []

    def compute() -> None:
        with torch.no_grad():
            wrong.append(not close(model(X), outputs["a"]))

    with threads(compute, compute, compute):
        for _ in range(8):
            fxpeft.release_hotswap(model)
            fxpeft.prepare_hotswap(model, 8, targets=["up", "down", "2"], modules_to_save=["3"])
    assert len(wrong) > 20
    assert sum(wrong) == 0


def test_remove_under_load(folders: dict[str, str], outputs: Any) -> None:
    model = prepared(folders)
    base, wrong = fresh(None), []

    def compute() -> None:
        with torch.no_grad():
            wrong.append(not close(model(X), outputs["a"], base))

    with threads(compute, compute):
        fxpeft.remove(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert sum(wrong) == 0


def test_a_module_whose_forward_somebody_replaced_is_locked_too(folders: dict[str, str]) -> None:
    model = net()
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 2
    given = model[0].forward
    fxpeft.prepare_hotswap(model, 8, targets=["up", "down", "2"], modules_to_save=["3"])
    seen = []
    model[0].up.register_forward_hook(lambda *args: seen.append(dict(lock_of(model).readers)))
    model[0](X)
    assert seen[0]
    fxpeft.remove(model)
    assert model[0].forward is given


# --- checkpoints ---


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_a_swap_between_a_checkpointed_forward_and_its_backward_raises(
    reentrant: bool, swap: bool, folders: dict[str, str]
) -> None:
    model = prepared(folders)
    x = X.clone().requires_grad_()
    h = checkpoint(model[0], x, use_reentrant=reentrant)
    y = checkpoint(lambda h: model[3](model[2](model[1](h))), h, use_reentrant=reentrant)
    if swap:
        fxpeft.set_adapter(model, "b")
        with pytest.raises(RuntimeError):
            y.sum().backward()
        assert is_free(model)
    else:
        y.sum().backward()
        other = X.clone().requires_grad_()
        model(other).sum().backward()
        torch.testing.assert_close(x.grad, other.grad)


def test_the_error_of_a_reentrant_checkpoint_says_what_to_do(model: nn.Sequential) -> None:
    x = X.clone().requires_grad_()
    with fxpeft.hold(model):
        y = checkpoint(model, x, use_reentrant=True)
    fxpeft.set_adapter(model, "c")
    with fxpeft.hold(model), pytest.raises(LockError, match=r"reentrant checkpoint.*swap after the backward"):
        y.sum().backward()


# --- forks ---

FORKS = """
import os, sys, threading, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from swapping import *
folders = write_adapters(Path(sys.argv[2]))
model = prepared(folders)
outputs = {name: fresh(folder) for name, folder in folders.items()}
stop = threading.Event()

def work():
    while not stop.is_set():
        with torch.no_grad():
            model(X)

def swap():
    while not stop.is_set():
        for name in NAMES:
            fxpeft.set_adapter(model, name)

def child():
    with torch.no_grad():
        good = close(model(X), *outputs.values())
        for name in NAMES:
            fxpeft.set_adapter(model, name)
            good &= close(model(X), outputs[name])
    return 0 if good and is_free(model) else 1

threads = [threading.Thread(target=f, daemon=True) for f in (work, work, swap)]
for thread in threads:
    thread.start()
with slow_swaps(0.001):
    for _ in range(8):
        time.sleep(0.003)
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = child()
            finally:
                os._exit(code)
        deadline = time.monotonic() + 20
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, 9)
                sys.exit("the child hangs")
            time.sleep(0.002)
        if status:
            sys.exit(f"the child failed: {status}")
    with fxpeft.hold(model):  # and in a thread that holds the model
        pid = os.fork()
        if pid == 0:
            with torch.no_grad():
                os._exit(0 if close(model(X), *outputs.values()) else 1)
        assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join(30)
assert is_free(model)
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_children_of_forks_have_a_free_lock_and_one_adapter(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[1])
    done = python("-c", FORKS, here, tmp_path, timeout=110)
    assert done.stdout.strip() == "fine", done.stderr
