"""Analyse an adapter: interference between tasks, and which factors are chosen for which inputs."""
