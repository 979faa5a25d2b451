"""Prompt learning: the whole model's forward is the site, and an adapter is rows of virtual tokens.

What prompt tuning, p-tuning, prefix tuning and their kin share: the config's fields and the defaults that come
from the model, the plan, the parameters with or without an encoder, and PEFT's checkpoint.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, Method, SiteAdapter, SitePlan, SlotValues
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.prompt_inputs import FedModel, PromptGeneration, cache_argument, cache_prompt, embed_prompt
from fxpeft.model.wrappers import named_modules, submodule
from fxpeft.passes.live import base_class
from fxpeft.passes.rewrite.feed import Feed
from fxpeft.passes.targets.kinds import Kind

WHOLE_MODEL = Kind(0, 0)  # no target: a forward as a whole has no linear algebra of its own
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")  # PEFT's names, in PEFT's order
HIDDEN = ("hidden_size", "n_embd", "d_model")
KEY = "prompt_embeddings"  # PEFT's, whatever the site
ENCODER = "encoder."  # names of an encoder's parameters begin with it
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
           "ForQuestionAnswering": "QUESTION_ANS"}  # fmt: skip


@dataclass
class PromptLearningConfig(AdapterConfig):
    """Fields of all prompt methods, with PEFT 0.21's names. What is ``None`` comes from the model's config.

    Args:
        num_virtual_tokens: length of the prompt; has to be given before a model gets the adapter.
        token_dim: width of a virtual token: the hidden size, and for prefix tuning that of all
            key-value heads together.
        num_transformer_submodules: 2 for ``SEQ_2_SEQ_LM``, else 1.
        num_attention_heads, num_layers: of the model; prefix tuning: key-value heads.
        task_type: says what becomes of labels; ``None`` is read off the model's class.

    A prompt has no target modules: what selects them is no argument here, as in PEFT.
    """

    target_modules: None = field(init=False, default=None)
    exclude_modules: None = field(init=False, default=None)
    layers_to_transform: None = field(init=False, default=None)
    layers_pattern: None = field(init=False, default=None)
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AdapterError(f"{name}: expected a positive integer or None, found {value}")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise AdapterError(f"num_transformer_submodules: expected 1, 2 or None, found "
                               f"{self.num_transformer_submodules}")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The config as PEFT writes it: no prompt has target modules."""
        return {key: value for key, value in super().to_dict().items() if key not in TARGETS}


P = TypeVar("P", bound=PromptLearningConfig)


@dataclass(frozen=True)
class PromptPlan(SitePlan):
    """What a prompt puts before a model's forward; ``rank`` is the number of virtual tokens.

    Args:
        rows, width: shape of the prompt in the checkpoint.
        prefix: keys and values for each layer, not embeddings.
        embed: the input embeddings' name, seen from the site.
        generates: the site has ``generate``.
        layer: one of its layers that can be checkpointed, or ``""``.
        cache: the argument in which the site's forward takes a cache, or ``""``.
        shapes: each layer's heads and their width, where those are not all ``heads`` and an equal share of the width;
            ``None`` for a layer that reads an earlier one's keys and values.
    """

    rows: int
    width: int
    prefix: bool
    task: str
    embed: str
    layers: int
    heads: int
    generates: bool
    layer: str
    cache: str
    shapes: tuple[tuple[int, int] | None, ...] = ()

    def feed(self, name: str, path: str, value: Any, container: str = "adapters") -> Feed:
        """How the site's forward gets the prompt that lies at ``container.path``.

        Args:
            value: a tensor ``[rows, width]``, or a module that gives it.
        """
        constants: dict[str, Any] = {"virtual": self.rank, "task": self.task, "cache": self.cache}
        reads = {"embed": self.embed}
        if self.prefix:
            constants |= {"layers": self.layers, "heads": self.heads}
            constants |= {"shapes": self.shapes} if self.shapes else {}
            reads |= {"layer": self.layer} if self.layer else {}
        elif container == "slot":
            constants["served"] = True
        return Feed(
            name, cache_prompt if self.prefix else embed_prompt, {path: ("prompt", value)}, reads, constants,
            container, PromptGeneration if self.generates else FedModel,
        )  # fmt: skip


class PromptAdapter(SiteAdapter):
    """A prompt in training: the virtual tokens' ``embedding``, and an ``encoder`` where the method has one.

    Args:
        frozen: those of ``parameters`` that are not trained.
    """

    embedding: Tensor

    def __init__(
        self,
        plan: SitePlan,
        parameters: Mapping[str, Tensor],
        encoder: nn.Module | None = None,
        *,
        frozen: Collection[str] = (),
    ) -> None:
        own = {name: value for name, value in parameters.items() if not name.startswith(ENCODER)}
        super().__init__(plan, own, frozen=frozen)
        self.encoder = encoder

    def extra_repr(self) -> str:
        """Length and shape, and whether it is off."""
        shown = f"virtual_tokens={self.plan.rank}, embedding={tuple(self.embedding.shape)}"
        return shown if self.running else f"{shown}, off"

    def forward(self) -> Any:
        """The prompt, ``[rows, width]``, or what a method's own feed takes in its place."""
        prompt: Tensor = self.embedding if self.encoder is None else self.encoder(self.embedding)
        return prompt


