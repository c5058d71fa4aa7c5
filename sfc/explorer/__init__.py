"""Finished circuits and their models in a browser on this machine."""
