"""A packaged model at run time: compiled code, slots that it reads, and adapters swapped by copies.

The slots are those of a prepared model in outline (:mod:`fxpeft.model.skeleton`), whose memory the compiled
code was told to read. So everything that works on a prepared model works here, at the same cost.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fxpeft import adapters, checkpoint, serving
from fxpeft.adapters.change import ordinary
from fxpeft.adapters.invocation import invoked
from fxpeft.adapters.state import state_of
from fxpeft.errors import AdapterError, CheckpointError
from fxpeft.files import replace_files
from fxpeft.methods import following
from fxpeft.methods.config import AdapterConfig
from fxpeft.model.skeleton import Outline, kind_from_json, skeleton
from fxpeft.passes.slots.slot import FEATURES
from fxpeft.passes.torch_private import load_package, pytree
from fxpeft.programs.exported import KEYWORDS
from fxpeft.programs.inputs import fit
from fxpeft.programs.packaging import MANIFEST, VERSION, WEIGHTS, pattern_of
from fxpeft.serving.reach import invocation_of
from fxpeft.serving.swap import serving_of

_FIELDS = frozenset(("fingerprint", "max_rank", "methods", "rank", "device", "sites", "modules", "inputs", "outputs"))
_PLAIN = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)


class Package:
    """What :func:`open_package` returns: call it as the model was called when it was exported.

    Calls and swaps of several threads exclude each other as on a prepared model: every call sees one
    adapter, whole, and a swap waits for the calls that are under way.
    """

    def __init__(self, path: str | Path, *, num_runners: int = 1) -> None:
        self.path = Path(path)
        self.manifest, self._runner = _load(self.path, num_runners)
        modules = self.manifest["modules"]
        device, source = self.manifest["device"], f"{self.path}: {MANIFEST}"
        weights = _weights(self.path, self.manifest) if following() & {*self.manifest["methods"]} else {}
        outlines = {
            name: Outline(
                kind_from_json(m, source), weights.get(f"{name}.weight"), weights.get(f"{name}.bias"),
                dtype=getattr(torch, m["dtype"]), device=device, biased=m["bias"],
            )
            for name, m in modules.items()
        }  # fmt: skip
        self._model = skeleton(outlines)
        serving.prepare_hotswap(
            self._model, self.manifest["max_rank"], targets=pattern_of(self.manifest["sites"]),
            methods=self.manifest["methods"], rank=self.manifest["rank"], lokr_factor=0,
        )  # fmt: skip
        self._serving = serving_of(state_of(self._model))
        self._in_spec, self._out_spec = _specs(self._runner.loader.get_call_spec())
        self._carriers: dict[int, Tensor] = {}
        self._bind()

    def _bind(self) -> None:
        """Let the compiled code read the slots where they are."""
        held = set(self._runner.get_constant_fqns())
        constants: dict[str, Tensor] = {}
        for site, slot in self._serving.slots.items():
            for name in ("a", "b", "d", *FEATURES):
                tensor = slot._buffers.get(name)
                if tensor is not None:
                    constants[f"slot.{site}.{name}"] = tensor
        missing = [name for name in constants if name not in held]
        if missing:
            raise AdapterError(f"{self.path}: damaged: the compiled code reads no {', '.join(missing[:5])}")
        self._constants = constants
        self._runner.load_constants(constants, check_full_update=False, user_managed=True)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        A tensor that lies in memory in another way than the example did (a transposed or an expanded one) is copied.

        Args:
            adapter_reach: of a package for ``alora``: which tokens are acted on, ``[rows, tokens]``, where its tokens
                don't say so (:func:`fxpeft.invoked`), as those of a call that goes on from a cache.

        Raises:
            AdapterError: arguments of another structure, or a flag, dtype, device or shape it wasn't made for.
        """
        given = kwargs.pop("adapter_reach", None) if "tokens" in self.manifest else None
        leaves, spec = pytree.tree_flatten((args, _ordered(kwargs, self._in_spec)))
        if spec != self._in_spec:
            raise AdapterError(f"{self.path}: expected arguments like {self._in_spec}, found {spec}")
        tensors = fit(self.manifest, leaves, str(self.path))
        rank = self._serving.rank
        with self._serving.lock.read():
            if "tokens" in self.manifest:
                tensors.append(self._reach(tensors, given))
            if rank is not None:
                tensors.append(self._carrier(rank.rank))
            # a copy of the list, which it empties: a tensor that it frees while it runs needs the interpreter's lock,
            # which another thread holds that waits for this run
            outputs = self._runner.loader.boxed_run([*tensors])
        if self._out_spec is not None:
            return pytree.tree_unflatten(outputs, self._out_spec)
        return dict(zip(self.manifest["outputs"], outputs, strict=True))

    def _reach(self, tensors: Sequence[Tensor], given: Tensor | None) -> Tensor:
        """Which tokens of a call the active adapters act on."""
        at = next(i for i, each in enumerate(self.manifest["inputs"]) if each["name"] == self.manifest["tokens"])
        ids, tokens = tensors[at], invocation_of(self._serving.shown)
        if not tokens:
            return torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        if given is None and self.manifest["cached"]:
            raise AdapterError(
                f"{self.path}: adapter_reach: expected which tokens of this call are acted on, {list(ids.shape)}: its "
                "tokens don't say where in the cache an invocation lies; fxpeft.invoked finds it in the whole text"
            )
        if given is None:
            return invoked(ids, tokens)
        if given.shape != ids.shape or given.dtype is not torch.bool:
            raise AdapterError(
                f"{self.path}: adapter_reach: expected bool {list(ids.shape)}, found {given.dtype} {list(given.shape)}"
            )
        return given.to(ids.device).contiguous()

    def _carrier(self, rank: int) -> Tensor:
        if rank not in self._carriers:
            self._carriers[rank] = torch.zeros(rank, dtype=torch.uint8, device=self.manifest["device"])
        return self._carriers[rank]

    def load_adapter(
        self, source: str | Path, name: str = "default", *, check_finite: bool = False, any_base: bool = False
    ) -> None:
        """Load an adapter from a folder in PEFT's format and make it the active one.

        Args:
            any_base: take it although it says that it was trained on another base.

        Raises:
            AdapterError: it doesn't fit the slots, the modules or the base; nothing was changed.
        """
        self._check_base(source, any_base)
        adapters.load_adapter(self._model, source, name, check_finite=check_finite, local_files_only=True)

    def hotswap(
        self,
        source: str | Path | Mapping[str, Tensor],
        name: str | None = None,
        *,
        config: AdapterConfig | None = None,
        check_finite: bool = False,
        any_base: bool = False,
    ) -> None:
        """Replace an adapter, the active one by default, by one from a folder or a state_dict with PEFT's keys.

        A package without any takes it as its first. Arguments and errors as in :func:`fxpeft.hotswap`.
        """
        if not isinstance(source, Mapping):
            self._check_base(source, any_base)
            if not state_of(self._model).adapters:
                self.load_adapter(source, name or "default", check_finite=check_finite, any_base=any_base)
                return
        serving.hotswap(self._model, source, name, config=config, check_finite=check_finite, local_files_only=True)

    def save_slots(self, path: str | Path) -> None:
        """Write what is in the slots now, for a host without Python (``examples/cpp/host.cpp``).

        A safetensors file with the compiled program's own constants, ``slot.<site>.a`` and so on, and
        with dynamic rank ``active_rank``, which such a host passes on as the last input.
        """
        path, rank = Path(path), self._serving.rank
        with self._serving.lock.read():
            tensors = {name: tensor.cpu().clone() for name, tensor in self._constants.items()}
            if rank is not None:
                tensors["active_rank"] = self._carrier(rank.rank).cpu()
        replace_files({path: save_tensors(tensors)})

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make these adapters the active ones; their updates add up."""
        adapters.set_adapter(self._model, names)

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply an adapter's own scale."""
        adapters.set_scale(self._model, name, scale)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter."""
        adapters.delete_adapter(self._model, name)

    def disable(self) -> None:
        """Run the bare base model until :meth:`enable`."""
        adapters.disable_adapters(self._model)

    def enable(self) -> None:
        """Let the active adapters take part again."""
        adapters.enable_adapters(self._model)

    def load_adapter_state_dict(
        self, state_dict: Mapping[str, Tensor], name: str | None = None, *, check_finite: bool = False
    ) -> None:
        """Give an adapter, the active one by default, other values; as :func:`fxpeft.load_adapter_state_dict`."""
        adapters.load_adapter_state_dict(self._model, state_dict, name, check_finite=check_finite)

    def loaded_adapters(self) -> list[str]:
        """Names of all adapters, in the order they came."""
        return adapters.loaded_adapters(self._model)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return adapters.active_adapters(self._model)

    def adapter_config(self, name: str | None = None) -> AdapterConfig:
        """A copy of an adapter's config, the active one's by default."""
        return adapters.adapter_config(self._model, name)

    def adapter_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """An adapter's tensors, the active one's by default, under PEFT's checkpoint keys."""
        return adapters.adapter_state_dict(self._model, name)

    def active(self, names: str | Sequence[str]) -> AbstractContextManager[None]:
        """Make these adapters the active ones inside a ``with`` block; as :func:`fxpeft.active`."""
        return adapters.active(self._model, names)

    def scaled(self, scales: str | Mapping[str, float], factor: float | None = None) -> AbstractContextManager[None]:
        """Run adapters at other scales inside a ``with`` block; as :func:`fxpeft.scaled`."""
        return adapters.scaled(self._model, scales, factor)

    def disabled(self) -> AbstractContextManager[None]:
        """Run the bare base model inside a ``with`` block."""
        return adapters.disabled(self._model)

    def hold(self) -> AbstractContextManager[None]:
        """Keep swaps of other threads out of a ``with`` block, so that all calls in it see one adapter."""
        return serving.hold(self._model)

    def _check_base(self, source: str | Path, any_base: bool) -> None:
        if not Path(source).is_dir():
            raise CheckpointError(f"{source}: expected a folder in PEFT's format, found none")
        if any_base or not (Path(source) / checkpoint.WEIGHTS).is_file():
            return  # reading it says what is missing
        base, own = checkpoint.base_of(source), self.manifest["fingerprint"]
        if base is not None and base != own:
            raise AdapterError(
                f"{source}: it was trained on another base: expected fingerprint {own[:12]}, found {base[:12]}; "
                "nothing was changed. If that is meant, pass any_base=True"
            )


