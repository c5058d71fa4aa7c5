"""Behaviors: what is explained. Refusal is one."""
