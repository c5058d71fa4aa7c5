"""The report of a run: every finished artifact of a preset in one Markdown file and one HTML page."""