@ordinary()
def open_package(path: str | Path, *, num_runners: int = 1) -> Package:
    """Open a ``.pt2`` that :func:`fxpeft.package` wrote: a callable with slots for adapters.

    **Opening a package runs native code from the file**, as opening any AOTInductor package does, and as unpickling
    runs Python code: whoever wrote it can do all that this process may. Never open a file of somebody you don't
    trust. Adapters that are loaded into an open package are data, and no code.

    Args:
        num_runners: how many calls can run at a time; others wait.

    Raises:
        AdapterError: no package of fxpeft's, or a damaged one.
    """
    return Package(path, num_runners=num_runners)


def _load(path: Path, num_runners: int) -> tuple[dict[str, Any], Any]:
    manifest = _manifest(path)  # first, so that no code of a file runs that doesn't even say it is a package
    try:
        content = load_package(str(path), num_runners=num_runners)
    except Exception as error:  # torch raises what its archive reader and the dynamic linker raise
        raise AdapterError(f"{path}: can't be opened as a .pt2 package: {error}") from error
    if "model" not in content.aoti_runners:
        raise AdapterError(f"{path}: expected {MANIFEST} and a compiled model in it; was it made by fxpeft.package?")
    return manifest, content.aoti_runners["model"]


def _manifest(path: Path) -> dict[str, Any]:
    """What a package says of itself."""
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((n for n in archive.namelist() if n.partition("/")[2] == f"extra/{MANIFEST}"), None)
            text = archive.read(member) if member else b""
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise AdapterError(f"{path}: can't be opened as a .pt2 package: {error}") from error
    if member is None:
        raise AdapterError(f"{path}: expected {MANIFEST} and a compiled model in it; was it made by fxpeft.package?")
    try:
        manifest = json.loads(text)
        version = manifest["version"]
        missing = _FIELDS - manifest.keys() if version == VERSION else frozenset()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path}: {MANIFEST} is damaged: {error}") from error
    if version != VERSION:
        raise AdapterError(f"{path}: expected manifest version {VERSION}, found {version}; open it with that fxpeft")
    if missing:
        raise AdapterError(f"{path}: {MANIFEST} is damaged: it lacks {', '.join(sorted(missing))}")
    return dict(manifest)


