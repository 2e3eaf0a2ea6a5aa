"""Our launcher with a policy that decides for a while and then fails in every pass.

Worker processes import the main module, so the policy breaks in the scheduler too.
"""

from pascal_sglang.policy.plan import Planner

SOUND_PASSES = 120

sound = Planner.plan


def breaking(planner, running, room, pass_info, joining=0):
    if pass_info.pass_no > SOUND_PASSES:
        raise ZeroDivisionError("broken on purpose")
    return sound(planner, running, room, pass_info, joining)


Planner.plan = breaking

if __name__ == "__main__":
    import sys

    from pascal_sglang.launch_server import main

    sys.exit(main(sys.argv[1:]))
