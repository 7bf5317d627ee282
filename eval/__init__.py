"""Encoders, embeddings, probes, statistics and the report: what a checkpoint has learned."""
