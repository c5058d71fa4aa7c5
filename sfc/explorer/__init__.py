"""The explorer: finished circuits side by side, and prompts put to their models, in a browser on this machine."""
