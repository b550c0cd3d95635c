"""DSec in Python: four kinds of sandbox behind one SDK (V4 report, section 5.2.5)."""
