"""Models: loading, batches, interventions, runs from a cached residual stream, generation."""
