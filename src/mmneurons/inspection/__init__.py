"""Are the neurons found sensitive, specific and causal, and is the ranking true? See METRICS in docs/results.md."""
