"""kohya's sd-scripts, and LyCORIS: a site's name with ``_`` for its dots, after what the component is called there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from fxpeft.checkpoint.formats.part import Part, add, check_method, shaped

# LyCORIS' wrapper of any model calls none
_KEY = re.compile(r"(?:lora_(?P<component>unet|transformer|prior_unet|te[123]?)|lycoris)_(?P<key>[^.]+\..+)")
_COMPONENTS = {
    "unet": "unet", "transformer": "transformer", "prior_unet": "prior", "te": "text_encoder", "te1": "text_encoder",
    "te2": "text_encoder_2", "te3": "text_encoder_3",
}  # fmt: skip
SHORT = {component: short for short, component in _COMPONENTS.items() if short != "te"}  # as for two text encoders


class Kohya:
    """``lora_unet_down_blocks_0...to_q.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` and ``.dora_scale``;
    LyCORIS' ``.hada_w1_a``, ``.lokr_w1`` and so on."""

    name = "kohya"

    def reads(self, keys: Iterable[str]) -> bool:
        """Whether most keys begin as kohya's do; some tools leave others among them."""
        own = [_KEY.fullmatch(key) is not None for key in keys]
        return sum(own) * 2 > len(own)

    def read(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, Part]:
        """See :class:`~fxpeft.checkpoint.formats.part.CheckpointFormat`."""
        check_method(tensors, source, flat=True)
        parts: dict[str, Part] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            component, rest = (_COMPONENTS.get(match["component"], ""), match["key"]) if match else ("", key)
            add(parts.setdefault(component, Part(flat=True)), rest, tensor, source)
        return {component: shaped(part) for component, part in parts.items()}
