"""The accuracy matrix and what is read off it."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text

DEFINITIONS = {
    "matrix": "row i, column j: accuracy in % on the validation images of task j after learning task i, "
    "prediction over all classes seen so far, no task id",
    "average_accuracy": "mean of the last row: accuracy in % over tasks after the last task",
    "incremental_accuracy": "mean over rows of the row's mean: average accuracy along the way, in %",
    "forgetting": "(1/T) sum over all T tasks of (accuracy just after learning the task - at the end), in points "
    "(definition of arXiv 2407.13911; the last task counts with 0)",
    "forgetting_of_joint": "the forgetting, by the same definition, of the same kind of head made after each task from "
    "statistics that the final student collects on all training images seen so far: what any head loses when classes "
    "are added. What the run's forgetting is above it was lost because prompts moved the features of earlier classes",
    "baseline": "the frozen baseline: the bare student backbone, nothing learnt by gradient, with the better of two "
    "closed-form heads, learnt from the same training images and measured on the same validation images",
    "confusion": "validation images of each class by the student's answer after the last task",
    "accuracy_after_task": "mean of each row, in %",
    "forgetting_after_task": "the forgetting as if the run ended after that task, in points",
}


class AccuracyMatrix:
    """Filled row by row while the tasks arrive."""

    def __init__(self, tasks: int, rows: list[list[float | None]] | None = None) -> None:
        self.tasks = tasks
        self.rows: list[list[float | None]] = [list(r) for r in rows or []]

    def add(self, accuracies: list[float]) -> None:
        """Append a row: accuracy in % on tasks 0..i after learning task i."""
        assert len(accuracies) == len(self.rows) + 1
        self.rows.append([*accuracies, *[None] * (self.tasks - len(accuracies))])

    def accuracy_after(self, task: int) -> float:
        """Mean accuracy in % over tasks 0 to `task`, after learning `task`."""
        row = [a for a in self.rows[task] if a is not None]
        return sum(row) / len(row)

    def forgetting_after(self, task: int) -> float:
        """Forgetting in points after learning `task`, as DEFINITIONS has it."""
        drops = [(self.rows[j][j] or 0.0) - (self.rows[task][j] or 0.0) for j in range(task + 1)]
        return sum(drops) / len(drops)

    def summary(self) -> dict[str, object]:
        """Average accuracy, forgetting and the matrix, as DEFINITIONS has them."""
        done = range(len(self.rows))
        after = [self.accuracy_after(i) for i in done]
        return {
            "average_accuracy": after[-1],
            "forgetting": self.forgetting_after(len(self.rows) - 1),
            "incremental_accuracy": sum(after) / len(after),
            "accuracy_after_task": after,
            "forgetting_after_task": [self.forgetting_after(i) for i in done],
            "matrix": self.rows,
        }

    def write_csv(self, path: Path) -> None:
        """Write the matrix as CSV: one row for each task that was learnt, empty above the diagonal."""
        header = "after," + ",".join(f"task{j + 1}" for j in range(self.tasks))
        lines = [
            f"task{i + 1}," + ",".join("" if a is None else f"{a:.4f}" for a in row) for i, row in enumerate(self.rows)
        ]
        write_text(path, "\n".join([header, *lines]) + "\n")
