"""What an agent can do: each tool is a name, a schema, a policy for when its outcome is lost, and a function."""

from rorqual.agents.tools.base import Outcome, Policy, Tool, ToolBox, ToolContext, as_result
from rorqual.agents.tools.standard import standard_tools

__all__ = ["Outcome", "Policy", "Tool", "ToolBox", "ToolContext", "as_result", "standard_tools"]
