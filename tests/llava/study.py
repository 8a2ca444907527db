"""A base of the study's that is made in a moment."""

from mixlora_llava.study import base

TINY = base.Recipe(width=32, vision_width=16, layers=1, tower_steps=2, steps=2, batch=4)
