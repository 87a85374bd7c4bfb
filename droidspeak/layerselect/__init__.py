"""Layer selection: plans, policies, and the choice of a plan. Knows no engine and no bytes."""

from droidspeak.layerselect.plan import Action, Group, Plan
from droidspeak.layerselect.policy import FrontierPoint, Policy, PolicySet, Requirement, choose

__all__ = ["Action", "FrontierPoint", "Group", "Plan", "Policy", "PolicySet", "Requirement", "choose"]
