"""An adapter's tensors to a plan and values for a model: what every way to load or swap one shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers.core_model_loading import WeightTransform

from fxpeft import checkpoint
from fxpeft.adapters.state import declared_modules, find_state
from fxpeft.checkpoint import Checkpoint, Misfit
from fxpeft.checkpoint.layouts import in_layout_of
from fxpeft.methods.config import AdapterConfig
from fxpeft.methods.values import Values
from fxpeft.model.modules import Modules
from fxpeft.targets.sites import AdapterPlan, make_plan


def load(
    modules: Modules,
    found: Checkpoint,
    *,
    plan: AdapterPlan | None = None,
    key_mapping: Mapping[str, str] | None = None,
    conversions: Sequence[WeightTransform] | None = None,
    check_finite: bool = False,
    misfit: Misfit | None = None,
    partial: bool = False,
    shapes_only: bool = False,
) -> tuple[AdapterPlan, Values]:
    """Give a checkpoint the names that the model has now, plan its sites, and find each tensor's place there.

    Args:
        plan: of an adapter that the tensors are for. Default: what the checkpoint's config says.
        key_mapping, conversions: as in :func:`~fxpeft.checkpoint.layouts.in_layout_of`.
        check_finite, misfit, partial, shapes_only: as in :func:`~fxpeft.checkpoint.assigning.assign`.

    Raises:
        AdapterError: as the three steps; nothing is changed by any of them.
    """
    found = in_layout_of(modules, found, key_mapping=key_mapping, conversions=conversions)
    return fit(
        modules, found, plan=plan, check_finite=check_finite, misfit=misfit, partial=partial, shapes_only=shapes_only
    )


def fit(
    modules: Modules,
    found: Checkpoint,
    *,
    plan: AdapterPlan | None = None,
    check_finite: bool = False,
    misfit: Misfit | None = None,
    partial: bool = False,
    shapes_only: bool = False,
) -> tuple[AdapterPlan, Values]:
    """:func:`load` of a checkpoint that has the model's names."""
    plan = plan or plan_for(modules, found.config)
    declared = declared_modules(modules.model)
    return plan, checkpoint.assign(
        modules, plan, found, check_finite=check_finite, misfit=misfit, declared=declared, partial=partial,
        shapes_only=shapes_only,
    )  # fmt: skip


def plan_for(modules: Modules, config: AdapterConfig) -> AdapterPlan:
    """The plan for a config; on a prepared model adapters that share one share the search for its sites."""
    state = find_state(modules.model)
    if state is None or state.serving is None:
        return make_plan(modules, config, heads=False, of_file=True)
    plans, key = state.serving.plans, repr(config)
    found = plans.recent(key)
    if found is None:
        found = plans[key] = make_plan(modules, config, heads=False, of_file=True)
    return found
