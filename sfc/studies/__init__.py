"""Studies: each measures something and says what its page shows."""
