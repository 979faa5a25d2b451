"""Files whose names are another tool's, in those that ``lora_state_dict`` of a pipeline's own class gives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxpeft.checkpoint.formats import PipelineFile, read_file
from fxpeft.checkpoint.formats.diffusers import COMPONENT, alpha_key
from fxpeft.checkpoint.formats.lycoris import flat, ranks_of, scale
from fxpeft.checkpoint.formats.part import LYCORIS
from fxpeft.errors import CheckpointError, listing
from fxpeft.integrations.diffusers.together import Pipeline

_MAGNITUDE = ".dora_scale"


def renamed(pipe: Pipeline, found: PipelineFile) -> PipelineFile:
    """The file as the pipeline's class reads it.

    Raises:
        CheckpointError: it can't. What it leaves out and isn't zero is told of, or in the case of magnitudes put back.
    """
    lycoris = _lycoris_sites(found.written)
    own = {key for key in found.written if key.rpartition(".")[0] in lycoris}
    magnitudes = {key: t for key, t in found.written.items() if key.endswith(_MAGNITUDE) and key not in own}
    # some are multiplied in place
    given = {key: t.clone() for key, t in found.written.items() if key not in magnitudes and key not in own}
    answer = _mended(_converted(pipe, found, _scaled(given)), given) if given else {}
    kept = {id(tensor) for tensor in answer.values()}
    lost = [k for k, t in given.items() if k.endswith((".diff", ".diff_b")) and id(t) not in kept and t.any()]
    if lost:
        what = f"{type(pipe).__name__} of diffusers leaves these out, which are not zero"
        warnings.warn(f"{found.source}: {what}:\n{listing(lost)}", stacklevel=5)
    if magnitudes:
        answer |= _magnitudes(pipe, found, magnitudes)
    if lycoris:
        answer |= _lycoris(pipe, found, lycoris)
    return read_file(answer, {}, found.source)


def _scaled(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file with the alphas of Flux' last layer in its factors; diffusers' converter of kohya's drops them."""
    out = dict(given)
    for key in [key for key in given if key.startswith("lora_unet_final_layer_") and key.endswith(".alpha")]:
        down = key.replace(".alpha", ".lora_down.weight")
        if down in out:
            out[down] = out[down] * (float(out.pop(key)) / len(out[down]))
    return out


def _mended(answer: dict[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answer with what diffusers gets wrong of Flux' last layer, right.

    It swaps two halves of the rows of BFL's last modulation, of A too, whose rows are ranks; and it leaves out which
    model kohya's last layer is of.
    """
    for key, a in given.items():
        if "adaLN_modulation" in key and key.endswith(".lora_A.weight") and len(a) > 1:
            turned = torch.cat(a.chunk(2)[::-1])
            answer |= {name: a for name, t in answer.items() if t.shape == a.shape and torch.equal(t, turned)}
    if any(key.startswith("transformer.") for key in answer):
        return {key if COMPONENT.fullmatch(key) else f"transformer.{key}": t for key, t in answer.items()}
    return answer


def _magnitudes(pipe: Pipeline, found: PipelineFile, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's magnitudes, which diffusers drops, where it puts the rows of their sites' B.

    They go through as the B of adapters of rank 1: what renames or parts a B's outputs does the same to them.
    """
    given: dict[str, Tensor] = {}
    for key, tensor in written.items():
        site = key.removesuffix(_MAGNITUDE)
        down = found.written.get(f"{site}.lora_down.weight")
        if down is None:
            raise CheckpointError(f"{found.source}: {key}: expected {site}.lora_down.weight too")
        ones = [1] * (down.dim() - 2)
        given[f"{site}.lora_down.weight"] = down[:1] * 0
        given[f"{site}.lora_up.weight"] = tensor.reshape(-1, 1, *ones)
    parts = read_file(_converted(pipe, found, given), {}, found.source).parts
    return {
        f"{component}.{key.removesuffix('.lora_B.weight')}.dora_scale": tensor
        for component, part in parts.items()
        for key, tensor in part.tensors.items()
        if key.endswith(".lora_B.weight")
    }


def _lycoris_sites(written: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Site -> what follows its name in a key -> tensor, of LyCORIS' LoHas and LoKrs."""
    sites: dict[str, dict[str, Tensor]] = {
        key.rpartition(".")[0]: {} for key in written if key.rpartition(".")[2].startswith(LYCORIS)
    }
    for key, tensor in written.items():
        site, _, name = key.rpartition(".")
        if site in sites:
            sites[site][name] = tensor
    return sites


def _lycoris(pipe: Pipeline, found: PipelineFile, sites: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """LyCORIS' LoHas and LoKrs, which most of diffusers' classes don't read, where they put a LoRA of the same site.

    Stand-ins go through, an A that says which site it is, and a B that says which rows. What keeps its rows keeps its
    method; of a part of them, as of one of the three that lie in a ``qkv``, a LoKr is none, and becomes a LoRA.
    """
    given: dict[str, Tensor] = {}
    every = list(sites.items())
    for number, (site, own) in enumerate(every):
        size = flat(own)
        names = ("lora_A", "lora_B") if "." in site else ("lora_down", "lora_up")
        given[f"{site}.{names[0]}.weight"] = torch.full((1, size.in_features), number + 1.0)
        given[f"{site}.{names[1]}.weight"] = torch.arange(float(size.out_features)).unsqueeze(1)
    answer: dict[str, Tensor] = {}
    for component, part in read_file(_converted(pipe, found, given), {}, found.source).parts.items():
        for name, factors in part.factors().items():
            _, own = every[round(float(factors["lora_A.weight"].flatten()[0])) - 1]
            rows = factors["lora_B.weight"].flatten().round().long()
            before = f"{component}.{name}" if component else name
            answer |= {f"{before}.{key}": tensor for key, tensor in _with_rows(own, rows).items()}
    return answer


def _with_rows(own: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """These rows of a site's update, in its own method where it can be."""
    factors = {name: tensor for name, tensor in own.items() if name.startswith(LYCORIS)}
    out = flat(factors).out_features
    rest = {
        name: t.flatten()[rows] if name == "dora_scale" and t.numel() == out else t
        for name, t in own.items()
        if name not in factors
    }
    if torch.equal(rows, torch.arange(out)):
        return {**factors, **rest}
    if "hada_w1_a" in factors:
        side = 1 if "hada_t1" in factors else 0
        return rest | {n: t.index_select(side, rows) if n.endswith("_a") else t for n, t in factors.items()}
    a, b = ranks_of(factors, None)
    alpha = rest.pop("alpha", None)
    rest["alpha"] = torch.tensor(scale(None if alpha is None else float(alpha), factors) * len(a))
    return {**rest, "lora_A.weight": a, "lora_B.weight": b.t()[rows]}


def _converted(pipe: Pipeline, found: PipelineFile, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    reader: Any = type(pipe)
    given = {"unet_config": pipe.components["unet"].config} if "unet" in pipe.components else {}
    try:
        answer = reader.lora_state_dict(dict(written), return_alphas=True, **given)
    except Exception as error:  # whatever its converters raise for keys that they don't know
        raise CheckpointError(f"{found.source}: {reader.__name__} can't read its keys: {error}") from error
    tensors, alphas = answer if isinstance(answer, tuple) else (answer, None)
    return {**tensors, **alphas_told(alphas or {})}


def alphas_told(alphas: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' ``network_alphas`` as keys of a file."""
    return {alpha_key(key): torch.tensor(float(alpha)) for key, alpha in alphas.items()}
