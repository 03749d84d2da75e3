"""Learning rate by step."""

from __future__ import annotations

import math

from megaxelm.train.members import Member


def learning_rate(member: Member, step: int) -> float:
    """Rate of step 0..steps-1: linear warm-up, then the schedule's decay from `lr` to `final_lr_ratio * lr`.

    The decay reaches its end after the last step, as in the published runs (linear decay to 0 over all steps, no warm-up). `wsd` (warm-up,
    stable, decay; Hu et al. 2024, MiniCPM, section 4) stays at `lr` and falls linearly over the last `decay_share` of all steps, or over
    those after the warm-up if they are fewer.
    """
    if step < member.warmup_steps:
        return member.lr * (step + 1) / (member.warmup_steps + 1)
    after = member.steps - member.warmup_steps
    decay = min(max(1, round(member.decay_share * member.steps)), after) if member.schedule == "wsd" else after
    done = max(0.0, (step - (member.steps - decay)) / max(1, decay))
    shape = {"constant": 1.0, "linear": 1.0 - done, "wsd": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[member.schedule]
    if member.schedule == "constant":
        return member.lr
    return member.lr * (member.final_lr_ratio + (1.0 - member.final_lr_ratio) * shape)
