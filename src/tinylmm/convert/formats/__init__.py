"""One module a checkpoint format, with its reader and its writer. A module that lies here is in the table (`format.py`)."""
