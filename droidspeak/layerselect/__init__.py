"""Layer selection: plans, policies, and the choice of a plan. Knows no engine and no bytes.

The names are imported when they are first used: who only reads the configuration does not wait for the
schema of policy files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from droidspeak.lazy import lazy_names

if TYPE_CHECKING:
    from droidspeak.layerselect.measures import Measures, Score
    from droidspeak.layerselect.methods import CacheBlend, Method, ReuseOne
    from droidspeak.layerselect.plan import Action, Group, Plan
    from droidspeak.layerselect.policy import Costs, FrontierPoint, MapFile, Policy, Thresholds
    from droidspeak.layerselect.policyset import PolicySet
    from droidspeak.layerselect.selector import Requirement, Situation, choose, predicted_ttft

__all__ = [
    "Action",
    "CacheBlend",
    "Costs",
    "FrontierPoint",
    "Group",
    "MapFile",
    "Measures",
    "Method",
    "Plan",
    "Policy",
    "PolicySet",
    "Requirement",
    "ReuseOne",
    "Score",
    "Situation",
    "Thresholds",
    "choose",
    "predicted_ttft",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "measures": ("Measures", "Score"),
        "methods": ("CacheBlend", "Method", "ReuseOne"),
        "plan": ("Action", "Group", "Plan"),
        "policy": ("Costs", "FrontierPoint", "MapFile", "Policy", "Thresholds"),
        "policyset": ("PolicySet",),
        "selector": ("Requirement", "Situation", "choose", "predicted_ttft"),
    },
)
