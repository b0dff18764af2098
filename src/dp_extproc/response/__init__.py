"""Answers, where they are more than passed on. Pure."""
