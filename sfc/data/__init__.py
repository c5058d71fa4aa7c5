"""Prompts: read, clean, balance, split, render."""
