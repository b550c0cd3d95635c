"""The suites of `rorqual eval`: items, baselines and figures of each; graders belong to the task families."""

from rorqual.evals.suites.registry import NAMES, build, check_name

__all__ = ["NAMES", "build", "check_name"]