class PromptMethod(Method[P]):
    """Parameters ``embedding``, and ``encoder.*`` while a fresh adapter is trained with an encoder.

    A checkpoint holds the finished prompt only, as PEFT's does. Loaded to be trained further, it is
    that prompt which is trained: its encoder is gone.
    """

    prefix: ClassVar[str] = "base_model."
    targeted: ClassVar[bool] = False
    feeds: ClassVar[bool] = True
    unlowered: ClassVar[str] = "a prompt adds tokens"
    alone: ClassVar[str] = "prompt"
    in_cache: ClassVar[bool] = False

    def encoder(self, config: P, plan: PromptPlan) -> nn.Module | None:
        """A fresh encoder, ``[rows, embedding width] -> [rows, width]``, or ``None``."""
        return None

    def embedding_width(self, config: P, plan: PromptPlan) -> int:
        """Width of the embedding that a fresh encoder reads."""
        return plan.width

    def cost(self, config: P, plan: SitePlan, dtype: torch.dtype) -> tuple[int, int]:
        """With the encoder's, until the prompt is finished; in float32 as :meth:`fresh` makes them."""
        assert isinstance(plan, PromptPlan)
        if config.inference_mode:
            return super().cost(config, plan, torch.float32)
        with torch.device("meta"):
            encoder = self.encoder(config, plan)
        if encoder is None:
            return super().cost(config, plan, torch.float32)
        count = plan.rows * self.embedding_width(config, plan) + sum(p.numel() for p in encoder.parameters())
        return count, count * torch.float32.itemsize

    def fresh(
        self, config: P, plan: SitePlan, base: Base, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """First values, in float32 whatever the base's dtype; under one seed they are PEFT's."""
        assert isinstance(plan, PromptPlan)
        encoded = not config.inference_mode
        width = self.embedding_width(config, plan) if encoded else plan.width
        embedding = torch.empty(plan.rows, width, dtype=torch.float32).normal_()
        parameters = {"embedding": embedding}
        encoder = self.encoder(config, plan) if encoded else None
        if encoder is not None:
            parameters |= {f"{ENCODER}{name}": value.detach().float() for name, value in encoder.named_parameters()}
        self.initialise(config, plan, parameters, base)
        return {name: value.to(device) for name, value in parameters.items()}

    def part(
        self, config: P, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> PromptAdapter:
        return PromptAdapter(plan, parameters, self._encoder_of(config, plan, parameters))

    def _encoder_of(self, config: P, plan: SitePlan, parameters: Mapping[str, Tensor]) -> nn.Module | None:
        own = {
            name.removeprefix(ENCODER): nn.Parameter(v) for name, v in parameters.items() if name.startswith(ENCODER)
        }
        if not own:
            return None
        assert isinstance(plan, PromptPlan)
        with torch.device("meta"):
            encoder = self.encoder(config, plan)
        assert encoder is not None
        encoder.load_state_dict(own, assign=True)
        return encoder

    @torch.no_grad()
    def prompt(self, config: P, plan: SitePlan, parameters: Mapping[str, Tensor]) -> Tensor:
        """The finished prompt, ``[rows, width]``, an encoder's dropout off."""
        found: Tensor = self.part(config, plan, parameters).eval()()
        return found.detach()

    def unservable(self, config: P) -> str:
        """Why an adapter has no finished prompt, or nothing."""
        return ""

    def of_length(self, num_virtual_tokens: int) -> P:
        """A config for prompts of a length, whatever else they are: what slots are declared for."""
        return self.config_class(num_virtual_tokens=num_virtual_tokens)

    def stored(self, config: P, site: str, plan: SitePlan, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"embedding": self.prompt(config, plan, parameters)}

    def stored_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if f"{Method.prefix}{KEY}" not in tensors:  # as save_pretrained wrote prompts once
            return tensors
        return {key.removeprefix(Method.prefix): tensor for key, tensor in tensors.items()}

    def unfinished(self, sites: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        (parameters,) = sites.values()
        return dict(parameters) if len(parameters) > 1 else {}

    def resume(
        self,
        config: P,
        plans: Mapping[str, SitePlan],
        unfinished: Mapping[str, Tensor],
        finished: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, dict[str, Tensor]] | None:
        ((site, own),) = finished.items()
        given, prompt = self.prompt(config, plans[site], unfinished), own["embedding"]
        same = given.shape == prompt.shape and torch.allclose(given, prompt.cpu().to(given.dtype), atol=1e-3)
        return {site: dict(unfinished)} if same else None

    def key(self, site: str, plan: SitePlan, name: str) -> str:
        return KEY

    def bare_keys(self) -> Collection[str]:
        return (KEY,)

    def keys(self, kind: Kind) -> dict[str, str]:
        return {"embedding": KEY}

    def shapes(self, config: P, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        assert isinstance(plan, PromptPlan)
        return {"embedding": (plan.rows, plan.width)}

    def initialise(self, config: P, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> None:
        """PEFT leaves what ``nn.Embedding`` and the encoder's layers begin with."""

    def rewrite(self, name: str, config: P, site: SiteAdapter) -> Feed:
        assert isinstance(site.plan, PromptPlan)
        return site.plan.feed(f"{self.name}:{name}", name, site)

    def scales(self, config: P) -> bool:
        return False

    def plan(self, config: P, site: str, kind: Kind) -> SitePlan:
        raise AdapterError(f"{site}: a prompt has no target modules")

    def lower(self, plan: SitePlan, parameters: Mapping[str, Tensor], base: Base) -> SlotValues:
        raise AdapterError("a prompt has no slot at a target; see fxpeft.serving.prompts")

    def find(self, model: nn.Module, config: P) -> tuple[P, dict[str, SitePlan]]:
        """The config with the model's numbers filled in, and the one site.

        Raises:
            AdapterError: the model takes no prompt of this kind, or the config's numbers are another model's.
        """
        if not isinstance(model, PreTrainedModel):
            raise AdapterError(f"{type(config).__name__}: expected a transformers model, found {type(model).__name__}")
        if config.num_virtual_tokens is None:
            raise AdapterError("num_virtual_tokens: expected the length of the prompt, found None; set it")
        site = self.site(model)
        config = self.resolved(model, config)
        assert config.num_virtual_tokens is not None
        assert config.token_dim is not None
        assert config.num_layers is not None
        assert config.num_attention_heads is not None
        assert config.task_type is not None
        host = submodule(model, site)
        rows = config.num_virtual_tokens * (1 if self.in_cache else config.num_transformer_submodules or 1)
        width = config.token_dim * (2 * config.num_layers if self.in_cache else 1)
        plan = PromptPlan(
            WHOLE_MODEL, config.num_virtual_tokens, 1.0, rows, width, self.in_cache, config.task_type,
            _embeddings_name(host), config.num_layers, config.num_attention_heads,
            site == "" and bool(base_class(model).can_generate()),  # type: ignore[attr-defined]
            next((n for n, m in named_modules(host) if isinstance(m, GradientCheckpointingLayer)), ""),
            cache_argument(forward_arguments(host)), self.layer_shapes(model, config),
        )  # fmt: skip
        return config, {site: plan}

    def site(self, model: PreTrainedModel) -> str:
        """The module whose forward takes the prompt."""
        if "inputs_embeds" not in forward_arguments(model):
            raise AdapterError(f"{base_class(model).__name__}.forward takes no inputs_embeds, so no virtual tokens")
        return ""

    def resolved(self, model: PreTrainedModel, config: P) -> P:
        """PEFT's ``_prepare_prompt_learning_config``; what the config says and the model can't take is an error."""
        config, own = copy.deepcopy(config), model.config.get_text_config()
        config.task_type = config.task_type or infer_task(model)
        if (config.task_type == "SEQ_2_SEQ_LM") != bool(model.config.is_encoder_decoder):
            raise AdapterError(
                f"task_type: {config.task_type} doesn't fit {base_class(model).__name__}: SEQ_2_SEQ_LM is for "
                "encoder-decoder models, and the only task of theirs that takes a prompt"
            )
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
        elif config.num_transformer_submodules == 2 and config.task_type != "SEQ_2_SEQ_LM":
            raise AdapterError("num_transformer_submodules: expected 1 for a model without an encoder, found 2")
        for name, names in (("num_layers", LAYERS), ("num_attention_heads", HEADS), ("token_dim", HIDDEN)):
            if getattr(config, name) is None:
                setattr(config, name, first_number(own, names))
        self.check(model, config)
        return config

    def layer_shapes(self, model: PreTrainedModel, config: P) -> tuple[tuple[int, int] | None, ...]:
        """See :class:`PromptPlan`."""
        return ()

    def check(self, model: PreTrainedModel, config: P) -> None:
        """Refuse a width that isn't the model's."""
        weight: Any = model.get_input_embeddings().weight
        if weight.shape[1] != config.token_dim:
            raise AdapterError(
                f"token_dim: expected {weight.shape[1]}, the width of {base_class(model).__name__}'s embeddings, found "
                f"{config.token_dim}; is it a prompt of another base model?"
            )


def first_number(config: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that a model's config has as a number."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise AdapterError(f"{type(config).__name__} has none of {', '.join(names)}; set it in the adapter's config")


def infer_task(model: PreTrainedModel) -> str:
    """PEFT's task type for a model's class."""
    name = base_class(model).__name__
    known = next((task for suffix, task in CLASSES.items() if name.endswith(suffix)), None)
    if known:
        return known
    if not model.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def forward_arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a module's own forward."""
    return inspect.signature(base_class(module).forward).parameters


def _embeddings_name(host: nn.Module) -> str:
    names: dict[object, str] = {module: name for name, module in named_modules(host)}
    return names[host.get_input_embeddings()]  # type: ignore[operator]
