"""Tasks that an agent works on in a sandbox and hidden tests judge: Terminal-Bench's and SWE-bench's forms."""

from rorqual.evals.agent_tasks.read import read_tasks
from rorqual.evals.agent_tasks.runner import TaskRun, run_tasks, summary
from rorqual.evals.agent_tasks.task import AgentTask, InvalidTask, Judged

__all__ = ["AgentTask", "InvalidTask", "Judged", "TaskRun", "read_tasks", "run_tasks", "summary"]
