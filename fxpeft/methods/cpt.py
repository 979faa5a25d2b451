"""Context-aware prompt tuning (https://arxiv.org/abs/2410.17222): a prompt of examples, moved a little by training.

The prompt is the embeddings of given tokens and a difference, whose rows are kept below a length; labels among the
tokens don't move. The loss counts the labels among the prompt's tokens too, and may count those of earlier examples
less.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from fxpeft.errors import AdapterError
from fxpeft.methods.base import Base, SiteAdapter, SitePlan
from fxpeft.methods.prompt_inputs import IGNORED, embed_prompt
from fxpeft.methods.prompts import PromptAdapter, PromptLearningConfig, PromptMethod, PromptPlan
from fxpeft.passes.rewrite.feed import Feed

FORMAT, LABEL = (1, 3), 0  # types of tokens, modulo 4: templates of inputs and outputs; inputs are 2
LEAST, WIDTH = 1e-10, 2048  # the length below which labels are kept, and the width for which the others are given


@dataclass
class CPTConfig(PromptLearningConfig):
    """Names and defaults of ``peft.CPTConfig``; for causal language models.

    Args:
        cpt_token_ids: the prompt's tokens, whose number is that of the virtual tokens; ``None``: one, 0.
        cpt_mask: PEFT's; nothing reads it.
        cpt_tokens_type_mask: of each token 0 for none, and of the n-th example ``4n + 1``, ``4n + 2``, ``4n + 3`` and
            ``4n + 4`` for its input's template, its input, its output's template and its label; ``None``: all 1.
        opt_weighted_loss_type: ``"decay"``: labels of an example count ``opt_loss_decay_factor`` times those of the
            next one.
        opt_projection_epsilon, opt_projection_format_epsilon: the longest that a difference may be at a width of 2048,
            of an input and of a template.
        tokenizer_name_or_path: PEFT's; nothing reads it.

    A forward takes ``input_type_mask [batch, tokens]``, the types of its own tokens, counted on from those of the
    prompt; without it all are labels.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    peft_type: ClassVar[str] = "CPT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type not in (None, "CAUSAL_LM"):
            raise AdapterError(f"task_type: CPT is for CAUSAL_LM alone, as in PEFT, found {self.task_type}")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids)
        if not count or self.num_virtual_tokens not in (None, count):
            raise AdapterError(
                f"cpt_token_ids: expected {self.num_virtual_tokens or 'some'} tokens, as num_virtual_tokens says, "
                f"found {count}; leave num_virtual_tokens out"
            )
        self.num_virtual_tokens = count
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * count)
            if len(getattr(self, name)) != count:
                raise AdapterError(
                    f"{name}: expected {count} numbers, as cpt_token_ids has, found {len(getattr(self, name))}"
                )
        for name in ("cpt_token_ids", "cpt_tokens_type_mask"):
            if wrong := [value for value in getattr(self, name) if value < 0]:
                raise AdapterError(f"{name}: expected numbers from 0 on, found {wrong[0]}")
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            if getattr(self, name) < 0:
                raise AdapterError(f"{name}: expected a length, 0 or more, found {getattr(self, name)}")


class Examples(NamedTuple):
    """What a prompt's tokens are in the text that a loss counts.

    Args:
        tokens, types: of each virtual token. decay: what an example's labels count of the next one's.
    """

    tokens: tuple[int, ...]
    types: tuple[int, ...]
    decay: float


