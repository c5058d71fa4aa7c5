"""Repair: an edit that lowers the refusal of harmless prompts and leaves that of harmful ones."""
