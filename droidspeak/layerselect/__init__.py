"""Layer selection: plans, policies, and the choice of a plan. Knows no engine and no bytes."""

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
