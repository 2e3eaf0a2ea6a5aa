"""A policy of one's own: a multi-level feedback queue, as operating systems have it.

A request falls one level whenever its tokens have doubled, whatever its phase. Requests of an upper
level displace those of a lower one, and of equals none displaces another.

    python -m pascal_sglang.sim run arena-hard --arms pascal,examples.feedback_queue:POLICY
    python -m pascal_sglang.launch_server --pascal-policy examples.feedback_queue:POLICY ...
"""

from pascal_sglang.policy.placement import PlacementRule
from pascal_sglang.policy.ranking import PassInfo, Rank, Tuning
from pascal_sglang.policy.registry import Policy
from pascal_sglang.policy.request import RequestState


def level(request: RequestState, tuning: Tuning) -> int:
    """0 in the first quantum, 1 in the second, 2 up to the fourth, 3 up to the eighth, ..."""
    return (request.total_tokens // tuning.quantum).bit_length()


def rank(request: RequestState, pass_info: PassInfo, tuning: Tuning) -> Rank:
    return (0, level(request, tuning))


# Within a level, requests go in the order of their arrival. With several instances, new ones go
# where their answer is expected to begin first.
POLICY = Policy(rank=rank, key=level, placement=PlacementRule())
