"""Learning rate by step."""

from __future__ import annotations

import math

from megaxelm.train.members import Member


def learning_rate(member: Member, step: int) -> float:
    """Rate of step 0..steps-1: linear warm-up, then constant, linear or cosine decay from `lr` to `final_lr_ratio * lr`.

    The decay reaches its end after the last step, as in the published runs (linear decay to 0 over all steps, no warm-up).
    """
    if step < member.warmup_steps:
        return member.lr * (step + 1) / (member.warmup_steps + 1)
    done = (step - member.warmup_steps) / max(1, member.steps - member.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[member.schedule]
    if member.schedule == "constant":
        return member.lr
    return member.lr * (member.final_lr_ratio + (1.0 - member.final_lr_ratio) * shape)
