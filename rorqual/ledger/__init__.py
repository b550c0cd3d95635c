"""Keys, budgets and what was used, in one SQLite file. Knows no HTTP, no prices and no model."""

from rorqual.ledger.database import default_path
from rorqual.ledger.keys import Key, Limits
from rorqual.ledger.ledger import GROUPS, Asked, Ledger, Reservation, Used

__all__ = ["GROUPS", "Asked", "Key", "Ledger", "Limits", "Reservation", "Used", "default_path"]