def _weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sites' own weights and biases, which a package for DoRA holds."""
    with zipfile.ZipFile(path) as archive:
        member = next((name for name in archive.namelist() if name.partition("/")[2] == WEIGHTS), None)
        try:
            tensors = load_tensors(archive.read(member)) if member else {}
        except (SafetensorError, zipfile.BadZipFile) as error:
            raise AdapterError(f"{path}: {WEIGHTS} is damaged: {error}") from error
    missing = [site for site in manifest["sites"] if f"{site}.weight" not in tensors]
    if missing:
        raise AdapterError(f"{path}: damaged: {WEIGHTS} has no weight of {', '.join(missing[:5])}")
    return {name: tensor.to(manifest["device"]) for name, tensor in tensors.items()}


def _specs(call_spec: Sequence[str]) -> tuple[Any, Any]:
    """How inputs and outputs are nested; no output's where that needs classes of the model's."""
    into = pytree.treespec_loads(call_spec[0])
    args, kwargs = pytree.tree_unflatten(list(range(into.num_leaves)), into)
    for name in KEYWORDS:
        kwargs.pop(name, None)
    out = pytree.treespec_loads(call_spec[1]) if _is_plain(json.loads(call_spec[1])[1]) else None
    return pytree.tree_structure((args, kwargs)), out


def _is_plain(spec: Mapping[str, Any]) -> bool:
    return spec["type"] in _PLAIN and all(map(_is_plain, spec["children_spec"]))


def _ordered(kwargs: dict[str, Any], spec: Any) -> dict[str, Any]:
    names = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)[1] if kwargs else {}
    return {k: kwargs[k] for k in names if k in kwargs} | kwargs
