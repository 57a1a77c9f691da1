"""CDL-Prompt (arXiv 2407.13911v1): the teacher's prompts, mapped to the student's width, join the student's own."""

from __future__ import annotations

from typing import ClassVar

from ..learners import Learner
from ..student import PromptedViT
from .kd import KD


class CDLPrompt(KD):
    """KD's loss. What is mapped, and how, is the student's own matter: see learners/mapped.py.

    The teacher's pool is copied when it has learnt a task, before the student begins with it.

    Unproven: the paper gives 5 to 7 points (ViT-B -> ViT-T, version 1 alone; later versions and the authors' code are
    without it). Here it has given what `kd` gives, on small images and small backbones; nobody has run the published
    setting with it.
    """

    maps_prompts: ClassVar[bool] = True
    refusal: ClassVar[str] = (
        "it lets the teacher's prompt rows attend to each other; apt has a single row that is added to the class "
        "token's, finetune has none"
    )

    @classmethod
    def works_with(cls, learner: type[Learner]) -> bool:
        """True for learners that select from a pool of prompts."""
        return learner.selection["kind"] != "none"

    def begin_task(self, task: int, student: PromptedViT, teacher: PromptedViT | None) -> None:
        """Copy the teacher's prompts, as it answers during this task."""
        assert student.mapped is not None and teacher is not None
        student.mapped.copy(teacher.learner)