class CptAdapter(PromptAdapter):
    """A prompt in training: the tokens' ``embedding``, and the ``delta`` that is trained.

    Args:
        longest: of each row's difference. moves: whether a row's is trained.

    A forward that is trained cuts the difference itself, as PEFT's does, so that an optimiser goes on from there.
    """

    delta: Tensor
    longest: Tensor
    moves: Tensor

    def __init__(
        self, plan: SitePlan, parameters: Mapping[str, Tensor], longest: Sequence[float], moves: Sequence[bool]
    ) -> None:
        super().__init__(plan, parameters, frozen=("embedding",))
        device = parameters["delta"].device
        self.register_buffer("longest", torch.tensor(longest, device=device).unsqueeze(1), persistent=False)
        self.register_buffer("moves", torch.tensor(moves, device=device).unsqueeze(1), persistent=False)

    def forward(self) -> Tensor:
        """The prompt, ``[rows, width]``."""
        delta, trained = self.delta, torch.is_grad_enabled() and self.delta.requires_grad
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            longest = self.longest.to(lengths.dtype)
            cut = delta * torch.where(lengths > longest, longest / lengths, 1.0)
            if trained:
                delta.copy_(cut)
        if not trained:
            return self.embedding + cut
        return self.embedding + torch.where(self.moves, delta, delta.detach())


