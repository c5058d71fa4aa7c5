"""What components carry a refusal: activation patching, direct logit attribution, prompt formats."""
