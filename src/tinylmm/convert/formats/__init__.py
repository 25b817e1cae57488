"""One module a checkpoint format, with its reader and its writer; `format.py` finds whatever lies here."""
