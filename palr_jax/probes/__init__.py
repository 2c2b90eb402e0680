"""Questions to a finished run beside its report: what its LLM's scores depend on, what it knew.

`finished.py` opens the run; `order.py`, `invariance.py` and `memory.py` are one probe each, with
the arithmetic in functions that need no model.
"""
