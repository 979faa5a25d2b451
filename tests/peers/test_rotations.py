"""Methods that rotate or reflect the input, beside PEFT: every form, in slots with blocks of another size too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import add, spread
from closeness import assert_close
from method_cases import KindCase, beside_peft, drawn_as_in_peft, output
from peft.tuners.boft import layer as boft_layer
from torch import nn

import fxpeft
from fxpeft.passes.slots.rotation import block_of, widened

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = ["first", "second"]
LINEAR = KindCase(lambda: nn.Linear(12, 5), lambda: torch.randn(3, 2, 12))
BARE = KindCase(lambda: nn.Linear(12, 5, bias=False), lambda: torch.randn(3, 12))
POINT = KindCase(lambda: nn.Conv2d(12, 5, 1, stride=2, padding=1), lambda: torch.randn(2, 12, 3, 5))
SQUARE = KindCase(lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 5, 7))
WIDE = KindCase(lambda: nn.Conv2d(8, 5, 3, bias=False), lambda: torch.randn(2, 8, 5, 7))
OBLONG = KindCase(lambda: nn.Conv2d(6, 5, (2, 3)), lambda: torch.randn(2, 6, 5, 7))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LINEAR, fxpeft.OFTConfig(oft_block_size=4, block_share=True)),
        (LINEAR, fxpeft.OFTConfig(oft_block_size=5, num_cayley_neumann_terms=3)),  # 4, the nearest
        (LINEAR, fxpeft.OFTConfig(num_cayley_neumann_terms=2)),  # 12, all of them
        (LINEAR, fxpeft.OFTConfig(r=3, oft_block_size=0, coft=True, eps=0.3, num_cayley_neumann_terms=7)),
        (POINT, fxpeft.OFTConfig(oft_block_size=3, use_cayley_neumann=False)),
        (BARE, fxpeft.BOFTConfig()),
        (POINT, fxpeft.BOFTConfig(boft_block_num=2, boft_block_size=0)),
        (LINEAR, fxpeft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2)),
        (LINEAR, fxpeft.BOFTConfig(boft_block_num=6, boft_block_size=0, boft_n_butterfly_factor=2)),
        (SQUARE, fxpeft.BOFTConfig(boft_block_size=6)),  # 9 of them, of positions and inputs
        (WIDE, fxpeft.BOFTConfig(boft_block_num=12, boft_block_size=0, boft_n_butterfly_factor=2)),
        (LINEAR, fxpeft.HRAConfig(r=4, apply_GS=True)),
        (SQUARE, fxpeft.HRAConfig(r=5)),
        (SQUARE, fxpeft.HRAConfig(r=4, apply_GS=True)),
    ],
)  # fmt: skip
def test_every_form(kind: KindCase, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(config, "boft_n_butterfly_factor", 1) > 1:  # PEFT has the mathematics where it has a compiler of CUDA
        monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
        blocks = staticmethod(lambda all_of: torch.stack([torch.block_diag(*each) for each in all_of]))
        monkeypatch.setattr(boft_layer, "FastBlockDiag", type("Blocks", (), {"apply": blocks}))
    net, x, wanted, peer = beside_peft(kind, config, tmp_path)
    assert_close(output(peer.merge_and_unload(), x), wanted)
    fxpeft.fold(net, keep="delta")
    assert_close(output(net, x), wanted)
    fxpeft.unfold(net)
    assert_close(net.first.weight, kind.net().first.weight)
    fxpeft.prepare_hotswap(net, 8, methods=(type(config).peft_type.lower(),))
    assert_close(output(net, x), wanted)


def test_a_bound_is_kept_while_it_trains(tmp_path: Path) -> None:
    net, x = LINEAR.net(), LINEAR.input()
    add(net, fxpeft.OFTConfig(oft_block_size=4, coft=True, eps=0.4, target_modules=BOTH), scale=0.05)
    fxpeft.save_adapter(net, tmp_path)
    peer = peft.PeftModel.from_pretrained(LINEAR.net(), str(tmp_path), is_trainable=True)
    for each in (peer.train(), net.train()):
        optimiser = torch.optim.SGD((p for p in each.parameters() if p.requires_grad), lr=3.0)
        for _ in range(4):
            optimiser.zero_grad()
            each(x).square().mean().backward()
            optimiser.step()
    own, theirs = fxpeft.adapter_state_dict(net), peft.get_peft_model_state_dict(peer)
    for key, value in theirs.items():
        assert_close(own[key], value, size=1.0)
    assert_close(output(net.eval(), x), output(peer.eval(), x))


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_blocks_are_dropped_as_in_peft(share: float, tmp_path: Path) -> None:
    drawn_as_in_peft(LINEAR, fxpeft.BOFTConfig(boft_block_size=3, boft_dropout=share), tmp_path)


@pytest.mark.parametrize("r", [4, 3])
def test_reflections_start_as_in_peft(r: int) -> None:
    torch.manual_seed(4)
    peer = peft.get_peft_model(LINEAR.net(), peft.HRAConfig(r=r, target_modules=["first"]))
    theirs = peft.get_peft_model_state_dict(peer)["base_model.model.first.hra_u"]
    net, x = LINEAR.net(), LINEAR.input()
    torch.manual_seed(4)
    fxpeft.add_adapter(net, fxpeft.HRAConfig(r=r, target_modules=["first"]))
    own = fxpeft.adapter_state_dict(net)["base_model.model.first.hra_u"]
    assert own.shape == theirs.shape
    if r % 2 == 0:
        assert_close(output(net, x), output(LINEAR.net(), x))
        assert torch.equal(own[:, 0], own[:, 1])


def test_what_follows_from_the_base_follows_another_one() -> None:
    net, x, other = LINEAR.net(), LINEAR.input(), nn.Linear(12, 5)
    fxpeft.prepare_hotswap(net, 8, targets=BOTH, methods=("hra", "boft"))
    fxpeft.add_adapter(net, fxpeft.HRAConfig(r=3, target_modules=BOTH), "hra")
    fxpeft.add_adapter(net, fxpeft.BOFTConfig(target_modules=BOTH), "boft")
    spread(fxpeft.adapter_state_dict(net, "hra"))
    for name in ("hra", "boft"):
        spread(fxpeft.adapter_state_dict(net, name), seed=5)
        fxpeft.set_adapter(net, name)
    new = {f"first.{key}": value for key, value in other.state_dict().items()}
    net.load_state_dict(new, strict=False)
    alone = LINEAR.net()
    alone.load_state_dict(new, strict=False)
    for name in ("hra", "boft"):
        fxpeft.add_adapter(alone, fxpeft.adapter_config(net, name), name)
        for key, value in fxpeft.adapter_state_dict(alone, name).items():
            value.data.copy_(fxpeft.adapter_state_dict(net, name)[key])
        fxpeft.set_adapter(net, name)
        fxpeft.set_adapter(alone, name)
        assert_close(output(net, x), output(alone, x))


def test_blocks_of_one_size_lie_in_those_of_a_multiple() -> None:
    blocks = torch.randn(6, 2, 2)
    for size in (2, 4, 6, 12):
        wide = widened(blocks, size)
        assert wide.shape == (12 // size, size, size)
        assert torch.equal(torch.block_diag(*wide), torch.block_diag(*blocks))
    assert [block_of(12, size) for size in (1, 2, 5, 7, 8, 9, 10, 12, 40)] == [1, 2, 4, 6, 6, 6, 12, 12, 12]


def test_sizes_that_fit_swap_and_others_are_named(tmp_path: Path) -> None:
    net, x = LINEAR.net(), LINEAR.input()
    fxpeft.prepare_hotswap(net, 4, targets=BOTH, methods=("oft", "lora"), max_block=6)
    assert net.first.slot.rotation.shape == (2, 6, 6)
    for number, size in enumerate((6, 2, 3, 4, 12)):
        alone = LINEAR.net()
        add(alone, fxpeft.OFTConfig(oft_block_size=size, target_modules=BOTH), seed=number)
        fxpeft.save_adapter(alone, tmp_path / str(size))
        if size in (4, 12):
            before = output(net, x)
            with pytest.raises(
                fxpeft.AdapterError, match=rf"first: blocks of {size} inputs don't fit .* 6: .*max_block"
            ):
                fxpeft.hotswap(net, tmp_path / str(size))
            assert torch.equal(output(net, x), before)
            continue
        fxpeft.load_adapter(net, tmp_path / str(size)) if not number else fxpeft.hotswap(net, tmp_path / str(size))
        assert_close(output(net, x), output(alone, x))
    fxpeft.disable_adapters(net)
    assert torch.equal(output(net, x), output(LINEAR.net(), x))
    alone = LINEAR.net()  # what is there already says the size
    fxpeft.load_adapter(alone, tmp_path / "12")
    wanted = output(alone, x)
    fxpeft.prepare_hotswap(alone, 4, methods=("oft",))
    assert_close(output(alone, x), wanted)


def test_two_that_multiply_are_not_added() -> None:
    net = LINEAR.net()
    for name, config in {
        "oft": fxpeft.OFTConfig(target_modules=BOTH), "other": fxpeft.OFTConfig(target_modules=["first"]),
        "hra": fxpeft.HRAConfig(target_modules=BOTH), "more": fxpeft.HRAConfig(target_modules=BOTH),
        "lora": fxpeft.LoraConfig(target_modules=["second"]),
    }.items():  # fmt: skip
        fxpeft.add_adapter(net, config, name)
    for names, message in ((["oft", "other"], "only one OFT adapter"), (["hra", "more"], "only one HRA adapter")):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.set_adapter(net, names)
    square = SQUARE.net()
    for name in ("one", "two"):
        fxpeft.add_adapter(square, fxpeft.BOFTConfig(boft_block_size=6, target_modules=BOTH), name)
    with pytest.raises(fxpeft.AdapterError, match="first: only one BOFT adapter can be active, found one and two"):
        fxpeft.set_adapter(square, ["one", "two"])
    fxpeft.set_adapter(net, ["oft", "lora"])
    with pytest.raises(fxpeft.AdapterError, match=r"second: oft \(oft\) and lora"):
        fxpeft.prepare_hotswap(net, 8, methods=("oft", "lora", "hra"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxpeft.OFTConfig(r=2), "r, oft_block_size: expected one of them above 0"),
        (lambda: fxpeft.OFTConfig(oft_block_size=0), "r, oft_block_size: expected one of them above 0"),
        (lambda: fxpeft.OFTConfig(num_cayley_neumann_terms=0), "num_cayley_neumann_terms: expected a positive integer"),
        (lambda: fxpeft.BOFTConfig(boft_block_num=2), "boft_block_size, boft_block_num: expected one of them above 0"),
        (lambda: fxpeft.BOFTConfig(boft_dropout=1), "boft_dropout: expected a probability"),
        (lambda: fxpeft.HRAConfig(r=0), "r: expected a positive integer"),
        (lambda: fxpeft.OFTConfig(num_cayley_neumann_terms=10**12), "num_cayley_neumann_terms: expected at most 100"),
        (lambda: fxpeft.PsoftConfig(num_cayley_neumann_terms=101), "num_cayley_neumann_terms: expected at most 100"),
        (lambda: fxpeft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=10**12), "expected at most 32"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(fxpeft.AdapterError, match=message):
        make()


def test_sites_and_slots_that_do_not_fit_are_named() -> None:
    for kind, config, message in (
        (LINEAR, fxpeft.OFTConfig(r=12, oft_block_size=0), "first: blocks of one of its 12 inputs"),
        (SQUARE, fxpeft.OFTConfig(), "first: OFT adapts linear layers and conv2d with a kernel of 1x1"),
        (OBLONG, fxpeft.BOFTConfig(boft_block_size=3), "first: BOFT adapts .* conv2d with a square kernel"),
        (SQUARE, fxpeft.BOFTConfig(boft_block_size=4), "first: .* divides its 54 inputs.* found 4"),
        (LINEAR, fxpeft.BOFTConfig(boft_block_size=5), "first: boft_block_size.* divides its 12 inputs.* found 5"),
        (LINEAR, fxpeft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2), "first: .* found 3 blocks of 4"),
        (LINEAR, fxpeft.BOFTConfig(boft_block_size=3, boft_n_butterfly_factor=2), "first: .* even.* 4 blocks of 3"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.add_adapter(kind.net(), config.changed(target_modules=BOTH))
    for options, message in (
        ({"methods": ("lora",), "max_block": 4}, "max_block: only with 'oft' or 'boft'"),
        ({"methods": ("oft",), "max_block": 1}, "max_block: expected .* at least 2, found 1"),
    ):
        with pytest.raises(fxpeft.AdapterError, match=message):
            fxpeft.prepare_hotswap(LINEAR.net(), 8, targets=BOTH, **options)


def test_one_factor_is_read_where_peft_had_no_compiler_for_more(tmp_path: Path) -> None:
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False, target_modules=BOTH)
    peer = peft.get_peft_model(LINEAR.net(), config).eval()
    assert peer.base_model.model.first.boft_R["default"].shape[0] == 1
    peer.save_pretrained(str(tmp_path))
    net, x = LINEAR.net(), LINEAR.input()
    fxpeft.load_adapter(net, tmp_path)
    assert_close(output(net, x), output(peer, x))


def test_what_can_not_be_undone_is_named() -> None:
    net, x = LINEAR.net(), LINEAR.input()
    fxpeft.add_adapter(net, fxpeft.OFTConfig(oft_block_size=3, num_cayley_neumann_terms=3, target_modules=BOTH))
    for value in fxpeft.adapter_state_dict(net).values():
        value.data.fill_(40.0)  # the first terms of the series are no rotation then
        value.data[0] = 0.0
    wanted = output(net, x)
    with pytest.raises(fxpeft.AdapterError, match=r"first: its rotation is far from one, .* use keep='original'"):
        fxpeft.fold(net, keep="delta")
    fxpeft.fold(net)
    assert_close(output(net, x), wanted)
