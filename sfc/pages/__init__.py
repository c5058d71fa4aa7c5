"""Pages: blocks of text, tables and figures, and their renderers."""
