"""How anything is measured: checked, timed in rounds, its memory and launches counted. It knows no case."""
