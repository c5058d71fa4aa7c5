"""Refusal directions: extracted, chosen by what they do, and used as a dial, with controls."""
