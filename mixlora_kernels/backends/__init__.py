"""The backends. ``base`` defines what a backend offers, ``select`` selects one, and ``node`` is the autograd node of
the backends that are made of stages."""