class Cpt(PromptMethod[CPTConfig]):
    """The difference is trained with its loss; saved, loaded and served as the rows that come out."""

    name = "cpt"
    peft_type = "CPT"
    config_class = CPTConfig

    def of_length(self, num_virtual_tokens: int) -> CPTConfig:
        return CPTConfig(cpt_token_ids=[0] * num_virtual_tokens)

    def resolved(self, model: PreTrainedModel, config: CPTConfig) -> CPTConfig:
        resolved = super().resolved(model, config)
        if resolved.task_type != "CAUSAL_LM":
            raise AdapterError(
                f"task_type: CPT is for CAUSAL_LM alone, as in PEFT, and {type(model).__name__} is for "
                f"{resolved.task_type}; use prompt tuning"
            )
        return resolved

    def fresh(
        self, config: CPTConfig, plan: SitePlan, base: Base, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        assert isinstance(plan, PromptPlan)
        if config.inference_mode:
            embedding = torch.empty(plan.rows, plan.width, dtype=torch.float32).normal_()
        else:
            embeddings: Any = base.module.get_input_embeddings()  # type: ignore[operator]
            most, tokens = embeddings.weight.shape[0], config.cpt_token_ids or []
            if max(tokens) >= most:
                raise AdapterError(
                    f"cpt_token_ids: expected tokens below {most}, the model's vocabulary, found {max(tokens)}; are "
                    "they another model's?"
                )
            with torch.no_grad():
                embedding = embeddings(torch.tensor(tokens, device=embeddings.weight.device)).detach()
        return self.taken(config, plan, {"embedding": embedding.to(device, torch.float32, copy=True)})

    def part(
        self, config: CPTConfig, plan: SitePlan, parameters: Mapping[str, Tensor], *, strength: float = 1.0
    ) -> CptAdapter:
        assert isinstance(plan, PromptPlan)
        share = math.sqrt(plan.width / WIDTH)
        of = dict.fromkeys(FORMAT, config.opt_projection_format_epsilon * share)
        of[2] = config.opt_projection_epsilon * share
        types = config.cpt_tokens_type_mask or []
        return CptAdapter(plan, parameters, [of.get(t % 4, LEAST) for t in types], [t % 4 != LABEL for t in types])

    def shapes(self, config: CPTConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        shape = super().shapes(config, plan)["embedding"]
        return {"embedding": shape, "delta": shape}

    def untrained(self, config: CPTConfig) -> Collection[str]:
        return ("embedding",)

    def stored_shapes(self, config: CPTConfig, plan: SitePlan) -> dict[str, tuple[int, ...]]:
        return super().shapes(config, plan)

    def taken(self, config: CPTConfig, plan: SitePlan, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's finished prompt is what a difference starts from anew, as in PEFT."""
        return {**stored, "delta": torch.zeros_like(stored["embedding"])} if stored else {}

    def rewrite(self, name: str, config: CPTConfig, site: SiteAdapter) -> Feed:
        feed = super().rewrite(name, config, site)
        decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        own = (tuple(config.cpt_token_ids or ()), tuple(config.cpt_tokens_type_mask or ()), float(decay))
        return replace(
            feed, function=embed_examples, takes=("input_type_mask",), finish=weigh_labels,
            constants={**feed.constants, "examples": own},
        )  # fmt: skip


def embed_examples(
    inputs: dict[str, Any], *, prompt: Tensor, embed: nn.Module, examples: tuple[Any, ...], **options: Any
) -> dict[str, Any]:
    """Put the virtual tokens before the embeddings, and before the labels those that are among them.

    Args:
        inputs, prompt, embed: as in :func:`embed_prompt`, and ``input_type_mask``.
        examples: see :class:`Examples`.
    """
    given = {name: value for name, value in inputs.items() if name != "input_type_mask"}
    out, labels = embed_prompt(given, prompt=prompt, embed=embed, **options), inputs.get("labels")
    if labels is not None and out["labels"].shape[1] > labels.shape[1]:
        out["labels"], _ = _labelled(labels, inputs.get("input_type_mask"), Examples(*examples))
    return out


def weigh_labels(output: Any, inputs: dict[str, Any], *, examples: tuple[Any, ...], **options: Any) -> Any:
    """The model's output with the loss of CPT: the mean of each label's cross-entropy, times what it counts.

    Args:
        output: with logits ``[batch, virtual + tokens, vocabulary]``, or, where a filled cache is continued, of the
            tokens alone, whose loss is the model's own.
        inputs: the forward's arguments as they came.
    """
    labels = inputs.get("labels")
    logits: Tensor = output[1] if isinstance(output, tuple) else output.logits
    own = Examples(*examples)
    if labels is None or logits.shape[1] != labels.shape[1] + len(own.tokens):
        return output
    counted, types = (t[:, 1:] for t in _labelled(labels, inputs.get("input_type_mask"), own))
    counted = counted.to(logits.device)
    each = cross_entropy(
        logits[:, :-1].float().flatten(0, 1), counted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    there = counted != IGNORED
    weighted = each.view(there.shape) * _counting(types.to(logits.device), own.decay)
    loss = (weighted * there).sum() / there.sum()
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _labelled(labels: Tensor, given: Tensor | None, examples: Examples) -> tuple[Tensor, Tensor]:
    """Labels and types of virtual tokens and tokens, ``[batch, virtual + tokens]``; all but labels are ignored.

    Args:
        given: the tokens' own types; ``None``: all are labels of one example.

    Raises:
        AdapterError: none could be a label, or there are other types than labels.
    """
    most = max(examples.types)
    if given is None and most % 4 and not any(t and t % 4 == LABEL for t in examples.types):
        raise AdapterError(
            f"input_type_mask: expected the types of the input's tokens, found None: cpt_tokens_type_mask ends with "
            f"{most}, from which types are counted on, so that without it no token is a label and the loss is no number"
        )
    if given is None:
        given = torch.full_like(labels, 4)
    if given.shape != labels.shape:
        raise AdapterError(f"input_type_mask: expected {list(labels.shape)}, as labels, found {list(given.shape)}")
    types = given.to(labels.device, torch.long)
    types = torch.where(types > 0, types + most, types)
    batch = labels.shape[0]
    first, kinds = (torch.tensor(own, device=labels.device).expand(batch, -1) for own in examples[:2])
    types = torch.cat((kinds, types), dim=1)
    whole = torch.cat((first.to(labels.dtype), labels), dim=1)
    return torch.where((types > 0) & (types % 4 == LABEL), whole, IGNORED), types


def _counting(types: Tensor, decay: float) -> Tensor | float:
    """What each label counts: ``decay`` to the power of how many later examples of its row have labels."""
    if decay == 1:
        return 1.0
    labels = torch.where((types > 0) & (types % 4 == LABEL), types, 0)
    ordered, places = labels.sort(dim=1)
    later = (ordered[:, 1:] != ordered[:, :-1]).long().flip(1).cumsum(1).flip(1)
    weights = float(decay) ** pad(later, (0, 1)).float()
    return torch.zeros_like(weights).scatter(1, places, weights)
