"""Metrics of captions and maps: CHAIR and POPE for hallucination, similarity of texts, maps against masks."""
