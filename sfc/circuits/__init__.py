"""Circuits: nodes, ablation, discovery methods, edges, faithfulness, checks, exchange formats."""
