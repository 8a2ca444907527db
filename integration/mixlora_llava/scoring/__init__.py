"""Answers to questions, and their scores: exact or by a judge, POPE, MME."""
