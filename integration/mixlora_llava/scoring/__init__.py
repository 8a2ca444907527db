"""Answer questions, and score the answers: exactly, by a judge, with POPE and with MME."""
