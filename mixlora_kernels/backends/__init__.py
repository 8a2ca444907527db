"""The backends: ``base`` says what each offers, ``select`` which one serves, ``node`` what those of stages share."""
