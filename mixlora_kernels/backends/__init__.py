"""The backends: ``base`` says what each offers, ``select`` which one serves, ``node`` what those made of stages share."""
