"""Which layer uses which dtypes: policies, the global policy, and a recommendation."""

from __future__ import annotations

from kerasmp.policy.layer_policies import LayerPolicies
from kerasmp.policy.policy import Policy
from kerasmp.policy.recommendation import Recommendation, recommend_policy
from kerasmp.policy.scope import global_policy, policy_scope, set_global_policy

__all__ = [
    "LayerPolicies",
    "Policy",
    "Recommendation",
    "global_policy",
    "policy_scope",
    "recommend_policy",
    "set_global_policy",
]
